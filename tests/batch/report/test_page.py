import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from batch_jobs.directions.validate_layer import ValidationError
from batch_jobs.report.figures.catalogue import draw_figures
from batch_jobs.report.figures.paper_figure import PaperFigure
from batch_jobs.report.page import SHOWN_PER_CONDITION, report_page, write_report
from batch_jobs.report.results import ReportError, RunResults, read_run
from batch_jobs.report.samples import read_generations
from batch_jobs.scoring.scores_csv import ScoreError
from tests.support.synthetic_run import LOOP, demo_rows, generation, study, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), demo_rows())


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def results(run: Path) -> RunResults:
    return read_run(run, per_condition=5, max_samples=1000)


@pytest.fixture(scope="module")
def no_figures(results: RunResults) -> dict[str, PaperFigure]:
    """Every figure empty, for tests of the page around them."""
    labels = ("1", "1b", "2", "3", "4", "5", "6a", "6b", "6c", "7", "8", "9")
    return {label: PaperFigure(label, "none", "None", missing=f"Nothing for {label}.") for label in labels}


class Outline(HTMLParser):
    """Collects the parts of a page that the tests check."""

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
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    return parser


def words(page: str) -> str:
    """The page's text without tags, with each run of white space as one blank."""
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    parsed = outline(page)
    assert parsed.links
    # in-page links, and downloads that the page holds itself
    assert all(link.startswith(("#", "data:text/csv;base64,")) for link in parsed.links)
    assert not {"link", "img", "iframe", "object"} & set(parsed.tags)
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}  # clip paths and patterns of the figures
    assert "default-src 'none'" in page


def test_the_page_is_well_formed_and_its_anchors_lead_somewhere(page: str) -> None:
    parsed = outline(page)
    assert parsed.unbalanced == []
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    references = {link for link in parsed.links if link.startswith("#")} | set(re.findall(r"url\((#[^)]+)\)", page))
    assert {reference[1:] for reference in references} <= set(parsed.ids)
    sections = "detection behaviour steering failures conditions samples care provenance"
    assert set(sections.split()) <= set(parsed.ids)


def test_the_page_stays_small_enough_to_send(page: str) -> None:
    assert len(page.encode()) < 6_000_000


def test_text_of_the_run_is_escaped(page: str) -> None:
    assert page.count("<script") == 1
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &lt;img" in page
    assert "&lt;b&gt;out&lt;/b&gt;" in page


def test_what_ended_inside_a_thought_is_told_and_a_thought_is_folded(
    results: RunResults, no_figures: dict[str, PaperFigure]
) -> None:
    group = results.generations.groups[0]
    thinking = replace(group, samples=(replace(group.samples[0], thought="<b>Hm</b> " + "so " * 2000),))
    unfinished = tuple(replace(row, unfinished_thoughts=2) for row in results.scores.conditions)
    changed = replace(
        results,
        generations=replace(results.generations, groups=(thinking,), unfinished_thoughts=7),
        scores=replace(results.scores, conditions=unfinished),
    )
    page = report_page(changed, no_figures)
    assert outline(page).unbalanced == []
    assert "7 rows ended inside a thought" in words(page)
    assert ", 7 ended inside a thought" in words(page)
    assert words(page).count("2 unfinished") == len(unfinished)
    assert "<summary>Thought</summary><pre>&lt;b&gt;Hm&lt;/b&gt; so" in page
    assert page.count("so so so") < 500  # the beginning is enough
    assert "inside a thought" not in report_page(results, no_figures)


def test_all_nine_figures_and_five_tables_are_there(page: str) -> None:
    text = words(page)
    for number in range(1, 10):
        assert re.search(rf"Figure {number}[a-c]?\.", text)
    for number in range(1, 6):
        assert f"Table {number}." in text


def test_figures_are_kept_as_files_too_and_stale_ones_go(run: Path, page: str) -> None:
    names = {path.name for path in (run / "figures").iterdir()}
    # one layer, one direction: figure 9 has nothing to compare
    drawn = re.findall(r"figures/(figure-[\w-]+)\.svg", page)
    assert names == {f"{stem}.{ending}" for stem in drawn for ending in ("svg", "png", "csv")}
    assert len(drawn) == 11
    assert "This run steers one layer with one direction" in page


