"""Multipart uploads of a bucket: those whose parts clients send, and those that killed processes left. They are no
objects, but kept and paid for until they are completed or aborted.

The client of the store has no calls for them, so these requests are signed here (Signature Version 4, in the query).
That needs the secret key; a host that has a role instead leaves what was left to a lifecycle rule.
"""

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape, unescape
from urllib.parse import parse_qs, quote, urlsplit

from batchserve.errors import Unavailable

__all__ = ["PendingUpload", "SentPart", "SignedBucket"]

_UPLOAD = re.compile(r"<Upload>.*?</Upload>", re.DOTALL)
_PART = re.compile(r"<Part>.*?</Part>", re.DOTALL)
_LIFE = 300
"""Seconds for which a signed request of this process is valid."""
_JOINING = 300.0
"""Seconds that the store may take to join the parts of a large object."""


@dataclass(frozen=True, slots=True)
class PendingUpload:
    """An upload of an object that is neither complete nor aborted."""

    path: str
    upload_id: str
    begun: float
    """In seconds since the epoch, by the clock of the store."""


@dataclass(frozen=True, slots=True)
class SentPart:
    """A part of an upload, as the store has it."""

    number: int
    tag: str
    bytes: int
    sent: float
    """In seconds since the epoch, by the clock of the store."""


class SignedBucket:
    """A bucket, by requests with queries that are signed here."""

    def __init__(self, url: str, secret: str) -> None:
        """`url`: a signed URL of the object `probe`, which tells where the bucket is and who signs."""
        parts, query = urlsplit(url), parse_qs(url.partition("?")[2])
        self._base = f"{parts.scheme}://{parts.netloc}"
        self._host, self._root = parts.netloc, parts.path.removesuffix("probe")
        self._access, _, self._region, self._service, _ = query["X-Amz-Credential"][0].rsplit("/", 4)
        self._token = query.get("X-Amz-Security-Token", [""])[0]
        self._secret = secret

    @classmethod
    def of(cls, url: str) -> "SignedBucket | None":
        """None where the environment does not have the secret of the key that signed the URL."""
        made = cls(url, os.environ.get("AWS_SECRET_ACCESS_KEY", ""))
        return made if made._secret and made._access == os.environ.get("AWS_ACCESS_KEY_ID") else None

    def pending(self, prefix: str) -> Iterator[PendingUpload]:
        """The uploads of objects whose path begins with a prefix."""
        marks: dict[str, str] = {}
        while True:
            page = self._request("GET", "", {"uploads": "", "prefix": prefix, **marks})
            for upload in _UPLOAD.findall(page):
                begun = datetime.fromisoformat(_field(upload, "Initiated")).timestamp()
                path = _field(upload, "Key")
                if path.startswith(prefix):
                    yield PendingUpload(path, _field(upload, "UploadId"), begun)
            if _field(page, "IsTruncated") != "true":
                return
            marks = {
                "key-marker": _field(page, "NextKeyMarker"),
                "upload-id-marker": _field(page, "NextUploadIdMarker"),
            }

    def begin(self, path: str) -> str:
        """The ID of a new upload. Raises Unavailable."""
        if not (upload_id := _field(self._request("POST", path, {"uploads": ""}), "UploadId")):
            raise Unavailable("the object store does not begin a multipart upload")
        return upload_id

    def part_url(self, path: str, upload_id: str, number: int, seconds: float) -> str:
        """A URL that takes the bytes of a part by PUT."""
        return self._signed("PUT", path, {"partNumber": str(number), "uploadId": upload_id}, int(seconds))

    def parts(self, path: str, upload_id: str) -> list[SentPart]:
        """What was sent of an upload, in order; nothing of one that has ended."""
        latest: dict[int, SentPart] = {}
        for part in sorted(self._sent(path, upload_id), key=lambda part: part.sent):
            latest[part.number] = part  # SeaweedFS lists a part as often as it was sent
        return sorted(latest.values(), key=lambda part: part.number)

    def _sent(self, path: str, upload_id: str) -> Iterator[SentPart]:
        marks: dict[str, str] = {}
        while True:
            page = self._request("GET", path, {"uploadId": upload_id, **marks})
            for part in _PART.findall(page):
                sent = datetime.fromisoformat(_field(part, "LastModified")).timestamp()
                yield SentPart(int(_field(part, "PartNumber")), _field(part, "ETag"), int(_field(part, "Size")), sent)
            if _field(page, "IsTruncated") != "true":
                return
            marks = {"part-number-marker": _field(page, "NextPartNumberMarker")}

    def join(self, path: str, upload_id: str, parts: Iterable[SentPart]) -> None:
        """Makes an object of the parts. No effect on an upload that has ended, or whose parts the store refuses."""
        listed = "".join(
            f"<Part><PartNumber>{part.number}</PartNumber><ETag>{escape(part.tag)}</ETag></Part>" for part in parts
        )
        body = f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>"
        self._request("POST", path, {"uploadId": upload_id}, body, _JOINING)

    def abort(self, path: str, upload_id: str) -> None:
        """Removes its parts; an upload that has ended is not an error."""
        self._request("DELETE", path, {"uploadId": upload_id})

    def _request(self, method: str, path: str, query: Mapping[str, str], body: str = "", seconds: float = 20.0) -> str:
        """The answer's text, empty for what is not there, not permitted or not known to the store. Raises
        Unavailable."""
        import httpx2

        try:
            answer = httpx2.request(method, self._signed(method, path, query, _LIFE), content=body, timeout=seconds)
        except httpx2.HTTPError as error:
            raise Unavailable(f"the object store does not respond: {type(error).__name__}") from error
        if answer.status_code >= 500 and answer.status_code != 501:
            raise Unavailable(f"the object store does not respond: {answer.status_code}")
        return answer.text if answer.is_success else ""

    def _signed(self, method: str, path: str, query: Mapping[str, str], seconds: int) -> str:
        """The URL of a request with its signature, which is valid so long."""
        now = datetime.now(UTC)
        stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
        scope = f"{day}/{self._region}/{self._service}/aws4_request"
        signing = {
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Credential": f"{self._access}/{scope}",
            "X-Amz-Date": stamp,
            "X-Amz-Expires": str(seconds),
            "X-Amz-SignedHeaders": "host",
            **({"X-Amz-Security-Token": self._token} if self._token else {}),
        }
        named = sorted((quote(name, safe=""), quote(value, safe="")) for name, value in {**query, **signing}.items())
        asked = "&".join(f"{name}={value}" for name, value in named)
        place = self._root + quote(path, safe="/")
        canonical = f"{method}\n{place}\n{asked}\nhost:{self._host}\n\nhost\nUNSIGNED-PAYLOAD"
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        key = f"AWS4{self._secret}".encode()
        for part in (day, self._region, self._service, "aws4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        return f"{self._base}{place}?{asked}&X-Amz-Signature={hmac.digest(key, text.encode(), 'sha256').hex()}"


def _field(text: str, name: str) -> str:
    """The text of the first element of a name; empty where there is none."""
    found = re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
    return unescape(found[1]) if found else ""
