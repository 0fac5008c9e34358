"""Prompts with pictures, which the model's own vision tower reads, equal Hugging Face forward hooks.

The positions of a picture are prompt tokens, like those of words: steered, read and traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import ImageOps
from PIL.Image import Image
from vllm import LLM, RequestOutput

from tests.engine.conftest import BLOCK_SIZE, OpenEngine
from tests.support.hf_reference import Entry, Reference, ReferenceRun, placeholders
from tests.support.mixed_batch import (
    LOGPROB_TOLERANCE,
    Request,
    as_directions,
    check_answers,
    mixed_batch,
    run_over,
    share_changed_by_steering,
    trace_name,
    unit_vectors,
)
from tests.support.tiny_images import FIRST_SPECIAL, WRAPPERS, picture, processed, save_tiny_wrapper
from tests.support.tiny_models import HIDDEN_SIZE, NUM_LAYERS
from vllm_steer import collect_readouts, register_directions

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MAX_TOKENS = 8
LAYERS = [0, 2, NUM_LAYERS - 1]
VECTORS = unit_vectors(LAYERS, HIDDEN_SIZE)
STEP_TOKENS = 64  # of a step of the engine: fewer than the batch has, so that pictures are cut in two
SMALL, WIDE, TALL = (56, 56), (112, 56), (56, 84)
# One that is as plain as can be; one with three-part positions, whose tower also adds to the stream between layers.
IN_THE_NORMAL_RUN = ("LlavaForConditionalGeneration", "Qwen3VLForConditionalGeneration")


@dataclass(frozen=True)
class Shown:
    """A prompt with its pictures.

    Attributes:
        text: as a user writes it.
        ids: as the model reads it, where a picture has many tokens.
        inputs: the pictures as Hugging Face's model takes them.
    """

    text: str
    pictures: Sequence[Image]
    ids: list[int]
    inputs: Mapping[str, torch.Tensor]

    @property
    def for_vllm(self) -> dict[str, Any]:
        """As vLLM takes it."""
        return {"prompt": self.text} | ({"multi_modal_data": {"image": list(self.pictures)}} if self.pictures else {})

    @property
    def seen(self) -> list[int]:
        """Positions of what the tower sees."""
        return [position for position, token in enumerate(self.ids) if token == FIRST_SPECIAL]


def _marks(name: str) -> list[pytest.MarkDecorator]:
    return [] if name in IN_THE_NORMAL_RUN else [pytest.mark.breadth]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=_marks(name)) for name in WRAPPERS])
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def checkpoint(family: str, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wrapper(family, demo_model, tmp_path_factory.mktemp("images") / "model")


@pytest.fixture(scope="module")
def show(family: str, checkpoint: Path) -> Callable[..., Shown]:
    """`show(text, *pictures)`: a prompt; "{}" in the text is the place of a picture."""

    def make(text: str, *pictures: Image) -> Shown:
        text = text.format(*[WRAPPERS[family].picture] * len(pictures))
        return Shown(text, pictures, *processed(family, checkpoint, text, pictures))

    return make


@pytest.fixture(scope="module")
def prompts(show: Callable[..., Shown]) -> list[Shown]:
    return [
        show("{} What is shown here?", picture(1, *SMALL)),
        show("Look at this picture: {} and say in one word what it is.", picture(2, *WIDE)),
        show("{}", picture(3, *TALL)),
        show("How do {} and {} differ?", picture(4, *SMALL), picture(5, *WIDE)),
        show("There is no picture here, so say what you like best about the sea."),
        show("Once upon a time there was a king who had this on his wall: {}", picture(6, *SMALL)),
    ]


@pytest.fixture(scope="module")
def requests(prompts: list[Shown]) -> list[Request]:
    """The mixed batch, and readouts that begin within a picture."""
    steering = [_entry("bold", 9.0, span="prompt")]
    within = [
        Request(
            shown.ids,
            steering,
            {"layers": LAYERS, "span": span, "skip_first": shown.seen[2], "trace": [trace_name("calm", 2)]},
            VECTORS,
        )
        for shown in prompts
        if shown.pictures
        for span in ("prompt", "all")
    ]
    return [*mixed_batch(VECTORS, [shown.ids for shown in prompts]), *within]


@pytest.fixture(scope="module")
def llm(checkpoint: Path, reference: Reference, open_engine: OpenEngine) -> Iterator[LLM]:
    arguments = {"limit_mm_per_prompt": {"image": 2, "video": 0}, "max_num_batched_tokens": STEP_TOKENS}
    with open_engine(checkpoint, layers=LAYERS, **arguments) as engine:
        register_directions(engine, as_directions(VECTORS))
        yield engine


@pytest.fixture(scope="module")
def outs(llm: LLM, prompts: list[Shown], requests: list[Request]) -> list[RequestOutput]:
    """vLLM's answers to the mixed batch."""
    by_ids = {tuple(shown.ids): shown for shown in prompts}
    return answers(llm, [by_ids[tuple(request.prompt_ids)] for request in requests], requests)


