"""README.md and docs/quickstart.md run in their own order: their files are written, their commands and programs run.

The demo and the models are small ones; nothing else of a page is changed, but for what `SHORTER` lists. A block that is
neither run nor known is an error, so that a new one is looked at.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from surroundings import ROOT

from deepgrpo.cli import main
from tiny import save_model, write_jsonl

DEMO = """
base = "{recipe}"
run = {{ prompts_per_step = 4, device = "cpu", threads = 1 }}
model = {{ hidden_size = 16, num_layers = 1, num_heads = 2, intermediate_size = 32, max_position = 128 }}
warmstart = {{ steps = 2, target_accuracy = "none" }}
data = {{ chain_length = 2 }}
sampling = {{ max_new_tokens = 8 }}
explore = {{ num_rollouts = 2, branches_per_pivot = 2 }}
eval = {{ limit = 2, samples = 0, data = {{ chain_length = 2 }} }}
"""
"""A file of the name `demo` in the working directory comes before the shipped recipe."""
SHORTER = {
    "--limit 64": "--limit 4", "max_new_tokens = 60": "max_new_tokens = 12",
    "rewards=[exact_match])": 'rewards=[exact_match], show=False, overrides={"run.steps": 1, "run.prompts_per_step": 2, '
    '"explore.num_rollouts": 2, "explore.branches_per_pivot": 2, "sampling.max_new_tokens": 4, "log.trees_every": 1})',
}  # fmt: skip
"""Text of a page → what runs in its place."""
LONG = {"deepgrpo compare methods --jobs 2", "deepgrpo probe runs/mine"}
"""tests/cli/test_compare_cli.py and test_probe_cli.py run small ones."""
RECIPE = """
model = { type = "pretrained", path = "Qwen/Qwen2.5-0.5B-Instruct" }
data = { type = "jsonl", path = "train.jsonl" }
reward = { type = "exact", marker = "" }
explore = { type = "deep", num_rollouts = 2, branches_per_pivot = 2 }
run = { steps = 1, prompts_per_step = 2, device = "cpu", threads = 1 }
sampling = { max_new_tokens = 8 }
log = { trees_every = 1 }
eval = { every = 1, limit = 2, data = { type = "jsonl", path = "train.jsonl" } }
"""
"""Content of the README's RECIPE.toml."""
ROWS = [{"question": f"{a} + {a}?", "answer": str(2 * a)} for a in range(4)]


def blocks_of(page: str) -> list[tuple[str, str]]:
    """Language and text of each fenced block, as `SHORTER` has it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def run(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    program, *arguments = shlex.split(command, comments=True)
    assert program == "deepgrpo"
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 0, (command, out, err)
    return out


def extras_exist(command: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"\.\[([\w,]+)\]", command):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), command


def words_of(lines: list[str]) -> list[str]:
    """First words of the lines of a table or a log, figures and drawings left out."""
    return [line.split()[0] for line in lines if re.match(r" *[a-z]", line)]


def test_shorter_texts_are_on_the_pages() -> None:
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/quickstart.md"))
    assert [text for text in (*SHORTER, *LONG) if text not in pages] == []


def test_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("demo").write_text(DEMO.format(recipe=ROOT / "recipes" / "demo.toml"))
    printed = ""  # by a program on the page, shown in the next block
    done: dict[str, int] = {}
    for language, block in blocks_of("docs/quickstart.md"):
        kind = language
        if block.startswith("$ deepgrpo"):
            kind = "command"
            command, _, shown = re.sub(r"\\\n\s*", "", block[2:]).partition("\n")
            out = run(command, capsys)
            assert words_of(shown.splitlines())[-1] in words_of(out.splitlines()), command
            last = shown.strip().splitlines()[-1]
            assert not last.startswith("run directory") or last in out
        elif language == "python" and block.startswith("import gzip"):
            exec(compile(block, "docs/quickstart.md", "exec"), {})
            printed = capsys.readouterr().out
            assert {line.split()[0] for line in printed.splitlines()[1:]} <= {"main", "branch"}
        elif language == "python":
            with open("my_reward.py", "a", encoding="utf-8") as file:
                file.write(block + "\n\n")
        elif language == "toml" and block.startswith("# "):
            Path(block.partition("\n")[0][2:]).write_text(block, encoding="utf-8")
        elif language == "toml":
            tomllib.loads(block)  # test_commands_in_docs.py: its keys
        elif block.startswith('{"id"'):
            kind = "data"
            Path("train.jsonl").write_text(block, encoding="utf-8")
        elif block.startswith("runs/mine/"):
            kind = "directory"
            directory = block
        elif printed:
            kind, printed = "output", block.partition("\n")[0] == printed.partition("\n")[0] and ""
        else:
            kind = "shell"
            assert re.fullmatch(r"make demo\n|\.venv/bin/pip install .*\n", block), block
            extras_exist(block)
        done[kind] = done.get(kind, 0) + 1
    assert set(done) == {"shell", "command", "toml", "data", "python", "directory", "output"} and done["command"] > 4
    assert printed == ""
    run("deepgrpo export runs/mine", capsys)  # one of the entries of a run directory
    for name in re.findall(r"^  (\S+)", directory, re.MULTILINE):
        assert any((tmp_path / "runs" / made / name).exists() for made in ("mine", "short")), name


def test_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "Qwen" / "Qwen2.5-0.5B-Instruct", family="qwen2")
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    Path("RECIPE.toml").write_text(RECIPE, encoding="utf-8")
    ran = []
    for language, block in blocks_of("README.md"):
        if language == "toml":
            Path("recipe.toml").write_text(block, encoding="utf-8")
        elif language == "python":
            found = programs_names(tmp_path)
            exec(compile(block, "README.md", "exec"), found)
            assert found["run"].step == 1 and {"main", "branch"} >= set(found["load_trees"](found["run"]).stream)
        elif "deepgrpo train" in block:
            for line in block.splitlines():
                command = line.partition("  #")[0].strip()
                if command.startswith("deepgrpo ") and command not in LONG:
                    run(command, capsys)
                    ran.append(command.split()[1])
                else:
                    assert command in LONG or command == "pip install .", command
        else:
            # the drawing, the installation, and what `make demo` printed
            known = (r" +Q\(r\)", r"git clone <this repository> deepgrpo && cd deepgrpo\nmake demo\n", r"0\.22M trainable")
            assert re.match("|".join(known), block), block
    assert {"train", "eval", "report", "doctor"} <= set(ran)
    assert (tmp_path / "runs" / "mine" / "report.html").exists()


def programs_names(home: Path) -> dict[str, Any]:
    """The objects that the README's program has already."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = str(home / "Qwen" / "Qwen2.5-0.5B-Instruct")

    def exact_match(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [float(text.strip() == reference) for text, reference in zip(completions, answer, strict=True)]

    return {
        "model": AutoModelForCausalLM.from_pretrained(name), "tokenizer": AutoTokenizer.from_pretrained(name), "rows": ROWS,
        "exact_match": exact_match,
    }  # fmt: skip
