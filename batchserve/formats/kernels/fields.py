"""Compiled reading of the fields of records, in two stages. Importing this compiles it once for a machine.

The first finds the delimiters and newlines, 64 bytes at a time; the second reads each field between ends that are
known, so that none waits for the one before it: up to 15 digits as two words of 8 bytes, others digit by digit.

A number is exact, or its record is flagged. Up to 2^53 an integer, and up to 10^22 a power of ten, are exact as
float64, so that their quotient is rounded once, which gives the nearest float64 (Clinger, 1990). Of up to 19 digits and
any power of ten, a product with 128 bits of that power decides it (Lemire, 2021). Its nearest float32 is that of the
text, unless the float64 is midway between two float32s: then the text may be on either side of it.

Indices are unsigned, or each would be checked for being negative.
"""

from typing import Any

import numpy as np
from numba import types

from batchserve.compiled import compiled, read_only, written
from batchserve.formats.kernels.words import (
    double_bits,
    double_of,
    equal_mask,
    high_mask,
    high_product,
    leading_zeros,
    load,
    number_of,
    ones,
    store,
    trailing_zeros,
)

__all__ = ["BLOCK", "COLUMNS", "STATE", "nearest", "read_fields"]

U: Any = np.uint64
S: Any = np.int64
C: Any = np.uint8
BLOCK = 2**15
"""Bytes whose delimiters are found before their fields are read: they, and their places, stay in the cache."""
COLUMNS = ("kind", "base", "stride", "low", "high", "keep", "before", "before_bytes")
"""What a row of `columns` says of a column. `kind`: 0 read no number, 1 a float32, 2 a float64, 3 an integer from
`low` to `high`; record r goes to element `base` + r * `stride`. `keep`: whether its text is kept; in JSON, of which
kind it is then, and of null nothing. `before_bytes`, from `before` on: the text that each field follows."""
STATE = ("row", "kept", "flagged", "lines", "returns", "high")
"""What a call adds to: records and bytes of the kept text; flagged records; newlines, carriage returns; whether there
are bytes that are not ASCII."""
KIND, BASE, STRIDE, LOW, HIGH, KEEP, BEFORE, BEFORE_BYTES = map(U, range(len(COLUMNS)))
ROW, KEPT, FLAGGED, LINES, RETURNS, HIGH_BYTES = map(U, range(len(STATE)))
SINGLE, DOUBLE, INTEGER = 1, 2, 3

NEWLINE, RETURN, QUOTE, BACKSLASH = (C(ord(mark)) for mark in '\n\r"\\')
MINUS, PLUS, ZERO = (C(ord(mark)) for mark in "-+0")
SMALL_E, LARGE_E = C(ord("e")), C(ord("E"))
NULL_WORD, TRUE_WORD, FALSE_WORD = U(0x6C6C756E), U(0x65757274), U(0x65736C6166)
NULL, TEXT, OTHER = 1, 2, 3
POWERS = np.array([10.0**exponent for exponent in range(23)])
"""All powers of ten that are exact as float64."""
INTEGER_POWERS = np.array([10**exponent for exponent in range(9)], np.uint64)
EXACT = U(2**53)
"""Integers beyond are left to polars."""
BELOW_SINGLE, MIDPOINT = U(0x1FFFFFFF), U(0x10000000)
"""The bits of a float64 that a float32 lacks; what they are midway between two float32s."""
SMALLEST, LARGEST = 1.1754944e-38, 3.4028e38
"""Of float32s with all digits, and not near to infinity."""
LOWEST, HIGHEST = -342, 308
"""Powers of ten below and beyond these give no float64 of up to 19 digits."""


def _powers_of_five() -> np.ndarray:
    """The upper and lower half of the first 128 bits of each, from that of `LOWEST` on; of fractions rounded up."""
    words: list[tuple[int, int]] = []
    for exponent in range(LOWEST, HIGHEST + 1):
        five: int = 5 ** abs(exponent)
        if exponent < 0:
            width = five.bit_length()
            five = (1 << (width + 127 if exponent >= -27 else 2 * width + 128)) // five + 1
        shift = five.bit_length() - 128
        bits = five >> shift if shift > 0 else five << -shift
        words.append((bits >> 64, bits & (2**64 - 1)))
    return np.array(words, np.uint64)


