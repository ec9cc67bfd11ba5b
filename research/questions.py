"""The numbers of docs/questions.md, from the files in results/.

    python research/questions.py        # writes the numbers into the page
    python research/questions.py --check    # exit code 1 if the page has other ones

In the page a number stands between <!-- name --> and <!-- / -->; FACTS has a function for each
name. What has no rows yet says so.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above

import siren
from research import study, study_report, three_ways, three_ways_report
from research.three_ways import WAYS
from research.three_ways_report import at, by, paired, read_csv
from research.tools import Parser, run_tool, write_whole

RESULTS = study.ROOT / "results"
PAGE = study.ROOT / "docs" / "questions.md"
PLACE = re.compile(r"(<!-- ([\w ]+) -->).*?(<!-- / -->)", re.DOTALL)
NOT_YET = "no number yet"
ENOUGH = 6  # seeds for an interval
Seeds = dict[int, dict[str, Any]]


# ------------------------------------------------------------------------- how it is said
def short(number: float, sign: str = "") -> str:
    """Two decimals, as .64; three for what would be .00.

    >>> short(0.638), short(-0.04, "+"), short(12.5), short(0.0031)
    ('.64', '-.04', '12.50', '.003')
    """
    digits = 3 if 0.0005 <= abs(number) < 0.005 else 2
    return re.sub(r"\b0\.", ".", f"{number:{sign}.{digits}f}")


def interval(values: Iterable[float], sign: str = "") -> str:
    """Mean and 95 % interval; of fewer than six seeds the smallest and the largest value, for
    an interval would say too much. What is not a number is left out; NOT_YET if nothing is
    left.

    >>> interval([0.5] * 6), interval([0.25, 0.5]), interval([0.5, math.nan]), interval([])
    ('.50 [.50, .50]', '.38 (.25 to .50)', '.50', 'no number yet')
    """
    numbers = [x for x in values if not math.isnan(x)]
    if not numbers:
        return NOT_YET
    middle, low, high = (short(x, sign) for x in study_report.bootstrap(numbers))
    if len(numbers) >= ENOUGH:
        return f"{middle} [{low}, {high}]"
    low, high = short(min(numbers), sign), short(max(numbers), sign)
    return f"{middle} ({low} to {high})" if len(numbers) > 1 else middle


def stands(p: float, seeds: int, comparisons: int) -> str:
    """Does a difference stand after Holm's correction? With few seeds even differences of one
    sign on all seeds can't.

    >>> stands(0.01, 16, 12), stands(0.2, 16, 12), stands(1.0, 6, 12)
    ('yes', 'no', 'too few seeds')
    """
    if comparisons * 2 / 2**seeds > 0.05:
        return "too few seeds"
    return "yes" if p < 0.05 else "no"


def difference(one: Seeds, other: Seeds, value: Callable[[dict], float]) -> str:
    """one - other, paired by seed."""
    return interval(paired(one, other, value), "+")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table; a sentence in its place if it has no number yet."""
    if all(NOT_YET in cell for row in rows for cell in row[1:]):
        return "No number yet: `python research/three_ways.py` has not come to this."
    return "\n\n" + "\n".join(study_report.markdown(head, rows))


# ----------------------------------------------------------------------------------- the files
class Files:
    """What results/ holds."""

    def __init__(self, folder: Path) -> None:
        self.main = self.hard(folder / "main.csv")
        self.zoo = self.hard(folder / "zoo.csv")
        self.ways = read_csv(folder / "three_ways.csv")
        self.course = read_csv(folder / "three_ways_course.csv")
        self.many = read_csv(folder / "three_ways_many.csv")
        self.tokens = read_csv(folder / "tokens.csv")
        lines = (folder / "default_run.jsonl").read_text().splitlines()
        self.run = [json.loads(line) for line in lines]
        self.store = study.Store(folder)

    @staticmethod
    def hard(path: Path) -> dict[str, Seeds]:
        """Method -> seed -> line, on hard prompts at T = 0.6."""
        return by(read_csv(path), grade="hard", temperature=0.6)

    @property
    def hard_ways(self) -> dict[str, Seeds]:
        """The same of three_ways.csv."""
        return by(self.ways, grade="hard", temperature=0.6)

    @property
    def seeds(self) -> int:
        """How many test seeds three_ways.csv has."""
        return len(self.hard_ways.get("siren", {}))


