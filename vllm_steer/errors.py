"""The exceptions of this package, one class for each kind of refusal.

Each message gives the value received, the allowed values and the fix. All classes are ``ValueError`` too. A server
answers with the HTTP ``status`` and names the refusal by ``code``. A wrong body is always 400: routers and clients read
404 and 5xx from an inference route as a missing model or a broken server, and stop using it.

::

    SteerError
    ├── SpecError                a request's steering or readout is malformed                  400
    │   ├── MalformedSpec            not JSON, not an object, wrong type of a field
    │   ├── UnknownField             a field that the wire format does not have
    │   ├── BadAlpha                 not a finite number, or beyond what the engine allows
    │   ├── BadCondition             not one bound, or at a layer behind the entry's
    │   ├── BadSpan                  no span, or one without tokens
    │   ├── BadOp                    unknown, with a field of another op, or not allowed by the direction
    │   ├── BadReadout               nothing to read, bad skip_first, a projection that no layer can give
    │   ├── MisplacedField           steering or a readout where vLLM would ignore it
    │   ├── NotOnThisRoute           steering, a readout or an alias on a route that cannot honour it
    │   └── TooManyEntries           more entries at one layer than ``max_entries`` allows
    ├── UnknownDirection         a name that is not registered                                 400
    │   └── DirectionNotFound        the same, named by the URL of a GET or DELETE             404
    ├── AmbiguousDirection       a name at several layers, and no layer given                  400
    ├── LayerNotHooked           a layer that the engine was not started with                  400
    ├── DirectionError           a direction that cannot be used
    │   ├── BadVector                NaN, inf, zero, not one-dimensional                       400
    │   ├── WrongDimension           its length is not the model's hidden size                 400
    │   ├── BadDirectionFile         unreadable, wrong format, missing metadata                400
    │   ├── UploadTooLarge           an upload larger than the server accepts                  413
    │   ├── DirectionNeeded          an alias or the default steering needs the direction      409
    │   └── DirectionChanged         If-Match or If-None-Match does not hold                   412
    ├── BadAlias                 a name that cannot be an alias, or that stands in the settings  409
    ├── AliasNotFound            an alias to delete that was not put                           404
    ├── ReadoutNotFound          a reply id under which no readout is kept                     404
    ├── ChangeNotAllowed         a change over HTTP with a wrong admin key, or on a server without one  403
    │   └── AdminKeyMissing          the same without any key                                  401
    ├── BankFull                 no free slot for another direction                            409
    ├── SettingsError            the settings of an engine are wrong
    │   ├── UnsupportedModel         a family that is not in the table
    │   └── UnsupportedFeature       an engine feature with which steering would not be exact
    ├── DirectionNotAllowed      a name that the operator does not allow this caller to use    403
    ├── NotConfigured            steering on an engine without ``steer_config``                400
    ├── StreamOverflow           the steered stream left the range of the engine's dtype       400
    ├── NoTraceColumn            a stop that could not be watched, so its request was ended    503
    └── ReadoutUnavailable       a finished request whose readout is not available            409
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_WORD_START = re.compile(r"(?<!^)(?=[A-Z])")


class SteerError(ValueError):
    """Base class of all refusals of this package.

    Attributes:
        status: HTTP status of a server's reply.
        param: the place in a request's body that is wrong, such as ``steering[1]``; None if none is known.
    """

    status = 400
    param: str | None = None

    def give_place_to(self, other: SteerError) -> None:
        """Make another refusal name the same place."""
        other.param = self.param

    @property
    def code(self) -> str:
        """The refusal's name for programs, such as ``unknown_direction``."""
        return _WORD_START.sub("_", type(self).__name__).lower()


class SpecError(SteerError):
    """A request's ``steering`` or ``readout`` is malformed."""


class MalformedSpec(SpecError):
    """Not JSON, not of the expected shape, or a field of the wrong type."""


class UnknownField(SpecError):
    """A field that this version of the wire format does not have."""


