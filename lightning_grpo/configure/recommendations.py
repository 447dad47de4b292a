"""Recommended values per task and model size, before memory is considered, with reasons, sources and trade-offs.

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
    """One value of a plan, with the reason, who uses it, and the trade-off."""

    value: Any
    why: str
    sources: str = ""
    tradeoff: str = ""

    def sentence(self) -> str:
        """The reason, the sources and the trade-off in one line."""
        text = f"{self.why} [{self.sources}]" if self.sources else self.why
        return f"{text}. Trade-off: {self.tradeoff}." if self.tradeoff else text


@dataclass(frozen=True, kw_only=True)
class Task:
    """Usual values for a kind of task. Lengths are in tokens."""

    about: str
    num_generations: Choice
    max_completion_length: Choice
    beta: Choice
    max_prompt_length: int
    mean_fill: float
    """Mean completion length as a share of the maximum."""
    mean_pass_rate: float
    """Share of correct completions at the start, assumed if the prompts have no pass rates."""
    reward: dict[str, Any]
    """Reward for the user's own prompts."""
    source: str
    """Procedural prompts that are used if none are given."""
    source_reward: dict[str, Any]
    """Reward for the procedural prompts."""
    source_args: dict[str, Any] | None = None
    reward_seconds: float
    """Seconds to score one completion."""
    reward_note: str = "the reward compares completions with the column answer"
    """What the reward needs from the user's own prompts."""


_NO_REFERENCE = Choice(
    0.0,
    "no KL penalty: verifiable rewards do not need one, and no reference model is loaded",
    "DAPO, Dr. GRPO, GSPO, ScaleRL, OLMo 3: 0; DeepSeekMath: 0.04",
    "the policy can move further from its start",
)

_NUMBER = {"class_path": "lightning_grpo.rewards.ExactMatch", "init_args": {"extract": "last_number"}}
_WHOLE = {"class_path": "lightning_grpo.rewards.ExactMatch", "init_args": {"extract": "whole"}}
_GYM = "lightning_grpo.rewards.ReasoningGym"

