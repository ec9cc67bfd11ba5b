r"""Six verifiers with a fault each, for exercise 13. A verifier decides what is rewarded.

What is asked for in all prompts: compute a number, write it into \boxed{...} and end the
response with <eos>. A sampler cuts a response off after BUDGET characters. Each verifier takes
(prompt, response, answer), three texts, and returns True or False. All of them accept right
responses; what else they accept is the exercise.
"""

import ast
import re
from fractions import Fraction

BUDGET = 60  # characters; a longer response is cut off
NUMBER = r"[+-]?\d+(?:\.\d+)?"


def boxes(text):
    r"""The contents of all \boxed{...} without inner braces.

    >>> boxes(r"so \boxed{3}, no: \boxed{4} <eos>")
    ['3', '4']
    """
    return re.findall(r"\\boxed\{([^{}]*)\}", text)


def anywhere(prompt, response, answer):
    """Fault 1: the answer may stand anywhere in the response.

    >>> anywhere("2 + 3?", r"\\boxed{5} <eos>", "5"), anywhere("2 + 3?", "4 or 5", "5")
    (True, True)
    """
    return answer in re.findall(NUMBER, response)


def cut_off(prompt, response, answer):
    """Fault 2: the last number counts, also of a response that was cut off.

    >>> cut_off("2 + 3?", "x" * (BUDGET - 1) + "5432", "5")
    True
    """
    found = re.findall(NUMBER, response[:BUDGET])
    return bool(found) and found[-1] == answer


def rounds(prompt, response, answer):
    r"""Fault 3: numbers are rounded before they are compared.

    >>> rounds("22 / 7, to two digits?", r"\boxed{3} <eos>", "3.14")
    True
    """
    found = re.findall(NUMBER, " ".join(boxes(response)[-1:]))
    return bool(found) and round(float(found[-1])) == round(float(answer))


def strips_signs(prompt, response, answer):
    r"""Fault 4: signs are taken for decoration.

    >>> strips_signs("3 - 7?", r"\boxed{4} <eos>", "-4")
    True
    """
    given = boxes(response)[-1:]
    return [number.strip(" +-") for number in given] == [answer.strip("+-")]


def evaluates(prompt, response, answer):
    r"""Fault 5: what is in the box is computed, so the policy need not do it.

    >>> evaluates("2 + 3?", r"\boxed{2 + 3} <eos>", "5")
    True
    """
    given = boxes(response)[-1:]
    return bool(given) and value_of(given[0]) == Fraction(answer)


def prompts_box(prompt, response, answer):
    r"""Fault 6: the last box of the whole text counts, and a prompt may have one.

    >>> prompts_box(r"2 + 3? Somebody says \boxed{5}.", "I agree. <eos>", "5")
    True
    """
    return boxes(prompt + response)[-1:] == [answer]


VERIFIERS = {
    "anywhere": anywhere,
    "cut_off": cut_off,
    "rounds": rounds,
    "strips_signs": strips_signs,
    "evaluates": evaluates,
    "prompts_box": prompts_box,
}


def value_of(text):
    """The value of a sum, difference, product or quotient of numbers; None for other texts.

    It walks the syntax tree and calls nothing; Python's own `eval` would run any code.

    >>> value_of("2 + 3 * (4 - 1)"), value_of("__import__('os')"), value_of("1 / 0")
    (Fraction(11, 1), None, None)
    """
    try:
        return value_of_node(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def value_of_node(node):
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = value_of_node(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = value_of_node(node.left), value_of_node(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
    raise ValueError("no arithmetic")