class BadAlpha(SpecError):
    """α is not a finite number, or beyond what the engine's settings or its dtype allow."""


class BadCondition(SpecError):
    """A condition without exactly one finite bound, or one that the engine cannot evaluate where the entry acts."""


class BadSpan(SpecError):
    """Not a span, or a part of it holds no token of the request."""


class BadOp(SpecError):
    """An unknown op, a field that belongs to another op, or an op that needs a unit direction and did not get one."""


class BadReadout(SpecError):
    """A readout that can never have a value."""


class MisplacedField(SpecError):
    """Steering or a readout is misspelt, or stands where vLLM would ignore it."""


class NotOnThisRoute(SpecError):
    """Steering, a readout or an alias came on an HTTP route that cannot honour it."""


class TooManyEntries(SpecError):
    """More entries at one layer and span than ``max_entries`` allows."""


class UnknownDirection(SteerError):
    """No direction of that name is registered."""


class DirectionNotFound(UnknownDirection):
    """The URL names a direction that is not registered."""

    status = 404


class AmbiguousDirection(SteerError):
    """The name is registered at several layers, and the request names none of them."""


class LayerNotHooked(SteerError):
    """The engine was not started with that layer in ``steer_config(layers=...)``."""


class DirectionNotAllowed(SteerError):
    """The server's operator does not allow this API key or alias to use the direction."""

    status = 403


class DirectionError(SteerError):
    """A direction that cannot be used."""


class BadVector(DirectionError):
    """The vector is not a finite, non-zero, one-dimensional array."""


class WrongDimension(DirectionError):
    """The vector's length is not the hidden size of the model."""


class BadDirectionFile(DirectionError):
    """A direction file that cannot be read or written."""


class UploadTooLarge(DirectionError):
    """An upload of directions is larger than the server accepts."""

    status = 413


class DirectionNeeded(DirectionError):
    """The change would make an alias or the default steering of the server unusable."""

    status = 409


class DirectionChanged(DirectionError):
    """The direction is not, or no longer, what ``If-Match`` or ``If-None-Match`` says."""

    status = 412


class BadAlias(SteerError):
    """The name cannot be made an alias over HTTP: it is served already, or stands in the server's settings."""

    status = 409


class AliasNotFound(SteerError):
    """The URL names an alias that was not put over HTTP."""

    status = 404


class ReadoutNotFound(SteerError):
    """The URL names a reply of which no readout is kept."""

    status = 404


class ChangeNotAllowed(SteerError):
    """The admin key is wrong, or the server has none and allows no changes of directions over HTTP."""

    status = 403


class AdminKeyMissing(ChangeNotAllowed):
    """A request to change directions over HTTP has no admin key."""

    status = 401


class BankFull(SteerError):
    """Every slot of the direction bank is taken."""

    status = 409


class SettingsError(SteerError):
    """The settings of an engine are wrong."""


class UnsupportedModel(SettingsError):
    """The model's family is not in the table of families that are known to be exact."""


class UnsupportedFeature(SettingsError):
    """An engine feature under which steering or readout would not be exact."""


class NotConfigured(SteerError):
    """The engine runs without ``steer_config``: it has no hooks, so nothing can be steered or read."""


class StreamOverflow(SteerError):
    """The steered residual stream left the range of the engine's dtype, so the request was ended."""


class NoTraceColumn(SteerError):
    """All trace columns were taken by other requests, so a stop could not be watched and its request was ended."""

    status = 503


class ReadoutUnavailable(SteerError):
    """One or more requested readouts are not available.

    Attributes:
        results: the readouts that were collected, in the shape that ``collect_readouts`` returns; ``None`` for each
            failed one.
        reasons: (prompt index, sample index) -> reason of the failure.
    """

    status = 409

    def __init__(
        self, message: str, results: Sequence[Any] = (), reasons: dict[tuple[int, int], str] | None = None
    ) -> None:
        super().__init__(message)
        self.results = list(results)
        self.reasons = dict(reasons or {})
