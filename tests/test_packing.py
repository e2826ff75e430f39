"""Module buffers and frozen parameters as bytes: packed, averaged over workers, put back."""

import numpy as np
import pytest
import torch
from torch import nn

from mpisync.model.flat import FlatModel
from mpisync.model.packed_tensors import CHUNK_BYTES, PackedTensors


class Buffers(nn.Module):
    """BatchNorm's statistics beside constants of every sort."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.full((2, 2), -float("inf")).triu(1))
        self.register_buffer("rotary", torch.rand(5).bfloat16())
        self.register_buffer("unknown", torch.full((2,), float("nan")))
        self.register_buffer("flag", torch.tensor(True), persistent=False)
        self.register_buffer("absent", None)
        self.register_buffer("wave", torch.zeros(2, dtype=torch.complex64))

    def forward(self, x):
        return self.norm(x)


def packed(model):
    """The model's buffers as bytes."""
    buffers = FlatModel(model).buffers
    memory = np.zeros(buffers.size_bytes, np.uint8)
    buffers.pack(buffers.views(memory))
    return memory


def average(model, parts):
    """Load the mean of `parts` into the model."""
    buffers = FlatModel(model).buffers
    mean = np.zeros(buffers.size_bytes, np.uint8)
    buffers.average(mean, parts)
    buffers.load(buffers.views(mean))


def buffers_of(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same_bits(one, other):
    return all(
        np.array_equal(one[name].view(torch.uint8).numpy(), other[name].view(torch.uint8).numpy())
        if one[name].ndim
        else torch.equal(one[name], other[name])
        for name in one
    )


def test_a_late_step_leaves_no_trace():
    model = Buffers()
    published, before = packed(model), buffers_of(model)
    objects = dict(model.named_buffers())
    model(torch.randn(8, 3))
    assert model.norm.num_batches_tracked == 1
    flat = FlatModel(model)
    flat.buffers.load(flat.buffers.views(published))
    assert same_bits(buffers_of(model), before)
    assert all(objects[name] is buffer for name, buffer in model.named_buffers())


def test_statistics_are_averaged_and_counts_are_those_of_the_first():
    model, parts, means = Buffers(), [], []
    published = packed(model)
    buffers = FlatModel(model).buffers
    for worker in range(3):
        buffers.load(buffers.views(published))
        model.norm.num_batches_tracked += worker
        model(torch.randn(8, 3) + worker)
        parts.append(packed(model))
        means.append(model.norm.running_mean.double().clone())
    average(model, parts)
    assert torch.equal(model.norm.running_mean, torch.stack(means).mean(0).float())
    assert model.norm.num_batches_tracked == 1
    average(model, parts[::-1])
    assert model.norm.num_batches_tracked == 3


def test_constants_never_drift():
    model = Buffers()
    before = buffers_of(model)
    for _ in range(50):
        parts = []
        for _ in range(3):
            model(torch.randn(8, 3))  # makes the chunk of float32 differ
            parts.append(packed(model))
        average(model, parts)
    after = buffers_of(model)
    for name in ("mask", "rotary", "flag", "wave"):
        assert torch.equal(after[name], before[name]), name
    assert after["unknown"].isnan().all()


def test_elements_on_which_all_agree_keep_their_bits_next_to_others_that_differ():
    third = torch.tensor([1 / 3, 0.1, 5.0, 5.0], dtype=torch.float64)
    model = nn.Module()
    model.register_buffer("values", third.clone())
    parts = []
    for worker in range(3):
        model.values = third.clone()
        model.values[2] += worker
        parts.append(packed(model))
    average(model, parts)
    assert model.values.tolist() == [1 / 3, 0.1, 6.0, 5.0]


def test_complex_and_half_precision_buffers_are_averaged_too():
    model = nn.Module()
    model.register_buffer("wave", torch.zeros(2, dtype=torch.complex64))
    model.register_buffer("brain", torch.zeros(2, dtype=torch.bfloat16))
    parts = [packed(model)]
    model.wave += 2 + 4j
    model.brain += 3
    average(model, [*parts, packed(model)])
    assert model.wave.tolist() == [1 + 2j] * 2
    assert model.brain.tolist() == [1.5] * 2


def test_the_mean_may_be_written_over_one_of_its_parts():
    for target in (0, 1):
        model = nn.Module()
        model.register_buffer("values", torch.zeros(3))
        model.register_buffer("count", torch.tensor(1))
        parts = [packed(model)]
        model.values += 4
        model.count += 1
        parts.append(packed(model))
        flat = FlatModel(model)
        flat.buffers.average(parts[target], parts)
        flat.buffers.load(flat.buffers.views(parts[target]))
        assert model.values.tolist() == [2.0] * 3 and model.count == 1


def test_a_mean_over_many_chunks_is_the_mean():
    count = 3 * CHUNK_BYTES // 4 + 5
    model = nn.Module()
    model.register_buffer("big", torch.rand(count))
    parts, sums = [], torch.zeros(count, dtype=torch.float64)
    for _ in range(2):
        model.big = torch.rand(count)
        parts.append(packed(model))
        sums += model.big
    average(model, parts)
    assert torch.equal(model.big, (sums / 2).float())


def test_a_buffer_that_the_module_assigns_anew_is_followed():
    model = nn.Module()
    model.register_buffer("count", torch.tensor(0))
    buffers = FlatModel(model).buffers
    memory = np.zeros(buffers.size_bytes, np.uint8)
    model.count = model.count + 5
    buffers.pack(buffers.views(memory))
    model.count = model.count + 5
    buffers.load(buffers.views(memory))
    assert model.count == 5


def test_a_buffer_that_changes_its_shape_is_refused_by_name():
    model = nn.Module()
    model.register_buffer("cache", torch.zeros(4))
    buffers = FlatModel(model).buffers
    model.cache = torch.zeros(8)
    with pytest.raises(ValueError, match=r"'cache' was \[4\] float32 .* is \[8\] float32 now"):
        buffers.pack(buffers.views(np.zeros(buffers.size_bytes, np.uint8)))


def test_a_compiled_models_buffers_are_found():
    model = torch.compile(Buffers(), backend="eager")
    before = packed(model)
    model(torch.randn(8, 3))
    assert not np.array_equal(packed(model), before)


def test_a_model_without_any_packs_nothing():
    tensors = PackedTensors(nn.Linear(2, 2), [])
    assert tensors.size_bytes == 0
    nothing = np.zeros(0, np.uint8)
    tensors.pack(tensors.views(nothing))
    tensors.average(nothing, [nothing])
    tensors.load(tensors.views(nothing))
