"""Variables that users pass to chat templates."""

from __future__ import annotations

import json

from pydantic import JsonValue

from batch_jobs.errors import StudyError
from batch_jobs.files.documents import refuse_half_pairs

_SET_BY_RENDERING = frozenset(
    {
        "add_generation_prompt",
        "continue_final_message",
        "conversation",
        "messages",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
    }
)


def template_variables(given: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Check that `given` can be passed to a chat template, and return it unchanged.

    Raises:
        ValueError: a name is set by rendering itself, or JSON cannot hold a number.
    """
    if own := sorted(_SET_BY_RENDERING & set(given)):
        raise ValueError(f"{own} are set by rendering the prompt; allowed: variables of the chat template")
    try:
        json.dumps(given, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"got {given!r}; allowed: what JSON can hold, so neither NaN nor infinity") from error
    return given


def parse_template_variables(text: str, where: str) -> dict[str, JsonValue]:
    """Variables for a chat template from a JSON object.

    Raises:
        StudyError: `text` is not such an object; the message begins with `where`.
    """
    try:
        document = json.loads(text)
        variables = template_variables(document) if isinstance(document, dict) else None
    except ValueError as error:
        raise StudyError(f'{where}: {error}; give a JSON object such as {{"enable_thinking": false}}.') from error
    if variables is None:
        raise StudyError(f'{where}: got {text!r}; give a JSON object such as {{"enable_thinking": false}}.')
    refuse_half_pairs(variables, where, advice="give text in UTF-8")
    return variables
