"""Attacks and toxic prompts, judged by a classifier.

- RealToxicityPrompts, the challenging part: sentence beginnings that models continued toxically (arXiv 2009.11462).
- SafeEdit: adversarial prompts around harmful questions, for detoxifying methods (arXiv 2403.14472).
"""

from __future__ import annotations

from typing import Any

from reasoning_evals.problems import Problem
from reasoning_evals.tasks.spec import ANY, Row, Sampling, TaskSpec, ask, content_id


def real_toxicity_problem(row: Row, prompt: str) -> Problem | None:
    """The beginning of a sentence; None if it is not marked as challenging."""
    if not isinstance(row["challenging"], bool):
        raise ValueError(f"challenging is {row['challenging']!r}: expected true or false, as in prompts.jsonl")
    if not row["challenging"]:
        return None
    begin: Any = row["prompt"]
    if not isinstance(begin, dict) or not isinstance(begin.get("text"), str):
        raise ValueError(
            f"prompt is {str(begin)[:40]!r}: expected an object with text and toxicity, as in prompts.jsonl"
        )
    toxicity = begin.get("toxicity")
    kind = "unscored" if toxicity is None else "toxic" if toxicity > 0.5 else "mild"
    return Problem(
        content_id("real_toxicity", begin["text"]),
        ask(prompt, begin["text"]),
        "safe",
        "label",
        domain=f"toxicity/{kind} beginning",
    )


REAL_TOXICITY = (
    TaskSpec(
        name="real_toxicity",
        family="real_toxicity",
        hub_id="allenai/real-toxicity-prompts",
        split="train",
        revision="f21629712ffd6a3d13a54fd2807ccd521c55ef74",
        columns={"challenging": ANY, "prompt": ANY},
        answer_type="label: a classifier decides, none of the graders",
        to_problem=real_toxicity_problem,
        prompt="{problem}",
        k=1,
        licence="Apache 2.0",
        publish_items=False,
        sampling=Sampling(temperature=0.0, top_p=1.0, max_new_tokens=100),
        note="the challenging prompts of 99,442 (prompts.jsonl, one split); offensive texts",
    ),
)


def safeedit_problem(row: Row, prompt: str) -> Problem:
    """One attack: a template around a harmful question. Attacks on the same question are not independent: they share a
    cluster."""
    attack = row["adversarial prompt"]
    if not isinstance(attack, str) or not attack.strip():
        raise ValueError("the adversarial prompt is empty: take SafeEdit_test.json, which has one in every row")
    question = row.get("question")
    category = str(row.get("unsafety category") or "unknown").strip().lower()
    return Problem(
        content_id("safeedit", attack),
        ask(prompt, attack),
        "safe",
        "label",
        domain=f"safety/{category}",
        cluster_id=content_id("safeedit-question", question.strip()) if isinstance(question, str) else None,
    )


SAFEEDIT = (
    TaskSpec(
        name="safeedit",
        family="safeedit",
        hub_id="zjunlp/SafeEdit",
        split="test",
        file_name="SafeEdit_{split}.json",
        columns={"adversarial prompt": ANY},
        answer_type="label: a classifier decides, none of the graders",
        to_problem=safeedit_problem,
        prompt="{problem}",
        k=1,
        licence="CC BY-NC-SA 4.0",
        publish_items=False,
        sampling=Sampling(temperature=0.0, top_p=1.0, max_new_tokens=100),
        note="1,350 attacks in SafeEdit_test.json; gated: accept its terms on the hub, research use only; harmful texts",
    ),
)
