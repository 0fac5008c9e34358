from __future__ import annotations

from batch_jobs.config.difference import ABSENT, config_difference


def test_only_fields_that_differ_are_named_by_their_path() -> None:
    before = {"name": "a", "steer": {"layers": [8], "alphas": [0, 1]}, "seed": 0, "old": 1}
    after = {"name": "a", "steer": {"layers": [8], "alphas": [0, 2]}, "seed": 1, "new": {"x": None}}
    changes = config_difference(before, after)
    assert [(change.field, change.before, change.after) for change in changes] == [
        ("new.x", ABSENT, None),
        ("old", 1, ABSENT),
        ("seed", 0, 1),
        ("steer.alphas", [0, 1], [0, 2]),
    ]
    assert str(changes[-1]) == "steer.alphas: [0, 1] -> [0, 2]"


def test_equal_configs_have_no_difference() -> None:
    assert config_difference({"a": {"b": [1]}}, {"a": {"b": [1]}}) == []
