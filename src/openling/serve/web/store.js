// What the page remembers: conversations and settings in localStorage, the key in sessionStorage. Works without either.

const CHAT = "openling.chat.";
const SETTINGS = "openling.settings";
const KEY = "openling.key";

function get(storage, name) {
  try {
    return window[storage].getItem(name);
  } catch {
    return null; // storage is blocked
  }
}

/** Whether `value` was stored; null removes. */
function set(storage, name, value) {
  try {
    if (value === null) window[storage].removeItem(name);
    else window[storage].setItem(name, value);
    return true;
  } catch {
    return false; // storage is blocked or full
  }
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** All conversations, the last used first. Entries that are not ours or are damaged are left alone. */
export function loadChats() {
  const names = [];
  try {
    for (let i = 0; i < localStorage.length; i++) names.push(localStorage.key(i));
  } catch {
    return [];
  }
  const chats = names.filter((name) => name.startsWith(CHAT)).map((name) => parse(get("localStorage", name)));
  return chats.filter((chat) => chat?.id && Array.isArray(chat.messages)).sort((a, b) => b.used - a.used);
}

export function newChat() {
  return { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, title: "", used: Date.now(), messages: [] };
}

/** False when the browser's storage is full or blocked. */
export function saveChat(chat) {
  return set("localStorage", CHAT + chat.id, JSON.stringify(chat));
}

export function removeChat(chat) {
  set("localStorage", CHAT + chat.id, null);
}

/** Calls back when another tab changes a conversation. */
export function onOtherTab(changed) {
  window.addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(CHAT)) changed();
  });
}

export function loadSettings() {
  const found = parse(get("localStorage", SETTINGS));
  return { effort: "none", theme: "auto", ...(found && typeof found === "object" ? found : {}) };
}

export function saveSettings(settings) {
  set("localStorage", SETTINGS, JSON.stringify(settings));
}

export const loadKey = () => get("sessionStorage", KEY) ?? "";
export const saveKey = (key) => set("sessionStorage", KEY, key || null);
