// Cumulative masks on the CPU: left P for a left that is mostly zero, so P is read about once.
// Threads share out columns (forward) or rows (backward), never sums: results repeat bit for bit.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "by_rank.h"
#include "lanes.h"
#include "sinkhorn.h"

namespace aha {
namespace {

constexpr int64_t TILE = 256;  // columns per task
constexpr int64_t ROWS = 16;   // rows per task

#define AHA_ADD(T)                                                                                   \
  AHA_CLONES void add(T weight, const T* row, int64_t n, T* out) {                                   \
    for (int64_t j = 0; j < n; ++j) out[j] += weight * row[j];                                       \
  }
AHA_ADD(float)
AHA_ADD(double)
#undef AHA_ADD

Tensor cumulative_masks(const Tensor& permutation, const Tensor& left) {
  check_masks(permutation, left, false);
  const int64_t batch = permutation.size(0), steps = left.size(0), k = left.size(1), tiles = (k + TILE - 1) / TILE;
  const Tensor P = torch::stable::contiguous(permutation), w = torch::stable::contiguous(left);
  Tensor out = torch::stable::new_zeros(P, {batch, steps, k});
  with_type(P, "cumulative_masks", [&](auto type) {
    using T = decltype(type);
    const T* p = static_cast<const T*>(P.const_data_ptr());
    const ByRank<T> by_rank(static_cast<const T*>(w.const_data_ptr()), steps, k);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    for_each(batch * tiles, [&](int64_t task) {
      const int64_t b = task / tiles, from = task % tiles * TILE, width = std::min(TILE, k - from);
      for (int64_t i = 0; i < k; ++i)
        by_rank.of(i, [&](int64_t s, T weight) {
          add(weight, p + (b * k + i) * k + from, width, to + (b * steps + s) * k + from);
        });
    });
  });
  return out;
}

Tensor cumulative_masks_backward(const Tensor& grad, const Tensor& left) {
  check_masks(grad, left, true);
  const int64_t batch = grad.size(0), steps = grad.size(1), k = grad.size(2), tasks = (k + ROWS - 1) / ROWS;
  const Tensor g = torch::stable::contiguous(grad), w = torch::stable::contiguous(left);
  Tensor out = torch::stable::new_empty(g, {batch, k, k});
  with_type(g, "cumulative_masks_backward", [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(g.const_data_ptr());
    const ByRank<T> by_rank(static_cast<const T*>(w.const_data_ptr()), steps, k);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    for_each(batch * tasks, [&](int64_t task) {
      const int64_t b = task / tasks, first = task % tasks * ROWS;
      for (int64_t i = first; i < std::min(k, first + ROWS); ++i) {
        T* row = to + (b * k + i) * k;
        std::fill_n(row, k, T{0});
        by_rank.of(i, [&](int64_t s, T weight) { add(weight, from + (b * steps + s) * k, k, row); });
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aha, CPU, m) {
  m.impl("cumulative_masks", TORCH_BOX(&cumulative_masks));
  m.impl("cumulative_masks_backward", TORCH_BOX(&cumulative_masks_backward));
}

}  // namespace aha
