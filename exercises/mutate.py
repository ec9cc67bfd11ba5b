"""How good are the graders? Change the right solution in one place: do they notice?

    python exercises/mutate.py             # every change, about a minute on one core
    python exercises/mutate.py ex3 ex4     # of these exercises only

A mutant is the right solution (siren.py, reference.py, qae.py; solutions.py for 13 and 14)
with one small change: another operator or number, a term or call left out, arguments swapped.
The graders kill it if one of them fails. What survives is equivalent, that is, it solves the
exercise as well, or it shows a hole.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import itertools
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1] / "tests")
)  # the graders' common.py
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py
import siren
from exercises import qae, reference, solutions
from exercises.grading import SOLUTION, failures

SECONDS = 20  # a mutant that runs longer hangs
ENOUGH = 0.9  # the share of the mutants that the graders must kill
FILES = {
    module.__name__: Path(module.__file__) for module in (siren, reference, qae, solutions)
}
LABORATORIES = ("ex13", "ex14")  # whose solution is in solutions.py
# the functions of the solution that each exercise asks for, by whatever file has them
FUNCTIONS = {
    "ex1": ["group_advantages"],
    "ex2": ["policy_loss"],
    "ex3": ["nucleus", "nucleus_mask"],
    "ex4": ["entropy_of", "nucleus_entropy"],
    "ex5": ["peak_mask"],
    "ex6": ["aggregate_entropy"],
    "ex7": ["token_stats", "siren_loss"],
    "ex8": ["micro_batch_anchor"],
    "ex9": ["pass_at_k"],
    "ex10": ["maj_at_k"],
    "ex11": ["sample", "next_logits"],
    "ex12": ["quantile_advantages", "plug"],
    "ex13": ["exploit", "strict_verifier"],
    "ex14": [
        "seed_differences",
        "bootstrap_interval",
        "pass_at_k_std",
        "repeats_needed",
        "holm",
    ],
}
ALSO = {"ex3": ["ex4"]}  # half of nucleus() is for exercise 4, whose graders see it, too
# code of these functions that no exercise asks for, and which mutants therefore leave alone
GRPO, SPEED, INPUT = "GRPO's rule", "speed alone", "no exercise has such an input"
DEVICE = "there is only the CPU"
HARMLESS = "metrics with a gradient do no harm"
METRIC, OTHER = "a metric that students need not return", "another regulariser"
NOT_ASKED = {
    "group_advantages": {
        "group_size > 1 and len(rewards) % group_size == 0": INPUT,
        "rewards.is_floating_point() and rewards.isfinite().all()": INPUT,
        "if algorithm == 'grpo':\n        adv = adv / ": GRPO,
        "(groups.std(1, keepdim=True) + 1e-06)": GRPO,
    },
    "policy_loss": {
        "logp.shape == old_logp.shape == mask.shape and mask.dtype == torch.bool": INPUT,
        "fits and adv.shape in (mask.shape, mask.shape[:1])": INPUT,
        "max_tokens if algorithm == 'dr_grpo' else mask.sum(1).clamp(min=1)": GRPO,
        "adv.detach()": HARMLESS,
        "old_logp.detach()": HARMLESS,
        "adv.detach() if adv.dim() == 2 else adv.detach()[:, None]": INPUT,
        ".clamp(-20, 20)": INPUT,
        "(log_ratio.expm1() - log_ratio).detach().sum() / tokens": METRIC,
    },
    "entropy_of": {"enabled=False": INPUT},
    "peak_mask": {"mask.numel() == 0": INPUT, ".cpu()": DEVICE, ".to(ordered.device)": DEVICE},
    "token_stats": {
        "temperature=1.0": INPUT,
        "top_p=0.8": INPUT,
        "torch.promote_types(logits.dtype, torch.float32)": INPUT,
        "(logits.to(wide) / temperature)": INPUT,
        "entropy_of(log_pi.detach())": METRIC,
        "(log_q > -torch.inf).sum(-1)": METRIC,
    },
    "siren_loss": {
        "temperature=1.0": INPUT,
        "peak_quantile=0.8, regularizer='anchor'": INPUT,
        "torch.zeros_like(h_agg)": OTHER,
        "if regularizer == 'bonus':\n        extra = -beta * h_agg": OTHER,
        "peak.sum() / mask.sum().clamp(min=1)": METRIC,
        "stats | more_stats": METRIC,
        ".detach()": HARMLESS,
    },
    "sample": {
        "batch=1024": INPUT,
        "sample_batch=batch": INPUT,
        "max(1, cfg.sample_batch // samples) * samples": INPUT,
        "config=model.config": INPUT,
        "t == ids.shape[1] - 1": SPEED,
        "len(goes_on) == 0 or": SPEED,
    },
    "next_logits": {
        ".float()": INPUT,
        "'use_cache': True": "a model that is given a cache uses it",
        "logits_to_keep=1": SPEED,
    },
    "quantile_advantages": {
        "if algorithm == 'grpo':\n        adv = adv / ": GRPO,
        "(groups.std(1, keepdim=True) + 1e-06)": GRPO,
    },
    "plug": {"0 < float(quantile) <= 1": INPUT},
}
# why a mutant solves the exercise as well as the solution does -> such mutants
EQUIVALENT = {
    "what all rewards of a group have in common changes no advantage": [
        f"group_advantages: groups - groups[:, :1] -> groups{other}"
        for other in ("", " + groups[:, :1]")
    ],
    "the sum over responses of sums over tokens is one sum": [
        "policy_loss: torch.where(mask, torch.min(unclipped, clipped), 0.0).sum(1)"
        " -> torch.where(mask, torch.min(unclipped, clipped), 0.0)",
        "policy_loss: torch.where(mask, torch.min(unclipped, clipped), 0.0).sum(1)"
        " -> torch.where(mask, torch.min(unclipped, clipped), 0.0).sum(0)",
    ],
    "in padding any finite ratio will do": [
        "policy_loss: torch.where(mask, logp - old_logp.detach(), 0.0)"
        f" -> torch.where(mask, logp - old_logp.detach(), {other})"
        for other in ("1.0", "-1")
    ],
    "in padding the ratio is 1, which is never clipped": [
        "policy_loss: ((clipped < unclipped) & mask).sum -> (clipped < unclipped).sum"
    ],
    "comparisons have no gradient": [
        "nucleus: log_pi.detach().exp -> log_pi.exp",
        "peak_mask: entropy.detach().masked_fill -> entropy.masked_fill",
    ],
    "of one column the first is the last": [
        "token_stats: log_pi.gather(-1, tokens[..., None])[..., 0]"
        " -> log_pi.gather(-1, tokens[..., None])[..., -1]",
        "sample: tokens[:, 0] -> tokens[:, -1]",
        "sample: log_pi.gather(1, tokens)[:, 0] -> log_pi.gather(1, tokens)[:, -1]",
        "sample: (~torch.isin(tokens[:, 0], eos)).nonzero()[:, 0]"
        " -> (~torch.isin(tokens[:, 0], eos)).nonzero()[:, -1]",
    ],
    "of two dimensions the second is the last": [
        "sample: (logits / temperature).log_softmax(-1)"
        " -> (logits / temperature).log_softmax(1)"
    ],
    "two ways to the same peaks; where they differ by rounding, these entropies do not": [
        "peak_mask: mask.sum(1, keepdim=True).cpu().double()"
        " -> mask.sum(1, keepdim=True).cpu()",
        "peak_mask: (quantile * (n - 1) - 1e-09).ceil -> (quantile * (n - 1)).ceil",
        "peak_mask: quantile * (n - 1) - 1e-09 -> quantile * (n - 1) - 0",
    ],
    "the first of two is the first of one, and the last of one is its first": [
        "maj_at_k: counts.most_common(1) -> counts.most_common(2)",
        "maj_at_k: counts.most_common(1)[0] -> counts.most_common(1)[-1]",
    ],
    "an exploit with one number more is one, too": ["exploit: range(100) -> range(101)"],
    "an open box holds <eos> as well, which is no number": [
        "strict_verifier: not start or not closed -> not start"
    ],
    "the bound on the length may be any": [
        "strict_verifier: len(content) > 1000 or not re.fullmatch('[+-]?[0-9]+(\\\\.[0-9]+)?',"
        " content.strip(' ')) -> len(content) >= 1000 or not"
        " re.fullmatch('[+-]?[0-9]+(\\\\.[0-9]+)?', content.strip(' '))",
        "strict_verifier: len(content) > 1000 -> len(content) > 1001",
    ],
    "Fraction takes blanks": [
        "strict_verifier: Fraction(content.strip(' ')) -> Fraction(content)"
    ],
    "a dictionary meets a view as its own view does": [
        f"seed_differences: found[method].keys() & found[other].keys() -> {left} & {right}"
        for left, right in (
            ("found[method]", "found[other].keys()"),
            ("found[method].keys()", "found[other]"),
        )
    ],
    "other resamples, as good": [
        "bootstrap_interval: values, draws=10000, seed=0, confidence=0.95"
        f" -> values, draws={draws}, seed={seed}, confidence=0.95"
        for draws, seed in ((10001, 0), (10000, 1))
    ],
    "a variance of 0 is never rounded below 0 here": [
        "pass_at_k_std: max(0.0, square - mean ** 2) -> max(-1, square - mean ** 2)"
    ],
    "every value is written, and all are above 0": [
        "holm: [0.0] -> [1.0]",
        "holm: [0.0] -> [-1]",
        "holm: 0.0 -> -1",
    ],
    "another seed, as good": [
        "sample: random.Random(key).getrandbits(63) -> random.Random(key).getrandbits(64)"
    ],
    "an order that changes nothing": [
        "sample: len(goes_on) < len(active) -> len(goes_on) <= len(active)"
    ],
    "more padding does no harm": ["sample: mask[:, P:].any(0).sum -> mask[:, P:].sum"],
    "no response looks at the padding, whatever its position": [
        "next_logits: (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]"
        " -> (attention_mask.cumsum(1) - 1)[:, -ids.shape[1]:]",
        "next_logits: (attention_mask.cumsum(1) - 1).clamp(min=0)"
        " -> (attention_mask.cumsum(1) - 1).clamp(min=-1)",
    ],
    "of one position the last is the first": [
        "next_logits: model(ids, **inputs, past_key_values=cache, logits_to_keep=1)"
        ".logits[:, -1] -> model(ids, **inputs, past_key_values=cache, logits_to_keep=1)"
        ".logits[:, -0]"
    ],
    "the text of a tensor is a text that decides the draws, too": [
        "sample: str(torch.randint(2 ** 62, (1,), generator=generator).item())"
        " -> str(torch.randint(2 ** 62, (1,), generator=generator))"
    ],
}

SWAPPED = {
    **{ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.Lt]},
    **{ast.GtE: [ast.Gt, ast.Lt], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq]},
    **{ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn], ast.NotIn: [ast.In]},
    **{ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult]},
    **{ast.Pow: [ast.Mult], ast.BitAnd: [ast.BitOr], ast.And: [ast.Or], ast.Or: [ast.And]},
    **{ast.FloorDiv: [ast.Mult]},
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "mean", "mean": "sum"}


class Mutant(NamedTuple):
    """The solution with one change in one function."""

    exercise: str
    text: str  # "function: old -> new"
    tree: ast.Module
    module: str = "exercises.reference"  # of which this is a changed copy


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node.

    >>> [ast.unparse(new) for new in changes(ast.parse("a - b", mode="eval").body)]
    ['a + b', 'a', 'b']
    >>> [ast.unparse(new) for new in changes(ast.parse("x.detach()", mode="eval").body)]
    ['x']
    """

    def altered(**fields) -> ast.AST:
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.Compare(ops=[op]):
            yield from (altered(ops=[other()]) for other in SWAPPED[type(op)])
        case ast.BinOp():
            yield from (altered(op=other()) for other in SWAPPED.get(type(node.op), []))
            yield from (node.left, node.right)
        case ast.BoolOp():
            yield from (altered(op=other()) for other in SWAPPED[type(node.op)])
            yield from node.values
        case ast.UnaryOp():
            yield node.operand
        case ast.IfExp():
            yield from (node.body, node.orelse)
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            if node.value + 1 != node.value:  # as it is for 1e30
                yield ast.Constant(node.value + 1)
            yield (
                ast.UnaryOp(ast.USub(), ast.Constant(1))
                if node.value == 0
                else ast.Constant(0)
            )
        case ast.Call():
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if len(node.args) > 1 and called not in (
                "min",
                "max",
                "vecdot",
            ):  # whose order is free
                first, second, *rest = node.args
                yield altered(args=[second, first, *rest])
            if (
                isinstance(node.func, ast.Attribute) and called != "bool"
            ):  # masks are bool already
                yield node.func.value  # without the call
            for keyword in node.keywords:
                if keyword.arg != "device":  # there is only the CPU
                    yield altered(
                        keywords=[one for one in node.keywords if one is not keyword]
                    )
        case ast.Attribute() if node.attr in NAMES:
            yield altered(attr=NAMES[node.attr])
        case ast.Name() if node.id in NAMES:
            yield altered(id=NAMES[node.id])
        case ast.comprehension() if node.ifs:
            yield altered(ifs=[])


