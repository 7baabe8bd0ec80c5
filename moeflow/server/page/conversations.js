// The conversations that this browser keeps, and the settings.

const STORE = "moeflow.conversations";
const MOST_KEPT = 100;

// What a store kept under a name; null where it is no JSON, or the browser lets the page keep nothing.
function kept(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

function keep(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

const conversations = {
  all: [],
  current: null,

  load() {
    const found = kept(STORE);
    this.all = Array.isArray(found) ? found.filter((one) => Array.isArray(one?.messages)) : [];
    this.current = this.all[0] ?? this.begin();
  },

  begin() {
    const empty = this.all.find((one) => !one.messages.length);
    const made = empty ?? { id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), messages: [] };
    if (!empty) this.all.unshift(made);
    this.current = made;
    return made;
  },

  remove(one) {
    this.all = this.all.filter((other) => other !== one);
    if (this.current === one) this.current = this.all[0] ?? this.begin();
    this.save();
  },

  save() {
    this.all = this.all.filter((one) => one.messages.length || one === this.current).slice(0, MOST_KEPT);
    // Where there is no storage at all, the conversations last as long as the page.
    for (let most = this.all.length; most && !keep(STORE, this.all.slice(0, most)); most -= 1);
  },

  title: (one) => one.messages.find((message) => message.role === "user")?.content.slice(0, 60) || "New conversation",
};

const SETTINGS = ["system", "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "schema"];
const field = (name) => document.getElementById(name);

const settings = {
  load() {
    const found = kept("moeflow.settings") ?? {};
    for (const name of SETTINGS) field(name).value = found[name] ?? "";
    try {
      field("key").value = sessionStorage.getItem("moeflow.key") ?? ""; // gone with the tab
    } catch {
      field("key").value = "";
    }
  },

  save() {
    keep("moeflow.settings", Object.fromEntries(SETTINGS.map((name) => [name, field(name).value])));
    try {
      sessionStorage.setItem("moeflow.key", field("key").value);
    } catch {
      // no storage: it lasts as long as the page
    }
  },

  // What a request says beside its messages. Throws where the schema is no JSON.
  request() {
    const asked = {};
    for (const name of ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"]) {
      if (field(name).value !== "") asked[name] = Number(field(name).value);
    }
    if (field("schema").value.trim()) {
      const schema = JSON.parse(field("schema").value);
      asked.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
    }
    return asked;
  },
};
