"""Gather and scatter of trainable elements: the C++/CUDA extension where it is built, torch otherwise.

Both move the bits of elements of 2 or 4 bytes, whatever their dtype; nothing is converted. Frozen elements never change.
The data layout is described in csrc/shield_core.hpp, built by compact/shards.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_ssu.compact.shards import ShardMask

LAYOUT = 3  # of pieces, tiles, element blocks and calls; an extension built for another one is not used
BLOCK = 8192  # elements between two running counts of an element mask
TILE_ROWS, TILE_COLUMNS = 16, 1024  # trainable elements that one CUDA thread block handles; columns that it shares
DENSE, SRC, ROWS, OUT, BIT, WIDTH, COUNT, STRIDE, COL, COST, TILE = range(11)  # columns of the pieces array
PADDING = 8  # readable bytes after every bit array: the kernels load whole words
LEVELS = ("portable", "avx2", "avx512", "avx512vbmi2")
_WORDS = {2: torch.int16, 4: torch.int32}  # dtypes that torch moves to the bit, by bytes
_CHUNK = 1 << 20  # elements whose bits torch unpacks at a time on CPU; on CUDA 16 times as many

_EXT: Any = None
_MISSING = ""
try:
    from megatron_ssu import _C as _loaded  # type: ignore[attr-defined]

    if (_loaded.LAYOUT, _loaded.BLOCK, _loaded.TILE_ROWS, _loaded.TILE_COLUMNS) == (
        LAYOUT,
        BLOCK,
        TILE_ROWS,
        TILE_COLUMNS,
    ):
        _EXT = _loaded
    else:
        _MISSING = "megatron_ssu._C was built from other sources: build it again"
except ImportError as error:
    _MISSING = f"megatron_ssu._C is not built: {error}"

_LEVEL = _EXT.best_level() if _EXT is not None else 0


def backend(device: torch.device | str = "cpu") -> str:
    """What moves elements on `device`: 'c++ avx512' (or another of LEVELS), 'cuda' or 'torch'."""
    kind = torch.device(device).type
    if _EXT is not None and kind == "cpu":
        return f"c++ {LEVELS[_LEVEL]}"
    return "cuda" if _EXT is not None and kind == "cuda" and _EXT.CUDA else "torch"


def why_torch(device: torch.device | str = "cpu") -> str:
    """Why `backend(device)` is 'torch', in one line; empty when it is not."""
    if backend(device) != "torch":
        return ""
    return _MISSING or f"megatron_ssu._C was built without a {torch.device(device).type} part"


@torch.no_grad()
def gather(mask: ShardMask, src: Tensor, out: Tensor) -> None:
    """Copy the trainable elements of `src` [R * C] into `out` [size]; see ShardMask.gather."""
    _check(mask, src, out)
    if mask.numel == 0:
        return
    if mask.frozen == 0 and mask.size == mask.length:
        out.copy_(src)
    elif backend(src.device) != "torch":
        _extension_gather(mask, src, out)
    else:
        torch_gather(mask, src, out)


@torch.no_grad()
def scatter(mask: ShardMask, values: Tensor, dst: Tensor) -> None:
    """Copy `values` [size] into the trainable elements of `dst` [R * C]; see ShardMask.scatter."""
    _check(mask, dst, values)
    if mask.numel == 0:
        return
    if mask.frozen == 0 and mask.size == mask.length:
        dst.copy_(values)
    elif backend(dst.device) != "torch":
        _extension_scatter(mask, values, dst)
    else:
        torch_scatter(mask, values, dst)


class ColumnGather:
    """x [T, inputs] -> a new tensor [T, width] of x[:, columns] and then zeros, to the bit and outside autograd.

    `columns`: int64 [K] ascending within [0, inputs), K <= width. Raises ValueError when they are not. Built once for
    the calls of every layer and micro-batch.
    """

    def __init__(self, columns: Tensor, inputs: int, width: int) -> None:
        chosen = check_columns(columns, inputs)
        if chosen.size > width:
            raise ValueError(f"{chosen.size} columns do not fit into {width}")
        self.inputs, self.width, self.count = inputs, width, chosen.size
        bits = np.concatenate([column_bits(chosen, inputs), np.zeros(PADDING, dtype=np.uint8)])
        self.bits = torch.from_numpy(bits)
        self.columns = torch.from_numpy(np.pad(chosen, (0, width - chosen.size), constant_values=-1).astype(np.int32))
        starts = np.searchsorted(chosen, np.arange(0, inputs, TILE_COLUMNS))
        self.starts = torch.from_numpy(np.append(starts, width).astype(np.int32))
        if columns.device.type != "cpu":
            self._move(columns.device)

    @property
    def device(self) -> torch.device:
        return self.bits.device

    def to(self, device: torch.device | str) -> ColumnGather:
        """The same columns with their index on `device`."""
        if torch.device(device) == self.device:
            return self
        moved = copy.copy(self)
        moved._move(device)
        return moved

    def _move(self, device: torch.device | str) -> None:
        self.bits, self.columns, self.starts = (t.to(device) for t in (self.bits, self.columns, self.starts))

    def __call__(self, x: Tensor) -> Tensor:
        """`x` as `gather_columns` takes it."""
        return gather_columns((self,), x)[0]

    def _check(self, x: Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.inputs or x.element_size() not in _WORDS or not x.is_contiguous():
            raise ValueError(
                f"columns come from contiguous [T, {self.inputs}] of 2 or 4 bytes: {tuple(x.shape)} {x.dtype}"
            )
        if x.device != self.device:
            raise ValueError(f"the columns are on {self.device}, the tensor on {x.device}")

    @torch.no_grad()
    def _torch(self, x: Tensor, out: Tensor) -> None:
        kind = _WORDS[x.element_size()]
        torch.index_select(x.view(kind), 1, self.columns.clamp(min=0), out=out.view(kind))
        out[:, self.count :] = 0


def gather_columns(gathers: Sequence[ColumnGather], x: Tensor, out: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
    """What each of `gathers` makes of x [T, inputs], which is read once for all of them: tensors [T, width].

    `x` is contiguous, of 2 or 4 bytes per element, on the device of their indices; else ValueError. The results are new, or
    `out`, contiguous and of x's dtype.
    """
    for gather in gathers:
        gather._check(x)
    if out is None:
        out = [x.new_empty(x.shape[0], gather.width) for gather in gathers]
    if x.numel() == 0:
        for part in out:
            part.zero_()
    elif _EXT is None or (x.is_cuda and not _EXT.CUDA):
        for gather, part in zip(gathers, out, strict=True):
            gather._torch(x, part)
    else:
        _extension_columns(gathers, x, out)
    return out


def check_columns(columns: Tensor, width: int) -> np.ndarray:
    """`columns`, integers of any dtype, as int64 on CPU. Raises ValueError unless they ascend within [0, width)."""
    chosen = columns.detach().cpu().numpy().astype(np.int64)
    if chosen.ndim != 1 or (chosen.size and (chosen[0] < 0 or chosen[-1] >= width or (np.diff(chosen) <= 0).any())):
        raise ValueError(f"trainable columns must ascend within [0, {width})")
    return chosen


def column_bits(columns: np.ndarray, width: int) -> np.ndarray:
    """uint8 [ceil(width / 64) * 8], lowest bit first, with the bits of `columns` set."""
    chosen = np.zeros((width + 63) // 64 * 64, dtype=bool)
    chosen[columns] = True
    return np.packbits(chosen, bitorder="little")


def column_sums(weight: Tensor, *, square: bool = False) -> Tensor:
    """Sums over rows of |w|, or of w * w, in float64: `weight` float32 or bfloat16 [R, C] -> float64 [C].

    The C++ path adds rows in order; torch pairs them, so the two agree to about 1e-15 relative, not to the bit.
    """
    rows, width = weight.shape
    if (
        weight.is_cuda
        or _EXT is None
        or weight.dtype not in (torch.float32, torch.bfloat16)
        or not weight.is_contiguous()
    ):
        wide = weight.detach().to(torch.float64)
        return (wide.square() if square else wide.abs()).sum(dim=0)
    out = torch.empty(width, dtype=torch.float64)
    a, size, threads = weight.data_ptr(), weight.element_size(), torch.get_num_threads()
    _EXT.column_sums(a, size, rows, width, int(square), out.data_ptr(), _LEVEL, threads)
    return out


def _check(mask: ShardMask, full: Tensor, compact: Tensor) -> None:
    if full.shape != (mask.length,) or compact.shape != (mask.size,):
        raise ValueError(
            f"a mask of {mask.length} elements, {mask.size} of them in the compact tensor, got {tuple(full.shape)} and "
            f"{tuple(compact.shape)}"
        )
    if full.dtype != compact.dtype or full.element_size() not in _WORDS:
        raise ValueError(f"full and compact elements have one dtype of 2 or 4 bytes: {full.dtype}, {compact.dtype}")
    if full.device != mask.device or compact.device != mask.device:
        raise ValueError(f"the mask is on {mask.device}, the tensors on {full.device} and {compact.device}")
    if not full.is_contiguous() or not compact.is_contiguous():
        raise ValueError("gather and scatter need contiguous tensors")


def _extension_columns(
    gathers: Sequence[ColumnGather], x: Tensor, found: Sequence[Tensor], level: int = _LEVEL
) -> None:
    pairs, call = zip(gathers, found, strict=True), (x.data_ptr(), x.element_size(), *x.shape)
    if x.is_cuda:
        sets = [(out.data_ptr(), g.columns.data_ptr(), g.starts.data_ptr(), g.width) for g, out in pairs]
        with torch.cuda.device(x.device):
            _EXT.cuda_gather_columns(*call, sets, torch.cuda.current_stream().cuda_stream)
    else:
        sets = [(out.data_ptr(), g.bits.data_ptr(), g.count, g.width) for g, out in pairs]
        _EXT.gather_columns(*call, sets, level, torch.get_num_threads())


def _extension_gather(mask: ShardMask, src: Tensor, out: Tensor, level: int = _LEVEL) -> None:
    _extension_move("gather", mask, src, out, level)


def _extension_scatter(mask: ShardMask, values: Tensor, dst: Tensor, level: int = _LEVEL) -> None:
    _extension_move("scatter", mask, values, dst, level)


def _extension_move(operation: str, mask: ShardMask, source: Tensor, target: Tensor, level: int) -> None:
    """`operation` is gather or scatter."""
    a, b, size = source.data_ptr(), target.data_ptr(), source.element_size()
    bits, index, pieces = mask.bits.data_ptr(), mask.index.data_ptr(), len(mask.host)
    name = f"{operation}_{'elements' if mask.elements else 'pieces'}"
    if source.is_cuda:
        move = getattr(_EXT, f"cuda_{name}")
        with torch.cuda.device(source.device):
            stream = torch.cuda.current_stream().cuda_stream
            if mask.elements:
                move(a, b, size, mask.length, bits, index, stream)
            else:
                move(a, b, size, index, pieces, mask.tiles, mask.columns.data_ptr(), stream)
        return
    move, threads = getattr(_EXT, name), torch.get_num_threads()
    if mask.elements:
        move(a, b, size, mask.length, bits, index, level, threads)
    else:
        move(a, b, size, index, pieces, bits, level, threads)


@torch.no_grad()
def torch_gather(mask: ShardMask, src: Tensor, out: Tensor) -> None:
    """`gather` in plain torch: no index or mask as long as the shard."""
    src, out = _words(src), _words(out)
    if mask.elements:
        for (first, last), chosen in _element_chunks(mask):
            torch.index_select(src, 0, chosen, out=out[first:last])
        return
    for full, compact, columns in _piece_views(mask, src, out):
        compact.copy_(full if columns is None else full.index_select(1, columns))


@torch.no_grad()
def torch_scatter(mask: ShardMask, values: Tensor, dst: Tensor) -> None:
    """`scatter` in plain torch; as `torch_gather`."""
    values, dst = _words(values), _words(dst)
    if mask.elements:
        for (first, last), chosen in _element_chunks(mask):
            dst.index_copy_(0, chosen, values[first:last])
        return
    for full, compact, columns in _piece_views(mask, dst, values):
        if columns is None:
            full.copy_(compact)
        else:
            full.index_copy_(1, columns, compact)


def _words(tensor: Tensor) -> Tensor:
    return tensor.view(_WORDS[tensor.element_size()])


def _piece_views(mask: ShardMask, full: Tensor, compact: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Each piece: rows of the shard [r, C], the same in the compact tensor without padding, int64 trainable columns."""
    for piece in mask.host.tolist():
        rows, width, count, stride = piece[ROWS], piece[WIDTH], piece[COUNT], piece[STRIDE]
        yield (
            full[piece[SRC] : piece[SRC] + rows * width].view(rows, width),
            compact[piece[OUT] : piece[OUT] + rows * stride].view(rows, stride)[:, :count],
            None if piece[DENSE] else mask.columns[piece[COL] : piece[COL] + count].long(),
        )


def _element_chunks(mask: ShardMask) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Stretches of whole blocks: ranks [first, last) of their trainable elements and the places of these in the shard."""
    counts = mask.host.tolist()
    blocks, step = len(counts) - 1, _CHUNK * (16 if mask.device.type == "cuda" else 1) // BLOCK
    for b in range(0, blocks, step):
        packed = mask.bits[b * BLOCK // 8 : (min((b + step) * BLOCK, mask.length) + 7) // 8]
        yield (counts[b], counts[min(b + step, blocks)]), _unpack(packed).nonzero().view(-1) + b * BLOCK


def _unpack(packed: Tensor) -> Tensor:
    """uint8 [n] bits, lowest first -> bool [8 * n]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).view(-1).bool()
