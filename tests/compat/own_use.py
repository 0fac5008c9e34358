"""What `vllm_steer/engine/` and `vllm_steer/server/` take from vLLM, read off their own source.

In strictly typed code a vLLM object enters a function as a parameter annotated `Any` or with a class imported from vLLM
(or with Starlette's `State`, where vLLM's server keeps its objects). So every attribute that is read off such a
parameter, or off a value obtained from one, is a name that the plugin relies on.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "vllm_steer"
KNOW_VLLM = (PACKAGE / "engine", PACKAGE / "server")
_CARRIERS = {"State"}
_LIST_METHODS = {"append"}
_PASS_ON = {"enumerate", "zip", "list", "tuple", "sorted", "reversed"}  # built-ins that hand on what they are given


@dataclass(frozen=True, order=True, slots=True)
class Import:
    """`from module import name` in `file`; `name` is empty for `import module`."""

    file: str
    module: str
    name: str


@dataclass(frozen=True, order=True, slots=True)
class Read:
    """A read or written attribute of a vLLM object, as in `scheduler_output.preempted_req_ids`."""

    file: str
    attribute: str
    line: int
    is_written: bool = False


def engine_files() -> list[Path]:
    """The modules that may import vLLM."""
    return sorted(file for package in KNOW_VLLM for file in package.rglob("*.py"))


def file_name(path: Path) -> str:
    """A module's path relative to `vllm_steer`, as in the list of foreign names."""
    return str(path.relative_to(PACKAGE))


def vllm_imports(path: Path) -> Iterator[Import]:
    """Everything that a module imports from vLLM, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield from (Import(file_name(path), node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            own = [alias.name for alias in node.names if alias.name.split(".")[0] == "vllm"]
            yield from (Import(file_name(path), module, "") for module in own)


def hidden_writes(path: Path) -> list[int]:
    """Lines that may write an attribute whose name, or whose object, this reader cannot see."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call | ast.Attribute)]
    return [
        node.lineno
        for node in calls
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"))
        or (isinstance(node, ast.Attribute) and node.attr in ("__setattr__", "__delattr__", "__dict__"))
    ]


def foreign_reads(path: Path) -> Iterator[Read]:
    """Every attribute of a vLLM object that a module reads or writes."""
    tree, file = ast.parse(path.read_text()), file_name(path)
    types = {one.name for one in vllm_imports(path)}
    yield from _reads(tree, file, types)


def reads_in(source: str) -> list[Read]:
    """The attributes that a source text reads or writes, for tests of this reader."""
    return list(_reads(ast.parse(source), "", set()))


def _reads(tree: ast.Module, file: str, types: set[str]) -> Iterator[Read]:
    untyped = {
        node.name for node in _functions(tree) if isinstance(node.returns, ast.Name) and node.returns.id == "Any"
    }
    types = types | _CARRIERS | untyped
    for cls in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
        kept = _kept(cls, types)
        for function in _functions(cls):
            yield from _Reader(file, types, kept).of(function)
    for function in _functions(tree):
        yield from _Reader(file, types, set()).of(function)
    loose = [node for node in tree.body if isinstance(node, ast.If | ast.Assign | ast.AnnAssign | ast.Expr)]
    yield from _Reader(file, types, set()).of(ast.Module(loose, []))


def _functions(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _kept(cls: ast.ClassDef, types: set[str]) -> set[str]:
    """Attributes of one of the plugin's classes that hold a vLLM object: `self.engine = engine`."""
    kept: set[str] = set()
    for function in _functions(cls):
        reader = _Reader("", types, set())
        list(reader.of(function))
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and reader.is_foreign(node.value):
                kept |= {target.attr for target in node.targets if isinstance(target, ast.Attribute)}
    return kept


class _Reader:
    """Follows the foreign objects of one function, in the order of its text.

    Args:
        file: for the results.
        types: names imported from vLLM.
        kept: attributes of `self` that are foreign.
    """

    def __init__(self, file: str, types: set[str], kept: set[str]) -> None:
        self._file = file
        self._types = types
        self._kept = kept
        self._foreign: set[str] = set(types)

    def of(self, function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Module) -> Iterator[Read]:
        """Yield the reads and writes of foreign attributes in a function."""
        for node in _in_order(function):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                args = node.args
                for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs):
                    self._enter(arg)
            elif isinstance(node, ast.Assign):
                self._assign(node.targets[0], node.value)
            elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension) and self.is_foreign(node.iter):
                self._bind(node.target)
            elif isinstance(node, ast.withitem) and node.optional_vars and self.is_foreign(node.context_expr):
                self._bind(node.optional_vars)
            elif isinstance(node, ast.Attribute) and self.is_foreign(node.value) and node.attr not in _LIST_METHODS:
                yield Read(self._file, node.attr, node.lineno, not isinstance(node.ctx, ast.Load))

    def is_foreign(self, node: ast.expr) -> bool:
        """Whether an expression's value may be a vLLM object."""
        if isinstance(node, ast.Name):
            return node.id in self._foreign
        if isinstance(node, ast.Attribute):
            is_own = isinstance(node.value, ast.Name) and node.value.id == "self" and "self" not in self._foreign
            return node.attr in self._kept if is_own else self.is_foreign(node.value)
        if isinstance(node, ast.Subscript | ast.Await):
            return self.is_foreign(node.value)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in _PASS_ON:
                return any(self.is_foreign(arg) for arg in node.args)
            return self.is_foreign(node.func)
        return isinstance(node, ast.BoolOp) and any(self.is_foreign(value) for value in node.values)

    def _enter(self, arg: ast.arg) -> None:
        names = set() if arg.annotation is None else {n.id for n in ast.walk(arg.annotation) if isinstance(n, ast.Name)}
        if names == {"Any"} or names & self._types:
            self._foreign.add(arg.arg)
        else:
            self._foreign.discard(arg.arg)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its_value in zip(target.elts, value.elts, strict=True):
                self._assign(one, its_value)
        elif self.is_foreign(value):
            self._bind(target)

    def _bind(self, target: ast.expr) -> None:
        if isinstance(target, ast.Tuple):
            for one in target.elts:
                self._bind(one)
        elif isinstance(target, ast.Name):
            self._foreign.add(target.id)


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """A tree's nodes in the order of the text, but a comprehension's loops before its element."""
    yield node
    children = list(ast.iter_child_nodes(node))
    children.sort(key=lambda child: not isinstance(child, ast.comprehension))
    for child in children:
        yield from _in_order(child)
