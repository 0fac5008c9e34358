"""The tasks of an evaluation: lm-eval's by name, and those of YAML files, whose data may lie beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_jobs.config.evaluation import is_task_file
from batch_jobs.errors import StudyError
from batch_jobs.files.documents import read_yaml


@dataclass(frozen=True)
class EvaluationTask:
    """One entry of an evaluation's `tasks`.

    Attributes:
        name: the task's name.
        document: the YAML's mapping with the paths of its data resolved; None for a task that lm-eval finds by name.
        digest: of the YAML and its data files; the name for a task that lm-eval finds.
    """

    name: str
    document: Mapping[str, Any] | None
    digest: str

    @property
    def spec(self) -> str | dict[str, Any]:
        """What lm-eval takes: the name, or a copy of the mapping, since lm-eval changes it."""
        return self.name if self.document is None else deepcopy(dict(self.document))


def read_task(task: str) -> EvaluationTask:
    """Read an entry of `tasks`. Relative paths in `dataset_kwargs.data_files` are relative to the YAML's folder.

    Raises:
        StudyError: the file or its data cannot be read, or it has no `task`.
    """
    if not is_task_file(task):
        return EvaluationTask(task, None, task)
    path = Path(task)
    document = read_yaml(path, advice="give the YAML of one lm-eval task without Python functions")
    if not isinstance(document, dict) or not isinstance(document.get("task"), str):
        raise StudyError(f"{path}: has no field task with a text; give the YAML of one lm-eval task.")
    if "include" in document:
        raise StudyError(f"{path}: has include, which lm-eval follows by name alone; put its folder into include_path.")
    digest = hashlib.sha256(path.read_bytes())
    options = document.get("dataset_kwargs")
    if isinstance(options, dict) and "data_files" in options:
        options["data_files"] = _resolved(options["data_files"], path.parent, digest)
    return EvaluationTask(document["task"], document, digest.hexdigest()[:16])


def _resolved(files: Any, folder: Path, digest: Any) -> Any:
    if isinstance(files, dict):
        return {split: _resolved(value, folder, digest) for split, value in files.items()}
    if isinstance(files, list):
        return [_resolved(value, folder, digest) for value in files]
    if not isinstance(files, str) or "://" in files:
        return files
    file = folder / files
    try:
        digest.update(file.read_bytes())
    except OSError as error:
        raise StudyError(f"{file}: cannot be read ({error.strerror}); correct data_files of the task.") from error
    return str(file.resolve())
