"""research/official.py: the official rules against re-writings of them, oracles and hands."""

import doctest
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import (
    ANCHOR,
    F64,
    KNOBS,
    LOSSES,
    OVER_TOKENS,
    WITH_EMPTY,
    loss_of,
    make,
    oracle_aggregate,
    oracle_entropy,
    oracle_probs,
    same,
    same_stats,
    small_model,
    t,
    value_and_grad,
)

import siren
from exercises import reference
from research import official, plugs

# -------------------------------------------------------------- oracles: numpy, from the rules


def oracle_set(z, top_p):
    """Indices: the likeliest tokens, as long as their running sum stays within top_p."""
    p, mass, keep = oracle_probs(z), 0.0, []
    for j in np.argsort(-p, kind="stable"):
        mass += p[j]
        if mass > top_p:
            break
        keep.append(j)
    return keep


def oracle_q(z, top_p):
    """The distribution renormalised on that set; 0 everywhere if it is empty."""
    p, keep = oracle_probs(z), oracle_set(z, top_p)
    q = np.zeros_like(p)
    q[keep] = p[keep] / max(p[keep].sum(), 1e-300)
    return q


def oracle_strict(H, mask, tau):
    """H' > the quantile of the response's own H', by NumPy's linear interpolation."""
    peak = np.zeros(mask.shape, dtype=bool)
    for i in range(len(H)):
        if mask[i].any():
            peak[i] = mask[i] & (H[i] > np.quantile(H[i][mask[i]], tau))
    return peak


def oracle_gain(ratio, adv, dual_clip):
    """The gain of a token, with the second clip where the advantage is negative."""
    gain = min(ratio * adv, min(max(ratio, 0.8), 1.2) * adv)
    return max(gain, dual_clip * adv) if adv < 0 else gain


def oracle_policy(logp, old_logp, adv, mask, budget, dual_clip=3.0):
    responses = []
    for i in range(len(adv)):
        gaps = [float(logp[i][s] - old_logp[i][s]) for s in np.flatnonzero(mask[i])]
        gains = [oracle_gain(math.exp(gap), float(adv[i]), dual_clip) for gap in gaps]
        if gains:
            responses.append(-sum(gains) / (budget or len(gains)))
    return np.mean(responses)


def oracle_official(b, anchor, beta, top_p, tau, temperature, algorithm, regularizer):
    """The whole loss by all the rules."""
    z, mask = b.logits.numpy() / temperature, b.mask.numpy()
    H, logp = np.zeros(mask.shape), np.zeros(mask.shape)
    for i in np.ndindex(mask.shape):
        H[i] = oracle_entropy(oracle_q(z[i], top_p))
        logp[i] = math.log(oracle_probs(z[i])[b.tokens[i]])
    h_agg = oracle_aggregate(H, oracle_strict(H, mask, tau), mask)
    budget = 9 if algorithm == "dr_grpo" else None
    policy = oracle_policy(logp, b.old_logp.numpy(), b.adv, mask, budget)
    term = {"anchor": beta * (h_agg - anchor) ** 2, "bonus": -beta * h_agg, "none": 0.0}
    return policy + term[regularizer], h_agg


class Official:
    """siren_loss with the arguments of exercise 7, by all the rules."""

    @staticmethod
    def siren_loss(*args, **knobs):
        with official.rules():
            return reference.siren_loss(*args, **knobs)


# -------------------------------------------------------------------- against the re-writings


def rewritten_nucleus_entropy(logits, p):
    """The official function, written from its description; autograd differentiates it."""
    probs = logits.softmax(-1)
    ordered, index = probs.sort(-1, descending=True)
    kept = torch.zeros_like(probs).scatter(
        -1, index, (ordered.cumsum(-1) <= p).to(probs.dtype)
    )
    q = probs * kept / (probs * kept).sum(-1, keepdim=True).clamp(min=1e-20)
    return -(q * (q + 1e-20).log()).sum(-1)


