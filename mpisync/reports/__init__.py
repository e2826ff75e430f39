"""What records say, for people: reports and timelines. Needs numpy; neither MPI nor torch."""

from mpisync.reports.columns import Run, check_target, read_run
from mpisync.reports.page import page
from mpisync.reports.trace import steps_that_fit, write_trace

__all__ = ["Run", "check_target", "page", "read_run", "steps_that_fit", "write_trace"]
