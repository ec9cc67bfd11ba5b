"""SIREN in one file: selective entropy regularisation for RL with verifiable rewards.

Jiang et al., "Rethinking Entropy Regularization in Large Reasoning Models", arXiv 2509.25133

    L = L_DrGRPO + beta * (H_agg - H*)^2     the self-anchored regulariser

    L_DrGRPO    the clipped policy-gradient loss, which makes better responses likelier
    V_p     the policy nucleus: the fewest tokens whose probabilities reach p in sum (top-p mask)
    H'_t    the entropy at position t of the policy pi, restricted to V_p and renormalised
    H_i     the mean of H'_t over the peaks of response i: the positions where H'_t is above 0 and
            reaches the tau-quantile of this response (peak-entropy mask)
    H_agg   the mean of H_i over the responses
    H*      the anchor: H_agg of the first batch, before any update

    python siren.py                      # SIREN on the toy task, one to two minutes on a CPU
    python siren.py --regularizer none   # Dr.GRPO alone: the entropy collapses
    python siren.py --regularizer bonus --top-p 1 --peak-quantile 0    # naive bonus: it explodes

B responses, T response positions, P prompt positions, V vocabulary, D hidden size; N tokens without
padding, n a part of them; entropies are in nats. No KL term, no reference model, no critic, as in
the paper; departures: docs/departures.md. Flags, checkpoints and locks: examples/engine.py.
"""

import dataclasses
import functools
import importlib
import math
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict
from fractions import Fraction
from typing import NamedTuple

import torch
from tqdm import tqdm


# ---------------------------------------------------------------------------------------- 1. config
class ConfigError(ValueError):
    """Bad input: the message has the value, the constraint and the fix."""


