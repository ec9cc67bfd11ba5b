"""examples/fast_stats.py: equal to siren.token_stats, to the definition, to finite differences."""

import doctest
import math

import numpy as np
import pytest
import torch
from common import F64, KNOBS, WITH_EMPTY, make, oracle_stats, same, same_stats, value_and_grad

import siren
from examples import fast_stats


def kinds(vocab, dtype):
    """Rows [1, 9, vocab]: peaked, Zipf, noise, nearly flat; flat, with ties, forbidden tokens."""
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(vocab, generator=g, dtype=F64)
    zipf = -1.2 * torch.arange(1, vocab + 1, dtype=F64).log()
    rows = [9 * noise, 3 * noise, zipf[torch.randperm(vocab, generator=g)], noise, 0.1 * noise]
    rows += [0 * noise, noise.bfloat16().to(F64), (noise * 2).round()]
    rows += [noise.masked_fill(torch.arange(vocab) % 2 == 1, -math.inf)]
    return torch.stack(rows)[None].to(dtype)


UNTIED = slice(0, 5)  # of these rows; among tied tokens any may be the last in the nucleus


def both(z, top_p=0.8, **knobs):
    """siren's and fast_stats's stats, each with the gradients of logp and H' for random weights."""
    g, found = torch.Generator().manual_seed(2), []
    tokens = 2 * torch.randint(z.shape[-1] // 2, z.shape[:-1], generator=g)  # none is forbidden
    weights = torch.randn(tokens.shape, generator=g)
    mask = torch.ones_like(tokens)
    mask[:, 3] = 0
    for token_stats in (siren.token_stats, fast_stats.token_stats):
        x = z.clone().requires_grad_()
        stats = token_stats(x, tokens, mask, top_p, **knobs)
        sums = [(weights * stats[name]).sum() for name in ("logp", "nucleus_entropy")]
        grads = [torch.autograd.grad(value, x, retain_graph=True)[0][0] for value in sums]
        found.append((stats, *grads))
    return found


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("chunk", [0, 1, 4])
def test_equal_in_float64(top_p, chunk):
    """Where float64 finds the same sets, all is equal to the last digits."""
    ours, fast = both(kinds(3000, F64), top_p, temperature=0.7, chunk=chunk)
    assert torch.equal(ours[0]["nucleus_size"], fast[0]["nucleus_size"])
    assert ours[0]["nucleus_size"].max() > 100
    same_stats(fast[0], ours[0], "against siren.token_stats")
    same(fast[1], ours[1], "gradient of logp", tol=1e-12)
    same(fast[2][UNTIED], ours[2][UNTIED], "gradient of H'", tol=1e-12)
    same(fast[2].sort(-1)[0], ours[2].sort(-1)[0], "gradient of H', of tied tokens", tol=1e-12)
    assert not fast[0]["entropy"].requires_grad
    assert not fast[0]["nucleus_size"].is_floating_point()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_in_low_precision(dtype):
    """Rounding may move one token of hundreds over the edge of a set, and nothing else."""
    ours, fast = both(kinds(700, dtype))
    tol = 1e-6 if dtype is torch.float32 else 1e-2  # the gradient is rounded to bfloat16
    for name in ("logp", "entropy"):
        same(fast[0][name], ours[0][name], name, tol=1e-5)
    same(fast[1], ours[1], "gradient of logp", tol=tol)
    assert fast[0]["logp"].dtype == fast[0]["nucleus_entropy"].dtype == torch.float32
    sizes = torch.stack([ours[0]["nucleus_size"][0], fast[0]["nucleus_size"][0]])
    assert (sizes[0] - sizes[1]).abs().max() <= 1
    same(fast[0]["nucleus_entropy"], ours[0]["nucleus_entropy"], "H'", tol=5e-3)
    alike = sizes[0] == sizes[1]
    assert alike.sum() >= 6
    grads = (found[2][alike].sort(-1)[0] for found in (fast, ours))
    same(*grads, "gradient of H'", tol=tol)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_against_the_oracle(temperature):
    b = make(seed=2)
    stats = fast_stats.token_stats(b.logits, b.tokens, torch.ones(8, 6), 0.8, temperature, chunk=5)
    expected = oracle_stats(b.logits, b.tokens, 0.8, temperature)
    assert set(stats) == set(expected)
    for name in expected:
        same(stats[name], expected[name], name)


@pytest.mark.parametrize("chunk", [0, 3])
def test_gradcheck(chunk):
    b = make((3, 3), V=7, seed=8)
    b.logits[:, 1::3] /= 6  # finite differences dislike steep softmaxes

    def run(x):
        stats = fast_stats.token_stats(x, b.tokens, b.mask, 0.8, 1.4, chunk=chunk)
        return stats["logp"], stats["nucleus_entropy"]

    assert torch.autograd.gradcheck(run, b.logits.requires_grad_())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [0, 1, 4, 1000])
