"""Run directories made up for the report: whatever texts, rewards and pivots a test wants, without any training."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepgrpo.config import parse_config, to_toml
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.explore.recoverability import Recoverability, fit_logistic
from deepgrpo.feedback import Score
from deepgrpo.ledger import Ledger, StepReport
from deepgrpo.records import ROOT, FinishReason, Node, Pivot, Prompt, Tree
from deepgrpo.rng import generator
from deepgrpo.runs.metrics import step_json
from deepgrpo.runs.trees import save_trees
from deepgrpo.train.metrics import tree_metrics
from tiny import byte_tokenizer

EOS = 1
_FIRST_BYTE = 2
RECIPE: dict[str, Any] = {
    "run": {"name": "made-up", "steps": 100},
    "model": {"type": "scratch"},
    "data": {"type": "synthetic", "chain_length": 3},
    "reward": {"type": "task"},
    "explore": {
        "type": "deep", "num_rollouts": 4, "branches_per_pivot": 4, "segments": {"type": "sentence", "extra_ends": [";"]},
    },
    "loss": {"beta": 0.0},
    "log": {"trees_every": 1},
}  # fmt: skip

_TOKENIZER = None


def tokenizer() -> Any:
    """A token per byte: any text can be said, and one character may take several tokens."""
    global _TOKENIZER
    _TOKENIZER = _TOKENIZER or byte_tokenizer()
    return _TOKENIZER


def encode(text: str, *, end: bool = True) -> tuple[int, ...]:
    ids = tokenizer()(text, add_special_tokens=False).input_ids
    return (*ids, EOS) if end else tuple(ids)


def node(
    tree: Tree, parent: int, offset: int, text: str, reward: float, pivot: int, finish: FinishReason = "stop",
    logprob: float = -0.5, **score: Any,
) -> Node:  # fmt: skip
    """A node with this own text."""
    tokens = encode(text, end=finish == "stop")
    before = tokenizer().decode(tree.response(parent, offset), skip_special_tokens=True) if parent != ROOT else ""
    return Node(
        parent, offset, tokens, (logprob,) * len(tokens), finish, before + text, Score(reward, **score),
        "main" if parent == ROOT else "branch", pivot,
    )  # fmt: skip


def small_tree(name: str = "q1", question: str = "3+4*2:") -> Tree:
    """Two rollouts of two segments, the first one failed; its pivot at the end of segment 1 rescues it.

    Rewards 0, 1 and, of the branches, 1, 0. Chain of the first: root, 6, 12, 15; candidates 0, 6, 12 at r = .25, .5, .75.
    """
    tree = Tree(Prompt(name, question, encode(question, end=False), question, "4"))
    tree = tree.add(
        [Pivot(ROOT, 0, 2, "main")],
        [node(tree, ROOT, 0, "3+4=7;7*2=5;#5", 0.0, 0), node(tree, ROOT, 0, "3+4=7;7*2=4;#4", 1.0, 0)],
    )
    pivot = Pivot(0, 6, 2, ratio=2 / 4, candidates=(0, 6, 12), q=(0.2, 0.5, 0.3))
    return tree.add([pivot], [node(tree, 0, 6, "7*2=4;#4", 1.0, 1), node(tree, 0, 6, "7*2=3;#3", 0.0, 1, logprob=-1.25)])


def random_tree(name: str, *seed: int, rollouts: int = 4, branches: int = 4, sums: int = 4, skill: float = 0.5) -> Tree:
    """A tree of made-up arithmetic: rollouts fail at random, each failed one has a pivot, rescued the less the deeper."""
    random = generator("made-up tree", *seed)
    question = "+".join(str(d) for d in random.integers(1, 10, sums + 1)) + ":"
    answer = str(int(random.integers(10)))
    tree = Tree(Prompt(name, question, encode(question, end=False), question, answer))

    def text(right: bool, count: int) -> str:
        digits = random.integers(0, 10, (count, 3))
        return "".join(f"{a}+{b}={c};" for a, b, c in digits) + "#" + (answer if right else str((int(answer) + 1) % 10))

    right = random.random(rollouts) < skill
    tree = tree.add([Pivot(ROOT, 0, rollouts, "main")], [node(tree, ROOT, 0, text(bool(r), sums), float(r), 0) for r in right])
    for index in [i for i, r in enumerate(right) if not r]:
        ends = [6 * i for i in range(sums + 1)]
        ratios = [(i + 1) / (sums + 2) for i in range(sums + 1)]
        weights = [r**2 / (1 + math.exp(4 * r - 2)) for r in ratios]
        q = [w / sum(weights) for w in weights]
        place = int(random.choice(len(ends), p=q))
        chance = 0.6 * (1 - ratios[place])
        pivot = Pivot(index, ends[place], branches, ratio=ratios[place], candidates=tuple(ends), q=tuple(q))
        kids = [
            node(tree, index, ends[place], text(ok, sums - place), float(ok), len(tree.pivots), logprob=float(-lp))
            for ok, lp in [(bool(random.random() < chance), random.exponential(0.3)) for _ in range(branches)]
        ]
        tree = tree.add([pivot], kids)
    return tree


def write_run(
    directory: Path, trees: dict[int, Sequence[Tree]], *, last_step: int | None = None, with_tokenizer: bool = True,
    warnings: dict[int, tuple[str, ...]] | None = None, recipe: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """A run directory with these trees, and metrics that fit them; every fifth step has an evaluation."""
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text(to_toml(parse_config({**RECIPE, **(recipe or {})})), encoding="utf-8")
    ledger = Ledger()
    ratios: list[float] = []
    outcomes: list[int] = []
    fit = Recoverability()
    with (directory / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range((last_step or max(trees, default=10)) + 1):
            grown = trees.get(step, ())
            credits = [sibling_credit(tree) for tree in grown]
            metrics: dict[str, Any] = {}
            if step % 5 == 0:
                metrics |= {"eval/greedy": 0.3 + 0.01 * step, "eval/greedy_se": 0.03, "eval/sampled": 0.2 + 0.01 * step}
            if step:
                metrics |= {"main/entropy": 0.5 / step, "main/length": 30.0 + step, "grad_norm": 1.0}
                metrics |= tree_metrics(grown, credits) if grown else {"main/reward": 0.4, "main/mixed": 0.6}
                for tree in grown:
                    for index, pivot in enumerate(tree.pivots):
                        if pivot.stream == "branch":
                            ratios.append(pivot.ratio)
                            outcomes.append(int(any(tree.nodes[i].reward > 0 for i in tree.children(index))))
                if 0 < sum(outcomes) < len(outcomes):
                    w, b = fit_logistic(np.array(ratios[-500:]), np.array(outcomes[-500:]))
                    fit = Recoverability(w=w, b=b, fitted=True)
                metrics |= {"recoverability/w": fit.w, "recoverability/b": fit.b, "recoverability/fitted": float(fit.fitted)}
                ledger += Ledger(
                    sampled_tokens=sum(len(n.tokens) for t in grown for n in t.nodes) or 100, optimizer_steps=1,
                    seconds_sample=0.5, seconds_learn=0.25, seconds_eval=9.0,
                )  # fmt: skip
            if grown:
                save_trees(directory / "trees" / f"step-{step:06d}.jsonl.gz", grown, credits)
            report = StepReport(step, metrics, ledger, (warnings or {}).get(step, ()))
            file.write(json.dumps(step_json(report)) + "\n")
    if with_tokenizer:
        model = directory / "checkpoints" / "step-000010" / "model"
        model.mkdir(parents=True)
        tokenizer().backend_tokenizer.save(str(model / "tokenizer.json"))
    return directory


def random_run(directory: Path, steps: int, per_step: int, *, every: int = 1, seed: int = 0, **how: Any) -> Path:
    """A run whose rollouts get better, with `per_step` trees in every `every`-th step."""
    trees = {
        step: [
            random_tree(f"q{step}-{i}", seed, step, i, skill=0.2 + 0.6 * step / (steps * every), **how) for i in range(per_step)
        ]
        for step in range(every, steps * every + 1, every)
    }
    return write_run(directory, trees)
