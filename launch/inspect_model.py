"""A steered model for Inspect: ``inspect eval TASK --model moe_steer/MODEL -M plan=plan.json``.

Any task of theirs then runs on the model under the plan. The metadata of every output says the plan's digest, and what it did in
the answers that were decoded together with this one: ``fired``, the audit's rows of those ``together``.
"""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from typing import Any, NamedTuple

import anyio.to_thread
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    Content,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from moe_steer import SteeringPlan, load_model, steer
from moe_steer.thinking import thinking_format
from reasoning_evals.engines import InProcessSampler, Request, Sample, SamplingConfig
from reasoning_evals.prompts import RenderedPrompt, render_messages

_GATHER = 0.05
"""Seconds in which requests that come at the same time gather."""
_NOT_FOLLOWED = (
    *(
        "stop_seqs",
        "best_of",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
    ),
    *("response_schema", "reasoning_tokens", "reasoning_effort", "effort"),
)


class _Asked(NamedTuple):
    request: Request
    config: SamplingConfig
    answer: Future[tuple[Sample, dict[str, Any]]]


@modelapi(name="moe_steer")
class SteeredModel(ModelAPI):  # type: ignore[misc]
    """A model in this process, under a plan or as it is. Model arguments: ``plan``, a plan file; ``backend``, ``dtype``, ``revision``
    and ``trust_remote_code`` as of ``load_model``; ``batch_size``, answers decoded together."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        plan: str | None = None,
        batch_size: int = 32,
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        if unknown := sorted(set(model_args) - {"backend", "dtype", "revision", "trust_remote_code"}):
            raise ValueError(
                f"moe_steer has no model argument {unknown[0]!r}: give plan, batch_size, backend, dtype, revision, trust_remote_code"
            )
        self._plan = SteeringPlan.load(plan) if plan is not None else SteeringPlan()
        self._model, self._tokenizer = load_model(model_name, model_args.pop("backend", "auto"), **model_args)
        self._plan.check(self._model)
        self._sampler = InProcessSampler(self._model, self._tokenizer)
        self._rows = batch_size
        self._waiting: queue.Queue[_Asked | None] = queue.Queue()
        threading.Thread(target=self._work, name="moe-steer", daemon=True).start()

    def max_connections(self) -> int:
        """As many as are decoded together."""
        return self._rows

    def close(self) -> None:
        """End the thread that decodes."""
        self._waiting.put(None)

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """One answer; thought and answer apart. ValueError for what would not be followed."""
        prompt = render_messages(self._tokenizer, [{"role": one.role, "content": one.text} for one in input])
        asked = _Asked(
            Request(prompt.token_ids, config.seed or 0, None, prompt.text),
            self._sampling(config, tools, prompt),
            Future(),
        )
        self._waiting.put(asked)
        sample, steering = await anyio.to_thread.run_sync(asked.answer.result)
        parts = thinking_format(self._tokenizer).split(sample.text, prompt.text)
        content: list[Content] = [ContentText(text=parts.answer)]
        if parts.thought:
            content.insert(0, ContentReasoning(reasoning=parts.thought))
        reason = "stop" if sample.finish_reason == "stop" else "max_tokens"
        message = ChatMessageAssistant(content=content, model=self.model_name, source="generate")
        spent, made = len(prompt.token_ids), len(sample.token_ids)
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason=reason)],
            usage=ModelUsage(input_tokens=spent, output_tokens=made, total_tokens=spent + made),
            metadata={"steering": steering},
        )

    def _sampling(self, config: GenerateConfig, tools: list[ToolInfo], prompt: RenderedPrompt) -> SamplingConfig:
        given = [name for name in _NOT_FOLLOWED if getattr(config, name, None) not in (None, False)]
        if tools or given or config.num_choices not in (None, 1):
            what = "tools" if tools else given[0] if given else "num_choices"
            raise ValueError(f"moe_steer does not follow {what}: leave it out")
        usual = SamplingConfig()
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        room = (context or 1 << 20) - len(prompt.token_ids)
        return SamplingConfig(
            temperature=config.temperature or usual.temperature,
            top_p=usual.top_p if config.top_p is None else config.top_p,
            top_k=config.top_k or 0,
            max_new_tokens=max(1, min(config.max_tokens or usual.max_new_tokens, room)),
            greedy=config.temperature == 0,
            batch_size=self._rows,
        )

    def _work(self) -> None:
        """Decode what is asked for, requests of one rule that came together in one batch."""
        while (first := self._waiting.get()) is not None:
            time.sleep(_GATHER)
            asked = [first]
            while len(asked) < self._rows and not self._waiting.empty():
                if (one := self._waiting.get()) is None:
                    self._waiting.put(None)
                    break
                asked.append(one)
            for config in dict.fromkeys(one.config for one in asked):
                self._decode([one for one in asked if one.config == config], config)

    def _decode(self, asked: list[_Asked], config: SamplingConfig) -> None:
        try:
            requests = [Request(a.request.prompt_ids, a.request.seed, i, a.request.prompt) for i, a in enumerate(asked)]
            with steer(self._model, self._plan, tokenizer=self._tokenizer, quiet=True) as audit:
                samples = {sample.key: sample for sample in self._sampler.sample(requests, config)}
            plan = None if self._plan.is_neutral else self._plan.digest()
            steering = {"plan": plan, "together": len(asked), "fired": audit.to_rows()}
            for number, one in enumerate(asked):
                one.answer.set_result((samples[number], steering))
        except Exception as error:
            for one in asked:
                one.answer.set_exception(error)
