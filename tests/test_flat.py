"""FlatModel: parameters, gradients and buffers of a torch model in flat memory and back."""

import copy
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from mpisync.kernels.dtypes import DTYPES
from mpisync.kernels.fold import Reducer
from mpisync.model.flat import FlatModel
from mpisync.model.gradients import LARGE_BYTES, peak_of
from mpisync.model.signature import difference
from mpisync.model.tensor_layout import is_dense


class Tied(nn.Module):
    """An embedding tied to the output, a frozen layer, and one that no forward uses."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.out = nn.Linear(3, 7)
        self.out.weight = self.embed.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.out(self.frozen(self.embed(x)))


class Mixed(nn.Module):
    """One parameter of each dtype, and a scalar."""

    def __init__(self):
        super().__init__()
        self.small = nn.Parameter(torch.randn(5).half())
        self.single = nn.Parameter(torch.randn(2, 3))
        self.brain = nn.Parameter(torch.randn(4, 4).bfloat16())
        self.wide = nn.Parameter(torch.randn(()).double())
        self.last = nn.Parameter(torch.randn(17))

    def forward(self, _):
        return sum((p.double() ** 2).sum() for p in self.parameters())


def convolutions():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    return model.to(memory_format=torch.channels_last)


def compiled():
    return torch.compile(
        nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), backend="eager"
    )


class Large(nn.Module):
    """Large tensors among small ones, one of them in channels_last."""

    def __init__(self):
        super().__init__()
        side = LARGE_BYTES // 64 + 1
        self.before = nn.Parameter(torch.randn(3))
        self.one = nn.Parameter(torch.randn(side, 8, 2, 2).to(memory_format=torch.channels_last))
        self.two = nn.Parameter(torch.randn(32, side))
        self.between = nn.Parameter(torch.randn(5))
        self.three = nn.Parameter(torch.randn(side, 32))
        self.after = nn.Parameter(torch.randn(2))

    def forward(self, x):
        return sum((p * x.flatten()[0]).sum() for p in self.parameters())


def large(dtype):
    return Large().to(dtype)


MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)),
    "tied, frozen, unused": Tied,
    "mixed dtypes": Mixed,
    "bfloat16": lambda: nn.Linear(4, 3).bfloat16(),
    "channels_last": convolutions,
    "compiled": compiled,
    "large": lambda: large(torch.float32),
    "large, 16 bit": lambda: large(torch.bfloat16),
}
INPUTS = {
    "tied, frozen, unused": lambda: torch.randint(7, (6,)),
    "bfloat16": lambda: torch.randn(6, 4).bfloat16(),
    "channels_last": lambda: torch.randn(2, 3, 5, 5),
}


def backward(name, model):
    """Give the model's parameters gradients, as a user's loop does; return the loss."""
    x = INPUTS.get(name, lambda: torch.randn(6, 4))()
    loss = (model(x).double() ** 2).mean()
    loss.backward()
    return loss.item()


def accumulators(flat):
    """Segments as the root's mean has them: 16-bit gradients in float32."""
    return flat.views([np.zeros(n, DTYPES[name].accumulator) for name, n in flat.segments])


