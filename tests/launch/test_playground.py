"""The playground by HTTP: its tokens are those of the printed command, its readings those of a second forward; what is refused, in a line."""

from __future__ import annotations

import asyncio
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import families
from launch.cli.main import main
from launch.playground import running
from launch.playground.asked import Column, Offer
from launch.playground.boards import Boards
from launch.playground.page_app import Guard
from launch.playground.playground import Playground
from launch.playground.readings import Readings
from launch.playground.running import twin
from moe_steer import ExpertGain, SteeringPlan, load_model, observe_residual, observe_routing, steer
from moe_steer.backends import Layout
from moe_steer.direction import Direction
from moe_steer.layers import model_shape
from moe_steer.tokens import scoped_positions
from playground_page import PLAIN, YOURS, heard, ids, listening, ran, serving, settings, texts
from reasoning_evals import load_task
from reasoning_evals.prompts import render_prompt
from reasoning_evals.runs import read_generations
from served_lab import ServedLab, served

pytestmark = pytest.mark.slow

LAYER = 2
DOSED = {"kind": "plan", "plan": "mine", "dose": 2.0}
ALONG = {
    "kind": "direction",
    "direction": "way",
    "layer": LAYER,
    "strength": 0.4,
    "unit": "residual_norm",
    "scope": "thought",
}
RULE = {"kind": "arm", "word": "budget:20"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan and a direction of the lab."""
    home = tmp_path_factory.mktemp("playground")
    SteeringPlan(experts=[ExpertGain(1, 12, 3.0), ExpertGain(3, 2, 3.0)], scope="thought").save(home / "mine.json")
    vector_D = torch.randn(128, generator=torch.Generator().manual_seed(0))
    Direction(vector_D=vector_D, layer=LAYER, method="test", header={"residual_norm": 4.0}).save(
        home / "way.safetensors"
    )
    return home


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    options: dict[str, Any] = {"plan": (str(folder / "mine.json"),), "direction": (str(folder / "way.safetensors"),)}
    with serving(out=str(folder / "out"), **options) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def four(client: httpx.Client) -> list[dict[str, Any]]:
    """A run of four kinds of column."""
    return ran(client, "four-kinds", settings(YOURS, DOSED, ALONG, RULE), f"projection:{LAYER}:way")


def test_each_column_is_what_its_command_makes(client: httpx.Client, four: list[dict[str, Any]]) -> None:
    """In the one process each column is generated beside three others, under hooks of their own; alone by the command."""
    asked = settings(YOURS, DOSED, ALONG, RULE)
    for number, column in enumerate(four):
        saved = client.post("/api/pages/four-kinds/plan", json={"settings": asked, "column": number}).json()
        words = shlex.split(saved["command"])
        assert words[:2] == ["moe-steer", "generate"]
        assert ("--plan" in words) == bool(saved["plan"]) == (number < 3)
        assert main(words[1:]) == 0
        (made,) = read_generations(Path(words[words.index("--out") + 1]))
        assert list(made.token_ids) == ids(column)
        assert column["state"] == "done"
        counts = column["counts"]
        assert counts["total"] == len(made.token_ids)
        parts = [token["part"] for token in column["tokens"]]
        assert [parts.count("thought"), parts.count("answer")] == [counts["thought"], counts["answer"]]
    assert len({tuple(ids(column)) for column in four}) > 1, "the columns differ, so that equality says something"


@pytest.mark.parametrize("number", [True, 9, -1, "1", None])
def test_a_column_that_is_none_is_not_written(client: httpx.Client, number: Any) -> None:
    said = client.post("/api/pages/no-column/plan", json={"settings": settings(), "column": number})
    assert (said.status_code, f"column {number!r} does not exist: the page shows 2" in said.text) == (400, True)


def test_readings_are_those_of_one_forward_over_the_text(
    client: httpx.Client, folder: Path, four: list[dict[str, Any]]
) -> None:
    model, tokenizer = load_model("lab")
    problem = client.get("/api/problems/0").json()
    prompt = list(render_prompt(tokenizer, problem["prompt"]).token_ids)
    plan = SteeringPlan.load(folder / "mine.json").dosed(2.0)
    generated = ids(four[1])
    whole = prompt + generated
    weights_EP = torch.zeros(4, 16, len(whole))
    along_P = torch.zeros(len(whole))
    way_D = Direction.load(folder / "way.safetensors").vector_D

    def routed(layer: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        for place in range(len(whole)):
            for expert, weight in zip(ids_TK[place].tolist(), weights_TK[place].tolist(), strict=True):
                weights_EP[layer, expert, place] = weight

    def residual(_: int, hidden_BSD: torch.Tensor) -> None:
        along_P[:] = hidden_BSD[0] @ (way_D / way_D.norm())

    with torch.inference_mode(), steer(model, plan, tokenizer=tokenizer, prompt_lengths=[len(prompt)]):
        with observe_routing(model, routed), observe_residual(model, [LAYER], residual):
            logits_PV = model(torch.tensor([whole])).logits[0]
    entropies_P = torch.distributions.Categorical(logits=logits_PV).entropy()
    scoped = set(scoped_positions("thought", tokenizer, whole, len(prompt)))

    for colour, wanted in (("projection:2:way", along_P), ("expert:3:2", weights_EP[3, 2])):
        found = [token["value"] for token in heard(client, "four-kinds", colour)[1]["tokens"]]
        assert found[-1] is None, "the last token is drawn and never processed"
        assert found[:-1] == pytest.approx(wanted[len(prompt) : -1].tolist(), abs=2e-4)
    for at, token in enumerate(four[1]["tokens"]):
        place = len(prompt) + at
        assert token["entropy"] == pytest.approx(float(entropies_P[place - 1]), abs=2e-4)
        if at == len(generated) - 1:
            assert token["experts"] == []
            continue
        fires = float(weights_EP[1, 12, place] + weights_EP[3, 2, place]) > 0
        assert token["steered"] == (fires and place in scoped)
        shown = {(layer, expert): weight for layer, expert, weight in token["experts"]}
        assert list(shown.values()) == sorted(shown.values(), reverse=True)
        assert len(shown) == 6
        for (layer, expert), weight in shown.items():
            assert weight == pytest.approx(float(weights_EP[layer, expert, place]), abs=2e-4)


@pytest.mark.parametrize("name", ["deepseek_v3", "llama4", "gpt_oss", "deepseek_v4"])
def test_a_twin_shares_every_weight_and_no_hook(name: str) -> None:
    """In families whose weights are reached at other places, and with several streams a token."""
    model = families.build(name)
    other, shape = twin(model), model_shape(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    tokens, layer = torch.tensor([[5, 6, 7]]), shape.moe_layers[-1]
    plan = SteeringPlan(experts=[ExpertGain(layer, expert, 3.0) for expert in range(shape.num_experts)])
    readings = Readings(shape, {"way": torch.ones(shape.hidden_size)})
    with torch.inference_mode():
        before = other(tokens).logits
        with steer(model, plan) as audit, readings.watching(model, audit):
            assert torch.equal(other(tokens).logits, before)
            for ids_BT in (tokens, torch.tensor([[5, 6, 7, 8]])):
                readings(ids_BT, model(ids_BT).logits[:, -1])
            assert not torch.equal(model(tokens).logits, before)
    (seen,) = readings.seen
    assert seen.steered
    assert seen.ids_LK.shape == (len(shape.moe_layers), shape.top_k)
    assert seen.projections_NL.shape == (1, shape.num_layers)
    assert bool(torch.isfinite(torch.tensor(seen.projections_NL)).all())


def test_columns_of_a_model_that_has_no_twin_take_turns(
    four: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "layout_of", lambda _: Layout(backend="device_map"))
    model, tokenizer = load_model("lab")
    shape = model_shape(model)
    problems, plans = load_task("lab", split="test", num=1), {"mine": SteeringPlan.load(folder / "mine.json")}
    offer = Offer(problems=problems, task="lab", token_limit=256, shape=shape, plans=plans)
    here = running.Here(model=model, tokenizer=tokenizer, shape=shape, directions={})
    run = here.start(offer.read(settings(YOURS, DOSED)))
    run.wait()
    assert here.copies == [model]
    assert [list(answer.token_ids) for answer in run.answers] == [ids(four[0]), ids(four[1])]


def test_a_refresh_and_a_restart_lose_nothing(client: httpx.Client, folder: Path, four: list[dict[str, Any]]) -> None:
    asked = settings(YOURS, DOSED, ALONG, RULE)
    kept = client.get("/api/pages/four-kinds").json()
    assert kept["settings"] == kept["ran"] == asked
    again = heard(client, "four-kinds", f"projection:{LAYER}:way")
    assert again == four
    offer = Offer(problems=[], task="lab", token_limit=1)
    restarted = Boards(folder / "out", offer, None)  # type: ignore[arg-type]
    assert restarted.board("four-kinds").settings == asked
    for name in ("../four-kinds", "a", "x" * 50):
        with pytest.raises(ValueError, match="is not one of this playground"):
            restarted.board(name)


def test_own_words_are_graded_where_the_answer_is_known(client: httpx.Client) -> None:
    short = settings(PLAIN, YOURS)["sampling"] | {"max_new_tokens": 4}
    own = settings(PLAIN, YOURS, prompt={"text": "What is 17 + 8?", "target": "25"}, sampling=short)
    assert [column["grade"]["outcome"] for column in ran(client, "own-words", own)] == ["truncated"] * 2
    own["prompt"]["target"] = ""
    (plain, _) = ran(client, "own-words", own)
    assert plain["grade"] is None
    assert plain["counts"]["total"] == 4


def test_one_run_at_a_time_and_stop_ends_it(client: httpx.Client) -> None:
    long = settings(PLAIN, YOURS, index=5, sampling={"seed": 0, "max_new_tokens": 256})
    assert client.post("/api/pages/first-page/run", json=long).status_code == 202
    busy = client.post("/api/pages/other-page/run", json=long)
    assert (busy.status_code, busy.json()["error"][:23]) == (409, "a run is under way, her")
    client.post("/api/pages/first-page/stop", json={})
    assert [column["state"] for column in heard(client, "first-page")] == ["stopped"] * 2


def test_a_column_that_fails_says_so_and_leaves_the_others(client: httpx.Client) -> None:
    beyond = {"base": None, "experts": [{"layer": 2, "expert": e, "gain": 1e38} for e in range(16)]}
    plain, broken = ran(client, "beyond-all", settings(PLAIN, YOURS, plan=beyond), "expert:2:5")
    assert plain["state"] == "done"
    assert broken["state"] == "failed"
    assert "logits that are not numbers: with a steering plan lower its gains" in broken["error"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"columns": [PLAIN]}, "the page has 1 columns: show 2 to 4"),
        ({"columns": [PLAIN, {"kind": "plan", "plan": "none"}]}, "column 2: the plan 'none' is not open here"),
        ({"columns": [PLAIN, YOURS | {"dose": -9}]}, "column 2: dose -9 makes the gain 8 of layer 2 expert 5 -62"),
        ({"columns": [PLAIN, {"kind": "arm", "word": "hurry"}]}, "column 2: the arm 'hurry' has the unknown rule"),
        ({"columns": [PLAIN, {"kind": "arm", "word": "plan:/etc/passwd"}]}, "names a plan: give that as a column of plans"),
        ({"columns": [PLAIN, ALONG | {"layer": 1}]}, "was made for layer 2"),
        ({"columns": [PLAIN, ALONG | {"direction": "/etc/passwd"}]}, "the direction '/etc/passwd' is not open here"),
        ({"plan": {"experts": [{"layer": 2, "expert": 99, "gain": 2}]}}, "column 2: expert 99 at layer 2 does not exist"),
        ({"plan": {"experts": [{"layer": 2, "expert": 1, "gian": 2}]}}, "column 2: unknown key 'gian' in experts[0]"),
        ({"plan": {"experts": [], "scope": "never"}}, "column 2: scope 'never' is unknown"),
        ({"prompt": {"text": "  "}}, "the prompt is empty: write one, or choose a problem"),
        ({"prompt": {"index": 1000}}, "problem 1001 of lab does not exist: it has 100"),
        ({"prompt": {"text": "why " * 600, "target": ""}}, "do not fit the model's context of 512"),
        ({"sampling": {"temperature": -1.0}}, "temperature must be a positive number"),
        ({"sampling": {"max_new_tokens": 5000}}, "started for 256 at most (--max-new-tokens)"),
        ({"colours": "red"}, "the page has the unknown key 'colours'"),
    ],
)  # fmt: skip
def test_what_no_run_can_follow_is_said_in_a_sentence(client: httpx.Client, changes: dict[str, Any], said: str) -> None:
    refused = client.post("/api/pages/refused/run", json=settings(PLAIN, YOURS) | changes)
    assert refused.status_code == 400
    assert said in refused.json()["error"]
    assert "\n" not in refused.json()["error"]


@pytest.mark.parametrize(
    ("colour", "said"),
    [
        ("blue", "the colour 'blue' is unknown"),
        ("expert:0:1", "layer '0' has no experts: choose one of 1, 2, 3"),
        ("expert:1:16", "this model has experts 0-15"),
        ("projection:1:none", "the direction 'none' is not open here"),
        ("projection:9:way", "this model has layers 0-3"),
    ],
)
def test_a_colour_that_is_not_there(client: httpx.Client, four: object, colour: str, said: str) -> None:
    refused = client.get("/api/pages/four-kinds/events", params={"colour": colour})
    assert refused.status_code == 400
    assert said in refused.json()["error"]


def test_the_page_loads_nothing_from_elsewhere(client: httpx.Client) -> None:
    for name in ("/", "/page/playground.js", "/page/tokens.js", "/page/playground.css", "/page/report.css"):
        answer = client.get(name)
        assert answer.status_code == 200
        assert "://" not in answer.text, name
        assert "default-src 'none'; script-src 'self'" in answer.headers["content-security-policy"]
        assert "innerHTML" not in answer.text
    assert client.get("/page/../playground.py").status_code == 404
    assert client.get("/page/index.html").status_code == 404
    assert client.get("/api/pages/nothing-ran/events").json()["error"].startswith("nothing has run on this page yet")
    much = client.put("/api/pages/nothing-ran", content=b" " * (1 << 21), headers={"content-type": "application/json"})
    assert "shorten the prompt" in much.json()["error"]


def asked_by(guard: Guard, method: str = "GET", path: str = "/", **headers: str) -> httpx.Response:
    """What a guard answers to a browser that sends these headers."""

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://127.0.0.1:8765") as client:
            return await client.request(
                method,
                path,
                headers={name.replace("_", "-"): value.encode("latin-1") for name, value in headers.items()},
            )

    return asyncio.run(ask())


async def open_app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"in"})


JSON = {"content_type": "application/json"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8765"}, 200),
        ({"host": "[::1]:8765"}, 200),
        ({"host": "rebound.example:8765"}, 421),
        ({"host": "192.168.1.7:8765"}, 421),
        ({"host": ""}, 421),
        ({"host": "[broken"}, 421),
        ({"method": "POST", **JSON}, 200),
        ({"method": "POST", **JSON, "origin": "http://127.0.0.1:8765", "sec_fetch_site": "same-origin"}, 200),
        ({"method": "POST", **JSON, "origin": "http://evil.example"}, 403),
        ({"method": "POST", **JSON, "origin": "http://127.0.0.1:9999"}, 403),
        ({"method": "POST", **JSON, "origin": "null"}, 403),
        ({"method": "PUT", **JSON, "sec_fetch_site": "cross-site"}, 403),
        ({"method": "POST", "content_type": "text/plain"}, 403),
    ],
)
def test_only_the_pages_own_requests_are_heard(headers: dict[str, str], status: int) -> None:
    answer = asked_by(Guard(open_app, "127.0.0.1", 8765, None), **headers)
    assert answer.status_code == status
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_a_token_opens_a_page_that_others_can_reach() -> None:
    guard = Guard(open_app, "0.0.0.0", 8765, "s3cret")
    assert asked_by(guard, host="192.168.1.7:8765").status_code == 401
    assert asked_by(guard, host="rebound.example").status_code == 421
    assert asked_by(guard, path="/?token=guess").status_code == 401
    assert asked_by(guard, "POST", "/?token=s3cret", **JSON).status_code == 401
    opened = asked_by(guard, path="/?token=s3cret&page=mine-mine")
    assert (opened.status_code, opened.headers["location"]) == (303, "/?page=mine-mine")
    assert "HttpOnly; SameSite=Strict" in opened.headers["set-cookie"]
    assert asked_by(guard, cookie=opened.headers["set-cookie"].partition(";")[0]).text == "in"
    assert asked_by(guard, cookie="moe-steer-8765=guess").status_code == 401
    assert asked_by(guard, authorization="Bearer s3cret").text == "in"
    assert asked_by(guard, authorization="Bearer \u00e9").status_code == 401


def test_a_server_that_holds_the_model(tmp_path: Path, four: list[dict[str, Any]], folder: Path) -> None:
    model, tokenizer = load_model("lab")
    lab = ServedLab(model, tokenizer, {"mine": SteeringPlan.load(folder / "mine.json").dosed(2.0)})
    with served(lab) as endpoint, serving(endpoint=endpoint, out=str(tmp_path), max_new_tokens=60) as address:
        with httpx.Client(base_url=address, timeout=60) as client:
            assert client.get("/api/offer").json()["served"] == {"mine": 2}
            asked = settings(PLAIN, DOSED | {"dose": 1.0}, DOSED, colour="")
            plain, steered, unknown = ran(client, "by-server", asked)
            assert ids(steered) == ids(four[1]), "the same tokens as in this process"
            assert plain["state"] == "done"
            assert "unknown plan mine*2" in unknown["error"], "this stand-in knows no doses, and its word is shown"
            assert steered["counts"]["thought"] > 0
            for colour in ("entropy", "expert:1:1"):
                refused = client.get("/api/pages/by-server/events", params={"colour": colour}).json()["error"]
                assert "needs the model here, start without --endpoint" in refused
            for column, said in (
                (RULE, "a rule of prompt or decoding acts inside this process"),
                (YOURS, "no plan 'yours': it has mine"),
            ):
                assert said in client.post("/api/pages/by-server/run", json=settings(PLAIN, column)).json()["error"]
            saved = client.post("/api/pages/by-server/plan", json={"settings": asked, "column": 2}).json()
            words = shlex.split(saved["command"])
            assert words[:2] == ["curl", f"{endpoint}/completions"]
            assert '"vllm_xargs": {"moe_steer": "mine*2"}' in words[-1]


@pytest.mark.parametrize("comes", ["an answer", "a failure"])
def test_a_server_that_keeps_silent_is_stopped_at_once(comes: str) -> None:
    """What comes afterwards changes nothing: it was retried for half a minute, and ended as failed."""
    hear = threading.Event()

    def work() -> Any:
        hear.wait(10)
        if comes == "a failure":
            raise RuntimeError("answers 500")
        return object()

    run = running.Run(None, [running.Answer(Column(title="plain"))])  # type: ignore[arg-type]
    running._begin(run, [work])
    assert not run.ended
    run.stop()
    assert run.ended
    hear.set()
    run.wait()
    assert (run.answers[0].state, run.answers[0].error) == ("stopped", "")


def test_the_command_says_where_and_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = ["playground", "--dry-run", "--port", "0", "--num", "2", "--out", str(tmp_path / "out")]
    assert main(usual) == 0
    assert "dry run: the page could be served at http://127.0.0.1:" in (said := capsys.readouterr().out)
    assert "token" not in said.partition("dry run")[2]
    assert main([*usual, "--host", "0.0.0.0"]) == 0
    assert "/?token=" in capsys.readouterr().out
    monkeypatch.setenv("PAGE_TOKEN", "s3cret-in-the-environment")
    assert main([*usual, "lab-dense", "--token-variable", "PAGE_TOKEN"]) == 0
    assert "?token=$PAGE_TOKEN" in (said := capsys.readouterr().out)
    assert "s3cret" not in said
    assert not (tmp_path / "out").exists()
    wrong = Direction(vector_D=torch.ones(7), layer=1, method="test")
    wrong.save(tmp_path / "wrong.safetensors")
    for more, refused in (
        (["--direction", str(tmp_path / "wrong.safetensors")], "has width 7, the residual stream of lab 128"),
        (["--plan", str(tmp_path / "none.json")], "no plan file at"),
        (["--port", "70000"], "--port is 70000"),
        (["--token-variable", "NOT_SET"], "--token-variable names no environment variable that is set"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--concurrency", "8"], "a page asks for one answer a column"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--plan", "p.json"], "--plan is decided by the server"),
        (["--data-dir", "data"], "--data-dir data is for a task"),
        (["--served-name", "x"], "--served-name is for sampling over HTTP"),
    ):
        assert main([*usual, *more]) == 1
        assert refused in capsys.readouterr().err


def test_the_end_of_the_server_is_the_end_of_its_runs(tmp_path: Path) -> None:
    opened = Playground(port=0, num=6, out=str(tmp_path)).open()
    with listening(opened) as address:
        long = settings(PLAIN, YOURS, index=5, sampling={"max_new_tokens": 256})
        assert httpx.post(f"{address}api/pages/still-going/run", json=long).status_code == 202
    run = opened.boards.board("still-going").run
    assert run is not None
    assert [answer.state for answer in run.answers] == ["stopped"] * 2
    assert not any(thread.is_alive() for thread in run.threads)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match="give another --port"):
        Playground(port=taken.getsockname()[1], out=str(tmp_path)).open()


def test_generate_refuses_a_rule_that_names_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--rule", "preset:rice-r1-math", "--out", str(tmp_path / "out")]) == 1
    assert "names a plan: give that as --plan" in capsys.readouterr().err
    words = ["--endpoint", "http://127.0.0.1:9/v1", "--rule", "nowait", "--out", str(tmp_path / "out")]
    assert main(["generate", *words]) == 1
    assert "--rule is decided by the server" in capsys.readouterr().err


def test_texts_of_hostile_prompts_come_back_as_they_are(client: httpx.Client) -> None:
    hostile = "<img src=x onerror=alert(1)> \u202e </script> \x00 What is 2 + 2?"
    asked = settings(PLAIN, YOURS, prompt={"text": hostile, "target": ""}, sampling={"max_new_tokens": 3})
    assert all(texts(ran(client, "hostile", asked)))
    assert client.get("/api/pages/hostile").json()["settings"]["prompt"]["text"] == hostile
