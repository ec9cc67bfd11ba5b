"""SIREN in one file: reinforcement learning that keeps the answers of a model diverse.
Jiang et al., "Rethinking Entropy Regularization in Large Reasoning Models", arXiv 2509.25133.

A model that is rewarded for right answers becomes more and more certain, until its samples are
copies of each other: its entropy collapses. Why each part of SIREN is there:
1. A bonus for entropy in the loss acts on the whole vocabulary, often 150,000 tokens. It lifts
   thousands of useless tokens, and the entropy may explode. So SIREN restricts the actions:
   only the nucleus counts, the few likely tokens (top-p mask).
2. In most places of a response there is nothing to decide. More entropy there mostly means
   mistakes. So SIREN restricts the states: only the peaks count, the positions of a
   response with the highest entropy (peak-entropy mask).
3. A bonus pushes the entropy up without end. So SIREN has an anchor, the entropy that the
   model had before training, and pulls the entropy to it, up or down (self-anchored).

A response i has n tokens; pi is the policy at one of them, t: a distribution over all tokens.

    V_p     = the nucleus: the fewest tokens whose probabilities add up to p or more
    q       = pi on the nucleus, divided by the sum of these probabilities
    H'_t    = -sum over v in V_p of q_v log q_v, the entropy of q (H is that of pi)
    theta_i = the tau-quantile of the n values of H' in response i
    H_i     = the mean of H' over the peaks of response i, the tokens with H' >= theta_i
    H_agg   = the mean of H_i over the responses of a mini-batch
    H*      = the anchor: H_agg of all responses of the first step, before any update
    L       = L_DrGRPO + beta * (H_agg - H*)^2, to be minimised

L_DrGRPO is the policy loss of Dr.GRPO (arXiv 2503.20783), beta a weight. The authors use p =
tau = 0.8: about a fifth of the tokens are peaks. Both masks are computed from the current
policy at every update, without gradient. Responses are sampled from the whole policy, without
a mask. There is no KL term.

The toy task (toy_env.py) is to add up the numbers of a prompt, in any order. The base model
has learned it from examples with errors, such as 8 + 5 = 23, which it repeats. Other orders
avoid such a sum. A model that still tries many can find these, or at times the right sum.

    prompt      8 3 1 5 2 =                    one token is one number
    response    8 2 10 5 15 1 16 3 19 <eos>    8, plus 2 is 10, plus 5 is 15, plus 1 is 16, ...
    choices     ^ ^    ^    ^                  reward 1: the last number is the total

Only the four marked tokens are choices: which number of the prompt comes next. The others
follow from what is there: each sum, and the 3, which is the only number left.

    python siren.py                      # SIREN on the toy: one to two minutes on a CPU
    python siren.py --regularizer none   # Dr.GRPO alone: the entropy collapses
    # a bonus without the two masks: the entropy explodes
    python siren.py --regularizer bonus --top-p 1 --peak-quantile 0 --beta .02

The results are in README.md. If time is short, read sections 1 and 5. Shapes: B responses of
at most T tokens to prompts of at most P tokens; N response tokens in all; a vocabulary of V
tokens, K of them sorted; hidden states of D numbers. Entropies are in nats.
"""

import argparse
import dataclasses
import hashlib
import importlib
import inspect
import json
import random
import re
import sys
import time
from collections import Counter, namedtuple
from fractions import Fraction
from pathlib import Path
from urllib.parse import quote, unquote

import torch
from filelock import FileLock
from tqdm import tqdm


# ------------------------------------------------------------------------------- 1. the method
# === begin: copy from here (needs nothing but `import torch`) ===
def group_advantages(rewards, group_size, algorithm="dr_grpo"):
    """A_i = r_i - the mean r of its group: is response i better than usual for its prompt?
    rewards [B] (floats; the responses to a prompt are consecutive rows) -> A [B]. GRPO divides
    A by the standard deviation of the group as well; Dr.GRPO does not.
    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)  # the mean is 1/4
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    """
    require(algorithm in ("dr_grpo", "grpo"), f"algorithm {algorithm!r}: dr_grpo or grpo")
    whole = group_size > 1 and len(rewards) % group_size == 0
    finite = rewards.is_floating_point() and rewards.isfinite().all()
    rule = f"must be finite floats in whole groups of {group_size}, at least 2"
    require(whole and finite, f"{len(rewards)} rewards of {rewards.dtype}: {rule}")
    groups = rewards.view(-1, group_size)
    groups = groups - groups[:, :1]  # so that equal rewards give exactly 0
    adv = groups - groups.mean(1, keepdim=True)
    if algorithm == "grpo":
        adv = adv / (groups.std(1, keepdim=True) + 1e-6)
    return adv.view(-1)