TASKS: dict[str, Task] = {
    "math_reasoning": Task(
        about="problems with a final answer that can be checked",
        num_generations=Choice(
            16,
            "hard problems are rarely solved: at a pass rate of 0.1, 18% of groups have no signal, "
            "compared to 43% with 8",
            "DAPO 512×16, ScaleRL and Tülu 3.1 48×16, open-r1 ×16; baseline range 6–16",
            "twice as much sampling as with 8",
        ),
        max_completion_length=Choice(
            1024,
            "long enough for a worked solution",
            "DeepSeekMath 1,024; verl LoRA 1,024; open-r1 1–2k; baseline preset 500",
            "time and cache grow with it; raise it if more than 5–15% of completions are truncated",
        ),
        beta=_NO_REFERENCE,
        max_prompt_length=256,
        mean_fill=0.4,
        mean_pass_rate=0.3,
        reward={"class_path": "lightning_grpo.rewards.MathMatch", "init_args": {"extract": "boxed"}},
        reward_note="the reward compares \\boxed{…} in the completion with the column answer: ask for it in the "
        "prompts or with data.system_prompt; it needs pip install 'lightning-grpo[math]'",
        source="reasoning_gym:gsm_symbolic",
        source_reward={"class_path": _GYM, "init_args": {"extract": "last_number"}},
        reward_seconds=0.003,
    ),
    "code": Task(
        about="programs that are run against tests",
        num_generations=Choice(
            8,
            "running programs is expensive; 8 samples still give mixed groups at medium pass rates",
            "Tinker code 128×8, OLMo 3 ×8, open-r1 code ×14",
            "at a pass rate of 0.1, 43% of groups have no signal",
        ),
        max_completion_length=Choice(
            2048,
            "long enough for a program and the reasoning before it",
            "open-r1 1–2k; Tinker code 24k",
            "time and cache grow with it",
        ),
        beta=_NO_REFERENCE,
        max_prompt_length=1024,
        mean_fill=0.4,
        mean_pass_rate=0.3,
        reward={"class_path": "lightning_grpo.rewards.CodeTests"},
        reward_note="the reward runs programs against the unit tests in the column tests",
        source="reasoning_gym:bf",
        source_reward={"class_path": _GYM},
        reward_seconds=0.5,
    ),
    "instruction_following": Task(
        about="constraints that can be verified, or scores of a reward model",
        num_generations=Choice(8, "partial rewards differ even in small groups", "baseline preset 8; TRL default 8"),
        max_completion_length=Choice(
            512, "long enough for a one-page answer", "TRL default 512, Tülu 3.1 2,048; baseline preset 200"
        ),
        beta=Choice(
            0.01,
            "rewards that can be exploited need a KL penalty towards the initial policy",
            "Tülu 3.1: 0.01; baseline range 0.01–0.2",
            "a reference pass over every completion and, without LoRA, the memory for its weights",
        ),
        max_prompt_length=512,
        mean_fill=0.6,
        mean_pass_rate=0.4,
        reward={"class_path": "lightning_grpo.rewards.Constraints"},
        reward_note="the reward checks the constraints in the columns instruction_id_list and kwargs, as in IFEval",
        source="letters",
        source_reward={"class_path": "lightning_grpo.rewards.PrefixMatch"},
        reward_seconds=0.003,
    ),
    "short_answer": Task(
        about="a number, a word or a label",
        num_generations=Choice(
            8, "easy prompts give mixed groups, and short completions are cheap", "TRL default 8; OLMo 3 ×8"
        ),
        max_completion_length=Choice(64, "long enough for a short answer", "", "too short for reasoning"),
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
        num_generations=Choice(
            8, "several turns make samples expensive", "OLMo 3 ×8, TRL default 8", "more groups without a signal"
        ),
        max_completion_length=Choice(2048, "long enough for all turns, including tool results", "open-r1 1–2k"),
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


BASELINES: dict[str, dict[str, Any]] = {
    "math_reasoning": {"num_generations": 16, "max_completion_length": 500, "beta": 0.05, "learning_rate": 1e-5},
    "instruction_following": {"num_generations": 8, "max_completion_length": 200, "beta": 0.1, "learning_rate": 5e-6},
}
"""The baseline presets. Below 24 GB, num_generations is halved and the accumulation doubled."""


def learning_rate(shape: "ModelShape", lora: bool) -> Choice:
    """Return the learning rate for a model of this size; adapters get about ten times as much."""
    billions = shape.params / 1e9
    if lora:
        value = 5e-5 if billions < 1 else 3e-5 if billions < 10 else 2e-5
        return Choice(
            value,
            "adapters need about ten times the rate of full weights",
            "verl LoRA 7B 3e-5; Tinker 2e-5–8e-5; usual 1e-5–5e-5",
            "a higher rate learns faster but becomes unstable sooner",
        )
    steps = ((0.2, 1e-5, "2e-6–1e-5"), (0.75, 5e-6, "2e-6–1e-5"), (5, 2e-6, "1e-6–5e-6"), (20, 1e-6, "5e-7–1e-6"))
    value, usual = next(((lr, span) for size, lr, span in steps if billions < size), (5e-7, "3e-7–2e-6"))
    return Choice(
        value,
        f"all weights of a model of {billions:.2g}B parameters are trained",
        f"usual at this size {usual}; DeepSeekMath, DAPO, Dr. GRPO 1e-6; ScaleRL, Tülu 3.1 5e-7; baseline 1e-6–5e-5",
        "a higher rate learns faster but becomes unstable sooner",
    )


def prompts_per_rollout(device_is_cpu: bool, ranks: int) -> Choice:
    """Return B, over all ranks."""
    if device_is_cpu:
        return Choice(8 * ranks, "few, because a CPU is slow", "", "noisier gradients than with 32–64")
    value = 16 if ranks == 1 else 32 if ranks <= 4 else 64
    value = -(-value // ranks) * ranks
    return Choice(
        value,
        "more prompts per rollout reduce the variance of the gradient",
        "DeepSeekMath 16×64, verl LoRA 16×5, Tinker 32×64, ScaleRL and Tülu 3.1 48×16, OLMo 3 32–64×8",
        "more time per rollout",
    )


FIXED = {
    "num_iterations": Choice(
        1,
        "on-policy: each completion is used once, and no old log-probs are needed",
        "usual: 1",
        "more sampling per update than with several passes",
    ),
    "loss_type": Choice(
        "dr_grpo", "divides by a constant, without a bias to short or long answers", "Dr. GRPO; baseline preset"
    ),
    "scale_rewards": Choice(
        "none",
        "advantage = reward − group mean: easy and hard prompts keep their weight",
        "Dr. GRPO, Tinker; baseline preset",
    ),
    "epsilon": Choice(0.2, "takes effect only with several updates per rollout", "DAPO, Dr. GRPO, Tülu 3.1, TRL: 0.2"),
    "epsilon_high": Choice(0.28, "lets unlikely tokens become more likely", "DAPO 0.28"),
    "temperature": Choice(1.0, "samples follow the policy exactly and need no correction", "usual: 1"),
    "lr_schedule": Choice("constant", "the run can be extended", "usual"),
    "warmup_steps": Choice(10, "gives Adam's moments time to settle", "usual: 10–20 steps or 0.03–0.1 of the run"),
    "weight_decay": Choice(0.0, "small learning rates change the weights little", "usual: 0–0.01"),
}


def gradient_clip_val(lora: bool) -> Choice:
    """Return the maximum norm of the gradient."""
    if lora:
        return Choice(
            0.2, "gradients of adapters have spikes with small batches", "usual: 0.1–0.2 for LoRA, 1.0 for full weights"
        )
    return Choice(1.0, "limits the effect of a single bad step", "usual: 1.0")


def lora_rank() -> Choice:
    """Return the rank of the adapters."""
    return Choice(
        16, "enough for reinforcement learning with adapters on all linear layers", "usual: 1–32; Tinker 32, verl 32"
    )
