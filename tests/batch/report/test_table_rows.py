from dataclasses import replace
from pathlib import Path

import pytest

from batch_jobs.report.number_text import fixed, number, p_value
from batch_jobs.report.published import read_published
from batch_jobs.report.results import RunResults, read_run
from batch_jobs.report.table_rows import examples, layer_rows, metric_rows, success_rows
from batch_jobs.scoring.correlation import behavioural_correlation
from tests.support.synthetic_run import COLD, KIND, demo_rows, write_run


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> RunResults:
    run = write_run(tmp_path_factory.mktemp("run"), demo_rows(layers=(12, 16)))
    return read_run(run, per_condition=5, max_samples=1000)


def renamed(results: RunResults, model: str) -> RunResults:
    """The same run, of another model."""
    scores = results.scores
    return replace(
        results,
        scores=replace(
            scores,
            conditions=tuple(replace(row, model=model) for row in scores.conditions),
            success=tuple(replace(row, model=model) for row in scores.success),
        ),
    )


def test_an_unpublished_model_stands_beside_phi_3(results: RunResults) -> None:
    model, rows = layer_rows(results, read_published())
    assert model == "Phi-3-mini-4k-instruct"
    assert [(row.ours.layer, row.read_block, row.published_block) for row in rows] == [
        (8, 8, 7),
        (12, 12, 11),
        (16, 16, 15),
        (20, 20, 19),
        (24, 24, 23),
    ]


def test_a_published_model_stands_beside_itself(results: RunResults) -> None:
    qwen = renamed(results, "Qwen/Qwen2.5-7B-Instruct")
    model, rows = layer_rows(qwen, read_published())
    assert model == "Qwen2.5-7B-Instruct"
    assert rows[0].published is not None
    assert rows[0].published.auroc == 0.7911
    assert all(row.same for row in success_rows(qwen, read_published()))


def test_success_rows_count_what_the_rule_decides_and_what_never_moved(results: RunResults) -> None:
    rows = {(row.ours.layer, row.ours.scenario): row for row in success_rows(results, read_published())}
    listener = rows[16, "the_listener"]
    assert (listener.ours.num_decided, listener.num_unmoved) == (6, 0)
    protector = rows[16, "the_protector"]  # 2 of 5 kind at 0 and at -0.1 norms
    assert (protector.ours.num_decided, protector.num_unmoved) == (0, 1)
    assert protector.published is not None
    assert not protector.same
    assert (protector.published.layer, protector.published.success_rate) == (16, 0.875)


def test_metrics_stand_beside_the_papers() -> None:
    detection = behavioural_correlation([1.0, 2.0, 0.0, 3.0], [0, 2, 0, 2]).detection
    rows = {row.name: row for row in metric_rows([detection], read_published().correlation.binary)}
    assert rows["True positives"].ours == (2,)
    assert rows["True positives"].published == 5
    assert rows["Accuracy"].ours == (1.0,)


def test_examples_show_the_largest_strength_at_which_both_signs_are_coherent(results: RunResults) -> None:
    shown = examples(results)
    assert {example.group.scenario for example in shown} == {"the_protector"}
    # at -0.4 norms two of five loop, which leaves most of them coherent
    assert [round(example.group.alpha_residual_norm or 0.0, 3) for example in shown] == [-0.4, 0.0, 0.4]
    assert [example.sample.text for example in shown] == [COLD, KIND, KIND]


def test_examples_fall_back_where_no_strength_is_coherent(results: RunResults) -> None:
    broken = tuple(replace(row, coherence_rate=0.0) for row in results.scores.conditions)
    shown = examples(replace(results, scores=replace(results.scores, conditions=broken)))
    assert [round(example.group.alpha_residual_norm or 0.0, 3) for example in shown] == [-0.1, 0.0, 0.1]


def test_a_run_without_both_signs_has_no_example(results: RunResults) -> None:
    rising = tuple(row for row in results.scores.conditions if row.alpha >= 0)
    assert examples(replace(results, scores=replace(results.scores, conditions=rising))) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.4, "−0.4"),
        (57.7213, "57.7"),
        (999.9, "1,000"),
        (-999.6, "−1,000"),
        (1234.5, "1,234"),
        (-0.00012, "−0.00012"),
        (2.5e7, "2.50e+07"),
        (None, "–"),
    ],
)
def test_numbers_are_short_and_carry_a_true_minus(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_p_value_is_never_zero() -> None:
    assert p_value(1e-9) == "<0.001"
    assert p_value(0.0104) == "0.010"
    assert p_value(None) == "–"
    assert fixed(-1.25, 1) == "−1.2"


def test_a_run_directory_of_before_findings_still_reads(results: RunResults, tmp_path: Path) -> None:
    run = write_run(tmp_path, demo_rows())
    for name in ("findings.json", "behaviour.json"):
        (run / name).unlink()
    old = read_run(run, per_condition=1, max_samples=1000)
    assert old.findings is None
    assert old.behaviours == ()
    assert old.best_steering_layer is None
