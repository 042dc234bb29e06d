// Elements, and numbers and tokens as text. Strings become text nodes, never HTML.

const SVG = "http://www.w3.org/2000/svg";

/** A new HTML element. */
export function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** A new SVG element. */
export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** The element with an id. */
export const byId = (id) => document.getElementById(id);

/** Show whether a button does something now. It keeps the focus. */
export function disable(id, is) {
  byId(id).setAttribute("aria-disabled", is);
}

/** A probability as text. */
export function percent(value) {
  if (value == null) return "–";
  if (value === 0) return "0\u00a0%";
  if (value > 0 && value < 0.001) return "<0.1\u00a0%";
  if (value > 0.999 && value < 1) return ">99.9\u00a0%";
  return `${(100 * value).toFixed(value < 0.0995 || (value > 0.99 && value < 1) ? 1 : 0)}\u00a0%`;
}

/** A named probability as text. */
export const equation = (name, value) => `${name}\u00a0=\u00a0${percent(value)}`.replace(/=\u00a0([<>])/, "$1\u00a0");

/** A token as a label: without spaces around it, and with signs for a token that is nothing else. */
export function label(text) {
  return text.trim().replace(/\s+/g, " ") || text.replace(/\n/g, "↵").replace(/\s/g, "␣") || "(part of a character)";
}

/** A count with its noun. */
export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
