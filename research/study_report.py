"""What the study's rows say: main.csv, tables.md and the figures. It trains nothing.

The figures are readable without colour (research/figures.py).
"""

from __future__ import annotations

import csv
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from research import study
from research.figures import STYLES, name_lines, panels, ticks

Row = dict[str, Any]

NAMES = {
    "base": "base model",
    "dr_grpo": "Dr.GRPO",
    "dr_grpo_same_lr": "Dr.GRPO, same lr",
    "naive_bonus": "naive bonus, best",
    "naive_exploding": "naive bonus, exploding",
    "constrained": "constrained bonus",
    "siren": "SIREN",
    "wo_top_p": "SIREN without top-p",
    "wo_peak": "SIREN without peaks",
    "wo_anchor": "SIREN without anchor",
    "anchor_only": "anchor only",
}
COLUMNS = (
    "method",
    "seed",
    "grade",
    "temperature",
    "avg@16",
    "maj@16",
    "pass@16",
    "distinct@16",
)
COLUMNS += ("reward", "entropy", "h_agg", "useless_share")
SHORT = {**NAMES, "naive_bonus": "naive bonus", "naive_exploding": "exploding bonus"}
KINDS = ("fork", "sum", "forced")
SHOWN_KINDS = ("base", "dr_grpo", "naive_bonus", "siren")  # in the figure
SHOWN_KINDS += ("wo_top_p", "wo_peak", "wo_anchor", "anchor_only")
SCORES = ("avg@16", "maj@16", "pass@16", "distinct@16")
HEADLINE = {"base": "base model", "dr_grpo": "Dr.GRPO", "siren": "SIREN"}
HEADLINE |= {"naive_exploding": "exploding bonus"}
CLAIMED = ("dr_grpo", "dr_grpo_same_lr", "naive_bonus", "constrained")
CLAIMED += ("wo_top_p", "wo_peak", "wo_anchor", "anchor_only")


# ------------------------------------------------------------------------------- 1. statistics
def bootstrap(values: Iterable[float]) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval, by the means of 10000 seeded resamples.

    >>> bootstrap([1.0, 1.0])
    (1.0, 1.0, 1.0)
    """
    x = np.array(list(values), dtype=float)
    draws = np.random.default_rng(0).integers(len(x), size=(10_000, len(x)))
    low, high = np.percentile(x[draws].mean(1), [2.5, 97.5])
    return float(x.mean()), float(low), float(high)


def sign_flip(differences: list[float]) -> float:
    """Exact two-sided p-value of paired differences: the share of all choices of their signs
    whose sum is at least as far from 0. (If there were no effect, each sign could as well be
    the other.)

    >>> sign_flip([1.0, 2.0, 3.0])  # + + + and - - - of 8
    0.25
    """
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    sums = np.abs(signs @ np.array(differences))
    return float((sums >= sums[0] - 1e-12).mean())


def holm(values: dict[Any, float]) -> dict[Any, float]:
    """Holm's correction of p-values: the smallest times n, the next times n - 1, ...

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted = {}
    least = 0.0
    for i, (key, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(values) - i) * p))
        adjusted[key] = least
    return adjusted


def text(values: Iterable[float], sign: str = "") -> str:
    """Mean and interval.

    >>> text([0.5, 0.5])
    '.500 [.500, .500]'
    """
    mean, low, high = (re.sub(r"\b0\.", ".", f"{x:{sign}.3f}") for x in bootstrap(values))
    return f"{mean} [{low}, {high}]"


# ------------------------------------------------------------------------------------- 2. rows
def labelled(part: str, size: study.Size, store: study.Store) -> dict[str, list[Row]]:
    """Label -> the rows of a part's jobs, in their order; {} if one is missing."""
    if part != "tune" and store.missing(study.tune(size, store.rows)):
        return {}
    jobs = study.PARTS[part](size, store.rows)
    if store.missing(jobs):
        return {}
    found: dict[str, list[Row]] = defaultdict(list)
    for job in jobs:
        found[job.label].append(store.rows[job.key])
    return dict(found)


