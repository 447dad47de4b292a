"""Norms by part of the model, the noise of the gradient, the size of a step, and the work of an update."""

import copy
from functools import partial

import pytest
import torch
from conftest import tiny_llama
from fitting import checksum, experience, fit, module, parameters
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_grpo.policy.load import LoRA, with_adapters
from lightning_grpo.training import step
from lightning_grpo.training.experience import first_at_random
from lightning_grpo.training.gradient import WeightSample, gradient_norms, noise_scale, part_of
from lightning_grpo.training.work import model_flops, peak_flops, work_of

NAMES = {
    "model.layers.0.post_attention_layernorm.weight": "norm",
    "model.layers.0.self_attn.q_norm.weight": "norm",
    "model.norm.weight": "norm",
    "transformer.h.0.ln_1.bias": "norm",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": "attention",
    "transformer.h.0.attn.c_attn.weight": "attention",
    "gpt_neox.layers.0.attention.dense.weight": "attention",
    "base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight": "mlp",
    "model.layers.0.block_sparse_moe.experts.0.w1.weight": "mlp",
    "model.decoder.layers.0.fc1.weight": "mlp",
    "model.embed_tokens.weight": "embedding",
    "transformer.wte.weight": "embedding",
    "base_model.model.lm_head.lora_A.default.weight": "head",
    "embed_out.weight": "head",
    "model.layers.0.mixer.A_log": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_parts_by_name(name):
    assert part_of(name) == NAMES[name]


def test_parts_and_total_are_norms_of_the_gradients(tokenizer):
    model = tiny_llama(tokenizer)
    ids = torch.arange(40).view(2, 20)
    model(ids, labels=ids).loss.backward()
    total, parts = gradient_norms(model.named_parameters())
    assert total == torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    # the head is tied to the embedding
    assert parts.keys() == {"norm", "embedding", "attention", "mlp"}
    assert parts["embedding"] == pytest.approx(float(model.lm_head.weight.grad.norm()))
    assert sum(float(x) ** 2 for x in parts.values()) == pytest.approx(float(total) ** 2, rel=1e-5)


def test_noise_scale_is_unbiased():
    """Gradients of single completions with a known mean and covariance: 8 of them, and batches of 2."""
    random = torch.Generator().manual_seed(0)
    mean, deviation = torch.linspace(-1, 1, 50).double(), torch.linspace(0.5, 1.5, 50).double()
    each = mean + deviation * torch.randn(20_000, 8, 50, generator=random, dtype=torch.float64)
    small, big = each[:, :2].mean(1).square().sum(1), each.mean(1).square().sum(1)
    signal, noise = noise_scale(small, big, 2, 8)
    assert float(signal.mean()) == pytest.approx(float(mean.square().sum()), rel=0.02)
    assert float(noise.mean()) == pytest.approx(float(deviation.square().sum()), rel=0.02)


def test_a_first_micro_batch_at_random_gives_the_noise_of_all_completions():
    """Micro-batches by length, the longest completions first, whose gradients are the noisiest."""
    random = torch.Generator().manual_seed(0)
    deviation, mean = torch.linspace(3, 1, 32).double(), torch.linspace(-1, 1, 50).double()
    each = mean + deviation[:, None] * torch.randn(5000, 32, 50, generator=random, dtype=torch.float64)
    parts = [list(range(0, 4)), list(range(4, 10)), list(range(10, 20)), list(range(20, 32))]
    expected = 50 * float(deviation.square().mean())

    def estimate(first_of):
        firsts = [first_of(int(seed)) for seed in torch.randint(2**31, (5000,), generator=random)]
        small = torch.stack([x[rows].mean(0).square().sum() for x, rows in zip(each, firsts, strict=True)])
        sizes = torch.tensor([len(rows) for rows in firsts])
        signal, noise = noise_scale(small, each.mean(1).square().sum(1), sizes, 32)
        return float(signal.mean()), float(noise.mean())

    signal, noise = estimate(lambda seed: first_at_random(parts, 4, [seed] * 32)[0])
    assert noise == pytest.approx(expected, rel=0.03)
    assert signal == pytest.approx(float(mean.square().sum()), rel=0.05)
    assert estimate(lambda seed: parts[0])[1] > 1.5 * expected


def test_the_draw_of_the_first_micro_batch_keeps_all_others():
    parts = [[0, 1], [3], [2], [5, 4], [7], [6]]
    for seed in range(4):
        drawn = first_at_random(parts, 3, [seed] * 8)
        assert sorted(drawn[:3]) == [[0, 1], [2], [3]] and sorted(drawn[3:]) == [[5, 4], [6], [7]]
    assert first_at_random(parts, 3, None) == parts


def test_noise_scale_of_a_run_is_that_of_its_first_micro_batch(tmp_path, tiny_model_path):
    """Without noise, that is with the same micro-batch twice, tr Σ is 0 and |G|² the squared gradient norm."""
    policy = module(tiny_model_path, rewards=[checksum], micro_batch_size=16)
    cut = policy.cut
    policy.cut = lambda rollout, **options: [batches := cut(rollout, **options), [batches[0]] * len(batches)][1]
    logged = fit(tmp_path, policy, steps=1, accumulate=2).steps[0]
    assert logged["noise_scale/signal"] == pytest.approx(logged["grad_norm"] ** 2, rel=1e-4)
    assert logged["noise_scale/noise"] == pytest.approx(0, abs=1e-4 * logged["grad_norm"] ** 2)
    one = fit(tmp_path, module(tiny_model_path, micro_batch_size=32), steps=1, accumulate=1).steps[0]
    assert not one.keys() & {"noise_scale/signal", "noise_scale/noise"}


def test_the_update_ratio_is_that_of_all_trained_weights(tmp_path, tiny_model_path, monkeypatch):
    monkeypatch.setattr(step, "WeightSample", partial(WeightSample, size=10**6))
    policy = module(tiny_model_path, rewards=[checksum])
    policy.configure_model()
    before = parameters(policy)
    logged = fit(tmp_path, policy, steps=1)["update_ratio"][0]
    after = parameters(policy)
    change = sum(float((after[name] - before[name]).square().sum()) for name in before)
    assert logged == pytest.approx((change / sum(float(w.square().sum()) for w in before.values())) ** 0.5, rel=1e-4)


def test_a_sample_of_the_weights_estimates_the_ratio():
    layers = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 100), nn.Linear(1, 1))
    layers[0].bias.requires_grad = False
    sample, before = WeightSample(layers.parameters(), size=20_000), copy.deepcopy(layers)
    sample.before = sample.values()
    assert len(sample.before) == pytest.approx(20_000, rel=0.01)
    for p in layers.parameters():
        p.data.add_(1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    trained = [(p, q) for p, q in zip(layers.parameters(), before.parameters(), strict=True) if p.requires_grad]
    change = sum(float((p - q).detach().square().sum()) for p, q in trained)
    expected = (change / sum(float(q.detach().square().sum()) for _, q in trained)) ** 0.5
    assert float(sample.change().compute()) == pytest.approx(expected, rel=0.03)


# ── Work ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_positions_of_an_update():
    """Two prompts of 1 and 2 tokens; the last token of a completion predicts nothing."""
    ready = experience([3, 2, 5, 4], [1.0] * 4, G=2)
    shared = work_of(ready, [[0, 1], [2, 3]], share_prompt=True)
    assert (shared.real, shared.computed, shared.scored) == (1 + 2 + 1 + 2 + 4 + 3, 1 + 2 * 2 + 2 + 2 * 4, 14)
    alone = work_of(ready, [[0, 1, 2, 3]], share_prompt=False)
    assert (alone.real, alone.computed) == (2 * 1 + 2 * 2 + 10, 4 * (2 + 4))


@given(st.permutations(range(8)), st.integers(1, 7))
def test_tokens_do_not_depend_on_the_cut_without_sharing(order, at):
    ready = experience([1, 2, 3, 4, 5, 6, 7, 8], [1.0] * 8, G=2)
    whole, cut = work_of(ready, [order], False), work_of(ready, [order[:at], order[at:]], False)
    assert (whole.real, whole.scored, whole.pairs) == (cut.real, cut.scored, cut.pairs)
    assert cut.real <= cut.computed <= whole.computed


@pytest.mark.parametrize("tied", [True, False])
def test_floating_point_operations_count_each_weight_and_attention(tokenizer, tied):
    model = tiny_llama(tokenizer, tie_word_embeddings=tied)
    work = work_of(experience([9, 8], [1.0] * 2, G=2), [[0, 1]], share_prompt=False)
    V, H, F, kv = len(tokenizer), 64, 128, 32
    layer = 2 * H * H + 2 * H * kv + 3 * H * F
    expected = 6 * (2 * layer * work.real + V * H * work.scored) + 12 * 2 * H * work.pairs
    assert model_flops(model, work) == pytest.approx(expected)
    adapted = with_adapters(model, LoRA(rank=4))
    adapter = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    frozen = expected - 2 * (2 * layer * work.real + V * H * work.scored)
    assert model_flops(adapted, work) == pytest.approx(frozen + 6 * adapter * work.real)


def test_operations_of_a_mixture_of_experts_are_not_counted(tokenizer):
    model = tiny_llama(tokenizer)
    model.config.num_local_experts = 4
    assert model_flops(model, work_of(experience([2, 2], [1.0] * 2, G=2), [[0, 1]], False)) is None


def test_the_peak_of_a_gpu_is_published_or_unknown(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == 989e12
    assert peak_flops(torch.device("cuda"), torch.float32) == 67e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(torch.device("cuda"), torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Unknown 3000")
    assert peak_flops(torch.device("cuda"), torch.bfloat16) is None
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8
