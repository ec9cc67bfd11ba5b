"""A drop-in for siren.forward that reads a prompt once for all of its responses.

    python research/plugs.py --plug research.shared_prompts --model models/smollm2-135m ...
    python research/shared_prompts.py --model models/smollm2-135m ...        # what it saves

siren.forward reads the prompt before every response, and padding after it. Here a prompt and
its responses stand one after the other in a single row. The attention mask lets a response see
the prompt and itself, and positions count on from the prompt:

    tokens      p0 p1 p2 | a0 a1 a2 | b0 b1
    positions    0  1  2 |  3  4  5 |  3  4
    b1 sees     p0 p1 p2 |          | b0 b1

The numbers and gradients are the same up to rounding. It pays where prompts are long beside
the responses, or responses differ in length. It needs an attention that takes any mask:
transformers' "sdpa" (the default) or "eager", and a model without sliding windows or recurrent
layers.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above
import siren

Tensor = torch.Tensor


def in_one_row(network: Any, group: siren.Rollout) -> Tensor:
    """The hidden states [n, D] that predict the n response tokens of a prompt, row by row."""
    prompt = group.prompt[0][group.prompt_mask[0]]  # [p]
    row, t = group.mask.nonzero(as_tuple=True)  # [n] each: whose token it is, and which
    ids = torch.cat([prompt, group.tokens[group.mask]])  # [p + n]
    owner = torch.cat([torch.zeros_like(prompt), row + 1])  # 0 is the prompt, which all see
    position = torch.cat([torch.arange(len(prompt), device=t.device), len(prompt) + t])
    index = torch.arange(len(ids), device=t.device)
    seen = (owner == 0) | (owner == owner[:, None])
    seen &= index <= index[:, None]  # [p + n, p + n]: who (row) sees whom (column)
    bias = torch.zeros(seen.shape, dtype=network.dtype, device=t.device)
    bias = bias.masked_fill(~seen, torch.finfo(bias.dtype).min)[None, None]
    out = network(ids[None], attention_mask=bias, position_ids=position[None], use_cache=False)
    before = torch.where(t == 0, len(prompt) - 1, index[len(prompt) :] - 1)
    return out.last_hidden_state[0, before]


def forward(model: Any, rollout: siren.Rollout) -> Tensor:
    """siren.forward's hidden states [B, T, D]; 0 in padding."""
    both = torch.cat([rollout.prompt, rollout.prompt_mask], 1)
    new = (both[1:] != both[:-1]).any(1).nonzero()[:, 0] + 1  # the rows with another prompt
    ends = [0, *new.tolist(), len(both)]
    groups = [rollout.rows(slice(*rows)) for rows in pairwise(ends)]
    hidden = torch.cat([in_one_row(model.base_model, group) for group in groups])  # [N, D]
    out = hidden.new_zeros(*rollout.mask.shape, hidden.shape[-1])
    return out.masked_scatter(rollout.mask[..., None], hidden)


def plug() -> None:
    """What `--plug research.shared_prompts` does."""
    siren.forward = forward


# ---------------------------------------------------------------------- how much does it save?
def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """The processor time of a call, and its result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


@torch.no_grad()
def score(run: siren.Run, rollout: siren.Rollout) -> dict[str, Tensor]:
    """siren.score of a rollout, before its updates."""
    return siren.score(run.model, rollout, run.cfg)


def update_all(run: siren.Run, rollout: siren.Rollout, old_logp: Tensor, adv: Tensor) -> None:
    """The updates of a step, a mini-batch each."""
    groups = torch.arange(len(adv)).view(run.cfg.prompts, -1)
    for mini_batch in groups.tensor_split(run.cfg.mini_batches):
        rows = mini_batch.flatten()
        siren.update(run, rollout.rows(rows), old_logp[rows], adv[rows])


def measure(run: siren.Run) -> str:
    """A table of the CPU seconds of the parts of a step, without and with the drop-in."""
    cfg = run.cfg
    torch.set_num_threads(cfg.threads)
    run.anchor = 1.0
    run.optimizer.param_groups[0]["lr"] = 0.0  # both measure the same weights
    problems = run.task.train_problems(cfg.prompts, "0/1")
    how = (run.task, problems, cfg, "0/1", cfg.group_size, cfg.temperature)
    sampling, rollout = cpu_seconds(partial(siren.sample, run.model, *how))
    adv = torch.arange(len(rollout.mask)) % 2.0 - 0.5  # without a signal there is no gradient
    adv = adv.to(run.model.device)
    lines = ["| | sampling | scoring | update | step |", "|---|---|---|---|---|"]
    ways = {"siren.forward": siren.forward, "research.shared_prompts": forward}
    for name, way in ways.items():
        with mock.patch.object(siren, "forward", way):
            scoring, old = cpu_seconds(partial(score, run, rollout))
            updates, _ = cpu_seconds(partial(update_all, run, rollout, old["logp"], adv))
        times = (sampling, scoring, updates, sampling + scoring + updates)
        lines.append(f"| {name} | " + " | ".join(f"{seconds:.1f}" for seconds in times) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int | None:
    """siren.py's command, with its flags and exit codes. It measures instead of training."""
    flags = sys.argv[1:] if argv is None else argv
    measured = {"train": measure, "report": print}
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(siren, **measured):
        return siren.main([*flags, "--out", folder])


if __name__ == "__main__":
    sys.exit(main())