def test_every_figure_can_be_read_without_seeing_it(page: str) -> None:
    figures = re.findall(r'<svg [^>]*role="img" aria-labelledby="(\S+) (\S+)"', page)
    assert len(figures) == 11
    for title, description in figures:
        assert f'<title id="{title}">' in page
        assert f'<desc id="{description}">' in page
    # 1 of 5 texts is kind at -0.2 norms, i.e. α = -36
    assert "empathetic: 0 at −72, 0.2 at −36" in page


def test_the_flawed_success_rule_is_shown_where_it_bites(page: str) -> None:
    text = words(page)
    # the listener starts at 1.0: no positive α can succeed and all negative ones do, whatever happens
    assert "ceiling 1.00 0.500 0.500 6 of 6 0 0.80 0.57…1.00" in text
    assert "every unsteered sample is empathetic already" in text
    # food delivery at -0.1 norms: the rate does not change, and the rule calls that a success
    assert "−0.1 5 0.40 0.12–0.77 0.00 0.572 0.687 yes unmoved" in text
    assert "The Listener" in text
    assert "its data file has 0.0 three times" in text


def test_published_values_stand_beside_the_runs(page: str) -> None:
    text = words(page)
    assert "Phi-3-mini-4k-instruct, the direction of the same layer number" in text
    assert "Qwen2.5-7B-Instruct 16 1.000 0.933 published" in text
    assert re.search(r"True positives \d+ 5 False positives", text)
    assert "2.09" in text  # z of the published random baseline


def test_words_alone_stand_beside_every_auroc(page: str, results: RunResults) -> None:
    text, validation = words(page), results.validation
    beyond = validation.beyond_words[validation.best_layer]
    bag = validation.words.bag_of_words
    assert text[text.index("Detection Does the direction") :].startswith(
        f"Detection Does the direction detect beyond words? {beyond.verdict.capitalize()}. At layer "
        f"{validation.best_layer} the AUROC on held-out texts is {beyond.direction.auroc:.3f}, that of a bag of words "
        f"fitted on the same train texts {bag.auroc:.3f}"
    )
    assert f"words – {bag.auroc:.3f} {bag.low:.2f}–{bag.high:.2f}" in text
    assert f"length – {validation.words.length.auroc:.3f}" in text
    assert f"AUROC of a bag of words: {bag.auroc:.3f} {bag.low:.2f}–{bag.high:.2f} →" in text
    assert "95 % score intervals" in text
    assert "bootstrap interval" not in text
    assert f"chosen {validation.best_layer} " in text
    assert f"Layer {validation.best_layer} was chosen on the train texts, by cross-validation in 3 folds" in text
    (listener,) = re.findall(r"The Listener 17 (.*?) The Protector 16", text)
    assert listener.startswith(f"{validation.left_out_scenarios['the_listener'].layers[8].auroc:.3f} ")
    assert "writer-a 26 " in text


def test_a_bag_of_words_at_the_ceiling_is_said_to_leave_no_room(
    results: RunResults, no_figures: dict[str, PaperFigure]
) -> None:
    best = results.validation.best_layer
    beyond = {best: replace(results.validation.beyond_words[best], verdict="undecided", at_ceiling=True)}
    choice = replace(results.validation.layer_choice, folds=0, aurocs={}, bag_of_words=None)
    changed = replace(results.validation, beyond_words=beyond, layer_choice=choice, left_out_writers={})
    text = words(report_page(replace(results, validation=changed), no_figures))
    assert "separates all test texts, so no direction can do better on them" in text
    assert "words alone separate all test texts, so only harder pairs can tell" in text  # the headline
    assert "the lowest stands for all" in text
    assert "Left-out writers" not in text


def test_numbers_and_caveats_are_there(page: str) -> None:
    text = words(page)
    assert "105 21 conditions, 1 failed" in text
    assert "(empty completion)" in text
    assert "In this run they agree" in text
    assert "0 of 5 still allows a true rate of 0.43" in text