@pytest.mark.parametrize("p", [0.5, 0.8])
def test_nucleus_entropy_equals_the_official_one(p):
    z = torch.randn(60, 50, generator=torch.Generator().manual_seed(24)) * 2.5
    one, two = z.clone().requires_grad_(), z.clone().requires_grad_()
    H, expected = official.nucleus_entropy(one, p), rewritten_nucleus_entropy(two, p)
    H.sum().backward()
    expected.sum().backward()
    same(H, expected, "official nucleus entropy", tol=1e-5)
    same(one.grad, two.grad, "gradient of the official nucleus entropy", tol=1e-5)
    assert (expected == 0).any() and (expected > 0).any()


def test_peaks_equal_the_official_ones():
    b = make(seed=25)
    H = rewritten_nucleus_entropy(b.logits, 0.8) * b.mask
    peak = official.peak_mask(H, b.mask, 0.8)
    for i in range(len(H)):
        own = H[i][b.mask[i]]
        expected = own > torch.quantile(own, 0.8)
        assert torch.equal(peak[i][b.mask[i]], expected), "strict: H' > q, not H' >= q"
        assert not peak[i][~b.mask[i]].any()


def test_policy_loss_equals_seq_mean_token_sum_norm():
    b = make(seed=26)
    one, two = b.logp.clone().requires_grad_(), b.logp.clone().requires_grad_()
    log_ratio = (two - b.old_logp * 3).clamp(-20, 20)
    ratio, adv = log_ratio.exp(), b.adv[:, None]
    surrogate = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2))
    surrogate = torch.where(adv < 0, torch.minimum(-adv * 3.0, surrogate), surrogate)
    expected = ((surrogate * b.mask).sum(-1) / b.mask.shape[-1]).mean()
    loss, stats = official.policy_loss(one, b.old_logp * 3, b.adv, b.mask, 6)
    loss.backward()
    expected.backward()
    same(loss, expected, "sum over tokens / T, mean over responses, dual clip 3")
    same(one.grad, two.grad, "its gradient")
    assert ((ratio > 3) & (adv < 0) & b.mask).any()
    _, plain = siren.policy_loss(one, b.old_logp * 3, b.adv, b.mask, 6)
    assert all(torch.equal(stats[name], plain[name]) for name in plain)


# ---------------------------------------------------------------------- exclusive: the nucleus

VECTORS = [  # p = 0.8: probabilities, H' by the official rule
    ((0.9, 0.05, 0.03, 0.02), 0.0),
    ((0.6, 0.3, 0.06, 0.04), 0.0),
    ((0.5, 0.25, 0.15, 0.1), 0.636514),
    ((0.25, 0.25, 0.25, 0.25), math.log(3)),
]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("probabilities, expected", VECTORS)
def test_vectors(probabilities, expected, dtype):
    z = t(probabilities).log().to(dtype)
    same(official.nucleus_entropy(z, 0.8), expected, "running sum <= p", tol=1e-6)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.999])
def test_nucleus_against_oracle(top_p):
    """Peaked and flat rows: q, H', and the gradient in closed form."""
    z = torch.cat([make(seed=11).logits.flatten(0, 1), make(seed=1).logits.flatten(0, 1) / 9])
    z.requires_grad_()
    H = official.nucleus_entropy(z, top_p)
    found = official.nucleus(z.log_softmax(-1), top_p).exp()
    (grad,) = torch.autograd.grad(H.sum(), z)
    for i, row in enumerate(z.detach().numpy()):
        q = oracle_q(row, top_p)
        keep, h = q > 0, oracle_entropy(q)
        assert int((found[i] > 0).sum()) == keep.sum()
        same(found[i], np.sort(q)[::-1].copy(), "q, the likeliest first")
        same(H[i], h, "H' by the official rule")
        expected = np.zeros_like(q)
        expected[keep] = -q[keep] * (np.log(q[keep]) + h)
        same(grad[i], expected, "-q_j (log q_j + H') inside, 0 outside")
        assert (abs(grad[i].numpy()[~keep]) < 1e-15).all(), "a logit outside gets a gradient"


