"""The mixed batch on which parity is measured, and the comparison of an engine's answers with the reference's.

Every request differs from its neighbours in direction, layer, operation, span, alpha or number of entries, some are
not steered at all, and six prompts are shared by all of them, so that the prefix cache has every chance to mix them up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm import LLM, RequestOutput, SamplingParams
from vllm.outputs import CompletionOutput

from tests.support.hf_reference import Entry, Reference, ReferenceRun
from vllm_steer import Direction, Readout, ReadoutResult, Steering, Watch, When, collect_readouts, steered

# Where the reference's two best logits are this close, float rounding and not steering decides which of them wins.
NEAR_TIE = 1e-3
# float32 rounding moves a chosen token's log-probability by up to 3e-5 in these models (measured). Leaving any one
# entry out of the batch moves it by 1e-2 or more, but for one ablation in Qwen2 (1e-4) that its readout gives away.
LOGPROB_TOLERANCE = 1e-3
# As above for pooled vectors: up to 4e-6 relative measured, and one row too many in a mean of 100 is about 1e-2.
READOUT_TOLERANCE = 1e-4
# Of a trace's values, relative to the norm of their stream; a neighbouring token's value is off by 7e-2.
TRACE_TOLERANCE = 1e-4
# How far from the bound of a watch a value must be, relative to the norm of its stream: float32 rounding moves a
# projection by about 1e-6 of that.
WATCH_MARGIN = 1e-5

Vectors = Mapping[tuple[str, int], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Request:
    """One request: `steering` as the reference takes it plus the direction's `name`, `readout` as Readout's fields.

    `vectors` holds the vectors of the names in the readout's trace, see `trace_name`.
    """

    prompt_ids: list[int]
    steering: list[Entry]
    readout: dict[str, Any] | None
    vectors: Vectors = field(default_factory=dict)

    @property
    def fewest_tokens(self) -> int:
        """The fewest tokens to generate with which each of its slices has one; with fewer it is refused."""
        spans = [entry["span"] for entry in self.steering] + ([self.readout["span"]] if self.readout else [])
        return 4 if any("generated[" in span for span in spans) else 1

    @property
    def looks_back(self) -> bool:
        """Whether a condition looks at an earlier layer than its entry's."""
        return any("when" in entry and entry["when"]["layer"] < entry["layer"] for entry in self.steering)

    @property
    def has_stop(self) -> bool:
        """Whether a watch can end the request."""
        return bool(self.readout and "stop" in self.readout)

    @property
    def label(self) -> str:
        """The request in words, for failures."""
        entries = [" ".join(f"{e[name]}" for name in e if name != "vector") for e in self.steering]
        return f"{len(self.prompt_ids)} tokens, [{'; '.join(entries)}], readout {self.readout}"

    def params(self, **fields: Any) -> SamplingParams:
        """Greedy parameters that never stop early, unless `fields` say otherwise."""
        greedy: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0}
        return ask(SamplingParams(**(greedy | fields)), self.steering, self.readout)


def ask(params: SamplingParams, steering: Sequence[Entry], readout: dict[str, Any] | None) -> SamplingParams:
    """`params` with plain-dict steering and readout added through the public interface."""
    entries = [
        Steering(
            e["name"],
            layer=e["layer"],
            alpha=e.get("alpha", None if e.get("op") == "clamp" else 1.0),
            op=e.get("op", "add"),
            span=e.get("span", "all"),
            when=_when(e["when"]) if "when" in e else None,
            **{name: e[name] for name in ("relative", "keep_norm", "low", "high") if name in e},
        )
        for e in steering
    ]
    if readout is not None:
        watches = {"stop": Watch(**readout["stop"])} if "stop" in readout else {}
        watches |= {"flag": [Watch(**one) for one in readout["flag"]]} if "flag" in readout else {}
        readout = readout | watches
    return steered(params, entries, readout=Readout(**readout) if readout else None)


def _when(condition: dict[str, Any]) -> When:
    bound = {name: condition[name] for name in ("above", "below", "over") if name in condition}
    return When(condition["name"], layer=condition["layer"], **bound)


