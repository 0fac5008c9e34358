"""Directions that the page registers: files that are chosen or dropped, and random controls."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save

from tests.support.server.fake_steering_server import KIND, FakeSteeringServer, alpha_of
from tests.support.server.playground_visit import Visit
from vllm_steer import Direction
from vllm_steer.directions import save_directions
from vllm_steer.errors import SteerError
from vllm_steer.server.registry.upload import uploaded_directions

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow


@pytest.fixture
def admin(browser: Browser, fake: FakeSteeringServer) -> Iterator[Visit]:
    """A visit to a server whose directions can be changed, with the key "admin"."""
    fake.admin_key = "admin"
    visit = Visit(browser, fake.url)
    yield visit
    visit.close()


def choose(visit: Visit, path: Path, key: str = "admin") -> None:
    """Open the dialog, choose a file and give the key."""
    if visit.page.locator("dialog#register[open]").count() == 0:
        visit.button("Register a direction").click()
    visit.page.get_by_label("File", exact=True).set_input_files(path)
    visit.page.locator("#register").get_by_label("Admin key").fill(key)


def test_a_file_becomes_a_direction_that_can_be_chosen_at_once(
    admin: Visit, fake: FakeSteeringServer, tmp_path: Path
) -> None:
    (tmp_path / "my truth.gguf").write_bytes(b"GGUF bytes")
    choose(admin, tmp_path / "my truth.gguf")
    assert admin.page.get_by_label("Name").input_value() == "my-truth"
    assert admin.page.get_by_label("Format").input_value() == "gguf"
    admin.button("Register").click()
    admin.settle("Registered my-truth at layer 2")
    assert fake.changes == [("PUT", "my-truth", {"format": "gguf"}, b"GGUF bytes")]
    admin.entry(0).get_by_label("Direction").select_option("my-truth")
    admin.run()
    assert fake.requests[-1]["readout"]["project"] == ["my-truth"]


def test_a_dropped_file_opens_the_dialog(admin: Visit) -> None:
    dropped = admin.page.evaluate_handle(
        """() => { const data = new DataTransfer(); data.items.add(new File(["x"], "warm.npy")); return data; }"""
    )
    admin.page.dispatch_event("body", "drop", {"dataTransfer": dropped})
    admin.page.locator("dialog#register[open]").wait_for()
    assert admin.page.get_by_label("Name").input_value() == "warm"
    assert admin.page.get_by_label("Format").input_value() == "npy"
    assert "give what the server asks for" in str(admin.page.locator("#register-why").text_content())


def test_what_the_file_does_not_say_is_asked_for(admin: Visit, fake: FakeSteeringServer, tmp_path: Path) -> None:
    admin.expected.append("400")
    np.save(tmp_path / "stack.npy", np.ones((3, 8)))
    choose(admin, tmp_path / "stack.npy")
    admin.button("Register").click()
    admin.page.locator("#register-told", has_text="how it counts layers").wait_for()
    assert admin.page.evaluate("document.activeElement.name") == "layer_index"
    admin.page.get_by_label("Layers counted").select_option("hidden_states")
    admin.page.locator("#register").get_by_label("Layer", exact=True).fill("2")
    admin.button("Register").click()
    admin.settle("Registered stack")
    (change,) = fake.changes
    assert change[:3] == ("PUT", "stack", {"layer": "2", "format": "npy", "layer_index": "hidden_states"})


def test_a_file_of_several_names_is_registered_under_each_of_them(
    admin: Visit, fake: FakeSteeringServer, tmp_path: Path
) -> None:
    made = [Direction(name, layer, np.eye(8)[layer]) for name, layer in (("dry", 1), ("calm", 1), ("calm", 2))]
    save_directions(tmp_path / "all.safetensors", made)
    choose(admin, tmp_path / "all.safetensors")
    admin.page.locator("#register-why", has_text="The file has 2 names: calm, dry.").wait_for()
    assert admin.page.get_by_label("Name").input_value() == ""
    admin.button("Register").click()
    admin.settle("Registered calm at layer 2.*; dry at layer 2")
    assert [change[:3] for change in fake.changes] == [
        ("PUT", name, {"format": "safetensors"}) for name in ("calm", "dry")
    ]
    for (_, name, _, body), own in zip(fake.changes, (made[1:], made[:1]), strict=True):
        read = uploaded_directions(name, None, body, "safetensors")
        assert [(one.key, one.content_hash) for one in read] == [(one.key, one.content_hash) for one in own]


def refused(*upload: Any) -> str:
    """What the server says of an upload that it refuses."""
    with pytest.raises(SteerError) as error:
        uploaded_directions(*upload)
    return str(error.value)


def npy(array: Any) -> bytes:
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


def stored(**tensors: Any) -> bytes:
    return save({name: np.asarray(tensor, dtype="<f4") for name, tensor in tensors.items()})


def torch_file(vector: list[float]) -> bytes:
    torch = pytest.importorskip("torch")
    file = BytesIO()
    torch.save(torch.tensor(vector), file)
    return file.getvalue()


def test_what_the_server_says_of_a_file_is_said_in_terms_of_the_dialog(visit: Visit) -> None:
    one, stack = np.ones(8), np.ones((3, 8))
    two_names = stored(**{"a@1": one, "b@1": one})
    cases = [
        (refused("it", None, npy(one), "npy"), "layer", "in “Layer”"),
        (refused("it", None, npy(stack), "npy"), "layer_index", "Choose it in “Layers counted”"),
        (refused("it", None, torch_file([1.0] * 8), "pt"), "layer", "Give its layer in “Layer”"),
        (refused("it", 7, npy(stack), "npy", "block_output"), "layer", "has 3 layers, none of them 7"),
        (refused("it", None, stored(vector=one), "safetensors"), "layer", "a tensor named 'vector'"),
        (refused("it", 7, stored(**{"a@1": one}), "safetensors"), "layer", "no direction of layer 7"),
        (refused("it", None, two_names, "safetensors"), "name", "Leave “Name” empty"),
        (refused("it", 1, b"abc"), "format", "Choose its format in “Format”"),
        (refused("it", None, b"abc", "safetensors"), "format", "choose that in “Format”"),
        (refused("it", None, b"abc", "gguf"), "format", "choose that in “Format”"),
        (refused("-it", None, stored(**{"a@1": one}), "safetensors"), "name", "Give another one in “Name”"),
    ]
    for message, field, words in cases:
        told = visit.page.evaluate("(message) => refusalOf(message)", message)
        assert (told["field"], words in told["text"]) == (field, True), (message, told)
        assert not re.search(r"load_directions|vllm-steer|the upload|layer=|\?layer", told["text"]), told
        assert told["field"] in {"name", "format", "layer", "layer_index", "admin"}


def test_a_wrong_admin_key_is_said_and_can_be_corrected(admin: Visit, fake: FakeSteeringServer, tmp_path: Path) -> None:
    admin.expected.append("403")
    (tmp_path / "one.safetensors").write_bytes(b"x")
    choose(admin, tmp_path / "one.safetensors", "wrong")
    admin.button("Register").click()
    admin.page.locator(
        "#register-told", has_text="not this server's admin key. Give the right one in “Admin key”."
    ).wait_for()
    assert admin.page.evaluate("document.activeElement.name") == "admin"
    admin.page.keyboard.type("admin")
    admin.page.locator("#register").get_by_label("Admin key").fill("admin")
    admin.page.keyboard.press("Enter")
    admin.settle("Registered one")
    assert len(fake.changes) == 1


def test_without_an_admin_key_the_page_says_that_nothing_can_be_registered(visit: Visit) -> None:
    visit.button("Register a direction").click()
    assert "VLLM_STEER_ADMIN_KEY" in str(visit.page.locator("#register-told").text_content())
    visit.page.keyboard.press("Escape")
    option = visit.page.locator("#kind option", has_text="random direction")
    assert option.is_disabled()
    assert "no admin key" in str(option.text_content())


def test_a_random_control_is_a_seeded_vector_of_the_same_length(admin: Visit, fake: FakeSteeringServer) -> None:
    for seed in ("7", "7", "8"):
        admin.add("a random direction …")
        admin.page.get_by_label("Random seed").fill(seed)
        admin.page.locator("#random").get_by_label("Admin key").fill("admin")
        admin.button("Register and add").click()
        admin.settle(f"Registered random-{seed}-kind")
    vectors = [np.frombuffer(body, dtype="<f4").astype(np.float64) for _, _, _, body in fake.changes]
    assert [(name, query) for _, name, query, _ in fake.changes] == [
        (f"random-{seed}-kind", {"layer": "2"}) for seed in (7, 7, 8)
    ]
    assert np.array_equal(vectors[0], vectors[1])
    assert not np.allclose(vectors[0], vectors[2])
    for vector in vectors:  # of 8 float32 numbers, each rounded by up to 6e-8 of itself
        assert math.isclose(float(np.linalg.norm(vector)), 1.0, rel_tol=1e-6)
    cosine = float(vectors[0] @ KIND)
    assert f"is {cosine:.3g}".replace("-", "−") in str(admin.column(2).locator(".told").text_content())
    assert admin.names()[2] == "control random-7-kind, α = +8"
    admin.run()
    assert [alpha_of(one) for one in fake.requests if one["steering"]] == [8.0] * 4
    assert {one["readout"]["project"][0] for one in fake.requests} == {"kind"}
    fake.changes.clear()
    admin.add("a random direction …")
    admin.button("Delete those of this page").click()
    admin.settle("are deleted")
    assert [change[:2] for change in fake.changes] == [("DELETE", "random-7-kind"), ("DELETE", "random-8-kind")]
    assert "no direction" in str(admin.column(2).locator(".told").text_content())


def test_the_random_numbers_are_normal(visit: Visit) -> None:
    drawn = np.array(visit.page.evaluate("Array.from(normals(3, 40000))"))
    # five standard errors of each moment: 1/200 of the mean, √2/200 of the variance, √6/200 of the third moment
    assert abs(drawn.mean()) < 5 / 200
    assert abs(drawn.var() - 1) < 5 * math.sqrt(2) / 200
    assert abs((drawn**3).mean()) < 5 * math.sqrt(15) / 200
    assert abs(np.mean(np.abs(drawn) < 1) - 0.6827) < 5 * 0.466 / 200
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 5 / 200
