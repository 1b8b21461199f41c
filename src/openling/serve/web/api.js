// The server's API as the page uses it: the model list, and one streamed reply. Addresses are relative, so a path prefix works.

/** What went wrong, for a person: `kind` is key | busy | loading | refused | broken | offline. */
export class ApiError extends Error {
  constructor(kind, message, retryAfter = null) {
    super(message);
    this.kind = kind;
    this.retryAfter = retryAfter;
  }
}

const OFFLINE = "The server cannot be reached. Is it still running?";

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { cache: "no-store", credentials: "omit", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("offline", OFFLINE);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const detail = await response.json().then(readError, () => "");
  const seconds = Number.parseFloat(response.headers.get("Retry-After"));
  const wait = Number.isFinite(seconds) ? Math.max(1, Math.ceil(seconds)) : null;
  const soon = wait ? `Try again in ${wait} s.` : "Try again in a moment.";
  switch (response.status) {
    case 401:
    case 403:
      return new ApiError("key", "The server asks for an API key, or does not know this one.");
    case 429:
      return new ApiError("busy", `The server has more requests than it can take. ${soon}`, wait ?? 2);
    case 503:
      return new ApiError("loading", `The server is starting or shutting down. ${soon}`, wait ?? 3);
    default:
      return new ApiError("refused", detail || `The server answered ${response.status} ${response.statusText}.`);
  }
}

function readError(body) {
  const error = body?.error;
  if (typeof error === "string") return error;
  const message = error?.message ?? body?.message ?? "";
  return error?.param && !message.includes(error.param) ? `${error.param}: ${message}` : message;
}

/** The models served: [{id, max_model_len, ...}]. */
export async function listModels(key) {
  const response = await request("v1/models", { headers: headers(key) });
  const body = await response.json().catch(() => null);
  if (!Array.isArray(body?.data)) throw new ApiError("broken", "The server's list of models cannot be read.");
  return body.data;
}

/** The data of each server-sent event of a response, as text. Any line ending; an unfinished last event is dropped. */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      // A carriage return at the very end may be half of a CRLF: it waits for the next piece.
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // also when the caller stops early: the server then frees the request
  }
}

/**
 * Asks for a reply and yields its chunks as objects. Throws ApiError for every failure, also one in the middle of the
 * stream and an ending without `[DONE]`; AbortError when `signal` was used.
 */
export async function* streamChat(body, key, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } }),
    signal,
  });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      let chunk;
      try {
        chunk = JSON.parse(data);
      } catch {
        throw new ApiError("broken", "The server sent something that is not JSON.");
      }
      if (chunk.error) throw new ApiError("refused", readError(chunk) || "The server gave up on this reply.");
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("offline", "The connection broke before the reply was complete.");
  }
  throw new ApiError("offline", "The connection ended before the reply was complete.");
}
