// Deletion and insertion on the CPU, by soft masks on a grid (perturb) and by pixel rank (perturb_by_rank).
// Both are bound by the 2 B S C H W values of the outputs, written or, in the backward pass, read once. Threads share
// out tiles, blocks of pixel rows of one image: a tile is normalised once, then all its steps run while it is in the
// cache. Tiles depend on the sizes only and no sum crosses threads: results repeat bit for bit.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "pages.h"
#include "perturb_checks.h"
#include "perturb_rows.h"

namespace aha {
namespace {

constexpr int64_t TILE = 1 << 11;   // pixels, so that a channel of a tile is a fraction of the first-level cache
constexpr int64_t GRAIN = 1 << 15;  // values per task: a thread costs about as much as writing this many

// Calls f with a value of the C++ type of `type`.
template <typename F>
void with_sum_type(ScalarType type, const F& f) {
  type == ScalarType::Double ? f(double{}) : f(float{});
}

template <typename F>
void with_image_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: return f(float{});
  }
}

template <typename T>
constexpr ScalarType TYPE = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// Memory that starts without values.
template <typename T>
std::unique_ptr<T[]> scratch(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]);
}

struct Tile {
  int64_t image, block, row, rows, pixels;
};

struct Tiles {
  PerturbShape shape;
  int64_t rows, blocks, size;  // rows and pixels of a whole tile, tiles per image

  explicit Tiles(const PerturbShape& s) : shape(s) {
    rows = std::max<int64_t>(1, std::min(s.height, TILE / std::max<int64_t>(s.width, 1)));
    blocks = s.width > 0 ? (s.height + rows - 1) / rows : 0;
    size = rows * s.width;
  }

  // f(begin, end) on the threads: ranges of tiles
  template <typename F>
  void share_out(const F& f) const {
    const int64_t work = size * shape.channels * (shape.steps + 1);
    torch::stable::parallel_for(0, shape.batch * blocks, GRAIN / (work + 1) + 1, f);
  }

  Tile operator[](int64_t n) const {
    const int64_t block = n % blocks, row = block * rows, count = std::min(rows, shape.height - row);
    return {n / blocks, block, row, count, count * shape.width};
  }
};

// Pixels of any strides and type: the tensor's last three dimensions are (C,H,W).
class Pixels {
 public:
  explicit Pixels(const Tensor& tensor)
      : data_(static_cast<const char*>(tensor.const_data_ptr())),
        bytes_(static_cast<int64_t>(tensor.element_size())),
        type_(tensor.scalar_type()),
        width_(tensor.size(tensor.dim() - 1)) {
    for (int64_t d = 0; d < tensor.dim(); ++d) stride_.push_back(tensor.stride(d));
  }

  // f(pointer, step, n, offset) over runs of n pixels, step apart, that start offset pixels into the tile
  template <typename F>
  void runs(const Tile& tile, std::initializer_list<int64_t> plane, const F& f) const {
    const char* from = at(plane) + tile.row * stride_[stride_.size() - 2] * bytes_;
    with_image_type(type_, [&](auto value) {
      const auto* row = reinterpret_cast<const decltype(value)*>(from);
      if (dense()) return f(row, 1, tile.pixels, 0);
      const int64_t down = stride_[stride_.size() - 2], step = stride_.back();
      for (int64_t y = 0; y < tile.rows; ++y) f(row + y * down, step, width_, y * width_);
    });
  }

  // The tile in T, without a copy where it is already that.
  template <typename T>
  const T* get(const Tile& tile, std::initializer_list<int64_t> plane, T* buffer) const {
    if (type_ == TYPE<T> && dense()) return reinterpret_cast<const T*>(at(plane)) + tile.row * width_;
    runs(tile, plane, [&](const auto* from, int64_t step, int64_t n, int64_t offset) {
      convert(from, step, n, buffer + offset);
    });
    return buffer;
  }

 private:
  bool dense() const { return stride_.back() == 1 && stride_[stride_.size() - 2] == width_; }
  const char* at(std::initializer_list<int64_t> plane) const {
    int64_t offset = 0, d = 0;
    for (const int64_t index : plane) offset += index * stride_[d++];
    return data_ + offset * bytes_;
  }

  const char* data_;
  int64_t bytes_;
  ScalarType type_;
  int64_t width_;
  std::vector<int64_t> stride_;
};

