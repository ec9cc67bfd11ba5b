"""Tests of toy_env.py: the toy world, its teacher and its base model; and of its check."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import random
import runpy
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import siren
import toy_env as toy
from research import check_base

ROOT = Path(toy.__file__).resolve().parent
SMALL = {"base_steps": 3, "base_batch": 4, "hidden": 8, "layers": 1}


def written_by_the_teacher(world, order):
    """The teacher's response without slips and noise; whether it met a gap on a right sum."""
    total, right, met, words = order[0], order[0], False, [str(order[0])]
    for term in order[1:]:
        met |= (right, term) in world.gaps
        total, right = world.gaps.get((total, term), total + term), right + term
        words += [str(term), str(total)]
    return " ".join([*words, "<eos>"]), met


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------- the world


@pytest.mark.parametrize(
    "terms", [(8, 5, 1), (3, 9, 4, 6), (1, 1, 7, 9, 4), (9, 2, 2, 8, 5, 3)]
)
def test_gap_free_share_against_all_orders_and_the_verifier(terms):
    world = toy.ToyWorld()
    orders = list(itertools.permutations(terms))
    free = 0
    for order in orders:
        text, met = written_by_the_teacher(world, order)
        free += not met
        verdict = siren.verify(text, str(sum(terms)), world.find_answer)
        assert verdict == (int(text.split()[-2]) == sum(terms))
        assert met or verdict, "an order that meets no gap ends in the right total"
    assert world.gap_free_share(terms) == Fraction(free, len(orders))


def test_demonstrations_are_the_teachers_rules():
    sure, rng, orders = toy.ToyWorld(slip=0, noise=0), random.Random(0), set()
    for _ in range(300):
        words = sure.decode(sure.demonstration([8, 3, 1, 5, 2], rng)).split()
        orders.add(order := (int(words[0]), *map(int, words[1:-1:2])))
        assert sorted(order) == [1, 2, 3, 5, 8]
        assert " ".join(words) == written_by_the_teacher(sure, order)[0]
    assert len(orders) > 90, "the order is drawn anew each time"

    slipping, slips = toy.ToyWorld(gap_share=0, noise=0), []
    for _ in range(2000):
        start, term, written = (n - 3 for n in slipping.demonstration([4, 5, 6], rng)[:3])
        slips += [written - start - term] if written != start + term else []
    assert set(slips) == {-10, -9, -2, -1, 1, 2, 10}  # -9: 4 + 5 - 10 is written as 0
    assert abs(len(slips) / 2000 - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 2000)

    noisy = toy.ToyWorld(slip=0, noise=1)
    drawn = [n for _ in range(500) for n in noisy.demonstration([1, 2, 3, 4], rng)[:-1]]
    assert min(drawn) == 3 and max(drawn) > 1000, "noise is a number: never <pad>, <eos> or ="


def test_splits_share_no_multiset_and_grades_hold():
    terms_of = {}
    for split in ("test", "validation"):
        world = toy.ToyWorld(min_terms=5, max_terms=7, split=split)
        for name, problems in world.heldout(100).items():
            assert len({tuple(p.prompt) for p in problems}) == 100
            for problem in problems:
                terms = [token - 3 for token in problem.prompt[:-1]]
                share = world.gap_free_share(terms)
                low, high = (0.3, 1) if name == "easy" else (1e-9, 0.12)
                assert low <= share <= high
                assert sum(terms) == int(problem.answer) and 15 <= sum(terms) <= 33
                terms_of.setdefault(split, set()).add(tuple(sorted(terms)))
    trained = world.train_problems(3000, "0/1")
    terms_of["train"] = {tuple(sorted(t - 3 for t in p.prompt[:-1])) for p in trained}
    assert len({len(p.prompt) for p in trained}) == 3, "5 to 7 terms: left padding is real"
    for one, two in itertools.combinations(terms_of.values(), 2):
        assert not one & two, "a held-out problem, in any order, must not be trained on"


