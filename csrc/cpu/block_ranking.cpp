// Sinkhorn ranking without noise in O(K) per iteration: the same iterations, saved scalings and exact unrolled gradient
// as in sinkhorn.cpp, on products with X in blocks (blocks.h, block_matrix.h).
//   forward    per iteration two sweeps: rows evaluate X v, take u = 1 / (X v) and add up its moments; columns alike
//   backward   per iteration two sweeps again: rows X y and the moments of z and u; columns X'z and, of both,
//              Σ_i (q_i - mean_j) X_ij: the gradient of the scores, centred at the mean rank of the column under P, so
//              that what cancels in it is never added up
#include "block_ranking.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "block_matrix.h"

namespace aha {

template <typename T>
LeftRows<T>::LeftRows(const T* values, int64_t rows, int64_t size)
    : left(values), steps(rows), k(size), rest(size, T{1}), begin(rows + 1, size), end(rows + 1, 0), heaviest(size) {
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t i = 0; i < k; ++i) rest[i] -= left[s * k + i];
  for (T& value : rest)
    if (std::abs(value) <= 4 * std::numeric_limits<T>::epsilon()) value = 0;
  std::vector<T> most(k, T{0});
  for (int64_t s = 0; s <= steps; ++s)
    for (int64_t i = 0; i < k; ++i) {
      const T weight = row(s)[i];
      if (weight == T{0}) continue;
      begin[s] = std::min(begin[s], i), end[s] = i + 1;
      if (std::abs(weight) > most[i]) most[i] = std::abs(weight), heaviest[i] = static_cast<int32_t>(s);
    }
}
template struct LeftRows<float>;
template struct LeftRows<double>;

namespace {

// The outputs that rows of a block belong to, and where in its tiles; their moments.
template <typename T>
class Steps {
 public:
  struct Slot {  // weights begin ... end of one output within a tile, whole vectors
    int64_t tile, begin, end;
  };
  struct Step {
    int64_t s, slot, slots;  // its slots, one after the other
  };

  Steps(const LeftRows<T>& left, const BlockMatrix<T>& X) : left_(left), X_(X), outputs_(left.steps + 1) {
    const Axis<T>& rows = X.axis[ROWS];
    constexpr int64_t N = Lanes<T>::N;
    number_.assign(rows.blocks.size() * outputs_, -1);
    for (size_t b = 0; b < rows.blocks.size(); ++b) {
      const Block& block = rows.blocks[b];
      first_.push_back(static_cast<int64_t>(steps_.size()));
      first_slot_.push_back(static_cast<int64_t>(slots_.size()));
      for (int64_t s = 0; s < outputs_; ++s) {
        const int64_t from = std::max(left.begin[s], block.first), to = std::min(left.end[s], block.first + block.count);
        if (from >= to) continue;
        number_[b * outputs_ + s] = static_cast<int64_t>(steps_.size()) - first_.back();
        Step step{s, static_cast<int64_t>(slots_.size()), 0};
        const int64_t begin = block.begin + (from - block.first) / N * N, end = block.begin + (to - block.first + N - 1) / N * N;
        for (int64_t t = block.tile; t < block.tile + block.tiles; ++t) {
          const Slot slot{t, std::max(begin, rows.tiles[t].begin), std::min(end, rows.tiles[t].end)};
          if (slot.begin < slot.end) slots_.push_back(slot), ++step.slots;
        }
        steps_.push_back(step);
      }
    }
    first_.push_back(static_cast<int64_t>(steps_.size()));
    first_slot_.push_back(static_cast<int64_t>(slots_.size()));
    int64_t rows_room = 0, columns_room = 0;
    for (const auto& pair : X.pairs) {
      const int64_t b = pair.block[ROWS];
      from_rows_.push_back(rows_room), from_columns_.push_back(columns_room);
      rows_room += (first_slot_[b + 1] - first_slot_[b]) * ROOM<T>;
      columns_room += count(b) * X.axis[COLUMNS].blocks[pair.block[COLUMNS]].tiles * ROOM<T>;
    }
    // of every sum one power more is read than it may have
    rows_ = zeros<T>(rows_room + ROOM<T>), columns_ = zeros<T>(columns_room + ROOM<T>);
  }

  int64_t outputs() const { return outputs_; }

