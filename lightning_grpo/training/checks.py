"""What can be checked before a weight is loaded."""

from collections.abc import Sequence
from typing import Any

from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase

from lightning_grpo.environments import Environment
from lightning_grpo.environments.episodes import require_messages
from lightning_grpo.errors import UserError
from lightning_grpo.objective import AdvantageConfig, ObjectiveConfig
from lightning_grpo.policy import LoRA, load_config, load_generation_config
from lightning_grpo.policy.checks import require_context, require_end_token
from lightning_grpo.rewards import EnvironmentReward, Reward
from lightning_grpo.rewards.check import check_rows
from lightning_grpo.rewards.function import names_argument
from lightning_grpo.rollout import RolloutCallback, Sampling, SyncedEngine
from lightning_grpo.training.batching import check_batch_arithmetic
from lightning_grpo.training.generation import turn_template


def check_run(module: Any, stage: str) -> None:
    """Check the module's options together with those of the trainer, the model's configuration and the data's rows.

    Args:
        module: a `GRPOModule`.
        stage: of the Trainer, such as ``fit``.

    Raises:
        UserError: the run would fail later, or train on a wrong gradient.
    """
    trainer: Trainer = module.trainer
    data = trainer.datamodule
    module.optimization.check()
    check_trainer(trainer)
    name, config = module.pretrained.name, load_config(module.pretrained)
    require_end_token(name, module.tokenizer, config, load_generation_config(module.pretrained, config))
    require_context(name, config, module.max_prompt_length, module.max_completion_length)
    if stage == "fit":
        in_flight = module.collector.in_flight_updates
        check_engine(trainer, rollout_ahead=module.rollout_ahead, in_flight_updates=in_flight)
        check_training_options(trainer)
        check_batch_arithmetic(
            prompts_per_rollout=data.prompts_per_rollout,
            num_generations=module.num_generations,
            micro_batch_size=module.micro_batch_size,
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            num_iterations=module.num_iterations,
            ranks=module.data_ranks,
        )
        if module.objective.ess_scaled_step and module.completions_per_step == 1:
            raise UserError(
                "objective.ess_scaled_step is true, but an optimizer step has a single completion, whose effective "
                "sample size is always 1; set trainer.accumulate_grad_batches or model.micro_batch_size to 2 or more, "
                "or ess_scaled_step to false"
            )
    if module.environment is not None:
        check_conversations(module.environment, trainer, module.tokenizer)
    check_rows(module.rewards, data.prompts_to_check if stage == "fit" else (), module.environment)
    check_rows([*module.rewards, *module.eval_rewards], getattr(data, "validation", ()), module.environment)


def check_trainer(trainer: Trainer) -> None:
    """Refuse strategies and precisions under which training would silently go wrong."""
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
        raise UserError(
            f"trainer.strategy is {type(strategy).__name__}, with which weights would not reach the engine; set ddp, "
            "or lightning.pytorch.strategies.ModelParallelStrategy, which shards them (FSDP2)"
        )
    if str(trainer.precision) == "16-true":
        raise UserError(
            "trainer.precision is 16-true: without loss scaling most gradients are too small for float16 and become "
            "0; set bf16-mixed, bf16-true, or 16-mixed, which scales them"
        )
    mesh = trainer.lightning_module.device_mesh
    module: Any = trainer.lightning_module
    check_quantization(module.quantization, module.lora, is_sharded=mesh is not None)
    if mesh is not None and (size := mesh["tensor_parallel"].size()) > 1:
        raise UserError(
            f"trainer.strategy.tensor_parallel_size is {size}, which is not supported; set it to 1 and "
            "data_parallel_size to the number of ranks"
        )


def check_quantization(quantization: str | None, lora: LoRA | None, *, is_sharded: bool) -> None:
    """Refuse quantized weights if they would be trained or sharded."""
    if quantization is not None and lora is None:
        raise UserError(f"quantization is {quantization}, whose weights can't be trained; set lora, or leave it unset")
    if quantization is not None and is_sharded:
        raise UserError(
            f"quantization is {quantization}, and trainer.strategy shards the weights, which 4-bit weights don't "
            "support; set trainer.strategy to ddp"
        )


def check_training_options(trainer: Trainer) -> None:
    """Refuse options of `fit` whose meaning differs here."""
    if trainer.datamodule is None:
        raise UserError("fit was given no data module; pass datamodule=PromptDataModule(...), or a subclass of it")
    if trainer.overfit_batches:
        raise UserError(
            f"trainer.overfit_batches is {trainer.overfit_batches}, which repeats a loader's first batches, but "
            "prompts come from an endless order; leave it at 0, and to train on the same few prompts over and over set "
            "data.size to data.prompts_per_rollout"
        )


