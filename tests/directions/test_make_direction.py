"""Directions from readouts of two sides: against the formula written out, metadata, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_steer import Direction, load_directions, make_direction, save_directions
from vllm_steer.errors import BadVector, MalformedSpec, SteerError

RNG = np.random.default_rng(5)
POSITIVE, NEGATIVE = RNG.standard_normal((2, 7, 12))


def test_the_mean_difference_is_the_unit_vector_between_the_means_whatever_the_numbers_of_texts() -> None:
    made = make_direction("kind", 3, POSITIVE, NEGATIVE[:4])
    wanted = sum(POSITIVE) / 7 - sum(NEGATIVE[:4]) / 4
    np.testing.assert_allclose(made.vector, wanted / np.sqrt((wanted**2).sum()), rtol=1e-6)
    assert (made.key, made.is_unit) == ("kind@3", True)
    lengths = [np.sqrt((row**2).sum()) for row in (*POSITIVE, *NEGATIVE[:4])]
    assert dict(made.metadata) == {
        "method": "mean_difference",
        "num_positive": 7,
        "num_negative": 4,
        "mean_residual_norm": pytest.approx(sum(lengths) / 11),
    }


def test_pca_finds_what_the_pairs_share_and_points_to_the_positive_side() -> None:
    shared = RNG.standard_normal(12)
    shared /= np.linalg.norm(shared)
    middle = 10 * RNG.standard_normal((40, 12))
    half = RNG.uniform(1, 3, (40, 1)) * shared
    for sign in (1, -1):
        made = make_direction("kind", 0, middle + sign * half, middle - sign * half, "pca")
        assert made.vector @ shared == pytest.approx(sign, abs=1e-5)


REFUSED: list[tuple[tuple[Any, ...], type[SteerError], str]] = [
    ((POSITIVE, NEGATIVE[:, :5]), BadVector, r"shapes \(7, 12\) and \(7, 5\)"),
    ((POSITIVE[0], NEGATIVE), BadVector, r"shapes \(12,\)"),
    ((POSITIVE, NEGATIVE[:0]), BadVector, "one side has no readouts"),
    ((POSITIVE, NEGATIVE * np.nan), BadVector, "NaN or infinity"),
    ((POSITIVE, POSITIVE), BadVector, "the same mean"),
    ((POSITIVE, NEGATIVE[:3], "pca"), BadVector, "7 positive and 3 negative"),
    ((POSITIVE, NEGATIVE, "svm"), MalformedSpec, "method is 'svm'"),
]


@pytest.mark.parametrize(("given", "refusal", "told"), REFUSED)
def test_what_gives_no_direction_is_refused(given: tuple[Any, ...], refusal: type[SteerError], told: str) -> None:
    with pytest.raises(refusal, match=told):
        make_direction("kind", 0, *given)


def test_metadata_stays_with_a_direction_and_changes_nothing(tmp_path: Path) -> None:
    about = {"model": "demo", "num_positive": 7, "norm": 2.5, "is_chat": True, "note": None}
    made = Direction("kind", 3, POSITIVE[0], about)
    assert made.content_hash == Direction("kind", 3, POSITIVE[0]).content_hash
    assert dict(made.normalised().metadata) == about
    plain = Direction("plain", 3, POSITIVE[1])
    save_directions(tmp_path / "dirs.safetensors", [made, plain])
    read = {one.name: one for one in load_directions(tmp_path / "dirs.safetensors")}
    assert dict(read["kind"].metadata) == about
    assert dict(read["plain"].metadata) == {}
    about["model"] = "another"
    assert made.metadata["model"] == "demo"


@pytest.mark.parametrize("metadata", [{"rows": [1, 2]}, {1: "a"}, "text", {"a": b"bytes"}], ids=repr)
def test_metadata_that_no_file_could_keep_is_refused(metadata: Any) -> None:
    with pytest.raises(MalformedSpec, match="has metadata"):
        Direction("kind", 3, POSITIVE[0], metadata)
