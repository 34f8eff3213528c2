"""``moe-steer serve`` up to the engine, which a stand-in plays: what is checked, how it is started, what is said."""

from __future__ import annotations

import json
import socket
import stat
import sys
from pathlib import Path

import pytest

from launch.cli.main import main
from launch.serve import cpu_options, named_plans
from moe_steer import ExpertGain, SteeringPlan
from moe_steer.lab import LAB_MODEL, LAB_SERVED

STAND_IN = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
if sys.argv[1] == "-c":
    print(json.dumps({{"missing": {missing}, "plugins": ["another", "moe_steer"], "cpu": {cpu}}}))
    sys.exit()
said = dict(zip(sys.argv[3::2], sys.argv[4::2]))
model = said["--model"]
said |= {{"plugins": os.environ["VLLM_PLUGINS"], "latent": json.load(open(model + "/config.json"))["kv_lora_rank"]}}
json.dump(said, open({out!r}, "w"))
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{{}}")
    def log_message(self, *args): pass
server = HTTPServer(("127.0.0.1", int(said["--port"])), Handler)
server.handle_request()
sys.exit({code})
"""


@pytest.fixture
def plans(tmp_path: Path) -> list[str]:
    for name, layer in (("good", 1), ("dense", 0)):
        SteeringPlan(experts=[ExpertGain(layer, 3, 2.0)]).save(tmp_path / f"{name}.json")
    return [str(tmp_path / "good.json"), str(tmp_path / "dense.json")]


def stand_in(folder: Path, code: int = 0, missing: list[str] | None = None, cpu: bool = False) -> str:
    path, said = folder / "python", str(folder / "said")
    path.write_text(STAND_IN.format(python=sys.executable, out=said, code=code, missing=missing or [], cpu=cpu))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_a_server_is_started_with_the_plans_and_says_how_to_ask(
    plans: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--plan", plans[0], "--plan", f"other={plans[0]}", "--default", "other*0.5", "--port", port()]
    assert (
        main(
            ["serve", "lab-search", *options, "--python", stand_in(tmp_path), "--", "--dtype", "float32", "--seed", "7"]
        )
        == 0
    )
    said = json.loads((tmp_path / "said").read_text())
    settings = json.loads(said["--additional-config"])["moe_steer"]
    assert settings == {"plans": {"good": plans[0], "other": plans[0]}, "default": "other*0.5"}
    assert (said["--host"], said["--dtype"], said["--seed"]) == ("127.0.0.1", "float32", "7")
    assert said["--served-model-name"] == "lab-search"
    assert said["plugins"] == "another,moe_steer"
    assert said["latent"] == 512, "no kernel takes its own size"
    assert not Path(said["--model"]).exists(), "the copy was a temporary one"
    shown = capfd.readouterr().out
    assert "latent attention filled up with zeros to 512 + 64, the same function" in shown
    assert (
        f'serving lab-search at http://127.0.0.1:{said["--port"]}/v1 with good, other; ask with "vllm_xargs": {{"moe_steer": "good"}}'
        in shown
    )


def test_the_lab_is_served_as_it_is_shipped_for_engines(plans: list[str], tmp_path: Path) -> None:
    options = ["--plan", plans[0], "--port", port(), "--python", stand_in(tmp_path)]
    assert main(["serve", "lab", *options]) == 0
    said = json.loads((tmp_path / "said").read_text())
    assert (said["--model"], said["latent"], said["--served-model-name"]) == (str(LAB_SERVED), 512, "lab")


EAGER = ["--compilation-config", '{"custom_ops":["none"]}']


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--dtype", "float32"], ["--attention-backend", "CPU_MLA"]),
        (["--dtype=float32", "--enforce-eager"], ["--attention-backend", "CPU_MLA", *EAGER]),
        (["--enforce_eager"], EAGER),
        (["--dtype", "float32", "--attention-backend=AMX_MLA"], []),
        (["--dtype", "float32", "--dtype", "bfloat16"], []),
        (["--enforce-eager", "--compilation-config", "{}"], []),
        ([], []),
    ],
)
def test_latent_attention_on_a_cpu_takes_the_kernels_that_compute_it(given: list[str], told: list[str]) -> None:
    assert cpu_options({"kv_lora_rank": 512}, given) == told
    assert cpu_options({}, given) == [], "other attention needs nothing"


def test_a_copy_that_is_kept_and_a_server_that_fails(
    plans: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--plan", plans[0], "--port", port(), "--served-copy", str(tmp_path / "copy")]
    asked = ["serve", str(LAB_MODEL), *options, "--python", stand_in(tmp_path, code=3, cpu=True)]
    assert main([*asked, "--", "--dtype", "float32"]) == 1
    assert json.loads((tmp_path / "said").read_text())["--attention-backend"] == "CPU_MLA"
    assert "the server ended with code 3: its own messages above say why" in capfd.readouterr().err
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["kv_lora_rank"] == 512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lab", "--plan", "{dense}"], "plan dense: layer 0 (expert 3) has no experts in this model"),
        (["lab", "--plan", "{good}", "--plan", "{good}"], "two plans are named good: give one another name"),
        (["lab", "--plan", "a*2={good}"], "plan name 'a*2': give up to 64 letters"),
        (["lab", "--plan", "off={good}"], "plan name 'off'"),
        (["lab", "--plan", "nowhere.json"], "no plan file at 'nowhere.json'"),
        (["lab", "--plan", "{good}", "--default", "b"], "--default b is none of the plans good"),
        (["lab-dense", "--plan", "{good}"], "plan good: the plan names experts, but qwen2 is a dense model"),
        (["nowhere/at/all", "--plan", "{good}"], "there is no model folder 'nowhere/at/all'"),
        (["lab", "--plan", "{good}", "--python", "/nowhere/python"], "--python /nowhere/python cannot be run"),
        (["lab", "--plan", "{good}", "--python", "{without}"], "has no vllm, moe_steer_vllm: install it there as docs/engines.md says"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_starts(
    plans: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    without = stand_in(tmp_path, missing=["vllm", "moe_steer_vllm"])
    given = [one.format(good=plans[0], dense=plans[1], without=without) for one in options]
    assert main(["serve", *given]) == 1
    assert message in capfd.readouterr().err
    assert not (tmp_path / "said").exists()


def test_a_copy_is_asked_for_where_none_is_needed(
    plans: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    SteeringPlan().save(tmp_path / "none.json")
    options = [
        "--plan",
        str(tmp_path / "none.json"),
        "--python",
        stand_in(tmp_path),
        "--served-copy",
        str(tmp_path / "c"),
    ]
    assert main(["serve", "lab-dense", *options]) == 1
    assert "vLLM takes lab-dense as it is" in capfd.readouterr().err


def test_a_folder_stands_for_the_plans_in_it(plans: list[str], tmp_path: Path) -> None:
    found = named_plans([str(tmp_path), f"again={plans[0]}"])
    assert found == {"dense": plans[1], "good": plans[0], "again": plans[0]}
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"empty holds no plans \(\*.json\): give one of a run that asked for a server"
    ):
        named_plans([str(tmp_path / "empty")])
