"""A Flower grid whose batches are secure sums, so that a stock strategy runs over them unchanged.

    result = FedAvg().start(SecAggGrid(grid, load_agreement("agreement.toml"), load_roster("roster.toml")), arrays)

A batch of a strategy, the same work for every site, becomes a sum under pairwise masks (`secagg.masking`, after
Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine learning", figure 4). The strategy
gets one reply with the weighted average of all and their total weight: a weighted average over one reply is that reply.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid, strategy
from flwr.serverapp.strategy import Strategy

from protocols.agreement import Agreement
from protocols.app_server import AppSums, Average
from protocols.engines.flower.contents import average_content, work_of
from protocols.engines.flower.engine import FlowerEngine, Patience
from protocols.rosters import roster_digest
from protocols.rounds import RoundRecord, drive
from secagg.errors import BelowThreshold, LocalProtocolError
from secagg.keys import Roster
from secagg.masking.transcript import Closing, Record

# Flower's number for an error that has none of its own.
_UNKNOWN = 0
_LOG = logging.getLogger("flwr")
_PATIENCE = Patience(stage=3600.0, resend=600.0)
# What these do with single replies has no counterpart for their average, and would come out wrong without a word.
_SINGLE = (
    strategy.Bulyan,
    strategy.DifferentialPrivacyClientSideAdaptiveClipping,
    strategy.DifferentialPrivacyClientSideFixedClipping,
    strategy.DifferentialPrivacyServerSideAdaptiveClipping,
    strategy.DifferentialPrivacyServerSideFixedClipping,
    strategy.FedMedian,
    strategy.FedTrimmedAvg,
    strategy.FedXgbBagging,
    strategy.FedXgbCyclic,
    strategy.MultiKrum,
    strategy.QFedAvg,
)


class SecAggGrid(Grid):
    """A grid for `Strategy.start` whose sites are asked by secure sums alone.

    Args:
        grid: As Flower gives it to a server app.
        agreement: The server's copy; a site with another is refused.
        roster: The server's copy, likewise.
        patience: How long to wait for sites and answers; by default, an hour for a stage, and ten minutes until a site
            that is there is asked again. A strategy's timeout is kept beside it.
        greeting: Type of the messages that ask who a node is; one for which every app has a function.

    Attributes:
        rounds: What has happened so far, of every sum (`protocols.rounds.RoundRecord`).
        transcript: Records of what the sites signed, of every sum that was opened.

    Raises:
        StudyError: The roster is of other sites than the agreement.
    """

    def __init__(
        self,
        grid: Grid,
        agreement: Agreement,
        roster: Roster,
        *,
        patience: Patience | None = None,
        greeting: str = "train",
    ) -> None:
        self._grid, self._agreement = grid, agreement
        # A number of a sum is used once in all runs over the same sites.
        self._sums = AppSums(agreement, roster, first=time.time_ns() // 1_000_000)
        self._engine = FlowerEngine(
            grid,
            agreement.site_names,
            study=agreement.digest,
            roster=roster_digest(roster),
            patience=patience or _PATIENCE,
            say=_LOG.warning,
            hello=greeting,
            agreed="agreement",
            beside="SecAggMod in the app that it runs, with its site's files",
        )
        self._gathered = False
        self._types: dict[str, np.dtype[Any]] = {}
        self._told: set[str] = set()

    @property
    def rounds(self) -> list[RoundRecord]:
        """What has happened so far, of every sum."""
        return self._sums.rounds

    @property
    def transcript(self) -> list[Record | Closing]:
        """Records of what the sites signed, of every sum that was opened."""
        return self._sums.transcript

    def set_run(self, *arguments: Any, **named: Any) -> None:  # noqa: ANN401 - the inner grid's
        """As the grid inside."""
        self._grid.set_run(*arguments, **named)

    @property
    def run(self) -> Any:  # noqa: ANN401 - Flower's
        """As the grid inside."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As the grid inside."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes of the sites that are here; waits for them the first time.

        Raises:
            StudyError: A site has another agreement or roster, or two nodes claim to be the same.
            LinkError: Too few came in time.
        """
        if not self._gathered:
            self._engine.gather(self._agreement.threshold)
            self._gathered = True
        return sorted(self._engine.present().values())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """There are no single messages.

        Raises:
            LocalProtocolError: Always.
        """
        raise LocalProtocolError("a secure sum has no single replies: use send_and_receive, as strategies do")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """There are no single messages.

        Raises:
            LocalProtocolError: Always.
        """
        raise LocalProtocolError("a secure sum has no single replies: use send_and_receive, as strategies do")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Carry a strategy's batch as one secure sum.

        Args:
            messages: The same content and type for every node. Nodes that are no sites are not asked; sites that get no
                message are asked for keys alone.
            timeout: Seconds for all of it.

        Returns:
            One reply with the average, in the place of the first node's; or, where the sum is lost, an error for each
            message, as of a batch that failed. Nothing for no messages.

        Raises:
            LocalProtocolError: The messages differ, cannot be summed, or are those of a strategy that needs single
                replies.
            StudyError, LinkError: As `get_node_ids`.
        """
        batch = list(messages)
        if not batch:
            return []
        self._check_strategy()
        work = work_of(batch[0], self._types)
        for message in batch[1:]:
            if message.content is not batch[0].content and work_of(message, self._types) != work:
                raise LocalProtocolError(
                    "the messages of a batch differ: in a secure sum all sites get the same arrays and settings, to "
                    "which their masks are bound"
                )
            if message.metadata.message_type != work.message_type:
                raise LocalProtocolError("the messages of a batch are of different types: a secure sum is of one")
        start = time.monotonic()
        here = {node: name for name, node in self._present().items()}
        nodes = {message.metadata.dst_node_id for message in batch}
        if strangers := nodes - here.keys():
            _LOG.warning("secure sum: %d nodes are no sites that are here, and are not asked", len(strangers))
        self._engine.message_type = work.message_type
        self._engine.deadline = float("inf") if timeout is None else start + timeout
        try:
            self._sums.begin(work, frozenset(here[node] for node in nodes & here.keys()))
        except BelowThreshold as error:
            return self._lost(batch, str(error))
        drive(self._sums, self._engine)
        record = self._sums.rounds[-1]
        if (average := self._sums.average) is None:
            told = [f"{site}: {why}" for site, why in record.dropped.items()]
            return self._lost(batch, "; ".join([*record.faults[-1:], *told]))
        self._tell(record, average, time.monotonic() - start)
        metrics: dict[str, int | float] = {**average.metrics, self._agreement.weight: average.weight}
        return [Message(average_content(work.key, average.arrays, metrics), reply_to=batch[0])]

    def _present(self) -> dict[str, int]:
        self.get_node_ids()
        return self._engine.present()

    def _lost(self, batch: list[Message], why: str) -> list[Message]:
        _LOG.warning("secure sum lost: %s", why)
        return [Message(Error(_UNKNOWN, f"secure sum lost: {why}"), reply_to=message) for message in batch]

    def _tell(self, record: RoundRecord, average: Average, seconds: float) -> None:
        dropped = "".join(f"; {site}: {why}" for site, why in record.dropped.items())
        _LOG.info(
            "secure sum (%s): %d sites, total weight %d, %d trips in %.1f s%s",
            record.purpose,
            len(average.contributors),
            average.weight,
            len(record.stages),
            seconds,
            dropped,
        )
        for fault in record.faults:
            _LOG.warning("secure sum: %s", fault)

    def _check_strategy(self) -> None:
        """Refuse the strategies known to need single replies, and warn of those that are not known.

        A grid is not told whose it is, so this looks at who calls.
        """
        frame = inspect.currentframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            frame = frame.f_back
            if not isinstance(caller, Strategy):
                continue
            name = type(caller).__name__
            if isinstance(caller, _SINGLE):
                raise LocalProtocolError(
                    f"{name} works on single replies, and a secure sum has none: it shows their weighted average alone"
                )
            homes = {kind.__module__.partition(".")[0] for kind in type(caller).__mro__}
            if homes - {"flwr", "abc", "builtins"} and name not in self._told:
                self._told.add(name)
                _LOG.warning(
                    "%s is not one of Flower's strategies: it gets one reply, the weighted average of all sites'", name
                )
            return
