"""The pytest plugin for tests marked `@pytest.mark.parallel(nprocs)`.

Plain `pytest` runs the serial tests first and then, together, all those of one process count, in one
`mpirun -n nprocs python -m pytest ...`, since every rank pays seconds for importing torch; each is
reported alone. After a failure what is left of the group gets a new mpirun. Under `mpirun -n 4 pytest` tests run in
that job: those of four processes, and, on its first ranks, those of fewer that use `comm`.

mpi-pytest was tried and is not used: it imports mpi4py.MPI into the parent, so that serial tests
need MPI; it starts one mpirun a test, has no time limits and no stacks, shows neither the failing
rank nor what it said, and under mpirun ends the session at the first test of another count.
"""

import contextlib
import faulthandler
import gc
import json
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
from launch import HARNESS_FRAMES, TAG, Job, launcher

from mpisync import launchers

LIMIT_S = 60.0  # of a parallel test without a timeout marker
START_S = 120.0  # for mpirun, imports and collection
OTHERS_S = 5.0  # what ranks are given to finish a test that has failed on another
EXIT_S = 15.0  # for MPI_Finalize
CHILD = "MPITEST_CHILD"


def nprocs_of(item: pytest.Item) -> int | None:
    """Return the process count that a test carries; None for a serial one."""
    marker = item.get_closest_marker("parallel")
    return marker.args[0] if marker else None


def limit_of(item: pytest.Item) -> float:
    """Return a parallel test's time limit in seconds."""
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker else LIMIT_S


@pytest.fixture
def comm(request):
    """A communicator of exactly the test's processes, its own and freed afterwards."""
    from mpi4py import MPI

    nprocs = nprocs_of(request.node)
    group = MPI.COMM_WORLD.Get_group().Range_incl([(0, nprocs - 1, 1)])
    own = MPI.COMM_WORLD.Create_group(group)
    group.Free()
    yield own
    own.Free()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.addinivalue_line("markers", "parallel(nprocs): run on so many MPI processes")
    config.addinivalue_line("markers", "long: a longer proof, of `make test-long`")
    if CHILD in os.environ:
        plugin = Child(config)
    elif placement := launchers.placement():
        plugin = World(config, placement)
    else:
        plugin = Parent(config)
    config.pluginmanager.register(plugin, "parallel-tests")


class Common:
    """What holds in every mode: parallel tests' limits are kept here, not by pytest-timeout."""

    def __init__(self, config):
        self.config = config

    @pytest.hookimpl(tryfirst=True)
    def pytest_timeout_set_timer(self, item, settings):
        return True if nprocs_of(item) else None


# -- plain pytest -----------------------------------------------------------------------------


class Parent(Common):
    """Starts groups of tests under mpirun and makes of the ranks' reports pytest's own."""

    def __init__(self, config):
        super().__init__(config)
        self.group: Group | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        # Those of one process count stand together, so that one mpirun serves them.
        items.sort(key=lambda item: nprocs_of(item) or 0)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item, nextitem):
        if not nprocs_of(item):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.run(item):
            item.ihook.pytest_runtest_logreport(report=report)
        # a serial test before it left this module set up, for this item to tear down
        item.session._setupstate.teardown_exact(nextitem)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def run(self, item):
        """Return the reports of one test, on all its ranks."""
        started_s = time.monotonic()
        if self.group is None:
            self.group = Group(self.config, _like(item))
        try:
            reports = self.group.reports(item)
        except Broken as broken:
            self.close()
            return [_failed(item, "call", str(broken), time.monotonic() - started_s)]
        if any(report.failed for report in reports):
            self.close()  # a failed test may have left messages behind
        elif item.nodeid == self.group.last:
            reports += self.leave(item)
        return reports

    def leave(self, item):
        """Let a group end by itself; a failed report where it does not do so well."""
        group, self.group = self.group, None
        run = group.job.finish(time.monotonic() - group.job.started_s + EXIT_S)
        if run.returncode == 0 and not run.left:
            return []
        text = f"mpirun ended with {run.returncode} after the tests had passed; left: {run.left}"
        return [_failed(item, "teardown", f"{text}\n{run.stdout[-2000:]}\n{run.stderr}")]

    def close(self):
        if self.group is not None:
            self.group.job.close()
            self.group = None

    def pytest_unconfigure(self):
        self.close()


def _failed(item, phase, text, duration_s=0.0):
    """Return a failed report; pytest's short summary shows the first line of `text`."""
    return pytest.TestReport(
        item.nodeid, item.location, {}, "failed", text, phase, duration=duration_s
    )


def _like(item):
    """Return this test and those after it that can run in the same mpirun."""
    items = item.session.items
    return [i for i in items[items.index(item) :] if nprocs_of(i) == nprocs_of(item)]


class Broken(Exception):
    """A group that cannot go on; its text says why, first in one line."""


