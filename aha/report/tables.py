r"""Tables of a comparison for a README (Markdown), a paper (LaTeX with booktabs) and a terminal (rich).

    table = comparison(summary["methods"], summary.get("significance"), caption="ViT-B/16", label="tab:vit")
    table.to_markdown(), table.to_latex(), table.to_rich()

One row per method, baselines first; one column per metric, ↑ or ↓ for its better direction. The best value is bold,
the second underlined, values printed alike share a place. "–" says that the summary knows no such value, "not measured"
that it was asked for and none came out (None or NaN).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_atomically
from . import columns as names

if TYPE_CHECKING:
    import rich.table

PAPER = (
    *("deletion", "insertion", "ins_minus_del"),
    *("positive", "negative", "neg_minus_pos"),
    *("adp", "pic", "seconds_per_image"),
)
ABSENT, UNMEASURED, ALIKE = "–", "not measured", "†"

Rows = Mapping[str, Mapping[str, Any]]
Significance = Mapping[str, Mapping[str, Mapping[str, Any]]]
# title of a block of rows → headings of a group of columns → what stands there
Sections = dict[str, dict[tuple[str, ...], tuple[Rows, Significance | None]]]


@dataclass(frozen=True)
class Cell:
    """One value as text.

    Attributes:
        text: the value, unescaped.
        place: 1 is set bold, 2 underlined.
        spread: what stands small behind the value, as "±0.0031".
        mark: a sign behind it that a note explains.
    """

    text: str
    place: int = 0
    spread: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """A column of values.

    Attributes:
        path: headings from the widest group to the column's own; equal ones side by side become one.
        apart: a wider gap before it.
    """

    path: tuple[str, ...]
    apart: bool = False


@dataclass(frozen=True)
class Row:
    """A named row; ``strong`` sets the name bold."""

    name: str
    cells: tuple[Cell, ...]
    strong: bool = False


@dataclass(frozen=True)
class Block:
    """Rows that stand together, under a title or, without one, set apart by a rule."""

    rows: tuple[Row, ...]
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Columns, blocks of rows, and what stands around them; all texts unescaped.

    Attributes:
        columns: paths of one length.
        blocks: every row holds one cell per column.
        stub: heading of the names.
        caption: of the table.
        label: for \\ref in LaTeX: letters, digits and ``: . - _ /``.
        notes: sentences under the table.

    Raises:
        ValueError: where the parts do not fit together.
    """

    columns: tuple[Column, ...]
    blocks: tuple[Block, ...]
    stub: str = "method"
    caption: str = ""
    label: str = ""
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if len({len(column.path) for column in self.columns}) != 1 or not self.columns[0].path:
            raise ValueError("the columns' paths differ in length or are empty: give one heading per level to each")
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(
                    f"row {row.name!r} has {len(row.cells)} cells: give one per column, {len(self.columns)}"
                )
        if not re.fullmatch(r"[\w:./-]*", self.label, re.ASCII):
            raise ValueError(f"label={self.label!r}: give letters, digits and : . - _ / only")

    @property
    def rows(self) -> Iterator[Row]:
        """All rows, from top to bottom."""
        return (row for block in self.blocks for row in block.rows)

    def to_markdown(self) -> str:
        """A table as GitHub reads it, padded to be read as plain text too; groups of columns are joined into the
        headings, a block's title is a row of its own. It has no place for the label."""
        lines = [[self.stub, *(_joined(column.path) for column in self.columns)]]
        lines[0] = [_markdown(text) for text in lines[0]]
        for block in self.blocks:
            if block.title:
                lines.append([f"*{_markdown(block.title)}*", *([""] * len(self.columns))])
            for row in block.rows:
                name = _markdown(row.name)
                cells = [_marked(_markdown(c.text) + c.mark, c.place, "**{}**", "<ins>{}</ins>") for c in row.cells]
                spreads = [f" {cell.spread}" if cell.spread else "" for cell in row.cells]
                lines.append([f"**{name}**" if row.strong else name, *map("".join, zip(cells, spreads, strict=True))])
        widths = [max(4, *map(len, column)) for column in zip(*lines, strict=True)]
        rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
        padded = [
            [line[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True))]
            for line in lines
        ]
        table = "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))
        parts = [_markdown(self.caption), table, " ".join(map(_markdown, self.notes))]
        return "\n\n".join(part for part in parts if part) + "\n"

    def to_latex(self) -> str:
        r"""A ``table`` (``table*`` above six columns) with \caption, \label and a booktabs tabular."""
        titled = any(block.title for block in self.blocks)
        body: list[str] = []
        for i, block in enumerate(self.blocks):
            if i == 0 or block.title or not titled:
                body.append(r"\midrule")
            else:
                body.append(r"\addlinespace")
            if block.title:
                body.append(rf"\multicolumn{{{len(self.columns) + 1}}}{{l}}{{\emph{{{_latex(block.title)}}}}} \\")
            for row in block.rows:
                name = _marked(_latex(row.name), int(row.strong), r"\textbf{{{}}}", "{}")
                body.append(" & ".join([name, *map(_latex_cell, row.cells)]) + r" \\")
        spec = "l" + "".join(r"@{\hskip 1.6em}r" if c.apart else "r" for c in self.columns)
        environment = "table*" if len(self.columns) > 6 else "table"
        lines = [
            r"% \usepackage{booktabs}",
            rf"\begin{{{environment}}}[t]",
            r"\centering",
            *([rf"\caption{{{_latex(self.caption)}}}"] if self.caption else []),
            *([rf"\label{{{self.label}}}"] if self.label else []),
            r"\small",
            r"\setlength{\tabcolsep}{4pt}",
            rf"\begin{{tabular}}{{{spec}}}",
            r"\toprule",
            *self._latex_head(),
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *([rf"\par\smallskip{{\footnotesize {_latex(' '.join(self.notes))}\par}}"] if self.notes else []),
            rf"\end{{{environment}}}",
        ]
        return "\n".join(lines) + "\n"

    def _latex_head(self) -> Iterator[str]:
        depth = len(self.columns[0].path)
        for level in range(depth - 1):
            # equal headings under different wider ones are different groups
            spans = [
                (path[-1], len(list(same)))
                for path, same in itertools.groupby(self.columns, key=lambda c: c.path[: level + 1])
            ]
            if not any(text for text, _ in spans):
                continue
            cells = [rf"\multicolumn{{{n}}}{{c}}{{{_latex(text)}}}" if text else "& " * (n - 1) for text, n in spans]
            yield " & ".join(["", *cells]).strip() + r" \\"
            ends = list(itertools.accumulate((n for _, n in spans), initial=1))
            yield " ".join(
                rf"\cmidrule(lr){{{end - n + 1}-{end}}}" for (text, n), end in zip(spans, ends[1:], strict=True) if text
            )
        yield " & ".join(_latex(text) for text in (self.stub, *(c.path[-1] for c in self.columns))) + r" \\"

    def to_rich(self) -> rich.table.Table:
        """The table for a terminal."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self.caption), caption=Text(" ".join(self.notes)))
        table.add_column(Text(self.stub), overflow="fold")
        for column in self.columns:
            # a number that is cut is another number
            head = Text("\n".join(text for text in column.path if text))
            table.add_column(head, justify="right", overflow="fold")
        for block in self.blocks:
            if block.title:
                table.add_row(Text(block.title, style="italic"))
            for i, row in enumerate(block.rows, 1):
                cells = []
                for cell in row.cells:
                    text = Text(cell.text + cell.mark, style={1: "bold", 2: "underline"}.get(cell.place, ""))
                    cells.append(Text.assemble(text, f" {cell.spread}") if cell.spread else text)
                table.add_row(
                    Text(row.name, style="bold" if row.strong else ""), *cells, end_section=i == len(block.rows)
                )
        return table

    def write(self, path: str | Path) -> Path:
        """Write the table as the suffix says, ``.md`` or ``.tex``. Returns the path.

        Raises:
            ValueError: for another suffix.
        """
        path = Path(path)
        makers = {".md": self.to_markdown, ".tex": self.to_latex}
        if path.suffix not in makers:
            raise ValueError(f"{path.name} ends in {path.suffix!r}: give one of {', '.join(makers)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, makers[path.suffix]().encode())
        return path


def comparison(
    rows: Rows,
    significance: Significance | None = None,
    metrics: Sequence[str] | None = None,
    intervals: bool = False,
    display: Mapping[str, str] | None = None,
    caption: str = "",
    label: str = "",
) -> Table:
    """All methods on one classifier: one row each, baselines first.

    Args:
        rows: method → {metric: mean, "ci95": {metric: [low, high]}}, a summary's "methods".
        significance: metric → method → {"p": corrected}, a summary's "significance": where p ≥ 0.05, † says that the
            difference to the best may be chance.
        metrics: the columns, those of other protocols as "rise/deletion"; None is the paper's layout, as far as any
            row knows it.
        intervals: write ± half the 95 % interval behind every value.
        display: method → how the table calls it.
        caption: of the table.
        label: for \\ref in LaTeX.

    Raises:
        ValueError: if there are no rows, or no row knows any of the metrics.
    """
    sections: Sections = {"": {(): (rows, significance)}}
    return _build(sections, metrics, intervals, display, caption, label)


def references(
    summary: Mapping[str, Any],
    metrics: Sequence[str] | None = None,
    across: bool = False,
    display: Mapping[str, str] | None = None,
    caption: str = "",
    label: str = "",
) -> Table:
    """The same for every reference image on its own: blocks of rows, or ``across`` for groups of columns.

    Args and errors as in `comparison`; ``summary`` holds "references": reference → method → {metric: mean}.
    """
    of = summary.get("references") or {}
    if not of:
        raise ValueError("the summary has no references: give one of an evaluation")
    sections: Sections = {"": {(name,): (rows, None) for name, rows in of.items()}}
    if not across:
        sections = {name: {(): (rows, None)} for name, rows in of.items()}
    return _build(sections, metrics, False, display, caption, label)


def models(
    results: Mapping[tuple[str, str], Mapping[str, Any]],
    metrics: Sequence[str] | None = None,
    intervals: bool = False,
    display: Mapping[str, str] | None = None,
    caption: str = "",
    label: str = "",
) -> Table:
    """Several classifiers side by side, a block of rows per explained class where there are two.

    Args and errors as in `comparison`; ``results`` is (model, target) → summary, target "predicted" or "true". Best
    and second are those of one model and target.
    """
    if not results:
        raise ValueError("there are no results: give (model, target) → summary")
    targets = list(dict.fromkeys(target for _, target in results))
    sections: Sections = {f"{target} class" if len(targets) > 1 else "": {} for target in targets}
    for target, groups in zip(targets, sections.values(), strict=True):
        for model in dict.fromkeys(model for model, _ in results):
            summary = results.get((model, target), {})
            groups[(model,)] = (summary.get("methods") or {}, summary.get("significance"))
    return _build(sections, metrics, intervals, display, caption, label)


def write(results: Mapping[tuple[str, str], Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Write all tables of a comparison into ``folder``, as Markdown and as LaTeX. Returns their paths.

    For one result ``comparison`` (with intervals) and ``references``; for several ``models``, and both of each in a
    folder ``model/target``.
    """
    folder = Path(folder)
    made: dict[Path, Table] = {}
    for (model, target), summary in results.items():
        place = folder if len(results) == 1 else folder / re.sub(r"[^\w.-]+", "_", model) / target
        caption = f"{model}, {target} class"
        made[place / "comparison"] = comparison(
            summary["methods"], summary.get("significance"), intervals=True, caption=f"{caption}."
        )
        if summary.get("references"):
            made[place / "references"] = references(summary, caption=f"{caption}, every reference on its own.")
    if len(results) > 1:
        made[folder / "models"] = models(results, caption="Classifiers side by side.")
    return [table.write(path.with_name(path.name + end)) for path, table in made.items() for end in (".md", ".tex")]


