"""Every verdict, entered once: into the counts and the open step's record."""

from __future__ import annotations

import math

from mpisync.aggregation.members import Member, Outcome
from mpisync.aggregation.work import Work
from mpisync.policies import Arrival
from mpisync.records import ArrivalRecord
from mpisync.transport.wire import Header


class Ledger:
    """Counts since the start, and the verdicts given while the open step was open."""

    def __init__(self, gradient_bytes: int) -> None:
        self.counts: dict[str, int] = {"accepted": 0, "late": 0, "rejected": 0}
        self.arrivals: list[ArrivalRecord] = []
        self._gradient_bytes = gradient_bytes

    def enter(
        self,
        outcome: Outcome,
        member: Member,
        header: Header,
        arrival: Arrival,
        work: Work,
        opened_s: float,
        *,
        late_by: int = 0,
        reason: str | None = None,
        tie: bool = False,
        travelled: bool = True,
    ) -> None:
        """Enter a verdict."""
        self.counts[outcome] += 1
        self.arrivals.append(
            ArrivalRecord(
                member.worker,
                header.sequence,
                header.version,
                outcome,
                offset_s=arrival.at_s - opened_s,
                late_by=late_by,
                tie=tie,
                reason=reason,
                compute_s=header.compute_s,
                data_s=header.data_s,
                samples=header.samples,
                loss=None if math.isnan(header.loss) else header.loss,
                bytes=self._gradient_bytes if travelled else 0,
                cost=None if math.isnan(header.cost) else header.cost,
                carried=work.carried or None,
                lots=[(lot.epoch, lot.batch) for lot in work.lots] or None,
            )
        )