class Group:
    """Tests of one process count, running in one mpirun."""

    def __init__(self, config, items):
        self.config = config
        self.nprocs = nprocs_of(items[0])
        self.last = items[-1].nodeid
        self.started_s: dict[str, float] = {}
        self.done: dict[str, dict[int, list]] = defaultdict(dict)
        self.partial: dict[tuple[str, int], list] = defaultdict(list)
        self.failed_s: dict[str, float] = {}
        self.gone: list[int] = []
        folder = Path(tempfile.mkdtemp(prefix="mpisync-test-"))
        (folder / "tests").write_text("\n".join(item.nodeid for item in items))
        self.offsets = dict.fromkeys(range(self.nprocs), 0)
        command = [launcher()[0].path, "-n", str(self.nprocs), sys.executable, "-m", "pytest"]
        command += ["-q", "--no-header", "--no-summary", "--color=no", "-p", "no:cacheprovider"]
        # its plugin imports all of hypothesis at the end, on every rank
        command += ["-p", "no:hypothesispytest"]
        command += [f"--tb={config.option.tbstyle}", f"--rootdir={config.rootpath}"]
        command += [f"-c{config.inipath}"] if config.inipath else []
        command += [f"@{folder / 'tests'}"]
        self.job = Job(command, folder, env={CHILD: "1"}, cwd=config.rootpath)

    def reports(self, item):
        """Wait for one test on all ranks and return its reports, one a phase."""
        while len(self.done[item.nodeid]) < self.nprocs:
            ended = self.job.process.poll() is not None
            # A hint only: MPICH's launcher ends the others within moments of the first.
            self.gone = self.gone or list(self.job.ranks(alive=False))
            self.read()
            if len(self.done[item.nodeid]) == self.nprocs:
                break
            now_s = time.monotonic()
            since_s = now_s - self.started_s.get(item.nodeid, now_s)
            if ended:
                why = f"mpirun ended; first seen gone: ranks {_ranks(self.gone)}"
                raise Broken(self.explain(item, why, stacks=False))
            if since_s > limit_of(item):
                raise Broken(self.explain(item, f"timed out after {limit_of(item):g} s"))
            if now_s - self.failed_s.get(item.nodeid, now_s) > OTHERS_S:
                raise Broken(self.explain(item, "failed, and other ranks did not finish"))
            if item.nodeid not in self.started_s and now_s - self.job.started_s > START_S:
                if not self.started_s:
                    raise Broken(self.explain(item, f"did not start in {START_S:g} s"))
            time.sleep(0.005)
        return merge(self.done.pop(item.nodeid), self.nprocs)

    def read(self):
        """Take in what the ranks have reported since the last time."""
        for rank, offset in self.offsets.items():
            file = self.job.folder / f"events.{rank}"
            if not file.exists():
                continue
            with open(file, "rb") as lines:
                lines.seek(offset)
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    self.offsets[rank] += len(line)
                    self.take(rank, **json.loads(line))

    def take(self, rank, nodeid, event, data=None):
        """Take in one event of one rank."""
        if event == "start":
            self.started_s.setdefault(nodeid, time.monotonic())
        elif event == "report":
            hook = self.config.hook.pytest_report_from_serializable
            report = hook(config=self.config, data=data)
            if isinstance(report.longrepr, list):
                report.longrepr = tuple(report.longrepr)  # a skip's place and reason, by way of JSON
            self.partial[nodeid, rank].append(report)
            if report.failed:
                self.failed_s.setdefault(nodeid, time.monotonic())
        else:
            self.done[nodeid][rank] = self.partial.pop((nodeid, rank), [])

    def explain(self, item, why, *, stacks=True):
        """Say what is known about a test that did not come to its end on every rank."""
        stacks = self.job.stacks() if stacks else ""
        self.job.end()
        self.read()
        done = self.done[item.nodeid]
        open_ranks = sorted(set(range(self.nprocs)) - set(done))
        seen = {
            rank: [*done.get(rank, []), *self.partial.pop((item.nodeid, rank), [])]
            for rank in range(self.nprocs)
        }
        parts = [f"{why}; ranks {_ranks(open_ranks)} of {self.nprocs} had not finished the test"]
        parts += failures(seen, self.nprocs)
        if self.job.process.returncode is not None:
            parts.append(f"mpirun's exit code: {self.job.process.returncode}")
        for name in ("stderr", "stdout"):
            if said := self.job.output(name)[-4000:].strip():
                parts.append(f"--- end of {name} ---\n{said}")
        return "\n".join([*parts, stacks])


def _ranks(ranks):
    return ", ".join(map(str, ranks)) or "none"


