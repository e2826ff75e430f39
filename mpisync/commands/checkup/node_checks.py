"""What doctor says about the machine: memory, cores, threads, packages, network, settings."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

from mpisync.commands.checkup.probes import Case, Finding, Probe
from mpisync.commands.checkup.wording import by_value, ranks_named, several, size, who

_BUFFERS = 2  # published versions of the parameters, where late gradients count
_SMALL_SHM_BYTES = 100e6  # containers give 64 MB
# Networks of containers and virtual machines: other hosts have them too, under the same addresses.
_LOCAL_NETWORKS = re.compile(r"(docker|br-|virbr|lxc|lxd|podman|cni|flannel|cali|veth|vmnet|vboxnet)")


def memory(case: Case) -> Iterator[Finding]:
    """Compare what the root's node shares with what is free."""
    root = case.root
    if case.apart or not root.start.size:
        return
    near = [rank for rank in case.nodes[root.machine.node] if case.ranks[rank] is not root]
    lost = [rank for rank in near if not case.ranks[rank].start.sharing]
    if lost or not root.start.sharing:
        yield Finding(
            "shared memory",
            f"ranks of one node cannot open each other's memory{who(case, lost) if lost else ''}: gradients travel by "
            "messages, which is slower",
            "give containers the host's process ids or its /dev/shm: docker run --ipc=host --pid=host",
            must=True,
        )
        return
    by_file = any(case.ranks[rank].start.sharing == "file" for rank in near) or root.start.sharing == "file"
    free_bytes = min(root.machine.memory_bytes, root.machine.shm_bytes) if by_file else root.machine.memory_bytes
    way = f"works ({'by files in /dev/shm' if by_file else 'memfd'})"
    do = "docker run --shm-size=4g, or --pid=host" if by_file else "ask the scheduler for more memory (Slurm: --mem)"
    yield _room(case, len(near), free_bytes, way, do)
    if not by_file and root.machine.shm_bytes < _SMALL_SHM_BYTES:
        yield Finding(
            "shared memory", f"/dev/shm has {size(root.machine.shm_bytes)} free, where MPI puts its own buffers",
            "if MPI crashes with a bus error: docker run --shm-size=1g",
        )  # fmt: skip


def _room(case: Case, workers: int, free_bytes: int, way: str, do: str) -> Finding:
    if case.model_mb is None:
        count = workers or 4
        most = f"a model of up to {size(free_bytes / (count + _BUFFERS))} with {several(count, 'worker')}"
        return Finding("shared memory", f"{way}; {size(free_bytes)} free: room for {most}")
    model_bytes = case.model_mb * 1e6
    if case.alone:
        room = max(0, math.floor(free_bytes / model_bytes) - _BUFFERS)
        says = f"{way}; {size(free_bytes)} free: room for {several(room, 'worker')} with a model of {size(model_bytes)}"
        return Finding("shared memory", says, do if not room else "", must=not room)
    needed = model_bytes * (workers + _BUFFERS)
    what = f"{several(workers, 'worker')} and a model of {size(model_bytes)}"
    says = f"{way}: {what} need {size(needed)}, {size(free_bytes)} free"
    return Finding("shared memory", says, do if needed > free_bytes else "", must=needed > free_bytes)


def _usable(probe: Probe, bound_to: int) -> float:
    """Return how many of the cores that it is bound to a container's limit leaves."""
    return min(float(bound_to), probe.machine.quota_cores or math.inf)


def cores(case: Case) -> Iterator[Finding]:
    """Look for a root bound to one core, and for ranks that share too few."""
    if case.apart:
        return
    if case.alone:
        yield _own_cores(case.first)
        return
    root, binding = case.root, "mpirun --bind-to none, srun --cpu-bind=none; `mpisync run` does it"
    if len(root.machine.cores) <= root.machine.core_threads < root.machine.node_cores:
        yield Finding(
            "cores",
            f"the root ({ranks_named([len(case.ranks) - 1])}) is bound to 1 core of "
            f"{root.machine.node_cores // root.machine.core_threads}, and sums with several threads",
            binding,
            must=True,
        )
    for ranks in case.nodes.values():
        yield _shared_cores(case, ranks, binding)


def _own_cores(probe: Probe) -> Finding:
    usable, all_cores = _usable(probe, len(probe.machine.cores)), several(probe.machine.node_cores, "core")
    if usable == probe.machine.node_cores:
        return Finding("cores", f"all {all_cores} may be used")
    why = "a container's limit" if usable < len(probe.machine.cores) else "as the scheduler or taskset set it"
    return Finding(
        "cores", f"{usable:g} of {all_cores} may be used here ({why})",
        "if a job gets no more, ask the scheduler for more" if usable < 2 else "",
    )  # fmt: skip


