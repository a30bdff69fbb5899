"""The trunk's process: takes commands, one after the other, and answers them."""

from __future__ import annotations

import contextlib
import copy
import itertools
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from edge_sdk.errors import CutlayerError
from edge_sdk.protocol.tensors import Array
from export.cutting.split_model import SplitModel
from server_hub.trunk import startup
from server_hub.trunk.errors import TrunkFailed, TrunkRefused, is_damage
from server_hub.trunk.evaluator import Evaluation, Evaluator
from server_hub.trunk.interface import Query, StepInput, StepReport, TrunkCopy, TrunkPlan
from server_hub.trunk.shared_memory import SharedMemoryPipe, StateDelta, StateReceiver
from server_hub.trunk.step import TrunkTrainer

Answer = tuple[CutlayerError | None, Any]
"""Why a command has failed, or None; and its result."""


def work(
    lanes: Sequence[tuple[Connection, str]],
    reports: Connection,
    device: str,
    threads: int,
    main: Mapping[str, str],
) -> None:
    """Run the process until the hub says ``stop``, or has gone. The first command is ``start``.

    Args:
        lanes: of each lane, this end of its pipe, and the name of its shared memory.
        reports: where the reports of evaluations go.
        device: torch device.
        threads: torch threads; 0 for torch's default.
        main: the hub's main script, see :func:`server_hub.trunk.startup.load`.
    """
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the hub, which then stops us
    if threads:
        torch.set_num_threads(threads)
    pipes = [SharedMemoryPipe(connection, name=name) for connection, name in lanes]
    turns = itertools.cycle(pipes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(EOFError, OSError))  # the hub has gone
        first = next(turns)
        _, (payload,) = first.receive(copy=True)
        try:
            for pipe in pipes:
                stack.enter_context(pinned(pipe.block, device))
            worker = _Worker(*startup.load(payload, main), device, reports)
        except Exception as error:
            first.send((startup.failure(error), None))
            return
        del payload
        first.send((None, None))
        worker.run(turns)
    for pipe in pipes:
        pipe.close()


@contextlib.contextmanager
def pinned(block: memoryview, device: str) -> Iterator[None]:
    """Pin memory, so that a GPU copies from it without the host waiting; nothing for a CPU.

    Args:
        block: the memory.
        device: torch device that copies from it.

    Raises:
        RuntimeError: the memory cannot be pinned.
    """
    import torch

    if torch.device(device).type != "cuda":
        yield
        return
    address = np.frombuffer(block, np.uint8).ctypes.data
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(runtime.cudaHostRegister(address, block.nbytes, 0))
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.check_error(runtime.cudaHostUnregister(address))


class _Worker:
    """Commands of the hub, each a method that returns the answer."""

    def __init__(
        self,
        model: SplitModel,
        held_out: tuple[Array, Array] | None,
        device: str,
        reports: Connection,
    ) -> None:
        self._trainer = TrunkTrainer(model, device)
        self._evaluator = Evaluator(model, device, held_out)
        self._states = StateReceiver()
        self._reports = reports
        self._evaluation: Evaluation | None = None

    def run(self, pipes: Iterable[SharedMemoryPipe]) -> None:
        """Answer commands, which come on these pipes in this order, until ``stop``.

        Make slices of an evaluation while no command is there.
        """
        for pipe in pipes:
            while self._evaluation is not None and not pipe.poll():
                self._evaluate_slice()
            command, arguments = pipe.receive(copy=False)
            if command == "stop":
                pipe.send((None, None))
                return
            try:
                answer: Answer = (None, getattr(self, command)(*arguments))
            except Exception as error:
                answer = (_failure(command, error), None)
            pipe.send(answer)

    def begin(self, delta: StateDelta, plan: TrunkPlan) -> None:
        self._trainer.begin(self._states.states(delta)[0], plan)

    def features(self, step_input: StepInput) -> dict[str, Array] | None:
        return self._trainer.features(step_input)

    def step(self, inputs: list[StepInput]) -> StepReport:
        if self._trainer.keeps_memory:
            inputs = copy.deepcopy(inputs)  # the shared memory will hold other batches
        return self._trainer.step(inputs)

    def finish(self) -> list[TrunkCopy]:
        return self._trainer.finish()

    def serve(self, delta: StateDelta, bases: int) -> None:
        self._evaluator.serve(self._states.states(delta), bases)

    def answer(self, query: Query) -> Array:
        return self._evaluator.answer(query)

    def evaluate(self, tiers: dict[str, tuple[int, str]], paths: tuple[str, ...]) -> None:
        while self._evaluation is not None:  # the one before has to end first
            self._evaluate_slice()
        self._evaluation = self._evaluator.evaluate(tiers, paths)

    def _evaluate_slice(self) -> None:
        assert self._evaluation is not None
        try:
            next(self._evaluation)
            return
        except StopIteration as end:
            answer: Answer = (None, end.value)
        except Exception as error:
            answer = (_failure("evaluate", error), None)
        self._evaluation = None
        self._reports.send(answer)


def _failure(command: str, error: Exception) -> CutlayerError:
    """What the hub is told of an exception; the process ends on one that it cannot mend."""
    if is_damage(error):
        raise error
    if isinstance(error, TrunkRefused):
        return error
    return TrunkFailed(f"the trunk failed in {command}: {type(error).__name__}: {error}")
