"""Every start on a published model that README and docs show for a machine passes ``--dry-run`` on it, with no further option."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import pytest

from documented import PAGES, Shown, blocks
from launch.recipes import load_recipe
from moe_steer.lab import LAB_MODEL

pytestmark = pytest.mark.slow

PUBLISHED = {
    "deepseek-ai/DeepSeek-R1": "r1-fp8-8xh200",
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-1xh100",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "r1-distill-qwen-7b",
}
"""Hub id -> the recipe that has its published configuration."""
STARTS = {
    item.command: item.machine for page in PAGES for item in blocks(page) if isinstance(item, Shown) and item.machine
}
"""A command that two pages show starts once."""


def test_pages_name_machines() -> None:
    scripts = {command.split()[1] for command in STARTS}
    assert {"launch/steer_r1.py", "launch/reduce_overthinking.py"} <= scripts
    assert len(STARTS) >= 3


@pytest.mark.parametrize("command", STARTS)
def test_it_starts_on_its_machine(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus, gib = STARTS[command] or ("", "")
    monkeypatch.chdir(tmp_path)
    words = [word for word in shlex.split(command)[1:] if word != "--dry-run"]
    place = words.index("--model") + 1
    model = tmp_path / Path(words[place]).name
    shutil.copytree(LAB_MODEL, model, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    shape = dict(load_recipe(PUBLISHED[words[place]]).shape)
    (model / "config.json").write_text(json.dumps(shape))
    words[place] = str(model)
    rows = [
        {"problem_id": f"p{n}", "prompt": f"{n} + 1?", "target": str(n + 1), "answer_type": "integer"}
        for n in range(12)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for option in ("--problems", "--task"):  # data sets come from the hub
        if option in words:
            file = Path(words[words.index(option) + 1]).with_suffix(".jsonl")
            file.write_text(text)
            words[words.index(option) + 1] = f"./{file}"
    script, *options = words
    module = import_module(script.removesuffix(".py").replace("/", "."))
    assert module.main([*options, "--dry-run", "--gpus", gpus, "--gpu-gib", gib]) == 0
    said = capsys.readouterr()
    assert "nothing was loaded or written" in said.out
    assert re.search(r"\b(1|2|4|8|16|32|64) rows of up to \d{5} tokens", said.out)
    assert not said.err
