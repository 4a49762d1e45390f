"""What a policy server counts, in Prometheus' words."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class ServerMetrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vega_requests", "Requests by outcome: ok, or an error code.", ["outcome"], registry=self.registry
        )
        self.refused = Counter(
            "vega_connections_refused", "Connections refused, by reason.", ["reason"], registry=self.registry
        )
        self.sessions = Gauge("vega_sessions", "Sessions open now.", registry=self.registry)
        self.model_seconds = Histogram(
            "vega_model_seconds", "Time in the policy, a batch.", buckets=_SECONDS, registry=self.registry
        )
        self.server_seconds = Histogram(
            "vega_server_seconds", "From message to answer.", buckets=_SECONDS, registry=self.registry
        )
        self.batch_rows = Histogram(
            "vega_batch_rows",
            "Observations in a batch.",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self.registry,
        )

    def text(self) -> str:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry).decode()
