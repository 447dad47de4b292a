"""The conversion of TRL's configurations, and the table that it follows."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from trl_table import page

from lightning_grpo.cli import main
from lightning_grpo.cli.convert import convert, render
from lightning_grpo.cli.trl.options import GRPO_CONFIG, ROWS, TRAINING_ARGUMENTS
from lightning_grpo.errors import UserError
from lightning_grpo.objective import AdvantageConfig, ObjectiveConfig, policy_loss

ROOT = Path(__file__).parents[1]
FIGURES = json.loads((ROOT / "tests" / "data" / "trl-1.16.json").read_text())
SCRIPT = """\
model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct
model_revision: v1
dataset_name: trl-lib/DeepMath-103K
learning_rate: 1e-5
gradient_accumulation_steps: 8
num_generations: 16
num_processes: 2
use_vllm: true
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
warmup_steps: 0.05
weight_decay: 0.01
use_peft: true
lora_r: 8
reward_funcs: [accuracy_reward, think_format_reward, get_soft_overlong_punishment, json.dumps]
reward_weights: [1.0, 0.2, 0.5, 0.1]
eval_strategy: steps
eval_steps: 50
eval_on_start: true
report_to: wandb
beta: 0.04
sync_ref_model: true
use_adaptive_entropy: true
chat_template_kwargs: {enable_thinking: false}
cast_lm_head_to_fp32: true
log_completions: true
log_unique_prompts: true
"""


def converted(**given) -> dict:
    return yaml.safe_load(render(convert(given), ["a"]))


def composed(capsys, *arguments) -> dict:
    """What ``fit`` reads from configuration files."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    assert stop.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


# ── The table ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_has_every_option_of_trl():
    from transformers import TrainingArguments

    assert len(GRPO_CONFIG) == 79
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert inherited - ROWS.keys() == set()
    assert {row.name for row in TRAINING_ARGUMENTS} - inherited == {"warmup_ratio"}
    assert len(ROWS) == len({*ROWS})


def test_defaults_of_training_arguments_are_those_installed():
    """Except for those that GRPOConfig redefines."""
    from transformers import TrainingArguments

    redefined = {"learning_rate", "bf16", "gradient_checkpointing", "logging_steps", "warmup_ratio"}
    installed = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for row in TRAINING_ARGUMENTS:
        if row.name not in redefined and installed[row.name] is not dataclasses.MISSING:
            assert row.default == installed[row.name], row.name


def test_every_option_of_ours_in_the_table_exists(capsys, tmp_path):
    overlay = {
        "model": {
            "init_args": {
                "model": {"name": "x"},
                "lora": {},
                "environment": {
                    "class_path": "lightning_grpo.environments.ToolEnvironment",
                    "init_args": {"tools": ["lightning_grpo.environments.calculate"]},
                },
                "optimizer": {"class_path": "torch.optim.AdamW"},
                "objective": {"rollout_correction": {}, "adaptive_entropy": {}},
            }
        },
        "data": {"init_args": {"source": "letters", "validation_source": "letters"}},
        "trainer": {"logger": True},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(overlay))
    known = set()
    for rollout in ("VLLMRollout", "HFRollout", "VLLMServerRollout"):
        urls = ["--rollout.urls", "[http://localhost:8000]"] if rollout == "VLLMServerRollout" else []
        options = ["--config", str(tmp_path / "a.yaml"), "--model.rewards", "[PrefixMatch]", "--rollout", rollout]
        known |= set(names(composed(capsys, *options, *urls)))
    for row in ROWS.values():
        for option in filter(None, row.ours.split(", ")):
            assert option in known, (row.name, option)
    for name in ("verl", "unsloth"):
        rows = re.findall(r"^\| .*? \| (.*?) \|", (ROOT / "docs" / f"coming-from-{name}.md").read_text(), re.M)
        options = {option for cell in rows for option in re.findall(r"`([^`]+)`", cell)}
        assert len(options) > 5 and options - known == set(), name


def names(config: dict, prefix: str = ""):
    for key, value in config.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}".strip(".")
        yield name
        if isinstance(value, dict):
            yield from names(value, name)


def test_the_page_is_current():
    text = (ROOT / "docs" / "coming-from-trl.md").read_text()
    assert text == page(), "run: python docs/trl_table.py > docs/coming-from-trl.md"


# ── configs/trl.yaml ──────────────────────────────────────────────────────────────────────────────────────────────────


def defaults() -> dict:
    return yaml.safe_load((ROOT / "configs" / "trl.yaml").read_text())


