// X of one image as factors of pairs of blocks (blocks.h), and products with it.
#pragma once

#include <array>
#include <cmath>
#include <vector>

#include "block_axis.h"
#include "order.h"

namespace aha {

constexpr int ROWS = 0, COLUMNS = 1;

// Work memory of one thread for one tile.
template <typename T>
struct TileRoom {
  std::vector<const T*> factors;
  std::vector<T*> sums;
  std::vector<Term<T>> terms;
  Buffer<T> coefficients;
  Buffer<T> value[4];
  Buffer<T> powers = Buffer<T>(TERMS<T> * Axis<T>::TILE);
  TileRoom() {
    for (Buffer<T>& buffer : value) buffer = Buffer<T>(Axis<T>::TILE);
  }
  void expect(int64_t pairs) {
    if (pairs <= expected_) return;
    expected_ = pairs;
    factors.resize(pairs), sums.resize(pairs), terms.resize(3 * pairs);
    coefficients = Buffer<T>(3 * pairs * ROOM<T>);
  }

 private:
  int64_t expected_ = 0;
};

template <typename T>
class BlockMatrix {
 public:
  // A pair of blocks that is not dropped. Of each side: where its moments begin: [tile][2][ROOM].
  struct Pair {
    int64_t block[2];
    double shift[2];  // of the exponents of its factors
    int64_t moment[2];
  };

  const int64_t k;
  const double tau;
  std::vector<int32_t> order;  // the column of every sorted position
  const double scale;          // of the numbers of the rows: q_i = q_I + scale y_i
  Axis<T> axis[2];
  std::vector<Pair> pairs;            // by row block, then column block
  std::vector<int64_t> of_block[2];   // pairs of every block, one after the other
  std::vector<int64_t> first_of[2];   // where those of a block begin, and the end

  BlockMatrix(const T* scores, int64_t size, double temperature, bool shared_out)
      : BlockMatrix(scores, descending(scores, size), size, temperature, shared_out) {}