def unit_vectors(layers: Sequence[int], hidden_size: int, seed: int = 1) -> Vectors:
    """Random unit directions "calm" and "bold" at each of `layers`; float32 (hidden_size,) each."""
    rng = np.random.default_rng(seed)
    drawn = {(name, layer): rng.standard_normal(hidden_size) for name in ("calm", "bold") for layer in layers}
    return {key: (vector / np.linalg.norm(vector)).astype(np.float32) for key, vector in drawn.items()}


def as_directions(vectors: Vectors) -> list[Direction]:
    """Every vector under its name, which several layers share, and under a name of its own, which a trace needs."""
    return [
        Direction(name=called, layer=layer, vector=vector)
        for (name, layer), vector in vectors.items()
        for called in (name, trace_name(name, layer))
    ]


def trace_name(name: str, layer: int) -> str:
    """The name that stands for `name` at this layer only."""
    return f"{name}-of-layer-{layer}"


def random_prompts(vocab_size: int, lengths: Sequence[int], seed: int = 2) -> list[list[int]]:
    """One prompt of random token ids for each length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab_size, size=length).tolist() for length in lengths]


def mixed_batch(vectors: Vectors, prompts: Sequence[list[int]]) -> list[Request]:
    """65 requests over the (sorted) layers of `vectors`, prompts taken in turn.

    At least three layers are needed; `first`, `middle` and `last` below are positions in their sorted list.
    """
    layers = sorted({layer for _, layer in vectors})
    first, middle, last = layers[0], layers[len(layers) // 2], layers[-1]

    def entry(name: str, layer: int, alpha: float | None, op: str = "add", span: str = "all", **more: Any) -> Entry:
        vector = vectors[name, layer]
        return {"name": name, "layer": layer, "vector": vector, "alpha": alpha, "op": op, "span": span, **more}

    def when(name: str, layer: int, **bound: float | str) -> dict[str, Any]:
        return {"name": name, "layer": layer, "vector": vectors[name, layer], **bound}

    steerings: list[list[Entry]] = [
        [],
        [entry("calm", first, 20)],
        [entry("calm", first, -20)],
        [entry("calm", middle, 10, span="prompt")],
        [entry("calm", middle, -10, span="generated")],
        [entry("bold", last, 15)],
        [],
        [entry("bold", middle, -5)],
        [entry("bold", first, 1, "ablate")],
        [entry("calm", last, 1, "ablate", "prompt")],
        [entry("calm", middle, 1, "ablate", "generated")],
        [entry("calm", first, 15, "set")],
        [entry("bold", middle, -12, "set", "prompt")],
        [entry("bold", last, 18, "set", "generated")],
        # Two entries at one layer, and the same two the other way round: the order is part of the meaning.
        [entry("calm", middle, 12), entry("bold", middle, -13, "set")],
        [entry("bold", middle, -13, "set"), entry("calm", middle, 12)],
        [entry("calm", middle, 1, "ablate"), entry("calm", middle, 17)],
        [entry("calm", first, 6), entry("calm", middle, -6), entry("bold", last, 14)],
        [entry("calm", first, 14, "set", "prompt"), entry("calm", first, 18, span="generated")],
        [
            entry("bold", first, 20),
            entry("calm", middle, -20, span="generated"),
            entry("bold", last, 1, "ablate", "prompt"),
        ],
        [],
        [entry("calm", last, -16.5)],
        [entry("calm", first, 0)],
        [entry("bold", middle, -13, span="prompt"), entry("bold", middle, 13, span="generated")],
        [
            entry("bold", first, 9),
            entry("calm", first, -11, "set"),
            entry("bold", first, 7.5, span="generated"),
        ],
        [entry("bold", middle, 20, span="prompt")],
        [],
        [entry("bold", first, -20, span="generated")],
        [entry("calm", middle, 3.25), entry("bold", last, -20)],
        [entry("bold", first, -18), entry("bold", middle, 18), entry("bold", last, -18)],
        [entry("calm", first, 19, "set", "generated"), entry("calm", middle, -19, "set", "prompt")],
        [],
    ]
    # Five kinds of readout, six prompts: every request has a new pair of the two.
    readouts: list[dict[str, Any] | None] = [
        {"layers": layers, "span": "all", "trace": [trace_name("bold", last), trace_name("calm", first)]},
        None,
        {"layers": [first, last], "span": "prompt", "skip_first": 2, "trace": [trace_name("calm", middle)]},
        {"layers": [middle], "span": "generated", "trace": [trace_name("calm", first)]},
        {"layers": layers, "span": "all", "skip_first": 1},
    ]
    # Spans that begin or end within the prompt or among the generated tokens, for prompts of three tokens or more.
    cut: list[tuple[list[Entry], dict[str, Any] | None]] = [
        ([entry("calm", first, 20, span="response")], {"layers": layers, "span": "response"}),
        ([entry("bold", middle, 15, span="prompt[-1]")], {"layers": [first, last], "span": "prompt[-2:]"}),
        ([entry("calm", middle, -20, span="generated[1:4]")], {"layers": [last], "span": "generated[2:]"}),
        ([entry("bold", first, -11, "set", "all[1:20]")], {"layers": layers, "span": "all[2:]"}),
        ([entry("calm", last, 18, span="prompt[0] + generated[:2]")], None),
        (
            [entry("calm", middle, 1, "ablate", "prompt[1:]"), entry("bold", middle, 16, span="generated[2:]")],
            {"layers": [middle], "span": "prompt[1:3]", "trace": [trace_name("calm", middle)]},
        ),
        (
            [
                entry("bold", first, 17, span="prompt[:2]"),
                entry("calm", first, -14, span="response"),
                entry("bold", last, 12, "set", "generated[0]"),
            ],
            {"layers": layers, "span": "response", "trace": [trace_name("bold", last)]},
        ),
        ([], {"layers": [middle], "span": "prompt[2:] + generated"}),
    ]
    operations: list[list[Entry]] = [
        [entry("calm", first, 25, "scale"), entry("bold", last, 18, when=when("calm", middle, above=0))],
        [entry("bold", middle, None, "clamp", "response", low=12)],
        [entry("calm", last, None, "clamp", "prompt", high=-12, keep_norm=True)],
        [entry("calm", middle, 0.9, span="generated", relative=True, when=when("bold", first, below=0))],
        [entry("bold", first, -0.8, "set", relative=True)],
        [entry("bold", first, 18, span="prompt[-2:]", keep_norm=True, when=when("bold", first, above=-1e6))],
        [entry("calm", middle, 2, "ablate"), entry("bold", middle, 0.5, "ablate"), entry("calm", middle, 14)],
        [
            entry("calm", first, None, "clamp", low=0.6, high=0.7, relative=True),
            entry("bold", middle, 15, span="response", keep_norm=True),
            entry("bold", last, -20, "scale", "generated", keep_norm=True),
        ],
    ]
    asked = [(steering, readouts[i % len(readouts)]) for i, steering in enumerate(steerings)] + cut
    pooled: list[dict[str, Any] | None] = [
        {"layers": layers, "span": "all", "pool": "last", "held": True},
        {"layers": [middle], "span": "generated", "pool": "max", "project": [trace_name("bold", middle)]},
        {"layers": [first, last], "span": "prompt", "pool": "last", "trace": [trace_name("calm", last)]},
        {"layers": layers, "span": "response", "pool": "max", "trace": [trace_name("calm", middle)], "held": True},
        None,
        {"layers": [last], "span": "prompt[:-1]", "pool": "last"},
        {"layers": layers, "span": "prompt", "skip_first": 1, "pool": "max", "project": [trace_name("calm", first)]},
        {"layers": layers, "span": "generated", "pool": "last"},
    ]
    asked += list(zip(operations, pooled, strict=True))

    def watch(name: str, layer: int, **bound: float) -> dict[str, Any]:
        return {"direction": trace_name(name, layer), **bound}

    watched: list[dict[str, Any]] = [
        {"layers": layers, "span": "all", "stop": watch("calm", first, above=0.0)},
        {
            "layers": [],
            "span": "generated",
            "stop": watch("bold", last, below=0.0, patience=2),
            "flag": [watch("bold", last, below=0.0)],
        },
        {
            "layers": [middle],
            "span": "response",
            "stop": watch("bold", middle, above=1e6),
            "flag": [watch("calm", middle, above=0.0), watch("bold", first, below=-1e6)],
            "trace": [trace_name("calm", middle)],
        },
        {
            "layers": [middle, last],
            "span": "generated",
            "pool": "last",
            "stop": watch("calm", middle, below=0.0),
            "project": ["calm"],
        },
    ]
    asked += zip(
        [[], [entry("calm", first, 15)], [entry("bold", middle, -16, span="response")], []], watched, strict=True
    )
    # A condition over the prompt and its opposite, one of which holds; at the entry's layer and at an earlier one.
    above, below = {"above": 0.05, "over": "prompt"}, {"below": 0.05, "over": "prompt"}
    whole = {"layers": layers, "span": "all", "trace": [trace_name("calm", first)], "held": True}
    asked += [
        ([entry("calm", first, 21, span="generated", when=when("bold", first, **above))], whole),
        ([entry("calm", first, 21, span="generated", when=when("bold", first, **below))], None),
        ([entry("bold", last, -19, span="response", when=when("calm", first, **above))], None),
        ([entry("bold", last, -19, span="response", when=when("calm", first, **below))], whole),
        (
            [
                entry("bold", first, 9, span="prompt"),
                entry("calm", last, 14, "set", "prompt[-1] + generated[1:]", when=when("bold", first, **above)),
                entry("bold", last, 12, span="generated", when=when("calm", last, **below)),
            ],
            None,
        ),
    ]
    asked += [
        ([entry("calm", middle, 15, span="response")], {"layers": layers, "span": "all", "pool": "rows"}),
        ([], {"layers": [last], "span": "generated", "pool": "rows", "trace": [trace_name("bold", last)]}),
        ([entry("bold", first, -14)], {"layers": [first, last], "span": "prompt", "skip_first": 1, "pool": "rows"}),
        ([entry("calm", first, 16, "set")], {"layers": layers, "span": "response", "pool": "rows"}),
        ([entry("bold", middle, 12)], {"layers": [middle], "span": "prompt[1:3]", "pool": "rows"}),
        (
            [entry("calm", last, 18, span="generated")],
            {"layers": layers, "span": "all[2:]", "pool": "rows", "trace": [trace_name("calm", first)]},
        ),
    ]
    # Counts of conditions beside watches, traces and rows: each has its own columns.
    counted = {"held": True, "flag": [watch("bold", middle, above=0.0)]}
    asked += [
        (
            [entry("calm", middle, 13, when=when("bold", first, above=0.0))],
            {"layers": [first, last], "span": "all", "pool": "rows", "trace": [trace_name("bold", last)], **counted},
        ),
        (
            [entry("bold", first, -17, span="response", when=when("calm", first, below=0.0))],
            {"layers": [], "span": "all", "stop": watch("calm", last, above=1e6), **counted},
        ),
    ]
    return [
        Request(prompts[i % len(prompts)], steering, readout, vectors) for i, (steering, readout) in enumerate(asked)
    ]


def every_operation(vectors: Vectors, prompts: Sequence[list[int]]) -> list[Request]:
    """104 requests: each form of each operation over spans of each kind, prompts taken in turn.

    The layers of `vectors` are taken in turn too; prompts have three tokens or more. The last 26 have conditions
    over the prompt, of which about half hold.
    """
    layers = sorted({layer for _, layer in vectors})
    forms: list[dict[str, Any]] = [
        {"op": "add", "alpha": 17.0},
        {"op": "add", "alpha": -1.1, "relative": True},
        {"op": "add", "alpha": 20.0, "keep_norm": True},
        {"op": "ablate", "alpha": 0.5},
        {"op": "ablate", "alpha": 2.0, "keep_norm": True},
        {"op": "set", "alpha": -14.0},
        {"op": "set", "alpha": 0.9, "relative": True, "keep_norm": True},
        {"op": "scale", "alpha": -30.0},
        {"op": "scale", "alpha": 40.0, "keep_norm": True},
        {"op": "clamp", "low": 13.0},
        {"op": "clamp", "high": -0.9, "relative": True},
        {"op": "clamp", "low": -0.1, "high": 0.1},
        {"op": "clamp", "low": 0.7, "high": 0.9, "relative": True, "keep_norm": True},
    ]
    spans = ["all", "prompt", "generated", "response", "prompt[-2:]+generated[1:]", "all[1:4]"]
    made = []
    for number, (span, form) in enumerate(product(spans, forms)):
        name, layer = ("calm", "bold")[number % 2], layers[number % len(layers)]
        entry = {"name": name, "layer": layer, "vector": vectors[name, layer], **form, "span": span}
        if number % 5 in (1, 3):  # on the entry's own layer and on the first one, above and below nothing
            seen = layer if number % 5 == 1 else layers[0]
            condition = {"name": "bold", "layer": seen, "vector": vectors["bold", seen]}
            entry["when"] = condition | ({"above": 0.0} if number % 2 else {"below": 0.0})
        readout = {"layers": layers, "span": "response", "trace": [trace_name(name, layer)]} if number % 3 else None
        if readout is not None and "when" in entry:
            readout["held"] = True
        made.append(Request(prompts[number % len(prompts)], [entry], readout, vectors))
    for number, (span, form) in enumerate(product(("generated", "response"), forms)):
        seen, layer = layers[:2] if span == "response" else layers[number % len(layers) :][:1] * 2
        entry = {"name": "calm", "layer": layer, "vector": vectors["calm", layer], **form, "span": span}
        condition = {"name": "bold", "layer": seen, "vector": vectors["bold", seen], "over": "prompt"}
        entry["when"] = condition | ({"above": 0.05} if number % 2 else {"below": 0.05})
        readout = {"layers": layers, "span": "generated", "held": True} if number % 3 == 0 else None
        made.append(Request(prompts[number % len(prompts)], [entry], readout, vectors))
    return made


def run(
    llm: LLM, requests: Sequence[Request], **fields: Any
) -> tuple[list[RequestOutput], list[list[ReadoutResult | None]]]:
    """Run all requests in one `generate` call; return the outputs and their readouts."""
    prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
    outs = llm.generate(prompts, [request.params(**fields) for request in requests], use_tqdm=False)
    return outs, collect_readouts(llm, outs)


def references(reference: Reference, requests: Sequence[Request], max_tokens: int) -> list[ReferenceRun]:
    """The reference's run of each request, which ends where its stop holds."""
    return [stopped(reference.generate(one.prompt_ids, max_tokens, one.steering), one) for one in requests]


