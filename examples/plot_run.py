"""Curves of one run or of several: reward, entropies and held-out scores over the steps.

python examples/plot_run.py runs/anchor-seed0                     # writes curves.png into it
python examples/plot_run.py runs/siren runs/dr_grpo --out both.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

STYLES = ("-", "--", ":", "-.")  # so that lines can be told apart in grey


def read(folder: Path) -> list[dict[str, float]]:
    """The records of a run's metrics.jsonl. ValueError, in one line, if there are none."""
    path = folder / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: can't be read ({error}); name a run folder") from error
    if not records:
        raise ValueError(f"{path}: is empty; name the folder of a run that has begun")
    return records


def draw(runs: dict[str, list[dict[str, float]]]) -> Figure:
    """Four panels; a line per run. In the second, the thin grey line is the anchor H*."""
    scores = [name for name in next(iter(runs.values()))[-1] if "pass@" in name]
    last = scores[-1] if scores else "hard/pass@16"
    panels = {"reward": "reward (training)", "h_agg": "H_agg, nats", "entropy": "H, nats"}
    figure = Figure(figsize=(12, 3), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 4), {**panels, last: last}.items()):
        for (label, records), style in zip(runs.items(), STYLES * len(runs)):
            some = [record for record in records if name in record]
            marker = "o" if "/" in name else ""
            values = [record[name] for record in some]
            axes.plot([r["step"] for r in some], values, style, marker=marker, label=label)
            if name == "h_agg" and some:
                axes.axhline(some[0]["anchor"], color="0.7", linewidth=0.8)
        axes.set(title=title, xlabel="step")
        axes.set_ylim(bottom=0)
    figure.axes[0].legend()
    return figure


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        "plot_run.py", usage=argparse.SUPPRESS, description=__doc__.splitlines()[0]
    )
    parser.add_argument("folders", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, help="default: curves.png in the first folder")
    args = parser.parse_args(argv)
    out = args.out or args.folders[0] / "curves.png"
    try:
        draw({folder.name: read(folder) for folder in args.folders}).savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        print(f"plot_run.py: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