  // The moments of u W_s of all outputs, at a tile of rows; one power more for the products with q.
  void add_up(const Tile& tile, const T* u, TileRoom<T>& room) const {
    const int64_t pairs = X_.gather(ROWS, tile, room), number = &tile - X_.axis[ROWS].tiles.data();
    const Block& block = X_.axis[ROWS].blocks[tile.block];
    std::vector<const T*> factors(pairs);
    const T* powers = X_.powers(ROWS, tile, room);
    for (int64_t n = first_[tile.block]; n < first_[tile.block + 1]; ++n)
      for (int64_t m = steps_[n].slot; m < steps_[n].slot + steps_[n].slots; ++m) {
        const Slot& slot = slots_[m];
        if (slot.tile != number) continue;
        const T* weights = weigh(steps_[n].s, slot, block, u + slot.begin, room.value[0]);
        for (int64_t p = 0; p < pairs; ++p) {
          factors[p] = room.factors[p] + slot.begin - tile.begin;
          room.sums[p] = rows_ + from_rows_[pair_number(ROWS, tile.block, p)] + (m - first_slot_[tile.block]) * ROOM<T>;
        }
        more_moments(slot.end - slot.begin, pairs, factors.data(), &weights, 1,
                     powers + slot.begin - tile.begin, tile.size(), room.sums.data());
      }
  }

  // Output s at a tile of columns: out[0] += X'(u W_s), and if sets = 2 out[1] += Σ_i (q_i - q_J) X_ij u_i W_si.
  void evaluate(int64_t s, const Tile& tile, int sets, double q_J, TileRoom<T>& room, T* const* out) const {
    int64_t used = 0;
    const int64_t pairs = X_.pairs_of(COLUMNS, tile.block);
    room.expect(pairs);
    for (int64_t p = 0; p < pairs; ++p) {
      const auto& pair = X_.pair(COLUMNS, tile.block, p);
      const int64_t b = pair.block[ROWS], n = number_[b * outputs_ + s];
      if (n < 0) continue;
      const Step& step = steps_[first_[b] + n];
      const T* from = rows_ + from_rows_[pair_number(COLUMNS, tile.block, p)] + (step.slot - first_slot_[b]) * ROOM<T>;
      Term<T>* terms = room.terms.data() + used * sets;
      terms[0] = {from, step.slots, ROOM<T>};
      if (sets == 2) terms[1] = X_.ranked(terms[0], b, q_J);
      room.factors[used++] = X_.factor(COLUMNS, tile, p);
    }
    combine(used * sets, room.terms.data(), room.coefficients.get());
    aha::evaluate(tile.size(), used, room.factors.data(), room.coefficients.get(), X_.numbers(COLUMNS, tile), sets, out);
  }

  // The moments of one output's column weights, at a tile of columns.
  void add_up_columns(int64_t s, const Tile& tile, const T* weights, TileRoom<T>& room) const {
    const Axis<T>& columns = X_.axis[COLUMNS];
    const int64_t pairs = X_.pairs_of(COLUMNS, tile.block), number = &tile - columns.tiles.data();
    int64_t used = 0;
    room.expect(pairs);
    for (int64_t p = 0; p < pairs; ++p) {
      const auto& pair = X_.pair(COLUMNS, tile.block, p);
      const int64_t b = pair.block[ROWS], n = number_[b * outputs_ + s];
      if (n < 0) continue;
      room.factors[used] = X_.factor(COLUMNS, tile, p);
      room.sums[used++] = column_sums(pair, pair_number(COLUMNS, tile.block, p), n) + (number - columns.blocks[tile.block].tile) * ROOM<T>;
    }
    moments(tile.size(), used, room.factors.data(), weights, X_.powers(COLUMNS, tile, room), tile.size(), room.sums.data());
  }

