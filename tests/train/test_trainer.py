"""Rounds of subnetworks: exact limits, the same bits everywhere, what is reported."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from partwise.checkpoint import latest_checkpoint
from partwise.checks import InputError, RunError
from partwise.engine.inline import InlineWorkers, inline
from partwise.models import tensors_of, with_tensors
from partwise.runs import Stopped
from partwise.train import OptimizerSettings, SubnetTrainer
from partwise.train._batches import batches_of
from partwise.train._rounds import SubnetRounds
from subnet_runs import ADAMW, SGD, Halves, Whole, dataset, loader, perceptron, same_bits
from tolerances import assert_close


def rounds_of(trainer: SubnetTrainer, *, num_rounds: int = 4) -> SubnetRounds:
    trainer._batches = batches_of(loader(), num_parts=trainer.method.num_parts, seed=trainer.seed)
    return trainer._rounds(num_rounds)


def plain_training(model: nn.Module, settings: OptimizerSettings, batches: Sequence[Any], *, steps_per_optimizer: int | None = None) -> nn.Module:
    """The slow twin: an ordinary loop."""
    model = copy.deepcopy(model).train()
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    extra = {"betas": settings.betas} if settings.optimizer == "adamw" else {"momentum": settings.momentum}
    for step, (inputs, classes) in enumerate(batches):
        if step % (steps_per_optimizer or len(batches)) == 0:
            optimizer = kinds[settings.optimizer](model.parameters(), lr=1.0, weight_decay=settings.weight_decay, **extra)
        optimizer.param_groups[0]["lr"] = settings.lr_at(step, len(batches))
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), classes).backward()
        if settings.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
    return model


@pytest.mark.parametrize("settings", [SGD, ADAMW, OptimizerSettings(optimizer="sgd", momentum=0.9)], ids=["sgd", "adamw", "momentum"])
def test_one_part_that_holds_everything_is_ordinary_training_to_the_bit(settings: OptimizerSettings):
    model = perceptron()
    trainer = SubnetTrainer(model, Whole(optimizer_state="reset" if settings.momentum and settings.optimizer == "sgd" else None), optimizer=settings)
    trainer.fit(loader(), num_rounds=5)
    batches = [batch for number in range(1, 6) for batch in trainer._batches.of(0, round_number=number, steps=(3,))]
    restarts = 3 if settings.optimizer == "sgd" else None  # carried moments make AdamW one run
    twin = plain_training(model, settings, batches, steps_per_optimizer=restarts)
    assert same_bits(tensors_of(trainer.model), tensors_of(twin))


def test_parts_that_hold_everything_are_periodic_averaging():
    model = perceptron()
    trainer = SubnetTrainer(model, Whole(num_parts=3), optimizer=SGD).fit(loader(), num_rounds=1)
    twins = [plain_training(model, SGD, trainer._batches.of(part, round_number=1, steps=(3, 3, 3))) for part in range(3)]
    for name, tensor in tensors_of(trainer.model).items():
        mean = torch.stack([tensors_of(twin)[name] for twin in twins]).mean(0)
        assert_close(tensor.detach(), mean.detach(), claim=f"{name} is the mean of three models")


@pytest.mark.parametrize("disjoint", [True, False])
def test_parts_that_come_back_as_they_went_change_nothing(disjoint: bool):
    rounds = rounds_of(SubnetTrainer(perceptron(), Halves(disjoint=disjoint, num_parts=3), optimizer=ADAMW))
    state = rounds.first_state(tensors_of(perceptron(seed=1)))
    results = [rounds.work(part) for part in rounds.split(state)]
    untouched = [
        type(result)(**vars(result) | {"tensors": part.tensors, "moments": part.moments})
        for part, result in zip(rounds.split(state), results, strict=True)
    ]
    assert same_bits(rounds.merge(state, untouched).tensors, state.tensors)


def test_what_nobody_held_keeps_its_bits_and_what_one_held_gets_that_ones():
    rounds = rounds_of(SubnetTrainer(perceptron(), Halves(keep=0.25), optimizer=SGD))
    state = rounds.first_state(tensors_of(perceptron(seed=1)))
    [first, second] = (rounds.work(part) for part in rounds.split(state))
    after = rounds.merge(state, [second, first])
    parts = rounds.parts_of(1)
    nobody = sorted(set(range(8)) - {unit for part in parts for unit in part.units["0"]})
    assert torch.equal(after.tensors["0.weight"][nobody], state.tensors["0.weight"][nobody])
    assert torch.equal(after.tensors["0.weight"][list(parts[0].units["0"])], first.tensors["0.weight"])
    assert_close(after.tensors["5.bias"], (first.tensors["5.bias"] + second.tensors["5.bias"]) / 2, claim="shared entries are the mean")


def test_results_merge_to_the_same_bits_in_any_order_and_when_some_come_twice():
    rounds = rounds_of(SubnetTrainer(perceptron(), Halves(num_parts=3), optimizer=ADAMW))
    state = rounds.first_state(tensors_of(perceptron(seed=1)))
    results = [rounds.work(part) for part in rounds.split(state)]
    assert same_bits(rounds.merge(state, results).tensors, rounds.merge(state, [results[2], results[0], results[1], results[0]]).tensors)


def test_work_leaves_its_part_as_it_was_so_that_it_can_be_sent_again():
    rounds = rounds_of(SubnetTrainer(perceptron(dropout=0.3), Halves(), optimizer=ADAMW))
    [part, _] = rounds.split(rounds.first_state(tensors_of(perceptron(seed=1))))
    assert same_bits(rounds.work(part).tensors, rounds.work(part).tensors)


def test_factors_act_on_the_input_of_readers_and_stay_out_of_the_weights():
    trainer = SubnetTrainer(perceptron(), Halves(num_local_steps=1), optimizer=SGD)
    rounds = rounds_of(trainer)
    state = rounds.first_state(tensors_of(perceptron(seed=1)))
    result = rounds.work(rounds.split(state)[0])
    part = rounds.parts_of(1)[0]
    model = with_tensors(perceptron(), {name: tensor.clone() for name, tensor in state.tensors.items()})
    [(inputs, classes)] = trainer._batches.of(0, round_number=1, steps=(1, 1))
    held = {name: torch.zeros(8).index_fill_(0, torch.tensor(units), 2.0) for name, units in part.units.items()}
    hidden = torch.relu(model[0](inputs)) * held["0"]
    hidden = torch.relu(model[3](hidden)) * held["3"]
    loss = functional.cross_entropy(model[5](hidden), classes)
    assert_close(torch.tensor(result.loss_after_split), loss.detach(), claim="the subnetwork is the masked whole with doubled activations")
    loss.backward()
    rows, columns = torch.tensor(part.units["3"]), torch.tensor(part.units["0"])
    step = (model[3].weight - 0.1 * model[3].weight.grad)[rows][:, columns]
    assert_close(result.tensors["3.weight"], step.detach(), claim="and so is its gradient")


def test_the_model_that_was_passed_and_the_random_state_stay_as_they_were():
    model, before = perceptron(dropout=0.5), tensors_of(perceptron(dropout=0.5))
    torch.manual_seed(3)
    random_state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    SubnetTrainer(model, Halves(), num_threads=1).fit(loader(), num_rounds=2)
    assert same_bits(tensors_of(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == num_threads
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not():
    def run(seed: int) -> dict[str, torch.Tensor]:
        return tensors_of(SubnetTrainer(perceptron(dropout=0.2), Halves(), seed=seed).fit(loader(), num_rounds=3).model)

    assert same_bits(run(0), run(0))
    assert not same_bits(run(0), run(1))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("settings", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_ray_workers_give_the_bits_of_this_process(settings: OptimizerSettings):
    pytest.importorskip("ray", reason="tests the Ray engine")

    def run(engine: str) -> SubnetTrainer:
        return SubnetTrainer(perceptron(dropout=0.2), Halves(), optimizer=settings, engine=engine, num_threads=1).fit(loader(), num_rounds=3)

    here, there = run("inline"), run("ray")
    assert same_bits(here.state.tensors, there.state.tensors)
    assert there.traffic.bytes_up > sum(report.bytes_up for report in there.history) > 0


def test_asynchronous_runs_repeat_with_their_seed_and_move_by_the_blend():
    def run(blend: float) -> SubnetTrainer:
        return SubnetTrainer(perceptron(), Halves(num_parts=3, blend=blend), optimizer=SGD, mode="async").fit(loader(), num_rounds=4)

    first, again = run(0.5), run(0.5)
    assert same_bits(first.state.tensors, again.state.tensors)
    assert sum(first.state.updates) == 12 == len(first.history)
    start = {name: tensor.detach() for name, tensor in tensors_of(perceptron()).items()}
    moved = [sum(float((tensor - start[name]).norm()) for name, tensor in run(blend).state.tensors.items()) for blend in (0.1, 1.0)]
    assert moved[0] < moved[1]


def test_an_asynchronous_run_replays_to_the_same_bits_from_its_schedule():
    def trainer(seed: int) -> SubnetTrainer:
        return SubnetTrainer(perceptron(), Halves(num_parts=3), optimizer=SGD, mode="async", engine=InlineWorkers(seed=seed))

    lived, other = (trainer(seed).fit(loader(), num_rounds=4) for seed in (3, 4))
    assert not same_bits(lived.state.tensors, other.state.tensors)
    assert same_bits(trainer(4).fit(loader(), num_rounds=4, replay=lived.schedule).state.tensors, lived.state.tensors)
    with pytest.raises(InputError, match="got a schedule to replay with mode='sync'"):
        SubnetTrainer(perceptron(), Halves(num_parts=3), optimizer=SGD).fit(loader(), num_rounds=4, replay=lived.schedule)
    with pytest.raises(InputError, match="got a schedule of 12 arrivals, expected 9, as many as this run has left"):
        trainer(4).fit(loader(), num_rounds=3, replay=lived.schedule)


def test_workers_of_different_speed_make_their_own_numbers_of_steps():
    trainer = SubnetTrainer(perceptron(), Halves(num_local_steps=(1, 4)), optimizer=SGD).fit(loader(), num_rounds=2)
    assert [part.num_steps for part in trainer.history[0].parts] == [1, 4]
    assert trainer.history[0].num_samples == 40


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path):
    def trainer() -> SubnetTrainer:
        return SubnetTrainer(perceptron(dropout=0.2), Halves(), optimizer=ADAMW)

    whole = trainer().fit(loader(), num_rounds=6)
    stopping = trainer()
    with pytest.raises(Stopped):
        stopping.fit(loader(), num_rounds=6, checkpoints=tmp_path, should_stop=lambda: len(stopping.history) == 3)
    assert stopping.state.round_number == 3
    resumed = trainer().fit(loader(), num_rounds=6, checkpoints=tmp_path)
    assert same_bits(resumed.state.tensors, whole.state.tensors)
    assert [report.loss_after_merge for report in resumed.history] == [report.loss_after_merge for report in whole.history]
    assert all(torch.equal(resumed.state.holders[name], whole.state.holders[name]) for name in whole.state.holders)


def test_a_checkpoint_gives_the_model_and_the_history_of_its_run(tmp_path: Path):
    def trainer() -> SubnetTrainer:
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        torch.manual_seed(0)
        nn.init.normal_(model[0].weight)
        nn.init.normal_(model[3].weight)
        return SubnetTrainer(model, Halves(), optimizer=SGD)

    done = trainer().fit(loader(), num_rounds=2, checkpoints=tmp_path)
    again = trainer().restore(latest_checkpoint(tmp_path), loader())
    assert same_bits(tensors_of(again.model), tensors_of(done.model))
    assert [report.to_json() for report in again.history] == [report.to_json() for report in done.history]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"method": Halves(num_parts=3)}, r"method: got Halves\(num_parts=3.*expected Halves\(num_parts=2"),
        ({"seed": 1}, "seed: got 1, expected 0"),
        ({"optimizer": SGD}, "optimizer: got"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(changes: dict[str, Any], text: str, tmp_path: Path):
    usual: dict[str, Any] = {"method": Halves(), "optimizer": ADAMW, "seed": 0}
    SubnetTrainer(perceptron(), **usual).fit(loader(), num_rounds=2, checkpoints=tmp_path)
    with pytest.raises(InputError, match=text) as caught:
        SubnetTrainer(perceptron(), **usual | changes).fit(loader(), num_rounds=2, checkpoints=tmp_path)
    assert caught.value.code == "resume-differs"


def test_a_loss_that_is_not_finite_names_part_round_and_step_and_keeps_the_last_good_state(tmp_path: Path):
    calls = 0

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return functional.cross_entropy(model(batch[0]), batch[1]) * (float("nan") if calls == 12 else 1.0)

    trainer = SubnetTrainer(perceptron(), Halves(), optimizer=SGD, loss=loss, probe_every=0)
    with pytest.raises(
        RunError, match=r"the loss of part 1 in round 2 became nan at its local step 3 of 3.*Lower the learning rate \(it was 0.1\)"
    ) as caught:
        trainer.fit(loader(), num_rounds=4, checkpoints=tmp_path)
    assert caught.value.code == "loss-not-finite"
    assert trainer.state.round_number == 1
    assert all(bool(tensor.isfinite().all()) for tensor in tensors_of(trainer.model).values())
    resumed = SubnetTrainer(perceptron(), Halves(), optimizer=SGD, probe_every=0).fit(loader(), num_rounds=4, checkpoints=tmp_path)
    assert same_bits(
        resumed.state.tensors, SubnetTrainer(perceptron(), Halves(), optimizer=SGD, probe_every=0).fit(loader(), num_rounds=4).state.tensors
    )


class LosesPart:
    """An engine that loses the result of one part for good."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, method: Any, parts: Sequence[Any]) -> list[Any]:
        return [result for result in inline(method, parts) if result.index != self.index]


