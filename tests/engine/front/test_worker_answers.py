"""Merging the answers of pipeline stages, and each stage's part of a request's readout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vllm_steer.engine.resolved_spec import Projected, ResolvedReadout, Traced
from vllm_steer.engine.worker_answers import whole_model, whole_readouts, whole_traces


def _answer(layers: list[int], num_tokens: int = 4, **fields: Any) -> dict[str, Any]:
    return {
        "num_tokens": num_tokens,
        "layers": layers,
        "stopped": [],
        "flags": [[f"of layer {layer}", layer, 7, 0.25] for layer in layers],
        "max": [[f"of layer {layer}", layer, 0.5, 3] for layer in layers],
        "pooled": b"".join(np.full(2, layer, np.float32).tobytes() for layer in layers),
        "projections": [["kind", layer, float(layer)] for layer in layers],
        "trace": [[f"of layer {layer}", bytes([layer])] for layer in layers],
        "held": [3 if 1 in layers else None, None, True if 5 in layers else None],
        "rows": [[layer, 2, bytes([layer])] for layer in layers],
        "trace_error": None,
        "proof": "parity",
    } | fields


def test_the_layers_of_all_stages_make_one_readout() -> None:
    assert whole_readouts([[[_answer([1, 3])], [_answer([5])], [_answer([])]]]) == [_answer([1, 3, 5])]


def test_workers_that_another_one_answers_for_are_passed_over() -> None:
    assert whole_readouts([[[_answer([1])], None, [_answer([5])], None]]) == [_answer([1, 5])]


def test_vectors_that_were_not_asked_stay_out() -> None:
    (whole,) = whole_readouts([[[_answer([1], pooled=None)], [_answer([5], pooled=None)]]])
    assert whole == _answer([1, 5], pooled=None)
    (whole,) = whole_readouts([[[_answer([1], held=None)], [_answer([5], held=None)]]])
    assert whole == _answer([1, 5], held=None)


def test_a_readout_that_one_stage_has_lost_is_lost() -> None:
    assert whole_readouts([[[_answer([1]), _answer([1])], [None, _answer([5])]]]) == [None, _answer([1, 5])]


def test_the_failure_of_one_stage_is_the_failure_of_all() -> None:
    assert whole_readouts([[[_answer([1])], [{"error": "a gap"}]]]) == [{"error": "a gap"}]
    (whole,) = whole_readouts([[[_answer([1], trace=[], trace_error="no column")], [_answer([5])]]])
    assert whole is not None
    assert whole["trace_error"] == "no column"


def test_stages_that_counted_differently_make_an_error_and_never_a_number() -> None:
    (whole,) = whole_readouts([[[_answer([1], num_tokens=4)], [_answer([5], num_tokens=5)]]])
    assert whole is not None
    assert "[4, 5]" in whole["error"]


def test_a_live_trace_goes_as_far_as_every_stage_knows() -> None:
    stages = [[[("calm", [1.0, 2.0, 3.0])]], [[("bold", [4.0, 5.0])]], [[]]]
    assert whole_traces([stages]) == [[("calm", [1.0, 2.0]), ("bold", [4.0, 5.0])]]


@pytest.mark.parametrize("missing", [None, {"error": "no column"}], ids=str)
def test_a_live_trace_that_a_stage_cannot_give_is_not_given(missing: Any) -> None:
    assert whole_traces([[[[("calm", [1.0])]], [missing]]]) == [missing]


def test_a_stage_reads_what_it_holds_and_counts_the_tokens_of_the_rest() -> None:
    whole = ResolvedReadout(
        layers=[2, 7, 9],
        layer_indices=[0, 2, 3],
        first=1,
        end=None,
        vectors=True,
        project=[Projected("kind", 2, 5), Projected("kind", 9, 6)],
        trace=[Traced("far", 3, 6), Traced("between", 1, 8), Traced("near", 0, 5)],
    )
    first, second, third = (whole.on_stage(held) for held in ({0, 1}, {2, 3}, {4}))
    assert (first.layers, first.layer_indices, first.project) == ([2], [0], [("kind", 2, 5)])
    assert [one.name for one in first.trace] == ["between", "near"]
    assert (second.layers, second.layer_indices, second.project) == ([7, 9], [2, 3], [("kind", 9, 6)])
    assert [one.name for one in second.trace] == ["far"]
    assert (third.layers, third.layer_indices, third.project, third.trace) == ([], [], [], [])
    assert {stage.pooling().first for stage in (first, second, third)} == {1}


def test_a_sample_is_answered_by_the_engine_that_ran_it() -> None:
    first, second = [_answer([1])], [_answer([5])]
    engines = [[[first[0], None, None]], [[None, second[0], None]]]
    assert whole_readouts(engines) == [first[0], second[0], None]
    traces = [[[[("calm", [1.0])], None]], [[None, {"error": "no column"}]]]
    assert whole_traces(traces) == [[("calm", [1.0])], {"error": "no column"}]


def test_one_stage_that_rests_on_the_experiment_alone_speaks_for_the_whole() -> None:
    (whole,) = whole_readouts([[[_answer([1])], [_answer([5], proof="experiment")]]])
    assert whole["proof"] == "experiment"
    stages = [
        {
            "architecture": "A",
            "proof": proof,
            "experiment": {"layers": [{"number": number}], "repeated": repeated, "seconds": 1.0},
        }
        for number, (proof, repeated) in enumerate((("parity", 0.0), ("experiment", 1e-6)))
    ]
    record = whole_model([[stages[0], None, stages[1], None]])
    assert (record["proof"], record["experiment"]["repeated"]) == ("experiment", 1e-6)
    assert record["experiment"]["layers"] == [{"number": 0}, {"number": 1}]
