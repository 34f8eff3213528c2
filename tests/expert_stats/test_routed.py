"""Routing that engines recorded: as counted here from the same tokens, in every form in which it is found on disk."""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from expert_stats import Trace, collect_counts, count_routed, read_rollouts, routed_trace
from expert_stats.routed import replay
from moe_steer.layers import model_shape
from moe_steer.observe import observe_routing
from stats_helpers import MARKERS, random_traces
from test_collect import recorded_routing
from tiny import deepseek_v3, qwen3_moe

TINY = {"deepseek_v3": deepseek_v3, "qwen3_moe": qwen3_moe}


def as_engine(model: Any, trace: Trace) -> Any:
    """[tokens - 1, all layers, k], dense layers as zeros: what vLLM returns."""
    shape = model_shape(model)
    found = recorded_routing(model, trace)
    ids = np.zeros((len(trace.token_ids), shape.num_layers, shape.top_k), dtype=np.uint8)
    for layer, rows in found.items():
        ids[:, layer] = rows
    return ids[:-1]


def npy(array: Any) -> str:
    content = io.BytesIO()
    np.save(content, array)
    return base64.b64encode(content.getvalue()).decode()


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.parametrize("base", ["generated", "all"])
def test_recorded_routing_counts_as_a_forward_pass_does(name: str, base: str) -> None:
    model = TINY[name]()
    shape = model_shape(model)
    traces = random_traces(12, seed=3)
    routed = [routed_trace(trace, as_engine(model, trace), shape) for trace in traces]
    counted = count_routed(routed, shape, MARKERS, base=base)
    shorter = [item.trace for item in routed]
    assert [item.token_ids for item in shorter] == [trace.token_ids[:-1] for trace in traces]
    forward = collect_counts(model, shorter, MARKERS, base=base)
    assert counted.num_tokens > 0
    for key, array in counted.grouped().items():
        np.testing.assert_array_equal(array, forward.grouped()[key], err_msg=key)


def test_replay_gives_a_sink_what_observe_routing_gives_it() -> None:
    model = deepseek_v3()
    shape = model_shape(model)
    trace = random_traces(1, seed=5)[0]
    seen: dict[int, tuple[Any, Any]] = {}
    with torch.no_grad(), observe_routing(model, lambda layer, ids, weights: seen.__setitem__(layer, (ids, weights))):
        model(torch.tensor([trace.token_ids]))
    weights = np.zeros((len(trace.token_ids), shape.num_layers, shape.top_k), dtype=np.float32)
    ids = np.zeros(weights.shape, dtype=np.int32)
    for layer, (layer_ids, layer_weights) in seen.items():
        ids[:, layer], weights[:, layer] = layer_ids, layer_weights
    again: dict[int, tuple[Any, Any]] = {}
    item = routed_trace(trace, ids, shape, topk_weights=weights)
    replay(item, shape, lambda layer, ids, weights: again.__setitem__(layer, (ids, weights)))
    assert sorted(again) == sorted(seen) == list(shape.moe_layers)
    for layer in seen:
        assert torch.equal(again[layer][0], seen[layer][0])
        assert torch.equal(again[layer][1], seen[layer][1])
    alone = routed_trace(trace, ids, shape)
    replay(alone, shape, lambda layer, ids, weights: again.__setitem__(layer, (ids, weights)))
    assert all(again[layer][1].isnan().all() for layer in seen)


