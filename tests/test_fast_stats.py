"""research/fast_stats.py: as siren.stats_in_chunks, the definition and finite differences."""

import doctest
import math
from types import SimpleNamespace

import pytest
import torch
from common import F64, KNOBS, make, oracle_stats, same, same_stats, small_model

import siren
from research import fast_stats


class Logits(torch.nn.Module):
    """A head for siren.stats_in_chunks whose hidden states are the logits themselves."""

    def __init__(self, vocab):
        super().__init__()
        self.weight = torch.empty(vocab, 0)  # it is asked for its length

    def forward(self, logits):
        return logits


def kinds(vocab, dtype):
    """Rows [9, vocab]: peaked, Zipf, noise, nearly flat; flat, with ties, forbidden tokens."""
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(vocab, generator=g, dtype=F64)
    zipf = -1.2 * torch.arange(1, vocab + 1, dtype=F64).log()
    rows = [9 * noise, 3 * noise, zipf[torch.randperm(vocab, generator=g)], noise, 0.1 * noise]
    rows += [0 * noise, noise.bfloat16().to(F64), (noise * 2).round()]
    rows += [noise.masked_fill(torch.arange(vocab) % 2 == 1, -math.inf)]
    return torch.stack(rows).to(dtype)


UNTIED = slice(0, 5)  # of these rows; among tied tokens any may be the last in the nucleus


def both(z, top_p=0.8, temperature=1.0, chunk=0):
    """siren's and fast_stats's stats, each with the gradients of logp and H' for random
    weights."""
    g = torch.Generator().manual_seed(2)
    tokens = 2 * torch.randint(z.shape[-1] // 2, (len(z),), generator=g)  # none is forbidden
    weights = torch.randn(len(z), generator=g)
    ways = ((siren.stats_in_chunks, Logits(z.shape[-1])), (fast_stats.stats_in_chunks, None))
    found = []
    for stats_in_chunks, head in ways:
        x = z.clone().requires_grad_()
        stats = stats_in_chunks(x, head, tokens, top_p, temperature, chunk)
        sums = [(weights * stats[name]).sum() for name in ("logp", "nucleus_entropy")]
        grads = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in sums]
        found.append((stats, *grads))
    return found


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("chunk", [0, 1, 4])
def test_equal_in_float64(top_p, chunk):
    """Where float64 finds the same sets, all is equal to the last digits."""
    ours, fast = both(kinds(3000, F64), top_p, temperature=0.7, chunk=chunk)
    assert torch.equal(ours[0]["nucleus_size"], fast[0]["nucleus_size"])
    assert ours[0]["nucleus_size"].max() > 100
    assert set(fast[0]) == set(ours[0])
    same_stats(fast[0], ours[0], "against siren.stats_in_chunks")
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
    sizes = torch.stack([ours[0]["nucleus_size"], fast[0]["nucleus_size"]])
    assert (sizes[0] - sizes[1]).abs().max() <= 1
    same(fast[0]["nucleus_entropy"], ours[0]["nucleus_entropy"], "H'", tol=5e-3)
    alike = sizes[0] == sizes[1]
    assert alike.sum() >= 6
    grads = (found[2][alike].sort(-1)[0] for found in (fast, ours))
    same(*grads, "gradient of H'", tol=tol)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_against_the_oracle(temperature):
    b = make(seed=2)
    logits = b.logits.flatten(0, 1)
    tokens = b.tokens.flatten()
    stats = fast_stats.stats_in_chunks(logits, None, tokens, 0.8, temperature, chunk=5)
    expected = oracle_stats(logits, tokens, 0.8, temperature)
    assert set(stats) == set(expected)
    for name in expected:
        same(stats[name], expected[name], name)


@pytest.mark.parametrize("chunk", [0, 3])
def test_gradcheck(chunk):
    b = make((3, 3), V=7, seed=8)
    b.logits[:, 1::3] /= 6  # finite differences dislike steep softmaxes
    logits = b.logits[b.mask]
    tokens = b.tokens[b.mask]

    def run(x):
        stats = fast_stats.stats_in_chunks(x, None, tokens, 0.8, 1.4, chunk=chunk)
        return stats["logp"], stats["nucleus_entropy"]

    assert torch.autograd.gradcheck(run, logits.requires_grad_())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [0, 1, 4, 1000])
