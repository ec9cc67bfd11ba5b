"""docs/questions.md: its numbers are those of the files, and no others are in it."""

import csv
import doctest
import gzip
import json
import re

import numpy as np
import pytest

from research import questions, study, study_report, three_ways_report

PAGE = questions.PAGE.read_text()


@pytest.fixture(scope="module")
def files():
    return questions.Files(questions.RESULTS)


def test_worked_examples():
    found = doctest.testmod(questions)
    assert found.attempted > 0 and found.failed == 0


def test_the_page_is_what_the_command_would_write(files, tmp_path):
    assert questions.filled(PAGE, files) == PAGE
    old = re.sub(r"(\+?\.\d\d)(?=[ ,;<])", "9.99", PAGE, count=3)
    page = tmp_path / "page.md"
    page.write_text(old)
    assert questions.main(["--check", "--page", str(page)]) == 1 and page.read_text() == old
    assert questions.main(["--page", str(page)]) == 0 and page.read_text() == PAGE
    assert questions.main(["--check", "--page", str(page)]) == 0


def test_no_result_stands_outside_of_the_marks():
    """But for settings: p, tau, beta, T and rewards that are thresholds."""
    prose = questions.PLACE.sub("", PAGE)
    numbers = set(re.findall(r"(?<![\w@])[+-]?\d*\.\d+", prose))
    assert numbers <= {"0.6", "0.7", "0.06", "0.8", ".4"}
    assert set(re.findall(r"<!-- ([\w ]+) -->", PAGE)) <= {*questions.facts()}
    names = re.findall(r"\]\(\.\./results/([\w.]+)\)", PAGE)
    for name in set(names):
        assert (questions.RESULTS / name).exists(), name


def test_answers_are_short():
    """At most five sentences outside of tables; every heading but the last is a question."""
    parts = re.split(r"^## ", questions.PLACE.sub("x", PAGE), flags=re.M)[1:]
    assert len(parts) >= 15
    for part in parts[:-1]:
        title, _, text = part.partition("\n")
        assert title.endswith("?")
        assert len(re.findall(r"[.?!](?=\s|$)", text)) <= 5, title
    assert "can't be answered" in parts[-1]


