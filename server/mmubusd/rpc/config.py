"""The server's configuration: flags before environment (MMUBUS_...) before a TOML file before the defaults.

Each option says its unit, its default and what it prevents. `mmubusd --help` prints the same text.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from mmubusd.rpc.machine_options import MachineOptions

__all__ = ["ConfigError", "Settings", "default_socket", "is_public", "load"]

DEFAULT_PORT = 50551


class ConfigError(ValueError):
    """The configuration cannot be used; the message says which option and what would be right."""


def default_socket() -> str:
    """The Unix socket that server and clients of one user agree on without being told."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return f"unix:{runtime}/mmubus.sock"
    return f"unix:{tempfile.gettempdir()}/mmubus-{os.getuid()}.sock"


def split_address(address: str) -> tuple[str, str]:
    """Take `host:port` or `[v6]:port` apart.

    Raises: ValueError when it is neither that nor `unix:/path`.
    """
    if address.startswith("unix:"):
        if not address.removeprefix("unix:").startswith("/"):
            raise ValueError(f"{address!r}: a Unix socket is written unix:/absolute/path")
        return "unix", address.removeprefix("unix:")
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r}: an address is host:port with a port of 0 to 65535, or unix:/path")
    return host.strip("[]"), port


def is_public(address: str) -> bool:
    """True when somebody on another machine could reach the address."""
    host, _ = split_address(address)
    if host in ("unix", "localhost"):
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


