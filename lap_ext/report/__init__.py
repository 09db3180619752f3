# SPDX-License-Identifier: MIT
"""Reports that people look at: one self-contained HTML page, and pictures for papers.

facts.py measures, page.py and charts.py draw the page, plots.py draws with matplotlib.
"""

from lap_ext.report.facts import Facts, Histogram, LayerFacts, Measure
from lap_ext.report.page import html, write

__all__ = ["Facts", "Histogram", "LayerFacts", "Measure", "html", "write"]
