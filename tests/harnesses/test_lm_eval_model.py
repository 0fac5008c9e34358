"""lm-eval's model `vllm-steer`: log-likelihoods are those of the Python API, and of the model's own generation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from batch_jobs.harnesses.lm_eval_model import SteeredLM
from tests.harnesses.conftest import ALPHA, ENDS, ENGINE, MAX_LEN, PROMPTS, Task
from vllm_steer import Steering, steered
from vllm_steer.errors import BadCondition, BadSpan, SettingsError, UnknownDirection

pytestmark = [pytest.mark.engine, pytest.mark.slow]

KIND = Steering("kind", ALPHA)
SPANS = ["all", "prompt", "generated", "response", "response[:3]", "generated[2:]", "prompt[-2:] + generated[:1]"]


def instance(kind: str, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


def log_likelihoods(lm: SteeredLM, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return lm.loglikelihood([instance("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)


def plain_scores(
    lm: SteeredLM, texts: list[tuple[list[int], int]], entries: list[list[Steering]]
) -> list[tuple[float, bool]]:
    """Sums over the last tokens of each text, by vLLM's own `LLM.generate`."""
    params = [steered({"max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}, own) for own in entries]
    outputs = lm.engine.generate([{"prompt_token_ids": ids} for ids, _ in texts], params, use_tqdm=False)
    scores = []
    for (ids, last), output in zip(texts, outputs, strict=True):
        told = [output.prompt_logprobs[at] for at in range(len(ids) - last, len(ids))]
        own = [logprobs[token] for logprobs, token in zip(told, ids[-last:], strict=True)]
        scores.append((sum(one.logprob for one in own), all(one.rank == 1 for one in own)))
    return scores


@pytest.mark.parametrize("steering", [None, f"kind:{ALPHA}", [KIND, Steering("kind", 3.0, op="set")]], ids=str)
def test_log_likelihoods_equal_those_of_the_python_api(lm: SteeredLM, steering: Any) -> None:
    lm.steer(steering)
    entries = [] if steering is None else [KIND] if isinstance(steering, str) else steering
    pairs = [(prompt, end) for prompt in PROMPTS for end in ENDS]
    texts = []
    for prompt, end in pairs:
        start, whole = (lm.tokenizer(text).input_ids for text in (prompt, prompt + end))
        texts.append((whole, len(whole) - len(start)))
    assert log_likelihoods(lm, pairs) == plain_scores(lm, texts, [entries] * len(texts))


@pytest.mark.parametrize("span", SPANS)
def test_a_continuation_is_scored_as_the_model_generates_it(lm: SteeredLM, span: str) -> None:
    """The log-likelihood of a steered generation is the sum of the log-probabilities that the generation reported."""
    entry = Steering("kind", ALPHA, span=span)
    params = steered({"max_tokens": 8, "min_tokens": 8, "temperature": 0, "logprobs": 0}, [entry])
    prompts = [lm.tokenizer(prompt).input_ids for prompt in PROMPTS]
    outputs = lm.engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    generated = [list(output.outputs[0].token_ids) for output in outputs]
    requests = [(("", ""), ids, own) for ids, own in zip(prompts, generated, strict=True)]
    lm.steer([entry])
    scores = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    others = [lm.steer(other) or lm._loglikelihood_tokens(requests, disable_tqdm=True) for other in others_of(span)]
    for output, score in zip(outputs, scores, strict=True):
        # float32 in other batches: each of 8 log-probabilities differs by less than 1e-4, a wrong token by far more
        assert score == (pytest.approx(output.outputs[0].cumulative_logprob, abs=1e-3), True)
    for other in others:
        assert max(abs(own - wrong) for (own, _), (wrong, _) in zip(scores, other, strict=True)) > 0.05


def others_of(span: str) -> list[list[Steering] | None]:
    """Steering that a wrong translation of the span would be."""
    near = {"all": "response", "prompt": "all", "generated": "response", "response": "generated"}
    return [None, [Steering("kind", ALPHA, span=near.get(span, "all"))]]


def test_a_text_without_a_context_is_scored_after_the_prefix_token(lm: SteeredLM) -> None:
    lm.steer([Steering("kind", ALPHA, span="generated")])
    ids = lm.tokenizer(PROMPTS[0]).input_ids
    text = [lm.prefix_token_id, *ids]
    [expected] = plain_scores(lm, [(text, len(ids))], [[Steering("kind", ALPHA, span="prompt[1:]")]])
    assert log_likelihoods(lm, [("", PROMPTS[0])]) == [expected]
    rolling = lm.loglikelihood_rolling([instance("loglikelihood_rolling", PROMPTS[0])], disable_tqdm=True)
    assert rolling == [expected[0]]


@pytest.mark.parametrize(
    ("span", "first", "second"),
    [("response", "prompt", "prompt"), ("response[:8]", "prompt[:8]", None), ("generated", "prompt[1:]", "prompt")],
)
def test_a_long_text_is_scored_in_parts_that_are_steered_as_one(
    lm: SteeredLM, span: str, first: str, second: str | None
) -> None:
    ids = lm.tokenizer(" ".join(PROMPTS * 20)).input_ids[: MAX_LEN + 44]
    text = lm.tokenizer.decode(ids)
    ids = lm.tokenizer(text).input_ids
    most = MAX_LEN - 2  # tokens that a part predicts; one before them and one generated belong to it too
    rest = len(ids) - most
    assert 0 < rest < most
    parts = [([lm.prefix_token_id, *ids[:most]], most), (ids[-most - 1 :], rest)]
    entries = [[Steering("kind", ALPHA, span=first)], [] if second is None else [Steering("kind", ALPHA, span=second)]]
    lm.steer([Steering("kind", ALPHA, span=span)])
    [total] = lm.loglikelihood_rolling([instance("loglikelihood_rolling", text)], disable_tqdm=True)
    assert total == sum(score for score, _ in plain_scores(lm, parts, entries))


def evaluate(lm: SteeredLM, task: Task, **fields: Any) -> Any:
    """lm-eval's results of one task, which it changes."""
    manager = TaskManager(include_defaults=False)  # its own tasks take ten seconds to list
    return lm_eval.simple_evaluate(lm, tasks=[copy.deepcopy(task)], task_manager=manager, bootstrap_iters=0, **fields)


def answers(results: Any, name: str) -> list[Any]:
    return [[answer for [answer] in sample["resps"]] for sample in results["samples"][name]]


def test_both_kinds_of_task_are_steered_in_one_engine(lm: SteeredLM, choice: Task, generation: Task) -> None:
    told: dict[float, list[Any]] = {}
    for alpha in (0.0, ALPHA, -ALPHA, 0.0):
        lm.steer(None if alpha == 0.0 else [Steering("kind", alpha, span="response")])
        got = [answers(evaluate(lm, choice), "choice"), answers(evaluate(lm, generation), "generation")]
        assert told.setdefault(alpha, got) == got  # the second time too
    for kind in (0, 1):
        assert told[0.0][kind] != told[ALPHA][kind] != told[-ALPHA][kind] != told[0.0][kind]
    params = steered({"max_tokens": 8, "temperature": 0}, [Steering("kind", ALPHA, span="response")])
    texts = [output.outputs[0].text for output in lm.engine.generate(PROMPTS, params, use_tqdm=False)]
    assert told[ALPHA][1] == [[text] for text in texts]


def test_results_say_how_they_were_steered(lm: SteeredLM, choice: Task) -> None:
    lm.steer([KIND])
    config = evaluate(lm, choice)["config"]
    assert config["steering"] == [KIND.to_json()]
    assert list(config["direction_hashes"]) == ["kind@2"]
    lm.steer()
    assert evaluate(lm, choice)["config"]["steering"] == []


@pytest.mark.parametrize("where", [{"steering": []}, {"readout": {}}, {"extra_args": {"vllm_steer": "{}"}}], ids=str)
def test_generation_arguments_that_steer_are_refused_in_one_line(
    lm: SteeredLM, generation: Task, where: dict[str, Any]
) -> None:
    with pytest.raises(SettingsError, match="would steer what is generated and no log-likelihood") as refused:
        evaluate(lm, generation, gen_kwargs=where)
    assert "\n" not in str(refused.value)


def test_other_generation_arguments_reach_vllm_and_unknown_ones_are_refused(lm: SteeredLM, generation: Task) -> None:
    lm.steer()
    short = answers(evaluate(lm, generation, gen_kwargs={"max_gen_toks": 2}), "generation")
    whole = answers(evaluate(lm, generation), "generation")
    assert all(one != other and other[0].startswith(one[0]) for one, other in zip(short, whole, strict=True))
    stop = whole[0][0][3:6]
    cut = answers(evaluate(lm, generation, gen_kwargs={"until": [stop]}), "generation")
    assert cut[0] == [whole[0][0].split(stop)[0]]
    with pytest.raises(SettingsError, match=r"num_beans.* allowed: theirs"):
        evaluate(lm, generation, gen_kwargs={"num_beans": 3})


def test_a_task_that_says_nothing_of_sampling_is_greedy_and_one_that_asks_for_it_is_not(lm: SteeredLM) -> None:
    lm.steer()

    def texts(**kwargs: Any) -> set[str]:
        requests = [instance("generate_until", PROMPTS[0], {"until": [], "max_gen_toks": 8, **kwargs})] * 4
        return set(lm.generate_until(requests, disable_tqdm=True))

    assert len(texts()) == len(texts(do_sample=False)) == len(texts(temperature=0.0)) == 1
    assert texts() == texts(do_sample=False)
    assert len(texts(do_sample=True, temperature=1.0)) == len(texts(temperature=1.0)) == 4


def test_what_the_engine_refuses_leaves_nothing_in_it(lm: SteeredLM, generation: Task) -> None:
    lm.steer([Steering("kind", 1.0, span="response[100:]")])
    with pytest.raises(BadSpan):
        evaluate(lm, generation)
    assert not lm.engine.llm_engine.has_unfinished_requests()


def test_what_cannot_be_applied_is_refused_before_any_request(lm: SteeredLM) -> None:
    lm.steer([KIND])
    gate = {"direction": "kind", "above": 0.0, "over": "prompt"}
    for wrong, error in (
        ("nobody:1", UnknownDirection),
        ([{"direction": "kind", "alpha": 1, "span": "generated", "when": gate}], BadCondition),
        ("", SettingsError),
    ):
        with pytest.raises(error):
            lm.steer(wrong)
    assert lm.get_model_info()["steering"] == [KIND.to_json()]


def test_a_response_cache_holds_the_answers_of_one_steering(lm: SteeredLM, choice: Task, tmp_path: Path) -> None:
    cache = str(tmp_path / "answers")
    lm.steer([KIND])
    first = answers(evaluate(lm, choice, use_cache=cache), "choice")
    assert answers(evaluate(lm, choice, use_cache=cache), "choice") == first
    with pytest.raises(SettingsError, match="the answers of another model or steering"):
        lm.steer()
    lm.cache_hook.dbdict = None
    with pytest.raises(SettingsError, match="the answers of another model or steering"):
        evaluate(lm, choice, use_cache=cache)
    lm.cache_hook.dbdict = None


def test_a_chat_template_and_a_long_context_are_as_lm_evals_own(lm: SteeredLM, generation: Task) -> None:
    lm.steer()
    chat = evaluate(lm, generation, apply_chat_template=True)["samples"]["generation"][0]
    context = chat["arguments"][0][0]
    assert context == lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], tokenize=False, add_generation_prompt=True
    )
    long = " ".join(PROMPTS * 40)
    kwargs = {"until": [], "max_gen_toks": 8}
    [text] = lm.generate_until([instance("generate_until", long, kwargs)], disable_tqdm=True)
    ids = lm.tokenizer(long).input_ids[-(MAX_LEN - 8) :]
    params = steered({"max_tokens": 8, "temperature": 0})
    [output] = lm.engine.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    assert text == output.outputs[0].text
    with pytest.raises(SettingsError, match=f"a continuation has .* tokens and max_model_len is {MAX_LEN}"):
        log_likelihoods(lm, [("Once", long)])


def test_the_registered_name_is_this_model(model: Path) -> None:
    assert get_model("vllm-steer") is SteeredLM
    with pytest.raises(SettingsError, match="no layers to hook"):
        get_model("vllm-steer").create_from_arg_obj({"pretrained": str(model)}, {"batch_size": 1, **ENGINE})
