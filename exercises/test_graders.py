"""Grades the exercises 1 to 10 on numbers that fit into one's head.

    python -m pytest exercises --impl exercises/student.py -m ex3 -x

Each failure names the idea that is missing. test_compare.py comes after it, with many inputs.
"""

import math

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
    oracle_peaks,
    oracle_policy,
    oracle_probs,
    oracle_siren,
    oracle_stats,
    rows,
    same,
    same_stats,
    t,
    value_and_grad,
)


def ex(number, *values):
    """A case that grades this exercise: it uses only what student.py's function has."""
    return pytest.param(*values, marks=getattr(pytest.mark, f"ex{number}"))


def stat(stats, name):
    """stats[name]; an AssertionError if it is not there."""
    assert isinstance(stats, dict) and name in stats, (
        f"return (loss, stats) with {name!r} in it"
    )
    return stats[name]


def one_token_loss(impl, adv, ratio, **knobs):
    """(loss, gradient with respect to logp, stats) of one response of one token."""
    logp = t([[math.log(ratio)]]).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, stats = impl.policy_loss(logp, t([[0.0]]), t([adv]), mask, **knobs)
    assert loss.requires_grad, "the loss has no gradient: it flows through the ratio"
    loss.backward()
    return loss.detach(), logp.grad, stats


def entropy_moved_by_a_step(impl, anchor, **knobs):
    """How far one gradient step on the regulariser alone moves H_agg."""
    b = make(seed=12)
    b.old_logp, b.adv = b.logp, b.adv * 0  # nothing but the regulariser acts
    _, grad, before = value_and_grad(impl, b, anchor, **knobs)
    b.logits = b.logits - 0.1 * grad
    with torch.no_grad():
        after = loss_of(impl, b, anchor, **knobs)[1]
        return float(after["h_agg"]) - float(before["h_agg"])


@pytest.mark.ex1
def test_ex1_advantages(impl):
    r = t([1, 0, 0, 0, 1, 1, 1, 0])
    groups, interleaved = r.view(2, 4), r.view(4, 2)
    centred = (groups - groups.mean(1, keepdim=True)).view(-1)
    stds = r[:4].std(), r[:4].std(correction=0), centred.std()
    mistakes = {f"no division by the standard deviation, {s:.2f}": centred / s for s in stds}
    mistakes |= {
        "the mean is of the response's own group, not of the batch": r - r.mean(),
        "a group is consecutive rows": (interleaved - interleaved.mean(0)).view(-1),
        "the group's mean includes the response itself": centred * 4 / 3,
        "subtract the mean, not the median": r - t([0, 0, 0, 0, 1, 1, 1, 1]),
        "mind the sign: reward - mean": -centred,
    }
    expected = [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75]
    same(
        impl.group_advantages(r, 4), expected, "reward - mean of its group", mistakes=mistakes
    )
    assert r.tolist() == [1, 0, 0, 0, 1, 1, 1, 0], (
        "rewards was written to: return a new tensor"
    )
    same(impl.group_advantages(t([1, 1, 1]), 3), [0.0] * 3, "equal rewards teach nothing")


@pytest.mark.ex2
def test_ex2_clipped_loss(impl):
    _, slope, _ = one_token_loss(impl, 1, 1.0)
    wrong_way = bool(slope > 0)
    assert not wrong_way, (
        "a loss is minimised: its gradient must make a token with A > 0 likelier"
    )
    cases = [(1, 0.5), (1, 1.5), (-1, 0.5), (-1, 1.5), (0, 1.5)]
    got = torch.stack([one_token_loss(impl, *case)[0] for case in cases])
    a, ratio = t(cases).T
    free, held = ratio * a, ratio.clamp(0.8, 1.2) * a
    mistakes = {
        "the ratio is not clipped": -free,
        "the way back is never clipped: take the smaller of both terms": -held,
        "the gain is the smaller of both terms, not the larger": -torch.maximum(free, held),
    }
    idea = "for A < 0 you clip on the wrong side: there the ratio is held from below"
    mistakes[idea] = torch.where(a > 0, -torch.minimum(free, held), -torch.maximum(free, held))
    idea = "-min(r A, clip(r) A) for (A, r) = " + ", ".join(map(str, cases))
    same(got, [-0.5, -1.2, 0.8, 1.5, 0], idea, mistakes=mistakes)
    fractions = [
        float(stat(one_token_loss(impl, *case)[2], "clip_fraction")) for case in cases
    ]
    same(
        fractions, [0, 1, 1, 0, 0], "clip_fraction: where the clipped term is the smaller one"
    )


