"""The routes under /v1/steering, without an engine: what goes in and out of the registry, and who may change it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vllm_steer import Direction, Steering, When, errors, load_directions, save_directions
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.server.readouts.kept_readouts import KeptReadouts
from vllm_steer.server.readouts.routes import KEPT, readout_router
from vllm_steer.server.registry.alias_routes import alias_router
from vllm_steer.server.registry.aliases import ServedAliases
from vllm_steer.server.registry.registry_folder import RegistryDirectory, Server
from vllm_steer.server.registry.routes import SERVER, SteeredServer, router
from vllm_steer.server.registry.shared_registry import SharedRegistry
from vllm_steer.settings import SteerSettings

SIZE, CAPACITY, LAYER, BLOCKS = 8, 6, 2, 5
ADMIN = {"X-Admin-Key": "admin-secret"}
ROOT = "/v1/steering/directions"
RNG = np.random.default_rng(0)
KIND, OTHER, THIRD = (Direction("kind", LAYER, RNG.standard_normal(SIZE)).normalised() for _ in range(3))
MODEL = {
    "architecture": "LlamaForCausalLM",
    "proof": "experiment",
    "experiment": {"layers": [{"path": "some.Layer"}, {"path": "another.Layer"}, {"path": "some.Layer"}]},
}
SETTINGS = SteerSettings(
    layers=(1, LAYER),
    max_directions=CAPACITY,
    max_upload_mib=1,
    served_aliases={
        "model-kind": (Steering("needed", 3.0),),
        "model-careful": (Steering("needed", 3.0, when=When("seen", above=0.5)),),
    },
)


async def fake_write(writes: list[tuple[int, Direction]]) -> None:
    """Stands in for the workers; it accepts every write."""


def admitted_by(registry: SharedRegistry) -> Callable[[RequestSpec], None]:
    """Stands in for admission: every entry's direction must be registered at a hooked layer."""

    def check(spec: RequestSpec) -> None:
        for entry in spec.entries:
            registry.find(entry.direction, entry.layer, SETTINGS.layers)

    return check


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("VLLM_STEER_ADMIN_KEY", ADMIN["X-Admin-Key"])
    registry = SharedRegistry(RegistryDirectory(tmp_path), Server(1, 1.0), CAPACITY, SIZE, fake_write)
    asyncio.run(registry.start([Direction("needed", LAYER, KIND.vector)]))
    app = FastAPI()
    app.include_router(router)
    for one in (alias_router, readout_router):
        app.include_router(one)
    aliases = ServedAliases(SETTINGS, registry)
    taken = {"model": "the model itself"}.get
    SERVER.put(app.state, SteeredServer(SETTINGS, registry, MODEL, aliases, admitted_by(registry), taken, BLOCKS))
    KEPT.put(app.state, KeptReadouts(registry.directory.readouts, 1, 60.0))
    with TestClient(app, raise_server_exceptions=True) as made:
        yield made
    registry.close()


def file_of(*directions: Direction, folder: Path) -> bytes:
    save_directions(folder / "sent.safetensors", directions)
    return (folder / "sent.safetensors").read_bytes()


def put_raw(
    client: TestClient, name: str, vector: Any, layer: int = LAYER, headers: dict[str, str] = ADMIN
) -> httpx.Response:
    body = np.asarray(vector, "<f4").tobytes()
    return client.put(f"{ROOT}/{name}", params={"layer": layer}, content=body, headers=headers)


def names(client: TestClient) -> list[tuple[str, int]]:
    return [(one["name"], one["layer"]) for one in client.get(ROOT).json()["directions"]]


