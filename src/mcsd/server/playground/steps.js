// The steps of an answer, as the server's traces tell them.

/** Schemes that compare candidates with a token that the target picks itself. */
const MATCHING = new Set(["naive", "top-k"]);
/** Schemes that test the first candidate with probability p / q, and later ones against the residual. */
const RECURSIVE = new Set(["mcss", "mcss-wor"]);

/** How a step verified its candidates: "matching", "recursive" or "other". */
export function kindOf(trace) {
  if (MATCHING.has(trace.scheme)) return "matching";
  return RECURSIVE.has(trace.scheme) ? "recursive" : "other";
}

/**
 * One step: its tokens, each with the depth of the accepted candidate or 0 for the target's own; the text before it; its
 * trace, if it has one.
 */
export function stepOf(choice, before) {
  const trace = choice.trace ?? null;
  const texts = trace ? trace.emitted : [choice.delta.content ?? ""];
  const depth = (place) => (trace && place < trace.path.length ? place + 1 : 0);
  return { before, trace, tokens: texts.map((text, place) => ({ text, depth: depth(place) })) };
}

/** The class of a token's colour and underline. */
export const originClass = (depth) => (depth ? `d${Math.min(depth, 4)}` : "own");

/** The candidates after a node, -1 for the root. */
export function childrenOf(trace, node) {
  return trace.candidates.map((_, index) => index).filter((index) => trace.candidates[index].parent === node);
}

/**
 * What became of each candidate: "accepted"; "rejected"; "skipped", because one before it was accepted; or "unreached",
 * because the one that it continues was not accepted.
 */
export function fates(trace) {
  const kind = kindOf(trace);
  const onPath = new Set(trace.path);
  return trace.candidates.map(({ parent }, index) => {
    if (onPath.has(index)) return "accepted";
    if (parent >= 0 && !onPath.has(parent)) return "unreached";
    const taken = trace.path.find((node) => trace.candidates[node].parent === parent);
    return kind === "recursive" && taken !== undefined && taken < index ? "skipped" : "rejected";
  });
}
