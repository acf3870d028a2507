"""Under a tight budget: the cache against a full one with masks, against rows alone, against beams replayed, against itself in other chunks."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from cache_models import KERNELS, continued, decoder, padded, shared_decoder, stepped, uneven_decoder, words
from partwise.serve._attention import set_attention
from partwise.serve.cache import BudgetedCache
from partwise.serve.h2o import H2O
from partwise.serve.key_norm import KeyNorm
from partwise.serve.random_tokens import RandomTokens
from partwise.serve.scissorhands import Scissorhands
from partwise.serve.sliding_window import SlidingWindow
from partwise.serve.snapkv import SnapKV
from partwise.serve.streaming_llm import StreamingLLM
from partwise.serve.tova import TOVA
from tolerances import assert_close

RULES = [
    Scissorhands(recent=3, drop=5),
    Scissorhands(window=4, recent=3, drop=4),
    SlidingWindow(),
    StreamingLLM(),
    H2O(),
    TOVA(),
    SnapKV(window=6, recent=4, drop=3),
    SnapKV(window=9, recent=2, drop=1),
    KeyNorm(recent=4),
    RandomTokens(recent=4, drop=3),
]
rules = pytest.mark.parametrize("rule", RULES, ids=repr)
families = pytest.mark.parametrize(("family", "kernel"), KERNELS, ids=[f"{family}-{kernel}" for family, kernel in KERNELS])


def tight(model, rule, **settings):
    return BudgetedCache(model, rule, **({"budget": 12} | settings))


@functools.cache
def exact_decoder():
    """In float64: the first layer's keys of a word that comes twice are equally long but for rounding, which padding changes."""
    return decoder("llama", dtype=torch.float64)


