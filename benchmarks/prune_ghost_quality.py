"""What states of Mamba2 are worth: perplexity with 10 to 90 % of them removed, by GHOST and by what it is compared with, on text that nobody has seen.

``quality``: every method, size and draw of calibration text, with and without recalibration where that makes a difference. ``transfer``: calibrating on one
text, testing on another. ``rankings``: how far magnitude and GHOST agree. ``recall``: what perplexity may hide, see `recalled`. ``figure`` draws
docs/images/prune_ghost.png from the rows. Calibration is 128 rows of 128 tokens, as in the paper; a draw shares no row with another one.
Run: ``python benchmarks/prune_ghost_quality.py [quality] [transfer] [rankings] [recall] [figure] [--models "Mamba2 of WikiText-2"] [--resume]`` (half an
hour a model on one core; ``--resume`` goes on where it was interrupted).
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from partwise.prune import GHOST, Magnitude, Random, Taylor, apply
from prune_models import MODELS, draws_of, load, perplexity, plans_at, present, rows_of, written
from resumable import KeptValues
from rows import ROOT, Row, append, latest, read

NAME = "prune_ghost_quality"
REMOVED = (0.1, 0.3, 0.5, 0.7, 0.9)
DRAWS, SEEDS = (0, 1, 2), (0, 1, 2, 3, 4)  # of calibration text; of random states
CALIBRATION, TEST = (128, 128), (64, 256)  # rows, tokens
GOAL, AHEAD_FROM = 1.1, 0.3
# Name -> the method; keep is filled in.
GHOSTS = {
    "GHOST": GHOST(),
    "controllability": GHOST(factor="controllability"),
    "observability": GHOST(factor="observability"),
    "product of means": GHOST(factor="product_of_means"),
}
ENTRIES: dict[str, Any] = {
    **GHOSTS,
    **{f"{name} without recalibration": replace(method, recalibrate=False) for name, method in GHOSTS.items()},
    "Taylor": Taylor(),
    "Magnitude": Magnitude(),
    **{f"Random, seed {seed}": Random(seed=seed) for seed in SEEDS},
}
FORWARD_ONLY = ("Magnitude", "Random", "controllability", "observability")
# Of the paper: Mamba2 of 1.3 billion parameters, WikiText-2; the whole model 13.17.
THEIRS = {
    "GHOST": (13.24, 13.51, 14.23, 16.16, 25.07),
    "Magnitude": (427.7, 22.39, 29.34, 39.96, 69.49),
    "Random": (13.52, 15.04, 17.77, 30.14, 64.21),
    "Taylor": (13.18, 13.26, 13.94, 4255, 4690),
}


@dataclass(frozen=True)
class Bench:
    """A model with its text: calibration rows of each draw, and rows to test on."""

    title: str
    model: Any
    draws: list[Tensor]
    test: Tensor
    other_draws: list[Tensor]
    other_test: Tensor


def bench(title: str, *, calibration: tuple[int, int] = CALIBRATION, test: tuple[int, int] = TEST) -> Bench:
    """A model, text of the kind that it was trained on, and text of the other kind."""
    folder, text = MODELS[title]
    model, tokenizer = load(folder)
    for layer in model.backbone.layers:
        layer.mixer.chunk_size = 32  # the same numbers as with 64 up to rounding, and faster on a CPU
    [other] = {text for _, text in MODELS.values()} - {text}
    deal = partial(draws_of, tokenizer=tokenizer, num_draws=len(DRAWS), num_rows=calibration[0], num_tokens=calibration[1])
    take = partial(rows_of, tokenizer=tokenizer, use="test", num_rows=test[0], num_tokens=test[1])
    return Bench(title, model, deal(text), take(text), deal(other), take(other))


def kept(removed: float) -> float:
    return round(1 - removed, 6)


def key(*words: object) -> str:
    return " | ".join(map(str, words))


def perplexities(on: Bench, name: str, draw: int, values: KeptValues) -> list[float]:
    """With each share of states removed."""
    missing = [share for share in REMOVED if not values.has(key(name, draw, share))]
    plans = plans_at(ENTRIES[name], on.model, on.draws[draw], [kept(share) for share in missing])

    def measure() -> float:
        _, plan = next(plans)  # asked for in the order of the shares that are missing
        return perplexity(apply(on.model, plan), on.test)

    return [values.of(key(name, draw, share), measure) for share in REMOVED]


def quality(on: Bench, values: KeptValues) -> None:
    """Rows of every method and size, and of GHOST against the others."""
    whole = values.of(key("whole model"), lambda: perplexity(on.model, on.test))
    found: dict[str, dict[int, list[float]]] = {}  # method -> draw -> perplexity for each share
    for name, method in ENTRIES.items():
        if isinstance(method, Random):
            found.setdefault("Random", {})[method.seed] = perplexities(on, name, 0, values)
        else:
            found[name] = {draw: perplexities(on, name, draw, values) for draw in (DRAWS if method.NEEDS_DATA else DRAWS[:1])}
    seconds = values.seconds
    for number, share in enumerate(REMOVED):
        at = {name: {draw: of_draw[number] for draw, of_draw in draws.items()} for name, draws in found.items()}
        for name, by_draw in at.items():
            append(NAME, quality_row(on.title, name, share, by_draw, whole, seconds))
        for name in at:
            if name in FORWARD_ONLY or (share == 0.5 and name in ("Taylor", "product of means", "GHOST without recalibration")):
                append(NAME, ahead_row(on.title, name, share, at["GHOST"], at[name], seconds))
        print(on.title, f"{share:.0%} removed", {name: f"{statistics.median(draws.values()) / whole - 1:+.2%}" for name, draws in at.items()}, flush=True)


def method_of(name: str, share: float) -> str:
    """What makes it; a seed or draw is not part of it."""
    return written(replace(Random() if name == "Random" else ENTRIES[name], keep=kept(share)))


def paper(name: str, share: float) -> str | None:
    if name not in THEIRS:
        return None
    return f"{THEIRS[name][REMOVED.index(share)]:g}, the whole model 13.17 (Mamba2 of 1.3 billion parameters, WikiText-2, one run)"


def quality_row(title: str, name: str, share: float, by_draw: Mapping[int, float], whole: float, seconds: float) -> Row:
    """Perplexity against that of the whole model."""
    asked = name == "GHOST" and share == 0.5
    ratio = {draw: value / whole for draw, value in by_draw.items()}
    reads = name != "Random" and ENTRIES[name].NEEDS_DATA
    data = f"; calibration of {CALIBRATION[0]} rows of {CALIBRATION[1]} tokens, others for each draw" if reads else ""
    return Row(
        claim=f"Perplexity with {share:.0%} of the states removed: {title}, {name}",
        method=method_of(name, share),
        values=tuple(by_draw.values()),
        unit="perplexity",
        seeds=tuple(by_draw),
        seconds=seconds,
        baseline="whole model",
        baseline_values=(whole,) * len(by_draw),
        paper=paper(name, share),
        expected=f"at most {GOAL - 1:.0%} above the whole model, in every draw" if asked else "",
        held=all(value <= GOAL for value in ratio.values()) if asked else None,
        note=f"{statistics.median(ratio.values()) - 1:+.2%} by medians. {TEST[0]} held-out rows of {TEST[1]} tokens{data}.",
    )


def ahead_row(title: str, name: str, share: float, ours: Mapping[int, float], theirs: Mapping[int, float], seconds: float) -> Row:
    """GHOST against another one, draw by draw; random states by the best of their seeds, and what needs no draw by its one value."""
    asked = name in FORWARD_ONLY and share >= AHEAD_FROM
    rival = [theirs[draw] for draw in ours] if name not in ("Random", "Magnitude") else [min(theirs.values())] * len(ours)
    ahead = [mine < other for mine, other in zip(ours.values(), rival, strict=True)]
    said = {"product of means": f"{name}: ", "GHOST without recalibration": "without recalibration: "}.get(name, f"{name} alone: ")
    said = said if name in ENTRIES and isinstance(ENTRIES[name], GHOST) else ""  # the repr of these says it in its brackets only
    best = f", the best of {len(theirs)} seeds" if name == "Random" else ""
    return Row(
        claim=f"GHOST is ahead of {name} with {share:.0%} of the states removed: {title}",
        method=method_of("GHOST", share),
        values=tuple(ours.values()),
        unit="perplexity",
        seeds=tuple(ours),
        seconds=seconds,
        baseline=f"{said}{method_of(name, share)}{best}",
        baseline_values=tuple(rival),
        expected="lower in every draw" if asked else "",
        held=all(ahead) if asked else None,
        note=f"{statistics.median(ours.values()) / statistics.median(rival) - 1:+.2%} by medians; lower in {sum(ahead)} of {len(ahead)} draws.",
    )


def transfer(on: Bench, values: KeptValues, share: float = 0.5) -> None:
    """Calibrated on the other text against calibrated on the model's own, tested on both."""
    found = dict[tuple[str, str], list[float]]()
    for source, draws in (("own", on.draws), ("other", on.other_draws)):
        for draw in DRAWS:
            made: list[Any] = []  # of one plan, two numbers

            def measure(rows: Tensor, draws: list[Tensor] = draws, draw: int = draw, made: list[Any] = made) -> float:
                if not made:
                    made.append(apply(on.model, GHOST(keep=kept(share)).plan(on.model, draws[draw])))
                return perplexity(made[0], rows)

            for tested, rows in (("own", on.test), ("other", on.other_test)):
                value = values.of(key(source, tested, draw, share), partial(measure, rows))
                found.setdefault((source, tested), []).append(value)
    whole = {
        tested: values.of(key("whole model", tested), partial(perplexity, on.model, rows))
        for tested, rows in (("own", on.test), ("other", on.other_test))
    }
    for tested in whole:
        ours, theirs = found["other", tested], found["own", tested]
        change = statistics.median(ours) / statistics.median(theirs) - 1
        append(
            NAME,
            Row(
                claim=f"Calibrated on the other text, {share:.0%} of the states removed: {on.title}, tested on its {tested} text",
                method=f"{method_of('GHOST', share)}, the other text",
                values=tuple(ours),
                unit="perplexity",
                seeds=DRAWS,
                seconds=values.seconds,
                baseline=f"{method_of('GHOST', share)}, the text that the model was trained on",
                baseline_values=tuple(theirs),
                note=f"{change:+.2%} by medians; the whole model {whole[tested]:.4g}. The texts are the source of the standard library and WikiText-2.",
            ),
        )


