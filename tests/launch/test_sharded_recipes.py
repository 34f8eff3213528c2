"""Every recipe parses, names a plan that fits its model, and fits its machine with the memory that it and docs/real_models.md state."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import transformers

from dry_runs import dry_run_of
from launch import recipes
from launch.recipes import FOLDER, HOSTS, dry_run, load_recipe, main, names
from moe_steer import ExpertGain, SteeringPlan
from moe_steer.backends.memory import gib
from test_real_models_page import COMMANDS, PAGE, RECIPES, ROWS

SHIPPED = FOLDER
SAFETY = [name for name in names() if load_recipe(name).script == "safety"]
of_the_page = pytest.mark.skipif(
    not transformers.__version__.startswith("5.24."), reason="the page's memory is that of transformers 5.24"
)
QUICK = ("qwen3-30b-2xa100-40", "r1-distill-qwen-1.5b", "safety-llama-3.1-8b")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the README's steps may have left a plan.json, which a dry run would look at."""
    monkeypatch.chdir(tmp_path)


def test_the_recipes_are_these() -> None:
    assert set(QUICK) <= set(names())
    assert any("16xh100" in name for name in names())
    assert len([name for name in names() if "distill" in name]) == 4
    assert {"safety-gemma-2-9b", "safety-gemma-2-9b-it", "safety-llama-3.1-8b"} <= set(names())


@pytest.mark.parametrize("name", names())
def test_a_recipe_parses_and_states_its_command(name: str) -> None:
    recipe = load_recipe(name)
    command = recipe.command
    assert command[0] == "deepspeed"
    assert f"launch/{recipe.script}.py" in command
    assert ("--hostfile" in command) == (recipe.nodes > 1)
    by_hand = recipe.node_command(1, "10.0.0.1")
    assert by_hand[by_hand.index("--node_rank") + 1] == "1"
    assert "--no_ssh" in by_hand


@of_the_page
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names()]
)
def test_a_dry_run_finds_the_memory_that_the_recipe_states(name: str) -> None:
    recipe = load_recipe(name)
    found = dry_run_of(name)
    assert found.total_gib == pytest.approx(recipe.expected_gib, rel=0.05)
    assert found.fit.layers_with_experts == {"r1-f": 58, "r1-b": 58, "r1-d": 0, "safe": 0}.get(
        name[:4], 94 if "235b" in name else 48
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SAFETY)
def test_the_page_has_the_safety_recipes(name: str) -> None:
    recipe, found = load_recipe(name), dry_run_of(name).fit
    assert shlex.join(recipe.command) in COMMANDS
    held, loading = re.findall(rf"^\| {re.escape(name)} \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)[0]
    assert float(held) == pytest.approx(recipe.expected_gib, abs=0.06)
    assert f"{held} of 73.6 GiB a rank, {loading} GiB of CPU memory while loading" in str(found)


@of_the_page
@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_page_has_the_memory_that_is_computed(name: str) -> None:
    fit = dry_run_of(name).fit
    assert ROWS[name].endswith(f"| {gib(fit.total)} of {gib(fit.limit)} | {gib(fit.loading)}")


def test_the_host_file_has_the_nodes_of_the_two_node_recipes() -> None:
    hosts = [line.split() for line in (FOLDER / HOSTS).read_text().splitlines()]
    slots = [int(line[1].removeprefix("slots=")) for line in hosts]
    for name in names():
        recipe = load_recipe(name)
        if recipe.nodes > 1:
            assert (len(slots), sum(slots)) == (recipe.nodes, recipe.gpus)


@pytest.mark.slow
def test_a_recipe_that_cannot_run_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan.json of another model lies where the distill recipes look for theirs."""
    monkeypatch.chdir(tmp_path)
    SteeringPlan(experts=[ExpertGain(2, 3, 4.0)]).save("plan.json")
    assert main(["r1-distill-qwen-1.5b", "r9", "qwen3-30b-1xh100"]) == 1
    said = capsys.readouterr()
    assert "\nqwen3-30b-1xh100: 1 x H100 (" in said.out
    plan, unknown = said.err.splitlines()
    assert plan.startswith(
        "recipes: recipe 'r1-distill-qwen-1.5b', with the plan file 'plan.json' of this folder: "
        "the plan names experts, but qwen2 is a dense model"
    )
    assert unknown.startswith("recipes: there is no recipe 'r9'")


def test_wrong_recipes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="there is no recipe 'r9': choose one of qwen3-"):
        load_recipe("r9")
    data = json.loads((FOLDER / "r1-distill-qwen-1.5b.json").read_text())
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    (tmp_path / "odd.json").write_text(json.dumps({**data, "gpuss": 1}))
    with pytest.raises(ValueError, match="missing or unknown key 'gpuss'"):
        load_recipe("odd")
    (tmp_path / "small.json").write_text(json.dumps({**data, "gpu_gib": 4}))
    assert main(["small"]) == 1
    error = capsys.readouterr().err
    assert "recipe 'small': backend 'plain' does not fit on 1 x " in error
    assert "; use " in error
    (tmp_path / "wrong.json").write_text(json.dumps({**data, "backend": "autoep"}))
    with pytest.raises(
        ValueError,
        match="recipe 'wrong': backend 'autoep' cannot run this model: DeepSpeed's AutoEP has no preset for qwen2",
    ):
        dry_run(load_recipe("wrong"))
    (tmp_path / "plan.json").write_text(json.dumps({**data, "options": ["--preset", "rice-r1-math"]}))
    with pytest.raises(ValueError, match="recipe 'plan': the plan was made for model_type 'deepseek_v3'"):
        dry_run(load_recipe("plan"))
    (tmp_path / "task.json").write_text(json.dumps({**data, "options": ["--problems", "aime24"]}))
    with pytest.raises(ValueError, match="recipe 'task' names the unknown task 'aime24'"):
        dry_run(load_recipe("task"))
    (tmp_path / "script.json").write_text(json.dumps({**data, "script": "train"}))
    with pytest.raises(ValueError, match="recipe 'script' names the script 'train': choose one of steer_r1, safety"):
        load_recipe("script")
    safety = json.loads((SHIPPED / "safety-llama-3.1-8b.json").read_text())
    too_deep = ["--layer", "32", *safety["options"][2:]]
    (tmp_path / "deep.json").write_text(json.dumps({**safety, "options": too_deep}))
    with pytest.raises(ValueError, match="recipe 'deep' steers layer 32: the model has layers 0-31"):
        dry_run(load_recipe("deep"))
    (tmp_path / HOSTS).write_text("node-a slots=4\nnode-b slots=8\n")
    (tmp_path / "nodes.json").write_text(json.dumps({**data, "nodes": 2, "gpus": 16}))
    with pytest.raises(ValueError, match=r"needs 16 GPUs on 2 nodes, hosts-2x8 has \[4, 8\]"):
        dry_run(load_recipe("nodes"))
