"""Notebooks as code: `python -m tests.docs.notebook FILE.ipynb` runs the code cells in order, in one namespace."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def read_notebook(path: Path) -> dict[str, Any]:
    """The document of a notebook."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def run_notebook(path: Path) -> None:
    """Run the code cells; a traceback names the notebook and the cell."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()  # as in tests/engine, to save ten seconds
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(read_notebook(path)["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), namespace)


if __name__ == "__main__":
    run_notebook(Path(sys.argv[1]))
