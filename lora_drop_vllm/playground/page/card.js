// What the base model thinks of the token under the pointer, or of the one the arrow keys reached.

const card = document.getElementById("card");

export function visible(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";
}

export function percent(share) {
  if (share >= 0.995) return "100 %";
  if (share >= 0.0995) return `${(100 * share).toFixed(0)} %`;
  if (share >= 0.0005) return `${(100 * share).toFixed(1)} %`;
  return share > 0 ? "< 0.1 %" : "0 %";
}

function nth(rank) {
  const ending = { 1: "st", 2: "nd", 3: "rd" }[rank % 100 > 10 && rank % 100 < 14 ? 0 : rank % 10];
  return `${rank}${ending ?? "th"}`;
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function kindOf(kinds) {
  if (!kinds.includes("L")) return "full step: every layer ran";
  return kinds.includes("F") ? "full and LoRA steps" : "LoRA step: layers skipped";
}

// One sentence for screen readers.
export function inWords(group) {
  const opinion = group.opinions?.at(-1);
  const thought = opinion
    ? `the base model gives it ${percent(opinion.probability)}, its ${nth(opinion.rank)} choice`
    : "not scored";
  return `${group.text || "end"}; ${kindOf(group.kinds)}; ${thought}`;
}

export function show(group, near) {
  const parts = [];
  const head = element("p");
  head.append(element("span", "word", visible(group.text)));
  parts.push(head, element("p", group.kinds.includes("L") ? "kind lora" : "kind", kindOf(group.kinds)));
  for (const opinion of group.opinions ?? []) {
    parts.push(
      element("p", "", `base model: ${percent(opinion.probability)}, its ${nth(opinion.rank)} choice`),
    );
    const list = element("ol");
    for (const candidate of opinion.top) {
      const row = element("li", candidate.chosen ? "chosen" : "");
      row.style.setProperty("--share", `${100 * candidate.probability}%`);
      row.append(element("span", "word", visible(candidate.text)));
      row.append(element("span", "", percent(candidate.probability)));
      list.append(row);
    }
    parts.push(list);
  }
  card.replaceChildren(...parts);
  card.hidden = false;
  place(near.getClientRects()[0] ?? near.getBoundingClientRect());
}

function place(box) {
  const [width, height] = [card.offsetWidth, card.offsetHeight];
  const left = Math.min(Math.max(8, box.left), innerWidth - width - 8);
  const below = box.bottom + 8;
  const top = below + height < innerHeight ? below : Math.max(8, box.top - height - 8);
  card.style.left = `${left}px`;
  card.style.top = `${top}px`;
}

export function hide() {
  card.hidden = true;
}