def stopped(expected: ReferenceRun, request: Request) -> ReferenceRun:
    """The same run, ended with the first token with which the request's stop holds; its stream is that token's too."""
    if not request.has_stop:
        return expected
    held = held_at(expected, request, request.readout["stop"]) if request.readout else None
    if held is None:
        return expected
    count = held[0] + 1 - expected.prompt_len
    ended = expected.first(count)
    streams = {layer: stream[: held[0] + 1] for layer, stream in expected.streams.items()}
    return replace(ended, streams=streams)


def run_over(replay: Callable[..., ReferenceRun], request: Request, sample: CompletionOutput) -> ReferenceRun:
    """A reference's run over the tokens of a sample, with the last one's stream too if the request's stop ended it.

    Args:
        replay: ``Reference.replay`` or ``Reference.confirm``.

    Raises:
        AssertionError: the stop holds elsewhere.
    """
    tokens = list(sample.token_ids)
    if not request.has_stop or not str(sample.stop_reason).startswith("vllm_steer:"):
        run = replay(request.prompt_ids, tokens, request.steering)
        assert stopped(run, request) is run, f"{request.label}: went on behind its stop"
        return run
    run = stopped(replay(request.prompt_ids, [*tokens, tokens[-1]], request.steering), request)
    assert len(run.tokens) == len(tokens), f"{request.label}: stopped at another token"
    return run


