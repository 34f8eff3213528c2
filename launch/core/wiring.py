"""Where two rooms meet: what one room makes, in the form in which the next one takes it; one plan and one count over ranks."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from expert_stats import (
    MarkerSet,
    RoutedTrace,
    RoutingCounts,
    Trace,
    batches,
    collect_counts,
    read_rollouts,
    read_traces,
    reduce_counts,
    reference_tokens,
    routed_trace,
    trace_from_ids,
)
from launch.core.prompt_options import read_words
from launch.core.ranks import Ranks, speaks
from moe_steer import SteeringPlan
from moe_steer.backends import layout_of, lockstep
from moe_steer.layers import ModelShape
from moe_steer.thinking import thinking_format, token_tags
from reasoning_evals import Completion
from reasoning_evals.runs import RUN_FILE, read_completions, read_generations, read_run, sample_name

# They live as long as the process, like the plans that read from them.
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
ANOTHER = "they were made with another tokenizer; give that model, or sample again with this one"


def traces_of(completions: Iterable[Completion], tokenizer: Any) -> list[Trace]:
    """Completions as traces: prompt and generated ids, with the span of the thought."""
    tags = token_tags(tokenizer)
    prompt_ids: dict[str, list[int]] = {}
    traces = []
    for item in completions:
        if item.prompt not in prompt_ids:
            prompt_ids[item.prompt] = tokenizer(item.prompt, add_special_tokens=False)["input_ids"]
        trace = trace_from_ids(sample_name(item), prompt_ids[item.prompt], item.token_ids, tags)
        traces.append(dataclasses.replace(trace, family=item.task))
    return traces


def read_any_traces(paths: Sequence[str], tokenizer: Any, arm: str | None = None) -> list[Trace]:
    """Traces from trace files, generation files (generations*.jsonl) or run folders; ValueError when there are none.

    ``arm``: of runs of several arms, the one to read. Without it they are refused: what a model says when steered, or with
    words banned, is not a sample of the model.
    """
    found: list[Trace] = []
    for name in paths:
        path = Path(name)
        folders = sorted({file.parent for file in path.rglob("generations*.jsonl")}) if path.is_dir() else []
        if not folders and not path.is_file():
            raise ValueError(f"no traces at {name!r}: give trace files, generations*.jsonl, or the folder of a run")
        if not folders and not path.name.startswith("generations"):
            traces = read_traces(path, strict=True)
            _check_traces(path, traces, tokenizer)
            found += traces
            continue
        sampled = {folder: list(read_generations(folder)) for folder in folders} or {path: list(read_completions(path))}
        arms = sorted({item.arm for completions in sampled.values() for item in completions})
        if len(arms) > 1 and arm is None:
            raise ValueError(
                f"{name} holds the answers of {len(arms)} arms ({', '.join(arms[:8])}): name one with --arm, or give a folder of one"
            )
        for source, completions in sampled.items():
            _say_unfinished(source, completions)
            wanted = _of_arm(source, completions, arm)
            _check_completions(source, wanted, tokenizer)
            found += traces_of(wanted, tokenizer)
    if not found:
        raise ValueError(f"{', '.join(paths)} hold no traces: there is nothing to count")
    return found


def _config_of(folder: Path) -> dict[str, Any]:
    return dict(read_run(folder)["config"]) if (folder / RUN_FILE).is_file() else {}


def _say_unfinished(source: Path, completions: Sequence[Completion]) -> None:
    config = _config_of(source)
    if "arm_order" in config and speaks():
        asked = len(config["arm_order"]) * config["num_problems"] * config["k"]
        if (number := len(completions)) < asked:
            print(f"NOTE: {source} is not finished, {number} of its {asked} answers are read", file=sys.stderr)


def text_lines(name: str) -> list[str]:
    """The texts of a file, one a line, without blank lines. ValueError where there are none."""
    text = read_words(name, f"the file of texts {name!r}", "give one with a text a line")
    return [line for line in text.splitlines() if line.strip()]


def read_routed(paths: Sequence[str], tokenizer: Any, shape: ModelShape) -> Iterator[RoutedTrace]:
    """Responses with the routing that their engine recorded, one by one, held against the model's shape and tokenizer."""
    tags = token_tags(tokenizer)
    seen: Counter[str] = Counter()
    for rollout in (rollout for path in paths for rollout in read_rollouts(path)):
        name = f"{rollout.problem}#{seen[rollout.problem]}"
        seen[rollout.problem] += 1
        try:
            trace = trace_from_ids(name, rollout.prompt_ids, rollout.response_ids, tags)
            if max(trace.token_ids) >= len(tokenizer):
                raise ValueError(f"token {max(trace.token_ids)} is none of this model's {len(tokenizer)}: {ANOTHER}")
            item = routed_trace(trace, rollout.topk_ids, shape, first=rollout.first, topk_weights=rollout.topk_weights)
        except ValueError as error:
            raise ValueError(f"{rollout.where}: {error}") from error
        yield item


