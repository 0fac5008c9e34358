from __future__ import annotations

import re

import pytest

from batch_jobs.directions.lexical_ablation import ablate_text, load_replacements
from batch_jobs.scoring.paper_metric import EMPATHY_KEYWORDS
from batch_jobs.texts.contrastive import load_pairs


def ablated(text: str) -> str:
    return ablate_text(text, seed=0, text_id="t").text


def test_the_list_has_41_keywords_and_no_form_belongs_to_two_of_them() -> None:
    replacements = load_replacements()
    assert len(replacements) == 41
    forms = [form for by_form in replacements.values() for form in by_form]
    assert len(set(forms)) == len(forms)
    assert all(keyword in by_form for keyword, by_form in replacements.items())
    assert all(form == form.lower() for form in forms)


def test_no_replacement_is_an_empathy_word_itself() -> None:
    replacements = load_replacements()
    forms = {form for by_form in replacements.values() for form in by_form}
    stand_ins = [word for by_form in replacements.values() for words in by_form.values() for word in words]
    assert all(stand_ins)
    for stand_in in stand_ins:
        assert not forms & {stand_in, *re.findall(r"[\w-]+", stand_in)}, stand_in
        # the paper's scorer looks for substrings, so these must not come back inside other words either
        assert not [keyword for keyword in EMPATHY_KEYWORDS if keyword in stand_in], stand_in


def test_case_is_kept_and_only_whole_words_go() -> None:
    assert ablated("Sadness. SADNESS! sadness, unsaddled") in {
        f"{a.capitalize()}. {b.upper()}! {c}, unsaddled"
        for a in ("gloom", "melancholy")
        for b in ("gloom", "melancholy")
        for c in ("gloom", "melancholy")
    }
    assert ablated("They comforted us; self-helping, helplessly, Helpmann") in {
        "They eased us; self-helping, helplessly, Helpmann",
        "They calmed us; self-helping, helplessly, Helpmann",
    }


def test_a_phrase_is_one_replacement_across_a_line_break() -> None:
    got = ablate_text("I reach\nout and reaching out to her helps.", seed=0, text_id="t")
    assert got.replacements == 3
    assert got.text in {
        "I get in touch and getting in touch with her aids.",
        "I get in touch and contacting her aids.",
    }


def test_the_article_before_a_replaced_word_agrees_with_the_new_word() -> None:
    assert ablated("A helpful hint, an empathetic ear. A concern") in {
        f"{first} hint, {second} ear. An interest"
        for first in ("A useful", "A handy")
        for second in ("an attuned", "a perceptive")
    }


def test_the_draw_depends_on_seed_and_text_id_only() -> None:
    text = "understandable " * 40
    first = ablate_text(text, seed=0, text_id="a")
    assert first.replacements == 40
    assert ablate_text(text, seed=0, text_id="a") == first
    assert ablate_text(text, seed=1, text_id="a") != first
    assert ablate_text(text, seed=0, text_id="b") != first
    assert set(first.text.split()) == {"natural", "plausible"}


@pytest.mark.parametrize("file", ["bundled", "paper"])
def test_every_positive_test_text_loses_words_and_keeps_none(file: str, request: pytest.FixtureRequest) -> None:
    place = None if file == "bundled" else request.getfixturevalue("paper_data") / "test_pairs.jsonl"
    for pair in load_pairs(place):
        text = pair.positive
        once = ablate_text(text, seed=0, text_id="t")
        assert once.replacements > 0
        assert ablate_text(once.text, seed=0, text_id="t").replacements == 0
        # only words are swapped: the text between them stays the same
        assert re.sub(r"[\w’'-]+", "", once.text).split() == re.sub(r"[\w’'-]+", "", text).split()