def failures(reports, nprocs):
    """Return a text for each different failure, the ranks that had it first.

    Args:
        reports: of each rank, its reports.
        nprocs: how many ranks there are.
    """
    texts = defaultdict(list)
    for rank, of_rank in reports.items():
        for report in of_rank:
            if report.failed:
                said = "".join(f"\n--- {name} ---\n{text}" for name, text in report.sections)
                crash = getattr(report.longrepr, "reprcrash", None)
                summary = crash.message.partition("\n")[0] if crash else ""
                texts[f"{summary}\n{report.longreprtext}{said}\n"].append(rank)
    return [f"rank {_ranks(who)} of {nprocs}: {text}" for text, who in texts.items()]


def merge(done, nprocs):
    """Make of the reports of all ranks one a phase: failed where one rank's is, and named so."""
    phases = []
    for phase in ("setup", "call", "teardown"):
        at = {rank: [r for r in done[rank] if r.when == phase] for rank in sorted(done)}
        outcome = {r.outcome: r for reports in reversed(at.values()) for r in reports}
        chosen = next((outcome[o] for o in ("failed", "skipped", "passed") if o in outcome), None)
        if chosen is None:
            continue
        if chosen.failed:
            chosen.longrepr = "\n".join(failures(at, nprocs))
            chosen.sections = []
        phases.append(chosen)
    return phases


# -- a rank that plain pytest has started -----------------------------------------------------


class Child(Common):
    """Writes what happens on this rank where the parent reads it."""

    def __init__(self, config):
        super().__init__(config)
        rank = launchers.placement().rank
        folder = Path(os.environ[TAG])
        config.option.basetemp = folder / f"tmp.{rank}"
        self.file = open(folder / f"events.{rank}", "w", buffering=1)

        self.failed = False

    def write(self, nodeid, event, data=None):
        self.file.write(json.dumps({"nodeid": nodeid, "event": event, "data": data}) + "\n")

    def pytest_runtest_logstart(self, nodeid):
        self.write(nodeid, "start")

    def pytest_runtest_logreport(self, report):
        hook = self.config.hook.pytest_report_to_serializable
        self.write(report.nodeid, "report", hook(config=self.config, report=report))
        self.failed |= report.failed

    def pytest_runtest_logfinish(self, nodeid):
        self.write(nodeid, "finish")
        if self.failed:
            # The parent ends this job: the next test must not meet ranks still in this one.
            time.sleep(START_S)

    def pytest_unconfigure(self):
        self.file.close()
        gc.freeze()  # Python's last look for garbage would take long over all that was imported


# -- mpirun -n 4 pytest -----------------------------------------------------------------------


class World(Common):
    """Runs tests in the job that the user started; serial ones on rank 0 only."""

    def __init__(self, config, placement):
        super().__init__(config)
        self.rank, self.size = placement.rank, placement.size
        self.stderr = os.dup(2)  # before pytest captures it

    def pytest_sessionstart(self):
        if self.rank:
            # One report is enough; what fails elsewhere is shown by pytest_runtest_logreport.
            self.quiet = open(os.devnull, "w")
            self.config.get_terminal_writer()._file = self.quiet

    def pytest_unconfigure(self):
        if self.rank:
            self.quiet.close()

    def pytest_collection_modifyitems(self, items):
        for item in items:
            if reason := self.excluded(item):
                item.add_marker(pytest.mark.skip(reason=reason))

    def excluded(self, item):
        """Return why this rank does not run a test; None where it does."""
        nprocs = nprocs_of(item)
        if nprocs is None:
            return "serial: rank 0 runs it" if self.rank else None
        if nprocs > self.size or (nprocs < self.size and "comm" not in item.fixturenames):
            return f"it wants mpirun -n {nprocs}, and this is -n {self.size}"
        return f"its {nprocs} processes are the first ranks" if self.rank >= nprocs else None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        nprocs = nprocs_of(item)
        if nprocs is None or nprocs > self.size:
            return (yield)
        self.barrier()
        with self.limit(item):
            return (yield)

    def barrier(self):
        """Wait, asleep, until every rank has come to this test; others' time does not count."""
        from mpi4py import MPI

        request = MPI.COMM_WORLD.Ibarrier()
        while not request.Test():
            time.sleep(0.005)

    @contextlib.contextmanager
    def limit(self, item):
        """Show this rank's stacks, then end the job, when a test takes too long."""
        limit_s, over = limit_of(item), threading.Event()

        def watch():
            if not over.wait(limit_s):
                text = f"rank {self.rank} of {self.size}: {item.nodeid} took over {limit_s:g} s\n"
                with tempfile.TemporaryFile("w+") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                    file.seek(0)
                    text += HARNESS_FRAMES.sub("", file.read())
                os.write(self.stderr, text.encode())
                time.sleep(2.0)  # every rank shows its own before the first exit ends the job
                os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def pytest_runtest_logreport(self, report):
        if self.rank and report.failed:
            text = f"rank {self.rank} of {self.size}: {report.nodeid}\n{report.longreprtext}\n"
            os.write(self.stderr, text.encode())


