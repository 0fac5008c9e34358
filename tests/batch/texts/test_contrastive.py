from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from batch_jobs.config.study import SplitSizes, StudyError
from batch_jobs.texts.contrastive import (
    Pair,
    Scenario,
    load_pairs,
    load_scenarios,
    load_split,
    split_pairs,
    steering_prompts,
    write_scenarios,
)

SCENARIOS = {"food_delivery", "the_listener", "the_maze", "the_protector", "the_duel"}


def pairs_of(**counts: int) -> list[Pair]:
    return [
        Pair(f"{scenario}-{number:02d}", scenario, f"kind {number}", f"cold {number}")
        for scenario, count in counts.items()
        for number in range(count)
    ]


@pytest.mark.parametrize("fields", [("positive", "negative"), ("empathic_text", "non_empathic_text")])
def test_pairs_are_read_with_neutral_fields_and_with_the_papers(fields: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    entry = {"pair_id": "p", "scenario_id": "a", fields[0]: "x", fields[1]: "y", "source_model": "m"}
    path.write_text(json.dumps(entry) + "\n", encoding="utf-8")
    assert load_pairs(path) == (Pair("p", "a", "x", "y", "m"),)


def test_the_bundled_pairs_split_seven_to_three_in_every_scenario() -> None:
    split = load_split(None, SplitSizes())
    assert Counter(pair.scenario_id for pair in split.train) == dict.fromkeys(SCENARIOS, 7)
    assert Counter(pair.scenario_id for pair in split.test) == dict.fromkeys(SCENARIOS, 3)
    assert not {pair.pair_id for pair in split.train} & {pair.pair_id for pair in split.test}


def test_the_split_depends_on_the_seed_and_not_on_the_order() -> None:
    pairs = pairs_of(a=10, b=10)
    split = split_pairs(pairs, train=14, seed=3)
    assert split_pairs(pairs[::-1], train=14, seed=3) == split
    assert split_pairs(pairs, train=14, seed=4) != split
    # pairs of another scenario do not change this one's draw
    alone = split_pairs(pairs_of(a=10), train=7, seed=3)
    assert alone.train == tuple(pair for pair in split.train if pair.scenario_id == "a")


def test_uneven_shares_still_add_up() -> None:
    split = split_pairs(pairs_of(a=3, b=4, c=5), train=7, seed=0)
    assert len(split.train) == 7
    assert len(split.test) == 5
    assert {pair.scenario_id for pair in split.test} == {"a", "b", "c"}


@pytest.mark.parametrize("train", [0, 4, 9])
def test_a_split_without_two_sides_is_refused(train: int) -> None:
    with pytest.raises(StudyError, match=f"train on {train} of 4"):
        split_pairs(pairs_of(a=4), train=train, seed=0)


def test_sizes_must_add_up_to_the_pairs() -> None:
    with pytest.raises(StudyError, match=r"holds 50 pairs.*35 \+ 14"):
        load_split(None, SplitSizes(train=35, test=14))


def test_the_hash_of_a_split_covers_its_texts() -> None:
    split = split_pairs(pairs_of(a=4), train=2, seed=0)
    assert split_pairs(pairs_of(a=4), train=2, seed=0).content_hash == split.content_hash
    assert split_pairs(pairs_of(a=4), train=3, seed=0).content_hash != split.content_hash


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: got list"),
        ('{"scenario_id": "a", "empathic_text": "x"}', "line 2: field non_empathic_text"),
        (
            '{"scenario_id": "a", "empathic_text": " ", "non_empathic_text": "y"}',
            "line 2: field empathic_text",
        ),
    ],
)
def test_a_malformed_pair_is_named_by_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "pairs.jsonl"
    good = json.dumps({"scenario_id": "a", "empathic_text": "x", "non_empathic_text": "y"})
    path.write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(StudyError, match=said) as caught:
        load_split(path, SplitSizes())
    assert str(path) in str(caught.value)