def by_seed(rows: Iterable[Row]) -> dict[int, Row]:
    """Seed -> row."""
    return {row["config"]["seed"]: row for row in rows}


def grouped(rows: Iterable[Row], key: Callable, value: Callable) -> dict[Any, list]:
    """key(row) -> value(row) of all rows that have this key; in the order of the keys."""
    found = defaultdict(list)
    for row in rows:
        found[key(row)].append(value(row))
    return dict(sorted(found.items()))


def kinds(row: Row) -> dict[str, dict[str, float]]:
    """Kind of token -> mean H, mean H' and share of all peaks, from the probe's positions.

    A response is "term, term, sum, term, sum, ..., end". Which term is next is a fork, but for
    the last: that term and the end are forced. A token counts by its position.
    """
    places = row["probe"]["positions"]
    length = 2 * study.TERMS
    kind = np.array(["fork", *["fork", "sum"] * (study.TERMS - 1), "forced"])
    kind[length - 3] = "forced"
    values = {name: np.array(some[:length]) for name, some in places.items()}
    kind = kind[: len(values["peak"])]
    values["peaks"] = values["peak"] / max(values["peak"].sum(), 1e-9)
    return {
        name: {
            "entropy": values["entropy"][kind == name].mean(),
            "nucleus_entropy": values["nucleus_entropy"][kind == name].mean(),
            "peaks": values["peaks"][kind == name].sum(),
        }
        for name in KINDS
    }


def write_csv(
    rows: dict[str, list[Row]], path: Path, columns: tuple[str, ...] = COLUMNS
) -> None:
    """main.csv: a line for each method, seed, grade and temperature. reward, entropies and
    useless_share are the probe's, so the same for each line of a run."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for label, some in rows.items():
            for row in some:
                shared = {"method": label, "seed": row["config"]["seed"], **row["probe"]}
                writer.writerows({**shared, **scores} for scores in row["evals"])


def read_csv(path: Path) -> dict[tuple[str, str, str], dict[int, dict[str, float]]]:
    """(method, grade, temperature) -> seed -> the other columns."""
    found: dict[tuple[str, str, str], dict[int, dict[str, float]]] = defaultdict(dict)
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            key = tuple(line.pop(name) for name in ("method", "grade", "temperature"))
            found[key][int(line.pop("seed"))] = {
                name: float(value) for name, value in line.items()
            }
    return found


# ----------------------------------------------------------------------------------- 3. tables
def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A table."""
    head = list(head)
    first, *others = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [first, "|---" * len(head) + "|", *others, ""]


def present(lines: dict) -> list[str]:
    """The methods that main.csv has, in the order of the tables."""
    return [method for method in NAMES if (method, "hard", "0.6") in lines]


def score_tables(lines: dict) -> list[str]:
    """Scores of every method, for each grade and temperature."""
    out = []
    for grade, temperature in (
        ("hard", "0.6"),
        ("hard", "1.0"),
        ("easy", "0.6"),
        ("easy", "1.0"),
    ):
        out += [f"### {grade} prompts, T = {temperature}", ""]
        rows = []
        for method in present(lines):
            seeds = lines[method, grade, temperature].values()
            rows.append([NAMES[method], *(text(x[score] for x in seeds) for score in SCORES)])
        out += markdown(["method", *SCORES], rows)
    return out


def kept(lines: dict, method: str, key: str) -> str:
    """An entropy / that of the base model, over seeds."""
    base = lines["base", "hard", "0.6"]
    own = lines[method, "hard", "0.6"]
    return text(line[key] / base[seed][key] for seed, line in own.items())


def policy_table(lines: dict) -> list[str]:
    """Reward, entropies and useless tokens by the probe."""
    rows = []
    for method in present(lines):
        seeds = lines[method, "hard", "0.6"].values()
        reward, useless = (text(x[key] for x in seeds) for key in ("reward", "useless_share"))
        ratios = [kept(lines, method, key) for key in ("entropy", "h_agg")]
        rows.append([NAMES[method], reward, *ratios, useless])
    return markdown(["method", "reward", "H / base", "H_agg / base", "useless tokens"], rows)


