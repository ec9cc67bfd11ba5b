"""The study: what SIREN and each of its parts do on the toy world, over seeds, with intervals.

    python research/study.py                     # run what is missing, then tables and figures
    python research/study.py --part main --plan  # what would run, and its cost
    python research/study.py --report            # tables and figures again; runs nothing
    python research/study.py --again 0 1         # two test seeds once more: the same digits?
    python research/study.py --smoke             # all of it, tiny, in a temporary folder

A job is one training run, by siren.train, and the evaluation of its policy. It makes one row,
a line of results/raw/<part>.jsonl.gz. That file is written whole after each job, and a job
whose row is there is not run again, so a study that was killed goes on where it stopped. A
seed draws everything: the world's gaps, the base model and the training. What is chosen is
chosen on validation seeds and validation prompts; the main table is of other seeds and of test
prompts.

--again finds the same digits on a processor like that of the stored rows. Another one rounds
in another way, and after a few steps the samples differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above

import torch
from tqdm import tqdm

import siren
from research.plugs import Config, plugged
from research.scores import maj_at_k, pass_at_k
from research.tools import Parser, load_task, locked, run_tool, write_whole

ROOT = Path(__file__).resolve().parents[1]
# The world and what fits it (results/README.md): at a fork with five options p must be above
# 4/5 to hold them all, and under .9, the chance that a sum does not slip. Of 10 tokens 4 fork.
TERMS = 5
VOCAB = 1024
STEPS = 200
WORLD = "toy_env:vocab={vocab},min_terms=5,max_terms=5,min_total=15,max_total=33,"
WORLD += "gap_share=0.3,seed={seed},split={split}"
P = 0.85
TAU = 0.6
PROBE = 256  # prompts of the probe, 8 responses each
LOGGED = ("reward", "entropy", "h_agg", "useless_share", "coefficient")
NOT_NUMERIC = ("out", "save_every", "threads", "device")  # settings that change no number
STEP_SECONDS = 0.25  # these three are rough, on one thread
RESPONSE_SECONDS = 0.0002
BASE_SECONDS = 60


# ------------------------------------------------------------------------------ 1. the methods
# method -> six candidates for p, tau and beta; 0.8, 0.8 are the paper's p and tau
GRIDS: dict[str, list[tuple[float, float, float]]] = {
    "naive_bonus": [(1, 0, b) for b in (0.0006, 0.001, 0.002, 0.004, 0.006, 0.02)],
    "siren": [(P, TAU, b) for b in (0.06, 0.2, 0.6)],
    "wo_top_p": [(1, TAU, b) for b in (0.02, 0.06, 0.2, 0.6)],
    "wo_peak": [(P, 0, b) for b in (0.06, 0.2, 0.6, 2)],
    "wo_anchor": [(P, TAU, b) for b in (0.002, 0.006, 0.02, 0.06)],
    "anchor_only": [(1, 0, b) for b in (0.02, 0.06, 0.2, 0.6, 2, 6)],
}
GRIDS["siren"] += [(0.8, TAU, 0.2), (0.9, TAU, 0.2), (0.8, 0.8, 0.2)]
GRIDS["wo_top_p"] += [(1, 0.8, 0.06), (1, 0.8, 0.2)]
GRIDS["wo_peak"] += [(0.9, 0, 0.2), (0.9, 0, 0.6)]
GRIDS["wo_anchor"] += [(0.8, 0.8, 0.006), (0.8, 0.8, 0.02)]


def knobs(regularizer: str, p: float, tau: float, beta: float) -> dict[str, Any]:
    """What a method changes in Config."""
    values = {"top_p": float(p), "peak_quantile": float(tau), "beta": float(beta)}
    return {"regularizer": regularizer, **values}


# method -> its six candidates: what each changes in Config. The constrained bonus is an
# adaptive coefficient of the entropy that aims at the initial entropy (research/zoo).
BASE = {"steps": 0}
BONUSES = ("naive_bonus", "wo_anchor")
METHODS: dict[str, list[dict[str, Any]]] = {
    "dr_grpo": [
        {**knobs("none", P, TAU, 0), "lr": lr} for lr in (1e-4, 1.5e-4, 2e-4, 3e-4, 4e-4, 5e-4)
    ],
    "constrained": [
        {**knobs("none", P, TAU, 0), "plug": f"research.zoo:method=adaptive_bonus,eta={eta}"}
        for eta in (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
    ],
    **{
        name: [knobs("bonus" if name in BONUSES else "anchor", *some) for some in candidates]
        for name, candidates in GRIDS.items()
    },
}


# ------------------------------------------------------------------------------------ 2. a job
Row = dict[str, Any]
Rows = dict[str, Row]  # a job's key -> its row


class Final(NamedTuple):
    """How a trained policy is evaluated, on easy and on hard held-out prompts."""

    prompts: int = 256  # of each grade
    samples: int = 64  # per prompt
    temperatures: tuple[float, ...] = (0.6, 1.0)
    probe: int = PROBE


class Job(NamedTuple):
    """One training run and its evaluation. The label is for the tables alone."""

    label: str
    cfg: Config
    final: Final

    @property
    def key(self) -> str:
        """What determines the numbers."""
        return key_of({"config": dataclasses.asdict(self.cfg), "final": self.final._asdict()})

    @property
    def seconds(self) -> float:
        """A rough estimate of its cost on one thread."""
        final = self.final
        held_out = 2 * final.prompts * final.samples * len(final.temperatures)
        rollouts = self.cfg.steps * self.cfg.prompts * self.cfg.group_size / 256
        return rollouts * STEP_SECONDS + (held_out + 8 * final.probe) * RESPONSE_SECONDS


def key_of(row: dict[str, Any]) -> str:
    """What determines a row's numbers, as text: the settings that aren't today's defaults.

    So a row stays valid when Config gains a field.

    >>> key_of({"config": {"beta": 7.0, "steps": Config().steps, "out": "x"}, "final": {}})
    '{"beta": 7.0, "final": {}}'
    """
    usual = dataclasses.asdict(Config())
    parts = {
        name: value
        for name, value in row["config"].items()
        if name not in NOT_NUMERIC and usual.get(name) != value
    }
    return json.dumps({**parts, "final": row["final"]}, sort_keys=True)


@torch.no_grad()
def probe(model: torch.nn.Module, task: Any, cfg: Config, prompts: int) -> dict[str, Any]:
    """Reward, entropies and useless tokens of a policy, the same way whatever it trained with.

    The responses are drawn at T = 1, to prompts drawn as those for training, but not for it.
    H' and peaks are by this world's own p and tau. "positions" has the mean of H and of H' and
    the share of peaks at each position of a response.
    """
    cfg = dataclasses.replace(cfg, top_p=P, peak_quantile=TAU)
    key = f"{cfg.seed}/probe"
    problems = task.train_problems(prompts, key)
    rollout = siren.sample(model, task, problems, cfg, key, 8, 1.0)
    stats = siren.score(model, rollout, cfg)
    responses = rollout.responses()
    peak = siren.peak_mask(stats["nucleus_entropy"], rollout.mask, TAU)  # [B, T]
    answers = [problem.answer for problem in problems for _ in range(8)]
    right = [
        is_right(task, ids, answer) for ids, answer in zip(responses, answers, strict=True)
    ]
    count = rollout.mask.sum(0)  # [T]
    positions = {"entropy": stats["entropy"], "nucleus_entropy": stats["nucleus_entropy"]}
    return {
        "reward": sum(right) / len(right),
        "entropy": float(stats["entropy"].sum() / rollout.mask.sum()),
        "h_agg": float(siren.aggregate_entropy(stats["nucleus_entropy"], peak, rollout.mask)),
        **task.metrics(responses),
        "positions": {
            name: (value.sum(0) / count).tolist()
            for name, value in {**positions, "peak": peak}.items()
        },
    }


def is_right(task: Any, ids: list[int], answer: str) -> bool:
    """The reward of a response."""
    return siren.verify(task.decode(ids), answer, task.find_answer, task.equal)


def evaluate(
    model: torch.nn.Module, task: Any, problems: list, cfg: Config, n: int, temperature: float
) -> dict[str, Any]:
    """siren.evaluate with n samples, for each k = 1, 2, 4, ... up to n: see scores_of."""
    return scores_of(task, problems, draw(model, task, problems, cfg, n, temperature))


def draw(
    model: torch.nn.Module, task: Any, problems: list, cfg: Config, n: int, temperature: float
) -> list[list[int]]:
    """n responses to each problem, one problem after the other."""
    rollout = siren.sample(model, task, problems, cfg, f"{cfg.seed}/eval", n, temperature)
    return rollout.responses()


def scores_of(task: Any, problems: list, responses: list[list[int]]) -> dict[str, Any]:
    """The scores of n responses to each problem, which are side by side.

    avg@16 is estimated with all samples; maj@k and distinct@k are means over blocks of k.
    "solved" has a 1 for each problem that any sample solves, else a 0.
    """
    normalize = task.normalize or siren.normalize
    total: Counter[str] = Counter()
    solved = ""
    n = len(responses) // len(problems)
    for i, problem in enumerate(problems):
        own = responses[i * n : (i + 1) * n]
        right = [is_right(task, ids, problem.answer) for ids in own]
        given = [siren.extract_answer(task.decode(ids), task.find_answer) for ids in own]
        answer = normalize(problem.answer)
        votes = [  # right answers vote alike; no answer is no vote
            answer if ok else text and normalize(text)
            for ok, text in zip(right, given, strict=True)
        ]
        total["avg@16"] += sum(right) / n
        solved += "01"[any(right)]
        for k in (2**power for power in range(n.bit_length())):
            blocks = [set(map(tuple, own[b : b + k])) for b in range(0, n - k + 1, k)]
            total[f"maj@{k}"] += maj_at_k(votes, answer, k)
            total[f"pass@{k}"] += pass_at_k(n, sum(right), k)
            total[f"distinct@{k}"] += sum(map(len, blocks)) / k / len(blocks)
    return {**{name: value / len(problems) for name, value in total.items()}, "solved": solved}


def thin(records: list[dict[str, float]], points: int = 30) -> list[dict[str, float]]:
    """The training's log for curves: means over `points` blocks of steps.

    >>> thin([{"step": 0}, {"step": 1, "reward": 0.0}, {"step": 2, "reward": 1.0}], 1)
    [{'step': 1.5, 'reward': 0.5}]
    """
    steps = [record for record in records if "reward" in record]
    blocks = defaultdict(list)
    for i, record in enumerate(steps):
        blocks[i * points // len(steps) if len(steps) > points else i].append(record)
    names = [name for name in ("step", *LOGGED) if steps and name in steps[0]]
    return [
        {n: sum(r[n] for r in some) / len(some) for n in names} for some in blocks.values()
    ]


def slim(value: Any) -> Any:
    """The same with floats rounded to 5 significant digits: rows are kept in the repository.

    >>> slim({"a": 1 / 3, "b": [2.0, 1]})
    {'a': 0.33333, 'b': [2.0, 1]}
    """
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.5g}"))


def examine(run: siren.Run, final: Final) -> dict[str, Any]:
    """What a row says of a trained policy: the probe and the final evaluation."""
    evals = []
    for temperature in final.temperatures:
        for grade, problems in run.task.heldout(final.prompts).items():
            parts = (run.model, run.task, problems, run.cfg, final.samples, temperature)
            evals.append({"grade": grade, "temperature": temperature, **evaluate(*parts)})
    return {"probe": probe(run.model, run.task, run.cfg, final.probe), "evals": evals}


def run_job(job: Job, look: Callable[[siren.Run, Any], dict[str, Any]] = examine) -> Row:
    """Train and evaluate; return the row. A run that diverges is a result, not a failure: then
    the policy of its last checkpoint counts. `look` says what is measured."""
    start = time.perf_counter()
    diverged = None
    with tempfile.TemporaryDirectory() as folder:
        with plugged(job.cfg.plug):
            run = siren.Run(dataclasses.replace(job.cfg, out=folder))
            try:
                siren.train(run)
            except RuntimeError as error:
                if "non-finite" not in str(error):
                    raise
                diverged = f"step {len(run.records)}: the gradient is not finite"
        saved = siren.load_checkpoint(folder)
    trained = time.perf_counter()
    run.model.load_state_dict(saved["model"], strict=False)  # tied weights are stored once
    run.cfg = job.cfg
    run.records = saved["records"]
    found = look(run, job.final)
    found |= {"log": thin(run.records), "anchor": run.records[-1].get("anchor")}
    seconds = [round(trained - start, 1), round(time.perf_counter() - trained, 1)]
    settings = {"config": dataclasses.asdict(job.cfg), "final": job.final._asdict()}
    return {**settings, "seconds": seconds, "diverged": diverged, **slim(found)}


# -------------------------------------------------------------------------------- 3. the parts
class Size(NamedTuple):
    """How much of everything: FULL is the study, SMOKE runs the same code on a tiny scale."""

    steps: int = STEPS
    test_seeds: tuple[int, ...] = tuple(range(16))
    validation_seeds: tuple[int, ...] = (100, 101, 102, 103)
    candidates: int = 6
    test: Final = Final()
    explore: Final = Final(prompts=128, samples=32, temperatures=(0.6,))
    vocabularies: tuple[int, ...] = (96, 256, VOCAB, 4096)
    world: str = WORLD
    prompts: int = 32


SMOKE_WORLD = "toy_env:split={split}"  # the shipped base model, whatever the seed
TINY = Final(prompts=4, samples=16, temperatures=(0.6,), probe=4)
SMOKE = Size(
    2, (0,), (100,), 1, TINY._replace(temperatures=(0.6, 1.0)), TINY, (256,), SMOKE_WORLD, 8
)


def each(
    size: Size, settings: Iterable[tuple[str, dict]], test: bool = False, vocab: int = VOCAB
) -> list[Job]:
    """A job for every seed and setting (label, changes in Config): on test prompts, or on
    validation prompts with fewer samples."""
    seeds = size.test_seeds if test else size.validation_seeds
    final = size.test if test else size.explore
    split = "test" if test else "validation"
    usual = {"steps": size.steps, "save_every": 50, "eval_prompts": 1, "eval_samples": 2}
    usual |= {"prompts": size.prompts, "device": "cpu", "top_p": P, "peak_quantile": TAU}
    jobs = []
    for seed, (label, changes) in itertools.product(seeds, list(settings)):
        task = size.world.format(vocab=vocab, seed=seed, split=split)
        cfg = Config(**{**usual, "task": task, "seed": seed, **changes})
        jobs.append(Job(label, cfg, final))
    return jobs


def tune(size: Size, rows: Rows) -> list[Job]:
    """The base model and each method's candidates, on the validation seeds."""
    some = {name: candidates[: size.candidates] for name, candidates in METHODS.items()}
    settings = [(name, changes) for name, candidates in some.items() for changes in candidates]
    return each(size, [("base", BASE), *settings])