def test_unknown_names_are_one_line(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("a <!-- no such --><!-- / --> b")
    assert questions.main(["--page", str(page)]) == 2
    assert capsys.readouterr().err == (
        "questions.py: error: <!-- no such -->: no such number\n"
    )


def test_numbers_by_plain_loops(files):
    """Some of each kind, without the code of the reports."""
    with open(study.ROOT / "results" / "main.csv", newline="") as file:
        lines = [x for x in csv.DictReader(file) if x["grade"] == "hard"]
    lines = [x for x in lines if x["temperature"] == "0.6"]
    own = {
        (x["method"], int(x["seed"])): float(x["pass@16"])
        for x in lines
        if x["method"] in ("siren", "anchor_only")
    }
    gaps = [own["siren", seed] - own["anchor_only", seed] for seed in range(16)]
    known = questions.facts()
    text = known["siren minus anchor_only pass"](files)
    mean, low, high = study_report.bootstrap(gaps)
    assert text == f"+{mean:.2f} [+{low:.2f}, +{high:.2f}]".replace("0.", ".")
    exploded = [x for x in lines if x["method"] == "constrained"]
    assert known["explosions"](files) == (
        f"{sum(float(x['useless_share']) > 0.3 for x in exploded)} of 16"
    )
    path = study.ROOT / "results" / "default_run.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    sizes = [abs(x["policy_loss"]) for x in records[1:]]
    assert known["run policy loss"](files) == f"{np.mean(sizes):.3f}".removeprefix("0")


def mean_of(seeds, value):
    return np.mean([value(line) for line in seeds.values()])


def test_what_the_answers_say_of_ways_and_gaps(files):
    hard = files.hard_ways
    gap = {name: mean_of(hard[name], lambda x: x["gap_p_right"]) for name in questions.FEW}
    assert gap["base"] < 0.01 < gap["dr_grpo"]
    for name in ("naive_bonus", "siren", "anchor_only"):
        assert gap[name] > gap["dr_grpo"]
    cancelled = questions.share_of_right("cancelled")
    share = {name: mean_of(hard[name], cancelled) for name in questions.FEW}
    assert share["base"] == max(share.values()) > 0.1
    assert max(map(cancelled, hard["dr_grpo"].values())) > 0.05
    found = three_ways_report.is_it_ahead(files.ways)
    for counts in ("sound", "clean"):
        own = found["SIREN - Dr.GRPO", "0.6", "pass@16", counts]
        assert np.mean(own) > 0.05 and min(own) > 0, counts
    assert np.mean(found["SIREN - Dr.GRPO", "0.6", "avg", "clean"]) < 0
    filled = {name: mean_of(hard[name], lambda x: x["filled"]) for name in questions.FEW}
    assert filled["siren"] > filled["dr_grpo"] + 0.05


def test_what_the_answers_say_of_more_samples(files):
    def score(name, kind, k):
        lines = [x for x in files.many if (x["temperature"], x["k"]) == (0.6, k)]
        return np.mean([x[kind] for x in lines if x["method"] == name])

    passes = {name: score(name, "pass", 256) for name in questions.FEW[:4]}
    assert sorted(passes, key=passes.get)[-2:] == ["siren", "base"]
    for name in passes:
        assert abs(score(name, "maj", 256) - score(name, "maj", 16)) < 0.05


def test_what_the_answers_say_of_a_random_reward(files):
    base = files.hard_ways["base"]
    for name in ("dr_grpo_coins", "siren_coins"):
        for seed, line in files.hard_ways[name].items():
            assert line["reward"] < base[seed]["reward"] / 2
            assert line["pass@16"] < base[seed]["pass@16"]
            assert line["entropy"] > base[seed]["entropy"]


def test_what_the_answers_say_of_equal_reward(files):
    for reward in three_ways_report.REWARDS:
        found = three_ways_report.at_equal_reward(files.course, reward)
        for score in ("pass@16", "maj@16"):
            assert np.mean(found["SIREN - Dr.GRPO", score]) > 0.05, (reward, score)
    for values in three_ways_report.early_stop(files.course).values():
        assert np.mean(values) > 0.05


def test_the_anchor_alone_learns_slowest_and_gains_most_at_equal_reward(files):
    found = three_ways_report.at_equal_reward(files.course, three_ways_report.TESTED_REWARD)
    for score in ("pass@16", "maj@16"):
        gains = {pair: np.mean(x) for (pair, name), x in found.items() if name == score}
        assert max(gains, key=gains.get) == "anchor only - Dr.GRPO"
    arrivals = {}
    for method, seeds in three_ways_report.courses(files.course).items():
        points = [three_ways_report.arrival(own, 0.5) for own in seeds.values()]
        arrivals[method] = np.mean([point["step"] for point in points if point])
    assert max(arrivals, key=arrivals.get) == "anchor_only"


def raw_rows(part):
    """Its rows by what was trained."""
    found = {}
    with gzip.open(study.ROOT / "results" / "raw" / f"{part}.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            own = {k: x for k, x in row["config"].items() if not k.startswith("eval")}
            own = {k: x for k, x in own.items() if k not in ("out", "plug")}
            if "coins" not in row["config"]["plug"]:
                found[json.dumps(own, sort_keys=True)] = row
    return found


def test_ten_of_sixteen_seeds_are_the_same_runs(files):
    main, ways = raw_rows("main"), raw_rows("ways")
    same = {seed: [] for seed in range(16)}
    for key in main.keys() & ways.keys():
        one, other = (rows[key]["evals"] for rows in (main, ways))
        alike = all(x["avg@16"] == y["avg@16"] for x, y in zip(one, other, strict=True))
        same[main[key]["config"]["seed"]].append(alike)
    assert [all(same[seed]) for seed in range(16)] == [False] * 6 + [True] * 10


def test_verdicts_of_the_main_table_with_the_rows_of_the_second_set(files):
    """results/README.md: five of 48 change; the bonus's single samples are one of them."""
    lines = {}
    for line in files.ways:
        if line["method"] in study.METHODS or line["method"] in ("base", "dr_grpo_same_lr"):
            key = (line["method"], line["grade"], str(line["temperature"]))
            lines.setdefault(key, {})[str(line["seed"])] = line
    first = study_report.read_csv(study.ROOT / "results" / "main.csv")
    verdicts = []
    for some in (first, lines):
        rows = [re.split(r" *\| *", row)[1:6] for row in study_report.claims(some)[2:-1]]
        verdicts.append({tuple(row[:3]): float(row[4]) for row in rows})
    assert verdicts[0].keys() == verdicts[1].keys() and len(verdicts[0]) == 48
    changed = [k for k, p in verdicts[0].items() if (p < 0.05) != (verdicts[1][k] < 0.05)]
    assert len(changed) == 5
    (bonus,) = (k for k in changed if "naive" in k[0])
    assert bonus[1:] == ("avg@16", "1.0") or bonus[1:] == ("avg@16", "1")
    assert verdicts[0][bonus] == pytest.approx(0.048, abs=1e-3)
    assert verdicts[1][bonus] == pytest.approx(0.218, abs=2e-3)


@pytest.mark.parametrize("seeds, share", [(4, 0.79), (12, 0.91), (16, 0.92)])
def test_how_often_an_interval_holds_the_mean(seeds, share):
    """results/README.md: of normal values a bootstrap interval holds it too rarely."""
    rng = np.random.default_rng(seeds)
    values = rng.normal(size=(2000, seeds))
    found = []
    for own in values:
        means = own[rng.integers(seeds, size=(400, seeds))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        found.append(low <= 0 <= high)
    assert np.mean(found) == pytest.approx(share, abs=0.025)


def test_tables_of_made_up_rows(files):
    """With rows the tables have numbers; without them a sentence."""
    made = questions.Files.__new__(questions.Files)
    vars(made).update(vars(files))
    made.ways, made.course, made.many, made.tokens = [], [], [], []
    known = questions.facts()
    names = [name for name in known if name.endswith("table")]
    assert len(names) == 8
    for name in names:
        assert known[name](made).startswith("No number yet"), name
    methods = (*study_report.NAMES, "dr_grpo_coins", "siren_coins", "token_first")
    for seed in (0, 1, 2):
        for i, method in enumerate(methods):
            line = {"method": method, "seed": seed, "reward": 0.1, "entropy": 0.5}
            line |= {"avg@16": 0.5, "maj@16": 0.01 * i, "pass@16": 0.5, "clean": 0.25}
            line |= {"filled": 0.2, "cancelled": 0.05, "gap_p_right": 0.25 + 0.125 * seed}
            line |= {"gap_entropy": 1.0, "sound/pass@16": 0.02 * i, "clean/pass@16": 0.1}
            for t in (0.6, 1.0):
                made.ways.append({**line, "grade": "hard", "temperature": t})
        for vocab in (96, 1024):
            line = {"seed": seed, "vocabulary": vocab, "speed": 50.0, "end_reward": 0.5}
            made.tokens += [{"method": "siren", **line, "end_H": 1.0}]
        for k in (16, 256):
            line = {"seed": seed, "k": k, "temperature": 0.6, "pass": 0.5}
            made.many += [{"method": "siren", **line, "sound/pass": 0.25, "maj": 0.5}]
        for step in (0, 20, 40):
            line = {"seed": seed, "step": step, "reward": 0.03 * step}
            for method, score in (("siren", 0.75), ("dr_grpo", 0.5)):
                made.course.append({"method": method, **line, "pass": score, "maj": 0.5})
    assert "| SIREN | .38 (.25 to .50) | 1.00 (1.00 to 1.00) | .50" in (
        known["ways table"](made)
    )
    assert "| SIREN - Dr.GRPO | pass@16 | sound | +.10 (+.10 to +.10) | too few seeds |" in (
        known["counts table"](made)
    )
    assert "wo_peak" not in known["counts table"](made)
    naive = known["naive table"](made).strip().splitlines()
    assert len(naive) == 2 + 6 and all(line.count("|") == 5 for line in naive)
    assert "| SIREN, random reward | 3 | .10" in known["coins table"](made)
    assert "| SIREN, 96 | 3 | 50 (50 to 50) | .50 (.50 to .50) | 1.00" in (
        known["tokens table"](made)
    )
    assert "| SIREN - Dr.GRPO, at a reward of .60 | 3 | +.25" in known["course table"](made)
    assert "| SIREN's end - Dr.GRPO at its best step | 3 | +.25" in known["course table"](made)
    assert known["best step"](made) == "20 on 3 of 3 seeds"  # of equal steps the first
    assert "| maj@16 | -.07 (-.07 to -.07) | too few seeds |" in known["order table"](made)
    assert "| SIREN | .50 (.50 to .50) | .50 (.50 to .50) | .25" in known["many table"](made)
