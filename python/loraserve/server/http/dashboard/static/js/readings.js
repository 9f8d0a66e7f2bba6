// The server's answers in the page's own names; the one place that knows their fields.

import * as format from "./format.js";

/** GET /dashboard/stats. */
export function readStats(stats) {
  return {
    running: stats.running,
    waiting: stats.waiting,
    tokensPerS: stats.tokens_per_s,
    pages: stats.pages,
    pageNbytes: stats.page_nbytes,
    isAdmin: stats.is_admin,
    traffic: stats.adapters,
  };
}

/** GET /adapters. */
export function readAdapters({ adapters }) {
  return adapters.map((adapter) => ({
    name: adapter.name,
    generation: adapter.generation,
    path: adapter.path,
    description: adapter.description,
    state: adapter.state,
    rank: adapter.rank,
    nbytes: adapter.nbytes,
    isPinned: adapter.pinned,
    requests: adapter.requests,
    tokens: adapter.tokens,
  }));
}

/** GET /adapters/{name}/generations, oldest first. */
export function readGenerations({ generations }) {
  return generations.map(({ number, hash, source, since, current, kept, share, requests, shadow }) => ({
    number, hash, source, since: new Date(1000 * since), isCurrent: current, isKept: kept, share, requests, shadow,
  }));
}

/** `readAdapters`' adapters with `readStats`' traffic of the last minute, where there was any. */
export function withTraffic(adapters, traffic) {
  return adapters.map((adapter) => {
    const recent = Object.hasOwn(traffic, adapter.name) ? traffic[adapter.name] : null;
    return {
      ...adapter,
      requestsPerS: recent?.requests_per_s ?? null,
      tokensPerS: recent?.tokens_per_s ?? null,
      latencyS: recent?.latency_s ?? null,
      latencySeriesS: recent?.latency_series_s ?? [],
    };
  });
}

/** What loading an adapter found, as [label, text]. */
export function readReceipt({ name, rank, nbytes, receipt, last_load_s: loadS }) {
  const ranks = receipt.ranks.length > 1 ? ` (${receipt.ranks.join(", ")})` : "";
  return [
    ["Name", name],
    ["Rank", `${rank}${ranks}`],
    ["Size", `${format.bytes(nbytes)} in ${format.count(receipt.tensors)} tensors`],
    ["Modules", receipt.modules.join(", ")],
    ["Layers", layerText(receipt.layers)],
    ["Base model", receipt.base_model ?? "not named"],
    ["Base check", receipt.base_check],
    ...receipt.notes.map((what) => ["Notes", what]),
    ...receipt.not_used.map((what) => ["Not used", what]),
    ["Loaded in", loadS === null ? "on its first request" : format.seconds(loadS)],
  ];
}

/** [0, 1, 2, 5] → `0–2, 5`. */
function layerText(layers) {
  const ranges = [];
  for (const layer of [...layers].sort((one, other) => one - other)) {
    const last = ranges.at(-1);
    if (last?.[1] === layer - 1) last[1] = layer;
    else ranges.push([layer, layer]);
  }
  return ranges.map(([first, end]) => (first === end ? `${first}` : `${first}–${end}`)).join(", ");
}

/** GET /v1/models: those the caller may use, the base first. */
export function readModels({ data }) {
  const models = data.map(({ id, parent }) => ({ id, isBase: !parent }));
  return [...models.filter(({ isBase }) => isBase), ...models.filter(({ isBase }) => !isBase)];
}

/** GET /info, as one line. */
export function readFacts(info) {
  return [info.model_id, info.dtype, info.device, info.version && `loraserve ${info.version}`].filter(Boolean).join(" · ");
}
