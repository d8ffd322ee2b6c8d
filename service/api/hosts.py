"""Which hosts the server answers for, since a web page may point a name of its own at this machine (DNS rebinding).

Its browser then lets it read the answers, but still sends the page's name as Host.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from service.errors import HostNotAllowed, echo

PORT = re.compile(r":[0-9]*$")


class Hosts:
    """Allows any IP address, for no name leads to it, localhost and the operator's names."""

    def __init__(self, names: Iterable[str]) -> None:
        """`names` are as URLs write them; addresses among them are passed over."""
        plain = (_plain(name) for name in names)
        self._names = ("localhost", *(name for name in plain if name and not _is_address(name)))

    def refusal(self, host: str) -> HostNotAllowed | None:
        """The error of a request with this Host header, which HTTP/1.0 may leave out; None where it is allowed."""
        name = _plain(PORT.sub("", host).strip("[]"))
        if not name or name in self._names or name.endswith(".localhost") or _is_address(name):
            return None
        return HostNotAllowed(
            f"The server does not answer for the host {echo(name)}. Use an IP address or {' or '.join(self._names)}; "
            f"the operator adds names by --allowed-hosts (HEATMAP_ALLOWED_HOSTS)."
        )


def _plain(name: str) -> str:
    return name.lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
