"""`plan` and its command: presets, pins, what they refuse, and that the YAML is one the real command line accepts."""

import json

import yaml
from pytest import approx, mark, raises

from lightning_grpo.configure import find_gpu, plan, to_yaml
from lightning_grpo.configure.command import main, parse_pins
from lightning_grpo.configure.devices import GPUS
from lightning_grpo.configure.evidence import TASKS
from lightning_grpo.configure.levers import HEADROOM

QWEN = {"task": "math_reasoning", "model": "Qwen/Qwen2.5-1.5B-Instruct", "gpu": "h100"}


def values(made, *names) -> tuple:
    return tuple(made.choices[name].value for name in names)


FOUNDING = ("num_generations", "max_completion_length", "beta", "learning_rate", "accumulate_grad_batches")


def test_classic_is_exactly_the_founding_presets():
    math = plan(**QWEN, preset="classic")
    assert values(math, *FOUNDING) == (16, 500, 0.05, 1e-5, 8)
    follow = plan(**QWEN | {"task": "instruction_following"}, preset="classic")
    assert values(follow, *FOUNDING) == (8, 200, 0.1, 5e-6, 8)


def test_classic_under_24_gb_halves_the_group_and_doubles_the_accumulation():
    small = plan(task="math_reasoning", model="SmolLM2-135M-Instruct", gpu="t4", preset="classic")
    assert values(small, *FOUNDING) == (8, 500, 0.05, 1e-5, 16)
    at_24 = plan(task="math_reasoning", model="SmolLM2-135M-Instruct", gpu=24, preset="classic")
    assert values(at_24, *FOUNDING) == (16, 500, 0.05, 1e-5, 8)


@mark.parametrize("task", TASKS)
@mark.parametrize("gpu", ["t4", "h100", "cpu"])
def test_every_plan_fits_and_its_numbers_divide(task, gpu):
    made = plan(task=task, model="Qwen/Qwen2.5-0.5B-Instruct", gpu=gpu)
    w = made.workload
    assert made.memory.peak <= HEADROOM * find_gpu(gpu).memory
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


def test_pins_are_kept_and_the_rest_is_planned_around_them():
    made = plan(**QWEN, pins={"num_generations": 6, "beta": 0.1, "micro_batch_size": 3, "learning_rate": 1e-5})
    assert values(made, "num_generations", "beta", "micro_batch_size", "learning_rate") == (6, 0.1, 3, 1e-5)
    assert made.workload.accumulate_grad_batches == 16 * 6 // 3
    assert "reference" in made.memory.phases["update"]
    pinned = plan(**QWEN | {"gpu": "l4", "lora": True}, pins={"gradient_checkpointing": False})
    assert not pinned.workload.gradient_checkpointing


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


BAD = [
    ({"task": "poetry"}, "--task poetry: unknown; set one of math_reasoning, code"),
    ({"gpu": "gtx"}, "--gpu gtx: unknown.*h100.*l4"),
    ({"gpu": 2}, "set between 4 and 1000"),
    ({"model": "no/such/folder"}, "--model no/such/folder: no config found"),
    ({"num_gpus": 0}, "--num_gpus is 0"),
    ({"budget_hours": -1}, "--budget_hours is -1"),
    ({"preset": "best"}, "--preset best: unknown"),
    ({"task": "code", "preset": "classic"}, "--preset classic has no code"),
    ({"prompts": "nowhere.jsonl"}, "--prompts nowhere.jsonl: no such file"),
    ({"pins": {"generations": 8}}, "--set generations: unknown; set one of num_generations"),
    ({"pins": {"num_generations": "many"}}, "--set num_generations=many: set a whole number"),
    ({"pins": {"beta": -0.1}}, "set 0 or more"),
    ({"pins": {"num_generations": 6, "prompts_per_rollout": 4, "micro_batch_size": 5}}, "micro_batch_size is 5, but"),
    ({"pins": {"accumulate_grad_batches": 7}}, "accumulate_grad_batches is 7, but"),
    ({"pins": {"precision": "bf16-true", "dtype": "float32"}}, "contradict each other"),
    ({"pins": {"lora_rank": 0}, "lora": True}, "contradict each other"),
    ({"pins": {"max_completion_length": 10**6}}, "holds 32768; lower one"),
    ({"model": "Qwen/Qwen2.5-32B-Instruct", "gpu": "t4"}, "cannot fit T4"),
]


@mark.parametrize(("changes", "message"), BAD)
def test_bad_input_is_named(changes, message):
    with raises(ValueError, match=message):
        plan(**QWEN | changes)


def test_unreadable_prompts_name_the_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": \n')
    with raises(ValueError, match=r"prompts.jsonl, line 2: no JSON object"):
        plan(**QWEN, prompts=str(file))
    file.write_text('{"question": "a"}\n')
    with raises(ValueError, match=r"row 1: has no column 'prompt'"):
        plan(**QWEN, prompts=str(file))


def test_gpus_are_found_by_name_and_memory():
    assert find_gpu("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert find_gpu("NVIDIA GeForce RTX 4090") is GPUS["rtx4090"]
    assert find_gpu("24GB").memory == 24e9
    assert find_gpu("h200").flops == 989e12


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


def test_pins_are_parsed():
    assert parse_pins(["beta=1e-3", "num_generations=4", "gradient_checkpointing=true", "loss_type=dapo"]) == {
        "beta": 1e-3,
        "num_generations": 4,
        "gradient_checkpointing": True,
        "loss_type": "dapo",
    }
    with raises(ValueError, match="given twice"):
        parse_pins(["beta=0", "beta=1"])
    with raises(ValueError, match="write OPTION=VALUE"):
        parse_pins(["beta"])


@mark.parametrize(
    ("changes", "pins"),
    [({"task": task, "gpu": "cpu"}, {}) for task in TASKS]
    + [
        ({"gpu": "a100", "num_gpus": 2}, {"strategy": "fsdp"}),
        ({"gpu": "h100", "lora": True}, {"engine": "hf"}),
        ({"gpu": "t4", "preset": "classic", "task": "instruction_following"}, {}),
    ],
)
def test_the_real_command_line_accepts_the_plan(changes, pins, tmp_path, tiny_model_path, capsys):
    from lightning_grpo import cli

    made = plan(**{"task": "math_reasoning", "model": "SmolLM2-135M-Instruct"} | changes, pins=pins)
    file = tmp_path / "plan.yaml"
    file.write_text(to_yaml(made))
    with raises(SystemExit) as stop:
        cli.main(["fit", "--config", str(file), "--print_config"])
    assert stop.value.code in (0, None)
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert parsed["model"]["init_args"]["num_generations"] == made.workload.num_generations
    assert parsed["trainer"]["max_steps"] == made.max_steps
