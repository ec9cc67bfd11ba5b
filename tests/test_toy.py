"""Tests of toy_env.py and examples/toy_tools.py: the toy world, its teacher and its base model."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

import siren
import toy_env as toy
from examples import toy_tools
from examples.engine import help_of

SMALL = {"base_steps": 3, "base_batch": 4, "hidden": 8, "layers": 1}


def written_by_the_teacher(world, order):
    """The teacher's response without slips and noise, and whether it met a gap on a right sum."""
    total, right, met, words = order[0], order[0], False, [str(order[0])]
    for term in order[1:]:
        met |= (right, term) in world.gaps
        total, right = world.gaps.get((total, term), total + term), right + term
        words += [str(term), str(total)]
    return " ".join([*words, "<eos>"]), met


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------ the world


@pytest.mark.parametrize("terms", [(8, 5, 1), (3, 9, 4, 6), (1, 1, 7, 9, 4), (9, 2, 2, 8, 5, 3)])
def test_gap_free_share_against_all_orders_and_the_verifier(terms):
    world = toy.ToyWorld()
    orders = list(itertools.permutations(terms))
    free = 0
    for order in orders:
        text, met = written_by_the_teacher(world, order)
        free += not met
        verdict = siren.verify(text, str(sum(terms)), answer_form=world.answer_form)
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
        start, term, written = (token - 3 for token in slipping.demonstration([4, 5, 6], rng)[:3])
        slips += [written - start - term] if written != start + term else []
    assert set(slips) == {-10, -9, -2, -1, 1, 2, 10}  # -9: 4 + 5 - 10 is written as 0
    assert abs(len(slips) / 2000 - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 2000)

    noisy = toy.ToyWorld(slip=0, noise=1)
    drawn = [token for _ in range(500) for token in noisy.demonstration([1, 2, 3, 4], rng)[:-1]]
    assert min(drawn) == 3 and max(drawn) > 1000, "noise is a number, never <pad>, <eos> or ="


def test_splits_share_no_multiset_and_grades_hold():
    world = toy.ToyWorld(min_terms=5, max_terms=7)
    terms_of = {}
    for split in ("test", "validation"):
        for name, problems in world.heldout(100, split).items():
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
    assert len({len(p.prompt) for p in trained}) == 3, "5, 6 and 7 terms: left padding is real"
    for one, two in itertools.combinations(terms_of.values(), 2):
        assert not one & two, "a held-out problem, in whatever order, must not be trained on"


def test_toy_problems_are_functions_of_the_seed():
    world = toy.load(seed="1")
    assert world.train_problems(50, "a") == toy.load(seed="1").train_problems(50, "a")
    assert world.train_problems(50, "a") != world.train_problems(50, "b")
    assert world.gaps != toy.ToyWorld().gaps
    text = "8 3 1 5 2 = <pad> <eos> 1020"
    assert world.decode(world.encode(text)) == text
    with pytest.raises(ValueError, match="no such option"):
        toy.load(colour="red")


def test_the_default_world_is_the_one_of_the_results():
    """Raise toy_tools.FORMAT, teach the base model again and run the study again if this fails."""
    world, rng = toy.ToyWorld(), random.Random(7)
    assert world.fingerprint == "f2bc525a2c8e43aa"
    assert len(world.gaps) == 122 and digest(sorted(world.gaps.items())) == "6d9ae8ebec7ba95f"
    assert digest([tuple(p) for p in world.train_problems(100, "0/1")]) == "2246ee6bda0e7cbc"
    for split, expected in (("test", "df4ecde988fca918"), ("validation", "8798caba80c81036")):
        problems = [tuple(p) for group in world.heldout(50, split).values() for p in group]
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


# ------------------------------------------------------------------------------ the options


def test_split_is_an_option_but_no_part_of_the_world():
    world, other = toy.ToyWorld(), toy.load(siren.Config(), split="validation")
    assert other.heldout(8) == world.heldout(8, "validation") != world.heldout(8)
    assert world.heldout(8) == world.heldout(8, "test") and toy.load().split == "test"
    assert other.fingerprint == world.fingerprint and other.base_file == world.base_file
    assert other.train_problems(8, "a") == world.train_problems(8, "a")
    task = siren.load_task(siren.Config(task="toy_env:split=validation"))
    assert task.heldout(8) == world.heldout(8, "validation")
    with pytest.raises(ValueError, match="needs one of train, validation, test"):
        world.heldout(8, "tests")


def test_every_other_field_changes_the_fingerprint():
    world, seen = toy.ToyWorld(), set()
    changes = {"min_terms": 4, "max_terms": 6, "hidden": 72, "max_total": 32}
    for field in dataclasses.fields(world):
        value = changes.get(field.name, getattr(world, field.name))
        if field.name not in changes and field.name != "split":
            value = value * 2 if isinstance(value, float) else value + 1
        seen.add(dataclasses.replace(world, **{field.name: value}).fingerprint)
    assert len(seen) == len(dataclasses.fields(world)), "split alone keeps it"
    assert world.fingerprint in seen


