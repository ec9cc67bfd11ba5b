r"""Collapse, explosion and SIREN on a real language model: SmolLM2-135M on a CPU.

    python research/real_study.py --plan      # the commands that would run, and their hours
    python research/real_study.py             # run what is missing, two at a time, then report
    python research/real_study.py --report    # results/real/, its figures, docs/real_model.md
    python research/real_study.py --smoke     # two steps, two questions, a temporary folder

A job is one command of research/plugs.py, in a run folder of its own. A job that was stopped
goes on from its checkpoint, and one that is done is not run again. Nor is one with rows in
results/real/. The drop-in `plug` below adds to each step

    foreign      the share of response tokens outside the base model's own top 0.999 mass
    perplexity   of the responses under the base model
    seconds      that the step took

by a pass of the base model (the adapters switched off) over every fourth response. Held-out
questions are asked before training and every five steps of the last 15, so that scores are
means over three policies. One policy can be a bad one. It also
writes positions.csv (H, H' and |V_p| of the base model's tokens), responses.json and
heldout.json (the responses to held-out questions, and which are right) into the run folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above
import siren
import text_env
from research import real_task
from research.tools import Parser, run_tool, write_whole

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "smollm2-135m"  # by examples/get_smollm2.py
RESULTS = ROOT / "results" / "real"
PAGE = ROOT / "docs" / "real_model.md"
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
MARKS = ("<!-- numbers: python research/real_study.py --report -->", "<!-- end of numbers -->")
FULL_MASS = 0.999  # a token is foreign where likelier ones have at least this much
STEPS = 60
DTYPE = "bfloat16"  # of the weights, except the adapters; fast on processors that know it
STEP_SECONDS = 20.0  # rough, on two busy cores of such a processor
EVAL_SECONDS = 40.0
# What each method changes. An anchor's coefficient has the paper's balance, that is beta *
# budget / peaks = 0.08 (docs/beta.md), for 9 peaks of 45 tokens or for all of them.
METHODS: dict[str, dict[str, Any]] = {
    "dr_grpo": {"regularizer": "none"},
    "siren": {"beta": 0.01},
    **{
        f"bonus_{beta}": {"regularizer": "bonus", "top_p": 1, "peak_quantile": 0, "beta": beta}
        for beta in (0.2, 0.02, 0.002)
    },
    "wo_top_p": {"beta": 0.01, "top_p": 1},
    "wo_peak": {"beta": 0.06, "peak_quantile": 0},
    "anchor_only": {"beta": 0.06, "top_p": 1, "peak_quantile": 0},
}
MASKS = ("dr_grpo", "siren", "wo_top_p", "wo_peak", "anchor_only")
MORE_SEEDS = (*MASKS, "bonus_0.2")  # three seeds; all others have one
LAST = 15  # held-out scores are means over the policies of these last steps
EVERY = 5  # steps between them
# One more SIREN: its beta is the one with the best training reward of the last steps on a
# validation seed. 0.01 holds too little entropy, and with 0.04 the reward does not rise.
BETAS = (0.014, 0.02, 0.028)
VALIDATION = 100
TUNED = "siren_tuned"
FILES = ("curves", "heldout", "forms")
NAMES = {"dr_grpo": "Dr.GRPO", "siren": "SIREN", "wo_top_p": "without top-p"}
NAMES |= {"bonus_0.2": "bonus, 0.2", "bonus_0.002": "bonus, 0.002"}
NAMES |= {"wo_peak": "without peaks", "anchor_only": "anchor only"}
LIKE = {"bonus_0.2": "naive_exploding", "bonus_0.002": "naive_bonus"}  # figures.STYLES
RIVALS = ("dr_grpo", "siren", "bonus_0.2", "bonus_0.002")
PARTS = ("siren", "wo_top_p", "wo_peak", "anchor_only")
LEVELS = (0.6, 0.8)  # of the reward: when does a run pass them?
BOTH = ("dr_grpo", "siren", "bonus_0.2")  # three seeds in float32 as well
BOTH_CURVES = ("reward", "entropy", "h_ratio", "perplexity")
# the panels of real_model.png: what is drawn, and for which methods
PANELS = [("reward", RIVALS), ("entropy", RIVALS), ("perplexity", RIVALS)]
PANELS += [("reward", PARTS), ("entropy", PARTS), ("h_ratio", ("dr_grpo", *PARTS))]
CURVES = {
    "reward": "reward",
    "entropy": "H, nats per token",
    "h_ratio": "H_agg / anchor",
    "response_tokens": "tokens per response",
    "foreign": "share of foreign tokens",
    "perplexity": "perplexity under the base model",
}


# ------------------------------------------------------------------------------ 1. the drop-in
@torch.no_grad()
def base_metrics(model: Any, rollout: siren.Rollout, temperature: float) -> dict[str, float]:
    """foreign and perplexity of the responses under the model without its adapters."""
    model.disable_adapters()
    try:
        hidden = siren.forward(model, rollout)[rollout.mask]  # [N, D]
    finally:
        model.enable_adapters()
    log_mass = 0.0
    foreign = 0
    for part, ids in zip(hidden.split(256), rollout.tokens[rollout.mask].split(256)):
        logits = model.get_output_embeddings()(part).float()  # [n, V]
        log_pi = (logits / temperature).log_softmax(-1)
        logp = log_pi.gather(1, ids[:, None])
        likelier = torch.where(log_pi > logp, log_pi.exp(), 0.0).sum(1)
        foreign += int((likelier >= FULL_MASS).sum())
        log_mass += float(logp.sum())
    return {"foreign": foreign / len(hidden), "perplexity": math.exp(-log_mass / len(hidden))}


def write_positions(path: Path, stats: dict[str, Any], rollout: siren.Rollout) -> None:
    """A line for each response token: H, H', |V_p| and whether it is a peak with tau = 0.8."""
    peak = siren.peak_mask(stats["nucleus_entropy"], rollout.mask, 0.8)
    names = ("entropy", "nucleus_entropy", "nucleus_size")
    columns = [stats[name][rollout.mask].tolist() for name in names]
    columns.append(peak[rollout.mask].tolist())
    rows = []
    for h, h_nucleus, size, is_peak in zip(*columns):
        rows.append((f"{h:.3f}", f"{abs(h_nucleus):.3f}", int(size), int(is_peak)))
    write_csv(path, [*names, "peak"], rows)