def _build(
    sections: Sections,
    metrics: Sequence[str] | None,
    intervals: bool,
    display: Mapping[str, str] | None,
    caption: str,
    label: str,
) -> Table:
    everything = [row for groups in sections.values() for rows, _ in groups.values() for row in rows.values()]
    if not everything:
        raise ValueError("there are no methods: give method → {metric: value}")
    known = {key for row in everything for key in row}
    chosen = [metric for metric in (PAPER if metrics is None else metrics) if metrics is not None or metric in known]
    if not known.intersection(chosen):
        wanted = ", ".join(PAPER if metrics is None else metrics)
        raise ValueError(f"no method has a value of {wanted}: choose among {', '.join(sorted(known - {'ci95'}))}")
    groups = list(dict.fromkeys(group for of in sections.values() for group in of))
    blocks = []
    for title, of in sections.items():
        methods = list(dict.fromkeys(method for rows, _ in of.values() for method in rows))
        filled = [_cells(*of.get(group, ({}, None)), methods, chosen, intervals) for group in groups]
        lines = [
            Row((display or {}).get(m, m), tuple(cell for cells in filled for cell in cells[m]), names.is_ours(m))
            for m in methods
        ]
        parts = [
            tuple(row for row, m in zip(lines, methods, strict=True) if names.is_ours(m) is o) for o in (False, True)
        ]
        for i, part in enumerate(filter(None, parts)):
            blocks.append(Block(part, title if i == 0 else ""))
    cells = [cell for block in blocks for row in block.rows for cell in row.cells]
    notes = ["↑ higher is better, ↓ lower is better; bold: best; underlined: second."]
    if any(cell.spread for cell in cells):
        notes.append("± half of the 95 % interval.")
    if any(cell.mark for cell in cells):
        notes.append(f"{ALIKE} the difference to the best may be chance (corrected p ≥ {names.LEVEL}).")
    return Table(_headings(groups, chosen), tuple(blocks), caption=caption, label=label, notes=tuple(notes))


