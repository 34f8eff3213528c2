"""Controls of the whole main job, on models of which the answer is known: ``python -m launch.lab.controls``, or ``make controls``.

causal  lab-search with a planted expert that carries the decision to go on. By causes the job must find it among all, and report "helped".
plain   lab-plain, on which more thought never helps. The same job must report "no effect shown".
inert   lab-search with a planted expert that goes with failures and does nothing. nPMI at the failures takes it for one that matters; its
        causes must say that it is inert, and the job must report "no effect shown".

Each is one start of launch/steer_r1.py in a folder of its own, which a second start continues. One page and results.json say what was expected and
what was found. Exit code 0: all passed; 1: one did not, or the work failed; 2: wrong usage.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from expert_stats.causes import Causes
from launch.core.findings import read_results, said, write_results
from launch.core.option_checks import check_counts, check_folder
from launch.core.options import options_from
from launch.core.outcomes import decision_causes
from launch.core.ranks import ranks_of_this_run, refuse_several_ranks
from launch.core.wiring import read_any_traces
from launch.jobs.experts_findings import CAUSES, place_of, scored
from launch.jobs.experts_options import Options
from launch.lab.controls_page import page_of, summary
from launch.lab.planted_expert import KINDS, PlantedExpert
from launch.steer_r1 import main as main_job
from moe_steer import load_model
from moe_steer.errors import exit_code
from moe_steer.tokens import RICE_COEFFICIENTS
from reasoning_evals.comparing import assume_from_baseline, plan_power
from reasoning_evals.report import write_plain_page
from reasoning_evals.runs import grade_run, read_run

FAILURE = "wrong."
"""The marker at whose last token the planted experts fire."""
MARKERS = ("<think>", "</think>", "Alternatively", "Wait", FAILURE)
CARD = "README.md"
_SIZES = {"identification": 96, "tuning": 40, "test": 240}
_QUICK = {"identification": 20, "tuning": 8, "test": 20}
_QUICK_NEGATIVE = {"identification": 16, "tuning": 8, "test": 12}
_QUICK_TOKENS = 256
"""Seven of eight answers of lab-search are shorter; the last ones take as many steps again."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """One start of the main job, and what has to come of it."""

    name: str
    what: str
    expected: str
    by: str
    verdict: str
    sizes: Mapping[str, int]
    """With --quick: problems of each set."""
    quick_gains: tuple[str, ...] = ("16",)
    """With --quick: gains to be tried."""

    @property
    def planted(self) -> bool:
        """Whether its model is made here."""
        return self.name in KINDS


CONTROLS = (
    Control(
        name="causal",
        what="lab-search with a planted expert that fires after failures and carries the decision to go on",
        expected="by causes it is the first of all experts, and the job says: helped",
        by="causes",
        verdict="helped",
        sizes=_QUICK,
        quick_gains=("4", "16"),
    ),
    Control(
        name="plain",
        what="lab-plain, on which more thought never helps",
        expected="the job says: no effect shown",
        by="causes",
        verdict="no effect shown",
        sizes=_QUICK_NEGATIVE,
    ),
    Control(
        name="inert",
        what="lab-search with a planted expert that fires after failures and does nothing",
        expected="nPMI takes it, with evidence; by causes it is inert, and the job says: no effect shown",
        by="npmi",
        verdict="no effect shown",
        sizes=_QUICK_NEGATIVE,
    ),
)


@dataclass(frozen=True, kw_only=True)
class RunControls:
    """Run the main job on three models of which the answer is known, and say on one page whether it found it."""

    quick: bool = False
    """Few problems: under a minute on two cores."""
    out: Path | None = None
    """Folder of the models, the runs and the page; default runs/controls, with --quick runs/controls-quick."""
    seed: int = 0
    """Decides problems and samples."""
    processes: int = 2
    """Controls that run at the same time, each in a process of its own, with what it says in a file; 1: one after the other, here."""

    @property
    def folder(self) -> Path:
        """Where all is written."""
        return self.out or Path("runs", "controls-quick" if self.quick else "controls")

    def model(self, control: Control) -> str:
        """Its model, by name or by folder."""
        return str(self.folder / "models" / control.name) if control.planted else "lab-plain"

    def words(self, control: Control) -> list[str]:
        """The arguments of the main job."""
        found = ["--model", self.model(control), "--out", str(self.folder / control.name), "--seed", str(self.seed)]
        found += ["--top", "1", "--by", control.by]
        if control.planted:
            kind = KINDS[control.name]
            own = Options(model=kind.model)
            found += [
                "--problems",
                own.problems,
                "--max-new-tokens",
                str(min(own.token_limit, _QUICK_TOKENS) if self.quick else own.token_limit),
                "--batch-size",
                str(own.rows),
            ]
            found += ["--markers", *MARKERS]
        if control.by == "npmi":
            found += ["--coefficients", f"{FAILURE}=1", "<think>=0", "</think>=0", "Alternatively=0"]
        if self.quick:
            found += ["--quick", "--gains", *control.quick_gains]
        sizes = control.sizes if self.quick else _SIZES
        return [*found, *(word for part, number in sizes.items() for word in (f"--num-{part}", str(number)))]

    def run(self) -> None:
        """All of them. RuntimeError where one did not pass."""
        check_folder(str(self.folder))
        refuse_several_ranks("launch.lab.controls", "launch/steer_r1.py")
        check_counts(self, ("processes",))
        found = self.apart() if self.processes > 1 else [self.control(control) for control in CONTROLS]
        write_results(self.folder, {"version": 1, "quick": self.quick, "controls": found})
        write_plain_page(page_of(found, self.folder), self.folder, "report")
        print(f"\n{summary(found)}\npage: {self.folder / 'report.html'}")
        if failed := [one["name"] for one in found if not one["passed"]]:
            raise RuntimeError(
                f"{len(failed)} of {len(found)} controls failed: {', '.join(failed)}; {self.folder / 'report.html'} says how"
            )

    def apart(self) -> list[dict[str, Any]]:
        """All of them, each in a process of its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for control in CONTROLS:
            print(f"{control.name}: {control.what}; what its run says: {self.log(control)}", flush=True)
        with ProcessPoolExecutor(min(self.processes, len(CONTROLS)), multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(self.logged, CONTROLS))

    def log(self, control: Control) -> Path:
        """Where a control in a process of its own says what it does."""
        return self.folder / f"{control.name}.log"

    def logged(self, control: Control) -> dict[str, Any]:
        """One control, whose words go to its file."""
        with (
            self.log(control).open("a", encoding="utf-8", buffering=1) as file,
            redirect_stdout(file),
            redirect_stderr(file),
        ):
            return self.control(control)

    def control(self, control: Control) -> dict[str, Any]:
        """One start of the job, read back."""
        print(f"\n== {control.name}: {control.what}", flush=True)
        if control.planted:
            self.plant(control)
        if code := main_job(self.words(control)):
            where = f"in {self.log(control)}" if self.processes > 1 else "above"
            raise RuntimeError(
                f"the job of the control {control.name!r} ended with {code}: what it said stands {where}"
            )
        return found_by(control, self.folder / control.name, self.model(control))

    def plant(self, control: Control) -> None:
        """Its model, where it is not there yet. ValueError for one that was planted otherwise, or in other weights."""
        folder = Path(self.model(control))
        asked = PlantedExpert(kind=control.name, out=folder)  # type: ignore[arg-type]
        if not (folder / CARD).is_file():
            asked.write()
        elif (folder / CARD).read_text(encoding="utf-8") != asked.card():
            raise ValueError(
                f"{folder} holds a model that was planted otherwise, or in other weights: remove {self.folder}, or name another with --out"
            )


