"""The callback for vLLM in the trainer's process."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import psutil
import torch
from torch import Tensor
from transformers import PretrainedConfig

from lightning_grpo.errors import OutOfMemoryError, UserError
from lightning_grpo.policy import InMemory
from lightning_grpo.policy.quantized import ROUNDING
from lightning_grpo.policy.weights import adapter_weights, require_untied_adapters
from lightning_grpo.rollout.callback import (
    PolicyModule,
    RolloutCallback,
    compute_dtype,
    eos_token_ids,
    max_model_len,
    policy_module,
)
from lightning_grpo.rollout.engine import Engine
from lightning_grpo.rollout.vllm.adapter import adapter_settings
from lightning_grpo.rollout.vllm.engine import VLLMEngine, require_vllm
from lightning_grpo.rollout.vllm.shared import SharedVLLMEngine, no_turns

log = logging.getLogger(__name__)


CHANGES_DISTRIBUTION = {
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("min_tokens", "logit_bias", "bad_words", "allowed_token_ids", "structured_outputs"),
}
"""Arguments of vLLM's SamplingParams that make the sampled distribution differ from softmax(logits / temperature)."""

MERGED_OPTIONS = {"bias", "fan_in_fan_out", "layers_pattern"}
"""Those fields of ``lora.options`` whose effect is in the weights that a sync sends."""