def _headings(groups: Sequence[tuple[str, ...]], metrics: Sequence[str]) -> tuple[Column, ...]:
    protocols = any(names.split(metric)[0] for metric in metrics)
    found: list[Column] = []
    before: Any = None
    for group in groups:
        for metric in metrics:
            protocol = names.split(metric)[0]
            middle = (names.protocol_label(protocol) if protocol else "",) if protocols else ()
            text = names.label(metric) + names.arrow_after(metric)
            family = group, names.family(metric)
            found.append(Column((*group, *middle, text), apart=bool(found) and family != before))
            before = family
    return tuple(found)


def _cells(
    rows: Rows, significance: Significance | None, methods: Sequence[str], metrics: Sequence[str], intervals: bool
) -> dict[str, list[Cell]]:
    cells: dict[str, list[Cell]] = {method: [] for method in methods}
    for metric in metrics:
        places = names.places({method: row.get(metric) for method, row in rows.items()}, metric)
        compared = (significance or {}).get(metric) or {}
        for method in methods:
            row = rows.get(method, {})
            value = row.get(metric)
            if not names.is_number(value):
                cells[method].append(Cell(UNMEASURED if metric in row else ABSENT))
                continue
            bounds = names.interval(row, metric) if intervals else None
            spread = f"±{names.number(metric, (bounds[1] - bounds[0]) / 2)}" if bounds else ""
            place = places.get(method, 0)
            mark = ALIKE if place != 1 and names.inseparable(compared.get(method)) else ""
            cells[method].append(Cell(names.number(metric, value), place, spread, mark))
    return cells


