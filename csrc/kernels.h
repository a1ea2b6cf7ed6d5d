// Shared between bindings.cpp and kernels.cu: constants of the data layout and the CUDA launchers.
#pragma once

#include <stdint.h>

#define SSU_LAYOUT 1  // raise when Piece, its tiles or the element blocks change: a stale build is then refused
#define SSU_FLOAT32 0
#define SSU_BFLOAT16 1
#define SSU_TILE_ROWS 16
#define SSU_TILE_COLUMNS 1024

#ifdef __cplusplus
extern "C" {
#endif

// All addresses are device memory; `stream` is a cudaStream_t; 0 is success, else see ssu_cuda_error.
int ssu_cuda_gather_pieces(const void* src, int type, float* out, const int64_t* pieces, int64_t n, int64_t tiles,
                           const int32_t* columns, void* stream);
int ssu_cuda_scatter_pieces(const float* values, void* dst, int type, const int64_t* pieces, int64_t n, int64_t tiles,
                            const int32_t* columns, void* stream);
int ssu_cuda_gather_elements(const void* src, int type, float* out, int64_t numel, const uint8_t* bits,
                             const int64_t* counts, void* stream);
int ssu_cuda_scatter_elements(const float* values, void* dst, int type, int64_t numel, const uint8_t* bits,
                              const int64_t* counts, void* stream);
const char* ssu_cuda_error(int status);

#ifdef __cplusplus
}
#endif
