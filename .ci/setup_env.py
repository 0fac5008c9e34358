"""Make the project's virtual environment: `python3 .ci/setup_env.py [--engine cpu|cuda]`.

Runs before anything is installed, so it uses only the standard library. `make setup` calls it.

- The work is done once: the environment keeps a fingerprint of everything that decides its content, and a call
  that finds the same fingerprint returns at once. An environment whose installation was interrupted is made
  anew, since pip takes a half-unpacked package for an installed one.
- vLLM's CPU wheel requires torchvision, torchaudio and torchcodec, but not their CPU builds. Those on PyPI are
  linked against CUDA's torch, and with them the import of any transformers model fails (`operator
  torchvision::nms does not exist`). Where PyTorch's CPU wheel index answers, the `+cpu` builds of the same
  version replace them. Elsewhere torchvision, which models with images need, gets empty definitions of the two
  operators (no image processor calls them), and the others are removed, since nothing here reads sound.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
VENV = PROJECT / ".venv"
STATE = VENV / "vllm-steer-setup"  # UNFINISHED, or the fingerprint of a finished set-up
UNFINISHED = "unfinished"
OLDEST_PYTHON = (3, 11)

PYTORCH_CPU_INDEX = os.environ.get("PYTORCH_CPU_INDEX", "https://download.pytorch.org/whl/cpu")
PROBE_SECONDS = 5
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
# Appended to torchvision's extension.py, which it imports before anything that names its operators.
OPERATORS = """
# Added by the set-up of vllm-steer: without these definitions torchvision cannot be imported where its library is
# built for another torch. They have no implementation.
if not _has_ops():
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
MODEL_IMPORT = "from transformers import LlamaForCausalLM"


class SetupError(Exception):
    """The environment could not be made; the message says what to do."""


def fingerprint(engine: str) -> str:
    """Hash of everything that decides the environment: declared dependencies, this file, engine, interpreter, path."""
    digest = hashlib.sha256()
    for source in (PROJECT / "pyproject.toml", Path(__file__)):
        digest.update(source.read_bytes())
    # The project's own path is part of an editable install: a moved checkout is set up again.
    digest.update(f"{engine}\0{sys.version}\0{PROJECT}".encode())
    return digest.hexdigest()


def read_state() -> str | None:
    """The recorded state, or None where there is none."""
    return STATE.read_text(encoding="utf-8") if STATE.is_file() else None


def write_state(state: str) -> None:
    """Record the state in one step, so that a cut-off write is never read."""
    partial = STATE.with_suffix(".partial")
    partial.write_text(state, encoding="utf-8")
    partial.replace(STATE)


def venv_python() -> str:
    """Path of the environment's interpreter."""
    return str(VENV / "bin" / "python")


