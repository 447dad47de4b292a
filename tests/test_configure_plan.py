"""`plan` and its command: presets, overrides, errors, and the YAML."""

import json
from types import SimpleNamespace

import torch
import yaml
from pytest import approx, mark, raises
from transformers import LlamaConfig

from lightning_grpo.configure import find_gpu, plan, to_yaml
from lightning_grpo.configure.command import main, parse_overrides
from lightning_grpo.configure.memory_savers import USABLE
from lightning_grpo.configure.overrides import OVERRIDABLE
from lightning_grpo.configure.recommendations import TASKS
from lightning_grpo.devices import GPUS, known_gpu

QWEN = {"task": "math_reasoning", "model": "Qwen/Qwen2.5-1.5B-Instruct", "gpu": "h100"}


TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}


def values(made, *names) -> tuple:
    return tuple(made.choices[name].value for name in names)


BASELINE_OPTIONS = ("num_generations", "max_completion_length", "beta", "learning_rate", "accumulate_grad_batches")


def test_baseline_is_exactly_its_figures():
    math = plan(**QWEN, preset="baseline")
    assert values(math, *BASELINE_OPTIONS) == (16, 500, 0.05, 1e-5, 8)
    assert plan(**QWEN, preset="classic") == math, "the former name of the preset"
    follow = plan(**QWEN | {"task": "instruction_following"}, preset="baseline")
    assert values(follow, *BASELINE_OPTIONS) == (8, 200, 0.1, 5e-6, 8)


def test_baseline_under_24_gb_halves_the_group_and_doubles_the_accumulation():
    small = plan(task="math_reasoning", model="SmolLM2-135M-Instruct", gpu="t4", preset="baseline")
    assert values(small, *BASELINE_OPTIONS) == (8, 500, 0.05, 1e-5, 16)
    at_24 = plan(task="math_reasoning", model="SmolLM2-135M-Instruct", gpu=24, preset="baseline")
    assert values(at_24, *BASELINE_OPTIONS) == (16, 500, 0.05, 1e-5, 8)


@mark.parametrize("task", TASKS)
@mark.parametrize("gpu", ["t4", "h100", "cpu"])
def test_every_plan_fits_and_its_numbers_divide(task, gpu):
    made = plan(task=task, model="Qwen/Qwen2.5-0.5B-Instruct", gpu=gpu)
    w = made.workload
    assert made.memory.peak <= USABLE * find_gpu(gpu).memory
    assert w.samples == w.samples_per_update * w.updates_per_rollout
    assert w.prompts_per_rollout * w.num_generations == w.samples


def test_every_choice_has_a_reason_and_comes_with_a_comment_in_the_yaml():
    made = plan(**QWEN)
    text = to_yaml(made)
    assert all(choice.why for choice in made.choices.values())
    for name in ("num_generations", "beta", "micro_batch_size", "dtype"):
        lines = text.splitlines()
        place = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{name}: "))
        assert lines[place - 1].strip().startswith("#")


def test_overrides_are_kept_and_the_rest_is_planned_around_them():
    made = plan(**QWEN, overrides={"num_generations": 6, "beta": 0.1, "micro_batch_size": 3, "learning_rate": 1e-5})
    assert values(made, "num_generations", "beta", "micro_batch_size", "learning_rate") == (6, 0.1, 3, 1e-5)
    assert made.workload.accumulate_grad_batches == 16 * 6 // 3
    assert "reference" in made.memory.phases["update"]
    fixed = plan(**QWEN | {"gpu": "l4", "lora": True}, overrides={"gradient_checkpointing": False})
    assert not fixed.workload.gradient_checkpointing


def test_lora_takes_ten_times_the_rate_and_less_memory():
    full, lora = plan(**QWEN), plan(**QWEN, lora=True)
    assert lora.choices["learning_rate"].value >= 10 * full.choices["learning_rate"].value
    assert lora.memory.phases["update"]["optimizer"] < 0.05 * full.memory.phases["update"]["optimizer"]


def test_a_budget_buys_steps():
    one, two = plan(**QWEN, budget_hours=1), plan(**QWEN, budget_hours=2)
    assert two.max_steps == approx(2 * one.max_steps, abs=1)
    assert one.hours == approx(1, rel=0.02)
    assert plan(**QWEN, num_gpus=4, budget_hours=1).device_hours == approx(4, rel=0.02)
    with raises(ValueError, match="less than one step"):
        plan(**QWEN, budget_hours=1e-4)


