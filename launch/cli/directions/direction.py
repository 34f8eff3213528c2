"""``moe-steer direction``: two sides of a contrast through a model -> directions."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from launch.cli.directions.direction_options import NEED_SAE, DirectionOptions, check

_REMEDIES = {
    "decisions": "give more traces, other --switch-words or another --after, or traces that this model's tokenizer wrote",
    "thoughts": "give traces with several right answers a problem, one 1.5 times as long as another, written by this model",
    "answers": "give answers that are not empty",
    "prompts": "give answers that are not empty",
}


@dataclass(frozen=True, kw_only=True)
class MakeDirection(DirectionOptions):
    """Find directions in the residual stream that separate wanted from unwanted text."""

    def run(self) -> int:
        """Write the directions and one line about each."""
        check(self)
        with _plain_warnings():
            self._make_all()
        return 0

    def _make_all(self) -> None:

        from expert_stats import collect_contrast
        from launch.core.session import load_asked
        from moe_steer.console import follow
        from moe_steer.contrasts import contrast_fits, fit_notes
        from moe_steer.directions import report_atoms
        from moe_steer.saes import fit_lines

        saes = self._saes()
        model, tokenizer = load_asked(self)
        device = model.get_input_embeddings().weight.device
        saes = {layer: sae.to(device=device) for layer, sae in saes.items()}
        sequences, notes = self._sequences(tokenizer)
        if self.regenerate:
            sequences, notes = self._stable(model, tokenizer, sequences, notes)
        self._refuse_others(model, sequences)
        fits = contrast_fits(model, sequences, saes, batch_tokens=self.tokens_per_batch)
        for layer, fit in fits.items():
            print("\n".join(fit_lines(layer, fit)))
        contrasts = collect_contrast(
            model,
            sequences,
            self.layers,
            saes=saes,
            weight=self.counted_by(),
            batch_tokens=self.tokens_per_batch,
            second_moments="pca" in self.method,
            notes=notes | fit_notes(fits),
            progress=follow("reading answers"),
        )
        if self.project_content:
            contrasts = self._without_content(model, tokenizer, contrasts)
        reports = []
        for method in self.method:
            for layer in self.layers:
                direction = self._make(method, contrasts[layer], saes.get(layer))
                path = self._file(method, layer)
                direction.save(path)
                print(_summary(direction, path))
                if method in NEED_SAE:
                    reports.append(report_atoms(direction, contrasts[layer], saes[layer]))
        if reports:
            Path(self.out, "atoms.md").write_text("\n".join(reports), encoding="utf-8")
            print(f"wrote {Path(self.out, 'atoms.md')}")
        first = self._file(self.method[0], self.layers[0])
        print(f"next: moe-steer plan --residual {self.layers[0]}:{first}=0.1 --unit residual_norm --out plan.json")

    def _stable(self, model: Any, tokenizer: Any, sequences: Any, notes: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The decisions that come back when the model goes on from them anew, and the notes with their numbers."""
        from launch.core.directions import keep_stable

        kept, numbers = keep_stable(
            model,
            tokenizer,
            sequences,
            self.switch_words,
            samples=self.regenerate,
            share=self.stable_share,
            temperature=self.temperature,
            top_p=self.top_p,
        )
        print("\n".join(one.line for one in numbers))
        if lost := [one for one in numbers if not one.kept]:
            raise ValueError(
                f"no {lost[0].side} is stable, so the contrast has one side: give more traces, or a lower --stable-share than {self.stable_share:g}"
            )
        settings = {"temperature": self.temperature, "top_p": self.top_p, "sides": [one.to_dict() for one in numbers]}
        return kept, notes | {"stability": settings}

    def _without_content(self, model: Any, tokenizer: Any, contrasts: Any) -> Any:
        """The contrasts without the directions in which the prompts of the traces differ most."""
        from moe_steer.contrasts import content_subspace, prompt_states, without_content

        prompts = list(dict.fromkeys(trace.token_ids[: trace.prompt_length] for trace in self._traces(tokenizer)))
        states = prompt_states(model, prompts, self.layers, self.tokens_per_batch)
        found = {}
        for layer, contrast in contrasts.items():
            found[layer] = without_content(contrast, content_subspace(states[layer], self.project_content))
            removed = found[layer].notes["content_projected"]["share_of_norm_removed"]
            print(
                f"layer {layer}: the {self.project_content} directions in which {len(prompts)} prompts differ most held {100 * removed:.1f}% of the "
                "length of the difference; they are projected out"
            )
        return found

    def _refuse_others(self, model: Any, sequences: Any) -> None:
        """ValueError where a file to be written is a direction of other texts or of another model; one of the same is replaced."""
        from moe_steer import Direction
        from moe_steer.contrasts import data_digest
        from moe_steer.layers import model_shape

        wanted = (self._file(method, layer) for method in self.method for layer in self.layers)
        there = [path for path in wanted if path.exists()]
        if not there:
            return
        mine = (f"{data_digest(sequences):064x}", _without_name(model_shape(model).to_dict()))
        for path in there:
            header = Direction.load(path).header
            if (header.get("contrast", {}).get("data_sha256_sum"), _without_name(header.get("model") or {})) != mine:
                raise ValueError(
                    f"{path} is a direction of other texts, other marked places or another model: give another --out, or remove it"
                )

    def _file(self, method: str, layer: int) -> Path:

        return Path(self.out, f"{method}-L{layer}.safetensors")

    def _saes(self) -> dict[int, Any]:
        from moe_steer.saes import layers_among, load_sae

        found: dict[int, Any] = {}
        asked: list[tuple[str, int | None]] = []
        for path in self.sae:
            held = layers_among(path)
            if held and not set(held) & set(self.layers):
                raise ValueError(
                    f"{path} holds the SAEs of layers {held}, --layers names {list(self.layers)}: name theirs"
                )
            asked += [(path, layer) for layer in held if layer in self.layers] or [(path, None)]
        for path, layer in asked:
            sae = load_sae(path, layer=layer)
            if sae.about.layer is None and len(self.layers) == 1:
                sae = load_sae(path, layer=self.layers[0])
            if sae.about.layer is None:
                raise ValueError(f"{path} does not say which layer it belongs to: name one layer a call")
            if sae.about.layer in found:
                raise ValueError(f"two SAEs are given for layer {sae.about.layer}: keep one")
            found[sae.about.layer] = sae
        missing = sorted(set(self.layers) - set(found))
        if set(self.method) & set(NEED_SAE) and missing:
            raise ValueError(f"there is no SAE for layer {missing[0]}: give one, or name only layers {sorted(found)}")
        if set(found) - set(self.layers):
            raise ValueError(
                f"the SAEs belong to layers {sorted(found)}, --layers names {list(self.layers)}: name theirs"
            )
        for layer, sae in found.items():
            if self.atom is not None and not 0 <= self.atom < sae.width:
                raise ValueError(f"--atom {self.atom} does not exist: the SAE of layer {layer} has 0-{sae.width - 1}")
        return found

    def _sequences(self, tokenizer: Any) -> tuple[list[Any], dict[str, Any]]:
        """The marked sequences, and what the directions' headers say about them."""
        from expert_stats import answer_pairs, concise_and_verbose, decision_sites, prompt_pairs, thought_pairs
        from moe_steer.contrasts import read_rows
        from moe_steer.tokens import text_notes

        notes: dict[str, Any] = {"contrast": self.contrast, **text_notes(tokenizer)}
        tokens = slice(self.first_tokens)
        if self.contrast == "decisions":
            notes["switch_words"] = list(self.switch_words)
            notes |= {} if self.after is None else {"after": self.after}
            sequences = decision_sites(self._traces(tokenizer), tokenizer, self.switch_words, after=self.after)
        elif self.contrast == "thoughts":
            pairs = concise_and_verbose(self._traces(tokenizer))
            sequences = thought_pairs(pairs, tokens=tokens, match_lengths=self.match_lengths)
        elif self.contrast == "answers":
            rows: Any = read_rows(str(self.pairs), ("question", "matching", "not_matching"))
            sequences = answer_pairs(rows, tokenizer, chat=self.chat, tokens=tokens, match_lengths=self.match_lengths)
        else:
            rows = read_rows(str(self.pairs), ("question", "answer"))
            notes["prompt"] = self.prompt
            sequences = prompt_pairs(rows, str(self.prompt), tokenizer, chat=self.chat)
        if not any(item.positive for item in sequences) or not any(item.negative for item in sequences):
            raise ValueError(f"the {self.contrast} have a side without tokens: {_REMEDIES[self.contrast]}")
        notes |= {"chat": self.chat, "first_tokens": self.first_tokens, "match_lengths": self.match_lengths}
        return sequences, notes

    def _traces(self, tokenizer: Any) -> list[Any]:
        return _right_traces(self.traces, self.arm, tokenizer)

    def _make(self, method: str, contrast: Any, sae: Any) -> Any:
        from moe_steer.directions import all_atoms, caa, pca, single_atom, sta

        if method == "sta":
            return sta(
                contrast,
                sae,
                keep=self.keep,
                trim=self.trim,
                num_atoms=self.num_atoms,
                parity=self.parity,
                by=self.by,
                sides=self.sides,
                rate=self.rate,
                max_density=self.max_density,
            )
        if method == "atom":
            return single_atom(contrast, sae, self.atom)
        return all_atoms(contrast, sae) if method == "sae" else {"caa": caa, "pca": pca}[method](contrast)


