"""The simulation of one job: real hub and devices, links in memory, and a virtual clock."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from edge_sdk.bundle.index import BundleIndex, TierEntry
from edge_sdk.bundle.manifest import Bundle, Manifest
from edge_sdk.bundle.store import BlobStore
from edge_sdk.inference.metrics import Metric, Tally
from edge_sdk.protocol.messages import DIVERGED
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import Runtime, load_runtime
from edge_sdk.runtime.onnx import OnnxRuntime
from edge_sdk.training.data import Examples
from edge_sdk.training.learner import Learner
from export.bundles.model_source import build_model
from export.bundles.writer import make_steps, segment_of, write_tier
from export.cutting.checks import check_sharing
from export.cutting.input_ranges import find_ranges
from export.cutting.split_model import WEIGHTS
from export.cutting.tied import tied_to_head
from export.planning.flops import flops_per_row
from export.steps.client_steps import ClientSteps
from export.steps.graph_set import all_steps
from export.steps.torch_runtime import TorchRuntime
from server_hub.config import HubConfig
from server_hub.gateway.limits import Limits
from server_hub.hub import Hub
from server_hub.methods.fleet import Fleet, JobOutline, arrays
from server_hub.methods.registry import find, simulated_methods
from server_hub.reports.plots import draw_partition
from server_hub.reports.report import write_report
from server_hub.rounds.round_log import JobFailed
from server_hub.rounds.rounds import RoundRules
from server_hub.simulation import clock
from server_hub.simulation.checkpoint import Checkpoint
from server_hub.simulation.clock import VirtualLoop
from server_hub.simulation.devices import (
    Behave,
    Meter,
    SimulatedDevice,
    TimedRuntime,
    honest,
)
from server_hub.simulation.job import DeviceRuntime, FleetTier, Job
from server_hub.simulation.partition import table_of
from server_hub.simulation.prepare import (
    Client,
    FederatedData,
    FleetTokens,
    check_cuts,
    check_fit,
    check_values,
    describe,
    fleet_of,
    put_down,
    read_data,
    resume,
    share_out,
)
from server_hub.simulation.trunk import TimedTrunk, flop_above
from server_hub.storage.run_folder import RoundRecord, RunFolder, read_records
from server_hub.trunk.errors import TrunkRefused
from server_hub.trunk.evaluator import batches_to_evaluate, logits_of
from server_hub.trunk.interface import EvaluationReport, Query

_PATIENCE = 10
"""Rounds in a row without any update, after which a run ends with an error."""

Say = Callable[[str], None]


class Simulation:
    """A job, ready to run.

    Args:
        job: the job to simulate.
        folder: run folder; an interrupted run of the same job in this folder resumes.
        runtime: runtime of the devices' steps.
        base: folder that relative paths in the job start from.
        say: called with a line of text for each step of the preparation.
        data: examples by device, for a run that resumes the same as before; None for the job's.
        behave: changes examples and runtime of devices, for experiments with attacks.

    Raises:
        ConfigError: the job is invalid, or the folder has a run of another job.
        DataError: the data cannot be read, or do not fit the model.
        ExportError: the model cannot be cut at a tier's cut layer, or a graph is not exact.
    """

    def __init__(
        self,
        job: Job,
        folder: Path,
        runtime: DeviceRuntime = "torch",
        base: Path = Path(),
        say: Say = lambda line: None,
        data: FederatedData | None = None,
        behave: Behave = honest,
    ) -> None:
        self.job, self.folder, self.runtime = job, folder, runtime
        self.recipe = find(job.method, simulated_methods())
        self.meter = Meter()
        self._behave, self._base = behave, base
        self._described = describe(job, runtime)
        self._resumed = resume(folder, self._described)
        say("reading data")
        self.data = read_data(job, base) if data is None else data.dataset()
        self._length = job.data.length if self.data.task == "tokens" else None
        self.tiers = self._pooled_tiers() if self.recipe.pooled else dict(job.tiers)
        self.clients = (
            share_out(job, self.tiers, self.data, self.recipe.pooled)
            if data is None or self.recipe.pooled
            else data.clients(self.tiers)
        )
        say("arranging the fleet")
        self.fleet = self._arrange()
        self._scratch = ExitStack()
        self._scratch_folder = Path(
            self._scratch.enter_context(tempfile.TemporaryDirectory(prefix="cutlayer-"))
        )
        self._steps: dict[str, ClientSteps] = {}
        self._flop: dict[str, dict[str, float]] = {}
        self._first: dict[str, OnnxRuntime] = {}
        self.index = self._export(say)

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, *error: object) -> None:
        self._scratch.close()

    # --- before anything runs -------------------------------------------------------------------

    def _pooled_tiers(self) -> dict[str, FleetTier]:
        """Return one tier that holds all data, with the compute of the hub.

        Its clients split the data into parts; one part has as many examples as the devices of a
        round have together.
        """
        parts = round(1 / self.job.share)
        cut = max(tier.cut for tier in self.job.tiers.values())
        return {"server": FleetTier(clients=parts, cut=cut, gflops=self.job.hub_gflops)}

    def _arrange(self) -> Fleet:
        job = self.job
        model = build_model(job.model)
        check_cuts(job, model)
        example = torch.from_numpy(self.data.train.x[:8])
        classes = check_fit(model, example, self.data.classes)
        hardens = job.method == "splitmix" and job.mix.robustness > 0
        tiers = {
            name: tier.exported(self.runtime, job.local.batch_size, hardens)
            for name, tier in self.tiers.items()
        }
        return self.recipe.fleet(fleet_of(job, model, tiers, example, classes))

    def _export(self, say: Say) -> BundleIndex:
        """Write the bundles that devices download."""
        fleet, folder = self.fleet, self._scratch_folder / "bundles"
        blobs, entries = BlobStore(folder / "blobs"), dict[str, TierEntry]()
        if not fleet.bases:  # base networks have their heads already, each with its own weights
            cuts = [tier.cut for tier in fleet.tiers.values()]
            for model in {id(m): m for m in (fleet.model, *fleet.models.values())}.values():
                model.add_heads(cuts, fleet.example, fleet.classes)
        ranges = find_ranges(fleet.model, fleet.example)
        decay, form = self.job.decay, (fleet.example, fleet.classes, self.job.optimizer, ranges)
        for name, tier in fleet.tiers.items():
            check_sharing(fleet.model_of(name), tier.cut)
            steps = make_steps(segment_of(fleet.model_of(name), tier), tier, *form, decay=decay)
            if not self._steps:  # all tiers take the same examples
                check_values(self.data, steps.ranges)
            exact = tier.runtime != "torch"  # the functional step itself needs no check
            manifest = write_tier(steps, name, tier, blobs, fleet.example, say, verified=exact)
            entries[name] = TierEntry(tier.cut, tier.codec, blobs.write(manifest.to_bytes()))
            self._steps[name] = steps
            self._flop[name] = {
                s.name: flops_per_row(s, self._length or 1) for s in all_steps(steps)
            }
        fleet.model.save(folder / WEIGHTS)
        extra = {"decay": decay}
        index = BundleIndex(folder, None, fleet.classes, self.job.optimizer, entries, extra)
        index.write()
        return index

    def holdings(self) -> Array:
        """Count the examples of each class that each client holds: (clients, classes) int64."""
        rows = [client.rows for client in self.clients]
        return table_of(rows, self.data.train.y, self.data.classes)

    # --- the run --------------------------------------------------------------------------------

    @property
    def metric(self) -> Metric:
        """The metric on held-out examples: accuracy or perplexity."""
        return "perplexity" if self.data.task == "tokens" else "accuracy"

    @property
    def records(self) -> list[RoundRecord]:
        """The completed rounds of an interrupted run in this folder."""
        return [] if self._resumed is None else read_records(self.folder)[: self._resumed.completed]

    def report(self) -> None:
        """Write ``report.md``, ``curves.png`` and ``partition.png``."""
        run = RunFolder(self.folder, len(read_records(self.folder)), self.metric)
        draw_partition(
            self.holdings(), self.folder / "partition.png", "examples of each class by client"
        )
        sections = ["![examples of each class by client](partition.png)"]
        if self.job.start_from is not None:
            sections.insert(0, f"Started from {self.job.start_from}.")
        write_report(run, f"{self.recipe.title}: {len(run.records)} simulated rounds", sections)

    def run(
        self,
        on_round: Callable[[RoundRecord], None] = lambda record: None,
        on_start: Say = lambda line: None,
    ) -> list[RoundRecord]:
        """Run the job, or the rest of an interrupted run, to its end.

        Args:
            on_round: called after each round.
            on_start: called with a line that says what is taken over from an earlier run; not
                called if nothing is.

        Returns:
            All rounds, including those before an interruption.

        Raises:
            ConfigError: the job cannot start from the model that it names; nothing is written.
            CutlayerError: a device or the hub failed, or no device delivers updates.
        """
        last = self._resumed
        if last is not None and last.completed >= self.job.rounds.count:
            return self.records
        start = 0.0 if last is None else last.clock
        return clock.run(lambda loop: self._run(loop, on_round, on_start), start)

    async def _run(
        self, loop: VirtualLoop, on_round: Callable[[RoundRecord], None], on_start: Say
    ) -> list[RoundRecord]:
        last = self._resumed
        began = time.perf_counter() - (last.wall if last is not None else 0.0)
        if last is not None:
            self.meter = last.meter

        def costs() -> dict[str, float]:
            return {"wall_s": time.perf_counter() - began, **asdict(self.meter)}

        def after_round(record: RoundRecord) -> None:
            wall = time.perf_counter() - began
            Checkpoint.of(hub, loop.time(), wall, self.meter).write(self.folder)
            on_round(replace(record, metric=self.metric))

        tokens = FleetTokens(self.clients)
        hub = self._hub(tokens, last, costs, after_round)
        put_down(self.folder, self._described)
        if hub.started is not None:
            on_start(str(hub.started))
        await hub.start()
        hub.round_log.job_began = 0.0
        devices = [self._device(client, tokens, hub, loop) for client in self.clients]
        present = [device for device in devices if device.there_at(loop.time())]
        lives = [asyncio.create_task(device.live()) for device in devices]

        async def job() -> None:
            async with hub.gateway.reaping():
                await hub.wait_until(
                    lambda: all(d.name in hub.rounds.ready or d.left for d in present)
                )
                await hub.run_job()

        running = asyncio.create_task(job())
        try:
            waiting = {running, *lives}
            while not running.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # raises the error of a failed device or hub
        finally:
            for task in (running, *lives):
                task.cancel()
            await asyncio.gather(running, *lives, return_exceptions=True)
        hub.round_log.check_written()
        return hub.run.records

    def _hub(
        self,
        tokens: FleetTokens,
        last: Checkpoint | None,
        costs: Callable[[], dict[str, float]],
        on_round: Callable[[RoundRecord], None],
    ) -> Hub:
        job, fleet = self.job, self.fleet
        steady = all(tier.online_s is None for tier in self.tiers.values())
        per_round = 1 if self.recipe.pooled else job.rounds.per_round
        rules = RoundRules(
            count=job.rounds.count,
            min_devices=per_round or (len(self.clients) if steady else 1),
            per_round=per_round,
            deadline_s=job.rounds.deadline_s,
            seed=job.seed,
            patience=_PATIENCE,
            quorum=job.rounds.quorum,
        )
        config = HubConfig(
            bundles=self.index.folder,
            tokens=Path(),
            run=self.folder,
            start_from=self._base / job.start_from if job.start_from and last is None else None,
            schedule=job.schedule,
            evaluate_every=job.evaluate_every,
            evaluation_s=job.rounds.deadline_s,
            rounds=rules,
            local=job.local,
            trunk=job.trunk,
            cuts=job.cuts,
            limits=Limits(
                connections=4 * len(self.clients),
                window=max(Limits.window, job.local.staleness + 2),
            ),
        )
        model = fleet.model
        held_out = self.data.held_out
        initial = fleet.bases or arrays(model.trained())
        outline = JobOutline(
            job.rounds.count,
            job.local.epochs,
            job.share,
            job.optimizer,
            job.cuts.rank,
            fleet.assignment,
            split=any(not fleet.models.get(name) for name in fleet.tiers),
            tied=tied_to_head(model),
        )
        method = self.recipe.compose(initial, outline)
        heads = not method.stage(1, job.rounds.count).activations.returns_gradients
        cuts = [tier.cut for tier in fleet.tiers.values()]
        above = flop_above(model, cuts, fleet.example, auxiliary=heads)
        measured = (held_out.x, held_out.y) if fleet.bases else None
        trunk = TimedTrunk(model, measured, above, job.hub_gflops, self.meter)
        hub = Hub(
            config,
            model,
            trunk,
            method=method,
            tokens=tokens,
            evaluate=lambda: self._evaluate(hub, trunk),
            costs=costs,
            run=None if last is None else RunFolder(self.folder, last.completed, self.metric),
            on_round=on_round,
            in_order=True,  # a checkpoint is of the hub between two rounds
        )
        if last is not None:
            last.apply(hub)
        return hub

    def _device(
        self, client: Client, tokens: FleetTokens, hub: Hub, loop: VirtualLoop
    ) -> SimulatedDevice:
        cache = self._scratch_folder / "devices" / client.name
        if self._resumed is not None:  # the device downloaded its bundles before the interruption
            shutil.copytree(self.index.folder / "blobs", cache, copy_function=os.link)
        tier, data = self.tiers[client.tier], self.data.train

        def timed(bundle: Bundle, threads: int) -> Runtime:
            flop = self._flop[bundle.manifest.tier]
            runtime = self._runtime(bundle, threads)
            return TimedRuntime(runtime, flop, tier.gflops, self.meter, loop, self._length)

        examples, load = self._behave(
            client.name, Examples(data.x[client.rows], data.y[client.rows]), timed
        )
        return SimulatedDevice(
            client.name,
            tokens.token_of(client.name),
            tier,
            examples,
            cache,
            load,
            hub.gateway.serve_link,
            self.job.seed,
            self.job.keep_back,
        )

    def _runtime(self, bundle: Bundle, threads: int) -> Runtime:
        """Return a runtime for one device; the runtimes of a tier share their step graphs."""
        tier = bundle.manifest.tier
        if self.runtime == "torch":
            return TorchRuntime(bundle.manifest, self._steps[tier])
        if self.runtime == "onnx":
            if tier not in self._first:
                self._first[tier] = OnnxRuntime(bundle, threads)
            return self._first[tier].fork()
        return load_runtime(bundle, threads)

    # --- accuracy -------------------------------------------------------------------------------

    def _evaluate(self, hub: Hub, trunk: TimedTrunk) -> asyncio.Future[EvaluationReport]:
        """Evaluate with the devices' own predict graphs; the trunk evaluates base networks."""
        tiers = {tier: (hub.manifests[tier].cut, hub.manifests[tier].codec) for tier in self.tiers}
        if self.fleet.bases:
            return trunk.evaluate(tiers, hub.method.paths)
        measured: dict[tuple[Any, ...], dict[str, float]] = {}
        figures = {}
        for tier in self.tiers:
            manifest = hub.manifests[tier]
            key = (id(self.fleet.model_of(tier)), manifest.cut, manifest.codec)
            if key not in measured:  # tiers with the same model, cut and codec answer the same
                try:
                    measured[key] = self._measure(hub, trunk, manifest)
                except TrunkRefused as error:
                    found = f"{DIVERGED} in round {hub.rounds.number}"
                    raise JobFailed(f"{found}: {error}; lower lr in [local]") from error
            figures[tier] = measured[key]
        report: asyncio.Future[EvaluationReport] = asyncio.get_running_loop().create_future()
        report.set_result(EvaluationReport(figures))
        return report

    def _measure(self, hub: Hub, trunk: TimedTrunk, manifest: Manifest) -> dict[str, float]:
        """Measure accuracy, or perplexity, of a tier's devices and the hub; return it by path."""
        bundle = Bundle.open(manifest, self.index.blobs().read)
        learner = Learner(manifest, self._runtime(bundle, 1))
        learner.runtime.set_state(hub.method.aggregation.device_state(manifest.exchanged()))
        tallies = {path: Tally(hub.model.task) for path in hub.method.paths}
        examples = self.data.held_out.fitted(manifest)
        for batch in batches_to_evaluate(examples, hub.model):
            heads, parts = learner.predict(batch.x)
            above = heads[:0]
            if hub.method.paths != ("device_alone",):
                above = trunk.evaluator.answer(Query(manifest.cut, manifest.codec, parts))
            for path, tally in tallies.items():
                tally.add(logits_of(path, heads, above), batch.y)
        return {path: tally.value for path, tally in tallies.items()}
