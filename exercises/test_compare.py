"""Grades exercises 1 to 10 and 12 on many inputs, ordinary and extreme ones.

Each function is compared with its definition, worked out in numpy (oracles.py), on batches
of many shapes. A failure says for which kind of input, and, where the numbers are those of a
known wrong solution (mistakes.py), which one.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exercises import mistakes, oracles, qae
from exercises.compare import Case, Differs, judge, sentence

F64 = torch.float64


@pytest.fixture(scope="session")
def impl(impl, request):
    """The module under test: reference.py and qae.py, or that of --impl."""
    if request.config.getoption("--impl"):
        return impl
    return SimpleNamespace(**vars(impl) | vars(qae))


RUBBISH = (1e4, -1e30, 50.0, -3.0, math.nan, math.inf, -math.inf)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=seeded(seed), dtype=F64) * scale


def uniform(*shape, seed=0, low=0.0, high=1.0):
    return torch.rand(shape, generator=seeded(seed), dtype=F64) * (high - low) + low


def lengths_mask(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


SHAPES = (  # lengths of the responses, width T
    ([6, 1, 4, 0, 2, 6, 3, 5], 6),
    ([3, 2, 4, 1], 4),  # as many rows as columns
    ([1], 1),
    ([5], 7),
    ([1, 1, 1], 1),
    ([40, 17, 0, 33], 41),
)


def varied(*inputs):
    """Do the inputs need a gradient? A fresh leaf, so that no call sees another one's."""
    return [x.clone().requires_grad_() for x in inputs]


def of_dtype(value, what):
    """value; an AssertionError if it is no tensor of float64, as the inputs are."""
    assert torch.is_tensor(value), f"{what} is a tensor, not {value!r}"
    kind = str(value.dtype).removeprefix("torch.")
    assert value.dtype == F64, f"{what} has the dtype of the inputs, float64, not {kind}"
    return value


