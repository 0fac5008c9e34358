"""A client for the chat route of OpenAI-compatible servers: `POST <base url>/chat/completions`.

Waits and retries where waiting can help (no connection, 408, 429, most 5xx), and rewrites the request where the
endpoint does not accept its form (`dialect`). Any other failure raises at once an EndpointError that says what to
change. The API key is read from an environment variable when the client is made, and appears in no message, record or
representation.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self

import httpx

from batch_jobs.endpoint.dialect import ChatDialect
from batch_jobs.files.documents import has_utf8_form, printable
from batch_jobs.texts.thought import OPEN_THOUGHT, split_thought
from vllm_steer.errors import SteerError

TIMEOUT_SECONDS = 120.0
MAX_ATTEMPTS = 5
BACKOFF_SECONDS = 1.0
"""Wait before the second attempt; it doubles for each further attempt."""
LONGEST_WAIT_SECONDS = 120.0
"""A server that asks for a longer wait than this gets no further attempt."""
_REQUEST_STATUSES = (400, 413, 422)
"""The request itself is at fault; another request may succeed."""
_PASSING_STATUSES = frozenset({408, 409, 425, 429, *range(500, 600)} - {501, 505, 511})
"""Waiting can help. The 5xx left out say that the server never takes such a request."""
_SHOWN_CHARACTERS = 200
NO_UTF8_FORM = "has no UTF-8 form (half of a surrogate pair)"
"""The fault of a text that can be neither stored nor sent."""


class EndpointError(SteerError):
    """A chat endpoint cannot be reached, refuses the client, or answers with something other than a chat completion."""

    status = 502


class RequestRefused(EndpointError):
    """The endpoint refused this request (400, 413, 422), for its length, its content or an option. Others may
    succeed."""


class NoCompletion(EndpointError):
    """The endpoint accepted this request and answered with something other than a chat completion."""


@dataclass(frozen=True)
class Endpoint:
    """One model at one OpenAI-compatible server."""

    base_url: str
    """The URL up to and including `/v1`."""
    model: str
    api_key_variable: str | None = None
    """Name of the environment variable that holds the API key; None sends none."""

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Parse `MODEL@URL` or `MODEL@URL#VARIABLE`, e.g. `gpt-4o@https://api.openai.com/v1#OPENAI_API_KEY`.

        Raises:
            EndpointError: `text` has another form.
        """
        scheme = max(text.find("@http://"), text.find("@https://"))
        model, url = text[:scheme], text[scheme + 1 :]
        url, _, variable = url.partition("#")
        # never echo a key pasted in place of the variable's name, nor a password inside the URL
        if scheme < 1 or (variable and not variable.isidentifier()) or "@" in url or not has_utf8_form(text):
            raise EndpointError(
                "An endpoint is written MODEL@URL or MODEL@URL#VARIABLE, e.g. "
                "my-model@http://localhost:8000/v1#MY_API_KEY, where VARIABLE names the environment variable that "
                f"holds the API key; got {text.partition('#')[0].partition('@')[0]!r}@…"
            )
        return cls(url.rstrip("/"), model, variable or None)


@dataclass(frozen=True)
class ChatReply:
    """One reply of the model."""

    text: str
    """The answer, stripped, without the model's thought; empty when there is none."""
    finish_reason: str | None
    """`stop`, `length`, `content_filter` or another reason that the server gives."""
    refusal: str | None = None
    """The refusal, if the server reports it apart from the text."""
    fault: str | None = None
    """Why there is no answer although the model wrote text: OPEN_THOUGHT or NO_UTF8_FORM."""