def held_at(expected: ReferenceRun, request: Request, watch: Mapping[str, Any]) -> tuple[int, float] | None:
    """Position and value with which a watch holds first in a run; None if it never does.

    Raises:
        AssertionError: a value is so close to the bound that either answer would be right.
    """
    named = {trace_name(name, layer): (layer, vector) for (name, layer), vector in request.vectors.items()}
    layer, vector = named[watch["direction"]]
    in_a_row = 0
    for position in range(expected.prompt_len, len(expected.streams[layer])):
        row = expected.streams[layer][position].astype(np.float64)
        value = float(row @ vector)
        over = value - watch["above"] if "above" in watch else watch["below"] - value
        assert abs(over) > WATCH_MARGIN * np.linalg.norm(row), f"{request.label}: too close to call"
        in_a_row = in_a_row + 1 if over > 0 else 0
        if in_a_row == watch.get("patience", 1):
            return position, value
    return None


def ended_at(
    max_tokens: int, requests: Sequence[Request], runs: Sequence[ReferenceRun]
) -> tuple[list[Request], list[ReferenceRun]]:
    """The requests that may end after `max_tokens` tokens, and the reference's runs that do."""
    fit = [number for number, request in enumerate(requests) if request.fewest_tokens <= max_tokens]
    return [requests[number] for number in fit], [runs[number].first(max_tokens) for number in fit]