def nucleus(log_pi, top_p):
    """The policy on its nucleus (top-p mask): log pi [..., V] -> log q [..., K], the likeliest
    token first, and -inf outside V_p. With p = 1 it is log pi itself, not sorted.
    >>> nucleus(torch.tensor([0.1, 0.6, 0.1, 0.2]).log(), 0.7).exp()  # 0.6 + 0.2 reach 0.7
    tensor([0.7500, 0.2500, 0.0000, 0.0000])
    """
    require(0 < top_p <= 1, f"top_p {top_p}: must be above 0 and at most 1")
    if top_p == 1:
        return log_pi  # no mask; below, a rounded sum might reach 1 before the last token
    log_pi = likeliest(log_pi, top_p)  # or: log_pi.sort(-1, descending=True).values
    pi = log_pi.detach().exp()  # in the example 0.6 0.2 0.1 0.1
    mass_before = pi.cumsum(-1) - pi  # the sum of the tokens before it: 0.0 0.6 0.8 0.9
    inside = log_pi.masked_fill(mass_before >= top_p, -torch.inf)
    return inside.log_softmax(-1)  # this subtracts log pi(V_p), so the q add up to 1


def entropy_of(log_q):
    """-sum of q log q over the last dimension, where 0 log 0 is 0."""
    finite = log_q.clamp(min=-1e30)  # since 0 * -inf is NaN
    with torch.autocast(log_q.device.type, enabled=False):  # it would round to 16 bits
        return -torch.linalg.vecdot(log_q.exp(), finite)  # the sum of the products


def token_stats(logits, tokens, top_p=0.8, temperature=1.0):
    """What the loss needs to know of each token: "logp", its log-probability, and
    "nucleus_entropy", H'. Two more are only for reports and have no gradient: "entropy", H
    over the whole vocabulary, and "nucleus_size", |V_p|. It takes logits [..., V] and the ids
    of the tokens [...] that they predict; each result has the shape [...].
    >>> stats = token_stats(torch.tensor([0.6, 0.3, 0.06, 0.04]).log(), torch.tensor(0))
    >>> stats["nucleus_entropy"]  # 0.6 + 0.3 reach p = 0.8, so q is 2/3 and 1/3
    tensor(0.6365)
    """
    require(tokens.shape == logits.shape[:-1], "tokens: [...], one for each logits [..., V]")
    wide = torch.promote_types(logits.dtype, torch.float32)  # half precision is too coarse
    log_pi = (logits.to(wide) / temperature).log_softmax(-1)  # [..., V]
    log_q = nucleus(log_pi, top_p)  # [..., K]
    stats = {"logp": log_pi.gather(-1, tokens[..., None])[..., 0]}
    stats["nucleus_entropy"] = entropy_of(log_q)
    stats["entropy"] = entropy_of(log_pi.detach())
    stats["nucleus_size"] = (log_q > -torch.inf).sum(-1)
    return stats


def peak_mask(entropy, mask, quantile):
    """The peak-entropy mask (the paper's Eq. 9): where a response has a real choice. entropy
    (H'), mask (bool, True at a response's own tokens) [B, T] -> bool [B, T]. quantile is tau:
    0.8 keeps about the highest fifth; 0 switches this mask off: every token is a peak.

        theta_i = sorted[j], where sorted has the n values of H' and j = ceil(tau * (n - 1))
        peak    = H' >= theta_i and H' > 0 (our own rule: a peak has at least two options)
    >>> h = torch.tensor([[0.1, 0.9, 0.5, 0.0]])  # sorted: 0.0 0.1 0.5 0.9
    >>> peak_mask(h, torch.ones(1, 4).bool(), 0.6)  # 0.6 * 3 is 1.8, so j is 2 and theta 0.5
    tensor([[False,  True,  True, False]])
    """
    require(mask.dtype == torch.bool and mask.shape == entropy.shape, "mask: bool, [B, T]")
    require(0 <= quantile <= 1, f"quantile {quantile}: must be 0 to 1")
    if quantile == 0 or mask.numel() == 0:
        return mask
    ordered = entropy.detach().masked_fill(~mask, torch.inf).sort(1).values  # padding last
    n = mask.sum(1, keepdim=True).cpu().double()  # [B, 1]; Apple's GPU has no float64
    j = (quantile * (n - 1) - 1e-9).ceil().clamp(min=0)  # 0.55 * 100 is 55.00000000000001
    theta = ordered.gather(1, j.long().to(ordered.device))  # [B, 1]
    low = (entropy < theta) | (entropy <= 0)
    return mask & ~low  # NaN is not low, so that H_agg shows it


def aggregate_entropy(entropy, peak, mask):
    """H_agg, a scalar: the mean over the responses of the mean of H' over a response's peaks.
    entropy (H'), peak, mask [B, T]. No peak counts as 0; a row of padding does not count.
    >>> h = torch.tensor([[1.0, 3.0], [2.0, 0.0]])
    >>> aggregate_entropy(h, peak=h >= 2, mask=torch.ones(2, 2).bool())  # (3 + 2) / 2
    tensor(2.5000)
    """
    peak = peak & mask
    h_i = torch.where(peak, entropy, 0.0).sum(1) / peak.sum(1).clamp(min=1)  # [B]
    return h_i.sum() / mask.any(1).sum().clamp(min=1)


