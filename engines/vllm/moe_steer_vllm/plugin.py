"""Where vLLM is taken hold of. Its plug-in interface has no place for this, so six of its methods are wrapped, each of them for what
it is called with and returns; which have stayed the same since which version, and what happens on others, is said in docs/engines.md.

- ``EngineArgs.create_engine_config``: plans are read and checked where the server starts
- ``to_sampling_params`` of the HTTP requests, ``InputProcessor.process_inputs``: names are checked in the front end, and the salt of
  the prefix cache is set before any block is hashed
- ``Worker.load_model``: tables are built and bound to routers and layers, after the weights, before anything is compiled or captured
- ``execute_model`` and ``prepare_inputs`` of the model runners: which token runs under which plan
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from typing import Any

from moe_steer_vllm import __version__
from moe_steer_vllm.binding import bind
from moe_steer_vllm.following import Step
from moe_steer_vllm.limits import refuse_config, refuse_version
from moe_steer_vllm.served import KEY, Served, entries, served_by, settings_of

_FRONT: list[Served] = []
"""What the engines of this process serve; requests over HTTP are checked against the last."""


def register() -> None:
    """The entry point; vLLM calls it in every process, and sometimes twice in one."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs.create_engine_config, "steers", False):
        return
    try:
        refuse_version(vllm.__version__)
    except ValueError as error:
        message = str(error)
        _wrap(
            EngineArgs,
            "create_engine_config",
            lambda make: lambda self, *a, **k: _untested(make(self, *a, **k), message),
        )
        return
    _wrap(EngineArgs, "create_engine_config", _with_plans)
    _wrap_front()
    _wrap_workers()


def _wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    inner = getattr(owner, name)
    outer: Any = functools.wraps(inner)(wrapper(inner))
    outer.steers = True
    setattr(owner, name, outer)


def _untested(config: Any, message: str) -> Any:
    if settings_of(config) is not None:
        raise ValueError(message)
    return config


def _with_plans(make: Any) -> Any:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = make(self, *args, **kwargs)
        settings = settings_of(config)
        if settings is not None:
            served = Served.of(settings)
            refuse_config(config, served)
            if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
                raise ValueError(
                    "steering plans are checked in vLLM's Python front end: start it without VLLM_USE_RUST_FRONTEND"
                )
            # A part of the hash of vLLM's compile cache: a graph of other plans is not taken for one of these.
            digests = {name: plan.digest() for name, plan in served.plans.items()}
            said = {**settings, "digests": digests, "plugin": __version__}
            config.additional_config = {**config.additional_config, KEY: said}
        return config

    return create_engine_config


def _wrap_front() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.v1.engine.input_processor import InputProcessor

    def with_served(init: Any) -> Any:
        def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            init(self, vllm_config, *args, **kwargs)
            self.steer_served = served_by(vllm_config)
            _FRONT.append(self.steer_served)

        return __init__

    def checked(process: Any) -> Any:
        def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            served: Served = self.steer_served
            asked = served.asked(getattr(params, "extra_args", None))
            request = process(self, request_id, prompt, params, *args, **kwargs)
            if asked is None or request.sampling_params is None:
                return request
            if request.resumable:
                raise ValueError(
                    "a session that is fed piece by piece has no prompt that ends: no plan can be asked for there"
                )
            if served.reads_tokens(asked) and (
                request.prompt_token_ids is None or request.prompt_is_token_ids is not None
            ):
                raise ValueError(
                    f"a scope of plan {asked.name} reads the tokens of the prompt, and this one holds embeddings"
                )
            request.sampling_params.extra_args = {**(request.sampling_params.extra_args or {}), KEY: str(asked)}
            request.cache_salt = f"{request.cache_salt or ''}|{served.salt(asked)}"
            return request

        return process_inputs

    def named(make: Any) -> Any:
        def to_params(self: Any, *args: Any, **kwargs: Any) -> Any:
            extra = getattr(self, "vllm_xargs", None)
            if _FRONT:  # before a streamed reply has begun, whose status could no longer say 400
                _FRONT[-1].asked(extra)
            return make(self, *args, **kwargs)

        return to_params

    def no_beams(make: Any) -> Any:
        def to_beams(self: Any, *args: Any, **kwargs: Any) -> Any:
            if KEY in (getattr(self, "vllm_xargs", None) or {}):
                raise ValueError(f"beam search hands no {KEY} on to its samples: leave use_beam_search or {KEY} out")
            return make(self, *args, **kwargs)

        return to_beams

    _wrap(InputProcessor, "__init__", with_served)
    _wrap(InputProcessor, "process_inputs", checked)
    for kind in (CompletionRequest, ChatCompletionRequest, ResponsesRequest):
        _wrap(kind, "to_sampling_params", named)
        if hasattr(kind, "to_beam_search_params"):
            _wrap(kind, "to_beam_search_params", no_beams)


