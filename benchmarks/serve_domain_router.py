"""Which of two models continues a text best, chosen by the hidden states of one of them, on sources of which the router has seen nothing.

Candidates: a small model of the standard library's source, which is the probe too, and the same one trained on WikiText-2 (``train_twist_tickets.py base``
makes it). The router learns on source and docstrings of the standard library and on WikiText-2; it is tested on source and docstrings of scikit-learn, on
paragraphs of SQuAD, and on plays, of which there are none in training. A score is minus the bits per byte of the next 200 characters. Models and texts are
in ../shared (``PARTWISE_MODELS``, ``PARTWISE_DATA``). Run: ``python benchmarks/serve_domain_router.py`` (a quarter of an hour on one core).
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from images import loaders
from partwise.serve._routing_rule import REGULARIZATIONS
from partwise.serve.domain_router import DomainRouter
from partwise.tune._models import demo_folder
from rows import Row, append
from train_twist_tickets import BASE, MODEL, NOT_CORPUS

NAME = "serve_domain_router"
SEEDS = (0, 1, 2)
MODELS = ("standard library", "WikiText-2")
PROMPTS = 100  # of a source, for training and for testing
LENGTHS = (30, 100, 300)  # characters of a prompt
WRITTEN = 200  # characters that are scored
GOAL = 0.9  # of what the oracle gains over the best single model
PAPER = "hidden-state routing beats semantic routing and the domain's own fine-tuned model; 2 to 7 billion parameters, numbers not seen by us"

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Sample:
    """Prompts of some sources, and minus the bits per byte with which each model continues them."""

    prompts: list[str]
    sources: list[str]
    scores: Floats  # (prompts, models)

    @property
    def labels(self) -> list[str]:
        """The better model of each prompt."""
        return [MODELS[number] for number in self.scores.argmax(1)]

    def bits(self, choices: Iterable[str]) -> float:
        """Mean bits per byte when each prompt goes to the model chosen for it."""
        return -float(np.mean([row[MODELS.index(choice)] for row, choice in zip(self.scores, choices, strict=True)]))


def python_files(folder: Path) -> list[str]:
    """Text of Python files, tests left out."""
    return [path.read_text(errors="replace") for path in sorted(folder.rglob("*.py")) if not NOT_CORPUS & set(path.relative_to(folder).parts)]


def docstrings(files: Sequence[str]) -> list[str]:
    found = []
    for text in files:
        nodes = ast.walk(ast.parse(text))
        found += [ast.get_docstring(node) for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)]
    return [text for text in found if text]


def sources() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Texts to learn on and to be tested on, by source."""
    read, spec = loaders(), importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    library, other = python_files(Path(sysconfig.get_paths()["stdlib"])), python_files(Path(spec.origin).parent)
    train = {
        "source of the standard library": library,
        "docstrings of the standard library": docstrings(library),
        "WikiText-2": read.wikitext2("valid").split("\n = "),
    }
    test = {
        "source of scikit-learn": other,
        "docstrings of scikit-learn": docstrings(other),
        "SQuAD": sorted({row["context"] for row in read.squad()}),
        "plays": [read.tiny_shakespeare()],
    }
    return train, test


def bits_per_byte(model: Any, tokenizer: Any, prompt: str, following: str) -> float:
    """With which a model writes what follows a prompt."""
    given, written = tokenizer(prompt, verbose=False)["input_ids"], tokenizer(following, verbose=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([given + written]), use_cache=False).logits[0, len(given) - 1 : -1]  # (written, vocabulary)
    chances = logits.log_softmax(-1).gather(1, torch.tensor(written)[:, None])
    return -float(chances.sum()) / math.log(2) / len(following.encode())


def draw(texts: dict[str, list[str]], score: Callable[[str, str], list[float]], *, number: int, length: int, seed: int) -> Sample:
    """So many stretches of each source: ``length`` characters of prompt, and what follows."""
    stream, prompts, names, scores = random.Random(seed), [], [], []
    for source, found in texts.items():
        long = [text for text in found if len(text) > length + WRITTEN]
        for _ in range(number):
            text = stream.choice(long)
            start = stream.randrange(len(text) - length - WRITTEN)
            middle = start + length
            prompts.append(text[start:middle])
            names.append(source)
            scores.append(score(text[start:middle], text[middle : middle + WRITTEN]))
    return Sample(prompts, names, -np.array(scores))


