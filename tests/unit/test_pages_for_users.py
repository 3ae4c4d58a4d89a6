"""docs/from_trl_verl.md names keys that exist, here and in TRL; docs/troubles.md quotes messages that the code prints."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from surroundings import ROOT

import deepgrpo
from deepgrpo.config.explain import describe_keys

PAGE = ROOT / "docs" / "from_trl_verl.md"
TROUBLES = ROOT / "docs" / "troubles.md"


def table(page: str, heading: str) -> list[list[str]]:
    """Cells of the rows of the table under a heading, without its head."""
    section = re.split(rf"\n##+ {re.escape(heading)}\n", page)[1].split("\n## ")[0].split("\n### ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


TRL = {"TRL, key by key": 25, "TRL: tools and environments": 5}
VERL = {"verl, key by key": 25, "verl: turns, tools and agent loops": 5}


@pytest.mark.parametrize(("heading", "fewest"), (TRL | VERL).items())
def test_our_keys_exist(heading: str, fewest: int) -> None:
    keys = describe_keys(width=10_000)
    rows = table(PAGE.read_text(encoding="utf-8"), heading)
    assert len(rows) > fewest
    for theirs, ours, *_ in rows:
        for code in codes(ours):
            name = code.split(" ")[0].strip("[]").removesuffix(".type").removeprefix("eval.data.")
            known = f"{name} = " in keys or f"[{name}]" in keys or name in ("weight", "deepgrpo", "--resume", "type")
            assert known, (theirs, code)


def test_trls_keys_exist() -> None:
    trl, transformers = (importlib.util.find_spec(name) for name in ("trl", "transformers"))
    if trl is None or transformers is None or not (trl.origin and transformers.origin):
        pytest.skip("needs trl")
    # read and not imported, which takes seconds
    config = (Path(trl.origin).parent / "trainer" / "grpo_config.py").read_text(encoding="utf-8")
    trainer = (Path(trl.origin).parent / "trainer" / "grpo_trainer.py").read_text(encoding="utf-8")
    arguments = (Path(transformers.origin).parent / "training_args.py").read_text(encoding="utf-8")
    cells = [row[0] for heading in TRL for row in table(PAGE.read_text(encoding="utf-8"), heading)]
    for cell in cells:
        for code in codes(cell) if cell.startswith("`") else []:
            name = re.match(r"\w+", code)
            assert name
            if not name[0].startswith(("accelerate", "_mode")):
                assert re.search(rf"^ +{name[0]}: ", config + trainer + arguments, re.MULTILINE), code


def test_troubles_quotes_what_is_said() -> None:
    sources = [*(ROOT / "src" / "deepgrpo").rglob("*.py"), *(ROOT / "scripts").glob("*.sh")]
    said = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    said = re.sub(r"""["']\s*\n\s*(?:\+ )?f?["']""", "", said)  # a message is several literals
    said = re.sub(r"\{[^{}]*\}", "…", said).replace("\\", "")
    quoted = re.findall(r"^\| `(.+?)` \| ", TROUBLES.read_text(encoding="utf-8"), re.MULTILINE)
    messages = [text for text in quoted if len(text.split()) > 6]
    assert len(messages) > 25
    for message in messages:
        # of the words between names, numbers and paths, three in a row are the code's
        words = re.sub(r"'[^']*'|\"[^\"]*\"|\S*[/{}\d]\S*|…", "\n", message).splitlines()
        runs = [" ".join(part.split()[i : i + 3]) for part in words for i in range(len(part.split()) - 2)]
        assert any(run in said for run in runs), message


def test_the_citation_is_of_this_version() -> None:
    """CITATION.cff was validated against the schema of its format, 1.2.0."""
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {deepgrpo.__version__}\n" in citation
    assert "arXiv:2602.14169" in citation