def score(
    row: dict[str, Any], name: str, grade: str = "hard", temperature: float = 0.6
) -> float:
    """A score of the final evaluation."""
    at = {(e["grade"], e["temperature"]): e for e in row["evals"]}
    return at[grade, temperature][name]


def vocabulary(row: dict[str, Any]) -> int:
    """The number of tokens of a row's world."""
    return load_task(Config(task=row["config"]["task"])).vocab


def choose(size: Size, rows: Rows) -> dict[str, dict[str, Any]]:
    """Row of the main table -> its changes: the candidate with the best mean of avg@16 and
    maj@16 on hard validation prompts at T = 0.6.

    naive_exploding is the smallest coefficient with which the naive bonus explodes on every
    validation seed (the largest, if none does). dr_grpo_same_lr is Dr.GRPO at the learning
    rate of the others, which is not tuned.
    """
    chosen = {}
    exploding = []
    for method, candidates in METHODS.items():
        goodness = []
        for changes in candidates[: size.candidates]:
            found = [rows[job.key] for job in each(size, [(method, changes)])]
            goodness.append(sum(score(row, "avg@16") + score(row, "maj@16") for row in found))
            useless = min(row["probe"]["useless_share"] for row in found)
            if method == "naive_bonus" and useless > 0.3:  # it explodes on every seed
                exploding.append(changes)
        chosen[method] = candidates[goodness.index(max(goodness))]
    naive = METHODS["naive_bonus"][size.candidates - 1]
    same_lr = {**chosen["dr_grpo"], "lr": Config().lr}
    return {**chosen, "naive_exploding": [*exploding, naive][0], "dr_grpo_same_lr": same_lr}


