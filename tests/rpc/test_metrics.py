"""What Prometheus gets: every metric, truthful, in a form that Prometheus itself takes."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path

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
ALERTS = ROOT / "tests" / "alerts.yaml"
NAME = re.compile(r"\bmmubus_\w+")


@pytest.fixture
def options() -> dict[str, object]:
    return {"metrics_listen": "127.0.0.1:0", "health_lag_s": 60.0}  # a busy machine lags, which is not the point here


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


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_alerts_go_off_when_they_should_and_not_before(tmp_path: Path) -> None:
    """promtool plays tests/alerts.yaml; and with one threshold moved it must not be content."""
    rules = RULES.read_text()
    for text, content in ((rules, True), (rules.replace("_seconds > 40", "_seconds > 61"), False)):
        (tmp_path / "rules.yaml").write_text(text)
        (tmp_path / "alerts.yaml").write_text(ALERTS.read_text().replace("RULES", str(tmp_path / "rules.yaml")))
        done = subprocess.run(
            ["promtool", "test", "rules", tmp_path / "alerts.yaml"], capture_output=True, text=True, check=False
        )
        assert (done.returncode == 0) is content, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_takes_the_dashboard_s_expressions(tmp_path: Path) -> None:
    """As rules, since that is what promtool parses; Grafana's own variables are filled in as it does."""
    expressions = [expression.replace("$__rate_interval", "1m").replace("$instance", ".*") for expression in drawn()]
    recorded = [{"record": f"panel:{n}", "expr": expression} for n, expression in enumerate(expressions)]
    (tmp_path / "rules.yaml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": recorded}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", tmp_path / "rules.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(expressions)} rules found" in done.stdout


def drawn() -> list[str]:
    """Every expression of the dashboard."""
    dashboard = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def test_the_dashboard_is_one_that_grafana_draws() -> None:
    """What its importer wants of each panel: a kind, a place that overlaps no other's, a data source, a legend."""
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["uid"]
    assert dashboard["schemaVersion"] >= 39
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["type"] in {"stat", "timeseries"}
        letters = [target["refId"] for target in panel["targets"]]
        assert len(letters) == len(set(letters)) > 0
        for target in panel["targets"]:
            used = set(re.findall(r"\$\{?(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables, panel["title"]
            assert target["expr"].count("(") == target["expr"].count(")")


@pytest.mark.parametrize("options", [{"metrics_listen": "127.0.0.1:0", "metrics_clients_max": 2}])
async def test_the_worst_clients_by_name_when_asked_for(server: EmbeddedServer, peer) -> None:
    """Two of three: those that others waited for longest, sessions of one name together."""
    for name, harm_s, latency_s in (("gpu", 1.0, 0.1), ("nic", 5.0, 0.2), ("gpu", 2.0, 0.4), ("idle", 0.0, 0.3)):
        attached = peer.attach()
        welcome = await attached.hello(name)
        session = server.server.bus.sessions[welcome.session]
        session.harm_s = harm_s
        session.ack_latency.add(latency_s)
    _, text = await scrape(server)
    found = values(text)
    assert found["mmubus_client_waited_for_seconds{gpu}"] == 3.0
    assert found["mmubus_client_waited_for_seconds{nic}"] == 5.0
    assert found["mmubus_client_ack_latency_seconds{gpu}{0.5}"] == pytest.approx(0.1, rel=0.1)
    assert found["mmubus_client_ack_latency_seconds{gpu}{0.99}"] == pytest.approx(0.4, rel=0.1)
    assert "idle" not in text


def known(server: EmbeddedServer) -> set[str]:
    """Names of all metrics and samples; a family without a sample yet has its name."""
    driver = server.server.driver
    driver.settings = driver.settings.model_copy(update={"metrics_clients_max": 10})
    text = Metrics(driver, lambda: server.server.lag).text().decode()
    families = list(text_string_to_metric_families(text))
    names = {sample.name for family in families for sample in family.samples}
    return names | {f"{family.name}_total" if family.type == "counter" else family.name for family in families}


async def test_dashboard_and_rules_name_metrics_that_exist(server: EmbeddedServer) -> None:
    dashboard, expressions = json.loads(DASHBOARD.read_text()), drawn()
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