def test_all_samples_are_listed_without_scripts(page: str) -> None:
    assert page.count('<article class="sample"') == 104
    assert '<form id="filter" role="search" aria-label="Filter the samples" hidden>' in page


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (-1, "In this run they differ (<code>extract_offset</code> −1)"),
        (None, "does not record the extraction offset"),
    ],
)
def test_the_layer_pairing_is_stated(
    results: RunResults, no_figures: dict[str, PaperFigure], offset: int | None, expected: str
) -> None:
    extra = {} if offset is None else {"extract_offset": offset}
    other = replace(results, validation=replace(results.validation, extra=extra), provenance={})
    page = report_page(other, no_figures)
    assert expected in page
    assert ("<td>16, 16</td>" in page) == (offset is None)  # block read, block steered


def test_a_part_that_the_run_lacks_is_said_in_one_line(results: RunResults, no_figures: dict[str, PaperFigure]) -> None:
    bare = replace(results, findings=None, behaviours=(), validation=replace(results.validation, ablation=None))
    text = words(report_page(bare, no_figures))
    assert "has no findings.json" in text
    assert "Without a behaviour correlation there is nothing to classify" in text
    assert "Nothing for 9." in text


def test_a_run_that_reads_nothing_again_says_so_instead_of_drawing(tmp_path: Path) -> None:
    rows = [
        generation("maze", alpha, sample, op="set", projection_generated=None, projection_unsteered=None)
        for alpha in (0.0, 0.1)
        for sample in range(2)
    ]
    options = {"validation": {"lexical_ablation": False, "random_directions": 2, "bootstrap": 100}}
    run = write_run(tmp_path, rows, of=study(**options))
    results = read_run(run, per_condition=5, max_samples=100)
    figures = draw_figures(results)
    assert {label for label, figure in figures.items() if figure.drawing is None} == {"3", "5", "6b", "9", "10", "11"}
    text = words(report_page(results, figures))
    assert "Nothing to judge" in text
    assert "No row of this run has a readout" in text
    assert "No strength was run with both signs" in text


def test_a_long_run_shows_the_first_samples_only(tmp_path: Path) -> None:
    rows = [generation("maze", alpha, sample) for alpha in (0.0, 0.1) for sample in range(SHOWN_PER_CONDITION + 7)]
    folder = write_run(tmp_path, rows) / "generations"
    kept = read_generations(folder, per_condition=SHOWN_PER_CONDITION, max_samples=1000)
    assert [len(group.samples) for group in kept.groups] == [SHOWN_PER_CONDITION] * 2
    assert kept.num_rows == len(rows)
    # too many in all: every condition gets the same number
    few = read_generations(folder, per_condition=SHOWN_PER_CONDITION, max_samples=7)
    assert [[sample.sample for sample in group.samples] for group in few.groups] == [[0, 1, 2]] * 2
    # more conditions than samples allowed: the first ones
    assert read_generations(folder, per_condition=SHOWN_PER_CONDITION, max_samples=1).num_shown == 1


def test_signatures_mark_the_samples_that_failed(results: RunResults) -> None:
    loops = [sample for group in results.generations.groups for sample in group.samples if sample.text == LOOP]
    assert loops
    assert all("loop" in sample.signatures and not sample.coherent for sample in loops)
    kinds = {sample.signatures for group in results.generations.groups for sample in group.samples}
    assert ("empty",) in kinds
    assert () in kinds


@pytest.mark.parametrize(
    ("missing", "error"),
    [
        ("validation.json", ValidationError),
        ("scores.csv", ScoreError),
        ("provenance.json", ReportError),
        ("generations", ScoreError),
    ],
)
def test_a_missing_part_is_named(run: Path, tmp_path: Path, missing: str, error: type[Exception]) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for part in run.iterdir():
        if part.name not in (missing, "report.html"):
            (copy / part.name).symlink_to(part)
    with pytest.raises(error, match=re.escape(str(copy / missing))):
        write_report(copy)
    assert not (copy / "report.html").exists()


def test_scores_without_a_condition_are_refused(run: Path, tmp_path: Path) -> None:
    header = (run / "scores.csv").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "scores.csv").write_text(header + "\n", encoding="utf-8")
    (tmp_path / "validation.json").symlink_to(run / "validation.json")
    with pytest.raises(ReportError, match="has no condition"):
        write_report(tmp_path)


def test_a_run_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="is not a directory"):
        write_report(tmp_path / "nowhere")
