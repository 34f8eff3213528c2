"""Steering against naive computations. The families' own rules are tested in test_families.py."""

import copy
import dataclasses
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from moe_steer import ExpertGain, ResidualVector, SteeringPlan, observe_residual, observe_routing, steer
from moe_steer.entries.audit import NothingFired, SteeringWarning


def routing(model: Any, ids: torch.Tensor, **kwargs: Any) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with observe_routing(model, lambda layer, ids_TK, w_TK: seen.update({layer: (ids_TK, w_TK)})):
        model(ids, **kwargs)
    return seen


def busiest(model: Any, ids: torch.Tensor, layer: int) -> int:
    return int(routing(model, ids)[layer][0].flatten().mode().values)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 96, (3, 14), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("build", [tiny.deepseek_v3, tiny.qwen3_moe])
def test_off_is_bitwise_off_and_nothing_is_hooked(build: Any, ids: torch.Tensor) -> None:
    model = build()
    plain = model(ids).logits
    for plan in (SteeringPlan(), SteeringPlan(experts=[ExpertGain(1, 2, 1.0)], renormalize=True)):
        with steer(model, plan) as audit:
            assert tiny.hook_count(model) == 0
            assert torch.equal(model(ids).logits, plain)
        assert audit.summary().startswith("the plan is neutral")


