"""``moe-steer early-exit``: a graded run of tuning problems -> a probe that ends thoughts, with a stated mis-exit rate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from launch.core.option_checks import check_counts
from launch.core.options import HeldModel
from launch.core.prompt_options import PromptOptions
from reasoning_evals import comparing, engines, runs

if TYPE_CHECKING:
    from launch.core.levers.exit_probe import Tried
    from moe_steer.gates import Probe


@dataclass(frozen=True, kw_only=True)
class EarlyExit(PromptOptions, HeldModel):
    """Train a probe that says where a thought may end, and set its threshold so that it loses a right answer no more often than asked.

    Every exit point of the run's thoughts is tried: the thought ends there, and the answer is graded. Half of the problems train the
    probe, the other half calibrate its threshold (conformal risk control). The file is an arm: 'evaluate --arms baseline exit:FILE'.
    """

    run_folder: Annotated[str, tyro.conf.Positional]
    """Folder of a graded run of tuning problems, sampled from the unsteered model ('moe-steer generate')."""
    out: str
    """File to write: the probe with its threshold and the stated rate."""
    rate: float = 0.05
    """Mis-exit rate: the expected share of a new problem's samples that an exit turns from right to wrong is this or less."""
    layer: int | None = None
    """Decoder layer whose output is read, counted from 0; default two thirds of the way up."""
    every: int = 1
    """Every so many step ends of a thought are exit points."""
    probe: str | None = None
    """A probe that is trained already, on other problems: all of these then calibrate it. One that says that some of them trained it is
    refused; where it does not say, its rate is wrong if they did."""
    arm: str | None = None
    """Of a run of several arms, the unsteered one."""
    answer_tokens: int = 256
    """Most tokens of an answer behind an exit."""
    batch_size: int = 64
    """Answers sampled together."""

    def run(self) -> int:
        """Try the exits, train, calibrate, write."""
        check_counts(self, ("every", "answer_tokens", "batch_size"))
        if not 0 < self.rate < 1:
            raise ValueError(f"--rate is {self.rate:g}: give a share above 0 and below 1")
        if self.probe and self.layer is not None:
            raise ValueError("--layer is the layer of a new probe, and --probe reads its own: leave --layer out")
        from launch.core.levers.arm_rules import step_ends
        from launch.core.levers.exit_probe import ExitProbe, by_problem, hidden_at, try_exits
        from launch.core.ranks import refuse_several_ranks
        from launch.core.session import load_asked
        from launch.core.wiring import read_any_traces
        from moe_steer.console import tracked
        from moe_steer.gates import Probe
        from moe_steer.layers import model_shape

        refuse_several_ranks("moe-steer early-exit", "one process")
        config = runs.read_run(Path(self.run_folder))["config"]
        arm = self._arm(config["arm_order"])
        sampling = engines.SamplingConfig.from_dict(
            config["sampling"] | {"max_new_tokens": self.answer_tokens, "batch_size": self.batch_size}
        )
        given = Probe.load(self.probe) if self.probe else None
        model, tokenizer = load_asked(self, batch=self.batch_size, context=None)
        if given is not None:
            given.check(model_shape(model))
        traces = read_any_traces([self.run_folder], tokenizer, arm)
        asked = {trace.prompt_digest for trace in traces}
        if given is not None and (known := asked & (given.trained_on or set())):
            raise ValueError(
                f"{len(known)} of the {len(asked)} problems of {self.run_folder} trained {self.probe}, which is too sure of them: the rate would "
                "not hold; give a run of other problems"
            )
        tried = try_exits(
            self.run_folder,
            traces,
            model,
            tokenizer,
            sampling,
            step_ends=step_ends(tokenizer),
            every=self.every,
            watch=lambda label, items, total: tracked(items, label, total=total),
        )
        problems = sorted({item.problem_id for item in tried})
        training = set() if given else set(problems[::2])
        probe = given or self._trained(model, [item for item in tried if item.problem_id in training])
        fitted = {item.trace.prompt_digest for item in tried if item.problem_id in training}
        held_out = [
            item for item in tried if item.trace.prompt_digest not in fitted
        ]  # nor the same question by another id
        scores = [
            probe.probability(hidden_TD).tolist() if item.points else []
            for item, hidden_TD in zip(held_out, hidden_at(model, held_out, probe.layer), strict=True)
        ]
        control = comparing.control_risk(by_problem(held_out, scores), self.rate)
        kept = {key: config["sampling"][key] for key in ("temperature", "top_p", "top_k", "greedy")}
        ExitProbe(probe=probe, every=self.every, control=control, sampling=kept).save(self.out)
        print(self._said(tried, training, probe.trained_on is not None, held_out, scores, control))
        return 0

    def _arm(self, arms: list[str]) -> str:
        if self.arm is None and len(arms) > 1:
            raise ValueError(f"{self.run_folder} holds the arms {', '.join(arms)}: name the unsteered one with --arm")
        if self.arm is not None and self.arm not in arms:
            raise ValueError(f"{self.run_folder} has no arm {self.arm!r}: it has {', '.join(arms)}")
        return self.arm or arms[0]

    def _trained(self, model: Any, tried: list[Tried]) -> Probe:
        import numpy as np
        import torch

        from launch.core.levers.exit_probe import hidden_at
        from moe_steer.gates import Probe, fit_probe
        from moe_steer.layers import model_shape

        shape = model_shape(model)
        layer = (2 * shape.num_layers) // 3 if self.layer is None else self.layer
        if not 0 <= layer < shape.num_layers:
            raise ValueError(f"--layer {layer} does not exist: this model has layers 0-{shape.num_layers - 1}")
        some = [item for item in tried if item.points]
        states_TD = torch.cat(list(hidden_at(model, some, layer))).double().numpy()
        harmless_T = np.array([not harm for item in some for harm in item.harms])
        names = [item.problem_id for item in some for _ in item.points]
        prompts = [item.trace.prompt_digest for item in some for _ in item.points]
        try:
            fitted = fit_probe(states_TD, harmless_T, names, prompts=prompts)
        except ValueError as error:
            raise ValueError(
                f"{len(set(names))} problems with exit points are too few to train a probe on and to judge it: sample more tuning problems, or "
                "give a trained one with --probe"
            ) from error
        judged = fitted.header["held_out"]
        print(
            f"the probe of layer {layer} tells exits that lose nothing from others with an AUC of {judged['auc']:.3f} ({judged['low']:.3f} to "
            f"{judged['high']:.3f}) on {judged['problems']} problems that it was not fitted on"
        )
        return Probe(
            weight_D=torch.from_numpy(fitted.weight_D).float(),
            bias=fitted.bias,
            layer=layer,
            header={"model": shape.to_dict(), "what": "an exit here loses nothing", **fitted.header},
        )

    def _said(self, tried: Any, training: set[str], told: bool, held_out: Any, scores: Any, control: Any) -> str:
        points = sum(len(item.points) for item in tried)
        harm = sum(sum(item.harms) for item in tried)
        saved = [
            (item.trace.thought_end or len(item.trace.token_ids)) - item.points[at] - 1
            if (at := next((n for n, score in enumerate(row) if score > control.threshold), None)) is not None
            else 0
            for item, row in zip(held_out, scores, strict=True)
        ]
        whole = [(item.trace.thought_end or len(item.trace.token_ids)) - item.trace.prompt_length for item in held_out]
        trained = (
            f"{len(training)} problems trained the probe"
            if training
            else f"the probe was given ({'none of these problems' if told else 'its rate holds if none of these problems'} trained it)"
        )
        return (
            f"{points} exit points of {len(tried)} thoughts tried: {harm} ({harm / points:.1%}) would lose a right answer\n"
            f"{trained}, {control.problems} calibrated it: above {control.threshold:.4f} a thought ends\n"
            f"stated mis-exit rate: at most {control.rate:g} of the samples of a new problem of this kind, in expectation; on the problems of "
            f"calibration {control.empirical:.3f}, with {control.exits:.1%} of the thoughts ended and {sum(saved) / max(1, sum(whole)):.1%} of "
            f"their tokens saved\nwrote {self.out}; next: moe-steer evaluate --arms baseline exit:{self.out}"
        )
