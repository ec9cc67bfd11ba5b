"""The study: collapse, explosion and SIREN on the toy world, over seeds, with intervals.

    python examples/study.py --preset smoke         # two minutes: everything, tiny; a temp folder
    python examples/study.py --preset quick         # three methods, four seeds, 200 steps
    python examples/study.py --preset main          # coefficients; README's figure and table
    python examples/study.py --preset fresh         # does the effect repeat on eight more seeds?
    python examples/study.py --preset sweep_band    # width of the band of useful coefficients
    python examples/study.py --preset sensitivity   # p, tau and beta
    python examples/study.py --preset official      # the official code's departures
    python examples/study.py --preset all           # all of them but smoke
    python examples/study.py --preset main --plan   # what would run, and its cost
    python examples/study.py --report               # figures and tables again; runs nothing

A job is one training run and its evaluation, a line of results/raw/<preset>.jsonl.gz. That file is
written whole after each job, and a job that has its line is not run again: a study that was killed
goes on where it stopped, and presets share jobs. siren.train is the only training loop. The seed
draws everything: the world's gaps and the base model (task toy_env:seed=N) and the training.
Coefficients are chosen on validation seeds and validation prompts; tables and curves are of other
seeds and test prompts.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import siren
import toy_env
from examples import official, study_figures
from examples.engine import METRICS, Parser, RunFolder, load_checkpoint, write_whole

ROOT = Path(__file__).resolve().parents[1]
# rough costs on one thread: a training step, an evaluation response, a base model
STEP_SECONDS, RESPONSE_SECONDS, BASE_HOURS = 0.25, 0.00025, 0.014

METHODS: dict[str, dict[str, Any]] = {  # what each changes in siren.Config
    "dr_grpo": {"regularizer": "none"},
    "naive_bonus": {"regularizer": "bonus", "top_p": 1.0, "peak_quantile": 0.0},
    "siren": {},
    "wo_top_p": {"top_p": 1.0},
    "wo_peak": {"peak_quantile": 0.0},
    "wo_anchor": {"regularizer": "bonus"},
    "anchor_only": {"top_p": 1.0, "peak_quantile": 0.0},
}
# As many for each method, log-spaced, around its best on validation prompts. A bonus has nothing to
# stop it, so its useful coefficients are smaller; without the peak mask a coefficient is spread
# over all positions, so they are larger.
CANDIDATES: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("naive_bonus", "wo_anchor"), (0.002, 0.006, 0.02, 0.06)),
    **dict.fromkeys(("siren", "wo_top_p"), (0.02, 0.06, 0.2, 0.6)),
    **dict.fromkeys(("wo_peak", "anchor_only"), (0.06, 0.2, 0.6, 2.0)),
}
# siren.py's own rules, in terms of examples/official.py
DEFINITION = {"exclusive": False, "strict": False, "per_micro_batch": False, "dual_clip": None}
SMALL = {"micro_batch_size": 8}  # where the rule is about micro-batches
VARIANTS: dict[str, dict[str, Any]] = {  # the official code's rules in place of some of them
    "definition": {},
    "exclusive": {"rules": {"exclusive": True}},
    "strict": {"rules": {"strict": True}},
    "per_micro_batch": {"rules": {"per_micro_batch": True}, **SMALL},
    "official": {"rules": {"exclusive": True, "strict": True, "per_micro_batch": True}, **SMALL},
}
BETA = siren.Config().beta  # of what is not tuned
PROBE_SAMPLES = 8  # responses per prompt
RULER = {"top_p": 0.8, "peak_quantile": 0.8}  # H_agg of the probe, whatever the method trains with
LOGGED = ("step", "reward", "entropy", "h_agg", "useless_share", "grad_norm")
NOT_NUMERIC = ("out", "save_every", "threads")  # fields of siren.Config that change no number


# -------------------------------------------------------------------------------------- 1. a job
@dataclasses.dataclass(frozen=True)
class Final:
    """How the trained policy is evaluated, on easy and on hard held-out prompts."""

    prompts: int = 512  # of each grade
    samples: int = 64  # per prompt
    temperatures: tuple[float, ...] = (0.6, 1.0)
    probe: int = 256  # training prompts, 8 responses each at T = 1: entropies, reward, uselessness


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run and its evaluation: a row of the study."""

    method: str  # a label: the numbers depend on the other three alone
    cfg: siren.Config
    final: Final
    rules: dict[str, bool] = dataclasses.field(default_factory=dict)  # of examples.official

    @property
    def settings(self) -> dict[str, Any]:
        """As they stand in the job's row."""
        config, final = dataclasses.asdict(self.cfg), dataclasses.asdict(self.final)
        return {"config": config, "rules": self.rules, "final": final}

    @property
    def seconds(self) -> float:
        """A rough estimate of its cost on one thread."""
        cfg, final = self.cfg, self.final
        often = 2 + (cfg.steps // cfg.eval_every if cfg.eval_every else 0)
        held_out = final.prompts * final.samples * len(final.temperatures)
        responses = 2 * (held_out + often * cfg.eval_prompts * cfg.eval_samples)
        responses += 2 * final.probe * PROBE_SAMPLES
        return cfg.steps * STEP_SECONDS + responses * RESPONSE_SECONDS


def key_of(row: dict[str, Any]) -> str:
    """What determines the numbers of a job's row, as text: settings that aren't today's defaults.

    So a row stays valid when siren.Config gains a field, and not when a default changes.

    >>> config = {"beta": 7.0, "steps": siren.Config().steps, "out": "x"}
    >>> key_of({"config": config, "rules": {"strict": True}, "final": {"prompts": 8}})
    '{"Config.beta": 7.0, "Final.prompts": 8, "rules.strict": true}'
    """
    parts = {f"rules.{name}": value for name, value in row["rules"].items()}
    for kind, values in ((siren.Config, row["config"]), (Final, row["final"])):
        usual = {field.name: field.default for field in dataclasses.fields(kind)}
        for name, value in values.items():
            value = tuple(value) if isinstance(value, list) else value
            if name not in NOT_NUMERIC and usual.get(name, value) != value:
                parts[f"{kind.__name__}.{name}"] = value
    return json.dumps(parts, sort_keys=True)


def check_unseen(task: toy_env.ToyWorld, cfg: siren.Config, heldout: dict[str, list]) -> None:
    """Assert that no held-out prompt, in any order of its terms, is drawn for training.

    Training's prompts are a function of the seed and the step. The base model learned from prompts
    of the split "train", so that the held-out ones are of another covers it as well.
    """
    prompts = (task.train_problems(cfg.prompts, f"{cfg.seed}/{t}") for t in range(1, cfg.steps + 1))
    drawn = {tuple(sorted(problem.prompt)) for problems in prompts for problem in problems}
    for problem in (problem for problems in heldout.values() for problem in problems):
        terms = sorted(token - toy_env.ZERO for token in problem.prompt[:-1])
        assert tuple(sorted(problem.prompt)) not in drawn, f"{terms} was trained on"
        split = toy_env.split_of(terms)
        assert split == task.split != "train", f"{terms} is of the {split} split"


def is_right(task: toy_env.ToyWorld, ids: list[int], answer: str) -> bool:
    """The reward of a response."""
    return siren.verify(task.decode(ids), answer, answer_form=task.answer_form, equal=task.equal)


@torch.no_grad()
def probe(model: torch.nn.Module, task: toy_env.ToyWorld, job: Job) -> dict[str, Any]:
    """Reward, entropies and useless tokens of a policy, by the same ruler whatever it trained with.

    At T = 1, on prompts drawn as those for training, but not for it; H_agg with p = tau = 0.8.
    "by_position": mean H, H' and share of peaks at each response position.
    """
    cfg = dataclasses.replace(job.cfg, **RULER)
    seed = f"{cfg.seed}/probe"
    problems = task.train_problems(job.final.probe, seed)
    rollout = siren.respond(model, task, problems, cfg, seed, PROBE_SAMPLES, cfg.temperature)
    stats, responses = siren.score(model, rollout, cfg), rollout.responses()
    peak = siren.peak_mask(stats["nucleus_entropy"], rollout.mask, cfg.peak_quantile)  # [B, T]
    h_agg = siren.aggregate_entropy(stats["nucleus_entropy"], peak, rollout.mask)
    answers = [problem.answer for problem in problems for _ in range(PROBE_SAMPLES)]
    right = [is_right(task, ids, answer) for ids, answer in zip(responses, answers)]
    count = rollout.mask.sum(0)  # [T]
    by_position = {
        "entropy": stats["entropy"].sum(0) / count,
        "nucleus_entropy": stats["nucleus_entropy"].sum(0) / count,
        "peak": peak.sum(0) / count,
        "responses": count / len(responses),
    }
    return {
        "reward": sum(right) / len(right),
        "entropy": float(stats["entropy"].sum() / rollout.mask.sum()),
        "h_agg": float(h_agg),
        **task.metrics(responses),
        "response_tokens": float(rollout.mask.sum() / len(responses)),
        "by_position": {key: value.tolist() for key, value in by_position.items()},
    }


def evaluate(
    model: torch.nn.Module, task: Any, problems: list, cfg: siren.Config, n: int, temperature: float
) -> dict[str, float]:
    """siren.evaluate with n samples, for each k = 1, 2, 4, ... up to n.

    avg@16 is estimated with all samples; maj@k and distinct@k are means over blocks of k.
    """
    total: Counter[str] = Counter()
    rollout = siren.respond(model, task, problems, cfg, f"{cfg.seed}/eval", n, temperature)
    responses = rollout.responses()
    for i, problem in enumerate(problems):
        own = responses[i * n : (i + 1) * n]
        right = [is_right(task, ids, problem.answer) for ids in own]
        given = [siren.extract_answer(task.decode(ids), task.answer_form) for ids in own]
        answer = siren.normalize(problem.answer)
        votes = [answer if ok else g and siren.normalize(g) for ok, g in zip(right, given)]
        total["avg@16"] += sum(right) / n
        for k in (2**power for power in range(n.bit_length())):
            blocks = [set(map(tuple, own[b : b + k])) for b in range(0, n - k + 1, k)]
            total[f"maj@{k}"] += siren.maj_at_k(votes, answer, k)
            total[f"pass@{k}"] += siren.pass_at_k(n, sum(right), k)
            total[f"distinct@{k}"] += sum(map(len, blocks)) / k / len(blocks)
    return {name: value / len(problems) for name, value in total.items()}


def slim(value: Any) -> Any:
    """The same with floats rounded to 5 significant digits: rows are kept in the repository.

    >>> slim({"a": 1 / 3, "b": [2.0, 1]})
    {'a': 0.33333, 'b': [2.0, 1]}
    """
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.5g}"))


