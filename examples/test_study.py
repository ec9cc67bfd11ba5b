"""Tests of the study: what it runs, what it counts as done, its statistics and its claims.

python -m pytest examples/test_study.py     # about two minutes; one test runs the smoke preset
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import study
import study_figures
import torch

import siren
import toy_env

STUDY = [sys.executable, str(Path(study.__file__))]


@pytest.fixture(autouse=True)
def one_thread():
    """What the study's workers do: results must repeat to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made_up_run(method="siren", seed=0, beta=0.1, score=0.5, **changes) -> study_figures.Run:
    """A run with chosen numbers: held, reward, useless, vocab, steps, config."""
    task = f"toy_env:seed={seed}" + (f",vocab={changes['vocab']}" if "vocab" in changes else "")
    config = {"task": task, "seed": seed, "beta": beta, "top_p": 0.8, "peak_quantile": 0.8}
    config |= changes.get("config", {})
    head = {"config": config, "final": {"samples": 64}, "steps": changes.get("steps", 300)}
    before = {"reward": 0.2, "nucleus_entropy": 1.2, "useless_share": 0.0, "entropy": 0.8}
    after = {"reward": changes.get("reward", 0.7), "useless_share": changes.get("useless", 0.0)}
    after |= {"nucleus_entropy": 1.2 * changes.get("held", 0.9), "entropy": 0.4}
    values = {"avg@64": score, "maj@16": score, "pass@16": score, "distinct@16": score}
    evals = {(grade, t): values for grade in ("easy", "hard") for t in (0.6, 1.0)}
    return study_figures.Run(method, head, [], evals, before, after)


TINY = study.Final(prompts=3, samples=16, temperatures=(0.6, 1.0), probe=3)


