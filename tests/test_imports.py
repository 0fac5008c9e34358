"""Which package may import which: the data types need no engine, and only two packages know vLLM."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = PROJECT / "vllm_steer"

# An import of one of these fails; the last line shows that the blocker works.
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
{code}
for name in {blocked!r}:
    assert name not in sys.modules, name
    try:
        __import__(name)
    except ImportError as error:
        assert "blocked" in str(error)
    else:
        raise AssertionError("the blocker let " + name + " through")
"""
ENGINE = ("vllm", "torch", "ray", "transformers")


def run_blocked(code: str, blocked: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(code=code, blocked=blocked)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_package_and_its_data_types_need_no_engine() -> None:
    run_blocked("import vllm_steer; dir(vllm_steer)", ENGINE)
    run_blocked(
        "from vllm_steer import Direction, Readout, ReadoutResult, SteerError, Steering, steer_config\n"
        "import tempfile, vllm_steer.plan.batch_plan\n"
        "one = Direction('kind', 1, [3.0, 4.0]).normalised()\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    for ending in ('.safetensors', '.gguf'):\n"
        "        vllm_steer.save_directions(folder + '/d' + ending, [one])\n"
        "        assert vllm_steer.load_directions(folder + '/d' + ending)[0].key == 'kind@1'\n"
        "steer_config([1])\n",
        ENGINE,
    )


@pytest.mark.parametrize("module", ["scoring.compute_scores", "directions.validate_directions", "report.page"])
def test_what_evaluates_a_study_needs_no_engine(module: str) -> None:
    run_blocked(f"import batch_jobs.{module}", ("vllm", "ray", "torch"))


def test_every_public_name_is_there() -> None:
    import vllm_steer

    assert set(vllm_steer._HOME) | {"__version__"} == set(vllm_steer.__all__) == set(dir(vllm_steer))
    for name in vllm_steer.__all__:
        getattr(vllm_steer, name)
    with pytest.raises(AttributeError, match="stear"):
        vllm_steer.stear  # noqa: B018


# Each package or module, and what it may import besides itself.
BELOW = {
    "errors": set(),
    "messages": set(),
    "spans": {"errors", "messages"},
    "schema": {"errors", "messages", "spans"},
    "directions": {"errors", "schema"},
    "settings": {"errors", "messages", "schema", "spans"},
    "client": {"errors", "schema", "directions"},
    "plan": {"errors", "schema"},
    "ops": {"plan"},
    "device": {"plan", "ops"},
    "engine": {"errors", "messages", "spans", "schema", "directions", "settings", "plan", "ops", "device"},
    "server": {"errors", "messages", "schema", "directions", "settings", "engine"},
    "plugin": {"engine", "server"},
}
KNOW_VLLM = {"engine", "server"}


def imports(file: Path) -> Iterator[str]:
    """Full names of a module's imports, in functions too, but not of those that only the type checker sees."""
    pending: list[ast.AST] = [ast.parse(file.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending += ast.iter_child_nodes(node)


def package(file: Path) -> str:
    """The package of ``vllm_steer``, or its module, that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = [file for file in sorted(PACKAGE.rglob("*.py")) if file.parent != PACKAGE or file.stem != "__init__"]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_package_imports_only_packages_below_it(file: Path) -> None:
    here = package(file)
    assert here in BELOW, f"{here} is new: say in BELOW what it may import"
    for name in imports(file):
        parts = name.split(".")
        assert parts[0] != "batch_jobs", f"{file} imports {name}: the plugin does not know the jobs"
        if parts[0] == "vllm_steer" and parts[1] not in ("__version__", here):
            assert parts[1] in BELOW[here], f"{file} imports {name}"


@pytest.mark.parametrize(("one", "other"), [("front", "worker"), ("worker", "front")])
def test_front_end_and_worker_do_not_import_each_other(one: str, other: str) -> None:
    """They run in different processes of a server."""
    found = [name for file in sorted((PACKAGE / "engine" / one).rglob("*.py")) for name in imports(file)]
    assert f"vllm_steer.engine.{one}" in {name.rpartition(".")[0].rpartition(".")[0] for name in found}
    assert not [name for name in found if name.startswith(f"vllm_steer.engine.{other}.")]


def test_every_module_that_a_string_names_is_there() -> None:
    """No import checks the modules that are started with ``python -m``."""
    own = re.compile(r"(vllm_steer|batch_jobs|benchmarks|tests)(\.\w+)+")
    named = {
        node.value: file
        for folder in ("vllm_steer", "batch_jobs", "benchmarks", "tests", "examples")
        for file in sorted((PROJECT / folder).rglob("*.py"))
        if "clients" not in file.relative_to(PROJECT).parts
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and own.fullmatch(node.value)
    }
    assert "benchmarks.overhead.engine" in named
    del named["batch_jobs.nothing"]  # a test's example of a missing module
    gone = {name: file for name, file in named.items() if not is_there(name)}
    assert not gone, gone


def is_there(name: str) -> bool:
    """Whether a dotted name belongs to a package, a module, or something that a module defines."""
    path = PROJECT.joinpath(*name.split("."))
    if path.is_dir() or path.with_suffix(".py").exists():
        return True
    homes = (path.parent.with_suffix(".py"), path.parent / "__init__.py")
    return any(home.exists() and re.search(rf"\b{path.name}\b", home.read_text()) for home in homes)


# The packages of the jobs, lowest first: each imports only from lines above its own, and from itself.
JOBS = PROJECT / "batch_jobs"
LAYERS = (
    {"errors", "demo_model", "statistics"},
    {"files"},
    {"config"},
    {"engine", "rows", "texts"},
    {"endpoint", "run"},
    {"directions", "cost"},
    {"generate", "scoring"},
    {"capture", "harnesses", "pairs", "report"},
    {"compare", "pipeline"},
    {"print_summary", "design"},
    {"cli"},
)


@pytest.mark.parametrize(
    "file",
    [file for file in sorted(JOBS.rglob("*.py")) if file.relative_to(JOBS).parts != ("__init__.py",)],
    ids=lambda file: str(file.relative_to(JOBS)),
)
def test_a_package_of_the_jobs_imports_only_packages_below_it(file: Path) -> None:
    here = file.relative_to(JOBS).parts[0].removesuffix(".py")
    (level,) = (index for index, packages in enumerate(LAYERS) if here in packages)
    below = set().union(*LAYERS[:level])
    for name in imports(file):
        parts = name.split(".")
        if parts[0] == "batch_jobs" and parts[1] != here:
            assert parts[1] in below, f"{file} imports {name}"


def test_the_jobs_use_only_public_names_of_the_plugin() -> None:
    public = {
        "errors",
        "settings",
        "client",
    }  # submodules that the documentation names, besides the package's own names
    deep = [
        f"{file.relative_to(PROJECT)} imports {name}"
        for file in sorted(JOBS.rglob("*.py"))
        for name in imports(file)
        if name.startswith("vllm_steer.") and name.count(".") > 1 and name.split(".")[1] not in public
    ]
    assert not deep, deep


@pytest.mark.parametrize(
    "file",
    [file for package in ("vllm_steer", "batch_jobs") for file in sorted((PROJECT / package).rglob("*.py"))],
    ids=lambda file: str(file.relative_to(PROJECT)),
)
def test_only_engine_and_server_import_vllm(file: Path) -> None:
    if file.is_relative_to(PACKAGE) and package(file) in KNOW_VLLM:
        return
    assert not [name for name in imports(file) if name.partition(".")[0] == "vllm"]


def test_the_reader_of_imports_sees_them() -> None:
    """The test above could pass on a parser that sees no import at all."""
    found = {name.partition(".")[0] for file in MODULES for name in imports(file)}
    assert {"vllm", "torch", "numpy", "pydantic", "vllm_steer"} <= found


def test_nothing_imports_torch_before_the_tests_have_set_its_threads() -> None:
    import torch

    # on a busy machine two threads that wait for each other take many times as long, see tests/conftest.py
    assert torch.get_num_threads() == 1