@pytest.mark.parametrize(
    "scope", ["all", "prompt", "generated", "after:5", "thought", "answer", "step_end", "step_end:line"]
)
def test_scopes_under_left_padding_and_cache_equal_one_forward(scope: str, ids: torch.Tensor) -> None:
    model = tiny.deepseek_v3()
    ids[:, 2], ids[:, 5], ids[0, 11], ids[2, 12] = tiny.THINK, 10, tiny.END_THINK, 30
    prompt = 4
    plan = SteeringPlan(experts=[ExpertGain(layer, busiest(model, ids, layer), 16.0) for layer in (1, 3)], scope=scope)
    options = {"tokenizer": tiny.TinyTokenizer()}
    plain = model(ids).logits
    with steer(model, plan, prompt_lengths=[prompt] * 3, **options) as whole_audit:
        whole = model(ids, use_cache=False).logits
    assert not torch.allclose(whole, plain, atol=1e-3), "a scope that moves nothing would prove nothing"
    padding = torch.zeros(3, 3, dtype=torch.long)
    padded, mask = torch.cat([padding, ids], 1), torch.cat([padding, torch.ones_like(ids)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with steer(model, plan, **options) as audit:
        cut = 3 + prompt
        out = model(padded[:, :cut], attention_mask=mask[:, :cut], position_ids=positions[:, :cut], use_cache=True)
        logits, cache = [out.logits[:, 3:]], out.past_key_values
        for t in range(cut, padded.shape[1]):
            out = model(
                padded[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                position_ids=positions[:, t : t + 1],
                past_key_values=cache,
            )
            logits.append(out.logits)
    assert torch.allclose(torch.cat(logits, 1), whole, atol=2e-4)
    assert {k: v.tokens for k, v in audit.fired.items()} == {k: v.tokens for k, v in whole_audit.fired.items()}


def test_audit_equals_a_count_by_hand(ids: torch.Tensor) -> None:
    model = tiny.qwen3_moe()
    expert = busiest(model, ids, 0)
    topk_ids_TK, weights_TK = routing(model, ids)[0]
    hit_TK = topk_ids_TK == expert
    with steer(model, SteeringPlan(experts=[ExpertGain(0, expert, 8.0)])) as audit:
        model(ids)
    assert audit.fired[0, expert].tokens == int(hit_TK.sum())
    assert audit.fired[0, expert].weight_added == pytest.approx(float((weights_TK[hit_TK] * 7).sum()), rel=1e-5)
    assert audit.to_rows()[0]["gain"] == 8.0
    assert "selected by" in audit.summary()


def test_padding_is_not_audited(ids: torch.Tensor) -> None:
    model = tiny.qwen3_moe()
    plan = SteeringPlan(experts=[ExpertGain(0, busiest(model, ids, 0), 8.0)])
    with steer(model, plan) as bare:
        model(ids)
    padded = torch.cat([ids, torch.full((3, 9), 7)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(3, 9, dtype=torch.long)], 1)
    with steer(model, plan) as audit:
        model(padded, attention_mask=mask)
    assert {k: v.tokens for k, v in audit.fired.items()} == {k: v.tokens for k, v in bare.fired.items()}


def test_zero_gain_equals_a_zeroed_expert(ids: torch.Tensor) -> None:
    model = tiny.qwen3_moe()
    expert = busiest(model, ids, 1)
    with steer(model, SteeringPlan(experts=[ExpertGain(1, expert, 0.0)])):
        steered = model(ids).logits
    down = model.model.layers[1].mlp.experts.down_proj
    saved = down[expert].clone()
    down[expert] = 0
    zeroed = model(ids).logits
    down[expert] = saved
    assert torch.allclose(steered, zeroed, atol=1e-5)


def test_hooks_are_gone_after_exit_and_after_errors(ids: torch.Tensor) -> None:
    model = tiny.deepseek_v3()
    plan = SteeringPlan(experts=[ExpertGain(1, busiest(model, ids, 1), 4.0)])
    plain = model(ids).logits
    with pytest.raises(KeyError):
        with steer(model, plan):
            assert tiny.hook_count(model) == 4
            raise KeyError("inside")
    assert tiny.hook_count(model) == 0
    with pytest.raises(ZeroDivisionError):
        with observe_routing(model, lambda *_: 1 / 0):
            model(ids)
    assert tiny.hook_count(model) == 0
    with pytest.raises(ValueError, match="has no experts"):
        with steer(model, SteeringPlan(experts=[ExpertGain(0, 0, 2.0)])):
            pass
    assert tiny.hook_count(model) == 0
    assert torch.equal(model(ids).logits, plain)


def test_a_copy_made_inside_is_not_steered_for_ever(ids: torch.Tensor, tmp_path: Path) -> None:
    model = tiny.deepseek_v3()
    plain = model(ids).logits
    vectors(tmp_path, model.config.hidden_size, 1)
    entry = ExpertGain(1, busiest(model, ids, 1), 4.0, force="in")
    plan = SteeringPlan(experts=[entry], residual=[ResidualVector(1, "0.safetensors", 2.0)], base_dir=str(tmp_path))
    with steer(model, plan):
        twin = copy.deepcopy(model)
        steered = model(ids).logits
    assert torch.equal(twin(ids).logits, plain)
    with steer(twin, plan):
        assert torch.equal(twin(ids).logits, steered)


def test_a_copy_made_inside_generates_by_its_own_weights(ids: torch.Tensor, tmp_path: Path) -> None:
    """Its prompt was read by the model that it was copied from."""
    model = tiny.qwen2()
    vectors(tmp_path, model.config.hidden_size, 1)
    plan = SteeringPlan(residual=[ResidualVector(1, "0.safetensors", 4.0, "generated")], base_dir=str(tmp_path))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with steer(model, plan):
        steered = model.generate(ids, **options)
        twin = copy.deepcopy(model)
        assert torch.equal(twin.generate(ids, **options), steered)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(twin.generate(ids, prefill_chunk_size=5, **options), twin.generate(ids, **options))
    assert not calls


@pytest.mark.parametrize("scope", ["generated", "prompt", "after:2"])
def test_a_prompt_that_generate_reads_in_parts_is_told_from_the_answer_or_refused(
    scope: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    """Behind the first part, the rest of the prompt was taken for generated tokens."""
    model = tiny.qwen2()
    vectors(tmp_path, model.config.hidden_size, 1)
    plan = SteeringPlan(residual=[ResidualVector(1, "0.safetensors", 4.0, scope)], base_dir=str(tmp_path))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with steer(model, plan):
        whole = model.generate(ids, **options)
        with pytest.raises(ValueError, match="pass prompt_lengths"):
            model.generate(ids, prefill_chunk_size=5, **options)
        assert torch.equal(model.generate(ids, **options), whole), "the refusal leaves nothing behind"
    with steer(model, plan, prompt_lengths=[14] * 3):
        assert torch.equal(model.generate(ids, prefill_chunk_size=5, **options), whole)
    with steer(model, dataclasses.replace(plan, residual=[dataclasses.replace(plan.residual[0], scope="all")])):
        everywhere = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, prefill_chunk_size=5, **options), everywhere)
    assert not torch.equal(everywhere, whole)
    assert "_prefill" not in vars(model)


@pytest.mark.parametrize("scope", ["generated", "prompt", "after:2", "thought"])
def test_drafts_are_never_taken_for_the_prompt(scope: str, ids: torch.Tensor, tmp_path: Path) -> None:
    """The library reads the first draft of assisted decoding together with the prompt; where all of it is accepted no cache is cropped."""
    model = tiny.qwen2()
    vectors(tmp_path, model.config.hidden_size, 1)
    plan = SteeringPlan(residual=[ResidualVector(1, "0.safetensors", 4.0, scope)], base_dir=str(tmp_path))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    drafted = {"assistant_model": model, "num_assistant_tokens": 3, "assistant_confidence_threshold": 0.0}
    with steer(model, plan, tokenizer=tiny.TinyTokenizer(), quiet=True):
        whole = model.generate(ids[:1], **options)
        if scope == "thought":  # needs no end of the prompt
            assert torch.equal(model.generate(ids[:1], **options, **drafted), whole)
            return
        for kind in (drafted, {"prompt_lookup_num_tokens": 3}):
            with pytest.raises(ValueError, match="assisted decoding .* hides where the prompt ends"):
                model.generate(ids[:1], **options, **kind)
        assert torch.equal(model.generate(ids[:1], **options), whole), "the refusal leaves nothing behind"
    assert "_get_candidate_generator" not in vars(model)


@pytest.mark.parametrize("scope", ["generated", "prompt", "after:2"])
def test_a_prompt_that_goes_on_behind_a_cache_is_no_answer(scope: str, ids: torch.Tensor, tmp_path: Path) -> None:
    """Of a shared beginning that was read before, or of an earlier turn; the newest token of a text that goes on is no prompt."""
    model = tiny.qwen2()
    vectors(tmp_path, model.config.hidden_size, 1)
    plan = SteeringPlan(residual=[ResidualVector(1, "0.safetensors", 4.0, scope)], base_dir=str(tmp_path))
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}
    with steer(model, plan):
        whole = model.generate(ids, max_new_tokens=6, **options).sequences
        begun = model.generate(ids, max_new_tokens=2, **options)
        go_on = model.generate(begun.sequences, past_key_values=begun.past_key_values, max_new_tokens=4, **options)
        assert torch.equal(go_on.sequences, whole)
        shared = model(ids[:, :5], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="a cache that holds the beginning of the prompt .* pass prompt_lengths"):
            model.generate(ids, past_key_values=shared, max_new_tokens=6, **options)
    with steer(model, plan, prompt_lengths=[14] * 3):
        shared = model(ids[:, :5], use_cache=True).past_key_values
        assert torch.equal(model.generate(ids, past_key_values=shared, max_new_tokens=6, **options).sequences, whole)


def test_tokens_between_two_blocks_are_not_forgotten(ids: torch.Tensor, tmp_path: Path) -> None:
    """A scope that counts would count on from where the first block ended."""
    model = tiny.qwen2()
    vectors(tmp_path, model.config.hidden_size, 1)

    def last(scope: str) -> torch.Tensor:
        plan = SteeringPlan(residual=[ResidualVector(1, "0.safetensors", 4.0, scope)], base_dir=str(tmp_path))
        with steer(model, plan, quiet=True):
            cache = model(ids, use_cache=True).past_key_values
        for token in (5, 6):
            model(torch.full((3, 1), token), past_key_values=cache)
        with steer(model, plan, quiet=True):
            return model(torch.full((3, 1), 7), past_key_values=cache).logits

    assert torch.isfinite(last("generated")).all()
    with pytest.raises(ValueError, match="has lost its place"):
        last("after:3")


def test_threads_take_turns(ids: torch.Tensor, tmp_path: Path) -> None:
    """What is known of a forward belongs to one; also behind a forward that failed."""
    model = tiny.qwen2()
    vectors(tmp_path, model.config.hidden_size, 1)
    plan = SteeringPlan(residual=[ResidualVector(1, "0.safetensors", 4.0, "thought")], base_dir=str(tmp_path))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    rows = [torch.tensor([[tiny.THINK, *range(2, 3 + 2 * number)]]) for number in range(4)]
    found: list[bool] = []
    switching = sys.getswitchinterval()
    with steer(model, plan, tokenizer=tiny.TinyTokenizer()):
        alone = [model.generate(row, **options) for row in rows]
        with pytest.raises(ValueError, match="needs token ids"):
            model(inputs_embeds=torch.zeros(1, 2, model.config.hidden_size))

        def work(number: int) -> None:
            for _ in range(3):
                found.append(torch.equal(model.generate(rows[number], **options), alone[number]))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(switching)
    assert found == [True] * 12


@pytest.mark.parametrize("how", ["interrupted", "left"])
def test_nobody_waits_for_a_thread_whose_block_has_ended(how: str, ids: torch.Tensor, tmp_path: Path) -> None:
    """Ctrl-C in a forward, or a block that is left in the middle of another thread's: whoever waited for its turn waited for ever."""
    model = tiny.qwen2()
    vectors(tmp_path, model.config.hidden_size, 1)
    plan = SteeringPlan(residual=[ResidualVector(1, "0.safetensors", 4.0, "generated")], base_dir=str(tmp_path))
    inside, go_on, done = threading.Event(), threading.Event(), []

    def stop(*_: Any) -> None:
        if how == "interrupted":
            raise KeyboardInterrupt
        inside.set()
        go_on.wait(10)

    def work() -> None:
        model(ids)
        done.append(True)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    stopped = model.model.layers[0].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt), steer(model, plan, quiet=True):
        if how == "interrupted":
            with pytest.raises(KeyboardInterrupt):
                model(ids)
            stopped.remove()
        threads[0].start()
        inside.wait(0.5)
        for thread in threads[1:]:
            thread.start()
        raise KeyboardInterrupt
    go_on.set()
    for thread in threads:
        thread.join(10)
    stopped.remove()
    assert done == [True] * 3


