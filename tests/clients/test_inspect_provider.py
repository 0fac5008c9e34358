"""Inspect's provider `vllm-steer`: model arguments steer and read, and the log has the readouts.

A `steering` or `readout` in the `extra_body` of a config takes the place of the model argument of that name, and of it
alone: other fields of `extra_body` lose nothing.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import inspect_ai
import pytest
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import GenerateConfig, Model, ModelOutput, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate
from inspect_ai.tool import Tool, tool

import batch_jobs.harnesses.inspect_provider  # noqa: F401  # registers it, as the entry point does
from tests.clients.conftest import (
    ALIAS,
    ALPHA,
    API_KEY,
    MODEL,
    NUM_TOKENS,
    PROJECT,
    PROMPT,
    READOUT,
    REFUSED,
    STEERING,
    Served,
    Texts,
    ask,
)
from vllm_steer.client import ServerRefusal, ServerUnreachable
from vllm_steer.errors import SteerError, UnknownDirection

CHAT = "/v1/chat/completions"

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # Inspect leaves closing to the garbage collector


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep Inspect's cache, traces and marks of running evaluations out of the user's folders."""
    for name in ("INSPECT_CACHE_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


def config(**fields: Any) -> GenerateConfig:
    return GenerateConfig(max_tokens=NUM_TOKENS, temperature=0, **fields)


def model(served: Served, name: str = MODEL, given: GenerateConfig | None = None, **args: Any) -> Model:
    access = {"base_url": served.base_url, "api_key": API_KEY, **args}
    return get_model(f"vllm-steer/{name}", config=given or config(), memoize=False, **access)


def output(model: Model, **fields: Any) -> ModelOutput:
    async def main() -> ModelOutput:
        async with model:
            return await model.generate(PROMPT, **fields)

    return asyncio.run(main())


def expected_readout(served: Served, **fields: Any) -> dict[str, Any]:
    """What the server answers a plain client."""
    [choice] = ask(served, CHAT, messages=[{"role": "user", "content": PROMPT}], readout=READOUT, **fields)["choices"]
    readout: dict[str, Any] = choice["readout"]
    return readout


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steering", [STEERING, json.dumps(STEERING), f"kind:{ALPHA}"], ids=str)
def test_model_arguments_steer_and_read(served: Served, chat_texts: Texts, steering: Any, stream: bool) -> None:
    told = output(model(served, steering=steering, readout=READOUT, stream=stream))
    assert told.completion == chat_texts.steered
    assert told.stop_reason == "max_tokens"
    assert told.metadata == {"readout": [expected_readout(served, steering=STEERING)]}
    plain = output(model(served, stream=stream))
    assert (plain.completion, plain.metadata) == (chat_texts.plain, None)
    assert output(model(served, ALIAS, stream=stream)).completion == chat_texts.steered


def test_address_and_key_may_come_from_the_environment(
    served: Served, chat_texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_STEER_BASE_URL", served.url)
    monkeypatch.setenv("VLLM_STEER_API_KEY", API_KEY)
    own = model(served, base_url=None, api_key=None, steering=STEERING)
    assert output(own).completion == chat_texts.steered


def test_a_config_replaces_what_it_names_and_nothing_else(served: Served, chat_texts: Texts) -> None:
    steered = {"steering": STEERING, "readout": READOUT}
    for extra_body, text, is_read in (
        ({"steering": []}, chat_texts.plain, True),
        ({"readout": {"project": ["kind"], "span": "prompt"}}, chat_texts.steered, True),
        ({"priority": 0}, chat_texts.steered, True),
        (None, chat_texts.steered, True),
    ):
        told = output(model(served, **steered), config=config(extra_body=extra_body))
        assert told.completion == text
        assert (told.metadata is not None) == is_read
    told = output(model(served), config=config(extra_body=steered))
    assert told.completion == chat_texts.steered
    assert told.metadata == {"readout": [expected_readout(served, steering=STEERING)]}


def test_each_choice_has_its_readout_and_vectors_come_too(served: Served) -> None:
    told = output(
        model(served, readout={"layers": [served.layer], "span": "all"}),
        config=GenerateConfig(num_choices=2, max_tokens=3, temperature=1),
    )
    assert told.metadata is not None
    first, second = told.metadata["readout"]
    assert len(told.choices) == 2
    assert first["num_tokens"] == second["num_tokens"]
    assert first["mean"].keys() == {str(served.layer)}
    assert told.usage is not None
    assert told.usage.output_tokens == 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_an_error_that_is_not_tried_again(served: Served, stream: bool) -> None:
    before = served.answers(CHAT, 400)
    with pytest.raises(RuntimeError, match="'nobody'") as refused:
        output(model(served, steering=REFUSED, stream=stream))
    assert isinstance(refused.value.__cause__, UnknownDirection)
    assert served.answers(CHAT, 400) == before + 1
    with pytest.raises(RuntimeError, match="status 401") as refused:
        output(model(served, api_key="wrong"))
    assert isinstance(refused.value.__cause__, ServerRefusal)


def test_what_may_pass_is_tried_again() -> None:
    class Nowhere:
        base_url = "http://127.0.0.1:9"

    own = model(Nowhere()).api  # type: ignore[arg-type]
    assert own.should_retry(ServerUnreachable("no reply"))
    assert own.should_retry(ServerRefusal("busy", 503))
    assert own.should_retry(ServerRefusal("later", 429))
    assert not own.should_retry(ServerRefusal("wrong", 400))
    assert not own.should_retry(UnknownDirection("nobody"))


def test_a_cache_keeps_steered_answers_apart(served: Served, chat_texts: Texts) -> None:
    for _ in range(2):
        texts = [
            output(model(served, **args), cache=True).completion
            for args in ({}, {"steering": STEERING}, {"steering": f"kind:{-ALPHA}"})
        ]
        assert texts[:2] == [chat_texts.plain, chat_texts.steered]
        assert len(set(texts)) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"steering": ""}, "steering is empty"),
        ({"steering": "kind"}, "without alpha"),
        ({"readout": "{"}, "not JSON"),
        ({"readout": {}}, r"readout is \{\}"),
        ({"stear": 1}, "model argument 'stear' is unknown; allowed: steering, readout"),
        ({"base_url": None}, "no address of a server"),
    ],
    ids=str,
)
def test_wrong_model_arguments_are_refused(served: Served, args: dict[str, Any], message: str) -> None:
    with pytest.raises(SteerError, match=message):  # SettingsError, or that of the entry
        model(served, **args)


