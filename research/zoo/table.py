"""The zoo's table: every method in the study's world, tuned alike, on the same test seeds.

    python research/zoo.py --table           # run what is missing, then write everything
    python research/zoo.py --table --plan    # what would run, and its cost
    python research/zoo.py --table --report  # run nothing: write docs/zoo.md, csv and figure

Jobs, rows and statistics are those of research/study.py, so both share jobs. A method's main
coefficient has four candidates; the one with the best avg@16 + maj@16 on hard validation
prompts goes to the test seeds. Rows are in results/raw/zoo.jsonl.gz, each written when its job
is done. At the end the cost of a step is timed: results/zoo_cost.csv (delete it to time
again).
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import siren
from research import study, study_report
from research.figures import ticks
from research.plugs import plugged
from research.tools import Parser, locked
from research.zoo.methods import METHODS, VARIANTS
from research.zoo.support import support

EVERY = {**METHODS, **VARIANTS}
SIZE = study.Size(test_seeds=tuple(range(12)), validation_seeds=(100, 101, 102))
PAGE = study.ROOT / "docs" / "zoo.md"
PLACE = re.compile(r"(<!-- results: begin -->\n).*(<!-- results: end -->)", re.DOTALL)
SHORT = re.compile(
    r"(<!-- short table: begin -->\n)(.*)(<!-- short table: end -->)", re.DOTALL
)
REFERENCES = ("dr_grpo", "siren")
FAMILY = ("siren", "wo_top_p", "wo_peak", "wo_anchor", "anchor_only")
SUPPORT = ("SRR", "NDR", "NSCR")
REWARD = 0.6  # at which the entropies of fast and slow learners are compared
SCORED = ("maj@16", "pass@16", "avg@16")
PLACES = {"forks": "fork", "sums": "sum", "forced tokens": "forced"}  # study_report.kinds
COSTS = "zoo_cost.csv"
ROUNDS, TIMED_STEPS = 5, 6  # of the cost
Row = dict[str, Any]


# ------------------------------------------------------------------------------------ the jobs
def changes(name: str, value: float | None) -> dict[str, Any]:
    """The method's settings with this value of its main coefficient, as in the study."""
    from research.zoo import settings

    chosen = settings(name, **({} if value is None else {EVERY[name].coefficient: value}))
    return {"beta": 0.0, **chosen} if chosen.get("regularizer") == "none" else chosen


def candidates(name: str) -> list[dict[str, Any]]:
    """The method's settings with each candidate; one alone if it has nothing to tune."""
    return [changes(name, value) for value in EVERY[name].candidates or (None,)]


def tune(size: study.Size) -> list[study.Job]:
    """Every candidate of every method, on the validation seeds."""
    return study.each(size, [(name, change) for name in EVERY for change in candidates(name)])


def goodness(size: study.Size, store: study.Store, name: str) -> list[float]:
    """avg@16 + maj@16 of each candidate on hard validation prompts at T = 0.6, mean over
    seeds; -inf if a row is missing."""
    found = []
    for change in candidates(name):
        rows = [store.rows.get(job.key) for job in study.each(size, [(name, change)])]
        scores = (study.score(row, s) for row in rows if row for s in ("avg@16", "maj@16"))
        found.append(float("-inf") if None in rows else sum(scores) / len(rows))
    return found


def choose(size: study.Size, store: study.Store) -> dict[str, dict[str, Any]]:
    """Method -> its best candidate; the first, if none is complete."""
    found = {name: goodness(size, store, name) for name in EVERY}
    return {name: candidates(name)[x.index(max(x))] for name, x in found.items()}


def final(size: study.Size, chosen: dict[str, dict[str, Any]]) -> list[study.Job]:
    """The base model and every method as chosen, on the test seeds."""
    return study.each(size, [("base", study.BASE), *chosen.items()], test=True)


def step_seconds(job: study.Job) -> float:
    """Seconds of a training step from the base model on, on one thread: the median of five."""
    with tempfile.TemporaryDirectory() as folder, plugged(job.cfg.plug):
        changed = {"out": folder, "steps": TIMED_STEPS, "threads": 1}
        records = siren.train(siren.Run(dataclasses.replace(job.cfg, **changed)))
    return float(np.median([record["seconds"] for record in records[2:]]))  # step 1 warms up


def time_steps(jobs: list[study.Job], path: Path) -> None:
    """Write the costs: the seconds of a step of each job, the jobs in turn in each round."""
    lines = [(job.label, i, step_seconds(job)) for i in range(ROUNDS) for job in jobs]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("method", "round", "seconds"))
        writer.writerows((name, i, f"{seconds:.4f}") for name, i, seconds in lines)