def main_table(size: Size, rows: Rows) -> list[Job]:
    """The base model and the chosen candidates, on the test seeds."""
    return each(size, [("base", BASE), *choose(size, rows).items()], test=True)


def vocabularies(size: Size, rows: Rows) -> list[Job]:
    """Dr.GRPO, SIREN and the anchor alone, as chosen, in worlds with other vocabularies."""
    chosen = choose(size, rows)
    settings = [(name, chosen[name]) for name in ("dr_grpo", "siren", "anchor_only")]
    return [job for vocab in size.vocabularies for job in each(size, settings, vocab=vocab)]


def sensitivity(size: Size, rows: Rows) -> list[Job]:
    """SIREN as chosen, with one of p, tau and beta changed at a time."""
    values = {"top_p": (0.7, 0.8, P, 0.9, 1.0), "peak_quantile": (0.0, 0.4, TAU, 0.8, 0.9)}
    values |= {"beta": (0.02, 0.06, 0.2, 0.6, 2.0)}
    chosen = choose(size, rows)["siren"]
    settings = []
    for name, some in values.items():
        settings += [(f"siren, {name}", {**chosen, name: v}) for v in some[-size.candidates :]]
    return each(size, settings)


def scale(size: Size, rows: Rows) -> list[Job]:
    """The scale of beta, as docs/beta.md predicts it: a quarter of beta for four times the
    budget, half of it for half the peaks, should do the same."""
    half = {"peak_quantile": 1 - (1 - TAU) / 2}
    cases = {"budget 16": (1, {}), "budget 64": (1 / 4, {"max_tokens": 64})}
    cases |= {"half the peaks": (1 / 2, half)}
    settings = []
    for label, (factor, changes) in cases.items():
        for beta in (0.06, 0.2, 0.6)[-size.candidates :]:
            settings.append((label, {**knobs("anchor", P, TAU, beta * factor), **changes}))
    return each(size, settings)


