"""Trains the lab model: `python -m launch.lab.train --work DIR [--out DIR]`, one process, one thread, resumable.

Started again with the same --work folder it goes on after the last saved step and ends with the same weights as an
unbroken run. At the end the checkpoint is exported, its accuracy is sampled and the model card is written.

The training state on disk: one safetensors file with weights, router biases and optimizer moments, replaced whole.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import tyro
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from launch.lab.batches import MAX_SEQUENCE, Batch, BatchMaker, LoadBalancer, Writer, corpus, training_text
from launch.lab.card import CARD, write_card
from launch.lab.models import new_model, train_tokenizer
from launch.lab.scoring import evaluate_model, export_model
from moe_steer.files import read_tensors, written_aside
from moe_steer.lab import LAB_MODEL
from moe_steer.lab.family import Family
from moe_steer.lab.problems import FAMILIES

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_state(
    path: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    recipe: dict[str, object],
    progress: dict[str, float],
) -> None:
    """Write everything the next step depends on; the file appears complete or not at all."""
    tensors = {f"model.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state[parameter].items():
            tensors[f"{moment}.{name}"] = value.detach().clone()
    with written_aside(path) as aside:
        save_file(tensors, aside, metadata={"recipe": json.dumps(recipe), "progress": json.dumps(progress)})


def load_state(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, recipe: dict[str, object]
) -> dict[str, float]:
    """Restore a state into model and optimizer and return its progress; ValueError if it was made by another recipe."""
    metadata, tensors = read_tensors(path)
    found, recipe = json.loads(metadata["recipe"]), json.loads(json.dumps(recipe))
    if found != recipe:
        changed = sorted(key for key in found.keys() | recipe.keys() if found.get(key) != recipe.get(key))
        raise ValueError(
            f"{path} holds a training with another {', '.join(changed)}; use another --work folder or the same recipe"
        )
    model.load_state_dict(
        {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    )
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS}
    progress: dict[str, float] = json.loads(metadata["progress"])
    return progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What decides the trained weights."""

    steps: int = 8500
    """Optimizer steps of one batch each."""
    seed: int = 0
    """Seed of the initial weights and of the problems."""
    learning_rate: float = 2.5e-3
    """Peak, reached after the warm-up; falls as a half cosine to a fiftieth."""
    warmup_steps: int = 150
    weight_decay: float = 0.05
    """On matrices only."""
    clip_norm: float = 1.0
    balance_rate: float = 4e-3
    """First step size of the routers' correction biases; falls in a line to 0 at nine tenths of the training."""
    check_rates: tuple[tuple[int, float], ...] = ((0, 0.5), (4288, 0.56), (6464, 0.7))
    """From which step on, the chance of one more check of a right value in the written solutions. Short thoughts teach
    the calculations quickly; the model checks less than it is taught, since a mean over a batch of short samples weighs
    each of their tokens more and sampling at a temperature below 1 favours the likeliest token."""
    tokenizer_samples: int = 20_000
    """Written solutions the tokenizer is learned from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is trained, and on which texts."""

    new_model: Callable[[PreTrainedTokenizerBase, int], PreTrainedModel] = new_model
    write: Writer = training_text
    max_sequence: int = MAX_SEQUENCE
    tokens_per_batch: int | None = None
    """What a batch's summed loss is divided by; None: by its own number of tokens, which gives short samples more weight."""
    families: Mapping[str, Family] = field(default_factory=lambda: FAMILIES)
    """Whose problems it is scored on."""
    card: str = CARD


