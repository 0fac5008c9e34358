"""The dashboard asks for series and labels that a real server has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import ALIAS

pytestmark = [pytest.mark.slow, pytest.mark.server]

DASHBOARD = Path(__file__).resolve().parents[2] / "configs" / "monitoring" / "grafana-dashboard.json"
SERIES = re.compile(r"(vllm[:_]\w+)\{")
BY = re.compile(r"by \((\w+)\)")


def test_each_panel_asks_for_a_series_of_the_server_with_its_labels(server: httpx.Client) -> None:
    body = {"model": ALIAS, "prompt": "Once", "max_tokens": 2, "ignore_eos": True}
    flag = {"direction": "kind", "above": -1e9}
    read = {"readout": {"flag": [flag]}}
    assert server.post("/v1/completions", json={**body, **read}).status_code == 200
    assert server.post("/v1/completions", json={**body, "readout": {"stop": flag}}).status_code == 200
    assert server.post("/v1/completions", json={**body, "steering": {}}).status_code == 400
    text = server.get("/metrics").text
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = set()
    for panel in panels:
        for target in panel["targets"]:
            for name in SERIES.findall(target["expr"]):
                asked.add(name)
                samples = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
                assert samples, f"{panel['title']}: no {name}"
                for label in BY.findall(target["expr"]):
                    assert f'{label}="' in samples[0], f"{panel['title']}: {name} has no label {label}"
                    assert f"{{{{{label}}}}}" == target["legendFormat"]
    own = set(re.findall(r"^# TYPE (vllm_steer_\w+) (?:counter|gauge)", text, re.MULTILINE))
    own = {
        name if name.endswith(("_total", "_slots")) else f"{name}_total"
        for name in own
        if not name.endswith("_created")
    }
    assert own <= asked, f"no panel shows {own - asked}"
    assert len({panel["id"] for panel in panels}) == len(panels)
