"""The kernels: their bits beside the CPU's and torch's, and what they reach of the card's bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpisync.device.kernel import LINK, NORM_BLOCK
from mpisync.kernels.dtypes import DTYPES, Dtype
from mpisync.kernels.fold import Reducer
from on_card.card import Card, check, found


def stored(values: np.ndarray, name: str) -> np.ndarray:
    """Return values in a dtype's storage."""
    if name == "bfloat16":
        return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.asarray(values, name).view(DTYPES[name].storage)


def gradients_of(rng: np.random.Generator, name: str, count: int, size: int) -> list[np.ndarray]:
    """Return numbers of such different magnitudes that every other order rounds differently."""
    values = rng.standard_normal((count, size)) * 2.0 ** rng.integers(-8, 8, (count, size))
    return [stored(row, name) for row in values]


def differing(array: np.ndarray, other: np.ndarray) -> int:
    """Return in how many elements two arrays of floats differ; all NaNs are alike."""
    kind = f"u{array.itemsize}"
    return int(((array.view(kind) != other.view(kind)) & ~(np.isnan(array) & np.isnan(other))).sum())


class Compared:
    """Folds on the card and on the CPU, which must agree in every bit."""

    def __init__(self, card: Card) -> None:
        self.card, self.cpu = card, Reducer()
        self.folds = self.elements = 0

    def fold(
        self, gradients: Sequence[np.ndarray], dtype: Dtype, before: np.ndarray | None = None, *,
        offset: int = 0, apart: int = 0, behind: int = 0, **more: Any,
    ) -> None:  # fmt: skip
        """Fold both ways; the k-th gradient begins `apart` elements behind the one before, the sum `behind`."""
        start = before is None
        size = len(gradients[0] if before is None else before)
        wanted = np.zeros(size, dtype.accumulator) if before is None else before.copy()
        arrays = [self.card.array(gradient, offset + apart * k) for k, gradient in enumerate(gradients)]
        target = self.card.array(wanted, offset + behind)
        by_cpu = self.cpu.fold(wanted, gradients, dtype, start=start, **more)
        by_card = self.card.memory.reducer.fold(target, arrays, dtype, start=start, **more)
        bad = differing(self.card.memory.to_host(target), wanted)
        what = f"{dtype.name}, {len(gradients)} gradients of {size}, {offset=}, {apart=}, {behind=}, {start=}, {more}"
        check(not bad, f"{bad} of {size} elements differ from the CPU's: {what}")
        check(by_cpu == by_card, f"{by_card} and not the CPU's {by_cpu}: {what}")
        self.folds += 1
        self.elements += size


def bits(card: Card) -> None:
    """Fold, pack, look at and sum the squares of all kinds of numbers, on the card and on the CPU."""
    rng, compared = np.random.default_rng(11), Compared(card)
    for name, dtype in DTYPES.items():
        counts = [*range(10), 16, 17, 64] if card.is_real else [0, 1, 9]
        gradients = gradients_of(rng, name, max(counts), 1037)
        before = rng.standard_normal(1037).astype(dtype.accumulator)
        for count in counts:
            weights = rng.uniform(0.1, 3, count).tolist()
            for start in ((None, before) if count else (before,)):
                for more in ({}, {"weights": weights, "divisor": 3.0}, {"norms": True}):
                    compared.fold(gradients[:count], dtype, start, **more)
        sizes = [*range(1, 20), 255, 257, 4095, 4097, 70_001] if card.is_real else [1, 17, 257]
        for size in sizes:
            for offset in range(9) if size < 300 else (0, 1):
                for apart, behind in ((0, 0), (1, 0), (0, 1)):
                    three = gradients_of(rng, name, 3, size)
                    compared.fold(three, dtype, offset=offset, apart=apart, behind=behind, divisor=3.0)
        size = card.size(1_000_003)
        any_bits = [rng.integers(0, 256, size * dtype.itemsize, np.uint8).view(dtype.storage) for _ in range(9)]
        for count in (1, 3, 9):
            compared.fold(any_bits[:count], dtype, weights=rng.uniform(0.1, 3, count).tolist(), divisor=3.0)
        if dtype.itemsize == 2:
            compared.fold([np.arange(1 << 16, dtype=np.uint16)], dtype)
        _specials(compared, name)
        _copies(card, rng, dtype)
        found(**{f"{name}_folds": compared.folds, f"{name}_elements": compared.elements})


def _specials(compared: Compared, name: str) -> None:
    kind = np.float16 if name == "float16" else DTYPES[name].accumulator.type
    limits = np.finfo(kind)
    special = [0.0, 1.0, np.inf, np.nan, limits.max, limits.tiny, limits.tiny / 2, limits.smallest_subnormal]
    values = np.array([*special, *(-x for x in special), 1 + limits.eps], kind)
    one, other = (grid.ravel() for grid in np.meshgrid(stored(values, name), stored(values, name)))
    for divisor in (None, 3.0, 1e-30, np.inf):
        compared.fold([one, other], DTYPES[name], divisor=divisor)
        compared.fold([one, other], DTYPES[name], weights=[0.5, -1.0], divisor=divisor)


