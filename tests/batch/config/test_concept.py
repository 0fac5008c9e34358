"""The concept of a study: built in, or described by a section; never scored by another concept's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from batch_jobs.config.concept import Concept, concept_of_run, empathy
from batch_jobs.config.study import Study, StudyError, load_study
from batch_jobs.directions.lexical_ablation import ablate_text, load_replacements, replacements_of

DEMO = Path(__file__).resolve().parents[3] / "configs" / "studies" / "demo.yaml"
KEYWORDS = {"positive": ["dear", "kindly"], "negative": ["hey"]}
FORMALITY = {"name": "formality", "keywords": KEYWORDS}


def load(folder: Path, concept: Any, **fields: Any) -> Study:
    document = {"base": str(DEMO), "name": "own", "concept": concept, **fields}
    (folder / "study.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return load_study(folder / "study.yaml")


@pytest.mark.parametrize("spelt", ["empathy", {"name": "empathy"}])
def test_empathy_has_everything_built_in_and_stays_a_name_in_the_config(tmp_path: Path, spelt: Any) -> None:
    study = load(tmp_path, spelt)
    assert study.concept == empathy()
    assert study.model_dump(mode="json")["concept"] == "empathy"
    assert study.config_hash == load_study(DEMO, overrides={"name": "own"}).config_hash
    assert study.concept.published
    assert study.validation.lexical_ablation
    assert replacements_of(study.concept) == load_replacements()


def test_a_section_of_that_name_is_laid_over_what_is_built_in(tmp_path: Path) -> None:
    concept = load(tmp_path, {"name": "empathy", "keywords": {"match": "word"}}).concept
    assert concept.keywords is not None
    assert concept.keywords.match == "word"
    assert "reach out" in concept.keywords.positive
    assert concept.published
    assert concept != empathy()


def test_another_concept_says_what_it_is(tmp_path: Path) -> None:
    study = load(tmp_path, {**FORMALITY, "poles": {"positive": "formal", "negative": "informal"}, "question": None})
    assert (study.concept.poles.positive, study.concept.question) == ("formal", None)
    assert study.direction_name("pca") == "formality-pca"
    assert not study.concept.published
    # no words to replace, so no ablation unless it is asked for
    assert not study.validation.lexical_ablation
    assert Study.model_validate(study.model_dump(mode="json")) == study
    assert study.config_hash != load(tmp_path, FORMALITY).config_hash
    assert load(tmp_path, FORMALITY).concept.poles.negative == "not formality"


@pytest.mark.parametrize(
    ("concept", "fields", "said"),
    [
        ("formality", {}, ["got 'formality', a name alone", "allowed: empathy", "give a section"]),
        ({"name": "formality"}, {}, ["outcome keywords without keywords", "outcome: judge"]),
        ({"name": "a b", "outcome": "judge"}, {}, ["concept.name", "'a b'"]),
        ({**FORMALITY, "poles": {"positive": "formal"}}, {}, ["concept.poles.negative: missing"]),
        ({**FORMALITY, "keywords": {**KEYWORDS, "match": "start"}}, {}, ["concept.keywords.match", "'word_start'"]),
        ({**FORMALITY, "keywords": {**KEYWORDS, "at": 1}}, {}, ["keywords.at: unknown", "positive, negative, match"]),
        ({**FORMALITY, "keywords": {**KEYWORDS, "negative": ["Dear"]}}, {}, ["['dear'] are on both sides"]),
        ({**FORMALITY, "keywords": {**KEYWORDS, "negative": ["a", "A"]}}, {}, ["['a'] given more than once"]),
        ({**FORMALITY, "keywords": {**KEYWORDS, "negative": [" "]}}, {}, ["[' '] are empty"]),
        (FORMALITY, {"validation": {"lexical_ablation": True}}, ["lexical_ablation is true", "no ablation_words"]),
        ({**FORMALITY, "focus_scenario": "the_moon"}, {}, ["focus_scenario is 'the_moon'", "'the_listener'"]),
        ({**FORMALITY, "ablation_words": "none.json"}, {}, ["none.json: cannot be read"]),
        (3, {}, ["field concept: got 3"]),
    ],
)
def test_a_concept_that_nothing_fits_is_refused(
    tmp_path: Path, concept: Any, fields: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(StudyError) as refused:
        load(tmp_path, concept, **fields)
    for part in said:
        assert part in str(refused.value)


def test_ablation_words_are_read_from_a_file_beside_the_config_and_kept_in_it(tmp_path: Path) -> None:
    words = {"dear": {"dear": ["hello"], "dearest": ["good"]}}
    (tmp_path / "words.json").write_text(json.dumps(words), encoding="utf-8")
    study = load(tmp_path, {**FORMALITY, "ablation_words": "words.json"})
    assert study.validation.lexical_ablation
    (tmp_path / "words.json").unlink()
    again = Study.model_validate(study.model_dump(mode="json")).concept
    ablated = ablate_text("Dear Ann, I am sorry, dearest Ann.", seed=0, text_id="a", words=replacements_of(again))
    assert (ablated.text, ablated.replacements) == ("Hello Ann, I am sorry, good Ann.", 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [({}, "got no words"), ({"a": {"A b": ["c"]}}, "not in lower case"), ({"a": {"a": []}}, "no replacement")],
)
def test_unusable_ablation_words_are_refused(tmp_path: Path, words: Any, said: str) -> None:
    (tmp_path / "words.json").write_text(json.dumps(words), encoding="utf-8")
    with pytest.raises(StudyError, match=said):
        load(tmp_path, {**FORMALITY, "ablation_words": "words.json"})


def test_a_run_directory_tells_its_concept() -> None:
    own = Concept.model_validate({**FORMALITY, "judge": "Grade {answer}."})
    recorded = json.loads(json.dumps(own.model_dump(mode="json")))
    assert concept_of_run({"config": {"concept": recorded}}) == own
    assert own.judge_frame == "Grade {answer}."
    assert concept_of_run({"config": {"concept": "empathy"}}) == concept_of_run({}) == empathy()
    # a run of before sections: its name says nothing about its words, so no words are made up for it
    earlier = concept_of_run({"config": {"concept": "calm"}})
    assert (earlier.name, earlier.outcome, earlier.keywords) == ("calm", "judge", None)
