"""What a run trains on: a model, its data, and what is held out.

Light to import: the libraries load when a task is opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from partwise.checks import InputError, check_at_least, load_extra

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader

    from partwise.train._arrays import Samples

__all__ = ["Kind", "TaskSettings", "TrainTask", "open_task"]

Kind = Literal["causal-lm", "classification"]

TEXT_NETWORK = "llama-small"
DEFAULT_NETWORKS = {"ist": "mlp", "resist": "resnet", "loft": "resnet"}  # the networks that these papers cut; other methods train a decoder
VALID_FRACTIONS = {"causal-lm": 0.05, "classification": 0.15}  # a long text needs a smaller share


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Which model to train, on what.

    Parameters
    ----------
    model : str, optional
        A built-in network (llama-small, llama-medium, mlp, resnet), or a causal language model to go on from: a folder as save_pretrained writes it, or a
        Hugging Face id. Left out: llama-small for text; for data the network of the method's paper, mlp for rows or resnet for images.
    text : str, optional
        A text file, or a folder of them: *.py, *.txt, *.md, *.rst and other UTF-8 files. train.txt, valid.txt and test.txt are used as such; else whole files
        are held out, or the end of each where there are fewer than ten. Left out, with no data either: the source of Python's standard library, or
        scikit-learn's digits, as the network wants it.
    data : str, optional
        Samples with classes instead of text: .npz with x_train, y_train, x_test and y_test, or x and y; or .csv with the class in its last column. x has rows
        (n, d), or images (n, h, w), (n, h, w, c) or (n, c, h, w).
    context : int, default=128
        Tokens of a block of text.
    batch_size : int, default=16
        Blocks of text or samples in a batch.
    valid_fraction : float, optional
        Share held out for validation, and as much again for the test; tickets are chosen on half as much. Left out: 0.05 of a text, 0.15 of samples. Of
        samples no more than 2000 are for validation and 1000 to choose tickets.
    vocab_size : int, default=2048
        Tokens of the byte-level BPE tokenizer that is learnt from the text. Not used with a model that brings its own.
    test_tokens : int, default=65536
        Tokens of text to test on at most, spread evenly over what is held out; validation takes half as many, the choice of tickets a quarter.
    split_seed : int, default=0
        Of the choice of what is held out. Apart from the run's seed, so that runs with other seeds are measured on the same data.

    Raises
    ------
    InputError
        ``text-and-data``, ``below-minimum`` or ``valid-fraction`` for values that cannot be used.
    """

    model: str | None = None
    text: str | None = None
    data: str | None = None
    context: int = 128
    batch_size: int = 16
    valid_fraction: float | None = None
    vocab_size: int = 2048
    test_tokens: int = 65536
    split_seed: int = 0

    def __post_init__(self) -> None:
        if self.text is not None and self.data is not None:
            raise InputError("text-and-data", f"got --text {self.text} and --data {self.data}, expected one of them. Leave one out.")
        check_at_least(self.context, 2, name="context")
        check_at_least(self.batch_size, 1, name="batch_size")
        check_at_least(self.vocab_size, 257, name="vocab_size")
        check_at_least(self.test_tokens, 1, name="test_tokens")
        check_at_least(self.split_seed, 0, name="split_seed")
        if self.valid_fraction is not None and not 0 < self.valid_fraction <= 0.2:
            raise InputError(
                "valid-fraction",
                f"valid_fraction={self.valid_fraction} must be above 0 and at most 0.2, because two and a half times as much is held out in all. Pass 0.05.",
            )


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """A model with the data to train it on and the data to measure it on.

    Parameters
    ----------
    name : str
        Of the data.
    kind : {"causal-lm", "classification"}
        What is learnt.
    loader : torch.utils.data.DataLoader
        Batches to train on, of a map-style dataset, drawn with the run's seed: ``{"input_ids", "labels"}`` of (block, token), or samples and classes.
    valid : list
        Batches of the same form to measure on while training.
    test : list
        Batches for the final numbers, from other files or samples.
    calibration : list
        Batches to choose tickets by, from yet others.
    model : torch.nn.Module
        To train.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Of a text.
    fingerprint : mapping
        What tells these data from others, as JSON: digests, numbers, and what is held out.
    unit : {"tokens", "images", "rows"}
        What ``fingerprint["sizes"]`` counts.
    """

    name: str
    kind: Kind
    loader: DataLoader[Any]
    valid: list[Any]
    test: list[Any]
    calibration: list[Any]
    model: nn.Module
    tokenizer: Any | None
    fingerprint: Mapping[str, Any]
    unit: str