def policy_loss(
    logp, old_logp, adv, mask, max_tokens, clip_low=0.2, clip_high=0.2, algorithm="dr_grpo"
):
    """L_DrGRPO, PPO's clipped loss, averaged as Dr.GRPO does -> (loss, stats):

        - mean over i of 1 / max_tokens * sum over t of
          min(ratio_t A_i, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_i)
    where ratio_t = exp(logp_t - old_logp_t): how much likelier the token has become since it
    was sampled. logp (with gradient), old_logp, mask (bool) [B, T]; adv (A) [B] or, for each
    token, [B, T]. max_tokens is the longest length allowed: a constant, so that every token
    has the same weight. GRPO divides by each response's own length instead.
    >>> logp, old_logp = torch.tensor([[0.5]]).log(), torch.tensor([[0.4]]).log()
    >>> one = torch.ones(1)  # 0.5 / 0.4 = 1.25 is clipped to 1.2
    >>> policy_loss(logp, old_logp, adv=one, mask=one[None].bool(), max_tokens=1)[0]
    tensor(-1.2000)
    """
    require(algorithm in ("dr_grpo", "grpo"), f"algorithm {algorithm!r}: dr_grpo or grpo")
    fits = logp.shape == old_logp.shape == mask.shape and mask.dtype == torch.bool
    fits = fits and adv.shape in (mask.shape, mask.shape[:1])
    require(fits, "logp, old_logp, mask (bool): [B, T] each; adv: [B] or [B, T]")
    require(max_tokens >= 1, f"max_tokens {max_tokens}: must be at least 1")
    adv = adv.detach() if adv.dim() == 2 else adv.detach()[:, None]  # [B, T] or [B, 1]
    log_ratio = torch.where(mask, logp - old_logp.detach(), 0.0).clamp(-20, 20)  # [B, T]
    ratio = log_ratio.exp()  # the clamp keeps it finite
    unclipped = ratio * adv
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * adv
    gain = torch.where(mask, torch.min(unclipped, clipped), 0.0).sum(1)  # [B]
    length = max_tokens if algorithm == "dr_grpo" else mask.sum(1).clamp(min=1)
    loss = -(gain / length).sum() / mask.any(1).sum().clamp(min=1)
    tokens = mask.sum().clamp(min=1)
    stats = {"clip_fraction": ((clipped < unclipped) & mask).sum() / tokens}
    # KL(old pi || pi), from ratio - 1 - log_ratio
    stats["approx_kl"] = (log_ratio.expm1() - log_ratio).detach().sum() / tokens
    return loss, stats


def siren_loss(loss, entropy, mask, anchor, beta, peak_quantile=0.8, regularizer="anchor"):
    """SIREN: a policy loss with the self-anchored regulariser -> (loss, stats).
    loss           a policy loss, a scalar with gradient: policy_loss's or any other
    entropy        [B, T] H' with gradient, the "nucleus_entropy" of token_stats
    mask           [B, T] bool, True at the tokens of the response
    anchor         H*: H_agg of all responses of the first step, before any update
    beta           the weight of the regulariser
    peak_quantile  tau; 0.8 in the paper
    regularizer    "anchor"; "bonus", -beta * H_agg, without an anchor; or "none"
    >>> h, mask = torch.tensor([[1.5, 0.0, 0.0, 0.0]]), torch.ones(1, 4).bool()
    >>> siren_loss(torch.tensor(0.0), h, mask, anchor=1.0, beta=2.0)[0]  # 2 * (1.5 - 1)^2
    tensor(0.5000)
    """
    known = regularizer in ("anchor", "bonus", "none")
    require(known, f"regularizer {regularizer!r}: must be anchor, bonus or none")
    peak = peak_mask(entropy, mask, peak_quantile)  # [B, T]
    h_agg = aggregate_entropy(entropy, peak, mask)
    extra = torch.zeros_like(h_agg)
    if regularizer == "anchor":
        extra = beta * (h_agg - anchor) ** 2
    if regularizer == "bonus":
        extra = -beta * h_agg
    stats = {"policy_loss": loss.detach(), "regularizer_loss": extra.detach()}
    stats |= {"h_agg": h_agg.detach(), "peak_fraction": peak.sum() / mask.sum().clamp(min=1)}
    return loss + extra, stats


# The rest of the block, for speed and errors, may be skipped.
def likeliest(log_pi, top_p, k=16):
    """log_pi.sort(-1, descending=True).values, but only its first k columns: mostly faster.
    Rows that need more to reach p are done again with 16 * k; the others then end in -inf."""
    k = min(k, log_pi.shape[-1])
    top = log_pi.topk(k).values
    short = top.detach().exp().sum(-1) < top_p  # the rows that need more
    if k < log_pi.shape[-1] and short.any():
        longer = likeliest(log_pi[short], top_p, 16 * k)
        top = torch.nn.functional.pad(top, (0, longer.shape[-1] - k), value=-torch.inf)
        top[short] = longer
    return top


def require(ok, rule):
    """If ok is False, refuse the input: a ValueError with the rule that it breaks."""
    if not ok:
        raise ValueError(rule)


