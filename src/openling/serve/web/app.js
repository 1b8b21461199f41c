// The page: which conversation is open, what is being generated, and what the controls do.

import { ApiError, listModels } from "./api.js";
import { button, copy, fitHeight, h } from "./dom.js";
import { newReply, readTools, requestBody, stream } from "./reply.js";
import * as store from "./store.js";
import { messageView } from "./view.js";

const $ = (id) => document.getElementById(id);
const STARTERS = [
  ["Explain", "Explain how linear attention differs from softmax attention, with one small example."],
  ["Code", "Write a Python function that merges two sorted lists, and three tests for it."],
  ["Compare", "Compare trains, buses and bicycles for a city in a table."],
  ["Think", "A bat and a ball cost 1.10 together. The bat costs 1.00 more than the ball. What does the ball cost?"],
];
const THEMES = { auto: "light", light: "dark", dark: "auto" };

const settings = store.loadSettings();
const runs = new Map(); // conversation id -> AbortController of the reply being made
let key = store.loadKey();
let models = [];
let chats = store.loadChats();
let chat = store.newChat();
let views = [];
let sticky = true; // follow the newest token until the reader scrolls up

// ---------------------------------------------------------------------------------------------------------- conversation

function open(next) {
  chat = next;
  followAgain();
  document.title = chat.title ? `${chat.title} · openling` : "openling";
  drawMessages();
  drawChats();
  closeSidebar();
}

function drawMessages() {
  views = chat.messages.map((message, i) => messageView(message, actionsFor(chat, i)));
  $("messages").replaceChildren(...views);
  $("welcome").hidden = views.length > 0;
  views.forEach((view, i) => view.update(runs.has(chat.id) && i === views.length - 1));
  drawComposer();
  follow();
}

function actionsFor(owner, index) {
  return {
    edit: (text) => replay(owner, index, { role: "user", content: text }),
    retry: () => replay(owner, index),
    answer: (results) => {
      const { calls } = owner.messages[index];
      owner.messages[index].answered = true;
      generate(owner, calls.map((call, i) => ({ role: "tool", id: call.id, name: call.name, content: results[i] })));
    },
    askKey: () => openSettings($("api-key")),
  };
}

/** Drops everything from `index` on and goes on from there, with `message` in its place. */
function replay(owner, index, message = null) {
  runs.get(owner.id)?.abort();
  owner.messages.length = index;
  generate(owner, message ? [message] : []);
}

async function generate(owner, messages) {
  owner.messages.push(...messages);
  owner.title ||= owner.messages[0]?.content.split("\n")[0].slice(0, 80) ?? "";
  owner.used = Date.now();
  chats = [owner, ...chats.filter((other) => other.id !== owner.id)];
  const reply = newReply();
  const controller = new AbortController();
  let body;
  try {
    body = requestBody(currentModel(), owner.messages, settings);
  } catch (error) {
    reply.problem = { kind: "refused", text: error.message };
  }
  owner.messages.push(reply);
  if (body) runs.set(owner.id, controller);
  keep(owner);
  if (owner === chat) open(owner);
  if (!body) return;

  let due = false;
  let saved = performance.now();
  const changed = () => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      if (owner === chat) drawLast(owner, reply);
      if (performance.now() - saved > 2000) {
        saved = performance.now();
        keep(owner);
      }
    });
  };
  try {
    await stream(reply, body, key, controller.signal, changed);
    if (!reply.content && !reply.calls.length) reply.problem = { kind: "empty", text: "The model ended its turn without an answer." };
    setHealth("good", "Connected");
    say(`Reply complete. Tokens: ${reply.stats?.tokens ?? 0}.`);
  } catch (error) {
    fail(reply, error);
  }
  if (runs.get(owner.id) === controller) runs.delete(owner.id);
  keep(owner);
  if (owner === chat && owner.messages.includes(reply)) drawLast(owner, reply);
  drawChats();
  drawComposer();
}

function fail(reply, error) {
  if (error.name === "AbortError") {
    reply.problem = { kind: "stopped", text: "Stopped." };
    say("Stopped.");
    return;
  }
  if (!(error instanceof ApiError)) throw error;
  reply.problem = { kind: error.kind, text: error.message };
  if (error.kind === "offline" || error.kind === "loading") connect();
  say(error.message);
}

function drawLast(owner, reply) {
  views.at(-1)?.update(runs.has(owner.id) && owner.messages.at(-1) === reply);
  drawMeter();
  follow();
}

function keep(owner) {
  if (!chats.includes(owner)) return; // removed meanwhile
  if (!store.saveChat(owner)) notify("This browser's storage is full or blocked: the conversation is not kept.", "warn");
}

