"""What all methods share: what a Method is, the mini-batch that it sees, and one update.

    L = L_DrGRPO with the advantages A'_t  +  agg(w_t x_t)

    A'_t  the method's advantages. A weight w >= 0 of the policy loss is one of them, since
          w min(r A, clip(r) A) = min(r w A, clip(r) w A)
    x_t   the method's own loss of a token; w_t its weight, which has no gradient
    agg   as in L_DrGRPO: sum over a response's tokens / max_tokens, mean over the responses

A' and w are computed from the whole mini-batch under the policy as it is now, whatever means,
quantiles or largest values a method needs. Only the passes are cut into micro-batches.

A controller's state is numbers in the step's record, from which the next step starts. So it is
in every checkpoint, and a resumed run goes on with the same numbers.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

import siren
from research.zoo import support

Tensor = torch.Tensor
# what an option may be; any other is a number >= 0
LIMITS = dict.fromkeys(("quantile", "share", "rho", "mastered"), (0, 1)) | {"w_min": (1e-6, 1)}


@dataclasses.dataclass(frozen=True)
class Method:
    """What is said of a method, and what it changes. All else stays as in Dr.GRPO."""

    title: str
    number: int  # its place in docs/zoo.md
    source: str
    certainty: str = "high"  # of the definition: high, medium or low
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # changes in siren.Config
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # its own numbers
    coefficient: str = ""  # the main one of them (or of config): it is tuned
    candidates: tuple[float, ...] = ()  # its grid on the toy; a paper's values may not fit
    advantages: Callable[[MiniBatch], Tensor] | None = None  # A' [B, T]
    term: Callable[[dict[str, Tensor], MiniBatch], Tensor] | None = None  # x [B, T]
    term_weights: Callable[[MiniBatch], Tensor | float] | None = None  # w [B, T] or a number
    start: dict[str, float] = dataclasses.field(default_factory=dict)  # the state of step 1
    controller: Callable[[dict, Any], dict[str, float]] | None = None  # (last record, options)
    sample: Callable | None = None  # in the place of siren.sample, which is its first argument
    base_logp: bool = False  # does it look at the base model's logp of the mini-batch?
    rehearsal: Callable[[Tensor, Any], Tensor] | None = None  # x of (log(pi / base), options)

    @property
    def is_plugged(self) -> bool:
        """Is it more than settings of siren.Config?"""
        hooks = (self.advantages, self.term, self.sample, self.rehearsal)
        return any(hook is not None for hook in hooks)


@dataclasses.dataclass(frozen=True)
class MiniBatch:
    """What a method may look at: B responses, in groups. No tensor has a gradient."""

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
    algorithm: str  # as in siren.Config
    options: SimpleNamespace
    state: SimpleNamespace  # of the controller
    generator: torch.Generator  # for random masks: a function of seed, step and mini-batch


def per_response(
    x: Tensor, mask: Tensor, max_tokens: int, algorithm: str = "dr_grpo"
) -> Tensor:
    """agg: the mean over the responses of (1 / max_tokens) sum_t x_t, as in siren.policy_loss.

    >>> per_response(torch.tensor([[1.0, 3.0], [2.0, 9.0]]), torch.tensor([[1, 1], [1, 0]]), 4)
    tensor(0.7500)
    """
    mask = mask.bool()
    length = mask.sum(1).clamp(min=1) if algorithm == "grpo" else max_tokens
    return (torch.where(mask, x, 0.0).sum(1) / length).sum() / mask.any(1).sum().clamp(min=1)


def look(
    model: torch.nn.Module, rollout: siren.Rollout, cfg: siren.Config
) -> dict[str, Tensor]:
    """logp and the full entropy H of a rollout's tokens [B, T], both with a gradient."""
    now = siren.score(model, rollout, dataclasses.replace(cfg, top_p=1.0))
    return {"logp": now["logp"], "entropy": now["nucleus_entropy"]}  # with p = 1, H' is H


