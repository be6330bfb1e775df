// The ranking operators on CUDA: checks, choice of plan and layout, launches. The kernels are in sinkhorn.cuh, blocks.cuh.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/block_launch.cuh"
#include "cuda/sinkhorn_launch.cuh"
#include "sinkhorn.h"

namespace aha {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Sizes = std::vector<int64_t>;

cudaLaunchConfig_t configure(const Shape& shape, cudaStream_t stream, cudaLaunchAttribute& cluster) {
  STD_TORCH_CHECK(shape.blocks <= MAX_BLOCKS, "sinkhorn on CUDA: ", shape.blocks,
                  " blocks of threads are more than one launch can have; split the batch");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  if (shape.cluster == 1) return config;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = 1;
  return config;
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// Lets a kernel have what the device can give: always the same, as other threads may launch it with another size.
template <typename Kernel>
void allow(const Shape& shape, Kernel* kernel, int device) {
  if (shape.shared_bytes > 48 << 10) {
    const int limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
  }
  if (shape.cluster > 8)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

// Launches on the current stream of the tensor's device.
auto launcher(const Tensor& on) {
  void* stream = nullptr;
  const int device = on.get_device_index();
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return [stream, device](const Shape& shape, auto* kernel, const auto&... arguments) {
    cudaLaunchAttribute cluster;
    const cudaLaunchConfig_t config = configure(shape, static_cast<cudaStream_t>(stream), cluster);
    allow(shape, kernel, device);
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
  };
}

// Whether the device can hold one of these clusters at all: parts of it may be disabled or given to others.
bool fits(const Plan& plan, int64_t k, bool backward, int device) {
  if (plan.ranks == 1) return true;
  if (!attribute(cudaDevAttrClusterLaunch, device)) return false;
  int active = 0;
  with_columns(plan, [&]<bool CLUSTER, int N>() {
    const auto ask = [&](auto* kernel) {
      const Shape shape = plan.shape(1, k, backward);
      cudaLaunchAttribute cluster;
      const cudaLaunchConfig_t config = configure(shape, nullptr, cluster);
      allow(shape, kernel, device);
      if (cudaOccupancyMaxActiveClusters(&active, kernel, &config) != cudaSuccess) {
        cudaGetLastError();  // a cluster this device refuses is an answer, not an error
        active = 0;
      }
    };
    backward ? ask(resident_backward<CLUSTER, N>) : ask(resident_forward<CLUSTER, N>);
  });
  return active > 0;
}

Plan plan_on(int device, int64_t batch, int64_t k, bool backward) {
  static std::mutex mutex;
  static std::map<std::tuple<int, int64_t, int64_t, bool>, Plan> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const int64_t processors = attribute(cudaDevAttrMultiProcessorCount, device) / std::max<int64_t>(batch, 1);
  const auto key = std::make_tuple(device, std::min<int64_t>(processors, 16), k, backward);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  const int shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const auto runs = [&](const Plan& plan) { return fits(plan, k, backward, device); };
  return known[key] = choose_plan(k, backward, shared, processors, runs);
}

void check_float32(const Tensor& given) {
  STD_TORCH_CHECK(given.scalar_type() == ScalarType::Float, "sinkhorn on CUDA: the input is ",
                  torch::headeronly::toString(given.scalar_type()), "; use float32, or backend=\"reference\"");
}

int as_int(int64_t value, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value < (int64_t{1} << 30), name, " is ", value, "; it must be in 0 ... 2^30 - 1");
  return static_cast<int>(value);
}

const float* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr<float>() : nullptr; }

// The inputs of an operator, checked and contiguous, which the kernels' arguments point into.
struct Inputs {
  Tensor given, tau, seed;  // of log_sinkhorn only the first
  std::optional<Tensor> left, right, initial;
  Ranking ranking{};
  RankingShape shape{};

  Inputs(const Tensor& logits, int64_t iterations) : given(logits), tau(logits), seed(logits) {
    begin(check_logits(logits, iterations));
    ranking.logits = given.const_data_ptr<float>();
    ranking.readout = Readout::logarithm;
  }

  Inputs(const Tensor& scores, const Tensor& tau_, const Tensor& seed_, const std::optional<Tensor>& left_,
         const std::optional<Tensor>& right_, const std::optional<Tensor>& start, int64_t iterations, double noise)
      : given(scores), tau(tau_), seed(seed_), left(contiguous(left_)), right(contiguous(right_)),
        initial(contiguous(start)) {
    begin(check_ranking(scores, tau, seed, left, right, initial, iterations));
    ranking.scores = given.const_data_ptr<float>();
    ranking.tau = tau.const_data_ptr<float>();
    ranking.seed = seed.const_data_ptr<int64_t>();
    ranking.left = data(left);
    ranking.right = data(right);
    ranking.start = data(initial);
    ranking.readout = left ? Readout::left : right ? Readout::right
                                                   : Readout::matrix;
    ranking.noise = static_cast<float>(noise);
    ranking.steps = left ? as_int(left->size(0), "the number of steps") : 0;
  }

