"""docs/library.md, the own loop and the notebook run as printed, with fewer steps and small models."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from surroundings import ROOT

from notebooks import run_notebook
from tiny import save_model

DEMO = """
base = "{recipe}"
run = {{ prompts_per_step = 2, device = "cpu" }}
model = {{ hidden_size = 16, num_layers = 1, num_heads = 2, intermediate_size = 32, max_position = 64 }}
warmstart = {{ steps = 1, target_accuracy = "none" }}
data = {{ chain_length = 2 }}
sampling = {{ max_new_tokens = 8 }}
explore = {{ num_rollouts = 2, branches_per_pivot = 2 }}
eval = {{ limit = 2, samples = 0, data = {{ chain_length = 2 }} }}
"""
SHORTER = {
    '"run.steps": 20': '"run.steps": 1', '"run.steps": 51': '"run.steps": 2', '"steps": 50': '"steps": 1',
    '"prompts_per_step": 16': '"prompts_per_step": 2', '"max_new_tokens": 64': '"max_new_tokens": 4',
    '"sampling.max_new_tokens": 16': '"sampling.max_new_tokens": 2', "rows[16:]": "rows[16:18]", "rows[:16]": "rows[:2]",
    "{\"run\"": '{"log": {"trees_every": 1}, "explore": {"type": "deep", "num_rollouts": 2, "branches_per_pivot": 2}, "run"',
}  # fmt: skip
"""Text of the page → what the test runs in its place."""


def test_every_block_of_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    assert len(blocks) == len(re.findall(r"^```\w", page, flags=re.M)) > 9
    save_model(tmp_path / "Qwen" / "Qwen2.5-0.5B-Instruct", family="qwen2")
    (tmp_path / "demo").write_text(DEMO.format(recipe=ROOT / "recipes" / "demo.toml"))
    names: dict[str, Any] = {}
    said = io.StringIO()
    used = set()
    for number, block in enumerate(blocks):
        for text, shorter in SHORTER.items():
            used |= {text} if text in block else set()
            block = block.replace(text, shorter)
        with contextlib.redirect_stdout(said):
            exec(compile(block, f"docs/library.md, block {number + 1}", "exec"), names)
    assert used == set(SHORTER)  # the page still has what the test shortens
    shown = said.getvalue()
    assert "ended at step 1" in shown and "-0.5 tensor([[-0.3750, -0.3750]," in shown
    assert names["logprobs"].numel() == len(packed_terms(names))


def packed_terms(names: dict[str, Any]) -> Any:
    return names["packed"].packs[-1].terms_n


def test_the_own_loop_learns() -> None:
    """20 of its 120 steps; at most 80 lines, as it promises."""
    path = ROOT / "examples" / "own_loop.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80
    with contextlib.redirect_stdout(io.StringIO()):
        before, after = runpy.run_path(str(path))["train"](20)
    assert before < 0.1 and after > before + 0.1


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks(path: Path) -> None:
    names, outputs = run_notebook(path, {"STEPS": 2})
    assert names["deep"].step == 2 and len(names["trees"]) > 2 * 10 * 8
    assert outputs[1:3] == _recorded(path)[1:3]  # cells that draw nothing show what the notebook shows
    assert "deep" in outputs[-1][0]["data"]["text/plain"][0] and "</table>" in "".join(outputs[-1][0]["data"]["text/html"])


def _recorded(path: Path) -> list[Any]:
    import json

    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]
