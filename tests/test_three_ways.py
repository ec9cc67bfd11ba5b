"""research/three_ways.py and its report: ways to be right, gaps, controls, jobs, tables."""

import doctest
import importlib
import itertools
import random
import shutil
from contextlib import nullcontext

import pytest
import torch

import siren
import toy_env
from research import study, study_report, three_ways, three_ways_report
from research.plugs import Config, plugged
from toy_env import EOS, ZERO, ToyWorld

WORLD = ToyWorld(min_terms=3, max_terms=3, min_total=6, max_total=20)
SIZE = three_ways.Size()


@pytest.mark.parametrize("name", ["three_ways", "three_ways_report"])
def test_worked_examples(name):
    found = doctest.testmod(importlib.import_module(f"research.{name}"))
    assert found.attempted > 0 and found.failed == 0


# ------------------------------------------------------------ the ways to be right
def responses_to(terms):
    """Every order of the terms, with every choice of errors in its two sums."""
    for order in set(itertools.permutations(terms)):
        for errors in itertools.product((0, -2, -1, 1, 2, 10), repeat=2):
            first = order[0] + order[1] + errors[0]
            last = first + order[2] + errors[1]
            if min(first, last) >= 0:
                yield order, errors, [order[0], order[1], first, order[2], last]


def test_ways_by_brute_force():
    """Over all orders and errors: what is right, and whether a gap or an error is in it."""
    counts = dict.fromkeys(three_ways.WAYS, 0)
    for terms in ((1, 5, 8), (2, 8, 9), (3, 3, 7), (8, 8, 4)):
        prompt = WORLD.problem(terms).prompt
        for order, errors, numbers in responses_to(terms):
            ids = [number + ZERO for number in numbers] + [EOS]
            pairs = [(order[0], order[1]), (numbers[2], order[2])]
            is_gap = [pair in WORLD.gaps for pair in pairs]
            reading = three_ways.read(WORLD, prompt, ids)
            assert reading.in_form and reading.wrong == sum(e != 0 for e in errors)
            assert reading.gaps_met == sum(is_gap)
            right_there = [g and e == 0 for g, e in zip(is_gap, errors)]
            assert reading.gaps_right == sum(right_there)
            if sum(errors) != 0:
                assert not study.is_right(WORLD, ids, str(sum(terms)))
                continue
            assert study.is_right(WORLD, ids, str(sum(terms)))
            due = "cancelled" if any(errors) else "filled" if any(is_gap) else "clean"
            assert three_ways.way(WORLD, prompt, ids) == due
            counts[due] += 1
    assert min(counts[way] for way in three_ways.WAYS[:3]) > 3


@pytest.mark.parametrize(
    "numbers",
    [
        (14,),  # the total alone
        (5, 8, 13, 14),  # a sum is missing
        (5, 9, 14),  # another term
        (5, 5, 10, 4, 14),  # right sums of other terms
        (5, 8, 13, 1, 14, 0, 14),  # one term too many
        (-1, 8, 13, 1, 14),  # begins with "="
    ],
)
def test_what_is_not_in_form_is_other(numbers):
    prompt = WORLD.problem((1, 5, 8)).prompt
    ids = [number + ZERO for number in numbers] + [EOS]
    assert three_ways.way(WORLD, prompt, ids) == "other"
    assert not three_ways.read(WORLD, prompt, [*ids[:-1], 9 + ZERO]).in_form  # never ended


def test_other_terms_are_swapped_or_merged():
    """5 9 14 has two terms for three, 5 5 10 4 14 three others; 14 alone has one."""
    problem = WORLD.problem((1, 5, 8))
    some = [
        (5, 9, 14),
        (5, 5, 10, 4, 14),
        (14,),
        (5, 8, 13, 14),
        (5, 9, 13, 2, 14),
        (5, 9, 15),
    ]
    responses = [[number + ZERO for number in numbers] + [EOS] for numbers in some]
    found = three_ways.ways_of(WORLD, [problem], responses)
    assert found["other"] == pytest.approx(5 / 6)  # the last one is wrong
    assert found["merged"] == pytest.approx(2 / 6) and found["swapped"] == pytest.approx(1 / 6)


