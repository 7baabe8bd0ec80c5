// The conversation as it is seen.

const place = { messages: field("messages"), notice: field("notice"), list: field("conversation-list") };

function notice(text) {
  place.notice.textContent = text ?? "";
  place.notice.hidden = !text;
}

const tool = (label, act) => {
  const made = element("button", label, { type: "button", class: "quiet" });
  made.addEventListener("click", act);
  return made;
};

function showReasoning(article, message) {
  if (!message.reasoning) return;
  let shown = article.querySelector(".reasoning");
  if (!shown) {
    shown = element("details", [element("summary", "Reasoning"), element("div")], { class: "reasoning" });
    article.querySelector(".body").before(shown);
  }
  shown.querySelector("div").textContent = message.reasoning;
}

function showBody(article, message) {
  const body = article.querySelector(".body");
  if (message.role === "user") body.textContent = message.content;
  else showMarkdown(body, message.content);
  showReasoning(article, message);
}

function messageNode(message, number, actions) {
  const who = message.role === "user" ? "You" : "Model";
  const tools = element("div", [], { class: "tools" });
  if (message.role === "user") tools.append(tool("Edit", () => actions.edit(number)));
  else tools.append(tool("Copy", () => navigator.clipboard?.writeText(message.content)), tool("Retry", () => actions.retry(number)));
  if (message.note) tools.append(element("span", message.note));
  const parts = [element("div", who, { class: "who" }), element("div", [], { class: "body" }), tools];
  const article = element("article", parts, { class: `message ${message.role}`, "aria-label": who });
  showBody(article, message);
  return article;
}

function showConversation(actions) {
  const shown = conversations.current.messages.map((message, number) => messageNode(message, number, actions));
  place.messages.replaceChildren(...shown);
  place.messages.scrollTop = place.messages.scrollHeight;
}

function showList(actions) {
  const rows = conversations.all.map((one) => {
    const title = element("button", conversations.title(one), { class: "title", type: "button" });
    if (one === conversations.current) title.setAttribute("aria-current", "true");
    title.addEventListener("click", () => actions.open(one));
    const remove = element("button", "×", { type: "button", "aria-label": `Delete ${conversations.title(one)}` });
    remove.addEventListener("click", () => actions.remove(one));
    return element("li", [title, remove]);
  });
  place.list.replaceChildren(...rows);
}

// Show a growing answer once a frame, and follow it where the reader is at its end.
function follow(article, message) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      const { scrollTop, scrollHeight, clientHeight } = place.messages;
      showBody(article, message);
      if (scrollHeight - scrollTop - clientHeight < 80) place.messages.scrollTop = place.messages.scrollHeight;
    });
  };
}
