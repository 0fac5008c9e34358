"""`vllm-steer serve`: the command it builds, and what it refuses before the server starts."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import LlamaConfig
from typer.testing import CliRunner

from batch_jobs.cli.main import app
from batch_jobs.cli.server_command import ServerCommand, server_command
from batch_jobs.config.server import ServerConfig, load_server_config, parse_alias, parse_layers
from tests.batch.cli.test_cli import vllm_steer
from vllm_steer import Direction, Steering, When, save_directions
from vllm_steer.engine.registry import configured_directions
from vllm_steer.errors import LayerNotHooked, SettingsError, SteerError, UnknownDirection
from vllm_steer.settings import SteerSettings

ROOT = Path(__file__).resolve().parents[3]
BLOCKS = 4


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with a config and no weights: nothing here reads any."""
    LlamaConfig(num_hidden_layers=BLOCKS, hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def directions(tmp_path: Path) -> str:
    file = tmp_path / "dirs.safetensors"
    save_directions(file, [Direction("kind", layer, np.ones(8)) for layer in (1, 3)])
    return str(file)


def command(passed_on: Sequence[str] = (), **fields: object) -> ServerCommand:
    return server_command(load_server_config(None, fields), passed_on)


def settings_of(made: ServerCommand) -> dict[str, object]:
    position = made.arguments.index("--additional-config")
    settings: dict[str, object] = json.loads(made.arguments[position + 1])["vllm_steer"]
    return settings


def test_the_command_line_becomes_vllms_own_server_with_the_plugin_on(model: str, directions: str) -> None:
    # in this process, which has loaded transformers already: a new one takes ten seconds for it
    words_given = [
        "serve",
        model,
        "--layers",
        "3,1",
        "--port",
        "80",
        "--directions",
        directions,
        "-O0",
        "--playground",
        "--alias",
        "soft=kind:2@1",
        "--alias",
        "soft=kind:-0.5@3",
        "--enforce-eager",
        "--print",
        "--admin-key",
        "very-secret",
        "--served-model-name",
        "a b",
    ]
    done = CliRunner().invoke(app, words_given)
    assert done.exit_code == 0, done.output
    assert "secret" not in done.stdout
    plugins, *words = shlex.split(done.stdout)
    assert plugins == "VLLM_PLUGINS=vllm_steer"
    assert words[1:5] == ["-m", "vllm_steer.server.vllm_serve", "serve", model]
    assert words[7:] == ["--port", "80", "-O0", "--enforce-eager", "--served-model-name", "a b"]
    settings = json.loads(words[6])["vllm_steer"]
    assert (settings["layers"], settings["directions"], settings["playground"]) == ([1, 3], [directions], True)
    assert settings["served_aliases"] == {
        "soft": [Steering("kind", 2.0, 1).to_json(), Steering("kind", -0.5, 3).to_json()]
    }


def test_without_layers_those_of_the_directions_are_hooked(model: str, directions: str) -> None:
    assert settings_of(command(model=model, directions=[directions]))["layers"] == [1, 3]


def test_a_direction_whose_layer_is_not_hooked_is_remarked_on_and_one_that_the_model_lacks_refused(
    model: str, directions: str, tmp_path: Path
) -> None:
    assert command(model=model, layers=[1], directions=[directions]).remarks == (), "it has one at a hooked layer"
    (remark,) = command(model=model, layers=[2], directions=[directions]).remarks
    assert remark.startswith("direction 'kind' belongs to layer 1, 3, and only 2 are hooked: a request that names no")
    shown = CliRunner().invoke(app, ["serve", model, "--layers", "2", "--directions", directions, "--print"])
    assert shown.exit_code == 0
    assert f"vllm-steer: {remark}\n" in shown.stderr
    assert "remark" not in shown.stdout
    save_directions(tmp_path / "far.safetensors", [Direction("far", BLOCKS, np.ones(8))])
    with pytest.raises(SettingsError, match=r"'far' belongs to layer 4: .* has 4 decoder blocks; allowed: 0 to 3"):
        command(model=model, layers=[1], directions=[str(tmp_path / "far.safetensors")])


@pytest.fixture
def on_the_hub(tmp_path: Path, directions: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of the same directions in a repository that the local cache of the Hub has."""
    import huggingface_hub.constants as constants

    repository, commit = tmp_path / "hub" / "models--someone--vectors", "a" * 40
    (repository / "snapshots" / commit).mkdir(parents=True)
    shutil.copy(directions, repository / "snapshots" / commit / "dirs.safetensors")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "hf://someone/vectors/dirs.safetensors"


def test_directions_may_lie_on_the_hub(model: str, on_the_hub: str, tmp_path: Path) -> None:
    words = ["serve", model, "--directions", on_the_hub, "--print"]
    printed = CliRunner().invoke(app, words, catch_exceptions=False).output
    settings = json.loads(shlex.split(printed)[shlex.split(printed).index("--additional-config") + 1])["vllm_steer"]
    assert (settings["layers"], settings["directions"]) == ([1, 3], [on_the_hub])

    (tmp_path / "server.yaml").write_text(yaml.safe_dump({"model": model, "directions": on_the_hub}))
    config = load_server_config(tmp_path / "server.yaml", {})
    assert settings_of(server_command(config, []))["directions"] == [on_the_hub]
    # What the engine's processes load from this setting.
    found = configured_directions(SteerSettings.parse(settings))
    assert [one.key for one in found] == ["kind@1", "kind@3"]


def test_a_yaml_gives_the_same_and_the_command_line_wins_over_it(model: str, directions: str, tmp_path: Path) -> None:
    written = {
        "model": "elsewhere",
        "layers": [1, 3],
        "directions": Path(directions).name,
        "registry_dir": "registry",
        "served_aliases": {"soft": [{"direction": "kind", "alpha": 1, "layer": 1}]},
        "max_alpha": 7,
        "vllm": {
            "port": 80,
            "enforce_eager": True,
            "enable-prefix-caching": False,
            "api-key": ["a", "b"],
            "x": {"y": 1},
        },
    }
    file = tmp_path / "server.yaml"
    file.write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    config = load_server_config(file, {"model": model, "layers": [3, 1, 2]})
    made = server_command(config, ["--port", "81"])
    settings = settings_of(made)
    assert settings["layers"] == [1, 2, 3]
    assert settings["directions"] == [directions]
    assert settings["registry_dir"] == str(tmp_path / "registry")
    assert settings["max_alpha"] == 7
    assert made.arguments[7:] == (
        "--port",
        "80",
        "--enforce-eager",
        "--no-enable-prefix-caching",
        "--api-key",
        "a",
        "b",
        "--x",
        '{"y": 1}',
        "--port",
        "81",
    )


@pytest.mark.parametrize(
    ("fields", "passed_on", "refusal", "told"),
    [
        ({"layers": [1, BLOCKS]}, [], SettingsError, r"layers \[4\] do not exist.*0 to 3"),
        ({}, [], SettingsError, "no layers to hook"),
        ({"layers": [1]}, ["--additional_config", "{}"], SettingsError, "--additional-config was given"),
        ({"layers": [1]}, ["--additional-config.x=1"], SettingsError, "--additional-config was given"),
        ({"layers": [1]}, ["--model=x"], SettingsError, "the first argument"),
        ({"layers": [1], "served_aliases": {"a": [Steering("none", 1)]}}, [], UnknownDirection, "a names 'none'"),
        ({"layers": [1], "default_steering": [Steering("none", 1.0)]}, [], UnknownDirection, "default_steering names"),
        ({"layers": [1], "playground": "perhaps"}, [], SettingsError, "playground is 'perhaps'"),
        ({"layers": [1], "colour": 1}, [], SettingsError, "colour"),
    ],
)
def test_what_could_not_serve_is_refused_before_it_starts(
    model: str, fields: dict[str, object], passed_on: list[str], refusal: type[SteerError], told: str
) -> None:
    with pytest.raises(refusal, match=told):
        command(passed_on, model=model, **fields)


def test_a_config_with_text_that_no_server_can_be_told_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text('model: "half \\uD83D"\n', encoding="utf-8")
    with pytest.raises(SettingsError, match=r"server\.yaml: field model: got 'half \\ud83d', which has no UTF-8 form"):
        load_server_config(path, {})


def test_an_alias_at_a_layer_without_a_hook_is_refused(model: str, directions: str) -> None:
    alias = {"a": [Steering("kind", 1.0, 3)]}
    with pytest.raises(SettingsError, match=r"alias 'a' steers at layer 3; hooked: \[1\]"):
        command(model=model, layers=[1], directions=[directions], served_aliases=alias)
    own_layers = {"a": [Steering("kind", 1.0)]}
    with pytest.raises(LayerNotHooked, match=r"a names layer 1 or 3; hooked: \[2\]"):
        command(model=model, layers=[2], directions=[directions], served_aliases=own_layers)
    conditional = {"a": [Steering("kind", 1.0, layer=1, when=When("absent", above=0.0))]}
    with pytest.raises(UnknownDirection, match="a names 'absent'"):
        command(model=model, layers=[1], directions=[directions], served_aliases=conditional)
    assert "kind" in json.dumps(
        settings_of(command(model=model, layers=[3], directions=[directions], served_aliases=own_layers))
    )


def test_a_registry_folder_may_hold_what_the_files_do_not(model: str, tmp_path: Path) -> None:
    made = command(model=model, layers=[1], registry_dir=str(tmp_path), served_aliases={"a": [Steering("later", 1.0)]})
    assert "later" in json.dumps(settings_of(made))


@pytest.mark.parametrize("text", ["a", "a=kind", "a=kind:x", "=kind:1", "a=:1", "a=kind:1@", "a=kind:1@x"])
def test_another_form_of_alias_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"direction:alpha|without alpha"):
        parse_alias(text)


def test_an_alias_names_its_direction_even_with_colons() -> None:
    assert parse_alias("a-b=x:y/z:-1.5@2") == ("a-b", (Steering("x:y/z", -1.5, 2),))
    assert parse_alias("a=x;op=ablate,y:1;span=response") == (
        "a",
        (Steering("x", op="ablate"), Steering("y", 1.0, span="response")),
    )


@pytest.mark.parametrize("text", ["", "8;12", "8,", "-1", "¹"])
def test_layers_are_numbers_with_commas(text: str) -> None:
    with pytest.raises(SettingsError, match="8,12"):
        parse_layers(text)


def test_a_model_must_come_first() -> None:
    refused = vllm_steer("serve", "--port", "80", "some/model")
    assert refused.returncode == 2
    assert "no model was given; name it first" in refused.stderr


def test_the_process_becomes_the_server_and_its_exit_code_is_the_servers() -> None:
    run = (
        "from batch_jobs.cli.server_command import ServerCommand; import sys; "
        'told = \'import os, sys; print(os.environ["A"], os.environ["S"]); sys.exit(7)\'; '
        "ServerCommand((sys.executable, '-c', told), {'A': '1'}, {'S': '2'}).run()"
    )
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (7, "1 2\n"), done.stderr


def test_a_machine_without_vllm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"vllm-steer\[cpu\]"):
        ServerCommand(("true",), {}, {}).run()


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "servers").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_bundled_configs_hold(file: Path) -> None:
    config = load_server_config(file, {})
    assert isinstance(config, ServerConfig)
    assert config.additional_config(config.layers)
    assert Path(config.directions[0]).parent.parent == ROOT / "runs"
