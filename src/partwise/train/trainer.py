"""Train a model by subnetworks: the one class that users of this room call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from partwise.checks import InputError, PartwiseError, RunError, check_at_least, check_choice
from partwise.engine import Engine, open_engine
from partwise.models import tensors_of, with_tensors
from partwise.rounds import Schedule, part_seed, run_async, run_rounds
from partwise.runs import Stopped
from partwise.train._batches import Batches, batches_of
from partwise.train._local import Loss, task_loss
from partwise.train._rounds import SubnetRounds, SubnetState
from partwise.train.optimizer import OptimizerSettings
from partwise.train.round_report import RoundReport, ledger_of

if TYPE_CHECKING:
    from torch import nn

    from partwise.engine.arrivals import Traffic
    from partwise.ledger import Ledger
    from partwise.train.method import SubnetMethod
    from partwise.train.ticket import Ticket

__all__ = ["SubnetTrainer"]

BATCHES_FOR_STATISTICS = 50  # of batch normalisation


class SubnetTrainer:
    """Train a model in rounds: cut it into subnetworks, train each apart for a while, put them back, cut anew.

    Parameters
    ----------
    model : torch.nn.Module
        Where to start; it is not changed. Parts are trained on its device.
    method : SubnetMethod
        What a subnetwork is: ``TwIST``, ``IST``, ``ResIST``, ``LoFT``; ``LocalSGD`` and ``DiLoCo`` train the whole model on every worker.
    optimizer : OptimizerSettings, optional
        How a part is trained between two merges. Left out: AdamW with a cosine schedule over all rounds.
    loss : callable, optional
        ``loss(model, batch)``, a mean over the batch. Left out: ``model(**batch).loss`` where a batch is a mapping, cross entropy where it is a pair.
    engine : {"inline", "ray"} or Engine, default="inline"
        Where parts are trained: one after the other in this process, or on Ray workers.
    num_workers : int, optional
        Workers, at most one per part; does not change the result.
    mode : {"sync", "async"}, default="sync"
        async: nobody waits; a part that arrives is blended in and sent off again.
    max_staleness : int, optional
        Of asynchronous runs, see ``partwise.rounds.run_async``.
    seed : int, default=0
        Of the cuts, the order of the data, and dropout.
    num_threads : int, optional
        Threads that train one part. Left out: as many as torch uses here. The same number gives the same bits on every engine.
    probe_every : int, default=1
        Rounds from one measurement of the losses to the next, which costs a pass over one batch of each part and two of the whole model; 0: never.

    Attributes
    ----------
    axes : tuple of Axis
        What is split.
    state : SubnetState or None
        After the last round that was finished, even when a later one failed.
    history : list of RoundReport
        One for each round.
    schedule : Schedule or None
        The order in which parts arrived in the last asynchronous `fit`.
    traffic : Traffic or None
        What the engine counted, messages and faults, in the last `fit`.

    Raises
    ------
    InputError
        When the method cannot split the model, or a setting cannot be used.

    Examples
    --------
    >>> from torch import nn
    >>> from partwise.train import IST, SubnetTrainer
    >>> data = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64)) for _ in range(4)]
    >>> trainer = SubnetTrainer(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), IST(num_parts=2, num_local_steps=2))
    >>> trainer.fit(data, num_rounds=3).history[-1].coverage
    1.0
    """

    def __init__(
        self,
        model: nn.Module,
        method: SubnetMethod,
        *,
        optimizer: OptimizerSettings | None = None,
        loss: Loss | None = None,
        engine: str | Engine = "inline",
        num_workers: int | None = None,
        mode: Literal["sync", "async"] = "sync",
        max_staleness: int | None = None,
        seed: int = 0,
        num_threads: int | None = None,
        probe_every: int = 1,
    ) -> None:
        _check_kinds(method, optimizer)
        check_choice(mode, ("sync", "async"), name="mode")
        check_at_least(seed, 0, name="seed")
        check_at_least(probe_every, 0, name="probe_every")
        if num_threads is not None:
            check_at_least(num_threads, 1, name="num_threads")
        if mode == "async" and not method.supports_async:
            raise InputError("async-unsupported", f"got mode='async' for {type(method).__name__}, which merges all parts at once. Pass mode='sync'.")
        if mode == "sync" and max_staleness is not None:
            raise InputError("staleness-without-async", f"got max_staleness={max_staleness} with mode='sync', where nothing is stale. Leave it out.")
        self.method = method
        self.optimizer = optimizer or OptimizerSettings()
        self.optimizer.state_rule(method.optimizer_state)
        self.loss = loss or task_loss
        self.engine, self.num_workers, self.mode, self.max_staleness = engine, num_workers, mode, max_staleness
        self.seed, self.num_threads, self.probe_every = seed, num_threads or torch.get_num_threads(), probe_every
        self.axes = method.find_axes(model)
        tensors = tensors_of(model)
        _check_start(model, tensors)
        self._device = next(iter(tensors.values())).device
        self._start = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        self._template = with_tensors(model, {name: tensor.detach().to("meta") for name, tensor in tensors.items()})
        self._was_training = model.training
        self.state: SubnetState | None = None
        self.history: list[RoundReport] = []
        self.traffic: Traffic | None = None
        self.schedule: Schedule | None = None
        self._batches: Batches | None = None
        self._model: tuple[SubnetState | None, nn.Module] | None = None

    def fit(
        self,
        loader: Any,
        *,
        num_rounds: int,
        checkpoints: Path | None = None,
        checkpoint_every: int | None = None,
        progress: Callable[[RoundReport, SubnetTrainer], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        replay: Schedule | None = None,
    ) -> SubnetTrainer:
        """Train for some rounds, from the beginning or from a checkpoint. Called again, it starts over.

        Parameters
        ----------
        loader : DataLoader, sequence of DataLoader or iterable of batches
            A DataLoader's rows are dealt to the parts once, and every part walks through its own shard. A sequence of loaders has a shard for each part.
            Batches of anything else are read in order and travel with the parts.
        num_rounds : int
            Rounds in all; the schedule of the learning rate ends there. In asynchronous runs as many arrivals for each part, on average.
        checkpoints : Path, optional
            Folder to save the state to now and then. When it holds a checkpoint of the same run, training goes on from there, and synchronous runs end with the
            same bits as one that was never stopped.
        checkpoint_every : int, optional
            Rounds between two checkpoints. Left out: every ten seconds, or more where saving is slow.
        progress : callable, optional
            Called as ``progress(report, trainer)`` after each round, before it is saved.
        should_stop : callable, optional
            Asked after each round; True saves the state and raises ``Stopped``.
        replay : Schedule, optional
            Of an asynchronous run: the order in which parts arrived in another one, its ``schedule``. Gives the same bits, in this process.

        Returns
        -------
        SubnetTrainer
            Itself.

        Raises
        ------
        InputError
            When the loader does not suit (``too-few-rows``, ``loader-ended``, ...), or ``resume-differs`` when the checkpoint is of another run.
        RunError
            ``loss-not-finite`` naming part, round and step, or when workers fail for good. The last finished round is in ``state``, and saved.
        """
        from partwise.train._saving import Keeper

        check_at_least(num_rounds, 1, name="num_rounds")
        self._batches = batches_of(loader, num_parts=self.method.num_parts, seed=self.seed)
        if self.mode == "async" and self._batches.travels:
            raise InputError(
                "stream-and-async", "got a loader that is read in order with mode='async', expected a DataLoader over a dataset. Pass one, or mode='sync'."
            )
        rounds = self._rounds(num_rounds)
        keeper = Keeper(checkpoints, every=checkpoint_every, settings=self._settings(num_rounds))
        self.history, self.state = [], rounds.first_state(self._start)
        if (saved := keeper.latest()) is not None:
            self.state, self.history = saved
        total = num_rounds * (self.method.num_parts if self.mode == "async" else 1)

        def after_round(_: int, state: SubnetState) -> None:
            before, self.state = self.state, state
            assert state.report is not None
            self.history.append(state.report)
            if progress is not None:
                try:
                    progress(state.report, self)
                except RunError:  # a model that has diverged, as a rule: what was good is kept
                    self.state = before
                    self.history.pop()
                    raise
            stops = should_stop is not None and should_stop()
            if stops or keeper.is_due(state.round_number) or state.round_number == total:
                keeper.save(state, self.history)
            if stops and state.round_number < total:
                raise Stopped(checkpoints or Path())

        if self.state.round_number < total:
            try:
                self._run(rounds, self.state, total - self.state.round_number, after_round, replay)
            except PartwiseError:
                keeper.save(self.state, self.history)  # what was reached before
                raise
        return self

    def restore(self, checkpoint: Path, loader: Any) -> SubnetTrainer:
        """Take over the state and the history of a checkpoint, to look at its model or to cut tickets; to train on, pass ``checkpoints`` to `fit`.

        Parameters
        ----------
        checkpoint : Path
            One that `fit` saved for the same model and method.
        loader : DataLoader, sequence of DataLoader or iterable of batches
            As for `fit`; statistics of batch normalisation are measured on it.

        Raises
        ------
        RunError
            ``checkpoint-damaged``.
        """
        from partwise.train._saving import load_state

        self._batches = batches_of(loader, num_parts=self.method.num_parts, seed=self.seed)
        self.state, self.history, _ = load_state(checkpoint)
        return self

    @property
    def model(self) -> nn.Module:
        """The whole model as it is to be used: on its device, with fresh statistics of batch normalisation. Before `fit`, the model as it was passed."""
        if self._model is None or self._model[0] is not self.state:
            self._model = self.state, self._finished_model()
        return self._model[1]

    @property
    def ledger(self) -> Ledger:
        """A row for every part of every round."""
        return ledger_of(self.history)

    def ticket(self, keep: float, *, seed: int = 0) -> Ticket:
        """A smaller model that keeps a share of every axis, with fresh statistics of batch normalisation; see `partwise.train.ticket.cut`."""
        from partwise.train.ticket import cut

        ticket = cut(self.method, self.model, self.axes, keep, seed=seed)
        self.refresh_statistics(ticket.model)
        return ticket

    def search_ticket(
        self, keep: float, *, evaluate: Callable[[nn.Module], float], num_candidates: int = 16, calibration: Iterable[Any] | None = None, seed: int = 0
    ) -> Ticket:
        """The best of several tickets by ``evaluate``, lowest first; see `partwise.train.ticket.search`."""
        from partwise.train.ticket import search

        def evaluate_ready(small: nn.Module) -> float:
            self.refresh_statistics(small)
            return evaluate(small.eval())

        return search(
            self.method, self.model, self.axes, keep, evaluate=evaluate_ready, num_candidates=num_candidates, calibration=calibration, seed=seed
        )

    def _rounds(self, num_rounds: int) -> SubnetRounds:
        assert self._batches is not None
        return SubnetRounds(
            method=self.method,
            template=self._template,
            axes=self.axes,
            batches=self._batches,
            settings=self.optimizer,
            loss=self.loss,
            num_rounds=num_rounds,
            seed=self.seed,
            is_async=self.mode == "async",
            num_threads=self.num_threads,
            probe_every=self.probe_every,
            device=self._device,
        )

    def _run(
        self, rounds: SubnetRounds, state: SubnetState, number: int, after_round: Callable[[int, SubnetState], None], replay: Schedule | None
    ) -> None:
        if replay is not None:
            if self.mode == "sync":
                raise InputError(
                    "replay-without-async", "got a schedule to replay with mode='sync', where order has no influence. Leave it out, or pass mode='async'."
                )
            if (arrivals := sum(kind == "arrive" for kind, _ in replay.events)) != number:
                raise InputError(
                    "schedule-mismatch",
                    f"got a schedule of {arrivals} arrivals, expected {number}, as many as this run has left. Replay a whole run of its length.",
                )
            _, self.schedule = run_async(rounds, state, schedule=replay, progress=after_round)
            return
        with open_engine(self.engine, num_workers=self.num_workers, num_parts=self.method.num_parts, seed=self.seed) as engine:
            self.traffic = getattr(engine, "traffic", None)
            rounds.clock[0] = time.perf_counter()
            if self.mode == "sync":
                run_rounds(rounds, state, num_rounds=number, engine=engine, progress=after_round)
            else:
                _, self.schedule = run_async(rounds, state, engine=engine, num_updates=number, max_staleness=self.max_staleness, progress=after_round)

    def _settings(self, num_rounds: int) -> dict[str, Any]:
        """What decides the result."""
        shapes = {name: list(tensor.shape) for name, tensor in self._start.items()}
        return {
            "method": repr(self.method),
            "optimizer": repr(self.optimizer),
            "mode": self.mode,
            "seed": self.seed,
            "num_rounds": num_rounds,
            "num_threads": self.num_threads,
            "shapes": shapes,
        }

    def _finished_model(self) -> nn.Module:
        tensors = self._start if self.state is None else self.state.tensors
        model = with_tensors(self._template, {name: tensor.to(self._device, copy=True) for name, tensor in tensors.items()})
        if self.state is not None:
            model = self.method.deployed(model, self.axes)
            self.refresh_statistics(model)
        return model.train(self._was_training)

    def refresh_statistics(self, model: nn.Module) -> None:
        """Measure the statistics of batch normalisation anew, in place, on some of the batches that parts trained on.

        The mean of what subnetworks saw is not what the whole model or a ticket sees.

        Parameters
        ----------
        model : torch.nn.Module
            The whole model or a ticket, left in the mode it is in. One without batch normalisation stays as it is.
        """
        norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.track_running_stats]
        if not norms or self._batches is None:
            return
        with torch.random.fork_rng():
            torch.manual_seed(part_seed(self.seed, round_number=0, part=0))  # dropout, and data that are drawn when they are read
            inputs = [_inputs_of(batch) for batch in self._batches.sample(BATCHES_FOR_STATISTICS)]
            if inputs:
                torch.optim.swa_utils.update_bn(inputs, model, device=self._device)


def _inputs_of(batch: Any) -> torch.Tensor:
    return batch if isinstance(batch, torch.Tensor) else next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]


def _check_kinds(method: object, optimizer: object) -> None:
    from partwise.train.method import SubnetMethod

    if not isinstance(method, SubnetMethod):
        raise InputError("not-a-method", f"got {method!r} as method, expected a method of this room with its settings. Pass TwIST(), for example.")
    if not isinstance(optimizer, OptimizerSettings | None):
        raise InputError("not-a-method", f"got {optimizer!r} as optimizer, expected OptimizerSettings. Pass OptimizerSettings(optimizer='sgd', lr=0.1).")


def _check_start(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "nothing-to-train",
            f"got a {type(model).__name__} without a parameter that requires a gradient, expected at least one. Unfreeze what is to be trained.",
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            num_bad = int((~tensor.isfinite()).sum())
            raise InputError("not-finite", f"{name} of the model has {num_bad} NaN or infinite entries out of {tensor.numel()}. Load the model again.")
