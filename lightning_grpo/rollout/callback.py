"""Callbacks that build an engine for a module, keep its weights in sync with the policy, and close it with the run."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lightning_grpo.errors import UserError
from lightning_grpo.policy import LoRA, Policy, Pretrained
from lightning_grpo.policy.checks import context_length, require_context
from lightning_grpo.policy.load import compute_dtype_of
from lightning_grpo.policy.weights import write_counters
from lightning_grpo.rollout.engine import Engine
from lightning_grpo.rollout.hf.engine import HFEngine, eval_mode
from lightning_grpo.rollout.sync import SyncedEngine
from lightning_grpo.rollout.types import SampleRequest, Sampling
from lightning_grpo.rollout.verify import Tolerance


class PolicyModule(Protocol):
    """What rollout callbacks use of `GRPOModule`."""

    policy: Policy
    engine: SyncedEngine | None
    pretrained: Pretrained
    lora: LoRA | None
    from_scratch: bool
    quantization: str | None
    sampling: Sampling
    max_prompt_length: int
    max_completion_length: int

    @property
    def model_path(self) -> str: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def policy_version(self) -> int: ...
    def policy_weights(self) -> Iterator[tuple[str, torch.Tensor]]: ...
    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]: ...


def policy_module(pl_module: L.LightningModule) -> PolicyModule:
    """Return ``pl_module``, whose attributes Lightning's hooks do not declare."""
    return cast(PolicyModule, pl_module)


class RolloutCallback(L.Callback, ABC):
    """Attaches an engine to the module as ``pl_module.engine``; subclasses implement `build_engine`.

    The engine is built when a stage starts, when the process group exists and the policy is on its device. It is closed
    in `teardown` and on exceptions.

    Args:
        tolerance: the largest |Δ log-prob| in nats, mean and max, that is accepted after a weight sync. Empty derives
            both from the dtypes and the first sync.
    """

    engine_class: type[Engine] = Engine  # type: ignore[type-abstract]  # it is not instantiated
    """The class of what `build_engine` returns; it declares whether the engine can sample while the policy trains."""
    sleeps = False
    """Whether the engine releases its memory between rollouts."""
    shares_memory = True
    """Whether the engine uses memory of the trainer's device."""

    def __init__(self, *, tolerance: tuple[float, float] | None = None) -> None:
        self.tolerance = None if tolerance is None else Tolerance(mean=tolerance[0], max=tolerance[1])
        self._engine: SyncedEngine | None = None

    @abstractmethod
    def build_engine(self, trainer: L.Trainer, pl_module: PolicyModule) -> Engine:
        """Build the engine. All ranks call this together; `pl_module.policy` is on its device."""

    def weights(self, pl_module: PolicyModule) -> Iterator[tuple[str, torch.Tensor]]:
        """A fresh stream of the tensors that a sync sends to the engine."""
        return pl_module.policy_weights()

    def rounding(self, pl_module: PolicyModule) -> float:
        """The relative rounding error of the policy's weights, if the engine has unrounded ones; otherwise 0."""
        return 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, policy_module(pl_module))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, policy_module(pl_module))

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, policy_module(pl_module))

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, policy_module(pl_module))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop(policy_module(pl_module))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop(policy_module(pl_module))

    def _start(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:
        if self._engine is not None:
            return
        start = time.perf_counter()
        engine = self.build_engine(trainer, pl_module)
        config = pl_module.policy.config.get_text_config()

        def score(sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
            with eval_mode(pl_module.policy):
                return pl_module.score_tokens(sequences)

        self._engine = pl_module.engine = SyncedEngine(
            engine,
            version=lambda: pl_module.policy_version,
            weights=lambda: self.weights(pl_module),
            score=score,
            counters=lambda: write_counters(pl_module.policy),
            vocab_size=min(config.vocab_size, len(pl_module.tokenizer)),
            dtype=compute_dtype(trainer, pl_module),
            rounding=self.rounding(pl_module),
            check_length=min(16, max_model_len(pl_module) - 1),
            tolerance=self.tolerance,
            sleep=self.sleeps,
        )
        # Compiling and allocating at first use must not count in the first step's timings.
        warm_up = [[eos_token_ids(pl_module.policy, pl_module.tokenizer)[0]]]
        engine.generate(SampleRequest(prompts=warm_up, seeds=[[0]], max_tokens=1))
        rank_zero_info(f"{type(engine).__name__} is ready after {time.perf_counter() - start:.1f} s")

    def _stop(self, pl_module: PolicyModule) -> None:
        engine, self._engine = self._engine, None
        try:
            if engine is not None:
                pl_module.engine = None
                engine.close()
        finally:
            self.close()

    def close(self) -> None:
        """Free what `build_engine` created besides the engine. Safe to call twice."""


class HFRollout(RolloutCallback):
    """Samples with the policy's own modules: slower than vLLM, but without a second copy of the weights.

    Args:
        max_num_seqs: completions sampled at the same time; limits the memory of the key-value cache.
        tolerance: the largest |Δ log-prob| in nats, mean and max, that is accepted after a weight sync. Empty derives
            both from the dtypes and the first sync.
    """

    engine_class = HFEngine

    def __init__(self, *, max_num_seqs: int = 128, tolerance: tuple[float, float] | None = None) -> None:
        super().__init__(tolerance=tolerance)
        self.max_num_seqs = max_num_seqs

    def build_engine(self, trainer: L.Trainer, pl_module: PolicyModule) -> HFEngine:
        return HFEngine(
            pl_module.policy,
            eos_token_ids=eos_token_ids(pl_module.policy, pl_module.tokenizer),
            pad_id=pad_id(pl_module.policy, pl_module.tokenizer),
            tokenizer=pl_module.tokenizer,
            max_num_seqs=self.max_num_seqs,
            context=trainer.precision_plugin.forward_context,
        )


def eos_token_ids(policy: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a completion: those of the tokenizer and of the model's generation config."""
    ids = {tokenizer.eos_token_id}
    configured = getattr(getattr(policy, "generation_config", None), "eos_token_id", None)
    ids.update(configured if isinstance(configured, list) else [configured])
    ids.discard(None)
    if not ids:
        raise UserError("neither the tokenizer nor the model's generation config has an end-of-sequence token")
    return sorted(ids)


def pad_id(policy: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that pads batches: the padding token, or an end-of-sequence token if there is none."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, *eos_token_ids(policy, tokenizer))
    return next(token for token in candidates if token is not None)


def compute_dtype(trainer: L.Trainer, pl_module: PolicyModule | L.LightningModule) -> torch.dtype:
    """What the policy's matrix products are in: as the trainer's precision says, else the parameters' own."""
    return compute_dtype_of(str(trainer.precision), getattr(torch, getattr(pl_module, "dtype_name", "float32")))


def max_model_len(pl_module: PolicyModule) -> int:
    """Prompt and completion together, and one token more if the model supports it: vLLM scores a sequence by sampling
    one token after it."""
    config, lengths = pl_module.policy.config, (pl_module.max_prompt_length, pl_module.max_completion_length)
    require_context(pl_module.model_path, config, *lengths)
    wanted = sum(lengths) + 1
    return min(wanted, context_length(config) or wanted)