def test_two_plans_of_two_threads_never_meet(ids: torch.Tensor, tmp_path: Path) -> None:
    model = tiny.qwen2()
    vectors(tmp_path, model.config.hidden_size, 2)
    one, two = (
        SteeringPlan(residual=[ResidualVector(1, f"{number}.safetensors", 4.0)], base_dir=str(tmp_path))
        for number in range(2)
    )
    with steer(model, two):
        expected = model(ids).logits
    said: list[str] = []

    def other() -> None:
        try:
            with steer(model, two):
                model(ids)
        except ValueError as error:
            said.append(str(error))
        with steer(twin, two):
            said.append(str(torch.equal(twin(ids).logits, expected)))

    twin = copy.deepcopy(model)
    with steer(model, one), steer(model, one):  # of one thread, both act
        model(ids)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert said[0].startswith("the model is in a with-block of steer() in another thread")
    assert said[1:] == ["True"]
    with steer(model, two):
        assert torch.equal(model(ids).logits, expected)


def test_what_runs_a_layer_again_is_named(ids: torch.Tensor) -> None:
    model = copy.deepcopy(tiny.qwen3_moe()).train().requires_grad_(True)
    plan = SteeringPlan(experts=[ExpertGain(1, busiest(model, ids, 1), 4.0)], scope="generated")
    model.gradient_checkpointing_enable()
    with steer(model, plan, prompt_lengths=[4] * 3):
        loss = model(ids, labels=ids, use_cache=False).loss
        with pytest.raises(RuntimeError, match="gradient checkpointing .* switch that off"):
            loss.backward()


