"""The shape of the source tree: cycles, floors, chains, sizes, names, idle fields, frozen flags. Each rule has a case that fails."""

from __future__ import annotations

import ast
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("moe_steer", "expert_stats", "reasoning_evals", "launch")
FLAGS = Path(__file__).parent / "golden" / "flags.json"
MAX_LINES, MAX_MODULES, MAX_CHAIN, MAX_FILES, MAX_MAIN_JOB = 300, 15, 15, 330, 49
FLOORS = {
    "moe_steer": (
        {"errors", "files", "json_files", "lazy_exports", "console", "layers", "hooks", "inside", "observe"},
        {"thinking"}, {"tokens"}, {"lab"}, {"backends"}, {"saes"},
        {"direction", "gates", "entries", "plan"},
        {"gguf"}, {"directions"}, {"contrasts"}, {"steering", "selfcheck", "loading"}, {"baking"},
    ),
    "expert_stats": (
        {"trace_counts", "counts_files", "counts"}, {"evidence"},
        {"scores", "rollouts"}, {"wording"}, {"counter", "npmi"}, {"collect", "routed", "select", "plots"},
        {"causes"}, {"rivals"},
    ),
    "reasoning_evals": (
        {"problems", "thinking", "prompts", "decoding"},
        {"grading"}, {"tasks"}, {"engines"}, {"runs"}, {"comparing"}, {"report"}, {"thoughts", "safety", "exports"},
    ),
    "launch": (
        {"core"}, {"jobs"}, {"dry_run", "recipes"},
        {"inspect_model", "lm_eval_model"},
        {"steer_r1", "reduce_overthinking", "safety", "evaluate", "collect_stats"}, {"lab"}, {"serve"}, {"playground"}, {"guide"}, {"cli"},
    ),
}  # fmt: skip
"""Folders and files of each room from the ground up: each imports from its own floor and from those below."""
JSON_RECORDS = {"ExactEffect", "PairSummary", "PowerPlan", "RankedExpert"}
"""Records that are written whole into results: their readers are outside."""
TESTED_RECORDS = {"Solution", "BlockFormat", "Certificate"}
"""Records with fields for callers of the Python API, or for the tests that hold what they say."""

Graph = Mapping[str, set[str]]


def modules(root: Path = ROOT, doors: bool = False) -> dict[str, str]:
    """Full name of every module -> its source; a package goes by its folder's name. ``doors``: with what packages export."""
    found = {}
    for path in (path for room in ROOMS for path in sorted((root / room).rglob("*.py"))):
        parts = path.relative_to(root).with_suffix("").parts
        stub = path.with_suffix(".pyi")  # a door: its names are imported on first use
        text = path.read_text(encoding="utf-8") + (stub.read_text(encoding="utf-8") if stub.is_file() and doors else "")
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = text
    return found


def imports(name: str, source: str, known: Iterable[str], typing: bool = True) -> set[str]:
    """Modules among ``known`` that a source imports anywhere: at the top, in functions, and for typing if asked."""
    names, found = set(known), set()
    for module, name_imported, for_typing in imported(source):
        inner = f"{module}.{name_imported}" if name_imported else module
        if typing or not for_typing:
            found.update({inner} & names or {module} & names)
    return found - {name}


