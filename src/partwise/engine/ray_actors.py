"""Parts on the workers of a Ray cluster. The only file that imports Ray, and the only place where anything is pickled: inside one trusted cluster.

A method, and the data that it holds, is put into the object store once and kept by the workers; after that only parts and results travel. Part
``k`` goes to worker ``k % num_workers`` every time. Workers may die, dawdle or return rubbish: the part is sent again, and because ``work`` is a pure
function the result is the same.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic, sleep
from typing import Any, TypeVar

from partwise.checks import InputError, PartwiseError, RunError, check_at_least
from partwise.engine import Worker
from partwise.engine._ray_flights import Flight, Patience, Placed, Seat, Task
from partwise.engine._ray_session import RaySession
from partwise.engine.arrivals import Traffic, TrafficRow, flaw_of
from partwise.engine.inline import inline
from partwise.linalg.products import one_blas_thread

__all__ = ["RayActors"]

logger = logging.getLogger(__name__)

Part = TypeVar("Part")
Result = TypeVar("Result")

START_TIMEOUT_S = 120.0  # a cluster that is busy or still growing may take a while; past this it is not going to happen
START_ATTEMPTS = 8  # with growing pauses: for some seconds after a machine is gone, Ray still puts new workers there
POLL_S = 1.0  # how long one wait lasts when there is no deadline; Ctrl-C is noticed in between


class _Host:
    """What lives in a worker process: the method, and with it the data."""

    def adopt(self, method: Worker[Any, Any]) -> str:
        import ray

        self._method = method
        return f"process {os.getpid()} on {ray.util.get_node_ip_address()}"

    def work(self, payload: bytes) -> bytes:
        from ray import cloudpickle

        with one_blas_thread():  # the same sums as everywhere else
            results = inline(self._method, cloudpickle.loads(payload))
        pickled: bytes = cloudpickle.dumps(results, protocol=5)
        return pickled


@dataclass(eq=False)
class RayActors:
    """Workers on a Ray cluster, as an engine: open it with ``with``, then pass it to ``run_rounds``, ``run_async`` or an estimator.

    Parameters
    ----------
    num_workers : int, optional
        By default one for each core of the cluster, and at most ``max_workers``.
    address : str, optional
        ``host:port`` or ``ray://host:port`` of a running cluster, or ``auto`` for the one of this machine. Without it, a cluster that the process is
        connected to already is used, or else one is started here that ends with the block.
    timeout : float, optional
        Seconds that a worker may take for one message: its parts of one round, or one part of an asynchronous run. After that the parts are sent to a
        fresh worker too, and the answer that comes first counts. By default ten times what the slowest answer took and at least a minute, or ten minutes
        while there is none; parts that were sent ``max_attempts`` times are then waited for on, with a warning. ``float("inf")``: no limit.
    max_attempts : int, default=3
        How often a part is sent before the run ends with an error.
    max_workers : int, optional
        Upper limit of the default of ``num_workers``.

    Attributes
    ----------
    traffic : Traffic
        Bytes by worker and round, and counts of lost workers, late, duplicate and refused results.

    Raises
    ------
    InputError
        ``below-minimum`` or ``timeout-range``; on entering the block ``cluster-address``, ``cluster-unreachable`` or ``ray-already-connected``.
    RunError
        On a call: ``worker-not-started``, ``worker-lost``, ``worker-timeout``, ``worker-failed`` or ``result-refused``.
    MissingExtra
        On entering the block, when Ray is not installed.
    """

    num_workers: int | None = None
    address: str | None = field(default=None, kw_only=True)
    timeout: float | None = field(default=None, kw_only=True)
    max_attempts: int = field(default=3, kw_only=True)
    max_workers: int | None = field(default=None, kw_only=True, repr=False)
    traffic: Traffic = field(default_factory=Traffic, init=False, repr=False)
    _session: RaySession | None = field(default=None, init=False, repr=False)
    _seats: dict[int, Seat] = field(default_factory=dict, init=False, repr=False)
    _flights: dict[Any, Flight] = field(default_factory=dict, init=False, repr=False)  # by the reference of the answer
    _retired: list[Any] = field(default_factory=list, init=False, repr=False)  # workers past their time that may still answer
    _answers: deque[Task] = field(default_factory=deque, init=False, repr=False)
    _placed: Placed = field(default_factory=Placed, init=False, repr=False)
    _round_number: int = field(default=0, init=False, repr=False)
    _patience: Patience = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("num_workers", "max_attempts", "max_workers"):
            if getattr(self, name) is not None:
                check_at_least(getattr(self, name), 1, name=name)
        if self.timeout is not None and not self.timeout > 0:
            raise InputError("timeout-range", f"got timeout={self.timeout}, expected more than 0 seconds. Pass timeout=60, or leave it out.")
        self._patience = Patience(self.timeout)

    def __enter__(self) -> RayActors:
        self._session = RaySession.open(self.address, num_cpus=self.num_workers)
        if self.num_workers is None:
            self.num_workers = min(self._session.num_cores, self.max_workers or self._session.num_cores)
        return self

    def __exit__(self, *_: object) -> None:
        session, self._session = self._opened, None
        for handle in [*self._retired, *(seat.handle for seat in self._seats.values() if seat.handle is not None)]:
            session.kill(handle)
        for container in (self._seats, self._flights, self._retired, self._answers):
            container.clear()
        self._placed = Placed()
        session.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> RayActors:
        return self  # an open engine is shared by the copies of what uses it, as sklearn.base.clone makes them

    def __reduce__(self) -> tuple[Any, ...]:  # another process gets the settings and opens its own
        settings = {name: getattr(self, name) for name in ("address", "timeout", "max_attempts", "max_workers")}
        return functools.partial(RayActors, self.num_workers, **settings), ()

    @property
    def _opened(self) -> RaySession:
        if self._session is None:
            raise InputError("engine-closed", "RayActors is not open, expected a call inside its block. Write: with RayActors(...) as engine: ...")
        return self._session

    @property
    def workers(self) -> tuple[str, ...]:
        """Who is at work: number, process and machine of each worker, as errors name them."""
        return tuple(str(seat) for _, seat in sorted(self._seats.items()) if seat.handle is not None)

    def __call__(self, method: Worker[Part, Result], parts: Sequence[Part]) -> list[Result]:
        """Results of ``parts`` in their order: every worker gets its parts in one message, and nobody goes on before all have answered."""
        self.abandon()
        tasks = [Task(method, part, self._seat(getattr(part, "index", i))) for i, part in enumerate(parts)]
        self._round_number += 1
        self._send(tasks)
        while any(task.state == "open" for task in tasks):
            self._step()
        self._answers.clear()
        return [task.result for task in tasks]

    def is_free(self, index: int) -> bool:
        """Whether the worker of part ``index`` has no part that somebody waits for."""
        seat = self._seat(index)
        return not any(flight.seat is seat and task.state == "open" for flight in self._flights.values() for task in flight.tasks)

    def submit(self, method: Worker[Any, Any], part: Any) -> None:
        """Send one part to its worker."""
        self._round_number += 1
        self._send([Task(method, part, self._seat(part.index))])

    def collect(self) -> Any:
        """The next result that arrives."""
        while not self._answers:
            self._step()
        return self._answers.popleft().result

    def abandon(self) -> None:
        """Forget what is under way. Workers finish it; what they send back is counted as late and dropped."""
        for flight in self._flights.values():
            for task in flight.tasks:
                task.state = "abandoned" if task.state == "open" else task.state
        self._answers.clear()

    def _seat(self, index: int) -> Seat:
        _ = self._opened
        number = index % (self.num_workers or 1)
        return self._seats.setdefault(number, Seat(number))

    def _send(self, tasks: Sequence[Task]) -> None:
        seats = {task.seat.number: task.seat for task in tasks}
        if tasks:
            self._start(tasks[0].method, seats.values())
        for seat in seats.values():
            own = [task for task in tasks if task.seat is seat]
            payload = self._opened.pickled([task.part for task in own])
            self.traffic.rows.append(TrafficRow(self._round_number, seat.number, len(payload), 0))
            for task in own:
                task.num_sent += 1
            flight = Flight(seat, seat.handle, str(seat), own, len(self.traffic.rows) - 1, num_sent=max(task.num_sent for task in own))
            self._flights[seat.handle.work.remote(payload)] = flight

    def _start(self, method: Any, seats: Iterable[Seat]) -> None:
        """Somebody on every seat who holds the method; all start at the same time."""
        session = self._opened
        if self._placed.method is not method:
            self._placed = Placed(method, session.put(method))
            self._patience.forget()  # another method takes another time
            self.traffic.placed_bytes += session.pickled_size(method)
        for attempt in range(START_ATTEMPTS):
            greetings = {}
            for seat in seats:
                if seat.handle is not None and seat.method is not method and any(flight.handle is seat.handle for flight in self._flights.values()):
                    self._retire(seat)  # still busy with something else
                if seat.handle is None:
                    seat.handle = session.new_worker(_Host)
                if seat.method is not method:
                    greetings[seat.number] = seat.handle.adopt.remote(self._placed.reference)
            for seat in seats:
                if seat.number in greetings and self._greeted(seat, greetings[seat.number], is_last=attempt + 1 == START_ATTEMPTS):
                    seat.method = method
            if all(seat.method is method for seat in seats):
                return
            sleep(0.1 * 2**attempt)

    def _greeted(self, seat: Seat, greeting: Any, *, is_last: bool) -> bool:
        session = self._opened
        try:
            seat.where = session.get(greeting, timeout=START_TIMEOUT_S)
        except session.timed_out as error:
            raise RunError(
                "worker-not-started",
                f"worker {seat.number} did not start within {START_TIMEOUT_S:g} s, expected a free core. Look at `ray status`, or pass fewer workers.",
            ) from error
        except session.task_failed as error:
            raise self._failure(str(seat), error) from error
        except session.lost as error:
            seat.vacate()
            self.traffic.num_lost += 1
            if is_last:
                raise self._worker_lost(seat.number, f"while it took over the method, {START_ATTEMPTS} times", error) from error
            return False
        return True

    def _step(self) -> None:
        """Wait for one answer, or until somebody's time is up."""
        now = monotonic()
        waiting = [self._patience.deadline(flight) for flight in self._flights.values() if not flight.is_late]
        reference = self._opened.first_ready(list(self._flights), timeout=max(0.0, min([POLL_S, *(deadline - now for deadline in waiting)])))
        if reference is not None:
            self._land(reference)
            return
        for flight in list(self._flights.values()):
            if not flight.is_late and self._patience.deadline(flight) <= monotonic():
                self._give_up_on(flight)

    def _land(self, reference: Any) -> None:
        session, flight = self._opened, self._flights.pop(reference)
        wanted = any(task.state == "open" for task in flight.tasks)
        try:
            payload = session.get(reference)
        except session.task_failed as error:
            self._release(flight)
            if wanted:
                self.abandon()
                raise self._failure(flight.where, error) from error
            return
        except session.lost as error:
            self._replace_worker(flight, error)
            return
        self.traffic.rows[flight.row] = replace(self.traffic.rows[flight.row], bytes_up=len(payload))
        if wanted:
            self._patience.learn(flight)
        self._release(flight)
        refused: list[tuple[Task, str]] = []
        for task, result in zip(flight.tasks, session.unpickled(payload), strict=True):
            self.traffic.num_late += flight.is_late or task.state == "abandoned"
            self.traffic.num_duplicate += task.state == "answered"
            if task.state != "open":
                continue
            flaw = flaw_of(task.method, task.part, result)
            if flaw is None:
                task.result, task.state = result, "answered"
                self._answers.append(task)
            else:
                self.traffic.num_refused += 1
                refused += [] if flight.is_late else [(task, flaw)]  # a late one was sent again already
        for task, flaw in refused:
            if task.num_sent >= self.max_attempts:
                self.abandon()
                raise RunError(
                    "result-refused",
                    f"{flight.where} returned {flaw}; part {getattr(task.part, 'index', '?')} was sent {task.num_sent} times, expected a sound result. "
                    "Check the data, or lower the step size; if only one machine does this, take it out of the cluster.",
                )
        self._send_again([task for task, _ in refused])

    def _send_again(self, tasks: Sequence[Task]) -> None:
        self.traffic.num_reissued += len(tasks)
        self._send(tasks)

    def _give_up_on(self, flight: Flight) -> None:
        """A fresh worker takes over; the old one may still answer."""
        overdue = [other for other in self._flights.values() if other.handle is flight.handle]  # whatever waits behind it too
        tasks = [task for other in overdue for task in other.tasks if task.state == "open"]
        tired = [task for task in tasks if task.num_sent >= self.max_attempts]
        waited = f"{flight.where} has not answered within {self._patience.seconds(flight):.3g} s"
        if tired and self.timeout is None:
            flight.num_sent += 1  # nobody said how long is too long
            logger.warning("%s, after its parts were sent %s times: waiting on. Pass a timeout to end such a run.", waited, tired[0].num_sent)
            return
        for other in overdue:
            other.is_late = True
        if tired:
            self.abandon()
            raise RunError(
                "worker-timeout",
                f"part {getattr(tired[0].part, 'index', '?')} was sent {tired[0].num_sent} times, last to {flight.where}, and got no answer "
                f"within {self.timeout:g} s, expected one. Pass a longer timeout, or fewer local steps.",
            )
        if flight.seat.handle is flight.handle:
            self._retire(flight.seat)
        if tasks:
            logger.warning("%s: sending its parts to a fresh worker too", waited)
        self._send_again(tasks)

    def _retire(self, seat: Seat) -> None:
        self._retired.append(seat.handle)
        seat.vacate()
        if len(self._retired) > (self.num_workers or 1):  # so many hang that they would fill the machine
            self._opened.kill(self._retired.pop(0))

    def _release(self, flight: Flight) -> None:
        """A retired worker whose last answer is there has done its duty."""
        if flight.handle in self._retired and not any(other.handle is flight.handle for other in self._flights.values()):
            self._retired.remove(flight.handle)
            self._opened.kill(flight.handle)

    def _replace_worker(self, flight: Flight, error: BaseException) -> None:
        if flight.handle in self._retired:
            self._retired.remove(flight.handle)
        if flight.seat.handle is flight.handle:
            self._opened.kill(flight.handle)  # it may only be out of reach
            flight.seat.vacate()
            self.traffic.num_lost += 1
        tasks = [task for task in flight.tasks if task.state == "open"] if not flight.is_late else []
        tired = [task for task in tasks if task.num_sent >= self.max_attempts]
        if tired:
            self.abandon()
            work = f"at part {getattr(tired[0].part, 'index', '?')}, which was sent {tired[0].num_sent} times"
            raise self._worker_lost(flight.seat.number, work, error) from error
        self._send_again(tasks)

    def _worker_lost(self, number: int, work: str, error: BaseException) -> RunError:
        reason = " ".join(str(error).split())[:300]
        return RunError("worker-lost", f"worker {number} died {work}, expected it to live. Look for a full memory; pass fewer workers. Ray says: {reason}")

    def _failure(self, where: str, error: Any) -> PartwiseError:
        cause = error.cause
        if isinstance(cause, PartwiseError):
            return cause
        return RunError(
            "worker-failed",
            f"{where} raised {type(cause).__name__}: {str(cause).partition(chr(10))[0]}, expected a result. Run it with engine='inline' to see where; "
            "a module that is not found must be installed on every machine of the cluster.",
        )
