"""Trains an explainer for an objective: the differentiable ranking (paper §3, §4.1), or Shapley values."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
import uuid
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .. import files, lock, processes, references, shapley, signals
from .._version import __version__
from ..calibration import MeanCurves
from ..checks import (
    check_arguments,
    check_choice,
    check_images,
    check_integer,
    check_label,
    check_number,
    check_seed,
    checked,
    checked_fields,
)
from ..classifier import Classifier, check_classifier
from ..data import fit_labels, identity, readable, workers_for
from ..evidence import ROLES
from ..explainer import Explainer
from ..identity import fingerprint
from ..kernels.messages import short
from ..memory import per_pass
from ..objective import Objective
from ..patches import aligned
from ..precision import autocast, uses_bf16
from ..protection import recording
from ..regions import Regions, default_cells, draw, grid
from ..shapley import ShapleyObjective
from . import checkpoint
from .averaging import MeanWeights
from .checkpoint import Checkpoint
from .events import Events
from .schedule import learning_rate, temperature

# (start, end, schedule, noise): `free` as published, `standardized` as measured in bench/results
TEMPERATURES = {"standardized": (0.05, 0.005, "geometric", 0.0), "free": (1.0, 0.3, "linear", 1.0)}

# of standardized scores, to train a trained explainer further: its order is there already, and soft ranks would blur it
CONTINUED = (0.015, 0.005)

# without an encoder: from few images the last step's weights are worse than those the training began with
AVERAGE = 2 / 3

# images of a batch whose maps are looked at for the log
DIAGNOSED = 4

# settings that may differ between the parts of a run
FREE = ("output", "workers", "log_every", "save_every")

T = TypeVar("T")

# what an explainer can be trained for → how a player of the Shapley game is absent
OBJECTIVES = {"ranking": None, **{name: absence for absence, name in shapley.METHODS.items()}}


_INTEGERS = {
    "steps": (1, 2**40),
    "batch_size": (1, 2**20),
    "accumulate": (1, 2**20),
    "fractions": (3, 4096),
    "n_iters": (1, 10_000),
    "coalitions": (2, 2**20),
    "chunk": (2, 2**20),
    "workers": (0, 1024),
    "log_every": (1, None),
    "save_every": (0, None),
}
_POSITIVE = ("epochs", "lr", "clip")
_NUMBERS = (
    "weight_decay",
    "warmup",
    "noise",
    "smooth",
    "weight_deletion",
    "weight_insertion",
    "weight_regularizer",
    "dropped_roles",
    "average",
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; the defaults are the paper's unless marked otherwise.

    Attributes:
        objective: "ranking" (AHA), "fastshap" or "vit_shapley" (Shapley values, see `aha.shapley`).
        output: folder for checkpoints, logs and the final explainer; None keeps nothing on disk.
        epochs: passes over the data; ``steps`` overrides it.
        batch_size: images per optimizer step, which all processes share (published: 32 per GPU).
        accumulate: the batch is processed in this many parts, their gradients added; batch norms see a part.
        lr, weight_decay, clip, warmup: AdamW, gradient norm, share of the steps.
        fractions: S, points on the curves.
        cells: range of the grid, cells along the shorter side; None scales 7…28 at 224 px with the image. Where
            whole patches are ranked (`aha.patches`), cells are made of those.
        offset: shift the grid by up to half a cell.
        scores: "standardized" (ours) or "free" (published); sets the default of ``tau`` and ``noise``.
        tau: (start, end); tau_schedule: "linear" or "geometric"; noise: scale of the Gumbel noise.
        ends, smooth: see `aha.Objective`.
        targets: explained classes per image: 1 is the prediction; 2 adds the label where the prediction is wrong, else
            the runner-up.
        shared_map: one map, made for the first target, serves all targets (published); default: a map per target
            (ours).
        references: one is drawn per batch; default: all of them for the ranking, the mean colour for fastshap.
            vit_shapley drops tokens and takes none.
        coalitions: sets of players per image and step, for the Shapley values.
        players: (rows, cols) of fastshap's grid; default: the patches of a vision transformer, else 16 px at 224.
        average: share of the steps, the last ones, whose mean weights the explainer gets; 0 takes the last step's.
            Default: ⅔ without an encoder (ours), 0 with one (published).
        dropped_roles: how often the decoder has to do without a role of the evidence, in [0, 1).
        chunk: perturbed images in memory at a time; default: `aha.memory.per_pass`.
        precision: of encoder and classifier, "auto" | "bf16" | "fp32".
        workers: processes that read images; None: for images on disk one per core but one, at most 8
            (`aha.data.workers_for`), else none.
        log_every, save_every: in steps; 0 never saves before the end.

    Raises:
        ValueError: in one line that names the setting, for a number that is none or out of range.
    """

    objective: str = "ranking"
    output: str | None = None
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 3e-4
    weight_decay: float = 1e-3
    clip: float = 1.0
    warmup: float = 0.06
    fractions: int = 16
    cells: tuple[int, int] | None = None
    offset: bool = True
    scores: str = "standardized"
    tau: tuple[float, float] | None = None
    tau_schedule: str | None = None
    noise: float | None = None
    ends: bool = True
    smooth: float = 1.0
    n_iters: int = 30
    weight_deletion: float = 1.0
    weight_insertion: float = 1.0
    weight_regularizer: float = 2.5e-3
    targets: int = 2
    shared_map: bool = False
    references: tuple[str, ...] | None = None
    coalitions: int = 32
    players: tuple[int, int] | None = None
    average: float | None = None
    dropped_roles: float = 0.0
    chunk: int | None = None
    precision: str = "auto"
    seed: int = 42
    workers: int | None = None
    log_every: int = 20
    save_every: int = 500

    @checked_fields
    def __post_init__(self) -> None:
        for name, (low, high) in _INTEGERS.items():
            value = getattr(self, name)
            if value is not None or name not in ("steps", "workers", "chunk"):
                check_integer(name, value, low, high)
        for name in _POSITIVE:
            check_number(name, getattr(self, name), 0, above=True)
        for name in _NUMBERS:
            if (value := getattr(self, name)) is not None:
                check_number(name, value, 0)
        for name in ("offset", "ends", "shared_map"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: give True or False")
        for name in ("cells", "tau", "players"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Sequence) or len(value) != 2):
                raise ValueError(f"{name}={value!r}: give two numbers")
        for name in ("cells", "players"):
            for value in getattr(self, name) or ():
                check_integer(name, value, 1, 4096)
        if self.cells is not None and self.cells[0] > self.cells[1]:
            raise ValueError(f"cells={self.cells}: give the coarsest and the finest grid, the smaller number first")
        for tau in self.tau or ():
            check_number("tau", tau, 0, above=True)
        uses_bf16(self.precision, torch.device("cpu"))
        if self.dropped_roles >= 1:
            raise ValueError(f"dropped_roles={self.dropped_roles}: give a share below 1")
        for name in ("warmup", "average"):
            if (getattr(self, name) or 0) > 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a share of the steps, at most 1")
        check_seed(self.seed)
        if self.output is not None and not isinstance(self.output, (str, Path)):
            raise ValueError(f"output={self.output!r}: give a folder")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}")
        if self.targets not in (1, 2):
            raise ValueError(f"targets={self.targets}: give 1 (prediction) or 2 (with the label or runner-up)")
        check_choice("scores", self.scores, tuple(TEMPERATURES))
        if self.tau_schedule not in (None, "linear", "geometric"):
            raise ValueError(f"tau_schedule={short(self.tau_schedule)} is not known: choose linear or geometric")
        check_choice("objective", self.objective, tuple(OBJECTIVES))
        if self.references is None:
            return
        if isinstance(self.references, str) or not isinstance(self.references, Sequence):
            raise ValueError(f"references={self.references!r}: give a tuple of names")
        if self.objective == "vit_shapley":
            raise ValueError(f"references={self.references}: vit_shapley drops tokens, leave the references out")
        unknown = set(self.references) - set(references.REFERENCES)
        if unknown or not self.references:
            raise ValueError(f"references={self.references}: choose one or more of {', '.join(references.REFERENCES)}")


