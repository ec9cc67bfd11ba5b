"""Tests of the study: what it runs, what it counts as done, its statistics and its claims.

python -m pytest tests/test_study.py     # about two minutes; one test runs the smoke preset
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import itertools
import json
import math
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import siren
import toy_env
from examples import study, study_figures
from examples.engine import load_checkpoint

ROOT = Path(study.__file__).resolve().parents[1]
SMOKE = [sys.executable, str(ROOT / "examples/study.py"), "--preset", "smoke", "--out"]
TINY = study.Final(prompts=3, samples=16, probe=3)


@pytest.fixture(autouse=True)
def one_thread():
    """What the study's workers do: results must repeat to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made_up_run(method="siren", seed=0, beta=0.1, score=0.5, **changes) -> study_figures.Run:
    """A run with chosen numbers: held, reward, useless, entropy."""
    config = {"task": f"toy_env:seed={seed}", "seed": seed, "beta": beta}
    before = {"reward": 0.2, "h_agg": 1.2, "useless_share": 0.0, "entropy": 0.8}
    after = {"reward": changes.get("reward", 0.7), "useless_share": changes.get("useless", 0.0)}
    after |= {"h_agg": 1.2 * changes.get("held", 0.9), "entropy": changes.get("entropy", 0.2)}
    values = dict.fromkeys(study_figures.SCORES, score)
    evals = [{"split": g, "temperature": t, **values} for g in ("easy", "hard") for t in (0.6, 1.0)]
    row = {"config": config, "before": before, "after": after, "evals": evals, "steps": 300}
    return study_figures.Run(method, row)


def stand_in(job: study.Job) -> study_figures.Run:
    """A run of a job that has not run."""
    return made_up_run(job.method, job.cfg.seed, job.cfg.beta)


def tiny_job(**changes) -> study.Job:
    """Two steps on the shipped base model."""
    knobs = {"steps": 2, "eval_prompts": 2, "eval_samples": 16, "prompts": 4, "device": "cpu"}
    return study.Job("siren", siren.Config(**{**knobs, **changes}), TINY)


@pytest.fixture(scope="module")
def tiny_row():
    """A tiny job and its row, run as a worker would."""
    torch.set_num_threads(1)
    job = tiny_job()
    return job, json.loads(json.dumps({**study.run_job(job), **study.origin()}))


# ------------------------------------------------------------------------------------ 1. statistics
def test_bootstrap_is_the_distribution_of_all_resamples():
    x = [0.0, 1.0, 5.0, 6.0]
    means = sorted(sum(draw) / 4 for draw in itertools.product(x, repeat=4))  # all 256
    mean, low, high = study_figures.bootstrap(x)
    assert mean == 3.0
    # the percentile of 10000 draws falls on an atom of the exact distribution next to it
    exact = [np.percentile(means, q) for q in (1.5, 2.5, 3.5, 96.5, 97.5, 98.5)]
    assert exact[0] <= low <= exact[2] and exact[3] <= high <= exact[5]
    assert study_figures.bootstrap(x) == (mean, low, high)
    assert study_figures.bootstrap([v + 10 for v in x]) == pytest.approx((13, low + 10, high + 10))