class Settings(MachineOptions):
    """What a server is told when it starts; it does not change afterwards."""

    model_config = SettingsConfigDict(
        env_prefix="MMUBUS_",
        extra="forbid",
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_prog_name="mmubusd",
    )

    config: Path | None = Field(None, description="A TOML file with any of these options (names with underscores).")

    listen: Annotated[tuple[str, ...], NoDecode] = Field(
        default_factory=lambda: (default_socket(), f"127.0.0.1:{DEFAULT_PORT}"),
        min_length=1,
        description="Addresses, comma-separated or repeated: unix:/path or host:port; port 0 takes a free one, which "
        f"is printed. Default: a Unix socket of this user (faster) and 127.0.0.1:{DEFAULT_PORT}.",
    )
    insecure_public: bool = Field(
        False,
        description=(
            "Listen on an address that other machines reach without TLS, or without asking who calls. Refused "
            "otherwise: whoever reaches the port owns every address space."
        ),
    )
    tls_cert: Path | None = Field(
        None, description="PEM file of the server's certificate: TLS on every host:port. Read again when it changes."
    )
    tls_key: Path | None = Field(None, description="PEM file of the certificate's key. Read again when it changes.")
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file of the authority of clients' certificates: who shows none is not let in (mutual TLS), "
        "and the certificate's common name says who it is.",
    )
    tokens: Path | None = Field(
        None,
        description="File of bearer tokens, NAME:SHA256 a line: who shows none is not let in. Read again when it "
        "changes.",
    )
    roles: Path | None = Field(
        None,
        description="TOML file of [[grant]] tables: which principals may do what with which address spaces. Read again "
        "when it changes.",
    )
    watch_s: float = Field(
        2.0,
        ge=0,
        description="Seconds between looks at the files of tokens, of roles and of this configuration, which are read "
        "again when they have changed and changed no more, as on SIGHUP; 0: on SIGHUP only. Prevents rights that were "
        "taken away from standing until somebody tells the server.",
    )
    unix_users: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Users, by name or number, comma-separated, who may connect to the Unix sockets beside the "
        "server's own; * is everybody. The kernel is asked who connects. Default: nobody, the socket's mode is 0600.",
    )
    lane: bool = Field(
        True,
        description="Offer clients on this machine, of this user, plain Unix sockets beside their streams, for "
        "notices, pipelined calls and device requests: a third of the time. They use them when they can connect.",
    )
    reflection: bool = Field(True, description="Offer gRPC's reflection service, which shows the contract to tools.")

    store: Path | None = Field(
        None,
        description="A file for the frames' bytes, made with mode 0600 and removed at the end (say /dev/shm/mmubus). "
        "Default: memory without a name, which clients on this machine reach through /proc.",
    )

    state: Path | None = Field(
        None,
        description="A directory that address spaces, files, frames, sessions and rounds are kept in over a restart, "
        "also after a crash; nothing is answered before it is on the disk. Default: everything ends with the server.",
    )
    checkpoint_bytes: int = Field(
        64 << 20,
        ge=4096,
        description="Bytes of the state's journal after which another process makes a checkpoint of it. Prevents a "
        "restart from taking longer and longer.",
    )

    record: Path | None = Field(
        None,
        description="A file that everything that happens is written to, for `mmubus judge` and `mmubus export-trace`. "
        "It grows without bound, and the server is slower. Default: nothing is recorded.",
    )

    chaos: bool = Field(
        False,
        description="Let clients ask for delays, duplicates, forced flushes and evictions on their own sessions, to "
        "test drivers. Never on a server that others use.",
    )

    ack_budget_s: float = Field(
        2.0,
        gt=0,
        description=(
            "Seconds that a notifier may take to answer, unless it asks for another budget. Prevents a silent client "
            "from stopping a program."
        ),
    )
    ack_budget_min_s: float = Field(
        0.05,
        gt=0,
        description="Seconds; the least that a client may ask for. Prevents fences for being scheduled late.",
    )
    ack_budget_max_s: float = Field(
        30.0,
        gt=0,
        description=(
            "Seconds; the most that a client may ask for, and the cap of BUSY. Prevents an unbounded wait by request."
        ),
    )
    lease_s: float = Field(
        10.0,
        gt=0,
        description=(
            "Seconds without a sign of life after which a session counts as lost. Prevents a wedged process from "
            "being trusted for ever."
        ),
    )
    grace_s: float = Field(
        5.0,
        ge=0,
        description=(
            "Seconds that a lost session may be resumed in before it is fenced. Prevents a short break of the network "
            "from costing all translations."
        ),
    )
    fault_wait_s: float = Field(
        1.0,
        ge=0,
        le=60,
        description=(
            "Seconds that a device's fault waits for a range that is being invalidated before it is told to retry."
        ),
    )
    drain_s: float = Field(
        5.0,
        ge=0,
        description=(
            "Seconds after SIGTERM for open operations to end. Prevents a stop that never stops, and one that frees "
            "nothing cleanly."
        ),
    )

    sessions_max: int = Field(4096, ge=1, description="Sessions at a time.")
    registrations_max: int = Field(65536, ge=1, description="Registrations of one session.")
    address_spaces_max: int = Field(65536, ge=1, description="Address spaces at a time.")
    file_bytes_max: int = Field(
        1 << 36,
        ge=4096,
        le=1 << 44,
        description="Bytes of one file. Prevents a sparse file's bookkeeping from filling the memory.",
    )
    message_bytes_max: int = Field(
        4 << 20,
        ge=65536,
        le=1 << 30,
        description="Bytes of one message in either direction. Prevents one request from filling the memory.",
    )
    operations_max: int = Field(
        1024,
        ge=1,
        description=(
            "Calls in flight on one pipelined stream; no more are read until one ends. Prevents a fast program from "
            "queueing without bound."
        ),
    )
    touch_pages_max: int = Field(
        1 << 20,
        ge=1,
        description="Pages that one read, write or execute call may touch. Prevents one call from stopping all others.",
    )
    calls_max: int = Field(
        16384,
        ge=1,
        description="Unary calls and streams at a time, of all clients; more are refused with RESOURCE_EXHAUSTED.",
    )

    sessions_per_principal_max: int = Field(
        1024,
        ge=1,
        description="Sessions of one principal. This and the next seven prevent one principal from taking the server "
        "from the others; they bind nobody where nobody is asked who calls, and no administrator.",
    )
    registrations_per_principal_max: int = Field(65536, ge=1, description="Registrations of one principal.")
    address_spaces_per_principal_max: int = Field(16384, ge=1, description="Address spaces that one principal owns.")
    files_per_principal_max: int = Field(16384, ge=1, description="Files that one principal owns.")
    calls_per_principal_max: int = Field(
        4096, ge=1, description="Unary calls and streams of one principal at a time; a session's stream is one."
    )
    operations_per_principal_max: int = Field(
        16384, ge=1, description="Calls and requests in flight on all pipelined streams of one principal."
    )
    frames_per_principal_max: int = Field(
        0,
        ge=0,
        le=1 << 32,
        description="Page frames that one principal's address spaces and files have in use, page tables included; at "
        "the limit its own pages are reclaimed, and nobody else's. 0: half of all.",
    )
    swap_slots_per_principal_max: int = Field(
        0, ge=0, le=1 << 32, description="Pages that one principal has in swap. 0: half of all."
    )

    health_lag_s: float = Field(
        1.0,
        gt=0,
        description="Seconds that the loop may lag behind before the health service says NOT_SERVING, until it has "
        "kept up for as long again five times. Prevents work being sent to a server that cannot do it.",
    )
    metrics_listen: str | None = Field(
        None,
        description="host:port for Prometheus to scrape /metrics from; no names and no ids of clients are in it, "
        "unless metrics_clients_max asks for them. Default: off.",
    )
    metrics_clients_max: int = Field(
        0,
        ge=0,
        le=1000,
        description="Clients whose ack latency is in the metrics, by the names that they gave themselves: those that "
        "others have waited for longest. Prevents as many series as there are clients. Default: none.",
    )
    traces: bool = Field(
        False,
        description="Record OpenTelemetry spans of calls that carry a sampled traceparent, and export them as the "
        "OTEL_ variables say. Needs the extra [otel].",
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least important lines that are written."
    )
    log_format: Literal["console", "json"] = Field("console", description="For people, or one JSON object a line.")

    @field_validator("listen", "unix_users", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)):
            return value
        return tuple(one.strip() for part in parts for one in str(part).split(",") if one.strip())

    @property
    def authenticates(self) -> bool:
        """Whether callers are asked who they are; without, everybody who reaches the server may do everything."""
        return bool(self.tokens or self.tls_client_ca or self.roles or self.unix_users)

    @model_validator(mode="after")
    def _is_safe(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert, tls_key: a certificate and its key go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca: clients' certificates need TLS; set tls_cert and tls_key")
        for address in self.listen:
            if not is_public(address) or self.insecure_public:
                continue
            if self.tls_cert is None:
                raise ValueError(
                    f"listen: {address} can be reached from other machines and there is no TLS; set tls_cert and "
                    "tls_key, listen on a loopback address or a Unix socket, or set insecure_public"
                )
            if not (self.tokens or self.tls_client_ca):
                raise ValueError(
                    f"listen: {address} can be reached from other machines and nobody is asked who calls; set "
                    "tls_client_ca or tokens, or insecure_public"
                )
        if self.metrics_listen is not None and split_address(self.metrics_listen)[0] == "unix":
            raise ValueError("metrics_listen: an address is host:port")
        return self

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        if self.chaos and self.state is not None:
            raise ValueError("chaos: what it does to a session is not kept; not together with state")
        if not self.ack_budget_min_s <= self.ack_budget_s <= self.ack_budget_max_s:
            raise ValueError(
                f"ack_budget_s: {self.ack_budget_s} is not between ack_budget_min_s ({self.ack_budget_min_s}) "
                f"and ack_budget_max_s ({self.ack_budget_max_s})"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags (put in front by the library), what was given in Python, environment, file."""
        toml = TomlConfigSettingsSource(settings_cls, toml_file=cls.model_config.get("toml_file"))
        return init_settings, env_settings, toml


def load(argv: Sequence[str] = ()) -> Settings:
    """Read the configuration.

    Args: argv: flags without the program's name.
    Returns: the settings.
    Raises:
        ConfigError: an option is wrong, or the file cannot be read.
        SystemExit: after --help.
    """
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config")
    chosen = before.parse_known_args(list(argv))[0].config or os.environ.get("MMUBUS_CONFIG")
    if chosen is not None and not Path(chosen).is_file():
        raise ConfigError(f"config: there is no file {chosen}")

    class FileSettings(Settings):
        __doc__ = Settings.__doc__
        model_config = SettingsConfigDict(toml_file=chosen)

    try:
        return FileSettings(_cli_parse_args=list(argv))  # type: ignore[call-arg]
    except ValueError as error:  # pydantic's ValidationError and tomllib's error are both ValueErrors
        raise ConfigError(_say(error)) from error


def _say(error: ValueError) -> str:
    """One line a wrong option, instead of pydantic's paragraph."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return str(error)
    return "; ".join(
        ": ".join(filter(None, [".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, ")]))
        for one in errors()
    )
