"""``moe-steer train-sae``: a sparse autoencoder from a model's own activations.

What the SAE commands run through a model: the token ids of traces and of plain texts.
``moe-steer sae-fit``: how well an SAE fits a model's activations.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.core.option_checks import check_folder, check_numbers
from launch.core.options import HeldModel, TraceOptions
from moe_steer import saes
from moe_steer.layers import model_shape, token_limits, unwrap


@dataclass(frozen=True, kw_only=True)
class ReadOptions(TraceOptions, HeldModel):
    """What is run through the model, and how."""

    traces: tuple[str, ...] = ()
    """Trace files, generations*.jsonl files, or folders of runs."""
    texts: tuple[str, ...] = ()
    """Plain text files, one text a line."""
    skip_first: int = 1
    """Positions at the start of each text that are left out."""
    tokens_per_forward: int = 8192
    """Padded tokens of one forward pass."""

    def token_sequences(self, model: Any, tokenizer: Any) -> list[list[int]]:
        """The token ids of traces and texts, cut at the model's context. ValueError when there are none."""
        from launch.core.wiring import read_any_traces, text_lines

        if not self.traces and not self.texts:
            raise ValueError("there is nothing to run through the model: give --traces or --texts")
        if self.arm is not None and not self.traces:
            raise ValueError(f"--arm {self.arm} is of runs, and only --texts are given: leave it out")
        traces = read_any_traces(self.traces, tokenizer, self.arm) if self.traces else []
        found = [list(trace.token_ids) for trace in traces]
        for name in self.texts:
            found += [list(tokenizer(line)["input_ids"]) for line in text_lines(name)]
        limit = token_limits(model)[1]
        return [item[:limit] for item in found]

    @property
    def how_read(self) -> dict[str, int]:
        """For ``residual_of``."""
        return {"skip_first": self.skip_first, "tokens_per_forward": self.tokens_per_forward}


