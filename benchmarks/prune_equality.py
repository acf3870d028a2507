"""Slicing equals masking, and what is saved comes back to the bit: every method on a random model of every family, and on the trained ones that are there.

``mask``: the largest difference of logits between the small model and the whole one in which the same units are switched off. ``rounding``: the same in
float32, beside what float32 itself costs. ``files``: logits and written tokens after saving and loading. ``identity``: GHOST's squared score against what
happens to the scan of transformers when that one state is switched off.
Run: ``python benchmarks/prune_equality.py [mask] [rounding] [files] [identity]`` (a few minutes on one core).
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import partwise
from partwise import prune
from partwise.checks import InputError
from partwise.models import BlockAxis, Part, coupled_axes, mask
from partwise.models.networks import build
from partwise.prune import GHOST, METHODS, Random
from partwise.prune.unit_method import UnitMethod
from prune_models import MODELS, load, present, rows_of, written
from rows import Row, append

NAME = "prune_equality"
SEEDS = (0, 1, 2)
LIMIT = 1e-5  # largest difference of a logit
WORDS, CLASSES, KEEP = 61, 5, 0.5
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "intermediate_size": 96, "max_position_embeddings": 64, "initializer_range": 0.06}
IDS = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
GROUPED = {"num_key_value_heads": 4, "head_dim": 8}
STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.06}
MAMBA2_SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_heads": 6, "head_dim": 16, "state_size": 16, "chunk_size": 8, "initializer_range": 0.2}

Made = tuple[nn.Module, Any]  # a model, and its calibration data


def decoder(family: str, seed: int, **sizes: Any) -> Made:
    """A random language model with random texts."""
    transformers.utils.logging.set_verbosity_error()  # Mamba2 says that it runs without its CUDA kernels
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**IDS | sizes)
    kind = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM"))
    return with_biases(kind(config).eval()), torch.randint(1, WORDS, (16, 24))


def vit(seed: int) -> Made:
    torch.manual_seed(seed)
    sizes = {name: size for name, size in SIZES.items() if name != "max_position_embeddings"} | {"initializer_range": 0.2}
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=CLASSES, **sizes)
    return with_biases(transformers.ViTForImageClassification(config).eval()), [(torch.randn(8, 3, 16, 16), torch.randint(CLASSES, (8,))) for _ in range(2)]


def network(config: dict[str, Any], shape: tuple[int, ...], seed: int) -> Made:
    """One of the package's own, whose norms have been in use."""
    model = build(config, seed=seed)
    torch.manual_seed(seed)
    model.train()
    model(torch.randn(64, *shape))
    return model.eval(), [(torch.randn(16, *shape), torch.randint(CLASSES, (16,))) for _ in range(2)]


