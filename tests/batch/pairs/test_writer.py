"""The in-process writer, with an engine that repeats its prompt; endpoint writers are tested with the pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
from typer.testing import CliRunner

import vllm_steer
from batch_jobs.cli.main import app
from batch_jobs.config.study import StudyError
from batch_jobs.config.template_variables import parse_template_variables
from batch_jobs.endpoint.chat import NO_UTF8_FORM
from batch_jobs.pairs.writer import Draft, EndpointWriter, EngineWriter, TextRequest, open_writers
from batch_jobs.texts.thought import OPEN_THOUGHT


class EchoEngine:
    """Tokens are letters, and the completion is the rendered prompt."""

    chat_template: str | None = "{{ messages }}"
    takes_system_prompts = True
    opening = ""
    """What the template begins the assistant's turn with."""
    completion: str | None = None
    """What is written instead of the prompt."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.variables: list[dict[str, Any]] = []
        self.starts = 0

    def get_tokenizer(self) -> EchoEngine:
        return self

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens  # the template has them
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        **variables: Any,
    ) -> str:
        assert add_generation_prompt
        assert not tokenize
        self.variables.append(variables)
        if not self.takes_system_prompts:
            raise jinja2.TemplateError("System role not supported")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + self.opening

    def generate(self, prompts: Any, params: Any, *, use_tqdm: bool) -> list[Any]:
        self.batches.append(list(params))
        texts = [self.completion or "".join(map(chr, prompt["prompt_token_ids"])) for prompt in prompts]
        return [
            SimpleNamespace(outputs=[SimpleNamespace(text=f" {text}\n", finish_reason=reason)])
            for text, reason in zip(texts, ["stop", "length"], strict=True)
        ]


REQUESTS = [TextRequest("Be kind.", "Someone cries.", 5), TextRequest("Be quick.", "Someone cries.", 5)]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> EchoEngine:
    echo = EchoEngine()

    def load_llm(model: str, *, layers: list[int], max_model_len: int, **_: Any) -> EchoEngine:
        assert (model, len(layers)) == ("some/model", 1)
        assert max_model_len > 50  # the text's tokens and the prompt's
        echo.starts += 1
        return echo

    # set in the namespace itself: setattr would look the real ones up first, and so import vLLM
    monkeypatch.setitem(vars(vllm_steer), "load_llm", load_llm)
    monkeypatch.setitem(vars(vllm_steer), "steered", lambda params, *_: params)
    return echo


def test_the_local_model_gets_all_texts_as_one_batch_of_chat_prompts(engine: EchoEngine) -> None:
    writer = EngineWriter("some/model", temperature=0.9, max_tokens=50)
    drafts = dict(writer.write(REQUESTS))
    assert drafts == {
        REQUESTS[0]: Draft("<system>Be kind.<user>Someone cries."),
        REQUESTS[1]: Draft("<system>Be quick.<user>Someone cries.", cut_off=True),
    }
    assert engine.batches == [[{"temperature": 0.9, "max_tokens": 50, "seed": 5}] * 2]
    list(writer.write(REQUESTS))
    assert (len(engine.batches), engine.starts) == (2, 1)


@pytest.mark.parametrize(
    ("opening", "completion", "text", "fault"),
    [
        ("", "<think>Somebody cries.</think>\n\nI stay.", "I stay.", None),
        ("<think>\n", "Somebody cries.</think>\n\nI stay.", "I stay.", None),
        ("<think>\n\n</think>\n\n", "I stay.", "I stay.", None),
        ("", "<think>Somebody cries, so", "", OPEN_THOUGHT),
        ("<think>\n", "Somebody cries, so", "", OPEN_THOUGHT),
        ("", "I stay. <think>Or do I", "", OPEN_THOUGHT),
        ("", "half \ud83d", "", NO_UTF8_FORM),
    ],
)
def test_a_thought_is_no_part_of_a_draft(
    engine: EchoEngine, opening: str, completion: str, text: str, fault: str | None
) -> None:
    engine.opening, engine.completion = opening, completion
    drafts = list(dict(EngineWriter("some/model", temperature=0.9, max_tokens=50).write(REQUESTS)).values())
    assert drafts == [Draft(text, False, fault=fault), Draft(text, True, fault=fault)]


def test_variables_go_to_the_chat_template(engine: EchoEngine) -> None:
    variables = {"enable_thinking": False}
    list(EngineWriter("some/model", temperature=0.9, max_tokens=50, template_variables=variables).write(REQUESTS))
    list(EngineWriter("some/model", temperature=0.9, max_tokens=50).write(REQUESTS))
    assert engine.variables == [variables, variables, {}, {}]


def test_a_model_that_cannot_take_a_system_prompt_is_refused(engine: EchoEngine) -> None:
    engine.takes_system_prompts = False
    with pytest.raises(StudyError, match=r"some/model refuses system and user messages \(System role not supported\)"):
        list(EngineWriter("some/model", temperature=0.9, max_tokens=50).write(REQUESTS))
    engine.chat_template = None
    with pytest.raises(StudyError, match="no chat template"):
        list(EngineWriter("some/model", temperature=0.9, max_tokens=50).write(REQUESTS))


def test_endpoints_and_the_local_model_write_in_the_order_given() -> None:
    endpoints = ["gpt@http://127.0.0.1:9/v1", "claude@http://127.0.0.1:9/v1"]
    with open_writers(endpoints, "some/model", temperature=0.9, max_tokens=50, concurrency=2) as writers:
        assert [writer.name for writer in writers] == ["gpt", "claude", "some/model"]
        assert [type(writer) for writer in writers] == [EndpointWriter, EndpointWriter, EngineWriter]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--endpoint", "m@http://127.0.0.1:9/v1"], "add --local MODEL"),
        (["--local", "some/model"], r"--chat-template-kwargs: got '\[1\]'; give a JSON object"),
    ],
)
def test_variables_without_a_local_model_and_those_that_are_no_object_are_refused(
    tmp_path: Path, arguments: list[str], told: str
) -> None:
    command = ["pairs", "generate", "--out", str(tmp_path / "pairs.jsonl"), "--chat-template-kwargs", "[1]", *arguments]
    with pytest.raises(StudyError, match=told):
        CliRunner().invoke(app, command, catch_exceptions=False)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "Expecting property name"),
        ('{"tokenize": true}', "set by rendering the prompt"),
        ('{"x": NaN}', "neither NaN nor infinity"),
        ('{"x": "\\ud83d"}', "no UTF-8 form"),
    ],
)
def test_variables_that_no_template_can_take_are_refused(text: str, told: str) -> None:
    with pytest.raises(StudyError, match=told):
        parse_template_variables(text, "--chat-template-kwargs")
    assert parse_template_variables('{"enable_thinking": false}', "here") == {"enable_thinking": False}


def test_no_model_at_all_is_refused() -> None:
    with (
        pytest.raises(StudyError, match="no model to write pairs with"),
        open_writers([], None, temperature=0.9, max_tokens=50, concurrency=2),
    ):
        pass