function followAgain() {
  sticky = true;
  $("to-end").hidden = true;
}

function follow() {
  const box = $("scroller");
  if (sticky) box.scrollTop = box.scrollHeight;
}

// -------------------------------------------------------------------------------------------------------------- sidebar

function drawChats() {
  const rows = chats.map((each) => {
    const link = h("button", { type: "button", class: "chat", title: each.title }, each.title || "New conversation");
    if (each === chat) link.setAttribute("aria-current", "true");
    link.addEventListener("click", () => open(each));
    const row = h("li", { class: runs.has(each.id) ? "busy" : "" }, link);
    row.append(button("trash", `Delete “${each.title}”`, (event) => askRemove(each, event.currentTarget)));
    return row;
  });
  $("chats").replaceChildren(...rows);
}

function askRemove(each, node) {
  if (node.classList.contains("sure")) {
    runs.get(each.id)?.abort();
    store.removeChat(each);
    chats = chats.filter((other) => other !== each);
    if (each === chat) open(store.newChat());
    else drawChats();
    return;
  }
  node.classList.add("sure");
  node.setAttribute("aria-label", "Delete for good?");
  node.title = "Click again to delete";
  setTimeout(drawChats, 4000);
}

function closeSidebar() {
  document.body.classList.remove("sidebar-open");
  $("scrim").hidden = true;
  $("toggle-sidebar").setAttribute("aria-expanded", "false");
}

// ------------------------------------------------------------------------------------------------------------- composer

function send() {
  const text = $("prompt").value.trim();
  if (!text || runs.has(chat.id)) return;
  $("prompt").value = "";
  fitHeight($("prompt"));
  generate(chat, [{ role: "user", content: text }]);
}

function stop() {
  runs.get(chat.id)?.abort();
}

function drawComposer() {
  const running = runs.has(chat.id);
  const node = $("send");
  node.classList.toggle("stop", running);
  node.setAttribute("aria-label", running ? "Stop" : "Send");
  node.querySelector("use").setAttribute("href", running ? "#i-stop" : "#i-send");
  node.disabled = !running && !$("prompt").value.trim();
  drawMeter();
}

function drawMeter() {
  const stats = chat.messages.findLast((m) => m.stats?.prompt)?.stats;
  const used = stats ? stats.prompt + stats.tokens : 0;
  const most = models.find((m) => m.id === currentModel())?.max_model_len;
  const count = new Intl.NumberFormat("en-US");
  $("meter").textContent = used && most ? `${count.format(used)} of ${count.format(most)} tokens of context used` : "";
  $("meter").classList.toggle("full", Boolean(most) && used > 0.9 * most);
}

// ----------------------------------------------------------------------------------------------------------- connection

let timer = null;

async function connect() {
  clearTimeout(timer);
  try {
    models = await listModels(key);
    setHealth("good", "Connected");
    notify("");
    drawModel();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    setHealth("bad", error.message);
    notify(error.message, error.kind);
    if (error.kind !== "key") timer = setTimeout(connect, 1000 * (error.retryAfter ?? 3));
    drawModel();
  }
}

function currentModel() {
  return models.some((m) => m.id === settings.model) ? settings.model : (models[0]?.id ?? "");
}

function drawModel() {
  const id = currentModel();
  const model = models.find((m) => m.id === id);
  const many = models.length > 1;
  $("model-name").hidden = many;
  $("model-select").hidden = !many;
  $("model-name").textContent = id ? id.split("/").at(-1) : "no model";
  $("model-name").title = id;
  $("model-select").replaceChildren(...models.map((m) => h("option", { value: m.id, selected: m.id === id }, m.id)));
  const context = model?.max_model_len;
  $("context").textContent = context ? `${context >= 8192 ? `${Math.round(context / 1024)}K` : context} context` : "";
  $("welcome-model").textContent = id ? `${id.split("/").at(-1)} is ready.` : "";
  drawMeter();
}

function setHealth(state, text) {
  $("health").className = `dot ${state}`;
  $("health").title = text;
}

/** A line above the message field; empty text removes it. */
function notify(text, kind = "warn") {
  const box = $("notice");
  box.hidden = !text;
  box.replaceChildren(text);
  if (kind === "key" && text) box.append(button("settings", "Enter the key", () => openSettings($("api-key")), { shown: true }));
}

function say(text) {
  $("status").textContent = text;
}

// ------------------------------------------------------------------------------------------------------------- settings

function openSettings(focus = null) {
  $("settings").hidden = false;
  $("toggle-settings").setAttribute("aria-expanded", "true");
  (focus ?? $("close-settings")).focus();
}

