"""The report as a page: whole, harmless, small; and looked at by a real browser."""

import base64
import html.parser
import re
import time
import zlib
from dataclasses import replace

import browser
import numpy as np
import pytest
from stories import END, STORY, TOLD, played, write

from mpisync.commands import main
from mpisync.records import RunEnd
from mpisync.reports import Run, page, read_run
from mpisync.reports.figures import figures
from mpisync.reports.raster import response_map, verdict_map

VOID = {"meta", "img", "br"}
HOSTILE = (
    "</title><script>document.title='owned'</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</style><style>body{display:none}",
    "\u202e\x00\ud800&lt;{{7*7}}",
    "<!--",
    "]]>" * 3000,
)


class Outline(html.parser.HTMLParser):
    """The tags of a page in order, each closed in turn, and its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another"


FAILED = RunEnd(0, "rank 1: out of memory", [], handed=[0, 0], used=[0, 0], discarded=[0, 0], lost=[0, 0])


def costly():
    """The story, with a cost for every batch but one."""
    costs = iter((64.0, 900.0, 0.0, 1e30, None, 65.0))
    return [
        replace(step, arrivals=[replace(arrival, cost=next(costs)) for arrival in step.arrivals]) for step in STORY
    ]


def pages(tmp_path):
    """Pages of one run, of several, and of some that have little to show."""
    runs = [read_run(write(tmp_path / "story.jsonl"))]
    for policy in ("backup:0", "backup:1", "async:k=2"):
        header, steps = played(policy, [[1.0, 2.0], [3.0], [1.5]], 60)
        runs.append(read_run(write(tmp_path / policy, steps, header)))
    empty = read_run(write(tmp_path / "empty.jsonl", []))
    silent = [replace(step, arrivals=[]) for step in STORY]
    return {
        "one": page(runs[:1]),
        "several": page(runs, ["record x.jsonl is no record"]),
        "empty": page([empty]),
        "empty among others": page([empty, *runs]),
        "no arrivals": page([read_run(write(tmp_path / "silent.jsonl", silent))]),
        "one step": page([read_run(write(tmp_path / "step.jsonl", STORY[:1]))]),
        "none": page([], ["record x.jsonl is no record"]),
        "told": page([read_run(write(tmp_path / "told.jsonl", costly(), TOLD, END))]),
        "told beside": page([read_run(tmp_path / "told.jsonl"), *runs]),
        "failed": page([read_run(write(tmp_path / "failed.jsonl", [], TOLD, FAILED))]),
    }


def test_pages_are_whole_and_fetch_nothing(tmp_path):
    for name, text in pages(tmp_path).items():
        outline = Outline(text)
        assert not {"script", "link", "iframe", "object", "base", "form"} & set(outline.tags), name
        sources = [value for _, key, value in outline.attributes if key in ("src", "href", "srcset", "data")]
        assert all(source.startswith("data:image/png;base64,") for source in sources), name
        assert not [key for _, key, _ in outline.attributes if key.startswith("on")], name
        assert "url(" not in text and "@import" not in text and "http" not in text.replace("http-equiv", "")
        assert "default-src 'none'" in text
        numbers = re.sub(r"base64,[^\"]*", "", text)
        assert not re.search(r"\b(nan|inf|None)\b", numbers), name


def test_runs_are_told_apart_by_letter_and_colour(tmp_path):
    text = pages(tmp_path)["several"]
    for place, letter in enumerate("ABCD"):
        assert f'<span class="tag r{place}">{letter}</span>' in text
    assert '<p class="notice">record x.jsonl is no record</p>' in text


def test_a_run_without_steps_takes_nobodys_colour(tmp_path):
    text = pages(tmp_path)["empty among others"]
    assert 'class="line r1"' in text and 'class="line r0"' not in text


def test_hostile_strings_change_nothing_but_text(tmp_path):
    def told(number, *strings):
        text = iter(strings * 20)
        header = replace(
            TOLD, policy=next(text), version=next(text), hosts=[next(text), next(text)],
            settings={next(text): next(text), "more": [next(text), {next(text): 1}], "on_late": [next(text)]},
            command=[next(text), next(text)], root_host=next(text), transports=[next(text), next(text)],
            parameters={next(text): 10**400}, parameters_bytes=10**400, root_cores=10**400, steps=10**400,
            optimizer=next(text), scheduler=next(text), versions={next(text): next(text), "MPI": next(text)},
        )  # fmt: skip
        arrivals = [*STORY[2].arrivals[:1], replace(STORY[2].arrivals[1], reason=next(text)), STORY[2].arrivals[2]]
        steps = [*STORY[:2], replace(STORY[2], arrivals=arrivals)]
        late = replace(END.arrivals[0], reason=next(text))
        end = replace(END, failure=next(text), arrivals=[late])
        run = read_run(write(tmp_path / f"{number}.jsonl", steps, header, end))
        assert not run.notices
        return page([run, run], [next(text)])

    plain = Outline(told(0, "a", "b", "c", "d", "e", "f", "g"))
    for turn in range(len(HOSTILE)):
        hostile = told(turn + 1, *HOSTILE[turn:], *HOSTILE[:turn])
        outline = Outline(hostile)
        assert outline.tags == plain.tags
        assert len(hostile) < 100_000, "endless text is cut"
        hostile.encode()


def decoded(uri):
    """Return a picture's pixels as numbers of its palette."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        chunks[kind] = data[place + 8 : place + 8 + length]
        check = int.from_bytes(data[place + 8 + length : place + 12 + length], "big")
        assert check == zlib.crc32(kind + chunks[kind])
        place += 12 + length
    assert chunks[b"tRNS"] == b"\0", "what is blank is transparent"
    width, height = (int.from_bytes(chunks[b"IHDR"][n : n + 4], "big") for n in (0, 4))
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any() and rows.max() < len(chunks[b"PLTE"]) / 3
    return rows[:, 1:]