def test_shares_and_pass_by_plain_loops():
    """Random responses to three prompts; pass@k by all subsets of k."""
    rng = random.Random(1)
    some = [(1, 5, 8), (2, 8, 9), (3, 3, 7)]
    problems = [WORLD.problem(terms) for terms in some]
    responses = []
    for terms in some:
        every = [numbers for _, errors, numbers in responses_to(terms) if sum(errors) == 0]
        every += [[sum(terms)], [1, 2, 3]]
        responses += [[n + ZERO for n in rng.choice(every)] + [EOS] for _ in range(4)]
    found = three_ways.ways_of(WORLD, problems, responses)
    scores = study.scores_of(WORLD, problems, responses)
    assert sum(found[way] for way in three_ways.WAYS) == pytest.approx(scores["avg@16"])
    sound = dict.fromkeys((1, 2, 4), 0.0)
    for i, problem in enumerate(problems):
        own = responses[4 * i : 4 * i + 4]
        good = []
        for ids in own:
            right = study.is_right(WORLD, ids, problem.answer)
            way = three_ways.way(WORLD, problem.prompt, ids)
            good.append(right and way in ("clean", "filled"))
        for k in sound:
            subsets = list(itertools.combinations(good, k))
            sound[k] += sum(map(any, subsets)) / len(subsets) / len(problems)
    for k, due in sound.items():
        assert found[f"sound/pass@{k}"] == pytest.approx(due)
        assert found[f"clean/pass@{k}"] <= due + 1e-9
    assert found["clean/pass@1"] == pytest.approx(found["clean"])


# --------------------------------------------------------------------- at the gaps
def test_contexts_are_right_up_to_the_first_gap():
    heldout = {tuple(sorted(terms)) for terms in WORLD.multisets["test"]}
    found = three_ways.contexts(WORLD, 3)
    assert found == three_ways.contexts(WORLD, 3)
    for context in found:
        numbers = [token - ZERO for token in context.before]
        total = numbers[0]
        for term, written in zip(numbers[1:-1:2], numbers[2:-1:2], strict=True):
            assert (total, term) not in WORLD.gaps and written == total + term
            total = written
        assert context.pair == (total, numbers[-1])
        terms = sorted(token - ZERO for token in context.prompt[:-1])
        assert tuple(terms) in heldout and all(x in terms for x in numbers[1::2])
    pairs = [context.pair for context in found]
    assert max(map(pairs.count, set(pairs))) == 3
    assert {pair in WORLD.gaps for pair in pairs} == {True, False}


def test_at_sums_against_one_context_at_a_time():
    world = toy_env.load(Config())
    model = world.build_model()
    some = [x for x in three_ways.contexts(world, 2) if x.pair in world.gaps][:9]
    found = three_ways.at_sums(model, world, some, Config(top_p=study.P))
    values = {}
    for context in some:
        with torch.no_grad():
            logits = model(torch.tensor([context.prompt + context.before])).logits[0, -1]
        pi = logits.double().softmax(-1)
        right = pi[sum(context.pair) + ZERO].item()
        wrong = pi[world.gaps[context.pair] + ZERO].item()
        h = -(pi * pi.log()).sum().item()
        values.setdefault(context.pair, []).append((right, wrong, h))
    pairs = [[sum(x) / len(x) for x in zip(*own)] for own in values.values()]
    due = [sum(x) / len(x) for x in zip(*pairs)]
    names = ("p_right", "p_wrong", "entropy")
    assert [found[name] for name in names] == pytest.approx(due, rel=1e-3)
    assert found["each"] == pytest.approx([pair[0] for pair in pairs], abs=6e-4)
    assert found["p_wrong"] > 0.9 > 0.1 > found["p_right"]  # the base model has its gaps


# ----------------------------------------------------------------- what is plugged
def trained(rule, folder, **changes):
    how = {"steps": 1, "prompts": 4, "mini_batches": 1, "eval_prompts": 1, "eval_samples": 2}
    cfg = siren.Config(**how | changes, out=str(folder), device="cpu")
    with plugged(f"research.three_ways:rule={rule}") if rule else nullcontext():
        run = siren.Run(cfg)
        siren.train(run)
    return run


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def test_coins_do_not_look_at_the_verdict(tmp_path, monkeypatch):
    """Verdicts turned round train the same weights, but the reward that is logged is true."""
    plain = trained("", tmp_path / "0", regularizer="none")
    one = trained("coins", tmp_path / "1", regularizer="none")
    again = trained("coins", tmp_path / "2", regularizer="none")
    other = trained("coins", tmp_path / "3", regularizer="none", seed=1)
    verify = siren.verify
    monkeypatch.setattr(siren, "verify", lambda *what: not verify(*what))
    turned = trained("coins", tmp_path / "4", regularizer="none")
    assert torch.equal(weights(one), weights(again))
    assert torch.equal(weights(one), weights(turned))
    assert not torch.equal(weights(one), weights(plain))
    assert not torch.equal(weights(one), weights(other))
    assert one.records[1]["reward"] == plain.records[1]["reward"]
    assert turned.records[1]["reward"] == 1 - plain.records[1]["reward"]


