"""Texts in other encodings than UTF-8: recognised by a byte order mark, named by an option, or refused; and made UTF-8.

What is stored, hashed and read is UTF-8.
"""

import codecs
from collections.abc import Iterable, Iterator

from batchserve.errors import InvalidInput, InvalidOptions

__all__ = ["HINT", "Transcoder", "decode", "encoding_of_mark", "known_encoding", "require_utf8"]

_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Those of UTF-32 first, which begin with those of UTF-16."""
_ANY_MARK = tuple(_MARKS)
_NAMES = (
    "utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1",
    *(f"windows-{page}" for page in range(1250, 1259)),
    *(f"iso-8859-{part}" for part in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16)),
    "koi8-r", "koi8-u", "macintosh", "cp437", "cp850", "cp852", "cp866",
    "shift_jis", "cp932", "euc-jp", "gbk", "gb18030", "big5", "euc-kr", "cp949",
)  # fmt: skip
"""As they are listed. Python's other names of these are taken, too."""
_CODECS = {codecs.lookup(name).name: name for name in _NAMES}
_SET_BETWEEN = frozenset(
    "\u00a0\u00a7\u00ab\u00b0\u00b4\u00b7\u00bb\u2013\u2014\u2018\u2019\u201a\u201c\u201d\u201e\u2022\u2026\u20ac\u00a3"
)
"""Signs of European texts: quotation marks, dashes, degrees, currencies."""
HINT = "if the text is Windows-1252 or Latin-1, send the option encoding=windows-1252 or encoding=latin-1"


class Transcoder:
    """Makes a text UTF-8, block by block. Raises InvalidInput for bytes that are not of the encoding."""

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._begun, self._bytes = False, 0

    def transcode(self, block: bytes, final: bool = False) -> bytes:
        try:
            text = self._decoder.decode(block, final)
        except UnicodeDecodeError as error:
            at = self._bytes + len(block) - len(error.object) + error.start
            what = (
                "ends within a character" if error.end >= len(error.object) and final else "is none of its characters"
            )
            raise InvalidInput(
                f"the text is not {_CODECS.get(self._encoding, self._encoding)}: byte {at} "
                f"({error.object[error.start]:#04x}) {what}"
            ) from None
        self._bytes += len(block)
        if text and not self._begun:
            self._begun, text = True, text.removeprefix("\ufeff")
        return text.encode()

    def blocks(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        for block in blocks:
            yield self.transcode(block)
        yield self.transcode(b"", final=True)


def decode(text: bytes, encoding: str | None) -> bytes:
    """A whole text in UTF-8. None: it is."""
    return text if encoding is None else Transcoder(encoding).transcode(text, final=True)


def known_encoding(given: str) -> str | None:
    """The codec of the option `encoding`; None for UTF-8. Raises InvalidOptions that lists the encodings."""
    try:
        name = codecs.lookup(given).name
    except (LookupError, ValueError):
        name = ""
    if name not in _CODECS:
        raise InvalidOptions(f"the encoding {given[:40]!r} is not supported; expected one of {', '.join(_NAMES)}")
    return None if name == "utf-8" else name


def encoding_of_mark(prefix: bytes) -> str | None:
    """The encoding that a byte order mark at the beginning says; None without one."""
    if not prefix.startswith(_ANY_MARK):
        return None
    return next((encoding for mark, encoding in _MARKS.items() if prefix.startswith(mark)), None)


def require_utf8(prefix: bytes, between: bytes = b"\n", *, has_header: bool) -> None:
    """Raises InvalidInput, with the option that helps, for the beginning of a text in another encoding.

    That is shown by the header, or by the records with characters beyond ASCII, if none of them is UTF-8, and they are
    half of all or would be words in Windows-1252. Others are merely damaged and fail alone, as one among others does.
    `between`: what ends each.
    """
    fault = None if prefix.isascii() else _fault(prefix)
    if fault is None:
        return
    records = [record for record in prefix.split(between) if record.strip()]
    header = records.pop(0) if has_header else b""
    odd = [record for record in records if not record.isascii()]
    shown = len(odd) > 1 and (2 * len(odd) >= len(records) or all(map(_has_words, odd)))
    is_foreign = bool(odd) and (shown or len(records) == 1) and not any(map(_is_utf8, odd))
    if not _is_utf8(header) or is_foreign:
        raise InvalidInput(f"byte {fault} ({prefix[fault]:#04x}) is not UTF-8; {HINT}")


def _fault(prefix: bytes) -> int | None:
    """The first byte that is not UTF-8. A character that is cut off at the end is none."""
    try:
        prefix.decode()
    except UnicodeDecodeError as error:
        is_cut = error.reason == "unexpected end of data" and error.end == len(prefix)
        return None if is_cut else error.start
    return None


def _has_words(text: bytes) -> bool:
    """Whether Windows-1252 makes words of a text: letters beyond ASCII, and what is set between them. It has a rare
    letter for 0xff, which is rather a damaged byte."""
    try:
        beyond = {char for char in text.decode("windows-1252") if not char.isascii()}
    except UnicodeDecodeError:
        return False
    return "\u00ff" not in beyond and all(char.isalpha() or char in _SET_BETWEEN for char in beyond)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
