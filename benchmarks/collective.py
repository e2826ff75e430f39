"""`mpisync bench` as a script: one step against the collectives that average gradients elsewhere.

mpisync run -n 5 benchmarks/collective.py                       sizes as OMB has them
mpisync run -n 5 benchmarks/collective.py --sizes 1024 100000000
mpirun -n 5 python benchmarks/collective.py ...                 the same
"""

import argparse

from mpi4py import MPI

from mpisync.commands import bench
from mpisync.commands.benching.collective import compare


def main() -> None:
    """Measure on the ranks of this job."""
    about, more = (bench.__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bench.add_options(parser)
    asked = parser.parse_args()
    try:
        bench.check(asked)
        compare(asked, MPI.COMM_WORLD)
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
