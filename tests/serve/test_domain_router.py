"""Claims about sending prompts to models by their hidden states."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from partwise.checks import InputError, RunError
from partwise.serve._routing_rule import best_margin
from partwise.serve.domain_router import DomainRouter
from tiny import tiny_bert, tiny_bert_tokenizer, tiny_llama, tiny_llama_tokenizer
from tolerances import assert_close

REVIEWS, NUMBERS = ("the", "a", "film", "book", "is", "good", "bad", "very"), ("one", "two", "three", "four", "five", "six", "red", "green")
MODELS = ("critic", "clerk")
FEATURES = pytest.mark.parametrize("features", ["mean", "last", "trace"])


def prompts_of(words: Sequence[str], number: int, *, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(3, 14))) for _ in range(number)]


def planted(number: int = 40, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Prompts of two kinds by turns, and the model that is right for each."""
    reviews, numbers = prompts_of(REVIEWS, number, seed=seed), prompts_of(NUMBERS, number, seed=seed + 1)
    return [prompt for pair in zip(reviews, numbers, strict=True) for prompt in pair], list(MODELS) * number


def scores_of(labels: Sequence[str]) -> np.ndarray[Any, Any]:
    return np.array([[float(label == model) for model in MODELS] for label in labels])


def router(**settings: Any) -> DomainRouter:
    return DomainRouter(tiny_llama(), tiny_llama_tokenizer(), models=MODELS, **settings)


def score(choices: Sequence[str], scores: np.ndarray[Any, Any]) -> float:
    return float(np.mean([row[MODELS.index(choice)] for choice, row in zip(choices, scores, strict=True)]))


@pytest.mark.parametrize("mode", ["labels", "scores", "both", "numbers"])
def test_two_planted_clusters_are_routed_as_an_oracle_would(mode: str):
    prompts, labels = planted()
    scores = scores_of(labels)
    known = {
        "labels": {"labels": labels},
        "scores": {"scores": scores},
        "both": {"labels": labels, "scores": scores},
        "numbers": {"scores": 3 * scores - 1.5 + 0.1 * np.random.default_rng(0).normal(size=scores.shape)},
    }[mode]
    fitted = router().fit(prompts, **known)
    unseen, right = planted(seed=7)
    assert fitted.predict(unseen) == right, "accuracy 1 on prompts that it has not seen"
    assert [fitted.route(prompt) for prompt in unseen[:2]] == right[:2]


@FEATURES
def test_all_features_tell_the_clusters_apart_far_above_chance(features: Any):
    prompts, labels = planted(60)
    unseen, right = planted(60, seed=7)
    chosen = router(features=features, regularization=1.0).fit(prompts, labels).predict(unseen)
    assert score(chosen, scores_of(right)) > 0.75


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mode", ["labels", "scores"])
def test_with_shuffled_labels_everything_goes_to_the_best_single_model(seed: int, mode: str):
    prompts, labels = planted(30)
    labels = [*labels, *["clerk"] * 12]
    prompts = [*prompts, *prompts_of(REVIEWS + NUMBERS, 12, seed=3)]
    random.Random(seed).shuffle(labels)
    fitted = router().fit(prompts, **({"labels": labels} if mode == "labels" else {"scores": scores_of(labels)}))
    unseen, _ = planted(seed=7)
    assert set(fitted.predict(unseen)) == {"clerk"}


def test_without_a_margin_shuffled_labels_do_harm():
    """What the margin is for: this is the test above with the margin switched off."""
    prompts, labels = planted(30)
    random.Random(0).shuffle(labels)
    assert len(set(router(margin=0.0).fit(prompts, labels).predict(planted(seed=7)[0]))) == 2


def test_a_margin_that_no_advantage_reaches_leaves_the_best_single_model():
    prompts, labels = planted()
    labels = ["clerk" if number % 8 == 0 else label for number, label in enumerate(labels)]
    assert set(router(margin=1.1).fit(prompts, labels).predict(prompts)) == {"clerk"}
    assert set(router(margin=0.0).fit(prompts, labels).predict(prompts)) == set(MODELS)


def test_the_margin_is_the_one_that_would_have_gained_most():
    expected = np.array([[0.0, 0.9]] * 50 + [[0.0, 0.3]] * 50)
    scores = np.array([[0.0, 1.0]] * 50 + [[1.0, 0.0]] * 50)
    assert 0.3 <= best_margin(expected, scores, 0) < 0.9, "only large advantages are true here"
    assert best_margin(expected, scores[::-1], 0) == np.inf, "a large advantage is wrong, and with it all would be lost that small ones gain"
    assert best_margin(expected, np.tile([[0.0, 1.0], [1.0, 0.0]], (50, 1)), 0) == np.inf, "no gain at any margin"
    assert best_margin(expected, scores[:, ::-1] * 0, 0) == np.inf


