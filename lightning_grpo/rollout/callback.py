"""Callbacks that build an engine for a module, keep it in step with the policy, and take it down with the run."""

import logging
import time
from pathlib import Path
from typing import Any, Literal

import lightning as L
import psutil
import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lightning_grpo.rollout.hf import HFEngine
from lightning_grpo.rollout.proof import Tolerance
from lightning_grpo.rollout.sync import SyncedEngine
from lightning_grpo.rollout.types import Engine, Sampling
from lightning_grpo.rollout.vllm_engine import VLLMEngine, require_vllm, vllm_version

log = logging.getLogger(__name__)


class RolloutCallback(L.Callback):
    """Gives the module an engine as ``pl_module.engine``; subclasses write `build_engine`.

    The engine is built when a stage starts: the process group exists then and the policy lies where it trains. It is
    closed in `teardown` and on exceptions.

    Args:
        tolerance: the |Δ log-prob| in nats, mean and max, that the proof after a weight sync lets pass. Empty takes
            both from the dtypes and from what the first sync shows.
    """

    def __init__(self, *, tolerance: tuple[float, float] | None = None) -> None:
        self.tolerance = None if tolerance is None else Tolerance(mean=tolerance[0], max=tolerance[1])
        self._engine: SyncedEngine | None = None

    def build_engine(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Engine:
        """Make the engine. All ranks call this together; `pl_module.policy` lies on its device."""
        raise NotImplementedError(f"{type(self).__name__} must define build_engine")

    sleeps = False
    """Whether the engine gives its memory back between rollouts."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop(pl_module)

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._engine is not None:
            return
        start = time.perf_counter()
        engine = self.build_engine(trainer, pl_module)
        config = pl_module.policy.config.get_text_config()
        self._engine = pl_module.engine = SyncedEngine(
            engine,
            version=lambda: pl_module.policy_version,
            weights=pl_module.policy_weights,
            score=pl_module.score_tokens,
            vocab_size=min(config.vocab_size, len(pl_module.tokenizer)),
            dtypes=(getattr(engine, "dtype", torch.float32), _trainer_dtype(trainer, pl_module)),
            canary_length=min(32, _max_model_len(pl_module) - 1),
            tolerance=self.tolerance,
            sleep=self.sleeps,
        )
        # What is compiled or allocated at first use is paid here, not in the first step's timings.
        warm_up = [[pl_module.tokenizer.eos_token_id]]
        engine.generate(warm_up, Sampling(), max_tokens=1, seeds=[[0]])
        rank_zero_info(f"{type(engine).__name__} is ready after {time.perf_counter() - start:.1f} s")

    def _stop(self, pl_module: L.LightningModule) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            pl_module.engine = None
            engine.close()


class HFRollout(RolloutCallback):
    """Samples with the policy's own modules: no second copy of the weights, no other package; slower than vLLM.

    Args:
        max_num_seqs: completions sampled at once; bounds the memory of the key-value cache.
        tolerance: the |Δ log-prob| in nats, mean and max, that the proof after a weight sync lets pass. Empty takes
            both from the dtypes and from what the first sync shows.
    """

    def __init__(self, *, max_num_seqs: int = 128, tolerance: tuple[float, float] | None = None) -> None:
        super().__init__(tolerance=tolerance)
        self.max_num_seqs = max_num_seqs

    def build_engine(self, trainer: L.Trainer, pl_module: L.LightningModule) -> HFEngine:
        return HFEngine(
            pl_module.policy,
            eos_token_ids=eos_token_ids(pl_module.policy, pl_module.tokenizer),
            pad_id=_pad_id(pl_module.tokenizer),
            tokenizer=pl_module.tokenizer,
            max_num_seqs=self.max_num_seqs,
            context=trainer.precision_plugin.forward_context,
        )


class VLLMRollout(RolloutCallback):
    """Samples with a vLLM engine that shares the trainer's process and device.

    Args:
        dtype: what the engine computes in: auto (as the checkpoint says), bfloat16, float16 or float32.
        max_num_seqs: completions sampled at once.
        max_num_batched_tokens: tokens of prompts and completions computed in one step of the engine. Empty lets vLLM
            choose.
        gpu_memory_utilization: share of the GPU's total memory for the engine's weights and key-value cache. The
            trainer's own share must fit beside it.
        kv_cache_memory_bytes: size of the key-value cache in bytes; on a GPU it replaces gpu_memory_utilization. Empty
            on a CPU takes what max_num_seqs completions need, at most half of the free memory.
        kv_cache_dtype: what the cache is kept in: auto (as dtype) or fp8.
        enable_prefix_caching: compute what prompts have in common once.
        block_size: tokens in a block of the key-value cache; shorter prompts can't share. Empty is 32 on a CPU (where
            vLLM's own 128 is longer than most prompts) and vLLM's choice on a GPU.
        enforce_eager: don't compile. Compiling takes about a minute at each start and samples about 1.4 times as fast
            on a CPU. Empty compiles on GPUs only.
        quantization: how vLLM quantizes the weights it is given, such as fp8. Empty doesn't.
        tensor_parallel_size: ranks that share one engine.
        sleep_level: what the engine gives back on a GPU while the policy trains: 0 nothing, 1 the key-value cache
            (weights move to host memory), 2 the weights too.
        log_file: takes what vLLM prints and logs. Empty is vllm-RANK.log in the trainer's root folder.
        engine_args: any other argument of vLLM's EngineArgs, by name, such as speculative_config.
        sampling_args: any other argument of vLLM's SamplingParams, by name, such as structured_outputs.
        tolerance: the |Δ log-prob| in nats, mean and max, that the proof after a weight sync lets pass. Empty takes
            both from the dtypes and from what the first sync shows.
    """

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
        sleep_level: Literal[0, 1, 2] = 1,
        log_file: str | None = None,
        engine_args: dict[str, Any] | None = None,
        sampling_args: dict[str, Any] | None = None,
        tolerance: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(tolerance=tolerance)
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs is {max_num_seqs}; set how many completions are sampled at once, 1 or more")
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization is {gpu_memory_utilization}; set a share in (0, 1]")
        on_gpu = torch.cuda.is_available()
        if tensor_parallel_size != 1:
            raise ValueError(f"tensor_parallel_size is {tensor_parallel_size}; an in-process engine takes 1 as yet")
        self.max_num_seqs = max_num_seqs
        self.kv_cache_memory_bytes = kv_cache_memory_bytes
        self.sleep_level = sleep_level if on_gpu else 0
        self.sleeps = self.sleep_level > 0
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
        }
        self.engine_args = {k: v for k, v in settings.items() if v is not None} | (engine_args or {})

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_vllm()

    def build_engine(self, trainer: L.Trainer, pl_module: L.LightningModule) -> VLLMEngine:
        max_model_len = _max_model_len(pl_module)
        settings = dict(self.engine_args)
        cache = self.kv_cache_memory_bytes
        if cache is None and not torch.cuda.is_available():
            cache = _cpu_cache_bytes(pl_module.policy.config.get_text_config(), self.max_num_seqs, max_model_len)
        if cache is not None:
            settings["kv_cache_memory_bytes"] = cache
        if pl_module.sampling.stop:
            settings["skip_tokenizer_init"] = False
        log_file = self.log_file or Path(trainer.default_root_dir) / f"vllm-{trainer.global_rank}.log"
        return VLLMEngine(
            pl_module.model_path,
            eos_token_ids=eos_token_ids(pl_module.policy, pl_module.tokenizer),
            max_model_len=max_model_len,
            log_file=Path(log_file),
            engine_args=settings,
            sampling_args=self.sampling_args,
            sleep_level=self.sleep_level,
        )


def default_rollout() -> RolloutCallback:
    """VLLMRollout where vLLM is installed, else HFRollout, said in one line of the log."""
    if vllm_version() is not None:
        return VLLMRollout()
    log.warning("vLLM is not installed: sampling with the policy's own modules (HFRollout), which is slower")
    return HFRollout()


def eos_token_ids(policy: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's, and those that the model's generation config adds."""
    ids = {tokenizer.eos_token_id}
    configured = getattr(getattr(policy, "generation_config", None), "eos_token_id", None)
    ids.update(configured if isinstance(configured, list) else [configured])
    ids.discard(None)
    if not ids:
        raise ValueError("neither the tokenizer nor the model's generation config has an end-of-sequence token")
    return sorted(ids)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _trainer_dtype(trainer: L.Trainer, pl_module: L.LightningModule) -> torch.dtype:
    precision = str(trainer.precision)
    if "bf16" in precision:
        return torch.bfloat16
    return torch.float16 if "16" in precision else next(pl_module.policy.parameters()).dtype


def _max_model_len(pl_module: L.LightningModule) -> int:
    """Prompt and completion; one more where the model has room, so that a full sequence can be scored."""
    wanted = pl_module.max_prompt_length + pl_module.max_completion_length
    limit = getattr(pl_module.policy.config.get_text_config(), "max_position_embeddings", None) or wanted + 1
    if wanted > limit:
        raise ValueError(
            f"max_prompt_length {pl_module.max_prompt_length} + max_completion_length "
            f"{pl_module.max_completion_length} = {wanted} tokens, but the model holds {limit}; lower one of them"
        )
    return min(wanted + 1, limit)


def _cpu_cache_bytes(config: PretrainedConfig, max_num_seqs: int, max_model_len: int) -> int:
    """Bytes of key-value cache for `max_num_seqs` sequences at full length, at most half of the free memory."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Four bytes an element bound every dtype; blocks round each sequence up.
    per_sequence = 2 * config.num_hidden_layers * heads * head_size * 4 * (max_model_len + 128)
    room = psutil.virtual_memory().available // 2
    if per_sequence > room:
        raise MemoryError(
            f"one sequence of {max_model_len} tokens needs {per_sequence / 2**30:.2f} GiB of key-value cache, and half "
            f"of the free memory is {room / 2**30:.2f} GiB; lower max_completion_length, or set kv_cache_memory_bytes"
        )
    return min(max_num_seqs * per_sequence, room)
