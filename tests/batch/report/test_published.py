import csv
import json
from pathlib import Path
from typing import Any

import pytest

from batch_jobs.report.published import published_model, read_published

ROUNDING = 5.1e-5
"""The facts are kept to four decimal places; a tie that was rounded is half a unit away, give or take float noise."""
EMPATHY = [
    "help",
    "support",
    "concern",
    "care",
    "worry",
    "feel",
    "understand",
    "sorry",
    "comfort",
    "listen",
    "reach out",
]
TASK = ["objective", "task", "goal", "win", "complete", "achieve", "strategy", "efficient", "optimal", "proceed"]


def data(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("file", "part", "model"),
    [
        ("phi3_validation.json", "layer_results", "Phi-3-mini-4k-instruct"),
        ("qwen2.5-7b_validation.json", "layers", "Qwen2.5-7B-Instruct"),
    ],
)
def test_layers_are_those_of_the_authors_files(paper_data: Path, file: str, part: str, model: str) -> None:
    layers = read_published().layers_of(model)
    theirs = data(paper_data, file)[part]
    assert sorted(layers) == sorted(map(int, theirs))
    for key, row in theirs.items():
        ours = layers[int(key)]
        got = (ours.auroc, ours.accuracy, ours.separation, ours.std_empathic, ours.std_non_empathic)
        names = ("auroc", "accuracy", "separation", "empathic_std", "non_empathic_std")
        assert got == pytest.approx([row[name] for name in names], abs=ROUNDING)


def test_the_random_baseline_is_that_of_the_authors_file(paper_data: Path) -> None:
    ours, theirs = read_published().random_baseline, data(paper_data, "phi3_random_baseline.json")
    assert ours.layer == theirs["layer"]
    random = theirs["random_baseline"]
    assert ours.aurocs == pytest.approx(random["all_aurocs"], abs=ROUNDING)
    assert ours.mean == pytest.approx(random["mean_auroc"], abs=ROUNDING)
    assert ours.std == pytest.approx(random["std_auroc"], abs=ROUNDING)
    assert ours.percentile_95 == pytest.approx(random["95th_percentile"], abs=ROUNDING)
    assert ours.z_score == pytest.approx(theirs["comparison"]["z_score"], abs=ROUNDING)


def test_the_ablation_keeps_the_data_files_accuracy_beside_the_tables(paper_data: Path) -> None:
    published = read_published()
    ours, theirs = published.lexical_ablation, data(paper_data, "phi3_lexical_ablation.json")
    assert ours.num_keywords == theirs["keyword_dict_size"]
    assert ours.replacements_per_text == pytest.approx(
        theirs["ablation_stats"]["avg_replacements_per_pair"], abs=ROUNDING
    )
    for side, name in ((ours.before, "original"), (ours.after, "ablated")):
        row = theirs["layers"]["12"][name]
        got = (side.auroc, side.accuracy, side.separation)
        assert got == pytest.approx((row["auroc"], row["accuracy"], row["separation"]), abs=ROUNDING)
    assert published.layers_of(ours.model)[ours.layer].accuracy != ours.before.accuracy


def test_the_correlation_is_that_of_the_authors_file(paper_data: Path) -> None:
    ours, theirs = read_published().correlation, data(paper_data, "phi3_eia_correlation.json")
    assert [(point.projection, point.grade) for point in ours.points] == [
        (row["probe_score"], row["true_score"]) for row in theirs["detailed_results"]
    ]
    got = (ours.pearson_r, ours.pearson_p, ours.spearman_rho, ours.spearman_p)
    names = ("pearson_correlation", "pearson_p_value", "spearman_correlation", "spearman_p_value")
    assert got == pytest.approx([theirs[name] for name in names], abs=ROUNDING)
    binary = ours.binary
    matrix = [
        [binary.true_negatives, binary.false_positives],
        [binary.false_negatives, binary.true_positives],
    ]
    assert matrix == theirs["confusion_matrix"]


def test_success_rates_are_those_of_the_authors_file(paper_data: Path) -> None:
    with (paper_data / "steering" / "qwen2.5-7b_success.csv").open(encoding="utf-8", newline="") as file:
        theirs = {(int(row["layer"]), row["scenario"]): row for row in csv.DictReader(file)}
    ours = {(row.layer, row.scenario): row for row in read_published().steering if row.model.startswith("Qwen")}
    assert ours.keys() == theirs.keys()
    for key, row in theirs.items():
        assert ours[key].success_rate == float(row["steering_success_rate"])
        assert ours[key].baseline_empathy_rate == float(row["baseline_empathy_rate"])
        assert ours[key].num_alphas == int(row["num_alphas"])


def test_dose_responses_are_the_rates_of_the_authors_generations(paper_data: Path) -> None:
    theirs: dict[tuple[int, str], dict[float, list[str]]] = {}
    for layer in data(paper_data, "steering/qwen2.5-7b.json")["layer_results"]:
        for experiment in layer["experiments"]:
            conditions = {condition["alpha"]: condition["samples"] for condition in experiment["conditions"]}
            theirs[layer["layer"], experiment["scenario"]] = conditions
    published = read_published()
    assert {(curve.layer, curve.scenario) for curve in published.dose_response.curves} == theirs.keys()
    for curve in published.dose_response.curves:
        texts = theirs[curve.layer, curve.scenario]
        assert curve.alphas == tuple(texts)
        for alpha, rate in zip(curve.alphas, curve.empathy_rates, strict=True):
            lowered = [text.lower() for text in texts[alpha]]
            kind = [sum(word in text for word in EMPATHY) > sum(word in text for word in TASK) for text in lowered]
            assert rate == sum(kind) / len(kind)


def test_coherence_of_the_data_is_the_mean_over_nonzero_alphas() -> None:
    published = read_published()
    by_key = {(row.layer, row.scenario): row for row in published.steering if row.model.startswith("Qwen")}
    for curve in published.dose_response.curves:
        rates = [rate for alpha, rate in zip(curve.alphas, curve.coherence_rates, strict=True) if alpha]
        assert by_key[curve.layer, curve.scenario].coherence_rate_in_data == pytest.approx(sum(rates) / len(rates))


def test_the_mean_success_is_the_papers_headline() -> None:
    rates = [row.success_rate for row in read_published().steering]
    assert sum(rates[:9]) / 9 == pytest.approx(0.653, abs=5e-4)  # Qwen, printed to three digits
    assert sum(rates[9:]) / 9 == pytest.approx(0.944, abs=5e-4)  # Dolphin


@pytest.mark.parametrize(
    ("model", "known"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct"),
        ("/models/Phi-3-mini-4k-instruct/", "Phi-3-mini-4k-instruct"),
        ("someone/dolphin-2.9.4-llama3.1-8b", "Dolphin-Llama-3.1-8B"),
        ("Qwen/Qwen2.5-0.5B-Instruct", None),
        ("demo-model", None),
    ],
)
def test_a_run_is_set_beside_the_published_model_of_its_name(model: str, known: str | None) -> None:
    assert published_model(model) == known