class Replace(ast.NodeTransformer):
    """Puts `new` in the place of the node `old`."""

    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def mutants(exercise: str) -> Iterator[Mutant]:
    """All mutants of an exercise's functions."""
    for name in FUNCTIONS[exercise]:
        for module, path in FILES.items():
            if (module == solutions.__name__) != (exercise in LABORATORIES):
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for place, function in functions(tree):
                if function.name == name:
                    yield from mutants_of(function, place, tree, exercise, module)


def mutants_of(
    function: ast.FunctionDef, place: int, tree: ast.Module, exercise: str, module: str
) -> Iterator[Mutant]:
    """All mutants of a function, which is, or is in, tree.body[place]."""
    untouched = NOT_ASKED.get(function.name, [])
    before = ast.unparse(tree.body[place])
    for node, around in itertools.chain(*map(pieces, [function.args, *function.body])):
        for new in changes(node):
            changed = copied(tree.body[place], node, new)
            after = ast.unparse(changed)
            if any(before.count(text) != after.count(text) for text in untouched):
                continue
            shown = new if around is node else copied(around, node, new)
            body = [*tree.body[:place], changed, *tree.body[place + 1 :]]
            text = f"{function.name}: {ast.unparse(around)} -> {ast.unparse(shown)}"
            yield Mutant(exercise, text, ast.Module(body, type_ignores=[]), module)


