// One generation in the dialog of versions: its share, what came of its copies, and what can be done with it.

import { element, setText } from "./dom.js";
import * as format from "./format.js";

const SHADOW_PERCENT = 10;

export class GenerationCard {
  /** `actions`: {makeCurrent(), shadow(fraction), endShadow()}. */
  constructor(number, actions) {
    this.number = number;
    this.isTyped = false;
    this.title = element("h3");
    this.about = element("p", { className: "hint" });
    this.results = element("p", { className: "shadow-results" });
    this.shareInput = this.#percent(`Share of generation ${number} in percent`, "0", { oninput: () => { this.isTyped = true; } });
    this.shareText = element("span", { className: "share-text" });
    this.fractionInput = this.#percent(`Fraction of requests copied to generation ${number} in percent`, "0.01");
    this.fractionInput.value = SHADOW_PERCENT;
    const button = (text, label, onclick) =>
      element("button", { type: "button", className: "admin-only", textContent: text, onclick, attributes: { "aria-label": `${label} ${number}` } });
    this.currentButton = button("Make current", "Make current: generation", actions.makeCurrent);
    this.endButton = button("End shadow", "End the shadow: generation", actions.endShadow);
    this.shadowButton = button("Shadow", "Shadow: generation", () => actions.shadow(Number(this.fractionInput.value) / 100));
    this.shadowField = element("div", { className: "shadow-field admin-only" },
      element("label", { className: "field-inline percent" }, this.fractionInput, "%"), this.shadowButton);
    this.shareField = element("label", { className: "field-inline percent admin-only" }, "Share", this.shareInput, "%");
    this.node = element("li", { dataset: { generation: String(number) } },
      element("div", { className: "generation-head" }, this.title, this.shareText, this.shareField),
      this.about, this.results,
      element("div", { className: "actions" }, this.currentButton, this.shadowField, this.endButton));
  }

  /** Of requests, as it is written, from 0 to 1. */
  get share() {
    return Math.round(Number(this.shareInput.value) * 100) / 10_000;
  }

  /** `generation` as readings.js makes it. */
  update({ hash, source, since, isCurrent, isKept, share, requests, shadow }) {
    setText(this.title, `Generation ${this.number}${isCurrent ? ", current" : ""}`);
    setText(this.about, [
      since.toLocaleString(), hash.slice(0, 12), requests === null ? null : `${format.compact(requests)} requests`, source,
      isKept ? null : "remembered only",
    ].filter(Boolean).join(" · "));
    setText(this.shareText, share > 0 ? `${+(100 * share).toFixed(2)} %` : "");
    if (!this.isTyped) this.shareInput.value = +(100 * share).toFixed(2);
    this.shareField.hidden = !isKept;
    setText(this.results, shadow === null ? "" : resultsText(shadow));
    this.results.hidden = shadow === null;
    const isShadow = shadow !== null && shadow.fraction > 0;
    const mayShadow = isKept && share === 0 && !isCurrent;
    this.currentButton.hidden = !isKept || (isCurrent && share === 1);
    this.shadowField.hidden = !mayShadow;
    this.endButton.hidden = !isShadow;
  }

  /** What stands in the field of its share was taken, or not: from now on it shows what holds. */
  forgetTyped() {
    this.isTyped = false;
  }

  #percent(label, min, more = {}) {
    return element("input", { type: "number", min, max: "100", step: "0.01", attributes: { "aria-label": label }, ...more });
  }
}

function resultsText({ fraction, compared, identical, agreement, errors, dropped }) {
  const what = fraction > 0 ? `Shadow of ${+(100 * fraction).toFixed(2)} % of requests` : "Was a shadow";
  const alike = compared > 0
    ? `, ${format.percent(identical, compared)} identical, ${format.percent(agreement, 1)} of tokens up to the first difference` : "";
  return `${what}: ${format.count(compared)} compared${alike}, ${format.count(errors)} failed, ${format.count(dropped)} dropped`;
}
