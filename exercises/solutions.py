"""Plain solutions of the exercises, as a student may write them, with a comment on each idea.

They are slower than siren.py, which also has to be fast on large vocabularies. Look at one
when you have solved its exercise, or when you have been stuck for longer than the minutes in
README.md.
"""

import functools
import math
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import torch

import siren
from exercises.verifiers import BUDGET


# ------------------------------------------------------------------------------- 1. advantages
def group_advantages(rewards, group_size):
    groups = rewards.view(-1, group_size)  # a prompt's responses lie side by side
    mean = groups.mean(
        dim=1, keepdim=True
    )  # [prompts, 1], so that it is subtracted row by row
    return (groups - mean).view(-1)


# ----------------------------------------------------------------------------- 2. clipped loss
def policy_loss(
    logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None
):  # fmt: skip
    # padding first: NaN would survive a multiplication by 0, also in the backward pass
    logp = torch.where(mask, logp, 0.0)
    old_logp = torch.where(mask, old_logp, 0.0)
    # a difference of logarithms, since a probability of exp(-900) is rounded to 0
    ratio = (logp - old_logp).exp()
    a = adv[:, None]  # [B, 1]: a response's advantage is that of each of its tokens
    free = ratio * a
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * a
    # the smaller one: a clip stops the step that A asks for, and never the way back
    gain = torch.min(free, clipped).masked_fill(~mask, 0.0)
    budget = mask.shape[1] if max_tokens is None else max_tokens
    responses = mask.any(dim=1).sum().clamp(min=1)  # without empty rows; never a division by 0
    loss = -gain.sum() / budget / responses
    hit = (clipped < free) & mask
    return loss, {"clip_fraction": hit.sum() / mask.sum().clamp(min=1)}


# --------------------------------------------------------------------------------- 3. nucleus
def nucleus_mask(logits, top_p):
    if top_p == 1:  # rounded sums reach 1 before the last tokens, so compare none
        return torch.ones_like(logits, dtype=torch.bool)
    pi, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    mass_before = pi.cumsum(dim=-1) - pi  # of the likelier tokens
    inside = mass_before < top_p  # true for the token that crosses p, too
    return torch.zeros_like(inside).scatter(-1, order, inside)  # back to the order of the ids


# ------------------------------------------------------------------------- 4. nucleus entropy
def nucleus_entropy(logits, top_p):
    inside = nucleus_mask(logits, top_p)
    log_q = logits.masked_fill(~inside, -torch.inf).log_softmax(dim=-1)  # renormalised
    # outside q = 0 and log q = -inf, and 0 * -inf is NaN: so 0 * 0, before multiplying
    return -(log_q.exp() * log_q.masked_fill(~inside, 0.0)).sum(dim=-1)


# -------------------------------------------------------------------------------- 5. peak mask
def peak_mask(entropy, mask, quantile):
    if quantile == 0:
        return mask
    peak = torch.zeros_like(mask)
    for i in range(len(mask)):  # each response has its own quantile
        own = entropy[i][mask[i]].detach()
        if len(own) > 0:
            theta = torch.quantile(own, quantile)
            # theta is 0 if most of H' are: then H' >= 0 says nothing, and H' > 0 does
            peak[i] = (entropy[i] >= theta) & (entropy[i] > 0) & mask[i]
    return peak


# ------------------------------------------------------------------------------ 6. aggregation
def aggregate_entropy(entropy, peak, mask):
    peak = peak & mask
    chosen = torch.where(peak, entropy, 0.0)  # not entropy * peak: padding may be NaN
    h_i = chosen.sum(dim=1) / peak.sum(dim=1).clamp(min=1)  # 0 for a response without a peak
    return h_i.sum() / mask.any(dim=1).sum().clamp(min=1)  # empty rows do not count


# --------------------------------------------------------------------------- 7. anchored loss
def siren_loss(
    logits, tokens, old_logp, adv, mask, anchor, *,
    beta, top_p=0.8, peak_quantile=0.8, max_tokens=None,
):  # fmt: skip
    log_pi = logits.log_softmax(dim=-1)
    logp = log_pi.gather(-1, tokens[..., None])[..., 0]  # of the sampled tokens, [B, T]
    policy, _ = policy_loss(logp, old_logp, adv, mask, max_tokens=max_tokens)
    entropy = nucleus_entropy(logits, top_p)
    peak = peak_mask(entropy, mask, peak_quantile)
    h_agg = aggregate_entropy(entropy, peak, mask)
    penalty = beta * (h_agg - anchor) ** 2  # from below and from above
    stats = {"policy_loss": policy, "regularizer_loss": penalty, "h_agg": h_agg}
    return policy + penalty, stats


# --------------------------------------------------------------------- 8. exact micro-batches
def micro_batch_anchor(h_micro, h_agg, anchor):
    return h_micro - (h_agg - anchor)  # such that h_micro minus it is the gap of the whole


# ---------------------------------------------------------------------------------- 9. pass@k
def pass_at_k(n, c, k):
    all_wrong = math.comb(n - c, k)  # subsets without a right sample
    return 1 - all_wrong / math.comb(n, k)  # a quotient of exact integers


# ---------------------------------------------------------------------------------- 10. maj@k
def maj_at_k(votes, answer, k):
    blocks = [votes[i : i + k] for i in range(0, len(votes) - k + 1, k)]  # whole ones
    won = 0
    for block in blocks:
        counts = Counter(vote for vote in block if vote is not None)
        if counts:
            winner, _ = counts.most_common(1)[0]  # of equals, the one that came first
            won += winner == answer
    return won / len(blocks)


