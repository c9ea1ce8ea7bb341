"""TLS, certificates that change, Unix peers, and what clients refuse to do."""

from __future__ import annotations

import asyncio
import datetime
import io
import ipaddress
import os
import ssl
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import mmubus
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from mmubus.security import Security
from mmubusd.rpc import EmbeddedServer
from mmubusd.rpc.certificate import SERVABLE_KEYS, read_certificates
from mmubusd.rpc.config import ConfigError, Settings, load
from mmubusd.rpc.identity import SecurityFileError
from mmubusd.rpc.log import make_log
from patience import LIMIT_S

from .conftest import TOKENS, token_lines

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


class Paper:
    """An authority and what it has signed, as files."""

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.authority = trustme.CA(organization_name=name)
        self.ca = directory / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str, **when: datetime.datetime) -> tuple[Path, Path]:
        """A certificate for 127.0.0.1 with this common name. Returns: certificate and key."""
        leaf = self.authority.issue_cert("127.0.0.1", "localhost", common_name=name, **when)
        cert, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        cert.write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
        leaf.private_key_pem.write_to_path(str(key))
        return cert, key


@pytest.fixture
def paper(tmp_path: Path) -> Paper:
    return Paper(tmp_path / "ours", "ours")


@pytest.fixture
def settings(paper: Paper) -> dict[str, object]:
    cert, key = paper.issue("server")
    return {
        "listen": ("127.0.0.1:0",), "tls_cert": cert, "tls_key": key, "tls_client_ca": paper.ca, "frames_nr": 256,
        "drain_s": 0.0,
    }  # fmt: skip


def served(settings: dict[str, object], log: io.StringIO | None = None) -> EmbeddedServer:
    return EmbeddedServer(Settings.model_validate(settings), make_log("debug", "json", log or io.StringIO()))


async def sees(address: str, **options: object) -> int:
    """How many address spaces somebody sees after making one."""
    async with mmubus.connect(address, **options) as bus:
        await bus.create_mm("mine")
        return len(await bus.inspection.address_spaces())


async def test_mutual_tls_says_who_it_is(settings: dict[str, object], paper: Paper) -> None:
    alice, bob = paper.issue("alice"), paper.issue("bob")
    async with served(settings) as server:
        for cert, key in (alice, bob):
            assert await sees(server.address, ca=paper.ca, cert=cert, key=key) == 1


@pytest.mark.parametrize("what", ["none", "foreign", "expired", "not yet", "self-signed by name"])
async def test_certificates_that_are_not_let_in(
    settings: dict[str, object], paper: Paper, tmp_path: Path, what: str
) -> None:
    foreign = Paper(tmp_path / "theirs", "ours" if what == "self-signed by name" else "theirs")
    shown: dict[str, object] = {}
    if what in ("foreign", "self-signed by name"):
        shown["cert"], shown["key"] = foreign.issue("alice")
    elif what == "expired":
        shown["cert"], shown["key"] = paper.issue("alice", not_before=NOW - 3 * DAY, not_after=NOW - DAY)
    elif what == "not yet":
        shown["cert"], shown["key"] = paper.issue("alice", not_before=NOW + DAY, not_after=NOW + 3 * DAY)
    async with served(settings) as server:
        with pytest.raises(mmubus.ConnectionLost):
            await sees(server.address, ca=paper.ca, **shown)


async def test_a_server_with_the_wrong_certificate_is_not_spoken_to(settings, paper: Paper, tmp_path: Path) -> None:
    theirs = Paper(tmp_path / "theirs", "theirs")
    cert, key = paper.issue("alice")
    async with served(settings) as server:
        with pytest.raises(mmubus.ConnectionLost):
            await sees(server.address, ca=theirs.ca, cert=cert, key=key)
        with pytest.raises(mmubus.ConnectionLost):
            await sees(server.address, ca=paper.ca, cert=cert, key=key, server_name="another.example")


async def test_no_downgrade_to_the_clear(settings: dict[str, object], paper: Paper) -> None:
    """A client that speaks in the clear to TLS, and one that wants TLS from a server without: neither gets anything."""
    cert, key = paper.issue("alice")
    async with served(settings) as server:
        with pytest.raises(mmubus.ConnectionLost):
            await sees(server.address, tls=False)
    async with EmbeddedServer(listen=("127.0.0.1:0",), frames_nr=64) as plain:
        with pytest.raises(mmubus.ConnectionLost):
            await sees(plain.address, ca=paper.ca, cert=cert, key=key)


