"""The statistics pass against the way STA's release goes about it, on the same pairs, with the same vectors at the end.

    .venv/bin/python tests/bench/direction_speed.py            about 8 minutes on one thread
    .venv/bin/python tests/bench/direction_speed.py --quick    fewer pairs and repeats

The released way, written down again: one answer at a time, prompt included, in float32; a forward of the whole network
with the SAE spliced in at the layer (encoded and decoded at every token), head over all tokens and loss included, keeps
the mean activations of the answer and of the question, for one layer a run; another one, without SAEs, keeps the mean
residual stream of every layer for CAA. That makes four whole forwards a pair at batch 1 for one layer, ten for four; the
N x F means are stacked at the end. It is called on the same transformers model, so what the release loses to the library
that it hooks models with is not counted. Ours: one batched pass up to the layer, every prompt once for both answers, no head, atoms of answer tokens alone, sums;
and the same pass serves several layers.

Two shapes, random weights: the embedded dense model and a decoder of 24 million parameters. Prompts of 30-100 tokens, 8
atoms a dimension (Gemma Scope's smallest on Gemma-2-9b: 4.6), one layer in the middle, as in the paper (layer 20 of 42),
and four around it, as in its sweep. "Arithmetic" is the ratio of the multiplications with weights alone: one CPU thread
is bound by them, so the measured ratio stays near it, and what one layer can gain ends there: half the layers, one pass
for two, one prompt for two. Times are CPU time of the one thread; a repeat runs both ways, and the table shows medians
with the quartiles of their ratio.

"Apart" is the difference of both ways' vectors as a share of their norm. An activation within rounding of its JumpReLU
threshold may fire one way only; STA's ranks then gain or lose a whole atom, which shows as some 1e-2 in float32. Whether
the two ways are the same computation is therefore settled once more in float64, unmeasured.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import random
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expert_stats import MarkedSequence, collect_contrast
from moe_steer.directions import DirectionWarning, caa, sta
from moe_steer.directions.target_atoms import select_released
from moe_steer.saes import SAE
from moe_steer.saes.sae import SAEAbout

KEEP = 0.35
PROMPT = (30, 100)
SIDES = ("positive", "negative")
ANSWERS = ((4, 12), (40, 160))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model of Qwen2's architecture and the layers whose directions are wanted."""

    name: str
    width: int
    inner: int
    num_layers: int
    vocab: int
    atoms: int
    layers: tuple[int, ...]
    num_pairs: int

    def arithmetic(self, sequences: list[MarkedSequence], layers: tuple[int, ...]) -> float:
        """How many times more multiplications with weights the released way takes."""
        one_layer = 3 * self.width**2 + 3 * self.width * self.inner  # 4 heads for queries, 2 for keys and values
        encode = self.width * self.atoms
        tokens = sum(len(item.token_ids) for item in sequences)
        answers = sum(len(item.positive + item.negative) for item in sequences)
        once = answers + (tokens - answers) // 2
        whole = self.num_layers * one_layer + self.width * self.vocab
        released = tokens * ((len(layers) + 1) * whole + len(layers) * 2 * encode)
        return released / (once * (max(layers) + 1) * one_layer + len(layers) * answers * encode)

    def model(self) -> Any:
        """Random weights, float32."""
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        )
        return Qwen2ForCausalLM(config).eval().requires_grad_(False)


LAB = Shape(
    name="lab-dense", width=128, inner=416, num_layers=5, vocab=998, atoms=1024, layers=(0, 1, 2, 3), num_pairs=32
)
SMALL = Shape(
    name="24 M", width=256, inner=1024, num_layers=16, vocab=16384, atoms=2048, layers=(4, 6, 7, 9), num_pairs=12
)


def random_sae(width: int, atoms: int, layer: int, seed: int = 0) -> SAE:
    """JumpReLU with thresholds at which a minority of the atoms fires."""
    generator = torch.Generator().manual_seed(seed)
    decoder_FD = torch.randn(atoms, width, generator=generator) / width**0.5
    return SAE(
        kind="jumprelu",
        W_enc_DF=decoder_FD.T.contiguous(),
        b_enc_F=torch.zeros(atoms),
        W_dec_FD=decoder_FD,
        b_dec_D=torch.zeros(width),
        apply_b_dec_to_input=False,
        about=SAEAbout(format="trained", source="random", sha256="", layer=layer, site="residual"),
        threshold_F=torch.full((atoms,), 0.05),
    )


def pairs(number: int, prompt: tuple[int, int], answer: tuple[int, int], vocab: int) -> list[MarkedSequence]:
    """Answers to common prompts, of lengths drawn between the given ones."""
    draw = random.Random(0)
    found = []
    for index in range(number):
        question = [draw.randrange(vocab) for _ in range(draw.randint(*prompt))]
        for side in ("positive", "negative"):
            ids = (*question, *(draw.randrange(vocab) for _ in range(draw.randint(*answer))))
            marked = {side: tuple(range(len(question), len(ids)))}
            found.append(MarkedSequence(f"{index}{side}", ids, pair=str(index), **marked))
    return found


def released_way(model: Any, sequences: list[MarkedSequence], saes: dict[int, SAE]) -> list[tuple[Tensor, Tensor]]:
    """(CAA vector, STA vector) for every layer: two whole forwards a pair for each layer's atoms, and two for CAA."""
    watchers = dict.fromkeys(saes, _watch)
    hidden = _answer_means(model, sequences, watchers)
    found = []
    for layer, sae in saes.items():
        acts = _answer_means(model, sequences, {layer: functools.partial(_splice, sae)})
        p_NF, n_NF = (torch.stack(acts[side, layer]) for side in SIDES)
        caa_D = (torch.stack(hidden["positive", layer]) - torch.stack(hidden["negative", layer])).mean(0)
        amplitude_F = (p_NF - n_NF).mean(0)
        kept_F = select_released(amplitude_F, (p_NF > 0).sum(0) - (n_NF > 0).sum(0), KEEP).kept_F
        vector_D = torch.where(kept_F, amplitude_F, 0) @ sae.W_dec_FD
        found.append((caa_D, vector_D * caa_D.norm() / vector_D.norm()))
    return found


