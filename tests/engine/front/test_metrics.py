"""The series on /metrics: counted once per direction, and few however many directions there are."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from vllm_steer.engine.front import metrics
from vllm_steer.errors import BadAlpha
from vllm_steer.schema.readout import Readout
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.steering import Steering


@pytest.fixture(autouse=True)
def no_labels_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_directions", set())


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_a_request_counts_once_for_each_of_its_directions() -> None:
    spec = RequestSpec((Steering("m-a", 1.0), Steering("m-a", 2.0, layer=3), Steering("m-b", 1.0)), Readout([1]))
    readouts = value("vllm_steer_readouts_total")
    metrics.admitted(spec)
    metrics.tokens(metrics.directions_of(spec), 7)
    for name in ("m-a", "m-b"):
        assert value("vllm_steer_requests_total", direction=name) == 1.0
        assert value("vllm_steer_tokens_total", direction=name) == 7.0
    assert value("vllm_steer_readouts_total") == readouts + 1.0


def test_directions_beyond_the_bound_share_one_label() -> None:
    extra = 10
    other = value("vllm_steer_requests_total", direction=metrics.OTHER)
    for index in range(metrics.MAX_LABELS + extra):
        metrics.admitted(RequestSpec((Steering(f"many-{index}", 1.0),)))
    assert value("vllm_steer_requests_total", direction=metrics.OTHER) == other + extra
    assert value("vllm_steer_requests_total", direction=f"many-{metrics.MAX_LABELS - 1}") == 1.0
    assert REGISTRY.get_sample_value("vllm_steer_requests_total", {"direction": f"many-{metrics.MAX_LABELS}"}) is None


def test_refusals_count_by_their_class() -> None:
    before = value("vllm_steer_refusals_total", reason="BadAlpha")
    metrics.refused(BadAlpha("too large"))
    assert value("vllm_steer_refusals_total", reason="BadAlpha") == before + 1.0