def test_paired_differences_match_seeds_and_leave_out_what_has_no_partner():
    mine = [made_up_run("siren", seed, score=0.5 + seed / 10) for seed in (2, 0, 1)]
    theirs = [made_up_run("dr_grpo", seed, score=0.1) for seed in (0, 2, 3)]
    gains = study_figures.paired(mine + theirs, "siren", "dr_grpo", lambda r: r.hard("maj@16"))
    assert gains == pytest.approx([0.4, 0.6])  # seeds 0 and 2


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "held"),
        ({"held": 0.65}, "held"),
        ({"held": 0.64}, "between"),
        ({"held": 0.6}, "between"),
        ({"held": 0.59}, "collapsed"),
        ({"held": 0.9, "reward": 0.19}, "between"),  # learned nothing
        ({"held": 3.0, "reward": 0.01, "useless": 0.31}, "exploded"),
        ({"held": 3.0, "reward": 0.03, "useless": 0.31}, "between"),  # reward over a tenth
        ({"held": 3.0, "reward": 0.01, "useless": 0.29}, "between"),
    ],
)
def test_states(changes, state):
    assert made_up_run(**changes).state == state


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ({0.002: 0, 0.02: 1, 0.06: 1, 0.2: 1, 2.0: 0}, (0.02, 0.2)),
        ({0.006: 1, 0.01: 0, 0.02: 1, 0.06: 1, 2.0: 0}, (0.02, 0.06)),
        ({0.002: 1, 0.02: 1, 0.06: 0, 0.2: 1, 0.6: 1}, (0.002, 0.02)),
        ({0.002: 0, 0.02: 0, 0.06: 1, 0.2: 0}, (0.06, 0.06)),
        ({0.002: 0, 0.02: 0}, None),
    ],
)
def test_held_range_is_the_widest_unbroken_one(held, expected):
    runs = [
        made_up_run("siren", seed, beta, held=0.9 if ok or seed else 0.1)  # one seed decides
        for beta, ok in held.items()
        for seed in (0, 1)
    ]
    runs += [made_up_run("naive_bonus", 0, beta) for beta in (1e-6, 1e6)]  # no business of SIREN's
    assert study_figures.held_range(runs[::-1], "siren") == expected


def test_claims_follow_the_numbers():
    good = {"siren": {"held": 0.8, "score": 0.8}, "dr_grpo": {"held": 0.5, "score": 0.4}}
    good |= {"base": {"held": 1.0, "score": 0.9}}
    good |= {"naive_exploding": {"held": 3.0, "reward": 0.0, "useless": 0.9}}

    def failing(changes=None, entropy=0.2):
        runs = [
            made_up_run(
                m, seed, entropy=entropy, **{**good[m], **(changes or {}).get((m, seed), {})}
            )
            for m in good
            for seed in (0, 1, 2)
        ]
        claims = enumerate(study_figures.table_claims(runs))
        return [text.split(":")[0] + str(i) for i, (text, holds, _) in claims if not holds]

    assert failing() == []
    assert failing(entropy=0.3) == ["collapse0"]
    assert failing({("dr_grpo", 1): {"score": 0.6}}) == ["collapse1"]
    assert failing({("naive_exploding", 2): {"useless": 0.2}}) == ["explosion2"]
    assert failing({("siren", 1): {"held": 0.6}}) == ["held3"]
    assert failing({("dr_grpo", 0): {"held": 0.7}}) == ["held4"]
    # a mean that is large enough does not do if the interval reaches 0
    assert failing({("siren", 0): {"score": 0.3}}) == ["effect5", "effect6"]


# ------------------------------------------------------------------------- 2. what is run, and once
def test_every_setting_that_changes_numbers_changes_the_key():
    base = study.Job("siren", siren.Config(), study.Final()).settings
    for part, free in (("config", study.NOT_NUMERIC), ("final", ())):
        for name, value in base[part].items():
            changed = "something else" if value is None else (value, "changed")
            other = {**base, part: {**base[part], name: changed}}
            assert (study.key_of(other) == study.key_of(base)) == (name in free), name
    assert study.key_of({**base, "rules": {"strict": True}}) != study.key_of(base)


def test_a_row_outlives_a_new_field_and_not_a_new_default():
    base = study.Job("siren", siren.Config(), study.Final()).settings
    older = {k: v for k, v in base["config"].items() if k != "plug"} | {"since_removed": 1}
    assert study.key_of({**base, "config": older}) == study.key_of(base)
    other = {**base, "config": older | {"lr": 1e-5}}
    assert study.key_of(other) != study.key_of(base)
    assert study.key_of(json.loads(json.dumps(base))) == study.key_of(base)


