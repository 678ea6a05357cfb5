"""The HTTP endpoint of one worker: ``/metrics`` for Prometheus, ``/status`` as JSON, ``/healthz``.

It says nothing about prompts: counts, sizes, times and the artifact's id only. It has no authentication,
which is why it listens on this machine only unless it is told otherwise.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dynamo_kvtc.errors import ConfigError, KvtcError
from dynamo_kvtc.observability.prometheus import exposition

__all__ = ["MetricsEndpoint"]

_log = logging.getLogger(__name__)

_SOCKET_TIMEOUT_S = 5.0
_MOST_CONNECTIONS = 16


class MetricsEndpoint:
    """Serves a status from a thread of its own until `close`.

    Parameters
    ----------
    read : Callable
        Gives a status as `AdapterStatus.to_dict` does, from any thread, and within a few seconds. Where it
        raises a `KvtcError`, the answer is 503 with the reason.
    address, port : str, int
        Where to listen; port 0 takes any free one.

    Attributes
    ----------
    port : int
        The port that it listens on.

    Raises
    ------
    ConfigError
        If it cannot listen there.
    MissingDependencyError
        If prometheus_client is not installed.
    """

    def __init__(
        self, read: Callable[[], Mapping[str, Any]], address: str = "127.0.0.1", port: int = 0
    ) -> None:
        exposition({})  # without prometheus_client this fails now and not at the first scrape
        try:
            self._server = _Server((address, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"the metrics endpoint cannot listen on {address}:{port}: {error.strerror or error}; set "
                "observability.metrics_port to a free port, one for each worker of a machine"
            ) from error
        self._server.read = read
        self.address, self.port = address, int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="kvtc-metrics", kwargs={"poll_interval": 0.2}, daemon=True
        )
        self._thread.start()
        _log.info("metrics endpoint listens", extra={"kvtc": {"address": address, "port": self.port}})

    def close(self) -> None:
        """Stop listening and end the thread. Idempotent."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join(_SOCKET_TIMEOUT_S)
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A connection that hangs must not hold up `close`; its thread ends with the socket's timeout.
    block_on_close = False
    read: Callable[[], Mapping[str, Any]]

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a client of the metrics endpoint went away", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _SOCKET_TIMEOUT_S
    server_version = "dynamo-kvtc"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/healthz":
            self._answer(200, b"ok\n", "text/plain; charset=utf-8")
            return
        if path not in ("/metrics", "/status"):
            self._answer(404, b"try /metrics, /status or /healthz\n", "text/plain; charset=utf-8")
            return
        try:
            status = self.server.read()
        except KvtcError as error:
            self._answer(503, f"{error}\n".encode(), "text/plain; charset=utf-8")
            return
        if path == "/metrics":
            self._answer(200, *exposition(status, self.headers.get("Accept", "")))
        else:
            self._answer(200, json.dumps(status).encode(), "application/json")

    def _answer(self, code: int, body: bytes, content_type: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug("metrics endpoint: %s", format % args)
