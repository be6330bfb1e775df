"""What a training and an evaluation take, before they are begun: passes, FLOPs, memory, hours, cost (``aha plan``).

Passes are known exactly. With S fractions (both ends among them), R = 1 reference a step and M maps per image (one per
target class, or one that is shared), a training step takes for an image

    targets     1 F                              the predicted classes
    explainer   1 F and M B with evidence, and 1 F where the encoder is the classifier
    objective   M·R·(2(S − 2) + 2) F and M·R·2(S − 2) B     perturbed images, and the two ends of the curves

F a forward and B a backward pass of the classifier; their number does not depend on the grids, which set the size of a
few operators only. Every ``log_every`` steps, four images more are explained. An evaluation takes per image
1 + references F for all methods together, and per map what the method takes (`Attributor.passes`) and
inner points × (deleting + inserting references) F (`Protocol.passes`); all of it per target.

Time is passes × time per pass, with what a few real steps of the trainer on random weights and noise took:

    seconds of a step = b·(u·Σ(F + ρ·B of the objective) + v) + w + all-reduce + data wait

u seconds a forward pass in the objective, its operators included; ρ a backward pass in forward passes; v all else that
grows with images: targets, explainer, decoder; w the optimizer. All are measured, at the settings asked for, or with
fewer images and fractions where such a step takes long, which is said. Of n processes each takes b = ⌈batch/n⌉ images
of every step; they are assumed to be as fast as one alone. The all-reduce moves 2(n − 1)/n × the decoder's
gradients once a step over a link whose bandwidth must be given: it is not measured here, and counts as 0, with
its size said, where it is not given. Data wait is max(0, b·image / workers − step) where a folder is given to read
from, b·image without workers; its images per second are said where none is.

Memory is weights, gradients and both of AdamW's moments of the decoder, and what two graphs keep for their backward
passes, counted in one real pass: the decoder's for one part of a batch, and the classifier's for one chunk of perturbed
images or the evidence of the part. What operations need beside that is the peak of a measured step beyond this sum: on
a GPU tensors, which are taken to grow with it; on a CPU mostly the scratch of libraries, which is taken to stay.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import tyro
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from . import terminal
from .attributors import Attributor, MethodSpec, Passes, count_passes
from .checks import check_arguments, check_integer, check_number, checked
from .classifier import RANDOM, Classifier, from_name
from .data import workers_for
from .evaluation import evaluate
from .explainer import Explainer
from .explainer.decoder import DecoderConfig
from .files import read_json
from .kernels.messages import short
from .memory import peak_bytes, per_pass
from .metrics import PROTOCOLS, Protocol, Suite
from .metrics.protocols import get as get_protocol
from .objective import Objective
from .precision import autocast, uses_bf16
from .protection import protected, recording
from .recipes import RECIPES
from .source import Source
from .training import TrainConfig, Trainer
from .training.trainer import make_objective

BLURS = 3.4  # that "adaptive_blur" tries per photograph: bench/results/mda_table_cpu.json
SECONDS = 5.0  # that a measured step may take before it is made smaller
ROUNDS = 3  # timed steps, after a warm one
NOT_COUNTED = (
    "fetching and loading weights, writing checkpoints, reports, restarts",
    "cores that processes share, other users of the machine, throttling",
    "what masks, clusters and blurs of a method need beside passes, where the method is too slow to be timed here",
)


@dataclass(frozen=True)
class StepTime:
    """What a few real training steps took here, per unit of what they did.

    Attributes:
        device, precision, torch: where, and in what.
        classifier, encoder: of the explainer that was trained.
        batch, fractions, maps: of the steps: smaller than those planned where these would take long.
        per_pass: u, seconds of a forward pass of one perturbed image in the objective, its operators included.
        backward: ρ, a backward pass in forward passes.
        per_image: v, seconds of all else that an image takes in a step.
        per_step: w, seconds of the optimizer.
        seconds: of the timed steps, each.
        excess: memory of such a step beyond `training_memory` as a share of it, ≥ 0; None where it cannot be told.
        scratch: the same in bytes on a CPU: there it is mostly what libraries and the heap hold beside tensors.
    """

    device: str
    precision: str
    torch: str
    classifier: str
    encoder: str
    batch: int
    fractions: int
    maps: int
    per_pass: float
    backward: float
    per_image: float
    per_step: float
    seconds: tuple[float, ...]
    excess: float | None = None
    scratch: float | None = None

    @property
    def spread(self) -> tuple[float, float]:
        """The fastest and the slowest of the timed steps, as shares of the median."""
        middle = median(self.seconds)
        return min(self.seconds) / middle, max(self.seconds) / middle


@dataclass(frozen=True)
class Part:
    """One line of a plan.

    Attributes:
        what: is done.
        images: that it is done with, all targets and epochs counted.
        forward, backward: passes of the classifier per image.
        flops: of all images; NaN where it was not counted.
        hours: of one machine with all GPUs at work.
        low, high: hours by the fastest and the slowest of the timed rounds.
        disk: bytes that are kept.
        how: the time was found.
    """

    what: str
    images: int
    forward: float
    backward: float
    flops: float
    hours: float
    low: float
    high: float
    disk: float = 0.0
    how: str = "step"


@dataclass
class Plan:
    """What `training` and `evaluation` found.

    Attributes:
        parts: lines of the table.
        memory: what it is for → bytes, of one process while it trains; ``total`` is their sum.
        step: seconds of a planned step, by part: compute, all_reduce, data_wait.
        measured: see `StepTime`.
        notes: what was assumed, and what is not counted.
        gpus, price: how many, and of one for an hour.
    """

    parts: list[Part] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    step: dict[str, float] = field(default_factory=dict)
    measured: StepTime | None = None
    notes: list[str] = field(default_factory=list)
    gpus: int = 1
    price: float | None = None

    @property
    def hours(self) -> float:
        """Of all parts."""
        return sum(part.hours for part in self.parts)

    @property
    def cost(self) -> float | None:
        """Of all parts on all GPUs; None where there is no price."""
        return None if self.price is None else self.hours * self.gpus * self.price

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON types."""
        whole = dataclasses.asdict(self)
        whole["hours"], whole["cost"] = self.hours, self.cost
        for part in whole["parts"]:
            part["flops"] = None if math.isnan(part["flops"]) else part["flops"]
        return whole


