"""Any schedule that an engine can make, from admission to the collected readout, against a model token by token.

Everything but vLLM is real: admission, the runner's wrappers, the worker's planner and buffers, the op in the hooks of
a small model, the RPC. The model to compare with (request_model.py) keeps what each request asked for and the vectors
that its names stood for then, computes the stream of every token in float64 from the op's definition, and takes plain
means.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from msgspec import msgpack

from tests.support.request_model import CONTENT, HOMES, HOOKED, MOST_TRACED, Life, readouts, steerings
from tests.support.runner_stand_ins import BLOCKS, SIZE, StandInRunner, StandInWorker, plain_streams
from vllm_steer.directions import Direction
from vllm_steer.engine.front.admission import Admission
from vllm_steer.engine.resolved_spec import RESOLVED_KEY, sums_suffice
from vllm_steer.engine.worker import rpc
from vllm_steer.errors import BankFull
from vllm_steer.plan.block_sums import BlockSums, Reader
from vllm_steer.schema.readout import Readout
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.wire import WIRE_KEY
from vllm_steer.settings import SteerSettings

RUNNING, TOKENS, PADDED, DRAFTS = 3, 24, 28, 2  # requests and tokens of a step, rows of a forward pass
BLOCK, SLOTS = 2, 12
SETTINGS = SteerSettings(
    layers=HOOKED, max_directions=6, max_entries=7, max_windows=16, trace_columns=MOST_TRACED, max_rows=99
)

# Streams here stay below 100, where some twenty float32 roundings add up to less than 2e-4. Any wrong entry, vector or
# token changes them by more than 0.1: every α is at least 1 in size, and two tokens' contents differ as random vectors.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Scheduled:
    """A life's part of a step: known tokens, draft tokens after them, and how many of the drafts are right."""

    life: Life
    known: int
    drafted: int
    right: int


