"""What the study's raw files say: CSV rows, intervals, tables and figures. Runs nothing itself.

Figures are readable without colour: line styles, markers and labels tell the lines apart.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

DEFAULT_VOCAB = 256  # of toy_env.ToyWorld
# the columns of main.csv and quick.csv
COLUMNS = ("method", "seed", "split", "temperature", "steps", "reward", "avg@16", "maj@16")
COLUMNS += ("pass@16", "distinct@16", "entropy", "entropy_start", "h_agg", "anchor")
COLUMNS += ("useless_share", "beta")
HELD, COLLAPSED = 0.65, 0.60  # H_agg / anchor: held above, collapsed below
BOOTSTRAP, CONFIDENCE = 10_000, 0.95


# ----------------------------------------------------------------------------------------- 1. runs
@dataclasses.dataclass(frozen=True)
class Run:
    """A row of the study, as study.run_job makes it, under a method's name."""

    method: str
    row: dict[str, Any]

    # of the row: siren.Config's fields; the probes of the base model and of the trained policy
    config = property(lambda self: self.row["config"])
    before = property(lambda self: self.row["before"])
    after = property(lambda self: self.row["after"])
    seed = property(lambda self: self.config["seed"])
    beta = property(lambda self: self.config["beta"])

    @property
    def vocab(self) -> int:
        """The world's vocabulary."""
        found = re.search("vocab=([0-9]+)", self.config["task"])
        return int(found[1]) if found else DEFAULT_VOCAB

    @cached_property
    def evals(self) -> dict[tuple[str, float], dict[str, float]]:
        """(grade, temperature) -> scores of the final evaluation."""
        return {(e["split"], e["temperature"]): e for e in self.row["evals"]}

    def hard(self, score: str) -> float:
        """A score on hard prompts at T = 0.6."""
        return self.evals["hard", 0.6][score]

    @property
    def held(self) -> float:
        """H_agg / H*, both of the probe: the final policy's over the base model's."""
        return self.after["h_agg"] / self.before["h_agg"]

    @property
    def exploded(self) -> bool:
        """Reward under a tenth of the base model's and more than 30 % useless tokens."""
        lost = self.after["reward"] < 0.1 * self.before["reward"]
        return lost and self.after["useless_share"] > 0.3

    @property
    def state(self) -> str:
        """held, collapsed, exploded, or between: neither of them by its definition."""
        if self.exploded:
            return "exploded"
        learned = self.after["reward"] >= self.before["reward"]
        if self.held >= HELD and learned and self.after["useless_share"] <= 0.3:
            return "held"
        return "collapsed" if self.held < COLLAPSED else "between"


def write_csv(runs: list[Run], path: Path) -> None:
    """main.csv or quick.csv: a row of COLUMNS for each run, grade and temperature.

    reward, entropies and useless_share are the probe's, so the same for each row of a run; anchor
    is the base model's H_agg by the probe.
    """
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for run in runs:
            shared = {"method": run.method, "seed": run.seed, "beta": run.beta, **run.after}
            shared |= {"steps": run.row["steps"], "anchor": run.before["h_agg"]}
            shared |= {"entropy_start": run.before["entropy"]}
            writer.writerows({**scores, **shared} for scores in run.row["evals"])


