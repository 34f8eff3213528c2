"""The ``moe-steer`` command line: parses, calls one command, turns errors into one line and an exit code."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tyro

from launch.core.option_checks import check_finite, check_out, refuse_idle, refuse_misread
from moe_steer.errors import begin_program, exit_code, readers_may_leave, safe_console_for

COMMANDS = {
    "demo": "launch.guide:Demo",
    "doctor": "launch.guide:Doctor",
    "playground": "launch.playground.playground:Playground",
    "collect": "launch.cli.counting:Collect",
    "score": "launch.cli.counting:Score",
    "plan": "launch.cli.plan:MakePlan",
    "causes": "launch.cli.causes:FindCauses",
    "early-exit": "launch.cli.early_exit:EarlyExit",
    "unloop": "launch.cli.unloop:Unloop",
    "falsify": "launch.cli.causes:Falsify",
    "measure": "launch.cli.rivals:Measure",
    "rivals": "launch.cli.rivals:Rivals",
    "direction": "launch.cli.directions.direction:MakeDirection",
    "convert-direction": "launch.cli.directions.convert_direction:ConvertDirection",
    "probe": "launch.cli.directions.probe:TrainProbe",
    "generate": "launch.cli.generate:Generate",
    "serve": "launch.serve:Serve",
    "compare": "launch.cli.comparing:Compare",
    "thinking": "launch.cli.reading:Thinking",
    "report": "launch.cli.reading:Report",
    "inspect": "launch.cli.reading:Inspect",
    "export": "launch.cli.reading:Export",
    "train-sae": "launch.cli.saes:TrainSAE",
    "sae-fit": "launch.cli.saes:FitSAE",
    "power": "launch.cli.comparing:Power",
    "memory": "launch.guide:Memory",
    "bake": "launch.cli.bake:Bake",
    "verify": "launch.cli.bake:Verify",
    "unbake": "launch.cli.bake:Unbake",
}
JOBS = {
    "collect-stats": (
        "launch.collect_stats",
        "Traces to routing counts, scores and their pictures in one go; under deepspeed on several ranks.",
    ),
    "evaluate": (
        "launch.evaluate",
        "Compare plans, presets, prompts and decoding rules on one model and one task, arm by arm.",
    ),
}
"""Scripts of launch/ that also go by a name here: module, and what they do."""
_GROUPS = {
    "Start here": "demo doctor playground",
    "Find experts": "collect collect-stats score causes measure rivals falsify unloop",
    "Find directions, train probes and SAEs": "direction convert-direction probe early-exit train-sae sae-fit",
    "Make a plan, answer under it, serve it": "plan generate serve",
    "Compare, and read what came out": "evaluate compare power thinking report inspect export",
    "Fit a model into memory, write a plan into it": "memory bake verify unbake",
}
"""What a newcomer looks for -> the commands for it, in the order in which they are used."""
_ONE_FILE = ("causes", "collect", "compare", "early-exit", "falsify", "measure", "power", "score", "thinking")
"""Commands whose --out is a file; plan says so itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 when it is done, 1 when the work failed, 2 for wrong usage (option errors exit with 2)."""
    begin_program()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        with readers_may_leave():
            print(_overview())
        return 0 if arguments else 2
    if arguments[0] in JOBS:
        return int(import_module(JOBS[arguments[0]][0]).main(arguments[1:], program=f"moe-steer {arguments[0]}"))
    if arguments[0] not in COMMANDS:
        names = [name for group in _GROUPS.values() for name in group.split()]
        near = get_close_matches(arguments[0], names, 1, 0.75)
        meant = (
            f"did you mean {near[0]}? All commands: moe-steer --help" if near else f"choose one of {', '.join(names)}"
        )
        print(f"moe-steer: there is no command {arguments[0]!r}: {meant}", file=sys.stderr)
        return 2
    module, _, attribute = COMMANDS[arguments[0]].partition(":")
    chosen: Any = getattr(import_module(module), attribute)
    rest: list[list[str]] = []
    if getattr(chosen, "passes_on", False):  # what follows after -- is another program's
        cut = arguments.index("--") if "--" in arguments else len(arguments)
        arguments, rest = arguments[:cut], [arguments[cut + 1 :]]
    with readers_may_leave(), safe_console_for(arguments):
        refuse_misread(f"moe-steer {arguments[0]}", chosen, arguments[1:])
        command = tyro.cli(
            chosen, args=arguments[1:], prog=f"moe-steer {arguments[0]}", config=(tyro.conf.OmitArgPrefixes,)
        )

    def work() -> int:
        check_finite(command)
        if isinstance(out := getattr(command, "out", None), str):
            check_out(out, one_file=arguments[0] in _ONE_FILE)
        if hasattr(command, "readers"):
            refuse_idle(command)
        return int(command.run(*rest))

    return exit_code("moe-steer", work, "started again")


def program() -> None:
    """``main`` as a process of its own: where ranks have met, it ends as the jobs of launch/ do."""
    code = main()
    if "WORLD_SIZE" in os.environ:  # else no group was made, and the libraries that make one need not be read
        from launch.core.ranks import leave

        leave(code)
    sys.exit(code)


def _overview() -> str:
    width = max(map(len, (*COMMANDS, *JOBS)))
    does = {name: _first_paragraph(name) for name in COMMANDS}
    does |= {name: line for name, (_, line) in JOBS.items()}
    lines = []
    for title, names in _GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:{width}}  {does[name]}" for name in names.split())]
    return "\n".join(
        [
            "usage: moe-steer COMMAND [OPTIONS]        moe-steer COMMAND --help shows the options of one command",
            "",
            "Find the experts of a mixture-of-experts model that think, turn them up, and see whether it helped.",
            *lines,
            "",
            "The whole jobs are scripts of a checkout, for a CPU or many GPUs: deepspeed launch/steer_r1.py (experts), launch/reduce_overthinking.py",
            "(shorter thoughts), launch/safety.py (refusals); --help shows the options of each.",
        ]
    )


def _first_paragraph(name: str) -> str:
    """The first paragraph of what a command says of itself, read from its file: importing all commands takes seconds."""
    module, _, attribute = COMMANDS[name].partition(":")
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    (command,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == attribute)
    return " ".join((ast.get_docstring(command) or "").partition("\n\n")[0].split())


if __name__ == "__main__":
    program()
