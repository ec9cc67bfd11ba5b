"""The right solutions: the functions of student.py, by those of siren.py where it has them.

To skip an exercise, import its function: `from exercises.reference import nucleus_mask`.
(Exercise 12 has a file of its own, qae.py.) Some functions take more options than the exercise
asks for; the tests of siren.py use them.
"""

import math
from collections import Counter
from types import SimpleNamespace

import torch

import siren
from siren import aggregate_entropy, group_advantages, peak_mask  # noqa: F401, for others


def policy_loss(logp, old_logp, adv, mask, *, max_tokens=None, **options):
    """siren.policy_loss; without max_tokens it divides by T."""
    if max_tokens is None:
        max_tokens = mask.shape[1]
    return siren.policy_loss(logp, old_logp, adv, mask, max_tokens, **options)


def nucleus_mask(logits, top_p):
    """Which tokens are in the nucleus? The likeliest ones, as many as siren.nucleus keeps."""
    log_pi = logits.log_softmax(-1)
    log_q = siren.nucleus(log_pi, top_p)
    count = (log_q > -torch.inf).sum(-1, keepdim=True)
    inside = torch.arange(logits.shape[-1]) < count  # in the order of the probabilities
    order = log_pi.argsort(-1, descending=True)
    return torch.zeros_like(inside).scatter(-1, order, inside)


def nucleus_entropy(logits, top_p):
    """H' by siren.token_stats, which wants a token; any will do."""
    return siren.token_stats(logits, logits.argmax(-1), top_p)["nucleus_entropy"]


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
    temperature=1.0,
    regularizer="anchor",
    **options,
):
    """SIREN from logits [B, T, V] -> (loss, stats). options: those of siren.policy_loss."""
    now = siren.token_stats(logits, tokens, top_p, temperature)  # [B, T] each
    options["max_tokens"] = max_tokens
    policy, stats = policy_loss(now["logp"], old_logp, adv, mask, **options)
    entropy = now["nucleus_entropy"]
    loss, more_stats = siren.siren_loss(
        policy, entropy, mask, anchor, beta, peak_quantile, regularizer
    )
    return loss, stats | more_stats


def micro_batch_anchor(h_micro, h_agg, anchor):
    """The anchor with which a micro-batch has the gap of the whole, h_agg - anchor.

    siren.py does without it: there the square is taken once, over all rows (siren.in_parts).
    """
    return h_micro - (h_agg - anchor)


def pass_at_k(n, c, k):
    """The share of the subsets of size k that have a right sample in them."""
    siren.require(1 <= k <= n, f"pass@{k} of {n} samples: k must be 1 to {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(votes, answer, k):
    """The share of the whole blocks of k votes that `answer` wins; in a tie the first wins."""
    siren.require(1 <= k <= len(votes), f"maj@{k} of {len(votes)} votes: k must be less")
    blocks = [votes[i : i + k] for i in range(0, len(votes) - k + 1, k)]
    won = 0
    for block in blocks:
        counts = Counter(vote for vote in block if vote is not None)
        won += bool(counts) and counts.most_common(1)[0][0] == answer
    return won / len(blocks)


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
    batch=1024,
):
    """siren.sample. A text decides what it draws: here a number that the generator draws."""
    task = SimpleNamespace(eos_ids=eos_ids, pad_id=pad_id)
    problems = [SimpleNamespace(prompt=prompt) for prompt in prompts]
    cfg = siren.Config(max_tokens=max_tokens, sample_batch=batch)
    key = str(torch.randint(2**62, (1,), generator=generator).item())
    return siren.sample(model, task, problems, cfg, key, samples, temperature)
