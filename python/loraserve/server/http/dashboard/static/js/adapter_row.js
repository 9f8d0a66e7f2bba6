// One adapter's row: what it is, its traffic, and what can be done with it.

import { element, setText } from "./dom.js";
import * as format from "./format.js";
import { Sparkline } from "./sparkline.js";

const STATE_TEXT = { resident: "in the pool", loading: "loading", registered: "on disk", failed: "failed", unloading: "unloading" };

export class AdapterRow {
  /** `actions`: {try, warm, pin, unload, versions}, each called with the adapter. */
  constructor(name, actions) {
    this.name = name;
    this.adapter = null;
    this.title = element("span", { className: "adapter-name", textContent: name });
    this.about = element("small");
    this.state = element("span", { className: "state" });
    [this.rank, this.nbytes] = [element("span"), element("span")];
    [this.requests, this.requestRate] = [element("span"), element("small")];
    [this.tokens, this.tokenRate] = [element("span"), element("small")];
    this.latencyText = element("span", { className: "latency-text" });
    this.sparkline = new Sparkline(`Latency of ${name} over the last minute`);
    const button = (text, label, action, className = "admin-only") =>
      element("button", { type: "button", className, textContent: text, attributes: { "aria-label": `${label} ${name}` }, onclick: () => action(this.adapter) });
    this.versionsButton = button("", "Versions of", actions.versions, "quiet generation");
    this.tryButton = button("Try", "Try in the playground:", actions.try, "");
    this.warmButton = button("Warm", "Load into the pool:", actions.warm);
    this.pinButton = button("Pin", "Pin", actions.pin);
    this.unloadButton = button("Unload", "Unload", actions.unload);
    this.node = element("tr", { attributes: { role: "row" }, dataset: { adapter: name } }, ...this.#cells());
  }

  /** `adapter` as readings.js makes it. */
  update(adapter) {
    this.adapter = adapter;
    setText(this.about, adapter.description || adapter.path || "");
    this.about.title = adapter.path ?? "";
    setText(this.versionsButton, `v${adapter.generation}`);
    setText(this.state, STATE_TEXT[adapter.state] ?? adapter.state ?? "");
    this.state.dataset.state = adapter.state ?? "";
    setText(this.rank, format.count(adapter.rank));
    setText(this.nbytes, format.bytes(adapter.nbytes));
    setText(this.requests, format.compact(adapter.requests));
    setText(this.requestRate, adapter.requestsPerS ? `${format.rate(adapter.requestsPerS)}/s` : "");
    setText(this.tokens, format.compact(adapter.tokens));
    setText(this.tokenRate, adapter.tokensPerS ? `${format.rate(adapter.tokensPerS)}/s` : "");
    setText(this.latencyText, format.seconds(adapter.latencyS));
    this.sparkline.draw(adapter.latencySeriesS);
    this.pinButton.setAttribute("aria-pressed", String(adapter.isPinned));
    setText(this.pinButton, adapter.isPinned ? "Pinned" : "Pin");
    this.warmButton.disabled = adapter.state !== "registered";
    this.unloadButton.disabled = adapter.state === "unloading";
  }

  #cells() {
    const cell = (column, label, className, ...children) =>
      element("td", { className, attributes: { role: "cell" }, dataset: label ? { column, label } : { column } }, ...children);
    return [
      cell("name", "", "", this.title, this.versionsButton, this.about),
      cell("state", "", "", this.state),
      cell("rank", "Rank", "number", this.rank),
      cell("nbytes", "Size", "number", this.nbytes),
      cell("requests", "Requests", "number", this.requests, this.requestRate),
      cell("tokens", "Tokens", "number", this.tokens, this.tokenRate),
      cell("latency", "Latency", "", element("div", { className: "latency" }, this.sparkline.node, this.latencyText)),
      cell("actions", "", "", element("div", { className: "actions" }, this.tryButton, this.warmButton, this.pinButton, this.unloadButton)),
    ];
  }
}
