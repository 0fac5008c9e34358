"""Every way into the engine is steered exactly or refused by name, whatever parameters change or end a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import LLM, PoolingParams, RequestOutput, SamplingParams
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

from tests.engine.conftest import BLOCK_SIZE, OpenEngine
from tests.support.hf_reference import Entry, Reference
from tests.support.mixed_batch import (
    LOGPROB_TOLERANCE,
    NEAR_TIE,
    Request,
    Vectors,
    as_directions,
    check_answers,
    check_readout,
    is_same_output,
    random_prompts,
    references,
    run,
    unit_vectors,
)
from tests.support.tiny_models import HIDDEN_SIZE, VOCAB_SIZE
from vllm_steer import (
    Readout,
    ReadoutResult,
    Steering,
    collect_readouts,
    register_directions,
    steer_config,
    steered,
)
from vllm_steer.engine.worker.tail_rows import MAX_TOKENS_BACK
from vllm_steer.errors import MalformedSpec, ReadoutUnavailable, UnsupportedFeature

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LAYERS = [0, 2]
MAX_TOKENS = 16
EOS = 2


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    return unit_vectors(LAYERS, HIDDEN_SIZE, seed=61)


@pytest.fixture(scope="module")
def llm(checkpoint: Path, open_engine: OpenEngine, vectors: Vectors) -> Iterator[LLM]:
    # With prompt embeddings enabled, the model gets the embeddings of every prompt instead of its token ids.
    compact = {"backend": "xgrammar", "disable_any_whitespace": True}  # else JSON may begin with endless spaces
    with open_engine(checkpoint, layers=LAYERS, enable_prompt_embeds=True, structured_outputs_config=compact) as engine:
        register_directions(engine, as_directions(vectors))
        yield engine


@pytest.fixture(scope="module")
def entry(vectors: Vectors) -> Callable[..., Entry]:
    def make(name: str = "calm", layer: int = 0, **fields: Any) -> Entry:
        defaults = {"vector": vectors[name, layer], "alpha": 12.0, "op": "add", "span": "all"}
        return {"name": name, "layer": layer, **(defaults | fields)}

    return make


@pytest.fixture(scope="module")
def requests(entry: Callable[..., Entry]) -> list[Request]:
    """Requests with different steering and with none, with readouts of all spans and with none."""
    prompts = random_prompts(VOCAB_SIZE, lengths=(9, 33, 70), seed=62)
    return [
        Request(prompts[0], [entry()], {"layers": LAYERS, "span": "all"}),
        Request(prompts[0], [], {"layers": LAYERS, "span": "all", "skip_first": 1}),
        Request(prompts[1], [entry("bold", 2, alpha=-9.0, span="generated")], {"layers": [2], "span": "all"}),
        Request(prompts[1], [], None),
        Request(prompts[2], [entry("bold", 0, op="set", span="prompt")], {"layers": [0], "span": "prompt"}),
        Request(prompts[2], [entry("calm", 2, op="ablate", alpha=1.0), entry("bold", 2)], None),
    ]


def check_replayed(reference: Reference, request: Request, out: RequestOutput, read: ReadoutResult | None) -> None:
    """Assert that the readout and each chosen token's log-probability, before any change to it, are the reference's."""
    truth = reference.replay(request.prompt_ids, list(out.outputs[0].token_ids), request.steering)
    assert is_same_output(out, truth, request.label)
    check_readout(read, request.readout, truth, request.label)


def generate(llm: LLM, requests: Sequence[Request], fields: Sequence[dict[str, Any]]) -> list[RequestOutput]:
    """All requests in one batch, each with parameters of its own."""
    params = [request.params(**given) for request, given in zip(requests, fields, strict=True)]
    return llm.generate([{"prompt_token_ids": request.prompt_ids} for request in requests], params, use_tqdm=False)


@pytest.mark.conformance("stop strings", family="llama")
@pytest.mark.parametrize("is_kept", [False, True])
def test_a_sample_that_ends_at_a_stop_string_is_read_up_to_its_own_end(
    llm: LLM, reference: Reference, requests: list[Request], is_kept: bool
) -> None:
    whole, _ = run(llm, requests, max_tokens=MAX_TOKENS)
    stops = [out.outputs[0].text[(middle := len(out.outputs[0].text) // 2) : middle + 4] for out in whole]
    fields = [{"max_tokens": MAX_TOKENS, "stop": [stop], "include_stop_str_in_output": is_kept} for stop in stops]
    outs = generate(llm, requests, fields)
    for request, out, (read,), before, stop in zip(
        requests, outs, collect_readouts(llm, outs), whole, stops, strict=True
    ):
        sample = out.outputs[0]
        assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
        assert 1 < len(sample.token_ids) < MAX_TOKENS
        assert list(sample.token_ids) == list(before.outputs[0].token_ids)[: len(sample.token_ids)]
        assert (stop in sample.text) == is_kept
        check_replayed(reference, request, out, read)


@pytest.mark.conformance("stop strings", family="llama")
@pytest.mark.parametrize("too_many", [1, 2, MAX_TOKENS_BACK])
def test_tokens_that_were_computed_before_a_stop_string_was_found_are_taken_back_out(
    llm: LLM, reference: Reference, requests: list[Request], too_many: int
) -> None:
    def late(count: int, **fields: Any) -> list[RequestOutput]:
        """Outputs that end `count` tokens before the engine did, as those of an engine in another process."""
        outs = generate(llm, asked, [{"max_tokens": MAX_TOKENS} | fields] * len(asked))
        for out in outs:
            out.outputs[0].token_ids = out.outputs[0].token_ids[: MAX_TOKENS - count]
        return outs

    asked = [request for request in requests if request.readout is not None]
    outs = late(too_many, stop=["a string that does not come"])
    expected = [truth.first(MAX_TOKENS - too_many) for truth in references(reference, asked, MAX_TOKENS)]
    for request, (read,), truth in zip(asked, collect_readouts(llm, outs), expected, strict=True):
        check_readout(read, request.readout, truth, request.label)
    # More tokens are too many, as are two where no stop string makes the engine keep rows. A prompt's readout needs
    # no rows.
    for outs in (late(MAX_TOKENS_BACK + 1, stop=["nor this"]), late(2)):
        with pytest.raises(ReadoutUnavailable, match="tokens too many, which can be subtracted") as caught:
            collect_readouts(llm, outs)
        assert {i for i, _ in caught.value.reasons} == {
            i for i, request in enumerate(asked) if request.readout and request.readout["span"] != "prompt"
        }


# Parameters that change or end sampling, and a check of their effect on each sample's tokens.
BENT: dict[str, tuple[dict[str, Any], Callable[[list[int]], bool]]] = {
    "one token": ({"max_tokens": 1}, lambda ids: len(ids) == 1),
    "stop token": ({"stop_token_ids": [7], "logit_bias": {7: 100.0}}, lambda ids: ids == [7]),
    "min_tokens": (
        {"min_tokens": 5, "logit_bias": {EOS: 100.0}, "ignore_eos": False},
        lambda ids: len(ids) == 6 and ids.index(EOS) == 5,
    ),
    "ignore_eos": ({"logit_bias": {EOS: 100.0}}, lambda ids: ids == [EOS] * MAX_TOKENS),
    "penalties": (
        {"repetition_penalty": 1.5, "presence_penalty": 2.0, "frequency_penalty": 2.0},
        lambda ids: len(ids) == MAX_TOKENS,
    ),
    "allowed tokens": ({"allowed_token_ids": [*range(100, 400)]}, lambda ids: all(100 <= i < 400 for i in ids)),
    "nucleus": ({"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 3}, lambda ids: len(ids) == MAX_TOKENS),
}


@pytest.mark.parametrize(("fields", "holds"), BENT.values(), ids=BENT)
def test_a_sample_that_is_bent_or_ends_early_has_the_log_probabilities_and_the_readout_of_its_tokens(
    llm: LLM,
    reference: Reference,
    requests: list[Request],
    fields: dict[str, Any],
    holds: Callable[[list[int]], bool],
) -> None:
    outs, reads = run(llm, requests, **({"max_tokens": MAX_TOKENS} | fields))
    for request, out, (read,) in zip(requests, outs, reads, strict=True):
        assert holds(list(out.outputs[0].token_ids))
        check_replayed(reference, request, out, read)


def test_words_that_are_forbidden_do_not_come_and_the_rest_stays_exact(
    llm: LLM, reference: Reference, requests: list[Request]
) -> None:
    tokenizer = llm.get_tokenizer()
    whole, _ = run(llm, requests, max_tokens=MAX_TOKENS)
    # vLLM forbids the tokens that a word encodes to, so take a word that encodes to its own token.
    texts = [[tokenizer.decode([token]) for token in out.outputs[0].token_ids] for out in whole]
    words = [next(one for one in text if len(tokenizer.encode(one)) == 1 and not one.startswith(" ")) for text in texts]
    outs = generate(llm, requests, [{"max_tokens": MAX_TOKENS, "bad_words": [word]} for word in words])
    for request, out, (read,), text, word in zip(
        requests, outs, collect_readouts(llm, outs), texts, words, strict=True
    ):
        now = [tokenizer.decode([token]) for token in out.outputs[0].token_ids]
        assert now[: text.index(word)] == text[: text.index(word)]
        assert word not in now
        check_replayed(reference, request, out, read)


@pytest.mark.conformance("log-probabilities", family="llama")
def test_log_probabilities_of_prompt_and_sample_are_those_of_the_steered_model(
    llm: LLM, reference: Reference, requests: list[Request]
) -> None:
    chosen = [request for request in requests if all(one["span"] == "all" for one in request.steering)]
    outs, reads = run(llm, chosen, max_tokens=MAX_TOKENS, logprobs=3, prompt_logprobs=2)
    expected = references(reference, chosen, MAX_TOKENS)
    assert check_answers(reference, chosen, expected, outs, [read for (read,) in reads]) == 0
    for request, out, truth in zip(chosen, outs, expected, strict=True):
        # With all tokens steered, a prompt equals a sample that was generated after its first token.
        first, *rest = request.prompt_ids
        prompt = reference.replay([first], rest, request.steering)
        assert out.prompt_logprobs is not None
        assert out.prompt_logprobs[0] is None
        for position, (token, given) in enumerate(zip(rest, out.prompt_logprobs[1:], strict=True)):
            assert given is not None
            assert given[token].logprob == pytest.approx(prompt.logprobs[position], abs=LOGPROB_TOLERANCE)
        for gaps, steps in ((truth.top2_gaps, out.outputs[0].logprobs), (prompt.top2_gaps, out.prompt_logprobs[1:])):
            for gap, given in zip(gaps, steps or [], strict=True):
                assert given is not None
                best, second = (next(one for one in given.values() if one.rank == rank) for rank in (1, 2))
                assert best.logprob - second.logprob == pytest.approx(gap, abs=LOGPROB_TOLERANCE)


@pytest.mark.conformance("structured output", family="llama")
def test_a_steered_sample_under_a_grammar_is_the_best_that_the_grammar_allows(
    llm: LLM, reference: Reference, requests: list[Request]
) -> None:
    length, letters = 4, "abc"
    words = {word: token for word, token in llm.get_tokenizer().get_vocab().items() if set(word) <= set(letters)}
    structured = StructuredOutputsParams(regex=f"[{letters}]{{{length}}}")
    # The batch has one more request, without a grammar.
    outs = generate(
        llm,
        [*requests, requests[0]],
        [*[{"structured_outputs": structured, "ignore_eos": False}] * len(requests), {"max_tokens": MAX_TOKENS}],
    )
    reads = [read for (read,) in collect_readouts(llm, outs)]
    samples = set()
    for request, out, read in zip(requests, outs[:-1], reads[:-1], strict=True):
        text, (*tokens, end) = "", out.outputs[0].token_ids
        for place, (token, given) in enumerate(zip(tokens, out.outputs[0].logprobs or [], strict=False)):
            scores = {
                possible: reference.replay(request.prompt_ids, [*tokens[:place], possible], request.steering).logprobs[
                    -1
                ]
                for word, possible in words.items()
                if 0 < len(word) <= length - len(text)
            }
            best, second = sorted(scores, key=scores.__getitem__, reverse=True)[:2]
            assert scores[best] - scores[second] > NEAR_TIE, "another seed is needed: rounding would decide"
            assert token == best, request.label
            # Tokens that the grammar forbids have probability 0, and those of the others add up to 1.
            off = given[token].logprob - (scores[best] - np.logaddexp.reduce([*scores.values()]))
            assert abs(off) < LOGPROB_TOLERANCE, request.label
            text += next(word for word, known in words.items() if known == token)
        assert (len(text), end) == (length, EOS)
        check_readout(read, request.readout, reference.replay(request.prompt_ids, [*tokens, EOS], request.steering), "")
        samples.add((tuple(request.prompt_ids), *tokens))
    assert len(samples) > len({prompt for prompt, *_ in samples}), "steering changed no sample: this would show nothing"
    free = reference.generate(requests[0].prompt_ids, MAX_TOKENS, requests[0].steering)
    assert is_same_output(outs[-1], free, "without a grammar")
    check_readout(reads[-1], requests[0].readout, free, "without a grammar")


@pytest.mark.conformance("structured output", family="llama")
@pytest.mark.parametrize(
    "asked",
    [
        {"choice": ["calm", "bold", "neither of them"]},
        {"json": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}},
    ],
    ids=["choice", "json"],
)
def test_a_sample_under_another_grammar_has_the_readout_of_its_tokens(
    llm: LLM, reference: Reference, requests: list[Request], asked: dict[str, Any]
) -> None:
    structured = StructuredOutputsParams(**asked)
    outs, reads = run(llm, requests, max_tokens=32, structured_outputs=structured, ignore_eos=False)
    for request, out, (read,) in zip(requests, outs, reads, strict=True):
        assert out.outputs[0].text in asked.get("choice", ['{"a":true}', '{"a":false}'])
        truth = reference.replay(request.prompt_ids, list(out.outputs[0].token_ids), request.steering)
        check_readout(read, request.readout, truth, request.label)


@pytest.mark.conformance("multi-turn over the prefix cache", family="llama")
@pytest.mark.parametrize("first", ["steered", "unsteered"])
def test_the_next_turn_of_a_chat_hits_what_the_first_one_wrote_only_if_it_steers_alike(
    llm: LLM, reference: Reference, entry: Callable[..., Entry], first: str
) -> None:
    specs = {"steered": [entry()], "unsteered": []}
    (second,) = set(specs) - {first}
    question = {"role": "user", "content": "Tell me of the lighthouse keeper who spoke to nobody for a year, and why."}

    def chat(messages: list[dict[str, str]], who: str) -> RequestOutput:
        params = Request([], specs[who], None).params(max_tokens=MAX_TOKENS)
        (out,) = llm.chat(messages, params, use_tqdm=False)
        truth = reference.generate(list(out.prompt_token_ids or []), MAX_TOKENS, specs[who])
        assert is_same_output(out, truth, f"{who} turn of {len(messages)} messages")
        return out

    assert llm.reset_prefix_cache()
    turn = chat([question], first)
    assert turn.num_cached_tokens == 0
    reply = {"role": "assistant", "content": turn.outputs[0].text}
    history = [question, reply, {"role": "user", "content": "And then?"}]
    assert chat(history, second).num_cached_tokens == 0
    shared = len(turn.prompt_token_ids or []) // BLOCK_SIZE * BLOCK_SIZE
    assert shared > 0
    again = chat(history, first).num_cached_tokens
    assert again is not None
    assert again >= shared


def test_requests_that_are_queued_first_and_run_later_are_exact(
    llm: LLM, reference: Reference, requests: list[Request]
) -> None:
    params = [request.params(max_tokens=MAX_TOKENS) for request in requests]
    llm.enqueue([{"prompt_token_ids": request.prompt_ids} for request in requests], params, use_tqdm=False)
    question = {"role": "user", "content": "Tell me of the lighthouse keeper."}
    chat = Request([], requests[0].steering, {"layers": LAYERS})
    llm.enqueue_chat([question], chat.params(max_tokens=MAX_TOKENS), use_tqdm=False)
    outs = llm.wait_for_completion(RequestOutput, use_tqdm=False)
    asked = [*requests, Request(list(outs[-1].prompt_token_ids or []), chat.steering, chat.readout)]
    reads = [read for (read,) in collect_readouts(llm, outs)]
    assert check_answers(reference, asked, references(reference, asked, MAX_TOKENS), outs, reads) == 0


@pytest.mark.conformance("prompt embeddings", family="llama", refused=True)
def test_a_prompt_of_embeddings_is_refused_with_a_spec_and_runs_unsteered_without_one(
    llm: LLM, reference: Reference, requests: list[Request]
) -> None:
    prompt = requests[1].prompt_ids
    with torch.inference_mode():
        embeddings = reference.model.get_input_embeddings()(torch.tensor(prompt))
    for params in (
        steered(SamplingParams(), [Steering("calm", layer=0, alpha=1.0)]),
        steered(SamplingParams(), readout=Readout(layers=[0])),
    ):
        with pytest.raises(MalformedSpec, match="prompt of embeddings"):
            llm.generate([{"prompt_embeds": embeddings}], params, use_tqdm=False)
    outs = llm.generate(
        [{"prompt_embeds": embeddings}, {"prompt_token_ids": requests[0].prompt_ids}],
        [Request(prompt, [], None).params(max_tokens=MAX_TOKENS), requests[0].params(max_tokens=MAX_TOKENS)],
        use_tqdm=False,
    )
    for out, request, steering in zip(outs, (requests[1], requests[0]), ([], requests[0].steering), strict=True):
        truth = reference.generate(request.prompt_ids, MAX_TOKENS, steering)
        assert is_same_output(out, truth, f"beside embeddings, {request.label}")


@pytest.mark.conformance("beam search", family="llama", refused=True)
def test_beam_search_takes_no_spec_and_runs_unsteered(llm: LLM, reference: Reference, requests: list[Request]) -> None:
    params = BeamSearchParams(beam_width=1, max_tokens=MAX_TOKENS, ignore_eos=True)
    with pytest.raises(MalformedSpec, match="BeamSearchParams; allowed: SamplingParams"):
        steered(params, [Steering("calm", layer=0, alpha=1.0)])
    prompt = requests[1].prompt_ids
    (out,) = llm.beam_search([{"prompt_token_ids": prompt}], params)
    assert out.sequences[0].tokens[len(prompt) :] == reference.generate(prompt, MAX_TOKENS).tokens


@pytest.mark.conformance("pooling requests", family="llama", refused=True)
def test_pooling_takes_no_spec_and_has_no_engine_beside_steering(llm: LLM, checkpoint: Path) -> None:
    with pytest.raises(MalformedSpec, match="PoolingParams; allowed: SamplingParams"):
        steered(PoolingParams(), [Steering("calm", layer=0, alpha=1.0)])
    for ask in (lambda: llm.encode("x", pooling_task="token_embed"), lambda: llm.embed("x"), lambda: llm.classify("x")):
        with pytest.raises(ValueError, match=r"only supported for pooling models|not supported"):
            ask()
    assert not llm.llm_engine.has_unfinished_requests()
    with pytest.raises(UnsupportedFeature, match="a pooling model"):
        LLM(str(checkpoint), runner="pooling", additional_config=steer_config(layers=LAYERS))
