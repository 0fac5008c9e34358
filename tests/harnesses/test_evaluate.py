"""`vllm-steer evaluate`: one engine for a sweep, one file, and it goes on where it stopped."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import lm_eval
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

import vllm_steer
from batch_jobs.config.evaluation import Evaluation, load_evaluation
from batch_jobs.errors import StudyError
from batch_jobs.harnesses.evaluate import evaluate
from batch_jobs.harnesses.result_table import Result
from tests.harnesses.conftest import ALPHA, LAYER, MAX_LEN, Task
from vllm_steer import Direction, load_directions, save_directions

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture
def evaluation(model: Path, directions: Path, choice: Task, generation: Task, tmp_path: Path) -> Evaluation:
    generation["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    for task in (choice, generation):
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    document = {
        "model": str(model),
        "dtype": "float32",
        "max_model_len": MAX_LEN,
        "engine": {"enforce_eager": True, "kv_cache_gib": 0.0625},
        "directions": [str(directions)],
        "steer": [{"direction": "kind"}],
        "alphas": [0, ALPHA],
        "tasks": ["choice.yaml", "generation.yaml"],
    }
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(document))
    return load_evaluation(tmp_path / "e.yaml")


def run(evaluation: Evaluation, out: Path, **options: Any) -> list[Result]:
    return evaluate(evaluation, out, console=Console(file=io.StringIO()), **options)


def test_a_sweep_runs_in_one_engine_and_goes_on_where_it_stopped(
    evaluation: Evaluation, directions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    load, own = vllm_steer.load_llm, lm_eval.simple_evaluate
    stop_after = 4

    def counted_load(*args: Any, **fields: Any) -> Any:
        calls["engine"] += 1
        return load(*args, **fields)

    def counted(*args: Any, **fields: Any) -> Any:
        if calls["cell"] == stop_after:
            raise KeyboardInterrupt
        calls["cell"] += 1
        return own(*args, **fields)

    monkeypatch.setattr(vllm_steer, "load_llm", counted_load)
    monkeypatch.setattr(lm_eval, "simple_evaluate", counted)
    out = tmp_path / "out" / "e.parquet"
    with pytest.raises(KeyboardInterrupt):
        run(evaluation, out)
    assert calls == {"engine": 1, "cell": 4}
    assert len(set(pq.read_table(out)["cell"].to_pylist())) == 4

    calls.clear()
    results = run(evaluation, out)
    assert calls == {"engine": 1, "cell": 2}  # three settings on two tasks
    calls.clear()
    assert run(evaluation, out) == results
    assert calls == {}

    by = {(one.steered, one.task, one.metric): one for one in results}
    assert {(steered, task) for steered, task, _ in by} == {
        (steered, task) for steered in ("unsteered", "direction", "control") for task in ("choice", "generation")
    }
    plain, steered, control = (by[who, "choice", "acc"] for who in ("unsteered", "direction", "control"))
    assert [one.alpha for one in (plain, steered, control)] == [0.0, ALPHA, ALPHA]
    assert [one.direction for one in (plain, steered, control)] == [None, "kind", "kind"]
    assert (steered.layer, steered.op, steered.span, steered.documents) == (LAYER, "add", "all", 3)
    assert (plain.control, steered.control, control.control) == (None, None, 0)
    assert len({one.direction_hash for one in (plain, steered, control)}) == 3
    metadata = {name.decode(): value.decode() for name, value in pq.read_schema(out).metadata.items()}
    assert json.loads(metadata["config"])["alphas"] == [0.0, ALPHA]
    assert json.loads(metadata["directions"])["kind@2"] == load_directions(directions)[0].content_hash
    assert json.loads(metadata["versions"])["lm_eval"] == "0.4.13"

    # the same name with another vector is another evaluation
    changed = tmp_path / "changed.safetensors"
    (kind,) = load_directions(directions)
    save_directions(changed, [Direction("kind", LAYER, -kind.vector)])
    with pytest.raises(StudyError, match="holds results of another evaluation"):
        run(evaluation.model_copy(update={"directions": (str(changed),)}), out)


def test_a_direction_that_is_not_in_the_files_is_refused_before_the_engine(
    evaluation: Evaluation, tmp_path: Path
) -> None:
    (target,) = evaluation.steer
    for update, message in (
        ({"direction": "nobody"}, r"steer names nobody, of which there is none; the direction files hold kind@2"),
        ({"layer": 1}, "steer names kind@1, of which there is none"),
    ):
        wrong = evaluation.model_copy(update={"steer": (target.model_copy(update=update),)})
        with pytest.raises(StudyError, match=message):
            run(wrong, tmp_path / "none.parquet")
    twice = evaluation.model_copy(update={"tasks": (*evaluation.tasks, evaluation.tasks[0])})
    with pytest.raises(StudyError, match="two tasks have the name choice"):
        run(twice, tmp_path / "none.parquet")
