"""Every feature of vLLM's endpoints works steered, and the answers are those of the offline API."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from vllm import RequestOutput

from tests.server.conftest import ALIAS, ALIAS_ALPHA, KIND_LAYER, OTHER_LAYER, ServedModel
from vllm_steer import (
    Readout,
    ReadoutResult,
    Steering,
    close_llm,
    collect_readouts,
    load_llm,
    register_directions,
    steered,
)

pytestmark = [pytest.mark.slow, pytest.mark.server]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
GENERATED = 24
PROMPT = "Once upon a time there was"
STRONG = {"steering": [{"direction": "kind", "alpha": ALIAS_ALPHA}]}
READ = {"readout": {"layers": [OTHER_LAYER, KIND_LAYER], "span": "all", "project": ["kind", "other"]}}
FIELDS = pytest.mark.parametrize(
    "fields", [{}, STRONG, {**STRONG, **READ}, {"model": ALIAS}], ids=["unsteered", "steered", "read", "alias"]
)

# Spelled out, so that a random model cannot write endless white space, which JSON allows anywhere.
ANSWERS = [{"mood": "kind", "tags": ["a", "b"]}, {"mood": "cold", "tags": []}, 7, "neither"]
ARGUMENTS = [{"mood": "kind"}, {"mood": "cold"}]
TOOL = {"type": "function", "function": {"name": "answer", "strict": True, "parameters": {"enum": ARGUMENTS}}}
NAMED = {"type": "function", "function": {"name": "answer"}}


def _chat(server: httpx.Client, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": PROMPT}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 100, "temperature": 0, **fields}
    return server.post(CHAT, json=body)


def _content(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


@FIELDS
def test_a_response_format_is_kept_to(server: httpx.Client, fields: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"enum": ANSWERS}, "strict": True}}
    assert json.loads(_content(_chat(server, response_format=form, **fields))) in ANSWERS


@FIELDS
@pytest.mark.parametrize(
    ("constraint", "allowed"),
    [
        ({"choice": ["the first", "the second", "a third"]}, "the first|the second|a third"),
        ({"regex": "[ab]{3}-[0-9]{2}"}, "[ab]{3}-[0-9]{2}"),
    ],
    ids=["choice", "regex"],
)
def test_a_structured_output_is_kept_to(
    server: httpx.Client, constraint: dict[str, Any], allowed: str, fields: dict[str, Any]
) -> None:
    assert re.fullmatch(allowed, _content(_chat(server, structured_outputs=constraint, **fields)))
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "structured_outputs": constraint, **fields}
    reply = server.post(COMPLETIONS, json=body)
    assert reply.status_code == 200, reply.text
    assert re.fullmatch(allowed, reply.json()["choices"][0]["text"])


@FIELDS
def test_a_chat_that_offers_tools_and_forbids_them_is_an_ordinary_one(
    server: httpx.Client, fields: dict[str, Any]
) -> None:
    reply = _chat(server, tools=[TOOL], tool_choice="none", **fields)
    message = reply.json()["choices"][0]["message"]
    assert not message.get("tool_calls")
    assert _content(reply) == _content(_chat(server, **fields))


@FIELDS
def test_a_tool_that_must_be_called_is_called(server: httpx.Client, fields: dict[str, Any]) -> None:
    reply = _chat(server, tools=[TOOL], tool_choice=NAMED, **fields)
    assert reply.status_code == 200, reply.text
    (told,) = reply.json()["choices"]
    (call,) = told["message"].get("tool_calls") or [reply.text]
    assert call["function"]["name"] == "answer"
    assert json.loads(call["function"]["arguments"]) in ARGUMENTS
    assert ("readout" in told) == ("readout" in fields)

    streamed = _chat(server, tools=[TOOL], tool_choice=NAMED, stream=True, **fields)
    deltas, readouts = _deltas(streamed)
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls") or ()]
    assert "".join(one.get("name") or "" for one in calls) == "answer"
    arguments = "".join(one.get("arguments") or "" for one in calls)  # a whole reply is spaced out by vLLM
    assert json.loads(arguments) == json.loads(call["function"]["arguments"])
    expected = [told["readout"]["num_tokens"]] if "readout" in fields else []
    assert [readout["num_tokens"] for readout in readouts] == expected


@FIELDS
def test_a_tool_that_may_be_called_leaves_the_text_as_it_is(server: httpx.Client, fields: dict[str, Any]) -> None:
    # A random model never writes a call, so this is its answer to the prompt that offers the tool. vLLM keeps special
    # tokens, which the model may write, where it looks for a call.
    offered = _chat(server, tools=[TOOL], tool_choice="auto", **fields)
    plain = _chat(server, tools=[TOOL], tool_choice="none", skip_special_tokens=False, **fields)
    assert _content(offered) == _content(plain)


def _deltas(reply: httpx.Response) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The deltas of a streamed chat of one choice, and the readouts that came with them."""
    assert reply.status_code == 200, reply.text
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return [one["delta"] for one in choices], [one["readout"] for one in choices if one.get("readout")]