FIVES = _powers_of_five()
ONES, ZEROS, OVER, TOP = U(0x0101010101010101), U(0x3030303030303030), U(0x7676767676767676), U(0x8080808080808080)


@compiled(
    types.UniTuple(types.uint64, 6)(  # type: ignore[no-untyped-call]
        *(read_only(types.uint8), types.uint64, types.uint64, types.uint8, types.boolean, types.uint64),
        *(written(types.uint32), types.uint64),
    )
)
def _find_marks(
    text: np.ndarray,
    start: int,
    stop: int,
    delimiter: int,
    is_json: bool,
    quoted: int,
    marks: np.ndarray,
    count: int,
) -> tuple[int, int, int, int, int, int]:
    """Adds the places of delimiters and newlines to the `count` that are in `marks`. `quoted`: all ones where a JSON
    text is open, whose commas count for nothing. Returns the count, newlines, carriage returns, `quoted`, whether there
    is a quotation mark (JSON: a backslash), and whether there is a byte that is not ASCII.

    Up to 63 bytes behind `stop` are read."""
    one, block, most = U(1), U(64), U(8)
    lines, returns, odd, high, at = U(0), U(0), U(0), U(0), U(start)
    count, quoted, stop = U(count), U(quoted), U(stop)
    while at < stop:
        newlines = equal_mask(text, at, NEWLINE)
        found = equal_mask(text, at, C(delimiter)) | newlines
        quotes = equal_mask(text, at, QUOTE)
        there = ~U(0) if stop - at >= block else (one << (stop - at)) - one
        if is_json:
            odd |= equal_mask(text, at, BACKSLASH) & there
            inside = quotes & there
            for shift in (U(1), U(2), U(4), U(8), U(16), U(32)):
                inside ^= inside << shift
            inside ^= quoted
            quoted = U(0) - (inside >> U(63))
            found &= ~inside
            newlines &= ~inside
        else:
            odd |= quotes & there
            returns += ones(equal_mask(text, at, RETURN) & there)
        high |= high_mask(text, at) & there
        found &= there
        lines += ones(newlines & there)
        following = count + ones(found)
        while count < following:
            # Without a branch on their number; those that are too many are overwritten.
            for step in range(most):
                marks[count + U(step)] = np.uint32(at + trailing_zeros(found))
                found &= found - one
            count += most
        count = following
        at += block
    return count, lines, returns, quoted, U(odd != U(0)), U(high != U(0))


