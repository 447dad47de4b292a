"""The memory model, against published formulas, against autograd itself, and against what PyTorch really allocates."""

import torch
from pytest import approx, mark, raises
from transformers import GPT2Config, LlamaConfig, Qwen3Config, Qwen3MoeConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from lightning_grpo.configure import ModelShape, Workload, find_gpu, find_model, predict_memory
from lightning_grpo.configure.activations import activations
from lightning_grpo.configure.measure import random_batch, random_policy
from lightning_grpo.kernels.blocks import block_width
from lightning_grpo.policy.attention import NAME as ATTENTION
from lightning_grpo.policy.logprobs import completion_logprobs


def small(kind=LlamaConfig, **changes) -> ModelShape:
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    }
    return ModelShape.from_config(kind(**sizes | changes))


def run(shape: ModelShape, **changes) -> Workload:
    numbers = {
        "prompts_per_rollout": 4,
        "num_generations": 4,
        "micro_batch_size": 4,
        "accumulate_grad_batches": 4,
        "prompt_length": 32,
        "completion_length": 32,
        "share_prompt": False,
    }
    return Workload(shape=shape, **numbers | changes)


def test_parameters_are_counted_exactly():
    model = random_policy(run(small()), "cpu")
    assert small().params == sum(p.numel() for p in model.parameters())
    assert small().trunk_linear == 3 * (4 * 128 * 128 + 3 * 128 * 384)
    assert small(tie_word_embeddings=False).params - small().params == 512 * 128
    # the model cards' figures
    assert find_model("Qwen/Qwen2.5-1.5B-Instruct").params == 1_543_714_304
    assert find_model("meta-llama/Llama-3.1-8B-Instruct").params == 8_030_261_248


def test_older_models_with_transposed_layers_are_counted_too():
    shape = ModelShape.from_config(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64))
    assert shape.trunk_linear == 2 * 12 * 64 * 64


def mixture(**changes) -> ModelShape:
    numbers = {
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": True,
    }
    return ModelShape.from_config(Qwen3MoeConfig(**numbers | changes))


def test_of_a_mixture_all_experts_are_stored_and_the_chosen_ones_computed():
    shape = mixture()
    attention = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64)
    assert shape.experts == 2 * 8 * 3 * 64 * 32
    assert shape.trunk_linear == attention + shape.experts // 4
    assert shape.params == sum(p.numel() for p in random_policy(run(shape), "cpu").parameters())
    # one row reads two of eight experts, many rows all of them
    assert shape.read_linear(1) == shape.trunk_linear
    assert shape.read_linear(1000) == approx(attention + shape.experts)


# of the model cards, in billions: all parameters, and those that one token is multiplied with (the embedding is not)
CARDS = {
    "Qwen/Qwen3-30B-A3B": (30.5, 3.0),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": (46.7, 12.9),
    "deepseek-ai/DeepSeek-V2-Lite-Chat": (15.7, 2.4),
    "microsoft/Phi-4-mini-instruct": (3.84, 3.84),
    "Qwen/Qwen2.5-72B-Instruct": (72.7, 71.5),
}


@mark.parametrize("name", CARDS)
def test_popular_shapes_are_planned_without_the_network(name):
    shape = find_model(name)
    total, active = CARDS[name]
    assert shape.params / 1e9 == approx(total, rel=0.01)
    assert (shape.trunk_linear + shape.head) / 1e9 == approx(active, rel=0.08)
    memory = predict_memory(run(shape, lora_rank=8, dtype="bfloat16", share_prompt=True), find_gpu("h200"))
    assert memory.peak > 2 * shape.params


def test_a_model_whose_layers_need_data_is_refused_by_name(monkeypatch):
    def forward(self, hidden_states):
        return hidden_states if hidden_states.sum() > 0 else -hidden_states

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with raises(ValueError, match="llama: memory and time can't be predicted"):
        predict_memory(run(small(vocab_size=520)), find_gpu("cpu"))


