"""How fast pruned models write, and what a sequence holds in memory, against the whole model.

``speed``: tokens per second, one at a time, the whole model and the pruned ones by turns in one process. The limit is the ratio of the bytes that a token
moves: weights are read once for the whole batch, recurrent states are read and written for every text, keys and values are read. ``bytes``: what the model's
own cache holds for one sequence. Speed does not depend on what was learned: the small models are trained ones from ../shared (``PARTWISE_MODELS``), the
larger ones are fresh. Run: ``python benchmarks/prune_decode_speed.py [speed] [bytes] [--repeats 7]`` (some minutes on one free core).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers

from partwise.models.cache_sizes import cache_sizes, total_cache_bytes
from partwise.prune import GHOST, Magnitude, apply
from partwise.train._local import with_threads
from partwise.train._metrics import _by_turns, _decode
from prune_models import MODELS, load, present, rows_of, written
from rows import Row, append

NAME = "prune_decode_speed"
REPEATS, PROMPT, WRITTEN, BATCHES = 7, 32, 32, (1, 8)
SLOWEST = 0.95  # of the speed of the whole model
CONTEXT = 1024  # tokens, for bytes of keys and values
STATES = GHOST(keep=0.5)
NEURONS, HEADS = Magnitude(keep=0.5, kinds=("neurons",)), Magnitude(keep=0.5, kinds=("heads", "neurons"))


@dataclass(frozen=True)
class Subject:
    """A model, and what it was pruned to by several methods."""

    title: str
    whole: Any
    small: dict[str, Any]

    @classmethod
    def of(cls, title: str, model: Any, calibration: Any, methods: Sequence[Any]) -> Subject:
        """Prune a model by each method."""
        return cls(title, model, {written(method): apply(model, method.plan(model, calibration)) for method in methods})


def trained(title: str) -> Subject:
    folder, text = MODELS[title]
    model, tokenizer = load(folder)
    rows = rows_of(text, tokenizer, use="calibration", num_rows=16, num_tokens=128)
    return Subject.of(title, model, rows, (STATES,) if title.startswith("Mamba2") else (NEURONS, HEADS))


def fresh_mamba2() -> Subject:
    """The blocks of the smallest published Mamba2, half of them, with a smaller vocabulary."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_heads": 24, "head_dim": 64, "state_size": 128, "n_groups": 1}
    return _fresh("Mamba2", transformers.Mamba2Config(vocab_size=8192, eos_token_id=None, pad_token_id=None, **sizes), (STATES,))


