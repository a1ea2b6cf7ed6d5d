// Gather and scatter of trainable elements on CUDA; see shield_core.hpp for the data layout. Free of torch headers.
// Elements are words of 2 or 4 bytes (T is uint16_t or uint32_t): bits are moved, never converted.
//
// Pieces: the grid is cut into tiles of SSU_TILE_ROWS rows x SSU_TILE_COLUMNS trainable columns. A thread keeps its
// column numbers in registers and walks down the rows, so the column list is read once a tile; neighbouring lanes write
// (gather) or read (scatter) neighbouring compact elements. Elements: a block takes kBlock elements, a warp 1024 of
// them: 32 mask words, whose running counts come from a warp scan and from the block's entry in `counts`.
#include <cuda_runtime.h>

#include <type_traits>

#include "kernels.h"

namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = SSU_TILE_COLUMNS / kThreads;
constexpr int64_t kTileElements = int64_t{SSU_TILE_ROWS} * SSU_TILE_COLUMNS;
constexpr int64_t kBlock = 8192;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;   // rows, and
constexpr int kAhead = 8;  // words that a thread reads before it writes the first: so many reads are under way at once
static_assert(kBlock == int64_t{kWarps} * 1024, "a warp handles 32 words of 32 elements");
constexpr int kShared = 8;  // rows that a thread block keeps in shared memory: 32 KiB of 4-byte elements
constexpr int kSets = 4;    // sets of columns that one launch gathers

struct ColumnSets {
  ssu_columns set[kSets];
  int n;
};

// Two elements as one word.
__device__ inline uint32_t paired(uint16_t first, uint16_t second) { return first | static_cast<uint32_t>(second) << 16; }
__device__ inline uint2 paired(uint32_t first, uint32_t second) { return make_uint2(first, second); }

struct Piece {
  int64_t dense, src, rows, out, bit, width, count, stride, col, cost, tile;
};

struct Gather {
  template <typename T>
  __device__ static void expect(const T*) {}
  template <typename T>
  __device__ static const T* source(const T* full, const T*) {
    return full;
  }
  template <typename T>
  __device__ static T* target(T*, T* compact) {
    return compact;
  }
};

struct Scatter {
  // Bring a line of the shard into the L2 cache, of which some elements will be written: written without the others being
  // there it would be read when it is evicted.
  template <typename T>
  __device__ static void expect(const T* full) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(full));
  }
  template <typename T>
  __device__ static const T* source(const T*, const T* compact) {
    return compact;
  }
  template <typename T>
  __device__ static T* target(T* full, T*) {
    return full;
  }
};

// One thread block's copy of n words.
template <typename W>
__device__ void copy_words(const W* from, W* to, int64_t n) {
  for (int64_t begin = threadIdx.x; begin < n; begin += kAhead * kThreads) {
    W word[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (begin + i * kThreads < n) word[i] = from[begin + i * kThreads];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (begin + i * kThreads < n) to[begin + i * kThreads] = word[i];
    }
  }
}

template <typename T>
__device__ void copy_elements(const T* from, T* to, int64_t n) {
  constexpr int64_t each = sizeof(uint4) / sizeof(T);
  const bool aligned = (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % sizeof(uint4) == 0;
  const int64_t words = aligned ? n / each : 0;
  copy_words(reinterpret_cast<const uint4*>(from), reinterpret_cast<uint4*>(to), words);
  copy_words(from + words * each, to + words * each, n - words * each);
}

template <typename Op, typename T>
__global__ void __launch_bounds__(kThreads)
    pieces_kernel(T* full, T* compact, const Piece* pieces, int64_t n, const int32_t* columns) {
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
    T* part = full + p.src + begin;
    T* packed = compact + p.out + begin;
    copy_elements<T>(Op::source(part, packed), Op::target(part, packed), min(kTileElements, p.width - begin));
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
    offset[k] = j < p.count ? columns[p.col + j] : -1;
  }
  T* full_row = full + p.src + row0 * p.width;
  T* compact_row = compact + p.out + row0 * p.stride + column0;
  for (int64_t r = 0; r < rows; r += kRows, full_row += kRows * p.width, compact_row += kRows * p.stride) {
    T value[kRows][kPerThread];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        if (r + i < rows && offset[k] >= 0) Op::expect(full_row + i * p.width + offset[k]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        if (r + i < rows && offset[k] >= 0) {
          value[i][k] = *Op::source(full_row + i * p.width + offset[k], compact_row + i * p.stride + k * kThreads);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        if (r + i < rows && offset[k] >= 0) {
          *Op::target(full_row + i * p.width + offset[k], compact_row + i * p.stride + k * kThreads) = value[i][k];
        }
      }
    }
  }
}