def test_hidden_states_and_head(bias, chunk):
    g = torch.Generator().manual_seed(19)
    hidden, tokens = torch.randn(3, 5, 4, generator=g, dtype=F64), torch.randint(9, (3, 5))
    head = torch.nn.Linear(4, 9, bias=bias, dtype=F64)
    weights, found = torch.randn(2, 3, 5, generator=g, dtype=F64), []
    for token_stats in (siren.token_stats, fast_stats.token_stats):
        x = hidden.clone().requires_grad_()
        head.zero_grad()
        stats = token_stats(x, tokens, torch.ones(3, 5), 0.8, 0.9, head=head, chunk=chunk)
        (weights[0] * stats["logp"] + weights[1] * stats["nucleus_entropy"]).sum().backward()
        found.append((stats, x.grad, *(p.grad.clone() for p in head.parameters())))
    same_stats(found[1][0], found[0][0], "from hidden states")
    for one, two in zip(found[1][1:], found[0][1:], strict=True):
        same(one, two, "gradient", tol=1e-12)


@pytest.mark.parametrize("top_p", [0.5, 0.999999, 0.99999999])
def test_forbidden_tokens_are_never_in_the_nucleus(top_p):
    z = torch.zeros(1, 1, 8).index_fill(2, torch.tensor([1, 3, 5, 7]), -math.inf)
    stats = fast_stats.token_stats(z, torch.tensor([[0]]), torch.ones(1, 1), top_p)
    expected = siren.nucleus_mask(z, top_p)
    assert not expected[0, 0, 1::2].any() and stats["nucleus_size"] == expected.sum()
    same(stats["nucleus_entropy"], siren.nucleus_entropy(z, top_p), "H'", tol=1e-6)


def test_the_loss_with_the_drop_in():
    """plug(), the whole loss, and padding that may hold anything."""
    b = make(WITH_EMPTY, seed=16)
    b.logits[~b.mask] = math.nan
    loss, grad, stats = value_and_grad(siren, b, temperature=1.2)
    before = dict(vars(siren))
    try:
        fast_stats.plug()
        assert siren.token_stats is fast_stats.token_stats
        loss2, grad2, stats2 = value_and_grad(siren, b, temperature=1.2, chunk=4)
    finally:
        vars(siren).update(before)
    same(loss2, loss, "loss", tol=1e-12)
    same(grad2, grad, "gradient", tol=1e-12)
    same_stats(stats2, stats, "stats")
    assert (grad2[~b.mask] == 0).all() and np.isfinite(float(loss2))


def test_nothing_of_the_vocabularys_size_is_kept():
    b = make((6, 6, 6), V=600, seed=23)
    b.logits.requires_grad_()
    own, kept = b.logits.untyped_storage().data_ptr(), {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        b.logits.softmax(-1).square().sum()
        assert max(kept.values()) == b.logits.numel(), "the recorder itself is blind"
        kept.clear()
        stats = fast_stats.token_stats(b.logits, b.tokens, b.mask, KNOBS["top_p"], chunk=4)
    assert sum(size for place, size in kept.items() if place != own) < b.logits.numel() / 4
    stats["nucleus_entropy"].sum().backward()
    assert b.logits.grad.abs().sum() > 0


def test_doctests():
    result = doctest.testmod(fast_stats)
    assert result.attempted >= 2 and result.failed == 0
