"""Checks of a strategy's answers: pivots inside the tree, credit inside its nodes, state as plain JSON, metrics as numbers.

A user's strategy passes every answer through these (user.py); the contract asks the same of ours (contract.py). Numbers come
back as plain ints and floats, so that numpy's do not reach a file.
"""

from __future__ import annotations

import itertools
import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from deepgrpo.explore.base import Limits
from deepgrpo.loading import show
from deepgrpo.records import ROOT, Credit, CreditSpan, Given, Group, Pivot, Stream, Tree


class BrokenRuleError(Exception):
    """An answer breaks a rule. The message is a sentence with the value and the remedy."""


def check_pivots(answer: Any, tree: Tree, limits: Limits) -> list[Pivot]:
    """Pivots of `plan`: at least one for an empty tree, each at a state from which this tree can be continued."""
    if not isinstance(answer, list | tuple):
        raise BrokenRuleError(f"plan returned {show(answer)}; return a list of Pivot, empty once the tree is complete")
    pivots = [_pivot(pivot, f"pivot {number} of plan", tree, limits) for number, pivot in enumerate(answer)]
    if not tree.pivots:
        if not pivots:
            raise BrokenRuleError("plan returned no pivot for a tree without rollouts; begin with main_pivot(num_rollouts)")
        if any(pivot.parent != ROOT for pivot in pivots):
            raise BrokenRuleError("plan branches off a tree without rollouts; begin with main_pivot(num_rollouts)")
    return pivots


def _pivot(pivot: Any, name: str, tree: Tree, limits: Limits) -> Pivot:
    if not isinstance(pivot, Pivot):
        raise BrokenRuleError(f"{name} is {show(pivot)}; make it a deepgrpo.records.Pivot")
    parent, offset = _integer(pivot.parent, f"{name}: parent"), _integer(pivot.offset, f"{name}: offset")
    branches = _integer(pivot.num_branches, f"{name}: num_branches")
    if branches < 1:
        raise BrokenRuleError(f"{name}: num_branches is {branches}; sample at least one continuation, or leave the pivot out")
    if not ROOT <= parent < len(tree.nodes):
        raise BrokenRuleError(
            f"{name}: parent is {parent}, outside the tree, which has {len(tree.nodes)} nodes; name a node's index in "
            "tree.nodes, or ROOT for the prompt"
        )
    if parent == ROOT:
        if offset != 0:
            raise BrokenRuleError(f"{name}: offset is {offset}, but a pivot at the prompt (parent ROOT) has offset 0")
    else:
        _offset(offset, name, parent, tree)
    given = _given(pivot.given, f"{name}: given")
    used, room = len(tree.response(parent, offset)) + len(given.tokens if given else ()), limits.response(tree)
    if used and used >= room:
        raise BrokenRuleError(
            f"{name}: {used} tokens of the response come before it, and a response has at most {room}; choose a state that "
            "leaves room for a token"
        )
    if pivot.stream not in get_args(Stream):
        raise BrokenRuleError(f'{name}: stream is {show(pivot.stream)}; it is "main" or "branch"')
    longest = None if pivot.max_tokens is None else _integer(pivot.max_tokens, f"{name}: max_tokens")
    if longest is not None and longest < 1:
        raise BrokenRuleError(f"{name}: max_tokens is {longest}; use 1 or more, or None for no limit of its own")
    ratio = _number(pivot.ratio, f"{name}: ratio")
    if not 0 <= ratio <= 1:
        raise BrokenRuleError(f"{name}: ratio is {ratio:g}; a depth ratio is between 0 and 1")
    return replace(
        pivot, parent=parent, offset=offset, num_branches=branches, max_tokens=longest, ratio=ratio, given=given,
        candidates=tuple(_integer(each, f"{name}: candidates") for each in pivot.candidates),
        q=tuple(_number(each, f"{name}: q") for each in pivot.q),
    )  # fmt: skip


def _given(given: Any, name: str) -> Given | None:
    if given is None:
        return None
    if not isinstance(given, Given) or not given.tokens:
        raise BrokenRuleError(f"{name} is {show(given)}; make it a deepgrpo.records.Given with tokens, or None")
    tokens = tuple(_integer(each, f"{name}: a token") for each in given.tokens)
    return Given(tokens, _integer(given.version, f"{name}: version"))


def _offset(offset: int, name: str, parent: int, tree: Tree) -> None:
    """A response may be continued before any of its tokens; a segment only at its end."""
    node = tree.nodes[parent]
    length = len(node.tokens)
    if node.complete and not 0 <= offset < length:
        raise BrokenRuleError(
            f"{name}: offset is {offset}, but node {parent} is a response of {length} tokens; choose an offset from 0 to "
            f"{length - 1}, the number of its tokens to keep"
        )
    if not node.complete and offset != length:
        raise BrokenRuleError(
            f"{name}: offset is {offset}, but node {parent} is a segment, which goes on at its end; use offset {length}"
        )


