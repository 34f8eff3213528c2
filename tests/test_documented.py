"""Every command of README and docs runs; the package runs from a wheel in an empty environment; the site builds and loads nothing.

One run of the demonstration, made by the wheel, serves all tutorials.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

import documented
from documented import PAGES, ROOT, File, Shown, blocks

TUTORIALS = ("find-experts", "shorter-thoughts", "thinking-that-pays", "your-model", "serve", "read-a-report")
ORDER = [ROOT / f"docs/tutorials/{name}.md" for name in TUTORIALS]
OWN_TESTS = ("real_models.md", "engines.md")
"""Pages about machines that this one is not: their commands are parsed and dry-run by tests of their own."""
RUN = [*ORDER, *(page for page in PAGES if page not in ORDER and page.name not in OWN_TESTS)]
"""Tutorials first: other pages use what they made."""
SHOWN = [item for page in RUN for item in blocks(page)]
ELSEWHERE = {"make", "pip", "git"}
"""Programs that set up: their targets and files are looked at, and the wheel's test installs."""


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the fixtures do the work of all tests


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what a release holds."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for room in ("moe_steer", "expert_stats", "reasoning_evals", "launch"):
        shutil.copytree(ROOT / room, source / room, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", str(out), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that holds the wheel; what it needs from others is borrowed, the checkout is not."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    install += ["--no-compile"]  # what runs is compiled as it is imported
    done = subprocess.run([*install, str(wheel)], capture_output=True, text=True, env=alone(), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "bin"


def alone() -> dict[str, str]:
    """An environment without a path of the checkout, without network."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def demonstration(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which ``moe-steer demo`` of the wheel has run."""
    folder = tmp_path_factory.mktemp("tutorials")
    done = subprocess.run(
        [installed / "moe-steer", "demo"],
        cwd=folder,
        env=alone(),
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "next: open the report in a browser" in done.stdout
    assert "WARNING" not in done.stdout
    return folder


def test_the_wheel_holds_all_that_runs(installed: Path, demonstration: Path, tmp_path: Path) -> None:
    where = "import launch, moe_steer, expert_stats, reasoning_evals as r; print(launch.__file__, moe_steer.__file__, r.__file__)"
    done = subprocess.run(
        [installed / "python", "-c", where], cwd=tmp_path, env=alone(), capture_output=True, text=True, check=True
    )
    assert all(str(installed.parent) in path for path in done.stdout.split()), done.stdout
    assert str(ROOT) not in done.stdout
    for name in ("report.html", "traces.html", "plan.json", "counts.safetensors"):
        assert (demonstration / "runs/demo" / name).is_file(), name
    assert str(ROOT) not in (demonstration / "runs/demo/run.json").read_text()
    playground = "from importlib import resources as r; print(sorted(one.name for one in (r.files('launch.playground') / 'page').iterdir()))"
    done = subprocess.run(
        [installed / "python", "-c", playground], cwd=tmp_path, env=alone(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['index.html', 'playground.css', 'playground.js', 'tokens.js']"


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """The port of a server that answers every prompt alike."""
    sys.path.insert(0, str(ROOT / "tests" / "reasoning_evals"))
    import threading

    from local_endpoint import Server

    def say(handler: object, body: object) -> None:
        handler.start()  # type: ignore[attr-defined]
        handler.event("So it is 4.</think> \\boxed{4}", "stop")  # type: ignore[attr-defined]
        handler.write(b"data: [DONE]\n\n")  # type: ignore[attr-defined]

    here = Server(say)
    threading.Thread(target=here.serve_forever, daemon=True).start()
    yield here.server_address[1]
    here.shutdown()
    here.server_close()


@pytest.fixture(scope="module")
def ended(demonstration: Path, server: int) -> dict[str, documented.Done]:
    """Command -> how it ended, of all commands that run on this machine, in the order of the pages, each once."""
    done = {"moe-steer demo": documented.Done(0, "", "")}  # by the wheel
    for item in SHOWN:
        if isinstance(item, File):
            (demonstration / item.name).write_text(item.content)
        elif item.command not in done and runs_here(item):
            command = item.command.replace("127.0.0.1:8000", f"127.0.0.1:{server}")
            dry = ["--dry-run"] if not item.live and "--dry-run" not in command else []
            done[item.command] = documented.run(command, demonstration, *dry, *shorter(command))
    return done


WHOLE = (
    "moe-steer generate --model lab-dense --problems lab --num 32 --samples 2 --out runs/dense",
    "moe-steer evaluate --num-problems 8 --samples 1 --arms baseline plan:forced.json --out runs/forced",
)
"""One of each command that samples, the cheapest that says nothing of its length: these run as shown, up to the usual longest answer."""


def shorter(command: str) -> list[str]:
    """Options that end the answers of a command early, where it samples and says nothing of their length: sampling takes most of
    the time, and nearly all answers of the embedded models end before."""
    samples = command.startswith(("moe-steer generate", "moe-steer evaluate")) and command not in WHOLE
    return ["--max-new-tokens", "160"] if samples and "--max-new-tokens" not in command else []


def runs_here(item: Shown) -> bool:
    """Whether a command is run in the folder of the tutorials; the others start on machines with GPUs, or set up."""
    return not item.machine and item.command.split()[0] not in ELSEWHERE


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_commands_of_a_page_end_as_it_says(page: Path, ended: dict[str, documented.Done]) -> None:
    for item in blocks(page):
        if isinstance(item, Shown) and runs_here(item):
            done = ended[item.command]
            assert done.code == item.refused, f"{item.command}\n{done.out[-1500:]}\n{done.err[-1500:]}"


def test_python_of_the_pages_runs(
    demonstration: Path, ended: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demonstration)
    found = [(page, code) for page in PAGES for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
    assert len(found) >= 2
    for page, code in found:
        exec(compile(code, str(page), "exec"), {})
        assert "selected by" in capsys.readouterr().out


def test_some_commands_run_up_to_the_usual_longest_answer() -> None:
    assert set(WHOLE) <= {item.command for item in SHOWN if isinstance(item, Shown)}, "a page shows another one now"
    assert not any(map(shorter, WHOLE))


def test_what_no_test_runs_is_seen() -> None:
    """The pages' own rule: a command is live, or a start on a named machine, or a dry run, or sets up."""
    assert len([item for item in SHOWN if isinstance(item, Shown)]) > 40
    block = documented.Shown("page.md", "moe-steer report runs/none", "", True)
    assert documented.run(block.command, ROOT).code == 1
    assert documented.run("moe-steer nothing", ROOT).code == 2


def test_the_loop_of_the_page_is_found_silenced_and_baked(
    demonstration: Path, ended: dict[str, documented.Done]
) -> None:
    import torch

    from moe_steer import SteeringPlan, load_model, steer

    (said,) = (done.out for command, done in ended.items() if command.startswith("moe-steer unloop"))
    plan = SteeringPlan.load(demonstration / "unlooped" / "plan.json")
    assert [(entry.layer, entry.expert, entry.gain) for entry in plan.experts] == [(3, 5, 0.0)]
    results = json.loads((demonstration / "unlooped" / "results.json").read_text())
    check = results["checks"]["held out"]
    assert results["silenced"] == plan.provenance["unloop"]["silenced"] == "3:5"
    assert results["search"]["candidates"]["3:5"] == 0 < results["search"]["candidates"]["baseline"]
    assert check["loops"]["unlooped"]["greedy"]["number"] == 0 < check["loops"]["baseline"]["greedy"]["number"]
    assert check["change_of_loops"]["high"] < 0 < check["change_of_accuracy"]["low"]
    assert "answers loop at 180 tokens" in said
    baked, (model, tokenizer) = (
        load_model(str(demonstration / "mended"), "plain")[0],
        load_model(str(demonstration / "looping"), "plain"),
    )
    ids = torch.tensor([tokenizer("<think>\n3 + 4 = 7. So it is 7.", add_special_tokens=False)["input_ids"]])
    with torch.no_grad(), steer(model, plan, quiet=True):
        assert torch.allclose(model(ids).logits, baked(ids).logits, atol=1e-4)


def test_the_pictures_are_made_from_a_run(demonstration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import pictures

    made = pictures.main(
        pictures.Pictures(run=str(demonstration / "runs/demo"), out=str(tmp_path), browser="no-browser")
    )
    kept = {path.name for path in (ROOT / "docs/pictures").iterdir()}
    assert {*made, "README.md"} | {name for name in kept if name.endswith(".png")} == kept
    for name in made:
        svg = (tmp_path / name).read_text()
        assert "<svg" in svg
        assert not re.search(r"url\(http|href=\"http", svg), name


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a dead link, a missing anchor or a name that cannot be found fails."""
    pytest.importorskip("mkdocs", reason="the documentation's tools are not installed: pip install 'moe-steer[docs]'")
    out = tmp_path_factory.mktemp("site")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    with pytest.MonkeyPatch.context() as patch:  # in this process, which has imported what the reference asks
        patch.chdir(ROOT)
        patch.setattr(sys, "path", [*sys.path])
        for name in ("COLUMNS", "TERM"):  # the hook sets them
            patch.setenv(name, os.environ.get(name, "dumb"))
        build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(out)))
    return out


def test_a_dead_link_stops_the_site(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the documentation's tools are not installed: pip install 'moe-steer[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[dead](nothing.md)")
    folders = {"docs_dir": str(tmp_path / "docs"), "site_dir": str(tmp_path / "site")}
    config = load_config(str(ROOT / "mkdocs.yml"), **folders, hooks=[], plugins=[], nav=["index.md"])
    with pytest.raises(Abort, match="Aborted with 1 warnings in strict mode"):
        build(config)


def test_no_page_loads_anything_from_the_network(site: Path) -> None:
    loads = re.compile(
        r"""(?:<(?:script|img|iframe|source)[^>]*?\bsrc|<link[^>]*?\bhref)\s*=\s*["']?((?:https?:)?//[^"'\s>]+)"""
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        assert not [url for url in loads.findall(page.read_text(encoding="utf-8")) if "w3.org" not in url], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import\s+)[\"']?https?://", style.read_text(encoding="utf-8")), style
    assert loads.findall('<script src="https://example.org/x.js">'), "the search can find one"


def test_every_command_and_public_name_has_its_reference(site: Path) -> None:
    from launch.cli.main import COMMANDS

    for command in COMMANDS:
        assert "usage: moe-steer" in (site / f"reference/{command}.html").read_text()
    page = (site / "reference/python/moe_steer.html").read_text()
    assert all(
        f"<code>{name}</code>" in page or f">{name}<" in page for name in ("SteeringPlan", "steer", "load_model")
    )


def test_the_readme_is_short_and_shows_its_pictures() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 700
    shown = re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text)
    assert len(shown) >= 4
    assert all((ROOT / name).is_file() for name in shown)


def test_the_commands_in_tables_are_run_somewhere(ended: dict[str, documented.Done]) -> None:
    table = re.findall(r"^\|[^|]+\| `([^`]+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(table) >= 8
    machines = {item.command for item in SHOWN if isinstance(item, Shown) and item.machine}
    for command in table:
        if command.split()[0] in ELSEWHERE:
            assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        else:
            assert command in ended or command in machines, command


def test_a_citation_can_be_read() -> None:
    import yaml

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert cited["version"] == version[1]
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()
    assert json.dumps(cited["title"])