def test_token_first_takes_its_peaks_from_the_full_entropy(tmp_path):
    run = trained("token_first", tmp_path / "1", steps=0)
    cfg = run.cfg
    with plugged("research.three_ways:rule=token_first"):
        record = siren.training_step(run, 1)
    fresh = trained("", tmp_path / "2", steps=0)
    problems = fresh.task.train_problems(cfg.prompts, "0/1")
    rollout = siren.sample(fresh.model, fresh.task, problems, cfg, "0/1", cfg.group_size, 1.0)
    stats = siren.score(fresh.model, rollout, cfg)
    h_i = []
    for h, nucleus, mask in zip(stats["entropy"], stats["nucleus_entropy"], rollout.mask):
        h = h[mask].double()
        at_least = h >= h.quantile(cfg.peak_quantile) - 1e-12
        h_i.append(nucleus[mask][at_least].mean().item())
    assert record["h_agg"] == pytest.approx(sum(h_i) / len(h_i), rel=1e-5)
    usual = siren.training_step(fresh, 1)  # siren.py's own functions are back
    assert record["h_agg"] != pytest.approx(usual["h_agg"], rel=1e-3)


def test_watch_adds_the_gaps_and_changes_no_number(tmp_path):
    plain = trained("", tmp_path / "0")
    watched = trained("watch", tmp_path / "1")
    assert torch.equal(weights(plain), weights(watched))
    assert watched.records[0].items() >= plain.records[0].items()
    assert watched.records[0]["hard/gaps_p_right"] < 0.1
    with pytest.raises(ValueError, match="rule=x: must be one of watch, coins, token_first"):
        three_ways.plug("x")


# ------------------------------------------------------------------------ the jobs
@pytest.fixture(scope="module")
def stored():
    """The rows of the study, without those of three_ways.py."""
    files = study.Store(study.ROOT / "results").files
    found = {}
    for part in study.PARTS:
        found |= files[part]
    return found


def test_jobs_are_balanced_over_seeds(stored):
    jobs = three_ways.ways(SIZE, stored)
    seeds = [job.cfg.seed for job in jobs]
    assert seeds == sorted(seeds) and set(seeds) == set(range(16))
    assert len({job.key for job in jobs}) == len(jobs) == 16 * 11 + 12 * 2
    main = study.main_table(SIZE.main, stored)
    assert not {job.key for job in main} & {job.key for job in jobs}  # they see more
    numeric = (
        "lr",
        "beta",
        "top_p",
        "peak_quantile",
        "regularizer",
        "steps",
        "task",
        "prompts",
    )
    settings = {(job.label, *(getattr(job.cfg, name) for name in numeric)) for job in main}
    assert settings == {
        (job.label, *(getattr(job.cfg, name) for name in numeric))
        for job in jobs
        if not job.label.endswith("_coins")
    }
    watched = {(job.label, job.cfg.seed) for job in jobs if "watch" in job.cfg.plug}
    assert watched == set(itertools.product(three_ways.WATCHED, range(12)))
    many = {(job.label, job.cfg.seed) for job in jobs if job.final.many}
    assert many == set(itertools.product(three_ways.MANY, range(4)))


def test_candidates_are_as_many_for_each_method(stored):
    for name in ("tokens_96", "tokens_16384", "token_first"):
        part = three_ways.PARTS[name]
        candidates = part.candidates(SIZE, stored)
        assert {len(some) for some in candidates.values()} == {3}
        jobs = part.tune(SIZE, stored)
        assert len({job.key for job in jobs}) == len(jobs) == 9 * len(candidates)
        assert {job.cfg.seed for job in jobs} == set(three_ways.VALIDATION)
        assert {"split=validation" in job.cfg.task for job in jobs} == {True}
        assert {f"vocab={part.vocab}," in job.cfg.task for job in jobs} == {True}