def _copies(card: Card, rng: np.random.Generator, dtype: Dtype) -> None:
    cpu = Reducer()
    for size in (1, 7, 4097, card.size(1_000_003)):
        source = rng.integers(0, 256, size * dtype.itemsize, np.uint8).view(dtype.storage)
        finite = stored(rng.standard_normal(size), dtype.name)
        for values in (source, finite):
            here, target = card.array(values, 1), card.blank(size, dtype.storage)
            peak = card.memory.reducer.pack(here, target, dtype)
            check(card.memory.to_host(target).tobytes() == values.tobytes(), f"pack copies other bits: {dtype.name}")
            check(peak == cpu.peak(values, dtype), f"pack finds {peak}, the CPU {cpu.peak(values, dtype)}")
            check(card.memory.reducer.peak(here, dtype) == peak, f"peak differs from pack's: {dtype.name}, {size}")


def sgd(card: Card) -> None:
    """Update by the kernel, by the CPU's and by torch's SGD on the card."""
    import torch

    from mpisync.model import update

    rng, agree = np.random.default_rng(3), update._matches_torch_rounding(card.memory)
    found(fused_by_the_product=bool(agree))
    for name in ("float32", "float64"):
        dtype, size = DTYPES[name], card.size(1_000_003)
        before = rng.standard_normal(size).astype(name)
        for count in (1, 4, LINK + 1):
            gradients = gradients_of(rng, name, count, size)
            mean = np.zeros(size, name)
            Reducer().fold(mean, gradients, dtype, start=True, divisor=float(count))
            by_cpu = before.copy()
            Reducer().fused_sgd_step(by_cpu, [mean], dtype, rate=0.3)
            theta = card.array(before)
            arrays = [card.array(gradient) for gradient in gradients]
            card.memory.reducer.fused_sgd_step(theta, arrays, dtype, divisor=float(count), rate=0.3)
            by_card = card.memory.to_host(theta)
            check(not differing(by_card, by_cpu), f"the update's bits differ from the CPU's: {name}, {count} gradients")
            for kind, more in {
                "default": {}, "foreach": {"foreach": True}, "loop": {"foreach": False}, "fused": {"fused": True},
            }.items():  # fmt: skip
                parameter = torch.nn.Parameter(torch.from_numpy(before.copy()).to(card.device))
                parameter.grad = torch.from_numpy(mean).to(card.device)
                torch.optim.SGD([parameter], lr=0.3, **more).step()
                bad = differing(parameter.detach().cpu().numpy(), by_card)
                found(**{f"{name}_{count}_torch_{kind}_differs": bad})
                check(
                    kind != "default" or not bad or not agree, f"torch's SGD differs in {bad} elements, and is replaced"
                )


def fold_speed(card: Card) -> None:
    """Time folds beside the card's own copy, adds with a division, and torch's stack and mean."""
    for name in ("float32", "bfloat16"):
        found(**{f"{name}_{what}": value for what, value in _speeds(card, DTYPES[name]).items()})


def _speeds(card: Card, dtype: Dtype) -> dict[str, Any]:
    import torch

    repeats, size = card.times(20), card.size(25_000_000)
    memory, kernels = card.memory, card.memory.reducer._kernels
    arrays = [card.array(stored(np.ones(size, np.float32), dtype.name)) for _ in range(16)]
    tensors = [card.tensor(array, dtype.name) for array in arrays]
    target, spare = card.blank(size, dtype.accumulator), card.blank(size, dtype.storage)
    partials = card.blank(-(-size // NORM_BLOCK), np.float64)
    places, out, norms = [memory.address(array) for array in arrays], memory.address(target), memory.address(partials)
    copy = _rate(2 * size * dtype.itemsize, card.seconds(lambda: memory.copy(arrays[0], spare), repeats))
    squares_s = card.seconds(lambda: kernels.squares(places[0], size, dtype, norms), repeats)
    speeds: dict[str, Any] = {"copy_gb_s": copy, "squares_gb_s": _rate(size * dtype.itemsize, squares_s)}

    def timed(count: int) -> dict[str, float]:
        by, few, parts = float(count), arrays[:count], tensors[:count]

        def add() -> None:
            total = parts[0].clone()
            for part in parts[1:]:
                total.add_(part)
            total.div_(by)

        kernel_s = card.seconds(
            lambda: kernels.fold(out, places[:count], size, dtype, start=True, divisor=by), repeats
        )
        product_s = card.seconds(lambda: memory.reducer.fold(target, few, dtype, start=True, divisor=by), repeats)
        reached = _rate(size * (count * dtype.itemsize + dtype.accumulator.itemsize), kernel_s)
        return {
            "kernel_ms": round(1e3 * kernel_s, 4),
            "kernel_gb_s": reached,
            "of_copy": round(reached / copy, 3),
            "with_the_peak_at_the_host_ms": round(1e3 * product_s, 4),
            "adds_ms": round(1e3 * card.seconds(add, repeats), 4),
            "stack_mean_ms": round(1e3 * card.seconds(lambda: torch.stack(parts).mean(0), repeats), 4),
        }

    return {**speeds, **{str(count): timed(count) for count in (1, 2, 4, 8, 16)}}


def _rate(moved: int, took_s: float) -> float:
    return round(moved / took_s / 1e9, 2)