class TrainingObjective(Protocol):
    """What the trainer asks of an objective: `Objective` and `ShapleyObjective` are two."""

    def __call__(
        self,
        images: Tensor,
        maps: Tensor,
        target: Tensor,
        references: Sequence[Tensor],
        regions: Regions,
        tau: float,
        noise: float,
        seed: Tensor,
    ) -> Any:
        """A NamedTuple of values per image (B,) that are logged by name; only ``loss`` carries a gradient.

        ``seed`` is (B,) int64, one per map, so that an image is treated alike whichever process has it. ``curves``,
        where there are any, are deletion and insertion (B, 2, S): of them the response is learnt.
        """

    def regions(self, height: int, width: int) -> Regions | None:
        """The grid for images of that size, or None where a random one is wanted."""

    def diagnose(self, maps: Tensor, regions: Regions, tau: float) -> dict[str, float]:
        """More to log, about maps made in evaluation mode."""

    def settings(self) -> dict[str, Any]:
        """What the explainer records and a resumed run must share, in JSON types; "objective" is its name."""


def make_objective(config: TrainConfig, classifier: Classifier) -> Objective | ShapleyObjective:
    """The objective that ``config`` names."""
    absence = OBJECTIVES[config.objective]
    chunk = per_pass(classifier.device, config.chunk)
    if absence is not None:
        return ShapleyObjective(
            classifier,
            absence=absence,
            coalitions=config.coalitions,
            players=config.players,
            chunk=chunk,
            precision=config.precision,
        )
    return Objective(
        classifier,
        fractions=config.fractions,
        weight_deletion=config.weight_deletion,
        weight_insertion=config.weight_insertion,
        weight_regularizer=config.weight_regularizer,
        scores=config.scores,
        n_iters=config.n_iters,
        chunk=chunk,
        precision=config.precision,
        ends=config.ends,
        smooth=config.smooth,
    )


