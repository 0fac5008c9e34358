"""The real server, for clients that set only a model name or a header, and for those that drop readouts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import ADMIN_KEY, ALIAS, ALIAS_ALPHA, API_KEY, KIND_LAYER, LIMITED_KEY, ORIGIN, ServedModel

pytestmark = [pytest.mark.slow, pytest.mark.server]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
STRONG = [{"direction": "kind", "alpha": ALIAS_ALPHA}]
READOUT = {"span": "generated", "project": ["kind"], "trace": ["kind"]}
QUESTION: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Once upon a time"}],
    "max_tokens": 8,
    "temperature": 0,
    "ignore_eos": True,
}
ADMIN = {"X-Admin-Key": ADMIN_KEY}


def text(server: httpx.Client, model: str = "tiny", headers: dict[str, str] | None = None, **fields: Any) -> str:
    reply = server.post(CHAT, json={**QUESTION, "model": model, **fields}, headers=headers)
    assert reply.status_code == 200, reply.text
    assert ("x-vllm-steer" in reply.headers) == (model != "tiny" or bool(headers) or bool(fields))
    return str(reply.json()["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def plain(server: httpx.Client) -> str:
    return text(server)


@pytest.fixture(scope="module")
def steered(server: httpx.Client, plain: str) -> str:
    answer = text(server, steering=STRONG)
    assert answer != plain
    return answer


@pytest.fixture
def alias(server: httpx.Client) -> Iterator[str]:
    """A name that a test may make an alias."""
    yield "tiny-put"
    server.delete("/v1/steering/aliases/tiny-put", headers=ADMIN)


def test_a_model_name_says_its_steering(server: httpx.Client, plain: str, steered: str) -> None:
    assert text(server, f"tiny@kind:{ALIAS_ALPHA}") == steered
    assert text(server, f"tiny@kind:{ALIAS_ALPHA}@{KIND_LAYER};span=all") == steered
    assert text(server, "tiny@kind:0") == plain
    assert text(server, f"{ALIAS}@kind:-{ALIAS_ALPHA}") == plain  # the alias's entry and this one cancel out
    generated = text(server, steering=[{**STRONG[0], "span": "generated"}])
    assert text(server, f"tiny@kind:{ALIAS_ALPHA};span=generated") == generated


def test_the_openai_client_takes_such_a_model_name(served: ServedModel, steered: str) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=API_KEY, max_retries=0)
    fields = {name: value for name, value in QUESTION.items() if name != "ignore_eos"}
    reply = client.chat.completions.create(model=f"tiny@kind:{ALIAS_ALPHA}", **fields)
    assert steered.startswith(str(reply.choices[0].message.content))
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny@knid:3", **fields)
    assert (refused.value.code, refused.value.param) == ("unknown_direction", "steering[0]")
    assert "Perhaps you mean 'kind'." in str(refused.value)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="tinny@kind:3", **fields)
    limited = openai.OpenAI(base_url=f"{served.url}/v1", api_key=LIMITED_KEY, max_retries=0)
    with pytest.raises(openai.PermissionDeniedError):
        limited.chat.completions.create(model="tiny@other:3", **fields)


def test_a_header_steers_and_reads(server: httpx.Client, served: ServedModel, steered: str) -> None:
    assert text(server, headers={"X-Steering": f"kind:{ALIAS_ALPHA}"}) == steered
    client = openai.OpenAI(
        base_url=f"{served.url}/v1",
        api_key=API_KEY,
        default_headers={"X-Steering": json.dumps({"steering": STRONG, "readout": READOUT})},
    )
    fields = {name: value for name, value in QUESTION.items() if name != "ignore_eos"}
    [choice] = client.chat.completions.create(model="tiny", extra_body={"ignore_eos": True}, **fields).choices
    assert choice.message.content == steered
    assert choice.readout["num_tokens"] == 7
    assert client.models.list().data  # other requests of such a client go on


def test_an_alias_put_over_http_steers_at_once_and_is_counted(
    server: httpx.Client, alias: str, plain: str, steered: str
) -> None:
    path = f"/v1/steering/aliases/{alias}"
    assert server.post(CHAT, json={**QUESTION, "model": alias}).status_code == 404
    assert server.put(path, json={"steering": STRONG}, headers=ADMIN).status_code == 201
    assert text(server, alias) == steered
    assert alias in [model["id"] for model in server.get("/v1/models").json()["data"]]
    counted = 'vllm_steer_alias_requests_total{alias="tiny-put"} 1.0'
    assert counted in server.get("/metrics").text
    assert server.put(path, json={"steering": [{**STRONG[0], "alpha": 0.0}]}, headers=ADMIN).status_code == 200
    assert text(server, alias) == plain
    assert server.put("/v1/steering/aliases/tiny", json={"steering": STRONG}, headers=ADMIN).status_code == 409
    assert server.delete(path, headers=ADMIN).status_code == 200
    assert server.post(CHAT, json={**QUESTION, "model": alias}).status_code == 404


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {**QUESTION, "n": 2, "seed": 1, "temperature": 1.0}),
        (COMPLETIONS, {"prompt": ["Once", "Twice"], "max_tokens": 4, "ignore_eos": True}),
        ("/v1/messages", {**QUESTION}),
        ("/v1/responses", {"input": "Once upon a time", "max_output_tokens": 4, "temperature": 0}),
    ],
)
def test_a_readout_is_given_by_the_replys_id_the_same_for_whole_and_streamed_replies(
    server: httpx.Client, served: ServedModel, path: str, fields: dict[str, Any]
) -> None:
    body = {"model": "tiny", **fields, "steering": STRONG, "readout": READOUT}
    whole = server.post(path, json=body).json()
    told = server.get(f"/v1/steering/readouts/{whole['id']}").json()
    shown = [choice["readout"] for choice in whole.get("choices", [whole])]
    assert told == {"id": whole["id"], "readouts": [{"index": i, "readout": one} for i, one in enumerate(shown)]}
    assert all(one["trace"]["kind"]["values"] for one in shown)

    with server.stream("POST", path, json={**body, "stream": True}) as reply:
        events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    ids = {str(found) for event in events if (found := _id_in(event)) is not None}
    (reply_id,) = ids
    kept = server.get(f"/v1/steering/readouts/{reply_id}").json()
    streamed = sorted(kept["readouts"], key=lambda one: one["index"])
    assert [one["readout"]["num_tokens"] for one in streamed] == [one["num_tokens"] for one in shown]
    assert all(one["readout"]["trace"]["kind"]["values"] for one in streamed)

    other = httpx.get(
        f"{served.url}/v1/steering/readouts/{reply_id}", headers={"Authorization": f"Bearer {LIMITED_KEY}"}
    )
    assert (other.status_code, other.json()["error"]["code"]) == (404, "readout_not_found")
    assert httpx.get(f"{served.url}/v1/steering/readouts/{reply_id}").status_code == 401


def _id_in(event: dict[str, Any]) -> str | None:
    for holder in (event, event.get("message", {}), event.get("response", {})):
        if isinstance(holder.get("id"), str):
            return str(holder["id"])
    return None


def test_a_script_of_another_origin_may_read_the_headers_of_the_plugin(server: httpx.Client) -> None:
    body = {**QUESTION, "model": "tiny", "steering": STRONG}
    reply = server.post(CHAT, json=body, headers={"Origin": ORIGIN})
    assert reply.headers["access-control-allow-origin"] == ORIGIN
    assert "x-vllm-steer" in reply.headers["access-control-expose-headers"]
    direction = server.get("/v1/steering/directions/kind", headers={"Origin": ORIGIN})
    assert "ETag" in direction.headers["access-control-expose-headers"]
