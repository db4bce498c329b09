"use strict";
// Tables sort by a click on a header: upwards, downwards, as it was. What has no value comes last.
{
  const TURN = { none: "ascending", ascending: "descending", descending: "none" };

  /** What a cell sorts by: a number, a text, or null for nothing. */
  function key(row, column) {
    const cell = row.cells[column];
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    const text = cell.textContent.trim();
    return text === "–" || text === "" ? null : text;
  }

  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return a.localeCompare(b, undefined, { numeric: true });
  }

  function sorted(rows, column, downwards) {
    const keyed = rows.map((row) => [key(row, column), row]);
    const known = keyed.filter(([k]) => k !== null);
    known.sort(([a], [b]) => (downwards ? compare(b, a) : compare(a, b)));
    return [...known, ...keyed.filter(([k]) => k === null)].map(([, row]) => row);
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const headers = [...table.tHead.rows[0].cells];
    if (rows.length < 2) continue;
    headers.forEach((header, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      header.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const order = TURN[header.getAttribute("aria-sort")];
        for (const other of headers) other.setAttribute("aria-sort", "none");
        header.setAttribute("aria-sort", order);
        body.append(...(order === "none" ? rows : sorted(rows, column, order === "descending")));
      });
    });
  }
}