def succeeds(*command: str) -> bool:
    """True when the command can be run and exits with 0. Its output is dropped."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def pip(*arguments: str) -> None:
    """Run pip in the environment and show its output.

    Raises:
        SetupError: pip failed.
    """
    command = [venv_python(), "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, check=False).returncode != 0:
        raise SetupError(f"`pip {' '.join(arguments)}` failed (its own message is above). Then run `make setup` again.")


def make_venv() -> None:
    """Make `.venv` with pip in it, also with a Debian Python, whose `venv` comes without `ensurepip`.

    Raises:
        SetupError: this Python cannot make one.
    """
    shutil.rmtree(VENV, ignore_errors=True)
    if succeeds(sys.executable, "-m", "venv", str(VENV)):
        return
    shutil.rmtree(VENV, ignore_errors=True)
    made = succeeds(sys.executable, "-m", "venv", "--without-pip", str(VENV)) and succeeds(
        sys.executable, "-m", "pip", "--python", venv_python(), "install", "pip"
    )
    if not made:
        raise SetupError(
            f"{sys.executable} can make no virtual environment: install its `venv` and `pip` modules "
            "(Debian: `apt-get install python3-venv python3-pip`), or name another: `make setup PYTHON=...`."
        )


def index_answers(url: str) -> bool:
    """True when the package index at `url` can be reached from here, through the proxy if one is set."""
    try:
        with urllib.request.urlopen(f"{url}/torchvision/", timeout=PROBE_SECONDS) as reply:
            return int(reply.status) == 200
    except (OSError, HTTPException):
        return False


def installed_media_packages() -> dict[str, str]:
    """Name -> version of each media package that is installed."""
    code = (
        "import importlib.metadata as m, sys\n"
        "for d in m.distributions():\n"
        "    if d.name in sys.argv[1:]: print(d.name, d.version)"
    )
    listing = subprocess.run(
        [venv_python(), "-c", code, *MEDIA_PACKAGES], check=True, capture_output=True, text=True
    ).stdout
    return dict(line.split() for line in listing.splitlines())


def model_import_error() -> str | None:
    """Last line of the error when a model class is imported in the environment; None when the import works."""
    check = subprocess.run([venv_python(), "-c", MODEL_IMPORT], check=False, capture_output=True, text=True)
    if check.returncode == 0:
        return None
    return (check.stderr.strip().splitlines() or [f"exit status {check.returncode}"])[-1]


def define_torchvision_operators() -> None:
    """Make the installed torchvision importable beside a torch that its library is not built for."""
    for file in VENV.glob("lib/python*/site-packages/torchvision/extension.py"):
        text = file.read_text(encoding="utf-8")
        if OPERATORS not in text:
            file.write_text(text + OPERATORS, encoding="utf-8")


def repair_media_packages(index: str | None) -> None:
    """Replace media packages other than CPU builds by those of `index`, or make do with torchvision without kernels."""
    foreign = {name: v for name, v in installed_media_packages().items() if not v.endswith("+cpu")}
    if foreign and index is not None:
        wanted = [f"{name}=={version.split('+')[0]}+cpu" for name, version in foreign.items()]
        try:
            pip("install", "--no-deps", "--index-url", index, *wanted)
        except SetupError:  # an index without exactly these builds is as good as none
            print(f"setup: {index} lacks one of {', '.join(wanted)}", flush=True)
        else:
            foreign = {}
    if "torchvision" in foreign:
        print("setup: torchvision is not built for this torch: it stays, without its operators", flush=True)
        define_torchvision_operators()
        del foreign["torchvision"]
    if foreign:
        print(f"setup: removing {', '.join(foreign)}: not built for this torch, and not needed", flush=True)
        pip("uninstall", "--yes", *foreign)
    remaining = installed_media_packages()
    if remaining and model_import_error() is not None:  # CPU builds by name that still do not fit this torch
        pip("uninstall", "--yes", *remaining)


def set_up(engine: str) -> None:
    """Bring `.venv` to the declared state.

    Raises:
        SetupError: the interpreter is too old, pip failed, or the result cannot import a model.
    """
    if sys.version_info < OLDEST_PYTHON:
        raise SetupError(
            f"got Python {sys.version.split()[0]}, need {'.'.join(map(str, OLDEST_PYTHON))} or newer: "
            "name one with `make setup PYTHON=python3.12`."
        )
    wanted = fingerprint(engine)
    state = read_state()
    if state == wanted:
        return
    if state == UNFINISHED or not succeeds(venv_python(), "-m", "pip", "--version"):
        print(f"setup: making {VENV}", flush=True)
        make_venv()
    write_state(UNFINISHED)
    index = PYTORCH_CPU_INDEX if engine == "cpu" and index_answers(PYTORCH_CPU_INDEX) else None
    print(f"setup: installing the {engine} engine, the study and the tools (minutes, gigabytes)", flush=True)
    extra_index = ["--extra-index-url", index] if index else []
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    # Files are compiled when first imported: most of these gigabytes never are.
    pip("install", "--no-compile", *quiet, *extra_index, "--editable", f"{PROJECT}[{engine},batch,dev,docs]")
    if engine == "cpu":
        repair_media_packages(index)
    problem = model_import_error()
    if problem is not None:
        raise SetupError(f"everything is installed, but `{MODEL_IMPORT}` fails in {VENV}: {problem}")
    write_state(wanted)
    print("setup: done", flush=True)


def main() -> int:
    """Set the environment up for the engine that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(description="Make the project's virtual environment in .venv.")
    parser.add_argument("--engine", choices=("cpu", "cuda"), default="cpu", help="which vLLM to install")
    try:
        set_up(parser.parse_args().engine)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
