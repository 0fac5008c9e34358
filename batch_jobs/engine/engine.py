"""The in-process engine of a study: what the jobs need of it, how it is started, and what it loads."""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from batch_jobs.config.study import DEMO_MODEL, Study, StudyError


class Engine(Protocol):
    """The part of `vllm.LLM` that batch jobs call. vLLM's own objects are opaque to them, hence Any."""

    def generate(
        self, prompts: Sequence[Mapping[str, Any]], sampling_params: Sequence[Any], *, use_tqdm: bool
    ) -> Sequence[Any]: ...

    def get_tokenizer(self) -> Any: ...

    def get_metrics(self) -> Sequence[Any]: ...


def model_location(model: str) -> str:
    """What the engine loads for a study's `model`: the demo model's folder, a local path, or a hub id as it
    is.

    Making the demo model the first time takes a minute and a download.
    """
    if model != DEMO_MODEL:
        return model
    from batch_jobs.demo_model import demo_model_path

    return str(demo_model_path())


def model_revision(location: str, engine: Engine) -> str | None:
    """What tells two models of one name apart: the hub commit, or for a folder a digest of its config and
    weight sizes."""
    folder = Path(location)
    if folder.is_dir():
        digest = hashlib.sha256()
        for file in sorted(path for path in folder.iterdir() if path.suffix in {".json", ".safetensors", ".bin"}):
            # sizes stand in for the weights: hashing tens of gigabytes would delay every start
            digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
            if file.name == "config.json":
                digest.update(file.read_bytes())
        return f"folder-{digest.hexdigest()[:16]}"
    hf_config = getattr(getattr(engine, "model_config", None), "hf_config", None)
    commit = getattr(hf_config, "_commit_hash", None)
    return commit if isinstance(commit, str) else None


def decoder_blocks(location: str, *, trust_remote_code: bool = False) -> int:
    """How many decoder blocks a model has, from its config alone: no weight is read.

    Raises StudyError when there is no such model or its config does not say.
    """
    if (location.startswith(("/", ".", "~")) or location.count("/") > 1) and not Path(location).is_dir():
        raise StudyError(f"There is no model folder {location}; give a folder, a hub id (owner/name) or {DEMO_MODEL}.")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        # transformers' messages are paragraphs; the first line says what is wrong
        first_line = str(error).strip().splitlines()[0]
        raise StudyError(
            f"The config of {location} cannot be read ({first_line}); give a model folder, a hub id that this machine "
            f"can reach, or {DEMO_MODEL}."
        ) from error
    blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(blocks, int):
        raise StudyError(f"The config of {location} has no num_hidden_layers; give a decoder-only language model.")
    return blocks


def set_engine_environment() -> None:
    """Set three environment variables, unless set already; to be called before vLLM is imported.

    VLLM_ENABLE_V1_MULTIPROCESSING=0 keeps the engine in this process (it starts in a third of the time and
    readouts need no transfer between processes), VLLM_LOGGING_LEVEL=ERROR keeps the log out of the
    progress bars, and OMP_WAIT_POLICY=PASSIVE lets torch's threads sleep where they would spin for each other:
    on a CPU that something else uses too, spinning makes a step several times slower.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def start_engine(study: Study, location: str) -> Engine:
    """Load the model with hooks on the study's layers; returns a `vllm.LLM`, in this process unless the environment
    says otherwise.

    Statistics are on: progress and row times come from them. Raises SteerError when the model's family is not
    supported, StudyError when there is no such model or it lacks a layer.
    """
    set_engine_environment()
    layers = study.hooked_layers(decoder_blocks(location, trust_remote_code=study.engine.trust_remote_code))
    from vllm_steer import load_llm

    engine: Engine = load_llm(
        location,
        layers=layers,
        dtype=study.dtype,
        seed=study.seed,
        max_model_len=study.max_model_len,
        disable_log_stats=False,
        steer=study.engine.steer_settings(),
        **study.engine.engine_args(),
    )
    return engine


class LazyEngine:
    """The engine, started when first asked for: a resumed study with nothing left to run never starts one."""

    def __init__(self, study: Study, location: str, console: Console) -> None:
        self._study = study
        self.location = location
        """What was, or will be, loaded."""
        self._console = console

    @cached_property
    def engine(self) -> Engine:
        """The engine; the first use starts it, which takes from half a minute to minutes."""
        began = time.monotonic()
        with self._console.status(f"Starting the engine on {self.location} …"):
            engine = start_engine(self._study, self.location)
        self._console.print(f"Engine started in {time.monotonic() - began:.0f} s: {self.location}", highlight=False)
        return engine

    def close(self) -> None:
        """Shut the engine down, if it was started."""
        engine = self.__dict__.pop("engine", None)
        if engine is not None:
            from vllm_steer import close_llm

            close_llm(engine)
            del engine
            gc.collect()  # now, and not when another engine runs

    @cached_property
    def revision(self) -> str | None:
        """See `model_revision`."""
        return model_revision(self.location, self.engine)