def knob(default, allowed, doc):
    """A field of Config. allowed: (low, high) of a number, both included; choices; or None."""
    return dataclasses.field(default=default, metadata={"allowed": allowed, "doc": doc})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run; `--help` prints these fields."""

    task: str = knob("toy_env", None, "module:key=value,...: the questions and the model")
    seed: int = knob(0, (0, 2**32), "every random draw is a function of the seed and the step")
    steps: int = knob(200, (0, 10**7), "training steps: sample, verify, score, update")
    prompts: int = knob(32, (1, 10**5), "prompts per step (paper: 128)")
    group_size: int = knob(8, (2, 10**4), "responses per prompt (paper: 8)")
    max_tokens: int = knob(16, (1, 10**6), "response budget: no response is longer")
    temperature: float = knob(1.0, (0.01, 100), "of the policy, in sampling and in the loss")
    sample_batch: int = knob(1024, (1, 10**6), "responses that are sampled at once")
    # SIREN
    regularizer: str = knob("anchor", ("anchor", "bonus", "none"), "see siren_loss")
    beta: float = knob(0.2, (0, 10**6), "weight of the regulariser (paper: 0.005, max_tokens 3072)")
    top_p: float = knob(0.85, (1e-6, 1), "p of the nucleus; 1 = no top-p mask (paper: 0.8)")
    peak_quantile: float = knob(0.6, (0, 1), "tau; 0 = no peak-entropy mask (paper: 0.8)")
    anchor: float | None = knob(
        None, (0, 100), "H* itself, in nats; None = H_agg of the first batch"
    )
    # policy gradient
    algorithm: str = knob("dr_grpo", ("dr_grpo", "grpo"), "grpo also divides by std and lengths")
    mini_batches: int = knob(4, (1, 10**5), "optimiser updates per step (paper: 16)")
    micro_batch_size: int = knob(
        64, (1, 10**6), "responses in memory at once; changes rounding only"
    )
    lr: float = knob(3e-4, (1e-12, 10**6), "AdamW's learning rate (paper: 1e-6, for a 7B model)")
    warmup_steps: int = knob(5, (0, 10**7), "steps in which lr rises; Adam's first ones are rough")
    weight_decay: float = knob(0.0, (0, 1), "AdamW's (paper: 0.1)")
    grad_clip: float = knob(1.0, (1e-6, 10**6), "largest global gradient norm")
    clip_low: float = knob(0.2, (0, 1), "PPO clip: pi / old_pi counts down to 1 - this")
    clip_high: float = knob(0.2, (0, 100), "PPO clip: pi / old_pi counts up to 1 + this")
    # evaluation
    eval_every: int = knob(0, (0, 10**7), "steps between evaluations; 0 = before and after only")
    eval_prompts: int = knob(128, (1, 10**6), "held-out prompts per set")
    eval_samples: int = knob(16, (1, 10**5), "k of avg@k, maj@k, pass@k and distinct@k")
    eval_temperature: float = knob(0.6, (0.01, 100), "the paper's")
    out: str = knob("", None, "run folder; empty = runs/<regularizer>-seed<seed>")
    save_every: int = knob(10, (1, 10**7), "steps between checkpoints")
    device: str = knob("auto", None, "auto, cpu, cuda, mps, ...")
    threads: int = knob(1, (0, 1024), "CPU threads; one is fastest for small models; 0 = all")
    chunk: int = knob(0, (0, 10**7), "tokens whose logits are in memory at once; 0 = by size")
    plug: str = knob("", None, "module:key=value,... whose plug() replaces functions of this file")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), field.metadata["allowed"]
            if allowed is None or value is None:
                continue
            choice = isinstance(allowed[0], str)
            if not (value in allowed if choice else allowed[0] <= value <= allowed[1]):
                rule = (" or " if choice else " to ").join(map(str, allowed))
                flag = "--" + field.name.replace("_", "-")
                raise ConfigError(f"{flag} {value}: must be {rule}; the default is {field.default}")
        if self.mini_batches > self.prompts:  # a prompt's responses stay together
            rule = f"must be at most --prompts, {self.prompts}; lower it"
            raise ConfigError(f"--mini-batches {self.mini_batches}: {rule}")


# --------------------------------------------------------------------------------------- 2. sampler
class Rollout(NamedTuple):
    """B sampled responses. Masks come from positions, never from token ids: pad may equal EOS."""

    prompt: torch.Tensor  # [B, P] ids, padded on the left
    prompt_mask: torch.Tensor  # [B, P] bool
    tokens: torch.Tensor  # [B, T] ids, padded on the right
    mask: torch.Tensor  # [B, T] bool, True up to and including EOS, which is trained too
    logp: torch.Tensor  # [B, T] log-probability when drawn; the loss uses that of a new pass

    def rows(self, index):
        """The b responses at index [b]."""
        return Rollout(*(tensor[index] for tensor in self))

    def responses(self):
        """The token ids of each response, without padding."""
        lengths = self.mask.sum(1).tolist()
        return [ids[:length] for ids, length in zip(self.tokens.tolist(), lengths)]


def draw(pi, generator):
    """A token for each row of pi [n, V]: the first whose running sum exceeds u times the whole."""
    mass = pi.cumsum(-1)
    u = torch.rand(len(pi), 1, device=pi.device, generator=generator)  # 0 <= u < 1
    return torch.searchsorted(mass, u * mass[:, -1:], right=True).clamp(max=pi.shape[1] - 1)


@torch.no_grad()
def sample(
    model, prompts, *, max_tokens, eos_ids, pad_id,
    samples=1, temperature=1.0, batch=1024, generator=None,
):  # fmt: skip
    """prompts: lists of token ids. Row i * samples + j of the Rollout is sample j of prompt i.

    About `batch` rows at a time. The samples of a prompt share one pass over it, and a row that has
    ended leaves the batch. No top-k, no top-p: what is scored later is what was sampled.
    """
    from transformers import DynamicCache  # here, since the method needs only torch

    device, width = next(model.parameters()).device, max(map(len, prompts))
    prompt = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompts], device=device)
    start = torch.tensor([width - len(ids) for ids in prompts], device=device)[:, None]
    prompt_mask = torch.arange(width, device=device) >= start  # [prompts, P]
    tokens = torch.full((len(prompts) * samples, max_tokens), pad_id, device=device)  # [B, T]
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    logp = torch.zeros_like(tokens, dtype=torch.float32)
    eos = torch.tensor(eos_ids, device=device)
    for some in torch.arange(len(prompts), device=device).split(max(1, batch // samples)):
        cache, seen = DynamicCache(config=model.config), prompt_mask[some].long()  # attention mask
        # positions count a row's own tokens only, or left padding would shift them
        ids, positions = prompt[some], (seen.cumsum(1) - 1).clamp(min=0)
        for t in range(max_tokens):
            logits = model(
                ids, attention_mask=seen, position_ids=positions, past_key_values=cache,
                use_cache=True, logits_to_keep=1,
            ).logits[:, -1].float()  # fmt: skip
            if t == 0:  # the prompts are read; now `rows` are the responses that have not ended
                cache.batch_repeat_interleave(samples)
                logits, seen = (x.repeat_interleave(samples, 0) for x in (logits, seen))
                rows = (some[:, None] * samples + torch.arange(samples, device=device)).view(-1)
            log_pi = (logits / temperature).log_softmax(-1)  # [n, V]
            ids = draw(log_pi.exp(), generator)  # [n, 1]
            tokens[rows, t], mask[rows, t] = ids[:, 0], True
            logp[rows, t] = log_pi.gather(1, ids)[:, 0]
            alive = (~torch.isin(ids[:, 0], eos)).nonzero()[:, 0]
            if len(alive) == 0:
                break
            if len(alive) < len(rows):
                cache.batch_select_indices(alive)
                rows, seen, ids = rows[alive], seen[alive], ids[alive]
            seen = torch.cat([seen, torch.ones_like(ids)], 1)
            positions = seen.sum(1, keepdim=True) - 1
    if logp.isnan().any():
        raise FloatingPointError("the model's logits are not finite")
    used = int(mask.any(0).sum())
    prompt, prompt_mask = (x.repeat_interleave(samples, 0) for x in (prompt, prompt_mask))
    return Rollout(prompt, prompt_mask, tokens[:, :used], mask[:, :used], logp[:, :used])


# -------------------------------------------------------------------------------------- 3. verifier
MAX_RESPONSE, MAX_ANSWER = 1_000_000, 200  # characters; a longer answer is compared as it stands
BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")
LAYOUT = re.compile(r"\\(?:left|right|displaystyle)\b|\\\\|\\[()\[\]!$%,;: ]|[$~\u2212]")
BECOMES = {"\\\\": "\\\\", "\\%": "%", "\u2212": "-"}  # a match of LAYOUT; all others, a space
FRACTION = re.compile(r"\\[dt]?frac ?(?:\{ ?(-?[0-9]+) ?\}|([0-9])) ?(?:\{ ?([0-9]+) ?\}|([0-9]))")
DIGITS = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]*)?"
NUMBER = re.compile(rf"([+-]? ?(?:{DIGITS}|[0-9]+ ?/ ?[0-9]+)) ?(%?)")


def extract_answer(response, answer_form=None):
    r"""The content of the last \boxed{...} with balanced braces; without one, what answer_form, a
    task's own rule, finds in the text; or None.

    >>> extract_answer(r"so \boxed{3}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    text = response[-MAX_RESPONSE:]
    opened = []  # for each open brace: where its content starts, or -1 if it is not a box
    start, end = -1, -1
    for found in BRACES.finditer(text):  # one pass, so the time is linear in the text
        if found[0].startswith(r"\boxed"):
            opened.append(found.end())
        elif found[0] == "{":
            opened.append(-1)
        elif found[0] == "}" and opened and (begin := opened.pop()) > start:
            start, end = begin, found.start()  # never where begin is -1; inner boxes win
    if start >= 0:
        return text[start:end]
    return answer_form(text) if answer_form else None


@functools.lru_cache(maxsize=10_000)
def normalize(answer):
    r"""What equal answers have in common: an exact number (Fraction), or else a text.

    A number is a sign, digits (also 1,234), decimals or a fraction (1/2, \frac{1}{2}), and %. All
    else is text, without spaces, except between two digits, and without braces around one token.

    >>> normalize(r"$-1{,}234.50$"), normalize(r"\dfrac{1}{2}"), normalize(r"50\%")
    (Fraction(-2469, 2), Fraction(1, 2), Fraction(1, 2))
    >>> normalize(r"\text{East}"), normalize("x^{2} + 1"), normalize("5 6")
    ('East', 'x^2+1', '5 6')
    """
    if len(answer) > MAX_ANSWER:
        return answer.strip()
    text = TEXT.sub(r" \1 ", answer.replace("{,}", ",").replace(r",\!", ","))
    text = LAYOUT.sub(lambda found: BECOMES.get(found[0], " "), text)
    text = re.sub(r"\{\s*([a-zA-Z0-9]|\\[a-zA-Z]+)\s*\}", r" \1 ", text)
    text = " ".join(text.split()).removesuffix(".").rstrip()
    # a fraction is set apart by spaces, so that it can't join what stands beside it
    number = NUMBER.fullmatch(FRACTION.sub(r" \1\2/\3\4 ", text).strip())
    if number:
        try:
            value = Fraction(re.sub("[, ]", "", number[1]))
            return value / 100 if number[2] else value
        except (ValueError, ZeroDivisionError):
            pass  # such as "." or "1/0"
    # a "'" for a comma without a space: x=1,234 is not the pair x=1, 234, whose space goes next
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "'", text)
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", text)


