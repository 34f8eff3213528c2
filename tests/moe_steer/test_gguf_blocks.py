"""Block formats against the gguf package's own dequantiser."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_files import INNER, TYPES, dequantised, quantised
from moe_steer.baking.gguf_model import (
    BLOCK_FORMATS,
    WIDTHS,
    BlockFormat,
    block_format,
    decode_scales,
    encode_scales,
    rescale,
)
from moe_steer.baking.numbers import is_power_of_two, nearest_power_of_two

ALL = sorted(BLOCK_FORMATS)
HALF = [name for name in ALL if BLOCK_FORMATS[name].number == "F16"]


def blocks_of(type_name: str, seed: int = 0) -> np.ndarray:
    return quantised(type_name, (8, INNER), seed).reshape(-1, BLOCK_FORMATS[type_name].num_bytes)


def values_of(blocks_NB: np.ndarray, type_name: str) -> np.ndarray:
    return dequantised(blocks_NB, type_name)


def bits(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).view(np.uint32)


@pytest.mark.parametrize("type_name", ALL)
def test_sizes_are_those_of_the_package(type_name: str) -> None:
    form = BLOCK_FORMATS[type_name]
    assert (form.num_values, form.num_bytes) == gguf.GGML_QUANT_SIZES[TYPES[type_name]]


@pytest.mark.parametrize("gain", [64.0, 0.25])
@pytest.mark.parametrize("type_name", ALL)
def test_a_power_of_two_multiplies_every_value_bit_for_bit(type_name: str, gain: float) -> None:
    old_NB = blocks_of(type_name)
    new_NB, effect = rescale(old_NB, BLOCK_FORMATS[type_name], gain)
    before = values_of(old_NB, type_name)
    assert np.abs(before).max() > 0
    assert np.array_equal(bits(values_of(new_NB, type_name)), bits(before * np.float32(gain)))
    assert (effect.inexact, effect.overflowed, effect.not_finite) == (0, 0, 0)


@pytest.mark.parametrize("type_name", [name for name in ALL if name != "MXFP4"])
def test_another_gain_is_rounded_within_the_bound(type_name: str) -> None:
    form, gain = BLOCK_FORMATS[type_name], 3.3
    old_NB = blocks_of(type_name)
    new_NB, effect = rescale(old_NB, form, gain)
    # |d q - m| cancels, so the bound is on the sum of both terms: the value without m, and the value without d.
    scales_NF = form.read(old_NB)
    terms = np.zeros_like(values_of(old_NB, type_name), dtype=np.float64)
    for field in range(scales_NF.shape[1]):
        only = np.zeros_like(scales_NF)
        only[:, field] = scales_NF[:, field]
        terms += np.abs(values_of(form.write(old_NB, only), type_name))
    wanted = values_of(old_NB, type_name).astype(np.float64) * gain
    error = np.abs(values_of(new_NB, type_name) - wanted)
    unit = form.roundoff
    assert (error <= (unit + 2.0**-22) * gain * terms).all()
    assert 0 < effect.worst <= unit * (1 + 2.0**-20)


def scale_bytes(form: BlockFormat) -> set[int]:
    """The byte columns of a block that hold its scales."""
    return set(form.nibbles or (at + i for at in form.offsets for i in range(WIDTHS[form.number])))


@pytest.mark.parametrize("type_name", ALL)
def test_only_the_scale_bytes_change(type_name: str) -> None:
    form, old_NB = BLOCK_FORMATS[type_name], blocks_of(type_name)
    new_NB, _ = rescale(old_NB, form, 4.0)
    changed = set(np.nonzero((new_NB != old_NB).any(axis=0))[0])
    assert changed
    assert changed <= scale_bytes(form)
    if form.nibbles:
        assert np.array_equal(new_NB[:, form.nibbles] & 0x0F, old_NB[:, form.nibbles] & 0x0F)


@pytest.mark.parametrize("type_name", ALL)
def test_gain_zero_makes_every_value_zero(type_name: str) -> None:
    form, old_NB = BLOCK_FORMATS[type_name], blocks_of(type_name)
    new_NB, effect = rescale(old_NB, form, 0.0)
    assert not values_of(new_NB, type_name).any()
    assert effect.inexact == 0
    untouched = sorted(
        set(range(form.num_bytes)) - (set(range(form.num_bytes)) if form.is_blanked_by(0.0) else scale_bytes(form))
    )
    assert np.array_equal(new_NB[:, untouched], old_NB[:, untouched])


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(ALL), st.integers(-12, 12), st.integers(0, 5))
def test_dividing_gives_the_old_bytes_whenever_nothing_was_rounded(type_name: str, exponent: int, seed: int) -> None:
    form, old_NB = BLOCK_FORMATS[type_name], blocks_of(type_name, seed)
    new_NB, effect = rescale(old_NB, form, 2.0**exponent)
    back_NB, _ = rescale(new_NB, form, 2.0**-exponent)
    if effect.inexact == 0 and effect.overflowed == 0:
        assert np.array_equal(back_NB, old_NB)
    else:
        assert not np.array_equal(back_NB, old_NB)


@pytest.mark.parametrize("type_name", HALF)
def test_overflow_of_a_half_precision_scale_is_counted(type_name: str) -> None:
    form, old_NB = BLOCK_FORMATS[type_name], blocks_of(type_name)
    scales_NF = form.read(old_NB)
    scales_NF[3, -1] = 1024.0
    effect = rescale(form.write(old_NB, scales_NF), form, 64.0)[1]
    assert (effect.overflowed, effect.largest) == (1, 1024.0)
    assert rescale(form.write(old_NB, scales_NF), form, 32.0)[1].overflowed == 0


def test_scales_that_lose_bits_below_the_normal_range_are_seen() -> None:
    form, old_NB = BLOCK_FORMATS["Q8_0"], blocks_of("Q8_0")
    scales_NF = form.read(old_NB)
    scales_NF[0, 0] = 3 * 2.0**-24  # subnormal: half of it is 1.5 steps
    scales_NF[1, 0] = 2.0**-24
    low_NB = form.write(old_NB, scales_NF)
    up = rescale(low_NB, form, 64.0)[1]
    assert up.inexact == 0
    down = rescale(low_NB, form, 0.5)[1]
    assert (down.inexact, down.worst) == (2, 1.0)  # the second one vanished
    tiny = rescale(low_NB, form, 1e-300)[1]
    assert (tiny.inexact, tiny.worst) == (tiny.numbers, 1.0)


def test_scales_that_are_no_numbers_are_seen() -> None:
    form, old_NB = BLOCK_FORMATS["Q4_0"], blocks_of("Q4_0")
    old_NB[2, :2] = np.array([np.nan], dtype=np.float16).view(np.uint8)
    old_NB[4, :2] = np.array([np.inf], dtype=np.float16).view(np.uint8)
    effect = rescale(old_NB, form, 2.0)[1]
    assert (effect.not_finite, effect.overflowed, effect.inexact) == (2, 0, 0)


def test_the_e8m0_codes_are_those_of_the_dequantiser() -> None:
    codes = np.arange(255, dtype=np.uint8)[:, None]
    mine = decode_scales(codes, "E8M0")
    assert np.array_equal(mine.astype(np.float32), gguf.quants.MXFP4.e8m0_to_fp32_half(codes)[:, 0])
    assert np.array_equal(encode_scales(mine, "E8M0"), codes)
    assert np.isnan(decode_scales(np.array([[255]], dtype=np.uint8), "E8M0")[0])


def test_mxfp4_exponents_that_run_out_are_overflow_or_loss() -> None:
    form, old_NB = BLOCK_FORMATS["MXFP4"], blocks_of("MXFP4")
    old_NB[0, 0], old_NB[1, 0] = 250, 3
    assert rescale(old_NB, form, 16.0)[1].overflowed == 0
    assert rescale(old_NB, form, 32.0)[1].overflowed == 1
    assert rescale(old_NB, form, 0.125)[1].inexact == 0
    assert rescale(old_NB, form, 0.0625)[1].inexact == 1


@settings(deadline=None, max_examples=200)
@given(st.floats(-1e5, 1e5, width=64))
def test_encoding_rounds_to_nearest_even(value: float) -> None:
    array = np.array([value])
    with np.errstate(over="ignore"):
        assert decode_scales(encode_scales(array, "F32"), "F32")[0] == np.float32(value)
        assert decode_scales(encode_scales(array, "F16"), "F16")[0] == np.float16(value)
    brain = gguf.quants.quantize(array.astype(np.float32)[None], TYPES["BF16"])
    assert decode_scales(encode_scales(array, "BF16"), "BF16")[0] == gguf.quants.dequantize(brain, TYPES["BF16"])[0, 0]


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 0xFFFF))
def test_sixteen_bit_codes_survive_a_round_trip(code: int) -> None:
    raw = np.array([[code & 255, code >> 8]], dtype=np.uint8)
    for number in ("F16", "BF16"):
        value = decode_scales(raw, number)
        if np.isfinite(value[0]):
            assert np.array_equal(encode_scales(value, number), raw)


@pytest.mark.parametrize("type_name", ["NVFP4", "Q8_1", "Q8_K", "I8", "Q1_0"])
def test_other_types_are_refused_by_name(type_name: str) -> None:
    with pytest.raises(
        ValueError, match=f"blk.1.ffn_down_exps.weight is {type_name}, whose scales cannot be multiplied"
    ):
        block_format("blk.1.ffn_down_exps.weight", type_name)


def test_powers_of_two() -> None:
    assert [is_power_of_two(x) for x in (64.0, 0.5, 1.0, 3.0, 0.0)] == [True, True, True, False, False]
    assert [nearest_power_of_two(x) for x in (3.0, 10.0, 64.0, 0.3)] == [4.0, 8.0, 64.0, 0.25]
