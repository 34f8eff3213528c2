"""Options that jobs share, in groups; their stored form."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar, get_type_hints

from launch.core.option_checks import DRAWING, HERE, TASK, check_counts, check_machine, check_num_problems
from launch.core.prompt_options import Drawing, PromptOptions, TaskDrawing, Usual, answer_limit, text_or_file
from launch.core.served.server_options import EngineOptions
from moe_steer.json_files import check_types
from moe_steer.lab import EMBEDDED, OWN_PROBLEMS, is_made_up

OptionsT = TypeVar("OptionsT")

BASELINE = "baseline"
"""The arm without any change, in every job."""
PARTS = ("identification", "tuning", "test")
MIN_SUPPORT = 5
"""Times that an expert must have been selected at a marker to be taken into a plan by 'moe-steer plan'."""
ELSEWHERE = frozenset(
    {"out", "name", "local_rank", "strict", "backend", "offload", "max_memory", "dry_run", "gpus", "gpu_gib"}
    | {field.name for field in dataclasses.fields(EngineOptions)}
)
"""Options that decide where a run is written and who writes it, not what it finds."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What memory was planned for: ``rows`` decoded together, of up to ``context`` tokens each. ``stretches``: it holds more
    rows where they are shorter."""

    rows: int
    context: int
    stretches: bool = False


@dataclass(frozen=True, kw_only=True)
class HeldModel:
    """Which model, and how it is held."""

    model: str = "lab"
    """Model folder, GGUF file, hub id, or 'lab', 'lab-dense' or 'lab-search' for an embedded model."""
    backend: Annotated[str, HERE] = "auto"
    """How the model is held; see moe_steer.load_model. A run may continue under another backend and on other ranks."""
    offload: Annotated[str, HERE] = ""
    """For --backend zero3 and device_map: where weights rest that the GPUs do not hold, 'cpu' or a folder on a local NVMe disk."""
    max_memory: Annotated[str, HERE] = ""
    """For --backend device_map: what weights may fill on each device, as 0=20GiB,1=10GiB,cpu=30GiB; default what is left."""
    dtype: Annotated[str, HERE] = "auto"
    """Precision: auto (as stored), float32, bfloat16 or float16."""
    revision: str | None = None
    """Revision of a hub model."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    def readers(self) -> Set[str]:
        """The parts of this run that options may be for."""
        return {self.held_by or "model"}

    @property
    def held_by(self) -> str:
        """The option that says that a server holds the model; "" where none does."""
        return ""

    @property
    def is_lab(self) -> bool:
        """Whether an embedded model is asked for."""
        return self.model in EMBEDDED

    @property
    def model_name(self) -> str:
        """The last part of the model's path or hub id."""
        return self.model.rstrip("/").split("/")[-1]


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """The traces that a command reads, where they can be answers of a run."""

    traces: tuple[str, ...]
    """Trace files, generations*.jsonl files, or folders of runs."""
    arm: str | None = None
    """Of runs of several arms, the one whose answers are read."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(PromptOptions, HeldModel):
    """The same in a program that ``deepspeed`` may start, with what decides its prompts."""

    local_rank: int = 0
    """Given by the launcher."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(Drawing, ModelOptions):
    """Where a run is written, and how its answers are sampled."""

    out: str | None = None
    """Folder of the run; default runs/NAME."""
    name: str | None = None
    """Name of the run; default the model's name, with what the job adds."""
    seed: int = 0
    """Decides problems, samples and whatever else is drawn."""
    greedy: bool = False
    """One greedy answer a problem instead of samples."""
    samples: int | None = None
    """Samples a problem and arm; default the task's own number, 4 where it has none."""
    temperature: Annotated[float | None, DRAWING] = None
    """Divides the logits; default the task's own, 0.6 where it has none."""
    top_p: Annotated[float | None, DRAWING] = None
    """Smallest set of tokens with at least this probability; default the task's own, 0.95 where it has none."""
    batch_size: int | None = None
    """Samples decoded together; default as many as fit, 64 at most (256 for an embedded model), 32 on a server. Part of the run's identity: it
    decides the last bits, and a run that goes on elsewhere keeps it."""
    strict: bool = False
    """Fail when an arm changed nothing at all."""
    dry_run: bool = False
    """Everything but loading weights: check options, problems and memory, say what would be done, and end."""
    gpus: int | None = None
    """With --dry-run: so many GPUs instead of those of this start."""
    gpu_gib: float | None = None
    """With --dry-run: memory of one of them in GiB, as its maker states it."""

    suffix: ClassVar[str] = ""
    """What the job adds to the name of its folder."""
    limited_by: ClassVar[tuple[str, ...]] = ("max_new_tokens",)
    """The options that limit answers."""
    lab_rows: ClassVar[int] = 256
    """Samples of an embedded model that are decoded together."""

    def __post_init__(self) -> None:
        from reasoning_evals.engines import SamplingConfig

        check_counts(self, ("samples", "batch_size"))
        SamplingConfig(temperature=self.heat, top_p=self.nucleus)  # refuses what no token can be drawn by
        self.check_samples()
        check_machine(self)

    def readers(self) -> Set[str]:
        return {*super().readers(), "prompts", *(() if self.takes_most_likely else ("drawing",))}

    @property
    def usual(self) -> Usual:
        """How answers are sampled where the user says nothing."""
        return Usual(new_tokens=answer_limit(self.model))

    @property
    def task(self) -> str:
        """The name of the task in the samples' keys and seeds."""
        return ""

    @property
    def run_name(self) -> str:
        """The folder's name under runs/."""
        return self.name or self.model_name + self.suffix + ("-greedy" if self.greedy else "")

    @property
    def folder(self) -> str:
        """Where the run is written."""
        return self.out or f"runs/{self.run_name}"

    @property
    def token_limit(self) -> int:
        """Longest answer in tokens."""
        return answer_limit(self.model)

    @property
    def rows(self) -> int:
        """Samples decoded together."""
        return self.batch_size or (self.lab_rows if self.is_lab else 64)

    @property
    def sampling_in_words(self) -> str:
        """The decoding rule, for a page."""
        rule = "greedy" if self.takes_most_likely else f"temperature {self.heat:g}, top-p {self.nucleus:g}"
        return f"{rule}, at most {self.token_limit} new tokens, seed {self.seed}"

    def config(self) -> dict[str, Any]:
        """What decides the results, as plain JSON values."""
        return config_of(self) | self.drawing