def rankings(on: Bench, values: KeptValues) -> None:
    """How far the norm of a state's weights tells what the state contributes."""
    found = [values.of(key(draw), partial(_compared, on, draw)) for draw in DRAWS]
    size = f"{found[0]['states']} states of all layers, scored on the whole model."
    kinds = {
        "disagreement": ("Magnitude and GHOST disagree on a state, at half of the states", "% of the states", "41.3 % (6,144 states, 1.3 billion parameters)"),
        "correlation": ("Correlation of the norm of a state's weights with its contribution", "Pearson's r", "-0.19 (6,144 states, 1.3 billion parameters)"),
        "rank correlation": ("Rank correlation of the norm of a state's weights with its contribution, layer by layer", "Spearman's rho, mean", None),
    }
    for kind, (claim, unit, theirs) in kinds.items():
        append(
            NAME,
            Row(
                claim=f"{claim}: {on.title}",
                method="Magnitude() beside GHOST(recalibrate=False)",
                values=tuple(of_draw[kind] for of_draw in found),
                unit=unit,
                seeds=DRAWS,
                seconds=values.seconds,
                paper=theirs,
                note=size,
            ),
        )


def _compared(on: Bench, draw: int) -> dict[str, float]:
    norms, energies = Magnitude().plan(on.model), GHOST(recalibrate=False).plan(on.model, on.draws[draw])
    pairs = [(norms.scores[name], energies.scores[name]) for name in norms.scores]
    both = torch.stack([torch.cat([pair[side] for pair in pairs]) for side in (0, 1)])  # (2, states of all layers)
    ranks = [torch.corrcoef(torch.stack([scores.argsort().argsort().double() for scores in pair]))[0, 1] for pair in pairs]
    return {
        "disagreement": 100 * (1 - norms.agreement(energies)),
        "correlation": float(torch.corrcoef(both)[0, 1]),
        "rank correlation": float(torch.stack(ranks).mean()),
        "states": both.shape[1],
    }


