"""What gates cost a decoding step, against the plain model in the very next step.

    .venv/bin/python tests/bench/gating_cost.py [ROWS] [STEPS]        1 row and 300 steps by default, about 4 minutes

Twins that share the weights of the 121 M model of ``steering_cost.py`` stand side by side: plain, under a plan with gains in two layers, and
under that plan gated by a probe (with a ramp) and by the model's own entropy. Every step decodes one token in each, in turn, so that other
work on the machine meets all alike. The median over steps of (its CPU time / plain's in the same step), with its 95% interval.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from typing import Any

import torch
from transformers import DynamicCache

from moe_steer import ExpertGain, SteeringPlan, steer
from moe_steer.layers import model_shape
from steering_cost import GAIN, gated_plan, middle_model


def main() -> None:
    rows, steps = map(int, (*sys.argv[1:3], *("1", "300")[len(sys.argv[1:3]) :]))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.set_grad_enabled(False)
    plain: Any = middle_model()
    layers = model_shape(plain).moe_layers
    plan = SteeringPlan(experts=[ExpertGain(layer, 1, GAIN) for layer in (layers[1], layers[-1])])
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        models = {"plain": plain}
        for name in ("steered", "gated", "on entropy"):
            models[name] = copy.deepcopy(plain, {id(part): part for part in [*plain.parameters(), *plain.buffers()]})
            own = plan if name == "steered" else gated_plan(plain, plan, name, folder)
            stack.enter_context(steer(models[name], own, quiet=True))
        random = torch.Generator().manual_seed(1)
        ids = torch.randint(7, 200, (rows, 16 + steps), generator=random)
        mask = torch.ones_like(ids)
        caches = {name: DynamicCache(config=plain.config) for name in models}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        names = list(models)
        for step in range(steps + 1):
            tokens = slice(0, 16) if not step else slice(15 + step, 16 + step)
            turn = step % len(names)
            for name in names[turn:] + names[:turn]:
                start = time.thread_time()
                models[name](
                    input_ids=ids[:, tokens],
                    attention_mask=mask[:, : tokens.stop],
                    past_key_values=caches[name],
                    logits_to_keep=1,
                )
                seconds[name].append(time.thread_time() - start)
    print(f"{rows} rows, {steps} steps, torch {torch.__version__}, {torch.get_num_threads()} thread")
    for name in names:
        ratios = sorted(mine / base for mine, base in zip(seconds[name][4:], seconds["plain"][4:], strict=True))
        middle, half = len(ratios) // 2, int(0.98 * len(ratios) ** 0.5)
        print(f"{name:<12}{ratios[middle]:.4f} ({ratios[middle - half]:.4f} to {ratios[middle + half]:.4f})")


if __name__ == "__main__":
    main()
