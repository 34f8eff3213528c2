"""What observing, counting and steering cost, as ratios to the plain model measured in the same run.

    .venv/bin/python tests/bench/steering_cost.py            both models, about 10 minutes on one thread
    .venv/bin/python tests/bench/steering_cost.py --quick    the lab model only
    .venv/bin/python tests/bench/steering_cost.py --decode   decoding alone: with plain, steered and the gates

Every repeat times all variants one after another, in turn; the table shows medians of tokens/s and, as the cost, the median over repeats of
(time of the variant / time of plain in the same repeat), with its quartiles; "fastest" is the ratio of the fastest repeats, which
other work on the machine disturbs least. Forward passes run in eval mode without gradients; "teacher" runs whole texts through the
decoder, "decode" feeds one token a row through a filled cache, language-model head included. Times are CPU time of the one thread, so that
other work on the machine weighs little.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from expert_stats.counter import RoutingCounter
from moe_steer import ExpertGain, SteeringPlan, load_model, observe_routing, steer
from moe_steer.gates import Probe
from moe_steer.layers import model_shape
from moe_steer.tokens.markers import Marker, MarkerSet
from moe_steer.tokens.traces import Trace

VARIANTS = ("plain", "observed", "counted", "steered", "gated", "on entropy")
"""gated: the steered plan on a probe with hysteresis and a ramp; on entropy: the same on the model's own entropy (in decoding alone).
counted: whole texts alone, as traces are counted."""
GAIN = 1 + 1e-9
"""Hooked and multiplied like any gain, and 1 in float32: the work of the steered model is the plain one's to the bit. A large gain changes
what later layers route, and so what the experts cost, which is not the price of steering."""
Prepare = Callable[[torch.Tensor], None]


def middle_model() -> Any:
    """DeepSeek-V3's architecture with at least 100 million parameters, random weights."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        moe_intermediate_size=256,
        num_hidden_layers=9,
        num_attention_heads=8,
        num_key_value_heads=8,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        max_position_embeddings=2048,
    )
    return DeepseekV3ForCausalLM(config).eval().requires_grad_(False)


@contextlib.contextmanager
def variant(
    name: str, model: Any, plan: SteeringPlan, prompt: int, batch: int, teacher_forced: bool
) -> Iterator[Prepare]:
    """The model under one variant; yields what must be called with the ids before every forward."""
    if name == "plain":
        yield lambda ids: None
    elif name == "observed":
        with observe_routing(model, lambda layer, topk_ids_TK, topk_weights_TK: None):
            yield lambda ids: None
    elif name == "counted":
        markers = MarkerSet(
            markers=(Marker(name="x", forms=((5,),)), Marker(name="y", forms=((6,),))), coefficients=(1.0, -1.0)
        )
        counter = RoutingCounter(model_shape(model), markers)
        number = itertools.count()  # a trace is counted once: every forward has traces of its own

        def prepare(ids: torch.Tensor) -> None:
            rows = ids.tolist()
            counter.expect(
                [Trace(str(next(number)), tuple(row), min(prompt, len(row) - 1), None, None) for row in rows],
                len(rows[0]),
            )

        with observe_routing(model, counter):
            yield prepare
    elif name == "steered":
        with steer(model, plan, quiet=True):
            yield lambda ids: None
    else:
        with tempfile.TemporaryDirectory() as folder:
            gated = gated_plan(model, plan, name, folder)
            with steer(model, gated, quiet=True, prompt_lengths=[prompt] * batch if teacher_forced else None):
                yield lambda ids: None


def gated_plan(model: Any, plan: SteeringPlan, name: str, folder: str) -> SteeringPlan:
    """The plan with a gate on all its entries, open at about half of the tokens."""
    width = model.config.hidden_size
    layer = plan.experts[0].layer - 1
    weight_D = torch.randn(width, generator=torch.Generator().manual_seed(2))
    Probe(weight_D=weight_D, bias=0.0, layer=max(layer, 0)).save(f"{folder}/probe.safetensors")
    on_probe = {"on": "probe", "file": "probe.safetensors", "above": 0.5, "until": 0.4, "ramp": 4}
    when = on_probe if name == "gated" else {"on": "entropy", "above": 2.0, "until": 1.5}
    experts = [ExpertGain(one.layer, one.expert, one.gain, when=when) for one in plan.experts if one.layer > layer]
    return SteeringPlan(experts=experts, base_dir=folder)


