// Sinkhorn ranking on the CPU: one log-domain iteration makes X, all others are products with it.
//   forward   u = 1 / (X v), v = 1 / (X' u), T times; P = u X v is only read out
//   backward  exact, from the saved u and v: the same sweeps in reverse, then a sum of 2T outer products per entry
// X of one matrix (K x K) is the only large memory. Each sweep reads X once, from the second-level cache for K < 700.
// Threads share out matrices, or blocks of rows if matrices are few; sums over blocks are formed in one order either
// way, so results repeat bit for bit for any number of threads.
// Without noise, and unless the matrix itself is asked for, each image takes the fastest of three: iterations at nodes
// where its scalings are smooth (node_ranking.cpp), in blocks (block_ranking.cpp, linear time), or dense, whichever of
// these two counts fewer operations.
#include "sinkhorn.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "block_ranking.h"
#include "by_rank.h"
#include "node_ranking.h"
#include "sinkhorn_rows.h"

namespace aha {
namespace {

constexpr int64_t BLOCK = 64;    // rows per task
constexpr int64_t TILE = 128;    // columns per task where rows are added up
constexpr float NEVER = -1e30f;  // logit of the padding

// The matrices, all of them: scores with their noise, or logits as they are.
template <typename T>
struct Problem {
  RankingShape shape;
  const T *scores, *logits, *start;  // start: the initial column potential, or null
  T tau, noise;
  uint64_t seed;
  int64_t k() const { return shape.k; }
  T q(int64_t i) const { return shape.k == 1 ? T(0.5) : T(0.5) - static_cast<T>(i) / static_cast<T>(shape.k - 1); }
};

// One matrix X with its potentials: X = exp(M + F + G).
template <typename T>
class Matrix {
 public:
  const int64_t k, ld, blocks;
  Buffer<T> X, F, G, h;

  Matrix(const Problem<T>& problem, int64_t b)
      : k(problem.k()), ld(padded<T>(k)), blocks((k + BLOCK - 1) / BLOCK), X(k * ld), F(ld), G(ld), h(ld),
        problem_(problem), b_(b), c_(ld), partial_(blocks * ld) {
    for (T* column : {h.get(), G.get(), c_.get()}) std::fill_n(column, ld, T{0});
    if (!problem.scores) return;
    T nearest = std::numeric_limits<T>::infinity();
    for (int64_t j = 0; j < k; ++j) {
      c_[j] = problem.scores[b * k + j] - T(0.5);
      nearest = std::min(nearest, std::abs(c_[j]));
    }
    for (int64_t j = 0; j < k; ++j)
      h[j] = problem.start ? problem.start[b * k + j] : initial_potential(c_[j], nearest, problem.tau);
  }

  // The first iteration, in the log domain: potentials and X; v is the first column scaling, the row scaling is 1.
  void first(T* v) {
    for_each_block([&](int64_t block, int64_t begin, int64_t end) {
      T* largest = partial_ + block * ld;
      std::fill_n(largest, ld, T(NEVER));
      Noise noise(ld);
      for (int64_t i = begin; i < end; ++i) {
        logits(i, row(i), noise);
        F[i] = first_row(row(i), h, ld, largest);
      }
    });
    for (int64_t j = 0; j < k; ++j) {
      T largest = partial_[j];
      for (int64_t block = 1; block < blocks; ++block) largest = std::max(largest, partial_[block * ld + j]);
      G[j] = -largest;
    }
    for_each_block([&](int64_t block, int64_t begin, int64_t end) {
      std::fill_n(partial_ + block * ld, ld, T{0});
      for (int64_t i = begin; i < end; ++i) {
        exp_row(row(i), F[i], G, ld);
        add_row(T{1}, row(i), ld, partial_ + block * ld);
      }
    });
    std::fill_n(v, ld, T{0});
    columns([&](int64_t j, T sum) { v[j] = T{1} / sum; });
  }

  // X from the potentials: the same operations as in the first iteration, so the same bits.
  void make() {
    for_each_block([&](int64_t, int64_t begin, int64_t end) {
      Noise noise(ld);
      for (int64_t i = begin; i < end; ++i) {
        logits(i, row(i), noise);
        exp_row(row(i), F[i], G, ld);
      }
    });
  }

  // Moves scalings into the potentials.
  void absorb(const T* u, const T* v) {
    for (int64_t i = 0; i < k; ++i) F[i] += std::log(u[i]), G[i] += std::log(v[i]);
  }