def test_the_best_candidate_goes_to_the_test_seeds(stored):
    part = three_ways.PARTS["tokens_96"]
    wanted = {"siren": 1, "wo_top_p": 0, "anchor_only": 2, "dr_grpo": 1}
    candidates = part.candidates(SIZE, stored)
    rows = dict(stored)
    for job in part.tune(SIZE, stored):
        knob = "lr" if job.label == "dr_grpo" else "beta"
        due = candidates[job.label][wanted[job.label]][knob]
        good = getattr(job.cfg, knob) == due
        scores = {"avg@16": 0.5 + 0.1 * good, "maj@16": 0.5}
        rows[job.key] = {"evals": [{"grade": "hard", "temperature": 0.6, **scores}]}
    jobs = part.test(SIZE, rows)
    assert [job.cfg.seed for job in jobs] == [s for s in range(12) for _ in range(5)]
    for job in jobs[1:5]:
        knob = "lr" if job.label == "dr_grpo" else "beta"
        assert getattr(job.cfg, knob) == candidates[job.label][wanted[job.label]][knob]


def test_a_large_vocabulary_is_asked_at_one_temperature(stored):
    """The one that the report is about; the candidates are asked there alone anyway."""
    for name, due in (("tokens_96", (0.6, 1.0)), ("tokens_16384", (0.6,))):
        part = three_ways.PARTS[name]
        rows = {job.key: stored_row(job) for job in part.tune(SIZE, stored)}
        jobs = part.test(SIZE, stored | rows)
        assert {job.final.temperatures for job in jobs} == {due}
        assert {job.final._replace(temperatures=()) for job in jobs} == {
            SIZE.few.test._replace(temperatures=())
        }


def stored_row(job):
    scores = {"avg@16": 0.5, "maj@16": 0.5}
    return {"evals": [{"grade": "hard", "temperature": 0.6, **scores}]}


def test_what_is_there_is_not_run_again(stored, tmp_path, monkeypatch):
    """Two seeds at a time, CORE first; after a stop, only what is missing."""
    store = study.Store(tmp_path)
    store.rows = dict(stored)
    calls = []

    def run_jobs(part, jobs, store, pool, look):
        calls.append((part, [(job.label, job.cfg.seed) for job in jobs.values()]))
        store.rows |= {key: {} for key in list(jobs)[: 7 if len(calls) == 2 else None]}
        if len(calls) == 2:  # it is cut short
            raise KeyboardInterrupt

    monkeypatch.setattr(study, "run_jobs", run_jobs)
    with pytest.raises(KeyboardInterrupt):
        three_ways.run_part("ways", SIZE, store, None, plan=False)

    def jobs_of(seeds, core):
        jobs = three_ways.ways(SIZE, stored)
        own = [(job.label, job.cfg.seed) for job in jobs if job.cfg.seed in seeds]
        return [job for job in own if (job[0] in three_ways.CORE) == core]

    assert calls == [("ways", jobs_of((0, 1), True)), ("ways", jobs_of((2, 3), True))]
    three_ways.run_part("ways", SIZE, store, None, plan=True)
    assert len(calls) == 2
    three_ways.run_part("ways", SIZE, store, None, plan=False)
    due = [jobs_of((2, 3), True)[7:], jobs_of((4, 5), True), jobs_of((0, 1), False)]
    assert [jobs for _, jobs in calls[2:5]] == due
    assert sum(len(jobs) for _, jobs in calls[2:]) == 200 - 17 and len(calls) == 17


# ---------------------------------------------------------------------- the report
@pytest.fixture(scope="module")
def row():
    """Of a real job, as small as can be."""
    final = three_ways.TINY._replace(prompts=2, temperatures=(0.6,), many=32)
    changes = {"prompts": 4, "mini_batches": 1, "eval_every": 1, "eval_prompts": 2}
    changes = three_ways.with_rule(changes, "watch")
    [job] = study.each(three_ways.SMOKE.ours, [("siren", changes)], test=True)
    return study.run_job(job._replace(final=final), three_ways.look)


def test_a_row_has_what_the_files_need(row):
    lines = list(three_ways_report.score_lines("siren", 3, row))
    assert [(x["grade"], x["temperature"]) for x in lines] == [("easy", 0.6), ("hard", 0.6)]
    for line in lines:
        total = sum(line[way] for way in three_ways.WAYS)
        assert total == pytest.approx(line["avg@16"], abs=1e-4)
        assert line["gap_p_wrong"] > 0.8 > 0.2 > line["gap_p_right"]
    course = list(three_ways_report.course_lines("siren", 3, row))
    assert [x["step"] for x in course] == [0, 1, 2]
    assert course[2]["reward"] == pytest.approx(sum(row["rewards"]) / 2)
    assert {"pass", "maj", "gaps_p_right", "gaps_entropy"} <= course[0].keys()
    many = list(three_ways_report.many_lines("siren", 3, row))
    assert [x["k"] for x in many] == [1, 2, 4, 8, 16, 32]
    assert all(x["clean/pass"] <= x["sound/pass"] <= x["pass"] for x in many)


