// Requests to the server that served this page.

const headers = () => {
  const key = field("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

class ServerError extends Error {}

async function failure(response) {
  let told = `${response.status} ${response.statusText}`;
  try {
    told = (await response.json()).error.message;
  } catch {
    // no JSON: the status says it
  }
  return new ServerError(response.status === 401 ? `${told} Give the API key in the settings.` : told);
}

async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw await failure(response);
  return response.json();
}

// Yield the events of a streamed answer.
async function* streamed(body, signal) {
  const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ServerError("The connection ended before the answer did.");
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const said = JSON.parse(data);
      if (said.error) throw new ServerError(said.error.message);
      yield said;
    }
  }
}
