"""The arithmetic of a merge, block by block: the same operations on the same values as in PEFT, so the same bits.

    LoRA      W' = W + s·BA                         (Hu et al. 2021; s = alpha/r, rsLoRA alpha/sqrt(r))
    DoRA      W' = m / ‖W + s·BA‖_row ⊙ (W + s·BA)  (Liu et al. 2024)
    bias      b' = b + s·b_B                        (lora_bias)
    replaced  W' = the trained tensor               (modules_to_save, bias, Stage-1 projector)

Everything is computed in float32 and rounded to the base's own dtype, then to bfloat16 (one rounding for a BF16 base,
two for an F16 base, as in PEFT's `merge_and_unload().to(bfloat16)`).

A plain LoRA block is computed in tiles that stay in the processor's cache, so that product, casts and sum touch memory
once. Tiles are whole rows, because contiguous memory is cast in half the time. They are nearly equal and never thin,
because BLAS takes other paths, with other roundings, for a handful of rows. On a GPU a block is one tile.
A scale that is a power of two is multiplied into A or B beforehand, which is exact. Then W + BA is one call to BLAS, if
BLAS adds W to the finished product with one rounding (`addmm_is_exact` tries it).
"""

from __future__ import annotations

import functools
import math
import threading
import time
from typing import Any

import torch

from surgvqa.checkpoint.headers import TensorInfo
from surgvqa.checkpoint.shards import Files, page_memory, split_rows
from surgvqa.checkpoint.torch_tensors import DTYPES, MemoryTensor, RowSource, load, read_rows
from surgvqa.merge.adapter import LoraModule

TILE_ROWS, TILE_NUMEL, MOST_NUMEL = 128, 5 << 17, 1 << 20  # tiles have whole rows; with fewer, the product is slower
SAMPLED_ROWS = 8  # rounding loss is measured on one row in this many


