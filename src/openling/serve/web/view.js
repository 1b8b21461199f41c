// Messages on the screen: what the user wrote, what the model thought, wrote and called, and how fast.

import { button, copy, fitHeight, h } from "./dom.js";
import { renderMarkdown } from "./markdown.js";

const integer = new Intl.NumberFormat("en-US");

/** An <li> for a message, with `update(running)` to draw it again. `actions`: edit, retry, answer, askKey. */
export function messageView(message, actions) {
  if (message.role === "user") return userView(message, actions);
  if (message.role === "tool") return toolResultView(message);
  return replyView(message, actions);
}

function userView(message, actions) {
  const text = h("div", { class: "bubble" }, message.content);
  const tools = h("div", { class: "actions" });
  const node = h("li", { class: "message user" }, h("h2", { class: "hidden" }, "You"), text, tools);
  tools.append(button("copy", "Copy", (e) => copy(message.content, e.currentTarget)), button("edit", "Edit", () => startEdit()));
  node.update = () => {};

  function startEdit() {
    const area = h("textarea", { class: "edit", value: message.content, aria: { label: "Edit message" } });
    const done = () => form.replaceWith(text, tools);
    const send = () => area.value.trim() && (done(), actions.edit(area.value.trim()));
    const row = h("div", { class: "edit-actions" });
    const form = h("div", { class: "editing" }, area, row);
    row.append(button("close", "Cancel", done, { shown: true }), button("send", "Send", send, { shown: true, kind: "primary" }));
    area.addEventListener("input", () => fitHeight(area));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        done();
        tools.lastChild.focus();
      }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    tools.remove();
    text.replaceWith(form);
    fitHeight(area);
    area.focus();
  }
  return node;
}

function toolResultView(message) {
  const body = h("pre", { class: "tool-text" }, message.content);
  const node = h("li", { class: "message tool" }, h("details", {}, h("summary", {}, `Result of ${message.name || "a tool"}`), body));
  node.update = () => {};
  return node;
}

function replyView(message, actions) {
  const thinking = h("div", { class: "md" });
  const summary = h("summary", {});
  const thought = h("details", { class: "thinking", hidden: true }, summary, thinking);
  const waiting = h("div", { class: "waiting", aria: { label: "Waiting for the first token" } }, ...bars());
  const text = h("div", { class: "md reply" });
  const calls = h("div", { class: "calls" });
  const problem = h("div", { class: "problem", hidden: true });
  const stats = h("p", { class: "stats" });
  const copyButton = button("copy", "Copy reply", (e) => copy(message.content, e.currentTarget));
  const retryButton = button("retry", "Try again", () => actions.retry());
  const tools = h("div", { class: "actions" }, copyButton, retryButton);
  const foot = h("div", { class: "foot" }, tools, stats);
  const node = h("li", { class: "message reply" }, h("h2", { class: "hidden" }, "Model"), thought, waiting, text, calls, problem, foot);

  node.update = (running) => {
    node.classList.toggle("running", running);
    node.setAttribute("aria-busy", String(running));
    thought.hidden = !message.thinking;
    summary.textContent = thinkingTitle(message, running);
    thought.classList.toggle("live", running && !message.content && !message.calls.length);
    if (thought.open) renderMarkdown(thinking, message.thinking);
    waiting.hidden = !running || Boolean(message.thinking || message.content || message.calls.length);
    renderMarkdown(text, message.content);
    drawCalls(calls, message, running, actions);
    drawProblem(problem, message, running, actions);
    foot.hidden = running && !message.stats?.first;
    tools.hidden = running;
    copyButton.hidden = !message.content;
    retryButton.hidden = Boolean(message.problem); // it stands beside the problem then
    stats.textContent = statsLine(message);
  };
  // Closed, its text need not be drawn at every token.
  thought.addEventListener("toggle", () => thought.open && renderMarkdown(thinking, message.thinking));
  return node;
}

/** Eight bars, as the model's layers: seven light ones and one that is not. */
function bars() {
  return Array.from({ length: 8 }, () => h("i"));
}

function thinkingTitle(message, running) {
  const seconds = message.stats?.thought;
  const time = seconds ? ` ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s` : "";
  const live = running && !message.content && !message.calls.length;
  return live ? `Thinking…${time}` : `Thought${time ? ` for${time}` : ""}`;
}

function statsLine({ stats, finish }) {
  if (!stats || stats.first === null) return "";
  const parts = [`${stats.exact ? "" : "about "}${integer.format(stats.tokens)} ${stats.tokens === 1 ? "token" : "tokens"}`];
  if (stats.rate) parts.push(`${stats.rate < 100 ? stats.rate.toFixed(1) : integer.format(Math.round(stats.rate))} tokens/s`);
  parts.push(`first token ${stats.first < 10 ? stats.first.toFixed(2) : Math.round(stats.first)} s`);
  if (stats.prompt !== null) {
    const cached = stats.cached ? ` (${integer.format(stats.cached)} cached)` : "";
    parts.push(`prompt ${integer.format(stats.prompt)}${cached}`);
  }
  if (finish === "length") parts.push("stopped at the token limit");
  return parts.join(" · ");
}

function drawCalls(box, message, running, actions) {
  while (box.childElementCount > message.calls.length) box.lastChild.remove();
  message.calls.forEach((call, i) => {
    const card = box.children[i]?.matches(".call") ? box.children[i] : callCard(box);
    card.name.textContent = call.name || "…";
    const pretty = prettyJson(call.arguments);
    if (card.text.textContent !== pretty) card.text.textContent = pretty;
    const ask = !running && !message.answered && message.finish !== null;
    if (ask && !card.answer) {
      card.answer = h("textarea", { class: "answer", rows: 2, placeholder: "Result for the model", aria: { label: `Result of ${call.name}` } });
      card.append(card.answer);
    } else if (!ask && card.answer) {
      card.answer.remove();
      card.answer = null;
    }
  });
  const cards = [...box.querySelectorAll(".call")];
  if (cards.some((card) => card.answer) && !box.querySelector(".send-results")) {
    const send = () => actions.answer(cards.map((card) => card.answer.value));
    const give = button("send", cards.length > 1 ? "Give results" : "Give result", send, { shown: true, kind: "primary" });
    give.classList.add("send-results");
    box.append(give);
  }
}

function callCard(box) {
  const name = h("code", { class: "call-name" });
  const text = h("pre", { class: "tool-text", tabIndex: 0 });
  const card = h("section", { class: "call", aria: { label: "Tool call" } }, h("header", {}, h("span", {}, "calls"), name), text);
  Object.assign(card, { name, text });
  box.append(card);
  return card;
}

function prettyJson(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // still arriving
  }
}

function drawProblem(box, message, running, actions) {
  box.hidden = running || !message.problem;
  if (box.hidden) {
    box.replaceChildren();
    return;
  }
  if (box.firstChild) return;
  const { kind, text } = message.problem;
  box.classList.toggle("quiet", kind === "stopped" || kind === "empty");
  box.append(h("p", {}, text));
  if (kind === "key") box.append(button("settings", "Enter the key", actions.askKey, { shown: true }));
  box.append(button("retry", "Try again", actions.retry, { shown: true }));
}
