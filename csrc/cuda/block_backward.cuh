// The linear-time ranking on CUDA, the exact gradient of all iterations.
#pragma once

#include "cuda/block_sweeps.cuh"

namespace aha {

template <bool CLUSTER>
struct BlockBackward : BlockSweeps<CLUSTER> {
  using Base = BlockSweeps<CLUSTER>;
  using Base::room, Base::of, Base::crew, Base::image, Base::k, Base::p, Base::ROWS, Base::COLUMNS;
  using typename Base::Elements, typename Base::Tile;
  const BackwardTensors& to;

  __device__ BlockBackward(const Base& base, const BackwardTensors& to) : Base(base), to(to) {}

  __device__ const float* scalings(int t, int side) const { return this->saved(to.scalings, t, side); }
  __device__ bool absorbed(int t) const { return to.absorbed[image * p.iterations + t - 1] & ABSORBED; }
  __device__ const float* grad() const {
    return to.grad + image * k * (p.readout == Readout::right ? 1 : p.steps);
  }
  __device__ void absorb(int t, double sign) const {
    this->each([&](int i) {
      for (int side = 0; side < 2; ++side) of(room.potential[side])[i] += sign * ::log(static_cast<double>(scalings(t, side)[i]));
    });
    crew.sync();
  }

  __device__ __forceinline__ void run() const {
    if (!this->begin()) return refuse();
    this->each([&](int i) {
      for (int side = 0; side < 2; ++side) of(room.potential[side])[i] = scalings(0, side)[i];
    });
    crew.sync();
    for (int t = 1; t < p.iterations; ++t)
      if (absorbed(t)) absorb(t, 1);
    this->each([&](int j) { of(room.y)[j] = 0.0f, of(room.mean)[j] = 0.0f, of(room.ranked)[j] = 0.0; });
    // The column sums of P are 1 exactly, whatever the rounding: the last column step passes no gradient on.
    bool fresh = true;
    for (int t = p.iterations; t; --t) {
      if (fresh) {
        this->make();
        if (t < p.iterations) begin_segment(t);
        else if (p.readout == Readout::right || p.steps == 1) begin_single();
        else begin_steps();
      }
      rows(t);
      fresh = t > 1 && absorbed(t - 1);
      columns(t, fresh);
      if (fresh) absorb(t - 1, -1);
    }
    finish();
  }

  __device__ void refuse() const {
    this->each([&](int j) {
      for (float* of : {to.grad_scores, to.grad_right, to.grad_start})
        if (of) of[image * k + j] = NAN;
    });
  }

  // y of iteration t, from new factors.
  __device__ void begin_segment(int t) const {
    const float* v = scalings(t, COLUMNS);
    this->each([&](int j) { of(room.y)[j] = v[j] * of(room.g)[j]; });
    crew.sync();
    this->each_tile(COLUMNS, [&](const Tile& tile) {
      this->template add_up<1, BLOCK_TERMS>(COLUMNS, tile, [&](int j, int) { return of(room.y)[j]; });
    });
    crew.sync();
  }

  // z = -u^2 (X y), and the moments of z and u
  __device__ void rows(int t) const {
    const float* u = scalings(t, ROWS);
    if (t != p.iterations) this->combine(ROWS);
    this->each_tile(ROWS, [&](const Tile& tile) {
      if (t != p.iterations)
        this->each_stretch(tile, [&](const Elements& elements) {
          float sum[1][EACH];
          this->product(ROWS, tile.block, elements, of(room.y), sum);
          for (int e = 0; e < EACH; ++e)
            if (const int i = elements.index[e]; elements.exists(e)) of(room.z)[i] = -u[i] * u[i] * sum[0][e];
        });
      this->template add_up<2, BLOCK_TERMS + 1>(ROWS, tile, [&](int i, int s) { return s == 0 ? of(room.z)[i] : u[i]; });
    });
    crew.sync();
  }

  // The gradient of one iteration, per column, as in cpu/block_rows.h: y = v g of this iteration, `before` is v of the last
  //   ranked_j -= y_j (uq_j - mean_j / v_j) + before_j (zq_j - mean_j z0_j);  g_j = -before_j z0_j
  __device__ void columns(int t, bool restarts) const {
    const float *u = scalings(t, ROWS), *v = scalings(t, COLUMNS), *earlier = scalings(t - 1, COLUMNS);
    this->template combine<3>(COLUMNS, of(room.coefficients), [&](const BlockPair& pair, int s, int m) {
      return s == 0 ? this->moment(this->sums(ROWS), pair, 0, m)
                    : this->ranked_moment(this->sums(ROWS), pair, s - 1, m, this->mean_rank(pair.block));
    });
    this->each_tile(COLUMNS, [&](const Tile& tile) {
      const int block = tile.block;
      const double q = this->mean_rank(block), nearest = t == 1 ? this->nearest() : 0;
      this->each_stretch(tile, [&](const Elements& elements) {
        float sum[3][EACH];
        this->products(
            COLUMNS, block, elements,
            [&](int i, int s) {
          const float by = s == 2 ? u[i] : of(room.z)[i];
          return s == 0 ? by : by * static_cast<float>(this->rank(i) - q);
        },
            sum);
        for (int e = 0; e < EACH; ++e) {
          const int j = elements.index[e];
          if (!elements.exists(e)) continue;
          const float z0 = sum[0][e], zq = sum[1][e], uq = sum[2][e], mean = of(room.mean)[j];
          const float before = t == 1     ? expf(static_cast<float>(this->initial(j, nearest) - of(room.potential[COLUMNS])[j]))
                               : restarts ? 1.0f
                                          : earlier[j];
          of(room.ranked)[j] -= static_cast<double>(of(room.y)[j] * (uq - mean / v[j]) + before * (zq - mean * z0));
          of(room.g)[j] = -before * z0;
          if (t > 1 && !restarts) of(room.y)[j] = before * of(room.g)[j];
        }
      });
      if (t > 1 && !restarts)
        this->template add_up<1, BLOCK_TERMS>(COLUMNS, tile, [&](int j, int) { return of(room.y)[j]; });
    });
    crew.sync();
  }