# === end: copy to here ===
# Skip these two when you first read: they only save memory. For a large model copy them, too.
def in_parts(function, size, *tensors):
    """The same as function(*tensors), a dictionary of tensors, but `size` rows at a time. Of a
    part only the results stay in memory; backward() computes the rest again."""
    if len(tensors[0]) <= size:
        return function(*tensors)
    checkpoint = torch.utils.checkpoint.checkpoint
    parts = zip(*(tensor.split(size) for tensor in tensors))
    found = [checkpoint(function, *part, use_reentrant=False) for part in parts]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def stats_in_chunks(hidden, head, tokens, top_p, temperature, chunk=0):
    """The same as token_stats(head(hidden), tokens, ...), but `chunk` tokens at a time: hidden
    [N, D], tokens [N] -> [N] each. The model must not change logits after its head."""

    def stats_of(hidden, tokens):
        """token_stats of a chunk."""
        return token_stats(head(hidden), tokens, top_p, temperature)

    # 2 million logits fit the cache of a CPU, 64 million keep a GPU busy
    most = 2**21 if hidden.device.type == "cpu" else 2**26
    return in_parts(stats_of, chunk or max(1, most // len(head.weight)), hidden, tokens)


# --------------------------------------------------------------------------------- 2. settings
@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run. Each field is a flag: top_p is set by --top-p .8, for example.
    In brackets are the paper's settings, as its authors' script has them."""

    task: str = "toy_env"  # module of problems and model; toy_env:vocab=96 sets its vocab
    seed: int = 0  # of all random draws of the run
    steps: int = 200  # training steps: sample, verify, score, update
    # 256 responses = 32 prompts x 8                 a step samples, verifies and scores them
    # |----64----|----64----|----64----|----64----|  mini-batches of whole groups: one update
    # |-16-|-16-|-16-|-16-|                          --micro-batch-size 16, if memory is short
    prompts: int = 32  # prompts per step (paper: 128)
    group_size: int = 8  # responses per prompt (paper: 8)
    mini_batches: int = 4  # updates per step (paper: 16)
    micro_batch_size: int = 64  # responses scored at once; only rounding changes with it
    sample_batch: int = 1024  # responses sampled at once, in whole groups
    max_tokens: int = 16  # the longest response (paper: 3072)
    temperature: float = 1.0  # of the policy, in sampling and in the loss
    regularizer: str = "anchor"  # anchor (SIREN), bonus (without an anchor) or none
    # Why SIREN's three numbers differ from the paper's: beta depends on the task and on
    # max_tokens, by which the policy loss alone is divided (docs/beta.md). The first token is
    # one of up to five numbers, about equally likely, and p = 0.8 would drop one of five.
    # Four tokens of ten are choices: tau = 0.6
    beta: float = 0.2  # the weight of the regulariser (paper: 0.005)
    top_p: float = 0.85  # p of the nucleus; 1 switches the top-p mask off (paper: 0.8)
    peak_quantile: float = 0.6  # tau; 0 switches the peak-entropy mask off (paper: 0.8)
    anchor: float = 0.0  # H* itself, in nats; 0: H_agg of the first step
    algorithm: str = "dr_grpo"  # or grpo (see group_advantages and policy_loss)
    clip_low: float = 0.2  # pi / old pi is clipped at 1 - this
    clip_high: float = 0.2  # pi / old pi is clipped at 1 + this
    lr: float = 3e-4  # learning rate of AdamW (paper: 1e-6, for 7B parameters)
    warmup_steps: int = 5  # steps in which the learning rate rises to lr
    weight_decay: float = 0.0  # of AdamW (paper: 0.1)
    grad_clip: float = 1.0  # the largest norm of the gradient
    eval_every: int = 0  # steps between evaluations; 0: only before and after training
    eval_prompts: int = 128  # held-out prompts of each kind
    eval_samples: int = 16  # k: responses to each of them
    eval_temperature: float = 0.6  # of the policy in evaluations (as in the paper)
    out: str = ""  # folder of the run; by default runs/<regularizer>-seed<seed>
    save_every: int = 10  # steps between checkpoints
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to compute
    threads: int = 1  # of the CPU; one is the fastest for the toy
    chunk: int = 0  # tokens whose logits are in memory at once; 0: as many as are fast

    def __post_init__(self):
        require(self.regularizer in ("anchor", "bonus", "none"), "--regularizer: see --help")
        require(self.algorithm in ("dr_grpo", "grpo"), "--algorithm: see --help")
        may_be_0 = ["seed", "steps", "beta", "peak_quantile", "anchor", "clip_low"]
        may_be_0 += ["clip_high", "warmup_steps", "weight_decay", "eval_every", "chunk"]
        for name, value in vars(self).items():
            smallest = 1 if isinstance(getattr(type(self), name), int) else 1e-12
            least = 0 if name in may_be_0 else smallest
            most = 1 if name in ("top_p", "peak_quantile", "clip_low") else 1e9
            rule = f"--{name.replace('_', '-')} {value}: must be {least:g} to {most:g}"
            require(isinstance(value, str) or least <= value <= most, rule)
        require(self.group_size >= 2, f"--group-size {self.group_size}: must be at least 2")
        rule = f"--mini-batches {self.mini_batches}: must be at most --prompts"
        require(self.mini_batches <= self.prompts, rule)


# ---------------------------------------------------------------------------------- 3. sampler
# A task is what load(cfg, **options) of its module gives (toy_env.py, text_env.py). It has
# train_problems(n, key), heldout(n), build_model(), decode(ids), metrics(responses), pad_id,
# eos_ids; find_answer, equal and normalize may be None. A problem has a prompt (token ids) and
# an answer (a text).
class Rollout(namedtuple("Rollout", "prompt prompt_mask tokens mask logp")):
    """B prompts [B, P], padded on the left, and their responses (tokens) [B, T], padded on
    the right. The masks are False in the padding, whose id may be that of EOS. logp [B, T] is
    log pi of each token when it was drawn: other rounding than in `score`, so it is not
    used in the loss; text_env.py compares the two."""

    def rows(self, index):
        """A part of it, such as a mini-batch."""
        return Rollout(*(tensor[index] for tensor in self))

    def responses(self):
        """The token ids of each response, without padding."""
        return [ids[mask].tolist() for ids, mask in zip(self.tokens, self.mask)]


def draw(pi, generator):
    """A token for each row of pi [n, V], as from torch.multinomial, but with one random number
    u for a row instead of V: the first token at which the running sum of pi exceeds u."""
    total = pi.cumsum(-1)  # the last sum is 1, but for rounding
    u = torch.rand(len(pi), 1, device=pi.device, generator=generator)
    return torch.searchsorted(total, u * total[:, -1:], right=True).clamp(max=pi.shape[1] - 1)


def next_logits(model, cache, ids, attention_mask):
    """The logits [n, V] of the next token after what is in the KV cache and ids [n, l], which
    join it. attention_mask [n, all so far] is 0 at padding; positions are counted without it.
    """
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    inputs = {"attention_mask": attention_mask, "position_ids": positions, "use_cache": True}
    return model(ids, **inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()


@torch.no_grad()
def sample(model, task, problems, cfg, key, samples, temperature):
    """A Rollout of `samples` responses to each problem, side by side. Tokens are drawn from
    the whole policy, without a top-p mask. The text `key` is the seed of the draws."""
    from transformers import DynamicCache  # here, since the method needs only torch

    generator = torch.Generator(model.device).manual_seed(random.Random(key).getrandbits(63))
    eos = torch.tensor(task.eos_ids, device=model.device)
    prompts = [problem.prompt for problem in problems for _ in range(samples)]
    P = max(map(len, prompts))
    ids = torch.full((len(prompts), P + cfg.max_tokens), task.pad_id, device=model.device)
    attention_mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):  # padding | prompt | room for the response
        ids[i, P - len(prompt) : P] = torch.tensor(prompt)
        attention_mask[i, P - len(prompt) : P] = 1
    logp = torch.zeros(ids.shape, device=model.device)
    size = max(1, cfg.sample_batch // samples) * samples  # all responses to some prompts
    for rows in torch.arange(len(ids), device=model.device).split(size):
        # each prompt is read once; then logits and cache get a copy for each of its responses
        cache = DynamicCache(config=model.config)
        once = rows[::samples]
        logits = next_logits(model, cache, ids[once, :P], attention_mask[once, :P])
        copies = torch.arange(len(rows), device=model.device) // samples  # 0 0 0 1 1 1 2 ...
        logits = logits[copies]
        cache.reorder_cache(copies)  # its row i becomes what was row copies[i]
        active = rows  # those whose responses have not ended
        for t in range(P, ids.shape[1]):
            log_pi = (logits / temperature).log_softmax(-1)  # [active, V]
            tokens = draw(log_pi.exp(), generator)  # [active, 1]
            ids[active, t] = tokens[:, 0]
            attention_mask[active, t] = 1
            logp[active, t] = log_pi.gather(1, tokens)[:, 0]
            goes_on = (~torch.isin(tokens[:, 0], eos)).nonzero()[:, 0]
            if len(goes_on) == 0 or t == ids.shape[1] - 1:
                break
            if len(goes_on) < len(active):  # the others have ended: no more passes for them
                cache.reorder_cache(goes_on)
                active = active[goes_on]
            last = ids[active, t : t + 1]
            logits = next_logits(model, cache, last, attention_mask[active, : t + 1])
    mask = attention_mask.bool()
    end = P + mask[:, P:].any(0).sum()  # of the longest response
    return Rollout(ids[:, :P], mask[:, :P], ids[:, P:end], mask[:, P:end], logp[:, P:end])


# --------------------------------------------------------------------------------- 4. verifier
DIGITS = r"([0-9]+|[1-9][0-9]{0,2}(,[0-9]{3})+)"  # 1234 or 1,234
NUMBER = re.compile(rf"[+-]?({DIGITS}(\.[0-9]+)?|[0-9]+/0*[1-9][0-9]*)")  # -5, 1.5 or 3/4


def extract_answer(text, find_answer=None):
    r"""The content of the last outermost \boxed{...}, as language models give answers; None if
    it is never closed. Without a box: what find_answer finds, the task's own rule (in the toy
    the number before <eos>).
    >>> extract_answer(r"so \boxed{3}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    start = None  # of the last box's content, and then its end
    depth = 0  # how many braces are open in it
    for found in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text):  # \{ and \} are no braces
        word = found[0]
        box = word.startswith(r"\boxed")
        if box and depth == 0:  # it stands in no other box
            start = found.end()
        if box or (word == "{" and depth > 0):
            depth += 1
        if word == "}" and depth > 0:
            depth -= 1
            end = found.start()
    if start is None:
        return find_answer(text) if find_answer else None
    return text[start:end] if depth == 0 else None


def normalize(answer):
    """An exact number (2.50, 1,234 or 1/2), or else the text, stripped.
    >>> normalize(" -1,234.50"), normalize("2/4"), normalize("x + 1")
    (Fraction(-2469, 2), Fraction(1, 2), 'x + 1')
    """
    text = answer.strip()
    is_number = len(text) <= 100 and NUMBER.fullmatch(text)
    return Fraction(text.replace(",", "")) if is_number else text


def verify(response, answer, find_answer=None, equal=None):
    """Is the response right? A task may have its own rule, equal(given, answer), as for LaTeX.
    Whatever a response says, it is never run as code; the time is linear in its length."""
    given = extract_answer(response, find_answer)
    if given is None:
        return False
    return equal(given, answer) if equal else normalize(given) == normalize(answer)


# ---------------------------------------------------------------------------- 5. training step
def forward(model, rollout):
    """The hidden states [B, T, D] that predict the responses, by one pass without a cache."""
    if hasattr(model, "read_rollout"):  # text_env.py may add it: the same, but faster
        return model.read_rollout(rollout)
    ids = torch.cat([rollout.prompt, rollout.tokens], 1)  # [B, P + T]
    attention_mask = torch.cat([rollout.prompt_mask, rollout.mask], 1).long()
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"attention_mask": attention_mask, "position_ids": positions, "use_cache": False}
    hidden = model.base_model(ids, **inputs).last_hidden_state
    return hidden[:, rollout.prompt.shape[1] - 1 : -1]  # position t predicts token t + 1