def found_by(control: Control, run: Path, model: str) -> dict[str, Any]:
    """What a finished run says of its control, as plain values."""
    results = read_results(run, "steer_r1")
    (pair,) = [one for one in results["comparison"]["pairs"] if (one["a"], one["b"]) == ("baseline", "steered")]
    (entry,) = results["plan"]["experts"]
    accuracy, samples = pair["accuracy"], said(run / "test")
    found: dict[str, Any] = {
        "name": control.name,
        "what": control.what,
        "expected": control.expected,
        "by": control.by,
        "verdict": results["verdict"],
        "sentence": results["sentence"],
        "expert": [entry["layer"], entry["expert"]],
        "gain": entry["gain"],
        "evidence": results["evidence"],
        "points": {name: accuracy[name] for name in ("mean", "low", "high")},
        "every_sample_equal": samples["steered"] == samples["baseline"],
        "smallest_shown": accuracy["detectable"],
        "smallest_of": "the pair",
        "accuracy": {arm["name"]: arm["accuracy"]["mean"] for arm in results["comparison"]["arms"]},
    }
    if accuracy["detectable"] is None:
        found |= {"smallest_shown": smallest_from_baseline(run), "smallest_of": "the baseline"}
    passed = [results["verdict"] == control.verdict]
    if control.planted:
        options = options_from(read_run(run)["config"], Options, ["given_plan", "given_counts"])
        place = planted_place(run, options, model)
        found |= {"planted": place}
        first = place["causes" if control.by == "causes" else "npmi_at_failures"]
        passed.append(found["expert"] == [place["layer"], place["expert"]] and first["rank"] == 1)
        passed.append(first["q"] is not None and first["q"] <= options.max_q)
        passed.append(place["verdict"] == ("raises" if control.by == "causes" else "inert"))
    if control.verdict == "helped":
        passed.append(accuracy["low"] > 0)
    return found | {"passed": all(passed)}