def test_gradcheck():
    z = make((3, 3), V=7, seed=7).logits[:, :4].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: official.nucleus_entropy(x, 0.8), z)


def test_an_empty_nucleus_gives_zero_not_nan():
    z = t([[0.9, 0.05, 0.03, 0.02], [0.5, 0.25, 0.15, 0.1]]).log().requires_grad_()
    assert (official.nucleus(z.log_softmax(-1), 0.8)[0] == -math.inf).all()
    H = official.nucleus_entropy(z, 0.8)
    H.sum().backward()
    assert H[0] == 0 and (z.grad[0] == 0).all(), "empty set: value 0 and gradient 0, no 0/0"
    assert H[1] > 0 and torch.isfinite(z.grad[1]).all() and z.grad[1].abs().sum() > 0


def test_a_flat_policy_is_cut_at_10000_tokens():
    H = official.nucleus_entropy(torch.zeros(1, 20_000), 0.8)
    same(H, [math.log(10_000)], "the 10000 likeliest tokens", tol=1e-4)
    log_q = official.nucleus(torch.zeros(1, 20_000).log_softmax(-1), 0.8)
    assert (log_q > -math.inf).sum() == 10_000


@pytest.mark.parametrize("top_p", [0.8, 0.999999, 1.0])
def test_forbidden_tokens_bring_no_nan(top_p):
    z = t([[1.0, -math.inf, 0.5, 0.2, -math.inf]]).requires_grad_()
    log_q = official.nucleus(z.log_softmax(-1), top_p)
    assert (log_q > -math.inf).sum() <= 3, "logit -inf: never inside"
    with official.rules():
        stats = siren.token_stats(z[None], torch.tensor([[2]]), top_p)
    (stats["nucleus_entropy"] + stats["logp"]).sum().backward()
    assert torch.isfinite(z.grad).all(), "0 * inf in the gradient"
    full = oracle_entropy(oracle_probs(np.array([1, 0.5, 0.2])))
    same(stats["entropy"], [[full]], "0 log 0 = 0")


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_token_stats_against_oracle(temperature):
    b = make(seed=2)
    with official.rules(strict=False, per_micro_batch=False, dual_clip=None):
        stats = siren.token_stats(b.logits, b.tokens, 0.8, temperature)
    for i in np.ndindex(b.tokens.shape):
        z = b.logits[i].numpy() / temperature
        same(stats["logp"][i], math.log(oracle_probs(z)[b.tokens[i]]), "logp")
        same(stats["entropy"][i], oracle_entropy(oracle_probs(z)), "H is of all tokens")
        same(stats["nucleus_entropy"][i], oracle_entropy(oracle_q(z, 0.8)), "H'")
        assert stats["nucleus_size"][i] == len(oracle_set(z, 0.8))


# ----------------------------------------------------------------------- strict: the peak mask


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("tau", [0.25, 0.5, 0.8, 0.93, 1.0])
def test_peaks_against_oracle(tau, dtype):
    """H' [40, 11] with zeros, ties, empty rows and padding that must not matter."""
    g = torch.Generator().manual_seed(3)
    H = torch.rand(40, 11, generator=g, dtype=F64)
    H[::3] *= torch.rand(14, 11, generator=g) < 0.4  # many zeros
    H[1::3] = (H[1::3] * 4).ceil() / 4  # many ties
    mask = torch.arange(11) < torch.arange(40)[:, None] % 12
    H = torch.where(mask, H, 5.0).to(dtype)
    expected = oracle_strict(H.double().numpy(), mask.numpy(), tau)
    assert (official.peak_mask(H, mask, tau).numpy() == expected).all()
    peak = official.peak_mask(H, mask, tau)
    same(
        siren.aggregate_entropy(H, peak, mask),
        oracle_aggregate(H, expected, mask),
        "H_agg",
        tol=1e-12 if dtype is F64 else 1e-6,
    )


