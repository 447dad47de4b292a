"""What to choose before memory is looked at: per task and model size, with the reason, its source, and the price.

Sources: DeepSeekMath (arXiv:2402.03300), DAPO (arXiv:2503.14476), Dr. GRPO (arXiv:2503.20783), GSPO (arXiv:2507.18071),
ScaleRL (arXiv:2510.13786), Tülu 3 (arXiv:2411.15124, with the 3.1 release), OLMo 3, open-r1's recipes, verl's examples,
Tinker's cookbook.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_grpo.configure.shape import ModelShape


@dataclass(frozen=True)
class Choice:
    """One value of the plan and what it rests on."""

    value: Any
    why: str
    evidence: str = ""
    trades: str = ""

    def sentence(self) -> str:
        text = self.why
        text += f" [{self.evidence}]" if self.evidence else ""
        return text + (f" Trades: {self.trades}." if self.trades else "")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is usual for a kind of task. Lengths are in tokens."""

    about: str
    num_generations: Choice
    max_completion_length: Choice
    beta: Choice
    max_prompt_length: int
    mean_fill: float
    """Mean completion length as a share of the cap."""
    mean_pass_rate: float
    """Share of right completions at the start; assumed where the prompts bring none."""
    reward: dict[str, Any]
    """For the user's own prompts."""
    source: str
    """Procedural prompts that stand in where none are given."""
    source_reward: dict[str, Any]
    source_args: dict[str, Any] | None = None
    """Of the procedural prompts."""
    reward_seconds: float
    """Of one completion."""


_NO_REFERENCE = Choice(
    0.0,
    "no pull to the start: rewards that are verified need none, and no reference model is loaded",
    "DAPO, Dr. GRPO, GSPO, ScaleRL, OLMo 3: 0; DeepSeekMath: 0.04",
    "a policy that drifts further",
)

_NUMBER = {"class_path": "lightning_grpo.rewards.ExactMatch", "init_args": {"extract": "last_number"}}
_WHOLE = {"class_path": "lightning_grpo.rewards.ExactMatch", "init_args": {"extract": "whole"}}
_GYM = "lightning_grpo.rewards.ReasoningGym"