@pytest.fixture(scope="module")
def expected(
    reference: Reference, prompts: list[Shown], requests: list[Request], outs: list[RequestOutput]
) -> list[ReferenceRun]:
    for shown in prompts:
        reference.show(shown.ids, shown.inputs)
    return [confirmed(reference, request, out) for request, out in zip(requests, outs, strict=True)]


def _entry(name: str, alpha: float, span: str = "all") -> Entry:
    return {"name": name, "layer": 0, "vector": VECTORS[name, 0], "alpha": alpha, "op": "add", "span": span}


def answers(llm: LLM, prompts: Sequence[Shown], requests: Sequence[Request]) -> list[RequestOutput]:
    """vLLM's answers in one `generate` call; it has read the prompts as Hugging Face's processor does."""
    never = dict.fromkeys(placeholders(llm.llm_engine.model_config.hf_config), -100.0)
    outs: list[RequestOutput] = llm.generate(
        [shown.for_vllm for shown in prompts],
        [request.params(max_tokens=MAX_TOKENS, logit_bias=never) for request in requests],
        use_tqdm=False,
    )
    assert [out.prompt_token_ids for out in outs] == [shown.ids for shown in prompts]
    return outs


@contextmanager
def step_sizes(llm: LLM) -> Iterator[list[int]]:
    """The numbers of tokens of the steps that the engine takes meanwhile."""
    scheduler, sizes = llm.llm_engine.engine_core.engine_core.scheduler, []
    schedule = scheduler.schedule

    def recorded(*args: Any) -> Any:
        output = schedule(*args)
        sizes.append(output.total_num_scheduled_tokens)
        return output

    with mock.patch.object(scheduler, "schedule", recorded):
        yield sizes


def confirmed(reference: Reference, request: Request, out: RequestOutput) -> ReferenceRun:
    assert request.has_stop or len(tokens(out)) == MAX_TOKENS
    return run_over(reference.confirm, request, out.outputs[0])


def tokens(out: RequestOutput) -> list[int]:
    return list(out.outputs[0].token_ids)


def are_told_apart(out: RequestOutput, other: RequestOutput) -> bool:
    """Whether a comparison of one with the other's reference would fail, by far."""
    pairs = zip(logprobs(out), logprobs(other), strict=True)
    return tokens(out) != tokens(other) or any(abs(a - b) > 10 * LOGPROB_TOLERANCE for a, b in pairs)


def logprobs(out: RequestOutput) -> list[float]:
    return [one[token].logprob for one, token in zip(out.outputs[0].logprobs or (), tokens(out), strict=True)]


