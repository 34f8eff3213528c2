"""The command line of the main job."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from launch.shared_options import (
    ELSEWHERE,
    DataDir,
    Dtype,
    Greedy,
    LocalRank,
    MaxNewTokens,
    Offload,
    Out,
    Revision,
    Temperature,
    TopP,
    TrustRemoteCode,
    check_counts,
    check_num_problems,
    config_of,
    refuse_greedy_samples,
    refuse_idle_data_dir,
    refuse_idle_drawing,
)
from moe_steer.lab import EMBEDDED
from moe_steer.tokens import parse_scope
from reasoning_evals.engines import SamplingConfig

LAB_SIZES = {"identification": 240, "tuning": 120, "test": 240}
QUICK_SIZES = {"identification": 72, "tuning": 24, "test": 48}


_ANSWER_LIMITS = {"lab": 256, "lab-dense": 384}


def answer_limit(model: str) -> int:
    """The default longest answer in tokens, thought included: what the embedded models need, plenty for any other."""
    return _ANSWER_LIMITS.get(model, 32768)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Find the experts that think, turn them up, and see whether it helped."""

    model: str = "lab"
    """Model folder, hub id, or 'lab' or 'lab-dense' for an embedded model (lab-dense: with --plan)."""
    problems: str = "lab"
    """A JSONL file of problems, or the name of a task."""
    data_dir: DataDir = None
    plan: str | None = None
    """Use this plan file instead of finding experts."""
    preset: str | None = None
    """Use published experts, for example rice-r1-math, instead of finding experts."""
    out: Out = None
    name: str | None = None
    """Name of the run; default the model's name, with -quick and -greedy where asked."""
    seed: int = 0
    """Decides problems, samples and the placebo."""
    quick: bool = False
    """Every step on few problems, in under a minute on the lab model."""
    greedy: Greedy = False
    samples: int | None = None
    """Samples a test problem and arm; default 4, with --quick 2."""
    num_identification: int | None = None
    """Problems that experts are found on."""
    num_tuning: int | None = None
    """Problems that the gain is chosen on."""
    num_test: int | None = None
    """Problems of the comparison; default all of a file or task, 240 of the lab."""
    top: int = 2
    """How many experts to turn up."""
    gains: tuple[float, ...] = (2.0, 4.0, 16.0, 64.0)
    """Gains tried on the tuning problems; one value is used as it is. A preset takes 64, or the one value given here."""
    scope: str = "all"
    """Tokens at which the plan acts (plans and presets keep their own): all, prompt, thought, answer, generated, step_end,
    step_end:CLASS (sentence, line, paragraph) or after:N."""
    renormalize: bool = False
    """Rescale a token's weights to their former sum after the gain."""
    markers: tuple[str, ...] = ("<think>", "</think>", "Alternatively", "Wait")
    """Tags and words whose routing is counted."""
    coefficients: tuple[str, ...] = ()
    """What each marker counts for, as NAME=NUMBER; default <think>=1 </think>=-1 Alternatively=-1, others 0."""
    min_support: int | None = None
    """Least number of joint selections at <think>; default a tenth of the traces."""
    temperature: Temperature = 0.6
    top_p: TopP = 0.95
    max_new_tokens: MaxNewTokens = None
    batch_size: int | None = None
    """Samples decoded together; default 256 for lab and lab-dense, 64 else. Part of the run's identity: it decides the last bits."""
    backend: str = "auto"
    """How the model is held; see moe_steer.load_model. A run may go on under another backend and on other ranks."""
    offload: Offload = ""
    dtype: Dtype = "auto"
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    strict: bool = False
    """Fail when a plan changed nothing in a whole arm."""
    dry_run: bool = False
    """Everything but loading weights: check options, plan, problems and memory, say what would be done, and end."""
    gpus: int | None = None
    """With --dry-run: so many GPUs instead of those of this start."""
    gpu_gib: float | None = None
    """With --dry-run: memory of one of them in GiB, as its maker states it."""
    local_rank: LocalRank = 0

    def __post_init__(self) -> None:
        parse_scope(self.scope)
        if self.plan and self.preset:
            raise ValueError("give --plan or --preset, not both")
        if not self.gains:
            raise ValueError("gains is empty: give at least one number")
        if any(not gain >= 0 or gain == 1 for gain in self.gains):
            raise ValueError(f"gains are {list(self.gains)}: give numbers >= 0 other than 1 (1 is the baseline)")
        if len(set(self.gains)) != len(self.gains):
            raise ValueError(f"gains {list(self.gains)} hold a number twice")
        check_counts(
            self, ("samples", "num_identification", "num_tuning", "num_test", "top", "max_new_tokens", "batch_size")
        )
        SamplingConfig(temperature=self.temperature, top_p=self.top_p)  # refuses what no token can be drawn by
        check_num_problems(self.num_test, "num_test")
        if (self.gpus is not None or self.gpu_gib is not None) and not self.dry_run:
            raise ValueError(
                "--gpus and --gpu-gib describe a machine for --dry-run: give --dry-run too, or leave them out"
            )
        if (self.gpus is None) != (self.gpu_gib is None):
            raise ValueError(f"--gpus is {self.gpus} and --gpu-gib {self.gpu_gib}: give both, or none")
        if self.gpus is not None and self.gpu_gib is not None and not (self.gpus >= 1 and self.gpu_gib > 0):
            raise ValueError(f"--gpus is {self.gpus} and --gpu-gib {self.gpu_gib:g}: give positive numbers")
        if self.greedy:
            refuse_greedy_samples(self.samples)

    def check_asked(self) -> None:
        """ValueError for options that nothing in the run would follow."""
        refuse_idle_data_dir(self)
        if self.greedy:
            refuse_idle_drawing(self)
        if not self.given_plan:
            return
        unread = ["num_identification", "num_tuning", "scope", "renormalize"]
        unread += ["top", "gains"] if self.plan else []
        for name in unread:
            if getattr(self, name) != getattr(Options, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} is for experts that are searched, and --{'plan' if self.plan else 'preset'} gives them: leave it out"
                )
        if self.gains != Options.gains and len(self.gains) > 1:
            raise ValueError(f"--gains are {list(self.gains)}: a preset takes one, nothing is tuned")

    @classmethod
    def like(cls, options: Any, **changes: Any) -> Options:
        """Another job's options as this one's, where both have them, but for the ``changes``; ValueError as here."""
        both = {one.name for one in dataclasses.fields(cls)} & {one.name for one in dataclasses.fields(options)}
        return cls(**{name: getattr(options, name) for name in both} | changes)

    @property
    def is_lab(self) -> bool:
        """Whether an embedded model is asked for."""
        return self.model in EMBEDDED

    @property
    def given_plan(self) -> bool:
        """Whether the experts are given and nothing is searched or tuned."""
        return bool(self.plan or self.preset)

    @property
    def run_name(self) -> str:
        """The folder's name under runs/."""
        parts = [self.name or self.model.rstrip("/").split("/")[-1]]
        if not self.name:
            parts += [word for word, on in (("quick", self.quick), ("greedy", self.greedy)) if on]
        return "-".join(parts)

    @property
    def folder(self) -> str:
        """Where the run is written."""
        return self.out or f"runs/{self.run_name}"

    @property
    def num_samples(self) -> int:
        """Samples a test problem and arm."""
        return 1 if self.greedy else self.samples or (2 if self.quick else 4)

    @property
    def token_limit(self) -> int:
        """Longest answer in tokens."""
        return self.max_new_tokens or answer_limit(self.model)

    @property
    def rows(self) -> int:
        """Samples decoded together."""
        return self.batch_size or (256 if self.is_lab else 64)

    def size(self, part: str) -> int | None:
        """Problems wanted of a part; None for as many as there are."""
        asked: int | None = getattr(self, f"num_{part}")
        if asked is not None:
            return asked
        if self.quick:
            return QUICK_SIZES[part]
        return LAB_SIZES[part] if self.problems == "lab" else None

    def config(self) -> dict[str, Any]:
        """What decides the results: everything but where they are written, and on how many ranks and how spread they are made."""
        return config_of(self, ELSEWHERE | {"dry_run", "gpus", "gpu_gib"})