def test_cache_per_token_matches_the_published_figures():
    names = {"Llama-3.1-8B-Instruct": 131_072, "Qwen2.5-7B-Instruct": 57_344, "Qwen3-0.6B": 114_688}
    assert {name: find_model(name).cache_bytes for name in names} == names


@mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
def test_adapters_are_counted_exactly(targets):
    w = run(small(), lora_rank=8, lora_targets=targets)
    model = random_policy(w, "cpu")
    assert w.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_unknown_adapter_targets_are_refused_with_the_names_there_are():
    with raises(ValueError, match=r"names no linear layer.*q_proj"):
        small().lora_params(8, ("query",))


@mark.parametrize(("kind", "dtype"), [(LlamaConfig, "float32"), (LlamaConfig, "bfloat16"), (Qwen3Config, "bfloat16")])
def test_kept_activations_are_those_of_the_closed_form(kind, dtype):
    """Bytes a token and layer, from reading the layers: h hidden, f MLP, q and kv attention widths, n query heads.

    The mask costs the layer's type once for every pair of positions besides.
    """
    shape = small(kind)
    length, rows = 64, 4
    h, f, q, kv, n = 128, 384, 128, 128, 4
    forms = {
        (LlamaConfig, "bfloat16"): 16 * h + 8 * f + 4 * q + 4 * kv + 4 * n + 8,
        (LlamaConfig, "float32"): 24 * h + 16 * f + 8 * q + 8 * kv + 4 * n + 8,
        (Qwen3Config, "bfloat16"): 16 * h + 8 * f + 10 * q + 10 * kv + 12 * n,
    }
    w = run(shape, precision="bf16-true" if dtype == "bfloat16" else "32-true")
    mask = rows * length**2 * (2 if dtype == "bfloat16" else 4)
    assert activations(w, packed=False).layer == approx(forms[kind, dtype] * rows * length + mask, rel=0.02)


@mark.parametrize("shape", [small(), mixture()], ids=["dense", "mixture"])
@mark.parametrize(
    "changes",
    [
        {"precision": "32-true"},
        {"precision": "bf16-mixed", "share_prompt": True},
        {"precision": "bf16-mixed", "share_prompt": True, "lora_rank": 4, "dtype": "bfloat16"},
    ],
)
def test_fake_tensors_keep_what_the_trainer_keeps(changes, shape):
    w = run(shape, **changes)
    model, batch = random_policy(w, "cpu"), random_batch(w, "cpu")
    attention = model.config._attn_implementation
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=w.precision == "bf16-mixed"):
        completion_logprobs(model, **batch, share_prompt=w.shares_prompt)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    saved = activations(w, packed=attention == ATTENTION)
    expected = saved.layer * w.shape.layers + saved.ends
    head = 4 * 32 * shape.vocab * w.compute_bytes + 6 * 4 * 32 * shape.hidden * 4
    # a tiny mixture has so few channels that the routing's indices show
    assert (0.94 if shape.experts else 0.97) * expected <= real <= 1.03 * expected + head


@mark.parametrize(
    ("limit", "share_prompt", "like"),
    [
        (3 * 64, False, 3),
        (32 + 4 * 32, True, 4),
        (2 * (32 + 4 * 32) + 9, True, 8),
        (32 + 2 * 32, True, 2),
        (9, True, 1),
    ],
)
def test_a_pass_of_few_tokens_keeps_as_much_as_a_small_micro_batch(limit, share_prompt, like):
    """Groups of 4 completions, prompts and completions of 32 tokens each."""
    sizes = {"num_generations": 4, "prompt_length": 32, "completion_length": 32, "share_prompt": share_prompt}
    sizes |= {"prompts_per_rollout": 16, "precision": "32-true"}
    passes = run(small(), micro_batch_size=16, micro_batch_tokens=limit, **sizes)
    assert passes.rows_per_pass == like
    update = lambda w: predict_memory(w, find_gpu("cpu")).phases["update"]
    assert update(passes) == update(run(small(), micro_batch_size=like, **sizes))
    assert update(passes)["activations"] < update(run(small(), micro_batch_size=16, **sizes))["activations"]


@mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)])
def test_logits_are_counted_in_the_blocks_of_the_kernel(precision, dtype):
    shape = small(vocab_size=49152)
    w = run(shape, precision=precision, beta=0.1, micro_batch_size=4, completion_length=160)
    rows = w.micro_batch_size * w.completion_length
    width = block_width(
        torch.empty(rows, shape.hidden, dtype=dtype), torch.empty(shape.vocab, shape.hidden, dtype=dtype)
    )
    assert width < shape.vocab
    blocks = predict_memory(w, find_gpu("cpu")).phases["score"]["logits blocks"]
    assert blocks == rows * width * dtype.itemsize + 8 * rows * shape.hidden


def test_states_follow_precision_optimizer_shards_and_adapters():
    cpu = find_gpu("cpu")
    N = small().params
    parts = lambda **changes: predict_memory(run(small(), **changes), cpu).phases["update"]
    full = parts()
    assert (full["weights"], full["gradients"], full["optimizer"]) == (4 * N, 4 * N, 8 * N)
    low = parts(precision="bf16-true")
    assert (low["weights"], low["gradients"], low["optimizer"]) == (2 * N, 2 * N, 4 * N)
    sharded = parts(ranks=4, shards=4, engine="remote")
    assert sharded["optimizer"] == 2 * N
    assert parts(optimizer="adamw_8bit")["optimizer"] == approx(2.06 * N)
    adapters = parts(lora_rank=8, dtype="bfloat16", beta=0.1)
    n = small().lora_params(8)
    assert (adapters["weights"], adapters["gradients"], adapters["optimizer"]) == (2 * N, 4 * n, 8 * n)
    assert "reference" not in adapters
    assert parts(beta=0.1)["reference"] == 4 * N
    assert "reference" not in full
    elsewhere = predict_memory(run(small(), beta=0.1), cpu).phases
    assert not any("gradients" in elsewhere[phase] for phase in ("generate", "score"))


def test_the_peak_is_the_larger_of_generating_and_training_when_the_engine_sleeps():
    shape, h100 = find_model("Qwen/Qwen2.5-1.5B-Instruct"), find_gpu("h100")
    w = run(shape, prompt_length=256, completion_length=256, engine="vllm", engine_cache=20e9)
    asleep = predict_memory(w, h100)
    awake = predict_memory(run(shape, **{**_numbers(w), "engine_sleep": False}), h100)
    assert awake.total("update") - asleep.total("update") > 20e9
    assert awake.total("generate") == asleep.total("generate")


def _numbers(w: Workload) -> dict:
    return {name: getattr(w, name) for name in ("prompt_length", "completion_length", "engine", "engine_cache")}


def test_checkpointing_saves_and_its_cost_grows_with_layers_only_by_the_residual_stream():
    deep, cpu = small(num_hidden_layers=12), find_gpu("cpu")
    numbers = {"micro_batch_size": 16, "completion_length": 256}
    plain = predict_memory(run(deep, **numbers), cpu).phases["update"]
    saved = predict_memory(run(deep, gradient_checkpointing=True, **numbers), cpu).phases["update"]
    assert saved["activations (checkpoints)"] < 0.2 * plain["activations"]


@mark.gpu
@mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_a_gpu_is_within_ten_percent():
    from lightning_grpo.configure.measure import measure_update

    shape = find_model("Qwen/Qwen2.5-0.5B-Instruct")
    w = run(shape, micro_batch_size=8, prompt_length=256, completion_length=512, share_prompt=True)
    gpu = find_gpu("auto")
    parts = predict_memory(w, gpu).phases["update"]
    assert sum(parts.values()) - parts["context"] == approx(measure_update(w, "cuda").peak_bytes, rel=0.1)