def every_job(size: study.Size) -> dict[str, list[study.Job]]:
    """Group -> jobs of all presets, whatever is chosen."""
    groups: dict[str, list[study.Job]] = {}
    for stages in study.PRESETS.values():
        for group, stage in stages.items():
            runs = {name: list(map(stand_in, jobs)) for name, jobs in groups.items()}
            groups[group] = stage(size, runs)
    return groups


def test_what_is_chosen_never_sees_test_seeds_or_prompts():
    for group, jobs in every_job(study.FULL).items():
        reported = group in ("quick", "table", "fresh")
        assert {siren.load_task(job.cfg).split for job in jobs} == {
            "test" if reported else "validation"
        }
        seeds = {job.cfg.seed for job in jobs}
        assert seeds.isdisjoint(study.FULL.validation_seeds) == reported
        assert all(siren.load_task(job.cfg).seed == job.cfg.seed for job in jobs)


def test_the_table_has_the_methods_that_were_promised_and_fair_candidates():
    groups = every_job(study.FULL)
    table = groups["table"]
    names = "base dr_grpo naive_best naive_exploding siren wo_top_p wo_peak wo_anchor anchor_only"
    assert {job.method for job in table} == set(names.split())
    assert len(table) == 9 * len(study.FULL.seeds) and len(study.FULL.seeds) >= 8
    assert all(job.final == study.Final(512, 64, (0.6, 1.0)) for job in table)
    grid = {(job.method, job.cfg.beta) for job in groups["tune"]}
    counts = {m: sum(method == m for method, _ in grid) for m in study.METHODS}
    assert counts.pop("dr_grpo") == 1 and set(counts.values()) == {4}
    what = {job.method: job.cfg for job in table}
    assert (what["wo_top_p"].top_p, what["wo_top_p"].peak_quantile) == (1.0, 0.8)
    assert (what["wo_peak"].top_p, what["wo_peak"].peak_quantile) == (0.8, 0.0)
    assert (what["anchor_only"].top_p, what["anchor_only"].peak_quantile) == (1.0, 0.0)
    assert what["wo_anchor"].regularizer == what["naive_best"].regularizer == "bonus"
    assert (what["naive_best"].top_p, what["naive_best"].peak_quantile) == (1.0, 0.0)


def test_presets_share_jobs():
    """What a group adds to those before it."""
    seen, new, groups = set(), [], every_job(study.FULL)
    for group in ("tune", "band", "vocabularies", "sensitivity", "official"):
        keys = {study.key_of(job.settings) for job in groups[group]}
        assert len(keys) == len(groups[group]) or group == "sensitivity"  # p = tau = 0.8 repeats
        new.append(len(keys - seen))
        seen |= keys
    assert new == [75, 18, 21, 15, 12]
    assert set(study.FULL.fresh_seeds).isdisjoint((*study.FULL.seeds, *study.FULL.quick_seeds))


def test_choice_of_coefficients():
    scores = {0.02: (0.5, 0.7), 0.06: (0.9, 0.3), 0.2: (0.6, 0.6), 0.6: (0.1, 0.1)}
    runs = {
        (method, beta, seed): made_up_run(method, seed, beta, score)
        for method in ("siren", "naive_bonus")
        for beta, by_seed in scores.items()
        for seed, score in enumerate(by_seed)
    }
    chosen = study.choose(list(runs.values()))
    assert chosen["siren"] == ("siren", 0.02)  # 0.02, 0.06 and 0.2 tie at a mean of 0.6
    assert chosen["naive_best"] == ("naive_bonus", 0.02)
    assert chosen["naive_exploding"] == ("naive_bonus", 0.6)  # none explodes: the largest
    broken = {"held": 3.0, "reward": 0.0, "useless": 0.9}
    for beta, seed in ((0.06, 0), (0.2, 0), (0.2, 1), (0.6, 0), (0.6, 1)):
        runs["naive_bonus", beta, seed] = made_up_run("naive_bonus", seed, beta, 0.0, **broken)
    assert study.choose(list(runs.values()))["naive_exploding"] == ("naive_bonus", 0.2)


