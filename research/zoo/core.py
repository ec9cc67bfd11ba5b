"""What all methods share: what a Method is, the mini-batch that it sees, and one update.

    L = L_DrGRPO with the advantages A'_t  +  agg(w_t x_t)

    A'_t  the method's advantages. A weight w >= 0 of the policy loss is one of them, since
          w min(r A, clip(r) A) = min(r w A, clip(r) w A)
    x_t   the method's own loss of a token; w_t its weight, which has no gradient
    agg   as in L_DrGRPO: sum over a response's tokens / max_tokens, then the mean over responses

A' and w are computed once, from the whole mini-batch under the policy as it is now. So the
micro-batches add up exactly, whatever means, quantiles or largest values a method needs.

A controller's state is numbers in the step's record, from which the next step starts. So it is in
every checkpoint, and a resumed run goes on with the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

import siren
from examples.zoo import support

Tensor = torch.Tensor
# what an option may be; any other is a number >= 0
LIMITS = {"w_min": (1e-6, 1), **dict.fromkeys(("quantile", "share", "rho", "mastered"), (0, 1))}


@dataclasses.dataclass(frozen=True)
class Method:
    """A method: what is said of it, and what it changes. What is left out stays as in Dr.GRPO."""

    title: str
    number: int  # of docs/zoo.md
    source: str
    certainty: str = "high"  # of the definition: high, medium or low
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # changes in siren.Config
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # the method's own numbers
    coefficient: str = ""  # the main one of them (or of config): it is tuned
    candidates: tuple[float, ...] = ()  # its grid on the toy; the papers' values don't transfer
    advantages: Callable[[MiniBatch], Tensor] | None = None  # A' [B, T]
    term: Callable[[dict[str, Tensor], MiniBatch], Tensor] | None = None  # x [b, T], of some rows
    term_weights: Callable[[MiniBatch], Tensor | float] | None = None  # w [B, T], [B, 1] or number
    start: dict[str, float] = dataclasses.field(default_factory=dict)  # the state of step 1
    controller: Callable[[dict, Any], dict[str, float]] | None = None  # (last record, options)
    respond: Callable | None = None  # in the place of siren.respond, which is its first argument
    base_logp: bool = False  # does it look at the base model's logp of the mini-batch?
    rehearsal: Callable[[Tensor, Any], Tensor] | None = None  # x of (log(pi / base), options)

    @property
    def is_plugged(self) -> bool:
        """Is it more than settings of siren.Config?"""
        hooks = (self.advantages, self.term, self.respond, self.rehearsal)
        return any(hook is not None for hook in hooks)


@dataclasses.dataclass(frozen=True)
class MiniBatch:
    """What a method may look at: B responses, in groups. None of the tensors has a gradient."""

    rewards: Tensor  # [B]
    adv: Tensor  # [B, T] A of Dr.GRPO, the same for all tokens of a response
    mask: Tensor  # [B, T]
    old_logp: Tensor  # [B, T] of the policy that sampled, scored
    sampled_logp: Tensor  # [B, T] Rollout.logp: 0 where a sampler kept a token
    logp: Tensor  # [B, T] of the policy as it is now
    entropy: Tensor  # [B, T] H of the policy as it is now, in nats
    base_logp: Tensor  # [B, T] of the base model, or 0
    group_size: int
    max_tokens: int
    options: SimpleNamespace
    state: SimpleNamespace  # of the controller
    generator: torch.Generator  # for random masks: a function of seed, step and mini-batch
    algorithm: str = "dr_grpo"  # as in siren.Config

    def rows(self, index: Tensor) -> MiniBatch:
        """The responses at index [b]."""
        values = {name: x[index] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **values)


def per_response(x: Tensor, mask: Tensor, max_tokens: int, algorithm: str = "dr_grpo") -> Tensor:
    """agg: the mean over the responses of (1 / max_tokens) sum_t x_t, as in siren.policy_loss.

    >>> per_response(torch.tensor([[1.0, 3.0], [2.0, 9.0]]), torch.tensor([[1, 1], [1, 0]]), 4)
    tensor(0.7500)
    """
    mask = mask.bool()
    length = mask.sum(1).clamp(min=1) if algorithm == "grpo" else max_tokens
    return (torch.where(mask, x, 0.0).sum(1) / length).sum() / mask.any(1).sum().clamp(min=1)


def look(model: torch.nn.Module, rollout: siren.Rollout, cfg: siren.Config) -> dict[str, Tensor]:
    """logp and the full entropy H of a rollout's tokens [B, T], both with a gradient."""
    hidden, head = siren.forward(model, rollout), model.get_output_embeddings()
    how = {"top_p": 1.0, "temperature": cfg.temperature, "head": head, "chunk": cfg.chunk}
    now = siren.token_stats(hidden, rollout.tokens, rollout.mask, **how)
    return {"logp": now["logp"], "entropy": now["nucleus_entropy"]}  # with p = 1, H' is H


