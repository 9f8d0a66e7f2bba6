// A chart of values over the last minutes, drawn by uPlot.

import uPlot from "../vendor/uPlot.esm.js";
import { colour, onThemeChange } from "./dom.js";

const SHORTEST_S = 60;
const LONGEST_S = 300;

export class TimeChart {
  /** `series`: [{colour, isFilled, onValue(value)}]; `onValue` gets the value under the cursor, else the newest. */
  constructor(host, series) {
    this.series = series;
    this.columns = [[], ...series.map(() => [])];
    this.plot = new uPlot(this.#options(host, series), this.columns, host);
    new ResizeObserver(() => this.plot.setSize(sizeOf(host))).observe(host);
    onThemeChange(() => this.plot.redraw(false));
  }

  /** Appends one value per series at `time` (seconds since the epoch) and forgets what left the window. */
  push(time, values) {
    [time, ...values].forEach((value, index) => this.columns[index].push(value));
    while (this.columns[0][0] < time - LONGEST_S) this.columns.forEach((column) => column.shift());
    this.plot.setData(this.columns, false);
    const width = Math.min(Math.max(time - this.columns[0][0], SHORTEST_S), LONGEST_S);
    this.plot.setScale("x", { min: time - width, max: time });
    this.#tellValues();
  }

  #tellValues() {
    const index = this.plot.cursor.idx ?? this.columns[0].length - 1;
    this.series.forEach(({ onValue }, nth) => onValue(this.columns[nth + 1][index]));
  }

  #options(host, series) {
    const axis = { stroke: () => colour("--muted"), font: "11px system-ui, sans-serif", ticks: { show: false } };
    const grid = { stroke: () => colour("--line"), width: 1 };
    return {
      ...sizeOf(host),
      padding: [8, 8, 0, 0],
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, sync: { key: "overview" } },
      scales: { y: { range: (_plot, _low, high) => [0, Math.max(high * 1.15, 4)] } },
      axes: [
        { ...axis, grid: { show: false }, size: 24, space: 80, values: (_plot, times) => times.map(clock) },
        { ...axis, grid, size: 40, space: 34, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6] },
      ],
      series: [{}, ...series.map((line) => ({
        stroke: () => colour(line.colour),
        fill: line.isFilled ? () => `color-mix(in srgb, ${colour(line.colour)} 14%, transparent)` : undefined,
        width: 2,
        points: { show: false },
      }))],
      hooks: { setCursor: [() => this.plot && this.#tellValues()] },
    };
  }
}

const clock = (time) => new Date(time * 1000).toLocaleTimeString("en-GB");

const sizeOf = (host) => ({ width: Math.max(host.clientWidth, 50), height: host.clientHeight });
