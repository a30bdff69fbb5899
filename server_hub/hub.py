"""The hub: puts the rooms together, and serves one job."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import DataError, ProtocolError
from edge_sdk.inference.metrics import Metric
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.evaluation import Evaluated
from edge_sdk.protocol.messages import (
    Activations,
    Decline,
    FeatureGradient,
    Infer,
    Message,
    Ready,
    Stop,
    Update,
)
from edge_sdk.training.data import Examples
from export.bundles.model_source import model_of_bundles
from export.cutting.checks import check_sharing
from export.cutting.input_ranges import check_classes
from export.cutting.split_model import WEIGHTS, SplitModel
from export.steps.optimizers import check_hyper
from export.steps.weight_decay import decay_of_bundles
from server_hub.concurrency import BackgroundTasks, Changes, Effect
from server_hub.config import HubConfig
from server_hub.gateway.peers import Peer
from server_hub.gateway.releases import Releases
from server_hub.gateway.server import Gateway
from server_hub.gateway.tokens import TokenFile, Tokens
from server_hub.job import Job
from server_hub.logs import plain, protect
from server_hub.methods.composition import compose
from server_hub.methods.method import Method, check_optimizers
from server_hub.rounds.answers import Answers
from server_hub.rounds.cut_moves import CutMoves
from server_hub.rounds.device_evaluations import DeviceEvaluations
from server_hub.rounds.message_sizes import check_message_sizes
from server_hub.rounds.model_publisher import ModelPublisher
from server_hub.rounds.round_log import RoundLog
from server_hub.rounds.rounds import Rounds
from server_hub.rounds.update_collector import UpdateCollector
from server_hub.storage.run_folder import RoundRecord, RunFolder
from server_hub.storage.starting_point import Started, start_from
from server_hub.trunk.batcher import StepBatcher
from server_hub.trunk.errors import TrunkRefused
from server_hub.trunk.interface import EvaluationReport, Trunk
from server_hub.trunk.process import WorkerTrunk
from server_hub.trunk.startup import ModelSource

log = logging.getLogger("cutlayer.hub")

_LONGEST_LEAVE = 10
"""How many times ``leave_s`` the devices that still use a hub can keep it after its last round."""

Evaluate = Callable[[], asyncio.Future[EvaluationReport]]
"""Starts an evaluation of the global model."""


class Hub:
    """Serves one job: lets devices in, runs the rounds, keeps the model.

    Args:
        config: configuration of the hub.
        model: the model; built from the configuration's ``module:function`` if not given.
        trunk: trains the deep part; a process of its own if not given.
        method: the training method; the configuration's if not given.
        tokens: which devices may come in; the configuration's file if not given.
        evaluate: evaluates the model after a round; the trunk, on held-out examples, if not given.
        costs: what a round's record says of costs, in simulations.
        run: folder of the run; a new one, as the configuration says, if not given.
        on_round: called with the record of every round.
        in_order: whether a round begins only when the record of the one before is written.

    Raises:
        ConfigError, BundleError: something that the configuration names is missing or wrong.
    """

    def __init__(
        self,
        config: HubConfig,
        model: SplitModel | None = None,
        trunk: Trunk | None = None,
        method: Method | None = None,
        tokens: Tokens | None = None,
        evaluate: Evaluate | None = None,
        costs: Callable[[], dict[str, float]] = dict,
        run: RunFolder | None = None,
        on_round: Callable[[RoundRecord], None] | None = None,
        in_order: bool = False,
    ) -> None:
        protect(log)
        self.config = config
        self.index = BundleIndex.read(config.bundles)
        self.manifests: dict[str, Manifest] = {t: self.index.manifest(t) for t in self.index.tiers}
        for manifest in self.manifests.values():
            for blob in manifest.blobs:
                self.index.blobs().read(blob)  # verified now, not when a device asks for it
        # the trunk's process builds the model itself, where there is a function that does
        source: ModelSource = model or partial(model_of_bundles, config.bundles, config.model)
        if model is None:
            self.model = model_of_bundles(config.bundles, config.model)
        else:
            self.model = model
            self.model.load(config.bundles / WEIGHTS)
        for entry in self.index.tiers.values():
            check_sharing(self.model, entry.cut)
        self.method = method or compose(
            config.method,
            config.mix,
            config.rounds.count,
            config.local.epochs,
            self.index,
            self.manifests,
            self.model,
        )
        self.started: Started | None = None
        """What the job has taken over from an earlier run; None if it starts from the bundles."""
        if config.start_from is not None:
            cuts = {tier: manifest.cut for tier, manifest in self.manifests.items()}
            self.started = start_from(config.start_from, self.method, self.model, cuts)
        self._check_method()
        local_hyper = check_hyper(self.index.optimizer, config.local.hyper)
        trunk_hyper = check_hyper(config.trunk.optimizer, config.trunk.hyper)
        held_out = self._held_out()
        self.trunk = trunk if trunk is not None else self._worker(source, held_out)
        if evaluate is None and held_out is not None:
            evaluate = self._evaluate_on_trunk
        self._evaluate = evaluate
        self.rounds = Rounds(config.rounds)
        if tokens is None:
            tokens = TokenFile(config.tokens)
            tokens.read()  # a broken file is the operator's mistake, to be told now
        self.gateway = Gateway(
            config.limits,
            tokens,
            {name: entry.manifest for name, entry in self.index.tiers.items()},
            self.index.blobs(),
            self._handle,
            self._gone,
            lambda device, issued, memory: self.cut_moves.moved(device, issued, memory),
            self._connection_changed,
            None if config.releases is None else Releases(config.releases, create=True),
        )
        metric: Metric = "perplexity" if self.model.task == "tokens" else "accuracy"
        self.run = run if run is not None else RunFolder(config.run, metric=metric)
        self.run.save_job(config.description(self.method.name))
        self.address: str | None = None
        self._changes = Changes()
        self._background = BackgroundTasks()
        post = self.gateway.post
        self._batcher = StepBatcher(self.trunk, config.trunk, self.method.merges)
        self._collector = UpdateCollector(
            self.manifests,
            self.method.keeps_slots,
            config.limits,
            self.rounds,
            self.trunk,
            self._batcher,
            post,
            self._refused,
            self._failed,
            self._background,
        )
        self._answers = Answers(
            self.manifests,
            self.model,
            self.method,
            self.trunk,
            config.trunk.max_rows,
            post,
            self._failed,
            self._background,
        )
        self.publisher = ModelPublisher(
            self.method, self.model, self.manifests, self.gateway.blobs, self.trunk
        )
        self.cut_moves = CutMoves(
            config.cuts, self.index, self.manifests, self.gateway, self.rounds.leave
        )
        self._device_evaluations = DeviceEvaluations(
            self.manifests,
            self.model.task,
            self.method.paths,
            config.evaluation_s,
            config.limits,
            self.gateway.blobs,
            post,
        )
        self.round_log = RoundLog(
            self.run,
            self.rounds,
            self.method,
            self.publisher,
            self.cut_moves,
            self.gateway.traffic,
            costs,
            on_round,
            in_order,
        )
        self._job = Job(
            method=self.method,
            local=replace(config.local, hyper=local_hyper),
            trunk_settings=replace(config.trunk, hyper=trunk_hyper),
            decay=decay_of_bundles(self.index.extra),
            schedule=config.schedule,
            rounds=self.rounds,
            gateway=self.gateway,
            trunk=self.trunk,
            batcher=self._batcher,
            collector=self._collector,
            publisher=self.publisher,
            cut_moves=self.cut_moves,
            round_log=self.round_log,
            changes=self._changes,
            device_evaluations=self._device_evaluations,
            start_evaluation=self._evaluate_round,
        )
        self._over = False

    @property
    def unwritten(self) -> list[str]:
        """What could not be written, a sentence each: the last model, or records of rounds."""
        return list(self.round_log.unwritten.values())

    @property
    def finished(self) -> bool:
        """Whether all rounds are done, and the devices know it."""
        return self._over

    async def serve(self, ready: Callable[[str], None] | None = None) -> None:
        """Run the job to its end, then wait until the devices have left.

        Args:
            ready: called with the address once devices can connect.

        Raises:
            ConfigError: the port is taken.
            JobFailed: too many rounds in a row had no update, or training has diverged in them.
            TrunkFailed: the trunk's process has ended.
        """
        try:
            await self.start()
            async with self.gateway.listen(self.config.listen) as address:
                self.address = address
                if ready is not None:
                    ready(address)
                await self.run_job()
        finally:
            await self.trunk.close()

    async def start(self) -> None:
        """Make the trunk ready, and publish the states that devices start from."""
        self.round_log.job_began = asyncio.get_running_loop().time()
        await self.trunk.start()
        await self.publisher.publish()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds; it is looked at whenever something happens to the hub."""
        await self._changes.until(condition)

    async def run_job(self) -> None:
        """Run the rounds, with the devices that the gateway lets in; then wait till they leave."""
        batcher = asyncio.create_task(self._batcher.run())
        job = asyncio.create_task(self._run_job())
        try:
            done, _ = await asyncio.wait([batcher, job], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (batcher, job):
                task.cancel()
            await asyncio.gather(batcher, job, return_exceptions=True)
            await self.round_log.cancel()
        for task in done:
            task.result()

    async def _run_job(self) -> None:
        await self._job.run()
        self._over = True
        for peer in list(self.gateway.peers.values()):
            if not self.cut_moves.under_way(peer.device):  # else it is told when it is ready
                self._stop(peer)
        if self.config.keep_serving:
            await asyncio.Event().wait()  # until it is cancelled
        await self._until_all_have_left()

    async def _until_all_have_left(self) -> None:
        """Wait until the devices have left, as long as one of them still has a use for the hub.

        A device that knows that the job is over fetches the final model, may ask questions, and
        leaves. One that only keeps its connection does not keep the hub.
        """
        peers, now = self.gateway.peers, asyncio.get_running_loop().time
        last = now() + _LONGEST_LEAVE * self.config.leave_s
        used = -1
        while peers and now() < last and used != (used := self._used()):
            end = min(now() + self.config.leave_s, last)
            while peers and now() < end:
                await self._changes.next(end)
        if peers:
            log.warning("the hub ends; these devices have not left: %s", ", ".join(sorted(peers)))

    def _used(self) -> int:
        """Bytes of questions, and of requests for blobs, so far."""
        return sum(self.gateway.traffic.up.get(kind, 0) for kind in ("infer", "blob_get"))

    def _stop(self, peer: Peer) -> None:
        """Tell a device that the job is over, and where the final model is."""
        if peer.release is not None:
            return  # what it runs is no model of the job
        offer = self.gateway.blobs.offer(peer.tier)
        self.gateway.post(peer, Stop(reason="the job is finished", **vars(offer)))

    # --- evaluation -----------------------------------------------------------------------------

    def _evaluate_round(self, completed: int) -> asyncio.Future[EvaluationReport] | None:
        """Start an evaluation if one is due: every so many rounds, and after the last.

        It is on the held-out examples, where there are any, and on devices that keep some back.
        """
        last = completed >= self.config.rounds.count
        if completed % self.config.evaluate_every and not last:
            return None
        ready = [self.gateway.peers[device] for device in sorted(self.rounds.ready)]
        figures = self._device_evaluations.begin(self.rounds.number, ready)
        report = self._evaluate() if self._evaluate is not None else None
        return report if figures is None else asyncio.ensure_future(_joined(report, figures))

    def _evaluate_on_trunk(self) -> asyncio.Future[EvaluationReport]:
        tiers = {name: (entry.cut, entry.codec) for name, entry in self.index.tiers.items()}
        return self.trunk.evaluate(tiers, self.method.paths)

    # --- messages -------------------------------------------------------------------------------

    def _handle(self, peer: Peer, message: Message) -> Effect | None:
        """Act on a device's message; a :class:`ProtocolError` goes back to it."""
        effect = None
        if isinstance(message, Activations):
            effect = self._collector.activations(peer, message)
        elif isinstance(message, FeatureGradient):
            effect = self._collector.feature_gradient(peer, message)
        elif isinstance(message, Infer):
            effect = self._answers.infer(peer, message)
        elif isinstance(message, Evaluated):
            self._device_evaluations.take(peer, message)
        elif isinstance(message, Ready):
            self._ready(peer, message)
        elif isinstance(message, Decline):
            if self.rounds.expects(peer.device, message.round):
                self.rounds.decline(peer.device, plain(message.reason), message.diverged)
        elif isinstance(message, Update):
            self._collector.update(peer, message)
        else:
            raise ProtocolError(ErrorCode.BAD_MESSAGE, f"a device does not send {message.TYPE}")
        self._changes.wake()
        return effect

    def _ready(self, peer: Peer, message: Ready) -> None:
        if message.from_round is not None:
            self._collector.recount(peer.device, message.from_round, message.samples)
            return
        self.cut_moves.ready(peer, message)
        if self.rounds.expects(peer.device, self.rounds.number):
            self.rounds.drop(peer.device, "it joined anew")
        self._collector.join(peer.device, message.samples)
        if self._over:
            self._stop(peer)
        else:  # in the last round, too: its result has to be averaged first
            self.rounds.join(peer.device)

    def _refused(self, peer: Peer, reason: str) -> None:
        """The trunk cannot use what a device has sent."""
        self.rounds.drop(peer.device, reason)
        error = ProtocolError(ErrorCode.NOT_FINITE, reason, "parts")
        self.gateway.drop(peer, reason, error)

    def _failed(self, peer: Peer, error: Exception) -> None:
        """The hub could not do what a device has asked for.

        The device may ask again, unless it was the request that the trunk cannot use.
        """
        if isinstance(error, TrunkRefused):
            self._refused(peer, str(error))
            return
        log.error("a request of %s failed: %s", peer.device, error)
        told = ProtocolError(ErrorCode.INTERNAL, "the hub failed to compute an answer; try later")
        self.gateway.drop(peer, str(told), told)

    def _connection_changed(self, peer: Peer) -> None:
        if self.gateway.peers.get(peer.device) is peer:
            self.rounds.connection(peer.device, peer.lost_at)
            self.cut_moves.connection_changed()
            self._changes.wake()

    def _gone(self, peer: Peer, reason: str) -> None:
        self.cut_moves.gone(peer.device)
        self.rounds.leave(peer.device, reason)
        self._device_evaluations.gone(peer.device)
        self._changes.wake()

    # --- before the job begins -------------------------------------------------------------------

    def _check_method(self) -> None:
        """The method can train with these bundles, and all that it sends fits into messages."""
        method, config, count = self.method, self.config, self.config.rounds.count
        modes = {method.stage(n, count).activations for n in range(1, count + 1)}
        method.check_bundles(self.manifests, self.model, modes)
        check_message_sizes(
            self.manifests, config.limits, config.local.batch_size, modes, method.keeps_slots
        )
        check_optimizers(method, self.index.optimizer, self.manifests, config.local, config.trunk)

    def _held_out(self) -> tuple[Any, Any] | None:
        if self.config.held_out is None:
            return None
        manifest = next(iter(self.manifests.values()))
        examples = Examples.from_npz(self.config.held_out)
        try:
            examples = examples.fitted(manifest)
        except DataError as error:
            raise DataError(f"{self.config.held_out}: {error}") from error
        check_classes(self.model, torch.from_numpy(examples.x[:1]), self.index.classes)
        return examples.x, examples.y

    def _worker(self, model: ModelSource, held_out: tuple[Any, Any] | None) -> WorkerTrunk:
        settings = self.config.trunk
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        arena = settings.arena_mb * 2**20
        return WorkerTrunk(model, device, held_out, arena, settings.threads, settings.step_s)


async def _joined(
    report: asyncio.Future[EvaluationReport] | None, figures: asyncio.Future[dict[str, Any]]
) -> EvaluationReport:
    """What the hub has found on held-out examples, if it has any, and what devices say."""
    own = EvaluationReport() if report is None else await report
    return replace(own, on_devices=await figures)