def official(size: Size, rows: Rows) -> list[Job]:
    """SIREN as chosen by siren.py's rules, and by one or all of the official code's."""
    rules = ("exclusive=1", "strict=1", "per_micro_batch=1")
    chosen = choose(size, rows)["siren"]
    settings = [("siren.py's rules", chosen)]
    for label, rule in (*zip(rules, rules, strict=True), ("all three", ",".join(rules))):
        # the square per micro-batch makes a difference where there are several
        smaller = {"micro_batch_size": 8} if "micro" in rule else {}
        settings.append((label, {**chosen, **smaller, "plug": f"research.official:{rule}"}))
    return each(size, settings)


PARTS: dict[str, Callable[[Size, Rows], list[Job]]] = {
    "tune": tune,
    "main": main_table,
    "vocabularies": vocabularies,
    "sensitivity": sensitivity,
    "scale": scale,
    "official": official,
}


# ------------------------------------------------------------------------- 4. running the jobs
class Store:
    """The rows, on disk: one file per part."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "raw"
        self.rows = Rows()
        self.files: dict[str, Rows] = {}
        for path in sorted(self.folder.glob("*.jsonl.gz")):
            found = map(json.loads, gzip.decompress(path.read_bytes()).splitlines())
            self.files[path.name.partition(".")[0]] = {key_of(row): row for row in found}
        for rows in self.files.values():
            self.rows |= rows

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Keep a row; the same rows in any order make the same file."""
        row = json.loads(json.dumps(row))
        rows = self.files.setdefault(part, {})
        rows[key_of(row)] = self.rows[key_of(row)] = row
        text = "".join(json.dumps(rows[key]) + "\n" for key in sorted(rows))
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{part}.jsonl.gz"
        write_whole(path, gzip.compress(text.encode(), mtime=0))

    def missing(self, jobs: list[Job]) -> dict[str, Job]:
        """The jobs without a row, each once."""
        return {job.key: job for job in jobs if job.key not in self.rows}


