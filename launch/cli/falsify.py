"""``moe-steer falsify``: does an expert, or an atom of an SAE, answer to the thought or to the token?"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from expert_stats import causes
from launch.core.option_checks import check_counts, layer_and_number
from launch.core.options import HeldModel, TraceOptions
from launch.core.prompt_options import PromptOptions
from moe_steer.files import write_whole


@dataclass(frozen=True, kw_only=True)
class Falsify(TraceOptions, PromptOptions, HeldModel):
    """Try experts and SAE atoms where their marker is not a thought: does each answer to the thought or to the token?

    The marker in thoughts is compared with the marker elsewhere, with the marker put into neutral texts, and with other tokens of
    thoughts that are as frequent.
    """

    model: Annotated[str, tyro.conf.Positional] = "lab"
    """Model folder, GGUF file, hub id, or 'lab', 'lab-dense' or 'lab-search' for an embedded model."""
    texts: tuple[str, ...]
    """Files of neutral texts, one text a line: what is no thought, and of the kind that the model reads otherwise."""
    marker: str = "<think>"
    """The tag or word that the experts and atoms are said to go with."""
    experts: tuple[str, ...] = ()
    """Experts to try, as LAYER:EXPERT."""
    scores: str | None = None
    """Score file, whose best --top experts are tried as well."""
    top: int = 5
    """How many experts to take from --scores."""
    atoms: tuple[str, ...] = ()
    """Atoms to try, as LAYER:ATOM; they need --sae."""
    sae: tuple[str, ...] = ()
    """SAEs of the atoms' layers: files or folders."""
    seed: int = 0
    """Decides where in the texts the marker is put."""
    tokens_per_batch: int = 8192
    """Padded tokens of one forward pass."""
    out: str | None = None
    """Also write the table (JSON)."""

    def run(self) -> int:
        """Print the table."""
        check_counts(self, ("top", "tokens_per_batch"))
        if bool(self.atoms) != bool(self.sae):
            raise ValueError("--atoms are of an SAE and --sae is read for --atoms: give both or neither")
        if self.top != type(self).top and not self.scores:
            raise ValueError(f"--top {self.top} is for --scores: give it, or leave --top out")
        from launch.core.ranks import ranks_of_this_run

        with ranks_of_this_run() as ranks:
            found, matched = self._try(ranks.is_main)
            if ranks.is_main:
                self._say(found, matched)
        return 0

    def _try(self, shows: bool) -> tuple[list[causes.Falsified], list[str]]:

        from expert_stats import MarkerSet
        from launch.core.session import load_asked
        from launch.core.wiring import read_any_traces, text_lines

        experts = [layer_and_number(word, "experts") for word in self.experts] + self._best()
        atoms = [layer_and_number(word, "atoms") for word in self.atoms]
        if not experts and not atoms:
            raise ValueError("there is nothing to try: give --experts, --scores, or --atoms with --sae")
        saes = {layer: self._sae(layer) for layer in {layer for layer, _ in atoms}}
        model, tokenizer = load_asked(self, batch=1, context=None)
        traces = read_any_traces(self.traces, tokenizer, self.arm)
        texts = [tokenizer(line)["input_ids"] for name in self.texts for line in text_lines(name)]
        markers = MarkerSet.from_tokenizer(tokenizer, (self.marker,), split_tags=True)
        probes, matched = causes.probes_of(traces, texts, markers, seed=self.seed)
        device = model.get_input_embeddings().weight.device
        found = causes.falsify(
            model,
            probes,
            list(dict.fromkeys(experts)),
            list(dict.fromkeys(atoms)),
            {layer: sae.to(device=device) for layer, sae in saes.items()},
            tokens_per_batch=self.tokens_per_batch,
            progress=None if shows else False,
        )
        return found, [tokenizer.decode([token]) for token in matched]

    def _best(self) -> list[tuple[int, int]]:
        if not self.scores:
            return []
        from expert_stats import ExpertScores

        return [(row.layer, row.expert) for row in ExpertScores.load(self.scores).ranking()[: self.top]]

    def _sae(self, layer: int) -> Any:
        from moe_steer.saes import layers_among, load_sae

        for path in self.sae:
            held = layers_among(path)
            sae = load_sae(path, layer=layer) if not held or layer in held else None
            if sae is not None and sae.about.layer == layer:
                return sae
        raise ValueError(f"there is no SAE of layer {layer} among {', '.join(self.sae)}: give one with --sae")

    def _say(self, found: list[causes.Falsified], matched: list[str]) -> None:

        print(f"share of places where it fires, mean over problems or texts +- standard error; marker {self.marker!r}")
        print(causes.table_of(found))
        print(f"matched tokens: {' '.join(map(repr, matched))}")
        if self.out:
            rows = [dataclasses.asdict(row) for row in found]
            for row in rows:
                for rate in row["rates"].values():
                    rate["error"] = None if rate["error"] != rate["error"] else rate["error"]
            content = {"kind": "falsified", "version": 1, "marker": self.marker, "matched": matched, "rows": rows}
            write_whole(self.out, json.dumps(content, allow_nan=False) + "\n")
            print(f"wrote {self.out}")
