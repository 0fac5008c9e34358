"""The installed vLLM has everything that `vllm_steer/engine/` relies on; where not, the failure says what and where."""

from __future__ import annotations

import inspect
from functools import reduce
from importlib import import_module

import pytest

from tests.compat.findings import Finding, findings, layer_findings
from tests.compat.overlay import PROVENANCE
from tests.compat.own_patches import vllm_names
from tests.compat.vllm_source import Function, VllmSource
from vllm_steer.engine.vllm_api import VllmName
from vllm_steer.engine.vllm_versions import SUPPORTED, minor, vllm_version


@pytest.fixture(scope="module")
def found(source: VllmSource) -> dict[VllmName, Finding]:
    return dict(zip(vllm_names(), findings(source), strict=True))


@pytest.mark.parametrize("one", vllm_names(), ids=lambda one: f"{one.module}:{one.name}")
def test_what_the_room_relies_on_is_there(found: dict[VllmName, Finding], one: VllmName) -> None:
    assert found[one].verdict == "ok", str(found[one])


def test_every_class_of_decoder_layer_is_there(source: VllmSource) -> None:
    assert not [str(one) for one in layer_findings(source) if one.verdict != "ok"]


def test_the_installed_vllm_is_one_that_the_tests_run_on(source: VllmSource) -> None:
    assert source.version == vllm_version()
    remark = SUPPORTED[minor(source.version)]
    assert remark is None or (source.root / PROVENANCE).is_file(), "only `make compat-run` runs tests beside it"


@pytest.mark.slow
def test_the_reader_sees_the_parameters_that_python_sees(source: VllmSource) -> None:
    seen = 0
    for one in vllm_names():
        node = source.find(one.module, one.name)
        if one.takes is None or not isinstance(node, Function):
            continue
        function = reduce(getattr, one.name.split("."), import_module(one.module))
        args = node.args
        named = [arg.arg for arg in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg) if arg]
        assert named == list(inspect.signature(function).parameters), one
        seen += 1
    assert seen > 30
