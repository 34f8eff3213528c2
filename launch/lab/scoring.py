"""Scores the lab model on unseen problems: `python -m launch.lab.scoring [--model DIR] [--problems-per-family N]`.

Answers are compared exactly with the target, unit included; this is the model's own yardstick, simpler and stricter
than a general grader.

The checkpoint written the way DeepSeek's own are, so that other engines route it right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from launch.lab.card import FamilyScore, Scores, replace_scores
from moe_steer.backends import read_tokenizer
from moe_steer.lab import LAB_MODEL
from moe_steer.lab.family import Family
from moe_steer.lab.problems import FAMILIES, SEARCH_FAMILIES, LabProblem, generate_problems

ROUTER_KEYS = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
"""Keys of DeepSeek's config.json that transformers 5 drops on saving; without them other engines route by softmax."""
TOKENIZER_KEYS = {"tokenizer_class": "LlamaTokenizerFast"}
"""Let AutoTokenizer take tokenizer.json as it is: beside a Qwen2 model transformers 5 puts Qwen2's own splitting of words in its place,
whatever class is named, except (before 5.23) for the class that DeepSeek-R1-Distill-Qwen names. Ours does so always."""


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights, config, generation config and tokenizer into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if model.config.model_type == "deepseek_v3":
        add_keys(folder / "config.json", ROUTER_KEYS)
    if model.config.model_type == "qwen2":
        add_keys(folder / "tokenizer_config.json", TOKENIZER_KEYS)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors files are written for their owner alone, which a package must not keep


def add_keys(path: Path, keys: Mapping[str, str]) -> None:
    """Write keys into a saved file of settings."""
    settings = json.loads(path.read_text()) | keys
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


CHECK_WORDS = re.compile(r"Wait|Alternatively|Hmm")
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
BATCH_SIZE = 96


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
def sample_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """One sampled continuation per question, with the generation defaults of the checkpoint."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs: Any = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    generated: torch.Tensor = cast(Any, model).generate(**inputs)
    new_ids = generated[:, inputs["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(new_ids, skip_special_tokens=True))


def evaluate_model(
    folder: Path,
    problems_per_family: int = 25,
    samples: int = 1,
    split: str = "test",
    seed: int = 0,
    families: Mapping[str, Family] = FAMILIES,
) -> Scores:
    """Sample every problem `samples` times and score it; the same arguments give the same scores on one machine."""
    tokenizer = read_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    problems = generate_problems(split, problems_per_family * len(families), seed, families) * samples
    problems.sort(key=lambda problem: len(problem.prompt))
    results: list[Sampled] = []
    for start in range(0, len(problems), BATCH_SIZE):
        chunk = problems[start : start + BATCH_SIZE]
        texts = sample_texts(model, tokenizer, [problem.prompt for problem in chunk])
        results += [_judge(problem, text, tokenizer) for problem, text in zip(chunk, texts, strict=True)]
    rows = tuple(_row(name, [result for result in results if result.family == name]) for name in families)
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
    problems: Literal["lab", "lab-search"] = "lab"
    """Whose families."""
    split: str = "test"
    seed: int = 0
    write_card: bool = False
    """Replace the scores in the checkpoint's model card by these."""


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    families = SEARCH_FAMILIES if options.problems == "lab-search" else FAMILIES
    scores = evaluate_model(
        options.model, options.problems_per_family, options.samples, options.split, options.seed, families
    )
    print(scores.table())
    if options.write_card:
        replace_scores(options.model / "README.md", scores)


if __name__ == "__main__":
    main()