def test_the_best_model_of_a_domain_need_not_be_its_own():
    """The one for reviews is better at numbers too; only labels and scores together can say it."""
    prompts, labels = planted()
    scores = np.array([[0.9, 0.2] if label == "critic" else [0.4, 0.6] for label in labels])
    fitted = router().fit(prompts, ["films" if label == "critic" else "sums" for label in labels], scores=scores)
    assert fitted.rule_.domains == ("films", "sums")
    assert_close(fitted.rule_.table, np.array([[0.9, 0.2], [0.4, 0.6]]), claim="means by domain")
    assert fitted.predict(planted(seed=7)[0]) == list(MODELS) * 40


def doubles(fitted: DomainRouter, prompts: Sequence[str]) -> Any:
    return fitted.encode(prompts).astype(np.float64)


@pytest.mark.parametrize("hidden_size", [16, 64])
def test_the_classifier_is_that_of_scikit_learn_also_with_more_features_than_prompts(hidden_size: int):
    prompts, labels = planted()
    probe = tiny_llama(hidden_size=hidden_size)
    fitted = DomainRouter(probe, tiny_llama_tokenizer(), models=MODELS, regularization=0.05).fit(prompts, labels)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=5000, tol=1e-6)).fit(
        doubles(fitted, prompts), [MODELS.index(label) for label in labels]
    )
    unseen = planted(seed=7)[0]
    assert_close(fitted.expected_scores(unseen), theirs.predict_proba(doubles(fitted, unseen)), claim="the same chances", rtol=1e-4, atol=1e-6)


def test_three_domains_have_the_chances_of_scikit_learn_too():
    prompts, labels = planted()
    three = [*labels[:-20], *["third"] * 20]
    fitted = DomainRouter(tiny_llama(), tiny_llama_tokenizer(), models=[*MODELS, "third"], regularization=0.05).fit(prompts, three)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=5000, tol=1e-6)).fit(doubles(fitted, prompts), three)
    order = [list(theirs.classes_).index(model) for model in fitted.models]
    found = theirs.predict_proba(doubles(fitted, prompts))[:, order]
    assert_close(fitted.expected_scores(prompts), found, claim="the same chances", rtol=1e-4, atol=1e-6)


@FEATURES
@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder-decoder"])
def test_a_batch_of_one_has_the_features_of_a_batch_of_many(features: Any, family: str):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    probe, tokenizer = {
        "decoder": lambda: (tiny_llama(), tiny_llama_tokenizer()),
        "encoder": lambda: (tiny_bert(), tiny_bert_tokenizer()),
        "encoder-decoder": lambda: (T5ForConditionalGeneration(T5Config(**sizes)).eval(), tiny_llama_tokenizer()),
    }[family]()
    prompts = planted(9)[0]
    alone = DomainRouter(probe, tokenizer, models=MODELS, features=features, batch_size=1).encode(prompts)
    for batch_size in (4, 100):
        together = DomainRouter(probe, tokenizer, models=MODELS, features=features, batch_size=batch_size).encode(prompts)
        assert_close(together, alone, claim="padding and neighbours do not matter", rtol=1e-4, atol=1e-5)
    assert_close(
        DomainRouter(probe, tokenizer, models=MODELS, features=features).encode(prompts[::-1]),
        alone[::-1].copy(),
        claim="order",
        rtol=1e-4,
        atol=1e-5,
    )


def test_features_are_those_of_one_pass_over_one_prompt():
    model, tokenizer, prompt = tiny_llama(), tiny_llama_tokenizer(), "the film is good"
    with torch.no_grad():
        states = torch.cat(model(**tokenizer(prompt, return_tensors="pt"), output_hidden_states=True).hidden_states)  # (layers, tokens, dim)

    def encoded(**settings: Any) -> Any:
        return DomainRouter(model, tokenizer, models=MODELS, **settings).encode([prompt])[0]

    assert_close(encoded(features="mean"), states.mean(1).flatten().numpy(), claim="mean over tokens")
    assert_close(encoded(features="last"), states[:, -1].flatten().numpy(), claim="last token")
    assert_close(encoded(features="last", layers=[2, 0]), states[[2, 0], -1].flatten().numpy(), claim="chosen layers")
    assert_close(encoded(features="last", max_length=1), encoded(features="last", max_length=1), claim="same again")
    trace = DomainRouter(model, tokenizer, models=MODELS).trace([prompt])
    assert trace.shape == (1, 3, 2)
    assert_close(trace[0, :, 0], states[:, -1].mean(1).numpy(), claim="mean of a layer")
    assert_close(trace[0, :, 1], states[:, -1].var(1, unbiased=False).numpy(), claim="variance of a layer")


