"""What only a GPU can show: is siren.py right there, how fast is it, in how much memory?

    python examples/gpu_check.py           # a GPU with 24 GB, 8 minutes; results/gpu.json
    python examples/gpu_check.py --small   # the same on tiny sizes, also on a CPU; --out FILE

 loss   loss and gradient in each dtype, against the formulas in float64 on the CPU
 stats  siren.stats_in_chunks in bfloat16, forward and back, against log_softmax + gather + the
        entropy of the whole vocabulary ("plain"), and against TRL's functions
 run    a training step of siren.Run; sampled against scored log-probabilities; siren.sample
        against model.generate; memory of an update against examples/memory_plan.py

The model is random: 1.03 billion parameters, no download. The bars on time were set before any
GPU was measured. Exit code 0: all checks pass, 1: one fails, 2: bad input.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above
import siren

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOP_P = 0.8
Size = namedtuple("Size", "name vocab hidden mlp layers heads dtype prompt response prompts n")
FULL = Size("full", 152_064, 1536, 8960, 12, 12, "bfloat16", 64, 128, 8, 4096)
SMALL = Size("small", 4096, 256, 768, 4, 4, "float32", 80, 16, 2, 2048)
ERRORS = {"float64": (1e-9, 1e-9), "float32": (1e-4, 1e-4), "bfloat16": (1e-4, 2e-2)}
GAPS = {"float32": 1e-3, "bfloat16": 0.3}  # nats; at a wrong position they would be 1.8


def judge(name, value, low, high, note=""):
    """A check, which passes if its value is from low to high."""
    row = {"check": name, "result": "pass" if low <= value <= high else "FAIL"}
    return row | {"value": value, "low": low, "high": high, "note": note}


def race(name, ours, other, high):
    """The check of our seconds / the other's, in turns: the median of three rounds."""
    seconds = []
    for function in (ours, other) * 4:  # the first two are not counted
        start = time.perf_counter()
        function()
        getattr(torch, DEVICE).synchronize()  # a GPU goes on working after the call
        seconds.append(time.perf_counter() - start)
    value, a, b = sorted((a / b, a, b) for a, b in zip(seconds[2::2], seconds[3::2]))[1]
    return judge(name, value, 0, high, f"{a:.3g} s / {b:.3g} s") | {"seconds": [a, b]}


def peak_of(function):
    """Bytes in use at the peak of function(), without those that were in use before."""
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, acc_events=False) as log:
        function()
    events = [e for e in log.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return torch.tensor(sizes).cumsum(0).max().item()


def by_hand(logits, tokens, old_logp, adv, mask):
    """The loss by its formulas: all logits sorted, no chunks, response by response."""
    log_pi = logits.log_softmax(-1)  # [B, T, V]
    ratio = (log_pi.gather(-1, tokens[..., None])[..., 0] - old_logp).exp()
    log_pi = log_pi.sort(-1, descending=True)[0]
    pi = log_pi.detach().exp()
    outside = pi.cumsum(-1) - pi >= TOP_P
    log_q = log_pi.masked_fill(outside, -torch.inf).log_softmax(-1)
    entropy = -(log_q.exp() * log_q.masked_fill(outside, 0)).sum(-1)  # [B, T]
    gain = torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv)[mask].sum() / mask.numel()
    h = [x[m & (x >= x[m].detach().quantile(0.8))].mean() for x, m in zip(entropy, mask)]
    return (sum(h) / len(h) - 1) ** 2 - gain


def by_siren(logits, tokens, old_logp, adv, mask):
    """The same by siren.py. Hidden states are unit vectors, so that no product is rounded."""
    hidden = torch.eye(mask.numel(), dtype=logits.dtype, device=logits.device)
    head = partial(torch.matmul, other=logits.flatten(0, 1))
    stats = siren.stats_in_chunks(hidden, head, tokens.flatten(), TOP_P, 1.0, chunk=40)
    logp, h = (stats[name].view(mask.shape) for name in ("logp", "nucleus_entropy"))
    policy, _ = siren.policy_loss(logp, old_logp, adv, mask, mask.shape[1])
    return siren.siren_loss(policy, h, mask, anchor=1.0, beta=1.0, peak_quantile=0.8)[0]