@torch.no_grad()
def token_losses(model: Any, rows: Tensor) -> Tensor:
    """Of each token but the first: (rows, tokens - 1)."""
    found = []
    for batch in rows.split(8):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()  # (batch, tokens - 1, vocabulary)
        found.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none"))
    return torch.cat(found)


def repeated(rows: Tensor) -> Tensor:
    """Which tokens, the first left out, complete a pair of tokens that the row had before: (rows, tokens - 1), bool."""
    marks = torch.zeros(len(rows), rows.shape[1] - 1, dtype=torch.bool)
    for number, row in enumerate(rows.tolist()):
        seen: set[tuple[int, int]] = set()
        for place, pair in enumerate(pairwise(row)):
            marks[number, place] = pair in seen
            seen.add(pair)
    return marks


def copies(words: Tensor, *, num_rows: int = 64, length: int = 32) -> tuple[Tensor, Tensor]:
    """Words drawn by chance and all of them once more, and the same words behind others: (rows, 2 * length) each."""
    drawn = words[torch.randint(len(words), (2, num_rows, length), generator=torch.Generator().manual_seed(0))]
    return torch.cat([drawn[0], drawn[0]], dim=1), torch.cat([drawn[1], drawn[0]], dim=1)


def look_ups(tokenizer: Any, names: Tensor, *, num_rows: int = 128, num_pairs: int = 8) -> tuple[Tensor, Tensor]:
    """Lists ``name = value`` whose end asks for a value again, and the same lists in which that value was another one; the last token is what is asked for."""
    equals, newline = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" =", "\n"))
    generator = torch.Generator().manual_seed(1)
    told, untold = [], []
    for _ in range(num_rows):
        drawn = names[torch.randperm(len(names), generator=generator)[: 2 * num_pairs + 1]].tolist()
        keys, found, stranger = drawn[:num_pairs], drawn[num_pairs:-1], drawn[-1]
        asked = int(torch.randint(num_pairs, (1,), generator=generator))
        for lists, value in ((told, found[asked]), (untold, stranger)):
            lines = [[name, *equals, value if place == asked else other, *newline] for place, (name, other) in enumerate(zip(keys, found, strict=True))]
            lists.append([token for line in lines for token in line] + [keys[asked], *equals, found[asked]])
    return torch.tensor(told), torch.tensor(untold)


