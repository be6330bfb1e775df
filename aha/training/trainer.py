"""Trains an explainer for an objective: the differentiable ranking (paper §3, §4.1), or Shapley values."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .. import references, shapley
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
from ..data import fit_labels, identity, readable
from ..evidence import ROLES
from ..explainer import Explainer
from ..identity import fingerprint
from ..kernels.messages import short
from ..objective import Objective
from ..precision import autocast, uses_bf16
from ..protection import recording
from ..regions import Regions, default_cells, draw, grid
from ..shapley import ShapleyObjective
from . import checkpoint
from .schedule import learning_rate, temperature

# (start, end, schedule, noise): `free` as published, `standardized` as measured in bench/results
TEMPERATURES = {"standardized": (0.05, 0.005, "geometric", 0.0), "free": (1.0, 0.3, "linear", 1.0)}

# of standardized scores, to train a trained explainer further: its order is there already, and soft ranks would blur it
CONTINUED = (0.015, 0.005)

# what an explainer can be trained for → how a player of the Shapley game is absent
OBJECTIVES = {"ranking": None, **{name: absence for absence, name in shapley.METHODS.items()}}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; the defaults are the paper's unless marked otherwise.

    Attributes:
        objective: "ranking" (AHA), "fastshap" or "vit_shapley" (Shapley values, see `aha.shapley`).
        output: folder for checkpoints, logs and the final explainer; None keeps nothing on disk.
        epochs: passes over the data; ``steps`` overrides it.
        batch_size: images per process and optimizer step.
        accumulate: the batch is processed in this many parts, their gradients added.
        lr, weight_decay, clip, warmup: AdamW, gradient norm, share of the steps.
        fractions: S, points on the curves.
        cells: range of the grid, cells along the shorter side; None scales 7…28 at 224 px with the image.
        offset: shift the grid by up to half a cell.
        scores: "standardized" (ours) or "free" (published); sets the default of ``tau`` and ``noise``.
        tau: (start, end); tau_schedule: "linear" or "geometric"; noise: scale of the Gumbel noise.
        ends, smooth: see `aha.Objective`.
        targets: explained classes per image: 1 is the prediction; 2 adds the label where the prediction is wrong, else
            the
            runner-up.
        shared_map: one map, made for the first target, serves all targets (published); default: a map per target
            (ours).
        references: one is drawn per batch; default: all of them for the ranking, the mean colour for fastshap.
            vit_shapley drops tokens and takes none.
        coalitions: sets of players per image and step, for the Shapley values.
        players: (rows, cols) of fastshap's grid; default: the patches of a vision transformer, else 16 px at 224.
        dropped_roles: how often the decoder has to do without a role of the evidence, in [0, 1).
        chunk: perturbed images in memory at a time.
        precision: of encoder and classifier, "auto" | "bf16" | "fp32".
        log_every, save_every: in steps; 0 never saves before the end.
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
    dropped_roles: float = 0.0
    chunk: int = 128
    precision: str = "auto"
    seed: int = 42
    workers: int = 0
    log_every: int = 20
    save_every: int = 500

    @checked_fields
    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "log_every"):
            check_integer(name, getattr(self, name), 1)
        for name in ("workers", "save_every"):
            check_integer(name, getattr(self, name), 0)
        if self.steps is not None:
            check_integer("steps", self.steps, 1)
        if self.cells is not None:
            low, high = (check_integer("cells", cells, 1) for cells in self.cells)
            if low > high:
                raise ValueError(f"cells={self.cells}: give the coarsest and the finest grid, the smaller number first")
        for tau in self.tau or ():
            check_number("tau", tau, 0, above=True)
        uses_bf16(self.precision, torch.device("cpu"))
        check_number("epochs", self.epochs, 0, above=True)
        check_number("lr", self.lr, 0, above=True)
        check_number("dropped_roles", self.dropped_roles, 0)
        if self.dropped_roles >= 1:
            raise ValueError(f"dropped_roles={self.dropped_roles}: give a share below 1")
        check_seed(self.seed)
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
        seed: int,
    ) -> Any:
        """A NamedTuple of values per image (B,) that are logged by name; only ``loss`` carries a gradient.

        ``curves``, where there are any, are deletion and insertion (B, 2, S): of them the response is learnt.
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
    if absence is not None:
        return ShapleyObjective(
            classifier,
            absence=absence,
            coalitions=config.coalitions,
            players=config.players,
            chunk=config.chunk,
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
        chunk=config.chunk,
        precision=config.precision,
        ends=config.ends,
        smooth=config.smooth,
    )


