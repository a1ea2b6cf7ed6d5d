// Random masks through every code path of shield_core.hpp, in heap buffers of exactly the right size, against a plain
// loop. Built with -fsanitize=address,undefined by tests/unit/test_kernels.py. Usage: driver CASES
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#define SSU_STREAM_FROM 20000  // so that both ways of writing are met
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

void random_bits(uint32_t* word) { *word = static_cast<uint32_t>(rng()); }

struct Case {
  int64_t numel = 0, kept = 0;
  bool elements = false;
  std::vector<ssu::Piece> pieces;
  std::vector<int64_t> counts;
  std::unique_ptr<uint8_t[]> bits;
  std::vector<char> trainable;
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
    c.trainable.push_back(bit(c.bits.get(), i));
    c.kept += c.trainable.back();
    if ((i + 1) % ssu::kBlock == 0 || i + 1 == c.numel) c.counts.push_back(c.kept);
  }
  return c;
}

// Pieces one after another with gaps of frozen elements between; each has bits of its own at any bit offset.
Case piece_case(double density) {
  Case c;
  const int64_t n = pick(0, 6);
  std::vector<uint8_t> bits(8, 0);
  int64_t cost = 0;
  for (int64_t k = 0; k < n; ++k) {
    for (int64_t gap = pick(0, 3); gap > 0; --gap) c.trainable.push_back(0);
    ssu::Piece p{};
    p.dense = pick(0, 3) == 0;
    p.src = static_cast<int64_t>(c.trainable.size());
    p.out = c.kept;
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
    for (int64_t r = 0; r < p.rows; ++r) c.trainable.insert(c.trainable.end(), row.begin(), row.end());
    c.kept += p.rows * p.count;
    cost += p.rows * p.width;
    c.pieces.push_back(p);
  }
  c.numel = static_cast<int64_t>(c.trainable.size());
  c.bits = exact<uint8_t>(static_cast<int64_t>(bits.size()));
  std::copy(bits.begin(), bits.end(), c.bits.get());
  return c;
}

template <typename T>
void check(const Case& c, int level, int threads) {
  const uint16_t nan = 0x7fc0;
  auto src = exact<T>(c.numel), dst = exact<T>(c.numel), want = exact<T>(c.numel);
  auto out = exact<float>(c.kept), values = exact<float>(c.kept);
  for (int64_t i = 0; i < c.numel; ++i) {
    uint32_t word;
    random_bits(&word);
    std::memcpy(&src[static_cast<size_t>(i)], &word, sizeof(T));
    dst[static_cast<size_t>(i)] = want[static_cast<size_t>(i)] = src[static_cast<size_t>(i)];
  }
  for (int64_t i = 0; i < c.kept; ++i) {
    uint32_t word;
    random_bits(&word);
    std::memcpy(&values[static_cast<size_t>(i)], &word, 4);
  }
  const auto n = static_cast<int64_t>(c.pieces.size());
  if (c.elements) {
    ssu::gather_elements(src.get(), out.get(), c.numel, c.bits.get(), c.counts.data(), level, threads);
    ssu::scatter_elements(values.get(), dst.get(), c.numel, c.bits.get(), c.counts.data(), nan, level, threads);
  } else {
    ssu::gather_pieces(src.get(), out.get(), c.pieces.data(), n, c.bits.get(), level, threads);
    ssu::scatter_pieces(values.get(), dst.get(), c.pieces.data(), n, c.bits.get(), nan, level, threads);
  }
  int64_t k = 0;
  for (int64_t i = 0; i < c.numel; ++i) {
    if (!c.trainable[static_cast<size_t>(i)]) continue;
    const float wide = ssu::widen(src[static_cast<size_t>(i)]);
    if (std::memcmp(&wide, &out[static_cast<size_t>(k)], 4)) {
      std::printf("gather differs at %lld, level %d\n", static_cast<long long>(i), level);
      std::exit(1);
    }
    ssu::narrow(values[static_cast<size_t>(k++)], nan, &want[static_cast<size_t>(i)]);
  }
  for (int64_t i = 0; i < c.numel; ++i) {
    if (std::memcmp(&dst[static_cast<size_t>(i)], &want[static_cast<size_t>(i)], sizeof(T))) {
      std::printf("scatter differs at %lld, level %d\n", static_cast<long long>(i), level);
      std::exit(1);
    }
  }
}

template <typename T>
void check_sums(int level) {
  const int64_t rows = pick(0, 30), width = pick(1, 1500);
  auto w = exact<T>(rows * width);
  for (int64_t i = 0; i < rows * width; ++i) {
    ssu::narrow(static_cast<float>(pick(-1000, 1000)) / 64.0f, 0, &w[static_cast<size_t>(i)]);
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
      check<float>(c, level, threads);
      check<ssu::bf16>(c, level, threads);
      if (k % 8 == 0) check_sums<float>(level), check_sums<ssu::bf16>(level);
    }
  }
  std::printf("%d cases, SIMD levels up to %d\n", cases, ssu::best_level());
}