def test_ties_and_one_token_responses():
    H = t(
        [[1, 1, 1, 1, 1], [0.2, 0.7, 0.7, 0.7, 0.1], [0.3, 9, 9, 9, 9], [0.1, 0.5, 0.9, 9, 9]]
    )
    mask = torch.arange(5) < torch.tensor([5, 5, 1, 3])[:, None]
    expected = [[0] * 5, [0] * 5, [0] * 5, [0, 0, 1, 0, 0]]
    assert official.peak_mask(H, mask, 0.8).int().tolist() == expected, (
        "no tied token is a peak"
    )


def test_aggregation_by_hand():
    H = t([[0, 1, 2, 3, 4, 5], [2, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[1] * 6, [1] + [0] * 5, [0] * 6], dtype=torch.bool)
    for peak_mask, expected in ((siren.peak_mask, (4.5 + 2) / 2), (official.peak_mask, 5 / 2)):
        peak = peak_mask(H, mask, 0.8)
        same(siren.aggregate_entropy(H, peak, mask), expected, "q = 4 is itself an H'")


def test_a_quantile_of_0_is_all_of_the_response():
    b = make(WITH_EMPTY)
    assert torch.equal(official.peak_mask(b.old_logp, b.mask, 0), b.mask)


# ------------------------------------------------------------------ dual clip: the policy loss

CLIPS = [  # advantage, ratio, loss, gradient with respect to logp, by dual clip 3
    (-1, 2.5, 2.5, 2.5),
    (-1, 5.0, 3.0, 0),
    (-2, 5.0, 6.0, 0),
    (-1, 0.5, 0.8, 0),
    (1, 5.0, -1.2, 0),
    (1, 0.2, -0.2, -0.2),
    (0, 1.5, 0, 0),
]


@pytest.mark.parametrize("adv, ratio, expected, gradient", CLIPS)
def test_dual_clip_by_hand(adv, ratio, expected, gradient):
    logp = t([[math.log(ratio)]]).requires_grad_()
    zero, one = torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=torch.bool)
    loss, stats = official.policy_loss(logp, zero, t([float(adv)]), one, 1)
    loss.backward()
    same(loss, expected, "dual clip", tol=1e-7)
    same(logp.grad, [[gradient]], "gradient", tol=1e-7)
    same(stats["approx_kl"], ratio - 1 - math.log(ratio), "the KL is of the ratio as it is")


@pytest.mark.parametrize("algorithm", ["dr_grpo", "grpo"])
@pytest.mark.parametrize("dual_clip", [1.5, 3.0])
def test_policy_loss_against_oracle(algorithm, dual_clip):
    b = make(WITH_EMPTY, seed=4)
    for max_tokens in (6, 20):
        knobs = {"algorithm": algorithm, "max_tokens": max_tokens, "dual_clip": dual_clip}
        budget = max_tokens if algorithm == "dr_grpo" else None
        args = b.logp, b.old_logp, b.adv, b.mask
        expected = oracle_policy(*args[:3], b.mask.numpy(), budget, dual_clip)
        same(official.policy_loss(*args, **knobs)[0], expected, "policy loss", tol=1e-7)
        each = b.adv[:, None].expand(b.mask.shape)
        found = official.policy_loss(b.logp, b.old_logp, each, b.mask, **knobs)[0]
        same(found, expected, "an advantage for each token", tol=1e-7)


@pytest.mark.parametrize("algorithm", ["dr_grpo", "grpo"])
def test_gradcheck_policy_loss(algorithm):
    b = make(WITH_EMPTY, seed=9)

    def run(logp):
        return official.policy_loss(logp, b.old_logp, b.adv, b.mask, 6, algorithm=algorithm)[0]

    assert torch.autograd.gradcheck(run, b.logp.clone().requires_grad_())


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_garbage_in_padding_never_arrives(garbage):
    b = make(WITH_EMPTY, seed=20)
    loss, grad, stats = value_and_grad(Official, b)
    b.old_logp = b.old_logp.masked_fill(~b.mask, garbage)
    loss2, grad2, stats2 = value_and_grad(Official, b)
    same(loss2, loss, "loss")
    same(grad2, grad, "gradient")
    same_stats(stats2, stats, "garbage")


