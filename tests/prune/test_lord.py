"""Claims about LoRD: exact where it must be, best where that is known, and the same model thin or masked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model_families import FAMILIES, IDS, TRANSFORMERS, outputs, rows
from partwise.checks import InputError
from partwise.models import tensors_of
from partwise.models.low_rank_layers import LowRankLinear, ranks_of
from partwise.prune import LoRD, LowRankPlan, apply, load_plan
from tiny import tiny_decoder, tiny_gpt2, tiny_llama, tiny_mamba2, tiny_mlp, tiny_resnet
from tolerances import assert_close

THIN = ["mlp", "mlp-with-norms", *(name for name in TRANSFORMERS if name != "gpt2")]
EVERY_FAMILY = pytest.mark.parametrize("family", THIN)
FEW = settings(max_examples=8)


def tiny_llama_like() -> Any:
    return tiny_decoder("Llama")


def calibration(family: str) -> Tensor:
    """64 rows or images, or 16 texts of 12 tokens, that are not what outputs are compared on."""
    _, inputs = FAMILIES[family]
    generator = torch.Generator().manual_seed(11)
    if inputs.dtype == torch.int64:
        return torch.randint(3, 20, (16, 12), generator=generator)
    return torch.randn(64, *inputs.shape[1:], generator=generator)


def white(num_rows: int, width: int, *, mean: float = 0.0) -> Tensor:
    """Rows whose covariance is one in every direction."""
    drawn = torch.randn(num_rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    basis, _ = torch.linalg.qr(drawn - drawn.mean(0))
    return (basis * num_rows**0.5 + mean).float()


def seen_inputs(model: nn.Module, names: list[str], data: Tensor) -> dict[str, Tensor]:
    """What some modules get, (rows, entries)."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(name, args[0].flatten(0, -2).double()))
        for name in names
    ]
    with torch.no_grad():
        model(data)
    for handle in handles:
        handle.remove()
    return found


def projector(basis: Tensor) -> Tensor:
    return basis @ basis.T


def basis_slowly(outputs: Tensor, rank: int, *, centred: bool) -> Tensor:
    """From the singular vectors of all outputs at once."""
    values = outputs - outputs.mean(0) if centred else outputs
    return torch.linalg.svd(values, full_matrices=False).Vh[:rank].T


# Exact limits


def test_at_full_rank_nothing_changes():
    model = tiny_mlp(12, 8, 8, 4)
    plan = LoRD(rank=8, force=True).plan(model, torch.randn(50, 12))
    assert plan.ranks == {"0": 8, "2": 8}
    fresh = torch.randn(20, 12)
    assert_close(apply(model, plan)(fresh), model(fresh), claim="all directions", atol=2e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(9, 6), (6, 9)], ids=["more inputs", "more outputs"])
def test_for_white_inputs_it_is_the_truncated_svd_of_the_weight(widths: tuple[int, int], bias: bool):
    model = tiny_mlp(*widths, 3, bias=bias)
    plan = LoRD(rank=3, layers=("0",)).plan(model, white(40, widths[0]))
    left, sizes, right = torch.linalg.svd(model[0].weight.detach().double())
    truncated = left[:, :3] * sizes[:3] @ right[:3]
    assert_close(apply(model, plan)[0].weight.detach().double(), truncated, claim="truncated SVD", atol=1e-6)
    assert_close(plan.shares["0"], sizes.square() / sizes.square().sum(), claim="energies are squared singular values", rtol=1e-5)


