"""Idioms of public training scripts: with all workers they do what one process does on the union of the batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.nn.utils import parametrizations, rnn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint
from training import WORKERS, sgd

import mpisync
from mpisync.data.seeds import Stream, seed_everything

STEPS = 6
DRAWN = torch.Generator().manual_seed(1)
BATCHES = [(torch.randn(4, 6, generator=DRAWN).double(), torch.randint(3, (4,), generator=DRAWN)) for _ in range(12)]


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def backward(model, x, y, version):
    F.cross_entropy(model(x), y).backward()


class Idiom(NamedTuple):
    """A script in short: what it trains, with which optimizer, and how a batch leaves gradients."""

    make: Callable[[], nn.Module] = mlp
    compute: Callable[..., Any] = backward  # (model, x, y, version)
    optimizer: Callable[[nn.Module], optim.Optimizer] = sgd
    scheduler: Callable[[optim.Optimizer], Any] | None = None
    prepare: Callable[[nn.Module, optim.Optimizer], Any] = lambda model, optimizer: None
    within: float = 1e-6  # what a 16-bit mean rounds apart

    def begin(self):
        """Return model, optimizer and scheduler, the same on every rank."""
        torch.manual_seed(0)
        model = self.make()
        optimizer = self.optimizer(model)
        scheduler = self.scheduler and self.scheduler(optimizer)
        self.prepare(model, optimizer)
        return model, optimizer, scheduler


# -- the models -------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.reentrant = reentrant
        self.double()

    def forward(self, x):
        def block(h):
            return F.dropout(torch.tanh(self.middle(h)), 0.3)

        return self.last(checkpoint(block, self.first(x), use_reentrant=self.reentrant))


class Packed(nn.Module):
    """A bidirectional LSTM over sequences of several lengths."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.last = nn.Linear(10, 3)
        self.double()

    def forward(self, x):
        rows = x[:, None].repeat(1, 4, 1)
        packed = rnn.pack_padded_sequence(rows, [4, 2, 3, 1], batch_first=True, enforce_sorted=False)
        padded, _ = rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.last(padded.sum(1))


class OddParameters(nn.Module):
    """Parameters in lists and dicts: a scalar, an empty one, an expanded one, one with gaps."""

    def __init__(self):
        super().__init__()
        self.list = nn.ParameterList([torch.randn(6, 4), torch.randn(4, 3)])
        self.dict = nn.ParameterDict(
            {
                "scalar": nn.Parameter(torch.tensor(1.0)),
                "empty": nn.Parameter(torch.empty(0, 3)),
                "expanded": nn.Parameter(torch.zeros(1).expand(3).double()),
                "gaps": nn.Parameter(torch.randn(4, 9).double()[:, ::3]),
            }
        )
        self.double()

    def forward(self, x):
        a, b = self.list
        rest = self.dict["empty"].sum() + self.dict["expanded"].clone() + self.dict["gaps"].sum(0)
        return x @ a @ b * self.dict["scalar"] + rest


