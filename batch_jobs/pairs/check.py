"""Check a set of contrastive pairs before any model reads them.

There are two kinds of findings. A *problem* is a defect of the set: a duplicate text, so that held-out pairs are not
really held out, or a pair without contrast. A *warning* is a confound: a property other than the concept separates the
two sides, so a direction made from them may encode that property instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import wilcoxon
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict

from batch_jobs.config.concept import Concept, Keywords, empathy
from batch_jobs.config.study import StudyError
from batch_jobs.scoring.outcome import occurrences
from batch_jobs.texts.contrastive import Pair
from batch_jobs.texts.words_alone import bag_of_words, lengths

NEAR_DUPLICATE_SIMILARITY = 0.8
"""Two texts are near duplicates from this cosine of character n-grams on. Independent texts of one model on one
scenario reach 0.65 (the paper's pairs); a copy with another last sentence stays at 0.87 and above."""
LEAKAGE_AUROC = 0.9
"""A surface feature separates the sides by itself from this AUROC on."""
LENGTH_P_VALUE = 0.01
LENGTH_RATIO = 1.25
"""Ratio of the sides' mean lengths (either way) that gives a warning when it is also significant."""
BALANCE_RATIO = 2.0
"""A larger ratio of the most to the fewest pairs per scenario gives a warning."""
CROSS_VALIDATION_FOLDS = 5
TELLING_WORDS = 10
"""Words reported per side."""

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Likeness:
    """Two texts that are too similar, each named `pair_id/side`."""

    first: str
    second: str
    similarity: float
    """Cosine of TF-IDF-weighted character n-grams, 0..1; exactly 1.0 for texts equal up to case and spacing."""

    @property
    def exact(self) -> bool:
        """Whether the texts are equal up to case and spacing."""
        return self.similarity == 1.0


@dataclass(frozen=True)
class LengthBalance:
    """Lengths of the two sides in words, a proxy for tokens that has the same ratio and needs no tokenizer."""

    mean_positive: float
    mean_negative: float
    p_value: float
    """Two-sided Wilcoxon signed-rank test of the lengths within pairs."""
    auroc: float
    """How well length alone separates the sides; below 0.5 the positive texts are shorter."""

    @property
    def ratio(self) -> float:
        """Mean length of the positive texts over that of the others."""
        return self.mean_positive / self.mean_negative


@dataclass(frozen=True)
class LexicalLeakage:
    """How well words alone separate the sides, as AUROC with the positive side as the positive class."""

    keyword_aurocs: dict[str, float]
    """Words of a pole -> how well their number in a text separates the sides, those of the negative pole counted as
    minus. Empty for a concept without keywords."""
    lexical_baseline_auroc: float
    """Score: a bag-of-words logistic regression, cross-validated with both texts of a pair in the same fold. The
    baseline for a direction: its AUROC means little where words do equally well."""
    positive_words: tuple[str, ...]
    """Words that most indicate the positive side, strongest first."""
    negative_words: tuple[str, ...]
    """Words that most indicate the other side, strongest first."""


@dataclass(frozen=True)
class PairReport:
    """Findings of `check_pairs`."""

    pairs_by_scenario: dict[str, int]
    """Scenario id -> number of pairs."""
    duplicates: tuple[Likeness, ...]
    """Similar texts of different pairs, most similar first."""
    weak_contrasts: tuple[Likeness, ...]
    """Pairs whose two sides are too similar, most similar first."""
    length: LengthBalance
    leakage: LexicalLeakage

    @property
    def problems(self) -> tuple[str, ...]:
        """Defects of the set, one sentence each."""
        found = []
        for kind, likenesses in (("Duplicate", self.duplicates), ("Pair without contrast", self.weak_contrasts)):
            for likeness in likenesses:
                degree = "the same text" if likeness.exact else f"similarity {likeness.similarity:.2f}"
                found.append(f"{kind}: {likeness.first} and {likeness.second} ({degree}).")
        return tuple(found)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Confounds of the contrast, one sentence each."""
        found = []
        length, leakage = self.length, self.leakage
        uneven = max(length.ratio, 1 / length.ratio)
        if (uneven >= LENGTH_RATIO and length.p_value < LENGTH_P_VALUE) or _tells(length.auroc):
            found.append(
                f"Length: positive texts have {length.ratio:.2f} times the words of the others (p = "
                f"{length.p_value:.2g}); length alone tells the sides apart with AUROC {length.auroc:.2f}."
            )
        for words, auroc in leakage.keyword_aurocs.items():
            if _tells(auroc):
                found.append(f"Keywords: the count of {words} keywords alone tells the sides apart, AUROC {auroc:.2f}.")
        if _tells(leakage.lexical_baseline_auroc):
            found.append(
                f"Lexical baseline: a bag of words tells the sides apart with AUROC "
                f"{leakage.lexical_baseline_auroc:.2f}, so a high AUROC of a direction does not show that it is more "
                "than vocabulary. Lexical ablation does not decide it: the words that are left often tell the sides "
                "apart as well. Add pairs whose words do not give the side away."
            )
        most, least = max(self.pairs_by_scenario.values()), min(self.pairs_by_scenario.values())
        if most > BALANCE_RATIO * least:
            found.append(f"Balance: the scenarios have between {least} and {most} pairs.")
        return tuple(found)

    @property
    def exit_code(self) -> int:
        """1 when there are problems, else 0; warnings alone do not fail a check."""
        return int(bool(self.problems))


def check_pairs(pairs: Sequence[Pair], concept: Concept | None = None) -> PairReport:
    """Check the texts of at least two pairs. `concept` gives the keywords; None is the paper's.

    Deterministic. Time and memory grow with the square of the number of pairs (1000 pairs: seconds).

    Raises:
        StudyError: fewer than two pairs.
    """
    if len(pairs) < 2:
        raise StudyError(f"Got {len(pairs)} pairs; a check compares pairs with each other, so give at least 2.")
    texts = [text for pair in pairs for text in (pair.positive, pair.negative)]
    labels = np.tile(np.array([1, 0]), len(pairs))
    duplicates, weak_contrasts = _likenesses(pairs, texts)
    return PairReport(
        pairs_by_scenario=dict(sorted(Counter(pair.scenario_id for pair in pairs).items())),
        duplicates=duplicates,
        weak_contrasts=weak_contrasts,
        length=_length_balance(texts, labels),
        leakage=_lexical_leakage(texts, labels, concept or empathy()),
    )


def _likenesses(pairs: Sequence[Pair], texts: Sequence[str]) -> tuple[tuple[Likeness, ...], tuple[Likeness, ...]]:
    """Likenesses between pairs, and those within a pair."""
    names = [f"{pair.pair_id}/{side}" for pair in pairs for side in ("positive", "negative")]
    # spacing and case do not count as differences, so they must not enter the n-grams
    plain = [" ".join(text.casefold().split()) for text in texts]
    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True).fit_transform(plain)
    similarity = np.triu((grams @ grams.T).toarray(), k=1)
    between: list[Likeness] = []
    within: list[Likeness] = []
    for first, second in np.argwhere(similarity >= NEAR_DUPLICATE_SIMILARITY):
        # rounding keeps equal texts just off 1; different texts must not reach 1
        degree = 1.0 if plain[first] == plain[second] else min(float(similarity[first, second]), 0.9999)
        same_pair = first // 2 == second // 2
        (within if same_pair else between).append(Likeness(names[first], names[second], degree))
    return tuple(sorted(between, key=_most_alike_first)), tuple(sorted(within, key=_most_alike_first))


def _most_alike_first(likeness: Likeness) -> tuple[float, str, str]:
    return -likeness.similarity, likeness.first, likeness.second


def _length_balance(texts: Sequence[str], labels: Labels) -> LengthBalance:
    words = lengths(texts)
    positive, negative = words[labels == 1], words[labels == 0]
    # the test is not defined where no pair differs
    p_value = 1.0 if np.array_equal(positive, negative) else float(wilcoxon(positive, negative).pvalue)
    return LengthBalance(float(positive.mean()), float(negative.mean()), p_value, float(roc_auc_score(labels, words)))


def _lexical_leakage(texts: Sequence[str], labels: Labels, concept: Concept) -> LexicalLeakage:
    classifier = bag_of_words()
    pair_of_text = np.arange(len(texts)) // 2
    folds = GroupKFold(n_splits=min(CROSS_VALIDATION_FOLDS, len(texts) // 2))
    held_out = cross_val_predict(classifier, texts, labels, groups=pair_of_text, cv=folds, method="decision_function")
    classifier.fit(texts, labels)
    weights = classifier["weights"].coef_[0]
    vocabulary = classifier["words"].get_feature_names_out()
    ascending = np.lexsort((vocabulary, weights))
    return LexicalLeakage(
        keyword_aurocs=_keyword_aurocs(texts, labels, concept),
        lexical_baseline_auroc=float(roc_auc_score(labels, held_out)),
        positive_words=tuple(str(word) for word in vocabulary[ascending[::-1][:TELLING_WORDS]]),
        negative_words=tuple(str(word) for word in vocabulary[ascending[:TELLING_WORDS]]),
    )


def _keyword_aurocs(texts: Sequence[str], labels: Labels, concept: Concept) -> dict[str, float]:
    if concept.keywords is None:
        return {}
    words, poles = concept.keywords, concept.poles
    positive, negative = (_counts(texts, side, words) for side in (words.positive, words.negative))
    return {
        poles.positive: float(roc_auc_score(labels, positive)),
        poles.negative: 1.0 - float(roc_auc_score(labels, negative)),
    }


def _counts(texts: Sequence[str], side: Sequence[str], keywords: Keywords) -> list[int]:
    """How often words of one side occur in each text, repetitions included."""
    return [sum(occurrences(word.lower(), text.lower(), keywords.match) for word in side) for text in texts]


def _tells(auroc: float) -> bool:
    return max(auroc, 1 - auroc) >= LEAKAGE_AUROC
