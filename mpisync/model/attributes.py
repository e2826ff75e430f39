"""The plain attributes of a module: what it holds beside parameters, buffers and modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from mpisync.model.signature import plain_name

_MODULES_OWN = frozenset(vars(nn.Module()))


def attributes(model: nn.Module) -> Iterator[tuple[str, nn.Module, object]]:
    """Yield what modules hold in plain attributes: its path, the module, and the object.

    Lists, tuples, sets and dicts are gone into; other objects are taken as they are.
    """
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in _MODULES_OWN}
        for path, value in inside(own):
            yield plain_name(f"{name}.{path}" if name else path), module, value


def inside(holder: dict[str, object]) -> Iterator[tuple[str, object]]:
    """Yield what a dict of attributes holds, in nested containers too, each with its path."""
    open_, seen = list(reversed(holder.items())), set[int]()
    while open_:
        path, value = open_.pop()
        items: Iterable[tuple[object, object]]
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list | tuple | set | frozenset):
            items = enumerate(value)
        else:
            yield path, value
            continue
        if id(value) not in seen:
            seen.add(id(value))
            open_ += reversed([(f"{path}[{_shown(key)}]", one) for key, one in items])


def _shown(key: object) -> str:
    return repr(key) if isinstance(key, str | int) else type(key).__name__
