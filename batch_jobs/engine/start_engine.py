"""The in-process engine of a study: its interface, how it is started, and which model it loads."""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from batch_jobs.config.study import DEMO_MODEL, Study, StudyError


class Engine(Protocol):
    """The part of `vllm.LLM` that batch jobs call. vLLM's own objects are opaque to them, hence Any."""

    def generate(
        self, prompts: Sequence[Mapping[str, Any]], sampling_params: Sequence[Any], *, use_tqdm: bool
    ) -> Sequence[Any]:
        """Run all prompts, each with its own SamplingParams; one RequestOutput per prompt, in their order."""
        ...

    def get_tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer."""
        ...

    def get_metrics(self) -> Sequence[Any]:
        """vLLM's metrics of this process, with running totals."""
        ...

    def reset_prefix_cache(self) -> bool:
        """Forget all cached KV blocks; False, and nothing is forgotten, while requests run."""
        ...


def model_location(model: str) -> str:
    """What the engine loads for a study's `model`: the demo model's folder, or the local path or hub id as given.

    Making the demo model the first time takes a minute and a download.

    Raises:
        DemoModelError: the demo model cannot be made.
    """
    if model != DEMO_MODEL:
        return model
    from batch_jobs.demo_model import demo_model_path

    return str(demo_model_path())


def model_revision(location: str, engine: Engine | None) -> str | None:
    """The revision that distinguishes two models of one name: the hub commit, or for a folder a digest of its config
    and file sizes. None if the hub commit is unknown, as it is without an engine."""
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
    """Number of decoder blocks of a model, from its config alone: no weights are read.

    Raises:
        StudyError: there is no such model, or its config does not give the number.
    """
    if (location.startswith(("/", ".", "~")) or location.count("/") > 1) and not Path(location).is_dir():
        raise StudyError(f"There is no model folder {location}; give a folder, a hub id (owner/name) or {DEMO_MODEL}.")
    blocks = getattr(text_config(location, trust_remote_code=trust_remote_code), "num_hidden_layers", None)
    if not isinstance(blocks, int):
        raise StudyError(f"The config of {location} has no num_hidden_layers; give a decoder-only language model.")
    return blocks


def hidden_size(location: str, *, trust_remote_code: bool = False) -> int:
    """Width of a model's residual stream, from its config alone.

    Raises:
        StudyError: there is no such model, or its config does not give the number.
    """
    width = getattr(text_config(location, trust_remote_code=trust_remote_code), "hidden_size", None)
    if not isinstance(width, int):
        raise StudyError(f"The config of {location} has no hidden_size; give a decoder-only language model.")
    return width


def text_config(location: str, *, trust_remote_code: bool = False) -> Any:
    """The part of a model's Hugging Face config that describes its language model.

    Raises:
        StudyError: the config cannot be read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        # transformers' messages are paragraphs; the first line names the fault
        first_line = str(error).strip().splitlines()[0]
        raise StudyError(
            f"The config of {location} cannot be read ({first_line}); give a model folder, a hub id that this machine "
            f"can reach, or {DEMO_MODEL}."
        ) from error
    return config.get_text_config()


def set_engine_environment() -> None:
    """Set three environment variables unless they are set already. Call it before vLLM, torch or scikit-learn is
    imported: OpenMP reads its variables when it is loaded.

    VLLM_ENABLE_V1_MULTIPROCESSING=0 keeps the engine in this process (it starts in a third of the time and
    readouts need no transfer between processes). VLLM_LOGGING_LEVEL=ERROR keeps the log out of the
    progress bars. OMP_WAIT_POLICY=PASSIVE lets torch's threads sleep instead of spin while they wait for each other:
    on a shared CPU, spinning makes a step several times slower.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def without_collection() -> Iterator[None]:
    """Pause the garbage collector, for imports and other work that makes many lasting objects: it would walk all of
    them again and again, an eighth of the time that importing vLLM takes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def start_engine(study: Study, location: str) -> Engine:
    """Load the model with hooks on the study's layers; returns a `vllm.LLM`, in this process unless the environment
    says otherwise.

    vLLM's statistics are on, since progress and row times come from them.

    Raises:
        SteerError: the model's family is not supported.
        StudyError: there is no such model, or it lacks a layer.
    """
    set_engine_environment()
    layers = study.hooked_layers(decoder_blocks(location, trust_remote_code=study.engine.trust_remote_code))
    from vllm_steer import load_llm
    from vllm_steer.settings import SteerSettings

    steer = study.engine.steer_settings()
    if study.num_steering_directions > SteerSettings.model_fields["max_directions"].default:
        steer["max_directions"] = study.num_steering_directions
    with without_collection():
        engine: Engine = load_llm(
            location,
            layers=layers,
            dtype=study.dtype,
            seed=study.seed,
            max_model_len=study.max_model_len,
            disable_log_stats=False,
            steer=steer,
            **study.engine.engine_args(),
        )
    return engine


class LazyEngine:
    """An engine that starts on first use: a resumed study with nothing left to run never starts one."""

    def __init__(self, study: Study, location: str, console: Console) -> None:
        self._study = study
        self.location = location
        """The model to load; see `model_location`."""
        self._console = console

    @cached_property
    def engine(self) -> Engine:
        """The engine; the first use starts it, which takes between half a minute and several minutes."""
        began = time.monotonic()
        with self._console.status(f"Starting the engine on {self.location} …"):
            engine = start_engine(self._study, self.location)
        # what is there now stays until `close`, and need not be walked by every full collection between two steps
        gc.freeze()
        self._console.print(f"Engine started in {time.monotonic() - began:.0f} s: {self.location}", highlight=False)
        return engine

    def close(self) -> None:
        """Shut the engine down, if it was started."""
        engine = self.__dict__.pop("engine", None)
        if engine is not None:
            from vllm_steer import close_llm

            close_llm(engine)
            del engine
            gc.unfreeze()
            gc.collect()  # frees its memory now, not while another engine runs

    @cached_property
    def revision(self) -> str | None:
        """See `model_revision`; starts the engine."""
        return model_revision(self.location, self.engine)
