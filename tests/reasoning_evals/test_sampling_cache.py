from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from reasoning_evals.engines.kv_cache import AbsorbedLatents, GrowingLayer, growing_cache
from tiny_reasoners import tiny_model

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 90)),
        st.tuples(st.just("select"), st.integers(0, 2**31)),
        st.tuples(st.just("holes"), st.integers(0, 2**31)),
        st.tuples(st.just("crop"), st.integers(1, 3)),
        st.tuples(st.just("repeat"), st.just(2)),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(steps=STEPS, joint=st.booleans(), seed=st.integers(0, 1000))
def test_growing_layer_equals_the_library_layer(steps: list[tuple[str, int]], joint: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    plain, growing = DynamicCache(), DynamicCache()
    growing.layer_class_to_replicate = lambda: GrowingLayer(joint)
    rows = 5
    for what, number in [("update", 3), *steps, ("update", 1)]:
        if what == "update":
            states = [torch.randn(rows, 2, number, width, generator=generator) for width in (4, 3)]
            expected, got = plain.update(*states, 0), growing.update(*states, 0)
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        elif what == "crop" and plain.get_seq_length() > number:
            plain.crop(-number)
            growing.crop(-number)
        elif what == "repeat" and rows < 20:
            rows *= 2
            plain.batch_repeat_interleave(2)
            growing.batch_repeat_interleave(2)
        elif what in ("select", "holes"):
            choice = torch.Generator().manual_seed(number)
            rows_left = int(torch.randint(1, rows + 1, (1,), generator=choice))
            order = torch.randperm(rows, generator=choice)
            indices = order[:rows_left]
            if what == "holes":  # what the sampler does: rows stay, or come from behind
                spare = iter([r for r in order.tolist() if r >= rows_left])
                indices = torch.tensor([next(spare, r) if r % 2 else r for r in range(rows_left)])
            rows = rows_left
            plain.batch_select_indices(indices)
            growing.batch_select_indices(indices)
        assert growing.get_seq_length() == plain.get_seq_length()
        layers = plain.layers[0], growing.layers[0]
        assert torch.equal(layers[0].keys, layers[1].keys)
        assert torch.equal(layers[0].values, layers[1].values)


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v2", "qwen2"])
def test_absorbed_decoding_equals_the_models_own(kind: str) -> None:
    model = tiny_model(kind)
    absorbed = AbsorbedLatents(model)
    assert len(absorbed.layers) == (0 if kind == "qwen2" else 2)
    torch.manual_seed(0)
    tokens_BT = torch.randint(8, 50, (3, 20))
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[1, :7] = 0
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        whole = model(tokens_BT, attention_mask=mask_BT, position_ids=positions_BT).logits
        cache = growing_cache(model.config, joint=bool(absorbed.layers))
        model(
            tokens_BT[:, :12], attention_mask=mask_BT[:, :12], position_ids=positions_BT[:, :12], past_key_values=cache
        )
        for step in range(12, 20):
            with absorbed:
                logits = model(
                    tokens_BT[:, step : step + 1],
                    attention_mask=mask_BT[:, : step + 1],
                    position_ids=positions_BT[:, step : step + 1],
                    past_key_values=cache,
                ).logits
            torch.testing.assert_close(logits[:, 0], whole[:, step], rtol=1e-4, atol=1e-5)


class BlockFP8(torch.nn.Linear):
    """As transformers' FP8Linear lies in memory; it computes without a GPU's kernels."""

    def __init__(self, linear: torch.nn.Linear, block: int) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        rows, columns = linear.weight.shape
        self.block_size = (block, block)
        generator = torch.Generator().manual_seed(1)
        grid = (-(-rows // block), -(-columns // block))
        self.weight_scale_inv = torch.nn.Parameter(torch.rand(grid, generator=generator) + 0.5, requires_grad=False)
        self.weight = torch.nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = self.weight.shape
        scale = torch.kron(self.weight_scale_inv, torch.ones(self.block_size))[:rows, :columns]
        return torch.nn.functional.linear(x, self.weight.float() * scale)


@pytest.mark.parametrize("block", [8, 12])
def test_absorbed_decoding_reads_projections_in_fp8_blocks(block: int) -> None:
    """Left to the library, every step would expand the whole past; blocks of 12 do not fill the matrix."""
    model = tiny_model("deepseek_v3")
    for layer in AbsorbedLatents(model).layers:
        layer.kv_b_proj = BlockFP8(layer.kv_b_proj, block)
    absorbed = AbsorbedLatents(model)
    assert len(absorbed.layers) == 2
    torch.manual_seed(0)
    tokens_BT = torch.randint(8, 50, (2, 12))
    with torch.inference_mode():
        whole = model(tokens_BT).logits
        cache = growing_cache(model.config, joint=True)
        model(tokens_BT[:, :8], past_key_values=cache)
        for step in range(8, 12):
            with absorbed:
                logits = model(
                    tokens_BT[:, step : step + 1],
                    attention_mask=torch.ones_like(tokens_BT[:, : step + 1]),
                    past_key_values=cache,
                ).logits
            torch.testing.assert_close(logits[:, 0], whole[:, step], rtol=1e-4, atol=1e-5)
    assert not [name for name in model.state_dict() if "absorbed" in name]


def test_no_room_is_kept_beyond_the_last_token_that_there_can_be() -> None:
    layer = GrowingLayer(most=100)
    for _ in range(10):
        layer.update(torch.zeros(1, 1, 9, 4), torch.zeros(1, 1, 9, 4))
    assert layer.keys is not None
    assert layer.keys.untyped_storage().nbytes() == 100 * 4 * 4
    layer.update(torch.zeros(1, 1, 20, 4), torch.zeros(1, 1, 20, 4))
    assert layer.get_seq_length() == 110, "it is a limit for room, not for tokens"


def test_absorbed_block_leaves_the_model_as_it_was_also_after_an_error() -> None:
    model = tiny_model("deepseek_v3")
    absorbed = AbsorbedLatents(model)
    before = model.config._attn_implementation
    with pytest.raises(KeyError), absorbed:
        assert model.config._attn_implementation != before
        raise KeyError
    assert model.config._attn_implementation == before
    assert all("expand_kv" not in layer.__dict__ for layer in absorbed.layers)


def test_other_attention_implementations_are_left_alone() -> None:
    model = tiny_model("deepseek_v3")
    model.config._attn_implementation = "flex_attention"
    assert AbsorbedLatents(model).layers == []


def test_weights_that_are_gathered_for_their_call_are_left_alone() -> None:
    """DeepSpeed's ZeRO-3 marks its parameters with ``ds_id``; read outside of the layer's call they may lie in pieces."""
    model = tiny_model("deepseek_v3")
    layers = AbsorbedLatents(model).layers
    assert len(layers) > 1
    layers[0].kv_b_proj.weight.ds_id = 7
    assert AbsorbedLatents(model).layers == layers[1:]


def test_growing_cache_keeps_layers_of_other_kinds() -> None:
    model = tiny_model("qwen2")
    model.config.layer_types = ["full_attention", "sliding_attention"]
    model.config.sliding_window = 8
    kinds = [type(layer).__name__ for layer in growing_cache(model.config).layers]
    assert kinds == ["GrowingLayer", "DynamicSlidingWindowLayer"]
