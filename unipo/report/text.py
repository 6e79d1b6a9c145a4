"""Numbers as people read them; an en dash for what is not known."""

from __future__ import annotations

import math


def percent(value: float, digits: int = 1) -> str:
    """0.123 -> "12.3 %"; unknown -> an en dash."""
    return f"{100 * value:.{digits}f} %" if math.isfinite(value) else "–"


def between(low: float, high: float) -> str:
    """The interval of a share."""
    return f"{100 * low:.1f} – {100 * high:.1f} %" if math.isfinite(low) and math.isfinite(high) else "–"


def amount(value: float) -> str:
    """12345 -> "12.3k", 1234567 -> "1.23M"."""
    if not math.isfinite(value):
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:#.3g}".rstrip(".") + unit
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 10 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def number(value: float) -> str:
    """A return or a reward: 0.783, 500, 123.4, -1,204.6, 123,457."""
    if not math.isfinite(value):
        return "–"
    digits = 0 if abs(value) >= 1e4 or value == int(value) else 1
    return f"{value:,.{digits}f}" if abs(value) >= 10 else f"{value:.3g}"


def number_span(low: float, high: float) -> str:
    """The interval of a return."""
    return f"{number(low)} to {number(high)}" if math.isfinite(low) and math.isfinite(high) else "–"


def points(mean: float, low: float, high: float) -> str:
    """A difference of shares in percentage points, with its interval: "+5.0 (-1.0 to +11.0)"."""
    if not math.isfinite(mean):
        return "–"
    spread = f" ({100 * low:+.1f} to {100 * high:+.1f})" if math.isfinite(low) else ""
    return f"{100 * mean:+.1f}{spread}"


def probability(mean: float, low: float, high: float) -> str:
    """A probability with its interval: "0.75 (0.25 to 1.00)"."""
    if not math.isfinite(mean):
        return "–"
    return f"{mean:.2f} ({low:.2f} to {high:.2f})" if math.isfinite(low) else f"{mean:.2f}"
