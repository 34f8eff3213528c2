"""Does this checkout still do what another one did? Runs every command, stores what came out, and compares.

    python tests/same.py store FOLDER                       run everything, keep the results in FOLDER
    python tests/same.py check FOLDER                       run everything again, say what differs
    python tests/same.py check FOLDER --changed 'help/*'    ... but these items change on purpose
    python tests/same.py check FOLDER --only jobs/main-1    some of the items; also for store
    python tests/same.py list FOLDER                        names of the stored items

Items are texts: outputs, results, pages, hashes. --full adds the jobs without --quick. Run both on one machine: the last bits
of sums hang on it. Exit code 0: the same, or stored; 1: something differs; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
HELPERS = [ROOT / "tests" / name for name in ("moe_steer", "expert_stats", "reasoning_evals", "launch")]
# The sources first: the folders beside this file have the same names.
sys.path[:] = [str(ROOT), *(path for path in sys.path if path != str(ROOT)), *map(str, HELPERS)]

from same.commands import settle_environment  # noqa: E402
from same.compare import Items, compare, matches, read_items, write_items  # noqa: E402

FULL = "jobs/full-*"
FAILED = "this-unit-failed"
Unit = Callable[[Path], Items]


def units(full: bool) -> dict[str, Unit]:
    """What runs as one, by the name that its items begin with."""
    import torch
    import transformers
    from same import jobs

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    found: dict[str, Unit] = {
        "help": partial(_late, "helps", "help_items"),
        "errors": partial(_late, "errors", "error_items"),
        "bake": partial(_late, "bakes", "folder_bakes"),
        "gguf": partial(_late, "bakes", "gguf_items"),
        "steps": jobs.steps,
        "jobs/safety": jobs.safety,
        "jobs/collect-stats": jobs.collect_stats,
    }
    found |= {f"jobs/{name}": partial(jobs.here, name, line) for name, line in jobs.HERE.items()}
    launched = jobs.LAUNCHED | (jobs.FULL if full else {})
    return found | {f"jobs/{name}": partial(jobs.launched, name, *asked) for name, asked in launched.items()}


def _late(module: str, function: str, work: Path) -> Items:
    """Imported when it is run: helpers of the tests that do not import fail one unit, and the others still speak."""
    made: Items = getattr(import_module(f"same.{module}"), function)(work)
    return made


def may_hold(unit: str, only: Sequence[str]) -> bool:
    """Whether an item of the unit can have a name that the patterns ask for; True without patterns."""
    fixed = [pattern.split("*")[0].split("?")[0].split("[")[0] for pattern in only]
    return not only or any(f"{unit}/".startswith(start) or f"{start}/".startswith(f"{unit}/") for start in fixed)


def run_all(full: bool, only: Sequence[str], together: bool) -> Items:
    """All items; RuntimeError for patterns that nothing matches. ``together``: launched jobs beside what runs in this process."""
    from same import jobs

    asked = {name: unit for name, unit in units(full).items() if may_hold(name, only)}
    launched = [name for name in asked if name.removeprefix("jobs/") in jobs.LAUNCHED | jobs.FULL]
    items: Items = {}
    with ThreadPoolExecutor(max_workers=1) as beside:
        waited = {name: beside.submit(run_unit, name, asked[name]) for name in launched if together}
        for name, unit in asked.items():
            found, seconds = waited[name].result() if name in waited else run_unit(name, unit)
            print(f"{name}: {len(found)} items, {seconds:.0f} s", file=sys.stderr, flush=True)
            items |= found
    items = {name: text for name, text in items.items() if not only or matches(name, only) or name.endswith(FAILED)}
    if not items:
        raise RuntimeError(f"no item is named {' '.join(only)}: 'list' shows the names")
    return items


def run_unit(name: str, unit: Unit) -> tuple[Items, float]:
    """The items of a unit, made in an empty folder of its own, and seconds; of one that fails, the traceback as an item.

    Prints nothing: beside it, a command may run whose output is kept.
    """
    started = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="same-"))
    try:
        items = unit(work)
    except Exception:  # the other units still say what they find
        items = {f"{name}/{FAILED}": traceback.format_exc()}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return items, time.monotonic() - started


def store(folder: Path, items: Items, only: Sequence[str]) -> int:
    """Keep the items; with ``only``, the other items of the folder stay. Returns the exit code; RuntimeError for a failed unit."""
    failed = [f"{name}\n{text}" for name, text in items.items() if name.endswith(FAILED)]
    if failed:
        raise RuntimeError("\n".join(["nothing is stored", *failed]))
    kept = {} if not only or not folder.is_dir() else read_items(folder)
    shutil.rmtree(folder, ignore_errors=True)
    write_items(folder, {name: text for name, text in kept.items() if not matches(name, only)} | items)
    print(f"stored {len(items)} items in {folder}")
    return 0


def check(old: Items, new: Items, changed: Sequence[str]) -> int:
    """Compare and print; returns the exit code."""
    found = compare(old, new, changed)
    print("\n".join(found.lines()))
    return 0 if found.same else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and do; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", choices=["store", "check", "list", "auto"], help="auto: store what is not there, else check"
    )
    parser.add_argument("folder", type=Path, help="the store, outside of the sources")
    parser.add_argument("--only", nargs="+", default=[], metavar="ITEM", help="names, or globs of names")
    parser.add_argument("--changed", nargs="+", default=[], metavar="ITEM", help="names or globs: may differ")
    parser.add_argument("--full", action="store_true", help="also the jobs without --quick")
    parser.add_argument(
        "--together", action="store_true", help="the launched jobs beside the rest: needs two free cores"
    )
    asked = parser.parse_args(argv)
    folder = asked.folder.resolve()
    if folder.is_relative_to(ROOT):
        parser.error(f"{asked.folder} is inside of the source tree: name a folder outside")
    what = asked.what
    if what == "auto":
        what = "check" if folder.is_dir() else "store"
        print(f"{folder} {'is compared with' if what == 'check' else 'does not exist yet: storing'}", flush=True)
    if what == "list":
        print("\n".join(read_items(folder)))
        return 0
    settle_environment()
    old = read_items(folder) if what == "check" else {}  # before the long work: the folder may be missing
    old = {name: text for name, text in old.items() if not asked.only or matches(name, asked.only)}
    old = {name: text for name, text in old.items() if asked.full or not matches(name, [FULL])}
    items = run_all(asked.full, asked.only, asked.together)
    return store(folder, items, asked.only) if what == "store" else check(old, items, asked.changed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FileNotFoundError, RuntimeError) as error:
        sys.exit(f"same.py: {error}")
