"""The pages of a comparison: per-image rows, tables, figures and report of every classifier and target."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..evaluation.store import slug
from ..files import write_atomically, write_csv
from . import comparison_figures, figures, html, tables

if TYPE_CHECKING:
    from ..evaluation import Comparison, Evaluation
    from ..evaluation.engine import Engine

SHOWN = 6  # images in the qualitative grid
PAPER = "{} (paper)"


def write(
    done: Comparison,
    folder: Path,
    title: str = "",
    published: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
) -> Path:
    """Write all pages of ``done`` into ``folder``; returns report.html.

    - per_image.parquet: a row per classifier, target, method and image (per_image.csv without pyarrow);
    - for every classifier and target (in a folder <classifier>/<target> where there are several) summary.json,
      figures/ and report.html, and one report.html over all of them;
    - tables/: Markdown and LaTeX in the papers' layout.

    Args:
        title: of the report.
        published: classifier → method → metric → the paper's figure, shown beside what was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(done.per_image(), folder)
    summaries = {key: result.summary() for key, result in done.results.items()}
    places = {
        (model, target): folder if len(summaries) == 1 else folder / slug(model) / target for model, target in summaries
    }
    for key, summary in summaries.items():
        if title:
            summary["title"] = title
        content = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(places[key] / "summary.json", f"{content}\n".encode())
    tables.write(summaries, folder / "tables")
    for (model, target), summary in summaries.items():
        theirs = (published or {}).get(model)
        # the papers' figures are of the predicted class
        if theirs and target == "predicted":
            _beside(summary["methods"], theirs).write(folder / "tables" / f"published_{slug(model)}.md")
    # last, for they need the extra ``report``
    for key, summary in summaries.items():
        _draw(done.results[key], done.engines[key], summary, places[key] / "figures")
        if len(summaries) > 1:
            html.write(places[key])
    return html.write(folder)


def write_rows(columns: Mapping[str, Sequence[Any]], folder: Path) -> Path:
    """Columns of equal length as per_image.parquet, or per_image.csv where pyarrow is missing; NaN is null."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return write_csv(columns, folder / "per_image.csv")
    table = pa.table({name: pa.array(_nulls(values), from_pandas=True) for name, values in columns.items()})
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    path = folder / "per_image.parquet"
    write_atomically(path, content.getvalue())
    return path


def _nulls(values: Sequence[Any]) -> list[Any]:
    return [None if isinstance(value, float) and math.isnan(value) else value for value in values]


def _beside(measured: Mapping[str, Any], published: Mapping[str, Mapping[str, float]]) -> tables.Table:
    """Every method with a published figure, ours and the paper's in turn."""
    rows: dict[str, Any] = {}
    for name, figures_ in published.items():
        if name in measured:
            rows[name] = {metric: measured[name].get(metric) for metric in figures_}
        rows[PAPER.format(name)] = dict(figures_)
    metrics = list(dict.fromkeys(metric for figures_ in published.values() for metric in figures_))
    return tables.comparison(rows, metrics=metrics, caption="Measured, and as published.")


def _draw(result: Evaluation, engine: Engine, summary: Mapping[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sides = {"deletion", "insertion"}
    known = [{*named} for of in result.curves.values() for named in of.values()]
    if known and sides <= set.union(*known):
        figures.curves(result.curves, folder / "curves.png", summary=summary)
        # RISE deletes to one reference and inserts from another
        if all(sides <= named for named in known):
            comparison_figures.curves_by_reference(result.curves, folder / "curves_by_reference.png")
    figures.bars(summary, result.headline, folder / f"{slug(result.headline)}.png")
    _draw_maps(result, engine, folder / "maps.png")


def _draw_maps(result: Evaluation, engine: Engine, path: Path) -> None:
    """Images that all methods have a map of, evenly spaced, with the score of every map."""
    common = set.intersection(*(set(result.values(method, "confidence")) for method in result.methods))
    if not common:
        return
    ordered = sorted(common)
    shown = [ordered[i * len(ordered) // min(SHOWN, len(ordered))] for i in range(min(SHOWN, len(ordered)))]
    items = [engine.data[index] for index in shown]
    maps = {method: engine.maps(method, shown) for method in result.methods}
    scores = {
        method: torch.tensor([result.values(method, result.headline).get(index, math.nan) for index in shown])
        for method in maps
    }
    targets = dict(zip(result.per_image["index"], result.per_image["target"], strict=True))
    names = engine.clf.class_names
    masks = [item["mask"] for item in items if item.get("mask") is not None]
    comparison_figures.qualitative(
        torch.stack([item["image"] for item in items]),
        {method: kept for method, kept in maps.items() if kept is not None},
        path,
        titles=[names[targets[i]] if names else f"class {targets[i]}" for i in shown],
        scores=scores if result.headline == "ins_minus_del" else None,
        masks=torch.stack(masks) if len(masks) == len(items) else None,
    )