// Contiguous planes of any type to fill; values pass through a buffer only to change type.
class Planes {
 public:
  explicit Planes(const Tensor& tensor)
      : data_(static_cast<char*>(tensor.mutable_data_ptr())),
        bytes_(static_cast<int64_t>(tensor.element_size())),
        type_(tensor.scalar_type()) {
    prefer_large_pages(data_, tensor.numel() * bytes_);
  }

  template <typename T>
  T* begin(int64_t at, T* buffer) const {
    return type_ == TYPE<T> ? reinterpret_cast<T*>(data_) + at : buffer;
  }

  template <typename T>
  void end(int64_t at, const T* buffer, int64_t n) const {
    if (type_ == TYPE<T>) return;
    with_image_type(type_, [&](auto value) {
      convert(buffer, 1, n, reinterpret_cast<decltype(value)*>(data_ + at * bytes_));
    });
  }

 private:
  char* data_;
  int64_t bytes_;
  ScalarType type_;
};

template <typename T>
T channel(const T* values, int64_t c, T otherwise) {
  return values ? values[c] : otherwise;
}

// A mask has a State for each thread; in turn: enter a tile, take a step, then work on every channel.

struct RankMask {
  const int32_t *ranks, *counts;
  int64_t pixels, width;

  struct State {
    const RankMask& mask;
    const int32_t* rank = nullptr;
    int32_t count = 0;

    explicit State(const RankMask& m) : mask(m) {}
    void enter(const Tile& tile) { rank = mask.ranks + tile.image * mask.pixels + tile.row * mask.width; }
    void step(int64_t s) { count = mask.counts[s]; }
    template <typename T>
    void blend(const T* x, const T* r, int64_t n, T* deleted, T* inserted) const {
      blend_rows(x, r, rank, count, n, deleted, inserted);
    }
    template <typename T>
    void pull(const T* deleted, const T* inserted, int64_t n, T* image, T* reference) const {
      pull_rows(deleted, inserted, rank, count, n, image, reference);
    }
  };
};

// Separable upsampling, first along the columns: a tile meets few rows of cells, and each of them is expanded to a
// line of W pixels once per step; its pixel rows are then sums of whole lines.
template <typename T>
struct SoftMask {
  const T* masks;
  PerturbShape shape;
  GridShape grid;
  std::vector<int32_t> col_cell;  // (taps, W)
  std::vector<T> col_weight;      // (taps, W)
  std::vector<int32_t> slot;      // (H, taps): which line of its tile a tap reads
  const T* row_weight;            // (H, taps)
  std::vector<int64_t> lines;     // the rows of cells that the tiles meet, tile by tile
  std::vector<int64_t> first;     // (blocks + 1): where each block starts in lines
  int64_t most = 0;               // lines of a tile, at most

  SoftMask(const Tensor& m, const TapTensors& taps, const Tiles& tiles, const GridShape& g)
      : masks(m.const_data_ptr<T>()), shape(tiles.shape), grid(g), row_weight(taps.row_weight.const_data_ptr<T>()) {
    const int64_t *col = taps.col_cell.const_data_ptr<int64_t>(), *row = taps.row_cell.const_data_ptr<int64_t>();
    check_cells("col", col, shape.width * grid.col_taps, grid.cols);
    check_cells("row", row, shape.height * grid.row_taps, grid.rows);
    const T* weight = taps.col_weight.const_data_ptr<T>();
    for (int64_t t = 0; t < grid.col_taps; ++t)
      for (int64_t x = 0; x < shape.width; ++x) {
        col_cell.push_back(static_cast<int32_t>(col[x * grid.col_taps + t]));
        col_weight.push_back(weight[x * grid.col_taps + t]);
      }
    std::vector<int32_t> line_of(grid.rows, -1);
    first.push_back(0);
    for (int64_t block = 0; block < tiles.blocks; ++block) {
      const int64_t start = first.back(), end = std::min((block + 1) * tiles.rows, shape.height);
      for (int64_t i = block * tiles.rows * grid.row_taps; i < end * grid.row_taps; ++i) {
        int32_t& line = line_of[row[i]];
        if (line < 0) {
          line = static_cast<int32_t>(lines.size() - start);
          lines.push_back(row[i]);
        }
        slot.push_back(line);
      }
      for (size_t i = start; i < lines.size(); ++i) line_of[lines[i]] = -1;
      first.push_back(lines.size());
      most = std::max(most, first.back() - start);
    }
  }

