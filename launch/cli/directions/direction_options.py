"""The options of ``moe-steer direction``; those that do not go together are found before anything is loaded."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from launch.core.option_checks import ReadBy, check_folder
from launch.core.options import HeldModel, TraceOptions
from launch.core.prompt_options import PromptOptions

NEED_SAE = ("sta", "sae", "atom")
_GOES_WITH = "--{option} goes with --method {readers}: add it, or leave the option out"
STA, ATOM = ReadBy(("sta",), _GOES_WITH), ReadBy(("atom",), _GOES_WITH)
ATOMS = ReadBy(NEED_SAE, "--sae is for --method {readers}, and none is asked for: leave it out, or add one")
DECISIONS = ReadBy(
    ("contrast of decisions",), "--{option} goes with --contrast decisions only; contrast is {options.contrast}"
)
AGAIN = ReadBy(("regenerate",), "--{option} is about re-generations: give their number with --regenerate")
LENGTHS = ReadBy(
    ("contrast of answers", "contrast of thoughts"),
    "--first-tokens and --match-lengths go with --contrast answers and thoughts only",
)
QUESTIONS = ReadBy(
    ("contrast of answers", "contrast of prompts"),
    "--chat is for questions, and --contrast {options.contrast} reads traces: leave it out",
)
ASKED = ReadBy(
    ("contrast of decisions", "contrast of thoughts"),
    "--project-content reads the prompts of traces, and --contrast {options.contrast} has none: leave it out",
)


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
    sae: Annotated[tuple[str, ...], ATOMS] = ()
    """Folders or files of SAEs of the residual stream, one for each layer."""
    keep: Annotated[float | None, STA] = None
    """STA: share of the atoms kept (default 0.35)."""
    trim: Annotated[float | None, STA] = None
    """STA: the same as the share dropped, as EasyEdit counts."""
    num_atoms: Annotated[int | None, STA] = None
    """STA: the same as a number."""
    parity: Annotated[bool, STA] = False
    """STA: the arithmetic of the authors' release to the letter."""
    by: Annotated[Literal["both", "amplitude", "frequency", "effect"], STA] = "both"
    """STA: what atoms are chosen by."""
    sides: Annotated[Literal["one", "two"], STA] = "two"
    """STA: one keeps only atoms of the positive side."""
    rate: Annotated[Literal["token", "sample"], STA] = "token"
    """STA: an atom's frequency is its share of the tokens, or of the samples."""
    max_density: Annotated[float, STA] = 1.0
    """STA: leave out atoms that fire at a larger share of the tokens."""
    atom: Annotated[int | None, ATOM] = None
    """atom: this atom; default the one with the largest effect."""
    weight: Literal["auto", "sample", "token"] = "auto"
    """What counts once: a sample, or a token (auto: a token for decisions, else a sample)."""
    switch_words: Annotated[tuple[str, ...], DECISIONS] = ("Wait", "Alternatively", "Hmm")
    """decisions: words at the start of a step that show that thinking goes on."""
    after: Annotated[str | None, DECISIONS] = None
    """decisions: only those made where the text so far ends in these words, such as 'wrong.'; default all."""
    regenerate: Annotated[int, DECISIONS] = 0
    """decisions: sample so many times anew from each place, and keep those at which the behaviour comes back (arXiv 2604.02113: 10)."""
    stable_share: Annotated[float, AGAIN] = 0.8
    """decisions: in at least this share of the re-generations."""
    temperature: Annotated[float, AGAIN] = 0.7
    """decisions: of the re-generations."""
    top_p: Annotated[float, AGAIN] = 0.95
    """decisions: of the re-generations."""
    project_content: Annotated[int, ASKED] = 0
    """decisions, thoughts: project out so many directions in which the mean states of the problems' prompts differ most (2604.02113: 4)."""
    chat: Annotated[bool, QUESTIONS] = False
    """answers, prompts: put the question into the tokenizer's chat template."""
    first_tokens: Annotated[int | None, LENGTHS] = None
    """answers, thoughts: only the first so many tokens count."""
    match_lengths: Annotated[bool, LENGTHS] = False
    """answers, thoughts: of both sides only as many tokens as the shorter one has."""
    tokens_per_batch: int | None = None
    """Padded tokens of one forward pass; by default 1,024 on a CPU, 8,192 on a GPU."""

    renamed: ClassVar = {"--method all_atoms": "sae", "--method single_atom": "atom"}

    def readers(self) -> Set[str]:
        asked = {"prompts": self.chat, "regenerate": self.regenerate}
        return {
            *super().readers(),
            f"contrast of {self.contrast}",
            *self.method,
            *(name for name, on in asked.items() if on),
        }

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
    if command.first_tokens is not None and command.first_tokens < 1:
        raise ValueError(f"--first-tokens is {command.first_tokens}: give a whole number >= 1")
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
    check_folder(command.out)


def _check_stability(command: DirectionOptions) -> None:
    """ValueError for re-generations and projections that cannot be."""
    if command.regenerate < 0 or command.project_content < 0:
        raise ValueError("--regenerate and --project-content are numbers: give 0 (none) or more")
    if not 0 < command.stable_share <= 1:
        raise ValueError(f"--stable-share is {command.stable_share:g}: give a share above 0, up to 1")
    if command.project_content and set(command.method) & set(NEED_SAE):
        raise ValueError(
            "--project-content goes with --method caa and pca: atoms are no linear function of the states; leave it out"
        )


def _check_atoms(command: DirectionOptions) -> None:
    """ValueError for options about atoms that contradict each other."""
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
        names = ("num_atoms", "sides", "rate", "max_density")
        unknown = [name for name in names if getattr(command, name) != getattr(DirectionOptions, name)]
        if unknown or command.by == "effect":
            option = f"--{unknown[0].replace('_', '-')}" if unknown else "--by effect"
            raise ValueError(f"--parity is the release's arithmetic, which has no {option}: leave one of them out")
        if command.counted_by() != "sample" or command.contrast == "decisions":
            raise ValueError(
                "--parity needs pairs and means over samples: use --contrast answers, prompts or thoughts, with --weight sample"
            )