def test_only_the_last_tokens_of_a_long_prompt_are_read():
    short = router(max_length=3)
    assert_close(short.encode(["one two three four five"]), short.encode(["six six three four five"]), claim="the last three")


def test_constant_states_have_no_variance_and_go_to_the_best_single_model():
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    constant = DomainRouter(model, tiny_llama_tokenizer(), models=MODELS)
    prompts, labels = planted(15)
    assert_close(constant.trace(prompts)[..., 1], np.zeros((30, 3), dtype=np.float32), claim="no variance", atol=1e-9)
    fitted = constant.fit([*prompts, "the film"], [*labels, "clerk"])
    assert set(fitted.predict(prompts)) == {"clerk"}


def test_sources_are_held_out_as_a_whole():
    """Within each source another word gives the answer away, and no word does in the other sources."""
    prompts, labels, groups = [], [], []
    for source, (word, other) in enumerate([("red", "green"), ("green", "red")] * 2):
        for number in range(20):
            filler = prompts_of(REVIEWS, 1, seed=100 * source + number)[0]
            prompts.append(f"{filler} {word if number % 2 else other} {word if number % 2 else other}")
            labels.append(MODELS[number % 2])
            groups.append(f"source {source}")
    labels[0] = "clerk"
    assert set(router().fit(prompts, labels, groups=groups).predict(prompts)) == {"clerk"}
    clusters, right = planted(40)
    sources = [f"source {number // 20}" for number in range(80)]
    assert score(router().fit(clusters, right, groups=sources).predict(clusters), scores_of(right)) > 0.95


def test_the_probe_is_left_as_it_was():
    probe = tiny_llama().train()
    probe.model.layers[0].eval()
    before = {name: tensor.clone() for name, tensor in probe.state_dict().items()}
    DomainRouter(probe, tiny_llama_tokenizer(), models=MODELS).encode(["the film"])
    assert probe.training
    assert not probe.model.layers[0].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in probe.state_dict().items())


@pytest.mark.parametrize("mode", ["labels", "scores", "both"])
def test_a_saved_router_chooses_the_same_again_and_holds_no_pickle(tmp_path: Path, mode: str):
    prompts, labels = planted()
    known = {"labels": labels} if mode != "scores" else {}
    fitted = router(features="last", layers=[1, 2], max_length=20).fit(prompts, scores=scores_of(labels) if mode != "labels" else None, **known)
    folder = fitted.save(tmp_path / "router")
    assert sorted(path.name for path in folder.iterdir()) == ["router.json", "router.safetensors"]
    loaded = DomainRouter.load(folder, tiny_llama(), tiny_llama_tokenizer())
    assert (loaded.features, loaded.layers, loaded.max_length, loaded.models) == ("last", (1, 2), 20, MODELS)
    unseen = planted(seed=7)[0]
    assert_close(loaded.expected_scores(unseen), fitted.expected_scores(unseen), claim="the same numbers", rtol=0, atol=0)
    assert loaded.predict(unseen) == fitted.predict(unseen)


def test_a_router_that_trusts_nothing_is_saved_as_such(tmp_path: Path):
    prompts, labels = planted(20)
    random.Random(1).shuffle(labels)
    folder = router().fit([*prompts, "one"], [*labels, "clerk"]).save(tmp_path / "router")
    assert json.loads((folder / "router.json").read_text())["margin"] is None
    assert set(DomainRouter.load(folder, tiny_llama(), tiny_llama_tokenizer()).predict(prompts)) == {"clerk"}


@pytest.mark.parametrize("change", ["format", "margin", "best_single", "link", "domains", "no json", "tensors", "cut"])
def test_a_damaged_router_is_refused_with_the_file(tmp_path: Path, change: str):
    folder = router().fit(*planted(10)).save(tmp_path / "router")
    settings = json.loads((folder / "router.json").read_text())
    wrong: dict[str, Any] = {"format": 2, "margin": "much", "best_single": 5, "link": "tanh", "domains": ["one"]}
    if change in wrong:
        (folder / "router.json").write_text(json.dumps(settings | {change: wrong[change]}))
    elif change == "no json":
        (folder / "router.json").write_text("[]")
    else:
        data = (folder / "router.safetensors").read_bytes()
        (folder / "router.safetensors").write_bytes(b"nonsense" if change == "tensors" else data[:-8])
    with pytest.raises(
        RunError, match=r"router\.(json|safetensors) is damaged: got .*, expected what DomainRouter\.save writes\. Restore it"
    ) as refused:
        DomainRouter.load(folder, tiny_llama(), tiny_llama_tokenizer())
    assert refused.value.code == "router-damaged"


