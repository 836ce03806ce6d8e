// Maps larger than a tile: a first pass that computes what every tile needs from the others. One block scans one
// direction of one chunk for a few channels, with a warp for every tile along the line, and writes h at the edges of
// the tiles; map_forward() then runs all tiles at once.
#pragma once

#include "cuda/line.h"
#include "cuda/map_forward.h"

namespace gspn {

using EdgeLanes = Lanes<32, 4>;
constexpr int kEdgeThreads = 512;  // lines of up to 512 tokens

struct EdgePlan {
  WalkPlan slabs;
  int directions, k[4];  // those of this launch
};

// h at the ends of every warp's part of a line, for the neighbouring warps: for two lines, used in turn.
struct LineEnds {
  float* data;
  int warps;
  GSPN_DEVICE float* at(int n, int warp, int end, int segment_lane) const {
    using L = EdgeLanes;
    return data + (((n & 1) * warps + warp) * 2 + end) * L::kWarpChannels + segment_lane * L::kLaneChannels;
  }
  static GSPN_INLINE size_t bytes(int warps) {
    return size_t(2) * warps * 2 * EdgeLanes::kWarpChannels * sizeof(float);
  }
};

template <typename T, bool kShared>
__global__ void __launch_bounds__(kEdgeThreads, 1)
    edge_scan(const __grid_constant__ Forward<T> call, const __grid_constant__ EdgePlan launched,
              const __grid_constant__ Edges edges) {
  using L = EdgeLanes;
  constexpr int kC = L::kLaneChannels, kQ = L::kPositions;
  const Problem& p = call.problem;
  // neighbouring blocks have different directions, which read the same x: it is in the cache
  const int k = launched.k[blockIdx.x % unsigned(launched.directions)];
  WalkPlan plan = launched.slabs;
  plan.order = ScanOrder<int>(p, p.directions[k]);
  const LineScan scan(p, plan, blockIdx.x / unsigned(launched.directions));

  const int tid = threadIdx.x, warp = tid / kWarp, warps = blockDim.x / kWarp, lane = tid % kWarp;
  const int segment = lane / L::kSegmentLanes, segment_lane = lane % L::kSegmentLanes;
  const int c = segment_lane * kC, first = warp * L::kLine + segment * kQ;
  const bool real = c < scan.channels;
  float decay[kC];
#pragma unroll
  for (int i = 0; i < kC; ++i) decay[i] = real ? of_channel(call.decay, p, k, scan.channel + c + i) : 1.f;
  const LineGates gates(shared_memory(), kShared ? scan.positions : 0);
  char* const after_gates = shared_memory() + (kShared ? LineGates::bytes(scan.positions) : 0);
  const LineEnds ends{reinterpret_cast<float*>(after_gates), warps};

  // gates of position `tid`, prepared one line ahead
  RawGates<T> ahead{};
  const bool prepares = kShared && tid < scan.positions;
  const Sides own_sides(scan, tid);
  const auto prepare = [&](int n) {
    if (!prepares || n >= scan.length) return;
    const Weights<float> w = n ? ahead.weights(own_sides) : Weights<float>{0.f, 0.f, 0.f};
    gates.weights[n % 2 * scan.positions + tid] = make_float4(w.minus, w.centre, w.plus, load(ahead.input_gate));
    if (n + 1 < scan.length) ahead.read(call, scan, k, scan.line(n + 1), tid, scan.group);
  };
  if (prepares) ahead.read(call, scan, k, scan.line(0), tid, scan.group);
  prepare(0);

  const int line_tiles = (scan.lines + L::kLine - 1) / L::kLine;
  const int64_t side_row = int64_t(2) * warps * p.channels;
  float x[kQ][kC] = {};
  const auto read_x = [&](int n) {
#pragma unroll
    for (int q = 0; q < kQ; ++q)
      if (real && first + q < scan.positions) load_vector(scan.at(call.x, scan.line(n), first + q, c), x[q]);
  };
  read_x(0);
  LineValues<L> h = {};
  for (int n = 0; n < scan.length; ++n) {
    __syncthreads();
    const int line = scan.line(n);
    float before[kC], after[kC];
    segment_neighbours<L>(h, segment, before, after);
    if (n > 0 && segment == 0 && warp > 0) load_vector(ends.at(n - 1, warp - 1, 1, segment_lane), before);
    if (n > 0 && segment == L::kSegments - 1 && warp + 1 < warps)
      load_vector(ends.at(n - 1, warp + 1, 0, segment_lane), after);
#pragma unroll
    for (int q = 0; q < kQ; ++q) {
      if (first + q >= scan.positions || !real) continue;
      float input_gate[kC];
      Weights<float> w[kC];
      if constexpr (kShared) {
        const float4 g = gates.weights[n % 2 * scan.positions + first + q];
#pragma unroll
        for (int i = 0; i < kC; ++i) w[i] = {g.x, g.y, g.z}, input_gate[i] = g.w;
      } else {
        const int row = scan.row(line, first + q), column = scan.column(line, first + q);
        load_vector(gate_at(call.input_gate, 4, scan.batch, row, column, k, scan.channel + c), input_gate);
        const T* logits = gate_at(call.gates, 5, scan.batch, row, column, k, scan.channel + c);
        float minus[kC], centre[kC], plus[kC];
        load_vector(logits, minus);
        load_vector(logits + call.gates.stride[4], centre);
        load_vector(logits + 2 * call.gates.stride[4], plus);
#pragma unroll
        for (int i = 0; i < kC; ++i) {
          w[i] = Weights<float>{0.f, 0.f, 0.f};
          if (n)
            w[i] = normalise(minus[i], centre[i], plus[i], float(scan.has_minus(first + q)),
                             float(scan.has_plus(first + q)));
        }
      }
#pragma unroll
      for (int i = 0; i < kC; ++i) {
        const float centre = h[q][i], plus = q + 1 < kQ ? h[q + 1 < kQ ? q + 1 : 0][i] : after[i];
        h[q][i] = advance(w[i], before[i], centre, plus, decay[i], input_gate[i] * x[q][i]);
        before[i] = centre;
      }
    }
    if (n + 1 < scan.length) read_x(n + 1);
    if (segment == 0) store_vector(ends.at(n, warp, 0, segment_lane), h[0]);
    if (segment == L::kSegments - 1) store_vector(ends.at(n, warp, 1, segment_lane), h[kQ - 1]);
    if (real) {
      float* side =
          edges.side[k] + (scan.batch * scan.lines + line) * side_row + 2 * warp * p.channels + scan.channel + c;
      if (segment == 0) store_vector(side, h[0]);
      if (segment == L::kSegments - 1 && first + kQ <= scan.positions) store_vector(side + p.channels, h[kQ - 1]);
      if (scan.reversed ? line % L::kLine == 0 : line % L::kLine == L::kLine - 1) {
        float* edge = edges.line[k] +
                      ((scan.batch * line_tiles + line / L::kLine) * scan.positions + first) * p.channels +
                      scan.channel + c;
#pragma unroll
        for (int q = 0; q < kQ; ++q)
          if (first + q < scan.positions) store_vector(edge + q * p.channels, h[q]);
      }
    }
    prepare(n + 1);
  }
}

}  // namespace gspn
