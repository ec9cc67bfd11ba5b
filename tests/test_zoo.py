"""Tests of research/zoo: each method's numbers, its reductions to Dr.GRPO, and resuming.

Most of them train in a tiny world, Ways, in which a response is right if its first token is
one of eight: there are eight ways to be right, and Dr.GRPO gives up most of them within 40
steps.
"""

import dataclasses
import doctest
import importlib
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import make, same, small_model, t

import siren
from research import plugs, study
from research.plugs import Config, plugged
from research.zoo import (
    METHODS,
    VARIANTS,
    advantages,
    core,
    plug,
    reward,
    sampler,
    settings,
    support,
    table,
    terms,
    use,
    weights,
)

ROOT = Path(__file__).resolve().parents[1]
EVERY = {**METHODS, **VARIANTS}
SIZE = table.SIZE
PLUGGED = [name for name, method in EVERY.items() if method.is_plugged]


# -------------------------------------------------------------------------------- a tiny world
class Ways:
    """A task of siren.py, with a random model; a token is a number below 32, and 1 ends."""

    eos_ids = (1,)
    pad_id = 0
    equal = None
    normalize = None

    def build_model(self):
        return small_model()

    def train_problems(self, n, seed):
        return [SimpleNamespace(prompt=[5, 2 + i % 8, 7], answer="yes") for i in range(n)]

    def heldout(self, n):
        return {"some": self.train_problems(1, "")}

    def decode(self, ids):
        return "yes" if ids[0] % 4 == 2 else "no"

    def find_answer(self, text):
        return text

    def metrics(self, responses):
        return {}


def load(cfg):
    """So that `--task test_zoo` is this world."""
    return Ways()


SMALL = {"prompts": 8, "group_size": 8, "mini_batches": 2, "max_tokens": 4, "warmup_steps": 1}
SMALL |= {
    "lr": 1e-2,
    "eval_prompts": 1,
    "eval_samples": 1,
    "device": "cpu",
    "task": "test_zoo",
}


def train(folder, name, *, resume=False, steps=3, options=None, **more):
    """The records of a run of the method in the tiny world, without their times."""
    chosen = {**SMALL, **settings(name, **(options or {})), "steps": steps, **more}
    plug = chosen.pop("plug", "")
    cfg = siren.Config(**chosen, out=str(folder))
    with plugged(plug):
        records = siren.train(siren.Run(cfg, resume))
    return [{k: x for k, x in record.items() if k != "seconds"} for record in records]


def agree(records, others, **tolerance):
    """All that both have is equal, or close."""
    assert len(records) == len(others) > 1
    for one, other in zip(records, others):
        names = one.keys() & other.keys()
        assert len(names) >= 2
        for name in names:
            due = pytest.approx(other[name], **tolerance) if tolerance else other[name]
            assert one[name] == due, f"step {one['step']}, {name}"


# ------------------------------------------------------------------------- numbers, one by one
@pytest.mark.parametrize(
    "name",
    [
        "",
        ".advantages",
        ".core",
        ".reward",
        ".sampler",
        ".support",
        ".terms",
        ".weights",
        ".yours",
    ],
)
def test_worked_examples(name):
    found = doctest.testmod(importlib.import_module(f"research.zoo{name}"))
    assert found.attempted > 0 and found.failed == 0


@pytest.fixture
def batch():
    """Eight ragged responses, two groups of four, off-policy, with their H."""
    b = make()
    pi = b.logits.softmax(-1)
    b.entropy = torch.where(b.mask, -(pi * pi.log()).sum(-1), 0.0)
    b.rewards = t([1, 0, 0, 1, 0, 0, 0, 0])
    b.adv = siren.group_advantages(b.rewards, 4)[:, None].expand(b.mask.shape)
    return b


def each(b, rule):
    """rule(i, s) at each token, 0 in padding."""
    out = np.zeros(b.mask.shape)
    for i, s in np.argwhere(b.mask.numpy()):
        out[i, s] = rule(i, s)
    return out


def on_tokens(b, x):
    return torch.where(b.mask, x, 0.0)


def test_entropy_advantage_against_its_oracle(batch):
    b = batch
    got = on_tokens(b, advantages.entropy_advantage(b.adv, b.entropy, 0.4, 2.0))
    due = each(b, lambda i, s: b.adv[i, s] + min(0.4 * b.entropy[i, s], abs(b.adv[i, s]) / 2))
    same(got, due, "A + min(alpha H, |A| / kappa)")
    assert ((got > 0) == (on_tokens(b, b.adv) > 0)).all(), "kappa > 1 keeps the sign"
    assert (got[4:] == 0).all(), "where A = 0, nothing changes"