# ------------------------------------------------------------------------------------ 2. intervals
def bootstrap(values: Iterable[float]) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval: percentiles of the means of 10000 seeded resamples.

    >>> bootstrap([1.0, 1.0])
    (1.0, 1.0, 1.0)
    """
    x = np.array(list(values), dtype=float)
    draws = np.random.default_rng(0).integers(len(x), size=(BOOTSTRAP, len(x)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(x[draws].mean(1), [tail, 100 - tail])
    return float(x.mean()), float(low), float(high)


def paired(runs: list[Run], method: str, other: str, value: Callable[[Run], float]) -> list[float]:
    """method minus other, seed by seed, for the seeds that both have."""
    mine, theirs = ({r.seed: value(r) for r in runs if r.method == m} for m in (method, other))
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def grouped(runs: Iterable[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    """Runs by key, keys in the order in which they first come."""
    found: dict[Any, list[Run]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return found


# -------------------------------------------------------------------------------------- 3. figures
STYLES: dict[str, dict[str, Any]] = {
    "base": {"color": "0.55", "linestyle": (0, (1, 1)), "marker": "x"},
    "dr_grpo": {"color": "#000000", "linestyle": "--", "marker": "s"},
    "siren": {"color": "#0059b3", "linestyle": "-", "marker": "o"},
    "naive_bonus": {"color": "#b35900", "linestyle": ":", "marker": "^"},
    "naive_exploding": {"color": "#b35900", "linestyle": ":", "marker": "^"},
    "naive_best": {"color": "#cc79a7", "linestyle": "-.", "marker": "v"},
    "wo_top_p": {"color": "#009e73", "linestyle": "--", "marker": "P"},
    "wo_anchor": {"color": "#777777", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "D"},
}
NAMES = {
    "base": "base model",
    "dr_grpo": "Dr.GRPO",
    "naive_bonus": "naive bonus",
    "naive_best": "naive bonus, best",
    "naive_exploding": "naive bonus, exploding",
    "siren": "SIREN",
    "wo_top_p": "w/o top-p",
    "wo_peak": "w/o peak",
    "wo_anchor": "w/o anchor",
    "anchor_only": "anchor only",
}


def new_figure(columns: int, rows: int = 1, height: float = 3.4) -> tuple[Figure, np.ndarray]:
    """A figure of white panels: the figure and its axes [rows, columns]."""
    figure = Figure(figsize=(4.1 * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write the figure, without the date and version that would make each file different."""
    figure.savefig(path, dpi=130, metadata={"Software": None})


def curve(axes: Axes, runs: list[Run], point: Callable[[Run, dict], float | None]) -> None:
    """For each method a line over training steps: the mean over seeds; shaded: all seeds."""
    for method, own in grouped(runs, lambda run: run.method).items():
        by_step: dict[int, list[float]] = {}
        for run in own:
            for record in run.row["log"]:
                if (value := point(run, record)) is not None:
                    by_step.setdefault(record["step"], []).append(value)
        by_step = {step: v for step, v in sorted(by_step.items()) if len(v) == len(own)}
        if not by_step:
            continue
        steps, values = list(by_step), list(by_step.values())
        style = {**STYLES[method], "markevery": max(1, len(steps) // 6), "markersize": 4}
        axes.plot(steps, [np.mean(v) for v in values], label=NAMES[method], **style)
        spread = [[min(v) for v in values], [max(v) for v in values]]
        axes.fill_between(steps, *spread, color=style["color"], alpha=0.12, linewidth=0)
    axes.set_xlabel("step")
    axes.margins(x=0.02)


def of(key: str) -> Callable[[Run, dict], float | None]:
    """The record's value of a key."""
    return lambda run, record: record.get(key)


def ruled_ratio(run: Run, record: dict[str, Any]) -> float | None:
    """H_agg / H* of a record, for runs that train with p = tau = 0.8: others measure another H'."""
    if (run.config["top_p"], run.config["peak_quantile"]) != (0.8, 0.8) or "h_agg" not in record:
        return None
    return record["h_agg"] / run.row["anchor"]


def steps_figure(runs: list[Run], path: Path) -> None:
    """Entropy, H_agg and reward over training, and hard held-out prompts at the end."""
    figure, axes = new_figure(4)
    axes = axes[0]
    curve(axes[0], runs, of("entropy"))
    axes[0].set(title="entropy (nats per token)", yscale="log")
    axes[0].set_yticks(ENTROPY_TICKS, list(map(str, ENTROPY_TICKS)))
    axes[0].yaxis.set_minor_locator(NullLocator())
    axes[0].legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.9))
    curve(axes[1], runs, ruled_ratio)
    axes[1].axhline(1, color="0.7", linewidth=0.8)
    axes[1].set(title="H_agg / anchor", ylim=(0, 1.3))
    axes[1].legend(frameon=False, fontsize=8)
    curve(axes[2], runs, of("reward"))
    axes[2].set(title="reward (training prompts, T = 1)", ylim=(0, 1))
    bars(axes[3], runs, "hard", 0.6)
    save(figure, path)


ENTROPY_TICKS = (0.1, 0.2, 0.5, 1, 2, 5)
HATCHES = ("", "///", "...", "xx", "\\\\", "++", "--", "oo", "**")


