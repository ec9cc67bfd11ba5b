"""Do examples/trl_siren.py and siren.py train alike? The toy through both, 3 seeds each.

    python research/compare_trl.py       # writes results/trl_vs_siren.json, prints its summary

Base model, prompts, learning rates and settings are the same. The samples differ, as each
engine draws its own, and so do the mini-batches: siren.py's hold whole groups, TRL shuffles
the responses. So the curves can agree only as far as those of two seeds of one engine do. (It
imports examples/trl_siren.py, since that is what it is about.)
"""

import itertools
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above
import siren
from examples import trl_data
from examples.trl_siren import SirenGRPOConfig, SirenGRPOTrainer, siren_options
from research.tools import Parser, run_tool

RESULT = Path(__file__).resolve().parents[1] / "results" / "trl_vs_siren.json"
SHOWN = {"reward": "reward", "H_agg": "h_agg"}  # the file's names of the metrics
SETTINGS = "steps prompts group_size mini_batches max_tokens beta top_p peak_quantile lr"


class RecordingTrainer(SirenGRPOTrainer):
    """Keeps reward and H_agg of each whole rollout before its first update, as siren.py
    does."""

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        if self._step % self.args.steps_per_generation == 0:
            self.curves["H_agg"].append(float(self._totals(self._buffered_inputs)[0]))
            self.curves["reward"].append(self._metrics["train"]["reward"][-1])
        return inputs


def siren_curves(cfg: siren.Config) -> dict[str, list[float]]:
    """The curves of one run of siren.py, by name."""
    steps = siren.train(siren.Run(cfg))[1:]
    return {name: [record[metric] for record in steps] for name, metric in SHOWN.items()}


def trl_curves(cfg: siren.Config) -> dict[str, list[float]]:
    """The curves of one run of TRL with siren.py's settings, prompts and learning rates."""
    task = trl_data.load_task(cfg)
    draws = [task.train_problems(cfg.prompts, f"{cfg.seed}/{n + 1}") for n in range(cfg.steps)]
    parts = trl_data.toy_parts(cfg, list(itertools.chain(*draws)))
    weights = parts["model"].parameters()
    optimizer = torch.optim.AdamW(weights, lr=cfg.lr, weight_decay=cfg.weight_decay)

    def warm_up(update: int) -> float:
        return min(1.0, (update // cfg.mini_batches + 1) / max(1, cfg.warmup_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
    args = SirenGRPOConfig(f"{cfg.out}-trl", **siren_options(cfg), shuffle_dataset=False)
    trainer = RecordingTrainer(args=args, optimizers=(optimizer, schedule), **parts)
    trainer.curves = {name: [] for name in SHOWN}
    trainer.train()
    return trainer.curves


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Curves [seeds, steps] of two engines: how far apart, next to how far apart seeds are.

    gap: mean over the steps of |difference of the engines' means|; spread: the same of two
    seeds of one engine; wider_splits: in how many of the other ways to split the runs into two
    equal halves the gap is larger (about half of them, if it makes no difference which engine
    was used).
    """

    def gap(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a.mean(0) - b.mean(0)).mean())

    runs = np.concatenate([ours, theirs])
    n = len(ours)
    halves = [h for h in itertools.combinations(range(2 * n), n) if h[0] == 0][1:]
    others = [gap(runs[list(h)], np.delete(runs, list(h), 0)) for h in halves]
    pairs = [(e[i], e[j]) for e in (ours, theirs) for i in range(n) for j in range(i)]
    apart = gap(ours, theirs)
    spread = float(np.mean([np.abs(a - b) for a, b in pairs]))
    return {
        "siren_last10": ours[:, -10:].mean(1).round(4).tolist(),
        "trl_last10": theirs[:, -10:].mean(1).round(4).tolist(),
        "gap": round(apart, 4),
        "spread": round(spread, 4),
        "wider_splits": f"{sum(other > apart for other in others)} of {len(others)}",
        "within": apart < spread,
    }


def command(argv: list[str] | None) -> int:
    """Train, compare, write the result and print it."""
    parser = Parser("compare_trl.py", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="rollouts a run")
    parser.add_argument("--seeds", type=int, default=3, help="runs an engine, at least 2")
    parser.add_argument("--out", type=Path, default=RESULT, help="the file to write")
    given = parser.parse_args(argv)
    siren.require(given.seeds >= 2, f"--seeds {given.seeds}: must be at least 2")
    siren.require(given.steps >= 1, f"--steps {given.steps}: must be at least 1")
    torch.set_num_threads(1)  # part of what makes the figures repeat
    settings = {"steps": given.steps, "threads": 1, "eval_prompts": 1, "eval_samples": 1}
    curves = {"siren": [], "trl": []}
    for seed in range(given.seeds):
        with tempfile.TemporaryDirectory() as folder:
            cfg = siren.Config(seed=seed, out=f"{folder}/run", **settings)
            curves["siren"].append(siren_curves(cfg))
            curves["trl"].append(trl_curves(cfg))
    summary = {}
    for name in SHOWN:
        ours, theirs = (np.array([curve[name] for curve in curves[e]]) for e in curves)
        summary[name] = compare(ours, theirs)
    packages = {name: version(name) for name in ("torch", "transformers", "trl")}
    shown = {name: getattr(cfg, name) for name in SETTINGS.split()}
    record = {"versions": packages, "settings": shown, "summary": summary, "curves": curves}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(summary, indent=1), f"\nwrote {given.out.name}")
    return 0 if all(found["within"] for found in summary.values()) else 1


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 0: alike, 1: not, 2: bad input."""
    return run_tool("compare_trl.py", command, argv)


if __name__ == "__main__":
    sys.exit(main())
