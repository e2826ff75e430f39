"""All checks, in the order in which their findings are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mpisync.commands.checkup import mpi_checks, node_checks
from mpisync.commands.checkup.probes import Case, Finding

CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    mpi_checks.loaded,
    mpi_checks.launcher,
    mpi_checks.start,
    mpi_checks.nodes,
    mpi_checks.threads,
    mpi_checks.ulfm,
    node_checks.memory,
    node_checks.cores,
    node_checks.threads,
    node_checks.packages,
    node_checks.data_loading,
    node_checks.gpus,
    node_checks.network,
    node_checks.settings,
    node_checks.differences,
)


def examine(case: Case) -> list[Finding]:
    """Judge what was probed."""
    return [finding for check in CHECKS for finding in check(case)]
