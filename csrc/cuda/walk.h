// Maps too large for a block's memory: one block walks the lines of one direction for a few channels, with only the
// line before in shared memory. Directions run one after another; their sum is in device memory, in float32.
//
// A thread has kItems (position, channel) pairs of a line, blockDim.x apart, and reads the data of the next line while
// it computes this one. There is one barrier per line. Before it, what a thread has read of the line is made ready; behind
// it the next line is asked for. Thus a wait for one line's data is not one for the next line's, too: they are counted
// together.
#pragma once

#include "cuda/line.h"

namespace gspn {

// The largest blocks of walk_forward: shared gates need a thread for every position, own gates more registers.
constexpr int kSharedThreads = 1024, kOwnThreads = 512;

// The sum over directions: read from `before` unless this direction is the first, written to `partial` unless it is the
// last. float32, with the strides of the result.
struct Accumulation {
  const float* before;
  float* partial;
};

// Chunks of an image, in the directions that have most: rows of the sums for f and s.
GSPN_INLINE int64_t most_chunks(const Problem& p) { return Lines<int64_t>(p, p.height > p.width).chunks.count(); }

// What h of one item takes from its token.
struct Step {
  Weights<float> weights;  // unless gates are shared
  float x, input_gate, output_gate, before;
};

// What a thread reads for one of its items, one line ahead.
template <typename T, bool kShared>
struct Item {
  T x;
  float before;
  RawGates<T> gates;  // unless they are shared
};

// One direction forward. kShared: a group's gates are prepared once for all channels of the slab, which needs a thread
// for every position. kItems = 0: any number of items, and nothing is read ahead.
template <typename T, bool kShared, int kItems>
__global__ void __launch_bounds__(kShared ? kSharedThreads : kOwnThreads, 1)
    walk_forward(const __grid_constant__ Forward<T> call, const WalkPlan plan, const Accumulation sum, float* history) {
  const Problem& p = call.problem;
  const LineScan scan(p, plan, blockIdx.x);
  const int threads = blockDim.x, width = scan.positions * plan.slab(), tid = threadIdx.x;
  const int group_size = int(p.channels / p.groups);
  const int own = tid & (plan.slab() - 1);  // the channel of all of this thread's items: a slab divides the threads
  const int own_group = (scan.channel + own) / group_size;
  const float decay = own < scan.channels ? of_channel(call.decay, p, plan.k, scan.channel + own) : 1.f;
  const float scale = own < scan.channels ? of_channel(call.scale, p, plan.k, scan.channel + own) : 1.f;
  const LineGates gates(shared_memory(), kShared ? scan.positions : 0);
  float* const lines = reinterpret_cast<float*>(shared_memory() + (kShared ? LineGates::bytes(scan.positions) : 0));
  const auto read = [&](int item, int n) {
    const int position = item >> plan.slab_bits, c = item & (plan.slab() - 1), line = scan.line(n);
    Item<T, kShared> result{};
    if (item >= width || c >= scan.channels) return result;
    result.x = *scan.at(call.x, line, position, c);
    if (sum.before) result.before = sum.before[scan.offset(call.y, line, position, c)];
    if constexpr (!kShared) result.gates.read(call, scan, plan.k, line, position, own_group);
    return result;
  };

  RawGates<T> ahead{};  // of position `tid`, two lines ahead of the block
  const bool prepares = kShared && tid < scan.positions;
  const Sides own_sides(scan, tid);
  const auto prepare = [&](int n) {  // the gates of line n, from `ahead`, which then is the next line's
    if (!prepares || n >= scan.length) return;
    const Weights<float> w = n ? ahead.weights(own_sides) : Weights<float>{0.f, 0.f, 0.f};
    gates.weights[n % 2 * scan.positions + tid] = make_float4(w.minus, w.centre, w.plus, load(ahead.input_gate));
    gates.output_gate[n % 2 * scan.positions + tid] = call.output_gate.data ? load(ahead.output_gate) : 1.f;
    if (n + 1 < scan.length) ahead.read(call, scan, plan.k, scan.line(n + 1), tid, scan.group);
  };
  const auto sides_of = [&](int item) { return Sides(scan, item >> plan.slab_bits); };
  const auto make_ready = [&](int n, const Item<T, kShared>& from, const Sides& has) {
    Step step{{0.f, 0.f, 0.f}, load(from.x), 0.f, 1.f, from.before};
    if constexpr (!kShared) {
      if (n) step.weights = from.gates.weights(has);
      step.input_gate = load(from.gates.input_gate);
      if (call.output_gate.data) step.output_gate = load(from.gates.output_gate);
    }
    return step;
  };
  const auto advance_item = [&](int item, int n, const Step& from) {
    const int position = item >> plan.slab_bits, c = item & (plan.slab() - 1);
    const float* const before = lines + (n + 1) % 2 * width;
    float* const h = lines + n % 2 * width;
    if (item >= width) return;
    if (c >= scan.channels) {
      h[item] = 0.f;
      return;
    }
    Weights<float> w = from.weights;
    float input_gate = from.input_gate, output_gate = from.output_gate;
    if constexpr (kShared) {
      const float4 g = gates.weights[n % 2 * scan.positions + position];
      w = {g.x, g.y, g.z};
      input_gate = g.w;
      output_gate = gates.output_gate[n % 2 * scan.positions + position];
    }
    float value = input_gate * from.x;
    if (n) {
      value = advance(w, position > 0 ? before[item - plan.slab()] : 0.f, before[item],
                      position + 1 < scan.positions ? before[item + plan.slab()] : 0.f, decay, value);
    }
    h[item] = value;
    const int64_t at = scan.offset(call.y, scan.line(n), position, c);
    const float y = scale * output_gate * value + from.before;
    if (history) history[at] = value;
    else if (sum.partial) sum.partial[at] = y;
    else store(call.y.data[at], y);
  };

  constexpr int kAhead = kItems ? kItems : 1;
  Item<T, kShared> items[kAhead];
  uint32_t sides = 0;  // of the thread's items, two bits each
  if constexpr (!kShared) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) sides |= sides_of(tid + i * threads).bits() << 2 * i;
  }
  if (prepares) ahead.read(call, scan, plan.k, scan.line(0), tid, scan.group);
  prepare(0);
  if constexpr (kItems > 0) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) items[i] = read(tid + i * threads, 0);
  }
  for (int n = 0; n < scan.length; ++n) {
    Step steps[kAhead];
#pragma unroll
    for (int i = 0; i < kItems; ++i) steps[i] = make_ready(n, items[i], Sides(sides >> 2 * i));
    __syncthreads();
    if constexpr (kItems > 0) {
      const auto ask = [&](int i) {
        if (n + 1 < scan.length) items[i] = read(tid + i * threads, n + 1);
      };
      if constexpr (!kShared) {  // all at once, for which 1024 threads have too few registers
#pragma unroll
        for (int i = 0; i < kItems; ++i) ask(i);
      }
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if constexpr (kShared) ask(i);
        advance_item(tid + i * threads, n, steps[i]);
      }
    } else {
      for (int item = tid; item < width; item += threads)
        advance_item(item, n, make_ready(n, read(item, n), sides_of(item)));
    }
    prepare(n + 1);
  }
}