def of_training(config: TrainConfig, clf: Classifier, explainer: Explainer) -> Passes:
    """Passes that training takes for one image: target classes, explainer, objective; the diagnosis of four images for
    every line of the log."""
    maps = 1 if config.shared_map else config.targets
    forward, backward = explainer.passes
    diagnosed = min(4, config.batch_size) / config.batch_size / config.log_every
    explained = Passes(forward, maps * backward) + diagnosed * Passes(1 + forward, backward)
    return Passes(1) + explained + Passes(*_ranking(config, clf).passes) * maps


def of_protocols(
    protocols: Sequence[str | Protocol], clf: Classifier, sample: Mapping[str, Any]
) -> tuple[Passes, Passes]:
    """Forward passes of ``protocols`` and of localisation: per image for all methods together, and per map.

    Args:
        sample: "image" (B,C,H,W) and, where known, "label" and "mask": with them, the share of the images that takes
            part and the blurs that they need are counted.
    """
    shared = per_map = 0.0
    for protocol in dict.fromkeys((*protocols, "localisation")):
        suite = Suite(clf, protocol)
        blurs, share = BLURS, 1.0
        if "label" in sample:
            with count_passes(clf) as counted:
                batch = suite.begin(sample["image"], None, sample["label"], sample["mask"])
            fewest = suite.protocol.passes(clf.input_size, blurs=0).shared
            blurs = counted.forward / len(sample["image"]) - fewest
            share = float(batch.takes_part.float().mean())
        cost = suite.protocol.passes(clf.input_size, blurs=blurs)
        shared, per_map = shared + cost.shared, per_map + share * cost.per_map
    return Passes(shared), Passes(per_map)


def time_of_a_pass(clf: Classifier, batch: int = 8, seconds: float = 1.0) -> tuple[float, float]:
    """Seconds of a forward pass of one of ``batch`` images in float32, and of a backward pass in forward passes.

    Medians of rounds that take turns, for ``seconds`` and at least three.
    """
    pixels = torch.rand(batch, len(clf.mean), *clf.input_size, device=clf.device)
    taken: dict[str, list[float]] = {"forward": [], "both": []}

    def forward() -> None:
        with torch.no_grad():
            clf(pixels)

    def both() -> None:
        leaf = pixels.requires_grad_()
        torch.autograd.grad(clf(leaf).sum(), leaf)

    calls: dict[str, Callable[[], None]] = {"forward": forward}
    if clf.differentiable:
        calls["both"] = both
    with protected(clf):
        for call in calls.values():
            call()
        end = now(clf.device) + seconds
        while len(taken["forward"]) < ROUNDS or now(clf.device) < end:
            for name, call in calls.items():
                start = now(clf.device)
                call()
                taken[name].append(now(clf.device) - start)
    once = median(taken["forward"])
    return once / batch, median(taken["both"]) / once - 1 if taken["both"] else 0.0


