"""``moe-steer playground``: load a model or reach a server, and open the page."""

from __future__ import annotations

import dataclasses
import os
import secrets
import socket
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import tyro

from launch.core.option_checks import HERE, TASK, check_counts, check_folder, named_files
from launch.core.options import HeldModel
from launch.core.prompt_options import PromptOptions, TaskDrawing
from launch.core.served.server_options import JobServerOptions
from moe_steer.lab import OWN_PROBLEMS, is_made_up

if TYPE_CHECKING:
    from launch.playground.asked import Offer
    from launch.playground.boards import Boards
    from launch.playground.running import Here, There

PATIENCE = 10
"""Seconds that the end waits for a token that is being made."""


class Opened(NamedTuple):
    """A page that can be served. ``address``: with the token, where one was made here."""

    app: Any
    listening: socket.socket
    address: str
    boards: Boards


@dataclass(frozen=True, kw_only=True)
class Playground(TaskDrawing, JobServerOptions, PromptOptions, HeldModel):
    """See a steered model think, on a page in the browser: columns of one seed side by side, every token coloured by what it does inside."""

    model: Annotated[str, tyro.conf.Positional] = "lab"
    """Model folder, GGUF file, hub id, or 'lab', 'lab-dense' or 'lab-search' for an embedded model; with --endpoint the model whose tokenizer renders
    the prompts."""
    plan: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, HERE] = ()
    """A plan file to choose from, by the file's name or as NAME=FILE; a folder stands for all plans in it. May be given several times."""
    direction: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, HERE] = ()
    """A direction file to steer with and to colour by, by the file's name or as NAME=FILE; may be given several times."""
    problems: str = OWN_PROBLEMS
    """A JSONL file of problems, or the name of a task, to choose prompts from; own: those that the embedded model was trained on, the
    lab's for any other model."""
    data_dir: Annotated[str | None, TASK] = None
    """Folder or file with the task's data, instead of the hub."""
    wording: Annotated[str | None, TASK] = None
    """How each question is put, with {problem} in it, in place of the task's own wording; or a file with it."""
    num: int | None = None
    """How many problems; default all, 100 of the lab."""
    seed: int = 0
    """Decides the lab's problems; the seed of answers is chosen on the page."""
    max_new_tokens: int | None = None
    """Longest answer that the page may ask for, in tokens, thought included; default 256 for lab, 384 for lab-dense, 440 for lab-search, else the task's own or
    32768, or what the model's context has room for."""
    out: str = "runs/playground"
    """Folder of settings, plans and answers that are saved on the page."""
    host: str = "127.0.0.1"
    """Address to listen at. For any but this machine's own, the page asks for a token."""
    port: int = 8765
    """Port to listen at; 0 takes a free one."""
    token_variable: str | None = None
    """Name of the environment variable that holds the page's token; default none on this machine's own address, elsewhere one is made and
    printed."""
    dry_run: bool = False
    """Everything but serving: load, check, open the port, and end."""

    repeatable: ClassVar = frozenset({"plan", "direction", "template_arg"})
    limited_by: ClassVar = ("max_new_tokens",)
    greedy, temperature, top_p, samples = False, None, None, None  # chosen on the page, which begins with what is usual
    num_samples: ClassVar = 1
    rows: ClassVar = 4
    """Columns that are decoded at once."""
    batch_size: ClassVar = 4

    def run(self) -> int:
        """Serve until Ctrl-C."""
        opened = self.open()
        with opened.listening:
            if self.dry_run:
                print(f"dry run: the page could be served at {opened.address}; nothing is served now")
                return 0
            print(f"playground of {self.model}: open {opened.address} in a browser; Ctrl-C ends it", flush=True)
            with suppress(KeyboardInterrupt):
                serve(opened)
        return 0

    def open(self) -> Opened:
        """Load, and listen; nothing is served yet. ValueError, in one line, for options that would not be followed."""
        from launch.core.ranks import refuse_several_ranks
        from launch.playground.boards import Boards, Repeater
        from launch.playground.page_app import Guard, application, is_local

        refuse_several_ranks("moe-steer playground", "moe-steer serve, then moe-steer playground --endpoint")
        check_counts(self, ("num", "max_new_tokens", "concurrency"))
        check_folder(self.out)
        if self.concurrency is not None:
            raise ValueError("--concurrency is for jobs: a page asks for one answer a column, leave it out")
        token = self._token(is_local(self.host))
        listening = _listen(self.host, self.port)
        try:
            offer, bench, line = self._there() if self.endpoint else self._here()
            boards = Boards(Path(self.out), offer, bench)
            port = listening.getsockname()[1]
            usual = {
                "temperature": self.heat,
                "top_p": self.nucleus,
                "greedy": self.takes_most_likely,
                "max_new_tokens": offer.token_limit,
            }
            app = application(
                boards, Repeater(options=self, bench=bench), {"model": self.model, "line": line, "sampling": usual}
            )
        except BaseException:
            listening.close()
            raise
        shown = f"[{self.host}]" if ":" in self.host else self.host
        secret = f"?token={'$' + self.token_variable if self.token_variable else token}" if token else ""
        return Opened(Guard(app, self.host, port, token), listening, f"http://{shown}:{port}/{secret}", boards)

    def readers(self) -> Set[str]:
        return {*super().readers(), "prompts", *(() if is_made_up(self.problems) else ("task",))}

    def _token(self, local: bool) -> str | None:
        if (name := self.token_variable) is None:
            return None if local else secrets.token_urlsafe(24)
        if not (token := os.environ.get(name, "").strip()):
            raise ValueError("--token-variable names no environment variable that is set: put the page's token there")
        return token

    def _here(self) -> tuple[Offer, Here, str]:
        """The model in this process, and what the page may choose from."""
        from launch.core.beforehand import USUAL_PROMPT, look, settle
        from launch.core.ranks import Ranks
        from launch.core.session import load_room
        from launch.playground.asked import Offer
        from launch.playground.running import Here
        from launch.serve import named_plans
        from moe_steer import SteeringPlan
        from moe_steer.direction import VectorFile
        from moe_steer.layers import model_shape

        plans = {name: SteeringPlan.load(file) for name, file in named_plans(self.plan).items()}
        directions = {
            name: VectorFile.read(Path(file)) for name, file in named_files(self.direction, "direction").items()
        }
        problems = self.load_problems()
        known = look(self)
        longest = known.longest_prompt([problem.prompt for problem in problems])
        whole = dataclasses.replace(self, dry_run=False)  # a dry run of this page loads: it ends before it serves
        asked, room = settle(whole, known, longest if self.is_lab else max(longest, USUAL_PROMPT), Ranks())
        model, tokenizer = load_room(asked, room)
        shape = model_shape(model)
        for plan in plans.values():
            plan.check(model)
        for name, found in directions.items():
            if len(found.vector_D) != shape.hidden_size:
                raise ValueError(
                    f"the direction {name} has width {len(found.vector_D)}, the residual stream of {self.model} {shape.hidden_size}: make one on this model"
                )
        layers = f"{shape.num_layers} layers" + (
            f", {shape.num_experts} experts with {shape.top_k} a token" if shape.moe_layers else ", dense"
        )
        offer = Offer(
            problems=problems,
            task=self.task,
            token_limit=asked.token_limit,
            shape=shape,
            plans=plans,
            directions=directions,
        )
        bench = Here(model=model, tokenizer=tokenizer, shape=shape, directions=directions, context=known.context)
        return offer, bench, f"{shape.model_type}, {layers}, in this process"

    def _there(self) -> tuple[Offer, There, str]:
        """The server that holds the model."""
        from launch.core.prompt_options import ask_prompts
        from launch.core.served.connection import Connection
        from launch.playground.asked import Offer
        from launch.playground.running import There
        from moe_steer.backends import read_tokenizer

        connection = Connection.to(self)
        tokenizer = read_tokenizer(self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)
        ask_prompts(tokenizer, self)
        offer = Offer(
            problems=self.load_problems(), task=self.task, token_limit=self.token_limit, served=connection.served
        )
        return offer, There(connection=connection, tokenizer=tokenizer), connection.line


def serve(opened: Opened, started: Callable[[Any], None] = lambda _: None) -> None:
    """Answer browsers until a signal ends it. ``started`` is told the server, whose ``should_exit`` ends it, too."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            opened.boards.end()  # streams that go on would hold the server up
            super().handle_exit(sig, frame)

    quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
    server = Server(uvicorn.Config(opened.app, lifespan="off", timeout_graceful_shutdown=PATIENCE, **quiet))
    started(server)
    try:
        server.run(sockets=[opened.listening])
    finally:
        opened.boards.end()
        opened.boards.wait(PATIENCE)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(
            f"nothing can listen at {host} port {port} ({error.strerror or error}): give another --port, 0 for a free one, or another --host"
        ) from None
    except OverflowError:
        raise ValueError(f"--port is {port}: give a number from 0 to 65535") from None
