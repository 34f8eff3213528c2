"""The import rules of ARCHITECTURE.md, and proof that each can fail."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"moe_steer", "expert_stats", "reasoning_evals", "launch"}
MAY_IMPORT = {
    "moe_steer": set(),
    "expert_stats": {"moe_steer"},
    "reasoning_evals": {"moe_steer"},
    "launch": {"moe_steer", "expert_stats", "reasoning_evals"},
}
PURE = [
    *(f"moe_steer/{name}.py" for name in ("plan", "entries/presets")),
    *(f"expert_stats/{name}.py" for name in ("counts", "npmi", "select")),
    *(f"reasoning_evals/{name}.py" for name in ("grading/answers", "thinking", "comparing/statistics", "problems")),
]
LEAVES = {
    "moe_steer.errors",
    "moe_steer.files",
    "moe_steer.json_files",
    "moe_steer.lazy_exports",
    "moe_steer.console",
    "moe_steer.thinking",
}
"""What reasoning_evals may import of moe_steer: pieces that know nothing of models."""
HEAVY = {"transformers", "datasets", "deepspeed"}


def imports(source: str) -> set[str]:
    """Full names of everything imported anywhere in the source."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found


def loads_pickles(source: str) -> bool:
    """Whether torch.load is called anywhere without weights_only=True."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    return any("weights_only=True" not in map(ast.unparse, call.keywords) for call in loads)


def violations(path: str, source: str) -> list[str]:
    """What a file at ``path`` (relative to the root) may not do."""
    room = path.split("/")[0]
    names = {name.split(".")[0] for name in imports(source)}
    found = []
    siblings = names & ROOMS - {room} - MAY_IMPORT[room]
    if siblings:
        found.append(f"{path} imports its sibling {sorted(siblings)[0]}")
    if room == "reasoning_evals":
        reached = {name for name in imports(source) if name.split(".")[0] == "moe_steer"}
        found += [f"{path} imports its sibling {name}" for name in sorted(reached - LEAVES)]
    may_use_deepspeed = room == "launch" or path == "moe_steer/loading.py" or path.startswith("moe_steer/backends/")
    if "deepspeed" in names and not may_use_deepspeed:
        found.append(f"{path} imports deepspeed")
    if path in PURE and names & HEAVY:
        found.append(f"{path} is pure and imports {sorted(names & HEAVY)[0]}")
    if path != "moe_steer/hooks.py" and ("register_forward_" in source or "register_full_backward" in source):
        found.append(f"{path} registers hooks")
    if "import pickle" in source or loads_pickles(source):
        found.append(f"{path} reads pickles")
    return found


def sources() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def test_the_house_keeps_its_rules() -> None:
    assert len(sources()) > 30
    assert [v for path in sources() for v in violations(path.relative_to(ROOT).as_posix(), path.read_text())] == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        (
            "reasoning_evals/runs/run.py",
            "def f():\n    from moe_steer.plan import SteeringPlan",
            "imports its sibling moe_steer",
        ),
        ("moe_steer/steering.py", "import expert_stats.npmi", "imports its sibling expert_stats"),
        ("expert_stats/collect.py", "import deepspeed.comm", "imports deepspeed"),
        ("moe_steer/selfcheck.py", "def f():\n    import deepspeed", "imports deepspeed"),
        ("expert_stats/npmi.py", "from transformers import AutoModel", "is pure and imports transformers"),
        ("expert_stats/collect.py", "m.register_forward_hook(f)", "registers hooks"),
        ("moe_steer/tokens/traces.py", "import pickle", "reads pickles"),
        ("moe_steer/saes/files.py", "import torch\n\ntorch.load(path)", "reads pickles"),
        ("moe_steer/saes/files.py", "torch.load(path, weights_only=False)", "reads pickles"),
    ],
)
def test_each_rule_can_fail(path: str, source: str, message: str) -> None:
    assert any(message in violation for violation in violations(path, source))


@pytest.mark.parametrize(
    "room", ["moe_steer", "expert_stats", "reasoning_evals", "moe_steer.plan", "expert_stats.npmi"]
)
def test_a_light_import_stays_light(room: str) -> None:
    code = f"import sys, {room}; print(sorted({{'transformers', 'deepspeed', 'datasets'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_the_light_import_guard_can_fail() -> None:
    code = "import sys, datasets; print(sorted({'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() != "[]"


def test_no_launch_file_is_named_like_a_dependency() -> None:
    taken = set(sys.stdlib_module_names) | {
        "datasets",
        "accelerate",
        "deepspeed",
        "transformers",
        "torch",
        "numpy",
        "scipy",
        "rich",
        "tyro",
    }
    assert {path.stem for path in (ROOT / "launch").glob("*.py")} & taken == set()


def test_every_file_on_the_map_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text().split("\n## Rooms\n")[1].split("\n## Rules")[0]
    room, missing = "", []
    for line in text.splitlines():
        words = line.split("  ")
        if line.startswith("    ") and not line.startswith("      "):
            room = line.split()[0]
        elif line.startswith("      "):
            names = line.strip().split("  ")[0].split(", ")
            missing += [room + name for name in names if not (ROOT / room / name).exists()]
        assert words
    assert missing == []