def check_loss(s):
    """With 16 likely tokens, no two alike, and noise: logits that bfloat16 holds exactly."""
    torch.manual_seed(0)
    logits = torch.randn(8, 16, s.vocab).bfloat16().double()  # [B, T, V]
    likely = s.vocab // 16 * torch.arange(16) + torch.randint(s.vocab // 16, (8, 16, 16))
    logits.scatter_(-1, likely, 13 + torch.rand(8, 16, 64).argsort(-1)[..., :16].double() / 8)
    logp = logits.log_softmax(-1).gather(-1, likely[..., 3:4])[..., 0].float()
    mask = torch.arange(16) < torch.randint(8, 17, (8, 1))
    batch = (likely[..., 3], logp + 0.2 * torch.randn(8, 16), torch.randn(8, 16), mask)

    def solve(method, dtype, device):
        leaf = logits.detach().to(device, dtype).requires_grad_()
        loss = method(leaf, *(x.to(device) for x in batch))
        return [x.detach().double().cpu() for x in (loss, *torch.autograd.grad(loss, leaf))]

    right = solve(by_hand, torch.float64, "cpu")
    for dtype, bars in ERRORS.items():
        found = solve(by_siren, getattr(torch, dtype), DEVICE)
        for name, x, y, high in zip(("loss", "gradient"), found, right, bars):
            error = ((x - y).abs().max() / y.abs().max()).item()
            yield judge(f"{name} in {dtype}: relative error", error, 0, high)


def forward_backward(method, hidden, head, tokens):
    """Log-probabilities and entropies of the tokens, and their gradients."""
    if method == "siren":
        stats = siren.stats_in_chunks(hidden, head, tokens, TOP_P, 1.0)
        total = (stats["logp"] + stats["nucleus_entropy"]).sum()
    elif method == "plain":
        log_pi = head(hidden).float().log_softmax(-1)
        total = log_pi.gather(-1, tokens[:, None]).sum() - (log_pi.exp() * log_pi).sum()
    else:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        x = head(hidden)[None]
        total = (selective_log_softmax(x, tokens[None]) + entropy_from_logits(x)).sum()
    torch.autograd.grad(total, [hidden, head.weight])


def check_stats(s):
    head = load(None, s.name).build_model().get_output_embeddings().bfloat16()
    hidden = torch.randn(s.n, s.hidden, device=DEVICE).bfloat16().requires_grad_()
    tokens = torch.randint(s.vocab, (s.n,), device=DEVICE)
    for other, slowest, largest in (("plain", 3, 0.6), ("trl", 5, 1)):
        name = f"stats, siren / {other}"
        if other == "trl" and not find_spec("trl"):
            yield {"check": name, "result": "-", "note": "trl is not installed"}
            continue
        ways = [partial(forward_backward, x, hidden, head, tokens) for x in ("siren", other)]
        yield race(f"{name}: time", *ways, slowest)
        a, b = map(peak_of, ways)
        yield judge(f"{name}: memory", a / b, 0, largest, f"{a:.3g} bytes / {b:.3g} bytes")


def load(cfg, size):
    """The task, for siren.Run: random prompts for a random model. A response is right if its
    last token is even. None ends early, since no token has the id that would end it."""
    s = SMALL if size == "small" else FULL

    def build_model():
        shape = {"vocab_size": s.vocab, "hidden_size": s.hidden, "intermediate_size": s.mlp}
        shape |= {"num_hidden_layers": s.layers, "num_attention_heads": s.heads}
        config = Qwen2Config(**shape, num_key_value_heads=2, tie_word_embeddings=False)
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, s.dtype))
        spread = 1.8 * math.sqrt(2 * math.log(s.vocab) / s.hidden)  # 1 to 2 nats, not flat
        torch.nn.init.normal_(model.get_output_embeddings().weight, 0, spread)
        return model

    def train_problems(n, key):
        ids = torch.randint(s.vocab, (n, s.prompt)).tolist()
        return [SimpleNamespace(prompt=prompt, answer="0") for prompt in ids]

    task = SimpleNamespace(build_model=build_model, train_problems=train_problems, pad_id=0)
    task.decode = lambda ids: f"\\boxed{{{ids[-1] % 2}}}"
    task.heldout = task.metrics = lambda _: {}
    task.find_answer = task.equal = task.normalize = None
    task.eos_ids = [s.vocab]
    return task


