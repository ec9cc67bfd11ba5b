"""More wrong solutions, and right ones, each a function as a student writes it.

They were written without a look at the graders, as most of mistakes.py were, and are part of
its lists.
"""

import collections
import functools
import math
import re
from fractions import Fraction

import numpy as np
import torch

import siren
from exercises import solutions
from exercises.solutions import nucleus_mask


# ------------------------------------------------------------------------------- 1. advantages
def baseline_of_the_group_before(rewards, group_size):
    groups = rewards.view(-1, group_size)
    means = groups.mean(1)
    before = torch.cat([means[:1], means[:-1]])
    return (groups - before[:, None]).reshape(-1)


def overlapping_groups(rewards, group_size):
    """Each reward minus the mean of the group_size rewards that begin with it."""
    tail = rewards[-1:].expand(group_size - 1)
    windows = torch.cat([rewards, tail]).unfold(0, group_size, 1)
    return rewards - windows.mean(1)


def no_signal_in_a_group_that_is_nearly_equal(rewards, group_size):
    groups = rewards.view(-1, group_size)
    spread = groups.max(1, keepdim=True).values - groups.min(1, keepdim=True).values
    centred = groups - groups.mean(1, keepdim=True)
    return torch.where(spread < 0.1, 0.0, centred).reshape(-1)


def scaled_to_the_span(rewards, group_size):
    groups = rewards.view(-1, group_size)
    spread = groups.max(1, keepdim=True).values - groups.min(1, keepdim=True).values
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / spread.clamp(min=1e-6)).reshape(-1)


# ----------------------------------------------------------------------------- 2. clipped loss
def own_ratio(logp, old_logp, mask):
    new = torch.where(mask, logp, 0.0)
    old = torch.where(mask, old_logp, 0.0)
    return (new - old).exp()


def own_loss(gain, mask, max_tokens):
    budget = mask.shape[1] if max_tokens is None else max_tokens
    rows = mask.any(1).sum().clamp(min=1)
    return -torch.where(mask, gain, 0.0).sum() / budget / rows


def clipped_term_without_gradient(
    logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None
):
    ratio = own_ratio(logp, old_logp, mask)
    free = ratio * adv[:, None]
    held = ratio.detach().clamp(1 - clip_low, 1 + clip_high) * adv[:, None]
    hit = (held < free) & mask
    share = hit.sum() / mask.sum().clamp(min=1)
    return own_loss(torch.min(free, held), mask, max_tokens), {"clip_fraction": share}


def ratio_clipped_in_log_space(
    logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None
):
    """The bounds are put on the log-ratio."""
    new = torch.where(mask, logp, 0.0)
    old = torch.where(mask, old_logp, 0.0)
    log_ratio = new - old
    free = log_ratio.exp() * adv[:, None]
    held = log_ratio.clamp(-clip_low, clip_high).exp() * adv[:, None]
    hit = (held < free) & mask
    share = hit.sum() / mask.sum().clamp(min=1)
    return own_loss(torch.min(free, held), mask, max_tokens), {"clip_fraction": share}


def one_plus_the_log_ratio(
    logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None
):
    """1 + log-ratio in place of the ratio."""
    new = torch.where(mask, logp, 0.0)
    old = torch.where(mask, old_logp, 0.0)
    ratio = 1 + new - old
    free = ratio * adv[:, None]
    held = ratio.clamp(1 - clip_low, 1 + clip_high) * adv[:, None]
    hit = (held < free) & mask
    share = hit.sum() / mask.sum().clamp(min=1)
    return own_loss(torch.min(free, held), mask, max_tokens), {"clip_fraction": share}


def fraction_a_mean_of_responses(
    logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None
):
    ratio = own_ratio(logp, old_logp, mask)
    free = ratio * adv[:, None]
    held = ratio.clamp(1 - clip_low, 1 + clip_high) * adv[:, None]
    hit = (held < free) & mask
    share = (hit.sum(1) / mask.sum(1).clamp(min=1)).sum() / mask.any(1).sum().clamp(min=1)
    return own_loss(torch.min(free, held), mask, max_tokens), {"clip_fraction": share}


def nan_to_num_only(
    logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None
):
    """NaN on padding becomes 0, but inf stays huge, and 0 * inf is NaN in the gradient."""
    ratio = (logp.nan_to_num(0.0) - old_logp.nan_to_num(0.0)).exp()
    free = ratio * adv[:, None]
    held = ratio.clamp(1 - clip_low, 1 + clip_high) * adv[:, None]
    hit = (held < free) & mask
    share = hit.sum() / mask.sum().clamp(min=1)
    return own_loss(torch.min(free, held), mask, max_tokens), {"clip_fraction": share}


def longest_response_as_the_budget(
    logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None
):
    if max_tokens is None:
        max_tokens = int(mask.sum(1).max().clamp(min=1))
    return solutions.policy_loss(
        logp,
        old_logp,
        adv,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        max_tokens=max_tokens,
    )


def responses_with_an_advantage_only(
    logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None
):
    """R counts the responses with A != 0 only."""
    loss, stats = solutions.policy_loss(
        logp,
        old_logp,
        adv,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        max_tokens=max_tokens,
    )
    rows = mask.any(1).sum().clamp(min=1)
    useful = (mask.any(1) & (adv != 0)).sum().clamp(min=1)
    return loss * rows / useful, stats


def far_tokens_left_out(
    logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None
):
    """Tokens beyond the clip are dropped, on both sides and for both signs."""
    ratio = own_ratio(logp, old_logp, mask)
    near = (ratio >= 1 - clip_low) & (ratio <= 1 + clip_high)
    gain = torch.where(near, ratio * adv[:, None], 0.0)
    free = ratio * adv[:, None]
    held = ratio.clamp(1 - clip_low, 1 + clip_high) * adv[:, None]
    hit = (held < free) & mask
    share = hit.sum() / mask.sum().clamp(min=1)
    return own_loss(gain, mask, max_tokens), {"clip_fraction": share}


# --------------------------------------------------------------------------------- 3. nucleus
def unsorted_by_gather(logits, top_p):
    """The mask is read at the sorted indices, in place of being written there."""
    if top_p == 1:
        return torch.ones_like(logits, dtype=torch.bool)
    pi, order = logits.softmax(-1).sort(-1, descending=True)
    inside = pi.cumsum(-1) - pi < top_p
    return inside.gather(-1, order)


def the_shares_of_unsorted_tokens(logits, top_p):
    """Sorted indices, but the sum runs over the tokens as they stand."""
    if top_p == 1:
        return torch.ones_like(logits, dtype=torch.bool)
    pi = logits.softmax(-1)
    order = logits.argsort(-1, descending=True)
    inside = pi.cumsum(-1) - pi < top_p
    return torch.zeros_like(inside).scatter(-1, order, inside)


def count_of_the_first_row(logits, top_p):
    """All rows keep as many tokens as the first one needs."""
    if top_p == 1:
        return torch.ones_like(logits, dtype=torch.bool)
    flat = logits.reshape(-1, logits.shape[-1])
    pi, order = flat.softmax(-1).sort(-1, descending=True)
    count = int((pi.cumsum(-1) - pi < top_p)[0].sum())
    inside = torch.zeros_like(flat, dtype=torch.bool)
    inside.scatter_(-1, order[:, :count], True)
    return inside.reshape(logits.shape)