@FEW
@given(st.integers(1, 4), st.booleans(), st.integers(0, 100))
def test_outputs_in_a_few_directions_are_exact_at_that_rank_on_the_calibration_set(rank: int, bias: bool, seed: int):
    model = tiny_mlp(20, 12, 3, bias=bias, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(60, rank, generator=generator) @ torch.randn(rank, 20, generator=generator)
    plan = LoRD(energy=1.0, layers=("0",)).plan(model, data)
    small = apply(model, LoRD(rank=rank, layers=("0",)).plan(model, data))
    assert_close(small(data), model(data), claim="these outputs have no others", atol=1e-5)
    assert plan.ranks == {} or plan.ranks["0"] >= rank


@FEW
@given(st.integers(1, 5), st.integers(0, 100))
def test_the_mean_of_the_outputs_stays_at_any_rank(rank: int, seed: int):
    model = tiny_mlp(12, 10, 9, 3, seed=seed)
    data = torch.randn(40, 12, generator=torch.Generator().manual_seed(seed)) + 3
    plan = LoRD(rank=rank, force=True).plan(model, data)
    small = apply(model, plan)
    for name in ("0", "2"):
        position = int(name)
        thin = small[: position + 1](data)
        assert_close(thin.double().mean(0), plan.means[name], claim=f"the mean of layer {name}", atol=1e-5)
        whole = model[position](small[:position](data))
        assert_close(thin.mean(0), whole.mean(0), claim="as the whole layer has it on these inputs", atol=1e-5)


def test_a_layer_without_bias_gets_none_and_its_directions_hold_the_most_around_zero():
    model = tiny_mlp(12, 10, 3, bias=False)
    data = torch.randn(40, 12) + 2
    plan = LoRD(rank=3).plan(model, data)
    small = apply(model, plan)
    assert small[0].bias is None
    assert plan.means == {}
    expected = basis_slowly((data @ model[0].weight.T).detach().double(), 3, centred=False)
    assert_close(projector(plan.bases["0"]), projector(expected), claim="second moment around zero", atol=1e-5)


# The same model, thin or masked


@EVERY_FAMILY
@pytest.mark.parametrize("budget", [{"keep": 0.6}, {"energy": 0.9}, {"rank": 4}], ids=str)
def test_thin_layers_compute_what_the_masked_ones_compute(family: str, budget: dict[str, Any]):
    build, inputs = FAMILIES[family]
    model = build()
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    plan = LoRD(**budget).plan(model, calibration(family))
    small, masked = apply(model, plan), apply(model, plan, as_mask=True)
    assert plan.ranks
    assert ranks_of(small) == plan.ranks
    assert ranks_of(masked) == {}
    assert_close(outputs(small, inputs), outputs(masked, inputs), claim="two thin layers are one projected one", rtol=0, atol=1e-5)
    assert (type(small), small.training) == (type(model), model.training)
    assert sum(tensor.numel() for tensor in small.parameters()) < sum(tensor.numel() for tensor in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(model).items()), "the model is as it was"
    places = {tensor.data_ptr() for tensor in model.parameters()}
    assert not places & {tensor.data_ptr() for result in (small, masked) for tensor in result.parameters()}, "nothing is shared"


@EVERY_FAMILY
@pytest.mark.parametrize("recalibrate", [True, False])
def test_each_layer_is_looked_at_behind_the_thin_ones_before_it(family: str, recalibrate: bool):
    build, _ = FAMILIES[family]
    model, data = build(), calibration(family)
    plan = LoRD(energy=0.8, recalibrate=recalibrate).plan(model, data)
    shown = apply(model, plan, as_mask=True) if recalibrate else model
    inputs = seen_inputs(shown, list(plan.bases), data)
    for name, basis in plan.bases.items():
        layer = model.get_submodule(name)
        bias = None if layer.bias is None else layer.bias.detach().double()
        seen = inputs[name] @ layer.weight.detach().double().T + (0 if bias is None else bias)
        energy = (seen - seen.mean(0) if bias is not None else seen).square().mean(0).sum()
        along = ((seen - seen.mean(0) if bias is not None else seen) @ basis).square().mean(0)
        assert_close(along / energy, plan.shares[name][: basis.shape[1]], claim=f"energies of {name}", rtol=0, atol=2e-5)
        expected = basis_slowly(seen, basis.shape[1], centred=bias is not None)
        held = ((seen - seen.mean(0) if bias is not None else seen) @ expected).square().mean(0).sum()
        assert float(along.sum()) >= float(held) * (1 - 1e-5), f"no directions of {name} hold more"


def test_padded_tokens_do_not_count():
    model = tiny_decoder("Qwen2")
    ids = torch.tensor([[3, 7, 1, 12, 9, 4], [5, 5, 2, 9, 20, 8], [6, 11, 3, 0, 0, 0]])
    mask = torch.tensor([[1] * 6, [1] * 6, [1] * 3 + [0] * 3])
    padded = LoRD(rank=3).plan(model, [{"input_ids": ids, "attention_mask": mask}])
    apart = LoRD(rank=3).plan(model, [{"input_ids": ids[:2]}, {"input_ids": ids[2:, :3]}])
    assert padded.num_tokens == apart.num_tokens == 15
    for name, shares in apart.shares.items():
        assert_close(padded.shares[name], shares, claim=f"shares of {name}", rtol=1e-4, atol=1e-6)


# Budgets


def layer_parameters(model: nn.Module, names: list[str]) -> int:
    """Weights of some layers, whole or thin, without biases."""
    return sum(
        tensor.numel() for name in names for key, tensor in model.get_submodule(name).named_parameters() if not key.endswith("bias")
    )


@EVERY_FAMILY
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_keep_is_the_fraction_of_the_parameters_of_the_layers(family: str, keep: float):
    build, _ = FAMILIES[family]
    model = build()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and (family.startswith("mlp") or "layers." in name)]
    names = names[:-1] if family == "mlp" else names
    small = apply(model, LoRD(keep=keep).plan(model, calibration(family)))
    whole, left = layer_parameters(model, names), layer_parameters(small, names)
    coarsest = max(sum(model.get_submodule(name).weight.shape) for name in names)
    assert left <= keep * whole
    assert left > keep * whole - 3 * coarsest, "and it is used"


