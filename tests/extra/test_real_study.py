"""Tests of real_study.py and its questions, on tiny random models.

python -m pytest tests/extra/test_real_study.py
"""

from __future__ import annotations

import doctest
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from figure_checks import check_figure
from transformers import AutoModelForCausalLM, LlamaConfig

import siren
import text_env
from research import real_study, real_task
from research.plugs import plugged

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 24}
SIZE |= {"num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64}
END = [0, 1]  # the padding is 0, and prompts contain it


def tiny(attention: str = "sdpa", rank: int = 0) -> torch.nn.Module:
    """A random Llama; with adapters, they are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**SIZE, attn_implementation=attention)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            parameter.data *= 4  # far from uniform
        if rank:
            text_env.add_lora(model, rank, seed=0)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
    return model


def roll(model: torch.nn.Module, samples: int = 4) -> siren.Rollout:
    """Responses of several lengths to four prompts, of which two differ in padding alone."""
    prompts = [[3, 4, 5], [0, 0, 6, 7, 8], [6, 7, 8], [9]]
    problems = [SimpleNamespace(prompt=prompt) for prompt in prompts]
    task = SimpleNamespace(eos_ids=END, pad_id=0)
    cfg = siren.Config(max_tokens=9)
    rollout = siren.sample(model, task, problems, cfg, "1", samples, 1.0)
    assert len(set(rollout.mask.sum(1).tolist())) > 3
    return rollout


# -------------------------------------------------------------------------------- real_task.py
def asked(row: dict[str, str]) -> tuple[str, list[int]]:
    """The last question of a row, and its numbers."""
    question = row["question"].splitlines()[-1]
    return question, [int(digits) for digits in re.findall("[0-9]+", question)]


def test_answers_are_right_and_held_out_sums_are_new():
    files = real_task.problems()
    assert files == real_task.problems()
    sums = {}
    for name, rows in files.items():
        assert len(rows) >= 50 and len({asked(row)[0] for row in rows}) == len(rows)
        for row in rows:
            _, numbers = asked(row)
            assert str(sum(numbers)) == row["answer"] and sum(numbers) <= 9
            solution = row["question"].split("assistant\n")[1]
            for left, right in re.findall(r"([0-9] \+ [0-9]) = ([0-9])", solution):
                assert sum(map(int, left.split(" + "))) == int(right)
            total = int(re.search(r"The answer is ([0-9])", solution)[1])
            assert total == sum(
                map(int, re.findall("[0-9]+", row["question"].splitlines()[0][:-9]))
            )
        sums[name] = {tuple(sorted(asked(row)[1])) for row in rows}
    assert not sums["words_train"] & sums["words_eval"]


# ------------------------------------------------------------------------------- real_study.py
def test_base_metrics_are_those_of_the_model_without_adapters(monkeypatch):
    model, base = tiny(rank=2), tiny()
    rollout = roll(model)
    monkeypatch.setattr(real_study, "FULL_MASS", 0.7)  # so that some tokens are foreign
    found = real_study.base_metrics(model, rollout, temperature=0.8)
    ids = torch.cat([rollout.prompt, rollout.tokens], 1)
    foreign = []
    logps = []
    for row in range(len(ids)):
        start = int(rollout.prompt_mask[row].logical_not().sum())  # where its padding ends
        with torch.no_grad():
            logits = base(ids[row : row + 1, start:]).logits[0].double().numpy() / 0.8
        first = ids.shape[1] - rollout.tokens.shape[1] - start
        for t in range(int(rollout.mask[row].sum())):
            pi = np.exp(logits[first + t - 1] - logits[first + t - 1].max())
            pi, token = pi / pi.sum(), int(rollout.tokens[row, t])
            logps.append(math.log(pi[token]))
            foreign.append(pi[pi > pi[token]].sum() >= 0.7)
    assert 0 < np.mean(foreign) < 1
    assert found["foreign"] == pytest.approx(np.mean(foreign))
    assert found["perplexity"] == pytest.approx(math.exp(-np.mean(logps)), rel=1e-4)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)  # the adapters are back


def problem(prompt, answer):
    """One of a task; a question that is not the last turn of its chat comes first."""
    question = "solved\nWhat is " + " ".join(map(str, prompt))
    return SimpleNamespace(prompt=prompt, answer=answer, question=question)


class Task:
    """What siren.training_step needs of a task; the answers are never right."""

    eos_ids = END
    pad_id = 0
    equal = None
    normalize = None

    def train_problems(self, n, key):
        return [problem([3, 4 + i], "none") for i in range(n)]

    def heldout(self, n):
        return {"heldout": self.train_problems(n, "")}

    def build_model(self):
        return tiny(rank=2)

    def decode(self, ids):
        return " ".join(map(str, ids))

    def find_answer(self, text):
        return text

    def metrics(self, responses):
        return {}


@pytest.fixture
def load():
    """The task of a run is tests_task, a stand-in whose class one may choose."""
    chosen = SimpleNamespace(task=Task)
    module = SimpleNamespace(load=lambda cfg: chosen.task())
    with mock.patch.dict("sys.modules", {"tests_task": module}):
        yield chosen


def test_the_drop_in_adds_to_each_step(tmp_path, load):
    before = dict(vars(siren))
    how = {"steps": 2, "prompts": 2, "group_size": 4, "mini_batches": 2, "max_tokens": 6}
    how |= {"eval_prompts": 2, "eval_samples": 2, "lr": 0.01, "warmup_steps": 0}
    cfg = siren.Config(task="tests_task", out=str(tmp_path), micro_batch_size=2, **how)
    with plugged("research.real_study"):
        records = siren.train(siren.Run(cfg))
    assert dict(vars(siren)) == before
    asked = json.loads((tmp_path / "heldout.json").read_text())
    assert [row["right"] for row in asked] == [[False] * 2] * 2
    assert [row["question"] for row in asked] == ["What is 3 4", "What is 3 5"]
    assert all(re.fullmatch("[0-9 ]+", text) for row in asked for text in row["responses"])
    for record in records[1:]:
        assert 0 <= record["foreign"] <= 1 < record["perplexity"]
        assert record["seconds"] > 0
        assert all(type(value) in (int, float) for value in record.values())
    assert len(json.loads((tmp_path / "responses.json").read_text())) == 2
    rows = real_study.read_csv(tmp_path / "positions.csv")
    first = records[1]
    assert len(rows) == first["response_tokens"] * 8
    for name in ("entropy", "nucleus_size"):
        assert np.mean([row[name] for row in rows]) == pytest.approx(first[name], abs=1e-3)
    assert 0 < sum(row["peak"] for row in rows) < len(rows)


class Found(BaseException):
    """Carries the Config of a command line out of siren.main."""


def config_of(argv):
    """What siren.py makes of these flags."""

    def stop(cfg, resume):
        raise Found(cfg)

    with mock.patch.object(siren, "Run", stop), pytest.raises(Found) as found:
        siren.main(argv)
    return found.value.args[0]


def test_commands_are_the_jobs(tmp_path):
    jobs = real_study.make_jobs(tmp_path / "runs", Path("data"), Path("models/x"))
    seeds = {}
    for job in jobs:
        assert job.command[:3] == ["research/plugs.py", "--plug", "research.real_study"]
        assert config_of(job.command[3:]) == job.cfg
        assert not job.done
        seeds.setdefault(job.method, []).append(job.seed)
    assert len({job.cfg.out for job in jobs}) == len(jobs)
    more = {m for m, found in seeds.items() if found == [0, 1, 2]}
    assert more == set(real_study.MORE_SEEDS)
    assert len(seeds) == 8 and all(found[0] == 0 for found in seeds.values())
    folder = jobs[0].folder
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step}) + "\n" for step in range(jobs[0].cfg.steps + 1)]
    (folder / real_study.METRICS).write_text("".join(lines)[:-5])  # the last line is torn
    assert not jobs[0].done and len(jobs[0].records) == jobs[0].cfg.steps
    (folder / real_study.METRICS).write_text("".join(lines))
    assert jobs[0].done and jobs[0].records[-1]["step"] == jobs[0].cfg.steps


def test_a_job_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    job, started = real_study.make_jobs(tmp_path, Path("data"), Path("models/x"))[0], []

    def start(command, **how):
        started.append(command[1:])
        (job.folder / real_study.METRICS).write_text('{"step": 0}\n')
        return SimpleNamespace(returncode=130)

    monkeypatch.setattr(real_study.subprocess, "run", start)
    job.folder.mkdir(parents=True)
    (job.folder / "rest").touch()  # of a run that was stopped before its first checkpoint
    assert real_study.run(job) == 130 and not (job.folder / "rest").exists()
    (job.folder / real_study.CHECKPOINT).touch()
    assert real_study.run(job) == 130 and (job.folder / real_study.CHECKPOINT).exists()
    assert started == [job.command, [*job.command, "--resume"]]


def finish(job: real_study.Job, level: float) -> None:
    """Write the run folder of a job that is done: every curve is `level` times its step."""
    job.folder.mkdir(parents=True)
    score = {"heldout/avg@8": level, "heldout/maj@8": 0.5}
    lines = [{"step": 0, **score}]
    for step in range(1, job.cfg.steps + 1):
        values = dict.fromkeys((*real_study.CURVES, "h_agg"), level * step)
        lines.append({"step": step, **values, "anchor": 2.0, "seconds": 3.0 * step})
    for step, factor in ((10, 1), (15, 2), (20, 3)):  # of which 2 is the mean
        lines[step] |= {"heldout/avg@8": factor * level, "heldout/maj@8": 0.25}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (job.folder / real_study.METRICS).write_text(text)
    (job.folder / "responses.json").write_text(json.dumps(["one\ntwo"]))
    asked = [
        (real_task.problem(form, (1, 2, 3), "Ben", "pens"))
        for form in ("find", "find", "room")
    ]
    asked = [row["question"].splitlines()[-1] for row in asked]
    texts = ["a", "b [cut off]", "c", "d"]
    rows = [
        {"question": q, "right": [True, False, False, False], "responses": texts}
        for q in asked
    ]
    rows[0]["right"] = [True] * 4
    (job.folder / "heldout.json").write_text(json.dumps(rows))
    rows = [(0, 0, 1, 0), (0.5, 0, 1, 0), (1.5, 1.0, 4, 1), (2.5, 2.0, 90, 1)]
    names = ["entropy", "nucleus_entropy", "nucleus_size", "peak"]
    real_study.write_csv(job.folder / "positions.csv", names, rows)


def test_the_report(tmp_path):
    jobs = real_study.make_jobs(tmp_path / "runs", Path("data"), Path("models/x"), steps=20)
    for job in jobs:
        if (job.method, job.seed) in {("dr_grpo", 0), ("dr_grpo", 1), ("wo_peak", 0)}:
            finish(job, 0.1 * (1 + job.seed))
    results = tmp_path / "results"
    real_study.collect(jobs, results)
    assert len(real_study.read_csv(results / "curves.csv")) == 3 * 20
    text = real_study.tables(results)
    # the last ten of 20 steps have the mean 15.5: 1.55 with seed 0, 3.10 with seed 1
    row = next(line for line in text.splitlines() if line.startswith("| dr_grpo | 2 |"))
    assert row.split(" | ")[2:4] == ["2.325 (1.550 to 3.100)"] * 2
    assert row.split(" | ")[4] == "1.163 (0.775 to 1.550)"  # H_agg / anchor: half of it
    assert "| base model | 1 | 0.150 (0.100 to 0.200) | 0.500 (0.500 to 0.500) |" in text
    assert "| wo_peak | 3 | 0.200 | 0.250 |" in text
    assert (
        "4 tokens of the first step: 50% have H' = 0, 50% are peaks; |V_p| has median 2"
        in text
    )
    assert "99th percentile 90; 25.0% have more than 64 tokens" in text
    assert (
        "| dr_grpo, seed 1 | 0.62 | - | 0.25 | - | 0.25 |" in text
    )  # 5 of 8, 1 of 4; 3 of 12 cut
    assert "20 steps; 32 seconds per step (median)." in text
    assert "> one\n> two" in (results / "responses.md").read_text()
    assert all(path.stat().st_size > 5_000 for path in real_study.figures(results))
    files = {path: path.read_bytes() for path in results.iterdir() if path.suffix != ".png"}
    assert len(files) == 5 and len(real_study.missing(jobs, results)) == len(jobs) - 3
    for job in (
        jobs[0],
        jobs[-1],
    ):  # a run folder that is gone, and a job that comes to its end
        shutil.rmtree(job.folder) if job.done else finish(job, 0.7)
    assert not jobs[0].done and len(real_study.missing(jobs, results)) == len(jobs) - 4
    real_study.collect(jobs, results)
    for path, content in files.items():  # what was there stays, word for word
        assert path.read_bytes().startswith(content), path.name
    assert len(real_study.read_csv(results / "curves.csv")) == 4 * 20
    assert len(
        real_study.missing([job._replace(cfg=siren.Config(steps=30)) for job in jobs], results)
    ) == len(jobs)
    page = tmp_path / "page.md"
    page.write_text(f"a\n{real_study.MARKS[0]}\nold\n{real_study.MARKS[1]}\nb\n")
    real_study.write_page(page, text)
    assert (
        page.read_text() == f"a\n{real_study.MARKS[0]}\n\n{text}\n\n{real_study.MARKS[1]}\nb\n"
    )
    with pytest.raises(ValueError, match="put them back"):
        page.write_text("no marks")
        real_study.write_page(page, text)


def test_how_fast_a_run_learns():
    rewards = [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    for count, cells in ((7, ["5", "6", "0.786"]), (2, ["never", "never", "0.250"])):
        rows = [
            {"method": "siren", "seed": 0.0, "step": i, "reward": reward}
            for i, reward in enumerate(rewards[:count], 1)
        ]
        line = real_study.speed_table(rows)[-1]
        assert line == f"| siren | {' | '.join(cells)} |"


def test_held_out_questions_are_asked_of_the_last_policies(tmp_path, load, monkeypatch):
    monkeypatch.setattr(real_study, "LAST", 2)
    how = {"steps": 4, "prompts": 2, "group_size": 2, "mini_batches": 1, "max_tokens": 4}
    how |= {"eval_prompts": 2, "eval_samples": 2, "eval_every": 1}
    cfg = siren.Config(task="tests_task", out=str(tmp_path), **how)
    with plugged("research.real_study"):
        records = siren.train(siren.Run(cfg))
    asked = [r["step"] for r in records if "heldout/avg@2" in r]
    assert asked == [0, 3, 4]


def test_the_order_of_the_jobs(tmp_path, monkeypatch):
    """First what the questions are about, then SIREN with the chosen beta, then bonuses."""
    for name in ("RESULTS", "PAGE"):
        monkeypatch.setattr(real_study, name, tmp_path / name)
    monkeypatch.setattr(real_study, "ROOT", tmp_path)
    monkeypatch.setattr(real_study, "MODEL", tmp_path / "models")
    for name in ("get_model", "collect", "write_page", "tables", "figures"):
        monkeypatch.setattr(real_study, name, lambda *_: "")
    monkeypatch.setattr(real_task, "write", lambda folder: None)
    rounds = []

    def run_all(jobs, workers):
        rounds.append([f"{job.method} {job.seed}" for job in jobs])
        for i, job in enumerate(jobs):
            finish(job, 0.01 * (i + 1))
        return [0] * len(jobs)

    monkeypatch.setattr(real_study, "run_all", run_all)
    assert real_study.main([]) == 0
    first, then = rounds
    masks = [f"{method} {seed}" for seed in (0, 1, 2) for method in real_study.MASKS]
    assert first == masks + [f"siren_{beta} 100" for beta in real_study.BETAS]
    assert then[:3] == [f"siren_tuned {seed}" for seed in (0, 1, 2)]
    assert {job.split("_")[0] for job in then[3:]} == {"bonus"} and len(then) == 8
    assert real_study.main([]) == 0
    assert rounds[2:] == [[], []]  # nothing is run twice


def test_beta_is_chosen_by_the_reward_of_the_last_steps(tmp_path):
    where = (tmp_path / "runs", Path("data"), Path("models/x"))
    results = tmp_path / "results"
    jobs = real_study.candidates(*where, steps=20)
    assert [job.cfg.beta for job in jobs] == [0.014, 0.02, 0.028]
    assert {job.seed for job in jobs} == {100}
    for job, level in zip(jobs, (0.1, 0.3, 0.2), strict=True):
        assert real_study.tuned(results, *where, steps=20) == []
        finish(job, level)
    for _ in range(2):  # from the run folders, then from results/
        found = real_study.tuned(results, *where, steps=20)
        assert [(job.method, job.seed) for job in found] == [
            ("siren_tuned", s) for s in range(3)
        ]
        assert {job.cfg.beta for job in found} == {0.02}
        real_study.collect(jobs, results)
        for job in jobs:
            shutil.rmtree(job.folder, ignore_errors=True)


def test_doctests():
    for module in (real_study, real_task):
        result = doctest.testmod(module)
        assert result.attempted >= 1
        assert result.failed == 0


def test_bad_workers_are_one_line(capsys):
    assert real_study.main(["--workers", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "real_study.py: error: --workers 0: must be 1 to 64; the default is 2"


def test_the_page_has_the_stored_numbers():
    assert real_study.tables(real_study.RESULTS) in real_study.PAGE.read_text()


def test_the_pages_claims_in_words():
    """Collapse, explosion, SIREN in between; what one mask alone does. On every seed."""
    curves = real_study.runs_of(real_study.read_csv(real_study.RESULTS / "curves.csv"))
    heldout = real_study.read_csv(real_study.RESULTS / "heldout.csv")

    def ends(method, name, first=51):
        return [
            np.mean([r[name] for r in run if r["step"] >= first]) for run in curves[method]
        ]

    def passes(method, level):
        rewards = [[r["reward"] for r in run] for run in curves[method]]
        return [real_study.first_step(some, level) for some in rewards]

    def middle(method):
        return [np.mean([r["reward"] for r in run[10:40]]) for run in curves[method]]

    def scores(method, name):
        after = real_study.runs_of([r for r in heldout if r["step"] > 0])
        return [np.mean([r[name] for r in run]) for run in after[method]]

    def all_below(some, others):
        assert all(x < y for x, y in zip(some, others)), (some, others)

    # what the masks do: speed, and what is held
    all_below(passes("siren", 0.6), passes("wo_top_p", 0.6))
    all_below(passes("wo_top_p", 0.6), passes("anchor_only", 0.6))
    for method in ("dr_grpo", "siren", "wo_peak"):
        all_below(middle("wo_top_p"), middle(method))
    all_below(middle("anchor_only"), middle("wo_top_p"))
    assert max(ends("wo_peak", "h_ratio")) < 0.1 and min(ends("wo_top_p", "h_ratio")) > 0.9
    # collapse and explosion
    assert (
        max(ends("dr_grpo", "entropy")) < 0.03 and max(scores("dr_grpo", "distinct@8")) < 0.2
    )
    for run in curves["bonus_0.2"]:
        assert min(r["entropy"] for r in run if r["step"] >= 15) > 10
        assert max(r["reward"] for r in run if r["step"] >= 15) == 0
        assert np.mean([r["perplexity"] for r in run[-10:]]) > 500_000
    # SIREN keeps some
    all_below(ends("dr_grpo", "entropy"), [x / 2 for x in ends("siren", "entropy")])
    all_below(scores("dr_grpo", "distinct@8"), scores("siren", "distinct@8"))
    # the run that breaks down
    whole, broken = (runs for runs in curves["siren"][:2])
    assert ends("siren", "h_ratio")[0] == pytest.approx(0.44, abs=0.005)
    assert scores("siren", "avg@8")[:2] == pytest.approx([0.94, 0.20], abs=0.005)
    rewards = [r["reward"] for r in broken]
    assert [rewards[i - 1] for i in (41, 46, 49)] == pytest.approx([1, 0.75, 0.0625])
    assert broken[24]["entropy"] == pytest.approx(0.02, abs=0.005)
    assert broken[24]["h_ratio"] < 0.05 and broken[30]["h_ratio"] == pytest.approx(
        0.47, abs=0.01
    )
    assert (
        max(r["reward"] for r in broken[55:])
        < 0.2
        < 0.6
        < min(r["reward"] for r in whole[30:])
    )
    older = real_study.read_csv(real_study.RESULTS / "float32" / "heldout.csv")
    ended = {(r["method"], r["seed"]): r["avg@8"] for r in older if r["step"] == 60}
    assert ended["siren", 2] == pytest.approx(0.504, abs=1e-3)
    begun = [r["avg@8"] for r in older if r["step"] == 0 and r["seed"] == 2]
    assert np.mean(begun) == pytest.approx(0.66, abs=0.01)


def test_the_figures_can_be_read_in_grey():
    """From the stored rows: at most five lines, dashes of their own, names at the lines."""
    curves = real_study.read_csv(real_study.RESULTS / "curves.csv")
    figure = real_study.curves_figure(curves)
    assert 3 + 3 + 3 + 4 + 4 + 5 <= check_figure(figure) <= 4 + 4 + 4 + 4 + 4 + 5
    solved = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
    dr_grpo = [r["reward"] for r in curves if r["method"] == "dr_grpo" and r["step"] > 55]
    assert solved["Dr.GRPO"][-1] == pytest.approx(np.mean(dr_grpo))  # three seeds, five steps
    positions = real_study.read_csv(real_study.RESULTS / "positions.csv")
    sizes, peaks = real_study.positions_figure(positions).axes
    assert sum(bar.get_height() for bar in sizes.patches) == len(positions)
    words = {text.get_text() for text in peaks.texts}
    assert words == {"other positions (filled)", "peaks, tau = 0.8 (outline)"}