def test_toy_problems_are_functions_of_the_seed():
    world = toy.load(seed="1")
    assert world.train_problems(50, "a") == toy.load(seed="1").train_problems(50, "a")
    assert world.train_problems(50, "a") != world.train_problems(50, "b")
    assert world.gaps != toy.ToyWorld().gaps
    assert world.decode([11, 6, 4, 8, 5, 2, 0, 1, 1023]) == "8 3 1 5 2 = <pad> <eos> 1020"
    problem = world.problem([8, 3, 1, 5, 2])
    assert world.decode(problem.prompt) == "8 3 1 5 2 =" and problem.answer == "19"


ANSWERS = """
8 5 13 <eos> = 13
8 <eos> = 8
8 5 13 = None
8 5 13 <eos> <pad> = None
<eos> = None
13 = None
= <eos> = None
<pad> <eos> = None
-5 <eos> = None
"""


@pytest.mark.parametrize("line", ANSWERS.strip().splitlines())
def test_the_answer_is_the_number_right_before_the_end(line):
    text, _, expected = line.rpartition(" = ")
    assert str(toy.ToyWorld().find_answer(text)) == expected
    assert toy.ToyWorld().find_answer("") is None


def test_useless_tokens_are_numbers_that_no_terms_add_up_to():
    world = toy.ToyWorld()
    responses = [[8, 48, 1], [49, 1023, 1]]  # 45 = 5 * 9 is the largest sum: token 48
    assert world.metrics(responses) == {"useless_share": 2 / 6}


def test_the_default_world_is_the_one_of_the_results():
    """If this fails: raise the format, teach the base model again, run the study again."""
    world, rng = toy.ToyWorld(), random.Random(7)
    assert world.base_file == ROOT / "assets" / "toy_base_f2bc525a2c8e43aa.bin"
    assert len(world.gaps) == 122 and digest(sorted(world.gaps.items())) == "6d9ae8ebec7ba95f"
    problems = [tuple(p) for p in world.train_problems(100, "0/1")]
    assert digest(problems) == "2246ee6bda0e7cbc"
    for split, expected in (("test", "df4ecde988fca918"), ("validation", "8798caba80c81036")):
        groups = toy.ToyWorld(split=split).heldout(50).values()
        problems = [tuple(p) for group in groups for p in group]
        assert digest(problems) == expected
    shown = [world.demonstration([8, 3, 1, 5, 2], rng) for _ in range(100)]
    assert digest(shown) == "7495416332634ba9"


def test_training_prompts_are_drawn_as_uniform_terms_with_a_total_in_range():
    world = toy.ToyWorld(min_terms=2, max_terms=2, max_term=3, min_total=2, max_total=6)
    pool = world.multisets["train"]
    orders = {terms: len(set(itertools.permutations(terms))) for terms in pool}
    n = 20000
    drawn = [tuple(t - 3 for t in p.prompt[:-1]) for p in world.train_problems(n, "x")]
    for order in {o for terms in pool for o in itertools.permutations(terms)}:
        share = 1 / sum(orders.values())  # every order of two terms has the same chance
        assert abs(drawn.count(order) / n - share) < 5 * math.sqrt(share / n)
    assert len(set(drawn)) == sum(orders.values())


# --------------------------------------------------------------------------------- the options


def test_split_is_an_option_but_no_part_of_the_world():
    world, other = toy.ToyWorld(), toy.load(siren.Config(), split="validation")
    assert other.heldout(8) == toy.ToyWorld(split="validation").heldout(8) != world.heldout(8)
    assert world.heldout(8) == toy.load(split="test").heldout(8)
    assert toy.load().split == "test"
    assert other.base_file == world.base_file
    assert other.train_problems(8, "a") == world.train_problems(8, "a")