def run_job(job: Job) -> dict[str, Any]:
    """Train and evaluate; returns the job's row: settings, what the training logged, evaluations.

    A run that diverges is a result, not a failure: the policy of its last checkpoint counts.
    """
    start, diverged = time.perf_counter(), None
    with tempfile.TemporaryDirectory() as folder:
        cfg = dataclasses.replace(job.cfg, out=folder)
        try:
            with official.rules(**{**DEFINITION, **job.rules}):
                siren.train(cfg)
        except FloatingPointError as error:
            done = len((Path(folder) / METRICS).read_text().splitlines())  # from step 0 on
            diverged = f"step {done}: {error}"
        saved = load_checkpoint(Path(folder))
    trained = time.perf_counter()
    task = siren.load_task(cfg)
    model = task.build_model().eval()
    before = probe(model, task, job)
    model.load_state_dict(saved["model"], strict=False)  # tied weights are stored once
    after, evals = probe(model, task, job), []
    heldout = task.heldout(job.final.prompts)
    check_unseen(task, cfg, heldout)
    for temperature in job.final.temperatures:
        for split, problems in heldout.items():
            values = evaluate(model, task, problems, cfg, job.final.samples, temperature)
            evals.append({"split": split, "temperature": temperature, **values})
    records, spent = saved["records"], (trained - start, time.perf_counter() - trained)
    log = [{k: v for k, v in r.items() if k in LOGGED or "/" in k} for r in records]
    return {
        "method": job.method,
        **job.settings,
        "seconds": {"train": round(spent[0], 1), "evaluate": round(spent[1], 1)},
        "steps": records[-1]["step"],
        "diverged": diverged,
        "anchor": records[-1].get("anchor"),
        **slim({"before": before, "after": after, "evals": evals, "log": log}),
    }


