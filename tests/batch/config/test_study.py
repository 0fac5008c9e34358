from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from batch_jobs.config.study import Study, StudyError, load_study
from batch_jobs.pipeline import _run_key as run_key
from batch_jobs.pipeline import chosen_scenarios
from batch_jobs.texts.contrastive import load_split
from vllm_steer.errors import SteerError

DEMO = Path(__file__).resolve().parents[3] / "configs" / "studies" / "demo.yaml"


def write_config(folder: Path, **changes: Any) -> Path:
    document = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    for dotted, value in changes.items():
        *sections, field = dotted.split("__")
        section = document
        for name in sections:
            section = section.setdefault(name, {})
        section[field] = value
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def test_the_demo_config_says_what_it_reads_and_steers() -> None:
    study = load_study(DEMO)
    assert study.extract.layers == (8, 12, 16, 20, 24)
    assert set(study.steer.layers) <= set(study.extract.layers)
    assert study.steer.alpha_unit == "residual_norm"
    assert study.hooked_layers(30) == (8, 12, 16, 20, 24)
    assert study.steer.controls is not None
    grid = study.steer
    assert len(grid.layers) * len(grid.scenarios) * len(grid.alphas) * grid.samples >= 75


def test_the_papers_pairing_hooks_the_layer_below_as_well(tmp_path: Path) -> None:
    study = load_study(write_config(tmp_path, extract__extract_offset=-1))
    assert study.extract.readout_layer(16) == 15
    assert study.hooked_layers(30) == (7, 8, 11, 12, 15, 16, 19, 20, 23, 24)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steer__alpha_unit": "norms"}, ["steer.alpha_unit", "'norms'", "'raw', 'residual_norm' or 'separation'"]),
        ({"steer__alphas": [1.0, 2.0]}, ["steer", "lack 0"]),
        ({"steer__alphas": [0.0, float("nan")]}, ["steer.alphas.1", "nan", "finite"]),
        ({"steer__alphas": [0, 1, 1]}, ["steer.alphas", "[1.0]", "once"]),
        ({"steer__layers": [9]}, ["steer.layers [9]", "extract.layers are [8, 12, 16, 20, 24]"]),
        ({"steer__op": "ablate"}, ["ablate", "[0, 1]"]),
        ({"extract__layers": [-1]}, ["extract.layers.0", "got -1", "greater than or equal to 0"]),
        ({"extract__layers": [0, 16], "extract__extract_offset": -1}, ["layer 0", "embeddings"]),
        ({"extract__max_tokens": 4096}, ["extract.max_tokens is 4096", "max_model_len, 1024"]),
        ({"engine__eager": True}, ["engine.eager", "unknown", "enforce_eager"]),
        ({"temperature": 0.5}, ["temperature", "unknown", "sampling"]),
        ({"prompt_format": "chatty"}, ["prompt_format", "'chatty'", "'chat' or 'raw'"]),
        ({"name": "a b/c"}, ["name", "'a b/c'"]),
        ({"chat_template_kwargs": [1]}, ["chat_template_kwargs", "got [1]", "dictionary"]),
        ({"chat_template_kwargs": {"tokenize": True}}, ["chat_template_kwargs", "['tokenize']", "set by rendering"]),
        ({"chat_template_kwargs": {"x": float("nan")}}, ["chat_template_kwargs", "nan", "what JSON can hold"]),
        (
            {"chat_template_kwargs": {"enable_thinking": False}, "prompt_format": "raw"},
            ["chat_template_kwargs is {'enable_thinking': False}", "prompt_format: chat or leave"],
        ),
        ({"model": "half \ud83d"}, ["field model", r"'half \ud83d'", "no UTF-8 form"]),
        ({"chat_template_kwargs": {"x": ["\ud83d"]}}, ["field x: entry 1", r"'\ud83d'", "no UTF-8 form"]),
    ],
)
def test_a_wrong_field_is_named_with_file_value_and_what_is_allowed(
    tmp_path: Path, changes: dict[str, Any], said: list[str]
) -> None:
    path = write_config(tmp_path, **changes)
    with pytest.raises(StudyError) as caught:
        load_study(path)
    message = str(caught.value)
    for part in [str(path), *said]:
        assert part in message
    assert "\n" not in message
    assert isinstance(caught.value, SteerError)


def test_every_wrong_field_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(StudyError) as caught:
        load_study(write_config(tmp_path, seed=-1, dtype="int8"))
    assert "seed" in str(caught.value)
    assert "dtype" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: [1", "not valid YAML"), ("- a", "got list"), ("", "got NoneType"), ("name: x", "extract: missing")],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StudyError, match=said):
        load_study(path)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"none\.yaml: cannot be read"):
        load_study(tmp_path / "none.yaml")


def test_paths_in_a_config_are_relative_to_it_and_options_are_not(tmp_path: Path) -> None:
    path = write_config(tmp_path, pairs="texts/pairs.jsonl")
    assert load_study(path).pairs == tmp_path / "texts" / "pairs.jsonl"
    assert load_study(path, overrides={"pairs": Path("mine")}).pairs == Path("mine")


def test_the_config_hash_depends_on_content_not_on_layout(tmp_path: Path) -> None:
    study = load_study(DEMO)
    assert load_study(write_config(tmp_path)).config_hash == study.config_hash
    assert Study.model_validate({**study.model_dump(), "seed": 1}).config_hash != study.config_hash


