// The ranking kernels of csrc/cuda, run by the emulator, for ctypes: every function returns null or what went wrong.
#include "cuda_on_host.h"
// the emulator stands in for CUDA in what follows
#include "cuda/block_launch.cuh"

namespace {

std::string message;

template <typename F>
const char* reported(const F& f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    message = e.what();
    return message.c_str();
  }
}

auto launcher(unsigned order) {
  return [order](const aha::Shape& shape, auto kernel, const auto&... arguments) {
    cuda_on_host::Shape on_host{{unsigned(shape.blocks)}, {unsigned(shape.threads)}, unsigned(shape.cluster)};
    on_host.shared = shape.shared_bytes;
    on_host.order = order;
    cuda_on_host::launch(on_host, kernel, arguments...);
  };
}

// 0: streamed
aha::Plan plan_for(int k, int ranks) { return ranks ? aha::resident_plan(k, ranks) : aha::streamed_plan(k); }

aha::BlockPlan block_plan_for(const aha::Ranking& p, int ranks, bool backward) {
  const int64_t outputs = p.readout == aha::Readout::left ? p.steps : 1;
  return aha::block_plan(p.k, outputs, backward, ranks == 1 ? 227 << 10 : 0, std::max(ranks, 1));
}

std::vector<float> workspace_for(const aha::Plan& plan, int k, bool backward, int64_t batch) {
  return std::vector<float>(plan.workspace_floats(k, backward) * batch, NAN);
}

void noise_kernel(aha::Ranking p, float* out) {
  aha::write_noise(aha::Logits(p, blockIdx.x), threadIdx.y, 0, p.k, out + (blockIdx.x * p.k + threadIdx.y) * p.k);
}

// Misbehaves as asked, so that the tests see what the emulator reports.
void faulty_kernel(int fault, float* out) {
  AHA_DYNAMIC_SHARED(float, shared);
  AHA_SHARED(float, other, 64);
  const int i = threadIdx.x, next = (i + 1) % blockDim.x;
  shared[i] = other[i] = float(i);
  if (fault == 1 && i == 3) return;  // the others wait for it
  if (fault != 2) __syncthreads();   // 2: forgotten
  if (fault == 3) shared[2 * blockDim.x] = 0.0f;
  if (fault == 4 && aha::cluster_rank() == 1) return;
  out[blockIdx.x * blockDim.x + i] = shared[next] + other[next];
  if (fault == 4) {
    __syncthreads();
    *aha::cluster_map(shared, 1) = 0.0f;
  }
  if (fault == 5) out[blockIdx.x * blockDim.x + i] = shared[blockDim.x];  // never written
}

}  // namespace

extern "C" {

const char* forward(const aha::Ranking* p, const aha::ForwardTensors* to, int64_t batch, int ranks, unsigned order) {
  return reported([&] {
    const aha::Plan plan = plan_for(p->k, ranks);
    std::vector<float> workspace = workspace_for(plan, p->k, false, batch);
    aha::ForwardTensors tensors = *to;
    tensors.workspace = workspace.data();
    aha::run_forward(plan, *p, tensors, batch, launcher(order));
  });
}

const char* backward(const aha::Ranking* p, const aha::BackwardTensors* to, int64_t batch, int ranks, unsigned order) {
  return reported([&] {
    const aha::Plan plan = plan_for(p->k, ranks);
    std::vector<float> workspace = workspace_for(plan, p->k, true, batch);
    std::vector<float> kept(aha::kept_floats(p->k, p->iterations) * batch, NAN);
    aha::BackwardTensors tensors = *to;
    tensors.workspace = workspace.data();
    tensors.kept = kept.data();
    aha::run_backward(plan, *p, tensors, batch, launcher(order));
  });
}

// In blocks: ranks 1 with its room in shared memory, 0 in global memory, more a cluster.
const char* blocks_forward(const aha::Ranking* p, const aha::ForwardTensors* to, int64_t batch, int ranks, unsigned order) {
  return reported([&] {
    const aha::BlockPlan plan = block_plan_for(*p, ranks, false);
    std::vector<float> workspace(plan.workspace_floats() * batch, NAN);
    aha::ForwardTensors tensors = *to;
    tensors.workspace = workspace.data();
    aha::run_blocks_forward(plan, *p, tensors, batch, launcher(order));
  });
}

const char* blocks_backward(const aha::Ranking* p, const aha::BackwardTensors* to, int64_t batch, int ranks,
                            unsigned order) {
  return reported([&] {
    const aha::BlockPlan plan = block_plan_for(*p, ranks, true);
    std::vector<float> workspace(plan.workspace_floats() * batch, NAN);
    aha::BackwardTensors tensors = *to;
    tensors.workspace = workspace.data();
    aha::run_blocks_backward(plan, *p, tensors, batch, launcher(order));
  });
}

const char* masks(const float* from, const float* weights, float* out, int64_t batch, int k, int steps, int backward,
                  unsigned order) {
  return reported([&] {
    if (backward) aha::run_masks_backward(from, weights, out, batch, k, steps, launcher(order));
    else aha::run_masks(from, weights, out, batch, k, steps, launcher(order));
  });
}

const char* noise(const aha::Ranking* p, float* out, int64_t batch) {
  return reported([&] {
    cuda_on_host::launch({{unsigned(batch)}, {aha::WARP, unsigned(p->k)}}, noise_kernel, *p, out);
  });
}

const char* faulty(int fault, float* out, unsigned order) {
  return reported([&] {
    cuda_on_host::Shape shape{{4}, {64}, 2};
    shape.shared = 512;
    shape.order = order;
    cuda_on_host::launch(shape, faulty_kernel, fault, out);
  });
}

// ranks of the plan for a card with so much shared memory and so many processors for an image, 0: streamed
int planned_ranks(int64_t k, int backward, int64_t shared_bytes, int largest_cluster, int64_t processors) {
  const aha::Plan plan = aha::choose_plan(k, backward, shared_bytes, processors,
                                          [&](const aha::Plan& plan) { return plan.ranks <= largest_cluster; });
  return plan.columns ? plan.ranks : 0;
}

int blocks_pay(int64_t batch, int64_t k) { return aha::blocks_pay(batch, k); }

int64_t block_slots(int64_t k) { return aha::BlockRoom(k, 1, false).slots; }
}
