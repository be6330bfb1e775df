// The linear-time ranking on CUDA, forward: the iterations and the readouts.
#pragma once

#include "cuda/block_sweeps.cuh"

namespace aha {

template <bool CLUSTER>
struct BlockForward : BlockSweeps<CLUSTER> {
  using Base = BlockSweeps<CLUSTER>;
  using Base::room, Base::of, Base::crew, Base::image, Base::k, Base::p, Base::ROWS, Base::COLUMNS;
  using typename Base::Elements, typename Base::Tile;
  const ForwardTensors& to;

  __device__ BlockForward(const Base& base, const ForwardTensors& to) : Base(base), to(to) {}

  __device__ int outputs() const { return p.readout == Readout::right ? 1 : p.steps; }
  __device__ float* out() const { return to.out + image * outputs() * k; }
  __device__ int32_t* absorbed() const { return to.absorbed + image * p.iterations; }

  __device__ __forceinline__ void run() const {
    for (int t = crew.thread(); t < p.iterations; t += crew.threads()) absorbed()[t] = IN_BLOCKS;
    if (!this->begin()) return refuse();
    const double nearest = this->nearest();
    this->tops(ROWS, [&](int j) { return this->initial(j, nearest); });
    this->tops(COLUMNS, [&](int i) { return of(room.potential[ROWS])[i]; });
    bool fresh = true;
    for (int t = 1;; ++t) {
      if (fresh) {
        this->make();
        this->each([&](int i) { begin_column(t, i); });
        crew.sync();
        this->each_tile(COLUMNS, [&](const Tile& tile) {
          this->template add_up<1, BLOCK_TERMS>(COLUMNS, tile, [&](int j, int) { return of(room.scaling[COLUMNS])[j]; });
        });
        crew.sync();
      }
      solve(ROWS, t);
      solve(COLUMNS, t);
      if (t == p.iterations) break;
      fresh = of(room.flags)[t & 1] == t;
      if (!fresh) continue;
      if (crew.thread() == 0) absorbed()[t - 1] = IN_BLOCKS | ABSORBED;
      this->each([&](int i) {
        for (int side = 0; side < 2; ++side)
          of(room.potential[side])[i] += ::log(static_cast<double>(of(room.scaling[side])[i]));
      });
      crew.sync();
    }
    if (p.readout == Readout::right) read_right();
    else if (p.steps == 1) read_single();
    else if (p.steps) read_steps();
  }

  __device__ void refuse() const {
    this->each([&](int i) {
      for (int t = 0; t <= p.iterations; ++t)
        for (int side = 0; side < 2; ++side) this->saved(to.scalings, t, side)[i] = NAN;
      for (int s = 0; s < outputs(); ++s) out()[static_cast<int64_t>(s) * k + i] = NAN;
    });
  }

  // The scaling before iteration t, of new factors.
  __device__ void begin_column(int t, int j) const {
    float* v = of(room.scaling[COLUMNS]);
    v[j] = 1.0f;
    if (t > 1) return;
    for (int side = 0; side < 2; ++side) this->saved(to.scalings, 0, side)[j] = static_cast<float>(of(room.potential[side])[j]);
    v[j] = expf(static_cast<float>(this->initial(j, this->nearest()) - of(room.potential[COLUMNS])[j]));
  }

  // scaling = 1 / (product with the other side's), and its moments
  __device__ void solve(int side, int t) const {
    float *own = of(room.scaling[side]), *kept = this->saved(to.scalings, t, side);
    bool far = false;
    this->combine(side);
    this->each_tile(side, [&](const Tile& tile) {
      this->each_stretch(tile, [&](const Elements& elements) {
        float sum[1][EACH];
        this->product(side, tile.block, elements, of(room.scaling[1 - side]), sum);
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
          if (!elements.exists(e)) continue;
          const float x = reciprocal(sum[0][e]);
          own[elements.index[e]] = kept[elements.index[e]] = x;
          far = far || !(x >= static_cast<float>(1 / BLOCK_SCALING) && x <= static_cast<float>(BLOCK_SCALING));
        }
      });
      this->template add_up<1, BLOCK_TERMS>(side, tile, [&](int i, int) { return own[i]; });
    });
    if (far) of(room.flags)[t & 1] = t;
    crew.sync();
  }

  // out_j = Σ_i alpha_i P_ij. Columns of P sum to 1, so alpha may be taken relative to any number.
  __device__ void read_single() const {
    const float *alpha = p.left, *u = of(room.scaling[ROWS]);
    this->find_means(alpha);
    this->add_up_weighted(alpha, u);
    this->template combine<1>(COLUMNS, of(room.coefficients), [&](const BlockPair& pair, int, int m) {
      return this->relative(COLUMNS, pair, m);
    });
    this->each_tile(COLUMNS, [&](const Tile& tile) {
      const double middle = of(room.block_mean[COLUMNS])[tile.block];
      this->each_stretch(tile, [&](const Elements& elements) {
        float sum[1][EACH];
        this->products(
            COLUMNS, tile.block, elements,
            [&](int i, int) { return u[i] * static_cast<float>(alpha[i] - middle); }, sum);
        for (int e = 0; e < EACH; ++e)
          if (const int j = elements.index[e]; elements.exists(e))
            out()[of(room.order)[j]] = static_cast<float>(middle) + of(room.scaling[COLUMNS])[j] * sum[0][e];
      });
    });
  }

  // out_i = Σ_j P_ij right_j
  __device__ void read_right() const {
    const float* right = p.right + image * k;
    const auto weight = [&](int j, int) { return of(room.scaling[COLUMNS])[j] * right[of(room.order)[j]]; };
    this->each_tile(COLUMNS, [&](const Tile& tile) { this->template add_up<1, BLOCK_TERMS>(COLUMNS, tile, weight); });
    crew.sync();
    this->combine(ROWS);
    this->each_tile(ROWS, [&](const Tile& tile) {
      this->each_stretch(tile, [&](const Elements& elements) {
        float sum[1][EACH];
        this->products(ROWS, tile.block, elements, weight, sum);
        for (int e = 0; e < EACH; ++e)
          if (const int i = elements.index[e]; elements.exists(e)) out()[i] = of(room.scaling[ROWS])[i] * sum[0][e];
      });
    });
  }

  // out_sj = Σ_i W_si P_ij
  __device__ void read_steps() const {
    const float* u = of(room.scaling[ROWS]);
    this->find_blocks(p.steps);
    this->each_group(p.steps, [&](int from, int end) {
      this->add_up_steps(from, end, u);
      this->template combine_steps<1>(COLUMNS, from, end, [&](int s, const BlockPair& pair, int, int m) {
        return this->moment(this->step_sums(ROWS, s), pair, 0, m);
      });
      this->each_tile(COLUMNS, [&](const Tile& tile) {
        this->each_stretch(tile, [&](const Elements& elements) {
          for (int s = from; s < end; ++s) {
            float sum[1][EACH];
            this->products(
                COLUMNS, tile.block, elements, of(room.first_block)[s], of(room.end_block)[s],
                this->template step_coefficients<1>(s), [&](int i, int) { return u[i] * this->left(s, i); }, sum);
            for (int e = 0; e < EACH; ++e)
              if (const int j = elements.index[e]; elements.exists(e))
                out()[static_cast<int64_t>(s) * k + of(room.order)[j]] = of(room.scaling[COLUMNS])[j] * sum[0][e];
          }
        });
      });
      crew.sync();
    });
  }
};

}  // namespace aha