def test_options_have_a_text_and_a_default():
    names = [field.name for field in dataclasses.fields(toy.ToyWorld)]
    assert list(toy.OPTIONS) == names
    for name, text in toy.OPTIONS.items():
        assert text.endswith(f" (default: {getattr(toy.ToyWorld, name)})") and len(text) < 100
    assert "--gap-share" in help_of("toy_env") and "--split" in help_of("toy_env")


BAD_OPTIONS = """
x=1                   | x='1': no such option; choose from min_terms, max_terms,
gap_share=lots        | gap_share='lots': needs float, such as 1
max_term=1.5          | max_term='1.5': needs int, such as 1
slip=2                | slip=2.0: needs a probability from 0 to 1
noise=-0.1            | noise=-0.1: needs a probability from 0 to 1
gap_share=nan         | gap_share=nan: needs a probability from 0 to 1
layers=0              | layers=0: needs a number from 1 to 100
base_steps=0          | base_steps=0: needs a number from 1 to
base_batch=1000000000 | base_batch=1000000000: needs a number from 1 to 100000
seed=-1               | seed=-1: needs a number from 0 to 4294967296
hidden=60             | hidden=60: needs a multiple of 8
hidden=0              | hidden=0: needs a number from 8 to
min_terms=1           | min_terms=1: needs a number from 2 to 16
max_terms=17          | max_terms=17: needs a number from 2 to 16
max_terms=4           | min_terms=5, max_terms=4: needs min_terms <= max_terms
max_term=30           | max_terms=5, max_term=30: needs at most 200000 multisets
vocab=77              | vocab=77: needs at least 78, for all that the teacher writes
max_total=7           | min_total=15, max_total=7, max_term=9: needs a training prompt of 5 terms
split=train           | split=train: needs test or validation
"""