def check_run(s):
    flags = {"prompts": s.prompts, "mini_batches": s.prompts // 2, "max_tokens": s.response}
    flags |= {"micro_batch_size": 8, "device": DEVICE}
    with tempfile.TemporaryDirectory() as folder:
        run = siren.Run(siren.Config(f"examples.gpu_check:size={s.name}", out=folder, **flags))
        run.model.config.save_pretrained(folder)
        flags |= {"model": folder, "data": "none", "max_prompt": s.prompt, "dtype": s.dtype}
        words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        command = [sys.executable, Path(__file__).with_name("memory_plan.py"), *words]
        table = subprocess.check_output(command, text=True)
    planned = 1e9 * float(table.split("\ntotal ")[1].split()[3])  # the column of the update
    siren.training_step(run, 2)  # it warms up
    start = time.perf_counter()
    metrics = siren.training_step(run, 3)  # it returns numbers, so all work is done
    seconds = time.perf_counter() - start
    bad = sum(not math.isfinite(value) for value in metrics.values())
    yield judge("metrics not finite", bad, 0, 0, f"{seconds:.3g} s") | {"seconds": seconds}
    problems = run.task.train_problems(s.prompts, "")
    ours = partial(siren.sample, run.model, run.task, problems, run.cfg, "", 8, 1.0)
    rollout = ours()
    with torch.no_grad():
        gap = siren.score(run.model, rollout, run.cfg)["logp"] - rollout.logp
    yield judge("sampled - scored logp, nats", gap.abs().mean().item(), 0, GAPS[s.dtype])
    how = {"max_new_tokens": s.response, "num_return_sequences": 8, "do_sample": True}
    generate = partial(run.model.generate, rollout.prompt[::8], top_k=0, **how)
    row = race("siren.sample / generate: time", ours, generate, 1.25)
    yield row | {"note": f"{row['note']} for {rollout.mask.sum():,} tokens"}
    batch = (rollout.rows(slice(16)), rollout.logp[:16], torch.ones(16, device=DEVICE))
    run.optimizer.zero_grad()  # so that the gradients are part of what is added
    weights = sum(x.nbytes for x in run.weights)  # AdamW's state is twice as large
    total = 3 * weights + peak_of(lambda: siren.update(run, *batch))
    note = f"with weights, gradients, AdamW {total / 1e9:.2f} GB / {planned / 1e9:.2f} GB"
    value = (total - 4 * weights) / (planned - 4 * weights)
    yield judge("an update / its plan: working memory", value, 0.75, 1.25, note)


def main(argv=None):
    parser = argparse.ArgumentParser("gpu_check.py", usage=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help="tiny sizes, also on a CPU")
    parser.add_argument("--out", type=Path, help="the file [results/gpu.json; --small: none]")
    args = parser.parse_args(argv)
    out = args.out or Path(siren.__file__).with_name("results") / "gpu.json"
    if DEVICE == "cpu" and not args.small:
        parser.error("no GPU is here; add --small for tiny sizes on the CPU")
    if out.is_dir() or not out.parent.is_dir():
        parser.error(f"--out {out}: must be a file in a folder that exists")
    rows = []
    start = time.perf_counter()
    for part in (check_loss, check_stats, check_run):
        try:
            rows.extend(part(SMALL if args.small else FULL))  # those before an error stay
        except (RuntimeError, ValueError, subprocess.SubprocessError) as error:
            rows.append({"check": part.__name__, "result": "FAIL", "note": repr(error)[:150]})
    rows.append(judge("seconds in all", time.perf_counter() - start, 0, 480))
    for row in rows:
        bar = "{value:9.3g}  {low:g} to {high:g}".format(**row) if "value" in row else ""
        print(f"{row['check']:<42}{bar:<25}{row['result']:<6}{row['note']}")
    result = {"passed": all(row["result"] != "FAIL" for row in rows), "small": args.small}
    result["machine"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    packages = filter(find_spec, ("torch", "transformers", "trl", "triton"))
    result |= {"versions": {name: version(name) for name in packages}, "checks": rows}
    if args.out or not args.small:
        out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
