"""The ranking kernels of csrc/cuda on a CPU: compiled by g++ with cuda_on_host.h, called through ctypes.

Every function runs what `torch.ops.aha` would launch on a GPU, with the layout named by ``ranks``: 0 streamed, 1 one
CTA for a matrix, more a cluster. ``order`` is the order in which threads take turns. RuntimeError: see cuda_on_host.h.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from ..ranking import Problem

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
COMPILER = shutil.which("g++")
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


class _Ranking(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("scores", "logits", "tau", "seed", "left", "right", "start")]
    _fields_ += [("readout", _INT), ("noise", _FLOAT), ("k", _INT), ("steps", _INT), ("iterations", _INT)]


class _Forward(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("out", "scalings", "absorbed", "workspace")]


class _Backward(ctypes.Structure):
    _names = "grad scalings absorbed grad_scores grad_logits grad_tau grad_right grad_start kept workspace"
    _fields_ = [(name, _POINTER) for name in _names.split()]


def _arguments(problem: Problem) -> _Ranking:
    """The kernels' struct; it borrows the memory of the tensors."""
    given = (problem.logits, problem.left, problem.right)
    readout = next((n for n, tensor in enumerate(given, start=1) if tensor is not None), 0)
    tensors = (problem.scores, problem.logits, problem.tau, problem.seed, problem.left, problem.right, problem.start)
    steps = 0 if problem.left is None else len(problem.left)
    return _Ranking(*map(_data, tensors), readout, problem.noise, problem.shape[1], steps, problem.iterations)


def _data(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def _empty(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


class Emulator:
    """The kernels, compiled into ``folder``."""

    def __init__(self, folder: Path):
        library = folder / "sinkhorn_on_host.so"
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
        flags += ["-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"]
        source = HERE / "sinkhorn_on_host.cpp"
        subprocess.run([COMPILER, *flags, str(source), "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))

    def _call(self, name: str, *arguments) -> None:
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        error = function(*arguments)
        if error is not None:
            raise RuntimeError(error.decode())

    def forward(self, problem: Problem, ranks: int, order: int = 0, plan: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """out, scalings (B, T+1, 2, K), absorbed (B, T) int32. ``plan``: "" or "blocks_", of which 0 ranks are one CTA
        that has nothing but its coefficients in shared memory.
        """
        batch, k = problem.shape
        out, scalings = _empty(*problem.out_shape()), _empty(batch, problem.iterations + 1, 2, k)
        # what nobody wrote, or not in time, is to differ from one order to another
        absorbed = torch.full((batch, problem.iterations), -(order % 2), dtype=torch.int32)
        tensors = _Forward(*map(_data, (out, scalings, absorbed)), None)
        arguments = _arguments(problem)
        self._call(f"{plan}forward", ctypes.byref(arguments), ctypes.byref(tensors), _LONG(batch), ranks, order)
        return out, scalings, absorbed

    def backward(
        self,
        problem: Problem,
        grad: Tensor,
        scalings: Tensor,
        absorbed: Tensor,
        ranks: int,
        order: int = 0,
        plan: str = "",
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of scores and tau (B,), or of the logits and None; those of ``right`` and ``start`` or None."""
        batch, k = problem.shape
        ranked = problem.logits is None
        inputs = _empty(batch, k) if ranked else _empty(batch, k, k)
        tau = _empty(batch) if ranked else None
        right, start = (None if given is None else _empty(batch, k) for given in (problem.right, problem.start))
        grads = (inputs, None, tau, right, start) if ranked else (None, inputs, tau, right, start)
        tensors = _Backward(*map(_data, (grad, scalings, absorbed, *grads)), None, None)
        arguments = _arguments(problem)
        self._call(f"{plan}backward", ctypes.byref(arguments), ctypes.byref(tensors), _LONG(batch), ranks, order)
        return inputs, tau, right, start

    def masks(self, given: Tensor, weights: Tensor, backward: bool, order: int = 0) -> Tensor:
        """cumulative_masks of ``given`` (B, K, K), or its backward of (B, S, K)."""
        steps, k = weights.shape
        out = _empty(len(given), k if backward else steps, k)
        self._call(
            "masks", *map(_POINTER, map(_data, (given, weights, out))), _LONG(len(given)), k, steps, backward, order
        )
        return out

    def noise(self, problem: Problem) -> Tensor:
        """(B, K, K) Gumbel noise, K at most 32."""
        batch, k = problem.shape
        out = _empty(batch, k, k)
        arguments = _arguments(problem)
        self._call("noise", ctypes.byref(arguments), _POINTER(_data(out)), _LONG(batch))
        return out

    def faulty(self, fault: int, order: int = 0) -> Tensor:
        """A kernel of 4 CTAs of 64 threads that misbehaves as `fault` says (sinkhorn_on_host.cpp); 0: it does not."""
        out = _empty(4, 64)
        self._call("faulty", fault, _POINTER(_data(out)), order)
        return out

    def planned_ranks(
        self, k: int, backward: bool, shared_bytes: int, largest_cluster: int, processors: int = 1
    ) -> int:
        """``ranks`` that the launches choose on a card with so much shared memory, so many processors for an image."""
        sizes = _LONG(k), backward, _LONG(shared_bytes), largest_cluster, _LONG(processors)
        return self._library.planned_ranks(*sizes)

    def blocks_pay(self, batch: int, k: int) -> bool:
        """Whether the operators take the blocks where nothing else is asked for."""
        return bool(self._library.blocks_pay(_LONG(batch), _LONG(k)))

    def block_slots(self, k: int) -> int:
        """Tiles of pairs that an image has room for."""
        self._library.block_slots.restype = _LONG
        return self._library.block_slots(_LONG(k))
