"""Inspect's provider `vllm-steer`: a running server of this plugin, steered and read, with the readouts in the log.

Inspect finds it by the entry point group `inspect_ai`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from inspect_ai.model import (
    ChatMessage,
    GenerateConfig,
    ModelAPI,
    ModelCall,
    ModelOutput,
    messages_to_openai,
    model_output_from_openai,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolFunction, ToolInfo

from batch_jobs.config.entry_text import parse_entries
from vllm_steer import Readout, Steering
from vllm_steer.client import AsyncSteerClient, Choice, Piece, ServerRefusal, ServerUnreachable
from vllm_steer.errors import NoTraceColumn, SettingsError, SteerError

BASE_URL_VARIABLE, API_KEY_VARIABLE = "VLLM_STEER_BASE_URL", "VLLM_STEER_API_KEY"
_SAME_NAME = (
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "presence_penalty",
    "prompt_logprobs",
    "reasoning_effort",
    "seed",
    "temperature",
    "top_k",
    "top_logprobs",
    "top_p",
)
"""Fields of Inspect's config that vLLM's body has under the same name."""
_OTHER_NAME = {"num_choices": "n", "stop_seqs": "stop"}
_CONSTANT = {"object": "chat.completion", "created": 0}
"""What OpenAI's reply has and neither Inspect nor this client tells."""
_TOO_LONG = "maximum context length"  # as vLLM says it


@dataclass(frozen=True)
class _Asked:
    """What a request asks of the plugin.

    Attributes:
        steering: entries; None leaves the server's default on.
        readout: the readout's fields as the body has them, or None.
    """

    steering: tuple[Steering, ...] | None
    readout: Mapping[str, Any] | None


@modelapi(name="vllm-steer")
def provider() -> type[ModelAPI]:
    """The provider's class, for Inspect's registry."""
    return SteeredServer


