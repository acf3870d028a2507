"""Models of a few kilobytes from a configuration and a seed, and tokenizers of whole words. Nothing is downloaded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
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


def tiny_decoder(family: str, *, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A causal language model of a family of transformers ("Llama", "Mistral", "Qwen2", "Qwen3"): 2 layers, 8 heads in 4 groups, 24 neurons."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    sizes = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "intermediate_size": 24, "initializer_range": 0.06}
    config = getattr(transformers, f"{family}Config")(vocab_size=3 + len(WORDS), **(ids | SIZES | sizes | changes))
    return _seeded(getattr(transformers, f"{family}ForCausalLM"), config, seed)


def tiny_gpt2(*, seed: int = 0, **changes: Any) -> transformers.GPT2LMHeadModel:
    """A GPT-2 of 2 layers, 4 heads, 64 neurons, without dropout, in evaluation mode."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.06}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return _seeded(transformers.GPT2LMHeadModel, transformers.GPT2Config(vocab_size=3 + len(WORDS), **(sizes | still | changes)), seed)


def tiny_neox(*, seed: int = 0, **changes: Any) -> transformers.GPTNeoXForCausalLM:
    """A GPT-NeoX of 2 layers, 2 heads, 32 neurons, without dropout, in evaluation mode."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.06}
    return _seeded(transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(vocab_size=3 + len(WORDS), **(ids | SIZES | changes)), seed)


def tiny_mamba2(*, seed: int = 0, **changes: Any) -> transformers.Mamba2ForCausalLM:
    """A Mamba2 of 2 layers, 4 heads, 8 states in one group, with biases that matter, in evaluation mode."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.2, "use_bias": True}

    def build(config: Any) -> Any:
        model = transformers.Mamba2ForCausalLM(config)
        for layer in model.backbone.layers:  # of a fresh model they are zero, so that a mistake about them could not be seen
            for bias in (layer.mixer.conv1d.bias, layer.mixer.in_proj.bias):
                if bias is not None:
                    nn.init.normal_(bias, std=0.3)
        return model

    return _seeded(build, transformers.Mamba2Config(vocab_size=3 + len(WORDS), **(sizes | ids | changes)), seed)


def tiny_vit(*, seed: int = 0, **changes: Any) -> transformers.ViTForImageClassification:
    """A ViT for images of 8 x 8: 2 layers, 4 heads, 24 neurons, in evaluation mode."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
    return _seeded(transformers.ViTForImageClassification, transformers.ViTConfig(**(sizes | {"initializer_range": 0.3} | changes)), seed)


def tiny_mlp(*widths: int, norm: bool = False, bias: bool = True, seed: int = 0) -> nn.Sequential:
    """Linear layers of ``widths``, inputs and outputs included, with ReLU between them and batch normalisation where wanted, in evaluation mode."""

    def build(_: object) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs, bias=bias), *([nn.BatchNorm1d(outputs)] if norm else []), nn.ReLU()]
        return with_statistics(nn.Sequential(*layers[:-1]))

    return _seeded(build, None, seed)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, with torchvision's names."""

    expansion = 1

    def __init__(self, inputs: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(inputs, width, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions and a shortcut, with torchvision's names."""

    expansion = 4

    def __init__(self, inputs: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, 4 * width, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class PreActBlock(nn.Module):
    """Normalise, activate, convolve, twice; the shortcut carries the input as it is."""

    expansion = 1

    def __init__(self, inputs: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None if stride == 1 and inputs == width else nn.Conv2d(inputs, width, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return self.conv2(nn.functional.relu(self.bn2(out))) + kept


def shortcut(inputs: int, outputs: int, *, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """torchvision's ResNet with four sections, narrow and for images of 16 x 16."""

    def __init__(self, block: type[Any], depths: Sequence[int], *, width: int = 4, num_classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = width
        for section, depth in enumerate(depths, start=1):
            outputs = width * 2 ** (section - 1)
            blocks = []
            for position in range(depth):
                blocks.append(block(inputs, outputs, stride=2 if section > 1 and position == 0 else 1))
                inputs = outputs * block.expansion
            self.add_module(f"layer{section}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def tiny_resnet(block: type[Any] = BasicBlock, depths: Sequence[int] = (2, 1, 4, 1), *, seed: int = 0, **changes: Any) -> ResNet:
    """A ResNet in evaluation mode, with batch statistics that are not those of a fresh layer."""
    return _seeded(lambda _: with_statistics(ResNet(block, depths, **changes)), None, seed)


def with_statistics(model: nn.Module) -> Any:
    """Give every batch normalisation statistics and weights that matter, from the global random state."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight, mean=1.0, std=0.3)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


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
