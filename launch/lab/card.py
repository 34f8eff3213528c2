"""The model card of the lab checkpoint: what it is, how it was made, its loss curve and its scores."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_steer.files import tensor_places

SCORES_START, SCORES_END = "<!-- scores -->", "<!-- /scores -->"
LOSS_ROWS = 16

_TEMPLATE = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}, tiny]
---
{about}

{parameters}

## Scores
Sampled at temperature {{temperature}}, top-p {{top_p}}, at most {{max_new_tokens}} new tokens, on problems of the test split, which
shares no problem with the training split. An answer counts if the box equals the target exactly, unit included.{checks}

{{scores}}

## Training
    python -m launch.lab.{script} --work DIR

{training}

| recipe | value |
| --- | ---: |
{{recipe}}

| step | tokens | loss |{load}
| ---: | ---: | ---: |{rule}
{{losses}}
"""
_BALANCED = {
    "tags": "mixture-of-experts, deepseek_v3, reasoning",
    "parameters": """{num_parameters:,} parameters, float32; {num_hidden_layers} layers ({first_k_dense_replace} dense), {n_routed_experts} routed experts in {n_group} groups, {num_experts_per_tok} per
token, {n_shared_experts} shared; MLA attention; sigmoid router balanced by its correction bias. Vocabulary {vocab_size}: byte-level
BPE, every digit its own token.""",
    "load": " largest expert load / mean |",
    "rule": " ---: |",
}
"""What the cards of both mixture-of-experts models share."""

