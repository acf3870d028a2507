from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from partwise.checks import InputError
from partwise.train import IST, DiLoCo, LocalSGD, LoFT, OptimizerSettings, ResIST, SubnetTrainer, TwIST
from partwise.train._batches import batches_of
from partwise.train.method import SubnetMethod
from partwise.train.traffic import bytes_per_round, data_parallel_bytes, star_bytes
from tiny import PreActBlock, ResNet, tiny_decoder, tiny_gpt2, tiny_mlp, tiny_resnet

ADAMW, SGD = OptimizerSettings(), OptimizerSettings(optimizer="sgd")


def meta(build: Any) -> Any:
    with torch.device("meta"):
        return build()


def public_resnet() -> nn.Module:
    """The network of ResIST's release."""
    model = ResNet(PreActBlock, (3, 4, 23, 3), width=64, num_classes=100)
    model.bn1 = nn.Identity()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # its statistics neither exist nor travel there
            module.track_running_stats, module.running_mean, module.running_var, module.num_batches_tracked = False, None, None, None
    return model


def rows(width: int, *, classes: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(24, width, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.randint(classes, (24,), generator=generator)), batch_size=4)


def images() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(24, 3, 16, 16, generator=generator), torch.randint(5, (24,), generator=generator)), batch_size=4)


def texts() -> DataLoader[Any]:
    ids = torch.randint(20, (24, 6), generator=torch.Generator().manual_seed(0))
    return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=4)


# The card ------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_parts", "local_sgd", "resist"), [(2, 0.662, 0.4546), (4, 1.325, 0.7013), (8, 2.649, 1.1948)])
def test_the_published_gigabytes_of_local_sgd_and_resist_come_out(num_parts: int, local_sgd: float, resist: float) -> None:
    model = meta(public_resnet)
    split = bytes_per_round(ResIST(num_parts=num_parts), model)
    assert (split.shared_parameters, split.split_parameters) == (15_422_116, 25_974_784)
    assert split.total / 1e9 == pytest.approx(resist, abs=5e-5)
    assert split.total == star_bytes(15_422_116, 25_974_784, num_parts=num_parts)
    whole = bytes_per_round(LocalSGD(num_parts=num_parts), model)
    assert whole.total / 1e9 == pytest.approx(local_sgd, abs=5e-4)
    assert whole.total == star_bytes(41_396_900, 0, num_parts=num_parts)


@pytest.mark.parametrize(("num_parts", "minimum", "published"), [(2, 0, 0.454), (4, 6, 0.720), (8, 4, 1.289)])
def test_the_published_gigabytes_fit_a_minimum_depth_of_6_and_4_blocks(num_parts: int, minimum: int, published: float) -> None:
    model = meta(public_resnet)
    method = ResIST(num_parts=num_parts, min_blocks=minimum)
    assert bytes_per_round(method, model).total / 1e9 == pytest.approx(published, abs=1e-3)


def test_a_worker_of_ist_gets_a_nineteenth_of_the_card_s_network() -> None:
    model = meta(lambda: tiny_widths(4096, 8192, 8192, 35))
    traffic = bytes_per_round(IST(num_parts=8), model)
    assert sum(parameter.numel() for parameter in model.parameters()) == 100_950_016
    assert set(traffic.per_worker) == {4.0 * 5_278_720}
    assert traffic.total == 2 * 4 * (4096 * 8192 + 8192 * 8192 / 8 + 8192 * 35)


def tiny_widths(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_half_of_a_small_gpt_2_is_two_thirds_of_its_bytes() -> None:
    shared, split = 39.4e6, 84.9e6
    held = star_bytes(shared, split, num_parts=1, copies=0.5, bytes_per_number=1) / 2
    assert held == pytest.approx(81.9e6, abs=5e4)
    assert held / (shared + split) == pytest.approx(0.66, abs=0.005)
    import transformers

    sizes = {"vocab_size": 50257, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    model = meta(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **sizes)))
    traffic = bytes_per_round(TwIST(num_parts=4, keep=0.5), model)
    assert traffic.split_parameters == pytest.approx(split, abs=5e4)
    assert traffic.total == star_bytes(traffic.shared_parameters, traffic.split_parameters, num_parts=4, copies=2)


