"""Prometheus metrics; the set is documented in docs/host.md, and a test compares the two."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ostler.hostd.host import Host
from ostler.hostd.models import GuestState, GuestStats
from ostler.hostd.stats import Statistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_NS = 1e9
Measure = tuple[str, str, Callable[[GuestStats], float]]
_GUEST_COUNTERS: tuple[Measure, ...] = (
    ("ostler_guest_cpu_seconds", "Processor time of a guest's whole process.", lambda each: each.cpu_time_ns / _NS),
    (
        "ostler_guest_vcpu_seconds",
        "Processor time of its virtual processors.",
        lambda each: sum(each.vcpu_time_ns) / _NS,
    ),
    ("ostler_guest_disk_read_bytes", "Read from its disks.", lambda each: each.disk_read_bytes),
    ("ostler_guest_disk_written_bytes", "Written to its disks.", lambda each: each.disk_written_bytes),
    ("ostler_guest_net_received_bytes", "Received by its network cards.", lambda each: each.net_received_bytes),
    ("ostler_guest_net_sent_bytes", "Sent by its network cards.", lambda each: each.net_sent_bytes),
)
_GUEST_GAUGES: tuple[Measure, ...] = (
    ("ostler_guest_memory_bytes", "What a guest has.", lambda each: each.memory_bytes),
    ("ostler_guest_memory_touched_bytes", "What of it was ever used.", lambda each: each.memory_touched_bytes),
    ("ostler_guest_resident_bytes", "What its process has of the host's memory.",
     lambda each: each.memory_resident_bytes),
)  # fmt: skip


class Metrics:
    """What was counted here, and what the host is asked for when somebody reads."""

    def __init__(self, host: Host, statistics: Statistics) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "ostler_http_requests", "Requests answered.", ["method", "route", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "ostler_http_request_seconds", "How long they took.", ["route"], registry=self._registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30),
        )  # fmt: skip
        self._registry.register(_Asked(host, statistics))

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self._registry)


class _Asked:
    def __init__(self, host: Host, statistics: Statistics) -> None:
        self._host, self._statistics = host, statistics

    def describe(self) -> list[Metric]:
        # Nobody is asked anything before somebody reads.
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._guests()
        yield from self._promises()
        yield from self._jobs()
        yield from _used(self._statistics.sample().guests)

    def _guests(self) -> Iterator[Metric]:
        views = self._host.listed().guests
        states = Count(each.state for each in views)
        family = GaugeMetricFamily("ostler_guests", "Guests in each state.", labels=["state"])
        for state in GuestState:
            family.add_metric([state.value], states.get(state, 0))
        yield family
        ready = GaugeMetricFamily("ostler_guest_ready", "1 for a guest that is ready.", labels=["guest"])
        restarts = GaugeMetricFamily("ostler_guest_restarts", "Restarts in a row.", labels=["guest"])
        for each in views:
            ready.add_metric([each.name], float(each.ready))
            restarts.add_metric([each.name], each.restarts)
        yield ready
        yield restarts

    def _promises(self) -> Iterator[Metric]:
        capacity = GaugeMetricFamily("ostler_capacity", "What can be promised.", labels=["resource"])
        promised = GaugeMetricFamily("ostler_promised", "What is promised.", labels=["resource"])
        for name, each in self._host.resources().items():
            capacity.add_metric([name], each.capacity)
            promised.add_metric([name], each.promised)
        yield capacity
        yield promised

    def _jobs(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("ostler_jobs_open", "Jobs under way.", value=self._host.jobs.open_count)
        ended = CounterMetricFamily("ostler_jobs_ended", "Jobs that ended.", labels=["kind", "state"])
        for (kind, state), count in sorted(self._host.jobs.ended.items()):
            ended.add_metric([kind, state], count)
        yield ended
        yield CounterMetricFamily("ostler_events", "Events told.", value=self._host.events.last)


def _used(stats: list[GuestStats]) -> Iterator[Metric]:
    for name, text, value in _GUEST_COUNTERS:
        counter = CounterMetricFamily(name, text, labels=["guest"])
        for each in stats:
            counter.add_metric([each.name], value(each))
        yield counter
    for name, text, value in _GUEST_GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=["guest"])
        for each in stats:
            gauge.add_metric([each.name], value(each))
        yield gauge