def forms(model: Any, trace: Trace) -> dict[str, Any]:
    """One rollout in the forms that engines and training frameworks write."""
    full = as_engine(model, trace)
    experts_only = full[:, list(model_shape(model).moe_layers)]
    prompt, response = list(trace.token_ids[: trace.prompt_length]), list(trace.token_ids[trace.prompt_length :])
    raw = base64.b64encode(full.astype("<i4").tobytes()).decode()
    choice = {"index": 0, "token_ids": response, "routed_experts": npy(full)}
    return {
        "vllm": {"id": "cmpl-1", "prompt_token_ids": prompt, "choices": [choice]},
        "vllm, prompt in the choice": {"choices": [{**choice, "prompt_token_ids": prompt}]},
        "vllm, prompt skipped": {
            "choices": [
                {
                    **choice,
                    "prompt_token_ids": prompt,
                    "routed_experts": npy(full[len(prompt) :]),
                    "routed_experts_prompt_start": len(prompt),
                }
            ]
        },
        "sglang": {
            "output_ids": response,
            "meta_info": {
                "routed_experts": raw,
                "input_token_logprobs": [[-1.0, token, None] for token in prompt],
                "prompt_tokens": len(prompt),
            },
        },
        "sglang chat": {
            "choices": [{"prompt_token_ids": prompt, "token_ids": response}],
            "sglext": {"routed_experts": raw},
        },
        "slime": {
            "tokens": list(trace.token_ids),
            "response_length": len(response),
            "rollout_routed_experts": full.tolist(),
        },
        "flat": {"prompt_ids": prompt, "completion_ids": response, "routed_experts": experts_only.tolist()},
        "packed": {
            "prompt_ids": prompt,
            "completion_ids": response,
            "routed_experts": {
                "data": base64.b64encode(experts_only.astype("<i2").tobytes()).decode(),
                "dtype": "int16",
                "shape": list(experts_only.shape),
            },
        },
        "every token has a row": {
            "prompt_ids": prompt,
            "response_ids": response,
            "expert_ids": np.concatenate([full, full[-1:]]).tolist(),
        },
        "padded with -1": {
            "prompt_ids": prompt,
            "response_ids": response,
            "topk_ids": np.concatenate([full.astype(np.int64), -np.ones_like(full[:3], dtype=np.int64)]).tolist(),
        },
    }


FORMS = list(forms(deepseek_v3(), random_traces(1, seed=1)[0]))