  // dP_ij = alpha_i beta_j: what the readout leaves to the last iteration, z = u (row sums of P (dP - its column mean)),
  // and to the scores directly.
  __device__ void begin_single() const {
    const bool by_right = p.readout == Readout::right;
    const float *u = scalings(p.iterations, ROWS), *v = scalings(p.iterations, COLUMNS);
    const float *alpha = by_right ? grad() : p.left, *beta = by_right ? p.right + image * k : grad();
    this->find_means(alpha);
    this->add_up_weighted(alpha, u);
    this->template combine<3>(COLUMNS, of(room.coefficients), [&](const BlockPair& pair, int s, int m) {
      const double q = this->mean_rank(pair.block);
      if (s == 0) return this->ranked_moment(this->sums(ROWS), pair, 0, m, q);
      const float here = this->relative(COLUMNS, pair, m);
      if (s == 1) return here;
      return static_cast<float>(this->centre(ROWS, pair.other) - q) * here +
             static_cast<float>(*of(room.scale)) * this->relative(COLUMNS, pair, m + 1);
    });
    this->each_tile(COLUMNS, [&](const Tile& tile) {
      const int block = tile.block;
      const double q = this->mean_rank(block), middle = of(room.block_mean[COLUMNS])[block];
      this->each_stretch(tile, [&](const Elements& elements) {
        float sum[3][EACH];
        this->products(
            COLUMNS, block, elements,
            [&](int i, int s) {
          const float rank = static_cast<float>(this->rank(i) - q), weight = static_cast<float>(alpha[i] - middle);
          return u[i] * (s == 0 ? rank : s == 1 ? weight
                                                : rank * weight);
        },
            sum);
        for (int e = 0; e < EACH; ++e) {
          const int j = elements.index[e], column = of(room.order)[j];
          if (!elements.exists(e)) continue;
          const float rank = v[j] * sum[0][e], mean = v[j] * sum[1][e];
          of(room.mean)[j] = rank;
          of(room.ranked)[j] = static_cast<double>(beta[column] * (v[j] * sum[2][e] - rank * mean));
          of(room.before)[j] = v[j] * beta[column], of(room.g)[j] = of(room.before)[j] * mean;
          if (to.grad_right) to.grad_right[image * k + column] = static_cast<float>(middle + mean);
        }
      });
      this->template add_up<2, BLOCK_TERMS>(COLUMNS, tile, [&](int j, int s) { return s == 0 ? of(room.before)[j] : of(room.g)[j]; });
    });
    crew.sync();
    this->template combine<2>(ROWS, of(room.coefficients), [&](const BlockPair& pair, int s, int m) {
      return s == 0 ? this->moment(this->sums(COLUMNS), pair, 0, m) : this->relative(ROWS, pair, m);
    });
    this->each_tile(ROWS, [&](const Tile& tile) {
      const int block = tile.block;
      const double middle = of(room.block_mean[ROWS])[block];
      this->each_stretch(tile, [&](const Elements& elements) {
        float sum[2][EACH];
        this->products(
            ROWS, block, elements,
            // the moments' blocks have other means; weighed by entry, a column's is its own
            [&](int j, int s) {
          const double own = of(room.block_mean[COLUMNS])[column_block(j)] - middle;
          return s == 0 ? of(room.before)[j] : of(room.g)[j] + static_cast<float>(own) * of(room.before)[j];
        },
            sum);
        for (int e = 0; e < EACH; ++e)
          if (const int i = elements.index[e]; elements.exists(e))
            of(room.z)[i] = u[i] * u[i] * (static_cast<float>(alpha[i] - middle) * sum[0][e] - sum[1][e]);
      });
    });
    crew.sync();
  }
  __device__ int column_block(int j) const {
    int lo = 0, hi = this->blocks(COLUMNS);
    while (hi - lo > 1) (of(room.edge[COLUMNS])[(lo + hi) / 2] <= j ? lo : hi) = (lo + hi) / 2;
    return lo;
  }