TASKS: dict[str, Task] = {
    "math_reasoning": Task(
        about="problems whose final answer can be checked",
        num_generations=Choice(
            16,
            "hard problems are solved rarely: at a pass rate of 0.1, 18 % of groups teach nothing, against 43 % with 8",
            "DAPO 512×16, ScaleRL and Tülu 3.1 48×16, open-r1 ×16; baseline range 6–16",
            "twice the sampling of 8",
        ),
        max_completion_length=Choice(
            1024,
            "room for a worked solution",
            "DeepSeekMath 1,024; verl LoRA 1,024; open-r1 1–2k; baseline preset 500",
            "time and cache follow it; raise it where more than 5–15 % of completions are cut off",
        ),
        beta=_NO_REFERENCE,
        max_prompt_length=256,
        mean_fill=0.4,
        mean_pass_rate=0.3,
        reward=_NUMBER,
        source="reasoning_gym:gsm_symbolic",
        source_reward={"class_path": _GYM, "init_args": {"extract": "last_number"}},
        reward_seconds=0.003,
    ),
    "code": Task(
        about="programs that are run against tests",
        num_generations=Choice(
            8,
            "running programs is dear; 8 still gives mixed groups at middling pass rates",
            "Tinker code 128×8, OLMo 3 ×8, open-r1 code ×14",
            "at a pass rate of 0.1, 43 % of groups teach nothing",
        ),
        max_completion_length=Choice(
            2048,
            "a program and the reasoning before it",
            "open-r1 1–2k; Tinker code 24k",
            "time and cache follow it",
        ),
        beta=_NO_REFERENCE,
        max_prompt_length=1024,
        mean_fill=0.4,
        mean_pass_rate=0.3,
        reward=_WHOLE,
        source="reasoning_gym:bf",
        source_reward={"class_path": _GYM},
        reward_seconds=0.5,
    ),
    "instruction_following": Task(
        about="constraints that can be verified, or a reward model's taste",
        num_generations=Choice(8, "partial rewards differ even in small groups", "baseline preset 8; TRL default 8"),
        max_completion_length=Choice(
            512, "an answer of a page", "TRL default 512, Tülu 3.1 2,048; baseline preset 200"
        ),
        beta=Choice(
            0.01,
            "rewards that can be gamed need a pull to the start",
            "Tülu 3.1: 0.01; baseline range 0.01–0.2",
            "a reference pass over every completion, and its weights unless LoRA",
        ),
        max_prompt_length=512,
        mean_fill=0.6,
        mean_pass_rate=0.4,
        reward=_WHOLE,
        source="letters",
        source_reward={"class_path": "lightning_grpo.rewards.PrefixMatch"},
        reward_seconds=0.003,
    ),
    "short_answer": Task(
        about="a number, a word or a label",
        num_generations=Choice(8, "short completions are cheap, easy prompts are mixed", "TRL default 8; OLMo 3 ×8"),
        max_completion_length=Choice(64, "an answer, not an essay", "", "no room to reason"),
        beta=_NO_REFERENCE,
        max_prompt_length=128,
        mean_fill=0.5,
        mean_pass_rate=0.4,
        reward=_NUMBER,
        source="arithmetic",
        source_reward=_NUMBER,
        source_args={"high": 200},
        reward_seconds=0.0005,
    ),
    "tool_use": Task(
        about="several turns with tools or an environment",
        num_generations=Choice(8, "turns make a sample dear", "OLMo 3 ×8, TRL default 8", "more groups all equal"),
        max_completion_length=Choice(2048, "all turns together, what the tools answer included", "open-r1 1–2k"),
        beta=_NO_REFERENCE,
        max_prompt_length=1024,
        mean_fill=0.4,
        mean_pass_rate=0.3,
        reward=_WHOLE,
        source="reasoning_gym:calendar_arithmetic",
        source_reward={"class_path": _GYM},
        reward_seconds=0.2,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A baseline preset. Below 24 GB num_generations is halved and the accumulation doubled."""

    num_generations: int
    max_completion_length: int
    beta: float
    learning_rate: float


BASELINES = {
    "math_reasoning": Baseline(num_generations=16, max_completion_length=500, beta=0.05, learning_rate=1e-5),
    "instruction_following": Baseline(num_generations=8, max_completion_length=200, beta=0.1, learning_rate=5e-6),
}


def learning_rate(shape: "ModelShape", lora: bool) -> Choice:
    """By the size of the model; ten times as much for adapters."""
    billions = shape.params / 1e9
    if lora:
        value = 5e-5 if billions < 1 else 3e-5 if billions < 10 else 2e-5
        return Choice(
            value,
            "adapters take about ten times the rate of whole weights",
            "verl LoRA 7B 3e-5; Tinker 2e-5–8e-5; usual 1e-5–5e-5",
            "faster, and sooner unstable",
        )
    steps = ((0.2, 1e-5, "2e-6–1e-5"), (0.75, 5e-6, "2e-6–1e-5"), (5, 2e-6, "1e-6–5e-6"), (20, 1e-6, "5e-7–1e-6"))
    value, usual = next(((lr, span) for size, lr, span in steps if billions < size), (5e-7, "3e-7–2e-6"))
    return Choice(
        value,
        f"whole weights of {billions:.2g}B parameters",
        f"usual at this size {usual}; DeepSeekMath, DAPO, Dr. GRPO 1e-6; ScaleRL, Tülu 3.1 5e-7; baseline 1e-6–5e-5",
        "faster, and sooner unstable",
    )


def prompts_per_rollout(device_is_cpu: bool, ranks: int) -> Choice:
    """B, over all ranks."""
    if device_is_cpu:
        return Choice(8 * ranks, "few, for a CPU", "", "noisier gradients than 32–64")
    value = 16 if ranks == 1 else 32 if ranks <= 4 else 64
    value = -(-value // ranks) * ranks
    return Choice(
        value,
        "the gradient averages over prompts; more of them calm it",
        "DeepSeekMath 16×64, verl LoRA 16×5, Tinker 32×64, ScaleRL and Tülu 3.1 48×16, OLMo 3 32–64×8",
        "time a rollout",
    )


FIXED = {
    "num_iterations": Choice(
        1,
        "on-policy: each completion is used once, no old log-probs are scored",
        "usual: 1",
        "more sampling per update",
    ),
    "loss_type": Choice(
        "dr_grpo", "sums over a constant: no bias to short or long answers", "Dr. GRPO; the baseline objective"
    ),
    "scale_rewards": Choice(
        "none", "advantage = reward − group mean: easy and hard prompts keep their weight", "Dr. GRPO, Tinker; baseline"
    ),
    "epsilon": Choice(0.2, "binds only with several updates a rollout", "DAPO, Dr. GRPO, Tülu 3.1, TRL: 0.2"),
    "epsilon_high": Choice(0.28, "leaves unlikely tokens room to grow", "DAPO 0.28"),
    "temperature": Choice(1.0, "samples from the policy itself: nothing to correct", "usual: 1"),
    "lr_schedule": Choice("constant", "runs can be prolonged", "usual"),
    "warmup_steps": Choice(10, "Adam's moments settle first", "usual: 10–20 steps or 0.03–0.1 of the run"),
    "weight_decay": Choice(0.0, "fine-tuning at small rates moves weights little", "usual: 0–0.01"),
}


def gradient_clip_val(lora: bool) -> Choice:
    """Clipping of the gradient's norm."""
    if lora:
        return Choice(0.2, "small batches of adapters spike", "usual for LoRA: 0.1–0.2; whole weights 1.0")
    return Choice(1.0, "stops single bad steps", "usual: 1.0")


def lora_rank() -> Choice:
    """Rank of the adapters."""
    return Choice(16, "enough for reinforcement learning, on all linear layers", "usual: 1–32; Tinker 32, verl 32")
