from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from batch_jobs.config.study import StudyError
from batch_jobs.endpoint.chat import ChatClient, EndpointError
from batch_jobs.files.json_lines import read_records
from batch_jobs.pairs.source import PairGeneration, SystemPrompts, generate_pairs, load_system_prompts
from batch_jobs.pairs.writer import EndpointWriter, TextWriter
from batch_jobs.texts.contrastive import Scenario, load_pairs
from tests.support.server.fake_endpoint import Answer, FakeEndpoint, fake_endpoint, said

PROJECT = Path(__file__).resolve().parents[3]
PROMPTS = SystemPrompts("Be kind.", "Be quick.")
SCENARIOS = {name: Scenario(name, name, f"Win {name}.", "Someone cries.", ()) for name in ("a", "b", "c")}
PLENTY = " word" * 60


def text_for(request: dict[str, Any]) -> Answer:
    return said(f"{request['messages'][0]['content']} {request['model']} {request['seed']}{PLENTY}")


def writers_for(fake: FakeEndpoint, *models: str, concurrency: int = 1) -> list[TextWriter]:
    clients = [ChatClient(fake.endpoint(model), max_attempts=2, sleep=lambda _: None) for model in models]
    return [EndpointWriter(client, temperature=0.9, max_tokens=300, concurrency=concurrency) for client in clients]


def generate(out: Path, writers: list[TextWriter], *, runs: int = 2, seed: int = 0) -> PairGeneration:
    console = Console(file=io.StringIO())
    return generate_pairs(out, writers, SCENARIOS, PROMPTS, runs=runs, seed=seed, max_attempts=3, console=console)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_pair_is_one_scenario_one_model_one_seed_under_two_system_prompts(tmp_path: Path, concurrency: int) -> None:
    out = tmp_path / "pairs.jsonl"
    with fake_endpoint(text_for) as fake:
        result = generate(out, writers_for(fake, "m1", "m2", concurrency=concurrency))
    assert result == PairGeneration(written=6, reused=0, given_up=())
    assert len(fake.requests) == 12
    records = {record["pair_id"]: record for record in read_records(out)}
    assert set(records) == {f"{name}-{run:02d}" for name in "abc" for run in (1, 2)}
    for record in records.values():
        model, seed = record["source_model"], record["seed"]
        assert record["positive"].startswith(f"Be kind. {model} {seed} word")
        assert record["negative"].startswith(f"Be quick. {model} {seed} word")
        assert record["generated_at"].endswith("+00:00")
    assert len({record["seed"] for record in records.values()}) == 6
    users = {request["messages"][1]["content"] for request in fake.requests}
    assert users == {f"Win {name}.\n\nSomeone cries.\n\nWhat do you do?" for name in "abc"}
    # and a study reads the file as it is
    assert {pair.pair_id for pair in load_pairs(out)} == set(records)