def values(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def equal(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


# --- the layout ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_places_are_aligned_and_do_not_overlap(name):
    flat = FlatModel(MODELS[name]())
    for index, (dtype, count) in enumerate(flat.segments):
        size = DTYPES[dtype].itemsize
        assert count * size % 64 == 0
        end = 0
        for place in (place for place in flat.places if place.segment == index):
            assert place.offset * size % 64 == 0
            assert place.offset >= end
            end = place.offset + place.count
        assert end <= count


def test_segments_are_one_per_dtype_in_the_tables_order():
    flat = FlatModel(Mixed())
    assert flat.segments == (("float64", 8), ("float32", 48), ("float16", 32), ("bfloat16", 32))
    assert flat.names == ("small", "single", "brain", "wide", "last")


def test_tied_parameters_travel_once_and_frozen_ones_do_not():
    model = Tied()
    flat = FlatModel(model)
    assert flat.names == ("embed.weight", "out.bias", "unused.weight", "unused.bias")
    assert flat.parameters[0] is model.out.weight
    assert [tensor for _, tensor in flat.frozen] == [model.frozen.weight, model.frozen.bias]


def test_a_transposed_parameter_keeps_its_layout_and_an_expanded_one_becomes_contiguous():
    model = nn.ParameterDict(
        {
            "turned": nn.Parameter(torch.randn(3, 4).t()),
            "gaps": nn.Parameter(torch.randn(4, 6)[:, ::2]),
            "expanded": nn.Parameter(torch.randn(1, 3).expand(4, 3)),
        }
    )
    flat = FlatModel(model)
    strides = {place.name: place.stride for place in flat.places}
    assert strides == {"turned": (1, 4), "gaps": (3, 1), "expanded": (3, 1)}
    before = values(flat.parameters)
    memory = flat.zeros()
    flat.store(memory)
    flat.bind(memory)
    assert equal(flat.parameters, before)


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.zeros(2, 3), True),
        (torch.zeros(2, 3).t(), True),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.zeros(3, 1, 2).as_strided((3, 1, 2), (2, 77, 1)), True),
        (torch.zeros(()), True),
        (torch.zeros(4, 6)[:, ::2], False),
        (torch.zeros(1, 3).expand(4, 3), False),
    ],
)
def test_dense_means_no_gaps_and_no_overlaps(tensor, dense):
    assert is_dense(tensor) is dense


def test_two_parameters_in_the_same_memory_are_refused_by_name():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].weight = nn.Parameter(model[0].weight.data)
    with pytest.raises(ValueError, match=r"'0.weight' and '1.weight' share memory"):
        FlatModel(model)


def test_parameters_side_by_side_in_one_memory_are_not_refused():
    memory = torch.zeros(8)
    model = nn.ParameterList([nn.Parameter(memory[:4]), nn.Parameter(memory[4:])])
    assert len(FlatModel(model).names) == 2


def test_a_dtype_that_cannot_be_summed_is_refused_by_name():
    model = nn.ParameterDict({"wave": nn.Parameter(torch.zeros(2, dtype=torch.complex64))})
    with pytest.raises(TypeError, match=r"'wave' is complex64: use one of float64, float32"):
        FlatModel(model)


def test_segments_of_another_length_are_refused():
    flat = FlatModel(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"float32 segment has 32 elements, not \[31\]"):
        flat.views([np.zeros(31, np.float32)])


# --- parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_bound_parameters_are_the_memory_and_private_again_afterwards(name):
    model = MODELS[name]()
    objects = list(model.parameters())
    flat = FlatModel(model)
    before, strides = values(model.parameters()), [p.stride() for p in model.parameters()]
    memory = flat.zeros()
    flat.store(memory)
    flat.bind(memory)
    assert all(p is q for p, q in zip(model.parameters(), objects, strict=True))
    assert [p.stride() for p in model.parameters()] == strides
    assert equal(model.parameters(), before)

    for segment in memory.segments:
        segment.fill_(2.0)  # what another process does
    assert all((p == 2.0).all() for p in flat.parameters)

    flat.unbind()
    flat.unbind()
    for segment in memory.segments:
        segment.fill_(3.0)
    assert all((p == 2.0).all() for p in flat.parameters)
    assert [p.stride() for p in model.parameters()] == strides


def test_tied_weights_stay_tied():
    model = Tied()
    flat = FlatModel(model)
    memory = flat.zeros()
    flat.store(memory)
    flat.bind(memory)
    assert model.embed.weight is model.out.weight
    flat.unbind()
    assert model.embed.weight is model.out.weight


@pytest.mark.parametrize("name", MODELS)
def test_load_and_store_copy_and_leave_parameters_private(name):
    model, other = MODELS[name](), MODELS[name]()
    one, two = FlatModel(model), FlatModel(other)
    memory = one.zeros()
    one.store(memory)
    two.load(memory)
    assert equal(one.parameters, two.parameters)
    for segment in memory.segments:
        segment.zero_()
    assert equal(one.parameters, two.parameters)


def test_memory_between_the_parameters_stays_zero():
    flat = FlatModel(nn.Linear(4, 3))
    memory = flat.zeros()
    flat.store(memory)
    assert not memory.segments[0][12:16].any()
    assert not memory.segments[0][19:].any()


def test_sixteen_bit_segments_come_as_uint16_arrays():
    flat = FlatModel(nn.Linear(4, 3).bfloat16())
    memory = np.zeros(64, np.uint16)
    flat.store(flat.views([memory]))
    weight = torch.from_numpy(memory[:12]).view(torch.bfloat16)
    assert torch.equal(weight, flat.parameters[0].flatten())


