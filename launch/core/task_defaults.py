"""How answers are sampled where the user says nothing: a data set's own protocol, or the usual one."""

from __future__ import annotations

from typing import Any, NamedTuple

from launch.core.option_checks import refuse_greedy_samples

_ANSWER_LIMITS = {"lab": 256, "lab-dense": 384}


class Usual(NamedTuple):
    """The defaults of a run. ``temperature`` 0: the most likely token at each step."""

    samples: int = 4
    temperature: float = 0.6
    top_p: float = 0.95
    new_tokens: int = 32768


def answer_limit(model: str) -> int:
    """The default longest answer in tokens, thought included: what the embedded models need, plenty for any other."""
    return _ANSWER_LIMITS.get(model, Usual().new_tokens)


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


def task_line(options: Any) -> str:
    """What a data set's answers are sampled by, and what of that is its own; "" for problems that are none."""
    from reasoning_evals.tasks import SPECS

    name = getattr(options, "problems", "")
    if name not in SPECS:
        return ""
    taken = Usual(
        options.num_samples, options.heat * (not options.takes_most_likely), options.nucleus, options.token_limit
    )
    own = usual_of(name, options.model)
    words = " ".join(SPECS[name].prompt.replace("{problem}", "").replace("{{}}", "{}").split()) or "the bare question"
    whose = "its own defaults" if taken == own else f"its own defaults: {_in_words(own)}"
    return f"task {name}: {_in_words(taken)} ({whose}); asked with: {words}"


def _in_words(usual: Usual) -> str:
    rule = f"temperature {usual.temperature:g}, top-p {usual.top_p:g}" if usual.temperature else "most likely tokens"
    number = f"{usual.samples} sample{'s' * (usual.samples != 1)}"
    return f"{number}, {rule}, at most {usual.new_tokens} new tokens"