def open_task(method_name: str, settings: TaskSettings, *, seed: int) -> TrainTask:
    """Read the data and make or load the model.

    Parameters
    ----------
    method_name : str
        Decides what is trained where the settings leave it open: ``ist`` an MLP and ``resist`` and ``loft`` a ResNet, on scikit-learn's digits; every other
        method a small Llama on the source of the standard library.
    settings : TaskSettings
        What the user said.
    seed : int
        Of the weights of a new model and of the order of the batches.

    Returns
    -------
    TrainTask
        The same bits for the same arguments.

    Raises
    ------
    InputError
        ``network-mismatch`` when the model is not made for the data; ``max-length`` when the context is longer than the model can read; ``too-little-text``
        or ``too-few-rows`` when there is not one batch; and what `partwise.train._text`, `partwise.train._arrays` and `partwise.models.loading` refuse.
    """
    from partwise.models.networks import NETWORKS

    kind: Kind = "causal-lm" if _wants_text(method_name, settings) else "classification"
    model = settings.model
    is_decoder = model is None or model not in NETWORKS or NETWORKS[model]["network"] == "llama"
    if model is not None and is_decoder != (kind == "causal-lm"):
        given, wanted = ("--data", "samples") if settings.data is not None else ("--text", "text")
        fitting = [name for name in NETWORKS if (NETWORKS[name]["network"] == "llama") == (kind == "causal-lm")]
        raise InputError(
            "network-mismatch",
            f"got {given} with --model {model}, which is not made for {wanted}, expected one of {', '.join(fitting)}. Choose one, or leave --model out.",
        )
    return _text_task(settings, seed) if kind == "causal-lm" else _samples_task(method_name, settings, seed)


def _wants_text(method_name: str, settings: TaskSettings) -> bool:
    from partwise.models.networks import NETWORKS

    if settings.text is not None or settings.data is not None:
        return settings.text is not None
    network = settings.model or DEFAULT_NETWORKS.get(method_name, TEXT_NETWORK)
    return network not in NETWORKS or NETWORKS[network]["network"] == "llama"