function closeSettings() {
  if ($("settings").hidden) return;
  $("settings").hidden = true;
  $("toggle-settings").setAttribute("aria-expanded", "false");
  $("toggle-settings").focus();
}

function drawSettings() {
  for (const field of $("settings-form").elements) if (field.name) field.value = settings[field.name] ?? "";
  $("api-key").value = key;
  for (const radio of $("effort").elements) radio.checked = radio.value === settings.effort;
  document.documentElement.dataset.theme = settings.theme;
  $("theme").title = `Theme: ${settings.theme}`;
  $("theme").setAttribute("aria-label", `Theme: ${settings.theme}. Change to ${THEMES[settings.theme]}.`);
  checkTools();
}

function readSetting(field) {
  if (!field.name) return;
  const value = field.type === "number" ? field.valueAsNumber : field.value;
  field.setAttribute("aria-invalid", String(!field.validity.valid));
  if (!field.validity.valid || value === "" || Number.isNaN(value)) delete settings[field.name];
  else settings[field.name] = value;
  store.saveSettings(settings);
  checkTools();
}

function checkTools() {
  const note = $("tools-problem");
  note.dataset.usual ??= note.textContent;
  let problem = "";
  try {
    readTools(settings.tools);
  } catch (error) {
    problem = error.message;
  }
  note.textContent = problem || note.dataset.usual;
  note.classList.toggle("wrong", Boolean(problem));
}

// ----------------------------------------------------------------------------------------------------------------- wires

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (runs.has(chat.id)) stop();
  else send();
});
$("prompt").addEventListener("input", () => {
  fitHeight($("prompt"));
  drawComposer();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (!$("settings").hidden) closeSettings();
  else if (document.body.classList.contains("sidebar-open")) closeSidebar();
  else stop();
});
document.addEventListener("click", (event) => {
  const source = event.target.closest("[data-copy]");
  if (source) copy(source.dataset.copy, source);
});
$("scroller").addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = $("scroller");
  sticky = scrollHeight - scrollTop - clientHeight < 60;
  $("to-end").hidden = sticky;
});
// The last lines stay in sight when a window turns, a keyboard comes up or the message field grows.
new ResizeObserver(follow).observe($("scroller"));
window.addEventListener("resize", () => fitHeight($("prompt")));
$("to-end").addEventListener("click", () => {
  followAgain();
  follow();
});
$("new-chat").addEventListener("click", () => {
  open(store.newChat());
  $("prompt").focus();
});
$("toggle-sidebar").addEventListener("click", () => {
  document.body.classList.add("sidebar-open");
  $("scrim").hidden = false;
  $("toggle-sidebar").setAttribute("aria-expanded", "true");
  $("new-chat").focus();
});
$("scrim").addEventListener("click", closeSidebar);
$("toggle-settings").addEventListener("click", () => ($("settings").hidden ? openSettings() : closeSettings()));
$("close-settings").addEventListener("click", closeSettings);
$("settings-form").addEventListener("submit", (event) => event.preventDefault());
$("settings-form").addEventListener("input", (event) => readSetting(event.target));
$("api-key").addEventListener("change", () => {
  key = $("api-key").value.trim();
  store.saveKey(key);
  connect();
});
$("reset").addEventListener("click", () => {
  for (const field of $("settings-form").elements) if (field.name) delete settings[field.name];
  store.saveSettings(settings);
  drawSettings();
});
$("effort").addEventListener("change", (event) => {
  settings.effort = event.target.value;
  store.saveSettings(settings);
});
$("theme").addEventListener("click", () => {
  settings.theme = THEMES[settings.theme];
  store.saveSettings(settings);
  drawSettings();
});
$("model-select").addEventListener("change", (event) => {
  settings.model = event.target.value;
  store.saveSettings(settings);
  drawModel();
});
store.onOtherTab(() => {
  const running = chats.filter((each) => runs.has(each.id));
  chats = [...running, ...store.loadChats().filter((each) => !runs.has(each.id))];
  const again = chats.find((each) => each.id === chat.id);
  if (again && again !== chat) open(again);
  else drawChats();
});

for (const each of chats) {
  const last = each.messages.at(-1);
  if (last?.role === "assistant" && !last.finish && !last.problem) {
    last.problem = { kind: "offline", text: "The page was closed before the reply was complete." };
  }
}
for (const [title, text] of STARTERS) {
  const start = h("button", { type: "button", class: "starter" }, h("b", {}, title), h("span", {}, text));
  start.addEventListener("click", () => generate(chat, [{ role: "user", content: text }]));
  $("starters").append(h("li", {}, start));
}
drawSettings();
open(chats[0] ?? chat);
connect();
$("prompt").focus();