class VLLMRollout(RolloutCallback):
    """Samples with a vLLM engine that shares the trainer's process and device.

    Args:
        dtype: the dtype that the engine computes in: bfloat16, float16, float32, or auto. On a CPU auto is the dtype
            that the trainer computes in, on a GPU the checkpoint's, but bfloat16 for a float32 checkpoint.
        max_num_seqs: completions sampled at the same time.
        max_num_batched_tokens: tokens of prompts and completions computed in one step of the engine. Empty lets vLLM
            choose.
        gpu_memory_utilization: share of the GPU's total memory for the engine's weights and key-value cache. The
            trainer's own memory must fit beside it.
        kv_cache_memory_bytes: size of the key-value cache in bytes; on a GPU it replaces gpu_memory_utilization. Empty
            on a CPU reserves memory for max_num_seqs completions, at most half of the free memory.
        kv_cache_dtype: dtype of the cache: auto (as dtype) or fp8.
        enable_prefix_caching: compute common beginnings of prompts once.
        block_size: tokens in a block of the key-value cache; shorter prompts share no block. Empty is 32 on a CPU
            (vLLM's own 128 is longer than most prompts) and vLLM's choice on a GPU.
        enforce_eager: don't compile. Compiling on a CPU takes about a minute at each start, and makes sampling faster
            afterwards. Empty compiles on GPUs only.
        quantization: vLLM's method to quantize the weights, such as fp8. Empty does not quantize.
        tensor_parallel_size: neighbouring ranks of the trainer that share one engine and sample the prompts of all of
            them together; with 1 each rank has a whole engine. For a server process: the number of its GPUs.
        sleep_level: what the engine releases on a GPU while the policy trains: 0 nothing, 1 all memory (weights are
            kept in host memory), 2 all memory, without a copy of the weights, because the next sync sends them anyway.
            Empty is 2, or 1 if the engine needs tensors that no sync sends: the base model under ``lora: adapter``, a
            draft model, scales of a quantization.
        lora: what a sync sends if adapters are trained: merged (whole weights with the adapter merged into them,
            sampled at full speed) or adapter (only the adapter, which the engine adds to the checkpoint's weights: very
            little to send, but the adapter is computed separately in each layer, on a CPU at a fraction of the speed).
        log_file: file for the output and log of vLLM. Empty is vllm-RANK.log in the trainer's root folder.
        engine_args: any other argument of vLLM's EngineArgs, by name, such as speculative_config.
        sampling_args: any other argument of vLLM's SamplingParams, by name, such as structured_outputs.
        tolerance: the largest |Δ log-prob| in nats, mean and max, that is accepted after a weight sync. Empty derives
            both from the dtypes and the first sync.
    """

    engine_class: type[Engine] = VLLMEngine

    def __init__(
        self,
        *,
        dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
        max_num_seqs: int = 128,
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float = 0.3,
        kv_cache_memory_bytes: int | None = None,
        kv_cache_dtype: str = "auto",
        enable_prefix_caching: bool = True,
        block_size: int | None = None,
        enforce_eager: bool | None = None,
        quantization: str | None = None,
        tensor_parallel_size: int = 1,
        sleep_level: Literal[0, 1, 2] | None = None,
        lora: Literal["merged", "adapter"] = "merged",
        log_file: str | None = None,
        engine_args: dict[str, Any] | None = None,
        sampling_args: dict[str, Any] | None = None,
        tolerance: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(tolerance=tolerance)
        if max_num_seqs < 1:
            raise UserError(
                f"max_num_seqs is {max_num_seqs}; set the number of completions sampled at the same time, 1 or more"
            )
        if not 0 < gpu_memory_utilization <= 1:
            raise UserError(f"gpu_memory_utilization is {gpu_memory_utilization}; set a share in (0, 1]")
        on_gpu = torch.cuda.is_available()
        self.max_num_seqs = max_num_seqs
        self.kv_cache_memory_bytes = kv_cache_memory_bytes
        self.lora = lora
        if lora == "adapter" and sleep_level == 2:
            raise UserError(
                "sleep_level is 2, which discards the base model, and lora: adapter never sends it; set 1 or 0"
            )
        if tensor_parallel_size < 1:
            raise UserError(
                f"tensor_parallel_size is {tensor_parallel_size}; set 1, or the number of ranks that share an engine"
            )
        self.log_file = log_file
        self.sampling_args = sampling_args
        settings = {
            "dtype": dtype,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "gpu_memory_utilization": gpu_memory_utilization,
            "kv_cache_dtype": kv_cache_dtype,
            "enable_prefix_caching": enable_prefix_caching,
            "block_size": block_size if block_size is not None or on_gpu else 32,
            "enforce_eager": not on_gpu if enforce_eager is None else enforce_eager,
            "quantization": quantization,
            "tensor_parallel_size": tensor_parallel_size,
        }
        self.engine_args = {k: v for k, v in settings.items() if v is not None} | (engine_args or {})
        if sleep_level is None:
            sleep_level = 1 if lora == "adapter" or _holds_more_than_weights(self.engine_args) else 2
        self.sleep_level = sleep_level if on_gpu else 0
        self.sleeps = self.sleep_level > 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_vllm()
        if self.engine_args["dtype"] == "auto" and not torch.cuda.is_available():
            self.engine_args["dtype"] = str(compute_dtype(trainer, pl_module)).removeprefix("torch.")
        module = policy_module(pl_module)
        self._check_length(module)
        require_sendable(module, self.lora)
        require_speculation(module, self.engine_args, self.sampling_args or {})
        if stage == "fit":
            refuse_bias(module, self.sampling_args or {})

    def _check_length(self, pl_module: PolicyModule) -> None:
        """Reject an engine that is too short for prompt and completion: vLLM would truncate completions silently."""
        given = self.engine_args.get("max_model_len")
        if not isinstance(given, int) or given < 0:
            return
        needed = pl_module.max_prompt_length + pl_module.max_completion_length
        if given < needed:
            raise UserError(
                f"rollout engine_args.max_model_len is {given}, but max_prompt_length {pl_module.max_prompt_length} + "
                f"max_completion_length {pl_module.max_completion_length} = {needed} tokens: completions would be "
                f"truncated; omit it, or set {needed} or more"
            )

    def build_engine(self, trainer: L.Trainer, pl_module: PolicyModule) -> Engine:
        require_untied_adapters(pl_module.policy)
        settings = self.settings(pl_module)
        ranks = settings["tensor_parallel_size"]
        if ranks > 1 and self.lora == "adapter":
            raise UserError(
                f"tensor_parallel_size is {ranks} and lora is adapter: an adapter that ranks share cannot be verified; "
                "set lora: merged"
            )
        if ranks > 1 and getattr(pl_module, "environment", None) is not None:
            raise no_turns(ranks)
        if stop_strings(pl_module) or self.sampling_args:
            settings.setdefault("skip_tokenizer_init", False)
        engine = (VLLMEngine if ranks == 1 else SharedVLLMEngine)(
            pl_module.model_path,
            eos_token_ids=eos_token_ids(pl_module.policy, pl_module.tokenizer),
            log_file=self.log_path(trainer),
            engine_args=settings,
            sampling_args=self.sampling_args,
            sleep_level=self.sleep_level,
        )
        try:
            engine.check_tokenizer(pl_module.tokenizer)
        except ValueError:
            engine.close()
            raise
        return engine

    def settings(self, pl_module: PolicyModule) -> dict[str, Any]:
        """The engine's arguments by name, for this module's model and lengths."""
        settings = {"max_model_len": max_model_len(pl_module)} | loading_args(pl_module) | self.engine_args
        if self.kv_cache_memory_bytes is not None:
            settings["kv_cache_memory_bytes"] = self.kv_cache_memory_bytes
        elif not torch.cuda.is_available():
            config = pl_module.policy.config.get_text_config()
            settings["kv_cache_memory_bytes"] = _cpu_cache_bytes(config, self.max_num_seqs, settings["max_model_len"])
        if self.lora == "adapter":
            settings |= adapter_engine_args(pl_module)
        if getattr(pl_module, "from_scratch", False) or isinstance(pl_module.pretrained, InMemory):
            settings.setdefault("load_format", "dummy")
        return settings

    def weights(self, pl_module: PolicyModule) -> Iterator[tuple[str, Tensor]]:
        return weights_for(pl_module, self.lora)

    def rounding(self, pl_module: PolicyModule) -> float:
        return rounding_for(pl_module, self.lora)

    def log_path(self, trainer: L.Trainer) -> Path:
        return Path(self.log_file or Path(trainer.default_root_dir) / f"vllm-{trainer.global_rank}.log")


def _holds_more_than_weights(engine_args: dict[str, Any]) -> bool:
    """Whether the engine uses tensors that no sync sends and that a sleep at level 2 would discard."""
    return (
        engine_args.get("quantization") is not None
        or engine_args.get("speculative_config") is not None
        or engine_args.get("kv_cache_dtype", "auto") != "auto"
    )


def refuse_bias(pl_module: PolicyModule, sampling_args: dict[str, Any]) -> None:
    """Refuse to train on samples of another distribution than the policy's without a correction.

    Raises:
        UserError: names the options that change the distribution.
    """
    if (biased := sorted(CHANGES_DISTRIBUTION & sampling_args.keys())) and not _is_corrected(pl_module):
        raise UserError(
            f"rollout sampling_args has {', '.join(biased)}: the engine would sample from another distribution than "
            "the policy's, which biases the gradient; omit them, or set objective.rollout_correction"
        )


def require_speculation(pl_module: PolicyModule, engine_args: dict[str, Any], sampling_args: dict[str, Any]) -> None:
    """Raise `UserError` if the engine speculates and vLLM cannot do so on this device or with the sampling options."""
    if engine_args.get("speculative_config") is None:
        return
    if not torch.cuda.is_available():
        raise UserError(
            "rollout engine_args has speculative_config: on a CPU vLLM then samples from another distribution, ignores "
            "the seeds of completions and returns wrong log-probs; remove it"
        )
    held_out = getattr(pl_module, "validation_sampling", pl_module.sampling)
    options = {
        "model.sampling.min_p": pl_module.sampling.min_p,
        "model.validation_sampling.min_p": held_out.min_p,
        "rollout sampling_args.min_p": sampling_args.get("min_p"),
        "rollout sampling_args.logit_bias": sampling_args.get("logit_bias"),
    }
    if named := next((f"{name} is {value}" for name, value in options.items() if value), None):
        raise UserError(
            f"rollout engine_args has speculative_config, and {named}, which vLLM does not support together; omit one"
        )


def _is_corrected(pl_module: PolicyModule) -> bool:
    return getattr(getattr(pl_module, "objective", None), "rollout_correction", None) is not None


def stop_strings(pl_module: PolicyModule) -> list[str]:
    """The stop strings of training and of validation."""
    held_out = getattr(pl_module, "validation_sampling", pl_module.sampling)
    return [*pl_module.sampling.stop, *held_out.stop]


def weights_for(pl_module: PolicyModule, lora: str) -> Iterator[tuple[str, Tensor]]:
    """A fresh stream of the policy's merged weights, or of its adapter only."""
    return adapter_weights(pl_module.policy) if lora == "adapter" else pl_module.policy_weights()


def rounding_for(pl_module: PolicyModule, lora: str) -> float:
    """The relative rounding error of 4-bit weights, if the engine has the checkpoint's own instead."""
    return ROUNDING if lora == "adapter" and pl_module.quantization is not None else 0.0


def require_sendable(pl_module: PolicyModule, mode: str) -> None:
    """Raise `UserError` unless a sync in this mode, merged or adapter, carries all that the module's LoRA trains."""
    lora = getattr(pl_module, "lora", None)
    if lora is None:
        return
    if unmerged := sorted(lora.options.keys() - MERGED_OPTIONS):
        raise UserError(
            f"lora.options has {', '.join(unmerged)}, and no weights that an engine has could express this; remove it, "
            "or set the rollout to HFRollout"
        )
    if mode == "merged":
        return
    if pl_module.quantization is not None and not _is_corrected(pl_module):
        raise UserError(
            "rollout lora is adapter, so the engine samples with the checkpoint's own weights, and quantization is "
            f"{pl_module.quantization}, with which the policy has rounded ones; set rollout lora: merged, which sends "
            "the rounded weights, or objective.rollout_correction"
        )
    others = {name: getattr(lora, name) for name in ("use_dora", "modules_to_save", "rank_pattern")}
    others |= {f"options.{name}": value for name, value in lora.options.items() if value not in (False, "none")}
    if named := next((f"lora.{name} is {value}" for name, value in others.items() if value), None):
        raise UserError(
            f"rollout lora is adapter, which sends low-rank adapters of one rank alone, and {named}; set rollout lora: "
            "merged"
        )


def loading_args(pl_module: PolicyModule) -> dict[str, Any]:
    """The engine's arguments that load the same revision of the checkpoint, with the same code and configuration."""
    pretrained = pl_module.pretrained
    settings: dict[str, Any] = {}
    if pretrained.revision is not None:
        settings |= dict.fromkeys(("revision", "tokenizer_revision", "code_revision"), pretrained.revision)
    if pretrained.trust_remote_code:
        settings["trust_remote_code"] = True
    if changed := pretrained.configured(pl_module.policy.config):
        settings["hf_overrides"] = changed
    return settings


def adapter_engine_args(pl_module: PolicyModule) -> dict[str, Any]:
    """The engine's arguments for the module's adapter.

    Raises:
        UserError: the module has no adapter, or its base model is in no checkpoint.
    """
    if pl_module.lora is None:
        raise UserError(
            "rollout lora is adapter, but the module trains whole weights; set model.lora, or rollout lora: merged"
        )
    if pl_module.from_scratch:
        raise UserError(
            "rollout lora is adapter, but with from_scratch the policy's weights are random and the engine cannot load "
            "them from a checkpoint; set rollout lora: merged"
        )
    if isinstance(pl_module.pretrained, InMemory):
        raise UserError(
            "rollout lora is adapter, but model is an object in memory, which the engine cannot load; set rollout "
            "lora: merged, or model to a folder"
        )
    policy = cast(Any, pl_module.policy)  # a PeftModel, since there are adapters
    return adapter_settings(pl_module.lora.rank, policy.base_model.targeted_module_names)


def _cpu_cache_bytes(config: PretrainedConfig, max_num_seqs: int, max_model_len: int) -> int:
    """Bytes of key-value cache for `max_num_seqs` sequences at full length, at most half of the free memory."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # No dtype has more than four bytes per element; 128 tokens cover rounding up to whole blocks.
    per_sequence = 2 * config.num_hidden_layers * heads * head_size * 4 * (max_model_len + 128)
    room = psutil.virtual_memory().available // 2
    if per_sequence > room:
        raise OutOfMemoryError(
            f"one sequence of {max_model_len} tokens needs {per_sequence / 2**30:.2f} GiB of key-value cache, and half "
            f"of the free memory is {room / 2**30:.2f} GiB; lower max_completion_length, or set kv_cache_memory_bytes"
        )
    return min(max_num_seqs * per_sequence, room)