  // out_i = Σ_s W_si (X w_s)_i at a tile of rows, from those moments
  void evaluate_rows(const Tile& tile, TileRoom<T>& room, T* out) const {
    const int64_t pairs = X_.gather(ROWS, tile, room), number = &tile - X_.axis[ROWS].tiles.data();
    const Block& block = X_.axis[ROWS].blocks[tile.block];
    std::vector<const T*> factors(pairs);
    std::fill_n(out, tile.size(), T{0});
    for (int64_t n = first_[tile.block]; n < first_[tile.block + 1]; ++n)
      for (int64_t m = steps_[n].slot; m < steps_[n].slot + steps_[n].slots; ++m) {
        const Slot& slot = slots_[m];
        if (slot.tile != number) continue;
        for (int64_t p = 0; p < pairs; ++p) {
          const auto& pair = X_.pair(ROWS, tile.block, p);
          const T* from = column_sums(pair, pair_number(ROWS, tile.block, p), n - first_[tile.block]);
          factors[p] = room.factors[p] + slot.begin - tile.begin;
          room.terms[p] = {from, X_.axis[COLUMNS].blocks[pair.block[COLUMNS]].tiles, ROOM<T>};
        }
        combine(pairs, room.terms.data(), room.coefficients.get());
        T* sums = room.value[0];
        std::fill_n(sums, slot.end - slot.begin, T{0});
        aha::evaluate(slot.end - slot.begin, pairs, factors.data(), room.coefficients.get(), X_.numbers(ROWS, tile) + slot.begin - tile.begin, 1, &sums);
        const T* weights = left_.row(steps_[n].s) + block.first + slot.begin - block.begin;
        const int64_t real = std::min(slot.end, block.begin + block.count) - slot.begin;
        for (int64_t i = 0; i < real; ++i) out[slot.begin - tile.begin + i] += weights[i] * sums[i];
      }
  }

 private:
  int64_t count(int64_t block) const { return first_[block + 1] - first_[block]; }
  int64_t pair_number(int side, int64_t block, int64_t n) const { return X_.of_block[side][X_.first_of[side][block] + n]; }
  T* column_sums(const typename BlockMatrix<T>::Pair& pair, int64_t number, int64_t step) const {
    return columns_ + from_columns_[number] + step * X_.axis[COLUMNS].blocks[pair.block[COLUMNS]].tiles * ROOM<T>;
  }
  const T* weigh(int64_t s, const Slot& slot, const Block& block, const T* u, T* out) const {
    const T* weights = left_.row(s) + block.first + slot.begin - block.begin;
    const int64_t real = std::min(slot.end, block.begin + block.count) - slot.begin;
    for (int64_t i = 0; i < real; ++i) out[i] = u[i] * weights[i];
    std::fill(out + real, out + (slot.end - slot.begin), T{0});
    return out;
  }

  const LeftRows<T>& left_;
  const BlockMatrix<T>& X_;
  const int64_t outputs_;
  std::vector<Slot> slots_;
  std::vector<Step> steps_;
  std::vector<int64_t> first_, first_slot_, number_, from_rows_, from_columns_;
  Buffer<T> rows_, columns_;
};

template <typename T>
bool finite(const T* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!std::isfinite(values[i])) return false;
  return true;
}

template <typename T>
class Ranking {
 public:
  explicit Ranking(const BlockProblem<T>& problem)
      : problem_(problem), k_(problem.k), X_(problem.scores, k_, problem.tau, problem.shared_out), rows_(X_.axis[ROWS]),
        columns_(X_.axis[COLUMNS]), u_(rows_.size), v_(columns_.size), h_(k_) {
    // -c^2 / tau, less that of the smallest |c|, for potentials are saved in T
    double nearest = std::numeric_limits<double>::infinity();
    columns_.each([&](int64_t j, int64_t) { nearest = std::min(nearest, std::abs(columns_.place[j])); });
    columns_.each([&](int64_t j, int64_t sorted) {
      const double c = columns_.place[j];
      h_[sorted] = problem.start ? problem.start[X_.order[sorted]] : -(c - nearest) * (c + nearest) / problem.tau;
    });
  }

  BlockCount count() {
    X_.start(h_);
    X_.make();
    return counted();
  }
  BlockCount counted() const {
    return {static_cast<int64_t>(rows_.blocks.size()), static_cast<int64_t>(columns_.blocks.size()),
            static_cast<int64_t>(X_.pairs.size()), block_work(), dense_work()};
  }

  bool forward(bool may_refuse, T* scalings, int32_t* absorbed, T* out) {
    X_.start(h_);
    X_.make();
    if (may_refuse && !counted().fewer()) return false;
    const int64_t iterations = problem_.iterations;
    pack_potentials(scalings);
    std::fill_n(absorbed, iterations, IN_BLOCKS);
    first_scaling(v_);
    add_up(COLUMNS, v_);
    for (int64_t t = 1;; ++t) {
      solve(ROWS, u_);
      solve(COLUMNS, v_);
      rows_.pack(u_, scalings + 2 * t * k_);
      columns_.pack(v_, scalings + (2 * t + 1) * k_);
      if (t == iterations) break;
      if (!beyond(rows_.size, u_.get(), T(BLOCK_SCALING)) && !beyond(columns_.size, v_.get(), T(BLOCK_SCALING))) continue;
      absorbed[t - 1] |= ABSORBED;
      rows_.absorb(u_, 1), columns_.absorb(v_, 1);
      X_.make();
      std::fill_n(v_.get(), columns_.size, T{1});
      add_up(COLUMNS, v_);
    }
    if (problem_.right)
      read_right(out);
    else if (problem_.single())
      read_single(out);
    else
      read_steps(out);
    return true;
  }

