"""Scores the lab model on unseen problems: `python -m moe_steer.lab.evaluate [--model DIR] [--problems-per-family N]`.

Answers are compared exactly with the target, unit included; this is the model's own yardstick, simpler and stricter
than a general grader.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moe_steer.lab import LAB_MODEL
from moe_steer.lab.problems import FAMILIES, LabProblem, generate_problems

CHECK_WORDS = re.compile(r"Wait|Alternatively|Hmm")
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
BATCH_SIZE = 96


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """What one sample came to."""

    family: str
    correct: bool
    closed: bool
    thinking_tokens: int
    checks: int


def is_correct(problem: LabProblem, text: str) -> bool:
    """True if the thought is closed and the last box after it holds exactly the target, with its unit if it has one."""
    _, closed, answer = text.partition("</think>")
    boxes = BOXED.findall(answer)
    wanted = problem.target if problem.unit is None else f"{problem.target} {problem.unit}"
    return bool(closed and boxes) and boxes[-1].strip() == wanted


@torch.inference_mode()
def sample_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int = 256
) -> list[str]:
    """One sampled continuation per question, with the generation defaults of the checkpoint."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs: Any = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    generated: torch.Tensor = cast(Any, model).generate(**inputs, max_new_tokens=max_new_tokens)
    new_ids = generated[:, inputs["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(new_ids, skip_special_tokens=True))


def evaluate_model(
    folder: Path,
    problems_per_family: int = 25,
    samples: int = 1,
    split: str = "test",
    seed: int = 0,
    max_new_tokens: int = 256,
) -> Scores:
    """Sample every problem `samples` times and score it; the same arguments give the same scores on one machine."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    problems = generate_problems(split, problems_per_family * len(FAMILIES), seed) * samples
    problems.sort(key=lambda problem: len(problem.prompt))
    results: list[Sampled] = []
    for start in range(0, len(problems), BATCH_SIZE):
        chunk = problems[start : start + BATCH_SIZE]
        texts = sample_texts(model, tokenizer, [problem.prompt for problem in chunk], max_new_tokens)
        results += [_judge(problem, text, tokenizer) for problem, text in zip(chunk, texts, strict=True)]
    rows = tuple(_row(name, [result for result in results if result.family == name]) for name in FAMILIES)
    return Scores(families=rows, overall=_row("all", results), split=split, seed=seed)


def _judge(problem: LabProblem, text: str, tokenizer: PreTrainedTokenizerBase) -> Sampled:
    thought, closed, _ = text.partition("</think>")
    return Sampled(
        family=str(problem.domain).split("/")[1],
        correct=is_correct(problem, text),
        closed=bool(closed),
        thinking_tokens=len(tokenizer(thought, add_special_tokens=False)["input_ids"]),
        checks=len(CHECK_WORDS.findall(thought)),
    )


def _row(name: str, results: list[Sampled]) -> FamilyScore:
    num = len(results)
    return FamilyScore(
        family=name,
        num_samples=num,
        accuracy=sum(result.correct for result in results) / num,
        closed=sum(result.closed for result in results) / num,
        thinking_tokens=sum(result.thinking_tokens for result in results) / num,
        checks=sum(result.checks for result in results) / num,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Sample the lab model on unseen problems and print a table per family."""

    model: Path = LAB_MODEL
    problems_per_family: int = 25
    samples: int = 1
    """Samples per problem."""
    split: str = "test"
    seed: int = 0
    write_card: bool = False
    """Replace the scores in the checkpoint's model card by these."""


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    scores = evaluate_model(options.model, options.problems_per_family, options.samples, options.split, options.seed)
    print(scores.table())
    if options.write_card:
        from moe_steer.lab.card import replace_scores

        replace_scores(options.model / "README.md", scores)


if __name__ == "__main__":
    main()
