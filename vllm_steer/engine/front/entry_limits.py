"""The limits on what the entries for one token may do together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from math import prod
from operator import attrgetter, mul

from vllm_steer.engine.front.named_entry import NamedEntry
from vllm_steer.engine.resolved_spec import Window
from vllm_steer.errors import BadAlpha, TooManyEntries
from vllm_steer.ops.stream_range import LARGEST_ADDITION, LARGEST_GROWTH
from vllm_steer.settings import SteerSettings

_MOST_TOLD = 3  # entries that a message goes through


Sum = tuple[Sequence[float] | None, Sequence[tuple[int, float]], Sequence[float]]
"""A bounded sum over entries: what |a| of each free one is multiplied with, None for 1; number and term of each fixed
one; the most at each layer."""


class EntryLimits:
    """Refuses entries that exceed the operator's limits or the range of the stream.

    Args:
        settings: the engine's settings.
        dtype: dtype of the residual stream: ``float16``, ``bfloat16`` or ``float32``.
    """

    def __init__(self, settings: SteerSettings, dtype: str) -> None:
        self._settings = settings
        self._dtype = dtype

    def check_windows(self, windows: Sequence[Window]) -> None:
        """Refuse more steered windows than ``max_windows``.

        Raises:
            TooManyEntries: there are more.
        """
        if len(windows) <= self._settings.max_windows:
            return
        steered = sum(bool(window.packed) for window in windows)
        if steered > self._settings.max_windows:
            raise TooManyEntries(
                f"the spans cut the request into {steered} windows that are steered each in its own way; allowed: "
                f"{self._settings.max_windows}. Use fewer spans, or start the engine with "
                "steer_config(max_windows=...) larger."
            )

    def check(self, entries: Sequence[NamedEntry]) -> None:
        """Refuse entries for one token, sorted by layer, that together exceed a limit at any layer.

        Raises:
            TooManyEntries, BadAlpha: they do.
        """
        growth = _growth(entries)
        for layer, group in groupby(entries, attrgetter("layer")):
            here = list(group)
            if len(here) > self._settings.max_entries:
                raise TooManyEntries(
                    f"{len(here)} entries at layer {layer}; allowed: {self._settings.max_entries}. Add the "
                    "directions up, or start the engine with steer_config(max_entries=...) larger."
                )
            self._check_alpha(layer, here)
            self._check_residual_norm(layer, here)
            self._check_range(layer, here, growth)

    def bounds(self, entries: Sequence[NamedEntry], is_free: Sequence[bool]) -> Bounds:
        """What ``check`` compares, for other a of the free entries.

        Args:
            entries: entries for one token, sorted by layer.
            is_free: of each, whether its a may be another. Then |a| is its multiplier, and nothing else depends on a.

        Raises:
            BadAlpha: they exceed the range of the stream whatever these a are.
        """
        settings = self._settings
        layers = [(layer, len(list(group))) for layer, group in groupby(entries, attrgetter("layer"))]
        most_added = LARGEST_ADDITION[self._dtype] / _growth(entries)
        fixed = [(at, one) for at, one in enumerate(entries) if not is_free[at]]
        counted = [(at, settings.counted(one.steering, one.layer)) for at, one in fixed]
        added = [(at, one.added * one.direction.peak) for at, one in fixed]
        sums: list[Sum] = [
            (None, counted, [settings.max_alpha] * len(layers)),
            ([one.direction.peak for one in entries], added, [most_added] * len(layers)),
        ]
        if settings.max_alpha_residual_norm is not None:
            norms = settings.residual_norms
            lengths = [
                (at, one.multiplier * one.direction.length * (norms[one.layer] if one.steering.is_multiple else 1.0))
                for at, one in fixed
            ]
            most = [settings.max_alpha_residual_norm * norms[layer] for layer, _ in layers]
            sums.append(([one.direction.length for one in entries], lengths, most))
        numbers = [number for _, number in layers]
        return Bounds(numbers, sums, has_room=max(numbers, default=0) <= settings.max_entries)

    def _check_alpha(self, layer: int, here: Sequence[NamedEntry]) -> None:
        total = sum(self._settings.counted(entry.steering, layer) for entry in here)
        most = self._settings.max_alpha
        if total > most:
            is_plain = len(here) == 1 and here[0].steering.alpha == here[0].entry.a and total == abs(here[0].entry.a)
            got = f"alpha is {here[0].entry.a:g}" if is_plain else f"|alpha| adds up to {total:g}"
            if not is_plain and any(entry.steering.is_multiple or entry.steering.op == "clamp" for entry in here):
                got = f"what the entries count adds up to {total:g} ({self._counts(layer, here)})"
            raise BadAlpha(
                f"{got} at layer {layer}; allowed: up to {most:g}, over all entries there together. Use smaller ones, "
                "or start the engine with steer_config(max_alpha=...) larger."
            )

    def _counts(self, layer: int, here: Sequence[NamedEntry]) -> str:
        """How each entry comes to what it counts, as ``SteerSettings.counted`` computes it."""
        norm = self._settings.residual_norms.get(layer)
        times = (
            ", in lengths of the stream, whose mean is not set in residual_norms"
            if norm is None
            else f" times {norm:g}, the layer's mean residual norm"
        )
        return "; ".join(
            f"{_quantity(one)} = {one.multiplier:g}{times if one.steering.is_multiple else ''}"
            for one in here[:_MOST_TOLD]
        ) + _rest(here)

    def _check_residual_norm(self, layer: int, here: Sequence[NamedEntry]) -> None:
        multiple = self._settings.max_alpha_residual_norm
        if multiple is None:
            return
        norm = self._settings.residual_norms[layer]
        total = sum(
            entry.multiplier * entry.direction.length * (norm if entry.steering.is_multiple else 1.0) for entry in here
        )
        if total > multiple * norm:
            raise BadAlpha(
                f"the entries at layer {layer} can add a vector of length {total:g} ({_lengths(here, norm)}), "
                f"{total / norm:.3g} times the mean residual norm there, {norm:g}; allowed: "
                f"up to {multiple:g} times, that is {multiple * norm:g}. Use smaller ones, or start the engine with "
                "steer_config(max_alpha_residual_norm=...) larger."
            )

    def _check_range(self, layer: int, here: Sequence[NamedEntry], growth: float) -> None:
        most = LARGEST_ADDITION[self._dtype] / growth
        total = sum(entry.added * entry.direction.peak for entry in here)
        if total > most:
            raise BadAlpha(
                f"the entries at layer {layer} can add {total:.6g} to an element of the {self._dtype} stream; allowed: "
                f"up to {most:g} (|alpha| times the direction's largest element, over all entries there), so that the "
                "stream stays finite. Use smaller ones"
                + (", or start the engine with dtype='bfloat16'." if self._dtype == "float16" else ".")
            )


class Bounds:
    """The limits on the entries for one token, as numbers: the most that sums over the entries of a layer may be.

    Args:
        numbers: how many entries each layer has.
        sums: the sums.
        has_room: whether no layer has more entries than it may.
    """

    def __init__(self, numbers: Sequence[int], sums: Sequence[Sum], *, has_room: bool) -> None:
        ends = list(accumulate(numbers))
        self._layers = [slice(end - number, end) for end, number in zip(ends, numbers, strict=True)]
        self._sums = sums
        self._has_room = has_room

    def hold(self, a_N: Sequence[float]) -> bool:
        """Whether all limits are kept with these a; those of fixed entries do not count."""
        if not self._has_room:
            return False
        sizes = list(map(abs, a_N))
        for factors, fixed, most_L in self._sums:
            terms = list(sizes if factors is None else map(mul, sizes, factors))
            for at, term in fixed:
                terms[at] = term
            for layer, most in zip(self._layers, most_L, strict=True):
                if sum(terms[layer]) > most:
                    return False
        return True


def _quantity(one: NamedEntry) -> str:
    """What of an entry is bounded, in words."""
    named, op = repr(one.steering.direction), one.steering.op
    what = {"scale": "|alpha - 1|", "clamp": "the larger of |low| and |high|"}.get(op, "|alpha|")
    kind = "relative " if one.steering.relative else ""
    return f"{kind}{op} of {named}: {what}"


def _lengths(here: Sequence[NamedEntry], norm: float) -> str:
    """How each entry comes to the length of the vector that it can add."""
    return "; ".join(
        f"{_quantity(one)} = {one.multiplier:g} times {one.direction.length:g}, the direction's length"
        + (f", times {norm:g}, the layer's mean residual norm" if one.steering.is_multiple else "")
        for one in here[:_MOST_TOLD]
    ) + _rest(here)


def _rest(here: Sequence[NamedEntry]) -> str:
    return f"; and {len(here) - _MOST_TOLD} more" if len(here) > _MOST_TOLD else ""


def _growth(entries: Sequence[NamedEntry]) -> float:
    """The most by which entries for one token can multiply the length of its stream, at all layers together.

    Raises:
        BadAlpha: it is more than ``LARGEST_GROWTH``.
    """
    growth = prod(entry.growth for entry in entries)
    if growth > LARGEST_GROWTH:
        raise BadAlpha(
            f"the entries can make a token's stream {growth:.3g} times as long, over all layers; allowed: up to "
            f"{LARGEST_GROWTH:.3g} times (1 + |alpha| for each that is relative, |alpha| for each scale), so that it "
            "stays finite. Use smaller ones."
        )
    return growth