def _shared_cores(case: Case, ranks: list[int], binding: str) -> Finding:
    probes = [case.ranks[rank] for rank in ranks]
    union = set().union(*(probe.machine.cores for probe in probes))
    usable = _usable(probes[0], len(union))
    each = {len(probe.machine.cores) for probe in probes}
    all_cores = probes[0].machine.node_cores
    says = f"{several(len(ranks), 'rank')} on {usable:g} of {several(all_cores, 'core')}{who(case, ranks)}"
    if usable >= len(ranks):
        spread = f", each bound to {several(min(each), 'core')}" if each == {1} else ""
        return Finding("cores", says + spread)
    if len(union) < all_cores:
        do = f"ask the scheduler for a core a rank at least, or unbind ({binding})"
        return Finding("cores", f"{says}: ranks take turns", do, must=True)
    return Finding("cores", f"{says}: ranks take turns", "fine to try things, not to measure them")


def threads(case: Case) -> Iterator[Finding]:
    """Compare the threads that ranks compute with to the cores of their node."""
    if case.first.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        yield Finding("threads", "NUMBA_DISABLE_JIT turns off what sums gradients", "unset it", must=True)
    if case.apart:
        return
    for text, ranks in by_value(case, lambda probe: probe.environ.get("OMP_NUM_THREADS", "")).items():
        yield _omp(case, text, ranks)


def _omp(case: Case, text: str, ranks: list[int]) -> Finding:
    if not text:
        most = max(case.ranks[rank].tools.threads for rank in ranks)
        torch = f"torch would take {several(most, 'thread')} a rank, and " if most > 1 else ""
        share = f"{torch}mpisync gives each worker its share of the cores"
        return Finding("threads", f"OMP_NUM_THREADS is not set{who(case, ranks)}: {share}")
    says = f"OMP_NUM_THREADS={text}{who(case, ranks)}"
    threads = int(text) if text.isdecimal() else 0
    if not threads:
        return Finding("threads", f"{says} is no number of threads", "set it to one, or unset it", must=True)
    here = [rank for rank in ranks if case.ranks[rank].machine.node == case.ranks[ranks[0]].machine.node]
    node = int(_usable(case.ranks[here[0]], case.ranks[here[0]].machine.node_cores))
    total = threads * len(here)
    if case.alone:
        return Finding("threads", f"{says}, for each worker")
    if threads > 1 and total > node:
        return Finding(
            "threads", f"{says} on {several(len(here), 'rank')} is {total} threads for {several(node, 'core')}",
            f"unset it, and mpisync shares the cores out; or set it to {max(1, node // len(here))}", must=True,
        )  # fmt: skip
    if 2 * total <= node:
        return Finding(
            "threads", f"{says}: {several(total, 'thread')} in all for {several(node, 'core')}",
            f"unset it, or set it to {node // len(here)}, if gradients take long to compute",
        )  # fmt: skip
    return Finding("threads", says)


def packages(case: Case) -> Iterator[Finding]:
    """Say what computes, and whether compiled kernels can be kept."""
    for problem, ranks in by_value(case, lambda probe: probe.tools.problem).items():
        if problem:
            yield Finding(
                "packages", f"what computes cannot be loaded{who(case, ranks)}: {problem}",
                "make this work: python -c 'import numba, torch'", must=True,
            )  # fmt: skip
    tools = case.first.tools
    if tools.numba and not all(probe.tools.cache for probe in case.ranks):
        none = [rank for rank, probe in enumerate(case.ranks) if not probe.tools.cache]
        yield Finding(
            "packages", f"compiled kernels cannot be kept, so every start compiles them anew{who(case, none)}",
            "set NUMBA_CACHE_DIR to a directory that can be written", must=True,
        )  # fmt: skip
    elif tools.numba:
        yield Finding("packages", f"numba {tools.numba}, compiled kernels are kept in {tools.cache}")
    if tools.torch:
        yield Finding("packages", f"torch {tools.torch}")
    elif not tools.problem:
        yield Finding("packages", "no torch", "pip install torch, if you want Session; PartialReduce does without")


def data_loading(case: Case) -> Iterator[Finding]:
    """Say by which methods a DataLoader's workers may start after MPI has."""
    default, methods = case.first.start_method, case.first.start.children
    failed = {
        method: ranks
        for method in methods
        if (ranks := [rank for rank, probe in enumerate(case.ranks) if probe.start.children.get(method)])
    }
    worked = [method for method in methods if method not in failed]
    remedy = f'DataLoader(..., multiprocessing_context="{worked[-1]}")' if worked else "num_workers=0"
    for method, ranks in failed.items():
        why = case.ranks[ranks[0]].start.children[method]
        says = f"a process started by {method} after MPI had started {why}{who(case, ranks)}"
        if method == default:
            yield Finding("data loading", f"{says}; it is the default", f"with num_workers > 0: {remedy}", must=True)
        else:
            yield Finding("data loading", says, f"do not choose {method} as a DataLoader's multiprocessing_context")
    if default == "fork" and any(probe.machine.infiniband for probe in case.ranks) and default not in failed:
        yield Finding(
            "data loading", "workers of a DataLoader are forked after MPI has started, which InfiniBand may not bear",
            f"with num_workers > 0: {remedy}, or export RDMAV_FORK_SAFE=1",
        )  # fmt: skip
    elif default in worked:
        others = " and ".join(method for method in worked if method != default)
        also = f"; so do {others}" if others else ""
        yield Finding("data loading", f"workers of a DataLoader start by {default}, which works after MPI has{also}")