def test_every_scenario_hears_every_model_equally_often(tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    with fake_endpoint(text_for) as fake:
        generate(out, writers_for(fake, "m1", "m2"), runs=4)
    heard = Counter((record["scenario_id"], record["source_model"]) for record in read_records(out))
    assert heard == {(name, model): 2 for name in "abc" for model in ("m1", "m2")}


def test_the_same_command_again_makes_no_call_and_more_runs_add_the_missing_ones(tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    with fake_endpoint(text_for) as fake:
        generate(out, writers_for(fake, "m"), runs=1)
        before = out.read_bytes()
        fake.requests.clear()
        assert generate(out, writers_for(fake, "m"), runs=1) == PairGeneration(0, 3, ())
        assert fake.requests == []
        assert out.read_bytes() == before
        assert generate(out, writers_for(fake, "m"), runs=2) == PairGeneration(3, 3, ())
        assert len(fake.requests) == 6
    assert out.read_bytes().startswith(before)


@pytest.mark.parametrize("kept", ["whole lines", "a torn line"])
def test_a_run_that_was_cut_short_ends_with_the_pairs_of_a_whole_one(tmp_path: Path, kept: str) -> None:
    def texts(path: Path) -> dict[str, tuple[str, str]]:
        return {pair.pair_id: (pair.positive, pair.negative) for pair in load_pairs(path)}

    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    with fake_endpoint(text_for) as fake:
        generate(whole, writers_for(fake, "m1", "m2"))
        lines = whole.read_bytes().splitlines(keepends=True)
        cut.write_bytes(b"".join(lines[:2]) + (lines[2][:40] if kept == "a torn line" else b""))
        fake.requests.clear()
        assert generate(cut, writers_for(fake, "m1", "m2")) == PairGeneration(4, 2, ())
    assert len(fake.requests) == 8
    assert texts(cut) == texts(whole)


def test_a_killed_process_loses_nothing_that_it_had_written(tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    script = (
        "import sys; from pathlib import Path; from batch_jobs.endpoint.chat import ChatClient, Endpoint;"
        "from tests.batch.pairs.test_source import EndpointWriter, generate;"
        "client = ChatClient(Endpoint(sys.argv[1], 'm'));"
        "generate(Path(sys.argv[2]), [EndpointWriter(client, temperature=0.9, max_tokens=300, concurrency=1)])"
    )

    def kill_at_the_sixth_text(request: dict[str, Any]) -> Answer:
        if len(fake.requests) == 6:
            process.kill()
        return text_for(request)

    with fake_endpoint(kill_at_the_sixth_text) as fake:
        process = subprocess.Popen([sys.executable, "-c", script, f"{fake.url}/v1", str(out)], cwd=PROJECT)
        assert process.wait(timeout=120) == -signal.SIGKILL
    held = out.read_bytes()
    assert len(read_records(out)) == 2
    with fake_endpoint(text_for) as fake:
        assert generate(out, writers_for(fake, "m")) == PairGeneration(4, 2, ())
    assert out.read_bytes().startswith(held)
    assert len(fake.requests) == 8


def test_what_was_written_before_an_endpoint_fails_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    calls = 0

    def answer(request: dict[str, Any]) -> Answer:
        nonlocal calls
        calls += 1
        return text_for(request) if calls <= 5 else Answer({"error": "down"}, 500)

    with fake_endpoint(answer) as fake, pytest.raises(EndpointError, match="500"):
        generate(out, writers_for(fake, "m"))
    assert len(read_records(out)) == 2  # five texts: two pairs and a half
    with fake_endpoint(text_for) as fake:
        assert generate(out, writers_for(fake, "m")) == PairGeneration(4, 2, ())


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (lambda: said(""), "is empty"),
        (lambda: said("Too little to say."), "has 4 words; at least 40"),
        (lambda: said("I'm sorry, but I can't assist with that." + PLENTY), "is a refusal"),
        (lambda: said("As an AI, I have no feelings." + PLENTY), "is a refusal"),
        (lambda: said(None, "content_filter"), "refused: stopped by a content filter"),
        (lambda: Answer({"error": "filtered"}, 400), "refused: .*filtered"),
        (lambda: said(f"<think>I could stay.{PLENTY}", "length"), "ended inside its thought; give more tokens"),
        (lambda: said(f"I stay.{PLENTY} <think>Or do", "length"), "ended inside its thought"),
        (lambda: said(None, "length", reasoning_content=PLENTY), "ended inside its thought"),
        (lambda: said(f"<think>{PLENTY}</think>Too little to say."), "has 4 words; at least 40"),
        (lambda: said(f"<think>Hm.</think>As an AI, I have no feelings.{PLENTY}"), "is a refusal"),
        (lambda: said(f"half \ud83d{PLENTY}"), "has no UTF-8 form"),
        (lambda: said(None, refusal="No \ud83d."), r"refused: No \\ud83d\."),
    ],
)
def test_an_unusable_text_is_asked_for_again_with_another_seed(
    tmp_path: Path, bad: Callable[[], Answer], told: str
) -> None:
    out = tmp_path / "pairs.jsonl"
    first_seeds: set[int] = set()

    def answer(request: dict[str, Any]) -> Answer:
        system, user = (message["content"] for message in request["messages"])
        if "Win b." in user and system == "Be quick." and len(first_seeds) < 2:
            first_seeds.add(request["seed"])
            return bad()
        return text_for(request)

    log = io.StringIO()
    console = Console(file=log, width=1000)
    with fake_endpoint(answer) as fake:
        result = generate_pairs(
            out, writers_for(fake, "m"), SCENARIOS, PROMPTS, runs=1, seed=0, max_attempts=3, console=console
        )
    assert result == PairGeneration(3, 0, ())
    assert len(fake.requests) == 6 + 2 + 2  # the pair is drawn again as a whole, twice
    record = next(record for record in read_records(out) if record["pair_id"] == "b-01")
    assert record["seed"] not in first_seeds
    assert len(re.findall(f"b-01: m: negative text {told}", log.getvalue())) == 2


def test_a_text_that_the_token_limit_cut_off_is_kept_and_marked(tmp_path: Path) -> None:
    def answer(request: dict[str, Any]) -> Answer:
        text = text_for(request).body["choices"][0]["message"]["content"]
        return said(text, "length" if text.startswith("Be kind.") else "stop")

    with fake_endpoint(answer) as fake:
        assert generate(tmp_path / "pairs.jsonl", writers_for(fake, "m"), runs=1).written == 3
    assert [record["cut_off"] for record in read_records(tmp_path / "pairs.jsonl")] == [["positive"]] * 3


@pytest.mark.parametrize("opening", ["<think>", ""])
def test_a_thought_is_no_part_of_the_text(tmp_path: Path, opening: str) -> None:
    def answer(request: dict[str, Any]) -> Answer:
        return said(f"{opening}Somebody cries.\n</think>\n\n{request['messages'][0]['content']}{PLENTY}\n")

    with fake_endpoint(answer) as fake:
        assert generate(tmp_path / "pairs.jsonl", writers_for(fake, "m"), runs=1).written == 3
    for pair in load_pairs(tmp_path / "pairs.jsonl"):
        assert (pair.positive, pair.negative) == (f"Be kind.{PLENTY}", f"Be quick.{PLENTY}")


def test_a_pair_that_stays_unusable_is_reported_and_not_stored(tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    same = said("The same words for whoever asks." + PLENTY)
    with fake_endpoint(lambda request: same if "Win a." in str(request) else text_for(request)) as fake:
        result = generate(out, writers_for(fake, "m"), runs=1)
        assert (result.written, [pair.pair_id for pair in result.given_up]) == (2, ["a-01"])
        assert result.given_up[0].complaint == "both texts are the same"
        assert {record["pair_id"] for record in read_records(out)} == {"b-01", "c-01"}
        fake.requests.clear()
        assert len(generate(out, writers_for(fake, "m"), runs=1).given_up) == 1
        assert len(fake.requests) == 6  # the next call tries it again, and it alone


@pytest.mark.parametrize(
    "beginning",
    ["I'm sorry that nobody came.", "I can't help but worry.", "I won't leave.", "Sorry, but I cannot go on."],
)
def test_a_kind_text_that_begins_like_a_refusal_is_kept(tmp_path: Path, beginning: str) -> None:
    def answer(request: dict[str, Any]) -> Answer:
        return said(f"{beginning} {request['messages'][0]['content']}{PLENTY}")

    with fake_endpoint(answer) as fake:
        assert generate(tmp_path / "pairs.jsonl", writers_for(fake, "m"), runs=1).written == 3


def test_a_file_of_something_else_is_not_added_to(tmp_path: Path) -> None:
    out = tmp_path / "other.jsonl"
    out.write_text('{"row_id": "x"}\n', encoding="utf-8")
    with fake_endpoint(text_for) as fake, pytest.raises(StudyError, match="without a pair_id"):
        generate(out, writers_for(fake, "m"))
    assert out.read_text(encoding="utf-8") == '{"row_id": "x"}\n'


def test_system_prompts_are_bundled_or_given(tmp_path: Path) -> None:
    bundled = load_system_prompts(None)
    assert bundled.positive != bundled.negative
    path = tmp_path / "prompts.json"
    path.write_text('{"positive": "Be kind.", "negative": "Be quick."}', encoding="utf-8")
    assert load_system_prompts(path) == PROMPTS


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not JSON"),
        ('["a", "b"]', "object of two texts"),
        ('{"positive": "a"}', "object of two texts"),
        ('{"positive": "a", "negative": "a"}', "both system prompts are the same"),
        (
            r'{"positive": "a", "negative": "b \ud83d"}',
            r"field negative: got 'b \\ud83d', which has no UTF-8 form",
        ),
        (b'{"positive": "\xff"}', "not UTF-8 text"),
    ],
)
def test_malformed_system_prompts_are_refused(tmp_path: Path, content: str | bytes, told: str) -> None:
    path = tmp_path / "prompts.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StudyError, match=told):
        load_system_prompts(path)