def _of_arm(file: Path, completions: list[Completion], arm: str | None) -> list[Completion]:
    found = [item for item in completions if arm is None or item.arm == arm]
    if completions and not found:
        raise ValueError(
            f"{file} holds no answers of the arm {arm!r}: it has {', '.join({item.arm for item in completions})}"
        )
    return found


def _check_traces(file: Path, traces: Iterable[Trace], tokenizer: Any) -> None:
    """ValueError for token ids of another tokenizer: the end of a thought is where they show."""
    tags = token_tags(tokenizer)
    for trace in traces:
        end = trace.thought_end
        if tags and end is not None and end < len(trace.token_ids) and not tags.at(trace.token_ids, end):
            raise ValueError(
                f"{file}: the thought of trace {trace.trace_id!r} ends in token {trace.token_ids[end]}, and this model's "
                f"ends in {list(tags.close)}: {ANOTHER}"
            )


def _check_completions(file: Path, completions: Iterable[Completion], tokenizer: Any) -> None:
    fmt, tags = thinking_format(tokenizer), token_tags(tokenizer)
    closing = [switch.text for switch in fmt.switches if switch.closes]
    for item in completions:
        if item.num_tokens is not None or item.prompt.startswith('[{"role": "'):
            raise ValueError(
                f"{file}: the answer to {item.problem_id!r} came from a chat endpoint, which does not show its prompt token by "
                "token: sample it from completions, or with the model loaded"
            )
        shown = [text for text in closing if text in item.text]
        ids = item.token_ids
        if tags and ids and shown and not any(tags.at(ids, p) for p in range(len(ids))):
            raise ValueError(
                f"{file}: the answer to {item.problem_id!r} holds {shown[0]}, and its tokens do not hold this model's "
                f"({list(tags.close)}): {_another(file, item.arm)}"
            )
        if ids and not item.is_of(tokenizer):
            raise ValueError(
                f"{file}: the tokens of the answer to {item.problem_id!r} are another text here: {_another(file, item.arm)}"
            )


def _another(source: Path, arm: str) -> str:
    """``ANOTHER``, with the model's name where the run says it."""
    arms = _config_of(source if source.is_dir() else source.parent).get("arms", {})
    name = arms.get(arm, {}).get("sampler", {}).get("model")
    return ANOTHER.replace("that model", f"that model, {name}" if name else "that model")


def markers_for(tokenizer: Any, names: Sequence[str], coefficients: Mapping[str, float]) -> MarkerSet:
    """The named markers under a tokenizer; a word that has a coefficient is added to the names."""
    wanted = [*names, *(name for name in coefficients if name not in names)]
    return MarkerSet.from_tokenizer(tokenizer, wanted, coefficients)


