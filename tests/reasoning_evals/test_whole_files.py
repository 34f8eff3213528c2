"""Files that appear whole or not at all, where several ranks may write at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reasoning_evals.whole_files import create_whole, write_whole, written_aside


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_writers_do_not_share_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with written_aside(path) as one, written_aside(path) as other:
        one.write_text("one")
        other.write_text("other")
        assert not path.exists()
    assert path.read_text() == "one", "the last one to end"
    write_whole(path, "é")
    assert path.read_bytes() == "é".encode()
    assert names(tmp_path) == ["a.txt"]


def test_the_first_one_to_create_wins(tmp_path: Path) -> None:
    create_whole(tmp_path / "a.txt", "first")
    create_whole(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text() == "first"
    assert names(tmp_path) == ["a.txt"]


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise PermissionError("links are not supported")

    monkeypatch.setattr(os, "link", no_links)
    create_whole(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("write", [write_whole, create_whole])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object) -> None:
    def full(self: Path, text: str, **how: str) -> None:
        self.touch()
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "a.txt", "text")  # type: ignore[operator]
    assert names(tmp_path) == []