def headline(lines: dict) -> list[str]:
    """README's table: hard prompts, T = 0.6."""
    rows = []
    for method, name in HEADLINE.items():
        seeds = lines[method, "hard", "0.6"].values()
        scores = [text(line[score] for line in seeds) for score in SCORES[:3]]
        rows.append([name, *scores, "1" if method == "base" else kept(lines, method, "h_agg")])
    return markdown(["", *SCORES[:3], "H_agg / base"], rows)


def differences(lines: dict, other: str, score: str, temperature: str) -> list[float]:
    """SIREN minus another method on hard prompts, seed by seed."""
    mine = lines["siren", "hard", temperature]
    theirs = lines[other, "hard", temperature]
    return [
        mine[seed][score] - theirs[seed][score] for seed in sorted(mine.keys() & theirs.keys())
    ]


def claims(lines: dict) -> list[str]:
    """SIREN against the others, with Holm's correction over all of this table."""
    others = [method for method in CLAIMED if method in present(lines)]
    keys = itertools.product(others, SCORES[:3], ("0.6", "1.0"))
    found = {key: differences(lines, *key) for key in keys}
    p = holm({key: sign_flip(values) for key, values in found.items()})
    rows = [
        [f"SIREN - {NAMES[other]}", score, t, text(values, "+"), f"{p[other, score, t]:.3f}"]
        for (other, score, t), values in found.items()
    ]
    return markdown(["hard prompts", "score", "T", "difference", "p, Holm"], rows)


def settings(row: Row) -> dict[str, str]:
    """What tells one candidate from another."""
    config = row["config"]
    names = {"lr": "lr", "beta": "beta", "top_p": "p", "peak_quantile": "tau"}
    names["max_tokens"] = "budget"
    found = {new: f"{new} {config[old]:g}" for old, new in names.items()}
    return {
        **found,
        "V": f"V {study.vocabulary(row)}",
        "plug": config["plug"].partition(":")[2],
    }


def group_table(rows: dict[str, list[Row]]) -> list[str]:
    """Means over seeds for every setting of every label, without what is the same in all."""
    all_settings = [settings(row) for some in rows.values() for row in some]
    varied = [
        name for name in all_settings[0] if len({some[name] for some in all_settings}) > 1
    ]
    lines = []
    for label, some in rows.items():
        settled: dict[str, list[Row]] = defaultdict(list)
        for row in some:
            own = settings(row)
            settled[", ".join(own[name] for name in varied if own[name])].append(row)
        for what, own in settled.items():
            scores = [f"{np.mean([study.score(row, x) for row in own]):.3f}" for x in SCORES]
            probes = [row["probe"] for row in own]
            held, useless = (
                np.mean([x[y] for x in probes]) for y in ("h_agg", "useless_share")
            )
            name = NAMES.get(label, label).removesuffix(", best")
            lines.append([name, what, *scores, f"{held:.3f}", f"{100 * useless:.2f} %"])
    return markdown(["method", "setting", *SCORES, "H_agg", "useless"], lines)


def vocabulary_differences(
    rows: dict[str, list[Row]], other: str, score: str, vocab: int
) -> list[float]:
    """SIREN minus another method, by seed: hard prompts, T = 0.6, worlds of this size."""
    own = [
        [r for r in rows[label] if study.vocabulary(r) == vocab] for label in ("siren", other)
    ]
    mine, theirs = map(by_seed, own)
    return [study.score(mine[s], score) - study.score(theirs[s], score) for s in sorted(mine)]


def vocabulary_table(rows: dict[str, list[Row]]) -> list[str]:
    """What the size of the vocabulary changes in SIREN minus the others."""
    lines = []
    for other in ("dr_grpo", "anchor_only"):
        for vocab in sorted(set(map(study.vocabulary, rows["siren"]))):
            found = [vocabulary_differences(rows, other, score, vocab) for score in SCORES[:3]]
            cells = [text(values, "+") for values in found]
            lines.append([f"SIREN - {NAMES[other]}", str(vocab), *cells])
    return markdown(["hard prompts, T = 0.6", "vocabulary", *SCORES[:3]], lines)