def test_data_parallel_training_sends_all_gradients_round_the_ring_at_every_step() -> None:
    assert data_parallel_bytes(41_396_900, num_workers=4, num_steps=50) == 2 * 3 * 41_396_900 * 4 * 50
    assert data_parallel_bytes(10, num_workers=1) == 0


# What is counted in real rounds --------------------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[SubnetMethod, Any, Any]] = {
    "ist": (IST(num_parts=2, num_local_steps=1), lambda: tiny_mlp(6, 8, 12, 4), lambda: rows(6)),
    "ist, uneven": (IST(num_parts=3, num_local_steps=1), lambda: tiny_mlp(6, 8, 13, 4), lambda: rows(6)),
    "ist, stratified": (IST(num_parts=3, num_local_steps=1, sampler="stratified"), lambda: tiny_mlp(6, 8, 13, 4), lambda: rows(6)),
    "ist with norms": (IST(num_parts=2, num_local_steps=1, scale="norm"), lambda: tiny_mlp(6, 8, 12, 4, norm=True, bias=False), lambda: rows(6)),
    "resist": (ResIST(num_parts=2, num_local_steps=1), lambda: tiny_resnet(PreActBlock), images),
    "resist, minimum": (ResIST(num_parts=2, num_local_steps=1, min_blocks=2), lambda: tiny_resnet(PreActBlock), images),
    "loft": (LoFT(num_parts=2, num_local_steps=1), lambda: tiny_resnet(PreActBlock), images),
    "local-sgd": (LocalSGD(num_parts=2, num_local_steps=1), lambda: tiny_resnet(PreActBlock), images),
    "diloco": (DiLoCo(num_parts=2, num_local_steps=1), lambda: tiny_mlp(6, 8, 12, 4), lambda: rows(6)),
    "twist": (TwIST(num_parts=2, num_local_steps=1, keep=(0.5, 1.0), num_blocks=4), lambda: tiny_decoder("Llama"), texts),
    "twist, grouped": (TwIST(num_parts=3, num_local_steps=1, keep=0.25, num_blocks=4, pinned=("first",)), lambda: tiny_decoder("Qwen2"), texts),
    "twist, gpt2": (TwIST(num_parts=2, num_local_steps=1, keep=0.5, num_blocks=4), tiny_gpt2, texts),
}


@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=["carry", "reset"])
@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_what_rounds_count(case: str, optimizer: OptimizerSettings) -> None:
    method, build, loader = CASES[case]
    trainer = SubnetTrainer(build(), method, optimizer=optimizer, probe_every=0).fit(loader(), num_rounds=2)
    formula = bytes_per_round(method, build(), optimizer=optimizer)
    for report in trainer.history:
        assert [part.bytes for part in report.parts] == list(formula.per_worker)
        assert (report.bytes_down, report.bytes_up) == (formula.down, formula.up)


def test_adamw_s_moments_make_it_three_times_the_parameters_and_four_between_two_split_layers() -> None:
    method, model = IST(num_parts=2), tiny_mlp(30, 80, 60, 4)
    bare, carried = bytes_per_round(method, model).total, bytes_per_round(method, model, optimizer=ADAMW).total
    between = 2 * 2 * 4 * 40 * 30  # two parts, down and up
    assert bare * 3 + between < carried < bare * 3.1 + between
    momentum = OptimizerSettings(optimizer="sgd")
    assert bytes_per_round(IST(num_parts=2, optimizer_state="carry"), model, optimizer=momentum).total == 2 * bare
    assert bytes_per_round(IST(num_parts=2, optimizer_state="reset"), model, optimizer=ADAMW).total == bare


