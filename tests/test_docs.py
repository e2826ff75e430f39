"""The reference: every public name is on a page and has an example, and the examples run."""

import doctest
import importlib
import inspect
import re
import subprocess
import sys
import zlib

import pytest
from launch import ROOT, run_script

import mpisync
from mpisync import settings
from mpisync.commands.main import COMMANDS

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.rst"))
# What the reference is of: all that these modules call public.
PLANNING = "laws composite empirical forms theory bounds simulation costs calibration learning scale".split()
MODULES = ["mpisync", "mpisync.policies", "mpisync.records", *(f"mpisync.planning.{name}" for name in PLANNING)]
# The examples of mpisync.policies, mpisync.records and mpisync.planning are run by the tests of those.
ALSO = ["aggregation.errors", "aggregation.verdict", "session.partial_reduce", "session.progress", "session.session"]
PUBLIC = [
    (module, name)
    for module in MODULES
    for name in importlib.import_module(module).__all__
    # those are on their pages under the names that a script uses
    if module not in ("mpisync.policies", "mpisync.records") or name not in mpisync.__all__
]
DIRECTIVE = re.compile(r"\.\. (currentmodule|py:module|automodule|py:data|auto\w+):: ([\w.]+)")


def on_pages():
    """Return the full names that the pages' directives describe, as Sphinx will understand them."""
    names, module = set(), ""
    for page in PAGES:
        lines = page.read_text().splitlines()
        for line, option in zip(lines, [*lines[1:], ""], strict=True):
            if not (found := DIRECTIVE.match(line)):
                continue
            kind, name = found.groups()
            if kind in ("currentmodule", "py:module", "automodule"):
                module = name
                if option.strip() == ":members:":
                    names.update(f"{module}.{each}" for each in importlib.import_module(module).__all__)
            else:
                names.add(name if name.startswith("mpisync.") else f"{module}.{name}")
    return names


def test_every_public_name_is_on_a_page():
    assert {f"{module}.{name}" for module, name in PUBLIC} - on_pages() == set()


def test_what_the_pages_describe_exists():
    for name in on_pages():
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def has_example(module, name):
    """Say whether a class or function has one in its docstring, and a plain value one on its page."""
    value = getattr(importlib.import_module(module), name)
    if inspect.isclass(value) or inspect.isfunction(value):
        return ">>> " in (value.__doc__ or "")
    lines = [line for page in PAGES for line in page.read_text().splitlines()]
    return any(re.search(rf">>> .*\b{name}\b", line) for line in lines)


def test_every_public_name_has_an_example():
    assert [f"{module}.{name}" for module, name in PUBLIC if not has_example(module, name)] == []


@pytest.mark.parametrize(("face", "page"), [("Session", "session.rst"), ("PartialReduce", "partial_reduce.py")])
def test_every_method_is_in_an_example(face, page):
    face = getattr(mpisync, face)
    text = (DOCS / page).read_text() + face.__doc__
    methods = [name for name in vars(face) if not name.startswith("_")]
    assert methods and [name for name in methods if f".{name}" not in text] == []


@pytest.mark.parametrize("name", ALSO)
def test_the_examples_in_docstrings_run(name):
    results = doctest.testmod(importlib.import_module(f"mpisync.{name}"))
    assert results.attempted and not results.failed


@pytest.mark.parametrize("page", [page for page in PAGES if ">>> " in page.read_text()], ids=lambda page: page.stem)
def test_the_examples_on_pages_run(page):
    results = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert results.attempted and not results.failed


def test_the_script_on_a_page_prints_what_the_page_says():
    run = run_script(4, DOCS / "partial_reduce.py")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["[1. 2. 3.]"] * 4
    assert "   [1. 2. 3.]\n" in (DOCS / "partial-reduce.rst").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the reference as `make docs` does; where Sphinx is not installed there is none."""
    for name in ("sphinx", "furo"):
        pytest.importorskip(name, reason="Sphinx and Furo build the reference: make docs")
    folder = tmp_path_factory.mktemp("reference")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", "-d", folder / "trees"]
    run = subprocess.run([*command, DOCS, folder / "site"], capture_output=True, text=True, timeout=110)
    assert run.returncode == 0, run.stderr
    return folder / "site"


@pytest.mark.long
def test_the_built_pages_have_every_public_name(site):
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    built = {line.split()[0] for line in inventory.splitlines()}
    assert {f"{module}.{name}" for module, name in PUBLIC} - built == set()


@pytest.mark.long
def test_the_built_pages_show_every_command_and_setting(site):
    page = (site / "commands.html").read_text()
    assert [command.NAME for command in COMMANDS if f"usage: mpisync {command.NAME} [-h]" not in page] == []
    page = (site / "settings.html").read_text()
    assert [name for name in settings.SETTINGS if name not in page] == []


@pytest.mark.long
def test_the_built_pages_fetch_nothing(site):
    for page in site.rglob("*.html"):
        assert re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', page.read_text()) == []
    for style in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text()) == []