def test_a_read_only_mapping_can_be_loaded_without_a_warning():
    flat = FlatModel(nn.Linear(4, 3))
    memory = np.ones(32, np.float32)
    memory.flags.writeable = False
    flat.load(flat.views([memory]))
    assert (flat.parameters[0] == 1).all()


def test_a_compiled_model_follows_the_memory_without_being_compiled_again():
    model = compiled()
    flat = FlatModel(model)
    assert flat.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    x = torch.randn(6, 4)
    model(x)
    memory = flat.zeros()
    flat.store(memory)
    with torch.compiler.set_stance("fail_on_recompile"):
        flat.bind(memory)
        memory.segments[0].zero_()
        assert not model(x).any()
        model(x).sum().backward()
        assert flat.pack_gradients(flat.zeros()).peak < math.inf
        flat.unbind()
        assert not model(x).any()


def test_an_optimizer_made_before_steps_the_shared_memory():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    flat = FlatModel(model)
    memory = flat.zeros()
    flat.bind(memory)
    flat.assign_gradients(flat.views([torch.ones(32)]), b"\1\1")
    optimizer.step()
    assert (memory.tensors[0] == -1).all() and (memory.tensors[1] == -1).all()


def test_what_the_session_writes_is_no_write_of_the_users():
    model = nn.Linear(4, 3)
    flat = FlatModel(model)
    versions = [p._version for p in model.parameters()]
    memory = flat.zeros()
    flat.store(memory)
    flat.load(memory)
    flat.bind(memory)
    flat.unbind()
    assert [p._version for p in model.parameters()] == versions


# --- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_gradients_go_through_a_slot_bit_by_bit(name):
    model = MODELS[name]()
    flat = FlatModel(model)
    backward(name, model)
    expected = [None if p.grad is None else p.grad.clone() for p in flat.parameters]
    slot = flat.zeros()
    # A slot's last content must not shine through.
    for view in slot.tensors:
        view.fill_(float("nan"))
    packed = flat.pack_gradients(slot)
    peak = max(float(grad.abs().max()) for grad in expected if grad is not None)
    assert packed == (bytes(grad is not None for grad in expected), peak)
    for view, grad in zip(slot.tensors, expected, strict=True):
        assert torch.equal(view, torch.zeros_like(view) if grad is None else grad)
    assert all(p.grad is None for p in flat.parameters)


def test_parameters_without_a_gradient_are_said_and_zero():
    model = Tied()
    flat = FlatModel(model)
    model(torch.tensor([1, 2])).sum().backward()
    slot = flat.zeros()
    for view in slot.tensors:
        view.fill_(5.0)
    assert flat.pack_gradients(slot).presence == b"\1\1\0\0"
    assert not slot.tensors[2].any() and not slot.tensors[3].any()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_element_that_is_not_finite_is_seen(name, bad):
    model = MODELS[name]()
    flat = FlatModel(model)
    slot = flat.zeros()
    backward(name, model)
    assert flat.pack_gradients(slot).peak < math.inf
    for index in range(len(flat.parameters)):
        backward(name, model)
        gradient = flat.parameters[index].grad
        if gradient is not None:
            gradient[(-1,) * gradient.ndim] = bad
            assert flat.pack_gradients(slot).peak == math.inf


@pytest.mark.parametrize("name", ["large", "large, 16 bit"])
def test_a_large_gradient_in_another_layout_arrives_all_the_same(name):
    model = MODELS[name]()
    flat = FlatModel(model)
    slot = flat.zeros()
    backward(name, model)
    model.two.grad = turned = torch.randn_like(model.two).t().contiguous().t()
    assert flat.pack_gradients(slot).peak < math.inf
    assert torch.equal(slot.tensors[flat.names.index("two")], turned)
    backward(name, model)
    model.two.grad = turned
    turned[3, 4] = float("nan")
    assert flat.pack_gradients(slot).peak == math.inf