// One direction backwards, from the last line read to the first. `history` holds its h, with the strides of dx. A
// thread writes the products of its f dh with its three weights to shared memory, for the neighbours on the line
// before.
//
// kShared: channels of a group share gates; the sums over the slab's channels are written, for gate_gradients().
template <typename T, bool kShared>
__global__ void __launch_bounds__(512)
    walk_backward(const __grid_constant__ Backward<T> call, const WalkPlan plan, const Accumulation sum,
                  const float* history, const PartialSums partial) {
  const LineScan scan(call.problem, plan, blockIdx.x);
  const int threads = blockDim.x, width = scan.positions * plan.slab(), tid = threadIdx.x, k = plan.k;
  const int own = tid & (plan.slab() - 1);  // the channel of all of this thread's items: a slab divides the threads
  const float decay = own < scan.channels ? of_channel(call.decay, call.problem, k, scan.channel + own) : 1.f;
  const float scale = own < scan.channels ? of_channel(call.scale, call.problem, k, scan.channel + own) : 1.f;
  float decay_sum = 0.f, scale_sum = 0.f;
  float* const products = reinterpret_cast<float*>(shared_memory());  // two lines of (minus, centre, plus)
  for (int n = scan.length - 1; n >= 0; --n) {
    __syncthreads();
    const int line = scan.line(n), line_before = n ? line + (scan.reversed ? 1 : -1) : 0;
    const float* const after = products + (n + 1) % 2 * 3 * width;
    float* const handed = products + n % 2 * 3 * width;
    // all lanes of a warp stay together, because they add up their sums
    for (int item = tid; item < (width + kWarp - 1) / kWarp * kWarp; item += threads) {
      const int position = item >> plan.slab_bits, c = item & (plan.slab() - 1);
      const bool real = item < width && c < scan.channels;
      float sums[kNumSums] = {};
      if (real) {
        const int row = scan.row(line, position), column = scan.column(line, position);
        const auto h_at = [&](int l, int q) { return history[scan.offset(call.grad_x, l, q, c)]; };
        RawGates<T> raw;
        raw.read(call, scan, k, line, position, kShared ? scan.group : scan.channel + c);
        const float dy = load(*scan.at(call.grad_y, line, position, c)), x = load(*scan.at(call.x, line, position, c));
        const float output_gate = call.output_gate.data ? load(raw.output_gate) : 1.f, h = h_at(line, position);
        float d = scale * output_gate * dy;
        if (n + 1 < scan.length) {
          d += after[width + item];
          if (position > 0) d += after[2 * width + item - plan.slab()];
          if (position + 1 < scan.positions) d += after[item + plan.slab()];
        }
        Weights<float> w{0.f, 0.f, 0.f};
        if (n) {
          w = raw.weights(Sides(scan, position));
          const float minus = position > 0 ? h_at(line_before, position - 1) : 0.f;
          const float centre = h_at(line_before, position);
          const float plus = position + 1 < scan.positions ? h_at(line_before, position + 1) : 0.f;
          sums[kSumMinus] = decay * d * minus;
          sums[kSumCentre] = decay * d * centre;
          sums[kSumPlus] = decay * d * plus;
          decay_sum += d * carried(w, minus, centre, plus);
        }
        sums[kSumInputGate] = d * x;
        sums[kSumOutputGate] = scale * dy * h;
        scale_sum += output_gate * dy * h;
        handed[item] = w.minus * decay * d;
        handed[width + item] = w.centre * decay * d;
        handed[2 * width + item] = w.plus * decay * d;
        const int64_t at = scan.offset(call.grad_x, line, position, c);
        const float dx = load(raw.input_gate) * d + (sum.before ? sum.before[at] : 0.f);
        if (sum.partial) sum.partial[at] = dx;
        else store(call.grad_x.data[at], dx);
        if constexpr (!kShared) {
          Weights<float> grad{0.f, 0.f, 0.f};
          if (n) {
            grad = normalise_backward(load(raw.minus), load(raw.centre), load(raw.plus), w,
                                      Weights<float>{sums[kSumMinus], sums[kSumCentre], sums[kSumPlus]});
          }
          const int64_t g = scan.channel + c;
          T* to = gate_at(call.grad_gates, 5, scan.batch, row, column, k, g);
          store(to[0], grad.minus);
          store(to[call.grad_gates.stride[4]], grad.centre);
          store(to[2 * call.grad_gates.stride[4]], grad.plus);
          store(*gate_at(call.grad_input_gate, 4, scan.batch, row, column, k, g), sums[kSumInputGate]);
          if (call.grad_output_gate.data)
            store(*gate_at(call.grad_output_gate, 4, scan.batch, row, column, k, g), sums[kSumOutputGate]);
        }
      } else if (item < width) {
        handed[item] = handed[width + item] = handed[2 * width + item] = 0.f;
      }
      if constexpr (kShared) {  // over the slab's channels, which are neighbouring lanes
        for (int lanes = plan.slab() / 2; lanes >= 1; lanes /= 2)
#pragma unroll
          for (int s = 0; s < kNumSums; ++s) sums[s] += __shfl_xor_sync(kAllLanes, sums[s], lanes);
        if (real && c == 0) {
          const int64_t rows = call.problem.groups * partial.group_rows;
          const int64_t first = ((scan.batch * call.problem.num_directions + k) * rows + scan.slab_index) *
                                call.problem.height * call.problem.width;
          const int64_t token = scan.row(line, position) * call.problem.width + scan.column(line, position);
          float* to = partial.data + (first + token) * kNumSums;
#pragma unroll
          for (int s = 0; s < kNumSums; ++s) to[s] = sums[s];
        }
      }
    }
  }
  if (!call.grad_decay && !call.grad_scale) return;
  __syncthreads();
  products[tid] = decay_sum;
  products[threads + tid] = scale_sum;
  __syncthreads();
  if (tid >= plan.slab() || own >= scan.channels) return;
  decay_sum = scale_sum = 0.f;
  for (int t = tid; t < threads; t += plan.slab()) {  // the sums of one channel, always in the same order
    decay_sum += products[t];
    scale_sum += products[threads + t];
  }
  // not scan.chunk_index, for which there is no register in the loop
  const unsigned chunk = unsigned(scan.first + scan.chunks.missing) / unsigned(scan.chunks.size);
  const int64_t row = scan.batch * most_chunks(call.problem) + chunk;
  const int64_t to = (row * call.problem.num_directions + k) * call.problem.channels + scan.channel + own;
  if (call.grad_decay) call.grad_decay[to] = decay_sum;
  if (call.grad_scale) call.grad_scale[to] = scale_sum;
}

}  // namespace gspn
