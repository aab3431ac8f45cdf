// Asking the server, and reading what it streams.

/** An answer of the server that says no, in its own sentence. */
class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `The server answered ${status}`);
    this.status = status;
  }
}

/** The response to a question. Throws Refused, and what fetch throws where nobody answers. */
async function ask(path, key, body = null, signal = undefined) {
  const posted = body && { method: "POST", body: JSON.stringify(body) };
  const headers = { ...key.headers, ...(body && { "content-type": "application/json" }) };
  const answer = await fetch(path, { ...posted, headers, signal, cache: "no-store", credentials: "omit" });
  if (!answer.ok) throw new Refused(answer.status, (await answer.json().catch(() => null))?.error);
  return answer;
}

/** The events of a stream, as JSON says them. Throws Refused for one that is an error, or where the end is missing. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Refused(200, { message: "The answer was cut off: the connection ended" });
    const lines = value.split("\n");
    lines[0] = rest + lines[0];
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line.startsWith("data: [DONE]")) return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Refused(200, event.error);
      yield event;
    }
  }
}
