"""What a reader sees: overlays, figures, tables and one self-contained HTML page.

Overlays and tables need the core dependencies only; figures and the page need the extra ``report``.
"""

from . import figures, html, overlays, tables

__all__ = ["figures", "html", "overlays", "tables"]
