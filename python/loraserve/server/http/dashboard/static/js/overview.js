// The figures, charts and pool map at the top, from each second's reading.

import { byId, setText } from "./dom.js";
import * as format from "./format.js";
import { PoolMap } from "./pool_map.js";
import { TimeChart } from "./time_chart.js";

export class Overview {
  constructor() {
    this.poolMap = new PoolMap();
    this.throughput = new TimeChart(byId("chart-throughput"), [
      { colour: "--good", isFilled: true, onValue: labelled("key-tokens", "tokens/s", format.rate) },
    ]);
    this.queue = new TimeChart(byId("chart-queue"), [
      { colour: "--kv", isFilled: true, onValue: labelled("key-running", "running", format.count) },
      { colour: "--adapters", isFilled: false, onValue: labelled("key-waiting", "waiting", format.count) },
    ]);
  }

  /** A key that may not see what others do is shown no figures: the server tells it none. */
  update(stats) {
    for (const node of document.querySelectorAll("#overview .figures, #overview .panels")) node.hidden = stats.pages === null;
    if (stats.pages === null) return;
    const now = Date.now() / 1000;
    const { kv, cached, adapters, free } = stats.pages;
    setText(byId("figure-running"), format.count(stats.running));
    setText(byId("figure-waiting"), format.count(stats.waiting));
    setText(byId("figure-tokens"), format.rate(stats.tokensPerS));
    setText(byId("figure-pool"), format.percent(kv + adapters, kv + cached + adapters + free));
    this.throughput.push(now, [stats.tokensPerS]);
    this.queue.push(now, [stats.running, stats.waiting]);
    this.poolMap.update(stats.pages, stats.pageNbytes);
  }

  updateAdapters(adapters) {
    const resident = adapters.filter(({ state }) => state === "resident").length;
    setText(byId("figure-resident"), `${format.count(resident)} of ${format.count(adapters.length)}`);
  }
}

function labelled(className, label, formatValue) {
  const node = document.querySelector(`.${className}`);
  return (value) => setText(node, value === undefined ? label : `${formatValue(value)} ${label}`);
}