def test_a_lost_part_costs_its_result_and_is_counted():
    trainer = SubnetTrainer(perceptron(), Halves(disjoint=True), engine=LosesPart(1), optimizer=SGD).fit(loader(), num_rounds=3)
    report = trainer.history[-1]
    assert (report.num_arrived, report.coverage, report.parts[1].was_lost) == (1, 0.5, True)
    assert report.bytes_up < report.bytes_down
    assert [row.status for row in trainer.ledger.parts] == ["kept", "lost"] * 3
    assert trainer.state.updates == (3, 0)


def test_a_broken_result_is_refused_and_its_part_is_trained_again():
    trainer = SubnetTrainer(perceptron(), Halves(), optimizer=SGD)
    rounds, engine, broken = rounds_of(trainer), InlineWorkers(), [0]
    state = rounds.first_state(tensors_of(perceptron()))
    part = rounds.split(state)[0]

    class Breaks:
        def work(self, sent: Any) -> Any:
            result = rounds.work(sent)
            if not broken[0]:
                result.tensors["0.weight"][0, 0] = float("nan")
            broken[0] += 1
            return result

        check = rounds.check

    [result] = engine(Breaks(), [part])
    assert engine.traffic.num_refused == 1
    assert same_bits(result.tensors, rounds.work(part).tensors)