def _product_norm2(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖BA‖² without computing BA: the sum of BᵀB ∘ AAᵀ, whose factors are only [r, r]."""
    return float(((b.t() @ b).double() * (a @ a.t()).double()).sum().clamp_min(0))


def _norm(value: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))


class Replaced(RowSource):
    """A tensor that was trained in the base tensor's place; `base` is None when the base has no such tensor."""

    def __init__(self, name: str, info: TensorInfo, base: TensorInfo | None, files: Files, origin: str):
        super().__init__(name, info.shape)
        self.info, self.base, self.files, self.origin = info, base, files, origin
        self._lock = threading.Lock()
        self._sums = {"w2": 0.0, "base2": 0.0, "delta2": 0.0}

    def fill(self, start: int, out: memoryview) -> None:
        if not out.nbytes:
            return
        _, _, target = self.rows(start, out)
        value = read_rows(self.info, self.files, start // 2, target.numel()).view_as(target)
        old = None
        if self.base is not None:  # PEFT keeps it in the base's dtype
            old = read_rows(self.base, self.files, start // 2, target.numel()).view_as(target)
            value = value.to(old.dtype)
        target.copy_(value)
        new = target.float()
        with self._lock:
            self._sums["w2"] += _norm(new) ** 2
            if old is not None:
                self._sums["base2"] += _norm(old) ** 2
                self._sums["delta2"] += _norm(new - old.to(torch.bfloat16).float()) ** 2

    def stats(self) -> dict[str, Any]:
        found = {"what": "replaced", "from": self.origin}
        if self.base is None:
            return {**found, "new": True, "w_norm": math.sqrt(self._sums["w2"])}
        return {**found, "w_norm": math.sqrt(self._sums["base2"]), "delta_norm": math.sqrt(self._sums["delta2"])}


class AddedBias(RowSource):
    """b + s·b_B."""

    def __init__(self, name: str, base: TensorInfo, lora: LoraModule, files: Files, peft_dtype: str):
        super().__init__(name, base.shape)
        self.base, self.lora, self.files = base, lora, files
        self.peft_dtype = DTYPES[peft_dtype]
        self.whole = True

    def fill(self, start: int, out: memoryview) -> None:
        _, _, target = self.rows(start, out)
        bias = load(self.base, self.files).to(self.peft_dtype, copy=True)
        assert self.lora.b_bias is not None
        bias += load(self.lora.b_bias, self.files).float() * self.lora.scale
        target.copy_(bias.view_as(target))

    def stats(self) -> dict[str, Any]:
        return {"what": "bias"}


_NOISE_NUMEL = 65_521  # elements; a prime, so that each row gets them in other columns
_local = threading.local()


def _scratch(name: str, size: int, device: torch.device) -> torch.Tensor:
    """A float32 buffer of at least `size` elements, which each thread reuses for its next block."""
    buffer = getattr(_local, name, None)
    if buffer is None or buffer.numel() < size or buffer.device.type != device.type:
        if device.type == "cpu":
            buffer = torch.frombuffer(page_memory(4 * size), dtype=torch.float32)
        else:
            buffer = torch.empty(size, device=device)
        setattr(_local, name, buffer)
    return buffer


@functools.cache
def addmm_is_exact(rows: int, rank: int, columns: int) -> bool:
    """Whether BLAS computes W + BA with the same bits as product and sum in two steps.

    Tried on noise, once per shape of tile: W is [rows, columns], B [rows, rank], A [rank, columns].
    """
    noise = torch.rand(_NOISE_NUMEL, generator=torch.Generator().manual_seed(0))

    def noisy(*shape: int) -> torch.Tensor:
        numel = math.prod(shape)
        return noise.repeat(-(-numel // _NOISE_NUMEL))[:numel].view(shape)

    w, b, a = noisy(rows, columns), noisy(rows, rank), noisy(rank, columns)
    in_two = torch.mm(b, a).add_(w)
    return torch.equal(w.addmm_(b, a), in_two)


_trial_lock = threading.Lock()  # several workers reach a new shape at once; only one tries it


def _tile_rows(width: int) -> int:
    """Rows of a tile: TILE_NUMEL elements or TILE_ROWS rows, whichever is more, but at most MOST_NUMEL elements."""
    return max(1, min(max(TILE_ROWS, TILE_NUMEL // width), MOST_NUMEL // width))


class Merged(RowSource):
    """W + s·BA, or DoRA's formula.

    `base` is W: the base's own tensor, or one that replaces it and that PEFT keeps in the base's dtype (`peft_dtype`).
    """

    def __init__(self, name: str, base: TensorInfo, lora: LoraModule, files: Files, device: str, peft_dtype: str):
        super().__init__(name, base.shape)
        self.base, self.lora, self.files = base, lora, files
        self.peft_dtype = DTYPES[peft_dtype]
        self.transposed = lora.embedding
        self.device = torch.device(device)
        self.on_gpu = self.device.type != "cpu"
        self.whole = lora.magnitude is not None and self.transposed  # its norms are over columns
        self._lock = threading.Lock()
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self._sums = {"delta2": 0.0, "w2": 0.0, "error2": 0.0, "sampled": 0.0}
        self._measured = False
        """Whether ‖ΔW‖ of a LoRA is known, from `prepare` or from the block with the first row."""
        self._seconds = 0.0

    # -- factors

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r] in float32 on the device. If exact, the smaller one includes the scale."""
        with self._lock:
            if self._factors is None:
                self._factors = self._load_factors()
            return self._factors

    def _load_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        a = load(self.lora.a, self.files).to(self.device, torch.float32)
        b = load(self.lora.b, self.files).to(self.device, torch.float32)
        if self.folded:
            return (a, b * self.lora.scale) if b.numel() <= a.numel() else (a * self.lora.scale, b)
        return a, b

    @torch.inference_mode()
    def prepare(self) -> None:
        """Computes ‖ΔW‖ of a LoRA from factors that are not kept."""
        began = time.perf_counter()
        if self.lora.magnitude is None and not self._measured:
            self._measure(*self._load_factors())
            with self._lock:
                self._seconds += time.perf_counter() - began

    def _measure(self, a: torch.Tensor, b: torch.Tensor) -> None:
        delta2 = _product_norm2(a, b) * (1.0 if self.folded else self.lora.scale**2)
        with self._lock:
            self._sums["delta2"], self._measured = delta2, True

    @property
    def folded(self) -> bool:
        """Whether the scale is a power of two, so that multiplying a factor by it is exact."""
        return math.frexp(self.lora.scale)[0] == 0.5

    def close(self) -> None:
        self._factors = None

    # -- one block

    def fill(self, start: int, out: memoryview) -> None:
        began = time.perf_counter()
        first, count, target = self.rows(start, out)
        as_it_lies = not isinstance(self.base, MemoryTensor) and DTYPES[self.base.dtype] == self.peft_dtype
        if as_it_lies and self.peft_dtype == torch.bfloat16:
            self.files.read_into(self.base, start, out)  # W is read to where W' will be
            weight = target
        else:
            weight = read_rows(self.base, self.files, first * self.row_numel, count * self.row_numel)
            weight = weight.to(self.peft_dtype).view(count, self.row_numel)
        result = target
        if self.on_gpu:
            weight = weight.to(self.device)
            result = torch.empty_like(weight, dtype=torch.bfloat16)
        if self.lora.magnitude is not None:
            sums = self._dora(first, weight, result)
        else:
            sums = self._lora(first, weight, result)
        if result is not target:
            target.copy_(result)
        with self._lock:
            for key, value in sums.items():
                self._sums[key] += value
            self._seconds += time.perf_counter() - began

    def _delta(self, row: int, rows: int, out: torch.Tensor) -> torch.Tensor:
        """s·BA in float32 for some rows of the stored W [rows, width]; `out` is scratch of at least their size."""
        a, b = self.factors()
        if self.transposed:
            delta = out[: rows * b.shape[0]].view(b.shape[0], rows)
            torch.mm(b, a[:, row : row + rows], out=delta)
        else:
            delta = out[: rows * a.shape[1]].view(rows, a.shape[1])
            torch.mm(b[row : row + rows], a, out=delta)
        if not self.folded:
            delta.mul_(self.lora.scale)
        return delta.t() if self.transposed else delta

    @torch.inference_mode()
    def _lora(self, first: int, weight: torch.Tensor, result: torch.Tensor) -> dict[str, float]:
        sums = dict.fromkeys(self._sums, 0.0)
        a, b = self.factors()
        if first == 0 and not self._measured:
            self._measure(a, b)
        rows, width = weight.shape
        tall = rows if self.on_gpu else _tile_rows(width)
        tiles = split_rows((rows,), 1, tall)
        for row, height in tiles:
            w = weight[row : row + height]
            flat = _scratch("total", height * width, self.device)[: height * width]
            total = flat.view(height, width)
            total.copy_(w)
            sums["w2"] += float(torch.dot(flat, flat))
            if self._is_one_call(height, width):
                total.addmm_(b[first + row : first + row + height], a)
            else:
                delta = self._delta(first + row, height, _scratch("product", height * width, self.device))
                if self.lora.embedding:  # PEFT rounds an embedding's delta before it adds it
                    delta = delta.to(weight.dtype)
                total.add_(delta)
            new = result[row : row + height]
            new.copy_(total if weight.dtype == new.dtype else total.to(weight.dtype))
            some = max(1, height // SAMPLED_ROWS)
            rounded = _scratch("product", some * width, self.device)[: some * width]
            error = flat[: some * width]
            rounded.view(some, width).copy_(new[:some])
            error.sub_(rounded)  # the rounding error of W + Δ
            sums["error2"] += float(torch.dot(error, error))
            sums["sampled"] += some * width
        return sums

    def _is_one_call(self, rows: int, columns: int) -> bool:
        """Whether a tile's product and sum can be one call to BLAS; only tried on the CPU."""
        simple = self.folded and not self.transposed and not self.on_gpu
        if not simple:
            return False
        with _trial_lock:
            return addmm_is_exact(rows, self.lora.rank, columns)

    def _dora(self, first: int, weight: torch.Tensor, result: torch.Tensor) -> dict[str, float]:
        """Rescales the rows (columns, if stored transposed) of W + s·BA to the trained magnitude; fills `result`."""
        rows, columns = weight.shape
        delta = self._delta(first, rows, torch.empty(rows * columns, device=self.device))
        wide = weight.to(torch.float32)
        total = weight + delta
        norm = torch.linalg.norm(total.t() if self.transposed else total, dim=1)
        assert self.lora.magnitude is not None
        magnitude = load(self.lora.magnitude, self.files).to(self.device, torch.float32).view(-1)
        if not self.transposed:
            magnitude = magnitude[first : first + rows]
        factor = magnitude / norm
        new = (factor.view(1, -1) if self.transposed else factor.view(-1, 1)) * total
        sums = {"w2": _norm(wide) ** 2}
        result.copy_(new.to(weight.dtype))
        sums["delta2"] = _norm(new - wide) ** 2  # the whole change by DoRA, not only s·BA
        sums["error2"] = _norm(new - result.float()) ** 2
        sums["sampled"] = new.numel()
        return sums

    def stats(self) -> dict[str, Any]:
        sums, lora = self._sums, self.lora
        numel = math.prod(self.shape)
        lost = math.sqrt(sums["error2"] / sums["sampled"] * numel / sums["delta2"]) if sums["delta2"] > 0 else None
        return {
            "what": "dora" if lora.magnitude is not None else "lora",
            "rank": lora.rank,
            "scale": lora.scale,
            "delta_norm": math.sqrt(sums["delta2"]),
            "w_norm": math.sqrt(sums["w2"]),
            "rounding_loss": lost,
            "seconds": round(self._seconds, 6),
        }