def held_by_beta(rows: list[Row]) -> dict[float, float]:
    """beta -> H_agg / anchor at the end of training, a mean over seeds.

    Both have the p and tau of the run. The end is the last block of the log.
    """
    held = grouped(
        rows, lambda r: r["config"]["beta"], lambda r: r["log"][-1]["h_agg"] / r["anchor"]
    )
    return {beta: float(np.mean(values)) for beta, values in held.items()}


def scale_table(rows: dict[str, list[Row]], reference: list[Row]) -> list[str]:
    """Does beta scale as docs/beta.md predicts? The beta that holds as much entropy in the
    usual runs (`reference`, between whose betas it is interpolated, on a log scale), and the
    predicted one."""
    usual = held_by_beta(reference)
    lines = []
    for label, factor in (("budget 64", 4), ("half the peaks", 2)):
        for beta, held in held_by_beta(rows[label]).items():
            same = np.exp(np.interp(held, list(usual.values()), np.log(list(usual))))
            ratio = max(same / (factor * beta), factor * beta / same)
            cells = f"{held:.3f}", f"{same:.3f}", f"{factor * beta:g}", f"{ratio:.2f}"
            lines.append([label, f"{beta:g}", *cells])
    head = ["", "beta", "H_agg / anchor", "the usual beta that holds as much", "predicted"]
    return markdown([*head, "apart by a factor of"], lines)


def kinds_table(rows: dict[str, list[Row]]) -> list[str]:
    """Where the entropy sits."""
    lines = []
    for label, some in rows.items():
        found = [kinds(row) for row in some]
        cells = []
        for what, kind in itertools.product(("entropy", "nucleus_entropy", "peaks"), KINDS):
            cells.append(f"{np.mean([k[kind][what] for k in found]):.3f}")
        lines.append([NAMES[label], *cells])
    head = [f"{what}, {k}" for what in ("H", "H'", "peaks") for k in KINDS]
    return markdown(["method", *head], lines)


# ---------------------------------------------------------------------------------- 4. figures
def band(ax: Axes, label: str, points: dict[float, list[float]], **style: Any) -> None:
    """The mean over seeds with its interval; points: x -> the values of all seeds."""
    x, (mean, low, high) = list(points), zip(*map(bootstrap, points.values()), strict=True)
    usual = {"markersize": 3, "label": SHORT.get(label, label)}
    style = {**STYLES.get(label, {}), **usual, **style}
    ax.plot(x, mean, **style)
    ax.fill_between(x, low, high, color=style.get("color", "0.5"), alpha=0.15, linewidth=0)


def steps_figure(rows: dict[str, list[Row]]) -> Figure:
    """What training does: four curves over steps, mean and interval over seeds."""
    figure, axes = panels(2, 2)
    names = {"reward": "reward", "entropy": "entropy H (nats)", "h_agg": "$H_{agg}$ / $H^*$"}
    names |= {"useless_share": "share of useless tokens"}
    for ax, (key, title) in zip(axes, names.items(), strict=True):
        for label in ("dr_grpo", "naive_bonus", "naive_exploding", "siren"):
            some = rows[label]
            points = defaultdict(list)
            for row in some:
                unit = row["anchor"] if key == "h_agg" else 1
                for record in row["log"]:
                    points[record["step"]].append(record[key] / unit)
            same = label in ("dr_grpo", "siren")  # which have the same p and tau
            if same or key != "h_agg":
                band(ax, label, points, marker="")
        ax.set(title=title, xlabel="step")
        if key == "entropy":  # so that collapse and explosion can both be read
            ticks(ax.yaxis, (0.1, 0.2, 0.5, 1, 2, 5))
        else:
            ax.set_ylim(0, None)
    name_lines(figure)
    return figure