class ChatClient:
    """A thread-safe client of one endpoint. Close it, or use it as a context manager."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        max_attempts: int = MAX_ATTEMPTS,
        sleep: Callable[[float], None] = time.sleep,
        warn: Callable[[str], None] = lambda message: print(message, file=sys.stderr),
    ) -> None:
        """Read the API key and set up the HTTP client; connects to nothing.

        Args:
            endpoint: the model and its server.
            timeout_seconds: limit for connecting and for each pause in the answer.
            max_attempts: most attempts of one request.
            sleep: called with the seconds to wait between attempts.
            warn: called once for each option that the endpoint does not accept.

        Raises:
            EndpointError: the endpoint's environment variable is not set.
        """
        self.endpoint = endpoint
        self._max_attempts = max_attempts
        self._sleep = sleep
        self._warn = warn
        self._dialect = ChatDialect()
        self._learning = threading.Lock()
        self._key = ""
        if endpoint.api_key_variable is not None:
            self._key = os.environ.get(endpoint.api_key_variable, "").strip()
            if not self._key:
                raise EndpointError(
                    f"The environment variable {endpoint.api_key_variable} is not set; set it to the API key of "
                    f"{endpoint.base_url}, or leave #{endpoint.api_key_variable} out if no key is needed."
                )
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = httpx.Client(headers=headers, timeout=timeout_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def complete(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        temperature: float,
        max_tokens: int,
        seed: int | None = None,
    ) -> ChatReply:
        """Ask for the model's answer to `messages`, each `{"role": …, "content": …}`.

        `max_tokens` limits the whole reply, thought included. `temperature` and `seed` are optional for the endpoint:
        one that does not accept them gets the request without them, and the user is warned.

        Raises:
            RequestRefused: only this request is at fault.
            NoCompletion: the answer is no chat completion.
            EndpointError: any other failure, after `max_attempts` where waiting could have helped.
        """
        fields: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": list(messages),
            "temperature": temperature,
        }
        if seed is not None:
            fields["seed"] = seed
        dialect = known = self._dialect
        while True:
            body = dialect.body(fields, max_tokens)
            response = self._post(body)
            if _status(response) == httpx.codes.OK:
                if dialect != known:
                    self._learn(dialect)
                return self._reply(response)
            other = dialect.after_refusal(response.text, body)
            if other == dialect:
                raise self._refusal(response)
            dialect = other

    def _learn(self, dialect: ChatDialect) -> None:
        """Keep a dialect that was accepted. Several threads may learn the same at once; only the first one warns."""
        with self._learning:
            news = dialect.left_out - self._dialect.left_out
            self._dialect = replace(dialect, left_out=dialect.left_out | self._dialect.left_out)
        for name in sorted(news):
            self._warn(f"{self._name} does not accept {name} and uses its own default.")

    def _post(self, body: Mapping[str, Any]) -> httpx.Response:
        """Return a response that is 200 or refuses this very request; raise EndpointError for any other."""
        url = f"{self.endpoint.base_url}/chat/completions"
        for attempt in range(1, self._max_attempts + 1):
            wait = BACKOFF_SECONDS * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)  # spreads retries of threads
            try:
                response = self._http.post(url, json=body)
            except httpx.InvalidURL as error:
                raise EndpointError(f"{self.endpoint.base_url} is not a URL ({error}); give http(s)://…/v1.") from error
            except httpx.RequestError as error:  # also an answer that cannot be decoded
                trouble = f"{type(error).__name__}: {error}"
            else:
                status = _status(response)
                if status in (httpx.codes.OK, *_REQUEST_STATUSES):
                    return response
                trouble = self._trouble(response)
                if status not in _PASSING_STATUSES:
                    raise self._refusal(response)
                wait = max(wait, _retry_after(response))
                if wait > LONGEST_WAIT_SECONDS:
                    raise EndpointError(
                        f"{self._name} asks to wait {wait:.0f} s ({trouble}); run the same command again later."
                    )
            if attempt < self._max_attempts:
                self._sleep(wait)
        raise EndpointError(
            f"{self._name} did not answer in {self._max_attempts} attempts; the last one ended in {trouble}. Check "
            "that the server runs, then run the same command again."
        )

    def _refusal(self, response: httpx.Response) -> EndpointError:
        endpoint, status, trouble = self.endpoint, _status(response), self._trouble(response)
        if status in (401, 403):
            source = f"the key in {endpoint.api_key_variable}" if self._key else "a request without an API key"
            return EndpointError(
                f"{self._name} does not accept {source} ({trouble}); name the variable that holds a valid key after "
                "the URL: MODEL@URL#VARIABLE."
            )
        if status in (404, 405):
            return EndpointError(
                f"{self._name} was not found ({trouble}); check the model's name and that the URL ends where "
                "/chat/completions begins, usually in /v1."
            )
        if status in _REQUEST_STATUSES:
            return RequestRefused(f"{self._name} refused the request ({trouble}).")
        return EndpointError(f"{self._name} answered {trouble}; a chat endpoint answers 200.")

    def _reply(self, response: httpx.Response) -> ChatReply:
        try:
            choice = response.json()["choices"][0]
            finish_reason = choice.get("finish_reason")
            # some servers send no message where a filter stopped it
            message = (choice.get("message") or {}) if finish_reason == "content_filter" else choice["message"]
            content, refusal = message.get("content"), message.get("refusal")
            # servers that split off the thought put it in one of these; the content is then the answer alone
            apart = message.get("reasoning_content") or message.get("reasoning")
            if isinstance(content, list):
                apart = apart or any(part["type"] == "thinking" for part in content)
                content = "".join(part["text"] for part in content if part["type"] == "text")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise NoCompletion(
                f"{self._name} answered no chat completion but {self._excerpt(response)!r}; check the URL."
            ) from error
        if not isinstance(content, str | None):
            raise NoCompletion(f"{self._name} answered a message of type {type(content).__name__}, not a text.")
        # an empty refusal is none
        refusal = printable(refusal) if isinstance(refusal, str) and refusal.strip() else None
        finish_reason = printable(finish_reason) if isinstance(finish_reason, str) else None
        if not has_utf8_form(content or ""):
            return ChatReply("", finish_reason, refusal, NO_UTF8_FORM)
        _, answer, is_open = split_thought(content or "")
        answer = answer.strip()
        never_answered = is_open or (bool(apart) and not answer and not refusal)
        return ChatReply(answer, finish_reason, refusal, OPEN_THOUGHT if never_answered else None)

    def _trouble(self, response: httpx.Response) -> str:
        return f"status {_status(response)}: {self._excerpt(response)}"

    def _excerpt(self, response: httpx.Response) -> str:
        text = " ".join(response.text.split())
        # some servers repeat the key they reject
        text = text.replace(self._key, "…") if self._key else text
        return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"

    @property
    def _name(self) -> str:
        return f"{self.endpoint.model} at {self.endpoint.base_url}"


def _status(response: httpx.Response) -> int:
    """The status, also that of an error that comes with status 200, as gateways send it: `{"error": {"code": 429}}`."""
    if response.status_code != httpx.codes.OK:
        return response.status_code
    try:
        document = response.json()
    except ValueError:
        return response.status_code
    if not isinstance(document, dict) or document.get("choices") or not isinstance(document.get("error"), dict):
        return response.status_code
    code = document["error"].get("code")
    return code if isinstance(code, int) and 400 <= code < 600 else response.status_code


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait (RFC 9110: a number or a date); 0 if it does not say."""
    asked = response.headers.get("Retry-After", "").strip()
    try:
        return max(float(asked), 0.0)
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(asked)
    except ValueError:
        return 0.0
    return max((when.astimezone(UTC) - datetime.now(UTC)).total_seconds(), 0.0)