@lru_cache(maxsize=1)
def _right_traces(paths: tuple[str, ...], arm: str | None, tokenizer: Any) -> list[Any]:
    """Traces; of the folder of a run only the right ones."""
    from launch.core.outcomes import graded_answers, is_run
    from launch.core.wiring import read_any_traces

    found = []
    for path in paths:
        traces = read_any_traces([path], tokenizer, arm)
        if is_run(path):
            right = graded_answers([path])
            kept = [trace for trace in traces if right.get(trace.trace_id)]
            print(f"{path}: {len(kept)} of {len(traces)} answers are right, the others are left out")
            traces = kept
        found += traces
    return found


def _without_name(model: dict[str, Any]) -> dict[str, Any]:
    """A model's shape; its name is the path that was given, and one folder has many."""
    return {key: value for key, value in model.items() if key != "name"}


def _summary(direction: Any, path: Any) -> str:
    header = direction.header
    counted = " against ".join(
        f"{header['contrast'][side]['samples']} samples ({header['contrast'][side]['tokens']} tokens)"
        for side in ("positive", "negative")
    )
    atoms = f", {header['num_atoms']} atoms" if "num_atoms" in header else ""
    return (
        f"{direction.method} layer {direction.layer}: norm {direction.norm:.4g} of {header['residual_norm']:.4g}{atoms}, "
        f"cosine with CAA {header['cosine_with_caa']:.3f}, {100 * header['norm_explained']:.1f}% of it explained, {counted}; wrote {path}"
    )


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Within it a UserWarning is one line "NOTE: ..." on stderr, each text once, without the place in the code."""
    said: set[str] = set()
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def say(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, UserWarning):
                shown(message, category, *where, **more)
            elif str(message) not in said:
                said.add(str(message))
                print(f"NOTE: {' '.join(str(message).split())}", file=sys.stderr)

        warnings.showwarning = say
        yield