def check_credit(answer: Any, tree: Tree) -> Credit:
    """Spans inside their nodes, no token twice, finite advantages and rewards."""
    if not isinstance(answer, Credit):
        raise BrokenRuleError(f"credit returned {show(answer)}; return a deepgrpo.records.Credit")
    spans = [_span(span, f"span {number} of credit", tree) for number, span in enumerate(answer.spans)]
    ordered = sorted(spans, key=lambda span: (span.node, span.start))
    for one, following in itertools.pairwise(ordered):
        if one.node == following.node and following.start < one.end:
            raise BrokenRuleError(
                f"credit has token {following.start} of node {one.node} in two spans; give each token one advantage"
            )
    groups: list[Group] = []
    for number, group in enumerate(answer.groups):
        if not isinstance(group, Group) or not group.rewards:
            raise BrokenRuleError(f"group {number} of credit is {show(group)}; make it a Group(stream, rewards) with a reward")
        groups.append(
            Group(group.stream, tuple(_number(r, f"group {number} of credit: a reward") for r in group.rewards))
        )
    return Credit(tuple(spans), tuple(groups))


def _span(span: Any, name: str, tree: Tree) -> CreditSpan:
    if not isinstance(span, CreditSpan):
        raise BrokenRuleError(f"{name} is {show(span)}; make it a deepgrpo.records.CreditSpan")
    node = _integer(span.node, f"{name}: node")
    start, end = _integer(span.start, f"{name}: start"), _integer(span.end, f"{name}: end")
    if not 0 <= node < len(tree.nodes):
        raise BrokenRuleError(f"{name}: node is {node}, but the tree has {len(tree.nodes)} nodes; name an index in tree.nodes")
    length = len(tree.nodes[node].tokens)
    if not 0 <= start < end <= length:
        raise BrokenRuleError(
            f"{name}: [{start}, {end}) is not inside node {node}, which has {length} tokens; spans count a node's own tokens"
        )
    if span.stream not in get_args(Stream):
        raise BrokenRuleError(f'{name}: stream is {show(span.stream)}; it is "main" or "branch"')
    if not tree.nodes[node].sampled:
        raise BrokenRuleError(f"{name} trains node {node}, which is given; text of an earlier step is context, leave it out")
    return CreditSpan(node, start, end, _number(span.advantage, f"{name}: advantage"), span.stream)


def check_state(answer: Any, name: str) -> dict[str, Any]:
    """The state as a checkpoint would give it back: a dict of plain JSON."""
    if not isinstance(answer, dict):
        raise BrokenRuleError(f"{name} returned {show(answer)}; return the state as a dict")
    problem = _not_json(answer, "state")
    if problem is not None:
        raise BrokenRuleError(
            f"{name} returned a state that is not plain JSON: {problem}; use dicts with string keys, lists, strings, finite "
            "numbers, True, False and None"
        )
    plain: dict[str, Any] = json.loads(json.dumps(answer))
    return plain


def _not_json(value: Any, path: str) -> str | None:
    """The first part of a value that JSON does not know, with its path; None if there is none."""
    if value is None or isinstance(value, bool | str | int):
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{path} is {value}"
    if isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, str):
                return f"{path} has the key {show(key)}"
            if problem := _not_json(each, f"{path}[{key!r}]"):
                return problem
        return None
    if isinstance(value, list | tuple):
        return next((p for i, each in enumerate(value) if (p := _not_json(each, f"{path}[{i}]"))), None)
    return f"{path} is {show(value)}"


def check_metrics(answer: Any) -> dict[str, float]:
    """Metrics of `report`: names to finite numbers."""
    if not isinstance(answer, Mapping):
        raise BrokenRuleError(f"report returned {show(answer)}; return a dict of metrics, empty for none")
    for name in answer:
        if not isinstance(name, str):
            raise BrokenRuleError(f"report has the key {show(name)}; name a metric by a string")
    return {name: _number(value, f"report: {name}") for name, value in answer.items()}


def _integer(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise BrokenRuleError(f"{name} is {show(value)}; make it an int")
    return int(value)


def _number(value: Any, name: str) -> float:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a scalar of numpy or torch
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BrokenRuleError(f"{name} is {show(value)}; make it a float")
    if not math.isfinite(value):
        raise BrokenRuleError(f"{name} is {float(value)}; it must be finite")
    return float(value)