async def test_certificates_are_taken_up_while_it_runs(settings, paper: Paper, tmp_path: Path) -> None:
    """A new authority and a new certificate: new connections need the new ones, standing streams go on."""
    log = io.StringIO()
    cert, key = paper.issue("alice")
    async with served(settings, log) as server:  # noqa: SIM117
        async with mmubus.connect(server.address, ca=paper.ca, cert=cert, key=key) as bus:
            mm = await bus.create_mm("before")
            new = Paper(tmp_path / "new", "new")
            new_cert, new_key = new.issue("server")
            for old, fresh in (("tls_cert", new_cert), ("tls_key", new_key), ("tls_client_ca", new.ca)):
                fresh.replace(settings[old])
            with pytest.raises(mmubus.ConnectionLost):
                await sees(server.address, ca=paper.ca, cert=cert, key=key)
            ours = tmp_path / "new-ca.pem"
            new.authority.cert_pem.write_to_path(str(ours))
            fresh_cert, fresh_key = new.issue("alice")
            assert await sees(server.address, ca=ours, cert=fresh_cert, key=fresh_key) == 2
            await mm.exit()
            settings["tls_key"].write_text("half a copy")
            assert await sees(server.address, ca=ours, cert=fresh_cert, key=fresh_key) == 2
    assert "new certificates are in use" in log.getvalue()
    assert "new certificates cannot be used" in log.getvalue()
    assert "PRIVATE" not in log.getvalue()
    assert "half a copy" not in log.getvalue()


# Certificates that nobody could shake hands by: the server says so and does not start.


def own_certificate(directory: Path, key: object, *, since: datetime.timedelta = -DAY, until: datetime.timedelta = DAY):
    """A self-signed certificate with this key, and the key, as files."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "server")])
    without_hash = isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + since)
        .not_valid_after(NOW + until)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, None if without_hash else hashes.SHA256())
    )
    cert, file = directory / "own.pem", directory / "own.key"
    pem = serialization.Encoding.PEM
    cert.write_bytes(made.public_bytes(pem))
    file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return cert, file


KEYS = {
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
    "Ed448": ed448.Ed448PrivateKey.generate,
    "unknown here": lambda: ec.generate_private_key(ec.BrainpoolP256R1()),
}


@pytest.mark.parametrize("kind", KEYS)
async def test_a_key_that_grpc_cannot_serve_is_refused_at_the_start(tmp_path: Path, kind: str) -> None:
    """The table of kinds is gRPC's own: with each that is let through a client really shakes hands."""
    cert, key = own_certificate(tmp_path, KEYS[kind]())
    settings = {"listen": ("127.0.0.1:0",), "tls_cert": cert, "tls_key": key, "frames_nr": 64, "drain_s": 0.0}
    if kind in SERVABLE_KEYS:
        async with served(settings) as server:
            assert await sees(server.address, ca=cert) == 1
        return
    with pytest.raises(SecurityFileError, match=f"{kind}, by which gRPC shakes no hands; it takes RSA, P-256, P-384"):
        async with served(settings):
            raise AssertionError("started")


@pytest.mark.parametrize(
    ("when", "says"),
    [
        ({"since": -3 * DAY, "until": -DAY}, "has expired on 20"),
        ({"since": DAY, "until": 3 * DAY}, "is valid from 20.* on only"),
        ({"since": DAY, "until": 40000 * DAY}, "is valid from 20"),  # the year has four digits in the certificate
    ],
)
async def test_a_certificate_of_another_time_is_refused_at_the_start(
    settings: dict[str, object], tmp_path: Path, when: dict[str, datetime.timedelta], says: str
) -> None:
    cert, key = own_certificate(tmp_path, KEYS["P-256"](), **when)
    with pytest.raises(SecurityFileError, match=says):
        async with served({**settings, "tls_cert": cert, "tls_key": key}):
            raise AssertionError("started")
    with pytest.raises(SecurityFileError, match="no client could be let in"):
        async with served({**settings, "tls_client_ca": cert}):
            raise AssertionError("started")