# --------------------------------------------------------------------------------------- 3. one job
def test_no_evaluation_prompt_may_be_trained_on(monkeypatch):
    world, cfg = toy_env.ToyWorld(), siren.Config(steps=2, prompts=8)
    heldout = world.heldout(8)
    study.check_unseen(world, cfg, heldout)
    other = toy_env.ToyWorld(split="validation")
    with pytest.raises(AssertionError, match="is of the test split"):
        study.check_unseen(other, cfg, heldout)
    with pytest.raises(AssertionError, match="is of the train split"):
        study.check_unseen(world, cfg, {"easy": world.train_problems(1, "x")})
    shuffled = toy_env.Problem([*heldout["hard"][3].prompt[-2::-1], toy_env.EQUALS], "")
    monkeypatch.setattr(toy_env.ToyWorld, "train_problems", lambda *_: [shuffled])
    with pytest.raises(AssertionError, match="was trained on"):
        study.check_unseen(world, cfg, heldout)


def test_training_draws_the_prompts_that_are_checked(tmp_path, monkeypatch):
    cfg = dataclasses.replace(tiny_job().cfg, out=str(tmp_path / "run"))
    world, drawn, original = toy_env.ToyWorld(), [], toy_env.ToyWorld.train_problems

    def recording(self, n, seed):
        drawn.append(original(self, n, seed))
        return drawn[-1]

    monkeypatch.setattr(toy_env.ToyWorld, "train_problems", recording)
    siren.train(cfg)
    assert drawn == [original(world, cfg.prompts, f"{cfg.seed}/{step}") for step in (1, 2)]


def test_a_job_is_sirens_own_training_and_evaluation(tiny_row, tmp_path):
    job, row = tiny_row
    cfg = dataclasses.replace(job.cfg, out=str(tmp_path / "run"))
    records = siren.train(cfg)
    assert [r["step"] for r in row["log"]] == [0, 1, 2]
    for kept, record in zip(row["log"], records):
        assert kept == study.slim({key: record[key] for key in kept})
        assert {"reward", "entropy", "h_agg"} <= kept.keys() or kept["step"] == 0
    task = siren.load_task(cfg)
    model = task.build_model()
    weights = load_checkpoint(tmp_path / "run")["model"]
    assert weights.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(weights, strict=False)
    assert row["anchor"] == records[-1]["anchor"]
    for values in row["evals"]:
        how = {"eval_samples": 16, "eval_temperature": values["temperature"]}
        test = dataclasses.replace(cfg, **how)
        own = siren.evaluate(model, task, task.heldout(3)[values["split"]], test)
        assert study.slim(own).items() <= values.items()
    run = study_figures.Run("siren", row)
    assert set(run.evals) == {(g, t) for g in ("easy", "hard") for t in (0.6, 1.0)}
    assert row["diverged"] is None and row["steps"] == 2 and run.vocab == 256
    assert siren.Config(**row["config"]) == job.cfg


def test_a_variant_trains_by_official_rules_and_is_measured_by_the_definition(tiny_row):
    job, row = tiny_row
    other = study.run_job(dataclasses.replace(job, rules={"exclusive": True}))
    one, same = row["log"][1], other["log"][1]
    assert one["reward"] == same["reward"] and one["entropy"] == same["entropy"]  # of one rollout
    assert same["h_agg"] < 0.9 * one["h_agg"]
    assert other["before"] == row["before"] and other["after"] != row["after"]


def test_the_first_steps_of_a_stored_run_are_those_of_todays_code(tmp_path, monkeypatch):
    """With the earlier version's way of drawing; seed 0, since its base model is shipped."""
    job = study.make_job(study.FULL, "siren", 0.2, 0, final=study.FULL.final)
    row = study.Store(ROOT / "results").rows[study.key_of(job.settings)]
    cfg = dataclasses.replace(
        job.cfg, steps=3, eval_every=0, eval_prompts=1, out=str(tmp_path / "a")
    )
    draw = partial(torch.multinomial, num_samples=1)
    monkeypatch.setattr(siren, "draw", lambda pi, generator: draw(pi, generator=generator))
    for record, stored in zip(siren.train(cfg)[1:], row["log"][1:]):
        for key in ("reward", "entropy", "h_agg", "grad_norm", "useless_share"):
            assert record[key] == pytest.approx(stored[key], abs=1e-3)


