// One block that walks the lines of one direction, for maps too large for a block's memory: its scan, and a line's
// gates.
#pragma once

#include "cuda/gates.h"

namespace gspn {

struct WalkPlan {
  int slab_bits;     // a block's slab is 2^slab_bits channels wide, up to 32
  int domain;        // no slab crosses a multiple of this many channels: C / G, or C where G = C
  int domain_slabs;  // slabs in a domain
  int k;             // the scan
  ScanOrder<int> order;  // its direction's: computed by the host, so that it takes no registers

  GSPN_INLINE int slab() const { return 1 << slab_bits; }
};

// The scan of one block: a chunk of lines, a slab of channels.
struct LineScan : ScanOrder<int> {
  int chunk_index, first, length;  // the chunk's first line and number of lines
  int64_t batch;
  int slab_index, group, channel, channels;  // the slab: its first channel in the map, and how many channels it has

  GSPN_DEVICE LineScan(const Problem& p, const WalkPlan& plan, unsigned block) : ScanOrder<int>(plan.order) {
    const int count = chunks.count(), slabs = plan.domain_slabs * (int(p.channels) / plan.domain);
    slab_index = int(block % slabs);  // neighbouring blocks have neighbouring slabs, which share sectors of memory
    chunk_index = int(block / slabs % count);
    batch = int64_t(block) / count / slabs;
    first = chunks.begin(chunk_index);
    length = chunk_lines(chunk_index);
    group = slab_index / plan.domain_slabs;
    channel = group * plan.domain + slab_index % plan.domain_slabs * plan.slab();
    channels = min(plan.slab(), (group + 1) * plan.domain - channel);
  }
  GSPN_DEVICE int line(int n) const { return nth_read(first, length, n, reversed); }  // the n-th line that is read
  // Where a (B, H, W, C) tensor holds channel c of the slab.
  template <typename T>
  GSPN_DEVICE int64_t offset(const Strided<T>& t, int line, int position, int c) const {
    return map_offset(t, batch, row(line, position), column(line, position), channel + c);
  }
  template <typename T>
  GSPN_DEVICE T* at(const Strided<T>& t, int line, int position, int c) const {
    return t.data + offset(t, line, position, c);
  }
};

// Which neighbours a position has. It is asked once for a position that a thread keeps from line to line.
struct Sides {
  bool minus, plus;

  GSPN_DEVICE Sides(const Lines<int>& map, int position)
      : minus(position > 0), plus(position + 1 < map.positions) {
    if (!map.windows.is_cut()) return;
    const unsigned size = unsigned(map.windows.size), in_window = unsigned(position + map.windows.missing) % size;
    minus = minus && in_window > 0, plus = plus && in_window + 1 < size;
  }
  GSPN_DEVICE explicit Sides(uint32_t bits) : minus(bits & 1), plus(bits >> 1 & 1) {}
  GSPN_DEVICE uint32_t bits() const { return uint32_t(minus) | uint32_t(plus) << 1; }
};

// A token's gates as they are read, not normalised yet.
template <typename T>
struct RawGates {
  T minus, centre, plus, input_gate, output_gate;

  template <typename Call>
  GSPN_DEVICE void read(const Call& call, const LineScan& scan, int k, int line, int position, int group) {
    const int row = scan.row(line, position), column = scan.column(line, position);
    const T* logits = gate_at(call.gates, 5, scan.batch, row, column, k, group);
    minus = logits[0];
    centre = logits[call.gates.stride[4]];
    plus = logits[2 * call.gates.stride[4]];
    input_gate = *gate_at(call.input_gate, 4, scan.batch, row, column, k, group);
    if (call.output_gate.data) output_gate = *gate_at(call.output_gate, 4, scan.batch, row, column, k, group);
  }
  GSPN_DEVICE Weights<float> weights(const Sides& has) const {
    return normalise(load(minus), load(centre), load(plus), float(has.minus), float(has.plus));
  }
};

// The gates of two lines that a group's channels share. A thread per position prepares them one line ahead.
struct LineGates {
  float4* weights;  // (w-, w0, w+, λ), two lines
  float* output_gate;

  GSPN_DEVICE LineGates(char* memory, int positions)
      : weights(reinterpret_cast<float4*>(memory)), output_gate(reinterpret_cast<float*>(weights + 2 * positions)) {}
  // Rounded up, so that vectors may be stored behind.
  static GSPN_INLINE size_t bytes(int positions) {
    const size_t used = size_t(positions) * 2 * (sizeof(float4) + sizeof(float));
    return (used + sizeof(float4) - 1) / sizeof(float4) * sizeof(float4);
  }
};

}  // namespace gspn
