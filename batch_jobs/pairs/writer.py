"""Models that write contrastive texts, at an OpenAI-compatible endpoint or in an engine in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from pydantic import JsonValue

from batch_jobs.config.study import EngineOptions, StudyError
from batch_jobs.endpoint.chat import NO_UTF8_FORM, ChatClient, Endpoint, RequestRefused
from batch_jobs.endpoint.parallel_calls import parallel_calls
from batch_jobs.engine.start_engine import Engine, model_location, set_engine_environment
from batch_jobs.files.documents import has_utf8_form
from batch_jobs.texts.prompts import Prompt, chat_prompt
from batch_jobs.texts.thought import OPEN_THOUGHT, split_thought

PROMPT_TOKENS = 1024
"""Tokens of the local engine's context reserved for a system prompt and a scenario."""
LOCAL_ENGINE = EngineOptions(enforce_eager=True, kv_cache_gib=4)
"""Eager mode: with a single batch, a fast start matters more than fast steps."""


@dataclass(frozen=True)
class TextRequest:
    """One text to write."""

    system: str
    user: str
    seed: int


@dataclass(frozen=True)
class Draft:
    """A model's text, usable or not."""

    text: str
    """Stripped, without the model's thought."""
    cut_off: bool = False
    """Whether the token limit ended the text."""
    refusal: str | None = None
    """Reason that the model or its server gave for writing no text."""
    fault: str | None = None
    """Why the text is unusable, OPEN_THOUGHT or NO_UTF8_FORM; completes a sentence that begins "the text"."""


class TextWriter(Protocol):
    """A model that writes texts."""

    @property
    def name(self) -> str:
        """The model's name, stored with each text."""
        ...

    def write(self, requests: Sequence[TextRequest]) -> Iterator[tuple[TextRequest, Draft]]:
        """Yield each request with its draft as soon as it is finished, in any order."""
        ...


class EndpointWriter:
    """Writes through a chat endpoint, several requests at a time."""

    def __init__(self, client: ChatClient, *, temperature: float, max_tokens: int, concurrency: int) -> None:
        """`max_tokens`: per text, thought included. `concurrency`: requests at a time."""
        self._client = client
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._concurrency = concurrency

    @property
    def name(self) -> str:
        """See TextWriter."""
        return self._client.endpoint.model

    def write(self, requests: Sequence[TextRequest]) -> Iterator[tuple[TextRequest, Draft]]:
        """See TextWriter. A refused request becomes a draft with a refusal.

        Raises:
            EndpointError: the endpoint cannot be used at all.
        """
        return parallel_calls(self._draft, requests, workers=self._concurrency)

    def _draft(self, request: TextRequest) -> Draft:
        messages = [{"role": "system", "content": request.system}, {"role": "user", "content": request.user}]
        try:
            reply = self._client.complete(
                messages, temperature=self._temperature, max_tokens=self._max_tokens, seed=request.seed
            )
        except RequestRefused as error:
            return Draft("", refusal=str(error))
        refusal = "stopped by a content filter" if reply.finish_reason == "content_filter" else reply.refusal
        return Draft(reply.text, cut_off=reply.finish_reason == "length", refusal=refusal, fault=reply.fault)


class EngineWriter:
    """Writes with vLLM in this process, all requests as one batch. The engine starts with the first request."""

    def __init__(
        self,
        model: str,
        *,
        temperature: float,
        max_tokens: int,
        template_variables: Mapping[str, JsonValue] | None = None,
        options: EngineOptions = LOCAL_ENGINE,
    ) -> None:
        """Keep the settings; no engine is started yet.

        Args:
            model: hub id, local path, or `demo-model`.
            temperature: sampling temperature.
            max_tokens: per text, thought included.
            template_variables: passed to the model's chat template, e.g. `{"enable_thinking": False}`.
            options: options of the engine.
        """
        self._model = model
        self._template_variables = template_variables or {}
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._options = options

    @property
    def name(self) -> str:
        """See TextWriter."""
        return self._model

    def write(self, requests: Sequence[TextRequest]) -> Iterator[tuple[TextRequest, Draft]]:
        """See TextWriter.

        Raises:
            StudyError: the model's chat template takes no system prompt.
        """
        from vllm_steer import steered

        sampling = {"temperature": self._temperature, "max_tokens": self._max_tokens}
        params = [steered({**sampling, "seed": request.seed}) for request in requests]
        prompts = [self._prompt(request) for request in requests]
        outputs = self._engine.generate([prompt.request for prompt in prompts], params, use_tqdm=sys.stderr.isatty())
        for request, prompt, output in zip(requests, prompts, outputs, strict=True):
            completion = output.outputs[0]
            cut_off = completion.finish_reason == "length"
            if has_utf8_form(completion.text):
                _, answer, is_open = split_thought(completion.text, opened=prompt.opens_thought)
                yield request, Draft(answer.strip(), cut_off, fault=OPEN_THOUGHT if is_open else None)
            else:
                yield request, Draft("", cut_off, fault=NO_UTF8_FORM)

    def _prompt(self, request: TextRequest) -> Prompt:
        messages = [{"role": "system", "content": request.system}, {"role": "user", "content": request.user}]
        return chat_prompt(self._engine.get_tokenizer(), messages, self._template_variables, model=self._model)

    @cached_property
    def _engine(self) -> Engine:
        set_engine_environment()
        from vllm_steer import load_llm

        # the plugin needs at least one hook; nothing is steered or read
        engine: Engine = load_llm(
            model_location(self._model),
            layers=[0],
            max_model_len=PROMPT_TOKENS + self._max_tokens,
            **self._options.engine_args(),
        )
        return engine


@contextmanager
def open_writers(
    endpoints: Sequence[str],
    local_model: str | None,
    *,
    temperature: float,
    max_tokens: int,
    concurrency: int,
    template_variables: Mapping[str, JsonValue] | None = None,
) -> Iterator[list[TextWriter]]:
    """Open writers for the endpoints, then for the local model. No model is called or loaded before it writes.

    Args:
        endpoints: endpoints in the form that `Endpoint.parse` reads.
        local_model: hub id, local path, or `demo-model`; None for no local model.
        temperature: sampling temperature.
        max_tokens: per text, thought included.
        concurrency: requests at a time per endpoint.
        template_variables: passed to the local model's chat template.

    Raises:
        StudyError: there is neither an endpoint nor a local model.
        EndpointError: an endpoint is malformed or lacks its key.
    """
    if not endpoints and local_model is None:
        raise StudyError("There is no model to write pairs with; give an endpoint (MODEL@URL) or a local model.")
    with ExitStack() as stack:
        clients = [stack.enter_context(ChatClient(Endpoint.parse(endpoint))) for endpoint in endpoints]
        writers: list[TextWriter] = [
            EndpointWriter(client, temperature=temperature, max_tokens=max_tokens, concurrency=concurrency)
            for client in clients
        ]
        if local_model is not None:
            writers.append(
                EngineWriter(
                    local_model,
                    temperature=temperature,
                    max_tokens=max_tokens,
                    template_variables=template_variables,
                )
            )
        yield writers
