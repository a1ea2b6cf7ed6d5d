// Random masks through every code path of shield_core.hpp, in heap buffers of exactly the right size, against a plain
// loop. Built with -fsanitize=address,undefined by tests/unit/test_kernels.py. Usage: driver CASES
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "column_sums.hpp"
#include "shield_core.hpp"

namespace {

std::mt19937_64 rng(1);

int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }

// Exactly `n` elements: one more or less read is caught. Offsets of whole elements vary the alignment.
template <typename T>
std::unique_ptr<T[]> exact(int64_t n) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(n)]);
}

template <typename T>
std::unique_ptr<T[]> random_bits(int64_t n) {
  auto words = exact<T>(n);
  for (int64_t i = 0; i < n; ++i) words[static_cast<size_t>(i)] = static_cast<T>(rng());
  return words;
}

struct Case {
  int64_t numel = 0, size = 0;
  bool elements = false;
  std::vector<ssu::Piece> pieces;
  std::vector<int64_t> counts;
  std::unique_ptr<uint8_t[]> bits;
  std::vector<int64_t> place;  // of each element in the compact vector, -1: frozen
};

void set_bits(uint8_t* bits, int64_t n, double density) {
  for (int64_t i = 0; i < n; ++i)
    if (std::uniform_real_distribution<>()(rng) < density) bits[i / 8] |= static_cast<uint8_t>(1u << (i % 8));
}

bool bit(const uint8_t* bits, int64_t i) { return bits[i / 8] >> (i % 8) & 1; }

Case element_case(double density) {
  Case c;
  c.elements = true;
  c.numel = pick(0, 3) ? pick(0, 40000) : pick(60000, 150000);
  const int64_t bytes = (c.numel + 7) / 8 + 8;
  c.bits = exact<uint8_t>(bytes);
  std::fill(c.bits.get(), c.bits.get() + bytes, uint8_t{0});
  set_bits(c.bits.get(), c.numel, density);
  c.counts.push_back(0);
  for (int64_t i = 0; i < c.numel; ++i) {
    c.place.push_back(bit(c.bits.get(), i) ? c.size++ : -1);
    if ((i + 1) % ssu::kBlock == 0 || i + 1 == c.numel) c.counts.push_back(c.size);
  }
  return c;
}

// Pieces one after another with gaps of frozen elements between; each has bits of its own at any bit offset. In the
// compact vector some pieces have padding behind every row.
Case piece_case(double density) {
  Case c;
  const int64_t n = pick(0, 6);
  std::vector<uint8_t> bits(8, 0);
  int64_t cost = 0;
  for (int64_t k = 0; k < n; ++k) {
    for (int64_t gap = pick(0, 3); gap > 0; --gap) c.place.push_back(-1);
    ssu::Piece p{};
    p.dense = pick(0, 3) == 0;
    p.src = static_cast<int64_t>(c.place.size());
    p.out = c.size;
    p.rows = p.dense ? 1 : pick(1, 40);
    p.width = pick(0, 2) ? pick(1, 200) : pick(1000, 3000);
    p.cost = cost;
    const size_t base = bits.size() - 8;
    const int64_t shift = pick(0, 7);
    bits.resize(base + static_cast<size_t>((shift + p.width + 7) / 8) + 8, 0);
    p.bit = static_cast<int64_t>(base) * 8 + shift;
    std::vector<char> row(static_cast<size_t>(p.width), 1);
    if (!p.dense) {
      for (int64_t j = 0; j < p.width; ++j) {
        row[static_cast<size_t>(j)] = std::uniform_real_distribution<>()(rng) < density;
        if (row[static_cast<size_t>(j)])
          bits[static_cast<size_t>((p.bit + j) / 8)] |= static_cast<uint8_t>(1u << ((p.bit + j) % 8));
      }
    }
    for (char b : row) p.count += b;
    if (p.count == 0) continue;
    p.stride = p.dense || pick(0, 1) ? p.count : p.count + pick(0, 40);
    for (int64_t r = 0; r < p.rows; ++r) {
      int64_t at = c.size + r * p.stride;
      for (char b : row) c.place.push_back(b ? at++ : -1);
    }
    c.size += p.rows * p.stride;
    cost += p.rows * p.width;
    c.pieces.push_back(p);
  }
  c.numel = static_cast<int64_t>(c.place.size());
  c.bits = exact<uint8_t>(static_cast<int64_t>(bits.size()));
  std::copy(bits.begin(), bits.end(), c.bits.get());
  return c;
}

template <typename T>
void same(const T* got, const T* want, int64_t n, const char* what, int level) {
  for (int64_t i = 0; i < n; ++i) {
    if (got[i] == want[i]) continue;
    std::printf("%s differs at %lld, level %d\n", what, static_cast<long long>(i), level);
    std::exit(1);
  }
}

