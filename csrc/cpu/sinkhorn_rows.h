// The loops of Sinkhorn ranking over rows of one matrix, for float and double, compiled for each vector width.
// Columns are padded to whole vectors (lanes.h); padding of X is 0.
#pragma once

#include <algorithm>
#include <cstring>

#include "aha_math.h"
#include "lanes.h"

namespace aha {

constexpr int64_t GROUP = 4;  // rows that share a pass over a column vector

// gamma_j of one row: elements first ... first + n - 1 of the stream. room: n + 8 words.
AHA_CLONES inline void gumbel_row(uint64_t seed, uint64_t first, int64_t n, uint32_t* room, float* gamma) {
  const uint64_t quad = first / 4;
  const int64_t skip = static_cast<int64_t>(first % 4), quads = (skip + n + 3) / 4;
  for (int64_t q = 0; q < quads; ++q) {
    const Words words = random_words(seed, quad + q);
    for (int w = 0; w < 4; ++w) room[4 * q + w] = words.w[w];
  }
  for (int64_t j = 0; j < n; ++j) gamma[j] = gumbel(room[skip + j]);
}

// M_ij = (2 q_i c_j + noise gamma_ij) / tau; slope = 2 q_i
template <typename T>
AHA_INLINE void logits_row_(T slope, const T* c, const float* gamma, T noise, T tau, int64_t n, T* row) {
  if (gamma)
    for (int64_t j = 0; j < n; ++j) row[j] = (slope * c[j] + noise * static_cast<T>(gamma[j])) / tau;
  else
    for (int64_t j = 0; j < n; ++j) row[j] = slope * c[j] / tau;
}

// h_j = -c_j^2 / tau, less that of the smallest |c|: a constant that the first row step removes. In factors, for the
// squares may be rounded away, or overflow.
template <typename T>
inline T initial_potential(T c, T nearest, T tau) {
  return -4 * ((c / 2 - nearest / 2) / tau) * (c / 2 + nearest / 2);
}

// F = -logsumexp_j(row_j + h_j); the largest row_j + F of every column is kept.
template <typename T>
AHA_INLINE T first_row_(const T* row, const T* h, int64_t n, T* largest) {
  using V = typename Lanes<T>::V;
  V top = at(row) + at(h);
  for (int64_t j = 0; j < n; j += Lanes<T>::N) {
    const V value = at(row + j) + at(h + j);
    top = value > top ? value : top;
  }
  T peak = top[0];
  for (int64_t l = 1; l < Lanes<T>::N; ++l) peak = std::max(peak, top[l]);
  V total{};
  for (int64_t j = 0; j < n; j += Lanes<T>::N) total += exp(at(row + j) + at(h + j) - peak);
  const T potential = -(peak + std::log(sum<T>(total)));
  for (int64_t j = 0; j < n; j += Lanes<T>::N) {
    const V value = at(row + j) + potential;
    at(largest + j) = value > at(largest + j) ? value : at(largest + j);
  }
  return potential;
}

// row <- exp(row + F + G). Logits and potentials may be a thousand where their sum is near 0, so it is formed in double.
template <typename T>
AHA_INLINE void exp_row_(T* row, T f, const T* g, int64_t n) {
  for (int64_t j = 0; j < n; ++j) row[j] = static_cast<T>((static_cast<double>(row[j]) + f) + g[j]);
  for (int64_t j = 0; j < n; j += Lanes<T>::N) at(row + j) = exp(at(row + j));
}

// One half of an iteration on `rows` rows of X: per row, the product with column vector x gives a coefficient; the rows
// with their coefficients are added up in `columns`.
//   forward   u_i = 1 / (X_i x)
//   backward  z_i = u_i (r_i - u_i (X_i x)), r may be null
template <typename T, bool FORWARD, int64_t R>
AHA_INLINE void sweep_group(const T* X, int64_t ld, const T* x, const T* u, const T* r, T* out, T* columns) {
  using V = typename Lanes<T>::V;
  V dots[R] = {};
  for (int64_t j = 0; j < ld; j += Lanes<T>::N) {
    const V here = at(x + j);
    for (int64_t i = 0; i < R; ++i) dots[i] += at(X + i * ld + j) * here;
  }
  T weights[R];
  for (int64_t i = 0; i < R; ++i) {
    const T dot = sum<T>(dots[i]);
    weights[i] = out[i] = FORWARD ? T{1} / dot : u[i] * ((r ? r[i] : T{0}) - u[i] * dot);
  }
  for (int64_t j = 0; j < ld; j += Lanes<T>::N) {
    V total = at(columns + j);
    for (int64_t i = 0; i < R; ++i) total += weights[i] * at(X + i * ld + j);
    at(columns + j) = total;
  }
}

template <typename T, bool FORWARD>
AHA_INLINE void sweep_(const T* X, int64_t ld, int64_t rows, const T* x, const T* u, const T* r, T* out, T* columns) {
  for (int64_t j = 0; j < ld; j += Lanes<T>::N) at(columns + j) = typename Lanes<T>::V{};
  int64_t i = 0;
  for (; i + GROUP <= rows; i += GROUP)
    sweep_group<T, FORWARD, GROUP>(X + i * ld, ld, x, FORWARD ? nullptr : u + i, r ? r + i : nullptr, out + i, columns);
  for (; i < rows; ++i)
    sweep_group<T, FORWARD, 1>(X + i * ld, ld, x, FORWARD ? nullptr : u + i, r ? r + i : nullptr, out + i, columns);
}

// out_j = row_j + f + g_j, rounded once
template <typename T>
AHA_INLINE void sum_row_(const T* row, double f, const double* g, int64_t n, T* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = static_cast<T>((row[j] + f) + g[j]);
}

// out_j = u row_j v_j
template <typename T>
AHA_INLINE void scale_row_(const T* row, T u, const T* v, int64_t n, T* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = u * row[j] * v[j];
}

template <typename T>
AHA_INLINE T dot_(const T* row, const T* x, int64_t n) {
  typename Lanes<T>::V total{};
  for (int64_t j = 0; j < n; j += Lanes<T>::N) total += at(row + j) * at(x + j);
  return sum<T>(total);
}

// columns_j += weight row_j
template <typename T>
AHA_INLINE void add_row_(T weight, const T* row, int64_t n, T* columns) {
  for (int64_t j = 0; j < n; j += Lanes<T>::N) at(columns + j) += weight * at(row + j);
}

// One row of W from the row of the gradient, centred by g_j; returns its sum and adds it to columns.
//   of P      W <- P (W - g)        of log P  W <- W - P g
template <typename T>
AHA_INLINE T weigh_row_(bool logarithm, T u, const T* X, const T* v, const T* g, int64_t n, T* W, T* columns) {
  using V = typename Lanes<T>::V;
  V total{};
  for (int64_t j = 0; j < n; j += Lanes<T>::N) {
    const V p = u * at(X + j) * at(v + j);
    const V value = logarithm ? at(W + j) - p * at(g + j) : p * (at(W + j) - at(g + j));
    at(W + j) = value;
    at(columns + j) += value;
    total += value;
  }
  return sum<T>(total);
}

// out_ij -= X_ij Σ_t by_row_ti by_column_tj, `terms` outer products; R rows, two vectors of columns
template <typename T, int64_t R>
AHA_INLINE void subtract_group(const T* X, int64_t ld, int64_t terms, const T* by_row, const T* by_column, T* out) {
  using V = typename Lanes<T>::V;
  constexpr int64_t N = Lanes<T>::N;
  V totals[R][2] = {};
  for (int64_t t = 0; t < terms; ++t) {
    const V a = at(by_column + t * ld), b = at(by_column + t * ld + N);
    for (int64_t i = 0; i < R; ++i) {
      totals[i][0] += by_row[t * ld + i] * a;
      totals[i][1] += by_row[t * ld + i] * b;
    }
  }
  for (int64_t i = 0; i < R; ++i) {
    at(out + i * ld) -= at(X + i * ld) * totals[i][0];
    at(out + i * ld + N) -= at(X + i * ld + N) * totals[i][1];
  }
}

// The same over `rows` rows and all columns.
template <typename T>
AHA_INLINE void subtract_products_(const T* X, int64_t ld, int64_t rows, int64_t terms, const T* by_row,
                                   const T* by_column, T* out) {
  for (int64_t j = 0; j < ld; j += 2 * Lanes<T>::N) {
    int64_t i = 0;
    for (; i + GROUP <= rows; i += GROUP)
      subtract_group<T, GROUP>(X + i * ld + j, ld, terms, by_row + i, by_column + j, out + i * ld + j);
    for (; i < rows; ++i) subtract_group<T, 1>(X + i * ld + j, ld, terms, by_row + i, by_column + j, out + i * ld + j);
  }
}

// target_clones does not combine with templates, so each type is spelled out
#define AHA_ROWS(T)                                                                                                 \
  AHA_CLONES inline void logits_row(T slope, const T* c, const float* gamma, T noise, T tau, int64_t n, T* row) {   \
    logits_row_(slope, c, gamma, noise, tau, n, row);                                                               \
  }                                                                                                                 \
  AHA_CLONES inline T first_row(const T* row, const T* h, int64_t n, T* largest) { return first_row_(row, h, n, largest); } \
  AHA_CLONES inline void exp_row(T* row, T f, const T* g, int64_t n) { exp_row_(row, f, g, n); }                     \
  AHA_CLONES inline void sweep_forward(const T* X, int64_t ld, int64_t rows, const T* v, T* u, T* columns) {         \
    sweep_<T, true>(X, ld, rows, v, nullptr, nullptr, u, columns);                                                  \
  }                                                                                                                 \
  AHA_CLONES inline void sweep_backward(const T* X, int64_t ld, int64_t rows, const T* y, const T* u, const T* r,    \
                                        T* z, T* columns) {                                                         \
    sweep_<T, false>(X, ld, rows, y, u, r, z, columns);                                                             \
  }                                                                                                                 \
  AHA_CLONES inline void sum_row(const T* row, double f, const double* g, int64_t n, T* out) { sum_row_(row, f, g, n, out); }  \
  AHA_CLONES inline void scale_row(const T* row, T u, const T* v, int64_t n, T* out) {                               \
    scale_row_(row, u, v, n, out);                                                                                  \
  }                                                                                                                 \
  AHA_CLONES inline T dot(const T* row, const T* x, int64_t n) { return dot_(row, x, n); }                           \
  AHA_CLONES inline void add_row(T weight, const T* row, int64_t n, T* columns) { add_row_(weight, row, n, columns); } \
  AHA_CLONES inline T weigh_row(bool logarithm, T u, const T* X, const T* v, const T* g, int64_t n, T* W, T* columns) { \
    return weigh_row_(logarithm, u, X, v, g, n, W, columns);                                                        \
  }                                                                                                                 \
  AHA_CLONES inline void subtract_products(const T* X, int64_t ld, int64_t rows, int64_t terms, const T* by_row,     \
                                           const T* by_column, T* out) {                                            \
    subtract_products_(X, ld, rows, terms, by_row, by_column, out);                                                       \
  }
AHA_ROWS(float)
AHA_ROWS(double)
#undef AHA_ROWS

}  // namespace aha
