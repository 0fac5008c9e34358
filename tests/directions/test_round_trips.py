"""Any directions that a format can hold come back from it, bit for bit; repsteer's folder: test_repsteer.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vllm_steer.directions import Direction, load_directions, save_directions

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/+-]{0,127}", fullmatch=True)
metadata = st.dictionaries(
    st.text(max_size=8),
    st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | st.floats(allow_nan=False) | st.text(max_size=8),
    max_size=3,
)


@st.composite
def directions(draw: st.DrawFn, one_name: bool, first_layer: int, most: int = 4) -> list[Direction]:
    """Directions of one length, with any finite values down to the smallest, each name and layer once."""
    size = draw(st.integers(1, 17))
    values = hnp.arrays(np.float32, size, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
    given_names = draw(st.lists(names, min_size=1, max_size=1 if one_name else 3, unique=True))
    keys = st.tuples(st.sampled_from(given_names), st.integers(first_layer, 999_999))
    chosen = draw(st.lists(keys, min_size=1, max_size=most, unique=True))
    return [Direction(name, layer, draw(values.filter(np.any)), draw(metadata)) for name, layer in chosen]


def facts(found: list[Direction], with_metadata: bool) -> list[Any]:
    rows = [(one.layer, one.name, one.content_hash, dict(one.metadata) if with_metadata else None) for one in found]
    return sorted(rows, key=lambda row: row[:2])


@settings(max_examples=100, deadline=None)
@given(written=directions(one_name=False, first_layer=0))
def test_safetensors_keep_everything(tmp_path_factory: pytest.TempPathFactory, written: list[Direction]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    save_directions(path, written)
    assert facts(load_directions(path), True) == facts(written, True)


@settings(max_examples=100, deadline=None)
@given(written=directions(one_name=True, first_layer=1))
def test_a_control_vector_keeps_name_layers_and_values(
    tmp_path_factory: pytest.TempPathFactory, written: list[Direction]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    save_directions(path, written)
    assert facts(load_directions(path), False) == facts(written, False)


@settings(max_examples=100, deadline=None)
@given(written=directions(one_name=True, first_layer=0, most=1))
def test_npy_keeps_the_values(tmp_path_factory: pytest.TempPathFactory, written: list[Direction]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.npy"
    save_directions(path, written)
    assert facts(load_directions(path, written[0].name, written[0].layer), False) == facts(written, False)


@settings(max_examples=50, deadline=None)
@given(written=directions(one_name=True, first_layer=0))
def test_lm_evals_file_keeps_layers_and_values(
    tmp_path_factory: pytest.TempPathFactory, written: list[Direction]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.pt"
    save_directions(path, written)
    assert facts(load_directions(path, written[0].name), False) == facts(written, False)
