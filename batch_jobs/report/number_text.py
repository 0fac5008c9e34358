"""Format numbers for readers: few digits, a true minus sign, an en dash for unknown values (None, NaN)."""

from __future__ import annotations

import math

MINUS = "\u2212"
UNKNOWN = "\u2013"


def number(value: float | None, digits: int = 3) -> str:
    """Format with `digits` significant digits; only tiny numbers and those from a million on get an exponent."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if abs(value) >= 1000:
        text = f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.2e}"
    else:
        text = f"{value:.{digits}g}"
        if "e" in text and abs(value) >= 1:  # rounded up to a thousand, or more digits before the point than asked
            text = f"{float(text):,.0f}"
        elif "e" in text:
            text = "0" if abs(value) < 1e-12 else f"{value:.1e}"
    return text.replace("-", MINUS)


def fixed(value: float | None, places: int) -> str:
    """Format with `places` decimal places, so that a column lines up."""
    return UNKNOWN if value is None or math.isnan(value) else f"{value:.{places}f}".replace("-", MINUS)


def p_value(value: float | None) -> str:
    """Format with three decimal places; a p below 0.001 becomes `<0.001`."""
    return "<0.001" if value is not None and value < 0.001 else fixed(value, 3)


def scenario_title(scenario: str) -> str:
    """`the_listener` -> `The Listener`."""
    return scenario.replace("_", " ").replace("-", " ").title()