  void backward(const T* scalings, const int32_t* absorbed, const T* grad, const BlockGradients<T>& gradients) {
    const int64_t iterations = problem_.iterations;
    rows_.each([&](int64_t i, int64_t sorted) { rows_.potential[i] = scalings[sorted]; });
    columns_.each([&](int64_t j, int64_t sorted) { columns_.potential[j] = scalings[k_ + sorted]; });
    Buffer<T> v(columns_.size), y(columns_.size), z(rows_.size), g(columns_.size), before(columns_.size);
    for (int64_t t = 1; t < iterations; ++t)
      if (absorbed[t - 1] & ABSORBED) absorb(scalings, t, v, 1);
    X_.make();
    load(scalings, iterations, v);
    mean_ = zeros<T>(columns_.size), ranked_ = zeros<double>(columns_.size);
    if (problem_.single())
      begin_single(grad, v, z, gradients.right);
    else
      begin_steps(grad, v, z);
    // The column sums of P are 1 exactly, whatever the rounding: the last column step passes no gradient on.
    std::fill_n(y.get(), columns_.size, T{0});
    for (int64_t t = iterations;; --t) {
      const bool restarts = t > 1 && (absorbed[t - 2] & ABSORBED);
      if (t == 1)
        first_scaling(before);
      else if (restarts)
        std::fill_n(before.get(), columns_.size, T{1});
      else
        columns_.unpack(scalings + (2 * t - 1) * k_, before, T{1});
      X_.sweep(ROWS, [&](const Tile& tile, TileRoom<T>& room) {
        T* here = z + tile.begin;
        const T* u = u_ + tile.begin;
        if (t == iterations) {
          X_.gather(ROWS, tile, room);
        } else {
          const T* sums = product(ROWS, tile, room);
          for (int64_t i = 0; i < tile.size(); ++i) here[i] = -u[i] * u[i] * sums[i];
        }
        const T* const weights[] = {here, u};
        X_.add_up_more(ROWS, tile, weights, 2, room);
      });
      X_.sweep(COLUMNS, [&](const Tile& tile, TileRoom<T>& room) {
        const double q_J = mean_rank(tile.block);
        const auto sums = X_.products(COLUMNS, tile, 3, room, [&](const Pair& p, Term<T>* terms) {
          const int64_t block = p.block[ROWS];
          terms[0] = X_.term(ROWS, p, 0);
          terms[1] = X_.ranked(terms[0], block, q_J), terms[2] = X_.ranked(X_.term(ROWS, p, 1), block, q_J);
        });
        const int64_t at = tile.begin;
        step_back(tile.size(), sums[2], sums[1], sums[0], mean_ + at, v + at, y + at, before + at, ranked_ + at, g + at);
        if (t == 1 || restarts) return;
        for (int64_t j = at; j < tile.end; ++j) y[j] = before[j] * g[j];
        X_.add_up(COLUMNS, tile, y + at, room);
      });
      if (t == 1) break;
      if (restarts) {
        absorb(scalings, t - 1, v, -1);
        X_.make();
      }
      load(scalings, t - 1, v);
      if (restarts) {
        for (int64_t j = 0; j < columns_.size; ++j) y[j] = v[j] * g[j];
        add_up(COLUMNS, y);
      }
    }
    finish(g, gradients);
  }

 private:
  using Pair = typename BlockMatrix<T>::Pair;

  // Vector operations of an iteration, as they take time on machines of today: sorting, potentials and readout count
  // as a share of 30 iterations; the dense matrix is read from a cache, where a multiply-add takes three times as long.
  int64_t block_work() const { return X_.work() + 12 * k_ + 350; }
  int64_t dense_work() const { return 6 * k_ * ((k_ + Lanes<T>::N - 1) / Lanes<T>::N); }

  // Whether masks of all outputs are more than a cache holds: then they change order one by one.
  bool far() const { return k_ > Axis<T>::CACHED; }

