// One adapter's answer to the prompt, as it streams in.

import { element, setText } from "./dom.js";
import { errorText } from "./api.js";
import * as format from "./format.js";
import { readEvents } from "./sse.js";

const PHASE_TEXT = { queued: "queued", sent: "waiting", streaming: "answering", done: "done", stopped: "stopped", failed: "failed" };

export class PromptRun {
  constructor(model) {
    this.model = model;
    this.phaseNode = element("span", { className: "phase" });
    this.text = element("pre", { className: "text", tabIndex: 0, attributes: { "aria-label": `Answer of ${model}` } });
    this.error = element("p", { className: "error", hidden: true });
    this.facts = element("footer");
    this.node = element("article", { className: "card answer", dataset: { model } },
      element("header", {}, element("h3", { textContent: model }), this.phaseNode), this.text, this.error, this.facts);
    this.#enter("queued");
  }

  /** Sends `request` ({path, body}) and shows the answer until it ends, fails or `signal` stops it. */
  async stream(api, { path, body }, signal) {
    const started = performance.now();
    const seen = { firstS: null, numChunks: 0, usage: null, finish: null };
    this.#enter("sent");
    try {
      const response = await api.request("POST", path, { body: { ...body, model: this.model }, accept: "text/event-stream", signal });
      for await (const { data } of readEvents(response)) {
        if (data === "[DONE]") break;
        this.#take(data, seen, (performance.now() - started) / 1000);
      }
      if (seen.finish === null) throw new Error("the stream ended before the answer did");
      this.#enter("done");
    } catch (error) {
      if (error.name === "AbortError") this.stop();
      else this.#fail(error.message);
    }
    this.#showFacts(seen, (performance.now() - started) / 1000);
  }

  stop() {
    this.#enter("stopped");
  }

  #take(data, seen, elapsedS) {
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(errorText(data));
    seen.usage = chunk.usage ?? seen.usage;
    for (const choice of chunk.choices ?? []) {
      const text = choice.delta?.content ?? choice.text ?? "";
      seen.finish = choice.finish_reason ?? seen.finish;
      if (text === "") continue;
      if (seen.firstS === null) {
        seen.firstS = elapsedS;
        this.#enter("streaming");
      }
      seen.numChunks += 1;
      this.#append(text);
    }
  }

  /** Keeps the end in sight unless the reader has scrolled up. */
  #append(text) {
    const isAtEnd = this.text.scrollTop + this.text.clientHeight >= this.text.scrollHeight - 8;
    this.text.append(text);
    if (isAtEnd) this.text.scrollTop = this.text.scrollHeight;
  }

  #fail(message) {
    this.#enter("failed");
    this.error.textContent = message;
    this.error.hidden = false;
  }

  #enter(phase) {
    this.phase = phase;
    this.node.dataset.phase = phase;
    this.node.setAttribute("aria-busy", String(phase === "sent" || phase === "streaming"));
    setText(this.phaseNode, PHASE_TEXT[phase]);
  }

  #showFacts({ firstS, numChunks, usage, finish }, totalS) {
    const numTokens = usage?.completion_tokens ?? numChunks;
    const facts = [];
    if (firstS !== null) facts.push(`first token ${format.seconds(firstS)}`);
    if (numTokens > 0) facts.push(`${format.count(numTokens)} tokens`);
    if (firstS !== null && totalS > firstS && numTokens > 1) facts.push(`${format.rate((numTokens - 1) / (totalS - firstS))} tokens/s`);
    if (usage?.prompt_tokens_details?.cached_tokens) facts.push(`${format.count(usage.prompt_tokens_details.cached_tokens)} cached`);
    if (finish !== null) facts.push(finish === "length" ? "cut at max tokens" : `ended by ${finish}`);
    this.facts.replaceChildren(...facts.map((fact) => element("span", { textContent: fact })));
  }
}
