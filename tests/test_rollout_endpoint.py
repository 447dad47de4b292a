"""What passes between an endpoint and its server, and who may ask the server for what. A real server, without vLLM."""

import asyncio
import json
import logging
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from lightning_grpo.rollout.server.access import RequireKey
from lightning_grpo.rollout.server.checks import RECEIVER, check_server, command
from lightning_grpo.rollout.server.endpoint import AccessRefused, Endpoint

KEY = "the key"
PARALLEL = {"data_parallel_size": 1, "data_parallel_external_lb": False, "data_parallel_hybrid_lb": False}
CONFIG = {
    "model_config": {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32", "skip_tokenizer_init": True},
    "parallel_config": PARALLEL | {"worker_extension_cls": RECEIVER},
    "scheduler_config": {"max_num_seqs": 8},
    "lora_config": None,
    "weight_transfer_config": None,
}


@contextmanager
def http_server(guarded):
    """Answers everything like a vLLM server; every request without the key with 401 if it is guarded."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            refused = guarded and self.path != "/health" and self.headers["Authorization"] != f"Bearer {KEY}"
            body = b"" if refused else json.dumps({"vllm_config": CONFIG}).encode()
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.send_response(401 if refused else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def ask(url, action, key=KEY):
    async def asked():
        endpoint = Endpoint(url, key)
        try:
            return await action(endpoint)
        finally:
            await endpoint.client.aclose()

    return asyncio.run(asked())


@pytest.mark.parametrize("guarded", [True, False])
def test_a_server_that_takes_commands_from_everyone_is_warned_of(guarded, caplog):
    with http_server(guarded) as url, caplog.at_level(logging.WARNING, "lightning_grpo"):
        assert ask(url, check_server).max_num_seqs == 8
    said = [record.getMessage() for record in caplog.records]
    assert said == [] if guarded else ("from everyone without an API key" in said[0] and command() in said[0])


def test_a_wrong_key_is_refused():
    with http_server(guarded=True) as url, pytest.raises(AccessRefused):
        ask(url, check_server, key="wrong")


def test_engines_are_reached_without_a_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with http_server(guarded=True) as url:
        assert ask(url, Endpoint.is_healthy)


def answer(scope):
    """What the middleware answers to a request: the application's 200, or its own."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    asyncio.run(RequireKey(app)({"headers": [], "path": "/pause"} | scope, None, send))
    return sent[0].get("status", sent[0].get("code"))


def test_the_middleware_lets_nothing_through_but_health_and_the_key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with_key = {"headers": [(b"authorization", b"Bearer " + KEY.encode())]}
    assert answer({"type": "http"} | with_key) == 200
    assert answer({"type": "websocket"} | with_key) == 200
    assert answer({"type": "lifespan"}) == 200
    assert answer({"type": "http", "path": "/health"}) == 200
    for scope in (
        {"type": "http"},
        {"type": "http", "method": "OPTIONS"},
        {"type": "http", "path": "/health/../pause"},
    ):
        assert answer(scope) == 401
    assert answer({"type": "websocket"}) == 1008
    assert answer({"type": "http", "headers": [(b"authorization", "Bearer é".encode())]}) == 401


def test_the_middleware_needs_a_key(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ValueError, match="VLLM_API_KEY is not set"):
        RequireKey(lambda *_: None)
