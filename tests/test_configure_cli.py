"""What `configure` prints and what refusals advise is accepted by the real command line and by the checks of setup."""

import re
from dataclasses import replace
from itertools import islice

import yaml
from lightning.pytorch.strategies import ModelParallelStrategy
from pytest import fixture, mark, raises

from lightning_grpo import cli
from lightning_grpo.cli import commands
from lightning_grpo.cli.parser_errors import OneLineParser
from lightning_grpo.configure import Workload, describe_run, find_gpu, find_model, plan, to_yaml
from lightning_grpo.configure.command import parser as configure_parser
from lightning_grpo.configure.memory_savers import MEMORY_SAVERS, flags
from lightning_grpo.configure.overrides import OVERRIDABLE
from lightning_grpo.configure.recommendations import TASKS
from lightning_grpo.data.sources import read
from lightning_grpo.training.batching import check_batch_arithmetic


class Parser(commands.GRPOCommand):
    """The command line up to its parser, which is made once for all cases here."""

    def parse_arguments(self, parser, args):
        self.config = {}

    def _nothing(self):
        pass

    _set_seed = _add_instantiators = before_instantiate_classes = instantiate_classes = _nothing


@fixture(scope="module")
def parse():
    commands.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        commands.GRPOModule,
        commands.PromptDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        run=False,
        parser_class=OneLineParser,
        parser_kwargs={"exit_on_error": False},
    ).parser
    return lambda text, *arguments: parser.parse_args(["--config", text, *arguments])


def check(config, ranks: int) -> None:
    """What setup refuses: batches that don't divide, strategies under which weights don't reach the engine."""
    model, data, trainer = config.model.init_args, config.data.init_args, config.trainer
    check_batch_arithmetic(
        prompts_per_rollout=data.prompts_per_rollout,
        num_generations=model.num_generations,
        micro_batch_size=model.micro_batch_size,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        num_iterations=model.num_iterations,
        ranks=ranks,
    )
    assert trainer.devices * trainer.num_nodes == ranks
    if ranks == 1:
        assert trainer.strategy == "auto"
    elif trainer.strategy != "ddp":
        assert trainer.strategy.class_path.endswith(f".{ModelParallelStrategy.__name__}")
        sizes = trainer.strategy.init_args
        assert (sizes.data_parallel_size, sizes.tensor_parallel_size) == (ranks, 1)
    assert ranks % config.rollout.init_args.get("tensor_parallel_size", 1) == 0
    low = {str(config.rollout.init_args.get("dtype")), model.dtype}
    assert trainer.precision != "16-mixed" or "bfloat16" not in low
    assert trainer.precision != "16-mixed" or not model.optimizer.init_args.get("fused")


SMALL, MIXTURE = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-30B-A3B"
GRID = {
    "math_reasoning": [
        *[(SMALL, gpu, ranks, {}) for gpu in ("t4", "l4", "h100") for ranks in (1, 2)],
        *[(SMALL, "t4", 1, {"lora": True}), (SMALL, "h100", 64, {}), (SMALL, "h100", 12, {"lora": True})],
        *[(SMALL, "h100", ranks, {"preset": "baseline"}) for ranks in (1, 2, 3, 8, 64)],
        *[
            (SMALL, "l4", 2, {"overrides": overrides})
            for overrides in ({"strategy": "fsdp"}, {"engine": "hf"}, {"optimizer": "sgd"})
        ],
        *[(SMALL, "l4", 1, {"overrides": {"precision": p}}) for p in ("32-true", "bf16-true", "16-mixed")],
    ],
    "instruction_following": [
        *[(SMALL, "h100", ranks, {"preset": "baseline"}) for ranks in (1, 2, 8)],
        ("Qwen/Qwen2.5-1.5B-Instruct", "t4", 1, {"preset": "baseline"}),
    ],
} | {task: [(SMALL, "h100", 1, {}), (SMALL, "h100", 2, {})] for task in ("code", "short_answer", "tool_use")}
HEAVY = [
    *[(MIXTURE, gpu, ranks, {}) for gpu in ("l4", "h100") for ranks in (1, 8)],
    *[("Qwen/Qwen2.5-7B-Instruct", gpu, 4, {}) for gpu in ("t4", "l4", "h100")],
    *[(SMALL, "cpu", ranks, {}) for ranks in (1, 3)],
]
REFUSED = {(MIXTURE, "l4", 1), (MIXTURE, "h100", 1)}


