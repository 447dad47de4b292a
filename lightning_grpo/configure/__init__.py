"""The right hyperparameters for a task, a model and a device, with predicted memory, time and cost."""

from lightning_grpo.configure.callback import Prediction
from lightning_grpo.configure.cost import Cost, Efficiency, predict_cost, zero_variance_share
from lightning_grpo.configure.hardware import GPUS, Hardware, find_gpu, this_machine
from lightning_grpo.configure.memory import Memory, predict_memory
from lightning_grpo.configure.planned import Plan
from lightning_grpo.configure.planner import plan
from lightning_grpo.configure.render import to_yaml
from lightning_grpo.configure.shape import ModelShape, find_model
from lightning_grpo.configure.summary import describe_run, identity_line
from lightning_grpo.configure.workload import Workload, check_batch_arithmetic

__all__ = [
    "GPUS",
    "Cost",
    "Efficiency",
    "Hardware",
    "Memory",
    "ModelShape",
    "Plan",
    "Prediction",
    "Workload",
    "check_batch_arithmetic",
    "describe_run",
    "find_gpu",
    "find_model",
    "identity_line",
    "plan",
    "predict_cost",
    "predict_memory",
    "this_machine",
    "to_yaml",
    "zero_variance_share",
]
