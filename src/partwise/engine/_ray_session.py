"""Ray itself, behind the few calls that the engine needs: connect and leave, start and end workers, move things."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from partwise.checks import InputError, RunError, load_extra

__all__ = ["RaySession"]

LOOPBACK = "127.0.0.2"  # a local cluster is nobody else's business; Ray replaces 127.0.0.1 by the address that others see
CONNECT_TIMEOUT_S = 5.0
START_ATTEMPTS = 2  # of a cluster on this machine
# Read by Ray when it is imported or started: it reports nothing to its makers, and does not print on standard output what the engine counts itself.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "^(A worker died|Raylet is terminated|The node with node id)"}


@dataclass(eq=False)
class RaySession:
    """A connection to a cluster.

    Parameters
    ----------
    ray : module
        The package.
    is_ours : bool
        Whether this connection was made here, and so ends here.
    """

    ray: Any
    is_ours: bool

    @classmethod
    def open(cls, address: str | None, *, num_cpus: int | None) -> RaySession:
        """Use the connection that the process has, or make one: to ``address``, or to a cluster started on this machine.

        Raises
        ------
        InputError
            ``cluster-address``, ``cluster-unreachable`` or ``ray-already-connected``.
        RunError
            ``cluster-not-started`` when Ray does not start on this machine, twice.
        MissingExtra
            When Ray is not installed.
        """
        with _environment(QUIET):
            ray = load_extra("ray", extra="ray")
        if ray.is_initialized():
            here = ray.get_runtime_context().gcs_address
            if address not in {None, "auto", here}:
                raise InputError(
                    "ray-already-connected",
                    f"got address={address!r} in a process that is connected to the Ray cluster at {here}, expected the same. "
                    "Leave address out, or call ray.shutdown() first.",
                )
            return cls(ray, is_ours=False)
        if address is not None:
            _check_reachable(address)
        local = {"num_cpus": num_cpus or _num_cores(), "include_dashboard": False, "_node_ip_address": LOOPBACK}
        same_modules = {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}  # of workers on this machine; a cluster has its own
        with _environment(QUIET), _environment({} if address else same_modules, override=True), _own_signals():
            if address is None:
                _start_here(ray, **local)
            else:
                _connect(ray, address)
        return cls(ray, is_ours=True)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self.is_ours:
            with _own_signals():
                self.ray.shutdown()

    @property
    def num_cores(self) -> int:
        """Cores that the whole cluster offers, at least 1."""
        return max(1, int(self.ray.cluster_resources().get("CPU", 1)))

    @property
    def timed_out(self) -> Any:
        """What ``get`` raises when nothing came in time."""
        return self.ray.exceptions.GetTimeoutError

    @property
    def task_failed(self) -> Any:
        """What ``get`` raises when the method raised."""
        return self.ray.exceptions.RayTaskError

    @property
    def lost(self) -> Any:
        """What ``get`` raises when the worker, its machine or its answer is gone."""
        return self.ray.exceptions.RayError

    def new_worker(self, host: type) -> Any:
        """A process that runs ``host``. Ray must not restart it: a new one would lack the method, and the engine would not know."""
        return self.ray.remote(host).options(scheduling_strategy="SPREAD", max_restarts=0, max_task_retries=0).remote()

    def kill(self, worker: Any) -> None:
        """End a worker, whatever it does."""
        self.ray.kill(worker, no_restart=True)

    def put(self, value: Any) -> Any:
        """Reference to ``value`` in the object store, where the processes of one machine share it."""
        return self.ray.put(value)

    def get(self, reference: Any, *, timeout: float | None = None) -> Any:
        """What ``reference`` stands for."""
        return self.ray.get(reference, timeout=timeout)

    def first_ready(self, references: Sequence[Any], *, timeout: float) -> Any:
        """The first of ``references`` that has arrived or failed, or None when the time is up."""
        ready, _ = self.ray.wait(list(references), num_returns=1, timeout=timeout)
        return ready[0] if ready else None

    def pickled(self, value: Any) -> bytes:
        """``value`` as it travels."""
        data: bytes = self.ray.cloudpickle.dumps(value, protocol=5)
        return data

    def unpickled(self, data: bytes) -> Any:
        """What a worker of this cluster sent."""
        return self.ray.cloudpickle.loads(data)

    def pickled_size(self, value: Any) -> int:
        """Bytes of ``value`` when it travels, counted without a copy of its arrays."""
        buffers: list[Any] = []
        data: bytes = self.ray.cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        return len(data) + sum(int(buffer.raw().nbytes) for buffer in buffers)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _connect(ray: Any, address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        raise _unreachable(address, str(error)) from error


def _start_here(ray: Any, **options: Any) -> None:
    """Start a cluster on this machine; a busy one may need a second attempt."""
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:  # what Ray raises when its processes are not up in time has no class of its own
            ray.shutdown()  # what did start
            if attempt + 1 == START_ATTEMPTS:
                raise RunError(
                    "cluster-not-started",
                    f"Ray did not start on this machine, {START_ATTEMPTS} times ({_one_line(error)}), expected a local cluster. Look for a full memory or a "
                    "full /tmp, or try again when the machine is less busy; `ray start --head` and address='auto' use a cluster that is up already.",
                ) from error
        else:
            return


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


def _check_reachable(address: str) -> None:
    """Refuse an address where nobody listens. Ray itself tries for two minutes and then ends the process."""
    if address in {"auto", "local"}:
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise InputError("cluster-address", f"got address={address!r}, expected host:port, ray://host:port or auto. `ray status` shows the address.")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, str(error)) from error


def _unreachable(address: str, reason: str) -> InputError:
    return InputError(
        "cluster-unreachable",
        f"no Ray cluster answers at address={address!r} ({_one_line(reason)}), expected one. "
        "Start it with `ray start --head`, or leave address out to use this machine.",
    )


@contextlib.contextmanager
def _environment(values: dict[str, str], *, override: bool = False) -> Iterator[None]:
    """Set variables, unless they have a value that must not be overridden, and put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if override or before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray takes over: how a run stops is decided by who started it."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is not handler:
            signal.signal(signal.SIGTERM, handler)