@pytest.mark.ex2
def test_ex2_masks_and_means(impl):
    zero, mask = (
        torch.zeros(3, 4, dtype=F64),
        torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0] * 4]),
    )
    mask, adv = (
        mask.bool(),
        t([1.0, -2.0, 7.0]),
    )  # the token losses are -1, once, and 2, 3 times

    def result(old_logp=zero, **knobs):
        return impl.policy_loss(zero, old_logp, adv, mask, **knobs)

    mistakes = {
        "divide by the budget, not by each response's own length": (-1 + 2) / 2,
        "divide by budget and responses, not by the number of tokens": (-1 + 6) / 4,
        "leave out empty responses when dividing by their number": (-1 + 6) / 4 / 3,
        "padding reaches the loss: its tokens are not part of the sums": (-4 + 8 - 28) / 4 / 2,
        "padding reaches the loss: neither summed nor counted": (-4 + 8 - 28) / 4 / 3,
    }
    idea = "sum over tokens / max_tokens, then mean over responses; max_tokens=None means T"
    same(result()[0], (-1 / 4 + 6 / 4) / 2, idea, mistakes=mistakes)
    same(result(max_tokens=10)[0], (-1 / 10 + 6 / 10) / 2, "divide by max_tokens where given")
    idea = "padding reaches the loss: its tokens are not part of the sums"
    same(result(zero.masked_fill(~mask, -1.0))[0], result()[0], idea)
    nan = result(zero.masked_fill(~mask, math.nan))[0]
    assert torch.isfinite(nan), "NaN in padding: select before computing, since NaN * 0 is NaN"
    clipped = stat(result(t([[-1.0] * 4, [0.0] * 4, [-1.0] * 4]))[1], "clip_fraction")
    same(clipped, 1 / 4, "clip_fraction: the share of the tokens in the mask")
    idea = "a response counts although its advantage is 0: divide by all that have a token"
    silent = impl.policy_loss(zero, zero, t([1.0, 0.0, 7.0]), mask)[0]
    same(silent, (-1 / 4 + 0) / 2, idea)
    loss, stats = impl.policy_loss(zero[2:], zero[2:], adv[2:], mask[2:])
    same(
        [loss, stat(stats, "clip_fraction")],
        [0, 0],
        "no token at all: the loss is 0, not 0 / 0",
    )


@pytest.mark.ex2
def test_ex2_gradient_with_rubbish_in_padding(impl):
    b = make(WITH_EMPTY, seed=4)
    grads = []
    for rubbish in (0.0, math.nan):
        x, y = (x.masked_fill(~b.mask, rubbish).requires_grad_() for x in (b.logp, b.old_logp))
        grads += torch.autograd.grad(impl.policy_loss(x, y, b.adv, b.mask)[0], x)
    idea = "NaN in padding reaches the gradient: select before computing, since NaN * 0 is NaN"
    same(grads[1], grads[0], idea)