def bars(axes: Axes, runs: list[Run], split: str, temperature: float) -> None:
    """avg, maj, pass and distinct @16 at the end, a bar for each method with its 95 % interval."""
    keys = ("avg@16", "maj@16", "pass@16", "distinct@16")
    by_method = grouped(runs, lambda run: run.method)
    width = 0.8 / len(by_method)
    for i, (method, own) in enumerate(by_method.items()):
        for j, key in enumerate(keys):
            mean, low, high = bootstrap(run.evals[split, temperature][key] for run in own)
            where = j + (i - (len(by_method) - 1) / 2) * width
            look = {"color": STYLES[method]["color"], "hatch": HATCHES[i], "edgecolor": "white"}
            label = NAMES[method] if j == 0 else None
            axes.bar(where, mean, 0.92 * width, label=label, **look)
            axes.errorbar(where, mean, [[mean - low], [high - mean]], color="0.4", capsize=2)
    axes.set_xticks(range(len(keys)), keys, fontsize=8)
    axes.set(title=f"{split} held-out prompts, T = {temperature:g}", ylim=(0, 1.02))


def diversity_figure(runs: list[Run], path: Path) -> None:
    """maj@16, pass@16 and distinct@16 on held-out prompts over training, T = 0.6."""
    figure, axes = new_figure(3, 2)
    for row, split in zip(axes, ("hard", "easy")):
        for panel, key in zip(row, ("maj@16", "pass@16", "distinct@16")):
            curve(panel, runs, of(f"{split}/{key}"))
            panel.set(title=f"{key}, {split} prompts", ylim=(0, 1.02))
    axes[0, 0].legend(frameon=False, fontsize=8)
    save(figure, path)


def k_figure(runs: list[Run], path: Path) -> None:
    """pass@k and maj@k for k = 1, 2, 4, ..., easy and hard prompts, both temperatures."""
    shown = grouped(runs, lambda run: run.method)
    temperatures = sorted({temperature for _, temperature in runs[0].evals})
    figure, axes = new_figure(4, len(temperatures))
    for row, temperature in zip(axes, temperatures):
        cells = [(split, kind) for split in ("hard", "easy") for kind in ("pass", "maj")]
        for panel, (split, kind) in zip(row, cells):
            for method, own in shown.items():
                values = own[0].evals[split, temperature]
                ks = [int(key.split("@")[1]) for key in values if key.startswith(kind + "@")]
                means = [
                    np.mean([run.evals[split, temperature][f"{kind}@{k}"] for run in own])
                    for k in ks
                ]
                panel.plot(ks, means, label=NAMES[method], markersize=4, **STYLES[method])
            panel.set_xscale("log", base=2)
            panel.set_xticks(ks, list(map(str, ks)))
            panel.set(title=f"{kind}@k, {split}, T = {temperature:g}", ylim=(0, 1.02), xlabel="k")
    axes[0, 0].legend(frameon=False, fontsize=8)
    save(figure, path)


def positions_figure(runs: list[Run], path: Path) -> None:
    """Where the nucleus entropy H' sits in a response: the base model and trained policies.

    Odd positions from 3 on are sums, which are facts; the others choose the next term.
    """
    figure, axes = new_figure(2)
    titles = {"nucleus_entropy": "H' (nats) by response position", "peak": "share that are peaks"}
    shown = {"base": ([run.before for run in runs if run.method == "dr_grpo"])}
    for method, own in grouped(runs, lambda run: run.method).items():
        shown[method] = [run.after for run in own]
    for panel, (key, title) in zip(axes[0], titles.items()):
        for method, probes in shown.items():
            lines = [probe["by_position"][key][:FULL_RESPONSE] for probe in probes]
            where = range(1, 1 + min(map(len, lines)))
            mean = np.mean([line[: len(where)] for line in lines], axis=0)
            panel.plot(where, mean, label=NAMES[method], markersize=4, **STYLES[method])
        panel.set(title=title, xlabel="position (odd from 3 on: sums; 12: end)")
        panel.set_xticks(range(1, 1 + FULL_RESPONSE))
    axes[0, 0].legend(frameon=False, fontsize=8)
    save(figure, path)


FULL_RESPONSE = 12  # tokens of a full response in the default world


def against(
    axes: Axes, runs: list[Run], x: Callable[[Run], float], y: Callable[[Run], float], **style: Any
) -> None:
    """The mean of y over seeds as a line over x, and each seed as a small point."""
    by_x = grouped(sorted(runs, key=x), x)
    if not by_x:
        return
    axes.plot(list(by_x), [np.mean([y(run) for run in own]) for own in by_x.values()], **style)
    for value, own in by_x.items():
        axes.plot([value] * len(own), [y(run) for run in own], ".", color="0.6", markersize=3)