@cache
def imported(source: str) -> list[tuple[str, str, bool]]:
    """(module, name of it or "", whether for typing alone) of every absolute import of a source; each is read once."""
    found: list[tuple[str, str, bool]] = []

    def visit(node: ast.AST, for_typing: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = for_typing or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            if isinstance(child, ast.Import):
                found.extend((alias.name, "", inside) for alias in child.names)
            if isinstance(child, ast.ImportFrom) and child.module and child.level == 0:
                found.extend((child.module, alias.name, inside) for alias in child.names)
            if not isinstance(child, ast.expr):  # no import stands in one
                visit(child, inside)

    visit(ast.parse(source), False)
    return found


def graph_of(sources: Mapping[str, str], typing: bool = True) -> dict[str, set[str]]:
    """Module -> what it imports."""
    return {name: imports(name, source, sources, typing) for name, source in sources.items()}


def cycles(graph: Graph) -> list[list[str]]:
    """Groups of modules that import one another (Tarjan's strongly connected components of two and more)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for name in graph:
        if name not in index:
            visit(name)
    return found


def longest_chain(graph: Graph) -> list[str]:
    """The longest path of imports; the graph has no cycle."""
    best: dict[str, list[str]] = {}

    def below(name: str) -> list[str]:
        if name not in best:
            best[name] = [name, *max((below(other) for other in sorted(graph[name])), key=len, default=[])]
        return best[name]

    return max((below(name) for name in graph), key=len)


def reached(graph: Graph, start: str) -> set[str]:
    """Everything that ``start`` imports, directly or not, with the packages on the way."""
    found: set[str] = set()
    todo = [start]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        parents = [name[:i] for i, letter in enumerate(name) if letter == "."]
        todo += [*graph[name], *(parent for parent in parents if parent in graph)]
    return found


def upward_arrows(graph: Graph, floors: Mapping[str, Sequence[set[str]]]) -> list[str]:
    """Imports within a room from a lower floor to a higher one. The door of a room (its __init__) exports from every floor."""
    found = []
    for name, others in graph.items():
        room, _, own = name.partition(".")
        for other in others if own else ():
            target = other.partition(".")
            if target[0] == room and target[2] and floor_of(floors[room], target[2]) > floor_of(floors[room], own):
                found.append(f"{name} imports {other}")
    return found


def floor_of(floors: Sequence[set[str]], name: str) -> int:
    """The floor of a module, by its folder or by itself. ValueError for one that is on none."""
    for number, floor in enumerate(floors):
        if name.partition(".")[0] in floor:
            return number
    raise ValueError(f"{name} is on no floor: add it to FLOORS")


def crowded(sources: Mapping[str, str]) -> list[str]:
    """Folders with too many modules, their __init__ not counted."""
    packages = {name for name in sources if any(other.startswith(name + ".") for other in sources)}
    number = Counter(name.rpartition(".")[0] for name in sources if name not in packages)
    return [f"{folder} has {count} modules" for folder, count in number.items() if count > MAX_MODULES]


def same_names(sources: Mapping[str, str]) -> list[str]:
    """Names that two modules of one room have."""
    packages = {name for name in sources if any(other.startswith(name + ".") for other in sources)}
    seen = Counter((name.partition(".")[0], name.rpartition(".")[2]) for name in sources if name not in packages)
    return [f"{room} has {count} modules named {name}" for (room, name), count in seen.items() if count > 1]


def idle_fields(sources: Mapping[str, str]) -> list[str]:
    """Fields of dataclasses that no source reads: not as an attribute, and not by name in a text."""
    fields: dict[str, str] = {}
    read: set[str] = set()
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and is_record(node):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        fields.setdefault(item.target.id, f"{name}:{node.name}.{item.target.id}")
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                read.add(node.value)
    return sorted(where for field, where in fields.items() if field not in read and not field.startswith("_"))


def is_record(node: ast.ClassDef) -> bool:
    """Whether a class is a dataclass whose readers are here. (The fields of a NamedTuple are read by unpacking it, too.)"""
    decorated = any("dataclass" in ast.unparse(one) for one in node.decorator_list)
    return decorated and node.name not in JSON_RECORDS | TESTED_RECORDS


@cache
def sources_here() -> dict[str, str]:
    """What every module says."""
    return modules()


@cache
def graph_here() -> Graph:
    """What every module imports."""
    return graph_of(sources_here())


def test_no_cycle() -> None:
    assert cycles(graph_here()) == []
    assert cycles(graph_of(modules(doors=True))) == []


def test_no_arrow_upwards() -> None:
    assert upward_arrows(graph_here(), FLOORS) == []


def test_chains_and_the_main_job_stay_short() -> None:
    chain = longest_chain(graph_here())
    assert len(chain) <= MAX_CHAIN, chain
    main_job = reached(graph_of(sources_here(), typing=False), "launch.steer_r1")
    assert len(main_job) <= MAX_MAIN_JOB, sorted(main_job)


def test_sizes() -> None:
    lines = {name: source.count("\n") for name, source in sources_here().items()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}
    assert len(sources_here()) <= MAX_FILES
    assert crowded(sources_here()) == []


def test_names_are_used_once_in_a_room() -> None:
    assert same_names(sources_here()) == []


def test_no_field_without_a_reader() -> None:
    assert idle_fields(sources_here()) == []


def test_flags_are_frozen() -> None:
    """A flag that comes, goes or changes its default must be written down: python tests/test_shape.py"""
    assert flags() == json.loads(FLAGS.read_text())


def flags() -> dict[str, dict[str, str]]:
    """Command -> flag -> default."""
    import dataclasses
    from importlib import import_module

    from launch.cli.main import COMMANDS

    kinds = {
        "steer_r1.py": "launch.jobs.experts_options:Options",
        "reduce_overthinking.py": "launch.jobs.overthinking_options:OverthinkingOptions",
        "safety.py": "launch.jobs.safety_options:SafetyOptions",
        "evaluate.py": "launch.jobs.evaluation:EvaluateOptions",
        "collect_stats.py": "launch.jobs.stats:CollectOptions",
        **COMMANDS,
    }
    found = {}
    for command, where in kinds.items():
        module, _, kind = where.partition(":")
        fields = dataclasses.fields(getattr(import_module(module), kind))
        found[command] = {
            "--" + field.name.replace("_", "-"): "required"
            if field.default is dataclasses.MISSING
            else str(field.default).replace(sys.executable, "<this Python>")
            for field in fields
        }
    return found


@pytest.mark.parametrize(
    "inner",
    ["from launch import b", "def f():\n    import launch.b", "if TYPE_CHECKING:\n    from launch.b import x"],
)
def test_a_cycle_of_any_kind_is_found(inner: str) -> None:
    sources = {"launch": "", "launch.a": inner, "launch.b": "from launch.a import y"}
    assert cycles(graph_of(sources)) == [["launch.a", "launch.b"]]


def test_an_arrow_upwards_is_found() -> None:
    sources = {"launch": "", "launch.core": "", "launch.core.a": "import launch.jobs.b", "launch.jobs.b": ""}
    assert upward_arrows(graph_of(sources), FLOORS) == ["launch.core.a imports launch.jobs.b"]


def test_a_long_chain_is_found() -> None:
    graph: dict[str, set[str]] = {"a": {"b"}, "b": {"c"}, "c": set(), "d": {"c"}}
    assert longest_chain(graph) == ["a", "b", "c"]
    assert reached(graph, "a") == {"a", "b", "c"}


def test_a_crowded_folder_a_double_name_and_an_idle_field_are_found() -> None:
    many = {f"launch.m{number}": "" for number in range(MAX_MODULES + 1)}
    assert crowded({"launch": "", **many}) == ["launch has 16 modules"]
    assert same_names({"launch.a.x": "", "launch.b.x": "", "launch.a": "", "launch.b": ""}) == [
        "launch has 2 modules named x"
    ]
    record = "@dataclass\nclass A:\n    seen: int\n    idle: int\nprint(a.seen)"
    assert idle_fields({"launch.a": record}) == ["launch.a:A.idle"]


if __name__ == "__main__":
    FLAGS.parent.mkdir(exist_ok=True)
    FLAGS.write_text(json.dumps(flags(), indent=1, sort_keys=True) + "\n")
