"""How time and bytes of a round grow with workers, parameters and rounds, beside the formula; and a plan on paper for 1,000 workers.

An exponent is the slope of a line through the logarithms of size and cost; the formula goes through the same fit. Local steps cost in proportion to
batch, steps and the parameters that all parts hold together; the formula counts those and leaves out what does not grow. Times are processor time of one
thread, the smallest of several rounds; with worker processes, wall-clock time. Bytes are those that rounds report, against ``bytes_per_round``.

Run: ``python benchmarks/train_cost.py [--no-ray]`` (about four minutes on a core of its own).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from partwise.linalg.slicing import mean_over_holders
from partwise.train import IST, LocalSGD, OptimizerSettings, SubnetTrainer, TwIST
from partwise.train.method import SubnetMethod
from partwise.train.round_report import RoundReport
from partwise.train.traffic import bytes_per_round, data_parallel_bytes
from rows import Row, append

NAME = "train_cost"
REPEATS = (0, 1, 2)
STEPS, BATCH, NUM_INPUTS = 5, 256, 784
WORKERS = (1, 2, 4, 8)
OPTIMIZER = OptimizerSettings(optimizer="sgd", momentum=0.0)
Clock = Callable[[], float]


def perceptron(width: int) -> nn.Sequential:
    """Two hidden layers of ``width`` neurons."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(NUM_INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def decoder(hidden: int) -> Any:
    """A small Llama whose MLP is four times as wide as its hidden states."""
    from partwise.models.networks import build

    sizes = {"hidden_size": hidden, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 4 * hidden}
    return build({"network": "llama", **sizes, "vocab_size": 512, "max_position_embeddings": 64})