@compiled(
    types.Tuple((types.int64, types.uint64, types.int64))(  # type: ignore[no-untyped-call]
        read_only(types.uint8), types.uint64, types.uint64, types.uint8, types.boolean
    )
)
def _decimal(  # noqa: C901 - one grammar
    text: np.ndarray, start: int, stop: int, point: int, is_json: bool
) -> tuple[int, int, int]:
    """The number of at most 19 digits, without its sign, that the bytes from `start` to `stop` are: 1 for an integer, 2
    for another (0: none, or one of more digits), the integer m and the exponent of ten of m x 10^e."""
    one, eight, ten, most = U(1), U(8), U(10), U(9)
    at, number, digits, exponent, kind = U(start), U(0), 0, 0, 1
    stop = U(stop)
    first, leads = at, text[at] == ZERO
    while at + eight <= stop:
        word = load(text, at) ^ ZEROS
        if ((word + OVER) | word) & TOP != U(0):
            break
        digits += 8 if digits != 0 else 8 - S(trailing_zeros(word) >> U(3))
        number = number * INTEGER_POWERS[8] + number_of(word)
        at += eight
    while at < stop and C(text[at] - ZERO) <= most:
        number = number * ten + U(text[at] - ZERO)
        digits += digits != 0 or number != U(0)  # once it has too many, the number may be 0 again
        at += one
    whole = at - first
    if is_json and (whole == U(0) or (leads and whole > one)):
        return 0, U(0), 0
    if at < stop and text[at] == C(point):
        at += one
        behind = at
        while at + eight <= stop:
            word = load(text, at) ^ ZEROS
            if ((word + OVER) | word) & TOP != U(0):
                break
            digits += 8 if digits != 0 else 8 - S(trailing_zeros(word) >> U(3))
            number = number * INTEGER_POWERS[8] + number_of(word)
            at += eight
        while at < stop and C(text[at] - ZERO) <= most:
            number = number * ten + U(text[at] - ZERO)
            digits += digits != 0 or number != U(0)
            at += one
        if at == behind and (is_json or whole == U(0)):
            return 0, U(0), 0
        exponent = -S(at - behind)
        kind = 2
    elif whole == U(0):
        return 0, U(0), 0
    if at < stop and (text[at] == SMALL_E or text[at] == LARGE_E):
        at += one
        falls = at < stop and text[at] == MINUS
        if at < stop and (text[at] == MINUS or text[at] == PLUS):
            at += one
        given, behind = 0, at
        while at < stop and C(text[at] - ZERO) <= most and given < 1000:
            given = given * 10 + S(text[at] - ZERO)
            at += one
        if at == behind:
            return 0, U(0), 0
        exponent += -given if falls else given
        kind = 2
    if at != stop or digits > 19:
        return 0, U(0), 0
    return kind, number, exponent


@compiled(types.Tuple((types.boolean, types.float64))(types.uint64, types.int64))  # type: ignore[no-untyped-call]
def nearest(number: int, exponent: int) -> tuple[bool, float]:
    """The float64 next to m x 10^e, and whether it is known: not where it has few digits, or is infinite."""
    one, low_nine = U(1), U(0x1FF)
    if number == U(0):
        return True, 0.0
    if exponent < LOWEST or exponent > HIGHEST:
        return False, 0.0
    zeros, place = leading_zeros(number), U(exponent - LOWEST)
    scaled = U(number) << zeros
    upper, lower = high_product(scaled, FIVES[place, U(0)]), scaled * FIVES[place, U(0)]
    if upper & low_nine == low_nine:
        more = high_product(scaled, FIVES[place, one])
        lower += more
        upper += U(more > lower)
    if lower == ~U(0) and (exponent < -27 or exponent > 55):
        return False, 0.0
    top = upper >> U(63)
    mantissa = upper >> (top + U(9))
    power = ((217706 * exponent) >> 16) + 63 + S(top) - S(zeros) + 1023
    if power <= 0:
        return False, 0.0
    if lower <= one and -4 <= exponent <= 23 and mantissa & U(3) == one and mantissa << (top + U(9)) == upper:
        mantissa &= ~one  # halfway between two: to the even one
    mantissa = (mantissa + (mantissa & one)) >> one
    if mantissa == U(2**53):
        mantissa = U(2**52)
        power += 1
    if power >= 2047:
        return False, 0.0
    return True, double_of((mantissa & U(2**52 - 1)) | (U(power) << U(52)))


@compiled(types.int64(read_only(types.uint8), types.uint64, types.uint64))
def _json_kind(text: np.ndarray, start: int, stop: int) -> int:
    """What the bytes are: `TEXT`, without a backslash; `NULL`; `OTHER`: a number of at most 19 digits, true or false.
    0: none of these."""
    one, start, stop = U(1), U(start), U(stop)
    length = stop - start
    if text[start] == QUOTE:
        at, last = start + one, stop - one
        while at < last and text[at] != QUOTE and text[at] >= C(32):
            at += one
        return TEXT if length >= U(2) and at == last and text[last] == QUOTE else 0
    word = load(text, start)
    if length == U(4) and word << U(32) == NULL_WORD << U(32):
        return NULL
    if length == U(4) and word << U(32) == TRUE_WORD << U(32):
        return OTHER
    if length == U(5) and word << U(24) == FALSE_WORD << U(24):
        return OTHER
    return OTHER if _decimal(text, start + U(text[start] == MINUS), stop, C(46), True)[0] != 0 else 0


