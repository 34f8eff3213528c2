"""The header reader against the package's own, and against damage."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_files import write_gguf
from moe_steer.gguf import read_header


@pytest.mark.parametrize("type_name", ["F32", "Q4_K", "IQ1_M", "MXFP4"])
def test_the_header_is_what_the_package_reads(type_name: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", type_name, bias=True)
    header, reader = read_header(path), gguf.GGUFReader(str(path))
    assert header.num_bytes == reader.data_offset
    assert [tuple(entry) for entry in header.tensors] == [
        (item.name, item.tensor_type.name, tuple(item.shape.tolist()), item.data_offset, item.n_bytes)
        for item in reader.tensors
    ]
    for key, value in header.metadata.items():
        field = reader.get_field(key)
        assert field is not None
        assert value == (None if field.types[0] == gguf.GGUFValueType.ARRAY else field.contents())


def test_every_kind_of_metadata_is_read_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "x")
    numbers: dict[str, Any] = {
        "uint8": 200,
        "int8": -3,
        "uint16": 60000,
        "int16": -300,
        "uint32": 2**31,
        "int32": -(2**30),
    }
    numbers |= {"float32": 0.5, "uint64": 2**40, "int64": -(2**40), "float64": 1e300, "bool": True, "string": "añb"}
    for kind, value in numbers.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
        sub_type = gguf.GGUFValueType[kind.upper()]
        writer.add_key_value(f"b.{kind}", [value] * 3, gguf.GGUFValueType.ARRAY, sub_type=sub_type)
    writer.add_custom_alignment(128)
    writer.add_tensor("t", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(path)
    assert {key: value for key, value in header.metadata.items() if key.startswith("a.")} == {
        f"a.{kind}": value for kind, value in numbers.items()
    }
    assert header.tensors[0].offset % 128 == 0
    assert header.tensors[0].offset == gguf.GGUFReader(str(path)).tensors[0].data_offset


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_read_or_refused_and_never_more(tmp_path: Path, data: st.DataObject) -> None:
    pristine = tmp_path / "m.gguf"
    if not pristine.exists():
        write_gguf(pristine, "Q8_0")
    whole, path = bytearray(pristine.read_bytes()), tmp_path / "damaged.gguf"
    at = data.draw(st.integers(0, read_header(pristine).num_bytes - 8))
    value = data.draw(st.sampled_from([0, 1, 255, 2**16, 2**31, 2**62, 2**63, 2**64 - 1]))
    whole[at : at + 8] = struct.pack("<Q", value)
    path.write_bytes(whole)
    try:
        entries, message = read_header(path).tensors, "damaged.gguf cannot be read as GGUF: "
    except ValueError as error:
        entries, message = (), str(error)
    assert "damaged.gguf cannot be read as GGUF: " in message
    assert "\n" not in message
    assert all(entry.offset + entry.num_bytes <= len(whole) for entry in entries)