def share_changed_by_steering(reference: Reference, requests: Sequence[Request], runs: Sequence[ReferenceRun]) -> float:
    """Share of the steered requests whose reference output differs from the unsteered one of the same prompt."""
    changed = [
        reference.confirm(request.prompt_ids, steered_run.tokens).tokens != steered_run.tokens
        for request, steered_run in zip(requests, runs, strict=True)
        if request.steering
    ]
    return sum(changed) / len(changed)


def is_same_output(out: RequestOutput, expected: ReferenceRun, label: str) -> bool:
    """True where tokens and log-probabilities equal the reference's, False where a near tie excuses a difference.

    Nothing is compared after an excused token, since the texts differ from there on.

    Raises:
        AssertionError: any other difference.
    """
    completion = out.outputs[0]
    got = list(completion.token_ids)
    differing = [i for i, (a, b) in enumerate(zip(got, expected.tokens, strict=False)) if a != b]
    told = f"{label}: {len(got)} tokens, the reference has {len(expected.tokens)}"
    assert differing or len(got) == len(expected.tokens), told
    agreed = differing[0] if differing else len(got)
    for step, logprobs in enumerate((completion.logprobs or [])[:agreed]):
        off = abs(logprobs[got[step]].logprob - expected.logprobs[step])
        assert off < LOGPROB_TOLERANCE, f"{label}: log-probability of token {step} is off by {off:.2e}"
    if not differing:
        return True
    gap = expected.top2_gaps[agreed]
    assert gap < NEAR_TIE, f"{label}: token {agreed} is {got[agreed]}, not {expected.tokens[agreed]} (gap {gap:.2e})"
    return False


