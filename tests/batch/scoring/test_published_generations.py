from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from batch_jobs.scoring.published_generations import PUBLISHED_COLUMNS, read_published_generations, score_raw
from batch_jobs.scoring.scores_csv import ScoreError

KIND, COLD = "I am sorry and I want to help you.", "The objective comes first, so proceed."


def model(key: str = "tiny", layers: tuple[int, ...] = (16, 12)) -> dict[str, Any]:
    conditions = [
        {"alpha": -5.0, "condition_name": "anti_empathy_5", "samples": [COLD, COLD]},
        {"alpha": 0.0, "samples": [KIND, COLD]},
        {"alpha": 5.0, "samples": [KIND, KIND]},
    ]
    experiments = [{"scenario": name, "conditions": conditions} for name in ("zebra", "ant")]
    return {"model_key": key, "layer_results": [{"layer": layer, "experiments": experiments} for layer in layers]}


def write(folder: Path, document: Any) -> Path:
    path = folder / "raw.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def cells(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_published_success_csv_comes_out_cell_for_cell(paper_data: Path, tmp_path: Path) -> None:
    out = score_raw(paper_data / "steering" / "qwen2.5-7b.json", tmp_path / "new" / "out.csv")
    ours = [
        ",".join(line.split(",")[: len(PUBLISHED_COLUMNS)]) for line in out.read_text(encoding="utf-8").splitlines()
    ]
    assert ours == (paper_data / "steering" / "qwen2.5-7b_success.csv").read_text(encoding="utf-8").split()


def test_the_listener_at_the_ceiling_resists_by_arithmetic_only(paper_data: Path, tmp_path: Path) -> None:
    """The paper's 50 % at three layers: half its α could not succeed, and the outcomes rise with α at two of them."""
    out = score_raw(paper_data / "steering" / "qwen2.5-7b.json", tmp_path / "out.csv")
    listener = [cell for cell in cells(out) if cell["scenario"] == "the_listener"]
    assert {(cell["steering_success_rate"], cell["cannot_rise"], cell["num_decided"]) for cell in listener} == {
        ("0.5", "true", "8")
    }
    assert sum(float(cell["trend_p"]) < 0.01 for cell in listener) == 2


def test_the_effect_of_the_published_generations_needs_no_baseline(paper_data: Path, tmp_path: Path) -> None:
    out = score_raw(paper_data / "steering" / "qwen2.5-7b.json", tmp_path / "out.csv")
    found = {(cell["layer"], cell["scenario"]): cell for cell in cells(out)}
    # Δ and the percentile interval of a plain bootstrap within cells, 99,999 draws, computed apart from this code
    plain = {
        ("16", "food_delivery"): (0.60, 0.40, 0.80),
        ("16", "the_protector"): (0.55, 0.35, 0.75),
        ("12", "food_delivery"): (0.20, -0.05, 0.45),
        ("20", "the_listener"): (0.15, -0.05, 0.35),
        ("12", "the_listener"): (0.35, 0.25, 0.45),
    }
    for place, (delta, low, high) in plain.items():
        cell = found[place]
        assert float(cell["delta"]) == pytest.approx(delta, abs=1e-12)
        # one sample moves Δ by .05; ours is wider by about that, since a cell of 0 or 5 has a width too
        assert float(cell["delta_low"]) == pytest.approx(low, abs=0.05)
        assert float(cell["delta_high"]) == pytest.approx(high, abs=0.05)
        assert float(cell["delta_low"]) < low + 1e-9
    # the rule calls a fall from no empathetic text to none a success: 4 of 4 negative α failed here, and Δ shows why
    assert (found["12", "food_delivery"]["cannot_fall"], found["12", "food_delivery"]["num_decided"]) == ("true", "0")
    assert found["12", "food_delivery"]["loss"] == "-0.25"
    p = [float(cell["trend_p"]) for cell in cells(out)]
    assert (sum(one < 0.05 for one in p), sum(float(cell["trend_p_holm"]) < 0.05 for cell in cells(out))) == (7, 6)
    assert len({cell["layer"] for cell in cells(out) if cell["delta"] != cell["delta_word_start"]}) == 2
    assert "asymmetry" not in cells(out)[0]