@mark.slow
def test_every_plan_of_larger_models_is_accepted(parse):
    assert_accepted("math_reasoning", HEAVY, parse)


@mark.parametrize("task", TASKS)
def test_every_plan_is_accepted(task, parse):
    assert_accepted(task, GRID[task], parse)


def assert_accepted(task, grid, parse):
    for model, gpu, ranks, options in grid:
        try:
            made = plan(task=task, model=model, gpu=gpu, num_gpus=ranks, **options)
        except ValueError as error:
            assert (model, gpu, ranks) in REFUSED
            assert "even with all changes that save memory" in str(error)
            continue
        config = parse(to_yaml(made))
        check(config, ranks)
        assert config.trainer.max_steps == made.max_steps
        assert config.model.init_args.num_generations == made.workload.num_generations


@mark.parametrize("task", TASKS)
def test_procedural_prompts_suffice_for_the_plan(task):
    """Also for two GPUs, and for many."""
    for ranks in (1, 2, 96):
        made = plan(task=task, model=SMALL, gpu="h100", num_gpus=ranks)
        data = yaml.safe_load(to_yaml(made))["data"]["init_args"]
        rows = read(data["source"], args=data.get("source_args", {}), size=data["size"], seed=0)
        assert sum(1 for _ in islice(rows, data["prompts_per_rollout"])) == data["prompts_per_rollout"]


def run(**changes) -> Workload:
    numbers = {
        "shape": find_model("Qwen/Qwen2.5-7B-Instruct"),
        "prompts_per_rollout": 32,
        "num_generations": 8,
        "micro_batch_size": 8,
        "accumulate_grad_batches": 4,
        "prompt_length": 256,
        "completion_length": 1536,
        "learning_rate": 2e-6,
        "engine": "vllm",
        "engine_cache": 8e9,
        "engine_sleep": False,
        "beta": 0.04,
        "ranks": 8,
        "ranks_per_node": 8,
    }
    return Workload(**numbers | changes)


@mark.parametrize("saver", MEMORY_SAVERS, ids=lambda saver: saver.name)
@mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_every_advice_is_accepted(saver, precision, parse):
    engine = "hf" if saver.name == "fewer completions at once" else "vllm"
    before = run(precision=precision, engine=engine, rollout_class={"hf": "HFRollout", "vllm": "VLLMRollout"}[engine])
    if saver.name == "4-bit base weights":
        before = replace(before, lora_rank=16)
    after = saver.apply(before)
    assert after != before
    made = plan(
        task="instruction_following",
        model=SMALL,
        gpu="h100",
        num_gpus=8,
        overrides={
            "engine": engine,
            "precision": precision,
            "prompts_per_rollout": 32,
            "micro_batch_size": 8,
            "num_generations": 8,
            "learning_rate": 2e-6,
        },
    )
    text, advice = to_yaml(made), flags(after, [saver])
    config, base = parse(text, *advice), parse(text)
    if saver.name == "8-bit Adam":
        assert config.model.init_args.optimizer.class_path == "bitsandbytes.optim.AdamW8bit"
    check(config, 8)
    assert config != base
    # what the advice doesn't name stays as it is
    assert config.rollout.init_args.dtype == base.rollout.init_args.dtype if engine == "vllm" else True
    assert config.model.init_args.optimizer.init_args.lr == base.model.init_args.optimizer.init_args.lr == 2e-6
    assert config.trainer.max_steps == base.trainer.max_steps
    # and the advice stands alone in a configuration that names no rollout
    without = yaml.safe_load(text)
    del without["rollout"]
    assert parse(yaml.safe_dump(without), *advice).trainer.max_steps == base.trainer.max_steps


def printed_flags(text: str) -> list[list[str]]:
    """The arguments in the numbered lines of a refusal."""
    return [line.split(" (peak")[0].split() for line in re.findall(r"^  \d\. (.*)$", text, re.MULTILINE)]