def check_readout(
    result: ReadoutResult | None, asked: dict[str, Any] | None, expected: ReferenceRun, label: str
) -> None:
    """Assert that `result` is the pooling of `expected` (of the same tokens), or None where none was asked for."""
    if asked is None:
        assert result is None, f"{label}: a readout nobody asked for"
        return
    assert result is not None, f"{label}: no readout"
    span, skip_first = asked.get("span", "prompt"), asked.get("skip_first", 0)
    pool = asked.get("pool", "mean")
    vectors = result.last if pool == "last" else result.mean
    assert set(vectors) == (set() if pool in ("max", "rows") else set(asked["layers"])), label
    assert set(result.rows) == (set(asked["layers"]) if pool == "rows" else set()), label
    assert bool(result.last) == (pool == "last"), label
    assert bool(result.max) == (pool == "max"), label
    span = span if asked["layers"] or asked.get("held") else "generated"  # nothing is pooled or counted
    assert result.num_tokens == len(expected.places(span, skip_first)), label
    for layer, vector in vectors.items():
        rows = expected.rows(layer, span, skip_first)
        truth = rows[-1] if pool == "last" else rows.mean(axis=0)
        assert vector.dtype == np.float32
        assert vector.shape == truth.shape
        off = np.linalg.norm(vector - truth) / np.linalg.norm(truth)
        assert off < READOUT_TOLERANCE, f"{label}: readout at layer {layer} is off by {off:.2e} relative"
    for layer, stored in result.rows.items():
        rows = expected.rows(layer, span, skip_first)
        assert stored.dtype == np.float32
        assert stored.shape == rows.shape, label
        off = (np.linalg.norm(stored - rows, axis=1) / np.linalg.norm(rows, axis=1)).max(initial=0)
        assert off < READOUT_TOLERANCE, f"{label}: a row at layer {layer} is off by {off:.2e} relative"


def check_held(result: ReadoutResult | None, request: Request, expected: ReferenceRun) -> None:
    """Assert that `result` tells of each condition on how many tokens it held, or whether the prompt's did."""
    if result is None or request.readout is None or not request.readout.get("held"):
        assert result is None or result.held == (), request.label
        return
    places = set(expected.places(request.readout["span"]))
    truth = [held if isinstance(held, bool) else len(held & places) for held in expected.held]
    assert list(result.held) == truth, request.label


