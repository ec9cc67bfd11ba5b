"""A student's functions, watched: none may write to what it is given, or leave a trace."""

import copy
import inspect
import random

import torch

FUNCTIONS = (
    "group_advantages",
    "policy_loss",
    "nucleus_mask",
    "nucleus_entropy",
    "peak_mask",
    "aggregate_entropy",
    "siren_loss",
    "micro_batch_anchor",
    "pass_at_k",
    "maj_at_k",
    "sample",
    "quantile_advantages",
)


class Watched:
    """A module whose exercise functions compare their inputs after each call."""

    def __init__(self, module):
        self.watched_module = module

    def __getattr__(self, name):
        found = getattr(self.watched_module, name)
        return watched(found, name) if name in FUNCTIONS else found


def watched(function, name):
    """The function, with an AssertionError if a call has changed an input or global state."""

    def call(*args, **given):
        inputs = by_name(function, args, given)
        before = {key: remembered(value) for key, value in inputs.items()}
        state = global_state()
        try:
            result = function(*args, **given)
        except RuntimeError as error:
            if "in-place operation" in str(error):
                idea = "an input, or a tensor made of one, was written to in place"
                raise AssertionError(f"{idea}: {error}") from error
            raise
        for key, value in inputs.items():
            changed = what_changed(value, before[key])
            assert not changed, f"{key} {changed}"
        free = name == "sample" and given.get("generator") is None
        for what, same_now in compared(state, global_state()).items():
            allowed = same_now or (free and "random" in what)
            hint = (
                "draw with the generator"
                if name == "sample"
                else "the caller doesn't expect it"
            )
            assert allowed, f"{name} changes {what}: {hint}"
        return result

    return call


def by_name(function, args, given):
    """Name -> value of the arguments; a number where the function has no name for one."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = []
    numbered = [f"argument {i + 1}" for i in range(len(args))]
    return dict(zip(names[: len(args)] + numbered[len(names) :], args)) | given


def remembered(value):
    """What is compared after the call."""
    if torch.is_tensor(value):
        return (value.detach().clone(), value._version, value.requires_grad, value.grad)
    if isinstance(value, torch.nn.Module):
        weights = [remembered(weight) for weight in value.parameters()]
        return ([module.training for module in value.modules()], weights)
    return copy.deepcopy(value) if isinstance(value, list) else None


def what_changed(value, before):
    """A sentence; empty if nothing has changed."""
    if torch.is_tensor(value):
        old, version, needs_grad, grad = before
        equal = value.shape == old.shape and bool(
            ((value == old) | ((value != value) & (old != old))).all()
        )
        if not equal or value._version != version:
            return "was written to: return a new tensor, the caller still needs this one"
        if value.requires_grad != needs_grad or value.grad is not grad:
            return "has another requires_grad or grad than before: that belongs to the caller"
    elif isinstance(value, torch.nn.Module):
        if [module.training for module in value.modules()] != before[0]:
            return "has another `training` than before: leave it as it is, or put it back"
        for weight, old in zip(value.parameters(), before[1]):
            if what_changed(weight, old):
                return "has other weights than before"
    elif isinstance(value, list) and value != before:
        return "was written to: it is the caller's list, so work on a copy"
    return ""


def global_state():
    """What a function must not touch."""
    return {
        "torch's global random state": torch.get_rng_state(),
        "Python's global random state": random.getstate(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch's default dtype": torch.get_default_dtype(),
    }


def compared(before, after):
    """What -> is it the same?"""
    return {
        what: torch.equal(old, after[what]) if torch.is_tensor(old) else old == after[what]
        for what, old in before.items()
    }
