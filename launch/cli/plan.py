"""``moe-steer plan``: scores, a preset, experts or directions named by hand -> a plan file."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.cli.plan_words import gate_words, with_choice, with_gate
from launch.core.options import MIN_SUPPORT
from moe_steer import PRESETS, ExpertGain, ResidualVector, SteeringPlan, preset_plan
from moe_steer.console import counted
from moe_steer.entries.residual_entry import read_vector
from moe_steer.plan import UNITS

_COMPARED = ("model_type", "num_layers", "num_experts")


@dataclass(frozen=True, kw_only=True)
class MakePlan:
    """Make a steering plan: the top experts of a score file, a published preset, experts named by hand, experts forced in or out, directions, or a mix."""

    out: str
    """The plan file to write (JSON)."""
    scores: str | None = None
    """Score file written by 'moe-steer score'."""
    by: tuple[str, ...] = ()
    """Choose by a method, from its file: METHOD FILE with a file of 'moe-steer score --by METHOD' (npmi, rice, risk, mass, norm,
    influence, contrast, causes), or causes FILE with one of 'moe-steer causes'; only experts with q <= --max-q."""
    preset: str | None = None
    """Published experts: one of rice-r1-math, rice-r1-physics, rice-qwen3-235b-math, ... ('help' lists all)."""
    experts: tuple[str, ...] = ()
    """Experts by hand, as LAYER:EXPERT or LAYER:EXPERT=GAIN, for example 39:182 29:126=32."""
    force_in: tuple[str, ...] = ()
    """Experts that every token in scope must select, as LAYER:EXPERT, with the weight that their own score gives; beside --experts they keep that gain."""
    force_out: tuple[str, ...] = ()
    """Experts that no token in scope may select, as LAYER:EXPERT: the next best takes the place."""
    logit_bias: tuple[str, ...] = ()
    """What to add to the router's logit of an expert, as LAYER:EXPERT=BIAS, for example 5:9=1.5: it moves choice and weight."""
    top_k: tuple[str, ...] = ()
    """Another number of experts a token, as LAYER=K or LAYER=K@SCOPE, for example 3=4@thought; without a scope, that of --scope."""
    start: str | None = None
    """A plan file to start from: its experts, directions, scope and model stay."""
    residual: tuple[str, ...] = ()
    """Directions to add, as LAYER:FILE=STRENGTH or LAYER:FILE=STRENGTH@SCOPE, for example 20:concise.safetensors=0.5@step_end."""
    unit: str = "vector"
    """What the strengths of --residual count: vector (the file's own length) or residual_norm (shares of the residual stream's mean norm at that layer)."""
    when: str | None = None
    """When the entries made here act, within their scope, as JSON: {"on": "probe", "file": "check.safetensors", "above": 0.7}; all of it is in docs/how-to/gates.md."""
    top: int = 2
    """How many experts to take from the scores or the preset."""
    gain: float = 64.0
    """Factor on the gate weight; 0 silences an expert."""
    scope: str | None = None
    """Where to act: all (the default), prompt, thought, answer, generated, after:N, step_end, or step_end:CLASS with sentence, line, paragraph or stop (joined by +)."""
    renormalize: bool = False
    """Rescale a token's weights to their former sum after the gain."""
    min_support: int = MIN_SUPPORT
    """Least number of times a scored expert must have been active at a marker."""
    max_q: float = 0.05
    """Evidence that an expert of --scores or --by needs: the largest q, as 'moe-steer score' prints it."""
    unproven: bool = False
    """Take the best scored experts even where nothing shows that they answer to the thought; the plan records it."""

    def run(self) -> int:
        """Write the plan and show it."""
        if Path(self.out).is_dir():
            raise ValueError(f"--out {self.out} is a folder: name the plan file in it")
        self._check_evidence()
        choice = (self.force_in, self.force_out, self.logit_bias, self.top_k)
        plan = with_gate(
            self._with_directions(with_choice(self._plan(), *choice)), self.when, self.start, self._from_out
        )
        self._refuse_unused(plan)
        plan.save(self.out)
        for entry in plan.experts:
            action = entry.action if entry.acts_on_choice else f"gain {entry.gain:g}"
            print(f"layer {entry.layer:3d} expert {entry.expert:3d} {action}{gate_words(entry)}")
        for number in plan.top_k:
            print(f"layer {number.layer:3d} top {number.k} scope {number.scope}")
        for item in plan.residual:
            unit = " of the residual norm" if item.unit == "residual_norm" else ""
            nothing = "" if item.strength else " (adds nothing)"
            print(
                f"layer {item.layer:3d} vector {item.file} strength {item.strength:g}{unit} scope {item.scope}{nothing}{gate_words(item)}"
            )
        vectors = f", {len(plan.residual)} vector{'s' * (len(plan.residual) > 1)}" if plan.residual else ""
        numbers = f", {len(plan.top_k)} top_k" if plan.top_k else ""
        gains = f", scope {plan.scope}, renormalize {str(plan.renormalize).lower()}" if plan.experts else ""
        print(f"wrote {self.out}: {counted(len(plan.experts), 'expert')}{vectors}{numbers}{gains}")
        if (self.scores or self.by) and plan.provenance.get("evidence") == "unproven":
            claim = plan.provenance.get("claim") or "that these experts answer to the thought"
            print(f"NOTE: unproven: nothing shows {claim}", file=sys.stderr)
        if plan.is_neutral:
            print("NOTE: the plan changes nothing: every gain in it is 1 and every strength 0", file=sys.stderr)
        return 0

    def _check_evidence(self) -> None:
        if not 0 < self.max_q <= 1:
            raise ValueError(f"--max-q is {self.max_q}: give a rate above 0, at most 1")
        if self.unproven and self.max_q != MakePlan.max_q:
            raise ValueError(f"--max-q {self.max_q:g} asks for evidence and --unproven for none: give one of them")

    def _refuse_unused(self, plan: SteeringPlan) -> None:
        """ValueError for options that nothing in the plan follows."""
        readers = {
            "gain": self.scores or self.by or self.preset or any("=" not in text for text in self.experts),
            "top": self.scores or self.by or self.preset,
            "min_support": self.scores or self.by,
            "max_q": self.scores or self.by,
            "unproven": self.scores or self.by,
        }
        if plan.experts:
            if self.renormalize and all(entry.gain == 1.0 and entry.acts_on_choice for entry in plan.experts):
                raise ValueError("--renormalize is for gains, and no expert of the plan has one: leave it out")
            for name, reader in readers.items():
                if getattr(self, name) != getattr(MakePlan, name) and not reader:
                    source = "--start" if self.start else "--preset" if self.preset else "--experts"
                    raise ValueError(f"--{name.replace('_', '-')} is not read with {source} as given: leave it out")
            return
        if self.unproven or self.max_q != MakePlan.max_q:
            raise ValueError("--max-q and --unproven are for scored experts, and the plan has none: leave them out")
        if self.renormalize:
            raise ValueError("--renormalize is for the gains of experts, and the plan has none: leave it out")
        if self.gain != MakePlan.gain or self.top != MakePlan.top or self.min_support != MakePlan.min_support:
            raise ValueError("--gain, --top and --min-support are for experts, and the plan has none: leave them out")
        scoped = [*self.residual, *self.top_k]
        if self.scope and scoped and all("@" in text for text in scoped):
            option = "--residual" if self.residual else "--top-k"
            raise ValueError(f"--scope {self.scope} would change nothing: every {option} names its own scope")
        if self.scope and not scoped:
            raise ValueError(
                f"--scope {self.scope} would change nothing: the vectors of {self.start} keep their own, name them again with --residual"
            )

    def _plan(self) -> SteeringPlan:
        sources = {
            "--scores": self.scores,
            "--by": self.by,
            "--preset": self.preset,
            "--experts": self.experts,
            "--start": self.start,
        }
        given = [name for name, value in sources.items() if value]
        alone = (self.residual, self.force_in, self.force_out, self.logit_bias, self.top_k)
        if len(given) > 1 or not (given or any(alone)):
            raise ValueError(
                f"give exactly one of --scores, --preset and --experts (or --by, --start, or --residual, --force-in, --force-out, --logit-bias or --top-k alone), not {' and '.join(given) or 'none of them'}"
            )
        if self.preset == "help":
            raise ValueError(f"the presets are {', '.join(PRESETS)}")
        if self.start:
            return self._started(SteeringPlan.load(self.start))
        scope = "all" if self.scope is None else self.scope
        if self.scores:
            return self._by_scores(self.scores, scope)
        if self.by:
            return self._by_method(scope)
        if self.preset:
            base = preset_plan(self.preset, self.top, self.gain)
            entries, model, provenance = base.experts, base.model, base.provenance
        else:
            entries, model, provenance = tuple(map(self._by_hand, self.experts)), None, {"by": "hand"}
        return SteeringPlan(
            experts=entries, model=model, scope=scope, renormalize=self.renormalize, provenance=provenance
        )

    def _by_scores(self, path: str, scope: str, by: str | None = None) -> SteeringPlan:
        from expert_stats import ExpertScores, select_experts

        scores = ExpertScores.load(path)
        if by not in (None, scores.options["by"]):
            raise ValueError(
                f"{path} holds scores by {scores.options['by']}, not by {by}: make them with 'moe-steer score --by {by}'"
            )
        return select_experts(
            scores,
            top=self.top,
            gain=self.gain,
            min_support=self.min_support,
            max_q=None if self.unproven else self.max_q,
            scope=scope,
            renormalize=self.renormalize,
        )

    def _by_method(self, scope: str) -> SteeringPlan:
        from expert_stats.causes import Causes, is_causes, select_causes
        from expert_stats.rivals import METHODS

        if len(self.by) != 2 or self.by[0] not in METHODS:
            raise ValueError(
                f"--by {' '.join(self.by)}: write --by METHOD FILE, with a file of 'moe-steer score --by METHOD' ({', '.join(METHODS)})"
            )
        method, path = self.by
        if method != "causes" or not is_causes(path):
            return self._by_scores(path, scope, method)
        for option in ("unproven", "min_support"):
            if getattr(self, option) != getattr(MakePlan, option):
                name = option.replace("_", "-")
                raise ValueError(f"--{name} is for files of 'moe-steer score': leave it out, or score by causes")
        return select_causes(
            Causes.load(path),
            self.top,
            self.gain,
            max_q=self.max_q,
            scope=scope,
            renormalize=self.renormalize,
        )

    def _started(self, plan: SteeringPlan) -> SteeringPlan:
        """The plan with its files named from the folder of the new one, and what was asked otherwise."""
        moved = plan.with_files(self._from_out, plan.base_dir)
        return replace(
            moved,
            scope=self.scope or plan.scope,
            renormalize=self.renormalize or plan.renormalize,
        )

    def _with_directions(self, plan: SteeringPlan) -> SteeringPlan:
        """The plan with --residual, and with the model that its directions were made on, where they say it."""
        added = tuple(map(self._direction, self.residual))
        if self.unit != UNITS[0] and not added:
            raise ValueError(f"--unit {self.unit} says how to read --residual, and there is none: give both or neither")
        folder = os.path.realpath(Path(self.out).parent)
        plan = replace(plan, residual=(*plan.residual, *added), base_dir=folder)
        model = plan.model
        for entry in plan.residual:
            # The folder may not exist yet, and a path through it would lead nowhere.
            placed = replace(entry, file=os.path.normpath(os.path.join(folder, entry.file)))
            plan.load_shift(placed)
            made_on = read_vector(plan.vector_path(placed), placed).header.get("model")
            if isinstance(made_on, Mapping):
                model = _same_model(model, made_on, entry.file)
        return replace(plan, model=model)

    def _from_out(self, path: Path) -> str:
        """A path as the plan file will name it: from the plan's own folder, so that both can move together."""
        if path.is_absolute():
            return str(path)
        return os.path.relpath(Path(os.path.realpath(path.parent), path.name), os.path.realpath(Path(self.out).parent))

    def _direction(self, text: str) -> ResidualVector:
        match = re.fullmatch(r"(\d+):(.+)=([^=@]+)(?:@([^=@]+))?", text)
        if match is None:
            raise ValueError(
                f"{text!r} names no direction: write LAYER:FILE=STRENGTH or LAYER:FILE=STRENGTH@SCOPE, for example 20:concise.safetensors=0.5@step_end"
            )
        try:
            strength = float(match[3])
        except ValueError:
            raise ValueError(
                f"the strength {match[3]!r} in {text!r} is not a number: write one, for example 0.5"
            ) from None
        if Path(match[2]).suffix in (".pt", ".gguf"):
            raise ValueError(
                f"{match[2]!r} is of another tool: read it with 'moe-steer convert-direction {match[2]} --out FOLDER' first"
            )
        scope = match[4] or ("all" if self.scope is None else self.scope)
        return ResidualVector(int(match[1]), self._from_out(Path(match[2])), strength, scope, self.unit)

    def _by_hand(self, text: str) -> ExpertGain:
        match = re.fullmatch(r"(\d+):(\d+)(?:=(.+))?", text)
        if match is None:
            raise ValueError(
                f"{text!r} names no expert: write LAYER:EXPERT or LAYER:EXPERT=GAIN, for example 39:182=64"
            )
        try:
            gain = float(match[3]) if match[3] else self.gain
        except ValueError:
            raise ValueError(f"the gain {match[3]!r} in {text!r} is not a number: write one, for example 64") from None
        return ExpertGain(int(match[1]), int(match[2]), gain)


def _same_model(model: Mapping[str, Any] | None, other: Mapping[str, Any], file: str) -> Mapping[str, Any]:
    """What a plan says about its model, from a direction's header where it said nothing; ValueError where they differ."""
    if model is None:
        return {key: other[key] for key in (*_COMPARED, "name") if key in other}
    for key in _COMPARED:
        if key in model and key in other and model[key] != other[key]:
            raise ValueError(
                f"{file} was made on a model with {key} {other[key]!r}, the rest of the plan with {model[key]!r}: give directions of one model"
            )
    return model