def gpus(case: Case) -> Iterator[Finding]:
    """Say who sees which GPUs, where there are any."""
    most = max(max(probe.machine.gpu_files, len(probe.tools.gpus)) for probe in case.ranks)
    if not most:
        return
    for seen, ranks in by_value(case, lambda probe: probe.tools.gpus).items():
        visible = case.ranks[ranks[0]].environ.get("CUDA_VISIBLE_DEVICES")
        why = f", CUDA_VISIBLE_DEVICES={visible}" if visible is not None else ""
        says = f"torch sees {', '.join(seen) if seen else 'none'} of {several(most, 'GPU')}{why}{who(case, ranks)}"
        hidden = not seen and visible is None
        yield Finding("GPUs", says, "install a torch built for this machine's CUDA, if you want them" if hidden else "")
    for problem, ranks in by_value(case, lambda probe: probe.tools.device).items():
        if problem:
            yield Finding("GPUs", f"a model on a card cannot be trained: {problem}{who(case, ranks)}", "as it says")
        elif case.ranks[ranks[0]].tools.gpus:
            yield Finding("GPUs", f"gradients of a model on a card are reduced there, by CuPy{who(case, ranks)}")
    aware = case.first.start.cuda_aware
    says = "does not say whether it takes" if aware is None else "says that it takes" if aware else "does not take"
    yield Finding("GPUs", f"MPI {says} GPU memory, and mpisync gives it none: between nodes gradients go by the host")


def network(case: Case) -> Iterator[Finding]:
    """Name the interfaces over which ranks on other nodes cannot be reached, though they have an address."""
    first = case.first
    if first.mpi is None:
        return
    interfaces = {name for probe in case.ranks for name in probe.machine.interfaces}
    tripping = sorted(filter(_LOCAL_NETWORKS.match, interfaces))
    dead = sorted({name for probe in case.ranks for name in probe.machine.unplugged} - set(tripping))
    decided = any("tcp_if_" in name or "prte_if_" in name for name in first.environ)
    if not tripping + dead or decided or first.mpi.family != "openmpi":
        said = ", ".join(n for n in first.machine.interfaces if n != "lo") or "none but the loopback"
        yield Finding("network", f"interfaces: {said}{'; which to take is set in the environment' if decided else ''}")
        return
    option = f"--mca btl_tcp_if_exclude {','.join(tripping + dead)},lo"
    if dead:  # the launcher's own connections take them too
        names = ",".join(dead)
        own = f"--prtemca prte_if_exclude {names}" if first.mpi.version >= (5,) else f"--mca oob_tcp_if_exclude {names}"
        option = f"{option} {own}"
    several_nodes = len(case.nodes) > 1
    do = f"{'' if several_nodes else 'with several nodes: '}mpirun {option}, or mpisync run --launcher-args '{option}'"
    if tripping:
        names, verb = ",".join(tripping), "is" if len(tripping) == 1 else "are"
        says = f"{names} {verb} local to each host, and Open MPI may hang when it tries to reach other hosts there"
        yield Finding("network", says, do, must=several_nodes)
    if dead:
        names, verb = ",".join(dead), "has" if len(dead) == 1 else "have"
        says = f'{names} {verb} an address and no carrier, and Open MPI may end there with "No route to host"'
        yield Finding("network", says, do, must=several_nodes)


def settings(case: Case) -> Iterator[Finding]:
    """Name the MPISYNC_ variables that would be misunderstood."""
    problems: dict[str, list[int]] = {}
    for rank, probe in enumerate(case.ranks):
        for problem in probe.settings:
            problems.setdefault(problem, []).append(rank)
    for problem, ranks in problems.items():
        yield Finding("settings", f"{problem}{who(case, ranks)}", "correct it, or unset it", must=True)
    given = [f"{name}={text}" for name, text in case.first.environ.items() if name.startswith("MPISYNC_")]
    if not problems:
        yield Finding("settings", f"{', '.join(given) if given else 'no MPISYNC_ variable is set'}")


_ALIKE: tuple[tuple[str, Callable[[Probe], str], bool], ...] = (
    ("mpisync", lambda probe: probe.mpisync, True),
    ("Python", lambda probe: probe.python, True),
    ("torch", lambda probe: probe.tools.torch or "absent", True),
    ("numba", lambda probe: probe.tools.numba or "absent", True),
    (
        "the MPISYNC_ variables",
        lambda probe: " ".join(f"{k}={v}" for k, v in probe.environ.items() if k.startswith("MPISYNC_")) or "none",
        True,
    ),
)


def differences(case: Case) -> Iterator[Finding]:
    """Name what should be the same on all ranks and is not."""
    for name, key, must in _ALIKE:
        found = by_value(case, key)
        if len(found) > 1:
            which = "; ".join(f"{value} on {ranks_named(ranks)}" for value, ranks in found.items())
            yield Finding("differences", f"{name} not the same: {which}", "make it the same on every node", must=must)
