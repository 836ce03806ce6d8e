// The tail of a call on the CPU, m the sum of its scans: y = r m + direct x, r = 1 / sqrt(mean square + epsilon) of each
// token's group. One pass over the lines (rows of images) [first, last) each way; sums of a group's channels are float32,
// in an order that does not depend on the threads.
#pragma once

#include <cmath>

#include "cpu/map.h"

namespace gspn {

// Calls `run` with the tail's loops specialised where channels lie side by side in all maps.
template <typename Run, typename... Maps>
void with_steps(Run run, const Maps&... maps) {
  if (((maps.stride[3] == 1) && ...)) run(std::true_type());
  else run(std::false_type());
}

// y holds m before, and y after.
template <typename T>
void run_tail(const Forward<T>& call, int64_t first, int64_t last) {
  const Problem& p = call.problem;
  const int64_t size = p.channels / p.groups;
  const auto run = [&](auto side_by_side) {
    const int64_t y_step = side_by_side ? 1 : call.y.stride[3], x_step = side_by_side ? 1 : call.x.stride[3];
    for (int64_t item = first * p.width * p.groups; item < last * p.width * p.groups; ++item) {
      const int64_t token = item / p.groups, channel = item % p.groups * size;
      const int64_t b = token / p.width / p.height, row = token / p.width % p.height, column = token % p.width;
      T* const y = map_at(call.y, b, row, column, channel);
      const T* const x = map_at(call.x, b, row, column, channel);
      const float* const direct = call.direct + channel;
      float square = 0;
#pragma omp simd reduction(+ : square)
      for (int64_t c = 0; c < size; ++c) square += load(y[c * y_step]) * load(y[c * y_step]);
      const float r = 1.f / std::sqrt(square / float(size) + kTailEpsilon);
      call.inverse_rms[item] = r;
#pragma omp simd
      for (int64_t c = 0; c < size; ++c)
        store(y[c * y_step], load(y[c * y_step]) * r + direct[c] * load(x[c * x_step]));
    }
  };
  with_steps(run, call.y, call.x);
}

// grad_scanned = r (dy - n mean(dy n)) with n = r m = y - direct x; grad_direct has a row a line. grad_x is not used.
template <typename T>
void run_tail_backward(const TailBackward<T>& call, int64_t first, int64_t last) {
  const Problem& p = call.problem;
  const int64_t size = p.channels / p.groups;
  const auto run = [&](auto side_by_side) {
    const int64_t x_step = side_by_side ? 1 : call.x.stride[3], y_step = side_by_side ? 1 : call.y.stride[3];
    const int64_t grad_step = side_by_side ? 1 : call.grad_y.stride[3];
    const int64_t scanned_step = side_by_side ? 1 : call.grad_scanned.stride[3];
    std::fill(call.grad_direct + first * p.channels, call.grad_direct + last * p.channels, 0.f);
    for (int64_t item = first * p.width * p.groups; item < last * p.width * p.groups; ++item) {
      const int64_t token = item / p.groups, channel = item % p.groups * size, line = token / p.width;
      const int64_t b = line / p.height, row = line % p.height, column = token % p.width;
      const T* const x = map_at(call.x, b, row, column, channel);
      const T* const y = map_at(call.y, b, row, column, channel);
      const T* const grad = map_at(call.grad_y, b, row, column, channel);
      T* const grad_scanned = map_at(call.grad_scanned, b, row, column, channel);
      const float* const direct = call.direct + channel;
      float* const grad_direct = call.grad_direct + line * p.channels + channel;
      float product = 0;
#pragma omp simd reduction(+ : product)
      for (int64_t c = 0; c < size; ++c) {
        const float g = load(grad[c * grad_step]), v = load(x[c * x_step]);
        product += g * (load(y[c * y_step]) - direct[c] * v);
        grad_direct[c] += g * v;
      }
      const float r = call.inverse_rms[item], mean = product / float(size);
#pragma omp simd
      for (int64_t c = 0; c < size; ++c) {
        const float normed = load(y[c * y_step]) - direct[c] * load(x[c * x_step]);
        store(grad_scanned[c * scanned_step], r * (load(grad[c * grad_step]) - normed * mean));
      }
    }
  };
  with_steps(run, call.x, call.y, call.grad_y, call.grad_scanned);
}

}  // namespace gspn
