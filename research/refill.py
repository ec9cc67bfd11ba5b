"""A drop-in for siren.sample that refills: where a response ends, the next one begins at once.

    python research/plugs.py --plug research.refill --model ... --sample-batch 8
    python research/refill.py                # the model's passes of both samplers, counted

siren.sample takes the next prompts when all responses of the last ones have ended, so a batch
lasts as long as its longest response. Here each response that ends makes room for the next, so
that --sample-batch responses are being written until none is waiting (continuous batching).

The cache has a row for each response that is being written. Rows differ in length, so they end
in the same column and begin in different ones: the mask hides what is to the left of a row.
Where a response lies among the columns changes no number, as positions count a row's own
tokens.
"""

import copy
import math
import random
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicLayer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above
import siren
from research.tools import Parser, run_tool


# ------------------------------------------------------------------------------------- sampler
def beginnings(model, problems, samples):
    """For each response, in order, what its prompt left: a cache of one row and the logits
    [1, V] of the first token. A prompt is read once, alone, when its first response begins."""
    for problem in problems:
        cache = DynamicCache(config=model.config)
        if any(type(layer) is not DynamicLayer for layer in cache.layers):
            raise RuntimeError(
                "--plug research.refill: the model has layers that do not keep every token "
                "(sliding windows, recurrent states); leave the drop-in out"
            )
        ids = torch.tensor([problem.prompt], device=model.device)
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        yield from [(cache, out.logits[:, -1].float())] * samples


def arrange(cache, kept, new, width):
    """Leave in the cache the rows `kept`, then those of the caches `new`, in `width` columns:
    columns are cut or added on the left. A layer at a time, so that there is never a second
    cache in memory."""
    for layer, *added in zip(cache.layers, *(one.layers for one in new)):
        for name in ("keys", "values"):  # [n, heads, columns, d]
            parts = [getattr(layer, name)[kept], *(getattr(one, name) for one in added)]
            parts = [F.pad(x, (0, 0, width - x.shape[2], 0)) for x in parts]
            setattr(layer, name, torch.cat(parts))


