"""Environments of the package verifiers, in the form of its documentation."""

import verifiers as vf
from datasets import Dataset

ROWS = [{"question": f"How many letters has {word!r}?", "answer": str(len(word))} for word in ("see", "mango", "a")]
SYSTEM = "Answer briefly."


async def exact(completion, answer) -> float:
    return float(completion[-1]["content"] == answer)


def shortness(completions) -> list[float]:
    """For a group: how much shorter a completion is than the longest one."""
    lengths = [sum(len(message["content"]) for message in completion) for completion in completions]
    return [float(max(lengths) - length) for length in lengths]


class Hints(vf.MultiTurnEnv):
    """Says that an answer is wrong, and by how much."""

    ended: list = []  # noqa: RUF012  shared, so that a test sees it

    async def setup_state(self, state):
        state["wrong"] = 0
        return state

    async def env_response(self, messages, state, **kwargs):
        said = messages[-1]["content"]
        if said == "broken":
            raise ZeroDivisionError("no hint")
        if said == "sandbox":
            raise vf.SandboxError("no sandbox")
        if said == "again":
            messages[0]["content"] = "Answer at length."
        state["wrong"] += 1
        picture = {"type": "image_url", "image_url": {"url": "file.png"}}
        hint = [picture] if said == "picture" else [{"type": "text", "text": f"{state['answer']} minus "}]
        return [{"role": "user", "content": [*hint, {"type": "text", "text": said}]}]

    @vf.stop
    async def answered(self, state):
        steps = state["trajectory"]
        return bool(steps) and steps[-1]["completion"][-1]["content"] == state["answer"]

    @vf.cleanup
    async def note(self, state):
        self.ended.append((state["stop_condition"], state["is_truncated"], state["wrong"]))


class Unavailable(Hints):
    async def setup_state(self, state):
        state["wrong"] = 0
        raise vf.SandboxError("no machine is free")


def wrong(state) -> float:
    return float(state["wrong"])


def add(a: int, b: int) -> int:
    """Add two integers.

    Args:
        a: the first
        b: the second
    """
    return a + b


def load_environment(kind: str, **options):
    settings = {"dataset": Dataset.from_list(ROWS), "rubric": vf.Rubric(funcs=[exact])} | options
    if kind == "single":
        return vf.SingleTurnEnv(system_prompt=SYSTEM, eval_dataset=Dataset.from_list(ROWS[:1]), **settings)
    if kind == "hints":
        rubric = vf.Rubric(funcs=[exact, wrong, shortness], weights=[1.0, 0.0, 0.1])
        return Hints(**settings | {"rubric": rubric})
    if kind == "unavailable":
        return Unavailable(**settings)
    if kind == "tools":
        return vf.ToolEnv(tools=[add], **settings)
    return vf.SingleTurnEnv(message_type="completion", **settings)
