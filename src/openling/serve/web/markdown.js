// Markdown to DOM nodes. Model text only ever becomes text nodes and attributes that are checked; there is no innerHTML here.
// Scans are linear and nesting stops at DEPTH, so that hostile text cannot stall the page.

const DEPTH = 12;
const LONG_CELL = 24; // characters; a table's column with more is kept wide enough to be read

/** Keeps `container` showing `text`. Called again with longer text it replaces only the blocks that changed. */
export function renderMarkdown(container, text) {
  const blocks = splitBlocks(text.replace(/\r\n?/g, "\n").split("\n"));
  const drawn = container.drawn ?? [];
  let same = 0;
  while (same < drawn.length && same < blocks.length && drawn[same] === blocks[same].raw) same++;
  while (container.childNodes.length > same) container.lastChild.remove();
  for (const block of blocks.slice(same)) container.append(draw(block, 0));
  container.drawn = blocks.map((block) => block.raw);
}

const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)(?:([-*+])|(\d{1,9})[.)])(?:[ \t]+|$)/;
const DIVIDER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const BLANK = /^[ \t]*$/;

function splitBlocks(lines) {
  const blocks = [];
  let at = 0;
  const take = (kind, end, more) => {
    const part = lines.slice(at, end);
    blocks.push({ kind, lines: part, raw: `${kind}\n${part.join("\n")}`, ...more });
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (BLANK.test(line)) at++;
    else if (fence) take("code", fenceEnd(lines, at, fence[2]), { fence });
    else if (HEADING.test(line)) take("heading", at + 1);
    else if (RULE.test(line)) take("rule", at + 1);
    else if (QUOTE.test(line)) take("quote", runEnd(lines, at, (l) => QUOTE.test(l)));
    else if (ITEM.test(line)) take("list", listEnd(lines, at));
    else if (isTable(lines, at)) take("table", runEnd(lines, at, (l) => l.includes("|")));
    else take("paragraph", paragraphEnd(lines, at));
  }
  return blocks;
}

function runEnd(lines, at, belongs) {
  while (at < lines.length && belongs(lines[at])) at++;
  return at;
}

function fenceEnd(lines, at, mark) {
  const close = new RegExp(`^ {0,3}\\${mark[0]}{${mark.length},}[ \\t]*$`);
  const end = runEnd(lines, at + 1, (l) => !close.test(l));
  return Math.min(end + 1, lines.length); // a fence that is still open runs to the end
}

function isTable(lines, at) {
  const next = lines[at + 1];
  return lines[at].includes("|") && next !== undefined && next.includes("-") && DIVIDER.test(next) && next.length < 2000;
}

function startsBlock(lines, at) {
  const line = lines[at];
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line) || isTable(lines, at);
}

function paragraphEnd(lines, at) {
  do at++;
  while (at < lines.length && !BLANK.test(lines[at]) && !startsBlock(lines, at));
  return at;
}

/** A list goes on over indented lines and over blank lines that an item or an indented line follows. */
function listEnd(lines, at) {
  const ordered = Boolean(ITEM.exec(lines[at])[3]);
  let fence = null;
  for (at++; at < lines.length; at++) {
    const line = lines[at];
    const indented = /^(?: {2,}|\t)\S/.test(line);
    const item = ITEM.exec(line);
    if (BLANK.test(line)) {
      const next = lines[at + 1];
      const nextItem = next === undefined ? null : ITEM.exec(next);
      const goesOn = nextItem && (nextItem[1].length >= 2 || Boolean(nextItem[3]) === ordered);
      if (!fence && !goesOn && !/^(?: {2,}|\t)\S/.test(next ?? "")) return at;
      continue;
    }
    const opening = FENCE.exec(line.trimStart());
    if (indented && opening) fence = fence ? null : opening[2];
    if (fence || indented) continue;
    if (item) {
      if (Boolean(item[3]) !== ordered || RULE.test(line)) return at;
    } else if (BLANK.test(lines[at - 1]) || startsBlock(lines, at)) return at;
  }
  return at;
}

