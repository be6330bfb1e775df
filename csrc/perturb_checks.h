// perturb and perturb_by_rank: what their CPU and CUDA rooms check at the door, and the shapes behind it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "tensors.h"

namespace aha {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorPair = std::tuple<Tensor, Tensor>;

struct PerturbShape {
  int64_t batch, steps, channels, height, width;
  int64_t pixels() const { return height * width; }
  std::vector<int64_t> image_sizes() const { return {batch, channels, height, width}; }
  std::vector<int64_t> output_sizes() const { return {batch, steps, channels, height, width}; }
};

// The cells of the mask grid, and how many of them a row and a column of pixels read.
struct GridShape {
  int64_t rows, cols, row_taps, col_taps;
  int64_t cells() const { return rows * cols; }
};

// Arithmetic is in float32, for float64 images in float64.
inline ScalarType sum_type(ScalarType images) {
  return images == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool has_sizes(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t d = 0;
  for (const int64_t size : sizes)
    if (tensor.size(d++) != size) return false;
  return true;
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

inline void check_image_type(const char* op, const char* name, ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  op, ": ", name, " is ", torch::headeronly::toString(type),
                  "; use float32, float64, bfloat16 or float16");
}

// What accompanies the images: in one type, on their device.
inline void check_beside(const char* op, const char* name, const Tensor& values, ScalarType type,
                         const Tensor& like) {
  STD_TORCH_CHECK(values.scalar_type() == type && values.device() == like.device(), op, ": ", name, " must be ",
                  torch::headeronly::toString(type), " on the device of the images; convert it with .to()");
}

// mean or std: absent, or one value per channel in the type of the arithmetic.
inline void check_channels(const char* op, const char* name, const std::optional<Tensor>& values, ScalarType type,
                           const Tensor& like, int64_t channels) {
  if (!values) return;
  STD_TORCH_CHECK(has_sizes(*values, {channels}), op, ": ", name, " has ", values->numel(), " values in ",
                  values->dim(), " dimensions; it must be (C,) with C = ", channels);
  check_beside(op, name, *values, type, like);
}

inline void check_images(const char* op, const Tensor& images, const Tensor& references) {
  STD_TORCH_CHECK(images.dim() == 4 && same_sizes(images, references), op,
                  ": images and references must both be (B,C,H,W) with equal sizes");
  check_image_type(op, "the type of the images", images.scalar_type());
  STD_TORCH_CHECK(references.scalar_type() == images.scalar_type() && references.device() == images.device(), op,
                  ": references must have the type and the device of the images; convert with .to()");
}

inline PerturbShape shape_of(const Tensor& images, int64_t steps) {
  return {images.size(0), steps, images.size(1), images.size(2), images.size(3)};
}

inline PerturbShape check_gradients(const char* op, const Tensor& grad_deleted, const Tensor& grad_inserted) {
  STD_TORCH_CHECK(grad_deleted.dim() == 5 && same_sizes(grad_deleted, grad_inserted), op,
                  ": both gradients must be (B,S,C,H,W) with equal sizes");
  check_image_type(op, "the type of the gradients", grad_deleted.scalar_type());
  STD_TORCH_CHECK(
      grad_inserted.scalar_type() == grad_deleted.scalar_type() && grad_inserted.device() == grad_deleted.device(),
      op, ": both gradients must have one type and one device");
  return {grad_deleted.size(0), grad_deleted.size(1), grad_deleted.size(2), grad_deleted.size(3),
          grad_deleted.size(4)};
}

// The bands of the two interpolation matrices, contiguous.
struct TapTensors {
  Tensor row_cell, row_weight, col_cell, col_weight;

  TapTensors(const Tensor& rc, const Tensor& rw, const Tensor& cc, const Tensor& cw)
      : row_cell(torch::stable::contiguous(rc)), row_weight(torch::stable::contiguous(rw)),
        col_cell(torch::stable::contiguous(cc)), col_weight(torch::stable::contiguous(cw)) {}
};

inline GridShape check_grid(const char* op, const PerturbShape& shape, const Tensor& masks, const TapTensors& taps,
                            int64_t rows, int64_t cols, const Tensor& images) {
  const ScalarType type = sum_type(images.scalar_type());
  STD_TORCH_CHECK(rows > 0 && cols > 0 && rows <= INT32_MAX / cols, op, ": the grid has ", rows, " x ", cols,
                  " cells; it must have 1 to 2^31 - 1");
  STD_TORCH_CHECK(has_sizes(masks, {shape.batch, shape.steps, rows * cols}), op,
                  ": masks must be (B,S,rows*cols) with B = ", shape.batch, " and ", rows * cols, " cells");
  check_beside(op, "masks", masks, type, images);
  const std::tuple<const char*, const Tensor&, const Tensor&, int64_t> axes[] = {
      {"row", taps.row_cell, taps.row_weight, shape.height}, {"col", taps.col_cell, taps.col_weight, shape.width}};
  for (const auto& [axis, cell, weight, pixels] : axes) {
    STD_TORCH_CHECK(cell.dim() == 2 && cell.size(0) == pixels && same_sizes(cell, weight), op, ": ", axis,
                    "_cell and ", axis, "_weight must both be (pixels, taps) with ", pixels, " pixels");
    check_beside(op, axis, cell, ScalarType::Long, images);
    check_beside(op, axis, weight, type, images);
  }
  return {rows, cols, taps.row_cell.size(1), taps.col_cell.size(1)};
}

inline std::pair<PerturbShape, GridShape> check_perturb(const Tensor& images, const Tensor& references,
                                                        const Tensor& masks, const TapTensors& taps, int64_t rows,
                                                        int64_t cols, const std::optional<Tensor>& mean,
                                                        const std::optional<Tensor>& std, ScalarType out) {
  check_images("perturb", images, references);
  check_image_type("perturb", "dtype", out);
  const PerturbShape shape = shape_of(images, masks.dim() == 3 ? masks.size(1) : 0);
  check_channels("perturb", "mean", mean, sum_type(images.scalar_type()), images, shape.channels);
  check_channels("perturb", "std", std, sum_type(images.scalar_type()), images, shape.channels);
  return {shape, check_grid("perturb", shape, masks, taps, rows, cols, images)};
}

inline std::pair<PerturbShape, GridShape> check_perturb_backward(const Tensor& grad_deleted,
                                                                 const Tensor& grad_inserted, const Tensor& images,
                                                                 const Tensor& references, const Tensor& masks,
                                                                 const TapTensors& taps, int64_t rows, int64_t cols,
                                                                 const std::optional<Tensor>& std) {
  constexpr const char* OP = "perturb_backward";
  check_images(OP, images, references);
  const PerturbShape shape = check_gradients(OP, grad_deleted, grad_inserted);
  STD_TORCH_CHECK(has_sizes(images, {shape.batch, shape.channels, shape.height, shape.width}) &&
                      grad_deleted.device() == images.device(),
                  OP, ": gradients (B,S,C,H,W) must fit the images (B,C,H,W) and be on their device");
  check_channels(OP, "std", std, sum_type(images.scalar_type()), images, shape.channels);
  return {shape, check_grid(OP, shape, masks, taps, rows, cols, images)};
}

inline void check_ranks(const char* op, const PerturbShape& shape, const Tensor& ranks, const Tensor& counts,
                        const Tensor& like) {
  STD_TORCH_CHECK(ranks.scalar_type() == ScalarType::Int && counts.scalar_type() == ScalarType::Int, op,
                  ": ranks are ", torch::headeronly::toString(ranks.scalar_type()), ", counts are ",
                  torch::headeronly::toString(counts.scalar_type()), "; both must be int32, convert with .int()");
  STD_TORCH_CHECK(ranks.device() == like.device() && counts.device() == like.device(), op,
                  ": ranks or counts are on another device than the images; move them there");
  STD_TORCH_CHECK(has_sizes(counts, {shape.steps}), op, ": counts have ", counts.dim(), " dimensions and ",
                  counts.numel(), " values; they must be (S,)");
  STD_TORCH_CHECK(has_sizes(ranks, {shape.batch, shape.height, shape.width}), op, ": ranks do not fit the images; ",
                  "they must be (", shape.batch, ",", shape.height, ",", shape.width, ")");
}

inline PerturbShape check_perturb_by_rank(const Tensor& images, const Tensor& references, const Tensor& ranks,
                                          const Tensor& counts, const std::optional<Tensor>& mean,
                                          const std::optional<Tensor>& std, ScalarType out) {
  check_images("perturb_by_rank", images, references);
  check_image_type("perturb_by_rank", "dtype", out);
  const PerturbShape shape = shape_of(images, counts.numel());
  check_ranks("perturb_by_rank", shape, ranks, counts, images);
  check_channels("perturb_by_rank", "mean", mean, sum_type(images.scalar_type()), images, shape.channels);
  check_channels("perturb_by_rank", "std", std, sum_type(images.scalar_type()), images, shape.channels);
  return shape;
}

inline PerturbShape check_perturb_by_rank_backward(const Tensor& grad_deleted, const Tensor& grad_inserted,
                                                   const Tensor& ranks, const Tensor& counts,
                                                   const std::optional<Tensor>& std, ScalarType out) {
  constexpr const char* OP = "perturb_by_rank_backward";
  check_image_type(OP, "dtype", out);
  const PerturbShape shape = check_gradients(OP, grad_deleted, grad_inserted);
  check_ranks(OP, shape, ranks, counts, grad_deleted);
  check_channels(OP, "std", std, sum_type(out), grad_deleted, shape.channels);
  return shape;
}

template <typename T>
const T* channel_pointer(const std::optional<Tensor>& values) {
  return values ? static_cast<const T*>(values->const_data_ptr()) : nullptr;
}

inline TensorPair new_pair(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return {torch::stable::new_empty(like, sizes, type), torch::stable::new_empty(like, sizes, type)};
}

}  // namespace aha