def references_for(tokenizer: Any, traces: Iterable[Trace], markers: MarkerSet) -> Mapping[int, str]:
    """The tokens that markers are compared with, with their texts."""
    return reference_tokens(traces, markers, lambda token: str(tokenizer.decode([token])))


def parse_coefficients(items: Iterable[str]) -> dict[str, float]:
    """``NAME=NUMBER`` pairs; ValueError names the one that is none."""
    result = {}
    for item in items:
        name, sign, number = item.rpartition("=")
        try:
            result[name] = float(number)
        except ValueError:
            sign = ""
        if not name or not sign:
            raise ValueError(f"{item!r} is not a coefficient: write NAME=NUMBER, for example Alternatively=-1")
    return result


def counted(counts: RoutingCounts) -> str:
    """How much was counted, in a line."""
    seen = zip(counts.marker_names, counts.occurrences_M, strict=True)
    markers = ", ".join(f"{name} {int(number)}" for name, number in seen)
    return f"{counts.num_traces} traces, {counts.num_tokens} tokens counted; markers: {markers}"


def load_plan(path: str) -> SteeringPlan:
    """The plan of a file; ValueError as ``SteeringPlan.load``, and for a neutral plan."""
    plan = SteeringPlan.load(path)
    if plan.is_neutral:
        raise ValueError(f"the plan {path!r} is neutral (all gains 1, all strengths 0): there is nothing to compare")
    return plan


def check_fits(plan: SteeringPlan, shape: ModelShape | None, source: str) -> None:
    """ValueError, which begins with where the plan is from, for one that does not fit the model (None: not known yet)."""
    if shape is None:
        return
    try:
        plan.check(shape)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def broadcast_plan(plan: SteeringPlan | None, ranks: Ranks) -> SteeringPlan:
    """Rank 0's plan on every rank, residual vectors included; ValueError on every rank where what arrived differs.

    Other ranks may pass None: their files are not read, so another node need not see rank 0's disk.
    """
    if ranks.world_size == 1:
        assert plan is not None
        return plan
    contents: dict[str, bytes] = {}

    def packed(path: Path) -> str:
        contents[name := f"{len(contents)}.safetensors"] = path.read_bytes()
        return name

    parcel = (plan.with_files(packed, ".").to_dict(), contents) if ranks.is_main and plan is not None else None
    received = _unpack(*ranks.broadcast(parcel))
    ranks.assert_same("the steering plan", received.digest())
    return plan if ranks.is_main and plan is not None else received


def _unpack(data: dict[str, Any], contents: dict[str, bytes]) -> SteeringPlan:
    folder = "."
    if contents:
        _FOLDERS.append(tempfile.TemporaryDirectory(prefix="plan-"))
        folder = _FOLDERS[-1].name
    for name, content in contents.items():
        Path(folder, name).write_bytes(content)
    return SteeringPlan.from_dict(data, base_dir=folder)


def collect_over_ranks(
    model: Any,
    traces: Sequence[Trace],
    markers: MarkerSet,
    ranks: Ranks,
    *,
    tokens_per_batch: int = 8192,
    references: Mapping[int, str] | None = None,
    **options: Any,
) -> RoutingCounts:
    """The counts of all traces, on every rank, the same to the bit on any number of ranks.

    Every rank is given all traces. Where one model stretches over the ranks, each of them sees every token: all count, and one
    count is the result. Elsewhere the batches are dealt out and the counts summed.
    """
    if references is None:
        references = reference_tokens(traces, markers)
    options |= {"tokens_per_batch": tokens_per_batch, "references": references}
    options |= {"progress": None if ranks.is_main else False}
    layout = layout_of(model)
    if layout.same_tokens or ranks.world_size == 1:
        return collect_counts(model, traces, markers, **options)
    index, number = layout.share
    own = [trace for batch in list(batches(traces, tokens_per_batch))[index::number] for trace in batch]
    with lockstep(model):
        counts = collect_counts(model, own, markers, allow_empty=True, **options)
    return reduce_counts(counts)