template <typename Op, typename T>
__global__ void __launch_bounds__(kThreads)
    elements_kernel(T* full, T* compact, int64_t numel, const uint32_t* words, const int64_t* counts) {
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
  T* const part = full + begin + lane;
  T* const packed = compact + base;
  for (int i = 0; i < 32; i += kAhead) {
    int rank[kAhead];  // among the warp's trainable elements; -1: frozen
    T value[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const uint32_t m = __shfl_sync(0xffffffffu, word, i + j);
      const int before = __shfl_sync(0xffffffffu, exclusive, i + j);
      rank[j] = m >> lane & 1u ? before + __popc(m & ((1u << lane) - 1u)) : -1;
      if (rank[j] >= 0) value[j] = *Op::source(part + (i + j) * 32, packed + rank[j]);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (rank[j] >= 0) *Op::target(part + (i + j) * 32, packed + rank[j]) = value[j];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) columns_kernel(const T* x, T* out, int64_t rows, int64_t width,
                                                           int64_t stride, int64_t across, const int32_t* columns) {
  const int64_t row0 = blockIdx.x / across * SSU_TILE_ROWS;
  const int64_t column0 = blockIdx.x % across * SSU_TILE_COLUMNS + threadIdx.x;
  const int64_t height = min(int64_t{SSU_TILE_ROWS}, rows - row0);
  int64_t offset[kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t j = column0 + k * kThreads;
    offset[k] = j < stride ? columns[j] : -1;
  }
  const T* from = x + row0 * width;
  T* to = out + row0 * stride + column0;
  for (int64_t r = 0; r < height; r += kRows, from += kRows * width, to += kRows * stride) {
    T value[kRows][kPerThread];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        value[i][k] = r + i < height && offset[k] >= 0 ? from[i * width + offset[k]] : T{0};
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        if (r + i < height && column0 + k * kThreads < stride) to[i * stride + k * kThreads] = value[i][k];
      }
    }
  }
}

// Several sets of columns: kShared rows x SSU_TILE_COLUMNS columns of x are loaded once, for all sets.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    column_sets_kernel(const T* x, int64_t rows, int64_t width, int64_t across, ColumnSets sets) {
  __shared__ alignas(sizeof(uint4)) T tile[kShared][SSU_TILE_COLUMNS];
  const int64_t row0 = blockIdx.x / across * kShared;
  const int64_t segment = blockIdx.x % across, column0 = segment * SSU_TILE_COLUMNS;
  const int height = static_cast<int>(min(int64_t{kShared}, rows - row0));
  const int length = static_cast<int>(min(int64_t{SSU_TILE_COLUMNS}, width - column0));
  const T* from = x + row0 * width + column0;
  constexpr int each = sizeof(uint4) / sizeof(T), vectors = SSU_TILE_COLUMNS / each;
  if (width % each == 0 && reinterpret_cast<uintptr_t>(x) % sizeof(uint4) == 0) {
#pragma unroll
    for (int k = 0; k < kShared * vectors / kThreads; ++k) {
      const int v = threadIdx.x + k * kThreads, r = v / vectors, i = v % vectors * each;
      if (r < height && i < length) {
        *reinterpret_cast<uint4*>(&tile[r][i]) = *reinterpret_cast<const uint4*>(from + r * width + i);
      }
    }
  } else {
    for (int i = threadIdx.x; i < length; i += kThreads) {
#pragma unroll
      for (int r = 0; r < kShared; ++r) {
        if (r < height) tile[r][i] = from[r * width + i];
      }
    }
  }
  __syncthreads();
  for (int s = 0; s < sets.n; ++s) {
    const ssu_columns& set = sets.set[s];
    const int first = set.starts[segment], last = set.starts[segment + 1];
    T* const out = static_cast<T*>(set.out) + row0 * set.stride;
    // Two elements per thread and store, where both are this segment's and every row begins at an even one.
    const bool even = set.stride % 2 == 0 && reinterpret_cast<uintptr_t>(set.out) % (2 * sizeof(T)) == 0;
    for (int j = (first & ~1) + 2 * static_cast<int>(threadIdx.x); j < last; j += 2 * kThreads) {
      const bool a = j >= first, b = j + 1 < last;
      const int32_t column = a ? set.columns[j] : -1, next = b ? set.columns[j + 1] : -1;
      T* to = out + j;
      const int64_t x0 = column - column0, x1 = next - column0;
      if (a && b && even) {
#pragma unroll
        for (int r = 0; r < kShared; ++r) {
          if (r < height) {
            const auto pair = paired(column >= 0 ? tile[r][x0] : T{0}, next >= 0 ? tile[r][x1] : T{0});
            *reinterpret_cast<std::remove_const_t<decltype(pair)>*>(to + r * set.stride) = pair;
          }
        }
      } else {
        for (int r = 0; r < height; ++r, to += set.stride) {
          if (a) to[0] = column >= 0 ? tile[r][x0] : T{0};
          if (b) to[1] = next >= 0 ? tile[r][x1] : T{0};
        }
      }
    }
  }
}