def _watch(h_TD: Tensor) -> tuple[Tensor, Tensor]:
    return h_TD, h_TD


def _splice(sae: SAE, h_TD: Tensor) -> tuple[Tensor, Tensor]:
    acts_TF = sae.encode(h_TD)
    return acts_TF, sae.decode(acts_TF)


def _answer_means(
    model: Any, sequences: list[MarkedSequence], at: dict[int, Callable[[Tensor], tuple[Tensor, Tensor]]]
) -> dict[tuple[str, int], list[Tensor]]:
    """(side, layer) -> of every sequence, the mean over its answer of what ``at[layer]`` sees there, which also says what
    the layer hands on."""
    means: dict[tuple[str, int], list[Tensor]] = {(side, layer): [] for side in SIDES for layer in at}
    seen: dict[int, Tensor] = {}

    def hook_of(layer: int) -> Callable[[Any, Any, Any], Any]:
        def hook(_: Any, __: Any, output: Any) -> Any:
            seen[layer], passed_on = at[layer]((output[0] if isinstance(output, tuple) else output)[0])
            return (passed_on[None], *output[1:]) if isinstance(output, tuple) else passed_on[None]

        return hook

    handles = [model.model.layers[layer].register_forward_hook(hook_of(layer)) for layer in at]
    for item in sequences:
        ids = torch.tensor([item.token_ids])
        logits = model(ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        start = min(item.positive + item.negative)
        for layer, states_T in seen.items():
            states_T[:start].mean(0)  # of the question: computed, never used
            means["positive" if item.positive else "negative", layer].append(states_T[start:].mean(0))
    for handle in handles:
        handle.remove()
    return means


def our_way(model: Any, sequences: list[MarkedSequence], saes: dict[int, SAE]) -> list[tuple[Tensor, Tensor]]:
    """The same two vectors for every layer."""
    contrasts = collect_contrast(model, sequences, list(saes), saes=saes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DirectionWarning)
        return [
            (caa(contrasts[layer]).vector_D, sta(contrasts[layer], sae, keep=KEEP, parity=True).vector_D)
            for layer, sae in saes.items()
        ]


def apart(mine: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Of the CAA and of the STA vectors, the largest difference over the layers, as a share of the norm."""
    caa_apart, sta_apart = (
        max(
            float((one[kind] - other[kind]).norm() / other[kind].norm())
            for one, other in zip(mine, theirs, strict=True)
        )
        for kind in (0, 1)
    )
    return caa_apart, sta_apart


def row(shape: Shape, model: Any, layers: tuple[int, ...], answer: tuple[int, int], repeats: int) -> str:
    """Measure both ways; one line of the table."""
    sequences = pairs(shape.num_pairs, PROMPT, answer, shape.vocab)
    saes = {layer: random_sae(shape.width, shape.atoms, layer) for layer in layers}
    seconds: dict[str, list[float]] = {"released": [], "ours": []}
    for repeat in range(repeats + 1):
        start = time.process_time()
        theirs = released_way(model, sequences, saes)
        between = time.process_time()
        mine = our_way(model, sequences, saes)
        if repeat:  # the first round warms up
            seconds["released"].append(between - start)
            seconds["ours"].append(time.process_time() - between)
    ratios = [slow / fast for slow, fast in zip(seconds["released"], seconds["ours"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    caa_apart, sta_apart = apart(mine, theirs)
    exact_saes = {layer: sae.to(dtype=torch.float64) for layer, sae in saes.items()}
    model.double()
    exact = max(apart(our_way(model, sequences, exact_saes), released_way(model, sequences, exact_saes)))
    model.float()
    tokens = sum(len(item.token_ids) for item in sequences)
    released_s, ours_s = (statistics.median(seconds[name]) for name in ("released", "ours"))
    return (
        f"{shape.name:<11}{len(layers):>6}{answer[0]:>6}-{answer[1]:<5}{tokens:>7}{released_s:>12.2f}{ours_s:>8.2f}{middle:>8.1f}x"
        f"   {low:>5.1f} - {high:<5.1f}{shape.arithmetic(sequences, layers):>11.1f}x{caa_apart:>10.1e}{sta_apart:>10.1e}{exact:>14.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the lab's shape only, fewer repeats")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.set_grad_enabled(False)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"commit {commit}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread"
    )
    for shape in (LAB,) if options.quick else (LAB, SMALL):
        print(
            f"{shape.name}: width {shape.width}, {shape.num_layers} layers, {shape.atoms} atoms, vocabulary {shape.vocab}, {shape.num_pairs} pairs; "
            f"one layer: {shape.layers[2]}, four: {', '.join(map(str, shape.layers))}"
        )
    print(
        "model      layers    answer tokens  released s  ours s  faster   quartiles     arithmetic  CAA apart STA apart  both, float64"
    )
    for shape in (LAB,) if options.quick else (LAB, SMALL):
        model = shape.model()
        for layers in (shape.layers[2:3], shape.layers):
            for answer in ANSWERS:
                print(row(shape, model, layers, answer, 3 if options.quick or shape is SMALL else 5), flush=True)


if __name__ == "__main__":
    main()
