"""What a server refuses to start with: aliases and a default that could never be honoured, names that are taken."""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from starlette.datastructures import State

from vllm_steer import Direction, Steering, save_directions
from vllm_steer.engine.front.admission import ADMISSION, Admission
from vllm_steer.errors import SettingsError
from vllm_steer.server.endpoints import SERVED, SteerEndpoints
from vllm_steer.server.registry.routes import ADMIN_KEY_VARIABLE
from vllm_steer.settings import SteerSettings

SIZE = 8
KIND = {"direction": "kind", "alpha": 2.0}


class StandInEngine:
    """An ``AsyncLLM`` whose workers take every write."""

    def __init__(self, settings: SteerSettings) -> None:
        self.input_processor = SimpleNamespace(
            vllm_config=SimpleNamespace(additional_config={}), **{ADMISSION.name: (Admission(settings, SIZE),)}
        )
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(_api_process_count=1),
            model_config=SimpleNamespace(get_hidden_size=lambda: SIZE, get_total_num_hidden_layers=lambda: 4),
        )

    engine_core = None

    async def collective_rpc(self, method: str, **_: Any) -> list[Any]:
        if method == "vllm_steer_model":
            experiment = {"layers": [], "repeated": 0.0, "seconds": 0.0}
            return [{"architecture": "LlamaForCausalLM", "proof": "parity", "experiment": experiment}]
        return [None]

    async def is_sleeping(self) -> bool:
        return False


def start(folder: Path, loras: tuple[str, ...] = (), **settings: Any) -> State:
    """Start a server whose engine hooks layers 1 and 2, with "kind" at 2, "both" at 1, 2 and 3, "long" at 2."""
    vector = np.eye(SIZE, dtype=np.float32)[0]
    path = folder / "directions.safetensors"
    saved = [Direction("kind", 2, vector), *(Direction("both", layer, vector) for layer in (1, 2, 3))]
    save_directions(path, [*saved, Direction("long", 2, 24 * vector)])
    parsed = SteerSettings.parse({"layers": [1, 2], "directions": [str(path)], **settings})
    state = State()
    state.openai_serving_models = SimpleNamespace(
        lora_requests=dict.fromkeys(loras), model_name=lambda: "model", is_base_model=lambda name: name == "model"
    )
    asyncio.run(SteerEndpoints().init_state(StandInEngine(parsed), state, Namespace()))
    return state


def test_aliases_and_a_default_that_can_be_honoured_are_served(tmp_path: Path) -> None:
    both = [{"direction": "both", "alpha": 1.0, "layer": layer} for layer in (1, 2)]
    state = start(tmp_path, served_aliases={"kinder": [KIND], "both": both}, default_steering=[KIND])
    assert set(getattr(state, SERVED.name).checker.settings.served_aliases) == {"kinder", "both"}


def test_a_second_server_of_a_process_has_the_directions_of_its_own_engine(tmp_path: Path) -> None:
    names = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.safetensors"
        save_directions(path, [Direction(name, 2, np.eye(SIZE, dtype=np.float32)[0])])
        state = start(tmp_path, directions=[str(path)])
        names.append([one.name for one in getattr(state, SERVED.name).checker.registry.all()])
    assert names == [["first"], ["second"]]


@pytest.mark.parametrize("where", ["alias", "default"])
@pytest.mark.parametrize(
    ("entries", "more", "told"),
    [
        ([{"direction": "nobody", "alpha": 1.0}], {}, "no direction is named 'nobody'"),
        ([{"direction": "both", "alpha": 1.0}], {}, r"layers \[1, 2\]"),
        ([{**KIND, "layer": 3}], {}, "layer 3"),
        ([{**KIND, "alpha": 11.0}], {"max_alpha": 10.0}, "11"),
        ([{**KIND, "alpha": 6.0}] * 2, {"max_alpha": 10.0}, "12"),
        ([{**KIND, "alpha": 1.0}] * 3, {"max_entries": 2}, "3 entries"),
        (
            [{"direction": "long", "alpha": 1.0}],
            {"max_alpha_residual_norm": 1.0, "residual_norms": {1: 10.0, 2: 10.0}},
            "24",
        ),
    ],
)
def test_steering_of_the_operator_that_can_never_be_honoured_is_refused(
    tmp_path: Path, where: str, entries: list[dict[str, Any]], more: dict[str, Any], told: str
) -> None:
    own = {"served_aliases": {"kinder": entries}} if where == "alias" else {"default_steering": entries}
    with pytest.raises(SettingsError, match=told) as caught:
        start(tmp_path, **own, **more)
    assert ("alias 'kinder'" if where == "alias" else "default_steering") in str(caught.value)


def test_an_alias_without_entries_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="alias 'kinder' has no entries"):
        start(tmp_path, served_aliases={"kinder": []})


def test_a_direction_that_clients_may_still_register_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(ADMIN_KEY_VARIABLE, "secret")
    logging.getLogger("vllm.vllm_steer").addHandler(caplog.handler)
    try:
        start(tmp_path, served_aliases={"later": [{"direction": "to-come", "alpha": 1.0}]})
    finally:
        logging.getLogger("vllm.vllm_steer").removeHandler(caplog.handler)
    assert "alias 'later'" in caplog.text
    with pytest.raises(SettingsError, match=r"layers \[1, 2\]"):  # no registration can repair this one
        start(tmp_path, served_aliases={"both": [{"direction": "both", "alpha": 1.0}]})


@pytest.mark.parametrize(("name", "what"), [("model", "the model itself"), ("tuned", "a LoRA module")])
def test_an_alias_cannot_have_a_name_that_is_taken(tmp_path: Path, name: str, what: str) -> None:
    with pytest.raises(SettingsError, match=what):
        start(tmp_path, loras=("tuned",), served_aliases={name: [KIND]})


def test_entries_are_those_of_the_wire() -> None:
    # The refusals above are about entries of this form.
    assert SteerSettings.parse({"layers": [2], "default_steering": [KIND]}).default_steering == (Steering("kind", 2.0),)