@pytest.mark.parametrize("kind", ["json", "jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tmp_path: Path, form: str, kind: str) -> None:
    if (form, kind) == ("sglang", "parquet"):
        pytest.skip("a parquet column holds one type: it cannot hold [value, id, text]")
    model = deepseek_v3()
    trace = random_traces(1, seed=7)[0]
    row = forms(model, trace)[form]
    file = tmp_path / f"rollouts.{kind}"
    if kind == "json":
        file.write_text(json.dumps(row))
    elif kind == "jsonl":
        file.write_text(json.dumps(row) + "\n")
    elif kind == "jsonl.gz":
        file.write_bytes(gzip.compress((json.dumps(row) + "\n").encode()))
    else:
        parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    (rollout,) = read_rollouts(tmp_path)
    assert (*rollout.prompt_ids, *rollout.response_ids) == trace.token_ids
    assert len(rollout.prompt_ids) == trace.prompt_length
    shape = model_shape(model)
    item = routed_trace(trace, rollout.topk_ids, shape, first=rollout.first)
    wanted = as_engine(model, trace)[:, list(shape.moe_layers)]
    np.testing.assert_array_equal(item.topk_ids_RLK[: len(wanted) - rollout.first], wanted[rollout.first :])
    assert item.trace.token_ids == trace.token_ids[rollout.first : rollout.first + len(item.topk_ids_RLK)]
    assert item.trace.prompt_length == trace.prompt_length - rollout.first


def test_samples_of_one_prompt_are_one_problem(tmp_path: Path) -> None:
    rows = [
        {"prompt_ids": prompt, "completion_ids": [5, 6], "routed_experts": [[[0, 1]]]}
        for prompt in ([1, 2], [1, 3], [1, 2])
    ]
    rows[1]["problem_id"] = "named"
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [rollout.problem for rollout in read_rollouts(file)]
    assert names[0] == names[2]
    assert names[1] == "named"
    assert names[0].startswith("prompt-")


def test_columns_of_fused_shared_experts_are_left_out() -> None:
    model = deepseek_v3()
    shape = model_shape(model)
    trace = random_traces(1, seed=7)[0]
    ids = as_engine(model, trace)
    shared = np.full((*ids.shape[:2], 1), shape.num_experts)
    item = routed_trace(trace, np.concatenate([ids, shared], axis=2), shape)
    np.testing.assert_array_equal(item.topk_ids_RLK, ids[:, list(shape.moe_layers)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids[:-3], "rows for"),
        (lambda ids: ids[:, :1], "have 1 layers: this model has"),
        (lambda ids: ids[..., :1], "have 1 ids a token: this model selects 4"),
        (lambda ids: np.concatenate([ids, ids[..., :1]], axis=2), "have 5 ids a token"),
        (lambda ids: ids.astype(np.int64) + 100, "name expert 1"),
        (lambda ids: ids * 0, "name one expert twice at row 0"),
        (lambda ids: -np.ones(ids.shape, dtype=np.int64), "hold 0 rows"),
        (lambda ids: ids.astype(str), "values: integers"),
        (lambda ids: ids[None], r"\[rows, layers, top-k\] is expected"),
        (lambda ids: ids.reshape(-1)[:-1], "no number of rows"),
    ],
)
def test_what_no_router_selected_is_refused(change: Any, message: str) -> None:
    model = deepseek_v3()
    trace = random_traces(1, seed=7)[0]
    with pytest.raises(ValueError, match=message):
        routed_trace(trace, change(as_engine(model, trace)), model_shape(model))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt_ids": [1], "completion_ids": [2]}, "holds no routed_experts.*--enable-return-routed-experts"),
        ({"routed_experts": [[[0]]], "completion_ids": [2]}, "no token ids of the prompt.*return_token_ids"),
        ({"routed_experts": [[[0]]], "prompt_ids": [2]}, "no token ids of the response"),
        ({"routed_experts": [[[0]]], "prompt_ids": [2], "completion_ids": "text"}, "a list of token ids is expected"),
        ({"routed_experts": "!!", "prompt_ids": [2], "completion_ids": [1]}, "cannot be read as an array"),
        ({"routed_experts": [[[0], [1, 2]]], "prompt_ids": [2], "completion_ids": [1]}, "cannot be read as an array"),
        ({"routed_experts": [[["a"]]], "prompt_ids": [2], "completion_ids": [1]}, "numbers of one shape"),
        ({"routed_experts": {"data": "AAAA", "shape": [9], "dtype": "int8"}, "prompt_ids": [2], "token_ids": [1]}, "as an array"),
        ({"routed_experts": {"data": "AAAA", "shape": [1], "dtype": "O"}, "prompt_ids": [2], "token_ids": [1]}, "as an array"),
        ({"tokens": [1], "response_length": 4, "routed_experts": [[[0]]]}, "response_length is 4"),
        ({"choices": [3]}, "a list of objects is expected"),
        ({"routed_experts": [[[0]]], "prompt_ids": [2], "token_ids": [1], "routed_experts_prompt_start": "1"}, "prompt_start is '1'"),
    ],
)  # fmt: skip
def test_rows_that_lack_something_are_refused_with_file_and_row(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"r\.jsonl:1.*{message}") as caught:
        list(read_rollouts(file))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_a_pickled_array_is_not_opened(tmp_path: Path) -> None:
    content = io.BytesIO()
    np.save(content, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    row = {
        "prompt_ids": [1],
        "token_ids": [2],
        "routed_experts": base64.b64encode(content.getvalue()).decode(),
    }
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="cannot be read as an array"):
        list(read_rollouts(tmp_path))


def test_no_rollouts_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rollouts at"):
        list(read_rollouts(tmp_path))
    (tmp_path / "r.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no rollouts"):
        list(read_rollouts(tmp_path))
    (tmp_path / "r.parquet").write_bytes(random.Random(0).randbytes(100))
    with pytest.raises(ValueError, match="no parquet file"):
        list(read_rollouts(tmp_path / "r.parquet"))


def test_the_same_trace_twice_is_refused() -> None:
    model = deepseek_v3()
    trace = random_traces(1, seed=7)[0]
    item = routed_trace(trace, as_engine(model, trace), model_shape(model))
    with pytest.raises(ValueError, match="occurs twice"):
        count_routed([item, item], model_shape(model), MARKERS)
    with pytest.raises(ValueError, match="no recorded routing"):
        count_routed([], model_shape(model), MARKERS)
