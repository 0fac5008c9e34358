"""Prompts as token ids, made here rather than by the engine, so that what was run can be stored exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import JsonValue

from batch_jobs.errors import StudyError
from batch_jobs.texts.thought import ends_in_thought


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
