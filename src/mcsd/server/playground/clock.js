// The speed of an answer, from its first step to its last: reading the prompt does not count.

export class Clock {
  #first = null;
  #last = null;
  #tokens = 0;

  /** A step has come. */
  add(tokens) {
    this.#last = performance.now();
    if (this.#first === null) this.#first = this.#last;
    else this.#tokens += tokens;
  }

  /** Tokens per second; 0 if there was one step only. */
  get speed() {
    return this.#last > this.#first ? (1000 * this.#tokens) / (this.#last - this.#first) : 0;
  }
}
