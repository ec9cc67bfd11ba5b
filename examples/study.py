"""The study: collapse, explosion and SIREN on the toy world, over seeds, with intervals.

    python examples/study.py --preset smoke         # two minutes: everything, tiny; a temp folder
    python examples/study.py --preset quick         # three methods, four seeds, 200 steps
    python examples/study.py --preset main          # coefficients; README's figure and table
    python examples/study.py --preset fresh         # does the effect repeat on eight more seeds?
    python examples/study.py --preset sweep_band    # width of the band of useful coefficients
    python examples/study.py --preset sensitivity   # p, tau and beta
    python examples/study.py --preset official      # the official code's departures
    python examples/study.py --preset all           # all of them but smoke
    python examples/study.py --preset main --plan           # what would run, and its cost
    python examples/study.py --preset main --figures-only   # draw again, run nothing
    python examples/study.py --report                       # results/tables.md from what has run

A job is one training run and its evaluation. It writes results/raw/<preset>/<job>.jsonl, whole, at
its end; what has its file is not run again, so a killed study goes on where it stopped, and presets
share jobs. siren.train is the only training loop. The seed draws everything: the world's gaps and
the base model (task toy_env:seed=N) and the policy's training. Coefficients are chosen on
validation seeds and validation prompts; tables and curves are of other seeds and test prompts.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import study_figures
import torch
from study_figures import DEFAULT_VOCAB

import siren
import toy_env

ROOT = Path(__file__).resolve().parents[1]

# measured on one thread: a step, one with micro-batches of 8, what a token of the vocabulary past
# 256 adds to a step; an evaluation response, a base model
STEP_SECONDS, MICRO_SECONDS, TOKEN_SECONDS = 0.25, 0.43, 0.00027
RESPONSE_SECONDS, BASE_SECONDS = 0.00025, 50.0

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
VARIANTS: dict[str, dict[str, Any]] = {  # of siren.Config: the official code's departures
    "exclusive": {"inclusive": False},
    "strict": {"strict": True},
    "per_micro_batch": {"penalty_per_micro_batch": True, "micro_batch_size": 8},
}
VARIANTS["official"] = {k: v for knobs in VARIANTS.values() for k, v in knobs.items()}
BETA = siren.Config().beta  # of what is not tuned
PROBE_SAMPLES = 8  # responses a prompt
RULER = {"top_p": 0.8, "peak_quantile": 0.8, "inclusive": True, "strict": False}
STEP_KEYS = ("step", "reward", "entropy", "nucleus_entropy", "useless_share", "grad_norm")
NOT_NUMERIC = ("out", "save_every", "threads")  # fields of siren.Config that change no number


# -------------------------------------------------------------------------------------- 1. a job
@dataclasses.dataclass(frozen=True)
class Final:
    """How the trained policy is evaluated, on easy and on hard held-out prompts."""

    prompts: int = 512  # of each grade
    samples: int = 64  # a prompt
    temperatures: tuple[float, ...] = (0.6, 1.0)
    probe: int = 256  # training prompts, 8 responses each at T = 1: entropies, reward, uselessness

    @property
    def ks(self) -> tuple[int, ...]:
        """k = 1, 2, 4, ... of avg@k, maj@k, pass@k and distinct@k."""
        return tuple(2**i for i in range(self.samples.bit_length()))

    @property
    def responses(self) -> int:
        """How many are sampled, easy and hard."""
        return 2 * self.prompts * self.samples * len(self.temperatures)


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run and its evaluation: a row of the study."""

    method: str  # a label; the numbers depend on cfg and final alone
    cfg: siren.Config
    final: Final

    @property
    def world(self) -> toy_env.ToyWorld:
        """The toy world of the job's task."""
        return siren.load_task(self.cfg.task)

    @property
    def key(self) -> str:
        """Jobs with the same key give the same numbers."""
        return key_of(dataclasses.asdict(self.cfg), dataclasses.asdict(self.final))

    @property
    def name(self) -> str:
        """The stem of its file; the digits tell jobs apart."""
        numbers = {k: v for k, v in dataclasses.asdict(self.cfg).items() if k not in NOT_NUMERIC}
        text = json.dumps([numbers, dataclasses.asdict(self.final)], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{self.method}-b{self.cfg.beta:g}-s{self.cfg.seed}-{digest}"

    @property
    def seconds(self) -> float:
        """Its estimated cost on one thread."""
        probe = 2 * self.final.probe * PROBE_SAMPLES
        often = 2 + (self.cfg.steps // self.cfg.eval_every if self.cfg.eval_every else 0)
        curve = 2 * often * self.cfg.eval_prompts * self.cfg.eval_samples
        sampled = self.final.responses + probe + curve
        whole = self.cfg.micro_batch_size >= siren.Config().micro_batch_size
        step = STEP_SECONDS if whole else MICRO_SECONDS
        step += TOKEN_SECONDS * max(0, self.world.vocab - toy_env.ToyWorld.vocab)
        return self.cfg.steps * step + sampled * RESPONSE_SECONDS


def key_of(config: dict[str, Any], final: dict[str, Any]) -> str:
    """What determines a job's numbers, as text: the settings that differ from today's defaults.

    So a file stays valid when siren.Config gains a field, and not when a default changes.

    >>> key_of({"beta": 7.0, "steps": siren.Config().steps, "out": "x"}, {"prompts": 8})
    '{"Config.beta": 7.0, "Final.prompts": 8}'
    """
    parts = {}
    for kind, values in ((siren.Config, config), (Final, final)):
        usual = {f.name: f.default for f in dataclasses.fields(kind)}
        for name, value in values.items():
            value = tuple(value) if isinstance(value, list) else value
            if name not in NOT_NUMERIC and usual.get(name, value) != value:
                parts[f"{kind.__name__}.{name}"] = value
    return json.dumps(parts, sort_keys=True)


@contextmanager
def recorded_prompts() -> Iterator[set[tuple[int, ...]]]:
    """The multisets of terms (sorted token ids) of all training prompts drawn inside the block."""
    drawn: set[tuple[int, ...]] = set()
    original = toy_env.ToyWorld.train_problems

    def recording(world: toy_env.ToyWorld, n: int, seed: str) -> list[toy_env.Problem]:
        problems = original(world, n, seed)
        drawn.update(tuple(sorted(problem.prompt)) for problem in problems)
        return problems

    toy_env.ToyWorld.train_problems = recording
    try:
        yield drawn
    finally:
        toy_env.ToyWorld.train_problems = original


def check_unseen(drawn: set[tuple[int, ...]], heldout: dict[str, list], split: str) -> None:
    """Assert that no held-out prompt, whatever its order, was drawn, and that each is of `split`.

    The base model learned from prompts of the split "train", so the second covers it as well.
    """
    for problem in (problem for problems in heldout.values() for problem in problems):
        terms = sorted(token - toy_env.ZERO for token in problem.prompt[:-1])
        assert tuple(sorted(problem.prompt)) not in drawn, f"{terms} was trained on"
        assert toy_env.split_of(terms) == split != "train", f"{terms} is not of the {split} split"


@torch.no_grad()
def probe(model: torch.nn.Module, task: toy_env.ToyWorld, job: Job) -> dict[str, Any]:
    """Reward, entropies and useless tokens of a policy, by the same ruler whatever it trained with.

    At T = 1, on prompts drawn as those for training, but not for it; H_agg with p = tau = 0.8.
    "by_position": mean H, H' and share of peaks at each response position.
    """
    cfg = dataclasses.replace(job.cfg, **RULER)
    problems = task.train_problems(job.final.probe, f"{cfg.seed}/probe")
    how = {"samples": PROBE_SAMPLES, "temperature": cfg.temperature}
    rollout = siren.rollout_of(model, task, problems, cfg, f"{cfg.seed}/probe", **how)
    stats, responses = siren.score(model, rollout, cfg), rollout.responses()
    peak = siren.peak_mask(stats["nucleus_entropy"], rollout.mask, cfg.peak_quantile)
    answers = [problem.answer for problem in problems for _ in range(PROBE_SAMPLES)]
    form = task.answer_form
    right = [siren.verify(task.decode(r), a, answer_form=form) for r, a in zip(responses, answers)]
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
        "nucleus_entropy": float(
            siren.aggregate_entropy(stats["nucleus_entropy"], peak, rollout.mask)
        ),
        **task.metrics(responses),
        "response_tokens": float(rollout.mask.sum() / len(responses)),
        "by_position": {key: value.tolist() for key, value in by_position.items()},
    }


def slim(value: Any) -> Any:
    """The same with floats rounded to 5 significant digits: raw files are kept in the repository.

    >>> slim({"a": 1 / 3, "b": [2.0, 1]})
    {'a': 0.33333, 'b': [2.0, 1]}
    """
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: slim(v) for key, v in value.items()}
    return [slim(v) for v in value] if isinstance(value, list) else value


