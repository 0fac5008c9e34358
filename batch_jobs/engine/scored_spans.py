"""Which tokens of a scored text are steered, so that a log-likelihood belongs to what the model would generate.

A harness scores a continuation by sending context and continuation as one prompt. In a generation the context alone is
the prompt, and the continuation is generated. The spans of steering mean the generation; here they become slices of the
longer prompt that hold the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vllm_steer import Steering, spans
from vllm_steer.errors import BadCondition


def scored_entries(entries: Sequence[Steering], context_len: int, num_tokens: int, *, start: int = 0) -> list[Steering]:
    """The entries for a text that is sent whole, as a prompt.

    Position p of the generation, counted from the first token of its prompt, is position p − `start` of the text that
    is sent. As in a generation that ends with the text, what lies behind its last token is left out, and an entry of
    which no token is left goes.

    Args:
        entries: the steering of the generation.
        context_len: tokens of the generation's prompt.
        num_tokens: tokens of the text that is sent.
        start: tokens of the generation that are not sent because the text is a later part of it.

    Raises:
        BadSpan: a part of a span has no token with a prompt of this length, as in a generation.
    """
    found = []
    for entry in entries:
        if entry.span == "all":
            found.append(entry)
            continue
        parts = []
        for first, end in spans.runs(entry.span, context_len):
            low = max(first - start, 0)
            high = num_tokens if end is None else min(end - start, num_tokens)
            if low < high:
                parts.append(f"prompt[{low}:{high}]")
        if parts:
            found.append(replace(entry, span=" + ".join(parts)))
    return found


def refuse_prompt_conditions(entries: Sequence[Steering]) -> None:
    """Check that no entry depends on the mean over the prompt.

    Raises:
        BadCondition: one does. A scored text has its continuation in the prompt, so the mean would be another one.
    """
    for entry in entries:
        if entry.when is not None and entry.when.over == "prompt":
            raise BadCondition(
                f"the entry of {entry.direction!r} has a condition over the prompt; allowed here: conditions on tokens."
                " A text that is scored is a prompt as a whole, and its mean is not that of a generation's prompt. "
                "Leave it out."
            )
