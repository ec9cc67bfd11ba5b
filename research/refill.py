"""A drop-in for siren.sample that refills: where a response ends, the next one begins at once.

    python siren.py --plug examples.refill --model ... --sample-batch 8
    python examples/refill.py                   # the model's passes of both samplers, counted

siren.sample takes the next prompts when all responses of the last ones have ended, so a batch lasts
as long as its longest response. Here each response that ends makes room for the next, so that
--sample-batch responses are being written until none is waiting (continuous batching).

The cache has a row for each response that is being written. Rows differ in length, so they end in
the same column and begin in different ones: the mask hides what is to the left of a row. Where a
response lies among the columns changes no number, as positions count a row's own tokens.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicLayer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above
import siren

Tensor = torch.Tensor


# ----------------------------------------------------------------------------------------- sampler
def beginnings(
    model: torch.nn.Module, prompts: Sequence[list[int]], samples: int
) -> Iterator[tuple[DynamicCache, Tensor]]:
    """For each response, in order, what its prompt left: a cache of one row and the logits [1, V]
    of the first token. A prompt is read once, alone, when its first response begins."""
    device = next(model.parameters()).device
    for prompt in prompts:
        cache = DynamicCache(config=model.config)
        if any(type(layer) is not DynamicLayer for layer in cache.layers):
            reason = "has layers that do not keep every token (sliding windows, recurrent states)"
            raise siren.ConfigError(f"--plug examples.refill: the model {reason}; leave it out")
        ids = torch.tensor([prompt], device=device)
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        yield from [(cache, out.logits[:, -1].float())] * samples


def arrange(cache: DynamicCache, kept: Tensor, new: list[DynamicCache], width: int) -> None:
    """Leave in the cache the rows `kept`, then the new ones, in `width` columns: columns are cut or
    added on the left. A layer at a time, so that there is never a second cache in memory."""
    for layer, *added in zip(cache.layers, *(one.layers for one in new)):
        for name in ("keys", "values"):  # [n, heads, columns, d]
            parts = [getattr(layer, name)[kept], *(getattr(one, name) for one in added)]
            parts = [F.pad(x, (0, 0, width - x.shape[2], 0)) for x in parts]
            setattr(layer, name, torch.cat(parts))


@torch.no_grad()
def sample(
    model: torch.nn.Module, prompts: Sequence[list[int]], *, max_tokens: int, eos_ids: list[int],
    pad_id: int, samples: int = 1, temperature: float = 1.0, batch: int = 1024,
    generator: torch.Generator | None = None,
) -> siren.Rollout:  # fmt: skip
    """A Rollout as siren.sample's, with at most `batch` rows at a time."""
    device, longest = next(model.parameters()).device, max(map(len, prompts))
    sizes = torch.tensor([len(ids) for ids in prompts], device=device).repeat_interleave(samples)
    prompt = [[pad_id] * (longest - len(ids)) + ids for ids in prompts]
    prompt = torch.tensor(prompt, device=device).repeat_interleave(samples, 0)  # [B, P]
    prompt_mask = torch.arange(longest, device=device) >= longest - sizes[:, None]
    tokens = torch.full((len(sizes), max_tokens), pad_id, device=device)  # [B, T]
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    logp = torch.zeros_like(tokens, dtype=torch.float32)
    eos, queue = torch.tensor(eos_ids, device=device), beginnings(model, prompts, samples)

    begun, cache, logits = 0, None, None  # logits [n, V] of the rows that are being written
    rows = torch.empty(0, dtype=torch.long, device=device)  # [n] which responses they are
    length = torch.empty_like(rows)  # [n] how many tokens of each are in the cache
    while begun < len(sizes) or len(rows) > 0:
        # 1. free places are taken by the next responses
        if new := list(islice(queue, batch - len(rows))):
            caches, first = zip(*new)
            added = torch.arange(begun, begun + len(new), device=device)
            begun, old = begun + len(new), torch.arange(len(rows), device=device)
            rows, length = torch.cat([rows, added]), torch.cat([length, sizes[added]])
            logits = torch.cat([*([] if logits is None else [logits]), *first])
            cache = cache or copy.deepcopy(caches[0])
            arrange(cache, old, caches, int(length.max()))
        # 2. each row gets a token
        log_pi = (logits / temperature).log_softmax(-1)
        if log_pi.isnan().any():
            raise FloatingPointError("the model's logits are not finite")
        ids, t = siren.draw(log_pi.exp(), generator), length - sizes[rows]  # [n, 1], [n]
        tokens[rows, t], mask[rows, t] = ids[:, 0], True
        logp[rows, t] = log_pi.gather(1, ids)[:, 0]
        # 3. rows that have ended leave, with the columns that they alone used
        going = (~torch.isin(ids[:, 0], eos) & (t + 1 < max_tokens)).nonzero()[:, 0]
        if len(going) < len(rows):
            rows, length, ids = rows[going], length[going], ids[going]
            arrange(cache, going, [], max(length.tolist(), default=0))
        # 4. the others are read, and predict
        logits = None
        if len(rows) > 0:
            columns = torch.arange(int(length.max()) + 1, device=device)
            seen = (columns >= columns[-1] - length[:, None]).long()  # [n, columns]
            logits = model(
                ids, attention_mask=seen, position_ids=length[:, None], past_key_values=cache,
                use_cache=True, logits_to_keep=1,
            ).logits[:, -1].float()  # fmt: skip
            length = length + 1
    used = int(mask.any(0).sum())
    return siren.Rollout(prompt, prompt_mask, tokens[:, :used], mask[:, :used], logp[:, :used])


