"""The one way to change vLLM: every function replaced and every attribute written is declared here, with its reason.

``docs/patches.md``, the list that ``make compat`` checks and the tests are derived from these declarations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_MARK = "vllm_steer_patch"


@dataclass(frozen=True, eq=False)
class Patch:
    """A function of vLLM's that one of ours replaces and calls, or a method that we add to a class of vLLM's.

    A function is replaced in its class or module (``install``), or on single objects (``install_on``).

    Attributes:
        owners: the classes, or modules, that hold the function by its name.
        name: its name there.
        wrap: makes our function from vLLM's, or from None for a method that we add. On a single object it also takes
            the context that ``install_on`` was given.
        takes: the parameters of vLLM's function that we rely on, in the form of ``vllm_names.VllmName.takes``; None
            for a method that we add, and for one that is replaced on single objects.
        why: what for.
        gone_when: what vLLM would have to offer for it to go.
        contains: an expression inside vLLM's function that we rely on.
        when: in which processes it is installed.
    """

    owners: tuple[type | ModuleType, ...]
    name: str
    wrap: Callable[..., Any]
    takes: str | None
    why: str
    gone_when: str
    contains: str | None = None
    when: str = "every process that loads the plugin"

    def install(self) -> None:
        """Put our function in place, around whatever is there. Does nothing where it is in place already.

        Raises:
            AttributeError: vLLM has no such function, and it is not one that we add.
        """
        for owner in self.owners:
            current = getattr(owner, self.name, None) if self.takes is None else getattr(owner, self.name)
            if not self._is_in(current):
                setattr(owner, self.name, self._around(current))

    def install_on(self, instance: Any, *context: Any) -> None:
        """Do the same to the bound method of a single object; ``wrap`` is given ``context`` after the method."""
        bound = getattr(instance, self.name)
        if not self._is_in(bound):
            setattr(instance, self.name, self._around(bound, *context))

    def _around(self, theirs: Any, *context: Any) -> Any:
        ours = self.wrap(theirs, *context)
        if theirs is not None:
            functools.update_wrapper(ours, theirs)
        setattr(ours, _MARK, self)
        return ours

    def _is_in(self, function: Any) -> bool:
        """Whether ``function`` is ours, or something else around ours."""
        while function is not None:
            if getattr(function, "__dict__", {}).get(_MARK) is self:
                return True
            function = getattr(function, "__wrapped__", None)
        return False

    @property
    def places(self) -> tuple[tuple[str, str], ...]:
        """(module, dotted name in it) of each function that is replaced."""
        return tuple(
            (owner.__name__, self.name)
            if isinstance(owner, ModuleType)
            else (owner.__module__, f"{owner.__qualname__}.{self.name}")
            for owner in self.owners
        )


class Attribute(Generic[T]):
    """An attribute that we write on objects of vLLM's: one of ours, or a field of vLLM's own.

    Args:
        owner: the class of the objects.
        name: ours begin with ``vllm_steer``.
        why: what for.
        gone_when: what vLLM would have to offer for it to go.
    """

    def __init__(self, owner: str, name: str, *, why: str, gone_when: str) -> None:
        self.owner, self.name, self.why, self.gone_when = owner, name, why, gone_when
        ATTRIBUTES.append(self)

    def of(self, instance: Any) -> T | None:
        """The value that an object has; None where it has none."""
        value: T | None = getattr(instance, self.name, None)
        return value

    def put(self, instance: Any, value: T) -> None:
        """Write the value."""
        setattr(instance, self.name, value)


PATCHES: list[Patch] = []
ATTRIBUTES: list[Attribute[Any]] = []


def patch(
    owner: type | ModuleType | Iterable[type | ModuleType],
    name: str,
    wrap: Callable[..., Any],
    *,
    takes: str | None,
    why: str,
    gone_when: str,
    contains: str | None = None,
    when: str | None = None,
) -> Patch:
    """Declare a change of vLLM; ``Patch.install`` makes it. See ``Patch`` for the parameters."""
    owners = (owner,) if isinstance(owner, type | ModuleType) else tuple(owner)
    made = Patch(owners, name, wrap, takes, why, gone_when, contains, when or Patch.when)
    PATCHES.append(made)
    return made
