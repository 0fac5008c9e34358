"""The model names of a server: its own, the aliases, and names that say their steering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_steer.schema.steering import Steering
from vllm_steer.schema.steering_text import parse_steering


@dataclass(frozen=True, slots=True)
class NamedModel:
    """The meaning of one model name.

    Attributes:
        name: the name that vLLM serves the model by, if it serves it.
        alias: the alias that was named; None if none was.
        aliased: the alias's entries.
        asked: the entries that the name itself says.
    """

    name: str
    alias: str | None = None
    aliased: tuple[Steering, ...] = ()
    asked: tuple[Steering, ...] = ()

    @property
    def is_steered(self) -> bool:
        """Whether the name stands for a steering."""
        return bool(self.aliased or self.asked)


@dataclass(frozen=True, slots=True)
class ModelNames:
    """The names that requests may give as their model.

    Attributes:
        base: the name by which vLLM serves its model.
        aliases: alias -> its entries.
        say_steering: whether a name may go on with ``@`` and entries (setting ``steering_in_model_names``), such as
            ``tiny@kind:8@12``; see ``vllm_steer.schema.steering_text``.
    """

    base: str
    aliases: Mapping[str, tuple[Steering, ...]] = field(default_factory=dict)
    say_steering: bool = False

    def read(self, name: str) -> NamedModel:
        """What ``name`` means. A name that nothing here knows stays as it is, for vLLM to answer.

        Raises:
            SpecError: the name goes on with ``@``, and no entries follow.
        """
        entries = self.aliases.get(name)
        if entries is not None:
            return NamedModel(self.base, name, entries)
        if not self.say_steering or "@" not in name or name == self.base:
            return NamedModel(name)
        # A served name may contain an @ itself.
        known = max((one for one in (self.base, *self.aliases) if name.startswith(f"{one}@")), key=len, default=None)
        model = name.partition("@")[0] if known is None else known
        asked = parse_steering(name[len(model) + 1 :], "the model's name")
        entries = self.aliases.get(model)
        return NamedModel(model, asked=asked) if entries is None else NamedModel(self.base, model, entries, asked)