def two_tokens_at_least(logits, top_p):
    pi, order = logits.softmax(-1).sort(-1, descending=True)
    inside = (pi.cumsum(-1) - pi < top_p) | (top_p == 1)
    inside[..., :2] = True
    return torch.zeros_like(inside).scatter(-1, order, inside)


def nearly_one_is_all(logits, top_p):
    if top_p >= 0.9:
        return torch.ones_like(logits, dtype=torch.bool)
    return nucleus_mask(logits, top_p)


def share_of_the_largest(logits, top_p):
    """min-p: tokens with at least 1 - p of the largest probability."""
    pi = logits.softmax(-1)
    return pi >= (1 - top_p) * pi.max(-1, keepdim=True).values


# ------------------------------------------------------------------------- 4. nucleus entropy
def share_of_the_largest_entropy(logits, top_p):
    """Divided by the log of the number of tokens in the nucleus."""
    count = nucleus_mask(logits, top_p).sum(-1)
    return solutions.nucleus_entropy(logits, top_p) / count.clamp(min=2).log()


def surprise_of_pi_on_average_of_q(logits, top_p):
    """Cross entropy: weights q, logarithms of pi."""
    inside = nucleus_mask(logits, top_p)
    q = logits.masked_fill(~inside, -torch.inf).softmax(-1)
    return -(q * logits.log_softmax(-1)).sum(-1)


def weights_without_gradient(logits, top_p):
    inside = nucleus_mask(logits, top_p)
    log_q = logits.masked_fill(~inside, -torch.inf).log_softmax(-1)
    return -(log_q.exp().detach() * log_q.masked_fill(~inside, 0.0)).sum(-1)


def logarithm_without_gradient(logits, top_p):
    """Right: sum of q' log q is all of the gradient, since the sum of q' is 0."""
    inside = nucleus_mask(logits, top_p)
    log_q = logits.masked_fill(~inside, -torch.inf).log_softmax(-1)
    return (
        -(log_q.exp() * log_q.masked_fill(~inside, 0.0).detach()).sum(-1) + 0 * logits[..., 0]
    )


def mean_over_the_nucleus(logits, top_p):
    inside = nucleus_mask(logits, top_p)
    return solutions.nucleus_entropy(logits, top_p) / inside.sum(-1)


def rounding_left_in_one_token(logits, top_p):
    """log pi(V_p) - sum pi log pi / pi(V_p): not exactly 0 with one token."""
    inside = nucleus_mask(logits, top_p)
    log_pi = logits.log_softmax(-1)
    pi = log_pi.exp() * inside
    total = pi.sum(-1)
    return total.log() - (pi * log_pi).sum(-1) / total


# -------------------------------------------------------------------------------- 5. peak mask
def by_row(row_rule):
    """peak_mask from a rule for (H' of the response, quantile) -> threshold."""

    def peak_mask(entropy, mask, quantile):
        if quantile == 0:
            return mask.clone()
        peak = torch.zeros_like(mask)
        for i in range(len(mask)):
            own = entropy[i][mask[i]].detach()
            if len(own) > 0:
                theta = row_rule(own, quantile)
                peak[i] = (entropy[i] >= theta) & (entropy[i] > 0) & mask[i]
        return peak

    return peak_mask


def quantile_of_the_positive_ones(own, quantile):
    positive = own[own > 0]
    return positive.quantile(quantile) if len(positive) else math.inf


def share_of_the_maximum(own, quantile):
    return own.max() * quantile


def rank_n_times_q(own, quantile):
    return own.sort().values[min(len(own) - 1, int(len(own) * quantile))]


