// The gradients of gates that a group's channels share, from the sums over channels that the scans have written.
#pragma once

#include "cuda/device.h"
#include "scan.h"

namespace gspn {

enum Sum { kSumMinus, kSumCentre, kSumPlus, kSumInputGate, kSumOutputGate, kNumSums };

// For every direction and token: sums over a part of a group's channels of f dh h_before (three neighbours), dh x and s
// dy h. There is a row of tokens for each part, the parts of a group next to each other. No two threads write the same
// sum.
struct PartialSums {
  float* data;  // (B, K, G · group_rows, H·W, kNumSums)
  int64_t group_rows;
};

// One thread per token, direction and group: adds up the parts, in order, and differentiates the normalisation.
template <typename T>
__global__ void __launch_bounds__(256)
    gate_gradients(const __grid_constant__ Backward<T> call, const PartialSums partial) {
  const Problem& p = call.problem;
  const int64_t tokens = p.height * p.width, count = p.batch * p.num_directions * p.groups * tokens;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t token = i % tokens, g = i / tokens % p.groups, bk = i / tokens / p.groups;
    const int64_t b = bk / p.num_directions, row = token / p.width, column = token % p.width;
    const int k = int(bk % p.num_directions);
    float sum[kNumSums] = {};
    for (int64_t r = 0; r < partial.group_rows; ++r) {
      const float* part = partial.data + (((bk * p.groups + g) * partial.group_rows + r) * tokens + token) * kNumSums;
#pragma unroll
      for (int s = 0; s < kNumSums; ++s) sum[s] += part[s];
    }
    const ScanOrder<int> scan(p, p.directions[k]);
    const int line = scan.line_of(int(row), int(column)), position = scan.position_of(int(row), int(column));
    Weights<float> grad{0.f, 0.f, 0.f};
    if (!scan.restarts(line, scan.reversed)) {
      const T* logits = gate_at(call.gates, 5, b, row, column, k, g);
      const int64_t next = call.gates.stride[4];
      const float minus = load(logits[0]), centre = load(logits[next]), plus = load(logits[2 * next]);
      const Weights<float> w =
          normalise(minus, centre, plus, float(scan.has_minus(position)), float(scan.has_plus(position)));
      grad = normalise_backward(minus, centre, plus, w, Weights<float>{sum[kSumMinus], sum[kSumCentre], sum[kSumPlus]});
    }
    T* to = gate_at(call.grad_gates, 5, b, row, column, k, g);
    store(to[0], grad.minus);
    store(to[call.grad_gates.stride[4]], grad.centre);
    store(to[2 * call.grad_gates.stride[4]], grad.plus);
    store(*gate_at(call.grad_input_gate, 4, b, row, column, k, g), sum[kSumInputGate]);
    if (call.grad_output_gate.data)
      store(*gate_at(call.grad_output_gate, 4, b, row, column, k, g), sum[kSumOutputGate]);
  }
}

}  // namespace gspn
