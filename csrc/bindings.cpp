// megatron_ssu._C: the core behind plain addresses. Its only caller, megatron_ssu/ops/kernels.py, checks dtypes,
// devices and sizes; taking addresses keeps torch's headers and C++ ABI out, so one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "column_sums.hpp"
#include "kernels.h"
#include "shield_core.hpp"

namespace py = pybind11;

namespace {

template <typename T>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

void check_level(int level) {
  if (level < 0 || level > ssu::best_level())
    throw std::invalid_argument("this processor lacks the asked-for SIMD level");
}

// work(uint16_t) or work(uint32_t), by the bytes of an element.
template <typename F>
void by_size(int size, F work) {
  if (size == 2) return work(uint16_t{});
  if (size == 4) return work(uint32_t{});
  throw std::invalid_argument("elements have 2 or 4 bytes");
}

void gather_pieces(uint64_t src, uint64_t out, int size, uint64_t pieces, int64_t n, uint64_t bits, int level,
                   int threads) {
  check_level(level);
  by_size(size, [=](auto word) {
    using T = decltype(word);
    ssu::gather_pieces(at<const T>(src), at<T>(out), at<const ssu::Piece>(pieces), n, at<const uint8_t>(bits), level,
                       threads);
  });
}

void scatter_pieces(uint64_t values, uint64_t dst, int size, uint64_t pieces, int64_t n, uint64_t bits, int level,
                    int threads) {
  check_level(level);
  by_size(size, [=](auto word) {
    using T = decltype(word);
    ssu::scatter_pieces(at<const T>(values), at<T>(dst), at<const ssu::Piece>(pieces), n, at<const uint8_t>(bits),
                        level, threads);
  });
}

void gather_elements(uint64_t src, uint64_t out, int size, int64_t numel, uint64_t bits, uint64_t counts, int level,
                     int threads) {
  check_level(level);
  by_size(size, [=](auto word) {
    using T = decltype(word);
    ssu::gather_elements(at<const T>(src), at<T>(out), numel, at<const uint8_t>(bits), at<const int64_t>(counts), level,
                         threads);
  });
}

void scatter_elements(uint64_t values, uint64_t dst, int size, int64_t numel, uint64_t bits, uint64_t counts, int level,
                      int threads) {
  check_level(level);
  by_size(size, [=](auto word) {
    using T = decltype(word);
    ssu::scatter_elements(at<const T>(values), at<T>(dst), numel, at<const uint8_t>(bits), at<const int64_t>(counts),
                          level, threads);
  });
}

using Sets = std::vector<std::array<uint64_t, 4>>;

// `sets`: out, bits, count, stride.
void gather_columns(uint64_t x, int size, int64_t rows, int64_t width, const Sets& sets, int level, int threads) {
  check_level(level);
  by_size(size, [&](auto word) {
    using T = decltype(word);
    std::vector<ssu::ColumnSet<T>> found;
    for (const auto& [out, bits, count, stride] : sets)
      found.push_back({at<T>(out), at<const uint8_t>(bits), static_cast<int64_t>(count), static_cast<int64_t>(stride)});
    ssu::gather_columns(at<const T>(x), rows, width, found.data(), static_cast<int64_t>(found.size()), level, threads);
  });
}

void column_sums(uint64_t w, int size, int64_t rows, int64_t width, int square, uint64_t out, int level, int threads) {
  check_level(level);
  auto* o = at<double>(out);
  if (size == 4) return ssu::column_sums(at<const float>(w), rows, width, square, o, level, threads);
  ssu::column_sums(at<const ssu::bf16>(w), rows, width, square, o, level, threads);
}

#if defined(SSU_WITH_CUDA)
void check_cuda(int status) {
  if (status != 0) throw std::runtime_error(std::string("CUDA: ") + ssu_cuda_error(status));
}

void cuda_gather_pieces(uint64_t src, uint64_t out, int size, uint64_t pieces, int64_t n, int64_t tiles,
                        uint64_t columns, uint64_t stream) {
  check_cuda(ssu_cuda_gather_pieces(at<const void>(src), at<void>(out), size, at<const int64_t>(pieces), n, tiles,
                                    at<const int32_t>(columns), at<void>(stream)));
}

void cuda_scatter_pieces(uint64_t values, uint64_t dst, int size, uint64_t pieces, int64_t n, int64_t tiles,
                         uint64_t columns, uint64_t stream) {
  check_cuda(ssu_cuda_scatter_pieces(at<const void>(values), at<void>(dst), size, at<const int64_t>(pieces), n, tiles,
                                     at<const int32_t>(columns), at<void>(stream)));
}

void cuda_gather_elements(uint64_t src, uint64_t out, int size, int64_t numel, uint64_t bits, uint64_t counts,
                          uint64_t stream) {
  check_cuda(ssu_cuda_gather_elements(at<const void>(src), at<void>(out), size, numel, at<const uint8_t>(bits),
                                      at<const int64_t>(counts), at<void>(stream)));
}

void cuda_scatter_elements(uint64_t values, uint64_t dst, int size, int64_t numel, uint64_t bits, uint64_t counts,
                           uint64_t stream) {
  check_cuda(ssu_cuda_scatter_elements(at<const void>(values), at<void>(dst), size, numel, at<const uint8_t>(bits),
                                       at<const int64_t>(counts), at<void>(stream)));
}

// `sets`: out, columns, starts, stride.
void cuda_gather_columns(uint64_t x, int size, int64_t rows, int64_t width, const Sets& sets, uint64_t stream) {
  std::vector<ssu_columns> found;
  for (const auto& [out, columns, starts, stride] : sets)
    found.push_back(
        {at<void>(out), at<const int32_t>(columns), at<const int32_t>(starts), static_cast<int64_t>(stride)});
  check_cuda(ssu_cuda_gather_columns(at<const void>(x), size, rows, width, found.data(),
                                     static_cast<int>(found.size()), at<void>(stream)));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Gather and scatter of trainable elements; called through megatron_ssu.ops.kernels only.";
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
  m.def("gather_columns", &gather_columns, free_gil);
  m.def("column_sums", &column_sums, free_gil);
#if defined(SSU_WITH_CUDA)
  m.attr("CUDA") = true;
  m.def("cuda_gather_pieces", &cuda_gather_pieces, free_gil);
  m.def("cuda_scatter_pieces", &cuda_scatter_pieces, free_gil);
  m.def("cuda_gather_elements", &cuda_gather_elements, free_gil);
  m.def("cuda_scatter_elements", &cuda_scatter_elements, free_gil);
  m.def("cuda_gather_columns", &cuda_gather_columns, free_gil);
#else
  m.attr("CUDA") = false;
#endif
}