def plug() -> None:
    """What `--plug examples.refill` does."""
    siren.sample = sample


# --------------------------------------------------------------------------- how much does it save?
class Geometric(Qwen2ForCausalLM):
    """A model that ends a response with probability 1 / mean at each token, whatever it reads. It
    counts its passes over prompts and over single tokens (decode steps)."""

    EOS = 1

    def __init__(self, mean: float) -> None:
        size = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
        super().__init__(Qwen2Config(**size, **heads, max_position_embeddings=1 << 20))
        self.mean, self.passes = mean, Counter()

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        """Qwen2's, with other logits."""
        out = super().forward(input_ids, **options)
        self.passes["decode steps" if input_ids.shape[1] == 1 else "prompts"] += 1
        out.logits = torch.zeros_like(out.logits)
        odds = 1 / (self.mean - 1)
        out.logits[..., self.EOS] = math.log(odds * (out.logits.shape[-1] - 1))
        return out


def count(sampler: Callable[..., siren.Rollout], args: argparse.Namespace) -> dict[str, int]:
    """Passes of the model and tokens of all responses, with one of the samplers."""
    model = Geometric(args.mean).eval()
    out = sampler(
        model, [[2, 3, 4]] * args.prompts, max_tokens=args.max_tokens, eos_ids=[Geometric.EOS],
        pad_id=0, samples=args.samples, batch=args.batch,
        generator=torch.Generator().manual_seed(args.seed),
    )  # fmt: skip
    return {**model.passes, "tokens": int(out.mask.sum())}


def main(argv: list[str] | None = None) -> None:
    """The command: counts of both samplers."""
    parser = argparse.ArgumentParser(description="Decode steps without and with refill.")
    knobs = {"prompts": 64, "samples": 8, "batch": 8, "mean": 100, "max_tokens": 400, "seed": 0}
    for name, default in knobs.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    args = parser.parse_args(argv)
    if min(args.prompts, args.samples, args.batch, args.max_tokens) < 1 or args.mean < 2:
        parser.error("counts must be 1 or more, and --mean 2 or more")
    torch.set_num_threads(1)
    print(f"{args.prompts} prompts x {args.samples} responses, --sample-batch {args.batch}")
    print(f"length of a response: geometric, mean {args.mean}, at most {args.max_tokens} tokens\n")
    print("| sampler | passes over prompts | decode steps | tokens | tokens per decode step |")
    print("|---|---|---|---|---|")
    for name, sampler in {"siren.sample": siren.sample, "examples.refill": sample}.items():
        found = count(sampler, args)
        steps, tokens = found["decode steps"], found["tokens"]
        print(f"| {name} | {found['prompts']} | {steps} | {tokens} | {tokens / steps:.2f} |")


if __name__ == "__main__":
    main()
