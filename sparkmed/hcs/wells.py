"""Wells: names such as ``B03`` and (row, column) of a plate, both counted from 1.

Rows are letters, A to Z and then AA to AF; the formats are those of ANSI/SLAS 4-2004, whose names this module takes for granted.
"""

import functools
import re

from sparkmed.rejection import InputError, Refused

FORMATS = {6: (2, 3), 12: (3, 4), 24: (4, 6), 48: (6, 8), 96: (8, 12), 384: (16, 24), 1536: (32, 48)}
"""(rows, columns) by the number of wells."""

_NAME = re.compile(r"([A-Z]{1,2})\s*-?\s*([0-9]{1,3})|R([0-9]{1,3})C([0-9]{1,3})", re.ASCII)


def name(row: int, column: int) -> str:
    """Letters of the row and two digits of the column.

    >>> name(1, 1), name(32, 48)
    ('A01', 'AF48')
    """
    return f"{row_letters(row)}{column:02d}"


def row_letters(row: int) -> str:
    """
    >>> row_letters(26), row_letters(27)
    ('Z', 'AA')
    """
    tens, ones = divmod(row - 1, 26)
    return (chr(64 + tens) if tens else "") + chr(65 + ones)


def row_number(text: str) -> int:
    """The row of letters or digits, 0 when it is neither.

    >>> row_number("AF"), row_number("b"), row_number("7"), row_number("A1")
    (32, 2, 7, 0)
    """
    text = text.strip().upper()
    if text.isascii() and text.isdigit():
        return int(text)
    if not (text.isascii() and text.isalpha() and len(text) <= 2):
        return 0
    return functools.reduce(lambda n, c: 26 * n + ord(c) - 64, text, 0)


def parse(text: str, wells: int = 1536) -> tuple[int, int]:
    """(row, column) of a name: ``A1``, ``a01``, ``A001``, ``A - 01`` or ``r01c01``.

    Raises ``BAD_WELL`` for what is no name, and for one outside a plate of ``wells``.

    >>> parse("AF48"), parse("r16c24", 384)
    ((32, 48), (16, 24))
    """
    return within(*_split(text), wells)


def within(row: int, column: int, wells: int = 1536) -> tuple[int, int]:
    """``row`` and ``column``, or ``BAD_WELL`` when a plate of ``wells`` has no such well."""
    if wells not in FORMATS:
        raise InputError(f"plates have {', '.join(map(str, FORMATS))} wells, got {wells}")
    rows, columns = FORMATS[wells]
    if not (1 <= row <= rows and 1 <= column <= columns):
        raise Refused("BAD_WELL", f"row {row}, column {column}: a plate of {wells} wells has {rows} rows and {columns} columns")
    return row, column


@functools.lru_cache(8192)
def _split(text: str) -> tuple[int, int]:
    found = _NAME.fullmatch(text.strip().upper())
    if not found:
        raise Refused("BAD_WELL", f"{text[:40]!r} is no name of a well")
    letters, digits, row, column = found.groups()
    return (row_number(letters), int(digits)) if letters else (int(row), int(column))
