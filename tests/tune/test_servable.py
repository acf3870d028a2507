"""Which adapter folders a server would load and apply as trained."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from partwise.checks import InputError
from partwise.tune import check_servable

GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"q": 2}, "alpha_pattern": {"q": 4}, "bias": "none"}
PREFIX = "base_model.model.q.lora_A.weight"


def folder(path, *, names=(PREFIX,), **changes):
    (path / "adapter_config.json").write_text(json.dumps(GOOD | changes))
    save_file({name: torch.zeros(2, 2) for name in names}, path / "adapter_model.safetensors")
    return path


def test_one_scale_and_plain_factors_are_servable(tmp_path):
    check_servable(folder(tmp_path))
    check_servable(folder(tmp_path, use_rslora=True, rank_pattern={"q": 1}, alpha_pattern={"q": 4}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 32, "lora_alpha": 64}, r"its rank 32 is above max_lora_rank=16: start the server with --max-lora-rank 32, or truncate"),
        ({"alpha_pattern": {}}, r"q is scaled by 4 and others by 2, but a server uses one scale"),
        ({"use_rslora": True}, r"q is scaled by 2.82843 and others by 4"),
        ({"use_dora": True}, r"it is a DoRA adapter: train without use_dora"),
        ({"bias": "all"}, r"bias='all' changes base weights: train with bias='none'"),
        ({"modules_to_save": ["score"]}, r"it saves whole modules \(score\), such as a classification head"),
        ({"peft_type": "IA3"}, r"it is of type IA3 and not LORA"),
        ({"names": (PREFIX, "base_model.model.embed.weight")}, r"1 tensors are no LoRA factors \(first: base_model.model.embed.weight\)"),
        ({"names": (PREFIX, "base_model.model.q.lora_A.adapad_state")}, r"checkpoint of a growing adapter: call partwise.tune.finalize\(model\)"),
    ],
)
def test_what_a_server_rejects_or_applies_wrongly_is_named(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        check_servable(folder(tmp_path, **changes))


def test_all_reasons_are_named_at_once(tmp_path):
    with pytest.raises(InputError, match=r"is above max_lora_rank=2.*; it is a DoRA adapter.*; bias='all'"):
        check_servable(folder(tmp_path, use_dora=True, bias="all"), max_lora_rank=2)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_says_what_to_pass(missing, tmp_path):
    (folder(tmp_path) / missing).unlink()
    with pytest.raises(InputError, match=rf"has no {missing}. Pass the folder that save_pretrained wrote, or RUN/result"):
        check_servable(tmp_path)


def test_a_pickle_in_the_folder_is_refused(tmp_path):
    (folder(tmp_path) / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"adapter_model\.bin"):
        check_servable(tmp_path)
