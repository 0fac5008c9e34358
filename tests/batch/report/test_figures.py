import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest

from batch_jobs.directions.validate_directions import validate_study
from batch_jobs.directions.validation_file import Validation
from batch_jobs.report.figures.axes import alpha_axis, share_axis
from batch_jobs.report.figures.behaviour import behaviour_figure
from batch_jobs.report.figures.catalogue import write_figures
from batch_jobs.report.figures.detection import ablation_figure, auroc_figure, models_figure
from batch_jobs.report.figures.dose_response import DoseResponse, dose_responses
from batch_jobs.report.figures.paper_figure import PaperFigure, inline_svg
from batch_jobs.report.figures.resistance import focus_scenario, layers_figure, resistance_figure
from batch_jobs.report.figures.sheet import Drawing, Sheet
from batch_jobs.report.figures.steering import dose_response_figure, projection_figure
from batch_jobs.report.figures.style import PALETTE, SERIES, figure_look
from batch_jobs.report.number_text import MINUS, number
from batch_jobs.report.published import read_published
from batch_jobs.scoring.behaviour import BehaviourPoints
from batch_jobs.scoring.compute_scores import score_table
from batch_jobs.scoring.direction_behaviour import direction_behaviours
from batch_jobs.scoring.setting import Setting, SettingNames
from tests.support.synthetic_run import PAIRS, SCENARIOS, demo_rows, generation, readouts, study

STYLE_SHEET = Path(__file__).resolve().parents[3] / "batch_jobs" / "report" / "templates" / "report.css"
PUBLISHED_ALPHAS = [-20.0, -10.0, -5.0, -3.0, 0.0, 3.0, 5.0, 10.0, 20.0]


@pytest.fixture(scope="module")
def validation() -> Validation:
    fast = {"validation": {"all_layers": True, "random_directions": 5, "bootstrap": 100}}
    return validate_study(study(**fast), readouts(num_blocks=26), PAIRS)


@pytest.fixture(scope="module")
def curves() -> tuple[DoseResponse, ...]:
    return dose_responses(score_table(pa.Table.from_pylist(demo_rows(layers=(12, 16)))).conditions)


def names(curves: tuple[DoseResponse, ...]) -> SettingNames:
    return SettingNames.for_settings({curve.setting for curve in curves})


def drawn(figure: PaperFigure) -> Drawing:
    assert figure.drawing is not None
    return figure.drawing


@pytest.fixture(scope="module")
def auroc(validation: Validation) -> Drawing:
    with figure_look():
        return drawn(auroc_figure(validation, 0, read_published()))


def test_the_same_results_draw_the_same_bytes(validation: Validation, auroc: Drawing) -> None:
    with figure_look():
        again = drawn(auroc_figure(validation, 0, read_published()))
    assert again.svg == auroc.svg
    assert again.png == auroc.png


def test_an_svg_file_keeps_its_text_and_uses_the_palette_alone(auroc: Drawing) -> None:
    root = ElementTree.fromstring(auroc.svg.encode())
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"block whose output was read", "accuracy, train threshold"} <= texts
    assert set(re.findall(r"#[0-9a-f]{6}", auroc.svg)) <= set(PALETTE.values())


def test_an_inlined_svg_takes_its_colours_from_the_page(auroc: Drawing) -> None:
    inline = inline_svg(auroc, "fig", "A <title>")
    assert not re.findall(r"#[0-9a-f]{6}", inline)
    assert set(re.findall(r"var\(--(\w+)\)", inline)) <= {*PALETTE, "sans"}
    assert "A &lt;title&gt;" in inline
    assert "<style" not in inline
    ids = re.findall(r' id="([^"]+)"', inline)
    assert all(one.startswith("fig-") for one in ids)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', inline)) <= set(ids)


