"""Rows of the last few tokens of requests that may end at a stop string, to subtract surplus tokens from the sums.

The front end finds a stop string when it turns tokens into text, by default in another process than the engine's. The
engine continues until the abort arrives, so the sums contain some tokens too many, usually one or two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import torch

from vllm_steer.plan.batch_plan import PoolingState

MAX_TOKENS_BACK = 8
"""How many tokens can be subtracted, the last one included. Each costs one float32 row per hooked layer and request."""


class TailRows:
    """The rows that earlier forward passes wrote to ``SteerBuffers.last_L_AD``, on the device.

    Args:
        last_L_AD: the row of the last token in each accumulator, one (A, D) float32 tensor per layer.
    """

    def __init__(self, last_L_AD: Sequence[torch.Tensor]) -> None:
        self._last_L_AD = last_L_AD
        # (request, position of its token) -> place, and the rows (L, N, D); the last pass's are still in last_L_AD
        self._passes: deque[tuple[dict[tuple[str, int], int], torch.Tensor]] = deque(maxlen=MAX_TOKENS_BACK - 1)

    def keep(self, states: Mapping[str, PoolingState]) -> None:
        """Copy the rows that the last forward pass wrote for these requests; never waits for the device.

        Args:
            states: request id -> the state of its sum in that pass.
        """
        if not states:
            self._passes.clear()
            return
        device = self._last_L_AD[0].device
        accumulators_N = torch.tensor([state.accumulator for state in states.values()]).to(device, non_blocking=True)
        places = {(request_id, state.next_position - 1): n for n, (request_id, state) in enumerate(states.items())}
        self._passes.append((places, torch.stack([last_AD[accumulators_N] for last_AD in self._last_L_AD])))

    def before(self, request_id: str, position: int) -> list[torch.Tensor]:
        """(L, D) rows of the request's tokens right before ``position``, oldest first, as far as they were kept.

        Tokens that were computed together with a later one (a chunk of a prompt, accepted drafts) have no row.
        """
        rows_LD: list[torch.Tensor] = []
        for places, rows_LND in reversed(self._passes):
            place = places.get((request_id, position - 1 - len(rows_LD)))
            if place is not None:
                rows_LD.append(rows_LND[:, place])
        return rows_LD[::-1]