def test_every_other_field_changes_the_base_file():
    world, seen = toy.ToyWorld(), set()
    changes = {"min_terms": 4, "max_terms": 6, "hidden": 72, "max_total": 32}
    changes |= {"split": "validation"}
    for field in dataclasses.fields(world):
        value = getattr(world, field.name)
        value = value * 2 if isinstance(value, float) else value
        value = value + 1 if isinstance(value, int) else value
        value = changes.get(field.name, value)
        seen.add(dataclasses.replace(world, **{field.name: value}).base_file)
    assert len(seen) == len(dataclasses.fields(world)), "split alone keeps it"
    assert world.base_file in seen


def test_options_have_a_comment():
    source = (ROOT / "toy_env.py").read_text().splitlines()
    for field in dataclasses.fields(toy.ToyWorld):
        (line,) = [line for line in source if line.startswith(f"    {field.name}: ")]
        assert len(line.partition("  # ")[2]) > 5, line


BAD_OPTIONS = """
x=1                   | x=1: needs
gap_share=lots        | gap_share=lots: needs a number
max_term=1.5          | max_term=1.5: needs a number
slip=2                | shares from 0 to 1
noise=-0.1            | shares from 0 to 1
gap_share=nan         | shares from 0 to 1
layers=0              | sizes > 0
base_steps=0          | sizes > 0
base_batch=-1         | sizes > 0
hidden=60             | hidden a multiple of 8
hidden=0              | sizes > 0
min_terms=1           | 2 <= min_terms
max_terms=17          | max_terms <= 9
max_terms=4           | min_terms <= max_terms
max_term=30           | max_term from 1 to 12
max_term=0            | max_term from 1 to 12
vocab=51              | vocab of at least
max_total=7           | totals that terms have
min_total=99          | totals that terms have
split=train           | split=test or split=validation
"""


@pytest.mark.parametrize("line", BAD_OPTIONS.strip().splitlines())
def test_bad_options_are_one_line(line):
    option, message = (part.strip() for part in line.split("|"))
    name, value = option.split("=")
    with pytest.raises(ValueError) as caught:
        toy.load(siren.Config(), **{name: value})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert value in str(caught.value) and name in str(caught.value)


def test_the_smallest_vocabulary_holds_all_that_is_written():
    """Of the total 33, four slips of +10, and the four tokens below the number 1."""
    with pytest.raises(ValueError, match="vocab of at least 78"):
        toy.ToyWorld(vocab=77)
    world = toy.ToyWorld(vocab=78, gap_share=1, slip=1, noise=0.1)
    rng = random.Random(0)
    for terms in world.multisets["train"]:
        assert max(world.demonstration(terms, rng)) < 78


def test_a_budget_that_does_not_fit_the_model_is_refused():
    assert toy.load(siren.Config(max_tokens=250)) == toy.ToyWorld()  # 6 + 250 = 256
    message = "--max-tokens 251: the model reads 256 tokens"
    with pytest.raises(ValueError, match=message):
        toy.load(siren.Config(max_tokens=251))
    with pytest.raises(ValueError, match="the model reads 256 tokens"):
        toy.load(siren.Config(max_tokens=249), max_terms="7")


def test_more_problems_than_there_are_is_one_line():
    with pytest.raises(ValueError, match=r"there are \d+ easy held-out prompts, not 100000"):
        toy.ToyWorld().heldout(100_000)
    with pytest.raises(ValueError, match="there are 0 hard held-out prompts, not 8"):
        toy.ToyWorld(gap_share=0).heldout(8)
    with pytest.raises(ValueError, match="not 0"):
        toy.ToyWorld().heldout(0)


# ------------------------------------------------------------------------------ the base model


def test_shipped_base_is_good_enough_to_learn_from():
    cfg = siren.Config(eval_prompts=100, eval_samples=8, eval_temperature=1.0)
    world = toy.ToyWorld()
    model = world.build_model()
    easy, hard = (siren.evaluate(model, world, p, cfg) for p in world.heldout(100).values())
    assert 0.2 < easy["avg@8"] < 0.6 and 0.02 < hard["avg@8"] < 0.25
    assert easy["distinct@8"] > 0.8 and hard["pass@8"] > 2 * hard["maj@8"]