def write_heldout(path: Path, task: Any, problems: list, rollout: siren.Rollout) -> None:
    """For each held-out problem its question, its responses, and which of them are right."""
    texts = [task.decode(ids) for ids in rollout.responses()]
    rules = (task.find_answer, task.equal)
    rows = []
    k = len(texts) // len(problems)
    for i, problem in enumerate(problems):
        question = problem.question.splitlines()[-1]  # without the solved one before it
        own = texts[i * k : (i + 1) * k]
        right = [siren.verify(text, problem.answer, *rules) for text in own]
        rows.append({"question": question, "right": right, "responses": own})
    write_whole(path, json.dumps(rows).encode())


def plug() -> None:
    """What `--plug research.real_study` does: the extra metrics."""
    sample = siren.sample
    score = siren.score
    training_step = siren.training_step
    evaluate = siren.evaluate
    seen: dict[str, Any] = {}  # of the step: its extra metrics, its rollout and the scores
    now = {"step": 0}

    def watched_sample(
        model: Any, task: Any, problems: list, cfg: siren.Config, key: str, *how: Any
    ) -> siren.Rollout:
        rollout = sample(model, task, problems, cfg, key, *how)
        if key == f"{cfg.seed}/eval":
            write_heldout(Path(cfg.out) / "heldout.json", task, problems, rollout)
        return rollout

    def watched_score(model: Any, rollout: siren.Rollout, cfg: siren.Config) -> dict:
        stats = score(model, rollout, cfg)
        if not seen:  # the first call of a step has all of its responses, before any update
            fourth = rollout.rows(slice(None, None, 4))
            seen.update(base_metrics(model, fourth, cfg.temperature))
            seen.update(rollout=rollout, stats=stats)
        return stats

    def late_evaluate(model: Any, task: Any, problems: list, cfg: siren.Config) -> dict:
        if 0 < now["step"] <= cfg.steps - LAST:
            return {}
        return evaluate(model, task, problems, cfg)

    def watched_step(run: siren.Run, step: int) -> dict:
        seen.clear()
        now["step"] = step
        start = time.perf_counter()
        record = training_step(run, step)
        seen["seconds"] = time.perf_counter() - start
        rollout = seen.pop("rollout")
        stats = seen.pop("stats")
        cfg = run.cfg
        if step == 1 and cfg.top_p < 1:
            write_positions(Path(cfg.out) / "positions.csv", stats, rollout)
        if step == cfg.steps:
            some = rollout.rows(slice(None, None, cfg.group_size)).responses()[:3]
            texts = json.dumps([run.task.decode(ids) for ids in some])
            write_whole(Path(cfg.out) / "responses.json", texts.encode())
        return record | seen

    siren.sample = watched_sample
    siren.score = watched_score
    siren.evaluate = late_evaluate
    siren.training_step = watched_step


