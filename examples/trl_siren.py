"""SIREN on TRL's GRPOTrainer: the method of siren.py in several processes, exactly.

    python examples/trl_siren.py                               # the toy task, on a CPU
    torchrun --nproc_per_node 2 examples/trl_siren.py          # ... in two processes
    python examples/trl_siren.py --model MODEL --data FILE.jsonl --output_dir runs/mine
    python examples/trl_siren.py --help                        # TRL's options and SIREN's

TRL has L_DrGRPO, the sampling, the processes and its metrics; the masks and entropies are
those of siren.py. A mini-batch is spread over micro-batches and processes, and beta (H_agg -
H*)^2 is not a sum over them. So a pass without gradient first finds H_agg of all of it; then
each micro-batch gets the anchor of `micro_batch_anchor`, and losses and gradients add up
exactly. The overridden methods are private to TRL and change from version to version: see
TESTED_WITH.
"""

import functools
import json
import math
import sys
import types
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above
import siren
import text_env
from examples import trl_data
from siren import require

TESTED_WITH = "1.16."  # the trl versions that tests/extra/test_trl_siren.py has run with
STATE = "siren_state.json"  # a checkpoint holds it beside TRL's files
MEASURE = ("siren_top_p", "peak_quantile", "temperature")  # H* belongs to these
KINDS = ("anchor", "bonus", "none")  # of regularizer, see siren_loss
# what makes logits more than the output of the head, which is all that is scored
HEAD_FIELDS = ["final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"]
HEAD_FIELDS += ["logit_scale", "logits_scaling", "logits_mup_width_multiplier"]
HEAD_FIELDS += ["lm_head_multiplier", "output_multiplier"]
# TRL's options that must keep their defaults; docs/trl.md says why
USUAL = ("beta", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs")
USUAL += ("entropy_coef", "use_adaptive_entropy", "entropy_target", "top_entropy_quantile")
USUAL += ("use_liger_kernel",)


def option(default: Any, doc: str, **more: Any) -> Any:
    """A field whose documentation also feeds --help."""
    return field(default=default, metadata={"help": doc, **more})


@dataclass
class SirenGRPOConfig(GRPOConfig):
    """GRPOConfig, Dr.GRPO by default, with siren.py's settings. `beta` and `top_p` were taken:
    TRL's are the weight of a KL term and a truncation of the samples."""

    loss_type: str = option("dr_grpo", "TRL's name of the policy loss")
    scale_rewards: str = option("none", "none: an advantage is reward - mean, as in Dr.GRPO")
    siren_beta: float = option(0.005, "weight of SIREN's regulariser")
    siren_top_p: float = option(0.8, "p of the policy nucleus, in (0, 1]")
    peak_quantile: float = option(0.8, "tau of the peak-entropy mask, in [0, 1]; 0 = no mask")
    regularizer: str = option("anchor", "see siren.py", choices=KINDS)
    anchor: float = option(0.0, "H* in nats; 0 = that of the first rollout of all processes")
    entropy_chunk: int = option(256, "tokens whose logits are in memory at once; 0 = by size")

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.steps_per_generation % self.gradient_accumulation_steps == 0
        rules = {  # option -> whether it is fine, and what it must be
            "siren_beta": (0 <= self.siren_beta < math.inf, ">= 0"),
            "anchor": (0 <= self.anchor < math.inf, ">= 0 nats; 0, and it is measured"),
            "siren_top_p": (0 < self.siren_top_p <= 1, "in (0, 1]"),
            "peak_quantile": (0 <= self.peak_quantile <= 1, "in [0, 1]"),
            "entropy_chunk": (self.entropy_chunk >= 0, ">= 0; 0 = by size"),
            "regularizer": (self.regularizer in KINDS, " or ".join(KINDS)),
            "gradient_accumulation_steps": (whole, "a divisor of --steps_per_generation"),
        }
        for name in USUAL:
            usual = getattr(GRPOConfig, name)
            rule = f"{usual}, TRL's default, as docs/trl.md explains"
            rules[name] = (getattr(self, name) == usual, rule)
        for name, (fine, rule) in rules.items():
            require(fine, f"--{name} {getattr(self, name)}: must be {rule}")


def check_version(found: str) -> None:
    """Refuse a trl that the tests have not run with: its private methods may have moved."""
    rule = f"tested with trl {TESTED_WITH}* alone; pip install -r requirements-examples.txt"
    require(found.startswith(TESTED_WITH), f"trl {found}: {rule}")


def check_supported(trainer: GRPOTrainer) -> None:
    """Refuse what would otherwise be silently inexact."""
    kind = type(trainer.args).__name__
    is_siren = isinstance(trainer.args, SirenGRPOConfig)
    require(is_siren, f"args {kind}: must be a SirenGRPOConfig")
    fix = "not supported; pass a tokenizer instead of a processor"
    require(not trainer._is_vlm, f"vision inputs: {fix}")
    if trainer.aux_loss_enabled:
        value = trainer.router_aux_loss_coef
        raise ValueError(
            f"--router_aux_loss_coef {value}: no auxiliary loss here; set it to 0"
        )
    deepspeed = trainer.accelerator.state.deepspeed_plugin
    sharded = deepspeed is not None and deepspeed.zero_stage == 3
    require(not sharded, "DeepSpeed ZeRO stage 3: not supported; use FSDP or stage 2")
    config = trainer.model.config.get_text_config()
    for name in HEAD_FIELDS:  # what is scored is head(hidden), and nothing more
        value = getattr(config, name, None)
        plain = value in (None, 1)
        require(plain, f"{name} {value}: capped or scaled logits are not supported")
    for module in trainer.model.modules():  # both passes of a step must see the same policy
        for name, value in vars(module).items():
            dropout = "drop" in name or "jitter" in name
            dropout |= name == "p" and isinstance(module, torch.nn.Dropout)
            if dropout and isinstance(value, float) and value > 0:
                where = f"{type(module).__name__}.{name} {value}"
                fix = "--disable_dropout true, or 0 in the model's (or LoRA's) configuration"
                raise ValueError(f"{where}: must be 0, the policy that was sampled; {fix}")


def micro_batch_anchor(h_micro, h_agg, anchor):
    """The anchor that makes a micro-batch pull as its mini-batch does.

    h_micro, h_agg: H_agg of a micro-batch and of the mini-batch, without gradient; anchor: H*.
    The losses of the parts are added up, each times its share of the responses. H_agg is such
    a sum, and its square is not. But with this anchor, h_micro - anchor' = H_agg - H* in each
    part, so each part's gradient is 2 beta (H_agg - H*) times that of its own h_micro, and
    these add up to the gradient of the whole. (siren.py needs no such formula: in one process
    it takes the square over all responses at once, see `in_parts`.)

    >>> micro_batch_anchor(2.0, h_agg=1.5, anchor=1.25)  # 2 - 1.75 = 1.5 - 1.25
    1.75
    """
    return h_micro - (h_agg - anchor)


class Head:
    """A model's head, in its own precision, and whole if FSDP splits it."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.weight = module.weight
        named = module.named_parameters()  # gathered once, not for every chunk
        self.whole = {n: p.full_tensor() for n, p in named if hasattr(p, "full_tensor")}

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.to(self.weight.dtype)
        return torch.func.functional_call(self.module, self.whole, hidden)


def add_head(model: torch.nn.Module, top_p: float, temperature: float, chunk: int) -> None:
    """Let model(rollout=...) return what siren.score returns, of a siren.Rollout.

    Done inside forward, as TRL does, since DDP, FSDP and autocast wrap that.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # generate() checks its arguments by this signature
    def forward(self: Any, *args: Any, rollout: Any = None, **kwargs: Any) -> Any:
        if rollout is None:
            return original(*args, **kwargs)
        mask = rollout.mask.bool()
        hidden = siren.forward(self, rollout)[mask]  # [N, D]
        head = Head(self.get_output_embeddings())
        tokens = rollout.tokens[mask]
        with torch.autocast(hidden.device.type, enabled=False):  # rounding shifts entropies
            stats = siren.stats_in_chunks(hidden, head, tokens, top_p, temperature, chunk)
        return {
            name: values.new_zeros(mask.shape).masked_scatter(mask, values)
            for name, values in stats.items()
        }

    model.forward = types.MethodType(forward, model)


class SirenGRPOTrainer(GRPOTrainer):
    """GRPOTrainer plus SIREN's regulariser; `args` is a SirenGRPOConfig.

    To TRL's metrics it adds siren/h_agg, siren/anchor, siren/regularizer_loss and
    siren/peak_fraction.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_version(version("trl"))
        super().__init__(*args, **kwargs)
        check_supported(self)
        self.anchor = self.args.anchor or None  # None until the first rollout has been scored
        base = self.model
        if hasattr(base, "peft_config"):
            base = base.get_base_model()
        add_head(base, self.args.siren_top_p, self.temperature, self.args.entropy_chunk)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **others: Any
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """logp and full entropy [B, T] of the last T tokens. H' is kept for SIREN."""
        given = {name for name, value in others.items() if value is not None}
        vision = sorted(given - {"compute_entropy", "compute_aux_loss"})
        rule = "not supported; train on text"
        require(not vision, f"vision inputs ({', '.join(vision)}): {rule}")
        halves = []
        for half in (slice(0, -logits_to_keep), slice(-logits_to_keep, None)):
            halves += [input_ids[:, half], attention_mask[:, half]]
        rollout = siren.Rollout(*halves, logp=attention_mask)  # logp is not looked at
        parts = []
        for rows in torch.arange(len(input_ids)).split(batch_size or len(input_ids)):
            with self.accelerator.autocast():
                parts.append(model(rollout=rollout.rows(rows)))
        stats = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        self._h = stats["nucleus_entropy"]
        return stats["logp"], stats["entropy"], None

    def _peaks(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """H', peaks and response mask [B, T] of the last forward pass's micro-batch."""
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)  # not what a tool wrote
        mask = mask.bool()
        return self._h, siren.peak_mask(self._h, mask, self.args.peak_quantile), mask

    @torch.no_grad()
    def _totals(self, batches: list[dict[str, Any]]) -> tuple[torch.Tensor, ...]:
        """H_agg, peak fraction and number of responses of these micro-batches, and of those
        of all processes."""
        # private to TRL, so it is imported after the check of the version
        from trl.models.utils import disable_gradient_checkpointing

        sums = []
        how = self.args.gradient_checkpointing_kwargs
        with disable_gradient_checkpointing(self.model, how):
            for batch in batches:
                ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
                seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
                keep = batch["completion_ids"].shape[1]
                self._get_per_token_logps_and_entropies(self.model, ids, seen, keep)
                h, peak, mask = self._peaks(batch)
                responses = mask.any(1).sum()
                h_sum = siren.aggregate_entropy(h, peak, mask) * responses
                sums.append(torch.stack([h_sum, responses, peak.sum(), mask.sum()]))
        totals = self.accelerator.reduce(torch.stack(sums).sum(0), "sum")
        h_sum, responses, peaks, tokens = totals
        responses = responses.clamp(min=1)
        return h_sum / responses, peaks / tokens.clamp(min=1), responses

    def _regularizer(self, h_agg: torch.Tensor, anchor: torch.Tensor | float) -> torch.Tensor:
        """The last term of siren.siren_loss."""
        if self.args.regularizer == "anchor":
            return self.args.siren_beta * (h_agg - anchor) ** 2
        if self.args.regularizer == "bonus":
            return -self.args.siren_beta * h_agg
        return 0.0 * h_agg

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """The next micro-batch; before a mini-batch, what all of its micro-batches need."""
        inputs = super()._prepare_inputs(generation_batch)
        args = self.args
        place = self._step % args.steps_per_generation
        if not self.model.training or place % args.gradient_accumulation_steps:
            return inputs
        if self.anchor is None:  # the whole first rollout, before any update
            self.anchor = float(self._totals(self._buffered_inputs)[0])
        batches = self._buffered_inputs[place : place + args.gradient_accumulation_steps]
        self._h_agg, peak_fraction, self._responses = self._totals(batches)
        values = {"h_agg": self._h_agg, "anchor": self.anchor, "peak_fraction": peak_fraction}
        values["regularizer_loss"] = self._regularizer(self._h_agg, self.anchor)
        for name, value in values.items():
            self._metrics["train"][f"siren/{name}"].append(float(value))
        return inputs

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss of a micro-batch (divided by their number), plus SIREN's share."""
        loss = super()._compute_loss(model, inputs)
        if not self.model.training:
            return loss
        h, peak, mask = self._peaks(inputs)
        h_micro = siren.aggregate_entropy(h, peak, mask)
        target = micro_batch_anchor(h_micro.detach(), self._h_agg, self.anchor)
        share = mask.any(1).sum() / self._responses
        share = share * self.accelerator.num_processes  # as gradients are averaged over them
        return loss + share * self._regularizer(h_micro, target)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            state = {name: getattr(self.args, name) for name in ("anchor", *MEASURE)}
            state["anchor"] = self.anchor
            (folder / STATE).write_text(json.dumps(state))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.anchor = self.saved_anchor(checkpoint)

    def saved_anchor(self, checkpoint: str) -> float:
        """H* of a checkpoint, which must have been measured as it would be now."""
        path = Path(checkpoint) / STATE
        rule = "does not exist; resume a checkpoint of this trainer"
        require(path.exists(), f"{path}: {rule}")
        saved = json.loads(path.read_text())
        for name, was in saved.items():
            now = getattr(self.args, name)
            fits = now == was or (name, now) == ("anchor", 0)
            require(fits, f"--{name} {now}: the checkpoint has {was}; leave it as it was")
        return saved["anchor"]


# --- the script ---


@dataclass
class Script:
    """What to train on."""

    model: str = option("", "a folder or a hub id; default: the base model of --task")
    data: str = option("", "with --model: a .jsonl file of question and answer")
    prompt: str = option(text_env.PROMPT, "with --model: the prompt's text")
    task: str = option("toy_env", "without --model: a task, see siren.py")
    lora_rank: int = option(0, "train LoRA adapters of this rank; 0 = all weights")


class Parser(HfArgumentParser):
    """HfArgumentParser whose errors are ValueErrors, and so one line each."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; see --help")


def siren_options(cfg: siren.Config) -> dict[str, Any]:
    """What siren.py does with this cfg, as options of SirenGRPOConfig."""
    own = {
        "siren_beta": cfg.beta,
        "siren_top_p": cfg.top_p,
        "peak_quantile": cfg.peak_quantile,
    }
    return {**trl_data.options(cfg), **own, "regularizer": cfg.regularizer}


def make_trainer(argv: list[str]) -> SirenGRPOTrainer:
    """The trainer that a command line asks for. Bad input is a ValueError or an OSError."""
    parser = Parser((Script, SirenGRPOConfig), description=__doc__, allow_abbrev=False)
    if not any(word.split("=")[0] == "--model" for word in argv):  # ten rollouts of the toy
        shown = {"logging_strategy": "steps", "logging_steps": 4, "disable_tqdm": False}
        toy = siren_options(siren.Config(steps=10)) | shown
        parser.set_defaults(**toy, output_dir="runs/trl-toy")
    script, args = parser.parse_args_into_dataclasses(argv)
    if checkpoint := args.resume_from_checkpoint:
        rule = "no such folder; name a checkpoint"
        require(Path(checkpoint).is_dir(), f"--resume_from_checkpoint {checkpoint}: {rule}")
    if script.model:
        parts = trl_data.text_parts(script.model, script.data, script.prompt)
    else:
        cfg = siren.Config(task=script.task, max_tokens=args.max_completion_length)
        parts = trl_data.toy_parts(cfg)
    if script.lora_rank:
        from peft import LoraConfig

        lora = {"r": script.lora_rank, "lora_alpha": 2 * script.lora_rank}
        parts["peft_config"] = LoraConfig(target_modules="all-linear", **lora)
    trainer = SirenGRPOTrainer(args=args, **parts)
    if checkpoint:
        trainer.saved_anchor(checkpoint)  # an error now, not after the preparations of TRL
    return trainer


def main(argv: list[str] | None = None) -> int:
    """The command: train, then save the model. Exit code 0: done, 2: bad input."""
    try:
        trainer = make_trainer(sys.argv[1:] if argv is None else argv)
    except (ImportError, OSError, ValueError) as error:
        print(f"trl_siren.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    return 0


if __name__ == "__main__":
    sys.exit(main())
