"""The CSV files of lm-eval's ``steered`` model: a row a feature of a sparse autoencoder.

Columns, as in lm-eval 0.4.13: ``loader``, ``action``, ``sparse_model``, ``hookpoint``, ``feature_index``,
``steering_coefficient``, ``head_index``, ``sae_id`` and ``description``. A row names a released autoencoder, which
only its own package can fetch. What is read here is an autoencoder of sae-lens in a local folder, named by
``sparse_model``, or by ``sparse_model`` and ``sae_id`` within it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from vllm_steer.directions.quoting import MOST_QUOTED, one_line
from vllm_steer.directions.sae_lens_folder import FILES, decoder_rows, sae_layer
from vllm_steer.directions.said import Said, stored
from vllm_steer.directions.torch_file import HOOK_POINT
from vllm_steer.directions.unchecked import Stored
from vllm_steer.errors import BadDirectionFile

_MOST_BYTES, _MOST_ROWS = 1 << 20, 1000
_REQUIRED = ("loader", "sparse_model", "feature_index", "steering_coefficient")
_SAVE = (
    "Save it once with its package, sae_lens.SAE.from_pretrained(release, sae_id).save_model(FOLDER), and name that "
    "folder in sparse_model"
)


class _Row(NamedTuple):
    """One row that can be read.

    Attributes:
        where: file and row, for messages.
        folder: of the autoencoder.
        hook_point: the module that the row names; empty if it names none.
    """

    where: str
    folder: Path
    hook_point: str
    feature: int
    coefficient: float
    description: str


def read_steered_csv(file: Path, said: Said) -> list[Stored]:
    """Read the direction of every row, without its coefficient, which is in the metadata.

    They are named ``feature-N``; with a name of the caller's ``NAME``, or ``NAME.N`` where a layer has several.
    lm-eval itself keeps the last row of a layer only.

    Raises:
        BadDirectionFile: the file is damaged, an autoencoder is not in a local folder or belongs to another site, or a
            row means something else than an addition to the output of a block.
    """
    rows = [row for row in _rows(file) if said.feature in (None, row.feature)]
    features: dict[Path, list[int]] = {}
    for row in rows:
        features.setdefault(row.folder, []).append(row.feature)
    vectors = {folder: iter(decoder_rows(folder, wanted)) for folder, wanted in features.items()}
    layers = {folder: sae_layer(folder) for folder in features}
    at = [layers[row.folder] for row in rows]
    found: dict[tuple[str, int], Stored] = {}
    for row, layer in zip(rows, at, strict=True):
        match = HOOK_POINT.fullmatch(row.hook_point)
        if row.hook_point and (match is None or int(match[1]) != layer):
            raise BadDirectionFile(
                f"{row.where} steers at {row.hook_point!r:.{MOST_QUOTED}} with an autoencoder of the output of block "
                f"{layer}; allowed: that block, such as layers.{layer}. Correct hookpoint, or leave it empty."
            )
        name = f"feature-{row.feature}"
        if said.name is not None:
            name = said.name if at.count(layer) == 1 else f"{said.name}.{row.feature}"
        if (name, layer) in found:
            raise BadDirectionFile(
                f"{row.where} has feature {row.feature} at layer {layer} once more; allowed: once. Leave one row out."
            )
        found[name, layer] = stored(
            file, name, layer, next(vectors[row.folder]), "block_output", "lm-eval",
            feature=row.feature, coefficient=row.coefficient, description=row.description or None,
        )  # fmt: skip
    return list(found.values())


def _rows(file: Path) -> list[_Row]:
    try:
        if (size := file.stat().st_size) > _MOST_BYTES:
            raise ValueError(f"{size} bytes")
        with file.open(encoding="utf-8-sig", newline="") as opened:
            written = (line for line in csv.reader(opened, strict=True) if line)
            lines = list(islice(written, _MOST_ROWS + 2))  # the header, and one more than allowed
    except (csv.Error, OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise BadDirectionFile(
            f"{file} is not a readable CSV file ({one_line(error)}); allowed: one of lm-eval's steered model, at most "
            f"{_MOST_BYTES >> 20} MiB. Copy it again."
        ) from None
    header, *lines = lines or [[]]
    if lacking := [name for name in _REQUIRED if name not in header]:
        raise BadDirectionFile(
            f"{file} lacks the columns {lacking}; allowed: those of lm-eval's steered model, {', '.join(_REQUIRED)} "
            "among them. Add them."
        )
    if len(lines) > _MOST_ROWS:
        raise BadDirectionFile(f"{file} has more than {_MOST_ROWS} rows; allowed: {_MOST_ROWS}. Write several files.")
    columns = {name: number for number, name in enumerate(header)}

    def reader(line: list[str]) -> Callable[[str], str]:
        def cell(name: str) -> str:
            number = columns.get(name, len(line))
            return line[number].strip() if number < len(line) else ""

        return cell

    return [_row(file, number, reader(line)) for number, line in enumerate(lines, start=1)]


def _row(file: Path, number: int, cell: Callable[[str], str]) -> _Row:
    where, action = f"{file}, row {number},", cell("action") or "add"
    if action != "add":
        do = (
            "Read the row as add, make a unit Direction of it, and steer with op='set'."
            if action == "clamp"
            else "Correct the action."
        )
        raise BadDirectionFile(f"{where} has the action {action!r:.{MOST_QUOTED}}; allowed: add. {do}")
    if head := cell("head_index"):
        raise BadDirectionFile(
            f"{where} has the head {head!r:.{MOST_QUOTED}}; allowed: none, since a head's output is no direction of "
            "the residual stream. Leave the row out."
        )
    if (loader := cell("loader")) != "sae_lens":
        raise BadDirectionFile(
            f"{where} has the loader {loader!r:.{MOST_QUOTED}}; allowed: sae_lens. Load it with that package, and save "
            "its row of W_dec with torch.save as lm-eval's .pt file holds it."
        )
    feature = cell("feature_index").removesuffix(".0")  # pandas writes whole numbers so beside an empty cell
    if not (feature.isascii() and feature.isdigit() and len(feature) < 10):
        raise BadDirectionFile(
            f"{where} has the feature_index {feature!r:.{MOST_QUOTED}}; allowed: a whole number. Correct it."
        )
    return _Row(
        where, _folder(file, where, cell), cell("hookpoint"), int(feature), _coefficient(where, cell),
        cell("description"),
    )  # fmt: skip


def _coefficient(where: str, cell: Callable[[str], str]) -> float:
    text = cell("steering_coefficient")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadDirectionFile(
            f"{where} has the steering_coefficient {text!r:.{MOST_QUOTED}}; allowed: a finite number. Correct it."
        )
    return number


def _folder(file: Path, where: str, cell: Callable[[str], str]) -> Path:
    name, sae_id = cell("sparse_model"), cell("sae_id")
    candidates = [file.parent / name / sae_id, file.parent / name] if name else []
    for folder in candidates:
        try:
            if all((folder / one).is_file() for one in FILES):
                return folder
        except (OSError, ValueError):  # the name is too long, or has a null character
            continue
    raise BadDirectionFile(
        f"{where} names the autoencoder {name!r:.{MOST_QUOTED}}, {sae_id!r:.{MOST_QUOTED}}, which is no folder beside "
        f"the file; allowed: a local folder of sae-lens. {_SAVE}."
    )