# --------------------------------------------------------------------------------- 2. the jobs
class Job(NamedTuple):
    """One command of research/plugs.py."""

    method: str
    seed: int
    cfg: siren.Config

    @property
    def title(self) -> str:
        """Its name in responses.md."""
        return f"{self.method}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return ROOT / self.cfg.out

    @property
    def records(self) -> list[dict[str, Any]]:
        """What it has logged so far."""
        path = self.folder / METRICS
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def done(self) -> bool:
        """Has it reached its last step?"""
        return len(self.records) == self.cfg.steps + 1

    @property
    def command(self) -> list[str]:
        """The command without --resume."""
        usual = vars(siren.Config())
        flags = {name: x for name, x in vars(self.cfg).items() if x != usual[name]}
        words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in flags.items()]
        plug = ["research/plugs.py", "--plug", "research.real_study"]
        return [*plug, *(word for pair in words for word in pair)]


def make_jobs(runs: Path, data: Path, model: Path, **changes: Any) -> list[Job]:
    """The jobs of every method, seed by seed: seed 0 for each, 1 and 2 for MORE_SEEDS."""
    pairs = [(m, seed) for seed in (0, 1, 2) for m in (METHODS if seed == 0 else MORE_SEEDS)]
    how = settings(data, model, **changes)
    return [make_job(runs, how, METHODS[method], method, seed) for method, seed in pairs]


def candidates(runs: Path, data: Path, model: Path, **changes: Any) -> list[Job]:
    """SIREN with each of BETAS, on the validation seed."""
    how = settings(data, model, **changes)
    return [make_job(runs, how, {"beta": beta}, f"siren_{beta}", VALIDATION) for beta in BETAS]


def tuned(results: Path, runs: Path, data: Path, model: Path, **changes: Any) -> list[Job]:
    """SIREN with the best of BETAS, on three seeds; [] as long as a candidate is not done."""
    rewards = {}
    for job in candidates(runs, data, model, **changes):
        rows = stored(results, job.cfg).get((job.method, job.seed), [job.records[1:]])[0]
        if len(rows) < job.cfg.steps:
            return []
        rewards[job.cfg.beta] = mean(row["reward"] for row in rows[-LAST:])
    how = settings(data, model, **changes)
    best = {"beta": max(rewards, key=rewards.get)}
    return [make_job(runs, how, best, TUNED, seed) for seed in (0, 1, 2)]