  static void check_cells(const char* axis, const int64_t* cell, int64_t count, int64_t size) {
    const bool inside = std::all_of(cell, cell + count, [=](int64_t c) { return 0 <= c && c < size; });
    STD_TORCH_CHECK(inside, "perturb: ", axis, "_cell has a cell outside of 0 ... ", size - 1,
                    ", the cells of that axis");
  }

  struct State {
    const SoftMask& mask;
    std::unique_ptr<T[]> lines, values;
    Tile tile{};

    State(const SoftMask& m, const Tiles& tiles)
        : mask(m), lines(scratch<T>(m.most * m.shape.width)), values(scratch<T>(tiles.size)) {}
    void enter(const Tile& t) { tile = t; }
    void step(int64_t s) {
      const int64_t width = mask.shape.width, taps = mask.grid.row_taps;
      const T* cells = mask.masks + (tile.image * mask.shape.steps + s) * mask.grid.cells();
      T* line = lines.get();
      for (int64_t i = mask.first[tile.block]; i < mask.first[tile.block + 1]; ++i, line += width)
        expand_cells(cells + mask.lines[i] * mask.grid.cols, mask.col_cell.data(), mask.col_weight.data(),
                     mask.grid.col_taps, width, line);
      for (int64_t y = 0; y < tile.rows; ++y) {
        const int64_t at = (tile.row + y) * taps;
        combine_lines(lines.get(), mask.slot.data() + at, mask.row_weight + at, taps, width,
                      values.get() + y * width);
      }
    }
    void blend(const T* x, const T* r, int64_t n, T* deleted, T* inserted) const {
      blend_rows(x, r, values.get(), n, deleted, inserted);
    }
    void pull(const T* deleted, const T* inserted, int64_t n, T* image, T* reference) const {
      pull_rows(deleted, inserted, values.get(), n, image, reference);
    }
  };
};

// The tile of all channels of images and references, normalised: (C, tile) each.
template <typename T>
struct TilePair {
  std::unique_ptr<T[]> x, r;
  int64_t size;

  explicit TilePair(const Tiles& tiles)
      : x(scratch<T>(tiles.size * tiles.shape.channels)), r(scratch<T>(tiles.size * tiles.shape.channels)),
        size(tiles.size) {}

  void read_from(const Pixels& images, const Pixels& references, const Tile& tile, int64_t channels, const T* mean,
                 const T* std) {
    for (int64_t c = 0; c < channels; ++c)
      for (const auto& [pixels, to] : {std::pair(&images, x.get()), std::pair(&references, r.get())})
        pixels->runs(tile, {tile.image, c}, [&](const auto* from, int64_t step, int64_t n, int64_t offset) {
          read(from, step, channel(mean, c, T{0}), channel(std, c, T{1}), n, to + c * size + offset);
        });
  }
};

// make_state(): a State of the mask
template <typename T, typename Make>
void write_outputs(const Tiles& tiles, const Pixels& images, const Pixels& references, const T* mean, const T* std,
                   const Planes& deleted, const Planes& inserted, const Make& make_state) {
  const PerturbShape& shape = tiles.shape;
  tiles.share_out([&](int64_t begin, int64_t end) {
    auto mask = make_state();
    TilePair<T> pair(tiles);
    const auto buffer = scratch<T>(2 * tiles.size);
    for (int64_t n = begin; n < end; ++n) {
      const Tile tile = tiles[n];
      pair.read_from(images, references, tile, shape.channels, mean, std);
      mask.enter(tile);
      for (int64_t s = 0; s < shape.steps; ++s) {
        mask.step(s);
        for (int64_t c = 0; c < shape.channels; ++c) {
          const int64_t plane = (tile.image * shape.steps + s) * shape.channels + c;
          const int64_t at = plane * shape.pixels() + tile.row * shape.width;
          T *d = deleted.begin(at, buffer.get()), *i = inserted.begin(at, buffer.get() + tiles.size);
          mask.blend(pair.x.get() + c * tiles.size, pair.r.get() + c * tiles.size, tile.pixels, d, i);
          deleted.end(at, d, tile.pixels);
          inserted.end(at, i, tile.pixels);
        }
      }
    }
  });
}