def test_the_style_sheet_has_the_palette_in_light_and_another_in_dark() -> None:
    light, dark = re.findall(r":root \{(.*?)\}", STYLE_SHEET.read_text(encoding="utf-8"), flags=re.DOTALL)
    for variable, colour in PALETTE.items():
        assert f"--{variable}: {colour}" in light
        assert f"--{variable}: " in dark
        assert f"--{variable}: {colour}" not in dark


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2 defines it."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_colour_stands_out_from_its_paper() -> None:
    themes = re.findall(r":root \{(.*?)\}", STYLE_SHEET.read_text(encoding="utf-8"), flags=re.DOTALL)
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", theme))
        for name in ("ink", "soft", "s1", "s2", "s3", "s4", "s5", "warn"):
            lighter, darker = sorted((luminance(colours[name]), luminance(colours["paper"])), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, name  # WCAG AA for text


def test_series_differ_in_mark_and_line_too() -> None:
    assert len({style.marker for style in SERIES}) == len(SERIES)


def test_labels_that_would_touch_are_left_out_but_zero_and_the_ends_stay() -> None:
    with figure_look():
        sheet = Sheet(3)
        for axes in sheet.panels:
            sheet.line(axes, "rate", PUBLISHED_ALPHAS, [0.5] * 9, SERIES[0])
            alpha_axis(axes, PUBLISHED_ALPHAS, {alpha: alpha / 50 for alpha in PUBLISHED_ALPHAS})
            share_axis(axes, "share of samples")
            axes.set_title("A scenario")
        sheet.render()
        renderer = sheet.figure.canvas.get_renderer()  # type: ignore[attr-defined]  # Agg's, after drawing
        for axes in sheet.panels:
            labels = [label for label in axes.get_xticklabels() if label.get_text()]
            assert {f"{MINUS}20", "0", "20"} <= {label.get_text() for label in labels}
            boxes = [label.get_window_extent(renderer) for label in labels]
            assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
            assert axes.title.get_text() == ""  # titles stand on the left
        panels = [axes.get_tightbbox(renderer) for axes in sheet.panels]
        assert all(left.x1 <= right.x0 for left, right in pairwise(box for box in panels if box is not None))


def test_published_layers_stand_at_the_block_they_were_read_at(validation: Validation, auroc: Drawing) -> None:
    assert "AUROC, Phi-3-mini-4k-instruct, published: 0.991 at 7, 1 at 11" in auroc.description
    with figure_look():
        shifted = drawn(models_figure("demo-model", validation, -1, read_published()))
    own = validation.layers[8].auroc
    assert f"demo-model, this run: {own:.3g} at 7" in shifted.description


def test_words_alone_are_drawn_beside_the_directions(validation: Validation, auroc: Drawing) -> None:
    bag, length = validation.words.bag_of_words.auroc, validation.words.length.auroc
    assert f"bag of words alone: {number(bag)} at 0, {number(bag)} at 25" in auroc.description
    assert f"length alone: {number(length)} at 0" in auroc.description
    with figure_look():
        ablation = drawn(ablation_figure(validation, read_published()))
        assert validation.ablation is not None
        unknown = replace(validation, ablation=replace(validation.ablation, words=None))
        without = drawn(ablation_figure(unknown, read_published()))
    # five layers, the published one, then the words
    assert f"before, bag of words: {number(bag)} at 5.8" in ablation.description
    assert f"after, bag of words: {number(bag)} at 6.2" in ablation.description
    assert "before, bag of words" in without.description
    assert "after, bag of words" not in without.description


def test_the_ablation_figure_says_when_there_was_none(validation: Validation) -> None:
    figure = ablation_figure(replace(validation, ablation=None), read_published())
    assert figure.drawing is None
    assert "without lexical ablation" in figure.missing


def test_a_direction_without_rows_of_its_own_at_zero_shares_the_layers_baseline() -> None:
    rows = [generation("maze", in_norms, 0) for in_norms in (-0.1, 0.0, 0.1)]
    rows += [generation("maze", in_norms, 0, direction="empathy-pca") for in_norms in (-0.1, 0.1)]
    curves = dose_responses(score_table(pa.Table.from_pylist(rows)).conditions)
    assert [(curve.setting.direction, curve.alphas) for curve in curves] == [
        ("empathy", [-18.0, 0.0, 18.0]),
        ("empathy-pca", [-18.0, 0.0, 18.0]),
    ]


def test_dose_response_draws_a_panel_a_scenario_and_setting(curves: tuple[DoseResponse, ...]) -> None:
    with figure_look():
        drawing = drawn(dose_response_figure(curves, names(curves), read_published()))
    for scenario in ("Food Delivery", "The Listener", "The Protector"):
        for layer in (12, 16):
            assert f"{scenario}\nlayer {layer}: share of samples against α." in drawing.description
    # layer 16, the protector: 0, 1, 2, 2, 3, 4, 5 of 5 kind, by the fixture's rule
    assert f"empathetic: 0 at {MINUS}72, 0.2 at {MINUS}36, 0.4 at {MINUS}18, 0.4 at 0, 0.6 at 18" in drawing.description


def test_a_published_model_is_drawn_with_its_published_curve() -> None:
    rows = [
        generation("the_listener", alpha, 0) | {"model": "Qwen/Qwen2.5-7B-Instruct", "alpha": alpha}
        for alpha in (-3.0, 0.0, 3.0)
    ]
    curves = dose_responses(score_table(pa.Table.from_pylist(rows)).conditions)
    with figure_look():
        drawing = drawn(dose_response_figure(curves, names(curves), read_published()))
    assert f"empathetic, published: 0.6 at {MINUS}20" in drawing.description


def test_the_projection_figure_refers_to_unsteered_plus_alpha(curves: tuple[DoseResponse, ...]) -> None:
    with figure_look():
        drawing = drawn(projection_figure(curves[:1], names(curves)))
        prompt_only = replace(curves[0], setting=replace(curves[0].setting, span="prompt"))
        without = drawn(projection_figure([prompt_only], names(curves)))
    assert "unsteered + α" in drawing.svg
    assert "unsteered + α" not in without.svg


def test_the_resistance_figure_warns_of_a_ceiling(curves: tuple[DoseResponse, ...]) -> None:
    with figure_look():
        figure = resistance_figure(curves, 16, names(curves), read_published())
    assert "ideal linear response" in drawn(figure).svg
    assert "This run, layer 16" in drawn(figure).description
    assert "a ceiling, not resistance" in figure.note


def test_layers_are_compared_in_the_unit_they_share(curves: tuple[DoseResponse, ...]) -> None:
    with figure_look():
        several = drawn(layers_figure(curves, names(curves), read_published()))
        one = layers_figure(curves[: len(SCENARIOS)], names(curves), read_published())
    assert "α / mean residual norm" in several.description
    assert one.drawing is None
    assert "nothing to compare" in one.missing


def test_without_the_listener_the_scenario_of_the_highest_baseline_is_shown() -> None:
    rows = [generation(name, in_norms, sample) for name in SCENARIOS for in_norms in (0.0, 0.1) for sample in range(3)]
    for row in rows:
        row["scenario"] = {"the_listener": "friend", "food_delivery": "maze"}.get(row["scenario"], "duel")
    assert focus_scenario(dose_responses(score_table(pa.Table.from_pylist(rows)).conditions)) == "friend"


def test_settings_that_do_not_all_fit_show_the_layers_of_the_main_direction_first() -> None:
    rows = [
        generation("maze", in_norms, 0, layer, direction=direction)
        for layer in (12, 16)
        for direction in ("empathy", "empathy-logistic-regression", "empathy-pca")
        for in_norms in (0.0, 0.1)
    ]
    curves = dose_responses(score_table(pa.Table.from_pylist(rows)).conditions)
    with figure_look():
        figure = layers_figure(curves, names(curves), read_published())
    shown = re.findall(r"(layer \d+, [\w-]+):", drawn(figure).description)
    assert shown[:2] == ["layer 12, empathy", "layer 16, empathy"]
    assert len(shown) == 5
    assert figure.note == "1 more settings are in the tables only."


def test_a_long_direction_name_and_a_series_without_points_leave_the_panels_whole() -> None:
    points = BehaviourPoints(
        model=np.array(["m"] * 6, dtype=object),
        layer=np.full(6, 12, dtype=np.int32),
        scenario=np.array(["maze"] * 6, dtype=object),
        direction=np.array(["empathy-logistic-regression"] * 3 + ["empathy"] * 3, dtype=object),
        op=np.array(["add"] * 6, dtype=object),
        seed=np.arange(6.0),
        span=np.array(["all"] * 6, dtype=object),
        alpha=np.array([-1.0, 1.0, 2.0, -1.0, 0.0, 1.0]),  # the first direction has no unsteered row
        projection_unsteered=np.arange(6.0),
        projection_generated=np.arange(6.0),
        grade=np.array([0, 1, 2, 0, 1, 2], dtype=np.int8),
        judged=np.zeros(6, dtype=np.bool_),
    )
    with figure_look():  # a failed layout is a warning, and so an error here
        drawing = drawn(behaviour_figure(direction_behaviours(points), read_published()))
    assert "steered: 3 points" in drawing.description
    assert "r 1.00, ρ 1.00, n 3" in drawing.description
    assert "r 0.71, ρ 0.71, n 12" in drawing.description


def test_setting_names_say_what_tells_settings_apart() -> None:
    one = Setting("demo-model", 16, "empathy", "add", "all")
    assert SettingNames.for_settings([one])(one) == "layer 16"
    other = replace(one, direction="empathy-pca", span="generated")
    assert SettingNames.for_settings([one, other])(other) == "layer 16, empathy-pca (add, generated)"


def test_files_of_an_earlier_report_do_not_stay(tmp_path: Path, auroc: Drawing) -> None:
    (tmp_path / "figure-9-layers-compared.svg").write_text("old", encoding="utf-8")
    (tmp_path / "notes.svg").write_text("not ours", encoding="utf-8")
    write_figures(tmp_path, [PaperFigure("1", "auroc-by-layer", "AUROC by layer", drawing=auroc)])
    assert {path.name for path in tmp_path.iterdir()} == {
        "figure-1-auroc-by-layer.svg",
        "figure-1-auroc-by-layer.png",
        "notes.svg",
        "figure-1-auroc-by-layer.csv",
    }