@pytest.mark.parametrize("wrong", ["lab", None, tiny.TinyTokenizer(), torch.nn.Linear(2, 2)], ids=type)
def test_what_is_no_model_is_refused_by_its_kind(wrong: Any) -> None:
    for block in (steer(wrong, SteeringPlan(experts=[ExpertGain(1, 1, 2.0)])), observe_routing(wrong, print)):
        with pytest.raises(TypeError, match=f"a {type(wrong).__name__} is no model: give one that load_model"), block:
            pass


def test_nested_plans_multiply(ids: torch.Tensor) -> None:
    model = tiny.qwen3_moe()
    expert = busiest(model, ids, 1)
    with steer(model, SteeringPlan(experts=[ExpertGain(1, expert, 8.0)])):
        once = model(ids).logits
    half = SteeringPlan(experts=[ExpertGain(1, expert, 2.0)])
    quarter = SteeringPlan(experts=[ExpertGain(1, expert, 4.0)])
    with steer(model, half), steer(model, quarter):
        assert torch.equal(model(ids).logits, once)


def test_nothing_fired_is_loud(ids: torch.Tensor) -> None:
    model = tiny.qwen3_moe()
    never = next(e for e in range(8) if e not in routing(model, ids[:1, :1])[0][0])
    plan = SteeringPlan(experts=[ExpertGain(0, never, 8.0)])
    with pytest.warns(SteeringWarning, match="none of the 1 experts of the plan was selected"):
        with steer(model, plan):
            model(ids[:1, :1])
    with pytest.raises(NothingFired, match="never ran"):
        with steer(model, plan, strict=True):
            pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with steer(model, plan, quiet=True) as audit:
            model(ids[:1, :1])
    assert audit.problems()


