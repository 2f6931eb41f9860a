"""A case: a few requests in their order, and their expected outcome. It can be stored in a file."""

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import quote

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A request. `{job}` in its target is the job that an earlier step of the case made."""

    method: str
    target: str
    headers: Headers = ()
    body: bytes = b""
    tenant: str = ""
    """The owner of the key that is sent; empty: none."""
    must: tuple[int, ...] = ()
    """The expected statuses; empty: any except those of a fault."""
    seconds: float = 0.0
    """Seconds after which the client disconnects; 0: it reads everything."""
    raw: tuple[bytes, ...] = ()
    """Sent instead, unchanged, with a pause between pieces. `{key}` is replaced; the response may be missing."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The facts about a job that are known beforehand."""

    total: int | None = None
    failed: tuple[int, ...] | None = None
    """Exactly the records that fail."""
    answers: Mapping[str, str] = field(default_factory=dict)
    """The prediction for each record that has a value in the column `id`, by that value."""
    refusable: bool = False
    """Whether the job may be refused as a whole; otherwise it must be completed."""
    delimiter: str = ","


@dataclass(frozen=True, slots=True)
class Case:
    kind: str
    steps: tuple[Step, ...]
    claim: Claim | None = None
    note: str = ""

    def to_json(self) -> str:
        made = asdict(self)
        for step in made["steps"]:
            step["body"] = _packed(step["body"])
            step["raw"] = [_packed(piece) for piece in step["raw"]]
        return json.dumps(made, indent=1)


def from_json(text: str) -> Case:
    read = json.loads(text)
    claim = read["claim"]
    if claim is not None:
        failed = claim.pop("failed")
        claim = Claim(**claim, failed=None if failed is None else tuple(failed))
    return Case(read["kind"], tuple(_step(step) for step in read["steps"]), claim, read["note"])


def _step(read: dict[str, Any]) -> Step:
    return Step(
        read["method"], read["target"], tuple((name, value) for name, value in read["headers"]),
        _unpacked(read["body"]), read["tenant"], tuple(read["must"]), read["seconds"],
        tuple(_unpacked(piece) for piece in read["raw"]),
    )  # fmt: skip


def _packed(data: bytes) -> str:
    """Text where it can be read, base64 where not."""
    text = data.decode("latin-1")
    if text.isascii() and all(sign.isprintable() or sign in "\n\t" for sign in text):
        return f"text:{text}"
    return f"base64:{base64.b64encode(data).decode()}"


def _unpacked(text: str) -> bytes:
    kind, _, rest = text.partition(":")
    return base64.b64decode(rest) if kind == "base64" else rest.encode()


def query(options: Mapping[str, str] | list[tuple[str, str]]) -> str:
    """Percent-encoded; half a character as well."""
    pairs = options.items() if isinstance(options, Mapping) else options
    return "&".join(
        f"{quote(name, safe='', errors='surrogatepass')}={quote(value, safe='', errors='surrogatepass')}"
        for name, value in pairs
    )