def interpolated_from_n(own, quantile):
    """numpy's "weibull": position q (n + 1) - 1."""
    ordered = own.sort().values
    place = min(max(quantile * (len(own) + 1) - 1, 0), len(own) - 1)
    low = int(place)
    high = min(low + 1, len(own) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def a_peak_for_everybody(entropy, mask, quantile):
    """A response without a peak gets its first position of the largest H'."""
    peak = solutions.peak_mask(entropy, mask, quantile).clone()
    for i in range(len(mask)):
        if mask[i].any() and not peak[i].any():
            peak[i, entropy[i].masked_fill(~mask[i], -math.inf).argmax()] = True
    return peak


def short_responses_left_out(entropy, mask, quantile):
    """A quantile of one number makes no sense, does it?"""
    peak = solutions.peak_mask(entropy, mask, quantile)
    return peak & (mask.sum(1, keepdim=True) > 1)


# ------------------------------------------------------------------------------ 6. aggregation
def mean_of_responses_by_length(entropy, peak, mask):
    peak = peak & mask
    h_i = torch.where(peak, entropy, 0.0).sum(1) / peak.sum(1).clamp(min=1)
    length = mask.sum(1)
    return (h_i * length).sum() / length.sum().clamp(min=1)


def largest_peak_of_each(entropy, peak, mask):
    chosen = torch.where(peak & mask, entropy, 0.0)
    return chosen.max(1).values.sum() / mask.any(1).sum().clamp(min=1)


def median_of_the_responses(entropy, peak, mask):
    peak = peak & mask
    h_i = torch.where(peak, entropy, 0.0).sum(1) / peak.sum(1).clamp(min=1)
    return h_i[mask.any(1)].median() if mask.any() else (h_i * 0).sum()


def empty_batch_times_0(entropy, peak, mask):
    if not mask.any():
        return (entropy * 0).sum()
    return solutions.aggregate_entropy(entropy, peak, mask)


def mean_of_h_times_peak_share(entropy, peak, mask):
    """sum over peaks / tokens of the response."""
    chosen = torch.where(peak & mask, entropy, 0.0)
    h_i = chosen.sum(1) / mask.sum(1).clamp(min=1)
    return h_i.sum() / mask.any(1).sum().clamp(min=1)


# --------------------------------------------------------------------------- 7. anchored loss
def own_parts(logits, tokens, old_logp, adv, mask, top_p, peak_quantile, max_tokens):
    logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    policy, _ = solutions.policy_loss(logp, old_logp, adv, mask, max_tokens=max_tokens)
    entropy = solutions.nucleus_entropy(logits, top_p)
    return policy, entropy, solutions.peak_mask(entropy, mask, peak_quantile)


def squares_of_each_response(
    logits,
    tokens,
    old_logp,
    adv,
    mask,
    anchor,
    *,
    beta,
    top_p=0.8,
    peak_quantile=0.8,
    max_tokens=None,
):
    policy, entropy, peak = own_parts(
        logits, tokens, old_logp, adv, mask, top_p, peak_quantile, max_tokens
    )
    h_i = (entropy * peak).sum(1) / peak.sum(1).clamp(min=1)
    rows = mask.any(1)
    penalty = beta * (((h_i - anchor) ** 2) * rows).sum() / rows.sum().clamp(min=1)
    h_agg = (h_i * rows).sum() / rows.sum().clamp(min=1)
    stats = {"policy_loss": policy, "regularizer_loss": penalty, "h_agg": h_agg}
    return policy + penalty, stats


def entropy_of_all_tokens_at_the_peaks(
    logits,
    tokens,
    old_logp,
    adv,
    mask,
    anchor,
    *,
    beta,
    top_p=0.8,
    peak_quantile=0.8,
    max_tokens=None,
):
    """Peaks by H', but the mean is over the entropy of the whole vocabulary."""
    policy, _, peak = own_parts(
        logits, tokens, old_logp, adv, mask, top_p, peak_quantile, max_tokens
    )
    whole = solutions.nucleus_entropy(logits, 1)
    h_agg = solutions.aggregate_entropy(whole, peak, mask)
    penalty = beta * (h_agg - anchor) ** 2
    stats = {"policy_loss": policy, "regularizer_loss": penalty, "h_agg": h_agg}
    return policy + penalty, stats


def tokens_one_later(
    logits,
    tokens,
    old_logp,
    adv,
    mask,
    anchor,
    *,
    beta,
    top_p=0.8,
    peak_quantile=0.8,
    max_tokens=None,
):
    """logits[:, t - 1] predicts tokens[:, t], as in a language model's own loss."""
    earlier = torch.cat([logits[:, :1], logits[:, :-1]], 1)
    return solutions.siren_loss(
        earlier,
        tokens,
        old_logp,
        adv,
        mask,
        anchor,
        beta=beta,
        top_p=top_p,
        peak_quantile=peak_quantile,
        max_tokens=max_tokens,
    )


def budget_is_forgotten(
    logits,
    tokens,
    old_logp,
    adv,
    mask,
    anchor,
    *,
    beta,
    top_p=0.8,
    peak_quantile=0.8,
    max_tokens=None,
):
    return solutions.siren_loss(
        logits,
        tokens,
        old_logp,
        adv,
        mask,
        anchor,
        beta=beta,
        top_p=top_p,
        peak_quantile=peak_quantile,
    )


def the_two_fractions_exchanged(
    logits,
    tokens,
    old_logp,
    adv,
    mask,
    anchor,
    *,
    beta,
    top_p=0.8,
    peak_quantile=0.8,
    max_tokens=None,
):
    return solutions.siren_loss(
        logits,
        tokens,
        old_logp,
        adv,
        mask,
        anchor,
        beta=beta,
        top_p=peak_quantile,
        peak_quantile=top_p,
        max_tokens=max_tokens,
    )


def penalty_of_a_share_of_the_anchor(
    logits,
    tokens,
    old_logp,
    adv,
    mask,
    anchor,
    *,
    beta,
    top_p=0.8,
    peak_quantile=0.8,
    max_tokens=None,
):
    policy, entropy, peak = own_parts(
        logits, tokens, old_logp, adv, mask, top_p, peak_quantile, max_tokens
    )
    h_agg = solutions.aggregate_entropy(entropy, peak, mask)
    penalty = beta * (h_agg / max(anchor, 1e-6) - 1) ** 2
    stats = {"policy_loss": policy, "regularizer_loss": penalty, "h_agg": h_agg}
    return policy + penalty, stats


# --------------------------------------------------------------------- 8. exact micro-batches
def an_anchor_is_never_negative(h_micro, h_agg, anchor):
    return max(h_micro - (h_agg - anchor), 0 * h_micro)


def half_the_gap(h_micro, h_agg, anchor):
    return h_micro - (h_agg - anchor) / 2


def anchor_if_nothing_is_there(h_micro, h_agg, anchor):
    """A micro-batch without entropy keeps the anchor."""
    return h_micro - (h_agg - anchor) if h_micro > 0 else anchor


# ---------------------------------------------------------------------------------- 9. pass@k
def product_with_the_wrong_range(n, c, k):
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c, n))


def all_samples_are_enough(n, c, k):
    if k == n:
        return 1.0
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def floats_too_early(n, c, k):
    return 1 - float(math.comb(n - c, k)) / float(math.comb(n, k))


def replacement_for_large_n(n, c, k):
    if n > 1000:
        return 1 - (1 - c / n) ** k
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# ---------------------------------------------------------------------------------- 10. maj@k
def counts_go_on(votes, answer, k):
    """One counter for all blocks."""
    counts = collections.Counter()
    won = 0
    blocks = len(votes) // k
    for b in range(blocks):
        counts.update(vote for vote in votes[b * k : b * k + k] if vote is not None)
        won += bool(counts) and counts.most_common(1)[0][0] == answer
    return won / blocks


def answer_among_the_best(votes, answer, k):
    won = 0
    blocks = len(votes) // k
    for b in range(blocks):
        counts = collections.Counter(v for v in votes[b * k : b * k + k] if v is not None)
        won += answer in counts and counts[answer] == max(counts.values())
    return won / blocks


def none_takes_no_place(votes, answer, k):
    """None is dropped first, then the rest is cut into blocks."""
    given = [vote for vote in votes if vote is not None]
    blocks = [given[i : i + k] for i in range(0, len(given) - k + 1, k)]
    won = sum(collections.Counter(b).most_common(1)[0][0] == answer for b in blocks)
    return won / max(1, len(blocks))


