"""A setting: the fields held fixed while scenario and α vary. One row of dose-response panels, one filter choice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class _Condition(Protocol):
    @property
    def model(self) -> str: ...
    @property
    def layer(self) -> int: ...
    @property
    def direction(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def span(self) -> str: ...


@dataclass(frozen=True)
class Setting:
    """Model, layer, direction, op and span."""

    model: str
    layer: int
    direction: str
    op: str
    span: str

    @classmethod
    def of(cls, row: _Condition) -> Setting:
        """The setting of any object with these five fields: a condition's scores, a success rate, a sample group."""
        return cls(row.model, row.layer, row.direction, row.op, row.span)


@dataclass(frozen=True)
class SettingNames:
    """Names settings with the fewest fields that distinguish the settings of a run."""

    show_model: bool
    show_direction: bool
    show_op: bool

    @classmethod
    def for_settings(cls, settings: Iterable[Setting]) -> SettingNames:
        """Show model, direction, or op and span only where `settings` differ in them."""
        settings = list(settings)
        return cls(
            show_model=len({setting.model for setting in settings}) > 1,
            show_direction=len({setting.direction for setting in settings}) > 1,
            show_op=len({(setting.op, setting.span) for setting in settings}) > 1,
        )

    def __call__(self, setting: Setting) -> str:
        """The name: `layer 16`, or as long as needed: `layer 16, demo-model, empathy-pca (set, generated)`."""
        parts = [f"layer {setting.layer}"]
        if self.show_model:
            parts.append(setting.model)
        if self.show_direction:
            parts.append(setting.direction)
        return ", ".join(parts) + (f" ({setting.op}, {setting.span})" if self.show_op else "")
