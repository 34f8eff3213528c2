"""Make thoughts shorter without losing answers: directions from the model's own answers, against the plain rivals.

    deepspeed launch/reduce_overthinking.py                        the embedded dense model, no argument needed
    deepspeed launch/reduce_overthinking.py --model lab            the embedded mixture-of-experts model
    deepspeed launch/reduce_overthinking.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --task gsm8k --sae SAE_FOLDER

Steps: sample unsteered answers; make directions from concise against verbose right thoughts (CAA, STA, all SAE atoms, one atom)
and from the decisions to stop or go on; choose layer and strength on tuning problems; compare all arms on test problems, by
accuracy, thinking tokens, truncation and repetition.

Exit code 0: done; 1: the work failed, one line says why; 2: wrong usage.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.overthinking.options import (
    METHODS,
    RESIDUAL_METHODS,
    SAE_METHODS,
    OverthinkingOptions,
    methods_of,
)
from launch.ranks import Ranks, leave
from launch.shared_options import load_asked
from launch.start import start

if TYPE_CHECKING:
    from moe_steer.saes import SAE


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, report; returns the exit code."""
    return start(OverthinkingOptions, run, argv, "reduce_overthinking.py", __doc__)


def run(options: OverthinkingOptions, ranks: Ranks) -> None:
    """The whole job, step by step, in the folder of the options."""
    from launch.overthinking import settings as trying
    from launch.overthinking.directions import FOLDER, INDEX, files_digest, make_directions
    from launch.overthinking.findings import OverthinkingFindings, publish
    from launch.problem_sets import problem_sets
    from launch.sharded import record_start, refuse_different, unclaimed_when_refused
    from launch.steps import Bench
    from moe_steer.layers import model_shape
    from reasoning_evals.runs import GradeRow, open_run

    job = options.job()
    sets = problem_sets(job)
    model, tokenizer = load_asked(options)
    layers = options.tried_layers(model_shape(model).num_layers)
    sae = read_sae(options, model)
    methods, left_out = methods_of(options, sae is not None)
    folder = Path(job.folder)
    if ranks.is_main:
        open_run(folder, options.config() | {"sae": sae.about.sha256 if sae else None})
    record_start(folder, model, ranks)
    ranks.barrier()
    bench = Bench(options=job, ranks=ranks, model=model, tokenizer=tokenizer, folder=folder)

    found: list[GradeRow] = []
    files: dict[str, list[tuple[int, str]]] = {}
    if set(methods) <= set(trying.UNTUNED):
        ranks.say("1/4  no unsteered answers are needed: nothing is learned or tuned")
    else:
        sampled = Bench(options=_sampled(job), ranks=ranks, model=model, tokenizer=tokenizer, folder=folder)
        ranks.say(f"1/4  {len(sets.identification)} problems x {options.samples_identification}: unsteered answers")
        found = sampled.sample(
            "identification", [sampled.arm(trying.BASELINE)], sets.identification, options.samples_identification
        )
    if learned := [method for method in methods if method in RESIDUAL_METHODS]:
        places = set(layers) if {"caa", "decision"} & set(learned) else set()
        if sae is not None and sae.about.layer is not None:
            places.add(sae.about.layer)
        ranks.say(f"2/4  directions at layers {', '.join(map(str, sorted(places)))}")
        with unclaimed_when_refused(folder, folder / FOLDER / INDEX, ranks):
            files = make_directions(bench, found, learned, layers, sae, options)
        refuse_different("the directions", files_digest(folder / FOLDER, files), ranks)
    del sae  # a large one has no business in the GPU's memory while answers are sampled
    settings = trying.all_settings(methods, files, found, options)
    tuning: list[GradeRow] = []
    if settings:
        ranks.say(f"3/4  {len(sets.tuning)} tuning problems: choosing among {len(settings)} settings")
        arms = [bench.arm(trying.BASELINE)]
        arms += [trying.build(setting, setting.label, bench, options, folder / FOLDER) for setting in settings]
        tuning = bench.sample("tuning", arms, sets.tuning, 1 if options.greedy else options.samples_tuning)
    choices = trying.choices_of(methods, settings, tuning, options.margin)
    arms = [bench.arm(trying.BASELINE)]
    arms += [trying.build(one.setting, name, bench, options, folder / FOLDER) for name, one in choices.items()]
    k = job.num_samples
    ranks.say(
        f"4/4  {len(sets.test)} test problems x {k} samples in {len(arms)} arms: {', '.join(a.name for a in arms)}"
    )
    test = bench.sample("test", arms, sets.test, k)
    findings = OverthinkingFindings(
        options=options,
        choices=choices,
        settings=settings,
        tuning=tuning,
        test=test,
        folder=folder,
        left_out=left_out,
    )
    if ranks.is_main:
        print(publish(findings))
    if options.strict and (silent := ranks.agree(findings.silent_arms() if ranks.is_main else [])):
        raise RuntimeError("; ".join(silent))


def read_sae(options: OverthinkingOptions, model: Any) -> SAE | None:
    """The SAE of --sae, or the dense lab model's own; ValueError when it does not fit the model."""
    from moe_steer.lab import LAB_SAE
    from moe_steer.layers import unwrap
    from moe_steer.saes import check_fits, layers_among, load_sae

    wanted = SAE_METHODS.intersection(options.methods or METHODS)
    path = options.sae or (str(LAB_SAE) if options.model == "lab-dense" else None)
    if path is None or not wanted:
        return None
    if options.sae_layer is None and (layers := layers_among(path)):
        raise ValueError(f"{path} holds the SAEs of layers {', '.join(map(str, layers))}: choose one with --sae-layer")
    sae = load_sae(path, layer=options.sae_layer)
    if sae.about.layer is None:
        raise ValueError(f"{path} does not say which layer its SAE reads: give --sae-layer")
    check_fits(sae, model, sae.about.layer)
    return sae.to(device=unwrap(model).get_input_embeddings().weight.device)


def _sampled(job: Any) -> Any:
    """The same job with sampling, even where the comparison is greedy: pairs need answers that differ."""
    import dataclasses

    return dataclasses.replace(job, greedy=False)


if __name__ == "__main__":
    leave(main())