# ---------------------------------------------------------------------------------- 2. the presets
@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything: FULL is the study, SMOKE runs the same code in two minutes."""

    steps: int = 300
    quick_steps: int = 200
    seeds: tuple[int, ...] = tuple(range(8))  # of the main table; each draws its own world
    quick_seeds: tuple[int, ...] = tuple(range(4))
    fresh_seeds: tuple[int, ...] = tuple(range(8, 16))  # does the main table's effect repeat?
    validation_seeds: tuple[int, ...] = (100, 101, 102)  # of all that is chosen or explored
    vocabulary_seeds: tuple[int, ...] = (100,)  # each needs base models of its own
    final: Final = Final()
    quick_final: Final = Final(prompts=256, temperatures=(0.6,))
    explore: Final = Final(prompts=128, samples=16, temperatures=(0.6,))
    curve: tuple[int, int] = (30, 64)  # evaluation during training: every .. steps, .. prompts
    methods: tuple[str, ...] = tuple(METHODS)
    candidates: int = 4  # for each method's coefficient
    band: tuple[float, ...] = (0.002, 0.006, 0.02, 0.06, 0.2, 0.6, 2.0)
    band_few: tuple[float, ...] = (0.006, 0.02, 0.2)  # for each of the vocabularies
    vocabularies: tuple[int, ...] = (96, study_figures.DEFAULT_VOCAB, 1024)
    top_ps: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 1.0)
    taus: tuple[float, ...] = (0.0, 0.5, 0.8, 0.9)
    one_world: bool = False  # the shipped base model for every seed


FULL = Size()
TINY = Final(prompts=4, samples=16, temperatures=(0.6,), probe=4)
SMOKE = Size(
    steps=4,
    quick_steps=4,
    seeds=(0, 1),
    quick_seeds=(0,),
    fresh_seeds=(2, 3),
    validation_seeds=(100,),
    final=dataclasses.replace(TINY, temperatures=(0.6, 1.0)),
    quick_final=TINY,
    explore=TINY,
    curve=(2, 2),
    methods=("dr_grpo", "naive_bonus", "siren"),
    candidates=2,
    band=(0.02, 0.2),
    band_few=(0.02, 0.2),
    vocabularies=(study_figures.DEFAULT_VOCAB,),
    top_ps=(0.8, 1.0),
    taus=(0.0, 0.8),
    one_world=True,
)


def make_job(
    size: Size, method: str, beta: float, seed: int, *, final: Final | None = None, label: str = "",
    vocab: int = 0, rules: dict[str, bool] | None = None, **changes: Any,
) -> Job:  # fmt: skip
    """The job of a method of METHODS. changes: of siren.Config; label: its name in tables.

    With `final` it is evaluated on test prompts, also while it trains; without, on validation
    prompts and with fewer samples, for what is chosen or only looked at.
    """
    task = f"toy_env:seed={0 if size.one_world else seed}" + (f",vocab={vocab}" if vocab else "")
    every, prompts = size.curve if final else (0, 1)
    knobs = {"task": task if final else f"{task},split=validation", "seed": seed}
    knobs |= {"steps": size.steps, "beta": 0.0 if method == "dr_grpo" else beta}
    knobs |= {"eval_every": every, "eval_prompts": prompts, "eval_samples": 16, "device": "cpu"}
    cfg = siren.Config(**{**knobs, **METHODS[method], **changes})
    return Job(label or method, cfg, final or size.explore, rules or {})


def quick_jobs(size: Size, _: dict[str, list]) -> list[Job]:
    """Three methods, one coefficient that was not tuned."""
    methods, steps = ("dr_grpo", "siren", "naive_bonus"), size.quick_steps
    how = {"final": size.quick_final, "steps": steps, "eval_every": max(1, steps // 10)}
    return [make_job(size, m, BETA, seed, **how) for seed in size.quick_seeds for m in methods]


def tune_jobs(size: Size, _: dict[str, list]) -> list[Job]:
    """Every method's candidates on the validation seeds; Dr.GRPO has none: run to compare."""
    candidates = {m: CANDIDATES.get(m, (0.0,))[-size.candidates :] for m in size.methods}
    grid = [(method, beta) for method, betas in candidates.items() for beta in betas]
    return [make_job(size, m, beta, seed) for seed in size.validation_seeds for m, beta in grid]


