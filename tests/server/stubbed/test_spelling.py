"""Misspelt names of fields and headers: refused, and never taken for those of vLLM, of OpenAI or of HTTP."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_steer.errors import MisplacedField
from vllm_steer.schema.wire import STEERED_HEADER
from vllm_steer.server.inbound.header import STEERING_HEADER, steering_header
from vllm_steer.server.inbound.misplaced import FIELDS, misplaced
from vllm_steer.server.inbound.spelling import edits, is_header_like_ours, is_like_ours

MISSPELT = [
    *("sterring", "stering", "strering", "seering", "steeering", "stearing", "steerign", "steerng", "teering"),
    *("streeing", "Sterring", "STEARING", "ste_ering", "_stering", "sterings", "vllm_stering", "vllm-stearing"),
    *("redout", "readot", "raedout", "reaodut", "raedouts", "readuot", "Redout", "read_ot", "vllm_redout"),
    *("vlm_steer", "vllmsteer", "vllm_stear", "vllm_ster", "vllm_sterring"),
]
HEADERS = [
    *("X-Sterring", "X-Stearing", "X-Strering", "X-Steeering", "Xsteering", "X_Steering", "X-Stering", "Sterring"),
    *("X-Redout", "X-Readot", "Xreadout", "X_Readout", "X-VLLM-Stearing", "X-Vllm_Steering", "xsterring"),
]


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_field_is_found_wherever_it_stands(name: str) -> None:
    value = [{"direction": "kind", "alpha": 5}]
    for fields in ({name: value}, {"extra_body": {name: value}}, {"messages": [{"role": "user", name: value}]}):
        assert repr(name) in str(misplaced(fields, ("vllm_xargs",), {}))
    assert repr(name) in str(misplaced({"vllm_xargs": {name: "{}"}}, ("vllm_xargs",), {}))
    assert repr(name) in str(misplaced({}, (), {name: "[]"}))


@pytest.mark.parametrize("name", ["sterring", "stering", "seering", "redout", "raedout"])
def test_one_edit_is_found_at_any_depth(name: str) -> None:
    assert repr(name) in str(misplaced({"foo": {"bar": [{name: {"layers": [1]}}]}}, (), {}))


@pytest.mark.parametrize("name", HEADERS)
def test_a_misspelt_header_is_refused(name: str) -> None:
    with pytest.raises(MisplacedField, match="allowed: X-Steering"):
        steering_header([(name.lower().encode(), b"kind:5")])


def names_in(model: type[pydantic.BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        yield from (alias for alias in (field.alias, field.validation_alias) if isinstance(alias, str))


def vllms_fields() -> dict[str, set[str]]:
    """Module -> the fields of every body that vLLM's server and its sampling parameters know."""
    import vllm.entrypoints
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    found = {"sampling": {*SamplingParams.__struct_fields__, *vars(StructuredOutputsParams)["__annotations__"]}}
    for info in pkgutil.walk_packages(vllm.entrypoints.__path__, "vllm.entrypoints."):
        if not info.name.endswith("protocol"):
            continue
        module = importlib.import_module(info.name)
        models = [one for one in vars(module).values() if isinstance(one, type) and issubclass(one, pydantic.BaseModel)]
        found[info.name] = {name for one in models for name in names_in(one)}
    return found


def openais_fields() -> set[str]:
    import openai.types

    found = set()
    for info in pkgutil.walk_packages(openai.types.__path__, "openai.types."):
        if info.name.endswith("_param") or info.name.endswith("_params"):
            module = importlib.import_module(info.name)
            found |= {
                name for one in vars(module).values() for name in getattr(one, "__annotations__", {})
                if isinstance(one, type)
            }  # fmt: skip
    return found


def test_no_field_of_vllm_or_openai_is_taken_for_ours() -> None:
    vllms = vllms_fields()
    assert len(vllms) > 5
    fields = {*openais_fields()}.union(*vllms.values())
    assert len(fields) > 300
    assert {"temperature", "stream", "stop", "vllm_xargs", "cache_salt", "reasoning_effort"} <= fields
    assert [name for name in sorted(fields) if is_like_ours(name)] == []
    for name in fields:
        assert misplaced({name: {"a": [1]}}, (), {}) is None