# what is drawn over a coefficient: title, value, lines that separate the states
Measure = tuple[str, Callable[[Run], float], tuple[float, ...]]
OVER_BETA: tuple[Measure, ...] = (
    ("H_agg / base model's", lambda run: run.held, (HELD, 1.0)),
    ("useless tokens (share)", lambda run: run.after["useless_share"], (0.3,)),
    ("reward", lambda run: run.after["reward"], ()),
    ("maj@16, hard, T = 0.6", lambda run: run.hard("maj@16"), ()),
)


def band_figure(runs: list[Run], path: Path) -> None:
    """Naive bonus and SIREN over their coefficient; the dashed level is Dr.GRPO, beta = 0."""
    figure, axes = new_figure(len(OVER_BETA))
    for panel, measure in zip(axes[0], OVER_BETA):
        band_panel(panel, runs, measure)
    axes[0, 0].legend(frameon=False, fontsize=8)
    save(figure, path)


def band_panel(axes: Axes, runs: list[Run], measure: Measure) -> None:
    """One measure over the coefficient of each method that is there."""
    title, value, levels = measure
    for method in ("naive_bonus", "siren", "wo_top_p"):
        own = [run for run in runs if run.method == method]
        style = {**STYLES[method], "markersize": 4}
        against(axes, own, lambda run: run.beta, value, label=NAMES[method], **style)
    zero = [value(run) for run in runs if run.method == "dr_grpo"]
    if zero:
        axes.axhline(np.mean(zero), color="black", linestyle="--", label=NAMES["dr_grpo"])
    for level in levels:
        axes.axhline(level, color="0.8", linewidth=0.8)
    axes.set(title=title, xlabel="beta", xscale="log", ylim=(0, None))


def vocabularies_figure(runs: list[Run], path: Path) -> None:
    """The sweep for each size of the useless vocabulary, in a column of its own."""
    by_size = grouped(sorted(runs, key=lambda run: run.vocab), lambda run: run.vocab)
    figure, axes = new_figure(len(by_size), 2)
    for column, (size, own) in zip(axes.T, by_size.items()):
        for panel, (title, *rest) in zip(column, OVER_BETA[:2]):
            band_panel(panel, own, (f"{title}; {size} tokens", *rest))
    for panel in axes[0]:
        panel.set_ylim(0, 2)
    for panel in axes[1]:  # down to a thousandth, and 0
        panel.set_yscale("symlog", linthresh=1e-3)
        panel.set_ylim(0, 1.2)
    axes[0, 0].legend(frameon=False, fontsize=8)
    save(figure, path)


KNOBS = {"top_p": "p", "peak_quantile": "tau", "beta": "beta"}


def around(runs: list[Run], knob: str, beta: float) -> list[Run]:
    """The SIREN runs that differ from p = tau = 0.8 and this beta in this knob alone."""
    centre = {"top_p": 0.8, "peak_quantile": 0.8, "beta": beta}
    same = {name: value for name, value in centre.items() if name != knob}
    return [run for run in runs if run.method == "siren" and same.items() <= run.config.items()]


def sensitivity_figure(runs: list[Run], path: Path, beta: float) -> None:
    """H_agg and accuracy on hard validation prompts over p, tau and beta, one at a time."""
    keys = {"avg@16": ":", "maj@16": "-", "pass@16": "--", "distinct@16": "-."}
    figure, axes = new_figure(3, 2)
    zero = [run for run in runs if run.method == "dr_grpo"]
    for column, (knob, name) in zip(axes.T, KNOBS.items()):
        own, x = around(runs, knob, beta), lambda run, knob=knob: run.config[knob]
        against(column[0], own, x, lambda run: run.held, color="#0059b3", marker="o")
        column[0].axhline(np.mean([run.held for run in zero]), color="black", linestyle="--")
        column[0].axhline(HELD, color="0.8", linewidth=0.8)
        column[0].set(title=f"H_agg / base model's, over {name}", ylim=(0, 1.3), xlabel=name)
        for (key, line), marker in zip(keys.items(), "sovD"):
            look = {"linestyle": line, "marker": marker, "markersize": 4, "color": "black"}
            against(column[1], own, x, lambda run, key=key: run.hard(key), label=key, **look)
        column[1].set(title=f"hard prompts, T = 0.6, over {name}", ylim=(0, 1.02), xlabel=name)
        for panel in column:
            panel.set_xscale("log" if knob == "beta" else "linear")
    axes[1, 0].legend(frameon=False, fontsize=8)
    axes[0, 0].annotate("dashed: Dr.GRPO", (0.03, 0.05), xycoords="axes fraction", fontsize=8)
    save(figure, path)


