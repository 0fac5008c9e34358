"""The answers of ``collect`` with a device whose copies to the host arrive late, and the number of its copies.

The device is a fake: its copies hold NaN, and its events have not happened, until it is synchronised.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.runner_stand_ins import BLOCKS, SIZE, StandInRunner, StandInWorker, plain_streams
from vllm_steer import Direction, Readout
from vllm_steer.engine.front.admission import Admission
from vllm_steer.engine.registry import DirectionRegistry, bank_writes
from vllm_steer.engine.resolved_spec import RESOLVED_KEY
from vllm_steer.engine.worker import rpc, traces
from vllm_steer.engine.worker.readout_copies import ReadoutFlow, Summed
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.wire import WIRE_KEY
from vllm_steer.settings import SteerSettings

LAYER, PROMPT_LEN = 1, 3
SETTINGS = SteerSettings(layers=(LAYER,), trace_columns=1)
KIND = Direction("kind", LAYER, np.random.default_rng(0).standard_normal(SIZE)).normalised()
CONTENTS = np.random.default_rng(1).standard_normal((PROMPT_LEN + 1, BLOCKS + 1, SIZE)).astype(np.float32)


class LateDevice:
    """Keeps every copy back until ``synchronize``; ``patch`` puts it in place of the accelerator."""

    def __init__(self) -> None:
        self.late: list[tuple[torch.Tensor, torch.Tensor]] = []

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        host = torch.full_like(source, torch.nan)
        self.late.append((host, source.clone()))
        return host

    def synchronize(self) -> None:
        for host, source in self.late:
            host.copy_(source)
        self.late.clear()

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def start_copy(values_TK: torch.Tensor) -> tuple[torch.Tensor, Any]:
            return self.copy(values_TK), lambda: not self.late

        monkeypatch.setattr(traces, "start_copy", start_copy)
        monkeypatch.setattr(torch.accelerator, "synchronize", self.synchronize)


@pytest.fixture
def runner() -> StandInRunner:
    """A runner that has computed the prompt of a request with a readout of all its tokens."""
    admission, runner = Admission(SETTINGS, SIZE), StandInRunner(SETTINGS)
    runner.load_model()
    runner.steering.write_directions(admission.registry.register([KIND]))  # type: ignore[attr-defined]
    spec = RequestSpec((), Readout([LAYER], span="all", project=["kind"], trace=["kind"]))
    extra = {WIRE_KEY: spec.dumps(), RESOLVED_KEY: admission.resolve("r", spec, PROMPT_LEN).dump()}
    new = SimpleNamespace(req_id="r-0", sampling_params=SimpleNamespace(extra_args=extra, stop=[]))
    runner.prepare([("r-0", 0, PROMPT_LEN)], new=[new])
    return runner


def collected(runner: StandInRunner, tokens: int, device: str = "cpu") -> dict[str, Any]:
    worker = StandInWorker(runner)
    worker.device = torch.device(device)
    (answer,) = rpc.collect(worker, [("r", 0, tokens)])
    return answer


def check(answer: dict[str, Any], tokens: int) -> None:
    stream_TD = plain_streams(CONTENTS)[LAYER][:tokens].double().numpy()
    mean_D = np.frombuffer(answer["pooled"], np.float32)
    # float32 sums of a few values around 2
    np.testing.assert_allclose(mean_D, stream_TD.mean(axis=0), atol=1e-5)
    assert answer["projections"][0][2] == pytest.approx(float(mean_D @ KIND.vector), abs=1e-5)
    assert answer["trace_error"] is None
    ((_, trace),) = answer["trace"]
    np.testing.assert_allclose(np.frombuffer(trace, np.float32), stream_TD @ KIND.vector, atol=1e-5)


def test_a_readout_is_waited_for_where_its_request_has_not_been_removed_yet(
    runner: StandInRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the last step, when vLLM has no further step to tell the runner of the end."""
    LateDevice().patch(monkeypatch)
    runner.forward(CONTENTS[:PROMPT_LEN])
    check(collected(runner, PROMPT_LEN, device="cuda"), PROMPT_LEN)


def test_a_readout_is_waited_for_where_its_request_has_just_been_removed(
    runner: StandInRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    LateDevice().patch(monkeypatch)
    runner.forward(CONTENTS[:PROMPT_LEN])
    runner._on_request_state_removed("r-0", None)
    check(collected(runner, PROMPT_LEN, device="cuda"), PROMPT_LEN)


def test_a_readout_is_copied_once_however_often_it_is_collected(
    runner: StandInRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Summed] = []
    take = ReadoutFlow.take
    monkeypatch.setattr(ReadoutFlow, "take", lambda flow, samples: taken.extend(samples) or take(flow, samples))
    runner.forward(CONTENTS[:PROMPT_LEN])
    for _ in range(2):
        check(collected(runner, PROMPT_LEN), PROMPT_LEN)
    runner._on_request_state_removed("r-0", None)
    check(collected(runner, PROMPT_LEN), PROMPT_LEN)
    assert len(taken) == 1


def test_what_has_arrived_lets_go_of_the_memory_that_it_was_copied_into(
    runner: StandInRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator that is pinned memory, which the next readouts reuse."""
    device = LateDevice()
    device.patch(monkeypatch)
    runner.forward(CONTENTS[:PROMPT_LEN])
    runner._on_request_state_removed("r-0", None)
    runner.prepare([])
    copied = [host.data_ptr() for host, _ in device.late]
    readout = runner.steering.store.get("r", 0)  # type: ignore[attr-defined]
    assert readout.sums_LND.data_ptr() in copied
    runner.prepare([])
    assert readout.sums_LND.data_ptr() in copied, "it has not arrived"
    device.synchronize()
    runner.prepare([])
    assert readout.sums_LND.data_ptr() not in copied
    check(collected(runner, PROMPT_LEN), PROMPT_LEN)


def test_a_readout_that_was_collected_too_early_is_copied_again(runner: StandInRunner) -> None:
    runner.forward(CONTENTS[:PROMPT_LEN])
    check(collected(runner, PROMPT_LEN), PROMPT_LEN)
    runner.prepare([("r-0", PROMPT_LEN, 1)])
    runner.forward(CONTENTS[PROMPT_LEN:])
    check(collected(runner, PROMPT_LEN + 1), PROMPT_LEN + 1)
    runner._on_request_state_removed("r-0", None)
    check(collected(runner, PROMPT_LEN + 1), PROMPT_LEN + 1)


def test_the_vectors_of_one_message_are_written_to_their_slots_and_known_by_their_hashes(
    runner: StandInRunner,
) -> None:
    registry = DirectionRegistry(SETTINGS.max_directions, SIZE, busy={0, 1, 5})
    drawn = np.random.default_rng(2).standard_normal((7, SIZE))
    writes = registry.register([Direction(f"d{number}", LAYER, vector_D) for number, vector_D in enumerate(drawn)])
    ((slots, vectors),) = bank_writes(writes)
    assert slots == [2, 3, 4, 6, 7, 8, 9]
    bank_SD = runner.steering.buffers.bank_SD
    before, version = bank_SD.clone(), bank_SD._version
    assert rpc.write(StandInWorker(runner), slots, vectors) == 7
    assert np.array_equal(bank_SD[slots].numpy(), drawn.astype(np.float32))
    others = [slot for slot in range(len(bank_SD)) if slot not in slots]
    assert torch.equal(bank_SD[others], before[others])
    assert bank_SD._version > version, "the op keeps what it has worked out from the vectors before"
    known = runner.steering._contents
    assert [known[slot] for slot in slots] == [direction.content_hash for _, direction in writes]
