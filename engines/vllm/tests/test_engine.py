"""A real vLLM in the process of the test: texts and counts against hooked transformers models, and each known trap.

On CPUs vLLM neither caches nor cuts prompts of models with latent attention (the lab): what is about caches and pieces runs on the
dense model and on a small Qwen3-MoE.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from engine_in_process import all_equal, ask, counts, engine, expected_hits, mixed


@pytest.fixture(scope="module")
def lab(folder: Path, reference: dict[str, Any]) -> Any:
    return engine(folder, "lab", reference["lab"]["plans"])


@pytest.fixture(scope="module")
def search(folder: Path, reference: dict[str, Any]) -> Any:
    return engine(folder, "search", reference["search"]["plans"])


@pytest.fixture(scope="module")
def dense(folder: Path, reference: dict[str, Any]) -> Any:
    return engine(folder, "dense", reference["dense"]["plans"], block_size=32)


@pytest.fixture(scope="module")
def qwen(folder: Path, reference: dict[str, Any]) -> Any:
    return engine(folder, "qwen", reference["qwen"]["plans"], block_size=32)


def hits(llm: Any) -> dict[str, list[int]]:
    return {name: plan["hits"] for name, plan in counts(llm)[0].items()}


def test_the_model_runner_is_the_one_that_was_asked_for(qwen: Any) -> None:
    runner = qwen.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    second = any(kind.__module__ == "vllm.v1.worker.gpu.model_runner" for kind in type(runner).__mro__)
    assert second == (os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1")


@pytest.mark.parametrize("model", ["lab", "search", "dense", "qwen"])
def test_all_plans_in_one_batch_write_what_the_hooked_model_writes(
    model: str, reference: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    llm = request.getfixturevalue(model)
    before = hits(llm)
    assert mixed(llm, reference[model]) == all_equal(reference[model])
    added = {name: [b - a for a, b in zip(before[name], found, strict=True)] for name, found in hits(llm).items()}
    assert added == expected_hits(reference[model])


def log_probabilities(llm: Any, ids: list[int], asked: str | None) -> tuple[tuple[float, ...], int]:
    """Of the next three tokens; and how many of the prompt's came from the cache."""
    [output] = ask(llm, [ids], [asked], max_tokens=3, logprobs=1)
    steps = zip(output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True)
    return tuple(step[token].logprob for step, token in steps), output.num_cached_tokens


