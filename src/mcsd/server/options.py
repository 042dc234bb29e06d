"""The options of the server, declared once for Python, the command line and the configuration file. Imports no torch.

Options without a flag are set in the file.
"""

import ipaddress
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mcsd.config import option
from mcsd.errors import InvalidOption, check_int, check_number

_SECONDS = 24 * 3600
_PANEL = "Server"


@dataclass(frozen=True)
class ServerOptions:
    """The arguments of `mcsd.server.create_app`.

    Attributes:
        api_key: what clients send as ``Authorization: Bearer KEY``; None: nothing is asked for.
        served_name: the name of the model in requests and answers; None: that of the target.
        max_waiting: requests that wait for a place in the batch, at most; more get 429.
        max_wait_seconds: a request that waits for longer gets 503.
        max_run_seconds: a request that runs for longer gets 503.
        allowed_hosts: names in the header ``Host`` besides localhost; addresses are always allowed, because rebinding
            a name needs a name.
        cors_origins: origins of web pages that may use the server from a browser.
        playground: whether the server shows its page at ``/`` and gives traces of steps to clients that ask. None: off;
            `mcsd serve` then turns it on where only this machine can connect.
        max_body_bytes: of the body of a request.
        max_completions: of one request: its prompts times ``n``.
        body_seconds: for sending the body of a request.
        step_seconds: a step that takes longer hangs: all requests fail, and the server is not ready.

    Raises:
        InvalidOption: a value outside its range.
    """

    api_key: str | None = option(
        None,
        "--api-key",
        help="Key that clients must send; better in the environment, as MCSD_API_KEY.",
        type=str | None,
        shown="MCSD_API_KEY, if set",
        panel=_PANEL,
    )
    served_name: str | None = option(
        None,
        "--served-name",
        help="Name of the model in requests and answers.",
        type=str | None,
        shown="that of the target",
        panel=_PANEL,
    )
    max_waiting: int = option(
        64, "--max-waiting", help="Maximum number of requests that wait; more get 429.", type=int, panel=_PANEL
    )
    max_wait_seconds: float = option(
        60.0, "--max-wait-seconds", help="A request that waits for longer gets 503.", type=float, panel=_PANEL
    )
    max_run_seconds: float = option(
        600.0, "--max-run-seconds", help="A request that runs for longer gets 503.", type=float, panel=_PANEL
    )
    allowed_hosts: Sequence[str] | None = option(
        None,
        "--allowed-host",
        help="Name in the header Host that is allowed besides localhost. Can be repeated.",
        type=list[str] | None,
        shown="addresses, and the name of --host",
        panel=_PANEL,
    )
    cors_origins: Sequence[str] | None = option(
        None,
        "--cors-origin",
        help="Origin of web pages that may use the server. Can be repeated.",
        type=list[str] | None,
        shown="none",
        panel=_PANEL,
    )
    playground: bool | None = option(
        None,
        "--playground/--no-playground",
        help="Serve a page at / that shows speculation step by step.",
        type=bool | None,
        shown="on where only this machine can connect",
        panel=_PANEL,
    )
    max_body_bytes: int = 2 << 20
    max_completions: int = 16
    body_seconds: float = 30.0
    step_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name in ("api_key", "served_name"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and 0 < len(value) <= 512 and value.isprintable()):
                raise InvalidOption(f"{name} is not a text of 1 to 512 printable characters", "give another one")
        if self.api_key is not None and not self.api_key.isascii():
            raise InvalidOption("api_key has characters that a header cannot carry", "use letters and digits")
        if self.playground not in (None, True, False):
            raise InvalidOption(f"playground={self.playground!r:.40} is not true or false", "give one of them")
        check_int("max_waiting", self.max_waiting, 0, 1 << 20)
        check_int("max_body_bytes", self.max_body_bytes, 1 << 10, 1 << 28)
        check_int("max_completions", self.max_completions, 1, 256)
        for name in ("max_wait_seconds", "max_run_seconds", "body_seconds", "step_seconds"):
            check_number(name, getattr(self, name), 0, _SECONDS, low_open=True)
        for name in ("allowed_hosts", "cors_origins"):
            names = getattr(self, name) or ()
            if isinstance(names, str) or not all(isinstance(one, str) and 0 < len(one) <= 255 for one in names):
                raise InvalidOption(f"{name}={names!r:.60} is not a list of names", f'give {name}=["..."]')
            object.__setattr__(self, name, tuple(names))

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "ServerOptions":
        """The options with these names.

        Raises:
            InvalidOption: an unknown name, or a value outside its range.
        """
        known = [one.name for one in fields(cls)]
        for name in given:
            if name not in known:
                raise InvalidOption(f"{name!r:.40} is not an option of the server", f"one of {', '.join(known)}")
        return cls(**given)


