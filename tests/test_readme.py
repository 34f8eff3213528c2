"""What the README promises: its Python runs, its commands and files exist."""

import re
from pathlib import Path

import pytest

from launch.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(code, "README.md", "exec"), {})
    assert "selected by" in capsys.readouterr().out


def test_the_commands_exist() -> None:
    named = set(re.findall(r"^    moe-steer ([\w-]+)", README, re.M))
    assert named <= set(COMMANDS)
    assert {"collect", "score", "plan", "generate", "compare", "report", "direction", "train-sae"} <= named


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
