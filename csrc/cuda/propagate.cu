// Which kernel runs a call, and its launches.
//
// Calls in 16-bit elements run on tensor cores where cuda/tensor.cu takes them. What follows runs the others.
//
// Map kernels (cuda/map_*.h): a map whose lines have up to 32 tokens is held in a block's memory, if two blocks or one
// fit on a multiprocessor; x is then read once and y written once. So is a tile of whole windows of up to 32 tokens.
// Forward, another larger map is cut into tiles of 32 × 32 tokens, after a pass that writes h at their edges
// (cuda/edges.h). Walk kernels (cuda/walk.h) run the rest line by line, one direction after another: backward on larger
// maps, lines of more than 512 tokens, a single direction of a large map, channels that do not lie side by side.
#include "propagate.h"

#include "cuda/edges.h"
#include "cuda/kernel.h"
#include "cuda/launching.h"
#include "cuda/map_backward.h"
#include "cuda/tail.h"
#include "cuda/tensor.h"
#include "cuda/walk.h"
#include "scan.h"

namespace gspn {
namespace {

constexpr int kLongestLine = 32;

// No block's slab crosses a multiple of this many channels: a group where gates are shared.
int domain(const Problem& p) { return int(p.groups == p.channels ? p.channels : p.channels / p.groups); }
bool shares_gates(const Problem& p) { return p.groups < p.channels; }

template <typename T>
bool contiguous(const Strided<T>& t, const Problem& p) {
  const int64_t size[4] = {p.batch, p.height, p.width, p.channels};
  int64_t stride = 1;
  for (int axis = 3; axis >= 0; stride *= size[axis--])
    if (size[axis] > 1 && t.stride[axis] != stride) return false;
  return true;
}
// Whether every channel's own gates can be read n channels at a time.
template <typename T>
bool gates_vectorise(const Problem& p, const Strided<T>& gates, const Strided<T>& input_gate,
                     const Strided<T>& output_gate, int n) {
  return vectorises(p, gates, 5, n) && vectorises(p, input_gate, 4, n) && vectorises(p, output_gate, 4, n);
}

// Whether the elements of a tile's lines are counted in int.
bool fits_int(const Problem& p) { return kLongestLine * p.width * p.channels < INT32_MAX; }

// A map kernel's plan: `parts` is 0 if the map does not fit, or a layout stands in the way.
struct MapChoice {
  MapPlan plan;
  int line;  // 16 or 32
  size_t shared_bytes = 0;
  int64_t blocks = 0;
  explicit operator bool() const { return plan.parts > 0; }
  bool linked() const { return plan.grid.linked; }

  // Of a map that is not chosen yet.
  explicit MapChoice(const Problem& p)
      : plan{0, 0, 0, TileGrid(p, longest_line(p)), false, false, false}, line(longest_line(p)) {}

