// One prompt to several adapters: who answers, with which settings, and the answers side by side.

import { byId, element, setText } from "./dom.js";
import { PromptRun } from "./prompt_run.js";

// A browser opens six connections to one HTTP/1.1 server; one stays free for the page's readings.
const MAX_STREAMS = 5;
const NUM_CHOSEN_AT_FIRST = 3;
const NUM_WITHOUT_FIND = 12;

export class Playground {
  constructor(api) {
    this.api = api;
    this.models = [];
    this.chosen = null;
    this.abort = null;
    byId("prompt-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#run();
    });
    byId("stop").addEventListener("click", () => this.abort?.abort());
    byId("picks-find").addEventListener("input", () => this.#find());
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("prompt-form").requestSubmit();
    });
    for (const radio of document.querySelectorAll("[name=route]")) {
      radio.addEventListener("change", () => { byId("system-field").hidden = this.#route() !== "chat"; });
    }
  }

  /** `models`: [{id, isBase}]; what was chosen stays chosen while it is served. */
  update(models) {
    if (JSON.stringify(models) === JSON.stringify(this.models)) return;
    this.models = models;
    const served = models.map(({ id }) => id);
    this.chosen = new Set(this.chosen === null ? served.slice(0, NUM_CHOSEN_AT_FIRST) : served.filter((id) => this.chosen.has(id)));
    byId("picks").replaceChildren(...models.map((model) => this.#chip(model)));
    byId("picks-find").hidden = models.length <= NUM_WITHOUT_FIND;
    byId("picks-empty").hidden = models.length > 0;
    this.#find();
  }

  /** Chooses `name` and brings the prompt into view. */
  try(name) {
    this.chosen?.add(name);
    for (const box of document.querySelectorAll("#picks input")) box.checked = this.chosen.has(box.value);
    byId("playground").scrollIntoView();
    byId("prompt").focus({ preventScroll: true });
  }

  #chip({ id, isBase }) {
    const box = element("input", { type: "checkbox", value: id, checked: this.chosen.has(id) });
    box.addEventListener("change", () => (box.checked ? this.chosen.add(id) : this.chosen.delete(id)));
    return element("label", { dataset: { model: id }, title: id }, box, element("span", { textContent: isBase ? `${id} (base)` : id }));
  }

  #find() {
    const sought = byId("picks-find").value.trim().toLowerCase();
    for (const chip of byId("picks").children) {
      chip.hidden = !chip.dataset.model.toLowerCase().includes(sought) && !this.chosen.has(chip.dataset.model);
    }
  }

  async #run() {
    if (this.abort !== null) return;
    const models = this.models.map(({ id }) => id).filter((id) => this.chosen?.has(id));
    if (models.length === 0) return setText(byId("run-status"), "Choose at least one adapter.");
    const runs = models.map((model) => new PromptRun(model));
    byId("answers").replaceChildren(...runs.map(({ node }) => node));
    this.#setRunning(true);
    setText(byId("run-status"), `Waiting for ${count(runs.length, "answer")}.`);
    await this.#streamAll(runs);
    this.#setRunning(false);
    setText(byId("run-status"), summary(runs));
    return undefined;
  }

  /** At most MAX_STREAMS at a time, in order. */
  async #streamAll(runs) {
    this.abort = new AbortController();
    const { signal } = this.abort;
    const request = this.#request();
    const waiting = [...runs];
    const streamNext = async () => {
      for (let run = waiting.shift(); run !== undefined; run = waiting.shift()) {
        if (signal.aborted) run.stop();
        else await run.stream(this.api, request, signal);
      }
    };
    await Promise.all(Array.from({ length: MAX_STREAMS }, streamNext));
    this.abort = null;
  }

  #request() {
    const prompt = byId("prompt").value;
    const body = { stream: true, stream_options: { include_usage: true }, max_tokens: byId("max-tokens").valueAsNumber };
    for (const [field, id] of [["temperature", "temperature"], ["seed", "seed"]]) {
      if (byId(id).value !== "") body[field] = byId(id).valueAsNumber;
    }
    if (this.#route() === "completion") return { path: "v1/completions", body: { ...body, prompt } };
    const system = byId("system").value.trim();
    const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: prompt }];
    return { path: "v1/chat/completions", body: { ...body, messages } };
  }

  #route() {
    return document.querySelector("[name=route]:checked").value;
  }

  #setRunning(isRunning) {
    byId("run").disabled = isRunning;
    byId("stop").disabled = !isRunning;
  }
}

function summary(runs) {
  const numOf = (phase) => runs.filter((run) => run.phase === phase).length;
  const parts = [`${count(numOf("done"), "answer")} finished`];
  if (numOf("failed") > 0) parts.push(`${numOf("failed")} failed`);
  if (numOf("stopped") > 0) parts.push(`${numOf("stopped")} stopped`);
  return `${parts.join(", ")}.`;
}

const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
