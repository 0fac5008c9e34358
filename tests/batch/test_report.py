from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_jobs.figures import auroc_figure, setting_figures, settings
from batch_jobs.panel import MINUS, STYLE_NAMES, Line, Panel, Value, draw, mark_path, number, round_ticks
from batch_jobs.report import SHOWN_PER_CONDITION, ReportError, write_report
from batch_jobs.score import score_table, write_scores
from batch_jobs.scores import ScoreError
from batch_jobs.validate import ValidationError, read_validation, validate_layer, write_validation

KIND = "I am sorry this is happening to you. I stop here, I listen, and I want to help you through it today."
COLD = "The objective is to win, so I complete the task on the optimal path before anything else can happen."
MEAN = {8: 96.0, 16: 180.0}
HOSTILE = "<script>alert('x')</script> & <img src=http://evil.example/x> I listen, I am sorry, I care about you."


def generation(scenario: str, in_norms: float, sample: int, **changes: Any) -> dict[str, Any]:
    # more kind texts the larger alpha is; the listener starts at the ceiling
    kind = (scenario == "the_listener" and in_norms >= 0) or sample < 2 + 8 * in_norms
    text = "7 7 7 7 7 7 7" if in_norms <= -0.4 and sample % 2 else KIND if kind else COLD
    alpha = in_norms * MEAN[16]
    return {
        "row_id": f"{scenario}{in_norms}{sample}", "model": "demo-model", "model_revision": None,
        "direction": "empathy", "direction_hash": "ab" * 32, "layer": 16, "op": "add", "span": "all",
        "alpha": alpha, "alpha_residual_norm": in_norms, "scenario": scenario, "sample": sample,
        "seed": sample,
        "completion": text,
        "prompt": f"You deliver food.\n\nSomebody in {scenario} needs help.\n\nWhat do you do?",
        "finish_reason": "stop", "prompt_tokens": 40, "completion_tokens": 25, "projection_prompt": 3.0,
        "projection_generated": 5.0 + 1.1 * alpha + sample, "seconds": 1.0, "error": None,
    } | changes  # fmt: skip


def write_run(folder: Path, rows: list[dict[str, Any]], **provenance: Any) -> Path:
    rng = np.random.default_rng(0)
    direction = np.zeros(16)
    direction[0] = 1.0
    results = {
        layer: validate_layer(layer, rng.normal(shift, 1.0, (15, 16)), rng.normal(0.0, 1.0, (15, 16)), direction)
        for layer, shift in ((8, 1.0), (12, 1.5), (16, 4.0), (20, 3.0), (24, 2.0))
    }
    write_validation(
        folder / "validation.json",
        results,
        {"mean_residual_norm": {8: 96.2, 12: 142.0, 16: 180.0, 20: 221.5, 24: 240.0}, "pooling": "mean"},
    )
    half = len(rows) // 2
    schema = pa.Table.from_pylist(rows).schema
    for index, part in enumerate((rows[:half], rows[half:])):
        place = folder / "generations" / "model_key=demo-model" / "layer_key=16"
        place.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part, schema=schema), place / f"part-{index}.parquet")
    (place / ".part-2.parquet").write_bytes(b"half a file")
    markers = {"the_listener": ["listen", "sorry"], "food_delivery": ["path", "today"]}
    write_scores(folder / "scores.csv", score_table(pa.Table.from_pylist(rows), markers))
    document = {"config": {"name": "demo", "extract": {"extract_offset": 0}}, "versions": {"vllm": "0.32.0"}}
    (folder / "provenance.json").write_text(json.dumps(document | provenance))
    return folder


def demo_rows() -> list[dict[str, Any]]:
    rows = [
        generation(scenario, in_norms, sample)
        for scenario in ("food_delivery", "the_listener", "the_protector")
        for in_norms in (-0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4)
        for sample in range(5)
    ]
    rows[0] = rows[0] | {"completion": HOSTILE}
    rows[6] = rows[6] | {"completion": ""}
    rows[8] = rows[8] | {
        "completion": None,
        "finish_reason": None,
        "completion_tokens": None,
        "error": "<b>out</b>",
    }
    return rows


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_report(write_run(tmp_path_factory.mktemp("run"), demo_rows()))
    assert path.name == "report.html"
    return path.read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Collects what the tests ask of a page."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"src", "href", "data", "action", "srcset", "poster", "xlink:href"}:
                self.links.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    return parser


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    parsed = outline(page)
    assert parsed.links
    assert all(link.startswith("#") for link in parsed.links)
    assert not {"link", "img", "iframe", "object"} & set(parsed.tags)
    assert "@import" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_the_page_is_well_formed_and_its_anchors_lead_somewhere(page: str) -> None:
    parsed = outline(page)
    assert parsed.unbalanced == []
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)
    sections = "detection dose-response projection success conditions samples care provenance"
    assert set(sections.split()) <= set(parsed.ids)


def test_text_of_the_run_is_escaped(page: str) -> None:
    assert page.count("<script") == 1
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &lt;img" in page
    assert "&lt;b&gt;out&lt;/b&gt;" in page