 private:
  // The longest line in a block, rounded up: of the map, or of a window.
  static int longest_line(const Problem& p) {
    const int64_t longest = p.height > p.width ? p.height : p.width;
    return (p.window && p.window < longest ? p.window : longest) <= 16 ? 16 : kLongestLine;
  }
};

// bytes(line, height, width, parts) is a block's shared memory, width_of_warp(line) a warp's channels.
template <typename Bytes, typename WarpWidth>
MapChoice choose_map(const Problem& p, const SharedMemory& memory, int max_parts, Bytes bytes,
                     WarpWidth width_of_warp) {
  MapChoice choice(p);
  const int warp_channels = width_of_warp(choice.line);
  const int height = choice.plan.grid.rows.size, width = choice.plan.grid.columns.size;
  constexpr int64_t kReserved = 1024;  // of a block, by the system
  for (const int blocks_at_once : {2, 1}) {  // two: one block reads while another scans
    for (int parts = max_parts; parts >= 1; parts /= 2) {
      const size_t size = bytes(choice.line, height, width, parts);
      const bool fits = int64_t(size) <= memory.of_a_block &&
                        blocks_at_once * (int64_t(size) + kReserved) <= memory.of_a_multiprocessor;
      const bool idle = parts > 1 && (parts / 2) * warp_channels >= domain(p);  // half of the block would do
      if (!fits || idle) continue;
      choice.plan.parts = parts;
      choice.plan.domain = domain(p);
      choice.plan.domain_slabs = int(divide_up(domain(p), parts * warp_channels));
      choice.shared_bytes = size;
      choice.blocks = p.batch * (p.channels / domain(p)) * choice.plan.domain_slabs * choice.plan.grid.count();
      return choice;
    }
  }
  return choice;
}

size_t edge_bytes(const Problem& p) {
  const int longest = int(p.height > p.width ? p.height : p.width);
  return (shares_gates(p) ? LineGates::bytes(longest) : 0) + LineEnds::bytes(int(divide_up(longest, EdgeLanes::kLine)));
}

// Lanes of the forward pass. A warp of Short has 32 channels of a line, one of Narrow or Long 16, so that no lane is
// idle in groups of 16 channels.
using Short = Lanes<16, 4>;
using Narrow = Lanes<16, 2>;
using Long = Lanes<32, 4>;
bool is_narrow(const Problem& p) { return shares_gates(p) && domain(p) <= Narrow::kWarpChannels; }

template <typename T>
MapChoice choose_map(const Forward<T>& call, const SharedMemory& memory) {
  constexpr int kN = Lanes<16, 4>::kLaneChannels;
  const Problem& p = call.problem;
  const bool aligned = p.channels % kN == 0 && domain(p) % kN == 0;
  const MapChoice none(p);
  if (!contiguous(call.y, p) || !fits_int(p)) return none;
  if (!shares_gates(p) && !(aligned && gates_vectorise(p, call.gates, call.input_gate, call.output_gate, kN)))
    return none;
  MapChoice choice = choose_map(p, memory, 2, [&](int line, int height, int width, int parts) {
    return line == 32 ? map_forward_bytes<Long>(height, width, parts, sizeof(T))
           : is_narrow(p) ? map_forward_bytes<Narrow>(height, width, parts, sizeof(T))
                          : map_forward_bytes<Short>(height, width, parts, sizeof(T));
  }, [&](int line) { return line == 16 && !is_narrow(p) ? Short::kWarpChannels : Long::kWarpChannels; });
  choice.plan.vector_x = aligned && vectorises(p, call.x, 3, kN);
  choice.plan.vector_y = aligned;
  const int64_t longest = p.height > p.width ? p.height : p.width;
  const bool edges_fit = longest <= kEdgeThreads && int64_t(edge_bytes(p)) <= memory.of_a_block;
  if (choice.linked() && !(choice.plan.vector_x && edges_fit && p.num_directions > 1)) return none;
  return choice;
}

template <typename T>
MapChoice choose_map(const Backward<T>& call, const SharedMemory& memory) {
  constexpr int kN = Lanes<16, 2>::kLaneChannels;
  const Problem& p = call.problem;
  const bool aligned = p.channels % kN == 0 && domain(p) % kN == 0;
  const MapChoice none(p);
  if (!contiguous(call.grad_x, p) || none.linked() || !fits_int(p)) return none;
  if (!shares_gates(p) && !(aligned && gates_vectorise(p, call.gates, call.input_gate, call.output_gate, kN) &&
                            gates_vectorise(p, call.grad_gates, call.grad_input_gate, call.grad_output_gate, kN)))
    return none;
  MapChoice choice = choose_map(p, memory, 4, [&](int line, int height, int width, int parts) {
    return line == 16 ? map_backward_bytes<16>(height, width, parts, sizeof(T))
                      : map_backward_bytes<32>(height, width, parts, sizeof(T));
  }, [](int line) { return line == 16 ? Lanes<16, 2>::kWarpChannels : Lanes<32, 2>::kWarpChannels; });
  choice.plan.vector_x = aligned && vectorises(p, call.x, 3, kN);
  choice.plan.vector_grad = aligned && vectorises(p, call.grad_y, 3, kN);
  choice.plan.vector_y = aligned;
  return choice;
}

// kItems of walk_forward: what a thread reads ahead. Longer lines than these can cover are not read ahead. Where channels
// have their own gates, half as many do for lines that twice the threads cover.
constexpr int kSharedItems = 4, kOwnItems = 4;

template <typename T>
WalkPlan plan_walk(const Problem& p, const Strided<const T>& x, int k, int64_t widest_line) {
  const int direction = p.directions[k];
  const int64_t longest = p.height > p.width ? p.height : p.width;  // one slab for all directions
  int bits = 5;
  while (bits > 0 && ((1 << bits) / 2 >= domain(p) || (longest << bits) > widest_line)) --bits;
  const bool tokens_side_by_side = x.stride[3] != 1 && x.stride[lines_are_rows(direction) ? 2 : 1] == 1;
  if (tokens_side_by_side && !shares_gates(p)) bits = 0;
  return {bits, domain(p), int(divide_up(domain(p), 1 << bits)), k, ScanOrder<int>(p, direction)};
}

using Order = ScanOrder<int64_t>;

int64_t walk_blocks(const Problem& p, const WalkPlan& plan) {
  return p.batch * (p.channels / plan.domain) * plan.domain_slabs * plan.order.chunks.count();
}

int round_to_warps(int64_t threads) { return int(divide_up(threads, kWarp) * kWarp); }

// A launch of a walk kernel.
struct WalkLaunch {
  WalkPlan plan;
  int threads;
  size_t bytes;  // of shared memory
  bool shared;   // walk_forward: gates are prepared once for the slab
  int items;     // walk_forward: how many a thread reads ahead, or 0

