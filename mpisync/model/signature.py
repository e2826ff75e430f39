"""The signature of a model's structure, which must match between ranks: a canonical form, and a comparison."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Entry = dict[str, Any]


def plain_name(name: str) -> str:
    """Return a tensor's name without what torch.compile puts into it."""
    # The root does not train, so a script may compile on the workers only.
    return name.replace("_orig_mod.", "")


def describe(shape: Sequence[int], dtype: torch.dtype | str) -> str:
    """Say a tensor's shape and dtype: '[10, 64] float32'."""
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def signature(model: nn.Module, strides: dict[str, tuple[int, ...]]) -> bytes:
    """Describe the model's parameters and buffers as canonical JSON.

    Args:
        model: The model; its values do not matter.
        strides: Memory layout of each parameter that travels.
    """
    entries = []
    for name, parameter in model.named_parameters():
        entry = _entry("parameter", name, parameter)
        entry["trained"] = parameter.requires_grad
        entry["stride"] = list(strides.get(name, ()))
        entries.append(entry)
    entries += [_entry("buffer", name, buffer) for name, buffer in model.named_buffers()]
    return json.dumps(entries, separators=(",", ":"), sort_keys=True).encode()


def _entry(kind: str, name: str, tensor: Tensor) -> Entry:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"kind": kind, "name": plain_name(name), "shape": list(tensor.shape), "dtype": dtype}


def difference(root: bytes, here: bytes) -> str | None:
    """Say where two signatures first differ, or None if they do not."""
    if root == here:
        return None
    roots, mine = json.loads(root), json.loads(here)
    for theirs, ours in zip(roots, mine, strict=False):
        if theirs != ours:
            return _one_difference(theirs, ours, roots, mine)
    if len(roots) > len(mine):
        return f"{_name(roots[len(mine)])} is on the root and not here"
    return f"{_name(mine[len(roots)])} is here and not on the root"


def _one_difference(theirs: Entry, ours: Entry, roots: list[Entry], mine: list[Entry]) -> str:
    if _name(theirs) != _name(ours):
        if _name(theirs) not in map(_name, mine):
            return f"{_name(theirs)} is on the root and not here"
        if _name(ours) not in map(_name, roots):
            return f"{_name(ours)} is here and not on the root"
        return f"{_name(theirs)} on the root comes where {_name(ours)} comes here"
    name = _name(ours)
    if (theirs["shape"], theirs["dtype"]) != (ours["shape"], ours["dtype"]):
        return (
            f"{name} is {describe(theirs['shape'], theirs['dtype'])} on the root "
            f"and {describe(ours['shape'], ours['dtype'])} here"
        )
    if theirs["trained"] != ours["trained"]:
        words = {True: "trained", False: "frozen"}
        return f"{name} is {words[theirs['trained']]} on the root and {words[ours['trained']]} here"
    return (
        f"{name} has strides {theirs['stride']} on the root and {ours['stride']} here "
        "(another memory format)"
    )


def _name(entry: Entry) -> str:
    return f"{entry['kind']} '{entry['name']}'"
