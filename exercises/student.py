r"""SIREN, piece by piece: write the bodies. README.md beside this file has goals and hints.

    python -m pytest exercises --impl exercises/student.py -m ex1 -x

Letters: B responses, T response positions, V vocabulary. A batch holds responses of different
length, padded on the right; `mask` [B, T] (bool) is True on a response's own tokens, and a row
may be all False. Entropies are in nats (natural logarithm). Numbers that you return have the
dtype of the inputs, float64 in most tests. No function may write to its inputs.

To skip an exercise, replace its function by an import: `from exercises.reference import
nucleus_mask` (for exercise 12: `from exercises.qae import quantile_advantages, plug`; for 13
and 14: `from exercises.solutions import holm`).
"""

from __future__ import annotations

import torch

import siren  # siren.Rollout is what exercise 11 returns; exercise 12 replaces a function

Tensor = torch.Tensor


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Exercise 1. Advantages A_i = r_i - mean of its group's r (Dr.GRPO): better than usual?

    For one prompt, `group_size` responses are sampled, and each gets a reward r_i. A response
    with A_i > 0 beat the average of its group, and training will make it more likely; A_i < 0
    less. The mean is over the whole group, the response itself included, and nothing is
    divided by a standard deviation.

    rewards [B]: rows 0 .. group_size - 1 belong to the first prompt, the next group_size rows
    to the second, and so on. Returns the advantages, [B].

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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Exercise 2. The clipped policy loss of PPO, averaged in Dr.GRPO's way.

    logp [B, T]: log-probabilities of the sampled tokens under the model in training, with
    gradient; old_logp [B, T]: under the model that sampled them; adv [B]: A_i. The ratio of
    both,

        ratio_t = exp(logp_t - old_logp_t),

    says how far the model has moved since it sampled. Each token is worth

        gain_t = min(ratio_t A_i, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_i),

    Once the ratio is beyond the clip on the side that A_i asks for, the gain is constant and
    its gradient is 0. On the other side nothing is clipped. A loss is minimised, hence the
    sign:

        loss = -(1 / R) sum_i (1 / max_tokens) sum_t gain_t

    over the tokens in the mask. R is the number of responses that have a token: B, unless a
    row of the batch is empty. max_tokens, the response budget, is the same for all responses
    (None: T), so a token weighs the same in a short response as in a long one. The loss is 0,
    and so is its gradient, if no token is in the mask (T >= 1): `backward` must work there.
    On padding logp and old_logp may be any number, NaN too, and must reach neither the loss
    nor its gradient; adv is always finite.

    Returns (loss, stats). stats["clip_fraction"] is the share of the tokens in the mask for
    which the clipped term is strictly smaller (0 if there is no token). It may carry a
    gradient or not.

    >>> ratio = torch.tensor([[1.25, 1], [0.5, 9]])
    >>> mask = torch.tensor([[1, 1], [1, 0]]).bool()
    >>> adv = torch.tensor([1.0, -1.0])  # gains 1.2, 1 and -0.8: two of three are clipped
    >>> loss, stats = policy_loss(ratio.log(), torch.zeros(2, 2), adv, mask, max_tokens=4)
    >>> loss, stats["clip_fraction"]  # -(2.2 - 0.8) / 4 / 2
    (tensor(-0.1750), tensor(0.6667))
    """
    raise NotImplementedError("exercise 2, policy_loss")


def nucleus_mask(logits: Tensor, top_p: float) -> Tensor:
    """Exercise 3. The policy nucleus V_p: the fewest tokens whose probabilities reach top_p.

    pi = softmax(logits). Take the likeliest token, then the next, ... and stop as soon as the
    sum of their probabilities reaches top_p, 0 < top_p <= 1. The token that crosses top_p is
    inside, so the set is never empty. If equally likely tokens stand at the border, take only
    as many as are needed, whichever. A sum of exactly top_p has reached it: with 0.5, 0.3, 0.2
    and top_p = 0.5 one token is inside. (In floats 0.5 + 0.3 may come out just below 0.8, so
    that with top_p = 0.8 one token more is inside. Accept that; the tests do, too.) top_p = 1
    keeps every token, however unlikely; do not compare sums there, since a rounded sum reaches
    1 too early.

    logits [..., V], any number of leading dimensions -> bool [..., V], True inside, in the
    order of the token ids.

    >>> nucleus_mask(torch.tensor([0.15, 0.5, 0.1, 0.25]).log(), 0.8)  # .5 + .25 + .15 = .9
    tensor([ True,  True, False,  True])
    """
    raise NotImplementedError("exercise 3, nucleus_mask")


def nucleus_entropy(logits: Tensor, top_p: float) -> Tensor:
    """Exercise 4. H': how open the choice among the real options is.

        H' = -sum over V_p of q log q,    q = pi / pi(V_p)

    where V_p is the nucleus, pi(V_p) the sum of its probabilities, and so q is pi renormalised
    on the nucleus: it sums to 1 there. A nucleus of one token has H' = 0, exactly (or -0).

    logits [..., V], finite -> nats [...]. Differentiable: the gradient is that of the formula
    with the set V_p held fixed, so a logit outside the nucleus gets 0 (up to rounding), and no
    logit gets NaN.

    >>> nucleus_entropy(torch.tensor([0.6, 0.3, 0.06, 0.04]).log(), 0.8)  # q = 2/3, 1/3
    tensor(0.6365)
    >>> z = torch.tensor([0.6, 0.3, 0.06, 0.04]).log().requires_grad_()
    >>> torch.autograd.grad(nucleus_entropy(z, 0.8), z)[0].abs()  # |q (log q + H')|
    tensor([0.1540, 0.1540, 0.0000, 0.0000])
    """
    raise NotImplementedError("exercise 4, nucleus_entropy")


def peak_mask(entropy: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """Exercise 5. The peak-entropy mask: the positions where a response really forks.

    Let q_i be the quantile of response i's H' at the level `quantile` (0.8: about four fifths
    lie below), over its own tokens only, linearly interpolated as torch.quantile does. A
    position is a peak where all three hold:

        H' >= q_i,    H' > 0,    mask

    With quantile = 0 the result is the mask itself, also where H' = 0.

    entropy [B, T] (H', nats; on padding any number but NaN), mask [B, T] bool -> bool [B, T].
    An empty response has no peak.

    >>> h = torch.tensor([[0.1, 0.9, 0.5, 0.0], [0.2, 0.3, 7.0, 7.0]])
    >>> mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    >>> peak_mask(h, mask, 0.8)  # q = 0.66 and 0.28
    tensor([[False,  True, False, False],
            [False,  True, False, False]])
    """
    raise NotImplementedError("exercise 5, peak_mask")


def aggregate_entropy(entropy: Tensor, peak: Tensor, mask: Tensor) -> Tensor:
    """Exercise 6. H_agg: one number that says how much entropy the batch has at its forks.

    H_i is the mean of H' over response i's peaks, and H_agg the mean of H_i over the
    responses. A response that has tokens but no peak counts, with H_i = 0; one without a token
    is left out; with no response at all H_agg is 0, and so is its gradient: `backward` must
    work there, too.

    entropy [B, T], peak [B, T] bool, mask [B, T] bool -> scalar, differentiable. A peak
    outside the mask is not a peak. Padding may hold any number, NaN too, and must reach
    neither H_agg nor its gradient.

    >>> h = torch.tensor([[1.0, 3.0], [2.0, 0.0], [5.0, 5.0]])
    >>> mask = torch.tensor([[1, 1], [1, 0], [1, 1]]).bool()
    >>> peak = torch.tensor([[1, 1], [1, 0], [0, 0]]).bool()
    >>> aggregate_entropy(h, peak, mask)  # (2 + 2 + 0) / 3; one mean over all peaks would be 2
    tensor(1.3333)
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Exercise 7. SIREN: the policy loss plus beta * (H_agg - anchor)^2.

    The anchor H* is the H_agg that the model began with. The penalty pulls H_agg back to it
    from both sides: too little entropy costs, and so does too much. H_agg is made of exercises
    3 to 6; its gradient goes through H' at the peaks, not through the choice of nucleus and
    peaks.

    logits [B, T, V], where logits[:, t] predicts tokens[:, t]; so the logp of exercise 2 is
    the log-softmax of logits[:, t] at tokens[:, t]. tokens (ids), old_logp, mask [B, T], adv
    [B]. Returns (loss, stats); stats has "policy_loss", "regularizer_loss" (the penalty, with
    beta) and "h_agg" (H_agg). top_p is for the nucleus, peak_quantile for the peak mask,
    max_tokens for the policy loss. Their defaults here are the paper's; the toy world has its
    own, 0.85 and 0.6. Logits are finite everywhere; on padding old_logp may be NaN, and tokens
    are valid ids. With no token in the batch policy_loss and H_agg are 0, the penalty is beta
    * anchor^2 (any finite number passes), and the gradient is 0, not NaN. Values in stats may
    carry a gradient or not.

    >>> logits, tokens = torch.zeros(1, 2, 4), torch.tensor([[0, 1]])
    >>> old_logp, mask = torch.full((1, 2), 0.25).log(), torch.ones(1, 2).bool()
    >>> adv = torch.ones(1)
    >>> siren_loss(logits, tokens, old_logp, adv, mask, 0.0, beta=1.0)[0]  # -1 + (ln 4)^2
    tensor(0.9218)
    """
    raise NotImplementedError("exercise 7, siren_loss")


def micro_batch_anchor(
    h_micro: Tensor | float, h_agg: Tensor | float, anchor: float
) -> Tensor | float:
    """Exercise 8. Micro-batches that are exact: an anchor of its own for each of them.

    A mini-batch [B, T] that does not fit into memory is split by rows into micro-batches. Each
    has its own siren_loss and backward pass, and the gradients add up in .grad. Each loss is
    multiplied by its micro-batch's share of the responses, n / N. So what is added up is

        sum of n / N * (policy loss of the micro-batch + beta * (h_micro - anchor)^2)

    where h_micro is H_agg of the micro-batch's rows alone. For the policy loss this is right,
    for it is a mean over responses. H_agg is one, too: sum of n / N * h_micro = H_agg. The
    penalty is not: the mean of squares is larger than the square of the mean, and it depends
    on how the batch was cut.

    The way out: before any backward pass, one pass without gradient finds h_agg (H_agg of ALL
    rows) and each h_micro. Then each micro-batch gets an anchor of its own, such that its gap
    is that of the whole mini-batch:

        h_micro - (its anchor) = h_agg - anchor

    With it all penalties are beta * (H_agg - H*)^2, so that their mean is that as well; and
    their gradients, 2 beta (H_agg - H*) times that of h_micro, add up to that of the
    mini-batch.

    h_micro, h_agg, anchor: numbers without gradient, in nats. Returns the micro-batch's
    anchor.

    >>> micro_batch_anchor(1.5, 0.75, 1.0)  # the gap is -0.25: the anchor is above h_micro
    1.75
    """
    raise NotImplementedError("exercise 8, micro_batch_anchor")


def pass_at_k(n: int, c: int, k: int) -> float:
    """Exercise 9. pass@k: the chance that at least one of k samples is right.

    Estimated from n >= k samples of which c are right: draw k of these n without replacement;
    the chance that a right one is among them. This estimate is unbiased; 1 - (1 - c/n)^k is
    not. It must hold for large n too, such as n = 10000 and k = 100.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    raise NotImplementedError("exercise 9, pass_at_k")


def maj_at_k(votes: list[str | None], answer: str, k: int) -> float:
    """Exercise 10. maj@k: how often the majority of k samples gives the right answer.

    votes: the answers of all samples, in order; None is a response without an answer. They are
    cut into consecutive blocks of k; what is left beyond the last whole block is not used. In
    a block, the most frequent vote wins, also with less than half of the votes; of several
    equally frequent ones, the one that was given first. None is not a vote (an empty text is);
    in a block of None alone nobody wins. Votes are compared as they are given, not by their
    value as numbers. Returns the share of the blocks that `answer` wins.

    >>> maj_at_k([None, None, "7", "8", "8", "7"], "7", 3)  # won, lost
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
) -> siren.Rollout:
    """Exercise 11. Sample `samples` responses to each prompt, in one batch, with a KV cache.

    prompts: lists of token ids, of different lengths. Pad them on the left with pad_id, so
    that all of them end in the last column. A prompt may itself hold pad_id, so that
    prompt_mask is made of lengths, not of ids. Row i * samples + j of the batch is sample j of
    prompt i. Each token is drawn from softmax(logits / temperature) with torch.multinomial and
    the generator. A response ends with the first token of eos_ids, which belongs to it, or
    after max_tokens.

    The model (of transformers) is called by keywords:

        out = model(input_ids=ids,               # [rows, L], the new tokens only
                    attention_mask=seen,         # [rows, all columns so far]: 0 at padding
                    position_ids=positions,      # [rows, L]: a row's first real token has 0
                    past_key_values=cache,       # None, later the last out.past_key_values
                    use_cache=True)

    and out.logits [rows, L, V]. The first call takes the padded prompts, every later one a
    column: keys and values of what came before are in the cache.

    Returns siren.Rollout(prompt [B, P], prompt_mask [B, P], tokens, mask, logp [B, T]), with B
    = len(prompts) * samples and T at most max_tokens. tokens are pad_id after the end; masks
    are bool, True where there is a token, EOS included (not where an id differs from pad_id:
    pad may be EOS); logp: of the drawn tokens, at the same temperature, 0 on padding. No
    gradient.
    """
    raise NotImplementedError("exercise 11, sample")


def quantile_advantages(
    rewards: Tensor, group_size: int, algorithm: str = "dr_grpo", quantile: float = 0.4
) -> Tensor:
    """Exercise 12. QAE's advantages A_i = r_i - b: the baseline b is a quantile, not the mean.

    b is the K-quantile of the rewards of the response's group, K = `quantile`, 0 < K <= 1:

        b = the smallest reward x of the group with F(x) >= K,

    where F(x) is the share of the group's rewards that are <= x. So b is one of the rewards,
    and nothing is interpolated. With rewards 0 and 1, b is 0 while at least the share K is
    wrong: then only right responses have an advantage, +1. Above that b is 1, and only wrong
    ones have, -1.

    rewards [B], groups of consecutive rows as in exercise 1 -> A [B]. `algorithm` is there
    because siren.py passes it to whatever computes its advantages; here it is "dr_grpo" and
    changes nothing. F(x) = K counts as >= K, although floats are rounded: 0.28 * 25 is
    7.000000000000001.

    >>> quantile_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)  # F(0) = 3/4, so b = 0
    tensor([1., 0., 0., 0.])
    >>> quantile_advantages(torch.tensor([1.0, 1.0, 1.0, 0.0]), 4)  # F(0) = 1/4, so b = 1
    tensor([ 0.,  0.,  0., -1.])
    """
    raise NotImplementedError("exercise 12, quantile_advantages")


def plug(quantile: str = "0.4") -> None:
    """Exercise 12, continued: what makes this file a drop-in for siren.py.

        python research/plugs.py --plug exercises.student
        python research/plugs.py --plug exercises.student:quantile=0.6

    call it before training, the second one as plug(quantile="0.6"): options are text. It sets
    siren.group_advantages to a function that siren.training_step can call as

        siren.group_advantages(rewards, group_size, algorithm)

    and that computes quantile_advantages with this K.
    """
    raise NotImplementedError("exercise 12, plug")


def exploit(fault: str, prompt: str) -> str:
    r"""Exercise 13. Reward hacking: the cheapest response that a faulty verifier pays for.

    verifiers.py has six verifiers with a fault each; `fault` is the name of one of them, a key
    of VERIFIERS. They are called as verifier(prompt, response, answer). Prompts ask for a sum,
    a difference or a quotient:

        What is 8 + 3 + 1 + 5 + 2? Write the number into \boxed{} and end with <eos>.
        What is 22 / 7, to two digits after the point? Write ... (for "rounds")
        What is 3 - 7? Write ... (for "strips_signs": answers are below 0)
        Write ... What is 8 + 3? Somebody says \boxed{11}, right or wrong. (for "prompts_box")

    Return a response that the verifier accepts, although it is not what was asked for: a
    strict judge, who wants the right number in the last box of a response that ended, must
    refuse it. You see the prompt, but not the answer. For "anywhere" and
    "prompts_box" the response must be the same text for all prompts, and for "evaluates" it
    must come without computing anything; for "cut_off" it must be longer than BUDGET, and you
    may compute the answer; for "rounds" and "strips_signs" find
    something easier than the answer. A "prompts_box" exploit need not work where somebody is
    wrong. At most 400 characters.

    >>> exploit("strips_signs", r"What is 3 - 7? Write the number into \boxed{}.")
    '\\boxed{4} <eos>'
    """
    raise NotImplementedError("exercise 13, exploit")


def strict_verifier(prompt: str, response: str, answer: str) -> bool:
    r"""Exercise 13, continued: a verifier without the six faults.

    True if and only if all of this holds:

    - the response ended: its last word is <eos>; nothing counts in what was cut off;
    - it has a box of its own, whatever the prompt has. Of several boxes the last one counts,
      and if that one is never closed, none does;
    - the box holds one plain number, with blanks around it or without: an optional sign, the
      digits 0 to 9, and perhaps a point with digits behind it. Nothing is computed;
    - that number is the answer exactly: 19, +19 and 19.0 are the same, 3.14 and 3.1 are not,
      neither are 4 and -4.

    A response may be any text, of any length: the verifier never raises.

    >>> strict_verifier("What is 2 + 3?", r"2 + 3 = \boxed{5.0} <eos>", "5")
    True
    >>> strict_verifier("What is 2 + 3?", r"\boxed{2 + 3} <eos>", "5")
    False
    """
    raise NotImplementedError("exercise 13, strict_verifier")


def seed_differences(
    rows: list[dict[str, str]],
    method: str,
    other: str,
    score: str,
    grade: str = "hard",
    temperature: str = "0.6",
) -> list[float]:
    """Exercise 14. Statistics: two methods, seed by seed.

    rows: the lines of results/main.csv as csv.DictReader gives them, all values being texts,
    in any order: "method", "seed", "grade", "temperature" and the scores. A seed decides the
    world and its gaps, so that a seed that is hard for one method is hard for the other, too.
    Therefore subtract seed by seed, before anything else.

    Returns score(method) - score(other) for each seed that both have, in the order of the
    seeds as numbers; only rows of this grade and temperature count.

    >>> row = {"method": "a", "seed": "0", "grade": "hard", "temperature": "0.6", "maj": "0.5"}
    >>> seed_differences([row, row | {"method": "b", "maj": "0.25"}], "a", "b", "maj")
    [0.25]
    """
    raise NotImplementedError("exercise 14, seed_differences")


def bootstrap_interval(
    values: list[float], draws: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Exercise 14, continued: how far would the mean of other seeds have been from this one?

    The percentile bootstrap. Draw as many values as there are, with replacement, and take
    their mean; do so `draws` times. Of these means, the interval goes from the quantile (1 -
    confidence) / 2 to the quantile (1 + confidence) / 2. Use a random generator of your own,
    made from `seed`, and not the global one.

    >>> low, high = bootstrap_interval([0.0, 1.0] * 50)
    >>> 0.38 < low < 0.43 and 0.57 < high < 0.62  # 0.5 -+ 1.96 * 0.5 / sqrt(100)
    True
    """
    raise NotImplementedError("exercise 14, bootstrap_interval")


