"""The right hyperparameters for a task, a model and a device, with predicted memory, time and cost."""

from typing import TYPE_CHECKING

from lightning_grpo.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_grpo.configure.callback import Prediction
    from lightning_grpo.configure.cost import Cost, Efficiency, predict_cost, zero_variance_share
    from lightning_grpo.configure.devices import GPUS, Hardware
    from lightning_grpo.configure.hardware import find_gpu, this_machine
    from lightning_grpo.configure.memory import Memory, predict_memory
    from lightning_grpo.configure.planner import plan
    from lightning_grpo.configure.render import to_yaml
    from lightning_grpo.configure.result import Plan
    from lightning_grpo.configure.shape import ModelShape, find_model
    from lightning_grpo.configure.summary import describe_run, identity_line
    from lightning_grpo.configure.workload import Workload

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Prediction": "lightning_grpo.configure.callback",
        "Cost": "lightning_grpo.configure.cost",
        "Efficiency": "lightning_grpo.configure.cost",
        "predict_cost": "lightning_grpo.configure.cost",
        "zero_variance_share": "lightning_grpo.configure.cost",
        "GPUS": "lightning_grpo.configure.devices",
        "Hardware": "lightning_grpo.configure.devices",
        "find_gpu": "lightning_grpo.configure.hardware",
        "this_machine": "lightning_grpo.configure.hardware",
        "Memory": "lightning_grpo.configure.memory",
        "predict_memory": "lightning_grpo.configure.memory",
        "Plan": "lightning_grpo.configure.result",
        "plan": "lightning_grpo.configure.planner",
        "to_yaml": "lightning_grpo.configure.render",
        "ModelShape": "lightning_grpo.configure.shape",
        "find_model": "lightning_grpo.configure.shape",
        "describe_run": "lightning_grpo.configure.summary",
        "identity_line": "lightning_grpo.configure.summary",
        "Workload": "lightning_grpo.configure.workload",
    },
)