def planted_place(run: Path, options: Options, model: str) -> dict[str, Any]:
    """What causes and nPMI, at the failures and as RICE asks, say of the planted expert, on the answers that the run searched."""
    layer, expert = PlantedExpert.layer, PlantedExpert.expert
    if not (run / CAUSES).is_file():  # the run was not by causes
        loaded, tokenizer = load_model(model)
        traces = read_any_traces([str(run / "identification")], tokenizer)
        with ranks_of_this_run() as ranks:
            decision_causes(loaded, tokenizer, traces, options.tokens, ranks, options.wanted).save(run / CAUSES)
    causes = Causes.load(run / CAUSES)
    (row,) = [row for row in causes.ranking() if (row.layer, row.expert) == (layer, expert)]
    asked = {
        "causes": (options, "causes"),
        "npmi_at_failures": (_scoring(options, {FAILURE: 1.0}), "npmi"),
        "npmi_as_rice": (_scoring(options, RICE_COEFFICIENTS), "npmi"),
    }
    places = {name: place_of(scored(run, *how), layer, expert) for name, how in asked.items()}
    return {"layer": layer, "expert": expert, "verdict": row.verdict, "marker": FAILURE, **places}


def _scoring(options: Options, weights: Mapping[str, float]) -> Options:
    """The options with these coefficients, all other markers 0."""
    return dataclasses.replace(options, coefficients=tuple(f"{name}={weights.get(name, 0.0):g}" for name in MARKERS))


def smallest_from_baseline(run: Path) -> float | None:
    """The smallest effect that the test could have shown (80% power), from its baseline alone: for arms in which nothing changed, whose own spread
    says nothing. Answers of both arms are taken to be drawn anew, and the effect to vary by 10 points between problems. None where the answers to
    each problem are all alike: so few say nothing."""
    table: dict[str, dict[int, bool]] = {}
    for row in grade_run(run / "test"):
        if row.arm == "baseline":
            table.setdefault(row.problem_id, {})[row.sample_idx] = row.correct
    correct_PK = [[samples[number] for number in sorted(samples)] for samples in table.values()]
    k, n = len(correct_PK[0]), len(correct_PK)
    if all(len(set(samples)) == 1 for samples in correct_PK):
        return None
    return plan_power(assume_from_baseline(correct_PK), samples=[k], problems=[n], num_arms=3).detectable[0][0]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, report; returns the exit code."""
    options = tyro.cli(RunControls, args=argv, prog="controls", description=__doc__)
    return exit_code("controls", options.run)


if __name__ == "__main__":
    sys.exit(main())
