"""The HTTP endpoint: what it answers, and that nothing holds it up."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from dynamo_kvtc.errors import ConfigError, TransferTimeoutError
from dynamo_kvtc.observability import Counters, MetricsEndpoint

STATUS = {"version": "0.1.0", "counters": Counters().snapshot().to_dict()}


@pytest.fixture
def endpoint() -> Iterator[MetricsEndpoint]:
    opened = MetricsEndpoint(lambda: STATUS)
    yield opened
    opened.close()


def get(endpoint: MetricsEndpoint, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_it_serves_metrics_status_and_health(endpoint: MetricsEndpoint) -> None:
    code, text = get(endpoint, "/metrics")
    assert code == 200 and "dynamo_kvtc_offloaded_blocks_total 0.0" in text
    code, text = get(endpoint, "/status")
    assert code == 200 and json.loads(text) == STATUS
    assert get(endpoint, "/healthz") == (200, "ok\n")
    assert get(endpoint, "/other")[0] == 404


def test_a_worker_that_does_not_answer_is_a_503_with_the_reason() -> None:
    def read() -> dict[str, object]:
        raise TransferTimeoutError("the loop is busy")

    endpoint = MetricsEndpoint(read)
    try:
        assert get(endpoint, "/metrics") == (503, "the loop is busy\n")
    finally:
        endpoint.close()


def test_a_client_that_says_nothing_does_not_hold_up_others(endpoint: MetricsEndpoint) -> None:
    with socket.create_connection(("127.0.0.1", endpoint.port)) as silent:
        silent.sendall(b"GET /metr")
        assert get(endpoint, "/healthz")[0] == 200


def test_a_port_that_is_taken_is_refused(endpoint: MetricsEndpoint) -> None:
    with pytest.raises(ConfigError, match=r"metrics_port"):
        MetricsEndpoint(lambda: STATUS, port=endpoint.port)


def test_close_frees_the_port_and_may_be_called_twice(endpoint: MetricsEndpoint) -> None:
    endpoint.close()
    endpoint.close()
    MetricsEndpoint(lambda: STATUS, port=endpoint.port).close()