def verify(response, answer, *, answer_form=None, equal=None):
    r"""The reward r_i: is the response's answer right? The answer may be in a box itself.

    equal(given, answer), if any, decides instead, such as math-verify's in examples/text_env.py.

    >>> verify(r"... so the answer is \boxed{0.5}", r"\frac{1}{2}"), verify("0.5", "0.5")  # no box
    (True, False)
    """
    given, answer = extract_answer(response, answer_form), extract_answer(answer) or answer
    if given is None or equal is not None:
        return given is not None and equal(given, answer)
    return normalize(given) == normalize(answer) and normalize(given) != ""


# ------------------------------------------------------------------------------------ 4. the method
# === begin: copy from here (needs nothing but `import torch`) ===
def group_advantages(rewards, group_size, algorithm="dr_grpo"):
    """A_i = r_i - mean of its group's r: is this response better than usual for its prompt?

    rewards [B] (float), a prompt's responses side by side -> A [B]. "grpo" divides by the group's
    standard deviation (with n - 1) as well. ValueError unless groups of at least 2 fill B.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)  # the mean is 1/4
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"group_size {group_size}: must be >= 2 and divide {len(rewards)} rewards")
    groups = rewards.view(-1, group_size)
    adv = groups - groups.mean(1, keepdim=True)
    if algorithm == "grpo":
        adv = adv / (groups.std(1, keepdim=True) + 1e-6)
    return adv.view(-1)


def log_softmax(logits, temperature=1.0):
    """In float32 at least: half precision is too coarse for sums over a vocabulary."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def entropy_of(log_q):
    """-sum of q log q over the last dimension, where 0 log 0 is 0 and has no gradient."""
    with torch.autocast(log_q.device.type, enabled=False):  # it would round to bfloat16
        return -torch.linalg.vecdot(log_q.exp(), log_q.clamp(min=-1e30))


