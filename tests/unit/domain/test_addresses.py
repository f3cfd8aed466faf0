"""The reading of users' URLs and the judging of addresses, without a network."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.domain.addresses import parse_target, refusal_of, unwrap
from services.domain.errors import EgressRefused

LOOPBACK_SPELLINGS = [
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "2130706433",
    "0x7f000001",
    "0x7f.0.0.1",
    "0x7f.1",
    "017700000001",
    "0177.0.0.1",
    "0177.0x0.0.01",
    "127.0.0.1.",
    "\uff11\uff12\uff17.\uff10.\uff10.\uff11",
    "127\u30020\u30020\u30021",
    "127\uff0e0\uff0e0\uff0e1",
    "\u2460\u2461\u2466.0.0.1",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "[::127.0.0.1]",
    "[2001:db8::5efe:7f00:1]",
    "[2001:0:4136:e378:8000:63bf:80ff:fffe]",
]


@pytest.mark.parametrize("host", LOOPBACK_SPELLINGS)
def test_every_spelling_of_loopback_is_seen_as_loopback(host: str) -> None:
    target = parse_target(f"http://{host}/x")
    assert target.address is not None
    assert unwrap(target.address) == ipaddress.ip_address("127.0.0.1")
    assert refusal_of(target.address) == "loopback"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("0.0.0.0", "unspecified"),
        ("0.1.2.3", "unspecified"),
        ("10.0.0.1", "private"),
        ("100.64.0.1", "private"),
        ("100.127.255.255", "private"),
        ("127.255.255.254", "loopback"),
        ("168.63.129.16", "reserved"),
        ("169.254.169.254", "link-local"),
        ("172.16.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.0.0.192", "reserved"),
        ("192.0.2.1", "documentation"),
        ("192.88.99.1", "reserved"),
        ("192.168.1.1", "private"),
        ("198.18.0.1", "reserved"),
        ("198.51.100.7", "documentation"),
        ("203.0.113.7", "documentation"),
        ("224.0.0.1", "multicast"),
        ("239.255.255.255", "multicast"),
        ("240.0.0.1", "reserved"),
        ("255.255.255.255", "reserved"),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("64:ff9b:1::a00:1", "private"),
        ("64:ff9b::a00:1", "private"),
        ("100::1", "reserved"),
        ("2001:2::1", "reserved"),
        ("2001:10::1", "reserved"),
        ("2001:db8::1", "documentation"),
        ("2002:a9fe:a9fe::1", "link-local"),
        ("3fff::1", "documentation"),
        ("4000::1", "reserved"),
        ("5f00::1", "reserved"),
        ("fc00::1", "private"),
        ("fd00:ec2::254", "private"),
        ("fe80::1", "link-local"),
        ("fec0::1", "private"),
        ("ff02::1", "multicast"),
        ("::ffff:10.0.0.1", "private"),
        ("::ffff:169.254.169.254", "link-local"),
    ],
)
def test_address_that_is_not_public_is_refused_by_its_kind(text: str, word: str) -> None:
    assert refusal_of(ipaddress.ip_address(text)) == word


@pytest.mark.parametrize(
    "text",
    [
        "1.1.1.1",
        "8.8.8.8",
        "172.32.0.1",
        "100.128.0.1",
        "2606:4700::1111",
        "64:ff9b::808:808",
        "2a00:1450::1",
    ],
)
def test_public_address_is_reachable(text: str) -> None:
    assert refusal_of(ipaddress.ip_address(text)) is None


@pytest.mark.parametrize("text", ["10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::a01:203", "2002:a01:203::1"])
def test_allow_list_is_compared_with_the_unwrapped_address(text: str) -> None:
    address = ipaddress.ip_address(text)
    assert refusal_of(address, [ipaddress.ip_network("10.1.0.0/16")]) is None
    assert (
        refusal_of(address, [ipaddress.ip_network("10.2.0.0/16"), ipaddress.ip_network("fd00::/8")])
        == "private"
    )


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.org/x.zip",
        "//example.org/x.zip",
        "ftp://example.org/x.zip",
        "file:///etc/passwd",
        "gopher://example.org/",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
        "unix:///run/docker.sock",
        "http:/example.org/",
        "http:example.org",
        "http://",
        "http:///x",
        "http://?x",
        "http://user:secret@example.org/",
        "http://user@example.org/",
        "http://example.org@10.0.0.1/",
        "http://@10.0.0.1/",
        "http://example.org\\@10.0.0.1/",
        "http://example.org\t/",
        "http://exa\nmple.org/",
        "http://example.org/\r\nHost: x",
        "http://example .org/",
        "http://example.org:0/",
        "http://example.org:65536/",
        "http://example.org:-1/",
        "http://example.org:80:80/",
        "http://example.org:8\uff100/",
        "http://%31%32%37.0.0.1/",
        "http://exam_ple-.org/",
        "http://-example.org/",
        "http://example..org/",
        "http://.example.org/",
        "http://127.0.0.256/",
        "http://127.0.0.0.1/",
        "http://1.2.3.4.5/",
        "http://256.1/",
        "http://4294967296/",
        "http://0x100000000/",
        "http://08.0.0.1/",
        "http://host.123/",
        "http://a.0x/",
        "http://[::1/",
        "http://::1/",
        "http://[::1]x/",
        "http://[fe80::1%25eth0]/",
        "http://[fe80::1%eth0]/",
        "http://[::ffff:127.0.0.1.1]/",
        "http://[v1.x]/",
        "http://[]/",
        "http://\u00ad/",
        "http://" + "a" * 64 + ".org/",
        "http://" + "a." * 127 + "org/",
        "http://example.org/" + "x" * 9000,
    ],
)
def test_malformed_or_foreign_url_is_refused(url: str) -> None:
    with pytest.raises(EgressRefused):
        parse_target(url)


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("HTTPS://Example.ORG", "https://example.org/"),
        ("https://example.org:443/a", "https://example.org/a"),
        ("http://example.org:8080?x=1#part", "http://example.org:8080/?x=1"),
        (
            "https://b\u00fccher.example/\u00fc b.zip?s=%2F&t=a+b",
            "https://xn--bcher-kva.example/%C3%BC%20b.zip?s=%2F&t=a+b",
        ),
        ("http://[2606:4700:0:0::1]:81/", "http://[2606:4700::1]:81/"),
        ("http://my_bucket.example.org./k", "http://my_bucket.example.org/k"),
        ("http://0x08.0x08.0x08.0x08/", "http://8.8.8.8/"),
    ],
)
def test_url_is_spelled_anew_in_one_canonical_way(url: str, canonical: str) -> None:
    assert parse_target(url).url == canonical


def test_refusal_never_repeats_the_url() -> None:
    with pytest.raises(EgressRefused) as caught:
        parse_target("http://user:hunter2@example.org/x?token=hunter2")
    assert "hunter2" not in str(caught.value)


@given(st.integers(0, 2**32 - 1))
def test_all_spellings_of_an_ipv4_address_are_read_alike(number: int) -> None:
    address = ipaddress.IPv4Address(number)
    first, second, third, fourth = address.packed
    spellings = [
        str(address),
        str(number),
        hex(number),
        f"0{number:o}",
        f"{first}.{number & 0xFFFFFF}",
        f"{first}.0x{second:x}.{number & 0xFFFF}",
        f"0{first:o}.{second}.0X{third:X}.{fourth}",
        f"[::ffff:{address}]",
    ]
    found = {unwrap(target) for text in spellings if (target := parse_target(f"http://{text}/").address)}
    assert found == {address}


@given(st.text(max_size=40))
def test_any_text_as_a_url_is_either_refused_or_read_stably(text: str) -> None:
    try:
        target = parse_target(f"http://{text}")
    except EgressRefused:
        return
    assert parse_target(target.url) == target