def test_every_panel_can_be_read_without_seeing_it(page: str) -> None:
    figures = re.findall(r'<svg viewBox[^>]*role="img"[^>]*>', page)
    assert len(figures) == 1 + 3 + 1  # detection, three scenarios, projection
    assert page.count("<desc ") == len(figures)
    assert "empathetic: 0.2 at −72" in page


def test_numbers_and_caveats_are_there(page: str) -> None:
    assert "105" in page
    assert "1 failed" in page
    assert "(empty completion)" in page
    assert "The Listener at layer 16: unsteered rate\n    1.00 (ceiling), success 0.500" in page
    assert "In this run they agree" in page
    assert "0 of 5 still allows a true rate of 0.43" in page
    assert "mean ‖h‖" in page.lower()


def test_all_samples_are_listed_without_scripts(page: str) -> None:
    assert page.count("<article>") == 104
    assert '<form id="filter" hidden>' in page


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"extract": {"extract_offset": -1}}, "In this run they differ (<code>extract_offset</code> −1)"),
        ({}, "does not record the extraction offset"),
    ],
)
def test_the_layer_pairing_is_stated(tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    assert expected in write_report(write_run(tmp_path, demo_rows(), config=config)).read_text(encoding="utf-8")


def test_a_long_run_shows_the_first_samples_only(tmp_path: Path) -> None:
    rows = [generation("maze", alpha, sample) for alpha in (0.0, 0.1) for sample in range(SHOWN_PER_CONDITION + 7)]
    page = write_report(write_run(tmp_path, rows)).read_text(encoding="utf-8")
    assert page.count("<article>") == 2 * SHOWN_PER_CONDITION
    assert f"{2 * SHOWN_PER_CONDITION} of {len(rows)} rows" in page


def test_a_run_without_readouts_or_judged_conditions_still_has_a_report(tmp_path: Path) -> None:
    rows = [
        generation("maze", alpha, sample, op="set", projection_generated=None)
        for alpha in (0.0, 0.1)
        for sample in range(2)
    ]
    page = write_report(write_run(tmp_path, rows)).read_text(encoding="utf-8")
    assert "Nothing to judge" in page
    assert "unsteered + α" not in page


@pytest.mark.parametrize(
    ("missing", "error"),
    [
        ("validation.json", ValidationError),
        ("scores.csv", ScoreError),
        ("provenance.json", ReportError),
        ("generations", ScoreError),
    ],
)
def test_a_missing_part_is_named(tmp_path: Path, missing: str, error: type[Exception]) -> None:
    run = write_run(tmp_path / "run", demo_rows())
    (run / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(error, match=re.escape(str(run / missing))):
        write_report(run)
    assert not (run / "report.html").exists()


def test_scores_without_a_condition_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, demo_rows())
    header = (run / "scores.csv").read_text(encoding="utf-8").splitlines()[0]
    (run / "scores.csv").write_text(header + "\n", encoding="utf-8")
    with pytest.raises(ReportError, match="has no condition"):
        write_report(run)


def test_a_run_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="is not a directory"):
        write_report(tmp_path / "nowhere")


def test_the_projection_panel_refers_to_unsteered_plus_alpha(tmp_path: Path) -> None:
    scores = score_table(pa.Table.from_pylist([generation("maze", a, 0) for a in (-0.1, 0.0, 0.1)]))
    (setting,) = settings(scores)
    figures = setting_figures(scores, setting)
    assert figures.projection is not None
    assert len(figures.projection.references) == 1
    assert [tick.label for tick in figures.dose_response[0].top_ticks] == [f"{MINUS}0.1", "0", "0.1"]


def test_marks_stay_inside_the_plot(tmp_path: Path) -> None:
    figure = auroc_figure(read_validation(write_run(tmp_path, demo_rows()) / "validation.json"))
    assert all(figure.left < mark.x < figure.right for series in figure.series for mark in series.marks)


def test_labels_that_would_touch_are_left_out_but_zero_and_the_ends_stay() -> None:
    alphas = tuple(float(alpha) for alpha in (-20, -10, -5, -3, 0, 3, 5, 10, 20))
    line = Line("rate", "s1", tuple(Value(alpha, 0.5) for alpha in alphas))
    figure = draw(Panel("t", "x", "y", (line,), x_ticks=alphas))
    labels = [tick.label for tick in figure.x_ticks]
    assert len(labels) == 9
    assert {"0", "20", f"{MINUS}20"} <= set(labels)
    assert "" in labels


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.4, "−0.4"),
        (57.7213, "57.7"),
        (1234.5, "1,234"),
        (-0.00012, "−0.00012"),
        (2.5e7, "2.50e+07"),
    ],
)
def test_numbers_are_short_and_carry_a_true_minus(value: float, text: str) -> None:
    assert number(value) == text


def test_ticks_are_round_numbers() -> None:
    assert round_ticks(0.0, 1.0) == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert round_ticks(-73.0, 81.0) == (-50.0, 0.0, 50.0)


@pytest.mark.parametrize("style", STYLE_NAMES)
def test_every_style_has_a_closed_mark_of_its_own(style: str) -> None:
    outlines = {mark_path(other, 0.0, 0.0) for other in STYLE_NAMES}
    assert len(outlines) == len(STYLE_NAMES)
    assert mark_path(style, 0.0, 0.0).endswith("Z")
