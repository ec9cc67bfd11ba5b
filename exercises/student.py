r"""SIREN, piece by piece: write the bodies. README.md beside this file says how and why.

    python -m pytest test_siren.py --impl exercises/student.py -m ex1

Letters: B responses, T response positions, V vocabulary. Entropies are in nats (natural logarithm).
To skip an exercise, replace its function by an import: `from siren import nucleus_mask`.
No function may write to its inputs.
"""

from __future__ import annotations

import torch

from siren import Rollout  # what exercise 11 returns

Tensor = torch.Tensor


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Exercise 1. A_i = r_i - mean of its group's r (Dr.GRPO): better than usual, or worse?

    rewards [B]: each `group_size` consecutive rows are the responses to one prompt. Returns [B].

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    """
    raise NotImplementedError("exercise 1, group_advantages")


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    max_tokens: int | None = None,
    whole: dict[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Exercise 2. The clipped policy loss of Dr.GRPO:

        loss = -(1 / R) sum_i (1 / max_tokens) sum_t min(r_t A_i, clip(r_t, 1 - lo, 1 + hi) A_i)

    with the ratio r_t = exp(logp - old_logp) and R the number of responses that have a token.
    logp, old_logp, mask [B, T] (mask bool: True on the response), adv [B]; max_tokens: the response
    budget, T if it is None. Padding (mask False) may hold anything, NaN too, and must not matter.
    Returns (loss, stats); stats["clip_fraction"]: the share of response tokens for which the
    clipped term is the smaller one. whole: ignore it until exercise 8.

    >>> logp, old_logp = torch.tensor([[0.5]]).log(), torch.tensor([[0.4]]).log()  # ratio 1.25
    >>> policy_loss(logp, old_logp, torch.tensor([1.0]), torch.ones(1, 1).bool())[0]
    tensor(-1.2000)
    """
    raise NotImplementedError("exercise 2, policy_loss")


def nucleus_mask(logits: Tensor, top_p: float) -> Tensor:
    """Exercise 3. The policy nucleus V_p: the fewest tokens whose probabilities sum to >= top_p.

    logits [..., V] -> bool [..., V]. The token that crosses top_p is inside: never an empty set.

    >>> nucleus_mask(torch.tensor([0.15, 0.5, 0.1, 0.25]).log(), 0.8)
    tensor([ True,  True, False,  True])
    """
    raise NotImplementedError("exercise 3, nucleus_mask")


def nucleus_entropy(logits: Tensor, top_p: float) -> Tensor:
    """Exercise 4. H' = -sum over V_p of q log q, with q = pi / pi(V_p): pi renormalised on V_p.

    logits [..., V] -> nats [...]. Differentiable with respect to the logits inside V_p; those
    outside get a gradient of exactly 0 (the choice of the set is not differentiated). A nucleus of
    one token has H' = 0, exactly.

    >>> nucleus_entropy(torch.tensor([0.6, 0.3, 0.06, 0.04]).log(), 0.8)
    tensor(0.6365)
    """
    raise NotImplementedError("exercise 4, nucleus_entropy")