def test_scores_for_every_k_are_those_of_blocks_and_subsets():
    task, cfg, n = toy_env.ToyWorld(), siren.Config(seed=5), 4
    model = task.build_model()
    problems = [p for some in task.heldout(6).values() for p in some]
    found = study.evaluate(model, task, problems, cfg, n, 1.0)
    rollout = siren.respond(model, task, problems, cfg, "5/eval", n, 1.0)
    sums: dict[str, float] = {}
    for i, problem in enumerate(problems):
        texts = [task.decode(ids) for ids in rollout.responses()[i * n : i * n + n]]
        given = [t.split()[-2] if t.endswith(" <eos>") else None for t in texts]
        right = [g == problem.answer for g in given]
        for k in (1, 2, 4):
            blocks = [slice(b, b + k) for b in range(0, n, k)]
            subsets = list(itertools.combinations(right, k))
            votes = [[g for g in given[b] if g] for b in blocks]
            wins = [v and max(v, key=lambda g, v=v: (v.count(g), -v.index(g))) for v in votes]
            each = {"pass": sum(map(any, subsets)) / len(subsets)}
            each["maj"] = sum(w == problem.answer for w in wins) / len(wins)
            each["distinct"] = np.mean([len(set(texts[b])) / k for b in blocks])
            for name, value in each.items():
                sums[f"{name}@{k}"] = sums.get(f"{name}@{k}", 0.0) + value / len(problems)
        sums["avg@16"] = sums.get("avg@16", 0.0) + sum(right) / n / len(problems)
    assert found == pytest.approx(sums) and 0 < found["maj@4"] < found["pass@4"] < 1


