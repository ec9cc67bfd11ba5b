"""examples/official.py against the official functions, written again from their description."""

import math

import numpy as np
import pytest
import torch
from common import ANCHOR, F64, KNOBS, make, rows, same, t

import siren
from examples import official

VECTORS = [  # p = 0.8: probabilities, H' by the official rule
    ((0.9, 0.05, 0.03, 0.02), 0.0),
    ((0.6, 0.3, 0.06, 0.04), 0.0),
    ((0.5, 0.25, 0.15, 0.1), 0.636514),
    ((0.25, 0.25, 0.25, 0.25), math.log(3)),
]


def described_entropy(logits, p):
    """The official nucleus entropy, in torch so that autograd can differentiate it."""
    probs = logits.softmax(-1)
    ordered, index = probs.sort(-1, descending=True)
    kept = torch.zeros_like(probs).scatter(-1, index, (ordered.cumsum(-1) <= p).to(probs.dtype))
    q = probs * kept / (probs * kept).sum(-1, keepdim=True).clamp(min=1e-20)
    return -(q * (q + 1e-20).log()).sum(-1)


def oracle_nucleus(z, p):
    """The tokens of one position, one after the other, while their sum stays within p."""
    pi, mass, kept = np.exp(z - np.logaddexp.reduce(z)), 0.0, []
    for j in np.argsort(-pi, kind="stable"):
        mass += pi[j]
        if mass > p:
            break
        kept.append(int(j))
    return pi, kept


@pytest.mark.parametrize("probabilities, expected", VECTORS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_vectors(probabilities, expected, dtype):
    z = torch.tensor(probabilities, dtype=dtype).log() + 3
    same(official.nucleus_entropy(z, 0.8), expected, "the crossing token is left out", tol=1e-5)


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.95, 0.999])
def test_nucleus_against_a_loop(top_p):
    logits = make(seed=1).logits
    mask, h = official.nucleus_mask(logits, top_p), official.nucleus_entropy(logits, top_p)
    for i in np.ndindex(*logits.shape[:-1]):
        pi, kept = oracle_nucleus(logits[i].numpy(), top_p)
        assert mask[i].nonzero()[:, 0].tolist() == sorted(kept)
        q = pi[kept] / pi[kept].sum() if kept else np.ones(1)
        same(h[i], -(q * np.log(q)).sum(), "entropy of the set, renormalised")


@pytest.mark.parametrize("p", [0.5, 0.8])
def test_nucleus_entropy_and_gradient_equal_the_description(p):
    z = torch.randn(60, 50, generator=torch.Generator().manual_seed(24)) * 2.5
    one, two = z.clone().requires_grad_(), z.clone().requires_grad_()
    h, expected = official.nucleus_entropy(one, p), described_entropy(two, p)
    h.sum().backward()
    expected.sum().backward()
    same(h, expected, "official nucleus entropy", tol=1e-5)
    same(one.grad, two.grad, "gradient of the official nucleus entropy", tol=1e-5)
    assert (expected == 0).any() and (expected > 0).any()


def test_an_empty_nucleus_gives_zero_and_not_nan():
    z = t([[0.9, 0.05, 0.03, 0.02], [0.5, 0.25, 0.15, 0.1]]).log().requires_grad_()
    assert official.nucleus_mask(z, 0.8)[0].sum() == 0
    h = official.nucleus_entropy(z, 0.8)
    h.sum().backward()
    assert h[0] == 0 and (z.grad[0] == 0).all(), "empty set: value 0 and gradient 0, no 0/0"
    assert h[1] > 0 and torch.isfinite(z.grad[1]).all() and z.grad[1].abs().sum() > 0


def test_only_the_10000_likeliest_tokens_are_looked_at():
    z = torch.zeros(1, 20_000)
    assert official.nucleus_mask(z, 0.8).sum() == 10_000
    same(official.nucleus_entropy(z, 0.8), [math.log(10_000)], "cut at 10000", tol=1e-5)