@pytest.mark.ex3
def test_ex3_nucleus(impl):
    z = t([0.5, 0.25, 0.15, 0.1]).log()
    try:
        mask = impl.nucleus_mask(z, 0.4)
    except IndexError:
        raise AssertionError("logits [..., V]: work along the last dimension, -1") from None
    right = torch.is_tensor(mask) and mask.dtype == torch.bool and mask.shape == z.shape
    assert right, "the mask is a bool tensor of the shape of the logits"
    for p, size in ((0.4, 1), (0.6, 2), (0.8, 3), (0.95, 4)):
        mask = impl.nucleus_mask(z, p)
        kept = z.exp()[mask].sum().item()
        idea = (
            f"your nucleus leaves out the token that crosses p = {p}: its mass is {kept:.2f}"
        )
        assert kept >= p, idea
        got = mask.sum().item()
        assert got == size, f"your nucleus is not the smallest: {got} tokens instead of {size}"
    order = torch.tensor([2, 0, 3, 1])
    got = impl.nucleus_mask(z[order], 0.6).tolist()
    idea = "sort by probability, then map the mask back from the sorted order to token ids"
    assert got == [False, True, False, True], idea
    got = impl.nucleus_mask(z.flip(0), 0.6).tolist()
    idea = "add up the sorted probabilities, the largest first, not those in the order of ids"
    assert got == [False, False, True, True], idea
    same(
        impl.nucleus_mask(z + 3, 0.6),
        impl.nucleus_mask(z, 0.6),
        "logits are not probabilities",
    )
    tied = impl.nucleus_mask(torch.zeros(4), 0.5).sum().item()
    assert tied != 3, "a sum of exactly p has reached it: .25 + .25 is enough for p = .5"
    assert tied == 2, (
        f"of 4 equally likely tokens 2 reach p = 0.5, not {tied}: no threshold on pi"
    )
    every = impl.nucleus_mask(t([0.0, -800.0]), 1.0).tolist()  # exp(-800) is 0 in float64
    assert every == [True, True], (
        "top_p = 1 keeps every token, even one whose pi is rounded to 0"
    )
    both, idea = (
        torch.stack([z, z.flip(0)]),
        "every position apart: work along the last dimension",
    )
    assert impl.nucleus_mask(both, 0.6).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]], idea
    sure = torch.stack([t([0.9, 0.05, 0.03, 0.02]).log(), z])
    idea = "every position has a nucleus of its own size"
    assert impl.nucleus_mask(sure, 0.6).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]], idea


@pytest.mark.ex4
def test_ex4_nucleus_entropy(impl):
    p = np.array([0.5, 0.25, 0.15, 0.1])
    inside = p[:3]
    right, a_logit_of_0 = (
        oracle_entropy(inside / inside.sum()),
        oracle_probs(np.log([*inside, 1])),
    )
    mistakes = {
        "nearly right: was an epsilon added in the log, or a float64 made float32?": right,
        "in nats: the natural logarithm, not log2": right / math.log(2),
        "renormalise on the nucleus: q = pi / pi(V_p) sums to 1": oracle_entropy(inside),
        "log q, not log pi": -(inside * np.log(inside)).sum() / inside.sum(),
        "tokens outside the nucleus count": oracle_entropy(p),
        "a logit of 0 is not out: it must be -inf": oracle_entropy(a_logit_of_0),
        "your nucleus leaves out the token that crosses p": oracle_entropy(
            p[:2] / p[:2].sum()
        ),
        "entropy has a minus sign": -right,
        "0 * log 0 is NaN: mask log q as well": math.nan,
    }
    z = t(p).log()
    same(
        impl.nucleus_entropy(z, 0.8),
        right,
        "H' of .5 .25 .15 .1 at p = 0.8",
        mistakes=mistakes,
    )
    impl.nucleus_entropy(z.requires_grad_(), 0.8).requires_grad_().backward()
    grad, q = torch.zeros(4) if z.grad is None else z.grad, inside / inside.sum()
    assert torch.isfinite(grad).all(), "0 * log 0 in the backward pass: mask before, not after"
    due = [*(-q * (np.log(q) + right)), 0]
    mistakes = {
        "H' has no gradient: was it detached?": torch.zeros(4),
        "nearly right: was an epsilon added to a sum or in the log?": due,
    }
    idea = "dH'/dz_j = -q_j (log q_j + H') in the nucleus, 0 outside: was a part detached?"
    same(grad, due, idea, mistakes=mistakes)
    same(
        impl.nucleus_entropy(torch.zeros(4, dtype=F64), 0.8),
        math.log(4),
        "equal options: ln 4",
    )


@pytest.mark.ex4
def test_ex4_one_token_has_no_entropy(impl):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 7, generator=generator, dtype=F64) * 2
    h = impl.nucleus_entropy(z, 0.1)  # the likeliest of 7 tokens has more than that
    idea = "with a nucleus of one token H' is 0 exactly, for H' > 0 would make it a peak"
    largest = float(h.detach().abs().max())
    why = "first q = pi / pi(V_p), then log q; and add no epsilon to a sum or in a logarithm"
    assert largest == 0, f"{idea}: yours is {largest:.1g}; {why}"


