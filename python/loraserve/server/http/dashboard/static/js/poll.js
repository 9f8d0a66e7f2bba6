// Repeats a reading for as long as the page is seen.

/** Runs `read` now, and again `everyMs` after each one ended; waits while the page is hidden. Returns {now()}. */
export function poll(read, everyMs) {
  let timer = null;
  let isReading = false;

  async function turn() {
    clearTimeout(timer);
    if (isReading || document.hidden) return;
    isReading = true;
    try {
      await read();
    } finally {
      isReading = false;
      timer = setTimeout(turn, everyMs);
    }
  }

  document.addEventListener("visibilitychange", turn);
  turn();
  return { now: turn };
}
