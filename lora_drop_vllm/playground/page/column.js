// One side: its own conversation with the server, and the figures of the last answer.

import { percent } from "./card.js";
import { answer, Refused, score } from "./requests.js";
import { Strip } from "./strip.js";
import { Turn } from "./turn.js";

export class Column {
  constructor(root, name) {
    this.root = root;
    this.name = name;
    root.append(document.getElementById("column").content.cloneNode(true));
    this.conversation = root.querySelector(".conversation");
    this.strip = new Strip(root.querySelector(".strip"));
    this.strip.onPoint = (token) => this.turn?.pointAtToken(token);
    this.reset();
  }

  get started() {
    return this.conversation.hasChildNodes();
  }

  reset() {
    this.messages = [];
    this.conversation.replaceChildren();
    this.clear();
  }

  clear() {
    this.turn = null;
    this.summary = null;
    this.strip.clear();
    this.root.querySelectorAll("[data-figure]").forEach((figure) => figure.replaceChildren("–"));
  }

  // A new turn without an answer yet.
  ask(prompt) {
    this.clear();
    const turn = new Turn(prompt, this.name, (token) => {
      if (turn === this.turn) this.strip.mark(token);
    });
    this.turn = turn;
    this.conversation.append(turn.root);
    turn.root.scrollIntoView({ block: "nearest" });
  }

  // Whether the answer has any token, however it ended.
  async stream(settings, signal) {
    const { turn } = this;
    const ask = { ...settings, messages: [...this.messages, { role: "user", content: turn.prompt }] };
    try {
      for await (const event of answer(ask, signal)) {
        if (event.counted) this.count(event);
        else this.take(event);
      }
    } catch (error) {
      if (error.name === "AbortError") turn.say("state", "Stopped.");
      else if (error instanceof Refused) turn.say("error", error.message, "alert");
      else throw error;
    }
    turn.end();
    return this.summary !== null && this.summary.tokens > 0;
  }

  take(event) {
    const { summary } = event;
    this.summary = summary;
    this.turn.take(event);
    if (event.ids.length && event.ms !== null) {
      const [ms, first] = [event.ms / event.ids.length, summary.tokens - event.ids.length];
      const bars = event.ids.map((_, n) => ({ ms, kind: event.kinds[n], token: first + n }));
      this.strip.add(bars, summary.p95_ms);
    }
    const number = (value) => (value === null ? "–" : value.toFixed(1));
    this.set("per_second", number(summary.per_second));
    this.set("p50_ms", number(summary.p50_ms), "ms");
    this.set("p95_ms", number(summary.p95_ms), "ms");
    this.set("kv", String(summary.kv_written), `of ${summary.kv_stock}`);
    this.share(summary);
    if (event.reason) this.strip.describe(summary);
  }

  share({ lora, full }) {
    this.set("share", percent(lora / Math.max(lora + full, 1)), `${lora} of ${lora + full}`);
  }

  // What the server counted at /metrics from before the answer to its end.
  count({ counted, since_start }) {
    this.share(counted);
    const all = since_start.lora + since_start.full;
    this.figure("share").title =
      `As counted by the server at /metrics. Since its start: ${since_start.lora} of ${all}.`;
  }

  async score() {
    const { turn } = this;
    if (!turn.groups.length) return;
    const ids = turn.groups.flatMap((group) => group.ids);
    try {
      const scores = await score({ prompt_ids: turn.promptIds, ids });
      turn.judge(scores.opinions);
      this.set("agreement", percent(scores.agreement));
      this.set("mean_logprob", scores.mean_logprob.toFixed(3));
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      turn.say("state", `Not scored by the base model: ${error.message}`);
    }
  }

  // Keep the turn as part of the conversation, or show that it is none.
  settle(kept) {
    const { turn } = this;
    turn.root.classList.toggle("dropped", !kept);
    if (!kept) return;
    this.messages.push({ role: "user", content: turn.prompt });
    this.messages.push({ role: "assistant", content: turn.text });
  }

  // How many times as fast as the other column.
  compare(other) {
    const [mine, theirs] = [this.summary?.per_second, other.summary?.per_second];
    if (!mine || !theirs) return;
    const ratio = document.createElement("span");
    ratio.className = "ratio";
    ratio.textContent = `${(mine / theirs).toFixed(2)}×`;
    ratio.title = `of the tokens per second of ${other.name}`;
    this.figure("per_second").append(" ", ratio);
  }

  figure(name) {
    return this.root.querySelector(`[data-figure="${name}"]`);
  }

  set(name, value, more) {
    const parts = [value];
    if (more) {
      const small = document.createElement("small");
      small.textContent = more;
      parts.push(" ", small);
    }
    this.figure(name).replaceChildren(...parts);
  }
}