  // Null if the launch is possible, else why not.
  const char* refusal(const SharedMemory& memory) const {
    return int64_t(bytes) <= memory.of_a_block ? nullptr : "a line is too long for the shared memory of this device";
  }
};

template <typename T>
WalkLaunch plan_walk_forward(const Problem& p, const Strided<const T>& x, int k) {
  const int64_t positions = Order(p, p.directions[k]).positions;
  const bool shared = shares_gates(p) && positions <= kSharedThreads;
  int items = shared ? kSharedItems : kOwnItems;
  const int most = shared ? kSharedThreads : kOwnThreads;
  const WalkPlan plan = plan_walk(p, x, k, int64_t(items) * most);
  const int64_t width = positions * plan.slab();
  int64_t threads = divide_up(width, items);
  if (shared && threads < positions) threads = positions;
  if (!shared && 2 * threads <= most) threads *= 2, items /= 2;
  if (threads > most) threads = most, items = 0;
  const size_t bytes = 2 * width * sizeof(float) + (shared ? LineGates::bytes(int(positions)) : 0);
  return {plan, round_to_warps(threads), bytes, shared, items};
}

template <typename T>
const char* launch_walk_forward(const Forward<T>& call, int k, const SharedMemory& memory, const Accumulation& sum,
                                float* history, cudaStream_t stream) {
  const WalkLaunch walk = plan_walk_forward(call.problem, call.x, k);
  if (const char* reason = walk.refusal(memory)) return reason;
  const auto run = [&](auto kernel) {
    const int64_t blocks = walk_blocks(call.problem, walk.plan);
    return describe(launch(kernel, blocks, walk.threads, walk.bytes, stream, call, walk.plan, sum, history));
  };
  if (walk.shared) return run(walk_forward<T, true, kSharedItems>);
  switch (walk.items) {
    case kOwnItems: return run(walk_forward<T, false, kOwnItems>);
    case kOwnItems / 2: return run(walk_forward<T, false, kOwnItems / 2>);
    default: return run(walk_forward<T, false, 0>);
  }
}

// Elements of x, and of every result of its shape.
int64_t elements(const Problem& p) { return p.batch * p.height * p.width * p.channels; }

// The widest line (in tokens times channels) whose three products fit on chip twice.
int64_t widest_backward(const SharedMemory& memory) { return memory.of_a_block / int64_t(6 * sizeof(float)); }

template <typename T>
WalkLaunch plan_walk_backward(const Problem& p, const Strided<const T>& x, int k, const SharedMemory& memory) {
  const int64_t widest = widest_backward(memory);
  const WalkPlan plan = plan_walk(p, x, k, widest < 8192 ? widest : 8192);
  const int64_t width = int64_t(plan.order.positions) * plan.slab();
  const int threads = round_to_warps(width < 512 ? width : 512);
  const int64_t floats = 6 * width > 2 * threads ? 6 * width : 2 * threads;
  return {plan, threads, size_t(floats) * sizeof(float), shares_gates(p), 0};
}

template <typename T>
const char* launch_walk_backward(const Backward<T>& call, int k, const SharedMemory& memory, const Accumulation& sum,
                                 const float* history, const PartialSums& partial, cudaStream_t stream) {
  const WalkLaunch walk = plan_walk_backward(call.problem, call.x, k, memory);
  if (const char* reason = walk.refusal(memory)) return reason;
  const auto run = [&](auto kernel) {
    const int64_t blocks = walk_blocks(call.problem, walk.plan);
    return describe(launch(kernel, blocks, walk.threads, walk.bytes, stream, call, walk.plan, sum, history, partial));
  };
  return walk.shared ? run(walk_backward<T, true>) : run(walk_backward<T, false>);
}

// Rows of partial sums of one group: as many as blocks or warps share its channels.
template <typename T>
int64_t group_rows(const Backward<T>& call, const SharedMemory& memory, const MapChoice& map) {
  if (!shares_gates(call.problem)) return 0;
  if (map) return int64_t(map.plan.domain_slabs) * map.plan.parts;
  return plan_walk_backward(call.problem, call.x, 0, memory).plan.domain_slabs;
}
int64_t partial_elements(const Problem& p, int64_t rows) {
  return p.batch * p.num_directions * p.groups * rows * p.height * p.width * kNumSums;
}

// The edges of a map's tiles in scratch: of every direction, its lines' and then its sides'.
struct EdgeLayout {
  int64_t line[4], side[4], elements = 0;

