"""Is a newly taught base model of the toy as good as the one in assets/?

    python research/check_base.py     # one to two minutes

Both answer 1000 easy and 1000 hard problems. Exit code 0 if their shares of right answers
differ by no more than chance and another processor explain, 1 if they differ by more.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above

import siren
import toy_env


def check_base(world, model, n=1000):
    """Does this model of the world answer as many problems as the model in the file?"""
    problems = [problem for group in world.heldout(n).values() for problem in group]
    cfg = siren.Config(eval_samples=1, eval_temperature=1.0)
    stored = siren.evaluate(world.build_model(), world, problems, cfg)["avg@1"]
    fresh = siren.evaluate(model, world, problems, cfg)["avg@1"]
    error = math.sqrt((stored * (1 - stored) + fresh * (1 - fresh)) / len(problems))
    allowed = 4 * error + 0.03  # chance, and what other hardware may change
    print(f"stored {stored:.3f}, fresh {fresh:.3f}: a difference up to {allowed:.3f} is fine")
    return abs(stored - fresh) <= allowed


def main():
    """The command."""
    world = toy_env.ToyWorld()
    model = world.new_model()
    world.teach(model)
    return 0 if check_base(world, model) else 1


if __name__ == "__main__":
    sys.exit(main())
