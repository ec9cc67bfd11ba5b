"""docs/zoo.md: its first table says what results/zoo.csv says, the best pass@16 first."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from research.zoo import METHODS, table

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "zoo.md").read_text()
CSV = ROOT / "results" / "zoo.csv"


def test_the_short_table_is_what_the_report_would_write():
    (shown,) = [found[2] for found in table.SHORT.finditer(PAGE)]
    assert table.short_table(CSV, shown) == shown
    assert PAGE.index("<!-- short table") < PAGE.index("# Details") < PAGE.index("## How to")


def test_the_short_table_by_plain_loops():
    """Means, order and the methods that it has, without the code of the report."""
    with open(CSV, newline="") as file:
        lines = [x for x in csv.DictReader(file) if x["grade"] == "hard"]
    lines = [x for x in lines if x["temperature"] == "0.6"]
    base = {x["seed"]: float(x["entropy"]) for x in lines if x["method"] == "base"}
    rows = [line.strip("| ").split(" | ") for line in table.SHORT.search(PAGE)[2].splitlines()]
    head, _, *rows = rows
    names = [row[0].strip("`").replace("base model", "base") for row in rows]
    assert sorted(names) == sorted(["base", *METHODS])
    before = 1.0
    for name, row in zip(names, rows):
        own = [x for x in lines if x["method"] == name]
        assert len(own) == 12
        for title, cell in zip(head[1:4], row[1:4]):
            mean = np.mean([float(x[title]) for x in own])
            assert float(cell.strip("*")) == pytest.approx(mean, abs=0.00501), (name, title)
        kept = np.mean([float(x["entropy"]) / base[x["seed"]] for x in own])
        assert float(row[4]) == pytest.approx(kept, abs=0.00501), name
        passes = np.mean([float(x["pass@16"]) for x in own])
        assert passes <= before, "not sorted"
        before = passes
        assert re.fullmatch(r"[^.]*(\S\.\S[^.]*)*\.", row[5]), f"{name}: one sentence"


def test_bold_is_what_the_details_say_stands():
    """Above Dr.GRPO in the tables of differences, with a p below .05."""
    bold = {"pass@16": set(), "maj@16": set(), "avg@16": set()}
    for line in table.SHORT.search(PAGE)[2].splitlines()[2:]:
        cells = line.strip("| ").split(" | ")
        for score, cell in zip(bold, cells[1:4]):
            if cell.startswith("**"):
                bold[score].add(cells[0].strip("`"))
    due = {score: set() for score in bold}
    for score in due:
        start = PAGE.index(f"| {score} | minus Dr.GRPO | p, Holm |")
        for line in PAGE[start:].partition("\n\n")[0].splitlines()[2:]:
            name, difference, p = line.strip("| ").split(" | ")[:3]
            if float(p) < 0.05 and difference.startswith("+"):
                due[score].add(name.strip("`"))
    assert bold == due and len(due["pass@16"]) == 9


def test_a_new_csv_changes_the_numbers_and_keeps_the_sentences(tmp_path):
    (shown,) = [found[2] for found in table.SHORT.finditer(PAGE)]
    lines = CSV.read_text().splitlines()
    head = lines[0].split(",")
    changed = []
    for line in lines:
        cells = line.split(",")
        if cells[0] == "aer":
            cells[head.index("pass@16")] = "0.99"
        changed.append(",".join(cells))
    path = tmp_path / "zoo.csv"
    path.write_text("\n".join(changed) + "\n")
    found = table.short_table(path, shown).splitlines()
    assert found[2].startswith("| `aer` | **.99** |") and len(found) == len(shown.splitlines())
    sentence = {line.split(" | ")[0]: line.split(" | ")[-1] for line in shown.splitlines()}
    assert all(sentence[line.split(" | ")[0]] == line.split(" | ")[-1] for line in found)