TensorPair perturb(const Tensor& images, const Tensor& references, const Tensor& masks, const Tensor& row_cell,
                   const Tensor& row_weight, const Tensor& col_cell, const Tensor& col_weight, int64_t rows,
                   int64_t cols, const std::optional<Tensor>& mean, const std::optional<Tensor>& std,
                   std::optional<ScalarType> dtype) {
  const ScalarType out = dtype.value_or(images.scalar_type());
  const TapTensors taps(row_cell, row_weight, col_cell, col_weight);
  const auto [shape, grid] = check_perturb(images, references, masks, taps, rows, cols, mean, std, out);
  const auto [deleted, inserted] = new_pair(images, shape.output_sizes(), out);
  const Tensor cells = torch::stable::contiguous(masks);
  const std::optional<Tensor> shift = contiguous(mean), scale = contiguous(std);
  const Tiles tiles(shape);
  with_sum_type(images.scalar_type(), [&](auto sum) {
    using T = decltype(sum);
    const SoftMask<T> mask(cells, taps, tiles, grid);
    write_outputs(tiles, Pixels(images), Pixels(references), channel_pointer<T>(shift), channel_pointer<T>(scale),
                  Planes(deleted), Planes(inserted), [&] { return typename SoftMask<T>::State(mask, tiles); });
  });
  return {deleted, inserted};
}

TensorPair perturb_by_rank(const Tensor& images, const Tensor& references, const Tensor& ranks, const Tensor& counts,
                           const std::optional<Tensor>& mean, const std::optional<Tensor>& std,
                           std::optional<ScalarType> dtype) {
  const ScalarType out = dtype.value_or(images.scalar_type());
  const PerturbShape shape = check_perturb_by_rank(images, references, ranks, counts, mean, std, out);
  const auto [deleted, inserted] = new_pair(images, shape.output_sizes(), out);
  const Tensor rank = torch::stable::contiguous(ranks), count = torch::stable::contiguous(counts);
  const std::optional<Tensor> shift = contiguous(mean), scale = contiguous(std);
  const RankMask mask{rank.const_data_ptr<int32_t>(), count.const_data_ptr<int32_t>(), shape.pixels(), shape.width};
  with_sum_type(images.scalar_type(), [&](auto sum) {
    using T = decltype(sum);
    write_outputs(Tiles(shape), Pixels(images), Pixels(references), channel_pointer<T>(shift),
                  channel_pointer<T>(scale), Planes(deleted), Planes(inserted),
                  [&] { return RankMask::State(mask); });
  });
  return {deleted, inserted};
}

// Sums over the steps, of one tile: the gradients of images and references, (C, tile) each.
template <typename T>
struct ImageSums {
  std::unique_ptr<T[]> image, reference, buffer;
  int64_t size, all;

  explicit ImageSums(const Tiles& tiles)
      : image(scratch<T>(tiles.size * tiles.shape.channels)), reference(scratch<T>(tiles.size * tiles.shape.channels)),
        buffer(scratch<T>(tiles.size)), size(tiles.size), all(tiles.size * tiles.shape.channels) {}

  void clear() {
    std::fill_n(image.get(), all, T{0});
    std::fill_n(reference.get(), all, T{0});
  }

  template <typename State>
  void add(const State& mask, int64_t c, const T* deleted, const T* inserted, int64_t n) {
    mask.pull(deleted, inserted, n, image.get() + c * size, reference.get() + c * size);
  }

  void store(const Tile& tile, const PerturbShape& shape, const T* std, const Planes& images,
             const Planes& references) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      const int64_t at = (tile.image * shape.channels + c) * shape.pixels() + tile.row * shape.width;
      for (const auto& [sums, planes] : {std::pair(image.get(), &images), std::pair(reference.get(), &references)}) {
        T* to = planes->begin(at, buffer.get());
        read(sums + c * size, 1, T{0}, channel(std, c, T{1}), tile.pixels, to);
        planes->end(at, to, tile.pixels);
      }
    }
  }
};