def _joined(path: Sequence[str]) -> str:
    return " · ".join(text for text in path if text)


def _marked(text: str, place: int, best: str, second: str) -> str:
    return {1: best, 2: second}.get(place, "{}").format(text)


def _markdown(text: str) -> str:
    # an underscore inside a word is plain in Markdown: names stay as they are typed
    text = re.sub(r"&(?=#?\w+;)", "&amp;", " ".join(text.split()))
    return re.sub(r"[\\`*\[\]<>|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "−": "$-$",
    "–": "--",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "→": r"$\rightarrow$",
    "†": r"$^{\dagger}$",
    "τ": r"$\tau$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "γ": r"$\gamma$",
    "κ": r"$\kappa$",
    "…": r"\ldots{}",
    "\N{NO-BREAK SPACE}": "~",
    "\N{THIN SPACE}": r"\,",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(re.split(r"[ \t\r\n]+", text)))


def _latex_cell(cell: Cell) -> str:
    if cell.text == UNMEASURED:
        return rf"{{\scriptsize {UNMEASURED}}}"
    text = _latex(re.sub(r"^-(?=[\d.])", "−", cell.text))
    text = _marked(text, cell.place, r"\textbf{{{}}}", r"\underline{{{}}}")
    if cell.spread:
        return rf"{text}{_latex(cell.mark)}{{\scriptsize\,{_latex(cell.spread)}}}"
    # a mark without width leaves the digits of a column under each other
    return text + (rf"\rlap{{{_latex(cell.mark)}}}" if cell.mark else "")
