"""The client for asyncio."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import httpx2

from batchserve.client.core import Core
from batchserve.client.many import FilesReport, Inputs, predict_files
from batchserve.client.options import FilesOptions
from batchserve.client.quotas import AsyncQuotas
from batchserve.client.transport import AsyncWire, Transport
from batchserve.errors import InvalidOptions

DEFAULT_URL = "http://127.0.0.1:8000"


def settings_of(url: str | None, api_key: str | None) -> tuple[str, dict[str, str]]:
    """A client's address and headers, from its arguments or the environment. Raises InvalidOptions for a key that no
    header can have, and for a file of it that cannot be read."""
    url = url or os.environ.get("BATCHSERVE_URL") or DEFAULT_URL
    api_key = (api_key or os.environ.get("BATCHSERVE_API_KEY") or _key_in_file()).strip()
    if not all("!" <= character <= "~" for character in api_key):
        raise InvalidOptions(
            "the API key has characters that no key has: expected visible ones of ASCII"
        )  # not the key
    headers = {"User-Agent": f"batchserve-python/{_version()}"}
    return url, headers | ({"Authorization": f"Bearer {api_key}"} if api_key else {})


def _key_in_file() -> str:
    """The content of the file that BATCHSERVE_API_KEY_FILE names, as containers get their secrets."""
    if not (file := os.environ.get("BATCHSERVE_API_KEY_FILE")):
        return ""
    try:
        return Path(file).read_text()
    except (OSError, ValueError) as error:
        raise InvalidOptions(f"BATCHSERVE_API_KEY_FILE: {error}") from error


def _version() -> str:
    """Of the package that includes the client: the whole service, or the client alone."""
    try:
        return version("batchserve")
    except PackageNotFoundError:
        return version("batchserve-client")


class AsyncClient(Core):
    """`Client` for asyncio: the same arguments and the same calls, awaited."""

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        max_retries: int = 2,
        timeout: float = 60.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        url, headers = settings_of(url, api_key)
        wire = AsyncWire(httpx2.AsyncClient(headers=headers, transport=transport))
        super().__init__(Transport(wire, url, max_retries=max_retries, timeout=timeout))
        self.quotas = AsyncQuotas(self._transport)

    async def predict_files(
        self, paths: Inputs, model: str, output: str | os.PathLike[str], **options: Unpack[FilesOptions]
    ) -> FilesReport:
        """Predicts many files, each as one job, into a folder: `<name>.predictions.<suffix>` for each, and
        `<name>.errors.jsonl` for its failed records. `paths`: files, and folders, of which all tables are taken.

        A call continues where an earlier one ended, for whatever reason: a file is sent and scored again only if it has
        changed, or the model, the options or its result have. Raises FilesFailed, with a report, when some failed and
        all others are done.
        """
        return await predict_files(self._transport, paths, model, output, options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
