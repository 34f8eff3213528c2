"""What a crash, a full disk, a read-only file or a damaged one leaves behind."""

import errno
import hashlib
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_files import WIDTH, write_gguf
from moe_steer.baking import bake, gguf_writing, staging, unbake, verify_bake
from moe_steer.plan import ExpertGain, SteeringPlan

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PLAN = SteeringPlan(experts=[ExpertGain(1, 2, 64.0), ExpertGain(2, 0, 64.0)])
CALLS = ("pwrite", "fsync", "replace", "rename", "unlink", "link", "rmdir")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote, so these tests need no fsync; its order has a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kill_at(call: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a child that kills itself with SIGKILL before its file operation number ``call``; True when it was killed.

    A write that is cut off has written its first half.
    """
    child = os.fork()
    if child == 0:
        left = [call]

        def counted(name: str) -> Callable[..., object]:
            original = getattr(os, name)

            def wrapper(*arguments: object, **named: object) -> object:
                if left[0] == 0:
                    if name == "pwrite":
                        original(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], arguments[2])  # type: ignore[arg-type, call-overload]
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return original(*arguments, **named)

            return wrapper

        for name in CALLS:
            setattr(os, name, counted(name))
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("split", [0, 3], ids=["one file", "three parts"])
def test_an_unbake_killed_anywhere_is_completed_by_the_next(split: int, tmp_path: Path) -> None:
    """Each part is the original or the baked one at any time, and the record stays until all are restored."""
    (tmp_path / "source").mkdir()
    source = write_gguf(tmp_path / "source" / "m.gguf", "Q8_0", split=split)
    original = {path.name: digest(path) for path in source.parent.iterdir()}
    baked = tmp_path / "baked" / source.name
    bake(source, PLAN, tmp_path / "baked" / "m.gguf")
    wanted = {name: digest(baked.with_name(name)) for name in original}
    states = set()
    for call in itertools.count():
        model = tmp_path / f"at{call}" / baked.name
        shutil.copytree(baked.parent, model.parent)
        finished = not kill_at(call, partial(unbake, model))
        now = {name: digest(model.with_name(name)) for name in original}
        assert all(now[name] in (original[name], wanted[name]) for name in original)
        states.add(tuple(now.values()))
        if model.with_name(f"{model.name}.steering.json").exists():
            assert not finished
            unbake(model)
            assert sorted(path.name for path in model.parent.glob("[!.]*")) == sorted(original)
        assert {name: digest(model.with_name(name)) for name in original} == original
        if finished:
            break
    assert call >= 5
    assert len(states) == (3 if split else 2), "both ends, and one of two changed parts restored"


def test_a_bake_is_on_the_disk_before_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, log = write_gguf(tmp_path / "m.gguf", "Q8_0"), list[str]()

    def logged(verb: str, call: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            log.append(f"{verb} {name(*arguments)}")
            return call(*arguments, **named)

        return wrapper

    def name_of(handle: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{handle}")).name

    monkeypatch.setattr(os, "pwrite", logged("write", os.pwrite, lambda handle, *rest: name_of(handle)))
    monkeypatch.setattr(os, "fsync", logged("sync", lambda handle: None, name_of))
    monkeypatch.setattr(os, "link", logged("name", os.link, lambda old, new: Path(new).name))
    bake(source, PLAN, tmp_path / "out.gguf")
    assert [entry for entry, _ in itertools.groupby(log)] == [
        "write out.gguf",
        "sync out.gguf",
        "write out.gguf",
        "sync out.gguf",
        "write out.gguf.steering.json",
        "sync out.gguf.steering.json",
        "sync files",
        "name out.gguf.steering.json",
        "name out.gguf",
        f"sync {tmp_path.name}",
    ]


@pytest.mark.parametrize("split", [0, 3], ids=["one file", "three parts"])
def test_a_copy_killed_anywhere_leaves_nothing_that_looks_whole(split: int, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = write_gguf(tmp_path / "source" / "m.gguf", "Q8_0", split=split)
    before = {path.name: digest(path) for path in source.parent.iterdir()}
    first = "out-00001-of-00003.gguf" if split else "out.gguf"
    unfinished = 0
    for call in itertools.count():
        folder = tmp_path / f"at{call}"
        finished = not kill_at(call, partial(bake, source, PLAN, folder / "out.gguf"))
        assert {path.name: digest(path) for path in source.parent.iterdir()} == before
        if (folder / first).exists():
            verify_bake(folder / first, source)
        else:
            unfinished += 1
            assert not finished
            visible = [path for path in folder.glob("out*.gguf") if folder.exists()]
            if not visible:  # the next run takes the unfinished file over
                bake(source, PLAN, folder / "out.gguf")
                verify_bake(folder / first, source)
                assert not list(folder.glob(".*"))
            else:
                with pytest.raises(ValueError, match="exists: give another name, or remove it first"):
                    bake(source, PLAN, folder / "out.gguf")
        if finished:
            break
    assert unfinished > 5


def test_a_full_disk_leaves_no_copy_and_names_the_reason(tmp_path: Path) -> None:
    source, folder = write_gguf(tmp_path / "m.gguf", "F32"), tmp_path / "out"
    original = digest(source)
    code = (
        "import resource, signal, sys\n"
        "from moe_steer.baking import bake\n"
        "from moe_steer.plan import ExpertGain, SteeringPlan\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))\n"
        f"try: bake({str(source)!r}, SteeringPlan(experts=[ExpertGain(1, 2, 64.0)]), {str(folder / 'out.gguf')!r})\n"
        "except OSError as error: print(error)"
    )
    assert source.stat().st_size > 60000
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "was not written: File too large; nothing is left of it, and the source is as it was" in done.stdout
    assert not folder.exists()
    assert digest(source) == original


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, baked = write_gguf(tmp_path / "m.gguf", "Q8_0"), tmp_path / "baked.gguf"
    bake(model, PLAN, baked)
    before = {path.name: digest(path) for path in tmp_path.iterdir()}

    def refusing(*arguments: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "pwrite", refusing)
    with pytest.raises(OSError, match="baked.gguf was not written: Permission denied; nothing is left of it"):
        unbake(baked)
    with pytest.raises(OSError, match="out.gguf was not written: Permission denied; nothing is left of it"):
        bake(model, PLAN, tmp_path / "out.gguf")
    monkeypatch.undo()
    assert {path.name: digest(path) for path in tmp_path.iterdir()} == before


def test_a_writer_that_was_done_first_keeps_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever step of the later one it is done in: without its record the model would not be known as baked."""
    model, target = write_gguf(tmp_path / "m.gguf", "Q8_0"), tmp_path / "out.gguf"
    plan_gains = gguf_writing.plan_gains

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.undo()
        bake(model, PLAN, target)
        return plan_gains(*arguments)

    monkeypatch.setattr(gguf_writing, "plan_gains", overtaken)
    with pytest.raises(OSError, match="another run has made it in the meantime"):
        bake(model, PLAN, target)
    verify_bake(target, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "out.gguf", "out.gguf.steering.json"]


def test_two_writers_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of another process that was done first is left as it is."""
    model, target = write_gguf(tmp_path / "m.gguf", "Q8_0"), tmp_path / "out.gguf"

    def overtaken(folder: Path) -> None:
        target.write_bytes(b"of another process")

    monkeypatch.setattr(staging, "_sync_folders", overtaken)
    with pytest.raises(OSError, match="out.gguf was not written: another run has made it in the meantime"):
        bake(model, PLAN, target)
    monkeypatch.undo()
    assert target.read_bytes() == b"of another process"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "out.gguf"]
    target.unlink()
    (tmp_path / "out.gguf.steering.json").write_text("of a run that was killed before its model had its name")
    bake(model, PLAN, target)
    verify_bake(target, model)


def test_a_link_to_a_baked_file_is_not_replaced(tmp_path: Path) -> None:
    bake(write_gguf(tmp_path / "m.gguf", "Q8_0"), PLAN, tmp_path / "out.gguf")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "out.gguf")
    shutil.copy(tmp_path / "out.gguf.steering.json", tmp_path / "link.gguf.steering.json")
    with pytest.raises(ValueError, match="is a symbolic link to .*out.gguf: give the file itself"):
        unbake(tmp_path / "link.gguf")


@pytest.mark.parametrize("keep", [0, 3, 20, 100, 400, 900, 3000, 0.5, 0.999])
def test_a_file_cut_short_is_refused_in_one_line(keep: float, tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", "Q8_0").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    with pytest.raises(
        ValueError, match="cut.gguf cannot be read as GGUF: (it is cut short|it begins with|cannot mmap an empty file)"
    ) as caught:
        bake(cut, PLAN, tmp_path / "out.gguf")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.gguf", "m.gguf"]


def test_files_that_are_no_gguf_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        bake(tmp_path / "absent.gguf", PLAN, tmp_path / "out.gguf")
    (tmp_path / "text.gguf").write_text("not a model at all, but long enough to be looked at")
    with pytest.raises(ValueError, match="text.gguf cannot be read as GGUF: it begins with b'not ', not with 'GGUF'"):
        bake(tmp_path / "text.gguf", PLAN, tmp_path / "out.gguf")


def test_a_file_of_the_other_byte_order_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "big.gguf"), "deepseek2", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((2, WIDTH), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match="is written for another byte order: convert it with gguf-convert-endian first"
    ):
        bake(tmp_path / "big.gguf", PLAN, tmp_path / "out.gguf")


def test_tensors_that_share_bytes_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "Q8_0")
    reader = gguf.GGUFReader(str(path), "r+")
    places = {item.name: item for item in reader.tensors}
    places["blk.2.ffn_gate_inp.weight"].field.parts[-1][0] = (
        places["blk.1.ffn_down_exps.weight"].field.parts[-1][0] + 32
    )
    reader.data.flush()
    with pytest.raises(
        ValueError, match="blk.1.ffn_down_exps.weight and blk.2.ffn_gate_inp.weight share bytes of m.gguf"
    ):
        bake(path, PLAN, tmp_path / "out.gguf")


def test_parts_that_are_missing_or_mixed_up_are_named(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m.gguf", "Q8_0", split=3)
    second, third = first.with_name("m-00002-of-00003.gguf"), first.with_name("m-00003-of-00003.gguf")
    with pytest.raises(ValueError, match="is part 2 of 3: give the first part, 'm-00001-of-00003.gguf'"):
        bake(second, PLAN, tmp_path / "out.gguf")
    kept = third.read_bytes()
    third.unlink()
    with pytest.raises(
        ValueError, match="is the first of 3 parts, and 'm-00003-of-00003.gguf' is not in the same folder"
    ):
        bake(first, PLAN, tmp_path / "out.gguf")
    third.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match="is in m-00002-of-00003.gguf and again in m-00003-of-00003.gguf"):
        bake(first, PLAN, tmp_path / "out.gguf")
    third.write_bytes(kept)
    renamed = tmp_path / "renamed.gguf"
    first.rename(renamed)
    with pytest.raises(ValueError, match="is the first of 3 parts and has lost its name"):
        bake(renamed, PLAN, tmp_path / "out.gguf")
