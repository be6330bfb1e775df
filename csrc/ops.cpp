// Every schema of torch.ops.aha, in one place. Implementations: cpu/*.cpp in this library, cuda/*.cu in aha._C_cuda.
// Autograd and fake kernels are registered in Python (kernels/native.py).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(aha, m) {
  // images, references (B,C,H,W); ranks (B,H,W) int32, 0 = most important; counts (S,) int32; mean, std (C,)
  // -> deleted, inserted (B,S,C,H,W) in dtype, or the type of the images
  m.def(
      "perturb_by_rank(Tensor images, Tensor references, Tensor ranks, Tensor counts, Tensor? mean=None, "
      "Tensor? std=None, ScalarType? dtype=None) -> (Tensor deleted, Tensor inserted)");
  // gradients of the above (B,S,C,H,W) -> gradients of images and references (B,C,H,W), summed and returned in dtype
  m.def(
      "perturb_by_rank_backward(Tensor grad_deleted, Tensor grad_inserted, Tensor ranks, Tensor counts, "
      "Tensor? std=None, ScalarType? dtype=None) -> (Tensor grad_images, Tensor grad_references)");
}
