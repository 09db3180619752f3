# SPDX-License-Identifier: MIT
"""Reports about a pruning: a self-contained HTML page, and plots for papers.

facts.py measures, gather.py measures all layers, page.py and charts.py write the page, and plots.py
draws with matplotlib.
"""

from lap_ext.report.facts import Facts, Histogram, LayerFacts, Measure
from lap_ext.report.page import html, write

__all__ = ["Facts", "Histogram", "LayerFacts", "Measure", "html", "write"]
