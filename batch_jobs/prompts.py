"""Prompts as token ids, made here rather than by the engine, so that what was run can be stored exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from batch_jobs.study import StudyError


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt and the text it stands for."""

    text: str
    token_ids: tuple[int, ...]

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


def steering_prompt_ids(tokenizer: Any, text: str, prompt_format: Literal["chat", "raw"]) -> Prompt:
    """A steering prompt: one user turn of the chat template plus the assistant's opening (`chat`), or the
    text (`raw`).

    Raises StudyError when `chat` is asked of a tokenizer without a chat template.
    """
    if prompt_format == "raw":
        return text_prompt(tokenizer, text)
    if not tokenizer.chat_template:
        raise StudyError(
            "This model's tokenizer has no chat template; set prompt_format: raw, or use an instruct model."
        )
    rendered: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    # the template has written the special tokens already
    return Prompt(rendered, tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"]))
