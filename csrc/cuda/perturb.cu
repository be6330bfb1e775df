// Deletion and insertion on CUDA, by soft masks on a grid (perturb) and by pixel rank (perturb_by_rank).
// Kernels and their reasons: perturb.cuh.
#include "perturb.cuh"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "perturb_checks.h"

namespace aha::pixels {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t MAX_BLOCKS_YZ = 65535;

// Calls f with a value of the C++ type of `type`.
template <typename F>
void with_image_type(const char* op, ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default:
      STD_TORCH_CHECK(false, op, " on CUDA: images, gradients and outputs must be float32, bfloat16 or float16, not ",
                      torch::headeronly::toString(type), "; convert them, or use backend=\"reference\"");
  }
}

PerturbSizes sizes_of(const char* op, const PerturbShape& shape) {
  STD_TORCH_CHECK(shape.height <= INT32_MAX && shape.width <= INT32_MAX && shape.pixels() <= INT32_MAX, op,
                  " on CUDA: an image of ", shape.height, " x ", shape.width, " has more than 2^31 - 1 pixels");
  return {shape.batch, shape.steps, shape.channels, static_cast<int>(shape.height), static_cast<int>(shape.width)};
}

// Images with one batch entry where all share it, so that an expanded reference is not copied.
struct SharedImages {
  Tensor data;
  int64_t stride;

  explicit SharedImages(const Tensor& images) {
    const bool shared = images.size(0) > 1 && images.stride(0) == 0;
    data = torch::stable::contiguous(shared ? torch::stable::narrow(const_cast<Tensor&>(images), 0, 0, 1) : images);
    stride = shared ? 0 : images.size(1) * images.size(2) * images.size(3);
  }

  template <typename T>
  Images<T> as() const {
    return {static_cast<const T*>(data.const_data_ptr()), stride};
  }
};

template <typename... Tensors>
bool aligned(const Tensors&... tensors) {
  return ((reinterpret_cast<uintptr_t>(tensors.const_data_ptr()) % 16 == 0) && ...);
}

// Calls f with the number of pixels per thread: 16 bytes of T, if rows hold a whole number and all is aligned, else 1.
template <typename T, typename F>
void with_vector(bool all_aligned, int width, const F& f) {
  constexpr int V = 16 / sizeof(T);
  if (all_aligned && width % V == 0)
    f(std::integral_constant<int, V>{});
  else
    f(std::integral_constant<int, 1>{});
}

unsigned blocks(int64_t threads) { return static_cast<unsigned>((threads + THREADS - 1) / THREADS); }

dim3 grid(int64_t x, int64_t y, int64_t z) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(std::min(y, MAX_BLOCKS_YZ)),
              static_cast<unsigned>(std::min(z, MAX_BLOCKS_YZ)));
}

cudaStream_t current_stream(const Tensor& on) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

SoftMask soft_mask(const Tensor& masks, const TapTensors& taps, const GridShape& g) {
  const auto band = [](const Tensor& cell, const Tensor& weight, int64_t taps, int64_t cells) {
    return Band{cell.const_data_ptr<int64_t>(), weight.const_data_ptr<float>(), static_cast<int>(taps),
                static_cast<int>(cells)};
  };
  return {masks.const_data_ptr<float>(), band(taps.row_cell, taps.row_weight, g.row_taps, g.rows),
          band(taps.col_cell, taps.col_weight, g.col_taps, g.cols)};
}

