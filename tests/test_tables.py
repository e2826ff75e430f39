"""Tables as people and programs write them: read right and said how, or refused by a sentence that says what to do."""

import gzip

import numpy as np
import pytest

from mpisync.planning.observed import read_times

STEPS, WORKERS = 30, 4
TIMES = np.round(np.random.default_rng(0).lognormal(np.log(0.3), 0.1, (STEPS, WORKERS)), 4)
RANKS = [f"rank{w}" for w in range(WORKERS)]
HOSTS = ["delta", "alpha", "gamma", "beta"]


def comma(value):
    return f"{value:.4f}".replace(".", ",")


def wide(names=None, *, times=TIMES, index=False, between=",", write="{:.4f}".format, end="\n", tail=""):
    """A line a step, a column a worker."""
    rows = [[*([str(step)] if index else []), *map(write, row)] for step, row in enumerate(times)]
    return "".join(between.join(row) + tail + end for row in ([names] if names else []) + rows)


def long(names=("step", "worker", "seconds"), *, times=TIMES, who=str, write="{:.4f}".format, between=",", more=(),
         left=lambda step, worker: False):  # fmt: skip
    """A line a gradient."""
    rows = [
        [str(step), who(worker), write(times[step, worker]), *more]
        for step in range(len(times)) for worker in range(times.shape[1]) if not left(step, worker)
    ]  # fmt: skip
    return "".join(between.join(row) + "\n" for row in ([list(names)] if names else []) + rows)


def shuffled(text):
    head, *rows = text.splitlines(keepends=True)
    np.random.default_rng(1).shuffle(rows)
    return "".join([head, *rows])


def read(tmp_path, text, **columns):
    path = tmp_path / "times.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_times(path, **columns)


def beside(times, column):
    return np.column_stack([times, column])


