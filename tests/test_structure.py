"""Models that change after the session has begun: what would not be trained is named, what may change goes on."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from training import WORKERS, fails_everywhere, flat, new_model, on_all, on_union, sgd

import mpisync
from mpisync.model.flat import FlatModel
from mpisync.model.structure import StructureWatch

BATCHES = [
    (torch.randn(4, 6, generator=torch.Generator().manual_seed(n)).double(), torch.tensor([0, 1, 2, n % 3]))
    for n in range(8)
]
ALL = mpisync.BackupWorkers(0)


def run(comm, model, change, optimizer=None, steps=8, **more):
    """Train by an ordinary loop, and call change(model, version) before each batch."""
    optimizer = sgd(model) if optimizer is None else optimizer
    with mpisync.Session(comm, model, optimizer, policy=ALL, progress=False, **more) as session:
        for x, y in session.batches(BATCHES, steps=steps):
            change(model, session.version)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            session.step(loss)
    return session


def reference(model, change, optimizer, steps=8, workers=WORKERS):
    """The same in one process, on the union of the workers' batches."""

    def loss_of(model, x, y):
        return F.cross_entropy(model(x), y)

    on_union(model, optimizer, BATCHES, loss_of, workers=workers, steps=range(steps), before=change)


def replace_head(model):
    model[2] = nn.Linear(8, 3).double()


