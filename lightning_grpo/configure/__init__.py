"""Hyperparameters for a task, a model and a device, with predicted memory, time and cost."""

from lightning_grpo.lazy import lazy_names

_MODULES = {
    "callback": ("Prediction",),
    "cost": ("Cost", "Efficiency", "predict_cost", "zero_variance_share"),
    "devices": ("GPUS", "Hardware"),
    "hardware": ("find_gpu", "this_machine"),
    "memory": ("Memory", "predict_memory"),
    "planner": ("plan",),
    "render": ("to_yaml",),
    "result": ("Plan",),
    "shape": ("ModelShape", "find_model"),
    "summary": ("describe_run", "identity_line"),
    "workload": ("Workload",),
}
__all__ = sorted(name for names in _MODULES.values() for name in names)

__getattr__, __dir__ = lazy_names(
    __name__, {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}
)
