"""The private duplicates of a user's communicator: each run has one to itself, and gives it back for later runs.

MPI has few communicators to give away, and a duplicate costs a collective: so the user's communicator carries those
that were made for it, and they are freed with it. Every rank has the same ones, in the order in which they were made.
"""

from __future__ import annotations

from mpi4py import MPI

_key: int | None = None
_taken: set[int] = set()  # handles of those that a run uses


def known(comm: MPI.Intracomm) -> list[MPI.Intracomm]:
    """Return the duplicates that were made of `comm`, oldest first."""
    found = comm.Get_attr(_key) if _key is not None else None
    return found if isinstance(found, list) else []


def keep(comm: MPI.Intracomm, private: MPI.Intracomm) -> None:
    """Remember a new duplicate as long as `comm` lives."""
    global _key
    if _key is None:
        _key = MPI.Comm.Create_keyval(delete_fn=_free)
    made = known(comm)
    made.append(private)
    if len(made) == 1:  # to set it again would first free those that it holds
        comm.Set_attr(_key, made)


def is_free(private: MPI.Intracomm) -> bool:
    """Say whether no run uses a duplicate, as far as this rank knows: a run may have ended here and not elsewhere."""
    return private.handle not in _taken


def take(private: MPI.Intracomm) -> None:
    """Let a run have a duplicate to itself."""
    _taken.add(private.handle)


def give_back(private: MPI.Intracomm) -> None:
    """Let later runs have a duplicate, now that its run has ended in good order: no message of it is under way."""
    _taken.discard(private.handle)


def _free(_comm: MPI.Comm, _key: int, privates: list[MPI.Intracomm]) -> None:
    for private in privates:
        _taken.discard(private.handle)
        private.Free()
