"""Every figure in the table of published claims, computed anew from the authors' files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

from batch_jobs.report.claims import read_claims
from batch_jobs.scoring.published_generations import score_raw
from tests.support.published_claims import BEGIN, END, PAGE, table


def data_of(claim: str) -> str:
    (found,) = [row.data for row in read_claims() if claim in row.claim]
    return found


def document(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rates(paper_data: Path) -> dict[tuple[int, str], dict[float, list[str]]]:
    """(layer, scenario) -> α -> samples, read from the raw file without the product."""
    return {
        (layer["layer"], one["scenario"]): {cell["alpha"]: cell["samples"] for cell in one["conditions"]}
        for layer in document(paper_data, "steering/qwen2.5-7b.json")["layer_results"]
        for one in layer["experiments"]
    }


def empathetic(text: str) -> bool:
    empathy = "help,support,concern,care,worry,feel,understand,sorry,comfort,listen,reach out"
    task = "objective,task,goal,win,complete,achieve,strategy,efficient,optimal,proceed"
    found = [sum(word in text.lower() for word in words.split(",")) for words in (empathy, task)]
    return found[0] > found[1]


def delta(cells: dict[float, list[str]]) -> float:
    rate = {alpha: fmean(map(empathetic, texts)) for alpha, texts in cells.items()}
    return fmean(rate[alpha] - rate[-alpha] for alpha in rate if alpha > 0)


def test_the_page_holds_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0] == table()


def test_the_listener_does_not_resist(rates: Any) -> None:
    said = data_of("The Listener")
    for layer in (12, 16, 20):
        assert all(map(empathetic, rates[layer, "the_listener"][0.0]))
    assert not any(map(empathetic, rates[12, "the_listener"][-20.0]))
    assert "falls to 0.00 at α = −20" in said
    assert f"Δ is {delta(rates[12, 'the_listener']):.2f}" in said


def test_deltas_by_row_and_by_layer(rates: Any, paper_data: Path, tmp_path: Path) -> None:
    deltas = {key: delta(cells) for key, cells in rates.items()}
    said = data_of("65.3 %")
    assert f"from {min(deltas.values()):.2f} to {max(deltas.values()):.2f}" in said
    assert [scenario for (layer, scenario), value in deltas.items() if layer == 20 and value >= 0.35] == [
        "food_delivery"
    ]
    by_layer = {layer: fmean(value for (at, _), value in deltas.items() if at == layer) for layer in (12, 16, 20)}
    detection = document(paper_data, "qwen2.5-7b_validation.json")["layers"]
    said = data_of("Layer 16")
    assert f"AUROC {detection['16']['auroc']:.3f} at layer 16, {detection['12']['auroc']:.3f} at layer 12" in said
    assert (
        f"Mean Δ is {by_layer[16]:.2f} at layer 16, {by_layer[12]:.2f} at layer 12 and {by_layer[20]:.2f} at layer 20"
        in said
    )
    with score_raw(paper_data / "steering" / "qwen2.5-7b.json", tmp_path / "s.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    success = {
        layer: fmean(float(row["steering_success_rate"]) for row in rows if row["layer"] == str(layer))
        for layer in (12, 20)
    }
    assert f"layer 20 ({success[20]:.1%}) above layer 12".replace("%", " %") in said
    assert success[20] > success[12]


def test_no_effect_succeeds_in_half_of_a_symmetric_grid() -> None:
    draw = np.random.default_rng(0)
    hits = draw.binomial(5, draw.uniform(0.1, 0.9, (100_000, 1)), (100_000, 9))
    effects = np.delete(hits, 4, axis=1) - hits[:, 4:5]
    positive = np.arange(8) >= 4
    assert ((effects > 0) == positive).mean() == pytest.approx(0.5, abs=0.005)
    assert "succeeds at 50 % of a symmetric grid" in data_of("65.3 %")


def test_unsteered_rates_and_coherence(rates: Any) -> None:
    unsteered = [fmean(map(empathetic, cells[0.0])) for cells in rates.values()]
    assert (len(unsteered), unsteered.count(0.0)) == (9, 3)
    assert "0.0 in three of the nine" in data_of("Unsteered empathy")

    def coherent(text: str) -> bool:
        words = text.split()
        return len(text) >= 50 and len(words) >= 10 and len(set(words)) / len(words) >= 0.3

    steered = [text for alpha, texts in rates[20, "the_protector"].items() if alpha for text in texts]
    assert f"coherent in {fmean(map(coherent, steered)):.3f}" in data_of("Coherence")


def test_a_share_of_three_is_no_five_sixths() -> None:
    assert round(5 / 6, 3) == 0.833
    assert 0.833 not in {round(count / 3, 3) for count in range(4)}
    assert "5 of 6" in data_of("Dolphin")


def test_detection_figures(paper_data: Path) -> None:
    layers = document(paper_data, "qwen2.5-7b_validation.json")["layers"]
    said = data_of("0.996 and above")
    assert f"{layers['8']['auroc']:.3f} for Qwen at layer 8" in said
    shift = 2.3262  # two unit Gaussians this far apart have an AUROC of 0.95
    draw = np.random.default_rng(0)
    one, other = draw.normal(shift, 1, (4000, 5, 15, 1)), draw.normal(0, 1, (4000, 5, 1, 15))
    aurocs = (one > other).mean(axis=(2, 3))
    assert aurocs.mean() == pytest.approx(0.95, abs=0.002)
    assert f"averages {aurocs.max(axis=1).mean():.2f} on 15 pairs" in said
    ablation = document(paper_data, "phi3_lexical_ablation.json")["layers"]["12"]["original"]
    assert f"has {ablation['accuracy']:.3f}" in data_of("Accuracy of 100 %")
    random = document(paper_data, "phi3_random_baseline.json")["random_baseline"]
    mean, std = random["mean_auroc"], random["std_auroc"]
    assert f"{(1 - mean) / std:.2f} is the largest z" in data_of("z = 2.09")
    assert f"(1 − {mean:.3f}) / {std:.3f}" in data_of("z = 2.09")


def test_words_alone_tell_the_ablated_texts_apart(paper_data: Path) -> None:
    def texts(name: str) -> list[str]:
        pairs = [json.loads(line) for line in (paper_data / name).read_text(encoding="utf-8").splitlines()]
        return [pair[side] for side in ("empathic_text", "non_empathic_text") for pair in pairs]

    words = make_pipeline(CountVectorizer(binary=True), LogisticRegression(max_iter=1000))
    words.fit(texts("train_pairs.jsonl"), [1] * 35 + [0] * 35)
    labels = [1] * 15 + [0] * 15
    said = [
        f"{roc_auc_score(labels, words.decision_function(texts(name))):.3f}"
        for name in ("test_pairs.jsonl", "test_pairs_ablated.jsonl")
    ]
    assert f"{said[0]} on the test pairs and {said[1]} on the authors' own ablated" in data_of("removal of 41")