class ChannelsLast(nn.Module):
    """Convolutions in another memory format, and a norm whose statistics are cumulative means."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 2), nn.Conv2d(4, 4, 2)
        self.norm, self.last = nn.BatchNorm2d(4, momentum=None), nn.Linear(4, 3)
        self.double()
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        image = x.view(-1, 1, 2, 3).repeat(1, 1, 2, 1)
        return self.last(self.norm(self.second(self.first(image))).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 8), nn.Linear(8, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, x):
        return self.head(self.embedding(x.abs().long().clamp(max=5)).sum(1))


class Adapter(nn.Module):
    """A frozen base and low-rank factors beside it."""

    def __init__(self):
        super().__init__()
        self.base = mlp().requires_grad_(False)
        self.down = nn.Parameter(torch.randn(6, 2).double())
        self.up = nn.Parameter(torch.zeros(2, 3).double())

    def forward(self, x):
        return self.base(x) + x @ self.down @ self.up


class Parametrized(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = parametrizations.orthogonal(nn.Linear(6, 6))
        self.middle = parametrizations.weight_norm(nn.Linear(6, 8))
        self.last = parametrizations.spectral_norm(nn.Linear(8, 3))
        self.double()

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


class MixedDtypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8).bfloat16(), nn.Linear(8, 8).half(), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.middle(self.first(x.bfloat16()).half()).float())


# -- the ways to a gradient -------------------------------------------------------------------------


def in_autocast(model, x, y, version):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x.float()), y)
    loss.backward()


def functional(model, x, y, version):
    def loss(values):
        return F.cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    gradients = torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name]


def clipped_by_sample(model, x, y, version):
    def loss(values, row, target):
        return F.cross_entropy(torch.func.functional_call(model, values, (row[None],)), target[None])

    values = {name: p.detach() for name, p in model.named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(values, x, y)
    norms = sum(g.flatten(1).square().sum(1) for g in each.values()).sqrt().clamp(min=1.0)
    for name, parameter in model.named_parameters():
        parameter.grad = (each[name] / norms.view(-1, *[1] * parameter.dim())).mean(0)


def to_some_inputs(model, x, y, version):
    F.cross_entropy(model(x), y).backward(inputs=list(model[0].parameters()))


def assigned(model, x, y, version):
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.t().contiguous().t()


def backward_twice(model, x, y, version):
    out = model(x)
    F.cross_entropy(out, y).backward(retain_graph=True)
    (0.1 * out.square().mean()).backward()


def gradient_penalty(model, x, y, version):
    x = x.clone().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (F.cross_entropy(out, y) + (slope.norm(2, 1) - 1).square().mean()).backward()


def inner_loop(model, x, y, version):
    """Second-order meta-learning: the gradient through a step of the gradient."""
    slow = dict(model.named_parameters())
    loss = F.cross_entropy(torch.func.functional_call(model, slow, (x[:2],)), y[:2])
    gradients = torch.autograd.grad(loss, list(slow.values()), create_graph=True)
    fast = {name: p - 0.1 * g for (name, p), g in zip(slow.items(), gradients, strict=True)}
    F.cross_entropy(torch.func.functional_call(model, fast, (x[2:],)), y[2:]).backward()


def unused_by_some(model, x, y, version):
    hidden = model[0](x)
    F.cross_entropy(model[2](model[1](hidden) if y[0] else hidden.detach()), y).backward()


def noisy(model, x, y, version):
    backward(model, x, y, version)
    for parameter in model.parameters():
        parameter.grad.add_(torch.randn_like(parameter), alpha=0.01)


def with_dropout(model, x, y, version):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        torch.randn(3)
    F.cross_entropy(F.dropout(model(x), 0.5), y, label_smoothing=0.1).backward()


def halves_in_turn(model, x, y, version):
    model[0].requires_grad_(version % 2 == 1)
    model[2].requires_grad_(version % 2 == 0)
    backward(model, x, y, version)


def tempered(model, x, y, version):
    F.cross_entropy(model(x) / (1 + version), y).backward()


def in_anomaly_mode(model, x, y, version):
    with torch.autograd.set_detect_anomaly(True):
        backward(model, x, y, version)


def evaluated_norm(model, x, y, version):
    model.norm.eval()
    backward(model, x, y, version)


# -- what is set up beforehand ----------------------------------------------------------------------


def hooks_on_gradients(model, optimizer):
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))


def hooks_after_accumulation(model, optimizer):
    def halve(parameter):
        parameter.grad.mul_(0.5)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(halve)


def hook_on_a_module(model, optimizer):
    model[2].register_full_backward_hook(lambda module, into, out: (into[0] * 0.5,))


def hook_before_steps(model, optimizer):
    def clamp(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.clamp_(-0.01, 0.01)

    optimizer.register_step_pre_hook(clamp)


def a_gradient_is_left(model, optimizer):
    """A look whether a pass works at all, or a search for a learning rate."""
    backward(model, *BATCHES[5], 0)


def plain(model):
    return optim.SGD(model.parameters(), 0.1)


IDIOMS = {
    "checkpoint, reentrant": Idiom(lambda: Checkpointed(True)),
    "checkpoint": Idiom(lambda: Checkpointed(False)),
    "autocast": Idiom(lambda: mlp().float(), in_autocast),
    "compiled": Idiom(lambda: torch.compile(mlp(), backend="aot_eager")),
    "traced graph": Idiom(lambda: torch.fx.symbolic_trace(mlp())),
    "packed sequences": Idiom(Packed),
    "odd parameters": Idiom(OddParameters),
    "channels_last, cumulative norm": Idiom(ChannelsLast),
    "norm in eval mode": Idiom(ChannelsLast, evaluated_norm),
    "tied embedding": Idiom(Tied),
    "adapter": Idiom(Adapter, optimizer=lambda m: optim.AdamW([m.down, m.up])),
    "parametrizations": Idiom(Parametrized),
    "three dtypes": Idiom(MixedDtypes, optimizer=plain, within=2e-2),
    "torch.func": Idiom(compute=functional),
    "clipping by sample": Idiom(compute=clipped_by_sample),
    "backward(inputs=)": Idiom(compute=to_some_inputs),
    "assigned gradients": Idiom(compute=assigned),
    "two backwards": Idiom(compute=backward_twice),
    "gradient penalty": Idiom(compute=gradient_penalty),
    "inner loop": Idiom(compute=inner_loop),
    "unused by some": Idiom(compute=unused_by_some),
    "gradient noise": Idiom(compute=noisy),
    "dropout": Idiom(compute=with_dropout),
    "halves in turn": Idiom(compute=halves_in_turn),
    "follows the version": Idiom(compute=tempered),
    "anomaly mode": Idiom(compute=in_anomaly_mode),
    "hooks on gradients": Idiom(prepare=hooks_on_gradients),
    "hooks after accumulation": Idiom(prepare=hooks_after_accumulation),
    "hook on a module": Idiom(prepare=hook_on_a_module),
    "hook before steps": Idiom(prepare=hook_before_steps, optimizer=plain),
    "a gradient is left": Idiom(prepare=a_gradient_is_left),
    "maximize": Idiom(optimizer=lambda m: optim.SGD(m.parameters(), 0.01, maximize=True)),
    "fused": Idiom(optimizer=lambda m: optim.AdamW(m.parameters(), fused=True)),
    "rate in a tensor": Idiom(optimizer=lambda m: optim.Adam(m.parameters(), lr=torch.tensor(0.01))),
    "groups": Idiom(
        optimizer=lambda m: optim.SGD(
            [{"params": m[0].parameters(), "lr": 0.2}, {"params": m[2].parameters(), "weight_decay": 0.1}], lr=0.1
        )
    ),
    "warm-up": Idiom(scheduler=lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 4))),
    "one cycle": Idiom(scheduler=lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=20)),
    "cyclic": Idiom(scheduler=lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2)),
    "sequential": Idiom(
        scheduler=lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
        )
    ),
    "chained": Idiom(
        scheduler=lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
        )
    ),
    "warm restarts": Idiom(scheduler=lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3)),
}


def in_one_process(idiom, workers):
    """Train on the union: each update from the mean of what every worker's batch leaves at the same parameters."""
    model, optimizer, scheduler = idiom.begin()
    for step in range(STEPS):
        optimizer.zero_grad()
        before, left = [b.clone() for b in model.buffers()], []
        sums: list[torch.Tensor | None] = [None for _ in model.parameters()]
        for worker in range(workers):
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)
            share = BATCHES[worker::workers]
            seed_everything(0, worker, step, Stream.LOOP)
            idiom.compute(model, *share[step % len(share)], step)
            left.append([b.clone() for b in model.buffers()])
            for index, parameter in enumerate(model.parameters()):
                if parameter.grad is not None:
                    total = sums[index]
                    sums[index] = parameter.grad.clone() if total is None else total + parameter.grad
                    parameter.grad = None
        for buffer, *values in zip(model.buffers(), *left, strict=True):
            buffer.copy_(sum(values) / workers if buffer.is_floating_point() else values[0])
        for parameter, total in zip(model.parameters(), sums, strict=True):
            parameter.grad = None if total is None else total / workers
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return model


