// What every room asks of tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace aha {

inline std::optional<torch::stable::Tensor> contiguous(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

}  // namespace aha
