#include "node_axis.h"

#include <algorithm>

namespace aha {

NodeTables::NodeTables() {
  // T_k(x) = Σ_p chebyshev[k][p] x^p
  double chebyshev[NODES][NODES] = {{1}, {0, 1}};
  for (int64_t k = 2; k < NODES; ++k)
    for (int64_t p = 0; p < NODES; ++p) chebyshev[k][p] = (p ? 2 * chebyshev[k - 1][p - 1] : 0) - chebyshev[k - 2][p];
  const auto angle = [](int64_t a) { return (2 * static_cast<double>(a) + 1) * M_PI / (2 * NODES); };
  for (int64_t a = 0; a < HALF; ++a) {
    x[a] = std::cos(angle(a)), x[a + HALF] = -x[a];
    for (int64_t p = 0; p < NODES; ++p) {
      double sum = 0;
      for (int64_t k = 0; k < NODES; ++k)
        sum += (k ? 2.0 : 1.0) / NODES * std::cos(static_cast<double>(k) * angle(a)) * chebyshev[k][p];
      to_coefficients.of(p % 2, a, p / 2) = to_nodes.of(p % 2, p / 2, a) = sum;
    }
    for (int64_t k = 0; k < 2; ++k) tail[k][a] = 2.0 / NODES * std::cos(static_cast<double>(NODES - 2 + k) * angle(a));
  }
}
const NodeTables& node_tables() {
  static const NodeTables tables;
  return tables;
}

namespace {

AHA_CLONES void locate(const double* places, int64_t n, double low, double scale, int32_t cells, int32_t* cell) {
  for (int64_t i = 0; i < n; ++i) cell[i] = std::min(static_cast<int32_t>((places[i] - low) * scale), cells - 1);
}
// middles and scales: of every block
AHA_CLONES void relate(const double* places, const int32_t* block, int64_t n, const double* middles,
                       const double* scales, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>((places[i] - middles[block[i]]) * scales[block[i]]);
}

AHA_CLONES void add_powers(const float* x, const int32_t* block, const float* values, int64_t n, double* moments) {
  const Double zero1 = {1, 0, 1, 0, 1, 0, 1, 0}, one1 = 1 - zero1, zero2 = {1, 1, 0, 0, 1, 1, 0, 0}, one2 = 1 - zero2,
               zero4 = {1, 1, 1, 1, 0, 0, 0, 0}, one4 = 1 - zero4;
  for (int64_t i = 0; i < n; ++i) {
    const double x1 = x[i], x2 = x1 * x1, x4 = x2 * x2, value = values ? values[i] : 1.0;
    const Double low = (zero1 + one1 * x1) * (zero2 + one2 * x2) * ((zero4 + one4 * x4) * value);
    double* sum = moments + block[i] * NODES;
    at(sum) += low, at(sum + HALF) += low * (x4 * x4);
  }
}

AHA_CLONES void to_nodes(const NodeTables& tables, int64_t blocks, double* moments) {
  for (double* of = moments; of < moments + blocks * NODES; of += NODES) {
    alignas(64) double part[2][HALF];
    for (int64_t n = 0; n < NODES; ++n) part[n % 2][n / 2] = of[n];
    Double even, odd;
    multiply(tables.to_nodes, at(part[0]), at(part[1]), even, odd);
    at(of) = even + odd, at(of + HALF) = even - odd;
  }
}

int64_t cells_of(double length, double width, int64_t most) {
  const double wanted = std::ceil(length / width);
  return wanted * NODES <= 4.0 * static_cast<double>(most) ? std::max<int64_t>(1, static_cast<int64_t>(wanted)) : 0;
}

}  // namespace

bool NodeAxis::make(const double* places, int64_t n, double width, int64_t most) {
  const auto [low, high] = std::minmax_element(places, places + n);
  const int64_t cells = cells_of(*high - *low, width, most);
  if (!cells) return false;
  const double cell = std::max((*high - *low) / static_cast<double>(cells), width / 1024);
  std::vector<double> edges(cells + 1);
  for (int64_t i = 0; i <= cells; ++i) edges[i] = *low + cell * static_cast<double>(i);
  block = Buffer<int32_t>(n);
  locate(places, n, *low, 1 / cell, static_cast<int32_t>(cells), block);
  half = 0.5 * cell;
  return keep(places, n, edges, std::vector<int32_t>(cells, 0), most);
}

bool NodeAxis::make_graded(const double* places, int64_t n, double width, int levels, int64_t most) {
  const double low = places[n - 1], length = places[0] - low;
  int64_t cells = cells_of(length, width, most);
  if (!cells) return false;
  if (levels) cells = std::max<int64_t>(2, cells);
  const double cell = length / static_cast<double>(cells);
  half = 0.5 * cell;
  std::vector<double> edges{low};
  std::vector<int32_t> of_cell;
  const auto add = [&](int32_t level) {
    edges.push_back(edges.back() + std::ldexp(cell, -level));
    of_cell.push_back(level);
  };
  if (levels) add(levels);
  for (int level = levels; level > 0; --level) add(level);
  for (int64_t i = levels ? 2 : 0; i < cells; ++i) add(0);
  for (int level = 1; level <= levels; ++level) add(level);
  if (levels) add(levels);
  block = Buffer<int32_t>(n);
  auto last = static_cast<int32_t>(of_cell.size()) - 1;
  for (int64_t i = 0; i < n; ++i) {
    while (last > 0 && places[i] < edges[last]) --last;
    block[i] = last;
  }
  return keep(places, n, edges, of_cell, most);
}

// `block` holds the cells of the elements.
bool NodeAxis::keep(const double* places, int64_t n, const std::vector<double>& edges,
                    const std::vector<int32_t>& levels, int64_t most) {
  const auto cells = static_cast<int64_t>(levels.size());
  std::vector<int64_t> of_cell(cells, 0);
  for (int64_t i = 0; i < n; ++i) ++of_cell[block[i]];
  std::vector<int32_t> number(cells, 0);
  std::vector<double> middles, halves, scales;
  for (int64_t cell = 0; cell < cells; ++cell) {
    number[cell] = static_cast<int32_t>(blocks);
    if (!of_cell[cell]) continue;
    ++blocks;
    count.push_back(of_cell[cell]), level.push_back(levels[cell]);
    middles.push_back(0.5 * (edges[cell] + edges[cell + 1])), halves.push_back(0.5 * (edges[cell + 1] - edges[cell]));
    scales.push_back(1 / halves.back());
  }
  if (size() > most) return false;
  if (blocks < cells)
    for (int64_t i = 0; i < n; ++i) block[i] = number[block[i]];
  x = Buffer<float>(n), place = Buffer<double>(size()), weight = Buffer<double>(size());
  relate(places, block, n, middles.data(), scales.data(), x);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t a = 0; a < NODES; ++a) place[b * NODES + a] = middles[b] + halves[b] * node_tables().x[a];
  node_weights(*this, 0, n, nullptr, weight);
  return true;
}

void node_weights(const NodeAxis& axis, int64_t begin, int64_t end, const float* values, double* weights) {
  std::fill_n(weights, axis.size(), 0.0);
  add_powers(axis.x + begin, axis.block + begin, values, end - begin, weights);
  moments_to_nodes(axis.blocks, weights);
}
void moments_to_nodes(int64_t blocks, double* moments) { to_nodes(node_tables(), blocks, moments); }

}  // namespace aha
