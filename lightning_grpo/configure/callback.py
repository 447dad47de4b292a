"""The `Prediction` callback: predicts memory and time before a run, and compares them with measurements."""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from lightning_grpo.configure import calibration
from lightning_grpo.configure.activations import Untraceable
from lightning_grpo.configure.cost import MEASURED, Efficiency, predict_cost
from lightning_grpo.configure.hardware import this_machine
from lightning_grpo.configure.measure import reset_peak, resident, sees_peaks
from lightning_grpo.configure.memory import predict_memory
from lightning_grpo.configure.shape import ModelShape
from lightning_grpo.configure.speed import slow_choices, speed_line
from lightning_grpo.configure.summary import describe_run, identity_line, turns_line
from lightning_grpo.configure.workload import Precision, Workload
from lightning_grpo.data import PromptDataModule
from lightning_grpo.data.dataset import lengths
from lightning_grpo.devices import GiB, Hardware
from lightning_grpo.errors import UserError
from lightning_grpo.module import GRPOModule
from lightning_grpo.rewards import RewardModel
from lightning_grpo.rollout import HFRollout, RolloutCallback, VLLMProcessRollout, VLLMRollout
from lightning_grpo.rollout.callback import policy_module

log = logging.getLogger(__name__)

PHASES = {"generate": "rollout"}
"""Names of predicted phases in the metrics, if they differ."""


