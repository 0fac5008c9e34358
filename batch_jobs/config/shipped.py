"""The configs that come with the package: `configs/` of the project, and the same files inside an installed wheel."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml

from batch_jobs.config.study import STUDY_NAME, StudyError

DEMO_STUDY = Path("studies") / "demo.yaml"
_TEMPLATE = Path("studies") / "template.yaml"


def shipped_configs() -> Path:
    """The folder of the configs: `batch_jobs/configs` of an installed wheel, or `configs` of a clone."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def copy_configs(target: Path) -> list[Path]:
    """Copy all configs into a folder and return the paths of the copies, sorted.

    Raises:
        StudyError: one of the files exists already; nothing was written.
    """
    source = shipped_configs()
    names = sorted(file.relative_to(source) for file in source.rglob("*") if file.is_file())
    existing = [target / name for name in names if (target / name).exists()]
    if existing:
        raise StudyError(f"{existing[0]} is there already and would be replaced; give another folder, or move it.")
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return [target / name for name in names]


def write_study_config(name: str, folder: Path) -> Path:
    """Write `NAME.yaml`, a commented study config with every field; it runs as it is, on the demo model.

    Raises:
        StudyError: the name is not allowed, or the file exists already or cannot be written.
    """
    if not re.fullmatch(STUDY_NAME, name):
        raise StudyError(f"the study's name is {name!r}; allowed: letters, digits and . _ -, a letter or digit first.")
    path = folder / f"{name}.yaml"
    text = (shipped_configs() / _TEMPLATE).read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text.replace("name: template", yaml.safe_dump({"name": name}).rstrip(), 1))  # quotes a number
    except FileExistsError:
        raise StudyError(f"{path} is there already; give another name, or move it.") from None
    except OSError as error:
        raise StudyError(f"{path} cannot be written: {error.strerror}; run the command in a folder of yours.") from None
    return path