@pytest.mark.parametrize("family", ["llama", "llama-tied-with-biases", "mamba2", "vit", "mlp-with-norms"])
def test_a_budget_of_the_whole_model_is_met(family: str):
    build, _ = FAMILIES[family]
    model = build()
    parameters = sum(tensor.numel() for tensor in model.parameters())
    in_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(model).values())
    limit = int(0.8 * parameters)
    small = apply(model, LoRD(max_parameters=limit).plan(model, calibration(family)))
    assert 0.7 * parameters < sum(tensor.numel() for tensor in small.parameters()) <= limit
    limit = int(0.8 * in_bytes)
    small = apply(model, LoRD(max_bytes=limit).plan(model, calibration(family)))
    assert 0.7 * in_bytes < sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(small).values()) <= limit
    assert LoRD(max_parameters=parameters).plan(model, calibration(family)).ranks == {}, "what fits stays whole"


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_dealt_ranks_keep_more_energy_than_one_rank_for_all(family: str):
    build, _ = FAMILIES[family]
    model, data = build(), calibration(family)
    even = LoRD(rank=4, recalibrate=False).plan(model, data)
    names = list(even.ranks)
    cost = layer_parameters(apply(model, even), names)
    dealt = LoRD(keep=cost / layer_parameters(model, names) + 1e-9, recalibrate=False).plan(model, data)
    assert layer_parameters(apply(model, dealt), names) <= cost

    def kept(plan: LowRankPlan) -> float:
        return sum(float(even.shares[name][: plan.ranks[name]].sum()) if name in plan.ranks else 1.0 for name in names)

    assert kept(dealt) > kept(even)


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.95])
def test_energy_is_the_least_that_each_layer_keeps_and_one_direction_fewer_keeps_less(energy: float):
    model = tiny_decoder("Mistral")
    plan = LoRD(energy=energy, force=True).plan(model, calibration("mistral"))
    assert len(plan.ranks) == 14, "every layer of both blocks"
    for name, rank in plan.ranks.items():
        assert float(plan.shares[name][:rank].sum()) >= energy - 1e-9
        assert rank == 1 or float(plan.shares[name][: rank - 1].sum()) < energy


def test_ranks_are_multiples_of_round_to():
    model, data = tiny_decoder("Llama"), calibration("llama")
    for method in (LoRD(energy=0.7, round_to=3), LoRD(keep=0.6, round_to=3)):
        ranks = method.plan(model, data).ranks
        assert ranks
        assert not [rank for rank in ranks.values() if rank % 3]


def test_a_layer_stays_whole_where_two_thin_ones_would_save_nothing():
    model, data = tiny_decoder("Llama"), calibration("llama")
    ranks = LoRD(rank=12).plan(model, data).ranks
    layers = {name: module.weight for name, module in model.model.named_modules(prefix="model") if isinstance(module, nn.Linear)}
    assert set(ranks) == {name for name, weight in layers.items() if 12 * sum(weight.shape) < weight.numel()}
    assert len(LoRD(rank=12, force=True).plan(model, data).ranks) == 14


