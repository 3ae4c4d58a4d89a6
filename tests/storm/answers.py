r"""Hostile answers: ten thousand drawn by a seed, through every judge that reads an answer.

Each text is judged as it is, in a box, behind `####` and in <answer> tags. None may hang its judge beyond its time limit,
end it, raise, or be executed; an injection that runs leaves a file, the canary.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from deepgrpo.config import ExactReward, MathReward, ReasoningGymData, TaskReward
from deepgrpo.prompts.gym import build_gym
from deepgrpo.records import Prompt
from deepgrpo.rewards.exact import ExactMatchReward
from deepgrpo.rewards.math_answer import MathAnswerReward
from deepgrpo.rewards.task import TaskVerifierReward
from deepgrpo.rewards.vote import loose_answer

TIMEOUT_S = 0.5
"""Time limit of a check; a batch may take that long for each of its answers, and SLACK_S for new workers."""
SLACK_S = 60.0
BATCH = 100
TASKS = ("countdown", "polynomial_multiplication", "n_queens", "spiral_matrix", "chain_sum", "propositional_logic")
WRAPPINGS = ("{}", "\\boxed{{{}}}", "#### {}", "<answer>{}</answer>", "so ${}$ it is")
GOLDS = ("42", "-3", "1/2", "\\frac{\\pi}{2}", "x^2+1", "\\{1,2\\}", "(0,1]", "10^{-5}", "72 dollars", "cat")

Draw = Callable[[random.Random, str], str]


def _nested(draw: random.Random, _: str) -> str:
    count = draw.choice((30, 300, 3000))
    left, right = draw.choice((("(", ")"), ("\\frac{1}{", "}"), ("\\sqrt{", "}"), ("{", "}"), ("[", "]"), ("x^{", "}"),
                               ("\\boxed{", "}"), ("\\left(", "\\right)"), ("|", "|")))  # fmt: skip
    return left * count + "1" + right * draw.choice((count, count - 1, 0))


def _power(draw: random.Random, _: str) -> str:
    return draw.choice((
        "9**9**9", "9^{9^{9^9}}", "10^{10^{10}}", "2^{2^{2^{2^{2^2}}}}", "1e999999999", "(10^{100000})!", "99999999!",
        "\\binom{10^9}{5*10^8}",
        "0^{-1}", "1/0", "\\frac{0}{0}", "\\infty-\\infty", "(-8)^{1/3}", "\\sqrt[10^9]{2}", "0.{0}1".replace("{0}",
        "0" * 4000), "9" * 5000,
        "\\sum_{n=1}^{10^{12}} n", "\\int_0^{10^9} \\sin(x^x) dx", "\\lim_{x\\to0} x^x", "\\prod_{i=1}^{10^9} i", "x^{10^6}+1",
        "(a+b+c+d)^{400}", "\\sin(10^{300})", "e^{e^{e^{e^{e}}}}", "10^{10^{9}}",
        "1" + "0" * 30000, "\\sqrt{" + "7" * 4000 + "}",
    ))  # fmt: skip


def _injection(draw: random.Random, canary: str) -> str:
    return draw.choice((
        f"__import__('os').system('touch {canary}')", f"exec(\"open('{canary}','w')\")", f"eval(\"open('{canary}','w')\")",
        f"open('{canary}','w').write('x')", f"().__class__.__base__.__subclasses__()[-1]('touch {canary}')",
        f"\\write18{{touch {canary}}}", f"\\input{{|touch {canary}}}", f"\\immediate\\openout\\x={canary}",
        f"$(touch {canary})",
        f"`touch {canary}`", f"; touch {canary} #", f"{{{{7*7}}}}{{% import os %}}{{{{os.system('touch {canary}')}}}}",
        f"${{jndi:ldap://127.0.0.1/{canary}}}", f"!!python/object/apply:os.system ['touch {canary}']",
        f"cos\nsystem\n(S'touch {canary}'\ntR.", f"(lambda: open('{canary}','w'))()", f"[x for x in [open('{canary}','w')]]",
        f"Symbol('x').__class__.__init__.__globals__['__builtins__']['open']('{canary}','w')",
        f"sympify(\"__import__('os').system('touch {canary}')\")", f"lambdify(x, \"open('{canary}','w')\")(1)",
        f"1 if __import__('os').system('touch {canary}') else 2", f"print(open('{canary}','w'))", "exit()", "quit()",
        "raise SystemExit",
        "os._exit(1)", "while True: pass", "(lambda f: f(f))(lambda f: f(f))", "[0]*10**10", "'a'*10**10", "range(10**12)",
    ))  # fmt: skip


def _format(draw: random.Random, _: str) -> str:
    return draw.choice((
        "%s" * 200, "%n%n%n%n", "{0.__class__.__mro__}", "{" * 500, "%1000000000d", "{:>1000000000}", "$" * 999, "\\" * 777,
        "{}{}{}", "%(a)s", "{0!r:{1}}",
        "\\boxed{" * 200, "####" * 300, "<answer>" * 300, "</answer>" * 300, "<think>" * 50, "\\n" * 500,
    ))  # fmt: skip


def _unicode(draw: random.Random, _: str) -> str:
    kinds: tuple[tuple[int, int], ...] = (
        (0x00, 0x20), (0x7F, 0xA0), (0x300, 0x36F), (0x200B, 0x206F), (0x660, 0x669), (0x966, 0x96F), (0xFF10, 0xFF19),
        (0x1D7CE, 0x1D7FF), (0x2150, 0x218B), (0xD800, 0xDFFF), (0xE000, 0xE0FF), (0xFE00, 0xFEFF), (0x1F600, 0x1F64F),
        (0xE0000, 0xE007F), (0x10FF00, 0x10FFFF), (0x2070, 0x209C), (0x2460, 0x249B),
    )  # fmt: skip
    low, high = draw.choice(kinds)
    text = "".join(chr(draw.randint(low, high)) for _ in range(draw.choice((1, 7, 200))))
    return draw.choice((text, f"4{text}2", f"-{text}", f"\\frac{{{text}}}{{2}}", f"1{text}e{text}5"))


_PIECES = r"""
\frac { } ^ _ \sqrt ( ) [ ] 1 42 x \pi , ; \cup \cap \infty - + \times \text{cat} \begin{pmatrix}1&2\\3&4\end{pmatrix} \\ & =
\leq \in \mathbb{R} % $ # \left \right | ! ' " \overline{3} \log_ \sum_{i=1}^{n} \int d e-5 . ° \% \$ \{ \} \ldots \emptyset
\mod \pm i e \angle \lfloor \rfloor True None nan inf
"""


def _latex(draw: random.Random, _: str) -> str:
    pieces = _PIECES.split()
    return "".join(draw.choice(pieces) for _ in range(draw.choice((3, 8, 20, 60))))


def _long(draw: random.Random, _: str) -> str:
    piece = draw.choice(
        ("1,", "1+", "x", "(1)", "\\frac12 ", "a\n", " ", "-", "9", "1=", "\\cup[0,1]", "and ", "%", "√", "1 2 ")
    )
    return piece * draw.choice((2_000, 20_000, 100_000))


KINDS: dict[str, Draw] = {
    "nesting": _nested, "huge numbers": _power, "injections": _injection, "format strings": _format, "unicode": _unicode,
    "nasty LaTeX": _latex, "very long": _long,
}  # fmt: skip
_WEIGHTS = (1, 1, 3, 2, 6, 8, 1)


def hostile_answers(count: int, canary: str, seed: int = 0) -> list[tuple[str, str]]:
    """(kind, response) pairs."""
    draw = random.Random(seed)
    found = []
    for kind in draw.choices(list(KINDS), _WEIGHTS, k=count):
        text = KINDS[kind](draw, canary)
        found.append((kind, draw.choice(WRAPPINGS).format(text)))
    return found


def run_answers(
    folder: Path, count: int, seed: int = 0, done: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (batch, facts): what each judge made of a batch of answers that is not done."""
    canary = folder / "canary"
    canary.unlink(missing_ok=True)
    answers = hostile_answers(count, str(canary), seed)
    judges = _judges()
    try:
        for start in range(0, count, BATCH):
            batch = answers[start : start + BATCH]
            if f"{start:06d}" not in done:
                yield f"{start:06d}", _judge(judges, batch, start, canary)
    finally:
        for judge, _ in judges.values():
            judge.close()


