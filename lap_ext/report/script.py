# SPDX-License-Identifier: MIT
"""The one script of the page: it sorts tables by a column, and filters layers by a text.

The page's policy names it by its hash, so that a browser runs no other one. It reads the text of
cells and makes no HTML of it. Without it, the page shows the same tables.
"""

from __future__ import annotations

import base64
import hashlib

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], network = [...body.rows];
  const value = (row, column) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
  };
  const compare = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b);
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.title = "sort; a third click restores the order of the network";
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const next = {none: "descending", descending: "ascending", ascending: "none"};
      const order = next[head.getAttribute("aria-sort") || "none"];
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      const rows = [...network];
      if (order !== "none") {
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        rows.sort((a, b) => sign * compare(value(a, column), value(b, column)));
      }
      body.append(...rows);
    });
  });
}
const tools = document.getElementById("tools");
const wanted = document.getElementById("wanted"), count = document.getElementById("count");
tools.hidden = false;
wanted.addEventListener("input", () => {
  const text = wanted.value.trim().toLowerCase();
  for (const item of document.querySelectorAll("table.sortable tbody tr, .grid figure")) {
    item.hidden = !item.textContent.toLowerCase().includes(text);
  }
  const rows = [...document.querySelectorAll("#layers-table tbody tr")];
  count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} layers`;
});
"""
HASH = "sha256-" + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