# ------------------------------------------------------------------------------ the whole loss


@pytest.mark.parametrize("knobs", LOSSES)
def test_siren_loss_against_oracle(knobs):
    b = make(WITH_EMPTY, seed=5)
    loss, grad, stats = value_and_grad(Official, b, temperature=1.3, max_tokens=9, **knobs)
    how = KNOBS["beta"], KNOBS["top_p"], KNOBS["peak_quantile"], 1.3
    expected, h_agg = oracle_official(
        b, ANCHOR, *how, knobs["algorithm"], knobs["regularizer"]
    )
    same(loss, expected, "loss", tol=1e-7)
    same(stats["h_agg"], h_agg, "H_agg")
    assert torch.isfinite(grad).all(), "0/0 or 0 * inf in the gradient (an empty nucleus?)"


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_chunking_changes_nothing(chunk):
    b = make(seed=18)
    head = torch.nn.Linear(11, 11, bias=False).double()
    head.weight = torch.nn.Parameter(torch.eye(11, dtype=F64))
    found = []
    for size in (48, chunk):
        hidden = b.logits.flatten(0, 1).requires_grad_()
        with official.rules():  # the gradient too is made inside, as in training
            stats = siren.stats_in_chunks(hidden, head, b.tokens.flatten(), 0.8, 0.8, size)
            (stats["nucleus_entropy"] + stats["logp"]).sum().backward()
        found.append((stats, hidden.grad))
    same_stats(found[1][0], found[0][0], "chunked")
    same(found[1][1], found[0][1], "chunked gradient", tol=1e-12)
    due = official.nucleus_entropy(b.logits.flatten(0, 1) / 0.8, 0.8)
    same(found[1][0]["nucleus_entropy"], due, "by the official rule")


def test_inputs_are_never_written_to():
    b = make(WITH_EMPTY, seed=22)
    before = {name: (x.clone(), x._version) for name, x in vars(b).items()}
    loss_of(Official, b, temperature=0.5)
    for name, x in vars(b).items():
        assert torch.equal(x, before[name][0]) and x._version == before[name][1], name


# ------------------------------------------------------------------ the square per micro-batch


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_square_per_micro_batch_adds_the_variance(size):
    """Mean of squares = square of the mean + variance: what the official code optimises."""
    cfg = siren.Config(micro_batch_size=size, beta=0.7, top_p=0.8, peak_quantile=0.8)
    model = small_model()
    task = SimpleNamespace(eos_ids=[1, 2], pad_id=1)
    problems = [SimpleNamespace(prompt=[5, 3 + i, 7]) for i in range(8)]
    rollout = siren.sample(model, task, problems, cfg, "0", 1, 1.0)
    adv = torch.randn(8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        old = siren.score(model, rollout, cfg)
    H, mask = old["nucleus_entropy"], rollout.mask
    peak = siren.peak_mask(H, mask, 0.8)
    h_agg = float(siren.aggregate_entropy(H, peak, mask))
    some = [slice(start, start + size) for start in range(0, 8, size)]
    h = [float(siren.aggregate_entropy(H[i], peak[i], mask[i])) for i in some]
    same(np.mean(h), h_agg, "H_agg is linear", tol=1e-6)
    weights = list(model.parameters())
    run = SimpleNamespace(cfg=cfg, model=model, anchor=0.3, weights=weights)
    run.optimizer = torch.optim.SGD(weights, lr=0.0)  # so that the model stays as it is
    only = {"exclusive": False, "strict": False, "dual_clip": None}
    ours = siren.update(run, rollout, old["logp"], adv)
    with official.rules(**only):
        theirs = siren.update(run, rollout, old["logp"], adv)
    same(ours["regularizer_loss"], 0.7 * (h_agg - 0.3) ** 2, "exact", tol=1e-5)
    excess = 0.7 * np.var(h)
    found = theirs["regularizer_loss"] - ours["regularizer_loss"]
    assert found == pytest.approx(excess, rel=1e-4, abs=1e-6), "beta * variance of the H_agg"
    for name in ("policy_loss", "h_agg", *OVER_TOKENS):
        assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-7), name
    if size == 8:
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-5)
    else:
        assert excess > 1e-4, "this batch could not have told the two apart"
        assert theirs["grad_norm"] != pytest.approx(ours["grad_norm"], rel=1e-4)