def test_prompts_are_measured(tmp_path, tiny_model_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "x" * n, "answer": "1", "pass_rate": p} for n, p in ((10, 0.0), (50, 0.5))]
    file.write_text("\n".join(map(json.dumps, rows)))
    made = plan(task="short_answer", model=tiny_model_path, gpu="cpu", prompts=str(file))
    assert made.choices["max_prompt_length"].value == 64
    assert made.prompt_statistics.counted
    assert made.cost.zero_variance == approx((1 + 2 * 0.5**8) / 2)


def test_prompts_are_read_as_in_training(tmp_path, capsys):
    file = tmp_path / "prompts.csv"
    file.write_text("question,solve_rate\n" + "what is 1 + 1?,0.25\n" * 16)
    arguments = ["--task", "short_answer", "--model", "SmolLM2-135M-Instruct", "--gpu", "l4", "--prompts", str(file)]
    assert main([*arguments, "--columns", "prompt=question"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["columns"] == {"prompt": "question"}
    assert main(arguments) == 2
    assert "no column 'prompt'; set data.columns.prompt to one of question" in capsys.readouterr().err
    assert main([*arguments, "--columns", "question"]) == 2
    assert "write NAME=COLUMN" in capsys.readouterr().err


BAD = [
    ({"task": "poetry"}, "--task poetry: unknown task; set one of math_reasoning, code"),
    ({"gpu": "gtx"}, "--gpu gtx: unknown device.*h100.*l4"),
    ({"gpu": 2}, "set a number from 4 to 1000"),
    ({"model": "no/such/folder"}, "--model no/such/folder: no config found"),
    ({"num_gpus": 0}, "--num_gpus is 0"),
    ({"budget_hours": -1}, "--budget_hours is -1"),
    ({"preset": "best"}, "--preset best: unknown preset"),
    ({"task": "code", "preset": "baseline"}, "--preset baseline has no values for code"),
    ({"prompts": "nowhere.jsonl"}, "--prompts is 'nowhere.jsonl', but there is no such file"),
    ({"overrides": {"generations": 8}}, "--set generations: unknown option; set one of num_generations"),
    (
        {"overrides": {"num_generations": 6, "prompts_per_rollout": 4, "micro_batch_size": 5}},
        "micro_batch_size is 5, but",
    ),
    ({"overrides": {"accumulate_grad_batches": 7}}, "accumulate_grad_batches is 7, but"),
    ({"overrides": {"precision": "bf16-true", "dtype": "float32"}}, "contradict each other"),
    ({"overrides": {"lora_rank": 0}, "lora": True}, "contradict each other"),
    ({"overrides": {"max_completion_length": 10**6}}, "supports 32768; set max_completion_length to"),
    ({"model": "Qwen/Qwen2.5-32B-Instruct", "gpu": "t4"}, "cannot fit T4"),
    ({"reward": "Nope"}, "--reward Nope: unknown reward; set one of CodeTests, "),
    ({"reward": "Reward"}, "--reward Reward: unknown reward"),
    ({"reward": "LengthPenalty"}, "--reward LengthPenalty: it needs "),
    ({"reward": "nowhere.mine"}, "--reward nowhere.mine: can't be imported"),
    ({"reward": "math.pi"}, "--reward math.pi: this is not a function"),
    ({"budget_hours": float("inf")}, "--budget_hours is inf"),
    ({"budget_hours": float("nan")}, "--budget_hours is nan"),
    ({"overrides": {"strategy": "fsdp"}}, "needs several devices"),
    ({"gpu": "h1000"}, "--gpu h1000: unknown"),
]


@mark.parametrize(("changes", "message"), BAD)
def test_bad_input_is_named(changes, message):
    with raises(ValueError, match=message):
        plan(**QWEN | changes)


def test_unreadable_prompts_name_the_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": \n')
    with raises(ValueError, match=r"prompts.jsonl, line 2: not JSON"):
        plan(**QWEN, prompts=str(file))
    file.write_text('{"question": "a"}\n')
    with raises(ValueError, match=r"line 1: the row has no column 'prompt'"):
        plan(**QWEN, prompts=str(file))


# what torch.cuda.get_device_properties calls cards, and what people write
CARDS = {
    "a100-40": ["NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "A100 40 GB", "a100-40"],
    "a100": ["NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "a100"],
    "h100": ["NVIDIA H100 80GB HBM3", "h100", "H100"],
    "h100-pcie": ["NVIDIA H100 PCIe"],
    "h200": ["NVIDIA H200"],
    "b200": ["NVIDIA B200"],
    "l40s": ["NVIDIA L40S"],
    "l40": ["NVIDIA L40"],
    "l20": ["NVIDIA L20"],
    "a10": ["NVIDIA A10"],
    "l4": ["NVIDIA L4"],
    "rtx4090": ["NVIDIA GeForce RTX 4090"],
    "rtx3090": ["NVIDIA GeForce RTX 3090"],
    "t4": ["Tesla T4", "NVIDIA T4"],
}
OTHERS = [
    *("NVIDIA RTX A1000", "NVIDIA GeForce GT 430", "h1000", "NVIDIA A10G", "NVIDIA T400 4GB", "NVIDIA H100 NVL"),
    *("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A800-SXM4-80GB"),
]


@mark.parametrize("key", GPUS)
def test_gpus_are_known_by_every_name_they_have(key):
    assert [known_gpu(name) for name in CARDS[key]] == [GPUS[key]] * len(CARDS[key])


def test_a_name_that_only_contains_a_known_one_is_another_card():
    assert [known_gpu(name) for name in OTHERS] == [None] * len(OTHERS)


def test_gpus_are_found_by_name_and_memory():
    assert find_gpu("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert find_gpu("24GB").memory == 24e9
    assert find_gpu("h200").flops == 989e12


@mark.parametrize(("name", "gb", "major", "rates"), [("NVIDIA L4", 23.6, 8, "l4"), ("NVIDIA RTX 2000", 16.5, 7, "t4")])
def test_the_card_of_this_machine_is_measured_not_guessed(monkeypatch, name, gb, major, rates):
    card = SimpleNamespace(name=name, total_memory=int(gb * 1e9), major=major)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    found = find_gpu(None)
    assert (found.name, found.memory, found.bf16) == (name, card.total_memory, major >= 8)
    assert found.bandwidth == GPUS[rates].bandwidth


def test_the_command_prints_yaml_and_explains(capsys, tmp_path):
    arguments = ["--task", "short_answer", "--model", "SmolLM2-135M-Instruct", "--gpu", "l4"]
    assert main([*arguments, "--set", "learning_rate=1e-5"]) == 0
    out = yaml.safe_load(capsys.readouterr().out)
    assert out["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-5
    assert main([*arguments, "--explain", "--plot", str(tmp_path / "plan")]) == 0
    assert "optimizer steps" in capsys.readouterr().out
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert (tmp_path / "plan.svg").read_text().count("<path") > 20
    assert main(["--task", "poetry", "--model", "x"]) == 2
    assert "set one of math_reasoning" in capsys.readouterr().err


def test_overrides_are_parsed():
    assert parse_overrides(["beta=1e-3", "num_generations=4", "gradient_checkpointing=true", "loss_type=dapo"]) == {
        "beta": 1e-3,
        "num_generations": 4,
        "gradient_checkpointing": True,
        "loss_type": "dapo",
    }
    with raises(ValueError, match="given twice"):
        parse_overrides(["beta=0", "beta=1"])
    with raises(ValueError, match="write OPTION=VALUE"):
        parse_overrides(["beta"])


WRONG = {
    "num_generations": ["1", "0", "many", "2.5", ".inf", "[1,2]", "", "true", "!!python/none x"],
    "prompts_per_rollout": ["0", "-1", "x"],
    "micro_batch_size": ["0", "1.5"],
    "accumulate_grad_batches": ["0"],
    "num_iterations": ["0"],
    "max_prompt_length": ["0"],
    "max_completion_length": ["0", ".nan"],
    "beta": ["", "[1,2]", ".inf", "-.inf", "inf", ".nan", "-0.1", "much", "{a: 1}", "*x", "[1"],
    "learning_rate": ["0", "-1e-6", ".inf", "true"],
    "epsilon": ["-1", ".nan"],
    "epsilon_high": ["-1"],
    "loss_type": ["ppo", "1", ""],
    "scale_rewards": ["sometimes", "true"],
    "temperature": ["0", "-1"],
    "precision": ["bf16", "16", "64-true", "16-true"],
    "dtype": ["int8"],
    "gradient_checkpointing": ["1", "maybe"],
    "optimizer": ["lion", "adamw_8bit"],
    "lora_rank": ["-1", "1.5"],
    "strategy": ["deepspeed", "fsdp"],
    "engine": ["sglang"],
    "engine_sleep": ["2"],
    "engine_cache": ["0", "-1", ".inf"],
    "warmup_steps": ["-1", "0.5"],
    "lr_schedule": ["step"],
    "weight_decay": ["-1"],
    "gradient_clip_val": ["-1", ".inf"],
    "max_steps": ["0", "-5", ".inf"],
    "seed": ["-1", "0.5"],
}


@mark.parametrize("option", OVERRIDABLE)
def test_every_wrong_value_is_one_line_with_the_option_in_it(option, capsys, monkeypatch):
    monkeypatch.setattr("lightning_grpo.configure.overrides.find_spec", lambda name: None)  # of bitsandbytes
    for value in WRONG[option]:
        arguments = ["--task", "short_answer", "--model", "SmolLM2-135M-Instruct", "--gpu", "l4"]
        assert main([*arguments, "--set", f"{option}={value}"]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1 and f"--set {option}=" in printed.err, printed.err


def test_prompts_are_estimated_without_a_tokenizer(tmp_path):
    file, folder = tmp_path / "prompts.jsonl", tmp_path / "model"
    file.write_text((json.dumps({"prompt": 70 * "x", "answer": "1"}) + "\n") * 8)
    LlamaConfig(**TINY).save_pretrained(folder)
    made = plan(task="short_answer", model=str(folder), gpu="l4", prompts=str(file))
    assert not made.prompt_statistics.counted
    assert made.prompt_statistics.longest == 20
    assert made.workload.prompts_per_rollout == 8
    with raises(ValueError, match="has 8 rows, fewer than the 16 ranks"):
        plan(task="short_answer", model=str(folder), gpu="l4", prompts=str(file), num_gpus=16)
    with raises(ValueError, match="prompts_per_rollout is 9, but --prompts has 8 rows"):
        plan(task="short_answer", model=str(folder), gpu="l4", prompts=str(file), overrides={"prompts_per_rollout": 9})


@mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_ranks_take_the_place_of_the_baseline_accumulation(ranks):
    made = plan(**QWEN, preset="baseline", num_gpus=ranks)
    w = made.workload
    assert values(made, "num_generations", "max_completion_length", "beta", "learning_rate") == (16, 500, 0.05, 1e-5)
    assert w.accumulate_grad_batches == -(-8 // ranks)
    assert w.prompts_per_rollout == max(8, w.accumulate_grad_batches * ranks)


def test_baseline_comes_out_as_written_also_if_it_does_not_fit():
    made = plan(task="math_reasoning", model="Qwen/Qwen2.5-1.5B-Instruct", gpu=16, preset="baseline")
    assert values(made, *BASELINE_OPTIONS) == (8, 500, 0.05, 1e-5, 16)
    assert made.memory.peak > USABLE * made.hardware.memory
    text = to_yaml(made)
    assert "cannot fit" in text and "cheapest changes that fit" in text and "--model.lora.rank 16" in text


def test_cpu_ranks_share_the_memory():
    one, four = (plan(task="short_answer", model="SmolLM2-135M-Instruct", gpu="cpu", num_gpus=n) for n in (1, 4))
    assert four.hardware.memory == one.hardware.memory / 4


def test_an_engine_in_float32_is_counted_in_float32():
    half, full = (plan(**QWEN, overrides={"precision": p}) for p in ("bf16-mixed", "32-true"))
    sizes = [made.memory.phases["generate"]["engine weights"] for made in (half, full)]
    assert sizes[1] == 2 * sizes[0]


@mark.parametrize(
    ("changes", "saver"),
    [
        ({"model": "Qwen/Qwen3-4B", "gpu": 24, "lora": True}, "smallest engine cache"),
        ({"model": "Qwen/Qwen2.5-32B-Instruct", "gpu": "h100", "num_gpus": 8, "lora": True}, "split engine"),
        ({"model": "Qwen/Qwen2.5-72B-Instruct", "gpu": "h100", "num_gpus": 64, "lora": True}, "split engine"),
        ({"model": "Qwen/Qwen2.5-7B-Instruct", "gpu": 24, "num_gpus": 8}, "sharding"),
        (
            {"model": "Qwen/Qwen2.5-3B-Instruct", "gpu": 16, "lora": True, "overrides": {"engine": "hf"}},
            "fewer completions at once",
        ),
    ],
)
def test_what_fits_is_not_refused_and_completions_keep_their_length(changes, saver):
    made = plan(task="math_reasoning", **changes)
    assert made.memory.peak <= USABLE * made.hardware.memory
    assert saver in [text.split(" (")[0] for text in made.memory_savers]
    assert made.workload.completion_length == 1024
