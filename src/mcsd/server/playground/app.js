// The page: its form, the conversation, and errors.

import { Client, explained } from "./api.js";
import { Clock } from "./clock.js";
import { compare } from "./compare.js";
import { byId, count, disable, el } from "./dom.js";
import { originClass, stepOf } from "./steps.js";
import { Stepper } from "./stepper.js";

const LOADING_MILLISECONDS = 1000;

const client = new Client();
/** The names of target and draft, the tree and scheme; and whether the last request speculated. */
const server = { name: "", draft: "", tree: "", scheme: "", speculation: true };
const stepper = new Stepper(server, mark);
let conversation = [];
let answer = null; // the element of the newest answer
let running = null; // the AbortController of the running request

/** Read what the server serves. While it loads, ask again. */
async function load() {
  try {
    const { id, speculative } = await client.model();
    Object.assign(server, { name: id, ...speculative });
    const rows = { "Target, the large model": id, "Draft, which guesses": server.draft, Tree: server.tree, Scheme: server.scheme };
    byId("server").replaceChildren(
      ...Object.entries(rows).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
    );
    byId("key-form").hidden = true;
    fail(null);
    say("");
  } catch (error) {
    if (error.code !== "loading") return fail(error);
    byId("key-form").hidden = true;
    fail(null);
    say("The server is loading its model …");
    setTimeout(load, LOADING_MILLISECONDS);
  }
}

/** Show an error, or none. */
function fail(error) {
  byId("error").hidden = error === null;
  byId("error").textContent = error === null ? "" : explained(error);
  if (error?.status !== 401) return;
  byId("key-form").hidden = false;
  byId("key").focus();
}

function say(text) {
  byId("status").textContent = text;
}

/** The fields of a request, as the controls say. */
function settings() {
  const body = { temperature: byId("temperature").valueAsNumber, max_tokens: byId("length").valueAsNumber };
  if (byId("seed").value) body.seed = byId("seed").valueAsNumber;
  return body;
}

/** Run one request at a time. `work` gets its AbortSignal. */
async function request(work) {
  if (running || !byId("ask").reportValidity()) return;
  fail(null);
  running = new AbortController();
  busy(true);
  try {
    await work(running.signal);
  } catch (error) {
    say("");
    if (error.name === "AbortError") say("Stopped.");
    else fail(error);
  } finally {
    running = null;
    busy(false);
  }
}

function busy(is) {
  for (const id of ["send", "compare", "clear"]) disable(id, is);
  byId("stop").hidden = !is;
}

async function send(signal) {
  const question = { role: "user", content: byId("prompt").value };
  server.speculation = byId("speculation").checked;
  bubble("user", "You").append(question.content);
  answer = bubble("assistant", server.name || "Answer");
  stepper.begin();
  say("Writing …");
  const body = { ...settings(), messages: [...conversation, question] };
  body.speculative = { enabled: server.speculation, trace: true };
  if (server.speculation) delete body.speculative.enabled;
  let text = "";
  let steps = 0;
  const clock = new Clock();
  try {
    const usage = await client.chat(body, (choice) => {
      if (!choice.trace && !choice.delta.content) return;
      const step = stepOf(choice, text);
      text += choice.delta.content ?? "";
      clock.add(step.tokens.length);
      write(step, steps++);
      stepper.add(step);
    }, signal);
    say(summary(clock, usage));
  } finally {
    stepper.end();
    if (text) conversation.push(question, { role: "assistant", content: text });
    byId("clear").hidden = !conversation.length;
  }
}

function summary(clock, usage) {
  const { mean_acceptance_length: length, target_calls: steps } = usage.speculative_decoding;
  const speed = clock.speed ? `, ${clock.speed.toFixed(1)} tokens/s while steps are shown` : "";
  const text = `${count(usage.completion_tokens, "token")} in ${count(steps, "step")}`;
  return `${text}: acceptance length ${length.toFixed(2)} tokens a step${speed}.`;
}

function bubble(role, name) {
  const content = el("p", { class: "text" });
  byId("chat").append(el("div", { class: `bubble ${role}` }, el("p", { class: "who" }, name), content));
  return content;
}

/** Append a step to the answer. A click on it shows the step. */
function write(step, index) {
  const tokens = step.tokens.map(({ text, depth }) => el("span", { class: `token ${originClass(depth)}` }, text));
  const part = el("span", { class: "step" }, ...tokens);
  const own = answer;
  part.addEventListener("click", () => own === answer && stepper.show(index));
  answer.append(part);
}

/** Mark the step that is shown in the answer. */
function mark(index) {
  answer?.querySelector(".shown")?.classList.remove("shown");
  answer?.children[index]?.classList.add("shown");
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  request(send);
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  request(send);
});
byId("compare").addEventListener("click", () => {
  const body = { ...settings(), messages: [{ role: "user", content: byId("prompt").value }] };
  request(async (signal) => {
    say("Comparing …");
    await compare(client, body, signal);
    say("Compared.");
  });
});
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", () => {
  if (running) return;
  conversation = [];
  byId("chat").replaceChildren();
  byId("clear").hidden = true;
  byId("prompt").focus();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  client.key = byId("key").value;
  byId("key").value = "";
  load();
});
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => {
    byId("prompt").value = example.textContent;
    byId("prompt").focus();
  });
}
load();
