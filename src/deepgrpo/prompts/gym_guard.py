"""Guard of reasoning-gym's verifiers: nothing in a response is run as code.

Some of its tasks read an answer with Python's `eval` or sympy's `parse_expr`, which is `eval` too: a response of countdown with
`__import__('os').system(...)` in it would be executed. `guard` gives its modules versions of both that take expressions alone.
"""

from __future__ import annotations

import ast
import builtins
import io
import keyword
import sys
import tokenize
from typing import Any

_NODES = (
    ast.Expression, ast.Constant, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.List, ast.Tuple, ast.Set,
    ast.Dict, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context,
)  # fmt: skip
"""Syntax of literals and arithmetic: no name, call, attribute or comprehension."""

_FUNCTIONS = frozenset({"sqrt", "cbrt", "root", "ln", "Rational", "Integer", "Float", "abs", "min", "max"})
"""Names that sympy does not count among its functions."""


def evaluate(text: str) -> Any:
    """`eval` for literals and arithmetic. Raises ValueError for anything else.

    >>> evaluate("[1, 2 + 3]")
    [1, 5]
    """
    tree = ast.parse(text.strip(), mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            raise ValueError(f"{type(node).__name__} in an answer")
    return eval(compile(tree, "<answer>", "eval"), {"__builtins__": {}})


def parse_expression(text: str, *arguments: Any, **options: Any) -> Any:
    """`sympy.parse_expr` for formulas: numbers, operators, symbols and mathematical functions. Raises ValueError for others.

    >>> parse_expression("x**2 / 2 + sin(x)")
    x**2/2 + sin(x)
    """
    import sympy

    check_formula(text)
    return sympy.parse_expr(text, *arguments, **options)


def check_formula(text: str) -> None:
    """Raise ValueError for a text that is more than a formula: strings, attributes, brackets, names of Python."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError) as error:
        raise ValueError("not a formula") from error
    for token in tokens:
        if token.type == tokenize.NAME:
            allowed = _is_mathematical(token.string)
        elif token.type == tokenize.OP:
            allowed = token.string in ("+", "-", "*", "/", "**", "^", "(", ")", ",", "%", "//", "!")
        else:
            allowed = token.type in (
                tokenize.NUMBER, tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER, tokenize.INDENT, tokenize.DEDENT
            )  # fmt: skip
        if not allowed and token.string not in ("!", " "):
            raise ValueError(f"{token.string!r} in a formula")


def _is_mathematical(name: str) -> bool:
    import sympy

    if name in _FUNCTIONS:
        return True
    if name.startswith("_") or keyword.iskeyword(name) or hasattr(builtins, name):
        return False
    known = getattr(sympy, name, None)
    # what sympy does not know becomes a symbol
    return known is None or isinstance(known, sympy.Basic | sympy.FunctionClass)


class _Sympy:
    """sympy with the guarded `parse_expr`."""

    parse_expr = staticmethod(parse_expression)

    def __getattr__(self, name: str) -> Any:
        import sympy

        return getattr(sympy, name)


def guard() -> None:
    """Guard all modules of reasoning-gym that are imported; calling it again does nothing."""
    import sympy

    for name, module in list(sys.modules.items()):
        if not name.startswith("reasoning_gym."):
            continue
        space = vars(module)
        space["eval"] = evaluate
        for key, value in list(space.items()):
            if value is sympy.parse_expr:
                space[key] = parse_expression
            elif value is sympy:
                space[key] = _Sympy()
