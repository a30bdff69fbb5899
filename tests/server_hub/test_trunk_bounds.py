"""The bound on activations in a step of the trunk, against activations shortened by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from edge_sdk.protocol.tensors import State
from server_hub.trunk.bounds import FACTOR, ActivationBound
from server_hub.trunk.interface import StepInput, TrunkPlan
from server_hub.trunk.step import TrunkTrainer
from tests.lib.trunk_models import arrival_of, by_layer, dense_model, state_of, tensors_of

PLAN = TrunkPlan("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0})


def scaled(arrival: StepInput, factor: float) -> StepInput:
    """Return an arrival with all activations multiplied."""
    parts = dict(arrival.batch.parts)
    parts["h.scale"] = (parts["h.scale"] * factor).astype(np.float32)
    return replace(arrival, batch=replace(arrival.batch, parts=parts))


def trained(steps: Sequence[Sequence[StepInput]]) -> State:
    """Return what a round of these steps has trained."""
    trainer = TrunkTrainer(dense_model(), "cpu")
    trainer.begin(state_of(dense_model()), PLAN)
    for inputs in steps:
        assert trainer.step(inputs).refused == {}
    return tensors_of(trainer.finish())


def rows(*norms: float) -> torch.Tensor:
    """Return rows of four elements with these root mean squares."""
    return torch.tensor(norms)[:, None] * torch.tensor([1.0, -1.0, 1.0, -1.0])


def bounded(bound: ActivationBound, *batches: tuple[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the batches of one step at cut 1, shortened; the step uses them."""
    found = bound.shortened([(device, 1, 0) for device, _ in batches], [h for _, h in batches])
    bound.keep()
    return found


def test_a_row_is_shortened_to_four_times_the_median_of_the_devices() -> None:
    bound = ActivationBound(torch.device("cpu"))
    fine = [("a", rows(1.0, 3.0)), ("b", rows(2.0)), ("c", rows(1.0))]
    *kept, far = bounded(bound, *fine, ("far", rows(1e4, 5.0)))
    for (_, before), after in zip(fine, kept, strict=True):
        assert torch.equal(before, after)
    # the levels are 2, 2, 1 and 5002.5, and of an even number of levels the lower middle counts
    torch.testing.assert_close(far, rows(FACTOR * 2.0, 5.0))


def test_a_device_has_one_vote_however_many_batches_it_sends() -> None:
    bound = ActivationBound(torch.device("cpu"))
    bounded(bound, ("a", rows(1.0)), ("b", rows(1.0)), ("c", rows(1.0)))
    for _ in range(20):
        *_, last = bounded(bound, ("far", rows(100.0)), ("far", rows(100.0)))
    torch.testing.assert_close(last, rows(FACTOR * 1.0))


def test_the_level_of_the_round_before_bounds_the_first_step() -> None:
    bound = ActivationBound(torch.device("cpu"))
    bounded(bound, ("a", rows(1.0)), ("b", rows(1.0)))
    bound.begin()
    torch.testing.assert_close(bounded(bound, ("far", rows(100.0)))[0], rows(FACTOR * 1.0))


def test_rows_of_zeros_stay_zeros() -> None:
    bound = ActivationBound(torch.device("cpu"))
    for h in bounded(bound, ("a", rows(0.0)), ("b", rows(0.0))):
        assert torch.equal(h, rows(0.0))


@pytest.mark.parametrize("factor", [1e2, 1e4])
def test_a_step_with_one_loud_device_is_that_of_its_activations_made_quiet(factor: float) -> None:
    model = dense_model()
    quiet = [arrival_of(model, 1, 4, seed) for seed in range(4)]
    loud = [*quiet[:3], scaled(quiet[3], factor)]
    found = trained([loud])
    again = trained([[*quiet[:3], scaled(quiet[3], 10 * factor)]])
    honest, start = trained([quiet]), state_of(model)
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, again[name], rtol=1e-4, atol=1e-6, err_msg=name)
        step = np.abs(honest[name] - start[name]).max()
        assert np.abs(tensor - start[name]).max() < 20 * step


def test_a_step_of_devices_that_are_alike_is_not_changed() -> None:
    """A quarter of a row's length is within the bound, so that rows stay bit for bit."""
    model = dense_model()
    quiet = [arrival_of(model, 1, 4, seed) for seed in range(4)]
    bound = ActivationBound(torch.device("cpu"))
    h = [torch.from_numpy(a.batch.parts["h.q"]).float() for a in quiet]
    for before, after in zip(h, bound.shortened([(a.device, 1, 0) for a in quiet], h), strict=True):
        assert torch.equal(before, after)


def test_the_returned_gradient_is_of_the_mean_loss_whatever_a_row_counts() -> None:
    """A device that claims too many examples counts less in the trunk, and learns no slower."""
    model = dense_model()
    arrival = arrival_of(model, 2, 4, 0, codec="fp16")
    gradients = []
    for weight in (1.0, 0.25):
        trainer = TrunkTrainer(dense_model(), "cpu")
        trainer.begin(state_of(model), replace(PLAN, returned=True))
        (gradient,) = trainer.step([replace(arrival, weight=weight)]).gradients
        assert gradient is not None
        gradients.append(gradient["h"].astype(np.float64))
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(("passes", "epochs"), [(1, 1), (3, 1), (2, 2)])
def test_an_example_counts_once_however_many_epochs_send_its_activations(
    passes: int, epochs: int
) -> None:
    model = dense_model()
    arrivals = [arrival_of(model, cut, 3, cut) for cut in (1, 2)]
    trainer = TrunkTrainer(dense_model(), "cpu")
    trainer.begin(state_of(model), replace(PLAN, epochs=epochs, passes=passes))
    for _ in range(passes):
        trainer.step(arrivals)
    copies = by_layer(trainer.finish())
    assert (copies["block.1"].samples, copies["head"].samples) == (3, 6)
