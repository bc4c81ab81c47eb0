// The server: requests, streams, errors in words, and the token, which stays in this tab.

const TOKEN = "alula.token";

/** What went wrong, and what to do. `kind`: "lost" (no connection), "token", "busy" or "refused". */
export class ServerError extends Error {
  constructor(message, { kind = "refused", remedy = "", status = 0, code = "", wait = null } = {}) {
    super(message);
    Object.assign(this, { kind, remedy, status, code, wait });
  }
}

export function token() {
  try {
    return sessionStorage.getItem(TOKEN) ?? "";
  } catch {
    return kept;
  }
}

let kept = ""; // where the browser forbids storage

export function keepToken(value) {
  kept = value;
  try {
    if (value) sessionStorage.setItem(TOKEN, value);
    else sessionStorage.removeItem(TOKEN);
  } catch {
    // then it lives as long as the page
  }
}

async function send(path, body, signal) {
  const headers = { accept: "application/json" };
  if (token()) headers.authorization = `Bearer ${token()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw lost();
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

function lost(seen = "") {
  return new ServerError(seen || `The server at ${location.host} does not answer.`, {
    kind: "lost",
    remedy: "Nothing you wrote is gone. See whether `alula serve` still runs, then try again.",
  });
}

async function refusal(response) {
  let told = {};
  try {
    told = (await response.json()).error ?? {};
  } catch {
    // a proxy's page, or nothing at all: the status has to do
  }
  return told.message || response.status !== 401
    ? told_error(told, response.status, response.headers.get("retry-after"))
    : told_error({ message: "The server wants a token." }, 401, null);
}

function told_error(told, status, retryAfter) {
  const kind = status === 401 ? "token" : status === 429 || status === 503 ? "busy" : "refused";
  const wait = Number.parseFloat(retryAfter ?? "");
  const remedy = told.alula?.remedy ?? "";
  // for other clients the message ends with the remedy; here that has a line of its own
  const message = (told.message ?? "").replace(`; remedy: ${remedy}`, "");
  return new ServerError(message || `The server answered with status ${status}.`, {
    kind,
    status,
    code: told.code ?? told.type ?? "",
    remedy,
    wait: Number.isFinite(wait) ? wait : null,
  });
}

export async function json(path, body, signal) {
  const response = await send(path, body, signal);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw lost();
  }
}

/** The events of a streamed answer, as parsed JSON. A stream that ends without having said so was lost. */
export async function* stream(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let finished = false;
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError" || signal?.aborted) throw error;
        throw lost("The connection to the server was lost.");
      }
      if (part.done) break;
      buffer += part.value;
      const lines = buffer.split(/\r?\n/);
      buffer = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // comments keep the connection open; events have no other fields
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw told_error(event.error, event.error.code === "queue_full" ? 429 : 500, null);
        finished ||= event.choices?.some((choice) => choice.finish_reason) ?? false;
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!finished) throw lost("The connection to the server was lost before the answer was whole.");
}
