"""Grades the graders: each wrong solution below must fail the test that is meant to catch it.

A wrong solution is siren.py with one function replaced, by a mistake that people make. WRONG has
its name, the test that must fail, and words of the sentence that the student reads.

    python -m pytest -q exercises
"""

from __future__ import annotations

import ast
import dataclasses
import doctest
import inspect
import itertools
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import siren
import test_siren as graders
import toy_env
from exercises import student

ROOT = Path(__file__).resolve().parents[1]
EXERCISES = {
    "ex1": ["group_advantages"],
    "ex2": ["policy_loss"],
    "ex3": ["nucleus_mask"],
    "ex4": ["nucleus_entropy"],
    "ex5": ["peak_mask"],
    "ex6": ["aggregate_entropy"],
    "ex7": ["siren_loss"],
    "ex8": ["micro_batch_anchor"],
    "ex9": ["pass_at_k"],
    "ex10": ["maj_at_k"],
    "ex11": ["sample"],
}


# ---------------------------------------------------------------------------------- 1. advantages
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


def rewards_overwritten(rewards, group_size):
    groups = rewards.view(-1, group_size)
    groups -= groups.mean(1, True)
    return rewards


# -------------------------------------------------------------------------------- 2. clipped loss
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
    clip_fraction = ((held < free) & mask).sum() / mask.sum()
    if slip == "clip fraction counts advantages of 0":
        outside = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
        clip_fraction = (outside & (held <= free) & mask).sum() / mask.sum()
    if slip == "clip fraction over padding":
        clip_fraction = (held < free).double().mean()
    if slip != "padding in the mean":
        gain = gain * mask
    responses = mask.any(1).sum()
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


# ------------------------------------------------------------------------------------- 3. nucleus
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
    inside = siren.nucleus_mask(logits, top_p)
    return p >= p.masked_fill(~inside, 1.0).min(-1, keepdim=True).values


def tail_lost_at_p_1(logits, top_p):
    p, order = logits.softmax(-1).sort(dim=-1, descending=True)
    inside = p.cumsum(-1) - p < top_p
    return torch.zeros_like(inside).scatter(-1, order, inside)


def rounded_away_at_p_1(logits, top_p):
    return logits.softmax(-1) > 0 if top_p >= 1 else siren.nucleus_mask(logits, top_p)


def ascending_without_p_1(logits, top_p):
    p, order = logits.softmax(-1).sort(-1)
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) > 1 - top_p)


def another_dimension(logits, top_p):
    p, order = logits.softmax(1).sort(1, descending=True)
    return torch.zeros_like(p, dtype=torch.bool).scatter(1, order, p.cumsum(1) - p < top_p)


# ----------------------------------------------------------------------------- 4. nucleus entropy
def not_renormalised(logits, top_p):
    log_pi = logits.log_softmax(-1)
    return -(log_pi.exp() * log_pi * siren.nucleus_mask(logits, top_p)).sum(-1)


def log_of_pi_instead_of_q(logits, top_p):
    pi, inside = logits.softmax(-1), siren.nucleus_mask(logits, top_p)
    return -(pi * pi.log() * inside).sum(-1) / (pi * inside).sum(-1)


def entropy_of_the_vocabulary(logits, top_p):
    return siren.nucleus_entropy(logits, 1.0)


def bits(logits, top_p):
    return siren.nucleus_entropy(logits, top_p) / math.log(2)


def logits_masked_with_0(logits, top_p):
    return siren.nucleus_entropy(logits * siren.nucleus_mask(logits, top_p), 1.0)


def nan_in_the_sum(logits, top_p):
    inside = siren.nucleus_mask(logits, top_p)
    log_q = logits.masked_fill(~inside, -math.inf).log_softmax(-1)
    return -(log_q.exp() * log_q).sum(-1)


def detached_entropy(logits, top_p):
    return siren.nucleus_entropy(logits.detach(), top_p)


def nan_in_the_gradient(logits, top_p):
    inside = siren.nucleus_mask(logits, top_p)
    q = logits.masked_fill(~inside, -math.inf).softmax(-1)
    return torch.where(inside, -q * q.log(), 0.0).sum(-1)


def detached_normaliser(logits, top_p):
    inside = siren.nucleus_mask(logits, top_p)
    pi = logits.softmax(-1) * inside
    q = pi / pi.sum(-1, keepdim=True).detach()
    return -torch.where(inside, q * q.masked_fill(~inside, 1.0).log(), 0.0).sum(-1)


