"""Claims about TwIST's nested units: whole rounds first, then the order of their worth."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from partwise.checks import InputError
from partwise.models import tensors_of
from partwise.runs import Stopped
from partwise.train import OptimizerSettings, SubnetTrainer, TwIST
from partwise.train._scores import order_of, sorted_tensors, unit_scores
from tiny import tiny_decoder
from tolerances import assert_close

ADAMW = OptimizerSettings(lr=0.01, schedule="constant", warmup=0.0, grad_clip=None)


def rows(number: int, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(24, (number, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def sorting_run(*, num_rounds: int = 4, last: int | None = None, optimizer: OptimizerSettings = ADAMW, **changes: Any) -> SubnetTrainer:
    settings: dict[str, Any] = {"num_parts": 2, "num_blocks": 4, "num_local_steps": 2, "choice": "nested", "whole_share": 0.5}
    loader = DataLoader(rows(48), batch_size=3)
    trainer = SubnetTrainer(tiny_decoder("Llama"), TwIST(**settings | changes), optimizer=optimizer, num_threads=1)
    with contextlib.suppress(Stopped):
        trainer.fit(loader, num_rounds=num_rounds, should_stop=lambda: len(trainer.history) == last)
    return trainer


def test_parts_hold_everything_in_the_first_share_of_the_rounds():
    held = [[part.parameters for part in report.parts] for report in sorting_run(num_rounds=6).history]
    whole = held[0][0]
    assert [[parameters == whole for parameters in parts] for parts in held] == [[True, True]] * 3 + [[True, False]] * 3


def test_units_are_sorted_by_what_they_are_worth_when_the_rounds_of_whole_models_are_over():
    """The same run without sorting is, at that moment, the same function with the same moments in another order."""
    ours, plain = (sorting_run(num_rounds=2, sort_units=sorts, last=1) for sorts in (True, False))
    scores = unit_scores(plain.model, plain.axes, plain._batches.sample(16), metrics=("fluctuation",))["fluctuation"]
    orders = order_of(scores)
    assert any(order.tolist() != sorted(order.tolist()) for order in orders.values())
    for name, tensor in sorted_tensors(plain.state.tensors, plain.axes, orders).items():
        assert torch.equal(ours.state.tensors[name], tensor), name
    for slot, of_slot in plain.state.optimizer.items():
        for name, tensor in sorted_tensors(of_slot, plain.axes, orders).items():
            assert torch.equal(ours.state.optimizer[slot][name], tensor), (slot, name)
    ids = rows(1, seed=5)[0]["input_ids"][None]
    assert_close(ours.model(ids).logits.detach(), plain.model(ids).logits.detach(), claim="the order of units changes no output")


def test_a_trained_model_is_sorted_before_its_first_round_and_random_units_never():
    def moved(**changes: Any) -> bool:
        still = OptimizerSettings(optimizer="sgd", lr=1e-30, momentum=0.0, weight_decay=0.0)
        found = sorting_run(num_rounds=1, optimizer=still, **changes).state.tensors
        return any(not torch.equal(found[name], tensor) for name, tensor in tensors_of(tiny_decoder("Llama")).items())

    assert moved(whole_share=None)
    assert not moved(whole_share=None, sort_units=False)
    assert not moved(whole_share=None, choice="random", keep=0.5)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_of_whole_rounds_out_of_range_is_refused(share: float):
    with pytest.raises(InputError, match=f"got whole_share={share}, expected at least 0 and below 1") as caught:
        TwIST(whole_share=share)
    assert caught.value.code == "whole-share"


def test_nested_units_without_a_part_that_holds_everything_are_refused():
    with pytest.raises(InputError, match=r"got choice='nested' where no part keeps more than 0\.5, expected one that keeps everything") as caught:
        TwIST(choice="nested", keep=0.5)
    assert caught.value.code == "nested-without-whole"
