"""lm-eval: ``gen_kwargs`` go into the body unchanged and steer what a task generates.

A model's name, an alias, and the header ``X-Steering`` in the model's argument ``header`` steer all requests. A
``header`` replaces lm-eval's own headers: the API key must be in it too.

Requests for log-likelihoods carry no ``gen_kwargs``: steering given there is lost without a warning. They need a
tokenizer; with ``tokenizer_backend="remote"`` it is the server's, if that was started with
``--enable-tokenizer-info-endpoint``.

A readout is dropped, and so is the id of a reply; lm-eval does not stream. A refused request is sent ``max_retries``
times, three, as after any error, and then ends the evaluation. The exception has only the status; the server's message
is in the log.

From Python, a string of ``gen_kwargs`` is not read as JSON (on the command line it is): lm-eval splits it at its
commas, and the server refuses the result.

Two ways to a wrong evaluation, without a warning from lm-eval:
a task that is a dict keeps the ``gen_kwargs`` of one evaluation for the next;
``use_cache`` with one file for a model and its alias answers for both with the first one's results.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import lm_eval
import pytest
import requests
from lm_eval.tasks import TaskManager

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
    ask,
)

CLIENT = "lm-eval"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
NUM_DOCS, ENDS = 3, (" held", " rare loss")
HEADER = {"Authorization": f"Bearer {API_KEY}", "X-Steering": f"kind:{ALPHA}"}
WAYS = [{}, {"num_concurrent": 3}]  # lm-eval has separate code for the second
Task = dict[str, Any]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)


def local_task(folder: Path, **fields: Any) -> Task:
    """A task of ``NUM_DOCS`` documents, each of them ``PROMPT``."""
    docs = folder / "docs.json"
    docs.write_text((json.dumps({"text": PROMPT}) + "\n") * NUM_DOCS)
    data = {"data_files": {"test": str(docs)}, "cache_dir": str(folder / "datasets")}
    source = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    return {"task": "local", **source, "doc_to_text": "{{text}}", "target_delimiter": "", **fields}


@pytest.fixture
def generation(tmp_path: Path) -> Task:
    limits = {"until": [], "max_gen_toks": NUM_TOKENS}  # greedy by default
    return local_task(tmp_path, output_type="generate_until", doc_to_target="", generation_kwargs=limits)


@pytest.fixture
def choice(tmp_path: Path) -> Task:
    return local_task(tmp_path, output_type="multiple_choice", doc_to_choice=list(ENDS), doc_to_target=0)


def evaluate(served: Served, task: Task, gen_kwargs: Any = None, route: str = COMPLETIONS, **fields: Any) -> Any:
    """The answers for each document. ``limit`` and ``use_cache`` go to lm-eval, other fields to the model."""
    run = {name: fields.pop(name) for name in ("limit", "use_cache") if name in fields}
    results = lm_eval.simple_evaluate(
        "local-completions" if route == COMPLETIONS else "local-chat-completions",
        model_args={"model": MODEL, "base_url": f"{served.url}{route}", "tokenizer_backend": "none", **fields},
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),  # its own tasks take ten seconds to list
        gen_kwargs=gen_kwargs,
        apply_chat_template=route == CHAT,
        **run,
    )
    assert "projections" not in repr(results)
    assert "cmpl-" not in repr(results)  # what ids of replies begin with
    return [[answer for [answer] in sample["resps"]] for sample in results["samples"]["local"]]


@pytest.mark.cell(CLIENT, body="`gen_kwargs`, not for log-likelihoods", name="yes", whole="dropped", id="dropped")
@pytest.mark.parametrize(
    ("route", "way"),
    [*((route, way) for route in (COMPLETIONS, CHAT) for way in WAYS), (COMPLETIONS, {"batch_size": NUM_DOCS})],
    ids=str,
)
def test_what_a_task_generates_is_steered_by_gen_kwargs_name_and_header(
    served: Served, generation: Task, completion_texts: Texts, chat_texts: Texts, route: str, way: dict[str, int]
) -> None:
    texts = completion_texts if route == COMPLETIONS else chat_texts
    fields = {"route": route, **way}
    assert evaluate(served, generation, **fields) == [[texts.plain]] * NUM_DOCS
    for model in (ALIAS, f"{MODEL}@kind:{ALPHA}"):
        assert evaluate(served, generation, model=model, **fields) == [[texts.steered]] * NUM_DOCS
    assert evaluate(served, generation, header=HEADER, **fields) == [[texts.steered]] * NUM_DOCS
    steered = evaluate(served, generation, {"steering": STEERING, "readout": READOUT}, **fields)
    assert steered == [[texts.steered]] * NUM_DOCS
    assert evaluate(served, generation, {"steering": []}, **fields) == [[texts.plain]] * NUM_DOCS


@pytest.mark.cell(CLIENT, header="`header`, with the API key")
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_log_likelihoods_are_steered_by_name_and_header_alone(
    served: Served, choice: Task, way: dict[str, int]
) -> None:
    def asked(model: str, end: str) -> float:
        start = httpx.post(f"{served.url}/tokenize", json={"prompt": PROMPT, "add_special_tokens": False}).json()
        fields = {"model": model, "prompt": PROMPT + end, "echo": True, "logprobs": 1, "max_tokens": 1}
        [answer] = ask(served, COMPLETIONS, **fields)["choices"]
        return sum(answer["logprobs"]["token_logprobs"][start["count"] : -1])

    plain, steered = ([pytest.approx(asked(model, end), abs=1e-3) for end in ENDS] for model in (MODEL, ALIAS))
    for model, gen_kwargs, header, expected, other in (
        (MODEL, None, None, plain, steered),
        (ALIAS, None, None, steered, plain),
        (f"{MODEL}@kind:{ALPHA}", None, None, steered, plain),
        (MODEL, None, HEADER, steered, plain),
        (MODEL, {"steering": STEERING}, None, plain, steered),  # lost
    ):
        fields = {"model": model, "header": header, "tokenizer_backend": "remote", **way}
        for answers in evaluate(served, choice, gen_kwargs, **fields):
            sums = [log_likelihood for log_likelihood, _ in answers]
            assert sums == expected
            assert sums != other


def test_a_header_without_the_key_is_not_let_in(served: Served, generation: Task) -> None:
    with pytest.raises(requests.HTTPError, match="401"):
        evaluate(served, generation, header={"X-Steering": f"kind:{ALPHA}"}, limit=1)


@pytest.mark.cell(CLIENT, stream="no streams")
def test_a_stream_is_not_understood(served: Served, generation: Task) -> None:
    with pytest.raises(requests.exceptions.JSONDecodeError):
        evaluate(served, generation, {"stream": True}, limit=1)


def test_steering_that_lm_eval_has_split_at_its_comma_is_refused(served: Served, generation: Task) -> None:
    with pytest.raises(requests.HTTPError, match="400"):
        evaluate(served, generation, json.dumps({"steering": STEERING}), limit=1)


@pytest.mark.parametrize(
    ("route", "way", "error"),
    [(COMPLETIONS, WAYS[0], requests.HTTPError), (CHAT, WAYS[1], aiohttp.ClientResponseError)],
)
def test_a_refusal_is_tried_three_times_and_ends_the_evaluation(
    served: Served, generation: Task, caplog: pytest.LogCaptureFixture, route: str, way: dict[str, int], error: type
) -> None:
    before = served.answers(route, 400)
    with pytest.raises(error, match="400"):
        evaluate(served, generation, {"steering": REFUSED}, route=route, limit=1, **way)
    assert caplog.text.count(REFUSAL) == served.answers(route, 400) - before == 3


def test_the_command_line_takes_steering_as_json(
    served: Served, generation: Task, completion_texts: Texts, tmp_path: Path
) -> None:
    (tmp_path / "local.yaml").write_text(json.dumps(generation))
    model = {"model": MODEL, "base_url": f"{served.url}{COMPLETIONS}", "tokenizer_backend": "none"}
    options = ["--tasks", "local", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    options += ["--model", "local-completions", "--model_args", json.dumps(model), "--log_samples"]
    options += ["--gen_kwargs", json.dumps({"steering": STEERING})]
    subprocess.run([sys.executable, "-m", "lm_eval", "run", *options], check=True, cwd=tmp_path)
    [log] = (tmp_path / "out").rglob("samples_local_*.jsonl")
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    assert [sample["resps"] for sample in samples] == [[[completion_texts.steered]]] * NUM_DOCS


def test_two_ways_to_a_wrong_evaluation(
    served: Served, generation: Task, completion_texts: Texts, tmp_path: Path
) -> None:
    plain, steered = ([[text]] * NUM_DOCS for text in (completion_texts.plain, completion_texts.steered))
    cache = str(tmp_path / "cache")
    assert evaluate(served, copy.deepcopy(generation), use_cache=cache) == plain
    assert evaluate(served, copy.deepcopy(generation), {"steering": STEERING}, use_cache=cache) == steered
    assert evaluate(served, copy.deepcopy(generation), model=ALIAS, use_cache=cache) == plain

    assert evaluate(served, generation, {"steering": STEERING}) == steered
    assert evaluate(served, generation) == steered
