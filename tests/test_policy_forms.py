"""What policies refuse, and their command-line form."""

import math

import pytest
from playing import recorded

from mpisync.policies import Async, BackupWorkers, Deadline, Replay, parse_policy

RECORD = recorded([(3, 0, 0), (1, 0, 0)])  # made by at least four workers


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BackupWorkers(-1), ValueError, "backup must be at least 0, not -1: use 0"),
        (lambda: BackupWorkers(1.5), TypeError, "backup must be a whole number, not 1.5"),
        (lambda: Deadline(0), ValueError, "seconds must be finite and greater than 0, not 0:"),
        (lambda: Deadline(-1.0), ValueError, "not -1.0: use BackupWorkers"),
        (lambda: Deadline(math.nan), ValueError, "not nan: use"),
        (lambda: Deadline(math.inf), ValueError, "not inf: use"),
        (lambda: Deadline(1, at_least=0), ValueError, "at_least must be at least 1, not 0:"),
        (lambda: Deadline(1, grace=-0.5), ValueError, "grace must be .* not -0.5:"),
        (lambda: Deadline(1, grace=math.nan), ValueError, "grace must be .* not nan:"),
        (lambda: Async(0), ValueError, "k must be at least 1, not 0:"),
        (
            lambda: Async(1, max_staleness=-1),
            ValueError,
            "max_staleness must be at least 0, not -1",
        ),
        (
            lambda: BackupWorkers(4).check(4),
            ValueError,
            r"4 with 4 workers: use BackupWorkers\(3\)",
        ),
        (lambda: BackupWorkers(5).check(4), ValueError, "less than the number of workers"),
        (lambda: BackupWorkers(1).check(1), ValueError, r"1 with 1 worker: use BackupWorkers\(0\)"),
        (lambda: BackupWorkers(0).check(0), ValueError, "or start more ranks"),
        (lambda: Deadline(1, at_least=4).check(3), ValueError, "can never close.* use at_least=3"),
        (lambda: Async().check(0), ValueError, "at least 1 worker, not 0"),
        (lambda: Async(4, max_staleness=0).check(3), ValueError, "can never close.* use k=3"),
        (lambda: Replay(RECORD).check(3), ValueError, "record is of 4 .* start it with 4"),
    ],
)
def test_what_makes_no_sense_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "check",
    [
        lambda: BackupWorkers(0).check(1),
        lambda: BackupWorkers(3).check(4),
        lambda: Deadline(1, at_least=4).check(4),
        lambda: Async(40).check(4),
        lambda: Async(4, max_staleness=0).check(4),
        lambda: Replay(RECORD).check(4),
    ],
)
def test_what_is_just_possible_is_not_refused(check):
    check()


@pytest.mark.parametrize(
    ("text", "policy", "form"),
    [
        ("backup:1", BackupWorkers(1), "backup:1"),
        (" backup:backup=0 ", BackupWorkers(0), "backup:0"),
        ("deadline:0.5", Deadline(0.5), "deadline:0.5"),
        ("deadline:2", Deadline(2), "deadline:2"),
        (
            "deadline:0.5,at_least=3,grace=0.1",
            Deadline(0.5, 3, 0.1),
            "deadline:0.5,at_least=3,grace=0.1",
        ),
        ("deadline:seconds=1e-9, grace=1", Deadline(1e-9, 1, 1.0), "deadline:1e-09,grace=1"),
        ("async", Async(), "async:k=1"),
        ("async:2", Async(2), "async:k=2"),
        ("async:k=2,max_staleness=4", Async(2, 4), "async:k=2,max_staleness=4"),
        ("async:max_staleness=0", Async(1, 0), "async:k=1,max_staleness=0"),
    ],
)
def test_command_line_forms(text, policy, form):
    assert parse_policy(text) == policy
    assert str(policy) == form
    assert parse_policy(form) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be one of backup:B, .* not ''"),
        ("ssp:1", "must be one of .* not 'ssp:1'"),
        ("replay", "must be one of .* replay:PATH, not 'replay'"),
        ("backup", "backup needs its backup"),
        ("deadline:", "deadline needs its seconds"),
        ("backup:x", "backup must be a whole number, not 'x'"),
        ("backup:1.5", "backup must be a whole number, not '1.5'"),
        ("deadline:soon", "seconds must be a number, not 'soon'"),
        ("deadline:nan", "seconds must be finite"),
        ("backup:1,2", "after the first as NAME=VALUE; not '2'"),
        ("async:max_staleness=1,2", "after the first as NAME=VALUE; not '2'"),
        ("async:k=1,k=2", "each once .* not 'k=2'"),
        ("async:b=1", "values are k, max_staleness, .* not 'b=1'"),
        ("async:k=1,", "not ''"),
        ("backup:-1", "backup must be at least 0"),
    ],
)
def test_bad_command_line_forms_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_policy(text)
