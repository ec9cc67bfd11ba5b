"""research/study.py and study_report.py: jobs, choices, statistics, and the whole of it, tiny.

Also scores.py and tools.py, which they use.
"""

import csv
import dataclasses
import doctest
import gzip
import importlib
import itertools
import json
import math
import re
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import siren
from exercises import reference
from research import scores, study, study_report, tools
from research.plugs import Config

SIZE = study.Size()


# --------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("name", ["study", "study_report", "scores", "tools"])
def test_worked_examples(name):
    found = doctest.testmod(importlib.import_module(f"research.{name}"))
    assert found.attempted > 0 and found.failed == 0


@given(st.integers(1, 9), st.data())
def test_pass_at_k_against_all_subsets(n, data):
    k = data.draw(st.integers(1, n))
    c = data.draw(st.integers(0, n))
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    due = sum(map(any, subsets)) / len(subsets)
    assert scores.pass_at_k(n, c, k) == pytest.approx(due)


@given(st.lists(st.sampled_from([None, "7", "8", "9"]), min_size=1, max_size=12), st.data())
def test_maj_at_k_against_a_count(votes, data):
    k = data.draw(st.integers(1, len(votes)))
    won, blocks = 0, len(votes) // k
    for block in (votes[b * k : (b + 1) * k] for b in range(blocks)):
        best = max((vote for vote in block if vote), key=block.count, default=None)
        won += best == "7"  # max takes the first one of equal ones
    assert scores.maj_at_k(votes, "7", k) == won / blocks
    assert scores.maj_at_k([None, None], "7", 2) == 0.0


@pytest.mark.parametrize("of", [scores, reference], ids=["scores", "reference"])
def test_fewer_samples_than_k(of):
    for n, k in ((4, 8), (0, 1), (4, 0), (4, -1)):
        with pytest.raises(ValueError, match=rf"pass@{k} of {n} samples.*: k must be"):
            of.pass_at_k(n, 0, k)
        with pytest.raises(ValueError, match=rf"maj@{k} of {n} votes: k must be"):
            of.maj_at_k(["7"] * n, "7", k)


@given(st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=7))
def test_sign_flip_against_all_choices_of_signs(differences):
    n, due = len(differences), 0
    for signs in itertools.product((-1, 1), repeat=n):
        total = sum(s * d for s, d in zip(signs, differences, strict=True))
        due += abs(total) >= abs(sum(differences))
    assert study_report.sign_flip(differences) == pytest.approx(due / 2**n)


def test_holm_by_hand():
    """.01 x 4, .02 x 3, then .04: no smaller than the one before it, and never above 1."""
    values = {"a": 0.02, "b": 0.9, "c": 0.01, "d": 0.021}
    assert study_report.holm(values) == pytest.approx(
        {"c": 0.04, "a": 0.06, "d": 0.06, "b": 0.9}
    )
    assert study_report.holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_bootstrap_is_close_to_the_normal_interval():
    x = np.random.default_rng(1).normal(3, 2, 400)
    mean, low, high = study_report.bootstrap(x)
    half = 1.96 * x.std() / 20
    assert mean == pytest.approx(x.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.02)


def test_text_of_negative_and_large_numbers():
    assert study_report.text([-0.25, -0.25], "+") == "-.250 [-.250, -.250]"
    assert study_report.text([10.25]) == "10.250 [10.250, 10.250]"


def run_of(beta, held, seed=0, task="toy_env", **scores):
    """A row with what the tables read."""
    evals = [{"grade": "hard", "temperature": 0.6, **scores}]
    log, config = (
        [{"h_agg": 9.0}, {"h_agg": 2 * held}],
        {"beta": beta, "seed": seed, "task": task},
    )
    return {"config": config, "log": log, "anchor": 2.0, "evals": evals}


def test_scale_table_by_hand():
    """Usual runs hold .5 with beta .1 and .7 with 1; so .6 is held by the root of .1, .316."""
    usual = [run_of(0.1, 0.4), run_of(0.1, 0.6), run_of(1.0, 0.7)]
    rows = {"budget 64": [run_of(0.1, 0.6)], "half the peaks": [run_of(0.05, 0.5)]}
    assert study_report.scale_table(rows, usual)[2:4] == [
        "| budget 64 | 0.1 | 0.600 | 0.316 | 0.4 | 1.26 |",  # 4 x .1 was predicted; .4 / .316
        "| half the peaks | 0.05 | 0.500 | 0.100 | 0.1 | 1.00 |",
    ]


