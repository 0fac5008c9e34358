"""Prompts as token ids, tokenised here rather than in the engine, so that the exact prompts can be stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import JsonValue

from batch_jobs.errors import StudyError
from batch_jobs.texts.thought import ends_in_thought


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt and its text."""

    text: str
    token_ids: tuple[int, ...]
    opens_thought: bool = False
    """The chat template has begun the model's thought, so the completion starts inside it."""

    @property
    def request(self) -> dict[str, list[int]]:
        """The prompt in the form that `LLM.generate` takes."""
        return {"prompt_token_ids": list(self.token_ids)}


def text_prompt(tokenizer: Any, text: str, *, max_tokens: int | None = None) -> Prompt:
    """The text alone, with the special tokens that the tokenizer itself adds, cut to `max_tokens` ids (special
    ones included). The prompt's `text` is never cut.

    `tokenizer`: a Hugging Face tokenizer.
    """
    if max_tokens is None:
        return Prompt(text, tuple(tokenizer(text)["input_ids"]))
    return Prompt(text, tuple(tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]))


def chat_prompt(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], variables: Mapping[str, JsonValue], *, model: str
) -> Prompt:
    """The messages under the model's chat template, plus the assistant's opening.

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: each `{"role": …, "content": …}`; at least one.
        variables: passed to the template.
        model: named in error messages.

    Raises:
        StudyError: there is no chat template, or it refuses the messages or variables.
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
    # look only at the template's text after the last message: a message may itself hold thought markers
    opening = rendered.rpartition(messages[-1]["content"].strip())[2]
    # the template has already added the special tokens
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

    `variables`: passed to the chat template.

    Raises:
        StudyError: as `chat_prompt`.
    """
    if prompt_format == "raw":
        return text_prompt(tokenizer, text)
    return chat_prompt(tokenizer, [{"role": "user", "content": text}], variables or {}, model=model)
