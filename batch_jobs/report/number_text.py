"""Numbers as people read them: few digits, a true minus sign, an en dash for what is not known."""

from __future__ import annotations

MINUS = "\u2212"
UNKNOWN = "\u2013"


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant ones, no exponent below a million."""
    if value is None:
        return UNKNOWN
    if abs(value) >= 1000:
        text = f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.2e}"
    else:
        text = f"{value:.{digits}g}"
        if "e" in text:
            text = "0" if abs(value) < 1e-12 else f"{value:.1e}"
    return text.replace("-", MINUS)


def fixed(value: float | None, places: int) -> str:
    """`places` decimal places, so that a column lines up."""
    return UNKNOWN if value is None else f"{value:.{places}f}".replace("-", MINUS)


def p_value(value: float | None) -> str:
    """Three decimal places, and never a p of zero."""
    return "<0.001" if value is not None and value < 0.001 else fixed(value, 3)


def scenario_title(scenario: str) -> str:
    """`the_listener` -> `The Listener`."""
    return scenario.replace("_", " ").replace("-", " ").title()
