// A step in plain words, with its own numbers: draft, target, verification, the target's own token, and the gain.

import { count, el, equation, label, percent } from "./dom.js";
import { childrenOf, fates, kindOf } from "./steps.js";

const MOST_LINES = 8;

const term = (text) => el("dfn", {}, text);
const quoted = (text) => el("q", { class: "piece" }, label(text));
const paragraph = (...content) => el("p", {}, ...content);
const item = (title, ...content) => el("li", {}, el("h3", {}, title), ...content);

/** The items of the explanation of a step. `server` has the names of target and draft, and whether it speculates. */
export function explain(step, server) {
  const { trace } = step;
  if (!trace) return [item("No picture", paragraph("The browser read too slowly, so the server joined these steps."))];
  if (!trace.candidates.length) return plain(trace, server);
  return [draft(trace, server), target(trace, server), verification(trace), ...own(trace), gain(step)];
}

function plain(trace, server) {
  const why = server.speculation
    ? "The draft has no guess here, or the server expects none to be worth its time."
    : "Speculation is off, so there are no guesses.";
  return [
    item("Plain decoding", paragraph(why, " The large model is called the ", term("target"), "."), chosen(trace)),
    item("The gain", paragraph("1 token from one pass of the target. Speculation is there to get more than one.")),
  ];
}

function draft(trace, server) {
  const [first] = trace.candidates;
  const number = count(trace.candidates.length + trace.omitted, "token");
  const who = server.draft.startsWith("ngram")
    ? [" here is a look-up: it finds the same words earlier in the text and proposes what followed them, ", number]
    : [`, a small and fast model (${server.draft}), proposes `, number];
  const guess =
    first.q == null
      ? "."
      : `: the draft finds it ${percent(first.q)} likely. This number is called q, and guesses are drawn at random by it.`;
  return item(
    "The draft guesses",
    paragraph(
      ...["The ", term("draft"), ...who, ". Each of them is a ", term("candidate"), ": a guess for a place in the text. "],
      "Those that start from the same place are alternatives; one that starts from another continues it. Its first guess is ",
      ...[quoted(first.text), guess],
    ),
  );
}

function target(trace, server) {
  const [first] = trace.candidates;
  return item(
    "The target reads all guesses at once",
    paragraph(
      ...["The ", term("target"), ` is the large model (${server.name}), whose text you want. It reads all candidates in one `],
      "pass, which takes little longer than a pass over one token unless the tree is large; writing by itself, it needs a pass ",
      "for each token. It tells how likely it finds each candidate. This number ",
      ...["is called p. For ", quoted(first.text), ` it is ${percent(first.p)}.`],
    ),
  );
}

/** What happened at each node of the accepted path, in order. */
function verification(trace) {
  const kind = kindOf(trace);
  const states = fates(trace);
  const decide = kind === "recursive" ? tests : choice;
  const lines = [-1, ...trace.path].flatMap((node) => {
    const tried = childrenOf(trace, node).filter((child) => states[child] === "accepted" || states[child] === "rejected");
    return decide(tried.map((child) => ({ ...trace.candidates[child], accepted: states[child] === "accepted" })));
  });
  const shown = lines.slice(0, MOST_LINES);
  if (lines.length > shown.length) shown.push(["and ", count(lines.length - shown.length, "decision"), " more."]);
  const list = el("ul", {}, ...shown.map((line) => el("li", {}, ...line)));
  return item("Verification", paragraph(term("Verification"), RULES[kind](trace)), list);
}

const RULES = {
  recursive: () =>
    " tests the candidates, one after the other. Where p is at least q, a candidate passes for certain. Where the draft was" +
    " too sure of it, it passes with a chance of p divided by q. So good guesses stay, and every text is exactly as likely as if" +
    " the target had written alone.",
  matching: (trace) =>
    " lets the target pick its next token as if there were no guesses: " +
    // At temperature 0 one token has all of the probability.
    (trace.top.every((top) => top.length === 1) ? "its most probable one." : "at random, with its own probabilities p.") +
    " If a candidate is that token, it is accepted, and the same goes on after it.",
  other: (trace) =>
    ` follows the scheme ${trace.scheme}: it accepts candidates by their p and q so that every text is exactly as likely as if` +
    " the target had written alone. The more p exceeds q, the better a candidate's chance.",
};

