// Small helpers to find, make and change elements without needless repaints.

export const byId = (id) => document.getElementById(id);

/** An element with properties (`dataset`, `className`, `onclick`, …), attributes that need `setAttribute`, and children. */
export function element(tag, { attributes = {}, dataset = {}, ...properties } = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  Object.assign(node.dataset, dataset);
  node.append(...children);
  return node;
}

/** Sets the text only when it differs, so that a selection in unchanged text survives. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** The present value of a colour of theme.css. */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export function onThemeChange(action) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", action);
}
