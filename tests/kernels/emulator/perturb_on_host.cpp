// The kernels of csrc/cuda/perturb.cuh, run by the emulator, for ctypes: every function returns null or what failed.
#include "cuda_on_host.h"
// the emulator stands in for CUDA in what follows
#include "cuda/perturb.cuh"

#include <torch/headeronly/util/BFloat16.h>

namespace {

using namespace aha::pixels;
using torch::headeronly::BFloat16;

std::string message;

struct Call {
  PerturbSizes size;
  unsigned order;
  SoftMask soft;
  RankMask ranks;

  template <typename... Parameters, typename... Arguments>
  void launch(int64_t x, int64_t y, int64_t z, void (*kernel)(Parameters...), const Arguments&... arguments) const {
    cuda_on_host::Shape shape{{unsigned(x), unsigned(y), unsigned(z)}, {THREADS}};
    shape.order = order;
    cuda_on_host::launch(shape, kernel, arguments...);
  }
};

struct Tensors {
  void** pointers;
  bool shared_reference;

  template <typename T>
  T* at(int i) const {
    return static_cast<T*>(pointers[i]);
  }
};

int64_t blocks(int64_t threads) { return (threads + THREADS - 1) / THREADS; }

// One block less along y and z than there is work, where there is more than one: blocks must take several turns.
int64_t fewer(int64_t work) { return work > 1 ? work - 1 : 1; }

template <int V, typename Mask, typename In, typename Out>
void outputs(const Call& call, const Mask& mask, Images<In> x, Images<In> r, const float* mean,
             const float* std, Out* deleted, Out* inserted) {
  call.launch(blocks(call.size.pixels() / V), fewer(call.size.groups()), fewer(call.size.batch),
              write_outputs<V, Mask, In, Out>, call.size, mask, x, r, mean, std, deleted, inserted);
}

template <int V, typename Mask, typename In, typename Grad>
void image_gradients(const Call& call, const Mask& mask, const Grad* deleted, const Grad* inserted, const float* std,
                     In* images, In* references) {
  call.launch(blocks(call.size.pixels() / V), fewer(call.size.channels), fewer(call.size.batch),
              sum_gradients<V, Mask, Grad, In>, call.size, mask, deleted, inserted, std, images, references);
}

template <int V, typename In, typename Grad>
void mask_gradient(const Call& call, Images<In> x, Images<In> r, const float* std, const Grad* deleted,
                   const Grad* inserted, float* grad) {
  const PerturbSizes& size = call.size;
  const auto& [masks, rows, cols] = call.soft;
  const Tiling tiling(size);
  std::vector<int> range(2 * (rows.cells + cols.cells), -1);
  std::vector<float> partial(size.batch * size.steps * size.height * tiling.strips * cols.cells, NAN);
  const Range row_range{range.data(), range.data() + rows.cells};
  const Range col_range{row_range.end + rows.cells, row_range.end + rows.cells + cols.cells};
  call.launch(blocks(int64_t{aha::WARP} * std::max(rows.cells, cols.cells)), 2, 1, find_ranges, rows,
              size.height, row_range, cols, size.width, col_range);
  call.launch(tiling.tiles(size), fewer(size.groups()), fewer(size.batch), reduce_columns<V, In, Grad>, size,
              cols, col_range, x, r, std, deleted, inserted, partial.data());
  call.launch(1, 1, 1, reduce_rows, size, rows, row_range, cols.cells, partial.data(), grad);
}

template <int V, typename In, typename Out, typename Mask>
void all_images(const Call& call, const Mask& mask, const Tensors& t) {
  const int64_t plane = call.size.channels * call.size.pixels();
  const Images<In> x{t.at<In>(8), plane}, r{t.at<In>(9), t.shared_reference ? 0 : plane};
  outputs<V>(call, mask, x, r, t.at<float>(10), t.at<float>(11), t.at<Out>(12), t.at<Out>(13));
  // the gradients of images and references take at most four pixels
  image_gradients<(V < 4 ? V : 4)>(call, mask, t.at<Out>(14), t.at<Out>(15), t.at<float>(11), t.at<In>(16),
                                   t.at<In>(17));
}

template <int V, typename In, typename Out>
const char* run(const int64_t* n, bool soft, unsigned order, void** pointers) try {
  const Tensors t{pointers, n[9] != 0};
  const Call call{{n[0], n[1], n[2], int(n[3]), int(n[4])},
                  order,
                  {t.at<float>(0),
                   {t.at<int64_t>(1), t.at<float>(2), int(n[7]), int(n[5])},
                   {t.at<int64_t>(3), t.at<float>(4), int(n[8]), int(n[6])}},
                  {t.at<int32_t>(5), t.at<int32_t>(6)}};
  if (!soft) {
    all_images<V, In, Out>(call, call.ranks, t);
    return nullptr;
  }
  all_images<V, In, Out>(call, call.soft, t);
  const int64_t plane = call.size.channels * call.size.pixels();
  const Images<In> x{t.at<In>(8), plane}, r{t.at<In>(9), t.shared_reference ? 0 : plane};
  mask_gradient<V>(call, x, r, t.at<float>(11), t.at<Out>(14), t.at<Out>(15), t.at<float>(7));
  return nullptr;
} catch (const std::exception& e) {
  message = e.what();
  return message.c_str();
}

}  // namespace

// n: B, S, C, H, W, rows, cols, row taps, column taps, whether all images share one reference.
// pointers: masks, row cells and weights, column cells and weights, ranks, counts, gradient of the masks; images,
// references, mean, std; deleted and inserted, then their gradients; gradients of images and references.
#define AHA_EMULATED(name, V, In, Out)                                                                 \
  extern "C" const char* name(const int64_t* n, bool soft, unsigned order, void** pointers) {          \
    return run<V, In, Out>(n, soft, order, pointers);                                                  \
  }
AHA_EMULATED(float32_float32_1, 1, float, float)
AHA_EMULATED(float32_float32_4, 4, float, float)
AHA_EMULATED(float32_bfloat16_8, 8, float, BFloat16)
AHA_EMULATED(bfloat16_bfloat16_1, 1, BFloat16, BFloat16)
AHA_EMULATED(bfloat16_bfloat16_8, 8, BFloat16, BFloat16)
