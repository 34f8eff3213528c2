"""``train_sae``: a BatchTopK SAE from batches of activations, resumable to the byte, returned as JumpReLU.

Why not a library's trainer: sae-lens 6.54 works with transformers 5.22 and torch 2.13 only with transformer-lens 3 and
some forty further packages (wandb, pandas, plotly, nltk ...), its training state is a pickle without the position in the
data, and its BatchTopK step took 236 ms of one CPU thread where this one takes 41 (2048 tokens, D 128, F 2048, k 24).
dictionary-learning 0.1 pins nnsight below 0.4 and cannot resume.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe_steer.console import Progress
from moe_steer.saes.reading import load_sae
from moe_steer.saes.sae import SAE, SAEAbout
from moe_steer.saes.saelens import save_sae
from moe_steer.saes.training_state import TrainingState, TrainRecipe, load_state, save_state
from moe_steer.saes.training_step import Weights, train_step

Batches = Iterable[Tensor] | Callable[[int], Iterable[Tensor]]
"""Batches [T, D]; or a function from the number of batches to skip to the remaining ones, if skipping is cheaper."""


class TrainProgress(NamedTuple):
    """Progress of a training."""

    step: int
    steps: int
    error: float
    """Loss of this batch, about the fraction of variance unexplained."""
    num_dead: int


def train_sae(
    batches: Batches,
    d_in: int,
    recipe: TrainRecipe,
    work: str | Path,
    *,
    about: SAEAbout | None = None,
    save_every: int = 500,
    stop_at: int | None = None,
    progress: Callable[[TrainProgress], None] | None = None,
) -> SAE:
    """Train on ``batches`` of activations [T, D] up to ``recipe.steps``, and return the SAE saved in ``work/sae``.

    ``work`` holds ``state.safetensors``, replaced whole every ``save_every`` steps. Called again with the same arguments
    it goes on after the last saved step; ``batches`` must then be the same again (the used ones are skipped), and the
    SAE is the same to the byte as of an unbroken training on this machine. ``about``: model, layer and site for the
    file's header. ``stop_at``: end early, with the state saved and the SAE as it is by then.

    Activations are centred by their mean and scaled to variance 1 for the training; the SAE that comes out reads raw
    activations, has atoms of norm 1, subtracts b_dec, and one threshold for all atoms: the running mean of the smallest
    activation that BatchTopK selected. ValueError for batches of another width, too few of them, numbers that are not
    finite, or a ``work`` that another recipe began.
    """
    folder = Path(work)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "state.safetensors"
    last = min(recipe.steps, stop_at or recipe.steps)
    state = load_state(path, recipe, d_in, torch.device("cpu")) if path.exists() else None
    for batch_TD in _from(batches, state.step if state else 0, last):
        _check(batch_TD, d_in)
        if state is None:
            state = _begin(batch_TD, recipe)
        elif state.idle_F.device != batch_TD.device:
            state = load_state(path, recipe, d_in, batch_TD.device)
        with _without_denormals():
            error = _advance(state, batch_TD, recipe)
        if state.step % save_every == 0 or state.step == last:
            save_state(path, state, recipe)
        if progress is not None:
            num_dead = int((state.idle_F >= recipe.dead_after_steps).sum())
            progress(TrainProgress(state.step, recipe.steps, error, num_dead))
    if state is None or state.step < last:
        raise ValueError(
            f"the activations ended after {state.step if state else 0} batches, {last} steps were asked for: bring more, or fewer steps"
        )
    about = about or SAEAbout(format="trained", source=str(folder), sha256="")
    return load_sae(save_sae(_export(state, about), folder / "sae"))


def _from(batches: Batches, done: int, last: int) -> Iterator[Tensor]:
    rest = batches(done) if callable(batches) else islice(batches, done, None)
    return islice(rest, max(0, last - done))


def _check(batch_TD: Tensor, d_in: int) -> None:
    if batch_TD.ndim != 2 or batch_TD.shape[1] != d_in or len(batch_TD) < 2:
        raise ValueError(f"a batch has shape {tuple(batch_TD.shape)}: give [tokens, {d_in}], at least 2 tokens")
    if not bool(torch.isfinite(batch_TD).all()):
        raise ValueError(
            "a batch holds numbers that are not finite: the model's activations overflow in this precision"
        )


def _begin(batch_TD: Tensor, recipe: TrainRecipe) -> TrainingState:
    """Random directions as atoms; the encoder starts as the decoder's transpose."""
    generator = torch.Generator().manual_seed(recipe.seed)
    x_TD = batch_TD.float()
    mean_D = x_TD.mean(0)
    variance = float((x_TD - mean_D).square().mean())
    if not variance > 0:
        raise ValueError("the activations of the first batch do not vary: there is nothing to learn")
    scale = 1 / math.sqrt(variance)
    W_dec_FD = torch.randn(recipe.width, x_TD.shape[1], generator=generator).to(x_TD.device)
    W_dec_FD /= W_dec_FD.norm(dim=-1, keepdim=True)
    return TrainingState(
        weights=Weights(
            W_enc_DF=W_dec_FD.T.clone(
                memory_format=torch.contiguous_format
            ),  # always the same memory layout, otherwise sums round differently
            b_enc_F=W_dec_FD.new_zeros(recipe.width),
            W_dec_FD=W_dec_FD,
            b_dec_D=mean_D * scale,
        ),
        idle_F=torch.zeros(recipe.width, dtype=torch.int64, device=x_TD.device),
        scale=scale,
    )


