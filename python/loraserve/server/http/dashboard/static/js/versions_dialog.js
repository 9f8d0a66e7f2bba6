// The dialog of an adapter's generations: which requests get which, what a shadow would have answered, and back.

import { byId, setText } from "./dom.js";
import { GenerationCard } from "./generation_card.js";
import { poll } from "./poll.js";
import { readGenerations } from "./readings.js";

const READ_MS = 2000;
const NUM_SHOWN = 20;

export class VersionsDialog {
  /** `onChange` runs after the server carried something out. */
  constructor(api, onChange) {
    this.api = api;
    this.onChange = onChange;
    this.name = null;
    this.cards = new Map();
    this.dialog = byId("versions-dialog");
    byId("versions-close").addEventListener("click", () => this.dialog.close());
    byId("versions-back").addEventListener("click", () => this.#send("POST", "rollback", {}));
    byId("versions-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#share();
    });
    this.dialog.addEventListener("close", () => { this.name = null; });
    this.poll = poll(() => this.#read(), READ_MS);
  }

  open({ name }) {
    this.name = name;
    this.cards.clear();
    byId("versions-list").replaceChildren();
    setText(byId("versions-title"), `Versions of ${name}`);
    this.#fail(null);
    this.dialog.showModal();
    this.poll.now();
  }

  async #read() {
    const name = this.name;
    if (name === null) return;
    try {
      const generations = readGenerations(await this.api.get(this.#path("generations")));
      if (name === this.name) this.#show(generations);
    } catch (error) {
      if (name === this.name) this.#fail(error.message);
    }
  }

  /** The newest first; cards stay, so that what is being typed does. */
  #show(generations) {
    const shown = generations.reverse().slice(0, NUM_SHOWN);
    const nodes = shown.map((one) => {
      const card = this.cards.get(one.number) ?? new GenerationCard(one.number, {
        makeCurrent: () => this.#send("POST", "rollback", { generation: one.number }),
        shadow: (fraction) => this.#send("PUT", "shadow", { generation: one.number, fraction }),
        endShadow: () => this.#send("DELETE", "shadow"),
      });
      this.cards.set(one.number, card);
      card.update(one);
      return card.node;
    });
    const list = byId("versions-list");
    const isSame = nodes.length === list.children.length && nodes.every((node, index) => list.children[index] === node);
    if (!isSame) list.replaceChildren(...nodes);
    byId("versions-share").hidden = shown.filter(({ isKept }) => isKept).length < 2;
    byId("versions-back").hidden = byId("versions-share").hidden;
  }

  #share() {
    const shares = {};
    for (const card of this.cards.values()) if (card.share > 0) shares[card.number] = card.share;
    return this.#send("PUT", "shares", { shares });
  }

  async #send(method, action, body) {
    const name = this.name;
    try {
      const answer = await this.api.send(method, this.#path(action), body);
      if (name !== this.name) return;
      this.#fail(null);
      for (const card of this.cards.values()) card.forgetTyped();
      this.#show(readGenerations(answer));
      this.onChange();
    } catch (error) {
      if (name === this.name) this.#fail(error.message);
    }
  }

  #path(action) {
    return `adapters/${encodeURIComponent(this.name)}/${action}`;
  }

  #fail(message) {
    byId("versions-error").hidden = message === null;
    setText(byId("versions-error"), message ?? "");
  }
}