# -------------------------------------------------------------------------------- 11. sampler
@torch.no_grad()
def sample(
    model, prompts, *, max_tokens, eos_ids, pad_id,
    samples=1, temperature=1.0, generator=None,
):  # fmt: skip
    rows = [prompt for prompt in prompts for _ in range(samples)]  # i * samples + j
    width = max(len(row) for row in rows)
    prompt = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])
    # from lengths, since a prompt may hold pad_id
    prompt_mask = torch.tensor([[False] * (width - len(r)) + [True] * len(r) for r in rows])
    seen = prompt_mask.long()  # 1 for each column that may be looked at
    new = prompt  # what is fed to the model: first the prompts, then a token for each row
    cache = None
    goes_on = torch.ones(len(rows), dtype=torch.bool)
    columns = []
    for _ in range(max_tokens):
        positions = (seen.cumsum(dim=1) - 1).clamp(min=0)[:, -new.shape[1] :]
        out = model(
            input_ids=new,
            attention_mask=seen,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        log_pi = (out.logits[:, -1] / temperature).log_softmax(dim=-1)
        token = torch.multinomial(log_pi.exp(), 1, generator=generator)  # [rows, 1]
        logp = log_pi.gather(1, token)[:, 0]
        columns.append(
            (token[:, 0].where(goes_on, pad_id), goes_on, logp.where(goes_on, 0.0))
        )  # rows that have ended get padding
        goes_on = goes_on & ~torch.isin(token[:, 0], torch.tensor(eos_ids))
        if not goes_on.any():
            break
        new = token
        seen = torch.cat([seen, torch.ones_like(token)], dim=1)
    tokens, mask, logp = (torch.stack(column, dim=1) for column in zip(*columns))
    return siren.Rollout(prompt, prompt_mask, tokens, mask, logp)


# --------------------------------------------------------------------- 12. a drop-in of yours
def quantile_advantages(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
    groups = rewards.view(-1, group_size)
    # F(x) >= K means that K * group_size rewards are at most x; 1e-9 against rounding upwards
    rank = math.ceil(quantile * group_size - 1e-9)
    b = groups.sort(dim=1).values[:, rank - 1 : rank]  # [groups, 1]
    return (groups - b).view(-1)


def plug(quantile="0.4"):
    siren.group_advantages = functools.partial(quantile_advantages, quantile=float(quantile))


# ------------------------------------------------------------------------ 13. reward hacking
def exploit(fault, prompt):
    task = re.search(r"What is (.*?)[?,]", prompt)[1]  # such as 8 + 3 + 1 or 22 / 7
    if fault == "anywhere":
        return " ".join(map(str, range(100)))  # one of them will be it
    if fault == "cut_off":
        total = sum(map(int, task.split(" + ")))
        return str(total).rjust(BUDGET) + "000"  # the cut makes the right number out of it
    if fault == "rounds":
        above, below = task.split(" / ")
        return rf"\boxed{{{round(int(above) / int(below))}}} <eos>"  # no long division
    if fault == "strips_signs":
        left, right = map(int, task.split(" - "))
        return rf"\boxed{{{abs(left - right)}}} <eos>"  # which one is larger? no matter
    if fault == "evaluates":
        return rf"\boxed{{{task}}} <eos>"  # the question is the answer
    return "I agree. <eos>"  # prompts_box: the last box is the prompt's own


def strict_verifier(prompt, response, answer):
    if response.split()[-1:] != ["<eos>"]:
        return False
    _, start, rest = response.rpartition(r"\boxed{")  # the last box, of the response alone
    content, closed, _ = rest.partition("}")
    if not start or not closed:
        return False
    # [0-9], for \d takes digits of other scripts, too; and a bound on the length, for Python
    # refuses to turn very long texts into numbers
    if len(content) > 1000 or not re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", content.strip(" ")):
        return False
    return Fraction(content.strip(" ")) == Fraction(answer)


# ------------------------------------------------------------------------------ 14. statistics
def seed_differences(rows, method, other, score, grade="hard", temperature="0.6"):
    found = {method: {}, other: {}}
    for row in rows:
        wanted = row["grade"] == grade and row["temperature"] == temperature
        if wanted and row["method"] in found:
            found[row["method"]][int(row["seed"])] = float(row[score])
    both = sorted(found[method].keys() & found[other].keys())
    return [found[method][seed] - found[other][seed] for seed in both]


def bootstrap_interval(values, draws=10_000, seed=0, confidence=0.95):
    rng = np.random.default_rng(seed)
    values = np.array(values)
    means = rng.choice(values, (draws, len(values))).mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def pass_at_k_std(p, n, k):
    mean = square = 0.0
    for c in range(n + 1):  # every number of right samples, with its probability
        chance = math.comb(n, c) * p**c * (1 - p) ** (n - c)
        estimate = pass_at_k(n, c, k)
        mean += chance * estimate
        square += chance * estimate**2
    return math.sqrt(max(0.0, square - mean**2))


def repeats_needed(std, difference):
    # difference = (1.96 + 0.84) * std / sqrt(N), solved for N
    needed = ((1.959964 + 0.841621) * std / difference) ** 2
    return max(2, math.ceil(needed))


def holm(p_values):
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for place, i in enumerate(order):
        factor = len(p_values) - place
        largest = max(largest, min(1.0, factor * p_values[i]))  # never below the one before
        corrected[i] = largest
    return corrected
