"""Numbers and foreign text, as a terminal should show them."""

import unicodedata
from datetime import UTC, datetime

from batcher.records import Spending


def printable(text: str) -> str:
    """The text on one line, with every character that would act on a terminal shown as its escape.

    These are the control, format (bidi overrides among them), surrogate, private and unassigned characters and the
    line separators: Unicode's categories C, Zl and Zp.
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] != "C" and category not in ("Zl", "Zp"):
        return character
    return character.encode("unicode_escape").decode()


def count(number: float) -> str:
    """A number of things: 1,234,567; below ten with one decimal where it has one."""
    return f"{number:,.1f}" if number < 10 and number != int(number) else f"{number:,.0f}"


def money(usd: float | None) -> str:
    """An amount in dollars, with more digits the smaller it is."""
    if usd is None:
        return "unknown price"
    return f"${usd:,.2f}" if usd >= 1 or not usd else f"${usd:.4f}" if usd >= 0.001 else f"${usd:.2g}"


def budget(spent: Spending | None, limit: float | None) -> str:
    """What is spent of a budget; nothing where there is none."""
    if spent is None or limit is None:
        return ""
    lost = f" ({money(spent.lost)} of it maybe, by requests that timed out or were cut off)" if spent.lost else ""
    return f"{money(spent.usd)} of {money(limit)} spent{lost}"


def deadline(at: float | None, late: float | None) -> str:
    """By when all should be done (Unix time), and how it looks; nothing where there is no deadline."""
    if at is None:
        return ""
    said = f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"
    if late is None:
        return said
    return f"{said}, about {duration(late)} late" if late >= 1 else f"{said}, in time"


def duration(seconds: float) -> str:
    """A time span in its two largest units."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02} h"


def size(number: int) -> str:
    """A number of bytes in the largest unit that fits."""
    amount, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if unit in ("B", "kB") else f"{amount:.1f} {unit}"