def fresh_llama() -> Subject:
    """The blocks of GPT-2's smallest model as a Llama, half of them, with a smaller vocabulary."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 2048}
    return _fresh("Llama", transformers.LlamaConfig(vocab_size=8192, eos_token_id=None, pad_token_id=None, **sizes), (NEURONS, HEADS))


def _fresh(kind: str, config: Any, methods: Sequence[Any]) -> Subject:
    transformers.utils.logging.set_verbosity_error()
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    rows = torch.randint(1, config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))  # which units go does not matter here
    return Subject.of(f"fresh {kind} of {millions:.0f} million parameters", model, rows, methods)


def subjects() -> list[Callable[[], Subject]]:
    """The WikiText-2 model has the sizes of the other Mamba2, so it is left out."""
    titles = [title for title in present() if title.endswith("standard library")]
    return [*(partial(trained, title) for title in titles), fresh_mamba2, fresh_llama]


def moved_bytes(model: Any, *, batch_size: int) -> float:
    """Bytes that one step of writing reads and writes at least: weights, states twice, keys and values of what was written so far, on average."""
    embedding = model.get_input_embeddings().weight
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if model.get_output_embeddings().weight is not embedding:
        weights -= embedding.nbytes  # of which a row is read for a token
    sizes = cache_sizes(model)
    states = sum(2 * (size.recurrent + size.convolution) for size in sizes)
    read = sum(size.per_token for size in sizes) * (PROMPT + WRITTEN / 2)
    return weights + batch_size * (states + read)


def speed(subject: Subject, *, repeats: int = REPEATS, batches: Sequence[int] = BATCHES, num_tokens: int = WRITTEN) -> None:
    """A row for each pruned model and batch size."""
    names = list(subject.small)
    temporary = " A step of transformers in torch makes several tensors of the size of the states, so that it can gain more than that."
    remark = temporary if cache_sizes(subject.whole)[0].recurrent else ""
    for batch_size in batches:
        started = time.perf_counter()
        with with_threads(1):
            runs = [partial(_decode, model, batch_size, PROMPT, num_tokens) for model in (subject.whole, *subject.small.values())]
            seconds = _by_turns(runs, repeats=repeats)
        whole, *others = [[batch_size * num_tokens / second for second in of_model] for of_model in seconds]
        for name, values in zip(names, others, strict=True):
            ratio = statistics.median(values) / statistics.median(whole)
            limit = moved_bytes(subject.whole, batch_size=batch_size) / moved_bytes(subject.small[name], batch_size=batch_size)
            append(
                NAME,
                Row(
                    claim=f"Tokens per second of a pruned model, batch {batch_size}, 1 thread: {subject.title}",
                    method=name,
                    values=tuple(values),
                    unit="tokens per second",
                    seeds=tuple(range(repeats)),
                    seconds=time.perf_counter() - started,
                    baseline="whole model",
                    baseline_values=tuple(whole),
                    expected=f"at least {SLOWEST:g} times the speed, by medians",
                    held=ratio >= SLOWEST,
                    note=f"{ratio:.2f} times by medians; the fewest bytes that a token moves would allow {limit:.2f} times. "
                    f"{PROMPT} tokens read, then {num_tokens} written. {parameters(subject.small[name])} of {parameters(subject.whole)} million "
                    f"parameters.{remark}",
                ),
            )
            print(f"{subject.title}, {name}, batch {batch_size}: {ratio:.2f} of {limit:.2f}", flush=True)


def parameters(model: Any) -> str:
    """In millions."""
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}"


def held_bytes(subject: Subject) -> None:
    """A row for each pruned model whose sequences hold less."""
    for name, small in subject.small.items():
        started = time.perf_counter()
        whole_sizes, small_sizes = cache_sizes(subject.whole), cache_sizes(small)
        is_state = bool(whole_sizes[0].recurrent)
        if is_state:
            ours, theirs = (sum(size.recurrent for size in sizes) for sizes in (small_sizes, whole_sizes))
            everything = [total_cache_bytes(sizes, num_tokens=0) for sizes in (small_sizes, whole_sizes)]
            what, note = "recurrent state", f"With the last inputs of the convolution {everything[0]:,} of {everything[1]:,} bytes."
        else:
            ours, theirs = (total_cache_bytes(sizes, num_tokens=CONTEXT) for sizes in (small_sizes, whole_sizes))
            what, note = f"keys and values of {CONTEXT:,} tokens", "Neurons hold nothing of a text; heads do."
        cut = is_state or "heads" in name
        weights = [sum(parameter.nbytes for parameter in model.parameters()) for model in (small, subject.whole)]
        append(
            NAME,
            Row(
                claim=f"Bytes of {what} for one sequence: {subject.title}",
                method=name,
                values=(float(ours),),
                unit="bytes, float32",
                seeds=(0,),
                seconds=time.perf_counter() - started,
                baseline="whole model",
                baseline_values=(float(theirs),),
                expected="half, exactly" if cut else "",
                held=2 * ours == theirs if cut else None,
                note=f"{note} Weights {weights[0]:,} of {weights[1]:,} bytes, {weights[0] / weights[1] - 1:+.1%}.",
            ),
        )
        print(f"{subject.title}, {name}: {ours:,} of {theirs:,} bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="any of speed, bytes; both if none is named")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for make in subjects():
        subject = make()
        if not options.parts or "bytes" in options.parts:
            held_bytes(subject)
        if not options.parts or "speed" in options.parts:
            speed(subject, repeats=options.repeats)


if __name__ == "__main__":
    main()
