// The published GSPN-1 scheme, for comparison only: channels first, the scan along the contiguous axis, one launch a line
// and one thread per token, on weights that were normalised and stored beforehand.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

template <typename T>
__device__ float value(T v) { return float(v); }

// All tensors (planes, height, width), contiguous; planes = B · C. Column w of h from column w - 1.
template <typename T>
__global__ void column(const T* x, const T* minus, const T* centre, const T* plus, const T* input_gate, T* h, int64_t planes,
                       int height, int width, int w) {
  const int64_t token = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (token >= planes * height) return;
  const int row = int(token % height);
  const int64_t at = token * width + w;
  float sum = value(input_gate[at]) * value(x[at]);
  if (w > 0) {
    if (row > 0) sum += value(minus[at]) * value(h[at - width - 1]);
    sum += value(centre[at]) * value(h[at - 1]);
    if (row + 1 < height) sum += value(plus[at]) * value(h[at + width - 1]);
  }
  h[at] = T(sum);
}

template <typename T>
int scan(const void* x, const void* minus, const void* centre, const void* plus, const void* input_gate, void* h, int64_t planes,
         int height, int width, void* stream) {
  const int threads = 256;
  const unsigned blocks = unsigned((planes * height + threads - 1) / threads);
  for (int w = 0; w < width; ++w)
    column<T><<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(x), static_cast<const T*>(minus), static_cast<const T*>(centre), static_cast<const T*>(plus),
        static_cast<const T*>(input_gate), static_cast<T*>(h), planes, height, width, w);
  return int(cudaGetLastError());
}

}  // namespace

extern "C" int scan_float32(const void* x, const void* minus, const void* centre, const void* plus, const void* input_gate, void* h,
                            int64_t planes, int height, int width, void* stream) {
  return scan<float>(x, minus, centre, plus, input_gate, h, planes, height, width, stream);
}
extern "C" int scan_bfloat16(const void* x, const void* minus, const void* centre, const void* plus, const void* input_gate, void* h,
                             int64_t planes, int height, int width, void* stream) {
  return scan<__nv_bfloat16>(x, minus, centre, plus, input_gate, h, planes, height, width, stream);
}