def test_scope_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="scope thought needs a tokenizer"):
        with steer(tiny.qwen3_moe(), SteeringPlan(experts=[ExpertGain(0, 1, 8.0)], scope="thought")):
            pass


def test_generate_with_beams_follows_the_rows(ids: torch.Tensor) -> None:
    model = tiny.deepseek_v3()
    expert = busiest(model, ids, 2)
    everywhere = SteeringPlan(experts=[ExpertGain(2, expert, 8.0)])
    generated = SteeringPlan(experts=[ExpertGain(2, expert, 8.0)], scope="generated")
    settings = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "do_sample": False,
        "num_beams": 3,
        "pad_token_id": 0,
    }
    with steer(model, generated) as audit:
        first = model.generate(ids, **settings)
    with steer(model, everywhere) as all_audit:
        model.generate(ids, **settings)
    assert audit.fired[2, expert].tokens < all_audit.fired[2, expert].tokens
    with steer(model, generated):
        assert torch.equal(model.generate(ids, **settings), first)


@pytest.mark.parametrize("build", [tiny.qwen2, tiny.deepseek_v3])
def test_residual_vector_equals_a_hand_made_shift(build: Any, ids: torch.Tensor, tmp_path) -> None:
    model = build()
    ids[:, 3], ids[:, 9] = tiny.THINK, tiny.END_THINK
    vectors = [torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    for i, vector in enumerate(vectors):
        save_file({"vector": vector}, tmp_path / f"{i}.safetensors")
    plan = SteeringPlan(
        residual=[ResidualVector(1, "0.safetensors", 2.0, "all"), ResidualVector(1, "1.safetensors", -1.0, "thought")],
        base_dir=str(tmp_path),
    )
    with steer(model, plan, tokenizer=tiny.TinyTokenizer()) as audit:
        steered = model(ids).logits
    thought = torch.zeros(1, 14, 1)
    thought[:, 3:9] = 1

    def shift(_: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        new = hidden + 2 * vectors[0] - thought * vectors[1]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.model.layers[1].register_forward_hook(shift)
    by_hand = model(ids).logits
    handle.remove()
    assert torch.allclose(steered, by_hand, atol=1e-5)
    assert dict(audit.residual) == {0: 42, 1: 18}


def vectors(folder: Path, width: int, number: int) -> list[torch.Tensor]:
    """Written as 0.safetensors, 1.safetensors, ..."""
    found = [torch.randn(width, generator=torch.Generator().manual_seed(seed)) for seed in range(number)]
    for i, vector_D in enumerate(found):
        save_file({"vector": vector_D}, folder / f"{i}.safetensors")
    return found


@pytest.mark.parametrize("build", [tiny.qwen2, tiny.deepseek_v3])
def test_strength_zero_is_bitwise_off(build: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    model = build()
    vectors(tmp_path, model.config.hidden_size, 2)
    off = ResidualVector(1, "0.safetensors", 0.0, "step_end:paragraph")
    on = ResidualVector(2, "1.safetensors", 0.5, "after:2")
    plain = model(ids).logits
    with steer(model, SteeringPlan(residual=[off], base_dir=str(tmp_path))) as audit:
        assert tiny.hook_count(model) == 0
        assert torch.equal(model(ids).logits, plain)
    assert audit.summary().startswith("the plan is neutral")
    outputs = []
    for entries in ([on], [off, on]):
        with steer(model, SteeringPlan(residual=entries, base_dir=str(tmp_path)), prompt_lengths=[4] * 3):
            outputs.append(model(ids).logits)
    assert torch.equal(*outputs)
    assert torch.equal(outputs[0][:, :6], plain[:, :6]), "tokens out of scope keep every bit"
    assert not torch.allclose(outputs[0][:, 6:], plain[:, 6:], atol=1e-2)


@pytest.mark.parametrize("build", [tiny.qwen2, tiny.deepseek_v3])
def test_two_directions_add(build: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    model = build()
    first, second = vectors(tmp_path, model.config.hidden_size, 2)
    save_file({"vector": 0.5 * first - 2 * second}, tmp_path / "sum.safetensors")
    both = [ResidualVector(1, "0.safetensors", 0.5), ResidualVector(1, "1.safetensors", -2.0)]
    outputs = []
    for entries in (both, both[::-1], [ResidualVector(1, "sum.safetensors")]):
        with steer(model, SteeringPlan(residual=entries, base_dir=str(tmp_path))) as audit:
            outputs.append(model(ids).logits)
        assert set(audit.residual.values()) == {ids.numel()}
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert torch.allclose(outputs[0], outputs[2], atol=1e-5)
    with steer(model, SteeringPlan(residual=both[:1], base_dir=str(tmp_path))):
        assert not torch.allclose(model(ids).logits, outputs[0], atol=1e-2)


def test_residual_hooks_are_gone_after_errors_and_the_next_forward_is_right(ids: torch.Tensor, tmp_path: Path) -> None:
    model = tiny.deepseek_v3()
    vectors(tmp_path, model.config.hidden_size, 1)
    plan = SteeringPlan(
        experts=[ExpertGain(1, busiest(model, ids, 1), 8.0)],
        residual=[ResidualVector(1, "0.safetensors", 1.0, "step_end")],
        scope="after:1",
        base_dir=str(tmp_path),
    )
    ids[:, 1], ids[:, 4] = tiny.THINK, 10
    options = {"tokenizer": tiny.TinyTokenizer(), "prompt_lengths": [3] * 3}
    plain = model(ids).logits
    with steer(model, plan, **options):
        expected = model(ids).logits
    with steer(model, plan, **options):
        with pytest.raises(IndexError):
            model(ids + 100)  # beyond the vocabulary: the embedding fails inside the forward
        assert torch.equal(model(ids).logits, expected)
    with pytest.raises(IndexError), steer(model, plan, **options):
        model(ids + 100)
    assert tiny.hook_count(model) == 0
    assert torch.equal(model(ids).logits, plain)
    missing = SteeringPlan(residual=[ResidualVector(1, "none.safetensors")], base_dir=str(tmp_path))
    with pytest.raises(ValueError, match="there is no file"), steer(model, missing):
        pass
    assert tiny.hook_count(model) == 0


@pytest.mark.parametrize("outer", ["thought", "generated"])
def test_one_block_inside_another_follows_its_own_scope(outer: str, ids: torch.Tensor, tmp_path: Path) -> None:
    """The state on the cache is shared: a block that does not read the tags must not undo what the other one followed."""
    model = tiny.qwen2()
    vectors(tmp_path, model.config.hidden_size, 2)
    ids[:, 2], ids[:, 8] = tiny.THINK, tiny.END_THINK
    entries = {"thought": ResidualVector(0, "0.safetensors", 1.0, "thought")}
    entries["generated"] = ResidualVector(1, "1.safetensors", 1.0, "generated")
    inner = next(name for name in entries if name != outer)
    plans = {name: SteeringPlan(residual=[entry], base_dir=str(tmp_path)) for name, entry in entries.items()}
    options = {"tokenizer": tiny.TinyTokenizer()}

    def decode() -> torch.Tensor:
        out = model(ids[:, :4], use_cache=True)
        logits = [out.logits]
        for t in range(4, ids.shape[1]):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
            logits.append(out.logits)
        return torch.cat(logits, 1)

    with steer(model, plans[outer], **options) as first, steer(model, plans[inner], **options) as second:
        nested = decode()
    with steer(model, SteeringPlan(residual=list(entries.values()), base_dir=str(tmp_path)), **options):
        assert torch.allclose(decode(), nested, atol=1e-5)
    counts = {outer: first.residual[0], inner: second.residual[0]}
    assert counts == {"thought": 3 * 6, "generated": 3 * 10}


def test_a_cache_whose_tags_were_not_followed_is_refused(ids: torch.Tensor, tmp_path: Path) -> None:
    model = tiny.qwen2()
    vectors(tmp_path, model.config.hidden_size, 1)
    generated, thought = (
        SteeringPlan(residual=[ResidualVector(0, "0.safetensors", 1.0, scope)], base_dir=str(tmp_path))
        for scope in ("generated", "thought")
    )
    with steer(model, generated, quiet=True):
        cache = model(ids[:, :4], use_cache=True).past_key_values
    with steer(model, thought, tokenizer=tiny.TinyTokenizer(), quiet=True):
        with pytest.raises(ValueError, match=r"filled before steer\(\) was entered"):
            model(ids[:, 4:5], past_key_values=cache)


def test_the_audit_names_unit_and_scope_of_a_vector(ids: torch.Tensor, tmp_path: Path) -> None:
    model = tiny.qwen2()
    head = {"direction": '{"layer": 1, "residual_norm": 2.0}'}
    save_file({"vector": torch.ones(model.config.hidden_size)}, tmp_path / "v.safetensors", metadata=head)
    entries = [
        ResidualVector(1, "v.safetensors", 0.5, scope, unit)
        for scope, unit in (("all", "residual_norm"), ("generated", "vector"))
    ]
    with steer(model, SteeringPlan(residual=entries, base_dir=str(tmp_path)), prompt_lengths=[10] * 3) as audit:
        model(ids)
    assert [(row["unit"], row["scope"], row["tokens"]) for row in audit.to_rows()] == [
        ("residual_norm", "all", 42),
        ("vector", "generated", 12),
    ]
    assert audit.summary().splitlines() == [
        "layer 1 vector v.safetensors x0.5 of the residual norm in scope all: added to 42 tokens",
        "layer 1 vector v.safetensors x0.5 in scope generated: added to 12 tokens",
    ]


def test_observe_residual_sees_the_layer_outputs(ids: torch.Tensor) -> None:
    model = tiny.qwen2()
    seen: dict[int, torch.Tensor] = {}
    with observe_residual(model, [0, 1], lambda layer, hidden: seen.update({layer: hidden})):
        states = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(seen[0], states[1])
    assert torch.equal(seen[1], states[2])
    with pytest.raises(ValueError, match="layer 3 does not exist: this model has layers 0-2"):
        with observe_residual(model, [3], lambda *_: None):
            pass


def test_the_audit_adds_up_over_many_forwards_and_both_modes(ids: torch.Tensor) -> None:
    """Notes wait until many have come; reading in between, and outside of inference mode, must not lose or double any."""
    model = tiny.qwen3_moe()
    expert = busiest(model, ids, 0)
    once = int((routing(model, ids)[0][0] == expert).sum())
    with steer(model, SteeringPlan(experts=[ExpertGain(0, expert, 8.0)])) as audit:
        for number in range(1, 301):
            with torch.inference_mode(number % 2 == 0):
                model(ids)
            if number % 97 == 0:
                assert audit.fired[0, expert].tokens == number * once
    assert audit.fired[0, expert].tokens == 300 * once


@pytest.mark.parametrize("looked_before", [False, True])
@pytest.mark.parametrize("build", [tiny.qwen3_moe, tiny.qwen2])
def test_hidden_states_show_the_steered_stream_also_after_an_unsteered_look(
    build: Any, looked_before: bool, ids: torch.Tensor
) -> None:
    model = copy.deepcopy(build())
    if not looked_before:  # as a model on which nobody asked for hidden states yet
        for module in model.modules():
            module._forward_hooks.clear()
            module.__dict__.pop("_output_capturing_hooks_installed", None)
    else:
        model(ids, output_hidden_states=True)
    vector, layer, strength = torch.linspace(-1, 1, model.config.hidden_size), 0, 2.0
    seen: list[torch.Tensor] = []
    with steer(model, SteeringPlan(residual=[ResidualVector(layer, vector=vector, strength=strength)])):
        with observe_residual(model, [layer], lambda _, hidden_BSD: seen.append(hidden_BSD)):
            steered = model(ids, output_hidden_states=True).hidden_states
    plain = model(ids, output_hidden_states=True).hidden_states
    assert torch.allclose(steered[layer + 1] - plain[layer + 1], (strength * vector).expand_as(plain[0]), atol=1e-5)
    assert torch.equal(seen[0], steered[layer + 1])
    assert torch.equal(steered[layer], plain[layer])


@pytest.mark.parametrize(("attention", "stance"), [("sdpa", "force_eager"), ("flex_attention", "default")])
def test_flex_attention_stays_compiled(attention: str, stance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written it holds every score at once."""
    model = tiny.deepseek_v3()
    monkeypatch.setattr(model.config, "_attn_implementation", attention)
    plans = (
        SteeringPlan(residual=[ResidualVector(1, vector=torch.ones(model.config.hidden_size))]),
        SteeringPlan(experts=[ExpertGain(1, 0, 2.0)]),
    )
    for plan in plans:
        with steer(model, plan, quiet=True):
            assert torch._dynamo.eval_frame._stance.stance == stance
        assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.parametrize("compiled_before", [False, True])
def test_a_compiled_model_is_steered_by_the_plan_of_the_moment(compiled_before: bool, ids: torch.Tensor) -> None:
    """What a plan finds compiled, or leaves compiled, keeps neither its hooks nor its numbers."""
    model = tiny.deepseek_v3()
    vector = torch.linspace(-1, 1, model.config.hidden_size)
    plans = [SteeringPlan(residual=[ResidualVector(1, vector=vector, strength=strength)]) for strength in (1.0, 2.0)]
    with torch.no_grad():
        plain = model(ids).logits
        compiled = torch.compile(model, backend="eager")
        if compiled_before:
            compiled(ids)
        for plan in plans:
            with steer(model, plan):
                expected = model(ids).logits
            with steer(compiled, plan, strict=True):
                assert torch.allclose(compiled(ids).logits, expected, atol=1e-6)
            assert torch.allclose(compiled(ids).logits, plain, atol=1e-6)
            assert not torch.allclose(expected, plain, atol=1e-3)