def score_part(model, rollout, cfg):
    """token_stats of responses under the model as it is now: [B, T] each, 0 in padding."""
    mask = rollout.mask
    hidden = forward(model, rollout)[mask]  # [N, D], without padding
    head = model.get_output_embeddings()
    tokens = rollout.tokens[mask]  # [N]
    # the same as token_stats(head(hidden), tokens, cfg.top_p, cfg.temperature)
    stats = stats_in_chunks(hidden, head, tokens, cfg.top_p, cfg.temperature, cfg.chunk)
    zeros = torch.zeros_like(rollout.logp)
    return {k: zeros.to(x.dtype).masked_scatter(mask, x) for k, x in stats.items()}


def score(model, rollout, cfg):
    """The same as score_part, but a micro-batch at a time, since memory may be short."""

    def score_rows(*tensors):
        """score_part of a micro-batch."""
        return score_part(model, Rollout(*tensors), cfg)

    return in_parts(score_rows, cfg.micro_batch_size, *rollout)


def update(run, rollout, old_logp, adv):
    """One update of the weights with a mini-batch -> its metrics. The loss squares a mean over
    all of its responses, so those of micro-batches can't be added (see in_parts instead)."""
    cfg = run.cfg
    mask = rollout.mask
    now = score(run.model, rollout, cfg)  # [B, T] each, with gradient
    logp = now["logp"]
    h = now["nucleus_entropy"]
    loss, info = policy_loss(
        logp, old_logp, adv, mask, cfg.max_tokens, cfg.clip_low, cfg.clip_high, cfg.algorithm
    )
    loss, more_info = siren_loss(
        loss, h, mask, run.anchor, cfg.beta, cfg.peak_quantile, cfg.regularizer
    )
    run.optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.weights, cfg.grad_clip, error_if_nonfinite=True)
    run.optimizer.step()
    return {k: x.item() for k, x in (info | more_info | {"grad_norm": norm}).items()}


