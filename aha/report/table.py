r"""One table, written for a README (Markdown), a paper (LaTeX with booktabs), a page (HTML) and a terminal (rich)."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..files import write_atomically

if TYPE_CHECKING:
    import jinja2
    import rich.table

ABSENT, UNMEASURED, ALIKE = "–", "not measured", "†"


class Cell(NamedTuple):
    """One value as text."""

    text: str  # the value; like all texts of a table unescaped
    place: int = 0  # 1 is set bold, 2 underlined
    small: str = ""  # stands small behind the value, below it in HTML: an interval, or p
    mark: str = ""  # a sign behind it that a note explains
    value: float | None = None  # the number that the text says, if it says one


class Column(NamedTuple):
    """A column of values."""

    path: tuple[str, ...]  # headings from the widest group to its own; equal ones side by side become one
    apart: bool = False  # a wider gap before it


class Row(NamedTuple):
    """A named row; ``strong`` sets the name bold."""

    name: str
    cells: tuple[Cell, ...]
    strong: bool = False


class Block(NamedTuple):
    """Rows that stand together, under a title or, without one, set apart by a rule."""

    rows: tuple[Row, ...]
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Columns, blocks of rows, and what stands around them. ValueError where they do not fit together."""

    columns: tuple[Column, ...]  # paths of one length
    blocks: tuple[Block, ...]  # every row holds one cell per column
    stub: str = "method"  # heading of the names
    caption: str = ""
    label: str = ""  # for \ref in LaTeX: letters, digits and : . - _ /
    notes: tuple[str, ...] = ()  # sentences under the table

    def __post_init__(self) -> None:
        if len({len(column.path) for column in self.columns}) != 1 or not self.columns[0].path:
            raise ValueError("the columns' paths differ in length or are empty: give one heading per level to each")
        for row in self.rows:
            if (count := len(row.cells)) != len(self.columns):
                raise ValueError(f"row {row.name!r} has {count} cells: give one per column, {len(self.columns)}")
        if not re.fullmatch(r"[\w:./-]*", self.label, re.ASCII):
            raise ValueError(f"label={self.label!r}: give letters, digits and : . - _ / only")

    @property
    def rows(self) -> Iterator[Row]:
        """All rows, from top to bottom."""
        return (row for block in self.blocks for row in block.rows)

    def to_markdown(self) -> str:
        """A table as GitHub reads it, padded to be read as plain text too; groups of columns are joined into the
        headings, a block's title is a row of its own. It has no place for the label."""
        lines = [[_markdown(text) for text in (self.stub, *(_joined(c.path, " · ") for c in self.columns))]]
        for block in self.blocks:
            if block.title:
                lines.append([f"*{_markdown(block.title)}*", *([""] * len(self.columns))])
            for row in block.rows:
                name = _marked(_markdown(row.name), int(row.strong), "**{}**")
                lines.append([name, *map(_markdown_cell, row.cells)])
        widths = [max(4, *map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])])
        sides = ["<", *(">" * len(self.columns))]
        padded = ([f"{t:{side}{w}}" for t, side, w in zip(line, sides, widths, strict=True)] for line in lines)
        table = "\n".join(f"| {' | '.join(line)} |" for line in padded)
        return _joined((_markdown(self.caption), table, " ".join(map(_markdown, self.notes))), "\n\n") + "\n"

    def to_latex(self) -> str:
        r"""A ``table`` (``table*`` above six columns) with \caption, \label and a booktabs tabular."""
        titled = any(block.title for block in self.blocks)
        body: list[str] = []
        for i, block in enumerate(self.blocks):
            body.append(r"\midrule" if i == 0 or block.title or not titled else r"\addlinespace")
            if block.title:
                body.append(rf"\multicolumn{{{len(self.columns) + 1}}}{{l}}{{\emph{{{_latex(block.title)}}}}} \\")
            for row in block.rows:
                name = _marked(_latex(row.name), int(row.strong), r"\textbf{{{}}}")
                body.append(" & ".join([name, *map(_latex_cell, row.cells)]) + r" \\")
        spec = "l" + "".join(r"@{\hskip 1.6em}r" if c.apart else "r" for c in self.columns)
        environment = "table*" if len(self.columns) > 6 else "table"
        lines = [
            *(r"% \usepackage{booktabs}", rf"\begin{{{environment}}}[t]", r"\centering"),
            *([rf"\caption{{{_latex(self.caption)}}}"] if self.caption else []),
            *([rf"\label{{{self.label}}}"] if self.label else []),
            *(r"\small", r"\setlength{\tabcolsep}{4pt}", rf"\begin{{tabular}}{{{spec}}}", r"\toprule"),
            *self._latex_head(),
            *body,
            *(r"\bottomrule", r"\end{tabular}"),
            *([rf"\par\smallskip{{\footnotesize {_latex(' '.join(self.notes))}\par}}"] if self.notes else []),
            rf"\end{{{environment}}}",
        ]
        return "\n".join(lines) + "\n"

    def _latex_head(self) -> Iterator[str]:
        for level in range(len(self.columns[0].path) - 1):
            # equal headings under different wider ones are different groups
            groups = itertools.groupby(self.columns, key=lambda column: column.path[: level + 1])
            spans = [(path[-1], len(list(same))) for path, same in groups]
            if not any(text for text, _ in spans):
                continue
            cells = [rf"\multicolumn{{{n}}}{{c}}{{{_latex(text)}}}" if text else "& " * (n - 1) for text, n in spans]
            yield " & ".join(["", *cells]).strip() + r" \\"
            ends = itertools.accumulate(n for _, n in spans)
            yield " ".join(
                rf"\cmidrule(lr){{{end - n + 2}-{end + 1}}}" for (text, n), end in zip(spans, ends, strict=True) if text
            )
        yield " & ".join(_latex(text) for text in (self.stub, *(column.path[-1] for column in self.columns))) + r" \\"

    def to_html(self) -> str:
        """A scrolling ``div`` with the table, and its notes; classes wide, ours, small and faint are the page's."""
        return template("table.html.j2").render(table=self).strip()

    def to_rich(self) -> rich.table.Table:
        """The table for a terminal."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        # so close, thirteen columns and a long name share the width of a pipe
        table = RichTable(box=box.SIMPLE, collapse_padding=True, pad_edge=False)
        table.title, table.caption = Text(self.caption), Text("\n".join(self.notes))
        table.add_column(Text(self.stub), overflow="fold")
        for column in self.columns:
            # a number that is cut is another number
            table.add_column(Text(_joined(column.path, "\n")), justify="right", overflow="fold")
        for block in self.blocks:
            if block.title:
                table.add_row(Text(block.title, style="italic"))
            for row in block.rows:
                line = [Text(row.name, style="bold" if row.strong else "")]
                for cell in row.cells:
                    text = Text(cell.text + cell.mark, style={1: "bold", 2: "underline"}.get(cell.place, ""))
                    line.append(Text.assemble(text, f" {cell.small}") if cell.small else text)
                table.add_row(*line, end_section=row is block.rows[-1])
        return table

    def write(self, path: str | Path) -> Path:
        """Write the table as the suffix says, ``.md`` or ``.tex``, and return the path. ValueError for another one."""
        path = Path(path)
        makers = {".md": self.to_markdown, ".tex": self.to_latex}
        if path.suffix not in makers:
            raise ValueError(f"{path.name} ends in {path.suffix!r}: give one of {', '.join(makers)}")
        write_atomically(path, makers[path.suffix]().encode())
        return path


@functools.cache
def template(name: str) -> jinja2.Template:
    """One of the templates of this folder. ImportError with what to install if there is no jinja2."""
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the report needs jinja2: pip install aha-attribution[report]") from error
    loader, strict = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.StrictUndefined
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True)
    return made.get_template(name)


def _joined(parts: Sequence[str], between: str = " ") -> str:
    return between.join(filter(None, parts))


def _marked(text: str, place: int, best: str, second: str = "{}") -> str:
    return {1: best, 2: second}.get(place, "{}").format(text)


def _markdown(text: str) -> str:
    # an underscore inside a word is plain in Markdown: names stay as they are typed
    text = re.sub(r"&(?=#?\w+;)", "&amp;", " ".join(text.split()))
    return re.sub(r"[\\`*\[\]<>|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def _markdown_cell(cell: Cell) -> str:
    return _joined((_marked(_markdown(cell.text) + cell.mark, cell.place, "**{}**", "<ins>{}</ins>"), cell.small))


_WORDS = "textbackslash textasciitilde textasciicircum textless textgreater textbar ldots"
_MATHS = "uparrow downarrow pm geq leq times cdot rightarrow tau alpha beta gamma kappa"
_LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {sign: rf"\{name}{{}}" for sign, name in zip("\\~^<>|…", _WORDS.split(), strict=True)}
    | {sign: rf"$\{name}$" for sign, name in zip("↑↓±≥≤×·→ταβγκ", _MATHS.split(), strict=True)}
    | {"−": "$-$", "–": "--", "†": r"$^{\dagger}$", '"': "''", "\N{NO-BREAK SPACE}": "~", "\N{THIN SPACE}": r"\,"}
)


def _latex(text: str) -> str:
    return " ".join(re.split(r"[ \t\r\n]+", text)).translate(_LATEX)


def _latex_cell(cell: Cell) -> str:
    if cell.text == UNMEASURED:
        return rf"{{\scriptsize {UNMEASURED}}}"
    text = _latex(re.sub(r"^-(?=[\d.])", "−", cell.text))
    text = _marked(text, cell.place, r"\textbf{{{}}}", r"\underline{{{}}}")
    if cell.small:
        return rf"{text}{_latex(cell.mark)}{{\scriptsize\,{_latex(cell.small)}}}"
    # a mark without width leaves the digits of a column under each other
    return text + (rf"\rlap{{{_latex(cell.mark)}}}" if cell.mark else "")
