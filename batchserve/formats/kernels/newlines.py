"""Compiled counting of records that are lines, 64 bytes at a time. Importing this compiles it once for a machine.

Indices are unsigned, or each would be checked for being negative.
"""

from typing import Any

import numpy as np
from numba import types

from batchserve.compiled import compiled, read_only
from batchserve.formats.kernels.words import equal_mask, leading_zeros, ones

__all__ = ["count_records"]

U: Any = np.uint64
C: Any = np.uint8
NEWLINE, RETURN, QUOTE, BRACE = (C(ord(mark)) for mark in '\n\r"{')


@compiled(
    types.UniTuple(types.uint64, 5)(  # type: ignore[no-untyped-call]
        *(read_only(types.uint8), types.uint64, types.uint64, types.uint64, types.boolean, types.uint64, types.uint64)
    )
)
def count_records(
    text: np.ndarray, start: int, stop: int, most: int, is_json: bool, opened: int, returned: int
) -> tuple[int, int, int, int, int]:
    """Counts the newlines in the bytes from `start` to `stop`, at most so many. `opened`: whether a line begins with
    them, `returned`: whether a carriage return is before them.

    Returns the count, the place behind the last one that counts (0: there is none), whether some lines may not be the
    records, `opened` and `returned` of what follows. Such lines have a quotation mark (in CSV), a carriage return in
    them, or no text (JSON: do not begin with a brace). Up to 63 bytes behind `stop` are read.
    """
    one, block, top = U(1), U(64), U(63)
    at, stop, most, opened, returned = U(start), U(stop), U(most), U(opened), U(returned)
    lines, behind, odd = U(0), U(0), U(0)
    while at < stop and lines < most:
        there = ~U(0) if stop - at >= block else (one << (stop - at)) - one
        newlines = equal_mask(text, at, NEWLINE) & there
        returns = equal_mask(text, at, RETURN) & there
        begins = ((newlines << one) | opened) & there
        odd |= ((returns << one) | returned) & ~newlines & there
        if is_json:
            odd |= begins & ~equal_mask(text, at, BRACE)
        else:
            odd |= (begins & (newlines | returns)) | (equal_mask(text, at, QUOTE) & there)
        last = min(block, stop - at) - one
        opened, returned = (newlines >> last) & one, (returns >> last) & one
        found = ones(newlines)
        if lines + found > most:
            while lines + ones(newlines) > most:
                newlines &= ~(one << (top - leading_zeros(newlines)))
            found = most - lines
        if newlines != U(0):
            behind = at + block - leading_zeros(newlines)
        lines += found
        at += block
    return lines, behind, U(odd != U(0)), opened, returned
