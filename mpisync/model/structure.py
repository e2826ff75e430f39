"""A watch for models whose parameters, modules or buffers became others than those that the session knows."""

from __future__ import annotations

from torch import Tensor, nn

from mpisync.model.signature import describe, plain_name

_TURNS = 16  # steps within which every module is looked at
_EVERY = 4  # how many steps pass from one look to the next
_LEAST = 8  # modules at a look: of a small model all
_PATTERNS = 64  # a model whose gradients come in more different sets has them in any
_CURE = (
    "a session trains the parameters that the model had when it began. Replace, add, remove, tie and untie modules and "
    "parameters before Session, on every rank (load_state_dict(..., assign=True) replaces them too: load before, or "
    "without assign)"
)


class StructureWatch:
    """A watch for parameters that nobody would train and for buffers that would not travel.

    All is looked at where the set of parameters that have a gradient was not seen before, as at the first step and
    where one is replaced; else a part of the modules at each step, in turn.

    Args:
        model: The session's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = _parameters(model)
        self._known = {id(parameter) for parameter in self._parameters.values()}
        self._first = list(model.modules())  # kept, so that an id means the same for ever
        self._buffers = {(id(module), name) for module in self._first for name in _buffers(module)}
        self._seen: set[bytes] = set()
        self._learn()

    def _learn(self) -> None:
        self._modules = list(self._model.modules())
        self._outlines = [_outline(module) for module in self._modules]
        self._share, self._next, self._calls = max(_LEAST, -(-_EVERY * len(self._modules) // _TURNS)), 0, 0

    def check(self, presence: bytes = b"") -> None:
        """Look at some modules, or at all; raise RuntimeError as `examine` does.

        Args:
            presence: Which parameters have a gradient.
        """
        if presence not in self._seen and len(self._seen) < _PATTERNS:
            self._seen.add(presence)
            self.examine()
            return
        self._calls += 1
        if self._calls % _EVERY:
            return
        first, self._next = self._next, self._next + self._share
        for index, module in enumerate(self._modules[first : self._next], first):
            if _outline(module) != self._outlines[index]:
                self.examine()
                return
        if self._next >= len(self._modules):
            self._next = 0

    def examine(self) -> None:
        """Raise RuntimeError naming a parameter or buffer that is new, replaced or gone.

        Other names for what is known, and buffers that are not persistent, which are caches, are none of them.
        """
        now = _parameters(self._model)
        for name, parameter in now.items():
            if id(parameter) not in self._known:
                what = "was replaced by another" if name in self._parameters else "is new"
                raise RuntimeError(
                    f"parameter {name!r} {what} since the session began, and would not be trained: {_CURE}"
                )
        in_place = {id(parameter) for name, parameter in now.items() if self._parameters.get(name) is parameter}
        for name, parameter in self._parameters.items():
            if id(parameter) not in in_place:
                what = "was replaced by another" if name in now else "is no longer a part of the model"
                raise RuntimeError(
                    f"parameter {name!r} {what}, which it was when the session began: {_CURE}. One that has no "
                    "gradient any more is left as it is"
                )
        for prefix, module in self._model.named_modules():
            for name, buffer in _buffers(module).items():
                if (id(module), name) not in self._buffers:
                    full = plain_name(f"{prefix}.{name}" if prefix else name)
                    now_is = describe(buffer.shape, buffer.dtype)
                    raise RuntimeError(
                        f"buffer {full!r} was not there when the session began and is {now_is} now: it would be this "
                        "rank's alone. Run one forward pass (model(x)) before Session, on every "
                        "rank, so that it is there; or register it with persistent=False if it is a cache, which every "
                        "rank may have for itself"
                    )
        self._learn()


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    named = model.named_parameters(remove_duplicate=False)
    return {plain_name(name): parameter for name, parameter in named}


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own persistent buffers."""
    caches = module._non_persistent_buffers_set
    return {name: buffer for name, buffer in module._buffers.items() if buffer is not None and name not in caches}


def _outline(module: nn.Module) -> tuple[object, ...]:
    """Return what changes when a module is given another parameter, module or buffer."""
    return (
        *map(id, module._parameters.values()),
        *map(id, module._modules.values()),
        *[name for name, buffer in module._buffers.items() if buffer is not None],
    )
