// Deletion and insertion by pixel rank on the CPU.
//   inserted = rank < count ? x : r,  deleted = rank < count ? r : x,  then (y - mean) / std and a cast
// Bound by the 2 B S C H W values written. Threads share out rows, never sums: results repeat bit for bit.
#include "perturb.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

#include "clones.h"

namespace aha {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t GRAIN = 1 << 15;  // values per task: a thread costs about as much as writing this many
constexpr int64_t TILE = 1 << 11;   // pixels whose running sums stay in the first-level cache

// One channel of one (image, count): n pixels.
template <typename T, typename Out>
AHA_INLINE void blend_row(const T* x, const T* r, const int32_t* rank, int32_t count, T mean, T std, int64_t n,
                          Out* deleted, Out* inserted) {
  for (int64_t i = 0; i < n; ++i) {
    const T image = (x[i] - mean) / std, reference = (r[i] - mean) / std;
    const bool keep = rank[i] < count;
    inserted[i] = static_cast<Out>(keep ? image : reference);
    deleted[i] = static_cast<Out>(keep ? reference : image);
  }
}

// One channel of one (image, count), added to the sums of n pixels.
template <typename T, typename Grad>
AHA_INLINE void add_row(const Grad* deleted, const Grad* inserted, const int32_t* rank, int32_t count, int64_t n,
                        T* image, T* reference) {
  for (int64_t i = 0; i < n; ++i) {
    const T d = static_cast<T>(deleted[i]), g = static_cast<T>(inserted[i]);
    const bool keep = rank[i] < count;
    image[i] += keep ? g : d;
    reference[i] += keep ? d : g;
  }
}

// target_clones does not combine with templates, so each pair of types is spelled out
#define AHA_ROWS(T, O)                                                                                          \
  AHA_CLONES void blend(const T* x, const T* r, const int32_t* rank, int32_t count, T mean, T std, int64_t n,  \
                        O* deleted, O* inserted) {                                                              \
    blend_row(x, r, rank, count, mean, std, n, deleted, inserted);                                              \
  }                                                                                                             \
  AHA_CLONES void add(const O* deleted, const O* inserted, const int32_t* rank, int32_t count, int64_t n,      \
                      T* image, T* reference) {                                                                 \
    add_row(deleted, inserted, rank, count, n, image, reference);                                               \
  }
AHA_ROWS(float, float)
AHA_ROWS(float, double)
AHA_ROWS(float, BFloat16)
AHA_ROWS(float, Half)
AHA_ROWS(double, float)
AHA_ROWS(double, double)
AHA_ROWS(double, BFloat16)
AHA_ROWS(double, Half)
#undef AHA_ROWS

// Calls f with a value of the C++ type of `type`.
template <typename F>
void with_sum_type(ScalarType type, const F& f) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "perturb_by_rank on the CPU: images are ",
                  torch::headeronly::toString(type), "; use float32 or float64");
  type == ScalarType::Float ? f(float{}) : f(double{});
}

template <typename F>
void with_image_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default:
      STD_TORCH_CHECK(false, "perturb_by_rank: dtype is ", torch::headeronly::toString(type),
                      "; use float32, float64, bfloat16 or float16");
  }
}

