"""The methods of the zoo by name: what each changes, in one entry. See core.Method.

v is the mini-batch, o the options; last is the record of the step before. The numbers in
`options` are the papers', unless docs/zoo.md says that they are ours; the tuned one is a value
of its grid (but clip_higher's is the paper's), and not always the one that the tables chose:
those of epo and of naive_bonus explode. docs/zoo.md has the chosen ones.
"""

from __future__ import annotations

import dataclasses

import torch

from research.zoo import advantages, sampler, terms, weights
from research.zoo.core import Method, MiniBatch

Tensor = torch.Tensor
BONUS = (0.002, 0.006, 0.02, 0.06)  # grids, most of them as in research/study.py
ANCHORED = (0.02, 0.06, 0.2, 0.6)
WIDE = (0.06, 0.2, 0.6, 2.0)
RATES = (0.0003, 0.001, 0.003, 0.01)  # of controllers: how fast a coefficient moves
NONE = {"regularizer": "none"}
CLIP_HIGHER = {**NONE, "clip_high": 0.28}
PAPER = "the SIREN paper, arXiv 2509.25133"


def covariance_mask(v: MiniBatch) -> Tensor:
    """Clip-Cov's weights. Its bounds are quantiles of cov, or numbers as in the papers."""
    cov = weights.covariance(v.adv, v.logp, v.mask)
    o = v.options
    low, high = o.low, o.high
    if o.by_quantile:
        bounds = torch.tensor([o.low, o.high], device=cov.device).clamp(max=1)
        low, high = cov[v.mask].quantile(bounds).tolist()
        high = torch.inf if o.high == 1 else high
    return weights.clip_cov(cov, v.mask, o.rho, low, high, v.generator)


def largest_covariance(v: MiniBatch) -> Tensor:
    """KL-Cov's weights: c for the how_many(rho) tokens of largest covariance, else 0.

    KL-Cov (5): of these tokens the loss is -A r + c |logp - old_logp|, an L1 distance rather
    than a KL; there is no PPO clip. Paper: rho 0.002 (7B) or 0.0002 (32B), c 1. In the toy a
    mini-batch has about 640 tokens, and rho 0.002 of them is one. Source: arXiv 2505.22617.
    Sure: high.
    """
    cov = weights.covariance(v.adv, v.logp, v.mask)
    count = weights.how_many(v.options.rho, v.mask)
    return v.options.c * weights.top_tokens(cov, v.mask, count)


def forking(v: MiniBatch) -> Tensor:
    """80/20's weights, of the mini-batch or, as in the SIREN repository, of the response."""
    rule = weights.forking_tokens
    if v.options.per_response:
        rule = weights.forking_tokens_per_response
    return rule(v.entropy, v.mask, v.options.share)


def entropy(now: dict[str, Tensor], v: MiniBatch) -> Tensor:
    """H with a gradient: the term of every entropy bonus; its weights are negative."""
    return now["entropy"]


def adaptive(last: dict, o: object) -> dict[str, float]:
    """The state of adaptive_bonus and aer: a coefficient that follows mean H."""
    target = o.tau * last["initial_entropy"]
    c = terms.adaptive_coefficient(last["coefficient"], last["entropy"], target, o.eta)
    return {"coefficient": c}


def stepped(last: dict, o: object) -> dict[str, float]:
    """The state of trl_adaptive."""
    target = o.tau * last["initial_entropy"]
    before = last["coefficient"]
    c, applied = terms.stepped_coefficient(before, last["entropy"], target, o.delta)
    return {"coefficient": c, "applied_coefficient": applied}


def positive(last: dict, o: object) -> dict[str, float]:
    """The state of par: lam."""
    target = o.tau * last["initial_entropy"]
    lam = weights.positive_coefficient(last["coefficient"], last["entropy"], target, o.step)
    return {"coefficient": lam}


def corridor(last: dict, o: object) -> dict[str, float]:
    """The state of epo: the mean of mean H over the steps so far, and the penalty's weight."""
    n = last["step"]
    history = last["history"] + (last["entropy"] - last["history"]) / n
    weight = o.alpha * terms.corridor_weight(n + 1, o.steps, o.gamma)
    return {"history": history, "penalty_weight": weight}


def epo_term(now: dict[str, Tensor], v: MiniBatch) -> Tensor:
    """H_t - s P_t; its weight is -lam."""
    o = v.options
    h = now["entropy"]
    penalty = terms.corridor_penalty(h, v.state.history, o.k_low, o.k_high)
    return h - v.state.penalty_weight * penalty


def token_mean(v: MiniBatch) -> Tensor:
    """The factor that makes core.per_response a mean over the mini-batch's tokens."""
    divisor = v.mask.sum(1, keepdim=True) if v.algorithm == "grpo" else v.max_tokens
    return v.mask.any(1).sum() * divisor / v.mask.sum()