def check_engine(trainer: Trainer, *, rollout_ahead: int, in_flight_updates: bool) -> None:
    """Check that the engine supports what is asked of it while the policy trains."""
    for callback in (c for c in trainer.callbacks if isinstance(c, RolloutCallback)):
        engine = callback.engine_class
        for name, value, is_supported in (
            ("rollout_ahead", rollout_ahead, engine.runs_in_background),
            ("in_flight_updates", in_flight_updates, engine.updates_in_flight),
        ):
            if value and not is_supported:
                raise UserError(
                    f"{name} is {value}, but the engine of {type(callback).__name__} shares the trainer's process and "
                    f"cannot sample during the update; use VLLMProcessRollout or VLLMServerRollout, or leave {name} "
                    "unset"
                )


def check_engine_is_attached(engine: SyncedEngine | None) -> None:
    """Check that a callback attached an engine to the module."""
    if engine is None:
        raise UserError(
            "no engine is attached: samples come from a callback such as HFRollout, and trainer.callbacks contains "
            "none. Lightning's Tuner removes the callbacks while it searches, so lr_find and scale_batch_size cannot "
            "be used; lightning-grpo configure chooses a learning rate and a batch size"
        )


def check_options(
    *,
    rewards: Sequence[object],
    num_generations: int,
    needs_groups: bool,
    resampling_rounds: int,
    sampling: Sampling,
    rollout_ahead: int,
    in_flight_updates: bool,
    objective: ObjectiveConfig,
) -> None:
    """Refuse combinations of the module's options that train on a wrong gradient or on none."""
    if not rewards:
        raise UserError("rewards is empty: nothing would be learned; name at least one reward")
    if num_generations < 2 and needs_groups:
        raise UserError(
            f"num_generations is {num_generations}, but the advantage is relative to the other completions of a group, "
            "so it would always be 0; set 2 or more, or advantage.estimator to reinforce_pp, which compares with the "
            "batch"
        )
    if num_generations < 2 and resampling_rounds:
        raise UserError(
            f"resampling_rounds is {resampling_rounds}, but num_generations is {num_generations}: the rewards of a "
            "group of one are always equal, so every group would be replaced; set resampling_rounds to 0"
        )
    if sampling.temperature == 0:
        raise UserError("sampling.temperature is 0 (greedy): the completions of a group would all be the same; set 1.0")
    if sampling.truncations:
        options = ", ".join(f"sampling.{name} = {value:g}" for name, value in sampling.truncations.items())
        raise UserError(
            f"{options}: the engine would sample from another distribution than the one trained, which biases the "
            "gradient; leave it off in training (validation_sampling may have it)"
        )
    if rollout_ahead not in (0, 1):
        raise UserError(f"rollout_ahead is {rollout_ahead}; set 0, or 1 to sample one rollout ahead")
    if in_flight_updates and not rollout_ahead:
        raise UserError("in_flight_updates is true, but rollout_ahead is 0: nothing is in flight; set it to 1")
    if rollout_ahead and objective.rollout_correction is None:
        raise UserError(
            "rollout_ahead is 1, so samples come from an older policy than the one they train, but "
            "objective.rollout_correction, which corrects for it, is not set; set it, for example to {level: token, "
            "mode: truncate, upper: 2}, or set rollout_ahead to 0"
        )


def check_environment(
    environment: Environment | None,
    rewards: Sequence[Reward],
    eval_rewards: Sequence[Reward],
    advantage: AdvantageConfig,
    sampling: Sampling,
    validation_sampling: Sampling | None,
) -> None:
    """Refuse options that an environment excludes, and rewards that need one if there is none."""
    for reward in (*rewards, *eval_rewards):
        for argument in ("environments", "turn_rewards"):
            if environment is None and names_argument(reward, argument):
                raise UserError(
                    f"the reward {reward.name!r} uses {argument}, which only an environment provides; set "
                    "model.environment, or remove the reward"
                )
    if advantage.turn_credit == "return_to_go" and not any(isinstance(x, EnvironmentReward) for x in rewards):
        raise UserError(
            "advantage.turn_credit is 'return_to_go', but no reward is that of the environment's turns; set "
            "model.environment, and EnvironmentReward among model.rewards"
        )
    if environment is None:
        return
    for reward in eval_rewards:
        if names_argument(reward, "environments"):
            raise UserError(
                f"the reward {reward.name!r} of eval_rewards uses environments, which only model.rewards are given; "
                "move it there, with weight: 0 if it should not be trained on"
            )
    for name, options in (("sampling", sampling), ("validation_sampling", validation_sampling)):
        if options is not None and options.cutoff < 1:
            raise UserError(
                f"{name}.cutoff is {options.cutoff:g}, but with model.environment no completion can be cut off; set it "
                "to 1, and limit episodes by max_turns and max_turn_tokens of the environment"
            )


def check_conversations(environment: Environment, trainer: Trainer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that an environment can continue the prompts with the chat template."""
    turn_template(tokenizer, trainer).require_prefix_property("tool" if environment.tool_schemas else "user")
    data = trainer.datamodule
    prompts = data.prompts_to_check if trainer.state.fn == TrainerFn.FITTING else ()
    require_messages([*prompts, *getattr(data, "validation", ())])