# ---------------------------------------------------------------------------------- the report
def evaluation(row: Row, grade: str = "hard", temperature: float = 0.6) -> Row:
    """One of the row's evaluations."""
    at = {(e["grade"], e["temperature"]): e for e in row["evals"]}
    return at[grade, temperature]


def what(name: str, change: dict[str, Any]) -> str:
    """The chosen value of a method's coefficient, with a mark at the end of its grid."""
    method = EVERY[name]
    if not method.coefficient:
        return "-"
    i = candidates(name).index(change)
    edge = "" if 0 < i < len(method.candidates) - 1 else " (end of the grid)"
    return f"{method.coefficient} {method.candidates[i]}{edge}"


def kept(rows: list[Row], base: dict[int, Row]) -> list[float]:
    """H of the policy / H of the base model, for each seed."""
    seeds = study_report.by_seed(rows).items()
    return [row["probe"]["entropy"] / base[seed]["probe"]["entropy"] for seed, row in seeds]


def kept_at_forks(rows: list[Row], base: dict[int, Row]) -> list[float]:
    """The same at forks alone."""
    at = {s: study_report.kinds(row)["fork"]["entropy"] for s, row in base.items()}
    seeds = study_report.by_seed(rows).items()
    return [study_report.kinds(row)["fork"]["entropy"] / at[seed] for seed, row in seeds]


def with_support(rows: list[Row], base: dict[int, Row]) -> list[Row]:
    """The rows, with the support metrics against the base model in each evaluation."""
    found = []
    for seed, row in study_report.by_seed(rows).items():
        evals = []
        for own, other in zip(row["evals"], base[seed]["evals"], strict=True):
            before, after = ([mark == "1" for mark in e["solved"]] for e in (other, own))
            evals.append({**own, **support(before, after)})
        found.append({**row, "evals": evals})
    return found


def places(rows: list[Row], what: str = "entropy") -> list[float]:
    """The mean of H (or of "nucleus_entropy", H') at forks, sums and forced tokens."""
    found = [study_report.kinds(row) for row in rows]
    return [float(np.mean([one[kind][what] for one in found])) for kind in PLACES.values()]


def at_reward(rows: list[Row], reward: float) -> float:
    """Mean H in training when a run first had this reward, of the runs that had it; in a row's
    log a number is the mean of six or seven steps."""
    nan = float("nan")
    firsts = [
        next((e["entropy"] for e in row["log"] if e["reward"] >= reward), nan) for row in rows
    ]
    return nan if np.isnan(firsts).all() else float(np.nanmean(firsts))


