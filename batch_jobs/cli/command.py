"""What the script `vllm-steer` starts: the command line, or one line that names the extra it lacks.

A plain `pip install vllm-steer` brings the client and the data types alone. So nothing but the standard library is
imported here before the command line is.
"""

from __future__ import annotations

import sys

MISSING_EXIT_CODE = 1

_CLI = ["rich", "typer", "yaml"]
_BATCH = ["accelerate", "jinja2", "matplotlib", "pandas", "pyarrow", "ray", "scipy", "sklearn"]
_ENGINE = ["huggingface_hub", "torch", "transformers", "vllm"]
# Module -> extras that bring it, any of which will do. These are the modules of pyproject.toml's extras, and those of
# vLLM's own requirements that a command may import before vLLM. No installed metadata tells the modules of a
# distribution that is not installed.
EXTRAS = {
    **dict.fromkeys(_CLI, ("cli", "batch")),
    **dict.fromkeys(_BATCH, ("batch",)),
    **dict.fromkeys(_ENGINE, ("cpu", "cuda")),
    "lm_eval": ("lm-eval",),
    "inspect_ai": ("inspect",),
}


def main() -> None:
    """Run the command line. A module of an extra that is not installed is one line on stderr and exit code 1.

    Raises:
        ModuleNotFoundError: any other module is missing, which installing an extra would not mend.
    """
    try:
        from batch_jobs.cli.main import main as command_line

        command_line()
    except ModuleNotFoundError as error:
        # The whole name: a missing submodule of an installed module is a fault, of ours or of that module's.
        if error.name not in EXTRAS:
            raise
        print(f"vllm-steer: {missing(error.name)}", file=sys.stderr)
        raise SystemExit(MISSING_EXIT_CODE) from None


def missing(module: str) -> str:
    """What to say and do about a module of `EXTRAS` that is not installed."""
    commands = " or ".join(f'pip install "vllm-steer[{extra}]"' for extra in EXTRAS[module])
    return f"this command needs the module {module}, which is not installed; install it with {commands}."
