"""Tokens a second of the in-process sampler against ``model.generate`` on answers of very different lengths.

    OMP_NUM_THREADS=1 python tests/bench/sampler_speed.py [--model DIR] [--problems 64] [--samples 4] [--batch 64] [--repeats 3]

Both get the same prompts, batches, sampling rule and token limit. Then "lengths differ": answers whose lengths have a heavy
tail, with rows that take free places and, in turn, batch by batch to the end. The last lines check that greedy tokens are
identical.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from moe_steer.lab import LAB_MODEL
from moe_steer.lab.problems import generate_problems
from reasoning_evals.engines.in_process import InProcessSampler
from reasoning_evals.engines.sampling import Request, SamplingConfig
from reasoning_evals.runs.run_folder import provenance


def ours(sampler: InProcessSampler, requests: list[Request], config: SamplingConfig) -> dict[Any, tuple[int, ...]]:
    """Key -> generated ids."""
    return {sample.key: sample.token_ids for sample in sampler.sample(requests, config)}


def library(sampler: InProcessSampler, requests: list[Request], config: SamplingConfig) -> dict[Any, tuple[int, ...]]:
    """The same by ``model.generate``, batches by prompt length too, ids cut after the stop token."""
    model, results = sampler.model, {}
    pad = sampler.tokenizer.pad_token_id
    rule: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if not config.greedy:
        rule = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    order = sorted(requests, key=lambda request: -len(request.prompt_ids))
    for start in range(0, len(order), config.batch_size):
        batch = order[start : start + config.batch_size]
        width = max(len(request.prompt_ids) for request in batch)
        padding = [width - len(request.prompt_ids) for request in batch]
        ids = torch.tensor([[pad] * p + list(request.prompt_ids) for p, request in zip(padding, batch, strict=True)])
        mask = torch.tensor([[0] * p + [1] * (width - p) for p in padding])
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=config.max_new_tokens,
            **rule,
        )
        for request, row in zip(batch, output[:, width:].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in sampler.stop_ids), len(row))
            results[request.key] = tuple(row[:end])
    return results


def rate(call: Callable[[], dict[Any, tuple[int, ...]]], repeats: int) -> tuple[float, float, float]:
    """Median, least and most tokens a second of process time (other processes may share the cores)."""
    rates = []
    for _ in range(repeats):
        start = time.process_time()
        rates.append(sum(map(len, call().values())) / (time.process_time() - start))
    return statistics.median(rates), min(rates), max(rates)


class HeavyTail(LogitsProcessor):
    """Ends each answer after a number of tokens that depends on its prompt alone: half after 30, a tenth after 150, some at ``most``."""

    def __init__(self, sampler: InProcessSampler, requests: list[Request], most: int) -> None:
        self._stop = sampler.stop_ids[0]
        generator = torch.Generator().manual_seed(0)
        limits = (15 / torch.rand(len(requests), generator=generator)).clamp(max=most - 1).long().tolist()
        self._limits = {request.prompt_ids: limit for request, limit in zip(requests, limits, strict=True)}
        self.rows = 0
        self.steps = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps += 1
        self.rows += len(scores)
        for row, ids in enumerate(input_ids.tolist()):
            real = tuple(ids[next(place for place, token in enumerate(ids) if token) :])
            prompt = next(real[:size] for size in range(len(real), 0, -1) if real[:size] in self._limits)
            ends = len(real) - len(prompt) >= self._limits[prompt]
            stop = scores[row, self._stop].item()
            scores[row, self._stop] = -torch.inf
            if ends:
                scores[row] = -torch.inf
                scores[row, self._stop] = stop
        return scores


def lengths_differ(model: Any, tokenizer: Any, batch: int, most: int, repeats: int) -> None:
    """Time with and without rows that take free places, in turn, on eight batches of requests."""
    sampler = InProcessSampler(model, tokenizer)
    problems = generate_problems("test", 8 * batch)
    requests = [Request(sampler.render(p.prompt).token_ids, i, i) for i, p in enumerate(problems)]
    requests.sort(key=lambda request: -len(request.prompt_ids))
    config = SamplingConfig(max_new_tokens=most, batch_size=batch, greedy=True)
    seconds: dict[str, list[float]] = {"refilled": [], "to the end": []}
    for _ in range(repeats):
        for name, chunk in (("refilled", len(requests)), ("to the end", batch)):
            tail = HeavyTail(sampler, requests, most)
            sampler = InProcessSampler(model, tokenizer, processors=LogitsProcessorList([tail]))
            start, made = time.process_time(), {}
            for first in range(0, len(requests), chunk):
                made |= ours(sampler, requests[first : first + chunk], config)
            seconds[name].append(time.process_time() - start)
            print(
                f"  {name:11} {seconds[name][-1]:6.1f} s  {tail.steps} forwards of {tail.rows / tail.steps:.0f} rows",
                flush=True,
            )
    ratio = statistics.median(a / b for a, b in zip(seconds["to the end"], seconds["refilled"], strict=True))
    print(f"lengths differ: refilling is {ratio:.2f} times as fast")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(LAB_MODEL))
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    sampler = InProcessSampler(model, AutoTokenizer.from_pretrained(args.model))
    config = SamplingConfig(max_new_tokens=args.max_new_tokens, batch_size=args.batch)
    requests = [
        Request(sampler.render(problem.prompt).token_ids, 1000 * i + j, (i, j))
        for i, problem in enumerate(generate_problems("test", args.problems))
        for j in range(args.samples)
    ]
    found = provenance()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, commit {found['commit']}, {found['versions']}")
    lengths = sorted(map(len, ours(sampler, requests, config).values()))
    print(
        f"{len(requests)} samples, batch {args.batch}; tokens: median {lengths[len(lengths) // 2]}, most {lengths[-1]}"
    )
    library(sampler, requests[: args.batch], config)  # warm up
    mine = rate(lambda: ours(sampler, requests, config), args.repeats)
    theirs = rate(lambda: library(sampler, requests, config), args.repeats)
    for name, (median, least, most) in (("in-process sampler", mine), ("model.generate", theirs)):
        print(f"{name:20} {median:8.0f} tokens/s  ({least:.0f} to {most:.0f})")
    print(f"ratio {mine[0] / theirs[0]:.1f}")
    lengths_differ(model, sampler.tokenizer, args.batch, args.max_new_tokens, args.repeats)
    greedy = SamplingConfig(max_new_tokens=args.max_new_tokens, batch_size=args.batch, greedy=True)
    once = [request for request in requests if request.key[1] == 0]
    a, b = ours(sampler, once, greedy), library(sampler, once, greedy)
    print(f"greedy: {sum(a[key] == b[key] for key in a)} of {len(a)} answers identical")


if __name__ == "__main__":
    main()
