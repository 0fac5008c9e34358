"""The keys of KV blocks: equal exactly where every token up to the block's end was steered alike."""

from __future__ import annotations

import pickle
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from vllm.v1.core.sched.output import SchedulerOutput

from tests.support.span_reference import positions
from vllm_steer.directions import Direction
from vllm_steer.engine.front.admission import Admission, Asked
from vllm_steer.engine.front.request_intake import _admit
from vllm_steer.engine.prefix_cache import fork_key
from vllm_steer.engine.reader_blocks import STEP_BLOCKS
from vllm_steer.engine.resolved_spec import RESOLVED_KEY
from vllm_steer.plan.block_sums import StepBlocks
from vllm_steer.schema.conditions import When
from vllm_steer.schema.readout import Readout
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.steering import Steering
from vllm_steer.settings import SteerSettings

BLOCK, TOKENS = 3, 9
LAYERS = (1, 2)
VECTORS = {"kind": [1.0, 0.0], "again": [1.0, 0.0], "cold": [0.0, 1.0]}  # two names of one content


def make_admission() -> Admission:
    admission = Admission(SteerSettings(layers=LAYERS), hidden_size=2)
    admission.registry.register([Direction(name, 1, np.array(vector, np.float32)) for name, vector in VECTORS.items()])
    return admission


ADMISSION = make_admission()


def request(steering: tuple[Steering, ...], prompt_len: int, own_salt: str | None = None) -> Any:
    """A request as in vLLM's core, with the fields that admission adds."""
    made = SimpleNamespace(
        request_id="id",
        prompt_token_ids=[0] * prompt_len,
        cache_salt=own_salt,
        sampling_params=SimpleNamespace(extra_args={}, skip_reading_prefix_cache=None, max_tokens=None),
    )
    _admit(ADMISSION, Asked(RequestSpec(steering)), made)
    return made


def chain(made: Any) -> list[tuple[Any, ...]]:
    """The inputs of each block's hash, as vLLM chains it: the parent's hash, the salt in block 0, the plugin's key."""
    keys: list[tuple[Any, ...]] = []
    for start in range(0, TOKENS, BLOCK):
        parent = keys[-1] if keys else ()
        keys.append((*parent, made.cache_salt if start == 0 else None, fork_key(made, start, start + BLOCK)))
    return keys


def steering_of_token(steering: tuple[Steering, ...], prompt_len: int, position: int) -> list[Any]:
    """Brute force: the steering of one token, layer by layer, in the order of application."""
    done: list[Any] = []
    for layer in LAYERS:
        for one in steering:
            is_here = position in positions(one.span, prompt_len, TOKENS)
            if (one.layer or 1) == layer and is_here and one.coefficients != (0.0, 0.0):
                over_prompt = None if one.when is None else (prompt_len, one.when.above)  # all tokens are the same
                done.append((layer, *one.coefficients, tuple(VECTORS[one.direction]), over_prompt))
    return done


def check(first: tuple[tuple[Steering, ...], int], second: tuple[tuple[Steering, ...], int]) -> None:
    keys = zip(chain(request(*first)), chain(request(*second)), strict=True)
    for block, (ours, theirs) in enumerate(keys):
        tokens = range((block + 1) * BLOCK)
        alike = all(steering_of_token(*first, t) == steering_of_token(*second, t) for t in tokens)
        assert (ours == theirs) == alike, f"block {block} of {first} and {second}"


OVER_PROMPT = When("kind", above=0.0, over="prompt")
SMALL: list[tuple[Steering, ...]] = [
    (),
    (Steering("kind", 0.0),),
    (Steering("kind", 1.0),),
    (Steering("again", 1.0),),
    (Steering("kind", 1.0, span="prompt"),),
    (Steering("kind", 1.0, span="generated"),),
    (Steering("kind", 1.0, span="prompt"), Steering("again", 1.0, span="generated")),
    (Steering("kind", 1.0), Steering("cold", 1.0, span="generated")),
    (Steering("cold", 1.0, span="generated"), Steering("kind", 1.0)),
    (Steering("kind", 1.0, span="prompt"), Steering("cold", 1.0, span="generated")),
    (Steering("kind", 1.0, span="response"),),
    (Steering("kind", 1.0, span="prompt[-1]+generated[:2]"),),
    (Steering("kind", 1.0, span="all[1:3]"),),
    (Steering("kind", 1.0, span="prompt"), Steering("again", 1.0, span="generated[:2]")),
    (Steering("kind", 1.0, span="generated", when=OVER_PROMPT),),
    (Steering("again", 1.0, span="generated", when=When("again", above=0.0, over="prompt")),),
    (Steering("kind", 1.0, span="generated", when=When("kind", above=1.0, over="prompt")),),
    (Steering("kind", 1.0, span="generated[2:]", when=OVER_PROMPT),),
    (Steering("kind", 1.0, span="generated[1:]", when=OVER_PROMPT),),
    (Steering("kind", 1.0, layer=2, span="response", when=OVER_PROMPT),),
]