def _judges() -> dict[str, tuple[Any, list[Prompt]]]:
    """Name → (reward, prompts that take turns)."""
    golds = [Prompt(f"q{i}", "?", (1,), "?", gold) for i, gold in enumerate(GOLDS)]
    found: dict[str, tuple[Any, list[Prompt]]] = {"exact": (ExactMatchReward.build(ExactReward(), None), golds)}
    for form in ("any", "boxed", "gsm8k"):
        config = MathReward(answer_format=form, timeout_s=TIMEOUT_S, workers=1)
        found[f"math {form}"] = MathAnswerReward.build(config, None), golds
    for name in TASKS:
        task = build_gym(ReasoningGymData(task=name, size=4, seed=1))
        prompts = [Prompt(row.id, row.question, (1,), row.question, row.answer, row.columns) for row in task.rows()]
        found[f"gym {name}"] = TaskVerifierReward(TaskReward(timeout_s=TIMEOUT_S), task), prompts
    return found


def _judge(
    judges: dict[str, tuple[Any, list[Prompt]]], batch: list[tuple[str, str]], start: int, canary: Path
) -> dict[str, Any]:
    """Judge a batch: by exact and votes always, by math in the three formats and by the tasks in turn."""
    turn = start // BATCH
    maths, tasks = ([name for name in judges if name.startswith(prefix)] for prefix in ("math", "gym"))
    texts = [text for _, text in batch]
    facts: dict[str, Any] = {
        "kinds": Counter(kind for kind, _ in batch),
        "judged": {},
        "problems": {},
        "faults": [],
        "executed": 0,
    }
    for name in ("exact", maths[turn % len(maths)], tasks[turn % len(tasks)]):
        judge, prompts = judges[name]
        asked = [prompts[i % len(prompts)] for i in range(len(texts))]
        began = time.monotonic()
        try:
            scores = judge.score(asked, texts, [(1,)] * len(texts))
            for prompt, text in zip(asked, texts, strict=True):
                judge.vote(prompt, text)
        except Exception as error:
            facts["faults"].append(f"{name}: {type(error).__name__}: {error}"[:300])
            continue
        seconds = time.monotonic() - began
        if seconds > TIMEOUT_S * len(texts) + SLACK_S:
            facts["faults"].append(f"{name}: hang of {seconds:.0f} s")
        facts["judged"][name] = len(texts)
        facts["problems"][name] = Counter(score.problem for score in scores if score.problem)
    for text in texts:
        try:
            loose_answer(text)
        except Exception as error:
            facts["faults"].append(f"vote: {type(error).__name__}: {error}"[:300])
    facts["executed"] = int(canary.exists())
    canary.unlink(missing_ok=True)
    return facts
