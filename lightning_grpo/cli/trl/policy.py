"""The policy, sampling, and the engine."""

from typing import Any

from lightning_grpo.cli.trl.commented import Commented
from lightning_grpo.cli.trl.conversion import Conversion
from lightning_grpo.cli.trl.options import ROWS

NEUTRAL = {"top_p": (1.0, None), "top_k": (0, None), "min_p": (0.0, None), "repetition_penalty": (1.0, None)}
"""Values with which the engine samples from the policy itself."""


def model(run: Conversion) -> None:
    """The policy and its adapters."""
    kwargs = dict(run["model_init_kwargs"] or {})
    name = run["model_name_or_path"]
    revision = kwargs.pop("revision", None) or run["model_revision"]
    trusted = kwargs.pop("trust_remote_code", run["trust_remote_code"])
    dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or run["torch_dtype"] or run["dtype"]
    attention = kwargs.pop("attn_implementation", None) or run["attn_implementation"]
    for unused in ("device_map", "quantization_config", "use_cache"):
        if kwargs.pop(unused, None) is not None:
            run.remarks.append(f"model_init_kwargs.{unused} has no equivalent")
    note = "" if name else "the model is an argument of GRPOTrainer in TRL; set yours"
    model: Any = name or "Qwen/Qwen2.5-0.5B-Instruct"
    further = {"revision": revision if revision != "main" else None, "trust_remote_code": trusted, "kwargs": kwargs}
    if further := {key: value for key, value in further.items() if value}:
        model = {"name": model, **further}
    run.put("model.model", model, note=note)
    dtype = str(dtype).removeprefix("torch.")
    note = "dtype: auto takes the checkpoint's in TRL; float32 keeps small updates" if dtype == "auto" else ""
    run.put("model.dtype", "float32" if dtype in ("auto", "None") else dtype, note=note)
    if attention:
        run.put("model.attn_implementation", attention)
    run.put("model.gradient_checkpointing", run["gradient_checkpointing"], "gradient_checkpointing")
    if run["cast_lm_head_to_fp32"]:
        run.copy("cast_lm_head_to_fp32")
    if run["use_peft"]:
        run.copy("lora_r", "lora_alpha", "lora_dropout")
        targets = run["lora_target_modules"] or "all-linear"
        targets = targets[0] if isinstance(targets, list) and targets == ["all-linear"] else targets
        names = () if run["lora_target_modules"] else ("lora_target_modules",)
        run.put("model.lora.target_modules", targets, *names)
        run.copy("lora_modules_to_save")
        for name in ("use_rslora", "use_dora"):
            if run[name]:
                run.copy(name)
    if run["load_in_4bit"]:
        other = [] if run["bnb_4bit_quant_type"] == "nf4" else ["bnb_4bit_quant_type"]
        run.put("model.quantization", "nf4", "load_in_4bit", *other)


def sampling(run: Conversion) -> None:
    """Lengths and sampling."""
    length = run["max_prompt_length"]
    note = "" if length else "TRL 1.16 does not limit prompts; longer ones are dropped here"
    run.put("model.max_prompt_length", length or 512, *(["max_prompt_length"] if length else []), note=note or None)
    length = run["max_completion_length"]
    run.put("model.max_completion_length", length or ROWS["max_completion_length"].default, "max_completion_length")
    run.put("model.sampling", {"temperature": run["temperature"]}, note="")
    for name, neutral in NEUTRAL.items():
        if run[name] not in neutral:
            run.remarks.append(f"{name}: {run[name]} was left out; truncated sampling is refused in training")


def rollout(run: Conversion) -> None:
    """The engine."""
    run.config["rollout"] = engine = Commented(class_path="", init_args=Commented())
    options = engine["init_args"]
    sampling = dict(run["generation_kwargs"] or {})
    if not run["use_vllm"]:
        engine["class_path"] = "lightning_grpo.rollout.HFRollout"
        engine.comments["class_path"] = "use_vllm: false in TRL; lightning_grpo.rollout.VLLMRollout is faster on GPUs"
        if sampling:
            run.remarks.append("generation_kwargs: HFRollout does not take further sampling options")
        return
    if run["vllm_structured_outputs_regex"]:
        sampling["structured_outputs"] = {"regex": run["vllm_structured_outputs_regex"]}
    if run["vllm_mode"] == "server":
        engine["class_path"] = "lightning_grpo.rollout.VLLMServerRollout"
        host = "localhost" if run["vllm_server_host"] == "0.0.0.0" else run["vllm_server_host"]
        options["urls"] = [run["vllm_server_base_url"] or f"http://{host}:{run['vllm_server_port']}"]
        options.comments["urls"] = "docs/engines.md gives the flags with which to start the server"
    else:
        engine["class_path"] = "lightning_grpo.rollout.VLLMRollout"
        options["gpu_memory_utilization"] = run["vllm_gpu_memory_utilization"]
        options["tensor_parallel_size"] = run["vllm_tensor_parallel_size"]
        options["sleep_level"] = 1 if run["vllm_enable_sleep_mode"] else 0
        arguments = {"max_model_len": run["vllm_max_model_length"]}
        if run["vllm_model_impl"] != "vllm":
            arguments["model_impl"] = run["vllm_model_impl"]
        if arguments := {key: value for key, value in arguments.items() if value is not None}:
            options["engine_args"] = arguments
    if sampling:
        options["sampling_args"] = sampling
