"""Prompts as token ids, made here rather than by the engine, so that what was run can be stored exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import JsonValue

from batch_jobs.documents import refuse_half_pairs
from batch_jobs.errors import StudyError
from batch_jobs.thought import ends_in_thought

_SET_BY_RENDERING = frozenset({
    "add_generation_prompt", "continue_final_message", "conversation", "messages", "return_assistant_tokens_mask",
    "return_dict", "return_tensors", "tokenize",
})  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt and the text it stands for."""

    text: str
    token_ids: tuple[int, ...]
    opens_thought: bool = False
    """The chat template has begun the model's thought, so the completion starts inside it."""

    @property
    def request(self) -> dict[str, list[int]]:
        """The form `LLM.generate` takes."""
        return {"prompt_token_ids": list(self.token_ids)}


def text_prompt(tokenizer: Any, text: str, *, max_tokens: int | None = None) -> Prompt:
    """The text alone, with the special tokens the tokenizer itself adds, cut to `max_tokens` ids (special
    ones included).

    `tokenizer`: a Hugging Face tokenizer. `.text` stays the whole text.
    """
    if max_tokens is None:
        return Prompt(text, tuple(tokenizer(text)["input_ids"]))
    return Prompt(text, tuple(tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]))


def template_variables(given: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """`given` as it is, where it can go to a chat template. Raises ValueError for a name that rendering a prompt sets
    itself, and for a number that JSON cannot hold."""
    if own := sorted(_SET_BY_RENDERING & set(given)):
        raise ValueError(f"{own} are set by rendering the prompt; allowed: variables of the chat template")
    try:
        json.dumps(given, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"got {given!r}; allowed: what JSON can hold, so neither NaN nor infinity") from error
    return given


def parse_template_variables(text: str, where: str) -> dict[str, JsonValue]:
    """Variables for a chat template from a JSON object. Raises StudyError, naming `where`, for anything else."""
    try:
        document = json.loads(text)
        variables = template_variables(document) if isinstance(document, dict) else None
    except ValueError as error:
        raise StudyError(f'{where}: {error}; give a JSON object such as {{"enable_thinking": false}}.') from error
    if variables is None:
        raise StudyError(f'{where}: got {text!r}; give a JSON object such as {{"enable_thinking": false}}.')
    refuse_half_pairs(variables, where, advice="give text in UTF-8")
    return variables


def chat_prompt(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], variables: Mapping[str, JsonValue], *, model: str
) -> Prompt:
    """The messages under the model's chat template, plus the assistant's opening.

    `tokenizer`: a Hugging Face tokenizer. `variables`: go to the template. `model`: for messages. Raises StudyError
    when there is no chat template, or it refuses the messages or variables.
    """
    import jinja2

    if not tokenizer.chat_template:
        raise StudyError(
            f"{model} has no chat template; use an instruct model (a study may set prompt_format: raw instead)."
        )
    try:
        rendered: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **variables
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise StudyError(
            f"The chat template of {model} refuses {' and '.join(message['role'] for message in messages)} messages"
            f"{f' with {dict(variables)!r}' if variables else ''} ({error}); use a model whose template takes them."
        ) from error
    # what follows the last message is the template's own; a message may speak of thoughts
    opening = rendered.rpartition(messages[-1]["content"].strip())[2]
    # the template has written the special tokens already
    ids = tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    return Prompt(rendered, ids, ends_in_thought(opening))


def steering_prompt_ids(
    tokenizer: Any,
    text: str,
    prompt_format: Literal["chat", "raw"],
    variables: Mapping[str, JsonValue] | None = None,
    *,
    model: str = "this model",
) -> Prompt:
    """A steering prompt: one user turn of the chat template plus the assistant's opening (`chat`), or the
    text (`raw`).

    `variables`: go to the chat template. Raises StudyError as `chat_prompt` does.
    """
    if prompt_format == "raw":
        return text_prompt(tokenizer, text)
    return chat_prompt(tokenizer, [{"role": "user", "content": text}], variables or {}, model=model)