  // f(tile, room) for all tiles of a side, shared out among threads if that pays
  template <typename F>
  void each_tile(int side, const F& f) const {
    const std::vector<Tile>& tiles = axis[side].tiles;
    const auto count = static_cast<int64_t>(tiles.size());
    const auto some = [&](int64_t begin, int64_t end, TileRoom<T>& room) {
      for (int64_t n = begin; n < end; ++n) f(tiles[n], room);
    };
    if (!shared_out_ || work() <= SHARED) return some(0, count, room_);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals guard;
      TileRoom<T> room;
      some(begin, end, room);
    });
  }

  // The same where f leaves moments: they are added up over the tiles of each block, into those of its first.
  template <typename F>
  void sweep(int side, const F& f) const {
    each_tile(side, f);
    for (const Pair& pair : pairs) {
      T* sum = moments_ + pair.moment[side];
      for (int64_t tile = 1; tile < axis[side].blocks[pair.block[side]].tiles; ++tile)
        for (int64_t m = 0; m < 2 * ROOM<T>; ++m) sum[m] += sum[tile * 2 * ROOM<T> + m];
    }
  }

  // Potentials of the first iteration from the column potential h: the largest logit of every row, then of every
  // column, is 0. Rounded to T, as they are saved.
  void start(const std::vector<double>& h);

  // The factors from the potentials.
  void make();

  int64_t pairs_of(int side, int64_t block) const { return first_of[side][block + 1] - first_of[side][block]; }
  const Pair& pair(int side, int64_t block, int64_t n) const { return pairs[of_block[side][first_of[side][block] + n]]; }
  // Of the n-th pair of a tile's block, at the tile. Those of a tile lie one after the other, as they are read.
  T* factor(int side, const Tile& tile, int64_t n) const {
    return factors_ + factor_of_[side][tile.block] +
           (tile.begin - axis[side].blocks[tile.block].begin) * pairs_of(side, tile.block) + n * tile.size();
  }
  T* moment(int side, const Pair& pair, int64_t tile, int set) const {
    return moments_ + pair.moment[side] + ((tile - axis[side].blocks[pair.block[side]].tile) * 2 + set) * ROOM<T>;
  }
  // room.factors of all pairs of the tile's block, at the tile
  int64_t gather(int side, const Tile& tile, TileRoom<T>& room) const {
    const int64_t count = pairs_of(side, tile.block);
    room.expect(count);
    for (int64_t n = 0; n < count; ++n) room.factors[n] = factor(side, tile, n);
    return count;
  }
  // The moments of a pair on one side, as they are, or with those of set 0 times a weight.
  Term<T> term(int side, const Pair& pair, int set = 0) const {
    return {moments_ + pair.moment[side] + set * ROOM<T>, 1, 0};
  }
  Term<T> term(int side, const Pair& pair, int set, double weight) const {
    Term<T> term = this->term(side, pair, set);
    term.others = this->term(side, pair).sums, term.weight = static_cast<T>(weight);
    return term;
  }
  // Those of a block of rows, every row weighed by q_i - q.
  Term<T> ranked(Term<T> term, int64_t block, double q) const {
    term.offset = static_cast<T>(axis[ROWS].blocks[block].centre - q), term.scale = static_cast<T>(scale);
    return term;
  }

  // The polynomials of a tile of one side, summed over its pairs and added to out: f(pair, its terms, one for each set)
  template <typename F>
  void add_products(int side, const Tile& tile, int sets, TileRoom<T>& room, T* const* out, const F& f) const {
    const int64_t count = gather(side, tile, room);
    for (int64_t n = 0; n < count; ++n) f(pair(side, tile.block, n), room.terms.data() + n * sets);
    combine(count * sets, room.terms.data(), room.coefficients.get());
    evaluate(tile.size(), count, room.factors.data(), room.coefficients.get(), numbers(side, tile), sets, out);
  }
  // The same from 0, in the first buffers of the room.
  template <typename F>
  std::array<T*, 3> products(int side, const Tile& tile, int sets, TileRoom<T>& room, const F& f) const {
    const std::array<T*, 3> out = {room.value[0], room.value[1], room.value[2]};
    for (int set = 0; set < sets; ++set) std::fill_n(out[set], tile.size(), T{0});
    add_products(side, tile, sets, room, out.data(), f);
    return out;
  }
  // moments of the weights at this tile, for all its pairs, in `set`
  void add_up(int side, const Tile& tile, const T* weights, TileRoom<T>& room, int set = 0) const {
    const int64_t count = pairs_of(side, tile.block), number = &tile - axis[side].tiles.data();
    for (int64_t n = 0; n < count; ++n) room.sums[n] = moment(side, pair(side, tile.block, n), number, set);
    moments(tile.size(), count, room.factors.data(), weights, powers(side, tile, room), tile.size(), room.sums.data());
  }
  // The same with one power more, for the products with q; sets: one or two weights.
  void add_up_more(int side, const Tile& tile, const T* const* weights, int sets, TileRoom<T>& room) const {
    const int64_t count = pairs_of(side, tile.block), number = &tile - axis[side].tiles.data();
    for (int64_t n = 0; n < count; ++n) room.sums[n] = moment(side, pair(side, tile.block, n), number, 0);
    more_moments(tile.size(), count, room.factors.data(), weights, sets, powers(side, tile, room), tile.size(),
                 room.sums.data());
  }
  const T* numbers(int side, const Tile& tile) const { return axis[side].powers + axis[side].kept * tile.begin; }
  // [TERMS][size of the tile]
  const T* powers(int side, const Tile& tile, TileRoom<T>& room) const {
    if (axis[side].kept > 1) return numbers(side, tile);
    std::copy_n(numbers(side, tile), tile.size(), room.powers.get());
    Axis<T>::raise(tile.size(), room.powers);
    return room.powers;
  }

  // multiply-adds of one product and what surrounds it, in vectors: a guide to the faster plan
  int64_t work() const { return work_; }

 private:
  // Vector operations per sweep from which threads pay, also where others are at work and a thread may wait for its core.
  static constexpr int64_t SHARED = 200'000;
  static constexpr int64_t GROUP = 8;      // blocks that are tested, and dropped, together
  static constexpr int64_t PER_PAIR = 60;  // vector operations to begin and end a tile of a pair

  struct Cuts {
    std::vector<int64_t> rows, columns;
    double scale;
  };
  BlockMatrix(const T* scores, std::vector<int32_t>&& sorted, int64_t size, double temperature, bool shared_out)
      : BlockMatrix(scores, cut(scores, sorted, size, temperature), std::move(sorted), size, temperature, shared_out) {}
  BlockMatrix(const T* scores, const Cuts& cuts, std::vector<int32_t>&& sorted, int64_t size, double temperature, bool shared_out)
      : k(size), tau(temperature), order(std::move(sorted)), scale(cuts.scale),
        axis{Axis<T>(cuts.rows, [&](int64_t i) { return rank(i, size); }, 1 / cuts.scale),
             Axis<T>(cuts.columns, [&](int64_t j) { return scores[order[j]] - 0.5; },
                     2 * cuts.scale / temperature)},
        shared_out_(shared_out) {}

  static double rank(int64_t i, int64_t k) {
    return k == 1 ? 0.5 : 0.5 - static_cast<double>(i) / static_cast<double>(k - 1);
  }

  // Rows in blocks of equal size, columns in the widest that the rows' width allows. Both axes are crossed by the same
  // number of blocks if their widths are as the spread of the scores, between quantiles, to that of the ranks.
  static Cuts cut(const T* scores, const std::vector<int32_t>& order, int64_t k, double tau) {
    const auto c = [&](int64_t j) { return scores[order[j]] - 0.5; };
    const double spread = (c(k / 10) - c(k - 1 - k / 10)) / 0.8;
    const double half = spread > 0 ? std::sqrt(BLOCK_REACH * tau / (2 * spread)) : 0.5;
    const int64_t most = std::max<int64_t>(1, k / Lanes<T>::N);
    // at least 1, also where half is enormous or NaN
    const auto count =
        static_cast<int64_t>(std::max(1.0, std::min(std::ceil(0.5 / half - 1e-9), static_cast<double>(most))));
    Cuts cuts;
    for (int64_t b = 0; b <= count; ++b) cuts.rows.push_back(k * b / count);
    const double longest = static_cast<double>((k + count - 1) / count - 1);
    cuts.scale = k == 1 || longest == 0 ? 0.5 : longest / static_cast<double>(k - 1) / 2;
    const double width = BLOCK_REACH * tau / cuts.scale * (1 - 1e-12);
    for (int64_t j = 0; j < k;) {
      cuts.columns.push_back(j);
      const double last = c(j) - width;
      const auto next = std::upper_bound(order.begin() + j, order.end(), last,
                                         [&](double value, int32_t column) { return scores[column] - 0.5 < value; });
      j = std::max(j + 1, static_cast<int64_t>(next - order.begin()));
    }
    cuts.columns.push_back(k);
    return cuts;
  }

  const bool shared_out_;
  mutable TileRoom<T> room_;  // of the thread that has the image to itself
  Buffer<T> factors_, moments_;
  std::vector<int64_t> factor_of_[2];  // where those of a block begin
  int64_t work_ = 0, factor_room_ = 0, moment_room_ = 0;
};

