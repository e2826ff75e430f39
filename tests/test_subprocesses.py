"""What ranks start is no rank: DataLoader workers of every start method, in scripts that import MPI at their top."""

from pathlib import Path

import pytest
from launch import run_script
from test_faults import check

from mpisync import launchers

LIMIT_S = 200.0  # each of several processes imports torch
pytestmark = pytest.mark.timeout(LIMIT_S + 60.0)
SCRIPT = """
{imports}
import os, sys, time
import torch
from torch.utils.data import DataLoader, TensorDataset

comm = MPI.COMM_WORLD
rank, size = comm.rank, comm.size  # as most scripts do; a child is alone
place = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", -1)))

class Places(torch.utils.data.Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        return torch.full((4,), float(size)), torch.tensor(place)

def main():
    loader = DataLoader(Places(), batch_size=4, num_workers=2, persistent_workers={persistent},
                        multiprocessing_context="{method}")
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = set()
    with mpisync.Session(comm, model, optimizer, progress=False) as session:
        for x, y in session.batches(loader, steps={steps}):
            seen |= {{(int(a), int(b)) for a, b in zip(x[:, 0], y)}}
            {in_loop}
            torch.nn.functional.cross_entropy(model(x), y.clamp(0, 1)).backward()
            session.step()
    print("done", rank, session.version, seen == (set() if rank == size - 1 else {{({alone}, rank)}}), flush=True)

if __name__ == "__main__":
    main()
"""
SEMAPHORES = Path("/dev/shm")


@pytest.fixture(autouse=True)
def no_semaphore_is_left():
    """Loaders of killed jobs leave their semaphores: whoever would unlink them was killed too."""
    before = set(SEMAPHORES.glob("sem.mp-*"))
    yield
    for left in set(SEMAPHORES.glob("sem.mp-*")) - before:
        left.unlink(missing_ok=True)


FIRST = {
    "MPI first": "from mpi4py import MPI\nimport mpisync",
    "mpisync first": "import mpisync\nfrom mpi4py import MPI",
}


def script(method, first, persistent, steps=6, in_loop="pass"):
    alone = 3 if method == "fork" else 1
    return SCRIPT.format(
        imports=FIRST[first], persistent=persistent, method=method, steps=steps, in_loop=in_loop, alone=alone
    )


def test_what_leads_to_the_launcher_goes_and_what_tells_the_place_stays():
    link = {"PMIX_NAMESPACE": "job", "PMIX_SERVER_URI41": "tcp", "PMI_FD": "11", "HYDI_CONTROL_FD": "7"}
    place = {"OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1", "PMI_SIZE": "2", "PMIX_MCA_gds": "hash"}
    assert launchers.without_link(link | place) == place


@pytest.mark.parametrize(
    ("method", "first", "persistent"),
    [
        ("fork", "MPI first", True),
        ("spawn", "mpisync first", True),
        ("forkserver", "MPI first", True),
        pytest.param("spawn", "MPI first", False, marks=pytest.mark.long),
        pytest.param("forkserver", "mpisync first", False, marks=pytest.mark.long),
    ],
)
def test_the_workers_of_a_loader_start_whatever_the_method(launch_arguments, method, first, persistent):
    code = script(method, first, persistent)
    env = {"MPISYNC_STALL_REPORT_S": "300"}  # to import torch anew takes its time
    run = check(run_script(3, code, timeout_s=LIMIT_S, launcher_args=launch_arguments, env=env), fails=False)
    assert run.stderr == "" and sorted(run.stdout.splitlines()) == [f"done {rank} 6 True" for rank in range(3)]


FAULT = "if rank == 0 and session.version == 3: print(0, 'fault', time.time(), flush=True); "


@pytest.mark.long
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_the_workers_of_a_loader_end_with_a_job_that_fails(launch_arguments, method):
    code = script(method, "MPI first", True, steps=10**6, in_loop=FAULT + "raise OSError('on purpose')")
    check(run_script(3, code, timeout_s=LIMIT_S, launcher_args=launch_arguments), "OSError: on purpose")


@pytest.mark.parametrize("launch_arguments", ["ulfm"], indirect=True)
def test_the_workers_of_a_loader_end_with_a_rank_that_runs_nothing_at_its_end(launch_arguments):
    """A plain launcher leaves them to torch, whose workers look after their parent every 5 s."""
    code = script("fork", "MPI first", True, steps=10**6, in_loop=FAULT + "os._exit(3)")
    check(run_script(3, code, timeout_s=LIMIT_S, launcher_args=launch_arguments))
