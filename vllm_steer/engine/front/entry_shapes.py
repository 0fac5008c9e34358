"""The entries of requests, resolved once for all requests that differ in the size of α alone.

Names, layers, operations, spans and conditions are looked up and checked for the first of such requests. For each later
one only the limits are compared with its α, and its α go into tables and digests that are ready but for them. What is
remembered holds for one state of the registry.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

from vllm_steer import spans
from vllm_steer.engine.front.entry_limits import EntryLimits
from vllm_steer.engine.front.entry_resolution import EntryResolution
from vllm_steer.engine.front.named_entry import NamedEntry, content_of
from vllm_steer.engine.registry import DirectionBook
from vllm_steer.engine.resolved_spec import Digest, Window
from vllm_steer.plan.entry_rows import pack
from vllm_steer.schema.steering import Steering

_MOST_ENTRIES = 20_480  # in all shapes that are remembered: 10,000 of one entry, 512 of 40
_ALL_BUT_ALPHA = attrgetter("direction", "layer", "op", "span", "relative", "keep_norm", "low", "high", "when")


class EntryShapes:
    """Finds the shape of a request's entries.

    Args:
        resolution: resolves entries that are not remembered.
        limits: the limits on entries.
    """

    def __init__(self, resolution: EntryResolution, limits: EntryLimits) -> None:
        self._resolution = resolution
        self._limits = limits
        self._remembered: tuple[object, dict[Any, Shape]] = (None, {})
        self._num_entries = 0

    def of(self, book: DirectionBook, steering: Sequence[Steering], prompt_len: int, *, is_counted: bool) -> Shape:
        """The shape of these entries.

        Args:
            book: the directions.
            steering: the entries.
            prompt_len: number of prompt tokens.
            is_counted: whether a readout counts where their conditions hold.

        Raises:
            SteerError: an entry is refused; ``param`` names its place.
        """
        state, shapes = self._remembered
        if state is not book.state:
            # Whoever changes the book gives it another state afterwards, so what was found before is never looked up
            # in the new state.
            shapes = {}
            self._remembered = (book.state, shapes)
            self._num_entries = 0
        # Zeros of ``add`` change nothing, so they have a shape of their own.
        fixed = tuple([None if _is_free(one) else one.alpha for one in steering])
        key = tuple(map(_ALL_BUT_ALPHA, steering)), fixed, is_counted
        shape = shapes.get(key)
        if shape is None or not shape.fits(prompt_len):
            entries, probes = self._resolution.resolve(book, steering, prompt_len)
            shape = Shape(entries, probes, prompt_len, self._limits, is_counted=is_counted)
            if key not in shapes:  # else it takes the place of a shape with as many entries
                self._num_entries += len(steering)
            if self._num_entries > _MOST_ENTRIES:
                shapes.clear()
                self._num_entries = len(steering)
            shapes[key] = shape
        return shape


class Shape:
    """The resolved entries of requests that differ in α alone.

    Args:
        entries: all entries, in the order in which they act, with the α of one of the requests.
        probes: what their conditions at later layers read, by number.
        prompt_len: number of prompt tokens; if no condition looks at the prompt, any request's.
        limits: the limits on entries.
        is_counted: see ``EntryShapes.of``.

    Attributes:
        entries: see above.
        spans: their spans, each once.
        contents: (slot, content hash) of all directions that act or are looked at, each once, sorted.
        looks_at_prompt: whether a condition does.
    """

    def __init__(
        self,
        entries: Sequence[NamedEntry],
        probes: Sequence[NamedEntry],
        prompt_len: int,
        limits: EntryLimits,
        *,
        is_counted: bool,
    ) -> None:
        self.entries = entries
        self.spans = tuple(dict.fromkeys(one.steering.span for one in entries))
        acting = [one for one in entries if one.acts]
        named = (one for entry in acting for one in (entry.direction, entry.condition) if one)
        self.contents = sorted({one.slot: one.content_hash for one in named}.items())
        self._over_prompt = {one.entry.gate for one in acting if one.looks_at_prompt}
        self.looks_at_prompt = bool(self._over_prompt)
        self._probes = probes
        self._prompt_len = prompt_len
        self._limits = limits
        self._is_counted = is_counted
        self._parts: dict[tuple[tuple[int, ...], bool], Part] = {}

    def fits(self, prompt_len: int) -> bool:
        """Whether requests with so many prompt tokens have this shape: a condition over the prompt depends on them."""
        return not self.looks_at_prompt or prompt_len == self._prompt_len

    def windows(self, steering: Sequence[Steering], prompt_len: int) -> list[Window]:
        """The windows of a request of this shape; neighbours differ.

        Args:
            steering: its entries.
            prompt_len: its number of prompt tokens.

        Raises:
            BadSpan: a part of a span has no token with this prompt.
            TooManyEntries, BadAlpha: the entries exceed a limit.
        """
        windows: list[Window] = []
        for start, applying in _windows(self.spans, prompt_len):
            key = applying, self.looks_at_prompt and start < prompt_len
            part = self._parts.get(key)
            if part is None:
                part = self._parts[key] = self._part(*key)
            window = part.window(start, steering)
            if not windows or windows[-1].digest != window.digest:
                windows.append(window)
        self._limits.check_windows(windows)
        return windows

    def _part(self, applying: Sequence[int], is_in_prompt: bool) -> Part:
        covered = {self.spans[number] for number in applying}
        here = [one for one in self.entries if one.acts and one.steering.span in covered]
        probed = {one.entry.gate for one in here if one.probed is not None and not one.looks_at_prompt}
        probed |= self._over_prompt if is_in_prompt else set()
        probes = [self._probes[number] for number in sorted(probed)]
        return Part(here, probes, self._prompt_len, self._limits, is_counted=self._is_counted)


class Part:
    """The entries that apply in a window, ready but for the request's α.

    Args:
        entries: the entries that act there, in order.
        probes: the probes there.
        prompt_len, limits, is_counted: see ``Shape``.
    """

    def __init__(
        self,
        entries: Sequence[NamedEntry],
        probes: Sequence[NamedEntry],
        prompt_len: int,
        limits: EntryLimits,
        *,
        is_counted: bool,
    ) -> None:
        # A probe sees its layer's stream as the entries there leave it, so it comes behind them.
        self._entries = sorted([*entries, *probes], key=attrgetter("layer"))
        self._limits = limits
        self._bounds = limits.bounds(self._entries, [_is_free(one.steering) for one in self._entries])
        packed = pack([one.counted if is_counted else one.entry for one in self._entries])
        number = len(self._entries)
        self._before_a, self._behind_a = packed[: 8 * number], packed[12 * number :]
        self._a = struct.Struct(f"<{number}f")
        self._digest = Digest([content_of(one, prompt_len) for one in entries])
        # Where the a of each entry comes from: an entry of the request, or, for -1, from the shape.
        self._places = [one.place if _is_free(one.steering) else -1 for one in self._entries]
        self._fixed = [(at, self._entries[at].entry.a) for at, place in enumerate(self._places) if place < 0]
        self._of_digest = [at for at, one in enumerate(self._entries) if one.place >= 0] if probes else None

    def window(self, start: int, steering: Sequence[Steering]) -> Window:
        """The window from ``start`` on of a request with these entries.

        Raises:
            TooManyEntries, BadAlpha: they exceed a limit.
        """
        if not self._entries:
            return Window(start, b"", "")
        a_N = self._a_of(steering)
        if not self._bounds.hold(a_N):
            self._check(steering)
        digested = a_N if self._of_digest is None else [a_N[at] for at in self._of_digest]
        packed = self._before_a + self._a.pack(*a_N) + self._behind_a
        return Window(start, packed, self._digest.of(digested))

    def _check(self, steering: Sequence[Steering]) -> None:
        """Check all limits on the entries of a request, for an error that says all about the first that is exceeded.

        Raises:
            TooManyEntries, BadAlpha: they exceed one.
        """
        self._limits.check(
            [
                one if place < 0 else one._replace(steering=steering[place], entry=one.entry._replace(a=a))
                for one, place, a in zip(self._entries, self._places, self._a_of(steering), strict=True)
            ]
        )

    def _a_of(self, steering: Sequence[Steering]) -> list[Any]:
        a_N: list[Any] = [steering[place].alpha for place in self._places]
        for at, fixed in self._fixed:
            a_N[at] = fixed
        return a_N


def _is_free(one: Steering) -> bool:
    """Whether requests of one shape may differ in this entry's α, which then is its a and its multiplier."""
    return bool(one.alpha) and not one.relative and one.op in ("add", "set")


@lru_cache(maxsize=1024)
def _windows(asked: tuple[str, ...], prompt_len: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    return tuple((start, tuple(numbers)) for start, numbers in spans.windows(asked, prompt_len))