template <typename Op, typename T>
int launch_pieces(void* full, void* compact, const int64_t* pieces, int64_t n, int64_t tiles, const int32_t* columns,
                  void* stream) {
  if (tiles == 0) return 0;
  pieces_kernel<Op><<<static_cast<unsigned>(tiles), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<T*>(full), static_cast<T*>(compact), reinterpret_cast<const Piece*>(pieces), n, columns);
  return static_cast<int>(cudaGetLastError());
}

template <typename Op, typename T>
int launch_elements(void* full, void* compact, int64_t numel, const uint8_t* bits, const int64_t* counts,
                    void* stream) {
  if (numel == 0) return 0;
  const auto blocks = static_cast<unsigned>((numel + kBlock - 1) / kBlock);
  elements_kernel<Op><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<T*>(full), static_cast<T*>(compact), numel, reinterpret_cast<const uint32_t*>(bits), counts);
  return static_cast<int>(cudaGetLastError());
}

template <typename T>
int launch_columns(const void* x, int64_t rows, int64_t width, const ssu_columns& set, void* stream) {
  if (rows == 0 || set.stride == 0) return 0;
  const int64_t across = (set.stride + SSU_TILE_COLUMNS - 1) / SSU_TILE_COLUMNS;
  const auto tiles = static_cast<unsigned>((rows + SSU_TILE_ROWS - 1) / SSU_TILE_ROWS * across);
  columns_kernel<<<tiles, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const T*>(x), static_cast<T*>(set.out), rows, width, set.stride, across, set.columns);
  return static_cast<int>(cudaGetLastError());
}

// A single set reads what it needs of x alone, which may be little of it.
template <typename T>
int launch_column_sets(const void* x, int64_t rows, int64_t width, const ssu_columns* sets, int n, void* stream) {
  if (n == 1) return launch_columns<T>(x, rows, width, sets[0], stream);
  if (rows == 0 || width == 0) return 0;
  const int64_t across = (width + SSU_TILE_COLUMNS - 1) / SSU_TILE_COLUMNS;
  const auto tiles = static_cast<unsigned>((rows + kShared - 1) / kShared * across);
  for (int first = 0; first < n; first += kSets) {
    ColumnSets some{};
    some.n = n - first < kSets ? n - first : kSets;
    for (int s = 0; s < some.n; ++s) some.set[s] = sets[first + s];
    column_sets_kernel<<<tiles, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const T*>(x), rows, width,
                                                                                  across, some);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

extern "C" {

int ssu_cuda_gather_pieces(const void* src, void* out, int size, const int64_t* pieces, int64_t n, int64_t tiles,
                           const int32_t* columns, void* stream) {
  const auto launch = size == 2 ? launch_pieces<Gather, uint16_t> : launch_pieces<Gather, uint32_t>;
  return launch(const_cast<void*>(src), out, pieces, n, tiles, columns, stream);
}

int ssu_cuda_scatter_pieces(const void* values, void* dst, int size, const int64_t* pieces, int64_t n, int64_t tiles,
                            const int32_t* columns, void* stream) {
  const auto launch = size == 2 ? launch_pieces<Scatter, uint16_t> : launch_pieces<Scatter, uint32_t>;
  return launch(dst, const_cast<void*>(values), pieces, n, tiles, columns, stream);
}

int ssu_cuda_gather_elements(const void* src, void* out, int size, int64_t numel, const uint8_t* bits,
                             const int64_t* counts, void* stream) {
  const auto launch = size == 2 ? launch_elements<Gather, uint16_t> : launch_elements<Gather, uint32_t>;
  return launch(const_cast<void*>(src), out, numel, bits, counts, stream);
}

int ssu_cuda_scatter_elements(const void* values, void* dst, int size, int64_t numel, const uint8_t* bits,
                              const int64_t* counts, void* stream) {
  const auto launch = size == 2 ? launch_elements<Scatter, uint16_t> : launch_elements<Scatter, uint32_t>;
  return launch(dst, const_cast<void*>(values), numel, bits, counts, stream);
}

int ssu_cuda_gather_columns(const void* x, int size, int64_t rows, int64_t width, const ssu_columns* sets, int n,
                            void* stream) {
  const auto launch = size == 2 ? launch_column_sets<uint16_t> : launch_column_sets<uint32_t>;
  return launch(x, rows, width, sets, n, stream);
}

const char* ssu_cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // extern "C"
