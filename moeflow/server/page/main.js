// What the buttons and keys do.

let under_way = null; // of the answer that is being streamed: an AbortController

const actions = {
  open(one) {
    under_way?.abort();
    conversations.current = one;
    panel("conversations", false);
    showAll();
  },

  remove(one) {
    if (one === conversations.current) under_way?.abort();
    conversations.remove(one);
    showAll();
  },

  edit(number) {
    under_way?.abort();
    const { messages } = conversations.current;
    field("message").value = messages[number].content;
    messages.length = number;
    conversations.save();
    showAll();
    grow();
    field("message").focus();
  },

  retry(number) {
    under_way?.abort();
    conversations.current.messages.length = number;
    answer();
  },
};

function showAll() {
  notice(null);
  showList(actions);
  showConversation(actions);
}

function busy(is) {
  field("send").hidden = is;
  field("stop").hidden = !is;
  figures.isBusy = is;
  if (is) figures.refresh();
}

function request() {
  const system = field("system").value.trim();
  const asked = settings.request();
  const said = conversations.current.messages.map(({ role, content }) => ({ role, content }));
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...said];
  return { model: field("model").textContent, messages, stream: true, stream_options: { include_usage: true }, ...asked };
}

// Ask for an answer to the conversation, and show it as it comes.
async function answer() {
  let body;
  try {
    body = request();
  } catch (error) {
    notice(`The JSON schema in the settings is no JSON: ${error.message}`);
    return;
  }
  const conversation = conversations.current;
  const message = { role: "assistant", content: "", reasoning: "", note: "" };
  conversation.messages.push(message);
  showAll();
  const article = place.messages.lastChild;
  const show = follow(article, message);
  const own = (under_way = new AbortController());
  busy(true);
  field("spoken").textContent = "The model answers.";
  const begin = performance.now();
  let first = null;
  try {
    for await (const event of streamed(body, own.signal)) {
      const [choice] = event.choices;
      if (choice?.delta.content || choice?.delta.reasoning_content) first ??= performance.now();
      message.content += choice?.delta.content ?? "";
      message.reasoning += choice?.delta.reasoning_content ?? "";
      if (event.usage) message.note = figuresOf(event.usage, begin, first);
      if (choice?.finish_reason === "length") message.note = "Cut at the limit of tokens.";
      show();
    }
  } catch (error) {
    if (error.name === "AbortError") message.note = "Stopped.";
    else notice(error instanceof ServerError ? error.message : `The server cannot be reached: ${error.message}`);
  }
  if (!message.content && !message.reasoning) conversation.messages.splice(conversation.messages.indexOf(message), 1);
  conversations.save();
  if (under_way !== own) return; // another answer has begun
  under_way = null;
  busy(false);
  if (conversation === conversations.current) {
    const told = place.notice.textContent;
    showAll();
    notice(told);
  }
  field("spoken").textContent = message.content ? `The model said: ${message.content}` : "No answer.";
}

function figuresOf(usage, begin, first) {
  const decoded = (performance.now() - (first ?? begin)) / 1000;
  const speed = usage.completion_tokens > 1 && decoded > 0 ? `, ${((usage.completion_tokens - 1) / decoded).toFixed(1)} tok/s` : "";
  const kept = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const wait = first === null ? "" : `, first token after ${((first - begin) / 1000).toFixed(1)} s`;
  return `${usage.completion_tokens} tokens${speed}${wait}; ${kept} of ${usage.prompt_tokens} prompt tokens kept`;
}

function send() {
  const text = field("message").value.trim();
  if (!text || under_way) return;
  field("message").value = "";
  grow();
  conversations.current.messages.push({ role: "user", content: text });
  conversations.save();
  answer();
}

function grow() {
  const box = field("message");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

// Open or close a panel, and tell where the focus goes.
function panel(name, open) {
  const opener = field(`open-${name}`);
  if (name === "settings") field("settings").hidden = !open;
  else field(name).classList.toggle("open", open);
  opener.setAttribute("aria-expanded", String(open));
  if (open) field(name).querySelector("textarea, input, button").focus();
}

function theme(next) {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const before = document.documentElement.dataset.theme ?? kept("moeflow.theme") ?? (dark ? "dark" : "light");
  const chosen = next ? (before === "dark" ? "light" : "dark") : before;
  if (next) keep("moeflow.theme", chosen);
  document.documentElement.dataset.theme = chosen;
}

// Wait until the model is loaded, and tell how far that is.
async function greet() {
  for (;;) {
    try {
      const models = await get("v1/models");
      field("model").textContent = models.data[0].id;
      notice(null);
      return figures.refresh();
    } catch (error) {
      notice(error instanceof ServerError ? error.message : "The server cannot be reached. Trying again.");
      await new Promise((done) => setTimeout(done, 1000));
    }
  }
}

field("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
field("message").addEventListener("input", grow);
field("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
field("stop").addEventListener("click", () => under_way?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (!field("settings").hidden) { panel("settings", false); field("open-settings").focus(); } else under_way?.abort();
});
field("new-conversation").addEventListener("click", () => { actions.open(conversations.begin()); field("message").focus(); });
field("open-conversations").addEventListener("click", () => panel("conversations", !field("conversations").classList.contains("open")));
field("open-settings").addEventListener("click", () => panel("settings", field("settings").hidden));
field("close-settings").addEventListener("click", () => { panel("settings", false); field("open-settings").focus(); });
field("theme").addEventListener("click", () => theme(true));
field("settings").addEventListener("input", () => {
  settings.save();
  let wrong = "";
  try { settings.request(); } catch (error) { wrong = `No JSON: ${error.message}`; }
  field("schema-error").textContent = wrong;
  field("schema-error").hidden = !wrong;
});
document.addEventListener("visibilitychange", () => document.hidden || figures.refresh());

theme(false);
settings.load();
conversations.load();
showAll();
greet();
