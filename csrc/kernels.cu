// Gather and scatter of trainable elements on CUDA; see shield_core.hpp for the data layout. Free of torch headers.
//
// Pieces: the grid is cut into tiles of SSU_TILE_ROWS rows x SSU_TILE_COLUMNS trainable columns. A thread keeps its
// column numbers in registers and walks down the rows, so the column list is read once a tile; neighbouring lanes write
// (gather) or read (scatter) neighbouring compact elements. Elements: a block takes kBlock elements, a warp 1024 of
// them: 32 mask words, whose running counts come from a warp scan and from the block's entry in `counts`.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels.h"

namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = SSU_TILE_COLUMNS / kThreads;
constexpr int64_t kTileElements = int64_t{SSU_TILE_ROWS} * SSU_TILE_COLUMNS;
constexpr int64_t kBlock = 8192;
constexpr int kWarps = kThreads / 32;
static_assert(kBlock == int64_t{kWarps} * 1024, "a warp handles 32 words of 32 elements");

struct Piece {
  int64_t dense, src, rows, out, bit, width, count, col, first, cost, tile;
};

struct Gather {
  template <typename T>
  __device__ static void move(T* full, float* compact) {
    *compact = static_cast<float>(*full);
  }
};

struct Scatter {
  __device__ static void move(float* full, float* compact) { *full = *compact; }
  __device__ static void move(__nv_bfloat16* full, float* compact) { *full = __float2bfloat16_rn(*compact); }
};

template <typename Op, typename T>
__global__ void __launch_bounds__(kThreads)
    pieces_kernel(T* full, float* compact, const Piece* pieces, int64_t n, const int32_t* columns) {
  const int64_t tile = blockIdx.x;
  int64_t low = 0, high = n;  // the last piece whose first tile is not after this one
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (pieces[middle].tile <= tile) low = middle;
    else high = middle;
  }
  const Piece p = pieces[low];
  const int64_t local = tile - p.tile;

  if (p.dense) {
    const int64_t begin = local * kTileElements;
    const int64_t end = min(begin + kTileElements, p.width);
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) Op::move(full + p.src + i, compact + p.out + i);
    return;
  }

  const int64_t across = (p.count + SSU_TILE_COLUMNS - 1) / SSU_TILE_COLUMNS;
  const int64_t row0 = local / across * SSU_TILE_ROWS;
  const int64_t column0 = local % across * SSU_TILE_COLUMNS + threadIdx.x;
  const int64_t rows = min(int64_t{SSU_TILE_ROWS}, p.rows - row0);
  int64_t offset[kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t j = column0 + k * kThreads;
    offset[k] = j < p.count ? columns[p.col + j] - p.first : -1;
  }
  T* full_row = full + p.src + row0 * p.width;
  float* compact_row = compact + p.out + row0 * p.count + column0;
#pragma unroll 4
  for (int64_t r = 0; r < rows; ++r, full_row += p.width, compact_row += p.count) {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if (offset[k] >= 0) Op::move(full_row + offset[k], compact_row + k * kThreads);
    }
  }
}

template <typename Op, typename T>
__global__ void __launch_bounds__(kThreads)
    elements_kernel(T* full, float* compact, int64_t numel, const uint32_t* words, const int64_t* counts) {
  __shared__ int warp_total[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t begin = blockIdx.x * kBlock + warp * int64_t{1024};
  const int64_t mine = begin / 32 + lane;  // each lane loads one of the warp's 32 words; bits past numel are zero
  const uint32_t word = mine * 32 < numel ? words[mine] : 0u;
  int inclusive = __popc(word);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) warp_total[warp] = inclusive;
  __syncthreads();
  int64_t base = counts[blockIdx.x];
  for (int w = 0; w < warp; ++w) base += warp_total[w];
  const int exclusive = inclusive - __popc(word);
#pragma unroll 8
  for (int i = 0; i < 32; ++i) {
    const uint32_t m = __shfl_sync(0xffffffffu, word, i);
    const int before = __shfl_sync(0xffffffffu, exclusive, i);
    if (m >> lane & 1u) {
      const int rank = before + __popc(m & ((1u << lane) - 1u));
      Op::move(full + begin + i * 32 + lane, compact + base + rank);
    }
  }
}

template <typename Op>
int launch_pieces(void* full, int type, float* compact, const int64_t* pieces, int64_t n, int64_t tiles,
                  const int32_t* columns, void* stream) {
  if (tiles == 0) return 0;
  const auto* p = reinterpret_cast<const Piece*>(pieces);
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(tiles));
  if (type == SSU_FLOAT32) {
    pieces_kernel<Op><<<grid, kThreads, 0, s>>>(static_cast<float*>(full), compact, p, n, columns);
  } else {
    pieces_kernel<Op><<<grid, kThreads, 0, s>>>(static_cast<__nv_bfloat16*>(full), compact, p, n, columns);
  }
  return static_cast<int>(cudaGetLastError());
}

template <typename Op>
int launch_elements(void* full, int type, float* compact, int64_t numel, const uint8_t* bits, const int64_t* counts,
                    void* stream) {
  if (numel == 0) return 0;
  const auto* words = reinterpret_cast<const uint32_t*>(bits);
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>((numel + kBlock - 1) / kBlock));
  if (type == SSU_FLOAT32) {
    elements_kernel<Op><<<grid, kThreads, 0, s>>>(static_cast<float*>(full), compact, numel, words, counts);
  } else {
    elements_kernel<Op><<<grid, kThreads, 0, s>>>(static_cast<__nv_bfloat16*>(full), compact, numel, words, counts);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

extern "C" {

int ssu_cuda_gather_pieces(const void* src, int type, float* out, const int64_t* pieces, int64_t n, int64_t tiles,
                           const int32_t* columns, void* stream) {
  return launch_pieces<Gather>(const_cast<void*>(src), type, out, pieces, n, tiles, columns, stream);
}

int ssu_cuda_scatter_pieces(const float* values, void* dst, int type, const int64_t* pieces, int64_t n, int64_t tiles,
                            const int32_t* columns, void* stream) {
  return launch_pieces<Scatter>(dst, type, const_cast<float*>(values), pieces, n, tiles, columns, stream);
}

int ssu_cuda_gather_elements(const void* src, int type, float* out, int64_t numel, const uint8_t* bits,
                             const int64_t* counts, void* stream) {
  return launch_elements<Gather>(const_cast<void*>(src), type, out, numel, bits, counts, stream);
}

int ssu_cuda_scatter_elements(const float* values, void* dst, int type, int64_t numel, const uint8_t* bits,
                              const int64_t* counts, void* stream) {
  return launch_elements<Scatter>(dst, type, const_cast<float*>(values), numel, bits, counts, stream);
}

const char* ssu_cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // extern "C"
