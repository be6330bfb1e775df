// The linear-time ranking of one image, forward and backward: what sinkhorn.cpp asks of it.
#pragma once

#include <vector>

#include "aha_math.h"
#include "blocks.h"
#include "sinkhorn.h"

namespace aha {

// The left factor as the blocks use it: where the weights of every output begin and end, and what is left of 1.
template <typename T>
struct LeftRows {
  const T* left;  // (S,K)
  int64_t steps, k;
  std::vector<T> rest;                  // (K,) 1 - Σ_s left_s: one more output, so that all weights of a rank sum to 1
  std::vector<int64_t> begin, end;      // of every output's non-zeros, the rest last
  std::vector<int32_t> heaviest;        // of every rank, the output with the largest weight
  LeftRows(const T* left, int64_t steps, int64_t k);
  const T* row(int64_t s) const { return s < steps ? left + s * k : rest.data(); }
};

// One image: left (S,K) or right (K,) is given.
template <typename T>
struct BlockProblem {
  const T* scores;            // (K,)
  const T* start;             // (K,) or null
  double tau;
  int64_t k, iterations;
  const LeftRows<T>* left;
  const T* right;
  bool shared_out;            // threads share out this image
  bool single() const { return right || left->steps == 1; }  // P is read out by one vector
};

template <typename T>
struct BlockGradients {
  T *scores, *tau, *right, *start;  // of this image, null where not asked for
};

// False, and nothing written, if the dense matrix takes fewer operations and that may be.
// scalings (T+1,2,K), columns in the order of their scores; absorbed (T,)
template <typename T>
bool block_forward(const BlockProblem<T>& problem, bool may_refuse, T* scalings, int32_t* absorbed, T* out);
template <typename T>
void block_backward(const BlockProblem<T>& problem, const T* scalings, const int32_t* absorbed, const T* grad,
                    const BlockGradients<T>& gradients);

// How the factors of the first iteration count: vector operations of an iteration, in blocks and with the dense matrix.
struct BlockCount {
  int64_t row_blocks, column_blocks, pairs, work, dense_work;
  bool fewer() const { return work <= dense_work; }
};
template <typename T>
BlockCount block_count(const BlockProblem<T>& problem);

}  // namespace aha
