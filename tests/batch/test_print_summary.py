from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from batch_jobs.config.concept import empathy
from batch_jobs.directions.word_baselines import BeyondWords
from batch_jobs.pipeline import StudyResult
from batch_jobs.print_summary import print_summary
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.scoring.scores_csv import ConditionScore, Scores
from tests.batch.directions.test_validation_file import ESTIMATE, layer_validation, validation

BEYOND = BeyondWords(ESTIMATE, ESTIMATE, 0.075, -0.02, 0.2, "undecided", at_ceiling=False)


def condition(alpha: float, rate: float, direction: str = "empathy") -> ConditionScore:
    return ConditionScore(
        model="m",
        layer=16,
        scenario="the_duel",
        direction=direction,
        op="add",
        span="all",
        alpha=alpha,
        alpha_residual_norm=alpha / 100,
        samples=5,
        failed=1,
        empathy_rate=rate,
        empathy_low=0.0,
        empathy_high=1.0,
        baseline_empathy_rate=0.2,
        baseline_samples=5,
        effect=rate - 0.2,
        directional_effect=None,
        effect_p=None,
        success=None,
        cannot_rise=False,
        cannot_fall=False,
        coherence_rate=1.0,
        context_rate=None,
        empty_rate=0.0,
        loop_rate=0.0,
        code_like_rate=0.0,
        mean_repetition=0.0,
        mean_compression_ratio=None,
        mean_log_likelihood=None,
        mean_projection_unsteered=None,
        mean_projection_generated=None,
        mean_completion_tokens=9.0,
        mean_grade=None,
    )


def test_the_summary_says_where_how_well_and_what_steering_did() -> None:
    path = Path("/a/rather/long/path/that/must/stay/in/one/piece/" + "x" * 80)
    result = StudyResult(
        run=RunDirectory(path),
        validation=validation(layers={16: layer_validation(16, auroc=0.975)}, best_layer=16, beyond_words={16: BEYOND}),
        scores=Scores((condition(-20.0, 0.0), condition(0.0, 0.2), condition(20.0, 0.8)), ()),
        generated=10,
        reused=5,
        failed=3,
        unfinished_thoughts=2,
    )
    out = io.StringIO()
    print_summary(result, empathy(), Console(file=out, width=80))
    text = out.getvalue()
    assert "16 (best)" in text
    assert "Does layer 16, chosen on train texts, detect beyond words? undecided" in " ".join(text.split())
    assert "A bag of words alone has AUROC 0.900 (0.700 to 0.970)." in text
    assert "0.975" in text
    assert "10 rows generated, 5 there before, 3 failed, 2 ended inside a thought" in text
    assert "chat_template_kwargs" in text
    assert f"report       {path}/report.html\n" in text  # not shortened, on its own line
    for cell in ("-20.0", "+0.20", "0.8", "the_duel"):
        assert cell in text


def test_controls_are_one_line_below_their_direction() -> None:
    rows = [condition(-20.0, 0.0), condition(0.0, 0.2), condition(20.0, 0.8)]
    rows += [condition(20.0, rate, f"empathy.control{number}") for number, rate in enumerate((0.1, 0.2, 0.4))]
    result = StudyResult(
        run=RunDirectory(Path("run")),
        validation=validation(layers={16: layer_validation(16, auroc=0.975)}, best_layer=16),
        scores=Scores(tuple(rows), ()),
        generated=10,
        reused=0,
        failed=0,
        unfinished_thoughts=0,
    )
    out = io.StringIO()
    print_summary(result, empathy(), Console(file=out, width=100))
    assert out.getvalue().count("Empathetic rate along") == 1
    (line,) = [line for line in out.getvalue().splitlines() if "mean of 3 random controls" in line]
    assert [cell.strip() for cell in line.split("│")[2:-1]] == ["–", "–", "0.23"]
