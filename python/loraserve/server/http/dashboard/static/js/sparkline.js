// A line of the last minute, as small as a word.

const NAMESPACE = "http://www.w3.org/2000/svg";
const WIDTH = 100;
const HEIGHT = 24;

const MAX_GAP = 5; // values further apart than this are not joined

export class Sparkline {
  constructor(label) {
    this.node = svg("svg", { class: "sparkline", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label });
    this.line = svg("path", { class: "line" });
    this.dots = svg("path", { class: "dots" });
    this.node.append(svg("line", { x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT }), this.line, this.dots);
  }

  /** `values`: one per second, oldest first, null where nothing was measured. */
  draw(values) {
    const stretches = stretchesOf(pointsOf(values));
    setPath(this.line, stretches.filter(({ length }) => length > 1).map((points) => `M${points.map(({ x, y }) => `${x} ${y}`).join("L")}`));
    setPath(this.dots, stretches.filter(({ length }) => length === 1).map(([{ x, y }]) => `M${x} ${y}h0`));
  }
}

function pointsOf(values) {
  const top = Math.max(...values.filter((value) => value !== null), Number.MIN_VALUE);
  const step = WIDTH / Math.max(values.length - 1, 1);
  return values.flatMap((value, index) => (value === null ? [] : [{
    index,
    x: (index * step).toFixed(1),
    y: (HEIGHT - 2 - (value / top) * (HEIGHT - 4)).toFixed(1),
  }]));
}

/** Points in runs of neighbours at most MAX_GAP apart. */
function stretchesOf(points) {
  const stretches = [];
  for (const point of points) {
    const last = stretches.at(-1);
    if (last !== undefined && point.index - last.at(-1).index <= MAX_GAP) last.push(point);
    else stretches.push([point]);
  }
  return stretches;
}

function setPath(node, parts) {
  const path = parts.join("");
  if (node.getAttribute("d") !== path) node.setAttribute("d", path);
}

function svg(tag, attributes) {
  const node = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}
