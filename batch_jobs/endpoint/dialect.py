"""The fields that an endpoint accepts in a chat request, learned from its refusals.

OpenAI's newer models refuse `max_tokens` in favour of `max_completion_tokens`, and any temperature but their own; other
servers know only the older name. The client therefore sends the older form first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

_UNSUPPORTED: Final = re.compile(
    r"unsupported|not support|n't support|only the default|not permitted|not allowed|forbidden|unrecogni[sz]ed"
    r"|unknown|unexpected|deprecated",
    re.IGNORECASE,
)
# a refusal with these words means that the request is too long, whichever field it names
_TOO_MANY_TOKENS: Final = re.compile(
    r"too (?:large|long|many|big)|context (?:length|window)|at most|exceed", re.IGNORECASE
)


@dataclass(frozen=True)
class ChatDialect:
    """The request format of one endpoint."""

    token_limit: str = "max_tokens"
    """Name of the field that limits the reply's tokens."""
    left_out: frozenset[str] = frozenset()
    """Fields that the endpoint does not accept; it uses its own defaults for them."""

    def body(self, fields: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
        """A request's body: `fields` without those in `left_out`, and the token limit."""
        return {name: value for name, value in fields.items() if name not in self.left_out} | {
            self.token_limit: max_tokens
        }

    def after_refusal(self, message: str, body: Mapping[str, Any]) -> ChatDialect:
        """The dialect to try next, after the endpoint refused `body` with `message`; `self` if no other one can
        help."""
        if (
            "max_tokens" in body
            and ("max_tokens" in message or "max_completion_tokens" in message)
            and not _TOO_MANY_TOKENS.search(message)
        ):
            return replace(self, token_limit="max_completion_tokens")
        # a wrong value is the caller's fault; only a field that the endpoint never accepts may be left out
        if _UNSUPPORTED.search(message):
            for name in ("temperature", "seed"):
                if name in body and re.search(rf"\b{name}\b", message):
                    return replace(self, left_out=self.left_out | {name})
        return self
