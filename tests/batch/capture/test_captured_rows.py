"""The rows that a capture writes are those of Hugging Face's hooks, and their average is the engine's own mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors import safe_open
from transformers import AutoTokenizer

import vllm_steer
from batch_jobs.capture import run_capture
from batch_jobs.capture.run_capture import capture, start_capture_engine
from batch_jobs.capture.settings import CaptureSettings
from batch_jobs.capture.texts import sha256_of
from batch_jobs.generate.ray_options import Pool
from tests.support.hf_reference import Reference
from tests.support.tiny_models import save_tiny_model
from vllm_steer import Readout, collect_readouts, steered

pytestmark = pytest.mark.engine

LAYERS, SKIP, GENERATE = (0, 3), 1, 6
TEXTS = [
    "I am so sorry, that must hurt.",
    "Noted.",
    "The quick brown fox jumps over the lazy dog, again and again, until the evening comes and it is dark.",
]


@pytest.fixture(scope="module")
def checkpoint(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", demo_model, tmp_path_factory.mktemp("captured") / "llama")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS))
    return path


def settings_of(checkpoint: Path, texts: Path) -> CaptureSettings:
    return CaptureSettings.parse(
        {
            "model": str(checkpoint),
            "model_revision": None,
            "texts_sha256": sha256_of(texts),
            "column": "text",
            "layers": LAYERS,
            "span": "all",
            "skip_first": SKIP,
            "max_text_tokens": 64,
            "generate": GENERATE,
            "shard_rows": 30,
            "max_rows": None,
            "engine_dtype": "float32",
            "engine": {"enforce_eager": True, "kv_cache_gib": 0.0625, "max_num_batched_tokens": 64, "max_num_seqs": 8},
        }
    )


def written(out: Path) -> dict[str, Any]:
    """The tensors of all shards, of which there must be several."""
    files = sorted(out.glob("shard-*.safetensors"))
    assert len(files) >= 2
    shards = []
    for path in files:
        with safe_open(str(path), framework="numpy") as file:
            shards.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  (no mapping)
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def check_rows(got: dict[str, Any], checkpoint: Path) -> None:
    """Compare all rows with the reference's, whose greedy tokens must be those that were generated."""
    tokenizer, reference = AutoTokenizer.from_pretrained(checkpoint), Reference(checkpoint)
    for place, text in enumerate(TEXTS):
        own, ids = got["text_index"] == place, tokenizer(text)["input_ids"]
        truth = reference.generate(ids, GENERATE)
        assert got["token_ids"][own].tolist() == [*ids, *truth.tokens[:-1]][SKIP:]
        assert got["position"][own].tolist() == list(range(SKIP, len(ids) + GENERATE - 1))
        for layer in LAYERS:
            rows, expected = got[f"layer.{layer}"][own], truth.rows(layer, "all", SKIP)
            # float32 rounding moves a row by up to 4e-6 of its length; that of a neighbouring token is off by 1e-1
            off = np.linalg.norm(rows - expected, axis=1) / np.linalg.norm(expected, axis=1)
            assert off.max() < 1e-4


def test_captured_rows_equal_hugging_face_and_average_to_the_mean(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(checkpoint, texts)
    llm: Any = start_capture_engine(settings)
    try:
        monkeypatch.setattr(run_capture, "start_capture_engine", lambda _: llm)
        with monkeypatch.context() as patch:
            patch.setitem(vars(vllm_steer), "close_llm", lambda _: None)  # it is asked once more below
            capture(texts, settings, tmp_path / "out", console=Console(quiet=True))
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        params = steered({"max_tokens": GENERATE, "temperature": 0.0}, [], Readout(LAYERS, "all", skip_first=SKIP))
        prompts = [{"prompt_token_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
        means = [mean for (mean,) in collect_readouts(llm, llm.generate(prompts, params, use_tqdm=False))]
    finally:
        vllm_steer.close_llm(llm)
    got = written(tmp_path / "out")
    check_rows(got, checkpoint)
    for place, mean in enumerate(means):
        own = got["text_index"] == place
        assert mean is not None
        assert mean.num_tokens == own.sum()
        for layer in LAYERS:
            average = got[f"layer.{layer}"][own].astype(np.float64).mean(axis=0)
            assert np.linalg.norm(mean.mean[layer] - average) < 1e-5 * np.linalg.norm(average)


@pytest.mark.slow
def test_a_pool_of_engines_writes_the_same_rows(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    settings = settings_of(checkpoint, texts)
    made = capture(texts, settings, tmp_path / "out", console=Console(quiet=True), pool=Pool(1, 0, 1))
    check_rows(written(tmp_path / "out"), checkpoint)
    again = capture(texts, settings, tmp_path / "out", console=Console(quiet=True), pool=Pool(1, 0, 1))
    assert again.reused == again.shards == made.shards