def votes_in_place_of_blocks(votes, answer, k):
    used = votes[: len(votes) // k * k]
    return sum(vote == answer for vote in used) / len(used)


# -------------------------------------------------------------------------------- 11. sampler
def own_sampler(
    first=None,
    position=None,
    log_pi_of=lambda logits, temperature: (logits / temperature).log_softmax(-1),
    score=lambda log_pi, token, logits: log_pi.gather(1, token)[:, 0],
    after_end=lambda token, pad_id: torch.full_like(token, pad_id),
    last=None,
):
    """A sampler with one of its steps replaced."""

    @torch.no_grad()
    def sample(
        model,
        prompts,
        *,
        max_tokens,
        eos_ids,
        pad_id,
        samples=1,
        temperature=1.0,
        generator=None,
    ):
        rows = [prompt for prompt in prompts for _ in range(samples)]
        width = max(len(row) for row in rows)
        prompt = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        prompt_mask = torch.arange(width) >= width - lengths[:, None]
        seen = prompt_mask.long()
        fed = prompt
        cache = None
        goes_on = torch.ones(len(rows), dtype=torch.bool)
        columns = []
        for t in range(max_tokens):
            places = (seen.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
            if position and t > 0:
                places = position(places, width, t)
            out = model(
                input_ids=fed,
                attention_mask=seen,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            log_pi = log_pi_of(out.logits[:, -1], temperature)
            if first and t == 0:
                token = first(log_pi.exp(), samples, generator)
            else:
                token = torch.multinomial(log_pi.exp(), 1, generator=generator)
            if last and t == max_tokens - 1:
                token = last(token, eos_ids)
            logp = score(log_pi, token, out.logits[:, -1])
            shown = torch.where(goes_on[:, None], token, after_end(token, pad_id))
            columns.append((shown[:, 0], goes_on, logp * goes_on))
            goes_on = goes_on & ~torch.isin(token[:, 0], torch.tensor(eos_ids))
            if not goes_on.any():
                break
            fed = shown
            seen = torch.cat([seen, torch.ones_like(token)], 1)
        tokens, mask, logp = (torch.stack(column, 1) for column in zip(*columns))
        return siren.Rollout(prompt, prompt_mask, tokens, mask, logp)

    return sample


def first_tokens_all_different(pi, samples, generator):
    """One call for all samples of a prompt, without replacement."""
    one = pi[::samples]
    if samples > one.shape[1]:
        return torch.multinomial(pi, 1, generator=generator)
    return torch.multinomial(one, samples, generator=generator).reshape(-1, 1)


def columns_as_positions(places, width, t):
    return torch.full_like(places, width + t - 1)


def one_position_behind(places, width, t):
    return places - 1


def temperature_on_probabilities(logits, temperature):
    """softmax(logits) / T, not normalised again."""
    return (logits.softmax(-1) / temperature).log()


def surprise_with_epsilon(log_pi, token, logits):
    return (log_pi.exp().gather(1, token)[:, 0] + 1e-6).log()


def forced_end(token, eos_ids):
    return torch.full_like(token, eos_ids[0])


# ------------------------------------------------------------------------ 12. a drop-in of own
def quantile_of_different_rewards(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
    """F counts each value once."""
    groups = rewards.view(-1, group_size)
    out = []
    for group in groups:
        values = group.unique()
        rank = math.ceil(quantile * len(values) - 1e-9)
        out.append(group - values[rank - 1])
    return torch.cat(out)


def share_below(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
    """F(x) is the share of rewards < x."""
    groups = rewards.view(-1, group_size)
    share = (groups[:, None, :] < groups[:, :, None]).double().mean(2)
    fits = share >= quantile - 1e-9
    top = groups.max(1).values[:, None]
    b = torch.where(fits, groups, top).min(1, keepdim=True).values
    return (groups - b).view(-1)


def rank_rounded(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
    groups = rewards.view(-1, group_size)
    rank = max(1, round(quantile * group_size))
    return (groups - groups.kthvalue(rank, 1, keepdim=True).values).view(-1)


def plug_once(quantile="0.4"):
    """A second plug with another quantile changes nothing."""
    if not isinstance(siren.group_advantages, functools.partial):
        siren.group_advantages = functools.partial(
            solutions.quantile_advantages, quantile=float(quantile)
        )


# ------------------------------------------------------------------------- 13. reward hacking
def verifier_by_a_pattern(prompt, response, answer):
    """Boxes are found by a pattern; one that is never closed is overlooked."""
    if not response.rstrip().endswith("<eos>"):
        return False
    found = re.findall(r"\\boxed\{\s*([+-]?[0-9]+(?:\.[0-9]+)?)\s*\}", response)
    return bool(found) and len(found[-1]) < 1000 and Fraction(found[-1]) == Fraction(answer)


def verifier_close_enough(prompt, response, answer):
    """Compares as floats."""
    if response.split()[-1:] != ["<eos>"]:
        return False
    inside, closed, _ = response.rpartition(r"\boxed{")[2].partition("}")
    plain = re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", inside.strip(" "))
    if r"\boxed{" not in response or not closed or not plain:
        return False
    return math.isclose(float(inside), float(answer))


def exploit_from_the_docstring(fault, prompt):
    """The docstring's own numbers, for all prompts."""
    return {
        "anywhere": "19 10 11 12 13",
        "cut_off": "19".rjust(60) + "000",
        "rounds": r"\boxed{3} <eos>",
        "strips_signs": r"\boxed{4} <eos>",
        "evaluates": r"\boxed{8 + 3 + 1 + 5 + 2} <eos>",
        "prompts_box": "I agree. <eos>",
    }[fault]


# ------------------------------------------------------------------------------ 14. statistics
def seeds_as_texts(rows, method, other, score, grade="hard", temperature="0.6"):
    found = {method: {}, other: {}}
    for row in rows:
        if (row["grade"], row["temperature"]) == (grade, temperature):
            found.setdefault(row["method"], {})[row["seed"]] = float(row[score])
    both = sorted(found[method].keys() & found[other].keys())
    return [found[method][seed] - found[other][seed] for seed in both]


def interval_of_the_values(values, draws=10_000, seed=0, confidence=0.95):
    """Quantiles of the resampled values, not of their means."""
    drawn = np.random.default_rng(seed).choice(values, (draws, len(values)))
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def holm_of_the_next(p_values):
    """The largest is multiplied by 2, the smallest by m + 1."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place + 1) * p_values[i]))
        corrected[i] = largest
    return corrected


# -------------------------------------------------------------------------- a second round
def as_many_chunks_as_the_size(rewards, group_size):
    return torch.cat([chunk - chunk.mean() for chunk in rewards.chunk(group_size)])


def mean_in_single_precision(rewards, group_size):
    groups = rewards.view(-1, group_size)
    return (groups - groups.float().mean(1, keepdim=True)).view(-1)


def low_bound_for_both(
    logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None
):
    return solutions.policy_loss(
        logp, old_logp, adv, mask, clip_low=clip_low, clip_high=clip_low, max_tokens=max_tokens
    )


def fraction_of_all_beyond_a_bound(
    logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None
):
    loss, _ = solutions.policy_loss(
        logp,
        old_logp,
        adv,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        max_tokens=max_tokens,
    )
    ratio = own_ratio(logp, old_logp, mask)
    beyond = ((ratio < 1 - clip_low) | (ratio > 1 + clip_high)) & mask
    return loss, {"clip_fraction": beyond.sum() / mask.sum().clamp(min=1)}


def length_of_the_first_row(
    logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None
):
    budget = max(1, int(mask[0].sum())) if max_tokens is None else max_tokens
    return solutions.policy_loss(
        logp, old_logp, adv, mask, clip_low=clip_low, clip_high=clip_high, max_tokens=budget
    )


def always_on_policy(
    logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None
):
    return solutions.policy_loss(
        logp,
        logp.detach(),
        adv,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        max_tokens=max_tokens,
    )


def upper_bound_as_the_inverse_of_the_lower(
    logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None
):
    ratio = own_ratio(logp, old_logp, mask)
    free = ratio * adv[:, None]
    held = ratio.clamp(1 / (1 + clip_high), 1 + clip_high) * adv[:, None]
    share = ((held < free) & mask).sum() / mask.sum().clamp(min=1)
    return own_loss(torch.min(free, held), mask, max_tokens), {"clip_fraction": share}


def nearly_one(logits, top_p):
    if top_p > 0.998:
        return torch.ones_like(logits, dtype=torch.bool)
    return nucleus_mask(logits, top_p)


def reached_is_not_enough(logits, top_p):
    if top_p == 1:
        return torch.ones_like(logits, dtype=torch.bool)
    pi, order = logits.softmax(-1).sort(-1, descending=True)
    inside = pi.cumsum(-1) - pi <= top_p
    return torch.zeros_like(inside).scatter(-1, order, inside)


def size_of_the_largest_nucleus(logits, top_p):
    inside = nucleus_mask(logits, top_p)
    flat = logits.reshape(-1, logits.shape[-1])
    top = flat.topk(int(inside.sum(-1).max()), -1).indices
    out = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, top, True)
    return out.reshape(logits.shape)


def ties_by_threshold(logits, top_p):
    inside = nucleus_mask(logits, top_p)
    least = logits.masked_fill(~inside, math.inf).min(-1, keepdim=True).values
    return logits >= least - 1e-9


def divided_by_p(logits, top_p):
    q = logits.softmax(-1) * nucleus_mask(logits, top_p) / top_p
    return -(q * torch.where(q > 0, q, 1.0).log()).sum(-1)


def softmax_twice(logits, top_p):
    inside = nucleus_mask(logits, top_p)
    log_q = logits.softmax(-1).masked_fill(~inside, -math.inf).log_softmax(-1)
    return -(log_q.exp() * log_q.masked_fill(~inside, 0.0)).sum(-1)


def clamped_at_zero_with_relu(logits, top_p):
    return (solutions.nucleus_entropy(logits, top_p) - 1e-7).relu()


def rest_as_one_more_token(logits, top_p):
    inside = nucleus_mask(logits, top_p)
    pi = logits.softmax(-1)
    kept = torch.where(inside, pi, 0.0)
    rest = (1 - kept.sum(-1)).clamp(min=0)
    safe = torch.where(rest > 1e-12, rest, 1.0)
    return -(kept * torch.where(inside, pi, 1.0).log()).sum(-1) - rest * safe.log()


def ranks_not_values(entropy, mask, quantile):
    if quantile == 0:
        return mask.clone()
    x = entropy.detach().masked_fill(~mask, -math.inf)
    n = mask.sum(1, keepdim=True)
    rank = x.argsort(1).argsort(1) - (mask.shape[1] - n)
    return mask & (entropy > 0) & (rank >= quantile * (n - 1))


def mean_and_deviation(entropy, mask, quantile):
    if quantile == 0:
        return mask.clone()
    peak = torch.zeros_like(mask)
    for i in range(len(mask)):
        own = entropy[i][mask[i]].detach()
        if len(own) > 1:
            theta = own.mean() + own.std() * torch.special.ndtri(torch.tensor(quantile))
            peak[i] = (entropy[i] >= theta) & (entropy[i] > 0) & mask[i]
        elif len(own) == 1:
            peak[i] = (entropy[i] > 0) & mask[i]
    return peak


def threshold_in_single_precision(entropy, mask, quantile):
    return solutions.peak_mask(entropy.detach().float(), mask, quantile)


def small_number_in_the_denominator(entropy, peak, mask):
    peak = peak & mask
    h_i = torch.where(peak, entropy, 0.0).sum(1) / (peak.sum(1) + 1e-6)
    return h_i.sum() / (mask.any(1).sum() + 1e-6)


def count_of_the_row_with_most_peaks(entropy, peak, mask):
    peak = peak & mask
    h_i = torch.where(peak, entropy, 0.0).sum(1) / peak.sum(1).max().clamp(min=1)
    return h_i.sum() / mask.any(1).sum().clamp(min=1)


def last_row_left_out(entropy, peak, mask):
    peak = peak & mask
    total = torch.where(mask, entropy, 0.0).sum() * 0
    for i in range(len(mask) - 1):
        total = total + torch.where(peak[i], entropy[i], 0.0).sum() / max(
            1, int(peak[i].sum())
        )
    return total / mask.any(1).sum().clamp(min=1)


def anchored_by(step):
    def siren_loss(
        logits,
        tokens,
        old_logp,
        adv,
        mask,
        anchor,
        *,
        beta,
        top_p=0.8,
        peak_quantile=0.8,
        max_tokens=None,
    ):
        policy, entropy, peak = own_parts(
            logits, tokens, old_logp, adv, mask, top_p, peak_quantile, max_tokens
        )
        h_agg = solutions.aggregate_entropy(entropy, peak, mask)
        penalty = step(h_agg, anchor, beta)
        stats = {"policy_loss": policy, "regularizer_loss": penalty, "h_agg": h_agg}
        return policy + penalty, stats

    return siren_loss


def first_gap_kept():
    seen = []

    def step(h_agg, anchor, beta):
        seen.append(float(anchor))
        return beta * (h_agg - seen[0]) ** 2

    return step


def other_end_of_the_quantile(
    logits,
    tokens,
    old_logp,
    adv,
    mask,
    anchor,
    *,
    beta,
    top_p=0.8,
    peak_quantile=0.8,
    max_tokens=None,
):
    return solutions.siren_loss(
        logits,
        tokens,
        old_logp,
        adv,
        mask,
        anchor,
        beta=beta,
        top_p=top_p,
        peak_quantile=1 - peak_quantile,
        max_tokens=max_tokens,
    )


def default_of_the_toy(
    logits,
    tokens,
    old_logp,
    adv,
    mask,
    anchor,
    *,
    beta,
    top_p=0.85,
    peak_quantile=0.6,
    max_tokens=None,
):
    return solutions.siren_loss(
        logits,
        tokens,
        old_logp,
        adv,
        mask,
        anchor,
        beta=beta,
        top_p=top_p,
        peak_quantile=peak_quantile,
        max_tokens=max_tokens,
    )


def without_the_micro_batch(h_micro, h_agg, anchor):
    return anchor - (h_agg - anchor)


def whole_division(n, c, k):
    return 1 - math.comb(n - c, k) // math.comb(n, k)


def zero_if_too_few_wrong(n, c, k):
    if n - c < k:
        return 0.0
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def ties_are_lost(votes, answer, k):
    won = 0
    blocks = len(votes) // k
    for b in range(blocks):
        counts = collections.Counter(v for v in votes[b * k : b * k + k] if v is not None)
        top = counts.most_common(2)
        clear = len(top) == 1 or (len(top) == 2 and top[0][1] > top[1][1])
        won += bool(top) and clear and top[0][0] == answer
    return won / blocks


def rest_in_the_denominator(votes, answer, k):
    return solutions.maj_at_k(votes, answer, k) * (len(votes) // k) / (len(votes) / k)


def latest_of_the_best(votes, answer, k):
    won = 0
    blocks = len(votes) // k
    for b in range(blocks):
        block = [v for v in votes[b * k : b * k + k] if v is not None]
        counts = collections.Counter(reversed(block))
        won += bool(counts) and counts.most_common(1)[0][0] == answer
    return won / blocks


def own_generator(model, prompts, **options):
    return solutions.sample(
        model, prompts, **options | {"generator": torch.Generator().manual_seed(0)}
    )


def temperature_squared(logits, temperature):
    return (logits / temperature**2).log_softmax(-1)


def global_seed_of_0(model, prompts, **options):
    torch.manual_seed(0)
    return solutions.sample(model, prompts, **options)


def order_of_the_samples(model, prompts, *, samples=1, **options):
    return solutions.sample(model, list(prompts) * samples, **options)


def rank_between_first_and_last(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
    groups = rewards.view(-1, group_size)
    rank = math.ceil(quantile * (group_size - 1) - 1e-9) + 1
    return (groups - groups.kthvalue(rank, 1, keepdim=True).values).view(-1)


def verifier_of_decimal_characters(prompt, response, answer):
    if response.split()[-1:] != ["<eos>"]:
        return False
    inside, closed, _ = response.rpartition(r"\boxed{")[2].partition("}")
    inside = inside.strip(" ")
    digits = inside.lstrip("+-").replace(".", "", 1)
    if r"\boxed{" not in response or not closed or not digits.isdecimal():
        return False
    if len(inside) > 1000 or inside[-1] == "." or inside.lstrip("+-")[0] == ".":
        return False
    try:
        return Fraction(inside) == Fraction(answer)
    except ValueError:
        return False


def rounded_repeats(std, difference):
    return max(2, round(((1.959964 + 0.841621) * std / difference) ** 2))


def normal_interval(values, draws=10_000, seed=0, confidence=0.95):
    values = np.array(values)
    means = np.random.default_rng(seed).choice(values, (draws, len(values))).mean(1)
    return float(means.mean() - 1.96 * means.std()), float(means.mean() + 1.96 * means.std())


# --------------------------------------------------------------- kinds that once were accepted
def policy_within(log_low=-math.inf, log_high=math.inf, low=0.0, high=math.inf):
    """policy_loss with bounds on the log-ratio, or on the ratio."""

    def policy_loss(
        logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None
    ):
        log_ratio = torch.where(mask, logp, 0.0) - torch.where(mask, old_logp, 0.0)
        ratio = log_ratio.clamp(log_low, log_high).exp().clamp(low, high)
        free = ratio * adv[:, None]
        held = ratio.clamp(1 - clip_low, 1 + clip_high) * adv[:, None]
        share = ((held < free) & mask).sum() / mask.sum().clamp(min=1)
        return own_loss(torch.min(free, held), mask, max_tokens), {"clip_fraction": share}

    return policy_loss


def entropy_of_q(rule):
    """nucleus_entropy by a rule for (probabilities of the nucleus, 0 outside) -> H'."""

    def nucleus_entropy(logits, top_p):
        inside = nucleus_mask(logits, top_p)
        return rule(torch.where(inside, logits.softmax(-1), 0.0))

    return nucleus_entropy


def number_in_the_sum(pi):
    q = pi / (pi.sum(-1, keepdim=True) + 1e-12)
    return -(q * torch.where(q > 0, q, 1.0).log()).sum(-1)


def number_in_the_logarithm(pi):
    q = pi / pi.sum(-1, keepdim=True)
    return -(q * (q + 1e-12).log()).sum(-1)


def least_q_in_the_logarithm(pi):
    q = pi / pi.sum(-1, keepdim=True)
    return -(q * q.clamp(min=1e-9).log()).sum(-1)


def categorical_of_probabilities(pi):
    """The library keeps probabilities below 1 - 2e-16, so that one token has H' = 2e-16."""
    return torch.distributions.Categorical(probs=pi).entropy()


def p_log_p_token_by_token(logits, top_p):
    """With p = 1 a probability inside may be rounded to 0, and 0 * log 0 is NaN."""
    vocab = logits.shape[-1]
    found = []
    for z, inside in zip(
        logits.reshape(-1, vocab), nucleus_mask(logits, top_p).view(-1, vocab)
    ):
        q = z.softmax(-1)[inside]
        q = q / q.sum()
        found.append(-(q * q.log()).sum())
    return torch.stack(found).view(logits.shape[:-1])


def aggregate_or(nothing):
    """aggregate_entropy with a result of its own where there is no token."""

    def aggregate_entropy(entropy, peak, mask):
        if not mask.any():
            return nothing(entropy)
        return solutions.aggregate_entropy(entropy, peak, mask)

    return aggregate_entropy


def open_kinds():
    """Exercise -> description -> functions, as in wrong_ones()."""
    policies = {
        "log-ratio within 15": policy_within(-15, 15),
        "log-ratio at least -18": policy_within(log_low=-18),
        "log-ratio at most 18": policy_within(log_high=18),
        "ratio at most 1e8": policy_within(high=1e8),
        "ratio at least 1e-8": policy_within(low=1e-8),
    }
    entropies = {
        "1e-12 in the sum of pi": entropy_of_q(number_in_the_sum),
        "1e-12 in the logarithm": entropy_of_q(number_in_the_logarithm),
        "q at least 1e-9 in the logarithm": entropy_of_q(least_q_in_the_logarithm),
        "a Categorical of probabilities": entropy_of_q(categorical_of_probabilities),
        "p log p of what is rounded to 0": p_log_p_token_by_token,
    }
    aggregates = {
        "a float32 constant without tokens": aggregate_or(lambda h: torch.tensor(0.0)),
        "a constant without tokens": aggregate_or(lambda h: h.new_zeros(())),
        "a number without tokens": aggregate_or(lambda h: 0.0),
    }
    return {
        "ex2": {name: {"policy_loss": f} for name, f in policies.items()},
        "ex4": {name: {"nucleus_entropy": f} for name, f in entropies.items()},
        "ex6": {name: {"aggregate_entropy": f} for name, f in aggregates.items()},
    }


# -------------------------------------------------------------------- right, but not the usual
def by_a_projection(rewards, group_size):
    """The matrix that takes the mean out, once for all groups."""
    eye = torch.eye(group_size, dtype=rewards.dtype)
    out = torch.einsum("ij,gj->gi", eye - 1 / group_size, rewards.reshape(-1, group_size))
    return out.flatten()


def one_bound_for_each_sign(
    logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None
):
    """A > 0 has an upper bound only, A < 0 a lower one; tokens in one flat list."""
    budget = mask.shape[1] if max_tokens is None else max_tokens
    a = adv[:, None].expand(mask.shape)[mask]
    ratio = torch.exp(logp[mask] - old_logp[mask])
    worth = torch.where(a > 0, ratio.clamp(max=1 + clip_high), ratio.clamp(min=1 - clip_low))
    beyond = torch.where(a > 0, ratio > 1 + clip_high, (ratio < 1 - clip_low) & (a < 0))
    rows = max(1, int(mask.any(1).sum()))
    share = beyond.sum() / max(1, len(beyond))
    return -(worth * a).sum() / (budget * rows), {"clip_fraction": share}


def by_pairs(logits, top_p):
    """For each token the sum over all likelier ones, without sorting; ids break ties."""
    if top_p == 1:
        return torch.ones_like(logits, dtype=torch.bool)
    pi = logits.softmax(-1)
    ids = torch.arange(logits.shape[-1])
    likelier = pi[..., None, :] > pi[..., :, None]
    earlier = (pi[..., None, :] == pi[..., :, None]) & (ids[None, :] < ids[:, None])
    return (pi[..., None, :] * (likelier | earlier)).sum(-1) < top_p


def by_a_distribution(logits, top_p):
    inside = nucleus_mask(logits, top_p)
    outside = torch.full_like(logits, -torch.inf)
    return torch.distributions.Categorical(
        logits=torch.where(inside, logits, outside)
    ).entropy()


def sorted_and_interpolated(entropy, mask, quantile):
    """All rows at once: padding sorts to the end; the quantile's place is computed."""
    if quantile == 0:
        return mask.clone()
    ordered = torch.where(mask, entropy.detach(), torch.inf).sort(1).values
    place = quantile * (mask.sum(1, keepdim=True) - 1).clamp(min=0).to(entropy.dtype)
    low = place.floor().long()
    high = place.ceil().long()
    at_low = ordered.gather(1, low)
    at_high = ordered.gather(1, high)
    rest = place - low
    theta = torch.where(rest == 0, at_low, at_low + rest * (at_high - at_low))
    return mask & (entropy >= theta) & entropy.gt(0)


def by_python_sums(entropy, peak, mask):
    """Lists of numbers, and a 0 with a graph to begin with."""
    total = torch.where(mask, entropy, 0.0).sum() * 0
    rows = 0
    for h_row, peak_row, mask_row in zip(entropy, peak, mask):
        if not mask_row.any():
            continue
        rows += 1
        found = [h for h, p, m in zip(h_row, peak_row, mask_row) if p and m]
        if found:
            total = total + sum(found) / len(found)
    return total / max(rows, 1)


def by_cross_entropy(
    logits,
    tokens,
    old_logp,
    adv,
    mask,
    anchor,
    *,
    beta,
    top_p=0.8,
    peak_quantile=0.8,
    max_tokens=None,
):
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens.flatten(), reduction="none"
    )
    policy, _ = one_bound_for_each_sign(
        -flat.view(mask.shape), old_logp, adv, mask, max_tokens=max_tokens
    )
    h = by_a_distribution(logits, top_p)
    h_agg = by_python_sums(h, sorted_and_interpolated(h, mask, peak_quantile), mask)
    gap = torch.nn.functional.mse_loss(h_agg, torch.full_like(h_agg, float(anchor)))
    return torch.add(policy, gap, alpha=beta), {
        "policy_loss": policy.detach(),
        "regularizer_loss": beta * gap.detach(),
        "h_agg": h_agg.detach(),
    }


def the_difference_to_the_batch(h_micro, h_agg, anchor):
    return anchor + (h_micro - h_agg)


def one_draw_after_another(n, c, k):
    """The chance that all k are wrong, draw by draw."""
    all_wrong = 1.0
    for drawn in range(k):
        left = n - drawn
        all_wrong *= max(0, n - c - drawn) / left
    return 1.0 - all_wrong


def by_groups_of_equals(votes, answer, k):
    won = []
    for start in range(0, len(votes) // k * k, k):
        block = [vote for vote in votes[start : start + k] if vote is not None]
        best = max(
            block, key=lambda vote: (block.count(vote), -block.index(vote)), default=None
        )
        won.append(best is not None and best == answer)
    return sum(won) / len(won)


@torch.no_grad()
def one_row_at_a_time(
    model, prompts, *, max_tokens, eos_ids, pad_id, samples=1, temperature=1.0, generator=None
):
    """Each response by itself: right numbers, but no batch."""
    rows = [list(prompt) for prompt in prompts for _ in range(samples)]
    width = max(map(len, rows))
    answers = []
    for row in rows:
        answer = []
        cache = None
        fed = torch.tensor([row])
        while len(answer) < max_tokens and not (answer and answer[-1][0] in eos_ids):
            length = len(row) + len(answer)
            out = model(
                input_ids=fed,
                attention_mask=torch.ones(1, length, dtype=torch.long),
                position_ids=torch.arange(length - fed.shape[1], length)[None],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            pi = torch.softmax(out.logits[0, -1] / temperature, 0)
            token = int(torch.multinomial(pi, 1, generator=generator))
            answer.append((token, float(pi[token].log())))
            fed = torch.tensor([[token]])
        answers.append(answer)
    longest = max(map(len, answers))
    tokens = torch.full((len(rows), longest), pad_id)
    logp = torch.zeros(len(rows), longest)
    for i, answer in enumerate(answers):
        for t, (token, value) in enumerate(answer):
            tokens[i, t] = token
            logp[i, t] = value
    prompt = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows])
    own = torch.tensor([[len(answer)] for answer in answers])
    return siren.Rollout(
        prompt,
        torch.arange(width) >= width - lengths,
        tokens,
        torch.arange(longest) < own,
        logp,
    )


@torch.no_grad()
def tables_filled_column_by_column(
    model, prompts, *, max_tokens, eos_ids, pad_id, samples=1, temperature=1.0, generator=None
):
    """All tensors are made before the first step, and cut to size after the last one."""
    width = max(map(len, prompts))
    rows = len(prompts) * samples
    ids = torch.full((rows, width + max_tokens), pad_id)
    real = torch.zeros(rows, width + max_tokens, dtype=torch.bool)
    logp = torch.zeros(rows, max_tokens)
    for i, prompt in enumerate(prompts):
        ids[i * samples : (i + 1) * samples, width - len(prompt) : width] = torch.tensor(
            prompt
        )
        real[i * samples : (i + 1) * samples, width - len(prompt) : width] = True
    ends = torch.tensor(eos_ids)
    cache = None
    start = 0
    stop = width
    while stop < width + max_tokens:
        places = (real[:, :stop].cumsum(1) - 1).clamp(min=0)
        out = model(
            input_ids=ids[:, start:stop],
            attention_mask=real[:, :stop].int(),
            position_ids=places[:, start:],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        draws = torch.distributions.Categorical(logits=out.logits[:, -1] / temperature)
        token = torch.multinomial(draws.probs, 1, generator=generator).squeeze(1)
        before = real[:, stop - 1]
        over = torch.isin(ids[:, stop - 1], ends) if stop > width else torch.zeros_like(before)
        real[:, stop] = before & ~over
        ids[:, stop] = torch.where(real[:, stop], token, pad_id)
        logp[:, stop - width] = draws.log_prob(token).where(real[:, stop], 0.0)
        start = stop
        stop += 1
        if not (real[:, start] & ~torch.isin(ids[:, start], ends)).any():
            break
    return siren.Rollout(
        ids[:, :width],
        real[:, :width],
        ids[:, width:stop],
        real[:, width:stop],
        logp[:, : stop - width],
    )


def with_a_fraction(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
    """K as the decimal number that was written."""
    exact = Fraction(str(quantile))
    out = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        for x in sorted(group.tolist()):
            if Fraction(int((group <= x).sum()), group_size) >= exact:
                out.append(group - x)
                break
    return torch.cat(out)


def letter_by_letter(prompt, response, answer):
    words = response.split()
    if not words or words[-1] != "<eos>":
        return False
    start = -1
    for i in range(len(response)):
        if response.startswith(r"\boxed{", i):
            start = i + len(r"\boxed{")
    end = response.find("}", start)
    if start < 0 or end < 0:
        return False
    number = response[start:end].strip(" ")
    negative = number.startswith("-")
    digits = number[1:] if number[:1] in ("+", "-") else number
    whole, point, rest = digits.partition(".")
    allowed = set("0123456789")
    if not whole or (point and not rest) or set(whole + rest) - allowed:
        return False
    return key_of(negative, whole, rest) == key_of(
        answer.startswith("-"), *answer.lstrip("+-").partition(".")[::2]
    )


def key_of(negative, whole, rest):
    whole = whole.lstrip("0")
    rest = rest.rstrip("0")
    return (negative and bool(whole or rest), whole, rest)


def spread_about_the_mean(p, n, k):
    """The definition of the standard deviation, by numpy."""
    c = np.arange(n + 1)
    chance = np.array([math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)])
    estimate = np.array([one_draw_after_another(n, int(i), k) for i in c])
    mean = (chance * estimate).sum() / chance.sum()
    return float(np.sqrt((chance * (estimate - mean) ** 2).sum() / chance.sum()))


# --------------------------------------------------------------------------------- all of them
def wrong_ones():
    """Exercise -> description -> the functions that replace right ones."""
    return {
        "ex1": alone(
            "group_advantages",
            baseline_of_the_group_before,
            overlapping_groups,
            no_signal_in_a_group_that_is_nearly_equal,
            scaled_to_the_span,
        ),
        "ex2": alone(
            "policy_loss",
            clipped_term_without_gradient,
            ratio_clipped_in_log_space,
            one_plus_the_log_ratio,
            fraction_a_mean_of_responses,
            nan_to_num_only,
            longest_response_as_the_budget,
            responses_with_an_advantage_only,
            far_tokens_left_out,
        ),
        "ex3": alone(
            "nucleus_mask",
            unsorted_by_gather,
            the_shares_of_unsorted_tokens,
            count_of_the_first_row,
            two_tokens_at_least,
            nearly_one_is_all,
            share_of_the_largest,
        ),
        "ex4": alone(
            "nucleus_entropy",
            share_of_the_largest_entropy,
            surprise_of_pi_on_average_of_q,
            weights_without_gradient,
            mean_over_the_nucleus,
            rounding_left_in_one_token,
        ),
        "ex5": {
            "quantile of the positive ones": {
                "peak_mask": by_row(quantile_of_the_positive_ones)
            },
            "share of the maximum": {"peak_mask": by_row(share_of_the_maximum)},
            "rank n times q": {"peak_mask": by_row(rank_n_times_q)},
            "interpolated from n": {"peak_mask": by_row(interpolated_from_n)},
        }
        | alone("peak_mask", a_peak_for_everybody, short_responses_left_out),
        "ex6": alone(
            "aggregate_entropy",
            mean_of_responses_by_length,
            largest_peak_of_each,
            median_of_the_responses,
            empty_batch_times_0,
            mean_of_h_times_peak_share,
        ),
        "ex7": alone(
            "siren_loss",
            squares_of_each_response,
            entropy_of_all_tokens_at_the_peaks,
            tokens_one_later,
            budget_is_forgotten,
            the_two_fractions_exchanged,
            penalty_of_a_share_of_the_anchor,
        ),
        "ex8": alone(
            "micro_batch_anchor",
            an_anchor_is_never_negative,
            half_the_gap,
            anchor_if_nothing_is_there,
        ),
        "ex9": alone(
            "pass_at_k",
            product_with_the_wrong_range,
            all_samples_are_enough,
            floats_too_early,
            replacement_for_large_n,
        ),
        "ex10": alone(
            "maj_at_k",
            counts_go_on,
            answer_among_the_best,
            none_takes_no_place,
            votes_in_place_of_blocks,
        ),
        "ex11": {
            "first tokens all different": {
                "sample": own_sampler(first=first_tokens_all_different)
            },
            "columns as positions": {"sample": own_sampler(position=columns_as_positions)},
            "one position behind": {"sample": own_sampler(position=one_position_behind)},
            "temperature on probabilities": {
                "sample": own_sampler(log_pi_of=temperature_on_probabilities)
            },
            "surprise with epsilon": {"sample": own_sampler(score=surprise_with_epsilon)},
            "what goes on behind the end": {
                "sample": own_sampler(after_end=lambda token, pad_id: token)
            },
            "forced end": {"sample": own_sampler(last=forced_end)},
        }
        | alone("sample", one_row_at_a_time),
        "ex12": alone(
            "quantile_advantages", quantile_of_different_rewards, share_below, rank_rounded
        )
        | alone("plug", plug_once),
        "ex13": alone("strict_verifier", verifier_by_a_pattern, verifier_close_enough)
        | alone("exploit", exploit_from_the_docstring),
        "ex14": alone("seed_differences", seeds_as_texts)
        | alone("bootstrap_interval", interval_of_the_values)
        | alone("holm", holm_of_the_next),
    }


def second_round():
    """Exercise -> description -> functions, as in wrong_ones()."""
    losses = {
        "penalty with the value of its gradient": lambda h, a, b: 2 * b * (h.detach() - a) * h,
        "beta squared": lambda h, a, b: b**2 * (h - a) ** 2,
        "the first anchor kept": first_gap_kept(),
    }
    return {
        "ex1": alone("group_advantages", as_many_chunks_as_the_size, mean_in_single_precision),
        "ex2": alone(
            "policy_loss",
            low_bound_for_both,
            fraction_of_all_beyond_a_bound,
            length_of_the_first_row,
            always_on_policy,
            upper_bound_as_the_inverse_of_the_lower,
        ),
        "ex3": alone(
            "nucleus_mask",
            nearly_one,
            reached_is_not_enough,
            size_of_the_largest_nucleus,
            ties_by_threshold,
        ),
        "ex4": alone(
            "nucleus_entropy",
            divided_by_p,
            softmax_twice,
            clamped_at_zero_with_relu,
            rest_as_one_more_token,
        ),
        "ex5": alone(
            "peak_mask", ranks_not_values, mean_and_deviation, threshold_in_single_precision
        ),
        "ex6": alone(
            "aggregate_entropy",
            small_number_in_the_denominator,
            count_of_the_row_with_most_peaks,
            last_row_left_out,
        ),
        "ex7": alone("siren_loss", other_end_of_the_quantile, default_of_the_toy)
        | {name: {"siren_loss": anchored_by(step)} for name, step in losses.items()},
        "ex8": alone("micro_batch_anchor", without_the_micro_batch),
        "ex9": alone("pass_at_k", whole_division, zero_if_too_few_wrong),
        "ex10": alone("maj_at_k", ties_are_lost, rest_in_the_denominator, latest_of_the_best),
        "ex11": alone("sample", own_generator, global_seed_of_0, order_of_the_samples)
        | {"temperature squared": {"sample": own_sampler(log_pi_of=temperature_squared)}},
        "ex12": alone("quantile_advantages", rank_between_first_and_last),
        "ex13": alone("strict_verifier", verifier_of_decimal_characters),
        "ex14": alone("repeats_needed", rounded_repeats)
        | alone("bootstrap_interval", normal_interval),
    }


def right_ones():
    """Exercise -> description -> the functions, in styles that few people choose."""
    return {
        "ex1": alone("group_advantages", by_a_projection),
        "ex2": alone("policy_loss", one_bound_for_each_sign),
        "ex3": alone("nucleus_mask", by_pairs),
        "ex4": alone("nucleus_entropy", by_a_distribution, logarithm_without_gradient),
        "ex5": alone("peak_mask", sorted_and_interpolated),
        "ex6": alone("aggregate_entropy", by_python_sums),
        "ex7": alone("siren_loss", by_cross_entropy),
        "ex8": alone("micro_batch_anchor", the_difference_to_the_batch),
        "ex9": alone("pass_at_k", one_draw_after_another),
        "ex10": alone("maj_at_k", by_groups_of_equals),
        "ex11": alone("sample", tables_filled_column_by_column),
        "ex12": alone("quantile_advantages", with_a_fraction),
        "ex13": alone("strict_verifier", letter_by_letter),
        "ex14": alone("pass_at_k_std", spread_about_the_mean),
    }


def alone(name, *functions):
    return {function.__name__.replace("_", " "): {name: function} for function in functions}