def nucleus(log_pi, top_p):
    """The policy nucleus V_p and the policy on it, q = pi / pi(V_p).

    V_p is the smallest set of tokens whose probabilities sum to p or more (p > 0): the one that
    crosses p is inside. (Where a sum is exactly p, rounding may let one more in.) The choice has no
    gradient. log_pi [..., V] -> log q, ids [..., k]; outside V_p: -inf, and an id without meaning.
    """
    fixed, vocab = log_pi.detach(), log_pi.shape[-1]
    if top_p >= 1:  # every token; a sum of rounded probabilities might stop short of 1
        return log_pi, torch.arange(vocab, device=log_pi.device).expand(log_pi.shape)
    k = min(64, 1 + vocab // 65)  # a first guess, since to sort all of them would be slow
    top, ids = fixed.topk(k)  # [..., k]
    while k < vocab and (short := top.exp().sum(-1) < top_p).any():  # these rows need more tokens
        more = min(15 * k, vocab - k)  # sixteen times as many
        top = torch.nn.functional.pad(top, (0, more), value=float("-inf"))
        ids, k = torch.nn.functional.pad(ids, (0, more)), k + more
        top[short], ids[short] = fixed[short].topk(k)
    pi = top.exp()  # 0 where it was only padded: these stay outside, whatever their ids say
    inside = (pi.cumsum(-1) - pi < top_p) & (pi > 0)  # the tokens before this one do not reach p
    return log_pi.gather(-1, ids).masked_fill(~inside, float("-inf")).log_softmax(-1), ids


def nucleus_mask(logits, top_p):
    """Which tokens are in the policy nucleus V_p? logits [..., V] -> bool [..., V].

    >>> nucleus_mask(torch.tensor([0.15, 0.5, 0.1, 0.25]).log(), 0.8)  # .5 + .25 + .15 = .9
    tensor([ True,  True, False,  True])
    """
    log_q, ids = nucleus(log_softmax(logits), top_p)
    inside = (log_q > float("-inf")).int()
    return torch.zeros_like(logits, dtype=torch.int).scatter_add(-1, ids, inside) > 0


def nucleus_entropy(logits, top_p):
    """H' = -sum over V_p of q log q, with q = pi / pi(V_p): how open is the choice that is real?

    logits [..., V] -> nats [...]. One token alone has H' = 0; with p = 1, H' is the full entropy H.
    V_p is held fixed in the gradient: a logit outside gets none. (token_stats: at a temperature.)

    >>> nucleus_entropy(torch.tensor([0.6, 0.3, 0.06, 0.04]).log(), 0.8)  # q = 2/3, 1/3
    tensor(0.6365)
    """
    return entropy_of(nucleus(log_softmax(logits), top_p)[0])


def peak_mask(entropy, mask, quantile):
    """The peak-entropy mask m_t (Eq. 9): the positions where a response really forks.

    q_i is the tau-quantile of H' over response i's own tokens; t is a peak where H'_t >= q_i and
    H'_t > 0 (our own test: without it every token is a peak once q_i is 0). entropy (H') and mask
    [B, T] -> bool [B, T]. quantile is tau; 0 switches the mask off: all of the response.

    >>> peak_mask(torch.tensor([[0.1, 0.9, 0.5, 0.0]]), torch.ones(1, 4), 0.8)  # q = 0.66
    tensor([[False,  True, False, False]])
    """
    h, mask = entropy.detach(), mask.bool()
    if quantile == 0 or h.numel() == 0:
        return mask
    own = h.masked_fill(~mask, float("nan"))
    # the smallest H' >= q_i: the same test without rounding (float32's 0.8 > 0.8 might skip it)
    least = torch.nanquantile(own, max(0, quantile - 1e-6), 1, True, interpolation="higher")
    return (h >= least) & (h > 0) & mask


def aggregate_entropy(entropy, peak, mask):
    """H_agg = mean over the responses of H_i; H_i = mean of H' over the peaks of response i.

    entropy (H'), peak, mask [B, T] -> nats, a scalar. A response without a peak counts as 0, one
    without a token is left out; without any response H_agg is 0.

    >>> h, mask = torch.tensor([[1.0, 3.0], [2.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> aggregate_entropy(h, h >= 2, mask)  # (3 + 2) / 2
    tensor(2.5000)
    """
    peak, mask = peak.bool() & mask.bool(), mask.bool()
    h_i = torch.where(peak, entropy, 0.0).sum(1) / peak.sum(1).clamp(min=1)  # [B]
    return h_i.sum() / mask.any(1).sum().clamp(min=1)


def policy_loss(
    logp, old_logp, adv, mask, clip_low=0.2, clip_high=0.2, max_tokens=None, algorithm="dr_grpo"
):
    """L_DrGRPO = -mean over the responses of (1 / max_tokens) sum_t gain_t; PPO's clipped gain is

        gain_t = min(ratio_t A_i, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_i)
        ratio_t = exp(logp_t - old_logp_t), how much likelier the token has become

    logp, old_logp (no gradient), mask [B, T], adv (A) [B] or [B, T] -> (loss, stats). max_tokens: a
    budget; by default T, so padding counts ("grpo": the length). approx_kl: ratio - 1 - log ratio.

    >>> logp, old_logp = torch.tensor([[0.5]]).log(), torch.tensor([[0.4]]).log()  # ratio 1.25
    >>> policy_loss(logp, old_logp, torch.tensor([1.0]), torch.ones(1, 1))[0]  # clipped to 1.2
    tensor(-1.2000)
    """
    mask = mask.bool()
    log_ratio = torch.where(mask, logp - old_logp, 0.0).clamp(-20, 20)  # so that exp is finite
    ratio, adv = log_ratio.exp(), adv if adv.dim() == 2 else adv[:, None]  # [B, T]
    free, clipped = ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv
    gain = torch.where(mask, torch.min(free, clipped), 0.0).sum(1)  # [B]
    budget = max_tokens or max(1, mask.shape[1])
    length = {"dr_grpo": budget, "grpo": mask.sum(1).clamp(min=1)}[algorithm]
    loss = -(gain / length).sum() / mask.any(1).sum().clamp(min=1)
    stats = {"clip_fraction": (clipped < free) & mask, "approx_kl": ratio - 1 - log_ratio}
    return loss, {name: x.detach().sum() / mask.sum().clamp(min=1) for name, x in stats.items()}


def token_stats(outputs, tokens, mask, top_p, temperature=1.0, head=None, chunk=0):
    """logp, H (entropy, without gradient), H' (nucleus_entropy) and |V_p| (nucleus_size) of tokens.

    outputs: logits [B, T, V], of which [:, t] predicts tokens[:, t]; or hidden states [B, T, D] for
    the module `head`, after which nothing may come (soft cap, scale). tokens (ids), mask [B, T], 1
    on the response's own tokens -> a dictionary of [B, T], 0 elsewhere. It takes `chunk` tokens at
    a time (0: by size); of several chunks, the backward pass computes [chunk, V] tensors again.

    >>> stats = token_stats(torch.zeros(1, 1, 4), torch.tensor([[2]]), torch.ones(1, 1), 0.5)
    >>> stats["logp"], stats["nucleus_entropy"]  # log 1/4; two equal options: log 2
    (tensor([[-1.3863]]), tensor([[0.6931]]))
    """

    def stats_of(outputs, tokens):  # [n, V or D], [n]
        logits = outputs if head is None else head(outputs)
        log_pi = log_softmax(logits, temperature)  # [n, V]
        log_q, _ = nucleus(log_pi, top_p)
        logp = log_pi.gather(-1, tokens[:, None])[:, 0]
        size = (log_q > float("-inf")).sum(-1)
        return logp, entropy_of(log_pi.detach()), entropy_of(log_q), size

    mask = mask.bool()
    # without padding, which is not looked at: [N, V or D], [N]
    outputs, tokens = (x.flatten(0, 1) if mask.all() else x[mask] for x in (outputs, tokens))
    if not chunk:  # 2 million logits fit a processor's cache, 64 million keep a GPU busy
        vocab = outputs.shape[-1] if head is None else len(head.weight)
        chunk = max(1, (1 << (21 if outputs.device.type == "cpu" else 26)) // vocab)
    if len(tokens) <= chunk:
        values = stats_of(outputs, tokens)
    else:
        again = {"use_reentrant": False, "preserve_rng_state": False}
        parts = zip(outputs.split(chunk), tokens.split(chunk))
        parts = [torch.utils.checkpoint.checkpoint(stats_of, *part, **again) for part in parts]
        values = map(torch.cat, zip(*parts))
    names = ("logp", "entropy", "nucleus_entropy", "nucleus_size")  # [N] each; back to [B, T]:
    return {k: v.new_zeros(mask.shape).masked_scatter(mask, v) for k, v in zip(names, values)}


def siren_loss(
    outputs, tokens, old_logp, adv, mask, anchor, *, beta, top_p=0.8, peak_quantile=0.8,
    temperature=1.0, regularizer="anchor", clip_low=0.2, clip_high=0.2, max_tokens=None,
    algorithm="dr_grpo", head=None, chunk=0,
):  # fmt: skip
    """SIREN, from the network's outputs -> (loss, stats): L = L_DrGRPO + beta * (H_agg - H*)^2.

    outputs, tokens, mask, head, chunk: token_stats's. old_logp, adv, max_tokens: policy_loss's.
    anchor: H*, stats["h_agg"] of the first batch before any update. top_p: p. peak_quantile: tau.
    regularizer: "anchor"; "bonus", -beta * H_agg (p = 1, tau = 0: the textbook's); "none".

    >>> logits, tokens, mask = torch.zeros(1, 2, 4), torch.tensor([[0, 1]]), torch.ones(1, 2)
    >>> old_logp, adv = torch.full((1, 2), 0.25).log(), torch.zeros(1)
    >>> siren_loss(logits, tokens, old_logp, adv, mask, 1.0, beta=0.5)[0]  # .5 (log 4 - 1)^2
    tensor(0.0746)
    """
    now = token_stats(outputs, tokens, mask, top_p, temperature, head, chunk)
    clip = (clip_low, clip_high)
    policy, stats = policy_loss(now["logp"], old_logp, adv, mask, *clip, max_tokens, algorithm)
    peak = peak_mask(now["nucleus_entropy"], mask, peak_quantile)  # [B, T]
    h_agg = aggregate_entropy(now["nucleus_entropy"], peak, mask)
    anchor = anchor if mask.any() else 0.0  # without a token H_agg is 0, and so is the loss
    if regularizer == "anchor":
        loss = policy + beta * (h_agg - anchor) ** 2
    elif regularizer == "bonus":
        loss = policy - beta * h_agg
    elif regularizer == "none":
        loss = policy
    else:
        raise ValueError(f"regularizer {regularizer!r}: must be anchor, bonus or none")
    stats |= {"policy_loss": policy.detach(), "regularizer_loss": (loss - policy).detach()}
    stats |= {"h_agg": h_agg.detach(), "peak_fraction": peak.sum() / mask.sum().clamp(min=1)}
    return loss, stats


def micro_batch_anchor(h_micro, h_agg, anchor):
    """The anchor that makes a micro-batch pull as its mini-batch does. (Skip this at first.)

    h_micro, h_agg: H_agg of a micro-batch and of the mini-batch, without gradient; anchor: H*. The
    losses of the parts, each times its share of the responses that have a token, are added up.
    H_agg is such a sum, its square is not; but h_micro - (this anchor) = H_agg - H* in each part.
    """
    return h_micro - (h_agg - anchor)


# === end: copy to here ===


# --------------------------------------------------------------------------------- 5. training step
def forward(model, rollout):
    """The hidden states [B, T, D] that predict the response, by one pass without a cache."""
    ids = torch.cat([rollout.prompt, rollout.tokens], 1)  # [B, P + T]
    seen = torch.cat([rollout.prompt_mask, rollout.mask], 1).long()
    network, positions = model.base_model, (seen.cumsum(1) - 1).clamp(min=0)
    out = network(ids, attention_mask=seen, position_ids=positions, use_cache=False)
    return out.last_hidden_state[:, rollout.prompt.shape[1] - 1 : -1]


@torch.no_grad()
def score(model, rollout, cfg):
    """token_stats of the rollout under the model as it is now, a micro-batch at a time."""
    scored, head = [], model.get_output_embeddings()
    for rows in torch.arange(len(rollout.mask)).split(cfg.micro_batch_size):
        part, options = rollout.rows(rows), (cfg.top_p, cfg.temperature, head, cfg.chunk)
        scored.append(token_stats(forward(model, part), part.tokens, part.mask, *options))
    return {name: torch.cat([stats[name] for stats in scored]) for name in scored[0]}


def update(model, optimizer, rollout, old_logp, rewards, anchor, cfg):
    """One optimiser update on a mini-batch, unless the gradient is not finite. Micro-batches give
    the gradient of the whole. Returns siren_loss's stats and grad_norm."""
    adv = group_advantages(rewards, cfg.group_size, cfg.algorithm)  # [b]
    micro_batches = torch.arange(len(adv)).split(cfg.micro_batch_size)
    several = len(micro_batches) > 1 and cfg.regularizer == "anchor"
    if several:  # H_agg of the whole, scored again since the model has moved
        entropy = score(model, rollout, cfg)["nucleus_entropy"]
        peak = peak_mask(entropy, rollout.mask, cfg.peak_quantile)
        h_agg = aggregate_entropy(entropy, peak, rollout.mask)
    total = defaultdict(float)
    optimizer.zero_grad()
    for rows in micro_batches:
        part, target = rollout.rows(rows), anchor
        if several:
            h_micro = aggregate_entropy(entropy[rows], peak[rows], part.mask)
            target = micro_batch_anchor(h_micro, h_agg, anchor)
        loss, stats = siren_loss(
            forward(model, part), part.tokens, old_logp[rows], adv[rows], part.mask, target,
            beta=cfg.beta, top_p=cfg.top_p, peak_quantile=cfg.peak_quantile,
            temperature=cfg.temperature, regularizer=cfg.regularizer,
            clip_low=cfg.clip_low, clip_high=cfg.clip_high, max_tokens=cfg.max_tokens,
            algorithm=cfg.algorithm, head=model.get_output_embeddings(), chunk=cfg.chunk,
        )  # fmt: skip
        share = len(rows) / len(adv)  # every sampled response has a token
        (share * loss).backward()
        token_share = part.mask.sum() / rollout.mask.sum()
        for name, value in stats.items():
            over_tokens = name in ("clip_fraction", "approx_kl", "peak_fraction")
            total[name] += float(value * (token_share if over_tokens else share))
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip))
    if math.isfinite(norm):
        optimizer.step()
    return {**total, "grad_norm": norm}


