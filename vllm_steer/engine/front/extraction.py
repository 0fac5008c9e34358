"""Extracts directions: reads texts of two sides with the engine and makes a direction of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams

from vllm_steer.directions import Direction, make_direction
from vllm_steer.directions.methods import Method
from vllm_steer.engine.front.offline import collect_readouts, steered
from vllm_steer.errors import BadReadout, BadVector, MalformedSpec
from vllm_steer.schema.readout import Pool, Readout
from vllm_steer.schema.wire import Span

Text = str | Sequence[Mapping[str, Any]]
"""A text, read as it is; or a chat, a list of messages with ``role`` and ``content``, read in the model's template."""


def extract_directions(
    llm: LLM,
    positive: Sequence[Text],
    negative: Sequence[Text],
    layers: Sequence[int],
    *,
    name: str,
    pool: Pool = "mean",
    span: Span = "all",
    skip_first: int = 0,
    method: Method = "mean_difference",
) -> list[Direction]:
    """Extract one unit direction per layer from texts with a concept and texts without it.

    All texts are read in one batch, without steering; each request also generates one token, which is discarded.

    Args:
        llm: an engine with a hook at each of ``layers``.
        positive, negative: texts or chats with the concept, and without it. A chat that ends with an assistant's
            message is read up to the end of that message, any other one up to where the assistant's answer begins.
        layers: decoder blocks to read, 0-based.
        name: name of the directions.
        pool: ``mean`` over the tokens of a text, or the ``last`` one.
        span: the tokens of a text to pool, all of which are prompt tokens.
        skip_first: leaves the first k tokens out, with the spans ``all`` and ``prompt``.
        method: see ``make_direction``; with ``pca`` the texts are in pairs.

    Returns:
        One direction per layer, in the order of ``layers``. The metadata of each is that of ``make_direction``, and
        ``pool``, ``span`` and ``skip_first``.

    Raises:
        MalformedSpec: a text is neither text nor chat, or ``make_direction`` refuses name or method.
        BadReadout: the pool gives no vectors, or the span holds no token of a text.
        BadVector: as ``make_direction``.
        LayerNotHooked, BadSpan, NotConfigured: the engine cannot take such a readout.
    """
    if pool not in ("mean", "last"):
        raise BadReadout(
            f"pool is {pool!r}, which gives no vectors of whole texts; allowed: mean, last. Choose one of them."
        )
    for side, texts in (("positive", positive), ("negative", negative)):
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise MalformedSpec(f"{side} is {str(texts)[:80]!r}; allowed: a list of texts or chats. Give a list.")
    readout = Readout(tuple(layers), span=span, skip_first=skip_first, pool=pool)
    params = steered(SamplingParams(max_tokens=1, temperature=0.0), [], readout=readout)
    prompts = [_prompt(llm, text) for text in (*positive, *negative)]
    if not positive or not negative:
        raise BadVector("one side has no texts; allowed: at least one on each side. Give some.")
    outputs = llm.generate(prompts, params, use_tqdm=False)
    read = [samples[0] for samples in collect_readouts(llm, outputs)]
    lacking = next((number for number, one in enumerate(read) if one is None or not one.num_tokens), None)
    if lacking is not None:
        raise BadReadout(
            f"span {span!r} holds no token of text {lacking} (of the positive ones, then the negative ones); allowed: "
            "spans of prompt tokens, since a text is a prompt. Choose another span."
        )
    found = []
    for layer in layers:
        rows_ND = np.stack([(one.last if pool == "last" else one.mean)[layer] for one in read if one is not None])
        made = make_direction(name, layer, rows_ND[: len(positive)], rows_ND[len(positive) :], method)
        about = {**made.metadata, "pool": pool, "span": span, "skip_first": skip_first}
        found.append(replace(made, metadata=about))
    return found


def _prompt(llm: LLM, text: object) -> Any:
    """The engine's prompt for a text or chat."""
    if isinstance(text, str):
        return {"prompt": text}
    if (
        not isinstance(text, Sequence)
        or not text
        or not all(isinstance(message, Mapping) and "role" in message for message in text)
    ):
        raise MalformedSpec(
            f"a text is {str(text)[:80]!r}; allowed: a string, or a chat, which is a list of messages with role and "
            "content. Give one of them."
        )
    is_answered = text[-1]["role"] == "assistant"
    ids = llm.get_tokenizer().apply_chat_template(
        list(text),
        add_generation_prompt=not is_answered,
        continue_final_message=is_answered,
        tokenize=True,
        return_dict=False,
    )
    return {"prompt_token_ids": list(ids)}
