"""The model card of an export: what was trained, on what, by which strategy, at which cost, how well, and how to repeat it.

Every figure comes from the files of the run. Where a run has none (no evaluation), the card says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepgrpo import __version__
from deepgrpo.config import Config, GivenModel, HubData, MixData, PretrainedModel, ScratchModel
from deepgrpo.config.base import Section
from deepgrpo.export.measured import evaluation_table
from deepgrpo.export.weights import WrittenModel
from deepgrpo.ledger import Ledger
from deepgrpo.runs.saved import SavedRun


@dataclass(frozen=True, slots=True)
class CardFacts:
    """Facts of an export that the run does not have. Example: CardFacts(40, Ledger(...), WrittenModel(...), "me/model")."""

    step: int
    ledger: Ledger
    """Cost up to that step."""
    written: WrittenModel
    repository: str | None = None


def model_card(saved: SavedRun, config: Config, facts: CardFacts) -> str:
    """The text of README.md."""
    name = (facts.repository or saved.name).rpartition("/")[2]
    parts = [
        _front_matter(config, facts),
        f"# {_plain(name)}\n\nPost-trained by reinforcement learning with deepgrpo {__version__}; "
        f"exploration strategy `{config.explore.type}`.",
        _table([
            ("base model", _base(config)),
            ("weights", f"{facts.written.kind} in {facts.written.dtype}{_lora(config)}"),
            ("step", f"{facts.step} of {config.run.steps}"),
            ("strategy", _section(config.explore)),
            ("data", "; ".join(_data(config))),
            ("reward", _section(config.reward)),
            ("loss", f"{_section(config.loss)}; {_section(config.optim)}"),
            ("seed", str(config.run.seed)),
        ], ("", "")),
        "## Evaluation\n\n" + evaluation_table(saved, config, facts.step),
        "## Cost\n\nUp to this step, warm start left out:\n\n" + _table(_cost(facts.ledger), ("", "")),
        "## Use\n\n" + _use(config, facts),
        "## Reproduce\n\n`recipe.toml` beside this card is the resolved recipe of the run, with every setting.\n\n"
        + _fenced(f'pip install "deepgrpo=={__version__}"\ndeepgrpo train recipe.toml')
        + "\n\nPaths in it are those of the machine that trained. The same versions, machine and number of threads give the "
        "same weights, bit by bit; others differ by rounding, which grows over the steps.\n\n"
        "<details><summary>recipe.toml</summary>\n\n" + _fenced(saved.recipe.rstrip(), "toml") + "\n\n</details>",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _front_matter(config: Config, facts: CardFacts) -> str:
    lines = ["---"]
    if isinstance(config.model, PretrainedModel) and _on_hub(config.model.path):
        lines.append(f"base_model: {config.model.path}")
        lines.append(f"base_model_relation: {'adapter' if facts.written.adapters else 'finetune'}")
    lines += [f"library_name: {'peft' if facts.written.adapters else 'transformers'}", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {tag}" for tag in ("deepgrpo", "reinforcement-learning", config.explore.type)]
    if sets := [each.path for each in _sources(config) if isinstance(each, HubData) and _on_hub(each.path)]:
        lines += ["datasets:", *(f"- {path}" for path in dict.fromkeys(sets))]
    return "\n".join([*lines, "---"])


def _on_hub(path: str) -> bool:
    """True for `owner/name` that is no directory here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not path.startswith(".") and not Path(path).exists()


def _base(config: Config) -> str:
    model = config.model
    if isinstance(model, PretrainedModel):
        link = f"[{model.path}](https://huggingface.co/{model.path})"
        return link if _on_hub(model.path) else f"`{model.path}`"
    if isinstance(model, GivenModel):
        return f"a {model.name} of the Python program that trained"
    assert isinstance(model, ScratchModel)
    return f"none: random weights, {_section(model)}"


def _lora(config: Config) -> str:
    lora = None if isinstance(config.model, ScratchModel) else config.model.lora
    return "" if lora is None else f" (rank {lora.rank}, alpha {lora.alpha:g})"


def _sources(config: Config) -> list[Any]:
    data = config.data
    return [each.data for each in data.sources] if isinstance(data, MixData) else [data]


def _data(config: Config) -> list[str]:
    return [_section(each, left_out={"template", "columns", "curriculum"}) for each in _sources(config)]


def _section(section: Section, left_out: frozenset[str] | set[str] = frozenset()) -> str:
    """A section in a line: its type and the keys that differ from their defaults. Example: `deep`, num_rollouts = 8."""
    found = section.model_dump(mode="json", exclude_defaults=True)
    kind = getattr(section, "type", None)
    keys = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in found.items()
        if key != "type" and key not in left_out and value is not None
    ]  # fmt: skip
    return _plain(", ".join([*([f"`{kind}`"] if kind else []), *keys]) or "defaults")


def _plain(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _cost(ledger: Ledger) -> list[tuple[str, str]]:
    seconds = {name: value for name, value in ledger.as_dict().items() if name.startswith("seconds_")}
    split = ", ".join(f"{name.removeprefix('seconds_')} {value / 3600:.2f}" for name, value in seconds.items() if value >= 36)
    return [
        ("sampled tokens", f"{ledger.sampled_tokens:,}"),
        ("sampled responses and branches", f"{ledger.sampled_sequences:,}"),
        ("prefix tokens encoded", f"{ledger.prefix_tokens_encoded:,} of {ledger.prefix_tokens:,}"),
        ("tokens forwarded by the learner", f"{ledger.learner_tokens:,}"),
        ("tokens with a loss", f"{ledger.trained_tokens:,}"),
        ("responses checked", f"{ledger.verifier_calls:,}"),
        ("optimizer steps", f"{ledger.optimizer_steps:,}"),
        ("hours", f"{sum(seconds.values()) / 3600:.2f}{f' ({split})' if split else ''}"),
    ]


def _table(rows: Sequence[tuple[str, ...]], head: Sequence[str]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _use(config: Config, facts: CardFacts) -> str:
    name = facts.repository or "DIRECTORY"
    kind, package = "AutoModelForCausalLM", "transformers"
    if facts.written.adapters:
        kind, package = "AutoPeftModelForCausalLM", "peft"
    code = (
        f"from {package} import {kind}\nfrom transformers import AutoTokenizer\n\n"
        f'model = {kind}.from_pretrained("{name}")\ntokenizer = AutoTokenizer.from_pretrained("{name}")'
    )
    template = _sources(config)[0].template.model_dump(mode="json", exclude_defaults=True)
    worded = f"Prompts were worded by `data.template` = {json.dumps(template, ensure_ascii=False)}. " if template else ""
    said = _plain(f"{worded}Responses had at most {config.sampling.max_new_tokens} tokens.")
    return f"{_fenced(code, 'python')}\n\n{said}"


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence does not occur in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
