"""The hub: runs the rounds of a job with whatever devices there are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import ConfigError, CutlayerError, ProtocolError
from edge_sdk.inference.metrics import Metric
from edge_sdk.protocol.channel import Delivery
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.messages import (
    Activations,
    Answer,
    Decline,
    FeatureGradient,
    Infer,
    Ready,
    Round,
    Stop,
    Update,
)
from edge_sdk.training.data import Examples
from export.build import model_of
from export.dual_norm import noise_tensors
from export.optimizers import check_hyper
from export.split import NoHead, SplitModel
from export.writer import WEIGHTS
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.concurrency import Background, Changes
from server_hub.config import HubConfig, learning_rate_factor
from server_hub.gateway.peers import Peer
from server_hub.gateway.server import Gateway
from server_hub.gateway.tokens import TokenFile, Tokens
from server_hub.methods.method import RETURNING, Method, Stage
from server_hub.preparation import check_bundles, compose
from server_hub.rounds.cut_moves import CutMoves
from server_hub.rounds.model_publisher import ModelPublisher
from server_hub.rounds.rounds import Phase, Rounds
from server_hub.rounds.update_collector import UpdateCollector
from server_hub.rounds.validation import check_answer, check_packed
from server_hub.storage.run_folder import RoundRecord, RunFolder
from server_hub.trunk.batcher import StepBatcher
from server_hub.trunk.interface import Arrival, Trunk, TrunkPlan
from server_hub.trunk.process import WorkerTrunk

log = logging.getLogger("cutlayer.hub")

Evaluate = Callable[[], Awaitable[dict[str, dict[str, float]]]]
"""Accuracy, or perplexity, by tier and path."""


class JobFailed(CutlayerError):
    """The job cannot come to its end."""


class Hub:
    """Serves one job: lets devices in, runs the rounds, keeps the model.

    Args:
        config: see :class:`HubConfig`.
        model: the model; built from the configuration's ``module:function`` if not given.
        trunk: where the deep part is trained; a process of its own if not given.
        method: the training method; the configuration's if not given.
        tokens: who may come in; the configuration's file if not given.
        evaluate: measures accuracy after a round; on the trunk, with the configuration's held-out
            examples, if not given.
        costs: what a round's record says beside what the hub knows.
        run: the run's folder; a new one, as the configuration says, if not given.
        on_round: called after every round.

    Raises:
        ConfigError, BundleError: something named by the configuration is missing or wrong.
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
    ) -> None:
        self.config = config
        self.index = BundleIndex.read(config.bundles)
        self.manifests: dict[str, Manifest] = {t: self.index.manifest(t) for t in self.index.tiers}
        for manifest in self.manifests.values():
            for blob in manifest.blobs:
                self.index.blobs().read(blob)  # verified now, not when a device asks for it
        self.model = (
            model
            if model is not None
            else model_of(self.index.model, self.index.extra, config.model)
        )
        self.model.load(config.bundles / WEIGHTS)
        initial = {n: t.detach().cpu().numpy() for n, t in self.model.trained().items()}
        # copies: starting the worker moves the model's tensors to shared memory
        frozen = {n: t for n, t in self.model.tensors().items() if n not in initial}
        self._frozen = {n: t.detach().cpu().numpy().copy() for n, t in frozen.items()}
        self.method = method or compose(config, self.index, self.manifests, initial)
        check_bundles(self.method, config.rounds.count, self.manifests, self.model)
        self.local_hyper = check_hyper(self.index.optimizer, config.local.hyper)
        if self.method.keeps_slots and self.index.optimizer != config.trunk.optimizer:
            raise ConfigError(
                f"{self.method.name} hands optimizer state on between devices and hub; the devices "
                f"have {self.index.optimizer}, set trunk.optimizer to it"
            )
        self.trunk_hyper = check_hyper(config.trunk.optimizer, config.trunk.hyper)
        held_out = self._held_out()
        self.trunk = trunk if trunk is not None else self._worker(held_out)
        self._costs, self._evaluate = costs, evaluate
        if evaluate is None and held_out is not None:
            self._evaluate = self._measure
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
            lambda device, issued, memory: self.moves.moved(device, issued, memory),
        )
        metric: Metric = "perplexity" if self.model.task == "tokens" else "accuracy"
        self.run = run if run is not None else RunFolder(config.run, metric=metric)
        self.began = 0.0
        self.address: str | None = None
        self._on_round = on_round
        self._changes = Changes()
        self._feed = StepBatcher(
            self.trunk, config.trunk, self.method.merges, self.gateway.post, self._refused
        )
        self._background = Background()
        self._intake = UpdateCollector(
            config,
            self.manifests,
            self.method,
            self.rounds,
            self.trunk,
            self._feed,
            self.gateway.post,
            self._refused,
            self._background,
            noise_tensors(self.model),
        )
        self.offers = ModelPublisher(
            self.method, self.model, self.manifests, self.gateway, self.trunk
        )
        self.moves = CutMoves(
            config.cuts, self.index, self.manifests, self.gateway, self.rounds.leave
        )
        self._over = False

    # --- the job --------------------------------------------------------------------------------

    async def serve(self, ready: Callable[[str], None] | None = None) -> None:
        """Run the job to its end, then wait until the devices have left.

        Args:
            ready: called with the address once devices can connect.

        Raises:
            ConfigError: the port is taken.
            TrunkFailed: the trunk's process ended.
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
        """Make the trunk ready and publish the states that devices start from."""
        self.began = asyncio.get_running_loop().time()
        await self.trunk.start()
        await self.offers.publish()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds; looked at whenever something happens to the hub."""
        await self._changes.until(condition)

    async def run_job(self) -> None:
        """The rounds, with the devices that the gateway lets in."""
        feed = asyncio.create_task(self._feed.run())
        job = asyncio.create_task(self._job())
        try:
            done, _ = await asyncio.wait([feed, job], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (feed, job):
                task.cancel()
            await asyncio.gather(feed, job, return_exceptions=True)
        for task in done:
            task.result()

    async def _job(self) -> None:
        while self.rounds.phase is not Phase.DONE:
            await self.moves.until_ready()
            await self._changes.until(self.rounds.can_start)
            await self._round()
        log.info("all %d rounds done", self.rounds.completed)
        self._over = True
        for peer in list(self.gateway.peers.values()):
            if not self.moves.under_way(peer.device):  # it is told when it is ready
                self._stop(peer)
        while self.config.keep_serving or self.gateway.peers:
            await self._changes.until(
                lambda: not self.gateway.peers and not self.config.keep_serving
            )

    async def _round(self) -> None:
        """One round: states down, local training and trunk at the same time, average, measure."""
        now = asyncio.get_running_loop().time
        started = now()
        config, method = self.config, self.method
        number, completed = self.rounds.number + 1, self.rounds.completed
        stage = method.stage(completed + 1, config.rounds.count)
        rate = learning_rate_factor(config.schedule, completed + 1, config.rounds.count)
        trunk_rate = 1.0 if stage.anneal else rate
        plan = TrunkPlan(
            config.trunk.optimizer,
            {**self.trunk_hyper, "lr": self.trunk_hyper["lr"] * trunk_rate},
            stage.trunk_epochs,
            config.trunk.max_rows,
            seed=number,
            max_norm=config.trunk.max_norm,
            u_shaped=stage.activations == "u_shaped",
            returned=stage.activations in RETURNING,
            anneal=stage.anneal,
            keeps_slots=method.keeps_slots,
            bases=0 if method.mixing is None else method.mixing.bases,
        )
        cuts = {self.manifests[peer.tier].cut for peer in self.gateway.peers.values()}
        await self.trunk.begin(method.aggregation.trunk_state(cuts), plan)
        if not self.rounds.can_start():
            return  # somebody left meanwhile
        self._feed.begin(number, mixes=not plan.returned)
        members = self.rounds.start(now(), stage.everyone)
        drawn = None
        if method.mixing is not None:
            tiers = {device: self.gateway.peers[device].tier for device in members}
            drawn = method.mixing.draw(number, tiers)
        self._intake.begin(stage, members, drawn)
        log.debug("round %d with %d devices", number, len(members))
        epochs = config.local.epochs if stage.local_epochs is None else stage.local_epochs
        for order, device in enumerate(sorted(members)):
            peer = self.gateway.peers[device]
            bases = None if drawn is None else self.offers.bases_of(peer.tier, drawn[device])
            self.gateway.post(
                peer,
                Round(
                    round=number,
                    state=None if drawn is not None else self.offers.states[peer.tier],
                    epochs=epochs,
                    batch_size=config.local.batch_size,
                    hyper=self._hyper(peer, stage, rate),
                    activations="none" if self.manifests[peer.tier].whole else stage.activations,
                    seed=number * 1_000_003 + order,
                    staleness=config.local.staleness if plan.returned else 0,
                    bases=bases,
                ),
            )
        await self._changes.until(lambda: self.rounds.is_over(now()), self.rounds.deadline)
        await self._feed.drain()  # the trunk may refuse what somebody who delivered has sent
        useful = self.rounds.finish()
        for device, reason in self.rounds.dropped.items():
            log.warning("round %d goes on without %s: %s", number, device, reason)
        delivered = sorted(self.rounds.delivered)
        copies = await self.trunk.finish()
        if not useful:
            log.warning("nobody delivered in round %d; it does not count", number)
            if self.rounds.given_up:
                reasons = sorted(set(self.rounds.dropped.values()))
                raise JobFailed(
                    f"nobody delivered in {self.rounds.fruitless} rounds in a row: "
                    f"{'; '.join(reasons[:3])}"
                )
            return
        updates = [self._intake.updates[device] for device in delivered]
        at = {d: cut for d in delivered if (cut := self.moves.cut_of(d)) is not None}
        last = self.rounds.phase is Phase.DONE
        busy = self._feed.seconds / max(now() - started, 1e-9)
        moves = [] if last else self.moves.plan(updates, self._feed.device_losses, busy)
        await asyncio.to_thread(method.aggregation.commit, updates, copies)
        await self.offers.publish()
        self.offers.save(self.run, self._frozen)
        losses = self._feed.losses
        rows = sum(n for _, n in losses)
        record = RoundRecord(
            round=self.rounds.completed,
            clock=now() - self.began,
            seconds=now() - started,
            devices=len(delivered),
            dropped=dict(self.rounds.dropped),
            local_loss=weighted_mean(updates, "loss"),
            local_accuracy=weighted_mean(updates, "accuracy"),
            trunk_loss=sum(x * n for x, n in losses) / rows if rows else None,
            trunk_steps=self._feed.steps,
            accuracy=await self._evaluate() if self._evaluate is not None else {},
            bytes=self.gateway.traffic.by_kind(),
            costs=self._costs(),
            cuts=at,
            moves=[asdict(move) for move in moves],
            mixed={str(bases): value for bases, value in self.offers.mixed.items()},
            order=list(self.offers.order),
        )
        self.moves.begin(moves)
        record = self.run.append(record)
        if self._on_round is not None:
            self._on_round(record)

    def _hyper(self, peer: Peer, stage: Stage, rate: float) -> dict[str, float]:
        """Hyper-parameters of a device; its own gradient counts by its part of the blocks."""
        hyper = {**self.local_hyper, "lr": self.local_hyper["lr"] * rate}
        if self.method.mixing is not None:
            hyper |= self.method.mixing.hyper("harden" in self.manifests[peer.tier].graphs)
        if stage.activations == "fused":
            hyper["own"] = self.manifests[peer.tier].cut / self.model.depth
        return hyper

    def _stop(self, peer: Peer) -> None:
        """Tell a device that the job is over, and where the final state is."""
        state, bases = self.offers.states.get(peer.tier), self.offers.bases.get(peer.tier)
        self.gateway.post(peer, Stop(reason="the job is finished", state=state, bases=bases))

    def _tier_cuts(self) -> dict[str, tuple[int, str]]:
        return {name: (entry.cut, entry.codec) for name, entry in self.index.tiers.items()}

    async def _measure(self) -> dict[str, dict[str, float]]:
        """The ways to answer that the method trains, measured on the trunk."""
        if self.method.mixing is not None:
            return await self.measure_bases()
        measured = await self.trunk.evaluate(self._tier_cuts())
        return {
            tier: {path: values[path] for path in self.method.paths}
            for tier, values in measured.items()
        }

    async def measure_bases(self) -> dict[str, dict[str, float]]:
        """What all bases mixed come to; puts them in order for devices that mix fewer."""
        report = await self.trunk.evaluate_bases()
        self.offers.rank(report)
        return {tier: {"mix": report.mixed[len(report.order)]} for tier in self.manifests}

    # --- messages -------------------------------------------------------------------------------

    def _handle(self, peer: Peer, delivery: Delivery) -> None:
        """Act on a device's message; a :class:`ProtocolError` goes back to it."""
        message = delivery.message
        if isinstance(message, Activations):
            self._intake.activations(peer, message, delivery.seq)
            return  # settled once the trunk has used it
        if isinstance(message, FeatureGradient):
            self._intake.finished(peer, message, delivery.seq)
            return  # the same
        if isinstance(message, Infer):
            self._infer(peer, message, delivery.seq)
            return  # settled once it is answered
        if isinstance(message, Ready):
            self.moves.ready(peer, message)
            if self.rounds.expects(peer.device, self.rounds.number):
                self.rounds.drop(peer.device, "it joined anew")
            self._intake.join(peer.device, message.samples)
            if self._over:
                self._stop(peer)
            else:  # in the last round, too: its result has to be averaged first
                self.rounds.join(peer.device)
        elif isinstance(message, Decline):
            if self.rounds.expects(peer.device, message.round):
                self.rounds.drop(peer.device, f"declined: {message.reason}")
        elif isinstance(message, Update):
            self._intake.update(peer, message)
        else:
            raise ProtocolError(ErrorCode.BAD_MESSAGE, f"a device does not send {message.TYPE}")
        peer.session.settle(delivery.seq)
        self._changes.wake()

    def _infer(self, peer: Peer, message: Infer, seq: int) -> None:
        manifest = self.manifests.get(message.tier or peer.tier)
        if manifest is None:
            raise ProtocolError(
                ErrorCode.UNKNOWN_TIER, f"there is no tier {message.tier!r}", "tier"
            )
        sizes = check_packed(message.parts, manifest)
        depths = [d for d in self.model.head_depths if d > manifest.cut]
        heads = [f"aux.{d}" for d in depths]
        if not isinstance(self.model.head, NoHead):
            heads.append("head")
        if not heads:
            raise ProtocolError(ErrorCode.BAD_MESSAGE, "all of the model is on the device", "tier")
        self._check_manner(message)
        check_answer(sizes, len(heads), manifest.classes)
        labels = np.zeros(sizes["batch"], np.int64)
        arrival = Arrival(
            peer.device,
            "",
            manifest.cut,
            manifest.codec,
            message.parts,
            labels,
            base=message.base,
            robustness=message.robustness,
        )

        async def answer() -> None:
            logits = await self.trunk.answer(arrival)
            self.gateway.post(peer, Answer(request=message.request, heads=heads, logits=logits))
            peer.session.settle(seq)

        self._background.spawn(answer())

    def _check_manner(self, message: Infer) -> None:
        """There is such a base, and the model can be as robust."""
        bases = max(len(self.offers.order), 1)
        if message.base >= bases:
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE, f"there is no base {message.base}; there are {bases}", "base"
            )
        if not 0 <= message.robustness <= 1:
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE,
                f"robustness is {message.robustness:g}, not in 0 to 1",
                "robustness",
            )

    def _refused(self, peer: Peer, reason: str) -> None:
        """The trunk cannot use what a device has sent."""
        self.rounds.drop(peer.device, reason)
        self._background.spawn(
            self.gateway.refuse(peer, ProtocolError(ErrorCode.NOT_FINITE, reason, "parts"))
        )

    def _gone(self, peer: Peer, reason: str) -> None:
        log.info("%s %s", peer.device, reason)
        self.moves.gone(peer.device)
        self.rounds.leave(peer.device, reason)
        self._changes.wake()

    # --- before the job begins -------------------------------------------------------------------

    def _held_out(self) -> tuple[Any, Any] | None:
        if self.config.held_out is None:
            return None
        manifest = next(iter(self.manifests.values()))
        examples = Examples.from_npz(self.config.held_out).fitted(manifest)
        return examples.x, examples.y

    def _worker(self, held_out: tuple[Any, Any] | None) -> WorkerTrunk:
        settings = self.config.trunk
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return WorkerTrunk(
            self.model, device, held_out, settings.arena_mb * 2**20, settings.threads
        )


def weighted_mean(updates: Sequence[DeviceUpdate], metric: str) -> float | None:
    """Mean of a metric over the devices that reported it, weighted by their samples."""
    known = [u for u in updates if metric in u.metrics]
    total = sum(update.samples for update in known)
    return sum(u.metrics[metric] * u.samples for u in known) / total if known else None
