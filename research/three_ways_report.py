"""What the rows of research/three_ways.py say: CSV files, tables and figures.

It trains nothing. Everything but the CSV files is made from the CSV files. What is reported
are the seeds that three_ways.CORE has; tables say how many of them a method or a pair has.
Figures are readable in grey: hatches, markers and labels tell the parts apart.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from research import study, study_report, three_ways
from research.figures import STYLES, name_lines, panels, ticks
from research.study_report import NAMES, SHORT, holm, markdown, sign_flip, text

Row = dict[str, Any]

EVERY = {
    **NAMES,
    "dr_grpo_coins": "Dr.GRPO, random reward",
    "siren_coins": "SIREN, random reward",
    "token_first": "quantile over the full H",
}
REGULARIZERS = ("naive_bonus", "constrained", "siren", "wo_top_p", "wo_peak", "wo_anchor")
REGULARIZERS += ("anchor_only",)
OTHERS = study_report.CLAIMED  # with which SIREN is compared
KINDS = {"": "right", "sound/": "sound", "clean/": "clean"}
REWARDS = (0.4, 0.5, 0.6)  # at which scores are compared
TESTED_REWARD = 0.5  # at the other two nothing is tested
SCORED = ("pass", "maj")  # at 16 samples
SPEED = 0.4  # mean reward of ten steps
NEVER = study.STEPS + 1
WINDOW = 10
END = 20  # last steps
AT_GAPS = ("p_right", "p_wrong", "entropy", "nucleus_entropy", "filled_share")
FILES = ("three_ways", "three_ways_course", "three_ways_many", "tokens")


# --------------------------------------------------------------------------- 1. the CSV files
def complete(jobs: list[study.Job], store: study.Store) -> dict[str, dict[int, Row]]:
    """Label -> seed -> row, for the seeds of which no job is missing."""
    missing = {job.cfg.seed for job in jobs if job.key not in store.rows}
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for job in jobs:
        if job.cfg.seed not in missing:
            found[job.label][job.cfg.seed] = store.rows[job.key]
    return dict(found)


def finished(size: three_ways.Size, store: study.Store) -> dict[str, dict[int, Row]]:
    """Label -> seed -> row of `ways` and token_first, for the seeds that all of CORE have."""
    jobs = three_ways.ways(size, store.rows)
    found = complete([job for job in jobs if job.label in three_ways.CORE], store)
    others = [job for job in jobs if job.label not in three_ways.CORE]
    part = three_ways.PARTS["token_first"]
    if not store.missing(part.tune(size, store.rows)):
        others += part.test(size, store.rows)
    for job in others:
        if job.key in store.rows and job.cfg.seed in found.get("base", {}):
            found.setdefault(job.label, {})[job.cfg.seed] = store.rows[job.key]
    return found


def score_lines(label: str, seed: int, row: Row) -> Iterable[Row]:
    """A row's lines of three_ways.csv: one for each grade and temperature."""
    probe = {name: row["probe"][name] for name in ("reward", "entropy", "useless_share")}
    places = {f"gap_{name}": row["gaps"][name] for name in AT_GAPS}
    places |= {f"fact_{name}": row["facts"][name] for name in ("p_right", "entropy")}
    names = ["avg@16", "maj@16", "pass@16", *three_ways.WAYS, "gaps_met", "gaps_filled"]
    names += ["sound/pass@16", "clean/pass@16"]
    for found in row["evals"]:
        scores = {name: found[name] for name in names}
        scores |= {name: found.get(name, math.nan) for name in three_ways.OTHER}
        at = {"method": label, "grade": found["grade"], "temperature": found["temperature"]}
        yield {**at, "seed": seed, **scores, **probe, **places}


def course_lines(label: str, seed: int, row: Row) -> Iterable[Row]:
    """Its lines of three_ways_course.csv: one for each evaluation while it trained. The reward
    is the mean of the ten steps up to it; before the first step, that of the first one."""
    for point in row.get("course", ()) if label in three_ways.WATCHED else ():
        step = point["step"]
        rewards = row["rewards"][max(0, step - WINDOW) : max(1, step)]
        scores = {name.partition("@")[0]: point[name] for name in point if "hard/" in name}
        values = {name.removeprefix("hard/"): value for name, value in scores.items()}
        yield {"method": label, "seed": seed, "step": step, "reward": mean(rewards), **values}


