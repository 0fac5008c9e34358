"""Adds readouts and traces to replies. vLLM's own fields stay as they are.

=====================  ==============================================  =============================================
route                  a whole reply                                   a streamed one
=====================  ==============================================  =============================================
chat, completions,     ``choices[i].readout``                          the same in the chunk with the finish reason,
chat batch, tokens                                                     ``choices[i].trace`` in any chunk
responses              ``readout``                                     ``response.readout`` in the closing event,
                                                                       ``trace`` in any event before it
messages               ``readout``                                     ``readout`` in ``message_delta``, ``trace`` in
                                                                       any event before it
=====================  ==============================================  =============================================

A readout is ``{"num_tokens", "projections": {name: {layer: value}}, "mean": {layer: base64 of little-endian float32}}``
with ``mean`` only if vectors were requested, and with the whole ``trace`` if one was. A failed readout is
``{"error": reason}``. A trace is ``{name: {"start": k, "values": [...]}}``, with k counted from the span's first token.
A number that does not exist, such as the mean of no tokens, is null.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from vllm_steer.engine.front.http_exchange import Exchange, Sample
from vllm_steer.errors import NotOnThisRoute
from vllm_steer.server.inbound.steered_routes import CHAT_BATCH, COMPLETIONS, MESSAGES, RESPONSES

_ONE_SAMPLE = frozenset({RESPONSES, MESSAGES})
_CLOSING = frozenset({"response.completed", "response.incomplete", "response.failed", "message_delta"})
_HEADS = frozenset({"message_start", "ping"})


def complete_reply(path: str, reply: dict[str, Any], exchange: Exchange) -> None:
    """Add the readouts to a whole reply, in place.

    Raises:
        NotOnThisRoute: the reply has no place for any of them.
    """
    placed = 0
    if path in _ONE_SAMPLE:
        sample = _latest(exchange)
        if sample is not None:
            _close(reply, reply, sample, exchange)
            placed += 1
    else:
        for choice, sample in _placed(path, reply, exchange):
            _close(choice, reply, sample, exchange)
            placed += 1
    if not placed:
        raise NotOnThisRoute(
            f"the reply of {path} has no place for the readout that was asked; allowed: replies with choices. Send the "
            "request to the route itself."
        )


def complete_event(path: str, event: dict[str, Any], exchange: Exchange) -> bool:
    """Add to one event of a stream, in place, the trace values and the readout that have become known.

    Returns:
        Whether the event was changed.
    """
    if path in _ONE_SAMPLE:
        return _complete_named_event(event, exchange)
    changed = False
    for choice, sample in _placed(path, event, exchange):
        news = _news(sample)
        if news:
            choice["trace"] = news
        ends = choice.get("finish_reason") is not None and sample.readout is not None
        if ends:
            _close(choice, event, sample, exchange)
        changed = changed or bool(news) or ends
    return changed


def list_aliases(models: dict[str, Any], aliases: Iterable[str]) -> None:
    """Add the aliases to the reply of ``/v1/models``, in place, as cards whose parent is the base model."""
    cards = models.get("data")
    if not isinstance(cards, list) or not cards:
        return
    base = cards[0]
    cards += [{**base, "id": alias, "parent": base["id"]} for alias in aliases]


def _complete_named_event(event: dict[str, Any], exchange: Exchange) -> bool:
    """``complete_event`` for routes whose replies are one sample and whose events have a ``type``."""
    if event.get("type") == "message_start":
        exchange.reply_id = _id_of(event.get("message"))
    sample = _latest(exchange)
    if sample is None:
        return False
    news = _news(sample) if event.get("type") not in _HEADS else {}
    if news:
        event["trace"] = news
    response = event.get("response", event)
    if event.get("type") not in _CLOSING or not isinstance(response, dict) or sample.readout is None:
        return bool(news)
    _close(response, response, sample, exchange)
    return True


def _close(holder: dict[str, Any], reply: dict[str, Any], sample: Sample, exchange: Exchange) -> None:
    """Put a sample's readout into its place, and note it for clients that ask for it by the reply's id."""
    holder["readout"] = _whole(sample)
    exchange.reply_id = _id_of(reply) or exchange.reply_id
    exchange.closed.append({"index": holder.get("index", 0), "readout": holder["readout"]})


def _id_of(reply: object) -> str | None:
    told = reply.get("id", reply.get("request_id")) if isinstance(reply, dict) else None
    return told if isinstance(told, str) else None


def _placed(path: str, reply: dict[str, Any], exchange: Exchange) -> Iterator[tuple[dict[str, Any], Sample]]:
    """The choices of a reply or of a stream's chunk, each with its sample.

    The engine's request ids in vLLM 0.32 are ``<reply id>-<i>`` for prompt i of a completion, ``<reply id>_<i>`` for
    conversation i of a batch, and the reply's own id for anything else. The samples of prompt i of a completion are the
    choices from i·n on; those of conversation i all have the index i
    (vllm/entrypoints/openai/{completion,chat_completion}/serving.py, batch_serving.py,
    scale_out/token_in_token_out/serving.py).
    """
    choices = reply.get("choices")
    seen: Counter[int] = Counter()
    for choice in choices if isinstance(choices, list) else ():
        index = choice.get("index") if isinstance(choice, dict) else None
        if not isinstance(index, int):
            continue
        key: tuple[str, int] = str(reply.get("id", reply.get("request_id"))), index
        if path == CHAT_BATCH:
            key = f"{key[0]}_{index}", seen[index]
        elif path == COMPLETIONS or str(reply.get("object")).startswith("text_completion"):
            prompt, sample_index = divmod(index, exchange.choices_per_prompt)
            key = f"{key[0]}-{prompt}", sample_index
        seen[index] += 1
        if key in exchange.samples:
            yield choice, exchange.samples[key]


def _latest(exchange: Exchange) -> Sample | None:
    """The sample of a response's last turn; earlier turns only called the server's own tools."""
    return next(reversed(exchange.samples.values()), None)


def _whole(sample: Sample) -> dict[str, Any] | None:
    if sample.readout is None or not sample.trace:
        return sample.readout
    return {**sample.readout, "trace": {name: {"start": 0, "values": values} for name, values in sample.trace.items()}}


def _news(sample: Sample) -> dict[str, Any]:
    """The trace's values that have not been sent yet; marks them as sent."""
    start = sample.told
    end = min(sample.span_length, max((len(values) for values in sample.trace.values()), default=0))
    if end <= start:
        return {}
    sample.told = end
    return {name: {"start": start, "values": values[start:end]} for name, values in sample.trace.items()}