def respond(model, task, problems, cfg, key, samples, temperature):
    """A Rollout of `samples` responses to each problem; the text `key` decides every draw."""
    generator = torch.Generator(model.device).manual_seed(random.Random(key).getrandbits(63))
    return sample(
        model, [problem.prompt for problem in problems], max_tokens=cfg.max_tokens,
        eos_ids=task.eos_ids, pad_id=task.pad_id, samples=samples, temperature=temperature,
        batch=cfg.sample_batch, generator=generator,
    )  # fmt: skip


def training_step(model, optimizer, task, cfg, step, last):
    """Sample, verify, score, update; return the metrics. last: the record of the step before."""
    start, key = time.perf_counter(), f"{cfg.seed}/{step}"  # the key of this step's random draws
    # 1. sample: group_size responses to each prompt
    problems = task.train_problems(cfg.prompts, key)
    rollout = respond(model, task, problems, cfg, key, cfg.group_size, cfg.temperature)
    responses = rollout.responses()
    # 2. verify: a reward for each response
    answers = [problem.answer for problem in problems for _ in range(cfg.group_size)]
    rules = {"answer_form": task.answer_form, "equal": task.equal}
    rewards = [verify(task.decode(r), answer, **rules) for r, answer in zip(responses, answers)]
    rewards = torch.tensor(rewards, dtype=torch.float32, device=rollout.mask.device)  # [B]
    # 3. score before any update: the old log-probabilities and, on the first step, the anchor
    old = score(model, rollout, cfg)
    peak = peak_mask(old["nucleus_entropy"], rollout.mask, cfg.peak_quantile)
    h_agg = float(aggregate_entropy(old["nucleus_entropy"], peak, rollout.mask))
    anchor = last.get("anchor", cfg.anchor)
    anchor = h_agg if anchor is None else anchor
    # 4. update: once per mini-batch of whole groups
    optimizer.param_groups[0]["lr"] = cfg.lr * min(1.0, step / max(1, cfg.warmup_steps))
    groups, updates = list(range(cfg.prompts)), []
    random.Random(f"{key}/0").shuffle(groups)
    for some in torch.tensor(groups).tensor_split(cfg.mini_batches):
        rows = (some[:, None] * cfg.group_size + torch.arange(cfg.group_size)).view(-1)
        batch = rollout.rows(rows), old["logp"][rows], rewards[rows]
        updates.append(update(model, optimizer, *batch, anchor, cfg))
    made = [values for values in updates if math.isfinite(values["grad_norm"])]
    if not made:
        raise FloatingPointError("the gradient is not finite")
    tokens = int(rollout.mask.sum())
    return {
        **{name: sum(values[name] for values in made) / len(made) for name in made[0]},
        "reward": float(rewards.mean()),
        "entropy": float(old["entropy"].sum()) / tokens,
        "nucleus_size": float(old["nucleus_size"].sum()) / tokens,
        "h_agg": h_agg,  # of the whole rollout, before its updates
        "anchor": anchor,
        "skipped_updates": len(updates) - len(made),
        "response_tokens": tokens / len(responses),
        "ended_share": sum(ids[-1] in task.eos_ids for ids in responses) / len(responses),
        **task.metrics(responses),
        "seconds": time.perf_counter() - start,
    }


