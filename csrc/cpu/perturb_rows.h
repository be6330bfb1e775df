// The inner loops of perturb.cpp, over neighbouring pixels: each compiled for every vector width.
// T is the type of the arithmetic; half precision is met only where rows are read and written.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>

#include "perturb.h"
#include "clones.h"

namespace aha {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <typename In, typename T>
AHA_INLINE void read_row(const In* from, int64_t step, T mean, T std, int64_t n, T* to) {
  if (step == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = normalised(static_cast<T>(from[i]), mean, std);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = normalised(static_cast<T>(from[i * step]), mean, std);
}

// a row that is converted, not normalised
template <typename In, typename T>
AHA_INLINE void convert_row(const In* from, int64_t step, int64_t n, T* to) {
  if (step == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i * step]);
}

template <typename T, typename M>
AHA_INLINE void blend_row(const T* x, const T* r, M mask, int64_t n, T* __restrict deleted, T* __restrict inserted) {
  for (int64_t i = 0; i < n; ++i) {
    const Blended<T> y = aha::blend(x[i], r[i], mask(i));
    deleted[i] = y.deleted;
    inserted[i] = y.inserted;
  }
}

template <typename T, typename M>
AHA_INLINE void pull_row(const T* deleted, const T* inserted, M mask, int64_t n, T* __restrict image,
                         T* __restrict reference) {
  for (int64_t i = 0; i < n; ++i) {
    const Pulled<T> sum = aha::pull(deleted[i], inserted[i], mask(i));
    image[i] += sum.image;
    reference[i] += sum.reference;
  }
}

// to = sum over the taps of weight * line; lines of n values, one after the other
template <typename T>
AHA_INLINE void combine_row(const T* lines, const int32_t* slot, const T* weight, int64_t taps, int64_t n,
                            T* __restrict to) {
  std::fill_n(to, n, T{0});
  for (int64_t t = 0; t < taps; ++t) {
    const T* line = lines + slot[t] * n;
    const T w = weight[t];
    for (int64_t i = 0; i < n; ++i) to[i] += w * line[i];
  }
}

// the transposed sum: line += weight * from
template <typename T>
AHA_INLINE void spread_row(const T* from, const int32_t* slot, const T* weight, int64_t taps, int64_t n,
                           T* __restrict lines) {
  for (int64_t t = 0; t < taps; ++t) {
    T* __restrict line = lines + slot[t] * n;
    const T w = weight[t];
    for (int64_t i = 0; i < n; ++i) line[i] += w * from[i];
  }
}

// one row of cells read at n pixels; cell and weight are (taps, n)
template <typename T>
AHA_INLINE void expand_row(const T* cells, const int32_t* cell, const T* weight, int64_t taps, int64_t n,
                           T* __restrict to) {
  std::fill_n(to, n, T{0});
  for (int64_t t = 0; t < taps; ++t, cell += n, weight += n)
    for (int64_t i = 0; i < n; ++i) to[i] += weight[i] * cells[cell[i]];
}

template <typename T>
AHA_INLINE void subtract_row(const T* x, const T* r, T std, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = (x[i] - r[i]) / std;
}

template <typename T>
AHA_INLINE void pull_mask_row(const T* deleted, const T* inserted, const T* difference, int64_t n,
                              T* __restrict sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += pull_mask(deleted[i], inserted[i], difference[i]);
}

// target_clones does not combine with templates, so each pair of types is spelled out
#define AHA_PAIR(T, O)                                                                                                \
  AHA_CLONES void read(const O* from, int64_t step, T mean, T std, int64_t n, T* __restrict to) {                     \
    read_row(from, step, mean, std, n, to);                                                                           \
  }                                                                                                                   \
  AHA_CLONES void convert(const O* from, int64_t step, int64_t n, T* __restrict to) {                                 \
    convert_row(from, step, n, to);                                                                                   \
  }
#define AHA_CAST(T, O)                                                                                                \
  AHA_CLONES void convert(const T* from, int64_t step, int64_t n, O* __restrict to) {                                 \
    convert_row(from, step, n, to);                                                                                   \
  }
#define AHA_SUM(T)                                                                                                    \
  AHA_CLONES void blend_rows(const T* x, const T* r, const T* mask, int64_t n, T* deleted, T* inserted) {             \
    blend_row(x, r, [=](int64_t i) { return mask[i]; }, n, deleted, inserted);                                        \
  }                                                                                                                   \
  AHA_CLONES void blend_rows(const T* x, const T* r, const int32_t* rank, int32_t count, int64_t n, T* deleted,       \
                        T* inserted) {                                                                                \
    blend_row(x, r, [=](int64_t i) { return rank[i] < count; }, n, deleted, inserted);                                \
  }                                                                                                                   \
  AHA_CLONES void pull_rows(const T* deleted, const T* inserted, const T* mask, int64_t n, T* image, T* reference) {  \
    pull_row(deleted, inserted, [=](int64_t i) { return mask[i]; }, n, image, reference);                             \
  }                                                                                                                   \
  AHA_CLONES void pull_rows(const T* deleted, const T* inserted, const int32_t* rank, int32_t count, int64_t n,       \
                       T* image, T* reference) {                                                                      \
    pull_row(deleted, inserted, [=](int64_t i) { return rank[i] < count; }, n, image, reference);                     \
  }                                                                                                                   \
  AHA_CLONES void subtract_rows(const T* x, const T* r, T std, int64_t n, T* to) {                                    \
    subtract_row(x, r, std, n, to);                                                                                   \
  }                                                                                                                   \
  AHA_CLONES void pull_mask_rows(const T* deleted, const T* inserted, const T* difference, int64_t n, T* sum) {       \
    pull_mask_row(deleted, inserted, difference, n, sum);                                                             \
  }                                                                                                                   \
  AHA_CLONES void combine_lines(const T* lines, const int32_t* slot, const T* weight, int64_t taps, int64_t n,        \
                                T* to) {                                                                              \
    combine_row(lines, slot, weight, taps, n, to);                                                                    \
  }                                                                                                                   \
  AHA_CLONES void spread_line(const T* from, const int32_t* slot, const T* weight, int64_t taps, int64_t n,           \
                              T* lines) {                                                                             \
    spread_row(from, slot, weight, taps, n, lines);                                                                   \
  }                                                                                                                   \
  AHA_CLONES void expand_cells(const T* cells, const int32_t* cell, const T* weight, int64_t taps, int64_t n, T* to) {\
    expand_row(cells, cell, weight, taps, n, to);                                                                     \
  }
AHA_PAIR(float, float)
AHA_PAIR(float, double)
AHA_PAIR(float, BFloat16)
AHA_PAIR(float, Half)
AHA_PAIR(double, float)
AHA_PAIR(double, double)
AHA_PAIR(double, BFloat16)
AHA_PAIR(double, Half)
AHA_CAST(float, BFloat16)
AHA_CAST(float, Half)
AHA_CAST(double, BFloat16)
AHA_CAST(double, Half)
AHA_SUM(float)
AHA_SUM(double)
#undef AHA_PAIR
#undef AHA_CAST
#undef AHA_SUM

}  // namespace
}  // namespace aha