def _wrap_workers() -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.worker_base import WorkerBase

    def bound(load: Any) -> Any:
        def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = load(self, *args, **kwargs)
            if settings_of(self.vllm_config) is not None:
                self.model_runner.steer_following = bind(self.model_runner.get_model(), self.vllm_config, self.device)
            return result

        return load_model

    def followed(execute: Any) -> Any:
        def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            following = getattr(self, "steer_following", None)
            if following is not None and not kwargs.get("dummy_run"):
                following.go(scheduler_output.finished_req_ids)
                for new in scheduler_output.scheduled_new_reqs:
                    if new.sampling_params is not None:
                        following.come(new.req_id, new.sampling_params.extra_args)
            return execute(self, scheduler_output, *args, **kwargs)

        return execute_model

    def rehearsed(run: Any) -> Any:
        def dummy_run(self: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(self, "steer_following", None) is not None:
                self.steer_following.rehearse()
            return run(self, *args, **kwargs)

        return dummy_run

    def prepared_v1(prepare: Any) -> Any:
        def prepare_inputs(self: Any, scheduler_output: Any, counts: Any, *args: Any, **kwargs: Any) -> Any:
            result = prepare(self, scheduler_output, counts, *args, **kwargs)
            following = getattr(self, "steer_following", None)
            if following is not None:
                batch = self.input_batch
                n = batch.num_reqs
                step = Step(
                    batch.req_ids[:n],
                    counts,
                    batch.num_computed_tokens_cpu[:n],
                    batch.num_prompt_tokens[:n],
                    lambda r, length: batch.token_ids_cpu_tensor[r, :length],
                )
                following.step(step, lambda: self.input_ids.gpu)
            return result

        return prepare_inputs

    def prepared_v2(prepare: Any) -> Any:
        def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            batch = prepare(self, *args, **kwargs)
            following = getattr(self, "steer_following", None)
            if following is not None:
                states, rows = self.req_states, batch.idx_mapping_np
                step = Step(
                    batch.req_ids,
                    batch.num_scheduled_tokens,
                    batch.num_computed_tokens_np,
                    states.prompt_len.np[rows],
                    lambda r, length: states.all_token_ids.gpu[rows[r], :length],
                )
                following.step(step, lambda: batch.input_ids)
            return batch

        return prepare_inputs

    _wrap(Worker, "load_model", bound)
    for kind in (RunnerV1, RunnerV2):
        _wrap(kind, "execute_model", followed)
        _wrap(kind, "_dummy_run", rehearsed)
    _wrap(RunnerV1, "_prepare_inputs", prepared_v1)
    _wrap(RunnerV2, "prepare_inputs", prepared_v2)
    WorkerBase.steer_status = lambda self: json.dumps(_worker_status(self))
    WorkerBase.steer_request = lambda self, reply: json.dumps(_worker_request(self, reply))


def _worker_status(worker: Any) -> dict[str, Any]:
    following = getattr(worker.model_runner, "steer_following", None)
    return (
        {"counts": {}, "routers": {}}
        if following is None
        else {"counts": following.status(), "routers": following.routers}
    )


def _worker_request(worker: Any, reply: str) -> list[dict[str, Any]]:
    following = getattr(worker.model_runner, "steer_following", None)
    return [] if following is None else following.of_request(reply)


def state_of(served: Served, version: str, worker: dict[str, Any]) -> dict[str, Any]:
    """What ``GET /v1/steering`` answers. ``worker``: ``steer_status``, of all engines together."""
    plans = {}
    for name, plan in served.plans.items():
        layers = sorted({entry.layer for entry in plan.active_experts})
        routers = sorted({worker["routers"][str(layer)] for layer in layers})
        bound = sorted({*layers, *(entry.layer for entry in plan.active_residual)})
        plans[name] = {
            "digest": plan.digest(),
            "layers": bound,
            "routers": routers,
            "entries": entries(plan),
            **worker["counts"][name],
        }
    server = {"engine": "vllm", "version": version, "plugin": __version__}
    return {"version": 1, "server": server, "default": str(served.default) if served.default else None, "plans": plans}
