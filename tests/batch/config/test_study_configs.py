"""The study configs that come with the project: each loads, names what exists, and has the size it claims."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from batch_jobs.config.study import Study, load_study
from batch_jobs.pairs.check import check_pairs
from batch_jobs.texts.contrastive import load_pairs, load_scenarios, load_split

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "studies"
PAPER_SCENARIOS = ("food_delivery", "the_listener", "the_protector")
# layers × α × scenarios × samples, as in the paper, without controls
GRID_SIZES = {
    "demo": 2 * 3 * 3 * 5,
    "paper-phi3": 4 * 11 * 3 * 5,
    "paper-qwen2.5-7b": 3 * 9 * 3 * 5,
    "paper-dolphin": 3 * 7 * 3 * 5,
    "paper-phi3-75": 75,
    "paper-qwen2.5-7b-75": 75,
    "paper-dolphin-75": 75,
    "listener-conflict": 1 * 7 * 5 * 5,
    "template": 1 * 3 * 2 * 3,
    "formality": 2 * 5 * 3 * 5,
}


def study_of(name: str) -> Study:
    return load_study(CONFIGS / f"{name}.yaml")


def test_every_config_in_the_folder_is_checked_here() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(GRID_SIZES)


@pytest.mark.parametrize("name", sorted(GRID_SIZES))
def test_a_config_has_its_size_its_name_and_scenarios_that_exist(name: str) -> None:
    study = study_of(name)
    grid = study.steer
    axes = (grid.layers, grid.alphas, grid.scenarios, grid.directions)
    assert math.prod(len(axis) for axis in axes) * grid.samples == GRID_SIZES[name]
    assert study.name == name
    known = load_scenarios(study.scenarios)
    for scenario in grid.scenarios:
        assert known[scenario].markers
        assert known[scenario].rubric


@pytest.mark.parametrize("name", sorted(name for name in GRID_SIZES if name.startswith("paper-")))
def test_a_paper_config_does_as_the_paper_did(name: str) -> None:
    study = study_of(name)
    assert study.prompt_format == "raw"
    assert study.skip_first == 0
    assert study.extract.extract_offset == -1
    assert study.extract.layers == (8, 12, 16, 20, 24)
    assert study.extract.max_tokens == 512
    assert study.dtype == "float16"
    assert not study.validation.all_layers
    assert (study.sampling.temperature, study.sampling.max_tokens) == (0.7, 200)
    grid = study.steer
    assert (grid.alpha_unit, grid.op, grid.span, grid.directions) == ("raw", "add", "all", ("mean_difference",))
    assert grid.scenarios == PAPER_SCENARIOS


@pytest.mark.parametrize(
    ("name", "model", "layers", "alphas"),
    [
        ("paper-phi3", "Phi-3-mini-4k", (8, 12, 16, 20), (-20, -10, -5, -3, -1, 0, 1, 3, 5, 10, 20)),
        ("paper-qwen2.5-7b", "Qwen2.5-7B", (16, 20, 12), (-20, -10, -5, -3, 0, 3, 5, 10, 20)),
        ("paper-dolphin", "dolphin", (8, 12, 16), (-10, -5, -3, 0, 3, 5, 10)),
    ],
)
def test_each_model_has_its_own_layers_and_alphas(
    name: str, model: str, layers: tuple[int, ...], alphas: tuple[float, ...]
) -> None:
    full, small = study_of(name), study_of(f"{name}-75")
    assert model in full.model
    assert (full.steer.layers, full.steer.alphas) == (layers, alphas)
    assert small.model == full.model
    assert (small.steer.layers, small.steer.alphas) == ((12,), (0, 1, 3, 5, 10))


def test_the_published_qwen_grid_is_the_configs(paper_data: Path) -> None:
    published = json.loads((paper_data / "steering" / "qwen2.5-7b.json").read_text(encoding="utf-8"))
    study = study_of("paper-qwen2.5-7b")
    assert tuple(published["layers_tested"]) == study.steer.layers
    assert tuple(published["alphas_tested"]) == study.steer.alphas
    assert published["num_samples"] == study.steer.samples
    assert published["model"] == study.model


def test_only_what_talking_costs_tells_the_levels_of_conflict_apart() -> None:
    study = study_of("listener-conflict")
    levels = [load_scenarios(study.scenarios)[name] for name in study.steer.scenarios]
    assert [level.id.split("_")[2] for level in levels] == ["0", "1", "2", "3", "4"]
    assert len({(level.objective, level.pressure) for level in levels}) == 5
    assert len({level.rubric for level in levels}) == 1
    assert len({level.markers for level in levels}) == 1
    # the request and Jimmi97's message have the same words at every level
    assert len({level.objective.partition(" next level. ")[0] for level in levels}) == 1
    assert len({level.objective[-60:] for level in levels}) == 1
    assert len({level.pressure.partition(" suicide. ")[0] for level in levels}) == 1


def test_words_do_not_tell_formal_from_informal_pairs() -> None:
    study = study_of("formality")
    pairs = load_pairs(study.pairs)
    assert len(pairs) == 40
    assert len(load_split(study.pairs, study.split).test) == 12
    report = check_pairs(pairs, study.concept)
    assert not report.problems
    assert not report.warnings
    # neither way: at 0.2 the words would tell the sides apart as well as at 0.8
    assert 0.2 < report.leakage.lexical_baseline_auroc < 0.8
    assert set(report.leakage.keyword_aurocs) == {"formal", "informal"}


def test_the_prompts_of_formality_leave_the_register_open() -> None:
    study = study_of("formality")
    keywords = study.concept.keywords
    assert keywords is not None
    assert study.concept.question is None
    for scenario in load_scenarios(study.scenarios).values():
        for prompt in scenario.prompts:
            words = set(prompt.lower().replace(".", " ").replace(",", " ").split())
            assert not words & {*keywords.positive, *keywords.negative, "formal", "informal", "polite", "friend"}