@pytest.mark.ex5
def test_ex5_peaks(impl):
    peak = impl.peak_mask(
        t([[1, 2, 3, 4, 5], [10, 20, 30, 40, 50]]), torch.ones(2, 5).bool(), 0.8
    )
    batch = peak.int().tolist() == [[0] * 5, [0, 0, 1, 1, 1]]
    batch = batch or peak.int().tolist() == [[0] * 5, [0, 0, 0, 1, 1]]
    assert not batch, "your quantile is over the batch; every response has its own"
    idea = (
        "of 1 2 3 4 5 the 0.8-quantile is 4.2, so that 5 alone is a peak; of 10 to 50 it is 42"
    )
    assert peak.int().tolist() == [[0, 0, 0, 0, 1]] * 2, f"{idea}, not {peak.int().tolist()}"
    H, mask = t([[1, 2, 3, 9, 9, 9]]), torch.tensor([[1, 1, 1, 0, 0, 0]]).bool()
    peak = impl.peak_mask(H, mask, 0.8)
    assert H.tolist() == [[1, 2, 3, 9, 9, 9]], "entropy was written to: H_agg still needs it"
    assert not peak[~mask].any(), "a peak lies in the response: AND with the mask"
    assert peak[0, 2], "padding is not part of the quantile"
    tied = impl.peak_mask(t([[0.2, 0.7, 0.7, 0.7, 0.1]]), torch.ones(1, 5).bool(), 0.8)
    assert tied.int().tolist() == [[0, 1, 1, 1, 0]], (
        "H' >= q: what equals the quantile is a peak"
    )
    sharp = impl.peak_mask(t([[0.0] * 9 + [1.0]]), torch.ones(1, 10).bool(), 0.8)
    assert sharp.sum() == 1, "q = 0: `H' >= 0` holds everywhere; a peak also needs H' > 0"
    faint = impl.peak_mask(t([[0.0] * 9 + [1e-9]]), torch.ones(1, 10).bool(), 0.8)
    assert faint.sum() == 1, "a peak needs H' > 0, however small: no threshold"
    fainter = impl.peak_mask(t([[0.0] * 9 + [1e-30]]), torch.ones(1, 10).bool(), 0.8)
    assert fainter.sum() == 1, "a peak needs H' > 0, however small: 1e-30 is above 0"
    two = impl.peak_mask(t([[1.0, 2.0, 4.0, 3.0]]), torch.ones(1, 4).bool(), 0.7)
    assert two.int().tolist() == [[0, 0, 1, 0]], (
        "q is interpolated linearly between two values"
    )
    off = impl.peak_mask(t([[0.0, 2.0, 9.0]]), torch.tensor([[1, 1, 0]]).bool(), 0.0)
    assert off.int().tolist() == [[1, 1, 0]], (
        "quantile 0: every token of the response is a peak"
    )


