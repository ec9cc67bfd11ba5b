"""Three ways to be right on the toy, over seeds; the vocabulary; two more controls.

    python research/three_ways.py                     # run what is missing, then the report
    python research/three_ways.py --part ways --plan  # what would run, and its cost
    python research/three_ways.py --report            # run nothing: tables and figures again
    python research/three_ways.py --again 0 1         # two test seeds once more: same digits?
    python research/three_ways.py --smoke             # all of it, tiny, in a temporary folder

A response that gets the reward is right in one of three ways:

    clean      every sum in it is right, and none of them is a gap of the teacher's
    filled     every sum in it is right, and at least one of them is a gap: the policy writes
               the right sum where its teacher always erred
    cancelled  at least one sum is wrong, and the errors cancel: false reasoning is paid
    other      the form is broken, or the terms are not the prompt's (counted apart: *swapped*,
               as many other terms with right sums; *merged*, fewer terms with right sums)

clean and filled together are called sound. A sum is judged against the running sum as it was
written before it.

The main table keeps rows but no policies, so its methods are trained again: the candidates
that research/study.py chose, on the same 16 test seeds. Rows go to results/raw/ways.jsonl.gz
and so on; jobs, store and statistics are those of research/study.py. Six seeds at a time are
run: first the five methods that the questions are about (CORE), seed by seed, then the other
methods. So what there is before all is done is balanced. The report is about the seeds that
are complete in CORE, says how many of them each method has, and compares two methods on the
seeds that both have.

THE PLAN, written before any of these rows was seen. Prompts are hard ones and T = 0.6 where
nothing else is said; differences are paired by seed, with a 95 % bootstrap interval and an
exact sign-flip p after Holm's correction over the whole of the table that is named.

Table 1, do entropy regularisers fill gaps? Every regulariser minus Dr.GRPO (each at its own
chosen settings) in (a) the share of right responses that are filled and (b) p(right sum) at
gaps: teacher-forced, at contexts whose sums before are right, a mean over gaps; 7 x 2.
Table 2, does that explain the naive bonus? Naive bonus minus Dr.GRPO, and minus Dr.GRPO at
the same learning rate. avg is the sum of the shares of clean, filled, cancelled and other
responses, so its difference is the sum of the four differences. "Filling explains it" is to
be said only if the difference in filled responses is above 0 after the correction, and larger
than the one in clean responses. 2 x 3 ways x 2 temperatures.
Table 3, is SIREN still ahead if only sound, or only clean, responses count? SIREN minus each
other method in pass@16 and in avg, by sound and by clean responses, at both temperatures;
8 x 2 x 2 x 2.
Equal reward. Four methods are evaluated every 20 steps. SIREN, naive bonus and anchor only
minus Dr.GRPO in pass@16 and maj@16 at the first of these points at which the mean training
reward of the ten steps up to it is at least 0.5 (0.4 and 0.6 are shown without a test), over
the seeds on which both get there; 3 x 2. And Dr.GRPO stopped early: at the step with the best
maj@16 on the other seeds, against SIREN at its last step.
Order of the masks. `token_first` takes the quantile over the full entropy H, then averages H'
there, as an ablation of the official code does. Its beta is chosen among three on the
validation seeds. SIREN minus token_first in avg, maj and pass@16; 3.
Random reward. Dr.GRPO and SIREN trained on a coin flip in place of the verdict: what changes
without any signal is shown beside the base model, without a test.
The vocabulary (96, 1024 and 16384 tokens; 12 test seeds). Each method has three candidates
per size, on three validation seeds. First endpoint: learning speed, the first step at which
the mean reward of the last ten steps is at least 0.4 (201 where it never is), and the mean
reward of the last 20 steps; both with the entropy that is held. Trend: for each seed the slope
over log2(vocabulary) of without top-p minus SIREN, and of anchor only minus SIREN, in steps
and in reward; sign flips of the slopes, Holm over 2 x 2. Scores (avg, maj, pass@16) come
second, with the same slopes and no further claim. (Not as planned: with 1024 tokens the
candidates are the main table's, six on four validation seeds.)
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above

import torch

import siren
from research import study
from research.scores import pass_at_k
from research.tools import locked, run_tool
from toy_env import EOS, ZERO, ToyWorld

WAYS = ("clean", "filled", "cancelled", "other")
OTHER = ("swapped", "merged")  # parts of "other"
VALIDATION = (100, 101, 102)
WATCHED = ("dr_grpo", "siren", "naive_bonus", "anchor_only")  # also while they train
WATCHED_SEEDS = 12
CORE = ("base", *WATCHED)  # run first
BLOCK = 6  # seeds at a time
MANY = ("base", "dr_grpo", "siren", "naive_bonus")  # also with many samples
MANY_SEEDS = 4
VOCABULARIES = (96, 16384)  # beside the main table's 1024
PER_PAIR = 4  # contexts of a pair (running sum, next term) at most


# ------------------------------------------------------------------ 1. the ways to be right
class Reading(NamedTuple):
    """What a response does."""

    in_form: bool  # a first term, then "term sum" pairs, then the end; the prompt's terms
    terms: int  # how many there are in that form, whichever they are; 0 if it is broken
    gaps_met: int  # sums at which the teacher has a gap
    gaps_right: int  # of these, those that are right here
    wrong: int  # wrong sums


def read(world: ToyWorld, prompt: list[int], ids: list[int]) -> Reading:
    """Judge each sum of a response against the running sum that was written before it.

    >>> world = ToyWorld()  # (8, 5) is a gap of this world
    >>> ids = [number + ZERO for number in (8, 5, 13, 1, 14)] + [EOS]
    >>> read(world, world.problem([1, 5, 8]).prompt, ids)
    Reading(in_form=True, terms=3, gaps_met=1, gaps_right=1, wrong=0)
    """
    numbers = [token - ZERO for token in ids[:-1]]
    ended = ids[-1] == EOS and len(numbers) % 2 == 1 and min(numbers) >= 0
    if not ended:
        return Reading(False, 0, 0, 0, 0)
    total = numbers[0]
    terms = [total]
    count: Counter[str] = Counter()
    for term, written in zip(numbers[1::2], numbers[2::2], strict=True):
        is_right = written == total + term
        if (total, term) in world.gaps:
            count["met"] += 1
            count["filled"] += is_right
        count["wrong"] += not is_right
        terms.append(term)
        total = written
    in_form = sorted(terms) == sorted(token - ZERO for token in prompt[:-1])
    return Reading(in_form, len(terms), count["met"], count["filled"], count["wrong"])


def way(world: ToyWorld, prompt: list[int], ids: list[int]) -> str:
    """In which of WAYS a response is right, of which it is known that it gets the reward.

    >>> world = ToyWorld()
    >>> prompt = world.problem([1, 5, 8]).prompt
    >>> for numbers in (5, 8, 13, 1, 14), (8, 5, 13, 1, 14), (5, 8, 12, 1, 14), (14,):
    ...     way(world, prompt, [number + ZERO for number in numbers] + [EOS])
    'clean'
    'filled'
    'cancelled'
    'other'
    """
    reading = read(world, prompt, ids)
    if not reading.in_form:
        return "other"
    if reading.wrong:
        return "cancelled"
    return "filled" if reading.gaps_right else "clean"


def ways_of(world: ToyWorld, problems: list, responses: list[list[int]]) -> dict[str, float]:
    """Shares of all responses by way; pass@k by sound and by clean responses; how often a gap
    is met, and how often the sum is right there."""
    n = len(responses) // len(problems)
    total: Counter[str] = Counter()
    for i, problem in enumerate(problems):
        own = responses[i * n : (i + 1) * n]
        found: Counter[str] = Counter()
        for ids in own:
            reading = read(world, problem.prompt, ids)
            total["gaps_met"] += reading.gaps_met / len(responses)
            total["gaps_filled"] += reading.gaps_right / len(responses)
            if study.is_right(world, ids, problem.answer):
                found[way(world, problem.prompt, ids)] += 1
                if not reading.in_form and reading.terms and not reading.wrong:
                    fewer = reading.terms < len(problem.prompt) - 1
                    found["merged" if fewer else "swapped"] += 1
        for name in (*WAYS, *OTHER):
            total[name] += found[name] / len(responses)
        counts = {"clean": found["clean"], "sound": found["clean"] + found["filled"]}
        for kind, right in counts.items():
            for k in (2**power for power in range(n.bit_length())):
                total[f"{kind}/pass@{k}"] += pass_at_k(n, right, k) / len(problems)
    return dict(total)


# --------------------------------------------------------------------------- 2. at the gaps
class Context(NamedTuple):
    """A place in a response where a sum is due; the sums before it are right and no gaps."""

    prompt: list[int]  # token ids
    before: list[int]  # the response up to the term
    pair: tuple[int, int]  # (running sum, next term)


def contexts(world: ToyWorld, most: int = PER_PAIR) -> list[Context]:
    """Contexts of all pairs that occur in the world's held-out prompts: `most` a pair.

    Held-out prompts are walked through in random orders, up to the first gap.
    """
    rng = random.Random(f"contexts {world.seed}")
    found: dict[tuple[int, int], list[Context]] = defaultdict(list)
    for terms in world.multisets[world.split] * 8:
        prompt = world.problem(rng.sample(terms, len(terms))).prompt
        total, *others = rng.sample(terms, len(terms))
        before = [total + ZERO]
        for term in others:
            pair = (total, term)
            before = [*before, term + ZERO]
            if len(found[pair]) < most:
                found[pair].append(Context(prompt, before, pair))
            if pair in world.gaps:
                break
            total += term
            before = [*before, total + ZERO]
    return [context for pair in sorted(found) for context in found[pair]]


def after(some: list[Context], last: list[int]) -> siren.Rollout:
    """A Rollout in which each context is followed by a token."""
    width = max(len(context.before) for context in some) + 1
    rows = [[*context.before, token] for context, token in zip(some, last, strict=True)]
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows]).bool()
    prompt = torch.tensor([context.prompt for context in some])
    return siren.Rollout(
        prompt, torch.ones_like(prompt).bool(), tokens, mask, torch.zeros(tokens.shape)
    )


@torch.no_grad()
def at_sums(
    model: torch.nn.Module, world: ToyWorld, some: list[Context], cfg: siren.Config
) -> dict[str, Any]:
    """p(right sum), p(the teacher's wrong sum), H and H' at contexts: means over a pair's
    contexts, then over the pairs. "each" has p(right sum) of every pair, in their order."""
    right = [sum(context.pair) + ZERO for context in some]
    wrong = [world.gaps.get(context.pair, 0) + ZERO for context in some]
    rollout = after(some, right)
    end = rollout.mask.sum(1, keepdim=True) - 1  # where the sum is
    stats = siren.score(model, rollout, cfg)
    other = siren.score(model, after(some, wrong), cfg)["logp"]
    values = {"p_right": stats["logp"].exp(), "p_wrong": other.exp()}
    values |= {"entropy": stats["entropy"], "nucleus_entropy": stats["nucleus_entropy"]}
    pairs: dict[str, dict[tuple[int, int], list[float]]] = {}
    for name, value in values.items():
        pairs[name] = defaultdict(list)
        for context, number in zip(some, value.gather(1, end)[:, 0].tolist(), strict=True):
            pairs[name][context.pair].append(number)
    means = {name: [sum(x) / len(x) for x in own.values()] for name, own in pairs.items()}
    found: dict[str, Any] = {name: sum(x) / len(x) for name, x in means.items()}
    found["filled_share"] = sum(p > 0.5 for p in means["p_right"]) / len(means["p_right"])
    return {**found, "each": [round(p, 3) for p in means["p_right"]]}


def gaps_and_facts(
    model: torch.nn.Module, world: ToyWorld, cfg: siren.Config, most: int = PER_PAIR
) -> dict[str, dict[str, Any]]:
    """at_sums at the gaps, and at all other sums for comparison ("facts")."""
    every = contexts(world, most)
    cfg = dataclasses.replace(cfg, top_p=study.P)
    gaps = [context for context in every if context.pair in world.gaps]
    facts = [context for context in every if context.pair not in world.gaps]
    found = {"gaps": at_sums(model, world, gaps, cfg)}
    found["facts"] = at_sums(model, world, facts, cfg)
    del found["facts"]["each"], found["facts"]["p_wrong"]  # facts have no wrong sum
    return found


# --------------------------------------------------------------------- 3. what is plugged in
def watch_gaps() -> None:
    """siren.evaluate also looks at the gaps: p_right and H there, as they are then."""
    evaluate = siren.evaluate

    def watched(model: Any, task: ToyWorld, problems: list, cfg: siren.Config) -> dict:
        values = evaluate(model, task, problems, cfg)
        some = [x for x in contexts(task, 1) if x.pair in task.gaps]
        gaps = at_sums(model, task, some, dataclasses.replace(cfg, top_p=study.P))
        names = ("p_right", "entropy", "filled_share")
        return values | {f"gaps_{name}": gaps[name] for name in names}

    siren.evaluate = watched


def flip_coins() -> None:
    """The advantages are those of coin flips, whatever the verdicts; what is reported as the
    reward is still the share of right responses."""
    training_step = siren.training_step
    advantages = siren.group_advantages

    def step_of_chance(run: siren.Run, step: int) -> dict[str, float]:
        rng = random.Random(f"{run.cfg.seed}/{step}/coins")

        def of_coins(rewards: torch.Tensor, *how: Any) -> torch.Tensor:
            coins = [float(rng.random() < 0.5) for _ in rewards]
            return advantages(torch.tensor(coins, device=rewards.device), *how)

        siren.group_advantages = of_coins
        return training_step(run, step)

    siren.training_step = step_of_chance


def quantile_of_full_entropy() -> None:
    """The peaks are those of H over the whole vocabulary; H' is averaged there."""
    score = siren.score
    peak_mask = siren.peak_mask
    scored: deque[dict[str, torch.Tensor]] = deque(maxlen=4)

    def remembered(*what: Any) -> dict[str, torch.Tensor]:
        stats = score(*what)
        scored.append(stats)
        return stats

    def of_full(entropy: torch.Tensor, mask: torch.Tensor, quantile: float) -> torch.Tensor:
        [stats] = [stats for stats in scored if stats["nucleus_entropy"] is entropy]
        return peak_mask(stats["entropy"], mask, quantile)

    siren.score = remembered
    siren.peak_mask = of_full


PLUGS = {"watch": watch_gaps, "coins": flip_coins, "token_first": quantile_of_full_entropy}


def plug(rule: str) -> None:
    """For --plug research.three_ways:rule=watch, coins or token_first."""
    siren.require(rule in PLUGS, f"rule={rule}: must be one of {', '.join(PLUGS)}")
    PLUGS[rule]()


def with_rule(changes: dict[str, Any], rule: str) -> dict[str, Any]:
    """The changes of a method, with one of PLUGS as well.

    >>> with_rule({"plug": "research.zoo:method=par"}, "watch")["plug"]
    'research.zoo:method=par,research.three_ways:rule=watch'
    """
    plugs = [changes.get("plug", ""), f"research.three_ways:rule={rule}"]
    return {**changes, "plug": ",".join(filter(None, plugs))}


# ------------------------------------------------------------------------------ 4. the jobs
class Ways(NamedTuple):
    """How a policy is looked at: study.Final, and `many` samples of fewer hard prompts."""

    prompts: int = 256
    samples: int = 64
    temperatures: tuple[float, ...] = (0.6, 1.0)
    probe: int = study.PROBE
    many: int = 0
    many_prompts: int = 128
    ways: int = 1  # the version of these measurements


class Size(NamedTuple):
    """How much: study.Size for this study's rows, and for the candidates that are chosen."""

    main: study.Size = study.Size()
    ours: study.Size = study.Size(test=Ways())
    few: study.Size = study.Size(
        test_seeds=tuple(range(12)),
        validation_seeds=VALIDATION,
        test=Ways(),
        explore=Ways(128, 32, (0.6,)),
    )
    many: int = 256
    watched: tuple[tuple[str, int], ...] = (
        ("eval_every", 20),
        ("eval_prompts", 96),
        ("eval_samples", 16),
    )


TINY = Ways(4, 16, (0.6, 1.0), 4, many_prompts=2)
SMOKE = Size(
    study.SMOKE,
    study.SMOKE._replace(test=TINY),
    study.SMOKE._replace(test=TINY, explore=TINY),
    32,
    (("eval_every", 1), ("eval_prompts", 2), ("eval_samples", 2)),
)


def look(run: siren.Run, final: Ways) -> dict[str, Any]:
    """What a row says: study.examine with the ways, the gaps, and the course of training."""
    world = run.task
    evals = []
    for temperature in final.temperatures:
        for grade, problems in world.heldout(final.prompts).items():
            how = (problems, run.cfg, final.samples, temperature)
            responses = study.draw(run.model, world, *how)
            found = study.scores_of(world, problems, responses)
            found |= ways_of(world, problems, responses)
            evals.append({"grade": grade, "temperature": temperature, **found})
    probe = study.probe(run.model, world, run.cfg, final.probe)
    found = {"probe": probe, "evals": evals}
    found |= gaps_and_facts(run.model, world, run.cfg)
    if final.many:
        found["many"] = many_samples(run, final)
    steps = [record for record in run.records if "reward" in record]
    found["rewards"] = [record["reward"] for record in steps]
    found["entropies"] = [record["entropy"] for record in steps]
    if run.cfg.eval_every:
        names = [name for name in run.records[0] if "/" in name]
        points = [record for record in run.records if names[0] in record]
        found["course"] = [{name: x[name] for name in ("step", *names)} for x in points]
    return found


def many_samples(run: siren.Run, final: Ways) -> list[dict[str, Any]]:
    """pass@k and maj@k of hard prompts with many samples, also by sound and clean ones."""
    problems = run.task.heldout(final.many_prompts)["hard"]
    found = []
    for temperature in final.temperatures:
        how = (problems, run.cfg, final.many, temperature)
        responses = study.draw(run.model, run.task, *how)
        scores = study.scores_of(run.task, problems, responses)
        scores |= ways_of(run.task, problems, responses)
        found.append({"temperature": temperature, **scores})
    return found


def ways(size: Size, rows: study.Rows) -> list[study.Job]:
    """The main table's methods, and two of them trained on coin flips."""
    chosen = {"base": study.BASE, **study.choose(size.main, rows)}
    for name in ("dr_grpo", "siren"):
        chosen[f"{name}_coins"] = with_rule(chosen[name], "coins")
    jobs = []
    for job in study.each(size.ours, chosen.items(), test=True):
        cfg = job.cfg
        final = job.final
        if job.label.endswith("_coins") and cfg.seed >= WATCHED_SEEDS:
            continue
        if job.label in WATCHED and cfg.seed < WATCHED_SEEDS:
            changes = with_rule({"plug": cfg.plug}, "watch") | dict(size.watched)
            cfg = dataclasses.replace(cfg, **changes)
        if job.label in MANY and cfg.seed < MANY_SEEDS:
            final = final._replace(many=size.many)
        jobs.append(study.Job(job.label, cfg, final))
    return jobs


def token_first_candidates() -> list[dict[str, Any]]:
    """The order of that ablation of the official code, with SIREN's three betas."""
    betas = (0.06, 0.2, 0.6)
    usual = [study.knobs("anchor", study.P, study.TAU, beta) for beta in betas]
    return [with_rule(changes, "token_first") for changes in usual]


def token_candidates(size: Size, rows: study.Rows) -> dict[str, list[dict[str, Any]]]:
    """Three candidates a method: the main table's, and a coefficient 3 times larger and
    smaller (a learning rate 1.5 times)."""
    chosen = study.choose(size.main, rows)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ("siren", "wo_top_p", "anchor_only", "dr_grpo"):
        knob, factor = ("lr", 1.5) if name == "dr_grpo" else ("beta", 3)
        value = chosen[name][knob]
        values = (value, value / factor, value * factor)
        found[name] = [{**chosen[name], knob: float(f"{x:.3g}")} for x in values]
    return found


def best(
    few: study.Size, rows: study.Rows, candidates: dict[str, list[dict]], vocab: int
) -> dict[str, dict[str, Any]]:
    """Method -> the candidate with the best avg@16 + maj@16 on hard validation prompts."""
    chosen = {}
    for name, some in candidates.items():
        goodness = []
        for changes in some[: few.candidates]:
            found = [rows[job.key] for job in study.each(few, [(name, changes)], vocab=vocab)]
            scores = [study.score(r, x) for r in found for x in ("avg@16", "maj@16")]
            goodness.append(sum(scores))
        chosen[name] = some[goodness.index(max(goodness))]
    return chosen


class Part(NamedTuple):
    """Some jobs: candidates on validation seeds first, if any, then the chosen ones."""

    candidates: Callable[[Size, study.Rows], dict[str, list[dict]]] | None
    vocab: int = study.VOCAB

    def few(self, size: Size) -> study.Size:
        """How much: size.few. A vocabulary above the usual one is asked at T = 0.6 alone."""
        test = size.few.test
        if self.vocab > study.VOCAB:
            test = test._replace(temperatures=test.temperatures[:1])
        return size.few._replace(test=test)

    def tune(self, size: Size, rows: study.Rows) -> list[study.Job]:
        """The jobs of the candidates."""
        if self.candidates is None:
            return []
        found = self.candidates(size, rows).items()
        settings = [(name, x) for name, some in found for x in some[: size.few.candidates]]
        return study.each(size.few, settings, vocab=self.vocab)

    def test(self, size: Size, rows: study.Rows) -> list[study.Job]:
        """The jobs on test seeds, when those of `tune` have their rows."""
        if self.candidates is None:
            return ways(size, rows)
        chosen = best(size.few, rows, self.candidates(size, rows), self.vocab)
        base = [("base", study.BASE)] if self.vocab != study.VOCAB else []
        settings = [*base, *chosen.items()]
        return study.each(self.few(size), settings, test=True, vocab=self.vocab)


PARTS = {
    "ways": Part(None),
    "token_first": Part(lambda size, rows: {"token_first": token_first_candidates()}),
    **{f"tokens_{vocab}": Part(token_candidates, vocab) for vocab in VOCABULARIES},
}


# ------------------------------------------------------------------------- 5. the command line
def in_blocks(jobs: list[study.Job]) -> list[list[study.Job]]:
    """The jobs, two seeds at a time: the base models of two seeds are taught side by side. In
    a block of six seeds the methods of CORE come first."""
    seeds = sorted({job.cfg.seed for job in jobs})
    found = []
    for i in range(0, len(seeds), BLOCK):
        block = seeds[i : i + BLOCK]
        for is_core in (True, False):
            own = [job for job in jobs if (job.label in CORE) == is_core]
            for j in range(0, len(block), 2):
                found.append([job for job in own if job.cfg.seed in block[j : j + 2]])
    return [some for some in found if some]


def run_part(
    name: str, size: Size, store: study.Store, pool: ProcessPoolExecutor, plan: bool
) -> None:
    """Run what is missing of a part, block by block; with plan, only say what it is."""
    part = PARTS[name]
    for stage, jobs_of in (("candidates", part.tune), ("test seeds", part.test)):
        jobs = jobs_of(size, store.rows)
        missing = list(store.missing(jobs).values())
        more = " and 5 times as much with 16384 tokens" if part.vocab > study.VOCAB else ""
        print(f"{name}, {stage}: {study.hours(missing)}{more}", flush=True)
        for some in [] if plan else in_blocks(missing):
            study.run_jobs(name, {job.key: job for job in some}, store, pool, look)
        if store.missing(jobs):
            return


def command(argv: list[str] | None) -> int:
    """Run what is missing of a part, or of all; then write what the rows say."""
    from research import three_ways_report  # here, since it imports this file

    args = study.read_flags(study.make_parser(__doc__, PARTS), argv)
    size = SMOKE if args.smoke else Size()
    out = study.folder_of(args, "three-ways-smoke")
    with locked(out), study.pool_of(args.workers) as pool:  # no two studies in one folder
        store = study.Store(out)
        tune = study.tune(size.main, store.rows)
        if missing := store.missing(tune):
            siren.require(args.smoke, "first run: python research/study.py --part tune")
            study.run_jobs("tune", missing, store, pool)
        if args.again:
            study.check_seeds(args.again, size.ours.test_seeds)
            jobs = [j for j in ways(size, store.rows) if j.cfg.seed in args.again]
            siren.require(not store.missing(jobs), "--again: not all of these have rows yet")
            return min(1, study.again(jobs, store, pool, look))
        for name in PARTS if args.part == "all" else [args.part]:
            if not args.report:
                run_part(name, size, store, pool, args.plan)
        if not args.plan:
            three_ways_report.write(size, store, out)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return run_tool("three_ways.py", command, argv)


if __name__ == "__main__":
    sys.exit(main())