@pytest.mark.parametrize(("model", "name"), [("dense", "d1"), ("qwen", "q8")])
def test_no_request_reads_what_another_plan_wrote_into_the_prefix_cache(
    model: str, name: str, reference: dict[str, Any], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = request.getfixturevalue(model)
    ids = [one for prompt in reference[model]["prompts"] for one in prompt][:150]
    clean, warm = {}, {}
    for asked in ("off", name, f"{name}*0.5"):
        llm.reset_prefix_cache()
        clean[asked], none = log_probabilities(llm, ids, asked)
        warm[asked], cached = log_probabilities(llm, ids, asked)
        assert (none, cached) == (0, 128), "the cache works, and what follows means something"
    assert len(set(clean.values())) == 3
    llm.reset_prefix_cache()
    seen = set()
    for asked in (name, "off", f"{name}*0.5", None, name, "off", f"{name}*0.5"):
        found, cached = log_probabilities(llm, ids, asked)
        assert found == (warm if cached else clean)[asked or "off"], "to the last bit"
        assert cached == (128 if (asked or "off") in seen else 0)
        seen.add(asked or "off")
    # The guard can fail: without the salt one plan reads what another has written.
    from moe_steer_vllm.served import Served

    monkeypatch.setattr(Served, "salt", lambda self, asked: "")
    llm.reset_prefix_cache()
    log_probabilities(llm, ids, name)
    found, cached = log_probabilities(llm, ids, f"{name}*0.5")
    assert cached == 128
    assert found not in (clean[f"{name}*0.5"], warm[f"{name}*0.5"])


@pytest.mark.parametrize("asked", ["d-thought", "d-steps"])
def test_a_text_whose_beginning_is_cached_is_followed(asked: str, dense: Any, reference: dict[str, Any]) -> None:
    """The tags and steps that a scope depends on were not computed here: they came from the cache."""
    found = reference["dense"]["asked"][asked]["tokens"]
    cached = 0
    for ids, row in zip(reference["dense"]["prompts"], found, strict=True):
        for _ in range(2):
            [output] = ask(dense, [ids + row[:50]], [asked], max_tokens=len(row) - 50)
            assert list(output.outputs[0].token_ids) == row[50:]
        cached += output.num_cached_tokens
    assert cached > 100


@pytest.mark.parametrize(
    ("asked", "message"),
    [("nope", "is not served here"), ("d1*1e308", "is out of range"), (7, "give the name of a plan")],
)
def test_what_is_not_served_is_refused_and_the_engine_goes_on(
    dense: Any, reference: dict[str, Any], asked: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ask(dense, reference["dense"]["prompts"][:1], [asked], max_tokens=3)
    [output] = ask(dense, reference["dense"]["prompts"][:1], ["d1"], max_tokens=8)
    assert list(output.outputs[0].token_ids) == reference["dense"]["asked"]["d1"]["tokens"][0][:8]


@pytest.mark.parametrize("model", ["dense", "qwen"])
def test_pieces_of_prompts_and_preempted_requests(model: str, folder: Path, reference: dict[str, Any]) -> None:
    """So little room that prompts are read in pieces, and requests are pushed out and computed again."""
    options = {"block_size": 32, "num_gpu_blocks_override": 20, "max_num_seqs": 24}
    llm = engine(
        folder, model, reference[model]["plans"], max_num_batched_tokens=24, enable_chunked_prefill=True, **options
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted = []
    push_out = scheduler._preempt_request
    scheduler._preempt_request = lambda request, *more, **also: (
        preempted.append(request.request_id),
        push_out(request, *more, **also),
    )[1]
    assert mixed(llm, reference[model]) == all_equal(reference[model])
    assert len(preempted) > 3


def test_a_plan_by_default(folder: Path, reference: dict[str, Any]) -> None:
    llm = engine(folder, "dense", ["d1", "d-steps"], default="d1*0.5")
    found = reference["dense"]
    outputs = ask(llm, found["prompts"][:2] * 2, [None, None, "off", "off"], max_tokens=60)
    wanted = [found["asked"][asked]["tokens"][n][:60] for asked in ("d1*0.5", "off") for n in (0, 1)]
    assert [list(output.outputs[0].token_ids) for output in outputs] == wanted


def test_a_plan_for_another_model_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    from moe_steer import ExpertGain, SteeringPlan

    SteeringPlan(experts=[ExpertGain(0, 3, 2.0)]).save(tmp_path / "first.json")
    settings = {"plans": {"first": str(tmp_path / "first.json")}}
    with pytest.raises(ValueError, match=r"plan first: layer 0 \(expert 3\) has no experts in this model"):
        engine(folder, "lab", [], additional_config={"moe_steer": settings})


def test_speculative_decoding_is_refused_by_name(folder: Path) -> None:
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    with pytest.raises(ValueError, match="steering plans cannot be served with speculative decoding"):
        engine(folder, "dense", ["d1"], speculative_config=speculative)


@pytest.mark.parametrize(("baked", "threads"), [("baked", 4), ("baked", 8), ("baked", 0), ("overlay", 0)])
def test_a_baked_checkpoint_is_served_steered(
    baked: str, threads: int, folder: Path, reference: dict[str, Any]
) -> None:
    """Without the plug-in's help. Threads hand over shards in the order in which they finish: a bake has every tensor once, so that no
    order matters; an overlay has two of a name, and says that it wants them in order of name."""
    extra = {"enable_multithread_load": True, "num_threads": threads} if threads else {}
    found = reference["qwen"]
    llm = engine(folder, baked, [], block_size=32, model_loader_extra_config=extra)
    outputs = ask(llm, found["prompts"], [None] * len(found["prompts"]), max_tokens=found["new_tokens"])
    assert [list(output.outputs[0].token_ids) for output in outputs] == found["asked"]["q8"]["tokens"]
    assert found["asked"]["q8"]["tokens"] != found["asked"]["off"]["tokens"]


@pytest.mark.compiled
@pytest.mark.parametrize("model", ["lab", "qwen"])
def test_compiled(model: str, folder: Path, reference: dict[str, Any]) -> None:
    llm = engine(folder, model, reference[model]["plans"], enforce_eager=False, compilation_config={})
    assert mixed(llm, reference[model]) == all_equal(reference[model])
    assert hits(llm) == expected_hits(reference[model])


EXPERT_PARALLEL = {"enable_expert_parallel": True, "worker_extension_cls": "cpu_parallel.Extension"}


@pytest.mark.parallel
@pytest.mark.parametrize("more", [{}, EXPERT_PARALLEL], ids=["tensors cut in two", "experts on one rank each"])
def test_two_ranks(
    more: dict[str, Any], folder: Path, reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "1")
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    llm = engine(folder, "lab", reference["lab"]["plans"], **ranks, **more)
    assert mixed(llm, reference["lab"]) == all_equal(reference["lab"])
    first, second = counts(llm)
    assert first == second
    assert hits(llm) == expected_hits(reference["lab"])