@pytest.mark.parametrize("quantile", [0.1, 0.28, 0.4, 0.6, 0.8, 1.0])
def test_quantile_advantage_is_the_definition(quantile):
    for right in range(26):
        rewards = [1.0] * right + [0.0] * (25 - right)
        random.Random(right).shuffle(rewards)
        due = min(x for x in rewards if sum(r <= x for r in rewards) >= quantile * 25 - 1e-9)
        got = advantages.quantile_advantage(t(rewards), 25, quantile)
        same(got, t(rewards) - due, f"b is the {quantile}-quantile, {right} of 25 right")


def test_quantile_advantage_has_a_table():
    """G = 8, K = 0.4: up to four right ones teach alone; from five on the wrong ones do."""
    for right in range(9):
        rewards = t([1.0] * right + [0.0] * (8 - right))
        due = rewards if right <= 4 else rewards - 1
        same(advantages.quantile_advantage(rewards, 8, 0.4), due, f"{right} of 8 right")


def test_arm_against_its_oracle(batch):
    b = batch
    confidence = []
    for i in range(8):
        own = np.sort(b.old_logp[i][b.mask[i]].numpy())
        confidence.append(math.exp(own[: max(1, math.ceil(0.3 * len(own) - 1e-9))].mean()))
    same(
        advantages.low_confidence(b.old_logp, b.mask, 0.3), confidence, "the least likely 30 %"
    )

    def rule(i, s):
        group = confidence[4 * (i // 4) : 4 * (i // 4) + 4]
        return b.adv[i, s] + (0.7 * (np.mean(group) - confidence[i]) if i < 4 else 0)

    got = advantages.arm(b.adv, b.old_logp, b.rewards, b.mask, 4, 0.7, 0.3)
    same(on_tokens(b, got), each(b, rule), "A + alpha (mean c - c), off where all are wrong")
    paper = torch.tensor([[0.9, 0.95, 0.99, 0.5, 0.4, 0.97, 0.99, 0.98, 0.9, 0.99]]).log()
    assert advantages.low_confidence(paper, paper < 0).item() == pytest.approx(
        0.447214, abs=1e-6
    )


def test_covariance_against_its_oracle(batch):
    b = batch
    a, x = (v[b.mask].numpy() for v in (b.adv, b.logp))
    due = each(b, lambda i, s: (b.adv[i, s] - a.mean()) * (b.logp[i, s] - x.mean()))
    same(
        weights.covariance(b.adv, b.logp, b.mask),
        due,
        "means over the tokens, without padding",
    )
    pi = t([[0.9, 0.5, 0.1, 0.9, 0.5, 0.1]])
    got = weights.covariance(t([[0.5] * 3 + [-0.5] * 3]), pi.log(), pi > 0)
    same(
        got, t([[0.464169, 0.170275, -0.634444, -0.464169, -0.170275, 0.634444]]), "", tol=1e-5
    )


def test_clip_cov_leaves_out_some_of_a_band(batch):
    b = batch
    cov = weights.covariance(b.adv, b.logp, b.mask)
    band = b.mask & (cov > -0.1) & (cov < 0.2)
    outs = []
    for seed in range(40):
        args = (cov, b.mask, 0.1, -0.1, 0.2)
        got = weights.clip_cov(*args, torch.Generator().manual_seed(seed))
        outs.append(got == 0)
        same(got, weights.clip_cov(*args, torch.Generator().manual_seed(seed)), "it is seeded")
    count = max(1, math.floor(0.1 * int(b.mask.sum())))
    assert int(band.sum()) > count > 1
    assert all(int(out.sum()) == count and not (out & ~band).any() for out in outs)
    assert (torch.stack(outs).any(0) == band).all(), "each token of the band has its turn"
    few = weights.clip_cov(cov, b.mask, 1.0, -0.1, 0.2, torch.Generator())
    assert ((few == 0) == band).all(), "never one outside, if the band is small"


def test_top_tokens_are_exactly_as_many(batch):
    b = batch
    for count in (1, 3, 10):
        ties = weights.top_tokens(torch.ones_like(b.logp), b.mask, count)
        assert int(ties.sum()) == count and not (ties & ~b.mask).any()
        chosen = weights.top_tokens(b.entropy - 9, b.mask, count)  # below the padding's 0
        least = sorted((b.entropy - 9)[b.mask].tolist())[-count]
        assert (chosen == (b.mask & (b.entropy - 9 >= least))).all()


def test_forking_tokens_of_the_batch_and_of_the_response(batch):
    b = batch
    total = int(b.mask.sum())
    got = weights.forking_tokens(b.entropy, b.mask, 0.2)
    count = math.ceil(0.2 * total)
    least = sorted(b.entropy[b.mask].tolist())[-count]
    same(got, each(b, lambda i, s: (b.entropy[i, s] >= least) * total / count), "of the batch")
    assert (weights.forking_tokens(b.entropy, b.mask, 1.0)[b.mask] == 1).all()
    own = [np.quantile(h[m].numpy(), 0.8) for h, m in zip(b.entropy, b.mask)]
    got = weights.forking_tokens_per_response(b.entropy, b.mask, 0.2)
    same(got, each(b, lambda i, s: b.entropy[i, s] > own[i]), "of the response")


def test_steer_against_its_oracle(batch):
    b = batch

    def change(i, s):
        pi, old = b.logp[i, s].exp(), b.old_logp[i, s].exp()
        return abs(b.adv[i, s] / old * pi * (1 - pi) * (b.logp[i, s] + b.entropy[i, s]))

    om = each(b, change)
    k = -math.log(0.7) / max(0.02, om.max())
    got = weights.steer(b.adv, b.logp, b.old_logp, b.entropy, b.mask, 0.7)
    same(on_tokens(b, got), each(b, lambda i, s: math.exp(-k * om[i, s])), "exp(-k |Om|)")
    assert got[b.mask].min().item() == pytest.approx(0.7), "the largest change gets w_min"
    assert (weights.steer(b.adv, b.logp, b.old_logp, b.entropy, b.mask, 1.0) == 1).all()


def test_positive_weight_and_its_controller(batch):
    b = batch
    due = each(b, lambda i, s: 0.3 if b.adv[i, s] > 0 else 1.0)
    same(on_tokens(b, weights.positive_weight(b.adv, 0.3)), due, "lam where A > 0")
    assert (weights.positive_weight(b.adv, 1.0) == 1).all(), "lam = 1 is Dr.GRPO"
    lam = 0.9
    for _step in range(5):
        lam = weights.positive_coefficient(lam, entropy=1.0, target=0.5)
    assert lam == 1.0, "never above 1"


def test_divergences_on_whole_distributions():
    """The mean of f over the base's samples is KL(base || pi), and twice the JS divergence."""
    base, pi = t([0.7, 0.2, 0.1]), t([0.5, 0.3, 0.2])
    middle = (base + pi) / 2
    kl = (base * (base / pi).log()).sum()
    js = ((base * (base / middle).log()).sum() + (pi * (pi / middle).log()).sum()) / 2
    for kind, due, number in (("kl", kl, 0.085123), ("js", 2 * js, 0.043802)):
        got = (base * terms.divergence((pi / base).log(), kind)).sum()
        same(got, due, kind)
        assert got.item() == pytest.approx(number, abs=1e-6)
        log_u = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        value = terms.divergence(log_u, kind).sum()
        (slope,) = torch.autograd.grad(value, log_u)
        assert value.item() == slope.item() == 0, "f(1) = 0, and it is flat there"
    with pytest.raises(ValueError, match="must be kl or js"):
        terms.divergence(torch.zeros(1), "tv")


def test_terms_against_their_oracles(batch):
    b = batch
    gap = b.logp - b.old_logp

    def leaky(i, s):
        x = -math.copysign(1, b.adv[i, s]) * gap[i, s]
        return abs(b.adv[i, s]) * (x if x > 0 else 0.5 * x)

    same(on_tokens(b, terms.calibration(gap, b.adv, 0.5)), each(b, leaky), "CalibRL")
    got = on_tokens(b, terms.corridor_penalty(b.entropy, 0.5, 0.8, 1.2))
    due = each(b, lambda i, s: max(0.4 - b.entropy[i, s], 0) + max(b.entropy[i, s] - 0.6, 0))
    same(got, due, "EPO")
    assert (terms.corridor_penalty(b.entropy, 0.0, 0.8, 1.2) == 0).all(), "no history yet"
    same(
        terms.difficulty_weight(t([0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1]), 4, 0.5)[
            ::4, 0
        ],
        t([1, 0.5, 0, 0]),
        "AER: the harder, the more",
    )


def test_apr_and_the_support_metrics():
    assert reward.settled_reward(1.0, ["3", "8", "8"], 0.6) == pytest.approx(1 - 0.2)
    assert reward.settled_reward(1.0, ["3", "7", "8"], 0.6) == 1.0, "nothing comes after it"
    assert reward.settled_reward(0.0, [None, None], 0.6) == 0.0
    rng = random.Random(0)
    base, policy = ([rng.random() < p for _ in range(99)] for p in (0.5, 0.7))
    both, sets = (
        support.support(base, policy),
        [{i for i, x in enumerate(y) if x} for y in (base, policy)],
    )
    p, e, s = len(sets[0] & sets[1]), len(sets[1] - sets[0]), len(sets[0] - sets[1])
    assert both["SRR"] == p / (p + s) and both["NDR"] == e / (p + e)
    assert 1 / both["SDS"] == pytest.approx((1 / both["SRR"] + 1 / both["NDR"]) / 2)
    assert both["NSCR"] == (e - s) / len(sets[0] | sets[1])
    assert math.isnan(support.support([False], [False])["SRR"])


def test_solved_is_pass_at_k():
    task, model, cfg = Ways(), small_model(), Config(**{**SMALL, "prompts": 8})
    problems = task.train_problems(8, "")
    found = support.solved(model, task, problems, cfg, 4, 1.0)
    again = support.solved(model, task, problems, cfg, 4, 1.0)
    more = support.solved(model, task, problems, cfg, 64, 1.0)
    assert found == again and 0 < sum(found) < sum(more)


# ----------------------------------------------------------------------- the update they share
@pytest.mark.parametrize("algorithm", ["dr_grpo", "grpo"])
def test_policy_loss_takes_an_advantage_for_each_token(batch, algorithm):
    b, how = batch, (9, 0.2, 0.3, algorithm)
    adv = siren.group_advantages(b.rewards, 4)
    due, stats = siren.policy_loss(b.logp, b.old_logp, adv, b.mask, *how)
    got, ours = siren.policy_loss(b.logp, b.old_logp, b.adv, b.mask, *how)
    assert got == due and ours == stats, "the same to the last bit"
    # a weight of the loss is a factor of the advantage
    w = torch.rand(b.mask.shape, dtype=torch.float64)
    ratio = (b.logp - b.old_logp).exp()
    gain = w * torch.min(ratio * b.adv, ratio.clamp(0.8, 1.3) * b.adv)
    due = -core.per_response(gain, b.mask, 9, algorithm)
    same(siren.policy_loss(b.logp, b.old_logp, w * b.adv, b.mask, *how)[0], due, "weights")


OFF = {  # options with which a method is Dr.GRPO
    "adaptive_bonus": {"eta": 0.0}, "trl_adaptive": {"delta": 0.0}, "aer": {"eta": 0.0},
    "epo": {"lam": 0.0}, "clip_cov": {"rho": 0.0}, "kl_cov": {"c": 0.0},
    "entropy_advantage": {"alpha": 0.0}, "forking_tokens": {"share": 1.0}, "steer": {"w_min":
    1.0}, "arm": {"alpha": 0.0}, "dph_kl": {"eta": 0.0}, "dph_js": {"eta": 0.0}, "calibrl":
    {"lam": 0.0},
}  # fmt: skip
CHEAP = {"dph_kl": {"prompts": 8, "samples": 8}, "dph_js": {"prompts": 8, "samples": 8}}


@pytest.mark.parametrize("name", OFF)
def test_a_coefficient_of_zero_is_dr_grpo_bit_for_bit(name, tmp_path):
    clip = {k: x for k, x in METHODS[name].config.items() if k.startswith("clip")}
    plain = train(tmp_path / "plain", "dr_grpo", **clip)
    got = train(tmp_path / "zoo", name, options={**CHEAP.get(name, {}), **OFF[name]})
    agree(got, plain)
    assert got[-1]["policy_loss"] != 0 and got[-1]["grad_norm"] > 0


def test_a_constant_lam_of_one_is_dr_grpo_and_so_is_yours_with_zero(tmp_path, monkeypatch):
    plain = train(tmp_path / "plain", "dr_grpo")
    par = dataclasses.replace(METHODS["par"], start={"coefficient": 1.0})
    monkeypatch.setitem(METHODS, "par", par)
    agree(train(tmp_path / "par", "par", options={"tau": 0.0}), plain)
    agree(train(tmp_path / "0", "dr_grpo", plug="research.zoo.yours:c=0"), plain)
    yours = train(tmp_path / "9", "dr_grpo", plug="research.zoo.yours:c=9")
    assert yours[1]["changed_share"] > 0.05 and yours[1]["grad_norm"] > plain[1]["grad_norm"]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# numbers with which each method acts within three steps
ACTS = {
    "adaptive_bonus": {"eta": 1.0}, "trl_adaptive": {"delta": 0.1}, "aer": {"eta": 1.0, "tau":
    1.0}, "epo": {"lam": 0.1, "k_high": 1.0}, "clip_cov": {"rho": 0.1}, "kl_cov": {"c": 3.0,
    "rho": 0.1}, "cure": {"k": 2}, **CHEAP,
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [slow(name) if name in VARIANTS else name for name in PLUGGED]
)
def test_micro_batch_size_does_not_matter(name, tmp_path):
    runs = []
    for size in (64, 5):
        more = {"micro_batch_size": size, "lr": 1e-3}
        runs.append(train(tmp_path / str(size), name, options=ACTS.get(name), **more))
    agree(*runs, rel=2e-3, abs=2e-5)


STATEFUL = [name for name in PLUGGED if EVERY[name].controller]


@pytest.mark.parametrize("name", [*STATEFUL, "clip_cov", "dph_kl", "cure"])
def test_a_resumed_run_has_the_same_numbers(name, tmp_path):
    options = ACTS.get(name)
    whole = train(tmp_path / "whole", name, steps=4, options=options)
    train(tmp_path / "parts", name, steps=2, options=options)
    again = train(tmp_path / "parts", name, steps=4, options=options, resume=True)
    agree(
        again[1:2] + again[3:], whole[1:2] + whole[3:]
    )  # the third was the first part's last
    if name in STATEFUL:
        states = [
            {k: r[k] for k in ("coefficient", "history") if k in r}.values() for r in whole[1:]
        ]
        assert len(set(map(tuple, states))) > 2, "the state moves"


def test_controllers_follow_their_formulas_in_a_run(tmp_path):
    """From the records alone: what step k + 1 has is a function of step k's state and
    entropy."""
    for name in STATEFUL:
        options = {**METHODS[name].options, **ACTS.get(name, {})}
        o, records = (
            SimpleNamespace(**options),
            train(tmp_path / name, name, steps=6, options=ACTS.get(name))[1:],
        )
        h = [record["entropy"] for record in records]
        c = 0.0
        for k, record in enumerate(records[1:], 1):
            assert record["initial_entropy"] == pytest.approx(h[0])
            if name in ("adaptive_bonus", "aer"):
                c = max(0.0, c + o.eta * (o.tau * h[0] - h[k - 1]))
            elif name == "trl_adaptive":
                low = h[k - 1] <= o.tau * h[0]
                c = min(1.0, c + o.delta) if low else max(0.0, c - o.delta)
                assert record["applied_coefficient"] == pytest.approx(c if low else 0.0)
            elif name == "par":
                c = min(1, max(0, c - o.step if h[k - 1] < o.tau * h[0] else c + o.step))
            else:
                assert record["history"] == pytest.approx(sum(h[:k]) / k)
                due = o.alpha * (1 + math.exp(-o.gamma * (k + 1) / (o.steps / 2)))
                assert record["penalty_weight"] == pytest.approx(due)
                continue
            assert record["coefficient"] == pytest.approx(c), f"{name}, step {k + 1}"


@pytest.mark.parametrize("algorithm", ["dr_grpo", "grpo"])
def test_trls_term_is_a_mean_over_tokens(batch, algorithm):
    state = SimpleNamespace(applied_coefficient=0.3)
    v = SimpleNamespace(mask=batch.mask, max_tokens=9, algorithm=algorithm, state=state)
    weights = METHODS["trl_adaptive"].term_weights(v)
    term = core.per_response(weights * batch.entropy, batch.mask, 9, algorithm)
    assert float(term) == pytest.approx(
        -0.3 * float(batch.entropy[batch.mask].mean()), rel=1e-5
    )


# --------------------------------------------------------------------------------- the sampler
def test_cure_branches_where_the_policy_was_undecided():
    task, model, cfg = Ways(), small_model(), Config(**{**SMALL, "max_tokens": 6})
    problems, common = task.train_problems(8, ""), (cfg, "0/7", 8, 1.0)
    options = {"tails": 3, "k": 2}
    out = sampler.branch(siren.sample, model, task, problems, *common, **options)
    again = sampler.branch(siren.sample, model, task, problems, *common, **options)
    assert all((x == y).all() for x, y in zip(out, again)), "a function of the key"
    with torch.no_grad():
        scored = siren.score(model, out, cfg)
    drawn, texts = out.logp < 0, out.responses()
    same(out.logp[drawn], scored["logp"][drawn], "tails follow their prefix", tol=1e-4)
    cuts = set()
    for i in range(0, 64, 8):
        assert (out.prompt[i : i + 8] == torch.tensor(problems[i // 8].prompt)).all()
        assert (drawn[i : i + 2] == out.mask[i : i + 2]).all(), "two whole responses"
        for j in range(i + 2, i + 8):
            origin = i + (j - i - 2) // 3
            cut = int((out.mask[j] & ~drawn[j]).sum())
            assert drawn[j][cut : len(texts[j])].all() and len(texts[j]) <= cfg.max_tokens
            assert texts[j][:cut] == texts[origin][:cut]
            h = scored["entropy"][origin][: len(texts[origin])].tolist()
            best = sorted(range(1, len(h)), key=lambda s: -h[s])[:2]
            assert cut in best or len(h) == 1
            cuts.add(cut)
    assert len(cuts) > 2
    with pytest.raises(ValueError, match="--group-size 6: must be a multiple of 1"):
        sampler.branch(siren.sample, model, task, problems, cfg, "0/7", 6, 1.0, **options)


def test_cure_trains_drawn_tokens_alone_and_leaves_evaluation_as_it_is(tmp_path):
    cure, plain = train(tmp_path / "cure", "cure"), train(tmp_path / "plain", "dr_grpo")
    assert cure[0] == plain[0], "the base is evaluated with siren.sample"
    assert 0 < cure[1]["changed_share"] < 0.75
    assert cure[1]["reward"] != plain[1]["reward"]


# --------------------------------------------------------------------------- what they promise
def four_runs(folder, name, options=None):
    """Reward and mean H of the last five of 40 steps, and H of the first, means of four seeds.

    Four, since a run is chaotic: another processor's rounding makes another run of the same
    seed.
    """
    runs = [train(folder / str(s), name, steps=40, options=options, seed=s) for s in range(4)]
    ends = [run[-5:] for run in runs]
    reward, last = (
        np.mean([[r[key] for r in end] for end in ends]) for key in ("reward", "entropy")
    )
    return reward, last, np.mean([run[1]["entropy"] for run in runs])


@pytest.fixture(scope="module")
def dr_grpo(tmp_path_factory):
    """H after 40 steps of Dr.GRPO: most of the ways are given up."""
    reward, last, first = four_runs(tmp_path_factory.mktemp("promise"), "dr_grpo")
    assert reward > 0.9 and last < 0.6 * first
    return last


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("epo", {"lam": 0.06}),
        slow("adaptive_bonus", {"eta": 0.05}),
        slow("trl_adaptive", {"delta": 0.01}),
        slow("clip_cov", {"rho": 0.2}),
        slow("kl_cov", {"c": 3.0, "rho": 0.1}),
        slow("arm", {"alpha": 1.0}),
        slow("dph_kl", {"eta": 1.0, **CHEAP["dph_kl"]}),
    ],
)
def test_these_keep_more_entropy_than_dr_grpo(name, options, dr_grpo, tmp_path):
    _, last, _ = four_runs(tmp_path, name, options)
    assert last > dr_grpo + 0.3


# --------------------------------------------------------------------- all of them, on the toy
@pytest.mark.parametrize("name", EVERY)
def test_every_method_trains_on_the_toy(name, tmp_path):
    options = {"prompts": 32, "samples": 8} if name.startswith("dph") else {}
    sizes = {"max_tokens": 16, "lr": 3e-4, "prompts": 4, "task": "toy_env"}
    records = train(tmp_path / "x", name, steps=2, options=options, **sizes)
    values = [x for record in records for x in record.values()]
    assert len(records) == 3 and all(map(math.isfinite, values))
    assert all(record["grad_norm"] > 0 for record in records[1:])


def test_the_registry_is_complete():
    numbers = {method.number for method in METHODS.values()}
    assert set(range(1, 17)) - {15, 14} <= numbers | {0} and {14, 15, 16, 19} <= numbers
    for name, method in METHODS.items():
        assert method.certainty in ("high", "medium", "low"), name
        assert len(method.candidates) == (0 if name.startswith("dr_grpo") else 4), name
        steps = [b / a for a, b in zip(method.candidates, method.candidates[1:])]
        assert all(1 < step <= 3.4 for step in steps), (
            f"{name}: factors of about three at most"
        )
        if method.coefficient:
            known = vars(Config()) if not method.is_plugged else method.options
            assert method.coefficient in known, name
    page = (ROOT / "docs" / "zoo.md").read_text()
    assert all(f"`{name}`" in page for name in EVERY)


# ---------------------------------------------------------------------- the command, bad input
def command():
    """research/zoo.py, which has the package's name."""
    spec = importlib.util.spec_from_file_location("zoo_command", ROOT / "research" / "zoo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_lists_and_trains(tmp_path, capsys, monkeypatch):
    main = command().main
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(EVERY)
    monkeypatch.chdir(tmp_path)
    flags = [word for k, x in SMALL.items() for word in ("--" + k.replace("_", "-"), str(x))]
    assert main(["--method", "qae:quantile=0.8", *flags, "--steps", "2", "--seed", "5"]) == 0
    assert len((tmp_path / "runs/qae-seed5/metrics.jsonl").read_text().splitlines()) == 3
    assert "reward" in capsys.readouterr().out


def exit_code(main, words):
    try:
        return main(words)
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ([], 2, "write --list, --table, or --method NAME"),
        (["--method", "ppo"], 2, "method ppo: must be one of dr_grpo, siren, "),
        (["--method", "qae:K=0.8"], 2, "K=0.8: QAE has no such option, but quantile"),
        (
            ["--method", "qae:quantile=x"],
            2,
            "--plug research.zoo:method=qae,quantile=x: could",
        ),
        (["--method", "qae:quantile=-1"], 2, "quantile=-1: must be from 0 to 1"),
        (["--method", "siren:gamma=1"], 2, "gamma=1: siren.py has no such setting"),
        (["--method", "siren:top_p=2"], 2, "2.0: must be "),
        (
            ["--method", "qae", "--regularizer", "anchor"],
            2,
            "--regularizer anchor: QAE comes in",
        ),
        (["--method", "par", "--steps"], 2, "--steps: expected one argument"),
        # these two are found at the first step
        (
            ["--method", "dph_kl:mastered=1"],
            2,
            "mastered=1.0: the base masters no prompt; lower",
        ),
        (
            ["--method", "cure", "--group-size", "6"],
            2,
            "--group-size 6: must be a multiple of",
        ),
    ],
)
def test_bad_input_is_one_line(words, code, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [word.replace("_", "-") for word in words if word.startswith("--")]
    extra = [f"--{k.replace('_', '-')}={x}" for k, x in SMALL.items()] if words else []
    extra = [word for word in extra if word.split("=")[0] not in given]
    words = [*words, *(extra if "--steps" not in words else [])]
    assert exit_code(command().main, words) == code
    *bar, line = capsys.readouterr().err.splitlines()  # the bar of a run that has begun
    assert line.startswith(("zoo.py: error: ", "siren.py: ")) and expected in line
    assert all("error" not in text and "Traceback" not in text for text in bar)


def test_plug_needs_a_method_that_is_more_than_settings():
    with pytest.raises(ValueError, match="SIREN is settings of siren"):
        plug("siren")
    before = dict(vars(siren))
    with plugged("research.zoo:method=cure,k=3"):
        for name in ("Run", "training_step", "group_advantages", "update", "sample"):
            assert getattr(siren, name) is not before[name]
    assert vars(siren) == before


# -------------------------------------------------------------------------- plugs, the command
def flags_of(folder, *more):
    values = {**SMALL, "regularizer": "none", "out": str(folder), "steps": "2"}
    return [f"--{k.replace('_', '-')}={x}" for k, x in values.items()] + list(more)


def test_the_command_of_plugs_trains_as_the_context_does(tmp_path):
    due = train(tmp_path / "due", "par", steps=2)
    words = ["--plug", "research.zoo:method=par", *flags_of(tmp_path / "x")]
    assert plugs.main(words) == 0
    records = siren.load_checkpoint(tmp_path / "x")["records"]
    agree([{k: x for k, x in r.items() if k != "seconds"} for r in records], due)
    assert "coefficient" in records[-1]


def test_a_run_goes_on_with_the_same_plugs_only(tmp_path, capsys):
    """Neither another plug nor none, nor siren.py itself, may go on with what a plug began."""
    par = ["--plug", "research.zoo:method=par"]
    plugged_run, plain = tmp_path / "plugged", tmp_path / "plain"
    assert plugs.main([*par, *flags_of(plugged_run)]) == 0
    assert plugs.main(flags_of(plain)) == 0, "without a plug it is siren.py"
    assert siren.load_checkpoint(plugged_run)["config"]["plug"] == par[1]
    assert "plug" not in siren.load_checkpoint(plain)["config"]
    capsys.readouterr()
    more = flags_of(plugged_run, "--resume", "--steps=3")
    other = ["--plug", "research.zoo:method=par,tau=0.1"]
    for words, folder in ((other, plugged_run), (par, plain)):
        words = [*words, *flags_of(folder, "--resume", "--steps=3")]
        assert exit_code(plugs.main, words) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("siren.py: ") and "--resume: --plug was" in line
    with pytest.raises((TypeError, SystemExit)):  # plug is no setting of siren.py
        siren.main(more)
    assert plugs.main([*par, *more]) == 0
    assert len(siren.load_checkpoint(plugged_run)["records"]) == 4


@pytest.mark.parametrize(
    ("plug", "said"),
    [
        ("research.nothing", "No module named 'research.nothing'"),
        ("research.scores", "has no attribute 'plug'"),
        ("research.zoo:name=par", "missing 1 required positional argument: 'method'"),
        ("research.official:strictly=1", "'strictly'"),
    ],
)
def test_a_bad_plug_is_one_line(plug, said, capsys):
    before = dict(vars(siren))
    assert plugs.main(["--plug", plug]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"plugs.py: error: --plug {plug}: ") and said in error
    assert error.count("\n") == 1 and dict(vars(siren)) == before


def test_worked_examples_of_plugs():
    found = doctest.testmod(plugs)
    assert found.attempted > 0 and found.failed == 0


def test_an_option_keeps_its_kind():
    made = []
    method = dataclasses.replace(METHODS["cure"])
    with plugged(""):
        use(method, k="3")
        made.append(siren.sample.__self__.options)
    assert made[0].k == 3 and type(made[0].k) is int and made[0].tails == 3


def row_of(job, noise):
    """A row as study.run_job makes it, from a policy that is best with the second
    candidate."""
    found = table.candidates(job.label) if job.label in EVERY else [{}]
    at = [c for c in found if all(getattr(job.cfg, k) == x for k, x in c.items())]
    good = 0.5 if len(found) > 1 and at[0] == found[1] else 0.25
    good += 0.25 * (job.label == "siren") + noise.uniform(0, 0.01)
    scores = dict.fromkeys(("avg@16", "maj@16", "pass@16", "distinct@16"), good)
    evals = [
        {"grade": grade, "temperature": temperature, **scores, "solved": "1100"}
        for grade in ("easy", "hard")
        for temperature in job.final.temperatures
    ]
    if job.label == "siren":
        evals = [{**e, "solved": "1010"} for e in evals]
    entropy = {"base": 2.0, "siren": 0.5}.get(job.label, 0.5 + noise.uniform(0, 0.1))
    policy = {"reward": 0.5, "entropy": entropy, "h_agg": 1.0, "useless_share": 0.0}
    policy["positions"] = {
        "entropy": [good, *[good, 0.25 + good / 100] * 4, 0.125],  # at forks it is the score
        "nucleus_entropy": [1 - good] * 10,
        "peak": [1.0] * 10,
    }
    settings = {"config": dataclasses.asdict(job.cfg), "final": job.final._asdict()}
    log = [{"reward": 0.5, "entropy": 9.0}, {"reward": 0.6, "entropy": good}]
    log.append({"reward": 0.9, "entropy": 8.0})
    return {**settings, "seconds": [10.0, 1.0], "probe": policy, "evals": evals, "log": log}


def test_the_table_from_made_up_rows(tmp_path, monkeypatch):
    """Each method's second candidate is chosen; the page, the file and the figure say so."""
    size = study.Size(test_seeds=(0, 1, 2), validation_seeds=(100,))
    store, noise = study.Store(tmp_path), random.Random(0)
    jobs = table.tune(size)
    assert len(jobs) == 4 * len(EVERY) - 6 and len(store.missing(jobs)) == len(jobs)
    store.rows |= {job.key: row_of(job, noise) for job in jobs}
    chosen = table.choose(size, store)
    for name, change in chosen.items():
        assert change == table.candidates(name)[min(1, len(table.candidates(name)) - 1)]
    jobs = table.final(size, chosen)
    assert len(jobs) == 3 * (len(EVERY) + 1)
    assert all("split=test" in job.cfg.task for job in jobs)
    store.rows |= {job.key: row_of(job, noise) for job in jobs}
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results: begin -->\nold\n<!-- results: end -->\nafter\n")
    monkeypatch.setattr(table, "step_seconds", lambda job: 3.0 if job.label == "cure" else 2.0)
    table.time_steps(jobs[1 : 1 + len(EVERY)], tmp_path / table.COSTS)
    table.write(size, store, tmp_path, page)
    text = page.read_text()
    assert text.startswith("before\n<!-- results: begin -->\nMean over 3 test seeds")
    assert text.endswith("<!-- results: end -->\nafter\n") and "old" not in text
    starts = [row.startswith("| `qae` | quantile 0.2 | .50") for row in text.splitlines()]
    assert sum(starts) == 2, "once for each temperature"
    lines = [row for row in text.splitlines() if row.startswith("| `siren` |")]
    assert "| beta 0.06 | .75" in lines[0] and "| .250 [.250, .250] | 0.7" in lines[2]
    assert re.search(r"\| 0\.26 \| 0\.4. \| \.000", lines[2]), (
        "sums; the last term and the end"
    )
    assert re.match(r"\| `siren` \| 0\.67 \| 9\.00 \| 0\.7. \| 4\.5, 4\.5 \|", lines[3]), (
        "its log"
    )
    assert math.isnan(table.at_reward([row_of(jobs[0], noise)], 0.95)), "no run had it"
    assert "| `qae` | quantile | 0.1: 0.5" in text, "a candidate: .25 + .25 and noise"
    assert "| 0.2: 1.0" in text and re.search(
        r"\| `dr_grpo` \|  \| 0\.5. \(0\.5.\) \|  \|", text
    )
    (line,) = [row for row in text.splitlines() if row.startswith("| all methods (25) |")]
    assert line.endswith("+1.00 | +1.00 | +1.00 | -1.00 | -1.00 | -1.00 |"), (
        "row_of made them so"
    )
    assert "| 0.500 | 0.500 | 0.000 | 1.00 [1.00, 1.00] |" in lines[2], "P = E = S = 1 of four"
    (line,) = [row for row in text.splitlines() if row.endswith(" 1.50 [1.50, 1.50] |")]
    assert line.startswith("| `cure` |")
    assert re.match(r"\| `siren` \| \+\.(49|50).* 1\.000 \|", lines[4]), (
        "three seeds prove nothing"
    )
    head, *cells = (tmp_path / "zoo.csv").read_text().splitlines()
    assert head.startswith("method,seed") and len(cells) == len(jobs) * 4
    assert head.endswith(",SRR,NDR,NSCR") and cells[-1].endswith(",1.0,0.0,0.0")
    assert (tmp_path / "zoo.png").stat().st_size > 10_000


def test_the_table_shares_jobs_with_the_study():
    shared = {job.key for job in study.tune(study.Size(), {})} & {
        job.key for job in table.tune(SIZE)
    }
    assert len(shared) >= 3 * 5, "SIREN's betas and the bonus's, at least"


def test_a_job_of_the_table_runs():
    (job,) = study.each(study.SMOKE, [("par", table.changes("par", 0.4))])[:1]
    assert 0 < table.step_seconds(job) < 60
    row = study.run_job(job)
    assert study.key_of(row) == job.key and row["log"][-1]["coefficient"] > 0
    assert 0 <= table.evaluation(row)["maj@16"] <= 1


def test_the_page_has_a_place_for_the_results():
    page = (ROOT / "docs" / "zoo.md").read_text()
    begin, end = re.findall(r"<!-- results: (begin|end) -->", page)
    assert (begin, end) == ("begin", "end")