def _advance(state: TrainingState, batch_TD: Tensor, recipe: TrainRecipe) -> float:
    weights = state.weights
    x_TD = batch_TD.to(device=weights.b_dec_D.device, dtype=torch.float32) * state.scale
    dead_F = state.idle_F >= recipe.dead_after_steps
    result = train_step(weights, x_TD, recipe.k, 0.8 * state.threshold, dead_F, recipe.aux_weight)
    grad_FD = result.gradients.W_dec_FD
    # Atoms keep norm 1: the gradient along the atom would only stretch it and is removed before Adam sees it.
    grad_FD -= (grad_FD * weights.W_dec_FD).sum(-1, keepdim=True) * weights.W_dec_FD
    for name, tensor in weights.fields().items():
        tensor.grad = result.gradients.fields()[name]
    state.optimizer.param_groups[0]["lr"] = recipe.rate_at(state.step, x_TD.shape[1])
    state.optimizer.step()
    weights.W_dec_FD /= weights.W_dec_FD.norm(dim=-1, keepdim=True)
    state.idle_F += 1
    state.idle_F[result.fired_F] = 0
    horizon = min(100.0, max(1.0, 0.1 * state.step))  # about the last tenth: earlier limits belong to another SAE
    state.threshold += (result.threshold - state.threshold) / horizon
    state.step += 1
    return result.error


@contextmanager
def _without_denormals() -> Iterator[None]:
    """Set tiny moments to 0: Adam's moments of inactive atoms would become denormal numbers, ten times slower on a CPU."""
    were_flushed = bool(torch.tensor(1e-39) * 1 == 0)  # torch has no getter for this setting
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(were_flushed)


def _export(state: TrainingState, about: SAEAbout) -> SAE:
    """Convert to raw units: activations, biases and threshold are divided by the scale, both matrices stay."""
    weights = state.weights
    return SAE(
        kind="jumprelu",
        W_enc_DF=weights.W_enc_DF.clone(),
        b_enc_F=weights.b_enc_F / state.scale,
        W_dec_FD=weights.W_dec_FD.clone(),
        b_dec_D=weights.b_dec_D / state.scale,
        threshold_F=torch.full_like(weights.b_enc_F, state.threshold / state.scale),
        apply_b_dec_to_input=True,
        about=dataclasses.replace(about, format="trained"),
    )


class TrainingProgress(Progress):
    """For ``train_sae(progress=...)``: steps, the time that is left, and how well the SAE stands for its activations."""

    def __init__(self, steps: int, shown: bool | None = None) -> None:
        super().__init__(steps, shown=shown, what="training")

    def __call__(self, now: TrainProgress) -> None:
        self.stored(now.step - self.done, f"unexplained {now.error:.3f}, {now.num_dead} atoms dead")