def test_embeddings_and_the_output_layer_stay_whole_and_tied():
    model = FAMILIES["llama-tied-with-biases"][0]()
    small = apply(model, LoRD(rank=2).plan(model, calibration("llama")))
    assert set(ranks_of(small)) == {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert small.lm_head.weight is small.model.embed_tokens.weight


def test_layers_are_chosen_by_name():
    model, data = tiny_decoder("Llama"), calibration("llama")
    assert set(LoRD(rank=2, layers=("*.mlp.*",)).plan(model, data).ranks) == {
        f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up", "down")
    }
    assert set(LoRD(rank=2, layers=("*.1.self_attn.v_proj",)).plan(model, data).ranks) == {"model.layers.1.self_attn.v_proj"}
    convolutional = tiny_resnet()
    assert set(LoRD(rank=2, layers=("fc",)).plan(convolutional, torch.randn(8, 3, 16, 16)).ranks) == {"fc"}


# What comes out


def test_the_ledger_has_a_row_for_each_direction():
    model = tiny_decoder("Llama")
    plan = LoRD(rank=3).plan(model, calibration("llama"))
    ledger = plan.ledger(model)
    small = apply(model, plan)
    for total in ledger.by_module():
        layer = small.get_submodule(total.where)
        assert total.rank == 3
        assert total.parameters == layer_parameters(small, [total.where])
        assert total.bytes == 4 * total.parameters
        assert sum(total.statuses.values()) == min(layer.in_features, layer.out_features)
    assert len(ledger.by_module()) == 14


@pytest.mark.parametrize("family", ["llama-tied-with-biases", "mamba2"])
def test_a_plan_goes_through_files_without_a_change(family: str, tmp_path: Path):
    build, inputs = FAMILIES[family]
    model = build()
    plan = LoRD(energy=0.8).plan(model, calibration(family))
    plan.save(tmp_path / "plan")
    loaded = load_plan(tmp_path / "plan")
    assert isinstance(loaded, LowRankPlan)
    assert (loaded.method, loaded.num_tokens, loaded.inputs, loaded.ranks) == (plan.method, plan.num_tokens, plan.inputs, plan.ranks)
    assert torch.equal(outputs(apply(model, loaded), inputs), outputs(apply(model, plan), inputs))


@pytest.mark.parametrize("family", ["llama", "mamba2", "vit"])
def test_the_result_can_be_trained(family: str):
    build, inputs = FAMILIES[family]
    model = build()
    plan = LoRD(rank=3).plan(model, calibration(family))
    small, masked = apply(model, plan).train(), apply(model, plan, as_mask=True).train()
    assert_close(outputs(small, inputs), outputs(masked, inputs), claim="in training mode as well", rtol=0, atol=1e-5)
    outputs(small, inputs).square().mean().backward()
    assert not [name for name in ranks_of(small) for layer in small.get_submodule(name) if layer.weight.grad is None]


def test_lora_goes_on_top():
    import peft

    small = apply(tiny_llama(), LoRD(rank=3).plan(tiny_llama(), calibration("llama")))
    adapted = peft.get_peft_model(small, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert "base_model.model.model.layers.0.mlp.up_proj.1.lora_A.default" in dict(adapted.named_modules())
    assert_close(adapted(IDS).logits, small(IDS).logits, claim="a fresh adapter adds nothing")


def test_half_precision_stays_half_precision():
    model = tiny_decoder("Llama").to(torch.bfloat16)
    small = apply(model, LoRD(rank=4).plan(model, calibration("llama")))
    assert {tensor.dtype for tensor in small.parameters()} == {torch.bfloat16}


# Refusals


@pytest.mark.parametrize(
    ("settings", "code", "text"),
    [
        ({"keep": 0.5, "rank": 3}, "two-budgets", "got keep and rank, expected one budget."),
        ({"keep": 0.0}, "keep-range", r"got keep=0\.0, expected a fraction above 0 and at most 1\."),
        ({"energy": 1.5}, "keep-range", r"got energy=1\.5, expected a fraction"),
        ({"rank": 0}, "below-minimum", "rank=0 must be an integer of at least 1"),
        ({"round_to": 0}, "below-minimum", "round_to=0 must be"),
        ({"force": True}, "force-saves-nothing", "got force with a budget of parameters, which it could only waste, expected energy or rank"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], code: str, text: str):
    with pytest.raises(InputError, match=text) as caught:
        LoRD(**settings)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("method", "build", "code", "text"),
    [
        (LoRD(rank=20), tiny_llama_like, "rank-saves-nothing", r"got rank=20, but two thin layers save parameters up to rank 15 only in .*q_proj"),
        (LoRD(rank=2), tiny_gpt2, "no-linear-layers", r"the blocks of GPT2LMHeadModel have no torch\.nn\.Linear \(transformer\.h\.0\.mlp\.c_fc\.weight is"),
        (LoRD(layers=("lm_head",)), tiny_llama_like, "unknown-layer", r"layers='lm_head' names lm_head, which lies outside of the blocks"),
        (LoRD(layers=("*.wq",)), tiny_llama_like, "unknown-layer", r"layers='\*\.wq' fits no linear layer of this model, expected some of these 14"),
        (LoRD(keep=0.01), tiny_llama_like, "budget-too-small", r"got keep=0\.01, but the lowest ranks of the 14 layers cost 784 of their"),
        (LoRD(max_parameters=9), tiny_llama_like, "budget-too-small", r"got max_parameters=9, but the smallest model .* costs 2,480, the whole"),
    ],
)
def test_what_cannot_be_done_is_refused(method: LoRD, build: Callable[[], nn.Module], code: str, text: str):
    with pytest.raises(InputError, match=text) as caught:
        method.plan(build(), calibration("llama"))
    assert caught.value.code == code


def test_the_output_layer_alone_is_not_chosen_by_itself():
    with pytest.raises(InputError, match=r"the only linear layers of ResNet give its outputs \(fc\), expected others\. Name them in layers"):
        LoRD().plan(tiny_resnet(), torch.randn(4, 3, 16, 16))
    with pytest.raises(InputError, match=r"Sequential has no torch\.nn\.Linear, expected some\. Choose a method for filters\."):
        LoRD().plan(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(4, 3, 8, 8))


def test_fewer_outputs_than_directions_are_refused():
    with pytest.raises(InputError, match="got 3 outputs of 0 to choose 5 directions from, expected at least as many") as caught:
        LoRD(rank=5).plan(tiny_mlp(20, 12, 3), torch.randn(3, 20))
    assert caught.value.code == "too-few-samples"
    LoRD(rank=5).plan(tiny_mlp(20, 12, 3), torch.randn(5, 20))


def test_a_model_of_low_rank_is_refused():
    model = tiny_decoder("Llama")
    small = apply(model, LoRD(rank=3).plan(model, calibration("llama")))
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.q_proj of this LlamaForCausalLM is of low rank already") as caught:
        LoRD(rank=2).plan(small, calibration("llama"))
    assert caught.value.code == "already-low-rank"


def test_a_quantised_layer_is_refused_by_name():
    class Linear4bit(nn.Linear):
        pass

    model = tiny_decoder("Llama")
    model.model.layers[1].mlp.up_proj = Linear4bit(32, 24, bias=False)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj is a .*Linear4bit, expected a plain Linear\. Dequantise the model") as caught:
        LoRD(rank=2).plan(model, calibration("llama"))
    assert caught.value.code == "unsupported-layer"


def test_layers_that_share_a_weight_are_not_torn():
    network = tiny_mlp(8, 8, 8, 3)
    network[2].weight = network[0].weight
    with pytest.raises(InputError, match=r"0\.weight and 2\.weight are one tensor, which two thin layers would tear apart") as caught:
        LoRD(rank=2).plan(network, rows(8))
    assert caught.value.code == "torn-ties"


def test_a_layer_that_runs_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(self.first(x)))

    with pytest.raises(InputError, match="first is used 2 times in one pass, expected once"):
        LoRD(rank=2).plan(Twice(), rows(6))


def test_no_data_and_data_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="got no calibration data"):
        LoRD().plan(tiny_mlp(6, 8, 4))
    with pytest.raises(InputError, match="got NaN or infinite activations in the input of 0, expected finite numbers"):
        LoRD().plan(tiny_mlp(6, 8, 8, 4), torch.full((4, 6), float("nan")))
    model = tiny_decoder("Llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"got NaN or infinite activations in the (in|out)put of model\.layers\.1\.mlp\.\w+_proj"):
        LoRD(rank=2).plan(model, calibration("llama"))


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (lambda: tiny_decoder("Llama", intermediate_size=28), r"0\.mlp\.gate_proj of shape \(24, 32\) without a bias, .* one of shape \(28, 32\)"),
        (lambda: tiny_decoder("Llama", mlp_bias=True), r"gate_proj of shape \(24, 32\) without a bias, .* one of shape \(24, 32\) with a bias"),
        (tiny_mamba2, r"Mamba2ForCausalLM has no layer model\.layers\.0\.mlp\.gate_proj"),
    ],
)
def test_a_plan_for_another_model_is_refused(other: Callable[[], nn.Module], text: str):
    model = tiny_decoder("Llama")
    plan = LoRD(rank=2, layers=("*.mlp.gate_proj",)).plan(model, calibration("llama"))
    for as_mask in (False, True):
        with pytest.raises(InputError, match=text):
            apply(other(), plan, as_mask=as_mask)


def test_code_that_asks_a_linear_layer_gets_an_answer():
    model = tiny_mlp(9, 7, 3)
    thin = apply(model, LoRD(rank=3).plan(model, torch.randn(30, 9)))[0]
    assert isinstance(thin, LowRankLinear)
    assert (thin.rank, thin.in_features, thin.out_features) == (3, 9, 7)
    inputs = torch.randn(5, 9)
    assert_close(nn.functional.linear(inputs, thin.weight, thin.bias), thin(inputs), claim="weight and bias are those of the layer")
