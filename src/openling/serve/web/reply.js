// One reply: what is sent, how its chunks become a message, and how fast it came.

import { streamChat } from "./api.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"];
NUMBERS.push("seed", "max_tokens");

/** The tools of the settings; throws an Error whose message says what is wrong. */
export function readTools(text) {
  if (!text?.trim()) return null;
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new Error(`The tools are not JSON: ${error.message}`);
  }
  if (!Array.isArray(tools) || !tools.every((tool) => tool?.type === "function" && tool.function?.name)) {
    throw new Error('The tools must be a list of {"type": "function", "function": {"name": …}}.');
  }
  return tools.length ? tools : null;
}

/** The body of a request for the next reply. */
export function requestBody(model, messages, settings) {
  const body = { model, messages: [] };
  if (settings.system?.trim()) body.messages.push({ role: "system", content: settings.system });
  body.messages.push(...messages.filter((m) => m.role !== "assistant" || m.content || m.calls?.length).map(wire));
  for (const name of NUMBERS) if (Number.isFinite(settings[name])) body[name] = settings[name];
  const tools = readTools(settings.tools);
  if (tools) body.tools = tools;
  // Templates differ in what they read: a switch, an effort, or nothing. "xhigh" is not among OpenAI's values.
  body.chat_template_kwargs = { enable_thinking: settings.effort !== "none" };
  if (settings.effort === "high") body.reasoning_effort = "high";
  else if (settings.effort === "xhigh") body.chat_template_kwargs.reasoning_effort = "xhigh";
  return body;
}

function wire(message) {
  if (message.role === "tool") return { role: "tool", tool_call_id: message.id, content: message.content };
  if (message.role === "user") return { role: "user", content: message.content };
  const sent = { role: "assistant", content: message.content };
  if (message.thinking) sent.reasoning_content = message.thinking;
  if (message.calls?.length) {
    sent.tool_calls = message.calls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
  }
  return sent;
}

export function newReply() {
  return { role: "assistant", content: "", thinking: "", calls: [], stats: null, finish: null, problem: null };
}

/** Streams a reply into `message`, calling `changed` after each chunk. Throws what `streamChat` throws. */
export async function stream(message, body, key, signal, changed) {
  const clock = { sent: performance.now(), first: null, thought: null, last: null };
  let pieces = 0;
  let usage = null;
  for await (const chunk of streamChat(body, key, signal)) {
    usage = chunk.usage ?? usage;
    const choice = chunk.choices?.[0];
    if (choice && add(message, choice.delta ?? {})) {
      clock.last = performance.now();
      clock.first ??= clock.last;
      if (message.content || message.calls.length) clock.thought ??= clock.last;
      pieces += 1;
    }
    if (choice?.finish_reason) message.finish = choice.finish_reason;
    message.stats = stats(clock, usage, pieces);
    changed();
  }
}

/** Whether the delta held anything of the reply. */
function add(message, delta) {
  const thinking = delta.reasoning_content ?? delta.reasoning ?? "";
  message.thinking += thinking;
  message.content += delta.content ?? "";
  for (const part of delta.tool_calls ?? []) {
    const call = (message.calls[part.index ?? message.calls.length] ??= { id: "", name: "", arguments: "" });
    call.id ||= part.id ?? "";
    call.name ||= part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
  return Boolean(thinking || delta.content || delta.tool_calls?.length);
}

/** Seconds and tokens. `exact` is false while the server has not counted and pieces stand in for tokens. */
function stats({ sent, first, thought, last }, usage, pieces) {
  const tokens = usage?.completion_tokens ?? pieces;
  const spent = (last - first) / 1000;
  return {
    tokens,
    exact: Boolean(usage),
    prompt: usage?.prompt_tokens ?? null,
    cached: usage?.prompt_tokens_details?.cached_tokens ?? 0,
    first: first === null ? null : (first - sent) / 1000,
    thought: first === null ? null : ((thought ?? last) - first) / 1000,
    // The first token's time is TTFT; the rate is of those after it.
    rate: tokens > 1 && spent > 0 ? (tokens - 1) / spent : null,
  };
}