def functions(tree: ast.Module) -> Iterator[tuple[int, ast.FunctionDef]]:
    """All functions of a module, each with its place, or that of the function it is in."""
    for place, top in enumerate(tree.body):
        yield from (
            (place, node) for node in ast.walk(top) if isinstance(node, ast.FunctionDef)
        )


def pieces(node: ast.AST, around: ast.AST | None = None) -> Iterator[tuple[ast.AST, ast.AST]]:
    """A tree's nodes, each with the expression that it is shown in."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("require"):
        return  # it refuses what no exercise has
    yield node, around or node
    if not isinstance(node, (ast.keyword, ast.Tuple, ast.UnaryOp, ast.Slice)):
        around = node if isinstance(node, (ast.expr, ast.arguments)) else None
    for child in ast.iter_child_nodes(node):
        yield from pieces(child, around)


def copied(tree: ast.AST, old: ast.AST, new: ast.AST) -> ast.AST:
    """A copy of the tree, with `new` in the place of `old`."""
    tree, old, new = copy.deepcopy((tree, old, new))
    return ast.fix_missing_locations(Replace(old, new).visit(tree))


class FromTree(importlib.abc.InspectLoader):
    """Imports a module from its syntax tree."""

    def __init__(self, tree: ast.Module):
        self.tree = tree

    def get_source(self, fullname: str) -> None:
        return None

    def get_code(self, fullname: str):
        return compile(self.tree, fullname, "exec")


def imported(tree: ast.Module) -> ModuleType:
    """The module of a syntax tree."""
    loader = FromTree(tree)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("mutant", loader))
    sys.modules["mutant"] = module  # where dataclasses look up their annotations
    loader.exec_module(module)
    return module


class Hangs(BaseException):
    """Too slow. No Exception, which graders and hypothesis would catch."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises Hangs once this many seconds of the processor's time are over."""

    def stop(*_):
        raise Hangs

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def solution_of(mutant: Mutant) -> SimpleNamespace:
    """The right solution with the mutant in it; reference.py takes functions from siren."""
    changed = imported(mutant.tree)
    if mutant.module == "siren":
        with patch.dict(sys.modules, siren=changed):
            changed = imported(
                ast.parse(FILES[reference.__name__].read_text(encoding="utf-8"))
            )
    return SimpleNamespace(**SOLUTION | vars(changed))