@mark.parametrize(("engine", "gpu"), [("vllm", "a100-40"), ("hf", "a100-40"), ("vllm", "l4")])
def test_every_printed_remedy_is_accepted(engine, gpu, parse):
    """As fit prints it, when the run does not fit."""
    w = run(
        engine=engine, engine_cache=2e10 if engine == "vllm" else 0.0, shape=find_model("Qwen/Qwen2.5-1.5B-Instruct")
    )
    w = replace(w, rollout_class={"hf": "HFRollout", "vllm": "VLLMRollout"}[engine], completion_length=8192)
    with raises(ValueError, match="cheapest changes that fit") as refused:
        describe_run(w, find_gpu(gpu))
    remedies = printed_flags(str(refused.value))
    assert len(remedies) == 3
    text = yaml.safe_dump(BARE)
    for remedy in remedies:
        assert parse(text, *remedy) != parse(text)


BARE = {
    "model": {"class_path": "GRPOModule", "init_args": {"model": "x", "rewards": ["ExactMatch"]}},
    "data": {"class_path": "PromptDataModule", "init_args": {"source": "letters", "size": 64}},
}


def allowed_values(name: str) -> list:
    """Values of an option that its error message suggests."""
    option = OVERRIDABLE[name]
    special = {"loss_type": ["grpo", "dapo"], "lora_rank": [0, 8], "prompts_per_rollout": [2], "engine_cache": [1e9]}
    if name in special:
        return special[name]
    if option.kind is bool:
        return [True, False]
    if option.names:
        return [value for value in option.names if value != "adamw_8bit"]
    return [max(option.minimum, 1)] if option.kind is int else [option.minimum + 0.25]


@mark.parametrize("i", range(max(len(allowed_values(name)) for name in OVERRIDABLE)))
def test_plans_with_every_override_are_accepted(i, parse):
    """The i-th value of every option together."""
    values = {name: allowed_values(name)[i % len(allowed_values(name))] for name in OVERRIDABLE}
    implied = {"32-true": "float32", "bf16-true": "bfloat16"}.get(values["precision"], values["dtype"])
    overrides = values | {"dtype": implied}
    made = plan(task="short_answer", model="SmolLM2-135M-Instruct", gpu="h100", num_gpus=2, overrides=overrides)
    config = parse(to_yaml(made))
    assert config.trainer.precision == overrides["precision"]
    assert config.trainer.max_steps == overrides["max_steps"]
    assert config.model.init_args.objective.loss_type == overrides["loss_type"]
    assert config.model.init_args.sampling.temperature == overrides["temperature"]


def test_a_float16_run_is_offered_float16_adapters():
    lora = next(saver for saver in MEMORY_SAVERS if saver.name == "LoRA")
    assert lora.apply(run(precision="16-mixed")).dtype == "float16"
    assert lora.apply(run()).dtype == "bfloat16"
    assert lora.apply(run(precision="32-true")).dtype == "float32"


def test_eight_bit_adam_is_only_offered_if_it_is_installed():
    saver, gpu = next(saver for saver in MEMORY_SAVERS if saver.name == "8-bit Adam"), find_gpu("h100")
    assert saver.package == "bitsandbytes"
    assert not replace(saver, package="no_such_package").available(gpu)
    assert replace(saver, package="torch").available(gpu)
    assert not replace(saver, package="torch").available(replace(gpu, device="cpu"))


@mark.parametrize("task", TASKS)
def test_the_command_line_itself_accepts_a_plan(task, tmp_path, tiny_model_path, capsys):
    """As in the example of ``configure --help``, but for a model and a device that are here."""
    from lightning_grpo.configure.command import main

    assert "--task math_reasoning --model" in configure_parser().format_help()
    assert main(["--task", task, "--model", "SmolLM2-135M-Instruct", "--gpu", "cpu"]) == 0
    file = tmp_path / "my_run.yaml"
    file.write_text(capsys.readouterr().out)
    with raises(SystemExit) as stop:
        cli.main(["fit", "--config", str(file), "--print_config"])
    assert stop.value.code in (0, None)
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["size"] >= 1000