  void pack_potentials(T* scalings) const {
    rows_.each([&](int64_t i, int64_t sorted) { scalings[sorted] = static_cast<T>(rows_.potential[i]); });
    columns_.each([&](int64_t j, int64_t sorted) { scalings[k_ + sorted] = static_cast<T>(columns_.potential[j]); });
  }
  // the scaling of the columns before the first iteration, from the potentials of that
  void first_scaling(T* v) const {
    std::fill_n(v, columns_.size, T{0});
    columns_.each([&](int64_t j, int64_t sorted) { v[j] = static_cast<T>(std::exp(h_[sorted] - columns_.potential[j])); });
  }
  void load(const T* scalings, int64_t t, T* v) {
    rows_.unpack(scalings + 2 * t * k_, u_, T{1});
    columns_.unpack(scalings + (2 * t + 1) * k_, v, T{1});
  }
  void absorb(const T* scalings, int64_t t, T* v, double sign) {
    load(scalings, t, v);
    rows_.absorb(u_, sign), columns_.absorb(v, sign);
  }

  void add_up(int side, const T* weights) const {
    X_.sweep(side, [&](const Tile& tile, TileRoom<T>& room) {
      X_.gather(side, tile, room);
      X_.add_up(side, tile, weights + tile.begin, room);
    });
  }
  // the product of a tile's rows or columns with what the other side's moments are of
  const T* product(int side, const Tile& tile, TileRoom<T>& room) const {
    return X_.products(side, tile, 1, room, [&](const Pair& p, Term<T>* terms) { terms[0] = X_.term(1 - side, p); })[0];
  }
  // scaling = 1 / (product with the other side's), and its moments
  void solve(int side, T* scaling) const {
    X_.sweep(side, [&](const Tile& tile, TileRoom<T>& room) {
      T* here = scaling + tile.begin;
      std::copy_n(X_.axis[side].pad + tile.begin, tile.size(), here);
      X_.add_products(side, tile, 1, room, &here, [&](const Pair& p, Term<T>* terms) { terms[0] = X_.term(1 - side, p); });
      invert(tile.size(), here);
      X_.add_up(side, tile, here, room);
    });
  }

  // the mean of q over the ranks that a block of columns has when sorted
  double mean_rank(int64_t block) const {
    const Block& columns = columns_.blocks[block];
    const double middle = static_cast<double>(columns.first) + 0.5 * static_cast<double>(columns.count - 1);
    return k_ == 1 ? 0.5 : 0.5 - middle / static_cast<double>(k_ - 1);
  }
  // the mean of the vector that reads out over the elements of a block, rows or columns as they are sorted
  double mean_weight(const Block& block) const {
    return (before_[block.first + block.count] - before_[block.first]) / static_cast<double>(block.count);
  }
  // alpha (K,), by rank, as the weights of rows: centred by block
  void centre(const T* alpha, Buffer<T>& padded) {
    before_.assign(k_ + 1, 0);
    for (int64_t i = 0; i < k_; ++i) before_[i + 1] = before_[i] + static_cast<double>(alpha[i]);
    padded = zeros<T>(rows_.size);
    for (const Block& block : rows_.blocks)
      for (int64_t i = 0; i < block.count; ++i)
        padded[block.begin + i] = static_cast<T>(alpha[block.first + i] - mean_weight(block));
  }
  // The moments of u and of u alpha, with one power more.
  void add_up_weighted(const T* alpha) const {
    X_.sweep(ROWS, [&](const Tile& tile, TileRoom<T>& room) {
      X_.gather(ROWS, tile, room);
      T* weighted = room.value[0];
      for (int64_t i = 0; i < tile.size(); ++i) weighted[i] = u_[tile.begin + i] * alpha[tile.begin + i];
      const T* const weights[] = {u_ + tile.begin, weighted};
      X_.add_up_more(ROWS, tile, weights, 2, room);
    });
  }

  // out_j = Σ_i alpha_i P_ij. Columns of P sum to 1, so alpha may be taken relative to any number.
  void read_single(T* out) {
    Buffer<T> alpha;
    centre(problem_.left->row(0), alpha);
    add_up_weighted(alpha);
    X_.each_tile(COLUMNS, [&](const Tile& tile, TileRoom<T>& room) {
      const double alpha_J = mean_weight(columns_.blocks[tile.block]);
      const T* sums = X_.products(COLUMNS, tile, 1, room, [&](const Pair& p, Term<T>* terms) {
        terms[0] = X_.term(ROWS, p, 1, mean_weight(rows_.blocks[p.block[ROWS]]) - alpha_J);
      })[0];
      columns_.each(tile, [&](int64_t j, int64_t sorted) {
        out[X_.order[sorted]] = static_cast<T>(alpha_J + v_[j] * sums[j - tile.begin]);
      });
    });
  }

