"""Fingerprints, tolerances, the mismatch between engine and policy, tensors over TCP."""

import itertools
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lightning_grpo.rollout import (
    HFEngine,
    Mismatch,
    SyncedEngine,
    Tolerance,
    WeightSyncError,
    mismatch,
    policy_weights,
)
from lightning_grpo.rollout.server.tcp import WeightClient, WeightServer
from lightning_grpo.rollout.verify import Fingerprint, StoredTensor, WeightStream, check_sequences, compare_logprobs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@given(st.integers(1, 300), st.integers(0, 299), st.sampled_from(DTYPES))
def test_one_changed_element_changes_the_fingerprint(size, at, dtype):
    tensor = torch.randn(size).to(dtype)
    other = tensor.clone()
    other[at % size] += 1
    assert Fingerprint.of(tensor) == Fingerprint.of(tensor.clone())
    assert Fingerprint.of(tensor) != Fingerprint.of(other)


def test_fingerprints_see_order_shape_and_dtype():
    tensor = torch.randn(64, 64)
    prints = [tensor, tensor.T, tensor.flip(0), tensor.roll(1, 0), tensor.view(32, 128), tensor.bfloat16()]
    assert len({Fingerprint.of(t) for t in prints}) == len(prints)


def test_fingerprints_see_through_views():
    """A slice of a fused tensor has the fingerprint of the same values on their own, wherever it starts."""
    fused = torch.randn(101).bfloat16()
    for start in range(9):
        assert Fingerprint.of(fused[start : start + 77]) == Fingerprint.of(fused[start : start + 77].clone())
    square = torch.randn(6, 6)
    assert Fingerprint.of(square.T) == Fingerprint.of(square.T.contiguous())


def test_mismatch_is_what_it_says():
    engine, policy = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.5, -1.8, 0.0]])
    m = mismatch(engine, policy, torch.tensor([[True, True, False]]))
    d = torch.tensor([-0.5, 0.2])
    assert m.mean == pytest.approx(0.35) and m.max == pytest.approx(0.5) and m.p99 == pytest.approx(0.5)
    assert m.kl == pytest.approx((d.exp() - 1 - d).mean().item())
    with pytest.raises(ValueError, match="no tokens"):
        mismatch(engine, policy, torch.zeros(1, 3, dtype=torch.bool))


