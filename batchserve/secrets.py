"""Secrets in files, as containers get them: `NAME_FILE` names the file with the value of the variable `NAME`."""

from collections.abc import MutableMapping
from pathlib import Path

from batchserve.errors import InvalidOptions

__all__ = ["take_from_files"]

_PREFIX, _SUFFIX = "BATCHSERVE_", "_FILE"
_OTHERS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
"""Variables of others that hold secrets. AWS has names of its own that end so: AWS_WEB_IDENTITY_TOKEN_FILE."""


def take_from_files(environment: MutableMapping[str, str]) -> None:
    """Sets each variable whose value is in a file: any of batchserve, and the keys of an object store. A line break at
    the end of a file does not count. Raises InvalidOptions for a file that cannot be read, and for a variable that is
    set as well."""
    for told, path in list(environment.items()):
        name = told.removesuffix(_SUFFIX)
        if name == told or not (name.startswith(_PREFIX) or name in _OTHERS) or not path:
            continue
        if environment.get(name):
            raise InvalidOptions(f"both {name} and {told} are set: expected one of them")
        try:
            environment[name] = Path(path).read_text().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidOptions(f"{told} names {path!r}, which cannot be read: {error}") from error
