// Sinkhorn ranking: what its CPU and CUDA rooms share, the checks at the door and the shapes behind it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

#include "tensors.h"

namespace aha {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// AHA_RANKING_PLAN=dense, blocks or nodes takes one for all images that it can do; tests compare them.
enum class RankingPlan { fastest, dense, blocks, nodes };
inline RankingPlan asked_for() {
  const char* name = std::getenv("AHA_RANKING_PLAN");
  if (!name || !*name) return RankingPlan::fastest;
  if (!std::strcmp(name, "dense")) return RankingPlan::dense;
  if (!std::strcmp(name, "nodes")) return RankingPlan::nodes;
  STD_TORCH_CHECK(!std::strcmp(name, "blocks"), "AHA_RANKING_PLAN=", name,
                  " is not known: set it to dense, blocks or nodes");
  return RankingPlan::blocks;
}

struct RankingShape {
  int64_t batch, k, iterations;
};

inline void check_like(const Tensor& value, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(value.scalar_type() == like.scalar_type() && value.device() == like.device(), name,
                  " must have the type and the device of the scores; convert it with .to()");
}

// one scaling more than iterations is counted in 32 bits
inline void check_iterations(int64_t iterations, const char* name) {
  STD_TORCH_CHECK(iterations >= 1 && iterations < INT32_MAX, name, ": n_iters is ", iterations,
                  "; it must be at least 1 and below 2^31 - 1");
}

inline RankingShape check_ranking(const Tensor& scores, const Tensor& tau, const Tensor& seed,
                                  const std::optional<Tensor>& left, const std::optional<Tensor>& right,
                                  const std::optional<Tensor>& start, int64_t iterations) {
  STD_TORCH_CHECK(scores.dim() == 2 && scores.size(1) > 0, "gumbel_sinkhorn: scores must be (B,K) with K >= 1");
  check_iterations(iterations, "gumbel_sinkhorn");
  STD_TORCH_CHECK(tau.dim() == 0 && seed.dim() == 0, "gumbel_sinkhorn: tau and seed must have no dimension");
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.device() == scores.device(),
                  "gumbel_sinkhorn: seed must be int64 on the device of the scores");
  check_like(tau, "gumbel_sinkhorn: tau", scores);
  STD_TORCH_CHECK(!left || !right, "gumbel_sinkhorn: give left or right, not both");
  const RankingShape shape{scores.size(0), scores.size(1), iterations};
  if (left) {
    check_like(*left, "gumbel_sinkhorn: left", scores);
    STD_TORCH_CHECK(left->dim() == 2 && left->size(1) == shape.k, "gumbel_sinkhorn: left must be (S,K), K = ", shape.k);
  }
  const auto check_scores_like = [&](const std::optional<Tensor>& given, const char* name) {
    if (!given) return;
    check_like(*given, name, scores);
    STD_TORCH_CHECK(given->dim() == 2 && given->size(0) == shape.batch && given->size(1) == shape.k, name,
                    " must be (B,K) as the scores");
  };
  check_scores_like(right, "gumbel_sinkhorn: right");
  check_scores_like(start, "gumbel_sinkhorn: start");
  return shape;
}

inline RankingShape check_logits(const Tensor& logits, int64_t iterations) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.size(1) == logits.size(2) && logits.size(1) > 0,
                  "log_sinkhorn: logits must be square matrices (B,K,K) with K >= 1");
  check_iterations(iterations, "log_sinkhorn");
  return {logits.size(0), logits.size(1), iterations};
}

inline int64_t iterations_of(const Tensor& absorbed) { return absorbed.dim() == 2 ? absorbed.size(1) : 0; }

inline void check_state(const RankingShape& shape, const Tensor& scalings, const Tensor& absorbed, const Tensor& like) {
  check_like(scalings, "sinkhorn backward: scalings", like);
  STD_TORCH_CHECK(scalings.dim() == 4 && scalings.size(0) == shape.batch && scalings.size(1) == shape.iterations + 1 &&
                      scalings.size(2) == 2 && scalings.size(3) == shape.k && absorbed.dim() == 2 &&
                      absorbed.size(0) == shape.batch && absorbed.size(1) == shape.iterations &&
                      absorbed.scalar_type() == ScalarType::Int && absorbed.device() == like.device(),
                  "sinkhorn backward: scalings (B,T+1,2,K) and absorbed (B,T) are those that the forward pass returned");
}

inline std::vector<int64_t> out_sizes(const RankingShape& shape, const std::optional<Tensor>& left,
                                      const std::optional<Tensor>& right) {
  if (right) return {shape.batch, shape.k};
  return {shape.batch, left ? left->size(0) : shape.k, shape.k};
}

inline void check_grad(const Tensor& grad, const Tensor& like, const std::vector<int64_t>& sizes) {
  check_like(grad, "sinkhorn backward: grad", like);
  bool fits = grad.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; fits && d < sizes.size(); ++d) fits = grad.size(static_cast<int64_t>(d)) == sizes[d];
  STD_TORCH_CHECK(fits, "sinkhorn backward: grad must have the sizes of the output");
}

// given: the permutation (B,K,K), or backwards the gradient (B,S,K)
inline void check_masks(const Tensor& given, const Tensor& left, bool backward) {
  STD_TORCH_CHECK(given.dim() == 3 && left.dim() == 2 && given.size(2) == left.size(1) &&
                      given.size(1) == left.size(backward ? 0 : 1),
                  "cumulative_masks: permutation (B,K,K), backwards grad (B,S,K), and left (S,K) must match");
  check_like(left, "cumulative_masks: left", given);
}

}  // namespace aha
