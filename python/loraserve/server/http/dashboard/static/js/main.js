// Puts the page together: what is read how often, and what is shown when the server can't be read.

import { AdapterActions } from "./adapter_actions.js";
import { AdaptersTable } from "./adapters_table.js";
import { Api, ApiError, UnreachableError } from "./api.js";
import { byId, setText } from "./dom.js";
import { KeyForm } from "./key.js";
import { LoadDialog } from "./load_dialog.js";
import { Overview } from "./overview.js";
import { Playground } from "./playground.js";
import { poll } from "./poll.js";
import { readAdapters, readFacts, readModels, readStats, withTraffic } from "./readings.js";
import { VersionsDialog } from "./versions_dialog.js";

const STATS_MS = 1000;
const ADAPTERS_MS = 2000;
const MODELS_MS = 5000;

const keyForm = new KeyForm(refresh);
const api = new Api(keyForm);
const overview = new Overview();
const playground = new Playground(api);
const actions = new AdapterActions(api, refresh);
const versions = new VersionsDialog(api, refresh);
const table = new AdaptersTable({
  try: ({ name }) => playground.try(name),
  warm: (adapter) => actions.warm(adapter),
  pin: (adapter) => actions.pin(adapter),
  unload: (adapter) => actions.unload(adapter),
  versions: (adapter) => versions.open(adapter),
});
new LoadDialog(api, refresh);

let traffic = {};
let adapters = null;
let lastSeen = null;

const polls = [
  poll(() => attempt(async () => {
    const stats = readStats(await api.get("dashboard/stats"));
    traffic = stats.traffic;
    showRights(stats.isAdmin);
    overview.update(stats);
    showAdapters();
    showConnection("live", "live");
  }), STATS_MS),
  poll(() => attempt(async () => {
    adapters = readAdapters(await api.get("adapters"));
    showAdapters();
  }), ADAPTERS_MS),
  poll(() => attempt(async () => {
    playground.update(readModels(await api.get("v1/models")));
    setText(byId("server-facts"), readFacts(await api.get("info")));
  }), MODELS_MS),
];

function refresh() {
  for (const { now } of polls) now();
}

async function attempt(read) {
  try {
    await read();
  } catch (error) {
    showFailure(error);
  }
}

function showAdapters() {
  if (adapters === null) return;
  overview.updateAdapters(adapters);
  table.update(withTraffic(adapters, traffic));
}

/** What only an administrator may do is not offered to others. */
function showRights(isAdmin) {
  document.body.classList.toggle("is-admin", isAdmin);
  byId("admin-key").hidden = isAdmin;
}

/** While the server is lost its last figures are dimmed. */
function showConnection(state, text) {
  const node = byId("connection");
  node.dataset.state = state;
  setText(node, text);
  document.body.classList.toggle("is-lost", state === "lost");
  byId("lost").hidden = true;
  if (state === "live") lastSeen = new Date();
}

/** A server that can't be reached and one that refuses are told apart; anything else is a fault of the page. */
function showFailure(error) {
  if (error instanceof ApiError) showConnection("lost", error.status === 401 ? "key needed" : error.message);
  else if (error instanceof UnreachableError) showLost();
  else throw error;
}

function showLost() {
  showConnection("lost", "no connection");
  const since = lastSeen === null
    ? "The server does not answer."
    : `The server has not answered since ${lastSeen.toLocaleTimeString()}. What is shown is from then.`;
  setText(byId("lost-text"), `${since} It may be stopped, restarting or unreachable; this page keeps trying.`);
  byId("lost").hidden = false;
}
