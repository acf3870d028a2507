"""A budget that is never reached: the same ids as with transformers' own cache, in random conversations with random tiny models of nine families.

A case is a conversation drawn at random: family and attention kernel, rule, rows, lengths, padding on the left, beams or samples, a prompt in chunks, one to
three turns, and a budget that is just enough or more. It is held with a budgeted cache and with a ``DynamicCache``, and differs when any id does. Run:
``python benchmarks/serve_equality.py [--cases 10000]`` (minutes on one core).
"""

from __future__ import annotations

import argparse
import functools
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, set_seed

from partwise.serve import H2O, TOVA, BudgetedCache, KeyNorm, RandomTokens, Scissorhands, SlidingWindow, SnapKV, StreamingLLM, attached
from partwise.serve.rule import EvictionRule
from rows import Row, append

NAME = "serve_equality"
SEEDS = (0, 1, 2, 3)
WORDS, PADDING = 61, 0
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 512}
GROUPED = {"num_key_value_heads": 2, "head_dim": 32}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Qwen2": {"num_key_value_heads": 2, "num_attention_heads": 2},
    "Qwen3": GROUPED,
    "Mistral": GROUPED | {"sliding_window": None},
    "Gemma2": GROUPED | {"layer_types": ["full_attention"] * 2, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 32},
    "Gemma3": GROUPED | WINDOWS | {"query_pre_attn_scalar": 32},
    "Phi3": {"num_key_value_heads": 1, "num_attention_heads": 2, "sliding_window": None},
    "OPT": {"num_attention_heads": 2, "ffn_dim": 48, "word_embed_proj_dim": 64, "dropout": 0.0},
    "GPTNeoX": {"num_attention_heads": 2, "rotary_pct": 0.5, "hidden_dropout": 0.0, "attention_dropout": 0.0},
}
KERNELS = [
    (family, kernel) for family in FAMILIES for kernel in ("sdpa", "eager") if (family, kernel) != ("Gemma2", "sdpa")
]  # soft capping is eager's
SMALL: dict[str, Any] = {"recent": 2, "drop": 2}  # room for budgets of a few tokens
RULES: list[EvictionRule] = [
    Scissorhands(**SMALL),
    Scissorhands(**SMALL, window=4),
    StreamingLLM(**SMALL | {"num_sinks": 1}),
    H2O(drop=1),
    TOVA(),
    SnapKV(**SMALL, window=4),
    KeyNorm(**SMALL),
    SlidingWindow(),
    RandomTokens(**SMALL),
]


