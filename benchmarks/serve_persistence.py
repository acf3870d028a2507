"""Do important tokens stay important? The persistence ratio of trained models, beside what it would be if early importance said nothing.

A token is pivotal when a query gives it more than average attention. The ratio is the share of later pivotal tokens that were pivotal early. If nearly all
tokens were pivotal once, it is near 1 for any attention; so it is shown beside the share of pivotal tokens, which is what a random guess would reach.
Run: ``OMP_NUM_THREADS=1 python benchmarks/serve_persistence.py`` (under a minute).
"""

from __future__ import annotations

import statistics
import time

import torch

from partwise.serve import persistence_ratio
from rows import Row, append
from serve_texts import dealt, held_out, load, present

NAME = "serve_persistence"
NUM_GROUPS, ROWS_PER_GROUP, NUM_TOKENS, SPLIT = 3, 4, 512, 0.5
ASKED = 0.95  # of the paper, in most layers
LIFT = 0.5


def measure(title: str) -> None:
    """The rows of one model."""
    model, tokenizer = load(title)
    started = time.perf_counter()
    texts = dealt(held_out(title, tokenizer, num_rows=NUM_GROUPS * ROWS_PER_GROUP, num_tokens=NUM_TOKENS), NUM_GROUPS)
    found = [persistence_ratio(model, ids, split=SPLIT) for ids in texts]
    seconds = time.perf_counter() - started
    ratios, shares, lifts = (torch.stack([getattr(one, name).mean(dim=1) for one in found]) for name in ("ratio", "pivotal_share", "lift"))
    by_layer = ", ".join(
        f"{ratio:.3f} beside {share:.3f}" for ratio, share in zip(ratios.mean(dim=0).tolist(), shares.mean(dim=0).tolist(), strict=True)
    )
    note = f"{ROWS_PER_GROUP} rows of {NUM_TOKENS} tokens in each of {NUM_GROUPS} groups, split in the middle. Ratio beside share, layer by layer: {by_layer}."
    shown = {"seeds": tuple(range(NUM_GROUPS)), "seconds": seconds, "note": note, "method": f"persistence_ratio(split={SPLIT})"}
    ratio, share, lift = (values.median(dim=1).values.tolist() for values in (ratios, shares, lifts))
    append(
        NAME,
        Row(
            claim=f"Important tokens stay important in most layers: {title}",
            values=tuple(ratio),
            unit="persistence ratio, median over the layers",
            baseline="share of early tokens that were pivotal: what a guess would reach",
            baseline_values=tuple(share),
            paper="above 95 % in most layers (OPT)",
            expected=f"above {ASKED:g} in more than half of the layers",
            held=bool(((ratios > ASKED).float().mean(dim=1) > 0.5).all()),
            **shown,
        ),
    )
    append(
        NAME,
        Row(
            claim=f"Early importance says which tokens matter later: {title}",
            values=tuple(lift),
            unit="lift, median over the layers: 0 for a guess, 1 for certainty",
            expected=f"at least {LIFT:g}",
            held=min(lift) >= LIFT,
            **shown,
        ),
    )
    print(title, f"ratio {statistics.median(ratio):.3f}, share {statistics.median(share):.3f}, lift {statistics.median(lift):.3f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for model_title in present():
        measure(model_title)
