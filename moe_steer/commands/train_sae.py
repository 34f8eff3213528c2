"""``moe-steer train-sae``: a sparse autoencoder from a model's own activations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainSAE:
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
    traces: tuple[str, ...] = ()
    """Trace files, generations*.jsonl files, or folders of runs."""
    arm: str | None = None
    """Of runs of several arms, the one whose answers are read."""
    texts: tuple[str, ...] = ()
    """Plain text files, one text a line."""
    model: str = "lab"
    """Model folder, hub id, 'lab' or 'lab-dense' for an embedded model."""
    seed: int = 0
    """Decides the first weights and the order of the activations."""
    batch_size: int = 2048
    """Activations of one optimizer step."""
    learning_rate: float | None = None
    """Peak of the rate; default 0.1 / sqrt(model width)."""
    buffer_tokens: int = 524_288
    """Activations held and mixed at once."""
    skip_first: int = 1
    """Positions at the start of each text that are left out."""
    tokens_per_forward: int = 8192
    """Padded tokens of one forward pass."""
    save_every: int = 500
    """Steps between two saved states."""
    dtype: str = "auto"
    """Precision of the model: auto (as stored), float32, bfloat16 or float16."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    def run(self) -> int:
        """Train, measure the SAE on texts it was not trained on, and say how it fits."""
        import json
        from pathlib import Path

        from moe_steer.commands.activation_texts import hold_out, token_sequences
        from moe_steer.commands.notes import check_folder, check_numbers
        from moe_steer.layers import model_shape
        from moe_steer.loading import load_model
        from moe_steer.saes import SAEAbout, TrainRecipe, measure_fit, save_sae, train_sae
        from moe_steer.saes.activations import ActivationBatches, residual_of
        from moe_steer.saes.fit import check_layer
        from moe_steer.saes.formats.saelens import WEIGHTS
        from moe_steer.saes.training_progress import TrainingProgress
        from moe_steer.saes.training_state import remember_data

        whole = ("tokens", "save_every", "batch_size", "buffer_tokens", "tokens_per_forward", "width", "k")
        check_numbers(self, dict.fromkeys(whole, 1) | {"skip_first": 0})
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise ValueError(f"--learning-rate is {self.learning_rate:g}: give a number above 0, at most 1")
        check_folder(self.out)
        if (Path(self.out) / WEIGHTS).exists() and not (Path(self.out) / "training").is_dir():
            raise ValueError(f"--out {self.out} holds an SAE without the state of its training: name another folder")
        model, tokenizer = load_model(self.model, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
        shape = model_shape(model)
        check_layer(shape, self.layer)
        kept, held_out = hold_out(token_sequences(self.traces, self.texts, model, tokenizer, self.arm))
        batches = ActivationBatches(
            model=model,
            sequences=kept,
            layer=self.layer,
            batch_size=self.batch_size,
            buffer_tokens=self.buffer_tokens,
            skip_first=self.skip_first,
            tokens_per_forward=self.tokens_per_forward,
            seed=self.seed,
        )
        recipe = TrainRecipe(
            width=self.width,
            k=self.k,
            steps=-(-self.tokens // self.batch_size),
            learning_rate=self.learning_rate,
            seed=self.seed,
        )
        work = Path(self.out) / "training"
        remember_data(work, {"model": shape.to_dict(), "activations": batches.digest()})
        about = SAEAbout(
            format="trained", source=self.out, sha256="", model_name=shape.name, layer=self.layer, site="residual"
        )
        with TrainingProgress(recipe.steps) as shown:
            sae = train_sae(
                batches, shape.hidden_size, recipe, work, about=about, save_every=self.save_every, progress=shown
            )
        how = {"skip_first": self.skip_first, "tokens_per_forward": self.tokens_per_forward}
        fit = measure_fit(sae, residual_of(model, held_out, self.layer, **how))
        save_sae(sae, self.out)
        (Path(self.out) / "fit.json").write_text(json.dumps(fit.to_dict(), indent=2) + "\n", encoding="utf-8")
        print(f"{self.width} atoms on layer {self.layer}, held-out texts: {fit}")
        print(
            f"wrote {self.out}; moe-steer sae-fit --sae {self.out} --model {self.model} --traces OTHER measures it on other texts"
        )
        return 0