# ----------------------------------------------------------------------------------- the facts
FEW = ("base", "dr_grpo", "naive_bonus", "siren", "anchor_only")
SHORT = {**three_ways_report.EVERY, "naive_bonus": "naive bonus", "wo_top_p": "without top-p"}
VALUES = {
    "top_p": (0.7, 0.8, 0.85, 0.9, 1.0),
    "peak_quantile": (0.0, 0.4, 0.6),
    "beta": (0.06, 0.2, 0.6),
}


def range_of(files: Files, knob: str, values: tuple[float, ...]) -> str:
    """The lowest and the highest mean of maj@16 over some values of a setting."""
    rows = study_report.labelled("sensitivity", study.Size(), files.store)[f"siren, {knob}"]
    found = [
        mean(study.score(row, "maj@16") for row in rows if row["config"][knob] == value)
        for value in values
    ]
    return f"{short(min(found))} to {short(max(found))}"


def two_methods(one: str, other: str, score: str) -> Callable[[Files], str]:
    """The paired difference of two methods in a score of main.csv."""
    return lambda files: difference(files.main[one], files.main[other], at(score))


def zoo(name: str, score: str) -> Callable[[Files], str]:
    """A method's mean in zoo.csv, without interval."""
    return lambda files: short(mean(x[score] for x in files.zoo[name].values()))


def share_of_right(way: str) -> Callable[[dict], float]:
    """The share of right responses that are right in this way."""
    return lambda line: line[way] / line["avg@16"] if line["avg@16"] else math.nan


def ways_table(files: Files) -> str:
    """What happens at gaps, and in which way responses are right."""
    values = {"p(right sum) at gaps": at("gap_p_right"), "H at gaps, nats": at("gap_entropy")}
    values |= {f"right ones: {way}": share_of_right(way) for way in WAYS[:3]}
    rows = []
    for name in FEW:
        seeds = files.hard_ways.get(name, {})
        rows.append(
            [SHORT[name], *(interval(map(x, seeds.values())) for x in values.values())]
        )
    return table(["", *values], rows)


def tested_table(found: dict[tuple[str, ...], list[float]], head: list[str]) -> str:
    """Differences, and whether they stand after Holm's correction over all of `found`."""
    found = {key: values for key, values in found.items() if values}
    p = study_report.holm({key: study_report.sign_flip(x) for key, x in found.items()})
    rows = [
        [*key, interval(values, "+"), stands(p[key], len(values), len(found))]
        for key, values in found.items()
    ]
    return table([*head, "difference", "stands"], rows)


def naive_table(files: Files) -> str:
    """The naive bonus minus Dr.GRPO, way by way; T = 0.6 is shown, both are corrected for."""
    found = three_ways_report.does_it_explain(files.ways) if files.seeds else {}
    return only(tested_table(found, ["", "T", "way"]), "0.6")


def counts_table(files: Files) -> str:
    """SIREN minus others in pass@16 and avg if only sound or only clean responses count."""
    found = three_ways_report.is_it_ahead(files.ways) if files.seeds else {}
    text = only(tested_table(found, ["", "T", "score", "counts"]), "0.6")
    shown = "|".join(map(re.escape, ("Dr.GRPO", "naive bonus, best", "anchor only")))
    lines = text.splitlines()
    kept = [
        x for x in lines if not x.startswith("| SIREN") or re.search(f"- ({shown}) \\|", x)
    ]
    return "\n".join(kept) + "\n" * text.endswith("\n")


def only(text: str, temperature: str) -> str:
    """A table's rows at that temperature, without the column that says so."""
    lines = []
    for line in text.splitlines(keepends=True):
        cells = line.split(" | ")
        if line.startswith("|---"):
            lines.append(line.replace("---|", "", 1))
        elif len(cells) < 4:
            lines.append(line)
        elif cells[1] in ("T", temperature):
            lines.append(" | ".join(cells[:1] + cells[2:]))
    return "".join(lines)


def lead_change(kind: str) -> Callable[[Files], str]:
    """By how much SIREN's lead over Dr.GRPO in pass@k changes from k = 16 to 64."""

    def growth(row: dict) -> float:
        (found,) = [e for e in row["evals"] if (e["grade"], e["temperature"]) == ("hard", 0.6)]
        return found[f"{kind}pass@64"] - found[f"{kind}pass@16"]

    def change(files: Files) -> str:
        rows = three_ways_report.finished(three_ways.Size(), files.store)
        return difference(rows.get("siren", {}), rows.get("dr_grpo", {}), growth)

    return change


