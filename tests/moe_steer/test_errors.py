"""What a program prints is text: no control sequence from outside reaches the console, wherever it came from."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from launch.cli.main import main
from moe_steer.errors import exit_code, one_line, safe_console, visible

CLEAR = "\x1b[2J\x1b]0;title\x07"
HOSTILE = ["\x1b[31mred", CLEAR, "\x9b2J", "a\x08b", "\x00", "\u202egnp", "\ud800", "\x7f", "\u2066x", "a\x0bb\x0c"]


def harmless(text: str) -> bool:
    return text == visible(text) and "\x1b" not in text


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    "work",
    [
        lambda text: print(f"answer: {text}"),
        lambda text: print(f"answer: {text}", file=sys.stderr),
        lambda text: sys.stdout.writelines(["answer: ", text]),
        lambda text: (_ for _ in ()).throw(ValueError(f"answer: {text}")),
        lambda text: (_ for _ in ()).throw(FileNotFoundError(2, "answer: nothing", text)),
    ],
)
def test_nothing_from_outside_steers_the_console(
    text: str, work: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sys.stdout, sys.stderr
    exit_code("program", lambda: work(text))
    shown = "".join(capsys.readouterr())
    assert "answer: " in shown
    assert harmless(shown)
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("text", HOSTILE)
def test_an_error_in_one_line_is_harmless_by_itself(text: str) -> None:
    assert harmless(one_line(RuntimeError(f"it says\n{text}")))
    assert "\n" not in one_line(RuntimeError(f"it\u2028says\n{text}\x85"))


class Terminal(io.StringIO):
    encoding = "ascii"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def test_bars_still_move_the_cursor_and_a_narrow_encoding_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with safe_console():
        sys.stderr.write("\r 10%\r 20%\x1b[A é\n")
        Console(stderr=True, force_terminal=True, color_system="standard").print("[red]bar[/red]")
    assert terminal.getvalue().startswith("\r 10%\r 20%?[A ?\n\x1b[31mbar")


@pytest.mark.parametrize(
    "arguments",
    [
        [f"compare{CLEAR}"],
        ["compare", "--baseline", f"nowhere{CLEAR}", "--arm", "x", "--out", "y"],
        ["report", f"run{CLEAR}"],
        ["plan", f"--{CLEAR}", "1"],
        ["plan", "--start", f"p{CLEAR}.json", "--out", "x.json"],
        ["generate", "--problems", f"p{CLEAR}.jsonl", "--out", f"o{CLEAR}"],
        ["generate", "--model", f"./m{CLEAR}", "--out", "o"],
        ["generate", "--num", CLEAR, "--out", "o"],
        ["sae-fit", "--sae", f"s{CLEAR}", "--model", "lab-dense", "--texts", "t"],
        ["evaluate", "--model", f"./m{CLEAR}", "--out", f"o{CLEAR}"],
        ["evaluate", f"--{CLEAR}"],
    ],
)
def test_names_with_control_sequences(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code  # type: ignore[assignment]
    assert code in (1, 2)
    shown = capsys.readouterr()
    assert shown.err
    assert "\x1b" not in shown.out + shown.err
    assert "\x07" not in shown.out + shown.err


def test_a_damaged_file_with_a_hostile_name_and_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"plan{CLEAR}.json"
    path.write_text(json.dumps({"version": 1, CLEAR: CLEAR}))
    assert main(["plan", "--start", str(path), "--out", str(tmp_path / "x.json")]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert harmless(shown)
