// Every schema of torch.ops.aha, in one place. Implementations: cpu/*.cpp in this library, cuda/*.cu in aha._C_cuda.
// Autograd, fake kernels and batching rules are registered in Python (kernels/operators.py), which repeats the
// schemas for the Triton kernels; a test holds the two texts together.
//
// B images, K regions, S rows of left, T iterations, C channels, H x W pixels.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(aha, m) {
  // scores (B,K); tau (), in the type of the scores; seed () int64; P = Sinkhorn((-(a_j - p_i)^2 + noise gamma_ij) / tau)
  // start (B,K): the column potential that iterations start from, added to (2 q_i c_j + noise gamma_ij) / tau with
  // c_j = a_j - 1/2, q_i = p_i - 1/2; without it -c_j^2 / tau, which completes the square
  // -> out: left given, (S,K): left P (B,S,K); right given, (B,K): P right (B,K); neither: P (B,K,K)
  //    scalings (B,T+1,2,K): 0 = the log potentials after the first iteration, t = the row and column scalings u^t, v^t
  //    absorbed (B,T) int32: 1 where the scalings were moved into the potentials after that iteration
  m.def(
      "gumbel_sinkhorn(Tensor scores, Tensor tau, Tensor seed, Tensor? left, Tensor? right, int n_iters, float noise, "
      "Tensor? start) -> (Tensor out, Tensor scalings, Tensor absorbed)");
  // grad: of out -> grad_scores (B,K), grad_tau (B,) if need_tau else (0,), grad_right and grad_start (B,K) if right
  // and start are given, else (0,)
  m.def(
      "gumbel_sinkhorn_backward(Tensor grad, Tensor scores, Tensor tau, Tensor seed, Tensor? left, Tensor? right, "
      "Tensor scalings, Tensor absorbed, float noise, bool need_tau, Tensor? start) "
      "-> (Tensor grad_scores, Tensor grad_tau, Tensor grad_right, Tensor grad_start)");

  // without noise, on the CPU: how the images are ranked -> (B,6) int64: 1 if in blocks (blocks.h), blocks of rows, of
  // columns, pairs of them, vector operations of one iteration, those of the dense matrix
  m.def("ranking_plan(Tensor scores, Tensor tau, Tensor? start) -> Tensor");

  // logits (B,K,K) -> log P (B,K,K), and the same state
  m.def("log_sinkhorn(Tensor logits, int n_iters) -> (Tensor out, Tensor scalings, Tensor absorbed)");
  m.def("log_sinkhorn_backward(Tensor grad, Tensor logits, Tensor scalings, Tensor absorbed) -> Tensor");

  // permutation P (B,K,K), left (S,K), mostly zero -> left P (B,S,K); backward: (B,S,K) -> (B,K,K)
  m.def("cumulative_masks(Tensor permutation, Tensor left) -> Tensor");
  m.def("cumulative_masks_backward(Tensor grad, Tensor left) -> Tensor");

  // images, references (B,C,H,W); masks (B,S,rows*cols); row_cell int64, row_weight (H,taps), col_* (W,taps): the bands
  // of the two interpolation matrices; mean, std (C,)
  // -> deleted, inserted (B,S,C,H,W) in dtype, or the type of the images
  m.def(
      "perturb(Tensor images, Tensor references, Tensor masks, Tensor row_cell, Tensor row_weight, Tensor col_cell, "
      "Tensor col_weight, int rows, int cols, Tensor? mean, Tensor? std, ScalarType? dtype) "
      "-> (Tensor deleted, Tensor inserted)");
  // gradients of the above -> grad_masks, in the type of the masks, and, if need_images, those of images and references
  m.def(
      "perturb_backward(Tensor grad_deleted, Tensor grad_inserted, Tensor images, Tensor references, Tensor masks, "
      "Tensor row_cell, Tensor row_weight, Tensor col_cell, Tensor col_weight, int rows, int cols, Tensor? std, "
      "bool need_images) -> (Tensor grad_masks, Tensor grad_images, Tensor grad_references)");

  // images, references (B,C,H,W); ranks (B,H,W) int32, 0 = most important; counts (S,) int32; mean, std (C,)
  // -> deleted, inserted (B,S,C,H,W) in dtype, or the type of the images
  m.def(
      "perturb_by_rank(Tensor images, Tensor references, Tensor ranks, Tensor counts, Tensor? mean=None, "
      "Tensor? std=None, ScalarType? dtype=None) -> (Tensor deleted, Tensor inserted)");
  // gradients of the above (B,S,C,H,W) -> gradients of images and references (B,C,H,W) in dtype,
  // summed in float32, or in float64 if that is the dtype
  m.def(
      "perturb_by_rank_backward(Tensor grad_deleted, Tensor grad_inserted, Tensor ranks, Tensor counts, "
      "Tensor? std=None, ScalarType? dtype=None) -> (Tensor grad_images, Tensor grad_references)");
}