class Prediction(Callback):
    """Predicts memory and time, rejects runs that cannot fit, and compares the prediction with measurements.

    Args:
        refuse: stop a run that is predicted not to fit; otherwise only warn.
        tolerance: relative difference between predicted and measured memory or time above which to warn.
        after: optimizer steps before the comparison; the first ones include compilation and allocation.
        calibration: file in which measured efficiencies are stored. Empty takes the user's cache folder.
    """

    def __init__(
        self, *, refuse: bool = True, tolerance: float = 0.3, after: int = 3, calibration: str | None = None
    ) -> None:
        if tolerance <= 0:
            raise UserError(f"prediction.tolerance is {tolerance}; set a relative difference above 0, such as 0.3")
        if after < 1:
            raise UserError(f"prediction.after is {after}; set 1 or more optimizer steps")
        self.refuse = refuse
        self.tolerance = tolerance
        self.after = after
        self.file = Path(calibration) if calibration else None
        self.peaks: dict[str, float] = {}
        self.seconds: dict[str, list[float]] = {}
        self.lengths: list[float] = []
        self.report = ""
        self.compares = True
        self.workload: Workload | None = None
        self.max_steps = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the summary.

        Raises:
            UserError: the run cannot fit; the message has the three cheapest changes that fit.
        """
        self.hardware = this_machine() if trainer.strategy.root_device.type == "cuda" else _cpu(trainer)
        self.workload = workload_of(trainer, cast(GRPOModule, pl_module), self.hardware)
        efficiency = calibration.load(self.workload, self.hardware, self.file)
        self.max_steps = trainer.max_steps
        self.efficiency = efficiency or Efficiency.assumed(self.hardware, self.workload.engine)
        try:
            text = describe_run(
                self.workload,
                self.hardware,
                max_steps=trainer.max_steps,
                efficiency=self.efficiency,
                refuse=self.refuse,
            )
        except Untraceable as error:
            self.compares = False
            rank_zero_only(log.warning)("%s. Batch: %s", error, identity_line(self.workload))
        else:
            if (environment := cast(GRPOModule, pl_module).environment) is not None:
                text = f"{text}\n{turns_line(environment)}"
            if self.hardware.is_cpu:
                text = f"{text}\n{speed_line(trainer, pl_module, self.hardware)}"
            rank_zero_only(log.info)("%s", text)
        for warning in slow_choices(trainer, pl_module) if self.hardware.is_cpu else ():
            rank_zero_only(log.warning)("%s", warning)

    def record(self) -> dict[str, Any] | None:
        """Return the predicted figures, which can be written as JSON. None before the start or if there are none.

        ``step_seconds`` are seconds per optimizer step by phase, named as the metrics ``time/…``; ``memory_gib`` are
        peaks of one rank by phase, named as ``memory/…``. ``total_seconds`` is None if the run has no last step.
        """
        if self.workload is None or not self.compares:
            return None
        w = self.workload
        cost, memory = predict_cost(w, self.hardware, self.efficiency), predict_memory(w, self.hardware)
        steps = {PHASES.get(phase, phase): seconds / w.updates_per_rollout for phase, seconds in cost.seconds.items()}
        return {
            "step_seconds": steps,
            "total_seconds": sum(steps.values()) * self.max_steps if self.max_steps > 0 else None,
            "memory_gib": {PHASES.get(phase, phase): memory.total(phase) / GiB for phase in memory.phases},
            "peak_gib": memory.peak / GiB,
            "device": self.hardware.name,
            "device_gib": self.hardware.memory / GiB,
            "max_steps": self.max_steps,
            "updates_per_rollout": w.updates_per_rollout,
            "mean_completion_length": w.mean_length,
            "efficiency": self.efficiency.source,
            "spread": self.efficiency.spread,
        }

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Note whether this batch starts with a rollout."""
        self._rolls_out = cast(GRPOModule, pl_module).progress.experience is None
        self._restart()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
        """Record the peak of the rollout, which ends after the first forward."""
        if self._rolls_out:
            self._note("rollout")
            self._restart()
            self._rolls_out = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Record times; compare once after enough optimizer steps."""
        self._note("update")
        metrics = trainer.callback_metrics
        closed = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if closed and "step_time" in metrics and trainer.global_step > 1:
            for name in ("sync", "rollout", "reward", "score", "update"):
                self.seconds.setdefault(name, []).append(float(metrics.get(f"time/{name}", 0.0)))
            if "completions/mean_length" in metrics:
                self.lengths.append(float(metrics["completions/mean_length"]))
        if self.compares and closed and trainer.global_step == self.after + 1:
            self.compare()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare at the end of a run that was too short before."""
        if self.compares and not self.report and self.seconds:
            self.compare()

    @rank_zero_only
    def compare(self) -> None:
        """Log predicted and measured figures, warn of large differences, and store the factors for later plans."""
        w = self.workload
        if self.lengths:
            fill = sum(self.lengths) / len(self.lengths) / w.completion_length
            w = replace(w, mean_fill=min(1.0, max(fill, 1e-3)))
        predicted = predict_cost(w, self.hardware, self.efficiency).seconds
        updates = w.updates_per_rollout
        measured = {name: updates * _typical(values, updates) for name, values in self.seconds.items()}
        pairs = {
            "generate": (predicted["generate"] + predicted["sync"], measured["sync"] + measured["rollout"]),
            "score and update": (predicted["score"] + predicted["update"], measured["score"] + measured["update"]),
        }
        if w.rollout_ahead:
            # only the wait for the samples is measured
            del pairs["generate"]
        lines = [f"{name} {_pair(*pair, 's per rollout')}" for name, pair in pairs.items()]
        memory = predict_memory(self.workload, self.hardware)
        # the first forward of the update belongs to the rollout's measurement
        peaks = {"rollout": memory.peak, "update": memory.total("update")}
        pairs |= {f"memory of {name}": (peaks[name], self.peaks[name]) for name in self.peaks}
        lines += [
            f"memory of {name} {_pair(peaks[name] / GiB, peak / GiB, 'GiB')}" for name, peak in self.peaks.items()
        ]
        self.report = "predicted → measured: " + "; ".join(lines)
        log.info("%s", self.report)
        # short completions take less memory than predicted, which is no reason to warn
        off = [
            name
            for name, (guess, real) in pairs.items()
            if real > (1 + self.tolerance) * guess or (guess > (1 + self.tolerance) * real and "memory" not in name)
        ]
        if off:
            log.warning("the prediction differs by more than %.0f %% in: %s", 100 * self.tolerance, ", ".join(off))
        # later runs change the factors by half, on a logarithmic scale, in case other processes slowed this run down
        share = 0.5 if self.efficiency.source == MEASURED else 1.0
        factors = {name: _factor(*pair) ** share for name, pair in pairs.items()}
        learned = replace(
            self.efficiency,
            generate_factor=self.efficiency.generate_factor * factors.get("generate", 1.0),
            update_factor=self.efficiency.update_factor * factors["score and update"],
            spread=1.3,
            source=MEASURED,
        )
        calibration.save(self.workload, self.hardware, learned, self.file)

    def _restart(self) -> None:
        if not self.hardware.is_cpu:
            torch.cuda.reset_peak_memory_stats()
        elif sees_peaks():
            reset_peak()

    def _note(self, phase: str) -> None:
        if self.hardware.is_cpu and not sees_peaks():
            return
        peak = resident("VmHWM") if self.hardware.is_cpu else torch.cuda.max_memory_reserved() + self.hardware.context
        self.peaks[phase] = max(self.peaks.get(phase, 0.0), peak)


