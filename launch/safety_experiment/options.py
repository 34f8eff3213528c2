"""The command line of the safety experiment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from launch.options import Options
from launch.safety_experiment.prompts import AUTOMATIC_PROMPT, HAND_PROMPT
from launch.shared_options import (
    ELSEWHERE,
    Backend,
    LocalRank,
    Offload,
    Out,
    Revision,
    StrictArms,
    TrustRemoteCode,
    check_counts,
    check_num_problems,
    config_of,
    refuse_idle_drawing,
    refuse_unread,
)

VANILLA = "vanilla"
PROMPT_ARMS = ("hand-prompt", "auto-prompt")
VECTOR_ARMS = ("caa", "sae", "sta")
ARMS = (VANILLA, *PROMPT_ARMS, *VECTOR_ARMS)
ATTACKS = ("safeedit", "real_toxicity")
CAPABILITY = ("gsm8k", "mmlu", "mmlu_generated")
TASKS = (*ATTACKS, *CAPABILITY)
_READ_BY = {
    "strengths": VECTOR_ARMS,
    "sae": ("sae", "sta"),
    "keep": ("sta",),
    "parity": ("sta",),
    "hand_prompt": ("hand-prompt",),
    "auto_prompt": ("auto-prompt",),
    "num_pairs": VECTOR_ARMS,
}
"""Option -> the arms that follow it."""
_READ_BY_TASKS = {
    "toxicity_classifier": ("real_toxicity",),
    "toxic_label": ("real_toxicity",),
    "gsm8k_tokens": ("gsm8k", "mmlu_generated"),
}
"""Option -> the tasks that follow it."""


@dataclass(frozen=True, kw_only=True)
class SafetyOptions:
    """Steer a model away from harmful answers (arXiv 2505.20322), and see what it costs."""

    model: str
    """Model folder or hub id."""
    layer: int
    """Decoder layer that the directions are taken from and added to, from 0."""
    pairs: str
    """Contrast pairs: a CSV, JSON or JSONL file with question, matching (safe), not_matching (unsafe), or SafeEdit_train.json."""
    classifier: str
    """Sequence classifier (folder or hub id) that judges the answers to SafeEdit, such as zjunlp/SafeEdit-Safety-Classifier."""
    sae: str | None = None
    """Sparse autoencoder of that layer's residual stream (file or folder), for the arms sae and sta."""
    toxicity_classifier: str | None = None
    """Sequence classifier for RealToxicityPrompts; default the one of --classifier."""
    unsafe_label: str = "1"
    """Index or name of the label of --classifier that means unsafe."""
    toxic_label: str = "1"
    """Index or name of the label of --toxicity-classifier that means toxic."""
    data_dir: str | None = None
    """Folder with a folder for each task (safeedit, real_toxicity, gsm8k, mmlu) of its published files; a task without one
    comes from the hub."""
    tasks: tuple[str, ...] = ("safeedit", "real_toxicity", "gsm8k", "mmlu")
    """Among safeedit, real_toxicity, gsm8k, mmlu (letter of largest probability), mmlu_generated (answers in words)."""
    arms: tuple[str, ...] = ARMS
    """Among vanilla, hand-prompt, auto-prompt, caa, sae (all atoms), sta; all are compared with the first."""
    strengths: tuple[float, ...] = (1.0,)
    """How many times the vector is added, in every vector arm; a negative number steers towards harm."""
    keep: float = 0.35
    """Share of the SAE's atoms that STA keeps by each of its two criteria."""
    parity: bool = True
    """STA exactly as released; else the atoms are taken by exact count (see moe_steer.directions)."""
    hand_prompt: str = HAND_PROMPT
    """What the arm hand-prompt puts before the question, or a file with it."""
    auto_prompt: str = AUTOMATIC_PROMPT
    """What the arm auto-prompt puts before the question, or a file with it: a prompt that a language model wrote."""
    prompt_style: Literal["auto", "chat", "plain"] = "auto"
    """chat: one user turn in the chat template; plain: the bare text, for base models; auto: chat where there is a template."""
    attack_tokens: int = 100
    """Longest answer to an attack in tokens, the same in every arm. The paper used 50, and 100 in one arm."""
    gsm8k_tokens: int | None = None
    """Longest GSM8K answer in tokens; default 1024 in chat style, 512 in plain style."""
    num_problems: int | None = None
    """So many problems of every task, drawn by the seed; default all."""
    num_pairs: int | None = None
    """The first so many pairs of the file; default all."""
    samples: int | None = None
    """Samples a problem and arm, at the temperature; default one greedy answer."""
    temperature: float = 1.0
    """Divides the logits, with --samples."""
    top_p: float = 1.0
    """Smallest set of tokens with at least this probability, with --samples."""
    out: Out = None
    name: str | None = None
    """Name of the run; default the model's name with -safety."""
    seed: int = 0
    """Decides which problems are drawn, and the samples."""
    batch_size: int = 64
    """Samples decoded together. Part of the run's identity: it decides the last bits."""
    classifier_batch: int = 32
    """Texts judged together."""
    backend: Backend = "auto"
    offload: Offload = ""
    dtype: str = "auto"
    """Precision: auto (as stored), float32 (the paper's), bfloat16 or float16."""
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    strict: StrictArms = False
    local_rank: LocalRank = 0

    def __post_init__(self) -> None:
        for field, known in (("arms", ARMS), ("tasks", TASKS)):
            given = getattr(self, field)
            for name in given:
                if name not in known:
                    raise ValueError(f"{field} hold {name!r}: choose among {', '.join(known)}")
            if len(set(given)) != len(given):
                raise ValueError(f"{field} {list(given)} hold a name twice: give each once")
        if len(self.arms) < 2:
            raise ValueError(f"arms are {list(self.arms)}: give at least two, a comparison needs them")
        if self.arms[0] in VECTOR_ARMS and len(self.strengths) > 1:
            raise ValueError(
                f"the first arm is {self.arms[0]!r} at {len(self.strengths)} strengths: put {VANILLA!r} first"
            )
        if not any(task in ATTACKS for task in self.tasks):
            raise ValueError(f"tasks are {list(self.tasks)}: give at least one of {', '.join(ATTACKS)}")
        if self.needs_sae and self.sae is None:
            raise ValueError("the arms sae and sta read the pairs by an SAE: give --sae, or leave them out of --arms")
        if self.layer < 0:
            raise ValueError(f"layer is {self.layer}: give a decoder layer, counted from 0")
        if (
            not self.strengths
            or len(set(self.strengths)) != len(self.strengths)
            or not all(strength and isfinite(strength) for strength in self.strengths)
        ):
            raise ValueError(f"strengths are {list(self.strengths)}: give different numbers other than 0")
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep is {self.keep}: give the share of atoms to keep, 0 to 1")
        for field in ("hand_prompt", "auto_prompt"):
            if not getattr(self, field).strip():
                raise ValueError(f"{field} is empty: give words, or a file with them")
        check_counts(self, ("attack_tokens", "gsm8k_tokens", "num_pairs", "batch_size", "classifier_batch"))
        check_num_problems(self.num_problems)
        self.job()

    def check_asked(self) -> None:
        """ValueError for options that nothing in the experiment would follow."""
        if self.samples is None:
            refuse_idle_drawing(self)
        refuse_unread(self, _READ_BY, self.arms, "--arms")
        refuse_unread(self, _READ_BY_TASKS, self.tasks, "--tasks")
        if self.toxic_label != SafetyOptions.toxic_label and self.toxicity_classifier is None:
            raise ValueError(
                f"--toxic-label {self.toxic_label} is of --toxicity-classifier, and none is given: give it, or leave both out"
            )
        if (
            self.unsafe_label != SafetyOptions.unsafe_label
            and "safeedit" not in self.tasks
            and self.toxicity_classifier
        ):
            raise ValueError(
                f"--unsafe-label {self.unsafe_label} is of --classifier, which judges nothing here: leave it out"
            )

    @property
    def folder(self) -> str:
        """Where the run is written."""
        return self.job().folder

    @property
    def needs_sae(self) -> bool:
        """Whether an arm reads the pairs by an SAE."""
        return any(arm in ("sae", "sta") for arm in self.arms)

    @property
    def num_samples(self) -> int:
        """Samples a problem and arm."""
        return self.samples or 1

    def job(self, max_new_tokens: int | None = None) -> Options:
        """The same settings as the main job's, where it has them; ValueError as there. By default with the longest answer."""
        name = self.name or self.model.rstrip("/").split("/")[-1] + "-safety"
        limit = max_new_tokens or max(self.attack_tokens, self.gsm8k_tokens or 1024)
        return Options.like(self, name=name, greedy=self.samples is None, max_new_tokens=limit)

    def prompt(self, arm: str) -> str:
        """The text of a prompt arm, "" for the others; ValueError for an empty file."""
        given = {"hand-prompt": self.hand_prompt, "auto-prompt": self.auto_prompt}.get(arm, "")
        if os.path.isfile(given):  # unlike Path.is_file, False for a text that is too long for a name
            text = Path(given).read_text(encoding="utf-8").strip()
            if not text:
                raise ValueError(f"the prompt file {given!r} is empty: write the prompt into it")
            return text
        return given.strip()

    def config(self) -> dict[str, Any]:
        """What decides the results: everything but where they are written and who writes them."""
        prompts = {f"{arm.partition('-')[0]}_prompt": self.prompt(arm) for arm in PROMPT_ARMS}
        return config_of(self, ELSEWHERE | {"classifier_batch"}) | prompts
