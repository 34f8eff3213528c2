"""The command line of the overthinking job."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import tyro

from launch.core.option_checks import ReadBy, check_counts, check_different, check_names, check_strengths
from launch.core.options import SplitOptions
from launch.core.served.server_options import EngineOptions
from moe_steer.lab import OWN_PROBLEMS
from moe_steer.tokens import parse_scope

METHODS = ("caa", "sta", "sae", "atom", "decision", "concise-prompt", "nowait", "budget")
SAE_METHODS = frozenset({"sta", "sae", "atom"})
PAIR_METHODS = ("caa", "sta", "sae", "atom")
"""Directions from pairs of thoughts."""
RESIDUAL_METHODS = (*PAIR_METHODS, "decision")
CONCISE_PROMPT = "Be brief."


def _of(*methods: str) -> ReadBy:
    return ReadBy(methods, where="--methods")


_TUNED = _of(*RESIDUAL_METHODS, "budget")
_SAVED = "--greedy gives the same answer every time: leave --{option} {value} out"


@dataclass(frozen=True, kw_only=True)
class OverthinkingOptions(EngineOptions, SplitOptions):
    """Make thoughts shorter without losing answers: dense steering against its plain rivals."""

    model: str = "lab-dense"
    """Model folder, hub id, or 'lab-dense', 'lab' or 'lab-search' for an embedded model."""
    problems: Annotated[str, tyro.conf.arg(aliases=["--task"])] = OWN_PROBLEMS
    """A JSONL file of problems, or the name of a task; own: those that the embedded model was trained on, the lab's for any other model."""
    methods: tuple[str, ...] | None = None
    """Among caa, sta, sae, atom, decision, concise-prompt, nowait, budget; default all that the model and the SAE allow."""
    sae: str | None = None
    """Sparse autoencoder of one layer's residual stream (file or folder), for sta, sae and atom; lab-dense has its own."""
    sae_layer: int | None = None
    """Layer of the SAE, where its file does not say it."""
    directions: Annotated[str | None, _of(*RESIDUAL_METHODS)] = None
    """Folder of directions that another run of this job left (RUN/directions), in place of learning them."""
    layers: Annotated[tuple[int, ...], _of("caa", "decision")] = ()
    """Layers tried by caa and decision; default the ones at 60% and 80% of the depth."""
    strengths: Annotated[tuple[float, ...] | None, _of(*PAIR_METHODS)] = None
    """Strengths tried of the directions from pairs, as shares of the residual stream's mean norm at the layer; default 0.1
    and 0.2, with --quick 0.2."""
    decision_strengths: Annotated[tuple[float, ...] | None, _of("decision")] = None
    """Strengths tried of the decision direction, in the same unit; default 0.1, 0.2 and 0.4, with --quick 0.2 and 0.4."""
    scope: Annotated[str | None, _of(*PAIR_METHODS)] = None
    """Tokens at which the directions from pairs act; default thought."""
    decision_scope: Annotated[str | None, _of("decision")] = None
    """Tokens at which the decision direction acts; default step_end, on the embedded models, whose numbers have no decimals, step_end:stop+line."""
    keep: Annotated[float | None, _of("sta")] = None
    """Share of the SAE's atoms that STA keeps; default 0.02."""
    switch_words: Annotated[tuple[str, ...], _of("decision")] = ("Wait", "Alternatively", "Hmm")
    """Words that open another attempt: the decision direction contrasts them with </think>."""
    concise_prompt: Annotated[str | None, _of("concise-prompt")] = None
    """What the concise-prompt arm adds to the question; default "Be brief."."""
    budgets: Annotated[tuple[float, ...] | None, _of("budget")] = None
    """Thinking budgets tried, as quantiles of the unsteered thoughts' lengths on the identification problems; default 0.25,
    0.5 and 0.75, with --quick 0.25 and 0.5."""
    margin: Annotated[float, _TUNED] = 1.0
    """Accuracy, in points, that a setting may lose on the tuning problems and still be chosen."""
    samples_identification: Annotated[int, _TUNED] = 4
    """Unsteered answers an identification problem, sampled even with --greedy: pairs are made of them."""
    samples: int | None = None
    """Samples a test problem and arm; default 3 for the lab, else the task's own number or 4, with --quick 2."""
    samples_tuning: Annotated[int, _TUNED, ReadBy(("tuning samples",), _SAVED)] = 2
    """Samples a tuning problem and setting."""
    num_identification: Annotated[int | None, _TUNED] = None
    """Problems that directions are made on."""
    num_tuning: Annotated[int | None, _TUNED] = None
    """Problems that layer and strength are chosen on."""
    num_test: int | None = None
    """Problems of the comparison; default all of a file or task, 200 of the lab."""

    suffix: ClassVar[str] = "-overthinking"
    lab_sizes: ClassVar = {"identification": 120, "tuning": 48, "test": 200}
    quick_sizes: ClassVar = {"identification": 36, "tuning": 12, "test": 20}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("methods", self.methods or (), METHODS)
        if not self.methods and self.methods is not None:
            raise ValueError(f"methods is empty: give at least one of {', '.join(METHODS)}")
        needing = sorted(SAE_METHODS.intersection(self.methods or ()))
        if needing and not self.names_sae:
            raise ValueError(
                f"method {needing[0]} reads a direction by an SAE: give --sae, or train one with 'moe-steer train-sae'"
            )
        if self.sae is not None and self.methods is not None and not needing:
            raise ValueError(f"--sae is for {', '.join(sorted(SAE_METHODS))}, and none is asked for: leave it out")
        if self.held_by and (missed := sorted({"nowait", "budget"} & set(self.methods or METHODS))):
            raise ValueError(
                f"{' and '.join(missed)} are rules of decoding, which run in this process and not on a server: name others with --methods"
            )
        if self.held_by and not self.directions and (learned := set(RESIDUAL_METHODS) & set(self.methods or METHODS)):
            raise ValueError(
                f"{', '.join(sorted(learned))} are learned from the residual stream, which a server does not send: run this job "
                "once with the model loaded, and give --directions RUN/directions"
            )
        if self.sae_layer is not None and self.sae is None:
            raise ValueError(f"--sae-layer {self.sae_layer} says where the SAE of --sae belongs: give --sae too")
        if not 0 < self.kept <= 1:
            raise ValueError(f"keep is {self.keep}: give a share above 0, at most 1")
        for field in ("strengths", "decision_strengths"):
            if getattr(self, field) is not None:
                check_strengths(field, getattr(self, field))
        if self.budgets is not None:
            check_different("budgets", self.budgets, lambda share: 0 < share < 1, "quantiles between 0 and 1")
        if not self.margin >= 0:
            raise ValueError(f"margin is {self.margin}: give the points that may be lost, 0 or more")
        if self.concise_prompt is not None and not self.concise_prompt.strip():
            raise ValueError("concise_prompt is empty: give words")
        if self.samples_identification < 2:
            raise ValueError(
                f"samples_identification is {self.samples_identification}: pairs of answers need at least 2 a problem"
            )
        check_counts(self, ("samples_tuning",))
        for text in (self.pair_scope, self.stop_scope):
            parse_scope(text)

    def readers(self) -> Set[str]:
        present = {*super().readers(), *methods_of(self, self.names_sae)[0], "drawing"}
        return present if self.greedy and self.samples_tuning != 1 else {*present, "tuning samples"}

    @property
    def names_sae(self) -> bool:
        """Whether there is an SAE: lab-dense has its own."""
        return self.sae is not None or self.model == "lab-dense"

    @property
    def usual_samples(self) -> int:
        return 3 if self.is_lab and not self.quick else super().usual_samples

    @property
    def tried_strengths(self) -> tuple[float, ...]:
        """Of the directions from pairs."""
        return self.strengths or ((0.2,) if self.quick else (0.1, 0.2))

    @property
    def tried_decision_strengths(self) -> tuple[float, ...]:
        """Of the decision direction."""
        return self.decision_strengths or ((0.2, 0.4) if self.quick else (0.1, 0.2, 0.4))

    @property
    def tried_budgets(self) -> tuple[float, ...]:
        """Quantiles of the unsteered lengths."""
        return self.budgets or ((0.25, 0.5) if self.quick else (0.25, 0.5, 0.75))

    @property
    def kept(self) -> float:
        """Share of the SAE's atoms that STA keeps."""
        return 0.02 if self.keep is None else self.keep

    @property
    def pair_scope(self) -> str:
        """Tokens at which the directions from pairs act."""
        return "thought" if self.scope is None else self.scope

    @property
    def stop_scope(self) -> str:
        """Tokens at which the decision direction acts."""
        usual = "step_end:stop+line" if self.is_lab else "step_end"
        return usual if self.decision_scope is None else self.decision_scope

    @property
    def brevity_request(self) -> str:
        """What the concise-prompt arm adds to the question."""
        return self.concise_prompt or CONCISE_PROMPT

    def tried_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers for the methods that may choose theirs; ValueError for one that does not exist."""
        if self.layers:
            for layer in self.layers:
                if not 0 <= layer < num_layers:
                    raise ValueError(f"layer {layer} does not exist: this model has layers 0-{num_layers - 1}")
            return tuple(dict.fromkeys(self.layers))
        shares = (0.8,) if self.quick else (0.6, 0.8)
        return tuple(dict.fromkeys(min(num_layers - 1, int(share * num_layers)) for share in shares))

    def config(self) -> dict[str, Any]:
        """What decides the results: everything but where they are written and who writes them."""
        return super().config() | {
            "strengths": list(self.tried_strengths),
            "decision_strengths": list(self.tried_decision_strengths),
            "budgets": list(self.tried_budgets),
            "scope": self.pair_scope,
            "decision_scope": self.stop_scope,
            "keep": self.kept,
            "concise_prompt": self.brevity_request,
        }


def methods_of(options: OverthinkingOptions, has_sae: bool) -> tuple[list[str], list[str]]:
    """The methods that take part, and a sentence about those that cannot."""
    if options.methods is not None:
        return list(options.methods), []
    if has_sae:
        return list(METHODS), []
    missing = ", ".join(method for method in METHODS if method in SAE_METHODS)
    why = f"{missing} take no part: no SAE for {options.model} is given (--sae; 'moe-steer train-sae' makes one)"
    return [method for method in METHODS if method not in SAE_METHODS], [why]