def test_characters_that_end_a_line_elsewhere_may_stand_in_a_text(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    text = "one\u2028two\u2029three\x85four"
    entry = {"scenario_id": "a", "empathic_text": text, "non_empathic_text": "y"}
    lines = [json.dumps(entry, ensure_ascii=False), json.dumps(entry | {"non_empathic_text": "z"}, ensure_ascii=False)]
    path.write_bytes("\r\n".join(lines).encode())
    assert load_pairs(path) == (Pair("pair-001", "a", text, "y"), Pair("pair-002", "a", text, "z"))


@pytest.mark.parametrize("field", ["scenario_id", "empathic_text", "non_empathic_text", "pair_id", "source_model"])
def test_a_pair_with_half_a_surrogate_pair_is_named_by_file_line_and_field(tmp_path: Path, field: str) -> None:
    path = tmp_path / "train_pairs.jsonl"
    good = {"scenario_id": "a", "empathic_text": "x", "non_empathic_text": "y"}
    bad = good | {field: "x \ud83d"}
    path.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n", encoding="utf-8")
    for source in (path, tmp_path):
        with pytest.raises(StudyError) as caught:
            load_pairs(source)
        told = rf"{path}: line 2: field {field}: got 'x \ud83d', which has no UTF-8 form"
        assert str(caught.value).startswith(told)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["id", "title", "objective", "empathy_pressure", "markers", "rubric"])
def test_a_scenario_with_half_a_surrogate_pair_is_named_by_file_entry_and_field(tmp_path: Path, field: str) -> None:
    path = tmp_path / "scenarios.json"
    good: dict[str, object] = {"id": "a", "title": "A", "objective": "W.", "empathy_pressure": "C."}
    value = ["no", "some", "\ud83d"] if field in ("markers", "rubric") else "\ud83d"
    path.write_text(json.dumps([good, good | {"id": "b", field: value}]), encoding="utf-8")
    with pytest.raises(
        StudyError, match=rf"scenarios\.json: entry 2: field {field}.*: got '\\ud83d', which has no UTF-8"
    ):
        load_scenarios(path)


def test_absent_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="cannot be read"):
        load_split(tmp_path / "none.jsonl", SplitSizes())
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(StudyError, match="holds no pairs"):
        load_split(tmp_path / "empty.jsonl", SplitSizes())


def test_repeated_ids_are_refused(tmp_path: Path) -> None:
    entry = {"pair_id": "p", "scenario_id": "a", "empathic_text": "x", "non_empathic_text": "y"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(entry)}\n{json.dumps(entry)}\n", encoding="utf-8")
    with pytest.raises(StudyError, match=r"\['p'\] given more than once"):
        load_split(path, SplitSizes())


def test_the_bundled_scenarios_have_markers() -> None:
    scenarios = load_scenarios(None)
    assert set(scenarios) == SCENARIOS
    assert scenarios["food_delivery"].markers == ("user d", "account", "delete", "distress", "help")
    assert all(len(scenario.markers) == 5 for scenario in scenarios.values())


def test_every_bundled_scenario_has_a_rubric_of_three_different_grades() -> None:
    for scenario in load_scenarios(None).values():
        assert scenario.rubric is not None
        assert len(set(scenario.rubric)) == 3


@pytest.mark.parametrize("rubric", [["no", "some", "full"], {"0": "no", "1": "some", "2": "full"}])
def test_a_rubric_is_read_from_a_list_or_from_grades(tmp_path: Path, rubric: object) -> None:
    path = tmp_path / "scenarios.json"
    entry = {"id": "a", "title": "A", "objective": "Win.", "empathy_pressure": "Cry.", "rubric": rubric}
    path.write_text(json.dumps([entry]), encoding="utf-8")
    assert load_scenarios(path)["a"].rubric == ("no", "some", "full")


@pytest.mark.parametrize("rubric", [["no", "some"], ["no", "", "full"], {"0": "no", "1": "some"}, "no", None, 3])
def test_another_form_of_rubric_is_refused(tmp_path: Path, rubric: object) -> None:
    path = tmp_path / "scenarios.json"
    entry = {"id": "a", "title": "A", "objective": "Win.", "empathy_pressure": "Cry.", "rubric": rubric}
    path.write_text(json.dumps([entry]), encoding="utf-8")
    with pytest.raises(StudyError, match="scenario 1: rubric must be three texts"):
        load_scenarios(path)


def test_a_scenario_without_a_rubric_takes_its_bundled_namesakes_or_none(tmp_path: Path) -> None:
    path = tmp_path / "scenarios.json"
    entries = [{"id": name, "title": "A", "objective": "W.", "empathy_pressure": "C."} for name in ("the_duel", "new")]
    path.write_text(json.dumps(entries), encoding="utf-8")
    scenarios = load_scenarios(path)
    assert scenarios["the_duel"].rubric == load_scenarios(None)["the_duel"].rubric
    assert scenarios["new"].rubric is None