  // out_i = Σ_j P_ij right_j
  void read_right(T* out) {
    const Buffer<T> weights = zeros<T>(columns_.size);
    columns_.each([&](int64_t j, int64_t sorted) { weights[j] = v_[j] * problem_.right[X_.order[sorted]]; });
    add_up(COLUMNS, weights);
    X_.each_tile(ROWS, [&](const Tile& tile, TileRoom<T>& room) {
      const T* sums = product(ROWS, tile, room);
      rows_.each(tile, [&](int64_t i, int64_t sorted) { out[sorted] = u_[i] * sums[i - tile.begin]; });
    });
  }

  // out_sj = Σ_i W_si P_ij
  void read_steps(T* out) {
    const Steps<T> steps(*problem_.left, X_);
    X_.each_tile(ROWS, [&](const Tile& tile, TileRoom<T>& room) { steps.add_up(tile, u_, room); });
    X_.each_tile(COLUMNS, [&](const Tile& tile, TileRoom<T>& room) {
      for (int64_t s = 0; s < problem_.left->steps; ++s) {
        T* sums = room.value[0];
        std::fill_n(sums, tile.size(), T{0});
        steps.evaluate(s, tile, 1, 0, room, &sums);
        columns_.each(tile, [&](int64_t j, int64_t sorted) {
          out[s * k_ + (far() ? sorted : X_.order[sorted])] = v_[j] * sums[j - tile.begin];
        });
      }
    });
    if (!far()) return;
    for_each(problem_.left->steps, [&](int64_t s) {
      T* row = out + s * k_;
      const Buffer<T> sorted(k_);
      std::copy_n(row, k_, sorted.get());
      for (int64_t j = 0; j < k_; ++j) row[X_.order[j]] = sorted[j];
    });
  }

  // dP_ij = alpha_i beta_j: what the readout leaves to the last iteration, z = u (row sums of P (dP - its column mean)),
  // and to the scores directly.
  void begin_single(const T* grad, const T* v, T* z, T* grad_right) {
    Buffer<T> alpha;
    const Buffer<T> weights = zeros<T>(columns_.size), moved = zeros<T>(columns_.size);
    centre(problem_.right ? grad : problem_.left->row(0), alpha);
    add_up_weighted(alpha);
    const T* beta = problem_.right ? problem_.right : grad;
    X_.sweep(COLUMNS, [&](const Tile& tile, TileRoom<T>& room) {
      const double q_J = mean_rank(tile.block), alpha_J = mean_weight(columns_.blocks[tile.block]);
      const auto sums = X_.products(COLUMNS, tile, 3, room, [&](const Pair& p, Term<T>* terms) {
        const int64_t block = p.block[ROWS];
        terms[0] = X_.ranked(X_.term(ROWS, p, 0), block, q_J);
        terms[1] = X_.term(ROWS, p, 1, mean_weight(rows_.blocks[block]) - alpha_J);
        terms[2] = X_.ranked(terms[1], block, q_J);
      });
      columns_.each(tile, [&](int64_t j, int64_t sorted) {
        const int64_t n = j - tile.begin, column = X_.order[sorted];
        const T rank = v[j] * sums[0][n], mean = v[j] * sums[1][n];
        mean_[j] = rank;
        ranked_[j] = static_cast<double>(beta[column] * (v[j] * sums[2][n] - rank * mean));
        weights[j] = v[j] * beta[column], moved[j] = weights[j] * mean;
        if (grad_right) grad_right[column] = static_cast<T>(alpha_J + mean);
      });
      X_.add_up(COLUMNS, tile, weights + tile.begin, room, 0);
      X_.add_up(COLUMNS, tile, moved + tile.begin, room, 1);
    });
    X_.each_tile(ROWS, [&](const Tile& tile, TileRoom<T>& room) {
      const double alpha_I = mean_weight(rows_.blocks[tile.block]);
      const auto sums = X_.products(ROWS, tile, 2, room, [&](const Pair& p, Term<T>* terms) {
        terms[0] = X_.term(COLUMNS, p, 0);
        terms[1] = X_.term(COLUMNS, p, 1, mean_weight(columns_.blocks[p.block[COLUMNS]]) - alpha_I);
      });
      for (int64_t n = 0; n < tile.size(); ++n) {
        const T u = u_[tile.begin + n];
        z[tile.begin + n] = u * u * (alpha[tile.begin + n] * sums[0][n] - sums[1][n]);
      }
    });
  }

