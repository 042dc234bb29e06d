// The same prompt with speculation and without, one after the other, and how long each took.

import { Clock } from "./clock.js";
import { byId, count, el } from "./dom.js";

const RUNS = [
  { title: "With speculation", enabled: true },
  { title: "Plain decoding", enabled: false },
];

/** Run both. `body` is that of the request; an AbortSignal ends them. */
export async function compare(client, body, signal) {
  byId("comparison").hidden = false;
  byId("verdict").textContent = "";
  const panels = RUNS.map(({ title }) => panel(title));
  byId("comparison").querySelector(".runs").replaceChildren(...panels.map((each) => each.root));
  byId("comparison").scrollIntoView({ block: "nearest" });
  const results = [];
  for (const [index, { enabled }] of RUNS.entries()) {
    results.push(await run(client, { ...body, speculative: { enabled } }, panels[index], signal));
    const most = Math.max(...results.map((each) => each.speed));
    results.forEach(({ speed }, place) => (panels[place].bar.value = most ? speed / most : 0));
  }
  byId("verdict").textContent = verdict(results, body);
}

function panel(title) {
  const text = el("p", { class: "text" });
  const numbers = el("p", { class: "figures" }, "waits …");
  const bar = el("meter", { min: 0, max: 1, value: 0, "aria-label": `Speed: ${title}` });
  return { root: el("div", { class: "run" }, el("h3", {}, title), numbers, bar, text), text, numbers, bar };
}

async function run(client, body, { text, numbers }, signal) {
  const clock = new Clock();
  let tokens = 0;
  const usage = await client.chat({ ...body, return_token_ids: true }, (choice) => {
    if (!choice.token_ids) return;
    clock.add(choice.token_ids.length);
    tokens += choice.token_ids.length;
    text.append(choice.delta.content ?? "");
    numbers.textContent = count(tokens, "token");
  }, signal);
  const { speed } = clock;
  const { mean_acceptance_length: length, target_calls: steps } = usage.speculative_decoding;
  numbers.replaceChildren(
    el("b", {}, speed ? `${speed.toFixed(1)} tokens/s` : "too short to time"),
    `, ${count(tokens, "token")} in ${count(steps, "step")}: acceptance length ${length.toFixed(2)} tokens a step`,
  );
  return { speed, content: text.textContent };
}

function verdict([fast, plain], body) {
  const times = plain.speed ? fast.speed / plain.speed : 0;
  const speed = !times
    ? "The texts are too short to time."
    : times > 1.03
      ? `Speculation was ${times.toFixed(1)} times as fast.`
      : `Speculation took ${(1 / times).toFixed(1)} times as long here: this tree costs more time than its guesses save.`;
  if (fast.content === plain.content) return `${speed} Both texts are the same.`;
  return body.temperature > 0
    ? `${speed} The texts differ: each was drawn at random, with the same probabilities. A seed repeats a text with the same settings.`
    : `${speed} The texts differ, because the numbers are rounded a little differently when several tokens are read at once.`;
}