@functools.cache
def decoder(family: str, kernel: str) -> Any:
    """A random model whose attention is far from uniform."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": PADDING}
    config = getattr(transformers, f"{family}{'Text' if family == 'Gemma3' else ''}Config")(
        **SIZES | {"vocab_size": WORDS, "initializer_range": 0.2} | ids | FAMILIES[family]
    )
    return getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation=kernel).eval()


@dataclass(frozen=True)
class Case:
    """A conversation: a turn is its lengths of rows and how many tokens are to be written."""

    family: str
    kernel: str
    rule: EvictionRule
    turns: tuple[tuple[tuple[int, ...], int], ...]
    settings: dict[str, Any]
    spare: int
    seed: int

    @property
    def budget(self) -> int:
        """What all turns need together, and some more; rules need room for what never leaves."""
        return max(sum(max(lengths) + new for lengths, new in self.turns) + self.spare, 8)

    @property
    def traits(self) -> list[str]:
        """What is special about it."""
        padded = any(len(set(lengths)) > 1 for lengths, _ in self.turns)
        return [self.family, *(["padding"] if padded else []), *(["turns"] if len(self.turns) > 1 else []), *self.settings]


def draw(stream: random.Random) -> Case:
    """Any conversation; beams and several samples have one turn, since they change the number of rows."""
    family, kernel = stream.choice(KERNELS)
    rows, padded = stream.choice((1, 1, 2, 3)), stream.random() < 0.5
    ways: list[dict[str, Any]] = [{}, {}, {"num_beams": stream.choice((2, 3))}, {"do_sample": True}, {"prefill_chunk_size": stream.choice((2, 3, 5))}]
    settings = stream.choice(ways)
    if "do_sample" in settings and stream.random() < 0.5:
        settings["num_return_sequences"] = 2
    single = "num_beams" in settings or "num_return_sequences" in settings
    turns = []
    for _ in range(1 if single else stream.choice((1, 1, 2, 3))):
        longest = stream.randint(2, 24)
        lengths = [stream.randint(1, longest) if padded else longest for _ in range(rows)]
        lengths[stream.randrange(rows)] = longest  # a row without padding, as a tokenizer makes them
        turns.append((tuple(lengths), stream.randint(1, 6)))
    return Case(family, kernel, stream.choice(RULES), tuple(turns), settings, stream.choice((0, 1, 5, 100)), stream.randrange(2**31))


def held(case: Case, make: Callable[[Any], Any]) -> list[list[int]]:
    """Ids of the whole conversation."""
    model, words = decoder(case.family, case.kernel), torch.Generator().manual_seed(case.seed)
    cache, ids, mask = make(model), None, None
    set_seed(case.seed)
    for lengths, new in case.turns:
        more = torch.randint(2, WORDS, (len(lengths), max(lengths)), generator=words)
        real = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).to(torch.int64)  # padding on the left
        more = more * real
        ids = more if ids is None else torch.cat([ids, more], dim=1)
        mask = real if mask is None else torch.cat([mask, real], dim=1)
        ids = model.generate(
            input_ids=ids, attention_mask=mask, cache=cache, **{"max_new_tokens": new, "do_sample": False, "num_beams": 1} | case.settings
        )
        assert isinstance(ids, Tensor)
        mask = torch.cat([mask.repeat_interleave(len(ids) // len(mask), dim=0), torch.ones(len(ids), new, dtype=torch.int64)], dim=1)
    found: list[list[int]] = ids.tolist() if ids is not None else []
    return found


def differs(case: Case) -> bool:
    """Whether any id does."""
    with attached(decoder(case.family, case.kernel)):  # the other one runs as if there were no cache of ours
        ours = held(case, lambda model: BudgetedCache(model, case.rule, budget=case.budget))
    return ours != held(case, lambda model: DynamicCache(config=model.config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="conversations in all, the same number for each seed")
    num_cases = parser.parse_args().cases // len(SEEDS)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    started, wrong, traits = time.perf_counter(), [], Counter[str]()
    for seed in SEEDS:
        stream = random.Random(seed)
        cases = [draw(stream) for _ in range(num_cases)]
        found = [case for case in cases if differs(case)]
        wrong.append(float(len(found)))
        traits.update(trait for case in cases for trait in case.traits)
        print(f"seed {seed}: {len(found)} of {num_cases} differ, {time.perf_counter() - started:.0f} s", *found[:3], flush=True)
    shares = ", ".join(
        f"{traits[trait]:,} {word}" for trait, word in (("padding", "with padding"), ("turns", "of several turns"), ("num_beams", "with beams"))
    )
    append(
        NAME,
        Row(
            claim=f"With a budget of at least all tokens the ids are those of DynamicCache: {num_cases * len(SEEDS):,} random conversations",
            method="BudgetedCache(model, rule, budget=tokens or more)",
            values=tuple(wrong),
            unit="conversations with another id",
            seeds=SEEDS,
            seconds=time.perf_counter() - started,
            baseline="DynamicCache",
            baseline_values=(0.0,) * len(SEEDS),
            expected="none",
            held=not any(wrong),
            note=f"{len(FAMILIES)} families, sdpa and eager, {len({type(rule) for rule in RULES})} rules, 1 to 3 rows of 2 to 24 tokens a turn; {shares}, "
            f"{traits['do_sample']:,} sampled, {traits['prefill_chunk_size']:,} with prompts in chunks. Random weights, float32.",
        ),
    )


if __name__ == "__main__":
    main()
