"""Whether a line that stood once in a text is still of use when it is asked for: planted lines, with every budget, pinned and not.

Models of 5.5 million parameters cannot answer questions, and they do not copy random tokens (their guess is no better with the full cache). What they can
do is to write a line of ordinary words again more readily when it stood a hundred tokens before. So a line ``self.<name> = <value>``, or ``The <name> is the
<value>``, is planted in text that the model has not seen; later its name comes again, and the log-probability of its value is compared with that in the same
text with another line planted. The difference is the gain; a cache that lost the line has none. All is read token by token. Run:
``python benchmarks/serve_retrieval.py [--models WikiText-2]`` (minutes on one core). Models and texts: serve_texts.py.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor

import serve_texts
from partwise.serve import H2O, BudgetedCache, Scissorhands, SnapKV, StreamingLLM, attached
from partwise.serve.rule import EvictionRule
from rows import Row, append

NAME = "serve_retrieval"
SEEDS = (0, 1, 2, 3)
ROWS, BEFORE, BETWEEN = 12, 60, 100  # rows for a seed; tokens before the line, and between it and its return
BUDGETS = (48, 72, 96, 144)
GOAL = 0.9  # of the gain with the full cache, where the line is pinned
RULES: dict[str, EvictionRule] = {
    "Scissorhands": Scissorhands(),
    "StreamingLLM": StreamingLLM(),
    "H2O": H2O(recent=16),
    "SnapKV": SnapKV(window=16, recent=16, drop=2),
}
SHAPES = {"standard library": ("\n    self.{} =", " {}", "_"), "WikiText-2": ("\n The {} is the", " {}", " ")}
WORDS = {
    "standard library": "parser header socket buffer message handler address client server output string module object method record thread queue widget "
    "timeout counter encoder stream writer reader filter folder driver mapper window cursor",
    "WikiText-2": "London England American German river season album game team player church museum castle island village railway bridge army battle "
    "regiment composer singer novel bishop senator harbour",
}
LENGTHS: dict[str, tuple[int, int]] = {}  # of name and value, in tokens, the same for all lines of a model


def lines(title: str, tokenizer: Any, *, seed: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Names and values of lines, in tokens, as many in all."""
    stream, (name, value, between), words = random.Random(seed), SHAPES[title], WORDS[title].split()
    drawn = []
    for _ in range(40 * count):
        chosen = stream.sample(words, 5)
        texts = name.format(between.join(chosen[:2])), value.format(between.join(chosen[2:]))
        drawn.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts))
    sizes = LENGTHS.setdefault(title, Counter((len(first), len(second)) for first, second in drawn).most_common(1)[0][0])
    return [(first, second) for first, second in drawn if (len(first), len(second)) == sizes][:count]


def planted(title: str, tokenizer: Any) -> Tensor:
    """For all seeds, rows with the line that will be asked for, then the same rows with another line: (2 * seeds * rows, tokens)."""
    text = serve_texts.held_out(title, tokenizer, num_rows=len(SEEDS) * ROWS, num_tokens=BEFORE + BETWEEN).tolist()
    with_line, without = [], []
    for seed in SEEDS:
        found = lines(title, tokenizer, seed=seed, count=2 * ROWS)
        for number, row in enumerate(text[seed :: len(SEEDS)]):
            (name, value), (other, wrong) = found[number], found[ROWS + number]
            with_line.append(row[:BEFORE] + name + value + row[BEFORE:] + name + value)
            without.append(row[:BEFORE] + other + wrong + row[BEFORE:] + name + value)
    return torch.tensor(with_line + without)


def gains(model: Any, ids: Tensor, cache: BudgetedCache | None, *, num_scored: int, prefill: int) -> tuple[float, ...]:
    """Nats per token of the value that the line is worth, for each seed; without a cache: in one pass, as with a full one."""
    if cache is None:
        logits = model(input_ids=ids, use_cache=False).logits[:, -num_scored - 1 : -1]
    else:
        blocks = [ids[:, :prefill], *ids[:, prefill:-1].split(1, dim=1)]
        logits = torch.cat(
            [model(input_ids=block, cache=cache, use_cache=True, logits_to_keep=1).logits for block in blocks][-num_scored:], dim=1
        )
    chances = logits.float().log_softmax(dim=-1).gather(2, ids[:, -num_scored:, None])[..., 0].mean(dim=1)  # (2 * seeds * rows,)
    with_line, without = chances.view(2, len(SEEDS), ROWS).mean(dim=2)
    return tuple((with_line - without).tolist())


def run(title: str, model: Any, tokenizer: Any) -> None:
    """All rows of one model."""
    ids = planted(title, tokenizer)
    name, value = LENGTHS[title]
    line = range(BEFORE, BEFORE + name + value)
    full = gains(model, ids, None, num_scored=value, prefill=0)
    print(title, "full cache", [f"{gain:.3f}" for gain in full], flush=True)
    for budget in BUDGETS:
        for rule_name, rule in RULES.items():
            for pinned in ((), tuple(line)):
                started = time.perf_counter()
                own = gains(model, ids, BudgetedCache(model, rule, budget=budget, pinned=pinned), num_scored=value, prefill=min(BUDGETS))
                share = statistics.fmean(own) / statistics.fmean(full)
                asked = bool(pinned) and rule_name == "Scissorhands"
                state = "pinned" if pinned else "not pinned"
                print(f"  {budget} {rule_name}, {state}: {share:.0%}", flush=True)
                row = Row(
                    claim=f"What a line is worth {BETWEEN} tokens later with {budget} of {ids.shape[1]} tokens: {title}, {rule_name}, {state}",
                    method=f"{rule!r}, pinned={f'{len(line)} tokens of the line' if pinned else 'nothing'}",
                    values=own,
                    unit="nats per token of the value",
                    seeds=SEEDS,
                    seconds=time.perf_counter() - started,
                    baseline="full cache",
                    baseline_values=full,
                    expected=f"at least {GOAL:.0%} of the gain with the full cache, over all seeds" if asked else "",
                    held=share >= GOAL if asked else None,
                    note=f"{share:.0%} of the gain with the full cache; {ROWS} rows a seed.",
                )
                append(NAME, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(serve_texts.FOLDERS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for title in serve_texts.present():
        if title in options.models.split(","):
            model, tokenizer = serve_texts.load(title)
            with attached(model), torch.no_grad():
                run(title, model, tokenizer)


if __name__ == "__main__":
    main()
