"""What the tests of the memory plan share: a trainer of siren.py, and its measured peaks.

The measure is PyTorch's own allocator, through the profiler: every block that the kernels were
given on the CPU. The plan never sees it.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import siren
import text_env
from examples import memory_plan
from research.bench import allocated_peak

# initializer_range: a policy that knows what it wants, as language models do
BODY = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
BODY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
BODY |= {"model_type": "qwen2", "vocab_size": 512, "tie_word_embeddings": True}
BODY |= {"initializer_range": 1.0}
WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
FLAGS: dict[str, Any] = {
    "prompts": 4,
    "group_size": 4,
    "mini_batches": 2,
    "micro_batch_size": 4,
}
FLAGS |= {"max_tokens": 24, "sample_batch": 16, "eval_prompts": 1, "eval_samples": 1}
FLAGS |= {"device": "cpu"}
PROMPT = 16
MEASURED = 0.15  # the plan allows for more, as no GPU was measured


def make_run(model: dict[str, Any], flags: dict[str, Any], **options: Any) -> memory_plan.Run:
    """A run of a small model."""
    return memory_plan.Run(siren.Config(**FLAGS | flags), BODY | model, PROMPT, **options)


class Trainer:
    """A run's model, optimiser and rollout, as siren.Run sets them up."""

    def __init__(self, run: memory_plan.Run) -> None:
        torch.manual_seed(0)
        self.cfg = run.cfg
        config = AutoConfig.for_model(**run.model)
        self.vocab = config.vocab_size
        network = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, run.dtype))
        self.model = network.eval()
        if run.lora_rank:
            text_env.add_lora(self.model, run.lora_rank, seed=0)
        if run.recompute:
            text_env.recompute_layers(self.model)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, fused=True)
        self.anchor = 1.0
        n = run.cfg.prompts * run.cfg.group_size
        prompt_mask = torch.ones(n, run.prompt, dtype=torch.bool)
        prompt_mask[1::2, : run.prompt // 2] = False  # half of the prompts are shorter
        mask = torch.ones(n, run.cfg.max_tokens, dtype=torch.bool)
        prompt = torch.randint(2, self.vocab, prompt_mask.shape)
        tokens = torch.randint(2, self.vocab, mask.shape)
        self.rollout = siren.Rollout(
            prompt, prompt_mask, tokens, mask, torch.zeros(mask.shape)
        )
        self.update()  # from the second on, the optimiser has its state

    def sampling(self) -> None:
        """A rollout in which no response ends early."""
        cfg = self.cfg
        pairs = zip(self.rollout.prompt, self.rollout.prompt_mask)
        prompts = [ids[mask].tolist() for ids, mask in list(pairs)[:: cfg.group_size]]
        prompts[0] = [2] * PROMPT
        problems = [SimpleNamespace(prompt=prompt) for prompt in prompts]
        task = SimpleNamespace(eos_ids=[self.vocab], pad_id=0)
        out = siren.sample(self.model, task, problems, cfg, "0", cfg.group_size, 1.0)
        assert out.mask.all()

    def scoring(self) -> None:
        """The log-probabilities before the updates."""
        with torch.no_grad():
            siren.score(self.model, self.rollout, self.cfg)

    def update(self) -> None:
        """One optimiser update."""
        n = self.cfg.prompts // self.cfg.mini_batches * self.cfg.group_size
        rollout = self.rollout.rows(slice(n))
        metrics = siren.update(self, rollout, rollout.logp, torch.linspace(-1, 1, n))
        assert math.isfinite(metrics["grad_norm"])


def check(run: memory_plan.Run) -> None:
    """Each phase of the plan, less what is exact, is within ERROR of what it really takes."""
    phases = memory_plan.plan(run)
    exact = {name: sum(p[part] for part in memory_plan.ROWS[:3]) for name, p in phases.items()}
    for name in ("sampling", "scoring", "update"):
        planned = memory_plan.total(phases[name])
        if name == "sampling":
            planned = max(planned, memory_plan.total(phases["prompts"]))
        peak = allocated_peak(getattr(Trainer, name), lambda: (Trainer(run),))
        part = peak - exact[name]
        assert part > 0 and planned - exact[name] == pytest.approx(
            part, rel=memory_plan.ERROR
        ), name