def test_bytes_are_those_of_the_tensors_that_travel():
    trainer = SubnetTrainer(perceptron(), Halves(), optimizer=SGD)
    rounds = rounds_of(trainer)
    state = rounds.first_state(tensors_of(perceptron()))
    parts = rounds.split(state)
    report = rounds.merge(state, [rounds.work(part) for part in parts]).report
    assert report.bytes_down == sum(part.tensors.num_bytes for part in parts)
    assert report.parts[0].parameters == (6 * 4 + 4) + (4 * 4 + 4) + (4 * 3 + 3)


def test_carried_moments_triple_what_is_sent_but_for_the_counts():
    reset, carried = (
        SubnetTrainer(perceptron(), Halves(optimizer_state=rule), optimizer=ADAMW).fit(loader(), num_rounds=1).history[0].bytes_down
        for rule in ("reset", "carry")
    )
    assert 3 * reset < carried < 4 * reset


def test_statistics_of_batch_normalisation_are_those_of_the_whole_model():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    trainer = SubnetTrainer(model, Halves(), optimizer=SGD).fit(loader(), num_rounds=3)
    for trained in (trainer.model, trainer.ticket(0.5).model, trainer.search_ticket(0.5, evaluate=lambda small: 0.0).model):
        seen = torch.stack([trained[0](batch[0]).mean(0) for batch in trainer._batches.sample(50)]).mean(0)
        assert_close(trained[1].running_mean, seen.detach(), claim="the mean over batches of what this model's norm reads")