def untrained(name: str) -> Classifier:
    """The classifier of that name with random weights, which take as long as others; on the GPU if there is one."""
    own = name if name in RECIPES or name.startswith((RANDOM, "hf:")) else f"{RANDOM}{name}"
    return from_name(own).to("cuda" if torch.cuda.is_available() else "cpu")


def measure_step(explainer: Explainer, clf: Classifier, config: TrainConfig, seconds: float = SECONDS) -> StepTime:
    """Time real steps of the trainer on noise: one to get warm and `ROUNDS` more.

    Args:
        seconds: a step that would take longer is made with fewer images, then with fewer fractions.
    """
    chunk = _ranking(config, clf).chunk
    assert chunk is not None
    once, backward = time_of_a_pass(clf, min(8, chunk), min(1.0, seconds))
    small = _affordable(config, explainer, clf, once, backward, seconds)
    images = [{"image": torch.rand(len(clf.mean), *clf.input_size)} for _ in range(small.batch_size)]
    clock = _Clock(make_objective(small, clf), clf.device)
    trainer = Trainer(explainer, clf, images, small, objective=clock)  # type: ignore[arg-type]
    ends: list[tuple[float, float, float]] = []  # when a step was done, and what objective and optimizer took of it
    update = [0.0]
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)

    def begin(*_: Any) -> None:
        update[0] = now(clf.device)

    def end(*_: Any) -> None:
        done = now(clf.device)
        ends.append((done, clock.seconds, done - update[0]))
        clock.seconds = 0.0

    hooks = optimizer.register_step_pre_hook(begin), optimizer.register_step_post_hook(end)
    try:
        trainer.fit(progress=False)
    finally:
        for hook in hooks:
            hook.remove()
    whole = [done - before for (before, *_), (done, *_) in itertools.pairwise(ends)]
    objective, optimizing = (median(values[n] for values in ends[1:]) for n in (1, 2))
    forward_passes, backward_passes = _ranking(small, clf).passes
    maps = small.batch_size * (1 if small.shared_map else small.targets)
    return StepTime(
        device=device_name(clf.device),
        precision="bf16" if uses_bf16(config.precision, clf.device, clf.dtype) else "fp32",
        torch=torch.__version__,
        classifier=clf.name.removeprefix(RANDOM),
        encoder=_encoder_of(explainer),
        batch=small.batch_size,
        fractions=small.fractions,
        maps=maps // small.batch_size,
        per_pass=objective / maps / (forward_passes + backward * backward_passes),
        backward=backward,
        per_image=max(0.0, median(whole) - objective - optimizing) / small.batch_size,
        per_step=optimizing,
        seconds=tuple(whole),
        **_beyond(explainer, clf, small, images),
    )


def _beyond(explainer: Explainer, clf: Classifier, config: TrainConfig, images: Any) -> dict[str, float]:
    """The peak of a step beyond what is counted, as `StepTime` has it."""
    one = dataclasses.replace(config, steps=1)
    planned = training_memory(explainer, clf, one)
    counted = planned["total"] - planned["weights"]  # the networks are there already
    peak = peak_bytes(lambda: Trainer(explainer, clf, images, one).fit(progress=False), clf.device)
    if math.isnan(peak):
        return {}
    beyond = max(0.0, peak - counted)
    return {"excess": beyond / counted} if clf.device.type == "cuda" else {"scratch": beyond}


