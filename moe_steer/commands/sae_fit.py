"""``moe-steer sae-fit``: how well an SAE fits a model's activations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FitSAE:
    """Say what part of a model's activations an SAE leaves unexplained, and refuse one that belongs elsewhere."""

    sae: str
    """Folder or file of the SAE, in any published format."""
    traces: tuple[str, ...] = ()
    """Trace files, generations*.jsonl files, or folders of runs."""
    arm: str | None = None
    """Of runs of several arms, the one whose answers are read."""
    texts: tuple[str, ...] = ()
    """Plain text files, one text a line."""
    model: str = "lab"
    """Model folder, hub id, 'lab' or 'lab-dense' for an embedded model."""
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
    skip_first: int = 1
    """Positions at the start of each text that are left out."""
    tokens_per_forward: int = 8192
    """Padded tokens of one forward pass."""
    json: str | None = None
    """File to write the numbers to."""
    dtype: str = "auto"
    """Precision of the model: auto (as stored), float32, bfloat16 or float16."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    def run(self) -> int:
        """Read, check, measure, say."""
        import dataclasses
        import json
        import sys
        from pathlib import Path

        from moe_steer.commands.activation_texts import at_most, token_sequences
        from moe_steer.commands.notes import check_numbers
        from moe_steer.layers import unwrap
        from moe_steer.loading import load_model
        from moe_steer.saes import check_fits, load_sae, measure_fit
        from moe_steer.saes.activations import check_sequences, residual_of

        check_numbers(self, {"max_tokens": 1, "tokens_per_forward": 1, "skip_first": 0})
        sae = load_sae(self.sae, format=self.format, layer=self.layer, site=self.site, k=self.k)
        layer = sae.about.layer
        if layer is None:
            raise ValueError(f"the layer of {self.sae} is not known: give it with --layer")
        if self.k is not None and sae.k != self.k:
            raise ValueError(f"--k is {self.k}, and this {sae.kind} SAE does not take it: leave --k out")
        model, tokenizer = load_model(self.model, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
        try:
            check_fits(sae, model, layer)
        except ValueError as error:
            made_for = f"; the SAE is of {sae.about.model_name}" if sae.about.model_name else ""
            raise ValueError(f"{error}; --model is {self.model}{made_for}") from error
        sequences = at_most(token_sequences(self.traces, self.texts, model, tokenizer, self.arm), self.max_tokens)
        check_sequences(model, sequences)
        sae = sae.to(device=unwrap(model).get_input_embeddings().weight.device)
        how = {"skip_first": self.skip_first, "tokens_per_forward": self.tokens_per_forward}
        fit = measure_fit(sae, residual_of(model, sequences, layer, **how))
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