def training_step(run, step):
    """Sample, verify, score, update -> the metrics of the step."""
    cfg = run.cfg
    task = run.task
    key = f"{cfg.seed}/{step}"  # it decides every random draw of this step
    # 1. sample: group_size responses to each prompt
    problems = task.train_problems(cfg.prompts, key)
    rollout = sample(run.model, task, problems, cfg, key, cfg.group_size, cfg.temperature)
    # 2. verify: a reward for each response, compared with its group
    responses = rollout.responses()
    answers = [problem.answer for problem in problems for _ in range(cfg.group_size)]
    texts = [task.decode(ids) for ids in responses]
    right = [verify(x, y, task.find_answer, task.equal) for x, y in zip(texts, answers)]
    rewards = torch.tensor(right, device=run.model.device).float()  # [B]
    adv = group_advantages(rewards, cfg.group_size, cfg.algorithm)  # [B]
    # 3. score before any update: the old log-probabilities and, at first, the anchor
    with torch.no_grad():
        old = score(run.model, rollout, cfg)  # by the code of `update`, so ratios begin at 1
    peak = peak_mask(old["nucleus_entropy"], rollout.mask, cfg.peak_quantile)
    h_agg = aggregate_entropy(old["nucleus_entropy"], peak, rollout.mask).item()
    if run.anchor is None:
        run.anchor = h_agg  # H*: of all responses of the first step, before any update
    # 4. update: once for each mini-batch of whole groups, in random order
    run.optimizer.param_groups[0]["lr"] = cfg.lr * min(1.0, step / max(1, cfg.warmup_steps))
    order = list(range(cfg.prompts))
    random.Random(f"{key}/0").shuffle(order)  # `key` itself was that of the samples
    groups = torch.arange(len(adv)).view(-1, cfg.group_size)[order]  # [prompts, group_size]
    updates = []
    for mini_batch in groups.tensor_split(cfg.mini_batches):
        i = mini_batch.flatten()  # row numbers of responses
        updates.append(update(run, rollout.rows(i), old["logp"][i], adv[i]))
    # 5. measure (docs/metrics.md)
    metrics = {name: sum(x[name] for x in updates) / len(updates) for name in updates[0]}
    tokens = rollout.mask.sum().item()
    metrics["reward"] = rewards.mean().item()
    mixed = rewards.view(-1, cfg.group_size).std(1) > 0  # right and wrong responses
    metrics["mixed_groups"] = mixed.float().mean().item()  # only these have an advantage
    metrics["entropy"] = old["entropy"].sum().item() / tokens
    metrics["nucleus_size"] = old["nucleus_size"].sum().item() / tokens
    metrics["h_agg"] = h_agg  # of the whole rollout, before its updates
    metrics["anchor"] = run.anchor
    metrics["response_tokens"] = tokens / len(responses)
    metrics["ended_share"] = sum(ids[-1] in task.eos_ids for ids in responses) / len(responses)
    return metrics | task.metrics(responses)