TensorPair perturb_by_rank_backward(const Tensor& grad_deleted, const Tensor& grad_inserted, const Tensor& ranks,
                                    const Tensor& counts, const std::optional<Tensor>& std,
                                    std::optional<ScalarType> dtype) {
  const ScalarType out = dtype.value_or(grad_deleted.scalar_type());
  const PerturbShape shape = check_perturb_by_rank_backward(grad_deleted, grad_inserted, ranks, counts, std, out);
  const auto [grad_images, grad_references] = new_pair(grad_deleted, shape.image_sizes(), out);
  const Tensor rank = torch::stable::contiguous(ranks), count = torch::stable::contiguous(counts);
  const std::optional<Tensor> scale = contiguous(std);
  const RankMask mask{rank.const_data_ptr<int32_t>(), count.const_data_ptr<int32_t>(), shape.pixels(), shape.width};
  const Pixels deleted(grad_deleted), inserted(grad_inserted);
  const Planes images(grad_images), references(grad_references);
  const Tiles tiles(shape);
  with_sum_type(out, [&](auto value) {
    using T = decltype(value);
    tiles.share_out([&](int64_t begin, int64_t end) {
      RankMask::State state(mask);
      ImageSums<T> sums(tiles);
      const auto d = scratch<T>(tiles.size), g = scratch<T>(tiles.size);
      for (int64_t n = begin; n < end; ++n) {
        const Tile tile = tiles[n];
        state.enter(tile);
        sums.clear();
        for (int64_t s = 0; s < shape.steps; ++s) {
          state.step(s);
          for (int64_t c = 0; c < shape.channels; ++c)
            sums.add(state, c, deleted.get(tile, {tile.image, s, c}, d.get()),
                     inserted.get(tile, {tile.image, s, c}, g.get()), tile.pixels);
        }
        sums.store(tile, shape, channel_pointer<T>(scale), images, references);
      }
    });
  });
  return {grad_images, grad_references};
}

// The columns' band transposed: a cell's weights at the pixels from the first to the last that read it.
template <typename T>
struct Columns {
  std::vector<int64_t> begin, size, offset;  // by cell: pixels, and where its weights start
  std::vector<T> weight;

  explicit Columns(const SoftMask<T>& mask)
      : begin(mask.grid.cols, 0), size(mask.grid.cols, 0), offset(mask.grid.cols, 0) {
    const int64_t width = mask.shape.width, taps = mask.grid.col_taps;
    for (int64_t x = 0; x < width; ++x)
      for (int64_t t = 0; t < taps; ++t) {
        const int32_t cell = mask.col_cell[t * width + x];
        if (size[cell] == 0) begin[cell] = x;
        size[cell] = x + 1 - begin[cell];
      }
    for (int64_t cell = 1; cell < mask.grid.cols; ++cell) offset[cell] = offset[cell - 1] + size[cell - 1];
    weight.assign(offset.back() + size.back(), T{0});
    for (int64_t i = 0; i < width * taps; ++i) {
      const int32_t cell = mask.col_cell[i];
      weight[offset[cell] + i % width - begin[cell]] += mask.col_weight[i];
    }
  }

  void reduce(const T* line, T* cells) const {
    for (size_t cell = 0; cell < begin.size(); ++cell) {
      T sum = 0;
      const T *from = line + begin[cell], *w = weight.data() + offset[cell];
      for (int64_t i = 0; i < size[cell]; ++i) sum += w[i] * from[i];
      cells[cell] = sum;
    }
  }
};

// The gradient of the masks. A tile reduces its pixels to the rows of cells it meets: partial sums (lines, cols) for
// each image and step, which are added over the tiles when all are there.
template <typename T>
struct MaskSums {
  const SoftMask<T>& mask;
  const Columns<T>& columns;
  T* partial;
  std::unique_ptr<T[]> difference, sum, lines;
  int64_t size;
  Tile tile{};

  MaskSums(const SoftMask<T>& m, const Columns<T>& c, T* p, const Tiles& tiles)
      : mask(m), columns(c), partial(p), difference(scratch<T>(tiles.size * tiles.shape.channels)),
        sum(scratch<T>(tiles.size)), lines(scratch<T>(m.most * m.shape.width)), size(tiles.size) {}

  void enter(const Tile& t, const Pixels& images, const Pixels& references, const T* std) {
    tile = t;
    for (int64_t c = 0; c < mask.shape.channels; ++c) {
      T* to = difference.get() + c * size;
      const T* x = images.get(tile, {tile.image, c}, to);
      const T* r = references.get(tile, {tile.image, c}, sum.get());
      subtract_rows(x, r, channel(std, c, T{1}), tile.pixels, to);
    }
  }

  void clear() { std::fill_n(sum.get(), size, T{0}); }

  void add(int64_t c, const T* deleted, const T* inserted) {
    pull_mask_rows(deleted, inserted, difference.get() + c * size, tile.pixels, sum.get());
  }

