"""Which addresses that users name may be visited: reading URLs and judging IP addresses, without any I/O.

Owns the spelling of hosts (decimal, octal, hexadecimal and short IPv4, full-width digits, IPv6 forms that carry
an IPv4 address) and the table of ranges that are not public. Resolving names and connecting belong to the egress
adapter, which asks here about every address before it connects.
"""

import ipaddress
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import quote, urljoin

from services.domain.errors import EgressRefused

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_URL_CHARS = 8192
DEFAULT_PORTS = {"http": 80, "https": 443}
FIRST_FREE_PORT = 1024
"""Below it only the ports of HTTP itself are visited: the others speak other protocols (mail, shells, files)."""

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):(?://(?P<authority>[^/?#]*)(?P<rest>[^#]*)(?:#.*)?)?")
_BRACKETED = re.compile(r"\[(?P<host>[^\]]*)\](?::(?P<port>[0-9]*))?")
_PLAIN = re.compile(r"(?P<host>[^:\[\]]*)(?::(?P<port>[0-9]*))?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")
_IDEOGRAPHIC_STOP = "\u3002"
_SAFE_IN_TARGET = "%/?:@!$&'()*+,;=-._~[]|{}^`\"<>"


def _ranges(word: str, *networks: str) -> list[tuple[Network, str]]:
    return [(ipaddress.ip_network(network), word) for network in networks]


_NOT_PUBLIC_V4 = [
    *_ranges("unspecified", "0.0.0.0/8"),
    *_ranges("loopback", "127.0.0.0/8"),
    *_ranges("link-local", "169.254.0.0/16"),
    *_ranges("private", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"),
    *_ranges("documentation", "192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"),
    # 168.63.129.16 is public by its number, yet one cloud answers there with the secrets of the machine that asks.
    *_ranges("reserved", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "168.63.129.16/32"),
    *_ranges("multicast", "224.0.0.0/4"),
    *_ranges("reserved", "240.0.0.0/4"),
]
"""IANA's special-purpose registry; written out, as the standard library's own opinion changed between releases."""

_NOT_PUBLIC_V6 = [
    *_ranges("unspecified", "::/128"),
    *_ranges("loopback", "::1/128"),
    *_ranges("link-local", "fe80::/10"),
    *_ranges("private", "fc00::/7", "fec0::/10", "64:ff9b:1::/48"),
    *_ranges("multicast", "ff00::/8"),
    *_ranges("documentation", "2001:db8::/32", "3fff::/20"),
    *_ranges("reserved", "2001::/23", "2002::/16", "3ffe::/16"),
]
_PUBLIC_V6 = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")
_ISATAP_MARKS = (0x00005EFE, 0x02005EFE)


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that was read and spelled anew, so that every later reader sees the same host.

    Attributes:
        scheme: ``http`` or ``https``.
        host: lower-case ASCII name, or the canonical text of an IP address (no brackets).
        port: 1 to 65535.
        path_and_query: what is asked for, percent-encoded, beginning with a slash.
        address: the address, where the host is one.
    """

    scheme: str
    host: str
    port: int
    path_and_query: str
    address: Address | None = None

    @property
    def url(self) -> str:
        """The whole address, spelled canonically. May hold secrets in its query: never shown or logged."""
        return f"{self.origin}{self.path_and_query}"

    @property
    def origin(self) -> str:
        """Scheme, host and port: what messages and logs may name."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"

    def joined(self, location: str) -> "Target":
        """Reads the address of a redirect, which may be relative to this one.

        Raises:
            EgressRefused: as :func:`parse_target`.
        """
        return parse_target(urljoin(self.url, location))


def parse_target(url: str) -> Target:
    """Reads a URL strictly: what two readers could understand differently is refused.

    Args:
        url: as the user wrote it, at most 8192 characters.

    Returns:
        The target in its one canonical spelling; its address is not judged yet.

    Raises:
        EgressRefused: another scheme than http and https, credentials, a malformed host or port.
    """
    if len(url) > MAX_URL_CHARS:
        raise EgressRefused(f"the address is longer than {MAX_URL_CHARS} characters")
    match = _URL.fullmatch(url.strip(" "))
    if match is None or _has_odd_characters(url):
        raise EgressRefused("the address is not a valid http or https URL")
    scheme = match["scheme"].lower()
    if scheme not in DEFAULT_PORTS:
        raise EgressRefused("only http and https addresses are fetched")
    host, port = _split_authority(match["authority"] or "", scheme)
    address = _read_address(host)
    name = str(address) if address is not None else _check_name(host)
    return Target(scheme, name, port, _path_and_query(match["rest"] or ""), address)


def unwrap(address: Address) -> Address:
    """Finds the IPv4 address that an IPv6 address carries to its destination, if it carries one.

    Knows mapped and compatible addresses, NAT64 (RFC 6052, well-known prefix), 6to4 (RFC 3056), Teredo (RFC 4380)
    and ISATAP (RFC 5214).

    Args:
        address: as resolved or written.

    Returns:
        The embedded IPv4 address, or the address itself.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return address
    number = int(address)
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64 or (address in _COMPATIBLE and number > 0xFFFF):
        return ipaddress.IPv4Address(number & 0xFFFFFFFF)
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if (number >> 32) & 0xFFFFFFFF in _ISATAP_MARKS:
        return ipaddress.IPv4Address(number & 0xFFFFFFFF)
    return address


def refusal_of(address: Address, allow: Iterable[Network] = ()) -> str | None:
    """Judges one address: may this service connect to it?

    Args:
        address: the address that would be connected to.
        allow: ranges that may be reached although they are not public; compared with the unwrapped address.

    Returns:
        None when it may be reached; else one word for what it is: ``private``, ``loopback``, ``link-local``, ...
    """
    inner = unwrap(address)
    if any(inner in network for network in allow):
        return None
    table = _NOT_PUBLIC_V4 if inner.version == 4 else _NOT_PUBLIC_V6
    for network, word in table:
        if inner in network:
            return word
    if inner.version == 6 and inner not in _PUBLIC_V6:
        return "reserved"
    return None


def check_port(target: Target) -> None:
    """Refuses ports below 1024 that belong to other protocols than HTTP.

    Raises:
        EgressRefused: the port is such a one.
    """
    if target.port < FIRST_FREE_PORT and target.port not in DEFAULT_PORTS.values():
        raise EgressRefused(f"port {target.port} is not reachable from this service")


def _has_odd_characters(url: str) -> bool:
    return any(char == "\\" or (char != " " and (char.isspace() or not char.isprintable())) for char in url)


def _split_authority(authority: str, scheme: str) -> tuple[str, int]:
    if "@" in authority:
        raise EgressRefused("credentials in the address are not accepted")
    match = _BRACKETED.fullmatch(authority) or _PLAIN.fullmatch(authority)
    if match is None or not match["host"]:
        raise EgressRefused("the address names no valid host")
    port = int(match["port"]) if match["port"] else DEFAULT_PORTS[scheme]
    if not 1 <= port <= 65535:
        raise EgressRefused("the address names no valid port")
    host = match["host"]
    return (f"[{host}]" if authority.startswith("[") else _normalized(host)), port


def _normalized(host: str) -> str:
    """Full-width and other compatibility characters become what name resolvers make of them."""
    folded = unicodedata.normalize("NFKC", host).replace(_IDEOGRAPHIC_STOP, ".").lower()
    return folded.removesuffix(".")


def _read_address(host: str) -> Address | None:
    """Reads a host that is an IP address in any spelling; None for a name."""
    if host.startswith("["):
        return _read_ipv6(host[1:-1])
    labels = host.split(".")
    return _read_ipv4(labels) if _NUMBER.fullmatch(labels[-1]) else None


def _read_ipv6(text: str) -> ipaddress.IPv6Address:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError as error:
        raise EgressRefused("the address names no valid host") from error
    if address.scope_id is not None:
        raise EgressRefused("addresses with a zone are not reachable from this service (link-local)")
    return address


def _read_ipv4(labels: Sequence[str]) -> ipaddress.IPv4Address:
    """Reads one to four numbers as inet_aton(3) does: the last one fills all bytes that are left."""
    try:
        *high, last = [_read_number(label) for label in labels]
        if len(labels) > 4 or any(part > 255 for part in high) or last >= 256 ** (4 - len(high)):
            raise ValueError("out of range")
    except ValueError as error:
        raise EgressRefused("the address names no valid host") from error
    number = sum(part << (24 - 8 * place) for place, part in enumerate(high)) + last
    return ipaddress.IPv4Address(number)


def _read_number(label: str) -> int:
    if not _NUMBER.fullmatch(label):
        raise ValueError("not a number")
    if label.startswith("0x"):
        return int(label[2:] or "0", 16)
    return int(label, 8) if label.startswith("0") else int(label)


def _check_name(host: str) -> str:
    """Encodes a name to ASCII (IDNA) and holds it to the letters of host names."""
    try:
        name = host.encode("idna").decode("ascii").lower()
    except UnicodeError as error:
        raise EgressRefused("the address names no valid host") from error
    labels = name.split(".")
    if (
        len(name) > 253
        or not all(_LABEL.fullmatch(label) for label in labels)
        or _NUMBER.fullmatch(labels[-1])
    ):
        raise EgressRefused("the address names no valid host")
    return name


def _path_and_query(rest: str) -> str:
    quoted = quote(rest, safe=_SAFE_IN_TARGET)
    return quoted if quoted.startswith("/") else f"/{quoted}"
