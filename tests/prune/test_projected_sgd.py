"""Descent in a box: what it is at both ends, that it never leaves, and that it goes on where it stopped."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from partwise.checks import InputError
from partwise.prune import ProjectedSGD
from tolerances import assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def parameters(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((4, 3), (5,))]


def gradients(step: int, params: list[nn.Parameter]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(parameter.shape, generator=generator).to(parameter.dtype) for parameter in params]


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(params, gradients(step, params), strict=True):
            parameter.grad = gradient
        optimizer.step()


def project_slowly(start: float, value: float, radius: float) -> float:
    return min(max(value, start - radius), start + radius)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_an_infinite_radius_it_is_sgd_to_the_bit(momentum: float, dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    run(ProjectedSGD(ours, lr=0.1, radius=math.inf, momentum=momentum), ours, range(20))
    run(torch.optim.SGD(theirs, lr=0.1, momentum=momentum), theirs, range(20))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_radius_0_no_bit_of_a_weight_changes(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.tensor([0.0, -0.0, 1e-30, -3.25], dtype=torch.float64).to(dtype))
    before = weight.detach().clone()
    run(ProjectedSGD([weight], lr=0.1, radius=0.0, momentum=0.9), [weight], range(5))
    assert torch.equal(weight, before)
    assert torch.equal(weight.signbit(), before.signbit())


@given(st.floats(1e-6, 2.0), st.floats(0.001, 10.0), st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from(DTYPES), st.integers(0, 50))
def test_after_every_step_no_entry_is_further_from_its_start_than_the_radius(
    radius: float, lr: float, momentum: float, dtype: torch.dtype, seed: int
) -> None:
    params = parameters(seed=seed, dtype=dtype)
    starts = [parameter.detach().double() for parameter in params]
    optimizer = ProjectedSGD(params, lr=lr, radius=radius, momentum=momentum)
    for step in range(6):
        run(optimizer, params, range(step, step + 1))
        for parameter, start in zip(params, starts, strict=True):
            assert float((parameter.detach().double() - start).abs().max()) <= radius, "exactly, rounding included"


@given(st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.sampled_from([0.0, 0.9]))
def test_it_agrees_with_clipping_one_number_at_a_time(radius: float, lr: float, momentum: float) -> None:
    params = parameters(dtype=torch.float64)
    starts = values = [value for parameter in params for value in parameter.flatten().tolist()]
    speeds = [0.0] * len(values)
    run(ProjectedSGD(params, lr=lr, radius=radius, momentum=momentum), params, range(8))
    for step in range(8):
        slopes = [value for gradient in gradients(step, params) for value in gradient.flatten().tolist()]
        speeds = [momentum * speed + slope for speed, slope in zip(speeds, slopes, strict=True)]
        moved = [value - lr * speed for value, speed in zip(values, speeds, strict=True)]
        values = [project_slowly(start, value, radius) for start, value in zip(starts, moved, strict=True)]
    found = torch.cat([parameter.detach().flatten() for parameter in params])
    assert_close(found, torch.tensor(values, dtype=torch.float64), claim="the loop a student would write")


def test_a_minimum_outside_the_box_is_approached_as_far_as_the_wall_and_one_inside_is_reached() -> None:
    weight = nn.Parameter(torch.tensor([0.0, 0.0]))
    optimizer = ProjectedSGD([weight], lr=0.1, radius=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        (weight - torch.tensor([2.0, 0.25])).square().sum().backward()
        optimizer.step()
    assert_close(weight.detach(), torch.tensor([0.5, 0.25]), claim="the nearest point of the box")


@given(st.integers(0, 8), st.sampled_from([0.0, 0.9]))
def test_a_state_that_was_saved_goes_on_to_the_same_bits(stop: int, momentum: float) -> None:
    whole, params = parameters(), parameters()
    run(ProjectedSGD(whole, lr=0.3, radius=0.2, momentum=momentum), whole, range(10))
    first = ProjectedSGD(params, lr=0.3, radius=0.2, momentum=momentum)
    run(first, params, range(stop))
    state = copy.deepcopy(first.state_dict())
    second = ProjectedSGD(params, lr=1.0, radius=9.0)  # starts where the first one stopped, which must not count
    second.load_state_dict(state)
    run(second, params, range(stop, 10))
    for one, other in zip(whole, params, strict=True):
        assert torch.equal(one, other)


def test_a_copied_optimiser_still_keeps_to_its_limits() -> None:
    pair = copy.deepcopy((params := parameters(), ProjectedSGD(params, lr=5.0, radius=0.1)))
    starts = [parameter.detach().clone() for parameter in pair[0]]
    pair[1].add_param_group({"params": [extra := nn.Parameter(torch.zeros(2))], "radius": 0.25})
    run(pair[1], [*pair[0], extra], range(3))
    assert max(float((one.detach() - start).abs().max()) for one, start in zip(pair[0], starts, strict=True)) <= 0.1
    assert 0.1 < float(extra.detach().abs().max()) <= 0.25


def test_a_parameter_without_a_gradient_stays_and_a_closure_gives_its_loss() -> None:
    still, moved = parameters()
    before = still.detach().clone()
    optimizer = ProjectedSGD([still, moved], lr=0.1, radius=1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = moved.square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert torch.equal(still, before)


def test_hooks_of_a_step_run_once() -> None:
    torch.optim.SGD(parameters(), lr=0.1)  # torch wraps the step of a class when the first of it is made
    params, calls = parameters(), []
    optimizer = ProjectedSGD(params, lr=0.1, radius=0.1)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    run(optimizer, params, range(1))
    assert calls == [1]


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"radius": -0.1}, "radius-range", r"got radius=-0\.1, expected 0 or more"),
        ({"radius": math.nan}, "radius-range", r"got radius=nan, expected 0 or more"),
        ({"lr": -1.0}, "optimizer-setting", r"got lr=-1\.0, expected 0 or more"),
        ({"momentum": 1.0}, "optimizer-setting", r"got momentum=1\.0, expected at least 0 and below 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, float], code: str, text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        ProjectedSGD(parameters(), **({"lr": 0.1, "radius": 0.1} | changes))
    assert caught.value.code == code


def test_the_state_of_plain_sgd_is_refused_because_it_does_not_say_where_training_started() -> None:
    theirs = torch.optim.SGD(parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"the state has no start for parameter 0, expected the state of a ProjectedSGD") as caught:
        ProjectedSGD(parameters(), lr=0.1, radius=0.1).load_state_dict(theirs.state_dict())
    assert caught.value.code == "no-start"
