"""The fields of a form without files."""

from urllib.parse import parse_qsl

from fastapi import Request

from batchserve.errors import BadRequest, PayloadTooLarge

__all__ = ["Fields", "read_fields"]

_MOST_BYTES = 256 * 2**10


class Fields:
    """The values by name, each in the order in which it came."""

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self._pairs = pairs

    def first(self, name: str) -> str:
        """Empty when there is none."""
        return next((value for known, value in self._pairs if known == name), "")

    def all(self, name: str) -> list[str]:
        return [value for known, value in self._pairs if known == name]

    def below(self, prefix: str) -> dict[str, str]:
        """Those whose names begin with this, by the rest of their names; none that is empty."""
        return {name.removeprefix(prefix): value for name, value in self._pairs if name.startswith(prefix) and value}


async def read_fields(request: Request) -> Fields:
    """Raises BadRequest and PayloadTooLarge."""
    body = b""
    async for block in request.stream():
        body += block
        if len(body) > _MOST_BYTES:
            raise PayloadTooLarge(f"a form may have {_MOST_BYTES:,} bytes")
    try:
        return Fields(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=10_000))
    except ValueError as error:
        raise BadRequest(f"this is no form: {error}") from None
