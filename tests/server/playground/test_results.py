"""What is made of the answers: shading, the chart, word differences, and the files that can be saved."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.server.fake_steering_server import FakeSteeringServer, alpha_of
from tests.support.server.playground_visit import Visit

pytestmark = pytest.mark.slow


def test_every_token_carries_its_own_value_and_the_last_none(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.run()
    tokens = visit.column(1).locator(".output span")
    told = tokens.evaluate_all("(spans) => spans.map((span) => span.dataset.value)")
    values = fake.values(8)
    # the fourth token has no text: its value is part of the fifth's, as their mean
    expected: list[Any] = [*values[:3], (values[3] + values[4]) / 2, *values[5:], None]
    assert [None if text is None else float(text) for text in told] == expected
    colours = tokens.evaluate_all("(spans) => spans.map((span) => getComputedStyle(span).backgroundColor)")
    assert colours[0] == colours[5]  # 8 and 8
    assert len(set(colours[:3])) == 3  # 8, 9 and 10
    assert visit.page.locator("#centre").text_content() == f"{sum(fake.values(0)) / len(values):.3g}"
    # around its own mean a reply's tokens lie on both sides of the centre, and α itself is taken out
    visit.page.get_by_label("Shade each answer around its own mean").check()
    apart = [
        visit.column(index).locator(".output span").evaluate_all("(s) => s.map((x) => x.style.backgroundColor)")
        for index in (0, 1)
    ]
    assert apart[0] == apart[1]
    assert "--low" in apart[1][0]
    assert "--high" in apart[1][2]


def test_an_end_of_the_scale_that_values_exceed_is_marked(visit: Visit, fake: FakeSteeringServer) -> None:
    ends = visit.page.locator("#lowest, #highest")
    visit.run()
    assert not any(sign in text for text in ends.all_text_contents() for sign in "≤≥")
    assert "Beyond" not in str(visit.page.locator("#legend-text").text_content())
    visit.number(1).fill("400")
    visit.page.get_by_label("Samples").fill("6")
    fake.tokens = 61
    visit.add("another number")
    visit.type_number(2, "1")
    visit.run()
    low, high = ends.all_text_contents()
    # every third value of the sixth sample with α 400 is the largest: one of 3·6·3, less than the 2 % beyond the end
    values = [float(text) for text in visit.column(1).locator("[data-value]").evaluate_all(SHOWN)]
    end = float(high.removeprefix("≥ "))
    assert high.startswith("≥ ")
    assert max(values) > end
    assert not low.startswith("≤")
    assert "Beyond an end marked ≤ or ≥, all values have its colour." in str(
        visit.page.locator("#legend-text").text_content()
    )
    colours = dict(zip(values, visit.column(1).locator("[data-value]").evaluate_all(COLOUR), strict=True))
    assert len({colour for value, colour in colours.items() if value >= end}) == 1


SHOWN = "(spans) => spans.map((span) => span.dataset.value)"
COLOUR = "(spans) => spans.map((span) => getComputedStyle(span).backgroundColor)"


def test_a_value_can_be_read_by_pointer_and_by_keyboard(visit: Visit) -> None:
    visit.run()
    column = visit.column(1)
    column.locator(".output span").nth(1).hover()
    assert column.locator(".detail").text_content() == 'Token 2 " warm1": 9.00'
    column.locator(".output span").first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End"):
        visit.page.keyboard.press(key)
    assert "Token 12" in str(column.locator(".detail").text_content())
    assert column.locator(".output [tabindex='0']").count() == 1


def change_direction(visit: Visit) -> None:
    visit.entry(0).get_by_label("Direction").select_option("long")


def change_layer(visit: Visit) -> None:
    visit.entry(0).get_by_label("Layer").select_option("1")


def change_operation(visit: Visit) -> None:
    visit.page.get_by_label("Operation").select_option("set")


def change_span(visit: Visit) -> None:
    visit.page.get_by_label("Steered tokens").select_option("all")


def change_prompt(visit: Visit) -> None:
    visit.page.get_by_label("Prompt", exact=True).fill("Another one")


def change_seed(visit: Visit) -> None:
    visit.page.get_by_label("Seed", exact=True).fill("9")


def change_stop(visit: Visit) -> None:
    visit.page.get_by_label("Stop by").select_option("wry")


def add_direction(visit: Visit) -> None:
    visit.button("Add a direction").click()


@pytest.mark.parametrize(
    "change",
    [
        change_direction,
        change_layer,
        change_operation,
        change_span,
        change_prompt,
        change_seed,
        change_stop,
        add_direction,
    ],
)
def test_answers_of_earlier_settings_are_marked_until_the_next_run(
    visit: Visit, change: Callable[[Visit], None]
) -> None:
    visit.run()
    line, mark = visit.page.locator("#stale"), visit.column(1).locator(".stale")
    assert (line.is_hidden(), mark.is_hidden()) == (True, True)
    change(visit)
    told = str(line.text_content())
    assert told.startswith(
        "The settings have changed. The marked answers are of the last run: kind at layer 2, add α·d"
    )
    assert "; temperature 0.7, seed 0, 1 sample, 120 tokens, no stop" in told
    assert "“Run” replaces them." in told
    assert str(mark.text_content()).startswith("This answer is of the last run")
    assert "warm" in visit.text(1)
    if change is change_stop:
        visit.page.get_by_label("Bound").fill("1")
    visit.run()
    assert (line.is_hidden(), mark.is_hidden()) == (True, True)


def test_a_setting_that_is_set_back_takes_the_mark_away(visit: Visit) -> None:
    visit.run()
    visit.page.get_by_label("Seed", exact=True).fill("9")
    assert visit.page.locator("#stale").is_visible()
    visit.page.get_by_label("Seed", exact=True).fill("0")
    assert visit.page.locator("#stale").is_hidden()


def test_an_answer_to_another_number_says_to_which_and_so_does_the_chart(visit: Visit) -> None:
    visit.run()
    visit.page.get_by_label("Run a column again").uncheck()
    visit.type_number(1, "3")
    assert visit.names()[1] == "α = +3"
    assert visit.column(1).locator(".stale").text_content() == "This answer is of the last run, with α = +8."
    assert visit.column(0).locator(".stale").is_hidden()  # the unsteered answer is the same at any α
    assert visit.page.locator("#stale").is_hidden()
    visit.page.get_by_label("Words that differ").check()  # draws the chart again
    assert visit.page.locator("#chart-legend li").all_text_contents() == ["unsteered", "α = +8"]


def test_a_direction_that_was_replaced_marks_its_answers(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.run()
    fake.directions[0]["content_hash"] = "of another vector"
    visit.page.evaluate("registryChanged('')")
    visit.column(1).locator(".stale").wait_for()


def points(path: str) -> list[tuple[float, float]]:
    """The points of an SVG path of straight lines."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_the_chart_has_a_line_a_column_and_the_same_in_words(visit: Visit, fake: FakeSteeringServer) -> None:
    assert visit.page.locator("#chart").is_hidden()
    visit.run()
    lines = [points(str(line.get_attribute("d"))) for line in visit.page.locator("#chart-svg .line").all()]
    assert [len(line) for line in lines] == [11, 11]  # a value for each token but the last
    plain, steered = ([y for _, y in line] for line in lines)
    # the pixels are a straight function of the values: one step of 1 is everywhere equally high, to 0.1 pixel
    step = (plain[0] - steered[0]) / 8
    values = [fake.values(alpha) for alpha in (0, 8)]
    for pixels, own in zip((plain, steered), values, strict=True):
        assert [(plain[0] - y) / step for y in pixels] == pytest.approx(own, abs=0.2 / step)
    assert visit.page.locator("#chart-legend li").all_text_contents() == ["unsteered", "α = +8"]
    dashes = [line.get_attribute("stroke-dasharray") for line in visit.page.locator("#chart-svg .line").all()]
    assert dashes[0] != dashes[1]
    described = str(visit.page.locator("#chart-desc").text_content())
    assert "α = +8: 11 tokens, mean 8.91, from 8.00 to 9.00, between 8.00 and 10.0." in described
    visit.page.get_by_text("The chart as a table").click()
    assert visit.page.locator("#chart-rows tr").nth(1).locator("td").all_text_contents() == [
        "11", "8.00", "8.91", "8.00", "10.0", "9.00",
    ]  # fmt: skip


