"""Science, most of it at university level.

- TheoremQA: questions that need a theorem, from maths, physics, computing and finance (arXiv 2305.12524).
- PHYBench: original physics problems with one LaTeX formula as answer (arXiv 2504.16074).

- PHYSICS: university physics problems, most with several answers (arXiv 2503.21821).

- SciBench: numerical problems from university textbooks (arXiv 2307.10635).

- TPBench: theoretical physics at research level (arXiv 2502.15815).

- UGPhysics: undergraduate physics in thirteen subjects (arXiv 2502.00334).
"""

from __future__ import annotations

from collections.abc import Callable

from reasoning_evals.grading import type_of
from reasoning_evals.problems import Problem
from reasoning_evals.tasks.spec import (
    ANY,
    CHOICE_PROMPT,
    NAME,
    NUMBER,
    QUANTITY_PROMPT,
    R1_PROMPT,
    Row,
    TaskSpec,
    ask,
    content_id,
    listed,
)

SCIBENCH_TOLERANCE = 0.05
"""The relative error that the authors accept."""
_UGPHYSICS_TYPES = {"NV": "number", "MC": "choice", "TF": "choice"}
THEOREMQA_TOLERANCE = 0.04
"""The relative error that the authors' own evaluation accepts for floats."""
_THEOREMQA_TYPES = {
    "integer": "integer",
    "float": "number",
    "bool": "choice",
    "option": "choice",
    "list of integer": "list",
    "list of float": "list",
}
_TRUTH_PROMPT = R1_PROMPT.replace("your final answer", "your final answer, True or False,")


def phybench_problem(row: Row, prompt: str) -> Problem | None:
    """The 400 problems without a published answer are left out."""
    answer = str(row["answer"] or "").strip().strip("$").strip()
    if not answer:
        return None
    return Problem(
        f"phybench-{row['id']}",
        ask(prompt, row["content"]),
        answer,
        "expression",
        domain=f"physics/{str(row.get('tag') or '').lower()}",
    )


PHYBENCH = (
    TaskSpec(
        name="phybench",
        family="phybench",
        hub_id="Eureka-Lab/PHYBench",
        split="train",
        revision="d6d91c787b7abb865eb2490a328bf85a9f5095f0",
        data_file="PHYBench-questions_v1.json",  # the other files repeat parts of it
        columns={"id": NAME, "content": str, "answer": NUMBER | None},
        answer_type="expression",
        to_problem=phybench_problem,
        k=4,
        licence="MIT",
        note="100 problems with answers; formulas by rule are a lower bound",
    ),
)


def physics_problem(row: Row, prompt: str) -> Problem | None:
    """Problems with a figure or without an answer are left out; several answers become a list in any order. One answer is typed
    by how it is written, as the values of a list are."""
    answers = [str(answer).strip() for answer in row["final_answers"] or [] if str(answer).strip()]
    if not answers or row.get("graphs"):
        return None
    return Problem(
        f"physics-{row['id']}",
        ask(prompt, row["questions"]),
        listed(answers) if len(answers) > 1 else answers[0],
        "list" if len(answers) > 1 else type_of(answers[0], question=str(row["questions"])),
        domain=f"physics/{str(row['id']).split('/')[0].lower()}",
    )


PHYSICS = (
    TaskSpec(
        name="physics",
        family="physics",
        hub_id="yale-nlp/Physics",
        split="test",
        columns={"id": NAME, "questions": str, "final_answers": list[NUMBER] | None},
        answer_type="quantity, number, choice, expression or list",
        to_problem=physics_problem,
        k=1,
        licence="MIT",
        note="free-form formulas by rule are a lower bound: report them apart",
    ),
)


def scibench_problem(row: Row, prompt: str) -> Problem:
    """The unit may contain a power of ten, and the number is in that unit. The prompt names it, as in the paper."""
    unit = str(row.get("unit") or "").strip().strip("$").strip() or None
    name = f"{row.get('source') or 'scibench'}-{str(row['problemid']).strip()}".replace(" ", "")
    template = QUANTITY_PROMPT if unit and prompt == R1_PROMPT else prompt
    return Problem(
        f"scibench-{name}",
        ask(template, row["problem_text"], unit=unit or ""),
        str(row["answer_number"]).strip(),
        "quantity" if unit else "number",
        unit=unit,
        cluster_id=str(row.get("source") or "") or None,
        domain=f"science/{row.get('source') or ''}",
        tolerance=SCIBENCH_TOLERANCE,
    )


SCIBENCH = (
    TaskSpec(
        name="scibench",
        family="scibench",
        hub_id="xw27/scibench",
        split="train",
        columns={"problem_text": str, "answer_number": NUMBER, "unit": str | None, "problemid": NAME},
        answer_type="quantity or number",
        to_problem=scibench_problem,
        k=4,
        licence="MIT (repository); the texts are from textbooks",
        note="some golds are wrong in print (fundamentals 3.01 says m for km)",
    ),
)


