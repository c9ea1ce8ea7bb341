"""What Prometheus scrapes: made from the counters that are kept anyway, when it asks, and at no other time.

Clients are no labels: there may be thousands, and their names are theirs to choose. Who is late, and how fast each
answers, is asked by `mmubus sessions` (InspectionService.ListSessions). `metrics_clients_max` lets so many names in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from mmubusd.notify import Session, State
from mmubusd.notify.histogram import Histogram
from mmubusd.rpc.driver import Driver
from mmubusd.rpc.lag import Lag

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(Collector):
    """Every metric of one server; `text()` is what a scrape gets."""

    def __init__(self, driver: Driver, lag: Callable[[], Lag]) -> None:
        self._driver = driver
        self._bus = driver.bus
        self._lag = lag
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing at registration: `collect` needs a server that runs."""
        return ()

    def text(self) -> bytes:
        """The exposition, in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Every metric, now."""
        yield from self._work()
        yield from self._clients()
        yield from self._worst_clients()
        yield from self._frames()
        yield from self._loop()
        yield from self._failures()

    def _work(self) -> Iterator[Metric]:
        counted = self._bus.counters
        yield _counter("operations", "Operations that were begun.", counted.operations)
        yield _gauge("operations_open", "Operations that wait for something.", len(self._bus.running))
        yield _counter("rounds", "Rounds that were raised.", counted.rounds)
        yield _gauge("rounds_open", "Rounds that somebody has still to answer.", len(self._bus.rounds.open))
        oldest = next(iter(self._bus.rounds.open.values()), None)
        age = max(0.0, self._bus.clock(self._driver.now()) - oldest.opened_at) if oldest is not None else 0.0
        yield _gauge("round_oldest_seconds", "How long the oldest open round has been open.", age)
        yield _counter("notices", "Notices that were put into outboxes.", counted.notices)
        yield _counter("acks", "Notices that were answered by a handler.", counted.acks)
        yield _counter("notices_merged", "Notices that were merged into others.", counted.merged)
        yield _counter("notices_unasked", "Questions about age that were not asked of slow clients.", counted.unasked)
        yield _latency(self._bus.ack_latency())

    def _clients(self) -> Iterator[Metric]:
        bus, counted = self._bus, self._bus.counters
        states = Counter(session.state.value for session in bus.sessions.values())
        sessions = GaugeMetricFamily("mmubus_sessions", "Sessions that are remembered.", labels=["state"])
        for state in State:
            sessions.add_metric([state.value], states[state.value])
        yield sessions
        standing = [session for session in bus.sessions.values() if session.state in (State.LIVE, State.LOST)]
        pending = [session.waiting_nr for session in standing]
        yield _gauge("registrations", "Notifiers.", sum(len(session.registrations) for session in standing))
        yield _gauge("pending_ranges", "Notices that are not answered, of all sessions.", sum(pending))
        yield _gauge(
            "pending_ranges_worst", "Notices that are not answered, of the worst session.", max(pending, default=0)
        )
        yield _counter("late", "Times that half an ack budget was used up.", counted.late)
        yield _counter("fenced", "Sessions that were fenced.", counted.fenced)
        flushes = CounterMetricFamily(
            "mmubus_flushes", "Times that somebody was told that everything it holds is void.", labels=["cause"]
        )
        causes = {
            "overload": counted.flushes_overload,
            "overload_mm": counted.flushes_mm,
            "oversized": self._driver.tally.oversized,
            "fence": counted.fenced,
        }
        for cause, count in causes.items():
            flushes.add_metric([cause], count)
        yield flushes

    def _worst_clients(self) -> Iterator[Metric]:
        """Those that others have waited for longest, by name; sessions of one name count together."""
        clients_max = self._driver.settings.metrics_clients_max
        if not clients_max:
            return
        by_name: dict[str, list[Session]] = {}
        for session in self._bus.sessions.values():
            by_name.setdefault(session.name, []).append(session)
        harm = {name: sum(session.harm_s for session in sessions) for name, sessions in by_name.items()}
        latency = GaugeMetricFamily(
            "mmubus_client_ack_latency_seconds", "From notice to acknowledgement, of one client.",
            labels=["client", "quantile"],
        )  # fmt: skip
        waited = GaugeMetricFamily(
            "mmubus_client_waited_for_seconds", "Time that others waited for this client alone.", labels=["client"]
        )
        for name in sorted(harm, key=lambda name: -harm[name])[:clients_max]:
            merged = Histogram()
            for session in by_name[name]:
                merged.merge(session.ack_latency)
            for quantile in (0.5, 0.99):
                latency.add_metric([name, str(quantile)], merged.quantile(quantile))
            waited.add_metric([name], harm[name])
        yield latency
        yield waited

    def _frames(self) -> Iterator[Metric]:
        memory, counted = self._driver.memory, self._bus.counters
        frames = memory.frames
        states = {
            "free": frames.free_nr,
            "used": frames.frames_nr - frames.free_nr - frames.quarantine_nr - frames.hwpoison_nr,
            "quarantined": frames.quarantine_nr,
            "failed": frames.hwpoison_nr,
        }
        yield _labelled(GaugeMetricFamily, "frames", "Page frames of 4096 bytes; the states add up.", "state", states)
        held = {"exported": len(frames.exports), "pinned": len(frames.pins)}
        yield _labelled(GaugeMetricFamily, "frames_held", "Used frames that devices hold for long.", "by", held)
        groups = memory.memcgs.values()
        yield _gauge("memory_groups", "Principals whose memory is limited.", len(groups))
        fullest = max((one.charged / one.limit for one in groups), default=0.0)
        yield _gauge("memory_group_fullest_ratio", "What the fullest of them has of what it may have.", fullest)
        limits = {
            "reclaimed": sum(one.limit_hits - one.ooms for one in groups),
            "out_of_memory": sum(one.ooms for one in groups),
        }
        yield _labelled(
            GaugeMetricFamily,
            "memory_group_limit_hits",
            "Times that they were at their limit.",
            "end",
            limits,
        )
        yield _counter("reclaim_victims", "Folios that reclaim tried to free.", memory.lru.victims_nr)
        yield _counter("reclaimed", "Folios that reclaim has freed.", memory.lru.reclaimed_nr)
        yield _gauge("address_spaces", "Address spaces.", len(memory.mms))
        yield _gauge("files", "Files.", len(memory.files))
        yield _counter("stale_refused", "Accesses that were refused for a stale translation.", counted.stale_refused)
        yield _counter("slipped", "Pages that a notifier lost without being told, for want of an op.", counted.slipped)
        yield _counter(
            "freed_before_ack", "Frames freed while somebody could hold them; always 0.", counted.freed_before_ack
        )

    def _loop(self) -> Iterator[Metric]:
        driver, lag = self._driver, self._lag()
        yield _gauge("loop_lag_seconds", "How late the loop was last.", lag.last_s)
        yield _gauge(
            "loop_lag_worst_seconds", "How late the loop was at worst since the last scrape.", lag.take_worst()
        )
        yield _counter(
            "loop_late_seconds", "Lateness of the loop, all together; over the ticks it is the mean.", lag.late_s
        )
        yield _counter("loop_ticks", "Times that the loop's lateness was measured.", lag.ticks_nr)
        yield _counter(
            "stalls", "Times that a deadline was looked at too late; it counted against nobody.", driver.stalls_nr
        )
        yield _gauge("serving", "1 while the health service says SERVING.", not driver.draining and not lag.over)
        yield _gauge("draining", "1 from the first SIGTERM on.", driver.draining)
        yield _gauge("uptime_seconds", "Since the start.", driver.now() - driver.started_at)

    def _failures(self) -> Iterator[Metric]:
        tally = self._driver.tally
        yield _labelled(
            CounterMetricFamily, "grpc_errors", "Calls and streams that ended with a status.", "code", tally.failed_rpcs
        )
        yield _labelled(CounterMetricFamily, "call_errors", "Memory calls that failed.", "errno", tally.failed_calls)
        yield _counter(
            "unauthenticated", "Calls that were refused because nobody knew who called.", tally.unauthenticated
        )


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"mmubus_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"mmubus_{name}", text, value=float(value))


def _labelled(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    label: str,
    values: Mapping[str, int],
) -> Metric:
    family = kind(f"mmubus_{name}", text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def _latency(latency: Histogram) -> Metric:
    """From 8 buckets an octave to one; the sum is that of the buckets' middles, within 5 %."""
    buckets: list[tuple[str, float]] = []
    count, total = 0, 0.0
    for bound_s, times, middle_s in latency.octaves():
        count += times
        total += middle_s
        buckets.append((f"{bound_s:.9g}", count))
    buckets.append(("+Inf", count))
    return HistogramMetricFamily(
        "mmubus_ack_latency_seconds", "From a notice to its acknowledgement.", buckets=buckets, sum_value=total
    )