def many_lines(label: str, seed: int, row: Row) -> Iterable[Row]:
    """Its lines of three_ways_many.csv: one for each temperature and k."""
    for found in row.get("many", ()):
        ks = [int(name.partition("@")[2]) for name in found if name.startswith("pass@")]
        for k in ks:
            at = {"method": label, "temperature": found["temperature"], "seed": seed, "k": k}
            scores = {f"{kind}pass": found[f"{kind}pass@{k}"] for kind in KINDS}
            yield {**at, **scores, "maj": found[f"maj@{k}"]}


def speed(rewards: list[float], least: float = SPEED, window: int = WINDOW) -> int:
    """The first step at which the mean of the last ten rewards is at least .4; else NEVER.

    >>> speed([0.0, 0.4, 0.6], 0.5, 2), speed([0.0, 0.4], 0.5, 2)
    (3, 201)
    """
    for step in range(window, len(rewards) + 1):
        if mean(rewards[step - window : step]) >= least - 1e-9:
            return step
    return NEVER


def token_line(label: str, vocab: int, seed: int, row: Row) -> Row:
    """Its line of tokens.csv."""
    at = {"method": label, "vocabulary": vocab, "seed": seed}
    at |= {name: row["config"][name] for name in ("lr", "beta")}
    [found] = [e for e in row["evals"] if (e["grade"], e["temperature"]) == ("hard", 0.6)]
    scores = {name: found[name] for name in ("avg@16", "maj@16", "pass@16")}
    end = {
        f"end_{x}": mean(row[y][-END:]) for x, y in (("reward", "rewards"), ("H", "entropies"))
    }
    start = {"first_H": mean(row["entropies"][:1])}
    useless = {"useless_share": row["probe"]["useless_share"]}
    return {**at, "speed": speed(row["rewards"]), **end, **start, **useless, **scores}


def token_rows(size: three_ways.Size, store: study.Store) -> list[Row]:
    """The lines of tokens.csv: of each size the seeds that are complete."""
    found = {study.VOCAB: finished(size, store)}
    for vocab in three_ways.VOCABULARIES:
        part = three_ways.PARTS[f"tokens_{vocab}"]
        if not store.missing(part.tune(size, store.rows)):
            found[vocab] = complete(part.test(size, store.rows), store)
    lines = []
    for vocab, rows in sorted(found.items()):
        for label in three_ways.token_candidates(size, store.rows):
            seeds = {s: r for s, r in rows.get(label, {}).items() if s in size.few.test_seeds}
            lines += [token_line(label, vocab, seed, row) for seed, row in seeds.items()]
    return lines


def write_csv(path: Path, lines: list[Row]) -> None:
    """The lines, whose names are those of the first one."""
    with open(path, "w", newline="") as file:
        names = [*dict.fromkeys(name for line in lines for name in line)]
        writer = csv.DictWriter(file, names, lineterminator="\n", restval="nan")
        writer.writeheader()
        rounded = [
            {k: f"{x:.5g}" if isinstance(x, float) else x for k, x in line.items()}
            for line in lines
        ]
        writer.writerows(rounded)