  // dP_ij = Σ_s W_si grad_sj. All gradients of a column are taken relative to its own mean.
  __device__ void begin_steps() const {
    const float *u = scalings(p.iterations, ROWS), *v = scalings(p.iterations, COLUMNS);
    const auto given = [&](int s, int j) {
      return s < p.steps ? grad()[static_cast<int64_t>(s) * k + of(room.order)[j]] : 0.0f;
    };
    // relative to the gradient at the column's own rank while the mean is not known
    const auto value = [&](int s, int j) { return given(s, j) - given(of(room.heaviest)[j], j); };
    this->find_rest();
    this->find_blocks(p.steps + 1);
    float *mean = of(room.g), *product = of(room.before), *rank = of(room.mean);
    this->each([&](int j) { mean[j] = product[j] = rank[j] = 0.0f; });
    this->each([&](int i) { of(room.z)[i] = 0.0f; });
    crew.sync();
    this->each_group(p.steps + 1, [&](int from, int end) {
      this->add_up_steps(from, end, u);
      this->template combine_steps<2>(COLUMNS, from, end, [&](int s, const BlockPair& pair, int set, int m) {
        return set == 0 ? this->moment(this->step_sums(ROWS, s), pair, 0, m)
                        : this->ranked_moment(this->step_sums(ROWS, s), pair, 0, m, this->mean_rank(pair.block));
      });
      this->each_tile(COLUMNS, [&](const Tile& tile) {
        const double q = this->mean_rank(tile.block);
        this->each_stretch(tile, [&](const Elements& elements) {
          for (int s = from; s < end; ++s) {
            float sum[2][EACH];
            this->products(
                COLUMNS, tile.block, elements, of(room.first_block)[s], of(room.end_block)[s],
                this->template step_coefficients<2>(s),
                [&](int i, int set) {
              const float weight = u[i] * this->left(s, i);
              return set == 0 ? weight : weight * static_cast<float>(this->rank(i) - q);
            },
                sum);
            for (int e = 0; e < EACH; ++e) {
              const int j = elements.index[e];
              if (!elements.exists(e)) continue;
              mean[j] = fmaf(value(s, j), sum[0][e], mean[j]);
              product[j] = fmaf(value(s, j), sum[1][e], product[j]);
              rank[j] += sum[1][e];
            }
          }
        });
      });
      crew.sync();
    });
    this->each([&](int j) {
      mean[j] *= v[j], rank[j] *= v[j];
      of(room.ranked)[j] = static_cast<double>(v[j] * product[j] - rank[j] * mean[j]);
    });
    crew.sync();
    this->each_group(p.steps + 1, [&](int from, int end) {
      const auto weight = [&](int s, int j) { return v[j] * (value(s, j) - mean[j]); };
      this->each_tile(COLUMNS, [&](const Tile& tile) {
        for (int s = from; s < end; ++s)
          this->template add_up<1, BLOCK_TERMS>(COLUMNS, tile, of(room.first_block)[s], of(room.end_block)[s],
                                                this->step_sums(COLUMNS, s), [&](int j, int) { return weight(s, j); });
      });
      crew.sync();
      this->template combine_steps<1>(ROWS, from, end, [&](int s, const BlockPair& pair, int, int m) {
        return this->moment(this->step_sums(COLUMNS, s), pair, 0, m);
      });
      this->each_tile(ROWS, [&](const Tile& tile) {
        for (int s = from; s < end; ++s) {
          if (!this->weighs(s, tile.block)) continue;
          this->each_stretch(tile, [&](const Elements& elements) {
            float sum[1][EACH];
            this->products(
                ROWS, tile.block, elements, 0, this->blocks(COLUMNS), this->template step_coefficients<1>(s), [&](int j, int) { return weight(s, j); }, sum);
            for (int e = 0; e < EACH; ++e)
              if (const int i = elements.index[e]; elements.exists(e)) of(room.z)[i] = fmaf(this->left(s, i), sum[0][e], of(room.z)[i]);
          });
        }
      });
      crew.sync();
    });
    this->each([&](int i) { of(room.z)[i] *= u[i] * u[i]; });
    crew.sync();
  }

  // The logits depend on a_j as 2 (q_i - c_j) / tau; g is the gradient of the first column potential.
  __device__ void finish() const {
    this->each_tile(COLUMNS, [&](const Tile& tile) {
      const double q = this->mean_rank(tile.block);
      for (int j = tile.first + lane(); j < tile.first + tile.count; j += WARP) {
        const double g = of(room.g)[j], rank = q + static_cast<double>(of(room.mean)[j]);
        const double moment = of(room.ranked)[j] + rank * g, square = p.start ? 0 : of(room.c)[j] * g;
        const int64_t column = image * k + of(room.order)[j];
        if (to.grad_scores) to.grad_scores[column] = static_cast<float>(2 * (moment - square) / this->tau);
        if (to.grad_start) to.grad_start[column] = of(room.g)[j];
      }
    });
  }
};

}  // namespace aha
