"""A vLLM server as a child of this process: it has its own threads, memory and cores, and ends with this process."""

import ctypes
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from lightning_grpo.errors import RunError
from lightning_grpo.rollout.server.checks import SERVER_ENVIRONMENT, SERVER_FLAGS, as_flags
from lightning_grpo.rollout.server.tcp import free_port

HERE = "127.0.0.1"
_PR_SET_PDEATHSIG = 1


class ServerProcess:
    """Starts a server on a free local port and waits until it answers. All routes except ``/health`` require `api_key`.

    Args:
        model: local folder or hub name.
        engine_args: any argument of `vllm serve` by its name in Python, such as max_num_seqs.
        environment: additional environment variables of the child, such as CUDA_VISIBLE_DEVICES.
        cores: CPU cores that it may use; None leaves the choice to the operating system.
        log_file: file for all its output.
        start_timeout: seconds to wait for the server.

    Raises:
        RunError: the server exits or does not answer in time; the message has the end of its log.
    """

    def __init__(
        self,
        model: str,
        *,
        engine_args: dict[str, Any],
        log_file: Path,
        environment: dict[str, str] | None = None,
        cores: list[int] | None = None,
        start_timeout: float = 900.0,
    ) -> None:
        self.api_key = (environment or {}).get("VLLM_API_KEY") or secrets.token_hex(32)
        self._closed = False
        self._port = free_port(HERE)
        self.url = f"http://{HERE}:{self._port}"
        self.log_file = log_file
        log_file.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--host", HERE, "--port", str(self._port), *SERVER_FLAGS, *as_flags(engine_args)]
        own = SERVER_ENVIRONMENT | {"VLLM_API_KEY": self.api_key, "VLLM_NO_USAGE_STATS": "1"}
        if cores is not None:
            own |= {"OMP_NUM_THREADS": str(len(cores))}
        with log_file.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | own | (environment or {}),
                start_new_session=True,
                preexec_fn=lambda: _set_up_child(cores),
            )
        try:
            self._wait_until_healthy(start_timeout)
        except BaseException:
            self.close()
            raise

    def _wait_until_healthy(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while self.process.poll() is None:
            if self._listens() and self._is_healthy():
                return
            if time.monotonic() > end:
                raise RunError(f"the vLLM server did not answer within {timeout:.0f} s. {self._log_end()}")
            time.sleep(0.2)
        raise RunError(f"the vLLM server ended with code {self.process.returncode}. {self._log_end()}")

    def _listens(self) -> bool:
        """Whether the server itself listens on its port, and not another process that took the port first."""
        try:
            connections = psutil.Process(self.process.pid).net_connections("tcp")
        except psutil.Error:
            return False
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == self._port for c in connections)

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def _log_end(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "error" in line.lower()][-3:]
        return f"The end of its log, {self.log_file.resolve()}:\n" + "\n".join(errors + lines[-3:])

    def close(self) -> None:
        """Stop the server and its workers. Safe to call twice."""
        if self._closed:
            # The process id may belong to another process by now.
            return
        self._closed = True
        for signum, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            try:
                os.killpg(self.process.pid, signum)
            except ProcessLookupError:
                break
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                continue


def _set_up_child(cores: list[int] | None) -> None:
    # The kernel sends this signal to the server when its parent dies in any way.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if cores is not None:
        os.sched_setaffinity(0, cores)