@dataclass(frozen=True, kw_only=True)
class ProblemOptions(TaskDrawing, RunOptions):
    """One set of problems."""

    problems: str = OWN_PROBLEMS
    """A JSONL file of problems, or the name of a task; own: those that the embedded model was trained on, the lab's for any other model."""
    data_dir: Annotated[str | None, TASK] = None
    """Folder or file with the task's data, instead of the hub."""
    wording: Annotated[str | None, TASK] = None
    """How each question is put, with {problem} in it, in place of the task's own wording, which the start prints; or a file with it."""
    max_new_tokens: int | None = None
    """Longest answer in tokens, thought included; default 256 for lab, 384 for lab-dense, 440 for lab-search, else the task's own or 32768, or what
    the model's context has room for."""

    def __post_init__(self) -> None:
        RunOptions.__post_init__(self)
        TaskDrawing.__post_init__(self)
        check_counts(self, ("max_new_tokens",))

    def readers(self) -> Set[str]:
        return {*super().readers(), *(() if is_made_up(self.problems) else ("task",))}

    def config(self) -> dict[str, Any]:
        words = {} if self.wording is None else {"wording": text_or_file(self.wording, "--wording")}
        return super().config() | words


@dataclass(frozen=True, kw_only=True)
class SplitOptions(ProblemOptions):
    """Problems in three sets that never overlap: to find something on, to tune it on, to test it on."""

    quick: bool = False
    """Every step on few problems, in about a minute on an embedded model."""
    num_identification: int | None = None
    num_tuning: int | None = None
    num_test: int | None = None
    """Problems of each set; every job says what for."""

    lab_sizes: ClassVar[Mapping[str, int]]
    """Problems of each set on the lab."""
    quick_sizes: ClassVar[Mapping[str, int]]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, [f"num_{part}" for part in PARTS])
        check_num_problems(self.num_test, "num_test")

    @property
    def run_name(self) -> str:
        words = [word for word, on in (("quick", self.quick), ("greedy", self.greedy)) if on]
        return self.name or "-".join([self.model_name + self.suffix, *words])

    @property
    def usual_samples(self) -> int:
        return 2 if self.quick else super().usual_samples

    @property
    def test_only(self) -> bool:
        """Whether nothing is searched or tuned, so that all problems are for the test."""
        return False

    def size(self, part: str) -> int | None:
        """Problems wanted of a set; None for as many as there are."""
        asked = dict(zip(PARTS, (self.num_identification, self.num_tuning, self.num_test), strict=True))[part]
        if asked is not None:
            return asked
        if self.quick:
            return self.quick_sizes[part]
        return self.lab_sizes[part] if is_made_up(self.problems) else None


def config_of(options: Any, left_out: Collection[str] = ELSEWHERE) -> dict[str, Any]:
    """The options that decide the results, as plain JSON values."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if key not in left_out
    }


def options_from(config: Mapping[str, Any], kind: type[OptionsT], not_options: Collection[str] = ()) -> OptionsT:
    """The options in a stored config. ``not_options``: keys of the config that are something else. ValueError for keys of
    another version."""
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(config) - known - set(not_options))
    if unknown:
        raise ValueError(
            f"the run has the setting {unknown[0]!r}, which this version does not know: use the one it had"
        )
    values = {key: value for key, value in config.items() if key not in not_options}
    check_types(values, "the run's settings", get_type_hints(kind))
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