def test_statistics_of_batch_normalisation_are_measured_on_streams_too():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    batches = list(loader())
    trainer = SubnetTrainer(model, Halves(), optimizer=SGD).fit(batches, num_rounds=1)
    seen = torch.stack([trainer.model[0](batch[0]).mean(0) for batch in batches]).mean(0)
    assert_close(trainer.model[1].running_mean, seen.detach(), claim="the first batches of the stream, however many were trained on")


def test_measuring_losses_changes_nothing():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    often, never = (SubnetTrainer(model, Halves(), optimizer=SGD, probe_every=every).fit(loader(), num_rounds=3).state for every in (1, 0))
    assert same_bits(often.tensors, never.tensors)


def test_the_losses_of_a_round_go_down_while_parts_train():
    history = SubnetTrainer(perceptron(), Halves(num_local_steps=10), optimizer=SGD, probe_every=2).fit(loader(), num_rounds=6).history
    assert history[0].loss_after_local < history[0].loss_after_split
    assert history[-1].loss_after_merge < history[0].loss_after_merge
    assert [report.loss_after_merge is not None for report in history] == [True, True, False, True, False, True]


def test_the_whole_model_learns():
    trainer = SubnetTrainer(perceptron(width=32), Halves(num_parts=4, num_local_steps=5), optimizer=SGD).fit(loader(256), num_rounds=60)
    rows, classes = dataset(256).tensors
    assert float((trainer.model(rows).argmax(1) == classes).double().mean()) > 0.9


