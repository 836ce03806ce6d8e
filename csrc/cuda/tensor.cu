// Which calls run on tensor cores, and their launches.
#include "cuda/tensor.h"

#include <atomic>

#include "cuda/launching.h"
#include "cuda/tensor_backward.h"
#include "cuda/tensor_wide.h"

namespace gspn {
namespace {

int channels_of(const Problem& p) { return int(p.channels / p.groups); }

TileGrid grid_of(const Problem& p) { return TileGrid(p, kTileSites); }
// Whether scans cross the borders of tiles.
bool has_linked_tiles(const Problem& p) { return grid_of(p).linked; }

// Calls `run` with the two constants of tensor_forward() that depend on a call.
template <typename Run>
auto with_units(const Problem& p, Run run) {
  switch (channels_of(p)) {
    case 16: return run(std::integral_constant<int, 2>());
    case 32: return run(std::integral_constant<int, 4>());
    default: return run(std::integral_constant<int, 8>());
  }
}
template <TensorMode kMode>
using Mode = std::integral_constant<TensorMode, kMode>;
template <typename T, typename Run>
auto with_mode(const Forward<T>& call, Run run) {
  if (call.output_gate.data) return run(Mode<TensorMode::kTiledWithGates>());
  return has_linked_tiles(call.problem) ? run(Mode<TensorMode::kTiled>()) : run(Mode<TensorMode::kWhole>());
}

// Tiles of all images, for one group.
int64_t tiles(const Problem& p) { return p.batch * grid_of(p).count(); }

// Calls `run` with the constants of tensor_backward() that depend on a call: kUnits, kTiled, kGates.
template <typename T, typename Run>
auto with_constants(const Backward<T>& call, Run run) {
  return with_units(call.problem, [&](auto units) {
    if (call.output_gate.data) return run(units, std::true_type(), std::true_type());
    return has_linked_tiles(call.problem) ? run(units, std::true_type(), std::false_type())
                                          : run(units, std::false_type(), std::false_type());
  });
}

// Bytes of a block's shared memory for `senses` of an axis at once.
template <typename T>
int64_t backward_bytes(const Backward<T>& call, bool both_senses) {
  return with_constants(call, [&](auto units, auto tiled, auto) {
    return int64_t(BackwardMemory<decltype(units)::value, decltype(tiled)::value>::bytes(both_senses));
  });
}

template <typename T>
TensorBackwardPlan plan_backward(const Backward<T>& call, const SharedMemory& memory) {
  const Problem& p = call.problem;
  TensorBackwardPlan plan{channels_of(p), {-1, -1, -1, -1}, false, false, false, grid_of(p)};
  for (int k = 0; k < p.num_directions; ++k) plan.k[p.directions[k]] = k;
  plan.both_senses = backward_bytes(call, true) <= memory.of_a_block;
  plan.wide_gates = gates_side_by_side(p, call.gates, call.input_gate);
  plan.wide_grads = plan.both_senses && gates_side_by_side(p, call.grad_gates, call.grad_input_gate);
  return plan;
}

// What runs a forward call.
enum class ForwardKernels {
  kTiles,        // tensor_forward() on tiles of up to 16 × 16 tokens that need nothing of each other
  kWideTiles,    // tensor_wide() on such tiles of up to 32 × 32
  kLinkedTiles,  // tensor_edges(), then tensor_forward() on tiles of 16 × 16
  kNone,         // what it needs does not fit into the device's memory
};

// Bytes of a block's shared memory.
template <typename T>
int64_t forward_bytes(const Forward<T>& call) {
  return with_mode(call, [&](auto mode) {
    return with_units(call.problem, [&](auto units) {
      return int64_t(ForwardMemory<decltype(units)::value, decltype(mode)::value>::kBytes);
    });
  });
}
template <typename T, typename Run>
auto with_wide_memory(const Forward<T>& call, Run run) {
  return with_units(call.problem, [&](auto units) {
    constexpr int kUnits = decltype(units)::value;
    if (call.output_gate.data) return run(WideMemory<kUnits, true>());
    return run(WideMemory<kUnits, false>());
  });
}
template <typename T>
ForwardKernels choose_forward(const Forward<T>& call, const SharedMemory& memory) {
  const Problem& p = call.problem;
  const bool tile_fits = forward_bytes(call) <= memory.of_a_block;
  if (!has_linked_tiles(p)) return tile_fits ? ForwardKernels::kTiles : ForwardKernels::kNone;
  const int64_t wide_bytes = with_wide_memory(call, [](auto wide) { return int64_t(decltype(wide)::kBytes); });
  if (!TileGrid(p, kWideSites).linked && wide_bytes <= memory.of_a_block) return ForwardKernels::kWideTiles;
  return tile_fits && tile_edges_fit(p, memory) ? ForwardKernels::kLinkedTiles : ForwardKernels::kNone;
}

std::atomic<bool> tensor_cores_are_used{true};

}  // namespace

void use_tensor_cores(bool on) { tensor_cores_are_used = on; }

template <typename T>
bool tensor_takes(const Forward<T>& call, const SharedMemory& memory) {
  const Problem& p = call.problem;
  const int channels = channels_of(p);
  return tensor_cores_are_used && p.groups < p.channels && channels % kWarpRows == 0 && channels <= 64 &&
         vectorises(p, call.x, 3, 8) && vectorises(p, call.y, 3, 8) &&
         choose_forward(call, memory) != ForwardKernels::kNone;
}

template <typename T>
int64_t tensor_scratch(const Forward<T>& call, const SharedMemory& memory) {
  if (choose_forward(call, memory) != ForwardKernels::kLinkedTiles) return 0;
  return divide_up(TileEdgeLayout(call.problem).elements * int64_t(sizeof(T)), sizeof(float));
}

template <typename T>
const char* run_tensor_forward(const Forward<T>& call, const SharedMemory& memory, float* scratch, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const Problem& p = call.problem;
  const ForwardKernels kernels = choose_forward(call, memory);
  if (kernels == ForwardKernels::kWideTiles) {
    WidePlan plan{channels_of(p), TileGrid(p, kWideSites), {-1, -1, -1, -1}};
    for (int k = 0; k < p.num_directions; ++k) plan.k[p.directions[k]] = k;
    return with_wide_memory(call, [&](auto wide) {
      using Memory = decltype(wide);
      return describe(launch(tensor_wide<T, Memory::Map::kUnits, Memory::kHasGates>,
                             p.batch * plan.grid.count() * p.groups, Memory::kThreads, Memory::kBytes, stream, call,
                             plan));
    });
  }
  T* const any = const_cast<T*>(call.x.data);  // a valid address, from which nothing is read
  TileEdges<T> edges{{any, any, any, any}, {any, any, any, any}};
  if (kernels == ForwardKernels::kLinkedTiles) {
    edges = TileEdgeLayout(p).at(reinterpret_cast<T*>(scratch), p);
    if (const char* error = describe(launch_tile_edges(call, edges, memory, stream))) return error;
  }
  TensorPlan plan{channels_of(p), gates_are_packed(call), grid_of(p), {false, false}};
  for (int k = 0; k < p.num_directions; ++k) plan.scans_axis[lines_are_rows(p.directions[k]) ? 0 : 1] = true;
  return with_mode(call, [&](auto mode) {
    return with_units(p, [&](auto units) {
      constexpr int kUnits = decltype(units)::value;
      constexpr TensorMode kMode = decltype(mode)::value;
      using Memory = ForwardMemory<kUnits, kMode>;
      return describe(launch(tensor_forward<T, kUnits, kMode>, tiles(p) * p.groups, Memory::kThreads, Memory::kBytes,
                             stream, call, edges, plan));
    });
  });
}

template <typename T>
bool tensor_takes(const Backward<T>& call, const SharedMemory& memory) {
  const Problem& p = call.problem;
  const int channels = channels_of(p);
  return tensor_cores_are_used && p.groups < p.channels && channels % kWarpRows == 0 && channels <= 64 &&
         vectorises(p, call.x, 3, 8) &&
         vectorises(p, call.grad_y, 3, 8) && vectorises(p, call.grad_x, 3, 8) &&
         backward_bytes(call, false) <= memory.of_a_block && (!has_linked_tiles(p) || tile_edges_fit(p, memory));
}

// The edges of h, and as many of what its gradient carries.
template <typename T>
int64_t tensor_scratch(const Backward<T>& call) {
  return has_linked_tiles(call.problem) ? TileEdgeLayout(call.problem).elements : 0;  // two of 16 bits each
}

int64_t tensor_backward_rows(const Problem& p) { return tiles(p); }

template <typename T>
TailShare tensor_tail_share(const TailBackward<T>& passes) {
  const Problem& p = passes.problem;
  if (!vectorises(p, passes.y, 3, 8) || !vectorises(p, passes.grad_y, 3, 8)) return TailShare::kNone;
  // edges are made of the gradient of the sum, so it has to be there before the tiles
  return has_linked_tiles(p) ? TailShare::kDirect : TailShare::kAll;
}

template <typename T>
const char* run_tensor_backward(const Backward<T>& call, const SharedMemory& memory, float* scratch, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const Problem& p = call.problem;
  const TensorBackwardPlan plan = plan_backward(call, memory);
  T* const any = const_cast<T*>(call.x.data);  // a valid address, from which nothing is read
  TileEdges<T> hidden{{any, any, any, any}, {any, any, any, any}}, carried = hidden;
  if (has_linked_tiles(p)) {
    const TileEdgeLayout layout(p);
    T* const edges = reinterpret_cast<T*>(scratch);
    hidden = layout.at(edges, p), carried = layout.at(edges + layout.elements, p);
    const Forward<T> again{p,          call.x,     call.gates,  call.input_gate, call.output_gate,
                           call.decay, call.scale, call.grad_x, nullptr,         nullptr};
    Backward<T> unscaled = call;  // tensor_backward() multiplies by s
    unscaled.scale = nullptr;
    if (const char* error = describe(launch_tile_edges(again, hidden, memory, stream))) return error;
    if (const char* error = describe(launch_tile_edges(unscaled, carried, memory, stream))) return error;
  }
  return with_constants(call, [&](auto units, auto tiled, auto gates) {
    constexpr int kUnits = decltype(units)::value;
    constexpr bool kTiled = decltype(tiled)::value, kGates = decltype(gates)::value;
    using Memory = BackwardMemory<kUnits, kTiled>;
    return describe(launch(tensor_backward<T, kUnits, kTiled, kGates>, tiles(p) * p.groups, Memory::kThreads,
                           Memory::bytes(plan.both_senses), stream, call, plan, hidden, carried));
  });
}

#define GSPN_INSTANTIATE(T)                                                                                \
  template bool tensor_takes<T>(const Forward<T>&, const SharedMemory&);                                   \
  template int64_t tensor_scratch<T>(const Forward<T>&, const SharedMemory&);                              \
  template const char* run_tensor_forward<T>(const Forward<T>&, const SharedMemory&, float*, void*);       \
  template bool tensor_takes<T>(const Backward<T>&, const SharedMemory&);                                  \
  template int64_t tensor_scratch<T>(const Backward<T>&);                                                  \
  template TailShare tensor_tail_share<T>(const TailBackward<T>&);                                         \
  template const char* run_tensor_backward<T>(const Backward<T>&, const SharedMemory&, float*, void*);
GSPN_INSTANTIATE(BFloat16)
GSPN_INSTANTIATE(Float16)
#undef GSPN_INSTANTIATE

}  // namespace gspn