  void forward(T* u, T* v) {
    for_each_block([&](int64_t block, int64_t begin, int64_t end) {
      sweep_forward(row(begin), ld, end - begin, v, u + begin, partial_ + block * ld);
    });
    columns([&](int64_t j, T sum) { v[j] = T{1} / sum; });
  }

  // z from y, then the gradient of the column potential before this iteration
  void backward(const T* y, const T* u, const T* r, const T* v_before, T* z, T* gradient) {
    for_each_block([&](int64_t block, int64_t begin, int64_t end) {
      sweep_backward(row(begin), ld, end - begin, y, u + begin, r ? r + begin : nullptr, z + begin,
                     partial_ + block * ld);
    });
    columns([&](int64_t j, T sum) { gradient[j] = -v_before[j] * sum; });
  }

  T* row(int64_t i) const { return X + i * ld; }

  template <typename Body>
  void for_each_block(const Body& body) const {
    for_each(blocks, [&](int64_t block) { body(block, block * BLOCK, std::min(k, (block + 1) * BLOCK)); });
  }

  // f(j, the sum of column j over the blocks)
  template <typename Body>
  void columns(const Body& f) const { add_blocks(partial_.get(), f); }
  template <typename Body>
  void add_blocks(const T* partial, const Body& f) const {
    for (int64_t j = 0; j < k; ++j) {
      T sum = partial[j];
      for (int64_t block = 1; block < blocks; ++block) sum += partial[block * ld + j];
      f(j, sum);
    }
  }

  struct Noise {
    Buffer<uint32_t> words;
    Buffer<float> gamma;
    explicit Noise(int64_t n) : words(n + 8), gamma(n) {}
  };

  // M of row i
  void logits(int64_t i, T* row, const Noise& noise) const {
    if (problem_.logits) {
      std::copy_n(problem_.logits + (b_ * k + i) * k, k, row);
    } else {
      const bool noisy = problem_.noise != 0;
      if (noisy) gumbel_row(problem_.seed, (static_cast<uint64_t>(b_) * k + i) * k, k, noise.words, noise.gamma);
      logits_row(2 * problem_.q(i), c_, noisy ? noise.gamma.get() : nullptr, problem_.noise, problem_.tau, k, row);
    }
    std::fill(row + k, row + ld, T(NEVER));
  }

 private:
  const Problem<T>& problem_;
  const int64_t b_;
  Buffer<T> c_, partial_;
};

template <typename T>
bool large(const T* scaling, int64_t k) {
  for (int64_t j = 0; j < k; ++j)
    if (scaling[j] > T(LARGE_SCALING) || scaling[j] < 1 / T(LARGE_SCALING)) return true;
  return false;
}

// f(b) for every matrix: shared out among threads if there are enough, else threads share out the blocks of each.
template <typename F>
void for_each_matrix(int64_t batch, const F& f) {
  if (batch >= torch::stable::get_num_threads())
    for_each(batch, f);
  else
    for (int64_t b = 0; b < batch; ++b) {
      const FlushDenormals guard;
      f(b);
    }
}

// The output, whichever it is, and its gradient. Rows of outputs are not padded.
template <typename T>
struct Output {
  Readout kind;
  const T* left;   // (S,K)
  int64_t steps;   // rows of left
  const T* right;  // (B,K)
  std::shared_ptr<const ByRank<T>> by_rank = nullptr;  // left as the dense matrix is read by it,
  std::shared_ptr<const LeftRows<T>> rows = nullptr;   // and the blocks

  void prepare(int64_t k, bool dense, bool blocks) {
    if (kind != Readout::left) return;
    if (dense) by_rank = std::make_shared<const ByRank<T>>(left, steps, k);
    if (blocks) rows = std::make_shared<const LeftRows<T>>(left, steps, k);
  }
  int64_t size(int64_t k) const {
    return kind == Readout::right ? k : (kind == Readout::left ? steps : k) * k;
  }

