r"""Tables of a comparison for a README, a paper, a page and a terminal; `Table` writes them.

    table = comparison(summary["methods"], summary.get("significance"), caption="ViT-B/16", label="tab:vit")
    table.to_markdown(), table.to_latex(), table.to_html(), table.to_rich()

One row per method, one column per metric, ↑ or ↓ for its better direction. The best value is bold, the second
underlined, values printed alike share a place. "–" says that the summary knows no such value, "not measured" that it
was asked for and none came out (None or NaN).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import slug
from . import columns as names
from .columns import HEADLINE, Rows, is_number
from .table import ABSENT, ALIKE, UNMEASURED, Block, Cell, Column, Row, Table

if TYPE_CHECKING:
    from ..evaluation import Evaluation

LOCALISATION = ("pointing_game", "iou", "map")  # of the terminal's table
LEGEND = "↑ higher is better, ↓ lower is better; bold: best; underlined: second."

Significance = Mapping[str, Mapping[str, Mapping[str, Any]]]
Small = Callable[[Mapping[str, Any], str], str]  # row and metric → what stands small beside the value
# title of a block of rows → heading of a group of columns → what stands there
Sections = Mapping[str, Mapping[str, tuple[Rows, Significance | None]]]


def comparison(
    rows: Rows,
    significance: Significance | None = None,
    metrics: Sequence[str] | None = None,
    intervals: bool = False,
    caption: str = "",
    label: str = "",
) -> Table:
    """All methods on one classifier: one row each, baselines first.

    Args:
        rows: method → {metric: mean, "ci95": {metric: [low, high]}}, a summary's "methods".
        significance: metric → method → {"p": corrected}, a summary's "significance": where p ≥ 0.05, † says that the
            difference to the best may be chance.
        metrics: the columns, those of other protocols as "rise/deletion"; None is every metric that a row knows but
            upper bounds, and of the costs the time.
        intervals: write ± half the 95 % interval behind every value.
        caption: of the table.
        label: for \\ref in LaTeX.

    ValueError if there are no rows, or no row knows any of the metrics.
    """
    table = _build({"": {"": (rows, significance)}}, metrics, _half if intervals else None, caption)
    return dataclasses.replace(table, label=label)


def references(summary: Mapping[str, Any], metrics: Sequence[str] | None = None, caption: str = "") -> Table:
    """The same for every reference image on its own, a block of rows each.

    Args and errors as in `comparison`; ``summary`` holds "references": reference → method → {metric: mean}.
    """
    if not summary.get("references"):
        raise ValueError("the summary has no references: give one of an evaluation")
    return _build({name: {"": (rows, None)} for name, rows in summary["references"].items()}, metrics, None, caption)


def models(
    results: Mapping[tuple[str, str], Mapping[str, Any]], metrics: Sequence[str] | None = None, caption: str = ""
) -> Table:
    """Several classifiers side by side, a block of rows per explained class where there are two.

    Args and errors as in `comparison`; ``results`` is (model, target) → summary. Best and second are those of one.
    """
    if not results:
        raise ValueError("there are no results: give (model, target) → summary")
    targets = list(dict.fromkeys(target for _, target in results))
    sections = {t: {model: _measured(results.get((model, t), {})) for model, _ in results} for t in targets}
    titled = {f"{target} class" if len(targets) > 1 else "": of for target, of in sections.items()}
    return _build(titled, metrics, None, caption)


def ranked(rows: Rows, metrics: Sequence[str], significance: Significance | None = None, notes: str = "") -> Table:
    """One classifier for a page: the methods in the order of the headline or of the first metric, the best first, with
    their 95 % intervals below the values. Args as in `comparison`; ``notes`` stand after the legend."""
    order = names.best_first([rows], _headline(names.measured(rows.values())))
    metrics = sorted(metrics, key=lambda metric: metric != HEADLINE)  # what leads a page stands before its parts
    table = _build({"": {"": (rows, significance)}}, metrics, names.interval_text, order=order)
    return dataclasses.replace(table, notes=(*table.notes, notes)) if notes else table


def overview(results: Mapping[str, Mapping[str, Any]], metric: str = HEADLINE) -> Table:
    """One metric of every method, the best mean first, with 95 % intervals below the values; ``results`` is heading
    of a column → summary. ValueError if no result holds the metric."""
    found = {title: _measured(summary) for title, summary in results.items()}
    holding = {m for rows, _ in found.values() for m, row in rows.items() if is_number(row.get(metric))}
    if not holding:
        raise ValueError(f"no result has a value of {metric!r}: choose a metric of the summaries")
    order = [m for m in names.best_first([rows for rows, _ in found.values()], metric) if m in holding]
    table = _build({"": found}, [metric], names.interval_text, order=order)
    return dataclasses.replace(table, columns=tuple(Column((title,)) for title in results))


def differences(summary: Mapping[str, Any]) -> Table:
    """Every method minus the best of each metric, with p below, corrected for the number of methods: of a summary's
    "significance", metric → method → {"best", "difference", "p"}. ValueError if none was tested."""
    tested = summary.get("significance") or {}
    chosen = names.ordered(metric for metric in tested if tested[metric])
    if not chosen:
        raise ValueError("the summary has no significance of its metrics: give one of a comparison")

    def cell(method: str, metric: str) -> Cell:
        if any(found.get("best") == method for found in tested[metric].values()):
            return Cell("best", place=1, value=0.0)
        found = tested[metric].get(method) or {}
        value, p = found.get("difference"), found.get("p")
        if not is_number(value):
            return Cell(ABSENT)
        small = f"p {p:.2g}" if is_number(p) else ""
        return Cell(names.signed(metric, value), 0, small, ALIKE if names.inseparable(found) else "", value)

    order = names.best_first([summary["methods"]], _headline(chosen))
    rows = tuple(Row(m, tuple(cell(m, metric) for metric in chosen), names.is_ours(m)) for m in order)
    note = "Mean difference on the same images; small: p, corrected for the number of methods."
    return Table(_headings([""], chosen), (Block(rows),), notes=(note, f"{ALIKE} may be chance (p ≥ {names.LEVEL})."))


def paired(pairs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Differences of Ins − Del on the same images, {"a − b": {"difference", "ci95", "p"}}."""
    rows = {}
    for pair, found in pairs.items():
        interval = " … ".join(names.signed(HEADLINE, bound) for bound in found["ci95"])
        rows[pair] = names.signed(HEADLINE, found["difference"]), interval, f"{found['p']:.2g}"
    note = "Paired bootstrap over the images; p is two-sided."
    return listed(rows, ("difference", "95 % interval", "p"), "Ins − Del", note)


