"""What the site needs beyond ``docs/``: the pictures of the recorded benchmark runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
ON_GITHUB, ON_SITE = "(../benchmarks/results/", "(results/"


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures to the site."""
    for picture in sorted(RESULTS.glob("*/*.svg")):
        uri = f"results/{picture.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the pictures' paths, which are right in a clone, into those of the site."""
    return markdown.replace(ON_GITHUB, ON_SITE)
