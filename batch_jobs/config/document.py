"""Reads a study's YAML, merged over its base files, into a plain mapping, and words the schema's complaints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from batch_jobs.config.steering import resolve_direction_files
from batch_jobs.errors import StudyError
from batch_jobs.files.documents import read_yaml

_PATH_FIELDS = ("pairs", "scenarios")
_SECTION_PATH_FIELDS = {"concept": ("ablation_words",), "cost": ("texts", "choices")}
_WHOLE_FIELDS = ("chat_template_kwargs",)
"""Mappings that are one value, not a section: a study's own value replaces the base's as a whole."""


def read_study_document(path: Path, allowed: str) -> dict[str, Any]:
    """The YAML's mapping, merged over that of its `base`, section by section.

    Relative `pairs`, `scenarios`, direction files and paths in the sections `concept` and `cost` are resolved
    against the folder of the file that gives them.

    Args:
        path: the YAML file.
        allowed: names of a study's fields, for messages.

    Raises:
        StudyError: a file cannot be read, is not a mapping, holds text without a UTF-8 form, or is its own base; the
            message names the file.
    """
    return _read(path, allowed, ())


def _read(path: Path, allowed: str, above: tuple[Path, ...]) -> dict[str, Any]:
    """`above`: the files that name this one as base, directly or not, to detect a cycle."""
    if path.resolve() in above:
        raise StudyError(f"{path}: is its own base, by way of {len(above)} files; break the cycle.")
    document = read_yaml(path, advice="give the path of a study's YAML file")
    if not isinstance(document, dict):
        raise StudyError(
            f"{path}: got {type(document).__name__} at the top level; a study config is a mapping of fields "
            f"({allowed})."
        )
    for field in _PATH_FIELDS:
        if isinstance(document.get(field), str):
            document[field] = path.parent / document[field]
    for name, fields in _SECTION_PATH_FIELDS.items():
        section = document.get(name)
        if isinstance(section, dict):
            given = {field: section[field] for field in fields if isinstance(section.get(field), str)}
            section |= {field: path.parent / value for field, value in given.items()}
    resolve_direction_files(document, path.parent)
    base = document.pop("base", None)
    if base is None:
        return document
    if not isinstance(base, str):
        raise StudyError(f"{path}: field base: got {base!r}; allowed: the path of another study's YAML.")
    return _laid_over(document, _read(path.parent / base, allowed, (*above, path.resolve())))


def _laid_over(upper: dict[str, Any], lower: dict[str, Any]) -> dict[str, Any]:
    merged = dict(lower)
    for field, value in upper.items():
        under = lower.get(field)
        if isinstance(value, dict) and isinstance(under, dict) and field not in _WHOLE_FIELDS:
            merged[field] = _laid_over(value, under)
        else:
            merged[field] = value
    return merged


def explain_faults(error: ValidationError, schema: type[BaseModel]) -> str:
    """All faults that pydantic found in a document of `schema`, in one line: field, what was got, what is allowed."""
    faults = []
    for fault in error.errors(include_url=False):
        field = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            faults.append(f"field {field}: unknown; allowed here: {', '.join(_siblings(schema, fault['loc']))}")
        elif fault["type"] == "missing":
            faults.append(f"field {field}: missing; it has no default, so give it")
        elif fault["type"] == "value_error":
            place = f"field {field}: " if field else ""
            faults.append(place + str(fault["ctx"]["error"]).rstrip("."))
        else:
            allowed = fault["msg"].removeprefix("Input should be ").removeprefix("Input should have ")
            faults.append(f"field {field}: got {_shortened(fault['input'])}; allowed: {allowed}")
    return "; ".join(faults) + "."


def _siblings(schema: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    for part in location[:-1]:
        # the number of a list's entry and the name of a kind of entry are no fields
        if str(part) in schema.model_fields:
            schema = _section_of(schema.model_fields[str(part)].annotation) or schema
    return list(schema.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The schema in a field's type: the type itself, or the first one inside it, such as that of a list's entries."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_of(inner))), None)


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
