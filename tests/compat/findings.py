"""Compares what `vllm_steer/engine/` relies on with one release of vLLM."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from tests.compat.own_patches import vllm_names
from tests.compat.own_use import engine_files, file_name, foreign_reads, vllm_imports
from tests.compat.vllm_source import Function, VllmSource
from vllm_steer.engine.layer_classes import LAYER_CLASSES
from vllm_steer.engine.vllm_api import VllmName

Verdict = Literal["ok", "gone", "signature changed", "body changed", "way around", "layer refused"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a release has in place of one thing that the plugin relies on.

    Attributes:
        name: `module:name`, or the class of a decoder layer.
        needed_by: the plugin's files that need it, relative to `vllm_steer/engine`.
        verdict: `ok`; `gone`; `signature changed`: the plugin's calls no longer fit it; `body changed`: it lacks an
            expression that the plugin relies on; `way around`: something reaches the original past the wrapper;
            `layer refused`: the class of decoder layer is gone, so models made of it are refused at start-up.
        says: what was found instead; empty for `ok`.
        reads_differently: the function's text differs from that of the release it was compared with.
    """

    name: str
    needed_by: tuple[str, ...]
    verdict: Verdict
    says: str = ""
    reads_differently: bool = False

    @property
    def is_fatal(self) -> bool:
        """Whether the plugin cannot support the release as it is. A lost class of decoder layer is not fatal."""
        return self.verdict not in ("ok", "layer refused")

    def __str__(self) -> str:
        if self.verdict == "ok":
            return f"ok: {self.name}" + (": its text has changed, read it" if self.reads_differently else "")
        return f"{self.verdict}: {self.name}: {self.says}; see {', '.join(self.needed_by)} in vllm_steer/engine"


def findings(
    source: VllmSource, baseline: VllmSource | None = None, names: Sequence[VllmName] | None = None
) -> Iterator[Finding]:
    """Yield one finding per name.

    Args:
        source: the release to judge.
        baseline: a release that is known to be right; the text of functions is compared with it.
        names: the names to look for; None stands for all that the plugin relies on.
    """
    names = vllm_names() if names is None else names
    for one in names:
        verdict, says = _judge(source, one, names)
        differs = baseline is not None and _differs(source, baseline, one.module, one.name)
        yield Finding(f"{one.module}:{one.name}".rstrip(":"), needed_by(one), verdict, says, differs)


def layer_findings(source: VllmSource, baseline: VllmSource | None = None) -> Iterator[Finding]:
    """Yield one finding per class of vLLM in the table of decoder layers. What it returns, the engine asks at start."""
    for row in LAYER_CLASSES.values():
        module, _, name = row.path.rpartition(".")
        if module.startswith("vllm."):
            is_gone = source.find(module, name) is None
            differs = baseline is not None and _differs(source, baseline, module, f"{name}.forward")
            verdict: Verdict = "layer refused" if is_gone else "ok"
            says = f"vLLM {source.version} has no such class" if is_gone else ""
            yield Finding(row.path, ("engine/layer_classes.py",), verdict, says, differs)


def needed_by(one: VllmName) -> tuple[str, ...]:
    """The plugin's files that take a name from vLLM; where none is seen to, those whose text contains it."""
    if one.needed_by is not None:
        return (one.needed_by,)
    last = (one.name or one.module).rpartition(".")[2]
    spelt = re.compile(rf"\b{last}\b")
    texts = {file_name(path): path.read_text() for path in engine_files() if path.stem != "vllm_api"}
    return _takers().get(last) or tuple(file for file, text in texts.items() if spelt.search(text))


@cache
def _takers() -> dict[str, tuple[str, ...]]:
    """Name -> the plugin's files that import it from vLLM or read it off a vLLM object."""
    takers: dict[str, set[str]] = {}
    for path in engine_files():
        taken = {found.name for found in vllm_imports(path)} | {read.attribute for read in foreign_reads(path)}
        for name in taken:
            takers.setdefault(name, set()).add(file_name(path))
    return {name: tuple(sorted(files)) for name, files in takers.items()}


def _judge(source: VllmSource, one: VllmName, names: Sequence[VllmName]) -> tuple[Verdict, str]:
    node = source.find(one.module, one.name)
    if node is None:
        return "gone", f"vLLM {source.version} has no such name"
    if one.takes is not None:
        if not isinstance(node, Function):
            return "signature changed", "it is no function"
        differs = _signature_differs(node, one.takes, one.is_patched)
        if differs:
            return "signature changed", differs
    if one.contains is not None and one.contains not in ast.unparse(node):
        return "body changed", f"it does not contain `{one.contains}`"
    if one.is_patched:
        around = _ways_around(source, one, names)
        if around:
            return "way around", f"{', '.join(sorted(around))} has it too and is not wrapped"
    return "ok", ""


def _signature_differs(node: Function, takes: str, is_patched: bool) -> str:
    """How a function's signature contradicts `VllmName.takes`; empty if it does not."""
    first, _, rest = takes.partition(" ")
    kind, names = (first, rest) if first in ("async", "static") else ("plain", takes)
    is_static = any(isinstance(one, ast.Name) and one.id == "staticmethod" for one in node.decorator_list)
    if (kind == "async") != isinstance(node, ast.AsyncFunctionDef) or (kind == "static") != is_static:
        return f"it is no {kind} function"
    parts = names.split(", ")
    by_position = [part for part in parts if part not in ("...", "*") and not part.endswith("=")]
    by_keyword = [part.removesuffix("=") for part in parts if part.endswith("=")]
    args = node.args
    positional = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    keyword_only = [arg.arg for arg in args.kwonlyargs]
    others = {*positional, *keyword_only} - {*by_position, *by_keyword}
    defaults = [None] * (len(positional) - len(args.defaults)) + [*args.defaults] + [*args.kw_defaults]
    required = {name for name, value in zip([*positional, *keyword_only], defaults, strict=True) if value is None}
    fits = (
        positional[: len(by_position)] == by_position
        and (args.kwarg is not None or {*by_keyword} <= {arg.arg for arg in (*args.args, *args.kwonlyargs)})
        and ("*" not in parts or len(positional) == len(by_position))
        and ("..." in parts or not (others or args.vararg or args.kwarg))
        and (is_patched or not others & required)
    )
    return "" if fits else f"it takes ({ast.unparse(args)}), we rely on ({takes})"


def _ways_around(source: VllmSource, one: VllmName, names: Sequence[VllmName]) -> set[str]:
    patched = [other for other in names if other.is_patched]
    owner, _, method = one.name.rpartition(".")
    if not owner:
        return source.holders(method) - {other.module for other in patched if other.name == method}
    wrapped = {f"{other.module}:{other.name.removesuffix(f'.{method}')}" for other in patched}
    return source.overrides(one.module, owner, method) - wrapped


def _differs(source: VllmSource, baseline: VllmSource, module: str, name: str) -> bool:
    """Whether a function's text differs between two releases, docstrings aside."""
    both = source.find(module, name), baseline.find(module, name)
    texts = {"\n".join(_code(node)) for node in both if isinstance(node, Function)}
    return len(texts) > 1


def _code(function: Function) -> list[str]:
    statements = function.body[ast.get_docstring(function) is not None :]
    return [ast.unparse(function.args), *(ast.unparse(statement) for statement in statements)]