def run_job(job: Job, path: Path, origin: dict[str, Any]) -> float:
    """Train, evaluate, write the job's file; returns the seconds it took.

    Its lines, each with a "kind": one "job" (settings, origin, timings), "step" for each step of
    the training, "eval" for each grade and temperature, "probe" before and after.
    """
    start, diverged = time.perf_counter(), None
    with tempfile.TemporaryDirectory() as folder, recorded_prompts() as drawn:
        cfg = dataclasses.replace(job.cfg, out=folder)
        try:
            records = siren.train(cfg)
        except siren.DivergedError as error:  # a result, not a failure: the last good weights count
            diverged = str(error).split(";")[0]
            lines = (Path(folder) / siren.METRICS).read_text().splitlines()
            records = [json.loads(line) for line in lines]
        saved = siren.load_checkpoint(Path(folder))
    trained = time.perf_counter()
    task = siren.load_task(cfg.task)
    model = task.build_model()
    before = probe(model, task, job)
    model.load_state_dict(saved["model"])
    after, evals = probe(model, task, job), []
    heldout = task.heldout(job.final.prompts, cfg.eval_split)
    check_unseen(drawn, heldout, cfg.eval_split)
    for temperature in job.final.temperatures:
        how = {"eval_samples": job.final.samples, "eval_temperature": temperature}
        for split, problems in heldout.items():
            to_test = dataclasses.replace(job.cfg, **how)
            values = siren.evaluate(model, task, problems, to_test, job.final.ks)
            evals.append({"split": split, "temperature": temperature, **values})
    spent = (trained - start, time.perf_counter() - trained)
    seconds = {"train": round(spent[0], 1), "evaluate": round(spent[1], 1)}
    head = {"method": job.method, "seconds": seconds, "anchor": saved["state"]["anchor"], **origin}
    head |= {"steps": saved["state"]["step"], "diverged": diverged}
    head |= {"config": dataclasses.asdict(job.cfg), "final": dataclasses.asdict(job.final)}
    kept = [{k: v for k, v in r.items() if k in STEP_KEYS or "/" in k} for r in records]
    probes = [{"when": "before", **before}, {"when": "after", **after}]
    kinds = {"step": slim(kept), "eval": slim(evals), "probe": slim(probes)}
    lines = [siren.to_line({"kind": "job", **head})]
    lines += [siren.to_line({"kind": kind, **r}) for kind, some in kinds.items() for r in some]
    path.parent.mkdir(parents=True, exist_ok=True)
    siren.write_whole(path, lambda file: file.writelines(lines))
    return time.perf_counter() - start


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
    vocabularies: tuple[int, ...] = (96, DEFAULT_VOCAB, 1024)
    top_ps: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 1.0)
    taus: tuple[float, ...] = (0.0, 0.5, 0.8, 0.9)
    betas: tuple[float, ...] = (0.002, 0.006, 0.02, 0.06, 0.2, 0.6, 2.0)
    one_world: bool = False  # the shipped base model for every seed