def samples() -> list[Any]:
    """One batch; what is in it does not change the cost."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(BATCH, NUM_INPUTS, generator=generator), torch.randint(10, (BATCH,), generator=generator))]


def texts() -> list[Any]:
    ids = torch.randint(512, (8, 64), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids}]


def rounds_of(method: SubnetMethod, model: nn.Module, data: Any, *, num_rounds: int, clock: Clock = time.process_time, **engine: Any) -> list[float]:
    """Seconds of every round but the first; its reported bytes must be those of the formula."""
    ticks: list[float] = []
    formula = bytes_per_round(method, model, optimizer=OPTIMIZER)

    def note(report: RoundReport, _: SubnetTrainer) -> None:
        ticks.append(clock())
        assert (report.bytes_down, report.bytes_up) == (formula.down, formula.up)

    trainer = SubnetTrainer(model, method, optimizer=OPTIMIZER, probe_every=0, num_threads=1, **engine)
    trainer.fit(data, num_rounds=num_rounds, progress=note)
    return np.diff(ticks).tolist()


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def held_by_all(method: SubnetMethod, model: nn.Module) -> float:
    """Parameters that all parts of a round hold together."""
    return bytes_per_round(method, model).down / 4


def report(claim: str, method: str, values: Sequence[float], *, unit: str, started: float, note: str, **more: Any) -> None:
    repeats = REPEATS if len(values) == len(REPEATS) else tuple(range(len(values)))
    append(
        NAME,
        Row(claim=claim, method=method, values=tuple(values), unit=unit, seeds=repeats, seconds=time.perf_counter() - started, note=note, **more),
    )
    print(f"{claim} [{method}]: {[f'{value:.4g}' for value in values]} {[f'{value:.4g}' for value in more.get('baseline_values', ())]}", flush=True)


def growth(claim: str, method: str, cases: Sequence[tuple[float, SubnetMethod, Callable[[], nn.Module], Any]], *, note: str) -> None:
    """The exponent of the time of a round, and of the formula; sizes take turns, so that a busy machine slows all of them."""
    started, sizes = time.perf_counter(), [size for size, *_ in cases]
    formula = exponent(sizes, [held_by_all(method, build()) for _, method, build, _ in cases])
    measured, costs = [], []
    for _ in REPEATS:
        costs.append([min(rounds_of(method, build(), data, num_rounds=3)) for _, method, build, data in cases])
        measured.append(exponent(sizes, costs[-1]))
    seconds = ", ".join(f"{cost:.3g} s" for cost in np.min(costs, axis=0))
    report(claim, method, measured, unit="exponent", started=started, baseline="the formula", baseline_values=(formula,) * len(REPEATS),
           note=f"{note} Sizes {', '.join(f'{size:,.0f}' for size in sizes)}: {seconds}. Reported bytes equal bytes_per_round at every size.")  # fmt: skip


def time_against_workers() -> None:
    claim, data = "Time of a round in one process against the number of parts", samples()
    where = f"batches of {BATCH}, plain SGD. One process works for all parts, so this is the work of a round, not its duration."
    for make, steps in ((IST, 20), (LocalSGD, STEPS)):  # IST's parts are small: with few steps, cutting and merging would be all there is to see
        cases = [(size, make(num_parts=size, num_local_steps=steps), lambda: perceptron(1024), data) for size in WORKERS]
        growth(claim, f"{make.__name__}(num_local_steps={steps})", cases, note=f"784-1024-1024-10, {steps} local steps each, {where}")
    cases = [(size, TwIST(num_parts=size, num_local_steps=STEPS, keep=0.5), lambda: decoder(128), texts()) for size in WORKERS]
    growth(claim, f"TwIST(num_local_steps={STEPS}, keep=0.5)", cases, note=f"4 layers of 128, 8 x 64 tokens, {STEPS} local steps each, plain SGD.")


def time_against_parameters() -> None:
    claim, widths, data = "Time of a round against the number of parameters", (512, 1024, 2048), samples()
    for make in (IST, LocalSGD):
        cases = [
            (_num_parameters(perceptron(width)), make(num_parts=2, num_local_steps=STEPS), lambda width=width: perceptron(width), data)
            for width in widths
        ]
        growth(claim, f"{make.__name__}(num_parts=2, num_local_steps={STEPS})", cases, note=f"784-w-w-10 for w of {', '.join(map(str, widths))}.")
    cases = [
        (_num_parameters(decoder(hidden)), TwIST(num_parts=2, num_local_steps=STEPS, keep=0.5), lambda hidden=hidden: decoder(hidden), texts())
        for hidden in (64, 128, 256)
    ]
    growth(
        claim,
        f"TwIST(num_parts=2, num_local_steps={STEPS}, keep=0.5)",
        cases,
        note="4 layers of 64, 128 and 256; the embedding is pinned and grows more slowly. Steps of so small a model cost more than their arithmetic.",
    )


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def time_against_rounds() -> None:
    started, numbers, measured = time.perf_counter(), (10, 20, 40), []
    method, data = IST(num_parts=4, num_local_steps=2), samples()
    for _ in REPEATS:
        costs = [sum(rounds_of(method, perceptron(256), data, num_rounds=number + 1)) for number in numbers]
        measured.append(exponent(numbers, costs))
    report(
        "Time of a run against the number of rounds",
        repr(method),
        measured,
        unit="exponent",
        started=started,
        baseline="the formula",
        baseline_values=(1.0,) * len(REPEATS),
        expected="at most 1.1: no round costs more than the one before",
        held=bool(np.median(measured) <= 1.1),
        note=f"784-256-256-10, {', '.join(map(str, numbers))} rounds.",
    )


def time_against_processes() -> None:
    """Worker processes on one machine: seconds of a round, and what messages add to the formula."""
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    dataset = TensorDataset(torch.randn(2048, NUM_INPUTS, generator=generator), torch.randint(10, (2048,), generator=generator))
    loader = DataLoader(dataset, batch_size=64, shuffle=True)
    for make in (IST, LocalSGD):
        method, seconds, added = make(num_parts=max(WORKERS), num_local_steps=STEPS), [], []
        for number in WORKERS:
            trainer = SubnetTrainer(
                perceptron(1024), method, optimizer=OPTIMIZER, probe_every=0, num_threads=1, engine="ray", num_workers=number
            ).fit(loader, num_rounds=6)
            seconds.append(min(report.seconds for report in trainer.history[1:]))
            sent = sum(report.bytes_down + report.bytes_up for report in trainer.history)
            assert trainer.traffic is not None
            added.append((trainer.traffic.bytes_down + trainer.traffic.bytes_up) / sent - 1)
        report(
            "Seconds of a round against worker processes on this machine (1, 2, 4 and 8)",
            repr(method),
            seconds,
            unit="seconds per round",
            started=started,
            note="784-1024-1024-10, 8 parts; the four values are for 1, 2, 4 and 8 processes of one thread each, on two cores that others may share, so "
            "they say what an exchange costs and not how rounds scale. "
            f"{bytes_per_round(method, perceptron(1024)).total / 2**20:.1f} MiB per round; messages add at most {max(added):.2%} to the formula.",
        )


# 1,000 workers on paper -----------------------------------------------------------------------------------------------------------------------------

NUM_WORKERS, LOCAL_STEPS, TOKENS = 1000, 50, 8192
WORKER_LINK, CENTRE_LINK = 100e6 / 8, 10e9 / 8  # bytes per second: 100 Mbit/s at home, 10 Gbit/s at the coordinator
WORKER_FLOPS = 1e12  # per second and worker, sustained: one small accelerator


def merge_rate(*, num_numbers: int = 2_000_000, num_pieces: int = 8) -> float:
    """Numbers that one core merges per second: measured."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(num_numbers // 1000, 1000, generator=generator)
    kept = torch.arange(0, 1000, 2)
    pieces = [({1: kept}, torch.randn(len(old), len(kept), generator=generator)) for _ in range(num_pieces)]
    times = []
    for _ in range(5):
        before = time.process_time()
        mean_over_holders(old, pieces)
        times.append(time.process_time() - before)
    return num_pieces * pieces[0][1].numel() / min(times)


