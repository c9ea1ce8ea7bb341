"""Several hosts: server, application and two drivers, each in a network namespace of its own; the network fails.

With TLS every host has a certificate and roles decide; without, the server listens openly, by name.
"""

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from e2e.netns import Member, Network, why_not

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

REASON = why_not()
needs_namespaces = pytest.mark.skipif(bool(REASON), reason=REASON)

PAGE = 4096
SHARED, OTHER = 0x10000000, 0x20000000  # both drivers hold pages of the first, rdma alone of the second
PAGES = 16
ALLOWANCE_S = 20.0  # for two busy cores
BACK_S = 60.0
ROLES = """
[[grant]]
principal = "cert:application"
roles = ["administer"]

[[grant]]
principal = "cert:*"
mm = "shared"
roles = ["attach", "access"]
"""


@dataclass
class Cast:
    """Who plays."""

    application: Member
    hmm: Member
    rdma: Member
    mm: int


Stage = Callable[..., Cast]


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with Network(tmp_path, ("server", "application", "hmm", "rdma")) as network:
        yield network


@pytest.fixture
def stage(request: pytest.FixtureRequest, network: Network, tmp_path: Path) -> Stage:
    """Start everybody, "plain" or with "tls": the drivers are registered, with an empty address space."""
    environments = certificates(tmp_path) if request.param == "tls" else {name: {} for name in network.hosts}
    options = () if request.param == "tls" else ("--insecure-public",)

    def start(ack_budget_s: float, delay_s: float = 0.0) -> Cast:
        budget = ("--ack-budget-s", str(ack_budget_s), "--grace-s", "1")
        network.serve(*options, *budget, environment=environments["server"])
        application = network.join("application", environments["application"])
        mm = application.ask("create", name="shared")
        hmm = network.join("hmm", environments["hmm"])
        hmm.ask("mirror", mm=mm)
        rdma = network.join("rdma", environments["rdma"], delay_s)
        rdma.ask("region", mm=mm, address=SHARED, pages=(OTHER - SHARED) // PAGE + PAGES)
        return Cast(application, hmm, rdma, mm)

    return start


def certificates(directory: Path) -> Mapping[str, Mapping[str, str]]:
    """A certificate for each host; the environment that names it."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    environments = {}
    for name in ("server", "application", "hmm", "rdma"):
        issued = authority.issue_cert(name, common_name=name)
        cert, key = directory / f"{name}.pem", directory / f"{name}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        key.touch(mode=0o600)
        key.write_bytes(issued.private_key_pem.bytes())
        environments[name] = {
            "MMUBUS_CA": f"{directory}/ca.pem",
            "MMUBUS_CERT": str(cert),
            "MMUBUS_KEY": str(key),
            "MMUBUS_SERVER_NAME": "server",
        }
    roles = directory / "roles.toml"
    roles.touch(mode=0o600)
    roles.write_text(ROLES)
    environments["server"] = {
        "MMUBUS_TLS_CERT": f"{directory}/server.pem",
        "MMUBUS_TLS_KEY": f"{directory}/server.key",
        "MMUBUS_TLS_CLIENT_CA": f"{directory}/ca.pem",
        "MMUBUS_ROLES": str(roles),
    }
    return environments


def fill(cast: Cast, address: int, seed: int) -> str:
    """Map pages and write to them. Returns: what, in hex."""
    data = random.Random(seed).randbytes(PAGES * PAGE).hex()
    cast.application.ask("mmap", mm=cast.mm, address=address, pages=PAGES)
    cast.application.ask("store", mm=cast.mm, address=address, data=data)
    return data


def take_turn(cast: Cast, address: int, drivers: tuple[Member, ...], seed: int) -> float:
    """Map, write, read and write by each device, check every byte. Returns: seconds that munmap took."""
    data = fill(cast, address, seed)
    for number, driver in enumerate(drivers):
        assert driver.ask("read", address=address, length=PAGES * PAGE) == data
        written = random.Random(-seed).randbytes(100).hex()
        at = number * PAGE + 50
        driver.ask("write", address=address + at, data=written)
        data = data[: 2 * at] + written + data[2 * at + 200 :]
    assert cast.application.ask("load", mm=cast.mm, address=address, length=PAGES * PAGE) == data
    return float(cast.application.ask("munmap", mm=cast.mm, address=address, pages=PAGES))


def until(condition: Callable[[], bool], within_s: float, what: str) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {within_s} s"
        time.sleep(0.1)


def assert_sound(cast: Cast) -> None:
    assert cast.application.ask("statistics") == {"freed_before_ack": 0, "rounds_open": 0}


@needs_namespaces
@pytest.mark.parametrize("stage", ["plain", "tls"], indirect=True)
def test_every_byte_is_right_with_loss_and_delay(stage: Stage, network: Network) -> None:
    cast = stage(ack_budget_s=25.0, delay_s=0.02)
    for host in network.hosts.values():
        host.lose(2)
    for seed in range(12):
        take_turn(cast, SHARED, (cast.hmm, cast.rdma), seed)
    assert sum(host.lost() for host in network.hosts.values()) > 0, "no packet was lost: this tested nothing"
    for driver in (cast.hmm, cast.rdma):
        assert driver.ask("state") == {"session": "live", "held": 0, "fences": []}
    assert_sound(cast)


@needs_namespaces
@pytest.mark.parametrize(
    ("stage", "how"),
    [("plain", "link down"), ("plain", "both ways"), ("plain", "one way"), ("tls", "link down")],
    indirect=["stage"],
)
def test_a_partition_costs_one_budget_and_nobody_else_and_heals(stage: Stage, how: str) -> None:
    budget_s = 8.0
    cast = stage(ack_budget_s=budget_s)
    old = fill(cast, SHARED, 1)
    for driver in (cast.hmm, cast.rdma):
        assert driver.ask("read", address=SHARED, length=PAGES * PAGE) == old

    cast.hmm.host.cut(how)
    unmapping = cast.application.begin("munmap", mm=cast.mm, address=SHARED, pages=PAGES)
    # What the other driver alone holds is taken and given meanwhile, without waiting for the one that is cut off.
    assert max(take_turn(cast, OTHER, (cast.rdma,), seed) for seed in range(5)) < budget_s / 2
    took_s = cast.application.end(unmapping)
    assert budget_s * 0.8 < took_s < budget_s + ALLOWANCE_S
    assert_sound(cast)
    assert cast.application.ask("sessions")["hmm"] == ["fenced"]

    new = fill(cast, SHARED, 2)  # the same frames, most likely
    assert cast.rdma.ask("read", address=SHARED, length=PAGES * PAGE) == new
    reading = cast.hmm.begin("read", address=SHARED, length=PAGES * PAGE)
    time.sleep(0.5)

    cast.hmm.host.heal()
    until(lambda: bool(cast.hmm.ask("state")["fences"]), BACK_S, "the driver learns of its fence")
    fence = cast.hmm.ask("state")["fences"][0]
    assert fence["lost"] == PAGES, fence
    until(lambda: cast.hmm.ask("state")["session"] == "live", BACK_S, "the driver comes back")
    early = cast.hmm.outcome(reading)
    assert "error" in early or early["result"] == new
    assert cast.hmm.ask("read", address=SHARED, length=PAGES * PAGE) == new
    assert cast.application.ask("munmap", mm=cast.mm, address=SHARED, pages=PAGES) < budget_s / 2
    assert cast.hmm.ask("state")["held"] == 0
    assert cast.rdma.ask("state")["fences"] == []
    assert_sound(cast)


@needs_namespaces
@pytest.mark.parametrize(("stage", "how"), [("plain", "link down"), ("tls", "one way")], indirect=["stage"])
def test_a_partition_shorter_than_the_budget_costs_time_only(stage: Stage, how: str) -> None:
    cast = stage(ack_budget_s=25.0)
    data = fill(cast, SHARED, 3)
    for driver in (cast.hmm, cast.rdma):
        assert driver.ask("read", address=SHARED, length=PAGES * PAGE) == data
    cast.hmm.host.cut(how)
    unmapping = cast.application.begin("munmap", mm=cast.mm, address=SHARED, pages=PAGES)
    time.sleep(0.6)  # that long it is cut off; nothing tells a driver that does not hear
    cast.hmm.host.heal()
    assert 0.5 < cast.application.end(unmapping) < 25
    assert cast.hmm.ask("state") == {"session": "live", "held": 0, "fences": []}
    take_turn(cast, SHARED, (cast.hmm, cast.rdma), 4)
    assert_sound(cast)


@needs_namespaces
def test_hosts_are_removed(network: Network) -> None:
    namespaces = {host.namespace for host in network.hosts.values()}
    assert namespaces <= set(os.listdir("/run/netns"))
    network.__exit__(None, None, None)
    assert not namespaces & set(os.listdir("/run/netns"))