def kinds_figure(rows: dict[str, list[Row]]) -> Figure:
    """Where the entropy sits: H and H' by kind of token, a row for each method. Two bonuses
    that explode or swing are left out; they are in the table."""
    figure, axes = panels(2, height=3.4)
    names = {"fork": "forks", "sum": "sums", "forced": "forced"}
    looks = {
        "fork": {"color": "#0059b3", "marker": "o"},
        "sum": {"color": "#b35900", "marker": "D", "markerfacecolor": "white"},
        "forced": {"color": "#000000", "marker": "x"},
    }
    titles = {"entropy": "H (nats)", "nucleus_entropy": "H', on the nucleus (nats)"}
    labels = [label for label in SHOWN_KINDS if label in rows]
    for ax, (what, title) in zip(axes, titles.items(), strict=True):
        for kind, look in looks.items():
            found = [
                bootstrap(kinds(row)[kind][what] for row in rows[label]) for label in labels
            ]
            mean, low, high = np.array(found).T
            y = np.arange(len(labels)) + {"fork": 0, "sum": -0.17, "forced": 0.17}[kind]
            ax.hlines(y, low, high, color=look["color"], linewidth=1)
            ax.plot(mean, y, label=names[kind], linestyle="", markersize=5, **look)
            if what == "entropy":  # there the kinds are far apart
                where = {"ha": "center", "fontsize": 7.5, "color": look["color"]}
                ax.text(mean[0], -0.65, names[kind], **where)
        ax.set(title=title, xlim=(0, 1.3), ylim=(len(labels) - 0.5, -1.1))
    axes[0].set_yticks(range(len(labels)), [NAMES[label] for label in labels], fontsize=8)
    axes[1].set_yticks(range(len(labels)), [""] * len(labels))
    return figure


def constrained_figure(rows: dict[str, list[Row]], base: dict[int, Row]) -> Figure:
    """Entropy over steps, a line for each seed: an adaptive bonus that aims at the entropy of
    the base model, and SIREN."""
    figure, axes = panels(2)
    for ax, label in zip(axes, ("constrained", "siren"), strict=True):
        for row in rows[label]:
            entropy = [record["entropy"] for record in row["log"]]
            start = base[row["config"]["seed"]]["probe"]["entropy"]
            steps = [record["step"] for record in row["log"]]
            ax.plot(steps, np.array(entropy) / start, color="#0059b3", lw=0.8)
        ax.axhline(1, color="0", linestyle=":")
        ax.text(0, 1.12, "base model", fontsize=7.5)
        ax.set(title=NAMES[label], xlabel="step", ylabel="H / base")
        ticks(ax.yaxis, (0.2, 0.5, 1, 2, 5, 10))
        ax.set_ylim(0.2, 12)
    return figure


def k_figure(rows: dict[str, list[Row]], grade: str) -> Figure:
    """pass@k and maj@k at both temperatures."""
    figure, axes = panels(2, 2)
    ks = [1, 2, 4, 8, 16, 32, 64]
    for ax, (score, temperature) in zip(
        axes, itertools.product(("pass", "maj"), (0.6, 1.0)), strict=True
    ):
        for label in ("base", "dr_grpo", "naive_bonus", "siren", "anchor_only"):
            points = {
                k: [
                    study.score(row, f"{score}@{k}", grade, temperature) for row in rows[label]
                ]
                for k in ks
                if f"{score}@{k}" in rows[label][0]["evals"][0]
            }
            band(ax, label, points)
        ax.set(title=f"{score}@k, {grade}, T = {temperature}", xlabel="k")
        ax.set_ylim(0.25 if grade == "easy" else 0, 1.01)
        ticks(ax.xaxis, ks)
    name_lines(figure)
    return figure


