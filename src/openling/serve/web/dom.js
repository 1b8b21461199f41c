// Small helpers for building nodes. Strings become text nodes, never markup.

/** An element with properties and children; `class`, `data` and `aria` are spelled as such. */
export function h(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") node.className = value;
    else if (key === "data") Object.assign(node.dataset, value);
    else if (key === "aria") for (const [a, v] of Object.entries(value)) node.setAttribute(`aria-${a}`, v);
    else node[key] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** A drawing of the page's sprite. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon; `label` is its name, and its text where `shown`. */
export function button(name, label, click, { shown = false, kind = "ghost" } = {}) {
  const node = h("button", { type: "button", class: kind, title: shown ? "" : label }, icon(name));
  if (shown) node.append(h("span", {}, label));
  else node.setAttribute("aria-label", label);
  node.addEventListener("click", click);
  return node;
}

/** Copies text; says so on the button for a moment. */
export async function copy(text, node) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyBySelection(text); // the clipboard's interface is for HTTPS and localhost only
  }
  node.classList.add("done");
  setTimeout(() => node.classList.remove("done"), 1400);
}

function copyBySelection(text) {
  const area = h("textarea", { class: "hidden", value: text });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** Makes a text field as high as its text. */
export function fitHeight(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}