def epsilon_in_the_log(logits, top_p):
    pi = logits.softmax(-1) * siren.nucleus_mask(logits, top_p)
    q = pi / pi.sum(-1, keepdim=True)
    return -(q * (q + 1e-8).log()).sum(-1)


# --------------------------------------------------------------------------------------- 5. peaks
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


# --------------------------------------------------------------------------------- 6. aggregation
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


# --------------------------------------------------------------- 7. anchored loss, 8. micro-batches
def anchored_loss(
    logits, tokens, old_logp, adv, mask, anchor, *, beta, top_p=0.8, peak_quantile=0.8,
    max_tokens=None, slip="",
):  # fmt: skip
    """siren_loss with one slip."""
    top_p = {"entropy of the vocabulary": 1.0, "top_p unused": 0.8}.get(slip, top_p)
    h = siren.nucleus_entropy(logits, top_p)
    log_pi = logits.log_softmax(-1)
    if slip == "logits shifted once more":
        log_pi = log_pi.roll(1, 1)
    logp = log_pi.gather(-1, tokens[..., None])[..., 0]
    policy, _ = siren.policy_loss(logp, old_logp, adv, mask, max_tokens=max_tokens)
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


# ------------------------------------------------------------------------------------- 9. pass@k
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


# ------------------------------------------------------------------------------------ 10. maj@k
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


# ------------------------------------------------------------------------------------ 11. sampler
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
        fed = {"input_ids": inputs if cached else ids, "attention_mask": seen, "use_cache": cached}
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
        if not going.any():
            break
        inputs, ids = token, torch.cat([ids, token], 1)
        seen = torch.cat([seen, seen.new_ones(size, 1)], 1)
    tokens, mask, logp = (torch.stack(x, 1) for x in zip(*columns))
    if slip == "mask of tokens that are not pad":
        mask = tokens != pad_id
    return siren.Rollout(prompt, prompt_mask, tokens, mask, logp)


# --------------------------------------------------------------------------------- the table of all

Wrong = tuple[str, str, dict[str, Callable], str, str]  # exercise, name, changes, test, words


def each(exercise: str, *told: tuple[Callable, str] | tuple[Callable, str, str]) -> list[Wrong]:
    """(wrong function, words of the message, and the test if it is not test_exN_...)."""
    name, usual = EXERCISES[exercise][0], first_test(exercise)
    rows = []
    for function, words, *test in told:
        title = function.__name__.replace("_", " ")
        rows.append((exercise, title, {name: function}, test[0] if test else usual, words))
    return rows


def slips(exercise: str, function: Callable, told: dict[str, str | tuple[str, str]]) -> list[Wrong]:
    """told: slip of the function -> words of the message, and the test if it is another."""
    name, usual, rows = EXERCISES[exercise][-1], first_test(exercise), []
    for slip, words in told.items():
        words, test = words if isinstance(words, tuple) else (words, usual)

        def wrong(*args: Any, slip: str = slip, **given: Any) -> Any:
            return function(*args, **given, slip=slip)

        rows.append((exercise, slip, {name: wrong}, test, words))
    return rows


def first_test(exercise: str) -> str:
    """The exercise's test on small numbers, the first that a student meets."""
    return next((name for name in vars(graders) if name.startswith(f"test_{exercise}_")), "")