function el(name, className, ...children) {
  const node = document.createElement(name);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

function draw(block, depth) {
  switch (block.kind) {
    case "code":
      return drawCode(block);
    case "heading": {
      const [, marks, text] = HEADING.exec(block.lines[0]);
      // A page has one h1 and it is not the model's.
      const node = el(`h${Math.min(marks.length + 2, 6)}`, `h${marks.length}`);
      return inline(node, text.replace(/[ \t]+#+[ \t]*$/, ""), depth);
    }
    case "rule":
      return el("hr");
    case "quote":
      return drawInner(el("blockquote"), block.lines.map((l) => l.replace(QUOTE, "")), depth);
    case "list":
      return drawList(block.lines, depth);
    case "table":
      return drawTable(block.lines, depth);
    default:
      return inline(el("p"), block.lines.map((l) => l.trimStart()).join("\n"), depth);
  }
}

function drawInner(node, lines, depth) {
  if (depth >= DEPTH) node.append(lines.join("\n"));
  else for (const block of splitBlocks(lines)) node.append(draw(block, depth + 1));
  return node;
}

function drawCode({ lines, fence }) {
  const [, indent, mark, language] = fence;
  const closed = lines.length > 1 && new RegExp(`^ {0,3}\\${mark[0]}{${mark.length},}[ \\t]*$`).test(lines.at(-1));
  const inside = lines.slice(1, closed ? -1 : undefined).map((l) => (indent && l.startsWith(indent) ? l.slice(indent.length) : l));
  const text = inside.join("\n");
  const copy = el("button", "copy-code", "Copy");
  copy.type = "button";
  copy.dataset.copy = text;
  copy.setAttribute("aria-label", "Copy code");
  const code = el("pre", "", el("code", "", text));
  code.tabIndex = 0;
  return el("figure", "code-block", el("figcaption", "", el("span", "", language || "text"), copy), code);
}

function drawList(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const list = el(first[3] ? "ol" : "ul");
  if (first[3] && first[3] !== "1") list.start = Number(first[3]);
  const base = first[1].length;
  const items = [];
  let width = 0;
  for (const line of lines) {
    const item = ITEM.exec(line);
    // An item of this list begins left of where the text of the item before it begins.
    if (item && (items.length === 0 || item[1].length < Math.max(base + 2, Math.min(width, base + 4)))) {
      width = Math.min(item[0].length, item[1].length + 5);
      items.push([line.slice(item[0].length)]);
    } else {
      const indent = line.length - line.trimStart().length;
      items.at(-1).push(line.slice(Math.min(indent, width)));
    }
  }
  const loose = lines.some((line, i) => BLANK.test(line) && i < lines.length - 1);
  for (const parts of items) {
    const node = el("li");
    const task = /^\[([ xX])\][ \t]+/.exec(parts[0]);
    if (task) {
      parts[0] = parts[0].slice(task[0].length);
      const box = el("input");
      box.type = "checkbox";
      box.disabled = true;
      box.checked = task[1] !== " ";
      node.className = "task";
      node.append(box);
    }
    drawInner(node, parts, depth);
    if (!loose) for (const p of [...node.children]) if (p.tagName === "P") p.replaceWith(...p.childNodes);
    list.append(node);
  }
  return list;
}

function cells(line) {
  const found = [];
  let cell = "";
  let code = false;
  const row = line.trim().replace(/^\|/, "");
  for (let i = 0; i < row.length; i++) {
    if (row[i] === "\\" && row[i + 1] === "|") cell += row[++i];
    else if (row[i] === "|" && !code) {
      found.push(cell.trim());
      cell = "";
    } else {
      if (row[i] === "`") code = !code && row.indexOf("`", i + 1) > 0;
      cell += row[i];
    }
  }
  if (cell.trim()) found.push(cell.trim());
  return found;
}

function drawTable(lines, depth) {
  const [head, divider, ...rows] = lines.map(cells);
  const side = divider.map((d) => (d.endsWith(":") ? (d.startsWith(":") ? "center" : "right") : "left"));
  const kindOf = (text, i) => `at-${side[i] ?? "left"}${text.length > LONG_CELL ? " long" : ""}`;
  const row = (kind, texts) => el("tr", "", ...head.map((_, i) => inline(el(kind, kindOf(texts[i] ?? "", i)), texts[i] ?? "", depth)));
  const table = el("table", "", el("thead", "", row("th", head)), el("tbody", "", ...rows.map((texts) => row("td", texts))));
  const scroll = el("div", "table", table);
  scroll.tabIndex = 0;
  return scroll;
}

/** Appends the inline form of `text` to `node`. */
function inline(node, text, depth) {
  for (const item of depth >= DEPTH ? [text] : pairMarks(inlineItems(text, depth))) node.append(item);
  return node;
}

/** `text` as strings, nodes and runs of emphasis marks `{mark, count, canOpen, canClose}`. */
function inlineItems(text, depth) {
  const brackets = matchBrackets(text);
  const unclosed = new Set(); // runs of backticks, and openings of formulas, that nothing further on closes
  const items = [];
  let plain = "";
  let at = 0;
  const put = (item, end) => {
    if (plain) items.push(plain);
    plain = "";
    items.push(item);
    at = end;
  };
  while (at < text.length) {
    const char = text[at];
    const math = char === "$" || char === "\\" ? mathAt(text, at, unclosed) : null;
    if (math) {
      put(el("code", "math", math.trim()), at + math.length);
      continue;
    }
    if (char === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    if (char === "\n") {
      plain = plain.replace(/[ \\]+$/, "");
      put(el("br"), at + 1); // as chats do: a new line is a new line
      continue;
    }
    if (char === "`") {
      const run = runAt(text, at);
      const end = unclosed.has(run.length) ? -1 : closingTicks(text, at + run.length, run);
      if (end >= 0) {
        const code = text.slice(at + run.length, end).replace(/\n/g, " ");
        put(el("code", "", /^ .* $/.test(code) && code.trim() ? code.slice(1, -1) : code), end + run.length);
        continue;
      }
      unclosed.add(run.length);
      plain += run;
      at += run.length;
      continue;
    }
    if (char === "*" || char === "_" || (char === "~" && text[at + 1] === "~")) {
      const run = runAt(text, at);
      put(marks(text, at, run), at + run.length);
      continue;
    }
    if (char === "[") {
      const link = readLink(text, at, brackets);
      if (link) {
        // A picture is shown as a link: the page loads nothing from elsewhere.
        if (plain.endsWith("!")) plain = plain.slice(0, -1);
        const label = text.slice(at + 1, link.close) || link.address;
        put(anchor(link.address, (a) => inline(a, label, depth + 1)), link.end);
        continue;
      }
    }
    if (char === "h" && /^https?:\/\//.test(text.slice(at, at + 8)) && !/\w/.test(text[at - 1] ?? "")) {
      const address = /^[^\s<>"`]*/.exec(text.slice(at, at + 2000))[0].replace(/[.,;:!?'*_~)\]]+$/, "");
      put(anchor(address, (a) => a.append(address)), at + address.length);
      continue;
    }
    plain += char;
    at++;
  }
  if (plain) items.push(plain);
  return items;
}

const FORMULAS = [["$$", "$$"], ["\\(", "\\)"], ["\\[", "\\]"], ["$", "$"]];

/** The formula that begins here, with its marks: its source is shown, since it must not be read as Markdown. */
function mathAt(text, at, unclosed) {
  const pair = FORMULAS.find(([open]) => text.startsWith(open, at));
  if (!pair || unclosed.has(pair[0])) return null;
  const from = at + pair[0].length;
  const end = text.indexOf(pair[1], from);
  if (end < 0) unclosed.add(pair[0]);
  if (end <= from || end - from > 2000) return null;
  const inside = text.slice(from, end);
  // "$5 or $6" is money.
  if (pair[0] === "$" && (/^\s|\s$|\n/.test(inside) || /\d/.test(text[end + 1] ?? ""))) return null;
  return text.slice(at, end + pair[1].length);
}

function runAt(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end++;
  return text.slice(at, end);
}

function closingTicks(text, from, run) {
  let at = text.indexOf(run, from);
  while (at >= 0) {
    const found = runAt(text, at);
    if (found.length === run.length) return at;
    at = text.indexOf(run, at + found.length);
  }
  return -1;
}

const isSpace = (char) => char === undefined || /\s/.test(char);
// ASCII only: by CommonMark's wider rule `**重点：**内容` would not be bold.
const isPunctuation = (char) => char !== undefined && /[!-/:-@[-`{-~]/.test(char);

function marks(text, at, run) {
  const before = text[at - 1];
  const after = text[at + run.length];
  const left = !isSpace(after) && (!isPunctuation(after) || isSpace(before) || isPunctuation(before));
  const right = !isSpace(before) && (!isPunctuation(before) || isSpace(after) || isPunctuation(after));
  const word = run[0] === "_"; // snake_case is not emphasis
  const canOpen = left && (!word || !right || isPunctuation(before));
  const canClose = right && (!word || !left || isPunctuation(after));
  return { mark: run[0], count: run.length, canOpen, canClose };
}

/** Pairs runs of marks, nearest first; what stays unpaired is text again. */
function pairMarks(items) {
  const out = [];
  const open = []; // places in `out` of runs that may still open
  const floor = { "*": 0, _: 0, "~": 0 }; // below these heights of `open` there is no run of that mark
  let tooDeep = false;
  for (const item of items) {
    if (!item.mark) {
      out.push(item);
      continue;
    }
    while (item.canClose && item.count && !tooDeep) {
      let height = open.length - 1;
      while (height >= floor[item.mark] && out[open[height]].mark !== item.mark) height--;
      if (height < floor[item.mark]) {
        floor[item.mark] = open.length;
        break;
      }
      const opener = out[open[height]];
      const inner = out.splice(open[height] + 1);
      const size = item.mark === "~" ? Math.min(opener.count, item.count) : Math.min(opener.count, item.count, 2);
      opener.count -= size;
      item.count -= size;
      if (!opener.count) out.pop();
      const node = emphasis(item.mark, size, inner);
      tooDeep = node.nested >= DEPTH;
      out.push(node);
      open.length = opener.count ? height + 1 : height;
      for (const mark of Object.keys(floor)) floor[mark] = Math.min(floor[mark], open.length);
    }
    if (item.count) {
      if (item.canOpen) open.push(out.length);
      out.push(item);
    }
  }
  return out.map(asText);
}

function asText(item) {
  return item.mark ? item.mark.repeat(item.count) : item;
}

function emphasis(mark, size, inner) {
  const node = el(mark === "~" ? "del" : size === 2 ? "strong" : "em");
  node.nested = 1;
  for (const item of inner) {
    node.append(asText(item));
    node.nested = Math.max(node.nested, (item.nested ?? 0) + 1);
  }
  return node;
}

/** For every `[` the place of its `]`, in one pass. */
function matchBrackets(text) {
  const pairs = new Map();
  const open = [];
  if (!text.includes("](")) return pairs;
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === "[") open.push(i);
    else if (text[i] === "]" && open.length) pairs.set(open.pop(), i);
  }
  return pairs;
}

function readLink(text, open, brackets) {
  const close = brackets.get(open);
  if (close === undefined || text[close + 1] !== "(") return null;
  const found = /^\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+"[^"]*")?\s*\)/.exec(text.slice(close + 1, close + 2001));
  return found && found[1] ? { close, address: found[1], end: close + 1 + found[0].length } : null;
}

function anchor(address, fill) {
  const safe = /^(?:https?:\/\/|mailto:)/i.test(address);
  const node = el(safe ? "a" : "span", safe ? "" : "dead-link");
  node.title = address;
  if (safe) {
    node.href = address;
    node.target = "_blank";
    node.rel = "noopener noreferrer nofollow";
  }
  fill(node);
  return node;
}