TINY = Final(prompts=4, samples=16, temperatures=(0.6,), probe=4)
SMOKE = Size(
    steps=4,
    quick_steps=4,
    seeds=(0, 1),
    quick_seeds=(0,),
    fresh_seeds=(2, 3),
    validation_seeds=(100,),
    vocabulary_seeds=(100,),
    final=dataclasses.replace(TINY, temperatures=(0.6, 1.0)),
    quick_final=TINY,
    explore=TINY,
    curve=(2, 2),
    methods=("dr_grpo", "naive_bonus", "siren"),
    candidates=2,
    band=(0.02, 0.2),
    band_few=(0.02, 0.2),
    vocabularies=(DEFAULT_VOCAB,),
    top_ps=(0.8, 1.0),
    taus=(0.0, 0.8),
    betas=(0.06, 0.2),
    one_world=True,
)


def make_job(size: Size, method: str, beta: float, seed: int, final: Final, **changes: Any) -> Job:
    """The job of a method of METHODS. changes: of siren.Config; `vocab` is the world's; `label`
    takes the method's place in tables."""
    label, vocab = changes.pop("label", method), changes.pop("vocab", None)
    world = f"toy_env:seed={0 if size.one_world else seed}"
    every, prompts = size.curve if changes.get("eval_split", "test") == "test" else (0, 1)
    knobs = {"task": world + (f",vocab={vocab}" if vocab else ""), "seed": seed, "threads": 1}
    knobs |= {"steps": size.steps, "beta": 0.0 if method == "dr_grpo" else beta, "save_every": 50}
    knobs |= {"eval_every": every, "eval_prompts": prompts, "eval_samples": 16}
    return Job(label, siren.Config(**{**knobs, **METHODS[method], **changes}), final)