WRONG: list[Wrong] = [
    *each(
        "ex1",
        (baseline_of_the_batch, "own group, not of the batch"),
        (divided_by_the_std, "no division by the standard deviation"),
        (interleaved_groups, "a group is consecutive rows"),
        (leave_one_out_baseline, "includes the response itself"),
        (rewards_overwritten, "rewards was written to"),
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
            "padding in the mean": ("padding reaches the loss", "test_ex2_masks_and_means"),
            "length normalisation": ("each response's own length", "test_ex2_masks_and_means"),
            "mean over tokens": ("not by the number of tokens", "test_ex2_masks_and_means"),
            "empty responses in the mean": ("leave out empty", "test_ex2_masks_and_means"),
            "only responses with a signal in the mean": (
                "a response counts although its advantage is 0",
                "test_ex2_masks_and_means",
            ),
            "clip fraction counts advantages of 0": "where the clipped term is the smaller one",
            "clip fraction over padding": ("tokens in the mask", "test_ex2_masks_and_means"),
            "masked after the arithmetic": ("NaN * 0 is NaN", "test_ex2_masks_and_means"),
        },
    ),
    *each(
        "ex3",
        (exclusive_nucleus, "your nucleus leaves out the token that crosses p"),
        (exclusive_nucleus, "your nucleus leaves out", "test_nucleus_is_minimal_and_reaches_p"),
        (left_in_sorted_order, "map the mask back from the sorted order"),
        (never_sorted, "sort by probability"),
        (one_token_too_many, "your nucleus is not the smallest"),
        (no_softmax, "your nucleus is not the smallest|logits are not probabilities"),
        (threshold_keeps_ties, "no threshold on pi"),
        (tail_lost_at_p_1, "top_p = 1 keeps every token", "test_nucleus_against_oracle"),
        (rounded_away_at_p_1, "even one whose pi is rounded to 0"),
        (ascending_without_p_1, "even one whose pi is rounded to 0"),
        (another_dimension, "work along the last dimension"),
    ),
    *each(
        "ex4",
        (not_renormalised, "renormalise on the nucleus"),
        (log_of_pi_instead_of_q, "log q, not log pi"),
        (entropy_of_the_vocabulary, "tokens outside the nucleus count"),
        (bits, "natural logarithm, not log2"),
        (logits_masked_with_0, "it must be -inf"),
        (nan_in_the_sum, "0 * log 0 is NaN"),
        (detached_entropy, "H' has no gradient", "test_closed_form_gradient"),
        (nan_in_the_gradient, "0 * log 0 in the backward pass"),
        (detached_normaliser, "was a part detached", "test_gradcheck_nucleus_entropy"),
        (epsilon_in_the_log, "H' of exactly 0", "test_vectors"),
    ),
    *each(
        "ex5",
        (quantile_of_the_batch, "your quantile is over the batch"),
        (mask_not_anded, "AND with the mask"),
        (padding_in_the_quantile, "padding is not part of the quantile"),
        (above_the_quantile_only, "what equals the quantile is a peak"),
        (zeros_are_peaks, "a peak also needs H' > 0"),
        (quantile_not_interpolated, "interpolated linearly"),
        (entropy_overwritten, "entropy was written to"),
        (a_threshold_above_0, "H' > 0, however small"),
        (quantile_0_not_off, "every token of the response is a peak"),
    ),
    *each(
        "ex6",
        (mean_over_all_peaks, "long responses don't weigh more"),
        (mean_over_tokens, "divide by the number of peaks, not by the length"),
        (division_by_no_peaks, "0 / 0"),
        (empty_responses_count, "a response without a token is left out"),
        (silent_responses_left_out, "a response without a peak counts 0"),
        (padding_in_the_mean, "AND with the mask"),
        (entropy_without_gradient, "was the entropy detached?"),
        (padding_times_0, "NaN * 0 is NaN"),
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
            "H_agg detached": ("was H_agg detached", "test_one_step_moves_entropy_to_the_anchor"),
        },
    ),
    *each(
        "ex8",
        (the_same_anchor_for_all, "must be H_agg - H*, that of ALL rows"),
        (gap_the_wrong_way_round, "mind the sign"),
        (the_gap_itself, "that is the gap"),
        (micro_and_whole_swapped, "that of the micro-batch, not of all rows"),
        (scaled_anchor, "h_micro - (the new anchor) = H_agg - H*"),
        (
            scaled_anchor,
            "the gap of each micro-batch",
            "test_gaps_of_micro_batches_are_the_minibatchs",
        ),
        (
            the_same_anchor_for_all,
            "depends on the micro-batch size|add up",
            "test_micro_batches_add_up",
        ),
    ),
    *each(
        "ex9",
        (biased_pass_at_k, "biased: 1 - (1 - c/n)^k draws with replacement"),
        (k_times_the_average, "counts a subset with two right ones twice"),
        (average_instead, "c/n is avg@k"),
        (all_wrong_instead, "the chance that all are wrong"),
        (any_of_all_n, "some of the n, not all"),
    ),
    *slips(
        "ex10",
        majority,
        {
            "a tie goes to the last given": ("tie: the answer given first", "test_maj_at_k"),
            "a tie counts as right": ("not the last or the correct", "test_maj_at_k"),
            "None votes": ("None is not a vote", "test_maj_at_k"),
            "an empty text is not a vote": ("an empty text is a vote", "test_maj_at_k"),
            "votes by value": ("votes are compared as they are given", "test_maj_at_k"),
            "more than half of the votes": ("tie: the answer given first", "test_maj_at_k"),
            "the first block alone": ("blocks of k", "test_maj_at_k"),
            "a last block that is not whole": ("last whole block", "test_maj_at_k"),
        },
    ),
    *slips(
        "ex11",
        slow_sampler,
        {
            "no cache": ("feed one token at a time", "test_ex11_cache"),
            "samples of a prompt far apart": ("i * samples + j", "test_ex11_prompts"),
            "prompt mask from ids": ("from positions, not from ids", "test_ex11_prompts"),
            "EOS not trained": ("EOS belongs to the response", "test_rollout_layout"),
            "mask of tokens that are not pad": ("EOS belongs", "test_rollout_layout"),
            "on and on after EOS": ("goes on after EOS", "test_rollout_layout"),
            "generator unused": ("draw with the generator", "test_sampling_repeats"),
            "the likeliest token instead of a draw": (
                "take the likeliest",
                "test_sampling_repeats",
            ),
            "attention to the padding": (
                "left padding",
                "test_sampled_logp_is_that_of_the_row_alone",
            ),
            "every new token at position 0": (
                "left padding",
                "test_sampled_logp_is_that_of_the_row_alone",
            ),
            "position ids count the padding": (
                "a row's own tokens",
                "test_position_ids_count_a_rows_own_tokens",
            ),
            "logp at temperature 1": (
                "of the distribution drawn from",
                "test_sampled_logp_is_that_of_the_row_alone",
            ),
        },
    ),
]