  void store(int64_t s) {
    const int64_t width = mask.shape.width, taps = mask.grid.row_taps, total = mask.lines.size();
    const int64_t first = mask.first[tile.block], count = mask.first[tile.block + 1] - first;
    std::fill_n(lines.get(), count * width, T{0});
    for (int64_t y = 0; y < tile.rows; ++y) {
      const int64_t at = (tile.row + y) * taps;
      spread_line(sum.get() + y * width, mask.slot.data() + at, mask.row_weight + at, taps, width, lines.get());
    }
    T* to = partial + ((tile.image * mask.shape.steps + s) * total + first) * mask.grid.cols;
    for (int64_t i = 0; i < count; ++i) columns.reduce(lines.get() + i * width, to + i * mask.grid.cols);
  }
};

template <typename T>
void add_partial_sums(const SoftMask<T>& mask, const T* partial, T* grad) {
  const int64_t total = mask.lines.size(), cols = mask.grid.cols, work = (total + mask.grid.rows) * cols;
  const int64_t masks = mask.shape.batch * mask.shape.steps;
  torch::stable::parallel_for(0, masks, GRAIN / work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      T* to = grad + n * mask.grid.cells();
      const T* from = partial + n * total * cols;
      std::fill_n(to, mask.grid.cells(), T{0});
      for (int64_t i = 0; i < total; ++i)
        for (int64_t j = 0; j < cols; ++j) to[mask.lines[i] * cols + j] += from[i * cols + j];
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> perturb_backward(
    const Tensor& grad_deleted, const Tensor& grad_inserted, const Tensor& images, const Tensor& references,
    const Tensor& masks, const Tensor& row_cell, const Tensor& row_weight, const Tensor& col_cell,
    const Tensor& col_weight, int64_t rows, int64_t cols, const std::optional<Tensor>& std, bool need_images) {
  const TapTensors taps(row_cell, row_weight, col_cell, col_weight);
  const auto [shape, grid] = check_perturb_backward(grad_deleted, grad_inserted, images, references, masks, taps,
                                                    rows, cols, std);
  const Tensor grad_masks = torch::stable::new_empty(masks, {shape.batch, shape.steps, grid.cells()});
  const auto sizes = need_images ? shape.image_sizes() : std::vector<int64_t>{0};
  const auto [grad_images, grad_references] = new_pair(images, sizes, images.scalar_type());
  const Tensor cells = torch::stable::contiguous(masks);
  const std::optional<Tensor> scale = contiguous(std);
  const Pixels deleted(grad_deleted), inserted(grad_inserted), x(images), r(references);
  const Planes image_planes(grad_images), reference_planes(grad_references);
  const Tiles tiles(shape);
  with_sum_type(images.scalar_type(), [&](auto value) {
    using T = decltype(value);
    const SoftMask<T> mask(cells, taps, tiles, grid);
    const Columns<T> columns(mask);
    const auto partial = scratch<T>(shape.batch * shape.steps * mask.lines.size() * grid.cols);
    tiles.share_out([&](int64_t begin, int64_t end) {
      typename SoftMask<T>::State state(mask, tiles);
      MaskSums<T> mask_sums(mask, columns, partial.get(), tiles);
      ImageSums<T> image_sums(tiles);
      const auto d_buffer = scratch<T>(tiles.size), g_buffer = scratch<T>(tiles.size);
      for (int64_t n = begin; n < end; ++n) {
        const Tile tile = tiles[n];
        state.enter(tile);
        mask_sums.enter(tile, x, r, channel_pointer<T>(scale));
        if (need_images) image_sums.clear();
        for (int64_t s = 0; s < shape.steps; ++s) {
          if (need_images) state.step(s);
          mask_sums.clear();
          for (int64_t c = 0; c < shape.channels; ++c) {
            const T* d = deleted.get(tile, {tile.image, s, c}, d_buffer.get());
            const T* g = inserted.get(tile, {tile.image, s, c}, g_buffer.get());
            mask_sums.add(c, d, g);
            if (need_images) image_sums.add(state, c, d, g, tile.pixels);
          }
          mask_sums.store(s);
        }
        if (need_images)
          image_sums.store(tile, shape, channel_pointer<T>(scale), image_planes, reference_planes);
      }
    });
    add_partial_sums(mask, partial.get(), static_cast<T*>(grad_masks.mutable_data_ptr()));
  });
  return {grad_masks, grad_images, grad_references};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aha, CPU, m) {
  m.impl("perturb", TORCH_BOX(&perturb));
  m.impl("perturb_backward", TORCH_BOX(&perturb_backward));
  m.impl("perturb_by_rank", TORCH_BOX(&perturb_by_rank));
  m.impl("perturb_by_rank_backward", TORCH_BOX(&perturb_by_rank_backward));
}

}  // namespace aha