def refusal(reply: httpx.Response, status: int, kind: str) -> str:
    """The message of a refusal in OpenAI's shape."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == (kind, getattr(errors, kind)("").code)
    return str(error["message"])


def test_a_direction_is_put_listed_fetched_and_deleted(client: TestClient, tmp_path: Path) -> None:
    made = put_raw(client, "kind", KIND.vector)
    assert made.status_code == 201
    assert made.headers["ETag"] == f'"{KIND.content_hash}"'
    about = {"content_hash": KIND.content_hash, "is_unit": True, "norm": KIND.norm, "hooked": True}
    listed = {"name": "kind", "layer": LAYER, **about}
    assert made.json() == {"directions": [listed]}
    assert listed in client.get(ROOT).json()["directions"]
    fetched = client.get(f"{ROOT}/kind")
    assert fetched.headers["ETag"] == made.headers["ETag"]
    (tmp_path / "fetched.safetensors").write_bytes(fetched.content)
    (direction,) = load_directions(tmp_path / "fetched.safetensors")
    assert (direction.key, direction.content_hash) == (f"kind@{LAYER}", KIND.content_hash)
    assert client.delete(f"{ROOT}/kind", headers=ADMIN).json() == {"deleted": [listed]}
    assert "'kind'" in refusal(client.get(f"{ROOT}/kind"), 404, "DirectionNotFound")
    refusal(client.delete(f"{ROOT}/kind", headers=ADMIN), 404, "DirectionNotFound")


def test_a_layer_that_the_model_lacks_is_refused_and_one_that_is_not_hooked_is_noted(
    client: TestClient, tmp_path: Path
) -> None:
    made = put_raw(client, "kind", KIND.vector, layer=BLOCKS - 1)
    assert made.status_code == 201
    assert [one["hooked"] for one in made.json()["directions"]] == [False]
    assert {one["name"]: one["hooked"] for one in client.get(ROOT).json()["directions"]} == {
        "kind": False,
        "needed": True,
    }
    before = names(client)
    both = [Direction("both", LAYER, KIND.vector), Direction("both", 99, OTHER.vector)]
    for refused in (
        put_raw(client, "kind", KIND.vector, layer=BLOCKS),
        client.put(f"{ROOT}/both", content=file_of(*both, folder=tmp_path), headers=ADMIN),
    ):
        assert f"the model has layers 0 to {BLOCKS - 1}" in refusal(refused, 400, "LayerNotHooked")
    assert names(client) == before, "nothing of a refused file is registered"


def test_a_file_holds_a_name_at_several_layers_and_each_can_be_addressed(client: TestClient, tmp_path: Path) -> None:
    both = [Direction("two/parts", 1, KIND.vector), Direction("two/parts", LAYER, OTHER.vector)]
    made = client.put(f"{ROOT}/two%2Fparts", content=file_of(*both, folder=tmp_path), headers=ADMIN)
    assert made.status_code == 201
    whole, one = client.get(f"{ROOT}/two/parts"), client.get(f"{ROOT}/two/parts", params={"layer": 1})
    assert whole.headers["ETag"] == made.headers["ETag"] != one.headers["ETag"] == f'"{KIND.content_hash}"'
    (tmp_path / "whole.safetensors").write_bytes(whole.content)
    assert [direction.key for direction in load_directions(tmp_path / "whole.safetensors")] == [
        "two/parts@1",
        f"two/parts@{LAYER}",
    ]
    refusal(client.get(f"{ROOT}/two/parts", params={"layer": 5}), 404, "DirectionNotFound")
    assert client.delete(f"{ROOT}/two/parts", params={"layer": 1}, headers=ADMIN).status_code == 200
    assert ("two/parts", LAYER) in names(client)
    assert ("two/parts", 1) not in names(client)


def test_the_overview_tells_layers_limits_bank_and_aliases(client: TestClient) -> None:
    put_raw(client, "kind", KIND.vector)
    shown = client.get("/v1/steering").json()
    assert shown["layers"] == [1, LAYER]
    assert shown["bank"] == {"registered": 2, "held": 0, "free": CAPACITY - 2}
    assert shown["aliases"] == {
        "model-kind": [Steering("needed", 3.0).to_json()],
        "model-careful": [Steering("needed", 3.0, when=When("seen", above=0.5)).to_json()],
    }
    assert [one["name"] for one in shown["directions"]] == ["kind", "needed"]
    assert shown["changes"] is True


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_changes_need_the_admin_key(client: TestClient, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(headers: dict[str, str] | dict[str, bytes]) -> httpx.Response:
        content = KIND.vector.tobytes() if method == "PUT" else None
        return client.request(method, f"{ROOT}/needed", params={"layer": LAYER}, content=content, headers=headers)

    before = names(client)
    assert "X-Admin-Key" in refusal(change({}), 401, "AdminKeyMissing")
    for wrong in ("wrong", "", "admin-secret ä".encode()):
        refusal(change({"X-Admin-Key": wrong}), 403, "ChangeNotAllowed")
    monkeypatch.delenv("VLLM_STEER_ADMIN_KEY")
    assert "VLLM_STEER_ADMIN_KEY" in refusal(change(ADMIN), 403, "ChangeNotAllowed")
    monkeypatch.setenv("VLLM_STEER_ADMIN_KEY", "")
    refusal(change({"X-Admin-Key": ""}), 403, "ChangeNotAllowed")  # an empty key counts as none
    assert names(client) == before
    assert client.get("/v1/steering").json()["changes"] is False


def test_conditions_keep_one_client_from_overwriting_another(client: TestClient) -> None:
    first = put_raw(client, "kind", KIND.vector).headers["ETag"]
    second = put_raw(client, "kind", OTHER.vector, headers={**ADMIN, "If-Match": first})
    assert second.status_code == 200
    late = put_raw(client, "kind", THIRD.vector, headers={**ADMIN, "If-Match": first})
    assert first in refusal(late, 412, "DirectionChanged")
    assert client.get(f"{ROOT}/kind").headers["ETag"] == second.headers["ETag"]
    refusal(client.delete(f"{ROOT}/kind", headers={**ADMIN, "If-Match": first}), 412, "DirectionChanged")
    new_only = {**ADMIN, "If-None-Match": "*"}
    refusal(put_raw(client, "kind", THIRD.vector, headers=new_only), 412, "DirectionChanged")
    assert put_raw(client, "fresh", THIRD.vector, headers=new_only).status_code == 201
    refusal(put_raw(client, "absent", THIRD.vector, headers={**ADMIN, "If-Match": "*"}), 412, "DirectionChanged")
    either = {**ADMIN, "If-Match": f"{first}, {second.headers['ETag']}"}
    assert put_raw(client, "kind", THIRD.vector, headers=either).status_code == 200
    weak = {**ADMIN, "If-Match": f'W/"{THIRD.content_hash}"'}  # a weak tag never matches (RFC 9110, 13.1.1)
    refusal(put_raw(client, "kind", KIND.vector, headers=weak), 412, "DirectionChanged")


def test_what_a_client_has_already_is_not_sent_again(client: TestClient) -> None:
    tag = put_raw(client, "kind", KIND.vector).headers["ETag"]
    unchanged = client.get(f"{ROOT}/kind", headers={"If-None-Match": tag})
    assert (unchanged.status_code, unchanged.content, unchanged.headers["ETag"]) == (304, b"", tag)
    put_raw(client, "kind", OTHER.vector)
    assert client.get(f"{ROOT}/kind", headers={"If-None-Match": tag}).status_code == 200


def test_what_an_alias_needs_can_be_replaced_and_not_taken_away(client: TestClient) -> None:
    assert put_raw(client, "needed", OTHER.vector).status_code == 200
    assert "'model-kind'" in refusal(client.delete(f"{ROOT}/needed", headers=ADMIN), 409, "DirectionNeeded")
    # At a second layer the name would be ambiguous, and the alias names none.
    refusal(put_raw(client, "needed", OTHER.vector, layer=1), 409, "DirectionNeeded")
    assert names(client) == [("needed", LAYER)]


def test_what_an_alias_s_condition_looks_at_is_needed_too(client: TestClient) -> None:
    assert put_raw(client, "seen", OTHER.vector).status_code == 201
    assert "'model-careful'" in refusal(client.delete(f"{ROOT}/seen", headers=ADMIN), 409, "DirectionNeeded")


def test_a_full_bank_is_a_conflict(client: TestClient) -> None:
    for index in range(CAPACITY - 1):
        assert put_raw(client, f"d{index}", KIND.vector).status_code == 201
    refusal(put_raw(client, "one-more", KIND.vector), 409, "BankFull")
    assert client.delete(f"{ROOT}/d0", headers=ADMIN).status_code == 200
    assert put_raw(client, "one-more", KIND.vector).status_code == 201


@pytest.mark.parametrize(
    ("body", "layer", "status", "kind"),
    [
        (b"", LAYER, 400, "BadVector"),
        (b"\0" * 4 * SIZE, LAYER, 400, "BadVector"),
        (np.full(SIZE, np.nan, "<f4").tobytes(), LAYER, 400, "BadVector"),
        (np.full(SIZE, np.inf, "<f4").tobytes(), LAYER, 400, "BadVector"),
        (np.ones(SIZE + 1, "<f4").tobytes(), LAYER, 400, "WrongDimension"),
        (np.ones(SIZE, "<f4").tobytes()[:-1], LAYER, 400, "BadDirectionFile"),
        (b"", None, 400, "BadDirectionFile"),
        (b"not safetensors", None, 400, "BadDirectionFile"),
        (b"\x80\x04\x95", None, 400, "BadDirectionFile"),  # how a pickle begins
        (b"\xff" * 8 + b"{}", None, 400, "BadDirectionFile"),  # a header longer than the file
        (b"\0" * ((1 << 20) + 1), None, 413, "UploadTooLarge"),
    ],
)
def test_an_unusable_upload_is_refused(
    client: TestClient, body: bytes, layer: int | None, status: int, kind: str
) -> None:
    params = {} if layer is None else {"layer": layer}
    message = refusal(client.put(f"{ROOT}/bad", params=params, content=body, headers=ADMIN), status, kind)
    assert "/tmp" not in message
    assert names(client) == [("needed", LAYER)]


def test_an_upload_that_does_not_say_how_long_it_is_is_cut_off_at_the_limit(client: TestClient) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 64 << 20:
            sent += 1 << 18
            yield b"\0" * (1 << 18)

    refusal(client.put(f"{ROOT}/bad", content=endless(), headers=ADMIN), 413, "UploadTooLarge")


def test_files_of_other_packages_are_taken_under_the_name_in_the_url(client: TestClient, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((LAYER + 2, SIZE)).astype("<f4")
    torch.save(torch.from_numpy(rows), tmp_path / "rows.pt")
    np.save(tmp_path / "row.npy", rows[1])
    save_directions(tmp_path / "one.gguf", [Direction("other", LAYER, rows[0])])
    (tmp_path / "one.svec").write_text(json.dumps({"directions": {str(LAYER): rows[2].tolist()}}))
    sent = {
        "rows.pt": ({"format": "pt", "layer_index": "hidden_states", "layer": LAYER + 1}, rows[LAYER + 1]),
        "row.npy": ({"format": "npy", "layer": LAYER}, rows[1]),
        "one.gguf": ({"format": "gguf"}, rows[0]),
        "one.svec": ({"format": "svec"}, rows[2]),
    }
    for number, (file, (params, vector)) in enumerate(sent.items()):
        body = (tmp_path / file).read_bytes()
        reply = client.put(f"{ROOT}/kind", params=params, content=body, headers=ADMIN)
        assert reply.status_code == (200 if number else 201), reply.text
        assert reply.json()["directions"][0]["content_hash"] == Direction("kind", LAYER, vector).content_hash
        assert names(client) == [("kind", LAYER), ("needed", LAYER)]
    stack = (tmp_path / "rows.pt").read_bytes()
    message = refusal(
        client.put(f"{ROOT}/kind", params={"format": "pt"}, content=stack, headers=ADMIN), 400, "BadDirectionFile"
    )
    assert "how it counts layers" in message
    assert "/tmp" not in message
    renamed = file_of(Direction("other", LAYER, KIND.vector), folder=tmp_path)
    assert client.put(f"{ROOT}/warm", content=renamed, headers=ADMIN).status_code == 201
    assert ("warm", LAYER) in names(client)


def test_a_file_of_several_names_is_refused(client: TestClient, tmp_path: Path) -> None:
    body = file_of(Direction("kind", 1, KIND.vector), Direction("stowaway", 1, KIND.vector), folder=tmp_path)
    assert "'stowaway'" in refusal(client.put(f"{ROOT}/kind", content=body, headers=ADMIN), 400, "BadDirectionFile")
    assert names(client) == [("needed", LAYER)]


# All examples share the client and its registry: directions of one example do not affect the next.
@hypothesis_settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(max_size=20), body=st.binary(max_size=64), layer=st.none() | st.integers(-2, 2_000_000))
def test_no_name_layer_or_body_is_a_server_error(client: TestClient, name: str, body: bytes, layer: int | None) -> None:
    params = {} if layer is None else {"layer": layer}
    for method in ("PUT", "GET", "DELETE"):
        content = body if method == "PUT" else None
        reply = client.request(method, f"{ROOT}/{quote(name)}", params=params, content=content, headers=ADMIN)
        assert reply.status_code < 500, reply.text


def test_a_server_without_steering_says_how_to_get_it() -> None:
    app = FastAPI()
    app.include_router(router)
    reply = TestClient(app).get("/v1/steering")
    assert "--additional-config" in refusal(reply, 400, "NotConfigured")
