"""An embedded model behind HTTP, as vLLM serves it: with the plug-in that knows plans, or without, where it ignores the field."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from local_endpoint import Handler, Server
from moe_steer import SteeringPlan, observe_routing, steer
from moe_steer.layers import model_shape
from reasoning_evals.engines import InProcessSampler, Request, SamplingConfig


class ServedLab:
    """What a server knows and does. ``plans``: None for one without the plug-in. ``routing``: whether it sends routed_experts.
    ``ignores``: it says that it has the plans, and serves the plain model."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plans: Mapping[str, SteeringPlan] | None,
        *,
        routing: bool = False,
        ignores: bool = False,
        default: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.plans = model, tokenizer, plans
        self.routing, self.ignores, self.default = routing, ignores, default
        self.audits: dict[str, dict[str, Any]] = {}
        self.lock = threading.Lock()  # one request at a time: plans are hooks on the one model

    def entries(self, plan: SteeringPlan) -> list[dict[str, Any]]:
        experts = [{"kind": "expert", **entry.to_dict()} for entry in plan.active_experts]
        keys = ("layer", "strength", "scope", "unit")
        vectors = [
            {"kind": "residual", "file": entry.name, **{key: getattr(entry, key) for key in keys}}
            for entry in plan.active_residual
        ]
        return experts + vectors

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "the-lab", "object": "model"}]}
        if path == "/v1/steering" and self.plans is not None:
            plans = {
                name: {
                    "digest": plan.digest(),
                    "layers": [],
                    "routers": [],
                    "entries": self.entries(plan),
                    "hits": [],
                    "tokens": 0,
                }
                for name, plan in self.plans.items()
            }
            about = {"engine": "vllm", "version": "0.32.0", "plugin": "0.1.0"}
            return 200, {"version": 1, "server": about, "default": self.default, "plans": plans}
        audit = self.audits.get(path.removeprefix("/v1/steering/requests/"))
        return (404, {"detail": "Not Found"}) if audit is None else (200, audit)

    def __call__(self, handler: Handler, body: dict[str, Any]) -> None:
        asked = body.get("vllm_xargs", {}).get("moe_steer", self.default)
        plan = None
        if self.plans is not None and asked not in (None, "off"):
            if asked not in self.plans:
                handler.start(400, "application/json")
                handler.write(json.dumps({"error": {"message": f"unknown plan {asked}", "code": 400}}).encode())
                return
            plan = self.plans[asked]
        with self.lock:
            request_id = f"cmpl-{len(self.audits)}-{handler.server.server_address[1]}"
            choice = self.answer(body, plan, asked, request_id)
        usage = {"completion_tokens": len(choice["token_ids"])}
        if not body.get("stream"):
            handler.start(200, "application/json")
            handler.write(json.dumps({"id": request_id, "choices": [choice], "usage": usage}).encode())
            return
        handler.start()
        first = {"index": 0, "text": "", "token_ids": [], "prompt_token_ids": choice.pop("prompt_token_ids")}
        for event in ({**first, "finish_reason": None}, choice):
            handler.write(b"data: " + json.dumps({"id": request_id, "choices": [event]}).encode() + b"\n\n")
        handler.write(b"data: [DONE]\n\n")

    def answer(
        self, body: dict[str, Any], plan: SteeringPlan | None, asked: str | None, request_id: str
    ) -> dict[str, Any]:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        greedy = body["temperature"] == 0
        config = SamplingConfig(
            temperature=1.0 if greedy else body["temperature"],
            top_p=body.get("top_p", 1.0),
            max_new_tokens=body["max_tokens"],
            greedy=greedy,
            batch_size=1,
        )
        applied = SteeringPlan() if plan is None or self.ignores else plan
        with steer(self.model, applied, tokenizer=self.tokenizer, quiet=True) as audit:
            request = Request(tuple(prompt), body.get("seed", 0), None)
            (sample,) = InProcessSampler(self.model, self.tokenizer).sample([request], config)
        if plan is not None:
            rows = {(row["kind"], row["layer"], row.get("expert")): row["tokens"] for row in audit.to_rows()}
            hits = [rows.get((e["kind"], e["layer"], e.get("expert")), 0) for e in self.entries(plan)]
            one = {"prompt": 0, "sample": 0, "plan": asked, "dose": 1.0, "tokens": 0, "hits": hits}
            self.audits[request_id] = {"version": 1, "id": request_id, "samples": [one]}
        else:
            self.audits[request_id] = {}
        choice: dict[str, Any] = {
            "index": 0,
            "text": sample.text,
            "token_ids": list(sample.token_ids),
            "prompt_token_ids": prompt,
            "finish_reason": sample.finish_reason,
        }
        if self.routing:
            choice["routed_experts"] = self.routed(prompt + list(sample.token_ids)[:-1])
        if "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": self.scores(prompt, list(sample.token_ids), applied)}
        return choice

    def routed(self, ids: list[int]) -> str:
        """Base64 of .npy, [rows, all layers, k]; dense layers are zeros."""
        shape = model_shape(self.model)
        array = np.zeros((len(ids), shape.num_layers, shape.top_k), np.uint8)

        def sink(layer: int, ids_TK: torch.Tensor, _: torch.Tensor) -> None:
            array[:, layer] = ids_TK.numpy()

        with torch.inference_mode(), observe_routing(self.model, sink):
            self.model(torch.tensor([ids]))
        file = io.BytesIO()
        np.save(file, array)
        return base64.b64encode(file.getvalue()).decode()

    def scores(self, prompt: list[int], ids: list[int], plan: SteeringPlan) -> list[float]:
        with (
            torch.inference_mode(),
            steer(self.model, plan, tokenizer=self.tokenizer, prompt_lengths=[len(prompt)], quiet=True),
        ):
            logits_SV = self.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        found: list[float] = logits_SV.float().log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()
        return found


class BakedLab(ServedLab):
    """A server without the plug-in, whose weights hold a plan."""

    def __init__(self, model: Any, tokenizer: Any, plan: SteeringPlan) -> None:
        super().__init__(model, tokenizer, None)
        self.baked = plan

    def answer(
        self, body: dict[str, Any], plan: SteeringPlan | None, asked: str | None, request_id: str
    ) -> dict[str, Any]:
        return super().answer(body, self.baked, asked, request_id)


class GetHandler(Handler):
    def do_GET(self) -> None:
        status, values = self.server.say.get(self.path)  # type: ignore[attr-defined]
        self.start(status, "application/json")
        self.write(json.dumps(values).encode())


@contextmanager
def served(lab: ServedLab, port: int = 0) -> Iterator[str]:
    """The address, for the length of the block."""

    server = Server(lab, port, GetHandler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
