"""Results for many texts at once equal those of plain Python for each text."""

from __future__ import annotations

import gc
import random
import re
import weakref

import pyarrow as pa
import pytest

from batch_jobs.scoring.word_counts import count_words
from batch_jobs.scoring.word_index import WordIndex

WORDS = ("a", "A", "b", "go", "user", "d", "User", "dark", "help,", "HELPLESS", "ΟΔΟΣ", "İa", "straße", "reach", "out")
SPACES = (" ", " ", " ", "  ", "\n", "\t", "\u3000", "\xa0", "\x1c")
KEYWORDS = ("help", "user d", "Reach Out", "d", "ος", "i", "go\tgo", "absent", "o", "SS", "a a", " ", "")


def random_texts(seed: int) -> list[str]:
    """Texts of 0 to 60 words, with repeated 4-grams, any white space between words and often some at the ends."""
    draw = random.Random(seed)
    texts = []
    for _ in range(400):
        words = draw.choices(WORDS[: draw.choice([2, 4, len(WORDS)])], k=draw.choice([0, 1, 3, 4, 5, 20, 60]))
        text = "".join(word + draw.choice(SPACES) for word in words)
        texts.append(draw.choice(["", " "]) + (text if draw.random() < 0.5 else text.strip()))
    return texts


def plain_counts(text: str) -> tuple[int, int, int, int]:
    words = re.findall(r"[^\s\x1c-\x1f\x85]+", text)
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(words), len(set(words)), len(grams), sum(gram in grams[:i] for i, gram in enumerate(grams))


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_each_text_on_its_own(seed: int) -> None:
    texts = random_texts(seed)
    expected = [plain_counts(text) for text in texts]
    assert len(set(expected)) > 30  # the texts differ in their counts
    assert list(WordIndex(pa.array(texts)).counts()) == expected
    assert [count_words(text) for text in texts] == expected


@pytest.mark.parametrize("seed", range(3))
def test_keywords_are_found_as_in_each_text_on_its_own(seed: int) -> None:
    texts = random_texts(seed)
    index = WordIndex(pa.array(texts))
    for keyword in KEYWORDS:
        expected = [int(keyword.lower() in text.lower()) for text in texts]
        assert index.count_found([keyword]).tolist() == expected, keyword
    together = [sum(keyword.lower() in text.lower() for keyword in KEYWORDS) for text in texts]
    assert index.count_found([*KEYWORDS, "HELP", "help"]).tolist() == together


@pytest.mark.parametrize("seed", range(3))
def test_keywords_at_word_starts_are_found_as_in_each_text_on_its_own(seed: int) -> None:
    texts = [text + draw for text in random_texts(seed) for draw in ("", "(help éa _a 2d o'd")]
    index = WordIndex(pa.array(texts))
    for keyword in ("help", "user d", "Reach Out", "d", "ος", "i", "a", "traße", "ness", "o", "é", "c++"):
        pattern = re.compile(r"(?<!\w)" + re.escape(keyword.lower()))
        expected = [int(pattern.search(text.lower()) is not None) for text in texts]
        assert index.count_found([keyword], match="word_start").tolist() == expected, keyword


def test_a_keyword_inside_a_word_is_found_only_as_a_substring() -> None:
    index = WordIndex(pa.array(["following", "winner", "(win)", "scared", "a care", "un-care"]))
    assert index.count_found(["win", "care"]).tolist() == [1, 1, 1, 0 + 1, 1, 1]
    assert index.count_found(["win", "care"], match="word_start").tolist() == [0, 1, 1, 0, 1, 1]


def test_keywords_are_counted_only_within_the_texts_asked_for() -> None:
    index = WordIndex(pa.array(["help the user", "help", "the user"]))
    within = pa.array([True, False, True]).to_numpy(zero_copy_only=False)
    assert index.count_found(["help", "the user"], within=within).tolist() == [2, 0, 1]


def test_every_white_space_of_python_parts_words_and_nothing_else_does() -> None:
    characters = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]  # beyond, there are none
    texts = [f"a{character}b" for character in characters]
    counted = WordIndex(pa.array(texts)).counts()
    assert [count[:2] for count in counted] == [(len(text.split()), len(set(text.split()))) for text in texts]


def test_white_space_beyond_ascii_parts_words_next_to_other_characters_of_many_bytes() -> None:
    draw = random.Random(5)
    alphabet = ["é", "’", "、", "漢", "😀", "\u2007", "\u3000", "\xa0", "\x85", " ", "x"]
    texts = ["".join(draw.choices(alphabet, k=draw.randrange(12))) for _ in range(3000)]
    assert [count[:2] for count in WordIndex(pa.array(texts)).counts()] == [
        (len(text.split()), len(set(text.split()))) for text in texts
    ]


def test_a_slice_of_an_array_is_indexed_as_its_own_texts() -> None:
    texts = pa.array(["help help", "a b", "", "c help d"])
    index = WordIndex(texts[1:])
    assert [count.words for count in index.counts()] == [2, 0, 3]
    assert index.count_found(["help"]).tolist() == [0, 0, 1]


def test_more_distinct_words_than_pairs_of_pairs_have_numbers_for_are_counted() -> None:
    many = [f"w{number}" for number in range(70_000)]  # 70,000 ** 4 > 2 ** 63
    texts = [" ".join(many), " ".join(many[:9] + many[:9]), "a b c d a b c d", " ".join(many[-40_000:] * 2)]
    index = WordIndex(pa.array(texts))
    assert list(index.counts()) == [plain_counts_of_long(text) for text in texts]
    assert index.count_found(["w69999", "w8"]).tolist() == [2, 1, 0, 1]


def plain_counts_of_long(text: str) -> tuple[int, int, int, int]:
    """`plain_counts` with a set, for texts of thousands of words."""
    words = text.split()
    grams = [" ".join(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(words), len(set(words)), len(grams), len(grams) - len(set(grams))


def test_an_index_is_freed_at_once() -> None:
    index = WordIndex(pa.array(["help the user"]))
    index.count_found(["help", "the user"])
    list(index.counts())
    alive = weakref.ref(index)
    gc.disable()  # a cycle would keep a batch's arrays until the next collection
    try:
        del index
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("texts", [[], [""], ["", " \n "], ["one two three"]])
def test_texts_of_few_words_or_none_are_counted(texts: list[str]) -> None:
    index = WordIndex(pa.array(texts, pa.string()))
    assert list(index.counts()) == [plain_counts(text) for text in texts]
    assert index.count_found(["two"]).tolist() == [int("two" in text) for text in texts]


@pytest.mark.parametrize("beyond", [b"", b"x", b"\xff\xff", b"\x80"])
def test_what_lies_behind_the_last_text_in_memory_makes_no_difference(beyond: bytes) -> None:
    text = "go go go go go "
    offsets = pa.py_buffer(pa.array([0, len(text)], pa.int32()).buffers()[1])
    texts = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(text.encode() + beyond)])
    assert list(WordIndex(texts).counts()) == [plain_counts(text)]


def test_a_four_gram_is_not_begun_in_one_text_and_ended_in_the_next() -> None:
    counts = list(WordIndex(pa.array(["a b c", "d a b c d", "a b"])).counts())
    assert [count.grams for count in counts] == [0, 2, 0]
