// How a block walks the lines of one direction, where a map is too large to hold: its scan, and the gates of a line.
#pragma once

#include "cuda_gates.h"

namespace gspn {

struct WalkPlan {
  int slab_bits;     // a block's slab is 2^slab_bits channels wide, up to 32
  int domain;        // a slab never crosses a multiple of this many channels: C / G, or C where G = C
  int domain_slabs;  // slabs in a domain
  int k, direction;  // the scan

  GSPN_INLINE int slab() const { return 1 << slab_bits; }
};

// The line scan of one block.
struct LineScan {
  bool rows, reversed;
  int positions, lines, chunk, first, length;  // the block's chunk: its first line and how many it has
  int64_t batch;
  int slab_index, group, channel, channels;  // the slab: its first channel in the map and how many it really has
  int chunk_index;

  GSPN_DEVICE LineScan(const Problem& p, const WalkPlan& plan, unsigned block)
      : rows(lines_are_rows(plan.direction)), reversed(far_end_first(plan.direction)) {
    positions = int(rows ? p.width : p.height);
    lines = int(rows ? p.height : p.width);
    chunk = p.chunk && p.chunk < lines ? int(p.chunk) : lines;
    const int chunks = (lines + chunk - 1) / chunk, slabs = plan.domain_slabs * (int(p.channels) / plan.domain);
    slab_index = int(block % slabs);  // slabs side by side: they share sectors of memory
    chunk_index = int(block / slabs % chunks);
    batch = int64_t(block) / chunks / slabs;
    first = chunk_index * chunk;
    length = min(chunk, lines - first);
    group = slab_index / plan.domain_slabs;
    channel = group * plan.domain + slab_index % plan.domain_slabs * plan.slab();
    channels = min(plan.slab(), (group + 1) * plan.domain - channel);
  }
  GSPN_DEVICE int line(int n) const { return reversed ? first + length - 1 - n : first + n; }  // the n-th that is read
  GSPN_DEVICE int64_t row(int line, int position) const { return rows ? line : position; }
  GSPN_DEVICE int64_t column(int line, int position) const { return rows ? position : line; }
  // Where an element of a (B, H, W, C) tensor lies.
  template <typename T>
  GSPN_DEVICE int64_t offset(const Strided<T>& t, int line, int position, int c) const {
    return batch * t.stride[0] + row(line, position) * t.stride[1] + column(line, position) * t.stride[2] +
           int64_t(channel + c) * t.stride[3];
  }
  template <typename T>
  GSPN_DEVICE T* at(const Strided<T>& t, int line, int position, int c) const {
    return t.data + offset(t, line, position, c);
  }
};

// A site's gates as they are read, before they are normalised.
template <typename T>
struct RawGates {
  T minus, centre, plus, lam, out;

  template <typename Call>
  GSPN_DEVICE void read(const Call& call, const LineScan& scan, int k, int line, int position, int group) {
    const int64_t row = scan.row(line, position), column = scan.column(line, position);
    const T* logits = gate_at(call.gates, 5, scan.batch, row, column, k, group);
    minus = logits[0];
    centre = logits[call.gates.stride[4]];
    plus = logits[2 * call.gates.stride[4]];
    lam = *gate_at(call.lam, 4, scan.batch, row, column, k, group);
    if (call.out.data) out = *gate_at(call.out, 4, scan.batch, row, column, k, group);
  }
  GSPN_DEVICE Weights<float> weights(const LineScan& scan, int position) const {
    return normalise(load(minus), load(centre), load(plus), float(position > 0), float(position + 1 < scan.positions));
  }
};

// Two lines' gates that a group's channels share, each prepared one line ahead by a thread of its own.
struct LineGates {
  float4* weights;  // (w-, w0, w+, λ), two lines
  float* out;

  GSPN_DEVICE LineGates(char* memory, int positions)
      : weights(reinterpret_cast<float4*>(memory)), out(reinterpret_cast<float*>(weights + 2 * positions)) {}
  // Rounded up, so that vectors may follow.
  static GSPN_INLINE size_t bytes(int positions) {
    return (size_t(positions) * 2 * (sizeof(float4) + sizeof(float)) + sizeof(float4) - 1) / sizeof(float4) * sizeof(float4);
  }
};

}  // namespace gspn