def hold_out(sequences: Sequence[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """(to train on, to measure on): every twentieth is kept back, at least one."""
    if len(sequences) < 2:
        raise ValueError(f"there are {len(sequences)} texts: give at least 2, one of them to measure the SAE on")
    every = min(20, len(sequences))
    return (
        [item for number, item in enumerate(sequences) if number % every != every - 1],
        [item for number, item in enumerate(sequences) if number % every == every - 1],
    )


def at_most(sequences: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    """The first sequences that hold so many tokens together, one at least."""
    kept: list[list[int]] = []
    held = 0
    for item in sequences:
        if kept and held + len(item) > num_tokens:
            break
        kept.append(item)
        held += len(item)
    return kept


@dataclass(frozen=True, kw_only=True)
class TrainSAE(ReadOptions):
    """Train a sparse autoencoder on a model's activations at one layer; stopped and started again, it continues."""

    layer: int
    """Decoder layer, counted from 0, whose output is read."""
    out: str
    """Folder of the SAE (SAELens format) with its fit and the state of its training."""
    width: int
    """Atoms of the SAE."""
    k: int
    """Active atoms a token, on average."""
    tokens: int
    """Activations to train on; where there are fewer, they are passed over again, in another order."""
    seed: int = 0
    """Decides the first weights and the order of the activations."""
    batch_size: int = 2048
    """Activations of one optimizer step."""
    learning_rate: float | None = None
    """Peak of the rate; default 0.1 / sqrt(model width)."""
    buffer_tokens: int = 524_288
    """Activations held and mixed at once."""
    save_every: int = 500
    """Steps between two saved states."""

    def run(self) -> int:
        """Train, measure the SAE on texts it was not trained on, and say how it fits."""
        import json

        from launch.core.session import load_asked

        whole = ("tokens", "save_every", "batch_size", "buffer_tokens", "tokens_per_forward", "width", "k")
        check_numbers(self, dict.fromkeys(whole, 1) | {"skip_first": 0})
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise ValueError(f"--learning-rate is {self.learning_rate:g}: give a number above 0, at most 1")
        check_folder(self.out)
        if (Path(self.out) / saes.WEIGHTS).exists() and not (Path(self.out) / "training").is_dir():
            raise ValueError(f"--out {self.out} holds an SAE without the state of its training: name another folder")
        model, tokenizer = load_asked(self)
        shape = model_shape(model)
        saes.check_layer(shape, self.layer)
        kept, held_out = hold_out(self.token_sequences(model, tokenizer))
        batches = saes.ActivationBatches(
            model=model,
            sequences=kept,
            layer=self.layer,
            batch_size=self.batch_size,
            buffer_tokens=self.buffer_tokens,
            seed=self.seed,
            **self.how_read,
        )
        recipe = saes.TrainRecipe(
            width=self.width,
            k=self.k,
            steps=-(-self.tokens // self.batch_size),
            learning_rate=self.learning_rate,
            seed=self.seed,
        )
        work = Path(self.out) / "training"
        saes.remember_data(work, {"model": shape.to_dict(), "activations": batches.digest()})
        about = saes.SAEAbout(
            format="trained", source=self.out, sha256="", model_name=shape.name, layer=self.layer, site="residual"
        )
        with saes.TrainingProgress(recipe.steps) as shown:
            sae = saes.train_sae(
                batches, shape.hidden_size, recipe, work, about=about, save_every=self.save_every, progress=shown
            )
        fit = saes.measure_fit(sae, saes.residual_of(model, held_out, self.layer, **self.how_read))
        saes.save_sae(sae, self.out)
        (Path(self.out) / "fit.json").write_text(json.dumps(fit.to_dict(), indent=2) + "\n", encoding="utf-8")
        print(f"{self.width} atoms on layer {self.layer}, held-out texts: {fit}")
        print(
            f"wrote {self.out}; moe-steer sae-fit --sae {self.out} --model {self.model} --traces OTHER measures it on other texts"
        )
        return 0


@dataclass(frozen=True, kw_only=True)
class FitSAE(ReadOptions):
    """Say what part of a model's activations an SAE leaves unexplained, and refuse one that belongs elsewhere."""

    sae: str
    """Folder or file of the SAE, in any published format."""
    layer: int | None = None
    """Decoder layer it belongs to, where its files do not say."""
    site: str | None = None
    """What it reads, where its files do not say: residual, mlp_out, attention_out."""
    k: int | None = None
    """Active atoms a token of a TopK SAE, where its files do not say."""
    format: str = "auto"
    """Format of the files, where they do not tell."""
    max_tokens: int = 200_000
    """Activations to measure on, at most."""
    json: str | None = None
    """File to write the numbers to."""

    def run(self) -> int:
        """Read, check, measure, say."""
        import json

        from launch.core.session import load_asked

        check_numbers(self, {"max_tokens": 1, "tokens_per_forward": 1, "skip_first": 0})
        sae = saes.load_sae(self.sae, format=self.format, layer=self.layer, site=self.site, k=self.k)
        layer = sae.about.layer
        if layer is None:
            raise ValueError(f"the layer of {self.sae} is not known: give it with --layer")
        if self.k is not None and sae.k != self.k:
            raise ValueError(f"--k is {self.k}, and this {sae.kind} SAE does not take it: leave --k out")
        model, tokenizer = load_asked(self)
        try:
            saes.check_fits(sae, model, layer)
        except ValueError as error:
            made_for = f"; the SAE is of {sae.about.model_name}" if sae.about.model_name else ""
            raise ValueError(f"{error}; --model is {self.model}{made_for}") from error
        sequences = at_most(self.token_sequences(model, tokenizer), self.max_tokens)
        saes.check_sequences(model, sequences)
        sae = sae.to(device=unwrap(model).get_input_embeddings().weight.device)
        fit = saes.measure_fit(sae, saes.residual_of(model, sequences, layer, **self.how_read))
        about = sae.about
        print(
            f"{about.format} SAE, {sae.kind}, {sae.width} atoms, layer {about.layer}, of {about.model_name or 'unknown model'}"
        )
        print(str(fit))
        if fit.warning:
            print(
                "WARNING: more than half of the variance is unexplained: the SAE is small, little trained, or made for another model, layer or scale",
                file=sys.stderr,
            )
        if self.json is not None:
            content = {"sae": dataclasses.asdict(about), "model": self.model, "fit": fit.to_dict()}
            Path(self.json).parent.mkdir(parents=True, exist_ok=True)
            Path(self.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return 0
