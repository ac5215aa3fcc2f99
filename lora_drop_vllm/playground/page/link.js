// Settings of the form, and the same in the address behind "#", which browsers send to nobody.

const NUMBERS = ["k", "temperature", "top_p", "max_tokens", "seed"];
const CHOICES = ["plain", "side"];

const field = (name) => document.getElementById(name);

export function read() {
  const settings = {};
  for (const name of NUMBERS) settings[name] = Number(field(name).value);
  for (const name of CHOICES) settings[name] = field(name).checked;
  return settings;
}

export function linkTo(prompt) {
  const given = new URLSearchParams({ prompt });
  for (const name of NUMBERS) given.set(name, field(name).value);
  for (const name of CHOICES) if (field(name).checked) given.set(name, "1");
  const address = new URL(location.href);
  address.hash = given.toString();
  return address.href;
}

export function restore() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (given.has("prompt")) field("prompt").value = given.get("prompt");
  for (const name of NUMBERS) {
    const value = given.get(name);
    if (value !== null && value !== "" && Number.isFinite(Number(value))) field(name).value = value;
  }
  for (const name of CHOICES) field(name).checked = given.get(name) === "1";
}
