// The ranking at nodes, in float32: what sinkhorn.cpp asks of it. node_ranking.cpp says how.
#pragma once

#include <array>
#include <vector>

#include "block_ranking.h"
#include "node_axis.h"

namespace aha {

// The ranks and the left factor at nodes; the same for every image of a call.
struct NodeRows {
  struct Output {
    int64_t s, begin, end;  // row of left, and its blocks of ranks with a weight
    Buffer<double> weight;  // at the nodes of those blocks
    int64_t size() const { return (end - begin) * NODES; }
  };
  int levels = 0;       // by which the cells at both ends are refined
  bool usable = false;  // false: ranks take more nodes than there are, or the temperature is no number to work with
  double tau;
  int64_t k, steps;
  NodeAxis axis;
  std::vector<Output> outputs;  // rows of left that are not 0

  // The ends of the ranks are the first to need more nodes, for the scores there lie wide apart.
  NodeRows(const float* left, int64_t steps, int64_t k, double tau, int levels);
};

// Levels to try, one after the other, where the ends alone are rough.
inline std::array<int, 3> node_levels(double tau) { return tau > 0.03 ? std::array{0, 1, 3} : std::array{2, 3, 5}; }

// Whether the output was found. If not, nothing is written to it: another plan takes less time, or the scalings of this
// image are not smooth between nodes, and at the ends of the ranks alone, or elsewhere too.
enum class AtNodes { found, rough_ends, refused };
AtNodes node_forward(const BlockProblem<float>& problem, const NodeRows& rows, float* scalings, int32_t* absorbed, float* out);
void node_backward(const BlockProblem<float>& problem, const NodeRows& rows, const float* scalings,
                   const int32_t* absorbed, const float* grad, float* grad_scores);

}  // namespace aha