def assert_right(llm: LLM, reference: Reference, shown: Shown, request: Request, out: RequestOutput) -> None:
    """The output and the readout are the reference's for these pictures. These prompts have no near tie."""
    reference.show(shown.ids, shown.inputs)
    ((read,),) = collect_readouts(llm, [out])
    assert check_answers(reference, [request], [confirmed(reference, request, out)], [out], [read]) == 0


@pytest.mark.conformance("images")
def test_a_mixed_batch_with_pictures_equals_hugging_face_hooks(
    llm: LLM,
    reference: Reference,
    requests: list[Request],
    outs: list[RequestOutput],
    expected: list[ReferenceRun],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(requests) >= 24
    reads = [read for (read,) in collect_readouts(llm, outs)]
    excused = check_answers(reference, requests, expected, outs, reads)
    with capsys.disabled():
        print(f" [{len(requests)} requests, {excused} near ties excused]", end="")
    # As in test_parity.
    assert excused <= 2


def test_the_batch_is_worth_comparing_because_most_steering_changes_the_output(
    reference: Reference, requests: list[Request], expected: list[ReferenceRun]
) -> None:
    assert share_changed_by_steering(reference, requests, expected) > 0.5


def test_other_pixels_give_another_output(llm: LLM, prompts: list[Shown], show: Callable[..., Shown]) -> None:
    with_pictures = [shown for shown in prompts if shown.pictures]
    inverted = [Shown(one.text, [*map(ImageOps.invert, one.pictures)], one.ids, {}) for one in with_pictures]
    plain = [Request(shown.ids, [], None) for shown in with_pictures]
    for before, after in zip(answers(llm, with_pictures, plain), answers(llm, inverted, plain), strict=True):
        assert are_told_apart(before, after)


@pytest.mark.conformance("images")
def test_a_picture_that_two_steps_share_is_steered_and_read_in_both(
    llm: LLM, reference: Reference, show: Callable[..., Shown]
) -> None:
    shown = show("sea" + " sea" * 59 + "{} and so on", picture(7, *SMALL))
    assert shown.seen[0] < STEP_TOKENS <= shown.seen[-1]
    for skip_first in (0, shown.seen[1], shown.seen[-1]):
        assert llm.reset_prefix_cache()
        readout = {"layers": LAYERS, "span": "all", "skip_first": skip_first, "trace": [trace_name("calm", 2)]}
        request = Request(shown.ids, [_entry("bold", 15.0)], readout, VECTORS)
        with step_sizes(llm) as sizes:
            (out,) = answers(llm, [shown], [request])
        assert sizes[:2] == [STEP_TOKENS, len(shown.ids) - STEP_TOKENS]
        assert_right(llm, reference, shown, request, out)
    # Once more: the part of the picture before the span comes from the cache.
    (out,) = answers(llm, [shown], [request])
    assert (out.num_cached_tokens or 0) > shown.seen[0]
    assert_right(llm, reference, shown, request, out)


@pytest.mark.conformance("images")
def test_pictures_under_the_same_words_are_not_mixed_up_in_the_prefix_cache(
    llm: LLM, reference: Reference, show: Callable[..., Shown]
) -> None:
    one, other = (show("{}" + " sea" * BLOCK_SIZE, picture(seed, *SMALL)) for seed in (8, 9))
    assert one.ids == other.ids
    calm, bold = ([_entry(name, 15.0)] for name in ("calm", "bold"))
    first: dict[tuple[int, str], RequestOutput] = {}
    assert llm.reset_prefix_cache()
    for shown, steering in [(one, calm), (other, calm), (one, bold), (one, calm), (other, calm), (one, bold)]:
        request = Request(shown.ids, steering, None)
        (out,) = answers(llm, [shown], [request])
        assert_right(llm, reference, shown, request, out)
        before = first.setdefault((id(shown), steering[0]["name"]), out)
        assert not out.num_cached_tokens if before is out else (out.num_cached_tokens or 0) > shown.seen[-1]
    assert all(are_told_apart(*pair) for pair in combinations(first.values(), 2))