# ------------------------------------------------------------------------------- 6. evaluation
def evaluate(model, task, problems, cfg):
    """Means over problems with k = eval_samples responses to each. avg@k is the share of right
    ones. maj@k is 1 if the most frequent answer is right (the first one in a tie). pass@k is 1
    if any answer is right. distinct@k is the share of different responses."""
    k = cfg.eval_samples
    total = Counter()
    rollout = sample(model, task, problems, cfg, f"{cfg.seed}/eval", k, cfg.eval_temperature)
    texts = [task.decode(ids) for ids in rollout.responses()]
    for i, problem in enumerate(problems):
        own = texts[i * k : (i + 1) * k]
        right = [verify(text, problem.answer, task.find_answer, task.equal) for text in own]
        given = [extract_answer(text, task.find_answer) for text in own]
        form = task.normalize or normalize  # 0.5 and 1/2 are votes for the same answer
        votes = Counter()
        for ok, answer in zip(right, given):
            if answer is not None:
                votes["right" if ok else f"wrong: {form(answer)}"] += 1
        total[f"avg@{k}"] += sum(right) / k
        total[f"maj@{k}"] += bool(votes) and votes.most_common(1)[0][0] == "right"
        total[f"pass@{k}"] += any(right)
        total[f"distinct@{k}"] += len(set(own)) / k
    return {name: value / len(problems) for name, value in total.items()}


# ------------------------------------------ 7. the run: nothing below this line is about SIREN
# the settings that may change when a run is resumed
MUTABLE = {"steps", "out", "save_every", "eval_every", "device", "chunk", "micro_batch_size"}
NO_SIGNAL = """no signal for ten steps: the rewards of every group are all alike. Perhaps the
problems are too hard or too easy; --max-tokens is too small, or the model has another EOS
(ended_share is low); the prompt asks for no \\boxed{}, or the answers have another form."""