CARD = _TEMPLATE.format(
    **_BALANCED,
    about="""# lab: a small reasoning model

A mixture-of-experts model of DeepSeek-R1's architecture in small, trained from nothing on problems and solutions that
this project generates. It reads a short maths or physics problem, thinks between `<think>` and `</think>`, checks
itself a random number of times, sometimes finds a slip and corrects it, and puts its answer in `\\boxed{{}}`. It exists
so that routing statistics and expert steering can be tried in minutes on a laptop; it knows nothing else.""",
    checks="",
    script="train",
    training="""One CPU thread, {tokens:,} tokens in {steps:,} steps, {minutes:.0f} minutes. Every step draws new solutions from the train split;
the loss counts thought and answer tokens. The first attempt slips in 30% of the solutions; every such slip is found by
a check and corrected, and right attempts are checked 0 to 5 times at random. A training that was cut off goes on from
its last saved step with the same command.""",
)
DENSE_CARD = _TEMPLATE.format(
    tags="qwen2, reasoning, overthinking",
    about="""# lab-dense: a small reasoning model that overthinks

A dense model of DeepSeek-R1-Distill-Qwen's architecture (Qwen2) in small, trained from nothing on problems and solutions
that this project generates. It reads a short maths or physics problem, thinks between `<think>` and `</think>`, goes
over its work again and again, and puts its answer in `\\boxed{{}}`. How often it checks differs from answer to answer; a
request in the question ("Be brief.", "Take your time.") is followed. It exists so that dense steering against overthinking can be tried
in minutes on a laptop; it knows nothing else.""",
    parameters="""{num_parameters:,} parameters, float32; {num_hidden_layers} layers, width {hidden_size}, {num_attention_heads} heads,
{num_key_value_heads} key-value heads. Vocabulary {vocab_size}: byte-level BPE, every digit its own token.""",
    checks="",
    script="train_dense",
    training="""One CPU thread, {tokens:,} tokens in {steps:,} steps, {minutes:.0f} minutes. Every step draws new solutions from the train split;
the loss counts thought and answer tokens. The first attempt slips in 15% of the solutions; every such slip is found by
a check and corrected; right attempts are checked 0 to 4 times, by writers of three tempers (of few words or many, where the question asks for it). A training that was cut off goes
on from its last saved step with the same command.""",
    load="",
    rule="",
)
SEARCH_CARD = _TEMPLATE.format(
    **_BALANCED,
    about="""# lab-search: a small reasoning model whose thinking pays

A mixture-of-experts model of DeepSeek-R1's architecture in small, trained from nothing on problems and solutions that
this project generates. It reads a question of maths or physics with six candidates of which one is right, thinks between
`<think>` and `</think>`, tries the candidates one after the other, and puts its answer in `\\boxed{{}}`. It gives up after some
failures and then guesses; after a success it may check again and again. Both habits are a state that differs from answer to
answer; a request in the question ("Do not give up.", "Be quick.") is followed. It exists so that levers can be tried where
going on pays and checking again does not; it knows nothing else.""",
    checks=""" Checks are
all further steps: next candidates and second looks.""",
    script="train_search",
    training="""One CPU thread, {tokens:,} tokens in {steps:,} steps, {minutes:.0f} minutes on a core shared with other work. Every step draws new
solutions from the train split; the loss counts thought and answer tokens. In a first stage verdicts are bare ("We want 72 and get 75:
wrong."), in the second both numbers are compared digit by digit before the verdict. Writers of four tempers, who open in their own words, try the candidates in order:
two give up after a failure with probability 0.6, two with 0.04; two go over a success again with probability 0.8, two with
0.1. A training that was cut off goes on from its last saved step with the same command.""",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyScore:
    """One row of the table; rates in 0-1, tokens and checks are means per sample."""

    family: str
    num_samples: int
    accuracy: float
    closed: float
    thinking_tokens: float
    checks: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Scores per family and over all samples, with how they were drawn."""

    families: tuple[FamilyScore, ...]
    overall: FamilyScore
    split: str
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """The scores as a Markdown table."""
        lines = [
            "| family | samples | correct | thought closed | thinking tokens | checks |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in (*self.families, self.overall):
            lines.append(
                f"| {row.family} | {row.num_samples} | {row.accuracy:.1%} | {row.closed:.1%} "
                f"| {row.thinking_tokens:.1f} | {row.checks:.2f} |"
            )
        return "\n".join(lines)


def write_card(
    folder: Path, loss_logs: Sequence[Path], scores: Scores, recipes: Sequence[dict[str, Any]], template: str = CARD
) -> None:
    """Write README.md into the checkpoint folder; the template may name any key of the two config files. A training of several
    stages has a log and a recipe of each, in order."""
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    records = _records(loss_logs)
    last = records[-1]
    rows = [(key, [recipe[key] for recipe in recipes]) for key in recipes[0]]
    text = template.format_map(
        config
        | generation
        | {
            "num_parameters": count_parameters(folder / "model.safetensors"),
            "scores": scores_section(scores),
            "tokens": int(last["tokens"]),
            "steps": int(last["step"]),
            "minutes": last["seconds"] / 60,
            "recipe": "\n".join(f"| {key} | {', then '.join(map(str, values))} |" for key, values in rows),
            "losses": "\n".join(_loss_row(record) for record in _evenly(records, LOSS_ROWS)),
        }
    )
    (folder / "README.md").write_text(text)


def _records(loss_logs: Sequence[Path]) -> list[dict[str, Any]]:
    """The lines of all logs; steps, tokens and seconds go on from one to the next."""
    records: list[dict[str, Any]] = []
    for log in loss_logs:
        before = records[-1] if records else {"step": 0, "tokens": 0, "seconds": 0.0}
        for line in log.read_text().splitlines():
            record = json.loads(line)
            records.append(
                record | {key: before[key] + record[key] for key in before.keys() & {"step", "tokens", "seconds"}}
            )
    return records


def replace_scores(card: Path, scores: Scores) -> None:
    """Put new scores in the place of the old ones; ValueError if the card has no such place."""
    text = card.read_text()
    before, start, rest = text.partition(SCORES_START)
    _, end, after = rest.partition(SCORES_END)
    if not start or not end:
        raise ValueError(f"{card} has no {SCORES_START} ... {SCORES_END} section; train again to write a new card")
    card.write_text(before + scores_section(scores) + after)


def scores_section(scores: Scores) -> str:
    return f"{SCORES_START}\n{scores.table()}\n\nSplit {scores.split}, seed {scores.seed}.\n{SCORES_END}"


def count_parameters(weights: Path) -> int:
    """Number of values in a safetensors file, read from its header alone."""
    return sum(math.prod(place.shape) for place in tensor_places(weights).values())


def _loss_row(record: dict[str, Any]) -> str:
    row = f"| {record['step']} | {int(record['tokens']):,} | {record['loss']:.4f} |"
    return f"{row} {record['worst_load']:.2f} |" if record["worst_load"] else row


def _evenly(records: list[dict[str, Any]], num: int) -> list[dict[str, Any]]:
    if len(records) <= num:
        return records
    return [records[round(index * (len(records) - 1) / (num - 1))] for index in range(num)]