def check_trace(result: ReadoutResult | None, request: Request, expected: ReferenceRun) -> None:
    """Assert that the trace in `result` is the projection of each token of `expected` at the directions' own layers."""
    asked = request.readout
    if result is None or asked is None:
        assert result is asked, request.label
        return
    assert list(result.trace) == asked.get("trace", []), request.label
    named = {trace_name(name, layer): (layer, vector) for (name, layer), vector in request.vectors.items()}
    for name, values in result.trace.items():
        layer, vector = named[name]
        rows = expected.rows(layer, asked.get("span", "prompt"), asked.get("skip_first", 0))
        assert values.dtype == np.float32
        assert values.shape == (result.num_tokens,) == (len(rows),), request.label
        off = np.abs(values - rows @ vector) / np.linalg.norm(rows, axis=1)
        assert off.max(initial=0) < TRACE_TOLERANCE, f"{request.label}: {name} is off by {off.max():.2e}"
    if asked.get("pool") == "max":
        assert set(result.max) == {*asked.get("project", ()), *asked.get("trace", ())}, request.label
    for name, layers in result.max.items():
        layer, vector = named[name]
        ((at, (value, position)),) = layers.items()
        assert at == layer, request.label
        skipped = {"span": asked.get("span", "prompt"), "skip_first": asked.get("skip_first", 0)}
        rows, places = expected.rows(layer, **skipped), expected.places(**skipped)
        values, allowed = rows @ vector, TRACE_TOLERANCE * np.linalg.norm(rows, axis=1).max()
        assert abs(value - values.max()) < allowed, request.label
        assert values[places.index(position)] > values.max() - allowed, request.label


def check_watches(out: RequestOutput, result: ReadoutResult | None, request: Request, expected: ReferenceRun) -> None:
    """Assert that a sample ended by its stop where `expected` does, and that its readout tells where watches held."""
    asked = request.readout or {}
    if result is None:
        return
    sample = out.outputs[0]
    ends = len(next(iter(expected.streams.values()))) == expected.prompt_len + len(expected.tokens)
    if ends:
        told = ("stop", f"vllm_steer:{asked['stop']['direction']}")
        assert (sample.finish_reason, sample.stop_reason) == told, request.label
    else:
        assert not str(sample.stop_reason).startswith("vllm_steer:"), request.label
    crossings = [] if result.stopped is None else [result.stopped]
    held = [held_at(expected, request, one) for one in asked.get("flag", ())]
    truth = [one for one in held if one is not None]
    if ends:
        last = held_at(expected, request, asked["stop"])
        assert last is not None
        truth = [last, *truth]
    crossings += result.flags
    assert len(crossings) == len(truth), request.label
    for crossing, (position, value) in zip(crossings, truth, strict=True):
        norm = np.linalg.norm(expected.streams[crossing.layer][position])
        assert crossing.position == position, request.label
        assert abs(crossing.value - value) < TRACE_TOLERANCE * norm, request.label


def check_against_reference(
    llm: LLM,
    reference: Reference,
    requests: Sequence[Request],
    expected: Sequence[ReferenceRun],
    **fields: Any,
) -> int:
    """Run `requests`, compare tokens, log-probabilities and readouts, and return the number of excused near ties."""
    outs, reads = run(llm, requests, max_tokens=len(expected[0].tokens), **fields)
    return check_answers(reference, requests, expected, outs, [read for (read,) in reads])


def check_answers(
    reference: Reference,
    requests: Sequence[Request],
    expected: Sequence[ReferenceRun],
    outs: Sequence[RequestOutput],
    reads: Sequence[ReadoutResult | None],
) -> int:
    """Compare the answers, of one sample per request, with `expected`; return the number of excused near ties."""
    excused = 0
    for request, out, read, truth in zip(requests, outs, reads, expected, strict=True):
        same = is_same_output(out, truth, request.label)
        excused += not same
        if not same:
            if request.has_stop:  # the tokens behind a near tie may stop elsewhere
                continue
            truth = reference.replay(request.prompt_ids, list(out.outputs[0].token_ids), request.steering)
        check_readout(read, request.readout, truth, request.label)
        check_trace(read, request, truth)
        check_held(read, request, truth)
        check_watches(out, read, request, truth)
    return excused
