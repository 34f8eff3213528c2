"""Every room's list of public names (``__init__.pyi``) is true, and a name that is not on it is refused."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

from moe_steer.lazy_exports import stub_exports

ROOT = Path(__file__).parents[1]
STUBS = sorted(
    path.relative_to(ROOT)
    for room in ("moe_steer", "expert_stats", "reasoning_evals")
    for path in (ROOT / room).rglob("__init__.pyi")
)


@pytest.mark.parametrize("stub", STUBS, ids=str)
def test_every_public_name_of_a_room_exists(stub: Path) -> None:
    room = import_module(".".join(stub.parts[:-1]))
    assert room.__all__
    assert all(hasattr(room, name) for name in room.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = room.nothing


def test_a_name_that_its_module_lacks_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "room_with_a_false_list"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__init__.pyi").write_text("from json import loads as loads\nfrom json import nothing as nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_module(package.name)
    find, names = stub_exports(package.name)
    assert names == ["loads", "nothing"]
    assert find("loads") is sys.modules["json"].loads
    with pytest.raises(AttributeError):
        find("nothing")
