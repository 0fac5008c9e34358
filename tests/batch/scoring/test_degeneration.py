from __future__ import annotations

import json
import random
import re
import zlib
from pathlib import Path

import pytest

from batch_jobs.scoring.degeneration import degeneration

PROSE = (
    "I would stop and look at what the other player needs before I go on. There is enough time to bring the water, "
    "and we can still reach the far side together if we share the work. Let me tell them so, and then we will start."
)


def signatures(text: str) -> tuple[bool, bool, bool]:
    found = degeneration(text)
    return found.empty, found.loop, found.code_like


@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_blank_texts_are_empty_and_nothing_else(text: str) -> None:
    assert signatures(text) == (True, False, False)
    assert degeneration(text).compression_ratio is None


@pytest.mark.parametrize(
    "text",
    [
        "move move move",
        "move move move move",
        "move " * 60,
        "go left and then go right " * 12,
        PROSE + " open the door" * 25,  # begins well
        "ha" * 90,  # one word, no spaces
        PROSE[:40] + "1.1." * 80,
    ],
)
def test_repetition_of_words_phrases_and_characters_is_a_loop(text: str) -> None:
    assert signatures(text) == (False, True, False)


@pytest.mark.parametrize(
    "text",
    [
        "Output: 'open_door'",
        "print(x)\nfor i in range(3):\n    move(i)\n",
        '{"action": "move", "steps": 3}',
        "x = 3;\ny = x + 2;\nreturn y",
    ],
)
def test_code_is_code_like(text: str) -> None:
    assert signatures(text) == (False, False, True)


@pytest.mark.parametrize("seed", range(3))
def test_code_likeness_is_a_sign_for_every_ten_words(seed: int) -> None:
    draw = random.Random(seed)
    signs = (
        "{",
        "}",
        "=",
        "==",
        "= =",
        ";\n",
        "; \n",
        "go(x)",
        "(x)",
        "go(s)",
        "go(es)",
        "a(b",
        ": 'go'",
        ":“go”",
        ": go",
    )
    spelled = re.compile(r"[{}]|=+|;\n|\w\((?!e?s\))[^\s()]*\)|:\s*['\"`‘“]\w+['\"`’”]")
    found = []
    for _ in range(300):
        words = ["word"] * draw.randint(1, 40)
        for _ in range(draw.randint(0, 4)):
            words.insert(draw.randrange(len(words) + 1), draw.choice(signs))
        text = " ".join(words)
        counted = sum(1 for _ in spelled.finditer(text))
        found.append(counted > 0 and 10 * counted >= len(text.split()))
        assert degeneration(text).code_like is found[-1], text
    assert 60 < sum(found) < 240


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "help",
        "no no",
        "I would choose 'open_door' and then talk to him.",
        "Pick the option(s) you like (any of them): then say so.",
        "1. **Listen**: hear him out.\n2. **Help**: bring water.\n```\nA B C\n```\nThat is the plan.",
    ],
)
def test_prose_has_no_failure_signature(text: str) -> None:
    assert signatures(text) == (False, False, False)


def test_a_soft_loop_repeats_a_third_and_is_no_loop() -> None:
    draw = random.Random(0)
    words = [str(draw.random()) for _ in range(60)]
    again = {kept: degeneration(" ".join([*words[:60], *words[:kept]])) for kept in (0, 20, 30, 40, 55, 60)}
    for kept, found in again.items():
        # 60 + kept - 3 grams, of which the kept - 3 last are old, and those over the seam are new
        share = max(0, kept - 3) / (57 + kept)
        assert found.repetition == pytest.approx(share)
        assert found.soft_loop is (share >= 0.35 and not found.loop)
    assert {kept for kept, found in again.items() if found.soft_loop} == {40, 55, 60}
    assert not degeneration("go left and then go right " * 12).soft_loop  # it is a loop


@pytest.mark.parametrize(
    "text",
    [
        "I can't assist with that request.",
        "I'm sorry, but I can’t assist with that.",
        "I cannot provide help with this.",
        "I am unable to comply with it.",
        "I won't participate in this game any further.",
        "As an AI language model, I have no feelings.",
    ],
)
def test_a_text_that_declines_is_a_refusal(text: str) -> None:
    assert degeneration(text).refusal
    assert not degeneration(PROSE + " " + text).refusal  # an answer that ends so has been given


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "I can't help but feel sorry for you, and I will not leave.",
        "I cannot imagine how that hurts.",
        "They can't finish alone, so I assist them.",
        "",
    ],
)
def test_a_text_that_says_what_cannot_be_is_no_refusal(text: str) -> None:
    assert not degeneration(text).refusal


def test_short_texts_have_fewer_than_ten_words_and_are_not_empty() -> None:
    assert [degeneration("go " * count).short for count in (0, 1, 9, 10)] == [False, True, True, False]


def test_repetition_is_the_share_of_repeated_four_grams() -> None:
    assert degeneration("a b c d").repetition == 0.0
    assert degeneration("a b c").repetition == 0.0
    assert degeneration("a b c d a b c d a b c").repetition == pytest.approx(1 - 4 / 8)
    assert degeneration("a b c d e a b c d").repetition == pytest.approx(1 - 5 / 6)


def test_random_words_repeat_nothing_and_the_share_grows_with_the_loop() -> None:
    draw = random.Random(0)
    words = [str(draw.random()) for _ in range(100)]
    shares = [degeneration(" ".join(words[:50] + words[:kept])).repetition for kept in (0, 10, 30, 50)]
    assert shares[0] == 0.0
    assert shares == sorted(set(shares))


def test_compression_ratio_is_of_utf8_bytes() -> None:
    text = "Ωmega — " + PROSE
    raw = text.encode()
    assert degeneration(text).compression_ratio == len(zlib.compress(raw, 1)) / len(raw)
    assert degeneration("hi").compression_ratio > 1  # type: ignore[operator]


def test_half_of_a_surrogate_pair_does_not_stop_scoring() -> None:
    assert signatures("broken \ud83d text") == (False, False, False)


def test_published_generations_fail_hardly_ever(paper_data: Path) -> None:
    """The paper reports that this model is coherent at every α; one sample of 405 draws an endless row of coins."""
    document = json.loads((paper_data / "steering" / "qwen2.5-7b.json").read_text(encoding="utf-8"))
    texts = [
        text
        for layer in document["layer_results"]
        for experiment in layer["experiments"]
        for condition in experiment["conditions"]
        for text in condition["samples"]
    ]
    found = [signatures(text) for text in texts]
    assert not any(empty or code_like for empty, _, code_like in found)
    (looping,) = [text for text, (_, loop, _) in zip(texts, found, strict=True) if loop]
    assert looping.endswith(" $ $ $ $")