def listed(rows: Mapping[str, Sequence[str]], heads: Sequence[str], stub: str, *notes: str) -> Table:
    """Texts as they are: name of a row → its cells; ``stub`` is the heading of the names."""
    lines = tuple(Row(name, tuple(map(Cell, texts))) for name, texts in rows.items())
    return Table(tuple(Column((head,)) for head in heads), (Block(lines),), stub, notes=notes)


def of(evaluation: Evaluation) -> Table:
    """What an evaluation measured, for a terminal: the first protocol, localisation where masks exist and seconds."""
    summary = evaluation.summary()
    shown, info = {*summary["protocol"]["metrics"], *LOCALISATION, "seconds_per_image"}, summary["classifier"]
    accuracy = "" if info["accuracy"] is None else f", accuracy {info['accuracy']:.3f} ↑"
    caption = f"{info['name']}: {info['images']} images, {summary['target']} class{accuracy}"
    metrics = [metric for metric in names.measured(summary["methods"].values()) if metric in shown]
    table = comparison(*_measured(summary), metrics, caption=caption)
    return dataclasses.replace(table, notes=(*table.notes, *evaluation.failure_lines()))


def write(results: Mapping[tuple[str, str], Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Write all tables of a comparison into ``folder``, as Markdown and as LaTeX: for one result ``comparison`` (with
    intervals) and ``references``; for several ``models``, and both of each in ``model/target``. Returns their paths."""
    folder = Path(folder)
    made: dict[Path, Table] = {}
    for (model, target), summary in results.items():
        place = folder if len(results) == 1 else folder / slug(model) / target
        caption = f"{model}, {target} class"
        made[place / "comparison"] = comparison(*_measured(summary), intervals=True, caption=f"{caption}.")
        if summary.get("references"):
            made[place / "references"] = references(summary, caption=f"{caption}, every reference on its own.")
    if len(results) > 1:
        made[folder / "models"] = models(results, caption="Classifiers side by side.")
    return [table.write(path.with_name(path.name + end)) for path, table in made.items() for end in (".md", ".tex")]


def _measured(summary: Mapping[str, Any]) -> tuple[Rows, Significance | None]:
    return summary.get("methods") or {}, summary.get("significance")


def _headline(metrics: Sequence[str]) -> str:
    return HEADLINE if HEADLINE in metrics else next(iter(metrics), "")


def _build(
    sections: Sections, metrics: Sequence[str] | None, small: Small | None, caption: str = "", order: Sequence[str] = ()
) -> Table:
    """Rows in the given ``order``; without one as they come, ours last and apart."""
    everything = [row for groups in sections.values() for rows, _ in groups.values() for row in rows.values()]
    if not everything:
        raise ValueError("there are no methods: give method → {metric: value}")
    known = dict.fromkeys(key for row in everything for key in row)
    chosen = [metric for metric in names.ordered(known) if _compared(metric)] if metrics is None else list(metrics)
    if known.keys().isdisjoint(chosen):
        wanted, have = ", ".join(metrics or ("any metric",)), ", ".join(sorted(known.keys() - {"ci95"}))
        raise ValueError(f"no method has a value of {wanted}: choose among {have}")
    blocks = []
    for title, groups in sections.items():
        methods = order or list(dict.fromkeys(method for rows, _ in groups.values() for method in rows))
        filled = [_cells(*of, metric, small) for of in groups.values() for metric in chosen]
        lines = [Row(m, tuple(cells.get(m, Cell(ABSENT)) for cells in filled), names.is_ours(m)) for m in methods]
        parts = [lines] if order else [[line for line in lines if line.strong is ours] for ours in (False, True)]
        blocks += [Block(tuple(part), title if i == 0 else "") for i, part in enumerate(filter(None, parts))]
    cells = [cell for block in blocks for row in block.rows for cell in row.cells]
    notes = [LEGEND]
    if any(cell.small for cell in cells):
        notes.append("± half of the 95 % interval." if small is _half else "Small: 95 % interval over images.")
    if any(cell.mark for cell in cells):
        notes.append(f"{ALIKE} the difference to the best may be chance (corrected p ≥ {names.LEVEL}).")
    headings = _headings(dict.fromkeys(group for groups in sections.values() for group in groups), chosen)
    return Table(headings, tuple(blocks), caption=caption, notes=tuple(notes))


def _compared(metric: str) -> bool:
    """Whether it is a column without being asked for: no upper bound, and of the costs the time alone."""
    found = names.row(metric)
    return found is not None and not found.oracle and metric not in names.costs()[1:]


def _headings(groups: Iterable[str], metrics: Sequence[str]) -> tuple[Column, ...]:
    protocols = any(names.split(metric)[0] for metric in metrics)
    found: list[Column] = []
    before: Any = None
    for group, metric in itertools.product(groups, metrics):
        protocol, row = names.split(metric)[0], names.row(metric)
        middle = (names.PROTOCOLS.get(protocol, protocol),) if protocols else ()
        family = group, protocol, row and row.family
        path = (*([group] if group else []), *middle, names.label(metric))
        found.append(Column(path, apart=bool(found) and family != before))
        before = family
    return tuple(found)


def _cells(rows: Rows, significance: Significance | None, metric: str, small: Small | None) -> dict[str, Cell]:
    """Method → its cell."""
    known = {method: row for method, row in rows.items() if metric in row}
    places = names.places({method: row[metric] for method, row in known.items()}, metric)
    compared = (significance or {}).get(metric) or {}
    cells = dict.fromkeys(known, Cell(UNMEASURED))
    for method, row in known.items():
        if is_number(value := row[metric]):
            place = places.get(method, 0)
            mark = ALIKE if place != 1 and names.inseparable(compared.get(method)) else ""
            cells[method] = Cell(names.number(metric, value), place, small(row, metric) if small else "", mark, value)
    return cells


def _half(row: Mapping[str, Any], metric: str) -> str:
    bounds = names.interval(row, metric)
    return f"±{names.number(metric, (bounds[1] - bounds[0]) / 2)}" if bounds else ""
