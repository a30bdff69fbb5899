"""How good the model is on the examples that a device keeps back, when the hub asks for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from edge_sdk.errors import CutlayerError
from edge_sdk.inference.base_networks import BaseNetworks
from edge_sdk.inference.prediction import Predictor
from edge_sdk.protocol.evaluation import Evaluate, Evaluated
from edge_sdk.training.conditions import MayTrain
from edge_sdk.training.data import Source
from edge_sdk.training.loader import BundleLoader
from edge_sdk.transport.session import Session

log = logging.getLogger("cutlayer.device")

_ROWS = 256
"""Largest number of examples at a time."""


class KeptBack:
    """Answers the hub's ``evaluate``, with figures about what the device keeps back.

    Args:
        examples: returns the examples that are kept back now; there may be none.
        loader: loads states.
        bases: the base networks that the device mixes.
        predictor: answers the examples.
        may_train: asked before each evaluation, as before a round; None to evaluate always.
    """

    def __init__(
        self,
        examples: Callable[[], Source],
        loader: BundleLoader,
        bases: BaseNetworks,
        predictor: Predictor,
        may_train: MayTrain | None,
    ) -> None:
        self._examples, self._may_train = examples, may_train
        self._loader, self._bases, self._predictor = loader, bases, predictor

    async def answer(self, session: Session, task: Evaluate) -> None:
        """Evaluate, and send what was found; nothing is found after ``task.within_s``.

        Raises:
            SessionLost: the hub has forgotten the session.
        """
        labels, results = 0, dict[str, float]()
        reason = self._may_train(task.number) if self._may_train is not None else None
        if reason is None:
            try:
                async with asyncio.timeout(max(task.within_s, 0)):
                    labels, results = await self._evaluate(task)
            except (CutlayerError, TimeoutError) as error:
                log.warning("evaluation %d was given up: %s", task.number, error or "no time left")
        await session.send(Evaluated(number=task.number, labels=labels, results=results))

    async def _evaluate(self, task: Evaluate) -> tuple[int, dict[str, float]]:
        examples = await asyncio.to_thread(self._examples)
        if not len(examples) or not task.paths:
            return 0, {}
        if task.state is not None:
            await self._loader.load_state(task.state, keep=True)
        if task.bases is not None:
            self._bases.offer(task.bases)
        tallies, _ = await self._predictor.tally(examples, _ROWS, task.paths)
        results = {path: tally.mean for path, tally in tallies.items()}
        return next(iter(tallies.values())).labels, results
