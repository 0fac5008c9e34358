"""What spans mean, by Python's own slices of lists; shares no code with the product."""

from __future__ import annotations


def positions(span: str, prompt_len: int, length: int) -> set[int]:
    """The positions of a span among the first ``length`` of a request."""
    return {one for part in parts_of(span, prompt_len, length) for one in part if one < length}


def parts_of(span: str, prompt_len: int, length: int) -> list[set[int]]:
    """The positions of each part of a span; an empty set for one that holds no token."""
    names = {
        "prompt": list(range(prompt_len)),
        "generated": list(range(prompt_len, length)),
        "response": list(range(prompt_len - 1, max(length, prompt_len))),
        "all": list(range(length)),
    }
    found: list[set[int]] = []
    for part in span.split("+"):
        try:
            held = eval(part.strip(), {}, names)
        except IndexError:
            held = []
        found.append({held} if isinstance(held, int) else set(held))
    return found
