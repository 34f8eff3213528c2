"""How a model is asked: options that decide the prompts, and what answers are sampled by where the user says nothing (a data
set's own protocol, or the usual one)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import tyro

from launch.core.option_checks import PROMPTS, refuse_greedy_samples
from moe_steer.json_files import not_utf8, quoted
from moe_steer.lab import EMBEDDED, is_made_up, problems_of

if TYPE_CHECKING:
    from reasoning_evals import Problem


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How prompts are rendered; without any, as the chat template does it, with thinking on where the model can think."""

    thinking: str | None = None
    """How the model writes its thoughts, where trying its template does not tell: think, harmony, none, ..., or its two tags as OPEN...CLOSE."""
    template_arg: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, PROMPTS] = ()
    """An argument for the chat template, as NAME=VALUE; may be given several times."""
    effort: Annotated[str | None, PROMPTS] = None
    """How hard to think, in the template's own words (low, medium, high)."""
    no_thinking: Annotated[bool, PROMPTS, tyro.conf.FlagCreatePairsOff] = False
    """Switch thinking off, where the template can."""
    chat_template: str | None = None
    """File of a chat template, in place of the tokenizer's own."""
    system: Annotated[str | None, PROMPTS] = None
    """A system message before every question."""

    repeatable: ClassVar = frozenset({"template_arg"})
    """Lists that are given one value at a time."""


def ask_prompts(tokenizer: Any, options: PromptOptions, *, quiet: bool = False) -> None:
    """Render this tokenizer's prompts as asked from now on, and say how the model thinks. ValueError in one line for
    what its template would not follow."""
    from moe_steer.thinking import PromptSettings, thinking_format, use_prompt_settings
    from reasoning_evals.prompts import follows_effort

    asked = PromptSettings(
        thinking=options.thinking,
        arguments=template_arguments(options.template_arg),
        effort=options.effort,
        no_thinking=options.no_thinking,
        chat_template=None
        if options.chat_template is None
        else read_words(
            options.chat_template, f"--chat-template {options.chat_template!r}", "give a file with a Jinja template"
        ),
        system=options.system,
    )
    use_prompt_settings(tokenizer, asked)
    if options.effort is not None and not follows_effort(tokenizer, options.effort) and not quiet:
        print(  # it may be the template's default: nobody can tell
            f"NOTE: the chat template takes no notice of the effort {options.effort!r}: the prompt is the one without it",
            file=sys.stderr,
        )
    fmt = thinking_format(tokenizer)
    if not quiet and (fmt.thinks or asked != PromptSettings()):
        print(fmt.describe(), flush=True)


def template_arguments(items: Iterable[str]) -> dict[str, Any]:
    """``NAME=VALUE``: a value that is JSON is read as JSON (true, 3), any other is a text."""
    from moe_steer.json_files import NotJSON, parse_json, quoted, short

    found: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--template-arg {quoted(item)}: write NAME=VALUE, for example enable_thinking=false")
        if name in found:
            raise ValueError(f"--template-arg {name} is given twice: give it once")
        try:
            found[name] = parse_json(value, f"--template-arg {short(item)}", "write another value")
        except NotJSON:
            found[name] = value
    return found