@checked
def training(
    explainer: Explainer,
    clf: Classifier,
    config: TrainConfig,
    images: int,
    gpus: int = 1,
    price: float | None = None,
    link: float | None = None,
    read_seconds: float | None = None,
    measured: StepTime | None = None,
) -> Plan:
    """The plan of ``Trainer(explainer, clf, data, config).fit()`` for ``images`` images.

    Args:
        gpus: processes, one a GPU (or one a CPU machine, as here measured).
        price: of one of them for an hour, in any currency.
        link: bandwidth between two of them in GB/s.
        read_seconds: that reading one image takes; None does not count it.
        measured: of `measure_step`, by default of this machine now.
    """
    check_integer("images", images, 1)
    check_integer("gpus", gpus, 1)
    for name, value in (("price", price), ("link", link)):
        if value is not None:
            check_number(name, value, 0, above=name == "link")
    objective = _ranking(config, clf)
    measured = measured or measure_step(explainer, clf, config)
    if config.chunk is None and measured.excess is not None:  # of a GPU, wherever the plan is made
        config = dataclasses.replace(config, chunk=per_pass(torch.device("cuda")))
    maps = 1 if config.shared_map else config.targets
    if (found := (measured.classifier, measured.encoder, measured.maps)) != (
        expected := (clf.name.removeprefix(RANDOM), _encoder_of(explainer), maps)
    ):
        raise ValueError(
            f"not measured: the step is of {_described(*found)}, the plan of {_described(*expected)}: run aha plan "
            "--json with these settings on that machine"
        )
    if config.batch_size < gpus:
        raise ValueError(f"batch_size={config.batch_size} is less than one image for {gpus} processes each")
    own = dataclasses.replace(
        config, batch_size=math.ceil(config.batch_size / config.accumulate / gpus) * config.accumulate
    )
    forward_passes, backward_passes = objective.passes
    of_maps = maps * (forward_passes + measured.backward * backward_passes) * measured.per_pass
    diagnosed = min(4, own.batch_size) * measured.per_image / config.log_every
    compute = own.batch_size * (of_maps + measured.per_image) + measured.per_step + diagnosed
    trained = [value for value in explainer.decoder.parameters() if value.requires_grad]
    moved = 2 * (gpus - 1) / gpus * sum(map(_bytes, trained))
    step = {"compute": compute, "all_reduce": moved / (link * 1e9) if link else 0.0, "data_wait": 0.0}
    busy = sum(step.values())
    if read_seconds is not None:
        reading = own.batch_size * read_seconds / max(1, config.workers or 0)
        step["data_wait"] = max(0.0, reading - busy) if config.workers else reading
    steps = config.steps or max(1, round(config.epochs * images / config.batch_size))
    seen, passes = steps * config.batch_size, of_training(config, clf, explainer)
    hours = steps * sum(step.values()) / 3600
    low, high = (share * steps * compute / 3600 + hours - steps * compute / 3600 for share in measured.spread)
    flops = seen * _training_flops(config, clf, explainer)
    part = Part("training", seen, passes.forward, passes.backward, flops, hours, low, high)
    memory = training_memory(explainer, clf, own)
    operations = (measured.excess or 0.0) * (memory["total"] - memory["weights"]) + (measured.scratch or 0.0)
    if operations:
        memory["operations"] = operations
        memory["total"] += operations
    plan = Plan([part], memory, step, measured, _assumed(measured, config), gpus, price)
    if gpus > 1:
        size = f"{moved / 1e6:,.1f} MB a step and GPU"
        known = (
            f"at {link:g} GB/s" if link else f"not counted: give --link; 1 % of a step at {moved / busy / 1e7:.2g} GB/s"
        )
        plan.notes += [f"all-reduce of {size}, {known}", "assumed: every GPU steps as fast as one alone"]
    if read_seconds is None:
        plan.notes.append(f"data wait not counted: images must come at {own.batch_size / busy:,.1f} a second and GPU")
    return plan