def beyond_itself(files: Files) -> list[float]:
    """The base model against itself: of the prompts that 64 samples solve, the share that 64
    others do not, a value for each seed. It is pass@128 / pass@64 - 1."""
    few, more = (by(files.many, temperature=0.6, k=k).get("base", {}) for k in (64, 128))
    return [more[seed]["pass"] / few[seed]["pass"] - 1 for seed in few]


def lead_in_steps(files: Files, vocab: int) -> str:
    """Anchor only minus SIREN in steps to a reward of .4."""
    found = by(files.tokens, vocabulary=vocab)
    steps = paired(found.get("anchor_only", {}), found.get("siren", {}), at("speed"))
    return f"{mean(steps):.0f}" if steps else NOT_YET


def many_table(files: Files) -> str:
    """pass@k and maj@k with up to 256 samples."""
    rows = []
    values = [(kind, k) for kind in ("pass", "sound/pass", "maj") for k in (16, 256)]
    for name in FEW[:4]:
        cells = []
        for kind, k in values:
            found = by(files.many, temperature=0.6, k=k).get(name, {})
            cells.append(interval(x[kind] for x in found.values()))
        rows.append([SHORT[name], *cells])
    titles = {"pass": "pass@{}", "sound/pass": "pass@{}, sound only", "maj": "maj@{}"}
    return table(["", *(titles[kind].format(k) for kind, k in values)], rows)


def tokens_table(files: Files) -> str:
    """Learning speed and reward at the end, by vocabulary."""
    rows = []
    for name in ("dr_grpo", "siren", "wo_top_p", "anchor_only"):
        for vocab in sorted({x["vocabulary"] for x in files.tokens}):
            seeds = by(files.tokens, vocabulary=vocab).get(name, {})
            steps = [x["speed"] for x in seeds.values()]
            cell = NOT_YET
            if steps:
                cell = f"{mean(steps):.0f} ({min(steps):.0f} to {max(steps):.0f})"
            cells = [interval(x[y] for x in seeds.values()) for y in ("end_reward", "end_H")]
            rows.append([f"{SHORT[name]}, {vocab:g}", str(len(seeds)), cell, *cells])
    head = ["method, tokens", "seeds", "steps to a reward of .4 (range)", "reward at the end"]
    return table([*head, "H at the end"], rows or [["", NOT_YET]])


def coins_table(files: Files) -> str:
    """Before training, and after it on coin flips."""
    names = ("base", "dr_grpo_coins", "siren_coins")
    values = {"right on training prompts": "reward", "H": "entropy"}
    values |= {"avg@16, hard": "avg@16", "pass@16, hard": "pass@16"}
    rows = []
    for name in names:
        seeds = files.hard_ways.get(name, {})
        cells = [interval(x[y] for x in seeds.values()) for y in values.values()]
        rows.append([SHORT[name], str(len(seeds)), *cells])
    missing = [row[0] for row in rows[1:] if row[1] == "0"]
    return table(["", "seeds", *values], rows if not missing else [["", NOT_YET]])


def order_table(files: Files) -> str:
    """SIREN minus the quantile over the full H."""
    hard = files.hard_ways
    found = {
        (score,): paired(hard.get("siren", {}), hard.get("token_first", {}), at(score))
        for score in ("avg@16", "maj@16", "pass@16")
    }
    return tested_table(found, [""])


def course_table(files: Files) -> str:
    """At equal training reward, and against Dr.GRPO stopped early. In bold is what stands
    after Holm's correction; at a reward of .5 alone anything was tested."""
    rows = []
    if files.course:
        for reward in three_ways_report.REWARDS:
            found = three_ways_report.at_equal_reward(files.course, reward)
            p = study_report.holm({key: study_report.sign_flip(x) for key, x in found.items()})
            tested = reward == three_ways_report.TESTED_REWARD
            for pair in dict.fromkeys(pair for pair, _ in found):
                if tested or pair == "SIREN - Dr.GRPO":
                    keys = [(pair, f"{score}@16") for score in ("pass", "maj")]
                    cells = [interval(found[key], "+") for key in keys]
                    if tested:
                        cells = bold(cells, [p[key] < 0.05 for key in keys])
                    title = f"{pair}, at a reward of {short(reward)}"
                    rows.append([title, str(len(found[keys[0]])), *cells])
        found = three_ways_report.early_stop(files.course)
        own = [found["SIREN - Dr.GRPO, stopped early", f"{x}@16"] for x in ("pass", "maj")]
        title = "SIREN's end - Dr.GRPO at its best step"
        rows.append([title, str(len(own[0])), *(interval(x, "+") for x in own)])
    return table(["", "seeds", "pass@16", "maj@16"], rows or [["", NOT_YET]])


