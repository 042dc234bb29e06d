// One step at a time: the picture, its explanation, and going back and forward. While text is written the newest is shown.

import { byId, disable, el } from "./dom.js";
import { explain } from "./explain.js";
import { originClass } from "./steps.js";
import { drawTree } from "./tree.js";

const PLAY_MILLISECONDS = 3000;
const FOLLOW_MILLISECONDS = 200; // between pictures while text is written
const BEFORE = 60; // characters shown before a step

export class Stepper {
  #steps = [];
  #shown = 0;
  #live = false; // whether text is being written
  #playing = false;
  #timer = null;
  #width = 0; // of the picture
  #server;
  #onShow;

  /** `server` has the names that explanations use; `onShow` is called with the step that is shown. */
  constructor(server, onShow) {
    this.#server = server;
    this.#onShow = onShow;
    byId("back").addEventListener("click", () => this.go(-1));
    byId("forward").addEventListener("click", () => this.go(1));
    byId("play").addEventListener("click", () => (this.#playing ? this.pause() : this.play()));
    byId("slider").addEventListener("input", (event) => this.show(event.target.value - 1));
    document.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => byId("picture").clientWidth !== this.#width && this.#draw()).observe(byId("picture"));
  }

  /** Begin an answer without steps. */
  begin() {
    this.pause();
    this.#steps = [];
    this.#shown = 0;
    this.#live = true;
    // Pictures that change by themselves are motion.
    this.#playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  }

  /** Add the newest step. */
  add(step) {
    this.#steps.push(step);
    byId("no-steps").hidden = true;
    byId("steps").hidden = false;
    if (this.#playing) this.#timer ??= setTimeout(() => this.#follow(), this.#steps.length === 1 ? 0 : FOLLOW_MILLISECONDS);
    this.#controls();
    if (this.#steps.length === 1) this.#render();
  }

  /** The answer has ended: show its first step, unless someone went to another one. */
  end() {
    this.#live = false;
    if (this.#playing) this.show(0);
    this.#controls();
  }

  /** Show a step, and stay there. */
  show(index) {
    this.pause();
    this.#shown = Math.max(0, Math.min(index, this.#steps.length - 1));
    this.#render();
  }

  /** Show the step before or after. */
  go(by) {
    if (this.#steps.length) this.show(this.#shown + by);
  }

  /** Follow the text, or show one step after the other. */
  play() {
    this.#playing = true;
    if (this.#live) this.#follow();
    else {
      if (this.#shown === this.#steps.length - 1) this.#shown = -1;
      this.#advance();
    }
    this.#controls();
  }

  /** Stay at the step that is shown. */
  pause() {
    this.#playing = false;
    clearTimeout(this.#timer);
    this.#timer = null;
    this.#controls();
  }

  #follow() {
    this.#timer = null;
    this.#shown = this.#steps.length - 1;
    this.#render();
  }

  #advance() {
    this.#shown += 1;
    this.#render();
    if (this.#shown < this.#steps.length - 1) this.#timer = setTimeout(() => this.#advance(), PLAY_MILLISECONDS);
    else this.pause();
  }

  #key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (event.target.closest("input, textarea, select")) return;
    if (!this.#steps.length) return;
    event.preventDefault();
    this.go(by);
  }

  #controls() {
    const last = this.#steps.length - 1;
    disable("back", this.#shown <= 0);
    disable("forward", this.#shown >= last);
    byId("play").textContent = this.#playing ? "Pause" : this.#live ? "Follow" : "Play";
    byId("position").textContent = this.#steps.length ? `Step ${this.#shown + 1} of ${this.#steps.length}` : "";
    const slider = byId("slider");
    slider.max = Math.max(1, this.#steps.length);
    slider.value = this.#shown + 1;
  }

  #render() {
    this.#controls();
    const step = this.#steps[this.#shown];
    if (!step) return;
    byId("context").replaceChildren(...context(step));
    byId("explanation").replaceChildren(...explain(step, this.#server));
    this.#draw();
    this.#onShow(this.#shown);
  }

  #draw() {
    const step = this.#steps[this.#shown];
    const place = byId("picture");
    this.#width = place.clientWidth;
    if (step && this.#width) place.replaceChildren(...(step.trace ? [drawTree(step, this.#width)] : []));
  }
}

/** The end of the text before a step, and its tokens. */
function context(step) {
  const before = step.before.length > BEFORE ? `…${step.before.slice(-BEFORE)}` : step.before;
  return [
    el("span", { class: "before" }, before || "(the answer begins) "),
    ...step.tokens.map(({ text, depth }) => el("span", { class: `token ${originClass(depth)}` }, text)),
  ];
}