def test_csv_files_hold_what_was_written(row, tmp_path):
    path = tmp_path / "three_ways.csv"
    lines = list(three_ways_report.score_lines("siren", 3, row))
    three_ways_report.write_csv(path, lines)
    for line, due in zip(three_ways_report.read_csv(path), lines, strict=True):
        words = {"method": "siren", "grade": due["grade"]}
        assert {k: x for k, x in line.items() if isinstance(x, str)} == words
        numbers = {name: x for name, x in line.items() if name not in words}
        assert numbers == pytest.approx({name: due[name] for name in numbers}, rel=1e-4)
    assert three_ways_report.read_csv(tmp_path / "none.csv") == []


def line_of(method, seed, **values):
    usual = {"grade": "hard", "temperature": 0.6, "avg@16": 0.5, "clean": 0.25, "filled": 0.25}
    usual |= {"gap_p_right": 0.0}
    return {**usual, "method": method, "seed": seed, **values}


def test_comparisons_are_paired_by_seed_and_leave_out_nan():
    names = ("dr_grpo", *three_ways_report.REGULARIZERS)
    lines = [line_of(name, seed) for name in names for seed in (2, 1)]
    lines += [line_of("siren", 3, filled=0.5), line_of("dr_grpo", 3, **{"avg@16": 0.0})]
    lines += [line_of("siren", 1, filled=0.4, gap_p_right=0.3)]  # the later one counts
    found = three_ways_report.do_they_fill(lines)
    assert len(found) == 14
    assert found["SIREN - Dr.GRPO", "filled / right"] == pytest.approx([0.3, 0.0])
    assert found["SIREN - Dr.GRPO", "p(right sum) at gaps"] == pytest.approx([0.3, 0, 0])
    table = three_ways_report.tested(found)
    assert table[4][:2] == ["SIREN - Dr.GRPO", "filled / right"] and table[4][3] == "2"
    p = study_report.holm({k: study_report.sign_flip(x) for k, x in found.items()})
    assert [row[-1] for row in table] == [f"{x:.3f}" for x in (p[key] for key in found)]


def test_speed_by_hand():
    rewards = [0.0] * 10 + [0.8] * 10
    assert three_ways_report.speed(rewards) == 15  # five of ten at .8
    assert three_ways_report.speed([0.4] * 10) == 10
    assert three_ways_report.speed([0.39] * 200) == three_ways_report.NEVER == 201


def course(method, seed, rewards, scores):
    return [
        {"method": method, "seed": seed, "step": 20.0 * i, "reward": r, "pass": s, "maj": s}
        for i, (r, s) in enumerate(zip(rewards, scores, strict=True))
    ]


def test_equal_reward_by_hand():
    lines = course("dr_grpo", 0, (0.2, 0.5, 0.6), (0.1, 0.4, 0.3))
    lines += course("siren", 0, (0.2, 0.4, 0.55), (0.1, 0.2, 0.9))
    lines += course("dr_grpo", 1, (0.2, 0.4, 0.7), (0.1, 0.5, 0.2))
    lines += course("siren", 1, (0.2, 0.3, 0.4), (0.1, 0.2, 0.3))  # never there
    found = three_ways_report.at_equal_reward(lines, 0.5)
    assert found["SIREN - Dr.GRPO", "pass@16"] == pytest.approx([0.9 - 0.4])
    assert found["anchor only - Dr.GRPO", "maj@16"] == []
    # each seed's best step on the other one is 20
    early = three_ways_report.early_stop(lines)
    due = [0.9 - 0.4, 0.3 - 0.5]
    assert early["SIREN - Dr.GRPO, stopped early", "maj@16"] == pytest.approx(due)


def test_slopes_over_doublings():
    lines = []
    for size, steps in ((64, 10), (256, 30), (4096, 110)):
        for seed in (0, 1, 2):
            if (size, seed) != (256, 2):  # a seed that one size lacks does not count
                shared = {"vocabulary": size, "seed": seed}
                lines += [{"method": "siren", "speed": 50 + seed, **shared}]
                due = 50 + seed + (1 + seed) * steps
                lines += [{"method": "wo_top_p", "speed": due, **shared}]
    # 10, 30, 110 at 6, 8, 12 doublings: 100 / 6 = 16.7 or so by least squares
    x, y = (6, 8, 12), (10, 30, 110)
    mean_x, mean_y = sum(x) / 3, sum(y) / 3
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    slope /= sum((a - mean_x) ** 2 for a in x)
    found = three_ways_report.slopes(lines, "wo_top_p", "speed")
    assert found == pytest.approx([slope, 2 * slope])


