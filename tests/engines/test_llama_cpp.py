"""A real llama.cpp server (its own C++ server, in the wheel xllamacpp): what it writes is what the hooked model writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lab_gguf import write_lab_gguf
from launch.cli.main import main
from moe_steer import ExpertGain, SteeringPlan, load_model, steer
from moe_steer.lab import LAB_SERVED
from moe_steer.lab.problems import generate_problems

xllamacpp = pytest.importorskip("xllamacpp")
NEW_TOKENS, END = 80, 2
PLAN = SteeringPlan(experts=[ExpertGain(1, 12, 16.0), ExpertGain(3, 2, 16.0)])


@pytest.fixture(scope="module")
def lab() -> Any:
    return load_model("lab", device="cpu")


@pytest.fixture(scope="module")
def prompts(lab: Any) -> list[list[int]]:
    messages = [[{"role": "user", "content": one.prompt}] for one in generate_problems("test", 8, seed=3)]
    return [lab[1].apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in messages]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lab_gguf(tmp_path_factory.mktemp("gguf") / "lab.gguf")


def served(file: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens, without the one that ends a text."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(file), 512, 1, False
    params.cpuparams.n_threads, params.verbosity = 1, 0
    server = xllamacpp.Server(params)
    rows = []
    for ids in prompts:
        body = {"prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1}
        content = server.handle_completions(body)["choices"][0]["logprobs"]["content"]
        ids = [step["id"] for step in content]
        rows.append(ids[:-1] if ids[-1] == END else ids)
    return rows


def hooked(lab: Any, prompts: list[list[int]], plan: SteeringPlan) -> list[list[int]]:
    model, tokenizer = lab
    assert tokenizer.eos_token_id == END
    length = max(map(len, prompts))
    ids_BS = torch.tensor([[0] * (length - len(ids)) + ids for ids in prompts])
    with steer(model, plan, quiet=True), torch.no_grad():
        texts = model.generate(
            ids_BS, attention_mask=(ids_BS != 0).long(), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
    rows = texts[:, length:].tolist()
    return [row[: row.index(END)] if END in row else row for row in rows]


def test_the_lab_as_it_is_and_with_its_latents_filled_up(
    lab: Any, prompts: list[list[int]], file: Path, tmp_path: Path
) -> None:
    plain = hooked(lab, prompts, SteeringPlan())
    assert served(file, prompts) == plain
    larger = write_lab_gguf(tmp_path / "served.gguf", LAB_SERVED)
    assert served(larger, prompts) == plain


def test_a_baked_file_is_the_hooked_model(lab: Any, prompts: list[list[int]], file: Path, tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    baked = tmp_path / "baked.gguf"
    assert main(["bake", "--model", str(file), "--plan", str(tmp_path / "plan.json"), "--out", str(baked)]) == 0
    steered = hooked(lab, prompts, PLAN)
    assert served(baked, prompts) == steered
    assert steered != hooked(lab, prompts, SteeringPlan())
