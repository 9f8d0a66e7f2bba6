// Short messages in the corner, also read out by screen readers.

import { byId, element } from "./dom.js";

const SHOWN_MS = 6000;

export function toast(message, kind = "info") {
  const node = element("p", { className: "toast", textContent: message, dataset: { kind } });
  byId("toasts").append(node);
  setTimeout(() => node.remove(), SHOWN_MS);
}