def test_forbidden_tokens_bring_no_nan():
    z = t([[1.0, -math.inf, 0.5, 0.2, -math.inf]]).requires_grad_()
    assert not official.nucleus_mask(z, 0.8)[0, [1, 4]].any()
    official.nucleus_entropy(z, 0.8).sum().backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("tau", [0.25, 0.5, 0.8, 0.93, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_peaks_are_strictly_above_the_quantile(tau, dtype):
    g = torch.Generator().manual_seed(25)
    h = torch.rand(40, 11, generator=g, dtype=F64)
    h[1::3] = (h[1::3] * 4).ceil() / 4  # many ties
    mask = torch.arange(11) < torch.arange(40)[:, None] % 12
    h = torch.where(mask, h, 5.0).to(dtype)  # padding must not matter, however large
    peak = official.peak_mask(h, mask, tau)
    for i in range(40):
        own = h[i][mask[i]].double().numpy()
        expected = own > np.quantile(own, tau) if len(own) else np.zeros(0, bool)
        assert peak[i][mask[i]].tolist() == expected.tolist(), "H' > q, not H' >= q"
        assert not peak[i][~mask[i]].any()
    assert official.peak_mask(h, mask, 0.0).equal(mask)


def test_policy_loss_equals_the_description():
    b = make(seed=26)
    one, two = b.logp.clone().requires_grad_(), b.logp.clone().requires_grad_()
    ratio, adv = (two - b.old_logp * 3).clamp(-20, 20).exp(), b.adv[:, None]
    surrogate = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2))
    surrogate = torch.where(adv < 0, torch.minimum(-adv * 3.0, surrogate), surrogate)
    expected = ((surrogate * b.mask).sum(-1) / b.mask.shape[-1]).mean()
    loss, stats = official.policy_loss(one, b.old_logp * 3, b.adv, b.mask)
    loss.backward()
    expected.backward()
    same(loss, expected, "sum over tokens / T, mean over responses, dual clip 3")
    same(one.grad, two.grad, "its gradient")
    assert ((ratio > 3) & (adv < 0) & b.mask).any()
    _, plain = siren.policy_loss(one, b.old_logp * 3, b.adv, b.mask)
    assert all(torch.equal(stats[name], plain[name]) for name in plain)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_square_per_micro_batch_adds_the_variance(size):
    """Mean of squares = square of the mean + variance."""
    b, total, h = make(seed=15), 0.0, []
    for start in range(0, 8, size):
        part = rows(b, slice(start, start + size))
        stats = siren.token_stats(part.logits, part.tokens, part.mask, 0.8)
        peak = siren.peak_mask(stats["nucleus_entropy"], part.mask, 0.8)
        h.append(float(siren.aggregate_entropy(stats["nucleus_entropy"], peak, part.mask)))
    for start, h_micro in zip(range(0, 8, size), h):
        part = rows(b, slice(start, start + size))
        anchor = official.micro_batch_anchor(h_micro, np.mean(h), ANCHOR)
        inputs = (part.logits, part.tokens, part.old_logp, part.adv, part.mask)
        _, stats = siren.siren_loss(*inputs, anchor, **KNOBS)
        total += float(stats["regularizer_loss"]) * size / 8
    exact = KNOBS["beta"] * (np.mean(h) - ANCHOR) ** 2
    same(total - exact, KNOBS["beta"] * np.var(h), "excess = beta * variance of H_agg")
    assert size == 8 or np.var(h) > 1e-4, "this batch could not have told the two apart"


def test_siren_loss_is_made_of_the_official_parts():
    b = make(seed=5)
    one, two = b.logits.clone().requires_grad_(), b.logits.clone().requires_grad_()
    loss, _ = official.siren_loss(one, b.tokens, b.old_logp, b.adv, b.mask, ANCHOR, **KNOBS)
    logp = two.log_softmax(-1).gather(-1, b.tokens[..., None])[..., 0]
    h = official.nucleus_entropy(two, 0.8)
    h_agg = siren.aggregate_entropy(h, official.peak_mask(h, b.mask, 0.8), b.mask)
    policy, _ = official.policy_loss(logp, b.old_logp, b.adv, b.mask)
    expected = policy + KNOBS["beta"] * (h_agg - ANCHOR) ** 2
    loss.backward()
    expected.backward()
    same(loss, expected, "official loss")
    same(one.grad, two.grad, "its gradient")


def test_rules_are_in_force_inside_the_block_alone():
    names = ("nucleus", "peak_mask", "policy_loss", "micro_batch_anchor")
    before = [getattr(siren, name) for name in names]
    with pytest.raises(KeyError), official.rules(strict=False):
        assert siren.nucleus is official.nucleus
        assert siren.peak_mask is before[1]
        raise KeyError
    assert [getattr(siren, name) for name in names] == before


def test_the_rules_change_a_training_run(tmp_path):
    small = {"prompts": 4, "mini_batches": 1, "micro_batch_size": 8, "steps": 1, "device": "cpu"}
    small |= {"eval_prompts": 2, "eval_samples": 2}
    ours = siren.train(siren.Config(out=str(tmp_path / "ours"), **small))[1]
    with official.rules():
        theirs = siren.train(siren.Config(out=str(tmp_path / "theirs"), **small))[1]
    assert theirs["reward"] == ours["reward"], "the same samples"
    assert theirs["h_agg"] < ours["h_agg"] - 0.1, "fewer options in each nucleus"
    assert theirs["grad_norm"] != ours["grad_norm"]