def _text_task(settings: TaskSettings, seed: int) -> TrainTask:
    from partwise.models.networks import NETWORKS, build
    from partwise.train import _text

    context, name = settings.context, settings.model or TEXT_NETWORK
    loaded = None
    if name not in NETWORKS:
        loaded, tokenizer = load_language_model(name)
        _check_context(loaded, name, context)
    corpus = _text.read_corpus(settings.text, valid_fraction=settings.valid_fraction or VALID_FRACTIONS["causal-lm"], seed=settings.split_seed)
    if loaded is None:
        tokenizer = _text.train_tokenizer(corpus.parts["train"], vocab_size=settings.vocab_size, context=context)
        config = NETWORKS[name] | {"vocab_size": len(tokenizer), "max_position_embeddings": context}
        loaded = build(config, seed=seed)
    blocks = _text.blocks_of(corpus, tokenizer, context=context)
    most = settings.test_tokens // context
    shown = {part: blocks[part].evenly(max(1, most // share)) for part, share in (("valid", 2), ("test", 1), ("calibration", 4))}
    if len(blocks["train"]) < settings.batch_size:
        raise InputError(
            "too-little-text",
            f"{corpus.name} gives {len(blocks['train'])} blocks of {context} tokens to train on, expected at least a batch of {settings.batch_size}. "
            "Pass more text, or a lower --context or --batch-size.",
        )
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    fingerprint = {
        "sha256": corpus.sha256(),
        "tokenizer": hashlib.sha256(vocabulary).hexdigest(),
        "held_out_by": corpus.held_out_by,
        "held_out": {part: corpus.names(part) for part in shown},
        "sizes": {part: len(found) * context for part, found in {"train": blocks["train"], **shown}.items()},
    }
    return TrainTask(
        name=corpus.name,
        kind="causal-lm",
        loader=_loader(blocks["train"], settings.batch_size, seed=seed),
        model=loaded,
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        unit="tokens",
        **{part: list(_loader(found, settings.batch_size)) for part, found in shown.items()},
    )


def _check_context(model: Any, name: str, context: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise InputError("max-length", f"context={context} is more than the {longest} tokens that {name} can read. Pass --context {longest} or less.")


def load_language_model(source: str) -> tuple[nn.Module, Any]:
    """A causal language model to go on with, in float32, and its tokenizer: from safetensors only and without remote code.

    Parameters
    ----------
    source : str
        A folder as save_pretrained writes it, or an id of the Hugging Face hub.

    Raises
    ------
    InputError
        ``model-not-found``, ``model-incomplete``, ``model-unavailable``, ``pickle-refused``, ``damaged-weights``, ``weights-do-not-match`` or
        ``task-not-supported``.
    """
    import torch

    from partwise.models.loading import check_source, load_decoder
    from partwise.models.networks import NETWORKS

    transformers = load_extra("transformers", extra="hf")
    return load_decoder(transformers, check_source(source, others=tuple(NETWORKS)), dtype=torch.float32)


def _samples_task(method_name: str, settings: TaskSettings, seed: int) -> TrainTask:
    from partwise.train import _arrays

    fraction = settings.valid_fraction or VALID_FRACTIONS["classification"]
    samples = _arrays.read_samples(settings.data, valid_fraction=fraction, seed=settings.split_seed)
    samples, model = _with_network(samples, settings.model or DEFAULT_NETWORKS.get(method_name), seed)
    if settings.batch_size == 1 and any(type(module).__name__ == "BatchNorm1d" for module in model.modules()):
        raise InputError(
            "below-minimum", f"got a batch size of 1 for {type(model).__name__}, whose norms want two rows or more. Pass --batch-size 2 or more."
        )
    num_train = len(samples.classes["train"])
    if num_train < settings.batch_size:
        raise InputError(
            "too-few-rows",
            f"{samples.name} has {num_train} samples to train on, expected at least a batch of {settings.batch_size}. Pass --batch-size {num_train} or less, "
            "or more data.",
        )
    held_out = {part: samples.indices[part] for part in ("valid", "test", "calibration")}
    fingerprint = {
        "sha256": samples.sha256,
        "classes": list(samples.class_names),
        "held_out_by": "sample",
        "held_out": {part: hashlib.sha256(indices.tobytes()).hexdigest() for part, indices in held_out.items()},
        "sizes": {part: len(samples.classes[part]) for part in _arrays.PARTS},
    }
    return TrainTask(
        name=samples.name,
        kind="classification",
        loader=_loader(samples.dataset("train"), settings.batch_size, seed=seed),
        model=model,
        tokenizer=None,
        fingerprint=fingerprint,
        unit="images" if samples.inputs["train"].ndim == 4 else "rows",
        **{part: list(_loader(samples.dataset(part), settings.batch_size)) for part in held_out},
    )


def _with_network(samples: Samples, name: str | None, seed: int) -> tuple[Samples, nn.Module]:
    """The samples in the form that a network reads, and the network at their size."""
    from partwise.models.networks import NETWORKS, build
    from partwise.train import _arrays

    if name is None:
        name = "resnet" if samples.inputs["train"].ndim == 4 else "mlp"
    config = NETWORKS[name] | {"num_classes": len(samples.class_names)}
    if config["network"] == "resnet":
        samples = _arrays.as_images(samples)
        config["channels"] = samples.inputs["train"].shape[1]
    else:
        samples = _arrays.as_rows(samples)
        config["num_inputs"] = samples.inputs["train"].shape[1]
    return samples, build(config, seed=seed)


def _loader(dataset: Any, batch_size: int, *, seed: int | None = None) -> DataLoader[Any]:
    """Batches in order, or full batches that are drawn where there is a seed."""
    import torch
    from torch.utils.data import DataLoader

    if seed is None:
        return DataLoader(dataset, batch_size=batch_size)
    return DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))