def test_hidden_states_and_head(bias, chunk):
    g = torch.Generator().manual_seed(19)
    hidden = torch.randn(15, 4, generator=g, dtype=F64)
    tokens = torch.randint(9, (15,), generator=g)
    head = torch.nn.Linear(4, 9, bias=bias, dtype=F64)
    weights = torch.randn(2, 15, generator=g, dtype=F64)
    found = []
    for stats_in_chunks in (siren.stats_in_chunks, fast_stats.stats_in_chunks):
        x = hidden.clone().requires_grad_()
        head.zero_grad()
        stats = stats_in_chunks(x, head, tokens, 0.8, 0.9, chunk)
        (weights[0] * stats["logp"] + weights[1] * stats["nucleus_entropy"]).sum().backward()
        found.append((stats, x.grad, *(p.grad.clone() for p in head.parameters())))
    same_stats(found[1][0], found[0][0], "from hidden states")
    for one, two in zip(found[1][1:], found[0][1:], strict=True):
        same(one, two, "gradient", tol=1e-12)


@pytest.mark.parametrize("top_p", [0.5, 0.999999, 0.99999999])
def test_forbidden_tokens_are_never_in_the_nucleus(top_p):
    z = torch.zeros(1, 8).index_fill(1, torch.tensor([1, 3, 5, 7]), -math.inf)
    token = torch.tensor([0])
    stats = fast_stats.stats_in_chunks(z, None, token, top_p, 1.0)
    expected = siren.token_stats(z, token, top_p)
    assert stats["nucleus_size"] == expected["nucleus_size"] == (2 if top_p == 0.5 else 4)
    same(stats["nucleus_entropy"], expected["nucleus_entropy"], "H'", tol=1e-6)


@pytest.mark.parametrize("micro_batch_size", [100, 3])
def test_an_update_with_the_drop_in(micro_batch_size, monkeypatch):
    """plug(), and the whole update: the same metrics and gradients, also in micro-batches."""
    cfg = siren.Config(micro_batch_size=micro_batch_size, chunk=4, top_p=0.8, temperature=1.2)
    g = torch.Generator().manual_seed(16)
    mask = torch.arange(6) < torch.tensor([6, 1, 4, 0, 2, 6, 3, 5])[:, None]
    ids = torch.randint(3, 32, (2, 8, 6), generator=g)
    logp = -3 + 0.4 * torch.randn(8, 6, generator=g, dtype=F64)
    rollout = siren.Rollout(ids[0], torch.ones(8, 6).bool(), ids[1], mask, logp)
    adv = torch.randn(8, generator=g, dtype=F64)
    found = []
    for drop_in in (False, True):
        if drop_in:
            monkeypatch.setattr(siren, "stats_in_chunks", siren.stats_in_chunks)  # put back
            fast_stats.plug()
            assert siren.stats_in_chunks is fast_stats.stats_in_chunks
        model = small_model().double()
        weights = list(model.parameters())
        optimizer = torch.optim.SGD(weights, lr=0.0)
        run = SimpleNamespace(
            cfg=cfg, model=model, weights=weights, optimizer=optimizer, anchor=0.5
        )
        metrics = siren.update(run, rollout, logp, adv)
        with torch.no_grad():
            scored = siren.score(model, rollout, cfg)
        found.append((metrics, scored, torch.cat([p.grad.flatten() for p in weights])))
    same_stats(found[1][0], found[0][0], "metrics of the update")
    same_stats(found[1][1], found[0][1], "scores")
    assert found[0][0]["regularizer_loss"] > 1e-3
    assert all((values[~mask] == 0).all() for values in found[1][1].values()), "padding is 0"
    same(found[1][2], found[0][2], "gradient", tol=1e-12)
    assert found[0][2].norm() > 1e-3


def test_nothing_of_the_vocabularys_size_is_kept():
    b = make((6, 6, 6), V=600, seed=23)
    logits = b.logits.flatten(0, 1).requires_grad_()
    own = logits.untyped_storage().data_ptr()
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logits.softmax(-1).square().sum()
        assert max(kept.values()) == logits.numel(), "the recorder itself is blind"
        kept.clear()
        stats = fast_stats.stats_in_chunks(
            logits, None, b.tokens.flatten(), KNOBS["top_p"], 1.0, chunk=4
        )
    assert sum(size for place, size in kept.items() if place != own) < logits.numel() / 4
    stats["nucleus_entropy"].sum().backward()
    assert logits.grad.abs().sum() > 0


def test_doctests():
    result = doctest.testmod(fast_stats)
    assert result.attempted >= 2
    assert result.failed == 0