# -------------------------------------------------------------------------------- running a grader


def graders_of(exercise: str) -> list[str]:
    """The names of the tests that grade an exercise."""
    found = [name for name in vars(graders) if name.startswith("test_")]
    return [name for name in found if cases(name, exercise)]


def cases(test: str, exercise: str) -> list[dict[str, Any]]:
    """The arguments beside `impl` that pytest calls a grader with, where it grades the exercise."""
    marks = getattr(getattr(graders, test), "pytestmark", [])
    whole = any(mark.name == exercise for mark in marks)
    axes = []
    for mark in marks:
        if mark.name == "parametrize":
            names = [name.strip() for name in mark.args[0].split(",")]
            axes.append([(names, *unpacked(value, len(names))) for value in mark.args[1]])
    found = []
    for choice in itertools.product(*axes):
        if whole or any(mark.name == exercise for _, _, marks in choice for mark in marks):
            pairs = (zip(names, values) for names, values, _ in choice)
            found.append(dict(itertools.chain(*pairs)))
    return found


def unpacked(value: Any, count: int) -> tuple[Any, Any]:
    """(values, marks) of one entry of a parametrize."""
    if hasattr(value, "marks"):
        return value.values, value.marks
    return (value if count > 1 else [value]), ()


def grade(test: str, exercise: str, module: Any) -> None:
    """Run a grader's cases on a module, as pytest would."""
    torch.manual_seed(0)
    for given in cases(test, exercise):
        getattr(graders, test)(impl=module, **given)


def in_siren(**changes: Callable) -> SimpleNamespace:
    """siren.py with some functions replaced."""
    return SimpleNamespace(**{**vars(siren), **changes})


@pytest.mark.parametrize(
    "exercise, name, changes, test, words", WRONG, ids=[f"{row[0]}-{row[1]}" for row in WRONG]
)
def test_wrong_solution_is_caught_by_the_right_test(exercise, name, changes, test, words):
    assert cases(test, exercise), f"{test} is no test of {exercise}"
    with pytest.raises(AssertionError) as caught:
        grade(test, exercise, in_siren(**changes))
    said = str(caught.value)
    assert any(part in said for part in words.split("|")), f"another sentence: {said}"


@pytest.mark.parametrize("exercise", EXERCISES)
def test_at_least_four_wrong_solutions_an_exercise(exercise):
    assert len({name for row_of, name, *_ in WRONG if row_of == exercise}) >= 4


@pytest.mark.parametrize(
    "name, function",
    [
        ("policy_loss", clipped_loss),
        ("siren_loss", anchored_loss),
        ("maj_at_k", majority),
        ("sample", slow_sampler),
    ],
)
def test_without_its_slip_it_is_right(name, function):
    """So it is the slip that is caught."""
    for exercise in (exercise for exercise, names in EXERCISES.items() if name in names):
        for test in graders_of(exercise):
            grade(test, exercise, in_siren(**{name: function}))


