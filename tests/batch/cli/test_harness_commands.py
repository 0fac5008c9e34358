"""What `vllm-steer lm-eval` hands to lm-eval."""

from __future__ import annotations

import pytest

from batch_jobs.cli.harnesses import with_model


@pytest.mark.parametrize("arguments", ["run --tasks a", "--tasks a", "run -t a", "-t a"])
def test_an_evaluation_that_names_no_model_is_this_ones(arguments: str) -> None:
    assert with_model(arguments.split()) == [*arguments.split(), "--model", "vllm-steer"]


@pytest.mark.parametrize(
    "arguments",
    ["", "ls tasks", "validate --tasks a", "--help", "run -h", "run --model hf", "-M hf", "--model=hf", "-C a.yaml"],
)
def test_anything_else_is_handed_on_as_it_is(arguments: str) -> None:
    assert with_model(arguments.split()) == arguments.split()