def chosen_by(router: Callable[..., DomainRouter], train: Sample, test: Sample, mode: str) -> list[str]:
    """Choices of a router that has learned in one of its ways."""
    known: dict[str, dict[str, Any]] = {
        "better model": {"labels": train.labels},
        "scores": {"scores": train.scores},
        "domains": {"labels": train.sources, "scores": train.scores},
    }
    return router().fit(train.prompts, **known[mode]).predict(test.prompts)


def tuned(*steps: Any) -> Any:
    """The steps and a logistic regression whose strength of regularization is chosen by cross-validation, as the router's is."""
    strengths = {"logisticregression__C": (*REGULARIZATIONS, 100.0, 1000.0)}  # TF-IDF is not standardised and wants less
    return GridSearchCV(make_pipeline(*steps, LogisticRegression(max_iter=5000)), strengths, scoring="neg_log_loss", error_score="raise")


def by_words(train: Sample, test: Sample) -> list[str]:
    """Choices of logistic regression on words."""
    found: list[str] = tuned(TfidfVectorizer()).fit(train.prompts, train.labels).predict(test.prompts).tolist()
    return found


def by_characters(train: Sample, test: Sample) -> list[str]:
    """Choices of logistic regression on stretches of two to four characters."""
    found: list[str] = tuned(TfidfVectorizer(analyzer="char", ngram_range=(2, 4))).fit(train.prompts, train.labels).predict(test.prompts).tolist()
    return found


def by_meaning(train: Sample, test: Sample) -> list[str]:
    """Choices of logistic regression on sentence embeddings of a trained encoder of 23 million parameters."""
    encoder = sentence_encoder()
    found: list[str] = tuned(StandardScaler()).fit(encoder.encode(train.prompts), train.labels).predict(encoder.encode(test.prompts)).tolist()
    return found


@functools.cache
def sentence_encoder() -> DomainRouter:
    """MiniLM; its sentence embedding is the mean of the last layer."""
    folder = demo_folder()
    encoder = AutoModel.from_pretrained(folder)
    return DomainRouter(encoder, AutoTokenizer.from_pretrained(folder), models=MODELS, layers=[encoder.config.num_hidden_layers])


def best_single(train: Sample, test: Sample) -> list[str]:
    return [MODELS[int(train.scores.mean(0).argmax())]] * len(test.prompts)


def oracle(train: Sample, test: Sample) -> list[str]:
    return test.labels


def at_random(train: Sample, test: Sample) -> list[str]:
    return random.Random(0).choices(MODELS, k=len(test.prompts))


SINGLE, ORACLE = "best single model", "the better model for each prompt, known afterwards"
WORDS, CHARACTERS, MEANING = "TF-IDF of words", "TF-IDF of characters", "sentence embeddings of MiniLM"
RIVALS: dict[str, Callable[[Sample, Sample], list[str]]] = {
    SINGLE: best_single,
    ORACLE: oracle,
    "a random model": at_random,
    WORDS: by_words,
    CHARACTERS: by_characters,
    MEANING: by_meaning,
}


def shuffled(train: Sample, seed: int) -> Sample:
    """Prompts that have nothing to do with their scores."""
    order = random.Random(seed).sample(range(len(train.prompts)), len(train.prompts))
    return Sample(train.prompts, [train.sources[number] for number in order], train.scores[order])


def ways_to_choose(router: Callable[..., DomainRouter]) -> dict[str, Callable[[Sample, Sample], list[str]]]:
    """Rivals, and the router with its features and ways to learn."""
    settings: dict[str, dict[str, Any]] = {"mean": {}, "last": {"features": "last"}, "trace": {"features": "trace"}}
    ways = dict(RIVALS)
    for name, changes in settings.items():
        ways[f"router, {name}"] = partial(chosen_by, partial(router, **changes), mode="better model")
    for mode in ("scores", "domains"):
        ways[f"router, {mode}"] = partial(chosen_by, router, mode=mode)
    return ways


def measure(samples: Sequence[tuple[Sample, Sample]], ways: dict[str, Callable[[Sample, Sample], list[str]]]) -> dict[str, list[float]]:
    """Bits per byte of each way to choose, one number for each seed."""
    return {way: [test.bits(choose(train, test)) for train, test in samples] for way, choose in ways.items()}


