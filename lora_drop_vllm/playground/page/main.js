// The form: asks both columns, one after the other or together, and stops them.

import { Column } from "./column.js";
import { linkTo, read, restore } from "./link.js";
import { code, Refused, served } from "./requests.js";

const EXAMPLES = [
  "Explain what a computer program is.",
  "Write a short story about a lighthouse.",
  "What is the difference between weather and climate?",
];

const field = (id) => document.getElementById(id);
const prompt = field("prompt");
const base = new Column(field("base"), "the base model");
const lora = new Column(field("lora"), "LoRA-Drop");
const columns = [base, lora];
let running = null; // what stops the answers
let lastPrompt = "";

function say(text) {
  field("status").textContent = text;
}

async function start() {
  const model = await served();
  const facts = [
    model.title,
    model.adapter || "untrained",
    `${model.drop_layers.length} of ${model.num_layers} layers drop` +
      (model.attention_only.length ? `, ${model.attention_only.length} only their attention` : ""),
    `k up to ${model.k}`,
    `KV: ${model.kv}`,
  ];
  for (const fact of facts) {
    const item = document.createElement("li");
    item.textContent = fact;
    field("served").append(item);
  }
  field("k").max = model.k;
  field("k").value = model.k;
  field("max_tokens").max = model.max_len;
  for (const example of EXAMPLES) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = example;
    button.addEventListener("click", () => {
      prompt.value = example;
      prompt.focus();
    });
    field("examples").append(button);
  }
  restore();
  showSettings();
}

function showSettings() {
  field("k-value").textContent = field("k").value;
  field("side-note").hidden = !field("side").checked;
}

function setRunning(stopping) {
  running = stopping;
  field("run").disabled = stopping !== null;
  field("stop").disabled = stopping === null;
  field("new").disabled = stopping !== null || !columns.some((column) => column.started);
}

async function run() {
  if (running || !prompt.value) return prompt.focus();
  const { side, ...settings } = read();
  lastPrompt = prompt.value;
  history.replaceState(null, "", linkTo(lastPrompt));
  const stopping = new AbortController();
  setRunning(stopping);
  field("examples").hidden = true;
  say("Asking.");
  columns.forEach((column) => column.ask(lastPrompt));
  try {
    const asked = [
      () => base.stream({ ...settings, k: 0 }, stopping.signal),
      () => lora.stream(settings, stopping.signal),
    ];
    const answered = side ? await Promise.all(asked.map((ask) => ask())) : [];
    if (!side) for (const ask of asked) answered.push(await ask());
    for (const column of columns) await column.score();
    lora.compare(base);
    const kept = answered.every(Boolean);
    columns.forEach((column) => column.settle(kept));
    if (kept && !stopping.signal.aborted) prompt.value = "";
    say(spoken(kept));
  } finally {
    setRunning(null);
  }
}

function spoken(kept) {
  if (!kept) return "No answer of both.";
  const { tokens, lora: skipped } = lora.summary;
  return `Both have answered. LoRA-Drop: ${tokens} tokens, ${skipped} of them by LoRA steps.`;
}

// What the form would send to the LoRA-Drop column now.
function question() {
  const { side, ...settings } = read();
  const content = prompt.value || lastPrompt || EXAMPLES[0];
  return { ...settings, messages: [...lora.messages, { role: "user", content }] };
}

function offer(title, text) {
  field("code-title").textContent = title;
  field("code").querySelector("pre").textContent = text;
  field("copy").textContent = "Copy";
  field("code").showModal();
  field("copy").focus();
}

async function offerCode(name, title) {
  try {
    offer(title, (await code(question()))[name]);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    offer("This cannot be asked", error.message);
  }
}

field("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    run();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !field("code").open) running.abort();
});
field("stop").addEventListener("click", () => running?.abort());
field("new").addEventListener("click", () => {
  columns.forEach((column) => column.reset());
  field("examples").hidden = false;
  field("new").disabled = true;
  prompt.focus();
});
field("ask").addEventListener("input", showSettings);
field("curl").addEventListener("click", () => offerCode("curl", "As curl"));
field("python").addEventListener("click", () => offerCode("python", "As Python"));
field("link").addEventListener("click", () =>
  offer("Link with these settings", linkTo(prompt.value || lastPrompt)),
);
field("copy").addEventListener("click", async () => {
  const text = field("code").querySelector("pre");
  try {
    await navigator.clipboard.writeText(text.textContent);
    field("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(text); // not allowed here: select it for the reader
  }
});

await start();
