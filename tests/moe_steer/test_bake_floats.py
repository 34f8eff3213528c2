"""Stored numbers: decoding, rounding and scaling, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bake_checkpoints import DTYPES
from moe_steer.baking.numbers import (
    ROUNDOFF,
    add_floats,
    decode,
    encode,
    is_power_of_two,
    nearest_power_of_two,
    scale_floats,
    shift_exponents,
)

PLAIN = sorted(ROUNDOFF)
NUMBERS = st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=50)


def stored(values: list[float], dtype: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).float().to(DTYPES[dtype])


def data(tensor: torch.Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", PLAIN)
@settings(deadline=None, max_examples=40)
@given(values=NUMBERS)
def test_decoding_and_encoding_are_torchs(dtype: str, values: list[float]) -> None:
    tensor = stored(values, dtype)
    assert np.array_equal(decode(data(tensor), dtype), tensor.double().numpy())
    assert encode(np.array(values), dtype) == data(torch.tensor(values, dtype=torch.float64).to(DTYPES[dtype]))


def test_every_bfloat16_survives() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    raw = bits.numpy().tobytes()
    again = np.frombuffer(encode(decode(raw, "BF16"), "BF16"), "<u2")
    nan = torch.isnan(bits.view(torch.bfloat16)).numpy()
    assert np.array_equal(again[~nan], bits.numpy()[~nan])
    assert np.isnan(decode(again[nan].tobytes(), "BF16")).all()


@pytest.mark.parametrize("dtype", PLAIN)
@settings(deadline=None, max_examples=40)
@given(values=NUMBERS, power=st.integers(-3, 3))
def test_powers_of_two_are_exact_and_come_back(dtype: str, values: list[float], power: int) -> None:
    tensor = stored([v for v in values if 1e-3 < abs(v) < 1e3] or [1.0], dtype)
    new, lost = scale_floats(data(tensor), dtype, 2.0**power)
    assert (lost.inexact, lost.overflowed, lost.worst) == (0, 0, 0.0)
    assert new == data(tensor * 2.0**power)
    assert scale_floats(new, dtype, 2.0**power, divide=True)[0] == data(tensor)


@pytest.mark.parametrize("dtype", PLAIN)
@settings(deadline=None, max_examples=40)
@given(values=NUMBERS, factor=st.floats(0.01, 100))
def test_other_factors_stay_within_the_bound(dtype: str, values: list[float], factor: float) -> None:
    tensor = stored([v for v in values if 1e-2 < abs(v) < 1e2] or [1.0], dtype)
    new, lost = scale_floats(data(tensor), dtype, factor)
    want = tensor.double() * factor
    got = torch.frombuffer(bytearray(new), dtype=DTYPES[dtype]).double()
    worst = float(((got - want) / want).abs().max())
    assert lost.worst == pytest.approx(worst, rel=1e-9, abs=1e-30)
    assert worst <= ROUNDOFF[dtype] * (1 + 1e-6)


def test_what_leaves_the_range_is_counted() -> None:
    half = torch.tensor([60000.0, 1.0, float("inf"), 6e-8], dtype=torch.float16)
    assert scale_floats(data(half), "F16", 2.0)[1].overflowed == 1
    small = scale_floats(data(half), "F16", 0.25)[1]
    assert (small.overflowed, small.inexact, small.worst) == (0, 1, 1.0)  # 6e-8 is the smallest number: a quarter is 0


def test_exponents_move_and_their_ends_are_counted() -> None:
    raw = bytes([0, 1, 127, 250, 254, 255])
    up, lost = shift_exponents(raw, 4)
    assert (list(up), lost.overflowed) == ([4, 5, 131, 254, 255, 255], 1)
    down, lost = shift_exponents(raw, -1)
    assert (list(down), lost.overflowed) == ([0, 0, 126, 249, 253, 255], 1)
    values = torch.tensor(list(raw[1:4]), dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
    assert torch.equal(torch.tensor(list(up[1:4]), dtype=torch.uint8).view(torch.float8_e8m0fnu).float(), values * 16)


def test_addition_rounds_once() -> None:
    new, lost = add_floats(data(torch.tensor([1.0, -2.0], dtype=torch.bfloat16)), "BF16", np.array([0.001, 3.0]))
    assert torch.equal(torch.frombuffer(bytearray(new), dtype=torch.bfloat16), torch.tensor([1.0, 1.0]).bfloat16())
    assert lost.worst == pytest.approx(0.001 / 1.001)


@pytest.mark.parametrize(
    ("value", "nearest"), [(3.0, 4.0), (1.4, 1.0), (1.5, 2.0), (0.3, 0.25), (64.0, 64.0), (90.0, 64.0)]
)
def test_nearest_power_of_two(value: float, nearest: float) -> None:
    assert nearest_power_of_two(value) == nearest
    assert is_power_of_two(nearest)
    assert is_power_of_two(value) == (value == nearest)
