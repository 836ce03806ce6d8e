// The instructions of csrc/cuda/tensor_core.h, on the CPU: a warp's 32 fibers meet with their operands, then each
// computes what its lane gets.
//
// A product drops the low 13 bits of tf32 operands, and cuts its sums off to float32, as tensor cores do: it does not
// round them to the nearest. Shared memory is read and written by each lane on its own, after all have met.
#pragma once

#include "problem.h"

namespace emulation {

inline float tf32(uint32_t bits) {
  bits &= 0xffffe000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float element(gspn::BFloat16, uint32_t bits) { return gspn::from_bits(bits << 16); }
inline float element(gspn::Float16, uint32_t bits) { return gspn::from_half(uint16_t(bits)); }

// The nearest float that is not larger in magnitude.
inline float toward_zero(double value) {
  const float nearest = float(value);
  return std::abs(double(nearest)) > std::abs(value) ? std::nextafter(nearest, 0.f) : nearest;
}

// c += a b for a lane's four sums, with a(row, k) and b(k, column) of any lane's.
template <int K, typename A, typename B>
void add_product(float (&c)[4], A a, B b) {
  const int g = lane() / 4, t = lane() % 4;
  double sums[4] = {c[0], c[1], c[2], c[3]};
  for (int k = 0; k < K; ++k) {
    const double rows[2] = {a(g, k), a(g + 8, k)}, columns[2] = {b(k, 2 * t), b(k, 2 * t + 1)};
    for (int i = 0; i < 4; ++i) sums[i] += rows[i / 2] * columns[i % 2];
  }
  for (int i = 0; i < 4; ++i) c[i] = toward_zero(sums[i]);
}

// c += a b in 16-bit elements; K / 4 words of a and K / 8 of b a lane.
template <typename T, int K>
void multiply_add(const char* instruction, float (&c)[4], const uint32_t* a, const uint32_t* b) {
  uint32_t words[6];
  std::copy_n(a, K / 4, words);
  std::copy_n(b, K / 8, words + K / 4);
  const Lane* const lanes = meet(instruction, words, 3 * K / 8);
  add_product<K>(
      c,
      [&](int row, int k) {
        const uint32_t word = lanes[row % 8 * 4 + k % 8 / 2].words[row / 8 + k / 8 * 2];
        return element(T(), k % 2 ? word >> 16 : word & 0xffffu);
      },
      [&](int k, int column) {
        const uint32_t word = lanes[column * 4 + k % 8 / 2].words[K / 4 + k / 8];
        return element(T(), k % 2 ? word >> 16 : word & 0xffffu);
      });
}

// A lane's address at its place in an instruction on matrices in shared memory.
inline void check_row(const void* row) {
  const char *const from = static_cast<const char*>(row), *const first = gspn::shared_memory();
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("a misaligned row of a matrix");
  if (from < first || from + 16 > block().shared.data() + block().shared.size()) fail("a row outside shared memory");
}
inline const Lane* meet_at(const char* instruction, const void* row) {
  const uint64_t address = reinterpret_cast<uintptr_t>(row);
  const uint32_t words[2] = {uint32_t(address), uint32_t(address >> 32)};
  return meet(instruction, words, 2);
}
inline uint16_t element_at(const Lane& row, int column) {
  const void* const address = reinterpret_cast<const void*>(uintptr_t(row.words[0] | uint64_t(row.words[1]) << 32));
  check_row(address);
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(address) + 2 * column, sizeof bits);
  return bits;
}

}  // namespace emulation

inline void __syncwarp(unsigned = 0xffffffffu) { emulation::meet(__func__, nullptr, 0); }
inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint32_t word = vote;
  const emulation::Lane* const lanes = emulation::meet(__func__, &word, 1);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= lanes[i].words[0] << i;
  return votes;
}

namespace gspn {

inline float to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return value != value ? from_bits(0x7fffffffu) : from_bits((bits + 0x1000u) & 0xffffe000u);
}

inline void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  uint32_t words[6];
  std::memcpy(words, a, sizeof a);
  std::memcpy(words + 4, b, sizeof b);
  const emulation::Lane* const lanes = emulation::meet(__func__, words, 6);
  emulation::add_product<8>(
      c,
      [&](int row, int k) { return emulation::tf32(lanes[row % 8 * 4 + k % 4].words[row / 8 + k / 4 * 2]); },
      [&](int k, int column) { return emulation::tf32(lanes[column * 4 + k % 4].words[4 + k / 4]); });
}

inline void mma_tf32_k4(float (&c)[4], const float (&a)[2], float b) {
  uint32_t words[3];
  std::memcpy(words, a, sizeof a);
  std::memcpy(words + 2, &b, sizeof b);
  const emulation::Lane* const lanes = emulation::meet(__func__, words, 3);
  emulation::add_product<4>(
      c, [&](int row, int k) { return emulation::tf32(lanes[row % 8 * 4 + k].words[row / 8]); },
      [&](int k, int column) { return emulation::tf32(lanes[column * 4 + k].words[2]); });
}

template <typename T>
void mma_k8(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  emulation::multiply_add<T, 8>(__PRETTY_FUNCTION__, c, a, &b);
}
template <typename T>
void mma_k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply_add<T, 16>(__PRETTY_FUNCTION__, c, a, b);
}

template <typename T>
uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int shift = 0; shift <= 16; shift += 16) {
    const auto half = [&](uint32_t word) { return emulation::element(T(), word >> shift & 0xffffu); };
    const float exact = std::fma(half(a), half(b), half(c));  // but for float32's own rounding
    result |= uint32_t(std::is_same_v<T, BFloat16> ? to_bfloat16(exact) : to_half(exact)) << shift;
  }
  return result;
}

inline uint32_t transpose_matrix(uint32_t elements) {
  const emulation::Lane* const lanes = emulation::meet(__func__, &elements, 1);
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  const auto at = [&](int row, int column) { return lanes[row * 4 + column / 2].words[0] >> 16 * (column % 2) & 0xffffu; };
  return at(2 * t, g) | at(2 * t + 1, g) << 16;
}

template <bool kTransposed, int N>
void load_matrices(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4, "as many matrices as one instruction reads");
  const emulation::Lane* const lanes = emulation::meet_at(__PRETTY_FUNCTION__, row);
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (int i = 0; i < N; ++i) {
    const auto at = [&](int j, int column) { return uint32_t(emulation::element_at(lanes[8 * i + j], column)); };
    r[i] = kTransposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
  }
}

template <bool kTransposed>
void store_matrices(void* row, const uint32_t (&r)[4]) {
  const emulation::Lane* const lanes = emulation::meet(__PRETTY_FUNCTION__, r, 4);
  emulation::check_row(row);
  const int i = emulation::lane() / 8, j = emulation::lane() % 8;  // this lane writes row j of matrix i
  for (int column = 0; column < 8; ++column) {
    const int g = kTransposed ? column : j, n = kTransposed ? j : column;
    const uint16_t bits = uint16_t(lanes[4 * g + n / 2].words[i] >> 16 * (n % 2));
    std::memcpy(static_cast<char*>(row) + 2 * column, &bits, sizeof bits);
  }
}

}  // namespace gspn