def gains(found: dict[str, list[float]], way: str) -> list[float]:
    """Share of what the oracle gains over the best single model, for each seed."""
    return [(single - own) / (single - least) for single, own, least in zip(found[SINGLE], found[way], found[ORACLE], strict=True)]


def rows_of(where: str, found: dict[str, list[float]], seconds: float, *, asked: bool) -> list[Row]:
    """Rows against each rival, then for the router's other settings."""
    own, share = found["router, mean"], gains(found, "router, mean")
    said = f"{statistics.median(share):.0%} of what the oracle gains over the best single model ({min(share):.0%} to {max(share):.0%})."
    expected: dict[str, tuple[str, bool | None]] = {
        SINGLE: (f"at least {GOAL:.0%} of the oracle's gain, in every seed", min(share) >= GOAL),
        **{
            rival: ("fewer bits, in every seed", all(mine < theirs for mine, theirs in zip(own, found[rival], strict=True)))
            for rival in (WORDS, CHARACTERS, MEANING)
        },
    }
    shared: dict[str, Any] = {"unit": "bits per byte", "seeds": tuple(range(len(own))), "seconds": seconds}
    rows = []
    for rival in RIVALS:
        text, held = expected.get(rival, ("", None)) if asked else ("", None)
        title = f"Bits per byte of what follows, by the model that hidden states chose: {where}"
        given = f"DomainRouter(probe, tokenizer, models={MODELS})"
        paper = PAPER if rival == MEANING else None
        rows.append(
            Row(
                claim=title,
                method=given,
                values=tuple(own),
                baseline=rival,
                baseline_values=tuple(found[rival]),
                expected=text,
                held=held,
                note=said,
                paper=paper,
                **shared,
            )
        )
    for way in (name for name in found if name.startswith("router, ") and name != "router, mean"):
        note = f"{statistics.median(gains(found, way)):.0%} of what the oracle gains over the best single model."
        rows.append(
            Row(
                claim=f"The router in another setting ({way.partition(', ')[2]}): {where}",
                method=way,
                values=tuple(found[way]),
                baseline="router, mean",
                baseline_values=tuple(own),
                note=note,
                **shared,
            )
        )
    return rows


def shuffled_row(samples: Sequence[tuple[Sample, Sample]], router: Callable[..., DomainRouter], where: str) -> Row:
    """What happens when there is nothing to learn."""
    started = time.perf_counter()
    own = [test.bits(chosen_by(router, shuffled(train, seed), test, mode="better model")) for seed, (train, test) in enumerate(samples)]
    single = [test.bits(best_single(train, test)) for train, test in samples]
    return Row(
        claim=f"With shuffled scores the router is not worse than the best single model: {where}",
        method=f"DomainRouter(probe, tokenizer, models={MODELS})",
        values=tuple(own),
        unit="bits per byte",
        seeds=tuple(range(len(own))),
        seconds=time.perf_counter() - started,
        baseline=SINGLE,
        baseline_values=tuple(single),
        expected="at most 0.5 % more bits, in every seed",
        held=all(mine <= 1.005 * theirs for mine, theirs in zip(own, single, strict=True)),
    )


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    candidates = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (MODEL, BASE)]
    router = partial(DomainRouter, candidates[0], tokenizer, models=MODELS)
    ways, (train, test) = ways_to_choose(router), sources()

    def score(prompt: str, following: str) -> list[float]:
        return [bits_per_byte(model, tokenizer, prompt, following) for model in candidates]

    for length in LENGTHS:
        started = time.perf_counter()
        take = partial(draw, score=score, length=length)
        learned = [take(train, number=PROMPTS, seed=3 * seed) for seed in SEEDS]
        unseen = list(zip(learned, [take(test, number=PROMPTS, seed=3 * seed + 1) for seed in SEEDS], strict=True))
        seen = list(zip(learned, [take(train, number=PROMPTS // 2, seed=3 * seed + 2) for seed in SEEDS], strict=True))
        for name, samples, asked in (("sources that it has not seen", unseen, True), ("sources that it has seen", seen, False)):
            where = f"prompts of {length} characters, {name}"
            found = measure(samples, ways)
            for row in rows_of(where, found, time.perf_counter() - started, asked=asked):
                append(NAME, row)
            print(where, {way: f"{statistics.median(gains(found, way)):.2f}" for way in found}, flush=True)
        append(NAME, shuffled_row(unseen, router, f"prompts of {length} characters, sources that it has not seen"))


if __name__ == "__main__":
    main()