@compiled(
    types.boolean(
        *(read_only(types.uint8), types.uint64, types.uint8, types.uint8, types.boolean, read_only(types.uint8)),
        *(read_only(types.uint8), read_only(types.int64, 2), written(types.float32), written(types.float64)),
        *(written(types.int64), written(types.boolean), written(types.uint8), written(types.int64, 2)),
        *(written(types.uint32), types.int64, written(types.int64)),
    )
)
def read_fields(  # noqa: C901 - as several functions it is four times as slow
    text: np.ndarray,
    stop: int,
    delimiter: int,
    point: int,
    is_json: bool,
    texts: np.ndarray,
    after: np.ndarray,
    columns: np.ndarray,
    singles: np.ndarray,
    doubles: np.ndarray,
    integers: np.ndarray,
    absent: np.ndarray,
    kept: np.ndarray,
    flagged: np.ndarray,
    marks: np.ndarray,
    most: int,
    state: np.ndarray,
) -> bool:
    """Reads the records that are the first `stop` bytes, each of which ends with a newline, behind `after`.

    `columns`, as `COLUMNS` says; `texts` are those that fields follow, each with 8 bytes of slack; the fields that are
    `kept` become a CSV. A missing number is NaN, or 0 and `absent`. `flagged` gets the record, start and stop of each
    whose numbers are not known, `state` is as `STATE` says. False where the records have another form than that of
    `columns`, there are more than `most` in all, or more are flagged than there is room for.

    Up to 79 bytes behind `stop` are read, and 7 behind the kept text written.
    """
    one, eight, width, end_of = U(1), U(8), U(len(columns)), U(len(after))
    begin, at, have, quoted, stop = U(0), U(0), U(0), U(0), U(stop)
    dots = ONES * U(point)
    row, used, bad = U(state[ROW]), U(state[KEPT]), U(state[FLAGGED])
    while at < stop:
        upto = min(at + U(BLOCK), stop)
        have, lines, returns, quoted, odd, high = _find_marks(text, at, upto, delimiter, is_json, quoted, marks, have)
        state[LINES] += S(lines)
        state[RETURNS] += S(returns)
        state[HIGH_BYTES] |= S(high)
        if odd != U(0):
            return False
        at = upto
        mark = U(0)
        while have - mark >= width and row < U(most):
            line, good, joined = begin, True, False
            for index in range(width):
                column = U(index)
                end = U(marks[mark])
                mark += one
                last = column + one == width
                if text[end] != (NEWLINE if last else C(delimiter)):
                    return False
                following = end + one
                length = U(columns[column, BEFORE_BYTES])
                if length != U(0):
                    if begin + length > end:
                        return False
                    given = U(columns[column, BEFORE])
                    done = U(0)
                    while done + eight <= length:
                        if load(text, begin + done) != load(texts, given + done):
                            return False
                        done += eight
                    differ = load(text, begin + done) ^ load(texts, given + done)
                    if done < length and differ << (U(64) - ((length - done) << U(3))) != U(0):
                        return False
                    begin += length
                if last and end_of != U(0):
                    if begin + end_of > end:
                        return False
                    end -= end_of
                    for place in range(end_of):
                        if text[end + U(place)] != after[U(place)]:
                            return False
                kind = columns[column, KIND]
                if kind != 0:
                    target = U(columns[column, BASE]) + row * U(columns[column, STRIDE])
                    negative = text[begin] == MINUS
                    first = begin + U(negative)
                    length = end - first
                    word, more = load(text, first), load(text, first + eight)
                    differ = word ^ dots
                    dot = (differ - ONES) & ~differ & TOP  # the lowest bit is right
                    if dot != U(0) and trailing_zeros(dot) >> U(3) < length:
                        whole = trailing_zeros(dot) & U(56)  # bits of the digits before the point
                        low = (one << whole) - one
                        head = (word & low) | ((word >> eight) & ~low) | (more << U(56))
                        tail = more >> eight
                        digits = length - one
                        whole >>= U(3)
                        behind = digits - whole
                        faulty = is_json and behind == U(0)
                    else:
                        head, tail, digits, whole, behind, faulty = word, more, length, length, U(0), False
                    some = min(eight, digits)
                    rest = digits - some
                    half = U(32) - (rest << U(2))
                    # Two numbers of 8 digits: what stands behind the field is shifted out.
                    head = (head ^ ZEROS) << ((U(64) - (some << U(3))) & U(63))
                    tail = ((tail ^ ZEROS) << (half & U(63))) << (half & U(63))
                    others = ((head + OVER) | head | (tail + OVER) | tail) & TOP
                    if is_json:
                        faulty |= whole == U(0) or (whole > one and text[first] == ZERO)
                    if digits - one < U(15) and others == U(0) and not faulty:
                        number = number_of(head) * INTEGER_POWERS[rest] + number_of(tail)
                        if is_json and negative and number == U(0) and digits == length:
                            good = False  # an integer, which has no sign
                        if kind == SINGLE:
                            real = np.float64(S(number)) / POWERS[behind]
                            if double_bits(real) & BELOW_SINGLE == MIDPOINT:
                                good = False
                            single = np.float32(real)
                            singles[target] = -single if negative else single
                        elif kind == DOUBLE:
                            real = np.float64(S(number)) / POWERS[behind]
                            doubles[target] = -real if negative else real
                        else:
                            whole_number = -S(number) if negative else S(number)
                            if digits != length:
                                good = False
                            if whole_number < columns[column, LOW] or whole_number > columns[column, HIGH]:
                                good = False
                            integers[target] = whole_number
                            absent[target] = False
                    elif (begin == end and not is_json) or (
                        is_json and length == U(4) and word << U(32) == NULL_WORD << U(32) and not negative
                    ):
                        if kind == SINGLE:
                            singles[target] = np.float32(np.nan)
                        elif kind == DOUBLE:
                            doubles[target] = np.nan
                        else:
                            integers[target] = 0
                            absent[target] = True
                    else:
                        found, number, exponent = _decimal(text, first, end, point, is_json)
                        if found == 0:
                            good = False
                        elif kind == INTEGER:
                            good &= found == 1 and number < EXACT
                            whole_number = -S(number) if negative else S(number)
                            good &= columns[column, LOW] <= whole_number <= columns[column, HIGH]
                            integers[target] = whole_number
                            absent[target] = False
                        else:
                            known, real = nearest(number, exponent)
                            good &= known
                            if kind == DOUBLE:
                                doubles[target] = -real if negative else real
                            else:
                                good &= double_bits(real) & BELOW_SINGLE != MIDPOINT
                                good &= real == 0.0 or SMALLEST <= real <= LARGEST
                                single = np.float32(real)
                                singles[target] = -single if negative else single
                elif is_json and columns[column, KEEP] == 0 and _json_kind(text, begin, end) == 0:
                    good = False
                if columns[column, KEEP] != 0:
                    if is_json:
                        found = _json_kind(text, begin, end)
                        if found == NULL:
                            begin = end
                        elif found != columns[column, KEEP]:
                            return False
                    if joined:
                        kept[used] = C(delimiter)
                        used += one
                    joined = True
                    source = begin
                    while source < end:
                        store(kept, used, load(text, source))
                        used += eight
                        source += eight
                    used -= source - end
                begin = following
            if joined:
                kept[used] = NEWLINE
                used += one
            if not good:
                if bad == U(len(flagged)):
                    return False
                for place, value in enumerate((row, line, begin)):
                    flagged[bad, U(place)] = S(value)
                bad += one
            row += one
        have -= mark
        for place in range(have):
            marks[U(place)] = marks[mark + U(place)]
    state[ROW], state[KEPT], state[FLAGGED] = S(row), S(used), S(bad)
    return bool(have == U(0) and begin == stop)