# ------------------------------------------------------------------------------------ 6. evaluation
def pass_at_k(n, c, k):
    """pass@k: the chance that k of n samples, of which c are right, hold a right one.

    >>> pass_at_k(4, 1, 2)  # 1 - 3 / 6
    0.5
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(votes, answer, k):
    """maj@k: the share of the whole blocks of k votes (at least one) that `answer` wins. In a tie
    the vote that came first wins; None (no answer) is not a vote.

    >>> maj_at_k([None, None, "7", "8", "8", "7"], "7", 3)  # won, lost
    0.5
    """
    blocks = [votes[i : i + k] for i in range(0, len(votes) - k + 1, k)]
    counts = [Counter(vote for vote in block if vote is not None) for block in blocks]
    return sum(bool(c) and c.most_common(1)[0][0] == answer for c in counts) / len(blocks)


def evaluate(model, task, problems, cfg):
    """Means over the problems, with k = eval_samples responses to each: avg@k, the share of right
    ones; maj@k; pass@k; distinct@k, the share of different ones."""
    k, total = cfg.eval_samples, defaultdict(float)
    rollout = respond(model, task, problems, cfg, f"{cfg.seed}/eval", k, cfg.eval_temperature)
    responses, rules = rollout.responses(), {"answer_form": task.answer_form, "equal": task.equal}
    for i, problem in enumerate(problems):
        own = responses[i * k : (i + 1) * k]
        texts = [task.decode(ids) for ids in own]
        right = [verify(text, problem.answer, **rules) for text in texts]
        given = [extract_answer(text, task.answer_form) for text in texts]
        votes = [None if text is None else normalize(text) for text in given]
        answer = normalize(problem.answer)  # right answers vote alike, however they are written
        votes = [answer if ok else vote for ok, vote in zip(right, votes)]
        total[f"avg@{k}"] += sum(right) / k
        total[f"maj@{k}"] += maj_at_k(votes, answer, k)
        total[f"pass@{k}"] += pass_at_k(k, sum(right), k)
        total[f"distinct@{k}"] += len(set(map(tuple, own))) / k
    return {name: value / len(problems) for name, value in total.items()}


# ---------------------------------------------------------------------------------- 7. training run
def load_task(cfg):
    """The task "module:key=value,key=value": the module's load(cfg, **options), as in toy_env.py.

    A task has build_model(), train_problems(n, seed), heldout(n), decode(ids), answer_form(text),
    equal, metrics(responses), eos_ids, pad_id; a problem has .prompt (ids) and .answer (text)."""
    module, _, rest = cfg.task.partition(":")
    try:
        options = [option.partition("=") for option in re.split(r",(?=\w+=)", rest) if option]
        return importlib.import_module(module).load(cfg, **{k: value for k, _, value in options})
    except (ImportError, OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"--task {cfg.task}: {error}") from error


def train(cfg, *, resume=False):
    """Train in the run's folder; return a record per step, of which step 0 is an evaluation.

    All but model, optimiser and records is a function of (seed, step), so a run goes on from its
    last checkpoint (on a CPU to the same last bit), however rudely it was stopped.
    """
    from examples.engine import RunFolder, bad_input, find_device  # see its docstring

    torch.set_num_threads(cfg.threads or os.cpu_count())
    with RunFolder(cfg, resume) as folder:
        device, task = find_device(cfg.device), load_task(cfg)
        with bad_input(f"--task {cfg.task}"):
            heldout, model = task.heldout(cfg.eval_prompts), task.build_model()
        model = model.to(device).eval()  # without dropout, what is scored is what was sampled
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        records = folder.restore(model, optimizer)
        for step in (bar := tqdm(range(len(records), cfg.steps + 1), unit="step")):
            record = {"step": step}
            if step > 0:
                record |= training_step(model, optimizer, task, cfg, step, records[-1])
                bar.set_postfix(reward=record["reward"], h_agg=record["h_agg"], refresh=False)
            if step in (0, cfg.steps) or (cfg.eval_every and step % cfg.eval_every == 0):
                for name, problems in heldout.items():
                    values = evaluate(model, task, problems, cfg)
                    record |= {f"{name}/{key}": value for key, value in values.items()}
            records.append(record)
            if step % cfg.save_every == 0 or step == cfg.steps:
                folder.save(model, optimizer, records)
            folder.log(records)
    return records


# ---------------------------------------------------------------------------------- 8. command line
def main(argv=None):
    """The command line: it reads flags, trains, prints a table and returns the exit code."""
    return importlib.import_module("examples.engine").run_command(train, argv)


if __name__ == "__main__":  # as the module siren, which tasks and examples import, and once only
    sys.exit(importlib.import_module("siren").main())