  void begin(const RankingShape& checked) {
    check_float32(given);
    given = torch::stable::contiguous(given);
    shape = checked;
    ranking.k = as_int(shape.k, "the number of regions");
    ranking.iterations = as_int(shape.iterations, "the number of iterations");
  }

  Sizes sizes() const { return out_sizes(shape, left, right); }

  void check_backward(const Tensor& grad, const Tensor& scalings, const Tensor& absorbed) const {
    check_grad(grad, given, sizes());
    check_state(shape, scalings, absorbed, given);
  }
};

Tensor empty(const Tensor& like, const Sizes& sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

// By what the host knows of the call, without waiting for the device. What is asked for is read once, as what the forward
// pass saves is the plan's, and nothing but the device could tell the backward pass which it was.
bool in_blocks(const Ranking& p, int64_t batch) {
  if (p.noise != 0.0f || !(p.readout == Readout::right || (p.readout == Readout::left && p.steps > 0))) return false;
  static const RankingPlan asked = asked_for();
  if (asked == RankingPlan::blocks || asked == RankingPlan::dense) return asked == RankingPlan::blocks;
  return blocks_pay(batch, p.k);  // nodes are the CPU's
}

BlockPlan block_plan_on(int device, const Ranking& p, bool backward) {
  const int shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int64_t outputs = p.readout == Readout::left ? p.steps : 1;
  return block_plan(p.k, outputs, backward, shared, block_ranks(p.k, attribute(cudaDevAttrClusterLaunch, device)));
}

Tensors3 forward(const Inputs& inputs, bool blocks) {
  const DeviceGuard guard(inputs.given.get_device_index());
  const int device = inputs.given.get_device_index();
  const int64_t iterations = inputs.ranking.iterations, batch = inputs.shape.batch;
  Tensor out = empty(inputs.given, inputs.sizes());
  Tensor scalings = empty(inputs.given, {inputs.shape.batch, iterations + 1, 2, inputs.shape.k});
  Tensor absorbed = torch::stable::new_empty(inputs.given, Sizes{inputs.shape.batch, iterations}, ScalarType::Int);
  const auto run = [&](int64_t floats, const auto& kernels) {
    Tensor workspace = empty(inputs.given, {batch * floats});
    kernels(ForwardTensors{out.mutable_data_ptr<float>(), scalings.mutable_data_ptr<float>(),
                           absorbed.mutable_data_ptr<int32_t>(), workspace.mutable_data_ptr<float>()});
  };
  if (blocks) {
    const BlockPlan plan = block_plan_on(device, inputs.ranking, false);
    run(plan.workspace_floats(), [&](const ForwardTensors& to) {
      run_blocks_forward(plan, inputs.ranking, to, batch, launcher(inputs.given));
    });
  } else {
    const Plan plan = plan_on(device, batch, inputs.shape.k, false);
    run(plan.workspace_floats(inputs.shape.k, false), [&](const ForwardTensors& to) {
      run_forward(plan, inputs.ranking, to, batch, launcher(inputs.given));
    });
  }
  return {out, scalings, absorbed};
}

void backward(const Inputs& inputs, const Tensor& grad, const Tensor& scalings, const Tensor& absorbed,
              BackwardTensors to, bool blocks) {
  const int device = inputs.given.get_device_index();
  const DeviceGuard guard(device);
  const int64_t batch = inputs.shape.batch, k = inputs.shape.k;
  const Tensor grad_data = torch::stable::contiguous(grad), scalings_data = torch::stable::contiguous(scalings);
  const Tensor absorbed_data = torch::stable::contiguous(absorbed);
  to.grad = grad_data.const_data_ptr<float>();
  to.scalings = scalings_data.const_data_ptr<float>();
  to.absorbed = absorbed_data.const_data_ptr<int32_t>();
  if (blocks) {
    const BlockPlan plan = block_plan_on(device, inputs.ranking, true);
    Tensor workspace = empty(inputs.given, {batch * plan.workspace_floats()});
    to.workspace = workspace.mutable_data_ptr<float>();
    run_blocks_backward(plan, inputs.ranking, to, batch, launcher(inputs.given));
    return;
  }
  const Plan plan = plan_on(device, batch, k, true);
  Tensor kept = empty(inputs.given, {batch * kept_floats(k, inputs.ranking.iterations)});
  Tensor workspace = empty(inputs.given, {batch * plan.workspace_floats(k, true)});
  to.kept = kept.mutable_data_ptr<float>();
  to.workspace = workspace.mutable_data_ptr<float>();
  run_backward(plan, inputs.ranking, to, batch, launcher(inputs.given));
}

Tensors3 gumbel_sinkhorn(const Tensor& scores, const Tensor& tau, const Tensor& seed, const std::optional<Tensor>& left,
                         const std::optional<Tensor>& right, int64_t n_iters, double noise,
                         const std::optional<Tensor>& start) {
  const Inputs inputs(scores, tau, seed, left, right, start, n_iters, noise);
  return forward(inputs, in_blocks(inputs.ranking, inputs.shape.batch));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gumbel_sinkhorn_backward(
    const Tensor& grad, const Tensor& scores, const Tensor& tau, const Tensor& seed, const std::optional<Tensor>& left,
    const std::optional<Tensor>& right, const Tensor& scalings, const Tensor& absorbed, double noise, bool need_tau,
    const std::optional<Tensor>& start) {
  const Inputs inputs(scores, tau, seed, left, right, start, iterations_of(absorbed), noise);
  inputs.check_backward(grad, scalings, absorbed);
  Tensor grad_scores = empty(scores, {inputs.shape.batch, inputs.shape.k});
  Tensor grad_tau = empty(scores, {need_tau ? inputs.shape.batch : 0});
  Tensor grad_right = empty(scores, right ? Sizes{inputs.shape.batch, inputs.shape.k} : Sizes{0});
  Tensor grad_start = empty(scores, start ? Sizes{inputs.shape.batch, inputs.shape.k} : Sizes{0});
  BackwardTensors to{};
  to.grad_scores = grad_scores.mutable_data_ptr<float>();
  to.grad_tau = need_tau ? grad_tau.mutable_data_ptr<float>() : nullptr;
  to.grad_right = right ? grad_right.mutable_data_ptr<float>() : nullptr;
  to.grad_start = start ? grad_start.mutable_data_ptr<float>() : nullptr;
  const bool blocks = in_blocks(inputs.ranking, inputs.shape.batch);
  if (blocks && need_tau) {
    // in blocks the gradient of tau is a difference of sums that float32 cannot hold: ranked again with the dense matrix
    const auto [out, dense_scalings, dense_absorbed] = forward(inputs, false);
    backward(inputs, grad, dense_scalings, dense_absorbed, to, false);
  } else {
    backward(inputs, grad, scalings, absorbed, to, blocks);
  }
  return {grad_scores, grad_tau, grad_right, grad_start};
}

Tensors3 log_sinkhorn(const Tensor& logits, int64_t n_iters) { return forward(Inputs(logits, n_iters), false); }

Tensor log_sinkhorn_backward(const Tensor& grad, const Tensor& logits, const Tensor& scalings,
                             const Tensor& absorbed) {
  const Inputs inputs(logits, iterations_of(absorbed));
  inputs.check_backward(grad, scalings, absorbed);
  Tensor grad_logits = empty(logits, {inputs.shape.batch, inputs.shape.k, inputs.shape.k});
  BackwardTensors to{};
  to.grad_logits = grad_logits.mutable_data_ptr<float>();
  backward(inputs, grad, scalings, absorbed, to, false);
  return grad_logits;
}

// left P (B,S,K), or backwards left^T grad (B,K,K).
Tensor masks(const Tensor& given, const Tensor& left, bool backward) {
  check_masks(given, left, backward);
  check_float32(given);
  const int64_t batch = given.size(0), steps = left.size(0), k = left.size(1);
  const DeviceGuard guard(given.get_device_index());
  Tensor out = empty(given, {batch, backward ? k : steps, k});
  const Tensor from = torch::stable::contiguous(given), by = torch::stable::contiguous(left);
  const auto run = [&](auto&& operation) {
    operation(from.const_data_ptr<float>(), by.const_data_ptr<float>(), out.mutable_data_ptr<float>(), batch,
              as_int(k, "the number of regions"), as_int(steps, "the number of steps"), launcher(given));
  };
  backward ? run([](auto... a) { run_masks_backward(a...); }) : run([](auto... a) { run_masks(a...); });
  return out;
}

Tensor cumulative_masks(const Tensor& permutation, const Tensor& left) {
  return masks(permutation, left, false);
}

Tensor cumulative_masks_backward(const Tensor& grad, const Tensor& left) {
  return masks(grad, left, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aha, CUDA, m) {
  m.impl("gumbel_sinkhorn", TORCH_BOX(&gumbel_sinkhorn));
  m.impl("gumbel_sinkhorn_backward", TORCH_BOX(&gumbel_sinkhorn_backward));
  m.impl("log_sinkhorn", TORCH_BOX(&log_sinkhorn));
  m.impl("log_sinkhorn_backward", TORCH_BOX(&log_sinkhorn_backward));
  m.impl("cumulative_masks", TORCH_BOX(&cumulative_masks));
  m.impl("cumulative_masks_backward", TORCH_BOX(&cumulative_masks_backward));
}

}  // namespace aha
