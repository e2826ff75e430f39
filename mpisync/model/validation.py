"""The refusals of a session: what it cannot train, by name and with what to do instead, before it allocates memory."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer, SparseAdam

from mpisync.kernels.dtypes import DTYPES
from mpisync.model.optimizer_traps import check_mode
from mpisync.model.signature import plain_name

# By name: importing torch.distributed's classes takes seconds, and whoever wraps has done it.
WRAPPERS = {
    "DistributedDataParallel": "pass model.module: the session averages the gradients itself",
    "FullyShardedDataParallel": "pass a whole model: every worker needs all parameters",
    "FSDPModule": "pass a model without fully_shard: every worker needs all parameters",
}


def check_model_and_optimizers(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raise TypeError or ValueError for a model or an optimizer that a session cannot train."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    _check_modules(model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for name, parameter in model.named_parameters():
        _check_tensor(f"parameter {plain_name(name)!r}", parameter, device)
        _check_parameter(f"parameter {plain_name(name)!r}", parameter)
    for name, buffer in model.named_buffers():
        _check_tensor(f"buffer {plain_name(name)!r}", buffer, device)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no trainable parameters: none has requires_grad=True")
    if not optimizers:
        raise ValueError("optimizer must be a torch.optim.Optimizer, or a list of one or more, not an empty list")
    for optimizer in optimizers:
        _check_optimizer(model, optimizer)
    _check_disjoint(model, optimizers)


def _check_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"module {plain_name(name)!r}" if name else "the model"
        for kind in type(module).__mro__:
            if kind.__name__ in WRAPPERS and kind.__module__.startswith("torch."):
                raise TypeError(f"{where} is a {kind.__name__}: {WRAPPERS[kind.__name__]}")
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{where} is a torch.jit.{type(module).__name__}, whose parts cannot be reached from Python: pass the "
                "module that it was made from (torch.compile may wrap it), and script or trace the trained one"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise TypeError(
                f"{where} is an {type(module).__name__}(sparse=True): sparse gradients are not "
                "supported; use sparse=False"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise TypeError(
                f"{where} is an {type(module).__name__}(max_norm={module.max_norm:g}), which rescales its weight in "
                "forward, on a worker, where that is lost: use max_norm=None, and rescale in a hook, which the root "
                "runs after every update: optimizer.register_step_post_hook(lambda *_: "
                f"embedding.weight.data.renorm_({module.norm_type:g}, 0, {module.max_norm:g}))"
            )


def _check_tensor(what: str, tensor: Tensor, device: torch.device) -> None:
    if is_lazy(tensor):
        raise ValueError(
            f"{what} is not initialised: run one forward pass (model(x)) before Session, on "
            "every rank, and make the optimizer after it"
        )
    if tensor.is_meta:
        raise ValueError(
            f"{what} is on the meta device and has no values: call model.to_empty(device='cpu') "
            "and initialise it before Session"
        )
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{what} is on {tensor.device}: models train on the CPU or on a CUDA card; use model.cpu()")
    if tensor.device != device:
        raise ValueError(
            f"{what} is on {tensor.device} and others of the model are on {device}: its gradients travel in one "
            f"memory, so put the whole model on one device, as model.to({str(device)!r}) does, before Session"
        )


def _check_parameter(what: str, parameter: Tensor) -> None:
    if nn.Parameter not in type(parameter).__mro__:
        # Parameters of tensor subclasses have the subclass's type.
        raise TypeError(
            f"{what} is a {type(parameter).__name__}: sharded and other special tensors are not "
            "supported; pass a model of plain parameters"
        )
    if parameter.layout is not torch.strided:
        raise TypeError(f"{what} is sparse ({parameter.layout}): make it dense")
    name = str(parameter.dtype).removeprefix("torch.")
    if parameter.requires_grad and name not in DTYPES:
        raise TypeError(f"{what} is {name}: use one of {', '.join(DTYPES)}")


def _check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, or a list of them, not {type(optimizer).__name__}"
        )
    name = type(optimizer).__name__
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise TypeError(f"{name} has no param_groups, so the session cannot see what it trains: give it those of "
                        "torch.optim.Optimizer, or of the optimizer that it wraps")
    if _needs_closure(optimizer):  # LBFGS does
        raise TypeError(
            f"{name} evaluates the loss again in every step (it needs a closure), which the root "
            "cannot: use an optimizer that steps from gradients alone, such as SGD or AdamW"
        )
    if isinstance(optimizer, SparseAdam):
        raise TypeError(f"{name} needs sparse gradients, which are not supported: use Adam")
    check_mode(optimizer)
    known = {id(parameter) for parameter in model.parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in known:
                raise ValueError(
                    f"param_groups[{index}]['params'][{position}], {list(parameter.shape)}, is not "
                    "a parameter of the model: make the optimizer from this model's parameters"
                )


def _check_disjoint(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    owners: dict[int, int] = {}
    for index, optimizer in enumerate(optimizers):
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            owner = owners.setdefault(id(parameter), index)
            if owner != index:
                raise ValueError(
                    f"parameter {names[id(parameter)]!r} is in two optimizers, optimizer[{owner}] "
                    f"({type(optimizers[owner]).__name__}) and optimizer[{index}] ({type(optimizer).__name__}), and "
                    "each would update it: give each parameter to one"
                )


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