/** The lines of candidates that are tested one after the other. */
function tests(candidates) {
  return candidates.map(({ text, p, q, accepted }, place) => {
    const outcome = accepted ? "accepted" : "rejected";
    const start = [accepted ? "✓ " : "✕ ", quoted(text)];
    if (q == null) return [...start, ` was copied from earlier text, and the target is asked to pick it by itself: ${outcome}.`];
    const both = ` has ${equation("p", p)} and ${equation("q", q)}`;
    if (place) return [...start, `${both}. After a rejection, only what it left of p counts: ${outcome}.`];
    if (p >= q) return [...start, `${both}. p is at least q: ${outcome}.`];
    return [...start, `${both}. Its chance was ${equation("p / q", p / q)}. This time: ${outcome}.`];
  });
}

/** The line of candidates of which one is chosen, or none. */
function choice(candidates) {
  if (!candidates.length) return [];
  const taken = candidates.find((each) => each.accepted);
  if (taken) return [["✓ ", quoted(taken.text), ` (${equation("p", taken.p)}): accepted.`]];
  const texts = candidates.flatMap(({ text }, place) => [place ? ", " : "", quoted(text)]);
  return [["✕ ", ...texts, ": rejected."]];
}

function own(trace) {
  if (!trace.token) return [];
  const [first, second] = childrenOf(trace, trace.path.at(-1) ?? -1).map((child) => trace.candidates[child]);
  const token = quoted(trace.token.text);
  if (!first) {
    const text =
      "The candidates on the lit path passed, and none is left after them. The same pass of the target also tells what comes" +
      " next, so one more token is free.";
    return [item("One token more", paragraph(text), chosen(trace))];
  }
  if (kindOf(trace) === "matching") {
    const text = " It was no candidate, and goes into the text all the same.";
    return [item("The target's own token", paragraph("Here the target picked ", token, ".", text), table(trace, false))];
  }
  const subtracts = kindOf(trace) === "recursive" && first.q != null;
  const rule = subtracts
    ? ["So q is subtracted from p, and what stays above zero is the ", term("residual"), ". The token is drawn from that, "]
    : ["So the token is drawn from what the rejections leave of p: the ", term("residual"), ", "];
  return [
    item(
      "The target's own token, from the residual",
      paragraph(
        ...["No candidate passed here, so the target adds a token itself: ", token, ". Drawn from p, a token that the draft "],
        ...["proposes often would get a second chance, and come too often. ", ...rule, "as parts of its sum."],
      ),
      table(trace, subtracts),
      ...(subtracts && second ? [paragraph("The table shows the first rejection; each further one subtracts once more in the same way.")] : []),
    ),
  ];
}

/** That the target drew its own token from p, and from what. */
function chosen(trace) {
  if (!trace.token) return "";
  const isDrawn = trace.top.at(-1).length > 1;
  const text = isDrawn ? " It is drawn at random, each token as often as its p says." : " It is the most probable one.";
  return el("div", {}, paragraph("The target adds ", quoted(trace.token.text), ".", text), table(trace, false));
}

/** The target's most probable tokens after the path; with `residual` also what the first rejection leaves of them. */
function table(trace, residual) {
  const top = trace.top.at(-1);
  const subtracts = residual && top.every((each) => each.q != null);
  const head = ["token", "p", ...(subtracts ? ["q", "p − q, if above 0"] : [])];
  const rows = top.map(({ token_id, text, p, q }) => {
    const cells = subtracts ? [p, q, Math.max(0, p - q)] : [p];
    const row = token_id === trace.token?.token_id ? { class: "drawn" } : {};
    return el("tr", row, el("th", { scope: "row" }, label(text)), ...cells.map((value) => el("td", {}, percent(value))));
  });
  return el(
    "table",
    {},
    el("caption", {}, "What the target finds most likely here"),
    el("thead", {}, el("tr", {}, ...head.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, ...rows),
  );
}

function gain({ tokens, trace }) {
  const text =
    tokens.length > 1
      ? `Without guesses it would have taken ${tokens.length} passes. This saves time if the draft takes less than they do.`
      : "As many as without guesses: this time they did not help.";
  const ends = /^<\|.*\|>$/.test(trace.token?.text) ? ` ${trace.token.text} is no text: it is the sign that ends the answer.` : "";
  return item("The gain", paragraph(`${count(tokens.length, "token")} from one pass of the target. ${text}${ends}`));
}
