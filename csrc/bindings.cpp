// megatron_ssu._C: the core behind plain addresses. megatron_ssu/shield/kernels.py checks dtypes, devices and sizes and
// is the only caller; taking addresses keeps torch's headers and C++ ABI out, so one build serves every torch version.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "column_sums.hpp"
#include "kernels.h"
#include "shield_core.hpp"

namespace py = pybind11;

namespace {

template <typename T>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

enum Type : int { kFloat32 = SSU_FLOAT32, kBfloat16 = SSU_BFLOAT16 };

void check_level(int level) {
  if (level < 0 || level > ssu::best_level())
    throw std::invalid_argument("this processor lacks the asked-for SIMD level");
}

void gather_pieces(uint64_t src, int type, uint64_t out, uint64_t pieces, int64_t n, uint64_t bits, int level,
                   int threads) {
  check_level(level);
  const auto* p = at<const ssu::Piece>(pieces);
  const auto* b = at<const uint8_t>(bits);
  if (type == kFloat32) return ssu::gather_pieces(at<const float>(src), at<float>(out), p, n, b, level, threads);
  ssu::gather_pieces(at<const ssu::bf16>(src), at<float>(out), p, n, b, level, threads);
}

void scatter_pieces(uint64_t values, uint64_t dst, int type, uint64_t pieces, int64_t n, uint64_t bits, uint16_t nan,
                    int level, int threads) {
  check_level(level);
  const auto* p = at<const ssu::Piece>(pieces);
  const auto* b = at<const uint8_t>(bits);
  const auto* v = at<const float>(values);
  if (type == kFloat32) return ssu::scatter_pieces(v, at<float>(dst), p, n, b, nan, level, threads);
  ssu::scatter_pieces(v, at<ssu::bf16>(dst), p, n, b, nan, level, threads);
}

void gather_elements(uint64_t src, int type, uint64_t out, int64_t numel, uint64_t bits, uint64_t counts, int level,
                     int threads) {
  check_level(level);
  const auto* b = at<const uint8_t>(bits);
  const auto* c = at<const int64_t>(counts);
  if (type == kFloat32) return ssu::gather_elements(at<const float>(src), at<float>(out), numel, b, c, level, threads);
  ssu::gather_elements(at<const ssu::bf16>(src), at<float>(out), numel, b, c, level, threads);
}

void scatter_elements(uint64_t values, uint64_t dst, int type, int64_t numel, uint64_t bits, uint64_t counts,
                      uint16_t nan, int level, int threads) {
  check_level(level);
  const auto* b = at<const uint8_t>(bits);
  const auto* c = at<const int64_t>(counts);
  const auto* v = at<const float>(values);
  if (type == kFloat32) return ssu::scatter_elements(v, at<float>(dst), numel, b, c, nan, level, threads);
  ssu::scatter_elements(v, at<ssu::bf16>(dst), numel, b, c, nan, level, threads);
}

void column_sums(uint64_t w, int type, int64_t rows, int64_t width, int square, uint64_t out, int level, int threads) {
  check_level(level);
  auto* o = at<double>(out);
  if (type == kFloat32) return ssu::column_sums(at<const float>(w), rows, width, square, o, level, threads);
  ssu::column_sums(at<const ssu::bf16>(w), rows, width, square, o, level, threads);
}

#if defined(SSU_WITH_CUDA)
void check_cuda(int status) {
  if (status != 0) throw std::runtime_error(std::string("CUDA: ") + ssu_cuda_error(status));
}

void cuda_gather_pieces(uint64_t src, int type, uint64_t out, uint64_t pieces, int64_t n, int64_t tiles,
                        uint64_t columns, uint64_t stream) {
  check_cuda(ssu_cuda_gather_pieces(at<const void>(src), type, at<float>(out), at<const int64_t>(pieces), n, tiles,
                                    at<const int32_t>(columns), at<void>(stream)));
}

void cuda_scatter_pieces(uint64_t values, uint64_t dst, int type, uint64_t pieces, int64_t n, int64_t tiles,
                         uint64_t columns, uint64_t stream) {
  check_cuda(ssu_cuda_scatter_pieces(at<const float>(values), at<void>(dst), type, at<const int64_t>(pieces), n, tiles,
                                     at<const int32_t>(columns), at<void>(stream)));
}

void cuda_gather_elements(uint64_t src, int type, uint64_t out, int64_t numel, uint64_t bits, uint64_t counts,
                          uint64_t stream) {
  check_cuda(ssu_cuda_gather_elements(at<const void>(src), type, at<float>(out), numel, at<const uint8_t>(bits),
                                      at<const int64_t>(counts), at<void>(stream)));
}

void cuda_scatter_elements(uint64_t values, uint64_t dst, int type, int64_t numel, uint64_t bits, uint64_t counts,
                           uint64_t stream) {
  check_cuda(ssu_cuda_scatter_elements(at<const float>(values), at<void>(dst), type, numel, at<const uint8_t>(bits),
                                       at<const int64_t>(counts), at<void>(stream)));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Gather and scatter of trainable elements; called through megatron_ssu.shield.kernels only.";
  m.attr("LAYOUT") = SSU_LAYOUT;
  m.attr("BLOCK") = ssu::kBlock;
  m.attr("TILE_ROWS") = SSU_TILE_ROWS;
  m.attr("TILE_COLUMNS") = SSU_TILE_COLUMNS;
  m.def("best_level", &ssu::best_level);
  const auto free_gil = py::call_guard<py::gil_scoped_release>();
  m.def("gather_pieces", &gather_pieces, free_gil);
  m.def("scatter_pieces", &scatter_pieces, free_gil);
  m.def("gather_elements", &gather_elements, free_gil);
  m.def("scatter_elements", &scatter_elements, free_gil);
  m.def("column_sums", &column_sums, free_gil);
#if defined(SSU_WITH_CUDA)
  m.attr("CUDA") = true;
  m.def("cuda_gather_pieces", &cuda_gather_pieces, free_gil);
  m.def("cuda_scatter_pieces", &cuda_scatter_pieces, free_gil);
  m.def("cuda_gather_elements", &cuda_gather_elements, free_gil);
  m.def("cuda_scatter_elements", &cuda_scatter_elements, free_gil);
#else
  m.attr("CUDA") = false;
#endif
}
