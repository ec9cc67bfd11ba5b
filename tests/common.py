"""What several test files share: random batches, comparisons, and the oracles.

Letters: B responses, T positions, V vocabulary, z logits, H nucleus entropy H', tau quantile.
"""

import math
from types import SimpleNamespace

import numpy as np
import torch

F64 = torch.float64
ANCHOR = 0.9
KNOBS = {"beta": 0.7, "top_p": 0.8, "peak_quantile": 0.8}
LENGTHS = (
    6,
    1,
    4,
    5,
    2,
    6,
    3,
    5,
)  # 6 tokens: the 0.8-quantile is exactly the fifth value (a tie)
WITH_EMPTY = (6, 1, 4, 0, 2, 6, 3, 5)
OVER_TOKENS = (
    "clip_fraction",
    "approx_kl",
    "peak_fraction",
)  # stats; the rest: over responses
GRPO = {"algorithm": "grpo"}
REGULARIZERS = ({"regularizer": "anchor"}, {"regularizer": "bonus"}, {"regularizer": "none"})
LOSSES = [{**r, "algorithm": a} for r in REGULARIZERS for a in ("dr_grpo", "grpo")]


def t(x):
    return torch.tensor(x, dtype=F64)


def same(actual, expected, idea, tol=1e-9, mistakes=None):
    """Equal in shape and value; `idea` says what a wrong answer has probably missed.

    mistakes: idea -> the value that one gets without it, for a message that knows.
    """
    actual, expected = (torch.as_tensor(x, dtype=F64).detach() for x in (actual, expected))
    assert actual.shape == expected.shape, (
        f"{idea}: shape {actual.shape}, not {expected.shape}"
    )
    for missed, value in (mistakes or {}).items():
        if torch.allclose(
            actual, torch.as_tensor(value, dtype=F64), rtol=1e-4, equal_nan=True
        ):
            idea = missed
    wrong = ~torch.isclose(actual, expected, rtol=tol, atol=tol)
    got, due, count = (
        actual[wrong][:4].tolist(),
        expected[wrong][:4].tolist(),
        wrong.sum().item(),
    )
    assert count == 0, f"{idea}: {count} of {wrong.numel()} differ, {got} instead of {due}"


def same_stats(actual, expected, idea):
    for name in expected:
        same(actual[name], expected[name], f"stats[{name!r}]: {idea}", tol=1e-6)


def make(lengths=LENGTHS, V=11, seed=0, dtype=F64):
    """A ragged off-policy batch: some ratios are clipped, some nuclei hold one token."""
    g = torch.Generator().manual_seed(seed)
    B, T = len(lengths), 6
    logits = torch.randn(B, T, V, generator=g, dtype=F64) * 2
    logits[:, 1::3] *= 6
    tokens = logits.argsort(-1)[..., -2]
    tokens[:, ::2] = logits.argmax(-1)[:, ::2]
    logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    old_logp = logp + 0.4 * torch.randn(B, T, generator=g, dtype=F64)
    adv = torch.randn(B, generator=g, dtype=F64)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    floats = {"logits": logits, "logp": logp, "old_logp": old_logp, "adv": adv}
    floats = {name: x.to(dtype) for name, x in floats.items()}
    return SimpleNamespace(tokens=tokens, mask=mask, **floats)


def loss_of(impl, b, anchor=ANCHOR, **knobs):
    """(loss, stats) by a siren_loss with the arguments of exercise 7."""
    knobs = KNOBS | knobs
    return impl.siren_loss(b.logits, b.tokens, b.old_logp, b.adv, b.mask, anchor, **knobs)


def value_and_grad(impl, b, anchor=ANCHOR, **knobs):
    """Loss, its gradient with respect to the logits, and the stats."""
    b = SimpleNamespace(**vars(b) | {"logits": b.logits.detach().clone().requires_grad_()})
    loss, stats = loss_of(impl, b, anchor, **knobs)
    loss.backward()
    return loss.detach(), b.logits.grad, stats


def rows(b, index):
    return SimpleNamespace(**{name: x[index] for name, x in vars(b).items()})


def padded(b, extra, dim):
    """`b` with `extra` more columns (dim 1) or empty rows (dim 0) of plausible rubbish."""
    out = {}
    for name, x in vars(b).items():
        if x.dim() <= dim:
            out[name] = x
            continue
        filler = x.narrow(dim, 0, extra).flip(dim)
        filler = (
            torch.zeros_like(filler) if name == "mask" else filler + (name == "old_logp") * 9
        )
        out[name] = torch.cat([x, filler], dim)
    return SimpleNamespace(**out)


# ---------------------------------------- oracles: numpy, float64, loops, from the definitions


