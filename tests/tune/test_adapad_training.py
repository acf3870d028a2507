"""AdaPaD under transformers.Trainer and accelerate, with checkpoints, checkpointing and several workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from adapters import adapter_weights
from partwise.tune import AdaPaDCallback, AdaPaDConfig, OneRankAtATime, RepeatForLevels
from partwise.tune.adapad import controller_of
from partwise.tune.finished import active_ranks
from tiny import tiny_bert

IDS = torch.randint(3, 20, (40, 7), generator=torch.Generator().manual_seed(0))


class Rows(Dataset):
    def __len__(self):
        return len(IDS)

    def __getitem__(self, index):
        return {"input_ids": IDS[index], "labels": int(IDS[index].sum()) % 2}


def arguments(folder: Path, *, num_steps: int = 10, **changes) -> TrainingArguments:
    choices = {"per_device_train_batch_size": 8, "max_steps": num_steps, "save_steps": 5, "learning_rate": 1e-2, "logging_steps": 5}
    fixed = {"report_to": [], "use_cpu": True, "seed": 3, "disable_tqdm": True, "save_only_model": False}
    return TrainingArguments(output_dir=str(folder), **(choices | fixed | changes))


def config(**settings) -> AdaPaDConfig:
    fast = {"target_modules": "all-linear", "task_type": "SEQ_CLS", "target_r": 2, "growth_interval": 3, "growth_warmup": 0, "growth_modules": 3}
    return AdaPaDConfig(**(fast | {"preset": "balanced", "lora_dropout": 0.1} | settings))


def adapter(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def run(folder: Path, *, resume: str | None = None, settings: dict | None = None, callbacks=(), **changes):
    model = get_peft_model(tiny_bert(), config(**(settings or {})))
    Trainer(model, arguments(folder, **changes), train_dataset=Rows(), callbacks=list(callbacks)).train(resume_from_checkpoint=resume)
    return model


def test_trainer_grows_ranks_and_resumes_in_the_middle_of_a_scoring_window(tmp_path):
    straight = run(tmp_path / "straight")
    assert controller_of(straight).step == 10
    assert len(set(active_ranks(straight).values())) > 1
    resumed = run(tmp_path / "again", resume=str(tmp_path / "straight" / "checkpoint-5"))
    assert active_ranks(resumed) == active_ranks(straight)
    expected = adapter(straight)
    assert all(torch.equal(value, expected[name]) for name, value in adapter(resumed).items())


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = run(tmp_path / "plain", num_steps=4)
    saving = run(tmp_path / "saving", num_steps=4, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False})
    expected = adapter(plain)
    assert all(torch.equal(value, expected[name]) for name, value in adapter(saving).items())
    assert active_ranks(saving) == active_ranks(plain)


def test_the_callback_logs_finalises_and_tells_the_number_of_steps(tmp_path):
    model = get_peft_model(tiny_bert(), config(growth_interval=None, growth_warmup=None, growth_modules=None, target_r=None, budget=26))
    logged = []

    class Recorder(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            logged.append(dict(logs))

    trainer = Trainer(model, arguments(tmp_path, num_steps=20), train_dataset=Rows(), callbacks=[AdaPaDCallback(), Recorder()])
    trainer.train()
    num_modules = len(active_ranks(model))
    assert sum(active_ranks(model).values()) == 26
    assert num_modules <= logged[0]["adapad_components"] <= 26
    assert type(model.peft_config["default"]).__name__ == "LoraConfig"
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_gradient_accumulation_and_a_short_last_batch_keep_split(tmp_path, caplog):
    model = run(tmp_path, num_steps=6, settings={"finish": "deflate"}, gradient_accumulation_steps=2, per_device_train_batch_size=6)
    assert controller_of(model).step == 6
    assert controller_of(model).phase() == "split"


def test_exact_runs_under_a_stock_trainer(tmp_path):
    model = get_peft_model(tiny_bert(), config(schedule="exact", finish="deflate"))
    with RepeatForLevels(model):
        Trainer(model, arguments(tmp_path, num_steps=8), train_dataset=Rows()).train()
    assert controller_of(model).num_levels > 1
    assert not model._forward_pre_hooks


def test_accelerate_counts_real_steps_only():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = get_peft_model(tiny_bert(), config()).train()
    optimiser = torch.optim.AdamW(adapter_weights(model), lr=1e-2)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=8)
    model, optimiser, loader = accelerator.prepare(model, optimiser, loader)
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimiser.step()
                optimiser.zero_grad()
    assert controller_of(model).step == 6  # five batches an epoch: two pairs and the last one


def test_one_rank_at_a_time_runs_and_resumes_under_trainer(tmp_path):
    def stages():
        return OneRankAtATime(tiny_bert(), config(r=3, target_r=None), num_steps=12)

    straight = stages()
    Trainer(straight.model, arguments(tmp_path, num_steps=12), train_dataset=Rows()).train()
    assert straight.done
    assert set(active_ranks(straight.model).values()) == {3}
    again = stages()
    Trainer(again.model, arguments(tmp_path / "again", num_steps=12), train_dataset=Rows()).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-5")
    )
    expected = adapter(straight.model)
    assert again.done
    assert all(torch.equal(value, expected[name]) for name, value in adapter(again.model).items())


WORKER = """
import os, sys, torch, torch.distributed as dist
from adapters import adapter_weights, data, grower, levels_in_use, loss_of, mlp, own_gradients
from partwise.tune.adapad import controller_of
from partwise.tune.finished import active_ranks, finalize
kind, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
x, y = data(12)
own = slice(6 * rank, 6 * rank + 6)
settings = dict(budget=7, growth_interval=2, growth_warmup=0, growth_modules=1, component_warmup=2, schedule="split", advance_learning=kind.endswith("private"))
model = grower(**settings)
if kind.startswith("ddp"):
    outer = torch.nn.parallel.DistributedDataParallel(model)
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    outer = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
optimiser = torch.optim.AdamW(adapter_weights(model), lr=1e-2)
for _ in range(8):
    loss_of(outer, x[own], y[own]).backward()
    optimiser.step()
    optimiser.zero_grad()
whole = lambda tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
weights = [whole(p.detach()) for p in adapter_weights(model)]
if rank == 0:
    dist_free = [w.clone() for w in weights]
ranks = active_ranks(model)
dist.barrier()
dist.destroy_process_group()
if rank == 0:
    twin = grower(**settings)
    optimiser = torch.optim.AdamW(adapter_weights(twin), lr=1e-2)
    for _ in range(8):
        loss_of(twin, x, y).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert active_ranks(twin) == ranks, (active_ranks(twin), ranks)
    worst = max(float((a - b).abs().max()) for a, b in zip(dist_free, (p.detach() for p in adapter_weights(twin))))
    assert worst < 1e-7, worst
    print("same", worst, ranks)
sys.stdout.flush()
os._exit(0)  # gloo's threads can abort an interpreter that shuts down in order; an error above has ended it with 1 already
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "ddp-private", "fsdp2", "fsdp2-private"])
def test_two_workers_train_and_grow_like_one(kind, tmp_path, repository):
    """Half a batch each on two gloo processes; Adam turns gradients equal to 2e-9 into weights equal to 1e-7."""
    (tmp_path / "worker.py").write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": f"{repository / 'tests'}:{repository / 'src'}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(tmp_path / "worker.py"), kind, str(tmp_path / "store")]
    workers = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=500)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    assert "same" in outputs[0]
