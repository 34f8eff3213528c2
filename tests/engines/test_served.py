"""What a server offers and a request may ask for; everything else is refused in words, before it reaches an engine."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fake_routers import ROUTERS, FakeRunner
from moe_steer import ExpertGain, ResidualVector, SteeringPlan
from moe_steer.entries.expert_entry import TopK
from moe_steer_vllm.endpoint import of_engines, summed
from moe_steer_vllm.limits import refuse_config, refuse_runner, refuse_version
from moe_steer_vllm.plugin import register
from moe_steer_vllm.served import Asked, Served

GAINS = SteeringPlan(experts=[ExpertGain(1, 0, 4.0)])
FORCED = SteeringPlan(experts=[ExpertGain(1, 0, force="in")])
VECTORS = SteeringPlan(residual=[ResidualVector(1, vector=torch.ones(4), scope="thought")])
SERVED = Served({"a": GAINS, "b": FORCED, "v": VECTORS})


def test_names_doses_default_and_off() -> None:
    assert SERVED.asked(None) is SERVED.asked({}) is SERVED.asked({"moe_steer": "off"}) is None
    assert SERVED.asked({"moe_steer": "a"}) == Asked("a")
    assert SERVED.asked({"moe_steer": "a*0.25"}) == Asked("a", 0.25)
    assert SERVED.asked({"moe_steer": str(Asked("a", 0.1))}) == Asked("a", 0.1), (
        "what travels to the workers is what was asked"
    )
    with_default = Served(SERVED.plans, Asked("a", 0.5))
    assert with_default.asked(None) == Asked("a", 0.5)
    assert with_default.asked({"moe_steer": "off"}) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("c", "plan 'c' is not served here: choose one of a, b, v, or 'off'"),
        ("", "plan '' is not served here"),
        ("A", "plan 'A' is not served here"),
        ("x" * 50_000_000, "plan 'xxx"),
        ("a*", "dose '' is no number: write a*0.5"),
        ("a*half", "dose 'half' is no number"),
        ("a*1e308", "dose 1e+308 is out of range: give a number from -100 to 100"),
        ("a*1e999", "dose inf is out of range"),
        ("a*nan", "dose nan is out of range"),
        ("a*-1", "makes the gain 4 of layer 1 expert 0 -2"),
        ("b*0.5", "is forced in, and that has no dose"),
        (3, "moe_steer is 3: give the name of a plan"),
        (["a"] * 10_000, "moe_steer is ['a', 'a'"),
        (None, "moe_steer is None"),
        ({"plan": "a"}, "moe_steer is {'plan': 'a'}"),
        (b"a", "moe_steer is b'a'"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_what_cannot_be_asked_for(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        SERVED.asked({"moe_steer": value})
    assert len(str(caught.value)) < 500


def test_what_was_asked_before_is_remembered_up_to_a_number() -> None:
    served = Served({"a": GAINS})
    fresh = [served.salt(served.asked({"moe_steer": f"a*0.{n}"})) for n in range(1, 2000)]  # type: ignore[arg-type]
    again = [served.salt(served.asked({"moe_steer": f"a*0.{n}"})) for n in range(1, 2000)]  # type: ignore[arg-type]
    assert fresh == again
    assert len(served._known) == 1000
    with pytest.raises(ValueError, match="not served here"):
        served.asked({"moe_steer": "b"})


def test_a_server_without_plans_refuses_instead_of_ignoring() -> None:
    with pytest.raises(ValueError, match="plan 'a' is not served here: choose one of none, or 'off'"):
        Served().asked({"moe_steer": "a"})


def test_the_salt_tells_every_plan_and_dose_apart() -> None:
    asked = [Asked("a"), Asked("a", 0.5), Asked("b"), Asked("v")]
    assert len({SERVED.salt(one) for one in asked}) == 4
    renamed = Served({"other": GAINS})
    assert renamed.salt(Asked("other")) == SERVED.salt(Asked("a")), "the plan counts, not its name"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    found = {}
    for name, plan in SERVED.plans.items():
        plan.save(tmp_path / f"{name}.json")
        found[name] = str(tmp_path / f"{name}.json")
    return found


def test_settings_are_read(files: dict[str, str]) -> None:
    served = Served.of({"plans": files, "default": "a*0.5"})
    assert served.plans["v"].digest() == VECTORS.digest()
    assert served.default == Asked("a", 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plans": {}}, "names no plans"),
        ({"plans": ["a.json"]}, "names no plans"),
        ({"plan": {}}, "moe_steer of additional_config is"),
        ({"plans": {"a*2": "a.json"}}, "plan name 'a*2': give up to 64 letters"),
        ({"plans": {"off": "a.json"}}, "plan name 'off'"),
        ({"plans": {"a": 3}}, "plan a is 3: give the path"),
        ({"plans": {"a": "nowhere.json"}}, "no plan file at 'nowhere.json'"),
        ({"default": "c"}, "plan 'c' is not served here"),
        ({"digests": {"a": "0" * 64}}, "has changed since the server was started"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(files: dict[str, str], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Served.of({"plans": files, **change})


def test_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    SteeringPlan(top_k=[TopK(1, 3)]).save(tmp_path / "k.json")
    with pytest.raises(ValueError, match="plan k sets top_k, and an engine gives every token the model's own number"):
        Served.of({"plans": {"k": str(tmp_path / "k.json")}})


def config(model: dict[str, Any] | None = None, **parallel: Any) -> SimpleNamespace:
    """A vLLM configuration that plans can be served with, changed."""
    usual = {"pipeline_parallel_size": 1, "prefill_context_parallel_size": 1, "use_ubatching": False}
    usual |= {"use_sequence_parallel_moe": False, "enable_elastic_ep": False, **parallel}
    return SimpleNamespace(
        speculative_config=None,
        kv_transfer_config=None,
        parallel_config=SimpleNamespace(**usual),
        model_config=SimpleNamespace(**{"runner_type": "generate", "dtype": torch.bfloat16, **(model or {})}),
        additional_config={},
    )


def test_a_usual_configuration_is_served() -> None:
    refuse_config(config(), SERVED)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (config(pipeline_parallel_size=2), "pipeline parallelism"),
        (config(prefill_context_parallel_size=2), "prefill context parallelism"),
        (config(use_ubatching=True), "microbatches"),
        (config(use_sequence_parallel_moe=True), "sequence parallelism of experts"),
        (config(enable_elastic_ep=True), "elastic expert parallelism"),
        (config({"runner_type": "pooling"}), "a model that does not write text (runner pooling)"),
        (config({"dtype": torch.float16}), "residual vectors in float16"),
        (SimpleNamespace(**{**vars(config()), "speculative_config": object()}), "speculative decoding"),
        (SimpleNamespace(**{**vars(config()), "kv_transfer_config": object()}), "a key-value connector"),
    ],
)  # fmt: skip
def test_what_plans_cannot_be_served_with(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match="steering plans cannot be served with .*" + re.escape(message)):
        refuse_config(wrong, SERVED)


def test_float16_is_refused_for_vectors_alone() -> None:
    refuse_config(config({"dtype": torch.float16}), Served({"a": GAINS}))


def test_experts_that_cannot_be_reached_are_refused_by_name() -> None:
    runner: Any = FakeRunner(ROUTERS["softmax"]())
    refuse_runner(runner, 3)
    runner.is_monolithic = True
    with pytest.raises(ValueError, match=r"layer 3 are run by a monolithic kernel \(object\) that routes inside"):
        refuse_runner(runner, 3)
    runner.is_monolithic, runner.do_naive_dispatch_combine = False, True
    with pytest.raises(ValueError, match="is given the tokens of all data-parallel ranks"):
        refuse_runner(runner, 3)
    runner.router = SimpleNamespace()
    with pytest.raises(ValueError, match="the router of layer 3 is a SimpleNamespace"):
        refuse_runner(runner, 3)


def test_other_versions_are_refused_by_name() -> None:
    refuse_version("0.30.0")
    refuse_version("0.32.1+cpu")
    for version in ("0.29.9", "0.33.0", "1.0", "dev"):
        with pytest.raises(ValueError, match=f"tested on vLLM 0.30 up to, not including, 0.33, and this is {version}"):
            refuse_version(version)


def test_an_untested_vllm_runs_without_plans_and_not_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plug-in is loaded into every vLLM of its environment: it must not stop those that ask for nothing."""

    class EngineArgs:
        def create_engine_config(self, extra: Any) -> Any:
            return SimpleNamespace(additional_config=extra)

    vllm, engine, arg_utils = ModuleType("vllm"), ModuleType("vllm.engine"), ModuleType("vllm.engine.arg_utils")
    vllm.__version__, arg_utils.EngineArgs = "0.41.0", EngineArgs  # type: ignore[attr-defined]
    for module in (vllm, engine, arg_utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    register()
    register()
    assert EngineArgs().create_engine_config({}).additional_config == {}
    with pytest.raises(ValueError, match=r"and this is 0\.41\.0: install one of those"):
        EngineArgs().create_engine_config({"moe_steer": json.loads("{}")})


def test_what_fired_is_asked_of_every_data_parallel_engine() -> None:
    """vLLM's own call hands on what the first says; and requests go to all of them."""
    said = {
        b"0": {"routers": {"1": "FusedTopKRouter"}, "counts": {"a": {"hits": [1, 0], "tokens": 5}}},
        b"1": {"routers": {"1": "FusedTopKRouter"}, "counts": {"a": {"hits": [2, 7], "tokens": 9}}},
    }

    async def call(kind: str, method: str, timeout: None, args: tuple[Any, ...], named: None, *, engine: bytes) -> Any:
        assert (kind, method, args) == ("collective_rpc", "steer_status", ())
        return [json.dumps(said[engine]), "what the second worker says"]

    client = SimpleNamespace(engine_core=SimpleNamespace(core_engines=list(said), _call_utility_async=call))
    workers = asyncio.run(of_engines(client, "steer_status"))
    assert workers == list(said.values())
    assert summed(workers) == {"routers": said[b"0"]["routers"], "counts": {"a": {"hits": [3, 7], "tokens": 14}}}