@pytest.mark.parametrize(
    "text, said",
    [
        pytest.param(wide(), ["no column of step numbers, 4 workers in columns 1 to 4, seconds; commas"], id="plain"),
        pytest.param(wide(["", *RANKS], index=True), ["step in column 1, 4 workers in columns 2 to 5"], id="pandas"),
        pytest.param(wide(["Unnamed: 0", *RANKS], index=True), ["step in column 1 ('Unnamed: 0')"], id="pandas again"),
        pytest.param(wide(index=True), ["step in column 1, 4 workers"], id="an index without a header"),
        pytest.param(wide(["", *"0123"], index=True), ["(0 to 3)"], id="columns named by numbers, with an index"),
        pytest.param(wide([*"0123"]), ["(0 to 3)"], id="columns named by numbers"),
        pytest.param(wide(RANKS, index=True), ["step in column 1,"], id="as R writes"),
        pytest.param("\ufeff" + wide(["step", *RANKS], index=True), ["step in column 1 ('step')"],
                     id="byte-order mark"),
        pytest.param(wide(["step", *RANKS], index=True).encode("utf-16"), ["('step')"], id="UTF-16"),
        pytest.param(gzip.compress(wide(["step", *RANKS], index=True).encode()), ["('step')"], id="gzip"),
        pytest.param(wide(["Iteration", *RANKS], index=True), ["('Iteration')"], id="iterations"),
        pytest.param(wide(["step", *RANKS], index=True, between=";", write=comma), ["semicolons", "decimal comma"],
                     id="semicolons and decimal commas"),
        pytest.param("sep=;\n" + wide(RANKS, between=";"), ["semicolons between fields"], id="as Excel writes"),
        pytest.param(wide(["step", *RANKS], index=True, between="\t", write=comma), ["tabs", "decimal comma"],
                     id="tabs"),
        pytest.param(wide(between="  ", write=comma), ["blanks between fields, decimal comma"], id="blanks"),
        pytest.param(wide(write=lambda x: f'"{comma(x)}"'), ["decimal comma"], id="quoted decimal commas"),
        pytest.param(wide(['"step"', *(f'"{name}"' for name in RANKS)], index=True, write='"{:.4f}"'.format), [],
                     id="quoted"),
        pytest.param(wide(["step", *RANKS], index=True, end="\r\n"), ["(rank0 to rank3)"], id="Windows line ends"),
        pytest.param("# a, b\n" + wide(["step", *RANKS], index=True) + "# end\n", [], id="comments"),
        pytest.param(wide(["step", *RANKS], index=True, tail=","), [], id="delimiters behind lines"),
        pytest.param(wide(tail=";", between=";"), ["4 workers"], id="delimiters behind lines without a header"),
        pytest.param(wide(["step", *RANKS], index=True) + "mean,1,1,1,1\n", ["line 32 (mean) sums up"],
                     id="a mean below"),
        pytest.param(wide([*RANKS, "total"], times=beside(TIMES, TIMES.sum(1))), ["left out column 5 ('total')"],
                     id="a total beside"),
        pytest.param(wide(times=beside(TIMES, TIMES.mean(1))), ["column 5 sums up the others"],
                     id="a mean without a name"),
        pytest.param(wide(times=beside(TIMES, TIMES.max(1))), ["column 5 sums up the others"], id="the slowest"),
        pytest.param(wide(["step", *RANKS, "loss"], index=True, times=beside(TIMES, 3 / np.arange(1, 31))),
                     ["left out column 6 ('loss')"], id="a loss beside ranks"),
        pytest.param(wide(write="{:.5e}".format), [], id="scientific"),
        pytest.param(wide(write="0:00:{:07.4f}".format), ["seconds (from h:mm:ss)"], id="hours"),
        pytest.param(wide([f"{name}_ms" for name in RANKS], write=lambda x: f"{x * 1e3:.1f}"), ["seconds (from ms)"],
                     id="ms in names"),
        pytest.param(wide([f"{name} (us)" for name in RANKS], write=lambda x: f'"{x * 1e6:,.1f}"'), ["(from us)"],
                     id="us in names, with thousands"),
        pytest.param(wide([f"{name}_us" for name in RANKS], write=lambda x: f"{x * 1e6:,.0f}".replace(",", "'")),
                     ["(from us)"], id="Swiss thousands"),
        pytest.param(wide(write=lambda x: f"{x * 1e3:.1f} ms"), ["seconds (from ms)"], id="ms behind numbers"),
        pytest.param("# times in ms\n" + wide(write=lambda x: f"{x * 1e3:.1f}"), ["(from ms)"], id="ms in a comment"),
        pytest.param(shuffled(wide(["step", *RANKS], index=True)), ["lines were put in the order of"], id="unsorted"),
        pytest.param(long(), ["a line a gradient: step in column 1 ('step'), 4 workers in column 2 ('worker'), sec"],
                     id="long"),
        pytest.param(shuffled(long()), [], id="long unsorted"),
        pytest.param(long(between=";", write=comma), ["semicolons between fields, decimal comma"],
                     id="long semicolons"),
        pytest.param(long(("Step", "Worker ID", "Step Time (s)")), ["('Step Time (s)')"], id="long with blanks"),
        pytest.param(long(("globalStep", "workerId", "computeSeconds")), ["('computeSeconds')"], id="long camel"),
        pytest.param(long(("iter", "dp_rank", "duration", "loss", "start_time"), more=("2.3", "1700000000")),
                     ["left out column 4 ('loss'), column 5 ('start_time')"], id="a trace"),
        pytest.param(long(("step", "rank", "time_ms"), write=lambda x: f"{x * 1e3:.1f}"), ["seconds (from ms)"],
                     id="long ms"),
        pytest.param(long(("step", "rank", "seconds", "host"), more=("one",)), ["left out column 4 ('host')"],
                     id="rank and host"),
    ],
)  # fmt: skip
def test_a_table_is_read_right_and_says_how(tmp_path, text, said):
    observed = read(tmp_path, text)
    assert observed.times_s == pytest.approx(TIMES, rel=1e-3) and observed.measured.all()
    assert observed.workers == list(range(WORKERS)) and observed.step_numbers.tolist() == list(range(STEPS))
    assert observed.notes[0].startswith("read as ") and observed.hosts == []
    for part in said:
        assert any(part in note for note in observed.notes), observed.notes


GROWING = np.arange(STEPS) * 0.3 + 100


