"""``moe-steer generate``: problems through a model, steered or not -> graded generations."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from launch.core.option_checks import DRAWING, ENDPOINT, HERE, check_counts
from launch.core.options import HeldModel, Room, config_of
from launch.core.prompt_options import PromptOptions, TaskDrawing, ask_prompts, task_line, template_arguments
from launch.core.served.server_options import ServerOptions
from moe_steer.lab import OWN_PROBLEMS
from reasoning_evals import engines, runs

if TYPE_CHECKING:
    from moe_steer import SteeringPlan
    from reasoning_evals import Problem

_MOST_SAMPLES = 4
"""Samples of which is said what gates did."""


@dataclass(frozen=True, kw_only=True)
class Generate(TaskDrawing, ServerOptions, PromptOptions, HeldModel):
    """Sample answers to problems, under a plan or without one, and grade them; stopped and started again, it continues."""

    out: str
    """Folder of the run: generations.jsonl, grades.jsonl, run.json."""
    model: str = "lab"
    """Model folder, hub id, 'lab', 'lab-dense' or 'lab-search' for an embedded model; with --endpoint the name it is served under."""
    chat_endpoint: Annotated[bool, ENDPOINT] = False
    """Ask the endpoint for chat completions: messages, which it renders itself; for any hosted model, without a tokenizer."""
    tokenizer: Annotated[str | None, ENDPOINT] = None
    """Model whose tokenizer renders the prompts for --endpoint; default --model, and none with --chat-endpoint."""
    server: Annotated[str | None, ENDPOINT] = None
    """What serves at the endpoint, in words (engine, version, precision): kept in run.json, and the same on resume."""
    plain_endpoint: Annotated[bool, ENDPOINT] = False
    """Send the endpoint no field beyond OpenAI's own, for servers that refuse others."""
    prompt_as_ids: Annotated[bool, ENDPOINT] = False
    """Send the endpoint token ids instead of text, for servers that add a BOS token to any text (llama.cpp)."""
    problems: str = OWN_PROBLEMS
    """A JSONL file of problems, or the name of a task; own: those that the embedded model was trained on, the lab's for any other model."""
    data_dir: str | None = None
    """Folder or file with the task's data, instead of the hub."""
    wording: str | None = None
    """How each question is put, with {problem} in it, in place of the task's own wording, which the start prints; or a file with it."""
    split: str | None = None
    """Split of the task, where it has several; default its test split."""
    num: int | None = None
    """How many problems; default all, 100 of the lab."""
    plan: str | None = None
    """Steering plan; left out, the model runs as it is."""
    rule: Annotated[str | None, HERE] = None
    """A rule of prompt or decoding, as an arm of moe-steer evaluate: prompt-before, prompt-after, no-thinking, thinking-off, effort:WORD,
    tip, tip-close, nowait, budget:N, continue:N, or several joined by +."""
    arm_name: str | None = None
    """Name of the arm; default the rule, 'steered' with a plan, else 'baseline'."""
    samples: int | None = None
    """Samples a problem; default the task's own number, 1 where it has none."""
    greedy: bool = False
    """The most likely token at each step, instead of sampling."""
    temperature: Annotated[float | None, DRAWING] = None
    """Divides the logits; default the task's own, 0.6 where it has none."""
    top_p: Annotated[float | None, DRAWING] = None
    """Smallest set of tokens with at least this probability; default the task's own, 0.95 where it has none."""
    max_new_tokens: int | None = None
    """Longest answer in tokens, thought included; default 256 for lab, 384 for lab-dense, 440 for lab-search, else the task's own or 32768, or what
    the model's context has room for."""
    batch_size: int | None = None
    """Samples decoded together, default as many as fit, 64 at most; with --endpoint those that are resumed together, default 32."""
    seed: int = 0
    """Decides the lab's problems and all samples; the same in two arms that are to be compared."""
    strict: bool = False
    """Fail when the plan changed nothing in the whole run."""

    renamed: ClassVar = {"--arm": "--arm-name"}
    limited_by: ClassVar = ("max_new_tokens",)
    samples_without_task: ClassVar = 1

    def run(self) -> int:
        """Sample, grade, and say how it went."""
        from launch.core.ranks import refuse_several_ranks
        from moe_steer import SteeringPlan
        from reasoning_evals import run_arms
        from reasoning_evals.comparing import unanswered_notes

        refuse_several_ranks("moe-steer generate", "deepspeed launch/evaluate.py")
        self._check_options()
        plan = SteeringPlan.load(self.plan) if self.plan else None
        problems = self.load_problems(self.split)
        if self.endpoint:
            from launch.core.beforehand import asked_together

            if line := task_line(self):
                print(line)
            asked, arm = asked_together(self), self._endpoint_arm(plan)
        else:
            asked, arm = self._settled(problems, plan)
        config = engines.SamplingConfig(
            temperature=asked.heat,
            top_p=asked.nucleus,
            max_new_tokens=asked.token_limit,
            greedy=asked.takes_most_likely,
            batch_size=asked.rows,
        )
        self._keep_plan(plan, begun=Path(self.out, runs.RUN_FILE).exists())
        summary = run_arms([arm], problems, self.out, self.num_samples, config, self.seed, task=self.task)
        self._keep_plan(plan)
        if runs.OPTIONS not in runs.read_run(Path(self.out)):  # of a run that goes on, those of its first start to end
            runs.add_to_run(Path(self.out), options=config_of(self))
        rows = runs.grade_run(self.out, problems)
        speed = f", {summary.num_new_tokens / summary.seconds:.0f} tokens/s" if summary.num_new else ""
        print(f"{len(rows)} samples of {len(problems)} problems, {summary.num_new} of them new{speed}")
        correct = sum(row.correct for row in rows)
        cut = sum(row.outcome in ("truncated", "cut") for row in rows)
        print(f"{arm.name}: {correct} correct ({100 * correct / len(rows):.1f}%), {cut} cut by the token limit")
        for note in unanswered_notes(rows):
            print(note)
        if plan is not None:
            self._report_firing(plan)
        if self.endpoint:
            print(engines.http_line(runs.read_audit(self.out).rows.get(arm.name, [])))
        print(f"wrote {self.out}; next: moe-steer compare --baseline RUN --arm-folder RUN --out comparison.json")
        return 0

    def _keep_plan(self, plan: SteeringPlan | None, *, begun: bool = False) -> None:
        """Leave the plan in the folder, for moe-steer inspect, which steers the answers again. ``begun``: the folder has a run, which
        may be of other settings, so nothing is written. ValueError where another plan lies there."""
        from moe_steer import SteeringPlan

        kept = Path(self.out, "plan.json")
        if plan is None or Path(self.out).is_file():  # a file is no folder for a run: run_arms says so
            return
        if kept.exists():
            if SteeringPlan.load(kept).digest() != plan.digest():
                raise ValueError(f"{kept} is another plan than {self.plan}, and is not replaced: give another --out")
        elif not begun:
            kept.parent.mkdir(parents=True, exist_ok=True)
            plan.with_files(lambda path: os.path.relpath(path, self.out), self.out).save(kept)

    def _check_options(self) -> None:
        """ValueError for options that would not be followed."""

        check_counts(self, ("num", "samples", "max_new_tokens", "batch_size", "concurrency"))
        self.check_samples()
        engines.SamplingConfig(temperature=self.heat, top_p=self.nucleus)  # refuses what no token can be drawn by
        if self.plan and self.plain_endpoint:
            raise ValueError(
                "--plan is named in a field beyond OpenAI's own, and --plain-endpoint sends none: leave one out"
            )
        if self.chat_endpoint and self.prompt_as_ids:
            raise ValueError("--prompt-as-ids is for completions, and a chat endpoint takes messages: leave it out")
        if self.rule is not None:
            from launch.core.levers.arm_words import check_rule

            check_rule(self.rule, "--plan")

    def readers(self) -> Set[str]:
        return {"endpoint" if self.endpoint else "model", "prompts", *(() if self.takes_most_likely else ("drawing",))}

    @property
    def rows(self) -> int:
        """Samples decoded together, or in a server's chunk."""
        return self.batch_size or 64

    @property
    def folder(self) -> str:
        """Where the run is written."""
        return self.out

    def _settled(self, problems: Sequence[Problem], plan: SteeringPlan | None) -> tuple[Generate, runs.Arm]:
        """These options with what they leave to model and machine, and the model as an arm."""
        from launch.core.beforehand import look, settle
        from launch.core.ranks import Ranks
        from launch.core.wiring import check_fits
        from reasoning_evals.prompts import FINISHED, THINKING_PROMPT

        known = look(self)
        if plan is not None:
            check_fits(plan, known.shape, str(self.plan))
        added = THINKING_PROMPT + FINISHED if self.rule else ""  # a rule may put either before or after a question
        asked, room = settle(self, known, known.longest_prompt([p.prompt for p in problems], added), Ranks())
        return asked, asked._model_arm(plan, room)

    def _model_arm(self, plan: SteeringPlan | None, room: Room) -> runs.Arm:
        from launch.core.levers.arm_building import build_arm
        from launch.core.options import BASELINE
        from launch.core.session import load_room, take_room

        model, tokenizer = load_room(self, room)
        arm = build_arm(self.rule or BASELINE, model, tokenizer, plan).arm
        assert isinstance(arm.sampler, engines.InProcessSampler)
        take_room(arm.sampler, room, sets_aside=True)
        usual = "steered" if plan and not self.rule else arm.name
        return dataclasses.replace(arm, name=self.arm_name or usual)

    def _endpoint_arm(self, plan: SteeringPlan | None) -> runs.Arm:
        from launch.core.served.connection import Connection, plans_of_any

        server, name = self.server_of(), self.arm_name or ("steered" if plan else "baseline")
        served = server.served() if plan else plans_of_any(server)
        connection = Connection(server=server, name=self.model, known=served)
        connection.require({name: plan}, Path(self.out), self.tokenizer or self.model)
        said = {"said": self.server} if self.server else {}
        return connection.arm(
            name,
            self._endpoint_tokenizer(),
            plan,
            extensions=not self.plain_endpoint,
            prompt_as_ids=self.prompt_as_ids,
            engine=said | connection.engine or None,
            chat=chat_of(self) if self.chat_endpoint else None,
        )

    def _endpoint_tokenizer(self) -> Any:
        from moe_steer.backends import read_tokenizer

        if self.chat_endpoint and self.tokenizer is None:
            return None
        name = self.tokenizer or self.model
        try:
            tokenizer = read_tokenizer(name, revision=self.revision, trust_remote_code=self.trust_remote_code)
        except ValueError as error:
            more = "" if self.tokenizer else ": give the model's folder or hub id as --tokenizer, or --chat-endpoint"
            raise ValueError(f"{error}{more}") from error
        if not self.chat_endpoint:
            ask_prompts(tokenizer, self)
        return tokenizer

    def _report_firing(self, plan: SteeringPlan) -> None:
        from launch.core.findings import nothing_fired
        from moe_steer.entries.audit_rows import row_lines

        told = runs.read_audit(self.out)
        rows = [row for arm in told.rows.values() for row in arm if row["kind"] not in ("endpoint", "retry", "exit")]
        for line in row_lines(rows):
            print(line)
        for (_, problem_id, sample_idx), acts in list(told.gates.items())[:_MOST_SAMPLES]:
            print(f"{problem_id} sample {sample_idx}: {runs.gates_text(acts)}")
        if len(told.gates) > _MOST_SAMPLES:
            print(f"the same of {len(told.gates) - _MOST_SAMPLES} more samples: {self.out}/audit.jsonl")
        problem = nothing_fired(plan, rows)
        if plan.is_neutral:
            problem = (
                "the plan changes nothing, every gain in it is 1 and every strength 0: the arm equals the baseline"
            )
        if problem and self.strict:
            raise RuntimeError(problem)
        if problem:
            print(f"WARNING: {problem}", file=sys.stderr)


def chat_of(options: PromptOptions) -> engines.Chat:
    """How these options ask a chat endpoint. ValueError in one line for what such a request cannot say."""
    from moe_steer.thinking import FORMATS, named

    if options.no_thinking or options.chat_template is not None:
        name = "--no-thinking" if options.no_thinking else "--chat-template"
        raise ValueError(
            f"{name} is for prompts that are rendered here, and a chat endpoint renders its own: say it to its template, "
            "as --template-arg enable_thinking=false or --effort none"
        )
    return engines.Chat(
        fmt=FORMATS["think"] if options.thinking is None else named(options.thinking),
        system=options.system,
        effort=options.effort,
        template_arguments=template_arguments(options.template_arg),
    )
