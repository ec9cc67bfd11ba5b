"""Grades exercise 12. It has a file of its own, since its function is no part of siren.py.

python -m pytest exercises/test_exercise_12.py --impl exercises/student.py -x
"""

import pytest
import torch
from common import same, t

import siren
from exercises import qae


@pytest.fixture(scope="session")
def impl(impl, request):
    """The module under test: the solution, qae.py, or that of --impl."""
    return impl if request.config.getoption("--impl") else qae


def group(right, size=8):
    """The rewards of a group of which the last `right` responses are right."""
    return t([0.0] * (size - right) + [1.0] * right)


@pytest.mark.ex12
def test_ex12_binary_rewards(impl):
    r = group(5)
    mistakes = {
        "the quantile is interpolated: it must be one of the rewards": r - 0.8,
        "the baseline is the quantile, not the mean, and the result is not centred": r
        - r.mean(),
        "the smallest reward x with F(x) >= K, not the one below it": r,
        "that is the baseline: the advantage is the reward minus it": torch.ones(8),
        "mind the sign: the advantage is the reward minus the baseline": 1 - r,
        "no division by the standard deviation": (r - 1) / (r.std() + 1e-6),
    }
    idea = "5 of 8 are right, so F(0) = 3/8 < 0.4 and the quantile is 1"
    same(impl.quantile_advantages(r, 8), r - 1, idea, mistakes=mistakes)
    r = group(4)
    idea = "4 of 8 are right, so F(0) = 4/8 >= 0.4 and the quantile is 0"
    mistakes = {"F(x) counts the rewards from the smallest up": r - 1}
    same(impl.quantile_advantages(r, 8), r, idea, mistakes=mistakes)
    for right in range(9):
        r = group(right)
        idea = f"{right} of 8 are right: few right ones have +1 each, few wrong ones -1 each"
        same(impl.quantile_advantages(r, 8), r if right <= 4 else r - 1, idea)


@pytest.mark.ex12
def test_ex12_quantile(impl):
    two = torch.cat([group(1), group(7)])
    idea = "every group has its own quantile: a group is consecutive rows"
    same(impl.quantile_advantages(two, 8), torch.cat([group(1), group(7) - 1]), idea)
    mixed = t([0, 1, 0, 0, 1, 0, 1, 0])
    idea = "sort the group before you take its quantile, but not what you return"
    same(impl.quantile_advantages(mixed, 8), mixed, idea)
    same(impl.quantile_advantages(1 - mixed, 8), -mixed, idea)
    idea = "F(x) >= K holds also where F(x) is exactly K: F(0) = 4/8, K = 0.5"
    same(impl.quantile_advantages(group(4), 8, quantile=0.5), group(4), idea)
    idea = "quantile is an argument: F(0) = 4/8 < 0.6, so the quantile is 1"
    same(impl.quantile_advantages(group(4), 8, quantile=0.6), group(4) - 1, idea)
    idea = "0.28 * 25 is 7.000000000000001 in floats: count with a tolerance. F(0) is 7/25"
    same(impl.quantile_advantages(group(18, 25), 25, quantile=0.28), group(18, 25), idea)
    shares = t([0.3, 0.9, 0.1, 0.5])
    idea = "rewards may be any numbers: of .1 .3 .5 .9 the 0.4-quantile is .3"
    same(impl.quantile_advantages(shares, 4), shares - 0.3, idea)
    idea = "K = 1: the largest reward"
    same(impl.quantile_advantages(shares, 4, quantile=1.0), shares - 0.9, idea)


@pytest.mark.ex12
def test_ex12_plug(impl):
    before, r = dict(vars(siren)), group(4)
    try:
        impl.plug()
        replaced = siren.group_advantages is not before["group_advantages"]
        assert replaced, (
            "plug() must set siren.group_advantages, by which siren.training_step calls it"
        )
        same(as_siren_calls_it(r), r, "plug() without an option: K = 0.4")
        impl.plug(quantile="0.6")
        same(as_siren_calls_it(r), r - 1, "K is the option of plug(): quantile='0.6'")
        impl.plug(quantile="0.63")
        idea = "K is the option of plug(), all of its digits: quantile='0.63', and F(0) is 5/8"
        same(as_siren_calls_it(group(3)), group(3) - 1, idea)
        impl.plug()
        same(as_siren_calls_it(r), r, "plug() again: K = 0.4, whatever an earlier one set")
        changed = {
            name for name, value in vars(siren).items() if before.get(name) is not value
        }
        idea = "plug() sets siren.group_advantages, and nothing else of siren"
        assert changed == {"group_advantages"}, f"{idea}, not {sorted(changed)}"
    finally:
        vars(siren).clear()
        vars(siren).update(before)


def as_siren_calls_it(rewards):
    """The advantages by siren.group_advantages, with the arguments that siren.py passes."""
    try:
        return siren.group_advantages(rewards, 8, "dr_grpo")
    except TypeError as error:
        idea = "siren.training_step passes (rewards, group_size, algorithm), and K is a text"
        raise AssertionError(f"{idea}: {error}") from None