@pytest.mark.parametrize(
    "text, why",
    [
        pytest.param(wide(write=comma), "commas seem to separate decimals as well as fields", id="decimal commas"),
        pytest.param(wide(write=comma, times=TIMES + 1), "commas seem to separate", id="decimal commas above 1"),
        pytest.param(wide(["step", *RANKS], index=True, write=comma), "names has 5 fields, but those below have 9",
                     id="decimal commas below names"),
        pytest.param(wide([f"{name}_us" for name in RANKS], between=";", write=lambda x: f"{x * 1e4:,.0f}"),
                     "may be 3038 or 3.038", id="a comma before three digits"),
        pytest.param(wide(["rank0_ms", *RANKS[1:]]), "have different units", id="a unit of one"),
        pytest.param(wide(RANKS, times=TIMES * [1, 1, 1, 1000]), "('rank3') has a median of 311, the others of 0.304",
                     id="ms in one column"),
        pytest.param(wide(write="{:.4f}".format, times=TIMES * [1, 1, 1, 50]), "name them rank0, rank1", id="50 times"),
        pytest.param(wide(write=lambda x: f"{x * 1e6:.0f}"), "more than a day", id="us without a name"),
        pytest.param(wide(["time", "loss"], times=TIMES[:, :2]), "('time'), column 2 ('loss') are not a worker's times",
                     id="no workers"),
        pytest.param(wide(["forward", "backward", "optimizer"], times=TIMES[:, :3]), "not a worker's times",
                     id="phases"),
        pytest.param(wide(["timestamp", *HOSTS], times=np.column_stack([1.7e9 + GROWING, TIMES])), "('timestamp') is",
                     id="timestamps beside hosts"),
        pytest.param(wide(times=np.column_stack([1.7e9 + GROWING, TIMES])), "more than a day", id="times of day"),
        pytest.param(wide(times=np.column_stack([GROWING, TIMES])), "only grows", id="a clock"),
        pytest.param(wide(RANKS, times=TIMES.cumsum(axis=0)), "only grows", id="sums so far"),
        pytest.param(wide(times=beside(TIMES, np.full(STEPS, 0.5))), "column 5 is 0.5 in every step", id="a setting"),
        pytest.param(wide(write="{:g}".format, times=beside(TIMES, np.arange(STEPS) % 3 + 1)), "has whole numbers",
                     id="a gpu's number"),
        pytest.param(wide([*RANKS, "mystery"], times=beside(TIMES, TIMES[:, 0] + 0.1)), "('mystery') is not named as",
                     id="a column beside ranks"),
        pytest.param(wide(times=np.where(TIMES == TIMES[3, 2], -1, TIMES)), "line 4: column 3 must not be negative",
                     id="negative"),
        pytest.param(wide(["step", *RANKS], index=True).replace("\n7,", "\n7,0.3,"), "line 9: every line must have 5",
                     id="ragged"),
        pytest.param(wide() + ",".join(f"{x:.4f}" for x in TIMES.sum(0)) + "\n", "line 31: it is the sum of the lines",
                     id="a total below"),
        pytest.param(wide(["step", *RANKS], index=True) + wide(index=True), "step 0 stands in two lines",
                     id="two runs"),
        pytest.param(wide(["step", *RANKS], index=True) * 2, "line 32: .*not 'rank0'", id="two files"),
        pytest.param(long() + "3,2,0.5\n", "step 3 of worker 2 stands in lines 16 and 122", id="one twice"),
        pytest.param(long(("step", "host", "seconds", "gpu"), who=lambda w: HOSTS[w // 2], more="0"), "stands in lines",
                     id="two of a host"),
        pytest.param(long(("step", "host", "took"), who=lambda w: f"node-{w}").replace("\n7,node-2", "\n7,nod-2"),
                     "worker 'nod-2' has a time in 1 of 30 steps only", id="a misspelt worker"),
        pytest.param(long().replace("\n7,2,", "\n.7,2,"), "line 32: .*must be the step's whole number, not '.7'",
                     id="a torn step"),
        pytest.param(wide(["rank", *RANKS[1:]]), "('rank') is not named as", id="a torn name"),
        pytest.param(wide(between="\t").replace("0.3049", "0,3049"), "a comma in '0,3049' and a point in",
                     id="both marks"),
        pytest.param(wide().replace("0.3049", "0.3.049"), "line 25: .*not '0.3.049'", id="two points"),
        pytest.param(long(("step", "rank", "compute_s", "duration"), more=("1",)), "say which by --seconds",
                     id="two times"),
        pytest.param(long(("step", "gpu", "loss")), "no column's name tells the seconds", id="no time"),
        pytest.param(long(None), "by --step, --worker and --seconds", id="long without names"),
        pytest.param(long(None, who=HOSTS.__getitem__), "needs --step, --worker and --seconds", id="long of hosts"),
        pytest.param(long(("a", "b", "c")), "by --step, --worker and --seconds", id="long, names that say nothing"),
        pytest.param(long(times=TIMES.cumsum().reshape(TIMES.shape)), "only grows", id="long times of day"),
        pytest.param(long(times=TIMES + 1.7e9), "more than a day", id="long Unix times"),
        pytest.param("".join(f"{1e5 + i / 8},{i % 4},{0.3 + i % 7 / 50:.2f}\n" for i in range(99)), "more than a day",
                     id="an event log"),
        pytest.param("time,rank,seconds\n" + "".join(f"{i / 8},{i % 4},{0.3 + i % 7 / 50:.2f}\n" for i in range(99)),
                     "no column's name tells the step", id="an event log with names"),
        pytest.param(b"PK\3\4\0\0", "no text: save the table as CSV", id="a spreadsheet"),
        pytest.param(gzip.compress(b'{"a": 1}\n'), "decompress it first", id="a compressed record"),
        pytest.param(gzip.compress(wide().encode())[:-20], "cannot be decompressed", id="half of a file"),
    ],
)  # fmt: skip
def test_what_cannot_be_workers_times_is_refused_with_what_to_do(tmp_path, text, why):
    with pytest.raises(ValueError, match=why.replace("(", r"\(").replace(")", r"\)")) as caught:
        read(tmp_path, text)
    assert "times.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_columns_may_be_named_or_numbered(tmp_path):
    text = long(("it", "who", "x", "other"), more=("0.5",))
    for columns in ({"step": "it", "worker": "who", "seconds": "x"}, {"step": "1", "worker": "2", "seconds": "3"}):
        assert read(tmp_path, text, **columns).times_s == pytest.approx(TIMES)
    assert read(tmp_path, long(None), step="1", worker="2", seconds="3").times_s == pytest.approx(TIMES)
    two = long(("step", "rank", "compute_s", "duration"), more=("1",))
    assert read(tmp_path, two, seconds="compute_s").times_s == pytest.approx(TIMES)
    assert read(tmp_path, wide(["k", *HOSTS], index=True), step="K").times_s == pytest.approx(TIMES)
    for columns, why in [
        ({"step": "nil"}, "--step nil names no column: there are it, who, x, other"),
        ({"step": "9", "worker": "2", "seconds": "3"}, "--step 9 names no column"),
        ({"step": "it", "worker": "it", "seconds": "x"}, "three different columns"),
        ({"step": "it", "worker": "who"}, "say which by --seconds"),
        ({"step": "other", "worker": "who", "seconds": "x"}, "column 4 .*whole number, not '0.5'"),
    ]:
        with pytest.raises(ValueError, match=why):
            read(tmp_path, text, **columns)


def test_names_tell_workers_apart(tmp_path):
    observed = read(tmp_path, wide(["step", *HOSTS], index=True))
    assert observed.hosts == HOSTS and observed.workers == [0, 1, 2, 3]
    observed = read(tmp_path, long(("step", "host", "took"), who=HOSTS.__getitem__))
    assert observed.hosts == sorted(HOSTS)
    assert observed.times_s == pytest.approx(TIMES[:, [HOSTS.index(host) for host in sorted(HOSTS)]])
    observed = read(tmp_path, long(("step", "node", "seconds"), who=lambda w: f"node-{w + 9}"))
    assert observed.workers == [9, 10, 11, 12] and observed.hosts[0] == "node-9"  # 9 before 10
    assert observed.times_s == pytest.approx(TIMES)


def test_gaps_and_workers_that_come_late_are_said(tmp_path):
    observed = read(tmp_path, long(left=lambda step, worker: worker == 3 and step < 12))
    assert (~observed.measured).sum() == 12 and "worker 3 has its first time in step 12" in observed.notes
    gaps = wide(["step", *RANKS], index=True).replace("\n9,0.", "\n9,NA,0.").replace("\n5,0.", "\n5,,0.")
    with pytest.raises(ValueError, match="every line must have 5 fields"):
        read(tmp_path, gaps)
    lines = wide(["step", *RANKS], index=True).splitlines()
    lines[6], lines[9] = ",".join(["5", "", *lines[6].split(",")[2:]]), ",".join(["8", "NA", *lines[9].split(",")[2:]])
    observed = read(tmp_path, "\n".join(lines) + "\n")
    assert np.argwhere(~observed.measured).tolist() == [[5, 0], [8, 0]]


def test_steps_keep_their_numbers(tmp_path):
    text = "".join(f"{10 * step + 500},{','.join(map(str, row))}\n" for step, row in enumerate(TIMES))
    assert read(tmp_path, "step,a,b,c,d\n" + text).step_numbers[:3].tolist() == [500, 510, 520]


def test_one_worker_and_a_torn_line(tmp_path):
    assert read(tmp_path, wide(times=TIMES[:, :1])).times_s == pytest.approx(TIMES[:, :1])
    observed = read(tmp_path, wide(["step", "seconds"], index=True, times=TIMES[:, :1]))
    assert observed.times_s == pytest.approx(TIMES[:, :1]) and observed.hosts == []
    observed = read(tmp_path, long() + "30,1")
    assert observed.times_s == pytest.approx(TIMES) and "line 122 is torn and was left out" in observed.notes
