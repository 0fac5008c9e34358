"""The set-up script: done once, redone after an interruption, and never left with a torchvision that breaks models."""

from __future__ import annotations

import importlib.util
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

PROJECT = Path(__file__).resolve().parents[1]
SCRIPT = PROJECT / ".ci" / "setup_env.py"


@pytest.fixture
def setup_env(tmp_path: Path) -> ModuleType:
    """The script in a project of its own, where it may make and delete files."""
    script = tmp_path / ".ci" / "setup_env.py"
    script.parent.mkdir()
    shutil.copy(SCRIPT, script)
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    spec = importlib.util.spec_from_file_location("setup_env_under_test", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeMachine:
    """Stands in for pip, the interpreter and the network; records their calls in order."""

    def __init__(self, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = module
        self.calls: list[str] = []
        self.media: dict[str, str] = {}
        self.index_reachable = False
        self.index_builds_fit = True
        self.index_has_audio = True
        self.interrupt_install = False
        self.engine = "cpu"
        self.extension = module.VENV / "lib/python3.11/site-packages/torchvision/extension.py"
        monkeypatch.setattr(module, "pip", self.pip)
        monkeypatch.setattr(module, "make_venv", self.make_venv)
        monkeypatch.setattr(module, "succeeds", self.succeeds)
        monkeypatch.setattr(module, "index_answers", lambda url: self.index_reachable)
        monkeypatch.setattr(module, "installed_media_packages", lambda: dict(self.media))
        monkeypatch.setattr(module, "model_import_error", self.model_import_error)

    def make_venv(self) -> None:
        self.calls.append("venv")
        shutil.rmtree(self.module.VENV, ignore_errors=True)
        (self.module.VENV / "bin").mkdir(parents=True)

    def succeeds(self, *command: str) -> bool:
        return (self.module.VENV / "bin").is_dir()  # the only command here asks whether pip runs in .venv

    def model_import_error(self) -> str | None:
        defined = self.module.OPERATORS in self.extension.read_text() if self.extension.is_file() else False
        fits = self.engine == "cuda" or all(
            (version.endswith("+cpu") and self.index_builds_fit) or (name == "torchvision" and defined)
            for name, version in self.media.items()
        )
        return None if fits else "RuntimeError: operator torchvision::nms does not exist"

    def pip(self, *arguments: str) -> None:
        self.calls.append(arguments[0])
        if "--editable" in arguments:
            if self.interrupt_install:
                raise KeyboardInterrupt
            self.engine = "cuda" if "[cuda," in arguments[-1] else "cpu"
            self.media = {"torchvision": "0.28.0", "torchaudio": "2.11.0"}
            self.extension.parent.mkdir(parents=True, exist_ok=True)
            self.extension.write_text("def _has_ops(): return False\n")
        elif arguments[0] == "uninstall":
            for name in arguments[2:]:
                del self.media[name]
        else:
            wanted = dict(argument.split("==") for argument in arguments if "==" in argument)
            if "torchaudio" in wanted and not self.index_has_audio:
                raise self.module.SetupError("no matching distribution")
            self.media |= wanted


@pytest.fixture
def machine(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    return FakeMachine(setup_env, monkeypatch)


def test_without_pytorchs_index_torchvision_stays_and_the_packages_for_sound_are_removed(
    machine: FakeMachine,
) -> None:
    machine.module.set_up("cpu")
    assert machine.media == {"torchvision": "0.28.0"}
    machine.module.define_torchvision_operators()
    assert machine.extension.read_text().count(machine.module.OPERATORS) == 1
    assert machine.calls == ["venv", "install", "uninstall"]


def test_with_pytorchs_index_they_become_cpu_builds_of_the_same_version(machine: FakeMachine) -> None:
    machine.index_reachable = True
    machine.module.set_up("cpu")
    assert machine.media == {"torchvision": "0.28.0+cpu", "torchaudio": "2.11.0+cpu"}


def test_an_index_that_lacks_a_build_counts_as_none(machine: FakeMachine) -> None:
    machine.index_reachable = True
    machine.index_has_audio = False
    machine.module.set_up("cpu")
    assert machine.media == {"torchvision": "0.28.0"}


def test_cpu_builds_that_do_not_fit_this_torch_are_removed(machine: FakeMachine) -> None:
    machine.index_reachable = True
    machine.index_builds_fit = False
    machine.module.set_up("cpu")
    assert machine.media == {}


def test_the_cuda_engine_keeps_its_own_builds(machine: FakeMachine) -> None:
    machine.module.set_up("cuda")
    assert machine.calls == ["venv", "install"]


def test_a_finished_set_up_asks_nothing_of_pip(machine: FakeMachine) -> None:
    machine.module.set_up("cpu")
    machine.calls.clear()
    machine.module.set_up("cpu")
    assert machine.calls == []


def test_a_changed_dependency_is_installed_into_the_same_environment(machine: FakeMachine) -> None:
    machine.module.set_up("cpu")
    machine.calls.clear()
    with (machine.module.PROJECT / "pyproject.toml").open("a") as project:
        project.write("# another dependency\n")
    machine.module.set_up("cpu")
    assert machine.calls == ["install", "uninstall"]


def test_an_interrupted_installation_is_made_anew(machine: FakeMachine) -> None:
    machine.interrupt_install = True
    with pytest.raises(KeyboardInterrupt):
        machine.module.set_up("cpu")
    machine.interrupt_install = False
    machine.calls.clear()
    machine.module.set_up("cpu")
    assert machine.calls[:2] == ["venv", "install"]


def test_an_old_interpreter_is_refused_by_name(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.module, "OLDEST_PYTHON", (99, 0))
    with pytest.raises(machine.module.SetupError, match=r"need 99\.0 or newer"):
        machine.module.set_up("cpu")
    assert machine.calls == []


@pytest.fixture
def local_index() -> Iterator[str]:
    """A package index on the loopback that has torchvision alone."""

    class Index(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/torchvision/" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_index_is_probed_by_a_request(setup_env: ModuleType, local_index: str) -> None:
    assert setup_env.index_answers(local_index)
    assert not setup_env.index_answers(f"{local_index}/nothing-here")
    assert not setup_env.index_answers("http://127.0.0.1:1")
