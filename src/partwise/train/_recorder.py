"""What happens between two rounds of a run: a row, now and then a measurement on the validation split, and the progress bar."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from partwise.checkpoint import latest_checkpoint

if TYPE_CHECKING:
    from partwise.engine.arrivals import Traffic
    from partwise.runs import RunFolder
    from partwise.train.job import Job
    from partwise.train.round_report import RoundReport
    from partwise.train.trainer import SubnetTrainer

COUNTS = ("placed_bytes", "num_lost", "num_reissued", "num_late", "num_duplicate", "num_refused")


@dataclass
class Recorder:
    """Told the report of every round: writes the row and moves the progress bar. Rows hold whatever is counted, so that they add up over all processes.

    Parameters
    ----------
    job, run
        What runs, and where it is written.
    traffic : Traffic or None
        What the engine counts.
    """

    job: Job
    run: RunFolder
    traffic: Traffic | None
    _num_messages: int = 0
    _counted: dict[str, int] = field(default_factory=dict)

    def rewind(self) -> None:
        """Drop the rows of rounds after the last checkpoint: they will be measured again."""
        checkpoint = latest_checkpoint(self.run.checkpoints)
        self.run.rewind(-1 if checkpoint is None else int(checkpoint.name.removeprefix("step-")))

    def __call__(self, report: RoundReport, trainer: SubnetTrainer) -> None:
        """After every round."""
        row: dict[str, Any] = {"kind": "round", "step": report.round_number, **report.to_json()}
        if self._is_measured(report.round_number):
            row["valid_loss"] = self.job.loss(trainer.model, self.job.task.valid)
        row |= self._news()
        self.run.append_metrics(row)
        self.run.sync()
        loss = row.get("valid_loss", report.loss_after_merge)
        total = self.job.num_rounds * self.job.reports_per_round
        self.job.report("rounds", report.round_number, total, "" if loss is None else f"loss {loss:.3f}")

    def _is_measured(self, number: int) -> bool:
        """Whether the validation split is read after this round, or arrival: after the first, every so many, and the last."""
        settings, per_round = self.job.settings, self.job.reports_per_round
        assert settings.valid_every is not None
        return number in (1, self.job.num_rounds * per_round) or number % (settings.valid_every * per_round) == 0

    def _news(self) -> dict[str, Any]:
        """Messages to workers and mishaps since the last row."""
        if self.traffic is None:
            return {}
        messages = self.traffic.rows[self._num_messages :]
        self._num_messages += len(messages)
        counts = {name: getattr(self.traffic, name) for name in COUNTS}
        mishaps = {
            name.removeprefix("num_"): count - self._counted.get(name, 0) for name, count in counts.items() if count != self._counted.get(name, 0)
        }
        self._counted = counts
        wire = {"bytes_down": sum(row.bytes_down for row in messages), "bytes_up": sum(row.bytes_up for row in messages)}
        return ({"wire": wire} if messages else {}) | ({"mishaps": mishaps} if mishaps else {})