  EdgeLayout(const Problem& p, int tile) {
    for (int k = 0; k < p.num_directions; ++k) {
      const Order scan(p, p.directions[k]);
      line[k] = elements;
      elements += p.batch * divide_up(scan.lines, tile) * scan.positions * p.channels;
      side[k] = elements;
      elements += p.batch * scan.lines * 2 * divide_up(scan.positions, tile) * p.channels;
    }
  }
};

template <typename T>
const char* launch_edges(const Forward<T>& call, const Edges& edges, cudaStream_t stream) {
  const Problem& p = call.problem;
  constexpr int kSlabBits = 4, kSlab = 1 << kSlabBits;
  static_assert(kSlab == EdgeLanes::kWarpChannels, "a block of edge_scan scans a warp's channels");
  for (const bool rows : {true, false}) {  // all directions at once where rows and columns are as many
    const ScanOrder<int> order(p, rows ? kDown : kRight);
    EdgePlan plan{{kSlabBits, domain(p), int(divide_up(domain(p), kSlab)), 0, order}, 0, {}};
    const bool square = p.height == p.width;
    if (square && !rows) break;
    for (int k = 0; k < p.num_directions; ++k)
      if (square || lines_are_rows(p.directions[k]) == rows) plan.k[plan.directions++] = k;
    if (plan.directions == 0) continue;
    const int64_t positions = order.positions, warps = divide_up(positions, EdgeLanes::kLine);
    const size_t bytes = (shares_gates(p) ? LineGates::bytes(int(positions)) : 0) + LineEnds::bytes(int(warps));
    const int64_t blocks = walk_blocks(p, plan.slabs) * plan.directions;
    const char* error = describe(
        shares_gates(p) ? launch(edge_scan<T, true>, blocks, int(warps) * kWarp, bytes, stream, call, plan, edges)
                        : launch(edge_scan<T, false>, blocks, int(warps) * kWarp, bytes, stream, call, plan, edges));
    if (error) return error;
  }
  return nullptr;
}

// Where the sum over directions is held: float32 results hold it themselves.
template <typename T>
float* sum_in_place(T*, float* scratch) {
  return scratch;
}
float* sum_in_place(float* result, float*) { return result; }

// Calls `run` with the channels of an access, 4 or 1, and with the type that counts a map's elements.
template <typename Run>
const char* with_channels(const Problem& p, bool vector, Run run) {
  if (vector && elements(p) < (int64_t(1) << 31)) return run(std::integral_constant<int, 4>(), uint32_t());
  return run(std::integral_constant<int, 1>(), uint64_t());
}
bool aligned(const float* per_channel) { return reinterpret_cast<uintptr_t>(per_channel) % (4 * sizeof(float)) == 0; }

// Launches a kernel of (call, lanes) in which `lanes` threads share a token's group, n channels at a time.
template <typename Kernel, typename Call>
const char* launch_by_group(Kernel kernel, const Call& call, int n, cudaStream_t stream) {
  const Problem& p = call.problem;
  int lanes = 1;
  while (lanes < kWarp && lanes * n < p.channels / p.groups) lanes *= 2;
  const int64_t groups = p.batch * p.height * p.width * p.groups;
  return describe(launch(kernel, divide_up(groups, kTailThreads / lanes), kTailThreads, 0, stream, call, lanes));
}

template <typename T>
const char* launch_tail(const Forward<T>& call, cudaStream_t stream) {
  const Problem& p = call.problem;
  const bool vector = p.channels / p.groups % 4 == 0 && vectorises(p, call.x, 3, 4) && vectorises(p, call.y, 3, 4) &&
                      aligned(call.direct);
  return with_channels(p, vector, [&](auto n, auto index) {
    return launch_by_group(tail_forward<T, n, decltype(index)>, call, n, stream);
  });
}

}  // namespace

// Any call can run on walk kernels, unless its lines are too long. A map kernel's lines never are: those have up to 512
// tokens, and a block of any device of compute capability 8.0 or newer has shared memory for over 4000.
template <typename T>
const char* refusal(const Forward<T>& call, const SharedMemory& memory, bool backward) {
  const Problem& p = call.problem;
  for (int k = 0; k < p.num_directions; ++k) {
    if (const char* reason = plan_walk_forward(p, call.x, k).refusal(memory)) return reason;
    if (!backward) continue;
    if (const char* reason = plan_walk_backward(p, call.x, k, memory).refusal(memory)) return reason;
  }
  return nullptr;
}

template <typename T>
int64_t forward_scratch(const Forward<T>& call, const SharedMemory& memory) {
  if constexpr (sizeof(T) == 2) {
    if (tensor_takes(call, memory)) return tensor_scratch(call, memory);
  }
  const MapChoice map = choose_map(call, memory);
  if (map) return map.linked() ? EdgeLayout(call.problem, kLongestLine).elements : 0;
  return call.problem.num_directions > 1 && sizeof(T) < sizeof(float) ? elements(call.problem) : 0;
}

template <typename T>
static const char* run_scans(const Forward<T>& call, const SharedMemory& memory, float* scratch, cudaStream_t stream) {
  const Problem& p = call.problem;
  if (const MapChoice map = choose_map(call, memory)) {
    Edges edges{};
    const auto run = [&](auto kernel) {
      const int threads = 2 * kWarp * map.plan.parts;
      return describe(launch(kernel, map.blocks, threads, map.shared_bytes, stream, call, map.plan, edges));
    };
    const bool shared = shares_gates(p);
    if (map.linked()) {
      const EdgeLayout layout(p, kLongestLine);
      for (int k = 0; k < p.num_directions; ++k) {
        edges.line[k] = scratch + layout.line[k];
        edges.side[k] = scratch + layout.side[k];
      }
      if (const char* error = launch_edges(call, edges, stream)) return error;
      return shared ? run(map_forward<T, true, Long, true>) : run(map_forward<T, false, Long, true>);
    }
    if (map.line == 32)
      return shared ? run(map_forward<T, true, Long, false>) : run(map_forward<T, false, Long, false>);
    if (is_narrow(p)) return run(map_forward<T, true, Narrow, false>);
    return shared ? run(map_forward<T, true, Short, false>) : run(map_forward<T, false, Short, false>);
  }
  float* const partial = sum_in_place(call.y.data, scratch);
  for (int k = 0; k < p.num_directions; ++k) {
    const Accumulation sum{k > 0 ? partial : nullptr, k + 1 < p.num_directions ? partial : nullptr};
    if (const char* error = launch_walk_forward(call, k, memory, sum, nullptr, stream)) return error;
  }
  return nullptr;
}

template <typename T>
const char* run_forward(const Forward<T>& call, const SharedMemory& memory, float* scratch, void* stream_) {
  if constexpr (sizeof(T) == 2) {
    if (tensor_takes(call, memory)) return run_tensor_forward(call, memory, scratch, stream_);  // with the tail
  }
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (const char* error = run_scans(call, memory, scratch, stream)) return error;
  return call.direct ? launch_tail(call, stream) : nullptr;
}

template <typename T>
const char* run_tail_backward(const TailBackward<T>& call, void* stream) {
  const Problem& p = call.problem;
  const bool vector = p.channels / p.groups % 4 == 0 && vectorises(p, call.x, 3, 4) && vectorises(p, call.y, 3, 4) &&
                      vectorises(p, call.grad_y, 3, 4) && vectorises(p, call.grad_scanned, 3, 4) &&
                      aligned(call.direct);
  return with_channels(p, vector, [&](auto n, auto index) {
    return launch_by_group(tail_backward<T, n, decltype(index)>, call, n, static_cast<cudaStream_t>(stream));
  });
}

template <typename T>
TailShare tail_share(const Backward<T>& call, const TailBackward<T>& passes, const SharedMemory& memory) {
  if constexpr (sizeof(T) == 2) {
    if (tensor_takes(call, memory)) return tensor_tail_share(passes);
  }
  return TailShare::kNone;
}

int64_t pass_rows(const Problem& p) { return divide_up(p.batch * p.height * p.width, kTokensOfARow); }

int64_t direct_rows(const Problem& p, TailShare inside) {
  return inside == TailShare::kNone ? pass_rows(p) : tensor_backward_rows(p);
}

template <typename T>
const char* run_direct_backward(const TailBackward<T>& call, void* stream) {
  const Problem& p = call.problem;
  const bool vector = p.channels % 4 == 0 && vectorises(p, call.x, 3, 4) && vectorises(p, call.grad_y, 3, 4) &&
                      vectorises(p, call.grad_x, 3, 4) && aligned(call.direct);
  return with_channels(p, vector, [&](auto n, auto index) {
    const int64_t blocks = divide_up(pass_rows(p) * (p.channels / n), kTailThreads);
    return describe(launch(direct_backward<T, n, decltype(index)>, blocks, kTailThreads, 0,
                           static_cast<cudaStream_t>(stream), call));
  });
}

template <typename T>
int64_t backward_scratch(const Backward<T>& call, const SharedMemory& memory) {
  if constexpr (sizeof(T) == 2) {
    if (tensor_takes(call, memory)) return tensor_scratch(call);
  }
  const Problem& p = call.problem;
  const MapChoice map = choose_map(call, memory);
  const int64_t sums = partial_elements(p, group_rows(call, memory, map));
  if (map) return sums;
  const bool needs_dx = p.num_directions > 1 && sizeof(T) < sizeof(float);
  return sums + elements(p) * (needs_dx ? 2 : 1);  // h, and dx while it is summed
}

template <typename T>
int64_t backward_rows(const Backward<T>& call, const SharedMemory& memory) {
  if constexpr (sizeof(T) == 2) {
    if (tensor_takes(call, memory)) return tensor_backward_rows(call.problem);
  }
  const MapChoice map = choose_map(call, memory);
  return call.problem.batch * (map ? map.plan.grid.count() : most_chunks(call.problem));
}

template <typename T>
const char* run_backward(const Backward<T>& call, const SharedMemory& memory, float* scratch, void* stream_) {
  if constexpr (sizeof(T) == 2) {
    if (tensor_takes(call, memory)) return run_tensor_backward(call, memory, scratch, stream_);
  }
  const auto stream = static_cast<cudaStream_t>(stream_);
  const Problem& p = call.problem;
  const MapChoice map = choose_map(call, memory);
  const PartialSums partial{scratch, group_rows(call, memory, map)};
  if (map) {
    const int threads = 2 * kWarp * map.plan.parts;
    const auto run = [&](auto kernel) {
      return describe(launch(kernel, map.blocks, threads, map.shared_bytes, stream, call, map.plan, partial));
    };
    const char* error = shares_gates(p)
                            ? (map.line == 16 ? run(map_backward<T, true, 16>) : run(map_backward<T, true, 32>))
                            : (map.line == 16 ? run(map_backward<T, false, 16>) : run(map_backward<T, false, 32>));
    if (error) return error;
  } else {
    float* const history = scratch + partial_elements(p, partial.group_rows);
    float* const dx = sum_in_place(call.grad_x.data, history + elements(p));
    // h of one direction, with the strides of dx
    const Forward<T> again{p, call.x, call.gates, call.input_gate, call.output_gate, call.decay, call.scale,
                           call.grad_x};
    for (int k = 0; k < p.num_directions; ++k) {
      const Accumulation sum{k > 0 ? dx : nullptr, k + 1 < p.num_directions ? dx : nullptr};
      if (const char* error = launch_walk_forward(again, k, memory, {nullptr, nullptr}, history, stream)) return error;
      if (const char* error = launch_walk_backward(call, k, memory, sum, history, partial, stream)) return error;
    }
  }
  if (!shares_gates(p)) return nullptr;
  const int64_t count = p.batch * p.num_directions * p.groups * p.height * p.width;
  const int64_t blocks = divide_up(count, 256) < (1 << 20) ? divide_up(count, 256) : 1 << 20;
  return describe(launch(gate_gradients<T>, blocks, 256, 0, stream, call, partial));
}

const char* unusable() {
#if !defined(GSPN_EMULATED_CUDA)
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, map_forward<float, true, Short, false>);
  cudaGetLastError();  // clears the error, so that no later launch reports it
  return describe(error);
#else
  return nullptr;
#endif
}

#define GSPN_INSTANTIATE(T)                                                                              \
  template const char* refusal<T>(const Forward<T>&, const SharedMemory&, bool);                          \
  template int64_t forward_scratch<T>(const Forward<T>&, const SharedMemory&);                           \
  template const char* run_forward<T>(const Forward<T>&, const SharedMemory&, float*, void*);            \
  template TailShare tail_share<T>(const Backward<T>&, const TailBackward<T>&, const SharedMemory&);     \
  template const char* run_tail_backward<T>(const TailBackward<T>&, void*);                              \
  template const char* run_direct_backward<T>(const TailBackward<T>&, void*);                            \
  template int64_t backward_scratch<T>(const Backward<T>&, const SharedMemory&);                         \
  template int64_t backward_rows<T>(const Backward<T>&, const SharedMemory&);                            \
  template const char* run_backward<T>(const Backward<T>&, const SharedMemory&, float*, void*);
GSPN_INSTANTIATE(float)
GSPN_INSTANTIATE(BFloat16)
GSPN_INSTANTIATE(Float16)

}  // namespace gspn
