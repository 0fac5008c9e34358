"""Every change of vLLM that the plugin declares; ``python -m tests.compat.own_patches`` writes ``docs/patches.md``."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.compat.own_use import PACKAGE, engine_files
from vllm_steer.engine.patching import ATTRIBUTES, PATCHES, Attribute, Patch
from vllm_steer.engine.vllm_api import VLLM_NAMES, VllmName

PAGE = Path(__file__).resolve().parents[2] / "docs" / "patches.md"
_HEAD = """\
# Patches of vLLM

Every function of vLLM's that the plugin replaces and every attribute that it writes on vLLM's objects. A replacement
calls the original. Each does nothing but call it, unless the engine's `additional_config` holds `vllm_steer`; requests
that carry a spec or a reserved cache salt are refused in any engine. Made by `make patches` from the declarations in
`vllm_steer/engine` and `vllm_steer/server`; not to be edited.

Official extension points in use: `vllm.general_plugins`, `vllm.endpoint_plugins`, `additional_config`,
`SamplingParams.extra_args`, `cache_salt`, `skip_reading_prefix_cache`, `collective_rpc`, torch hooks.
"""


@cache
def declared() -> tuple[tuple[Patch, ...], tuple[Attribute[Any], ...]]:
    """Import every module that may declare one, and return all patches and attributes."""
    for file in engine_files():
        name = file.relative_to(PACKAGE.parent).with_suffix("")
        import_module(".".join(name.parts).removesuffix(".__init__"))
    # Sorted, so that the order of imports does not matter.
    patches = sorted(PATCHES, key=lambda one: (one.when, one.wrap.__module__, one.places))
    return tuple(patches), tuple(sorted(ATTRIBUTES, key=lambda one: (one.owner, one.name)))


@cache
def vllm_names() -> tuple[VllmName, ...]:
    """Every vLLM name that the plugin relies on: those that ``vllm_api.py`` lists and those that it patches."""
    patched = (
        VllmName(module, name, one.takes, one.contains, is_patched=one.takes is not None, needed_by=_file(one))
        for one in declared()[0]
        for module, name in one.places
        if not one.name.startswith("vllm_steer")
    )
    return (*VLLM_NAMES, *patched)


def _file(one: Patch) -> str:
    module = sys.modules[one.wrap.__module__]
    assert module.__file__ is not None
    return str(Path(module.__file__).relative_to(PACKAGE))


def page() -> str:
    """The text of ``docs/patches.md``."""
    patches, attributes = declared()
    lines = [_HEAD, "## Functions\n"]
    for when, ones in groupby(patches, lambda one: one.when):
        lines.append(f"### In {when}\n")
        for one in ones:
            names = ", ".join(f"`{module}:{name}`" for module, name in one.places)
            lines.append(f"- {names} (`{_file(one)}`)  \n  Why: {one.why}  \n  Gone when {one.gone_when}")
        lines.append("")
    lines += ["## Attributes\n", "| on | attribute | why | gone when |", "|---|---|---|---|"]
    lines += [f"| {one.owner} | `{one.name}` | {one.why} | {one.gone_when} |" for one in attributes]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