def test_only_seeds_that_are_complete_are_reported(stored, row, tmp_path):
    """Seed 0 has CORE, seed 1 lacks one of it: tables and files are of seed 0 alone. The
    same when seed 0 has all methods."""
    store = study.Store(tmp_path)
    store.rows = dict(stored)
    jobs = three_ways.ways(SIZE, stored)
    four = [{**e, "temperature": t} for e in row["evals"] for t in (0.6, 1.0)]
    for job in jobs:
        is_main = not job.label.endswith("_coins")
        is_first = job.cfg.seed == 0 and job.label in three_ways.CORE
        if is_first or (job.cfg.seed == 1 and is_main and job.label != "siren"):
            store.rows[job.key] = {**row, "evals": four}
    assert three_ways_report.finished(SIZE, store).keys() == set(three_ways.CORE)
    three_ways_report.write(SIZE, store, tmp_path)
    lines = three_ways_report.read_csv(tmp_path / "three_ways.csv")
    assert {x["seed"] for x in lines} == {0} and len(lines) == 5 * 4
    store.rows |= {job.key: {**row, "evals": four} for job in jobs if job.cfg.seed == 0}
    three_ways_report.write(SIZE, store, tmp_path)
    page = (tmp_path / "three_ways.md").read_text()
    assert "**1 of 16 test seeds**" in page
    lines = three_ways_report.read_csv(tmp_path / "three_ways.csv")
    assert {x["seed"] for x in lines} == {0} and len(lines) == 13 * 4
    assert len(three_ways_report.read_csv(tmp_path / "tokens.csv")) == 4  # of 1024 tokens
    for name in ("three_ways", "three_ways_course", "three_ways_many", "tokens"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.[cm]*")}
    three_ways_report.write(SIZE, store, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("*.[cm]*")}


@pytest.mark.parametrize("workers", [0, 65])
def test_bad_input_is_one_line(workers, capsys):
    assert three_ways.main(["--workers", str(workers)]) == 2
    assert capsys.readouterr().err.startswith(f"three_ways.py: error: --workers {workers}: ")


def test_without_candidates_there_is_nothing_to_choose(tmp_path, capsys):
    assert three_ways.main(["--plan", "--out", str(tmp_path)]) == 2
    assert "first run: python research/study.py --part tune" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seed", "said"),
    [("16", "--again 16: must be one of (0, 1,"), ("15", "not all of these have rows yet")],
)
def test_again_needs_rows(seed, said, tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    shutil.copy(study.ROOT / "results" / "raw" / "tune.jsonl.gz", raw)
    assert three_ways.main(["--out", str(tmp_path), "--again", seed]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_of_it_and_again(tmp_path):
    assert three_ways.main(["--smoke", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "three_ways.md").read_text()
    for part in (
        "At the gaps",
        "Equal reward",
        "order of the masks",
        "Larger k",
        "vocabulary",
    ):
        assert part in page
    before = (tmp_path / "raw" / "ways.jsonl.gz").read_bytes()
    assert three_ways.main(["--smoke", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "raw" / "ways.jsonl.gz").read_bytes() == before
    assert three_ways.main(["--smoke", "--out", str(tmp_path), "--again", "0"]) == 0


def test_the_trend_waits_for_all_sizes():
    line = dict.fromkeys(
        ("speed", "end_reward", "end_H", "first_H", "useless_share", "lr", "beta"), 0.5
    )
    line |= dict.fromkeys(("avg@16", "maj@16", "pass@16"), 0.5)
    methods = ("siren", "wo_top_p", "anchor_only", "dr_grpo")
    sizes = (1024, *three_ways.VOCABULARIES)
    lines = [
        {"method": method, "vocabulary": size, "seed": seed, **line}
        for method, size, seed in itertools.product(methods, sizes, range(3))
    ]
    whole = "\n".join(three_ways_report.token_tables(lines))
    assert "| anchor only - SIREN | speed | +.000" in whole and "| beta 0.5 |" in whole
    some = [x for x in lines if x["vocabulary"] != sizes[-1]]
    part = "\n".join(three_ways_report.token_tables(some))
    assert "Slope" not in part and "once all sizes have their rows" in part
