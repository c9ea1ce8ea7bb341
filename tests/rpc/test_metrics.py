"""What Prometheus gets: every metric, truthful, in a form that Prometheus itself takes."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess

import grpc
import pytest
from mmu.v1 import address_space_pb2, inspection_pb2
from mmubusd.rpc import EmbeddedServer
from mmubusd.rpc.metrics import Metrics
from prometheus_client.parser import text_string_to_metric_families
from source_tree import ROOT

BASE = 0x7000_0000_0000
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
NAME = re.compile(r"\bmmubus_\w+")


@pytest.fixture
def options() -> dict[str, object]:
    return {"metrics_listen": "127.0.0.1:0"}


async def scrape(server: EmbeddedServer, request: str = "GET /metrics HTTP/1.1") -> tuple[str, str]:
    """Status line and body, as a scraper gets them."""
    assert server.server.metrics is not None
    host, _, port = server.server.metrics.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{request}\r\nHost: x\r\n\r\n".encode())
    data = (await asyncio.wait_for(reader.read(), 10)).decode()
    writer.close()
    await writer.wait_closed()
    head, _, body = data.partition("\r\n\r\n")
    return head.splitlines()[0] if head else "", body


def values(text: str) -> dict[str, float]:
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_counts_what_has_happened(server: EmbeddedServer, peer) -> None:
    mm = await peer.space(4, touch=True)
    attached = peer.attach()
    await attached.hello()
    await attached.register(mm)
    munmap = address_space_pb2.MunmapRequest(mm=mm, addr=BASE, length=4096)
    unmapping = asyncio.ensure_future(peer.spaces.Munmap(munmap))
    batch = await attached.notices()
    _, text = await scrape(server)
    found = values(text)
    assert found["mmubus_rounds_total"] == found["mmubus_rounds_open"] == 1
    assert found["mmubus_pending_ranges"] == found["mmubus_pending_ranges_worst"] == 1
    assert found["mmubus_frames{quarantined}"] == 1
    assert found["mmubus_sessions{live}"] == found["mmubus_registrations"] == 1
    await attached.ack(batch.first_seq)
    await unmapping
    with pytest.raises(grpc.aio.AioRpcError):
        await peer.spaces.Exit(address_space_pb2.ExitRequest(mm=mm + 1))
    call = address_space_pb2.Call(op=address_space_pb2.OP_EXIT, mm=mm + 1)
    await peer.spaces.Call(address_space_pb2.CallRequest(call=call))
    _, text = await scrape(server)
    found = values(text)
    assert (found["mmubus_rounds_open"], found["mmubus_pending_ranges"], found["mmubus_frames{quarantined}"]) == (
        0,
        0,
        0,
    )
    assert found["mmubus_acks_total"] == found["mmubus_ack_latency_seconds_count"] == 1
    assert 0 < found["mmubus_ack_latency_seconds_sum"] < 30
    assert found["mmubus_grpc_errors_total{NOT_FOUND}"] == 1
    assert found["mmubus_call_errors_total{ESRCH}"] == 1
    assert found["mmubus_serving"] == 1
    states = [found[f"mmubus_frames{{{state}}}"] for state in ("free", "used", "quarantined")]
    assert sum(states) == 1 << 14


async def test_buckets_add_up(server: EmbeddedServer) -> None:
    latency = server.server.bus.counters.ack_latency_before
    for microseconds in (1, 3, 100, 100, 5_000, 2_000_000):
        latency.add(microseconds / 1e6)
    _, text = await scrape(server)
    found = values(text)
    buckets = [(float(name.split("{")[1][:-1]), value) for name, value in found.items() if "_bucket" in name]
    assert [count for _, count in buckets] == sorted(count for _, count in buckets)
    assert buckets[-1] == (float("inf"), 6)
    below = dict(buckets)
    assert below[min(bound for bound in below if bound >= 1e-4)] == 4
    assert found["mmubus_ack_latency_seconds_sum"] == pytest.approx(2.005204, rel=0.07)


async def test_only_metrics_are_served(server: EmbeddedServer) -> None:
    assert (await scrape(server, "GET / HTTP/1.1"))[0] == "HTTP/1.1 404 Not Found"
    assert (await scrape(server, "POST /metrics HTTP/1.1"))[0] == "HTTP/1.1 405 Method Not Allowed"
    assert (await scrape(server, "GET /metrics?x=1 HTTP/1.1"))[0] == "HTTP/1.1 200 OK"
    assert (await scrape(server, "GET " + "x" * 100_000))[0] == ""
    assert (await scrape(server))[0] == "HTTP/1.1 200 OK"


async def test_nobodys_name_is_in_it(server: EmbeddedServer, peer) -> None:
    await peer.attach().hello("a secret project")
    _, text = await scrape(server)
    assert "secret" not in text


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_promtool_takes_it_and_the_rules(server: EmbeddedServer) -> None:
    _, text = await scrape(server)
    for command, given in ((["check", "metrics"], text), (["check", "rules", str(RULES)], "")):
        done = await asyncio.to_thread(
            subprocess.run, ["promtool", *command], input=given, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def known(server: EmbeddedServer) -> set[str]:
    """Names of all metrics and samples; a family without a sample yet has its name."""
    text = Metrics(server.server.driver, lambda: server.server.lag).text().decode()
    families = list(text_string_to_metric_families(text))
    names = {sample.name for family in families for sample in family.samples}
    return names | {f"{family.name}_total" if family.type == "counter" else family.name for family in families}


async def test_dashboard_and_rules_name_metrics_that_exist(server: EmbeddedServer) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(expressions) >= 15
    names = {name for text in (*expressions, RULES.read_text()) for name in NAME.findall(text)}
    assert names - known(server) == set()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


async def test_statistics_agree(server: EmbeddedServer, peer) -> None:
    await peer.space(2, touch=True)
    told = await peer.inspection.GetStatistics(inspection_pb2.GetStatisticsRequest())
    _, text = await scrape(server)
    found = values(text)
    assert found["mmubus_operations_total"] == told.operations
    assert found["mmubus_frames{used}"] == told.frames_used