class Trainer:
    """Trains the decoder of ``explainer`` to be faithful to ``classifier`` on the images of ``data``.

    >>> aha.Trainer(explainer, clf, data, aha.TrainConfig(output="runs/vit_b16")).fit()

    Every random draw (order of the data, grids, references, noise) is a function of the seed and the step, so a
    resumed run continues bit for bit on the same machine.

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
        # every process steps with its own precision contexts, accelerate only distributes
        self.accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=True)])
        device = self.accelerator.device
        self.subjects = [
            _subject(clf.to(device), images, config, objective, ranks)
            for clf, images in [(check_classifier(classifier), data), *beside]
        ]
        self.classifier, self.data, self.objective = self.subjects[0]
        explainer.to(device)
        parameters = list(explainer.decoder.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(explainer, optimizer)
        world = self.accelerator.num_processes
        size = len(data)  # type: ignore[arg-type]
        self.total = config.steps or max(1, round(config.epochs * size / (config.batch_size * world)))
        start, end, schedule, noise = TEMPERATURES[config.scores]
        self.tau_schedule = config.tau_schedule or schedule
        self.tau = config.tau or (start, end)
        self.noise = noise if config.noise is None else config.noise
        self.references = config.references or (references.REFERENCES if ranks else shapley.REFERENCES)
        # with fewer roles now and then, a decoder learns to serve classifiers that lack them
        self.drops = len(ROLES) if explainer.encoder is None and config.dropped_roles else 0
        self.step = 0
        self.curves = MeanCurves()  # of the second half, when the maps are worth it
        self.folder = Path(config.output) if config.output else None

    def fit(self, resume: bool | str | Path = False, progress: bool = True) -> Explainer:
        """Train to the last step and return the explainer, in evaluation mode.

        Args:
            resume: True continues from the newest checkpoint under ``output`` (from the start if there is none); a path
                from that checkpoint.
            progress: show a progress bar.
        """
        with recording(), autocast("fp32", self.accelerator.device):
            return self._fit(resume, progress)

    def _fit(self, resume: bool | str | Path, progress: bool) -> Explainer:
        if resume:
            self._resume(None if resume is True else Path(resume))
        log = Log(self.folder if self.accelerator.is_main_process else None, self.step, self.total, progress)
        self.model.train()
        try:
            for batch in self._loader():
                record = self._train_step(batch)
                self.step += 1
                if self.step % self.config.log_every == 0 or self.step == self.total:
                    log.write(self.step, {**self._averaged(record), **self._diagnose(batch)})
                log.advance(len(batch["image"]) * self.accelerator.num_processes)
                if self.config.save_every and self.step % self.config.save_every == 0:
                    self._share_curves()
                    self._save()
        finally:
            log.close()
        if self.accelerator.num_processes > 1:
            self.failures = list(dict.fromkeys(gather_object(self.failures)))
        self.explainer.eval()
        if self.explainer.encoder is None:
            self.explainer.turn_to(self.classifier)
        self._share_curves()
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
        if self.folder is not None and self.accelerator.is_main_process:
            if self.step and not (self.config.save_every and self.step % self.config.save_every == 0):
                self._save()
            self.explainer.save_pretrained(self.folder / "explainer")
        self.accelerator.wait_for_everyone()
        return self.explainer

    def _subject(self) -> Subject:
        """The one whose turn it is."""
        return self.subjects[self.step % len(self.subjects)]

    def _loader(self) -> Iterator[dict[str, Any]]:
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
            self.accelerator.process_index,
            self.accelerator.num_processes,
            getattr(subject.data, "virtual_epochs", False),
        )
        device = self.accelerator.device
        loader = DataLoader(
            subject.data,
            batch_sampler=sampler,
            num_workers=config.workers,
            pin_memory=device.type == "cuda",
            collate_fn=_collated,
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
        choice = int(torch.randint(len(self.references), (), generator=generator))
        seeds = torch.randint(2**62, (config.accumulate,), generator=generator) + self.accelerator.process_index
        reference = references.make(self.references[choice], images, classifier.mean_colour)
        tau = temperature(self.step, self.total, *self.tau, self.tau_schedule)
        lr = learning_rate(self.step, self.total, config.lr, config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        extra = {"roles": torch.rand(self.drops, generator=generator) >= config.dropped_roles} if self.drops else {}
        target = self._targets(classifier, images, batch.get("label"))
        per_image = 1 if config.shared_map else target.shape[1]
        totals: defaultdict[str, float] = defaultdict(float)
        part_size = config.batch_size // config.accumulate
        parts = zip(images.split(part_size), reference.split(part_size), target.split(part_size), strict=True)
        for number, (image, blank, classes) in enumerate(parts):
            maps = self.model(image, classes[:, :per_image], precision=config.precision, **extra)
            if not config.shared_map:
                image, blank = (x.repeat_interleave(per_image, dim=0) for x in (image, blank))
                classes = classes.flatten()
            out = objective(image, maps, classes, [blank], regions, tau, self.noise, int(seeds[number]))
            share = len(out.loss) / (len(images) * per_image)
            self.accelerator.backward(out.loss.mean() * share)
            logged = out._asdict()
            curves = logged.pop("curves", None)
            if curves is not None and self.step >= self.total // 2:
                # of the prediction, which is what users explain; a map that serves all classes has their mean
                self.curves.add(curves if config.shared_map else curves[::per_image])
            for name, values in logged.items():
                totals[name] += values.detach().mean().item() * share
            totals["scores_std"] += maps.detach().std(dim=(1, 2, 3)).mean().item() * share
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

    def _averaged(self, record: dict[str, float]) -> dict[str, float]:
        values = torch.tensor(list(record.values()), device=self.accelerator.device)
        return dict(zip(record, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    @torch.no_grad()
    def _diagnose(self, batch: dict[str, Any]) -> dict[str, float]:
        """What the objective finds in the maps of a few images, on its own or the middle grid."""
        images = batch["image"][:4]
        classifier, _, objective = self.subjects[(self.step - 1) % len(self.subjects)]
        self.explainer.eval()
        maps = self.explainer(images, self._targets(classifier, images, None)[:, 0], precision=self.config.precision)
        self.model.train()
        height, width = images.shape[-2:]
        regions = objective.regions(height, width)
        if regions is None:
            regions = grid(height, width, sum(self._cells((height, width))) // 2)
        # the temperature of the step that has just been made
        tau = temperature(self.step - 1, self.total, *self.tau, self.tau_schedule)
        return objective.diagnose(maps, regions, tau)

    def _share_curves(self) -> None:
        """Give every process the mean curves of all: a checkpoint is written by one and read by all."""
        if self.accelerator.num_processes > 1 and self.curves.total is not None:
            total = self.curves.total.to(self.accelerator.device)
            self.curves.total = self.accelerator.reduce(total, "mean").cpu()

    def _save(self) -> None:
        if self.folder is None or not self.accelerator.is_main_process:
            return
        state = {
            "decoder": self.explainer.decoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curves": self.curves.state_dict(),
        }
        checkpoint.save(self.folder / "checkpoints", self.step, state, self._identity(), __version__)

    def _identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share, in JSON types."""
        same = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in ("output", "workers", "log_every")}
        bf16 = uses_bf16(self.config.precision, self.accelerator.device)
        made = {
            **self.objective.settings(),
            "references": self.references,
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

    def _resume(self, path: Path | None) -> None:
        if path is None:
            if self.folder is None:
                raise ValueError("resume needs an output folder: set TrainConfig.output")
            found = checkpoint.available(self.folder / "checkpoints")
            if not found:
                return
            path = found[-1]
        step, state, config, version = checkpoint.load(path)
        if version != __version__:
            warnings.warn(
                f"checkpoint {path} was made by aha {version}, this is {__version__}: the run may continue differently",
                stacklevel=4,
            )
        differs = [key for key, value in self._identity().items() if config.get(key) != value]
        if differs:
            raise ValueError(
                f"checkpoint {path} was made with other settings ({', '.join(differs)}): "
                "resume with the same, or start in another folder"
            )
        self.explainer.decoder.load_state_dict(state["decoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        # versions before the response kept no curves: it is then learnt of the steps that are left
        self.curves.load_state_dict(state.get("curves", MeanCurves().state_dict()))
        self.step = step


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
    """The batches; an error of a worker comes without the worker's traceback."""
    try:
        yield from loader
    except ValueError as error:
        lines = str(error).strip().splitlines()
        if len(lines) < 2:
            raise
        raise ValueError(lines[-1].split(": ", 1)[-1]) from error


class StepSampler(Sampler[list[int]]):
    """Batches of indices as a pure function of (seed, step, process): every epoch is a new permutation.

    With ``virtual`` an index names its epoch too, index = epoch·size + position, so that augmentation differs between
    epochs; the data set's attribute ``virtual_epochs`` says whether it understands that.
    """

    def __init__(
        self,
        size: int,
        batch: int,
        steps: range,
        seed: int,
        rank: int = 0,
        world: int = 1,
        virtual: bool = False,
    ):
        self.size, self.batch, self.steps, self.seed, self.rank, self.world = (
            size,
            batch,
            steps,
            seed,
            rank,
            world,
        )
        self.virtual = virtual

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for step in self.steps:
            first = (step * self.world + self.rank) * self.batch
            indices = []
            for position in range(first, first + self.batch):
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
        self.writer = self.file = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            folder.mkdir(parents=True, exist_ok=True)
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
            self.file = open(folder / "log.jsonl", "a", buffering=1)  # noqa: SIM115 - closed in close()
        self.images, self.since = 0, time.perf_counter()

    def advance(self, images: int) -> None:
        self.images += images
        self.bar.advance(self.task)

    def write(self, step: int, values: dict[str, float]) -> None:
        now = time.perf_counter()
        values = {**values, "images_per_second": self.images / max(1e-9, now - self.since)}
        self.images, self.since = 0, now
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        note = f"loss {values['loss']:.3g}"
        if {"insertion", "deletion"} <= values.keys():
            note = f"ins−del {values['insertion'] - values['deletion']:+.3f}"
        self.bar.update(self.task, note=f"{note}  {values['images_per_second']:.1f} images/s")

    def close(self) -> None:
        self.bar.stop()
        if self.writer is not None:
            self.writer.close()
        if self.file is not None:
            self.file.close()
