"""Wrong solutions of the exercises: mistakes that people make, one or more a function.

WRONG has for each its exercise, its name, the functions that it replaces in the right
solution, and words of the sentence that a student who makes this mistake reads first.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

import siren
from exercises import qae, reference
from exercises.grading import EXERCISES


# ------------------------------------------------------------------------------- 1. advantages
def baseline_of_the_batch(rewards, group_size):
    return rewards - rewards.mean()


def divided_by_the_std(rewards, group_size):
    return siren.group_advantages(rewards, group_size, algorithm="grpo")


def interleaved_groups(rewards, group_size):
    groups = rewards.view(group_size, -1)
    return (groups - groups.mean(0)).view(-1)


def leave_one_out_baseline(rewards, group_size):
    groups = rewards.view(-1, group_size)
    others = (groups.sum(1, True) - groups) / (group_size - 1)
    return (groups - others).view(-1)


def median_of_the_group(rewards, group_size):
    groups = rewards.view(-1, group_size)
    return (groups - groups.median(1, True).values).view(-1)


def mean_minus_reward(rewards, group_size):
    return -siren.group_advantages(rewards, group_size)


def whitened_over_the_batch(rewards, group_size):
    adv = siren.group_advantages(rewards, group_size)
    return adv / adv.std()


def a_row_per_group(rewards, group_size):
    return siren.group_advantages(rewards, group_size).view(-1, group_size)


def rewards_overwritten(rewards, group_size):
    groups = rewards.view(-1, group_size)
    groups -= groups.mean(1, True)
    return rewards


# ----------------------------------------------------------------------------- 2. clipped loss
def clipped_loss(
    logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None, slip=""
):
    """policy_loss with one slip."""
    if slip != "masked after the arithmetic":
        logp, old_logp = torch.where(mask, logp, 0.0), torch.where(mask, old_logp, 0.0)
    ratio, a = (logp - old_logp).exp(), adv[:, None]
    if slip == "ratio without gradient":
        ratio = ratio.detach()
    free, held = ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a
    gain = torch.min(free, held)
    if slip == "no clip":
        gain = free
    if slip == "clipped on the way back as well":
        gain = held
    if slip == "max instead of min":
        gain = torch.max(free, held)
    if slip == "clip on the wrong side for A < 0":
        gain = torch.where(a < 0, torch.max(free, held), gain)
    if slip == "clip from above only":
        gain = ratio.clamp(max=1 + clip_high) * a
    if slip == "sign":
        gain = -gain
    clip_fraction = ((held < free) & mask).sum() / mask.sum().clamp(min=1)
    if slip == "clip fraction counts advantages of 0":
        outside = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
        clip_fraction = (outside & (held <= free) & mask).sum() / mask.sum().clamp(min=1)
    if slip == "clip fraction over padding":
        clip_fraction = (held < free).double().mean()
    if slip != "padding in the mean":
        gain = gain * mask
    responses = mask.any(1).sum().clamp(min=slip != "no token at all")
    loss = -gain.sum() / (max_tokens or mask.shape[1]) / responses
    if slip == "length normalisation":
        loss = -(gain.sum(1) / mask.sum(1).clamp(min=1)).sum() / responses
    if slip == "mean over tokens":
        loss = -gain.sum() / mask.sum()
    if slip == "only responses with a signal in the mean":
        signal = (mask.any(1) & (adv != 0)).sum().clamp(min=1)
        loss = -gain.sum() / (max_tokens or mask.shape[1]) / signal
    if slip == "empty responses in the mean":
        loss = -gain.sum() / (max_tokens or mask.shape[1]) / len(mask)
    return loss, {"clip_fraction": clip_fraction}


# ---------------------------------------------------------------------------------- 3. nucleus
def exclusive_nucleus(logits, top_p):
    p, order = logits.softmax(-1).sort(-1, descending=True)
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) <= top_p)


def left_in_sorted_order(logits, top_p):
    p = logits.softmax(-1).sort(-1, descending=True).values
    return p.cumsum(-1) - p < top_p


def never_sorted(logits, top_p):
    p = logits.softmax(-1)
    return p.cumsum(-1) - p < top_p


def one_token_too_many(logits, top_p):
    p, order = logits.softmax(-1).sort(-1, descending=True)
    inside = p.cumsum(-1) - p < top_p
    inside[..., 1:] = inside[..., :-1].clone()  # as if it were exclusive
    return torch.zeros_like(inside).scatter(-1, order, inside)


def no_softmax(logits, top_p):
    p, order = logits.exp().sort(-1, descending=True)
    inside = p.cumsum(-1) - p < top_p
    return torch.zeros_like(inside).scatter(-1, order, inside)


def threshold_keeps_ties(logits, top_p):
    p = logits.softmax(-1)
    inside = reference.nucleus_mask(logits, top_p)
    return p >= p.masked_fill(~inside, 1.0).min(-1, keepdim=True).values


def tail_lost_at_p_1(logits, top_p):
    p, order = logits.softmax(-1).sort(dim=-1, descending=True)
    inside = p.cumsum(-1) - p < top_p
    return torch.zeros_like(inside).scatter(-1, order, inside)


def rounded_away_at_p_1(logits, top_p):
    return logits.softmax(-1) > 0 if top_p >= 1 else reference.nucleus_mask(logits, top_p)


def ascending_without_p_1(logits, top_p):
    p, order = logits.softmax(-1).sort(-1)
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) > 1 - top_p)


def another_dimension(logits, top_p):
    p, order = logits.softmax(1).sort(1, descending=True)
    return torch.zeros_like(p, dtype=torch.bool).scatter(1, order, p.cumsum(1) - p < top_p)


# -------------------------------------------------------------------------- 4. nucleus entropy
def not_renormalised(logits, top_p):
    log_pi = logits.log_softmax(-1)
    return -(log_pi.exp() * log_pi * reference.nucleus_mask(logits, top_p)).sum(-1)


def log_of_pi_instead_of_q(logits, top_p):
    pi, inside = logits.softmax(-1), reference.nucleus_mask(logits, top_p)
    return -(pi * pi.log() * inside).sum(-1) / (pi * inside).sum(-1)


def entropy_of_the_vocabulary(logits, top_p):
    return reference.nucleus_entropy(logits, 1.0)


def bits(logits, top_p):
    return reference.nucleus_entropy(logits, top_p) / math.log(2)


def logits_masked_with_0(logits, top_p):
    return reference.nucleus_entropy(logits * reference.nucleus_mask(logits, top_p), 1.0)


def nan_in_the_sum(logits, top_p):
    inside = reference.nucleus_mask(logits, top_p)
    log_q = logits.masked_fill(~inside, -math.inf).log_softmax(-1)
    return -(log_q.exp() * log_q).sum(-1)


def detached_entropy(logits, top_p):
    return reference.nucleus_entropy(logits.detach(), top_p)


def nan_in_the_gradient(logits, top_p):
    inside = reference.nucleus_mask(logits, top_p)
    q = logits.masked_fill(~inside, -math.inf).softmax(-1)
    return torch.where(inside, -q * q.log(), 0.0).sum(-1)


def detached_normaliser(logits, top_p):
    inside = reference.nucleus_mask(logits, top_p)
    pi = logits.softmax(-1) * inside
    q = pi / pi.sum(-1, keepdim=True).detach()
    return -torch.where(inside, q * q.masked_fill(~inside, 1.0).log(), 0.0).sum(-1)


def epsilon_in_the_log(logits, top_p):
    pi = logits.softmax(-1) * reference.nucleus_mask(logits, top_p)
    q = pi / pi.sum(-1, keepdim=True)
    return -(q * (q + 1e-8).log()).sum(-1)


# ------------------------------------------------------------------------------------ 5. peaks
def own_quantile(entropy, mask, quantile, interpolation="linear"):
    own = entropy.detach().double().masked_fill(~mask, math.nan)
    return torch.nanquantile(own, quantile, 1, True, interpolation=interpolation)


def quantile_of_the_batch(entropy, mask, quantile):
    q = torch.quantile(entropy[mask], quantile)
    return (entropy >= q) & (entropy > 0) & mask


def mask_not_anded(entropy, mask, quantile):
    return (entropy >= own_quantile(entropy, mask, quantile)) & (entropy > 0)


def padding_in_the_quantile(entropy, mask, quantile):
    q = torch.quantile(entropy, quantile, dim=1, keepdim=True)
    return (entropy >= q) & (entropy > 0) & mask


def above_the_quantile_only(entropy, mask, quantile):
    return (entropy > own_quantile(entropy, mask, quantile)) & mask


def zeros_are_peaks(entropy, mask, quantile):
    return (entropy >= own_quantile(entropy, mask, quantile)) & mask


def quantile_not_interpolated(entropy, mask, quantile):
    q = own_quantile(entropy, mask, quantile, "lower")
    return (entropy >= q) & (entropy > 0) & mask


def a_threshold_above_0(entropy, mask, quantile):
    return siren.peak_mask(entropy, mask, quantile) & ((entropy > 1e-6) | (quantile == 0))


def quantile_0_not_off(entropy, mask, quantile):
    return (entropy >= own_quantile(entropy, mask, quantile)) & (entropy > 0) & mask


def entropy_overwritten(entropy, mask, quantile):
    entropy[~mask] = 0.0
    return siren.peak_mask(entropy, mask, quantile)


# ------------------------------------------------------------------------------ 6. aggregation
def mean_over_all_peaks(entropy, peak, mask):
    peak = peak & mask
    return (entropy * peak).sum() / peak.sum().clamp(min=1)


def mean_over_tokens(entropy, peak, mask):
    h_i = (entropy * (peak & mask)).sum(1) / mask.sum(1).clamp(min=1)
    return h_i.sum() / mask.any(1).sum().clamp(min=1)


def division_by_no_peaks(entropy, peak, mask):
    peak = peak & mask
    return ((entropy * peak).sum(1) / peak.sum(1))[mask.any(1)].mean()


def empty_responses_count(entropy, peak, mask):
    peak = peak & mask
    return ((entropy * peak).sum(1) / peak.sum(1).clamp(min=1)).mean()


def silent_responses_left_out(entropy, peak, mask):
    peak = peak & mask
    h_i = (entropy * peak).sum(1) / peak.sum(1).clamp(min=1)
    return h_i.sum() / peak.any(1).sum().clamp(min=1)


def padding_in_the_mean(entropy, peak, mask):
    h_i = (entropy * peak).sum(1) / peak.sum(1).clamp(min=1)
    return h_i.sum() / mask.any(1).sum().clamp(min=1)


def entropy_without_gradient(entropy, peak, mask):
    return siren.aggregate_entropy(entropy.detach(), peak, mask)


def padding_times_0(entropy, peak, mask):
    peak = peak & mask
    h_i = (entropy * peak).sum(1) / peak.sum(1).clamp(min=1)
    return h_i.sum() / mask.any(1).sum().clamp(min=1)


# ---------------------------------------------------------- 7. anchored loss, 8. micro-batches
def anchored_loss(
    logits, tokens, old_logp, adv, mask, anchor, *, beta, top_p=0.8, peak_quantile=0.8,
    max_tokens=None, slip="",
):  # fmt: skip
    """siren_loss with one slip."""
    top_p = {"entropy of the vocabulary": 1.0, "top_p unused": 0.8}.get(slip, top_p)
    h = reference.nucleus_entropy(logits, top_p)
    log_pi = logits.log_softmax(-1)
    if slip == "logits shifted once more":
        log_pi = log_pi.roll(1, 1)
    logp = log_pi.gather(-1, tokens[..., None])[..., 0]
    policy, _ = reference.policy_loss(logp, old_logp, adv, mask, max_tokens=max_tokens)
    quantile = 0.8 if slip == "peak_quantile unused" else peak_quantile
    peak = mask if slip == "no peak mask" else siren.peak_mask(h, mask, quantile)
    h_agg = siren.aggregate_entropy(h.detach() if slip == "H_agg detached" else h, peak, mask)
    penalty = beta * (h_agg - anchor) ** 2
    if slip == "bonus instead of anchor":
        penalty = -beta * h_agg
    if slip == "absolute value instead of square":
        penalty = beta * (h_agg - anchor).abs()
    if slip == "square per response":
        h_i = (h * peak).sum(1) / peak.sum(1).clamp(min=1)
        penalty = beta * ((h_i - anchor) ** 2 * mask.any(1)).sum() / mask.any(1).sum()
    if slip == "square per token":
        penalty = beta * ((h - anchor) ** 2 * peak).sum() / peak.sum()
    if slip == "beta forgotten":
        penalty = penalty / beta
    stats = {"policy_loss": policy.detach(), "regularizer_loss": penalty.detach()}
    return policy + penalty, stats | {"h_agg": h_agg.detach()}


def the_same_anchor_for_all(h_micro, h_agg, anchor):
    return anchor


def gap_the_wrong_way_round(h_micro, h_agg, anchor):
    return h_micro + (h_agg - anchor)


def the_gap_itself(h_micro, h_agg, anchor):
    return h_agg - anchor


def micro_and_whole_swapped(h_micro, h_agg, anchor):
    return h_agg - (h_micro - anchor)


def scaled_anchor(h_micro, h_agg, anchor):
    return anchor * h_micro / h_agg


def pulled_to_itself(h_micro, h_agg, anchor):
    return h_agg


def gap_without_its_sign(h_micro, h_agg, anchor):
    return h_micro - abs(h_agg - anchor)


def gap_squared(h_micro, h_agg, anchor):
    return h_micro - (h_agg - anchor) ** 2


def one_sided_gap(h_micro, h_agg, anchor):
    return h_micro - min(h_agg - anchor, torch.zeros(()))


# ----------------------------------------------------------------------------------- 9. pass@k
def biased_pass_at_k(n, c, k):
    return 1 - (1 - c / n) ** k


def k_times_the_average(n, c, k):
    return min(1.0, c / n * k)


def average_instead(n, c, k):
    return c / n


def all_wrong_instead(n, c, k):
    return math.comb(n - c, k) / math.comb(n, k)


def any_of_all_n(n, c, k):
    return float(c > 0)


def exactly_one(n, c, k):
    return c * math.comb(n - c, k - 1) / math.comb(n, k)


def all_k(n, c, k):
    return math.comb(c, k) / math.comb(n, k)


def logarithms_of_factorials(n, c, k):
    """In float32, whose seven digits are too few for the logarithm of 10000!."""

    def log_comb(a, b):
        a, b = torch.tensor(float(a)), torch.tensor(float(b))
        return (a + 1).lgamma() - (b + 1).lgamma() - (a - b + 1).lgamma()

    return float(1 - (log_comb(n - c, k) - log_comb(n, k)).exp()) if n - c >= k else 1.0


# ----------------------------------------------------------------------------------- 10. maj@k
def majority(votes, answer, k, slip=""):
    """maj_at_k with one slip."""
    end = len(votes) if slip == "a last block that is not whole" else len(votes) - k + 1
    blocks = [votes[i : i + k] for i in range(0, end, k)]
    if slip == "the first block alone":
        blocks = blocks[:1]
    won = 0
    for block in blocks:
        given = block if slip == "None votes" else [v for v in block if v is not None]
        if slip == "an empty text is not a vote":
            given = [v for v in given if v]
        if slip == "votes by value":
            given = [str(siren.normalize(v)) for v in given]
        if not given:
            continue
        count = Counter(given)
        best = max(count.values())
        leaders = [v for v in given if count[v] == best]
        winner = leaders[-1] if slip == "a tie goes to the last given" else leaders[0]
        won += winner == answer
        if slip == "a tie counts as right":
            won += winner != answer and answer in leaders
        if slip == "more than half of the votes":
            won -= winner == answer and 2 * best <= len(block)
    return won / len(blocks)


# --------------------------------------------------------------------------------- 11. sampler
@torch.no_grad()
def slow_sampler(
    model, prompts, *, max_tokens, eos_ids, pad_id,
    samples=1, temperature=1.0, generator=None, slip="",
):  # fmt: skip
    """sample with one slip; rows that have ended stay in the batch."""
    if slip == "samples of a prompt far apart":
        prompts = prompts * samples
    else:
        prompts = [p for p in prompts for _ in range(samples)]
    width, size = max(map(len, prompts)), len(prompts)
    prompt = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts])
    prompt_mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    if slip == "prompt mask from ids":
        prompt_mask = prompt != pad_id
    seen = prompt_mask.long()
    if slip == "attention to the padding":
        seen = torch.ones_like(prompt)
    ids, inputs, cache = prompt, prompt, None
    going, columns = torch.ones(size, dtype=torch.bool), []
    for _ in range(max_tokens):
        cached = slip != "no cache"
        fed = {
            "input_ids": inputs if cached else ids,
            "attention_mask": seen,
            "use_cache": cached,
        }
        spots = torch.arange(seen.shape[1]).expand(size, -1)
        if slip != "position ids count the padding":
            spots = (seen.cumsum(1) - 1).clamp(min=0)
        spots = spots[:, -fed["input_ids"].shape[1] :]
        if slip == "every new token at position 0":
            spots = spots * (spots.shape[1] > 1)
        out = model(**fed, position_ids=spots, past_key_values=cache)
        cache = out.past_key_values if cached else None
        logits = out.logits[:, -1].float()
        log_pi = (logits / temperature).log_softmax(-1)
        token = torch.multinomial(log_pi.exp(), 1, generator=generator)
        if slip == "the likeliest token instead of a draw":
            token = log_pi.argmax(-1, keepdim=True)
        if slip == "generator unused":
            token = torch.multinomial(log_pi.exp(), 1)
        if slip == "logp at temperature 1":
            log_pi = logits.log_softmax(-1)
        logp = log_pi.gather(1, token)[:, 0]
        ends = torch.isin(token[:, 0], torch.tensor(eos_ids))
        kept = going & ~ends if slip == "EOS not trained" else going
        columns.append((token[:, 0].where(going, pad_id), kept, logp * kept))
        if slip != "on and on after EOS":
            going = going & ~ends
        if going.sum() <= (slip == "stops before the last row ends"):
            break
        inputs, ids = token, torch.cat([ids, token], 1)
        seen = torch.cat([seen, seen.new_ones(size, 1)], 1)
    tokens, mask, logp = (torch.stack(x, 1) for x in zip(*columns))
    if slip == "mask of tokens that are not pad":
        mask = tokens != pad_id
    return siren.Rollout(prompt, prompt_mask, tokens, mask, logp)


# ------------------------------------------------------------------------------- 12. a drop-in
def interpolated(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
    groups = rewards.view(-1, group_size)
    return (groups - groups.quantile(quantile, 1, True)).view(-1)


def the_value_below(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
    groups = rewards.view(-1, group_size)
    return (groups - groups.quantile(quantile, 1, True, interpolation="lower")).view(-1)


def the_value_above(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
    groups = rewards.view(-1, group_size)
    return (groups - groups.quantile(quantile, 1, True, interpolation="higher")).view(-1)


def mean_as_baseline(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
    return siren.group_advantages(rewards, group_size)


def rank_from(count, descending=False):
    """Advantages by the reward of rank count(quantile * group_size), from 1 on."""

    def advantages(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
        groups = rewards.view(-1, group_size)
        rank = min(group_size, count(quantile * group_size))
        return (groups - groups.sort(1, descending).values[:, rank - 1, None]).view(-1)

    return advantages


def quantile_of_all_groups(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
    return qae.quantile_advantages(rewards, len(rewards), algorithm, quantile)


def returned_in_sorted_order(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
    groups = rewards.view(-1, group_size).sort(1).values
    return qae.quantile_advantages(groups.view(-1), group_size, algorithm, quantile)


def baseline_instead(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
    return rewards - qae.quantile_advantages(rewards, group_size, algorithm, quantile)


def divided_by_its_std(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
    return qae.quantile_advantages(rewards, group_size, "grpo", quantile)


def quantile_unused(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
    return qae.quantile_advantages(rewards, group_size)


def plug_that_replaces_nothing(quantile="0.4"):
    return qae.quantile_advantages


def plug_without_the_option(quantile="0.4"):
    siren.group_advantages = qae.quantile_advantages


def plug_of_a_text(quantile="0.4"):
    siren.group_advantages = functools.partial(qae.quantile_advantages, quantile=quantile)


def plug_of_two_arguments(quantile="0.4"):
    siren.group_advantages = lambda rewards, group_size: qae.quantile_advantages(
        rewards, group_size, quantile=float(quantile)
    )


# ---------------------------------------------------------------------------- the table of all


class Wrong(NamedTuple):
    """A wrong solution of an exercise."""

    exercise: str
    name: str
    changes: dict[str, Callable]  # name in the right solution -> the wrong function
    words: str  # of the first failure's sentence


def each(exercise: str, told: dict[Callable, str], name: str = "") -> list[Wrong]:
    """told: wrong function -> words. name: the function in whose place it stands."""
    name = name or EXERCISES[exercise][0]
    return [
        Wrong(exercise, function.__name__.replace("_", " "), {name: function}, words)
        for function, words in told.items()
    ]


def slips(exercise: str, function: Callable, told: dict[str, str]) -> list[Wrong]:
    """told: slip of the function -> words."""
    (name,) = EXERCISES[exercise]
    return [
        Wrong(exercise, slip, {name: functools.partial(function, slip=slip)}, words)
        for slip, words in told.items()
    ]


WRONG = [
    *each(
        "ex1",
        {
            baseline_of_the_batch: "own group, not of the batch",
            divided_by_the_std: "no division by the standard deviation",
            interleaved_groups: "a group is consecutive rows",
            leave_one_out_baseline: "includes the response itself",
            median_of_the_group: "the mean, not the median",
            mean_minus_reward: "mind the sign",
            whitened_over_the_batch: "no division by the standard deviation",
            a_row_per_group: "shape",
            rewards_overwritten: "rewards was written to",
        },
    ),
    *slips(
        "ex2",
        clipped_loss,
        {
            "sign": "a loss is minimised",
            "ratio without gradient": "the loss has no gradient",
            "no clip": "the ratio is not clipped",
            "clipped on the way back as well": "the way back is never clipped",
            "max instead of min": "the smaller of both terms, not the larger",
            "clip on the wrong side for A < 0": "for A < 0 you clip on the wrong side",
            "clip from above only": "for A < 0 you clip on the wrong side",
            "clip fraction counts advantages of 0": "the clipped term is the smaller one",
            "padding in the mean": "padding reaches the loss",
            "length normalisation": "each response's own length",
            "mean over tokens": "not by the number of tokens",
            "empty responses in the mean": "leave out empty",
            "only responses with a signal in the mean": "although its advantage is 0",
            "clip fraction over padding": "tokens in the mask",
            "no token at all": "0 / 0",
            "masked after the arithmetic": "NaN * 0 is NaN",
        },
    ),
    *each(
        "ex3",
        {
            exclusive_nucleus: "your nucleus leaves out the token that crosses p",
            left_in_sorted_order: "map the mask back from the sorted order",
            never_sorted: "sort by probability",
            one_token_too_many: "your nucleus is not the smallest",
            no_softmax: "logits are not probabilities",
            threshold_keeps_ties: "no threshold on pi",
            tail_lost_at_p_1: "top_p = 1 keeps every token",
            rounded_away_at_p_1: "even one whose pi is rounded to 0",
            ascending_without_p_1: "even one whose pi is rounded to 0",
            another_dimension: "work along the last dimension",
        },
    ),
    *each(
        "ex4",
        {
            not_renormalised: "renormalise on the nucleus",
            log_of_pi_instead_of_q: "log q, not log pi",
            entropy_of_the_vocabulary: "tokens outside the nucleus count",
            bits: "natural logarithm, not log2",
            logits_masked_with_0: "it must be -inf",
            nan_in_the_sum: "0 * log 0 is NaN",
            nan_in_the_gradient: "0 * log 0 in the backward pass",
            detached_entropy: "H' has no gradient",
            detached_normaliser: "was a part detached",
            epsilon_in_the_log: "epsilon",
        },
    ),
    *each(
        "ex5",
        {
            quantile_of_the_batch: "your quantile is over the batch",
            mask_not_anded: "AND with the mask",
            padding_in_the_quantile: "padding is not part of the quantile",
            above_the_quantile_only: "what equals the quantile is a peak",
            zeros_are_peaks: "a peak also needs H' > 0",
            quantile_not_interpolated: "the 0.8-quantile is 4.2",
            entropy_overwritten: "entropy was written to",
            a_threshold_above_0: "H' > 0, however small",
            quantile_0_not_off: "every token of the response is a peak",
        },
    ),
    *each(
        "ex6",
        {
            mean_over_all_peaks: "long responses don't weigh more",
            mean_over_tokens: "divide by the number of peaks, not by the length",
            division_by_no_peaks: "0 / 0",
            empty_responses_count: "a response without a token is left out",
            silent_responses_left_out: "a response without a peak counts 0",
            padding_in_the_mean: "AND with the mask",
            entropy_without_gradient: "was the entropy detached",
            padding_times_0: "NaN * 0 is NaN",
        },
    ),
    *slips(
        "ex7",
        anchored_loss,
        {
            "entropy of the vocabulary": "not of the whole vocabulary",
            "no peak mask": "at the peaks only",
            "bonus instead of anchor": "not a bonus",
            "absolute value instead of square": "the penalty is squared",
            "square per response": "once, not per response",
            "square per token": "once, not per token",
            "beta forgotten": "weighted by beta",
            "top_p unused": "top_p is an argument",
            "peak_quantile unused": "peak_quantile is an argument",
            "logits shifted once more": "do not shift",
            "H_agg detached": "was H_agg detached",
        },
    ),
    *each(
        "ex8",
        {
            the_same_anchor_for_all: "must be H_agg - H*, that of ALL rows",
            gap_the_wrong_way_round: "mind the sign",
            the_gap_itself: "that is the gap",
            micro_and_whole_swapped: "that of the micro-batch, not of all rows",
            scaled_anchor: "h_micro - (the new anchor) = H_agg - H*",
            pulled_to_itself: "h_micro - (the new anchor) = H_agg - H*",
            gap_without_its_sign: "mind the sign",
            gap_squared: "the gap itself, not its square",
            one_sided_gap: "above the anchor as below",
        },
    ),
    *each(
        "ex9",
        {
            biased_pass_at_k: "biased: 1 - (1 - c/n)^k draws with replacement",
            k_times_the_average: "counts a subset with two right ones twice",
            average_instead: "c/n is avg@k",
            all_wrong_instead: "the chance that all are wrong",
            any_of_all_n: "some of the n, not all",
            exactly_one: "at least one is right, not exactly one",
            all_k: "at least one is right, not all k",
            logarithms_of_factorials: "use products or integers",
        },
    ),
    *slips(
        "ex10",
        majority,
        {
            "a tie goes to the last given": "tie: the answer given first, not the last",
            "a tie counts as right": "not the last or the correct",
            "None votes": "None is not a vote",
            "an empty text is not a vote": "an empty text is a vote",
            "votes by value": "votes are compared as they are given",
            "more than half of the votes": "also with two of five",
            "the first block alone": "blocks of k",
            "a last block that is not whole": "last whole block",
        },
    ),
    *slips(
        "ex11",
        slow_sampler,
        {
            "samples of a prompt far apart": "i * samples + j",
            "prompt mask from ids": "from positions, not from ids",
            "no cache": "feed one token at a time",
            "attention to the padding": "left padding",
            "every new token at position 0": "position of a row's own tokens",
            "logp at temperature 1": "of the distribution drawn from",
            "position ids count the padding": "a row's own tokens",
            "EOS not trained": "EOS belongs to the response",
            "mask of tokens that are not pad": "EOS belongs",
            "on and on after EOS": "rows must end at EOS",
            "stops before the last row ends": "on to max_tokens",
            "the likeliest token instead of a draw": "take the likeliest",
            "generator unused": "draw with the generator",
        },
    ),
    *each(
        "ex12",
        {
            interpolated: "the quantile is interpolated",
            mean_as_baseline: "the quantile, not the mean",
            the_value_below: "not the one below it",
            the_value_above: "where F(x) is exactly K",
            quantile_of_all_groups: "every group has its own quantile",
            returned_in_sorted_order: "but not what you return",
            baseline_instead: "that is the baseline",
            divided_by_its_std: "no division by the standard deviation",
            quantile_unused: "quantile is an argument",
        },
    ),
    *(
        Wrong("ex12", name, {"quantile_advantages": function}, words)
        for name, function, words in (
            (
                "from the largest",
                rank_from(math.ceil, descending=True),
                "from the smallest up",
            ),
            ("no tolerance", rank_from(math.ceil), "count with a tolerance"),
            ("one too far", rank_from(lambda x: int(x) + 1), "where F(x) is exactly K"),
        )
    ),
    *each(
        "ex12",
        {
            plug_that_replaces_nothing: "plug() must set siren.group_advantages",
            plug_of_two_arguments: "siren.training_step passes",
            plug_of_a_text: "K is a text",
            plug_without_the_option: "K is the option",
        },
        "plug",
    ),
]
