// A prompt and its answer: one span a token, tinted by the kind of its step.

import { hide, inWords, show } from "./card.js";

function element(className, text) {
  const made = document.createElement("div");
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export class Turn {
  // `onPoint` is told which token the reader points at, by its number, or null.
  constructor(prompt, name, onPoint) {
    this.prompt = prompt;
    this.onPoint = onPoint;
    this.groups = []; // { start, text, ids, kinds, opinions, span }: mostly one token each
    this.open = null; // a group that waits for its text
    this.promptIds = [];
    this.current = -1;
    this.root = element("turn waiting");
    this.box = element("answer");
    this.box.tabIndex = 0;
    this.box.setAttribute("role", "group");
    this.box.setAttribute("aria-label", `Answer of ${name}; arrow keys go from token to token`);
    this.root.append(element("asked", prompt), this.box);
    this.listen();
  }

  get text() {
    return this.groups.map((group) => group.text).join("");
  }

  take(event) {
    if (event.prompt_ids) this.promptIds = event.prompt_ids;
    const start = event.summary.tokens - event.ids.length;
    this.open ??= { start, text: "", ids: [], kinds: "" };
    this.open.ids.push(...event.ids);
    this.open.kinds += event.kinds;
    if (event.text) this.close(event.text); // a part of a character waits for the rest
    if (event.reason === "length") this.say("state", "Ends here: as many tokens as asked for.");
  }

  end() {
    if (this.open) this.close("");
    this.root.classList.remove("waiting");
  }

  close(text) {
    const group = { ...this.open, text };
    this.open = null;
    if (group.ids.length) this.append(group);
    else this.box.append(text); // text without a token of its own
  }

  append(group) {
    const span = document.createElement("span");
    span.className = "token";
    span.classList.toggle("lora", group.kinds.includes("L"));
    span.classList.toggle("end", group.text === "");
    span.classList.toggle("unlikely", group.opinions?.some((o) => o.unlikely) ?? false);
    span.dataset.kinds = group.kinds;
    span.dataset.start = group.start;
    span.textContent = group.text || "end";
    this.box.append(span);
    this.groups.push({ ...group, span });
  }

  // The answer once more, with the base model's opinion of each token.
  judge(opinions) {
    const groups = this.groups;
    this.groups = [];
    this.box.replaceChildren();
    for (const group of groups) {
      const of_group = opinions.slice(group.start, group.start + group.ids.length);
      split({ ...group, opinions: of_group }).forEach((part) => this.append(part));
    }
  }

  say(className, text, role) {
    const line = document.createElement("p");
    line.className = className;
    if (role) line.setAttribute("role", role);
    line.textContent = text;
    this.root.append(line);
  }

  // pointer and arrow keys
  listen() {
    const { box } = this;
    box.addEventListener("pointerover", (event) => {
      const number = this.groups.findIndex((group) => group.span === event.target);
      if (number >= 0) this.pointAt(number);
    });
    box.addEventListener("pointerleave", () => this.pointAt(-1));
    box.addEventListener("blur", () => this.pointAt(-1));
    box.addEventListener("keydown", (event) => {
      const last = this.groups.length - 1;
      const to = { ArrowRight: this.current + 1, ArrowLeft: this.current - 1, Home: 0, End: last };
      if (event.key === "Escape") this.pointAt(-1);
      if (!(event.key in to) || last < 0) return;
      event.preventDefault();
      this.pointAt(Math.max(0, Math.min(last, to[event.key])));
      document.getElementById("status").textContent = inWords(this.groups[this.current]);
    });
  }

  // Point at the group that has this token.
  pointAtToken(token) {
    const has = (g) => token !== null && token >= g.start && token < g.start + g.ids.length;
    this.pointAt(this.groups.findIndex(has));
  }

  pointAt(number) {
    this.groups[this.current]?.span.classList.remove("current");
    this.current = number;
    const group = this.groups[number];
    this.onPoint(group ? group.start : null);
    if (!group) return hide();
    group.span.classList.add("current");
    show(group, group.span);
  }
}

// Tokens that came in one piece, each by itself where their texts add up to that of the piece.
function split(group) {
  const texts = group.opinions.map((opinion) => opinion.text);
  if (texts.length < 2 || texts.length < group.ids.length || texts.join("") !== group.text) {
    return [group];
  }
  return texts.map((text, n) => ({
    start: group.start + n,
    text,
    ids: [group.ids[n]],
    kinds: group.kinds[n],
    opinions: [group.opinions[n]],
  }));
}
