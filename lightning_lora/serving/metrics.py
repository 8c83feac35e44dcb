"""What Prometheus reads of a server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class ServingMetrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prefix, sizes = "lightning_lora", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
        self.requests = Counter(f"{prefix}_requests", "HTTP requests.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(f"{prefix}_request_seconds", "From request to answer.", registry=self.registry)
        self.texts = Counter(f"{prefix}_texts", "Texts predicted.", ["run"], registry=self.registry)
        self.tokens = Counter(f"{prefix}_tokens", "Tokens, as batches count them.", ["run"], registry=self.registry)
        self.batch_texts = Histogram(f"{prefix}_batch_texts", "Texts a batch.", buckets=sizes, registry=self.registry)
        self.batch_seconds = Histogram(f"{prefix}_batch_seconds", "Time of a batch.", registry=self.registry)
        self.waiting = Gauge(f"{prefix}_waiting_texts", "Texts accepted and not answered.", registry=self.registry)
