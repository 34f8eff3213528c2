"""Named recipes: which machine a published model needs, how it is started, what it will hold. Files in launch/configs/.

``python -m launch.recipes NAME`` prints the command and dry-runs it: everything but loading weights, on the meta device.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from launch.core.beforehand import Machine
from launch.dry_run import Fit, fit
from launch.jobs.experts_options import Options
from launch.jobs.safety_options import SafetyOptions
from moe_steer.errors import one_line
from moe_steer.json_files import check_types, decode, read_json

FOLDER = Path(__file__).parent / "configs"
HOSTS = "hosts-2x8"
SCRIPTS = ("steer_r1", "safety")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One published model on one kind of machine.

    ``shape``: the part of the model's config.json that decides sizes, so that a dry run needs no download. ``batch``: sequences of
    ``context`` tokens that a start finds to fit, and decodes together. ``expected_gib``: memory of the fullest GPU with them. ``options``: of the script in launch/.
    """

    name: str
    model: str
    gpu: str
    gpu_gib: float
    gpus: int
    nodes: int
    backend: str
    dtype: str
    context: int
    batch: int
    options: tuple[str, ...]
    expected_gib: float
    shape: Mapping[str, Any]
    script: str = "steer_r1"

    def __post_init__(self) -> None:
        if self.script not in SCRIPTS:
            raise ValueError(
                f"recipe {self.name!r} names the script {self.script!r}: choose one of {', '.join(SCRIPTS)}"
            )
        if self.gpus < 1 or self.nodes < 1 or self.gpus % self.nodes:
            raise ValueError(
                f"recipe {self.name!r} has {self.gpus} GPUs on {self.nodes} nodes: give a multiple of the nodes"
            )

    @property
    def job(self) -> list[str]:
        """Options of the script. The safety experiment limits every task's answers by options of its own."""
        chosen = ["--model", self.model, "--backend", self.backend, "--dtype", self.dtype]
        limit = ["--max-new-tokens", str(self.context - 1024)] if self.script == "steer_r1" else []
        return [*chosen, *limit, *self.options]

    @property
    def command(self) -> list[str]:
        """The start on one node, or on several that are reached by ssh."""
        launcher = ["deepspeed"]
        if self.nodes > 1:
            launcher += ["--hostfile", f"launch/configs/{HOSTS}"]
        else:  # one too: the launcher would start a rank for every GPU of the machine
            launcher += ["--num_gpus", str(self.gpus)]
        return [*launcher, f"launch/{self.script}.py", *self.job]

    def node_command(self, node_rank: int, address: str, port: int = 29500) -> list[str]:
        """The start of one node by hand or by Slurm (``node_rank`` is then $SLURM_NODEID), without ssh between nodes."""
        where = ["--no_ssh", "--node_rank", str(node_rank), "--master_addr", address, "--master_port", str(port)]
        return ["deepspeed", "--hostfile", f"launch/configs/{HOSTS}", *where, f"launch/{self.script}.py", *self.job]


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a dry run found: the recipe, and how its model lies on its machine."""

    recipe: Recipe
    fit: Fit

    @property
    def total_gib(self) -> float:
        """Memory of the fullest GPU."""
        return self.fit.total / 2**30

    def __str__(self) -> str:
        recipe = self.recipe
        return f"{recipe.name}: {recipe.gpus} x {recipe.gpu} ({recipe.expected_gib:g} GiB expected on the fullest), {self.fit}"


def names() -> list[str]:
    """All recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_recipe(name: str) -> Recipe:
    """A recipe by name; ValueError for an unknown one, or a file with missing or unknown keys."""
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"there is no recipe {name!r}: choose one of {', '.join(names())}")
    data = read_json(path, "restore it")
    expected = {field.name for field in dataclasses.fields(Recipe)} - {"name"}
    if set(data) | {"script"} != expected:
        odd = sorted((set(data) | {"script"}) ^ expected)
        raise ValueError(
            f"the recipe {path} has a missing or unknown key {odd[0]!r}: it holds {', '.join(sorted(expected))}"
        )
    kinds = get_type_hints(Recipe) | {"options": list[str], "shape": dict}
    check_types(data, str(path), kinds)
    return Recipe(name=name, **{**data, "options": tuple(data["options"])})


def dry_run(recipe: Recipe) -> DryRun:
    """What a start checks before it loads weights (``launch/steer_r1.py --dry-run``), on the recipe's machine and with its shape
    instead of a download: options, task, plan against the model's shape (a plan file of the user's own, where it is there),
    backend, memory; and the host file. ValueError where one is wrong."""
    from transformers import CONFIG_MAPPING

    from launch.jobs.experts_options import given_plan
    from reasoning_evals.tasks import is_file_name, task_names

    values = dict(recipe.shape)
    config = CONFIG_MAPPING[values.pop("model_type")](**values)
    options = _job_options(recipe, config.num_hidden_layers)
    main = options if isinstance(options, Options) else None
    if main and main.problems not in task_names() and not is_file_name(main.problems):
        raise ValueError(f"recipe {recipe.name!r} names the unknown task {main.problems!r}")
    if recipe.nodes > 1 and (slots := host_slots()) != [recipe.gpus // recipe.nodes] * recipe.nodes:
        raise ValueError(
            f"recipe {recipe.name!r} needs {recipe.gpus} GPUs on {recipe.nodes} nodes, {HOSTS} has {slots}"
        )
    machine = Machine.of_gpus(recipe.gpus, recipe.gpu_gib, recipe.gpu)
    own = main.plan if main and main.plan and Path(main.plan).is_file() else None
    try:
        plan = given_plan(main) if main and (main.preset or own) else None
        return DryRun(
            recipe=recipe, fit=fit(options, plan, config, machine, recipe.context - options.token_limit, recipe.batch)
        )
    except ValueError as error:
        of_folder = f", with the plan file {own!r} of this folder" if own else ""
        raise ValueError(f"recipe {recipe.name!r}{of_folder}: {error}") from error


def _job_options(recipe: Recipe, num_layers: int) -> Options | SafetyOptions:
    """The options of the recipe's script."""
    import tyro

    if recipe.script == "steer_r1":
        return tyro.cli(Options, args=recipe.job)
    options = tyro.cli(SafetyOptions, args=recipe.job)
    if options.layer >= num_layers:
        raise ValueError(
            f"recipe {recipe.name!r} steers layer {options.layer}: the model has layers 0-{num_layers - 1}"
        )
    return options


def host_slots() -> list[int]:
    """GPUs of each node in the host file of the recipes on several nodes."""
    path = FOLDER / HOSTS
    lines = [line.partition("#")[0].strip() for line in decode(path.read_bytes(), str(path)).split("\n")]
    found = [re.fullmatch(r"\S+\s+slots=([1-9]\d{0,3})", line) for line in lines if line]
    if not found or None in found:
        raise ValueError(f"{path} is no host file: give lines such as 'worker-1 slots=8'")
    return [int(one[1]) for one in found if one]


def main(arguments: list[str]) -> int:
    """Print and dry-run the named recipes; all of them without a name. A wrong one says so in its line and does not keep the
    others from theirs."""
    failed = False
    for name in arguments or names():
        try:
            recipe = load_recipe(name)
            print(shlex.join(recipe.command))
            print(dry_run(recipe), flush=True)
        except ValueError as error:
            sys.stdout.flush()  # so that the line comes under its command where both go to one terminal
            print(f"recipes: {one_line(error)}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
