"""The Hugging Face hooks that benchmarks compare with: a batch gives the same results as its texts one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.harness.random_checkpoint import SHAPES, save_random_checkpoint
from benchmarks.hooks.hf_hooks import HookedModel

LAYERS = (0, 1, 2)
TEXTS = ([5, 6, 7], [300, 301, 302, 303, 304, 305, 306], [9])
# float32 sums in another order. A padding token in the mean, or a neighbour's α, changes the first digit.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    return HookedModel(str(save_random_checkpoint(tmp_path_factory.mktemp("tiny"), "tiny")), torch.float32, "cpu")


@pytest.fixture(scope="module")
def direction_D() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPES["tiny"]["hidden_size"]).astype(np.float32)


def test_means_of_a_padded_batch_are_those_of_each_text_alone(hooked: HookedModel) -> None:
    batch = hooked.read_batch(TEXTS, LAYERS)
    for text, means in zip(TEXTS, batch, strict=True):
        alone = hooked.read_alone(text, LAYERS)
        for layer in LAYERS:
            np.testing.assert_allclose(means[layer], alone[layer], **TOLERANCE)


def test_each_row_of_a_batch_is_steered_by_its_own_alpha(hooked: HookedModel, direction_D: np.ndarray) -> None:
    alphas = [0.5, 0.0, -2.0]
    batch = hooked.read_batch(TEXTS, LAYERS, alphas=alphas, direction_D=direction_D, steered_layer=1)
    for text, alpha, means in zip(TEXTS, alphas, batch, strict=True):
        plain = hooked.read_alone(text, LAYERS)
        np.testing.assert_allclose(means[0], plain[0], **TOLERANCE)
        np.testing.assert_allclose(means[1], plain[1] + alpha * direction_D, **TOLERANCE)
        alone = hooked.read_batch([text], LAYERS, alphas=[alpha], direction_D=direction_D, steered_layer=1)[0]
        np.testing.assert_allclose(means[2], alone[2], **TOLERANCE)


def test_hooks_leave_nothing_behind(hooked: HookedModel, direction_D: np.ndarray) -> None:
    before = hooked.read_alone(TEXTS[0], LAYERS)
    assert hooked.generate(TEXTS, [1.0, 2.0, 3.0], direction_D, 1, num_tokens=2) == len(TEXTS) * 2
    after = hooked.read_alone(TEXTS[0], LAYERS)
    for layer in LAYERS:
        np.testing.assert_array_equal(before[layer], after[layer])