@tool
def weather() -> Tool:
    async def execute(city: str) -> str:
        """The weather of a city.

        Args:
            city: its name.
        """
        return f"sunny in {city}"

    return execute


def test_tools_reach_the_server(served: Served) -> None:
    """It runs without tool calls, and says so."""
    with pytest.raises(RuntimeError, match="tool"):
        output(model(served, steering=STEERING), tools=[weather()])


@pytest.mark.parametrize("stream", [False, True])
def test_the_log_of_an_evaluation_has_the_readouts(
    served: Served, chat_texts: Texts, tmp_path: Path, stream: bool
) -> None:
    samples = [Sample(input=PROMPT, target=chat_texts.steered) for _ in range(2)]
    task = inspect_ai.Task(dataset=samples, solver=generate(), scorer=includes())

    async def main() -> list[EvalLog]:
        async with model(served, steering=STEERING, readout=READOUT, stream=stream) as asked:
            return await inspect_ai.eval_async(task, model=asked, log_dir=str(tmp_path))

    [log] = asyncio.run(main())
    assert log.status == "success"
    assert log.results is not None
    assert log.results.scores[0].metrics["accuracy"].value == 1
    stored = read_eval_log(log.location)
    assert stored.samples is not None
    expected = expected_readout(served, steering=STEERING)
    for sample in stored.samples:
        assert sample.output.metadata == {"readout": [expected]}
        [call] = [event.call for event in sample.events if event.event == "model"]
        assert call is not None
        assert call.request["steering"][0]["alpha"] == ALPHA  # type: ignore[index, call-overload]


def test_a_refusal_ends_an_evaluation(served: Served, tmp_path: Path) -> None:
    task = inspect_ai.Task(dataset=[Sample(input=PROMPT, target="")], solver=generate(), scorer=includes())

    async def main() -> list[EvalLog]:
        async with model(served, steering=REFUSED) as asked:
            return await inspect_ai.eval_async(task, model=asked, log_dir=str(tmp_path))

    [log] = asyncio.run(main())
    assert log.status == "error"
    assert log.error is not None
    assert "no direction is named" in log.error.message


def test_inspect_finds_the_provider_by_the_entry_point(tmp_path: Path) -> None:
    """As pip would install it: the names that pyproject.toml declares, and nothing that is imported before."""
    points = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["entry-points"]["inspect_ai"]
    about = tmp_path / "vllm_steer-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-steer\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (about / "entry_points.txt").write_text("\n".join(["[inspect_ai]", *lines, ""]))
    code = (
        "from inspect_ai.model import get_model\n"
        "own = get_model('vllm-steer/tiny', base_url='http://127.0.0.1:9/v1', steering='kind:1@2')\n"
        "print(type(own.api).__name__)\n"
    )
    paths = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(PROJECT)!r}]\n"
    done = subprocess.run(
        [sys.executable, "-c", paths + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "SteeredServer\n", done.stderr
