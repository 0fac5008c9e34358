"""Assigns each request with a condition over its prompt a row of the sums over prompts. Pure: no vLLM, no torch.

The row holds, for each of the request's probes, the sum over all prompt tokens of what the probe has stored. The prompt
is computed in one or several parts, and every token that such a condition gates comes behind it (or is its last one),
so the sum is complete in time. It is complete for good: a request that comes back from a preemption keeps it, and its
prompt is not summed again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vllm_steer.errors import UnsupportedFeature
from vllm_steer.plan.step_plan import PromptPart, StepPlan


@dataclass(slots=True)
class _Progress:
    """One request's sum.

    Attributes:
        place: its row; None while the sum is put aside.
        next_position: the prompt token to be summed next; the prompt's length once the sum is complete.
    """

    place: int | None
    next_position: int = 0


class PromptSums:
    """The rows of one worker.

    Args:
        max_requests: M, requests that can be scheduled in one step.
    """

    def __init__(self, max_requests: int) -> None:
        self._free = list(range(max_requests - 1, -1, -1))
        self._progress: dict[str, _Progress] = {}

    def lend(self, request_id: str, in_step: Collection[str], plan: StepPlan) -> tuple[int, bool]:
        """The row of a request of this step until ``release``, and whether it is another one than in its last step.

        A request that was preempted keeps its row. So there may be fewer rows than requests; then the sums of one that
        is not in this step are put aside, and taken up again when it is.

        Args:
            request_id: the request.
            in_step: all requests of this step.
            plan: the plan of this step, which gets what is put aside and what is taken up.
        """
        progress = self._progress.get(request_id)
        if progress is not None and progress.place is not None:
            return progress.place, False
        if not self._free:
            absent, its = next(
                (one, its) for one, its in self._progress.items() if its.place is not None and one not in in_step
            )
            assert its.place is not None
            plan.parked.append((absent, its.place))
            self._free.append(its.place)
            its.place = None
        place = self._free.pop()
        if progress is None:
            self._progress[request_id] = _Progress(place)
        else:
            progress.place = place
            plan.returned.append((request_id, place))
        return place, True

    def add(self, request_id: str, prompt_len: int, offset: int, computed: int, scheduled: int, plan: StepPlan) -> None:
        """Add a request's tokens of this step to the parts to sum, as far as they are prompt tokens not summed before.

        Args:
            request_id: a request with a row.
            prompt_len: its prompt tokens.
            offset: its first token in the step.
            computed, scheduled: its tokens are those at the positions [computed, computed + scheduled).
            plan: the plan of this step.

        Raises:
            UnsupportedFeature: the engine has left out a token, or computes generated tokens while the sum is not
                complete. No request can cause this, so the engine stops.
        """
        progress = self._progress[request_id]
        if progress.next_position >= prompt_len:
            return
        if computed == 0:  # the beginning, or again after a preemption
            progress.next_position = 0
        end = computed + scheduled
        if computed != progress.next_position or end > prompt_len:
            raise UnsupportedFeature(
                f"the engine computes the tokens {computed} to {end - 1} of request {request_id!r} where those from "
                f"{progress.next_position} to {prompt_len - 1} were due, and a condition needs the mean over all of "
                "these first; allowed: engines that compute a whole prompt before they generate. Report this, and "
                "leave conditions over the prompt out until then."
            )
        assert progress.place is not None
        plan.prompt_parts.append(PromptPart(progress.place, offset, end - computed, is_first=computed == 0))
        progress.next_position = end

    def complete(self, request_id: str, prompt_len: int) -> int | None:
        """The row of a request whose prompt is summed; None for others, and while the sum is put aside."""
        progress = self._progress.get(request_id)
        return None if progress is None or progress.next_position < prompt_len else progress.place

    def release(self, request_id: str) -> None:
        """Free a request's row; does nothing if it has none."""
        progress = self._progress.pop(request_id, None)
        if progress is not None and progress.place is not None:
            self._free.append(progress.place)

    def __len__(self) -> int:
        """The number of requests with sums."""
        return len(self._progress)