  // dP_ij = Σ_s W_si grad_sj. All gradients of a column are taken relative to its own mean.
  void begin_steps(const T* grad, const T* v, T* z) {
    const LeftRows<T>& left = *problem_.left;
    Steps<T> steps(left, X_);
    Buffer<T> above;  // grad in the order of the scores
    if (far()) {
      above = Buffer<T>(left.steps * k_);
      for_each(left.steps, [&](int64_t s) {
        for (int64_t j = 0; j < k_; ++j) above[s * k_ + j] = grad[s * k_ + X_.order[j]];
      });
    }
    X_.each_tile(ROWS, [&](const Tile& tile, TileRoom<T>& room) { steps.add_up(tile, u_, room); });
    X_.each_tile(COLUMNS, [&](const Tile& tile, TileRoom<T>& room) {
      const double q_J = mean_rank(tile.block);
      const int64_t n = tile.size(), outputs = steps.outputs();
      const auto of = [&](int64_t s, int64_t sorted) {
        return s == left.steps ? T{0} : far() ? above[s * k_ + sorted] : grad[s * k_ + X_.order[sorted]];
      };
      // relative to the gradient at the column's own rank while the mean is not known
      const Buffer<T> mean = zeros<T>(n), rank = zeros<T>(n), product = zeros<T>(n), values = zeros<T>(outputs * n);
      columns_.each(tile, [&](int64_t j, int64_t sorted) {
        const T own = of(left.heaviest[sorted], sorted);
        for (int64_t s = 0; s < outputs; ++s) values[s * n + j - tile.begin] = of(s, sorted) - own;
      });
      T* const sums[] = {room.value[0], room.value[1]};
      for (int64_t s = 0; s < outputs; ++s) {
        for (T* some : sums) std::fill_n(some, n, T{0});
        steps.evaluate(s, tile, 2, q_J, room, sums);
        const T* value = values + s * n;
        for (int64_t at = 0; at < n; ++at) {
          mean[at] += value[at] * sums[0][at], product[at] += value[at] * sums[1][at];
          rank[at] += sums[1][at];
        }
      }
      for (int64_t at = 0; at < n; ++at) {
        const T own = v[tile.begin + at];
        mean[at] *= own, mean_[tile.begin + at] = own * rank[at];
        ranked_[tile.begin + at] = static_cast<double>(own * product[at] - mean_[tile.begin + at] * mean[at]);
      }
      T* weights = room.value[0];
      for (int64_t s = 0; s < outputs; ++s) {
        for (int64_t at = 0; at < n; ++at) weights[at] = v[tile.begin + at] * (values[s * n + at] - mean[at]);
        steps.add_up_columns(s, tile, weights, room);
      }
    });
    X_.each_tile(ROWS, [&](const Tile& tile, TileRoom<T>& room) {
      T* sums = z + tile.begin;
      steps.evaluate_rows(tile, room, sums);
      for (int64_t i = 0; i < tile.size(); ++i) sums[i] *= u_[tile.begin + i] * u_[tile.begin + i];
    });
  }

  // The logits depend on a_j as 2 (q_i - c_j) / tau; g is the gradient of the first column potential.
  void finish(const T* g, const BlockGradients<T>& gradients) const {
    double of_tau = 0;
    const double middle = columns_.place[columns_.blocks[0].begin];
    const auto column_of = [&](const Block& block, double q_J, int64_t n) {
      const int64_t j = block.begin + n;
      const double rank = q_J + static_cast<double>(mean_[j]);
      const double moment = ranked_[j] + rank * g[j], c = columns_.place[j];
      const int64_t column = X_.order[block.first + n];
      const double square = problem_.start ? 0 : c * g[j];
      if (gradients.scores) gradients.scores[column] = static_cast<T>(2 * (moment - square) / problem_.tau);
      if (gradients.start) gradients.start[column] = g[j];
      // rows and columns of the logits' gradient sum to 0 over j: scores may be relative to any of them
      const double relative = c - middle;
      of_tau += 2 * relative * moment;
      if (!problem_.start) of_tau -= relative * (relative + 2 * middle) * g[j];
    };
    for (size_t b = 0; b < columns_.blocks.size(); ++b) {
      const double q_J = mean_rank(static_cast<int64_t>(b));
      for (int64_t n = 0; n < columns_.blocks[b].count; ++n) column_of(columns_.blocks[b], q_J, n);
    }
    if (gradients.tau) *gradients.tau = static_cast<T>(-of_tau / (problem_.tau * problem_.tau));
  }