def test_the_chart_shows_the_mean_of_samples_and_each_one_faintly(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.page.get_by_label("Samples").fill("3")
    visit.run()
    assert visit.page.locator("#chart-svg .faint").count() == 6
    assert visit.page.locator("#chart-svg .line:not(.faint)").count() == 2
    row = visit.page.locator("#chart-rows tr").nth(1).locator("td")
    assert row.nth(1).text_content() == f"{fake.values(8)[0] + 1:.2f}"  # the mean of samples 0, 1 and 2


def test_the_words_that_differ_are_marked(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.run()
    visit.page.get_by_label("Words that differ").check()
    column = visit.column(1)
    assert column.locator(".output").is_hidden()
    removed, added = (column.locator(f".difference {name}").all_text_contents() for name in ("del", "ins"))
    assert [" ".join(texts).split() for texts in (removed, added)] == [words(fake, 0), words(fake, 8)]
    kept = column.locator(".difference").evaluate(
        """(one) => [...one.childNodes].filter((node) => node.nodeName !== "DEL")
             .map((node) => node.textContent).join("")"""
    )
    assert kept == "".join(fake.words(8))
    assert visit.column(0).locator(".difference").is_hidden()
    visit.page.get_by_label("Words that differ").uncheck()
    assert column.locator(".output").is_visible()


def words(fake: FakeSteeringServer, alpha: float) -> list[str]:
    """The words of a reply that name its sign, which the others do not have."""
    return [word.strip() for word in fake.words(alpha) if word.strip() and "é" not in word]


DIFFERENCES: list[tuple[str, str, list[list[str]]]] = [
    ("a b c", "a b c", [["same", "a b c"]]),
    ("a b c d", "a x c d", [["same", "a "], ["removed", "b "], ["added", "x "], ["same", "c d"]]),
    ("", "a b", [["added", "a b"]]),
    ("a b", "", [["removed", "a b"]]),
    ("one two three", "two three four", [["removed", "one "], ["same", "two three "], ["added", "four"]]),
]


def test_a_difference_is_the_shortest(visit: Visit) -> None:
    for before, after, pieces in DIFFERENCES:
        assert visit.page.evaluate("([from, to]) => wordDiff(from, to)", [before, after]) == pieces


def test_the_saved_json_has_all_that_was_asked_and_answered(
    visit: Visit, fake: FakeSteeringServer, tmp_path: Path
) -> None:
    visit.run()
    visit.type_number(1, "-8")
    visit.settle("^α = −8: 12 tokens")
    saved = json.loads(visit.saved("Save JSON", tmp_path).read_text(encoding="utf-8"))
    assert saved["format"] == "vllm-steer playground"
    assert [run["column"] for run in saved["runs"]] == ["unsteered", "α = +8", "α = −8"]
    asked = [dict(request) for request in fake.requests]
    for request in asked:
        for name in ("path", "stream", "return_token_ids"):
            request.pop(name)
    assert sorted((run["request"] for run in saved["runs"]), key=str) == sorted(asked, key=str)
    for run in saved["runs"]:
        alpha = alpha_of(run["request"])
        assert run["outcome"] == "complete"
        assert (run["vllm_steer"], run["vllm"]) == ("0.0.1-fake", "0.0-fake")
        assert [one["content_hash"] for one in run["directions"]] == ["hash-of-kind"]
        (reply,) = run["replies"]
        assert reply["text"] == "".join(fake.words(alpha))
        assert reply["trace"] == fake.values(alpha)
        assert (reply["seed"], reply["num_tokens"], reply["finish_reason"]) == (0, 12, "length")
        assert reply["readout"]["projections"]["kind"]["2"] == pytest.approx(sum(fake.values(alpha)) / 11)


def test_the_saved_json_has_failures_too_and_no_key(visit: Visit, fake: FakeSteeringServer, tmp_path: Path) -> None:
    visit.expected.append("400")
    visit.page.evaluate("keys.api = 'sk-secret'")
    visit.number(1).fill("900")
    visit.run()
    text = visit.saved("Save JSON", tmp_path).read_text(encoding="utf-8")
    assert "sk-secret" not in text
    assert [run["outcome"] for run in json.loads(text)["runs"]] == ["complete", "alpha is 900.0; use a smaller one"]


def test_the_saved_picture_shows_the_answers_and_the_chart(
    visit: Visit, fake: FakeSteeringServer, tmp_path: Path
) -> None:
    fake.tokens = 40
    visit.saved("Save picture", tmp_path).rename(tmp_path / "empty.png")
    visit.run()
    visit.saved("Save picture", tmp_path).rename(tmp_path / "full.png")
    with Image.open(tmp_path / "empty.png") as empty, Image.open(tmp_path / "full.png") as full:
        assert full.width == empty.width == 2400
        assert full.height > empty.height + 2 * 300  # the chart alone is 300 high
        shares = {name: share(full, colour) for name, colour in COLOURS.items()}
        # ink is the text; a line of the chart is 2 px thick and a thousand long, of 2400 by some 1500
        assert shares["ink"] > 0.001
        assert shares["line-0"] > 0.0005
        assert shares["line-1"] > 0.0005
        assert shares["ink"] > 3 * share(empty, COLOURS["ink"]) * empty.height / full.height
        assert shares["paper"] < 0.99


def test_the_axis_of_the_saved_picture_is_named(visit: Visit, tmp_path: Path) -> None:
    visit.run()
    visit.page.evaluate(
        """() => { const write = Drawing.prototype.text; window.drawn = [];
             Drawing.prototype.text = function (...given) { drawn.push(given[0]); write.apply(this, given); }; }"""
    )
    visit.saved("Save picture", tmp_path)
    assert "token of the answer" in visit.page.evaluate("drawn")


COLOURS = {"paper": (253, 253, 252), "ink": (29, 31, 34), "line-0": (85, 89, 95), "line-1": (180, 72, 10)}


def share(image: Image.Image, colour: tuple[int, int, int]) -> float:
    """The share of an image's pixels that have exactly this colour."""
    return sum(count for count, own in image.convert("RGB").getcolors(1 << 24) or () if own == colour) / (
        image.width * image.height
    )
