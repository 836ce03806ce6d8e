// The tail of a call, m the sum of its scans: y = r m + direct x, r = 1 / sqrt(mean square of the group's m + epsilon).
// Passes of their own over the map, for scans whose kernel has no tail. Sums are float32, always in the same order.
#pragma once

#include "cuda/device.h"
#include "cuda/kernel.h"

namespace gspn {

constexpr int kTailThreads = 256;

// A token's group of channels, shared by `lanes` neighbouring lanes of a warp, a power of two. Every thread of the
// block makes one, also those beyond the last token, which have no channels: all lanes take part in a sum.
template <typename Index>
struct TokenGroup {
  Index batch = 0, row = 0, column = 0, group = 0;
  int first = 0, channels = 0;  // the group's first channel of the map, and how many it has

  GSPN_DEVICE TokenGroup(const Problem& p, int lanes) {
    const Index width(p.width), height(p.height), groups(p.groups);
    Index rest = Index(blockIdx.x) * Index(kTailThreads / lanes) + threadIdx.x / lanes;
    group = rest % groups, rest /= groups;
    column = rest % width, rest /= width;
    row = rest % height, batch = rest / height;
    if (batch >= Index(p.batch)) return;
    channels = int(p.channels / p.groups);
    first = int(group) * channels;
  }
  template <typename T>
  GSPN_DEVICE T* at(const Strided<T>& map, int channel) const {
    return map_at(map, batch, row, column, first + channel);
  }
  // Where r is, for the one lane that reads or writes it.
  GSPN_DEVICE int64_t index(const Problem& p) const {
    return ((int64_t(batch) * p.height + row) * p.width + column) * p.groups + group;
  }
};

// N = 4 neighbouring channels, or one.
template <int N, typename T>
GSPN_DEVICE void load_channels(const T* from, float (&v)[N]) {
  if constexpr (N == 1) v[0] = load(*from);
  else load_vector<N>(from, v);
}
template <int N, typename T>
GSPN_DEVICE void store_channels(T* to, const float (&v)[N]) {
  if constexpr (N == 1) store(*to, v[0]);
  else store_vector<N>(to, v);
}

GSPN_DEVICE float sum_over_lanes(float value, int lanes) {
  for (int width = lanes / 2; width >= 1; width /= 2) value += __shfl_xor_sync(kAllLanes, value, width);
  return value;
}

// y holds m before, and y after.
template <typename T, int N, typename Index>
__global__ void __launch_bounds__(kTailThreads) tail_forward(const Forward<T> call, int lanes) {
  const TokenGroup<Index> at(call.problem, lanes);
  const int lane = int(threadIdx.x) % lanes;
  float v[N], square = 0;
  for (int c = lane * N; c < at.channels; c += lanes * N) {
    load_channels<N>(at.at(call.y, c), v);
#pragma unroll
    for (int i = 0; i < N; ++i) square += v[i] * v[i];
  }
  const float mean = sum_over_lanes(square, lanes) / float(at.channels);
  const float inverse_rms = 1.f / sqrtf(mean + kTailEpsilon);
  if (at.channels > 0 && lane == 0) call.inverse_rms[at.index(call.problem)] = inverse_rms;
  for (int c = lane * N; c < at.channels; c += lanes * N) {
    float x[N], direct[N];
    load_channels<N>(at.at(call.y, c), v);
    load_channels<N>(at.at(call.x, c), x);
    load_channels<N>(call.direct + at.first + c, direct);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = v[i] * inverse_rms + direct[i] * x[i];
    store_channels<N>(at.at(call.y, c), v);
  }
}

// The gradient of m: r (dy - n mean(dy n)) with n = r m = y - direct x.
template <typename T, int N, typename Index>
__global__ void __launch_bounds__(kTailThreads) tail_backward(const TailBackward<T> call, int lanes) {
  const TokenGroup<Index> at(call.problem, lanes);
  const int lane = int(threadIdx.x) % lanes;
  float grad[N], normed[N];
  const auto load_both = [&](int c) {
    float x[N], direct[N];
    load_channels<N>(at.at(call.grad_y, c), grad);
    load_channels<N>(at.at(call.y, c), normed);
    load_channels<N>(at.at(call.x, c), x);
    load_channels<N>(call.direct + at.first + c, direct);
#pragma unroll
    for (int i = 0; i < N; ++i) normed[i] -= direct[i] * x[i];
  };
  float product = 0;
  for (int c = lane * N; c < at.channels; c += lanes * N) {
    load_both(c);
#pragma unroll
    for (int i = 0; i < N; ++i) product += grad[i] * normed[i];
  }
  const float mean = sum_over_lanes(product, lanes) / float(at.channels);
  const float inverse_rms = at.channels > 0 ? call.inverse_rms[at.index(call.problem)] : 0.f;
  for (int c = lane * N; c < at.channels; c += lanes * N) {
    load_both(c);  // of most groups from the cache
#pragma unroll
    for (int i = 0; i < N; ++i) grad[i] = inverse_rms * (grad[i] - normed[i] * mean);
    store_channels<N>(at.at(call.grad_scanned, c), grad);
  }
}

// A thread has N channels of kTokensOfARow tokens: adds direct dy to dx, and sums dy x to a row of grad_direct.
constexpr int kTokensOfARow = 32;

template <typename T, int N, typename Index>
__global__ void __launch_bounds__(kTailThreads) direct_backward(const TailBackward<T> call) {
  const Problem& p = call.problem;
  const Index thread = Index(blockIdx.x) * kTailThreads + threadIdx.x, slots = Index(p.channels) / N;
  const Index width(p.width), height(p.height), part = thread / slots;
  const int channel = int(thread % slots) * N;
  Index column = part * kTokensOfARow, row = column / width, batch = row / height;
  column -= row * width, row -= batch * height;
  float direct[N], sum[N] = {};
  load_channels<N>(call.direct + channel, direct);
  if (batch >= Index(p.batch)) return;
  for (int token = 0; token < kTokensOfARow && batch < Index(p.batch); ++token) {
    float grad[N], x[N], dx[N];
    load_channels<N>(map_at(call.grad_y, batch, row, column, channel), grad);
    load_channels<N>(map_at(call.x, batch, row, column, channel), x);
    load_channels<N>(map_at(call.grad_x, batch, row, column, channel), dx);
#pragma unroll
    for (int i = 0; i < N; ++i) dx[i] += direct[i] * grad[i], sum[i] += grad[i] * x[i];
    store_channels<N>(map_at(call.grad_x, batch, row, column, channel), dx);
    if (++column == width) column = 0, ++row;
    if (row == height) row = 0, ++batch;
  }
  store_channels<N>(call.grad_direct + int64_t(part) * p.channels + channel, sum);
}

}  // namespace gspn