@pytest.mark.parametrize(
    ("call", "code", "text"),
    [
        (lambda: SubnetTrainer(perceptron(), Halves(), mode="later"), "unknown-choice", "mode='later' is not known"),
        (lambda: SubnetTrainer(perceptron(), Halves(), max_staleness=2), "staleness-without-async", "max_staleness=2 with mode='sync'"),
        (lambda: SubnetTrainer(perceptron(), Halves(optimizer_state="none")), "optimizer-has-state", "optimizer_state='none' with adamw"),
        (lambda: SubnetTrainer(perceptron(), Halves(num_local_steps=(1, 2, 3))), "steps-per-part", "got 3 numbers of local steps for 2 parts"),
        (lambda: Halves(num_local_steps=0), "below-minimum", "num_local_steps=0"),
        (lambda: Halves(blend=0.0), "blend-range", "got blend=0.0"),
        (
            lambda: SubnetTrainer(perceptron(), Halves(), num_workers=3).fit(loader(), num_rounds=1),
            "more-workers-than-parts",
            "num_workers=3 for 2 parts",
        ),
        (lambda: SubnetTrainer(perceptron(), Halves()).fit(loader(), num_rounds=0), "below-minimum", "num_rounds=0"),
        (lambda: SubnetTrainer(perceptron(), Halves()).fit(3, num_rounds=1), "no-loader", "got a int as loader"),
        (lambda: SubnetTrainer(perceptron(), Halves()).fit([torch.ones(2, 6)], num_rounds=1), "no-loss", "got a batch of type Tensor"),
        (
            lambda: SubnetTrainer(perceptron(), Halves(), mode="async").fit(iter(loader()), num_rounds=1),
            "stream-and-async",
            "read in order with mode='async'",
        ),
        (
            lambda: SubnetTrainer(perceptron(), Halves(keep=0.01)).fit(loader(), num_rounds=1),
            "empty-layer",
            "which leaves 0 with none of its 8 neurons",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(call: Any, code: str, text: str):
    with pytest.raises(InputError, match=text) as caught:
        call()
    assert caught.value.code == code


def test_a_model_with_nan_is_refused_before_anything_is_trained():
    model = perceptron()
    with torch.no_grad():
        model[3].bias[1] = float("nan")
    with pytest.raises(InputError, match=r"3.bias of the model has 1 NaN or infinite entries out of 8"):
        SubnetTrainer(model, Halves())


def test_a_list_of_batches_and_a_loader_per_part_train_too():
    batches = list(DataLoader(dataset(), batch_size=8))
    listed = SubnetTrainer(perceptron(), Halves(), optimizer=SGD).fit(batches, num_rounds=4)
    assert listed.history[-1].num_samples == 48
    assert SubnetTrainer(perceptron(), Halves(), optimizer=SGD).fit([loader(), loader(seed=1)], num_rounds=2).state.round_number == 2
