"""The one context in which everything that runs a classifier works, whatever surrounds it and whoever else uses it.

A user's program may be in ``torch.no_grad``, in ``inference_mode`` or under autocast; it may have put the module into
training mode, or may explain the same module from another thread. `protected` makes all of that irrelevant inside and
puts it back on exit, also after an exception.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .kernels.messages import describe, short
from .precision import autocast, switched_off


class _Guard:
    """What one module's users share: a lock, and how deep the thread that holds it is inside."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0


_guards: weakref.WeakKeyDictionary[nn.Module, _Guard] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def _forked() -> None:
    # a thread that held a lock does not exist in the child
    global _making
    _making = threading.Lock()
    _guards.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _guard(module: nn.Module) -> _Guard:
    """The guard of a module; wrappers of one network (`aha.Classifier`) share that of the network."""
    while isinstance(inner := getattr(module, "guarded", None), nn.Module):
        module = inner
    with _making:
        return _guards.setdefault(module, _Guard())


@contextmanager
def locked(*modules: nn.Module) -> Iterator[None]:
    """No other thread runs or patches ``modules`` through this library inside. Nests."""
    # in one order for all threads, or two that need the same two would wait for one another
    guards = sorted({id(guard): guard for guard in map(_guard, modules)}.items())
    with ExitStack() as stack:
        for _, guard in guards:
            stack.enter_context(guard.lock)
        yield


@contextmanager
def protected(*modules: nn.Module, gradients: bool = True) -> Iterator[None]:
    """What every public entry works in: `locked`, `undisturbed`, float32 under autocast.

    Args:
        modules: all networks that take part; the first one decides where autocast is switched off.
        gradients: autograd is on inside; False leaves it, and inference mode, as the caller has it.
    """
    place = next(modules[0].parameters(), None)
    device = place.device if place is not None else torch.device("cpu")
    with ExitStack() as stack:
        stack.enter_context(locked(*modules))
        for module in modules:
            stack.enter_context(_frozen(module))
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(autocast("fp32", device))
        if gradients:
            stack.enter_context(recording())
        yield


@contextmanager
def undisturbed(
    module: nn.Module, hooks: Sequence[tuple[nn.Module, Callable]] = (), unfused: bool = False
) -> Iterator[None]:
    """The module locked, in evaluation mode, parameters without gradients, autograd on; all as before on exit.

    Args:
        hooks: pairs of a submodule and a forward hook that live as long as the context.
        unfused: compute attention step by step, so that hooks see its softmax, and without checkpointing,
            which would run the hooks twice.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module is {describe(module)}: give a torch.nn.Module")
    if not isinstance(unfused, bool):
        raise ValueError(f"unfused={short(unfused)}: give True or False")
    switches = ("fused_attn", "grad_checkpointing") if unfused else ()
    with ExitStack() as stack:
        stack.enter_context(locked(module))
        stack.enter_context(_frozen(module))
        if switches:
            stack.enter_context(switched_off(module, *switches))
        for submodule, hook in hooks:
            stack.callback(submodule.register_forward_hook(hook).remove)
        stack.enter_context(recording())
        yield


def steady(module: nn.Module) -> Any:
    """For a single pass of ``module``: locked, and in evaluation mode if somebody has put it into training mode."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return _evaluating(module) if module.training else locked(module)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    with locked(module), _frozen(module):
        yield


@contextmanager
def recording() -> Iterator[None]:
    """Autograd on, inference mode off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, parameters without gradients, nothing compiled; the caller holds the lock.

    Only the outermost one of a thread has anything to do.
    """
    guard = _guard(module)
    if guard.depth:
        guard.depth += 1
        try:
            yield
        finally:
            guard.depth -= 1
        return
    modules = list(module.modules())
    training = [(m, m.training) for m in modules]
    requiring = [p for p in module.parameters() if p.requires_grad]
    compiled = [(m, vars(m)[name], name) for m in modules for name in _COMPILED if _is_compiled(m, name)]
    guard.depth = 1
    try:
        for m, mode in training:
            if mode:
                m.training = False
        for p in requiring:
            p.requires_grad_(False)
        for m, _, name in compiled:
            # past OptimizedModule.__setattr__, which would set it on the module inside
            vars(m)[name] = None if name == "_compiled_call_impl" else m.get_submodule("_orig_mod").__call__
        yield
    finally:
        guard.depth = 0
        for m, mode in training:
            if m.training != mode:
                m.training = mode
        for p in requiring:
            p.requires_grad_(True)
        for m, call, name in compiled:
            vars(m)[name] = call


# where ``module.compile()`` and ``torch.compile(module)`` keep what they compiled: hooks do not fire inside it, and
# rules for gradients do not reach it
_COMPILED = ("_compiled_call_impl", "forward")


def _is_compiled(module: nn.Module, name: str) -> bool:
    if name == "forward":
        parts = vars(module).get("_modules")
        return "forward" in vars(module) and isinstance(parts, dict) and "_orig_mod" in parts
    return vars(module).get(name) is not None
