// Runs csrc/cuda/tensor_edges.h by itself, for tests: with nvcc on a GPU, or emulated. Tensors are contiguous.
#include "cuda/tensor_edges.h"

namespace {

using namespace gspn;

struct Operands {
  const int64_t* sizes;  // B, H, W, C, K, G, chunk, window, shift
  const int* directions;
  const void *map, *gates, *gate, *decay, *scale;  // map: x or dy; gate: λ or u, u may be null

  Problem problem() const {
    Problem p{sizes[0], sizes[1], sizes[2], sizes[3], sizes[5], sizes[6], sizes[7], sizes[8], int(sizes[4]), {}};
    for (int k = 0; k < p.num_directions; ++k) p.directions[k] = directions[k];
    return p;
  }
  template <typename T, int N>
  static Strided<const T> contiguous(const void* data, const int64_t (&shape)[N]) {
    Strided<const T> result{static_cast<const T*>(data), {}};
    int64_t stride = 1;
    for (int axis = N - 1; axis >= 0; stride *= shape[axis--]) result.stride[axis] = stride;
    return result;
  }
  template <typename Call>
  Call call() const {
    using T = typename Call::Element;
    const Problem p = problem();
    const int64_t map_shape[4] = {p.batch, p.height, p.width, p.channels};
    const int64_t gates_shape[6] = {p.batch, p.height, p.width, p.num_directions, 3, p.groups};
    const int64_t gate_shape[5] = {p.batch, p.height, p.width, p.num_directions, p.groups};
    Call result{};
    result.problem = p;
    result.gates = contiguous<T>(gates, gates_shape);
    result.decay = static_cast<const float*>(decay), result.scale = static_cast<const float*>(scale);
    if constexpr (Call::kIsBackward) {
      result.grad_y = contiguous<T>(map, map_shape), result.output_gate = contiguous<T>(gate, gate_shape);
    } else {
      result.x = contiguous<T>(map, map_shape), result.input_gate = contiguous<T>(gate, gate_shape);
    }
    return result;
  }
};

template <typename Call>
int run(const Operands& operands, void* edges, int64_t shared_memory) {
  using T = typename Call::Element;
  const Call call = operands.call<Call>();
  const SharedMemory memory{shared_memory, shared_memory + 1024};
  if (!tile_edges_fit(call.problem, memory)) return -1;
  const TileEdgeLayout layout(call.problem);
  return launch_tile_edges(call, layout.at(static_cast<T*>(edges), call.problem), memory, cudaStream_t());
}

}  // namespace

extern "C" {

// begins: where line[0], side[0], line[1], … begin in the edges; the total of their elements is returned.
int64_t tile_edge_layout(const int64_t* sizes, const int* directions, int64_t* begins) {
  const Problem p = Operands{sizes, directions, nullptr, nullptr, nullptr, nullptr, nullptr}.problem();
  const TileEdgeLayout layout(p);
  for (int k = 0; k < p.num_directions; ++k) begins[2 * k] = layout.line[k], begins[2 * k + 1] = layout.side[k];
  return layout.elements;
}
int run_tensor_edges(bool backward, bool bfloat16, const int64_t* sizes, const int* directions, const void* map,
                     const void* gates, const void* gate, const void* decay, const void* scale, void* edges,
                     int64_t shared_memory) {
  const Operands operands{sizes, directions, map, gates, gate, decay, scale};
  if (backward) {
    return bfloat16 ? run<Backward<BFloat16>>(operands, edges, shared_memory)
                    : run<Backward<Float16>>(operands, edges, shared_memory);
  }
  return bfloat16 ? run<Forward<BFloat16>>(operands, edges, shared_memory)
                  : run<Forward<Float16>>(operands, edges, shared_memory);
}
}
