"""Options of ``moe-steer direction`` that do not go together, found before anything is loaded."""

from __future__ import annotations

from launch.cli.direction import NEED_SAE, MakeDirection
from launch.cli.notes import check_folder

_OF_STA = ("keep", "trim", "num_atoms", "parity", "by", "sides", "rate", "max_density")


def check(command: MakeDirection) -> None:
    """ValueError for options that do not go together, before anything is loaded."""
    needs = {"decisions": "traces", "thoughts": "traces", "answers": "pairs", "prompts": "pairs"}
    reads = needs[command.contrast]
    if not getattr(command, reads):
        raise ValueError(f"--contrast {command.contrast} reads --{reads}: give it")
    other = "pairs" if reads == "traces" else "traces"
    if getattr(command, other):
        raise ValueError(f"--contrast {command.contrast} reads --{reads} and not --{other}: leave --{other} out")
    if command.arm is not None and reads == "pairs":
        raise ValueError(f"--arm is of runs, and --contrast {command.contrast} reads pairs: leave it out")
    if (command.contrast == "prompts") != (command.prompt is not None):
        raise ValueError(f"--prompt goes with --contrast prompts and only with it; contrast is {command.contrast}")
    if not command.layers or len(set(command.layers)) != len(command.layers):
        raise ValueError(f"--layers is {list(command.layers)}: give distinct layers, counted from 0")
    if (set(command.method) & set(NEED_SAE)) and not command.sae:
        raise ValueError(f"--method {' '.join(command.method)} needs --sae with an SAE for each of the layers")
    if command.sae and not set(command.method) & set(NEED_SAE):
        raise ValueError(
            f"--sae is for --method {', '.join(NEED_SAE)}, and none is asked for: leave it out, or add one"
        )
    if (command.first_tokens is not None or command.match_lengths) and command.contrast not in ("answers", "thoughts"):
        raise ValueError("--first-tokens and --match-lengths go with --contrast answers and thoughts only")
    if command.first_tokens is not None and command.first_tokens < 1:
        raise ValueError(f"--first-tokens is {command.first_tokens}: give a whole number >= 1")
    if command.chat and reads == "traces":
        raise ValueError(f"--chat is for questions, and --contrast {command.contrast} reads traces: leave it out")
    if command.switch_words != MakeDirection.switch_words and command.contrast != "decisions":
        raise ValueError(f"--switch-words goes with --contrast decisions only; contrast is {command.contrast}")
    if not all(word.strip() for word in command.switch_words) or not command.switch_words:
        raise ValueError(f"--switch-words are {list(command.switch_words)}: give at least one word, and no empty one")
    if not command.method or len(set(command.method)) != len(command.method):
        raise ValueError(f"--method is {list(command.method)}: give at least one, and each once")
    if command.tokens_per_batch is not None and command.tokens_per_batch < 1:
        raise ValueError(f"--tokens-per-batch is {command.tokens_per_batch}: give a whole number >= 1")
    _check_atoms(command)
    check_folder(command.out)


def _check_atoms(command: MakeDirection) -> None:
    """ValueError for options about atoms that no method of the call would follow, or that contradict each other."""
    given = [name for name in _OF_STA if getattr(command, name) != getattr(MakeDirection, name)]
    if given and "sta" not in command.method:
        raise ValueError(f"--{given[0].replace('_', '-')} goes with --method sta: add it, or leave the option out")
    if command.atom is not None and "single_atom" not in command.method:
        raise ValueError("--atom goes with --method single_atom: add it, or leave the option out")
    amounts = [name for name in ("keep", "trim", "num_atoms") if getattr(command, name) is not None]
    if len(amounts) > 1:
        raise ValueError("--keep, --trim and --num-atoms all say how many atoms: give one of them")
    for name in ("keep", "trim"):
        if (share := getattr(command, name)) is not None and not 0 <= share <= 1:
            raise ValueError(f"--{name} is {share:g}: give a share from 0 to 1 (keep: kept, trim: dropped)")
    if command.num_atoms is not None and command.num_atoms < 1:
        raise ValueError(f"--num-atoms is {command.num_atoms}: give a whole number >= 1")
    if not 0 < command.max_density <= 1:
        raise ValueError(f"--max-density is {command.max_density:g}: give a share of the tokens above 0, up to 1")
    if command.parity:
        unknown = [name for name in ("num_atoms", "sides", "rate", "max_density") if name in given]
        if unknown or command.by == "effect":
            option = f"--{unknown[0].replace('_', '-')}" if unknown else "--by effect"
            raise ValueError(f"--parity is the release's arithmetic, which has no {option}: leave one of them out")
        if command.counted_by() != "sample" or command.contrast == "decisions":
            raise ValueError(
                "--parity needs pairs and means over samples: use --contrast answers, prompts or thoughts, with --weight sample"
            )