template <typename T>
void check(const Case& c, int level, int threads) {
  const auto src = random_bits<T>(c.numel), values = random_bits<T>(c.size);
  const auto out = random_bits<T>(c.size), gathered = exact<T>(c.size);
  const auto dst = random_bits<T>(c.numel), scattered = exact<T>(c.numel);
  std::copy(out.get(), out.get() + c.size, gathered.get());
  std::copy(dst.get(), dst.get() + c.numel, scattered.get());
  for (size_t i = 0; i < c.place.size(); ++i) {
    if (c.place[i] < 0) continue;
    const auto k = static_cast<size_t>(c.place[i]);
    gathered[k] = src[i];
    scattered[i] = values[k];
  }
  const auto n = static_cast<int64_t>(c.pieces.size());
  const uint8_t* bits = c.bits.get();
  if (c.elements) {
    ssu::gather_elements<T>(src.get(), out.get(), c.numel, bits, c.counts.data(), level, threads);
    ssu::scatter_elements<T>(values.get(), dst.get(), c.numel, bits, c.counts.data(), level, threads);
  } else {
    ssu::gather_pieces<T>(src.get(), out.get(), c.pieces.data(), n, bits, level, threads);
    ssu::scatter_pieces<T>(values.get(), dst.get(), c.pieces.data(), n, bits, level, threads);
  }
  same(out.get(), gathered.get(), c.size, "gather", level);
  same(dst.get(), scattered.get(), c.numel, "scatter", level);
}

template <typename T>
void check_columns(double density, int level, int threads) {
  const int64_t rows = pick(0, 40), width = pick(0, 2) ? pick(1, 200) : pick(1000, 3000), bytes = (width + 7) / 8 + 8;
  const auto x = random_bits<T>(rows * width);
  std::vector<std::unique_ptr<uint8_t[]>> bits;
  std::vector<std::unique_ptr<T[]>> outs, wants;
  std::vector<ssu::ColumnSet<T>> sets;
  for (int64_t n = pick(1, 4); n > 0; --n) {
    bits.push_back(exact<uint8_t>(bytes));
    uint8_t* own = bits.back().get();
    std::fill(own, own + bytes, uint8_t{0});
    set_bits(own, width, density);
    std::vector<int64_t> columns;
    for (int64_t j = 0; j < width; ++j)
      if (bit(own, j)) columns.push_back(j);
    const auto count = static_cast<int64_t>(columns.size()), stride = count + pick(0, 40);
    outs.push_back(exact<T>(rows * stride));
    wants.push_back(exact<T>(rows * stride));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < stride; ++j)
        wants.back()[static_cast<size_t>(r * stride + j)] =
            j < count ? x[static_cast<size_t>(r * width + columns[static_cast<size_t>(j)])] : T{0};
    }
    sets.push_back({outs.back().get(), own, count, stride});
  }
  ssu::gather_columns<T>(x.get(), rows, width, sets.data(), static_cast<int64_t>(sets.size()), level, threads);
  for (size_t s = 0; s < sets.size(); ++s)
    same(outs[s].get(), wants[s].get(), rows * sets[s].stride, "column gather", level);
}

template <typename T>
void check_sums(int level) {
  const int64_t rows = pick(0, 30), width = pick(1, 1500);
  auto w = exact<T>(rows * width);
  for (int64_t i = 0; i < rows * width; ++i) {
    const float x = static_cast<float>(pick(-127, 127)) / 64.0f;  // exact in bfloat16: its upper half
    std::memcpy(&w[static_cast<size_t>(i)], reinterpret_cast<const char*>(&x) + sizeof(x) - sizeof(T), sizeof(T));
  }
  auto out = exact<double>(width);
  for (int square = 0; square < 2; ++square) {
    ssu::column_sums(w.get(), rows, width, square, out.get(), level, 2);
    for (int64_t j = 0; j < width; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < rows; ++r) {
        const double x = ssu::widen(w[static_cast<size_t>(r * width + j)]);
        sum += square ? x * x : std::fabs(x);
      }
      if (sum != out[static_cast<size_t>(j)]) {
        std::printf("column sum differs at %lld, level %d\n", static_cast<long long>(j), level);
        std::exit(1);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  for (int k = 0; k < cases; ++k) {
    const double densities[] = {0.02, 0.5, 0.5, 0.97, 1.0};
    const double density = densities[pick(0, 4)];
    const Case c = k % 2 ? element_case(density) : piece_case(density);
    for (int level = 0; level <= ssu::best_level(); ++level) {
      const int threads = static_cast<int>(pick(1, 4));
      check<uint32_t>(c, level, threads);
      check<uint16_t>(c, level, threads);
      check_columns<uint32_t>(density, level, threads);
      check_columns<uint16_t>(density, level, threads);
      if (k % 8 == 0) check_sums<float>(level), check_sums<ssu::bf16>(level);
    }
  }
  std::printf("%d cases, SIMD levels up to %d\n", cases, ssu::best_level());
}
