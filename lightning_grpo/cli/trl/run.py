"""The Trainer, batches and checkpoints."""

import math
from typing import Any

from lightning_grpo.cli.trl.conversion import Conversion
from lightning_grpo.errors import UserError
from lightning_grpo.training.batching import check_batch_arithmetic

LOGGERS = {
    "wandb": "lightning.pytorch.loggers.WandbLogger",
    "tensorboard": "lightning.pytorch.loggers.TensorBoardLogger",
    "mlflow": "lightning.pytorch.loggers.MLFlowLogger",
    "comet_ml": "lightning.pytorch.loggers.CometLogger",
}


def trainer(run: Conversion) -> None:
    """Devices, precision, length of the run, and logs."""
    run.put("seed_everything", run["seed"])
    if run["use_cpu"]:
        run.put("trainer.accelerator", "cpu")
    run.put("trainer.devices", run.devices)
    if run.devices > 1:
        run.put("trainer.strategy", "ddp")
    precision = "16-mixed" if run["fp16"] else "bf16-mixed" if run["bf16"] else "32-true"
    run.put("trainer.precision", precision, "bf16")
    steps, epochs = int(run["max_steps"]), float(run["num_train_epochs"])
    run.put("trainer.max_steps", steps if steps > 0 else -1)
    note = f"num_train_epochs: {epochs:g} in TRL; rounded up" if steps <= 0 and epochs != int(epochs) else None
    run.put("trainer.max_epochs", -1 if steps > 0 else math.ceil(epochs), note=note or "")
    run.put("trainer.gradient_clip_val", run["max_grad_norm"] or None, "max_grad_norm")
    run.put("trainer.log_every_n_steps", int(run["logging_steps"]) or 1, "logging_steps")
    run.put("trainer.default_root_dir", run["output_dir"] or "runs/trl", "output_dir")
    if run["log_completions"]:
        run.put("record.print_every", int(run["logging_steps"]) or 1, "log_completions")
    report = run["report_to"] if isinstance(run["report_to"], list) else [run["report_to"]]
    loggers = [_logger(run, name) for name in report if name in LOGGERS]
    if loggers:
        run.put("trainer.logger", loggers, "report_to")
    for name in report:
        if name not in (*LOGGERS, "none", "all", None):
            run.remarks.append(f"report_to: there is no logger for {name}; CSV and TensorBoard are the default")
    if run["sync_ref_model"]:
        refresh = {"mixing": run["ref_model_mixup_alpha"], "every_n_steps": run["ref_model_sync_steps"]}
        callback = {"class_path": "lightning_grpo.training.reference.ReferenceRefresh", "init_args": refresh}
        run.put("trainer.callbacks", [callback], "sync_ref_model")


def _logger(run: Conversion, name: str) -> dict[str, Any]:
    options = {"name": run["run_name"], "project": run["project"]} if name == "wandb" else {}
    if name == "tensorboard":
        options = {"save_dir": run["output_dir"] or "runs/trl"}
    options = {key: value for key, value in options.items() if value is not None}
    return {"class_path": LOGGERS[name]} | ({"init_args": options} if options else {})


def batches(run: Conversion) -> None:
    """Batch sizes. TRL counts completions of all ranks, here it is prompts."""
    group, micro, accumulate = (
        int(run[name]) for name in ("num_generations", "per_device_train_batch_size", "gradient_accumulation_steps")
    )
    if run["generation_batch_size"] is not None and run["steps_per_generation"] is not None:
        raise UserError("generation_batch_size and steps_per_generation exclude each other; remove one of them")
    steps = run["steps_per_generation"] or accumulate
    completions = int(run["generation_batch_size"] or micro * run.devices * steps)
    if completions % group:
        raise UserError(
            f"generation_batch_size is {completions} (per_device_train_batch_size × devices × "
            f"steps_per_generation), which num_generations {group} does not divide; TRL refuses it too. Set "
            "--devices to the number of GPUs"
        )
    check_batch_arithmetic(
        prompts_per_rollout=completions // group,
        num_generations=group,
        micro_batch_size=micro,
        accumulate_grad_batches=accumulate,
        num_iterations=int(run["num_iterations"]),
        ranks=run.devices,
    )
    run.put("model.num_generations", group)
    run.put("model.num_iterations", int(run["num_iterations"]))
    run.put("model.micro_batch_size", micro)
    run.put("trainer.accumulate_grad_batches", accumulate)
    run.put(
        "data.prompts_per_rollout",
        completions // group,
        note=f"generation_batch_size: {completions} completions on {run.devices} device"
        f"{'s' * (run.devices > 1)}, divided by num_generations",
    )


def checkpoint(run: Conversion) -> None:
    """Checkpoints."""
    if run["save_strategy"] == "no":
        run.put("trainer.enable_checkpointing", False)
        return
    if run["save_strategy"] != "steps":
        run.remarks.append(f"save_strategy: {run['save_strategy']} has no equivalent; checkpoints come by steps")
    steps = float(run["save_steps"])
    if steps < 1:
        run.remarks.append(f"save_steps: {steps:g} is a share of the run in TRL; set a number of steps")
    run.put("checkpoint.every_n_train_steps", int(steps) if steps >= 1 else 50, "save_steps")
    limit, best = run["save_total_limit"], run["metric_for_best_model"]
    run.put("checkpoint.save_top_k", -1 if limit is None else limit, "save_total_limit")
    if best:
        metric = str(best).removeprefix("eval_")
        run.put("checkpoint.monitor", metric if "/" in metric and metric.startswith("val/") else f"val/{metric}")
        run.put("checkpoint.mode", "min" if run["greater_is_better"] is False else "max")