def test_the_configuration_of_trls_defaults_is_their_conversion():
    expected = converted(use_vllm=True)

    def assert_holds(ours, theirs, place=""):
        for key, value in ours.items():
            if isinstance(value, dict):
                assert_holds(value, theirs[key], f"{place}.{key}")
            elif f"{place}.{key}" not in (".model.init_args.validation_generations", ".trainer.val_check_interval"):
                assert value == theirs[key], f"{place}.{key}"

    # the optimizer's other options are those of torch
    assert_holds(defaults(), expected)


def objective_of_trl() -> ObjectiveConfig:
    parser = ArgumentParser()
    parser.add_argument("--objective", type=ObjectiveConfig)
    options = {"objective": defaults()["model"]["init_args"]["objective"]}
    return parser.instantiate_classes(parser.parse_object(options)).objective


def test_loss_and_gradient_are_those_of_trls_defaults():
    """The samples come from the policy that TRL calls old, so that the correction's weights are 1."""
    shared = {"loss_type": "dapo", "level": "token", "beta": 0.0, "epsilon": 0.2, "epsilon_high": None, "delta": None}
    cases = [c for c in FIGURES["objective"] if shared.items() <= c["config"].items() and c["rollout_weight"] is None]
    assert cases
    for case in cases:
        old, logprobs = torch.tensor(case["old_logprobs"]), torch.tensor(case["logprobs"], requires_grad=True)
        loss, _ = policy_loss(
            objective_of_trl(), logprobs=logprobs, advantages=torch.tensor(case["advantages"]),
            mask=torch.tensor(case["mask"]), old_logprobs=old, rollout_logprobs=old,
        )  # fmt: skip
        loss.backward()
        torch.testing.assert_close(loss.item(), case["loss"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(logprobs.grad, torch.tensor(case["grad"]), rtol=1e-6, atol=1e-6)


def test_the_correction_of_trls_defaults_masks_whole_completions():
    """exp(Σ log π_old − log π_engine) of a completion, 0 above 3."""
    old, engine = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]]), torch.tensor([[-1.2, -1.3], [-1.6, -1.6]])
    weight = objective_of_trl().rollout_correction.weight(old, engine, torch.ones(2, 2, dtype=torch.bool))
    torch.testing.assert_close(weight, torch.tensor([[math.exp(0.5)], [0.0]]))


def test_advantages_are_those_of_trls_defaults():
    config = AdvantageConfig(**defaults()["model"]["init_args"]["advantage"])
    cases = [
        c
        for c in FIGURES["advantages"]
        if (c["scale_rewards"], c["aggregation"]) == (config.scale_rewards, config.aggregation)
    ]
    assert cases
    for case in cases:
        rewards = torch.tensor([[math.nan if r is None else r for r in row] for row in case["rewards"]])
        advantages = config(rewards, case["num_generations"], weights=case["weights"])
        torch.testing.assert_close(advantages, torch.tensor(case["advantages"]), rtol=1e-6, atol=1e-6)


# ── The command ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_script_converts_to_a_configuration_that_fit_reads(tmp_path, capsys):
    (tmp_path / "trl.yaml").write_text(SCRIPT)
    main(["convert-trl", str(tmp_path / "trl.yaml")])
    text = capsys.readouterr().out
    (tmp_path / "ours.yaml").write_text(text)
    config = composed(capsys, "--config", str(tmp_path / "ours.yaml"))
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert model["model"]["revision"] == "v1" and model["lora"]["rank"] == 8 and model["head_in_float32"]
    assert model["optimizer"]["init_args"]["lr"] == 1e-5 and model["decay_norms_and_biases"] is False
    assert model["lr_schedule"]["init_args"] == {"minimum": 0.1} and model["warmup_steps"] == 0.05
    assert [reward["init_args"]["weight"] for reward in model["rewards"]] == [1.0, 0.2, 0.5, 0.1]
    assert model["objective"]["rollout_correction"]["upper"] == 3 and model["objective"]["beta"] == 0.04
    assert data["prompts_per_rollout"] == 8 and data["chat_template_args"] == {"enable_thinking": False}
    assert data["validation_args"] == {"split": "test"} and trainer["val_check_interval"] == 400
    assert trainer["callbacks"][0]["class_path"].endswith("ReferenceRefresh") and trainer["devices"] == 2
    assert "# log_unique_prompts: true has no equivalent option (as log_completions)" in text
    assert config["record"]["print_every"] == 10
    assert re.search(r"# scale_rewards: none by default here\n +scale_rewards: group", text)