def settings(data: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """What all jobs have in common."""
    files = f"data={data}/words_train.jsonl,eval_data={data}/words_eval.jsonl"
    task = f"text_env:model={model},{files},prompt={{question}},answer_form=last-number"
    how: dict[str, Any] = {"task": f"{task},lora_rank=16,dtype={DTYPE}", "steps": STEPS}
    how |= {"prompts": 4, "mini_batches": 2, "max_tokens": 64, "lr": 5e-4, "device": "cpu"}
    how |= {"top_p": 0.8, "peak_quantile": 0.8}  # the paper's
    return how | {"eval_prompts": 32, "eval_samples": 8, "eval_every": EVERY, **changes}


def make_job(runs: Path, how: dict, method: dict, name: str, seed: int) -> Job:
    """A job with its own run folder."""
    cfg = siren.Config(**how | method, seed=seed, out=str(runs / f"{name}-seed{seed}"))
    return Job(name, seed, cfg)


def run(job: Job) -> int:
    """Run a job to its end, from its checkpoint if there is one; returns the exit code."""
    folder = job.folder
    resume = []
    if (folder / CHECKPOINT).exists():
        resume = ["--resume"]
    else:  # stopped before its first checkpoint
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "ab") as log:
        how = {"cwd": ROOT, "stdout": log, "stderr": subprocess.STDOUT}
        code = subprocess.run([sys.executable, *job.command, *resume], **how).returncode
    print(f"{job.cfg.out}: {len(job.records)} records, exit code {code}", flush=True)
    return code


def run_all(jobs: list[Job], workers: int) -> list[int]:
    """Run jobs, some side by side; returns their exit codes."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, jobs))


# ------------------------------------------------------------------------------- 3. the report
def write_csv(path: Path, names: list[str], rows: list) -> None:
    """A CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([names, *rows])


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Its rows; what looks like a number is one."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    words = ("method", "form")
    return [{k: v if k in words else float(v) for k, v in row.items()} for row in rows]


def stored(results: Path, cfg: siren.Config) -> dict[tuple[str, int], list[list[dict]]]:
    """What results/ holds of jobs that are done: their rows in each CSV file."""
    found: dict[tuple[str, int], list[list[dict]]] = {}
    for index, name in enumerate(FILES):
        path = results / f"{name}.csv"
        for row in read_csv(path) if path.exists() else []:
            who = (row["method"], int(row["seed"]))
            found.setdefault(who, [[], [], []])[index].append(row)
    return {who: rows for who, rows in found.items() if len(rows[0]) == cfg.steps}


def missing(jobs: list[Job], results: Path) -> list[Job]:
    """The jobs that have to be run: those that are not done and have no rows."""
    kept = stored(results, jobs[0].cfg) if jobs else {}
    return [job for job in jobs if not job.done and (job.method, job.seed) not in kept]


def by_form(path: Path) -> list[dict[str, Any]]:
    """For each form of question in heldout.json: how many are right, how many are cut off."""
    asked = json.loads(path.read_text()) if path.exists() else []
    found = []
    for form in real_task.FORMS:
        own = [row for row in asked if real_task.form_of(row["question"]) == form]
        right = [ok for row in own for ok in row["right"]]
        cut = [text.endswith(text_env.CUT_OFF) for row in own for text in row["responses"]]
        if own:
            shares = {"right": mean(right), "cut_off": mean(cut)}
            found.append({"form": form, "responses": len(right), **shares})
    return found


def quotes(job: Job) -> str:
    """Its part of responses.md: three of the last step's responses, three wrong ones."""
    asked = job.folder / "heldout.json"
    lines = [f"## {job.title}"]
    shown = json.loads((job.folder / "responses.json").read_text())
    if asked.exists():
        for row in json.loads(asked.read_text()):
            wrong = [text for text, ok in zip(row["responses"], row["right"]) if not ok]
            if wrong and len(shown) < 6:
                shown.append(f"*wrong, held out:* {row['question']}\n\n{wrong[0]}")
    lines += ["> " + text.replace("\n", "\n> ") for text in shown]
    return "\n\n".join(lines)


