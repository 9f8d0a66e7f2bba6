// The pool as cells in reading order: pages of requests, of cached prefixes, of adapters, and free ones.

import { byId, colour, element, onThemeChange, setText } from "./dom.js";
import * as format from "./format.js";

const OWNERS = [
  ["kv", "KV cache"],
  ["cached", "Prefix cache"],
  ["adapters", "Adapters"],
  ["free", "Free"],
];
const CELL_PX = 9;
const GAP_PX = 2;

export class PoolMap {
  constructor() {
    this.canvas = byId("pool-map");
    this.pages = null;
    this.values = Object.fromEntries(OWNERS.map(([owner, label]) => [owner, this.#legendRow(owner, label)]));
    new ResizeObserver(() => this.#draw()).observe(this.canvas);
    onThemeChange(() => this.#draw());
  }

  /** `pages`: count of pages by owner. */
  update(pages, pageNbytes) {
    this.pages = pages;
    const numPages = OWNERS.reduce((sum, [owner]) => sum + pages[owner], 0);
    const text = OWNERS.map(([owner, label]) => `${label} ${format.percent(pages[owner], numPages)}`).join(", ");
    this.canvas.setAttribute("aria-label", `Pages of the memory pool: ${text}`);
    for (const [owner] of OWNERS) setText(this.values[owner], format.bytes(pages[owner] * pageNbytes));
    setText(byId("pool-scale"), `${format.compact(numPages)} pages of ${format.bytes(pageNbytes)}`);
    this.#draw();
  }

  #legendRow(owner, label) {
    const value = element("dd", { textContent: "–" });
    byId("pool-legend").append(element("div", { dataset: { owner } }, element("dt", { textContent: label }), value));
    return value;
  }

  #draw() {
    if (this.pages === null) return;
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const scale = devicePixelRatio;
    this.canvas.width = width * scale;
    this.canvas.height = height * scale;
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    const numColumns = Math.floor((width + GAP_PX) / (CELL_PX + GAP_PX));
    const numRows = Math.floor((height + GAP_PX) / (CELL_PX + GAP_PX));
    const stretch = (width + GAP_PX) / numColumns; // cells fill the width to the edge
    let cell = 0;
    for (const [owner, numCells] of shareCells(this.pages, numColumns * numRows)) {
      context.fillStyle = colour(`--${owner}`);
      for (const end = cell + numCells; cell < end; cell += 1) {
        const x = (cell % numColumns) * stretch;
        const y = Math.floor(cell / numColumns) * (CELL_PX + GAP_PX);
        context.beginPath();
        context.roundRect(x, y, stretch - GAP_PX, CELL_PX, 2);
        context.fill();
      }
    }
  }
}

/** [owner, cells] in proportion to pages; an owner of any page has a cell, and what is left over is the largest's. */
function shareCells(pages, numCells) {
  const numPages = OWNERS.reduce((sum, [owner]) => sum + pages[owner], 0);
  if (numPages === 0) return [["free", numCells]];
  const shares = OWNERS.map(([owner]) => [owner, Math.max(Math.floor((pages[owner] / numPages) * numCells), Math.min(pages[owner], 1))]);
  const largest = shares.reduce((most, share) => (share[1] > most[1] ? share : most));
  largest[1] += numCells - shares.reduce((sum, [, cells]) => sum + cells, 0);
  return shares;
}
