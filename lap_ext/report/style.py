# SPDX-License-Identifier: MIT
"""The style sheet of the page: light, dark and printed; it loads no font and no file.

Blue is kept, orange is pruned (distinguishable with every kind of color vision). Text has a
contrast of at least 4.5 : 1 to its background, bars and lines of 3 : 1 (test_style.py computes
them).

The columns of the table of layers need 1020 px in all, less than a window of 1280 px has for them;
in a narrow one the table scrolls, and its names, in two fifths of the width, stay in place.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fbfbfa; --card: #ffffff; --ink: #1c2329; --quiet: #5a6670; --line: #dfe3e6;
  --track: #eceff1; --kept: #1b6ca8; --pruned: #b45309; --mass: #1f7a66; --alarm: #a8321b;
  --alarm-ground: #fdeeea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14181b; --card: #1c2226; --ink: #e6eaed; --quiet: #9dabb5; --line: #313a40;
    --track: #2a3238; --kept: #5aa9e6; --pruned: #e59a52; --mass: #4fbfa3; --alarm: #ff9a82;
    --alarm-ground: #3a211c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main, header, footer { max-width: 1080px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 36px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 44px 0 4px; }
h3 { font-size: 13px; font-weight: 600; margin: 0 0 4px; overflow-wrap: anywhere; }
p { margin: 4px 0 12px; max-width: 76ch; }
.quiet, footer, figcaption { color: var(--quiet); }
code { font: 0.92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.cards {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 22px 0 0; padding: 0;
}
.cards div, figure, .panel {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px;
}
.cards div { padding: 12px 16px; }
.cards dt { color: var(--quiet); font-size: 13px; }
.cards dd { margin: 0; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
.cards dd small { display: block; font-size: 12.5px; font-weight: 400; color: var(--quiet); }
.panel, pre { overflow-x: auto; }
.panel:focus-visible, .wide:focus-visible, pre:focus-visible { outline: 2px solid var(--kept); }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td {
  text-align: left; padding: 7px 10px; border-top: 1px solid var(--line); vertical-align: top;
}
thead th { border-top: 0; color: var(--quiet); font-weight: 600; font-size: 13px; }
thead button {
  all: unset; cursor: pointer; text-decoration: underline dotted; text-underline-offset: 3px;
}
thead button:focus-visible { outline: 2px solid var(--kept); }
th[aria-sort="descending"]::after { content: " \\2193"; }
th[aria-sort="ascending"]::after { content: " \\2191"; }
tbody th { font-weight: 500; }
th, td { overflow-wrap: anywhere; }
table.layers, table.pair { table-layout: fixed; }
table.layers { min-width: 1020px; }
table.pair { min-width: 560px; }
table.plain { min-width: 420px; }
.layers-0 { width: 220px; } .layers-1 { width: 98px; } .layers-2 { width: 98px; }
.layers-3 { width: 86px; } .layers-4 { width: 98px; } .layers-5 { width: 108px; }
.layers-6 { width: 108px; } .layers-7 { width: 112px; } .layers-8 { width: 92px; }
.layers-9 { width: 112px; }
.pair-0 { width: 220px; }
table.sortable th:first-child {
  position: sticky; left: 0; background: var(--card); border-right: 1px solid var(--line);
}
tr.empty th, tr.empty td { background: var(--alarm-ground); }
table.sortable tr.empty th:first-child { background: var(--alarm-ground); color: var(--alarm); }
.badge {
  display: inline-block; padding: 0 6px; border-radius: 4px; font-size: 12px;
  text-transform: uppercase; background: var(--alarm); color: var(--card);
}
nav { max-width: 1080px; margin: 18px auto 0; padding: 0 24px; }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0; padding: 0; list-style: none; }
a { color: var(--kept); }
input { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--quiet);
  border-radius: 6px; padding: 3px 8px; max-width: 100%; }
[hidden] { display: none; }
.origin { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 8px 0; }
.origin dt { color: var(--quiet); }
.origin dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 14px; margin: 4px 0; }
tfoot th, tfoot td { border-top: 2px solid var(--line); font-weight: 600; }
.num { text-align: right; font-variant-numeric: tabular-nums; }
td { font-variant-numeric: tabular-nums; }
.value { display: block; white-space: nowrap; }
.track {
  display: block; height: 7px; border-radius: 4px; background: var(--track); overflow: hidden;
}
.fill { display: block; height: 100%; border-radius: 4px; }
.fill.pruned { background: var(--pruned); }
.fill.kept { background: var(--kept); }
.fill.mass { background: var(--mass); }
figure { margin: 12px 0 0; padding: 14px 16px 10px; }
figcaption { font-size: 13px; }
.wide { overflow-x: auto; }
.wide svg { min-width: 640px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font: 10.5px system-ui, -apple-system, "Segoe UI", sans-serif; }
svg .kept { fill: var(--kept); }
svg .pruned { fill: var(--pruned); }
svg .axis { stroke: var(--quiet); stroke-width: 1; }
svg .arc { fill: none; stroke: var(--kept); stroke-width: 1; }
svg .dot { fill: var(--kept); }
svg .alarm-dot { fill: var(--alarm); }
svg .threshold { stroke: var(--ink); stroke-width: 1.4; stroke-dasharray: 4 3; }
svg .threshold-label { fill: var(--ink); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 0 12px; }
.legend { display: flex; gap: 18px; flex-wrap: wrap; margin: 8px 0 0; padding: 0; list-style: none;
  color: var(--quiet); font-size: 13px; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
.swatch.kept { background: var(--kept); }
.swatch.pruned { background: var(--pruned); }
.swatch.threshold { height: 0; width: 16px; border-radius: 0; border-top: 2px dashed var(--ink);
  vertical-align: middle; }
.alarm { color: var(--alarm); font-weight: 600; overflow-wrap: anywhere; }
summary { cursor: pointer; margin: 14px 0 0; color: var(--quiet); }
footer { padding-top: 36px; padding-bottom: 36px; font-size: 13px; }
@media (max-width: 640px) {
  main, header, footer, nav { padding-left: 12px; padding-right: 12px; }
  .layers-0, .pair-0 { width: 136px; }
  table.layers { min-width: 936px; }
  table.pair { min-width: 476px; }
  .origin { grid-template-columns: 1fr; }
}
@media print {
  body { background: #fff; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, tr { break-inside: avoid; }
}
"""
