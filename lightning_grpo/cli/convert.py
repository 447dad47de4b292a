"""``lightning-grpo convert-trl``: the configuration of a TRL run as one of ours, with a comment on each difference."""

import argparse
import difflib
import json
import math
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_grpo.cli.trl_options import ROWS
from lightning_grpo.errors import UserError
from lightning_grpo.training.batching import check_batch_arithmetic

NAMES = {
    "adamw_torch": "torch.optim.AdamW",
    "adamw_torch_fused": "torch.optim.AdamW",
    "sgd": "torch.optim.SGD",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "adamw_bnb_8bit": "bitsandbytes.optim.AdamW8bit",
    "paged_adamw_8bit": "bitsandbytes.optim.PagedAdamW8bit",
}
"""Classes of TRL's optimizers."""
LOGGERS = {
    "wandb": "lightning.pytorch.loggers.WandbLogger",
    "tensorboard": "lightning.pytorch.loggers.TensorBoardLogger",
    "mlflow": "lightning.pytorch.loggers.MLFlowLogger",
    "comet_ml": "lightning.pytorch.loggers.CometLogger",
}
BOXED = r"\\boxed\{(.+?)\}"
REWARDS: dict[str, tuple[dict[str, Any], str]] = {
    "accuracy_reward": (
        {"class_path": "lightning_grpo.rewards.ExactMatch", "init_args": {"extract": BOXED, "answer": "solution"}},
        "accuracy_reward compares with math-verify, ExactMatch compares numbers and text",
    ),
    "think_format_reward": ({"class_path": "lightning_grpo.rewards.RegexFormat"}, ""),
    "get_soft_overlong_punishment": (
        {
            "class_path": "lightning_grpo.rewards.LengthPenalty",
            "init_args": {"max_completion_length": 1280, "soft_punish_cache": 256},
        },
        "",
    ),
}
"""Rewards of the script ``trl grpo``, and what differs."""
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
NEUTRAL = {"top_p": (1.0, None), "top_k": (0, None), "min_p": (0.0, None), "repetition_penalty": (1.0, None)}
"""Values with which the engine samples from the policy itself."""


CLASSES = {"model": "lightning_grpo.GRPOModule", "data": "lightning_grpo.PromptDataModule"}
NUMBERS = ("generation_batch_size", "steps_per_generation", "eval_steps", "save_total_limit", "num_generations_eval")
"""Options that are numbers although their default is none."""