def table_jobs(size: Size, runs: dict[str, list]) -> list[Job]:
    """The main table: the chosen coefficients and the base model, test seeds and prompts."""
    how, base = {"final": size.final}, {"steps": 0, "eval_every": 0, "label": "base"}
    rows = {"dr_grpo": ("dr_grpo", 0.0), **choose(runs["tune"])}
    jobs = [make_job(size, "dr_grpo", 0.0, seed, **base, **how) for seed in size.seeds]
    return jobs + [
        make_job(size, method, beta, seed, label=label, **how)
        for seed in size.seeds
        for label, (method, beta) in rows.items()
    ]


def fresh_jobs(size: Size, runs: dict[str, list]) -> list[Job]:
    """Dr.GRPO and SIREN as in the main table, on seeds that nothing else has seen."""
    again = table_jobs(dataclasses.replace(size, seeds=size.fresh_seeds), runs)
    return [job for job in again if job.method in ("dr_grpo", "siren")]


def choose(runs: list[study_figures.Run]) -> dict[str, tuple[str, float]]:
    """Row of the table -> (method, coefficient), from the validation runs.

    The best mean maj@16 on hard validation prompts at T = 0.6; the smaller coefficient at a tie.
    naive_exploding is the smallest with which the bonus explodes on every validation seed (if
    none does, the largest).
    """
    chosen: dict[str, tuple[str, float]] = {}
    for method in METHODS:
        own = [run for run in runs if run.method == method and run.beta > 0]
        by_beta = study_figures.grouped(sorted(own, key=lambda r: r.beta), lambda r: r.beta)
        if not by_beta:
            continue
        score = {beta: sum(r.hard("maj@16") for r in some) for beta, some in by_beta.items()}
        best = max(score, key=lambda beta: (score[beta], -beta))
        chosen["naive_best" if method == "naive_bonus" else method] = (method, best)
        if method == "naive_bonus":
            exploding = [b for b, some in by_beta.items() if all(r.exploded for r in some)]
            chosen["naive_exploding"] = (method, min(exploding, default=max(by_beta)))
    return chosen


