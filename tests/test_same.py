"""``tests/same.py`` finds what differs: its comparison and its normalising, on made-up items. It runs no command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # last: beside this file lie folders named as the sources

from same.compare import LINES, WIDTH, compare, matches, read_items, short_diff, write_items
from same.helps import commands_of, fields
from same.normalise import file_text, folder_items, json_text, lines_text, record_of_a_bake, text_of

WORK = Path("/somewhere/same-x")
OLD = {"jobs/main/results.json": json_text({"a": 1, "b": [1, 2]}), "help/bake": "--out | default None | Folder\n"}


def test_equal_items_are_the_same() -> None:
    found = compare(OLD, dict(OLD))
    assert found.same
    assert found.lines() == ["2 items equal, 0 differ, 0 new, 0 gone"]


def test_a_changed_value_is_found_and_shown() -> None:
    found = compare(OLD, OLD | {"jobs/main/results.json": json_text({"a": 1, "b": [1, 3]})})
    assert not found.same
    assert found.lines() == [
        "DIFFERS jobs/main/results.json",
        "    -  2",
        "    +  3",
        "1 items equal, 1 differ, 0 new, 0 gone",
    ]


def test_missing_and_new_items_are_found() -> None:
    found = compare(OLD, {"help/bake": OLD["help/bake"], "help/more": ""})
    assert not found.same
    assert (found.gone, found.new) == (("jobs/main/results.json",), ("help/more",))
    assert found.lines()[-1] == "1 items equal, 0 differ, 1 new, 1 gone"


def test_what_is_named_as_changed_is_shown_and_forgiven() -> None:
    new = {"help/bake": "--to | default None | Folder\n"}
    assert not compare(OLD, new, ["help/*"]).same, "the other difference is not named"
    found = compare(OLD, new, ["help/*", "jobs/main", "errors/*"])
    assert found.same
    assert "DIFFERS help/bake   (changed on purpose)" in found.lines()
    assert "GONE    jobs/main/results.json   (changed on purpose)" in found.lines()
    assert "--changed errors/*: no item of that name differs" in found.lines()


def test_patterns_are_names_folders_and_globs() -> None:
    assert matches("jobs/main-1/plan.json", ["jobs/main-1"])
    assert matches("jobs/main-1/plan.json", ["*/plan.json"])
    assert not matches("jobs/main-1/plan.json", ["jobs/main", "help"])


def test_a_difference_of_spaces_or_line_ends_survives_the_store(tmp_path: Path) -> None:
    items = {"a/b": "one\r\ntwo \n", "a/c": "ä\n"}
    write_items(tmp_path / "store", items)
    assert read_items(tmp_path / "store") == items
    assert not compare(read_items(tmp_path / "store"), items | {"a/b": "one\ntwo \n"}).same
    with pytest.raises(FileNotFoundError, match="there is no store at"):
        read_items(tmp_path / "none")


def test_diffs_are_short_and_show_where_long_lines_part() -> None:
    many = short_diff("\n".join(map(str, range(100))), "\n".join(map(str, range(100, 200))))
    assert len(many) == LINES
    assert many[-1] == f"... {200 - LINES + 1} more lines differ"
    one, other = ("x" * 5000 + end + "y" * 5000 for end in "ab")
    removed, added = short_diff(one, other)
    assert "xa" in removed
    assert "xb" in added
    assert len(removed) < WIDTH + 10


def test_normalising_keeps_every_number() -> None:
    said = "steered 85.4% correct (76.0 to 94.9) 79.2 thinking tokens, p = .77; relative 0.00e+00; 2026 problems\n"
    assert text_of(said, WORK) == said
    for old, new in (("85.4", "85.5"), (".77", ".78"), ("e+00", "e-07"), ("2026", "2027")):
        assert text_of(said.replace(old, new), WORK) != text_of(said, WORK)


def test_normalising_takes_out_what_belongs_to_one_start() -> None:
    said = (
        "[2026-01-02 03:04:05,678] [INFO] [launch.py:285:main] Process 5256 exits successfully.\n"
        f'<p>&#34;commit&#34;: &#34;{"0a" * 20}&#34;, "commit": "{"1b" * 20}" commit {"2c" * 20}, arm {"3d" * 20}</p>\n'
        'from samples_2026-01-02T03-04-05.json 2026-01-02T03:04:05+00:00: "moe-steer": "0.1.0", "torch": "2.6.0", "date": 1795899998.0\n'
        "wrote /somewhere/same-x/runs/a, 24 new, 123 tokens/s\n50%|#####     |\r100%|##########|\n"
        "╭─ Value error ──────╮\n│ Error parsing Options: seed is 3 │\n╰────────────────────╯\n"
    )
    assert text_of(said, WORK).splitlines() == [
        f'<p>&#34;commit&#34;: &#34;<commit>&#34;, "commit": "<commit>" commit <commit>, arm {"3d" * 20}</p>',
        'from samples_<time>.json <time>+00:00: "moe-steer": "<version>", "torch": "2.6.0", "date": <time>',
        "wrote <work>/runs/a, 24 new, <speed> tokens/s",
        "Value error",
        "Error parsing <options>: seed is 3",
    ]


def test_files_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"created": "now", "config": {"seed": 0}}))
    (tmp_path / "plan.json").write_text(json.dumps({"created": "now"}))
    assert file_text(tmp_path / "run.json", tmp_path) == json_text({"config": {"seed": 0}})
    assert "now" in file_text(tmp_path / "plan.json", tmp_path), "only run.json holds times"
    (tmp_path / "w.safetensors").write_bytes(b"abc")
    assert file_text(tmp_path / "w.safetensors", tmp_path).startswith("3 bytes, sha256 ba7816bf")


def test_of_a_bake_the_times_go_and_the_hashes_of_files_stay() -> None:
    files = [{"name": "a", "sha256": "1", "mtime_ns": 5}]
    assert record_of_a_bake({"sha256": "of all", "files": files}) == {"files": [{"name": "a", "sha256": "1"}]}


def test_lines_of_ranks_count_in_any_order_and_every_byte_counts(tmp_path: Path) -> None:
    rows = [json.dumps({"arm": arm, "text": text}) for arm in "ab" for text in "xyz"]
    (tmp_path / "g.jsonl").write_text("\n".join(rows) + "\n")
    for rank in (0, 1):
        (tmp_path / f"h.rank{rank}.jsonl").write_text("\n".join(reversed(rows[rank::2])) + "\n")
    items = folder_items(tmp_path, tmp_path)
    assert set(items) == {"g.jsonl", "h.jsonl"}
    assert items["g.jsonl"] == items["h.jsonl"]
    assert items["g.jsonl"].startswith("a: 3 lines, sha256 ")
    (tmp_path / "g.jsonl").write_text("\n".join(rows).replace("z", "w") + "\n")
    assert lines_text([tmp_path / "g.jsonl"]) != items["h.jsonl"]


def test_help_is_one_line_an_option() -> None:
    said = (
        "usage: moe-steer x [-h] [OPTIONS]\n\nDoes  it.\n\noptions\n-h, --help  show this help message and exit\n"
        "--out STR   Folder. (required)\n--copy, --no-copy\n            Copy (all of\n            it). (default: False)\n"
    )
    assert fields(said).splitlines() == [
        "--copy, --no-copy | default False | Copy (all of it).",
        "--out STR | required | Folder.",
        "-h, --help | | show this help message and exit",
        "",
        "usage: moe-steer x [-h] [OPTIONS]",
        "Does it.",
    ]
    assert commands_of("usage: x\n\n  plan     Make it.\n  sae-fit  Say it.\n") == ["plan", "sae-fit"]


def test_wrong_usage_is_said(tmp_path: Path) -> None:
    script = Path(__file__).with_name("same.py")
    for folder, message in (
        (script.parent / "store", "is inside of the source tree"),
        (tmp_path / "none", "no store at"),
    ):
        words = [sys.executable, str(script), "list", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert message in done.stderr