def oracle_probs(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def oracle_nucleus(z, top_p):
    """Indices: the smallest set whose probabilities sum to top_p."""
    p, mass, keep = oracle_probs(z), 0.0, []
    if top_p >= 1:
        return list(np.flatnonzero(np.isfinite(z)))
    for j in np.argsort(-p, kind="stable"):
        mass += p[j]
        keep.append(j)
        if mass >= top_p:
            break
    return keep


def oracle_q(z, top_p):
    """The distribution renormalised on the nucleus, 0 elsewhere."""
    p, q = oracle_probs(z), np.zeros_like(z)
    keep = oracle_nucleus(z, top_p)
    q[keep] = p[keep] / p[keep].sum()
    return q


def oracle_entropy(q):
    return -sum(x * math.log(x) for x in q.ravel() if x > 0) + 0.0


def oracle_stats(logits, tokens, top_p, temperature=1.0):
    logits, tokens = np.asarray(logits, dtype=np.float64) / temperature, np.asarray(tokens)
    names = ("logp", "entropy", "nucleus_entropy", "nucleus_size")
    out = {name: np.zeros(tokens.shape) for name in names}
    for i in np.ndindex(tokens.shape):
        z = logits[i]
        out["logp"][i] = math.log(oracle_probs(z)[tokens[i]])
        out["entropy"][i] = oracle_entropy(oracle_probs(z))
        out["nucleus_entropy"][i] = oracle_entropy(oracle_q(z, top_p))
        out["nucleus_size"][i] = len(oracle_nucleus(z, top_p))
    return out


def oracle_peaks(H, mask, tau):
    H, mask = np.asarray(H, dtype=np.float64), np.asarray(mask)
    peak = np.zeros(mask.shape, dtype=bool)
    for i in range(len(H)):
        if not mask[i].any():
            continue
        q = np.quantile(H[i][mask[i]], tau)  # linear interpolation, this response's own tokens
        for s in np.flatnonzero(mask[i]):
            peak[i, s] = tau == 0 or (H[i, s] > 0 and H[i, s] >= q)
    return peak


def oracle_aggregate(H, peak, mask):
    H, peak, mask = np.asarray(H, dtype=np.float64), np.asarray(peak), np.asarray(mask)
    means = []
    for i in range(len(H)):
        if mask[i].any():
            means.append(H[i][peak[i]].mean() if peak[i].any() else 0.0)
    return float(np.mean(means)) if means else 0.0


def oracle_policy(
    logp,
    old_logp,
    adv,
    mask,
    clip_low=0.2,
    clip_high=0.2,
    max_tokens=None,
    algorithm="dr_grpo",
):
    """(loss, clip fraction, KL), over the responses and tokens that there are."""
    responses, clips, kl = [], [], []
    for i in range(len(adv)):
        losses, a = [], float(adv[i])
        for s in np.flatnonzero(np.asarray(mask[i])):
            log_ratio = min(max(float(logp[i][s]) - float(old_logp[i][s]), -20), 20)
            ratio = math.exp(log_ratio)
            free, held = -a * ratio, -a * min(max(ratio, 1 - clip_low), 1 + clip_high)
            losses.append(max(free, held))
            clips.append(held > free)
            kl.append(ratio - 1 - log_ratio)
        if losses:
            budget = len(losses) if algorithm == "grpo" else max_tokens or mask.shape[1]
            responses.append(sum(losses) / budget)
    return np.mean(responses), np.mean(clips), np.mean(kl)


def oracle_siren(b, anchor, beta, top_p, peak_quantile, regularizer="anchor", **knobs):
    """(loss, stats) of one whole mini-batch."""
    s = oracle_stats(b.logits, b.tokens, top_p, knobs.pop("temperature", 1.0))
    mask, H = b.mask.numpy(), s["nucleus_entropy"]
    peak = oracle_peaks(H, mask, peak_quantile)
    h_agg = oracle_aggregate(H, peak, mask)
    policy, clip_fraction, kl = oracle_policy(s["logp"], b.old_logp, b.adv, b.mask, **knobs)
    term = {"anchor": beta * (h_agg - anchor) ** 2, "bonus": -beta * h_agg, "none": 0.0}
    return policy + term[regularizer], {
        "policy_loss": policy,
        "regularizer_loss": term[regularizer],
        "h_agg": h_agg,
        "peak_fraction": peak.sum() / mask.sum(),
        "clip_fraction": clip_fraction,
        "approx_kl": kl,
    }


# ------------------------------------------------------- a small model, and what it samples


def small_model(vocab=32, context=64, seed=0):
    """A random two-layer model, sharp enough that its tokens differ in probability."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Qwen2Config(vocab_size=vocab, max_position_embeddings=context, **sizes)
        return Qwen2ForCausalLM(config).eval()


def model_with_absolute_positions():
    """A random GPT-2: it adds a learned vector for each position."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 32}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(**sizes, **drop, initializer_range=0.4)
        return GPT2LMHeadModel(config).eval()


PROMPTS = [
    [5, 1, 7],
    [8, 9, 10, 11, 12, 13, 14],
    [5, 4, 3, 8, 7],
]  # 1 in a prompt is not padding
SAMPLING = {
    "max_tokens": 12,
    "eos_ids": [1, 2],
    "pad_id": 1,
}  # pad is EOS, as in many chat models


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sampled(impl, model, **options):
    """16 samples per prompt, seeded."""
    options = {"samples": 16, "generator": seeded(), **SAMPLING, **options}
    return impl.sample(model, PROMPTS, **options)


def logp_alone(model, prompt, tokens, temperature=1.0):
    """The log-probabilities of tokens by a full pass over this row alone."""
    ids = torch.cat([torch.tensor(prompt), tokens])[None]
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def chi_square(observed, expected, idea):
    """observed: counts; expected: probabilities. At most 4.5 standard deviations."""
    count = sum(observed.values())
    likely = {key: p * count for key, p in expected.items() if p * count >= 5}
    chi2 = sum((observed[key] - due) ** 2 / due for key, due in likely.items())
    freedom = len(likely) - 1
    enough = freedom + 4.5 * math.sqrt(2 * freedom)
    assert chi2 < enough, f"{idea}: chi-square {chi2:.1f} on {freedom}"
