// One axis of the ranking at nodes: ranks or scores in cells of one width, 16 Chebyshev nodes in every cell that is not
// empty. A function on a cell is the polynomial through its values at the nodes; so a sum of it over the elements is a
// sum over the nodes, with the weights Σ_j l_a(x_j) of the Lagrange polynomials l_a (moments to nodes), and its value
// at an element follows from its coefficients (nodes to coefficients).
#pragma once

#include <cmath>
#include <vector>

#include "lanes.h"

namespace aha {

constexpr int64_t NODES = 16, HALF = NODES / 2;
using Double = Lanes<double>::V;  // HALF of them
static_assert(Lanes<double>::N == HALF);

// Nodes in the order x_0 … x_7 > 0, then -x_0 … -x_7: even and odd parts of functions are sums and differences of the
// halves, and a matrix of NODES x NODES that knows parity is two of HALF x HALF.
struct Parity {
  alignas(64) double even[HALF][HALF], odd[HALF][HALF];  // [from][to]
  double& of(int64_t parity, int64_t from, int64_t to) { return parity ? odd[from][to] : even[from][to]; }
};
// One of them in registers.
struct Factors {
  Double e0, e1, e2, e3, e4, e5, e6, e7, o0, o1, o2, o3, o4, o5, o6, o7;

  AHA_INLINE explicit Factors(const Parity& by)
      : e0(at(by.even[0])), e1(at(by.even[1])), e2(at(by.even[2])), e3(at(by.even[3])), e4(at(by.even[4])),
        e5(at(by.even[5])), e6(at(by.even[6])), e7(at(by.even[7])), o0(at(by.odd[0])), o1(at(by.odd[1])),
        o2(at(by.odd[2])), o3(at(by.odd[3])), o4(at(by.odd[4])), o5(at(by.odd[5])), o6(at(by.odd[6])),
        o7(at(by.odd[7])) {}
  AHA_INLINE void multiply(Double even, Double odd, Double& sum_even, Double& sum_odd) const {
    alignas(64) double e[HALF], o[HALF];
    at(e) = even, at(o) = odd;
    sum_even = (e0 * e[0] + e2 * e[2] + e4 * e[4] + e6 * e[6]) + (e1 * e[1] + e3 * e[3] + e5 * e[5] + e7 * e[7]);
    sum_odd = (o0 * o[0] + o2 * o[2] + o4 * o[4] + o6 * o[6]) + (o1 * o[1] + o3 * o[3] + o5 * o[5] + o7 * o[7]);
  }
};
AHA_INLINE void multiply(const Parity& by, Double even, Double odd, Double& sum_even, Double& sum_odd) {
  Factors(by).multiply(even, odd, sum_even, sum_odd);
}

// What depends on the nodes alone.
struct NodeTables {
  double x[NODES];
  Parity to_coefficients;  // [node][power / 2]
  Parity to_nodes;         // its transpose: moments to weights
  alignas(64) double tail[2][HALF];  // of the Chebyshev coefficients 14, from the even part, and 15, from the odd
  NodeTables();
};
const NodeTables& node_tables();

// powers p: Σ_a f_a l_a(x) = Σ_p c_p x^p
AHA_INLINE void coefficients(const NodeTables& tables, const double* f, double* even, double* odd) {
  Double e, o;
  multiply(tables.to_coefficients, at(f) + at(f + HALF), at(f) - at(f + HALF), e, o);
  at(even) = e, at(odd) = o;
}

struct NodeAxis {
  int64_t blocks = 0;             // cells that are not empty
  double half = 0;                // half the width of a cell of level 0; 2^-level of it at others
  std::vector<int32_t> level;     // of a block
  std::vector<int64_t> count;     // elements of a block
  Buffer<double> place, weight;   // of the nodes
  Buffer<float> x;                // of the elements, in [-1, 1]
  Buffer<int32_t> block;

  int64_t size() const { return blocks * NODES; }
  double middle(int64_t b) const { return 0.5 * (place[b * NODES] + place[b * NODES + HALF]); }
  // n places in cells of one width, at most `width`. False if there are more than `most` nodes.
  bool make(const double* places, int64_t n, double width, int64_t most);
  // The same for descending places; the first and the last cell are halved `levels` times towards the ends.
  bool make_graded(const double* places, int64_t n, double width, int levels, int64_t most);

 private:
  bool keep(const double* places, int64_t n, const std::vector<double>& edges, const std::vector<int32_t>& levels, int64_t most);
};

// (blocks,NODES) in place: Σ_j of powers of x_j, times anything, to Σ_j l_a(x_j)
void moments_to_nodes(int64_t blocks, double* moments);

// weights (blocks,NODES) of the elements begin … end - 1 of an axis, or of those times values
void node_weights(const NodeAxis& axis, int64_t begin, int64_t end, const float* values, double* weights);

}  // namespace aha
