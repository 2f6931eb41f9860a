"""Which addresses webhooks may be sent to: by their form, when they are given, and by the addresses of their host,
whenever they are used.

A webhook makes the server send requests to where a client wants them (SSRF): to its own host, to the network behind it,
to the metadata of a cloud. So only public addresses are reached, unless the settings allow a network.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from batchserve.errors import InvalidOptions
from batchserve.settings import Network
from batchserve.webhooks.terms import LONGEST_URL

__all__ = ["Address", "HookUrl", "IPAddress", "is_allowed", "is_within", "parsed", "require_allowed", "target_of"]

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_PLAIN = re.compile(r"[!-~]+")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9.])?")
_DEFAULT_PORTS = {"https": 443, "http": 80}
_FIRST_FREE_PORT = 1024
_SERVICES = frozenset(
    {2049, 2375, 2376, 2379, 2380, 3306, 5432, 6000, 6379, 6443, 9042, 9200, 9300, 10250, 11211, 27017}
)
"""Ports of databases and other services that might take a request for a command."""
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20")))
"""Networks in IANA's registries of special purposes that some releases of Python take for public, in whole or in part.
Nothing in them is the host of a webhook."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48")
_COMPATIBLE = ipaddress.ip_network("::/96")


@dataclass(frozen=True, slots=True)
class Address:
    """The parts of a URL that a request needs."""

    scheme: str
    host: str
    """A name, or an address without brackets."""
    port: int
    target: str
    """Path and query."""

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def parsed(url: str) -> Address:
    """The parts of a URL. Raises ValueError that says what is wrong with its form."""
    if len(url) > LONGEST_URL:
        raise ValueError(f"expected at most {LONGEST_URL} characters, got {len(url)}")
    if not _PLAIN.fullmatch(url) or "\\" in url:
        raise ValueError("expected a URL of printable ASCII characters, without spaces and backslashes")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ValueError(f"this is not a URL: {error}") from None
    if parts.scheme not in _DEFAULT_PORTS or not host:
        raise ValueError("expected a URL such as https://example.com/hook")
    if "@" in parts.netloc:
        raise ValueError("expected a URL without a user and a password: requests are signed instead")
    if parts.fragment:
        raise ValueError("expected a URL without a fragment")
    if not (_literal(host) or _HOST.fullmatch(host)):
        raise ValueError(f"{host[:100]!r} is not the name of a host; expected ASCII, other names as xn--")
    port = _DEFAULT_PORTS[parts.scheme] if port is None else port
    if port in _SERVICES or (port < _FIRST_FREE_PORT and port not in _DEFAULT_PORTS.values()):
        raise ValueError(f"port {port} is not for webhooks; expected 443, 80, or one above 1023 of no other service")
    return Address(parts.scheme, host, port, f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}")


def _checked(url: str) -> str:
    parsed(url)
    return url


HookUrl = Annotated[str, AfterValidator(_checked), Field(max_length=LONGEST_URL)]
"""A URL of the right form, given by a client."""


def require_allowed(url: str, networks: Sequence[Network]) -> None:
    """Raises InvalidOptions for a URL that no request will be sent to, as far as that is known without its host's
    addresses."""
    try:
        address = parsed(url)
    except ValueError as error:
        raise InvalidOptions(f"webhook: {error}") from None
    if address.scheme == "http" and not networks:
        raise InvalidOptions("webhook: expected https; http is for networks that BATCHSERVE_WEBHOOK_NETWORKS allows")
    literal = _literal(address.host)
    if literal is not None and not is_allowed(literal, networks):
        raise InvalidOptions(
            f"webhook: {address.host} is not a public address, nor in a network that BATCHSERVE_WEBHOOK_NETWORKS allows"
        )


def is_allowed(address: IPAddress, networks: Sequence[Network]) -> bool:
    """Whether requests may be sent to this address."""
    return is_within(address, networks) or _is_public(address)


def is_within(address: IPAddress, networks: Sequence[Network]) -> bool:
    """Whether an address, or the one that it stands for, is in one of these networks."""
    return any(address in network or _embedded(address) in network for network in networks)


def _is_public(address: IPAddress) -> bool:
    judged = _embedded(address)
    if isinstance(judged, ipaddress.IPv6Address) and judged not in _GLOBAL_UNICAST:
        return False
    if any(judged in network for network in _SPECIAL):
        return False
    return judged.is_global and not (judged.is_multicast or judged.is_reserved or judged.is_unspecified)


def _embedded(address: IPAddress) -> IPAddress:
    """The address that one of IPv6 stands for: of IPv4, by mapping, NAT64, 6to4 or the old compatible form."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64[0] or address in _COMPATIBLE:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    if address in _NAT64[1]:
        return ipaddress.IPv4Address("0.0.0.0")  # noqa: S104 - its place depends on the network: of no use here
    return address.ipv4_mapped or address.sixtofour or address


def target_of(url: str) -> str:
    """The host and port of a URL; the URL itself, if it is none: of a damaged row."""
    try:
        address = parsed(url)
    except ValueError:
        return url[:300]
    return f"{address.host}:{address.port}"


def _literal(host: str) -> IPAddress | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