def tpbench_problem(row: Row, prompt: str) -> Problem | None:
    """The formula of the published answer; the authors' test programs are not used."""
    answer = str(row["answer"] or "").strip().strip("$").strip()
    if not answer:
        return None
    return Problem(
        f"tpbench-{row['problem_id']}",
        ask(prompt, row["problem"]),
        answer,
        "expression",
        domain=f"physics/{str(row.get('domain') or '').lower()}",
    )


TPBENCH = (
    TaskSpec(
        name="tpbench",
        family="tpbench",
        hub_id="ZhiqiGao/TPBench",
        split="public",
        columns={"problem_id": NAME, "problem": str, "answer": NUMBER | None},
        answer_type="expression",
        to_problem=tpbench_problem,
        k=16,
        licence="MIT",
        note="10 public problems; formulas by rule are a lower bound",
    ),
)


def ugphysics_problem(row: Row, prompt: str) -> Problem | None:
    """Numerical values become numbers or quantities, expressions and equations expressions, several answers a list."""
    answers = [answer.strip().strip("$") for answer in _answers(row["answers"])]
    answers = [answer for answer in answers if answer]
    if not answers:
        return None
    unit = str(row.get("unit") or "").strip().strip("$") or None
    kind = _UGPHYSICS_TYPES.get(str(row["answer_type"]).strip(), "expression")
    kind = "quantity" if kind == "number" and unit else kind
    several = bool(row.get("is_multiple_answer")) or len(answers) > 1
    return Problem(
        content_id("ugphysics", row["problem"]),
        ask(prompt, row["problem"]),
        listed(answers) if several else answers[0],
        "list" if several else kind,
        unit=unit if kind == "quantity" else None,
        domain=f"physics/{str(row.get('subject') or '').lower()}",
    )


def _answers(answers: object) -> list[str]:
    return [str(answer) for answer in answers] if isinstance(answers, list) else [str(answers or "")]


UGPHYSICS = (
    TaskSpec(
        name="ugphysics",
        family="ugphysics",
        hub_id="UGPhysics/ugphysics",
        split="en",
        revision="523e71bc4e33356bb19de4af38c128796e8a8770",
        columns={
            "problem": str,
            "answers": NUMBER | list[NUMBER] | None,
            "answer_type": str | None,
            "unit": str | None,
            "is_multiple_answer": bool | None,
        },
        answer_type="number, quantity, expression, choice or list",
        to_problem=ugphysics_problem,
        k=1,
        licence="CC BY-NC-SA 4.0",
        note="one configuration a subject: give config=; expressions by rule are a lower bound",
    ),
)


def theoremqa_problem(row: Row, prompt: str) -> Problem | None:
    """Questions with a picture are left out."""
    if row.get("Picture") not in (None, "", "NONE"):
        return None
    kind, question, target = row["Answer_type"], row["Question"], row["Answer"]
    if kind not in _THEOREMQA_TYPES:
        raise ValueError(f"Answer_type is {kind!r}: expected one of {', '.join(_THEOREMQA_TYPES)}")
    if prompt == R1_PROMPT:
        prompt = {"bool": _TRUTH_PROMPT, "option": CHOICE_PROMPT}.get(kind, prompt)
    if kind == "option":
        target = str(target).strip("() ").upper()
    return Problem(
        content_id("theoremqa", question),
        ask(prompt, question),
        target,
        _THEOREMQA_TYPES[kind],
        cluster_id=row.get("theorem"),
        domain=f"{str(row.get('field', '')).lower()}/{str(row.get('subfield', '')).lower()}",
        tolerance=THEOREMQA_TOLERANCE if "float" in kind else None,
    )


def _of_field(field: str) -> Callable[[Row, str], Problem | None]:
    return lambda row, prompt: theoremqa_problem(row, prompt) if row["field"] == field else None


def _theoremqa_spec(name: str, mapping: Callable[[Row, str], Problem | None], note: str) -> TaskSpec:
    return TaskSpec(
        name=name,
        family="theoremqa",
        hub_id="TIGER-Lab/TheoremQA",
        split="test",
        revision="a340b1782960a712843aae3ed25f1e013cc008a5",
        columns={"Question": str, "Answer": ANY, "Answer_type": str, "Picture": ANY},
        answer_type="integer, number, list or choice",
        to_problem=mapping,
        k=4,
        licence="MIT",
        note=note,
    )


THEOREMQA = (
    _theoremqa_spec("theoremqa", theoremqa_problem, "747 of 800 questions: those without a picture"),
    _theoremqa_spec("theoremqa_maths", _of_field("Math"), "field Math"),
    _theoremqa_spec("theoremqa_physics", _of_field("Physics"), "field Physics"),
)
