"""The trainer's weight port: who is let in, and what strangers can do there (nothing). Real sockets throughout."""

import socket
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightning_grpo.rollout.server import handshake
from lightning_grpo.rollout.server import tcp as wire
from lightning_grpo.rollout.server.tcp import WeightClient, WeightServer, own_address

WEIGHTS = [("a", torch.arange(6.0).view(2, 3)), ("b", torch.ones(5, dtype=torch.bfloat16))]


@pytest.fixture
def offer(monkeypatch):
    # So that a fault shows as an error and not as ten minutes of silence.
    monkeypatch.setattr(wire, "TIMEOUT", 5.0)
    offer = WeightServer("127.0.0.1")
    yield offer
    offer.close()
    offer.close()


def fetch(offer):
    with WeightClient(offer.host, offer.port, offer.token) as delivery:
        received = [(name, tensor.clone()) for name, tensor in delivery.weights()]
        delivery.answer({"tensors": len(received)})
        return received


def deliver(offer, workers=1):
    """Send the weights to workers that know the token; what each received."""
    with ThreadPoolExecutor(workers) as pool:
        fetched = [pool.submit(fetch, offer) for _ in range(workers)]
        offer.accept(workers)
        offer.send(WEIGHTS)
        assert offer.answers() == [{"tensors": 2}] * workers
        return [future.result() for future in fetched]


def is_closed(connection):
    connection.settimeout(5)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def reset(connection):
    """Close in the way of a port scan: the peer gets a reset instead of an end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


STRANGERS = {
    "hangs up": lambda peer, offer: peer.close(),
    "resets": lambda peer, offer: reset(peer),
    "is silent": lambda peer, offer: None,
    "sends garbage": lambda peer, offer: peer.sendall(b"\xff" * 500),
    "probes for health": lambda peer, offer: peer.sendall(b"GET /health HTTP/1.1\r\nHost: trainer\r\n\r\n"),
    "sends half a token": lambda peer, offer: peer.sendall(offer.token[:32].encode()),
    "sends half a token and hangs up": lambda peer, offer: (peer.sendall(offer.token[:32].encode()), peer.close()),
    "sends another token": lambda peer, offer: peer.sendall(b"0" * len(offer.token)),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_neither_ends_nor_delays_a_sync(offer, stranger):
    peers = [socket.create_connection((offer.host, offer.port)) for _ in range(3)]
    for peer in peers:
        STRANGERS[stranger](peer, offer)
    for received in deliver(offer, workers=2):
        assert [name for name, _ in received] == ["a", "b"]
        assert all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in zip(received, WEIGHTS, strict=True))
    assert offer.receivers == 2
    offer.close()
    for peer in peers:
        assert peer.fileno() == -1 or is_closed(peer)
        peer.close()


def test_a_silent_connection_is_closed_while_others_are_waited_for(offer, monkeypatch):
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT", 0.0)
    silent = socket.create_connection((offer.host, offer.port))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(offer.accept, 1)
        assert is_closed(silent) and not waiting.done()
        monkeypatch.undo()
        worker = socket.create_connection((offer.host, offer.port))
        worker.sendall(offer.token.encode())
        waiting.result()
    assert offer.receivers == 1
    silent.close()
    worker.close()


def test_a_token_in_pieces_is_a_token(offer):
    with ThreadPoolExecutor(1) as pool, socket.create_connection((offer.host, offer.port)) as worker:
        waiting = pool.submit(offer.accept, 1)
        for byte in offer.token.encode():
            worker.sendall(bytes([byte]))
        waiting.result()
    assert offer.receivers == 1


def test_a_flood_of_connections_leaves_room_for_workers(offer, monkeypatch):
    monkeypatch.setattr(handshake, "MAX_PENDING", 4)
    peers = [socket.create_connection((offer.host, offer.port)) for _ in range(20)]
    assert len(deliver(offer)) == 1
    assert all(is_closed(peer) for peer in peers[:16])
    for peer in peers:
        peer.close()


def test_workers_that_never_come_are_an_error(offer, monkeypatch):
    monkeypatch.setattr(wire, "TIMEOUT", 0.0)
    with pytest.raises(ConnectionError, match=r"0 of 1 engines connected to 127\.0\.0\.1:\d+ within 0 s"):
        offer.accept(1)

    def refused():
        raise RuntimeError("the server refused")

    with pytest.raises(RuntimeError, match="the server refused"):
        offer.accept(1, give_up=refused)


def test_own_address_is_one_that_can_be_listened_on():
    assert own_address(["127.0.0.1"]) == "127.0.0.1"
    for host in ("127.0.0.1", "::1"):
        try:
            offer = WeightServer(own_address([host]))
        except OSError:
            assert host == "::1", "no IPv6 here"
            continue
        assert len(deliver(offer)) == 1
        offer.close()
