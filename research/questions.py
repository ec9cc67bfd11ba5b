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
from research import study, study_report, three_ways_report
from research.three_ways_report import at, by, paired, read_csv
from research.tools import Parser, run_tool, write_whole

RESULTS = study.ROOT / "results"
PAGE = study.ROOT / "docs" / "questions.md"
PLACE = re.compile(r"(<!-- ([\w ]+) -->).*?(<!-- / -->)", re.DOTALL)
NOT_YET = "no number yet"
Seeds = dict[int, dict[str, Any]]


# ------------------------------------------------------------------------- how it is said
def short(number: float, sign: str = "") -> str:
    """Two decimals, as .64.

    >>> short(0.638), short(-0.04, "+"), short(12.5)
    ('.64', '-.04', '12.50')
    """
    return re.sub(r"\b0\.", ".", f"{number:{sign}.2f}")


def interval(values: Iterable[float], sign: str = "") -> str:
    """Mean and 95 % interval, without what is not a number; NOT_YET if nothing is left.

    >>> interval([0.5, 0.5, math.nan]), interval([])
    ('.50 [.50, .50]', 'no number yet')
    """
    numbers = [x for x in values if not math.isnan(x)]
    if not numbers:
        return NOT_YET
    middle, low, high = (short(x, sign) for x in study_report.bootstrap(numbers))
    return f"{middle} [{low}, {high}]"


def difference(one: Seeds, other: Seeds, value: Callable[[dict], float]) -> str:
    """one - other, paired by seed."""
    return interval(paired(one, other, value), "+")


def stands(p: float) -> str:
    """What a p after Holm's correction says."""
    return "stands after the correction" if p < 0.05 else "does not stand after the correction"


# ----------------------------------------------------------------------------------- the files
class Files:
    """What results/ holds."""

    def __init__(self, folder: Path) -> None:
        self.main = self.hard(folder / "main.csv")
        self.zoo = self.hard(folder / "zoo.csv")
        self.main_lines = study_report.read_csv(folder / "main.csv")
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
def range_of(files: Files, knob: str, values: tuple[float, ...], score: str) -> str:
    """The lowest and the highest mean of a score over some values of a setting."""
    rows = study_report.labelled("sensitivity", study.Size(), files.store)[f"siren, {knob}"]
    found = [
        mean(study.score(row, score) for row in rows if row["config"][knob] == value)
        for value in values
    ]
    return f"{short(min(found))} to {short(max(found))}"


def one_method(name: str, score: str, table: str = "main") -> Callable[[Files], str]:
    """A method's mean score with its interval."""
    return lambda files: interval(x[score] for x in getattr(files, table)[name].values())


def two_methods(one: str, other: str, score: str, table: str = "main") -> Callable:
    """The paired difference of two methods in a score."""

    def fact(files: Files) -> str:
        found = getattr(files, table)
        return difference(found.get(one, {}), found.get(other, {}), at(score))

    return fact


def mean_of(name: str, score: str, table: str = "zoo") -> Callable[[Files], str]:
    """A method's mean score, without interval."""
    return lambda files: short(mean(x[score] for x in getattr(files, table)[name].values()))


def ways(name: str, value: Callable[[dict], float]) -> Callable[[Files], str]:
    """A value of three_ways.csv on hard prompts at T = 0.6."""
    return lambda files: interval(map(value, files.hard_ways.get(name, {}).values()))


def share_of_right(way: str) -> Callable[[dict], float]:
    """The share of right responses that are right in this way."""
    return lambda line: line[way] / line["avg@16"] if line["avg@16"] else math.nan


def many(name: str, score: str, k: int) -> Callable[[Files], str]:
    """pass@k or maj@k of the files with many samples, T = 0.6."""

    def fact(files: Files) -> str:
        found = by(files.many, temperature=0.6, k=k) if files.many else {}
        return interval(x[score] for x in found.get(name, {}).values())

    return fact


def explosions(files: Files) -> str:
    """Seeds on which the constrained bonus ends with more than 30 % useless tokens."""
    found = [x["useless_share"] > 0.3 for x in files.main["constrained"].values()]
    return f"{sum(found)} of {len(found)}"


def verdict(table: Callable, key: tuple[str, ...]) -> Callable[[Files], str]:
    """A tested difference of three_ways_report with what its p says."""

    def fact(files: Files) -> str:
        found = table(files.ways) if files.seeds else {}
        if not found.get(key):
            return NOT_YET
        found = {k: values for k, values in found.items() if values}
        p = study_report.holm({k: study_report.sign_flip(x) for k, x in found.items()})
        return f"{interval(found[key], '+')}, which {stands(p[key])}"

    return fact


def equal_reward(name: str, score: str) -> Callable[[Files], str]:
    """The difference to Dr.GRPO at a training reward of .5, and on how many seeds."""

    def fact(files: Files) -> str:
        found = three_ways_report.at_equal_reward(files.course, 0.5) if files.course else {}
        values = found.get((f"{study_report.NAMES[name]} - Dr.GRPO", f"{score}@16"), [])
        return f"{interval(values, '+')} ({len(values)} seeds)" if values else NOT_YET

    return fact


def stopped_early(score: str) -> Callable[[Files], str]:
    """SIREN's end minus Dr.GRPO stopped early."""

    def fact(files: Files) -> str:
        found = three_ways_report.early_stop(files.course) if files.course else {}
        return interval(found.get(("SIREN - Dr.GRPO, stopped early", f"{score}@16"), []), "+")

    return fact