# the methods of each of the main table's figures
FEW = ("dr_grpo", "naive_best", "naive_exploding", "siren", "wo_anchor")
FOUR = ("base", "dr_grpo", "naive_best", "siren")


def draw_all(results: dict[str, list[Run]], out: Path, beta: float) -> None:
    """Every figure of the groups that are there. beta: that of the sensitivity to p and tau."""

    def of_methods(methods: tuple[str, ...]) -> list[Run]:
        return [run for run in results["table"] if run.method in methods]

    if runs := results.get("quick"):
        steps_figure(runs, out / "quick.png")
    if results.get("table"):
        steps_figure(of_methods(FEW), out / "entropy.png")
        diversity_figure(of_methods(FEW), out / "diversity.png")
        k_figure(of_methods(FOUR), out / "pass_at_k.png")
        positions_figure(of_methods(FOUR[1:]), out / "positions.png")
    if runs := results.get("band"):
        band_figure(runs, out / "band.png")
    if runs := results.get("vocabularies"):
        vocabularies_figure(runs, out / "vocabularies.png")
    if runs := results.get("sensitivity"):
        sensitivity_figure(runs, out / "sensitivity.png", beta)


# --------------------------------------------------------------------------------------- 4. tables
SCORES = ("avg@16", "maj@16", "pass@16", "distinct@16")


def interval(values: Iterable[float]) -> str:
    """Mean and interval as text.

    >>> interval([0.5, 0.5])
    '0.500 [0.500, 0.500]'
    """
    return "{:.3f} [{:.3f}, {:.3f}]".format(*bootstrap(values))


