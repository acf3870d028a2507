"""What a model is besides its weights: statistics of batch normalisation, data that are drawn when they are read, and rounds that are not kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from partwise.checks import RunError
from partwise.train import IST, SubnetTrainer
from subnet_runs import dataset, loader, perceptron, same_bits


def normed(*, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(dropout), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_a_finished_run_on_a_stream_gives_its_model_again(tmp_path: Path):
    batches = list(loader())
    models = [SubnetTrainer(normed(), IST(num_parts=2, num_local_steps=2)).fit(batches, num_rounds=2, checkpoints=tmp_path).model for _ in range(2)]
    assert same_bits(models[0].state_dict(), models[1].state_dict())


def test_statistics_leave_the_global_random_state_alone():
    trainer = SubnetTrainer(normed(dropout=0.5), IST(num_parts=2, num_local_steps=2)).fit(loader(), num_rounds=2)
    before = torch.get_rng_state()
    _ = trainer.model
    assert torch.equal(torch.get_rng_state(), before)


def test_statistics_are_measured_on_batches_that_are_one_tensor():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
    trainer = SubnetTrainer(model, IST(num_parts=2, num_local_steps=2), loss=lambda net, batch: (net(batch) - batch).square().mean())
    rows = [torch.randn(8, 6) for _ in range(4)]
    found = trainer.fit(rows, num_rounds=1).model
    assert torch.allclose(found[1].running_mean, found[0](torch.cat(rows)).mean(0), atol=1e-6)


class Noisy(Dataset):  # type: ignore[type-arg]
    """Rows that are drawn when they are read, as augmented images are."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows, classes = dataset()[index]
        return rows + torch.randn(6), classes


def test_augmented_data_depend_on_the_seed_of_the_run_only():
    def run(global_seed: int) -> SubnetTrainer:
        model = perceptron()
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        trainer = SubnetTrainer(model, IST(num_parts=2, num_local_steps=2)).fit(DataLoader(Noisy(), batch_size=8, shuffle=True), num_rounds=2)
        assert torch.equal(torch.get_rng_state(), before)
        return trainer

    one, other = run(1), run(2)
    assert one.state is not None
    assert other.state is not None
    assert same_bits(one.state.tensors, other.state.tensors)
    assert [report.loss_after_merge for report in one.history] == [report.loss_after_merge for report in other.history]


def test_a_round_whose_model_turns_out_broken_is_not_kept(tmp_path: Path):
    def broken_in_round_2(report: object, trainer: SubnetTrainer) -> None:
        if len(trainer.history) == 2:
            raise RunError("diverged", "the model returned NaN")

    trainer = SubnetTrainer(perceptron(), IST(num_parts=2, num_local_steps=2))
    with pytest.raises(RunError, match="NaN"):
        trainer.fit(loader(), num_rounds=4, checkpoints=tmp_path, checkpoint_every=10, progress=broken_in_round_2)
    assert trainer.state is not None
    assert (trainer.state.round_number, len(trainer.history), [path.name for path in tmp_path.iterdir()]) == (1, 1, ["step-00000001"])