@torch.no_grad()
def sample(model, task, problems, cfg, key, samples, temperature):
    """siren.sample, with at most cfg.sample_batch rows at a time."""
    device = model.device
    generator = torch.Generator(device).manual_seed(random.Random(key).getrandbits(63))
    eos = torch.tensor(task.eos_ids, device=device)
    longest = max(len(problem.prompt) for problem in problems)  # P
    sizes = torch.tensor([len(problem.prompt) for problem in problems], device=device)
    sizes = sizes.repeat_interleave(samples)  # [B]
    prompt = [[task.pad_id] * (longest - len(p.prompt)) + p.prompt for p in problems]
    prompt = torch.tensor(prompt, device=device).repeat_interleave(samples, 0)  # [B, P]
    prompt_mask = torch.arange(longest, device=device) >= longest - sizes[:, None]
    tokens = torch.full((len(sizes), cfg.max_tokens), task.pad_id, device=device)  # [B, T]
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    logp = torch.zeros_like(tokens, dtype=torch.float32)

    queue = beginnings(model, problems, samples)
    begun = 0  # how many responses have begun
    cache = None
    logits = None  # [n, V] of the rows that are being written
    rows = torch.empty(0, dtype=torch.long, device=device)  # [n] which responses they are
    length = torch.empty_like(rows)  # [n] how many tokens of each are in the cache
    while begun < len(sizes) or len(rows) > 0:
        # 1. free places are taken by the next responses
        if new := list(islice(queue, cfg.sample_batch - len(rows))):
            caches, first = zip(*new)
            added = torch.arange(begun, begun + len(new), device=device)
            old = torch.arange(len(rows), device=device)
            begun += len(new)
            rows = torch.cat([rows, added])
            length = torch.cat([length, sizes[added]])
            logits = torch.cat([*([] if logits is None else [logits]), *first])
            cache = cache or copy.deepcopy(caches[0])
            arrange(cache, old, caches, length.max().item())
        # 2. each row gets a token
        log_pi = (logits / temperature).log_softmax(-1)
        if log_pi.isnan().any():
            raise RuntimeError("the model's logits are not finite")
        ids = siren.draw(log_pi.exp(), generator)  # [n, 1]
        t = length - sizes[rows]  # [n]
        tokens[rows, t] = ids[:, 0]
        mask[rows, t] = True
        logp[rows, t] = log_pi.gather(1, ids)[:, 0]
        # 3. rows that have ended leave, with the columns that they alone used
        goes_on = (~torch.isin(ids[:, 0], eos) & (t + 1 < cfg.max_tokens)).nonzero()[:, 0]
        if len(goes_on) < len(rows):
            rows = rows[goes_on]
            length = length[goes_on]
            ids = ids[goes_on]
            arrange(cache, goes_on, [], max(length.tolist(), default=0))
        # 4. the others are read, and predict
        logits = None
        if len(rows) > 0:
            columns = torch.arange(length.max().item() + 1, device=device)
            seen = (columns >= columns[-1] - length[:, None]).long()  # [n, columns]
            inputs = {"attention_mask": seen, "position_ids": length[:, None]}
            inputs |= {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            logits = model(ids, **inputs).logits[:, -1].float()
            length = length + 1
    end = mask.any(0).sum()  # of the longest response
    return siren.Rollout(prompt, prompt_mask, tokens[:, :end], mask[:, :end], logp[:, :end])


def plug():
    """What `--plug research.refill` does."""
    siren.sample = sample


# ---------------------------------------------------------------------- how much does it save?
class Geometric(Qwen2ForCausalLM):
    """A model that ends a response with probability 1 / mean at each token, whatever it reads.
    It counts its passes over prompts and over single tokens (decode steps)."""

    EOS = 1

    def __init__(self, mean):
        size = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
        size |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
        super().__init__(Qwen2Config(**size, max_position_embeddings=2**20))
        self.mean = mean
        self.passes = Counter()

    def forward(self, input_ids, **options):
        """Qwen2's, with other logits."""
        out = super().forward(input_ids, **options)
        self.passes["decode steps" if input_ids.shape[1] == 1 else "prompts"] += 1
        out.logits = torch.zeros_like(out.logits)
        odds = 1 / (self.mean - 1)
        out.logits[..., self.EOS] = math.log(odds * (out.logits.shape[-1] - 1))
        return out


def count(sampler, prompts, samples, batch, mean, max_tokens, seed):
    """Passes of the model and tokens of all responses, with one of the samplers."""
    model = Geometric(mean).eval()
    task = SimpleNamespace(eos_ids=[Geometric.EOS], pad_id=0)
    problems = [SimpleNamespace(prompt=[2, 3, 4])] * prompts
    cfg = siren.Config(sample_batch=batch, max_tokens=max_tokens)
    out = sampler(model, task, problems, cfg, str(seed), samples, 1.0)
    return {**model.passes, "tokens": out.mask.sum().item()}


def command(argv):
    """Print counts of both samplers."""
    parser = Parser("refill.py", description="Decode steps without and with refill.")
    parser.add_argument("--prompts", type=int, default=64, help="how many [%(default)s]")
    parser.add_argument("--samples", type=int, default=8, help="of a prompt [%(default)s]")
    parser.add_argument("--batch", type=int, default=8, help="--sample-batch [%(default)s]")
    parser.add_argument("--mean", type=int, default=100, help="of the lengths [%(default)s]")
    parser.add_argument(
        "--max-tokens", type=int, default=400, help="the longest [%(default)s]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws [%(default)s]")
    given = parser.parse_args(argv)
    for name, value in vars(given).items():
        least = {"mean": 2, "seed": 0}.get(name, 1)
        siren.require(value >= least, f"--{name} {value}: must be {least} or more")
    torch.set_num_threads(1)
    print(f"{given.prompts} prompts x {given.samples} responses, --sample-batch {given.batch}")
    print(f"length of a response: geometric, mean {given.mean}, at most {given.max_tokens}\n")
    print("| sampler | passes over prompts | decode steps | tokens | tokens per decode step |")
    print("|---|---|---|---|---|")
    for name, sampler in {"siren.sample": siren.sample, "research.refill": sample}.items():
        found = count(sampler, **vars(given))
        steps = found["decode steps"]
        tokens = found["tokens"]
        print(f"| {name} | {found['prompts']} | {steps} | {tokens} | {tokens / steps:.2f} |")


def main(argv=None):
    """The command. Exit codes as run_tool says."""
    return run_tool("refill.py", command, argv)


if __name__ == "__main__":
    sys.exit(main())