def killed(mutant: Mutant) -> bool:
    """Does a grader of its exercise fail on the mutant, or does the mutant hang?"""
    module = solution_of(mutant)
    graded_by = [mutant.exercise, *ALSO.get(mutant.exercise, [])]
    try:
        with time_limit(SECONDS):
            return any(next(failures(exercise, module), None) for exercise in graded_by)
    except Hangs:
        return True


def chosen(argv: list[str]) -> list[str]:
    """The exercises that the command names: all of them, if none."""
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser("mutate.py", description=lines[0], allow_abbrev=False)
    parser.add_argument("exercises", nargs="*", metavar="ex3", help="only these")
    names = parser.parse_args(argv).exercises
    for name in names:
        if name not in FUNCTIONS:
            parser.error(f"{name}: must be ex1 to ex{len(FUNCTIONS)}")
    return names or [*FUNCTIONS]


def main(argv: list[str]) -> int:
    """Prints the survivors and the share that is killed of each exercise; 1 if one is too
    small."""
    why = {text: reason for reason, texts in EQUIVALENT.items() for text in texts}
    rows = []
    for exercise in chosen(argv):
        made = dead = equivalent = 0
        for mutant in mutants(exercise):
            made += 1
            if killed(mutant):
                dead += 1
                continue
            equivalent += mutant.text in why
            reason = why.get(mutant.text, "NOT EXPLAINED")
            print(f"{exercise} {mutant.text}\n    {reason}", flush=True)
        rows.append((exercise, made, dead, equivalent))
    rows.append(("all", *(sum(row[i] for row in rows) for i in (1, 2, 3))))
    print(f"{'':<8}mutants  killed  equivalent  killed of the others")
    shares = []
    for exercise, made, dead, equivalent in rows:
        shares.append(dead / (made - equivalent))
        print(f"{exercise:<8}{made:>7}{dead:>8}{equivalent:>12}{shares[-1]:>11.0%}")
    return int(min(shares) < ENOUGH)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
