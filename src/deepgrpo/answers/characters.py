r"""Plain characters: the Unicode and LaTeX spellings of one sign become one.

Minus signs, full-width digits, √, ×, ≥ and the like as a keyboard and LaTeX write them; spacing commands and outer
delimiters are dropped.
"""

from __future__ import annotations

import re

_FULL_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_BY_CODE: dict[int, str | None] = {
    **{ord(sign): "-" for sign in "−–‑‒﹣"},
    **dict.fromkeys([0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " "),
    **{ord(invisible): None for invisible in "\u200b\u200c\u200d\u2060\u2061\u2062\ufeff"},
    **{ord(quote): "'" for quote in "‘’′"},
    **{ord(quote): '"' for quote in "“”″"},
}
_SIGNS = {
    "＼": "\\", "×": "\\times ", "⋅": "\\cdot ", "·": "\\cdot ", "∙": "\\cdot ", "÷": "/", "∕": "/", "⁄": "/", "π": "\\pi ",
    "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "⩽": "\\le ", "⩾": "\\ge ", "≠": "\\ne ", "±": "\\pm ", "∓": "\\mp ",
    "℃": "^\\circ C", "μ": "\\mu ", "µ": "\\mu ", "Ω": "\\Omega ", "Å": "\\AA ",
    "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ", "°": "^\\circ ", "º": "^\\circ ", "…": "\\ldots ",
    "⋯": "\\ldots ",
    "½": " \\frac{1}{2}", "⅓": " \\frac{1}{3}", "⅔": " \\frac{2}{3}", "¼": " \\frac{1}{4}", "¾": " \\frac{3}{4}",
    "⅕": " \\frac{1}{5}", "⅛": " \\frac{1}{8}", "⅜": " \\frac{3}{8}", "⅝": " \\frac{5}{8}", "⅞": " \\frac{7}{8}",
}  # fmt: skip
_TABLE = {**_FULL_WIDTH, **_BY_CODE, **{ord(sign): spelling for sign, spelling in _SIGNS.items()}}

_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]|\\[A-Za-z]+))")
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_SPACING = re.compile(r"(?<!\\)\\(?:[,;:> ]|q?quad(?![A-Za-z])|(?:th(?:in|ick)|med)space(?![A-Za-z]))|~")
_DROPPED = re.compile(
    r"\\!\s*|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|middle|mathstrut)(?![A-Za-z])\.?\s*"
)
_RENAMED = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:(?:math|text)(?:rm|it|bf|sf|tt|normal|up)|mbox|hbox|operatorname\*?)(?![A-Za-z])"), r"\\text"),
    (re.compile(r"\\(?:c|l|h)?dots(?:[bcm])?(?![A-Za-z])|\.\.\."), r"\\ldots "),
    (re.compile(r"\\(?:geq(?:slant)?|geqq)(?![A-Za-z])|>="), r"\\ge "),
    (re.compile(r"\\(?:leq(?:slant)?|leqq)(?![A-Za-z])|<="), r"\\le "),
    (re.compile(r"\\(?:neq)(?![A-Za-z])"), r"\\ne "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\[lr]brace(?![A-Za-z])"), lambda m: "\\{" if m.group()[1] == "l" else "\\}"),
    (re.compile(r"\\(?:degree|deg)(?![A-Za-z])"), r"^\\circ "),
    (re.compile(r"\{\s*,\s*\}"), ","),
    (re.compile(r"\\ast(?![A-Za-z])|(?<!\*)\*(?!\*)"), r"\\cdot "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\mathbb\s+(?=[A-Z])(.)"), r"\\mathbb{\1}"),
    (re.compile(r"(?<![A-Za-z\\])(?:inf|infinity)(?![A-Za-z])"), r"\\infty"),
    (re.compile(r"(?<=\d)\s*\\text\s*\{\s*[eE]\s*\}\s*(?=[-+]?\d)"), "e"),
)  # fmt: skip
# of formulas inside a text, and currency
_DELIMITERS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]")
_LEADING = "=:≈~# \t\n"
_TRAILING = ",;: \t\n"
_WRAPPINGS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("`", "`"), ("**", "**"), ('"', '"'))


def plain(text: str) -> str:
    """The text with one spelling per sign. Lengths may change, words do not."""
    if not text.isascii():
        text = _ROOT.sub(lambda m: f"\\sqrt{{{m.group(1) if m.group(1) is not None else m.group(2)}}}", text)
        text = _RAISED.sub(lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m.group()) + "}", text)
        text = _LOWERED.sub(lambda m: "_{" + "".join(_SUBSCRIPTS[c] for c in m.group()) + "}", text)
        text = text.translate(_TABLE)
    return text


def tidy(text: str) -> str:
    r"""An answer in plain characters, without outer delimiters, spacing commands and a final period.

    >>> tidy("$\\dfrac{1}{2}$.")
    '\\frac{1}{2}'
    """
    text = plain(text).strip()
    while (bare := _unwrap(text)) != text:
        text = bare
    text = _DELIMITERS.sub("", text).replace("\\%", "%")
    text = _SPACING.sub(" ", text)
    text = _DROPPED.sub("", text)
    for pattern, replacement in _RENAMED:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def _unwrap(text: str) -> str:
    text = text.lstrip(_LEADING).rstrip(_TRAILING)
    if text.endswith(".") and not text.endswith(("..", "\\.")):
        text = text[:-1].rstrip()
    for left, right in _WRAPPINGS:
        inner = text[len(left) : len(text) - len(right)]
        if not (text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right)):
            continue
        if left not in inner.replace("\\$", "") and not inner.endswith("\\"):
            return inner
    return text