def test_vocabulary_differences_pair_seeds_of_the_same_world():
    small, large = "toy_env:vocab=96", "toy_env:vocab=256"
    score = "maj@16"
    rows = {
        "siren": [run_of(1, 1, seed, task=small, **{score: 0.5 + seed}) for seed in (1, 2)],
        "dr_grpo": [run_of(1, 1, seed, task=small, **{score: 0.25 * seed}) for seed in (2, 1)],
    }
    rows["siren"] += [run_of(1, 1, 1, task=large, **{score: 9.0})]
    assert study_report.vocabulary_differences(rows, "dr_grpo", score, 96) == [1.25, 2.0]


# ---------------------------------------------------------------------------- jobs and choices


def test_every_method_has_as_many_candidates_and_all_differ():
    for method, candidates in study.METHODS.items():
        assert len(candidates) == SIZE.candidates, method
        assert len({json.dumps(c, sort_keys=True) for c in candidates}) == SIZE.candidates, (
            method
        )
        for changes in candidates:
            Config(**changes)  # a ValueError if a value is out of its range


def test_what_is_chosen_and_what_is_reported_share_no_seed_and_no_prompt():
    assert not set(SIZE.test_seeds) & set(SIZE.validation_seeds)
    assert len(SIZE.test_seeds) == 16 and len(SIZE.validation_seeds) == 4
    rows = rows_of(lambda job: 0.5)
    for name, part in study.PARTS.items():
        for job in part(SIZE, rows):
            is_test = name == "main"
            assert ("split=validation" in job.cfg.task) != is_test
            assert job.cfg.seed in (SIZE.test_seeds if is_test else SIZE.validation_seeds)
            assert f"seed={job.cfg.seed}," in f"{job.cfg.task},"
            assert job.final == (SIZE.test if is_test else SIZE.explore)


def test_what_the_methods_change():
    of = {name: Config(**candidates[1]) for name, candidates in study.METHODS.items()}
    assert of["dr_grpo"].regularizer == of["constrained"].regularizer == "none"
    assert of["naive_bonus"].regularizer == of["wo_anchor"].regularizer == "bonus"
    for name in ("siren", "wo_top_p", "wo_peak", "anchor_only"):
        assert of[name].regularizer == "anchor"
    assert [of[n].top_p for n in ("naive_bonus", "wo_top_p", "anchor_only")] == [1.0] * 3
    assert [of[n].peak_quantile for n in ("naive_bonus", "wo_peak", "anchor_only")] == [
        0.0
    ] * 3
    assert (of["siren"].top_p, of["siren"].peak_quantile) == (study.P, study.TAU)


def rows_of(value, useless=lambda job: 0.0):
    """A row for each job of `tune`, with these scores."""
    return {
        job.key: {
            "evals": [
                {
                    "grade": "hard",
                    "temperature": 0.6,
                    "avg@16": value(job),
                    "maj@16": value(job),
                }
            ],
            "probe": {"useless_share": useless(job)},
        }
        for job in study.tune(SIZE, {})
    }


def test_choose_takes_the_best_mean_over_the_validation_seeds():
    best = {name: candidates[3] for name, candidates in study.METHODS.items()}

    def value(job):  # candidate 3 is the best on average, another one on seed 100
        changes = best.get(job.label, {})
        mine = all(getattr(job.cfg, key) == x for key, x in changes.items())
        return 0.6 if mine else 0.9 if job.cfg.seed == 100 else 0.4

    naive = [changes["beta"] for changes in study.METHODS["naive_bonus"]]
    bad = {(beta, seed) for beta in naive[4:] for seed in SIZE.validation_seeds}
    bad |= {(naive[3], seed) for seed in SIZE.validation_seeds[1:]}  # not on every seed
    rows = rows_of(value, lambda job: 0.31 if (job.cfg.beta, job.cfg.seed) in bad else 0.3)
    chosen = study.choose(SIZE, rows)
    assert {name: chosen[name] for name in best} == best
    assert chosen["naive_exploding"]["beta"] == naive[4]
    assert chosen["dr_grpo_same_lr"] == {**chosen["dr_grpo"], "lr": Config().lr}