@pytest.mark.parametrize(("changes", "got"), [({"num_hidden_layers": 3}, "4 layers"), ({"hidden_size": 32}, "96 features")])
def test_a_router_is_not_opened_with_another_probe(tmp_path: Path, changes: dict[str, int], got: str):
    folder = router().fit(*planted(10)).save(tmp_path / "router")
    with pytest.raises(InputError, match=rf"got a probe with {got}, expected .* Pass the probe that the router was fitted with\.") as refused:
        DomainRouter.load(folder, tiny_llama(**changes), tiny_llama_tokenizer())
    assert refused.value.code == "router-other-probe"


def nan_scores() -> Any:
    scores = scores_of(planted(10)[1])
    scores[3, 1] = np.nan
    return scores


@pytest.mark.parametrize(
    ("code", "message", "known"),
    [
        ("router-nothing-to-learn", r"got 20 prompts, no labels and no scores, expected at least 10", {}),
        ("router-shapes", r"got 3 labels for 20 prompts, expected one for each", {"labels": ["critic"] * 3}),
        ("router-shapes", r"got scores of shape \(20, 3\), expected \(20, 2\)", {"scores": np.ones((20, 3))}),
        ("router-shapes", r"got 1 groups for 20 prompts", {"labels": planted(10)[1], "groups": ["a"]}),
        ("router-one-source", r"got one source in groups, 'a', expected at least two", {"labels": planted(10)[1], "groups": ["a"] * 20}),
        ("router-model-never-right", r"got no prompt on which clerk is right, expected some for each model", {"labels": ["critic"] * 20}),
        ("router-model-never-right", r"got no prompt on which critic is right", {"scores": np.tile([0.0, 1.0], (20, 1))}),
        ("not-finite", r"scores has 1 NaN or infinite entries out of 40", {"scores": nan_scores()}),
        ("unknown-choice", r"labels='nurse' is not known\. Choose one of: critic, clerk\.", {"labels": ["nurse"] * 20}),
    ],
)
def test_what_cannot_be_learned_from_is_refused(code: str, message: str, known: dict[str, Any]):
    with pytest.raises(InputError, match=message) as refused:
        router().fit(planted(10)[0], **known)
    assert refused.value.code == code


def test_too_few_prompts_are_refused():
    with pytest.raises(InputError, match=r"got 4 prompts, labels and no scores, expected at least 10 prompts"):
        router().fit(*planted(2))


@pytest.mark.parametrize("models", ["clerk", ["clerk"], ["clerk", "clerk"], []])
def test_fewer_than_two_models_are_refused(models: Any):
    with pytest.raises(InputError, match=r"expected at least two different names") as refused:
        DomainRouter(tiny_llama(), tiny_llama_tokenizer(), models=models)
    assert refused.value.code == "router-models"


@pytest.mark.parametrize("layers", [[], [3], [-1], "last"])
def test_layers_that_the_probe_does_not_have_are_refused(layers: Any):
    with pytest.raises(InputError, match=r"expected numbers from 0, the embeddings, to 2\. Pass layers='all' if in doubt\."):
        router(layers=layers)


@pytest.mark.parametrize("probe", [nn.Linear(3, 3), None])
def test_a_probe_without_hidden_states_is_refused(probe: Any):
    with pytest.raises(InputError, match=r"which gives no hidden states of its layers, expected a language model of transformers") as refused:
        DomainRouter(probe, tiny_llama_tokenizer(), models=MODELS)
    assert refused.value.code == "probe-no-hidden-states"


@pytest.mark.parametrize("prompts", ["one", [], [1]])
def test_prompts_that_are_no_list_of_texts_are_refused(prompts: Any):
    with pytest.raises(InputError, match=r"expected a list of texts, at least one\. Put a single text into a list\."):
        router().encode(prompts)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(InputError, match=r"got the prompt ' ', which has no tokens, expected some text") as refused:
        DomainRouter(tiny_llama(), tiny_llama_tokenizer(bos=False), models=MODELS).encode(["one", " "])
    assert refused.value.code == "prompt-empty"


def test_a_router_that_learned_nothing_says_so():
    with pytest.raises(InputError, match=r"got a router that has learned nothing, expected a fitted one\. Call fit") as refused:
        router().route("one")
    assert refused.value.code == "router-not-fitted"


def test_states_that_overflow_are_refused():
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(InputError, match=r"hidden states of the probe has \d+ NaN or infinite entries"):
        DomainRouter(model, tiny_llama_tokenizer(), models=MODELS).encode(["one"])