@pytest.mark.parametrize("exercise", EXERCISES)
def test_siren_behind_the_students_signatures_passes(exercise):
    """siren.py solves every exercise; no grader uses an argument that student.py does not have."""

    def behind(name: str) -> Callable:
        solution, signature = getattr(siren, name), inspect.signature(getattr(student, name))

        def checked(*args: Any, **given: Any) -> Any:
            signature.bind(*args, **given)  # TypeError: the student's function has no such argument
            return solution(*args, **given)

        return checked

    names = itertools.chain(*EXERCISES.values())
    module = SimpleNamespace(**{name: behind(name) for name in names})  # and nothing else of siren
    assert graders_of(exercise)
    for test in graders_of(exercise):
        grade(test, exercise, module)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_every_failure_has_a_sentence(exercise):
    tree = ast.parse((ROOT / "test_siren.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for test in graders_of(exercise):
        for node in ast.walk(functions[test]):
            assert not isinstance(node, ast.Assert) or node.msg, f"{test}, line {node.lineno}"


def test_student_file_has_every_exercise_in_order():
    text = (ROOT / "exercises" / "student.py").read_text(encoding="utf-8")
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    written = dict.fromkeys(itertools.chain(*EXERCISES.values()))  # as an ordered set
    assert [node.name for node in functions] == list(written)
    for node in functions:
        doc = ast.get_docstring(node)
        assert ">>> " in doc or node.name == "sample", f"{node.name}: a worked example"
        assert len(node.body) == 2 and isinstance(node.body[1], ast.Raise), f"{node.name}: a body"
        assert all(argument.annotation for argument in node.args.args + node.args.kwonlyargs)


def test_worked_examples_hold_for_siren():
    solutions = {name: getattr(siren, name) for name in itertools.chain(*EXERCISES.values())}
    runner, finder = doctest.DocTestRunner(), doctest.DocTestFinder()
    for name in solutions:
        (examples,) = finder.find(getattr(student, name), name, globs={**solutions, "torch": torch})
        runner.run(examples)
    assert runner.summarize(verbose=False) == (0, runner.tries) and runner.tries >= 10


def test_readme_has_every_exercise():
    text = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
    for exercise, names in EXERCISES.items():
        number = exercise[2:]
        (row,) = re.findall(rf"^\| {number} \| \[.*\| [0-9]+ \|$", text, re.MULTILINE)
        assert f"`{names[0]}`" in row
        section = text.split(f"\n## {number}. ")[1].split("\n## ")[0]
        assert section.count("<details><summary>Hint</summary>") == 1
    flags = {flag.strip("-") for flag in re.findall(r"(?<!\S)`?--([a-z][a-z-]+)", text)}
    known = {field.name.replace("_", "-") for field in dataclasses.fields(siren.Config)}
    known |= {option.replace("_", "-") for option in toy_env.OPTIONS}
    assert flags <= known | {"impl", "help"}, f"unknown flags {flags - known}"


# ------------------------------------------------------------------------ as a student runs them


def run_graders(*words: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, as README has it."""
    command = [sys.executable, "-m", "pytest", "test_siren.py", "-q", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *words], capture_output=True, text=True, cwd=ROOT)


def test_untouched_file_fails_every_exercise_in_one_line():
    done = run_graders("--impl", "exercises/student.py")
    assert done.returncode == 1 and " passed" not in done.stdout.splitlines()[-1]
    for exercise, names in EXERCISES.items():
        line = f"not written yet: exercise {exercise[2:]}, {names[0]}"
        assert line in done.stdout, f"{line}: not in {done.stdout[-2000:]}"
    for noise in ("Traceback", "raise NotImplementedError", "test_siren.py:"):
        assert noise not in done.stdout


MINE = """
import torch
from siren import nucleus_entropy

def nucleus_mask(logits, top_p):
    p, order = logits.softmax(-1).sort(-1, descending=True)
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) <= top_p)

def pass_at_k(n, c, k):
    return c[0]

def maj_at_k(votes, answer, k):
    assert len(votes) % k == 7
"""


def test_one_file_with_all_that_can_happen(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    done = run_graders("--impl", str(path), "-m", "ex3 or ex4 or ex5 or ex9 or ex10")
    assert done.returncode == 1
    *_, three, four, five, nine, ten, _ = done.stdout.strip().splitlines()
    assert three.startswith("ex3") and "your nucleus leaves out the token that crosses p" in three
    assert four.startswith("ex4") and "failed" not in four, "an import from siren is a solution"
    assert five.startswith("ex5") and five.endswith("mine.py has no function peak_mask")
    assert nine.startswith("ex9") and "'int' object is not subscriptable" in nine
    assert ten.startswith("ex10") and ten.endswith("first: AssertionError")
    for line in ("return c[0]", "assert len(votes) % k == 7"):
        assert line in done.stdout, "the student's own error shows its line"


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "must be a Python file"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named"),
        ("def f(:", "SyntaxError: invalid syntax, line 1"),
    ],
)
def test_bad_file_is_one_clear_line(tmp_path, text, words):
    path = tmp_path / "mine.py"
    if text:
        path.write_text(text)
    done = run_graders("--impl", str(path))
    assert done.returncode == 4 and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