def markdown(head: list[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]


def score_tables(runs: list[Run]) -> list[str]:
    """For each grade and temperature: every method's scores, and their difference to Dr.GRPO's."""
    lines, by_method = [], grouped(runs, lambda run: run.method)
    for cell in sorted(runs[0].evals, key=lambda cell: (cell[1], cell[0])):

        def score(key: str, cell: tuple[str, float] = cell) -> Callable[[Run], float]:
            return lambda run: run.evals[cell][key]

        means, gains = [], []
        for method, own in by_method.items():
            name = NAMES.get(method, method)
            means.append([name, *(interval(map(score(key), own)) for key in SCORES)])
            if method != "dr_grpo":
                pairs = (paired(runs, method, "dr_grpo", score(key)) for key in SCORES)
                gains.append([name, *map(interval, pairs)])
        lines += [f"### {cell[0]} prompts, T = {cell[1]:g}", "", "Mean and 95 % interval:", ""]
        lines += markdown(["method", *SCORES], means)
        lines += ["Minus Dr.GRPO, paired by seed:", "", *markdown(["method", *SCORES], gains)]
    return lines


def policy_table(runs: list[Run]) -> list[str]:
    """Coefficient, reward, entropies and useless tokens of each method at the end of training."""
    columns: dict[str, Callable[[Run], float]] = {
        "reward": lambda run: run.after["reward"],
        "entropy": lambda run: run.after["entropy"],
        "entropy / base's": lambda run: run.after["entropy"] / run.before["entropy"],
        "H_agg / base's": lambda run: run.held,
        "useless share": lambda run: run.after["useless_share"],
    }
    rows = []
    for method, own in grouped(runs, lambda run: run.method).items():
        steps = "/".join(sorted({str(run.row["steps"]) for run in own}))
        betas = "/".join(sorted({f"{run.beta:g}" for run in own}))
        cells = [interval(map(value, own)) for value in columns.values()]
        rows.append([NAMES[method], betas, len(own), steps, *cells])
    return markdown(["method", "beta", "seeds", "steps", *columns], rows)


def sweep_table(runs: list[Run], columns: dict[str, Callable[[Run], str]]) -> list[str]:
    """One row for each setting: the mean over its seeds, and each seed's state."""
    rows = []
    for setting, own in grouped(runs, lambda r: tuple(f(r) for f in columns.values())).items():
        means = [np.mean([run.hard(key) for run in own]) for key in SCORES]
        means += [np.mean([run.held for run in own])]
        means += [np.mean([run.after["useless_share"] for run in own])]
        states = ", ".join(run.state for run in own)
        rows.append([*setting, *(f"{mean:.3f}" for mean in means), states])
    hard = [f"{key} hard" for key in SCORES]
    return markdown([*columns, *hard, "H_agg / base's", "useless", "state of each seed"], rows)


def held_range(runs: list[Run], method: str) -> tuple[float, float] | None:
    """The widest run of neighbouring coefficients, held on every seed: smallest and largest."""
    own = sorted((run for run in runs if run.method == method), key=lambda run: run.beta)
    best, low = None, None
    for beta, some in grouped(own, lambda run: run.beta).items():
        if not all(run.state == "held" for run in some):
            low = None
            continue
        low = low or beta
        if best is None or beta / low > best[1] / best[0]:
            best = (low, beta)
    return best


Claim = tuple[str, bool, str]  # what is claimed, does it hold, the numbers


def table_claims(runs: list[Run]) -> list[Claim]:
    """The claims that the main table can bear out or not."""
    own = {m: {r.seed: r for r in some} for m, some in grouped(runs, lambda r: r.method).items()}
    collapsed, blown = own["dr_grpo"], [r.exploded for r in own["naive_exploding"].values()]
    ratio = max(run.after["entropy"] / run.before["entropy"] for run in collapsed.values())
    distinct = "distinct@16"
    left = max(r.hard(distinct) / own["base"][s].hard(distinct) for s, r in collapsed.items())
    held, lost = min(r.held for r in own["siren"].values()), max(r.held for r in collapsed.values())
    text = {
        "ratio": "collapse: Dr.GRPO's entropy is at most a third of the base's",
        "left": "collapse: Dr.GRPO's distinct@16 falls by at least 40 % (hard, T = 0.6)",
        "blown": "explosion: reward under a tenth of the base's, useless tokens above 30 %",
        "held": f"held: SIREN's H_agg is at least {HELD:.0%} of the base's",
        "lost": f"held: Dr.GRPO's is under {COLLAPSED:.0%}",
    }
    claims = [
        (text["ratio"], ratio <= 1 / 3, f"at most {ratio:.3f}"),
        (text["left"], left <= 0.6, f"by at least {1 - left:.1%}"),
        (text["blown"], all(blown), f"{sum(blown)} of {len(blown)} seeds"),
        (text["held"], held >= HELD, f"at least {held:.1%}"),
        (text["lost"], lost < COLLAPSED, f"at most {lost:.1%}"),
    ]
    return [(f"{claim}, every seed", *rest) for claim, *rest in claims] + effect_claims(runs)


def effect_claims(runs: list[Run]) -> list[Claim]:
    """SIREN against Dr.GRPO on hard prompts: a gain of this much, with an interval above 0; where
    no gain is asked for, that the interval is not below 0."""
    claims = []
    for key, least in {"maj@16": 0.08, "pass@16": 0.10, "avg@16": 0.0}.items():
        gains = paired(runs, "siren", "dr_grpo", lambda run, key=key: run.hard(key))
        mean, low, high = bootstrap(gains)
        holds = mean >= least and low > 0 if least else high >= 0
        what = f"at least +{least:.2f}, interval above 0" if least else "not behind"
        text = f"effect: SIREN minus Dr.GRPO, {key}, hard, T = 0.6: {what}"
        claims.append((text, holds, interval(gains)))
    return claims


def band_claims(runs: list[Run]) -> list[Claim]:
    """The claims that the coefficient sweep can bear out or not."""
    naive = grouped((run for run in runs if run.method == "naive_bonus"), lambda run: run.beta)
    blown = [beta for beta, some in naive.items() if all(run.exploded for run in some)]
    lost = [beta for beta, some in naive.items() if all(run.held < COLLAPSED for run in some)]
    tenfold = [f"{b:g} and {low:g}" for b in blown for low in lost if 9.9 < b / low < 10.1]
    width, text = {}, {}
    for method in ("siren", "naive_bonus"):
        low, high = held_range(runs, method) or (1.0, 0.0)
        width[method] = high / low
        text[method] = f"{low:g} to {high:g} (x{high / low:.3g})" if high else "none"
    low, high = held_range(runs, "siren") or (1.0, 0.0)
    zero = {run.seed: run.hard("distinct@16") for run in runs if run.method == "dr_grpo"}
    held = [run for run in runs if run.method == "siren" and low <= run.beta <= high]
    least = min((run.hard("distinct@16") / zero[run.seed] for run in held), default=0.0)
    explodes = "explosion: a coefficient explodes, one 10 times smaller collapses"
    tenfold_held = "held: SIREN, over coefficients 10 times apart"
    wider = "held: SIREN over a wider range than the naive bonus"
    distinct = "held: there SIREN's distinct@16 is at least 1.8 times Dr.GRPO's, every seed"
    both = f"SIREN {text['siren']}, naive bonus {text['naive_bonus']}"
    return [
        (explodes, bool(tenfold), "; ".join(tenfold) or "none"),
        (tenfold_held, width["siren"] > 9.9, text["siren"]),  # 9.9: rounding
        (wider, width["siren"] > width["naive_bonus"], both),
        (distinct, least >= 1.8, f"at least {least:.2f} times (hard, T = 0.6)"),
    ]


def cost_table(results: dict[str, list[Run]]) -> list[str]:
    """Jobs, hours on one thread, commits and versions of each group."""
    rows = []
    for group, runs in results.items():
        if runs:
            spent = [run.row["seconds"] for run in runs]
            hours = [f"{sum(s[key] for s in spent) / 3600:.2f}" for key in ("train", "evaluate")]
            commits = ", ".join(sorted({str(run.row["commit"]) for run in runs}))
            versions = ", ".join(f"{k} {v}" for k, v in runs[0].row["versions"].items())
            rows.append([group, len(runs), *hours, commits, versions])
    return markdown(["group", "jobs", "training (h)", "evaluation (h)", "commit", "versions"], rows)


TABLES_HEAD = """# Tables of the study

Written by `python examples/study.py --report` from results/raw; README.md beside it explains.
Intervals: percentile bootstrap over seeds, 10000 resamples, 95 %. H_agg is measured with
p = tau = 0.8 whatever the method trains with.
"""
COLUMN: dict[str, Callable[[Run], str]] = {
    "method": lambda run: NAMES.get(run.method, run.method),
    "vocabulary": lambda run: str(run.vocab),
    "p": lambda run: f"{run.config['top_p']:g}",
    "tau": lambda run: f"{run.config['peak_quantile']:g}",
    "beta": lambda run: f"{run.beta:g}",
    "variant": lambda run: run.method,
}
SWEEPS = {  # group: title, columns that name a setting
    "tune": ("Choice of coefficients (validation seeds and prompts)", "method beta"),
    "band": ("Coefficient sweep", "method beta"),
    "vocabularies": ("Sizes of the vocabulary", "vocabulary method beta"),
    "sensitivity": ("Sensitivity", "method p tau beta"),
    "official": ("The definition and the official code", "variant"),
}


def tables(results: dict[str, list[Run]]) -> str:
    """tables.md: what the complete groups say, in markdown."""
    lines = [TABLES_HEAD]
    for group, title in {"quick": "Quick", "table": "Main table", "fresh": "Fresh seeds"}.items():
        if runs := results.get(group):
            lines += [f"## {title}", "", *policy_table(runs), *score_tables(runs)]
    claims: dict[str, list[Claim]] = {}
    if table := results.get("table", []):
        claims["Claims of the main table"] = table_claims(table)
    if fresh := results.get("fresh"):
        claims["The effect on fresh seeds"] = effect_claims(fresh)
        claims["The effect on all seeds"] = effect_claims(fresh + table)
    if runs := results.get("band"):
        claims["Claims of the coefficient sweep"] = band_claims(runs)
    for title, some in claims.items():
        rows = [[text, "yes" if ok else "NO", numbers] for text, ok, numbers in some]
        lines += [f"## {title}", "", *markdown(["claim", "holds", "measured"], rows)]
    for group, (title, columns) in SWEEPS.items():
        if runs := results.get(group):
            settings = {name: COLUMN[name] for name in columns.split()}
            lines += [f"## {title}", "", *sweep_table(runs, settings)]
    return "\n".join([*lines, "## Cost and origin", "", *cost_table(results)])


def write_report(results: dict[str, list[Run]], out: Path, beta: float) -> None:
    """The CSV files, figures and tables of the groups that are there."""
    for group, name in (("quick", "quick"), ("table", "main")):
        if runs := results.get(group):
            write_csv([run for run in runs if run.method != "base"], out / f"{name}.csv")
    draw_all(results, out, beta)
    (out / "tables.md").write_text(tables(results))