def vocabularies_figure(rows: dict[str, list[Row]]) -> Figure:
    """What the vocabulary changes: votes, single samples, useless tokens."""
    figure, axes = panels(3)
    values = {"maj@16, hard, T = 0.6": lambda row: study.score(row, "maj@16")}
    values |= {"avg@16, hard, T = 0.6": lambda row: study.score(row, "avg@16")}
    values |= {"share of useless tokens": lambda row: row["probe"]["useless_share"]}
    for ax, (title, value) in zip(axes, values.items(), strict=True):
        for label, some in rows.items():
            band(ax, label, grouped(some, study.vocabulary, value))
        ax.set(title=title, xlabel="vocabulary", ylim=(0, None))
        ticks(ax.xaxis, study.Size().vocabularies)
    name_lines(figure)
    return figure


def sensitivity_figure(rows: dict[str, list[Row]], base: dict[int, Row]) -> Figure:
    """p, tau and beta, one at a time: the entropy that is kept, and the votes."""

    def kept(row: Row) -> float:
        return row["probe"]["entropy"] / base[row["config"]["seed"]]["probe"]["entropy"]

    figure, axes = panels(3)
    names = {"top_p": "p", "peak_quantile": r"$\tau$", "beta": r"$\beta$"}
    for ax, (knob, name) in zip(axes, names.items(), strict=True):
        some = rows[f"siren, {knob}"]
        for label, value, look in (
            ("H / base", kept, "dr_grpo"),
            ("maj@16", lambda r: study.score(r, "maj@16"), "siren"),
            ("avg@16", lambda r: study.score(r, "avg@16"), "naive_exploding"),
        ):
            points = grouped(some, lambda r, k=knob: r["config"][k], value)
            band(ax, label, points, **STYLES[look])
        ax.set(xlabel=name, ylim=(0, 1.15))
        if knob == "beta":
            ticks(ax.xaxis, points)
    axes[0].set_title("SIREN, hard prompts, T = 0.6", fontsize=9)
    name_lines(figure)
    return figure


def draw(found: dict[str, dict[str, list[Row]]]) -> dict[str, Figure]:
    """Name -> figure, of every part that is complete; found: part -> label -> rows."""
    figures = {}
    if rows := found["main"]:
        figures |= {"steps": steps_figure(rows), "kinds": kinds_figure(rows)}
        figures |= {"k": k_figure(rows, "hard"), "k_easy": k_figure(rows, "easy")}
        figures["constrained"] = constrained_figure(rows, by_seed(rows["base"]))
    if rows := found["vocabularies"]:
        figures["vocabularies"] = vocabularies_figure(rows)
    if rows := found["sensitivity"]:
        figures["sensitivity"] = sensitivity_figure(rows, by_seed(found["tune"]["base"]))
    return figures


def write(size: study.Size, store: study.Store, out: Path) -> None:
    """main.csv, tables.md and the figures of every part that is complete."""
    out.mkdir(parents=True, exist_ok=True)
    found = {part: labelled(part, size, store) for part in study.PARTS}
    lines = ["# Tables", "", "Written by `python research/study.py`; README.md says how.", ""]
    if rows := found["main"]:
        rows = {label: rows[label] for label in NAMES}  # in the order of the tables
        write_csv(rows, out / "main.csv")
        table = read_csv(out / "main.csv")
        lines += ["## README's table", "", *headline(table)]
        lines += ["## The main table", "", *score_tables(table), *policy_table(table)]
        lines += ["## SIREN against the others", "", *claims(table)]
        lines += ["## Where the entropy sits", "", *kinds_table(rows)]
        lines += ["## The chosen settings", "", *group_table(rows)]
    for part in ("tune", "vocabularies", "sensitivity", "scale", "official"):
        if rows := found[part]:
            lines += [f"## {part.capitalize()}", "", *group_table(rows)]
    if found["scale"] and found["sensitivity"]:
        lines += ["## Does beta scale as predicted?", ""]
        lines += scale_table(found["scale"], found["sensitivity"]["siren, beta"])
    if rows := found["vocabularies"]:
        lines += ["## SIREN against the others, by vocabulary", "", *vocabulary_table(rows)]
    (out / "tables.md").write_text("\n".join(lines))
    for name, figure in draw(found).items():
        figure.savefig(out / f"{name}.png")
    print(f"results: {out}")
