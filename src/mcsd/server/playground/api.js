// The server's API. The key is kept in memory only.

/** An answer that is an error, or a connection that broke: `status` is then 0. */
export class ApiError extends Error {
  constructor(status, message, code = null, seconds = null) {
    super(message);
    Object.assign(this, { status, code, seconds });
  }
}

export class Client {
  key = null;

  /** What the server serves: name, length, and its draft, tree and scheme. */
  async model() {
    const answer = await this.#fetch("/v1/models", {});
    return (await answer.json()).data[0];
  }

  /**
   * Stream a chat completion: call `receive` with each choice, and return the usage.
   * An AbortSignal ends it with an AbortError.
   */
  async chat(body, receive, signal) {
    const answer = await this.#fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    let usage = null;
    let ended = false;
    for await (const data of events(answer.body)) {
      // The stream is read to its end, because leaving it would cancel it.
      ended = data === "[DONE]";
      if (ended) continue;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(answer.status, event.error.message, event.error.code);
      usage = event.usage ?? usage;
      event.choices.forEach(receive);
    }
    if (!ended) throw broken();
    return usage;
  }

  async #fetch(path, options) {
    const headers = { ...options.headers };
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    let answer;
    try {
      answer = await fetch(path, { ...options, headers });
    } catch (error) {
      throw error.name === "AbortError" ? error : broken();
    }
    if (answer.ok) return answer;
    const body = await answer.json().catch(() => null);
    const seconds = answer.headers.get("Retry-After");
    throw new ApiError(answer.status, body?.error?.message ?? `status ${answer.status}`, body?.error?.code, seconds);
  }
}

/** The data of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        for (const line of part.split("\n")) if (line.startsWith("data: ")) yield line.slice(6);
      }
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : broken();
  } finally {
    reader.cancel().catch(() => {});
  }
}

function broken() {
  return new ApiError(0, "The connection to the server broke. Is mcsd serve still running?");
}

/** What a person can do about an error, as a sentence. */
export function explained(error) {
  if (!(error instanceof ApiError)) return `The page failed: ${error.message}`;
  const again = error.seconds ? ` Try again in ${error.seconds} s.` : "";
  switch (error.status) {
    case 0:
      return error.message;
    case 401:
      return "This server needs a valid API key.";
    case 429:
      return `The server is busy: too many requests are waiting.${again}`;
    case 503:
      return `The server cannot answer now: ${error.message}.${again}`;
    default:
      return `The server refused the request: ${error.message}`;
  }
}
