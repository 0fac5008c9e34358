"""The run directory: where each result of a study lies, and whose results those are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_jobs.atomic_file import write_atomically
from batch_jobs.study import StudyError


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run. Nothing is created until something is written."""

    path: Path

    @classmethod
    def for_config(cls, config: Path, out: Path | None) -> RunDirectory:
        """`out` where given, else `runs/<config file's stem>` under the current folder."""
        return cls(out if out is not None else Path("runs") / config.stem)

    @property
    def directions(self) -> Path:
        return self.path / "directions.safetensors"

    @property
    def validation(self) -> Path:
        return self.path / "validation.json"

    @property
    def generations(self) -> Path:
        return self.path / "generations"

    @property
    def scores(self) -> Path:
        return self.path / "scores.csv"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    def claim(self, run_key: str, *, overwrite: bool) -> None:
        """Make sure that results in here, if any, belong to `run_key`, so that resuming never mixes two
        studies.

        `overwrite` deletes what a run writes (and nothing else in the directory) first. Raises StudyError
        when the directory holds another run's results, or results whose provenance is gone.
        """
        if self.path.exists() and not self.path.is_dir():
            raise StudyError(f"{self.path} is a file; give --out a directory.")
        results = (self.directions, self.validation, self.generations, self.scores, self.report)
        if overwrite:
            self.provenance.unlink(missing_ok=True)
            for result in results:
                shutil.rmtree(result) if result.is_dir() else result.unlink(missing_ok=True)
            return
        if any(result.exists() for result in results) and self._owner() != run_key:
            raise StudyError(
                f"{self.path} holds results of another config, model or texts (or of an unknown one); "
                "give --out another directory, or --overwrite to replace them."
            )

    def write_provenance(self, document: Mapping[str, Any]) -> None:
        """Replace provenance.json atomically."""
        write_atomically(self.provenance, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def read_provenance(self) -> dict[str, Any]:
        """What `write_provenance` wrote, or an empty mapping when there is no such file. Raises StudyError if
        malformed."""
        try:
            document = json.loads(self.provenance.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise StudyError(f"{self.provenance}: not JSON ({error}); use --overwrite to start anew.") from error
        if not isinstance(document, dict):
            raise StudyError(f"{self.provenance}: not a JSON object; use --overwrite to start anew.")
        return document

    def _owner(self) -> str | None:
        owner = self.read_provenance().get("run_key")
        return owner if isinstance(owner, str) else None
