"""Turns of conversations in a vLLM engine in this process."""

import time
from typing import TYPE_CHECKING, Any

from lightning_grpo.rollout.turns import Turns
from lightning_grpo.rollout.types import Completion, Sampling, Turn
from lightning_grpo.rollout.vllm.isolation import isolate_vllm

if TYPE_CHECKING:
    from lightning_grpo.rollout.vllm.engine import VLLMEngine


class VLLMTurns(Turns):
    """Each turn is a request with the whole conversation, of which vLLM's prefix cache has all but the new tokens.

    The cache keeps whole blocks of `block_size` tokens, and discards the least recently used ones if it is full.

    Args:
        engine: the engine, awake.
        sampling: options of sampling.
    """

    def __init__(self, engine: "VLLMEngine", sampling: Sampling) -> None:
        self._engine = engine
        self._sampling = sampling
        self._submitted: list[Turn] = []
        self._keys: dict[str, int] = {}
        self.computed_tokens = 0

    @property
    def running(self) -> int:
        return len(self._submitted) + len(self._keys)

    def submit(self, turn: Turn) -> None:
        self._submitted.append(turn)

    def step(self, timeout: float = 0.05) -> list[tuple[int, Completion]]:
        llm_engine: Any = self._engine.llm.llm_engine
        until = time.monotonic() + timeout
        ended: list[tuple[int, Completion]] = []
        # Entering and leaving takes a millisecond, so that several steps are computed inside.
        with isolate_vllm():
            while self._submitted:
                turn = self._submitted.pop(0)
                added = self._engine.add_request(turn.token_ids, self._sampling, turn.max_tokens, turn.seed)
                self._keys[added] = turn.key
            while self._keys and not ended:
                for output in llm_engine.step():
                    if output.finished:
                        self.computed_tokens += len(output.prompt_token_ids) - output.num_cached_tokens
                        ended.append((self._keys.pop(output.request_id), self._engine.completion(output.outputs[0])))
                if time.monotonic() >= until:
                    break
        return ended

    def end(self, key: int) -> None:
        """Without effect: the blocks of requests that have ended are free for others."""

    def abort(self) -> None:
        """End all turns that are running."""
        self._submitted.clear()
        if self._keys:
            with isolate_vllm():
                self._engine.llm.llm_engine.abort_request(list(self._keys))