class Commented(dict[str, Any]):
    """A mapping of options with a comment above some of them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.comments: dict[str, str] = {}


class Conversion:
    """Converts the options of a TRL run.

    Args:
        given: TRL's options by name. Options that are not given have TRL's defaults.
        devices: GPUs of the run. None: num_processes, or 1.

    Raises:
        UserError: a combination of options that can't be trained.
    """

    def __init__(self, given: Mapping[str, Any], *, devices: int | None = None) -> None:
        self.given = given
        check_types(given)
        self.devices = devices or int(self["num_processes"])
        self.config = Commented()
        self.remarks: list[str] = []
        """What the configuration can't contain."""
        for part in (self.trainer, self.model, self.batches, self.sampling, self.objective, self.optimizer,
                     self.data, self.evaluation, self.rollout, self.checkpoint, self.rest):  # fmt: skip
            part()

    def __getitem__(self, name: str) -> Any:
        """The value of TRL's option: the one that was given, or TRL's default."""
        return self.given.get(name, ROWS[name].default)

    def put(self, option: str, value: Any, *names: str, note: str | None = None) -> None:
        """Set ``option``. It is commented by ``note``, or by the notes of TRL's options ``names``."""
        *parents, last = option.split(".")
        node = self.config
        for part in parents:
            if node is self.config and part in CLASSES:
                node = node.setdefault(part, Commented(class_path=CLASSES[part], init_args=Commented()))["init_args"]
            else:
                node = node.setdefault(part, Commented())
        node[last] = value
        notes = [f"{name}: {ROWS[name].note}" for name in names if ROWS[name].note] if note is None else [note]
        if any(notes):
            node.comments[last] = "; ".join(notes)

    def copy(self, *names: str) -> None:
        """Set our options of TRL's options ``names`` to their values."""
        for name in names:
            if self[name] is not None:
                self.put(ROWS[name].ours, self[name], name)

    # ── Parts of the configuration ────────────────────────────────────────────────────────────────────────────────

    def trainer(self) -> None:
        """Devices, precision, length of the run, and logs."""
        self.put("seed_everything", self["seed"])
        if self["use_cpu"]:
            self.put("trainer.accelerator", "cpu")
        self.put("trainer.devices", self.devices)
        if self.devices > 1:
            self.put("trainer.strategy", "ddp")
        precision = "16-mixed" if self["fp16"] else "bf16-mixed" if self["bf16"] else "32-true"
        self.put("trainer.precision", precision, "bf16")
        steps, epochs = int(self["max_steps"]), float(self["num_train_epochs"])
        self.put("trainer.max_steps", steps if steps > 0 else -1)
        note = f"num_train_epochs: {epochs:g} in TRL; rounded up" if steps <= 0 and epochs != int(epochs) else None
        self.put("trainer.max_epochs", -1 if steps > 0 else math.ceil(epochs), note=note or "")
        self.put("trainer.gradient_clip_val", self["max_grad_norm"] or None, "max_grad_norm")
        self.put("trainer.log_every_n_steps", int(self["logging_steps"]) or 1, "logging_steps")
        self.put("trainer.default_root_dir", self["output_dir"] or "runs/trl", "output_dir")
        if self["log_completions"]:
            self.put("record.print_every", int(self["logging_steps"]) or 1, "log_completions")
        report = self["report_to"] if isinstance(self["report_to"], list) else [self["report_to"]]
        loggers = [self._logger(name) for name in report if name in LOGGERS]
        if loggers:
            self.put("trainer.logger", loggers, "report_to")
        for name in report:
            if name not in (*LOGGERS, "none", "all", None):
                self.remarks.append(f"report_to: there is no logger for {name}; CSV and TensorBoard are the default")
        if self["sync_ref_model"]:
            refresh = {"mixing": self["ref_model_mixup_alpha"], "every_n_steps": self["ref_model_sync_steps"]}
            callback = {"class_path": "lightning_grpo.training.reference.ReferenceRefresh", "init_args": refresh}
            self.put("trainer.callbacks", [callback], "sync_ref_model")

    def _logger(self, name: str) -> dict[str, Any]:
        options = {"name": self["run_name"], "project": self["project"]} if name == "wandb" else {}
        if name == "tensorboard":
            options = {"save_dir": self["output_dir"] or "runs/trl"}
        options = {key: value for key, value in options.items() if value is not None}
        return {"class_path": LOGGERS[name]} | ({"init_args": options} if options else {})

    def model(self) -> None:
        """The policy and its adapters."""
        kwargs = dict(self["model_init_kwargs"] or {})
        name = self["model_name_or_path"]
        revision = kwargs.pop("revision", None) or self["model_revision"]
        trusted = kwargs.pop("trust_remote_code", self["trust_remote_code"])
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or self["torch_dtype"] or self["dtype"]
        attention = kwargs.pop("attn_implementation", None) or self["attn_implementation"]
        for unused in ("device_map", "quantization_config", "use_cache"):
            if kwargs.pop(unused, None) is not None:
                self.remarks.append(f"model_init_kwargs.{unused} has no equivalent")
        note = "" if name else "the model is an argument of GRPOTrainer in TRL; set yours"
        model: Any = name or "Qwen/Qwen2.5-0.5B-Instruct"
        further = {"revision": revision if revision != "main" else None, "trust_remote_code": trusted, "kwargs": kwargs}
        if further := {key: value for key, value in further.items() if value}:
            model = {"name": model, **further}
        self.put("model.model", model, note=note)
        dtype = str(dtype).removeprefix("torch.")
        note = "dtype: auto takes the checkpoint's in TRL; float32 keeps small updates" if dtype == "auto" else ""
        self.put("model.dtype", "float32" if dtype in ("auto", "None") else dtype, note=note)
        if attention:
            self.put("model.attn_implementation", attention)
        self.put("model.gradient_checkpointing", self["gradient_checkpointing"], "gradient_checkpointing")
        if self["cast_lm_head_to_fp32"]:
            self.copy("cast_lm_head_to_fp32")
        if self["use_peft"]:
            self.copy("lora_r", "lora_alpha", "lora_dropout")
            targets = self["lora_target_modules"] or "all-linear"
            targets = targets[0] if isinstance(targets, list) and targets == ["all-linear"] else targets
            names = () if self["lora_target_modules"] else ("lora_target_modules",)
            self.put("model.lora.target_modules", targets, *names)
            self.copy("lora_modules_to_save")
            for name in ("use_rslora", "use_dora"):
                if self[name]:
                    self.copy(name)
        if self["load_in_4bit"]:
            other = [] if self["bnb_4bit_quant_type"] == "nf4" else ["bnb_4bit_quant_type"]
            self.put("model.quantization", "nf4", "load_in_4bit", *other)

    def batches(self) -> None:
        """TRL counts completions of all ranks, here it is prompts."""
        group, micro, accumulate = (
            int(self[name])
            for name in ("num_generations", "per_device_train_batch_size", "gradient_accumulation_steps")
        )
        if self["generation_batch_size"] is not None and self["steps_per_generation"] is not None:
            raise UserError("generation_batch_size and steps_per_generation exclude each other; remove one of them")
        steps = self["steps_per_generation"] or accumulate
        completions = int(self["generation_batch_size"] or micro * self.devices * steps)
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
            num_iterations=int(self["num_iterations"]),
            ranks=self.devices,
        )
        self.put("model.num_generations", group)
        self.put("model.num_iterations", int(self["num_iterations"]))
        self.put("model.micro_batch_size", micro)
        self.put("trainer.accumulate_grad_batches", accumulate)
        self.put(
            "data.prompts_per_rollout",
            completions // group,
            note=f"generation_batch_size: {completions} completions on {self.devices} device"
            f"{'s' * (self.devices > 1)}, divided by num_generations",
        )

    def sampling(self) -> None:
        """Lengths and sampling."""
        length = self["max_prompt_length"]
        note = "" if length else "TRL 1.16 does not limit prompts; longer ones are dropped here"
        self.put(
            "model.max_prompt_length", length or 512, *(["max_prompt_length"] if length else []), note=note or None
        )
        length = self["max_completion_length"]
        self.put(
            "model.max_completion_length", length or ROWS["max_completion_length"].default, "max_completion_length"
        )
        self.put("model.sampling", {"temperature": self["temperature"]}, note="")
        for name, neutral in NEUTRAL.items():
            if self[name] not in neutral:
                self.remarks.append(f"{name}: {self[name]} was left out; truncated sampling is refused in training")

    def objective(self) -> None:
        """Loss, KL, masks, correction and advantages."""
        loss = self["loss_type"]
        self.put("model.objective.loss_type", loss, "loss_type")
        if loss in SURROGATES:
            kind, names = SURROGATES[loss]
            options = {option: self[name] for option, name in names.items()}
            surrogate = {"class_path": f"lightning_grpo.objective.{kind}", "init_args": options}
            self.put("model.objective.surrogate", surrogate, note="")
        elif loss != "cispo":
            self.put("model.objective.epsilon", self["epsilon"])
        if loss not in SURROGATES:
            high = self["epsilon"] if self["epsilon_high"] is None else self["epsilon_high"]
            self.put("model.objective.epsilon_high", high, "epsilon_high")
            self.copy("delta")
        self.put("model.objective.beta", self["beta"], "beta")
        self.copy(
            "importance_sampling_level", "use_bias_correction_kl", "top_entropy_quantile", "entropy_coef",
            "mask_truncated_completions", "off_policy_mask_threshold",
        )  # fmt: skip
        if self["use_adaptive_entropy"]:
            self.copy("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target")
        if self["use_vllm"] and self["vllm_importance_sampling_correction"]:
            level, _, mode = self["vllm_importance_sampling_mode"].partition("_")
            upper = self["vllm_importance_sampling_cap"] or self["vllm_importance_sampling_clip_max"]
            bounds = {"lower": self["vllm_importance_sampling_clip_min"], "upper": upper}
            correction = {"level": level, "mode": mode, **bounds}
            self.put("model.objective.rollout_correction", correction, "vllm_importance_sampling_correction")
        scale = {True: "group", False: "none"}.get(self["scale_rewards"], self["scale_rewards"])
        if scale == "mean":
            self.put("model.advantage", {"estimator": "max_rl"}, note="scale_rewards: mean is the estimator max_rl")
            return
        aggregation = self["multi_objective_aggregation"]
        if aggregation == "normalize_then_sum":
            scale = "none"  # it scales by itself
        self.put("model.advantage.scale_rewards", scale, "scale_rewards")
        self.put("model.advantage.aggregation", aggregation)

    def optimizer(self) -> None:
        """Optimizer, its groups, and schedule."""
        name = self["optim"]
        kind = NAMES.get(name)
        note = "" if kind else f"optim: {name} is not converted; AdamW takes its place"
        options: dict[str, Any] = {"lr": float(self["learning_rate"]), "weight_decay": float(self["weight_decay"])}
        if kind != "torch.optim.SGD":
            options |= {"betas": [self["adam_beta1"], self["adam_beta2"]], "eps": float(self["adam_epsilon"])}
        if name != "adamw_torch" and kind in (None, "torch.optim.AdamW") and not self["fp16"]:
            options["fused"] = True
        self.put("model.optimizer", {"class_path": kind or "torch.optim.AdamW", "init_args": options}, note=note)
        if self["weight_decay"]:
            self.put("model.decay_norms_and_biases", False)
        self.put("model.lr_schedule", self._schedule(), "lr_scheduler_type")
        warmup = self["warmup_steps"] or self["warmup_ratio"] or 0
        self.put("model.warmup_steps", warmup)

    def _schedule(self) -> Any:
        name, options = str(self["lr_scheduler_type"]), dict(self["lr_scheduler_kwargs"] or {})
        rate = float(self["learning_rate"])
        kinds: dict[str, tuple[str, dict[str, Any]]] = {
            "constant": ("constant", {}),
            "constant_with_warmup": ("constant", {}),
            "linear": ("linear", {}),
            "cosine": ("cosine", {}),
            "cosine_with_min_lr": (
                "Cosine",
                {"minimum": options.pop("min_lr_rate", options.pop("min_lr", 0.0) / rate)},
            ),
            "polynomial": (
                "Polynomial",
                {"minimum": options.pop("lr_end", 1e-7) / rate, "power": options.pop("power", 1.0)},
            ),
            "warmup_stable_decay": (
                "WarmupStableDecay",
                {
                    "decay": options.pop("num_decay_steps", 0.1),
                    "minimum": options.pop("min_lr_ratio", 0.0),
                    "shape": options.pop("decay_type", "cosine"),
                },
            ),
        }
        kind, converted = kinds.get(name, ("linear", {}))
        if name not in kinds:
            self.remarks.append(f"lr_scheduler_type: {name} has no equivalent; linear takes its place")
        if options:
            self.remarks.append(f"lr_scheduler_kwargs: {', '.join(options)} can't be converted")
        if not converted:
            return kind
        return {"class_path": f"lightning_grpo.training.schedules.{kind}", "init_args": converted}

    def data(self) -> None:
        """Prompts and rewards."""
        sources = {f"source{i}": self._source(source) for i, source in enumerate(self["datasets"])}
        if sources:
            self.put("data.source", sources, note="datasets: names of the sources appear in metrics")
        else:
            name = self["dataset_name"]
            note = "" if name else "the data set is an argument of GRPOTrainer in TRL; set yours"
            self.put("data.source", name or "prompts.jsonl", note=note)
            if name and not Path(name).exists():
                self.put("data.source_args", self._split(self["dataset_train_split"]))
        self.put("data.shuffle", self["shuffle_dataset"])
        if self["dataset_streaming"] or self["streaming"]:
            self.put("data.streaming", True, "dataset_streaming")
        self.copy("chat_template_kwargs", "data_seed")
        functions = self["reward_funcs"] or []
        functions = [functions] if isinstance(functions, str) else functions
        weights = self["reward_weights"] or [1.0] * len(functions)
        if functions and len(weights) != len(functions):
            raise UserError(f"reward_weights has {len(weights)} values for {len(functions)} reward_funcs")
        rewards: list[dict[str, Any]] = []
        notes: list[str] = []
        for name, weight in zip(functions, weights, strict=False):
            reward, note = REWARDS.get(name, ({"class_path": "lightning_grpo.rewards.FunctionReward"}, ""))
            options = dict(reward.get("init_args", {})) | ({} if name in REWARDS else {"function": name})
            rewards.append({**reward, "init_args": options | {"weight": float(weight)}})
            notes += [note] if note else []
        if not rewards:
            rewards = [{"class_path": "lightning_grpo.rewards.ExactMatch"}]
            notes = [
                "the rewards are arguments of GRPOTrainer in TRL; set yours, a function as "
                "{class_path: FunctionReward, init_args: {function: module.name}}"
            ]
        self.put("model.rewards", rewards, note="; ".join(notes))

    def _split(self, split: str) -> dict[str, Any]:
        return ({"name": self["dataset_config"]} if self["dataset_config"] else {}) | {"split": split}

    @staticmethod
    def _source(source: Mapping[str, Any]) -> dict[str, Any]:
        options = {key: source[key] for key in ("name", "data_dir", "data_files", "split") if source.get(key)}
        return {"source": source["path"], "source_args": {"split": "train"} | options}

    def evaluation(self) -> None:
        """Held-out prompts."""
        strategy = str(self["eval_strategy"])
        if strategy == "no":
            self.put("trainer.limit_val_batches", 0)
            self.put("trainer.num_sanity_val_steps", 0)
            return
        if self["dataset_name"]:
            self.put("data.validation_source", self["dataset_name"])
            self.put("data.validation_args", self._split(self["dataset_test_split"]))
        else:
            note = "the held-out set is an argument of GRPOTrainer in TRL; here it is drawn from data.source"
            self.put("data.validation_size", 64, note=f"{note}, or set data.validation_source")
        self.put("trainer.num_sanity_val_steps", -1 if self["eval_on_start"] else 0, "eval_on_start")
        if strategy == "steps":
            steps = int(self["eval_steps"] or self["logging_steps"])
            note = f"eval_steps: {steps} optimizer steps; {ROWS['eval_steps'].note}"
            self.put("trainer.val_check_interval", steps * int(self["gradient_accumulation_steps"]), note=note)
            self.put("trainer.check_val_every_n_epoch", None)
        group = int(self["num_generations_eval"] or self["num_generations"])
        self.put("model.validation_generations", group, "num_generations_eval")
        prompts = max(1, int(self["per_device_eval_batch_size"]) // group)
        self.put("data.validation_batch_size", prompts, "per_device_eval_batch_size")

    def rollout(self) -> None:
        """The engine."""
        self.config["rollout"] = engine = Commented(class_path="", init_args=Commented())
        options = engine["init_args"]
        sampling = dict(self["generation_kwargs"] or {})
        if not self["use_vllm"]:
            engine["class_path"] = "lightning_grpo.rollout.HFRollout"
            engine.comments["class_path"] = (
                "use_vllm: false in TRL; lightning_grpo.rollout.VLLMRollout is faster on GPUs"
            )
            if sampling:
                self.remarks.append("generation_kwargs: HFRollout does not take further sampling options")
            return
        if self["vllm_structured_outputs_regex"]:
            sampling["structured_outputs"] = {"regex": self["vllm_structured_outputs_regex"]}
        if self["vllm_mode"] == "server":
            engine["class_path"] = "lightning_grpo.rollout.VLLMServerRollout"
            host = "localhost" if self["vllm_server_host"] == "0.0.0.0" else self["vllm_server_host"]
            options["urls"] = [self["vllm_server_base_url"] or f"http://{host}:{self['vllm_server_port']}"]
            options.comments["urls"] = "docs/engines.md gives the flags with which to start the server"
        else:
            engine["class_path"] = "lightning_grpo.rollout.VLLMRollout"
            options["gpu_memory_utilization"] = self["vllm_gpu_memory_utilization"]
            options["tensor_parallel_size"] = self["vllm_tensor_parallel_size"]
            options["sleep_level"] = 1 if self["vllm_enable_sleep_mode"] else 0
            arguments = {"max_model_len": self["vllm_max_model_length"]}
            if self["vllm_model_impl"] != "vllm":
                arguments["model_impl"] = self["vllm_model_impl"]
            if arguments := {key: value for key, value in arguments.items() if value is not None}:
                options["engine_args"] = arguments
        if sampling:
            options["sampling_args"] = sampling

    def checkpoint(self) -> None:
        """Checkpoints."""
        if self["save_strategy"] == "no":
            self.put("trainer.enable_checkpointing", False)
            return
        if self["save_strategy"] != "steps":
            self.remarks.append(f"save_strategy: {self['save_strategy']} has no equivalent; checkpoints come by steps")
        steps = float(self["save_steps"])
        if steps < 1:
            self.remarks.append(f"save_steps: {steps:g} is a share of the run in TRL; set a number of steps")
        self.put("checkpoint.every_n_train_steps", int(steps) if steps >= 1 else 50, "save_steps")
        limit, best = self["save_total_limit"], self["metric_for_best_model"]
        self.put("checkpoint.save_top_k", -1 if limit is None else limit, "save_total_limit")
        if best:
            metric = str(best).removeprefix("eval_")
            self.put("checkpoint.monitor", metric if "/" in metric and metric.startswith("val/") else f"val/{metric}")
            self.put("checkpoint.mode", "min" if self["greater_is_better"] is False else "max")

    def rest(self) -> None:
        """Remarks about options that were given and have no place in the configuration."""
        separate = ("trainer.strategy", "ckpt_path", "export.best", "rollout.max_num_seqs", "trainer.deterministic")
        for name, value in self.given.items():
            row = ROWS.get(name)
            if row is None or value == row.default or (row.ours and row.ours not in separate):
                continue
            what = f"is not converted; set {row.ours}" if row.ours else "has no equivalent option"
            shown = json.dumps(value, default=str)
            self.remarks.append(f"{name}: {shown} {what}{f' ({row.note})' if row.note else ''}")


def unknown(names: Sequence[str]) -> Iterator[str]:
    """One message for each of ``names`` that is no option of TRL."""
    for name in names:
        if name not in ROWS:
            near = difflib.get_close_matches(name, ROWS, 1, 0.7)
            yield f"{name} is not an option of TRL 1.16{f'; did you mean {near[0]}?' if near else ''}"


def read(path: str) -> dict[str, Any]:
    """The options in a YAML or JSON file.

    Raises:
        UserError: the file can't be read, or contains no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} can't be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}"
        ) from error
    try:
        options = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid {'JSON' if path.endswith('.json') else 'YAML'}: {error}") from error
    if not isinstance(options, dict):
        raise UserError(f"{path} is not a mapping of options; write it as learning_rate: 1e-6")
    # YAML 1.1 reads 1e-6 as text
    number = re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+")
    return {
        str(name): float(value) if isinstance(value, str) and number.fullmatch(value) else value
        for name, value in options.items()
    }


def check_types(given: Mapping[str, Any]) -> None:
    """Raise `UserError` if an option has a value of the wrong type."""
    for name, value in given.items():
        default = ROWS[name].default if name in ROWS else None
        if value is None or (default is None and name not in NUMBERS):
            continue
        if isinstance(default, bool) and not isinstance(value, bool):
            raise UserError(f"{name} is {value!r}; set true or false")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        needs_number = name in NUMBERS or (isinstance(default, int | float) and not isinstance(default, bool))
        if needs_number and not is_number:
            raise UserError(f"{name} is {value!r}; set a number")


def render(conversion: Conversion, head: Sequence[str]) -> str:
    """The configuration as YAML, below a comment with the lines of ``head`` and what it can't contain."""
    comments = [line for text in (*head, *conversion.remarks) for line in _comment(text, "")]
    return "\n".join([*comments, *_lines(conversion.config, "")]) + "\n"


def _lines(node: Mapping[str, Any], indent: str) -> Iterator[str]:
    for key, value in node.items():
        if isinstance(node, Commented) and key in node.comments:
            yield from _comment(node.comments[key], indent)
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}:"
            yield from _lines(value, f"{indent}  ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{indent}{key}:"
            for item in value:
                first, *others = _lines(item, f"{indent}    ")
                yield from (f"{indent}  - {first.strip()}", *others)
        else:
            value = {} if value == {} else value
            text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
            yield f"{indent}{key}: {text.strip().removesuffix('...').strip()}"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, 108, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="lightning-grpo convert-trl",
        description="Print the configuration of a TRL run as one of lightning-grpo. A comment stands at each option "
        "that has another meaning or another default, and at the top what has no equivalent.",
        epilog="Example: lightning-grpo convert-trl grpo.yaml > my_run.yaml && lightning-grpo fit --config my_run.yaml",
    )
    out.add_argument(
        "file", metavar="FILE", help="a YAML file for `trl grpo`, or the keyword arguments of a GRPOConfig in JSON"
    )
    out.add_argument("--devices", type=int, metavar="N", help="GPUs of the run (default: num_processes in FILE, or 1)")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parser().parse_args(argv)
    if arguments.devices is not None and arguments.devices < 1:
        raise UserError(f"--devices is {arguments.devices}; set 1 or more")
    given = read(arguments.file)
    problems = list(unknown(list(given)))
    conversion = Conversion(given, devices=arguments.devices)
    print(render(conversion, [f"Converted from {arguments.file} by lightning-grpo convert-trl", *problems]), end="")
    for problem in problems:
        print(f"{arguments.file}: {problem}", file=sys.stderr)
