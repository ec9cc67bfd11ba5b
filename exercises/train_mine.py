"""Train on the toy with your own exercises 1 to 7, and draw your curve beside siren.py's.

    python exercises/train_mine.py                                    # 100 steps, 1-2 minutes
    python exercises/train_mine.py --steps 200                        # all of siren.py's
    python exercises/train_mine.py --impl exercises/solutions.py      # the solutions

The sampler, the model and the loop are siren.py's; advantages, nucleus, entropy, peaks, anchor
and the loss with its gradient are yours. The curves are in runs/mine/mine.png, the numbers in
runs/mine/metrics.jsonl. siren.py's curve is results/default_run.jsonl, of the same seed: right
solutions begin with the same numbers. Later the curves differ as those of two seeds do, since
a number that is rounded differently once changes a draw, and with it all that follows.
"""

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py
import siren

ROOT = Path(__file__).resolve().parents[1]
NEEDED = {
    "group_advantages": 1,
    "policy_loss": 2,
    "nucleus_mask": 3,
    "nucleus_entropy": 4,
    "peak_mask": 5,
    "aggregate_entropy": 6,
    "siren_loss": 7,
}


def load(path: Path) -> ModuleType:
    """The module of a student's file."""
    siren.require(path.is_file(), f"--impl {path}: must be a Python file")
    spec = importlib.util.spec_from_file_location("student", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["student"] = module
    spec.loader.exec_module(module)
    return module


def check_all_there(mine: ModuleType) -> None:
    """ValueError with the number of each exercise that is not written yet."""
    two = torch.ones(1, 2)
    real = two.bool()
    logits = torch.zeros(1, 2, 3)
    inputs = {
        "group_advantages": (two[0], 2),
        "policy_loss": (two, two, two[0, :1], real),
        "nucleus_mask": (logits, 0.8),
        "nucleus_entropy": (logits, 0.8),
        "peak_mask": (two, real, 0.5),
        "aggregate_entropy": (two, real, real),
        "siren_loss": (logits, real.long(), two, two[0, :1], real, 1.0),
    }
    missing = []
    for name, number in NEEDED.items():
        options = {"beta": 0.1} if name == "siren_loss" else {}
        try:
            getattr(mine, name)(*inputs[name], **options)
        except (AttributeError, NotImplementedError) as error:
            unwritten = str(error).startswith("exercise ") or getattr(error, "obj", 0) is mine
            if not unwritten:
                raise
            missing.append(f"{number} ({name})")
    fix = "write them, or import them: from exercises.reference import nucleus_mask"
    siren.require(not missing, f"not written yet: exercise {', '.join(missing)}; {fix}")


@contextmanager
def in_place_of_sirens(mine: ModuleType) -> Iterator[None]:
    """Inside the block siren.train uses the functions of `mine`; afterwards siren's again."""

    def group_advantages(rewards, group_size, algorithm):
        return mine.group_advantages(rewards, group_size)

    def token_stats(logits, tokens, top_p, temperature):
        logits = logits / temperature
        log_pi = logits.log_softmax(-1)
        return {
            "logp": log_pi.gather(-1, tokens[..., None])[..., 0],
            "nucleus_entropy": mine.nucleus_entropy(logits, top_p),
            "entropy": -(log_pi.exp() * log_pi).sum(-1).detach(),
            "nucleus_size": torch.zeros(tokens.shape),  # only reported; a second sort is slow
        }

    def update(run, rollout, old_logp, adv):
        cfg = run.cfg
        hidden = siren.forward(run.model, rollout)  # [B, T, D]
        logits = run.model.get_output_embeddings()(hidden) / cfg.temperature
        loss, stats = mine.siren_loss(
            logits,
            rollout.tokens,
            old_logp,
            adv,
            rollout.mask,
            run.anchor,
            beta=cfg.beta,
            top_p=cfg.top_p,
            peak_quantile=cfg.peak_quantile,
            max_tokens=cfg.max_tokens,
        )
        run.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(run.weights, cfg.grad_clip)
        run.optimizer.step()
        values = {k: torch.as_tensor(x).detach() for k, x in stats.items()}
        return {name: x.item() for name, x in (values | {"grad_norm": norm}).items()}

    before = dict(vars(siren))
    siren.group_advantages = group_advantages
    siren.token_stats = token_stats
    siren.update = update
    siren.peak_mask = mine.peak_mask
    siren.aggregate_entropy = mine.aggregate_entropy
    try:
        yield
    finally:
        vars(siren).update(before)


def train(mine: ModuleType, steps: int, out: Path) -> list[dict]:
    """The records of a run with these functions; its metrics.jsonl is kept in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, in_place_of_sirens(mine):
        cfg = siren.Config(steps=steps, out=f"{folder}/run", device="cpu")
        records = siren.train(siren.Run(cfg))
        shutil.copy(f"{folder}/run/metrics.jsonl", out)
    return records


def draw(mine: list[dict], stored: list[dict], path: Path) -> None:
    """Reward, H_agg with its anchor, and entropy over the steps, of both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    titles = {"reward": "reward", "h_agg": "H_agg (nats)", "entropy": "entropy (nats)"}
    for axis, (name, title) in zip(axes, titles.items()):
        for records, label, style in ((stored, "siren.py", "-"), (mine, "yours", "--")):
            steps = [record["step"] for record in records if name in record]
            values = [record[name] for record in records if name in record]
            axis.plot(steps, values, style, label=label, linewidth=1.5)
        axis.set(title=title, xlabel="step", ylim=(0, None))
    anchor = next(record["anchor"] for record in mine if "anchor" in record)
    axes[1].axhline(anchor, color="0.4", linewidth=0.8, linestyle=":", label="your anchor")
    for axis in axes[:2]:
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def compare(mine: list[dict], stored: list[dict]) -> None:
    """Print both runs, at the same steps."""
    last = len(mine) - 1
    print(f"{'':18}{'step':>6}{'yours':>9}{'siren.py':>10}")
    for name in ("reward", "h_agg", "anchor", "entropy"):
        for step in sorted({1, last}):
            if last >= 1:
                row = f"{step:>6}{mine[step][name]:>9.3f}{stored[step][name]:>10.3f}"
                print(f"{name:18}{row}")
    for name in mine[last]:
        if "/" in name and name in stored[last]:
            print(f"{name:18}{last:>6}{mine[last][name]:>9.3f}{stored[last][name]:>10.3f}")


def main(argv: list[str] | None = None) -> int:
    """The command. 2: an exercise is missing, or a flag is wrong."""
    parser = argparse.ArgumentParser("train_mine.py", allow_abbrev=False)
    parser.add_argument("--impl", type=Path, default=ROOT / "exercises" / "student.py")
    parser.add_argument("--steps", type=int, default=100, help="1 to 200 [100]")
    parser.add_argument("--out", type=Path, default=Path("runs/mine"))
    given = parser.parse_args(argv)
    try:
        siren.require(1 <= given.steps <= 200, f"--steps {given.steps}: must be 1 to 200")
        mine = load(given.impl)
        check_all_there(mine)
    except ValueError as error:
        print(f"train_mine.py: {error}", file=sys.stderr)
        return 2
    stored_file = ROOT / "results" / "default_run.jsonl"
    stored = [json.loads(line) for line in stored_file.read_text().splitlines()]
    records = train(mine, given.steps, given.out)
    compare(records, stored)
    draw(records, stored, given.out / "mine.png")
    print(f"the curves are in {given.out / 'mine.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