def backward(rows: int, size: int, loss: Callable[[Tensor], Tensor]) -> None:
    """Add the gradient of a mean over `rows` responses, `size` at a time."""
    for part in torch.arange(rows).split(size):
        (len(part) / rows * loss(part)).backward()


class Plugged:
    """A method in the place of siren's load_task, training_step, update, respond."""

    def __init__(self, method: Method, options: dict[str, Any]) -> None:
        self.method, self.options = method, SimpleNamespace(**options)
        self.siren_load, self.siren_step = siren.load_task, siren.training_step
        self.siren_respond = siren.respond
        self.base: torch.nn.Module | None = None

    def load_task(self, cfg: siren.Config) -> Any:
        """siren.load_task, where a run begins; ConfigError if there is a regulariser as well."""
        if cfg.regularizer != "none":
            rule = f"{self.method.title} comes in its place; add --regularizer none"
            raise siren.ConfigError(f"--regularizer {cfg.regularizer}: {rule}")
        return self.siren_load(cfg)

    def training_step(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, task: Any,
        cfg: siren.Config, step: int, last: dict[str, float],
    ) -> dict[str, float]:  # fmt: skip
        """siren.training_step, with the state that the record before it leads to."""
        self.state, self.key, self.updates = self.state_after(last), f"{cfg.seed}/{step}", 0
        if self.base is None and (self.method.base_logp or self.method.rehearsal):
            self.base = task.build_model().to(model.device).eval()
            if self.method.rehearsal:
                self.rehearsed, self.rehearsed_logp = self.mastered(task, cfg)
        return self.siren_step(model, optimizer, task, cfg, step, last)

    def state_after(self, last: dict[str, float]) -> dict[str, float]:
        """The controller's numbers in the step after `last`; H0 is the entropy of step 1."""
        if "entropy" not in last:  # step 1
            return dict(self.method.start)
        if not self.method.controller:
            return {}
        last = {"initial_entropy": last["entropy"], **last}
        state = self.method.controller(last, self.options)
        return {"initial_entropy": last["initial_entropy"], **state}

    @torch.no_grad()
    def mastered(self, task: Any, cfg: siren.Config) -> tuple[siren.Rollout, Tensor]:
        """The base's right responses to prompts that it masters, and their logp under it."""
        o, key = self.options, f"{cfg.seed}/base"
        problems = task.train_problems(o.prompts, key)
        rollout = siren.respond(self.base, task, problems, cfg, key, o.samples, cfg.temperature)
        right = support.rewards_of(task, problems, rollout).view(-1, o.samples)
        kept = (right > 0) & (right.mean(1, keepdim=True) >= o.mastered)
        if not kept.any():
            raise siren.ConfigError(f"mastered={o.mastered}: the base masters no prompt; lower it")
        rollout = rollout.rows(kept.flatten().nonzero()[:, 0])
        return rollout, siren.score(self.base, rollout, cfg)["logp"]

    def respond(
        self, model: torch.nn.Module, task: Any, problems: Any, cfg: siren.Config, key: str,
        samples: int, temperature: float,
    ) -> siren.Rollout:  # fmt: skip
        """The method's sampler for a training step, whose key ends in its number; else siren's."""
        common = (model, task, problems, cfg, key, samples, temperature)
        if not key.rpartition("/")[2].isdigit():
            return self.siren_respond(*common)
        return self.method.respond(self.siren_respond, *common, **vars(self.options))

    def draw(self, what: str) -> random.Random:
        """A source of random numbers that is a function of seed, step and mini-batch."""
        return random.Random(f"{self.key}/{self.updates}/{what}")

    def mini_batch(
        self, rollout: siren.Rollout, old_logp: Tensor, rewards: Tensor, now: dict[str, Tensor],
        cfg: siren.Config,
    ) -> MiniBatch:  # fmt: skip
        """What the method sees of a mini-batch; now: logp and H of it."""
        adv = siren.group_advantages(rewards, cfg.group_size, cfg.algorithm)
        base_logp = torch.zeros_like(old_logp)
        if self.method.base_logp:
            base_logp = siren.score(self.base, rollout, cfg)["logp"]
        return MiniBatch(
            rewards, adv[:, None].expand(rollout.mask.shape), rollout.mask, old_logp, rollout.logp,
            now["logp"].detach(), now["entropy"].detach(), base_logp, cfg.group_size,
            cfg.max_tokens, self.options, SimpleNamespace(**self.state),
            torch.Generator().manual_seed(self.draw("mask").getrandbits(63)), cfg.algorithm,
        )  # fmt: skip

    def update(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, rollout: siren.Rollout,
        old_logp: Tensor, rewards: Tensor, anchor: float, cfg: siren.Config,
    ) -> dict[str, float]:  # fmt: skip
        """siren.update with the method's advantages, term and rehearsal."""
        method, total = self.method, defaultdict(float, regularizer_loss=0.0)
        plain = dataclasses.replace(cfg, top_p=1.0)  # nothing here needs a nucleus
        one_pass = len(rewards) <= cfg.micro_batch_size  # then it is also the first look
        now = look(model, rollout, cfg) if one_pass else siren.score(model, rollout, plain)
        batch = self.mini_batch(rollout, old_logp, rewards, now, plain)
        adv = method.advantages(batch) if method.advantages else batch.adv
        weights = method.term_weights(batch) if method.term_weights else 1.0
        weights = torch.as_tensor(weights, device=adv.device).expand(adv.shape)
        changed = ((adv != batch.adv) & batch.mask).sum() / batch.mask.sum()

        def loss_of(rows: Tensor) -> Tensor:
            part, seen = batch.rows(rows), now if one_pass else look(model, rollout.rows(rows), cfg)
            loss, stats = siren.policy_loss(
                seen["logp"], part.old_logp, adv[rows], part.mask,
                cfg.clip_low, cfg.clip_high, cfg.max_tokens, cfg.algorithm,
            )  # fmt: skip
            stats = {name: x * part.mask.sum() / batch.mask.sum() for name, x in stats.items()}
            share = len(rows) / len(rewards)
            stats["policy_loss"] = share * loss.detach()
            if method.term:
                x = weights[rows] * method.term(seen, part)
                term = per_response(x, part.mask, cfg.max_tokens, cfg.algorithm)
                stats["regularizer_loss"] = share * term.detach()
                loss = loss + term
            for name, value in stats.items():
                total[name] += float(value)
            return loss

        def rehearsal_of(rows: Tensor) -> Tensor:
            part, base_logp = self.rehearsed.rows(index[rows]), self.rehearsed_logp[index[rows]]
            x = method.rehearsal(look(model, part, cfg)["logp"] - base_logp, self.options)
            loss = per_response(x, part.mask, cfg.max_tokens, cfg.algorithm)
            total["regularizer_loss"] += len(rows) / len(index) * float(loss.detach())
            return loss

        optimizer.zero_grad()
        backward(len(rewards), cfg.micro_batch_size, loss_of)
        if method.rehearsal:
            some = min(self.options.batch, len(self.rehearsed.mask))
            index = torch.tensor(self.draw("rows").sample(range(len(self.rehearsed.mask)), some))
            backward(some, cfg.micro_batch_size, rehearsal_of)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip))
        if math.isfinite(norm):
            optimizer.step()
        self.updates += 1
        return {**total, **self.state, "changed_share": float(changed), "grad_norm": norm}


def use(method: Method, **options: Any) -> None:
    """Plug a method into siren, with options (numbers, or text of them) in place of its own."""
    for name, value in options.items():
        if name not in method.options:
            rule = f"{method.title} has no such option, but {', '.join(method.options)}"
            raise siren.ConfigError(f"{name}={value}: {rule}")
        options[name] = type(method.options[name])(value)
        low, high = LIMITS.get(name, (0, 1e9))
        if not low <= options[name] <= high:
            raise siren.ConfigError(f"{name}={value}: must be from {low} to {high}")
    plugged = Plugged(method, {**method.options, **options})
    siren.load_task, siren.training_step = plugged.load_task, plugged.training_step
    siren.update = plugged.update
    if method.respond:
        siren.respond = plugged.respond