TensorPair perturb_by_rank(const Tensor& images, const Tensor& references, const Tensor& ranks, const Tensor& counts,
                           const std::optional<Tensor>& mean, const std::optional<Tensor>& std,
                           std::optional<ScalarType> dtype) {
  const PerturbShape shape = check_perturb(images, references, ranks, counts, mean, std);
  const ScalarType out_type = dtype.value_or(images.scalar_type());
  const std::vector<int64_t> sizes{shape.batch, shape.steps, shape.channels, shape.height, shape.width};
  Tensor deleted = torch::stable::new_empty(images, sizes, out_type);
  Tensor inserted = torch::stable::new_empty(images, sizes, out_type);
  const Tensor x = torch::stable::contiguous(images), r = torch::stable::contiguous(references);
  const Tensor rank = torch::stable::contiguous(ranks), count = torch::stable::contiguous(counts);
  const std::optional<Tensor> shift = contiguous(mean), scale = contiguous(std);
  const int64_t n = shape.pixels(), channels = shape.channels;

  with_sum_type(images.scalar_type(), [&](auto sum) {
    with_image_type(out_type, [&](auto out) {
      using T = decltype(sum);
      using Out = decltype(out);
      const T* x_data = static_cast<const T*>(x.const_data_ptr());
      const T* r_data = static_cast<const T*>(r.const_data_ptr());
      const int32_t* rank_data = rank.const_data_ptr<int32_t>();
      const int32_t* count_data = count.const_data_ptr<int32_t>();
      const T *shift_data = channel_pointer<T>(shift), *scale_data = channel_pointer<T>(scale);
      Out* deleted_data = static_cast<Out*>(deleted.mutable_data_ptr());
      Out* inserted_data = static_cast<Out*>(inserted.mutable_data_ptr());

      // a row is one channel of one (image, count)
      const int64_t rows = shape.batch * shape.steps * channels, grain = GRAIN / std::max<int64_t>(n, 1) + 1;
      torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t c = row % channels, s = row / channels % shape.steps, b = row / channels / shape.steps;
          const int64_t from = (b * channels + c) * n;
          blend(x_data + from, r_data + from, rank_data + b * n, count_data[s], shift_data ? shift_data[c] : T{0},
                scale_data ? scale_data[c] : T{1}, n, deleted_data + row * n, inserted_data + row * n);
        }
      });
    });
  });
  return {deleted, inserted};
}

TensorPair perturb_by_rank_backward(const Tensor& grad_deleted, const Tensor& grad_inserted, const Tensor& ranks,
                                    const Tensor& counts, const std::optional<Tensor>& std,
                                    std::optional<ScalarType> dtype) {
  const ScalarType type = dtype.value_or(grad_deleted.scalar_type());
  const PerturbShape shape = check_perturb_backward(grad_deleted, grad_inserted, ranks, counts, std, type);
  const std::vector<int64_t> sizes{shape.batch, shape.channels, shape.height, shape.width};
  Tensor grad_images = torch::stable::new_empty(grad_deleted, sizes, type);
  Tensor grad_references = torch::stable::new_empty(grad_deleted, sizes, type);
  const Tensor d = torch::stable::contiguous(grad_deleted), g = torch::stable::contiguous(grad_inserted);
  const Tensor rank = torch::stable::contiguous(ranks), count = torch::stable::contiguous(counts);
  const std::optional<Tensor> scale = contiguous(std);
  const int64_t n = shape.pixels(), channels = shape.channels, tiles = (n + TILE - 1) / TILE;

  with_sum_type(type, [&](auto sum) {
    with_image_type(grad_deleted.scalar_type(), [&](auto grad) {
      using T = decltype(sum);
      using Grad = decltype(grad);
      const Grad* d_data = static_cast<const Grad*>(d.const_data_ptr());
      const Grad* g_data = static_cast<const Grad*>(g.const_data_ptr());
      const int32_t* rank_data = rank.const_data_ptr<int32_t>();
      const int32_t* count_data = count.const_data_ptr<int32_t>();
      const T* scale_data = channel_pointer<T>(scale);
      T* image_data = static_cast<T*>(grad_images.mutable_data_ptr());
      T* reference_data = static_cast<T*>(grad_references.mutable_data_ptr());

      // a task is one tile of pixels of one (image, channel), summed over the counts in their order
      const int64_t tasks = shape.batch * channels * tiles, grain = GRAIN / (TILE * (shape.steps + 1)) + 1;
      torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t plane = task / tiles, b = plane / channels, c = plane % channels;
          const int64_t from = task % tiles * TILE, size = std::min(TILE, n - from);
          T *image = image_data + plane * n + from, *reference = reference_data + plane * n + from;
          std::fill_n(image, size, T{0});
          std::fill_n(reference, size, T{0});
          for (int64_t s = 0; s < shape.steps; ++s) {
            const int64_t row = ((b * shape.steps + s) * channels + c) * n + from;
            add(d_data + row, g_data + row, rank_data + b * n + from, count_data[s], size, image, reference);
          }
          if (!scale_data) continue;
          for (int64_t i = 0; i < size; ++i) image[i] /= scale_data[c], reference[i] /= scale_data[c];
        }
      });
    });
  });
  return {grad_images, grad_references};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aha, CPU, m) {
  m.impl("perturb_by_rank", TORCH_BOX(&perturb_by_rank));
  m.impl("perturb_by_rank_backward", TORCH_BOX(&perturb_by_rank_backward));
}

}  // namespace aha