def sections(path: Path) -> dict[str, str]:
    """The parts of responses.md by title."""
    parts = path.read_text().split("\n## ")[1:] if path.exists() else []
    return {part.partition("\n")[0]: f"## {part.strip()}" for part in parts}


def collect(jobs: list[Job], results: Path) -> None:
    """Write the CSV files and responses.md from the jobs that are done.

    What these files hold of a job stays if its run folder is gone.
    """
    curves: list[dict[str, Any]] = []
    heldout: list[dict[str, Any]] = []
    forms: list[dict[str, Any]] = []
    kept = stored(results, jobs[0].cfg)
    texts = sections(results / "responses.md")
    for job in jobs:
        who = (job.method, job.seed)
        if not job.done:
            for rows, old in zip((curves, heldout, forms), kept.get(who, ([], [], []))):
                rows.extend(old)
            continue
        records = job.records
        row = {"method": job.method, "seed": job.seed}
        for r in records[1:]:
            curves.append(row | r | {"h_ratio": r["h_agg"] / (r["anchor"] or math.nan)})
        for r in (r for r in records if any("/" in name for name in r)):
            scores = {name.partition("/")[2]: r[name] for name in records[0] if "/" in name}
            heldout.append(row | {"step": r["step"]} | scores)
        forms += [row | cells for cells in by_form(job.folder / "heldout.json")]
        if (job.folder / "responses.json").exists():
            texts[job.title] = quotes(job)
        path = job.folder / "positions.csv"
        if job.seed == 0 and path.exists():
            results.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, results / "positions.csv")  # of the base: alike in all jobs
    if curves:
        names = [*list(heldout[0])[:3], *CURVES, "seconds"]  # method, seed, step, ...
        of_forms = ["method", "seed", "form", "responses", "right", "cut_off"]
        heads = (names, heldout[0], of_forms)
        for file, columns, rows in zip(FILES, heads, (curves, heldout, forms)):
            cells = [
                [x if isinstance(x := row[c], str) else f"{x:.5g}" for c in columns]
                for row in rows
            ]
            write_csv(results / f"{file}.csv", list(columns), cells)
        title = "# Three responses of each job's last training step, "
        title += "and up to three that are wrong"
        shown = [texts[job.title] for job in jobs if job.title in texts]
        (results / "responses.md").write_text("\n\n".join([title, *shown]) + "\n")