def assign(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def set_weight(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def add_layer(model):
    model.add_module("extra", nn.Linear(3, 3).double())


def add_to_a_part(model):
    model[0].register_parameter("gain", nn.Parameter(torch.ones(())))


def remove_layer(model):
    model[2] = nn.Flatten(0, 0)


def tie(model):
    model[2].bias = model[0].bias


def parametrized(model):
    parametrize.register_parametrization(model[0], "weight", nn.Identity())


def mask(model):
    model[2].register_buffer("mask", torch.ones(3))


CHANGES = {
    replace_head: "parameter '2.weight' was replaced by another",
    assign: "parameter '0.weight' was replaced by another",
    set_weight: "parameter '0.weight' was replaced by another",
    add_layer: "parameter 'extra.weight' is new",
    add_to_a_part: "parameter '0.gain' is new",
    remove_layer: "parameter '2.weight' is no longer a part of the model",
    parametrized: "parameter '0.weight' is no longer a part of the model",
    tie: "parameter '2.bias' was replaced by another",
    mask: r"buffer '2.mask' was not there .* is \[3\] float32 now",
}


class Wide(nn.Module):
    """More modules than are looked at in one step."""

    def __init__(self, part):
        super().__init__()
        self.more = nn.ModuleList(nn.Linear(1, 1) for _ in range(40))
        self.part = part


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("wrap", [lambda model: model, Wide])
def test_a_change_is_named_within_a_few_steps_though_gradients_show_nothing(change, wrap):
    model = new_model()
    watch = StructureWatch(wrap(model))
    for _ in range(50):
        watch.check(b"\1")
    change(model)
    with pytest.raises(RuntimeError, match=CHANGES[change].replace(" '", r" '(part\.)?")):
        for _ in range(16):
            watch.check(b"\1")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_it_is_named_at_once_where_another_set_of_parameters_has_gradients(change):
    model = new_model()
    watch = StructureWatch(Wide(model))
    watch.check(b"\1\1")
    change(model)
    with pytest.raises(RuntimeError, match=CHANGES[change].replace(" '", r" '(part\.)?")):
        watch.check(b"\1\0")


def test_an_untied_parameter_is_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    watch = StructureWatch(model)
    watch.examine()
    model[1].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"parameter '1.weight' was replaced"):
        watch.examine()


def test_what_is_put_back_or_has_another_name_as_well_is_no_change():
    model = new_model(norm=True)
    watch = StructureWatch(model)
    watch.check()
    state = {name: value.clone() for name, value in model.named_parameters()}
    torch.func.functional_call(model, state, (BATCHES[0][0],))
    model.active = model[0]  # as models do that remember the layer they use
    model.cache = nn.Flatten()
    model[0].register_buffer("cos", torch.ones(3), persistent=False)
    model.eval()
    model[1].track_running_stats = False
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    for _ in range(40):
        watch.check()
    model.active = model[3]
    for _ in range(40):
        watch.check()


def test_a_step_looks_at_few_modules(monkeypatch):
    from mpisync.model import structure

    looked = []
    outline = structure._outline
    watch = StructureWatch(nn.Sequential(*(nn.Linear(1, 1) for _ in range(159))))
    watch.check()
    monkeypatch.setattr(structure, "_outline", lambda module: looked.append(module) or outline(module))
    for _ in range(16):
        watch.check()
    assert len(looked) == len(set(map(id, looked))) == 160


# -- in a session ----------------------------------------------------------------------------------


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("change", [replace_head, assign, add_layer, mask])
@pytest.mark.parametrize("at", [0, 2])
def test_every_rank_hears_of_a_change_on_the_workers(comm, change, at):
    versions = []

    def at_once(model, version):
        versions.append(version)
        if version == at:
            change(model)

    with fails_everywhere(comm, RuntimeError, CHANGES[change].split(" ")[1]):
        run(comm, new_model(), at_once)
    assert max(versions, default=0) <= at + 4


@pytest.mark.parallel(WORKERS + 1)
def test_a_change_between_session_and_loop_is_named_before_the_first_batch(comm):
    model, drawn = new_model(), 0
    with fails_everywhere(comm, RuntimeError, "parameter '0.weight' was replaced"):
        with mpisync.Session(comm, model, sgd(model), progress=False) as session:
            if comm.rank == 0:
                set_weight(model)
            for _ in session.batches(BATCHES, steps=4):
                drawn += 1
                while not session.stale():
                    pass
    assert comm.rank or not drawn


@pytest.mark.parallel(WORKERS + 1)
def test_a_change_by_the_roots_on_step_is_named(comm):
    model, root = new_model(), comm.rank == WORKERS

    def on_step(record):
        if record.step == 3:
            set_weight(model)

    with fails_everywhere(comm, RuntimeError, "parameter '0.weight' was replaced"):
        run(comm, model, lambda model, version: None, steps=40, on_step=on_step if root else None)


@pytest.mark.parametrize("change", [replace_head, set_weight, add_layer])
def test_a_change_is_named_in_one_process_too(change):
    from mpi4py import MPI

    with pytest.raises(RuntimeError, match=CHANGES[change]):
        run(MPI.COMM_SELF, new_model(), lambda model, version: version == 2 and change(model), steps=20)


def test_a_parameter_that_is_thawed_is_named_in_one_process_too():
    from mpi4py import MPI

    model = new_model()
    model[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match="'0.weight' was frozen when the session began and has a gradient now"):
        run(MPI.COMM_SELF, model, lambda model, version: model[0].requires_grad_(version > 2))


def schedule(model, version):
    """Freeze the first layer for a while."""
    model[0].requires_grad_(not 2 <= version < 5)


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
@pytest.mark.parametrize("make", [sgd, torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1)])
def test_freezing_for_a_while_equals_one_process(comm, monkeypatch, transport, make):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    model, twin = new_model(), new_model()
    make = (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1)) if make is torch.optim.AdamW else make
    optimizers = [make(m if make is sgd else m.parameters()) for m in (model, twin)]
    with mpisync.Session(comm, model, optimizers[0], policy=ALL, progress=False) as session:
        for x, y in session.batches(BATCHES, steps=8):
            schedule(model, session.version)
            assert (flat(session.snapshot()) == flat(model)).all()  # also of a model that is frozen in part
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            session.step(loss)
    reference(twin, schedule, optimizers[1])
    for values in on_all(comm, flat(model)):
        assert abs(values - flat(twin)).max() < 1e-6


