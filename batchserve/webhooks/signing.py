"""Secrets and signatures of Standard Webhooks: HMAC-SHA256 over ID, time and body, one for each valid secret."""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Iterable

__all__ = ["headers_of", "new_secret"]

_PREFIX = "whsec_"
_BYTES = 32


def new_secret() -> str:
    """A new, unguessable secret."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(_BYTES)).decode()


def headers_of(message_id: str, timestamp: int, body: bytes, valid: Iterable[str]) -> dict[str, str]:
    """The headers that identify a message and prove its origin. `valid`: the secrets by which it is signed."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{_signature(secret, signed)}" for secret in valid),
    }


def _signature(secret: str, signed: bytes) -> str:
    key = base64.b64decode(secret.removeprefix(_PREFIX))
    return base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