  void read(const Matrix<T>& matrix, const Problem<T>& problem, int64_t b, const T* u, const T* v, T* out) const {
    const int64_t k = matrix.k, ld = matrix.ld;
    out += b * size(k);
    if (kind == Readout::left) return read_left(matrix, u, v, out);
    Buffer<T> column(ld);
    Buffer<double> potential(ld);
    std::fill_n(column.get(), ld, T{0});
    for (int64_t j = 0; j < k; ++j) {
      column[j] = kind == Readout::right ? v[j] * right[b * k + j] : v[j];
      potential[j] = matrix.G[j] + std::log(static_cast<double>(v[j]));
    }
    matrix.for_each_block([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double f = matrix.F[i] + std::log(static_cast<double>(u[i]));
        if (kind == Readout::logarithm)
          sum_row(problem.logits + (b * k + i) * k, f, potential, k, out + i * k);
        else if (kind == Readout::right)
          out[i] = u[i] * dot(matrix.row(i), column, ld);
        else
          scale_row(matrix.row(i), u[i], column, k, out + i * k);
      }
    });
  }

  // Threads share out columns here: sums over rows need no partial results.
  void read_left(const Matrix<T>& matrix, const T* u, const T* v, T* out) const {
    const int64_t k = matrix.k;
    for_each((matrix.ld + TILE - 1) / TILE, [&](int64_t tile) {
      const int64_t from = tile * TILE, width = std::min(TILE, matrix.ld - from), seen = std::min(width, k - from);
      Buffer<T> sums(steps * width);
      std::fill_n(sums.get(), steps * width, T{0});
      for (int64_t i = 0; i < k; ++i)
        by_rank->of(i, [&](int64_t s, T weight) {
          add_row(weight * u[i], matrix.row(i) + from, width, sums + s * width);
        });
      for (int64_t s = 0; s < steps; ++s)
        for (int64_t j = 0; j < seen; ++j) out[s * k + from + j] = v[from + j] * sums[s * width + j];
    });
  }

