"""Inspect: ``extra_body`` of a ``GenerateConfig`` steers a model, an evaluation or a call.

The innermost ``extra_body`` wins and is not merged with the others: one given to ``eval`` or to a call replaces the
model's own, steering included.

The header ``X-Steering`` goes into ``extra_headers`` of the config, for chats only: the providers of bare texts drop
these headers without a word, and the answer is not steered. The provider "vllm" reads what follows a colon in a model's
name as a LoRA adapter, so it refuses ``model@kind:8``; the provider "openai-api" takes it, and both take an alias.

The log of an evaluation has the readout in the raw answer of each model event, ``event.call.response``. The output of a
model does not have it. Where Inspect streams, it is nowhere. ``output.response_id`` is the reply's id, in streams too.

The provider "vllm" remembers a server by the model's name: while a model of one address is open, a second address for
that name is not used. It does not take ``stream=True``; a call with ``on_stream`` streams.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import inspect_ai
import openai
import pytest
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog
from inspect_ai.model import GenerateConfig, Model, ModelOutput, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

from tests.clients.conftest import (
    ALIAS,
    ALPHA,
    API_KEY,
    MODEL,
    NUM_TOKENS,
    PROMPT,
    READOUT,
    REFUSAL,
    REFUSED,
    STEERING,
    Served,
    Texts,
    kept,
)

CLIENT = "Inspect"

CHAT = "/v1/chat/completions"
CHATS, BARE = ["vllm", "openai-api/any"], ["vllm-completions", "openai-api-completions/any"]
Steering = list[dict[str, Any]]

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # Inspect leaves closing to the garbage collector


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep Inspect's cache, traces and marks of running evaluations out of the user's folders."""
    for name in ("INSPECT_CACHE_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


def config(steering: Steering | None = None, **extra_body: Any) -> GenerateConfig:
    """A greedy config, without ``extra_body`` if that would be empty."""
    body = extra_body if steering is None else {"steering": steering, **extra_body}
    return GenerateConfig(max_tokens=NUM_TOKENS, temperature=0, extra_body=body or None)


def model(served: Served, name: str, config: GenerateConfig, **args: Any) -> Model:
    access = {"base_url": served.base_url, "api_key": API_KEY, **args}
    return get_model(name, config=config, memoize=False, **access)  # default retries


def output(model: Model, **fields: Any) -> ModelOutput:
    async def main() -> ModelOutput:
        async with model:
            return await model.generate(PROMPT, **fields)

    return asyncio.run(main())


@pytest.mark.cell(CLIENT, body="`extra_body` of the config")
@pytest.mark.parametrize("provider", CHATS + BARE)
def test_a_model_is_steered_by_its_config(
    provider: str, served: Served, chat_texts: Texts, completion_texts: Texts
) -> None:
    texts = chat_texts if provider in CHATS else completion_texts
    for steering, text in ((STEERING, texts.steered), ([], texts.plain), (None, texts.plain)):
        assert output(model(served, f"{provider}/{MODEL}", config(steering))).completion == text
    assert output(model(served, f"{provider}/{ALIAS}", config())).completion == texts.steered


@pytest.mark.parametrize("provider", CHATS)
def test_a_calls_config_takes_the_place_of_the_models(provider: str, served: Served, chat_texts: Texts) -> None:
    name = f"{provider}/{MODEL}"
    assert output(model(served, name, config()), config=config(STEERING)).completion == chat_texts.steered
    for inner in (config([]), config(readout=READOUT)):
        assert output(model(served, name, config(STEERING)), config=inner).completion == chat_texts.plain


@pytest.mark.cell(CLIENT, header="`extra_headers` of the config, chats only")
@pytest.mark.parametrize("provider", CHATS + BARE)
def test_a_header_steers_chats_and_is_dropped_from_bare_texts(
    provider: str, served: Served, chat_texts: Texts, completion_texts: Texts
) -> None:
    asked = config().merge(GenerateConfig(extra_headers={"X-Steering": f"kind:{ALPHA}"}))
    text = chat_texts.steered if provider in CHATS else completion_texts.plain
    assert output(model(served, f"{provider}/{MODEL}", asked)).completion == text


@pytest.mark.cell(CLIENT, name="yes; the provider `vllm` takes aliases alone")
@pytest.mark.parametrize("provider", CHATS)
def test_the_provider_vllm_takes_the_entries_of_a_models_name_for_an_adapter(
    provider: str, served: Served, chat_texts: Texts
) -> None:
    named = model(served, f"{provider}/{MODEL}@kind:{ALPHA}", config())
    if provider == "vllm":
        with pytest.raises(RuntimeError, match="LoRA adapter"):
            output(named)
    else:
        assert output(named).completion == chat_texts.steered
    assert output(model(served, f"{provider}/{ALIAS}", config())).completion == chat_texts.steered


@pytest.mark.cell(CLIENT, stream="dropped", id="`output.response_id`")
@pytest.mark.parametrize("provider", CHATS)
def test_the_id_of_a_reply_brings_its_readout_back(provider: str, served: Served) -> None:
    async def on_stream(chunk: Any) -> None:
        assert "projections" not in repr(chunk)

    for fields in ({}, {"on_stream": on_stream}):
        values = []
        for steering in (STEERING, []):
            answer = output(model(served, f"{provider}/{MODEL}", config(steering, readout=READOUT)), **fields)
            assert "projections" not in repr(answer)
            [readout] = kept(served, answer.response_id)
            assert readout["num_tokens"] == NUM_TOKENS - 1
            values.append(readout["projections"]["kind"][str(served.layer)])
        assert values[0] > values[1] + 1


@pytest.mark.parametrize("provider", CHATS)
def test_a_stream_is_steered(provider: str, served: Served, chat_texts: Texts) -> None:
    for steering, text in ((STEERING, chat_texts.steered), ([], chat_texts.plain)):
        seen: list[str] = []

        async def on_stream(chunk: Any, seen: list[str] = seen) -> None:
            seen.append(chunk.text)

        name = f"{provider}/{MODEL}"
        assert output(model(served, name, config(steering)), on_stream=on_stream).completion == text
        assert len(seen) > 2
        assert "".join(seen) == text


@pytest.mark.parametrize("provider", CHATS)
def test_a_refusal_is_an_error_that_is_not_tried_again(provider: str, served: Served) -> None:
    before = served.answers(CHAT, 400)
    with pytest.raises(RuntimeError, match="'nobody'") as refused:
        output(model(served, f"{provider}/{MODEL}", config(REFUSED)))
    assert isinstance(refused.value.__cause__, openai.BadRequestError)
    assert refused.value.__cause__.code == REFUSAL
    assert served.answers(CHAT, 400) == before + 1


def test_a_cache_keeps_steered_answers_apart(served: Served, chat_texts: Texts) -> None:
    asked = [(MODEL, config()), (MODEL, config(STEERING)), (ALIAS, config())]
    for _ in range(2):
        texts = [output(model(served, f"vllm/{name}", fields), cache=True).completion for name, fields in asked]
        assert texts == [chat_texts.plain, chat_texts.steered, chat_texts.steered]


def test_the_provider_vllm_keeps_the_address_it_knows(served: Served, chat_texts: Texts) -> None:
    async def main() -> str:
        async with model(served, f"vllm/{MODEL}", config()) as known:
            await known.generate(PROMPT)
            nowhere = model(served, f"vllm/{MODEL}", config(), base_url="http://127.0.0.1:9/v1")
            return (await nowhere.generate(PROMPT)).completion

    assert asyncio.run(main()) == chat_texts.plain


def evaluate(model: Model, target: str, folder: Path, **fields: Any) -> EvalLog:
    """An evaluation of two samples: is ``target`` in the answer?"""
    samples = [Sample(input=PROMPT, target=target) for _ in range(2)]
    task = inspect_ai.Task(dataset=samples, solver=generate(), scorer=includes())

    async def main() -> list[EvalLog]:
        async with model:  # `inspect_ai.eval` leaves its connections open
            return await inspect_ai.eval_async(task, model=model, log_dir=str(folder), **fields)

    [log] = asyncio.run(main())
    return log


@pytest.mark.cell(CLIENT, whole="in the log, `event.call.response`")
@pytest.mark.parametrize("provider", CHATS)
def test_a_whole_evaluation_is_steered_and_read(
    provider: str, served: Served, chat_texts: Texts, tmp_path: Path
) -> None:
    read = config(STEERING, readout=READOUT)
    for name, asked, fields, accuracy in (
        (MODEL, config(), {}, 0),
        (ALIAS, config(), {}, 1),
        (MODEL, read, {}, 1),
        (MODEL, config(), {"extra_body": {"steering": STEERING}}, 1),
        (MODEL, read, {"extra_body": {"steering": []}}, 0),
    ):
        log = evaluate(model(served, f"{provider}/{name}", asked), chat_texts.steered, tmp_path, **fields)
        assert log.status == "success"
        assert log.results.scores[0].metrics["accuracy"].value == accuracy
        [choice] = [event.call.response["choices"][0] for event in log.samples[1].events if event.event == "model"]
        assert ("readout" in choice) == (asked is read and not fields)


@pytest.mark.parametrize("provider", CHATS + BARE)
def test_a_refusal_ends_an_evaluation(provider: str, served: Served, tmp_path: Path) -> None:
    for fail_on_error, status in ((True, "error"), (False, "success")):
        asked = model(served, f"{provider}/{MODEL}", config(REFUSED))
        log = evaluate(asked, "", tmp_path, fail_on_error=fail_on_error)
        assert log.status == status
        assert log.results is None
        assert all("no direction is named" in sample.error.message for sample in log.samples)
        assert [(sample.output.completion, sample.scores) for sample in log.samples] == [("", {})] * 2
