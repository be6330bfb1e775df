"""The comparison: classifiers × targets × methods × metrics over a set of images, kept in a folder as it grows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .. import terminal
from .._version import __version__
from ..classifier import Classifier
from ..data import Part, fit_labels, identity
from ..files import write_atomically
from ..identity import fingerprint as network_fingerprint
from ..metrics import INTERNAL_BATCH_SIZE, Protocol, Suite
from ..metrics.protocols import get as get_protocol
from ..source import Source
from .engine import TARGETS, Engine, Row
from .evaluate import choose
from .result import Evaluation, protocol_settings
from .specs import MethodSpec
from .store import Folder, fingerprint, slug

CELLS = "cells"


@dataclass
class Comparison:
    """What `compare` measured.

    Attributes:
        results: (classifier, target) → its evaluation.
        engines: (classifier, target) → what measured it; its store holds the maps.
        skipped: methods that do not accept a classifier, one line each.
    """

    results: dict[tuple[str, str], Evaluation] = field(default_factory=dict)
    engines: dict[tuple[str, str], Engine] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """What could not be computed, one line each."""
        return [
            f"{model}, {target}: {line}"
            for (model, target), result in self.results.items()
            for line in result.failure_lines()
        ]

    def per_image(self) -> dict[str, list]:
        """The rows of all evaluations as columns, with the classifier and the kind of target in front."""
        names = list(dict.fromkeys(name for result in self.results.values() for name in result.per_image))
        table: dict[str, list] = {name: [] for name in ("classifier", "explained", *names)}
        for (model, target), result in self.results.items():
            count = len(result.per_image["method"])
            table["classifier"] += [model] * count
            table["explained"] += [target] * count
            for name in names:
                table[name] += result.per_image.get(name, [float("nan")] * count)
        return table


def compare(
    sources: Sequence[Source],
    methods: Sequence[MethodSpec] | Sequence[Sequence[MethodSpec]],
    output: Path,
    protocols: Sequence[str | Protocol] = ("aha",),
    targets: Sequence[str] = ("predicted",),
    strict: bool = True,
    batch_size: int = 32,
    seed: int = 0,
    internal_batch_size: int = INTERNAL_BATCH_SIZE,
    progress: bool = True,
) -> Comparison | None:
    """Measure ``methods`` on the classifiers and images of ``sources``, continuing what ``output`` holds.

    Every method's maps (half precision) and every protocol's scores are kept batch by batch under
    ``output``/cells, in folders named after all settings that decide them. Running again computes what is
    missing, so an interrupted run, another protocol, another method or more processes cost only the difference.
    Processes (``accelerate launch``) share the batches through that folder; the numbers do not depend on how
    many there are.

    Args:
        sources: one per classifier, all with the same images.
        methods: the rows of the table, for all classifiers or a list for each.
        protocols: presets; the first one's metrics carry no prefix. Localisation is added where masks exist.
        targets: "predicted", "true" or both.
        strict: raise if a method does not accept a classifier; else it is skipped and named.
        batch_size: images at a time.
        seed: of the methods, of the choice of images (``Source.limit``) and of the bootstrap.
        internal_batch_size: perturbed images in one forward pass of the metrics.

    Returns:
        The comparison, on the main process; None on the others.

    Raises:
        ValueError: for bad settings in one line, before anything is computed.
    """
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"target={target!r} is not known: choose one of {', '.join(TARGETS)}")
    for source in sources:
        if source.limit is not None and source.limit < 1:
            raise ValueError(f"limit={source.limit}: give 1 or more images")
    presets = [get_protocol(protocol) for protocol in (*protocols, "localisation")]
    presets = list({preset.name: preset for preset in presets}.values())
    per_source: Any = methods if methods and not isinstance(methods[0], MethodSpec) else [methods] * len(sources)
    # asked for a device that is not there, accelerate takes every process for the only one
    state = PartialState(cpu=not torch.cuda.is_available())
    done = Comparison()
    columns = (
        TextColumn("{task.description}", justify="left"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not (progress and state.is_main_process), console=terminal.console()) as bar:
        for source, specs in zip(sources, per_source, strict=True):
            clf = source.load_classifier().to(state.device)
            if any(model == clf.name for model, _ in done.engines):
                raise ValueError(f"classifier {clf.name!r} is given twice: compare each once")
            data, indices, about = _images(source, clf, seed)
            rows = _rows(clf, specs, seed, strict, done.skipped)
            if not rows:
                done.skipped.append(f"{clf.name}: none of the methods accepts it")
                continue
            for target in targets:
                where = {"classifier": _identity(clf), "target": target, "batch_size": batch_size, **about}
                folder = output / CELLS / slug(clf.name) / f"{target}-{fingerprint([where, __version__])}"
                if state.is_main_process:
                    write_atomically(folder / "settings.json", (json.dumps(where, indent=2) + "\n").encode())
                suites = {
                    f"{preset.name}-{fingerprint(protocol_settings(preset))}": Suite(clf, preset, internal_batch_size)
                    for preset in presets
                }
                engine = Engine(
                    clf,
                    rows,
                    data,
                    indices,
                    target,
                    suites,
                    batch_size,
                    Folder(folder),
                    state.process_index,
                    state.num_processes,
                    memory=True,
                )
                done.engines[clf.name, target] = engine
                task = bar.add_task(clf.name, total=sum(map(len, engine.own_batches)) * len(rows))
                engine.run(_announcing(bar, task))
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    for key, engine in done.engines.items():
        done.results[key] = engine.result(seed)
    if not done.results:
        raise ValueError(f"nothing could be measured ({'; '.join(done.skipped)})")
    return done


def _announcing(bar: Progress, task: Any) -> Callable[[str, int], None]:
    return lambda method, images: bar.update(task, description=method, advance=images)


def _rows(clf: Classifier, methods: Sequence[MethodSpec], seed: int, strict: bool, skipped: list[str]) -> list[Row]:
    rows = []
    for spec in methods:
        try:
            rows.append(Row(spec.label, spec.key(seed), spec.create(clf, seed)))
        except (ValueError, ImportError, OSError) as error:
            if strict:
                raise
            skipped.append(f"{spec.label}: {error}")
    return rows


def _images(source: Source, clf: Classifier, seed: int) -> tuple[Any, list[int], dict[str, Any]]:
    """The data set, the indices to use, and what identifies them."""
    # a folder is sorted by class: its first images would be of one, so the limit is drawn at random
    drawn = source if source.data == "scenes" else dataclasses.replace(source, limit=None)
    data = fit_labels(drawn.images(clf.input_size, training=False, seed=seed), clf)
    indices = choose(len(data), source.limit, seed)
    about = {"data": source.data, "split": source.split, "size": list(clf.input_size), "seed": seed}
    # by content: a corrected label, another picture or mask of the same name and size is another evaluation
    kept = fingerprint(identity(Part(data, indices), content=True))
    return data, indices, {**about, "images": len(indices), "content": kept}


def _identity(clf: Classifier) -> dict[str, Any]:
    """What tells two classifiers of one name apart: weights and normalisation, and the colour of the mean reference."""
    return {"name": clf.name, "weights": network_fingerprint(clf), "mean_colour": clf.mean_colour.tolist()}
