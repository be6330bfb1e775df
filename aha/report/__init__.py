"""What a reader sees: figures, tables and one self-contained HTML page.

Tables need the core dependencies only; figures and the page need the extra ``report``.
"""

from . import figures, html, tables

__all__ = ["figures", "html", "tables"]
