"""Sessions on parts of a communicator, beside each other and one after another."""

import pytest
from training import flat, new_model, sgd, train

import mpisync


@pytest.mark.parallel(4)
@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_sessions_beside_and_after_each_other(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    part = comm.Split(comm.rank >= 2, -comm.rank)  # {1, 0} and {3, 2}: their last ranks, 0 and 2, are the roots
    model, optimizer, seen = new_model(seed=comm.rank), None, []
    for on, steps in ((part, 4 + 3 * (comm.rank >= 2)), (part, 3), (comm, 5), (part, 2 + (comm.rank >= 2))):
        optimizer = sgd(model)
        verdicts, session = train(on, model, optimizer, steps=steps, policy=mpisync.BackupWorkers(0))
        assert session.version == steps and session.workers == on.size - 1
        assert session.worker == (None if on.rank == on.size - 1 else on.rank)
        assert len(verdicts) == (steps if session.worker is not None else 0)
        seen.append(flat(model).tobytes())
    part.Free()
    values = comm.allgather(seen)
    for of_session, parts in zip(zip(*values, strict=True), (2, 2, 1, 2), strict=True):
        assert len(set(of_session)) == parts
        assert len(set(of_session[:2])) == len(set(of_session[2:])) == 1