def first_step(folder, **options):
    """The record of the first step of a small run."""
    small = {"prompts": 4, "mini_batches": 1, "steps": 1, "device": "cpu", **options}
    cfg = siren.Config(out=str(folder), eval_prompts=2, eval_samples=2, **small)
    return siren.train(siren.Run(cfg))[1]


def test_in_training_the_square_per_micro_batch_does_matter(tmp_path):
    small = {"micro_batch_size": 2, "anchor": 0.01, "beta": 1.0}
    ours = first_step(tmp_path / "ours", **small)
    with official.rules(exclusive=False, strict=False, dual_clip=None):
        theirs = first_step(tmp_path / "theirs", **small)
    gap = theirs["regularizer_loss"] - ours["regularizer_loss"]
    assert gap > 1e-3, "the mean of squares exceeds the square of the mean by the variance"
    assert theirs["h_agg"] == ours["h_agg"]


def test_all_rules_change_a_training_run(tmp_path):
    ours = first_step(tmp_path / "ours", micro_batch_size=8)
    with official.rules():
        theirs = first_step(tmp_path / "theirs", micro_batch_size=8)
    assert theirs["reward"] == ours["reward"], "the same samples"
    assert theirs["h_agg"] < ours["h_agg"] - 0.1, "fewer options in each nucleus"
    assert theirs["grad_norm"] != ours["grad_norm"]


# ---------------------------------------------------------------------- putting rules in force


RULES = {"exclusive": "nucleus", "strict": "peak_mask"}
RULES |= {"per_micro_batch": "update", "dual_clip": "policy_loss"}


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_put_in_force_one_by_one_and_taken_back(rule):
    before = dict(vars(siren))
    which = dict.fromkeys(RULES, False) | {"dual_clip": None}
    which[rule] = 3.0 if rule == "dual_clip" else True
    with pytest.raises(RuntimeError, match="inside"), official.rules(**which):
        changed = [name for name in before if getattr(siren, name) is not before[name]]
        assert changed == [RULES[rule]]
        raise RuntimeError("inside")
    assert dict(vars(siren)) == before


def test_plug():
    before = dict(vars(siren))
    b = make(WITH_EMPTY, seed=5)
    expected = loss_of(Official, b)[0]
    try:
        official.plug()
        changed = {name for name in before if getattr(siren, name) is not before[name]}
        assert changed == set(RULES.values())
        same(loss_of(reference, b)[0], expected, "plugged", tol=1e-12)
        same(loss_of(Official, b)[0], expected, "twice", tol=1e-12)
        z = torch.zeros(1, 4)
        same(reference.nucleus_entropy(z, 1.0), [math.log(4)], "p = 1: all tokens", tol=1e-6)
    finally:
        vars(siren).update(before)
    assert float(loss_of(reference, b)[0]) != float(expected)


@pytest.mark.parametrize("rule", RULES)
def test_plug_with_one_rule(rule):
    before = dict(vars(siren))
    with plugs.plugged(f"research.official:{rule}={3 if rule == 'dual_clip' else 1}"):
        changed = {name for name in before if getattr(siren, name) is not before[name]}
        assert changed == {
            RULES[rule],
            "Run",
            "load_checkpoint",
        }  # a run keeps what is plugged
    assert dict(vars(siren)) == before


def test_plug_with_an_unknown_rule():
    plugged = plugs.plugged("research.official:strictly=1")
    with pytest.raises(ValueError, match="'strictly'"), plugged:
        pass


def test_doctests():
    result = doctest.testmod(official)
    assert result.attempted >= 6 and result.failed == 0