def test_probe_measures_the_definitions_token_by_token(tiny_row):
    job, row = tiny_row
    task, before = toy_env.ToyWorld(), row["before"]
    model = task.build_model()
    problems = task.train_problems(TINY.probe, "0/probe")
    rollout = siren.respond(model, task, problems, job.cfg, "0/probe", study.PROBE_SAMPLES, 1.0)
    right, all_h, h_i, positions = 0, [], [], {}
    for i, response in enumerate(rollout.responses()):
        problem = problems[i // study.PROBE_SAMPLES]
        ids = torch.tensor([problem.prompt + response])
        with torch.no_grad():
            logits = model(ids).logits[0, len(problem.prompt) - 1 : -1].double()
        h_nucleus = []
        for t, row_logits in enumerate(logits):
            p = sorted(row_logits.softmax(-1).tolist(), reverse=True)
            inside, mass = [], 0.0
            while mass < 0.8:
                inside.append(p[len(inside)])
                mass = sum(inside)
            h_nucleus.append(-sum(q / mass * math.log(q / mass) for q in inside))
            all_h.append(-sum(q * math.log(q) for q in p))
            positions.setdefault(t, []).append(h_nucleus[-1])
        q = np.quantile(h_nucleus, 0.8)
        peaks = [h for h in h_nucleus if h >= q - 1e-6 and h > 1e-9]
        h_i.append(sum(peaks) / max(1, len(peaks)))
        right += task.decode(response).endswith(f" {problem.answer} <eos>")
    assert before["reward"] == pytest.approx(right / len(h_i), abs=1e-5)
    assert before["entropy"] == pytest.approx(np.mean(all_h), rel=1e-4)
    assert before["h_agg"] == pytest.approx(np.mean(h_i), rel=1e-4)
    profile = [np.mean(values) for _, values in sorted(positions.items())]
    assert before["by_position"]["nucleus_entropy"] == pytest.approx(profile, abs=1e-4)
    # the same ruler for every method
    other = tiny_job(top_p=1.0, peak_quantile=0.0)
    assert study.slim(study.probe(model, task, other)) == before


def test_csv_row_is_what_the_rows_say(tiny_row, tmp_path):
    run = study_figures.Run("siren", tiny_row[1])
    study_figures.write_csv([run], tmp_path / "main.csv")
    with open(tmp_path / "main.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    promised = "method seed split temperature steps reward avg@16 maj@16 pass@16 distinct@16 "
    promised += "entropy entropy_start h_agg anchor useless_share beta"
    assert list(rows[0]) == promised.split() and len(rows) == 4
    for row in rows:
        values = run.evals[row["split"], float(row["temperature"])]
        for key in study_figures.SCORES:
            assert float(row[key]) == values[key]
        assert float(row["entropy_start"]) == run.before["entropy"] != run.after["entropy"]
        assert float(row["anchor"]) == run.before["h_agg"] != float(row["h_agg"])


def test_a_diverged_run_is_a_result(monkeypatch):
    """The policy of the last checkpoint is evaluated, and the row says where training stopped."""
    original, calls = siren.training_step, []

    def failing(model, optimizer, task, cfg, step, anchor):
        calls.append(step)
        if step == 2:
            raise FloatingPointError("the model's logits are not finite")
        return original(model, optimizer, task, cfg, step, anchor)

    monkeypatch.setattr(siren, "training_step", failing)
    row = study.run_job(tiny_job(steps=3, save_every=1))
    assert calls == [1, 2] and row["steps"] == 1
    assert row["diverged"] == "step 2: the model's logits are not finite"
    assert [r["step"] for r in row["log"]] == [0, 1] and len(row["evals"]) == 4


def test_finished_jobs_of_any_preset_count_and_half_files_do_not(tiny_row, tmp_path):
    job, row = tiny_row
    study.Store(tmp_path).add("some", row)
    (tmp_path / "raw" / "some.jsonl.part").write_text('{"method": ')  # what a kill leaves
    store = study.Store(tmp_path)
    other = dataclasses.replace(job, cfg=dataclasses.replace(job.cfg, beta=7.0))
    relabelled = dataclasses.replace(job, method="anchor_only")
    assert list(store.missing([job, other, relabelled]).values()) == [other]
    assert store.runs([job, other]) == []
    found = store.runs([job, relabelled, job])
    assert [(run.method, run.row) for run in found] == [("siren", row), ("anchor_only", row)]
    # the same rows in another order: the same file
    second = json.loads(json.dumps({**row, "config": {**row["config"], "beta": 7.0}}))
    store.add("some", second)
    for some in (second, row):
        study.Store(tmp_path / "b").add("some", some)
    files = [tmp_path / "raw/some.jsonl.gz", tmp_path / "b/raw/some.jsonl.gz"]
    assert files[0].read_bytes() == files[1].read_bytes()
    for data in (b"hello", gzip.compress(b"{}"), gzip.compress(b"[]"), gzip.compress(b"1")[:-4]):
        files[1].write_bytes(data)
        with pytest.raises(siren.ConfigError, match=r"some\.jsonl\.gz.*delete it"):
            study.Store(tmp_path / "b")


# ------------------------------------------------------------------------------ 4. the command line
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "huge"], "huge"),
        (["--workers", "0"], "--workers 0: must be 1 to 64"),
        (["--seeds", "a-b"], "--seeds a-b: must be a range of seeds"),
        (["--seeds", "5-3"], "--seeds 5-3: must be a range of seeds"),
        (["--seeds", "1-2-3"], "--seeds 1-2-3: must be a range of seeds"),
        (["--seeds", "99-100"], "must leave out the validation seeds [100]"),
        (["--preset", "quick", "--out", "/dev/null/x"], "--out /dev/null/x: can't be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, message, capsys):
    assert study.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_plan_runs_nothing_and_counts_every_job_once(tmp_path, capsys):
    out = tmp_path / "none"
    assert study.main(["--plan", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "main/tune: 75 jobs, of which 75 to run" in text and not out.exists()
    assert "main/table: left out" in text
    assert "sweep_band/band: 45 jobs, of which 18 to run" in text
    assert "sweep_band/vocabularies: 30 jobs, of which 21 to run" in text
    assert "in all 153 jobs to run" in text


def test_what_is_stored_is_all_of_the_study(tmp_path, capsys):
    """results/raw is complete for today's settings; and the tables follow from it."""
    assert study.main(["--plan"]) == 0
    assert "to run" not in capsys.readouterr().out
    results = study.collect(list(study.PRESETS), study.FULL, study.Store(ROOT / "results"), None)
    assert study_figures.tables(results) == (ROOT / "results/tables.md").read_text()


def processes() -> dict[int, int]:
    """Process id -> its parent's, of all that run."""
    lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True)
    rows = (line.split() for line in lines.stdout.splitlines())
    return {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z")}


def wait_until(condition, seconds: float = 300.0) -> None:
    """Poll; fails after this long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def stop_halfway(out: Path, rows: int, how: int) -> tuple[subprocess.Popen, set[int]]:
    """Start the smoke preset, send the signal once so many rows are there; its workers."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # a process in the background of a script ignores Ctrl-C, and so would its children
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    child = subprocess.Popen([*SMOKE, str(out)], **pipes, preexec_fn=heed)
    wait_until(lambda: len(study.Store(out).rows) >= rows)
    workers = {pid for pid, parent in processes().items() if parent == child.pid}
    with pytest.raises(siren.ConfigError, match="another process"):
        study.study(["--preset", "smoke", "--out", str(out)])
    child.send_signal(how)
    child.wait(60)
    return child, workers


def test_smoke_survives_ctrl_c_and_kill_and_repeats(tmp_path):
    """Interrupted, killed, resumed: the same numbers, nothing run twice, no process left behind."""
    out = tmp_path / "out"
    child, workers = stop_halfway(out, 2, signal.SIGINT)
    error = child.stderr.read()
    assert child.returncode == 130 and "goes on from here" in error and "Traceback" not in error
    assert workers and not workers & processes().keys()
    done = study.Store(out).rows
    _, workers = stop_halfway(out, len(done) + 2, signal.SIGKILL)
    wait_until(lambda: not workers & processes().keys(), 60)
    done |= study.Store(out).rows
    subprocess.run([*SMOKE, str(out)], check=True, capture_output=True)
    rows = study.Store(out).rows
    assert all(rows[key] == row for key, row in done.items())  # with the seconds that they took
    names = "quick entropy diversity pass_at_k positions band vocabularies sensitivity"
    made = [out / f"{name}.png" for name in names.split()] + [out / "main.csv", out / "quick.csv"]
    before = {path: path.read_bytes() for path in made}
    for name, count in (("main", 2 * 4 * 4), ("quick", 3 * 2)):  # 4 rows: grades, temperatures
        lines = list(csv.DictReader((out / f"{name}.csv").open()))
        assert len(lines) == count
        numbers = [
            float(v) for line in lines for k, v in line.items() if k not in ("method", "split")
        ]
        assert all(map(math.isfinite, numbers))
    # drawn again from the rows alone, and one job run again: the same to the last byte
    tables = (out / "tables.md").read_text()
    (again,) = [key for key, row in rows.items() if row["method"] == "naive_exploding"][:1]
    store = study.Store(out)
    (path,) = store.files
    kept = [row for row in store.files[path] if row != rows[again]]
    assert len(kept) == len(rows) - 1
    text = "".join(json.dumps(row) + "\n" for row in kept)
    for some in made:
        some.unlink()
    path.write_bytes(gzip.compress(text.encode()))
    subprocess.run([*SMOKE, str(out)], check=True, capture_output=True)
    assert {some: some.read_bytes() for some in made} == before
    new = study.Store(out).rows
    assert new.keys() == rows.keys()
    free = {"seconds": 0, "commit": ""}  # what may differ
    assert {**new[again], **free} == {**rows[again], **free}
    cost = tables.index("## Cost and origin")
    assert (out / "tables.md").read_text()[:cost] == tables[:cost]