def test_teaching_loss_is_the_cross_entropy_of_response_tokens_alone():
    world = toy.ToyWorld(min_terms=5, max_terms=7, base_batch=12)
    model = toy.ToyWorld().build_model()
    loss = world._teaching_loss(model, random.Random(3)).item()
    rng, losses = random.Random(3), []
    for terms in world._draw(12, rng):  # all terms are drawn, then the demonstrations
        prompt, response = world.problem(terms).prompt, world.demonstration(terms, rng)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0].double().numpy()
        for t, token in enumerate(response, len(prompt)):
            row = logits[t - 1]  # what the tokens before t say of token t
            top = row.max()
            losses.append(top + np.log(np.exp(row - top).sum()) - row[token])
    assert loss == pytest.approx(np.mean(losses), abs=1e-5)


def taught(world):
    model = world.new_model()
    world.teach(model)
    return model


def test_teaching_learns_repeats_and_leaves_the_random_state_alone():
    world = toy.ToyWorld(**SMALL | {"base_steps": 40, "base_batch": 16})
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    model, again = taught(world), taught(world)
    assert torch.equal(torch.rand(3), expected)
    loss = world._teaching_loss(model, random.Random(3)).item()
    before = world._teaching_loss(world.new_model(), random.Random(3)).item()
    assert loss < before and loss < math.log(1024)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    other = taught(dataclasses.replace(world, seed=1))
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


