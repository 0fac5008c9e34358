from __future__ import annotations

import pytest

from batch_jobs.texts.thought import SplitThought, ends_in_thought, split_thought


@pytest.mark.parametrize(
    ("text", "opened", "split"),
    [
        (" I stay.\n", False, SplitThought(None, " I stay.\n", False)),
        ("", False, SplitThought(None, "", False)),
        ("<think>Hm.</think>\n\nI stay.\n", False, SplitThought("Hm.", "I stay.", False)),
        ("\n<think>\nHm.\n</think>I stay.", False, SplitThought("Hm.", "I stay.", False)),
        ("<think></think>I stay.", False, SplitThought("", "I stay.", False)),
        ("<think>Hm.</think>", False, SplitThought("Hm.", "", False)),
        # the prompt has opened the thought, known or not
        ("Hm.</think>I stay.", True, SplitThought("Hm.", "I stay.", False)),
        ("Hm.</think>I stay.", False, SplitThought("Hm.", "I stay.", False)),
        ("<think>Hm.</think>I stay.", True, SplitThought("Hm.", "I stay.", False)),
        # never closed
        ("<think>Hm, so I", False, SplitThought("Hm, so I", "", True)),
        ("Hm, so I", True, SplitThought("Hm, so I", "", True)),
        ("", True, SplitThought("", "", True)),
        ("I stay. <think>Or do", False, SplitThought("Or do", "", True)),
        ("<think>Hm.</think>I stay. <think>Or do", False, SplitThought("Hm.\n\nOr do", "", True)),
        # more than one
        ("<think>One.</think>\n<think>Two.</think>I stay.", False, SplitThought("One.\n\nTwo.", "I stay.", False)),
        ("I <think>Hm.</think>stay.", False, SplitThought("Hm.", "I stay.", False)),
        ("<think>One <think>two</think>I stay.", False, SplitThought("One\n\ntwo", "I stay.", False)),
        # a marker that is cut in two is text like any other
        ("I stay.</thi", False, SplitThought(None, "I stay.</thi", False)),
        ("<think>Hm.</thi", False, SplitThought("Hm.</thi", "", True)),
    ],
)
def test_a_text_is_split_at_its_markers(text: str, opened: bool, split: SplitThought) -> None:
    assert split_thought(text, opened=opened) == split


@pytest.mark.parametrize(
    ("end", "is_open"),
    [
        ("<|assistant|>\n", False),
        ("<|assistant|>\n<think>\n", True),
        ("<|assistant|>\n<think>\n\n</think>\n\n", False),
        ("</think><|assistant|><think>", True),
    ],
)
def test_a_prompt_that_opens_a_thought_is_told_from_one_that_closes_it(end: str, is_open: bool) -> None:
    assert ends_in_thought(end) is is_open
