"""Looks at a model: what reads its parameters for another purpose than a gradient.

Those are state_dict() of the model or of a part, deepcopy and pickle, a forward pass in evaluation or where gradients
are off, and any other access to a module's parameters where they are off. Who trains and does not look pays nothing: a
module asks a dict for its parameters in any case, and that dict tells.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn

_SAVES_STATE = nn.Module._save_to_state_dict.__code__
_MODULES = nn.Module._save_to_state_dict.__code__.co_filename
_CLIPS = inspect.unwrap(nn.utils.clip_grad_norm_).__code__.co_filename


class Looks:
    """A watch over a model that calls `look` before anybody looks, until it is undone.

    Args:
        model: It may be compiled.
        look: Makes the parameters fit to be seen. It is called at every look, more than once where a look is long, so
            it should return at once where they are.

    Example:
        >>> model, seen = nn.Linear(2, 1), []
        >>> looks = Looks(model, lambda: seen.append("a look"))
        >>> output = model(torch.zeros(1, 2))
        >>> seen
        []
        >>> state = model.state_dict()
        >>> seen
        ['a look']
        >>> looks.undo()
    """

    def __init__(self, model: nn.Module, look: Callable[[], None]) -> None:
        self._look, self._paused = look, 0
        self._model = getattr(model, "_orig_mod", model)  # what train() and eval() set, compiled or not
        self._modules = [m for m in self._model.modules() if any(p is not None for p in m._parameters.values())]
        for module in self._modules:
            module._parameters = _WatchedParameters(module._parameters, self)
        self._compiled = model if model is not self._model else None
        if self._compiled is not None:  # what was compiled asks no dict: look before it runs
            self._forward = vars(model)["forward"]
            vars(model)["forward"] = self._run_compiled

    def undo(self) -> None:
        """Leave the model as it was; a second call does no harm."""
        for module in self._modules:
            if type(module._parameters) is _WatchedParameters:
                module._parameters = module._parameters.plain()
        if self._compiled is not None:
            vars(self._compiled)["forward"] = self._forward
        self._modules, self._compiled = [], None

    def read(self, *, saving: bool = False) -> None:
        """Look, if reading parameters now is a look.

        Args:
            saving: Whether they are read to be saved or copied, which is a look at any time.
        """
        if self._paused:
            return
        if (saving or not torch.is_grad_enabled() or not self._model.training) and not torch.compiler.is_compiling():
            self._look()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Let parameters be read, for as long as the context lasts, without a look."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def _run_compiled(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (the model's own)
        self.read()
        return self._forward(*args, **kwargs)


@contextmanager
def unwatched(model: nn.Module) -> Iterator[None]:
    """Let a model, watched or not, be read without a look."""
    own = (module._parameters for module in model.modules())
    with ExitStack() as stack:
        for looks in {parameters.looks for parameters in own if isinstance(parameters, _WatchedParameters)}:
            stack.enter_context(looks.pause())
        yield


class _WatchedParameters(dict[str, "nn.Parameter | None"]):
    """A module's parameters, which tell when they are read; a copy or a pickle of them is a plain dict."""

    def __init__(self, parameters: dict[str, nn.Parameter | None], looks: Looks) -> None:
        super().__init__(parameters)
        self.looks = looks

    def __getitem__(self, name: str) -> nn.Parameter | None:
        self.looks.read()
        return super().__getitem__(name)

    def items(self) -> Any:  # noqa: ANN401 (a dict's views)
        # Here come state_dict() of any module, which is a look at any time, parameters() and zero_grad().
        reader: FrameType | None = sys._getframe(1)
        saves = reader is not None and reader.f_code is _SAVES_STATE
        if saves or not torch.is_grad_enabled():
            while reader is not None and reader.f_code.co_filename == _MODULES:
                reader = reader.f_back
            if reader is None or reader.f_code.co_filename != _CLIPS:  # that one reads gradients only
                self.looks.read(saving=saves)
        return super().items()

    def plain(self) -> dict[str, nn.Parameter | None]:
        """Return the parameters in a plain dict, without a look."""
        return dict(super().items())

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: ANN401 (as in object)
        self.looks.read(saving=True)
        return dict, (), None, None, iter(super().items())
