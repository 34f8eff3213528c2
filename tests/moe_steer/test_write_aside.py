"""A file appears whole or not at all, and nothing written aside is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_steer.files import write_bytes, write_text, written_aside


def test_a_file_is_replaced_whole_and_its_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    with written_aside(path) as aside:
        aside.write_text("third")
        assert path.read_bytes() == b"second", "the old file stands until the new one is whole"
    assert path.read_text() == "third"
    assert [one.name for one in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), written_aside(path) as aside:
        aside.write_text("half")
        raise error
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a.txt", "old")]