@dataclass(frozen=True)
class ListenOptions:
    """Where and how `mcsd.server.serve` listens.

    Attributes:
        host: address or name of the interface.
        port: 0 takes a free one.
        tls_cert, tls_key: PEM files of a certificate and its key; without them the server speaks plain HTTP.
        drain_seconds: after SIGTERM accepted requests get this long to end.
        header_seconds: for sending the header of a request.
        write_seconds: a client that reads nothing for so long is disconnected.
        max_connections: at the same time; more get 503.

    Raises:
        InvalidOption: a value outside its range.
    """

    host: str = option("127.0.0.1", "--host", help="Address to listen on.", panel=_PANEL)
    port: int = option(8000, "--port", help="Port to listen on; 0 takes a free one.", type=int, panel=_PANEL)
    tls_cert: Path | None = option(
        None, "--tls-cert", help="PEM file with the certificate.", type=Path | None, shown="plain HTTP", panel=_PANEL
    )
    tls_key: Path | None = option(
        None, "--tls-key", help="PEM file with the certificate's key.", type=Path | None, shown="none", panel=_PANEL
    )
    drain_seconds: float = option(
        600.0, "--drain-seconds", help="After SIGTERM, time for accepted requests to end.", type=float, panel=_PANEL
    )
    header_seconds: float = 10.0
    write_seconds: float = 60.0
    max_connections: int = 1024

    def __post_init__(self) -> None:
        if not self.host or not self.host.isprintable() or len(self.host) > 255:
            raise InvalidOption(f"host {self.host!r:.40} is not an address", "give 127.0.0.1, or another one")
        check_int("port", self.port, 0, 65535)
        check_int("max_connections", self.max_connections, 1, 1 << 16)
        for name in ("drain_seconds", "header_seconds", "write_seconds"):
            check_number(name, getattr(self, name), 0, _SECONDS, low_open=name != "drain_seconds")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InvalidOption("--tls-cert and --tls-key go together", "give both")
        for file in (self.tls_cert, self.tls_key):
            if file is not None and not Path(file).is_file():
                raise InvalidOption(f"{str(file)!r:.80} is no file", "give a PEM file")

    @property
    def is_loopback(self) -> bool:
        """Whether only programs on this machine can connect."""
        return ipaddress.ip_address(self.host).is_loopback if is_address(self.host) else self.host == "localhost"


def is_address(host: str) -> bool:
    """Whether a host is an IP address, and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def check_exposure(server: ServerOptions, listen: ListenOptions) -> None:
    """Check that a server which other machines can reach asks for a key.

    Raises:
        InvalidOption: it does not.
    """
    if server.api_key is None and not listen.is_loopback:
        raise InvalidOption(
            f"--host {listen.host} lets other machines use the server without a key",
            "set MCSD_API_KEY, or listen on 127.0.0.1",
        )


def has_playground(server: ServerOptions, listen: ListenOptions) -> bool:
    """Whether a server that listens there has the playground: by default if only this machine can connect."""
    return listen.is_loopback if server.playground is None else server.playground


def read_config(file: Path) -> dict[str, Any]:
    """The options without a flag that a TOML file sets.

    Raises:
        InvalidOption: the file cannot be read, or names something else.
    """
    known = {
        one.name: "an option of the command line" if one.metadata else ""
        for options in (ServerOptions, ListenOptions)
        for one in fields(options)
    }
    try:
        given = tomllib.loads(file.read_text())
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidOption(f"{str(file)!r:.80} is not a TOML file: {error!s:.100}", "mend it") from error
    for name in given:
        if known.get(name) != "":
            allowed = ", ".join(one for one, place in known.items() if not place)
            raise InvalidOption(
                f"{name!r:.40} in {file.name} is {known.get(name) or 'not an option'}", f"the file may set {allowed}"
            )
    return given