class SteeredServer(ModelAPI):
    """One model or alias of a running server.

    Args:
        model_name: the model's or alias's name at the server.
        base_url: the server's address, or the environment variable `VLLM_STEER_BASE_URL`.
        api_key: the server's key, or the environment variable `VLLM_STEER_API_KEY`.
        config: Inspect's config.
        steering: entries of all requests: text such as `kind:8@16`, JSON, or objects; None leaves the server's default
            on, an empty list turns it off. A `steering` in the `extra_body` of a config takes its place.
        readout: the readout of all requests, as an object or JSON with the fields of the HTTP body. A `readout` in
            `extra_body` takes its place.
        stream: stream the replies, which tell no usage and no log-probabilities; with tools replies come whole.
        timeout: longest wait for a reply, in seconds.

    Raises:
        SettingsError: an argument is missing, unknown or of another form.
        SteerError: `Steering` refuses an entry.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  # Inspect's own signature
        *,
        steering: object = None,
        readout: object = None,
        stream: bool = False,
        timeout: float = 600.0,
        **unknown: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [API_KEY_VARIABLE], config)
        if unknown:
            raise SettingsError(
                f"model argument {sorted(unknown)[0]!r} is unknown; allowed: steering, readout, stream, timeout. Leave "
                "it out, or put fields of the body into extra_body."
            )
        # Inspect's hooks may have given another key
        self.api_key: str | None = vars(self).get("api_key") or os.environ.get(API_KEY_VARIABLE)
        url = base_url or os.environ.get(BASE_URL_VARIABLE)
        if not url:
            raise SettingsError(
                f"no address of a server; allowed: --model-base-url, base_url or {BASE_URL_VARIABLE}, such as "
                "http://127.0.0.1:8000. Give one."
            )
        self._asked = _Asked(_steering(steering), _readout(readout))
        self._stream = bool(stream)
        self._url, self._timeout = url, timeout
        self._client: AsyncSteerClient | None = None
        # Inspect keys its cache of answers by address and config, and not by model arguments.
        self.base_url: str | None = url if self._asked == _Asked(None, None) else f"{url}#{_digest(self._asked)}"

    async def aclose(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    def connection_key(self) -> str:
        """Requests to one server share its limit of connections."""
        return self._url

    def should_retry(self, ex: Exception) -> bool:
        """Whether to send a request again: not after a refusal, which would come again."""
        if isinstance(ex, ServerUnreachable | NoTraceColumn):
            return True
        return isinstance(ex, ServerRefusal) and (ex.status == 429 or ex.status >= 500)

    def is_auth_failure(self, ex: Exception) -> bool:
        """Whether the server did not take the key."""
        return isinstance(ex, ServerRefusal) and ex.status == 401

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> tuple[ModelOutput | Exception, ModelCall]:
        """Answer a conversation. The readouts are in the output's metadata: `readout`, one for each choice.

        Raises:
            SteerError: the server failed in a way that may pass; a refusal that would come again is returned.
        """
        asked, options = _body(self._asked, config)
        if tools:
            options |= _tool_fields(tools, tool_choice, config)
        messages = await messages_to_openai(input)
        shown = {"model": self.model_name, "messages": messages, **options, **_shown(asked), "stream": self._stream}
        call = ModelCall.create(shown, None)
        began = time.monotonic()
        try:
            body, readouts = await self._reply(messages, asked, options, stream=self._stream and not tools)
        except SteerError as error:
            call.set_error({"code": error.code, "message": str(error)}, time.monotonic() - began)
            if self.should_retry(error):
                raise
            if _TOO_LONG in str(error):
                return ModelOutput.from_content(self.model_name, str(error), "model_length", str(error)), call
            return error, call
        call.set_response({**body, "readouts": readouts}, time.monotonic() - began)
        output = await model_output_from_openai(body)
        if asked.readout is not None:
            output.metadata = {**(output.metadata or {}), "readout": readouts}
        return output, call

    async def _reply(
        self, messages: Any, asked: _Asked, options: Mapping[str, Any], *, stream: bool
    ) -> tuple[dict[str, Any], list[dict[str, Any] | None]]:
        """The body of OpenAI's whole reply, and the readout of each of its choices."""
        if self._client is None:
            self._client = AsyncSteerClient(self._url, self.model_name, api_key=self.api_key, timeout=self._timeout)
        readout = None if asked.readout is None else await self._with_layers(self._client, asked.readout)
        if stream:
            pieces = self._client.stream_chat(messages, steering=asked.steering, readout=readout, **options)
            return _joined([piece async for piece in pieces], self.model_name)
        reply = await self._client.chat(messages, steering=asked.steering, readout=readout, **options)
        body = {"id": reply.id, "model": reply.model, "usage": reply.usage or None, **_CONSTANT}
        body["choices"] = [choice.body for choice in reply.choices]
        return body, [_told(choice) for choice in reply.choices]

    async def _with_layers(self, client: AsyncSteerClient, readout: Mapping[str, Any]) -> Readout:
        """The readout, with what a body over HTTP may leave out."""
        named = [*readout.get("project", ()), *readout.get("trace", ())]
        filled = {"vectors": not named or readout.get("pool") == "rows", **readout}
        if named and "layers" not in readout:
            server = await client.show()
            at = {one.layer for one in server.directions if one.name in named}
            # without a layer the server says what is wrong with the names
            filled["layers"] = sorted(at & set(server.layers)) or list(server.layers)
        return Readout.from_json(filled)


def _steering(value: object) -> tuple[Steering, ...] | None:
    if value is None or value == []:  # an empty list turns the server's default off
        return None if value is None else ()
    return parse_entries(value, where="steering")