def peak_mask(entropy: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """Exercise 5. The peak-entropy mask: where H' is among the highest of its own response.

    entropy [B, T] (H', nats), mask [B, T] bool -> bool [B, T]. True where H' >= q and H' > 0 and
    mask, with q the `quantile` of H' over the response's own tokens, linearly interpolated (as
    torch.quantile does). A response may be empty: then nothing of it is a peak.

    >>> peak_mask(torch.tensor([[0.1, 0.9, 0.5, 0.0]]), torch.ones(1, 4).bool(), 0.8)
    tensor([[False,  True, False, False]])
    """
    raise NotImplementedError("exercise 5, peak_mask")


def aggregate_entropy(entropy: Tensor, peak: Tensor, mask: Tensor) -> Tensor:
    """Exercise 6. H_agg: the mean over responses of H_i, the mean of H' over the response's peaks.

    entropy, peak (bool), mask (bool) [B, T] -> scalar. A response without a peak counts 0; one
    without a token (an empty row of mask) is left out; no response at all: 0.

    >>> h, mask = torch.tensor([[1.0, 3.0], [2.0, 0.0]]), torch.tensor([[1, 1], [1, 0]]).bool()
    >>> aggregate_entropy(h, h >= 2, mask)  # (3 + 2) / 2
    tensor(2.5000)
    """
    raise NotImplementedError("exercise 6, aggregate_entropy")


def siren_loss(
    logits: Tensor,
    tokens: Tensor,
    old_logp: Tensor,
    adv: Tensor,
    mask: Tensor,
    anchor: float,
    *,
    beta: float,
    top_p: float = 0.8,
    peak_quantile: float = 0.8,
    max_tokens: int | None = None,
    whole: dict[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Exercise 7. SIREN: the policy loss + beta * (H_agg - anchor)^2.

    logits [B, T, V]: logits[:, t] predicts tokens[:, t]; tokens, old_logp, mask [B, T], adv [B].
    logp of the tokens is the log-softmax of the logits at the tokens. Returns (loss, stats); stats:
    "policy_loss", "regularizer_loss" and "nucleus_entropy" (H_agg). whole: for exercise 8.

    >>> logits, tokens = torch.zeros(1, 2, 4), torch.tensor([[0, 1]])
    >>> old_logp, mask = torch.full((1, 2), 0.25).log(), torch.ones(1, 2).bool()
    >>> siren_loss(logits, tokens, old_logp, torch.zeros(1), mask, 0.0, beta=1.0)[0]  # (ln 4)^2
    tensor(1.9218)
    """
    raise NotImplementedError("exercise 7, siren_loss")


def minibatch_totals(
    nucleus_entropy: Tensor, mask: Tensor, peak_quantile: float
) -> dict[str, Tensor]:
    """Exercise 8. What each micro-batch must know of the whole mini-batch [B, T], no gradient:

    "responses": how many have a token, "tokens": how many there are, "h_agg": H_agg of all rows.

    Then give policy_loss and siren_loss their argument `whole`, this dictionary: the losses (and
    stats) of the micro-batches must *add up* to the mini-batch's, and so must the gradients. Hint:
    the gradient of (H_agg - H*)^2 is 2 (H_agg - H*) times that of H_agg, and H_agg is a sum over
    responses divided by their number.

    >>> minibatch_totals(torch.tensor([[1.0, 2.0]]), torch.ones(1, 2).bool(), 0.8)["h_agg"]
    tensor(2.)
    """
    raise NotImplementedError("exercise 8, minibatch_totals")


def pass_at_k(n: int, c: int, k: int) -> float:
    """Exercise 9. The chance that k samples, drawn without putting back from n samples of which c
    are right, hold a right one (k <= n). Unbiased, unlike 1 - (1 - c / n)^k.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    raise NotImplementedError("exercise 9, pass_at_k")


def maj_at_k(votes: list[str | None], answer: str, k: int) -> float:
    """Exercise 10. The share of the consecutive blocks of k votes whose majority is `answer`.

    The most frequent vote of a block wins; of several, the one that was given first. None (a
    response without an answer) is no vote and never wins. Votes beyond the last block are unused.

    >>> maj_at_k([None, None, "7", "8", "8", "7"], "7", 3)
    0.5
    """
    raise NotImplementedError("exercise 10, maj_at_k")


def sample(
    model: torch.nn.Module,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    eos_ids: list[int],
    pad_id: int,
    samples: int = 1,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Exercise 11. Sample `samples` responses to each prompt, in one batch, with a KV cache.

    prompts: lists of token ids of different lengths; pad them on the left with pad_id, and hide the
    padding from the model (attention_mask, position_ids). Row i * samples + j of the result is
    sample j of prompt i. Each token is drawn from softmax(logits / temperature), with the
    generator; a response ends with a token of eos_ids, which belongs to it, or after max_tokens.
    The model is called as model(input_ids=..., attention_mask=..., position_ids=...,
    past_key_values=..., use_cache=True); its result has .logits [rows, length, V] and
    .past_key_values. After the prompt, feed one token at a time.

    Returns Rollout(prompt [B, P], prompt_mask [B, P], tokens [B, T], mask [B, T], logp [B, T]): ids
    padded with pad_id; masks bool, True where there is a token (not where an id equals pad_id: it
    may be EOS); logp of the drawn tokens at the same temperature, 0 on padding. No gradient.
    """
    raise NotImplementedError("exercise 11, sample")
