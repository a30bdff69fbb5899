"""The job: rounds of plan, broadcast, collect, average, publish, save and evaluate."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from export.steps.weight_decay import Decay
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.concurrency import Changes
from server_hub.gateway.server import Gateway
from server_hub.methods.method import Method
from server_hub.methods.plan import Participant, RoundContext, RoundPlan
from server_hub.methods.settings import LocalTraining, RateSchedule, learning_rate_factor
from server_hub.rounds.cut_moves import CutMoves
from server_hub.rounds.device_evaluations import DeviceEvaluations
from server_hub.rounds.model_publisher import ModelPublisher
from server_hub.rounds.round_log import RoundLog
from server_hub.rounds.rounds import Phase, Rounds
from server_hub.rounds.update_collector import UpdateCollector
from server_hub.trunk.batcher import StepBatcher
from server_hub.trunk.interface import EvaluationReport, Trunk, TrunkCopy
from server_hub.trunk.settings import TrunkTraining

log = logging.getLogger("cutlayer.hub")


@dataclass(kw_only=True)
class Job:
    """Runs the rounds of a job, with the devices that the gateway lets in.

    Attributes:
        local, trunk_settings, decay: settings of devices, of the trunk, and of both.
        schedule: how learning rates change over the rounds.
        start_evaluation: starts an evaluation after so many rounds; None if none is due.
    """

    method: Method
    local: LocalTraining
    trunk_settings: TrunkTraining
    decay: Decay
    schedule: RateSchedule
    rounds: Rounds
    gateway: Gateway
    trunk: Trunk
    batcher: StepBatcher
    collector: UpdateCollector
    publisher: ModelPublisher
    cut_moves: CutMoves
    round_log: RoundLog
    changes: Changes
    device_evaluations: DeviceEvaluations
    start_evaluation: Callable[[int], asyncio.Future[EvaluationReport] | None]

    async def run(self) -> None:
        """All rounds that are left; then the files and the evaluation of the last one."""
        now = asyncio.get_running_loop().time
        while self.rounds.phase is not Phase.DONE:
            await self.cut_moves.until_ready()
            await self.changes.until(lambda: self.rounds.can_start(now()), self.rounds.not_before)
            await self.run_round()
        await self.round_log.finished()
        log.info("all %d rounds done", self.rounds.completed)

    async def run_round(self) -> None:
        """One round. The trunk trains while the devices do; evaluation and files come beside."""
        self.round_log.start_round()
        plan = self.plan()
        await self.broadcast(plan)
        updates, copies = await self.collect()
        copies = self.round_log.useful(copies, plan.trunk.hyper["lr"])
        if updates:
            await self.average(plan, updates, copies)
            await self.publish()
            await self.save()
            await self.evaluate(updates)

    def plan(self) -> RoundPlan:
        """What the method wants of this round."""
        position, count = self.rounds.completed + 1, self.rounds.rules.count
        peers, manifests = self.gateway.peers, self.cut_moves.manifests
        ready = {name: peers[name].tier for name in self.rounds.ready}
        context = RoundContext(
            number=self.rounds.number + 1,
            position=position,
            count=count,
            rate=learning_rate_factor(self.schedule, position, count),
            ready={name: Participant(tier, manifests[tier]) for name, tier in ready.items()},
            drawn=self.rounds.draw(),
            cuts={manifests[peer.tier].cut for peer in peers.values()},
            model=self.publisher.model,
            local=self.local,
            trunk=self.trunk_settings,
            decay=self.decay,
        )
        return self.method.plan(context)

    async def broadcast(self, plan: RoundPlan) -> None:
        """Start the round: tell every member where its state is, and the trunk how to train."""
        peers = self.gateway.peers
        members = [d for d, p in plan.devices.items() if d in peers and peers[d].tier == p.tier]
        self.rounds.start(asyncio.get_running_loop().time(), members)
        self.batcher.begin(self.rounds.number, plan.trunk.shuffles)
        self.collector.begin(plan)
        for name in sorted(self.rounds.members):
            offer = self.gateway.blobs.offer(peers[name].tier)
            self.gateway.post(peers[name], plan.devices[name].message(self.rounds.number, offer))
        await self.trunk.begin(plan.state, plan.trunk)

    async def collect(self) -> tuple[Sequence[DeviceUpdate], Sequence[TrunkCopy]]:
        """Wait for the updates of devices, and for the trunk's steps.

        Raises:
            JobFailed: too many rounds in a row had no update that can be used.
        """
        now = asyncio.get_running_loop().time
        while not self.rounds.is_over(now()):
            await self.changes.next(self.rounds.end)
        self.rounds.close(now())  # what comes now is late, also while the trunk is busy
        await self.batcher.drain()  # the trunk may refuse what somebody who delivered has sent
        useful = self.rounds.finish()
        self.round_log.tell_losses()
        return (self.collector.updates() if useful else []), await self.trunk.finish()

    async def average(
        self, plan: RoundPlan, updates: Sequence[DeviceUpdate], copies: Sequence[TrunkCopy]
    ) -> None:
        """Average what was trained; let the cut policy look at the round."""
        totals, last = self.batcher.totals, self.rounds.phase is Phase.DONE
        busy = totals.seconds / max(self.round_log.round_seconds(), 1e-9)
        self.cut_moves.plan(updates, totals.device_losses, busy, last)
        await asyncio.to_thread(plan.average, updates, copies)

    async def publish(self) -> None:
        """Offer the new model; tell devices whose cut moves to load another bundle."""
        self.device_evaluations.end()  # questions are answered by the new model from now on
        await self.publisher.publish()
        self.cut_moves.begin()

    async def save(self) -> None:
        """Begin to write the model to disk."""
        await self.round_log.save()

    async def evaluate(self, updates: Sequence[DeviceUpdate]) -> None:
        """Begin to evaluate the model; the round's record is written when that is done."""
        evaluation = self.start_evaluation(self.rounds.completed)
        await self.round_log.add(updates, self.batcher.totals, evaluation)
