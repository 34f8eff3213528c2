"""docs/real_models.md says what the recipes say, and every command on it parses."""

from __future__ import annotations

import re
import shlex
from importlib import import_module

import pytest
import tyro

from launch.cli.main import COMMANDS as MOE_STEER
from launch.jobs.evaluation import EvaluateOptions
from launch.jobs.experts_options import Options
from launch.jobs.safety_options import SafetyOptions
from launch.recipes import FOLDER, HOSTS, load_recipe, names
from rank_processes import ROOT

PAGE = (ROOT / "docs" / "real_models.md").read_text(encoding="utf-8")
COMMANDS = [line.strip().partition(" #")[0].rstrip() for line in PAGE.splitlines() if line.startswith("    ")]
JOBS: dict[str, type] = {"launch/steer_r1.py": Options, "launch/safety.py": SafetyOptions}
RECIPES = [name for name in names() if load_recipe(name).script == "steer_r1"]
ROWS = dict(re.findall(r"^\| `([a-z0-9.-]+)` \| (.+) \|$", PAGE, re.MULTILINE))


def parse(command: str) -> object:
    """What the program makes of its options; SystemExit for those that it does not know."""
    words = shlex.split(command)
    if words[0] == "srun":
        return parse(words[words.index("-c") + 1].replace("$SLURM_NODEID", "1"))
    if words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        launcher = parse_args(words[1:])
        assert launcher.user_script in JOBS
        assert not launcher.hostfile or launcher.hostfile.startswith("/job") or (ROOT / launcher.hostfile).is_file()
        return tyro.cli(JOBS[launcher.user_script], args=launcher.user_args)
    if words[:2] == ["moe-steer", "evaluate"]:
        return tyro.cli(EvaluateOptions, args=words[2:])
    if words[0] == "moe-steer":
        module, _, name = MOE_STEER[words[1]].partition(":")
        return tyro.cli(getattr(import_module(module), name), args=words[2:], config=(tyro.conf.OmitArgPrefixes,))
    assert words[:3] == ["python", "-m", "launch.recipes"], command
    return [load_recipe(name) for name in words[3:]]


def test_every_command_parses() -> None:
    assert len(COMMANDS) > 15
    for command in COMMANDS:
        if command not in (FOLDER / HOSTS).read_text().splitlines():
            parse(command)


def test_every_command_of_the_page_on_engines_parses() -> None:
    """What stands behind ``--`` is for the engine."""
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    shown = re.findall(r"^    (moe-steer .*?)(?: -- .*| +#.*| \\\\)?$", page, re.MULTILINE)
    assert len(shown) >= 3
    for command in shown:
        parse(command)


def test_a_command_that_does_not_parse_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("deepspeed launch/steer_r1.py --modle lab")
    with pytest.raises(AssertionError):
        parse("deepspeed launch/steer_r2.py --model lab")
    capsys.readouterr()


def test_the_page_has_every_recipe_with_its_command_and_memory() -> None:
    assert sorted(ROWS) == RECIPES
    for name in RECIPES:
        recipe = load_recipe(name)
        machine, backend, batch, held, _ = ROWS[name].split(" | ")
        assert machine == f"{recipe.nodes} x {recipe.gpus // recipe.nodes} {recipe.gpu} ({recipe.gpu_gib:g} GiB)"
        assert (backend, batch) == (recipe.backend, str(recipe.batch))
        assert float(held.split(" of ")[0]) == pytest.approx(recipe.expected_gib, abs=0.51)
        assert shlex.join(recipe.command) in COMMANDS
        assert recipe.context == 31744 + 1024


def test_the_starts_on_several_nodes_are_those_of_the_recipe() -> None:
    recipe = load_recipe("r1-fp8-16xh100")
    for node in (0, 1):
        assert shlex.join(recipe.node_command(node, "node-a")) in COMMANDS
    assert (FOLDER / HOSTS).read_text().splitlines() == [c for c in COMMANDS if " slots=" in c]
