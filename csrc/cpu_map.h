// How the CPU kernel holds a map: element types, scan order, and compact copies of a slab of channels.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>

#include "propagate.h"
#include "propagate_cpu.h"

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

// Where a map of the shape of x holds a site's channels from `channel` on.
template <typename T>
T* map_at(const Strided<T>& t, int64_t b, int64_t row, int64_t column, int64_t channel) {
  return t.data + b * t.stride[0] + row * t.stride[1] + column * t.stride[2] + channel * t.stride[3];
}

// The scan order of one direction: which axis its lines follow, and which lines start a chunk.
struct Scan {
  bool rows, reversed;
  int64_t lines, positions, chunk;

  Scan(const Problem& p, int direction)
      : rows(lines_are_rows(direction)),
        reversed(far_end_first(direction)),
        lines(rows ? p.height : p.width),
        positions(rows ? p.width : p.height),
        chunk(p.chunk ? std::min(p.chunk, lines) : lines) {}

  int64_t row(int64_t line, int64_t position) const { return rows ? line : position; }
  int64_t column(int64_t line, int64_t position) const { return rows ? position : line; }
  int64_t num_chunks() const { return (lines + chunk - 1) / chunk; }
  int64_t chunk_lines(int64_t c) const { return std::min(chunk, lines - c * chunk); }
  // The n-th line read of chunk c, in map coordinates.
  int64_t line(int64_t c, int64_t n) const { return c * chunk + (reversed ? chunk_lines(c) - 1 - n : n); }
};

// Uninitialised memory, aligned to cache lines, that grows as asked: a thread's scratch. Large scratch is whole huge pages:
// a walk down a column is in another small page at every site.
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

// What a thread works in.
template <typename A>
struct Workspace {
  Scratch<A> x, y, dx, gates, lines, history, grads, factors;
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

  // One site, from or to the map; the next ones, each a cache line or a few in a page of its own, are asked for ahead.
  template <typename T>
  void read_site(const Strided<const T>& from, int64_t b, int64_t row, int64_t column, int64_t channel) const {
    const T* site = map_at(from, b, row, column, channel);
    __builtin_prefetch(site + kAhead * from.stride[2]);
    gather(at(row, column), site, from.stride[3], channels);
  }
  template <typename T>
  void write_site(const Strided<T>& to, int64_t b, int64_t row, int64_t column, int64_t channel) const {
    T* site = map_at(to, b, row, column, channel);
    __builtin_prefetch(site + kAhead * to.stride[2], 1);
    scatter(site, to.stride[3], at(row, column), channels);
  }
  template <typename T>
  void read(const Strided<const T>& from, int64_t b, int64_t channel) const {
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) read_site(from, b, i, j, channel);
  }
  template <typename T>
  void write(const Strided<T>& to, int64_t b, int64_t channel) const {
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) write_site(to, b, i, j, channel);
  }
};

}  // namespace gspn
