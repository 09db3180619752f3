# SPDX-License-Identifier: MIT
"""The style sheet of the page: light, dark and printed; it loads no font and no file.

Blue is kept, orange is pruned (distinguishable with every kind of color vision); text has a
contrast of at least 4.5 : 1 to its background.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fbfbfa; --card: #ffffff; --ink: #1c2329; --quiet: #5a6670; --line: #dfe3e6;
  --track: #eceff1; --kept: #1b6ca8; --pruned: #e08a3c; --mass: #2a8f78; --alarm: #a8321b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14181b; --card: #1c2226; --ink: #e6eaed; --quiet: #9dabb5; --line: #313a40;
    --track: #2a3238; --kept: #5aa9e6; --pruned: #e59a52; --mass: #4fbfa3; --alarm: #ff9a82;
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
.panel { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
caption { text-align: left; padding: 10px 14px 2px; color: var(--quiet); font-size: 13px; }
th, td {
  text-align: left; padding: 7px 14px; border-top: 1px solid var(--line); vertical-align: top;
}
thead th {
  border-top: 0; color: var(--quiet); font-weight: 600; font-size: 13px; white-space: nowrap;
}
tbody th { font-weight: 500; overflow-wrap: break-word; min-width: 9em; }
td { overflow-wrap: break-word; }
tfoot th, tfoot td { border-top: 2px solid var(--line); font-weight: 600; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.barred { min-width: 150px; width: 19%; font-variant-numeric: tabular-nums; }
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
svg .axis { stroke: var(--quiet); stroke-width: 1; opacity: 0.6; }
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
.alarm { color: var(--alarm); font-weight: 600; }
summary { cursor: pointer; margin: 14px 0 0; color: var(--quiet); }
footer { padding-top: 36px; padding-bottom: 36px; font-size: 13px; }
@media print {
  body { background: #fff; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, tr { break-inside: avoid; }
}
"""