def word_tokens(tokenizer: Any) -> Tensor:
    """Tokens that are a space and a word of three letters or more."""
    pieces = {token: tokenizer.decode([token]) for token in range(len(tokenizer))}
    return torch.tensor([token for token, text in pieces.items() if text.startswith(" ") and len(text) > 3 and text[1:].isalpha()])


def recalled(model: Any, on: Bench, tokenizer: Any) -> dict[str, float]:
    """How much better a model predicts what the text told it before, in nats, and perplexity where held-out text repeats itself and where it does not."""
    words = word_tokens(tokenizer)
    again, anew = (token_losses(model, rows)[:, rows.shape[1] // 2 :].mean() for rows in copies(words))  # from the second word on
    told, untold = (token_losses(model, rows)[:, -1].mean() for rows in look_ups(tokenizer, words))
    losses, marks = token_losses(model, on.test), repeated(on.test)
    return {
        "copy": float(anew - again),
        "look-up": float(untold - told),
        "repeated": math.exp(float(losses[marks].mean())),
        "new": math.exp(float(losses[~marks].mean())),
        "share": float(marks.double().mean()),
    }


RECALL = {
    "copy": ("Gain of 32 random words when they come once more, over the same words behind others", "nats per token"),
    "look-up": ("Gain of a value that is asked for, when a list of 8 pairs told it", "nats"),
    "repeated": ("Perplexity where held-out text completes a pair of tokens that it had before", "perplexity"),
    "new": ("Perplexity where held-out text does not repeat itself", "perplexity"),
}


def recall(on: Bench, values: KeptValues, share: float = 0.5) -> None:
    """The probes before and after."""
    _, tokenizer = load(MODELS[on.title][0])
    whole = values.of(key("whole model"), lambda: recalled(on.model, on, tokenizer))
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name in ("GHOST", "Magnitude", *(f"Random, seed {seed}" for seed in SEEDS)):
        for draw in DRAWS if name == "GHOST" else (0,):

            def measure(name: str = name, draw: int = draw) -> dict[str, float]:
                plan = replace(ENTRIES[name], keep=kept(share)).plan(on.model, on.draws[draw])
                return recalled(apply(on.model, plan), on, tokenizer)

            value = values.of(key(name, draw, share), measure)
            seed = ENTRIES[name].seed if name.startswith("Random") else draw
            found.setdefault(name.partition(",")[0], {})[seed] = value
    for kind, (claim, unit) in RECALL.items():
        for name, by_draw in found.items():
            numbers = [value[kind] for value in by_draw.values()]
            middle = statistics.median(numbers)
            note = f"{100 * whole['share']:.0f} % of the tokens complete a pair. " if unit == "perplexity" else ""
            lost = f"{middle / whole[kind] - 1:+.2%}" if unit == "perplexity" else f"{middle - whole[kind]:+.4g} nats"
            append(
                NAME,
                Row(
                    claim=f"{claim}, {share:.0%} of the states removed: {on.title}, {name}",
                    method=method_of(name, share),
                    values=tuple(numbers),
                    unit=unit,
                    seeds=tuple(by_draw),
                    seconds=values.seconds,
                    baseline="whole model",
                    baseline_values=(whole[kind],) * len(numbers),
                    paper="LAMBADA loses 14 points at 50 % (1.3 billion parameters)" if kind == "look-up" and name == "GHOST" else None,
                    note=f"{note}{lost} by medians.",
                ),
            )


def figure() -> None:
    """Draw perplexity against the share that is removed, from the rows: docs/images/prune_ghost.png."""
    from partwise.figures import LINES, new_figure

    measured = {row.claim: row for row in latest(read(NAME)) if row.claim.startswith("Perplexity with")}
    titles = [title for title in MODELS if any(f": {title}, " in claim for claim in measured)]
    drawing = new_figure(760, 300)
    for axis, title in zip(drawing.subplots(1, len(titles), squeeze=False)[0], titles, strict=True):
        names = ("GHOST", "Magnitude", "Random", "controllability", "observability", "Taylor")
        for order, (name, colour) in enumerate(zip(names, LINES, strict=False)):
            rows = [measured[f"Perplexity with {share:.0%} of the states removed: {title}, {name}"] for share in REMOVED]
            above = [[100 * (value / row.baseline_values[0] - 1) for value in row.values] for row in rows]
            places = [100 * share for share in REMOVED]
            axis.plot(places, [statistics.median(of_share) for of_share in above], marker="o", color=colour, label=name, zorder=9 - order)
            axis.fill_between(places, list(map(min, above)), list(map(max, above)), color=colour, alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="states removed, %", xticks=places, ylim=(0, None))
    drawing.axes[0].set_ylabel("perplexity above the whole model, %")
    drawing.axes[0].legend(frameon=False)
    drawing.savefig(ROOT / "docs" / "images" / "prune_ghost.png", dpi=160)


def main() -> None:
    parts = {"quality": quality, "transfer": transfer, "rankings": rankings, "recall": recall}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(parts)}, figure; all if none is named")
    parser.add_argument("--models", default=",".join(title for title in MODELS if title.startswith("Mamba2")))
    parser.add_argument("--resume", action="store_true", help="use values that were measured before")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for title in present():
        if title in options.models.split(","):
            on = bench(title)
            for name in options.parts or parts:
                if name in parts:
                    started = time.perf_counter()
                    print(f"{title}: {name}", flush=True)
                    parts[name](on, KeptValues(f"{NAME}/{name}/{title.replace(' ', '-')}", resume=options.resume))
                    print(f"{title}: {name} took {time.perf_counter() - started:.0f} s", flush=True)
    if not options.parts or "figure" in options.parts:
        figure()


if __name__ == "__main__":
    main()