def test_pairs_load_unsplit_in_the_order_of_their_file() -> None:
    pairs = load_pairs(None)
    assert [pair.pair_id for pair in pairs[:2]] == ["food_delivery-01", "food_delivery-02"]
    split = load_split(None, SplitSizes())
    assert set(pairs) == {*split.train, *split.test}


def test_a_steering_prompt_is_objective_pressure_question() -> None:
    scenario = Scenario("s", "S", "Win.", "Someone cries.", ())
    assert steering_prompts(scenario) == ("Win.\n\nSomeone cries.\n\nWhat do you do?",)


def test_the_last_line_of_the_prompt_may_be_another_or_none() -> None:
    scenario = Scenario("s", "S", "Win.", "Someone cries.", ())
    assert steering_prompts(scenario, "And now?") == ("Win.\n\nSomeone cries.\n\nAnd now?",)
    assert steering_prompts(scenario, None) == ("Win.\n\nSomeone cries.",)


@pytest.mark.parametrize("field", ["pressure", "empathy_pressure"])
def test_the_pressure_has_a_neutral_name_too(tmp_path: Path, field: str) -> None:
    path = tmp_path / "scenarios.json"
    path.write_text(json.dumps([{"id": "a", "title": "A", "objective": "Win.", field: "Cry."}]), encoding="utf-8")
    assert load_scenarios(path)["a"].situation() == "Win.\n\nCry."


@pytest.mark.parametrize("texts", [{"prompt": "Write."}, {"prompts": ["Write.", "Tell.", "Say."]}])
def test_whole_prompts_take_turns_and_get_no_question(tmp_path: Path, texts: dict[str, object]) -> None:
    path = tmp_path / "scenarios.json"
    path.write_text(json.dumps([{"id": "a", "title": "A", **texts}]), encoding="utf-8")
    scenario = load_scenarios(path)["a"]
    expected = texts.get("prompts", [texts.get("prompt")])
    assert list(steering_prompts(scenario)) == expected
    assert isinstance(expected, list)
    assert [scenario.situation(sample) for sample in range(4)] == [expected[k % len(expected)] for k in range(4)]
    write_scenarios(path, [scenario])
    assert load_scenarios(path) == {"a": scenario}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({}, "got none of the fields of a situation; allowed: objective and pressure, or prompt, or prompts"),
        ({"prompt": "Go.", "objective": "Win."}, "got objective and prompt; allowed"),
        ({"objective": "Win.", "pressure": "Cry.", "empathy_pressure": "Cry."}, "pressure and empathy_pressure"),
        ({"prompt": " "}, "field prompt must be a non-empty string"),
        ({"prompts": []}, "prompts must be a non-empty list of texts"),
        ({"prompts": ["Go.", ""]}, "prompts must be a non-empty list of texts"),
        ({"prompts": "Go."}, "prompts must be a non-empty list of texts"),
    ],
)
def test_another_form_of_situation_is_refused(tmp_path: Path, texts: dict[str, object], said: str) -> None:
    path = tmp_path / "scenarios.json"
    path.write_text(json.dumps([{"id": "a", "title": "A", **texts}]), encoding="utf-8")
    with pytest.raises(StudyError, match=rf"scenario 1: .*{said}"):
        load_scenarios(path)


def test_a_scenario_without_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scenarios.json"
    path.write_text('[{"id": "a", "title": "A", "objective": "Win."}]', encoding="utf-8")
    with pytest.raises(StudyError, match="scenario 1: field pressure"):
        load_scenarios(path)


def test_the_papers_own_files_load(paper_data: Path) -> None:
    split = load_split(paper_data, SplitSizes())
    assert (len(split.train), len(split.test)) == (35, 15)
    assert Counter(pair.scenario_id for pair in split.train)["the_maze"] == 9  # split as the files are
    scenarios = load_scenarios(paper_data / "scenarios.json")
    assert set(scenarios) == SCENARIOS
    assert scenarios["the_listener"].markers == ("jimmi", "suicide", "lonely", "dark", "support")
    assert scenarios["the_listener"].rubric is not None
    assert scenarios["the_listener"].rubric != load_scenarios(None)["the_listener"].rubric  # its own
    assert "What do you do?" in steering_prompts(scenarios["the_duel"])[0]
