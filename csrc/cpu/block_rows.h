// The loops of the linear-time ranking over one tile of rows or columns, compiled for each vector width.
//
// Both axes are treated alike. A pair of blocks gives each of its rows a factor a_i and a number y_i, each of its
// columns b_j and x_j:  X_ij = a_i b_j exp(x_j y_i). Per element and pair
//   moments     Σ_j b_j v_j x_j^m, m < TERMS           TERMS multiply-adds
//   evaluate    a_i Σ_m C_m y_i^m                      TERMS multiply-adds; C_m = COEFFICIENTS_m times a moment
// Tiles are whole vectors; what pads a block has the factor 0.
#pragma once

#include <algorithm>
#include <cmath>

#include "blocks.h"
#include "lanes.h"

namespace aha {

template <typename T>
inline constexpr int TERMS = BlockExp<T>::TERMS;
template <typename T>
inline constexpr int ROOM = BlockExp<T>::ROOM;

// G vectors of elements; C is [pairs][SETS][ROOM], added to out[SETS]
template <typename T, int SETS, int G>
AHA_INLINE void evaluate_group(int64_t pairs, const T* const* factors, const T* C, const T* y, int64_t i, T* const* out) {
  using V = typename Lanes<T>::V;
  constexpr int64_t N = Lanes<T>::N;
  V place[G], total[SETS][G];
  for (int g = 0; g < G; ++g) place[g] = at(y + i + g * N);
  for (int s = 0; s < SETS; ++s)
    for (int g = 0; g < G; ++g) total[s][g] = at(out[s] + i + g * N);
  for (int64_t p = 0; p < pairs; ++p, C += SETS * ROOM<T>) {
    V value[SETS][G];
    for (int s = 0; s < SETS; ++s)
      for (int g = 0; g < G; ++g) value[s][g] = place[g] * C[s * ROOM<T> + TERMS<T> - 1] + C[s * ROOM<T> + TERMS<T> - 2];
    for (int m = TERMS<T> - 3; m >= 0; --m)
      for (int s = 0; s < SETS; ++s)
        for (int g = 0; g < G; ++g) value[s][g] = value[s][g] * place[g] + C[s * ROOM<T> + m];
    for (int g = 0; g < G; ++g) {
      const V factor = at(factors[p] + i + g * N);
      for (int s = 0; s < SETS; ++s) total[s][g] += factor * value[s][g];
    }
  }
  for (int s = 0; s < SETS; ++s)
    for (int g = 0; g < G; ++g) at(out[s] + i + g * N) = total[s][g];
}

template <typename T, int SETS>
AHA_INLINE void evaluate_(int64_t n, int64_t pairs, const T* const* factors, const T* C, const T* y, T* const* out) {
  constexpr int64_t N = Lanes<T>::N;
  constexpr int G = SETS == 1 ? 4 : 2;
  int64_t i = 0;
  for (; i + G * N <= n; i += G * N) evaluate_group<T, SETS, G>(pairs, factors, C, y, i, out);
  if constexpr (G == 4)
    if (i + 2 * N <= n) evaluate_group<T, SETS, 2>(pairs, factors, C, y, i, out), i += 2 * N;
  for (; i < n; i += N) evaluate_group<T, SETS, 1>(pairs, factors, C, y, i, out);
}

// Eight vectors to the eight sums of their lanes.
AHA_INLINE void sum_eight(const Lanes<float>::V (&v)[8], float* out) {
  Eight half[8];
  for (int m = 0; m < 8; ++m)
    half[m] = add_halves(v[m]);
  Eight quarter[4], eighth[2];
  for (int m = 0; m < 4; ++m)
    quarter[m] = __builtin_shufflevector(half[2 * m], half[2 * m + 1], 0, 2, 8, 10, 4, 6, 12, 14) +
                 __builtin_shufflevector(half[2 * m], half[2 * m + 1], 1, 3, 9, 11, 5, 7, 13, 15);
  for (int m = 0; m < 2; ++m)
    eighth[m] = __builtin_shufflevector(quarter[2 * m], quarter[2 * m + 1], 0, 2, 8, 10, 4, 6, 12, 14) +
                __builtin_shufflevector(quarter[2 * m], quarter[2 * m + 1], 1, 3, 9, 11, 5, 7, 13, 15);
  *reinterpret_cast<Eight*>(out) = __builtin_shufflevector(eighth[0], eighth[1], 0, 1, 2, 3, 8, 9, 10, 11) +
                                   __builtin_shufflevector(eighth[0], eighth[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

template <typename T, int COUNT>
AHA_INLINE void sums(const typename Lanes<T>::V (&v)[COUNT], T* out) {
  int m = 0;
  if constexpr (sizeof(T) == 4 && COUNT >= 8) {
    sum_eight(reinterpret_cast<const Lanes<float>::V(&)[8]>(v), out);
    m = 8;
  }
  for (; m < COUNT; ++m) out[m] = sum<T>(v[m]);
}

// What becomes a polynomial's coefficients: moments S added up over tiles, those of other weights added to them, and of
// the sum offset S_m + scale S_(m+1), which weighs every element by offset + scale times its number.
template <typename T>
struct Term {
  const T* sums;
  int64_t tiles, stride;  // how many, and how far apart
  T offset = 1, scale = 0;
  const T* others = nullptr;
  T weight = 0;  // of the others
};

// C[term][ROOM]
template <typename T>
AHA_INLINE void combine_(int64_t count, const Term<T>* terms, T* C) {
  using V = typename Lanes<T>::V;
  typedef T Unaligned __attribute__((vector_size(64), may_alias, aligned(sizeof(T))));
  const auto add = [](const T* from, int64_t tiles, int64_t stride, T weight, V& here, V& next) {
    for (int64_t tile = 0; tile < tiles; ++tile, from += stride) {
      here += weight * at(from);
      next += weight * *reinterpret_cast<const Unaligned*>(from + 1);
    }
  };
  for (int64_t n = 0; n < count; ++n, C += ROOM<T>)
    for (int64_t m = 0; m < TERMS<T>; m += Lanes<T>::N) {
      const Term<T>& term = terms[n];
      V here = at(term.sums + m), next = *reinterpret_cast<const Unaligned*>(term.sums + m + 1);
      add(term.sums + m + term.stride, term.tiles - 1, term.stride, T{1}, here, next);
      if (term.others) add(term.others + m, term.tiles, term.stride, term.weight, here, next);
      at(C + m) = at(&BlockExp<T>::COEFFICIENTS[m]) * (term.offset * here + term.scale * next);
    }
}

// out[p][set][m] = Σ_i factor_i weight_i y_i^m for m < COUNT; powers[m - 1] = y^m in rows of ld
template <typename T, int SETS, int COUNT>
AHA_INLINE void moments_(int64_t n, int64_t pairs, const T* const* factors, const T* const* weights, const T* powers,
                         int64_t ld, T* const* out) {
  using V = typename Lanes<T>::V;
  constexpr int64_t N = Lanes<T>::N;
  for (int64_t p = 0; p < pairs; ++p) {
    V total[SETS][COUNT] = {};
    for (int64_t i = 0; i < n; i += N) {
      const V factor = at(factors[p] + i);
      V weight[SETS];
      for (int s = 0; s < SETS; ++s) total[s][0] += weight[s] = factor * at(weights[s] + i);
      for (int m = 1; m < COUNT; ++m) {
        const V power = at(powers + (m - 1) * ld + i);
        for (int s = 0; s < SETS; ++s) total[s][m] += weight[s] * power;
      }
    }
    for (int s = 0; s < SETS; ++s) sums<T, COUNT>(total[s], out[p] + s * ROOM<T>);
  }
}

// x <- 1 / x
template <typename T>
AHA_INLINE void invert_(int64_t n, T* x) {
  for (int64_t i = 0; i < n; i += Lanes<T>::N) at(x + i) = T{1} / at(x + i);
}

// the largest potential_i + slope place_i
AHA_CLONES inline double peak(int64_t n, const double* potential, const double* place, double slope) {
  using V = Lanes<double>::V;
  V top = at(potential) + slope * at(place);
  for (int64_t i = 0; i < n; i += Lanes<double>::N) {
    const V value = at(potential + i) + slope * at(place + i);
    top = value > top ? value : top;
  }
  double largest = top[0];
  for (int64_t l = 1; l < Lanes<double>::N; ++l) largest = std::max(largest, top[l]);
  return largest;
}

// factor_i = exp(potential_i + slope place_i + shift), the exponent formed in double
template <typename T>
AHA_INLINE void exp_factor_(int64_t n, const double* potential, const double* place, double slope, double shift, T* factor) {
  for (int64_t i = 0; i < n; ++i)
    factor[i] = static_cast<T>(std::max(potential[i] + slope * place[i] + shift, -1e4));
  for (int64_t i = 0; i < n; i += Lanes<T>::N) at(factor + i) = exp(at(factor + i));
}

// The gradient of one iteration, per column: y = v g of this iteration, v_before that of the one before.
//   ranked_j -= y_j (uq_j - mean_j / v_j) + v_before_j (zq_j - mean_j z0_j);  g_j = -v_before_j z0_j
template <typename T>
AHA_INLINE void step_back_(int64_t n, const T* uq, const T* zq, const T* z0, const T* mean, const T* v, const T* y,
                           const T* v_before, double* ranked, T* g) {
  for (int64_t j = 0; j < n; ++j) {
    ranked[j] -= static_cast<double>(y[j] * (uq[j] - mean[j] / v[j]) + v_before[j] * (zq[j] - mean[j] * z0[j]));
    g[j] = -v_before[j] * z0[j];
  }
}

// whether one of the numbers left [1 / limit, limit], or is NaN
template <typename T>
AHA_INLINE bool beyond_(int64_t n, const T* x, T limit) {
  using V = typename Lanes<T>::V;
  V top = at(x), low = at(x);
  for (int64_t i = 0; i < n; i += Lanes<T>::N) {
    top = at(x + i) > top ? at(x + i) : top;
    low = at(x + i) < low ? at(x + i) : low;
  }
  bool inside = true;
  for (int64_t l = 0; l < Lanes<T>::N; ++l) inside = inside && top[l] <= limit && low[l] >= 1 / limit;
  return !inside;
}

// target_clones does not combine with templates, so each type is spelled out
#define AHA_BLOCK_ROWS(T)                                                                                            \
  AHA_CLONES inline void evaluate(int64_t n, int64_t pairs, const T* const* factors, const T* C, const T* y,         \
                                  int sets, T* const* out) {                                                         \
    if (sets == 1) return evaluate_<T, 1>(n, pairs, factors, C, y, out);                                             \
    if (sets == 2) return evaluate_<T, 2>(n, pairs, factors, C, y, out);                                             \
    evaluate_<T, 3>(n, pairs, factors, C, y, out);                                                                   \
  }                                                                                                                  \
  AHA_CLONES inline void moments(int64_t n, int64_t pairs, const T* const* factors, const T* weight,                 \
                                 const T* powers, int64_t ld, T* const* out) {                                       \
    moments_<T, 1, TERMS<T>>(n, pairs, factors, &weight, powers, ld, out);                                           \
  }                                                                                                                  \
  AHA_CLONES inline void more_moments(int64_t n, int64_t pairs, const T* const* factors, const T* const* weights,    \
                                      int sets, const T* powers, int64_t ld, T* const* out) {                        \
    if (sets == 1) return moments_<T, 1, TERMS<T> + 1>(n, pairs, factors, weights, powers, ld, out);                 \
    moments_<T, 2, TERMS<T> + 1>(n, pairs, factors, weights, powers, ld, out);                                       \
  }                                                                                                                  \
  AHA_CLONES inline void combine(int64_t count, const Term<T>* terms, T* C) { combine_(count, terms, C); }            \
  AHA_CLONES inline void invert(int64_t n, T* x) { invert_(n, x); }                                                  \
  AHA_CLONES inline void exp_factor(int64_t n, const double* potential, const double* place, double slope,           \
                                    double shift, T* factor) {                                                       \
    exp_factor_(n, potential, place, slope, shift, factor);                                                          \
  }                                                                                                                  \
  AHA_CLONES inline void step_back(int64_t n, const T* uq, const T* zq, const T* z0, const T* mean, const T* v,      \
                                   const T* y, const T* v_before, double* ranked, T* g) {                            \
    step_back_(n, uq, zq, z0, mean, v, y, v_before, ranked, g);                                                      \
  }                                                                                                                  \
  AHA_CLONES inline bool beyond(int64_t n, const T* x, T limit) { return beyond_(n, x, limit); }
AHA_BLOCK_ROWS(float)
AHA_BLOCK_ROWS(double)
#undef AHA_BLOCK_ROWS

}  // namespace aha
