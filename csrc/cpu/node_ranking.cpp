// Sinkhorn ranking without noise in a time per iteration that does not depend on K, where its scalings are smooth.
//   u(q) = 1 / Σ_j X(q, c_j) v(c_j),  v(c) = 1 / Σ_i X(q_i, c) u(q_i),  X(q, c) = exp(F(q) + G(c) + 2 c q / tau)
// are functions of a rank q and a score c. Where ranks and scores lie denser than sqrt(tau), they are polynomials between
// neighbours, and all iterations run on their values at Chebyshev nodes (node_axis.h), in double. Only to begin with
// (weights of the nodes) and to end with (the outputs at the scores) elements are met: O(K), a few operations each, in
// any order. The gradient is the exact one of these operations.
//   an iteration  2 x 16 FMA of 8 doubles per pair of cells with an entry that counts, forward and backward
//   the elements  per score and output 16 FMA forward, 32 backward; 16 outputs side by side
// Gaps wider than sqrt(tau) make u and v bend faster than nodes tell. The highest coefficients of every integrand say
// so: then the image is refused and ranked in blocks, as any scores can be.
#include "node_ranking.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

namespace aha {
namespace {

using V = Lanes<float>::V;
constexpr int64_t WIDTH = Lanes<float>::N;  // outputs side by side
constexpr double RANK_SPACING = 1.9, SCORE_SPACING = 1.6;  // widths of cells in sqrt(tau)
// Of the highest coefficients, relative to the sum over ranks or over scores: what nodes cannot tell is then below 2e-7
// of a mask. Gradients are derivatives along the scores.
constexpr double RANK_TOLERANCE = 2e-5, SCORE_TOLERANCE = 2e-7;
constexpr int64_t CHUNK = 1024;             // elements whose moments are added up in float

// Scalings beyond move into the potentials, and pairs are chosen anew: what they scale up twice must stay negligible.
constexpr double SCALING = 1024, NEGLIGIBLE = 20 + 2 * 6.93;

// exp to a few ulp; 0 below -700, and above 700 what it is there: with such numbers no image goes on
AHA_INLINE Double exponential(Double x) {
  typedef uint64_t I __attribute__((vector_size(64), may_alias));
  constexpr double TO_INTEGER = 0x1.8p52, LN2_HIGH = 0x1.62e42fefa3800p-1, LN2_LOW = 0x1.ef35793c76730p-45;
  x = x > 700.0 ? Double{} + 700.0 : x;
  const Double shifted = x * 0x1.71547652b82fep+0 + TO_INTEGER, power = shifted - TO_INTEGER;
  const Double r = (x - power * LN2_HIGH) - power * LN2_LOW;
  Double p = r * (1.0 / 6227020800) + 1.0 / 479001600;
  for (const double factorial : {39916800., 3628800., 362880., 40320., 5040., 720., 120., 24., 6., 2., 1., 1.})
    p = p * r + 1 / factorial;
  const I bits = reinterpret_cast<const I&>(p) + (reinterpret_cast<const I&>(shifted) << 52);
  return x < -700.0 ? Double{} : reinterpret_cast<const Double&>(bits);
}

AHA_INLINE double largest(const double* values) {
  double most = values[0];
  for (int64_t n = 1; n < NODES; ++n) most = std::max(most, values[n]);
  return most;
}

// potential_i = -max_j(of_j + 2 x_i y_j / tau)
AHA_CLONES void first_potential(const double* x, int64_t n, const double* y, const double* of, int64_t m, double twice,
                                double* potential) {
  for (int64_t i = 0; i < n; i += HALF) {
    const Double scaled = at(x + i) * twice;
    Double most = scaled * y[0] + of[0];
    for (int64_t j = 1; j < m; ++j) {
      const Double value = scaled * y[j] + of[j];
      most = value > most ? value : most;
    }
    at(potential + i) = -most;
  }
}

// The entries of X that count, by pairs of cells. With q = q_I + g y and c = c_J + h x
//   2 c q = 2 c_J q + 2 q_I (c - c_J) + 2 g h x y:
// a factor for every row, one for every column, and one matrix of NODES x NODES, the same for all rows of a level.
struct NodeMatrix {
  struct Pair {
    int32_t row, column, level;
  };
  std::vector<Parity> inner;        // by level of the row's cell: exp(2 g h x y / tau) = cosh + sinh
  std::vector<Pair> pairs;          // by row
  std::vector<int32_t> by_column;   // numbers of pairs
  Buffer<double> row, column;       // factors (pairs,NODES)
  int64_t room = 0;
  bool dropped = false;
};

AHA_CLONES void factor(const double* place, double middle, double slope, const double* potential, double* out) {
  for (int64_t n = 0; n < NODES; n += HALF) at(out + n) = (at(place + n) - middle) * slope + at(potential + n);
}
AHA_CLONES void exponentials(double shift, double* values) {
  for (int64_t n = 0; n < NODES; n += HALF) at(values + n) = exponential(at(values + n) + shift);
}
AHA_CLONES void exponentials_of(const double* less, double* values, int64_t n) {
  for (int64_t i = 0; i < n; i += HALF) at(values + i) = exponential(at(values + i) - at(less + i));
}

// out_I += Σ_J X_IJ weights_J, by pairs in the order of `numbers` (null: as they are). Pairs of one level lie one after
// the other: their matrix stays in registers.
AHA_CLONES void add_products(const Parity* inner, const NodeMatrix::Pair* pairs, const int32_t* numbers, int64_t count,
                             bool rows, const double* to, const double* from, const double* weights, double* out) {
  for (int64_t n = 0; n < count;) {
    const int32_t level = pairs[numbers ? numbers[n] : n].level;
    const Factors inner_factors(inner[level]);
    for (; n < count; ++n) {
      const int64_t p = numbers ? numbers[n] : n;
      if (pairs[p].level != level) break;
      const int64_t source = (rows ? pairs[p].column : pairs[p].row) * NODES,
                    target = (rows ? pairs[p].row : pairs[p].column) * NODES;
      const double *a = to + p * NODES, *b = from + p * NODES, *w = weights + source;
      const Double high = at(b) * at(w), low = at(b + HALF) * at(w + HALF);
      Double even, odd;
      inner_factors.multiply(high + low, high - low, even, odd);
      at(out + target) += at(a) * (even + odd);
      at(out + target + HALF) += at(a + HALF) * (even - odd);
    }
  }
}

struct Range {
  double least, most;
  // whether to go on with
  bool usable() const { return least > 1e-200 && most < 1e200; }
  bool within(double limit) const { return least * limit >= 1 && most <= limit; }
};
// scaling = 1 / sums and weighted = scaling times weight
AHA_CLONES Range invert(const double* sums, const double* weight, int64_t n, double* scaling, double* weighted) {
  Double least = Double{} + 1e300, most = -least;
  for (int64_t i = 0; i < n; i += HALF) {
    const Double value = 1 / at(sums + i);
    least = least < value ? least : value, most = most > value ? most : value;
    at(scaling + i) = value, at(weighted + i) = value * at(weight + i);
  }
  for (int64_t l = 1; l < HALF; ++l) least[0] = std::min(least[0], least[l]), most[0] = std::max(most[0], most[l]);
  return {least[0], most[0]};
}

// out = -a b c
AHA_CLONES void weigh(const double* a, const double* b, const double* c, int64_t n, double* out) {
  for (int64_t i = 0; i < n; i += HALF) at(out + i) = -at(a + i) * at(b + i) * at(c + i);
}
AHA_CLONES void product(const double* a, const double* b, int64_t n, double* out) {
  for (int64_t i = 0; i < n; i += HALF) at(out + i) = at(a + i) * at(b + i);
}
AHA_CLONES void add_product(const double* a, const double* b, int64_t n, double* out) {
  for (int64_t i = 0; i < n; i += HALF) at(out + i) += at(a + i) * at(b + i);
}

// of factor times scaling: the larger of its two highest Chebyshev coefficients, and its largest value
struct Resolved {
  double tail, most;
};
AHA_CLONES Resolved resolve(const NodeTables& tables, const double* factor, const double* scaling) {
  const Double high = at(factor) * at(scaling), low = at(factor + HALF) * at(scaling + HALF);
  const Double even = (high + low) * at(tables.tail[0]), odd = (high - low) * at(tables.tail[1]);
  const Double more = high > low ? high : low;
  double e = 0, o = 0, most = 0;
  for (int64_t l = 0; l < HALF; ++l) e += even[l], o += odd[l], most = std::max(most, more[l]);
  return {std::max(std::abs(e), std::abs(o)), most};
}

// Values at nodes (outputs,size) to coefficients of the outputs side by side: out (blocks,NODES,WIDTH). Of derivatives,
// and of running sums over the outputs, where asked for.
AHA_CLONES void side_by_side(const NodeTables& tables, const double* const* values, int64_t outputs, int64_t blocks,
                             double* sums, double derivative, float* out) {
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t s = 0; s < outputs; ++s) {
      alignas(64) double part[2][HALF];
      coefficients(tables, values[s] + b * NODES, part[0], part[1]);
      float* to = out + b * NODES * WIDTH + s;
      if (!sums) {
        for (int64_t p = 0; p < NODES; ++p) to[p * WIDTH] = static_cast<float>(part[p % 2][p / 2]);
        continue;
      }
      double* sum = sums + b * NODES;
      for (int64_t p = 0; p < NODES; ++p) sum[p] += part[p % 2][p / 2];
      for (int64_t p = 0; p + 1 < NODES; ++p)
        to[p * WIDTH] = static_cast<float>(static_cast<double>(p + 1) * sum[p + 1] * derivative);
      to[(NODES - 1) * WIDTH] = 0;
    }
}

// Sixteen vectors as columns instead of rows.
AHA_INLINE void transpose(V* t) {
  V s[WIDTH];
  for (int i = 0; i < 16; i += 2) {
    s[i] = __builtin_shufflevector(t[i], t[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    s[i + 1] = __builtin_shufflevector(t[i], t[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
  for (int i = 0; i < 16; i += 4)
    for (int n = i; n < i + 2; ++n) {
      t[n] = __builtin_shufflevector(s[n], s[n + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      t[n + 2] = __builtin_shufflevector(s[n], s[n + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
  for (int i = 0; i < 16; i += 8)
    for (int n = i; n < i + 4; ++n) {
      s[n] = __builtin_shufflevector(t[n], t[n + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
      s[n + 4] = __builtin_shufflevector(t[n], t[n + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
  for (int n = 0; n < 8; ++n) {
    t[n] = __builtin_shufflevector(s[n], s[n + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    t[n + 8] = __builtin_shufflevector(s[n], s[n + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
}

typedef float Anywhere __attribute__((vector_size(64), may_alias, aligned(4)));
AHA_INLINE V load(const float* from, int64_t n) {
  if (n >= WIDTH) return *reinterpret_cast<const Anywhere*>(from);
  V value{};
  for (int64_t l = 0; l < n; ++l) value[l] = from[l];
  return value;
}
AHA_INLINE void store(V value, int64_t n, float* to) {
  if (n >= WIDTH) {
    *reinterpret_cast<Anywhere*>(to) = value;
    return;
  }
  for (int64_t l = 0; l < n; ++l) to[l] = value[l];
}

// The polynomials of four elements, all outputs: Horner.
AHA_INLINE void polynomials(const float* coefficients, const float* x, const int32_t* block, V* out) {
  const float* of[4];
  for (int e = 0; e < 4; ++e) of[e] = coefficients + block[e] * NODES * WIDTH, out[e] = at(of[e] + (NODES - 1) * WIDTH);
  for (int64_t p = NODES - 2; p >= 0; --p)
    for (int e = 0; e < 4; ++e) out[e] = out[e] * x[e] + at(of[e] + p * WIDTH);
}
// WIDTH elements from i on, the last again and again beyond n
struct Some {
  float x[WIDTH];
  int32_t block[WIDTH];
};
AHA_INLINE void pick(const float* x, const int32_t* block, int64_t i, int64_t n, Some& some) {
  if (n - i >= WIDTH) {
    std::memcpy(some.x, x + i, sizeof(some.x)), std::memcpy(some.block, block + i, sizeof(some.block));
    return;
  }
  for (int64_t e = 0; e < WIDTH; ++e) {
    const int64_t j = std::min(i + e, n - 1);
    some.x[e] = x[j], some.block[e] = block[j];
  }
}

// rows[s][i] = the polynomial of output s at element i
AHA_CLONES void interpolate(const float* x, const int32_t* block, int64_t n, const float* coefficients,
                            float* const* rows, int64_t outputs) {
  Some some;
  for (int64_t i = 0; i < n; i += WIDTH) {
    pick(x, block, i, n, some);
    V values[WIDTH];
    for (int64_t e = 0; e < WIDTH; e += 4) polynomials(coefficients, some.x + e, some.block + e, values + e);
    transpose(values);
    for (int64_t s = 0; s < outputs; ++s) store(values[s], n - i, rows[s] + i);
  }
}

// What a group of outputs' gradients leave when those of the next output are taken off: masks are running sums of
// outputs, and gradients of single outputs have much in common. `one` is one more output, of which all are 1.
AHA_INLINE void differences(const float* const* rows, int64_t outputs, const float* next, bool one, int64_t i, int64_t n,
                            V* values) {
  for (int64_t s = 0; s < WIDTH; ++s) values[s] = s < outputs ? load(rows[s] + i, n - i) : V{};
  for (int64_t s = 0; s < outputs; ++s) {
    if (s + 1 < outputs)
      values[s] -= values[s + 1];
    else if (next)
      values[s] -= load(next + i, n - i);
  }
  if (one) values[outputs] = V{} + 1.0f;
  transpose(values);
}

// moments (blocks,NODES,WIDTH) of the differences of gradients
AHA_CLONES void add_moments(const float* x, const int32_t* block, int64_t from, int64_t to, int64_t n,
                            const float* const* rows, int64_t outputs, const float* next, float* moments) {
  for (int64_t i = from; i < to; i += WIDTH) {
    V values[WIDTH];
    differences(rows, outputs, next, false, i, n, values);
    for (int64_t e = 0; e < std::min(WIDTH, n - i); ++e) {
      float* sum = moments + block[i + e] * NODES * WIDTH;
      V value = values[e];
      for (int64_t p = 0; p < NODES; ++p) at(sum + p * WIDTH) += value, value *= x[i + e];
    }
  }
}
AHA_CLONES void add_to_double(int64_t n, float* some, double* all) {
  for (int64_t i = 0; i < n; ++i) all[i] += some[i], some[i] = 0;
}

// gradient_i (added to where `more`) = Σ over outputs of a difference times the output's derivative
AHA_CLONES void contract(const float* x, const int32_t* block, int64_t n, const float* coefficients,
                         const float* const* rows, int64_t outputs, const float* next, bool one, bool more,
                         float* gradient) {
  Some some;
  for (int64_t i = 0; i < n; i += WIDTH) {
    pick(x, block, i, n, some);
    V values[WIDTH], slopes[4];
    differences(rows, outputs, next, one, i, n, values);
    for (int64_t e = 0; e < WIDTH; e += 4) {
      polynomials(coefficients, some.x + e, some.block + e, slopes);
      for (int64_t m = 0; m < 4; ++m) values[e + m] *= slopes[m];
    }
    transpose(values);
    V sum = values[0];
    for (int64_t s = 1; s < WIDTH; ++s) sum += values[s];
    if (more) sum += load(gradient + i, n - i);
    store(sum, n - i, gradient + i);
  }
}

class NodeRanking {
 public:
  NodeRanking(const BlockProblem<float>& problem, const NodeRows& rows) : problem_(problem), rows_(rows), k_(problem.k) {}

  AtNodes forward(float* scalings, int32_t* absorbed, float* out) {
    if (!begin()) return AtNodes::refused;
    first_potential(rows_.axis.place, Q_, columns_.place, h_, C_, 2 / rows_.tau, F_);
    first_potential(columns_.place, C_, rows_.axis.place, F_, Q_, 2 / rows_.tau, G_);
    keep(scalings, 0, F_, G_);
    make();
    if (static_cast<int64_t>(X_.pairs.size()) * PAIR > k_ * k_) return AtNodes::refused;
    first_scaling(v_);
    product(v_, columns_.weight, C_, weighted_v_);
    for (int64_t t = 1; t <= problem_.iterations; ++t) {
      multiply(ROWS, weighted_v_, row_sums_);
      const Range u = invert(row_sums_, rows_.axis.weight, Q_, u_, weighted_u_);
      if (!u.usable()) return AtNodes::refused;
      if (t == 1 && resolved(false) != AtNodes::found) return AtNodes::refused;
      multiply(COLUMNS, weighted_u_, column_sums_);
      const Range v = invert(column_sums_, columns_.weight, C_, v_, weighted_v_);
      if (!v.usable()) return AtNodes::refused;
      if ((t & (t - 1)) == 0 || t == problem_.iterations)
        if (const AtNodes smooth = resolved(true); smooth != AtNodes::found) return smooth;
      keep(scalings, t, u_, v_);
      absorbed[t - 1] = IN_NODES | rows_.levels << NODE_LEVELS;
      if (t == problem_.iterations || !X_.dropped || (u.within(SCALING) && v.within(SCALING))) continue;
      absorbed[t - 1] |= ABSORBED;
      absorb(u_, v_, 1);
      make();
      std::fill_n(u_.get(), Q_, 1.0), std::fill_n(v_.get(), C_, 1.0);
      std::copy_n(columns_.weight.get(), C_, weighted_v_.get());
    }
    read(out);
    return AtNodes::found;
  }

  void backward(const float* scalings, const int32_t* absorbed, const float* grad, float* grad_scores) {
    if (!rows_.usable || !begin()) {
      std::fill_n(grad_scores, k_, std::numeric_limits<float>::quiet_NaN());
      return;
    }
    const int64_t iterations = problem_.iterations;
    find(scalings, 0, F_, G_);
    for (int64_t t = 1; t < iterations; ++t)
      if (absorbed[t - 1] & ABSORBED) find(scalings, t, u_, v_), absorb(u_, v_, 1);
    make();
    find(scalings, iterations, u_, v_);
    const Buffer<double> before(C_), y(C_), g(C_), summed = zeros<double>(C_);
    begin_backward(grad, g);
    for (int64_t t = iterations;; --t) {
      const bool restarts = t > 1 && (absorbed[t - 2] & ABSORBED);
      product(v_, g, C_, y);
      multiply(ROWS, y, row_sums_);
      weigh(rows_.axis.weight, u_, row_sums_, Q_, weighted_u_);
      if (t == iterations) add_product(readout_, u_, Q_, weighted_u_);
      product(weighted_u_, u_, Q_, row_sums_);
      multiply(COLUMNS, row_sums_, column_sums_);
      if (t == 1)
        first_scaling(before);
      else if (restarts)
        std::fill_n(before.get(), C_, 1.0);
      else
        find(scalings, t - 1, u_, before);
      for (int64_t a = 0; a < C_; ++a) {
        const double value = -before[a] * column_sums_[a];
        summed[a] += value, g[a] = columns_.weight[a] * value;
      }
      if (t == 1) break;
      if (restarts) {
        find(scalings, t - 1, u_, v_);
        absorb(u_, v_, -1);
        make();
      } else {
        std::copy_n(before.get(), C_, v_.get());
      }
    }
    finish(grad, summed, grad_scores);
  }

 private:
  static constexpr int ROWS = 0, COLUMNS = 1;
  static constexpr int64_t PAIR = 80;  // entries of the dense matrix that take as long as a pair of cells

  bool begin() {
    const float* scores = problem_.scores;
    const Buffer<double> places(k_);
    bool finite = true;
    for (int64_t j = 0; j < k_; ++j) {
      places[j] = static_cast<double>(scores[j]) - 0.5;
      finite &= std::isfinite(scores[j]);
    }
    if (!finite) return false;
    if (!columns_.make(places, k_, SCORE_SPACING * std::sqrt(rows_.tau), k_ - rows_.axis.size())) return false;
    Q_ = rows_.axis.size(), C_ = columns_.size();
    for (Buffer<double>* of : {&F_, &u_, &weighted_u_, &row_sums_, &readout_}) *of = Buffer<double>(Q_);
    for (Buffer<double>* of : {&G_, &h_, &v_, &weighted_v_, &column_sums_}) *of = Buffer<double>(C_);
    // less that of the smallest |c|, for potentials are saved in float
    double nearest = std::numeric_limits<double>::infinity();
    for (int64_t a = 0; a < C_; ++a) nearest = std::min(nearest, std::abs(columns_.place[a]));
    for (int64_t a = 0; a < C_; ++a)
      h_[a] = -(columns_.place[a] - nearest) * (columns_.place[a] + nearest) / rows_.tau;
    reach_ = 2 * rows_.axis.half * columns_.half / rows_.tau;
    const double* x = node_tables().x;
    for (int level = 0; level <= rows_.levels; ++level) {
      Parity& inner = X_.inner.emplace_back();
      for (int64_t a = 0; a < HALF; ++a)
        for (int64_t b = 0; b < HALF; ++b) {
          const double exponent = std::ldexp(reach_, -level) * x[a] * x[b];
          inner.even[a][b] = std::cosh(exponent), inner.odd[a][b] = std::sinh(exponent);
        }
    }
    return true;
  }

  // The pairs that count, and their factors, from the potentials.
  void make() {
    const int64_t rows = rows_.axis.blocks, columns = columns_.blocks;
    X_.pairs.clear(), X_.by_column.clear();
    X_.dropped = false;
    const double twice = 2 / rows_.tau;
    alignas(64) double row[NODES], column[NODES];
    for (int64_t I = 0; I < rows; ++I) {
      const double q = rows_.axis.middle(I);
      for (int64_t J = 0; J < columns; ++J) {
        const double c = columns_.middle(J);
        factor(rows_.axis.place + I * NODES, 0, twice * c, F_ + I * NODES, row);
        factor(columns_.place + J * NODES, c, twice * q, G_ + J * NODES, column);
        const double shift = largest(row);
        if (shift + largest(column) + reach_ < -NEGLIGIBLE) {
          X_.dropped = true;
          continue;
        }
        const auto p = static_cast<int64_t>(X_.pairs.size());
        expect(p + 1);
        std::copy_n(row, NODES, X_.row + p * NODES), std::copy_n(column, NODES, X_.column + p * NODES);
        exponentials(-shift, X_.row + p * NODES), exponentials(shift, X_.column + p * NODES);
        X_.pairs.push_back({static_cast<int32_t>(I), static_cast<int32_t>(J), rows_.axis.level[I]});
      }
    }
    // by level, then by column
    const auto bin = [&](const NodeMatrix::Pair& pair) { return pair.level * columns + pair.column; };
    std::vector<int32_t> first((rows_.levels + 1) * columns + 1, 0);
    for (const auto& pair : X_.pairs) ++first[bin(pair) + 1];
    for (size_t n = 1; n < first.size(); ++n) first[n] += first[n - 1];
    X_.by_column.resize(X_.pairs.size());
    for (size_t p = 0; p < X_.pairs.size(); ++p) X_.by_column[first[bin(X_.pairs[p])]++] = static_cast<int32_t>(p);
  }
  void expect(int64_t pairs) {
    if (pairs <= X_.room) return;
    const int64_t room = std::max<int64_t>(2 * X_.room, 64);
    for (Buffer<double>* factors : {&X_.row, &X_.column}) {
      Buffer<double> larger(room * NODES);
      std::copy_n(factors->get(), X_.room * NODES, larger.get());
      *factors = std::move(larger);
    }
    X_.room = room;
  }

  void multiply(int side, const double* weights, double* out) const {
    std::fill_n(out, side == ROWS ? Q_ : C_, 0.0);
    const double *row = X_.row, *column = X_.column;
    const auto count = static_cast<int64_t>(X_.pairs.size());
    if (side == ROWS)
      add_products(X_.inner.data(), X_.pairs.data(), nullptr, count, true, row, column, weights, out);
    else
      add_products(X_.inner.data(), X_.pairs.data(), X_.by_column.data(), count, false, column, row, weights, out);
  }

  // Whether nodes tell what the iteration sums: over the columns for every row, over the rows for every column.
  AtNodes resolved(bool over_ranks) const {
    const NodeTables& tables = node_tables();
    const int64_t last = rows_.axis.blocks - 1;
    AtNodes smooth = AtNodes::found;
    for (size_t p = 0; p < X_.pairs.size(); ++p) {
      const int64_t I = X_.pairs[p].row, J = X_.pairs[p].column;
      const Resolved row = resolve(tables, X_.row + p * NODES, u_ + I * NODES),
                     column = resolve(tables, X_.column + p * NODES, v_ + J * NODES);
      const double over_rows = row.tail * column.most * static_cast<double>(rows_.axis.count[I]),
                   over_columns = column.tail * row.most * static_cast<double>(columns_.count[J]);
      if (!(over_columns <= SCORE_TOLERANCE)) return AtNodes::refused;
      if (!over_ranks || over_rows <= RANK_TOLERANCE) continue;
      if (I > 0 && I < last) return AtNodes::refused;
      smooth = AtNodes::rough_ends;
    }
    return smooth;
  }

  void first_scaling(double* v) const {
    std::copy_n(h_.get(), C_, v);
    exponentials_of(G_, v, C_);
  }
  void absorb(const double* u, const double* v, double sign) const {
    for (int64_t b = 0; b < Q_; ++b) F_[b] += sign * std::log(u[b]);
    for (int64_t a = 0; a < C_; ++a) G_[a] += sign * std::log(v[a]);
  }
  // values of iteration t, 0 for the first potentials, as they lie in the saved scalings
  void keep(float* scalings, int64_t t, const double* row, const double* column) const {
    char* at = reinterpret_cast<char*>(scalings) + t * (Q_ + C_) * static_cast<int64_t>(sizeof(double));
    std::memcpy(at, row, Q_ * sizeof(double)), std::memcpy(at + Q_ * sizeof(double), column, C_ * sizeof(double));
  }
  void find(const float* scalings, int64_t t, double* row, double* column) const {
    const char* at = reinterpret_cast<const char*>(scalings) + t * (Q_ + C_) * static_cast<int64_t>(sizeof(double));
    std::memcpy(row, at, Q_ * sizeof(double)), std::memcpy(column, at + Q_ * sizeof(double), C_ * sizeof(double));
  }

  // Range of pairs, which lie by row, of the blocks that an output belongs to.
  std::pair<int64_t, int64_t> range(const NodeRows::Output& output) const {
    const auto before = [&](int64_t block) {
      return std::partition_point(X_.pairs.begin(), X_.pairs.end(), [&](const auto& pair) { return pair.row < block; }) -
             X_.pairs.begin();
    };
    return {before(output.begin), before(output.end)};
  }

  // m_s(c) = v(c) Σ_i W_si u(q_i) X(q_i, c) at the nodes
  void masks(double* values) const {
    const Buffer<double> weights(Q_);
    for (size_t n = 0; n < rows_.outputs.size(); ++n) {
      const NodeRows::Output& output = rows_.outputs[n];
      double* value = values + n * C_;
      std::fill_n(value, C_, 0.0);
      const int64_t from = output.begin * NODES;
      product(output.weight, u_ + from, output.size(), weights + from);
      const auto [first, end] = range(output);
      add_products(X_.inner.data(), X_.pairs.data() + first, nullptr, end - first, false, X_.column + first * NODES,
                   X_.row + first * NODES, weights, value);
      product(value, v_, C_, value);
    }
  }

  int64_t outputs() const { return static_cast<int64_t>(rows_.outputs.size()); }

  void read(float* out) const {
    const int64_t outputs = this->outputs();
    const Buffer<double> values(outputs * C_);
    masks(values);
    std::vector<char> filled(rows_.steps, 0);
    const Buffer<float> coefficients = zeros<float>(columns_.blocks * NODES * WIDTH);
    for (int64_t first = 0; first < outputs; first += WIDTH) {
      const int64_t some = std::min(WIDTH, outputs - first);
      std::array<const double*, WIDTH> from{};
      std::array<float*, WIDTH> to{};
      for (int64_t s = 0; s < some; ++s) {
        from[s] = values + (first + s) * C_, to[s] = out + rows_.outputs[first + s].s * k_;
        filled[rows_.outputs[first + s].s] = 1;
      }
      side_by_side(node_tables(), from.data(), some, columns_.blocks, nullptr, 0, coefficients);
      interpolate(columns_.x, columns_.block, k_, coefficients, to.data(), some);
    }
    for (int64_t s = 0; s < rows_.steps; ++s)
      if (!filled[s]) std::fill_n(out + s * k_, k_, 0.0f);
  }

  // Gradient rows of a group of outputs, and that of the first output of the next.
  struct Above {
    std::array<const float*, WIDTH> rows{};
    const float* next = nullptr;
    int64_t outputs;
  };
  Above above(const float* grad, int64_t first) const {
    Above group;
    group.outputs = std::min(WIDTH, outputs() - first);
    for (int64_t s = 0; s < group.outputs; ++s) group.rows[s] = grad + rows_.outputs[first + s].s * k_;
    if (first + WIDTH < outputs()) group.next = grad + rows_.outputs[first + WIDTH].s * k_;
    return group;
  }

  // The gradient of log v^T at the columns, g, and what the readout leaves to u^T, in readout_ (without the factor u).
  void begin_backward(const float* grad, double* g) {
    const int64_t count = outputs(), moments = columns_.blocks * NODES * WIDTH;
    masks_ = Buffer<double>(count * C_);
    masks(masks_);
    const Buffer<double> at_nodes = zeros<double>(count * C_), all(moments);
    const Buffer<float> some = zeros<float>(moments);
    for (int64_t first = 0; first < count; first += WIDTH) {
      const Above group = above(grad, first);
      std::fill_n(all.get(), moments, 0.0);
      for (int64_t i = 0; i < k_; i += CHUNK) {
        add_moments(columns_.x, columns_.block, i, std::min(k_, i + CHUNK), k_, group.rows.data(), group.outputs,
                    group.next, some);
        add_to_double(moments, some, all);
      }
      spread(all, group.outputs, at_nodes + first * C_);
    }
    // gradients of outputs: those of the running sums from theirs on
    for (int64_t n = count - 2; n >= 0; --n)
      for (int64_t a = 0; a < C_; ++a) at_nodes[n * C_ + a] += at_nodes[(n + 1) * C_ + a];
    std::fill_n(g, C_, 0.0), std::fill_n(readout_.get(), Q_, 0.0);
    const Buffer<double> weights(C_), sums(Q_);
    for (int64_t n = 0; n < count; ++n) {
      const double* of = at_nodes + n * C_;
      add_product(of, masks_ + n * C_, C_, g);
      const NodeRows::Output& output = rows_.outputs[n];
      product(of, v_, C_, weights);
      const int64_t from = output.begin * NODES;
      std::fill_n(sums + from, output.size(), 0.0);
      const auto [begin, end] = range(output);
      add_products(X_.inner.data(), X_.pairs.data() + begin, nullptr, end - begin, true, X_.row + begin * NODES,
                   X_.column + begin * NODES, weights, sums);
      add_product(sums + from, output.weight, output.size(), readout_ + from);
    }
  }
  // moments (blocks,NODES,WIDTH) to values at nodes (outputs,size)
  void spread(const double* moments, int64_t count, double* out) const {
    for (int64_t b = 0; b < columns_.blocks; ++b)
      for (int64_t s = 0; s < count; ++s) {
        alignas(64) double of[NODES];
        for (int64_t p = 0; p < NODES; ++p) of[p] = moments[(b * NODES + p) * WIDTH + s];
        moments_to_nodes(1, of);
        std::copy_n(of, NODES, out + s * C_ + b * NODES);
      }
  }

  // Where a score lies in the weights of the nodes, and where outputs are read.
  void finish(const float* grad, const double* summed, float* grad_scores) const {
    const int64_t count = outputs();
    const Buffer<double> running = zeros<double>(C_);
    const Buffer<float> coefficients(columns_.blocks * NODES * WIDTH);
    bool done = false;
    for (int64_t first = 0; !done; first += WIDTH) {
      const Above group = first < count ? above(grad, first) : Above{{}, nullptr, 0};
      std::array<const double*, WIDTH> from{};
      for (int64_t s = 0; s < group.outputs; ++s) from[s] = masks_ + (first + s) * C_;
      done = group.outputs < WIDTH;  // there is room for the last
      std::fill_n(coefficients.get(), columns_.blocks * NODES * WIDTH, 0.0f);
      side_by_side(node_tables(), from.data(), group.outputs, columns_.blocks, running, 1 / columns_.half, coefficients);
      if (done) {
        std::fill_n(running.get(), C_, 0.0);
        from[0] = summed;
        side_by_side(node_tables(), from.data(), 1, columns_.blocks, running, 1 / columns_.half,
                     coefficients + group.outputs);
      }
      contract(columns_.x, columns_.block, k_, coefficients, group.rows.data(), group.outputs, group.next, done,
               first > 0, grad_scores);
    }
  }

  const BlockProblem<float>& problem_;
  const NodeRows& rows_;
  const int64_t k_;
  int64_t Q_ = 0, C_ = 0;  // nodes
  double reach_ = 0;
  NodeAxis columns_;
  NodeMatrix X_;
  Buffer<double> F_, G_, h_, u_, v_, weighted_u_, weighted_v_, row_sums_, column_sums_, readout_, masks_;
};

}  // namespace

NodeRows::NodeRows(const float* left, int64_t rows, int64_t size, double temperature, int refined)
    : levels(refined), tau(temperature), k(size), steps(rows) {
  if (!(tau > 0) || !std::isfinite(tau) || k < 2) return;
  const Buffer<double> places(k);
  for (int64_t i = 0; i < k; ++i) places[i] = 0.5 - static_cast<double>(i) / static_cast<double>(k - 1);
  if (!axis.make_graded(places, k, RANK_SPACING * std::sqrt(tau), levels, k - NODES)) return;
  const Buffer<double> weights(axis.size());
  for (int64_t s = 0; s < steps; ++s) {
    const float* row = left + s * k;
    int64_t begin = 0, end = k;
    while (begin < k && row[begin] == 0.0f) ++begin;
    while (end > begin && row[end - 1] == 0.0f) --end;
    if (begin == end) continue;
    node_weights(axis, begin, end, row + begin, weights);
    // ranks descend
    const int64_t first = axis.block[end - 1], last = axis.block[begin] + 1;
    Output output{s, first, last, Buffer<double>((last - first) * NODES)};
    std::copy_n(weights + first * NODES, output.size(), output.weight.get());
    outputs.push_back(std::move(output));
  }
  usable = true;
}

AtNodes node_forward(const BlockProblem<float>& problem, const NodeRows& rows, float* scalings, int32_t* absorbed,
                  float* out) {
  return NodeRanking(problem, rows).forward(scalings, absorbed, out);
}
void node_backward(const BlockProblem<float>& problem, const NodeRows& rows, const float* scalings,
                   const int32_t* absorbed, const float* grad, float* grad_scores) {
  NodeRanking(problem, rows).backward(scalings, absorbed, grad, grad_scores);
}

}  // namespace aha
