"""Models of a few kilobytes from a configuration and a seed, and tokenizers of whole words. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

WORDS = (
    "the",
    "a",
    "film",
    "book",
    "is",
    "was",
    "good",
    "bad",
    "very",
    "not",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "red",
    "green",
    "blue",
    "yes",
    "no",
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}


def tiny_bert(*, num_labels: int = 2, seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    """An encoder with a classification head, without dropout, in evaluation mode. The global random state is left alone."""
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        num_labels=num_labels,
        **({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | SIZES | changes),
    )
    return _seeded(BertForSequenceClassification, config, seed)


def tiny_llama(*, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A decoder, in evaluation mode. The global random state is left alone."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    return _seeded(LlamaForCausalLM, LlamaConfig(vocab_size=3 + len(WORDS), **(ids | SIZES | changes)), seed)


def _seeded(kind: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).eval()


def tiny_bert_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerBase:
    """Whole words, ``[CLS] first [SEP] second [SEP]``, with token types."""
    tokenizer = _whole_words([*SPECIAL, *words], unknown="[UNK]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, model_input_names=inputs, **names)


def tiny_llama_tokenizer(words: Sequence[str] = WORDS, *, bos: bool = True, **names: str) -> PreTrainedTokenizerBase:
    """Whole words, ``<s>`` in front where ``bos`` is set, and no pad token, as decoders often have it."""
    tokenizer = _whole_words(["<s>", "</s>", "<unk>", *words], unknown="<unk>")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, model_input_names=["input_ids", "attention_mask"], **names)


def _whole_words(vocabulary: Sequence[str], *, unknown: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def save_tiny(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Model and tokenizer in a folder, as ``from_pretrained`` reads them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
