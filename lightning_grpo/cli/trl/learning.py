"""Objective, optimizer and schedule of the learning rate."""

from typing import Any

from lightning_grpo.cli.trl.conversion import Conversion

NAMES = {
    "adamw_torch": "torch.optim.AdamW",
    "adamw_torch_fused": "torch.optim.AdamW",
    "sgd": "torch.optim.SGD",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "adamw_bnb_8bit": "bitsandbytes.optim.AdamW8bit",
    "paged_adamw_8bit": "bitsandbytes.optim.PagedAdamW8bit",
}
"""Classes of TRL's optimizers."""
SURROGATES = {
    "sapo": ("SAPO", {"temperature_negative": "sapo_temperature_neg", "temperature_positive": "sapo_temperature_pos"}),
    "vespo": (
        "VESPO",
        {
            "k_positive": "vespo_k_pos",
            "lambda_positive": "vespo_lambda_pos",
            "k_negative": "vespo_k_neg",
            "lambda_negative": "vespo_lambda_neg",
        },
    ),
}
"""Surrogates with options of their own in TRL."""


def objective(run: Conversion) -> None:
    """Loss, KL, masks, correction and advantages."""
    loss = run["loss_type"]
    run.put("model.objective.loss_type", loss, "loss_type")
    if loss in SURROGATES:
        kind, names = SURROGATES[loss]
        options = {option: run[name] for option, name in names.items()}
        surrogate = {"class_path": f"lightning_grpo.objective.{kind}", "init_args": options}
        run.put("model.objective.surrogate", surrogate, note="")
    elif loss != "cispo":
        run.put("model.objective.epsilon", run["epsilon"])
    if loss not in SURROGATES:
        high = run["epsilon"] if run["epsilon_high"] is None else run["epsilon_high"]
        run.put("model.objective.epsilon_high", high, "epsilon_high")
        run.copy("delta")
    run.put("model.objective.beta", run["beta"], "beta")
    run.copy(
        "importance_sampling_level", "use_bias_correction_kl", "top_entropy_quantile", "entropy_coef",
        "mask_truncated_completions", "off_policy_mask_threshold",
    )  # fmt: skip
    if run["use_adaptive_entropy"]:
        run.copy("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target")
    if run["use_vllm"] and run["vllm_importance_sampling_correction"]:
        level, _, mode = run["vllm_importance_sampling_mode"].partition("_")
        upper = run["vllm_importance_sampling_cap"] or run["vllm_importance_sampling_clip_max"]
        bounds = {"lower": run["vllm_importance_sampling_clip_min"], "upper": upper}
        correction = {"level": level, "mode": mode, **bounds}
        run.put("model.objective.rollout_correction", correction, "vllm_importance_sampling_correction")
    scale = {True: "group", False: "none"}.get(run["scale_rewards"], run["scale_rewards"])
    if scale == "mean":
        run.put("model.advantage", {"estimator": "max_rl"}, note="scale_rewards: mean is the estimator max_rl")
        return
    aggregation = run["multi_objective_aggregation"]
    if aggregation == "normalize_then_sum":
        scale = "none"  # it scales by itself
    run.put("model.advantage.scale_rewards", scale, "scale_rewards")
    run.put("model.advantage.aggregation", aggregation)


def optimizer(run: Conversion) -> None:
    """Optimizer, its groups, and schedule."""
    name = run["optim"]
    kind = NAMES.get(name)
    note = "" if kind else f"optim: {name} is not converted; AdamW takes its place"
    options: dict[str, Any] = {"lr": float(run["learning_rate"]), "weight_decay": float(run["weight_decay"])}
    if kind != "torch.optim.SGD":
        options |= {"betas": [run["adam_beta1"], run["adam_beta2"]], "eps": float(run["adam_epsilon"])}
    if name != "adamw_torch" and kind in (None, "torch.optim.AdamW") and not run["fp16"]:
        options["fused"] = True
    run.put("model.optimizer", {"class_path": kind or "torch.optim.AdamW", "init_args": options}, note=note)
    if run["weight_decay"]:
        run.put("model.decay_norms_and_biases", False)
    run.put("model.lr_schedule", _schedule(run), "lr_scheduler_type")
    warmup = run["warmup_steps"] or run["warmup_ratio"] or 0
    run.put("model.warmup_steps", warmup)


def _schedule(run: Conversion) -> str | dict[str, Any]:
    name, options = str(run["lr_scheduler_type"]), dict(run["lr_scheduler_kwargs"] or {})
    rate, take = float(run["learning_rate"]), options.pop
    schedule: str | dict[str, Any] = name
    match name:
        case "linear" | "cosine" | "constant":
            pass
        case "constant_with_warmup":
            schedule = "constant"
        case "cosine_with_min_lr":
            schedule = _class("Cosine", minimum=take("min_lr_rate", take("min_lr", 0.0) / rate))
        case "polynomial":
            schedule = _class("Polynomial", minimum=take("lr_end", 1e-7) / rate, power=take("power", 1.0))
        case "warmup_stable_decay":
            schedule = _class(
                "WarmupStableDecay",
                decay=take("num_decay_steps", 0.1),
                minimum=take("min_lr_ratio", 0.0),
                shape=take("decay_type", "cosine"),
            )
        case _:
            schedule = "linear"
            run.remarks.append(f"lr_scheduler_type: {name} has no equivalent; linear takes its place")
    if options:
        run.remarks.append(f"lr_scheduler_kwargs: {', '.join(options)} can't be converted")
    return schedule


def _class(schedule: str, **options: Any) -> dict[str, Any]:
    return {"class_path": f"lightning_grpo.training.schedules.{schedule}", "init_args": options}