  // Row i of the gradient of P (of log P for the logarithm), padded with zeros.
  void grad_row(const T* grad, int64_t b, int64_t i, int64_t k, int64_t ld, T* row) const {
    grad += b * size(k);
    switch (kind) {
      case Readout::left:
        std::fill_n(row, ld, T{0});
        by_rank->of(i, [&](int64_t s, T weight) {
          for (int64_t j = 0; j < k; ++j) row[j] += weight * grad[s * k + j];
        });
        return;
      case Readout::right:
        for (int64_t j = 0; j < k; ++j) row[j] = grad[i] * right[b * k + j];
        break;
      default: std::copy_n(grad + i * k, k, row);
    }
    std::fill(row + k, row + ld, T{0});
  }
};

// scalings (T+1,2,K) of one matrix
template <typename T>
struct State {
  T* scalings;
  int32_t* absorbed;
  int64_t k;
  T* row(int64_t t) const { return scalings + 2 * t * k; }
  T* column(int64_t t) const { return row(t) + k; }
};

constexpr int64_t LEAST = 64, MOST = 8192;  // regions: below, blocks never pay; above, the matrix is too large

// Whether an image of k regions is tried at nodes, whether in blocks, and whether these may turn out to take more
// operations than its matrix.
struct Trial {
  bool nodes, blocks, may_refuse;
  Trial(RankingPlan plan, int64_t k)
      : nodes(plan == RankingPlan::nodes || (plan == RankingPlan::fastest && k >= LEAST)),
        blocks(plan == RankingPlan::blocks || (plan != RankingPlan::dense && k >= LEAST)),
        may_refuse(blocks && plan != RankingPlan::blocks && k <= MOST) {}
  bool taken(const BlockCount& count) const { return blocks && (!may_refuse || count.fewer()); }
};

template <typename T>
BlockProblem<T> in_blocks(const Problem<T>& problem, const Output<T>& output, int64_t b) {
  const auto [batch, k, iterations] = problem.shape;
  return {problem.scores + b * k,
          problem.start ? problem.start + b * k : nullptr,
          static_cast<double>(problem.tau),
          k,
          iterations,
          output.rows.get(),
          output.kind == Readout::right ? output.right + b * k : nullptr,
          batch < torch::stable::get_num_threads()};
}

// Whether blocks can be asked for.
template <typename T>
bool without_matrix(const Problem<T>& problem, const Output<T>& output) {
  return problem.scores && problem.noise == 0 && (output.kind == Readout::left || output.kind == Readout::right);
}

// Whether nodes can be asked for: outputs for every score, from ranks and scores alone.
template <typename T>
bool smooth(const Problem<T>& problem, const Output<T>& output) {
  return sizeof(T) == 4 && without_matrix(problem, output) && output.kind == Readout::left && !problem.start;
}

// f(image) for those of the batch where done(image) is false
template <typename Done, typename F>
void for_each_other(int64_t batch, const Done& done, const F& f) {
  std::vector<int64_t> others;
  for (int64_t b = 0; b < batch; ++b)
    if (!done(b)) others.push_back(b);
  for_each_matrix(static_cast<int64_t>(others.size()), [&](int64_t n) { f(others[n]); });
}

// done: 1 for the images that were ranked at nodes. at(b): where their state and output lie.
template <typename At>
void try_nodes(const Problem<float>& problem, const Output<float>& output, const At& at, std::vector<char>& done) {
  const auto batch = static_cast<int64_t>(done.size());
  std::vector<char> open(batch, 1);
  for (const int levels : node_levels(static_cast<double>(problem.tau))) {
    if (std::none_of(open.begin(), open.end(), [](char o) { return o; })) return;
    const NodeRows rows(output.left, output.steps, problem.k(), static_cast<double>(problem.tau), levels);
    if (!rows.usable) return;
    for_each(batch, [&](int64_t b) {
      if (!open[b]) return;
      const auto [scalings, absorbed, out] = at(b);
      const AtNodes found = node_forward(in_blocks(problem, output, b), rows, scalings, absorbed, out);
      done[b] = found == AtNodes::found, open[b] = found == AtNodes::rough_ends;
    });
  }
}

template <typename T>
void run_forward(const Problem<T>& problem, Output<T> output, T* scalings, int32_t* absorbed, T* out) {
  const auto [batch, k_, iterations_] = problem.shape;
  const int64_t k = k_, iterations = iterations_;
  if (batch == 0) return;
  const Trial trial(without_matrix(problem, output) ? asked_for() : RankingPlan::dense, k);
  std::vector<char> done(batch, 0);
  if constexpr (sizeof(T) == 4)
    if (trial.nodes && smooth(problem, output))
      try_nodes(
          problem, output,
          [&](int64_t b) {
            return std::tuple(scalings + b * (iterations + 1) * 2 * k, absorbed + b * iterations, out + b * output.size(k));
          },
          done);
  if (std::all_of(done.begin(), done.end(), [](char d) { return d; })) return;
  output.prepare(k, !trial.blocks || trial.may_refuse, trial.blocks);
  for_each_other(batch, [&](int64_t b) { return done[b]; }, [&](int64_t b) {
    if (trial.blocks && block_forward(in_blocks(problem, output, b), trial.may_refuse,
                                      scalings + b * (iterations + 1) * 2 * k, absorbed + b * iterations,
                                      out + b * output.size(k)))
      return;
    Matrix<T> matrix(problem, b);
    const State<T> state{scalings + b * (iterations + 1) * 2 * k, absorbed + b * iterations, k};
    Buffer<T> u(matrix.ld), v(matrix.ld);
    std::fill_n(u.get(), matrix.ld, T{1});
    matrix.first(v);
    std::copy_n(matrix.F.get(), k, state.row(0));
    std::copy_n(matrix.G.get(), k, state.column(0));
    std::fill_n(state.absorbed, iterations, 0);
    for (int64_t t = 1;; ++t) {
      std::copy_n(u.get(), k, state.row(t));
      std::copy_n(v.get(), k, state.column(t));
      if (t == iterations) break;
      if (large<T>(u, k) || large<T>(v, k)) {
        state.absorbed[t - 1] = 1;
        matrix.absorb(u, v);
        matrix.make();
        std::fill_n(v.get(), k, T{1});
      }
      matrix.forward(u, v);
    }
    output.read(matrix, problem, b, u, v, out);
  });
}

template <typename T>
struct Gradients {
  T *scores, *tau, *right, *logits, *start;  // null where not asked for
};

// The gradients of one matrix, gathered block by block.
template <typename T>
void run_backward(const Problem<T>& problem, Output<T> output, T* scalings, int32_t* absorbed, const T* grad,
                  const Gradients<T>& gradients) {
  const auto [batch, k_, iterations_] = problem.shape;
  const int64_t k = k_, iterations = iterations_;
  // whatever state came, what the forward pass could have taken
  const bool possible = without_matrix(problem, output), may_be_nodes = smooth(problem, output);
  const auto nodes = [&](int64_t b) { return may_be_nodes && (absorbed[b * iterations] & IN_NODES) != 0; };
  const auto blocks = [&](int64_t b) { return possible && !nodes(b) && (absorbed[b * iterations] & IN_BLOCKS) != 0; };
  int64_t of_nodes = 0, of_blocks = 0;
  for (int64_t b = 0; b < batch; ++b) of_nodes += nodes(b), of_blocks += blocks(b);
  // the gradient of tau is another matter, and taken from the scores alone
  if (gradients.tau) of_blocks += of_nodes, of_nodes = 0;
  if constexpr (sizeof(T) == 4)
    if (of_nodes) {
      const auto levels = [&](int64_t b) { return std::clamp(absorbed[b * iterations] >> NODE_LEVELS, 0, 16); };
      std::array<std::unique_ptr<const NodeRows>, 17> rows;
      for (int64_t b = 0; b < batch; ++b)
        if (auto& some = rows[levels(b)]; nodes(b) && !some)
          some = std::make_unique<const NodeRows>(output.left, output.steps, k, static_cast<double>(problem.tau), levels(b));
      for_each(batch, [&](int64_t b) {
        if (nodes(b))
          node_backward(in_blocks(problem, output, b), *rows[levels(b)], scalings + b * (iterations + 1) * 2 * k,
                        absorbed + b * iterations, grad + b * output.size(k), gradients.scores + b * k);
      });
      if (of_nodes == batch) return;
    }
  output.prepare(k, of_nodes + of_blocks < batch, of_blocks > 0);
  for_each_other(batch, [&](int64_t b) { return of_nodes && nodes(b); }, [&](int64_t b) {
    if (blocks(b) || nodes(b)) {
      const BlockGradients<T> of_image{gradients.scores + b * k, gradients.tau ? gradients.tau + b : nullptr,
                                       gradients.right ? gradients.right + b * k : nullptr,
                                       gradients.start ? gradients.start + b * k : nullptr};
      return block_backward(in_blocks(problem, output, b), scalings + b * (iterations + 1) * 2 * k,
                            absorbed + b * iterations, grad + b * output.size(k), of_image);
    }
    Matrix<T> matrix(problem, b);
    const int64_t ld = matrix.ld, blocks = matrix.blocks;
    const State<T> state{scalings + b * (iterations + 1) * 2 * k, absorbed + b * iterations, k};
    // the first iteration after which no scalings were absorbed before the end: where the last X begins
    const auto segment_begin = [&](int64_t last) {
      while (last > 1 && !state.absorbed[last - 2]) --last;
      return last;
    };
    // X of the segment that begins with iteration `begin`
    const auto make = [&](int64_t begin) {
      std::copy_n(state.row(0), k, matrix.F.get());
      std::copy_n(state.column(0), k, matrix.G.get());
      for (int64_t t = 1; t < begin; ++t)
        if (state.absorbed[t - 1]) matrix.absorb(state.row(t), state.column(t));
      matrix.make();
    };

    Buffer<T> by_row(2 * iterations * ld), by_column(2 * iterations * ld), r(ld), g(ld), centre(ld), u(ld), v(ld);
    Buffer<T> sums(3 * blocks * ld);  // columns of one thing each, per block: W, q L, L log P
    for (T* column : {g.get(), centre.get(), v.get(), u.get()}) std::fill_n(column, ld, T{0});
    std::copy_n(state.row(iterations), k, u.get());
    std::copy_n(state.column(iterations), k, v.get());
    const bool logarithm = output.kind == Readout::logarithm, want_tau = gradients.tau != nullptr;
    // row i of W, centred by column; its sum, and its addition to a column sum
    const auto weigh = [&](int64_t i, T* W, T* columns) {
      output.grad_row(grad, b, i, k, ld, W);
      return weigh_row(logarithm, u[i], matrix.row(i), v, centre, ld, W, columns);
    };
    const auto add_up = [&] {
      matrix.for_each_block([&](int64_t block, int64_t from, int64_t to) {
        Buffer<T> W(ld);
        std::fill_n(sums + block * ld, ld, T{0});
        for (int64_t i = from; i < to; ++i) r[i] = weigh(i, W, sums + block * ld);
      });
    };

    int64_t last = iterations, begin = segment_begin(last);
    make(begin);
    // Columns of P sum to 1, so a constant may be taken from each column of its gradient. Their own mean is what the
    // last column step would take away later, with the rounding of larger numbers.
    add_up();
    matrix.add_blocks(sums, [&](int64_t j, T sum) { centre[j] = sum; });
    add_up();
    matrix.add_blocks(sums, [&](int64_t j, T sum) { g[j] = sum; });
    std::fill_n(sums.get(), 3 * blocks * ld, T{0});
    if (gradients.right) {
      matrix.for_each_block([&](int64_t block, int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) add_row(grad[b * k + i] * u[i], matrix.row(i), ld, sums + block * ld);
      });
      matrix.add_blocks(sums, [&](int64_t j, T sum) { gradients.right[b * k + j] = v[j] * sum; });
    }
    // the potentials of log (K P), and what they leave of the logits
    Buffer<double> f_last(ld), g_last(ld);
    for (int64_t i = 0; i < k; ++i) {
      f_last[i] = matrix.F[i] + std::log(static_cast<double>(u[i])) + std::log(static_cast<double>(k));
      g_last[i] = matrix.G[i] + std::log(static_cast<double>(v[i]));
    }

    for (;;) {
      const auto pair = [&](Buffer<T>& list, int64_t t, int64_t which) { return list + (2 * (t - begin) + which) * ld; };
      for (int64_t t = last; t >= begin; --t) {
        T *u_t = pair(by_row, t, 0), *z = pair(by_row, t, 1), *y = pair(by_column, t, 0), *v_before = pair(by_column, t, 1);
        for (T* column : {u_t, z, y, v_before}) std::fill_n(column, ld, T{0});
        std::copy_n(state.row(t), k, u_t);
        for (int64_t j = 0; j < k; ++j) {
          y[j] = state.column(t)[j] * g[j];
          v_before[j] = t > begin ? state.column(t - 1)[j] : t > 1 ? T{1} : std::exp(matrix.h[j] - matrix.G[j]);
        }
        matrix.backward(y, u_t, t == iterations ? r.get() : nullptr, v_before, z, g);
      }
      // the gradient L of this segment's logits
      const bool final = last == iterations;
      matrix.for_each_block([&](int64_t block, int64_t from, int64_t to) {
        Buffer<T> L((to - from) * ld);
        T *moment = sums + (blocks + block) * ld, *entropy = sums + (2 * blocks + block) * ld;
        typename Matrix<T>::Noise noise(ld);
        Buffer<T> log_p(ld);
        if (final)
          for (int64_t i = from; i < to; ++i) weigh(i, L + (i - from) * ld, sums + block * ld);
        else
          std::fill_n(L.get(), (to - from) * ld, T{0});
        subtract_products(matrix.row(from), ld, to - from, 2 * (last - begin + 1), by_row + from, by_column, L);
        for (int64_t i = from; i < to; ++i) {
          T* row = L + (i - from) * ld;
          if (gradients.logits) {
            T* into = gradients.logits + (b * k + i) * k;
            for (int64_t j = 0; j < k; ++j) into[j] = final ? row[j] : into[j] + row[j];
            continue;
          }
          add_row(problem.q(i), row, ld, moment);
          if (!want_tau) continue;
          matrix.logits(i, log_p, noise);
          sum_row(log_p.get(), f_last[i], g_last, k, log_p.get());
          for (int64_t j = 0; j < k; ++j) entropy[j] += row[j] * log_p[j];
        }
      });
      if (begin == 1) break;
      last = begin - 1;
      begin = segment_begin(last);
      make(begin);
    }
    if (gradients.logits) return;
    // The logits depend on a_j as -2 (a_j - p_i) / tau = 2 (q_i - c_j) / tau. The sum of L over a column, which c_j
    // multiplies, is the gradient of the first column potential, and more accurate in that form. A start that is given
    // takes that part as its own.
    T* moment = r;
    matrix.add_blocks(sums + blocks * ld, [&](int64_t j, T sum) { moment[j] = sum; });
    // d / d tau is -L . logits / tau. Rows of L sum to 0, so the logits may be log (K P) - g_j: small where L is not 0.
    double of_tau = 0;
    for (int64_t j = 0; j < k; ++j) {
      if (gradients.start) gradients.start[b * k + j] = g[j];
      const T square = gradients.start ? T{0} : (problem.scores[b * k + j] - T(0.5)) * g[j];
      gradients.scores[b * k + j] = 2 * (moment[j] - square) / problem.tau;
      of_tau += g[j] * ((gradients.start ? 0 : matrix.h[j]) - g_last[j]);
    }
    if (!want_tau) return;
    matrix.add_blocks(sums + 2 * blocks * ld, [&](int64_t, T sum) { of_tau += sum; });
    gradients.tau[b] = static_cast<T>(-of_tau / problem.tau);
  });
}

