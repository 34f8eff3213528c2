"""``moe-steer causes``: traces and an outcome -> what turning each expert up or down does to it.

``moe-steer falsify``: does an expert, or an atom of an SAE, answer to the thought or to the token?
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from launch.core.option_checks import check_counts, layer_and_number
from launch.core.options import HeldModel, TraceOptions
from launch.core.prompt_options import PromptOptions
from moe_steer.files import write_whole

if TYPE_CHECKING:
    from expert_stats.causes import Causes, Falsified, Reading
    from launch.core.ranks import Ranks

_READ_BY = {"against": ("right-wrong",), "tokens": ("tokens",), "at": ("tokens",), "texts": ("loss",)}
_WORDS = {
    "right-wrong": "log p(right trace) - log p(wrong trace)",
    "loop": "log-odds that a loop goes on",
    "loss": "loss of the texts, in nats a token",
}


@dataclass(frozen=True, kw_only=True)
class FindCauses(TraceOptions, PromptOptions, HeldModel):
    """Measure what turning each expert up or down does to an outcome: derivatives of all, exact effects of the best.

    The weights stay as they are. One backward pass a batch gives d outcome / d log gain of every expert of every layer.
    """

    model: Annotated[str, tyro.conf.Positional] = "lab"
    """Model folder, GGUF file, hub id, or 'lab' or 'lab-search' for an embedded model."""
    outcome: Literal["right-wrong", "tokens", "loop", "loss"]
    """What is read: log p(right trace) - log p(wrong trace); log-odds of --tokens at --at; that a loop goes on; loss of --texts."""
    out: str
    """File to write (JSON), for 'moe-steer plan --by causes'."""
    traces: tuple[str, ...] = ()
    """Trace files, generations*.jsonl files, or folders of runs; for right-wrong graded runs, or the right traces."""
    against: tuple[str, ...] = ()
    """For right-wrong: the wrong traces, where --traces are not folders of graded runs."""
    texts: tuple[str, ...] = ()
    """For loss: text files, one text a line."""
    tokens: tuple[str, ...] = ()
    """For tokens: the next tokens, as words or tags, for example Wait; default the tag that ends a thought."""
    at: str = "step_end"
    """For tokens: the places, as a scope (step_end, thought, answer, generated, after:N, ...), or decisions: those of thoughts at which one
    of --tokens, or the tag that ends a thought, came next."""
    wanted: Literal["higher", "lower"] | None = None
    """What a plan is to make of the outcome; default higher, of a loss and a loop lower."""
    each: int = 5
    """Experts of each sign whose exact effects are measured."""
    gains: tuple[float, ...] = (0.0, 0.5, 2.0, 8.0)
    """Gains of the exact effects; 0 is ablation."""
    routers: tuple[Literal["free", "frozen"], ...] = ("free", "frozen")
    """Whether routers choose anew under a gain (free) or every token keeps its experts and weights (frozen)."""
    coalition: int = 3
    """Most experts of the greedy coalition; 0 for none."""
    tokens_per_batch: int = 4096
    """Padded tokens of one forward pass."""
    scores: str | None = None
    """Score file whose agreement with the derivatives is measured."""
    counts: tuple[str, ...] = ()
    """Counts files to score for the same, in place of --scores."""

    def run(self) -> int:
        """Write the causes and say what was found."""
        self._check()
        from launch.core.ranks import ranks_of_this_run

        with ranks_of_this_run() as ranks:
            self._find(ranks)
        return 0

    def _check(self) -> None:
        check_counts(self, ("each", "tokens_per_batch"))
        for option, outcomes in _READ_BY.items():
            if getattr(self, option) != getattr(type(self), option) and self.outcome not in outcomes:
                raise ValueError(f"--{option} is for --outcome {' or '.join(outcomes)}: leave it out")
        if bool(self.texts) != (self.outcome == "loss") or bool(self.traces) == (self.outcome == "loss"):
            needed = "--texts, and no --traces" if self.outcome == "loss" else "--traces"
            raise ValueError(f"--outcome {self.outcome} is read from {needed}: give them")
        if self.arm is not None and not self.traces:
            raise ValueError(f"--arm {self.arm} is of runs, and only --texts are given: leave it out")
        if self.scores and self.counts:
            raise ValueError("--scores and --counts both give scores to compare with: give one")
        if not self.gains or any(not 0 <= gain < float("inf") or gain == 1 for gain in self.gains):
            raise ValueError(
                f"--gains {list(self.gains)}: give finite numbers >= 0 other than 1, which changes nothing"
            )
        if not self.routers or len(set(self.routers)) < len(self.routers) or len(set(self.gains)) < len(self.gains):
            raise ValueError("--routers and --gains name what is measured: give at least one of each, and each once")
        if self.coalition < 0:
            raise ValueError(f"--coalition is {self.coalition}: give a whole number >= 0")

    def _find(self, ranks: Ranks) -> None:
        from launch.core.outcomes import causes_over_ranks
        from launch.core.session import load_asked

        scores = self._scores()
        model, tokenizer = load_asked(self, batch=1, context=None)
        causes = causes_over_ranks(
            model,
            self._readings(tokenizer),
            ranks,
            self.outcome,
            self._words(tokenizer),
            wanted=self.wanted or ("lower" if self.outcome in ("loss", "loop") else "higher"),
            each=self.each,
            gains=self.gains,
            routers=self.routers,
            coalition=self.coalition,
            tokens_per_batch=self.tokens_per_batch,
        )
        if ranks.is_main:
            causes.save(self.out)
            print(summary_of(causes, scores))
            gain = max(self.gains) if max(self.gains) > 1 else min(self.gains)
            print(
                f"wrote {self.out}; next: moe-steer plan --by causes {self.out} --top 2 --gain {gain:g} --out plan.json"
            )

    def _scores(self) -> Any:
        from expert_stats import ExpertScores, RoutingCounts, score_experts, sum_counts

        if self.counts:
            return score_experts(sum_counts(RoutingCounts.load(path) for path in self.counts), missing_marker="skip")
        return ExpertScores.load(self.scores) if self.scores else None

    def _words(self, tokenizer: Any) -> str:
        from launch.core.outcomes import token_words

        return token_words(tokenizer, self.tokens, self.at) if self.outcome == "tokens" else _WORDS[self.outcome]

    def _readings(self, tokenizer: Any) -> list[Reading]:
        from launch.core import outcomes
        from launch.core.wiring import read_any_traces

        if self.outcome == "right-wrong":
            return outcomes.right_wrong_readings(self.traces, self.against, tokenizer, self.arm)
        if self.outcome == "loss":
            return outcomes.loss_readings(self.texts, tokenizer)
        traces = read_any_traces(self.traces, tokenizer, self.arm)
        if self.outcome == "loop":
            return outcomes.loop_readings(traces)
        return outcomes.token_readings(traces, tokenizer, self.tokens, self.at)


def summary_of(causes: Causes, scores: Any = None) -> str:
    """What was found, in a few lines."""
    rows = causes.ranking()
    shown = {word: sum(row.verdict == word for row in rows) for word in ("raises", "lowers", "inert", "not shown")}
    mean = float(causes.value_P.mean())
    lines = [
        f"{causes.outcome['words']}: {mean:.4f} over {len(causes.problems)} problems, {causes.outcome['places']} places",
        f"{len(rows)} of {causes.selected_LE.size} experts were selected and tested: {shown['raises']} raise it, {shown['lowers']} lower "
        f"it (q <= .05), {shown['inert']} are inert, {shown['not shown']} show nothing",
    ]
    for word, row in (("raises it most surely", rows[0]), ("lowers it most surely", rows[-1])):
        low, high = causes.of_the_best(row)
        lines.append(
            f"{word}: layer {row.layer} expert {row.expert}, d/d log gain {row.gradient:+.4f} ({low:+.4f} to {high:+.4f} as the best of "
            f"{len(rows)}), q {row.q:.1e}, selected by {row.selected} tokens"
        )
    if causes.effects:
        same = set(causes.tested_on) == set(causes.problems)
        halves = "the same problems, which also chose them" if same else "the other half of the problems"
        lines.append(
            f"exact effects of the best {len({one.experts for one in causes.effects})}, on {len(causes.tested_on)} problems ({halves}):"
        )
        best = sorted(causes.effects, key=lambda one: (one.q, -abs(one.effect)))
        lines += [_line(one) for one in best[:6]]
    for step in causes.coalition[-1:]:
        lines.append(f"coalition of {len(step.experts)}, wanted {causes.wanted}:")
        lines.append(_line(step))
    if scores is not None:
        found = causes.agreement(scores)
        lines.append(
            f"agreement with nPMI: rank correlation {found.spearman:+.2f} ({found.low:+.2f} to {found.high:+.2f}) over {found.cells} experts"
        )
    return "\n".join(lines)


def _line(one: Any) -> str:
    experts = ", ".join(
        f"{layer}:{expert}={gain:g}" for (layer, expert), gain in zip(one.experts, one.gains, strict=True)
    )
    return f"  {experts}, routers {one.router}: {one.effect:+.4f} ({one.low:+.4f} to {one.high:+.4f}), q {one.q:.1e}"


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

    def _try(self, shows: bool) -> tuple[list[Falsified], list[str]]:

        from expert_stats import ExpertScores, MarkerSet
        from expert_stats.causes import falsify, probes_of
        from launch.core.session import load_asked
        from launch.core.wiring import read_any_traces, text_lines

        experts = [layer_and_number(word, "experts") for word in self.experts]
        best = ExpertScores.load(self.scores).ranking()[: self.top] if self.scores else []
        experts += [(row.layer, row.expert) for row in best]
        atoms = [layer_and_number(word, "atoms") for word in self.atoms]
        if not experts and not atoms:
            raise ValueError("there is nothing to try: give --experts, --scores, or --atoms with --sae")
        saes = {layer: self._sae(layer) for layer in {layer for layer, _ in atoms}}
        model, tokenizer = load_asked(self, batch=1, context=None)
        traces = read_any_traces(self.traces, tokenizer, self.arm)
        texts = [tokenizer(line)["input_ids"] for name in self.texts for line in text_lines(name)]
        markers = MarkerSet.from_tokenizer(tokenizer, (self.marker,), split_tags=True)
        probes, matched = probes_of(traces, texts, markers, seed=self.seed)
        device = model.get_input_embeddings().weight.device
        found = falsify(
            model,
            probes,
            list(dict.fromkeys(experts)),
            list(dict.fromkeys(atoms)),
            {layer: sae.to(device=device) for layer, sae in saes.items()},
            tokens_per_batch=self.tokens_per_batch,
            progress=None if shows else False,
        )
        return found, [tokenizer.decode([token]) for token in matched]

    def _sae(self, layer: int) -> Any:
        from moe_steer.saes import layers_among, load_sae

        for path in self.sae:
            held = layers_among(path)
            sae = load_sae(path, layer=layer) if not held or layer in held else None
            if sae is not None and sae.about.layer == layer:
                return sae
        raise ValueError(f"there is no SAE of layer {layer} among {', '.join(self.sae)}: give one with --sae")

    def _say(self, found: list[Falsified], matched: list[str]) -> None:
        from expert_stats.causes import table_of

        print(f"share of places where it fires, mean over problems or texts +- standard error; marker {self.marker!r}")
        print(table_of(found))
        print(f"matched tokens: {' '.join(map(repr, matched))}")
        if self.out:
            rows = [dataclasses.asdict(row) for row in found]
            for row in rows:
                for rate in row["rates"].values():
                    rate["error"] = None if rate["error"] != rate["error"] else rate["error"]
            content = {"kind": "falsified", "version": 1, "marker": self.marker, "matched": matched, "rows": rows}
            write_whole(self.out, json.dumps(content, allow_nan=False) + "\n")
            print(f"wrote {self.out}")
