"""A steered model for lm-evaluation-harness: its command line with one model more.

    python -m launch.lm_eval_model run --model moe_steer --model_args pretrained=MODEL,plan=plan.json --tasks gsm8k ...

The configuration in its results says the plan's digest and what it did over the whole evaluation. The harness pads prompts whose
log-probabilities it reads, without a mask: with a batch size above 1 the counts there include padding, the results do not.
"""

from __future__ import annotations

import sys
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from moe_steer import SteeringPlan, load_model, steer


@register_model("moe_steer")
class SteeredLM(HFLM):  # type: ignore[misc]
    """``pretrained``: as of ``load_model``; ``plan``: a plan file, or none; other arguments as of the harness's own model ``hf``,
    but for those that say how weights are held. With ``strict`` an evaluation in which nothing fired fails."""

    def __init__(
        self,
        pretrained: str = "lab",
        plan: str | None = None,
        backend: str = "auto",
        dtype: str = "auto",
        strict: bool = False,
        device: str | None = None,
        **options: Any,
    ) -> None:
        if device not in (None, "cpu", "cuda"):
            raise ValueError(f"device is {device!r}: moe_steer places the model itself, name a backend instead")
        self._plan = SteeringPlan.load(plan) if plan is not None else SteeringPlan()
        model, tokenizer = load_model(pretrained, backend, dtype=dtype)
        self._plan.check(model)
        self._strict = strict
        super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, **options)
        # For as long as the harness asks: it calls the model as it likes.
        self._steering = steer(self.model, self._plan, tokenizer=tokenizer, quiet=True)
        self._audit = self._steering.__enter__()

    def get_model_info(self) -> dict[str, Any]:
        """What the harness keeps of the model, at the end of an evaluation; RuntimeError, with ``strict``, where nothing fired."""
        problems = self._audit.problems()
        if problems and self._strict:
            raise RuntimeError(f"the model was not steered: {problems[0]}")
        plan = None if self._plan.is_neutral else self._plan.digest()
        steering = {"plan": plan, "fired": self._audit.to_rows(), "problems": problems}
        return {**super().get_model_info(), "steering": steering}


def main() -> None:
    """Their command line."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv[0] = "lm_eval"
    cli_evaluate()


if __name__ == "__main__":
    main()