def band_jobs(size: Size, _: dict[str, list]) -> list[Job]:
    """The coefficient of the naive bonus and of SIREN over decades; Dr.GRPO is beta = 0."""
    grid = [("dr_grpo", 0.0), *((m, beta) for m in ("naive_bonus", "siren") for beta in size.band)]
    return [make_job(size, m, beta, seed) for seed in size.validation_seeds for m, beta in grid]


def vocabulary_jobs(size: Size, _: dict[str, list]) -> list[Job]:
    """Fewer coefficients for vocabularies of 3 sizes, and SIREN without its top-p mask as well."""
    methods = ("naive_bonus", "siren", "wo_top_p")
    grid = [("dr_grpo", 0.0), *((m, beta) for m in methods for beta in size.band_few)]
    return [
        make_job(size, m, beta, seed, vocab=vocab if vocab != study_figures.DEFAULT_VOCAB else 0)
        for vocab in size.vocabularies
        for seed in size.vocabulary_seeds
        for m, beta in grid
    ]


def sensitivity_jobs(size: Size, _: dict[str, list]) -> list[Job]:
    """p, tau and beta, one at a time, from the defaults of siren.Config; and the anchor alone."""
    around = [{"top_p": p} for p in size.top_ps] + [{"peak_quantile": tau} for tau in size.taus]
    jobs = []
    for seed in size.validation_seeds:
        jobs += [make_job(size, "dr_grpo", 0.0, seed)]
        jobs += [make_job(size, "siren", BETA, seed, **change) for change in around]
        jobs += [make_job(size, "siren", beta, seed) for beta in size.band]
        jobs += [make_job(size, "anchor_only", BETA, seed)]
    return jobs


def official_jobs(size: Size, _: dict[str, list]) -> list[Job]:
    """The definition, each departure of the official code from it, and all three together."""
    return [
        make_job(size, "siren", BETA, seed, label=label, **changes)
        for seed in size.validation_seeds
        for label, changes in VARIANTS.items()
    ]


# each preset: its groups of jobs, in order; a group may depend on the runs of those before it
Stage = Callable[[Size, dict[str, list]], list[Job]]
PRESETS: dict[str, dict[str, Stage]] = {
    "quick": {"quick": quick_jobs},
    "main": {"tune": tune_jobs, "table": table_jobs},
    "fresh": {"tune": tune_jobs, "fresh": fresh_jobs},
    "sweep_band": {"band": band_jobs, "vocabularies": vocabulary_jobs},
    "sensitivity": {"sensitivity": sensitivity_jobs},
    "official": {"official": official_jobs},
}