@pytest.mark.ex6
def test_ex6_aggregation(impl):
    H = t([[1, 3, 5, 0], [2, 0, 0, 0], [0, 0, 0, 0], [9, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    peak = (H >= 2) & mask
    mistakes = {"divide by the number of peaks, not by the length": 8 / 3}
    one = impl.aggregate_entropy(H[:1], peak[:1], mask[:1])
    same(one, 4.0, "H_i: the mean over the peaks", mistakes=mistakes)
    two = impl.aggregate_entropy(H[:2], peak[:2], mask[:2])
    same(two, 3.0, "mean over responses of each one's mean: long responses don't weigh more")
    silent, idea = (
        impl.aggregate_entropy(H[:3], peak[:3], mask[:3]),
        "a response without a peak",
    )
    same(silent, 2.0, f"{idea} counts 0, and it counts", mistakes={f"{idea}: 0 / 0": math.nan})
    same(impl.aggregate_entropy(H, peak, mask), 2.0, "a response without a token is left out")
    same(impl.aggregate_entropy(H[3:], peak[3:], mask[3:]), 0.0, "no response at all: 0")
    same(impl.aggregate_entropy(H, H >= 2, mask), 2.0, "no peak in padding: AND with the mask")
    H = torch.where(mask, H, math.nan).requires_grad_()
    got = impl.aggregate_entropy(H, peak, mask)
    flows = getattr(got, "requires_grad", False)
    assert flows, "H_agg has no gradient: was the entropy detached, or made a number?"
    (slope,) = torch.autograd.grad(got, H)
    idea = "NaN in padding reaches H_agg: select before computing, since NaN * 0 is NaN"
    same(got, 2.0, idea)
    expected = t([[0, 1 / 6, 1 / 6, 0], [1 / 3, 0, 0, 0], [0] * 4, [0] * 4])
    mistakes = {idea: torch.where(mask, expected, math.nan)}
    same(
        slope,
        expected,
        "its gradient: 1 / (peaks * responses) at the peaks",
        mistakes=mistakes,
    )


@pytest.mark.ex7
def test_ex7_value(impl):
    b, knobs = make(WITH_EMPTY, seed=5), KNOBS | {"max_tokens": 9}
    loss, _, stats = value_and_grad(impl, b, max_tokens=9)
    expected, due = oracle_siren(b, ANCHOR, **knobs)
    mask, H = b.mask.numpy(), oracle_stats(b.logits, b.tokens, 0.8)["nucleus_entropy"]
    full = oracle_siren(b, ANCHOR, **knobs | {"top_p": 1.0})[1]
    mistakes = {
        "H_agg: entropies of the nucleus, not of the whole vocabulary": full["h_agg"],
        "H_agg: at the peaks only, not at every token": oracle_aggregate(H, mask, mask),
        "H_agg: at the peaks only": H[mask].mean(),
    }
    idea = "H_agg: aggregate_entropy of nucleus_entropy at the peaks of peak_mask"
    same(stat(stats, "h_agg"), due["h_agg"], idea, 1e-6, mistakes)
    gap = due["h_agg"] - ANCHOR
    peak, beta = oracle_peaks(H, mask, 0.8), KNOBS["beta"]
    h_i = [oracle_aggregate(H[[i]], peak[[i]], mask[[i]]) for i in range(8) if mask[i].any()]
    per_response = beta * np.mean((np.array(h_i) - ANCHOR) ** 2)
    mistakes = {
        "the penalty is weighted by beta": gap**2,
        "the penalty is squared": beta * abs(gap),
        "the penalty is (H_agg - anchor)^2, not a bonus": -beta * due["h_agg"],
        "square H_agg - anchor once, not per response": per_response,
        "square H_agg - anchor once, not per token": beta * np.mean((H[peak] - ANCHOR) ** 2),
        "the gap is H_agg - anchor, and not 0": 0.0,
    }
    idea = "the penalty is beta * (H_agg - anchor)^2"
    penalty = stat(stats, "regularizer_loss")
    same(penalty, due["regularizer_loss"], idea, 1e-6, mistakes)
    earlier = oracle_stats(b.logits.roll(1, 1), b.tokens, 0.8)["logp"]
    shifted = oracle_policy(earlier, b.old_logp, b.adv, b.mask, max_tokens=9)[0]
    mistakes = {"logits[:, t] predicts tokens[:, t]: do not shift": shifted}
    same(stat(stats, "policy_loss"), due["policy_loss"], "the policy loss", 1e-6, mistakes)
    same(loss, expected, "the loss is the sum of both terms")
    assert entropy_moved_by_a_step(impl, 2.2), (
        "the penalty has no gradient where H_agg is 1.2 below the anchor: was H_agg detached,"
        " or the gap cut off?"
    )
    for name, value in (("top_p", 0.5), ("peak_quantile", 0.3)):
        got = stat(value_and_grad(impl, b, **{name: value})[2], "h_agg")
        other = oracle_siren(b, ANCHOR, **KNOBS | {name: value})[1]["h_agg"]
        same(got, other, f"{name} is an argument: {name} = {value} must change H_agg", 1e-6)


# ---------------------------------------------------------------------- 8. exact micro-batches


def accumulate(impl, b, size, exact=True, **knobs):
    """Sums of loss, gradient and stats over micro-batches of `size` rows, by their shares."""
    H = impl.nucleus_entropy(b.logits, KNOBS["top_p"])
    peak = impl.peak_mask(H, b.mask, KNOBS["peak_quantile"])
    h_agg, parts = impl.aggregate_entropy(H, peak, b.mask), []
    for start in range(0, len(b.adv), size):
        some = slice(start, start + size)
        micro, anchor = rows(b, some), ANCHOR
        if exact:
            h_micro = impl.aggregate_entropy(H[some], peak[some], micro.mask)
            anchor = impl.micro_batch_anchor(h_micro, h_agg, ANCHOR)
        loss, grad, stats = value_and_grad(impl, micro, anchor, **knobs)
        shares = micro.mask.any(1).sum() / b.mask.any(1).sum(), micro.mask.sum() / b.mask.sum()
        stats = {k: x * shares[k in OVER_TOKENS] for k, x in stats.items()}
        parts.append((loss * shares[0], grad * shares[0], stats))
    stats = {name: sum(part[2][name] for part in parts) for name in parts[0][2]}
    return sum(part[0] for part in parts), torch.cat([part[1] for part in parts]), stats


@pytest.mark.ex8
def test_ex8_gap_and_parts(impl):
    gaps = [(1.5, 0.7, 0.9), (1.6, 1.2, 0.5)]  # below the anchor, and above it
    got = [float(impl.micro_batch_anchor(t(h), t(h_agg), h_star)) for h, h_agg, h_star in gaps]
    mistakes = {
        "the gap of each micro-batch must be H_agg - H*, that of ALL rows": [0.9, 0.5],
        "mind the sign: h_micro minus the new anchor is the gap": [1.3, 2.3],
        "mind the sign of the gap: it may be below 0, and above": [1.3, 0.9],
        "the gap counts above the anchor as below": [1.7, 1.6],
        "the gap counts below the anchor as above": [1.5, 0.9],
        "that is the gap; the anchor is what h_micro minus the gap gives": [-0.2, 0.7],
        "h_micro is that of the micro-batch, not of all rows": [0.1, 0.1],
        "take the gap itself, not its square": [1.46, 1.11],
    }
    idea = "h_micro - (the new anchor) = H_agg - H*"
    same(got, [1.7, 0.9], idea, mistakes=mistakes)
    b = make(WITH_EMPTY, seed=14)  # with size 1, one micro-batch has no token at all
    loss, grad, stats = value_and_grad(impl, b)
    for size in (4, 3, 2, 1):
        loss_sum, grad_sum, stats_sum = accumulate(impl, b, size)
        at = f"micro-batches of {size}"
        assert torch.isfinite(grad_sum).all(), f"{at}: one without tokens gives 0 / 0"
        for name in ("policy_loss", "h_agg", "regularizer_loss"):
            same(stats_sum[name], stats[name], f"{at}: shares of {name} add up", 1e-6)
        idea = f"{at}: the gradient is 2 beta (H_agg of ALL rows - H*) times the part's"
        same(grad_sum, grad, idea, 1e-6)
        same(loss_sum, loss, f"{at}: the losses of the parts add up", 1e-6)


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("knobs", [ex(8, {}), {"algorithm": "grpo"}])
def test_micro_batches_add_up(impl, size, knobs):
    for dtype, tol in ((F64, 1e-7), (torch.float32, 1e-6)):  # a share, 3 / 7, is float32
        b = make(
            WITH_EMPTY, seed=14, dtype=dtype
        )  # size 1: one micro-batch has no token at all
        loss, grad, stats = value_and_grad(impl, b, **knobs)
        loss_sum, grad_sum, stats_sum = accumulate(impl, b, size, **knobs)
        same(loss_sum, loss, "the micro-batches' losses, by their shares, add up", tol)
        same(grad_sum, grad, "the penalty's gradient depends on the micro-batch size", tol)
        same_stats(stats_sum, stats, "shares add up")
        if dtype is F64:
            expected, _ = oracle_siren(b, ANCHOR, **KNOBS, **knobs)
            same(loss_sum, expected, "shares add up to the definition", tol)


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("knobs", [k for k in LOSSES if k["regularizer"] != "anchor"])
def test_linear_losses_add_up_by_themselves(impl, size, knobs):
    b = make(WITH_EMPTY, seed=14)
    loss, grad, stats = value_and_grad(impl, b, **knobs)
    loss_sum, grad_sum, stats_sum = accumulate(impl, b, size, exact=False, **knobs)
    same(loss_sum, loss, "loss", 1e-7)
    same(grad_sum, grad, "gradient", 1e-7)
    same_stats(stats_sum, stats, "shares add up")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_square_per_micro_batch_adds_the_variance(impl, size):
    """Mean of squares = square of the mean + variance: what the official code optimises."""
    b = make(seed=15)
    exact, _, _ = accumulate(impl, b, size)
    per_micro, _, _ = accumulate(impl, b, size, exact=False)
    h = []
    for start in range(0, 8, size):
        micro = rows(b, slice(start, start + size))
        h.append(oracle_siren(micro, ANCHOR, **KNOBS)[1]["h_agg"])
    same(np.mean(h), oracle_siren(b, ANCHOR, **KNOBS)[1]["h_agg"], "H_agg is linear")
    excess = KNOBS["beta"] * np.var(h)
    same(
        per_micro - exact,
        excess,
        "penalty excess = beta * variance of the micro-batches' H_agg",
    )
    assert size == 8 or excess > 1e-4, "this batch could not have told the two apart"


@pytest.mark.ex8
def test_ex8_gaps_of_micro_batches_are_the_minibatchs(impl):
    h, h_agg = t([0.2, 1.5, 0.0]), t(0.7)
    gaps = h - t([float(impl.micro_batch_anchor(x, h_agg, 0.9)) for x in h])
    same(gaps, [-0.2] * 3, "the gap of each micro-batch is that of the mini-batch, H_agg - H*")
    same(
        impl.micro_batch_anchor(h_agg, h_agg, 0.9),
        0.9,
        "one micro-batch alone: its anchor is H*",
    )


# ------------------------------------------------------------------------ 9. pass@k, 10. maj@k


@pytest.mark.ex9
def test_ex9_pass_at_k(impl):
    mistakes = {  # no two of these values are equal
        "nearly right: use products or integers, for logarithms are rounded": 1 - 35 / 84,
        "biased: 1 - (1 - c/n)^k draws with replacement; count the subsets": 1 - (7 / 9) ** 3,
        "c/n is avg@k": 2 / 9,
        "k c / n counts a subset with two right ones twice": 6 / 9,
        "that is the chance that all are wrong": 35 / 84,
        "the k samples are some of the n, not all; or did // round the quotient?": 1.0,
        "at least one is right, not exactly one": 42 / 84,
        "at least one is right, not all k": 0.0,
    }
    due = 1 - 35 / 84
    same(float(impl.pass_at_k(9, 2, 3)), due, "1 - C(n - c, k) / C(n, k)", mistakes=mistakes)


MAJORITIES = [  # answers, correct, k, maj@k, why
    (["1", "2", "2"], "2", 3, 1, "the most frequent answer wins"),
    (["2", "1", "1"], "2", 3, 0, "one correct answer is not a majority"),
    (
        ["2", "1", "1", "3", "4"],
        "1",
        5,
        1,
        "the most frequent answer wins, also with two of five",
    ),
    (["2", "1", "1", "2"], "2", 4, 1, "tie: the answer given first"),
    (["2", "2", "1", "1"], "2", 4, 1, "tie: the answer given first, not the last"),
    (
        ["1", "2", "2", "1"],
        "2",
        4,
        0,
        "tie: the answer given first, not the last or the correct",
    ),
    (["3", "1", "2", "2", "1"], "1", 5, 1, "tie of the leaders: the one of them given first"),
    (["3", "1", "2", "2", "1"], "3", 5, 0, "first given, but not among the leaders"),
    ([None, None, None, "2"], "2", 4, 1, "None is not a vote"),
    ([None, "1", None, "2"], "1", 4, 1, "None is not a vote, not even in a tie"),
    ([None, None], "2", 2, 0, "nobody voted"),
    (["2", "1", None, None], "2", 2, 0.5, "blocks of k: [2, 1] is right, [None, None] is not"),
    (["2", "2", "1", "1", "1", "1"], "2", 2, 1 / 3, "mean over the blocks"),
    (["2", "1", "2"], "2", 1, 2 / 3, "k = 1 is the mean accuracy"),
    (["2", "2", "1"], "2", 2, 1, "votes beyond the last whole block are not used"),
    (["", "", "2"], "2", 3, 0, "an empty text is a vote: None alone is none"),
    (["2", "0.5", "1/2"], "2", 3, 1, "votes are compared as they are given, not by value"),
]


@pytest.mark.ex10
@pytest.mark.parametrize("given_answers, correct, k, expected, why", MAJORITIES)
def test_ex10_maj_at_k(impl, given_answers, correct, k, expected, why):
    got = impl.maj_at_k(list(given_answers), correct, k)
    same(float(got), expected, why)
