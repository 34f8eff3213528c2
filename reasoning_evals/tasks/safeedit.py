"""SafeEdit: adversarial prompts around harmful questions, for detoxifying methods (arXiv 2403.14472)."""

from __future__ import annotations

from reasoning_evals.problems import Problem
from reasoning_evals.tasks.spec import Row, Sampling, TaskSpec, ask, content_id


def to_problem(row: Row, prompt: str) -> Problem:
    """One attack: a template around a harmful question. Attacks on one question are no independent problems: they share a cluster."""
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


SPECS = (
    TaskSpec(
        name="safeedit",
        family="safeedit",
        hub_id="zjunlp/SafeEdit",
        split="test",
        file_name="SafeEdit_{split}.json",
        columns=("adversarial prompt",),
        answer_type="label: a classifier decides, none of the graders",
        to_problem=to_problem,
        prompt="{problem}",
        k=1,
        licence="CC BY-NC-SA 4.0",
        publish_items=False,
        sampling=Sampling(temperature=0.0, top_p=1.0, max_new_tokens=100, forced=""),
        note="1,350 attacks in SafeEdit_test.json; gated: accept its terms on the hub, research use only; harmful texts",
    ),
)