def plan(rate: float) -> None:
    """A 124M decoder on 1,000 workers behind slow links: what a round of equal work takes, and what limits it."""
    import transformers

    started = time.perf_counter()
    sizes = {"vocab_size": 50257, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **sizes))
    whole = _num_parameters(model)
    rounds: list[tuple[str, dict[str, float]]] = []
    held: dict[str, float] = {}  # results of a round are all there before they are merged
    for name, method in {
        "LocalSGD(num_parts=1000)": LocalSGD(num_parts=NUM_WORKERS),
        "TwIST(num_parts=1000)": TwIST(num_parts=NUM_WORKERS),
        "TwIST(num_parts=1000, keep=0.5)": TwIST(num_parts=NUM_WORKERS, keep=0.5),
        "TwIST(num_parts=1000, keep=0.25)": TwIST(num_parts=NUM_WORKERS, keep=0.25),
    }.items():
        traffic = bytes_per_round(method, model)
        one = max(traffic.per_worker)  # the slowest sets the pace
        held[name] = traffic.up / 1e9
        rounds.append((name, {
            "compute": 6 * (one / 4) * TOKENS * LOCAL_STEPS / WORKER_FLOPS,
            "worker links": 2 * one / WORKER_LINK,
            "one coordinator's link": traffic.total / CENTRE_LINK,
            "merging on one core": traffic.up / 4 / rate,
        }))  # fmt: skip
    ring = data_parallel_bytes(whole, num_workers=NUM_WORKERS, num_steps=LOCAL_STEPS) / NUM_WORKERS
    rounds.append(("DDP, ring all-reduce", {"compute": 6 * whole * TOKENS * LOCAL_STEPS / WORKER_FLOPS, "worker links": ring / WORKER_LINK}))
    for method, seconds in rounds:
        own = seconds["compute"] + seconds["worker links"]
        central = sum(seconds.values()) - own
        shards = int(np.ceil(central / seconds["worker links"]))
        advice = (
            f" With the coordinator cut into {shards} by layers: {own + central / shards:,.0f} s. One holds {held[method]:,.0f} GB of results."
            if central
            else ""
        )
        report(
            f"On paper: {LOCAL_STEPS} steps of {NUM_WORKERS:,} workers on a decoder of 124 million parameters",
            method,
            [own + central],
            unit="seconds",
            started=started,
            note="Not measured: from the byte formulas, links of 100 Mbit/s at workers and 10 Gbit/s at the coordinator, 1 TFLOP/s and "
            f"{TOKENS:,} tokens a step per worker, moments not sent, {rate / 1e6:,.0f} million numbers merged per second (measured here). "
            + ", ".join(f"{name} {value:,.0f} s" for name, value in seconds.items())
            + f"; the bottleneck is {max(seconds, key=lambda name: seconds[name])}.{advice}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--no-ray", action="store_true", help="leave out the part that starts worker processes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plan(merge_rate())
    time_against_rounds()
    time_against_workers()
    time_against_parameters()
    if not arguments.no_ray:
        time_against_processes()


if __name__ == "__main__":
    main()