@FIELDS
def test_logprobs_are_of_the_tokens_that_came(server: httpx.Client, fields: dict[str, Any]) -> None:
    reply = _chat(server, logprobs=True, top_logprobs=3, max_tokens=GENERATED, ignore_eos=True, **fields)
    content = _content(reply)
    told = reply.json()["choices"][0]["logprobs"]["content"]
    assert len(told) == GENERATED
    said = b"".join(bytes(one["bytes"]) for one in told).decode(errors="replace")
    assert said.replace("\ufffd", "") == content.replace("\ufffd", "")  # vLLM gives no bytes for half a character
    for one in told:
        best = [top["logprob"] for top in one["top_logprobs"]]
        assert best == sorted(best, reverse=True)
        # Greedy takes the steered model's likeliest token, and reports that model's log-probability of it.
        assert one["logprob"] == best[0] <= 0


def test_logprobs_are_the_steered_models(server: httpx.Client) -> None:
    def first(**fields: Any) -> float:
        reply = _chat(server, logprobs=True, top_logprobs=1, max_tokens=1, **fields).json()
        return float(reply["choices"][0]["logprobs"]["content"][0]["logprob"])

    assert first(**STRONG) == first(model=ALIAS)
    assert abs(first(**STRONG) - first()) > 1e-3  # far above what summing in another order changes


@FIELDS
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_three_samples_come_as_three_choices_and_come_again(
    server: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    said = {"messages": [{"role": "user", "content": PROMPT}]} if path == CHAT else {"prompt": PROMPT}
    body = {
        "model": "tiny",
        **said,
        "n": 3,
        "temperature": 1.0,
        "seed": 11,
        "max_tokens": 8,
        "ignore_eos": True,
        **fields,
    }

    def texts() -> list[str]:
        reply = server.post(path, json=body)
        assert reply.status_code == 200, reply.text
        choices = reply.json()["choices"]
        assert [one["index"] for one in choices] == [0, 1, 2]
        assert all(("readout" in one) == ("readout" in fields) for one in choices)
        return [one["message"]["content"] if path == CHAT else one["text"] for one in choices]

    first = texts()
    assert len(set(first)) == 3
    assert texts() == first


ASKED: list[tuple[str, list[Steering]]] = [
    ("Once upon a time there was", []),
    ("The kitchen was quiet when", [Steering("kind", 6.0)]),
    ("Question: why is the sky blue?\nAnswer:", [Steering("kind", -20.0), Steering("other", 3.0)]),
    ("def median(values):", [Steering("kind", 12.0, span="generated"), Steering("other", op="ablate")]),
    ("List three reasons:", [Steering("other", -8.0, op="set", span="prompt")]),
    ("Dear colleague,", [Steering("kind", 50.0), Steering("kind", -3.5, layer=OTHER_LAYER)]),
]
READOUT = Readout([OTHER_LAYER, KIND_LAYER], span="all", project=["kind", "other"])


@pytest.fixture(scope="module")
def offline(served: ServedModel) -> Iterator[tuple[list[RequestOutput], list[ReadoutResult]]]:
    """The answers to ``ASKED``, in one batch, of an engine here with the server's checkpoint and directions."""
    llm = load_llm(
        str(served.model),
        layers=[OTHER_LAYER, KIND_LAYER],
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=64 << 20,
        disable_log_stats=True,
    )
    try:
        register_directions(llm, served.directions)
        params = {"temperature": 0, "max_tokens": GENERATED, "ignore_eos": True}
        outputs = llm.generate(
            [prompt for prompt, _ in ASKED],
            [steered(params, steering, READOUT) for _, steering in ASKED],
            use_tqdm=False,
        )
        yield outputs, [result for (result,) in collect_readouts(llm, outputs) if result is not None]
    finally:
        close_llm(llm)


def _flat(projections: Mapping[str, Mapping[Any, float]]) -> dict[tuple[str, int], float]:
    return {(name, int(layer)): value for name, values in projections.items() for layer, value in values.items()}


@pytest.mark.engine
def test_greedy_replies_and_readouts_are_those_of_the_offline_api(
    server: httpx.Client, offline: tuple[list[RequestOutput], list[ReadoutResult]]
) -> None:
    def answer(prompt: str, steering: list[Steering]) -> dict[str, Any]:
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": GENERATED,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "steering": [one.to_json() for one in steering],
            "readout": READOUT.to_json(),
        }
        reply = server.post(COMPLETIONS, json=body)
        assert reply.status_code == 200, reply.text
        return dict(reply.json()["choices"][0])

    with ThreadPoolExecutor(len(ASKED)) as pool:  # at once, so that the server mixes them in its batches
        choices = list(pool.map(answer, *zip(*ASKED, strict=True)))
    outputs, results = offline
    texts = set()
    for choice, output, result in zip(choices, outputs, results, strict=True):
        assert choice["prompt_token_ids"] == output.prompt_token_ids
        assert choice["token_ids"] == list(output.outputs[0].token_ids)
        assert choice["text"] == output.outputs[0].text
        assert choice["readout"]["num_tokens"] == result.num_tokens
        told, expected = _flat(choice["readout"]["projections"]), _flat(result.projections)
        assert set(told) == set(expected) == {("kind", KIND_LAYER), ("other", OTHER_LAYER)}
        for key, value in expected.items():
            # float32 sums in the order that a batch happens to have; another layer, span or token is off by far more.
            np.testing.assert_allclose(told[key], value, rtol=1e-4, atol=1e-4)
        texts.add(choice["text"])
    assert len(texts) == len(ASKED)