def with_biases(model: nn.Module) -> nn.Module:
    """Biases of fresh models are zero, which would hide a mistake about them."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and not name.endswith("dt_bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


RESNET = [{"width": width, "stride": stride, "inner": [width] * 2} for width, stride in ((8, 1), (16, 2))]
FAMILIES: dict[str, Callable[[int], Made]] = {
    "Mamba2": partial(decoder, "Mamba2", n_groups=2, **MAMBA2_SIZES),
    "Llama": partial(decoder, "Llama", **SIZES, **GROUPED),
    "Qwen2": partial(decoder, "Qwen2", **SIZES, num_key_value_heads=4),
    "Qwen3": partial(decoder, "Qwen3", **SIZES, **GROUPED),
    "Mistral": partial(decoder, "Mistral", **SIZES, **GROUPED),
    "GPT-NeoX": partial(decoder, "GPTNeoX", **SIZES, hidden_dropout=0.0, attention_dropout=0.0),
    "GPT-2": partial(decoder, "GPT2", n_embd=64, n_layer=3, n_head=4, n_positions=64, **STILL),
    "ViT": vit,
    "MLP": lambda seed: network({"network": "mlp", "hidden": [32, 24], "num_inputs": 20, "num_classes": CLASSES}, (20,), seed),
    "ResNet": lambda seed: network({"network": "resnet", "stem": 8, "stages": RESNET, "channels": 3, "num_classes": CLASSES}, (3, 16, 16), seed),
}
WRITERS = ("Mamba2", "Llama", "Qwen2", "Qwen3", "Mistral", "GPT-NeoX", "GPT-2")


def trained(title: str, dtype: torch.dtype = torch.float32) -> Callable[[int], Made]:
    """One of the trained models, with its calibration text."""
    folder, text = MODELS[title]

    def make(seed: int) -> Made:
        model, tokenizer = load(folder, dtype=dtype)
        return model, rows_of(text, tokenizer, use="calibration", num_rows=24, num_tokens=64)[seed::3]

    return make


def methods_for(model: nn.Module) -> Iterator[tuple[str, UnitMethod]]:
    """Every method that takes units out, for every kind that the model has and it can score."""
    kinds = {axis.kind for axis in coupled_axes(model) if not isinstance(axis, BlockAxis)}
    for target in METHODS.values():
        module, _, name = target.partition(":")
        method = getattr(importlib.import_module(module), name)
        if not issubclass(method, UnitMethod):
            continue
        tries = [method(keep=KEEP)] if kinds & set(method.DEFAULT_KINDS) else []
        if "heads" in kinds and not issubclass(method, GHOST):
            tries.append(method(keep=KEEP, kinds=("heads", "neurons")))
        yield from ((name, each) for each in tries)


def inputs_of(data: Any) -> Tensor:
    """A batch to compare on."""
    inputs: Tensor = data if isinstance(data, Tensor) else data[0][0]
    return inputs[:8]


@torch.no_grad()
def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    output = model(inputs)
    return output if isinstance(output, Tensor) else output.logits


@dataclass(frozen=True)
class Compared:
    """Largest differences of a logit: of the small model from its twin, and of the twin from the whole model."""

    family: str
    method: str
    seed: int
    from_mask: float
    from_whole: float


def compare(family: str, make: Callable[[int], Made], seed: int) -> Iterator[Compared]:
    """Every method on one model."""
    model, data = make(seed)
    inputs = inputs_of(data)
    whole = logits(model, inputs)
    for name, method in methods_for(model):
        try:
            plan = method.plan(model, data)
        except InputError as error:
            print(f"  {family}: {written(method)} refuses it: {error}", flush=True)
            continue
        small, twin = (logits(prune.apply(model, plan, as_mask=as_mask), inputs) for as_mask in (False, True))
        yield Compared(family, name, seed, *(float((first - second).abs().max()) for first, second in ((small, twin), (twin, whole))))


def masks(seeds: Sequence[int] = SEEDS) -> None:
    """Rows of every method, on random models and on trained ones."""
    trained_ones = {title: trained(title, torch.float64) for title in present()}
    for where, makers in (("random models, float32", FAMILIES), ("trained models, float64", trained_ones)):
        started, found = time.perf_counter(), list[Compared]()
        for family, make in makers.items():
            here = [each for seed in seeds for each in compare(family, make, seed)]
            print(family, {each.method: f"{each.from_mask:.1e}" for each in here}, flush=True)
            found += here
        for name in dict.fromkeys(each.method for each in found):
            append(NAME, mask_row(where, [each for each in found if each.method == name], seeds, time.perf_counter() - started))


def mask_row(where: str, found: Sequence[Compared], seeds: Sequence[int], seconds: float, *, asked: bool = True) -> Row:
    """One method on all of its families: the worst of each seed."""
    families = list(dict.fromkeys(each.family for each in found))
    worst = tuple(max(each.from_mask for each in found if each.seed == seed) for seed in seeds)
    least = tuple(min(each.from_whole for each in found if each.seed == seed) for seed in seeds)
    each_family = ", ".join(f"{family} {max(each.from_mask for each in found if each.family == family):.1e}" for family in families)
    return Row(
        claim=f"Slice equals mask: largest difference of a logit, {found[0].method}, {where}",
        method=f"{found[0].method}(keep={KEEP})",
        values=worst,
        unit="logits",
        seeds=tuple(seeds),
        seconds=seconds,
        baseline="the whole model, where it is nearest",
        baseline_values=least,
        expected=f"at most {LIMIT:g}" if asked else "",
        held=max(worst) <= LIMIT if asked else None,
        note=f"{len(families)} of them: {each_family}.",
    )


def rounding(seeds: Sequence[int] = SEEDS) -> None:
    """Rows of the trained models in float32, beside what float32 itself costs."""
    for title in present():
        started, found, costs, largest = time.perf_counter(), list[float](), list[float](), 0.0
        for seed in seeds:
            (model, data), (exact, _) = trained(title)(seed), trained(title, torch.float64)(seed)
            plan, inputs = Random(keep=KEEP, seed=seed).plan(model), inputs_of(data)
            small, twin = (logits(prune.apply(model, plan, as_mask=as_mask), inputs) for as_mask in (False, True))
            found.append(float((small - twin).abs().max()))
            costs.append(float((twin - logits(prune.apply(exact, plan, as_mask=True), inputs)).abs().max()))
            largest = max(largest, float(twin.abs().max()))
        append(
            NAME,
            Row(
                claim=f"Slice against mask in float32: largest difference of a logit, {title}",
                method=f"Random(keep={KEEP})",
                values=tuple(found),
                unit="logits",
                seeds=tuple(seeds),
                seconds=time.perf_counter() - started,
                baseline="the mask in float32 against the mask in float64",
                baseline_values=tuple(costs),
                note=f"Logits are up to {largest:.0f} here; what is summed in another order is rounded in another way.",
            ),
        )
        print("rounding", title, found, costs, flush=True)


def come_back(model: nn.Module, data: Any, method: UnitMethod) -> tuple[float, bool]:
    """Largest difference of a logit after saving and loading, and whether the same tokens are written."""
    small = prune.apply(model, method.plan(model, data))
    with tempfile.TemporaryDirectory() as folder:
        prune.save(small, Path(folder) / "small")
        again = partwise.load(Path(folder) / "small")
    assert type(again) is type(small)
    inputs = inputs_of(data)
    same = True
    if hasattr(model, "generate"):
        texts = [each.generate(input_ids=inputs[:, :8], max_new_tokens=8, do_sample=False).tolist() for each in (small, again)]  # type: ignore[operator]
        same = texts[0] == texts[1]
    return float((logits(small, inputs) - logits(again, inputs)).abs().max()), same


def files(seeds: Sequence[int] = SEEDS) -> None:
    """A row for every family: layers of equal size, and where files can say it, of different sizes."""
    for family, make in (FAMILIES | {title: trained(title) for title in present()}).items():
        started, worst, same, sizes = time.perf_counter(), list[float](), True, 0
        for seed in seeds:
            model, data = make(seed)
            uneven = [] if family in ("GPT-2", "ViT") else [uneven_choice(seed)]  # their configurations have one number for all layers
            found = [come_back(model, data, method) for method in (Random(keep=KEEP, seed=seed), *uneven)]
            worst.append(max(value for value, _ in found))
            same, sizes = same and all(equal for _, equal in found), len(found)
        append(
            NAME,
            Row(
                claim=f"Saved and loaded: largest difference of a logit, {family}",
                method="partwise.prune.save and partwise.load",
                values=tuple(worst),
                unit="logits",
                seeds=tuple(seeds),
                seconds=time.perf_counter() - started,
                expected="0, and the same tokens are generated" if family in WRITERS or family in MODELS else "0",
                held=max(worst) == 0 and same,
                note="Layers of equal size" + (" and of different sizes." if sizes > 1 else "."),
            ),
        )
        print(family, worst, same, flush=True)


def uneven_choice(seed: int) -> UnitMethod:
    """Other numbers of units in every layer."""
    return Random(keep=KEEP, seed=seed, scope="model")


def errors_of_identity(model: Any, rows: Tensor, states: Sequence[int]) -> list[float]:
    """Relative error of GHOST's squared score, for some states of every layer: the twin switches one off in transformers' own layer and measures its scan."""
    plan = replace(GHOST(), recalibrate=False).plan(model, rows)
    axes = coupled_axes(model)
    errors = []
    for name, scores in plan.scores.items():
        layer = name.removesuffix(".state")
        whole = scan_of(model, layer, rows)
        for state in states:
            without = mask(model, Part({name: tuple(unit for unit in range(len(scores)) if unit != state)}), axes=axes)
            change = (scan_of(without, layer, rows) - whole).double().square().sum(-1).mean()
            errors.append(float((scores[state] ** 2 / change - 1).abs()))
    return errors


@torch.no_grad()
def scan_of(model: Any, layer: str, rows: Tensor) -> Tensor:
    """What a mixer's scan gives to its norm: (rows, tokens, width)."""
    seen: list[Tensor] = []
    handle = model.get_submodule(f"{layer}.norm").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        model(input_ids=rows, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def identity(num_states: int = 8) -> None:
    """A row for every Mamba2."""
    for title in ("Mamba2", *(title for title in present() if title.startswith("Mamba2"))):
        started, found = time.perf_counter(), []
        for seed in SEEDS:
            model, rows = FAMILIES["Mamba2"](seed) if title == "Mamba2" else trained(title)(seed)
            size = len(GHOST().find_axes(model)) and GHOST().find_axes(model)[0].size
            found.append(max(errors_of_identity(model, rows, range(0, size, size // num_states))))
        append(
            NAME,
            Row(
                claim=f"The square of GHOST's score is the mean squared change of the scan when a state goes: {title}",
                method="GHOST(recalibrate=False)",
                values=tuple(found),
                unit="relative error, the largest",
                seeds=SEEDS,
                seconds=time.perf_counter() - started,
                expected="at most 0.001",
                held=max(found) <= 1e-3,
                note=f"{num_states} states of every layer; the twin switches one state off in the layer of transformers, in float32.",
            ),
        )
        print("identity", title, found, flush=True)


def main() -> None:
    parts = {"mask": masks, "rounding": rounding, "files": files, "identity": identity}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(parts)}; all if none is named")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.parts or parts:
        parts[name]()


if __name__ == "__main__":
    main()
