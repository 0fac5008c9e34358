"""Steering and readouts on vLLM's own endpoints, of the real server: fields, streams, aliases, guard rails."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from tests.server.conftest import ALIAS, ALIAS_ALPHA, KIND_LAYER, LIMITED_KEY, OTHER_LAYER, ServedModel
from tests.support.tiny_models import HIDDEN_SIZE
from vllm_steer import errors

pytestmark = [pytest.mark.slow, pytest.mark.server]

PROMPT = "Once upon a time there was"
STRONG = [{"direction": "kind", "alpha": ALIAS_ALPHA}]
READOUT = {"layers": [KIND_LAYER], "span": "all", "project": ["kind"]}
GENERATED = 12
# Two runs of one request in float32 may be batched differently and then sum in another order; a wrong layer, span or
# token is off by far more.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def _completion(server: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": GENERATED, "temperature": 0, "ignore_eos": True, **fields}
    reply = server.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def _chat(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": PROMPT}]
    return {
        "model": "tiny",
        "messages": messages,
        "max_tokens": GENERATED,
        "temperature": 0,
        "ignore_eos": True,
        **fields,
    }


def _events(server: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with server.stream("POST", path, json={**body, "stream": True}) as reply:
        assert reply.status_code == 200, reply.read()
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def _traced(events: list[dict[str, Any]], index: int = 0) -> list[float]:
    values: list[float] = []
    for event in events:
        for choice in event.get("choices", ()):
            if choice["index"] == index and "trace" in choice:
                assert choice["trace"]["kind"]["start"] == len(values)
                values += choice["trace"]["kind"]["values"]
    return values


def test_the_field_steers_as_the_wire_in_vllm_xargs_does(server: httpx.Client) -> None:
    plain = _completion(server)["choices"][0]["text"]
    by_field = _completion(server, steering=STRONG)["choices"][0]["text"]
    wire = json.dumps({"v": 1, "steering": STRONG})
    assert by_field == _completion(server, vllm_xargs={"vllm_steer": wire})["choices"][0]["text"]
    assert by_field != plain
    assert _completion(server, steering=[])["choices"][0]["text"] == plain


def test_a_direction_at_several_layers_of_which_one_is_hooked_is_that_one(server: httpx.Client) -> None:
    wide = _completion(server, steering=[{"direction": "wide", "alpha": ALIAS_ALPHA}], readout={"project": ["wide"]})
    kind = _completion(server, steering=STRONG, readout={"project": ["kind"]})
    assert wide["choices"][0]["text"] == kind["choices"][0]["text"]
    told = wide["choices"][0]["readout"]["projections"]["wide"]
    assert told == kind["choices"][0]["readout"]["projections"]["kind"]
    assert set(told) == {str(KIND_LAYER)}


def test_an_alias_is_listed_and_steers_a_client_that_can_send_nothing_else(server: httpx.Client) -> None:
    base, alias = server.get("/v1/models").json()["data"]
    assert (alias["id"], alias["parent"], alias["root"]) == (ALIAS, "tiny", base["root"])
    assert set(alias) == set(base)
    assert (
        _completion(server, model=ALIAS)["choices"][0]["text"]
        == (_completion(server, steering=STRONG)["choices"][0]["text"])
    )


def test_a_readout_stands_beside_an_otherwise_unchanged_completion(server: httpx.Client) -> None:
    plain = _completion(server, steering=STRONG, logprobs=2)
    read = _completion(server, steering=STRONG, logprobs=2, readout={**READOUT, "vectors": True})
    readout = read["choices"][0].pop("readout")
    assert read["choices"] == plain["choices"]
    assert readout["num_tokens"] == plain["usage"]["prompt_tokens"] + GENERATED - 1
    mean = np.frombuffer(base64.b64decode(readout["mean"][str(KIND_LAYER)]), "<f4")
    assert mean.shape == (HIDDEN_SIZE,)


def test_a_projection_is_the_mean_along_the_direction(server: httpx.Client, served: ServedModel) -> None:
    readout = _completion(server, readout={**READOUT, "vectors": True})["choices"][0]["readout"]
    mean = np.frombuffer(base64.b64decode(readout["mean"][str(KIND_LAYER)]), "<f4")
    expected = float(mean @ served.directions[0].vector)
    np.testing.assert_allclose(readout["projections"]["kind"][str(KIND_LAYER)], expected, **TOLERANCE)


def test_vectors_travel_only_when_asked(server: httpx.Client) -> None:
    assert "mean" not in _completion(server, readout=READOUT)["choices"][0]["readout"]
    assert "mean" in _completion(server, readout={"layers": [KIND_LAYER]})["choices"][0]["readout"]


def test_every_choice_of_batched_prompts_and_n_samples_has_its_own_readout(server: httpx.Client) -> None:
    prompts = [PROMPT, "The old man and the sea were"]
    both = _completion(server, prompt=prompts, n=2, temperature=0.8, seed=3, steering=STRONG, readout=READOUT)
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    values = [choice["readout"]["projections"]["kind"][str(KIND_LAYER)] for choice in both["choices"]]
    assert len(set(values)) == 4
    for index, prompt in enumerate(prompts):
        alone = _completion(server, prompt=prompt, n=2, temperature=0.8, seed=3, steering=STRONG, readout=READOUT)
        for sample, choice in enumerate(alone["choices"]):
            together = both["choices"][2 * index + sample]
            assert together["text"] == choice["text"]
            assert together["readout"]["num_tokens"] == choice["readout"]["num_tokens"]
            np.testing.assert_allclose(
                values[2 * index + sample], choice["readout"]["projections"]["kind"][str(KIND_LAYER)], **TOLERANCE
            )


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_carries_the_readout_in_the_chunk_that_ends_a_choice(server: httpx.Client, path: str) -> None:
    body = _chat(n=2, temperature=0.8, seed=3, steering=STRONG, readout=READOUT, stream_options={"include_usage": True})
    if path == "/v1/completions":
        body["prompt"] = PROMPT
        del body["messages"]
    whole = server.post(path, json={name: value for name, value in body.items() if name != "stream_options"}).json()
    events = _events(server, path, body)
    assert events[-1]["usage"]["completion_tokens"] == 2 * GENERATED
    for index in range(2):
        choices = [one for event in events for one in event["choices"] if one["index"] == index]
        (last,) = (one for one in choices if "readout" in one)
        assert last["finish_reason"] == "length"
        expected = whole["choices"][index]["readout"]
        assert last["readout"]["num_tokens"] == expected["num_tokens"]
        np.testing.assert_allclose(
            last["readout"]["projections"]["kind"][str(KIND_LAYER)],
            expected["projections"]["kind"][str(KIND_LAYER)],
            **TOLERANCE,
        )


def test_a_streamed_trace_adds_up_to_the_whole_one_and_its_mean_to_the_projection(server: httpx.Client) -> None:
    asked = _chat(
        max_tokens=100, steering=STRONG, readout={"span": "generated", "trace": ["kind"], "project": ["kind"]}
    )
    choice = server.post("/v1/chat/completions", json=asked).json()["choices"][0]
    whole = choice["readout"]["trace"]["kind"]["values"]
    events = _events(server, "/v1/chat/completions", asked)
    streamed = _traced(events)
    assert len(streamed) == len(whole) == choice["readout"]["num_tokens"]
    np.testing.assert_allclose(streamed, whole, **TOLERANCE)
    np.testing.assert_allclose(np.mean(whole), choice["readout"]["projections"]["kind"][str(KIND_LAYER)], **TOLERANCE)
    assert sum("trace" in one for event in events for one in event["choices"]) > 1  # live, not all at the end


def test_responses_carry_a_readout_of_their_own(server: httpx.Client) -> None:
    body = {
        "model": "tiny",
        "input": PROMPT,
        "max_output_tokens": GENERATED,
        "temperature": 0,
        "steering": STRONG,
        "readout": {**READOUT, "trace": ["kind"]},
    }
    reply = server.post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    readout = reply.json()["readout"]
    assert readout["num_tokens"] == len(readout["trace"]["kind"]["values"]) > GENERATED // 2
    closing = _events(server, "/v1/responses", body)[-1]["response"]
    assert closing["readout"]["num_tokens"] == readout["num_tokens"]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"steering": [{"direction": "kind"}]}, "BadAlpha"),
        ({"steering": [{"direction": "kind", "alpha": 1, "strength": 2}]}, "UnknownField"),
        ({"steering": [{"direction": "nobody", "alpha": 1}]}, "UnknownDirection"),
        ({"steering": [{"direction": "kind", "alpha": 1}] * 9}, "TooManyEntries"),
        ({"readout": {"layers": [0]}}, "LayerNotHooked"),
        ({"readout": {"layers": [KIND_LAYER], "skip_first": 200}}, "BadReadout"),  # only the engine can know
        ({"steering": STRONG, "vllm_xargs": {"vllm_steer": "{}"}}, "MalformedSpec"),
        ({"steering": STRONG, "use_beam_search": True, "n": 2}, "MalformedSpec"),
        ({"extra_body": {"steering": STRONG}}, "MisplacedField"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_a_true_http_error_whether_a_stream_was_asked_or_not(
    server: httpx.Client, fields: dict[str, Any], kind: str, stream: bool
) -> None:
    refused = server.post("/v1/chat/completions", json=_chat(**fields, stream=stream))
    assert refused.status_code == 400, refused.text
    assert refused.headers["content-type"].startswith("application/json")
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == (kind, getattr(errors, kind)("").code)


def test_a_key_may_name_only_the_directions_that_the_operator_opened_to_it(server: httpx.Client) -> None:
    limited = {"Authorization": f"Bearer {LIMITED_KEY}"}
    other = [{"direction": "other", "alpha": 1.0}]
    assert server.post("/v1/chat/completions", json=_chat(steering=other)).status_code == 200
    refused = server.post("/v1/chat/completions", json=_chat(steering=other), headers=limited)
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "DirectionNotAllowed")
    assert server.post("/v1/chat/completions", json=_chat(steering=STRONG), headers=limited).status_code == 200
    message = {
        "model": "tiny",
        "max_tokens": 4,
        "messages": [{"role": "user", "content": PROMPT}],
        "vllm_xargs": {"vllm_steer": json.dumps({"steering": other})},
    }
    assert server.post("/v1/messages", json=message, headers=limited).status_code == 403


def test_requests_that_repeat_an_id_at_the_same_time_get_each_its_own_readout(server: httpx.Client) -> None:
    def mean_layers(layer: int) -> list[str]:
        body = _chat(max_tokens=40, readout={"layers": [layer]})
        reply = server.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "the-same"}).json()
        assert reply["id"] == "chatcmpl-the-same"
        return list(reply["choices"][0]["readout"]["mean"])

    layers = [OTHER_LAYER, KIND_LAYER] * 4
    with ThreadPoolExecutor(len(layers)) as pool:
        assert list(pool.map(mean_layers, layers)) == [[str(layer)] for layer in layers]


def test_structured_output_is_kept_to_while_steered_and_read(server: httpx.Client) -> None:
    asked = _chat(steering=STRONG, readout=READOUT, ignore_eos=False, structured_outputs={"choice": ["yes", "no"]})
    choice = server.post("/v1/chat/completions", json=asked).json()["choices"][0]
    assert choice["message"]["content"] in ("yes", "no")
    assert choice["readout"]["num_tokens"] > 0
