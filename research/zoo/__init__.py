"""The zoo: SIREN's neighbours as small functions, all on siren.py's training loop.

    python research/zoo.py --list                        # what there is
    python research/zoo.py --method clip_cov             # trains one; takes siren.py's flags
    python research/zoo.py --method clip_cov:rho=0.1,low=0.9 --seed 3

What `--method par` does, by hand:

    python research/plugs.py --plug research.zoo:method=par --regularizer none --out runs/par

Where to read: advantages.py, weights.py, terms.py and sampler.py have the formulas; methods.py
has a method an entry; core.py has the update that they share. yours.py shows how to add an
idea. docs/zoo.md says what each method changes and how sure its definition is.
"""

from __future__ import annotations

from typing import Any

from research import plugs
from research.zoo.core import Method, MiniBatch, use
from research.zoo.methods import METHODS, VARIANTS

__all__ = ["METHODS", "VARIANTS", "Method", "MiniBatch", "plug", "settings", "use"]


def find(name: str) -> Method:
    """The method of that name, or a ValueError that lists them."""
    every = {**METHODS, **VARIANTS}
    if name not in every:
        raise ValueError(f"method {name}: must be one of {', '.join(every)}")
    return every[name]


def plug(method: str, **options: str) -> None:
    """For --plug research.zoo:method=NAME,key=value,...: a method that is no mere setting."""
    found = find(method)
    if not found.is_plugged:
        raise ValueError(f"method={method}: {found.title} is settings of siren.py alone")
    use(found, **options)


def settings(name: str, **options: Any) -> dict[str, Any]:
    """What the method changes in plugs.Config; options in place of its own numbers.

    >>> settings("naive_bonus", beta=0.06)
    {'regularizer': 'bonus', 'top_p': 1.0, 'peak_quantile': 0.0, 'beta': 0.06}
    >>> settings("qae", quantile=0.6)
    {'regularizer': 'none', 'plug': 'research.zoo:method=qae,quantile=0.6'}
    """
    method = find(name)
    if not method.is_plugged:
        for key, value in options.items():
            if key not in vars(plugs.Config()):
                raise ValueError(f"{key}={value}: siren.py has no such setting")
        return {**method.config, **options}
    given = "".join(f",{key}={value}" for key, value in options.items())
    return {**method.config, "plug": f"research.zoo:method={name}{given}"}