@pytest.mark.parametrize("bad", ["before", "between", "after", "other"])
def test_small_tensors_around_large_ones_are_checked_in_every_segment(bad):
    model = Large()
    model.other = nn.Parameter(torch.zeros(LARGE_BYTES // 8).bfloat16())
    flat = FlatModel(model)
    for parameter in flat.parameters:
        parameter.grad = torch.zeros_like(parameter)
    getattr(model, bad).grad[-1] = float("inf")
    assert flat.pack_gradients(flat.zeros()).peak == math.inf


def test_a_large_tensor_without_a_gradient_is_zero_in_the_slot():
    model = Large()
    flat = FlatModel(model)
    slot = flat.zeros()
    for view in slot.tensors:
        view.fill_(5.0)
    model.one.grad = torch.ones_like(model.one)
    assert flat.pack_gradients(slot) == (b"\0\1\0\0\0\0", 1.0)
    assert not slot.tensors[2].any() and (slot.tensors[1] == 1).all()


def test_large_tensors_are_copied_by_the_kernel_that_is_given_and_small_ones_are_not():
    model = Large()
    flat = FlatModel(model)
    slot, sizes = flat.zeros(), []
    with Reducer(2) as reducer:

        def kernel(source, target, dtype):
            sizes.append(source.size)
            return reducer.pack(source, target, dtype)

        backward("large", model)
        expected = [p.grad for p in flat.parameters]
        assert flat.pack_gradients(slot, kernel).peak < math.inf
    assert sizes == [p.numel() for p in (model.one, model.two, model.three)]
    assert equal(slot.tensors, expected)


def test_an_empty_tensor_is_finite():
    assert peak_of(torch.zeros(0)) == 0


def test_gradients_accumulate_anew_after_packing_and_zero_grad_is_harmless():
    model = nn.Linear(4, 3)
    flat = FlatModel(model)
    slot, x = flat.zeros(), torch.randn(6, 4)
    model(x).sum().backward()
    flat.pack_gradients(slot)
    once = values(slot.tensors)
    model.zero_grad()
    model(x).sum().backward()
    model(x).sum().backward()
    flat.pack_gradients(slot)
    assert equal(slot.tensors, [2 * gradient for gradient in once])


def test_what_users_do_to_a_gradient_before_counts():
    model = nn.Linear(4, 3)
    flat = FlatModel(model)
    model(torch.ones(1, 4)).sum().backward()
    model.weight.grad = torch.full((3, 4), 7.0).t().contiguous().t()
    slot = flat.zeros()
    flat.pack_gradients(slot)
    assert (slot.tensors[0] == 7).all()


def test_a_gradient_that_has_a_graph_is_packed_without_it():
    model = nn.Linear(4, 3)
    flat = FlatModel(model)
    (model(torch.randn(6, 4)) ** 2).sum().backward(inputs=list(model.parameters()))
    model.weight.grad = (model.weight * 2).reshape(3, 4)
    slot = flat.zeros()
    flat.pack_gradients(slot)
    assert not slot.segments[0].requires_grad


def test_a_sparse_gradient_is_refused_by_name():
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True))
    flat = FlatModel(model)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"gradient of parameter '0.weight' is sparse"):
        flat.pack_gradients(flat.zeros())


def test_a_parameter_that_is_trained_later_is_refused_by_name():
    model = Tied()
    flat = FlatModel(model)
    model.frozen.requires_grad_(True)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"'frozen.weight' was frozen when the session began"):
        flat.pack_gradients(flat.zeros())


@pytest.mark.parametrize("name", MODELS)
def test_an_update_from_assigned_gradients_is_torchs_own(name):
    model = MODELS[name]()
    other = copy.deepcopy(model)
    backward_on = partial(backward, name)
    torch.manual_seed(3)
    backward_on(other)
    make = partial(torch.optim.AdamW, lr=0.1, foreach=False)
    make(other.parameters()).step()

    optimizer = make(model.parameters())
    flat = FlatModel(model)
    memory, slot, mean = flat.zeros(), flat.zeros(), accumulators(flat)
    flat.store(memory)
    flat.bind(memory)
    torch.manual_seed(3)
    backward_on(model)
    packed = flat.pack_gradients(slot)
    for target, source in zip(mean.segments, slot.segments, strict=True):
        target.copy_(source)
    flat.assign_gradients(mean, packed.presence)
    assert [p.grad is not None for p in flat.parameters] == list(map(bool, packed.presence))
    optimizer.step()
    flat.unbind()
    assert equal(model.parameters(), other.parameters())