def in_a_session(comm, idiom, **options):
    """Train as a user's script does; the model at its end."""
    model, optimizer, scheduler = idiom.begin()
    with mpisync.Session(comm, model, optimizer, scheduler=scheduler, progress=False, **options) as session:
        for x, y in session.batches(BATCHES, steps=STEPS):
            idiom.compute(model, x, y, session.version)
            session.step()
    return model


def check_equal(comm, idiom, **options):
    model = in_a_session(comm, idiom, policy=mpisync.BackupWorkers(0), **options)
    expected = in_one_process(idiom, max(1, comm.size - 1))
    untouched = idiom.begin()[0].state_dict()
    moved = [not torch.equal(value, untouched[name]) for name, value in expected.state_dict().items()]
    assert any(moved), "the script trains something"
    for (name, one), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(
            one, other, rtol=idiom.within, atol=idiom.within, msg=lambda text, at=name: f"{at}: {text}"
        )


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("name", IDIOMS)
def test_it_trains_as_one_process_does(comm, name):
    check_equal(comm, IDIOMS[name])


OF_THE_TRANSPORT = [
    "checkpoint",
    "odd parameters",
    "three dtypes",
    "unused by some",
    "a gradient is left",
    "parametrizations",
]


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("name", OF_THE_TRANSPORT)
@pytest.mark.parametrize(("transport", "own_copy"), [("messages", False), ("shared", True)])
def test_it_does_so_over_messages_and_with_copies_too(comm, monkeypatch, name, transport, own_copy):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    check_equal(comm, IDIOMS[name], own_copy=own_copy)


@pytest.mark.parametrize(
    "name", ["checkpoint", "odd parameters", "a gradient is left", "one cycle", "clipping by sample"]
)
def test_it_does_so_alone(name):
    from mpi4py import MPI

    check_equal(MPI.COMM_SELF, IDIOMS[name])
