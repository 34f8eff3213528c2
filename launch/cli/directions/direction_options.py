"""The options of ``moe-steer direction``; those that do not go together are found before anything is loaded."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import ClassVar, Literal

from launch.core.option_checks import check_folder, refuse_idle
from launch.core.options import HeldModel, TraceOptions
from launch.core.prompt_options import PromptOptions

NEED_SAE = ("sta", "sae", "atom")
_OF_STA = ("keep", "trim", "num_atoms", "parity", "by", "sides", "rate", "max_density")


@dataclass(frozen=True, kw_only=True)
class DirectionOptions(TraceOptions, PromptOptions, HeldModel):
    """Find directions in the residual stream that separate wanted from unwanted text."""

    out: str
    """Folder to write to: METHOD-LLAYER.safetensors for each method and layer, and atoms.md."""
    contrast: Literal["decisions", "answers", "thoughts", "prompts"]
    """decisions: stopping to think (positive) against going on; thoughts: concise (positive) against verbose ones, both
    from --traces; answers: matching (positive) against not matching; prompts: with --prompt (positive) against without,
    both from --pairs."""
    traces: tuple[str, ...] = ()
    """Trace files, generations*.jsonl files, or folders of runs; of a run's folder only right answers are used."""
    pairs: str | None = None
    """CSV or JSON lines: question, matching, not_matching; for prompts: question, answer."""
    prompt: str | None = None
    """The prompt that is turned into a direction."""
    layers: tuple[int, ...]
    """Decoder layers, counted from 0; all from one pass."""
    method: tuple[Literal["caa", "sta", "sae", "atom", "pca"], ...] = ("caa",)
    """caa (difference of means), pca, and with an SAE: sta (target atoms), sae (all atoms), atom (one)."""
    sae: tuple[str, ...] = ()
    """Folders or files of SAEs of the residual stream, one for each layer."""
    keep: float | None = None
    """STA: share of the atoms kept (default 0.35)."""
    trim: float | None = None
    """STA: the same as the share dropped, as EasyEdit counts."""
    num_atoms: int | None = None
    """STA: the same as a number."""
    parity: bool = False
    """STA: the arithmetic of the authors' release to the letter."""
    by: Literal["both", "amplitude", "frequency", "effect"] = "both"
    """STA: what atoms are chosen by."""
    sides: Literal["one", "two"] = "two"
    """STA: one keeps only atoms of the positive side."""
    rate: Literal["token", "sample"] = "token"
    """STA: an atom's frequency is its share of the tokens, or of the samples."""
    max_density: float = 1.0
    """STA: leave out atoms that fire at a larger share of the tokens."""
    atom: int | None = None
    """atom: this atom; default the one with the largest effect."""
    weight: Literal["auto", "sample", "token"] = "auto"
    """What counts once: a sample, or a token (auto: a token for decisions, else a sample)."""
    switch_words: tuple[str, ...] = ("Wait", "Alternatively", "Hmm")
    """decisions: words at the start of a step that show that thinking goes on."""
    after: str | None = None
    """decisions: only those made where the text so far ends in these words, such as 'wrong.'; default all."""
    regenerate: int = 0
    """decisions: sample so many times anew from each place, and keep those at which the behaviour comes back (arXiv 2604.02113: 10)."""
    stable_share: float = 0.8
    """decisions: in at least this share of the re-generations."""
    temperature: float = 0.7
    """decisions: of the re-generations."""
    top_p: float = 0.95
    """decisions: of the re-generations."""
    project_content: int = 0
    """decisions, thoughts: project out so many directions in which the mean states of the problems' prompts differ most (2604.02113: 4)."""
    chat: bool = False
    """answers, prompts: put the question into the tokenizer's chat template."""
    first_tokens: int | None = None
    """answers, thoughts: only the first so many tokens count."""
    match_lengths: bool = False
    """answers, thoughts: of both sides only as many tokens as the shorter one has."""
    tokens_per_batch: int | None = None
    """Padded tokens of one forward pass; by default 1,024 on a CPU, 8,192 on a GPU."""

    renamed: ClassVar = {"--method all_atoms": "sae", "--method single_atom": "atom"}

    def readers(self) -> Set[str]:
        return {*super().readers(), *(("prompts",) if self.chat else ())}

    def counted_by(self) -> str:
        """What counts once: sample or token."""
        if self.weight != "auto":
            return self.weight
        return "token" if self.contrast == "decisions" else "sample"


def check(command: DirectionOptions) -> None:
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
    if command.switch_words != DirectionOptions.switch_words and command.contrast != "decisions":
        raise ValueError(f"--switch-words goes with --contrast decisions only; contrast is {command.contrast}")
    if command.after is not None and command.contrast != "decisions":
        raise ValueError(f"--after goes with --contrast decisions only; contrast is {command.contrast}")
    if command.after is not None and not command.after.strip():
        raise ValueError("--after is empty: give words, or leave it out")
    if not all(word.strip() for word in command.switch_words) or not command.switch_words:
        raise ValueError(f"--switch-words are {list(command.switch_words)}: give at least one word, and no empty one")
    _check_stability(command)
    if not command.method or len(set(command.method)) != len(command.method):
        raise ValueError(f"--method is {list(command.method)}: give at least one, and each once")
    if command.tokens_per_batch is not None and command.tokens_per_batch < 1:
        raise ValueError(f"--tokens-per-batch is {command.tokens_per_batch}: give a whole number >= 1")
    _check_atoms(command)
    refuse_idle(command)
    check_folder(command.out)


def _check_stability(command: DirectionOptions) -> None:
    """ValueError for re-generations and projections that nothing would follow."""
    if command.regenerate < 0 or command.project_content < 0:
        raise ValueError("--regenerate and --project-content are numbers: give 0 (none) or more")
    if command.regenerate and command.contrast != "decisions":
        raise ValueError(f"--regenerate goes with --contrast decisions only; contrast is {command.contrast}")
    given = [
        name
        for name in ("stable_share", "temperature", "top_p")
        if getattr(command, name) != getattr(DirectionOptions, name)
    ]
    if given and not command.regenerate:
        raise ValueError(f"--{given[0].replace('_', '-')} is about re-generations: give their number with --regenerate")
    if not 0 < command.stable_share <= 1:
        raise ValueError(f"--stable-share is {command.stable_share:g}: give a share above 0, up to 1")
    if command.project_content and command.contrast not in ("decisions", "thoughts"):
        raise ValueError(
            f"--project-content reads the prompts of traces, and --contrast {command.contrast} has none: leave it out"
        )
    if command.project_content and set(command.method) & set(NEED_SAE):
        raise ValueError(
            "--project-content goes with --method caa and pca: atoms are no linear function of the states; leave it out"
        )


def _check_atoms(command: DirectionOptions) -> None:
    """ValueError for options about atoms that no method of the call would follow, or that contradict each other."""
    given = [name for name in _OF_STA if getattr(command, name) != getattr(DirectionOptions, name)]
    if given and "sta" not in command.method:
        raise ValueError(f"--{given[0].replace('_', '-')} goes with --method sta: add it, or leave the option out")
    if command.atom is not None and "atom" not in command.method:
        raise ValueError("--atom goes with --method atom: add it, or leave the option out")
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