def test_key_holds_all_that_changes_numbers_and_nothing_else():
    job = study.tune(SIZE, {})[0]
    for change in ({"lr": 1.0}, {"seed": 5}, {"task": "x"}, {"plug": "y"}, {"beta": 9.0}):
        assert job._replace(cfg=dataclasses.replace(job.cfg, **change)).key != job.key
    assert job._replace(final=job.final._replace(samples=9)).key != job.key
    same = dataclasses.replace(job.cfg, out="x", threads=3, save_every=7, device="mps")
    assert job._replace(cfg=same, label="other").key == job.key


# --------------------------------------------------------------------------------- a job's row


@pytest.fixture(scope="module")
def job():
    """SIREN on the shipped world, two steps."""
    changes = {"prompts": 4, "mini_batches": 1}
    return study.each(study.SMOKE, [("siren", changes)], test=True)[0]


@pytest.fixture(scope="module")
def row(job):
    return study.run_job(job)


def test_the_same_job_gives_the_same_row(job, row):
    again = study.run_job(job)
    assert {**again, "seconds": 0} == {**row, "seconds": 0}
    assert len(row["evals"]) == 4 and row["diverged"] is None and len(row["log"]) == 2
    assert study.key_of(json.loads(json.dumps(row))) == job.key


def test_evaluation_agrees_with_siren_py(job):
    task = tools.load_task(job.cfg)
    model, problems = task.build_model().eval(), task.heldout(3)["easy"]
    cfg = dataclasses.replace(job.cfg, eval_samples=16, eval_temperature=1.0)
    due = siren.evaluate(model, task, problems, cfg)
    values = study.evaluate(model, task, problems, job.cfg, 16, 1.0)
    assert {name: values[name] for name in due} == pytest.approx(due)
    assert values["pass@1"] == pytest.approx(due["avg@16"]) and values["distinct@1"] == 1