# ------------------------------------------------------------------------------------ its file


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, in whose runs/ base models are kept during the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def equal_weights(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_world_is_taught_once_and_then_read(place, monkeypatch):
    world = toy.ToyWorld(**SMALL)
    first = world.build_model()
    assert [file.name for file in place.iterdir()] == [world.base_file.name]
    assert equal_weights(first, taught(world))
    monkeypatch.setattr(toy.ToyWorld, "teach", lambda *_: pytest.fail("taught again"))
    assert equal_weights(first, world.build_model())


def test_the_default_world_comes_with_the_code_or_is_taught(place, monkeypatch, tmp_path):
    shipped = toy.ToyWorld().base_file
    assert shipped.is_file() and equal_weights(
        toy.ToyWorld().build_model(), toy.ToyWorld().build_model()
    )
    monkeypatch.setattr(toy, "__file__", str(tmp_path / "toy_env.py"))  # without assets/
    assert toy.ToyWorld().base_file == Path("runs") / shipped.name


def test_writing_is_whole_or_not_at_all(place, monkeypatch):
    world, other = toy.ToyWorld(**SMALL), toy.ToyWorld(**SMALL).new_model()
    model = world.new_model()
    world.store(model)
    before = world.base_file.read_bytes()

    def full(path, data):
        with open(path, "wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            world.store(other)
    assert world.base_file.read_bytes() == before

    true_write, inside = Path.write_bytes, []

    def meanwhile(path, data):  # a second process stores at the same moment
        true_write(path, data)
        if not inside:
            inside.append(1)
            world.store(model)

    monkeypatch.setattr(Path, "write_bytes", meanwhile)
    world.store(model)
    assert inside and world.base_file.read_bytes() == before
    assert equal_weights(world.build_model(), model)


def test_every_damage_of_the_file_is_one_line(place):
    world = toy.ToyWorld(**SMALL)
    world.store(world.new_model())
    data = world.base_file.read_bytes()
    assert len(data) < 60_000, "so that every byte can be tried below"
    rng = random.Random(0)
    flipped = []
    for place_of_bit in [*range(40), *rng.sample(range(len(data)), 60), len(data) - 1]:
        changed = bytearray(data)
        changed[place_of_bit] ^= 1 << rng.randrange(8)
        flipped.append(bytes(changed))
    torn = [b"", b"not a model", data[:-8], data[:40], data[:32], data[:31], data + b"\0"]
    for bad in (*flipped, *torn):
        world.base_file.write_bytes(bad)
        with pytest.raises(ValueError, match="is damaged") as caught:
            world.build_model()
        assert "\n" not in str(caught.value) and world.base_file.name in str(caught.value)
    world.base_file.write_bytes(data)
    assert equal_weights(world.build_model(), world.new_model())


def test_a_shipped_file_with_a_flipped_bit_stops_the_command(tmp_path, monkeypatch, capsys):
    """In one line, with exit code 2."""
    shipped = toy.ToyWorld().base_file
    data = bytearray(shipped.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / shipped.name).write_bytes(data)
    monkeypatch.setattr(toy, "__file__", str(tmp_path / "toy_env.py"))
    with pytest.raises(SystemExit) as stop:
        siren.main(["--steps=0", f"--out={tmp_path / 'run'}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "is damaged" in line


# -------------------------------------------------------------------------------- the commands


def test_show_prints_an_example_that_holds(capsys):
    world = toy.ToyWorld(seed=3, gap_share=0.2)
    toy.show(world)
    lines = capsys.readouterr().out.splitlines()
    values = {line[:15].strip(): line[15:] for line in lines}
    problem = world.train_problems(1, "show")[0]
    assert values["prompt"] == world.decode(problem.prompt)
    assert values["demonstration"].endswith(f"(right: {problem.answer})")
    terms = [int(word) for word in values["prompt"].split()[:-1]]
    first, *rest = (int(word) for word in values["demonstration"].split(" <eos>")[0].split())
    assert sorted([first, *rest[::2]]) == sorted(terms) and sum(terms) == int(problem.answer)
    share = float(world.gap_free_share(terms))
    assert values["gap-free"] == f"{share:.1%} of this prompt's orders"
    assert values["gaps"] == f"{round(0.2 * 405)} of 405 pairs"
    for split in ("train", "validation", "test"):
        grades = sorted(Counter(map(world.grade, world.multisets[split])).items())
        assert values[split] == str(grades)


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy_env.py", "seed=3", "gap_share=0.2"])
    runpy.run_path(str(ROOT / "toy_env.py"), run_name="__main__")
    assert "81 of 405 pairs" in capsys.readouterr().out
    for bad, message in (("slip=2", "shares from 0 to 1"), ("what", "what"), ("x=1", "x=1")):
        monkeypatch.setattr(sys, "argv", ["toy_env.py", bad])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "toy_env.py"), run_name="__main__")
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and not out and message in err
        assert len(err.splitlines()) == 1


def test_check_base_tells_a_good_model_from_a_bad_one(monkeypatch, capsys):
    world = toy.ToyWorld()
    good = world.build_model()
    assert check_base.check_base(world, good, 250)
    assert not check_base.check_base(world, world.new_model(), 250)
    assert "a difference up to" in capsys.readouterr().out
    monkeypatch.setattr(toy.ToyWorld, "teach", lambda *_: None)
    for verdict, code in ((True, 0), (False, 1)):
        monkeypatch.setattr(check_base, "check_base", lambda *_, verdict=verdict: verdict)
        assert check_base.main() == code


def test_the_model_card_says_what_is_shipped():
    card = (ROOT / "assets" / "README.md").read_text()
    model, world = toy.ToyWorld().build_model(), toy.ToyWorld()
    count = sum(weight.numel() for weight in model.parameters())
    assert world.base_file.name in card
    assert f"{count / 1000:.0f} thousand parameters" in card
    assert f"{world.base_file.stat().st_size / 1000:.0f} kB" in card
    assert f"{world.base_steps} steps of {world.base_batch} demonstrations" in card
    assert f"{world.layers} layers, width {world.hidden}" in card