# ------------------------------------------------------------------------------------- 3. running
class Store:
    """The rows of every job that has run: raw/<preset>.jsonl.gz, each file whole at any time."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "raw"
        self.files: dict[Path, list[dict[str, Any]]] = {}
        self.rows: dict[str, dict[str, Any]] = {}  # by the job's key
        for path in sorted(self.folder.glob("*.jsonl.gz")):
            try:
                lines = gzip.decompress(path.read_bytes()).splitlines()
                self.files[path] = [json.loads(line) for line in lines]
                self.rows |= {key_of(row): row for row in self.files[path]}
            except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError) as error:
                raise siren.ConfigError(f"{path}: not a file of this study; delete it") from error

    def missing(self, jobs: list[Job]) -> dict[str, Job]:
        """Key -> job, of those without a row."""
        keys = {key_of(job.settings): job for job in jobs}
        return {key: job for key, job in keys.items() if key not in self.rows}

    def runs(self, jobs: list[Job]) -> list[study_figures.Run]:
        """The runs of the jobs, each once; [] if one is missing."""
        if self.missing(jobs):
            return []
        found = {(key_of(job.settings), job.method): None for job in jobs}
        return [study_figures.Run(method, self.rows[key]) for key, method in found]

    def add(self, preset: str, row: dict[str, Any]) -> None:
        """Keep a row; the same rows in any order make the same file."""
        path = self.folder / f"{preset}.jsonl.gz"
        self.rows[key_of(row)] = row
        self.files.setdefault(path, []).append(row)
        self.files[path].sort(key=lambda r: (r["method"], key_of(r)))
        text = "".join(json.dumps(row) + "\n" for row in self.files[path])
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, gzip.compress(text.encode(), mtime=0))


def origin() -> dict[str, Any]:
    """Where numbers come from: the commit (with + if the code differs from it), and versions."""

    def git(*words: str) -> str:
        how = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
        return subprocess.run(["git", *words], **how).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        commit += "+" * bool(
            git("status", "--porcelain", "--", "siren.py", "toy_env.py", "examples")
        )
    except (OSError, subprocess.CalledProcessError):  # a copy without its history
        commit = None
    versions = {name: version(name) for name in ("torch", "transformers", "numpy")}
    versions |= {"python": platform.python_version(), "machine": platform.machine()}
    return {"commit": commit, "versions": versions}


def start_worker() -> None:
    """One torch thread, so that two workers don't fight for cores; ends when its parent does."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # removes the temporary run folder
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait for the parent to end, even by kill -9: its study must not run on unseen."""
    parent_process().join()
    os._exit(1)


@contextmanager
def pool_of(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each. Ctrl-C ends them; their unfinished jobs leave nothing."""
    os.environ["TQDM_DISABLE"] = "1"  # the workers' bars would run over each other
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker)
    try:
        yield pool
    except KeyboardInterrupt:
        for worker in active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_parallel(pool: ProcessPoolExecutor, what: str, function: Callable, inputs: list) -> Iterator:
    """function(x) for each of inputs, in the order in which they are done; prints a line for each.

    One that fails doesn't stop the others; RuntimeError with the first failure at the end.
    """
    start, failed = time.perf_counter(), []
    futures = [pool.submit(function, x) for x in inputs]
    for done, future in enumerate(as_completed(futures), 1):
        if error := future.exception():
            failed.append(error)
        else:
            yield future.result()
        state = f"failed: {error!r}" if error else "done"
        minutes = (time.perf_counter() - start) / 60
        print(f"{what}: {done} of {len(inputs)} {state}, {minutes:.1f} min", flush=True)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(inputs)} failed: {failed[0]!r}") from failed[0]


def untaught(jobs: dict[str, Job]) -> list[siren.Config]:
    """A config for each base model that these jobs need and that is not stored."""
    worlds = {job.cfg.task: job.cfg for job in jobs.values()}
    files = {siren.load_task(cfg).base_file: cfg for cfg in worlds.values()}
    return [cfg for path, cfg in files.items() if not path.exists()]


def teach_base(cfg: siren.Config) -> None:
    """Make sure that the base model of the task is stored."""
    siren.load_task(cfg).build_model()


def run_missing(
    pool: ProcessPoolExecutor, what: str, jobs: dict[str, Job], store: Store, name: str
) -> None:
    """Teach the base models, run the jobs, store each row as soon as it is there."""
    from_here = origin()
    for _ in in_parallel(pool, f"{what}, base models", teach_base, untaught(jobs)):
        pass
    for row in in_parallel(pool, what, run_job, list(jobs.values())):
        store.add(name, {**row, **from_here})


