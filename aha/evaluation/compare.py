"""The comparison: classifiers × targets × methods × metrics over a set of images, kept in a folder as it grows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import identity, processes, signals
from .._version import __version__
from ..attributors import MethodSpec
from ..classifier import Classifier
from ..data import Part, Preprocessing, fit_labels
from ..data import identity as identity_of
from ..files import remove_partials, slug, write_json
from ..lock import held
from ..metrics import Protocol, Suite
from ..metrics.protocols import get as get_protocol
from ..source import Source
from ..store import Packs
from .engine import TARGETS, Engine, Progress, Row, announcing
from .evaluate import choose, described
from .pieces import Pieces
from .records import Records
from .result import Evaluation, protocol_settings

if TYPE_CHECKING:
    from accelerate import PartialState

CELLS = "cells"
# of what methods and metrics compute: raised where maps or scores of the same settings change
REVISION = 3


@dataclass
class Comparison:
    """What `compare` measured.

    Attributes:
        results: (classifier, target) → its evaluation.
        pieces: (classifier, target) → what is kept of it with the first protocol, the maps among it.
        skipped: methods that do not accept a classifier, and protocols that no image takes part in, one line each.
    """

    results: dict[tuple[str, str], Evaluation] = field(default_factory=dict)
    pieces: dict[tuple[str, str], Pieces] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """What could not be computed, one line each."""
        return [
            f"{model}, {target}: {line}"
            for (model, target), result in self.results.items()
            for line in result.failure_lines()
        ]

    @functools.cached_property
    def records(self) -> Records:
        """All numbers in one table."""
        table = Records()
        for result in self.results.values():
            table.extend(result.records)
        return table

    @property
    def images(self) -> dict[str, list]:
        """The facts of the images of all results as columns, with the classifier and the kind of target in front."""
        table: dict[str, list] = {}
        for (model, target), result in self.results.items():
            count = len(result.images["index"])
            for name, cells in {"classifier": [model] * count, "explained": [target] * count, **result.images}.items():
                table.setdefault(name, []).extend(cells)
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
    internal_batch_size: int | None = None,
    progress: Progress | None = None,
    finish: Callable[[Comparison], object] | None = None,
) -> Comparison | None:
    """Measure ``methods`` on the classifiers and images of ``sources``, continuing what ``output`` holds.

    Every method's maps (half precision) and every protocol's scores are kept batch by batch under
    ``output``/cells, in folders named after all settings that decide them, with checksums (`aha.store.Packs`). Running
    again computes what is missing or damaged, so an interrupted run, another protocol, another method or more
    processes cost only the difference.
    Processes (``torchrun``, ``accelerate launch``) share the batches through that folder; the numbers do not depend on
    how many there are.

    Args:
        sources: one per classifier, all with the same images.
        methods: the rows of the table, for all classifiers or a list for each.
        protocols: presets; the first one's metrics carry no prefix. Localisation is added where masks exist. Folders of
            images are resized and cropped as each protocol asks; where two differ in that, methods explain both.
        targets: "predicted", "true" or both.
        strict: raise if a method does not accept a classifier; else it is skipped and named.
        batch_size: images at a time.
        seed: of the methods, of the choice of images (``Source.limit``) and of the bootstrap.
        internal_batch_size: perturbed images in one forward pass of the metrics; default: `aha.memory.per_pass`.
        progress: told of what is done, e.g. a bar of `aha.terminal.progress`.
        finish: what the main process does with the comparison before another may work in ``output``, such as write it.

    Returns:
        The comparison, on the main process; None on the others.

    Raises:
        ValueError: for bad settings in one line, before anything is computed.
        OSError: in one line, where another process works in ``output``, or it cannot be written to, or disappears.
        aha.training.Interrupted: after SIGTERM or SIGUSR1, which exits with 75; after SIGINT a
            KeyboardInterrupt. What was being measured is finished and kept.
    """
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"target={target!r} is not known: choose one of {', '.join(TARGETS)}")
    for source in sources:
        if source.limit is not None and source.limit < 1:
            raise ValueError(f"limit={source.limit}: give 1 or more images")
    presets = list({(preset := get_protocol(protocol)).name: preset for protocol in protocols}.values())
    per_source: Any = methods if methods and not isinstance(methods[0], MethodSpec) else [methods] * len(sources)
    state = processes.join()
    setting = _Setting(output, presets, targets, strict, batch_size, seed, internal_batch_size, progress, state)
    if not state.is_main_process:
        with processes.together():
            state.wait_for_everyone()  # until the folder is held
            _measured_all(sources, per_source, setting)
        return None
    with held(output):
        remove_partials(output)
        with processes.together():
            state.wait_for_everyone()
            kept, skipped = _measured_all(sources, per_source, setting)
        # the others may end now
        done = _results(kept, skipped, setting)
        if finish is not None:
            finish(done)
        return done


Kept = dict[tuple[str, str], list[Pieces]]


def _measured_all(
    sources: Sequence[Source], per_source: Sequence[Sequence[MethodSpec]], setting: _Setting
) -> tuple[Kept, list[str]]:
    """(classifier, target) → the pieces of all processes, and what was skipped."""
    kept: Kept = {}
    skipped: list[str] = []
    with signals.noticed() as asked:
        for source, specs in zip(sources, per_source, strict=True):
            # one classifier at a time: what follows needs none
            for pieces in _measured(source, specs, setting, {model for model, _ in kept}, skipped, asked):
                kept.setdefault((pieces.classifier, pieces.target), []).append(pieces)
    return kept, skipped


def _results(kept: Kept, skipped: list[str], setting: _Setting) -> Comparison:
    done = Comparison(skipped=skipped)
    for key, (first, *others) in kept.items():
        result = first.result(setting.seed, described(first.data))
        for pieces in others:
            result.extend(pieces.result(setting.seed, described(pieces.data)))
        asked = [name for name in result.unmeasured if any(preset.name == name for preset in setting.presets)]
        done.skipped += [f"{', '.join(key)}: no image takes part in protocol {name!r}" for name in asked]
        if len(result.unmeasured) < len(result.protocols):
            done.pieces[key], done.results[key] = first, result
    if not done.results:
        raise ValueError(f"nothing could be measured ({'; '.join(done.skipped)})")
    return done


@dataclass(frozen=True)
class _Setting:
    """What all classifiers of a comparison share, see `compare`."""

    output: Path
    presets: Sequence[Protocol]
    targets: Sequence[str]
    strict: bool
    batch_size: int
    seed: int
    internal_batch_size: int | None
    progress: Progress | None
    state: PartialState


def _measured(
    source: Source,
    specs: Sequence[MethodSpec],
    setting: _Setting,
    known: Collection[str],
    skipped: list[str],
    asked: signals.Asked,
) -> list[Pieces]:
    """The pieces of one classifier: of the first protocol's images, then of those that others crop otherwise."""
    state, presets = setting.state, setting.presets
    clf = source.load_classifier().to(state.device)
    if clf.name in known:
        raise ValueError(f"classifier {clf.name!r} is given twice: compare each once")
    rows = _rows(clf, specs, setting.seed, setting.strict, skipped)
    if not rows:
        skipped.append(f"{clf.name}: none of the methods accepts it")
        return []
    localisation, subject = get_protocol("localisation"), _identity(clf)
    engines = []
    for number, (preprocessing, group) in enumerate(by_preprocessing(presets, source).items()):
        data, indices, about = _images(source, clf, setting.seed, preprocessing)
        if number == 0 and localisation not in presets:
            group = [*group, localisation]
        for target in setting.targets:
            where = {"classifier": subject, "target": target, "batch_size": setting.batch_size, **about}
            made_by = identity.of_settings([where, __version__, REVISION])
            folder = setting.output / CELLS / slug(clf.name) / f"{target}-{made_by}"
            store = Packs(folder, state.process_index)
            if state.is_main_process:
                remove_partials(folder)
                write_json(folder / "settings.json", where)
            named = {f"{preset.name}-{identity.of_settings(protocol_settings(preset))}": preset for preset in group}
            suites = {name: Suite(clf, preset, setting.internal_batch_size) for name, preset in named.items()}
            engines.append(
                Engine(
                    clf,
                    rows,
                    data,
                    indices,
                    target,
                    suites,
                    setting.batch_size,
                    store,
                    state.process_index,
                    state.num_processes,
                    memory=number == 0,
                    ahead=True,
                )
            )
    announce = announcing(setting.progress if state.is_main_process else None, *engines)

    def unless_asked(method: str, images: int) -> None:
        # called between two records: the one at work is kept
        announce(method, images)
        if number := processes.any_asked(asked.signal):
            asked.signal = number
            raise _Ended

    with suppress(_Ended):
        for engine in engines:
            engine.run(unless_asked)
    # every process has finished its record: they end together
    if number := max(processes.gathered([asked.signal])):
        raise signals.ending(number, "; what was finished is kept, run again to go on")
    return [engine.pieces for engine in engines]


