"""The steering prompts of a study, exactly as the model reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batch_jobs.config.study import Study
from batch_jobs.texts.contrastive import Scenario, steering_prompts
from batch_jobs.texts.prompts import Prompt, steering_prompt_ids


def study_prompts(study: Study, scenarios: Mapping[str, Scenario], tokenizer: Any) -> dict[str, tuple[Prompt, ...]]:
    """Scenario id -> its tokenised steering prompts, for each of `steer.scenarios`.

    `tokenizer`: the model's Hugging Face tokenizer.

    Raises:
        StudyError: the chat template is absent or refuses the study's variables.
    """
    return {
        scenario: tuple(
            steering_prompt_ids(tokenizer, text, study.prompt_format, study.chat_template_kwargs, model=study.model)
            for text in steering_prompts(scenarios[scenario], study.concept.question)
        )
        for scenario in study.steer.scenarios
    }


def too_long(study: Study, prompts: Mapping[str, Sequence[Prompt]]) -> list[str]:
    """What to say about each prompt that leaves no room for its completion; empty if all do."""
    return [
        f"Scenario {scenario}: a prompt of {len(prompt.token_ids)} tokens and {study.sampling.max_tokens} new ones "
        f"exceed max_model_len {study.max_model_len}; raise it or lower sampling.max_tokens."
        for scenario, several in prompts.items()
        for prompt in several
        if len(prompt.token_ids) + study.sampling.max_tokens > study.max_model_len
    ]
