// The routes of this page's own server; nothing else is ever asked.

export class Refused extends Error {}

async function post(path, body, signal) {
  let answer;
  try {
    answer = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The playground itself does not answer. Start it again, then reload the page.");
  }
  if (!answer.ok) throw new Refused(await reason(answer));
  return answer;
}

async function reason(answer) {
  const body = await answer.json().catch(() => ({}));
  if (typeof body.error === "string") return body.error;
  if (Array.isArray(body.detail)) {
    return body.detail.map((fault) => `${fault.loc.at(-1)}: ${fault.msg}`).join("; ");
  }
  return `The playground answered with status ${answer.status}.`;
}

export async function served() {
  return (await fetch("api/served")).json();
}

export async function score(written) {
  return (await post("api/score", written)).json();
}

export async function code(ask) {
  return (await post("api/code", ask)).json();
}

// Events of an answer as they come.
export async function* answer(ask, signal) {
  const reader = (await post("api/answer", ask, signal)).body
    .pipeThrough(new TextDecoderStream())
    .getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The playground stopped in the middle of the answer. Start it again.");
    }
    if (part.done) return;
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.error) throw new Refused(event.error);
      yield event;
    }
  }
}