@checked
def evaluation(
    clf: Classifier,
    methods: Sequence[MethodSpec],
    images: int,
    protocols: Sequence[str | Protocol] = ("aha",),
    targets: int = 1,
    gpus: int = 1,
    price: float | None = None,
    batch_size: int = 32,
    seconds: float = SECONDS,
    crops: int = 1,
) -> Plan:
    """The plan of `evaluate` and `compare` for ``images`` images.

    Args:
        targets: kinds of target, one or two.
        gpus: processes, which share the images.
        price: of one of them for an hour.
        batch_size: images at a time.
        seconds: a method that takes longer for one image is not timed: its passes are.
        crops: of every image, where protocols crop differently; methods explain each.
    """
    check_integer("images", images, 1)
    check_integer("gpus", gpus, 1)
    sample = torch.rand(min(batch_size, 4), len(clf.mean), *clf.input_size).to(clf.device)
    once, backward = time_of_a_pass(clf, len(sample), min(1.0, seconds))
    taken, spread = _time_of_measuring(clf, sample, seconds, once)
    shared, per_map = of_protocols([get_protocol(protocol) for protocol in protocols], clf, {"image": sample})
    flops = flops_of_a_pass(clf)
    count = images * targets
    plan = Plan(gpus=gpus, price=price, notes=["methods and metrics: float32, noise, random weights"])

    def add(what: str, passes: Passes, own: float | None, size: float = 0.0) -> None:
        rest = passes + -1 * Passes(*dataclasses.astuple(timed)) if own is not None else passes
        each = (own or 0.0) + taken * (rest.forward + backward * rest.backward)
        hours = count * each / 3600 / gpus
        cost = count * (passes.forward * flops[0] + passes.backward * flops[1])
        how = "timed" if own is not None else "passes"
        plan.parts.append(
            Part(
                what,
                count,
                passes.forward,
                passes.backward,
                cost,
                hours,
                spread[0] * hours,
                spread[1] * hours,
                size,
                how,
            )
        )

    timed = Passes()
    add("what all methods share", shared, None)
    for spec in methods:
        method = spec.create(clf, 0)
        passes = method.passes(sample[:1])
        own = _time_of_a_map(method, sample, seconds, taken * (passes.forward + backward * passes.backward))
        timed = crops * passes if own is not None else Passes()
        kept = crops * count * sample.shape[-2] * sample.shape[-1] * 2
        add(spec.label, crops * passes + per_map, None if own is None else crops * own, kept)
    return plan