class MaskedTwin:
    """A full cache in which each head of each layer sees only what a cache with a budget still held. One row, no padding."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.visible: dict[int, list[set[int]]] = {}
        self.model, self.cache, self.seen = model, DynamicCache(config=model.config), 0
        AttentionInterface.register("masked_twin", self.attention)
        AttentionMaskInterface.register("masked_twin", sdpa_mask)
        set_attention(model, "masked_twin")

    def attention(self, module, query, key, value, mask, *, scaling=None, softcap=None, **_):
        group, new, end = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
        logits = query @ key.repeat_interleave(group, dim=1).transpose(-1, -2) * scaling
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        later = torch.arange(end) > torch.arange(end - new, end)[:, None]
        if module.layer_idx in self.visible:
            for head, kept in enumerate(self.visible[module.layer_idx]):
                gone = torch.tensor([token not in kept for token in range(end - new)] + [False] * new)
                logits[:, head * group : (head + 1) * group].masked_fill_(gone, -torch.inf)
        else:  # a layer with a window of its own
            later = later | (torch.arange(end) <= torch.arange(end - new, end)[:, None] - module.sliding_window)
        weights = logits.masked_fill(later, -torch.inf).softmax(dim=-1)
        return (weights @ value.repeat_interleave(group, dim=1)).transpose(1, 2), None

    def logits(self, ids: Tensor, kept: dict[int, list[set[int]]]) -> Tensor:
        """Logits of new tokens, when so many old ones were still there."""
        self.visible = kept
        self.seen += ids.shape[1]
        return self.model(input_ids=ids, cache=self.cache, use_cache=True).logits


@torch.no_grad()
def differ(model: PreTrainedModel, twin: PreTrainedModel, cache: BudgetedCache, ids: Tensor, blocks: list[int]) -> float:
    """The largest difference of logits between a cache with a budget and its masked twin."""
    masked, start, worst = MaskedTwin(twin), 0, 0.0
    layers = [index for index, layer in enumerate(cache.layers) if hasattr(layer, "attend")]
    kept = {index: [set()] * 99 for index in layers}
    for length in blocks:
        block = ids[:, start : start + length]
        ours = model(input_ids=block, cache=cache, use_cache=True).logits
        worst = max(worst, float((ours - masked.logits(block, kept)).abs().max()))
        kept = {index: [set(head) - {-1} for head in cache.kept_positions(index)[0].tolist()] for index in layers}
        start += length
    assert cache.report().evictions > 0
    return worst


@rules
def test_evicting_is_masking(rule):
    for blocks in ([20] + [1] * 20, [1] * 40, [7, 9, 1, 1, 12, 1, 9]):
        model, twin = decoder("llama"), decoder("llama", kernel="eager")
        assert differ(model, twin, tight(model, rule), words(1, 40), blocks) < 3e-5


@families
def test_evicting_is_masking_in_every_family(family, kernel):
    changes = {"sliding_window": None} if family in {"mistral", "phi3"} else {}
    model, twin = decoder(family, kernel=kernel, **changes), decoder(family, kernel="eager", **changes)
    if family == "gemma3":
        twin.config._attn_implementation = "eager"
    cache = tight(model, RULES[0], budget=12 if family == "gemma3" else [12, 16], pinned=2)
    assert differ(model, twin, cache, words(1, 40), [18] + [1] * 14 + [5, 1, 1, 1]) < 3e-5


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt-neox"])
def test_evicting_is_masking_where_layers_differ_in_size(family, kernel):
    model, twin = uneven_decoder(family, kernel=kernel), uneven_decoder(family, kernel="eager")
    cache = tight(model, RULES[0], budget=[12, 16], pinned=2)
    assert differ(model, twin, cache, words(1, 40), [18] + [1] * 14 + [5, 1, 1, 1]) < 3e-5


@rules
def test_a_row_of_a_padded_batch_writes_what_it_writes_alone(rule):
    model, short = exact_decoder(), padded(25, 7, 13, 18)
    together = continued(model, tight(model, rule), short["input_ids"], attention_mask=short["attention_mask"], new=30)
    for row, length in enumerate((25, 7, 13, 18)):
        alone = continued(model, tight(model, rule), short["input_ids"][row : row + 1, 25 - length :], new=30)
        assert torch.equal(together[row, 25:], alone[0, length:])


@families
def test_padding_changes_nothing_in_any_family(family, kernel):
    model, short = shared_decoder(family, kernel), padded(25, 7, 13)
    together = continued(model, tight(model, RULES[0]), short["input_ids"], attention_mask=short["attention_mask"], new=30)
    for row, length in enumerate((25, 7, 13)):
        alone = continued(model, tight(model, RULES[0]), short["input_ids"][row : row + 1, 25 - length :], new=30)
        assert torch.equal(together[row, 25:], alone[0, length:])


@rules
def test_padding_in_the_middle_of_a_conversation_changes_nothing(rule):
    model, first, second = exact_decoder(), padded(14, 5), padded(3, 16, seed=1)
    cache = tight(model, rule)
    ids = continued(model, cache, first["input_ids"], attention_mask=first["attention_mask"], new=4)
    mask = torch.cat([first["attention_mask"], torch.ones(2, 4, dtype=torch.int64), second["attention_mask"]], dim=1)
    together = continued(model, cache, torch.cat([ids, second["input_ids"]], dim=1), attention_mask=mask, new=20)
    for row in range(2):
        alone = tight(model, rule)
        mine = continued(model, alone, first["input_ids"][row : row + 1, first["attention_mask"][row] == 1], new=4)
        mine = torch.cat([mine, second["input_ids"][row : row + 1, second["attention_mask"][row] == 1]], dim=1)
        assert torch.equal(continued(model, alone, mine, new=20)[0, mine.shape[1] :], together[row, -20:])


@rules
@pytest.mark.parametrize("budget", [12, 100])
def test_the_beam_that_wins_has_the_score_of_the_same_text_replayed(rule, budget):
    model, short, new = (
        shared_decoder("opt"),
        padded(20, 9),
        25,
    )  # where the same word has another key at another place, so that no two are equally bad
    found = continued(
        model,
        tight(model, rule, budget=budget),
        short["input_ids"],
        attention_mask=short["attention_mask"],
        new=new,
        num_beams=4,
        output_scores=True,
        return_dict_in_generate=True,
        length_penalty=0.0,
    )
    mask = torch.cat([short["attention_mask"], torch.ones(2, new, dtype=torch.int64)], dim=1)
    logits = stepped(model, tight(model, rule, budget=budget), found.sequences[:, :-1], blocks=(20,), mask=mask[:, :-1])
    likely = logits[:, 19:].log_softmax(dim=-1).gather(2, found.sequences[:, 20:, None]).sum(dim=(1, 2))
    assert_close(found.sequences_scores, likely, claim="score of the winning beam", rtol=1e-4, atol=1e-4)


@rules
@pytest.mark.parametrize("bits", [None, 8])
def test_scoring_one_three_or_many_queries_at_once_writes_the_same(rule, bits):
    model, short = shared_decoder("llama"), padded(25, 7)
    settings = {"residual": 3} if bits else {}
    found = [
        continued(
            model, tight(model, rule, score_chunk=chunk, bits=bits, **settings), short["input_ids"], attention_mask=short["attention_mask"], new=40
        )
        for chunk in (1, 3, 64)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_cache_can_be_used_in_inference_mode_and_out_of_it():
    model, ids = shared_decoder("llama"), words(1, 40)
    expected = stepped(model, tight(model, RULES[0]), ids, blocks=(20,))
    for modes in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode), (torch.inference_mode, torch.enable_grad)):
        cache, parts = tight(model, RULES[0]), []
        for number, (start, end) in enumerate([(0, 20), *((at, at + 1) for at in range(20, 40))]):
            with modes[0 if number < 8 or number % 2 else 1]():
                parts.append(model(input_ids=ids[:, start:end], cache=cache, use_cache=True).logits.detach().clone())
        assert torch.equal(torch.cat(parts, dim=1), expected)


def test_training_mode_and_gradients_change_nothing_without_dropout():
    model, ids = decoder("llama"), words(1, 30)
    expected = stepped(model, tight(model, RULES[0]), ids, blocks=(20,))
    cache, parts = tight(model.train(), RULES[0]), []
    assert model.training
    for start, end in [(0, 20), *((at, at + 1) for at in range(20, 30))]:
        parts.append(model(input_ids=ids[:, start:end], cache=cache, use_cache=True).logits)
    assert torch.equal(torch.cat(parts, dim=1), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_packing_goes_with_beams_padding_pins_turns_and_budgets_of_layers(family, bits):
    model, short = shared_decoder(family), padded(25, 7, 13)
    packed = {"budget": [16, 20], "pinned": [0, 2], "bits": bits, "residual": 4}
    cache = tight(model, Scissorhands(recent=3, drop=5), **packed)
    ids = continued(model, cache, short["input_ids"], attention_mask=short["attention_mask"], new=20, num_beams=2)
    mask = torch.cat([short["attention_mask"], torch.ones(3, 20, dtype=torch.int64)], dim=1)
    assert ids.shape == (3, 45)
    assert [layer.num_slots <= layer.budget for layer in cache.budgeted] == [True, True]
    assert cache.nbytes <= cache.max_bytes(3, num_beams=2)
    for index, layer in enumerate(cache.layers):
        if layer in cache.budgeted:
            assert all({0, 2} <= set(head) for row in cache.kept_positions(index).tolist() for head in row)
    replayed = [stepped(model, tight(model, Scissorhands(recent=3, drop=5), **packed), ids, blocks=(25,), mask=mask) for _ in range(2)]
    assert torch.equal(*replayed)


def test_eight_bits_are_close_to_none():
    model, ids = shared_decoder("llama"), words(2, 60)
    full = stepped(model, tight(model, SlidingWindow()), ids, blocks=(20,)).log_softmax(dim=-1)
    errors = [
        float((stepped(model, tight(model, SlidingWindow(), bits=bits, residual=2), ids, blocks=(20,)).log_softmax(dim=-1) - full).abs().mean())
        for bits in (8, 4)
    ]
    assert errors[0] < 0.1 * full.std() < 2 * errors[1]
    assert errors[0] < errors[1] / 4
