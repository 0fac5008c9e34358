"""The config of `vllm-steer evaluate`: one typed schema, read from YAML."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

from batch_jobs.config.document import explain_faults
from batch_jobs.config.study import EngineOptions
from batch_jobs.errors import StudyError
from batch_jobs.files.documents import read_yaml
from vllm_steer import Steering, spans

WORKING_FIELDS = ("engine", "directions", "tasks", "include_path")
"""Fields for how the work is done and where files are. The content of directions and tasks counts instead."""


class Target(BaseModel):
    """What is steered with: a direction at its layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    direction: Annotated[str, Field(min_length=1)]
    """Name of a direction in the files."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """Its layer; None where the files hold the name at one layer only."""


class Evaluation(BaseModel):
    """A sweep of benchmark tasks over directions and α, beside the unsteered model and random directions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, Field(min_length=1)]
    """Hub id, local path, or `demo-model`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: Annotated[int, Field(ge=8)] | None = None
    seed: int = 1234
    """Seed of the engine, and of lm-eval's few-shot examples."""
    engine: EngineOptions = EngineOptions()
    directions: Annotated[tuple[str, ...], Field(min_length=1)]
    """Direction files."""
    steer: Annotated[tuple[Target, ...], Field(min_length=1)]
    """The directions to steer with, one at a time."""
    alphas: Annotated[tuple[FiniteFloat, ...], Field(min_length=1)]
    """0 may be among them: it is the unsteered model, which is always evaluated."""
    op: Literal["add", "ablate", "set", "scale"] = "add"
    span: str = "all"
    """The steered tokens; `response` for the answer alone, from the last token of its prompt on."""
    relative: bool = False
    """α in lengths of each token's own stream."""
    controls: Annotated[int, Field(ge=0, le=100)] = 1
    """Random directions for each direction: orthogonal to it, of its length."""
    control_seed: Annotated[int, Field(ge=0)] = 0
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of lm-eval's tasks, or YAML files of tasks."""
    include_path: Path | None = None
    """Folder with further tasks that `tasks` may name."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Most documents of a task."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    max_gen_toks: Annotated[int, Field(ge=1)] = 256
    """Most tokens of a generation whose task does not say it."""

    @field_validator("alphas", "steer", "tasks")
    @classmethod
    def _once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if repeated := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"{repeated[0]} is given more than once; give each once")
        return values

    @model_validator(mode="after")
    def _can_steer(self) -> Self:
        spans.check(self.span)
        if not self.steered_alphas:
            raise ValueError("alphas has only 0, the unsteered model; give one that steers")
        for alpha in self.steered_alphas:
            self.entry("one", None, alpha)
        return self

    @property
    def steered_alphas(self) -> tuple[float, ...]:
        """The alphas but 0."""
        return tuple(alpha for alpha in self.alphas if alpha != 0.0)

    def entry(self, direction: str, layer: int | None, alpha: float) -> Steering:
        """The steering of one cell."""
        return Steering(direction, alpha, layer, self.op, self.span, relative=self.relative)

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that results depend on, but for the content of the files."""
        return self.model_dump(mode="json", exclude=set(WORKING_FIELDS))

    @property
    def config_hash(self) -> str:
        """First 16 hex digits of the sha256 over `identity`."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]


def load_evaluation(path: Path) -> Evaluation:
    """Read an evaluation's YAML. Paths in it are relative to its own folder; a task with a slash or that ends in
    `.yaml` is a path.

    Raises:
        StudyError: the file cannot be read, or a field is wrong; the message names file and fields.
    """
    document = read_yaml(path, advice="give the path of an evaluation's YAML file")
    if not isinstance(document, dict):
        raise StudyError(
            f"{path}: got {type(document).__name__} at the top level; an evaluation is a mapping of fields."
        )
    for field in ("directions", "tasks"):
        if isinstance(document.get(field), str):
            document[field] = [document[field]]
    folder = path.parent
    document["directions"] = _each(document.get("directions"), lambda one: _beside(folder, one))
    document["tasks"] = _each(document.get("tasks"), lambda one: _beside(folder, one) if is_task_file(one) else one)
    if isinstance(document.get("include_path"), str):
        document["include_path"] = _beside(folder, document["include_path"])
    document = {field: value for field, value in document.items() if value is not None}
    try:
        return Evaluation.model_validate(document)
    except ValidationError as error:
        raise StudyError(f"{path}: {explain_faults(error, Evaluation)}") from None


def is_task_file(task: str) -> bool:
    """Whether an entry of `tasks` is the path of a YAML file."""
    return task.endswith((".yaml", ".yml"))


def _each(values: object, change: Any) -> object:
    if not isinstance(values, Sequence) or isinstance(values, str):
        return values
    return [change(one) if isinstance(one, str) else one for one in values]


def _beside(folder: Path, name: str) -> str:
    return name if "://" in name else str((folder / Path(name).expanduser()).resolve())