def test_rows_keep_the_order_of_the_file(tmp_path: Path) -> None:
    out = score_raw(write(tmp_path, model()), tmp_path / "out.csv")
    assert [(cell["model"], cell["layer"], cell["scenario"]) for cell in cells(out)] == [
        ("tiny", layer, scenario) for layer in ("16", "12") for scenario in ("zebra", "ant")
    ]
    assert {cell["corrected_success_rate"] for cell in cells(out)} == {"1.0"}


@pytest.mark.parametrize(
    "document",
    [
        {"models": [model("one"), model("two")], "date": "2025"},
        {"models": {"first": model("one"), "second": model("two")}},
        {"models": {key: {"layer_results": model()["layer_results"]} for key in ("one", "two")}},
        [model("one"), model("two")],
    ],
)
def test_several_models_one_level_deeper_come_out_one_after_the_other(tmp_path: Path, document: Any) -> None:
    out = score_raw(write(tmp_path, document), tmp_path / "out.csv")
    assert [cell["model"] for cell in cells(out)] == ["one"] * 4 + ["two"] * 4


def test_one_model_under_models_needs_no_list(tmp_path: Path) -> None:
    assert read_published_generations(write(tmp_path, {"models": model("only")}))["model"].unique().to_pylist() == [
        "only"
    ]


def test_null_and_empty_samples_count_as_empty_texts_and_missing_ones_do_not_count(tmp_path: Path) -> None:
    document = model(layers=(8,))
    document["layer_results"][0]["experiments"] = [
        {
            "scenario": "s",
            "conditions": [
                {"alpha": 0, "samples": [KIND, COLD]},
                {"alpha": -5.0, "samples": [None, "", "move " * 9, COLD]},
                {"alpha": -10.0, "samples": []},
                {"alpha": -20.0, "samples": None},
                {"alpha": 20.0},
            ],
        }
    ]
    (cell,) = cells(score_raw(write(tmp_path, document), tmp_path / "out.csv"))
    assert (cell["num_alphas"], cell["steering_success_rate"]) == ("1", "1.0")
    assert (cell["empty_rate"], cell["loop_rate"], cell["code_like_rate"]) == ("0.5", "0.25", "0.0")


def test_the_table_says_what_the_file_leaves_to_the_method(tmp_path: Path) -> None:
    table = read_published_generations(write(tmp_path, model()))
    assert table.num_rows == 2 * 2 * 3 * 2
    first = table.slice(0, 1).to_pylist()[0]
    assert (first["direction"], first["op"], first["span"]) == ("empathy", "add", "all")
    assert (first["layer"], first["alpha"], first["alpha_residual_norm"], first["error"]) == (16, -5.0, None, None)


def bad(change: Any) -> Any:
    document = model()
    change(document)
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "model 0, model_key"),
        ([], "holds no samples"),
        ("text", "model 0, the whole"),
        ({"models": []}, "holds no samples"),
        (bad(lambda d: d.pop("layer_results")), "layer_results: Field required"),
        (bad(lambda d: d["layer_results"][1].update(layer="x")), "model 0, layer_results.1.layer: "),
        (bad(lambda d: d["layer_results"][0]["experiments"][0]["conditions"][1].update(samples=[3])), "samples.0"),
        (bad(lambda d: d["layer_results"][0]["experiments"][0]["conditions"].pop(1)), "no usable row at α = 0"),
        (
            bad(lambda d: d["layer_results"][0]["experiments"][1]["conditions"][2]["samples"].append("\ud83d")),
            r"field conditions: entry 3: field samples: entry 3: got '\ud83d', which has no UTF-8 form",
        ),
    ],
)
def test_a_file_of_another_shape_is_refused_in_one_line_that_names_it(
    tmp_path: Path, document: Any, message: str
) -> None:
    path = write(tmp_path, document)
    with pytest.raises(ScoreError) as caught:
        score_raw(path, tmp_path / "out.csv")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.csv").exists()


def test_a_file_that_is_absent_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match="No such file"):
        score_raw(tmp_path / "none.json", tmp_path / "out.csv")
    (tmp_path / "raw.json").write_bytes(b"\xff{")
    with pytest.raises(ScoreError, match="not UTF-8 text"):
        score_raw(tmp_path / "raw.json", tmp_path / "out.csv")