def start_worker() -> None:
    """One thread, so that two workers don't fight for cores. It ends when its parent does."""

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def teach(cfg: Config) -> None:
    """Make sure that the base model of this world is stored."""
    load_task(cfg).build_model()


@contextmanager
def pool_of(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each. After an error or Ctrl-C unfinished jobs leave nothing."""
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker)
    os.environ["TQDM_DISABLE"] = (
        "1"  # the workers see it: their bars would run over each other
    )
    try:
        yield pool
    except BaseException:
        for worker in active_children():
            worker.terminate()
        raise
    finally:
        del os.environ["TQDM_DISABLE"]
        pool.shutdown(wait=True, cancel_futures=True)


def run_jobs(
    part: str,
    jobs: dict[str, Job],
    store: Store,
    pool: ProcessPoolExecutor,
    look: Callable[[siren.Run, Any], dict[str, Any]] = examine,
) -> None:
    """Teach the base models, run the jobs, store each row as soon as it is there."""
    worlds = list({load_task(job.cfg).base_file: job.cfg for job in jobs.values()}.values())
    for what, function, inputs in (
        ("worlds", teach, worlds),
        ("jobs", partial(run_job, look=look), jobs.values()),
    ):
        futures = [pool.submit(function, value) for value in inputs]
        for future in tqdm(as_completed(futures), f"{part}: {what}", len(futures)):
            if row := future.result():
                store.add(part, row)


def hours(jobs: Iterable[Job]) -> str:
    """A rough cost of jobs, with their base models."""
    jobs = list(jobs)
    worlds = {load_task(job.cfg).base_file for job in jobs}
    seconds = sum(job.seconds for job in jobs)
    seconds += BASE_SECONDS * sum(not path.exists() for path in worlds)
    return f"{len(jobs)} jobs to run: {seconds / 3600:.1f} hours on one thread"


def again(
    jobs: list[Job],
    store: Store,
    pool: ProcessPoolExecutor,
    look: Callable[[siren.Run, Any], dict[str, Any]] = examine,
) -> int:
    """Run jobs that have rows once more; return how many rows differ."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Store(Path(folder))
        run_jobs("again", {job.key: job for job in jobs}, fresh, pool, look)
    pairs = [(fresh.rows[job.key], store.rows[job.key]) for job in jobs]
    same = [{**one, "seconds": 0} == {**other, "seconds": 0} for one, other in pairs]
    print(f"{sum(same)} of {len(same)} rows are the same to the last digit")
    return len(same) - sum(same)


def check_seeds(seeds: list[int], known: tuple[int, ...]) -> None:
    """A ValueError if one of the seeds of --again is no test seed."""
    if unknown := set(seeds) - set(known):
        raise ValueError(f"--again {min(unknown)}: must be one of {known}")


# ------------------------------------------------------------------------- 5. the command line
def make_parser(description: str, parts: Iterable[str]) -> Parser:
    """The flags of a study that has these parts."""
    parser = Parser(description=description.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--part", default="all", choices=["all", *parts], help="[all]")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread [2]")
    parser.add_argument("--out", default="", help="folder [results; --smoke: a temporary one]")
    parser.add_argument(
        "--plan", action="store_true", help="print what would run and its cost"
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing: tables and figures"
    )
    again = {"type": int, "nargs": "+", "metavar": "SEED"}
    parser.add_argument("--again", **again, help="test seeds once more: the same digits?")
    parser.add_argument("--smoke", action="store_true", help="all parts, tiny")
    return parser


def read_flags(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """The values of the flags. ValueError for a number of workers that can't be."""
    args = parser.parse_args(argv)
    if not 1 <= args.workers <= 64:
        raise ValueError(f"--workers {args.workers}: must be 1 to 64; the default is 2")
    return args


def folder_of(args: argparse.Namespace, smoke: str) -> Path:
    """Where the rows and the report go: --out, or results/, or a temporary folder."""
    usual = Path(tempfile.gettempdir()) / smoke if args.smoke else ROOT / "results"
    return Path(args.out) if args.out else usual


def study(argv: list[str] | None) -> int:
    """Run what is missing of a part, or of all; then write what the rows say."""
    from research import study_report

    args = read_flags(make_parser(__doc__, PARTS), argv)
    size = SMOKE if args.smoke else Size()
    out = folder_of(args, "study-smoke")
    with locked(out), pool_of(args.workers) as pool:  # no two studies in one folder
        store = Store(out)
        if args.again:
            check_seeds(args.again, size.test_seeds)
            if store.missing(tune(size, store.rows)):
                raise ValueError("--again: not before tune is complete")
            jobs = [j for j in main_table(size, store.rows) if j.cfg.seed in args.again]
            return min(1, again(jobs, store, pool))
        for name in PARTS if args.part == "all" else [args.part]:
            if name != "tune" and store.missing(tune(size, store.rows)):
                print(f"{name}: not before tune is complete")
                continue
            missing = store.missing(PARTS[name](size, store.rows))
            print(f"{name}: {hours(missing.values())}")
            if missing and not (args.plan or args.report):
                run_jobs(name, missing, store, pool)
        if not args.plan:
            study_report.write(size, store, out)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return run_tool("study.py", study, argv)


if __name__ == "__main__":
    sys.exit(main())