def tokens(name: str, vocab: int, value: str) -> Callable[[Files], str]:
    """A value of tokens.csv; steps without decimals."""

    def fact(files: Files) -> str:
        found = by(files.tokens, vocabulary=vocab) if files.tokens else {}
        values = [x[value] for x in found.get(name, {}).values()]
        if value != "speed" or not values:
            return interval(values)
        return "{:.0f} [{:.0f}, {:.0f}]".format(*study_report.bootstrap(values))

    return fact


def steps_of_run(name: str, value: Callable[[list[float]], float]) -> Callable[[Files], str]:
    """Something about a metric of the default run's 200 steps."""
    return lambda files: short(value([x[name] for x in files.run if name in x]))


def seed_count(files: Files) -> str:
    """How many test seeds the page is about."""
    return f"{files.seeds} of 16"


def token_seeds(vocab: int) -> Callable[[Files], str]:
    """How many seeds tokens.csv has of a size."""

    def fact(files: Files) -> str:
        found = by(files.tokens, vocabulary=vocab) if files.tokens else {}
        return f"{len(found['siren'])} seeds" if "siren" in found else NOT_YET

    return fact


VALUES = {
    "top_p": (0.7, 0.8, 0.85, 0.9, 1.0),
    "peak_quantile": (0.0, 0.4, 0.6),
    "beta": (0.06, 0.2, 0.6),
}


def facts() -> dict[str, Callable[[Files], str]]:
    """Name -> its number, or NOT_YET."""
    found: dict[str, Callable[[Files], str]] = {"seeds": seed_count, "explosions": explosions}
    for knob, values in VALUES.items():
        found[f"maj by {knob}"] = lambda files, k=knob, v=values: range_of(
            files, k, v, "maj@16"
        )
    for one in ("siren", "wo_anchor"):
        for other in ("dr_grpo", "naive_bonus", "constrained", "anchor_only"):
            for score in ("avg", "maj", "pass"):
                found[f"{one} minus {other} {score}"] = two_methods(one, other, f"{score}@16")
    found["naive minus dr_grpo avg"] = two_methods("naive_bonus", "dr_grpo", "avg@16")
    for name in ("siren", "dr_grpo", "trl_adaptive"):
        for score in ("SRR", "NDR"):
            found[f"{name} {score}"] = mean_of(name, score)
    for score in ("useless_share", "pass@16", "maj@16"):
        found[f"trl {score.partition('@')[0]}"] = mean_of("trl_adaptive", score)
        found[f"zoo siren {score.partition('@')[0]}"] = mean_of("siren", score)
    for name in ("base", "dr_grpo", "naive_bonus", "siren", "anchor_only"):
        for way in ("filled", "cancelled"):
            found[f"{name} {way}"] = ways(name, share_of_right(way))
        found[f"{name} at gaps"] = ways(name, at("gap_p_right"))
        found[f"{name} H at gaps"] = ways(name, at("gap_entropy"))
    for name in ("dr_grpo_coins", "siren_coins"):
        found[f"{name} reward"] = ways(name, at("reward"))
        found[f"{name} entropy"] = ways(name, at("entropy"))
        found[f"{name} pass"] = ways(name, at("pass@16"))
    found["base reward"] = ways("base", at("reward"))
    found["base entropy"] = ways("base", at("entropy"))
    found["base pass"] = ways("base", at("pass@16"))
    for way in ("clean", "filled", "cancelled"):
        key = ("naive bonus - Dr.GRPO", "0.6", way)
        found[f"naive minus dr_grpo {way}"] = verdict(three_ways_report.does_it_explain, key)
    for counts in ("sound", "clean"):
        for other, title in (("dr_grpo", "Dr.GRPO"), ("naive_bonus", "naive bonus, best")):
            key = (f"SIREN - {title}", "0.6", "pass@16", counts)
            name = f"siren minus {other} {counts}"
            found[name] = verdict(three_ways_report.is_it_ahead, key)
    key = ("SIREN - Dr.GRPO", "p(right sum) at gaps")
    found["siren minus dr_grpo at gaps"] = verdict(three_ways_report.do_they_fill, key)
    for score in ("pass", "maj"):
        found[f"equal reward {score}"] = equal_reward("siren", score)
        found[f"stopped early {score}"] = stopped_early(score)
        found[f"token_first {score}"] = two_methods(
            "siren", "token_first", f"{score}@16", "hard_ways"
        )
    for name in ("base", "dr_grpo", "naive_bonus", "siren"):
        found[f"{name} pass many"] = many(name, "pass", 256)
        found[f"{name} sound many"] = many(name, "sound/pass", 256)
        found[f"{name} maj many"] = many(name, "maj", 256)
    for vocab in (96, 1024, 16384):
        found[f"seeds {vocab}"] = token_seeds(vocab)
        for name in ("siren", "wo_top_p", "anchor_only", "dr_grpo"):
            found[f"{name} speed {vocab}"] = tokens(name, vocab, "speed")
            found[f"{name} reward {vocab}"] = tokens(name, vocab, "end_reward")
    found["run policy loss"] = steps_of_run("policy_loss", lambda x: mean(map(abs, x)))
    found["run reward first"] = steps_of_run("reward", lambda x: x[0])
    found["run reward last"] = steps_of_run("reward", lambda x: mean(x[-10:]))
    found["run h_agg first"] = steps_of_run("h_agg", lambda x: x[0])
    found["run h_agg last"] = steps_of_run("h_agg", lambda x: mean(x[-10:]))
    found["run entropy first"] = steps_of_run("entropy", lambda x: x[0])
    found["run entropy last"] = steps_of_run("entropy", lambda x: mean(x[-10:]))
    found["run clip"] = steps_of_run("clip_fraction", mean)
    return found


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