def bold(cells: list[str], which: list[bool]) -> list[str]:
    """The cells, some of them in bold.

    >>> bold(["a", "b"], [True, False])
    ['**a**', 'b']
    """
    return [f"**{cell}**" if yes else cell for cell, yes in zip(cells, which, strict=True)]


def exploded(methods: dict[str, Seeds]) -> str:
    """Seeds on which the constrained bonus ends with more than 30 % useless tokens."""
    found = [x["useless_share"] > 0.3 for x in methods.get("constrained", {}).values()]
    return f"{sum(found)} of {len(found)}"


def steps_of_run(name: str, value: Callable[[list[float]], float]) -> Callable[[Files], str]:
    """Something about a metric of the default run's 200 steps."""
    return lambda files: short(value([x[name] for x in files.run if name in x]))


def facts() -> dict[str, Callable[[Files], str]]:
    """Name -> its number or table."""
    found: dict[str, Callable[[Files], str]] = {
        "seeds": lambda files: f"{files.seeds} of {len(study.Size().test_seeds)}",
        "ways table": ways_table,
        "naive table": naive_table,
        "counts table": counts_table,
        "many table": many_table,
        "tokens table": tokens_table,
        "coins table": coins_table,
        "order table": order_table,
        "course table": course_table,
        "best step": lambda files: three_ways_report.early_steps(files.course) or NOT_YET,
        "explosions": lambda files: exploded(files.main),
        "explosions again": lambda files: exploded(files.hard_ways),
        "lead change right": lead_change(""),
        "lead change clean": lead_change("clean/"),
        "base NDR": lambda files: short(mean(beyond_itself(files))),
        "base SRR": lambda files: short(1 - mean(beyond_itself(files))),
        "lead 96": lambda files: lead_in_steps(files, 96),
        "lead 1024": lambda files: lead_in_steps(files, study.VOCAB),
        "naive minus same lr avg": two_methods("naive_bonus", "dr_grpo_same_lr", "avg@16"),
    }
    for name in ("siren", "naive_bonus"):
        found[f"{name} fills more"] = lambda files, one=name: difference(
            files.hard_ways.get(one, {}),
            files.hard_ways.get("dr_grpo_same_lr", {}),
            share_of_right("filled"),
        )
    for knob, values in VALUES.items():
        found[f"maj by {knob}"] = lambda files, k=knob, v=values: range_of(files, k, v)
    for other in ("constrained", "anchor_only"):
        for score in ("avg", "maj", "pass"):
            found[f"siren minus {other} {score}"] = two_methods("siren", other, f"{score}@16")
    found["naive minus dr_grpo avg"] = two_methods("naive_bonus", "dr_grpo", "avg@16")
    for name in ("siren", "dr_grpo", "trl_adaptive"):
        for score in ("SRR", "NDR", "useless_share", "pass@16", "maj@16"):
            found[f"{name} {score.partition('@')[0]}"] = zoo(name, score)
    for name in ("reward", "h_agg", "entropy"):
        found[f"run {name} first"] = steps_of_run(name, lambda x: x[0])
        found[f"run {name} last"] = steps_of_run(name, lambda x: mean(x[-10:]))
    found["run policy loss"] = lambda files: f"{mean_size(files, 'policy_loss'):.3f}"[1:]
    found["run clip"] = lambda files: f"{mean_size(files, 'clip_fraction'):.3f}"[1:]
    return found


def mean_size(files: Files, name: str) -> float:
    """The mean of the size of a metric over the default run's steps."""
    return mean(abs(x[name]) for x in files.run if name in x)


def filled(text: str, files: Files) -> str:
    """The page with the numbers that the files give. ValueError for an unknown name."""
    known = facts()

    def number(found: re.Match) -> str:
        if found[2] not in known:
            raise ValueError(f"<!-- {found[2]} -->: no such number")
        return f"{found[1]}{known[found[2]](files)}{found[3]}"

    return PLACE.sub(number, text)


def command(argv: list[str] | None) -> int:
    """Write the page, or check it."""
    parser = Parser("questions.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing; 1: it is old")
    parser.add_argument("--page", type=Path, default=PAGE, help="[%(default)s]")
    args = parser.parse_args(argv)
    siren.require(args.page.is_file(), f"--page {args.page}: no such file")
    text = args.page.read_text(encoding="utf-8")
    new = filled(text, Files(RESULTS))
    if args.check:
        return int(new != text)
    write_whole(args.page, new.encode())
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return run_tool("questions.py", command, argv)


if __name__ == "__main__":
    sys.exit(main())
