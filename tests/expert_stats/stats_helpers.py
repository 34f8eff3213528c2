"""Tokenizers, traces and counts for the tests of this room; the tiny models are those of tests/moe_steer/tiny.py."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from typing import Any

import numpy as np

from expert_stats import CountsSignature, RoutingCounts, TraceCounts
from expert_stats.trace_counts import NUM_BINS, bins_of
from moe_steer.tokens.markers import Marker, MarkerSet
from moe_steer.tokens.traces import Trace

THINK, END_THINK, ALTERNATIVELY = 1, 2, (3, 4)
VOCAB = 40
MARKERS = MarkerSet(
    markers=(
        Marker("<think>", ((THINK,),)),
        Marker("</think>", ((END_THINK,),)),
        Marker("Alternatively", (ALTERNATIVELY, (5,))),
    )
)
TEXTS = [
    "Alternatively, we can wait. Wait, that is so. So the solution is awaiting us, alternatively not.\n\nAlternatively no.",
    "Let me think (wait) about the other solution; the waiter is waiting for what we wait for.",
] * 20


def byte_tokenizer(vocab_size: int = 400) -> Any:
    """Byte-level BPE, as DeepSeek's and Qwen's, with the tags as added tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<eos>"])
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.add_tokens(["<think>", "</think>"])
    return fast


def metaspace_tokenizer() -> Any:
    """BPE over words that carry their space as a prefix, as Llama-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def word_tokenizer() -> Any:
    """Whole words only; anything else is unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<think>", "</think>", "Wait", "wait", "the", "Alternatively", ",", "."]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def random_traces(num: int, seed: int = 0, longest: int = 40) -> list[Trace]:
    """Prompts that end in the opening tag, responses with all markers in them; two samples a problem."""
    rng = random.Random(seed)
    traces = []
    for index in range(num):
        prompt = [rng.randrange(6, VOCAB) for _ in range(rng.randrange(3, 9))] + [THINK, 7]
        thought = [rng.randrange(1, VOCAB) for _ in range(rng.randrange(2, longest))]
        thought[len(thought) // 2 : len(thought) // 2] = list(ALTERNATIVELY)
        answer = [END_THINK] + [rng.randrange(6, VOCAB) for _ in range(3)]
        ids = tuple(prompt + thought + answer)
        traces.append(Trace(f"problem-{index // 2}#{index % 2}", ids, len(prompt)))
    return traces


def signature(num_layers: int = 2, num_experts: int = 4, top_k: int = 2, **changes: Any) -> CountsSignature:
    """A signature whose first decoder layer is dense."""
    model = {
        "model_type": "deepseek_v3",
        "num_layers": num_layers + 1,
        "num_experts": num_experts,
        "top_k": top_k,
        "moe_layers": list(range(1, num_layers + 1)),
        "hidden_size": 8,
        "name": "here",
    }
    return CountsSignature(**{"model": model, "markers": MARKERS.to_dict(), **changes})


def random_counts(
    seed: int = 0,
    num_problems: int = 4,
    num_layers: int = 2,
    num_experts: int = 4,
    top_k: int = 2,
    tokens: int = 40,
    prefix: str = "",
    families: tuple[str, ...] = ("",),
    samples: int = 1,
) -> RoutingCounts:
    """Counts of simulated tokens, so that every law holds: each token routes to ``top_k`` experts a layer and may be a marker."""
    rng = np.random.default_rng(seed)
    popularity_E = np.log(np.arange(1, num_experts + 1))
    traces = []
    for number in range(num_problems * samples):
        marker_T = rng.integers(0, 8, size=int(rng.integers(tokens // 2, tokens)))  # 3 and above: no marker
        bins_T = bins_of(np.arange(len(marker_T)), 2, len(marker_T))
        liking_TE = popularity_E + 2 * (np.arange(num_experts) % 3 == marker_T[:, None])
        total_B, marker_MB = np.bincount(bins_T, minlength=NUM_BINS), np.zeros((3, NUM_BINS), np.int64)
        expert_BLE = np.zeros((NUM_BINS, num_layers, num_experts), np.int64)
        joint_MLE = np.zeros((3, num_layers, num_experts), np.int64)
        np.add.at(marker_MB, (marker_T[marker_T < 3], bins_T[marker_T < 3]), 1)
        for layer in range(num_layers):
            chosen_TK = np.argsort(liking_TE + rng.gumbel(size=liking_TE.shape), axis=1)[:, -top_k:]
            np.add.at(expert_BLE, (bins_T[:, None], layer, chosen_TK), 1)
            for marker in range(3):
                at_marker = chosen_TK[marker_T == marker].ravel()
                joint_MLE[marker, layer] = np.bincount(at_marker, minlength=num_experts)
        problem, sample = divmod(number, samples)
        name, family = f"{prefix or seed}-{problem}#{sample}", families[problem % len(families)]
        traces.append(TraceCounts.pack(name, expert_BLE, joint_MLE, marker_MB, total_B, family=family))
    place = signature(num_layers, num_experts, top_k)
    return RoutingCounts(signature=place, traces=tuple(traces), versions={"torch": (f"2.{seed % 3}",)}).check()


def counts_of(cells: Iterable[tuple[int, int, int, int]]) -> RoutingCounts:
    """One layer, one trace, one marker, top 1: cells are (joint, expert) pairs with (marker, total) shared by all.

    The last expert takes what is left, so that the laws hold.
    """
    rows = list(cells)
    marker, total = rows[0][2], rows[0][3]
    joint = [row[0] for row in rows] + [marker - sum(row[0] for row in rows)]
    expert = [row[1] for row in rows] + [total - sum(row[1] for row in rows)]
    only = MarkerSet(markers=(Marker("<think>", ((THINK,),)),))
    expert_BLE = np.zeros((NUM_BINS, 1, len(joint)), np.int64)
    marker_MB, total_B = np.zeros((1, NUM_BINS), np.int64), np.zeros(NUM_BINS, np.int64)
    expert_BLE[1, 0], marker_MB[0, 1], total_B[1] = expert, marker, total
    trace = TraceCounts.pack("only", expert_BLE, np.array([[joint]]), marker_MB, total_B)
    return RoutingCounts(signature=signature(1, len(joint), 1, markers=only.to_dict()), traces=(trace,)).check()


def changed(counts: RoutingCounts, number: int, **arrays: Any) -> RoutingCounts:
    """One trace of the counts with other arrays (expert_BLE, joint_MLE, marker_MB, total_B), unchecked."""
    trace = counts.traces[number]
    expert_BLE, joint_MLE = trace.expert_and_joint(len(counts.moe_layers), counts.num_experts)
    own = {"expert_BLE": expert_BLE, "joint_MLE": joint_MLE, "marker_MB": trace.marker_MB, "total_B": trace.total_B}
    new = TraceCounts.pack(trace.trace_id, **{**own, **arrays}, digest=trace.digest, family=trace.family)
    return dataclasses.replace(counts, traces=(*counts.traces[:number], new, *counts.traces[number + 1 :]))


def subset(counts: RoutingCounts, numbers: Iterable[int]) -> RoutingCounts:
    """Only some of the traces, by their number; without references, which are sums over all."""
    return dataclasses.replace(counts, traces=tuple(counts.traces[number] for number in numbers), references=None)
