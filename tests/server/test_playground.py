"""The playground in headless Chromium against the real server of these tests; tests/server/playground has the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from tests.server.conftest import ADMIN_KEY, ALIAS, API_KEY, KIND_LAYER, ServedModel
from tests.support.server.playground_visit import GUARDED, Visit
from tests.support.tiny_models import HIDDEN_SIZE

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [pytest.mark.slow, pytest.mark.server]

LINK = "#direction=kind&span=all&mode=text&temperature=0&max_tokens=8&prompt=Once%20upon&alphas=0,50"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from tests.browser import chromium  # skips the test where there is none

    with chromium() as running:
        yield running


@pytest.fixture
def visit(browser: Browser, served: ServedModel) -> Iterator[Visit]:
    visit = Visit(browser, served.url, key=API_KEY, fragment=LINK)
    yield visit
    visit.close()


def values(visit: Visit, index: int) -> list[float]:
    """The numbers at the tokens of a column, as they are shown."""
    tokens = visit.column(index).locator(".output span[data-value]").all()
    return [float(str(token.get_attribute("data-value")).replace("−", "-")) for token in tokens]


def test_the_real_server_streams_shaded_tokens_into_the_page(visit: Visit, tmp_path: Path) -> None:
    assert httpx.get(f"{visit.server}{GUARDED}").status_code == 401
    visit.add(ALIAS)
    visit.run()
    assert "8 tokens" in str(visit.column(1).locator(".detail").text_content())
    assert visit.text(0) != visit.text(1)
    assert visit.text(2) == visit.text(1)  # the alias adds the same 50 to the same tokens
    plain, steered = values(visit, 0), values(visit, 1)
    # the texts differ and their streams with them, by less than the 50 that α itself adds along a unit direction
    assert sum(steered) / len(steered) > sum(plain) / len(plain) + 25
    visit.page.screenshot(path=tmp_path / "playground.png", full_page=True)


def test_every_operation_and_span_is_one_that_the_server_takes(visit: Visit) -> None:
    visit.page.get_by_label("Steered tokens").select_option("slices")
    visit.page.get_by_role("textbox", name="Slices").fill("prompt[-1:] + generated[:4]")
    visit.button("Add a direction").click()
    visit.entry(1).get_by_label("Direction").select_option("other")
    for op in ("set", "scale", "ablate", "clamp", "add"):
        visit.entry(0).get_by_label("Operation").select_option(op)
        visit.run()
        assert visit.status().startswith("unsteered: 8 tokens"), (op, visit.status())


def test_a_stop_says_at_which_token_it_held(visit: Visit, server: httpx.Client) -> None:
    visit.page.get_by_label("Stop by").select_option("kind")
    visit.page.get_by_label("Bound").fill("-1000000")
    visit.page.get_by_label("Tokens in a row").fill("3")
    visit.run()
    told = str(visit.column(1).locator(".detail").text_content())
    body = {
        "model": "tiny", "prompt": "Once upon", "max_tokens": 8, "temperature": 0, "seed": 0,
        "steering": [{"direction": "kind", "alpha": 50, "layer": KIND_LAYER, "span": "all"}],
        "readout": {"stop": {"direction": "kind", "above": -1e6, "patience": 3}},
    }  # fmt: skip
    reply = server.post("/v1/completions", json=body).json()
    stopped = reply["choices"][0]["readout"]["stopped"]
    token = stopped["position"] - reply["usage"]["prompt_tokens"] + 1  # counted from the first generated one
    assert f"stopped at token {token}, value {stopped['value']:.3g}" in told
    assert token == 3


def test_each_sample_is_the_answer_to_its_own_seed(visit: Visit, server: httpx.Client) -> None:
    visit.page.get_by_label("Temperature").fill("1")
    visit.page.get_by_label("Samples").fill("2")
    visit.page.get_by_label("Seed", exact=True).fill("11")
    visit.run()
    for sample in (0, 1):
        body = {"model": "tiny", "prompt": "Once upon", "max_tokens": 8, "temperature": 1, "seed": 11 + sample}
        alone = server.post("/v1/completions", json={**body, "steering": []}).json()
        assert visit.text(0, sample) == alone["choices"][0]["text"]
    assert visit.text(0, 0) != visit.text(0, 1)


def test_a_conversation_goes_on_in_each_column(visit: Visit, tmp_path: Path) -> None:
    visit.page.get_by_label("Prompt is").select_option("chat")
    visit.run()
    answers = [visit.text(index) for index in (0, 1)]
    visit.button("Next turn").click()
    visit.page.get_by_label("Prompt", exact=True).fill("And then?")
    visit.run()
    runs = json.loads(visit.saved("Save JSON", tmp_path).read_text(encoding="utf-8"))["runs"]
    for run, answer in zip(runs[2:], answers, strict=True):
        assert [message["content"] for message in run["request"]["messages"]] == ["Once upon", answer, "And then?"]
        assert run["outcome"] == "complete"


def test_a_dropped_direction_and_a_random_control_are_registered(
    visit: Visit, server: httpx.Client, served: ServedModel, tmp_path: Path
) -> None:
    vector = served.directions[0].vector
    np.save(tmp_path / "mine.npy", np.stack([vector] * 3))
    visit.button("Register a direction").click()
    visit.page.get_by_label("File", exact=True).set_input_files(tmp_path / "mine.npy")
    visit.page.locator("#register").get_by_label("Layer", exact=True).fill(str(KIND_LAYER))
    visit.page.get_by_label("Layers counted").select_option("block_output")
    visit.page.locator("#register").get_by_label("Admin key").fill(ADMIN_KEY)
    visit.button("Register").click()
    visit.settle("Registered mine at layer 2")
    visit.add("a random direction …")
    visit.button("Register and add").click()  # the page knows the admin key now
    visit.settle("Registered random-0-kind")
    listed = {(one["name"], one["layer"]): one for one in server.get("/v1/steering/directions").json()["directions"]}
    assert listed["mine", KIND_LAYER]["content_hash"] == listed["kind", KIND_LAYER]["content_hash"]
    assert listed["random-0-kind", KIND_LAYER]["is_unit"]
    visit.run()
    runs: list[dict[str, Any]] = json.loads(visit.saved("Save JSON", tmp_path).read_text(encoding="utf-8"))["runs"]
    (run,) = (run for run in runs if run["column"].startswith("control random-0-kind"))
    hashes = {one["name"]: one["content_hash"] for one in run["directions"]}
    assert hashes["random-0-kind"] == listed["random-0-kind", KIND_LAYER]["content_hash"]
    assert run["vllm"] == httpx.get(f"{visit.server}/version").json()["version"]
    # α 50 along a random direction shows in the projection onto "kind" as 50 times their cosine, and that is small
    random, control = values(visit, 2), values(visit, 1)
    assert sum(control) / len(control) > sum(random) / len(random) + 50 * (1 - 4 / HIDDEN_SIZE**0.5) / 2
    visit.add("a random direction …")
    visit.button("Delete those of this page").click()
    visit.settle("are deleted")
    assert server.delete("/v1/steering/directions/mine", headers={"X-Admin-Key": ADMIN_KEY}).status_code == 200
    names = {one["name"] for one in server.get("/v1/steering/directions").json()["directions"]}
    assert not names & {"mine", "random-0-kind"}
