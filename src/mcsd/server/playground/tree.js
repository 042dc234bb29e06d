// The picture of a step: the root, its candidates and the target's own token, as SVG.

import { count, label, percent, svg } from "./dom.js";
import { childrenOf, fates, originClass } from "./steps.js";

const FULL = 42; // pixels of a node with p and q
const LINE = 26; // the same where each node has a line of its own
const SMALL = 20; // of a candidate that was not reached
const GAP = 6;
const COLUMN = 118; // the least width of a column
const MOST_COLUMN = 190;
const INDENT = 16;

/**
 * Nodes as a tree. `id` is -1 for the root, the candidate's number, or "own" for the target's own token.
 */
function build(step) {
  const { trace } = step;
  const states = fates(trace);
  const end = trace.path.at(-1) ?? -1;
  const make = (id, depth) => {
    const children = childrenOf(trace, id).map((child) => make(child, depth + 1));
    if (id === end && trace.token) {
      const own = { id: "own", state: "own", depth: depth + 1, text: trace.token.text, children: [] };
      own.p = trace.top.at(-1).find((each) => each.token_id === trace.token.token_id)?.p;
      children.push(own);
    }
    if (id === -1) return { id, state: "root", depth, text: step.before.trim().split(/\s+/).at(-1) || "start", children };
    return { id, state: states[id], depth, ...trace.candidates[id], children };
  };
  return make(-1, 0);
}

const all = (node) => [node, ...node.children.flatMap(all)];
const isSmall = (node) => node.state === "skipped" || node.state === "unreached";

/** Give each node its box: depths in columns. Returns the height. */
function inColumns(root, width, depth) {
  const column = Math.min(width / (depth + 1), MOST_COLUMN);
  const place = (node, top) => {
    let bottom = top;
    for (const child of node.children) bottom = place(child, bottom);
    node.height = isSmall(node) ? SMALL : FULL;
    const end = Math.max(bottom, top + node.height + GAP);
    Object.assign(node, { x: node.depth * column, width: column - 20, y: (top + end - GAP - node.height) / 2 });
    return end;
  };
  return place(root, 0);
}

/** The same in one column: a line for each node, children indented. */
function inLines(root, width) {
  let y = 0;
  for (const node of all(root)) {
    const x = node.depth * INDENT;
    Object.assign(node, { x, y, width: width - x, height: isSmall(node) ? SMALL : LINE });
    y += node.height + GAP / 2;
  }
  return y;
}

/** The picture of a step for a width in pixels. */
export function drawTree(step, width) {
  const root = build(step);
  const nodes = all(root);
  const depth = Math.max(...nodes.map((node) => node.depth));
  const lines = (depth + 1) * COLUMN > width;
  const height = Math.ceil(lines ? inLines(root, width) : inColumns(root, width, depth));
  const edges = nodes.flatMap((node) => node.children.map((child) => edge(node, child, lines)));
  // Lit edges are drawn last, above the others.
  edges.sort((one, other) => one.classList.contains("lit") - other.classList.contains("lit"));
  const picture = svg("svg", { width, height, role: "img", "aria-label": summary(step.trace) });
  picture.append(...edges, ...nodes.map((node) => drawNode(node, lines)));
  return picture;
}

function summary(trace) {
  const own = trace.token ? `; then the target's own token “${label(trace.token.text)}”` : "";
  return `A tree of ${count(trace.candidates.length, "candidate")}, ${trace.path.length} accepted${own}`;
}

function edge(from, to, lines) {
  const lit = to.state === "accepted" || to.state === "own";
  const y = to.y + to.height / 2;
  let d;
  if (lines) {
    d = `M${from.x + INDENT / 2} ${from.y + from.height}V${y}H${to.x}`;
  } else {
    const start = from.x + from.width;
    const middle = (start + to.x) / 2;
    d = `M${start} ${from.y + from.height / 2}C${middle} ${from.y + from.height / 2} ${middle} ${y} ${to.x} ${y}`;
  }
  return svg("path", { d, class: lit ? "edge lit" : `edge ${to.state}` });
}

const MARKS = { accepted: "✓ ", rejected: "✕ " };

function drawNode(node, lines) {
  const { x, y, width, height, state } = node;
  const origin = state === "accepted" ? originClass(node.depth) : state;
  const group = svg("g", { class: `node ${state} ${origin}`, transform: `translate(${x} ${y})`, "data-node": node.id });
  group.append(svg("title", {}, tooltip(node)));
  group.append(svg("rect", { x: 0.75, y: 0.75, width: width - 1.5, height: height - 1.5, rx: 5 }));
  const two = !lines && !isSmall(node);
  const beside = lines && !isSmall(node) ? numbers(node).length * 6.2 + 6 : 0;
  const text = cut((MARKS[state] ?? "") + label(node.text), (width - 14 - beside) / (isSmall(node) ? 6.4 : 8));
  group.append(svg("text", { x: 7, y: two ? 18 : height / 2 + 4, class: "name" }, text));
  if (two) group.append(svg("text", { x: 7, y: 34, class: "numbers" }, cut(numbers(node), (width - 10) / 5.8)));
  else if (beside) {
    group.append(svg("text", { x: width - 7, y: height / 2 + 4, class: "numbers", "text-anchor": "end" }, numbers(node)));
  }
  return group;
}

function numbers(node) {
  if (node.state === "root") return "text so far";
  if (node.state === "own") return node.p == null ? "target’s own" : `target’s own, p ${percent(node.p)}`;
  return node.q == null ? `p ${percent(node.p)}` : `q ${percent(node.q)} · p ${percent(node.p)}`;
}

const cut = (text, most) => (text.length > most ? `${text.slice(0, Math.max(1, Math.floor(most) - 1))}…` : text);

const STATES = {
  accepted: "accepted",
  rejected: "rejected",
  skipped: "not reached: another candidate was accepted before it",
  unreached: "not reached: what it continues was not accepted",
};

function tooltip(node) {
  if (node.id === -1) return "The text so far";
  if (node.id === "own") return `“${node.text}”: added by the target`;
  return `“${node.text}”: q ${percent(node.q)}, p ${percent(node.p)}, ${STATES[node.state]}`;
}
