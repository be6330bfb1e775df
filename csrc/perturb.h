// perturb_by_rank: what its CPU and CUDA rooms share, the checks at the door and the shapes behind it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

namespace aha {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorPair = std::tuple<Tensor, Tensor>;

struct PerturbShape {
  int64_t batch, steps, channels, height, width;
  int64_t pixels() const { return height * width; }
};

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

inline void check_ranks(const Tensor& like, const Tensor& ranks, const Tensor& counts) {
  STD_TORCH_CHECK(ranks.scalar_type() == ScalarType::Int && counts.scalar_type() == ScalarType::Int,
                  "perturb_by_rank: ranks are ", torch::headeronly::toString(ranks.scalar_type()), ", counts are ",
                  torch::headeronly::toString(counts.scalar_type()), "; both must be int32, convert with .int()");
  STD_TORCH_CHECK(ranks.dim() == 3 && counts.dim() == 1, "perturb_by_rank: ranks have ", ranks.dim(),
                  " dimensions, counts ", counts.dim(), "; they must be (B,H,W) and (S,)");
  STD_TORCH_CHECK(ranks.device() == like.device() && counts.device() == like.device(),
                  "perturb_by_rank: ranks or counts are on another device than the images; move them there");
}

// mean or std: absent, or one value per channel in the type and on the device of the arithmetic.
inline void check_channels(const std::optional<Tensor>& values, const char* name, const Tensor& like,
                           ScalarType type, int64_t channels) {
  if (!values) return;
  STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == channels, "perturb_by_rank: ", name, " has ",
                  values->numel(), " values in ", values->dim(), " dimensions; it must be (C,) with C = ", channels);
  STD_TORCH_CHECK(values->scalar_type() == type && values->device() == like.device(), "perturb_by_rank: ", name,
                  " must be ", torch::headeronly::toString(type), " on the device of the images; convert it with .to()");
}

inline PerturbShape check_perturb(const Tensor& images, const Tensor& references, const Tensor& ranks,
                                  const Tensor& counts, const std::optional<Tensor>& mean,
                                  const std::optional<Tensor>& std) {
  STD_TORCH_CHECK(images.dim() == 4 && same_sizes(images, references),
                  "perturb_by_rank: images and references must both be (B,C,H,W) with equal sizes");
  STD_TORCH_CHECK(references.scalar_type() == images.scalar_type() && references.device() == images.device(),
                  "perturb_by_rank: references must have the type and the device of the images; convert with .to()");
  check_ranks(images, ranks, counts);
  const PerturbShape shape{images.size(0), counts.size(0), images.size(1), images.size(2), images.size(3)};
  STD_TORCH_CHECK(ranks.size(0) == shape.batch && ranks.size(1) == shape.height && ranks.size(2) == shape.width,
                  "perturb_by_rank: ranks are (", ranks.size(0), ",", ranks.size(1), ",", ranks.size(2),
                  "); for these images they must be (", shape.batch, ",", shape.height, ",", shape.width, ")");
  check_channels(mean, "mean", images, images.scalar_type(), shape.channels);
  check_channels(std, "std", images, images.scalar_type(), shape.channels);
  return shape;
}

inline PerturbShape check_perturb_backward(const Tensor& grad_deleted, const Tensor& grad_inserted,
                                           const Tensor& ranks, const Tensor& counts,
                                           const std::optional<Tensor>& std, ScalarType type) {
  STD_TORCH_CHECK(grad_deleted.dim() == 5 && same_sizes(grad_deleted, grad_inserted),
                  "perturb_by_rank_backward: both gradients must be (B,S,C,H,W) with equal sizes");
  STD_TORCH_CHECK(
      grad_inserted.scalar_type() == grad_deleted.scalar_type() && grad_inserted.device() == grad_deleted.device(),
      "perturb_by_rank_backward: both gradients must have one type and one device");
  check_ranks(grad_deleted, ranks, counts);
  const PerturbShape shape{grad_deleted.size(0), grad_deleted.size(1), grad_deleted.size(2), grad_deleted.size(3),
                           grad_deleted.size(4)};
  STD_TORCH_CHECK(counts.size(0) == shape.steps && ranks.size(0) == shape.batch && ranks.size(1) == shape.height &&
                      ranks.size(2) == shape.width,
                  "perturb_by_rank_backward: ranks (B,H,W) and counts (S,) must match gradients (B,S,C,H,W)");
  check_channels(std, "std", grad_deleted, type, shape.channels);
  return shape;
}

template <typename T>
const T* channel_pointer(const std::optional<Tensor>& values) {
  return values ? static_cast<const T*>(values->const_data_ptr()) : nullptr;
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& values) {
  return values ? std::optional<Tensor>(torch::stable::contiguous(*values)) : std::nullopt;
}

}  // namespace aha
