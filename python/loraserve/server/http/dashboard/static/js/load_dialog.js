// The dialog that loads an adapter from a folder or the Hub and shows how far it is, then its receipt.

import { errorText } from "./api.js";
import { byId, element, setText } from "./dom.js";
import * as format from "./format.js";
import { readReceipt } from "./readings.js";
import { readEvents } from "./sse.js";

export class LoadDialog {
  /** `onLoaded` runs when an adapter has been loaded. */
  constructor(api, onLoaded) {
    this.api = api;
    this.onLoaded = onLoaded;
    this.dialog = byId("load-dialog");
    this.abort = null;
    byId("load-open").addEventListener("click", () => this.#open());
    byId("load-close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => this.abort?.abort());
    byId("load-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#load();
    });
  }

  #open() {
    byId("load-form").reset();
    this.#show({});
    this.dialog.showModal();
  }

  async #load() {
    const name = byId("load-name").value.trim();
    const revision = byId("load-revision").value.trim();
    const body = { name, source: byId("load-source").value.trim(), revision: revision || null, pin: byId("load-pin").checked };
    this.abort = new AbortController();
    this.#show({ stage: "asking the server" });
    try {
      const receipt = readReceipt(await this.#follow(body, this.abort.signal));
      this.#show({ receipt });
      this.onLoaded();
    } catch (error) {
      if (error.name === "AbortError") return;
      this.#show({ error: error.message });
    } finally {
      this.abort = null;
    }
  }

  /** The adapter, once it is loaded. */
  async #follow(body, signal) {
    const response = await this.api.request("POST", "adapters", { body, accept: "text/event-stream", signal });
    for await (const { event, data } of readEvents(response)) {
      if (event === "error") throw new Error(errorText(data));
      const value = JSON.parse(data);
      if (event === "loaded") return value;
      this.#show({ stage: stageText(value), part: value.total_bytes ? value.done_bytes / value.total_bytes : null });
    }
    throw new Error("the server ended the load without a receipt");
  }

  #show({ stage, part = null, error, receipt }) {
    byId("load-submit").disabled = stage !== undefined;
    setText(byId("load-close"), stage === undefined ? "Close" : "Cancel");
    byId("load-progress").hidden = stage === undefined;
    setText(byId("load-stage"), stage ?? "");
    if (part === null) byId("load-bar").removeAttribute("value");
    else byId("load-bar").value = part;
    byId("load-error").hidden = error === undefined;
    setText(byId("load-error"), error ?? "");
    byId("load-receipt").hidden = receipt === undefined;
    byId("load-receipt").replaceChildren(...(receipt === undefined ? [] : [receiptList(receipt)]));
  }
}

function stageText({ stage, done_bytes: done, total_bytes: total }) {
  return total ? `${stage}: ${format.bytes(done)} of ${format.bytes(total)}` : stage;
}

function receiptList(receipt) {
  const list = element("dl", { className: "receipt" });
  for (const [label, text] of receipt) list.append(element("dt", { textContent: label }), element("dd", { textContent: text }));
  return list;
}
