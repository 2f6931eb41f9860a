"""Databases of others, which an administrator names: results go into their tables, and the rows of queries are inputs.

Only scoring processes write to them; psycopg is imported by the modules of this package alone, when one is used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec

from batchserve.errors import InvalidOptions, LocationRefused

__all__ = ["Place", "place_of"]


@dataclass(frozen=True, slots=True)
class Place:
    """A database, as jobs name it."""

    name: str
    address: str = field(repr=False)
    """Of libpq. It may have a password."""


def place_of(name: str, addresses: Mapping[str, str]) -> Place:
    """The database of this name. `addresses`: those of a tenant. Raises LocationRefused for any other name, and
    InvalidOptions where the extra is not installed."""
    address = addresses.get(name)
    if address is None:
        shown = ", ".join(sorted(addresses)) or "none: an administrator names some by BATCHSERVE_TABLES"
        raise LocationRefused(f"{name!r} is not a database that this tenant may use; expected one of {shown}")
    if find_spec("psycopg") is None:
        raise InvalidOptions(f"the database {name} needs the extra postgres: pip install 'batchserve[postgres]'")
    return Place(name, address.replace("+psycopg", "", 1))