async def test_a_bundle_of_authorities_may_have_old_ones(settings: dict[str, object], paper: Paper, tmp_path) -> None:
    old, _ = own_certificate(tmp_path, KEYS["P-256"](), since=-3 * DAY, until=-DAY)
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(old.read_bytes() + paper.ca.read_bytes())
    cert, key = paper.issue("alice")
    async with served({**settings, "tls_client_ca": bundle}) as server:
        assert await sees(server.address, ca=paper.ca, cert=cert, key=key) == 1


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("another's key", "the key is another certificate's"),
        ("no certificate", "cannot be used"),
        ("half a certificate", "cannot be used"),
    ],
)
async def test_files_that_do_not_fit_are_refused_at_the_start(settings, paper: Paper, what: str, says: str) -> None:
    if what == "another's key":
        _, settings["tls_key"] = paper.issue("another")
    elif what == "no certificate":
        settings["tls_cert"].write_text("")
    else:
        settings["tls_cert"].write_text(settings["tls_cert"].read_text()[:400])
    with pytest.raises(SecurityFileError, match=says) as caught:
        async with served(settings):
            raise AssertionError("started")
    assert "PRIVATE" not in str(caught.value)


def test_damaged_certificates_are_told_apart_from_good_ones(tmp_path: Path) -> None:
    """Cut anywhere, or with any one byte changed, a certificate is read or refused; nothing else happens."""
    cert, _ = own_certificate(tmp_path, KEYS["P-256"]())
    der = ssl.PEM_cert_to_DER_cert(cert.read_text())
    ((key, before, after),) = ((one.key, one.not_before, one.not_after) for one in read_certificates(cert.read_text()))
    assert (key, before, after) == ("P-256", (NOW - DAY).replace(microsecond=0), (NOW + DAY).replace(microsecond=0))
    damaged = [der[:end] for end in range(len(der))]
    damaged += [der[:at] + bytes([der[at] ^ 0x5A]) + der[at + 1 :] for at in range(len(der))]
    refused = 0
    for one in damaged:
        try:
            read_certificates(ssl.DER_cert_to_PEM_cert(one))
        except ValueError:
            refused += 1
    assert refused > len(der)  # each that was cut, and some


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--listen", "0.0.0.0:0"], "there is no TLS"),
        (["--listen", "0.0.0.0:0", "--tls-cert", "c", "--tls-key", "k"], "nobody is asked who calls"),
        (["--listen", "0.0.0.0:0", "--tokens", "t"], "there is no TLS"),
        (["--tls-cert", "c"], "go together"),
        (["--tls-client-ca", "c"], "need TLS"),
        (["--metrics-listen", "unix:/tmp/x"], "host:port"),
    ],
)
def test_unsafe_configurations_are_refused(argv: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(argv)


def test_public_is_fine_with_tls_and_tokens() -> None:
    assert load(["--listen", "0.0.0.0:0", "--tls-cert", "c", "--tls-key", "k", "--tokens", "t"]).authenticates


async def test_tokens_over_tls(settings: dict[str, object], paper: Paper, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(token_lines(TOKENS))
    token_file = tmp_path / "mine"
    token_file.write_text(TOKENS["alice"] + "\n")
    async with served({**settings, "tls_client_ca": None, "tokens": tmp_path / "tokens"}) as server:
        assert await sees(server.address, ca=paper.ca, token_file=token_file) == 1
        with pytest.raises(mmubus.CallFailed, match="not known"):
            await sees(server.address, ca=paper.ca, token="wrong")


@pytest.mark.parametrize("address", ["example.com:1", "192.0.2.1:1", "[2001:db8::1]:1"])
async def test_a_token_does_not_leave_the_machine_in_the_clear(address: str) -> None:
    with pytest.raises(mmubus.UnsafeConnection, match="TLS only"):
        async with mmubus.connect(address, token="secret"):
            raise AssertionError("connected")
    Security.of(token="secret", environment={}).check("127.0.0.1:1")


def test_security_from_the_environment_and_no_secret_in_its_text() -> None:
    environment = {"MMUBUS_TOKEN": "secret", "MMUBUS_CA": "/ca.pem", "MMUBUS_SERVER_NAME": "bus"}
    found = Security.of(environment=environment)
    assert (found.tls, found.ca, found.server_name, found.read_token()) == (True, Path("/ca.pem"), "bus", "secret")
    assert "secret" not in repr(found)
    assert Security.of(token="mine", environment=environment).read_token() == "mine"
    with pytest.raises(mmubus.UnsafeConnection):
        Security.of(tls=False, environment=environment)
    with pytest.raises(mmubus.UnsafeConnection):
        Security.of(cert="/c", environment={})


async def test_the_command_line_takes_them_too(settings: dict[str, object], paper: Paper, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(token_lines(TOKENS))
    (tmp_path / "mine").write_text(TOKENS["alice"])
    async with served({**settings, "tls_client_ca": None, "tokens": tmp_path / "tokens"}) as server:
        command = (
            sys.executable, "-c", "import sys; from mmubus.cli import main; sys.exit(main())",
            "--ca", str(paper.ca), "--token-file", str(tmp_path / "mine"), "mm", "list", "-s", server.address,
        )  # fmt: skip
        for token, says in ((TOKENS["alice"], b"there are no address spaces"), ("wrong", b"not known here")):
            (tmp_path / "mine").write_text(token)
            process = await asyncio.create_subprocess_exec(*command, stdout=-1, stderr=asyncio.subprocess.STDOUT)
            out, _ = await asyncio.wait_for(process.communicate(), LIMIT_S)
            assert says in out, out


# Unix sockets.

AS_NOBODY = """if True:
    import asyncio, os, sys
    import mmubus
    mmubus.connect, mmubus.Inspection, mmubus.AddressSpace  # loaded before the files are out of reach
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    async def main():
        async with mmubus.connect(sys.argv[1]) as bus:
            mm = await bus.create_mm("nobodys")
            print([(one.name, one.owner) for one in await bus.inspection.address_spaces()])
    try:
        asyncio.run(main())
    except mmubus.MmuBusError as error:
        print(type(error).__name__)
"""
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")


async def as_nobody(address: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", AS_NOBODY, address, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=environment,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), LIMIT_S)
    return out.decode().strip() or err.decode()


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that everybody may enter; pytest's own are for one user."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


async def test_the_default_socket_is_its_users_alone(open_directory: Path) -> None:
    path = open_directory / "bus.sock"
    async with EmbeddedServer(listen=(f"unix:{path}",), frames_nr=64) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert await sees(server.address) == 1
        if os.getuid() == 0:
            assert await as_nobody(server.address) == "ConnectionLost"


@needs_root
async def test_the_kernel_is_asked_who_is_at_the_other_end(open_directory: Path) -> None:
    path = open_directory / "bus.sock"
    settings = {"listen": (f"unix:{path}",), "unix_users": ("nobody",), "frames_nr": 256, "drain_s": 0.0}
    async with served(settings) as server:
        assert await sees(server.address) == 1  # the server's own user administers
        assert await as_nobody(server.address) == "[('nobodys', 'unix:nobody')]"
        async with mmubus.connect(server.address) as bus:
            owners = {one.owner for one in await bus.inspection.address_spaces()}
        assert owners == {"unix:root", "unix:nobody"}
    assert not path.exists()


@needs_root
async def test_users_who_are_not_named_are_turned_away(open_directory: Path) -> None:
    log = io.StringIO()
    path = open_directory / "bus.sock"
    settings = {"listen": (f"unix:{path}",), "unix_users": ("daemon",), "frames_nr": 256, "drain_s": 0.0}
    async with served(settings, log) as server:
        assert await as_nobody(server.address) == "ConnectionLost"
    assert "a Unix peer was turned away" in log.getvalue()


async def test_a_relayed_socket_carries_much_and_ends_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "bus.sock"
    settings = {"listen": (f"unix:{path}",), "unix_users": ("*",), "frames_nr": 1024, "drain_s": 0.0}
    async with served(settings) as server, mmubus.connect(server.address) as bus:
        mm = await bus.create_mm("big")
        start = await mm.mmap(0, 512 * 4096)
        data = os.urandom(512 * 4096)
        await mm.store(start, data)
        assert await mm.load(start, len(data)) == data
        channel = grpc.aio.insecure_channel(f"unix:{path}")
        await server.server.stop()
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/mmu.v1.InspectionService/ListSessions")(b"")
        await channel.close()