class Run:
    """The state of a run, and its folder, which belongs to one process at a time."""

    def __init__(self, cfg, resume=False):
        self.cfg = cfg
        self.folder = folder_of(cfg)
        self.folder.mkdir(parents=True, exist_ok=True)
        # the error of a second process shows this name
        self.lock = FileLock(self.folder / "used by another process", timeout=0).acquire()
        free = resume or not (self.folder / "checkpoint.pt").exists()
        require(free, f"--out {self.folder}: holds a run; add --resume, or name another --out")
        module, options = module_and_options(cfg.task)
        try:
            self.task = importlib.import_module(module).load(cfg, **options)
        except (AttributeError, ImportError, TypeError) as error:
            raise ValueError(f"--task {cfg.task}: {error}") from error
        self.heldout = self.task.heldout(cfg.eval_prompts)  # name -> problems
        self.model = self.task.build_model().to(cfg.device).eval()  # eval: without dropout
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        options = {"weight_decay": cfg.weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW(self.weights, **options)
        self.anchor = cfg.anchor or None  # H*; None until the first step has been scored
        self.records = []  # the metrics of each step; step 0 is an evaluation alone
        if resume:
            self.restore(load_checkpoint(self.folder))

    def save(self):
        """Write the checkpoint: whole or not at all, even if the process is killed."""
        state = {"config": vars(self.cfg), "anchor": self.anchor, "records": self.records}
        state["world"] = getattr(self.task, "fingerprint", None)  # data and frozen weights
        state["model"] = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        state["optimizer"] = self.optimizer.state_dict()
        part = self.folder / "checkpoint.part"
        torch.save(state, part)
        with open(part, "ab") as file:
            file.write(hashlib.sha256(part.read_bytes()).digest())  # see load_checkpoint
        part.replace(self.folder / "checkpoint.pt")

    def restore(self, saved):
        """Go on from a checkpoint, in the same world and with the same settings."""
        for name in vars(self.cfg).keys() - MUTABLE:
            old = saved["config"][name]
            require(getattr(self.cfg, name) == old, f"--resume: --{name} was {old}; omit it")
        same = saved["world"] == getattr(self.task, "fingerprint", None)
        require(same, "--resume: the data or the model is not that of the run")
        self.model.load_state_dict(saved["model"], strict=False)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.anchor = saved["anchor"]
        self.records = saved["records"]


def module_and_options(task):
    """The parts of "toy_env:vocab=96,slip=.1": the module, and a dictionary of texts. In a
    value, % and a comma are written %25 and %2C, as in a web address."""
    module, _, options = task.partition(":")
    parts = [option.partition("=") for option in options.split(",") if option]
    return module, {name: unquote(value) for name, _, value in parts}


def with_flags(task, words):
    """The task with flags of its own: toy_env, --vocab 96 --slip=.1 -> the text above."""
    pairs = []
    words = iter(words)
    for word in words:
        flag, equals, value = word.partition("=")
        value = value if equals else next(words, None)
        rule = f"{word}: is no flag with a value, such as --vocab 96; see --help"
        require(flag.startswith("--") and value is not None, rule)
        pairs.append(f"{flag[2:].replace('-', '_')}={quote(value)}")
        if flag == "--model" and task == Config.task:
            task = "text_env"  # --model is a flag of this task alone
    return f"{task}{',' if ':' in task else ':'}{','.join(pairs)}"


def folder_of(cfg):
    """Where a run is written."""
    return Path(cfg.out or f"runs/{cfg.regularizer}-seed{cfg.seed}")


def load_checkpoint(folder):
    """What Run.save wrote; refused if a bit of it has changed."""
    path = Path(folder) / "checkpoint.pt"
    data = path.read_bytes()
    whole = hashlib.sha256(data[:-32]).digest() == data[-32:]
    require(whole, f"--resume: {path} is damaged; restore it, or name another --out")
    return torch.load(path, map_location="cpu", weights_only=True)


def train(run):
    """Train; return a record of each step. A step depends on the seed, its number and what is
    in the checkpoint. So a run that was stopped goes on to the same numbers (on a CPU)."""
    cfg = run.cfg
    torch.set_num_threads(cfg.threads)
    bar = tqdm(range(len(run.records), cfg.steps + 1), unit="step")
    path = run.folder / "metrics.jsonl"
    path.unlink(missing_ok=True)  # it is written anew, from the records
    with run.lock, open(path, "w") as log:
        log.writelines(json.dumps(record) + "\n" for record in run.records)
        for step in bar:
            record = {"step": step}
            start = time.perf_counter()
            if step > 0:
                record |= training_step(run, step)
                record["seconds"] = time.perf_counter() - start
                bar.set_postfix(reward=record["reward"], h_agg=record["h_agg"], refresh=False)
            if step in (0, cfg.steps) or (cfg.eval_every and step % cfg.eval_every == 0):
                for name, problems in run.heldout.items():
                    values = evaluate(run.model, run.task, problems, cfg)
                    record |= {f"{name}/{key}": value for key, value in values.items()}
            run.records.append(record)
            print(json.dumps(record), file=log, flush=True)
            if step % cfg.save_every == 0 or step == cfg.steps:
                run.save()
            if step % 10 == 0 and no_signal(run.records):
                bar.write(NO_SIGNAL, sys.stderr)
    return run.records


def no_signal(records):
    """Have ten steps taught nothing?"""
    return len(records) > 10 and not any(r.get("mixed_groups", 1) for r in records[-10:])


def report(records):
    """Print a table of the run."""
    print(f"{'':22}before   after   (training: first step, mean of the last ten)")
    for name in ("reward", "entropy", "h_agg", "anchor", *records[0]):
        values = [record[name] for record in records if name in record and name != "step"]
        last = values[-1:] if "/" in name else values[-10:]
        if values:
            print(f"{name:20}{values[0]:8.3f}{sum(last) / len(last):8.3f}")
    if no_signal(records):
        print(NO_SIGNAL)
    sys.stdout.flush()


def main(argv=None):
    """The command. A flag that is no field of Config belongs to the task. It exits with 0:
    done, 1: stopped by an error, 2: bad input, or 130: Ctrl-C."""
    parser = argparse.ArgumentParser("siren.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    # --help shows the lines of Config above, with their comments
    parser.description = inspect.getsource(Config).partition("\n    def")[0]
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    for field in dataclasses.fields(Config):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=field.type, default=argparse.SUPPRESS)  # only if given
    given, rest = parser.parse_known_args(argv)
    flags = vars(given)
    resume = flags.pop("resume")
    run = None
    try:
        if rest:
            flags["task"] = with_flags(flags.get("task", Config.task), rest)
        if resume:
            saved = load_checkpoint(folder_of(Config(**flags)))["config"]
            flags = saved | {"out": ""} | flags  # flags of now win; the folder may have moved
        run = Run(Config(**flags), resume)
        report(train(run))
    except BrokenPipeError:
        sys.stdout = None  # nobody reads the table any more
    except KeyboardInterrupt:
        parser.exit(130, "siren.py: interrupted; --resume goes on from the last checkpoint\n")
    except Exception as error:
        bad_input = run is None or isinstance(error, ValueError)  # or refused
        if not bad_input and not isinstance(error, MemoryError | OSError | RuntimeError):
            raise  # a mistake in the code: its traceback says where
        text = " ".join(str(error).split())
        parser.exit(2 if bad_input else 1, f"siren.py: {text}\n")


if __name__ == "__main__":
    sys.modules["siren"] = sys.modules["__main__"]  # a task that imports siren gets this file
    sys.path.append(str(Path(__file__).parent))  # where tasks are, also with python -I
    main()