def test_heat_maps_show_each_gradient_in_its_workers_row_and_its_steps_column(tmp_path):
    told = figures(read_run(write(tmp_path / "record.jsonl")))
    verdicts = decoded(verdict_map(told).uri)
    height, width = verdicts.shape
    cells = verdicts[:: height // 2, :: width // 3]
    assert cells.tolist() == [[1, 1, 1], [32, 32, 33]]  # accepted; late, late, rejected
    heat = response_map(told)
    assert 0.6 < heat.low < 0.7 < 1.9 < heat.high < 2.1
    slow = decoded(heat.uri)[:: height // 2, :: width // 3].astype(int)
    assert slow[1, 0] == slow.max() and slow[1, 2] == slow.min() == 1 and (slow > 0).all()


def test_skipped_steps_are_blank(tmp_path):
    header, steps = played("backup:1", [[1.0], [4.5], [1.0]], 9)
    told = figures(read_run(write(tmp_path / "record.jsonl", steps, header)))
    cells = decoded(verdict_map(told).uri)
    cells = cells[:: cells.shape[0] // 3, :: cells.shape[1] // 9]
    assert cells[1].tolist() == [32, 0, 0, 0, 32, 0, 0, 0, 0]  # it went on at 4.5 s, and came at 9
    assert (cells[[0, 2]] == 1).all()


def long_run(workers, steps):
    """Return a run as columns, without a file."""
    rng = np.random.default_rng(0)
    opened_s = np.arange(steps) * 0.5
    worker = np.tile(np.arange(workers), steps)
    step = np.repeat(np.arange(steps), workers)
    spent_s = rng.exponential(0.05, len(step)) + 0.2
    verdict = (spent_s > 0.45).astype(np.int8)
    columns = {
        "opened_s": opened_s, "closed_s": opened_s + 0.45, "published_s": opened_s + 0.5,
        "reduce_s": np.full(steps, 0.02), "update_s": np.full(steps, 0.02), "publish_s": np.full(steps, 0.01),
        "target": np.full(steps, workers), "alive": np.full(steps, workers), "updated": np.ones(steps, int),
        "accepted": np.bincount(step[verdict == 0], minlength=steps), "samples_used": np.full(steps, 32 * workers),
    }  # fmt: skip
    gradients = {
        "step": step, "worker": worker, "sequence": step, "version": step, "verdict": verdict,
        "arrived_s": opened_s[step] + spent_s, "compute_s": spent_s, "data_s": 0 * spent_s,
        "loss": rng.random(len(step)), "samples": 0 * step + 32, "bytes": 0 * step + 10**7,
        "cost": rng.integers(1, 2000, len(step)), "own_samples": 0 * step + 32, "counted": verdict == 0,
    }  # fmt: skip
    hosts = [f"node{n:03}" for n in range(workers)]
    handed, used = [32 * steps] * workers, (32 * np.bincount(worker[verdict == 0], minlength=workers)).tolist()
    discarded = [all_ - own for all_, own in zip(handed, used, strict=True)]
    end = RunEnd(steps, "", [], handed, used, discarded, [0] * workers, peak_rss_bytes=[10**9] * (workers + 1))
    header = replace(TOLD, policy="backup:5", workers=workers, hosts=hosts, transports=["messages", "shared memory"])
    header = replace(header, transports=header.transports * (workers // 2))
    metrics = {"version": np.zeros(0, int), "value": np.zeros(0)}
    return Run("long.jsonl", header, 0, columns, gradients, metrics, end=end)


def test_a_pages_size_does_not_grow_with_the_run():
    short, long = (len(page([long_run(100, steps)])) for steps in (1_000, 5_000))
    assert long < 400_000 and long < 1.2 * short
    assert len(page([long_run(2_000, 50)])) < 800_000


def test_the_command(tmp_path, capsys):
    paths = [str(write(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")]
    out = tmp_path / "report.html"
    assert main.main(["report", *paths, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and f"{out}: " in printed.out
    assert out.read_text(encoding="utf-8") == page([read_run(path) for path in paths])


def test_what_can_be_shown_is_shown_and_the_rest_is_named(tmp_path, capsys):
    good, torn, bad = (tmp_path / name for name in ("good.jsonl", "torn.jsonl", "bad.jsonl"))
    for path in (good, torn):
        write(path)
    torn.write_bytes(torn.read_bytes()[:-9])
    bad.touch()
    out = tmp_path / "report.html"
    missing = str(tmp_path / "missing.jsonl")
    assert main.main(["report", str(good), str(bad), missing, str(torn), "--out", str(out)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["mpisync report"] * 3
    assert "bad.jsonl, line 1: the first line must be the run's, but is missing" in lines[0]
    assert "missing.jsonl" in lines[1] and "torn.jsonl, line 4: the line is torn" in lines[2]
    assert out.read_text(encoding="utf-8").count('class="notice"') == 3


def test_nothing_to_show_is_one_line_and_no_file(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text("Traceback\n")
    out = tmp_path / "report.html"
    assert main.main(["report", str(tmp_path / "bad.jsonl"), "--out", str(out)]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not out.exists()


def test_a_record_is_never_written_over(tmp_path, capsys):
    path = write(tmp_path / "record.jsonl")
    before = path.read_bytes()
    assert main.main(["report", str(path), "--out", str(path)]) == 1
    assert "would be lost" in capsys.readouterr().err and path.read_bytes() == before


# In a browser.

needs_browser = pytest.mark.skipif(browser.MISSING is not None, reason=str(browser.MISSING))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def several(tmp_path):
    return written(tmp_path, "several")


def written(tmp_path, name):
    out = tmp_path / f"{name}.html"
    out.write_text(pages(tmp_path)[name], encoding="utf-8")
    return out


@needs_browser
@pytest.mark.parametrize(("width", "columns"), [(390, 1), (1280, 2)])
@pytest.mark.parametrize("name", ["several", "told", "told beside"])
def test_it_fits_a_phone_and_uses_a_screen(chromium, tmp_path, name, width, columns):
    chromium.open(written(tmp_path, name), width=width)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    across = "getComputedStyle(document.querySelector('.grid.pairs')).gridTemplateColumns.split(' ').length"
    assert chromium.evaluate(across) == columns
    # Nothing is cut off but what can be scrolled.
    cut = (
        "[...document.querySelectorAll('.card:not(.wide), p, td, h2')]"
        ".filter(e => !e.closest('.wide') && e.scrollWidth > e.clientWidth + 1).length"
    )
    assert chromium.evaluate(cut) == 0
    letters = (
        "Math.min(...[...document.querySelectorAll('svg text')].map("
        "t => t.getBoundingClientRect().height))"
    )
    assert chromium.evaluate(letters) >= 9


@needs_browser
def test_it_fetches_nothing_and_runs_nothing(chromium, tmp_path, several):
    header = replace(
        TOLD, policy=HOSTILE[0], hosts=[HOSTILE[1], HOSTILE[2]], settings={HOSTILE[3]: HOSTILE[5]},
        command=["train.py", *HOSTILE], optimizer=HOSTILE[1], root_host=HOSTILE[2], versions={HOSTILE[0]: HOSTILE[3]},
    )  # fmt: skip
    end = replace(END, failure=HOSTILE[0])
    hostile = tmp_path / "hostile.html"
    hostile.write_text(page([read_run(write(tmp_path / "h.jsonl", STORY, header, end))]), encoding="utf-8")
    for path in (several, hostile):
        chromium.open(path)
        asked = [event["request"]["url"] for event in chromium.happened("Network.requestWillBeSent")]
        assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
        assert not chromium.happened("Runtime.exceptionThrown") and not chromium.happened("Log.entryAdded")
        assert chromium.evaluate("document.images.length && [...document.images].every(i => i.naturalWidth > 0)")
    assert chromium.evaluate("document.title").startswith("mpisync: </title><script>document.title=")
    assert chromium.evaluate("getComputedStyle(document.body).display") == "block"


@needs_browser
def test_it_is_dark_for_those_who_like_it_dark(chromium, several):
    def lightness():
        rgb = "getComputedStyle({}).{}.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
        return [
            chromium.evaluate(rgb.format(f"document.{element}", of))
            for element, of in (
                ("body", "backgroundColor"), ("body", "color"), ("querySelector('svg text')", "fill"),
            )
        ]  # fmt: skip

    chromium.open(several)
    ground, ink, text = lightness()
    assert ground > 700 and ink < 200 and text < 350
    chromium.open(several, dark=True)
    ground, ink, text = lightness()
    assert ground < 100 and ink > 600 and text > 450


@needs_browser
def test_it_prints_on_few_sheets(chromium, several):
    chromium.open(several, dark=True)
    printed = chromium.pdf()
    sheets = len(re.findall(rb"/Type\s*/Page\b", printed))
    assert 2 <= sheets <= 6


@needs_browser
def test_a_large_run_opens_without_a_stutter(chromium, tmp_path):
    out = tmp_path / "large.html"
    out.write_text(page([long_run(100, 2_000)]), encoding="utf-8")
    chromium.open(out)  # warm
    began_s = time.monotonic()
    chromium.open(out)
    chromium.evaluate("document.body.getBoundingClientRect().height")
    assert time.monotonic() - began_s < 3.0
    assert chromium.evaluate("document.querySelectorAll('*').length") < 3_000
    chromium.evaluate("document.querySelector('details').open = true; document.body.scrollHeight")
    assert chromium.evaluate("document.documentElement.scrollWidth") <= 1280