METHODS: dict[str, Method] = {
    # settings of siren.Config alone
    "dr_grpo": Method("Dr.GRPO", 0, "arXiv 2503.20783", config=NONE),
    "siren": Method("SIREN", 0, PAPER, coefficient="beta", candidates=ANCHORED),
    "wo_top_p": Method(
        "SIREN without the top-p mask", 0, PAPER,
        config={"top_p": 1.0}, coefficient="beta", candidates=ANCHORED,
    ),
    "wo_peak": Method(
        "SIREN without the peak mask", 0, PAPER,
        config={"peak_quantile": 0.0}, coefficient="beta", candidates=WIDE,
    ),
    "wo_anchor": Method(
        "SIREN without the anchor", 0, PAPER,
        config={"regularizer": "bonus", "beta": 0.02}, coefficient="beta", candidates=BONUS,
    ),
    "anchor_only": Method(
        "the anchor without masks", 0, PAPER,
        config={"top_p": 1.0, "peak_quantile": 0.0}, coefficient="beta", candidates=WIDE,
    ),
    "naive_bonus": Method(
        "naive bonus", 1, "textbook; the SIREN repository divides by the budget",
        config={"regularizer": "bonus", "top_p": 1.0, "peak_quantile": 0.0, "beta": 0.02},
        coefficient="beta", candidates=(0.001, *BONUS[:3]),
    ),
    "clip_higher": Method(
        "clip-higher (DAPO)", 3, "arXiv 2503.14476",
        config=CLIP_HIGHER, coefficient="clip_high", candidates=(0.4, 0.8, 1.6, 3.2),
    ),
    "dr_grpo_clip": Method("Dr.GRPO, clip 0.2 / 0.28", 0, "as dr_grpo", config=CLIP_HIGHER),
    # controllers of a bonus
    "adaptive_bonus": Method(
        "adaptive bonus", 2, "the SIREN repository, type naive_entropy_reg_adaptive",
        config=NONE, options={"eta": 0.001, "tau": 1.0}, coefficient="eta", candidates=RATES,
        term=entropy, term_weights=lambda v: -v.state.coefficient,
        start={"coefficient": 0.0}, controller=adaptive,
    ),
    "trl_adaptive": Method(
        "TRL's adaptive entropy", 19, "trl 1.16; arXiv 2505.22312 (Skywork-OR1)",
        config=NONE, options={"delta": 0.001, "tau": 1.0}, coefficient="delta",
        candidates=RATES, term=entropy, term_weights=lambda v: -v.state.applied_coefficient *
        token_mean(v), start={"coefficient": 0.0, "applied_coefficient": 0.0},
        controller=stepped,
    ),
    "aer": Method(
        "AER", 12, "arXiv 2510.10959", "low",
        config=NONE, options={"eta": 0.001, "tau": 0.4, "rho": 0.5},
        coefficient="eta", candidates=RATES,
        term=entropy,
        term_weights=lambda v: -v.state.coefficient * terms.difficulty_weight(
            v.rewards, v.group_size, v.options.rho
        ),
        start={"coefficient": 0.0}, controller=adaptive,
    ),
    "epo": Method(
        "EPO", 13, "arXiv 2509.22576v2",
        config=NONE, coefficient="lam", candidates=(0.001, *BONUS[:3]),
        options={
            "lam": 0.02, "alpha": 0.1, "k_low": 0.0, "k_high": 2.0, "gamma": 3.0,
            "steps": 200.0,
        },
        term=epo_term, term_weights=lambda v: -v.options.lam,
        start={"history": 0.0, "penalty_weight": 0.0}, controller=corridor,
    ),
    # advantages and weights
    "clip_cov": Method(
        "Clip-Cov", 4, "arXiv 2505.22617",
        config={**NONE, "clip_low": 1.0, "clip_high": 1.0},
        options={"rho": 0.03, "low": 0.8, "high": 1.0, "by_quantile": 1},
        coefficient="rho", candidates=(0.01, 0.03, 0.1, 0.2),
        advantages=lambda v: v.adv * covariance_mask(v),
    ),
    "kl_cov": Method(
        "KL-Cov", 5, "arXiv 2505.22617",
        config={**NONE, "clip_low": 1.0, "clip_high": 100.0},  # no clip
        options={"c": 1.0, "rho": 0.02}, coefficient="c", candidates=(0.1, 0.3, 1.0, 3.0),
        term=lambda now, v: (now["logp"] - v.old_logp).abs(), term_weights=largest_covariance,
    ),
    "entropy_advantage": Method(
        "Entropy Advantage", 6, "arXiv 2506.14758",
        config=NONE, options={"alpha": 0.4, "kappa": 2.0},
        coefficient="alpha", candidates=(0.04, 0.12, 0.4, 1.2),
        advantages=lambda v: advantages.entropy_advantage(
            v.adv, v.entropy, v.options.alpha, v.options.kappa
        ),
    ),
    "forking_tokens": Method(
        "80/20 forking tokens", 7, "arXiv 2506.01939",
        config=CLIP_HIGHER, options={"share": 0.2, "per_response": 0},
        coefficient="share", candidates=(0.2, 0.4, 0.8, 0.95),
        advantages=lambda v: v.adv * forking(v),
    ),
    "qae": Method(
        "QAE", 8, "arXiv 2509.22611",
        config=NONE, options={"quantile": 0.4}, coefficient="quantile",
        candidates=(0.1, 0.2, 0.4, 0.8),  # with 8 responses, 0.1 is as any smaller one
        advantages=lambda v: advantages.quantile_advantage(
            v.rewards, v.group_size, v.options.quantile
        )[:, None].expand_as(v.adv),
    ),
    "par": Method(
        "positive-advantage reweighting (PAR)", 9, "arXiv 2511.05993",
        config=NONE, options={"tau": 0.4, "step": 0.05},
        coefficient="tau", candidates=(0.05, 0.1, 0.2, 0.4),
        advantages=lambda v: v.adv * weights.positive_weight(v.adv, v.state.coefficient),
        start={"coefficient": 0.0}, controller=positive,
    ),
    "steer": Method(
        "STEER", 10, "code zz-haooo/STEER",
        config=CLIP_HIGHER, options={"w_min": 0.7},
        coefficient="w_min", candidates=(0.3, 0.5, 0.7, 0.9),
        advantages=lambda v: v.adv * weights.steer(
            v.adv, v.logp, v.old_logp, v.entropy, v.mask, v.options.w_min
        ),
    ),
    "arm": Method(
        "ARM (ProGRPO)", 11, "arXiv 2602.05281", "medium",
        config=CLIP_HIGHER, options={"alpha": 0.3, "share": 0.2},
        coefficient="alpha", candidates=(0.1, 0.3, 1.0, 3.0),
        advantages=lambda v: advantages.arm(
            v.adv, v.old_logp, v.rewards, v.mask, v.group_size, v.options.alpha,
            v.options.share,
        ),
    ),
    # with the base model's samples or log-probabilities
    **{
        f"dph_{kind}": Method(
            f"DPH-RL, {name}", 14, "arXiv 2509.07430",
            config=CLIP_HIGHER, coefficient="eta", candidates=grid,
            options={"eta": 0.1, "prompts": 256, "samples": 16, "mastered": 0.25, "batch": 16},
            rehearsal=lambda log_u, o, kind=kind: o.eta * terms.divergence(log_u, kind),
        )
        for kind, name, grid in (
            ("kl", "forward KL", (0.01, 0.03, 0.1, 0.3)), ("js", "JS", (0.03, 0.1, 0.3, 1.0))
        )
    },
    "calibrl": Method(
        "CalibRL with a reference baseline", 16, "code zhh6425/CalibRL",
        config=NONE, options={"lam": 0.1, "slope": 0.5},
        coefficient="lam", candidates=(0.1, 0.3, 1.0, 3.0), base_logp=True,
        term=lambda now, v: terms.calibration(
            now["logp"] - v.base_logp, v.adv, v.options.slope
        ),
        term_weights=lambda v: v.options.lam,
    ),
    # a sampler
    "cure": Method(
        "CURE", 15, "code bytedance/CURE",
        config=CLIP_HIGHER, options={"k": 2, "tails": 3},
        coefficient="k", candidates=(1, 2, 4, 8),
        advantages=lambda v: torch.where(v.sampled_logp < 0, v.adv, 0.0),
        sample=sampler.branch,
    ),
}  # fmt: skip
# the baselines as the SIREN repository runs them, where they differ from their papers
VARIANTS: dict[str, Method] = {
    "entropy_advantage_siren": dataclasses.replace(
        METHODS["entropy_advantage"],
        options={"alpha": 0.4, "kappa": 1.0},
        candidates=(0.12, 0.4, 1.2, 3.6),
    ),
    "forking_tokens_siren": dataclasses.replace(
        METHODS["forking_tokens"], config=NONE, options={"share": 0.2, "per_response": 1}
    ),
    "clip_cov_siren": dataclasses.replace(
        METHODS["clip_cov"],
        config=NONE,
        options={"rho": 0.03, "low": 1.0, "high": 5.0, "by_quantile": 0},
        candidates=(0.003, 0.01, 0.03, 0.1),
    ),
}