class Plugged:
    """A method in the place of some functions of siren.py, those that `use` names."""

    def __init__(self, method: Method, options: dict[str, Any]) -> None:
        self.method = method
        self.options = SimpleNamespace(**options)
        self.siren_run = siren.Run
        self.siren_step = siren.training_step
        self.siren_advantages = siren.group_advantages
        self.siren_sample = siren.sample
        self.base: torch.nn.Module | None = None

    def new_run(self, cfg: siren.Config, resume: bool = False) -> siren.Run:
        """siren.Run; a ValueError if there is a regulariser as well."""
        rule = f"{self.method.title} comes in its place; add --regularizer none"
        siren.require(cfg.regularizer == "none", f"--regularizer {cfg.regularizer}: {rule}")
        return self.siren_run(cfg, resume)

    def training_step(self, run: siren.Run, step: int) -> dict[str, float]:
        """siren.training_step, with the state that the record before it leads to."""
        self.state = self.state_after(run.records[-1])
        self.key = f"{run.cfg.seed}/{step}"
        self.updates = 0
        if self.base is None and (self.method.base_logp or self.method.rehearsal):
            self.base = run.task.build_model().to(run.model.device).eval()
            if self.method.rehearsal:
                self.rehearsed, self.rehearsed_logp = self.mastered(run.task, run.cfg)
        return self.siren_step(run, step)

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
        o = self.options
        key = f"{cfg.seed}/base"
        problems = task.train_problems(o.prompts, key)
        rollout = siren.sample(self.base, task, problems, cfg, key, o.samples, cfg.temperature)
        right = support.rewards_of(task, problems, rollout).view(-1, o.samples)
        kept = (right > 0) & (right.mean(1, keepdim=True) >= o.mastered)
        rule = "the base masters no prompt; lower it"
        siren.require(kept.any(), f"mastered={o.mastered}: {rule}")
        rollout = rollout.rows(kept.flatten().nonzero()[:, 0])
        return rollout, siren.score(self.base, rollout, cfg)["logp"]

    def group_advantages(self, rewards: Tensor, group_size: int, algorithm: str) -> Tensor:
        """A and the reward of each response, [B, 2], since `update` needs both."""
        adv = self.siren_advantages(rewards, group_size, algorithm)
        return torch.stack([adv, rewards], 1)

    def sample(
        self,
        model: torch.nn.Module,
        task: Any,
        problems: Any,
        cfg: siren.Config,
        key: str,
        samples: int,
        temperature: float,
    ) -> siren.Rollout:
        """The method's sampler in training, where the key ends in a number; else siren's."""
        common = (model, task, problems, cfg, key, samples, temperature)
        if not key.rpartition("/")[2].isdigit():
            return self.siren_sample(*common)
        return self.method.sample(self.siren_sample, *common, **vars(self.options))

    def draw(self, what: str) -> random.Random:
        """A source of random numbers that is a function of seed, step and mini-batch."""
        return random.Random(f"{self.key}/{self.updates}/{what}")

    @torch.no_grad()
    def mini_batch(
        self,
        rollout: siren.Rollout,
        old_logp: Tensor,
        adv: Tensor,
        rewards: Tensor,
        now: dict[str, Tensor],
        cfg: siren.Config,
    ) -> MiniBatch:
        """What the method sees of a mini-batch; now: logp and H of it."""
        base_logp = torch.zeros_like(old_logp)
        if self.method.base_logp:
            base_logp = siren.score(self.base, rollout, cfg)["logp"]
        return MiniBatch(
            rewards=rewards,
            adv=adv[:, None].expand(rollout.mask.shape),
            mask=rollout.mask,
            old_logp=old_logp,
            sampled_logp=rollout.logp,
            logp=now["logp"].detach(),
            entropy=now["entropy"].detach(),
            base_logp=base_logp,
            group_size=cfg.group_size,
            max_tokens=cfg.max_tokens,
            algorithm=cfg.algorithm,
            options=self.options,
            state=SimpleNamespace(**self.state),
            generator=torch.Generator().manual_seed(self.draw("mask").getrandbits(63)),
        )

    def update(
        self, run: siren.Run, rollout: siren.Rollout, old_logp: Tensor, adv_and_rewards: Tensor
    ) -> dict[str, float]:
        """siren.update with the method's advantages, term and rehearsal."""
        cfg = run.cfg
        method = self.method
        now = look(run.model, rollout, cfg)
        batch = self.mini_batch(rollout, old_logp, *adv_and_rewards.unbind(1), now, cfg)
        mask = batch.mask
        adv = method.advantages(batch) if method.advantages else batch.adv
        clip = (cfg.max_tokens, cfg.clip_low, cfg.clip_high, cfg.algorithm)
        loss, metrics = siren.policy_loss(now["logp"], old_logp, adv, mask, *clip)
        metrics["policy_loss"] = loss.detach()
        metrics["regularizer_loss"] = torch.zeros(())
        if method.term:
            weights = method.term_weights(batch) if method.term_weights else 1.0
            x = weights * method.term(now, batch)
            term = per_response(x, mask, cfg.max_tokens, cfg.algorithm)
            metrics["regularizer_loss"] = term.detach()
            loss = loss + term
        run.optimizer.zero_grad()
        loss.backward()
        if method.rehearsal:
            metrics["regularizer_loss"] = metrics["regularizer_loss"] + self.rehearse(run)
        norm = torch.nn.utils.clip_grad_norm_(
            run.weights, cfg.grad_clip, error_if_nonfinite=True
        )
        run.optimizer.step()
        self.updates += 1
        metrics["changed_share"] = ((adv != batch.adv) & mask).sum() / mask.sum()
        metrics["grad_norm"] = norm
        return {name: float(x) for name, x in (metrics | self.state).items()}

    def rehearse(self, run: siren.Run) -> Tensor:
        """Add the gradient of a loss on some of the base's responses; return the loss."""
        count = len(self.rehearsed.mask)
        some = self.draw("rows").sample(range(count), min(self.options.batch, count))
        index = torch.tensor(some)
        part = self.rehearsed.rows(index)
        log_u = look(run.model, part, run.cfg)["logp"] - self.rehearsed_logp[index]
        x = self.method.rehearsal(log_u, self.options)
        loss = per_response(x, part.mask, run.cfg.max_tokens, run.cfg.algorithm)
        loss.backward()
        return loss.detach()


def use(method: Method, **options: Any) -> None:
    """Plug a method into siren, with options (numbers or text) in place of its own."""
    for name, value in options.items():
        if name not in method.options:
            rule = f"{method.title} has no such option, but {', '.join(method.options)}"
            raise ValueError(f"{name}={value}: {rule}")
        options[name] = type(method.options[name])(value)
        low, high = LIMITS.get(name, (0, 1e9))
        if not low <= options[name] <= high:
            raise ValueError(f"{name}={value}: must be from {low} to {high}")
    plugged = Plugged(method, {**method.options, **options})
    siren.Run = plugged.new_run
    siren.training_step = plugged.training_step
    siren.group_advantages = plugged.group_advantages
    siren.update = plugged.update
    if method.sample:
        siren.sample = plugged.sample
