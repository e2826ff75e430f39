"""What no docstring holds: the commands' --help, the environment variables, and plain signatures and links."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from unittest import mock

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

from mpisync.commands.main import COMMANDS, build_parser
from mpisync.settings import SETTINGS

COLUMNS = 84  # of a help text: what a page shows without scrolling


def helps() -> Iterator[tuple[str, str, str]]:
    """Yield each command's name, its one-line summary and its --help."""
    # argparse asks the terminal for its width, and since Python 3.14 whether it has colours.
    with mock.patch.dict(os.environ, {"COLUMNS": str(COLUMNS), "NO_COLOR": "1"}):
        actions = build_parser()._subparsers._group_actions  # argparse has no public way to its subparsers
        parsers: dict[str, argparse.ArgumentParser] = actions[0].choices
        for command in COMMANDS:
            yield command.NAME, command.__doc__.partition("\n")[0], parsers[command.NAME].format_help()


def default_text(default: object) -> str:
    """Return a setting's default as one would write it into the environment."""
    if default is None:
        return "unset"
    return f"``{default:g}``" if isinstance(default, (bool, float)) else f"``{default}``"


class Commands(SphinxDirective):
    """A section for each command: its summary and what its --help prints."""

    def run(self) -> list[nodes.Node]:
        """Return the sections."""
        text = []
        for name, summary, help_text in helps():
            title = f"mpisync {name}"
            block = "\n".join(f"   {line}".rstrip() for line in help_text.splitlines())
            text.append(f"{title}\n{'-' * len(title)}\n\n{summary}\n\n.. code-block:: text\n\n{block}\n")
        return self.parse_text_to_nodes("\n".join(text), allow_section_headings=True)


class Settings(SphinxDirective):
    """A definition list of the environment variables."""

    def run(self) -> list[nodes.Node]:
        """Return the list."""
        text = []
        for setting in SETTINGS.values():
            text.append(f"``{setting.name}``, default {default_text(setting.default)}\n   {setting.help}\n")
        return self.parse_text_to_nodes("\n".join(text))


def link_by_last_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.reference | None:
    """Link `Policy`, `Policy.judge` and mpisync.policies.base.Policy to where the class is documented."""
    parts = node["reftarget"].split(".")
    class_at = next((place for place, part in enumerate(parts) if part[:1].isupper()), None)
    if node["refdomain"] != "py" or class_at is None:
        return None
    tail = "." + ".".join(parts[class_at:])
    objects = env.get_domain("py").objects.items()
    found = [(name, entry) for name, entry in objects if name.endswith(tail) and not entry.aliased]
    if len(found) != 1:
        return None
    (name, entry), here = found[0], node["refdoc"]
    return make_refnode(app.builder, here, entry.docname, entry.node_id, text, name)


def plain_signature(
    app: Sphinx, what: str, name: str, value: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    """Leave out of a signature what is no Python (a dataclass's <factory>) or says nothing (a protocol's)."""
    if getattr(value, "_is_protocol", False):
        return "", returns
    return (signature.replace("<factory>", "..."), returns) if signature else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx of what is here."""
    app.add_directive("mpisync-commands", Commands)
    app.add_directive("mpisync-settings", Settings)
    app.connect("autodoc-process-signature", plain_signature)
    app.connect("missing-reference", link_by_last_name)
    return {"parallel_read_safe": True}
