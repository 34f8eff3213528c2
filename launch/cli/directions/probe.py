"""``moe-steer probe``: labelled positions of traces -> linear probes, judged on held-out problems."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from launch.core.option_checks import check_counts, check_folder
from launch.core.options import HeldModel, TraceOptions
from launch.core.prompt_options import PromptOptions
from moe_steer import contrasts, gates, tokens
from moe_steer.files import write_whole

BUILT_IN = {
    "check": "ends of steps of the thought: does a check (--switch-words) follow",
    "right": "ends of steps of the thought: does the answer turn out right",
    "solved": "last token of the prompt: is the problem solved",
}
"""Labels that need no file."""


@dataclass(frozen=True, kw_only=True)
class TrainProbe(TraceOptions, PromptOptions, HeldModel):
    """Train linear probes on positions of traces: what gates of plans and early exits read."""

    out: str
    """Folder to write to: probe-LLAYER.safetensors and its reliability plot for each layer."""
    labels: str
    """check, right or solved (the last two need graded runs), or a file of JSON lines with trace, position (0-based, prompt counted) and label (0 or 1)."""
    layers: tuple[int, ...]
    """Decoder layers, counted from 0; all from one pass."""
    switch_words: tuple[str, ...] = ("Wait", "Alternatively", "Hmm")
    """check: words at the start of a step that show that a check follows."""
    held_out: float = 0.3
    """Share of the problems that the fit does not see and the figures are from."""
    ridge: float | None = None
    """Strength of the ridge; default the best of five in cross-validation over problems."""
    threshold: float | None = None
    """Probability from which on the label is said to hold; default the best balance of hits and false alarms in cross-validation."""
    max_positions: int = 20000
    """Read at most so many positions, drawn by chance."""
    seed: int = 0
    """Decides the split, the folds and the draw."""
    tokens_per_batch: int | None = None
    """Padded tokens of one forward pass; by default 1,024 on a CPU, 8,192 on a GPU."""

    renamed: ClassVar = {"--layer": "--layers"}

    def run(self) -> int:
        """Write the probes and one line about each."""
        self._check()
        import numpy as np

        from expert_stats.plots import reliability
        from launch.core.session import load_asked
        from moe_steer.contrasts.sequences import check_sequences
        from moe_steer.layers import model_shape

        model, tokenizer = load_asked(self)
        shape = model_shape(model)
        if unknown := sorted(layer for layer in self.layers if not 0 <= layer < shape.num_layers):
            raise ValueError(f"layer {unknown[0]} does not exist: this model has layers 0-{shape.num_layers - 1}")
        sequences, prompt_of = self._sequences(tokenizer)
        sequences = self._drawn(sequences)
        check_sequences(model, sequences)
        states: dict[int, list[Any]] = {layer: [] for layer in self.layers}
        labels: list[bool] = []
        problems: list[str] = []
        prompts: list[str] = []
        for batch, found in contrasts.marked_states(model, sequences, self.layers, self.tokens_per_batch):
            for layer, x_TD in found.items():
                states[layer].append(x_TD.double().cpu().numpy())
            for item in batch:
                labels += [True] * len(item.positive) + [False] * len(item.negative)
                number = len(item.positive) + len(item.negative)
                problems += [item.name.rpartition("#")[0] or item.name] * number
                prompts += [prompt_of[item.name]] * number
        about = {
            "labels": self.labels if self.labels in BUILT_IN else Path(self.labels).name,
            "model": shape.to_dict(),
            "data_sha256_sum": f"{contrasts.data_digest(sequences):064x}",
            **({"switch_words": list(self.switch_words)} if self.labels == "check" else {}),
            **tokens.text_notes(tokenizer),
        }
        if self.labels not in BUILT_IN:
            about["labels_sha256"] = hashlib.sha256(Path(self.labels).read_bytes()).hexdigest()
        Path(self.out).mkdir(parents=True, exist_ok=True)
        for layer in self.layers:
            fitted = gates.fit_probe(
                np.concatenate(states[layer]),
                np.array(labels),
                problems,
                held_out=self.held_out,
                ridge=self.ridge,
                threshold=self.threshold,
                seed=self.seed,
                prompts=prompts,
            )
            import torch

            probe = gates.Probe(
                weight_D=torch.from_numpy(fitted.weight_D),
                bias=fitted.bias,
                layer=layer,
                threshold=fitted.threshold,
                header={**about, **fitted.header},
            )
            path = Path(self.out, f"probe-L{layer}.safetensors")
            probe.save(path)
            title = f"{about['labels']}, layer {layer}"
            write_whole(path.with_suffix(".svg"), reliability(fitted.header["held_out"], title))
            print(self._line(probe, path))
        first = Path(self.out, f"probe-L{self.layers[0]}.safetensors")
        cut = round(gates.Probe.load(first).threshold, 3)
        when = json.dumps({"on": "probe", "file": str(first), "above": cut, "until": round(cut / 2, 3)})
        print(f"next: moe-steer plan ... --when '{when}' --out plan.json")
        return 0

    def _check(self) -> None:
        check_counts(self, ("max_positions", "tokens_per_batch"))
        check_folder(self.out)
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"--layers is {list(self.layers)}: name each once")
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held-out is {self.held_out:g}: give a share between 0 and 1")
        if self.ridge is not None and self.ridge <= 0:
            raise ValueError(f"--ridge is {self.ridge:g}: give a number above 0")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold is {self.threshold:g}: give a probability from 0 to 1")
        if self.labels != "check" and self.switch_words != type(self).switch_words:
            raise ValueError(f"--switch-words are for --labels check, not {self.labels}: leave them out")
        if self.labels not in BUILT_IN and not Path(self.labels).is_file():
            raise ValueError(
                f"--labels {self.labels} is no file: give one, or one of {', '.join(f'{k} ({v})' for k, v in BUILT_IN.items())}"
            )

    def _sequences(self, tokenizer: Any) -> tuple[list[Any], dict[str, str]]:
        """The traces with their positions, positive where the label is 1; and the digests of their prompts, by name."""
        from launch.core.outcomes import graded_answers, is_run
        from launch.core.wiring import read_any_traces

        traces = read_any_traces(self.traces, tokenizer, self.arm)
        ends = functools.partial(tokens.scoped_positions, "step_end", tokenizer)
        marked: dict[str, tuple[set[int], set[int]]] = {}
        if self.labels == "check":
            before = {
                item.name: item.negative
                for item in contrasts.decision_sites(traces, tokenizer, self.switch_words, closed_only=False)
            }
            for trace in traces:
                checks = set(before.get(trace.trace_id, ()))
                marked[trace.trace_id] = checks, set(ends(trace.token_ids, trace.prompt_length)) - checks
        elif self.labels in BUILT_IN:
            right = graded_answers([path for path in self.traces if is_run(path)])
            for trace in traces:
                if trace.trace_id not in right:
                    raise ValueError(
                        f"trace {trace.trace_id!r} is of no graded run: give the folder of a run to --traces for --labels {self.labels}"
                    )
                whole = range(trace.prompt_length, len(trace.token_ids))
                places = {trace.prompt_length - 1}
                if self.labels == "right":
                    places = {place for place in ends(trace.token_ids, trace.prompt_length) if place in whole}
                marked[trace.trace_id] = (places, set()) if right[trace.trace_id] else (set(), places)
        else:
            known = {trace.trace_id: len(trace.token_ids) for trace in traces}
            for where, name, position, label in _read_labels(self.labels):
                if name not in known or not 0 <= position < known[name]:
                    raise ValueError(f"{where}: there is no position {position} of trace {name!r} in --traces")
                sides = marked.setdefault(name, (set(), set()))
                if position in sides[0] | sides[1]:
                    raise ValueError(f"{where}: position {position} of trace {name!r} is labelled twice: keep one")
                sides[0 if label else 1].add(position)
        ids = {trace.trace_id: trace.token_ids for trace in traces}
        found = [
            contrasts.MarkedSequence(name, ids[name], tuple(yes), tuple(no))
            for name, (yes, no) in marked.items()
            if yes or no
        ]
        if not found:
            raise ValueError(f"the labels {self.labels} mark no position of these traces: give other traces or labels")
        return found, {trace.trace_id: trace.prompt_digest for trace in traces}

    def _drawn(self, sequences: list[Any]) -> list[Any]:
        """At most ``max_positions`` of all positions."""

        places = [
            (at, side, place)
            for at, item in enumerate(sequences)
            for side in ("positive", "negative")
            for place in getattr(item, side)
        ]
        if len(places) <= self.max_positions:
            return sequences
        print(f"{self.max_positions} of {len(places)} labelled positions are read, drawn by chance")
        kept: dict[int, dict[str, list[int]]] = {}
        for at, side, place in random.Random(self.seed).sample(places, self.max_positions):
            kept.setdefault(at, {"positive": [], "negative": []})[side].append(place)
        return [
            dataclasses.replace(sequences[at], **{side: tuple(sorted(found)) for side, found in sides.items()})
            for at, sides in sorted(kept.items())
        ]

    def _line(self, probe: Any, path: Path) -> str:
        told, judged = probe.header["trained"], probe.header["held_out"]
        return (
            f"layer {probe.layer}: AUC {judged['auc']:.3f} ({judged['low']:.3f} to {judged['high']:.3f}) on {judged['problems']} held-out "
            f"problems ({judged['positive']} of {judged['positions']} positions positive), calibration error "
            f"{judged['calibration_error']:.3f}, fitted on {told['problems']} problems ({told['positions']} positions), threshold "
            f"{probe.threshold:.3f}; wrote {path}"
        )


def _read_labels(path: str) -> Iterator[tuple[str, str, int, bool]]:
    from moe_steer.json_files import check_types, read_json_lines

    for where, row in read_json_lines(path):
        if set(row) != {"trace", "position", "label"}:
            raise ValueError(f"{where} has the keys {sorted(row)}: give trace, position and label")
        check_types(row, where, {"trace": str, "position": int, "label": int})
        if row["label"] not in (0, 1):
            raise ValueError(f"{where}: label is {row['label']}: give 0 or 1")
        yield where, row["trace"], row["position"], bool(row["label"])