def spread(values: list[float]) -> str:
    """The mean and, of several seeds, the smallest and the largest.

    >>> spread([0.25, 0.5]), spread([0.5]), spread([123456.7])
    ('0.375 (0.250 to 0.500)', '0.500', '123,457')
    """
    middle, low, high = (
        f"{x:,.0f}" if x >= 1000 else f"{x:.3f}"
        for x in (mean(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def runs_of(rows: list[dict[str, Any]]) -> dict[str, list[list[dict[str, Any]]]]:
    """Rows of one file: method -> its runs, seed by seed -> the rows of a run."""
    runs: dict[tuple[str, float], list[dict]] = defaultdict(list)
    for row in rows:
        runs[row["method"], row["seed"]].append(row)
    found = defaultdict(list)
    for (method, _), own in runs.items():
        found[method].append(own)
    return dict(found)


def first_step(rewards: list[float], level: float) -> float:
    """The first step at which the mean reward of five steps is above a level; else infinity.

    >>> first_step([0.0, 1.0, 1.0, 1.0, 1.0, 1.0], 0.7)
    5
    """
    good = (i for i, x in enumerate(smooth(rewards), 1) if i >= 5 and x > level)
    return next(good, math.inf)


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table in Markdown, after an empty one.

    >>> table(["a", "b"], [["1", "2"]])
    ['', '| a | b |', '|---|---|', '| 1 | 2 |']
    """
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return ["", lines[0], "|---" * len(heads) + "|", *lines[1:]]


def curves_table(curves: list[dict[str, Any]]) -> list[str]:
    """Means of the last ten steps."""
    rows = []
    for method, runs in runs_of(curves).items():
        values = [
            spread([mean(r[name] for r in run[-10:]) for run in runs]) for name in CURVES
        ]
        rows.append([method, str(len(runs)), *values])
    return table(["last ten steps", "seeds", *CURVES.values()], rows)


def speed_table(curves: list[dict[str, Any]]) -> list[str]:
    """How fast each run learns."""
    rows = []
    for method, runs in runs_of(curves).items():
        rewards = [[r["reward"] for r in run] for run in runs]
        steps = []
        for level in LEVELS:
            found = [first_step(run, level) for run in rewards]
            steps.append(", ".join("never" if x == math.inf else str(x) for x in found))
        middle = [mean(run[10:40] or run) for run in rewards]  # or: of a run of the smoke test
        rows.append([method, *steps, spread(middle)])
    heads = [f"step at which it passes {level:g}" for level in LEVELS]
    return table(["reward, mean of five steps", *heads, "mean of steps 11 to 40"], rows)


def scores_table(heldout: list[dict[str, Any]]) -> list[str]:
    """Held-out scores: of the base model, and means over the policies of the last steps."""
    names = list(heldout[0])[3:]
    before = [[row] for row in {r["seed"]: r for r in heldout if r["step"] == 0}.values()]
    after = runs_of([r for r in heldout if r["step"] > 0])
    rows = []
    for method, runs in {"base model": before, **after}.items():
        policies = " or ".join(map(str, sorted({len(run) for run in runs})))
        values = [spread([mean(r[name] for r in run) for run in runs]) for name in names]
        rows.append([method, policies, *values])
    return table(["held out", "policies of a run", *names], rows)


def forms_table(forms: list[dict[str, Any]]) -> list[str]:
    """How often the last policy is right, by form of question."""
    shown = {m: runs for m, runs in runs_of(forms).items() if m in ("dr_grpo", "siren")}
    rows = []
    for method, runs in shown.items():
        for run in runs:
            own = {r["form"]: f"{r['right']:.2f}" for r in run}
            cut = sum(r["responses"] * r["cut_off"] for r in run)
            cells = [own.get(form, "-") for form in real_task.FORMS]
            cells.append(f"{cut / sum(r['responses'] for r in run):.2f}")
            rows.append([f"{method}, seed {run[0]['seed']:.0f}", *cells])
    return table(["right, by form of question", *real_task.FORMS, "cut off"], rows)


def sizes_line(positions: list[dict[str, Any]]) -> str:
    """The base model's nuclei."""
    sizes = sorted(int(r["nucleus_size"]) for r in positions)
    sure = mean(size == 1 for size in sizes)
    return (
        f"The base model's {len(positions)} tokens of the first step: {sure:.0%} have H' = 0, "
        f"{mean(r['peak'] for r in positions):.0%} are peaks; |V_p| has median "
        f"{median(sizes):.0f} and 99th percentile {sizes[int(0.99 * len(sizes))]}; "
        f"{mean(size > 64 for size in sizes):.1%} have more than 64 tokens."
    )


def dtypes_table(results: Path) -> list[str]:
    """The same methods in two dtypes: those of the older runs, which are in float32/."""
    rows = []
    for dtype, folder in ((DTYPE, results), ("float32", results / "float32")):
        path = folder / "curves.csv"
        found = runs_of(read_csv(path)) if path.exists() else {}
        for method in (m for m in BOTH if m in found):
            ends = [run[-10:] for run in found[method]]
            values = [spread([mean(r[x] for r in run) for run in ends]) for x in BOTH_CURVES]
            rows.append([method, dtype, str(len(ends)), *values])
    heads = ["last ten steps", "dtype", "seeds", *(CURVES[name] for name in BOTH_CURVES)]
    return table(heads, sorted(rows, key=lambda row: BOTH.index(row[0])))


def tables(results: Path) -> str:
    """The page's numbers, all of them from the CSV files."""
    names = ("curves", "heldout", "forms", "positions")
    curves, heldout, forms, positions = (read_csv(results / f"{x}.csv") for x in names)
    lines = curves_table(curves) + speed_table(curves) + scores_table(heldout)
    lines += forms_table(forms) + dtypes_table(results)
    steps = max(r["step"] for r in curves)
    seconds = median(r["seconds"] for r in curves)
    cost = f"{steps:.0f} steps; {seconds:.0f} seconds per step (median)."
    return "\n".join([*lines[1:], "", sizes_line(positions), cost])


def smooth(values: list[float], window: int = 5) -> list[float]:
    """Each value's mean with the ones before it, `window` in all.

    >>> smooth([1.0, 3.0, 5.0], 2)
    [1.0, 2.0, 4.0]
    """
    return [mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def draw_curve(axis: Any, method: str, name: str, curves: list[dict[str, Any]]) -> None:
    """A line, the mean over seeds of means of five steps; the band around it goes from the
    smallest to the largest. Nothing if the method has no rows."""
    from research.figures import STYLES

    runs = defaultdict(list)
    for row in curves:
        if row["method"] == method:
            runs[row["seed"]].append(row[name])
    columns = list(zip(*map(smooth, runs.values())))  # all seeds, for each step
    if not columns:
        return
    style = {**STYLES[LIKE.get(method, method)], "marker": "", "label": NAMES[method]}
    steps = range(1, len(columns) + 1)
    axis.plot(steps, list(map(mean, columns)), **style)
    low = list(map(min, columns))
    high = list(map(max, columns))
    axis.fill_between(steps, low, high, color=style["color"], alpha=0.15, lw=0)


def curves_figure(curves: list[dict[str, Any]]) -> Any:
    """real_model.png: above SIREN beside other methods, below beside itself without a part."""
    from research.figures import name_lines, panels

    canvas, axes = panels(3, 2, height=2.6)
    for axis, (name, methods) in zip(axes, PANELS):
        for method in methods:
            draw_curve(axis, method, name, curves)
        axis.set_title(CURVES[name], fontsize=10)
        axis.set(xlabel="step", yscale="linear" if name == "reward" else "log")
        if name == "reward":
            axis.set_ylim(0, 1.05)
    axes[0].set_ylabel("SIREN and other methods")
    axes[3].set_ylabel("SIREN without a part")
    name_lines(canvas)
    return canvas


def positions_figure(positions: list[dict[str, Any]]) -> Any:
    """positions.png: the nuclei of the base model, and where the peaks are."""
    from research.figures import panels, ticks

    canvas, axes = panels(2)
    sizes = [r["nucleus_size"] for r in positions]
    bins = [2**power for power in range(math.ceil(math.log2(max(sizes) + 1)) + 1)]
    axes[0].hist(sizes, bins, color="0.6", edgecolor="1")
    axes[0].set(xlabel="tokens in the nucleus, p = 0.8", ylabel="positions")
    ticks(axes[0].xaxis, bins[:-1:2])
    others = [r["nucleus_entropy"] for r in positions if not r["peak"]]
    peaks = [r["nucleus_entropy"] for r in positions if r["peak"]]
    quarters = [n / 4 for n in range(29)]
    axes[1].hist(others, quarters, color="0.75", label="_other positions")
    axes[1].hist(peaks, quarters, color="#0059b3", lw=2, histtype="step", label="_peaks")
    axes[1].set(xlabel="H', nats", ylabel="positions", yscale="log")
    where = {"transform": axes[1].transAxes, "fontsize": 8}
    axes[1].text(0.1, 0.93, "other positions (filled)", color="0.35", **where)
    axes[1].text(0.42, 0.66, "peaks, tau = 0.8 (outline)", color="#0059b3", **where)
    return canvas


def figures(results: Path) -> list[Path]:
    """Draw both figures from the csv files of `results`."""
    curves, positions = (read_csv(results / f"{name}.csv") for name in ("curves", "positions"))
    paths = [results / "real_model.png", results / "positions.png"]
    curves_figure(curves).savefig(paths[0], dpi=100)
    positions_figure(positions).savefig(paths[1], dpi=100)
    return paths


def write_page(page: Path, numbers: str) -> None:
    """Put the numbers between the page's marks. ValueError if it has none."""
    before, found, rest = page.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not found or not end:
        raise ValueError(f"{page}: has no {MARKS[0]} ... {MARKS[1]}; put them back")
    page.write_text(f"{before}{MARKS[0]}\n\n{numbers}\n\n{MARKS[1]}{after}")


# ------------------------------------------------------------------------- 4. the command line
def get_model() -> None:
    """Let examples/get_smollm2.py convert the model, if it is not there yet."""
    if not (MODEL / "config.json").exists():
        made = subprocess.run([sys.executable, "examples/get_smollm2.py"], cwd=ROOT)
        if made.returncode:
            raise RuntimeError("there is no model; see examples/get_smollm2.py")


def study(args: argparse.Namespace) -> None:
    """Run what is missing; write the report."""
    runs = Path("runs/real")  # of ROOT
    data = Path("data")
    results = RESULTS
    page = PAGE
    changes: dict[str, Any] = {}
    if args.smoke:
        folder = Path(tempfile.mkdtemp())
        runs = folder / "runs"
        results = folder / "results"
        data = folder / "data"
        page = Path(shutil.copy(PAGE, folder))
        changes = {"steps": 2, "prompts": 2, "group_size": 4, "max_tokens": 8}
        changes |= {"eval_prompts": 2, "eval_samples": 2}
    where = (runs, data, MODEL.relative_to(ROOT))
    jobs = make_jobs(*where, **changes) + candidates(*where, **changes)
    jobs += tuned(results, *where, **changes)
    if args.smoke:
        jobs = jobs[:2]  # dr_grpo and siren
    if not args.report and not args.plan:
        get_model()
        real_task.write(ROOT / data)
        bonuses = [job for job in jobs if job.method.startswith("bonus")]  # they come last
        first = [job for job in jobs if job not in bonuses]
        codes = run_all(missing(first, results), args.workers)
        if not args.smoke and not any(codes):
            more = tuned(results, *where, **changes)  # once the candidates are done
            jobs += [job for job in more if job not in jobs]
            codes += run_all(missing([*more, *bonuses], results), args.workers)
        if any(codes):
            failed = f"{len(codes) - codes.count(0)} of {len(codes)} jobs failed"
            raise RuntimeError(f"{failed}; see log.txt in their folders under {runs}")
    if args.plan:
        todo = missing(jobs, results)
        for job in todo:
            print("python", " ".join(job.command))
        left = [job.cfg.steps + 1 - len(job.records) for job in todo]
        evaluations = len(todo) * (1 + LAST // EVERY)
        hours = (sum(left) * STEP_SECONDS + evaluations * EVAL_SECONDS) / 3600
        cost = f"{hours:.1f} core hours, {hours / args.workers:.1f} h"
        print(f"{len(todo)} of {len(jobs)} jobs: {cost}")
        return
    collect(jobs, results)
    write_page(page, tables(results))
    print(*figures(results))


def command(argv: list[str] | None) -> None:
    """Read the flags and run the study."""
    parser = Parser("real_study.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    for name, text in {
        "--plan": "print the commands and their cost",
        "--report": "run nothing: CSV files, figure and page",
        "--smoke": "two steps, two questions, a temporary folder",
    }.items():
        parser.add_argument(name, action="store_true", help=text)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread [2]")
    args = parser.parse_args(argv)
    rule = "must be 1 to 64; the default is 2"
    siren.require(1 <= args.workers <= 64, f"--workers {args.workers}: {rule}")
    study(args)


def main(argv: list[str] | None = None) -> int:
    """The command. Exit codes as run_tool says."""
    return run_tool("real_study.py", command, argv)


if __name__ == "__main__":
    sys.exit(main())
