"""Two data-parallel engines behind one front end, each of which has the plans, follows its own requests and counts their hits.

The dense model runs on vLLM as it is. A mixture of experts does not on a CPU, whose engines cannot exchange tokens: ``cpu_parallel``
adds what is missing. Runs in this project's environment; STEER_PYTHON is vLLM's.
"""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from test_http import Server

EXPERTS = ("--worker-extension-cls", "cpu_parallel.Extension", "--block-size", "32")


@pytest.mark.parametrize(
    ("model", "options"),
    [("dense", ()), ("qwen", EXPERTS), ("qwen", (*EXPERTS, "--enable-expert-parallel"))],
    ids=["dense", "experts cut in two", "experts on one rank each"],
)
def test_either_engine_answers_and_both_are_asked_what_fired(
    model: str,
    options: tuple[str, ...],
    folder: Path,
    reference: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    found = reference[model]
    options = ("--data-parallel-size", "2", *options)
    server = Server(folder, tmp_path / "log", options=options, model=str(folder / model), names=found["plans"])
    pairs = [(n, asked) for n in range(len(found["prompts"])) for asked in found["asked"]]

    def ask(pair: tuple[int, str]) -> tuple[list[int], list[dict[str, Any]]]:
        more = {"return_token_ids": True, "vllm_xargs": {"moe_steer": pair[1]}}
        reply = server.post(prompt=found["prompts"][pair[0]], max_tokens=found["new_tokens"], **more).json()
        audit = server.get(f"/v1/steering/requests/{reply['id']}").json()
        return reply["choices"][0]["token_ids"], audit.get("samples", [])

    try:
        with ThreadPoolExecutor(len(pairs)) as pool:
            answers = dict(zip(pairs, pool.map(ask, pairs), strict=True))
        plans = server.get("/v1/steering").json()["plans"]
        done = re.findall(r'^vllm:request_success_total\{engine="(\d)".*finished_reason="\w+".* (\d+)\.0$', server.get("/metrics").text, re.M)  # fmt: skip
    finally:
        server.end(signal.SIGTERM)
    by_engine = {engine: sum(int(n) for at, n in done if at == engine) for engine, _ in done}
    assert len(by_engine) == 2
    assert sum(by_engine.values()) == len(pairs)
    assert min(by_engine.values()) > len(pairs) // 4, "both have answered"
    assert [pair for pair in pairs if answers[pair][0] != found["asked"][pair[1]]["tokens"][pair[0]]] == []
    totals = {name: [0] * len(plan["hits"]) for name, plan in plans.items()}
    for asked, said in found["asked"].items():
        audits = [answers[n, asked][1] for n in range(len(found["prompts"]))]
        assert [len(one) for one in audits] == [int(asked != "off")] * len(audits)
        if asked != "off":
            hits = [sum(column) for column in zip(*(one[0]["hits"] for one in audits), strict=True)]
            assert hits == said["hits"], asked
            name = asked.partition("*")[0]
            totals[name] = [a + b for a, b in zip(totals[name], hits, strict=True)]
    assert {name: plan["hits"] for name, plan in plans.items()} == totals
