"""Which addresses webhooks may be sent to: the form of URLs, and the addresses of hosts."""

import ipaddress

import pytest

from batchserve.errors import InvalidOptions
from batchserve.settings import Settings, networks_of
from batchserve.webhooks.addresses import is_allowed, parsed, require_allowed, target_of


@pytest.mark.parametrize(
    ("url", "authority", "target"),
    [
        ("https://example.com", "example.com", "/"),
        ("https://Example.com/hook?a=b&c", "example.com", "/hook?a=b&c"),
        ("https://example.com:8443/", "example.com:8443", "/"),
        ("https://example.com:443/x", "example.com", "/x"),
        ("http://10.1.2.3:8080/x", "10.1.2.3:8080", "/x"),
        ("https://[2001:db8::1]/x", "[2001:db8::1]", "/x"),
        ("https://xn--bcher-kva.example/", "xn--bcher-kva.example", "/"),
        ("https://my_host.internal/", "my_host.internal", "/"),
    ],
)
def test_the_parts_of_an_address_are_those_of_a_request(url: str, authority: str, target: str) -> None:
    found = parsed(url)
    assert (found.authority, found.target) == (authority, target)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "printable ASCII"),
        ("example.com", "such as https://"),
        ("ftp://example.com/", "such as https://"),
        ("file:///etc/passwd", "such as https://"),
        ("https://", "such as https://"),
        ("https:///path", "such as https://"),
        ("https://user@example.com/", "without a user"),
        ("https://user:secret@example.com/", "without a user"),
        ("https://@example.com/", "without a user"),
        ("https://example.com/#part", "without a fragment"),
        ("https://example.com/a b", "printable ASCII"),
        ("https://example.com/\r\nX: y", "printable ASCII"),
        ("https://exam\tple.com/", "printable ASCII"),
        ("https://example.com/\0", "printable ASCII"),
        ("https://example.com\\@127.0.0.1/", "backslashes"),
        ("https://bücher.example/", "printable ASCII"),
        ("https://exa%6dple.com/", "not the name of a host"),
        ("https://-example.com/", "not the name of a host"),
        ("https://example.com:99999/", "not a URL"),
        ("https://example.com:x/", "not a URL"),
        ("https://[::1/", "not a URL"),
        ("https://example.com:22/", "port 22"),
        ("https://example.com:25/", "port 25"),
        ("https://example.com:0/", "port 0"),
        ("https://example.com:6379/", "port 6379"),
        ("https://example.com:5432/", "port 5432"),
        ("https://example.com/" + "x" * 2048, "at most 2048"),
    ],
)
def test_an_address_of_another_form_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parsed(url)
    with pytest.raises(InvalidOptions, match=reason):
        require_allowed(url, networks_of("0.0.0.0/0,::/0"))
    assert len(target_of(url)) <= 300  # of a damaged row


PUBLIC = ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101", "2002:101:101::1"]
"""The last three stand for 1.1.1.1: mapped, by NAT64, by 6to4."""
NOT_PUBLIC = [
    "127.0.0.1", "127.9.9.9", "0.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "192.0.0.1", "192.0.0.8", "192.0.0.9", "192.0.0.169", "192.0.0.172", "192.0.0.255", "192.88.99.1",
    "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1",
    "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%1", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1",
    "100::1", "4000::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "::127.0.0.1", "::10.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe", "2002:7f00:1::1", "2002:a00:1::1",
    "2001:0:1:2:0:0:80ff:fffe", "2001:1::1", "2001:20::1", "2001:1ff:ffff::1", "3fff::1", "3fff:fff:ffff::1", "5f00::1",
    "100:0:0:1::1", "::ffff:192.0.0.9", "64:ff9b::c000:9", "2002:c000:9::1",
]  # fmt: skip
"""Among them 127.0.0.1, 10.0.0.1 and 169.254.169.254 in each form of IPv6."""


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_allowed(ipaddress.ip_address(address), ())


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_all_others_are_refused(address: str) -> None:
    assert not is_allowed(ipaddress.ip_address(address), ())
    assert not is_allowed(ipaddress.ip_address(address), networks_of("198.19.0.0/16"))


@pytest.mark.parametrize(
    ("networks", "address", "allowed"),
    [
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "::ffff:10.1.2.3", True),
        ("10.0.0.0/8", "64:ff9b::a01:203", True),
        ("10.0.0.0/8", "11.1.2.3", True),
        ("10.0.0.0/8", "192.168.1.1", False),
        ("10.0.0.0/8", "127.0.0.1", False),
        ("fd00::/8, 127.0.0.0/8", "fd12::1", True),
        ("fd00::/8, 127.0.0.0/8", "127.0.0.1", True),
        ("fd00::/8", "fe80::1", False),
    ],
)
def test_the_networks_of_the_settings_are_allowed_as_well(networks: str, address: str, allowed: bool) -> None:
    assert is_allowed(ipaddress.ip_address(address), networks_of(networks)) is allowed


@pytest.mark.parametrize(
    ("url", "networks", "reason"),
    [
        ("http://example.com/", "", "expected https"),
        ("https://127.0.0.1/", "", "not a public address"),
        ("https://[::1]/", "", "not a public address"),
        ("https://[::ffff:169.254.169.254]/", "", "not a public address"),
        ("https://192.168.1.1/", "10.0.0.0/8", "not a public address"),
    ],
)
def test_what_can_never_be_sent_is_refused_when_it_is_given(url: str, networks: str, reason: str) -> None:
    with pytest.raises(InvalidOptions, match=reason):
        require_allowed(url, networks_of(networks))


def test_http_may_be_given_where_a_network_is_allowed() -> None:
    require_allowed("http://hooks.internal:8080/", networks_of("10.0.0.0/8"))


@pytest.mark.parametrize("text", ["10.0.0.0/33", "example.com", "10.0.0.1/8", "10.0.0.0/8;fd00::/8"])
def test_a_setting_that_names_no_networks_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="webhook_networks"):
        Settings(webhook_networks=text)
