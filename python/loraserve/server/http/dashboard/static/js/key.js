// The API key, asked for when the server refuses to answer without one; it lives as long as the tab.

import { byId } from "./dom.js";

const ITEM = "loraserve.key";

export class KeyForm {
  /** `onChange` runs when a key was given or forgotten. */
  constructor(onChange) {
    this.form = byId("key-form");
    this.input = byId("key");
    this.forget = byId("forget-key");
    this.forget.hidden = this.value === null;
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#store(this.input.value.trim());
      this.input.value = "";
      this.form.hidden = true;
      onChange();
    });
    byId("admin-key").addEventListener("click", () => {
      this.ask("Loading, pinning and unloading need an admin key.");
      this.input.focus();
    });
    this.forget.addEventListener("click", () => {
      this.#store(null);
      onChange();
    });
  }

  get value() {
    return sessionStorage.getItem(ITEM);
  }

  /** The server has refused `key`; of no account once another one was given. */
  askAfter(key) {
    if (key === this.value) this.ask(key === null ? "This server asks for a key." : "The server does not know this key.");
  }

  /** Shows the form; what is being typed into it stays. */
  ask(reason) {
    if (!this.form.hidden) return;
    byId("key-reason").textContent = reason;
    this.form.hidden = false;
  }

  #store(key) {
    if (key === null) sessionStorage.removeItem(ITEM);
    else sessionStorage.setItem(ITEM, key);
    this.forget.hidden = key === null;
  }
}