@pytest.mark.parametrize(
    "given",
    [
        *({"loss_type": row} for row in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")),
        {"scale_rewards": "mean", "reward_funcs": ["accuracy_reward", "think_format_reward"]},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"scale_rewards": False, "fp16": True, "optim": "sgd"},
        {"use_vllm": True, "vllm_mode": "server", "generation_kwargs": {"stop": ["x"]}},
        *({"lr_scheduler_type": name} for name in ("polynomial", "warmup_stable_decay", "cosine", "constant")),
        {"datasets": [{"path": "owner/one", "name": "main"}, {"path": "two.jsonl"}]},
        {"dataset_name": "owner/one", "dataset_streaming": True, "use_peft": True, "load_in_4bit": True},
        {"tools": "lightning_grpo.environments.calculate", "max_tool_calling_iterations": 3},
        {"environment_factory": "test_tools.Counter", "tools": ["test_tools.add"]},
        {"eval_strategy": "epoch", "metric_for_best_model": "eval_reward", "save_total_limit": 3},
        {"model_init_kwargs": {"revision": "v1", "dtype": "bfloat16", "rope_theta": 1e6}},
    ],
    ids=lambda given: "-".join(str(value)[:20] for value in given.values()),
)
def test_options_convert_to_a_module_that_takes_them(given, tmp_path):
    """The conversion's parts are built as ``fit`` builds them."""
    (tmp_path / "c.json").write_text(json.dumps(given))
    config = yaml.safe_load(render(convert(json.loads((tmp_path / "c.json").read_text())), []))
    from lightning_grpo import GRPOModule, PromptDataModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(GRPOModule, "model")
    parser.add_subclass_arguments(PromptDataModule, "data")
    built = parser.instantiate_classes(parser.parse_object({key: config[key] for key in ("model", "data")}))
    assert built.model.objective.loss_type == given.get("loss_type", "dapo")


def test_tools_and_environments_are_converted():
    def model(**given):
        conversion = convert(given)
        init = yaml.safe_load(render(conversion, []))["model"]["init_args"]
        return init.get("environment"), init["rewards"], conversion.remarks

    tools, _, _ = model(tools=["a.add"], max_tool_calling_iterations=3)
    assert tools == {
        "class_path": "lightning_grpo.environments.ToolEnvironment",
        "init_args": {"tools": ["a.add"], "max_turns": 4},
    }
    environment, rewards, remarks = model(environment_factory="a.Game")
    assert environment["init_args"] == {"factory": "a.Game"} and environment["class_path"].endswith("TRLEnvironment")
    assert (rewards, remarks) == ([], [])
    environment, _, [remark] = model(environment_factory={"game": "a.Game", "other": "a.Other"})
    assert environment is None and "several environments" in remark
    _, _, [remark] = model(max_tool_calling_iterations=3)
    assert remark == "max_tool_calling_iterations: 3 needs tools or environment_factory"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_generations: 3", "generation_batch_size is 8 .* which num_generations 3 does not divide"),
        ("learning_rate: fast", "learning_rate is 'fast'; set a number"),
        ("use_vllm: 1", "use_vllm is 1; set true or false"),
        ("- a", "is not a mapping of options"),
        ("a: [", "is not valid YAML"),
        ("reward_funcs: [a.b]\nreward_weights: [1, 2]", "reward_weights has 2 values for 1 reward_funcs"),
        ("steps_per_generation: 2\ngeneration_batch_size: 16", "exclude each other"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, capsys, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["convert-trl", str(tmp_path / "a.yaml")])
    assert stop.value.code == 1
    assert re.search(message, capsys.readouterr().err)


def test_unknown_options_are_named_with_a_suggestion(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("num_generation: 4\nmy_own_option: 1")
    main(["convert-trl", str(tmp_path / "a.yaml")])
    out, err = capsys.readouterr()
    assert "num_generation is not an option of TRL 1.16; did you mean num_generations?" in err
    assert "# my_own_option is not an option of TRL 1.16\n" in out


def test_a_missing_file_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["convert-trl", "none.yaml"])
    assert "error: none.yaml can't be read: No such file" in capsys.readouterr().err


def test_a_conversion_needs_devices_to_divide():
    data = convert({"num_generations": 8, "num_processes": 2}).config["data"]["init_args"]
    assert data["prompts_per_rollout"] == 2
    with pytest.raises(UserError, match="Set --devices to the number of GPUs"):
        convert({"num_generations": 16})
