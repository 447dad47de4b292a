"""The sizes of a model that determine its memory and cost, from its config alone, without its weights."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from lightning_grpo.errors import UserError
from lightning_grpo.policy.files import unreadable
from lightning_grpo.policy.pretrained import Pretrained

# hidden, layers, MLP, query heads, key-value heads, head width, vocabulary, tied head
_KNOWN = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", 576, 30, 1536, 9, 3, 64, 49152, True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": ("llama", 960, 32, 2560, 15, 5, 64, 49152, True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("llama", 2048, 24, 8192, 32, 32, 64, 49152, True),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", 896, 24, 4864, 14, 2, 64, 151936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", 1536, 28, 8960, 12, 2, 128, 151936, True),
    "Qwen/Qwen2.5-3B-Instruct": ("qwen2", 2048, 36, 11008, 16, 2, 128, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", 3584, 28, 18944, 28, 4, 128, 152064, False),
    "Qwen/Qwen2.5-14B-Instruct": ("qwen2", 5120, 48, 13824, 40, 8, 128, 152064, False),
    "Qwen/Qwen2.5-32B-Instruct": ("qwen2", 5120, 64, 27648, 40, 8, 128, 152064, False),
    "Qwen/Qwen2.5-72B-Instruct": ("qwen2", 8192, 80, 29568, 64, 8, 128, 152064, False),
    "Qwen/Qwen3-0.6B": ("qwen3", 1024, 28, 3072, 16, 8, 128, 151936, True),
    "Qwen/Qwen3-1.7B": ("qwen3", 2048, 28, 6144, 16, 8, 128, 151936, True),
    "Qwen/Qwen3-4B": ("qwen3", 2560, 36, 9728, 32, 8, 128, 151936, True),
    "Qwen/Qwen3-8B": ("qwen3", 4096, 36, 12288, 32, 8, 128, 151936, False),
    "Qwen/Qwen3-14B": ("qwen3", 5120, 40, 17408, 40, 8, 128, 151936, False),
    "Qwen/Qwen3-32B": ("qwen3", 5120, 64, 25600, 64, 8, 128, 151936, False),
    "Qwen/Qwen3-30B-A3B": ("qwen3_moe", 2048, 48, 6144, 32, 4, 128, 151936, False),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", 2048, 16, 8192, 32, 8, 64, 128256, True),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama", 3072, 28, 8192, 24, 8, 128, 128256, True),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", 4096, 32, 14336, 32, 8, 128, 128256, False),
    "meta-llama/Llama-3.3-70B-Instruct": ("llama", 8192, 80, 28672, 64, 8, 128, 128256, False),
    "mistralai/Mistral-7B-Instruct-v0.3": ("mistral", 4096, 32, 14336, 32, 8, 128, 32768, False),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": ("mixtral", 4096, 32, 14336, 32, 8, 128, 32000, False),
    "microsoft/Phi-4-mini-instruct": ("phi3", 3072, 32, 8192, 24, 8, 128, 200064, True),
    "deepseek-ai/DeepSeek-V2-Lite-Chat": ("deepseek_v2", 2048, 27, 10944, 16, 16, 64, 102400, False),
}

_MORE: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-30B-A3B": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "mistralai/Mixtral-8x7B-Instruct-v0.1": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "microsoft/Phi-4-mini-instruct": {"pad_token_id": None, "eos_token_id": None, "bos_token_id": None},
    "deepseek-ai/DeepSeek-V2-Lite-Chat": {
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
}
"""Further options of these models, such as experts and latent attention."""


def known_config(name: str) -> PreTrainedConfig | None:
    """Return the config of a well-known model (base or instruct), without the network; None for other models."""
    forms = {name, f"{name}-Instruct", name.removesuffix("-Base")}
    found = next((key for key in _KNOWN if key in forms or key.split("/")[1] in forms), None)
    if found is None:
        return None
    kind, hidden, layers, mlp, heads, kv_heads, width, vocab, tied = _KNOWN[found]
    return AutoConfig.for_model(
        kind,
        **_MORE.get(found, {}),
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=32768 if vocab > 100000 else 8192,
    )


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model. Counts are of parameters."""

    name: str
    config: PreTrainedConfig = field(repr=False, hash=False, compare=False)
    """The Hugging Face config."""
    params: int
    """Number of parameters, with tied ones counted once."""
    trunk_linear: int
    """Weights below the head that one token is multiplied with, including only the experts it is routed to."""
    layers: int
    hidden: int
    query_width: int
    """Query heads × head width."""
    kv_width: int
    """Key-value heads × head width."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key-value heads."""
    vocab: int
    tied: bool
    linears: tuple[tuple[str, int, int], ...] = field(repr=False)
    """(leaf name, in, out) of each linear layer below the head."""
    experts: int = 0
    """Weights of all experts of a mixture."""
    experts_share: float = 0.0
    """Share of the experts that a token is routed to."""
    latent_width: int = 0
    """Elements that vLLM caches per token and layer with latent attention (DeepSeek); 0 without it."""

    @property
    def head(self) -> int:
        """Weights of the language-model head."""
        return self.vocab * self.hidden

    @property
    def cache_bytes(self) -> int:
        """Bytes of vLLM's cache per token in 16 bits: 2 (keys, values) · layers · kv_width · 2, or the latent."""
        return 2 * self.layers * (self.latent_width or 2 * self.kv_width)

    @property
    def linear(self) -> int:
        """Weights of the linear layers below the head without experts, which autocast copies."""
        return self.trunk_linear - round(self.experts * self.experts_share)

    @property
    def layer_params(self) -> float:
        """Weights of one layer, including all experts."""
        return (self.linear + self.experts) / self.layers

    def read_linear(self, rows: float) -> float:
        """Return the weights below the head that ``rows`` tokens need together, if each is routed at random."""
        return self.linear + self.experts * (1 - (1 - self.experts_share) ** rows)

    def lora_params(self, rank: int, targets: str | Sequence[str] = "all-linear") -> int:
        """Return the number of adapter weights: Σ rank · (in + out) over the adapted linear layers."""
        chosen = [(i, o) for leaf, i, o in self.linears if targets == "all-linear" or leaf in targets]
        if not chosen:
            leaves = sorted({leaf for leaf, _, _ in self.linears})
            raise UserError(
                f"lora.target_modules is {targets!r}, which names no linear layer; set all-linear, or names in {leaves}"
            )
        return sum(rank * (i + o) for i, o in chosen)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, name: str = "") -> "ModelShape":
        """Count the parameters on the meta device, exactly for every architecture that transformers can build."""
        text = config.get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text)
        head = model.get_output_embeddings()
        linears = tuple(
            (path.rpartition(".")[2], *(module.weight.shape if isinstance(module, Conv1D) else module.weight.T.shape))
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        )
        experts = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 3 and ".experts." in name)
        share = _experts_share(text) if experts else 0.0
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        query_width, kv_width, latent = width * heads, width * kv_heads, 0
        if rank := getattr(text, "kv_lora_rank", None):
            query_width = heads * (text.qk_nope_head_dim + text.qk_rope_head_dim)
            kv_width = (query_width + heads * text.v_head_dim) // 2
            latent = rank + text.qk_rope_head_dim
        return cls(
            name=name or getattr(config, "_name_or_path", "") or config.model_type,
            config=text,
            params=sum(p.numel() for p in model.parameters()),
            trunk_linear=sum(i * o for _, i, o in linears) + round(experts * share),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            query_width=query_width,
            kv_width=kv_width,
            heads=heads,
            kv_heads=kv_heads,
            vocab=text.vocab_size,
            tied=bool(getattr(text, "tie_word_embeddings", False)),
            linears=linears,
            experts=experts,
            experts_share=share,
            latent_width=latent,
        )


