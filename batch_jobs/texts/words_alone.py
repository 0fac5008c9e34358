"""How far texts are told apart without a model that reads them: by a bag of words, and by their length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline

Scores = npt.NDArray[np.float64]

WORDS_AND_MARKS = r"\w+(?:['’]\w+)*|[^\w\s]"
"""Punctuation marks count as words: exclamation marks on only one side tell the sides apart too."""


def bag_of_words() -> Pipeline:
    """An unfitted classifier that knows which words a text holds, and nothing of their order or number.

    Steps `words` (which words and marks occur, in lower case) and `weights` (logistic regression with an L2 penalty,
    C = 1). Deterministic.
    """
    return Pipeline(
        [
            ("words", CountVectorizer(token_pattern=WORDS_AND_MARKS, binary=True)),
            ("weights", LogisticRegression(max_iter=1000)),
        ]
    )


def bag_of_words_scores(positive: Sequence[str], negative: Sequence[str], texts: Sequence[str]) -> Scores:
    """Score `texts` (N) by a bag of words fitted on the two sides, each with at least one text.

    Returns:
        (N,) float64 log odds; a larger one is more like the positive side.
    """
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    classifier = bag_of_words().fit([*positive, *negative], labels)
    return np.asarray(classifier.decision_function(texts), dtype=np.float64)


def lengths(texts: Sequence[str]) -> Scores:
    """Number of words of each text, (N,) float64: in proportion to its tokens, and no tokenizer is needed."""
    return np.array([len(text.split()) for text in texts], dtype=np.float64)
