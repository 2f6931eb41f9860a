"""Damage to bytes: flipped, cut, doubled, spliced, with dangerous tokens and lengths."""

import struct
from collections.abc import Callable
from random import Random

TOKENS = (
    b'"', b'""', b'"\n', b'x"y', b"'", b"\r", b"\r\n", b"\n\n", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80",
    b'"\\ud800"', b'"\\udc00\\ud800"', b"1e39", b"-1e39", b"1e400", b"-1e400", b"1e308", b"nan", b"NaN", b"inf",
    b"Infinity", b"-0", b"9" * 30, b"9" * 400, b"0." + b"0" * 400 + b"1", b"[" * 300, b'{"a":' * 300, b'{"":1}\n',
    b'"":1,', b'{"id":1,"id":2}\n', b",", b",,,,", b"\t", b";", b"=1+1", b"\xc0\x80", b"\x1a", b"\x1f\x8b\x08\0",
    b"PK\x03\x04", b"PAR1", b"null", b"true", b"{}", b"[]", b"{}\n", b"[]\n", b"   \n", b" \t \n", b"\x0b\n", b"}{",
    b"\\", b"\\u0000", "\u2028".encode(), "\u202e".encode(), "\U0010ffff".encode(), b"--edge--\r\n",
)  # fmt: skip
LENGTHS = (0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
MOST = 200_000


def mutate(random: Random, data: bytes, other: bytes) -> bytes:
    """Damaged in one to four places; `other` is where foreign blocks come from."""
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        data = random.choice(WAYS)(random, data, other)[:MOST]
    return data


def flip(random: Random, data: bytes, _: bytes) -> bytes:
    changed = bytearray(data)
    for _turn in range(random.choice((1, 1, 2, 8, 32)) if data else 0):
        changed[random.randrange(len(data))] ^= random.choice((1, 2, 4, 8, 16, 32, 64, 128, 255))
    return bytes(changed)


def truncate(random: Random, data: bytes, _: bytes) -> bytes:
    return data[: random.randint(0, len(data))] if random.random() < 0.5 else data[: -random.randint(1, 16)]


def delete(random: Random, data: bytes, _: bytes) -> bytes:
    start, end = _block(random, data)
    return data[:start] + data[end:]


def double(random: Random, data: bytes, _: bytes) -> bytes:
    start, end = _block(random, data)
    return data[:start] + data[start:end] * random.choice((2, 2, 3, 50)) + data[end:]


def splice(random: Random, data: bytes, other: bytes) -> bytes:
    start, end = _block(random, other)
    at = random.randint(0, len(data))
    return data[:at] + other[start:end] + data[at + random.choice((0, end - start)) :]


def insert(random: Random, data: bytes, _: bytes) -> bytes:
    token = random.choice(TOKENS)
    if random.random() < 0.5 and (fields := [at for at, sign in enumerate(data) if sign in b",:\n\t"]):
        at = random.choice(fields) + 1  # where a field begins
    else:
        at = random.randint(0, len(data))
    return data[:at] + token + data[at + random.choice((0, 0, 1, 3)) :]


def overwrite_length(random: Random, data: bytes, _: bytes) -> bytes:
    near_end = random.random() < 0.3
    at = max(0, len(data) - random.randint(4, 40)) if near_end else random.randint(0, max(0, len(data) - 4))
    form = random.choice(("<I", ">I", "<H", "<Q", "B"))
    length = random.choice(LENGTHS) % 2 ** (8 * struct.calcsize(form))
    return data[:at] + struct.pack(form, length) + data[at + struct.calcsize(form) :]


def shuffle_lines(random: Random, data: bytes, _: bytes) -> bytes:
    lines = data.split(b"\n")
    at, to = random.randrange(len(lines)), random.randrange(len(lines))
    lines[at], lines[to] = lines[to], lines[at]
    return b"\n".join(lines)


def _block(random: Random, data: bytes) -> tuple[int, int]:
    start = random.randint(0, len(data))
    return start, min(len(data), start + random.choice((1, 2, 4, 16, 64, 512)))


WAYS: tuple[Callable[[Random, bytes, bytes], bytes], ...] = (
    flip, flip, truncate, delete, double, splice, insert, insert, insert, overwrite_length, shuffle_lines,
)  # fmt: skip