@pytest.mark.parametrize("line", BAD_OPTIONS.strip().splitlines())
def test_bad_options_are_one_line(line, capsys):
    option, message = (part.strip() for part in line.split("|"))
    name, value = option.split("=")
    with pytest.raises(siren.ConfigError) as caught:
        toy.load(siren.Config(), **{name: value})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert toy_tools.main([f"--{name.replace('_', '-')}={value}"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_budget_that_does_not_fit_the_model_is_refused(capsys, tmp_path):
    assert toy.load(siren.Config(max_tokens=250)) == toy.ToyWorld()  # 6 + 250 = 256
    message = "--max-tokens 251: with a prompt of 6 tokens it must fit the model's 256 tokens"
    with pytest.raises(siren.ConfigError, match=message):
        toy.load(siren.Config(max_tokens=251))
    with pytest.raises(siren.ConfigError, match="with a prompt of 8 tokens"):
        toy.load(siren.Config(max_tokens=249), max_terms="7")
    for flags, text in (
        (["--max-tokens=251"], message),
        (["--eval-prompts=100000"], "100000 held-out problems: must be 1 to"),
        (["--eval-prompts=8", "--gap-share=0"], "8 held-out problems: must be 1 to 0"),
    ):
        assert siren.main([*flags, f"--out={tmp_path / 'run'}"]) == 2
        line = capsys.readouterr().err.strip()
        assert text in line and "\n" not in line
    assert "lower --eval-prompts" in line


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


def test_teaching_learns_repeats_and_leaves_the_random_state_alone():
    world = toy.ToyWorld(**SMALL | {"base_steps": 40, "base_batch": 16})
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    model, loss = world.teach()
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == threads
    again, same_loss = world.teach()
    assert loss == same_loss < math.log(1024)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    other = dataclasses.replace(world, seed=1).teach()[0]
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    with pytest.raises(KeyError), toy_tools.one_thread():
        raise KeyError
    assert torch.get_num_threads() == threads, "also after an error"


# ------------------------------------------------------------------------------ its file


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which base models are stored during the test."""
    monkeypatch.setattr(toy_tools, "ROOT", tmp_path)
    return tmp_path


def equal_weights(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_world_is_taught_once_and_then_read(place, monkeypatch):
    world = toy.ToyWorld(**SMALL)
    first = world.build_model()
    assert [file.name for file in (place / ".cache").iterdir()] == [world.base_file.name]
    assert equal_weights(first, world.teach()[0])
    monkeypatch.setattr(toy.ToyWorld, "teach", lambda world: pytest.fail("taught again"))
    assert equal_weights(first, world.build_model())


def test_writing_is_whole_or_not_at_all(place, monkeypatch):
    world, other = toy.ToyWorld(**SMALL), toy.ToyWorld(**SMALL).new_model()
    world.store(model := world.new_model())
    before = world.base_file.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            world.store(model)
    assert world.base_file.read_bytes() == before
    assert len(list((place / ".cache").iterdir())) == 1, "no part is left behind"

    real, inside = os.fsync, []

    def meanwhile(file):  # a second process stores at the same moment
        real(file)
        if not inside:
            inside.append(1)
            world.store(other)

    monkeypatch.setattr(os, "fsync", meanwhile)
    world.store(model)
    assert inside and world.base_file.read_bytes() == before
    assert equal_weights(world.build_model(), model)
    assert len(list((place / ".cache").iterdir())) == 1


def test_writing_follows_no_symbolic_link(place):
    world = toy.ToyWorld(**SMALL)
    victim = place / "victim"
    victim.write_text("mine")
    world.base_file.parent.mkdir()
    world.base_file.symlink_to(victim)
    world.store(world.new_model())
    assert victim.read_text() == "mine" and not world.base_file.is_symlink()
    assert equal_weights(world.build_model(), world.new_model())


def test_a_wrong_or_damaged_file_is_one_line(place):
    world = toy.ToyWorld(**SMALL)
    world.store(world.new_model())
    data = world.base_file.read_bytes()
    for bad in (b"", b"not a model", data[:-8], data[:40], b"\xff" * 64 + data[64:]):
        world.base_file.write_bytes(bad)
        with pytest.raises(siren.ConfigError, match="is damaged; run `python toy_env"):
            world.build_model()
    wide = dataclasses.replace(world, hidden=16)
    wide.store(wide.new_model())
    wide.base_file.replace(world.base_file)
    with pytest.raises(siren.ConfigError, match=f"is of world {wide.fingerprint}, not"):
        world.build_model()
    state = {name: x for name, x in wide.new_model().state_dict().items() if "lm_head" not in name}
    world.base_file.write_bytes(save(state, metadata={"world": world.fingerprint}))
    with pytest.raises(siren.ConfigError, match="is damaged"):  # shapes of another model
        world.build_model()


def test_a_folder_that_cannot_be_written_is_refused_before_teaching(place, monkeypatch):
    (place / ".cache").write_text("a file where the folder should be")
    monkeypatch.setattr(toy.ToyWorld, "teach", lambda world: pytest.fail("taught in vain"))
    with pytest.raises(siren.ConfigError, match=r"\.cache: can't be written"):
        toy.ToyWorld(**SMALL).build_model()


# ------------------------------------------------------------------------------ the command


def test_show_prints_an_example_that_holds(capsys):
    assert toy_tools.main(["--seed=3", "--gap-share", "0.2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    world = toy.ToyWorld(seed=3, gap_share=0.2)
    rows = [(line[:15].strip(), line[15:]) for line in lines]
    values = dict(rows)
    problem = world.train_problems(1, "show")[0]
    assert values["prompt"] == world.decode(problem.prompt)
    assert values["demonstration"].endswith(f"(right: {problem.answer})")
    assert values["gaps"] == f"{round(0.2 * 405)} of 405 pairs"
    for name, text in rows:
        if name == "gap":
            words = text.replace(",", "").split()
            assert world.gaps[int(words[0]), int(words[2])] == int(words[-1]) != int(words[4])
    for split in ("train", "validation", "test"):
        count, *grades = values[split].replace(" multisets of terms:", "").split(" ", 1)
        assert int(count) == sum(int(part.split()[0]) for part in grades[0].split(", "))


def test_rebuild_stores_what_it_teaches(place, capsys):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert toy_tools.main(["--rebuild-base", *flags]) == 0
    world = toy.ToyWorld(**SMALL)
    assert equal_weights(world.build_model(), world.teach()[0])
    printed = capsys.readouterr().out
    assert "nats per token; wrote .cache/" in printed and world.base_file.name in printed


def test_what_goes_wrong_is_one_line_and_an_exit_code(place, monkeypatch, capsys):
    errors = {1: OSError(28, "No space left on device"), 130: KeyboardInterrupt()}
    for code, error in errors.items():

        def teach(world, error=error):
            raise error

        monkeypatch.setattr(toy.ToyWorld, "teach", teach)
        assert toy_tools.main(["--rebuild-base"]) == code
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(place.iterdir()), "nothing was stored"


def test_check_base_tells_a_good_model_from_a_bad_one(monkeypatch, capsys):
    world = toy.ToyWorld()
    good, bad = world.build_model(), world.new_model()
    for model, verdict in ((good, True), (bad, False)):
        monkeypatch.setattr(toy.ToyWorld, "teach", lambda world, model=model: (model, 0.0))
        assert toy_tools.check_base(world, 250) is verdict
        monkeypatch.setattr(toy_tools, "check_base", lambda world, verdict=verdict: verdict)
        assert toy_tools.main(["--check-base"]) == (0 if verdict else 1)
        monkeypatch.undo()
    assert "differ by at most" in capsys.readouterr().out


def test_the_model_card_says_what_is_shipped():
    card = (Path(toy_tools.ROOT) / "assets" / "README.md").read_text()
    model, world = toy.ToyWorld().build_model(), toy.ToyWorld()
    count = sum(weight.numel() for weight in model.parameters())
    assert f"{count / 1000:.0f} thousand parameters" in card
    assert f"{world.base_file.stat().st_size / 1000:.0f} kB" in card
    assert f"{world.base_steps} steps of {world.base_batch} demonstrations" in card
    assert f"{world.layers} layers, width {world.hidden}" in card