def explore(size: Size, method: str, beta: float, seed: int, **changes: Any) -> Job:
    """A job on validation prompts with fewer samples, for what is chosen or only looked at."""
    return make_job(size, method, beta, seed, size.explore, eval_split="validation", **changes)


def quick_jobs(size: Size, _: dict[str, list]) -> list[Job]:
    """Three methods, one coefficient that was not tuned: what README opens with."""
    methods = ("dr_grpo", "siren", "naive_bonus")
    every = {"eval_every": max(1, size.quick_steps // 10), "steps": size.quick_steps}
    return [
        make_job(size, method, BETA, seed, size.quick_final, **every)
        for seed in size.quick_seeds
        for method in methods
    ]


def tune_jobs(size: Size, _: dict[str, list]) -> list[Job]:
    """Every method's candidates on the validation seeds; Dr.GRPO has none: run to compare."""
    candidates = {m: CANDIDATES.get(m, (0.0,))[-size.candidates :] for m in size.methods}
    grid = [(method, beta) for method, betas in candidates.items() for beta in betas]
    return [explore(size, m, beta, seed) for seed in size.validation_seeds for m, beta in grid]


def table_jobs(size: Size, runs: dict[str, list]) -> list[Job]:
    """The main table: the chosen coefficients and the base model, test seeds and prompts."""
    chosen = choose(runs["tune"])
    rows = [("dr_grpo", "dr_grpo", 0.0)]
    for label, (method, beta) in chosen.items():
        rows.append((label, method, beta))
    base = {"steps": 0, "eval_every": 0, "label": "base"}
    jobs = [make_job(size, "dr_grpo", 0.0, seed, size.final, **base) for seed in size.seeds]
    return jobs + [
        make_job(size, method, beta, seed, size.final, label=label)
        for seed in size.seeds
        for label, method, beta in rows
    ]


def fresh_jobs(size: Size, runs: dict[str, list]) -> list[Job]:
    """Dr.GRPO and SIREN as in the main table, on seeds that nothing else has seen."""
    again = table_jobs(dataclasses.replace(size, seeds=size.fresh_seeds), runs)
    return [job for job in again if job.method in ("dr_grpo", "siren")]


def choose(runs: list[Any]) -> dict[str, tuple[str, float]]:
    """Row of the table -> (method, coefficient), from the validation runs.

    The best mean maj@16 on hard validation prompts at T = 0.6; the smaller coefficient at a tie.
    naive_exploding is the smallest with which the bonus explodes on every validation seed (if
    none does, the largest).
    """
    chosen: dict[str, tuple[str, float]] = {}
    for method in METHODS:
        own = [run for run in runs if run.method == method and run.beta > 0]
        betas = sorted({run.beta for run in own})
        if not betas:
            continue
        score = {
            b: sum(run.evals["hard", 0.6]["maj@16"] for run in own if run.beta == b) for b in betas
        }
        best = max(betas, key=lambda beta: (score[beta], -beta))
        name = "naive_best" if method == "naive_bonus" else method
        chosen[name] = (method, best)
        if method == "naive_bonus":
            exploding = [b for b in betas if all(run.exploded for run in own if run.beta == b)]
            chosen["naive_exploding"] = (method, min(exploding, default=betas[-1]))
    return chosen


def over_beta(methods: tuple[str, ...], betas: tuple[float, ...]) -> list[tuple[str, float]]:
    """Dr.GRPO, and these methods with these coefficients."""
    return [("dr_grpo", 0.0), *((method, beta) for method in methods for beta in betas)]


def band_jobs(size: Size, _: dict[str, list]) -> list[Job]:
    """The coefficient of the naive bonus and of SIREN over decades."""
    grid = over_beta(("naive_bonus", "siren"), size.band)
    return [explore(size, m, beta, seed) for seed in size.validation_seeds for m, beta in grid]


def vocabulary_jobs(size: Size, _: dict[str, list]) -> list[Job]:
    """Fewer coefficients for vocabularies of 3 sizes, and SIREN without its top-p mask as well."""
    grid = over_beta(("naive_bonus", "siren", "wo_top_p"), size.band_few)
    worlds = [{"vocab": vocab} if vocab != DEFAULT_VOCAB else {} for vocab in size.vocabularies]
    seeds = size.vocabulary_seeds
    return [explore(size, *row, seed, **w) for w in worlds for seed in seeds for row in grid]


def sensitivity_jobs(size: Size, _: dict[str, list]) -> list[Job]:
    """p, tau and beta, one at a time, from the defaults of siren.Config."""
    around = [{"top_p": p} for p in size.top_ps] + [{"peak_quantile": tau} for tau in size.taus]
    jobs = []
    for seed in size.validation_seeds:
        jobs += [explore(size, "dr_grpo", 0.0, seed)]
        jobs += [explore(size, "siren", BETA, seed, **change) for change in around]
        jobs += [explore(size, "siren", beta, seed) for beta in size.betas]
        jobs += [explore(size, "anchor_only", BETA, seed)]
    return jobs


def official_jobs(size: Size, _: dict[str, list]) -> list[Job]:
    """The definition, each departure of the official code from it, and all three together."""
    variants = {"definition": {}, **VARIANTS}
    return [
        explore(size, "siren", BETA, seed, label=label, **knobs)
        for seed in size.validation_seeds
        for label, knobs in variants.items()
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
def finished(out: Path) -> dict[str, Path]:
    """Key -> file, of every job that any preset has run."""
    found, fix = {}, "not a file of this study, delete it"
    for path in sorted(out.glob("raw/*/*.jsonl")):
        with open(path) as file, siren.blame(f"{path}, {fix}", KeyError, TypeError):
            head = json.loads(file.readline())
            found[key_of(head["config"], head["final"])] = path
    return found


def origin() -> dict[str, Any]:
    """Where numbers come from: the commit (with + if the code differs from it), and versions."""

    def git(*words: str) -> str | None:
        try:
            how = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
            return subprocess.run(["git", *words], **how).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--", "siren.py", "toy_env.py", "examples")
    versions = {name: version(name) for name in ("torch", "transformers", "numpy")}
    versions |= {"python": platform.python_version(), "machine": platform.machine()}
    return {"commit": commit and commit + "+" * bool(changed), "versions": versions}


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


def teach_base(task: str) -> float:
    """Make sure that the base model of a task is stored; returns the seconds it took."""
    start = time.perf_counter()
    siren.load_task(task).build_model()
    return time.perf_counter() - start


@contextmanager
def pool_of(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each, for the whole command, so that all run the same code.

    Ctrl-C ends them; their unfinished jobs leave no file.
    """
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


def in_parallel(
    pool: ProcessPoolExecutor, what: str, calls: dict[str, tuple], function: Callable
) -> None:
    """function(*arguments) for each of calls, in the pool; prints a line a result.

    One that fails doesn't stop the others; RuntimeError with the first failure at the end.
    """
    start, failed = time.perf_counter(), []
    if calls:
        print(f"{what}: {len(calls)} to run", flush=True)
    futures = {pool.submit(function, *arguments): name for name, arguments in calls.items()}
    for done, future in enumerate(as_completed(futures), 1):
        name, error = futures[future], future.exception()
        state = f"failed: {error!r}" if error else f"{future.result():.0f} s"
        failed += [(name, error)] if error else []
        spent = (time.perf_counter() - start) / 60
        print(f"[{done}/{len(calls)}, {spent:.1f} min] {name}: {state}", flush=True)
    if failed:
        name, error = failed[0]
        raise RuntimeError(f"{len(failed)} of {len(calls)} failed; {name}: {error!r}") from error


def missing(jobs: Iterable[Job], out: Path) -> dict[str, Job]:
    """Key -> job, of those without a file."""
    have = finished(out)
    return {job.key: job for job in jobs if job.key not in have}


def run_missing(group: str, jobs: list[Job], folder: Path, pool: ProcessPoolExecutor) -> None:
    """Run the jobs that no preset has run yet into results' raw/<preset>, base models first."""
    todo = list(missing(jobs, folder.parents[1]).values())
    tasks = {job.cfg.task: job.world for job in todo}
    tasks = {task: (task,) for task, world in tasks.items() if not world.base_file.exists()}
    in_parallel(pool, "base models", tasks, teach_base)
    from_here = origin()
    calls = {job.name: (job, folder / f"{job.name}.jsonl", from_here) for job in todo}
    in_parallel(pool, f"{folder.name}/{group}", calls, run_job)


def plan(size: Size, presets: list[str], out: Path) -> None:
    """Print what each group would run and its estimated cost on one thread."""
    planned: dict[str, float] = {}  # key of a job, or a world -> seconds
    for preset in presets:
        runs: dict[str, list] = {}
        for group, stage in PRESETS[preset].items():
            jobs = stage(size, runs)
            todo = {key: job for key, job in missing(jobs, out).items() if key not in planned}
            new = {job.cfg.task for job in todo.values() if not job.world.base_file.exists()}
            teaching, seconds = len(new - set(planned)), sum(job.seconds for job in todo.values())
            planned |= dict.fromkeys(new, BASE_SECONDS)
            planned |= {key: job.seconds for key, job in todo.items()}
            runs[group] = load_runs(jobs, out) or [stand_in(job) for job in jobs]
            print(
                f"{preset}/{group}: {len(jobs)} jobs, of which {len(todo)} to run: "
                f"{seconds / 60:.0f} min, and {teaching} base models to teach"
            )
    total = sum(planned.values()) / 3600
    print(f"in all {total:.2f} hours on one thread, {total / 2:.2f} with two workers")


def stand_in(job: Job) -> SimpleNamespace:
    """What `choose` reads of a run that does not exist yet, to count what depends on the choice."""
    evals = {("hard", 0.6): {"maj@16": 0.0}}
    return SimpleNamespace(method=job.method, beta=job.cfg.beta, evals=evals, exploded=False)


# -------------------------------------------------------------------------------------- 4. results
def load_runs(jobs: list[Job], out: Path) -> list[study_figures.Run]:
    """The runs of the jobs, each once; [] if one is missing."""
    have, found = finished(out), {}
    for job in jobs:
        if job.key not in have:
            return []
        found[job.key, job.method] = study_figures.read_run(have[job.key], job.method)
    return list(found.values())


def write_results(results: dict[str, list[study_figures.Run]], out: Path) -> None:
    """The CSV files and the figures of the groups that are there."""
    for group, name in (("quick", "quick"), ("table", "main")):
        if runs := results.get(group):
            study_figures.write_csv([r for r in runs if r.method != "base"], out / f"{name}.csv")
    study_figures.draw_all(results, out, BETA)


def check_csv(path: Path, rows: int) -> None:
    """Assert that a CSV has the columns that were promised and as many rows, all numbers finite."""
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == rows, f"{path}: {len(lines)} rows, not {rows}"
    for line in lines:
        assert tuple(line) == study_figures.COLUMNS, f"{path}: columns {tuple(line)}"
        values = [float(v) for k, v in line.items() if k not in ("method", "split")]
        assert all(map(math.isfinite, values)), f"{path}: {line}"


def collect(
    presets: list[str], size: Size, out: Path, pool: ProcessPoolExecutor | None, name: str = ""
) -> dict[str, list[study_figures.Run]]:
    """Group -> runs. With a pool, runs what is missing; without, leaves incomplete groups out.

    name: of the folder in raw/, if not the preset's.
    """
    results: dict[str, list[study_figures.Run]] = {}
    for preset in presets:
        for group, stage in PRESETS[preset].items():
            if group in ("table", "fresh") and not results["tune"]:
                continue  # the coefficients are not chosen yet
            jobs = stage(size, results)
            if pool:
                run_missing(group, jobs, out / "raw" / (name or preset), pool)
            results[group] = load_runs(jobs, out)
            if not results[group]:
                print(f"{preset}/{group}: {len(missing(jobs, out))} jobs have not run; left out")
    return results


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds such as 0-7 or 3,5,8-9.

    >>> parse_seeds("3,5,8-9")
    (3, 5, 8, 9)
    """
    try:
        ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
        good = all(len(end) <= 2 and end[0] <= end[-1] for end in ends)
        seeds = [n for end in ends for n in range(end[0], end[-1] + 1)]
    except ValueError:
        good = False
    if not good or len(set(seeds)) < len(seeds):
        rule = "must be numbers and ranges, each once; try 3,5,8-9"
        raise siren.ConfigError(f"--seeds {text}: {rule}")
    return tuple(seeds)


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 0: done, 1: a job failed, 2: bad input, 130: interrupted."""
    try:
        return study(parse_arguments(argv))
    except siren.ConfigError as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"study.py: stopped: {error}; what is done is kept, run it again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("study.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def parse_arguments(argv: list[str] | None) -> Any:
    """The flags, checked."""
    parser = siren.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    names = ["smoke", *PRESETS, "all"]
    parser.add_argument(
        "--preset", default="all", choices=names, metavar="NAME", help=" | ".join(names)
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes of one thread (default 2)"
    )
    parser.add_argument(
        "--out", default="", help="results folder (default results; smoke: a new one)"
    )
    parser.add_argument("--seeds", default="", help="of quick and the main table, such as 8-15")
    parser.add_argument("--plan", action="store_true", help="print what would run and its cost")
    parser.add_argument("--figures-only", action="store_true", help="draw from the raw files alone")
    parser.add_argument("--report", action="store_true", help="write tables.md from the raw files")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise siren.ConfigError(f"--workers {args.workers}: must be at least 1; the default is 2")
    return args


def study(args: Any) -> int:
    """Run the presets, write the CSV files, figures and tables. Returns the exit code."""
    smoke, size = args.preset == "smoke", SMOKE if args.preset == "smoke" else FULL
    if args.seeds:
        seeds = parse_seeds(args.seeds)
        if kept := set(seeds) & set(size.validation_seeds):
            rule = f"must leave out the validation seeds {sorted(kept)}; choose others"
            raise siren.ConfigError(f"--seeds {args.seeds}: {rule}")
        size = dataclasses.replace(size, seeds=seeds, quick_seeds=seeds)
    every = args.preset in ("smoke", "all") or args.report  # tables.md has all that has run
    presets = list(PRESETS) if every else [args.preset]
    out = Path(
        args.out or (Path(tempfile.gettempdir()) / "study-smoke" if smoke else ROOT / "results")
    )
    if args.plan:
        plan(size, presets, out)
        return 0
    claim_out(out)
    if args.figures_only or args.report:
        results = collect(presets, size, out, None)
    else:
        with pool_of(args.workers) as pool:
            results = collect(presets, size, out, pool, "smoke" if smoke else "")
    write_results(results, out)
    if args.report or smoke:
        study_figures.write_tables(results, out / "tables.md")
    if smoke:
        methods = len({run.method for run in results["table"]} - {"base"})
        check_csv(out / "main.csv", methods * len(size.seeds) * 4)  # 2 grades, 2 temperatures
        check_csv(out / "quick.csv", 3 * len(size.quick_seeds) * 2)
    print(f"results: {out}")
    return 0


def claim_out(out: Path) -> None:
    """Make the results folder; ConfigError if it can't be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        reason = f"can't be written ({error.strerror}); name another folder"
        raise siren.ConfigError(f"--out {out}: {reason}") from error


FULL = Size()

if __name__ == "__main__":
    sys.exit(main())