class _Ended(Exception):
    """A signal asks the comparison to end."""


def by_preprocessing(presets: Sequence[Protocol], source: Source) -> dict[Preprocessing | None, list[Protocol]]:
    """Protocols that see the same images; scenes are made in the classifier's size, there is nothing to crop."""
    groups: dict[Preprocessing | None, list[Protocol]] = {}
    for preset in presets:
        groups.setdefault(None if source.data == "scenes" else preset.preprocessing, []).append(preset)
    return groups


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


def _images(
    source: Source, clf: Classifier, seed: int, preprocessing: Preprocessing | None
) -> tuple[Any, list[int], dict[str, Any]]:
    """The data set, the indices to use, and what identifies them."""
    # a folder is sorted by class: its first images would be of one, so the limit is drawn at random
    drawn = source if source.data == "scenes" else dataclasses.replace(source, limit=None)
    data = fit_labels(drawn.images(clf.input_size, training=False, seed=seed, preprocessing=preprocessing), clf)
    indices = choose(len(data), source.limit, seed)
    about = {"data": source.data, "split": source.split, "size": list(clf.input_size), "seed": seed}
    # by content: a corrected label, another picture or mask of the same name and size is another evaluation
    kept = identity.of_settings(identity_of(Part(data, indices), content=True))
    return data, indices, {**about, "images": len(indices), "content": kept}


def _identity(clf: Classifier) -> dict[str, Any]:
    """What tells two classifiers of one name apart: weights and normalisation, and the colour of the mean reference."""
    return {"name": clf.name, "weights": identity.fingerprint(clf), "mean_colour": clf.mean_colour.tolist()}
