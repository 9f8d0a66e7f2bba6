// The table of adapters: filtered, sorted, and changed in place so that focus and scroll stay.

import { AdapterRow } from "./adapter_row.js";
import { byId, element, setText } from "./dom.js";

const COLUMNS = [
  { title: "Name", by: ({ name }) => name },
  { title: "State", by: ({ state }) => state },
  { title: "Rank", by: ({ rank }) => rank, isNumber: true },
  { title: "Size", by: ({ nbytes }) => nbytes, isNumber: true },
  { title: "Requests", by: ({ requests }) => requests, isNumber: true },
  { title: "Tokens", by: ({ tokens }) => tokens, isNumber: true },
  { title: "Latency", by: ({ latencyS }) => latencyS, isNumber: true, isLeft: true },
  { title: "Actions", by: null },
];
const NUM_SHOWN = 25;

export class AdaptersTable {
  /** `actions`: see AdapterRow. */
  constructor(actions) {
    this.actions = actions;
    this.adapters = [];
    this.rows = new Map();
    this.sort = { column: COLUMNS[0], isDescending: false };
    this.numShown = NUM_SHOWN;
    this.heads = COLUMNS.map((column) => this.#head(column));
    byId("adapters-head").append(...this.heads);
    byId("adapters-find").addEventListener("input", () => this.#show());
    byId("adapters-more").addEventListener("click", () => {
      this.numShown += NUM_SHOWN;
      this.#show();
    });
  }

  update(adapters) {
    this.adapters = adapters;
    setText(byId("adapters-count"), String(adapters.length));
    this.#show();
  }

  #show() {
    const sought = byId("adapters-find").value.trim().toLowerCase();
    const found = this.adapters.filter((adapter) => [adapter.name, adapter.state ?? "", adapter.description ?? ""].some((text) => text.toLowerCase().includes(sought)));
    const shown = found.sort((one, other) => this.#compare(one, other)).slice(0, this.numShown);
    this.#place(shown.map((adapter) => this.#row(adapter)));
    const empty = byId("adapters-empty");
    empty.hidden = shown.length > 0;
    setText(empty, sought ? `No adapter matches “${sought}”.` : "No adapter is registered. Load one from a folder or the Hub.");
    const more = byId("adapters-more");
    more.hidden = found.length <= shown.length;
    setText(more, `Show more (${found.length - shown.length} left)`);
  }

  #row(adapter) {
    const row = this.rows.get(adapter.name) ?? new AdapterRow(adapter.name, this.actions);
    this.rows.set(adapter.name, row);
    row.update(adapter);
    return row;
  }

  #place(rows) {
    const body = byId("adapters-body");
    const focused = body.contains(document.activeElement) ? document.activeElement : null;
    const nodes = rows.map(({ node }) => node);
    const isSame = nodes.length === body.children.length && nodes.every((node, index) => body.children[index] === node);
    if (!isSame) {
      body.replaceChildren(...nodes);
      focused?.focus({ preventScroll: true });
    }
    const names = new Set(this.adapters.map(({ name }) => name));
    for (const name of this.rows.keys()) if (!names.has(name)) this.rows.delete(name);
  }

  /** By the chosen column, then by name; what has no value comes last. */
  #compare(one, other) {
    const { column, isDescending } = this.sort;
    const [left, right] = [column.by(one) ?? null, column.by(other) ?? null];
    if (left === null || right === null) return (left === null) - (right === null) || one.name.localeCompare(other.name);
    const order = column.isNumber ? left - right : left.localeCompare(right, "en", { numeric: true });
    return (isDescending ? -order : order) || one.name.localeCompare(other.name, "en", { numeric: true });
  }

  #head(column) {
    const className = column.isNumber && !column.isLeft ? "number" : "";
    const head = element("th", { className, scope: "col", attributes: { role: "columnheader" } });
    if (column.by === null) {
      head.append(element("span", { textContent: column.title }));
      return head;
    }
    head.append(element("button", { type: "button", textContent: column.title, onclick: () => this.#sortBy(column) }));
    if (column === this.sort.column) head.setAttribute("aria-sort", "ascending");
    return head;
  }

  #sortBy(column) {
    const isAgain = column === this.sort.column;
    this.sort = { column, isDescending: isAgain ? !this.sort.isDescending : Boolean(column.isNumber) };
    this.heads.forEach((head, index) => {
      if (COLUMNS[index] === column) head.setAttribute("aria-sort", this.sort.isDescending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    this.#show();
  }
}