@pytest.mark.parametrize(
    "name",
    [
        *("string", "strings", "streaming", "stream", "steps", "seed", "storing", "stemming", "setting", "settings"),
        *("serving", "starting", "tracing", "layout", "timeout", "readonly", "read_only", "read_count", "reader"),
        *("rollout", "dropout", "breakout", "region", "reading", "ready", "store", "steaming_url", "sampling", "x"),
        *("", "x_", "vllm", "vllm_xargs", "vllm_store", "trading", "training", "spelling", "sorting", "stages"),
    ],
)
def test_other_words_are_left_alone(name: str) -> None:
    assert not is_like_ours(name)
    assert not is_header_like_ours(name)


HTTP = """
accept accept-charset accept-encoding accept-language accept-ranges access-control-request-headers
access-control-request-method age alt-svc alt-used authorization baggage cache-control cdn-loop cf-connecting-ip
cf-ray connection content-disposition content-encoding content-language content-length content-location
content-range content-security-policy content-type cookie date dnt early-data etag expect expires forwarded from
host http2-settings idempotency-key if-match if-modified-since if-none-match if-range if-unmodified-since keep-alive
last-modified link location max-forwards origin pragma prefer priority proxy-authorization purpose range referer
referrer-policy retry-after sec-ch-ua sec-ch-ua-mobile sec-ch-ua-platform sec-fetch-dest sec-fetch-mode
sec-fetch-site sec-fetch-user sec-gpc sec-websocket-key server server-timing signature strict-transport-security te
traceparent tracestate trailer transfer-encoding upgrade upgrade-insecure-requests user-agent vary via want-digest
warning x-admin-key x-amz-date x-amzn-trace-id x-api-key x-b3-sampled x-b3-traceid x-client-ip x-cloud-trace-context
x-correlation-id x-csrf-token x-data-parallel-rank x-datadog-trace-id x-envoy-original-path x-forwarded-for
x-forwarded-host x-forwarded-port x-forwarded-prefix x-forwarded-proto x-forwarded-server x-goog-api-client
x-http-method-override x-kv-transfer x-ms-client-request-id x-openai-client x-ratelimit-limit-requests x-real-ip
x-request-id x-request-start x-requested-with x-session-id x-stainless-arch x-stainless-async x-stainless-lang
x-stainless-os x-stainless-package-version x-stainless-read-timeout x-stainless-retry-count x-stainless-runtime
x-stainless-runtime-version x-stainless-timeout anthropic-version anthropic-beta openai-organization openai-project
"""


def test_no_usual_header_is_taken_for_ours() -> None:
    names = HTTP.split()
    assert len(names) > 120
    assert [name for name in names if is_header_like_ours(name)] == []
    assert steering_header([(name.encode(), b"kind:5") for name in [*names, STEERED_HEADER]]) is None


def test_the_right_names_are_no_misspellings() -> None:
    assert misplaced({name: [] for name in FIELDS}, (), {}) is None
    assert steering_header([(STEERING_HEADER.encode(), b"kind:5")]) == {
        "steering": [{"direction": "kind", "alpha": 5.0, "layer": None, "op": "add", "span": "all"}]
    }


def slow_edits(one: str, other: str) -> int:
    """The same distance by its definition: the cheapest of the last steps."""
    if not one or not other:
        return len(one) + len(other)
    ways = [
        slow_edits(one[:-1], other) + 1,
        slow_edits(one, other[:-1]) + 1,
        slow_edits(one[:-1], other[:-1]) + (one[-1] != other[-1]),
    ]
    if one[-2:] == other[-2:][::-1] and len(one) > 1 and len(other) > 1:
        ways.append(slow_edits(one[:-2], other[:-2]) + 1)
    return min(ways)


@given(st.text("ste", max_size=5), st.text("ste", max_size=5), st.integers(0, 5))
def test_edits_are_counted_by_their_definition(one: str, other: str, most: int) -> None:
    right, found = slow_edits(one, other), edits(one, other, most)
    assert found == right or (right > most and found > most)


@given(st.dictionaries(st.text(max_size=12), st.none() | st.lists(st.integers(), max_size=1), max_size=5))
def test_no_name_crashes_the_search(fields: dict[str, Any]) -> None:
    misplaced(fields, (), {})
    for name in fields:
        is_header_like_ours(name)
