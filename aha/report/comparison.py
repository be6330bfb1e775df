"""The pages of a comparison: per-image rows, tables, figures and report of every classifier and target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..evaluation.result import IMAGES, write_summary
from ..files import slug, write_columns
from . import figures, html, tables
from .columns import HEADLINE

if TYPE_CHECKING:
    from ..evaluation import Comparison, Evaluation
    from ..evaluation.pieces import Pieces

SHOWN = 6  # images in the qualitative grid


def write(
    done: Comparison,
    folder: Path,
    title: str = "",
    published: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
) -> Path:
    """Write all pages of ``done`` into ``folder``; returns report.html.

    - scores.parquet: a row per number, with its classifier, target, method, protocol, reference, metric and image
      (scores.csv without pyarrow), and in images.parquet the facts of the images;
    - for every classifier and target (in a folder <classifier>/<target> where there are several) summary.json,
      figures/ and report.html, and one report.html over all of them;
    - tables/: Markdown and LaTeX in the papers' layout.

    ``title`` is the report's; ``published``, classifier → method → metric → the paper's figure, is shown beside what
    was measured.
    """
    done.records.write(folder)
    write_columns(done.images, folder / IMAGES)
    summaries = {key: result.summary() | ({"title": title} if title else {}) for key, result in done.results.items()}
    places = {
        (model, target): folder if len(summaries) == 1 else folder / slug(model) / target for model, target in summaries
    }
    tables.write(summaries, folder / "tables")
    for (model, target), summary in summaries.items():
        write_summary(summary, places[model, target])
        # the papers' figures are of the predicted class
        if target == "predicted" and (theirs := (published or {}).get(model)):
            _beside(summary["methods"], theirs).write(folder / "tables" / f"published_{slug(model)}.md")
    # last, for they need the extra ``report``
    for key, summary in summaries.items():
        _draw(done.results[key], done.pieces[key], summary, places[key] / "figures")
        if len(summaries) > 1:
            html.write(places[key])
    return html.write(folder)


def _beside(measured: Mapping[str, Any], published: Mapping[str, Mapping[str, float]]) -> tables.Table:
    """Every method with a published figure, ours and the paper's in turn."""
    rows: dict[str, Any] = {}
    metrics = list(dict.fromkeys(metric for row in published.values() for metric in row))
    for name, row in published.items():
        if name in measured:
            rows[name] = {metric: measured[name].get(metric) for metric in row}
        rows[f"{name} (paper)"] = dict(row)
    return tables.comparison(rows, metrics=metrics, caption="Measured, and as published.")


def _draw(result: Evaluation, pieces: Pieces, summary: Mapping[str, Any], folder: Path) -> None:
    known = [{"deletion", "insertion"} & {*named} for of in result.curves.values() for named in of.values()]
    if len(set().union(*known)) == 2:
        figures.curves(result.curves, folder / "curves.png", summary=summary)
        # RISE deletes to one reference and inserts from another
        if all(len(sides) == 2 for sides in known):
            figures.curves_by_reference(result.curves, folder / "curves_by_reference.png")
    figures.bars(summary, result.headline, folder / f"{slug(result.headline)}.png")
    _draw_maps(result, pieces, folder / "maps.png")


def _draw_maps(result: Evaluation, pieces: Pieces, path: Path) -> None:
    """Images that all methods have a map of, evenly spaced, with the score of every map."""
    common = sorted(set.intersection(*(set(result.values(m, "seconds_per_image")) for m in result.methods)))
    count = min(SHOWN, len(common))
    shown = [common[i * len(common) // count] for i in range(count)]
    maps = {m: kept for m in result.methods if shown and (kept := pieces.maps(m, shown)) is not None}
    if not maps:
        return
    items = [pieces.data[index] for index in shown]
    images = torch.stack([item["image"] for item in items])
    known = [item["mask"] for item in items if item.get("mask") is not None]
    masks = torch.stack(known) if len(known) == len(items) else None
    targets, names = dict(zip(result.images["index"], result.images["target"], strict=True)), pieces.class_names
    titles = [names[targets[i]] if names else f"class {targets[i]}" for i in shown]
    scores = None
    if result.headline == HEADLINE:
        scores = {m: [result.values(m, HEADLINE).get(i, math.nan) for i in shown] for m in maps}
    figures.qualitative(images, maps, path, titles, scores, masks)