RANDOM_SIZES = {
    "ist": (IST(num_parts=2, sampler="bernoulli", keep=0.4), lambda: tiny_mlp(6, 40, 40, 4), lambda: rows(6)),
    "twist": (TwIST(num_parts=2, num_blocks=4), lambda: tiny_decoder("Llama"), texts),
}


@pytest.mark.parametrize("case", RANDOM_SIZES)
def test_sizes_drawn_anew_in_every_round_are_counted_on_average(case: str) -> None:
    method, build, loader = RANDOM_SIZES[case]
    trainer = SubnetTrainer(build(), method, optimizer=SGD, seed=1)
    trainer._batches = batches_of(loader(), num_parts=2, seed=1)
    rounds = trainer._rounds(100)
    start = rounds.first_state(trainer._start)
    sent = [sum(part.tensors.num_bytes for part in rounds.split(replace(start, round_number=number))) for number in range(100)]
    assert len(set(sent)) > 1
    assert bytes_per_round(method, build()).down == pytest.approx(np.mean(sent), abs=5 * np.std(sent) * (1 / 100 + 1 / 500) ** 0.5)


def test_rounds_of_whole_models_are_counted_over_a_run() -> None:
    method, build = TwIST(num_parts=2, num_local_steps=1, keep=0.5, num_blocks=4, whole_share=0.5), lambda: tiny_decoder("Llama")
    history = SubnetTrainer(build(), method, optimizer=SGD, probe_every=0).fit(texts(), num_rounds=4).history
    assert bytes_per_round(method, build(), num_rounds=4).down == sum(report.bytes_down for report in history) / 4
    assert bytes_per_round(method, build()).down == history[-1].bytes_down < history[0].bytes_down


def test_numbers_of_half_the_size_cost_half_but_counters_keep_theirs() -> None:
    method, plain = IST(num_parts=2), tiny_mlp(6, 8, 12, 4)
    assert bytes_per_round(method, plain, bytes_per_number=2).total == bytes_per_round(method, plain).total / 2
    normed = tiny_mlp(6, 8, 12, 4, norm=True)
    counters = sum(isinstance(module, nn.BatchNorm1d) for module in normed.modules()) * 8 * 2 * 2  # int64, two parts, down and up
    assert bytes_per_round(method, normed, bytes_per_number=2).total == (bytes_per_round(method, normed).total - counters) / 2 + counters


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(InputError, match="bytes_per_number=0 must be an integer of at least 1"):
        bytes_per_round(LocalSGD(), tiny_mlp(6, 8, 4), bytes_per_number=0)
    with pytest.raises(InputError, match="num_workers=0"):
        data_parallel_bytes(10, num_workers=0)
    with pytest.raises(InputError, match="hidden"):
        bytes_per_round(IST(), nn.Sequential(nn.Linear(3, 2)))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=["carry", "reset"])
def test_what_ray_sends_is_the_formula_and_names(optimizer: OptimizerSettings) -> None:
    pytest.importorskip("ray", reason="counts the messages of the Ray engine")
    method, model = IST(num_parts=2, num_local_steps=1), tiny_mlp(60, 80, 120, 4)
    trainer = SubnetTrainer(model, method, optimizer=optimizer, engine="ray", num_workers=2, probe_every=0).fit(rows(60), num_rounds=2)
    formula = bytes_per_round(method, model, optimizer=optimizer)
    num_tensors = len(trainer.state.tensors) * (1 + len(trainer.state.optimizer))  # type: ignore[union-attr]
    most = 2000 + 150 * num_tensors  # a message, and the name and shape of every tensor in it
    assert trainer.traffic is not None
    assert len(trainer.traffic.rows) == 4
    for row in trainer.traffic.rows:
        for counted in (row.bytes_down, row.bytes_up):
            assert 0 < counted - formula.per_worker[row.worker] < most