def _experts_share(config: PreTrainedConfig) -> float:
    """Return the experts per token divided by the experts per layer."""
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    total = next((count for name in names if (count := getattr(config, name, None))), None)
    return chosen / total if chosen and total else 1.0


@cache
def find_model(model: str, revision: str | None = None) -> ModelShape:
    """Return the shape of a model, given by folder, well-known name, or hub name and revision.

    Raises:
        UserError: there is no such folder, and the hub has no such model or can't be reached.
    """
    if config := None if revision or Path(model).exists() else known_config(model):
        return ModelShape.from_config(config, model)
    try:
        options = Pretrained(name=model, revision=revision).options()
        return ModelShape.from_config(AutoConfig.from_pretrained(model, **options), model)
    except (OSError, ValueError, KeyError) as error:
        reason = error if isinstance(error, UserError) else unreadable("config.json", model, error)
        raise UserError(
            f"--model {model}: no config found ({reason}). Set a folder with a config.json, a name on the hub or, "
            f"without a network, one of {', '.join(_KNOWN)}"
        ) from error


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return a config of the same architecture with this number of layers."""
    changed: dict[str, Any] = config.to_dict() | {"num_hidden_layers": layers}
    rope = changed.get("rope_parameters") or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        # these frequencies depend on the values of the positions, which fake tensors do not have
        kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if rope.get(name) is not None}
        changed |= {"rope_parameters": {"rope_type": "default"} | kept, "rope_scaling": None}
    if kinds := changed.get("layer_types"):
        changed["layer_types"] = [kinds[i % len(kinds)] for i in range(layers)]
    out = type(config)(**changed)
    out._attn_implementation = copy.copy(getattr(config, "_attn_implementation", None)) or "sdpa"
    return out