def test_the_mean_is_not_copied_unless_it_must_be_cast():
    flat = FlatModel(Mixed())
    mean = accumulators(flat)
    flat.assign_gradients(mean, b"\1" * 5)
    shared = {
        name: p.grad.data_ptr() == view.data_ptr()
        for name, p, view in zip(flat.names, flat.parameters, mean.tensors, strict=True)
    }
    assert shared == {"small": 0, "single": 1, "brain": 0, "wide": 1, "last": 1}
    casts = [p.grad.data_ptr() for p in flat.parameters]
    flat.assign_gradients(mean, b"\1" * 5)
    assert [p.grad.data_ptr() for p in flat.parameters] == casts
    other = accumulators(flat)
    for segment in other.segments:
        segment.fill_(3.0)
    flat.assign_gradients(other, b"\1" * 5)
    assert all((p.grad == 3).all() for p in flat.parameters)


def test_nobodys_gradient_is_none_and_weight_decay_leaves_the_parameter_alone():
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=1.0)
    flat = FlatModel(model)
    before = values(model.unused.parameters())
    flat.assign_gradients(accumulators(flat), b"\1\1\0\0")
    optimizer.step()
    assert equal(model.unused.parameters(), before)


def test_unbinding_lets_go_of_the_mean_but_not_of_a_users_gradient():
    model = nn.Linear(4, 3)
    flat = FlatModel(model)
    flat.assign_gradients(accumulators(flat), b"\1\1")
    model.bias.grad = own = torch.ones(3)
    flat.unbind()
    assert model.weight.grad is None
    assert model.bias.grad is own


# --- what must match between ranks -------------------------------------------------------------


def signature(model):
    return FlatModel(model).signature()


def test_the_same_structure_has_the_same_signature_whatever_its_values():
    for name, make in MODELS.items():
        assert signature(make()) == signature(make()), name
    assert json.loads(signature(nn.Linear(2, 1)))[0]["name"] == "weight"


def test_a_model_compiled_on_the_workers_only_fits_the_root():
    plain = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    assert signature(plain) == signature(compiled())


@pytest.mark.parametrize(
    ("root", "here", "sentence"),
    [
        (
            lambda: nn.Linear(64, 10),
            lambda: nn.Linear(32, 10),
            "parameter 'weight' is [10, 64] float32 on the root and [10, 32] float32 here",
        ),
        (
            lambda: nn.Linear(2, 2),
            lambda: nn.Linear(2, 2).bfloat16(),
            "parameter 'weight' is [2, 2] float32 on the root and [2, 2] bfloat16 here",
        ),
        (
            lambda: nn.Linear(2, 2),
            lambda: nn.Linear(2, 2, bias=False),
            "parameter 'bias' is on the root and not here",
        ),
        (
            lambda: nn.Linear(2, 2, bias=False),
            lambda: nn.Linear(2, 2),
            "parameter 'bias' is here and not on the root",
        ),
        (
            lambda: nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)),
            lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
            "parameter '0.bias' is here and not on the root",
        ),
        (
            lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
            lambda: nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)),
            "parameter '0.bias' is on the root and not here",
        ),
        (
            lambda: nn.ParameterDict({"a": torch.zeros(1), "b": torch.zeros(1)}),
            lambda: nn.ParameterDict([("b", torch.zeros(1)), ("a", torch.zeros(1))]),
            "parameter 'a' on the root comes where parameter 'b' comes here",
        ),
        (
            lambda: nn.Linear(2, 2),
            lambda: nn.Linear(2, 2).requires_grad_(False),
            "parameter 'weight' is trained on the root and frozen here",
        ),
        (
            convolutions,
            lambda: convolutions().to(memory_format=torch.contiguous_format),
            "parameter '0.weight' has strides [27, 1, 9, 3] on the root and [27, 9, 3, 1] here "
            "(another memory format)",
        ),
        (
            lambda: nn.BatchNorm1d(3),
            lambda: nn.BatchNorm1d(3, track_running_stats=False),
            "buffer 'running_mean' is on the root and not here",
        ),
    ],
)
def test_a_difference_is_a_sentence_that_names_the_tensor(root, here, sentence):
    assert difference(signature(root()), signature(here())) == sentence


def test_no_difference_is_none():
    assert difference(signature(Tied()), signature(Tied())) is None