def gradient(value, x, what):
    """The gradient of a scalar with respect to x; an AssertionError if there is none."""
    of_dtype(value, what)
    assert value.requires_grad, (
        f"{what} has no gradient: was a part detached, or made a number?"
    )
    (grad,) = torch.autograd.grad(value, x, allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad


def entry(stats, name):
    """stats[name]; an AssertionError if it is not there."""
    listed = isinstance(stats, dict) and name in stats
    assert listed, f"return (loss, stats), where stats has {name!r}"
    return stats[name]


def known_mistake(exercise, impl):
    """A sentence with the mistake that the student's numbers are those of, or nothing."""
    for name, test in globals().items():
        if name.startswith(f"test_{exercise}_"):
            try:
                test(impl)
            except Differs as error:
                return sentence(error.known)
            except Exception:  # whatever a student's function may raise
                return ""
    return ""


# ------------------------------------------------------------------------------- 1. advantages
def reward_cases():
    binary = (uniform(24, seed=1) < 0.4).to(F64)
    strided = torch.stack([uniform(12, seed=2), uniform(12, seed=3)], 1)[:, 0]
    found = {
        "rewards of 0 and 1": (binary, 4),
        "one group": (binary[:5], 5),
        "groups of 2": (binary, 2),
        "as many groups as responses in a group": (uniform(25, seed=4), 5),
        "rewards between 0 and 1": (uniform(30, seed=5), 6),
        "rewards above 1": (uniform(24, seed=6, low=2, high=30), 8),
        "rewards of -1 and 1": (2 * binary - 1, 6),
        "negative rewards": (-uniform(24, seed=7, high=9), 3),
        "rewards from -100 to 100": (normal(64, seed=8, scale=50), 8),
        "rewards up to 100000": (normal(24, seed=12, scale=40_000), 4),
        "rewards that differ by little": (0.5 + uniform(12, seed=9) / 1000, 4),
        "all rewards equal": (torch.full((8,), 0.1, dtype=F64), 4),
        "a mean of 1 and more": (t([1.0, 1.5, 0.5, 1.0, 3.0, 2.0, 2.0, 1.0]), 4),
        "a group of 100": (binary.repeat(25), 100),
        "every second element of a tensor": (strided, 4),
    }
    return [Case(what, {"rewards": r, "size": size}) for what, (r, size) in found.items()]


def t(x):
    return torch.tensor(x, dtype=F64)


@pytest.mark.ex1
def test_ex1_many_rewards(impl):
    judge(
        impl.group_advantages,
        lambda function, given: {
            "A": of_dtype(function(given["rewards"], given["size"]), "A")
        },
        lambda given: {"A": oracles.advantages(given["rewards"], given["size"])},
        reward_cases(),
        "A_i is the reward minus the mean reward of its own group, nothing else",
        mistakes.wrong_functions("ex1"),
    )


# ----------------------------------------------------------------------------- 2. clipped loss
def policy_case(what, shape=0, seed=0, ratio=0.4, level=-2.0, adv=1.0, tol=1e-9, **knobs):
    """ratio: how far log-ratios go; level: of the log-probabilities."""
    lengths, width = SHAPES[shape]
    mask = lengths_mask(lengths, width)
    old_logp = level + normal(*mask.shape, seed=seed) * min(1.0, abs(level) / 4)
    log_ratio = normal(*mask.shape, seed=seed + 1, scale=ratio).clamp(-15, 15)
    a = normal(len(mask), seed=seed + 2, scale=adv)
    logp = old_logp + log_ratio
    return Case(what, {"x": (logp, old_logp, a, mask), "knobs": knobs}, tol)


def policy_cases():
    cases = [
        policy_case(f"{len(s[0])} responses, T = {s[1]}", i) for i, s in enumerate(SHAPES)
    ]
    cases += [
        policy_case("another clip_low and clip_high", 0, 3, clip_low=0.1, clip_high=0.5),
        policy_case("clip_high = .28", 5, 4, clip_high=0.28),
        policy_case("clip_low = .5", 5, 5, clip_low=0.5),
        policy_case("max_tokens = 20, more than T", 0, 6, max_tokens=20),
        policy_case("max_tokens = 3072", 1, 7, max_tokens=3072),
        policy_case("clip_low = clip_high = 0", 0, 5, clip_low=0.0, clip_high=0.0),
        policy_case("advantages up to 60", 0, 8, adv=20.0),
        policy_case("advantages up to 3000", 0, 8, adv=1000.0),
        policy_case("tiny advantages", 0, 9, adv=1e-3),
        policy_case("ratios from 1/50 to 50", 5, 10, ratio=2.0),
        policy_case("ratios far from 1, up to exp(15)", 5, 11, ratio=8.0),
        policy_case("log-probabilities near -150", 0, 12, level=-150.0),
        policy_case("log-probabilities near -900, where exp is 0", 0, 13, level=-900.0),
    ]
    new, old, a, mask = policy_case("", 0, 14).given["x"]
    cases.append(Case("advantages of 0", {"x": (new, old, a * 0, mask), "knobs": {}}))
    cases.append(Case("no token at all", {"x": (new, old, a, mask & False), "knobs": {}}))
    cases.append(Case("no padding", {"x": (new, old, a, mask | True), "knobs": {}}))
    signs = t([1, 1, 1, 1, 0, 0, 0, 0]) * a.abs()
    cases.append(Case("some advantages of 0", {"x": (new, old, signs, mask), "knobs": {}}))
    cases += far_ratios()
    nothing = (new * math.nan, old * math.nan, a, mask & False)
    cases.append(Case("no token at all, NaN in padding", {"x": nothing, "knobs": {}}))
    for value in RUBBISH:
        both = (new.where(mask, t(value)), old.where(mask, t(-value / 2)), a, mask)
        cases.append(Case(f"{value} in padding of both logp", {"x": both, "knobs": {}}))
        one = (new, old.where(mask, t(value)), a, mask)
        cases.append(Case(f"{value} in padding of old_logp", {"x": one, "knobs": {}}))
    return cases


def far_ratios():
    """Ratios near exp(19) and exp(-19), and advantages with which each of them is seen."""
    cases = []
    for sign, size in ((1, 1.0), (-1, 1e5)):
        log_ratio = sign * uniform(6, 4, seed=50, low=8.0, high=19.5)
        adv = size * t([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
        old = normal(6, 4, seed=51) - 2
        mask = torch.ones(6, 4, dtype=torch.bool)
        what = f"log-ratios from {sign * 8} to {sign * 19.5}: no bound but the clip"
        cases.append(Case(what, {"x": (old + log_ratio, old, adv, mask), "knobs": {}}))
    return cases


def run_policy(function, given):
    logp, old_logp, adv, mask = given["x"]
    (logp,) = varied(logp)
    loss, stats = function(logp, old_logp, adv, mask, **given["knobs"])
    found = {"loss": loss, "clip_fraction": entry(stats, "clip_fraction")}
    empty = "" if mask.any() else ", also without a token (its gradient is 0 there),"
    grad = gradient(loss, logp, f"the loss{empty}")
    return found | {"gradient with respect to logp": grad}


def right_policy(given):
    names = {"clip_low": "low", "clip_high": "high", "max_tokens": "budget"}
    knobs = {names[name]: value for name, value in given["knobs"].items()}
    values = oracles.policy(*given["x"], **knobs)
    loss, share, grad = values
    return {
        "loss": loss,
        "gradient with respect to logp": grad,
        "clip_fraction": share32(share),
    }


def share32(share):
    """A share of two counts is float32 in torch: as exact as that."""
    return np.float32(share)


@pytest.mark.ex2
def test_ex2_many_batches(impl):
    judge(
        impl.policy_loss,
        lambda function, given: rounded_share(run_policy(function, given)),
        right_policy,
        policy_cases(),
        "min(ratio A, clip(ratio) A), summed over the tokens in the mask, / max_tokens / R",
        mistakes.wrong_functions("ex2"),
    )


def rounded_share(found):
    share = float(found["clip_fraction"])
    return found | {"clip_fraction": np.float32(share)}


# --------------------------------------------------------------------------------- 3. nucleus
def logit_cases(most=5000):
    """Logits of every kind and a p; never on the border of a nucleus."""
    shapes = ((), (3,), (2, 3), (2, 1, 2))
    found = []
    for i, (vocab, scale) in enumerate(
        ((2, 1.0), (5, 3.0), (12, 0.3), (12, 8.0), (33, 2.0), (257, 1.0), (1500, 0.5))
    ):
        z = normal(*shapes[i % 4], vocab, seed=i, scale=scale)
        for p in (0.05, 0.3, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0):
            found.append((f"{vocab} tokens, p = {p}", z, p))
    z = normal(2, 3, 12, seed=9, scale=3.0)
    found += [
        ("one token in the vocabulary", normal(3, 1), 0.8),
        ("p = 1e-6: the likeliest token alone", z, 1e-6),
        ("logits near 5000", z + 5000, 0.8),
        ("logits near -5000", z - 5000, 0.8),
        ("logits near -25000", z - 25000, 0.8),
        ("logits from -3000 to 3000", z * 1000, 0.8),
        ("logits from -3000 to 3000, p = 1", z * 1000, 1.0),
        ("equal tokens, p = .6", torch.zeros(2, 4, dtype=F64), 0.6),
        ("two equal tokens of .45, p = .8", t([0.45, 0.45, 0.06, 0.04]).log(), 0.8),
        ("p = .3, below the likeliest token", t([0.7, 0.2, 0.1]).log(), 0.3),
        ("p = .97, one token of .96", t([0.96, 0.02, 0.015, 0.005]).log(), 0.97),
    ]
    flat = torch.zeros(1, most, dtype=F64)
    for share in (0.05, 0.8, 0.99):
        found.append(
            (f"{most} equal tokens, p = {share}", flat, (round(share * most) + 0.5) / most)
        )
    found.append((f"{most} nearly equal tokens", normal(1, most, seed=5, scale=0.2), 0.9))
    return [
        Case(what, {"z": z, "p": p}) for what, z, p in found if oracles.margin(z, p) > 1e-7
    ]


def tail_cases():
    """A tail of tokens of 3e-6: p lies by a fifth of one of them above or below a sum."""
    pi = torch.cat([t([0.5, 0.491]), torch.full((3000,), 3e-6, dtype=F64)])
    z = (pi / pi.sum()).log()
    tail = 3e-6 / float(pi.sum())
    start = 0.991 / float(pi.sum())
    return [
        Case(f"p lies {word} a sum, in a tail of rare tokens", {"z": z, "p": start + x * tail})
        for word, x in (("just above", 100.2), ("just below", 199.8))
    ]


def run_nucleus(function, given):
    mask = function(given["z"], given["p"])
    z = given["z"]
    same = torch.is_tensor(mask) and mask.dtype == torch.bool and mask.shape == z.shape
    assert same, f"the mask is a bool tensor of the shape of the logits, {list(z.shape)}"
    kept = z.softmax(-1).masked_fill(~mask, 0.0).sum(-1)
    return {"tokens in the nucleus": mask.sum(-1), "their probability": kept}


def right_nucleus(given):
    inside = oracles.nucleus(given["z"], given["p"])
    kept = np.where(inside, oracles.softmax(oracles.numbers(given["z"])), 0.0).sum(-1)
    return {"tokens in the nucleus": inside.sum(-1), "their probability": kept}


@pytest.mark.ex3
def test_ex3_many_logits(impl):
    idea = "V_p: the likeliest tokens, as many as are needed until their sum reaches p"
    judge(
        impl.nucleus_mask,
        run_nucleus,
        right_nucleus,
        logit_cases() + tail_cases(),
        idea,
        mistakes.wrong_functions("ex3"),
    )


# ------------------------------------------------------------------------- 4. nucleus entropy
def entropy_cases():
    """Those of the nucleus, and very small probabilities."""
    cases = [
        Case(case.what, case.given, 1e-7 if "5000" in case.what else 1e-9)
        for case in logit_cases()
    ]
    sharp = t([[0.9995, 0.0005], [0.0001, 0.9999]]).log()
    cases.append(Case("a nearly certain token, p = 1", {"z": sharp, "p": 1.0}))
    for tail in (1e-6, 1e-9, 1e-11):
        z = torch.cat([t([0.0, -1.0]), torch.full((1500,), math.log(tail), dtype=F64)])
        cases.append(Case(f"1500 tokens of about {tail}, p = 1", {"z": z, "p": 1.0}))
    return cases


def weights_of(h):
    """Of 1 at most: a log q of -1.8e308 outside the nucleus is right in siren_loss, too."""
    return uniform(*h.shape, seed=3, low=0.25, high=1.0)


def run_entropy(function, given):
    (z,) = varied(given["z"])
    h = function(z, given["p"])
    assert torch.is_tensor(h), "H' is a tensor of the logits' leading dimensions"
    same = h.shape == z.shape[:-1]
    assert same, f"H' has the shape {list(z.shape[:-1])}, without the vocabulary"
    of_dtype(h, "H'")
    assert h.requires_grad, (
        "H' has no gradient: only the choice of the set is not differentiated"
    )
    weights = weights_of(h)
    (grad,) = torch.autograd.grad((h * weights).sum(), z)
    return {"H'": h, "its gradient (times a weight for each position)": grad}


def right_entropy(given):
    h, grad = oracles.nucleus_entropy(given["z"], given["p"])
    weights = oracles.numbers(weights_of(h))
    name = "its gradient (times a weight for each position)"
    return {"H'": h, name: grad * weights[..., None]}


@pytest.mark.ex4
def test_ex4_many_logits(impl):
    judge(
        impl.nucleus_entropy,
        run_entropy,
        right_entropy,
        entropy_cases(),
        "H' = -sum of q log q over the nucleus, where q is pi renormalised there",
        mistakes.wrong_functions("ex4"),
    )


# -------------------------------------------------------------------------------- 5. peak mask
def entropy_rows(lengths, width, seed, scale=1.0, zeros=0.0):
    h = uniform(len(lengths), width, seed=seed, high=scale)
    return h * (uniform(len(lengths), width, seed=seed + 1) >= zeros)


def peak_cases():
    cases = []
    for i, (lengths, width) in enumerate(SHAPES):
        for tau in (0.0, 0.1, 0.25, 0.5, 0.77, 0.8, 0.93, 0.99, 1.0):
            h = entropy_rows(lengths, width, i)
            cases.append((f"{len(lengths)} responses, quantile {tau}", h, i, tau))
    for what, scale, zeros in (
        ("entropies up to 11 nats", 11.0, 0.0),
        ("entropies of 1e-7 nats", 1e-7, 0.0),
        ("entropies that are mostly 0", 1.0, 0.9),
        ("half of the entropies are 0", 4.0, 0.5),
    ):
        for i in (0, 5):
            h = entropy_rows(*SHAPES[i], 7 + i, scale, zeros)
            cases += [(f"{what}, quantile {tau}", h, i, tau) for tau in (0.3, 0.6, 0.8)]
    equal = torch.full((8, 6), 0.5, dtype=F64)
    cases += [("all entropies of a response equal", equal, 0, tau) for tau in (0.5, 0.8, 1.0)]
    close = 0.5 + entropy_rows(*SHAPES[0], 12) * 1e-9
    cases.append(("entropies that differ by 1e-10, quantile 1.0", close, 0, 1.0))
    steps = (entropy_rows(*SHAPES[5], 11, 4.0)).ceil() / 4
    cases += [("many equal entropies", steps, 5, tau) for tau in (0.5, 0.75)]
    for value in (9.0, -5.0, 1e30, math.inf, -math.inf, 0.0):
        mask = lengths_mask(*SHAPES[0])
        h = entropy_rows(*SHAPES[0], 13).where(mask, t(value))
        cases += [(f"{value} in padding, quantile {tau}", h, 0, tau) for tau in (0.0, 0.6)]
    return [
        Case(what, {"h": h, "mask": lengths_mask(*SHAPES[shape]), "tau": tau})
        for what, h, shape, tau in cases
    ]


def run_peaks(function, given):
    h, mask = given["h"].clone().requires_grad_(), given["mask"]
    peak = function(h, mask, given["tau"])
    same = torch.is_tensor(peak) and peak.dtype == torch.bool and peak.shape == mask.shape
    assert same, f"the result is a bool tensor of the shape of the mask, {list(mask.shape)}"
    _, sure = oracles.peaks(given["h"], mask, given["tau"])
    return {"peaks": peak.numpy() & sure}


def right_peaks(given):
    peak, sure = oracles.peaks(given["h"], given["mask"], given["tau"])
    return {"peaks": peak & sure}


@pytest.mark.ex5
def test_ex5_many_responses(impl):
    judge(
        impl.peak_mask,
        run_peaks,
        right_peaks,
        peak_cases(),
        "a peak: H' >= the quantile of its own response, H' > 0, and in the mask",
        mistakes.wrong_functions("ex5"),
    )


# ------------------------------------------------------------------------------ 6. aggregation
def aggregate_cases():
    cases = []
    for i, (lengths, width) in enumerate(SHAPES):
        mask = lengths_mask(lengths, width)
        h = entropy_rows(lengths, width, 20 + i, 3.0)
        peak = uniform(*mask.shape, seed=40 + i) < 0.4
        cases.append((f"{len(lengths)} responses, T = {width}", h, peak & mask, mask))
    h, peak, mask = cases[0][1:]
    some = peak & (torch.arange(8) % 2 == 0)[:, None]
    cases += [
        ("entropies up to 12 nats", h * 4, peak, mask),
        ("entropies of 1e-6 nats", h * 1e-6, peak, mask),
        ("peaks outside the mask", h, peak | ~mask, mask),
        ("every second response without a peak", h, some, mask),
        ("no peak at all", h, peak & False, mask),
        ("no token at all", h, peak | True, mask & False),
        ("no token at all, NaN in padding", h * math.nan, peak, mask & False),
        ("every token a peak", h, mask.clone(), mask),
    ]
    for value in RUBBISH:
        cases.append((f"{value} in padding", h.where(mask, t(value)), peak | ~mask, mask))
    return [Case(what, {"h": h, "peak": p, "mask": m}) for what, h, p, m in cases]


def run_aggregate(function, given):
    (h,) = varied(given["h"])
    value = function(h, given["peak"], given["mask"])
    of_dtype(value, "H_agg")
    found = {"H_agg": value, "its gradient": torch.zeros_like(h)}
    no_peak = not (given["peak"] & given["mask"]).any()
    if no_peak and given["mask"].any() and not value.requires_grad:
        return found  # the constant 0 has the right gradient, too
    where = "" if given["mask"].any() else ", also without a token (its gradient is 0 there),"
    return found | {"its gradient": gradient(value, h, f"H_agg{where}")}


def right_aggregate(given):
    value, grad = oracles.aggregate(given["h"], given["peak"], given["mask"])
    return {"H_agg": value, "its gradient": grad}


@pytest.mark.ex6
def test_ex6_many_batches(impl):
    judge(
        impl.aggregate_entropy,
        run_aggregate,
        right_aggregate,
        aggregate_cases(),
        "H_agg: the mean over responses of the mean of H' over the peaks of each",
        mistakes.wrong_functions("ex6"),
    )


# --------------------------------------------------------------------------- 7. anchored loss
def loss_case(what, shape=0, vocab=11, seed=0, scale=2.0, old=0.4, anchor=0.9, **knobs):
    """old: how far log-ratios go; scale: of the logits."""
    lengths, width = SHAPES[shape]
    mask = lengths_mask(lengths, width)
    z = normal(*mask.shape, vocab, seed=seed, scale=scale)
    z[:, 1::3] *= 3
    ids = z.argsort(-1, descending=True)[..., : min(3, vocab)]
    pick = torch.randint(ids.shape[-1], (*mask.shape, 1), generator=seeded(seed + 1))
    tokens = ids.gather(-1, pick)[..., 0]
    logp = z.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    log_ratio = normal(*mask.shape, seed=seed + 2, scale=old).clamp(-15, 15)
    adv = normal(len(mask), seed=seed + 3)
    knobs = {"beta": 0.7, "top_p": 0.8, "peak_quantile": 0.77} | knobs
    given = {"x": (z, tokens, logp - log_ratio, adv, mask, anchor), "knobs": knobs}
    return Case(what, given, 1e-8)


def loss_cases():
    cases = [
        loss_case(f"{len(s[0])} responses, T = {s[1]}", i, seed=i)
        for i, s in enumerate(SHAPES)
    ]
    defaults = loss_case("top_p and peak_quantile by default, .8 and .8", 0, seed=6).given
    defaults["knobs"] = {"beta": 0.7}
    cases.append(Case("top_p and peak_quantile by default, .8 and .8", defaults, 1e-8))
    cases += [
        loss_case("an anchor of 0", 0, seed=7, anchor=0.0),
        loss_case("an anchor below 0, as a micro-batch's may be", 0, seed=8, anchor=-0.7),
        loss_case("a gap of 3 nats, above 1", 0, seed=9, anchor=4.0),
        loss_case("a gap of 9 nats", 0, seed=9, anchor=10.0, beta=0.05),
        loss_case("a small gap", 0, seed=9, anchor=1.0),
        loss_case("beta = 0", 0, seed=10, beta=0.0),
        loss_case("beta = .005", 0, seed=10, beta=0.005),
        loss_case("beta = 30", 0, seed=10, beta=30.0, anchor=1.0),
        loss_case("top_p = .5", 0, seed=11, top_p=0.5),
        loss_case("top_p = .99", 0, seed=11, top_p=0.99),
        loss_case("top_p = 1", 0, seed=11, top_p=1.0),
        loss_case("peak_quantile = 0", 0, seed=12, peak_quantile=0.0),
        loss_case("peak_quantile = .3", 5, seed=12, peak_quantile=0.3),
        loss_case("peak_quantile = .6", 0, seed=13, scale=6.0, peak_quantile=0.61),
        loss_case("mostly one-token nuclei", 5, seed=14, scale=20.0),
        loss_case("max_tokens = 40", 0, seed=15, max_tokens=40),
        loss_case("ratios far from 1", 5, seed=16, old=6.0),
        loss_case("1500 tokens in the vocabulary", 1, 1500, 17, scale=1.0, anchor=5.5),
        loss_case("70 tokens in the vocabulary", 0, vocab=70, seed=18),
    ]
    return cases + rubbish_losses() + unlikely_tokens()


def rubbish_losses():
    """Padding may hold any old_logp, and any valid id; or there is no token."""
    cases = []
    z, ids, old, adv, mask, anchor = loss_case("", 0, seed=20).given["x"]
    knobs = loss_case("").given["knobs"]
    for value in RUBBISH:
        x = (z, ids.where(mask, 7), old.where(mask, t(value)), adv, mask, anchor)
        cases.append(Case(f"{value} in padding of old_logp", {"x": x, "knobs": knobs}, 1e-8))
    for value in (1e4, -1e4):
        wild = torch.where(mask[..., None], z, z.sign() * value)
        x = (wild, ids, old, adv, mask, anchor)
        cases.append(Case(f"logits of {value:.0f} in padding", {"x": x, "knobs": knobs}, 1e-8))
    x = (z, ids, old, adv, mask & False, 0.0)
    cases.append(Case("no token at all, anchor 0", {"x": x, "knobs": knobs}, 1e-8))
    x = (z, ids, old * math.nan, adv, mask & False, 0.7)
    cases.append(Case("no token at all, old_logp NaN", {"x": x, "knobs": knobs}, 1e-8))
    return cases


def unlikely_tokens():
    """Sampled tokens whose log-probability is near -150, and near -900."""
    cases = []
    for depth in (150.0, 900.0):
        given = loss_case("", 0, seed=21).given
        z, ids, _, adv, mask, anchor = given["x"]
        z = z.scatter(-1, ids[..., None], -depth + normal(*ids.shape, 1, seed=22))
        logp = z.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        x = (z, ids, logp + normal(*ids.shape, seed=23, scale=0.3), adv, mask, anchor)
        what = f"log-probabilities near -{depth:.0f}"
        cases.append(Case(what, {"x": x, "knobs": given["knobs"]}, 1e-8))
    return cases


def run_loss(function, given):
    z, *others = given["x"]
    (z,) = varied(z)
    loss, stats = function(z, *others, **given["knobs"])
    names = ("h_agg", "regularizer_loss", "policy_loss")
    found = {name: entry(stats, name) for name in names}
    grad = gradient(loss, z, "the loss")
    return found | {"loss": loss, "gradient with respect to the logits": grad}


def right_loss(given):
    knobs = given["knobs"]
    options = [knobs["beta"], knobs.get("top_p", 0.8), knobs.get("peak_quantile", 0.8)]
    due = oracles.siren(*given["x"], *options, knobs.get("max_tokens"))
    return {("gradient with respect to the logits" if k == "gradient" else k): x
            for k, x in due.items()}  # fmt: skip


@pytest.mark.ex7
def test_ex7_many_batches(impl):
    judge(
        impl.siren_loss,
        run_loss,
        right_loss,
        loss_cases(),
        "the policy loss plus beta * (H_agg - anchor)^2",
        mistakes.wrong_functions("ex7"),
    )


# --------------------------------------------------------------------- 8. exact micro-batches
def anchor_cases():
    found = {
        "numbers that differ": (1.5, 0.7, 0.9),
        "above the anchor": (1.5, 1.3, 0.9),
        "its anchor is below 0": (0.1, 1.9, 0.4),
        "H* below 0": (0.5, 0.7, -0.3),
        "H* = 0": (1.1, 0.4, 0.0),
        "a micro-batch without entropy": (0.0, 0.7, 0.9),
        "no entropy at all": (0.0, 0.0, 0.9),
        "a gap above 1": (2.5, 3.7, 0.9),
        "a gap below -1": (0.25, 0.5, 4.0),
        "one micro-batch": (0.7, 0.7, 0.9),
        "no gap": (1.3, 0.9, 0.9),
        "long decimals": (1.23456789, 0.98765432, 1.11111111),
    }
    cases = []
    for what, (h, h_agg, anchor) in found.items():
        # a number may become a float32 tensor
        cases.append(Case(f"{what}, as numbers", {"x": (h, h_agg, anchor)}, 1e-6))
        cases.append(Case(f"{what}, as tensors", {"x": (t(h), t(h_agg), anchor)}))
    return cases


@pytest.mark.ex8
def test_ex8_many_gaps(impl):
    def run(function, given):
        try:
            return {"the micro-batch's anchor": function(*given["x"])}
        except (AttributeError, TypeError) as error:
            idea = "the arguments may be tensors or plain numbers"
            raise AssertionError(f"{idea}: {error}") from error

    def right(given):
        h, h_agg, anchor = map(float, given["x"])
        return {"the micro-batch's anchor": h - h_agg + anchor}

    idea = "h_micro - (the new anchor) = H_agg - H*, whatever the signs"
    judge(
        impl.micro_batch_anchor,
        run,
        right,
        anchor_cases(),
        idea,
        mistakes.wrong_functions("ex8"),
    )


# ---------------------------------------------------------------------------------- 9. pass@k
def pass_cases():
    small = [(n, c, k) for n in range(1, 10) for c in range(n + 1) for k in range(1, n + 1)]
    large = [(64, 5, 16), (200, 1, 100), (1000, 3, 999), (1000, 0, 1000), (1000, 1000, 1)]
    large += [(10_000, 1, 100), (10_000, 37, 100), (10_000, 5000, 2), (10_000, 9999, 1)]
    huge = [(10_000, 1, 5000), (10_000, 2, 1000), (20_000, 3, 10_000), (20_000, 19_990, 10)]
    return [
        Case(f"{n = }, {c = }, {k = }", {"x": (n, c, k)}) for n, c, k in small + large + huge
    ]


@pytest.mark.ex9
def test_ex9_many_counts(impl):
    def run(function, given):
        try:
            return {"pass@k": float(function(*given["x"]))}
        except (OverflowError, RecursionError) as error:
            idea = "n may be 10000: use integers of any size, or a product of k ratios"
            raise AssertionError(f"{idea} ({type(error).__name__}: {error})") from error
        except ZeroDivisionError as error:
            n, c, k = given["x"]
            raise AssertionError(f"division by zero for {n = }, {c = }, {k = }") from error

    judge(
        impl.pass_at_k,
        run,
        lambda given: {"pass@k": oracles.pass_at_k(*given["x"])},
        pass_cases(),
        "the share of the subsets of k of the n samples that hold a right one",
        mistakes.wrong_functions("ex9"),
    )


# ---------------------------------------------------------------------------------- 10. maj@k
def vote_cases():
    """Votes that look alike and are not, many ties, many blocks, in seeded random order."""
    alphabets = {
        "two answers": ["7", "8"],
        "some without an answer": ["7", "8", None, None],
        "answers that differ by blanks": ["7", " 7", "7 ", "8"],
        "answers that differ by case": ["a", "A", "b"],
        "numbers of equal value": ["7", "7.0", "07", "14/2"],
        "numbers with a comma": ["1,000", "1000", "1000.0"],
        "an answer inside another one": ["7", "17", "71"],
        "empty texts": ["", "7", None],
        "the text None": ["None", None, "7"],
        "signs of a kind": ["７", "7", "7.", "$7"],
        "halves": ["½", "1/2", "0.5", ".5"],
        "zeros": ["0", "-0", "0.0", ""],
    }
    cases = []
    for i, (what, alphabet) in enumerate(alphabets.items()):
        for k in (1, 2, 3, 4, 7):
            for count in (k, 3 * k, 5 * k + k // 2):
                draw = torch.randint(len(alphabet), (count,), generator=seeded(31 * i + count))
                votes = [alphabet[j] for j in draw.tolist()]
                answer = alphabet[i % 2] or "7"
                given = {"x": (votes, answer, k)}
                cases.append(Case(f"{what}: {votes}, answer {answer!r}, {k = }", given))
    ties = ["8", "7", "7", "8", "7", "8", "8", "7"]
    cases.append(Case(f"a tie in each block: {ties}, k = 4", {"x": (ties, "7", 4)}))
    last = ["8", "8", "8", "8", "7", "7"]
    cases.append(Case(f"the last block decides: {last}, k = 2", {"x": (last, "7", 2)}))
    return cases


@pytest.mark.ex10
def test_ex10_many_votes(impl):
    def run(function, given):
        votes, answer, k = given["x"]
        return {"maj@k": float(function(list(votes), answer, k))}

    judge(
        impl.maj_at_k,
        run,
        lambda given: {"maj@k": oracles.maj_at_k(*given["x"])},
        vote_cases(),
        "in each block of k the most frequent vote wins, the first of equals; votes as given",
        mistakes.wrong_functions("ex10"),
    )


# ------------------------------------------------------------------- 12. a drop-in of your own
def quantile_cases():
    cases = []
    for i, size in enumerate((2, 3, 5, 8, 10, 25)):
        rewards = normal(4 * size, seed=i, scale=3.0)
        for level in (0.05, 0.25, 0.4, 0.5, 0.75, 0.9, 1.0):
            what = f"any rewards, groups of {size}, K = {level}"
            cases.append((what, rewards, size, level))
    binary = (uniform(80, seed=9) < 0.5).to(F64)
    cases += [(f"rewards of 0 and 1, K = {x}", binary, 8, x) for x in (0.1, 0.4, 0.625)]
    cases += [("rewards of -1 and 1", 2 * binary - 1, 10, 0.4)]
    cases += [("many equal rewards", (uniform(64, seed=10) * 3).floor(), 16, 0.4)]
    ranked = torch.arange(20.0, dtype=F64).flip(0)
    for level in (0.401, 0.4001, 0.40001, 0.405, 0.45):
        cases.append((f"K = {level} of 20: the next rank after 8", ranked, 20, level))
    cases.append(("K = 0.28 of 25: the rank 7", torch.arange(25.0, dtype=F64), 25, 0.28))
    return [Case(what, {"x": (r, size), "K": level}) for what, r, size, level in cases]


@pytest.mark.ex12
def test_ex12_many_groups(impl):
    judge(
        impl.quantile_advantages,
        lambda function, given: {
            "A": of_dtype(function(*given["x"], quantile=given["K"]), "A")
        },
        lambda given: {"A": oracles.quantile_advantages(*given["x"], given["K"])},
        quantile_cases(),
        "A is the reward minus the smallest reward x of its group with F(x) >= K",
        mistakes.wrong_functions("ex12"),
    )