def read_csv(path: Path) -> list[Row]:
    """Its lines; every word but a method and a grade is a number."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [
            {k: x if k in ("method", "grade") else float(x) for k, x in line.items()}
            for line in csv.DictReader(file)
        ]


def by(lines: list[Row], **wanted: Any) -> dict[str, dict[int, Row]]:
    """Method -> seed -> line, of the lines that have the wanted values."""
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for line in lines:
        if all(line[name] == value for name, value in wanted.items()):
            found[line["method"]][int(line["seed"])] = line
    return dict(found)


# ------------------------------------------------------------------------------ 2. comparisons
def paired(
    one: dict[int, Row], other: dict[int, Row], value: Callable[[Row], float]
) -> list[float]:
    """one - other in a value, for the seeds that both have and in which both are numbers."""
    found = [value(one[s]) - value(other[s]) for s in sorted(one.keys() & other.keys())]
    return [x for x in found if not math.isnan(x)]


def tested(found: dict[tuple[str, ...], list[float]]) -> list[list[str]]:
    """Rows of a table: the key, the difference with its interval, seeds, p after Holm."""
    found = {key: values for key, values in found.items() if values}
    p = holm({key: sign_flip(values) for key, values in found.items()})
    return [
        [*key, text(values, "+"), str(len(values)), f"{p[key]:.3f}"]
        for key, values in found.items()
    ]


def filled_of_right(line: Row) -> float:
    """Filled responses / right ones; NaN where none is right."""
    return line["filled"] / line["avg@16"] if line["avg@16"] else math.nan


def do_they_fill(lines: list[Row]) -> dict[tuple[str, ...], list[float]]:
    """Table 1: every regulariser minus Dr.GRPO."""
    hard = by(lines, grade="hard", temperature=0.6)
    values = {"filled / right": filled_of_right, "p(right sum) at gaps": at("gap_p_right")}
    return {
        (f"{NAMES[name]} - Dr.GRPO", what): paired(hard.get(name, {}), hard["dr_grpo"], value)
        for name in REGULARIZERS
        for what, value in values.items()
    }


def at(name: str) -> Callable[[Row], float]:
    """The value with that name."""
    return lambda line: line[name]


def does_it_explain(lines: list[Row]) -> dict[tuple[str, ...], list[float]]:
    """Table 2: the naive bonus minus Dr.GRPO, way by way."""
    found = {}
    for other, t, way in itertools.product(
        ("dr_grpo", "dr_grpo_same_lr"), (0.6, 1.0), three_ways.WAYS[:3]
    ):
        hard = by(lines, grade="hard", temperature=t)
        key = (f"naive bonus - {NAMES[other]}", f"{t:g}", way)
        found[key] = paired(hard["naive_bonus"], hard.get(other, {}), at(way))
    return found


def is_it_ahead(lines: list[Row]) -> dict[tuple[str, ...], list[float]]:
    """Table 3: SIREN minus the others if only sound, or only clean, responses count."""
    values: dict[tuple[str, str], Callable[[Row], float]] = {
        ("pass@16", "sound"): at("sound/pass@16"),
        ("pass@16", "clean"): at("clean/pass@16"),
        ("avg", "sound"): lambda line: line["clean"] + line["filled"],
        ("avg", "clean"): at("clean"),
    }
    found = {}
    for other, t in itertools.product(OTHERS, (0.6, 1.0)):
        hard = by(lines, grade="hard", temperature=t)
        for what, value in values.items():
            key = (f"SIREN - {NAMES[other]}", f"{t:g}", *what)
            found[key] = paired(hard["siren"], hard.get(other, {}), value)
    return found


def arrival(points: list[Row], reward: float) -> Row | None:
    """The first point of a course at which the reward is there."""
    order = sorted(points, key=at("step"))
    return next((x for x in order if x["step"] > 0 and x["reward"] >= reward), None)


def courses(lines: list[Row]) -> dict[str, dict[int, list[Row]]]:
    """Method -> seed -> the points of its course."""
    found: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        found[line["method"]][int(line["seed"])].append(line)
    return {name: dict(seeds) for name, seeds in found.items()}


def at_equal_reward(lines: list[Row], reward: float) -> dict[tuple[str, ...], list[float]]:
    """The others minus Dr.GRPO in pass and maj@16 where both have that training reward."""
    found = {}
    own = courses(lines)
    for name, score in itertools.product(("siren", "naive_bonus", "anchor_only"), SCORED):
        points = {
            label: {s: x for s, p in own.get(label, {}).items() if (x := arrival(p, reward))}
            for label in (name, "dr_grpo")
        }
        key = (f"{NAMES[name]} - Dr.GRPO", f"{score}@16")
        found[key] = paired(points[name], points["dr_grpo"], at(score))
    return found


def stopped_early(own: dict[int, list[Row]], score: str = "maj") -> dict[int, Row]:
    """Seed -> the point at the step that is best on the other seeds; needs two seeds."""
    found = {}
    for seed, points in own.items():
        rest = [x for s, some in own.items() if s != seed for x in some if x["step"] > 0]
        steps = sorted({x["step"] for x in rest})
        if steps:
            best = max(steps, key=lambda n: mean(x[score] for x in rest if x["step"] == n))
            found[seed] = next(x for x in points if x["step"] == best)
    return found


def early_steps(lines: list[Row]) -> str:
    """At which steps Dr.GRPO is stopped: "200 on 12 of 12 seeds"."""
    early = stopped_early(courses(lines).get("dr_grpo", {}))
    chosen = [int(x["step"]) for x in early.values()]
    counts = Counter(chosen).most_common()
    return ", ".join(f"{step} on {n} of {len(chosen)} seeds" for step, n in counts)


def early_stop(lines: list[Row]) -> dict[tuple[str, ...], list[float]]:
    """SIREN at its last step minus Dr.GRPO stopped early."""
    own = courses(lines)
    early = stopped_early(own.get("dr_grpo", {}))
    last = {s: max(points, key=at("step")) for s, points in own.get("siren", {}).items()}
    return {
        ("SIREN - Dr.GRPO, stopped early", f"{score}@16"): paired(last, early, at(score))
        for score in SCORED
    }


def slopes(lines: list[Row], other: str, name: str) -> list[float]:
    """For each seed that all sizes have: the slope over log2(vocabulary) of other - SIREN."""
    sizes = sorted({line["vocabulary"] for line in lines})
    found = [by(lines, vocabulary=size) for size in sizes]
    gaps = [
        {
            s: own[other][s][name] - own["siren"][s][name]
            for s in own.get(other, {}).keys() & own["siren"]
        }
        for own in found
    ]
    seeds = sorted(set.intersection(*map(set, gaps))) if len(gaps) > 1 else []
    x = np.log2(sizes)
    return [float(np.polyfit(x, [own[s] for own in gaps], 1)[0]) for s in seeds]


# ----------------------------------------------------------------------------------- 3. tables
def seeds_of(found: dict[str, dict[int, Row]]) -> int:
    """How many seeds the methods have."""
    return len(found.get("base", next(iter(found.values()), {})))


def present(found: dict[str, Any]) -> list[str]:
    """The methods that have lines, in the order of the tables."""
    return [name for name in EVERY if name in found]


def texts(seeds: dict[int, Row], values: Iterable[Callable[[Row], float]]) -> list[str]:
    """Mean and interval of each value, without what is not a number."""
    cells = []
    for value in values:
        numbers = [x for x in map(value, seeds.values()) if not math.isnan(x)]
        cells.append(text(numbers) if numbers else "-")
    return cells


def ways_tables(lines: list[Row]) -> list[str]:
    """Shares of all responses by way, and pass@16 by right, sound and clean responses."""
    out = []
    values = {"right": at("avg@16")}
    values |= {way: at(way) for way in (*three_ways.WAYS, *three_ways.OTHER)}
    values |= {"filled / right": filled_of_right}
    values |= {f"pass@16, {name}": at(f"{kind}pass@16") for kind, name in KINDS.items()}
    for grade, t in itertools.product(("hard", "easy"), (0.6, 1.0)):
        found = by(lines, grade=grade, temperature=t)
        rows = [
            [EVERY[x], str(len(found[x])), *texts(found[x], values.values())]
            for x in present(found)
        ]
        out += [f"### {grade} prompts, T = {t:g}", ""]
        out += markdown(["method", "seeds", *values], rows)
    return out


def gaps_table(lines: list[Row]) -> list[str]:
    """What happens at gaps, teacher-forced and in own responses (hard prompts, T = 0.6)."""
    found = by(lines, grade="hard", temperature=0.6)
    values = {"p(right sum)": at("gap_p_right"), "p(teacher's wrong sum)": at("gap_p_wrong")}
    values |= {"gaps with p(right) > .5": at("gap_filled_share"), "H": at("gap_entropy")}
    values |= {"H'": at("gap_nucleus_entropy"), "p(right), other sums": at("fact_p_right")}
    values |= {"H, other sums": at("fact_entropy"), "gaps met a response": at("gaps_met")}
    values["right there"] = lambda x: (
        x["gaps_filled"] / x["gaps_met"] if x["gaps_met"] else math.nan
    )
    rows = [[EVERY[x], *texts(found[x], values.values())] for x in present(found)]
    return markdown(["method", *values], rows)


def course_tables(lines: list[Row]) -> list[str]:
    """Scores at equal reward, and Dr.GRPO stopped early."""
    out = []
    for reward in REWARDS:
        found = at_equal_reward(lines, reward)
        what = "tested" if reward == TESTED_REWARD else "shown, not tested"
        rows = tested(found)
        rows = rows if reward == TESTED_REWARD else [[*row[:-1], ""] for row in rows]
        out += [f"### at a training reward of {reward:g} ({what})", ""]
        out += markdown(
            ["hard prompts, T = 0.6", "score", "difference", "seeds", "p, Holm"], rows
        )
    out += ["### Dr.GRPO stopped at its best step in maj@16 (on the other seeds)", ""]
    out += [f"That step is {early_steps(lines)}.", ""]
    rows = [row[:-1] for row in tested(early_stop(lines))]
    return out + markdown(["hard prompts, T = 0.6", "score", "difference", "seeds"], rows)


def many_table(lines: list[Row]) -> list[str]:
    """pass@k and maj@k with k up to 256."""
    rows = []
    ks = [k for k in sorted({x["k"] for x in lines}) if k in (1, 16, 64, 256)]
    for t, kind in itertools.product((0.6, 1.0), [f"{x}pass" for x in KINDS] + ["maj"]):
        for name in three_ways.MANY:
            cells = []
            for k in ks:
                found = by(lines, temperature=t, k=k)
                cells += texts(found.get(name, {}), [at(kind)])
            if name in found:
                rows.append([EVERY[name], f"{t:g}", kind, str(len(found[name])), *cells])
    head = ["hard prompts", "T", "score", "seeds", *(f"k = {k:g}" for k in ks)]
    return markdown(head, rows)


def token_tables(lines: list[Row]) -> list[str]:
    """The vocabulary: speed, reward at the end, entropy held, scores; and the trends."""
    names = (
        "speed",
        "end_reward",
        "end_H",
        "first_H",
        "useless_share",
        "avg@16",
        "maj@16",
        "pass@16",
    )
    rows = []
    for size in sorted({line["vocabulary"] for line in lines}):
        found = by(lines, vocabulary=size)
        for name, seeds in found.items():
            cells = texts(seeds, map(at, names))
            cells[0] = "{:.0f} [{:.0f}, {:.0f}]".format(
                *study_report.bootstrap(x["speed"] for x in seeds.values())
            )
            one = next(iter(seeds.values()))
            knob = "lr" if name == "dr_grpo" else "beta"
            chosen = f"{knob} {one[knob]:g}"
            rows.append([f"{size:g}", NAMES[name], chosen, str(len(seeds)), *cells])
    titles = ["tokens", "method", "chosen", "seeds", "steps to .4", "reward, last 20 steps"]
    titles += ["H, last 20 steps", "H, first step", "useless", *names[-3:]]
    out = markdown(titles, rows)
    if {line["vocabulary"] for line in lines} != {study.VOCAB, *three_ways.VOCABULARIES}:
        return [*out, "The trend is tested once all sizes have their rows.", ""]
    found = {
        (f"{NAMES[other]} - SIREN", name): slopes(lines, other, name)
        for other in ("wo_top_p", "anchor_only")
        for name in ("speed", "end_reward")
    }
    out += ["Slope of a difference, for each doubling of the vocabulary:", ""]
    return out + markdown(["", "of", "slope", "seeds", "p, Holm"], tested(found))


def tables(out: Path) -> str:
    """three_ways.md, from the CSV files."""
    lines = {name: read_csv(out / f"{name}.csv") for name in FILES}
    ways = lines["three_ways"]
    n = len(by(ways, grade="hard", temperature=0.6).get("base", {}))
    page = ["# Three ways to be right: tables", ""]
    page += [
        "Written by `python research/three_ways.py --report`; that file says what is what."
    ]
    page += [
        f"Complete in the first five methods: **{n} of 16 test seeds**. Intervals of fewer"
    ]
    page += [
        "than six seeds say too little about other seeds, and no p can be small there.",
        "",
    ]
    if n:
        page += [
            "## The ways",
            "",
            *ways_tables(ways),
            "## At the gaps",
            "",
            *gaps_table(ways),
        ]
        head = ["seeds", "p, Holm"]
        page += ["## 1. Do entropy regularisers fill gaps?", ""]
        page += markdown(
            ["hard prompts, T = 0.6", "", "difference", *head], tested(do_they_fill(ways))
        )
        page += ["## 2. Does that explain the naive bonus?", ""]
        page += markdown(
            ["hard prompts", "T", "way", "difference", *head], tested(does_it_explain(ways))
        )
        page += ["## 3. Is SIREN ahead if only sound, or only clean, responses count?", ""]
        keys = ["hard prompts", "T", "score", "counts"]
        page += markdown([*keys, "difference", *head], tested(is_it_ahead(ways)))
    if lines["three_ways_course"]:
        page += ["## Equal reward", "", *course_tables(lines["three_ways_course"])]
    hard = by(ways, grade="hard", temperature=0.6)
    if "token_first" in hard:
        page += ["## The order of the masks", ""]
        found = {
            ("SIREN - quantile over the full H", x): paired(
                hard["siren"], hard["token_first"], at(x)
            )
            for x in ("avg@16", "maj@16", "pass@16")
        }
        page += markdown(
            ["hard prompts, T = 0.6", "score", "difference", *head], tested(found)
        )
    if lines["three_ways_many"]:
        page += ["## Larger k", "", *many_table(lines["three_ways_many"])]
    if lines["tokens"]:
        page += ["## The vocabulary", "", *token_tables(lines["tokens"])]
    return "\n".join(page)


# ---------------------------------------------------------------------------------- 4. figures
SHADES = {  # way -> colour and hatch, told apart in grey
    "clean": ("#00386b", ""),
    "filled": ("#5aa5e0", "////"),
    "cancelled": ("#f0c27b", "...."),
    "other": ("#ffffff", ""),
}
MARKS = {"": "o", "sound/": "s", "clean/": "D"}


def caption(lines: list[Row]) -> str:
    """How many seeds a figure is about."""
    n = len({x["seed"] for x in lines})
    return f"hard prompts, T = 0.6; {n} of {len(study.Size().test_seeds)} test seeds"


def ways_figure(lines: list[Row]) -> Figure:
    """Right responses to hard prompts at T = 0.6, stacked by way; pass@16 by what counts."""
    found = by(lines, grade="hard", temperature=0.6)
    seeds = found["base"].keys()  # a method that lacks some of them is left out
    labels = [name for name in present(found) if name in NAMES and found[name].keys() == seeds]
    labels = [name for name in labels if name != "naive_exploding"]  # nothing is right there
    figure = Figure(figsize=(7.4, 4.4), dpi=130, layout="constrained")
    bars, dots = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    y = np.arange(len(labels))
    left = np.zeros(len(labels))
    for way, (color, hatch) in SHADES.items():
        width = np.array([mean(x[way] for x in found[name].values()) for name in labels])
        style = {"color": color, "hatch": hatch, "edgecolor": "black", "linewidth": 0.5}
        bars.barh(y, width, 0.7, left, label=way, **style)
        left += width
    for i, name in enumerate(labels):
        shares = [x for x in map(filled_of_right, found[name].values()) if not math.isnan(x)]
        if shares:
            note = f"{100 * mean(shares):.0f} % filled"
            bars.text(left[i] + 0.01, i, note, fontsize=7, va="center")
    for (kind, mark), shift in zip(MARKS.items(), (-0.2, 0, 0.2), strict=True):
        values = [
            study_report.bootstrap(x[f"{kind}pass@16"] for x in found[name].values())
            for name in labels
        ]
        middle, low, high = np.array(values).T
        style = {"color": "black", "markersize": 4, "linewidth": 0.8, "label": KINDS[kind]}
        style["markerfacecolor"] = {"": "white", "sound/": "0.6", "clean/": "black"}[kind]
        spread = (middle - low, high - middle)
        dots.errorbar(middle, y + shift, xerr=spread, fmt=mark, **style)
    bars.set(title="share of responses that are right", xlim=(0, 1.25 * max(left)))
    bars.set_yticks(y, [NAMES[name] for name in labels], fontsize=8)
    bars.invert_yaxis()
    dots.set(title="pass@16, if only these count", xlim=(0, 1))
    dots.grid(axis="x", alpha=0.3)
    for ax in (bars, dots):
        ax.title.set_fontsize(9)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(caption(lines), fontsize=8)
    bars.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=4)
    dots.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3)
    return figure


def course_figure(lines: list[Row]) -> Figure:
    """While four methods train: scores against the reward, and what happens at the gaps."""
    figure, axes = panels(2, 2)
    titles = {
        "pass": "pass@16 against training reward",
        "maj": "maj@16 against training reward",
    }
    titles |= {"gaps_entropy": "H at gaps (nats)", "gaps_p_right": "p(right sum) at gaps"}
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        for label, own in courses(lines).items():
            points: dict[float, list[Row]] = defaultdict(list)
            for x in itertools.chain(*own.values()):
                points[x["step"]].append(x)
            over = "reward" if name in SCORED else "step"
            path = [
                [mean(x[what] for x in some) for what in (over, name)]
                for some in points.values()
            ]
            style = {**STYLES[label], "markersize": 4, "label": SHORT[label]}
            ax.plot(
                *zip(*sorted(path, key=lambda xy: xy[0]) if over == "step" else path), **style
            )
        ax.set_title(title, fontsize=9)
        ax.set(xlabel="step" if over == "step" else "training reward", ylim=(0, None))
    figure.suptitle(caption(lines), fontsize=8)
    name_lines(figure)
    return figure


def many_figure(lines: list[Row]) -> Figure:
    """pass@k with k up to 256, by right and by sound responses; hard prompts, T = 0.6."""
    figure, axes = panels(2)
    for ax, kind in zip(axes, ("", "sound/"), strict=True):
        for label in three_ways.MANY:
            points: dict[float, list[float]] = defaultdict(list)
            for x in lines:
                if x["method"] == label and x["temperature"] == 0.6:
                    points[x["k"]].append(x[f"{kind}pass"])
            if points:
                study_report.band(ax, label, dict(points))
        ax.set(title=f"pass@k by {KINDS[kind]} responses", xlabel="k", ylim=(0, 1))
        ticks(ax.xaxis, sorted({x["k"] for x in lines})[::2])
    figure.suptitle(caption(lines), fontsize=8)
    name_lines(figure)
    return figure


def tokens_figure(lines: list[Row]) -> Figure:
    """Speed, reward at the end and scores against the vocabulary."""
    figure, axes = panels(2, 2)
    titles = {"speed": "steps to a reward of .4", "end_reward": "reward, last 20 steps"}
    titles |= {"maj@16": "maj@16, hard, T = 0.6", "pass@16": "pass@16, hard, T = 0.6"}
    sizes = sorted({x["vocabulary"] for x in lines})
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        for label in dict.fromkeys(x["method"] for x in lines):
            points: dict[float, list[float]] = defaultdict(list)
            for x in lines:
                if x["method"] == label:
                    points[x["vocabulary"]].append(x[name])
            study_report.band(ax, label, dict(points))
        ax.set(xlabel="tokens in the vocabulary", ylim=(0, None))
        ax.set_title(title, fontsize=9)
        ticks(ax.xaxis, sizes)
    name_lines(figure)
    return figure


# ---------------------------------------------------------------------------- 5. the command
def write(size: three_ways.Size, store: study.Store, out: Path) -> None:
    """The CSV files, three_ways.md and the figures."""
    rows = finished(size, store)
    makers = {"three_ways": score_lines, "three_ways_course": course_lines}
    makers["three_ways_many"] = many_lines
    lines = {
        name: [
            line
            for label in EVERY
            for seed, row in sorted(rows.get(label, {}).items())
            for line in make(label, seed, row)
        ]
        for name, make in makers.items()
    }
    lines["tokens"] = token_rows(size, store)
    for name, some in lines.items():
        if some:
            write_csv(out / f"{name}.csv", some)
    (out / "three_ways.md").write_text(tables(out))
    figures = {"three_ways": ways_figure, "three_ways_course": course_figure}
    figures |= {"three_ways_many": many_figure, "tokens": tokens_figure}
    for name, draw in figures.items():
        if lines[name]:
            draw(read_csv(out / f"{name}.csv")).savefig(out / f"{name}.png")
    print(f"results: {out / 'three_ways.md'}")
