"""Gather and scatter of a shard's trainable elements: the C++/CUDA extension where it is built, torch otherwise.

Both write the same bits. `gather` casts float32, bfloat16 or float16 to float32; `scatter` casts float32 back, rounding
to nearest even as `Tensor.to` does, NaN included, and never changes a frozen element. The extension covers float32 and
bfloat16; float16 always takes torch. The data layout is described in csrc/shield_core.hpp, built by shield/shards.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_ssu.shield.shards import ShardMask

LAYOUT = 1  # of pieces, tiles and element blocks; an extension built for another one is not used
BLOCK = 8192  # elements between two running counts of an element mask
TILE_ROWS, TILE_COLUMNS = 16, 1024  # trainable elements that one CUDA thread block handles
DENSE, SRC, ROWS, OUT, BIT, WIDTH, COUNT, COL, FIRST, COST, TILE = range(11)  # columns of the pieces array
LEVELS = ("portable", "avx2", "avx512")
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_CHUNK = 1 << 20  # elements that a torch pass holds in a temporary on CPU; on CUDA 16 times as many

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
# Builds of torch differ in the bits that a NaN becomes; ask this one, so that the kernels write the same.
_NAN = int(torch.full((1,), math.nan).to(torch.bfloat16).view(torch.int16).item()) & 0xFFFF


def backend(device: torch.device | str = "cpu") -> str:
    """What handles float32 and bfloat16 on `device`: 'c++ avx512' ('avx2', 'portable'), 'cuda' or 'torch'."""
    kind = torch.device(device).type
    if _EXT is not None and kind == "cpu":
        return f"c++ {LEVELS[_LEVEL]}"
    return "cuda" if _EXT is not None and kind == "cuda" and _EXT.CUDA else "torch"


def why_torch(device: torch.device | str = "cpu") -> str:
    """Why `backend(device)` is 'torch', in one line; empty when it is not."""
    if backend(device) != "torch":
        return ""
    return _MISSING or f"megatron_ssu._C was built without a {torch.device(device).type} part"


def gather(mask: ShardMask, src: Tensor, out: Tensor) -> None:
    """out[k] = float32(src[k-th trainable element]). `src` flat [end - start], `out` float32 [numel]."""
    _check(mask, src, out)
    if mask.numel == 0:
        return
    if mask.frozen == 0:
        out.copy_(src)
    elif src.dtype in _TYPES and backend(src.device) != "torch":
        _extension_gather(mask, src, out)
    else:
        torch_gather(mask, src, out)


def scatter(mask: ShardMask, values: Tensor, dst: Tensor) -> None:
    """dst[k-th trainable element] = cast(values[k]). `values` float32 [numel], `dst` flat [end - start]."""
    _check(mask, dst, values)
    if mask.numel == 0:
        return
    if mask.frozen == 0:
        dst.copy_(values)
    elif dst.dtype in _TYPES and backend(dst.device) != "torch":
        _extension_scatter(mask, values, dst)
    else:
        torch_scatter(mask, values, dst)


def column_sums(weight: Tensor, *, square: bool = False) -> Tensor:
    """Sums over rows of |w|, or of w * w, in float64: `weight` float32 or bfloat16 [R, C] -> float64 [C].

    The C++ path adds rows in order; torch pairs them, so the two agree to about 1e-15 relative, not to the bit.
    """
    rows, width = weight.shape
    if weight.is_cuda or _EXT is None or weight.dtype not in _TYPES or not weight.is_contiguous():
        wide = weight.detach().to(torch.float64)
        return (wide.square() if square else wide.abs()).sum(dim=0)
    out = torch.empty(width, dtype=torch.float64)
    kind = _TYPES[weight.dtype]
    _EXT.column_sums(weight.data_ptr(), kind, rows, width, int(square), out.data_ptr(), _LEVEL, torch.get_num_threads())
    return out


def _check(mask: ShardMask, full: Tensor, compact: Tensor) -> None:
    if full.shape != (mask.length,) or compact.shape != (mask.numel,):
        raise ValueError(
            f"a mask of {mask.numel} trainable elements among {mask.length} got {tuple(full.shape)} and "
            f"{tuple(compact.shape)}"
        )
    if full.dtype not in (torch.float32, torch.bfloat16, torch.float16) or compact.dtype != torch.float32:
        raise ValueError(
            f"full elements are float32, bfloat16 or float16, compact ones float32: {full.dtype}, {compact.dtype}"
        )
    if full.device != mask.device or compact.device != mask.device:
        raise ValueError(f"the mask is on {mask.device}, the tensors on {full.device} and {compact.device}")
    if not full.is_contiguous() or not compact.is_contiguous():
        raise ValueError("gather and scatter need contiguous tensors")


def _extension_gather(mask: ShardMask, src: Tensor, out: Tensor, level: int = _LEVEL) -> None:
    kind, threads = _TYPES[src.dtype], torch.get_num_threads()
    a, b, bits, index = src.data_ptr(), out.data_ptr(), mask.bits.data_ptr(), mask.index.data_ptr()
    if src.is_cuda:
        with torch.cuda.device(src.device):
            stream = torch.cuda.current_stream().cuda_stream
            if mask.elements:
                _EXT.cuda_gather_elements(a, kind, b, mask.length, bits, index, stream)
            else:
                columns = mask.columns.data_ptr()
                _EXT.cuda_gather_pieces(a, kind, b, index, len(mask.host), mask.tiles, columns, stream)
    elif mask.elements:
        _EXT.gather_elements(a, kind, b, mask.length, bits, index, level, threads)
    else:
        _EXT.gather_pieces(a, kind, b, index, len(mask.host), bits, level, threads)


def _extension_scatter(mask: ShardMask, values: Tensor, dst: Tensor, level: int = _LEVEL) -> None:
    kind, threads = _TYPES[dst.dtype], torch.get_num_threads()
    a, b, bits, index = values.data_ptr(), dst.data_ptr(), mask.bits.data_ptr(), mask.index.data_ptr()
    if dst.is_cuda:
        with torch.cuda.device(dst.device):
            stream = torch.cuda.current_stream().cuda_stream
            if mask.elements:
                _EXT.cuda_scatter_elements(a, b, kind, mask.length, bits, index, stream)
            else:
                columns = mask.columns.data_ptr()
                _EXT.cuda_scatter_pieces(a, b, kind, index, len(mask.host), mask.tiles, columns, stream)
    elif mask.elements:
        _EXT.scatter_elements(a, b, kind, mask.length, bits, index, _NAN, level, threads)
    else:
        _EXT.scatter_pieces(a, b, kind, index, len(mask.host), bits, _NAN, level, threads)


@torch.no_grad()
def torch_gather(mask: ShardMask, src: Tensor, out: Tensor) -> None:
    """`gather` in plain torch: no index or mask as long as the shard, temporaries of about a million elements."""
    chunk = _CHUNK * (16 if src.is_cuda else 1)
    if mask.elements:
        for at, stop, first, last in _element_chunks(mask, chunk):
            chosen = _unpack(mask.bits[at // 8 : (stop + 7) // 8], stop - at).nonzero().view(-1)
            out[first:last].copy_(src[at:stop].index_select(0, chosen))
        return
    for piece in mask.host.tolist():
        rows, width, count = piece[ROWS], piece[WIDTH], piece[COUNT]
        full = src[piece[SRC] : piece[SRC] + rows * width].view(rows, width)
        compact = out[piece[OUT] : piece[OUT] + rows * count].view(rows, count)
        if piece[DENSE]:
            compact.copy_(full)
            continue
        columns = mask.columns[piece[COL] : piece[COL] + count] - piece[FIRST]
        step = rows if src.dtype == torch.float32 else max(1, chunk // width)
        for r in range(0, rows, step):
            # index_select of 16-bit elements is slower than widening first; float32 passes through .to() uncopied
            torch.index_select(full[r : r + step].to(torch.float32), 1, columns, out=compact[r : r + step])


@torch.no_grad()
def torch_scatter(mask: ShardMask, values: Tensor, dst: Tensor) -> None:
    """`scatter` in plain torch; as `torch_gather`."""
    chunk = _CHUNK * (16 if dst.is_cuda else 1)
    if mask.elements:
        for at, stop, first, last in _element_chunks(mask, chunk):
            chosen = _unpack(mask.bits[at // 8 : (stop + 7) // 8], stop - at).nonzero().view(-1)
            dst[at:stop].index_copy_(0, chosen, values[first:last].to(dst.dtype))
        return
    for piece in mask.host.tolist():
        rows, width, count = piece[ROWS], piece[WIDTH], piece[COUNT]
        full = dst[piece[SRC] : piece[SRC] + rows * width].view(rows, width)
        compact = values[piece[OUT] : piece[OUT] + rows * count].view(rows, count)
        if piece[DENSE]:
            full.copy_(compact)
            continue
        columns = (mask.columns[piece[COL] : piece[COL] + count] - piece[FIRST]).long()
        step = rows if dst.dtype == torch.float32 else max(1, chunk // count)
        for r in range(0, rows, step):
            full[r : r + step].index_copy_(1, columns, compact[r : r + step].to(dst.dtype))


def _element_chunks(mask: ShardMask, chunk: int) -> list[tuple[int, int, int, int]]:
    """(first element, last + 1, first trainable rank, last + 1) of stretches of whole blocks."""
    counts = mask.host.tolist()
    blocks, step = len(counts) - 1, chunk // BLOCK
    return [
        (b * BLOCK, min((b + step) * BLOCK, mask.length), counts[b], counts[min(b + step, blocks)])
        for b in range(0, blocks, step)
    ]


def _unpack(packed: Tensor, count: int) -> Tensor:
    """uint8 bits, lowest first -> bool [count]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).view(-1)[:count].bool()
