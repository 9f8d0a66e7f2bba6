// What an operator does with a loaded adapter: warm, pin, unload (asked about first).

import { byId, setText } from "./dom.js";
import { toast } from "./toast.js";

export class AdapterActions {
  /** `onChange` runs after the server carried something out. */
  constructor(api, onChange) {
    this.api = api;
    this.onChange = onChange;
    this.unloading = null;
    const dialog = byId("unload-dialog");
    dialog.addEventListener("close", () => {
      if (dialog.returnValue === "unload") this.#send("DELETE", this.unloading, "", undefined, "unloaded");
    });
  }

  warm({ name }) {
    return this.#send("POST", name, "/warm", undefined, "is in the pool");
  }

  pin({ name, isPinned }) {
    return this.#send("PUT", name, "/pin", { pinned: !isPinned }, isPinned ? "no longer pinned" : "pinned");
  }

  unload({ name, path }) {
    this.unloading = name;
    setText(byId("unload-text"), `Requests for “${name}” will be refused until it is loaded again${path ? ` from ${path}` : ""}.`);
    const dialog = byId("unload-dialog");
    dialog.returnValue = "keep";
    dialog.showModal();
  }

  async #send(method, name, action, body, done) {
    try {
      await this.api.send(method, `adapters/${encodeURIComponent(name)}${action}`, body);
      toast(`${name}: ${done}`);
      this.onChange();
    } catch (error) {
      toast(`${name}: ${error.message}`, "error");
    }
  }
}
