// Deletion and insertion by pixel rank on CUDA.
//   inserted = rank < count ? x : r,  deleted = rank < count ? r : x,  then (y - mean) / std and a cast
// Bound by the 2 B S C H W values written; images, references and ranks are re-read from L2 for each count.
// The backward pass sums the counts in their order, one thread per sum: no atomics, results repeat bit for bit.
#include "perturb.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

namespace aha {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int THREADS = 256;
constexpr int64_t MAX_BLOCKS_Y = 65535;

// grid: x over pixels, y over (image, count) pairs
template <typename Out>
__global__ void __launch_bounds__(THREADS)
    forward_kernel(const float* __restrict__ x, const float* __restrict__ r, const int32_t* __restrict__ ranks,
                   const int32_t* __restrict__ counts, const float* __restrict__ mean,
                   const float* __restrict__ std, int64_t pairs, int64_t steps, int64_t channels, int64_t n,
                   Out* __restrict__ deleted, Out* __restrict__ inserted) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= n) return;
  for (int64_t pair = blockIdx.y; pair < pairs; pair += gridDim.y) {
    const int64_t b = pair / steps;
    const bool keep = ranks[b * n + i] < counts[pair % steps];
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t from = (b * channels + c) * n + i, to = (pair * channels + c) * n + i;
      const float shift = mean ? mean[c] : 0.0f, scale = std ? std[c] : 1.0f;
      const float image = (x[from] - shift) / scale, reference = (r[from] - shift) / scale;
      inserted[to] = static_cast<Out>(keep ? image : reference);
      deleted[to] = static_cast<Out>(keep ? reference : image);
    }
  }
}

// grid: x over pixels, y over (image, channel) planes
template <typename Grad>
__global__ void __launch_bounds__(THREADS)
    backward_kernel(const Grad* __restrict__ deleted, const Grad* __restrict__ inserted,
                    const int32_t* __restrict__ ranks, const int32_t* __restrict__ counts,
                    const float* __restrict__ std, int64_t planes, int64_t steps, int64_t channels, int64_t n,
                    float* __restrict__ images, float* __restrict__ references) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= n) return;
  for (int64_t plane = blockIdx.y; plane < planes; plane += gridDim.y) {
    const int64_t b = plane / channels, c = plane % channels;
    const int32_t rank = ranks[b * n + i];
    float image = 0.0f, reference = 0.0f;
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t from = ((b * steps + s) * channels + c) * n + i;
      const float d = static_cast<float>(deleted[from]), g = static_cast<float>(inserted[from]);
      const bool keep = rank < counts[s];
      image += keep ? g : d;
      reference += keep ? d : g;
    }
    const float scale = std ? std[c] : 1.0f;
    images[plane * n + i] = image / scale;
    references[plane * n + i] = reference / scale;
  }
}

void check_float(ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float, "perturb_by_rank on CUDA: images are ",
                  torch::headeronly::toString(type), "; use float32 images, or backend=\"reference\"");
}

template <typename F>
void with_image_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default:
      STD_TORCH_CHECK(false, "perturb_by_rank on CUDA: dtype is ", torch::headeronly::toString(type),
                      "; use float32, bfloat16 or float16");
  }
}

dim3 grid(int64_t n, int64_t rows) {
  return dim3(static_cast<unsigned>((n + THREADS - 1) / THREADS), static_cast<unsigned>(std::min(rows, MAX_BLOCKS_Y)));
}

cudaStream_t current_stream(const Tensor& on) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

TensorPair perturb_by_rank(const Tensor& images, const Tensor& references, const Tensor& ranks, const Tensor& counts,
                           const std::optional<Tensor>& mean, const std::optional<Tensor>& std,
                           std::optional<ScalarType> dtype) {
  const PerturbShape shape = check_perturb(images, references, ranks, counts, mean, std);
  check_float(images.scalar_type());
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const ScalarType out_type = dtype.value_or(images.scalar_type());
  const std::vector<int64_t> sizes{shape.batch, shape.steps, shape.channels, shape.height, shape.width};
  Tensor deleted = torch::stable::new_empty(images, sizes, out_type);
  Tensor inserted = torch::stable::new_empty(images, sizes, out_type);
  const Tensor x = torch::stable::contiguous(images), r = torch::stable::contiguous(references);
  const Tensor rank = torch::stable::contiguous(ranks), count = torch::stable::contiguous(counts);
  const std::optional<Tensor> shift = contiguous(mean), scale = contiguous(std);
  const int64_t n = shape.pixels(), pairs = shape.batch * shape.steps;

  with_image_type(out_type, [&](auto out) {
    using Out = decltype(out);
    if (deleted.numel() == 0) return;  // an empty grid is a launch error
    forward_kernel<Out><<<grid(n, pairs), THREADS, 0, current_stream(images)>>>(
        x.const_data_ptr<float>(), r.const_data_ptr<float>(), rank.const_data_ptr<int32_t>(),
        count.const_data_ptr<int32_t>(), channel_pointer<float>(shift), channel_pointer<float>(scale), pairs,
        shape.steps, shape.channels, n, static_cast<Out*>(deleted.mutable_data_ptr()),
        static_cast<Out*>(inserted.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {deleted, inserted};
}

TensorPair perturb_by_rank_backward(const Tensor& grad_deleted, const Tensor& grad_inserted, const Tensor& ranks,
                                    const Tensor& counts, const std::optional<Tensor>& std,
                                    std::optional<ScalarType> dtype) {
  const ScalarType type = dtype.value_or(grad_deleted.scalar_type());
  const PerturbShape shape = check_perturb_backward(grad_deleted, grad_inserted, ranks, counts, std, type);
  check_float(type);
  const torch::stable::accelerator::DeviceGuard guard(grad_deleted.get_device_index());
  const std::vector<int64_t> sizes{shape.batch, shape.channels, shape.height, shape.width};
  Tensor grad_images = torch::stable::new_empty(grad_deleted, sizes, type);
  Tensor grad_references = torch::stable::new_empty(grad_deleted, sizes, type);
  const Tensor d = torch::stable::contiguous(grad_deleted), g = torch::stable::contiguous(grad_inserted);
  const Tensor rank = torch::stable::contiguous(ranks), count = torch::stable::contiguous(counts);
  const std::optional<Tensor> scale = contiguous(std);
  const int64_t n = shape.pixels(), planes = shape.batch * shape.channels;

  with_image_type(grad_deleted.scalar_type(), [&](auto grad) {
    using Grad = decltype(grad);
    if (grad_images.numel() == 0) return;  // an empty grid is a launch error
    backward_kernel<Grad><<<grid(n, planes), THREADS, 0, current_stream(grad_deleted)>>>(
        static_cast<const Grad*>(d.const_data_ptr()), static_cast<const Grad*>(g.const_data_ptr()),
        rank.const_data_ptr<int32_t>(), count.const_data_ptr<int32_t>(), channel_pointer<float>(scale), planes,
        shape.steps, shape.channels, n, grad_images.mutable_data_ptr<float>(),
        grad_references.mutable_data_ptr<float>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_images, grad_references};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aha, CUDA, m) {
  m.impl("perturb_by_rank", TORCH_BOX(&perturb_by_rank));
  m.impl("perturb_by_rank_backward", TORCH_BOX(&perturb_by_rank_backward));
}

}  // namespace aha