template <typename T>
void BlockMatrix<T>::start(const std::vector<double>& h) {
  Axis<T>&rows = axis[ROWS], &columns = axis[COLUMNS];
  std::vector<double> q(k), c(k), F(k);
  rows.each([&](int64_t i, int64_t sorted) { q[sorted] = rows.place[i]; });
  columns.each([&](int64_t j, int64_t sorted) { c[sorted] = columns.place[j]; });
  // logits of a row are lines in q with slopes in order: their upper hull, whose lines follow each other
  std::vector<int64_t> hull;
  for (int64_t j = 0; j < k; ++j) {
    if (!hull.empty() && c[hull.back()] == c[j]) {
      if (h[hull.back()] >= h[j]) continue;
      hull.pop_back();
    }
    // the last line is below the hull if the one before meets the new one first
    while (hull.size() > 1) {
      const int64_t a = hull[hull.size() - 2], b = hull.back();
      if ((h[j] - h[b]) * (c[a] - c[b]) < (h[b] - h[a]) * (c[b] - c[j])) break;
      hull.pop_back();
    }
    hull.push_back(j);
  }
  size_t line = 0;
  const auto logit = [&](int64_t i, int64_t j) { return 2 / tau * q[i] * c[j]; };
  for (int64_t i = 0; i < k; ++i) {
    while (line + 1 < hull.size() && logit(i, hull[line + 1]) + h[hull[line + 1]] >= logit(i, hull[line]) + h[hull[line]])
      ++line;
    F[i] = -(logit(i, hull[line]) + h[hull[line]]);
  }
  // so F is concave in q, and the row with the largest logit moves one way as the scores fall
  std::vector<double> G(k);
  for (int64_t j = 0, i = 0; j < k; ++j) {
    while (i + 1 < k && logit(i + 1, j) + F[i + 1] >= logit(i, j) + F[i]) ++i;
    G[j] = -(logit(i, j) + F[i]);
  }
  rows.each([&](int64_t i, int64_t sorted) { rows.potential[i] = static_cast<T>(F[sorted]); });
  columns.each([&](int64_t j, int64_t sorted) { columns.potential[j] = static_cast<T>(G[sorted]); });
}

