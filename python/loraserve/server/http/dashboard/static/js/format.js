// How numbers read on the page; `–` stands for a value that is not there.

const ABSENT = "–";
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

const isAbsent = (value) => value === null || value === undefined || Number.isNaN(value);

export const count = (value) => (isAbsent(value) ? ABSENT : whole.format(value));

/** 1234567 → `1.2M`. */
export const compact = (value) => (isAbsent(value) ? ABSENT : value < 10_000 ? whole.format(value) : short.format(value));

export function bytes(value) {
  if (isAbsent(value)) return ABSENT;
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${significant(value)} ${UNITS[unit]}`;
}

/** Seconds as `850 ms` or `2.4 s`. */
export function seconds(value) {
  if (isAbsent(value)) return ABSENT;
  return value < 1 ? `${significant(value * 1000)} ms` : `${significant(value)} s`;
}

/** Per second: `0.25`, `12.3`, `1,234`. */
export const rate = (value) => (isAbsent(value) ? ABSENT : significant(value));

export const percent = (part, all) => (all > 0 ? `${Math.round((100 * part) / all)}%` : ABSENT);

function significant(value) {
  if (value === 0) return "0";
  if (value >= 100) return whole.format(value);
  return value.toFixed(value >= 10 ? 1 : 2).replace(/\.?0+$/, "");
}