def training_memory(explainer: Explainer, clf: Classifier, config: TrainConfig) -> dict[str, float]:
    """Bytes by what they are for, of one process while it trains."""
    encoder, decoder = explainer.encoder, explainer.decoder
    trained = sum(_bytes(value) for value in decoder.parameters() if value.requires_grad)
    others = [clf.module, decoder, *([encoder.module] if encoder and encoder.module is not clf.module else [])]
    maps = 1 if config.shared_map else config.targets
    part = config.batch_size // config.accumulate
    objective = _ranking(config, clf)
    assert objective.chunk is not None
    at_once = min(part * maps, objective.chunk // 2)
    inner = objective.passes[1] // 2
    perturbed = 2 * at_once * min(inner, max(1, objective.chunk // (2 * at_once)))
    pixels = torch.rand(1, len(clf.mean), *clf.input_size, device=clf.device)
    target = torch.zeros(1, maps, dtype=torch.int64, device=clf.device)
    with protected(clf), autocast(config.precision, clf.device, clf.dtype), _kept(clf.module) as of_pass:
        clf(pixels.requires_grad_())
    with protected(clf), _kept(*explainer.networks) as of_maps:
        explainer(pixels.detach(), target, precision=config.precision)
    of_evidence = [0]
    if explainer.sees_evidence:  # whose graph is gone when the decoder's is made
        with protected(clf), _kept(clf.module) as of_evidence:
            explainer.evidence(pixels.detach(), target)
    image = _bytes(pixels)
    decoding = part * (of_maps[0] - of_evidence[0])
    scoring = perturbed * (of_pass[0] + image)
    values = [value for network in others for value in (*network.parameters(), *network.buffers())]
    memory = {
        "weights": float(sum(map(_bytes, values))),
        "gradients and moments": 3.0 * trained,
        "graph of the decoder": float(decoding),
        "graph of the classifier": float(max(scoring, part * of_evidence[0] - decoding)),
        "images and references": float(2 * config.batch_size * image + 2 * part * maps * image),
    }
    return {**memory, "total": sum(memory.values())}


def flops_of_a_pass(clf: Classifier) -> tuple[float, float]:
    """FLOPs of a forward and of a backward pass to the pixels of one image, a multiplication and an addition being two.

    Matrix products, convolutions and attention are counted.
    """
    pixels = torch.rand(1, len(clf.mean), *clf.input_size, device=clf.device)
    with protected(clf), _Flops() as flops:
        with torch.no_grad():
            clf(pixels)
        forward = flops.total
        if not clf.differentiable:
            return forward, math.nan
        clf(pixels.requires_grad_()).sum().backward()
    return forward, flops.total - 2 * forward


def device_name(device: torch.device) -> str:
    """What it is, for tables; of a CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or device.type}, {torch.get_num_threads()} threads"


def _training_flops(config: TrainConfig, clf: Classifier, explainer: Explainer) -> float:
    """Of one image in a step: the classifier's passes by number, those of encoder and decoder as they are."""
    forward, backward = flops_of_a_pass(clf)
    maps = 1 if config.shared_map else config.targets
    pixels = torch.rand(1, len(clf.mean), *clf.input_size, device=clf.device)
    target = torch.zeros(1, maps, dtype=torch.int64, device=clf.device)
    with protected(*explainer.networks), _Flops() as explained:
        for value in explainer.decoder.parameters():
            value.requires_grad_()
        explainer(pixels, target).sum().backward()
    explainer.zero_grad(set_to_none=True)
    objective = _ranking(config, clf).passes
    return forward + explained.total + maps * (objective[0] * forward + objective[1] * backward)


def _ranking(config: TrainConfig, clf: Classifier) -> Objective:
    objective = make_objective(config, clf)
    if not isinstance(objective, Objective):
        raise ValueError(f"objective={config.objective!r} cannot be planned: plans are of the objective 'ranking'")
    return objective


def _affordable(
    config: TrainConfig, explainer: Explainer, clf: Classifier, once: float, backward: float, seconds: float
) -> TrainConfig:
    """The settings of the steps to time: those asked for, or with as many images and fractions as ``seconds`` allow."""

    def takes(fractions: int) -> float:
        passes = of_training(dataclasses.replace(config, fractions=fractions), clf, explainer)
        return once * (passes.forward + backward * passes.backward)

    changes: dict[str, Any] = {}
    if config.batch_size * takes(config.fractions) > seconds:
        fewest = 3 if config.ends else 1
        fractions = config.fractions
        while fractions > max(fewest, 4) and takes(fractions) > seconds:
            fractions -= 1
        size = max(1, min(config.batch_size, int(seconds / takes(fractions))))
        changes = {"batch_size": size, "accumulate": 1, "fractions": fractions}
    quiet: dict[str, Any] = {"output": None, "steps": 1 + ROUNDS, "workers": 0, "log_every": 10**6, "save_every": 0}
    return dataclasses.replace(config, **quiet, **changes)


class _Flops(TorchDispatchMode):
    """Counts as torch.utils.flop_counter does, whose own mode hangs hooks on modules that evidence stumbles over."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __enter__(self) -> _Flops:
        # attention in parts that are known on every device
        self._parts = sdpa_kernel(SDPBackend.MATH)
        self._parts.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._parts.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class _Clock:
    """An objective that is timed."""

    def __init__(self, objective: Any, device: torch.device):
        self.objective, self.device, self.seconds = objective, device, 0.0

    def __call__(self, *args: Any, **options: Any) -> Any:
        start = now(self.device)
        out = self.objective(*args, **options)
        self.seconds += now(self.device) - start
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)


def _time_of_measuring(
    clf: Classifier, sample: Tensor, seconds: float, once: float
) -> tuple[float, tuple[float, float]]:
    """Seconds of a forward pass in an evaluation of the real engine, and its fastest and slowest as shares of it.

    Curves have as many of the protocol's points as the time allows, at least five: what is done once per map weighs
    more where they are few.
    """
    whole = PROTOCOLS["aha"]
    assert whole.points is not None
    per_point = 2 * len(whole.references) * len(sample) * once
    points = max(5, min(whole.points, 2 + int(seconds / (ROUNDS + 1) / per_point)))
    short = dataclasses.replace(whole, points=points)
    data: Any = [{"image": image, "label": -1} for image in sample.cpu()]
    maps = torch.rand(len(sample), 1, *sample.shape[-2:], device=sample.device)
    cost = short.passes(clf.input_size)
    # localisation looks at the image too
    passes = len(sample) * (cost.shared + cost.per_map + PROTOCOLS["localisation"].passes(clf.input_size).shared)
    taken: list[float] = []
    end = now(clf.device) + seconds
    while len(taken) <= ROUNDS or (now(clf.device) < end and len(taken) < 20):
        start = now(clf.device)
        evaluate(clf, {"noise": lambda images, _: maps[: len(images)]}, data, protocol=short, batch_size=len(data))
        taken.append((now(clf.device) - start) / passes)
    taken = taken[1:]
    middle = median(taken)
    return middle, (min(taken) / middle, max(taken) / middle)


def _time_of_a_map(method: Attributor, sample: Tensor, seconds: float, expected: float) -> float | None:
    """Seconds of one map of a batch, or None for a method that would take too long to time."""
    size = min(len(sample), int(seconds / expected / (ROUNDS + 1)) if expected else len(sample))
    if not size:
        return None
    images, target = sample[:size], torch.zeros(size, dtype=torch.int64, device=sample.device)
    taken = []
    for _ in range(ROUNDS + 1):
        start = now(sample.device)
        method.attribute(images, target)
        taken.append(now(sample.device) - start)
    return median(taken[1:]) / size


@contextmanager
def _kept(*networks: torch.nn.Module) -> Iterator[list[int]]:
    """Bytes that autograd saves of what runs inside, the weights of ``networks`` not counted."""
    known = {value.untyped_storage().data_ptr() for n in networks for value in (*n.parameters(), *n.buffers())}
    saved: dict[int, Tensor] = {}  # which keeps them alive: no two of them are at one place
    total = [0]

    def pack(value: Tensor) -> Tensor:
        place = value.untyped_storage().data_ptr()
        if place not in known:
            saved[place] = value.detach()
        return value

    with recording(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield total
    total[0] = sum(value.untyped_storage().nbytes() for value in saved.values())


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def now(device: torch.device) -> float:
    """Seconds of a clock, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _encoder_of(explainer: Explainer) -> str:
    if explainer.encoder is None:
        return "evidence"
    name = str(explainer.encoder.source.get("name")).removeprefix(RANDOM)
    return f"{name} and evidence" if explainer.sees_evidence else name


def _described(classifier: str, encoder: str, maps: int) -> str:
    return f"{classifier} with {encoder}, {maps} maps an image"


def _assumed(measured: StepTime, config: TrainConfig) -> list[str]:
    low, high = measured.spread
    asked = (config.batch_size, config.fractions)
    size = f"batch {measured.batch}, S = {measured.fractions}"
    scaled = (
        "as planned" if asked == (measured.batch, measured.fractions) else f"scaled to batch {asked[0]}, S = {asked[1]}"
    )
    peak = "" if measured.excess is None else f"; peak of a step {measured.excess:+.0%} beyond what was counted"
    if measured.scratch is not None:
        peak = f"; peak of a step {measured.scratch / 2**20:,.0f} MiB beyond what was counted"
    return [
        f"measured on {measured.device} in {measured.precision}: {len(measured.seconds)} steps of {size}, {scaled}; "
        f"fastest and slowest {low:.0%} and {high:.0%} of the median{peak}"
    ]


def read_time(data: Any, count: int = 8) -> float:
    """Seconds to read one image of a data set, the median of ``count`` spread over it."""
    size = len(data)
    taken = []
    for number in range(min(count, size)):
        start = time.perf_counter()
        data[number * size // min(count, size)]
        taken.append(time.perf_counter() - start)
    return median(taken)


def command(
    source: Annotated[Source, tyro.conf.arg(name="")] = Source(),  # noqa: B008 - frozen; tyro shows its fields
    images: int | None = None,
    encoder: str | None = None,
    evidence: bool = True,
    decoder: DecoderConfig = DecoderConfig(),  # noqa: B008
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(),  # noqa: B008
    gpus: int = 1,
    price: float | None = None,
    link: float | None = None,
    methods: tuple[str, ...] = (),
    protocols: tuple[str, ...] = ("aha",),
    targets_evaluated: tuple[str, ...] = ("predicted",),
    images_evaluated: int = 50_000,
    measured: Path | None = None,
    json: bool = False,
) -> None:
    """What training, and evaluation with --methods, would take: passes, FLOPs, memory, hours and cost.

    A few real steps are timed on this machine, with random weights on noise; docs/plan.md has the law that they are
    scaled by, and what is not counted. A card that is not here is planned from the --json of one that was measured.

    Args:
        images: to train on; default: those of --data. Without a folder their reading is not counted.
        encoder: as of train.
        evidence: as of train.
        decoder: widths, where there is an encoder.
        gpus: processes, one a GPU.
        price: of a GPU for an hour, in any currency.
        link: bandwidth between two GPUs in GB/s, for the all-reduce of the gradients.
        methods: plan the evaluation of these methods too, as compare takes them.
        protocols: of the evaluation.
        targets_evaluated: predicted, true or both.
        images_evaluated: number of images of the evaluation.
        measured: output of --json on the machine that the plan is for, instead of timing this one.
        json: for machines.
    """
    clf = untrained(source.classifier)
    evidence = evidence and config.objective == "ranking"
    alone = evidence and encoder is None
    widths = None if alone else decoder
    explainer = Explainer.build(clf, encoder, pretrained=False, decoder=widths, evidence=evidence)
    read = None
    if images is None or source.data != "scenes":
        data = source.images(clf.input_size, training=True, augment=True, seed=config.seed)
        images, read = len(data) if images is None else images, read_time(data)
        config = dataclasses.replace(config, workers=workers_for(data, config.workers))
    step = None if measured is None else step_from_json(measured)
    whole = training(explainer, clf, config, images, gpus, price, link, read, step)
    if methods:
        specs = [MethodSpec.parse(text) for text in methods]
        crops = 1 if source.data == "scenes" else len({get_protocol(name).preprocessing for name in protocols})
        if step is not None and step.device != device_name(clf.device):
            raise ValueError(f"not measured: an evaluation on {step.device}; run aha plan with --methods there")
        found = evaluation(clf, specs, images_evaluated, protocols, len(targets_evaluated), gpus, price, crops=crops)
        whole.parts += found.parts
        whole.notes += found.notes
    _print(whole, clf, json)


def step_from_json(path: Path) -> StepTime:
    """The measured step in the output of ``aha plan --json``; ValueError for another file."""
    try:
        found = read_json(Path(path))["measured"]
        step = StepTime(**{**found, "seconds": tuple(found["seconds"])})
        check_arguments(StepTime, vars(step))
        for name in ("device", "precision", "torch", "classifier", "encoder"):
            if not getattr(step, name).isprintable() or len(getattr(step, name)) > 300:
                raise ValueError(f"{name}={short(getattr(step, name))}: give a name")
        for name in ("batch", "fractions", "maps"):
            check_integer(name, getattr(step, name), 1)
        for name in ("per_pass", "backward", "per_image", "per_step"):
            check_number(name, getattr(step, name), 0)
        for seconds in step.seconds or (0.0,):
            check_number("seconds", seconds, 0, above=True)
        for name in ("excess", "scratch"):
            if getattr(step, name) is not None:
                check_number(name, getattr(step, name), 0)
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no measured step ({error}): give the output of aha plan --json") from error
    return step


def _duration(hours: float) -> str:
    """With its unit, in three digits."""
    for unit, size in (("h", 1.0), ("min", 1 / 60)):
        if hours >= size:
            return f"{float(f'{hours / size:.3g}'):,g} {unit}"
    return f"{3600 * hours:.3g} s"


def _print(plan: Plan, clf: Classifier, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**plan.to_json(), "not_counted": NOT_COUNTED}, indent=2))
        return
    name = clf.name.removeprefix(RANDOM)
    assert plan.measured is not None
    table = Table(title=f"{name} on {plan.gpus} × {plan.measured.device}")
    table.add_column("what")
    for heading in ("images", "F / image", "B / image", "PFLOP", "time", "between", "cost", "disk GB"):
        table.add_column(heading, justify="right")
    for part in plan.parts:
        table.add_row(
            part.what,
            f"{part.images:,}",
            f"{part.forward:,.1f}",
            f"{part.backward:,.1f}",
            "" if math.isnan(part.flops) else f"{part.flops / 1e15:,.3g}",
            _duration(part.hours),
            f"{_duration(part.low)} … {_duration(part.high)}",
            "" if plan.price is None else f"{part.hours * plan.gpus * plan.price:,.2f}",
            f"{part.disk / 1e9:,.2f}" if part.disk else "",
        )
    table.add_section()
    total = "" if plan.cost is None else f"{plan.cost:,.2f}"
    table.add_row(
        "all", "", "", "", "", _duration(plan.hours), "", total, f"{sum(p.disk for p in plan.parts) / 1e9:,.2f}"
    )
    console = terminal.console()
    console.print(table)
    step = ", ".join(f"{what.replace('_', ' ')} {seconds:,.3g} s" for what, seconds in plan.step.items())
    console.print(f"step: {step}")
    memory = ", ".join(f"{what} {size / 2**30:,.2f}" for what, size in plan.memory.items())
    console.print(f"memory of a process in GiB: {memory}")
    for note in plan.notes:
        console.print(note)
    console.print(f"not counted: {'; '.join(NOT_COUNTED)}")
