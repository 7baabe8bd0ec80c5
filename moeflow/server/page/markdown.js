// Markdown as DOM nodes. No text of a model is ever read as HTML.

const element = (tag, children = [], attributes = {}) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...[children].flat());
  return made;
};

const INLINE = /(`+)([\s\S]*?[^`])\1(?!`)|\*\*([^\s*](?:[\s\S]*?[^\s*])?)\*\*|\*([^\s*](?:[^*]*?[^\s*])?)\*|~~([^~]+)~~|\[([^\]]+)\]\((\S+?)\)|(https?:\/\/[^\s<>)\]]+)/;

function inline(text) {
  const nodes = [];
  while (text) {
    const found = INLINE.exec(text);
    if (!found) return [...nodes, text];
    if (found.index) nodes.push(text.slice(0, found.index));
    const [whole, , code, strong, emphasis, struck, label, target, bare] = found;
    if (code !== undefined) nodes.push(element("code", code.trim() || code));
    else if (strong !== undefined) nodes.push(element("strong", inline(strong)));
    else if (emphasis !== undefined) nodes.push(element("em", inline(emphasis)));
    else if (struck !== undefined) nodes.push(element("s", inline(struck)));
    else nodes.push(link(label ?? bare, target ?? bare));
    text = text.slice(found.index + whole.length);
  }
  return nodes;
}

function link(label, target) {
  if (!/^(https?:\/\/|mailto:)/i.test(target)) return `[${label}](${target})`; // no javascript:, no data:
  return element("a", label, { href: target, target: "_blank", rel: "noopener noreferrer" });
}

const FENCE = /^ {0,3}(```+|~~~+)\s*([^`\s]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

const isNumbered = (item) => /\d/.test(item[2]);

// Whether a list that begins with `first` holds `line` too: not where another kind of list begins, or a gap ends it.
function goesOn(first, line, next) {
  const [begun, item] = [ITEM.exec(first), ITEM.exec(line)];
  if (item) return item[1].length > begun[1].length || isNumbered(item) === isNumbered(begun);
  return Boolean(line.trim()) || /^\s{2,}\S/.test(next ?? "") || (ITEM.test(next ?? "") && goesOn(first, next));
}

// The blocks of a text, each with the lines that it is written in: a block that has not changed keeps its node.
function blocks(text) {
  const found = [];
  const lines = text.split("\n");
  for (let at = 0; at < lines.length;) {
    const begin = at;
    const fence = FENCE.exec(lines[at]);
    if (fence) {
      at += 1;
      while (at < lines.length && !lines[at].trimStart().startsWith(fence[1])) at += 1;
      at += 1;
    } else if (!lines[at].trim()) {
      at += 1;
      continue;
    } else if (ITEM.test(lines[at])) {
      const first = lines[at];
      do at += 1;
      while (at < lines.length && goesOn(first, lines[at], lines[at + 1]));
    } else if (/^#{1,6}\s/.test(lines[at])) {
      at += 1;
    } else {
      while (at < lines.length && lines[at].trim() && (at === begin || !(FENCE.test(lines[at]) || /^#{1,6}\s/.test(lines[at]) || ITEM.test(lines[at])))) at += 1;
    }
    found.push(lines.slice(begin, at).join("\n"));
  }
  return found;
}

function codeBlock(lines) {
  const [, mark, language] = FENCE.exec(lines[0]);
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(mark);
  const code = lines.slice(1, closed ? -1 : undefined).join("\n");
  const copy = element("button", "Copy", { type: "button", "aria-label": "Copy the code" });
  copy.addEventListener("click", async () => {
    await navigator.clipboard?.writeText(code);
    copy.textContent = "Copied";
  });
  return element("pre", [element("code", code, language ? { "data-language": language } : {}), copy], { tabindex: "0" });
}

function list(lines) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const ordered = isNumbered(ITEM.exec(lines[0]));
  const made = element(ordered ? "ol" : "ul", [], ordered && parseInt(mark) !== 1 ? { start: parseInt(mark) } : {});
  let own = [];
  const close = () => {
    if (!own.length) return;
    const nested = own.slice(1).map((line) => line.replace(/^\s{1,4}/, "")).join("\n");
    made.append(element("li", [...inline(own[0]), ...(nested.trim() ? rendered(nested) : [])]));
  };
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length) {
      close();
      own = [item[3]];
    } else own.push(line);
  }
  close();
  return made;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, tag) => element("tr", cells(line).map((cell) => element(tag, inline(cell))));
  return element("table", [element("thead", row(lines[0], "th")), element("tbody", lines.slice(2).map((line) => row(line, "td")))]);
}

function node(block) {
  const lines = block.split("\n");
  if (FENCE.test(lines[0])) return codeBlock(lines);
  const heading = /^(#{1,6})\s+(.*)$/.exec(lines[0]);
  if (heading) return element(`h${Math.min(heading[1].length + 2, 6)}`, inline(heading[2]));
  if (/^ {0,3}([-*_])(\s*\1){2,}\s*$/.test(block)) return element("hr");
  if (ITEM.test(lines[0])) return list(lines);
  if (lines.every((line) => /^\s*>/.test(line))) return element("blockquote", rendered(lines.map((line) => line.replace(/^\s*> ?/, "")).join("\n")));
  if (lines.length > 1 && lines[0].includes("|") && /^\s*\|?[\s:|-]*-[\s:|-]*$/.test(lines[1])) return table(lines);
  return element("p", lines.flatMap((line, number) => (number ? [element("br"), ...inline(line)] : inline(line))));
}

const rendered = (text) => blocks(text).map(node);

// Show a text that grows: only the blocks that have changed are made anew.
function showMarkdown(place, text) {
  const wanted = blocks(text);
  const had = place.blocks ?? [];
  let same = 0;
  while (same < wanted.length && wanted[same] === had[same]) same += 1;
  while (place.childNodes.length > same) place.lastChild.remove();
  place.append(...wanted.slice(same).map(node));
  place.blocks = wanted;
}