def read_words(path: str, named: str, way: str) -> str:
    """A file of text, without its byte order mark. ValueError for one that cannot be read or holds none: ``named`` says which file it is,
    ``way`` what to do."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{named} cannot be read ({error.strerror or error}): {way}") from error
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(named, error)) from error
    if not text.strip() or "\0" in text:
        problem = "characters 0, as UTF-16 has: save it in UTF-8" if text.strip() else f"no words: {way}"
        raise ValueError(f"{named} holds {problem}")
    return text


class Usual(NamedTuple):
    """The defaults of a run. ``temperature`` 0: the most likely token at each step."""

    samples: int = 4
    temperature: float = 0.6
    top_p: float = 0.95
    new_tokens: int = 32768


def answer_limit(model: str) -> int:
    """The default longest answer in tokens, thought included: what the embedded models need, plenty for any other."""
    return EMBEDDED[model].longest_answer if model in EMBEDDED else Usual().new_tokens


def usual_of(problems: str, model: str, samples: int = Usual().samples) -> Usual:
    """The defaults of a data set; of a file or the lab the usual ones, ``samples`` a problem. An embedded model never writes
    longer than it can."""
    from reasoning_evals.tasks import SPECS

    if problems not in SPECS:
        return Usual(samples=samples, new_tokens=answer_limit(model))
    spec = SPECS[problems]
    rule = spec.sampling
    return Usual(spec.k, rule.temperature, rule.top_p, min(rule.max_new_tokens, answer_limit(model)))


class Drawing:
    """What tokens are drawn by: the options where they are given, else what is ``usual``."""

    greedy: bool
    temperature: float | None
    top_p: float | None
    samples: int | None

    @property
    def usual(self) -> Usual:
        """How answers are sampled where the user says nothing."""
        return Usual()

    @property
    def usual_samples(self) -> int:
        """Samples a problem (and arm) where the user asks for no number."""
        return self.usual.samples

    @property
    def num_samples(self) -> int:
        """Samples a problem (and arm)."""
        return 1 if self.takes_most_likely else self.samples or self.usual_samples

    def check_samples(self) -> None:
        """ValueError for several answers that would be the same."""
        if self.greedy:
            refuse_greedy_samples(self.samples)
        elif self.takes_most_likely and self.samples not in (None, 1):
            raise ValueError(
                "this task takes the most likely token at each step, which gives the same answer every time: leave --samples "
                f"{self.samples} out, or give --temperature"
            )

    @property
    def takes_most_likely(self) -> bool:
        """Whether nothing is drawn: with --greedy, and for tasks that say so, where the user names no temperature."""
        return self.greedy or (self.temperature is None and not self.usual.temperature)

    @property
    def heat(self) -> float:
        """What divides the logits, if anything is drawn."""
        return self.temperature if self.temperature is not None else self.usual.temperature or Usual().temperature

    @property
    def nucleus(self) -> float:
        """The probability of the tokens that are drawn from."""
        return self.usual.top_p if self.top_p is None else self.top_p

    @property
    def drawing(self) -> dict[str, Any]:
        """What tokens are drawn by, for the config: it says the numbers that were taken."""
        return {"temperature": self.heat, "top_p": self.nucleus} if self.greedy or not self.takes_most_likely else {}


class TaskDrawing(Drawing):
    """The same for the answers to a data set, a file of problems, or problems that are made up."""

    problems: str
    model: str
    max_new_tokens: int | None
    data_dir: str | None
    wording: str | None
    num: int | None
    seed: int
    samples_without_task: ClassVar[int] = Usual().samples
    """Samples of problems that do not say how many they want."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "problems", problems_of(self.problems, self.model))

    @property
    def usual(self) -> Usual:
        """The task's own, where it has one."""
        return usual_of(self.problems, self.model, self.samples_without_task)

    def load_problems(self, split: str | None = None) -> list[Problem]:
        """``num`` of them, of the lab's test split 100 where no number or split is given. For commands; a job has its own numbers."""
        from reasoning_evals import load_task

        lab = is_made_up(self.problems)
        return load_task(
            self.problems,
            data_dir=self.data_dir,
            split=split or ("test" if lab else None),
            num=self.num or (100 if lab else None),
            seed=self.seed,
            **own_wording(self.problems, self.wording),
        )

    @property
    def task(self) -> str:
        """The name of the task in the samples' keys and seeds."""
        return Path(self.problems).stem

    @property
    def token_limit(self) -> int:
        """Longest answer in tokens."""
        return self.max_new_tokens or self.usual.new_tokens


def text_or_file(given: str, option: str) -> str:
    """What an option says: its words, or those of the file that it names. ValueError for a file without any, or of no text."""
    if not os.path.isfile(given):  # unlike Path.is_file, False for a text that is too long for a name
        return given.strip()
    return read_words(given, f"the file {quoted(given)} of {option}", "give words, or a file with some").strip()


def own_wording(problems: str, wording: str | None) -> dict[str, Any]:
    """For ``load_task``: how a question is put, where the user says it. ValueError for a wording that leaves out the problem (or
    the unit that the task's own wording asks for), and for problems that are made up with their questions.

    Braces in the user's text are its own: \\boxed{} is written as it is.
    """
    from reasoning_evals.tasks import SPECS, is_file_name

    if wording is None:
        return {}
    wording = text_or_file(wording, "--wording")
    if problems not in SPECS and not is_file_name(problems):
        raise ValueError(
            f"--wording is for a data set or a file of problems, and {problems} makes its questions up: leave it out"
        )
    places = ["{problem}", *(["{unit}"] if problems in SPECS and "{unit}" in SPECS[problems].prompt else [])]
    for place in places:
        if place not in wording:
            raise ValueError(f"--wording {quoted(wording)} has no {place}: write {place} where it belongs")
    template = wording.replace("{", "{{").replace("}", "}}")
    for place in places:
        template = template.replace(f"{{{place}}}", place)
    return {"prompt": template}


def task_line(options: Any) -> str:
    """What a data set's answers are sampled by, and what of that is its own; "" for problems that are none."""
    from reasoning_evals.tasks import SPECS

    name, own_words = getattr(options, "problems", None), getattr(options, "wording", None)
    if name is None:  # a job of several tasks
        return ""
    if name not in SPECS:
        return "" if own_words is None else f"asked with: {' '.join(text_or_file(own_words, '--wording').split())}"
    taken = Usual(
        options.num_samples, options.heat * (not options.takes_most_likely), options.nucleus, options.token_limit
    )
    own = usual_of(name, options.model)
    whose = "its own defaults" if taken == own else f"its own defaults: {_in_words(own)}"
    return f"task {name}: {_in_words(taken)} ({whose}); asked with: {asked_with(name, **own_wording(name, own_words))}"


def asked_with(task: str, prompt: str | None = None) -> str:
    """The words around a task's questions, in one line. ``prompt``: a template in place of the task's own, as ``load_task`` takes it."""
    from reasoning_evals.tasks import SPECS

    asked = (SPECS[task].prompt if prompt is None else prompt).replace("{problem}", "")
    return " ".join(asked.replace("{{", "{").replace("}}", "}").split()) or "the bare question"


def _in_words(usual: Usual) -> str:
    rule = f"temperature {usual.temperature:g}, top-p {usual.top_p:g}" if usual.temperature else "most likely tokens"
    number = f"{usual.samples} sample{'s' * (usual.samples != 1)}"
    return f"{number}, {rule}, at most {usual.new_tokens} new tokens"
