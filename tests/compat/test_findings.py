"""Changes in a release are found: each verdict is given on a small tree that deserves it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compat.check import report
from tests.compat.findings import Finding, findings
from tests.compat.vllm_source import VllmSource
from vllm_steer.engine.vllm_api import VllmName

RUNNER = """
from .base import Base

class Runner(Base):
    size: int = 1

    def __init__(self, config):
        self.config = config

    def step(self, batch, counts, extra=None):
        return self.forward(batch)

    async def ask(self, method, timeout=None, args=()):
        pass

    @staticmethod
    def name(request):
        request.id = f"{request.id}-x"
"""
BASE = "class Base:\n    def __init__(self):\n        self.device = None\n"


def tree(folder: Path, **modules: str) -> VllmSource:
    package = folder / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("if TYPE_CHECKING:\n    from vllm.runner import Runner\n")
    for name, text in {"runner": RUNNER, "base": BASE, **modules}.items():
        (package / f"{name}.py").write_text(text)
    return VllmSource(folder)


def judge(source: VllmSource, *names: VllmName) -> Finding:
    return next(findings(source, names=names))


@pytest.mark.parametrize(
    ("name", "takes", "contains"),
    [
        ("Runner", None, None),
        ("Runner.size", None, None),
        ("Runner.config", None, None),
        ("Runner.device", None, None),  # of the base class
        ("Runner.step", "self, batch, counts, ...", None),
        ("Runner.step", "self, batch, ..., counts=", None),
        ("Runner.ask", "async self, method, ..., args=", None),
        ("Runner.name", "static request", "f'{request.id}-x'"),
        ("name_of.id", None, None),
    ],
)
def test_what_is_there_is_ok(tmp_path: Path, name: str, takes: str | None, contains: str | None) -> None:
    source = tree(tmp_path, other="def name_of(request):\n    request.id = 1\n")
    module = "vllm.other" if name.startswith("name_of") else "vllm.runner"
    assert judge(source, VllmName(module, name, takes, contains)).verdict == "ok"


def test_a_name_is_followed_through_imports(tmp_path: Path) -> None:
    source = tree(tmp_path, star="from vllm.base import *\n", chain="from vllm.star import Base as Other\n")
    assert judge(source, VllmName("vllm", "Runner.size")).verdict == "ok"
    assert judge(source, VllmName("vllm.chain", "Other.device")).verdict == "ok"


@pytest.mark.parametrize(
    ("name", "takes", "contains", "verdict"),
    [
        ("Walker", None, None, "gone"),
        ("Runner.colour", None, None, "gone"),
        ("Runner.step", "self, batch, sizes, ...", None, "signature changed"),  # renamed
        ("Runner.step", "self, counts, ...", None, "signature changed"),  # another order
        ("Runner.step", "self, batch, counts", None, "signature changed"),  # one more
        ("Runner.step", "self, batch, ...", None, "signature changed"),  # one more has to be given
        ("Runner.step", "self, batch, counts, ..., rows=", None, "signature changed"),  # no such keyword
        ("Runner.step", "self, batch, counts, *, ...", None, "signature changed"),  # a third by position
        ("Runner.ask", "self, method, ...", None, "signature changed"),  # asynchronous now
        ("Runner.name", "request", None, "signature changed"),  # a static method now
        ("Runner.size", "self", None, "signature changed"),  # no function
        ("Runner.name", "static request", "f'{request.id}-y'", "body changed"),
    ],
)
def test_what_has_changed_is_found(
    tmp_path: Path, name: str, takes: str | None, contains: str | None, verdict: str
) -> None:
    found = judge(tree(tmp_path), VllmName("vllm.runner", name, takes, contains, needed_by="runner_v1.py"))
    assert found.verdict == verdict
    assert found.is_fatal
    assert "runner_v1.py" in str(found)


def test_a_way_around_a_patch_is_found(tmp_path: Path) -> None:
    step = VllmName("vllm.runner", "Runner.step", "self, batch, counts, ...", is_patched=True)
    hasher = VllmName("vllm.base", "hasher", "block", is_patched=True)
    faster = "from vllm.runner import Runner\nclass Faster(Runner):\n    def step(self, batch, counts):\n        {}\n"
    base = f"{BASE}def hasher(block):\n    pass\n"

    around = tree(tmp_path / "around", base=base, user="from vllm.base import hasher\n", fast=faster.format("pass"))
    found = judge(around, step)
    assert (found.verdict, "vllm.fast:Faster" in found.says) == ("way around", True)
    found = judge(around, hasher)
    assert (found.verdict, "vllm.user" in found.says) == ("way around", True)
    # A name on the list, or an override that calls the original, is no way around.
    listed = VllmName("vllm.fast", "Faster.step", is_patched=True)
    assert judge(around, step, listed).verdict == "ok"
    assert judge(around, hasher, VllmName("vllm.user", "hasher", is_patched=True)).verdict == "ok"
    through = tree(tmp_path / "through", fast=faster.format("super().step(batch, counts)"))
    assert judge(through, step).verdict == "ok"
    # Another class of the same name is not the patched one.
    namesake = faster.replace("from vllm.runner import Runner", "class Runner:\n    pass")
    assert judge(tree(tmp_path / "namesake", fast=namesake.format("pass")), step).verdict == "ok"


def test_a_function_that_reads_differently_is_pointed_out(tmp_path: Path) -> None:
    step = VllmName("vllm.runner", "Runner.step")
    baseline = tree(tmp_path / "old")
    for text, differs in (
        (RUNNER.replace("self.forward(batch)", "self.forward(batch, 2)"), True),
        (RUNNER.replace("        return self", '        """Says more."""\n        return self'), False),
    ):
        (found,) = findings(tree(tmp_path / str(differs), runner=text), baseline, [step])
        assert (found.verdict, found.reads_differently) == ("ok", differs)


def test_a_release_without_our_names_fails_the_check(
    tmp_path: Path, source: VllmSource, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = tmp_path / "vllm" / "model_executor" / "models" / "registry.py"
    other = tree(tmp_path)
    registry.parent.mkdir(parents=True)
    registry.write_text("MODELS = {'LlamaForCausalLM': ('llama', 'LlamaForCausalLM')}\n")
    assert report(other, baseline=source) == 1
    said = capsys.readouterr().out
    assert "gone: vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs" in said
    assert "layer refused: vllm.model_executor.models.llama.LlamaDecoderLayer" in said