def test_probe_against_plain_loops(job):
    task = tools.load_task(job.cfg)
    model = task.build_model().eval()
    found = study.probe(model, task, job.cfg, 3)
    problems = task.train_problems(3, "0/probe")
    rollout = siren.sample(model, task, problems, job.cfg, "0/probe", 8, 1.0)
    all_h, h_i, right, at_0 = [], [], 0, []
    for i, ids in enumerate(rollout.responses()):
        problem = problems[i // 8]
        with torch.no_grad():
            logits = model(torch.tensor([problem.prompt + ids])).logits[0].double()
        own = []
        for row_logits in logits[len(problem.prompt) - 1 : -1]:
            pi = sorted(row_logits.softmax(-1).tolist(), reverse=True)
            inside = []
            while sum(inside) < study.P:
                inside.append(pi[len(inside)])
            own.append(-sum(q / sum(inside) * math.log(q / sum(inside)) for q in inside))
            all_h.append(-sum(q * math.log(q) for q in pi if q > 0))
        peaks = [h for h in own if h >= np.quantile(own, study.TAU) - 1e-6 and h > 1e-9]
        h_i.append(sum(peaks) / max(1, len(peaks)))
        at_0.append(own[0])
        right += task.decode(ids).endswith(f" {problem.answer} <eos>")
    assert found["reward"] == right / len(h_i)
    assert found["entropy"] == pytest.approx(np.mean(all_h), rel=1e-4)
    assert found["h_agg"] == pytest.approx(np.mean(h_i), rel=1e-4)
    assert found["positions"]["nucleus_entropy"][0] == pytest.approx(np.mean(at_0), abs=1e-4)


def test_kinds_by_hand():
    """Two terms would be "t t s <eos>": here five, so forks are at 0, 1, 3, 5."""
    entropy = [float(t) for t in range(10)]
    places = {
        "entropy": entropy,
        "nucleus_entropy": [0.0] * 10,
        "peak": [1.0, 1.0] + [0.5] * 8,
    }
    found = study_report.kinds({"probe": {"positions": places}})
    assert found["fork"]["entropy"] == (0 + 1 + 3 + 5) / 4
    assert found["sum"]["entropy"] == (2 + 4 + 6 + 8) / 4
    assert found["forced"]["entropy"] == (7 + 9) / 2
    assert [found[kind]["peaks"] for kind in study_report.KINDS] == pytest.approx(
        [0.5, 1 / 3, 1 / 6]
    )


def test_a_diverged_run_is_a_result(job, monkeypatch):
    """The policy of the last checkpoint is evaluated, and the row says where training
    stopped."""
    original = siren.training_step

    def failing(run, step):
        if step == 2:  # as a learning rate that is far too large would
            with torch.no_grad():
                run.weights[0].fill_(torch.nan)
        return original(run, step)

    monkeypatch.setattr(siren, "training_step", failing)
    cfg = dataclasses.replace(job.cfg, save_every=1)
    row = study.run_job(job._replace(cfg=cfg))
    assert row["diverged"] == "step 2: the gradient is not finite"
    assert [r["step"] for r in row["log"]] == [1] and len(row["evals"]) == 4


def test_any_other_error_stops_the_study(job, monkeypatch):
    def failing(run, step):
        raise RuntimeError("no memory")

    monkeypatch.setattr(siren, "training_step", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        study.run_job(job)


# ----------------------------------------------------------------------------- all of it, tiny


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    assert study.main(["--smoke", "--out", str(folder)]) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix in SUFFIXES
    }


SUFFIXES = (".gz", ".csv", ".md")


def test_smoke_writes_everything(smoke):
    text = (smoke / "tables.md").read_text()
    for heading in ("The main table", "SIREN against the others", "Where the entropy sits"):
        assert f"## {heading}\n" in text
    assert all(f"## {part.capitalize()}\n" in text for part in study.PARTS if part != "main")
    for name in (
        "steps",
        "kinds",
        "k",
        "k_easy",
        "constrained",
        "vocabularies",
        "sensitivity",
    ):
        assert (smoke / f"{name}.png").stat().st_size > 10_000, name
    with open(smoke / "main.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == study_report.COLUMNS
    labels = {"base", "naive_exploding", "dr_grpo_same_lr", *study.METHODS}
    assert {line["method"] for line in lines} == labels
    assert len(lines) == len(labels) * 4  # grades and temperatures


def test_a_second_run_has_nothing_to_do_and_says_the_same(smoke, monkeypatch):
    before = contents(smoke)
    monkeypatch.setattr(study, "run_jobs", None)  # it would be an error to call it
    assert study.main(["--smoke", "--out", str(smoke)]) == 0
    assert contents(smoke) == before


@pytest.fixture
def in_process(monkeypatch):
    """Jobs run in this process, not in new ones, which import PyTorch first."""

    class Pool:
        def submit(self, function, value):
            future = Future()
            future.set_result(function(value))
            return future

    monkeypatch.setattr(study, "pool_of", lambda workers: nullcontext(Pool()))


def test_a_lost_row_is_made_again_and_is_the_same(smoke, in_process, capsys):
    path = smoke / "raw" / "main.jsonl.gz"
    before = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    kept = "".join(json.dumps(row) + "\n" for row in before[1:])
    path.write_bytes(gzip.compress(kept.encode()))
    assert study.main(["--smoke", "--part", "main", "--out", str(smoke)]) == 0
    assert "main: 1 jobs to run" in capsys.readouterr().out
    after = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert [{**row, "seconds": 0} for row in after] == [
        {**row, "seconds": 0} for row in before
    ]


AGAIN = ["--smoke", "--again", "0", "--out"]
ROWS = len(study.METHODS) + 3  # choose adds two
SAME = f"{ROWS} of {ROWS} rows are the same to the last digit"


@pytest.mark.slow
def test_again_makes_the_same_rows(smoke, capsys):
    assert study.main([*AGAIN, str(smoke)]) == 0
    assert SAME in capsys.readouterr().out


def test_again_compares_row_by_row(smoke, in_process, monkeypatch, capsys):
    path = smoke / "raw" / "main.jsonl.gz"
    before = path.read_bytes()
    stored = study.Store(smoke).rows
    monkeypatch.setattr(study, "run_job", lambda job, look: stored[job.key])
    assert study.main([*AGAIN, str(smoke)]) == 0
    assert SAME in capsys.readouterr().out
    rows = [json.loads(line) for line in gzip.decompress(before).splitlines()]
    for row in rows:
        row["probe"]["reward"] += 1e-4 * (row["config"]["steps"] == 0)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert study.main([*AGAIN, str(smoke)]) == 1
    assert f"{ROWS - 1} of {ROWS} rows" in capsys.readouterr().out
    path.write_bytes(before)


def test_parts_wait_for_the_choice(tmp_path, capsys):
    assert study.main(["--plan", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    jobs = len(SIZE.validation_seeds) * (1 + SIZE.candidates * len(study.METHODS))
    assert f"tune: {jobs} jobs to run" in out and "main: not before tune is complete" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--workers 0", "--workers 0: must be 1 to 64"),
        ("--part nothing", "invalid choice: 'nothing'"),
        ("--again x", "invalid int value: 'x'"),
        ("--again 0 16", "--again 16: must be one of (0, 1, 2,"),
        ("--again 0", "--again: not before tune is complete"),
        ("--seeds 3", "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line(flags, said, tmp_path, capsys):
    assert study.main([*flags.split(), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("study.py: error: ")


def test_two_studies_in_one_folder(tmp_path, capsys):
    with tools.locked(tmp_path):
        assert study.main(["--plan", "--out", str(tmp_path)]) == 2
    assert "error: --out" in capsys.readouterr().err
    assert study.main(["--plan", "--out", str(tmp_path)]) == 0, "the lock is free again"


def test_readme_says_what_main_csv_says():
    """README's table and every difference in it, computed again from the stored file."""
    lines = study_report.read_csv(study.ROOT / "results" / "main.csv")
    text = (study.ROOT / "README.md").read_text()
    for row in study_report.headline(lines)[2:-1]:
        assert row in text
    found = re.findall(r"[+-]\.\d{3} \[[+-]\.\d{3}, [+-]\.\d{3}\]", text)
    due = {
        study_report.text(study_report.differences(lines, other, score, temperature), "+")
        for other in study_report.CLAIMED
        for score in study_report.SCORES[:3]
        for temperature in ("0.6", "1.0")
    }
    store = study.Store(study.ROOT / "results")
    rows = study_report.labelled("vocabularies", SIZE, store)
    due |= {
        study_report.text(
            study_report.vocabulary_differences(rows, other, "maj@16", 4096), "+"
        )
        for other in ("dr_grpo", "anchor_only")
    }
    assert len(found) >= 8 and set(found) <= due


def test_readmes_claims_in_words():
    """Collapse, explosion, an anchor that holds; the masked bonus explodes at 3 x its best."""
    store = study.Store(study.ROOT / "results")
    rows = study_report.labelled("main", SIZE, store)

    def mean(method, value):
        return np.mean([value(row) for row in rows[method]])

    def passes(row):
        return study.score(row, "pass@16")

    def useless(row):
        return row["probe"]["useless_share"]

    assert mean("dr_grpo", passes) < mean("base", passes) < mean("siren", passes)
    assert min(useless(row) for row in rows["naive_exploding"]) > 0.3
    held = mean("siren", lambda row: row["probe"]["h_agg"] / row["anchor"])
    assert 0.8 < held < 1 and max(useless(row) for row in rows["siren"]) < 0.3
    best = study.choose(SIZE, store.rows)["wo_anchor"]
    for job in study.each(SIZE, [("", {**best, "beta": 3 * best["beta"]})]):
        assert useless(store.rows[job.key]) > 0.3


# ----------------------------------------------------------------------------- the stored rows


def test_stored_rows_are_those_of_the_jobs():
    """Each row has today's settings, and each job of each part has its row."""
    store = study.Store(study.ROOT / "results")
    names = {field.name for field in dataclasses.fields(Config)}
    for part in study.PARTS:
        assert not store.missing(study.PARTS[part](SIZE, store.rows)), part
    for row in store.rows.values():
        assert set(row["config"]) == names
        cfg = Config(**row["config"])  # a ValueError if a value is out of its range
        assert dataclasses.asdict(cfg) == row["config"]
        assert all(plug.startswith("research.") for plug in [cfg.plug] if plug)


# ----------------------------------------------------------------------------------- the tools


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("--x 3: must be\n 1 or 2"), 2, "error: --x 3: must be 1 or 2"),
        (RuntimeError("no memory\nsecond line"), 1, "stopped: no memory; go on"),
        (OSError("disk full"), 1, "stopped: disk full; go on"),
        (KeyboardInterrupt(), 130, "interrupted; go on"),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(error, code, text, capsys):
    def failing(argv):
        raise error

    assert tools.run_tool("tool.py", failing, [], "go on") == code
    assert capsys.readouterr().err == f"tool.py: {text}\n"
    assert tools.run_tool("tool.py", lambda argv: None) == 0
    assert tools.run_tool("tool.py", lambda argv: 7) == 7


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    tools.write_whole(path, b"one")

    def full(fd):
        raise OSError("disk full")

    monkeypatch.setattr(tools.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        tools.write_whole(path, b"two")
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]


def test_a_task_is_loaded_as_a_run_loads_it(tmp_path):
    cfg = Config(task="toy_env:slip=0.1,split=validation", out=str(tmp_path), eval_prompts=1)
    assert tools.load_task(cfg) == siren.Run(cfg).task
