"""Spans are made only if a collector is configured."""

from collections.abc import Iterator

import pytest
from bentoml._internal.configuration.containers import BentoMLContainer
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from service.app import make_service
from service.settings import Settings
from tests.conftest import MODEL, encoded, scene

PICTURE = encoded(scene())


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """The tracer of BentoML's provider."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    BentoMLContainer.tracer_provider.set(provider)
    yield exporter
    BentoMLContainer.tracer_provider.reset()


def embed() -> None:
    service = make_service(Settings(no_store=True, model=MODEL, variant="fp32"))
    with TestClient(service.to_asgi()) as client:
        assert client.post("/embed", content=PICTURE).status_code == 200
        assert client.get("/images").json()["code"] == "no_store"


def test_without_an_exporter_no_span_is_made(spans: InMemorySpanExporter) -> None:
    embed()
    assert not spans.get_finished_spans()


def test_with_an_exporter_requests_are_traced(spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENTOML_CONFIG_OVERRIDES", '{"services": {"tracing": {"exporter_type": "otlp"}}}')
    embed()
    paths = {(span.attributes or {}).get("http.target") for span in spans.get_finished_spans()}
    assert {"/embed", "/images"} <= paths