def training_cells(rows: list[Row], base: dict[int, Row]) -> list[str]:
    """What a row's log says: how far and how fast, and how high H has been."""
    end = np.mean([entry["reward"] for row in rows for entry in row["log"][-3:]])
    middle = np.mean([row["log"][len(row["log"]) // 4]["entropy"] for row in rows])
    largest = [
        max(entry["entropy"] for entry in row["log"]) / base[seed]["probe"]["entropy"]
        for seed, row in study_report.by_seed(rows).items()
    ]
    cells = [f"{x:.2f}" for x in (end, middle, at_reward(rows, REWARD))]
    return [*cells, f"{min(largest):.1f}, {max(largest):.1f}"]


def policy_cells(rows: list[Row], base: dict[int, Row], costs: list[float]) -> list[str]:
    """Entropy kept and where, useless tokens, support metrics and the cost of a method."""
    useless = [row["probe"]["useless_share"] for row in rows]
    cells = [study_report.text(kept(rows, base)), *(f"{h:.2f}" for h in places(rows))]
    cells.append(study_report.text(useless))
    evals = [evaluation(row) for row in rows]  # NDR is 0 / 0 for a policy that solves nothing
    cells += [f"{np.nanmean([e[name] for e in evals]):.3f}" for name in SUPPORT]
    return [*cells, "{:.2f} [{:.2f}, {:.2f}]".format(*study_report.bootstrap(costs))]


def relative_costs(path: Path) -> dict[str, list[float]]:
    """Method -> the seconds of its step / those of Dr.GRPO's step in the same round."""
    seconds: dict[str, list[float]] = {}
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            seconds.setdefault(line["method"], []).append(float(line["seconds"]))
    return {name: list(np.divide(x, seconds["dr_grpo"])) for name, x in seconds.items()}


def compared(scores: dict[str, dict[int, float]]) -> tuple[dict, dict]:
    """Method -> seed -> score. Returns the differences of every method and each reference,
    (method, reference) -> one for each seed, and their p-values after Holm's correction."""
    found = {
        (name, other): [scores[name][s] - scores[other][s] for s in scores[other]]
        for name in METHODS
        for other in REFERENCES
        if name not in (other, "dr_grpo")  # Dr.GRPO against SIREN is SIREN against Dr.GRPO
    }
    p = study_report.holm({key: study_report.sign_flip(x) for key, x in found.items()})
    return found, p


def differences(rows: dict[str, list[Row]], score: str) -> list[str]:
    """Every method against each reference on hard prompts at T = 0.6, paired by seed."""
    scores = {
        name: {s: evaluation(r)[score] for s, r in study_report.by_seed(some).items()}
        for name, some in rows.items()
    }
    found, p = compared(scores)
    lines = []
    for name in METHODS:
        cells = []
        for other in REFERENCES:
            if (key := (name, other)) in found:
                cells += [study_report.text(found[key], "+"), f"{p[key]:.3f}"]
            else:
                cells += ["", ""]
        if any(cells):
            lines.append([f"`{name}`", *cells])
    head = [
        cell for other in REFERENCES for cell in (f"minus {METHODS[other].title}", "p, Holm")
    ]
    return study_report.markdown([score, *head], lines)


def ranks(values: list[float]) -> np.ndarray:
    """0 for the smallest, and so on; equal values share the mean of their ranks.

    >>> ranks([0.3, 0.1, 0.3]).tolist()
    [1.5, 0.0, 1.5]
    """
    x = np.array(values)
    return ((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1) - 1) / 2


def groups(rows: dict[str, list[Row]], base: dict[int, Row]) -> dict[str, list[str]]:
    """Methods over which a correlation is taken."""
    family = {"siren", "wo_top_p", "wo_peak", "wo_anchor", "anchor_only"}
    others = [name for name in METHODS if name != "adaptive_bonus"]
    held = {name: np.mean(kept(rows[name], base)) for name in others}
    most = sorted(others, key=held.get)[-10:]
    return {
        "all methods": list(METHODS),
        "without `adaptive_bonus`, which explodes on some seeds": others,
        "of the 24, without SIREN and its parts": [x for x in others if x not in family],
        "of the 24, the ten with the largest H / base": most,
        "of the 24, all but these ten": [x for x in others if x not in most],
    }


def correlations(rows: dict[str, list[Row]], base: dict[int, Row]) -> list[str]:
    """Spearman's rank correlation over methods: a mean entropy with a mean score."""
    lines = []
    for title, names in groups(rows, base).items():
        some = [rows[name] for name in names]
        amounts = [[np.mean(kept(own, base)) for own in some]]
        amounts += [
            [places(own, x)[0] for own in some] for x in ("entropy", "nucleus_entropy")
        ]
        scores = [[np.mean([evaluation(r)[s] for r in own]) for own in some] for s in SCORED]
        pairs = itertools.product(amounts, scores)
        found = [np.corrcoef(ranks(x), ranks(y))[0, 1] for x, y in pairs]
        lines.append([f"{title} ({len(some)})", *(f"{value:+.2f}" for value in found)])
    pairs = itertools.product(("H / base", "H at forks", "H' at forks"), SCORED)
    return study_report.markdown(["", *(" with ".join(pair) for pair in pairs)], lines)


def candidates_table(size: study.Size, store: study.Store) -> list[str]:
    """What every candidate scored on the validation seeds, and its H there."""
    lines = []
    for name, method in EVERY.items():
        cells = []
        for i, x in enumerate(goodness(size, store, name)):
            some = study.each(size, [(name, candidates(name)[i])])
            h = np.mean([store.rows[job.key]["probe"]["entropy"] for job in some])
            value = f"{method.candidates[i]}: " if method.coefficient else ""
            cells.append(f"{value}{x:.2f} ({h:.2f})")
        lines.append([f"`{name}`", method.coefficient, *cells, *[""] * (4 - len(cells))])
    return study_report.markdown(
        ["", "tuned", "smallest", "second", "third", "largest"], lines
    )


def page(
    size: study.Size,
    rows: dict[str, list[Row]],
    chosen: dict[str, dict],
    costs: dict[str, list],
) -> list[str]:
    """What goes between the marks of docs/zoo.md, but for the candidates."""
    base = study_report.by_seed(rows["base"])
    seeds = len(size.test_seeds)
    lines = [f"Mean over {seeds} test seeds and its 95 % interval; hard held-out prompts."]
    lines += [f"In this world SIREN has p = {study.P} and tau = {study.TAU}.", ""]
    for names, title in (
        (METHODS, "All methods"),
        (VARIANTS, "As the SIREN repository runs them"),
    ):
        lines += [f"### {title}", ""]
        for temperature in size.test.temperatures:
            cells = [["base model", "", *score_cells(rows["base"], temperature)]]
            for name in names:
                own = score_cells(rows[name], temperature)
                cells.append([f"`{name}`", what(name, chosen[name]), *own])
            head = [f"T = {temperature}", "chosen", *study_report.SCORES]
            lines += study_report.markdown(head, cells)
        cells = [[f"`{name}`", *policy_cells(rows[name], base, costs[name])] for name in names]
        head = ["", "H / base", *(f"H at {place}" for place in PLACES), "useless tokens"]
        head += [*SUPPORT, "seconds / Dr.GRPO's"]
        lines += study_report.markdown(head, cells)
    lines += ["### While it trains", ""]
    cells = [[f"`{name}`", *training_cells(rows[name], base)] for name in EVERY]
    head = ["", "reward, last 20 steps", "H after 50 steps", f"H at reward {REWARD:g}"]
    lines += study_report.markdown(
        [*head, "largest H / base: smallest and largest seed"], cells
    )
    lines += ["### What goes with a score", ""]
    lines += ["Spearman's rank correlation; each method is one point, its means over seeds."]
    lines += [""]
    lines += correlations(rows, base)
    lines += ["### Differences, seed by seed", ""]
    lines += [
        "T = 0.6; p: an exact sign-flip test, with Holm's correction over a whole table."
    ]
    lines += [""]
    for score in SCORED:
        lines += differences(rows, score)
    return lines


def score_cells(rows: list[Row], temperature: float) -> list[str]:
    """The scores of a method on hard prompts."""
    found = [evaluation(row, temperature=temperature) for row in rows]
    return [study_report.text(e[score] for e in found) for score in study_report.SCORES]


def short_table(path: Path, old: str) -> str:
    """The first table of docs/zoo.md, the best pass@16 first, with the numbers of zoo.csv and
    the sentence that each method has in `old`, the table as it is. Bold: above Dr.GRPO's, and
    the difference stands after Holm's correction."""
    lines = study_report.read_csv(path)
    hard = {name: lines[name, "hard", "0.6"] for name in ("base", *METHODS)}
    names = {"base model": "base"} | {f"`{name}`": name for name in METHODS}
    head, _, *rows = [line.strip("| ").split(" | ") for line in old.strip().splitlines()]
    sentences = {names[row[0]]: row[-1] for row in rows}
    shown = {name: title for title, name in names.items()}
    cells = {name: [shown[name]] for name in hard}
    for score in ("pass@16", "maj@16", "avg@16"):
        found, p = compared(
            {name: {s: x[score] for s, x in hard[name].items()} for name in hard}
        )
        for name, seeds in hard.items():
            value = f"{np.mean([x[score] for x in seeds.values()]):.2f}".removeprefix("0")
            key = (name, "dr_grpo")
            stands = key in p and p[key] < 0.05 and np.mean(found[key]) > 0
            cells[name].append(f"**{value}**" if stands else value)
    for name, seeds in hard.items():
        left = [x["entropy"] / hard["base"][seed]["entropy"] for seed, x in seeds.items()]
        cells[name] += [f"{np.mean(left):.2f}".removeprefix("0"), sentences[name]]
    order = sorted(
        hard, key=lambda name: -np.mean([x["pass@16"] for x in hard[name].values()])
    )
    return "\n".join(study_report.markdown(head, [cells[name] for name in order])[:-1]) + "\n"


def figure(rows: dict[str, list[Row]]) -> Any:
    """A row for each method, the best pass@16 on top: scores, and the entropy that is left.
    Dashed: Dr.GRPO's mean; dotted: the base model's, whose maj@16 is outside the picture."""
    base = study_report.by_seed(rows["base"])
    values = {
        "pass@16": lambda some: [evaluation(row)["pass@16"] for row in some],
        "H at forks / base": lambda some: kept_at_forks(some, base),
        "maj@16": lambda some: [evaluation(row)["maj@16"] for row in some],
        "H / base": lambda some: kept(some, base),
    }
    found = {
        what: {name: study_report.bootstrap(value(some)) for name, some in rows.items()}
        for what, value in values.items()
    }
    names = sorted(EVERY, key=lambda name: -found["pass@16"][name][0])
    drawing = Figure(figsize=(7.6, 5.6), dpi=130, layout="constrained")
    axes = drawing.subplots(1, len(values), sharey=True)
    for ax, (what, numbers) in zip(axes, found.items(), strict=True):
        for y, name in enumerate(names):
            mean, low, high = numbers[name]
            color = "#0059b3" if name in FAMILY else "#000000"
            ax.plot([low, high], [y, y], color=color, linewidth=1, zorder=2)
            shape = {"markersize": 5, "zorder": 3, "color": color}
            shape |= {"marker": "o"} if name in FAMILY else {"marker": "D"}
            inside = color if name in REFERENCES else "white"
            ax.plot(mean, y, linestyle="", markerfacecolor=inside, **shape)
        for name, dashes in (("dr_grpo", (0, (4, 2))), ("base", (0, (1, 1)))):
            style = {"color": "#444444", "linestyle": dashes, "linewidth": 1, "zorder": 1}
            if (what, name) != ("maj@16", "base"):
                label = study_report.NAMES[name]
                ax.axvline(numbers[name][0], label=label, **style)
                if what == "pass@16":
                    where = {"ha": "right" if name == "dr_grpo" else "left", "fontsize": 6.5}
                    ax.text(numbers[name][0], -1.1, label, **where)
        ax.set_title(what, fontsize=9)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.3, axis="y")
        ax.spines[["top", "right"]].set_visible(False)
        if what.startswith("H"):
            ticks(ax.xaxis, (0.2, 0.5, 1, 2))
    axes[0].set_yticks(range(len(names)), names, fontsize=7)
    axes[0].set_ylim(len(names) - 0.5, -2)
    return drawing


def write(size: study.Size, store: study.Store, out: Path, target: Path) -> None:
    """zoo.csv and zoo.png in `out`, and the tables between the marks of the page `target`."""
    chosen = choose(size, store)
    rows: dict[str, list[Row]] = {name: [] for name in ("base", *EVERY)}
    for job in final(size, chosen):
        rows[job.label].append(store.rows[job.key])
    base = study_report.by_seed(rows["base"])
    rows = {name: with_support(some, base) for name, some in rows.items()}
    columns = (*study_report.COLUMNS, *SUPPORT)
    study_report.write_csv(rows, out / "zoo.csv", columns)
    figure(rows).savefig(out / "zoo.png")
    lines = page(size, rows, chosen, relative_costs(out / COSTS))
    lines += ["### The candidates", ""]
    lines += [
        "avg@16 + maj@16 on hard validation prompts, T = 0.6, and in brackets the mean of H"
    ]
    lines += ["in nats, over three seeds.", ""]
    text = "\n".join([*lines, *candidates_table(size, store)])
    old = PLACE.sub(lambda found: found[1] + text + found[2], target.read_text())
    target.write_text(
        SHORT.sub(lambda x: x[1] + short_table(out / "zoo.csv", x[2]) + x[3], old)
    )
    print(f"results: {target}, {out / 'zoo.csv'}")


def command(argv: list[str] | None) -> int:
    """--table and what follows it."""
    parser = Parser("python research/zoo.py --table", allow_abbrev=False)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread [2]")
    parser.add_argument("--plan", action="store_true", help="print what would run, its cost")
    parser.add_argument("--report", action="store_true", help="run nothing: page and figure")
    args = parser.parse_args(argv)
    out = study.ROOT / "results"
    if not 1 <= args.workers <= 64:
        raise ValueError(f"--workers {args.workers}: must be 1 to 64; the default is 2")
    with locked(out), study.pool_of(args.workers) as pool:  # no two studies in one folder
        store = study.Store(out)
        for part in ("tune", "test"):
            jobs = tune(SIZE) if part == "tune" else final(SIZE, choose(SIZE, store))
            missing = store.missing(jobs)
            print(f"{part}: {study.hours(missing.values())}")
            if not (args.plan or args.report):
                study.run_jobs("zoo", missing, store, pool)
        jobs = final(SIZE, choose(SIZE, store))
        costs = out / COSTS
        if not costs.exists():
            print(f"cost: {ROUNDS * len(EVERY)} runs of {TIMED_STEPS} steps: 10 minutes")
        if store.missing(jobs) or args.plan:
            return 0
        if not (costs.exists() or args.report):
            first_seed = jobs[1 : 1 + len(EVERY)]  # without the base model
            pool.submit(time_steps, first_seed, costs).result()
        if costs.exists():
            write(SIZE, store, out, PAGE)
    return 0
