"""The rows that a capture writes are those of Hugging Face's hooks, and their average is the engine's own mean."""

from __future__ import annotations

from pathlib import Path

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
from tests.support.hf_reference import Reference
from tests.support.tiny_models import save_tiny_model
from vllm_steer import Readout, collect_readouts, steered

pytestmark = pytest.mark.engine

LAYERS = (0, 3)
TEXTS = [
    "I am so sorry, that must hurt.",
    "Noted.",
    "The quick brown fox jumps over the lazy dog, again and again, until the evening comes and it is dark.",
]
SKIP = 1


def test_captured_rows_equal_hugging_face_and_average_to_the_mean(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_tiny_model("llama", demo_model, tmp_path / "llama")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    settings = CaptureSettings.parse(
        {
            "model": str(checkpoint),
            "model_revision": None,
            "texts_sha256": sha256_of(texts),
            "column": "text",
            "layers": LAYERS,
            "span": "all",
            "skip_first": SKIP,
            "max_text_tokens": 64,
            "generate": 6,
            "shard_rows": 30,
            "max_rows": None,
            "engine_dtype": "float32",
            "engine": {"enforce_eager": True, "kv_cache_gib": 0.0625, "max_num_batched_tokens": 64, "max_num_seqs": 8},
        }
    )
    llm = start_capture_engine(settings)
    try:
        monkeypatch.setattr(run_capture, "start_capture_engine", lambda _: llm)
        with monkeypatch.context() as patch:
            patch.setitem(vars(vllm_steer), "close_llm", lambda _: None)  # it is asked once more below
            made = capture(texts, settings, tmp_path / "out", console=Console(quiet=True))
        tokenizer, reference = AutoTokenizer.from_pretrained(checkpoint), Reference(checkpoint)
        prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
        params = steered({"max_tokens": 6, "temperature": 0.0}, [], Readout(LAYERS, "all", skip_first=SKIP))
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], [params] * 3, use_tqdm=False)
        means = [read for (read,) in collect_readouts(llm, outputs)]  # type: ignore[arg-type]
    finally:
        vllm_steer.close_llm(llm)  # type: ignore[arg-type]
    files = sorted((tmp_path / "out").glob("shard-*.safetensors"))
    assert len(files) == made.shards >= 2
    shards = []
    for path in files:
        with safe_open(str(path), framework="numpy") as file:
            shards.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  (no mapping)
    got = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    for place, (ids, output, mean) in enumerate(zip(prompts, outputs, means, strict=True)):
        own = got["text_index"] == place
        generated = list(output.outputs[0].token_ids)
        assert mean is not None
        assert got["token_ids"][own].tolist() == [*ids, *generated[:-1]][SKIP:]
        assert got["position"][own].tolist() == list(range(SKIP, len(ids) + len(generated) - 1))
        assert mean.num_tokens == own.sum()
        truth = reference.replay(ids, generated)
        for layer in LAYERS:
            rows, expected = got[f"layer.{layer}"][own], truth.rows(layer, "all", SKIP)
            # float32 rounding moves a row by up to 4e-6 of its length; that of a neighbouring token is off by 1e-1
            off = np.linalg.norm(rows - expected, axis=1) / np.linalg.norm(expected, axis=1)
            assert off.max() < 1e-4
            average = rows.astype(np.float64).mean(axis=0)
            assert np.linalg.norm(mean.mean[layer] - average) < 1e-5 * np.linalg.norm(average)