def pass_at_k_std(p: float, n: int, k: int) -> float:
    """Exercise 14, continued: how coarse is the pass@k of one prompt, from n samples?

    Each sample is right with probability p. The estimate is exercise 9's, 1 - C(n - c, k) /
    C(n, k), where the number c of right samples is random, with C(n, c) p^c (1 - p)^(n - c).
    Returns the standard deviation of this estimate. With n = k it is 0 or 1 and nothing in
    between; with more samples for the same k it is finer. n is at most 300.

    >>> round(pass_at_k_std(0.1, 8, 8), 3), round(pass_at_k_std(0.1, 64, 8), 3)
    (0.495, 0.147)
    """
    raise NotImplementedError("exercise 14, pass_at_k_std")


def repeats_needed(std: float, difference: float) -> int:
    """Exercise 14, continued: how many seeds, or prompts, show a difference of this size?

    std: the standard deviation of the paired differences over seeds (or of a prompt's score).
    With N of them the mean has the standard error std / sqrt(N). A test with 5 % error, of
    both sides, finds a true difference with a power of 80 % if the difference is 1.959964 +
    0.841621 standard errors or more. Returns the smallest whole N for which that holds, but
    at least 2. (For small N a little more is needed, since the std is an estimate itself.)

    >>> repeats_needed(0.15, 0.05)
    71
    """
    raise NotImplementedError("exercise 14, repeats_needed")


def holm(p_values: list[float]) -> list[float]:
    """Exercise 14, continued: Holm's correction, for whoever makes many comparisons.

    Of 20 comparisons of equals one has p < 0.05 by chance. Holm multiplies the smallest of m
    p-values by m, the next one by m - 1, ... and the largest by 1. None may become smaller
    than the one before it in this order, nor larger than 1. Returns the corrected values, in
    the order in which they were given.

    >>> holm([0.01, 0.04, 0.03])  # 0.03, then 0.06, then max(0.04, 0.06)
    [0.03, 0.06, 0.06]
    """
    raise NotImplementedError("exercise 14, holm")
