// Shared between bindings.cpp and kernels.cu: constants of the data layout and the CUDA launchers.
#pragma once

#include <stdint.h>

#define SSU_LAYOUT 3  // raise when Piece, its tiles, the element blocks or a signature change: a stale build is refused
#define SSU_TILE_ROWS 16
#define SSU_TILE_COLUMNS 1024

#ifdef __cplusplus
extern "C" {
#endif

// All addresses are device memory; `size` is the bytes of an element, 2 or 4; `stream` is a cudaStream_t; 0 is success,
// else see ssu_cuda_error.
int ssu_cuda_gather_pieces(const void* src, void* out, int size, const int64_t* pieces, int64_t n, int64_t tiles,
                           const int32_t* columns, void* stream);
int ssu_cuda_scatter_pieces(const void* values, void* dst, int size, const int64_t* pieces, int64_t n, int64_t tiles,
                            const int32_t* columns, void* stream);
int ssu_cuda_gather_elements(const void* src, void* out, int size, int64_t numel, const uint8_t* bits,
                             const int64_t* counts, void* stream);
int ssu_cuda_scatter_elements(const void* values, void* dst, int size, int64_t numel, const uint8_t* bits,
                              const int64_t* counts, void* stream);
// x [rows, width] -> each set's out [rows, stride]: out[:, j] = x[:, columns[j]], or zeros where columns[j] is negative.
// From starts[k] on columns[j] are SSU_TILE_COLUMNS * k or more; behind the last of these stands `stride`.
typedef struct {
  void* out;
  const int32_t* columns;
  const int32_t* starts;
  int64_t stride;
} ssu_columns;
int ssu_cuda_gather_columns(const void* x, int size, int64_t rows, int64_t width, const ssu_columns* sets, int n,
                            void* stream);
const char* ssu_cuda_error(int status);

#ifdef __cplusplus
}
#endif