def _readout(value: object) -> Mapping[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise SettingsError(f"readout is {value!r}, not JSON ({error}); allowed: an object. Correct it.") from None
    if value is not None and not (isinstance(value, Mapping) and value):
        raise SettingsError(
            f'readout is {value!r}; allowed: an object such as {{"project": ["kind"], "span": "generated"}}. '
            "Correct it, or leave it out."
        )
    return value


def _body(asked: _Asked, config: GenerateConfig) -> tuple[_Asked, dict[str, Any]]:
    """What a request asks of the plugin, and the other fields of its body."""
    extra = dict(config.extra_body or {})
    steering = _steering(extra.pop("steering")) if "steering" in extra else asked.steering
    readout = _readout(extra.pop("readout")) if "readout" in extra else asked.readout
    given = config.model_dump(include={*_SAME_NAME, *_OTHER_NAME}, exclude_none=True)
    options = {_OTHER_NAME.get(name, name): value for name, value in given.items()}
    if config.response_schema is not None:
        schema = config.response_schema
        told = {"name": schema.name, "schema": schema.json_schema.model_dump(exclude_none=True)}
        options["response_format"] = {"type": "json_schema", "json_schema": told}
    return _Asked(steering, readout), {**options, **extra}


def _tool_fields(tools: Sequence[ToolInfo], choice: ToolChoice, config: GenerateConfig) -> dict[str, Any]:
    functions = [tool.model_dump(exclude_none=True, exclude={"options"}) for tool in tools]
    fields: dict[str, Any] = {"tools": [{"type": "function", "function": function} for function in functions]}
    if isinstance(choice, ToolFunction):
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        fields["tool_choice"] = "required" if choice == "any" else choice
    if config.parallel_tool_calls is not None:
        fields["parallel_tool_calls"] = config.parallel_tool_calls
    return fields


def _shown(asked: _Asked) -> dict[str, Any]:
    steering = None if asked.steering is None else [entry.to_json() for entry in asked.steering]
    fields = {"steering": steering, "readout": asked.readout}
    return {name: value for name, value in fields.items() if value is not None}


def _digest(asked: _Asked) -> str:
    return hashlib.sha256(json.dumps(_shown(asked), sort_keys=True).encode()).hexdigest()[:16]


def _joined(pieces: Sequence[Piece], model: str) -> tuple[dict[str, Any], list[dict[str, Any] | None]]:
    """A stream's pieces as `_reply` returns a whole reply; a stream tells neither its id nor its usage."""
    texts: dict[int, str] = {}
    last: dict[int, Piece] = {}
    for piece in pieces:
        texts[piece.index] = texts.get(piece.index, "") + piece.text
        if piece.finish_reason is not None:
            last[piece.index] = piece
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text},
            "finish_reason": last[index].finish_reason,
        }
        for index, text in sorted(texts.items())
        if index in last
    ]
    if len(choices) < len(texts) or not texts:
        raise ServerUnreachable("the stream ended before its choices did; check the server's log.")
    body = {"id": "stream", "model": model, "choices": choices, **_CONSTANT}
    return body, [_told(last[index]) for index in sorted(texts)]


def _told(part: Choice | Piece) -> dict[str, Any] | None:
    """The readout of a choice as the HTTP reference has it."""
    result = part.readout
    if result is None:
        return None if part.readout_error is None else {"error": part.readout_error}
    told: dict[str, Any] = {
        "num_tokens": result.num_tokens,
        "proof": result.proof,
        "projections": {
            name: {str(layer): _number(value) for layer, value in layers.items()}
            for name, layers in result.projections.items()
        },
    }
    for pool, vectors in (("mean", result.mean), ("last", result.last), ("rows", result.rows)):
        if vectors:
            told[pool] = {
                str(layer): base64.b64encode(rows.astype("<f4").tobytes()).decode() for layer, rows in vectors.items()
            }
    if result.max:
        told["max"] = {
            name: {str(layer): [_number(value), at] for layer, (value, at) in layers.items()}
            for name, layers in result.max.items()
        }
    if result.trace:
        told["trace"] = {name: [_number(float(one)) for one in values] for name, values in result.trace.items()}
    if result.stopped is not None:
        told["stopped"] = asdict(result.stopped)
    if result.flags:
        told["flags"] = [asdict(one) for one in result.flags]
    if result.held:
        told["held"] = list(result.held)
    return told


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