def tiny_job(**changes) -> study.Job:
    """Two steps on the shipped base model."""
    knobs = {"steps": 2, "threads": 1, "eval_prompts": 2, "eval_samples": 16, "prompts": 4}
    return study.Job("siren", siren.Config(**{**knobs, **changes}), TINY)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A tiny job and its file, run as a worker would."""
    path = tmp_path_factory.mktemp("out") / "raw" / "some" / "job.jsonl"
    torch.set_num_threads(1)
    job = tiny_job()
    study.run_job(job, path, study.origin())
    return job, path


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

    def maj(run):
        return run.evals["hard", 0.6]["maj@16"]

    gains = study_figures.paired(mine + theirs, "siren", "dr_grpo", maj)
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

    def claims(changes):
        runs = [
            made_up_run(method, seed, **{**numbers, **changes.get((method, seed), {})})
            for method, numbers in good.items()
            for seed in (0, 1, 2)
        ]
        for run in runs:
            run.after["entropy"] = changes.get("entropy", 0.2)
        return {text.split(":")[0] + str(i): ok for i, (text, ok, _) in
                enumerate(study_figures.table_claims(runs))}  # fmt: skip

    assert all(claims({}).values())
    one_bad = [
        ({"entropy": 0.3}, "collapse0"),
        ({("dr_grpo", 1): {"score": 0.6}}, "collapse1"),
        ({("naive_exploding", 2): {"useless": 0.2}}, "explosion2"),
        ({("siren", 1): {"held": 0.6}}, "held3"),
        ({("dr_grpo", 0): {"held": 0.7}}, "held4"),
    ]
    for changes, failing in one_bad:
        assert [name for name, ok in claims(changes).items() if not ok] == [failing]
    # a mean that is large enough does not do if the interval reaches 0
    lost = claims({("siren", 0): {"score": 0.3}})
    assert not lost["effect5"] and not lost["effect6"] and lost["effect7"]


# ------------------------------------------------------------------------- 2. what is run, and once
def test_every_setting_that_changes_numbers_changes_the_key():
    base = dataclasses.asdict(siren.Config()), dataclasses.asdict(study.Final())
    for which, values in enumerate(base):
        for name, value in values.items():
            parts = [dict(part) for part in base]
            parts[which][name] = "something else" if value is None else (value, "changed")
            same = study.key_of(*parts) == study.key_of(*base)
            assert same == (which == 0 and name in study.NOT_NUMERIC), name


def test_a_file_outlives_a_new_field_and_not_a_new_default():
    config, final = dataclasses.asdict(siren.Config()), dataclasses.asdict(study.Final())
    older = {k: v for k, v in config.items() if k != "eval_top_p"} | {"since_removed": 1}
    assert study.key_of(older, final) == study.key_of(config, final)
    assert study.key_of(older | {"lr": 1e-5}, final) != study.key_of(config, final)
    assert study.key_of(config, json.loads(json.dumps(final))) == study.key_of(config, final)


def test_what_is_chosen_never_sees_test_seeds_or_prompts():
    size, runs = study.FULL, {}
    for stages in study.PRESETS.values():
        for group, stage in stages.items():
            jobs = stage(size, runs)
            runs[group] = [study.stand_in(job) for job in jobs]
            reported = group in ("quick", "table", "fresh")
            assert {job.cfg.eval_split for job in jobs} == {"test" if reported else "validation"}
            seeds = {job.cfg.seed for job in jobs}
            assert seeds.isdisjoint(size.validation_seeds) == reported
            for job in jobs:
                assert f"seed={job.cfg.seed}" in job.cfg.task.replace(",", ":").split(":")


def test_the_table_has_the_methods_that_were_promised_and_fair_candidates():
    tune = study.tune_jobs(study.FULL, {})
    table = study.table_jobs(study.FULL, {"tune": [study.stand_in(job) for job in tune]})
    names = "base dr_grpo naive_best naive_exploding siren wo_top_p wo_peak wo_anchor anchor_only"
    assert {job.method for job in table} == set(names.split())
    assert len(table) == 9 * len(study.FULL.seeds) and len(study.FULL.seeds) >= 8
    assert all(job.final == study.Final(512, 64, (0.6, 1.0)) for job in table)
    grid = {(job.method, job.cfg.beta) for job in tune}
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
    seen, new, sizes = set(), [], []
    for group in ("tune", "band", "vocabularies", "sensitivity", "official"):
        stage = next(stages[group] for stages in study.PRESETS.values() if group in stages)
        jobs = stage(study.FULL, {})
        keys = {job.key for job in jobs}
        assert len(keys) == len(jobs) or group == "sensitivity"  # which repeats p = tau = 0.8
        sizes.append(len(keys))
        new.append(len(keys - seen))
        seen |= keys
    assert new == [75, 18, 21, 15, 12]
    assert all(more >= fewer for more, fewer in zip(sizes, new))
    assert set(study.FULL.fresh_seeds).isdisjoint((*study.FULL.seeds, *study.FULL.quick_seeds))


def test_choice_of_coefficients():
    scores = {0.02: (0.5, 0.7), 0.06: (0.9, 0.3), 0.2: (0.6, 0.6), 0.6: (0.1, 0.1)}
    runs = [
        made_up_run(method, seed, beta, score)
        for method in ("siren", "naive_bonus")
        for beta, by_seed in scores.items()
        for seed, score in enumerate(by_seed)
    ]
    broken = {"held": 3.0, "reward": 0.0, "useless": 0.9}
    runs = [r for r in runs if (r.method, r.beta, r.seed) != ("naive_bonus", 0.6, 1)]
    two_seeds = [*runs, made_up_run("naive_bonus", 1, 0.6, 0.1)]
    chosen = study.choose(two_seeds)
    assert chosen["siren"] == ("siren", 0.02)  # 0.02, 0.06 and 0.2 tie at a mean of 0.6
    assert chosen["naive_best"] == ("naive_bonus", 0.02)
    assert chosen["naive_exploding"] == ("naive_bonus", 0.6)  # none explodes: the largest
    for beta, seeds in ((0.06, (0,)), (0.2, (0, 1)), (0.6, (0, 1))):
        two_seeds = [r for r in two_seeds if (r.method, r.beta) != ("naive_bonus", beta)]
        two_seeds += [
            made_up_run("naive_bonus", s, beta, 0.0, **(broken if s in seeds else {}))
            for s in (0, 1)
        ]
    assert study.choose(two_seeds)["naive_exploding"] == ("naive_bonus", 0.2)


# --------------------------------------------------------------------------------------- 3. one job
def test_no_evaluation_prompt_may_be_trained_on():
    world = toy_env.ToyWorld()
    heldout = world.heldout(8, "test")
    with study.recorded_prompts() as drawn:
        world.train_problems(64, "some seed")
    assert toy_env.ToyWorld.train_problems(world, 1, "x") and len(drawn) <= 64  # no longer recorded
    study.check_unseen(drawn, heldout, "test")
    shuffled = tuple(sorted(heldout["hard"][3].prompt))
    with pytest.raises(AssertionError, match="was trained on"):
        study.check_unseen(drawn | {shuffled}, heldout, "test")
    with pytest.raises(AssertionError, match="is not of the validation split"):
        study.check_unseen(drawn, heldout, "validation")
    seen = {"easy": world.train_problems(1, "x")}
    with pytest.raises(AssertionError, match="is not of the test split"):
        study.check_unseen(set(), seen, "test")
    with pytest.raises(AssertionError, match="is not of the train split"):
        study.check_unseen(set(), seen, "train")


def test_recorded_prompts_are_those_of_the_training(tmp_path):
    cfg = dataclasses.replace(tiny_job().cfg, out=str(tmp_path / "run"))
    with study.recorded_prompts() as drawn:
        siren.train(cfg)
    world = toy_env.ToyWorld()
    steps = (world.train_problems(cfg.prompts, f"{cfg.seed}/{step}") for step in (1, 2))
    assert drawn == {tuple(sorted(p.prompt)) for problems in steps for p in problems}


def test_a_job_is_sirens_own_training_and_evaluation(tiny_run, tmp_path):
    job, path = tiny_run
    run = study_figures.read_run(path, "siren")
    cfg = dataclasses.replace(job.cfg, out=str(tmp_path / "run"))
    records = siren.train(cfg)
    assert [r["step"] for r in run.steps] == [0, 1, 2]
    for kept, record in zip(run.steps, records):
        assert kept == study.slim({key: record[key] for key in kept})
        assert {"reward", "entropy", "nucleus_entropy"} <= kept.keys() or kept["step"] == 0
    task = siren.load_task(cfg.task)
    model = task.build_model()
    model.load_state_dict(siren.load_checkpoint(cfg.folder)["model"])
    assert run.head["anchor"] == siren.load_checkpoint(cfg.folder)["state"]["anchor"]
    for (split, temperature), values in run.evals.items():
        test = dataclasses.replace(cfg, eval_samples=16, eval_temperature=temperature)
        own = siren.evaluate(model, task, task.heldout(3, "test")[split], test, (1, 2, 4, 8, 16))
        assert own.items() <= values.items() or study.slim(own).items() <= values.items()
    assert set(run.evals) == {(g, t) for g in ("easy", "hard") for t in (0.6, 1.0)}
    assert run.head["diverged"] is None and run.head["steps"] == 2
    assert siren.Config(**run.head["config"]) == job.cfg


def test_probe_measures_the_definitions_token_by_token(tiny_run):
    job, path = tiny_run
    run = study_figures.read_run(path, "siren")
    task = toy_env.ToyWorld()
    model = task.build_model()
    problems = task.train_problems(TINY.probe, "0/probe")
    how = {"samples": study.PROBE_SAMPLES, "temperature": 1.0}
    rollout = siren.rollout_of(model, task, problems, job.cfg, "0/probe", **how)
    right, all_h, h_i, positions = 0, [], [], {}
    for row, response in enumerate(rollout.responses()):
        problem = problems[row // study.PROBE_SAMPLES]
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
        text = task.decode(response)
        right += text.endswith(f" {problem.answer} <eos>")
    assert run.before["reward"] == pytest.approx(right / len(h_i), abs=1e-5)
    assert run.before["entropy"] == pytest.approx(np.mean(all_h), rel=1e-4)
    assert run.before["nucleus_entropy"] == pytest.approx(np.mean(h_i), rel=1e-4)
    profile = [np.mean(values) for _, values in sorted(positions.items())]
    assert run.before["by_position"]["nucleus_entropy"] == pytest.approx(profile, abs=1e-4)


def test_probe_is_the_same_ruler_for_every_method():
    model, task = toy_env.ToyWorld().build_model(), toy_env.ToyWorld()
    usual = study.probe(model, task, tiny_job())
    other = tiny_job(top_p=1.0, peak_quantile=0.0, inclusive=False, strict=True)
    assert study.probe(model, task, other) == usual


def test_csv_row_is_what_the_raw_file_says(tiny_run, tmp_path):
    _, path = tiny_run
    run = study_figures.read_run(path, "siren")
    study_figures.write_csv([run], tmp_path / "main.csv")
    study.check_csv(tmp_path / "main.csv", 4)
    with open(tmp_path / "main.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    promised = "method seed split temperature steps reward avg@16 maj@16 pass@16 distinct@16 "
    promised += "entropy entropy_start nucleus_entropy anchor useless_share beta"
    assert list(rows[0]) == promised.split()
    for row in rows:
        values = run.evals[row["split"], float(row["temperature"])]
        assert [float(row[k]) for k in ("avg@16", "maj@16")] == [values["avg@16"], values["maj@16"]]
        assert float(row["entropy_start"]) == run.before["entropy"] != run.after["entropy"]
        assert float(row["anchor"]) == run.before["nucleus_entropy"]


def test_a_csv_that_falls_short_is_refused(tmp_path):
    path = tmp_path / "main.csv"
    study_figures.write_csv([made_up_run()], path)
    study.check_csv(path, 4)
    with pytest.raises(AssertionError, match="4 rows, not 5"):
        study.check_csv(path, 5)
    whole = path.read_text()
    path.write_text(whole.replace("reward", "gain"))
    with pytest.raises(AssertionError, match="columns"):
        study.check_csv(path, 4)
    path.write_text(whole.replace("0.7", "nan"))
    with pytest.raises(AssertionError, match="nan"):
        study.check_csv(path, 4)


def test_a_diverged_run_is_a_result(tmp_path, monkeypatch):
    """The last good weights are evaluated, and the file says where training stopped."""
    original, calls = siren.training_step, []

    def failing(model, optimizer, task, cfg, state):
        calls.append(state["step"])
        if state["step"] == 2:
            raise FloatingPointError("the model's logits are not finite")
        return original(model, optimizer, task, cfg, state)

    monkeypatch.setattr(siren, "training_step", failing)
    path = tmp_path / "raw" / "x" / "job.jsonl"
    study.run_job(tiny_job(steps=3, save_every=1), path, {})
    run = study_figures.read_run(path, "siren")
    assert calls == [1, 2] and run.head["steps"] == 1
    assert "step 2" in run.head["diverged"]
    assert [r["step"] for r in run.steps] == [0, 1] and len(run.evals) == 4


def test_finished_jobs_of_any_preset_count_and_half_files_do_not(tiny_run, tmp_path):
    job, path = tiny_run
    other = dataclasses.replace(job, cfg=dataclasses.replace(job.cfg, beta=7.0))
    relabelled = dataclasses.replace(job, method="anchor_only")
    out = path.parents[2]
    (path.parent / "other.tmp").write_text('{"kind": "job"')  # what a kill leaves
    assert set(study.missing([job, other, relabelled], out)) == {other.key}
    assert study.load_runs([job, other], out) == []
    assert [run.method for run in study.load_runs([job, relabelled], out)] == [
        "siren",
        "anchor_only",
    ]
    (tmp_path / "raw" / "x").mkdir(parents=True)
    for text in ("hello", "{}", "[]"):
        (tmp_path / "raw" / "x" / "bad.jsonl").write_text(text)
        with pytest.raises(siren.ConfigError, match=r"bad\.jsonl.*delete it"):
            study.finished(tmp_path)


# ------------------------------------------------------------------------------ 4. the command line
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "huge"], "huge"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--seeds", "a-b"], "--seeds a-b: must be numbers and ranges"),
        (["--seeds", "5-3"], "--seeds 5-3: must be numbers and ranges"),
        (["--seeds", "1-2-3"], "--seeds 1-2-3: must be numbers and ranges"),
        (["--seeds", "0-3,3"], "--seeds 0-3,3: must be numbers and ranges, each once"),
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
    assert "main/table: 72 jobs, of which 72 to run" in text and not out.exists()
    assert "sweep_band/band: 45 jobs, of which 18 to run" in text
    assert "sweep_band/vocabularies: 30 jobs, of which 21 to run" in text


def test_figures_only_says_what_is_missing(tmp_path, capsys):
    assert study.main(["--preset", "quick", "--figures-only", "--out", str(tmp_path)]) == 0
    assert "quick/quick: 12 jobs have not run; left out" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))


def processes() -> dict[int, int]:
    """Process id -> its parent's, of all that run."""
    lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True)
    rows = (line.split() for line in lines.stdout.splitlines())
    return {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z")}


def wait_until(condition, seconds: float = 120.0) -> None:
    """Poll; fails after this long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def stop_halfway(out: Path, files: int, how: int) -> tuple[subprocess.Popen, set[int]]:
    """Start the smoke preset, send the signal once so many raw files are there; its workers."""
    command = [*STUDY, "--preset", "smoke", "--out", str(out)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # a process in the background of a script ignores Ctrl-C, and so would its children
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    child = subprocess.Popen(command, **pipes, preexec_fn=heed)
    wait_until(lambda: len(list(out.glob("raw/*/*.jsonl"))) >= files)
    workers = {pid for pid, parent in processes().items() if parent == child.pid}
    child.send_signal(how)
    child.wait(60)
    return child, workers


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_smoke_survives_ctrl_c_and_kill_and_repeats(tmp_path):
    """Interrupted, killed, resumed: the same numbers, nothing run twice, no process left behind."""
    out = tmp_path / "out"
    child, workers = stop_halfway(out, 2, signal.SIGINT)
    error = child.stderr.read()
    assert child.returncode == 130 and "goes on from here" in error and "Traceback" not in error
    assert workers and not workers & processes().keys()
    done = {path: path.stat().st_mtime_ns for path in out.glob("raw/*/*.jsonl")}
    _, workers = stop_halfway(out, len(done) + 2, signal.SIGKILL)
    wait_until(lambda: not workers & processes().keys(), 20)
    done |= {p: p.stat().st_mtime_ns for p in out.glob("raw/*/*.jsonl") if p not in done}
    command = [*STUDY, "--preset", "smoke", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    assert all(path.stat().st_mtime_ns == then for path, then in done.items())
    names = ["quick", "entropy", "diversity", "pass_at_k", "positions"]
    names += ["band", "vocabularies", "sensitivity"]
    figures = {name: (out / f"{name}.png").read_bytes() for name in names}
    tables, files = (out / "tables.md").read_text(), sorted(out.glob("raw/*/*.jsonl"))
    # drawn again from the raw files alone, and one job run again: the same to the last byte
    for name in names:
        (out / f"{name}.png").unlink()
    subprocess.run([*command, "--figures-only"], check=True, capture_output=True)
    assert {name: (out / f"{name}.png").read_bytes() for name in names} == figures
    again = next(path for path in files if "siren" in path.name)
    lines = again.read_text().splitlines()[1:]  # the first has the seconds it took
    again.unlink()
    subprocess.run(command, check=True, capture_output=True)
    assert again.read_text().splitlines()[1:] == lines
    assert sorted(out.glob("raw/*/*.jsonl")) == files
    cost = tables.index("## Cost and origin")
    assert (out / "tables.md").read_text()[:cost] == tables[:cost]
