"""Declarations of every change to vLLM: each function that is replaced and each attribute that is written, with why.

``docs/patches.md``, the list that ``make compat`` checks, and tests are derived from these declarations.
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
    """A function of vLLM that ours replaces and calls, or a method that we add to a class of vLLM.

    ``install`` replaces the function in its class or module, ``install_on`` on a single object.

    Attributes:
        owners: the classes or modules that have the function as an attribute.
        name: the name of that attribute.
        wrap: builds our function from vLLM's, or from None for an added method. ``install_on`` also passes it a
            context.
        takes: the parameters of vLLM's function that we rely on, in the form of ``vllm_api.VllmName.takes``; None
            for an added method, and for a method that is replaced on single objects.
        why: the reason for the patch.
        gone_when: what vLLM must offer before the patch can be removed.
        contains: an expression inside vLLM's function that we rely on.
        when: the processes in which the patch is installed.
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
        """Wrap the function of each owner. Skips an owner whose function is wrapped already.

        Raises:
            AttributeError: vLLM has no such function, and this is not an added method.
        """
        for owner in self.owners:
            current = getattr(owner, self.name, None) if self.takes is None else getattr(owner, self.name)
            if not self._is_in(current):
                setattr(owner, self.name, self._around(current))

    def install_on(self, instance: Any, *context: Any) -> None:
        """Wrap the bound method of one object, if it is not wrapped already; ``wrap`` also gets ``context``.

        Raises:
            AttributeError: the object has no such method.
        """
        bound = getattr(instance, self.name)
        if not self._is_in(bound):
            setattr(instance, self.name, self._around(bound, *context))

    def remove_from(self, instance: Any) -> None:
        """Undo ``install_on``."""
        delattr(instance, self.name)

    def _around(self, theirs: Any, *context: Any) -> Any:
        ours = self.wrap(theirs, *context)
        if theirs is not None:
            functools.update_wrapper(ours, theirs)
        setattr(ours, _MARK, self)
        return ours

    def _is_in(self, function: Any) -> bool:
        """Whether ``function`` is our function or wraps it."""
        while function is not None:
            if getattr(function, "__dict__", {}).get(_MARK) is self:
                return True
            function = getattr(function, "__wrapped__", None)
        return False

    @property
    def places(self) -> tuple[tuple[str, str], ...]:
        """(module, dotted name in it) of each replaced function."""
        return tuple(
            (owner.__name__, self.name)
            if isinstance(owner, ModuleType)
            else (owner.__module__, f"{owner.__qualname__}.{self.name}")
            for owner in self.owners
        )


class Attribute(Generic[T]):
    """An attribute that we write on vLLM objects: a new one, or a field that vLLM defines.

    Args:
        owner: the class of the objects.
        name: the attribute; the name of a new one begins with ``vllm_steer``.
        why: the reason for it.
        gone_when: what vLLM must offer before it can be removed.
    """

    def __init__(self, owner: str, name: str, *, why: str, gone_when: str) -> None:
        self.owner, self.name, self.why, self.gone_when = owner, name, why, gone_when
        ATTRIBUTES.append(self)

    def of(self, instance: Any) -> T | None:
        """The value on ``instance``; None where it is not set."""
        value: T | None = getattr(instance, self.name, None)
        return value

    def put(self, instance: Any, value: T) -> None:
        """Set the value on ``instance``."""
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
    """Declare a change of vLLM, which ``Patch.install`` then makes. See ``Patch`` for the parameters."""
    owners = (owner,) if isinstance(owner, type | ModuleType) else tuple(owner)
    made = Patch(owners, name, wrap, takes, why, gone_when, contains, when or Patch.when)
    PATCHES.append(made)
    return made
