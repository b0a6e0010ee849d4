// A new entity: described by a form and files, placed among the known ones, and asked about.

import { get, post } from "./api.js";
import { row } from "./entity.js";
import { bar, h, number, percent, picture, put, say, words } from "./dom.js";

const LABEL = /^(label|name|title)$/i;  // a text column of this name is the name field
let chosen = {};

export async function showNew(context) {
  const { bundle, main, values, alive } = context;
  const form = await get("new", { bundle: bundle.name });
  if (!alive()) return;
  document.title = `New entity · ${bundle.name} · mocme`;
  if (context.main.querySelector(`[data-new="${CSS.escape(bundle.name)}"]`)) return again(context);
  chosen = {};
  const given = Object.fromEntries(values);
  const labels = form.text.length > 1 ? form.text.filter((column) => LABEL.test(column)) : [];
  const message = h("p", { class: "wrong", role: "alert" });
  const result = h("section", { class: "answers", id: "placed" });
  const fields = h("form", { class: "panel", "data-new": bundle.name, "data-labels": JSON.stringify(labels), novalidate: true },
    entry("name", "Name", h("input", { id: "new-name", name: "name", value: given.name || "", maxlength: 200, placeholder: "Atlantis" })),
    form.text.filter((column) => !LABEL.test(column) || form.text.length === 1).map((column) => entry(`t.${column}`, words(column), /desc|text|abstract|comment/i.test(column) || form.text.length === 1
      ? h("textarea", { id: `new-t.${column}`, name: `t.${column}`, rows: 3, maxlength: 20000 }, given[`t.${column}`] || "")
      : h("input", { id: `new-t.${column}`, name: `t.${column}`, value: given[`t.${column}`] || "", maxlength: 2000 }))),
    form.numbers.length ? h("fieldset", {}, h("legend", {}, "Numbers"), h("div", { class: "columns" }, form.numbers.slice(0, 12).map((name) =>
      entry(`n.${name}`, words(name), h("input", { id: `new-n.${name}`, name: `n.${name}`, inputmode: "decimal", value: given[`n.${name}`] || "" }))))) : null,
    Object.entries(form.files).map(([modality, suffixes]) => upload(modality, suffixes, form.max_file_bytes)),
    message,
    h("button", { class: "main" }, "Place it"));
  fields.addEventListener("submit", (event) => {
    event.preventDefault();
    const next = new URLSearchParams([...new FormData(fields)].filter(([, value]) => typeof value === "string" && value.trim()));
    for (const key of ["relation", "as"]) if (context.values.get(key)) next.set(key, context.values.get(key));
    history.replaceState(null, "", `${context.link("new")}${next.size ? `?${next}` : ""}`);
    place(context, fields, message, result, next);
  });
  put(main, h("div", { class: "create" }, h("div", {}, h("h1", {}, "A new entity"), h("p", { class: "lead" }, "Describe something that is not in the graph. It is placed by what you give, and nothing is kept."), fields), result));
  if ([...Object.keys(given)].some((key) => /^[tn]\./.test(key))) place(context, fields, message, result, new URLSearchParams(values));
}

function again(context) {
  const fields = context.main.querySelector("form");
  place(context, fields, fields.querySelector("[role=alert]"), context.main.querySelector("#placed"), context.values);
}

function entry(name, label, control) {
  return h("div", { class: "entry" }, h("label", { for: control.id }, label), control);
}

function upload(modality, suffixes, limit) {
  const label = { image: "Picture", audio: "Sound", video: "Film" }[modality] || modality;
  const preview = h("div", { class: "preview" });
  const control = h("input", { type: "file", id: `new-${modality}`, accept: suffixes.map((suffix) => `.${suffix}`).join(",") });
  control.addEventListener("change", () => {
    const file = control.files[0];
    chosen[modality] = file || null;
    preview.replaceChildren();
    if (!file) return;
    if (file.size > limit) {
      preview.append(h("p", { class: "wrong", role: "alert" }, `${number(file.size / 2 ** 20, 0)} MiB; the limit is ${number(limit / 2 ** 20, 0)} MiB.`));
      chosen[modality] = null;
    } else if (modality === "image") {
      const address = URL.createObjectURL(file);
      const image = h("img", { src: address, alt: `The chosen picture, ${file.name}` });
      image.addEventListener("load", () => URL.revokeObjectURL(address));
      preview.append(image);
    }
  });
  return h("div", { class: "entry" }, h("label", { for: control.id }, label), control, preview);
}

