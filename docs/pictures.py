"""Every picture of README and docs, from real runs, in light and dark; writes docs/pictures and the page that names the sources.

python docs/pictures.py runs/lab-search                       needs chromium for the screenshots of pages
python docs/pictures.py runs/lab-search --browser /path/to/chromium --out FOLDER
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import matplotlib as mpl
import tyro

from launch.jobs import experts
from launch.playground.playground import Playground, serve
from moe_steer.files import write_whole
from reasoning_evals.report import build_report, charts
from reasoning_evals.report.page import template_text
from reasoning_evals.runs import read_run

SCHEMES = {"light": 1, "dark": 0}
"""Name -> chromium's number of the preferred colour scheme."""
SIZES = {"report": (1140, 860), "playground": (1400, 1000)}
"""Screenshots: width and height."""
ON_THE_PAGE: dict[str, Any] = {
    "prompt": {"index": 5},
    "sampling": {"seed": 0, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 440, "greedy": False},
    "plan": {"base": None, "experts": [{"layer": 2, "expert": 15, "gain": 8}], "scope": "thought", "renormalize": False},
    "columns": [{"kind": "plain"}, {"kind": "plan", "plan": "plan", "dose": 1}, {"kind": "plan", "plan": "yours", "dose": 1}, {"kind": "arm", "word": "continue:110"}],
    "colour": "expert:2:15",
}  # fmt: skip
"""What the playground shows: the plan of the run beside the plain model, another plan, and thoughts that must go on."""
_INK, _SOFT, _CARD = "#e8e8e4", "#a0a7b1", "#1b1e24"
_DARK = {
    "text.color": _INK, "axes.labelcolor": _SOFT, "axes.edgecolor": _SOFT, "xtick.color": _SOFT, "ytick.color": _SOFT,
    "figure.facecolor": _CARD, "savefig.facecolor": _CARD, "axes.facecolor": _CARD,
}  # fmt: skip


_SWAPPED = {"#222222": _INK, "#e6e6e6": "#2a2e36", "#ececec": "#2a2e36", "#1f5fa8": "#56b6e2", "#b35c00": "#e3ab55"}
"""Colours that the figures set themselves -> what they are on a dark page."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Draw everything that README and docs show."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a finished main job."""
    out: str = "docs/pictures"
    """Where the pictures go."""
    browser: str = "chromium"
    """Browser for the screenshots; without it they are left as they are."""


def main(options: Pictures) -> list[str]:
    """Draw; returns the names of the files."""
    folder, out = Path(options.run), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    made = {f"{name}-{scheme}.svg": svg for scheme in SCHEMES for name, svg in drawings(folder, scheme).items()}
    for name, svg in made.items():
        write_whole(out / name, svg)
    names = [*made]
    if browser := shutil.which(options.browser):
        with played(folder) as playground:
            shown = {"report": (folder / "report.html").resolve().as_uri(), "playground": playground}
            names += [screenshot(browser, shown[page], out, page, scheme) for page in SIZES for scheme in SCHEMES]
    else:
        print(f"there is no {options.browser}: the screenshots stay as they are")
    write_whole(out / "README.md", sources(read_run(folder), options.run))
    return names


def drawings(folder: Path, scheme: str) -> dict[str, str]:
    """Name -> SVG, in the colours of the scheme."""
    with mpl.rc_context(_DARK if scheme == "dark" else {}):
        findings = experts.read(folder)
        report = build_report(folder / findings.step, findings.comparison, title=findings.title)
        found: dict[str, str | None] = {
            "differences": charts.sorted_differences(report),
            "pairs": charts.difference_forest(report),
            "tokens": charts.accuracy_against_tokens(report),
        }
        alone = {name: standalone(svg, scheme) for name, svg in found.items() if svg}
        alone |= dict(zip(("scores", "gains", "ranking"), findings.figures.values(), strict=True))
        alone["power"] = power_curve()
    for old, new in _SWAPPED.items() if scheme == "dark" else ():
        alone = {name: svg.replace(old, new) for name, svg in alone.items()}
    return alone


def standalone(svg: str, scheme: str) -> str:
    """A drawing of the report's page as a file of its own: it takes the page's style with it, in one scheme."""
    style = template_text("style.css")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    rules = [line for line in style.splitlines() if line.startswith("svg ")]
    names = f":root {{{light}{dark if scheme == 'dark' else ''}}} svg {{font-family: DejaVu Sans, sans-serif; background: var(--card)}}"
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        ">", f"><style>{names} {' '.join(rules)}</style>", 1
    )


def power_curve(noise: float = 0.105, problems: tuple[int, ...] = (20, 30, 60, 120, 240, 480)) -> str:
    """The smallest effect that is shown with 80% power, as ``moe-steer power --noise`` says it."""
    from matplotlib.figure import Figure

    from reasoning_evals.comparing import Assumptions, plan_power
    from reasoning_evals.report.figures import finished_svg, style

    samples = (1, 4, 16)
    given = Assumptions(noise=2 * noise, effect_variance=0.01, noise_source="given", effect_source="given")
    plan = plan_power(given, effects=[0.05], samples=samples, problems=problems, target_power=0.8, alpha=0.05)
    with mpl.rc_context(style("power")):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for k, found in zip(samples, plan.detectable, strict=True):
            axes.plot(problems, [100 * value if value else None for value in found], marker="o", label=f"{k} a problem")
        axes.set_xscale("log")
        axes.set_xticks(problems, [str(number) for number in problems])
        axes.minorticks_off()
        axes.set_xlabel("problems")
        axes.set_ylabel("smallest effect shown, points")
        axes.set_ylim(bottom=0)
        return finished_svg(figure, axes)


@contextmanager
def played(folder: Path) -> Iterator[str]:
    """The address of a playground with the plan of a run, after a run of its own."""
    with tempfile.TemporaryDirectory() as kept:
        model = read_run(folder)["config"]["model"]
        opened = Playground(model=model, plan=(str(folder / "plan.json"),), port=0, out=kept).open()
        servers: list[Any] = []
        thread = threading.Thread(target=serve, args=(opened, servers.append))
        thread.start()
        try:
            pages = f"{opened.address}api/pages/picture"
            httpx.post(f"{pages}/run", json=ON_THE_PAGE).raise_for_status()
            httpx.get(f"{pages}/events", timeout=300).raise_for_status()  # it ends when the run does
            yield f"{opened.address}?page=picture"
        finally:
            servers[0].should_exit = True
            thread.join()


def screenshot(browser: str, address: str, out: Path, page: str, scheme: str) -> str:
    """The top of a page, as a visitor with this scheme sees it."""
    width, height = SIZES[page]
    name = f"{page}-{scheme}.png"
    subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1",
            "--virtual-time-budget=10000",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", f"--window-size={width},{height}",
            f"--screenshot={(out / name).resolve()}", address,
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    return name


def sources(run: Mapping[str, Any], folder: str) -> str:
    """The page that says where the pictures are from."""
    versions = ", ".join(f"{name} {text}" for name, text in sorted(run["versions"].items()))
    config = {key: run["config"][key] for key in ("model", "seed") if key in run["config"]}
    return (
        "# Where the pictures are from\n\n"
        f"All are made by `python docs/pictures.py {folder}`, from one finished run of the main job (`make steer`): "
        f"{json.dumps(config)}, commit {run.get('commit') or 'unknown'}, {versions}. The playground shows the plan of that run. The curve of power is computed, by what `moe-steer power "
        "--noise 0.105` computes.\n"
    )


if __name__ == "__main__":
    for made in main(tyro.cli(Pictures)):
        print(made)