template <typename T>
void BlockMatrix<T>::make() {
  const Axis<T>&rows = axis[ROWS], &columns = axis[COLUMNS];
  const double slope = 2 / tau, drop = BlockExp<T>::NEGLIGIBLE + std::log(static_cast<double>(k)) +
                                       2 * std::log(BLOCK_SCALING);
  struct Range {
    int64_t begin, end;
    double centre, half;
  };
  const auto range = [](const Axis<T>& side, int64_t from, int64_t to) {
    const Block &first = side.blocks[from], &last = side.blocks[to - 1];
    const double high = first.centre + first.half, low = last.centre - last.half;
    return Range{first.begin, last.end, (high + low) / 2, (high - low) / 2};
  };
  // An upper bound of all exponents, at most twice the last term too high: its maxima may be at different places.
  // shift: what the factors of both sides have in common
  const auto bound = [&](const Range& r, const Range& s, double* shift) {
    const double row = peak(r.end - r.begin, rows.potential + r.begin, rows.place + r.begin, slope * s.centre);
    const double column = peak(s.end - s.begin, columns.potential + s.begin, columns.place + s.begin, slope * r.centre);
    const double both = -slope * r.centre * s.centre;
    shift[ROWS] = -row, shift[COLUMNS] = row + both;
    return row + column + both + slope * r.half * s.half;
  };
  const auto row_blocks = static_cast<int64_t>(rows.blocks.size());
  const auto column_blocks = static_cast<int64_t>(columns.blocks.size());
  const auto kept = [&](int64_t from, int64_t to, std::vector<Pair>& out) {
    std::vector<char> near((column_blocks + GROUP - 1) / GROUP, 1);
    double shift[2];
    if (row_blocks * column_blocks > GROUP * GROUP)
      for (size_t g = 0; g < near.size(); ++g) {
        const int64_t first = static_cast<int64_t>(g) * GROUP;
        near[g] = bound(range(rows, from, to), range(columns, first, std::min(first + GROUP, column_blocks)), shift) >= -drop;
      }
    for (int64_t i = from; i < to; ++i)
      for (int64_t j = 0; j < column_blocks; ++j) {
        if (!near[j / GROUP]) {
          j += GROUP - 1;
          continue;
        }
        Pair pair{{i, j}, {}, {}};
        if (bound(range(rows, i, i + 1), range(columns, j, j + 1), pair.shift) >= -drop) out.push_back(pair);
      }
  };
  const int64_t groups = (row_blocks + GROUP - 1) / GROUP;
  std::vector<std::vector<Pair>> found(groups);
  const auto search = [&](int64_t g) { kept(g * GROUP, std::min((g + 1) * GROUP, row_blocks), found[g]); };
  if (shared_out_ && groups > 1)
    for_each(groups, search);
  else
    for (int64_t g = 0; g < groups; ++g) search(g);

  pairs.clear();
  for (const std::vector<Pair>& some : found) pairs.insert(pairs.end(), some.begin(), some.end());
  int64_t factor_room = 0, moment_room = 0;
  work_ = 0;
  for (Pair& pair : pairs)
    for (int side : {ROWS, COLUMNS}) {
      const Block& block = axis[side].blocks[pair.block[side]];
      pair.moment[side] = moment_room;
      factor_room += block.end - block.begin;
      moment_room += block.tiles * 2 * ROOM<T>;
      work_ += (block.end - block.begin) / Lanes<T>::N * 2 * (TERMS<T> + 1) + PER_PAIR * block.tiles;
    }
  if (factor_room > factor_room_) factors_ = Buffer<T>(factor_room_ = factor_room);
  // of every sum one power more is read than it may have
  if (moment_room > moment_room_) moments_ = zeros<T>((moment_room_ = moment_room) + ROOM<T>);
  for (int side : {ROWS, COLUMNS}) {
    std::vector<int64_t>& first = first_of[side];
    first.assign(axis[side].blocks.size() + 1, 0);
    for (const Pair& pair : pairs) ++first[pair.block[side] + 1];
    for (size_t b = 1; b < first.size(); ++b) first[b] += first[b - 1];
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    of_block[side].resize(pairs.size());
    for (size_t p = 0; p < pairs.size(); ++p) of_block[side][next[pairs[p].block[side]]++] = static_cast<int64_t>(p);
  }
  int64_t next_factor = 0;
  for (int side : {ROWS, COLUMNS}) {
    factor_of_[side].clear();
    for (size_t b = 0; b < axis[side].blocks.size(); ++b) {
      factor_of_[side].push_back(next_factor);
      next_factor += (axis[side].blocks[b].end - axis[side].blocks[b].begin) * pairs_of(side, static_cast<int64_t>(b));
    }
  }
  for (int side : {ROWS, COLUMNS})
    each_tile(side, [&](const Tile& tile, TileRoom<T>&) {
      const Axis<T>& here = axis[side];
      for (int64_t n = 0; n < pairs_of(side, tile.block); ++n) {
        const Pair& p = pair(side, tile.block, n);
        const double there = axis[1 - side].blocks[p.block[1 - side]].centre;
        exp_factor(tile.size(), here.potential + tile.begin, here.place + tile.begin, slope * there, p.shift[side],
                   factor(side, tile, n));
      }
    });
}

}  // namespace aha