def collect(
    presets: list[str], size: Size, store: Store, pool: ProcessPoolExecutor | None, name: str = ""
) -> dict[str, list[study_figures.Run]]:
    """Group -> runs. With a pool, runs what is missing, base models first; without, prints it and
    leaves out groups that are not complete. name: of the raw file, if not the preset's."""
    results: dict[str, list[study_figures.Run]] = {}
    named: dict[str, Job] = {}
    for preset in presets:
        for group, stage in PRESETS[preset].items():
            what = f"{preset}/{group}"
            if group in ("table", "fresh") and not results["tune"]:
                print(f"{what}: left out; the coefficients are not chosen before {preset}/tune")
                continue
            jobs = stage(size, results)
            todo = store.missing(jobs)
            if pool and todo:
                run_missing(pool, what, todo, store, name or preset)
            elif todo:
                new = {key: job for key, job in todo.items() if key not in named}
                hours = sum(job.seconds for job in new.values()) / 3600
                print(f"{what}: {len(jobs)} jobs, of which {len(new)} to run: {hours:.2f} h")
                named |= new
            results[group] = store.runs(jobs)
    if named:
        hours = sum(job.seconds for job in named.values()) / 3600 + BASE_HOURS * len(
            untaught(named)
        )
        print(f"in all {len(named)} jobs to run: {hours:.2f} hours on one thread, with base models")
    return results


# ------------------------------------------------------------------------------ 4. the command line
def parse_seeds(text: str, size: Size) -> tuple[int, ...]:
    """Seeds from the first to the last of a range; none may be a validation seed.

    >>> parse_seeds("8-10", FULL)
    (8, 9, 10)
    """
    found = re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", text)
    seeds = range(int(found[1]), int(found[2]) + 1) if found else ()
    if not 0 < len(seeds) <= 1000:
        raise siren.ConfigError(f"--seeds {text}: must be a range of seeds; try 16-23")
    if kept := set(seeds) & set(size.validation_seeds):
        rule = f"must leave out the validation seeds {sorted(kept)}; choose others"
        raise siren.ConfigError(f"--seeds {text}: {rule}")
    return tuple(seeds)


def make_parser() -> Parser:
    """The flags."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    names = ["smoke", *PRESETS, "all"]
    how = {"default": "all", "choices": names, "metavar": "NAME", "help": " | ".join(names)}
    parser.add_argument("--preset", **how)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread [2]")
    parser.add_argument("--out", default="", help="folder [results; smoke: a temporary one]")
    parser.add_argument("--seeds", default="", help="of quick and the main table, such as 16-23")
    parser.add_argument("--plan", action="store_true", help="print what would run and its cost")
    parser.add_argument("--report", action="store_true", help="run nothing: figures and tables")
    return parser


def study(argv: list[str] | None) -> None:
    """Run the preset; then write the CSV files, figures and tables of all that has run."""
    args = make_parser().parse_args(argv)
    if not 1 <= args.workers <= 64:
        raise siren.ConfigError(f"--workers {args.workers}: must be 1 to 64; the default is 2")
    smoke = args.preset == "smoke"
    size = SMOKE if smoke else FULL
    if args.seeds:
        seeds = parse_seeds(args.seeds, size)
        size = dataclasses.replace(size, seeds=seeds, quick_seeds=seeds)
    presets = list(PRESETS) if args.preset in ("smoke", "all") else [args.preset]
    usual = Path(tempfile.gettempdir()) / "study-smoke" if smoke else ROOT / "results"
    out = Path(args.out) if args.out else usual
    if args.plan:
        collect(presets, size, Store(out), None)
        return
    with RunFolder(siren.Config(out=str(out)), resume=False):  # no two studies in one folder
        store = Store(out)
        if not args.report:
            with pool_of(args.workers) as pool:
                collect(presets, size, store, pool, "smoke" if smoke else "")
        study_figures.write_report(collect(list(PRESETS), size, store, None), out, BETA)
    print(f"results: {out}")


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 0: done, 1: a job failed, 2: bad input, 130: interrupted."""
    try:
        study(argv)
        return 0
    except siren.ConfigError as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"study.py: stopped: {error}; what is done is kept, run it again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("study.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
