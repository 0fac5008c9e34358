"""A direction's life on a real server: registered, used, replaced under load, kept from outdated changes, deleted."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import ADMIN_KEY, ALIAS, KIND_LAYER
from tests.support.tiny_models import HIDDEN_SIZE
from vllm_steer import Direction

pytestmark = [pytest.mark.slow, pytest.mark.server]

NAME = "life/cycle"
ROUTE = "/v1/steering/directions/life%2Fcycle"
CLIENTS, REPLACEMENTS = 6, 20
ADMIN = {"X-Admin-Key": ADMIN_KEY}
RNG = np.random.default_rng(7)
BOTH = tuple(Direction(NAME, KIND_LAYER, RNG.standard_normal(HIDDEN_SIZE)).normalised() for _ in range(2))


def put(server: httpx.Client, direction: Direction, **headers: str) -> httpx.Response:
    body = direction.vector.astype("<f4").tobytes()
    return server.put(ROUTE, params={"layer": KIND_LAYER}, content=body, headers={**ADMIN, **headers})


def complete(server: httpx.Client, prompt: str = "Once upon a time there was") -> httpx.Response:
    steering = [{"direction": NAME, "alpha": 50.0}]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0, "steering": steering}
    return server.post("/v1/completions", json=body)


def text(server: httpx.Client) -> str:
    return str(complete(server).json()["choices"][0]["text"])


def test_a_direction_lives_and_goes_while_requests_run(server: httpx.Client) -> None:
    assert complete(server).status_code == 400
    first = put(server, BOTH[0])
    assert first.status_code == 201
    texts = [text(server)]
    assert put(server, BOTH[1]).status_code == 200
    texts.append(text(server))
    assert texts[0] != texts[1], "both directions say the same, so this would test nothing"
    late = put(server, BOTH[0], **{"If-Match": first.headers["ETag"]})
    assert (late.status_code, late.json()["error"]["type"]) == (412, "DirectionChanged")

    stop = Event()

    def keep_asking() -> list[httpx.Response]:
        replies = []
        while not stop.is_set():
            replies.append(complete(server))
        return replies

    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(keep_asking) for _ in range(CLIENTS)]
        try:
            for index in range(REPLACEMENTS):
                direction = BOTH[index % 2]
                tag = server.get(ROUTE).headers["ETag"]
                assert put(server, direction, **{"If-Match": tag}).status_code == 200
                # A request after the change gets the new content, whatever the prefix cache holds of the old.
                assert text(server) == texts[index % 2]
        finally:
            stop.set()
        replies = [reply for replies in asking for reply in replies.result()]
    assert {reply.status_code for reply in replies} == {200}
    # A replacement that reached a running request would have made a third text, from both directions.
    assert {reply.json()["choices"][0]["text"] for reply in replies} == set(texts)
    assert server.delete(ROUTE, headers=ADMIN).status_code == 200
    assert server.get(ROUTE).status_code == 404
    assert complete(server).status_code == 400


def test_changes_need_the_admin_key_beside_the_api_key(server: httpx.Client) -> None:
    assert server.delete(ROUTE).status_code == 401
    assert server.delete(ROUTE, headers={"X-Admin-Key": "wrong"}).status_code == 403
    assert httpx.delete(f"{server.base_url}{ROUTE}", headers=ADMIN).status_code == 401  # no API key


def test_what_an_alias_stands_for_cannot_be_deleted(server: httpx.Client) -> None:
    refused = server.delete("/v1/steering/directions/kind", headers=ADMIN)
    assert (refused.status_code, refused.json()["error"]["type"]) == (409, "DirectionNeeded")
    body = {"model": ALIAS, "prompt": "Once", "max_tokens": 2}
    assert server.post("/v1/completions", json=body).status_code == 200


def test_the_metrics_count_requests_tokens_refusals_and_slots(server: httpx.Client) -> None:
    def count(name: str, **labels: str) -> float:
        families = text_string_to_metric_families(server.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def counts() -> list[float]:
        return [
            count("vllm_steer_requests_total", direction="kind"),
            count("vllm_steer_tokens_total", direction="kind"),
            count("vllm_steer_readouts_total"),
            count("vllm_steer_refusals_total", reason="UnknownDirection"),
        ]

    before = counts()
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 3, "ignore_eos": True}
    asked = {
        "steering": [{"direction": "kind", "alpha": 1.0}],
        "readout": {"layers": [KIND_LAYER], "project": ["kind"]},
    }
    assert server.post("/v1/completions", json={**body, **asked}).status_code == 200
    assert server.post("/v1/completions", json=body).status_code == 200
    wrong = {"steering": [{"direction": "nowhere", "alpha": 1.0}]}
    assert server.post("/v1/completions", json={**body, **wrong}).status_code == 400
    assert [after - was for after, was in zip(counts(), before, strict=True)] == [1.0, 3.0, 1.0, 1.0]
    bank = server.get("/v1/steering").json()["bank"]
    assert {state: count("vllm_steer_bank_slots", state=state) for state in bank} == bank
