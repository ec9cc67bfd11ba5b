"""The zoo: SIREN's neighbours as small functions, all on siren.py's training loop.

    python examples/zoo.py --list                            # what there is
    python examples/zoo.py --method clip_cov                 # trains one; siren.py's flags
    python examples/zoo.py --method clip_cov:rho=0.1,low=0.9 --seed 3
    python siren.py --regularizer none --plug examples.zoo:method=par     # --method par, by hand

Where to read: advantages.py, weights.py, terms.py and sampler.py have the formulas; methods.py has
a method an entry; core.py has the update that they share. yours.py shows how to add an idea.
docs/zoo.md says what each method changes and how sure its definition is.
"""

from __future__ import annotations

from typing import Any

import siren
from examples.zoo.core import Method, MiniBatch, use
from examples.zoo.methods import METHODS, VARIANTS

__all__ = ["METHODS", "VARIANTS", "Method", "MiniBatch", "plug", "settings", "use"]


def find(name: str) -> Method:
    """The method of that name, or a ConfigError that lists them."""
    every = {**METHODS, **VARIANTS}
    if name not in every:
        raise siren.ConfigError(f"method {name}: must be one of {', '.join(every)}")
    return every[name]


def plug(method: str, **options: str) -> None:
    """For --plug examples.zoo:method=NAME,key=value,...: a method that is more than settings."""
    found = find(method)
    if not found.is_plugged:
        raise siren.ConfigError(f"method={method}: {found.title} is settings of siren.py alone")
    use(found, **options)


def settings(name: str, **options: Any) -> dict[str, Any]:
    """What the method changes in siren.Config; options in place of its own numbers.

    >>> settings("naive_bonus", beta=0.06)
    {'regularizer': 'bonus', 'top_p': 1.0, 'peak_quantile': 0.0, 'beta': 0.06}
    >>> settings("qae", quantile=0.6)
    {'regularizer': 'none', 'plug': 'examples.zoo:method=qae,quantile=0.6'}
    """
    method = find(name)
    if not method.is_plugged:
        return {**method.config, **options}
    given = "".join(f",{key}={value}" for key, value in options.items())
    return {**method.config, "plug": f"examples.zoo:method={name}{given}"}