async function place(context, fields, message, result, values) {
  const body = new FormData();
  const texts = {};
  const numbers = {};
  message.textContent = "";
  for (const control of fields.querySelectorAll("input[name], textarea[name]")) {
    const value = control.value.trim();
    control.removeAttribute("aria-invalid");
    if (!value) continue;
    if (control.name.startsWith("t.")) texts[control.name.slice(2)] = value;
    else if (control.name.startsWith("n.")) {
      if (!/^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i.test(value)) {
        control.setAttribute("aria-invalid", "true");
        message.textContent = `${words(control.name.slice(2))}: “${value}” is no number; write it with a point for decimals, as 12000.5.`;
        control.focus();
        return;
      }
      numbers[control.name.slice(2)] = Number(value);
    } else body.set(control.name, value);
  }
  const name = (body.get("name") || "").trim();
  if (name) for (const column of JSON.parse(fields.dataset.labels)) texts[column] = name;
  body.set("texts", JSON.stringify(texts));
  body.set("numbers", JSON.stringify(numbers));
  body.set("bundle", context.bundle.name);
  for (const [modality, file] of Object.entries(chosen)) if (file) body.set(modality, file);
  for (const key of ["relation", "as"]) if (values.get(key)) body.set(key, values.get(key));
  const button = fields.querySelector("button.main");
  button.disabled = true;
  put(result, h("p", { class: "quiet" }, "Placing it… the encoders are loaded the first time."));
  try {
    show(context, result, await post("new", body), values);
  } catch (error) {
    result.replaceChildren();
    message.textContent = error.message;
    message.scrollIntoView({ block: "nearest" });
  } finally {
    button.disabled = false;
  }
}

function show(context, result, placed, values) {
  const address = (one) => {
    const next = new URLSearchParams(values);
    next.set("relation", one.relation.id);
    next.set("as", one.direction === "tail" ? "head" : "tail");
    return `${context.link("new")}?${next}`;
  };
  const sensible = placed.relations.filter((one) => one.sensible);
  const chip = (one) => {
    const on = placed.relation && placed.relation.id === one.relation.id && placed.as === (one.direction === "tail" ? "head" : "tail");
    return h("li", {}, h("a", { class: "chip", href: address(one), "aria-current": on ? "true" : null }, one.direction === "tail" ? [words(one.relation.label), h("span", { class: "slot" }, " ?")] : [h("span", { class: "slot" }, "? "), words(one.relation.label)]));
  };
  const heading = h("h2", { class: "question", tabindex: "-1" }, placed.name);
  put(result, heading,
    h("h3", {}, "Nearest to it"), h("ul", { class: "strip" }, placed.near.map((other) => h("li", {}, h("a", { href: context.link("entity", other.id) }, picture(other, "medium"), h("span", { class: "name" }, other.label))))),
    h("h3", {}, "Made of"), h("div", { class: "made" }, Object.entries(placed.weights).map(([name, weight]) => h("div", { class: "row" }, h("span", {}, words(name)), bar(weight, `${words(name)} ${percent(weight)}`), h("span", { class: "value" }, percent(weight))))),
    h("h3", {}, "Ask about it"), h("ul", { class: "chips" }, (sensible.length ? sensible : placed.relations).slice(0, 14).map(chip)),
    placed.relation ? [h("h3", {}, placed.as === "head" ? [placed.name, " ", h("b", {}, words(placed.relation.label)), " …?"] : ["Which entity ", h("b", {}, words(placed.relation.label)), " ", placed.name, "?"]),
      h("ol", { class: "ranked" }, placed.answers.map((answer) => row(context, answer)))] : null);
  heading.focus({ preventScroll: true });
  if (matchMedia("(max-width: 60rem)").matches) result.scrollIntoView();
  say(placed.relation ? `${placed.answers.length} answers. The first is ${placed.answers[0]?.label}.` : `Placed. The nearest entity is ${placed.near[0]?.label}.`);
}
