"""What an endpoint takes in the body of a chat request, learned from what it refuses.

OpenAI's newer models refuse `max_tokens` in favour of `max_completion_tokens`, and any temperature but their own; other
servers know the older name only. So a request goes out in the older form first.
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
# such a request is too long, under whatever name it says so
_TOO_MANY_TOKENS: Final = re.compile(
    r"too (?:large|long|many|big)|context (?:length|window)|at most|exceed", re.IGNORECASE
)


@dataclass(frozen=True)
class ChatDialect:
    """How one endpoint wants its requests."""

    token_limit: str = "max_tokens"
    """The name of the field that bounds the reply."""
    left_out: frozenset[str] = frozenset()
    """Fields that it does not take; it goes by its own default."""

    def body(self, fields: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
        """A request's body: `fields` without those that the endpoint does not take, and the bound."""
        return {name: value for name, value in fields.items() if name not in self.left_out} | {
            self.token_limit: max_tokens
        }

    def after_refusal(self, message: str, body: Mapping[str, Any]) -> ChatDialect:
        """The dialect to try next, after `body` was refused with `message`; this one where the refusal is about
        something else."""
        if (
            "max_tokens" in body
            and ("max_tokens" in message or "max_completion_tokens" in message)
            and not _TOO_MANY_TOKENS.search(message)
        ):
            return replace(self, token_limit="max_completion_tokens")
        # a wrong value is the caller's fault; only a field that cannot be given at all may be left out
        if _UNSUPPORTED.search(message):
            for name in ("temperature", "seed"):
                if name in body and re.search(rf"\b{name}\b", message):
                    return replace(self, left_out=self.left_out | {name})
        return self
