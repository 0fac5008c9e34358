"""The run directory: the path of each result of a study, and the study that the results belong to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batch_jobs.config.difference import config_difference
from batch_jobs.config.steering import without_file_paths
from batch_jobs.config.study import WORKING_FIELDS, StudyError
from batch_jobs.files.atomic import write_atomically
from batch_jobs.files.documents import read_json

if TYPE_CHECKING:
    from batch_jobs.files.object_store import StorePath
    from batch_jobs.run.working_copy import WorkingCopy


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run. Nothing is created until something is written.

    A run in an object store has a working copy; `path` is then the copy's folder. `open_run` makes both.
    """

    path: Path
    copy: WorkingCopy | None = None

    @classmethod
    def for_config(cls, config: Path, out: Path | None) -> RunDirectory:
        """The run at `out` if given, else at `runs/<config file's stem>` under the current folder."""
        return cls(out if out is not None else Path("runs") / config.stem)

    def absolute(self) -> RunDirectory:
        """The same run for a process with another current folder."""
        return RunDirectory(self.path.absolute(), self.copy)

    def stored(self, path: Path) -> Path | StorePath:
        """Where the file or folder at `path` of the run lies for everybody: in the store, or on the disk itself."""
        if self.copy is None:
            return path
        name = path.relative_to(self.path).as_posix()
        return self.copy.store if name == "." else self.copy.store / name

    def shown(self, path: Path) -> str:
        """The place of a file or folder of the run, for the user."""
        return str(self.stored(path))

    def fetch(self) -> None:
        """Bring what is new in the store into the working copy; without a store, nothing.

        Rows that two workers have stored are there once afterwards.

        Raises:
            StudyError: the store refuses, or a part is unusable.
        """
        if self.copy is None:
            return
        from batch_jobs.rows.store import drop_repeated_rows

        self.copy.fetch()
        drop_repeated_rows(self.generations)

    def publish(self) -> None:
        """Bring what was changed in the working copy into the store; without a store, nothing.

        Raises:
            StudyError: the store refuses.
        """
        if self.copy is not None:
            self.copy.publish()

    def check_held(self) -> None:
        """Check, between two pieces of work, that the run is still this driver's; without a store, nothing.

        Raises:
            StudyError: another driver has taken it; see `DriverLock`.
        """
        if self.copy is not None:
            self.copy.check_held()

    @property
    def directions(self) -> Path:
        """The directions."""
        return self.path / "directions.safetensors"

    @property
    def controls(self) -> Path:
        """The random control directions."""
        return self.path / "controls.safetensors"

    @property
    def validation(self) -> Path:
        """Results of the directions on held-out pairs."""
        return self.path / "validation.json"

    @property
    def generations(self) -> Path:
        """Folder of the generated rows; see `rows.store`."""
        return self.path / "generations"

    @property
    def scenarios(self) -> Path:
        """The scenarios of the run."""
        return self.path / "scenarios.json"

    @property
    def readouts(self) -> Path:
        """Readouts of the contrastive texts."""
        return self.path / "readouts.safetensors"

    @property
    def attempts(self) -> Path:
        """Folder of the attempt log; see `AttemptLog`."""
        return self.path / "attempts"

    @property
    def judgements(self) -> Path:
        """Folder of the grades, one file a judge or person; see `scoring.judgements`."""
        return self.path / "judgements"

    @property
    def earlier_judgements(self) -> Path:
        """The grades of the one judge that a run of an earlier version has."""
        return self.path / "judgements.jsonl"

    @property
    def agreement(self) -> Path:
        """Agreement of judges, people and the keywords."""
        return self.path / "agreement.json"

    @property
    def findings(self) -> Path:
        """Asymmetries, failure signatures, and steering against detection by layer."""
        return self.path / "findings.json"

    @property
    def behaviour(self) -> Path:
        """Correlation of projection and behaviour."""
        return self.path / "behaviour.json"

    @property
    def cost(self) -> Path:
        """The cost of steering."""
        return self.path / "cost.json"

    @property
    def figures(self) -> Path:
        """Folder of the report's figures."""
        return self.path / "figures"

    @property
    def scores(self) -> Path:
        """Scores, one row per condition."""
        return self.path / "scores.csv"

    @property
    def success(self) -> Path:
        """Success rates, one row per group of conditions that differ only in α."""
        return self.path / "scores_success.csv"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    @property
    def provenance(self) -> Path:
        """The origin of the results; see `StudyRecord`."""
        return self.path / "provenance.json"

    @property
    def _results(self) -> tuple[Path, ...]:
        return (
            self.scenarios,
            self.directions,
            self.controls,
            self.readouts,
            self.validation,
            self.generations,
            self.attempts,
            self.judgements,
            self.earlier_judgements,
            self.agreement,
            self.scores,
            self.success,
            self.findings,
            self.behaviour,
            self.cost,
            self.figures,
            self.report,
        )

    def claim(self, run_key: str, identity: Mapping[str, Any], *, overwrite: bool) -> None:
        """Check that the results in the directory, if any, belong to `run_key`, so that resuming never mixes two
        studies.

        Args:
            run_key: digest of the config and of the content of its texts.
            identity: the config's part of the key.
            overwrite: delete the files that a run writes (and nothing else in the directory) instead of checking.

        Raises:
            StudyError: the path is a file, or the directory holds another run's results, or results whose provenance
                is gone; the message names the fields that differ.
        """
        if self.path.exists() and not self.path.is_dir():
            raise StudyError(f"{self.path} is a file; give --out a directory.")
        if overwrite:
            if self.copy is not None:
                self.copy.delete(path.name for path in (self.provenance, *self._results))
            self.provenance.unlink(missing_ok=True)
            for result in self._results:
                shutil.rmtree(result) if result.is_dir() else result.unlink(missing_ok=True)
            return
        if not any(result.exists() for result in self._results):
            return
        earlier = self.read_provenance()
        if earlier.get("run_key") == run_key:
            return
        raise StudyError(
            f"{self.path} holds results of another study: {_what_differs(earlier, identity)}. Give --out another "
            "directory, undo the change, or --overwrite to replace them."
        )

    def write_provenance(self, document: Mapping[str, Any]) -> None:
        """Replace provenance.json atomically."""
        write_atomically(self.provenance, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def read_provenance(self) -> dict[str, Any]:
        """The document that `write_provenance` wrote, or an empty mapping if there is no such file.

        Raises:
            StudyError: the file is not a JSON object or cannot be read.
        """
        if not self.provenance.exists():
            return {}
        document = read_json(self.provenance, advice="use --overwrite to start anew")
        if not isinstance(document, dict):
            raise StudyError(f"{self.provenance}: not a JSON object; use --overwrite to start anew.")
        return document


def _what_differs(earlier: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    config = earlier.get("config")
    if not isinstance(config, Mapping):
        return "its provenance.json is gone or records no config"
    recorded = without_file_paths({field: value for field, value in config.items() if field not in WORKING_FIELDS})
    if changes := config_difference(recorded, identity):
        return "; ".join(str(change) for change in changes)
    return "the config is the same, but the pairs or the scenarios, or a direction file, it names have another content"