class Trainer:
    """Trains the decoder of ``explainer`` to be faithful to ``classifier`` on the images of ``data``.

    >>> aha.Trainer(explainer, clf, data, aha.TrainConfig(output="runs/vit_b16")).fit()

    Every random draw (order of the data, grids, references, noise) is a function of the seed and the step, so a
    resumed run continues bit for bit on the same machine. Processes (``torchrun``, ``accelerate launch``) share every
    batch by index and train as one does, but for rounding; so a run goes on with more of them, or fewer.

    Args:
        data: a Dataset of dicts with "image" (C,H,W) in [0,1] and, where known, "label".
            Labels of an image folder are brought into the classifier's numbering (`aha.data.fit_labels`); an image that
            cannot be read is left out and named in ``failures``.
        objective: default: the one that ``config`` names. Give one to train for something else, or with a surrogate.
        beside: further classifiers, each with its images, which steps are made for in turn. An explainer that learns
            from several must see evidence and nothing else.

    Attributes:
        failures: one line for every image that could not be read so far.
    """

    @checked
    def __init__(
        self,
        explainer: Explainer,
        classifier: Classifier,
        data: Dataset,
        config: TrainConfig,
        objective: TrainingObjective | None = None,
        beside: Sequence[tuple[Classifier, Dataset]] = (),
    ):
        check_arguments(Trainer.__init__, {"config": config})
        self.config = config
        if not isinstance(explainer, Explainer):
            raise ValueError(f"explainer is a {type(explainer).__name__}: give an aha.Explainer")
        self.explainer = explainer
        if objective is not None and not hasattr(objective, "settings"):
            raise ValueError(
                f"objective is a {type(objective).__name__}: give one such as aha.Objective, or leave it out"
            )
        if beside and explainer.encoder is not None:
            raise ValueError("several classifiers need an explainer with evidence and no encoder: evidence=True")
        self.failures: list[str] = []
        ranks = config.objective == "ranking" if objective is None else objective.settings()["objective"] == "ranking"
        state = processes.join()
        # every process steps with its own precision contexts, accelerate only distributes; norms count all processes'
        # images, so their statistics need not be sent
        sharing = DistributedDataParallelKwargs(broadcast_buffers=False)
        self.accelerator = Accelerator(cpu=state.device.type == "cpu", kwargs_handlers=[sharing])
        device = self.accelerator.device
        self.places = places(config.batch_size, config.accumulate, state.process_index, state.num_processes)
        self.subjects = [
            _subject(clf.to(device), images, config, objective, ranks)
            for clf, images in [(check_classifier(classifier), data), *beside]
        ]
        self.classifier, self.data, self.objective = self.subjects[0]
        explainer.to(device)
        parameters = list(explainer.decoder.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
        with processes.together():
            self.model, self.optimizer = self.accelerator.prepare(explainer, optimizer)
        size = len(data)  # type: ignore[arg-type]
        self.total = config.steps or max(1, round(config.epochs * size / config.batch_size))
        start, end, schedule, noise = TEMPERATURES[config.scores]
        self.tau_schedule = config.tau_schedule or schedule
        self.tau = config.tau or (start, end)
        self.noise = noise if config.noise is None else config.noise
        self.references = config.references or (references.REFERENCES if ranks else shapley.REFERENCES)
        # with fewer roles now and then, a decoder learns to serve classifiers that lack them
        self.drops = len(ROLES) if explainer.encoder is None and config.dropped_roles else 0
        self.step = 0
        average = config.average if config.average is not None else AVERAGE if explainer.encoder is None else 0
        self.averaged_from = self.total - round(average * self.total)
        self.mean = MeanWeights()
        self.curves = MeanCurves()  # of the second half, when the maps are worth it
        self.folder = Path(config.output) if config.output else None
        self.run = ""  # what tells this run from others in its folder
        self.kept: Path | None = None  # the newest checkpoint

    def fit(self, resume: bool | str | Path = False, progress: bool = True) -> Explainer:
        """Train to the last step and return the explainer, in evaluation mode.

        SIGTERM, SIGUSR1 and SIGINT end the run after the step at hand, which is kept as a checkpoint.

        Args:
            resume: True continues from the newest checkpoint under ``output`` that is whole (from the start if there is
                none; a run that is finished returns its explainer); a path from that checkpoint.
            progress: show a progress bar.

        Raises:
            ValueError: in one line, where ``output`` holds another run or one that was not asked for, and for a
                checkpoint that is damaged or was made with other settings, images, classifier or decoder.
            OSError: in one line, where another process works in ``output`` (`aha.lock.FolderInUseError`), where it
                cannot be written to, and where a process that reads images was killed.
            FloatingPointError: where the loss or its gradient is not finite; nothing of that step is kept.
            aha.training.Interrupted: after SIGTERM or SIGUSR1; after SIGINT a KeyboardInterrupt.
        """
        with ExitStack() as stack:
            stack.enter_context(processes.together())
            stack.enter_context(recording())
            stack.enter_context(autocast("fp32", self.accelerator.device))
            if self.folder is not None:
                folder = self.folder
                self._by_main(lambda: stack.enter_context(lock.held(folder)))
            asked = stack.enter_context(signals.noticed())
            return self._fit(resume, progress, asked)

    def _fit(self, resume: bool | str | Path, progress: bool, asked: signals.Asked) -> Explainer:
        self._begin(resume)
        self._agree()
        main = self.accelerator.is_main_process
        log = Log(self.folder if main else None, self.step, self.total, progress and main)
        self.model.train()
        try:
            with closing(self._loader()) as batches:
                for batch in log.waiting(batches):
                    record = self._train_step(batch)
                    if not math.isfinite(record["loss"]):
                        raise FloatingPointError(f"the loss is {record['loss']} at step {self.step}")
                    self.step += 1
                    if self.step > self.averaged_from:
                        self.mean.add(self.explainer.decoder)
                    if self.step % self.config.log_every == 0 or self.step == self.total:
                        log.write(self.step, {**self._averaged(record), **self._diagnose(batch)})
                    log.advance(self.config.batch_size)
                    signal = self._agreed(asked)
                    if signal or (self.config.save_every and self.step % self.config.save_every == 0):
                        self._save()
                    if signal:
                        raise signals.ending(signal, f" at step {self.step} of {self.total}; {self._continued()}")
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; {self._continued()}") from error
        except files.WriteError as error:
            raise files.WriteError(f"{error}; {self._continued()}") from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = " ".join(str(error).split())
            raise ChildProcessError(
                f"a process that reads images was killed ({reason}), often for want of memory: give fewer workers; "
                f"{self._continued()}"
            ) from error
        finally:
            log.close()
        self.failures = list(dict.fromkeys(processes.gathered(self.failures)))
        if self.kept is None or self.kept.name != checkpoint.name(self.step):
            self._save()
        self.mean.give(self.explainer.decoder)
        self.explainer.eval()
        if self.explainer.encoder is None:
            self.explainer.turn_to(self.classifier)
        response = self.curves.response()
        self.explainer.settings.update(
            response=None if response is None else response.to_json(),
            temperature=self.tau[1],
            scores=self.config.scores,
            cells=list(self._cells(self.data[0]["image"].shape[-2:])),
            references=list(self.references),
            data=self._made_from["data"],
            **self.objective.settings(),
        )
        if self.folder is not None:
            written = self.folder / "explainer"
            self._by_main(lambda: self.explainer.save_pretrained(written))
        self.accelerator.wait_for_everyone()
        return self.explainer

    def _subject(self) -> Subject:
        """The one whose turn it is."""
        return self.subjects[self.step % len(self.subjects)]

    def _loader(self) -> Generator[dict[str, Any], None, None]:
        """The batches of the steps to come, of the subjects in turn."""
        count = len(self.subjects)
        # how many steps each has had
        turns = [
            range((self.step - i + count - 1) // count, (self.total - i + count - 1) // count) for i in range(count)
        ]
        streams = [self._batches(subject, steps) for subject, steps in zip(self.subjects, turns, strict=True)]
        for step in range(self.step, self.total):
            yield next(streams[step % count])

    def _batches(self, subject: Subject, steps: range) -> Iterator[dict[str, Any]]:
        config = self.config
        sampler = StepSampler(
            len(subject.data),
            config.batch_size,
            steps,
            config.seed,
            self.places,
            getattr(subject.data, "virtual_epochs", False),
        )
        device = self.accelerator.device
        loader = DataLoader(
            subject.data,
            batch_sampler=sampler,
            num_workers=workers_for(subject.data, config.workers),
            pin_memory=device.type == "cuda",
            collate_fn=_collated,
            worker_init_fn=signals.ignored,
        )
        for batch in _plainly(loader):
            if "problem" in batch:
                raise ValueError(batch["problem"])
            for label in batch.get("label", ()):
                check_label(label, subject.classifier.num_classes)
            check_images(batch["image"], len(subject.classifier.mean))
            self._note(batch["failed"])
            moved: dict[str, Any] = {
                key: batch[key].to(device, non_blocking=True) for key in ("image", "label") if key in batch
            }
            yield moved

    def _note(self, failed: Sequence[str]) -> None:
        """Keep the reasons why images could not be read, each once."""
        self.failures += [line for line in dict.fromkeys(failed) if line and line not in self.failures]

    def _train_step(self, batch: dict[str, Any]) -> dict[str, float]:
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        images = batch["image"]
        classifier, _, objective = self._subject()
        if len(self.subjects) > 1:
            self.explainer.turn_to(classifier)
        height, width = images.shape[-2:]
        regions = objective.regions(height, width)
        if regions is None:
            regions = draw(height, width, self._cells((height, width)), generator, config.offset)
            regions = aligned(regions, self.explainer.patches(height, width))
        choice = int(torch.randint(len(self.references), (), generator=generator))
        seeds = torch.randint(2**62, (config.accumulate,), generator=generator).tolist()
        reference = references.make(self.references[choice], images, classifier.mean_colour)
        tau = temperature(self.step, self.total, *self.tau, self.tau_schedule)
        lr = learning_rate(self.step, self.total, config.lr, config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        extra = {"roles": torch.rand(self.drops, generator=generator) >= config.dropped_roles} if self.drops else {}
        target = self._targets(classifier, images, batch.get("label"))
        per_image = 1 if config.shared_map else target.shape[1]
        totals: defaultdict[str, float] = defaultdict(float)
        seen = MeanCurves()
        # of the whole batch, part by part: those of this process's images are taken from it
        part_size, own = config.batch_size // config.accumulate, len(images) // config.accumulate
        first = self.places[0]
        parts = zip(seeds, images.split(own), reference.split(own), target.split(own), strict=True)
        for number, (seed, image, blank, classes) in enumerate(parts):
            of_part = torch.Generator().manual_seed(seed)
            each = torch.randint(2**62, (part_size, per_image), generator=of_part)[first : first + own].flatten()
            last = number == config.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                maps = self.model(image, classes[:, :per_image], precision=config.precision, **extra)
                if not torch.isfinite(maps).all():  # else the classifier, which sees them as masks, would be blamed
                    raise FloatingPointError(f"the maps are not finite at step {self.step}: lower the learning rate")
                if not config.shared_map:
                    image, blank = (x.repeat_interleave(per_image, dim=0) for x in (image, blank))
                    classes = classes.flatten()
                out = objective(image, maps, classes, [blank], regions, tau, self.noise, each)
                # so that the mean over processes, which gradients and what is logged get, is that over the batch
                share = len(out.loss) * self.accelerator.num_processes / (config.batch_size * per_image)
                self.accelerator.backward(out.loss.mean() * share)
            logged = out._asdict()
            curves = logged.pop("curves", None)
            if curves is not None and self.step >= self.total // 2:
                # of the prediction, which is what users explain; a map that serves all classes has their mean
                seen.add(curves if config.shared_map else curves[::per_image])
            for name, values in logged.items():
                totals[name] += values.detach().mean().item() * share
            totals["scores_std"] += maps.detach().std(dim=(1, 2, 3)).mean().item() * share
        self.curves.extend(self._summed(seen))
        norm = self.accelerator.clip_grad_norm_(self.explainer.decoder.parameters(), config.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient is not finite at step {self.step}: lower the learning rate")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {**totals, "grad_norm": float(norm), "lr": lr}

    @torch.no_grad()
    def _targets(self, classifier: Classifier, images: Tensor, label: Tensor | None) -> Tensor:
        """(B, M): the prediction first, then the label where the prediction is wrong, else the runner-up."""
        top = classifier(images).topk(2, dim=-1).indices
        if self.config.targets == 1:
            return top[:, :1]
        second = top[:, 1]
        if label is not None:
            wrong = (label >= 0) & (label != top[:, 0])
            second = torch.where(wrong, label, second)
        return torch.stack([top[:, 0], second], dim=1)

    def _cells(self, size: tuple[int, int]) -> tuple[int, int]:
        return self.config.cells or default_cells(*size)

    def _agree(self) -> None:
        """ValueError where the processes do not go on from the same step: the folders of two machines differ."""
        if len(steps := set(processes.gathered([self.step]))) > 1:
            found = " and ".join(map(str, sorted(steps)))
            raise ValueError(f"processes would go on from steps {found}: give all machines the same output folder")

    def _averaged(self, record: dict[str, float]) -> dict[str, float]:
        values = torch.tensor(list(record.values()), device=self.accelerator.device)
        return dict(zip(record, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    @torch.no_grad()
    def _diagnose(self, batch: dict[str, Any]) -> dict[str, float]:
        """What the objective finds in the maps of the first few images, on its own or the middle grid."""
        images = batch["image"][: sum(place < DIAGNOSED for place in self.places)]
        found = processes.gathered([(len(images), self._diagnosed(images))] if len(images) else [])
        count = sum(size for size, _ in found)
        return {name: sum(size * values[name] for size, values in found) / count for name in found[0][1]}

    def _diagnosed(self, images: Tensor) -> dict[str, float]:
        classifier, _, objective = self.subjects[(self.step - 1) % len(self.subjects)]
        self.explainer.eval()
        maps = self.explainer(images, self._targets(classifier, images, None)[:, 0], precision=self.config.precision)
        self.model.train()
        height, width = images.shape[-2:]
        regions = objective.regions(height, width)
        if regions is None:
            regions = grid(height, width, sum(self._cells((height, width))) // 2)
            regions = aligned(regions, self.explainer.patches(height, width))
        # the temperature of the step that has just been made
        tau = temperature(self.step - 1, self.total, *self.tau, self.tau_schedule)
        return objective.diagnose(maps, regions, tau)

    def _summed(self, seen: MeanCurves) -> MeanCurves:
        """Of all processes, so that each knows the mean over all images."""
        if self.accelerator.num_processes > 1 and seen.total is not None:
            packed = torch.cat([seen.total.flatten(), torch.tensor([seen.images], dtype=torch.float64)])
            *total, images = self.accelerator.reduce(packed.to(self.accelerator.device), "sum").tolist()
            seen.total, seen.images = torch.tensor(total, dtype=torch.float64).view_as(seen.total), images
        return seen

    def _by_main(self, work: Callable[[], T]) -> T | None:
        """``work`` done by the main process; its error is that of all."""
        found, problem = None, None
        if self.accelerator.is_main_process:
            try:
                with processes.alone():  # a file that is being written is finished
                    found = work()
            except (ValueError, OSError) as error:
                problem = error
        if self.accelerator.num_processes > 1:
            (problem,) = broadcast_object_list([problem])
        if problem is not None:
            raise problem
        return found

    def _agreed(self, asked: signals.Asked) -> int:
        """The signal that asks the run to end, the same for all processes, or 0; of the last step there is no end."""
        if self.step == self.total:
            return 0
        if self.accelerator.num_processes == 1:
            return asked.signal
        noticed = torch.tensor([asked.signal], device=self.accelerator.device)
        return int(self.accelerator.gather(noticed).max())

    def _continued(self) -> str:
        """What is kept of this run, for a message."""
        if self.folder is None:
            return "nothing is kept, for there is no output folder"
        if self.kept is None:
            return f"no checkpoint has been kept yet (save_every={self.config.save_every})"
        return f"resume continues from {self.kept}"

    def _save(self) -> None:
        failures = list(dict.fromkeys(processes.gathered(self.failures)))
        if self.folder is None:
            return
        folder = self.folder / "checkpoints"
        found = Checkpoint(
            run=self.run,
            step=self.step,
            made=self._identity(),
            decoder=self.explainer.decoder.state_dict(),
            optimizer=self.optimizer.state_dict(),
            curves=self.curves.state_dict(),
            mean=self.mean.state_dict(),
            failures=failures,
            world=self.accelerator.num_processes,
        )
        # nobody goes on, or ends, before it is there
        self._by_main(lambda: checkpoint.save(folder, found))
        self.kept = folder / checkpoint.name(self.step)

    def _identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share, in JSON types."""
        same = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in FREE}
        weights = self.explainer.classifier.dtype
        bf16 = uses_bf16(self.config.precision, self.accelerator.device, weights)
        made = {
            **self.objective.settings(),
            "references": self.references,
            "decoder": {
                "type": type(self.explainer.decoder).__name__,
                **dataclasses.asdict(self.explainer.decoder.config),
            },
            "evidence": self.explainer.sees_evidence,
            **{k: v for k, v in self.explainer.settings.items() if k in ("contrast", "by_patch")},
            **self._made_from,
        }
        return json.loads(json.dumps({**same, **made, "total": self.total, "bf16": bf16}))

    @functools.cached_property
    def _made_from(self) -> dict[str, Any]:
        """Classifier, encoder and images; read once, for all may be large."""
        made: dict[str, Any] = {"classifier": fingerprint(self.classifier), "data": identity(self.data, content=False)}
        if len(self.subjects) > 1:
            others = [(fingerprint(clf), identity(data, content=False)) for clf, data, _ in self.subjects[1:]]
            made["beside"] = others
        encoder = self.explainer.encoder
        if encoder is None or encoder.module is self.classifier.module:
            return made
        return {**made, "encoder": fingerprint(encoder)}

    def _begin(self, resume: bool | str | Path) -> None:
        """Continue a run, or begin one in a folder that holds none."""
        found = self._by_main(lambda: self._found(resume))
        if self.accelerator.num_processes > 1:
            (found,) = broadcast_object_list([found])
        if found is None:
            (self.run,) = broadcast_object_list([uuid.uuid4().hex])
            self._prepare()
        else:
            self._resume(found)

    def _prepare(self) -> None:
        self.explainer.prepare_for([subject.classifier for subject in self.subjects])

    def _found(self, resume: bool | str | Path) -> Path | None:
        """The checkpoint to continue from, if any; ValueError where the folder holds what would be mixed with it."""
        if self.folder is None:
            if resume is True:
                raise ValueError("resume needs an output folder: set TrainConfig.output")
            return Path(resume) if resume else None
        folder, finished = self.folder / "checkpoints", self.folder / "explainer"
        for place in (folder, self.folder, finished):
            files.remove_partials(place)
        present = checkpoint.available(folder)
        runs = {run for run in map(checkpoint.run_of, present) if run is not None}
        if resume and resume is not True:
            chosen = Path(resume)
            other = runs - {checkpoint.load(chosen).run}
            if other or (not present and finished.exists()):
                raise ValueError(f"{self.folder} holds another run than {chosen}: give another output folder")
            return chosen
        if not resume and (present or finished.exists()):
            raise ValueError(f"{self.folder} holds a run: resume it (--resume, resume=True), or give another folder")
        if len(runs) > 1:
            raise ValueError(
                f"{folder} holds checkpoints of {len(runs)} runs: give the one to resume, or another folder"
            )
        if not present:
            if finished.exists():
                raise ValueError(
                    f"{self.folder} holds an explainer and no checkpoint to resume from: give another folder"
                )
            return None
        return _whole(present)

    def _resume(self, path: Path) -> None:
        found = checkpoint.load(path)
        if found.version != __version__:
            warnings.warn(
                f"checkpoint {path} was made by aha {found.version}, this is {__version__}: the run may continue "
                "differently",
                stacklevel=5,
            )
        now = self._identity()
        differs = [key for key in {**found.made, **now} if key not in now or found.made.get(key) != now[key]]
        if differs:
            raise ValueError(
                f"checkpoint {path} was made with other settings ({', '.join(differs)}): "
                "resume with the same, or start in another folder"
            )
        self._prepare()
        self.explainer.decoder.load_state_dict(found.decoder)
        self.optimizer.load_state_dict(found.optimizer)
        self.curves.load_state_dict(found.curves)
        self.mean.load_state_dict(found.mean, self.explainer.decoder)
        self.failures = list(dict.fromkeys([*found.failures, *self.failures]))
        self.run, self.step, self.kept = found.run, found.step, path


def _whole(paths: Sequence[Path]) -> Path:
    """The newest checkpoint that can be used; one that cannot is said."""
    problems = []
    for path in reversed(paths):
        try:
            checkpoint.load(path)
        except files.DamagedError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem}: resuming from the one before, {path.name}", stacklevel=7)
        return path
    others = f", nor can the {len(paths) - 1} before it" if len(paths) > 1 else ""
    raise files.DamagedError(f"{problems[0]}{others}: start again in another folder")


class Subject(NamedTuple):
    """What steps are made for: a classifier, the images it is explained on, what is asked of the maps."""

    classifier: Classifier
    data: Any
    objective: TrainingObjective


def _subject(
    classifier: Classifier, data: Dataset, config: TrainConfig, objective: TrainingObjective | None, ranks: bool
) -> Subject:
    # an image that cannot be read is replaced by the next one, and named at the end
    images = readable(fit_labels(data, classifier))
    if len(images) == 0:
        raise ValueError("the data set is empty: give at least one image")
    if ranks:
        classifier.require("training for the ranking", gradients=True, inside=False)
    return Subject(classifier, images, make_objective(config, classifier) if objective is None else objective)


def _collated(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items, or why they are none: a message survives the way from a worker, an exception's does not."""
    shapes = {tuple(item["image"].shape) for item in items if isinstance(item["image"], Tensor)}
    if len(shapes) > 1:
        return {"problem": f"images of a batch have shapes {', '.join(map(str, sorted(shapes)))}: give them one size"}
    return default_collate(items)


def _plainly(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The batches; an error of a worker comes without the worker's traceback, and ends them all."""
    batches = iter(loader)
    try:
        yield from batches
    except ValueError as error:
        lines = str(error).strip().splitlines()
        if len(lines) < 2:
            raise
        raise ValueError(lines[-1].split(": ", 1)[-1]) from error
    finally:
        # now, not when the last reference to an exception is gone
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()


def places(batch: int, parts: int, rank: int, world: int) -> list[int]:
    """The places in a batch of the images that process ``rank`` of ``world`` takes: a share of each of its parts.

    Shares are runs, and differ by one image at most. ValueError where there are more processes than images.
    """
    size = batch // parts
    if size < world:
        of_what = f"batch_size={batch}" if parts == 1 else f"batch_size={batch} in accumulate={parts} parts"
        raise ValueError(f"{of_what} is less than one image for {world} processes each: give {parts * world} or more")
    share = range(rank * size // world, (rank + 1) * size // world)
    return [part * size + place for part in range(parts) for place in share]


class StepSampler(Sampler[list[int]]):
    """Batches of indices as a pure function of (seed, step): every epoch is a new permutation.

    Of each batch a process takes those at its ``places``, by default all. With ``virtual`` an index names its epoch
    too, index = epoch·size + position, so that augmentation differs between epochs; the data set's attribute
    ``virtual_epochs`` says whether it understands that.
    """

    def __init__(
        self,
        size: int,
        batch: int,
        steps: range,
        seed: int,
        places: Sequence[int] | None = None,
        virtual: bool = False,
    ):
        self.size, self.batch, self.steps, self.seed, self.virtual = size, batch, steps, seed, virtual
        self.places = range(batch) if places is None else places

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for step in self.steps:
            indices = []
            for position in (step * self.batch + place for place in self.places):
                if position // self.size != epoch:
                    epoch = position // self.size
                    generator = torch.Generator().manual_seed(self.seed * 1_000_033 + epoch)
                    order = torch.randperm(self.size, generator=generator)
                index = int(order[position % self.size])
                indices.append(epoch * self.size + index if self.virtual else index)
            yield indices


class Log:
    """Training log: a progress bar, ``log.jsonl`` and TensorBoard files under ``folder`` (None: the bar only)."""

    def __init__(self, folder: Path | None, step: int, total: int, progress: bool):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[note]}"), disable=not progress)
        self.bar.start()
        self.task = self.bar.add_task("training", total=total, completed=step, note="")
        self.events = self.file = None
        if folder is not None:
            path = folder / "log.jsonl"
            with files.writing(path):
                folder.mkdir(parents=True, exist_ok=True)
                _forget(path, step)
                self.events = Events(folder / "tensorboard", step + 1)
                self.file = open(path, "a", buffering=1)  # noqa: SIM115 - closed in close()
        self.images, self.waited, self.since = 0, 0.0, time.perf_counter()

    def waiting(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches; what each is waited for counts as ``data_wait``, a share of the time since the line before."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def advance(self, images: int) -> None:
        self.images += images
        self.bar.advance(self.task)

    def write(self, step: int, values: dict[str, float]) -> None:
        now = time.perf_counter()
        passed = max(1e-9, now - self.since)
        values = {**values, "images_per_second": self.images / passed, "data_wait": self.waited / passed}
        self.images, self.waited, self.since = 0, 0.0, now
        if self.events is not None and self.file is not None:
            with files.writing(self.file.name):
                self.events.write(step, values)
                self.file.write(json.dumps({"step": step, **values}) + "\n")
        note = f"loss {values['loss']:.3g}"
        if {"insertion", "deletion"} <= values.keys():
            note = f"ins−del {values['insertion'] - values['deletion']:+.3f}"
        speed = f"{values['images_per_second']:.1f} images/s, {values['data_wait']:.0%} waiting for data"
        self.bar.update(self.task, note=f"{note}  {speed}")

    def close(self) -> None:
        self.bar.stop()
        for file in (self.events, self.file):
            if file is not None:
                with suppress(OSError):  # a line that could not be written was told
                    file.close()


def _forget(path: Path, step: int) -> None:
    """Take out of a log what comes after ``step``, which is made again, and a line that a killed process left torn."""
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if kept != lines:
        files.write_atomically(path, b"".join(kept))


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