def test_every_pair_of_small_requests_shares_exactly_what_it_may() -> None:
    cases = list(product(SMALL, range(1, TOKENS + 2)))
    for first, second in product(cases, cases):
        check(first, second)


steerings = st.builds(
    Steering,
    st.sampled_from(sorted(VECTORS)),
    st.sampled_from([0.0, 1.0, 2.0]),
    layer=st.sampled_from([None, *LAYERS]),
    op=st.sampled_from(["add", "set"]),
    span=st.sampled_from(
        ["prompt", "generated", "all", "response", "prompt[-2:]", "all[1:4]", "generated[1]+prompt[0]"]
    ),
)
cases = st.tuples(st.lists(steerings, max_size=3).map(tuple), st.integers(1, TOKENS + 1))


@hypothesis_settings(max_examples=200)
@given(st.data())
def test_random_requests_share_exactly_what_they_may(data: st.DataObject) -> None:
    first = data.draw(cases)
    # Two independent requests are hardly ever alike, so the second is often the first one with something changed.
    reordered = st.tuples(st.permutations(first[0]).map(tuple), st.integers(1, TOKENS + 1))
    longer = st.tuples(st.lists(steerings, max_size=1).map(lambda more: (*first[0], *more)), st.just(first[1]))
    check(first, data.draw(cases | reordered | longer))


@pytest.mark.parametrize("steering", [(), (Steering("kind", 1.0),), (Steering("kind", 1.0, span="generated"),)])
def test_requests_of_different_own_salts_share_nothing(steering: tuple[Steering, ...]) -> None:
    for ours, theirs in zip(chain(request(steering, 4, "a")), chain(request(steering, 4, "b")), strict=True):
        assert ours != theirs
    assert chain(request(steering, 4, "a")) == chain(request(steering, 4, "a"))


def test_unsteered_requests_keep_vllm_s_own_keys() -> None:
    plain = request((), 4, "a")
    assert plain.cache_salt == "a"
    assert request((Steering("kind", 1.0, span="generated"),), 4, "a").cache_salt == "a"  # the prompt stays shared
    for params in (None, SimpleNamespace(extra_args=None), SimpleNamespace(extra_args={"other": 1})):
        assert fork_key(SimpleNamespace(sampling_params=params), 0, BLOCK) is None


def test_a_condition_over_the_prompt_forgoes_cached_tokens() -> None:
    for when in (OVER_PROMPT, When("kind", above=0.0)):
        made = request((Steering("kind", 1.0, span="generated", when=when),), 4)
        assert made.sampling_params.skip_reading_prefix_cache is (True if when is OVER_PROMPT else None)


@pytest.mark.parametrize(
    ("readout", "forgoes"),
    [
        (None, None),
        (Readout([1]), None),
        (Readout([1], pool="last"), None),
        (Readout([1], trace=["kind"]), True),
        (Readout([1], pool="max", project=["kind"]), True),
        (Readout([1], trace=["kind"], skip_first=1), None),  # it takes the first token
    ],
)
def test_only_what_needs_every_token_forgoes_cached_ones(readout: Readout | None, forgoes: bool | None) -> None:
    made = request((), 4)
    _admit(ADMISSION, Asked(RequestSpec((), readout)), made)
    assert made.sampling_params.skip_reading_prefix_cache is forgoes
    assert RESOLVED_KEY in made.sampling_params.extra_args
    assert (made.request_id in ADMISSION.asked) == (readout is not None)


def test_what_a_step_does_with_sums_reaches_workers_in_other_processes() -> None:
    output = SchedulerOutput.make_empty()
    assert STEP_BLOCKS.of(output) is None
    STEP_BLOCKS.put(output, StepBlocks({"a": (1, 2)}, {"b": ((0, 4, 7),)}))
    assert STEP_BLOCKS.of(pickle.loads(pickle.dumps(output))) == StepBlocks({"a": (1, 2)}, {"b": ((0, 4, 7),)})
