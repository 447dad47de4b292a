"""One vLLM engine over several of the trainer's processes, each with a shard of every matrix."""

import secrets
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NoReturn

import torch.distributed as dist
from torch import Tensor

from lightning_grpo.errors import UserError
from lightning_grpo.rollout.types import Completion, OnGroup, SampleRequest, Sampling
from lightning_grpo.rollout.verify import WeightSyncError
from lightning_grpo.rollout.vllm.engine import VLLMEngine
from lightning_grpo.rollout.vllm.isolation import isolate_vllm


class SharedVLLMEngine(VLLMEngine):
    """A `VLLMEngine` whose weights are split over ``engine_args["tensor_parallel_size"]`` neighbouring ranks of the
    trainer's default process group: ranks 0 and 1, 2 and 3, … for two.

    All methods are collective. `generate` samples the prompts of all these ranks together and returns each rank its own
    completions; `logprobs` must be called with the same sequences on every rank. Every rank receives all weights and
    keeps its shard.

    Raises:
        UserError: the number of ranks is no multiple of tensor_parallel_size.
    """

    def __init__(self, model: str, *, engine_args: dict[str, Any], **kwargs: Any) -> None:
        size = self._size = engine_args["tensor_parallel_size"]
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % size:
            raise UserError(
                f"rollout tensor_parallel_size is {size}, but the trainer has {world} ranks: set trainer.devices to a "
                "multiple of it, or use VLLMProcessRollout, whose engine has devices of its own"
            )
        run = [secrets.token_hex(4)]
        if world > 1:
            dist.broadcast_object_list(run)
        with isolate_vllm():
            _name_shared_memory(run[0])
        super().__init__(model, engine_args=engine_args, **kwargs)

    def generate(self, request: SampleRequest, on_group: OnGroup | None = None) -> list[list[Completion]]:
        requests, rank = self._gather(request)
        if any((r.sampling, r.max_tokens) != (request.sampling, request.max_tokens) for r in requests):
            raise UserError(
                "the ranks that share an engine requested completions with different sampling or max_tokens"
            )
        start = sum(len(r.prompts) for r in requests[:rank])
        stop = start + len(request.prompts)

        def on_own_group(index: int, completions: list[Completion]) -> None:
            if on_group is not None and start <= index < stop:
                on_group(index - start, completions)

        joint = replace(
            request,
            prompts=[prompt for r in requests for prompt in r.prompts],
            seeds=[seeds for r in requests for seeds in r.seeds],
        )
        return super().generate(joint, on_own_group)[start:stop]

    def turns(self, sampling: Sampling) -> NoReturn:
        """Raise `UserError`: the ranks step the engine together, and their conversations end at different times."""
        raise no_turns(self._size)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int, *, in_flight: bool = False) -> None:
        """As `VLLMEngine.update_weights`; every rank learns the tensors and failures of the others."""
        failure = None
        try:
            super().update_weights(weights, version)
        except Exception as error:
            failure = error
            # The other ranks continue with the stream, which may be collective.
            for _ in weights:
                pass
        ranks, _ = self._gather((failure and f"{failure}", self.stored))
        for rank, (message, _) in enumerate(ranks):
            if message is not None:
                raise WeightSyncError(f"rank {rank} of the engine did not take the weights: {message}") from failure
        self.stored = [
            replace(stored, place=f"{stored.place} on rank {rank}")
            for rank, (_, holds) in enumerate(ranks)
            for stored in holds
        ]

    def _gather(self, value: Any) -> tuple[list[Any], int]:
        """The values of all ranks of the engine, and this rank's index among them."""
        from vllm.distributed import get_tp_group

        group = get_tp_group()
        values: list[Any] = [None] * group.world_size
        dist.all_gather_object(values, value, group=group.cpu_group)
        return values, group.rank_in_group


def no_turns(tensor_parallel_size: int) -> UserError:
    """The error for conversations of several turns in an engine that ranks share."""
    return UserError(
        f"rollout tensor_parallel_size is {tensor_parallel_size}: ranks that share an engine sample single "
        "completions, and model.environment needs conversations of several turns; set it to 1, or use "
        "VLLMProcessRollout, whose server can have several GPUs of its own"
    )


def _name_shared_memory(run: str) -> None:
    """Give this run's shared memory a unique name. Ranks on a CPU reduce over shared memory, and its name would be the
    same in all runs on a machine."""
    from vllm.distributed.device_communicators import cpu_communicator

    named: Any = cpu_communicator._CPUSHMDistributed
    make = getattr(named, "make_group_name_of_all_runs", named.make_group_name)
    named.make_group_name_of_all_runs = staticmethod(make)
    named.make_group_name = staticmethod(lambda communicator: run + make(communicator).replace("/", ""))