using Triple = std::tuple<Tensor, Tensor, Tensor>;

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor fresh(const Tensor& like, const std::vector<int64_t>& sizes) {
  Tensor tensor = torch::stable::new_empty(like, sizes);
  prefer_large_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

std::tuple<Tensor, Tensor> new_state(const RankingShape& shape, const Tensor& like) {
  const auto [batch, k, iterations] = shape;
  return {fresh(like, {batch, iterations + 1, 2, k}),
          torch::stable::new_empty(like, {batch, iterations}, ScalarType::Int)};
}

template <typename T>
Problem<T> ranking(const RankingShape& shape, const Tensor& scores, const Tensor& tau, const Tensor& seed,
                   const std::optional<Tensor>& start, double noise) {
  return {shape, data<T>(scores), nullptr, start ? data<T>(*start) : nullptr, *data<T>(tau), static_cast<T>(noise),
          static_cast<uint64_t>(*data<int64_t>(seed))};
}

// Calls f with the output that left and right ask for.
template <typename T, typename F>
void with_output(const std::optional<Tensor>& left, const std::optional<Tensor>& right, const F& f) {
  const std::optional<Tensor> rows = contiguous(left), values = contiguous(right);
  const int64_t steps = rows ? rows->size(0) : 0;
  const Readout kind = left ? Readout::left : right ? Readout::right : Readout::matrix;
  f(Output<T>{kind, rows ? data<T>(*rows) : nullptr, steps, values ? data<T>(*values) : nullptr});
}

Triple gumbel_sinkhorn(const Tensor& scores, const Tensor& tau, const Tensor& seed, const std::optional<Tensor>& left,
                       const std::optional<Tensor>& right, int64_t n_iters, double noise,
                       const std::optional<Tensor>& start) {
  const RankingShape shape = check_ranking(scores, tau, seed, left, right, start, n_iters);
  const Tensor values = torch::stable::contiguous(scores);
  const std::optional<Tensor> initial = contiguous(start);
  auto [scalings, absorbed] = new_state(shape, values);
  Tensor out = fresh(values, out_sizes(shape, left, right));
  with_type(values, "gumbel_sinkhorn", [&](auto type) {
    using T = decltype(type);
    with_output<T>(left, right, [&](const Output<T>& output) {
      run_forward(ranking<T>(shape, values, tau, seed, initial, noise), output, data<T>(scalings), data<int32_t>(absorbed),
                  data<T>(out));
    });
  });
  return {out, scalings, absorbed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gumbel_sinkhorn_backward(const Tensor& grad, const Tensor& scores, const Tensor& tau, const Tensor& seed,
                                const std::optional<Tensor>& left, const std::optional<Tensor>& right,
                                const Tensor& scalings, const Tensor& absorbed, double noise, bool need_tau,
                                const std::optional<Tensor>& start) {
  const RankingShape shape = check_ranking(scores, tau, seed, left, right, start, iterations_of(absorbed));
  check_state(shape, scalings, absorbed, scores);
  check_grad(grad, scores, out_sizes(shape, left, right));
  const Tensor values = torch::stable::contiguous(scores), above = torch::stable::contiguous(grad);
  const Tensor state = torch::stable::contiguous(scalings), moved = torch::stable::contiguous(absorbed);
  const std::optional<Tensor> initial = contiguous(start);
  Tensor grad_scores = torch::stable::new_empty(values, {shape.batch, shape.k});
  Tensor grad_tau = torch::stable::new_empty(values, {need_tau ? shape.batch : 0});
  const auto like_scores = [&](bool given) {
    return torch::stable::new_empty(values, given ? std::vector{shape.batch, shape.k} : std::vector<int64_t>{0});
  };
  Tensor grad_right = like_scores(right.has_value()), grad_start = like_scores(start.has_value());
  with_type(values, "gumbel_sinkhorn_backward", [&](auto type) {
    using T = decltype(type);
    with_output<T>(left, right, [&](const Output<T>& output) {
      const Gradients<T> gradients{data<T>(grad_scores), need_tau ? data<T>(grad_tau) : nullptr,
                                   right ? data<T>(grad_right) : nullptr, nullptr,
                                   start ? data<T>(grad_start) : nullptr};
      run_backward(ranking<T>(shape, values, tau, seed, initial, noise), output, data<T>(state), data<int32_t>(moved),
                   data<T>(above), gradients);
    });
  });
  return {grad_scores, grad_tau, grad_right, grad_start};
}

// done: 1 for the images whose masks are ranked at nodes, found out by 30 iterations.
void plan_nodes(Problem<float> problem, std::vector<char>& done) {
  problem.shape.iterations = 30;
  const int64_t state = 2 * (problem.shape.iterations + 1) * problem.k();
  const auto batch = static_cast<int64_t>(done.size());
  const Buffer<float> scalings(batch * state);
  const Buffer<int32_t> absorbed(batch * problem.shape.iterations);
  try_nodes(
      problem, {Readout::left, nullptr, 0, nullptr},
      [&](int64_t b) {
        return std::tuple(scalings + b * state, absorbed + b * problem.shape.iterations, static_cast<float*>(nullptr));
      },
      done);
}

// One row per image: ranked dense (0), in blocks (1) or at nodes (2: masks in float32 may be), and how blocks count.
Tensor ranking_plan(const Tensor& scores, const Tensor& tau, const std::optional<Tensor>& start) {
  const Tensor seed = torch::stable::new_zeros(scores, {}, ScalarType::Long);
  const RankingShape shape = check_ranking(scores, tau, seed, std::nullopt, std::nullopt, start, 1);
  const Tensor values = torch::stable::contiguous(scores);
  const std::optional<Tensor> initial = contiguous(start);
  const Tensor out = torch::stable::new_zeros(values, {shape.batch, 6}, ScalarType::Long);
  const Trial trial(asked_for(), shape.k);
  with_type(values, "ranking_plan", [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem = ranking<T>(shape, values, tau, seed, initial, 0);
    const Output<T> output{Readout::left, nullptr, 0, nullptr};
    std::vector<char> at_nodes(shape.batch, 0);
    if constexpr (sizeof(T) == 4)
      if (trial.nodes && !start) plan_nodes(problem, at_nodes);
    for (int64_t b = 0; b < shape.batch; ++b) {
      const BlockCount count = block_count(in_blocks(problem, output, b));
      const int64_t row[] = {at_nodes[b] ? 2 : trial.taken(count) ? 1 : 0, count.row_blocks, count.column_blocks,
                             count.pairs,        count.work,       count.dense_work};
      std::copy_n(row, 6, data<int64_t>(out) + 6 * b);
    }
  });
  return out;
}

Triple log_sinkhorn(const Tensor& logits, int64_t n_iters) {
  const RankingShape shape = check_logits(logits, n_iters);
  const Tensor values = torch::stable::contiguous(logits);
  auto [scalings, absorbed] = new_state(shape, values);
  Tensor out = torch::stable::new_empty(values, {shape.batch, shape.k, shape.k});
  with_type(values, "log_sinkhorn", [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem{shape, nullptr, data<T>(values), nullptr, T{1}, T{0}, 0};
    const Output<T> output{Readout::logarithm, nullptr, 0, nullptr};
    run_forward(problem, output, data<T>(scalings), data<int32_t>(absorbed), data<T>(out));
  });
  return {out, scalings, absorbed};
}

Tensor log_sinkhorn_backward(const Tensor& grad, const Tensor& logits, const Tensor& scalings, const Tensor& absorbed) {
  const RankingShape shape = check_logits(logits, iterations_of(absorbed));
  check_state(shape, scalings, absorbed, logits);
  check_grad(grad, logits, {shape.batch, shape.k, shape.k});
  const Tensor values = torch::stable::contiguous(logits), above = torch::stable::contiguous(grad);
  const Tensor state = torch::stable::contiguous(scalings), moved = torch::stable::contiguous(absorbed);
  Tensor grad_logits = torch::stable::new_empty(values, {shape.batch, shape.k, shape.k});
  with_type(values, "log_sinkhorn_backward", [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem{shape, nullptr, data<T>(values), nullptr, T{1}, T{0}, 0};
    const Output<T> output{Readout::logarithm, nullptr, 0, nullptr};
    run_backward(problem, output, data<T>(state), data<int32_t>(moved), data<T>(above),
                 {nullptr, nullptr, nullptr, data<T>(grad_logits), nullptr});
  });
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aha, CPU, m) {
  m.impl("gumbel_sinkhorn", TORCH_BOX(&gumbel_sinkhorn));
  m.impl("gumbel_sinkhorn_backward", TORCH_BOX(&gumbel_sinkhorn_backward));
  m.impl("ranking_plan", TORCH_BOX(&ranking_plan));
  m.impl("log_sinkhorn", TORCH_BOX(&log_sinkhorn));
  m.impl("log_sinkhorn_backward", TORCH_BOX(&log_sinkhorn_backward));
}

}  // namespace aha