  const BlockProblem<T>& problem_;
  const int64_t k_;
  BlockMatrix<T> X_;
  Axis<T>&rows_, &columns_;
  Buffer<T> u_, v_, mean_;
  Buffer<double> ranked_;
  std::vector<double> h_, before_;
};

template <typename T>
bool usable(const BlockProblem<T>& problem) {
  return problem.tau > 0 && std::isfinite(problem.tau) && finite(problem.scores, problem.k) &&
         (!problem.start || finite(problem.start, problem.k));
}

}  // namespace

template <typename T>
bool block_forward(const BlockProblem<T>& problem, bool may_refuse, T* scalings, int32_t* absorbed, T* out) {
  if (usable(problem)) return Ranking<T>(problem).forward(may_refuse, scalings, absorbed, out);
  const T nan = std::numeric_limits<T>::quiet_NaN();
  std::fill_n(scalings, 2 * (problem.iterations + 1) * problem.k, nan);
  std::fill_n(absorbed, problem.iterations, IN_BLOCKS);
  std::fill_n(out, problem.right ? problem.k : problem.left->steps * problem.k, nan);
  return true;
}

// In double, forward and backward: the gradient of tau is a small difference of sums whose terms go with 1 / tau.
void in_double(const BlockProblem<float>& problem, const float* grad, const BlockGradients<float>& gradients) {
  const auto widened = [](const float* values, int64_t n) {
    return values ? std::vector<double>(values, values + n) : std::vector<double>();
  };
  const int64_t k = problem.k, steps = problem.right ? 1 : problem.left->steps;
  const std::vector<double> scores = widened(problem.scores, k), start = widened(problem.start, k),
                            right = widened(problem.right, k), above = widened(grad, steps * k),
                            weights = widened(problem.right ? nullptr : problem.left->left, steps * k);
  const LeftRows<double> left(weights.data(), problem.right ? 0 : steps, k);
  const BlockProblem<double> wide{scores.data(), problem.start ? start.data() : nullptr, problem.tau, k,
                                  problem.iterations, &left, problem.right ? right.data() : nullptr, problem.shared_out};
  std::vector<double> scalings(2 * (problem.iterations + 1) * k), out(steps * k), found(3 * k);
  std::vector<int32_t> absorbed(problem.iterations);
  double tau;
  block_forward(wide, false, scalings.data(), absorbed.data(), out.data());
  block_backward(wide, scalings.data(), absorbed.data(), above.data(),
                 {found.data(), &tau, gradients.right ? found.data() + k : nullptr, gradients.start ? found.data() + 2 * k : nullptr});
  float* const narrow[] = {gradients.scores, gradients.right, gradients.start};
  for (int64_t n = 0; n < 3; ++n)
    for (int64_t j = 0; narrow[n] && j < k; ++j) narrow[n][j] = static_cast<float>(found[n * k + j]);
  *gradients.tau = static_cast<float>(tau);
}

template <typename T>
void block_backward(const BlockProblem<T>& problem, const T* scalings, const int32_t* absorbed, const T* grad,
                    const BlockGradients<T>& gradients) {
  if (!usable(problem)) {
    for (T* of : {gradients.scores, gradients.right, gradients.start})
      if (of) std::fill_n(of, problem.k, std::numeric_limits<T>::quiet_NaN());
    if (gradients.tau) *gradients.tau = std::numeric_limits<T>::quiet_NaN();
    return;
  }
  if constexpr (sizeof(T) == 4)
    if (gradients.tau) return in_double(problem, grad, gradients);
  Ranking<T>(problem).backward(scalings, absorbed, grad, gradients);
}

template <typename T>
BlockCount block_count(const BlockProblem<T>& problem) {
  return usable(problem) ? Ranking<T>(problem).count() : BlockCount{};
}

#define AHA_BLOCK_RANKING(T)                                                                        \
  template BlockCount block_count(const BlockProblem<T>&);                                          \
  template bool block_forward(const BlockProblem<T>&, bool, T*, int32_t*, T*);                      \
  template void block_backward(const BlockProblem<T>&, const T*, const int32_t*, const T*, const BlockGradients<T>&);
AHA_BLOCK_RANKING(float)
AHA_BLOCK_RANKING(double)
#undef AHA_BLOCK_RANKING

}  // namespace aha
