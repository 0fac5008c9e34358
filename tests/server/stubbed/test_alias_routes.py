"""Aliases made over HTTP, without an engine: who may make them, which names, what keeps them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.server.stubbed.test_steering_routes import (
    ADMIN,
    CAPACITY,
    KIND,
    LAYER,
    SETTINGS,
    SIZE,
    fake_write,
    put_raw,
    refusal,
)
from tests.server.stubbed.test_steering_routes import client as client
from vllm_steer import Steering
from vllm_steer.server.registry.aliases import ServedAliases
from vllm_steer.server.registry.registry_folder import RegistryDirectory, Server
from vllm_steer.server.registry.shared_registry import SharedRegistry

ROOT = "/v1/steering/aliases"
ENTRY = {"direction": "needed", "alpha": 2.0, "op": "set", "span": "response"}
WHOLE = Steering("needed", 2.0, op="set", span="response").to_json()


def put(client: TestClient, name: str, *entries: dict[str, Any], **headers: str) -> httpx.Response:
    return client.put(f"{ROOT}/{name}", json={"steering": list(entries or [ENTRY])}, headers=ADMIN | headers)


def test_an_alias_is_put_listed_replaced_and_deleted(client: TestClient) -> None:
    made = put(client, "soft")
    assert (made.status_code, made.json()) == (201, {"alias": "soft", "steering": [WHOLE]})
    for listed in (client.get(ROOT).json()["aliases"], client.get("/v1/steering").json()["aliases"]):
        assert listed["soft"] == [WHOLE]
        assert "model-kind" in listed  # of the settings
    again = put(client, "soft", {**ENTRY, "alpha": 3.0})
    assert (again.status_code, again.json()["steering"][0]["alpha"]) == (200, 3.0)
    assert client.delete(f"{ROOT}/soft", headers=ADMIN).json() == {"deleted": "soft"}
    assert "soft" not in client.get(ROOT).json()["aliases"]
    assert "allowed: none" in refusal(client.delete(f"{ROOT}/soft", headers=ADMIN), 404, "AliasNotFound")


def test_only_the_admin_key_makes_and_removes_aliases(client: TestClient) -> None:
    for key, status, kind in (({}, 401, "AdminKeyMissing"), ({"X-Admin-Key": "no"}, 403, "ChangeNotAllowed")):
        refusal(client.put(f"{ROOT}/soft", json={"steering": [ENTRY]}, headers=key), status, kind)
        refusal(client.delete(f"{ROOT}/soft", headers=key), status, kind)
    assert "soft" not in client.get(ROOT).json()["aliases"]


@pytest.mark.parametrize(
    ("name", "told"), [("model", "the model itself"), ("model-kind", "served_aliases"), ("model-careful", "settings")]
)
def test_a_name_that_means_something_else_is_refused(client: TestClient, name: str, told: str) -> None:
    assert told in refusal(put(client, name), 409, "BadAlias")
    assert client.delete(f"{ROOT}/{name}", headers=ADMIN).status_code == (404 if name == "model" else 409)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"steering": []}, "MalformedSpec"),
        ({}, "MalformedSpec"),
        ({"steering": [ENTRY], "readout": {"layers": [1]}}, "MalformedSpec"),
        ({"steering": [{**ENTRY, "alfa": 1}]}, "UnknownField"),
        ({"steering": [{**ENTRY, "direction": "nobody"}]}, "UnknownDirection"),
    ],
)
def test_an_alias_that_could_not_steer_is_refused(client: TestClient, body: dict[str, Any], kind: str) -> None:
    refusal(client.put(f"{ROOT}/soft", json=body, headers=ADMIN), 400, kind)
    assert "soft" not in client.get(ROOT).json()["aliases"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"steering": [], "steering": []}', b"[]", b"[" * 20_000])
def test_a_body_that_is_no_object_of_entries_is_refused(client: TestClient, body: bytes) -> None:
    refusal(client.put(f"{ROOT}/soft", content=body, headers=ADMIN), 400, "MalformedSpec")


def test_a_direction_that_an_alias_needs_stays(client: TestClient) -> None:
    put_raw(client, "own", KIND.vector)
    assert put(client, "soft", {"direction": "own", "alpha": 1.0}).status_code == 201
    told = refusal(client.delete("/v1/steering/directions/own", headers=ADMIN), 409, "DirectionNeeded")
    assert "alias 'soft' needs 'own'" in told
    client.delete(f"{ROOT}/soft", headers=ADMIN)
    assert client.delete("/v1/steering/directions/own", headers=ADMIN).status_code == 200


def joined(folder: Path, server: Server) -> SharedRegistry:
    registry = SharedRegistry(RegistryDirectory(folder), server, CAPACITY, SIZE, fake_write)
    asyncio.run(registry.start([KIND]))
    return registry


def test_another_process_and_the_next_server_have_the_aliases(tmp_path: Path) -> None:
    soft = (Steering("kind", 2.0, op="set", span="response"),)
    first, second = (joined(tmp_path, Server(1, 1.0)) for _ in range(2))
    aliases = ServedAliases(SETTINGS, second)
    assert "soft" not in aliases.current()
    assert asyncio.run(first.put_alias("soft", soft, lambda: None))
    assert aliases.current() == {"soft": soft, **SETTINGS.served_aliases}
    assert aliases.current() is aliases.current()
    asyncio.run(first.put([KIND], lambda before, after: None))  # another change keeps them
    for registry in (first, second):
        assert dict(registry.aliases()) == {"soft": soft}
        registry.close()
    later = joined(tmp_path, Server(2, 2.0))
    assert dict(later.aliases()) == {"soft": soft}
    assert asyncio.run(later.remove_alias("soft"))
    assert not asyncio.run(later.remove_alias("soft"))
    assert dict(later.aliases()) == {}
    later.close()


def test_an_index_of_before_aliases_is_read(tmp_path: Path) -> None:
    registry = joined(tmp_path, Server(1, 1.0))
    index = tmp_path / "index.json"
    told = json.loads(index.read_text())
    assert told.pop("aliases") == {}
    index.write_text(json.dumps(told))
    again = SharedRegistry(RegistryDirectory(tmp_path), Server(1, 1.0), CAPACITY, SIZE, fake_write)
    assert (dict(again.aliases()), [one.name for one in again.all()]) == ({}, [KIND.name])
    registry.close()
    again.close()
    assert KIND.layer == LAYER
