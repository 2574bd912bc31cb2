"""Makes text from data sets, stores and files, which anybody may have written, safe to show."""

import re
import unicodedata

INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Letters and marks by their category, but drawn as nothing: fillers, joiners and variation selectors."""

# A spreadsheet in a Japanese or Chinese locale takes the full-width forms as the start of a formula too.
FORMULA_STARTS = tuple("=+-@＝＋－＠")


def harmless(text: str, limit: int = 200, *, ascii_only: bool = False) -> str:
    """The text as one line that cannot control a terminal, at most `limit` characters (ending in "…" if cut).

    Control characters (with ESC, C1 and newlines), bidirectional overrides, isolates and marks, zero-width and other
    invisible characters, and lone surrogates become visible escapes such as \\x1b and \\u202e. Every kind of space
    becomes a plain space. The result is for reading only: a backslash stays as it is, so an escape looks like the same
    characters in the text. With `ascii_only` all other characters are escaped too, which can exceed the limit.
    """
    # Cut first, so that a caption of a megabyte costs nothing.
    start = text[:limit]
    safe = start if start.isprintable() and start.isascii() else "".join(map(_visible, start))
    if len(text) > limit or len(safe) > limit:
        safe = safe[: limit - 1] + "…"
    return safe.replace("…", "...").encode("ascii", "backslashreplace").decode("ascii") if ascii_only else safe


def spreadsheet_safe(text: str) -> str:
    """The text for a cell of a CSV file: control characters are escaped, and a formula gets a "'" before it."""
    # Format characters stay, since Persian and emoji need joiners. Line and paragraph separators would split a row,
    # and a lone surrogate cannot be written as UTF-8.
    safe = "".join(_escape(c) if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text)
    # Some spreadsheets drop leading space, so it does not count. A leading tab or return starts a formula itself.
    formula = text.lstrip().startswith(FORMULA_STARTS) or text.startswith(("\t", "\r"))
    return f"'{safe}" if formula else safe


def _visible(character: str) -> str:
    if unicodedata.category(character) == "Zs":
        return " "
    if character.isprintable() and not INVISIBLE.match(character):
        return character
    return _escape(character)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