def test_kl_estimates_the_divergence():
    """On samples of the engine the mean of e^d − 1 − d is KL(engine ‖ policy)."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(50, generator=generator).mul(0.3).log_softmax(0) for _ in range(2))
    tokens = torch.multinomial(p.exp(), 200_000, replacement=True, generator=generator)
    assert mismatch(p[tokens], q[tokens]).kl == pytest.approx((p.exp() * (p - q)).sum().item(), rel=0.03)


def test_tolerance_follows_the_coarser_dtype_the_level_and_what_was_measured():
    fp32 = Tolerance.of([torch.float32], level=10)
    bf16 = Tolerance.of([torch.float32, torch.bfloat16], level=10)
    assert fp32.mean < 1e-3 < bf16.mean < 0.5
    assert Tolerance.of([torch.bfloat16], level=20).mean == pytest.approx(2 * bf16.mean)
    seen = Mismatch(mean=0.01, max=0.1, p99=0.1, kl=0.0)
    assert bf16.narrowed(seen) == Tolerance(mean=0.04, max=0.4)
    assert bf16.narrowed(seen, growth=2) == Tolerance(mean=0.08, max=0.8)
    assert bf16.narrowed(Mismatch(mean=1.0, max=9.0, p99=1.0, kl=0.0)) == bf16
    assert bf16.exceeded_by(Mismatch(mean=float("nan"), max=0.0, p99=0.0, kl=0.0))
    assert not bf16.exceeded_by(seen)


def test_check_sequences_are_the_same_everywhere_and_span_the_vocabulary():
    a, b = (check_sequences(1000, length=64) for _ in range(2))
    assert a == b and [len(s) for s in a] == [64] * 4
    ids = {token for sequence in a for token in sequence}
    assert min(ids) < 50 and 950 < max(ids) < 1000


def test_an_engine_that_scores_other_lengths_is_caught():
    with pytest.raises(WeightSyncError, match="scored"):
        compare_logprobs([torch.zeros(3)], [torch.zeros(4)])


def sent(weights, dtype=None):
    stream = WeightStream(iter(weights.items()), dtype)
    return dict(stream), stream


def test_a_stream_knows_what_moved():
    weights = {"a": torch.randn(4, 4), "b": torch.randn(4)}
    _, before = sent(weights)
    _, after = sent(weights | {"b": weights["b"] + 1})
    assert after.compare(before.fingerprints) == ["b"]
    assert before.bytes == 80


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ({"a": torch.zeros(4, 4)}, "are missing: b"),
        ({"a": torch.zeros(4, 4), "b": torch.zeros(4), "c": torch.zeros(1)}, "are new since earlier syncs: c"),
        ({"a": torch.zeros(4, 2), "b": torch.zeros(4)}, r"a has shape \(4, 2\), in earlier syncs \(4, 4\)"),
    ],
)
def test_a_stream_of_other_tensors_is_refused(later, message):
    _, before = sent({"a": torch.zeros(4, 4), "b": torch.zeros(4)})
    _, after = sent(later)
    with pytest.raises(WeightSyncError, match=message):
        after.compare(before.fingerprints)


def test_a_tensor_that_comes_twice_is_refused():
    with pytest.raises(WeightSyncError, match="a occurs twice"):
        list(WeightStream([("a", torch.zeros(1)), ("a", torch.zeros(1))]))


def test_matrices_are_cast_on_the_way_and_vectors_remembered_as_cast():
    weights = {"matrix": torch.randn(4, 4), "vector": torch.randn(4)}
    passed, stream = sent(weights, torch.bfloat16)
    assert passed["matrix"].dtype == torch.bfloat16 and passed["vector"].dtype == torch.float32
    stored = [StoredTensor(n, "layer", Fingerprint.of(w.bfloat16())) for n, w in weights.items()]
    assert stream.check(stored) == 2
    assert stream.check([StoredTensor("unknown", "layer", None)]) == 0


@pytest.mark.parametrize(("fault", "message"), [("stale", r"b \(stale in layer"), ("altered", r"b \(altered in layer")])
def test_what_the_engine_holds_is_compared(fault, message):
    weights = {"a": torch.randn(4, 4), "b": torch.randn(4, 4)}
    _, stream = sent(weights)
    wrong = None if fault == "stale" else Fingerprint.of(weights["b"].T)
    stored = [StoredTensor("a", "layer", Fingerprint.of(weights["a"])), StoredTensor("b", "layer", wrong)]
    # The same must hold for what a server reports.
    for report in (stored, [StoredTensor.from_json(h.to_json(at="http://there")) for h in stored]):
        with pytest.raises(WeightSyncError, match=message):
            stream.check(report)


def test_tensors_travel_over_tcp_unchanged():
    weights = {f"{i}": torch.randn(3, i + 1).to(dtype) for i, dtype in enumerate([*DTYPES, torch.float64])}
    weights |= {"scalar": torch.tensor(3.5), "strided": torch.randn(4, 6).T, "ints": torch.arange(5)}
    offer = WeightServer("127.0.0.1")
    received = [{}, {}]

    def receive(into):
        with WeightClient(offer.host, offer.port, offer.token) as delivery:
            into.update(delivery.weights())
            delivery.answer({"tensors": len(into)})

    threads = [threading.Thread(target=receive, args=(into,)) for into in received]
    for thread in threads:
        thread.start()
    offer.accept(2)
    offer.send(weights.items())
    assert offer.answers() == [{"tensors": len(weights)}] * 2
    for thread in threads:
        thread.join()
    offer.close()
    for copy in received:
        assert list(copy) == list(weights)
        for name, tensor in copy.items():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)


def test_an_impostor_gets_nothing_and_a_cut_stream_is_an_error():
    offer = WeightServer("127.0.0.1")
    outcomes = []

    def receive(token):
        try:
            with WeightClient(offer.host, offer.port, token) as delivery:
                outcomes.append(dict(delivery.weights()))
        except ConnectionError as error:
            outcomes.append(error)

    impostor = threading.Thread(target=receive, args=("0" * len(offer.token),))
    impostor.start()

    def stop_after_the_impostor():
        if outcomes:
            raise WeightSyncError("nobody came")

    with pytest.raises(WeightSyncError, match="nobody came"):
        offer.accept(1, give_up=stop_after_the_impostor)
    impostor.join()
    known = threading.Thread(target=receive, args=(offer.token,))
    known.start()
    offer.accept(1)
    offer.close()
    known.join()
    assert len(outcomes) == 2 and all(isinstance(outcome, ConnectionError) for outcome in outcomes)


def test_the_first_sync_scores_every_check_sequence_and_later_ones_take_turns(tiny_model_path):
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    engine = HFEngine(policy, eos_token_ids=[1], pad_id=0)
    scored = []

    def score(sequences):
        scored.append(sequences)
        return engine.logprobs(sequences)

    versions = itertools.count()
    synced = SyncedEngine(
        engine,
        version=lambda: next(versions),
        weights=lambda: policy_weights(policy),
        score=score,
        vocab_size=106,
    )
    for _ in range(5):
        synced.sync()
    everything, *turns = scored
    assert len(everything) == 4
    assert sorted(sequence for (sequence,) in turns) == sorted(everything)