template <typename Mask>
void launch_write_outputs(const char* op, const PerturbSizes& size, const Mask& mask, bool mask_aligned,
                          const Tensor& images, const Tensor& references, const std::optional<Tensor>& mean,
                          const std::optional<Tensor>& std, const Tensor& deleted, const Tensor& inserted) {
  const SharedImages x(images), r(references);
  const std::optional<Tensor> shift = contiguous(mean), scale = contiguous(std);
  const bool vector = mask_aligned && aligned(x.data, r.data, deleted, inserted);
  with_image_type(op, images.scalar_type(), [&](auto in) {
    with_image_type(op, deleted.scalar_type(), [&](auto out) {
      using In = decltype(in);
      using Out = decltype(out);
      if (deleted.numel() == 0) return;  // an empty grid is a launch error
      with_vector<Out>(vector, size.width, [&](auto v) {
        constexpr int V = decltype(v)::value;
        const dim3 shape = grid(blocks(size.pixels() / V), size.groups(), size.batch);
        write_outputs<V><<<shape, THREADS, 0, current_stream(images)>>>(
            size, mask, x.as<In>(), r.as<In>(), channel_pointer<float>(shift), channel_pointer<float>(scale),
            static_cast<Out*>(deleted.mutable_data_ptr()), static_cast<Out*>(inserted.mutable_data_ptr()));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
    });
  });
}

TensorPair perturb(const Tensor& images, const Tensor& references, const Tensor& masks, const Tensor& row_cell,
                   const Tensor& row_weight, const Tensor& col_cell, const Tensor& col_weight, int64_t rows,
                   int64_t cols, const std::optional<Tensor>& mean, const std::optional<Tensor>& std,
                   std::optional<ScalarType> dtype) {
  const ScalarType out = dtype.value_or(images.scalar_type());
  const TapTensors taps(row_cell, row_weight, col_cell, col_weight);
  const auto [shape, cells] = check_perturb(images, references, masks, taps, rows, cols, mean, std, out);
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const PerturbSizes size = sizes_of("perturb", shape);
  const auto [deleted, inserted] = new_pair(images, shape.output_sizes(), out);
  const Tensor weights = torch::stable::contiguous(masks);
  launch_write_outputs("perturb", size, soft_mask(weights, taps, cells), true, images, references, mean, std,
                       deleted, inserted);
  return {deleted, inserted};
}

TensorPair perturb_by_rank(const Tensor& images, const Tensor& references, const Tensor& ranks, const Tensor& counts,
                           const std::optional<Tensor>& mean, const std::optional<Tensor>& std,
                           std::optional<ScalarType> dtype) {
  const ScalarType out = dtype.value_or(images.scalar_type());
  const PerturbShape shape = check_perturb_by_rank(images, references, ranks, counts, mean, std, out);
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const PerturbSizes size = sizes_of("perturb_by_rank", shape);
  const auto [deleted, inserted] = new_pair(images, shape.output_sizes(), out);
  const Tensor rank = torch::stable::contiguous(ranks), count = torch::stable::contiguous(counts);
  const RankMask mask{rank.const_data_ptr<int32_t>(), count.const_data_ptr<int32_t>()};
  launch_write_outputs("perturb_by_rank", size, mask, aligned(rank), images, references, mean, std, deleted,
                       inserted);
  return {deleted, inserted};
}

template <typename Mask>
void launch_sum_gradients(const char* op, const PerturbSizes& size, const Mask& mask, bool mask_aligned,
                          const Tensor& deleted, const Tensor& inserted, const std::optional<Tensor>& scale,
                          const Tensor& images, const Tensor& references) {
  with_image_type(op, deleted.scalar_type(), [&](auto grad) {
    with_image_type(op, images.scalar_type(), [&](auto out) {
      using Grad = decltype(grad);
      using Out = decltype(out);
      if (images.numel() == 0) return;  // an empty grid is a launch error
      // four pixels in every type: the masks of eight and their sums do not fit the registers
      with_vector<float>(mask_aligned && aligned(deleted, inserted, images, references), size.width, [&](auto v) {
        constexpr int V = decltype(v)::value;
        const dim3 shape = grid(blocks(size.pixels() / V), size.channels, size.batch);
        sum_gradients<V><<<shape, THREADS, 0, current_stream(images)>>>(
            size, mask, static_cast<const Grad*>(deleted.const_data_ptr()),
            static_cast<const Grad*>(inserted.const_data_ptr()), channel_pointer<float>(scale),
            static_cast<Out*>(images.mutable_data_ptr()), static_cast<Out*>(references.mutable_data_ptr()));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
    });
  });
}

TensorPair perturb_by_rank_backward(const Tensor& grad_deleted, const Tensor& grad_inserted, const Tensor& ranks,
                                    const Tensor& counts, const std::optional<Tensor>& std,
                                    std::optional<ScalarType> dtype) {
  constexpr const char* OP = "perturb_by_rank_backward";
  const ScalarType out = dtype.value_or(grad_deleted.scalar_type());
  const PerturbShape shape = check_perturb_by_rank_backward(grad_deleted, grad_inserted, ranks, counts, std, out);
  const torch::stable::accelerator::DeviceGuard guard(grad_deleted.get_device_index());
  const PerturbSizes size = sizes_of(OP, shape);
  const auto [grad_images, grad_references] = new_pair(grad_deleted, shape.image_sizes(), out);
  const Tensor d = torch::stable::contiguous(grad_deleted), i = torch::stable::contiguous(grad_inserted);
  const Tensor rank = torch::stable::contiguous(ranks), count = torch::stable::contiguous(counts);
  const RankMask mask{rank.const_data_ptr<int32_t>(), count.const_data_ptr<int32_t>()};
  launch_sum_gradients(OP, size, mask, aligned(rank), d, i, contiguous(std), grad_images, grad_references);
  return {grad_images, grad_references};
}

Tensor launch_mask_gradient(const char* op, const PerturbSizes& size, const SoftMask& mask, const Tensor& masks,
                            const SharedImages& x, const SharedImages& r, const Tensor& deleted,
                            const Tensor& inserted, const std::optional<Tensor>& scale) {
  const int64_t cells = static_cast<int64_t>(mask.rows.cells) * mask.cols.cells;
  const Tensor grad = torch::stable::new_empty(masks, {size.batch, size.steps, cells});
  if (grad.numel() == 0) return grad;
  if (size.pixels() == 0) return torch::stable::new_zeros(masks, {size.batch, size.steps, cells});
  const cudaStream_t stream = current_stream(masks);
  const Tiling tiling(size);
  const Tensor ranges = torch::stable::new_empty(masks, {2 * (mask.rows.cells + mask.cols.cells)}, ScalarType::Int);
  const Tensor partial = torch::stable::new_empty(
      masks, {size.batch, size.steps, size.height, tiling.strips, mask.cols.cells}, ScalarType::Float);
  int* range = ranges.mutable_data_ptr<int>();
  const Range row_range{range, range + mask.rows.cells};
  const Range col_range{range + 2 * mask.rows.cells, range + 2 * mask.rows.cells + mask.cols.cells};
  const unsigned most = blocks(static_cast<int64_t>(std::max(mask.rows.cells, mask.cols.cells)) * WARP);
  find_ranges<<<dim3(most, 2), THREADS, 0, stream>>>(mask.rows, size.height, row_range, mask.cols, size.width,
                                                     col_range);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  with_image_type(op, x.data.scalar_type(), [&](auto in) {
    with_image_type(op, deleted.scalar_type(), [&](auto value) {
      using In = decltype(in);
      using Grad = decltype(value);
      with_vector<Grad>(aligned(x.data, r.data, deleted, inserted), size.width, [&](auto v) {
        constexpr int V = decltype(v)::value;
        const dim3 shape = grid(tiling.tiles(size), size.groups(), size.batch);
        reduce_columns<V><<<shape, THREADS, 0, stream>>>(
            size, mask.cols, col_range, x.as<In>(), r.as<In>(), channel_pointer<float>(scale),
            static_cast<const Grad*>(deleted.const_data_ptr()), static_cast<const Grad*>(inserted.const_data_ptr()),
            partial.mutable_data_ptr<float>());
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
    });
  });
  const unsigned threads = static_cast<unsigned>(std::min<int64_t>(blocks(grad.numel()), 1 << 20));
  reduce_rows<<<threads, THREADS, 0, stream>>>(size, mask.rows, row_range, mask.cols.cells,
                                               partial.const_data_ptr<float>(), grad.mutable_data_ptr<float>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> perturb_backward(
    const Tensor& grad_deleted, const Tensor& grad_inserted, const Tensor& images, const Tensor& references,
    const Tensor& masks, const Tensor& row_cell, const Tensor& row_weight, const Tensor& col_cell,
    const Tensor& col_weight, int64_t rows, int64_t cols, const std::optional<Tensor>& std, bool need_images) {
  constexpr const char* OP = "perturb_backward";
  const TapTensors taps(row_cell, row_weight, col_cell, col_weight);
  const auto [shape, cells] = check_perturb_backward(grad_deleted, grad_inserted, images, references, masks, taps,
                                                     rows, cols, std);
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const PerturbSizes size = sizes_of(OP, shape);
  const Tensor weights = torch::stable::contiguous(masks);
  const Tensor d = torch::stable::contiguous(grad_deleted), i = torch::stable::contiguous(grad_inserted);
  const std::optional<Tensor> scale = contiguous(std);
  const SoftMask mask = soft_mask(weights, taps, cells);
  const SharedImages x(images), r(references);
  const Tensor grad_masks = launch_mask_gradient(OP, size, mask, weights, x, r, d, i, scale);
  const auto image_sizes = need_images ? shape.image_sizes() : std::vector<int64_t>{0};
  const auto [grad_images, grad_references] = new_pair(images, image_sizes, images.scalar_type());
  if (need_images) launch_sum_gradients(OP, size, mask, true, d, i, scale, grad_images, grad_references);
  return {grad_masks, grad_images, grad_references};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aha, CUDA, m) {
  m.impl("perturb", TORCH_BOX(&perturb));
  m.impl("perturb_backward", TORCH_BOX(&perturb_backward));
  m.impl("perturb_by_rank", TORCH_BOX(&perturb_by_rank));
  m.impl("perturb_by_rank_backward", TORCH_BOX(&perturb_by_rank_backward));
}

}  // namespace aha::pixels
