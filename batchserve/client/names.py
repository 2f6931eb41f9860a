"""Names of files: which are tables or images, and what the result of a file is called."""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath

from batchserve.errors import InvalidOptions

__all__ = ["errors_name", "is_folder", "partial_name", "placed", "require_other", "result_name", "safe_name", "stem_of"]

COMPRESSED = (".gz", ".zst")
"""Suffixes behind that of the file which is compressed."""


def stem_of(name: str) -> str:
    """The name of a file without its suffix, and without that of its compression: `2026.11` of `2026.11.csv.gz`."""
    path = PurePath(name)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).stem


def result_name(name: str, suffix: str) -> str:
    return f"{stem_of(name)}.predictions{suffix}"


def partial_name(name: str, suffix: str) -> str:
    return f"{stem_of(name)}.partial{suffix}"


def errors_name(name: str) -> str:
    """Of the list of the records of a file that could not be scored."""
    return f"{stem_of(name)}.errors.jsonl"


def safe_name(filename: str | None) -> str | None:
    """The name of a file in a folder, as a client of the server once gave it; None if there is none."""
    last = re.split(r"[/\\]", filename or "")[-1]
    return None if last in ("", ".", "..") else last


def is_folder(output: str) -> bool:
    return output.endswith(("/", os.sep)) or os.path.isdir(output)  # noqa: PTH112 - False for a name that is too long


def require_other(output: str, inputs: Sequence[str | os.PathLike[str]]) -> None:
    """Raises InvalidOptions for a file of results that is one of the inputs: it would be gone."""
    for input in inputs:
        if os.path.exists(output) and os.path.exists(input) and os.path.samefile(output, input):  # noqa: PTH110, PTH121 - of any name
            raise InvalidOptions(f"output: {output} is an input, which its result would replace; name another file")


def placed(output: str, name: str) -> Path:
    """The path `output`, or a file called `name` in it where it is a folder: it exists, or ends with a slash and is
    made."""
    path = Path(output)
    if not is_folder(output):
        return path
    path.mkdir(parents=True, exist_ok=True)
    return path / name
