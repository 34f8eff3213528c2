"""Trains the dense lab model's sparse autoencoder: `python -m launch.lab.train_dense_sae --work DIR`, one thread, resumable."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import PreTrainedTokenizerBase

from launch.lab.batches import overthinking_text
from moe_steer import load_model
from moe_steer.lab import LAB_DENSE, LAB_SAE
from moe_steer.saes import SAE, ActivationBatches, SAEAbout, SAEFit, TrainRecipe, measure_fit, residual_of, train_sae

CARD = """# The sparse autoencoder of lab-dense

Reads the residual stream after layer {layer} of the dense lab model. {width:,} atoms, JumpReLU with one threshold, trained as
BatchTopK with {k} active atoms a token on {tokens:,} tokens of written solutions of the train split.

    python -m launch.lab.train_dense_sae --work DIR --layer {layer}

On {fit_tokens:,} tokens of other written solutions: {unexplained:.2%} of the variance unexplained, {l0:.1f} active atoms a token,
{dead:.1%} of the atoms never active.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Train the embedded SAE."""

    work: Path
    """Folder of the training state; a training in it is continued."""
    out: Path = LAB_SAE
    """Folder the finished SAE is written to."""
    model: Path = LAB_DENSE
    layer: int = 4
    """Decoder layer whose output is read."""
    width: int = 2048
    k: int = 24
    steps: int = 1200
    batch_size: int = 2048
    samples: int = 8000
    """Written solutions that activations are taken from."""
    seed: int = 0


def written_sequences(tokenizer: PreTrainedTokenizerBase, num: int, seed: str) -> list[list[int]]:
    """Token ids of prompts with their solutions, train split."""
    rng = random.Random(f"{seed}/sae")
    texts = ["".join(overthinking_text(rng)) for _ in range(num)]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [one for one in ids if len(one) <= tokenizer.model_max_length]


def fit_on_new_solutions(model: Any, tokenizer: PreTrainedTokenizerBase, sae: SAE, seed: int) -> SAEFit:
    """How well the SAE stands for activations that it was not trained on."""
    assert sae.about.layer is not None
    return measure_fit(sae, residual_of(model, written_sequences(tokenizer, 300, f"{seed}/fit"), sae.about.layer))


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    model, tokenizer = load_model(options.model, "plain")
    batches = ActivationBatches(
        model=model,
        sequences=written_sequences(tokenizer, options.samples, str(options.seed)),
        layer=options.layer,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    recipe = TrainRecipe(width=options.width, k=options.k, steps=options.steps, seed=options.seed)
    about = SAEAbout(
        format="trained", source="lab-dense", sha256="", model_name="lab-dense", layer=options.layer, site="residual"
    )
    sae = train_sae(batches, model.config.hidden_size, recipe, options.work, about=about)
    fit = fit_on_new_solutions(model, tokenizer, sae, options.seed)
    shutil.copytree(options.work / "sae", options.out, dirs_exist_ok=True)
    card = CARD.format(
        layer=options.layer,
        width=options.width,
        k=options.k,
        tokens=options.steps * options.batch_size,
        fit_tokens=fit.num_tokens,
        unexplained=fit.fraction_variance_unexplained,
        l0=fit.l0,
        dead=fit.dead_share,
    )
    (options.out / "README.md").write_text(card)
    for path in options.out.iterdir():
        path.chmod(0o644)
    print(
        f"fraction of variance unexplained {fit.fraction_variance_unexplained:.4f}, L0 {fit.l0:.1f}, dead {fit.dead_share:.1%}"
    )


if __name__ == "__main__":
    main()