def workload_of(trainer: Trainer, pl_module: GRPOModule, hardware: Hardware) -> Workload:
    """Return the run that a trainer and a GRPOModule describe, with the longest prompt of the data."""
    data = trainer.datamodule
    optimizer = type(trainer.optimizers[0]).__name__ if trainer.optimizers else "AdamW"
    sharded = type(trainer.strategy).__name__ == "ModelParallelStrategy"
    lora = pl_module.lora
    targets = lora.target_modules if lora else "all-linear"
    w = Workload(
        shape=ModelShape.from_config(pl_module.policy.config, str(pl_module.model_path)),
        prompts_per_rollout=data.prompts_per_rollout,
        num_generations=pl_module.num_generations,
        micro_batch_size=pl_module.micro_batch_size,
        micro_batch_tokens=pl_module.scorer.limit,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        num_iterations=pl_module.num_iterations,
        rollout_ahead=bool(pl_module.rollout_ahead),
        prompt_length=_longest_prompt(data) or pl_module.max_prompt_length,
        completion_length=pl_module.max_completion_length,
        precision=cast(Precision, str(trainer.precision)),
        dtype=pl_module.dtype_name,
        lora_rank=lora.rank if lora else 0,
        lora_targets=targets if isinstance(targets, str) else tuple(targets),
        adapter_params=sum(p.numel() for p in pl_module.policy.parameters() if p.requires_grad) if lora else None,
        quantization=pl_module.quantization,
        gradient_checkpointing=pl_module.gradient_checkpointing,
        share_prompt=pl_module.share_prompt,
        beta=float(pl_module.needs_reference),
        scores_before_advantages=pl_module.advantage.needs_grad_norms
        or (pl_module.objective.kl_in_reward and not pl_module.rollout_ahead),
        optimizer="adamw_8bit" if "8bit" in optimizer else "sgd" if optimizer == "SGD" else "adamw",
        learning_rate=_learning_rate(trainer),
        reward_models=sum(
            reward.bytes_on(trainer.strategy.root_device)
            for reward in (*pl_module.rewards, *pl_module.eval_rewards)
            if isinstance(reward, RewardModel)
        ),
        ranks=pl_module.data_ranks,
        shards=trainer.world_size if sharded else 1,
        ranks_per_node=max(1, trainer.num_devices),
    )
    return _with_engine(w, trainer, hardware)


def _longest_prompt(data: PromptDataModule) -> int:
    """Number of tokens of the longest training prompt; 0 if it is unknown, as they are streamed."""
    return 0 if data.streaming else int(lengths(data.train).max(initial=0))


def _with_engine(w: Workload, trainer: Trainer, hardware: Hardware) -> Workload:
    """Add the options of the run's rollout callback."""
    rollout = next((c for c in trainer.callbacks if isinstance(c, RolloutCallback)), None)
    if not isinstance(rollout, HFRollout | VLLMRollout) or not rollout.shares_memory:
        return replace(w, engine="remote")
    w = replace(w, rollout_class=f"{type(rollout).__module__}.{type(rollout).__name__}")
    if isinstance(rollout, HFRollout):
        return replace(w, engine="hf", engine_sequences=rollout.max_num_seqs)
    shards = rollout.engine_args.get("tensor_parallel_size", 1)
    w = replace(
        w,
        engine="vllm",
        engine_sequences=max(1, rollout.max_num_seqs // shards),
        engine_shards=shards,
        engine_bytes=4 if rollout.engine_args.get("dtype") == "float32" else 2,
        engine_sleep=rollout.sleeps,
        engine_process=isinstance(rollout, VLLMProcessRollout),
    )
    cache = rollout.kv_cache_memory_bytes
    if cache is None and hardware.is_cpu:
        cache = rollout.settings(policy_module(trainer.lightning_module)).get("kv_cache_memory_bytes")
    if cache is None:
        weights = w.engine_bytes * w.shape.params / shards
        cache = max(0.0, rollout.engine_args["gpu_memory_utilization"] * hardware.memory - weights)
    return replace(w, engine_cache=float(cache))


def _learning_rate(trainer: Trainer) -> float:
    """Return the learning rate after the warm-up."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return max((float(group.get("initial_lr", group["lr"])) for group in groups), default=0.0)


def _cpu(trainer: Trainer) -> Hardware:
    """Return this CPU with a share of its memory for each rank on it."""
    cpu = this_machine()
    ranks = max(1, trainer.world_size // trainer.num_nodes)
    return replace(cpu, memory=cpu.memory / ranks)


def _pair(predicted: float, measured: float, unit: str) -> str:
    return f"{predicted:.2f} → {measured:.2f} {unit} (×{measured / predicted:.2f})" if predicted else f"{measured:.2f}"


def _typical(values: Sequence[float], updates: int) -> float:
    """Return the median over rollouts of the mean over their optimizer steps, or the mean without a whole rollout."""
    rollouts = [values[i : i + updates] for i in range(0, len(values) - updates + 1, updates)] or [values]
    return statistics.median(statistics.fmean(steps) for steps in rollouts)


def _factor(predicted: float, measured: float) -> float:
    return measured / predicted if predicted > 0 and measured > 0 else 1.0