MOE_LAB = Subject()


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Train the embedded lab model."""

    work: Path
    """Folder of the training state, the tokenizer and the loss curve; a run in it is continued."""
    out: Path = LAB_MODEL
    """Folder the finished checkpoint is written to."""
    recipe: Recipe = Recipe()
    save_every: int = 250
    """Steps between two saved states."""
    log_every: int = 25
    """Steps that one line of the loss curve averages."""
    problems_per_family: int = 36
    """Test problems per family for the scores in the card."""
    samples: int = 2
    """Samples per problem for the scores in the card."""


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine from the peak to a fiftieth of it."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def check_rate_at(step: int, recipe: Recipe) -> float:
    """The rate of checks in the solutions that are learned at this step."""
    return [rate for first_step, rate in recipe.check_rates if first_step <= step][-1]


def make_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)


def batch_loss(model: PreTrainedModel, batch: Batch, tokens_per_batch: int | None = None) -> torch.Tensor:
    """Cross-entropy of the thought and answer tokens, their mean or their sum / `tokens_per_batch`; the prompt is read, not learned."""
    hidden_BSD = model.model(batch.input_ids_BS[:, :-1]).last_hidden_state
    target_mask = batch.loss_mask_BS[:, 1:]
    logits_NV = model.lm_head(hidden_BSD[target_mask])
    targets_N = batch.input_ids_BS[:, 1:][target_mask]
    if tokens_per_batch is None:
        return torch.nn.functional.cross_entropy(logits_NV, targets_N)
    return torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum") / tokens_per_batch


def train(
    recipe: Recipe,
    work: Path,
    tokenizer: PreTrainedTokenizerBase,
    save_every: int = 250,
    log_every: int = 25,
    stop_at: int | None = None,
    subject: Subject = MOE_LAB,
) -> PreTrainedModel:
    """Train in `work`, from its saved state if there is one, up to `stop_at` or the recipe's end; returns the model."""
    work.mkdir(parents=True, exist_ok=True)
    state_path, log_path = work / "state.safetensors", work / "loss.jsonl"
    model = subject.new_model(tokenizer, recipe.seed)
    optimizer = make_optimizer(model, recipe)
    progress = {"step": 0, "tokens": 0, "seconds": 0.0}
    if state_path.exists():
        progress = load_state(state_path, model, optimizer, asdict(recipe))
    _drop_log_after(log_path, int(progress["step"]))
    batches = BatchMaker(
        tokenizer, recipe.seed, lambda step: check_rate_at(step, recipe), subject.write, subject.max_sequence
    )
    first, last = int(progress["step"]), min(recipe.steps, stop_at or recipe.steps)
    started = time.monotonic() - progress["seconds"]
    losses: list[float] = []
    model.train()
    with LoadBalancer(model) as balancer, log_path.open("a") as log:
        for step in range(first, last):
            batch = batches(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, recipe)
            loss = batch_loss(model, batch, subject.tokens_per_batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            rate = recipe.balance_rate * max(0.0, 1 - step / (0.9 * recipe.steps))
            worst_load = balancer.update(batch.real_mask_BS[:, :-1], rate)
            losses.append(float(loss.detach()))
            progress = {
                "step": step + 1,
                "tokens": progress["tokens"] + int(batch.real_mask_BS.sum()),
                "seconds": round(time.monotonic() - started, 1),
            }
            if (step + 1) % log_every == 0 or step + 1 == last:
                record = {**progress, "loss": round(sum(losses) / len(losses), 4), "worst_load": round(worst_load, 2)}
                log.write(json.dumps(record) + "\n")
                log.flush()
                losses.clear()
            if (step + 1) % save_every == 0 or step + 1 == last:
                save_state(state_path, model, optimizer, asdict(recipe), progress)
    return model.eval()


def _drop_log_after(log_path: Path, step: int) -> None:
    """Lines written after the last saved step are made again, so they go."""
    if log_path.exists():
        lines = [line for line in log_path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        log_path.write_text("".join(line + "\n" for line in kept))


def load_or_train_tokenizer(recipe: Recipe, work: Path, write: Writer = training_text) -> PreTrainedTokenizerBase:
    """The tokenizer of this training, learned once and kept in its folder."""
    folder = work / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(corpus(recipe.tokenizer_samples, recipe.seed, write)).save_pretrained(folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def train_from(options: Options, subject: Subject) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train as the options say, on one thread; returns the model and its tokenizer."""
    torch.set_num_threads(1)
    # Tiny optimizer moments would otherwise become denormal numbers, which are ten times slower on a CPU.
    torch.set_flush_denormal(True)
    tokenizer = load_or_train_tokenizer(options.recipe, options.work, subject.write)
    model = train(options.recipe, options.work, tokenizer, options.save_every, options.log_every, subject=subject)
    return model, tokenizer


def publish(
    options: Options,
    subject: Subject,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    earlier: Mapping[Path, Recipe] | None = None,
) -> None:
    """Write the checkpoint, score it on unseen problems and write its card. `earlier`: folder -> recipe of stages before this one."""
    export_model(model, tokenizer, options.out)
    scores = evaluate_model(options.out, options.problems_per_family, options.samples, families=subject.families)
    (options.work / "scores.json").write_text(json.dumps(scores.to_dict(), indent=2) + "\n")
    stages = {**(earlier or {}), options.work: options.recipe}
    recipes = [asdict(recipe) for recipe in stages.values()]
    write_card(options.out, [folder / "loss.jsonl" for folder in stages], scores, recipes, subject.card)


if __name__ == "__main__":
    asked = tyro.cli(Options)
    publish(asked, MOE_LAB, *train_from(asked, MOE_LAB))
