"""The reports of the Split-Mix benchmark: figures by hand, an attack, and the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import splitmix, splitmix_runs
from benchmarks import splitmix_report as report
from benchmarks.splitmix_runs import DUAL, FEDAVG, HETEROFL, SPLITMIX, Point, Run, Setting
from edge_sdk import config
from edge_sdk.training.adversarial import Attack
from export.bases.narrow import narrow
from export.bases.split_width import split_width
from export.bundles.model_source import build_model
from server_hub.storage.run_folder import RoundRecord

PLAN = config.load(splitmix.Plan, splitmix.PLAN)


def run_of(
    setting: Setting, seed: int, flop: Sequence[float], accuracy: Sequence[Mapping[str, float]]
) -> Run:
    """Return a run with these operations after each round and these accuracies by width."""
    job = PLAN.cell(setting, seed, Path("work"), Path("cifar")).job
    tiers = dict(zip(job.tiers, splitmix_runs.WIDTHS, strict=True))
    alike = setting.method == FEDAVG
    records = [
        RoundRecord(
            round=i + 1, clock=1.0, seconds=1.0, devices=20, dropped={}, local_loss=1.0,
            local_accuracy=None, trunk_loss=None, trunk_steps=0,
            accuracy={
                t: {"device_alone": values.get(setting.width if alike else w, 0.0)}
                for t, w in tiers.items()
            },
            bytes={"update": {"up": 2_000_000 * (i + 1), "down": 0}},
            costs={"device_flop": spent},
            mixed={str(splitmix_runs.bases_of(w)): value for w, value in values.items()},
        )
        for i, (spent, values) in enumerate(zip(flop, accuracy, strict=True))
    ]  # fmt: skip
    return Run(setting, job, records)


def test_accuracy_at_equal_flops_lies_on_the_line_between_two_rounds() -> None:
    """Outside the measured rounds it is the accuracy of the first or the last round."""
    curve = [Point(1, 10.0, 0.2), Point(2, 20.0, 0.4), Point(3, 30.0, 0.5)]
    wanted = {5.0: 0.2, 10.0: 0.2, 15.0: 0.3, 20.0: 0.4, 28.0: 0.48, 30.0: 0.5, 99.0: 0.5}
    for flop, accuracy in wanted.items():
        assert splitmix_runs.at_flop(curve, flop) == pytest.approx(accuracy)


def test_split_mix_is_compared_seed_by_seed_at_equal_rounds_and_at_equal_flops() -> None:
    """With 0.6 after 15 FLOPs, Split-Mix is 10 points behind at equal rounds, 10 ahead at 15."""
    mix = Setting("digits", "iid", SPLITMIX)
    average = Setting("digits", "iid", FEDAVG, "1/4")
    runs = {
        (mix, 0): run_of(mix, 0, [7, 15], [{"1/4": 0.3}, {"1/4": 0.6}]),
        (average, 0): run_of(average, 0, [10, 20], [{"1/4": 0.3}, {"1/4": 0.7}]),
        (average, 1): run_of(average, 1, [10, 20], [{"1/4": 0.3}, {"1/4": 0.1}]),
    }
    (panel,) = splitmix_runs.panels(runs)
    assert panel.gains(FEDAVG, "1/4", equal=False) == pytest.approx([-10])
    assert panel.gains(FEDAVG, "1/4", equal=True) == pytest.approx([10])
    scores = panel.scores(FEDAVG, "1/4")
    assert (scores.final, scores.best) == ([0.7, 0.1], [0.7, 0.3])
    assert scores.equal == pytest.approx([0.5])
    assert not scores.ended
    behind = report.verdict(runs, FEDAVG, equal=False)
    assert "**no**" in behind
    assert "(points: digits, iid: 1/4: -10.0)" in behind
    assert "**yes**" in report.verdict(runs, FEDAVG, equal=True)
    assert "1/4: +10.0" in report.verdict(runs, FEDAVG, equal=True)
    assert "not run yet" in report.verdict(runs, HETEROFL, equal=True)
    runs[average, 0] = run_of(average, 0, [5, 10], [{"1/4": 0.3}, {"1/4": 0.7}])
    assert splitmix_runs.panels(runs)[0].scores(FEDAVG, "1/4").ended


def test_a_verdict_says_how_often_the_seeds_agree() -> None:
    """+2 and +4 are clearly ahead, -1 and +2 are ahead by chance, one seed decides nothing."""
    cases = {"a": {"1/8": [2.0, 4.0], "1/4": [-1.0, 2.0]}, "b": {"1": [-3.0], "1/2": []}}
    assert report.answer(cases) == (
        "**in 2 of 3 cases**; ahead by more than the standard deviation over the seeds in 1, "
        "behind in 0 (points: a: 1/8: +3.0 ± 1.4, 1/4: +0.5 ± 2.1; b: 1: -3.0)."
    )


def test_heterofl_is_charged_the_widths_that_are_drawn() -> None:
    """With two widths the share would be (f + (f + F) / 2) / (f + F); with four it is lower."""
    share = splitmix_runs.drawn_share("digits")
    assert 1 / 4 < share < 1 / 2
    setting = Setting("digits", "iid", HETEROFL)
    run = run_of(setting, 0, [100.0], [{"1/2": 0.5, "1": 0.9}])
    assert run.flop == pytest.approx(100 * share)
    assert [p.accuracy for p in run.curve("1/2")] == [0.5]
    assert [p.accuracy for p in run.curve("1")] == [0.9]


def test_a_mix_takes_as_many_times_what_a_base_takes() -> None:
    """A base is as large as the narrowest model of FedAvg."""
    flop, size = splitmix_runs.use_of("digits", SPLITMIX, "1/8")
    assert (flop, size) == splitmix_runs.use_of("digits", FEDAVG, "1/8")
    assert splitmix_runs.use_of("digits", SPLITMIX, "1") == (8 * flop, 8 * size)


@pytest.mark.parametrize("data", list(splitmix_runs.SHAPES))
def test_models_of_all_widths_are_the_narrow_versions_of_the_widest(data: str) -> None:
    """All methods train these models."""
    example = torch.rand(2, *splitmix_runs.SHAPES[data])
    wide = build_model(splitmix_runs.model_name(data, "1"))
    for width, part in splitmix_runs.WIDTHS.items():
        shapes = {
            n: t.shape
            for n, t in build_model(splitmix_runs.model_name(data, width)).named_parameters()
        }
        assert shapes == {n: t.shape for n, t in narrow(wide, part, example).named_parameters()}
    base = split_width(wide, splitmix_runs.BASES, example).model
    assert {n: t.shape for n, t in base.named_parameters()} == {
        n: t.shape for n, t in build_model(splitmix_runs.model_name(data, "1/8")).named_parameters()
    }


def test_robustness_is_measured_for_every_mixture_and_number() -> None:
    """The rows have the keys that the table reads."""
    example = torch.rand(4, *splitmix_runs.SHAPES["digits"])
    wide = build_model(splitmix_runs.model_name("digits", "1"))
    bases = split_width(wide, splitmix_runs.BASES, example).with_dual_norms()
    rows = splitmix.measure_robustness(
        [bases.model] * 2, example, torch.tensor([0, 1, 2, 3]), Attack(), (1, 2), (0.0, 0.5)
    )
    assert [(r["bases"], r["robustness"]) for r in rows] == [(1, 0), (1, 0.5), (2, 0), (2, 0.5)]
    assert all(row["robust"] <= row["clean"] for row in rows)
    setting = Setting("digits", "iid", DUAL)
    run = replace(run_of(setting, 0, [1.0], [{"1": 0.9}]), robust=rows)
    assert list(report.robust_points({(setting, 0): run})) == [
        (DUAL, 1, 0.0), (DUAL, 1, 0.5), (DUAL, 2, 0.0), (DUAL, 2, 0.5),
    ]  # fmt: skip


def test_every_setting_is_a_job_of_its_own_in_a_folder_of_its_own() -> None:
    """Jobs on one data set and partition differ only in model, method and learning rate."""
    cells = {s: PLAN.cell(s, 3, Path("work"), Path("cifar")) for s in splitmix.SETTINGS}
    assert len({cell.folder for cell in cells.values()}) == len(cells)
    mix = cells[Setting("cifar10", "iid", SPLITMIX)].job
    narrowest = cells[Setting("cifar10", "iid", FEDAVG, "1/8")].job
    hyper = narrowest.local.hyper
    same = replace(
        mix,
        model=narrowest.model,
        method="fedavg",
        local=replace(mix.local, hyper={**hyper, "lr": hyper["lr"]}),
    )
    assert same == narrowest
    plain = cells[Setting("digits", "iid", splitmix_runs.PLAIN)].job
    assert (plain.mix.bases, plain.mix.robustness, plain.data.scale) == (1, 0.0, "unit")
    assert {tier.budget for tier in plain.tiers.values()} == {1.0}