def test_a_sweep_hooks_every_block_and_a_layer_beyond_the_last_is_refused(tmp_path: Path) -> None:
    study = load_study(write_config(tmp_path, validation__all_layers=True))
    assert study.hooked_layers(30) == tuple(range(30))
    with pytest.raises(StudyError, match=r"\[24\] do not exist: demo-model has 24 decoder blocks; allowed: 0 to 23"):
        study.hooked_layers(24)


def test_directions_are_named_after_the_concept_and_their_method() -> None:
    study = load_study(DEMO)
    assert study.direction_name("mean_difference") == "empathy"
    assert study.direction_name("logistic_regression") == "empathy-logistic-regression"


def test_a_study_may_be_laid_over_another_section_by_section(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write_config(tmp_path / "below")
    base = next((tmp_path / "below").iterdir())
    upper = tmp_path / "upper.yaml"
    upper.write_text(f"base: below/{base.name}\nname: upper\nsampling: {{max_tokens: 7}}\n", encoding="utf-8")
    lower, study = load_study(base), load_study(upper)
    assert study.name == "upper"
    assert study.sampling == lower.sampling.model_copy(update={"max_tokens": 7})
    assert study.steer == lower.steer
    upper.write_text("base: upper.yaml\n", encoding="utf-8")
    with pytest.raises(StudyError, match="its own base"):
        load_study(upper)


# sha256 of identity, run key and config hash before configs could hold chat_template_kwargs
DEMO_IDENTITY, DEMO_RUN_KEY, DEMO_CONFIG_HASH = "cc2bf5dc25895504", "91aa35954d199262", "314e4363737e6522"


def test_a_config_without_later_fields_keeps_its_run_directory(tmp_path: Path) -> None:
    # as the demo was when these were written down
    alphas = [-0.4, -0.2, -0.1, 0, 0.1, 0.2, 0.4]
    then = write_config(tmp_path, dtype="bfloat16", steer__layers=[16], steer__alphas=alphas, sampling__max_tokens=200)
    document = yaml.safe_load(then.read_text(encoding="utf-8"))
    del document["steer"]["controls"], document["cost"]
    del document["engine"]["max_num_seqs"], document["engine"]["block_size"]
    then.write_text(yaml.safe_dump(document), encoding="utf-8")
    study = load_study(then)
    identity = hashlib.sha256(json.dumps(study.identity, sort_keys=True).encode()).hexdigest()[:16]
    assert (identity, study.config_hash) == (DEMO_IDENTITY, DEMO_CONFIG_HASH)
    assert run_key(study, load_split(None, study.split), chosen_scenarios(study)) == DEMO_RUN_KEY
    assert "chat_template_kwargs" not in study.model_dump(mode="json")
    assert "unproven_model" not in study.model_dump(mode="json")["engine"]
    assert "controls" not in study.model_dump(mode="json")["steer"]


def test_leave_for_an_unproven_model_reaches_the_engine_and_is_part_of_the_config(tmp_path: Path) -> None:
    study = load_study(write_config(tmp_path, engine={"unproven_model": "experiment"}))
    assert study.engine.steer_settings() == {"unproven_model": "experiment"}
    assert "unproven_model" not in study.engine.engine_args()
    assert Study.model_validate(study.model_dump(mode="json")) == study
    assert load_study(DEMO).engine.steer_settings() == {"unproven_model": "refuse"}


def test_template_variables_are_part_of_a_runs_identity(tmp_path: Path) -> None:
    study = load_study(write_config(tmp_path, chat_template_kwargs={"enable_thinking": False}))
    assert study.chat_template_kwargs == {"enable_thinking": False}
    assert study.identity == load_study(DEMO).identity | {"chat_template_kwargs": {"enable_thinking": False}}
    assert study.config_hash != DEMO_CONFIG_HASH
    assert Study.model_validate(study.model_dump(mode="json")) == study


def test_template_variables_replace_those_of_the_base_as_a_whole(tmp_path: Path) -> None:
    write_config(tmp_path, chat_template_kwargs={"enable_thinking": False, "effort": "low"})
    upper = tmp_path / "upper.yaml"
    for given in ({}, {"effort": "high"}):
        upper.write_text(f"base: study.yaml\nchat_template_kwargs: {json.dumps(given)}\n", encoding="utf-8")
        assert load_study(upper).chat_template_kwargs == given


@pytest.mark.parametrize("field", ["model", "pairs"])
def test_an_option_without_a_utf8_form_is_refused(field: str) -> None:
    option = "caf\udce9" if field == "model" else Path("caf\udce9")
    with pytest.raises(StudyError, match=rf"field {field}: got 'caf\\udce9', which has no UTF-8 form"):
        load_study(DEMO, overrides={field: option})


def test_what_only_says_how_the_work_is_done_is_no_part_of_a_runs_identity(tmp_path: Path) -> None:
    study = load_study(DEMO)
    moved = study.model_copy(update={"rows_per_part": 7, "pairs": tmp_path, "max_attempts": 1})
    assert moved.identity == study.identity
    assert study.model_copy(update={"seed": 1}).identity != study.identity
