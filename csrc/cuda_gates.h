// The gradients of gates that a group's channels share, from the sums over channels that the scans left.
#pragma once

#include "cuda_device.h"

namespace gspn {

enum Sum { kSumMinus, kSumCentre, kSumPlus, kSumLam, kSumOut, kNumSums };

// For every direction and site, Σ_c over a part of a group's channels of f dh h_before (three neighbours), dh x and s dy h;
// a row of sites for each part, the parts of a group next to each other. No two threads write the same sum.
struct PartialSums {
  float* data;   // (B, K, G · group_rows, H·W, kNumSums)
  int64_t group_rows;
};

// A gate tensor's element for direction k and group g at a site.
template <typename T>
GSPN_DEVICE T* gate_at(const Strided<T>& t, int group_axis, int64_t b, int64_t row, int64_t column, int k, int64_t g) {
  return t.data + b * t.stride[0] + row * t.stride[1] + column * t.stride[2] + k * t.stride[3] + g * t.stride[group_axis];
}

// Whether a line is the first that its chunk's scan reads: it has no history.
GSPN_DEVICE bool starts_chunk(int line, int lines, int chunk, bool reversed) {
  return reversed ? line == lines - 1 || (line + 1) % chunk == 0 : line % chunk == 0;
}

// One thread a site, direction and group: adds the parts up in order, and takes the sums through the normalisation.
template <typename T>
__global__ void __launch_bounds__(256) gate_gradients(const __grid_constant__ Backward<T> call, const PartialSums partial) {
  const Problem& p = call.problem;
  const int64_t sites = p.height * p.width, count = p.batch * p.num_directions * p.groups * sites;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t site = i % sites, g = i / sites % p.groups, bk = i / sites / p.groups;
    const int64_t b = bk / p.num_directions, row = site / p.width, column = site % p.width;
    const int k = int(bk % p.num_directions);
    float sum[kNumSums] = {};
    for (int64_t r = 0; r < partial.group_rows; ++r) {
      const float* part = partial.data + (((bk * p.groups + g) * partial.group_rows + r) * sites + site) * kNumSums;
#pragma unroll
      for (int s = 0; s < kNumSums; ++s) sum[s] += part[s];
    }
    const bool rows = lines_are_rows(p.directions[k]), reversed = far_end_first(p.directions[k]);
    const int line = int(rows ? row : column), lines = int(rows ? p.height : p.width);
    const int64_t position = rows ? column : row, positions = rows ? p.width : p.height;
    const int chunk = p.chunk && p.chunk < lines ? int(p.chunk) : lines;
    Weights<float> grad{0.f, 0.f, 0.f};
    if (!starts_chunk(line, lines, chunk, reversed)) {
      const T* logits = gate_at(call.gates, 5, b, row, column, k, g);
      const int64_t next = call.gates.stride[4];
      const float minus = load(logits[0]), centre = load(logits[next]), plus = load(logits[2 * next]);
      const Weights<float> w = normalise(minus, centre, plus, float(position > 0), float(position + 1 < positions));
      grad = normalise_backward(minus, centre, plus, w, Weights<float>{sum[kSumMinus], sum[kSumCentre], sum[kSumPlus]});
    }
    T* to = gate_at(call.grad_gates, 5, b, row, column, k, g);
    store(to[0], grad.minus);
    store(to[call.grad_gates.stride[4]], grad.centre);
    store(to[2 * call.grad_gates.stride[4]], grad.plus);
    store(*gate_at(call.grad_lam, 4, b, row, column, k, g), sum[kSumLam]);
    if (call.grad_out.data) store(*gate_at(call.grad_out, 4, b, row, column, k, g), sum[kSumOut]);
  }
}

}  // namespace gspn