class Caching(nn.Module):
    """With caches that are made, grow and vanish in forward, a buffer that is assigned anew, and statistics."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.register_buffer("ones", torch.ones(2), persistent=False)
        self.register_buffer("later", None, persistent=False)
        self.register_buffer("gone", torch.ones(1), persistent=False)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        if self.later is None:
            self.later = torch.full((3,), 2.0)
        if len(self.ones) < 6:
            self.register_buffer("ones", torch.ones(len(self.ones) + 2), persistent=False)
        self.gone = None
        self.seen = self.seen + 1
        return self.layer(self.norm(x)) * self.later * self.ones[0]


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
@pytest.mark.filterwarnings("ignore:buffer:UserWarning")
def test_caches_that_are_not_persistent_are_each_ranks_own(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    torch.manual_seed(0)
    model = Caching().double()
    plain, twins = nn.Sequential(copy.deepcopy(model.norm), copy.deepcopy(model.layer)), []
    with mpisync.Session(comm, model, sgd(model), policy=ALL, progress=False) as session:
        for x, y in session.batches(BATCHES, steps=8):
            F.cross_entropy(model(x), y).backward()
            session.step(0.0)
            twins.append(session.snapshot())
    optimizer = sgd(plain)
    for version in range(8):
        for worker in range(WORKERS):
            x, y = BATCHES[worker::WORKERS][version % 4]
            (F.cross_entropy(plain(x) * 2, y) / WORKERS).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model.layer.weight - plain[1].weight).abs().max() < 1e-6
    assert model.seen.tolist() == [8.0] * 3 and model.norm.num_batches_tracked == 8
    if comm.rank == WORKERS:  # it runs no forward
        assert model.ones.tolist() == [1.0] * 2 and model.later is None and model.gone.tolist() == [1.0]
    else:
        assert model.ones.tolist() == [1.0] * 6 and model.later.tolist() == [2.0] * 3 and model.gone is None
        assert [twin.seen[0].item() for twin in twins] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
        assert all(twin.norm.num_batches_tracked == n for n, twin in enumerate(twins, 1))
    states = on_all(comm, {name: value.numpy() for name, value in model.state_dict().items()})
    assert all((states[0][name] == other[name]).all() for other in states for name in other)


def test_a_cache_that_grows_before_anything_was_packed_spoils_no_other_ranks():
    grown, other = Caching(), Caching()
    one, two = FlatModel(grown).buffers, FlatModel(other).buffers
    published, slot = (one.views(torch.zeros(one.size_bytes, dtype=torch.uint8).numpy()) for _ in range(2))
    two.pack(published)
    one.load(published)
    grown(torch.randn(4, 6))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        one.pack(slot)
    assert [str(w.message)[:62] for w in caught] == [
        f"buffer '{name}', which is not persistent, was {shape} float32 when the session"[:62]
        for name, shape in (("ones", "[2]"), ("gone", "[1]"))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        one.pack(slot)
        one.load(slot)
    two.load(slot)
    assert other.ones.tolist() == [1.0, 1.0] and grown.ones.tolist() == [1.0] * 4
    assert other.seen.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model.register_buffer("seen", torch.zeros(5)), r"buffer 'seen' was \[3\] .* is \[5\] float32"),
        (lambda model: setattr(model, "seen", model.seen.double()), r"\[3\] float32 .* is \[3\] float64 now"),
        (lambda model: setattr(model, "seen", None), r"is gone now"),
        (lambda model: delattr(model, "seen"), r"is gone now.*one forward pass"),
        (lambda model: setattr(model.norm, "running_mean", None), r"buffer 'norm.running_mean' was .* gone now"),
    ],
)
def test_state_that_changes_its_shape_or_goes_is_named(change, words):
    model = Caching()
    buffers = FlatModel(model).buffers
    change(model)
    with pytest.raises(ValueError, match=words):
        buffers.pack(buffers.views(torch.zeros(buffers.size_bytes, dtype=torch.uint8).numpy()))


@pytest.mark.parallel(WORKERS + 1)
def test_an_observer_that_takes_its_shape_from_the_data_is_named_with_the_cure(comm):
    from torch.ao.quantization import PerChannelMinMaxObserver

    def make():
        observer = PerChannelMinMaxObserver(ch_axis=1)
        return nn.Sequential(observer, nn.Linear(6, 3).double())

    with fails_everywhere(comm, ValueError, "buffer '0.min_val' was [0]", "one forward pass (model(x)) before Session"):
        run(comm, make(), lambda model, version: None)
    model = make()
    model(BATCHES[0][0])
    assert run(comm, model, lambda model, version: None).version == 8