class Schedule(RuleBasedStateMachine):
    """Arrivals, chunks, preemptions and ends in any order that hypothesis draws."""

    num_loaded = 0

    def __init__(self) -> None:
        super().__init__()
        self.runner = StandInRunner(SETTINGS, RUNNING, TOKENS, PADDED, DRAFTS)
        self.runner.load_model()
        self.worker = StandInWorker(self.runner)
        self.admission = Admission(SETTINGS, SIZE)
        self.vectors: dict[tuple[str, int], Any] = {}
        self.lives: list[Life] = []
        self.preempted: set[str] = set()
        self.untold: set[str] = set()
        self.arrivals, self.versions = 0, 0
        self.sums = BlockSums(BLOCK, SLOTS)
        self.ended: list[str] = []
        for name in HOMES:
            self.register(name)

    def register(self, name: str) -> None:
        layers = sorted(HOOKED) if name == "both" else [HOMES[name]]
        new = []
        for layer in layers:
            self.versions += 1
            vector = np.random.default_rng(self.versions).standard_normal(SIZE)
            new.append(Direction(name, layer, vector).normalised())
        try:
            writes = self.admission.registry.register(new)
        except BankFull:
            return
        self.runner.steering.write_directions(writes)
        self.vectors |= {(one.name, one.layer): one.vector.astype(np.float64) for one in new}

    # Events from outside.

    @rule(data=st.data(), name=st.sampled_from(sorted(HOMES)))
    def replace_a_direction(self, data: st.DataObject, name: str) -> None:
        if not self.lives:
            self.admission.registry.reclaim()
        self.register(name)
        self.go_on(data)

    def arrive(self, data: st.DataObject) -> None:
        prompt_len, generated = data.draw(st.integers(1, 9), label="prompt"), data.draw(st.integers(1, 6), label="more")
        is_plain = data.draw(st.integers(0, 3), label="plain") == 0
        steering = [] if is_plain else data.draw(st.lists(steerings(prompt_len), max_size=3), label="steering")
        is_read = not is_plain and data.draw(st.integers(0, 3), label="read") > 0
        num_counted = sum(one.when is not None and one.when.over == "token" for one in steering)
        readout = data.draw(readouts(prompt_len, num_counted), label="readout") if is_read else None
        params = SimpleNamespace(extra_args=None, stop=["."] if data.draw(st.booleans(), label="stop string") else [])
        if steering or readout is not None:
            spec = RequestSpec(tuple(steering), readout)
            stores_rows = readout is not None and readout.pool == "rows"
            most = prompt_len + generated + 9 if stores_rows else None  # must be known, and leaves no slice empty
            resolved = self.admission.admit(f"request-{self.arrivals}", spec, prompt_len, num_computed=most)
            # msgpack makes lists of tuples, as JSON does
            sent = {WIRE_KEY: spec.dumps(), RESOLVED_KEY: resolved.dump()}
            params.extra_args = msgpack.decode(msgpack.encode(sent))
        entries = []
        for one in steering:
            layer = HOMES[one.direction] if one.layer is None else one.layer
            # a name at two layers has a vector for each; a name at one layer may be used at any
            vector = self.vectors.get((one.direction, layer), self.vectors[one.direction, HOMES[one.direction]])
            condition = None
            if one.when is not None and one.when.layer is not None:
                condition = one.when.layer, self.vectors[one.when.direction, HOMES[one.when.direction]]
            entries.append((layer, one, vector, condition))
        text = data.draw(st.integers(0, 2), label="text")
        windows = (params.extra_args or {}).get(RESOLVED_KEY, {}).get("windows", [])
        steered_as = [(start, digest) for start, _, digest in windows] if steering else None
        for index in range(data.draw(st.integers(1, 2), label="samples")):
            life = Life(self.arrivals, index, params, prompt_len, prompt_len + generated, entries, readout)
            life.text, life.steered_as = text, steered_as
            if readout is not None:
                life.projected = {
                    (name, layer): vector
                    for (name, layer), vector in self.vectors.items()
                    if name in readout.project and layer in readout.layers
                }
                life.traced = {name: (HOMES[name], self.vectors[name, HOMES[name]]) for name in readout.trace}
                life.watched = [
                    (one, HOMES[one.direction], self.vectors[one.direction, HOMES[one.direction]])
                    for one in readout.watches
                ]
                if readout.pool == "max":
                    life.largest = {(name, layer): vector for name, (layer, vector) in life.traced.items()}
                    life.largest |= life.projected
                    life.projected = {}
            self.lives.append(life)
        self.arrivals += 1

    # Steps of the engine.

    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        """Take a few steps. Every other rule ends with this too, or most events would meet an idle engine."""
        for _ in range(data.draw(st.integers(1, 3), label="steps")):
            while not self.lives or (len(self.lives) < RUNNING + 2 and data.draw(st.booleans(), label="arrival")):
                self.arrive(data)
            self.step(data)
            for life in [one for one in self.lives if one.computed == one.total]:
                self.finish(life, over=data.draw(st.integers(0, 1), label="over"))

    def step(self, data: st.DataObject) -> None:
        batch = self.choose_batch(data)
        if not batch:
            self.empty_step()
            return
        new = self.take_up([part.life for part in batch])
        told, self.preempted = self.preempted, set()
        spans = {part.life.request_id: (part.life.computed, part.known + part.drafted) for part in batch}
        ended, self.ended = self.ended, []
        self.runner.prepare(
            [(part.life.request_id, part.life.computed, part.known + part.drafted) for part in batch],
            new=[SimpleNamespace(req_id=life.request_id, sampling_params=life.params) for life in new],
            preempted=told,
            drafts={part.life.request_id: [0] * part.drafted for part in batch if part.drafted},
            blocks=self.sums.schedule(spans, ended),
        )
        tokens = [
            (part.life, part.life.computed + i, i >= part.known + part.right)
            for part in batch
            for i in range(part.known + part.drafted)
        ]
        padding = data.draw(st.integers(0, PADDED - len(tokens)), label="padding")
        contents = [life.content(position, is_wrong) for life, position, is_wrong in tokens]
        contents += [CONTENT[-1 - row] for row in range(padding)]
        self.check_streams(tokens, np.stack(contents))
        self.check_marks(batch)
        for part in batch:
            part.life.computed += part.known + part.right
            part.life.has_sums |= part.life.computed >= part.life.prompt_len
            part.life.drafted = part.drafted
            part.life.steps = (*part.life.steps[-1:], (part.known, part.right))
        if data.draw(st.booleans(), label="asked"):  # asking collects traces, which must happen unasked too
            self.check_readouts()

    def choose_batch(self, data: st.DataObject) -> list[Scheduled]:
        seats, left = RUNNING - sum(life.running for life in self.lives), TOKENS
        batch = []
        for life in data.draw(st.permutations(self.lives), label="order"):
            remaining = life.total - life.computed
            if (
                not remaining
                or not left
                or (not life.running and not seats)
                or not data.draw(st.integers(0, 4), label="in")
            ):
                continue
            if not life.running:
                seats -= 1
                # The prefix cache may have some of it, of one that comes back generated tokens too.
                life.computed = 0
                most = (
                    0
                    if life.left_to_sum
                    else min(remaining - 1, life.first_read, remaining if life.started else life.prompt_len - 1)
                )
                life.computed = data.draw(st.integers(0, most), label="cached")
                self.begin(data, life)
            elif (
                life.computed
                and not life.drafted
                and remaining > 1
                and not life.left_to_sum
                and (data.draw(st.integers(0, 30)) == 30)
            ):
                life.computed += 1  # cached KV in place of a token: no engine should do this, but one could
                life.has_gap = life.computed > life.first_read
            remaining = life.total - life.computed
            known = data.draw(st.integers(1, min(life.left_to_sum or remaining, left)), label="tokens")
            left -= known
            drafted = right = 0
            if life.computed + known >= life.prompt_len and not life.left_to_sum:  # else a known token follows
                drafted = data.draw(st.integers(0, min(DRAFTS, left, remaining - known)), label="drafts")
                right = data.draw(st.integers(0, drafted), label="right")
                left -= drafted
            batch.append(Scheduled(life, known, drafted, right))
        return batch

    def begin(self, data: st.DataObject, life: Life) -> None:
        """Let it take tokens of its span from the cache too, as far as there are sums of their blocks."""
        readout = (life.params.extra_args or {}).get(RESOLVED_KEY, {}).get("readout")
        if readout is None or not sums_suffice(readout) or life.looks_at_prompt:
            return
        layers = frozenset(readout["layer_indices"])
        reader = Reader(life.hashes(BLOCK), readout["first"], readout["end"], life.prompt_len, layers)
        most = (life.total if life.started else life.prompt_len) - 1
        reach = min(self.sums.reach(reader, most), most)
        if reach > life.first_read and data.draw(st.integers(0, 3), label="from sums"):
            life.computed = data.draw(st.integers(0, reach // BLOCK), label="cached blocks") * BLOCK
        if life.computed > life.first_read:
            life.steps = ((0, 1),)  # the row of the token before has not been written
            Schedule.num_loaded += 1
        assert self.sums.begin(life.request_id, reader, life.computed)

    def take_up(self, batch: list[Life]) -> list[Life]:
        """Give the lives of a step their seats and trace columns; returns those that are new to the worker."""
        taken = self.traced_pairs()
        new = [life for life in batch if not life.started]
        for life in new:
            life.has_columns = len(taken | life.columns) <= SETTINGS.trace_columns
            taken |= life.columns if life.has_columns else set()
        for life in batch:
            life.started = life.running = True
            self.untold.discard(life.request_id)
        if sum(life.running and life.readout is not None for life in self.lives) + len(self.untold) > RUNNING:
            for life in self.lives:
                life.may_fail |= life not in batch
        return new

    def empty_step(self) -> None:
        """A step without tokens prepares nothing: the worker does not hear of preempted requests, and keeps their sums.

        If all other requests then need sums, one that is not in the step may lose its own, and must report that.
        """
        self.untold |= {life.request_id for life in self.lives if life.request_id in self.preempted and life.readout}
        self.preempted = set()

    @rule(data=st.data(), rows=st.integers(1, PADDED))
    def a_dummy_pass(self, data: st.DataObject, rows: int) -> None:
        contents = CONTENT[-rows:]
        self.runner._dummy_run(contents)
        for got, expected in zip(self.runner.streams, plain_streams(contents), strict=True):
            assert torch.equal(got, expected), "a pass that no request stands behind was steered"
        # An op that ignores the flags follows these tables alone, and overwrites the trace.
        buffers = self.runner.steering.buffers
        for buffer_TD in (buffers.trace_TK, *buffers.rows_L_TD):
            buffer_TD[:rows] = torch.nan
        for table, untouched in ((buffers.row_of_token, -1), (buffers.segment_A2, 0), (buffers.keep_A, 1)):
            assert (table == untouched).all()
        self.check_readouts()
        self.go_on(data)

    @precondition(lambda self: any(life.running and not life.has_gap for life in self.lives))
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        life = data.draw(st.sampled_from([one for one in self.lives if one.running and not one.has_gap]))
        life.running, life.computed, life.drafted = False, 0, 0
        self.preempted.add(life.request_id)
        if data.draw(st.booleans(), label="untold"):
            self.empty_step()
        self.go_on(data)

    @precondition(lambda self: any(life.started for life in self.lives))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.finish(data.draw(st.sampled_from([one for one in self.lives if one.started])), over=0)
        self.go_on(data)

    def finish(self, life: Life, over: int) -> None:
        """``over``: asynchronous scheduling has computed one token more than belong to the sample."""
        self.end(life)
        if life.running:
            computed = max(life.computed - over, min(life.computed, life.prompt_len))
            answer = self.collected(life, computed)
            if computed < life.computed and answer is not None and "the last token of the sample" in str(answer):
                assert life.readout is not None
                assert life.readout.pool == "last"
                assert not life.has_row_before_last
            else:
                self.check_readout(life, answer, computed)

    @rule(data=st.data())
    def only_plain_requests_go_on(self, data: st.DataObject) -> None:
        for life in [one for one in self.lives if one.started and one.params.extra_args]:
            self.end(life)
        self.go_on(data)

    def end(self, life: Life) -> None:
        self.lives.remove(life)
        self.preempted.discard(life.request_id)
        self.untold.discard(life.request_id)
        self.ended.append(life.request_id)
        self.runner._on_request_state_removed(life.request_id, None)

    # Expected results.

    def traced_pairs(self) -> set[tuple[int, tuple[float, ...]]]:
        return {column for life in self.lives if life.started and life.has_columns for column in life.columns}

    def check_streams(self, tokens: list[tuple[Life, int, bool]], contents: Any) -> None:
        self.runner.forward(contents)
        plain = plain_streams(contents)
        expected = [life.stream(position, is_wrong) for life, position, is_wrong in tokens]
        steered_from = [life.first_steered_block(position) for life, position, _ in tokens]
        names = [f"{life.request_id} at {position} of prompt {life.prompt_len}" for life, position, _ in tokens]
        for block in range(BLOCKS):
            got, untouched = self.runner.streams[block], plain[block]
            off = np.abs(got[: len(tokens)].numpy() - np.stack([streams[block] for streams in expected])).max(axis=1)
            assert (off < TOLERANCE).all(), f"{names[int(off.argmax())]}, after block {block}: off by {off.max():.3g}"
            for row, first in enumerate(steered_from):
                assert block >= first or torch.equal(got[row], untouched[row]), f"{names[row]}: touched"
            assert torch.equal(got[len(tokens) :], untouched[len(tokens) :]), "padding was steered"

    def check_marks(self, batch: list[Scheduled]) -> None:
        """The step shows the projections of the generated tokens of each request with a stop, wrong drafts' too."""
        start = self.runner.steering.start_reading_marks()
        marks = None if start is None else start()
        expected, unwatched = {}, []
        for part in batch:
            life = part.life
            if life.readout is None or life.readout.stop is None:
                continue
            if not life.has_columns:
                unwatched.append(life.request_id)
                continue
            first, end = max(life.computed, life.prompt_len), life.computed + part.known + part.drafted
            _, layer, vector = life.watched[0]
            known = life.computed + part.known + part.right
            values = [life.stream(position, position >= known)[layer] @ vector for position in range(first, end)]
            if values:
                expected[life.request_id] = first, values
        told = {} if marks is None else {one.request_id: (one.position, one.values) for one in marks.watching}
        assert set(told) == set(expected)
        for request_id, (first, values) in expected.items():
            assert told[request_id][0] == first
            np.testing.assert_allclose(told[request_id][1], values, rtol=0, atol=TOLERANCE, err_msg=request_id)
        assert sorted([] if marks is None else marks.unwatched) == sorted(unwatched)

    def check_readouts(self) -> None:
        for life in self.lives:
            if life.running:
                self.check_readout(life, self.collected(life, life.computed), life.computed)
            elif life.request_id not in self.preempted | self.untold:
                assert self.collected(life, life.computed) is None, "what was preempted still holds its sums"

    def collected(self, life: Life, computed: int) -> dict[str, Any] | None:
        (answer,) = rpc.collect(self.worker, [(life.external_id, life.index, computed)])
        if answer is not None:
            assert answer.pop("proof") == "parity"
        return answer

    def check_readout(self, life: Life, answer: dict[str, Any] | None, computed: int) -> None:
        if life.readout is None:
            assert answer is None
            return
        if life.may_fail and (answer is None or "error" in answer):
            return
        assert answer is not None
        if life.has_gap:
            assert "were not seen" in answer["error"]
            return
        whole = life.span(life.total)
        if whole and whole[-1] < life.prompt_len and computed <= whole[-1]:
            assert answer == {"error": f"{computed} of {whole[-1] + 1} prompt tokens were computed"}
            return
        positions = life.span(computed)
        assert answer["num_tokens"] == len(positions)
        pooled_at = positions[-1:] if life.readout.pool == "last" else positions
        nothing = [np.full(SIZE, np.nan)]
        means = {
            layer: np.mean([life.stream(position)[layer] for position in pooled_at] or nothing, axis=0)
            for layer in life.readout.layers
        }
        stored = {layer: np.frombuffer(rows, np.float32).reshape(-1, size) for layer, size, rows in answer["rows"]}
        assert set(stored) == (set(life.readout.layers) if life.readout.pool == "rows" else set())
        for layer, rows_ND in stored.items():
            expected_ND = np.array([life.stream(position)[layer] for position in positions]).reshape(-1, SIZE)
            np.testing.assert_allclose(rows_ND, expected_ND, rtol=0, atol=TOLERANCE, err_msg=life.request_id)
        if life.readout.vectors and life.readout.pool not in ("max", "rows"):
            mean_LD = np.frombuffer(answer["pooled"], np.float32).reshape(len(life.readout.layers), SIZE)
            expected = np.stack([means[layer] for layer in life.readout.layers])
            np.testing.assert_allclose(mean_LD, expected, rtol=0, atol=TOLERANCE, err_msg=life.request_id)
        else:
            assert answer["pooled"] is None
        projections = {(name, layer): value for name, layer, value in answer["projections"]}
        assert set(projections) == set(life.projected)
        for (name, layer), value in projections.items():
            expected_value = means[layer] @ life.projected[name, layer]
            np.testing.assert_allclose(value, expected_value, rtol=0, atol=TOLERANCE, err_msg=name)
        assert (answer["trace_error"] is None) == life.has_columns
        largest = {(name, layer): (value, position) for name, layer, value, position in answer["max"]}
        assert set(largest) == (set(life.largest) if life.has_columns else set())
        for (name, layer), (value, position) in largest.items():
            values_N = [life.stream(one)[layer] @ life.largest[name, layer] for one in positions]
            np.testing.assert_allclose(value, max(values_N, default=np.nan), rtol=0, atol=TOLERANCE, err_msg=name)
            assert position in positions if positions else position == -1
            assert not positions or values_N[positions.index(position)] > max(values_N) - TOLERANCE
        if life.readout.held and life.has_columns:
            assert answer["held"] == life.held(positions)
        else:
            assert (answer["held"] is not None) == life.readout.held
        held = [life.crossing(*one, computed) for one in life.watched] if life.has_columns else []
        has_stop = life.readout.stop is not None
        for field, truth in (("stopped", held[:has_stop]), ("flags", held[has_stop:])):
            crossings = [one for one in truth if one is not None]
            assert [position for _, _, position, _ in answer[field]] == [position for position, _ in crossings]
            values = [value for *_, value in answer[field]]
            np.testing.assert_allclose(values, [value for _, value in crossings], rtol=0, atol=TOLERANCE)
        traces = {name: np.frombuffer(values, np.float32) for name, values in answer["trace"]}
        assert set(traces) == (set(life.traced) if life.has_columns else set())
        for name, values in traces.items():
            layer, vector = life.traced[name]
            expected_values = [life.stream(position)[layer] @ vector for position in positions]
            np.testing.assert_allclose(values, expected_values, rtol=0, atol=TOLERANCE, err_msg=name)

    def teardown(self) -> None:
        """Nothing has leaked: the full number of requests can still be read and traced at once."""
        for life in list(self.lives):
            self.end(life)
        planner = self.runner.steering.planner
        assert not planner.requests
        assert not planner.poolings
        assert not planner.columns
        assert not len(planner._prompt_sums)
        assert not self.runner.steering.buffers._parked
        readout = Readout(HOOKED, span="all", trace=["a", "b"])
        spec = RequestSpec((), readout)
        lives = []
        for _ in range(RUNNING):
            resolved = self.admission.resolve(f"request-{self.arrivals}", spec, 4)
            params = SimpleNamespace(stop=[], extra_args={WIRE_KEY: spec.dumps(), RESOLVED_KEY: resolved.dump()})
            lives.append(Life(self.arrivals, 0, params, 4, 8, [], readout))
            lives[-1].traced = {name: (HOMES[name], self.vectors[name, HOMES[name]]) for name in readout.trace}
            self.arrivals += 1
        self.runner.prepare(
            [(life.request_id, 0, 5) for life in lives],
            new=[SimpleNamespace(req_id=life.request_id, sampling_params=life.params) for life in lives],
            preempted=set(),
        )
        self.runner.forward(np.stack([life.content(position) for life in lives for position in range(5)]))
        for life in lives:
            self.check_readout(life, self.collected(life, 5), 5)


def test_every_token_and_readout_is_exact_over_any_schedule() -> None:
    Schedule.num_loaded = 0
    run_state_machine_as_test(Schedule, settings=hypothesis_settings(max_examples=25, stateful_step_count=25))
    assert Schedule.num_loaded > 2, "hardly any reader began within its span"


def test_a_sum_that_began_again_is_not_taken_for_the_equally_long_one_before() -> None:
    """The worker did not hear of the preemption; the drafts were wrong before it and are right after it."""
    state = Schedule()
    spec = RequestSpec((), Readout((1,), span="all", skip_first=2))
    resolved = state.admission.admit("request-0", spec, 3)
    params = SimpleNamespace(extra_args={WIRE_KEY: spec.dumps(), RESOLVED_KEY: resolved.dump()}, stop=[])
    life = Life(0, 0, params, 3, 8, [], spec.readout)
    new = [SimpleNamespace(req_id=life.request_id, sampling_params=params)]
    for chunks, are_right in (([(0, 5, 2)], False), ([(0, 1, 0), (1, 4, 2)], True)):
        for computed, scheduled, drafted in chunks:
            known = computed + scheduled - drafted
            drafts = {life.request_id: [0] * drafted} if drafted else {}
            state.runner.prepare([(life.request_id, computed, scheduled)], new, drafts=drafts)
            positions = range(computed, computed + scheduled)
            state.runner.forward(np.stack([life.content(one, one >= known and not are_right) for one in positions]))
        for end in (3, 5) if are_right else (3,):
            state.check_readout(life, state.collected(life, end), end)
