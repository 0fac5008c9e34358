"""Checks and resolves the readout of a request."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vllm_steer import spans
from vllm_steer.engine.front.hooks import Hooks
from vllm_steer.engine.front.named_entry import NamedEntry, held_by
from vllm_steer.engine.registry import DirectionBook
from vllm_steer.engine.resolved_spec import Projected, ResolvedReadout, Traced, Watched
from vllm_steer.errors import AmbiguousDirection, BadReadout
from vllm_steer.schema.conditions import Watch, bound_of
from vllm_steer.schema.readout import Readout
from vllm_steer.settings import SteerSettings


class ReadoutAdmission:
    """Checks and resolves the readouts of one engine's requests.

    Args:
        settings: the engine's settings.
        hooks: its hooked layers.
        num_stages: pipeline stages.
    """

    def __init__(self, settings: SteerSettings, hooks: Hooks, num_stages: int) -> None:
        self._settings = settings
        self._hooks = hooks
        self._num_stages = num_stages

    def resolve(
        self,
        book: DirectionBook,
        readout: Readout,
        prompt_len: int,
        num_computed: int | None,
        entries: Sequence[NamedEntry],
    ) -> ResolvedReadout:
        """Resolve names to slots and layers to layer indices.

        Args:
            book: the directions.
            readout: what is asked for.
            prompt_len, num_computed: see ``Admission.resolve``.
            entries: the request's entries, whose conditions ``held`` counts.

        Raises:
            BadReadout, BadSpan, UnknownDirection, AmbiguousDirection, LayerNotHooked: the readout is refused.
        """
        indices = [self._hooks.index(layer) for layer in readout.layers]
        project: list[Projected] = []
        for name in readout.project:
            layers = book.layers_of(name)
            shared = sorted(set(layers) & set(readout.layers))
            if not shared:
                raise BadReadout(
                    f"project names {name!r}, which belongs to layers {sorted(layers)}; the readout reads layers "
                    f"{list(readout.layers)}. Add one of its layers to the readout, or leave it out."
                )
            project += [Projected(name, layer, layers[layer].slot) for layer in shared]
        if readout.skip_first and readout.skip_first >= prompt_len:
            has = "no prompt is that long" if prompt_len == sys.maxsize else f"the prompt has {prompt_len} tokens"
            raise BadReadout(
                f"skip_first is {str(readout.skip_first)[:40]} and {has}; allowed: fewer than the prompt has. Lower it."
            )
        first, end = spans.read_run(readout.span, readout.skip_first, prompt_len)
        trace = self._trace(book, readout)
        vectors = readout.vectors and readout.pool not in ("max", "rows")
        if readout.pool == "max":
            known = {(one.name, one.layer) for one in trace}
            trace += [
                Traced(name, self._hooks.index(layer), slot, layer, is_shown=False)
                for name, layer, slot in project
                if (name, layer) not in known
            ]
            project = []
        watch = [self._watched(book, one, is_stop=one is readout.stop) for one in readout.watches]
        conditional = [one for one in entries if one.condition is not None] if readout.held else []
        held = [held_by(one, prompt_len) for one in conditional if one.acts]
        self._check_columns([*trace, *watch], sum(one.gate < 0 for one in held))
        if not readout.layers and not trace and not readout.held:  # the watches alone need no token of the prompt
            first, end = prompt_len, None
        resolved = ResolvedReadout(
            list(readout.layers),
            indices,
            first,
            end,
            project,
            vectors,
            trace,
            readout.pool,
            watch,
            prompt_len,
            held,
            len(conditional) if readout.held else None,
        )
        if resolved.pool == "rows":
            self._check_rows(resolved, prompt_len, num_computed)
        return resolved

    def _watched(self, book: DirectionBook, watch: Watch, *, is_stop: bool) -> Watched:
        direction, layer = self._hooks.look(book, watch)
        if is_stop and self._num_stages > 1:
            raise BadReadout(
                "stop came to an engine with pipeline parallelism, whose last stage alone can end a request; allowed "
                "there: flag. Use it, or start the engine without pipeline parallelism."
            )
        bound, is_above = bound_of(watch)
        return Watched(
            watch.direction, self._hooks.index(layer), direction.slot, layer, is_above, bound, watch.patience, is_stop
        )

    def _trace(self, book: DirectionBook, readout: Readout) -> list[Traced]:
        trace: list[Traced] = []
        for name in readout.trace:
            layers = book.layers_of(name)
            # a trace has one value per token, so it is taken at one layer
            own = sorted(layers) if len(layers) == 1 else sorted(set(layers) & set(self._hooks.index_of))
            if len(own) != 1:
                own = sorted(set(own) & set(readout.layers))
            if len(own) != 1:
                raise AmbiguousDirection(
                    f"trace names {name!r}, which belongs to layers {sorted(layers)}, and the readout reads layers "
                    f"{list(readout.layers)}; allowed: exactly one of its layers among those read. Read one of them."
                )
            trace.append(Traced(name, self._hooks.index(own[0]), layers[own[0]].slot, own[0]))
        return trace

    def _check_rows(self, readout: ResolvedReadout, prompt_len: int, num_computed: int | None) -> None:
        """Refuse a readout that could store more rows than the operator allows."""
        most, layers = self._settings.max_rows, len(readout.layers)
        if not most:
            raise BadReadout(
                "pool 'rows' was asked of an engine with max_rows 0; allowed: the other pools. Start the engine with "
                "steer_config(max_rows=...), the most tokens times layers of one request."
            )
        if prompt_len == sys.maxsize:  # the prompt is not known yet
            return
        end = num_computed if readout.end is None else readout.end
        if end is None:
            raise BadReadout(
                f"pool 'rows' was asked of a span without an end and max_tokens is not set; allowed: up to {most} "
                "rows, tokens times layers. Set max_tokens, or read a span that ends with the prompt."
            )
        tokens = max(end - readout.first, 0)
        if tokens * layers > most:
            what = "lower max_tokens, " if readout.end is None else ""
            raise BadReadout(
                f"pool 'rows' could read {tokens} tokens at {layers} layers, {tokens * layers} rows; allowed: up to "
                f"{most} rows. Read a shorter span or fewer layers, {what}or start the engine with "
                "steer_config(max_rows=...) larger."
            )

    def _check_columns(self, followed: Sequence[Traced | Watched], num_counted: int) -> None:
        distinct = len({(one.layer_index, one.slot) for one in followed}) + num_counted
        if distinct > self._settings.trace_columns:
            raise BadReadout(
                f"{distinct} directions to trace (those of stop and flag too, and with pool 'max' those of project"
                f"{', and with held, conditions on tokens' if num_counted else ''}); "
                f"allowed: {self._settings.trace_columns}. Name fewer, or start the engine with "
                "steer_config(trace_columns=...) larger."
            )