def teacher(model: Any, ids: torch.Tensor, prepare: Prepare) -> float:
    """CPU seconds of one pass over whole texts."""
    start = time.process_time()
    prepare(ids)
    model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return time.process_time() - start


def decode(model: Any, ids: torch.Tensor, prepare: Prepare, steps: int) -> float:
    """CPU seconds of ``steps`` single-token steps after the prompt, prefill not included."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    mask = torch.ones(len(ids), ids.shape[1] + steps, dtype=torch.long)
    prepare(ids)
    model(input_ids=ids, attention_mask=mask[:, : ids.shape[1]], past_key_values=cache, logits_to_keep=1)
    token = ids[:, -1:]
    start = time.process_time()
    for step in range(steps):
        prepare(token)
        out = model(
            input_ids=token, attention_mask=mask[:, : ids.shape[1] + step + 1], past_key_values=cache, logits_to_keep=1
        )
        token = out.logits[:, -1].argmax(-1, keepdim=True)
    return time.process_time() - start


def measure(label: str, model: Any, repeats: int, decode_only: bool) -> None:
    """Print the table of one model."""
    shape = model_shape(model)
    layers = [shape.moe_layers[1], shape.moe_layers[-1]]
    plan = SteeringPlan(experts=[ExpertGain(layer, 1, GAIN) for layer in layers])
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"\n{label}: {millions:.1f} M parameters, {len(shape.moe_layers)} MoE layers, plan names {len(layers)} of them"
    )
    print(f"{'work':<18}{'variant':<10}{'tokens/s':>10}{'cost':>8}   quartiles of the cost   fastest   repeats")
    for mode in ("decode",) if decode_only else ("teacher", "decode"):
        names = [name for name in VARIANTS if name != ("on entropy" if mode == "teacher" else "counted")]
        names = [name for name in names if name != "observed"] if decode_only else names
        for batch in (1, 32):
            length, steps = (128 if batch == 1 else 48, 0) if mode == "teacher" else (32, 16)
            ids = torch.randint(7, 200, (batch, length), generator=torch.Generator().manual_seed(1))
            seconds: dict[str, list[float]] = {name: [] for name in names}
            for repeat in range(repeats + 1):
                turn = repeat % len(names)
                order = names[turn:] + names[:turn]
                for name in order:
                    with variant(name, model, plan, 16, batch, mode == "teacher") as prepare:
                        if mode == "teacher":
                            took = sum(teacher(model, ids, prepare) for _ in range(8 if batch == 1 else 1))
                        else:
                            took = decode(model, ids, prepare, steps)
                    if repeat:  # the first round warms up
                        seconds[name].append(took)
            tokens = batch * (steps or length * (8 if batch == 1 else 1))
            for name in names:
                ratios = [mine / plain for mine, plain in zip(seconds[name], seconds["plain"], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                speed = tokens / statistics.median(seconds[name])
                print(
                    f"{mode + ', batch ' + str(batch):<18}{name:<10}{speed:>10.0f}{middle:>8.3f}   {low:.3f} - {high:.3f}{min(seconds[name]) / min(seconds['plain']):>18.3f}{repeats:>10}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the lab model only")
    parser.add_argument("--decode", action="store_true", help="decoding alone")
    parser.add_argument("--repeats", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.set_grad_enabled(False)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"commit {commit}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread"
    )
    measure("lab model", load_model("lab")[0], options.repeats, options.decode)
    if not options.quick:
        measure("random model", middle_model(), options.repeats, options.decode)


if __name__ == "__main__":
    main()
