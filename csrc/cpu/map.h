// How the CPU kernel stores a map: element types, scratch memory, and compact copies of a slab of channels.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/huge_pages.h"
#include "problem.h"
#include "propagate.h"

namespace gspn {

inline float load(float value) { return value; }
inline double load(double value) { return value; }
inline float load(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline void store(float& to, float value) { to = value; }
inline void store(double& to, double value) { to = value; }
inline void store(BFloat16& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  to.bits = value != value ? 0x7fc0 : uint16_t(rounded);
}

// n elements, `stride` apart, into a compact row of accumulators.
template <typename T, typename A>
inline void gather(A* to, const T* from, int64_t stride, int64_t n) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = load(from[i * stride]);
  }
}
template <typename T, typename A>
inline void scatter(T* to, int64_t stride, const A* from, int64_t n) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) store(to[i], from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) store(to[i * stride], from[i]);
  }
}

// Uninitialised memory, aligned to cache lines, that grows on demand: a thread's scratch. Large scratch is whole huge
// pages, because along a column every token is in another small page.
template <typename A>
class Scratch {
 public:
  A* get(int64_t size) {
    if (size > size_) {
      const size_t bytes = size * sizeof(A), page = bytes < kHugePage / 2 ? kLine : kHugePage;
      const size_t whole = (bytes + page - 1) / page * page;
      data_ = {static_cast<A*>(::operator new(whole, std::align_val_t(page))), Free{std::align_val_t(page)}};
      prefer_huge_pages(data_.get(), whole);
      size_ = size;
    }
    return data_.get();
  }

  void release_above(int64_t bytes) {
    if (size_ * int64_t(sizeof(A)) > bytes) data_.reset(), size_ = 0;
  }

 private:
  static constexpr size_t kLine = 64;
  struct Free {
    std::align_val_t alignment{kLine};
    void operator()(A* data) const { ::operator delete(data, alignment); }
  };
  std::unique_ptr<A, Free> data_;
  int64_t size_ = 0;
};

// A thread's scratch memory.
template <typename A>
struct Workspace {
  Scratch<A> x, y, dx, gates, lines, history, grads, factors;

  void release_above(int64_t bytes) {
    for (auto* scratch : {&x, &y, &dx, &gates, &lines, &history, &grads, &factors}) scratch->release_above(bytes);
  }
};

// Compact copy of a slab of the map. Rows are padded by a cache line, so that walking down a column of a map whose
// width is a power of two does not fall into the same cache sets again and again.
template <typename A>
struct Slab {
  static constexpr int64_t kAhead = 16;
  A* data;
  int64_t height, width, row_stride, channels;

  Slab(Scratch<A>& scratch, const Problem& p, int64_t channels_)
      : height(p.height), width(p.width), row_stride(p.width * channels_ + 64 / sizeof(A)), channels(channels_) {
    data = scratch.get(height * row_stride);
  }
  A* at(int64_t row, int64_t column) const { return data + row * row_stride + column * channels; }

  // One token, from or to the map. Later ones are prefetched: each is a few cache lines, perhaps in another page.
  template <typename T>
  void read_token(const Strided<const T>& from, int64_t b, int64_t row, int64_t column, int64_t channel) const {
    const T* token = map_at(from, b, row, column, channel);
    __builtin_prefetch(token + kAhead * from.stride[2]);
    gather(at(row, column), token, from.stride[3], channels);
  }
  template <typename T>
  void write_token(const Strided<T>& to, int64_t b, int64_t row, int64_t column, int64_t channel) const {
    T* token = map_at(to, b, row, column, channel);
    __builtin_prefetch(token + kAhead * to.stride[2], 1);
    scatter(token, to.stride[3], at(row, column), channels);
  }
  template <typename T>
  void read(const Strided<const T>& from, int64_t b, int64_t channel) const {
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) read_token(from, b, i, j, channel);
  }
  template <typename T>
  void write(const Strided<T>& to, int64_t b, int64_t channel) const {
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) write_token(to, b, i, j, channel);
  }
};

}  // namespace gspn
