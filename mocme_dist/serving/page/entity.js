// An entity: what is known of it, what may be asked, and the ranked answers.

import { get } from "./api.js";
import { arcs, locator } from "./atlas.js";
import { bar, h, number, percent, picture, put, say, words } from "./dom.js";
import { showWhy } from "./why.js";

const SHOWN = 8;
const STEP = 10;

export async function showEntity(context, id, relation = null, side = null) {
  const { bundle, main, alive, link } = context;
  const [entity, { relations }] = await Promise.all([
    get(`entity/${encodeURIComponent(id)}`, { bundle: bundle.name }),
    get("relations", { entity: id, bundle: bundle.name }),
  ]);
  if (!alive()) return;
  document.title = `${entity.label} · mocme`;
  const answers = h("section", { class: "answers", "aria-live": "off" });
  const shown = main.querySelector("[data-entity]");
  const page = h("article", { class: "entity", "data-entity": entity.id },
    h("aside", { class: "about" }, media(entity), numbers(entity), entity.coordinates ? locator(entity) : null, weights(entity)),
    h("div", { class: "body" },
      h("header", {}, h("h1", {}, entity.label), entity.label === entity.id ? null : h("p", { class: "id" }, entity.id), texts(entity)),
      questions(context, entity, relations, relation, side),
      answers,
      facts(context, entity),
      alikeSection(context, entity)));
  const again = shown && shown.dataset.entity === entity.id;
  put(main, page);
  if (relation !== null) await ask(context, answers, entity, relation, side, again);
  else if (!again) page.querySelector("h1").setAttribute("tabindex", "-1");
  return link;
}

function media(entity) {
  const files = entity.media || [];
  const images = files.filter((file) => file.modality === "image");
  const name = `${entity.label}, `;
  const moving = (file) => file.type.startsWith("image/")
    ? film(file.url, `${name}film`)
    : h("video", { src: file.url, controls: true, preload: "metadata", "aria-label": `${name}film` });
  return [
    images.length ? h("div", { class: "gallery" }, images.slice(0, 4).map((file, at) =>
      h("a", { href: file.url, target: "_blank", rel: "noopener" }, h("img", { src: file.url, alt: `${name}picture ${at + 1}`, loading: "lazy" })))) : h("div", { class: "gallery blank" }, picture(entity, "huge")),
    files.filter((file) => file.modality === "audio").slice(0, 4).map((file, at) => h("audio", { src: file.url, controls: true, preload: "none", "aria-label": `${name}sound ${at + 1}` })),
    files.filter((file) => file.modality === "video").slice(0, 2).map(moving),
  ];
}

// An animated picture has no player of its own. While it is paused, a still of it takes its place.
function film(url, name) {
  const image = h("img", { src: url, alt: name });
  const still = h("canvas", { role: "img", "aria-label": `${name}, paused`, hidden: true });
  const button = h("button", { class: "plain", onclick: () => turn(still.hidden) }, "Pause");
  const turn = (pause) => {
    if (pause) {
      [still.width, still.height] = [image.naturalWidth || 1, image.naturalHeight || 1];
      still.getContext("2d").drawImage(image, 0, 0);
    }
    [still.hidden, image.hidden] = [!pause, pause];
    button.textContent = pause ? "Play" : "Pause";
  };
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) image.decode().then(() => turn(true), () => {});
  return h("figure", { class: "film" }, image, still, h("figcaption", {}, "Film ", button));
}

function texts(entity) {
  return Object.entries(entity.texts || {})
    .filter(([, text]) => text && text !== entity.id && text.toLowerCase() !== entity.label.toLowerCase())
    .map(([column, text]) => {
      const long = text.length > 420;
      const body = h("span", {}, long ? `${text.slice(0, 400)}… ` : text);
      const more = long ? h("button", { class: "plain", onclick: () => { body.textContent = text; more.remove(); } }, "Read all") : null;
      const title = text.length < 60 ? h("span", { class: "quiet" }, `${words(column)}: `) : null;
      return h("p", { class: "text", title: words(column) }, title, body, more);
    });
}

function numbers(entity) {
  const all = Object.entries(entity.numbers || {});
  if (!all.length) return null;
  return h("dl", { class: "numbers" }, all.slice(0, 12).map(([name, value]) => h("div", {}, h("dt", {}, words(name)), h("dd", {}, number(value, Math.abs(value) >= 100 ? 0 : 3)))));
}

function weights(entity) {
  const all = Object.entries(entity.weights || {});
  if (all.length < 2) return null;
  return h("div", { class: "made" }, h("h2", {}, "What its vector is made of"), all.map(([name, weight]) =>
    h("div", { class: "row" }, h("span", {}, words(name)), bar(weight, `${words(name)} ${percent(weight)}`), h("span", { class: "value" }, percent(weight)))));
}

function phrase(direction, label) {
  return direction === "tail" ? words(label) : `is ${words(label)} of`;
}

function questions(context, entity, relations, relation, side) {
  const chip = (one) => {
    const chosen = one.relation.id === relation && one.direction === side;
    return h("li", {}, h("a", { class: "chip", href: context.link("ask", entity.id, one.relation.id, one.direction), "aria-current": chosen ? "true" : null },
      one.direction === "tail" ? [words(one.relation.label), h("span", { class: "slot" }, " ?")] : [h("span", { class: "slot" }, "? "), words(one.relation.label)]));
  };
  const sensible = relations.filter((one) => one.sensible);
  const first = (sensible.length ? sensible : relations).slice(0, SHOWN + 4);
  const rest = relations.filter((one) => !first.includes(one));
  const open = rest.some((one) => one.relation.id === relation && one.direction === side);
  return h("section", { class: "questions" }, h("h2", {}, "Ask"),
    h("ul", { class: "chips" }, first.map(chip)),
    rest.length ? h("details", { open: open || null }, h("summary", {}, `${rest.length} more relations`), h("ul", { class: "chips" }, rest.map(chip))) : null);
}

function facts(context, entity) {
  if (!entity.facts.length) return h("section", {}, h("h2", {}, "Known facts"), h("p", { class: "quiet" }, "The graph has none about it."));
  return h("section", { class: "facts" }, h("h2", {}, "Known facts"), h("dl", {}, entity.facts.map((group) => {
    const items = group.entities.map((other) => h("li", {}, h("a", { href: context.link("entity", other.id), class: "with" }, picture(other), other.label),
      other.known && other.known !== "train" ? h("span", { class: "mark", title: "not used in training" }, other.known) : null));
    const more = group.count - group.entities.length;
    const hidden = items.splice(SHOWN);
    return h("div", {}, h("dt", {}, group.direction === "tail" ? words(group.relation.label) : ["… ", words(group.relation.label)]),
      h("dd", {}, h("ul", { class: "inline" }, items),
        hidden.length ? h("details", {}, h("summary", {}, `${number(hidden.length + more)} more`), h("ul", { class: "inline" }, hidden), more ? h("p", { class: "quiet" }, `and ${number(more)} that are not shown`) : null) : null));
  })));
}

function alikeSection(context, entity) {
  if (context.bundle.modalities.length < 2) return null;
  const place = h("div", { class: "alike" });
  const button = h("button", { class: "soft", onclick: async () => {
    button.disabled = true;
    try {
      const found = await get("alike", { entity: entity.id, bundle: context.bundle.name });
      put(place, alikeRows(context, found));
      button.remove();
    } catch (error) {
      put(place, h("p", { class: "wrong", role: "alert" }, error.message));
      button.disabled = false;
    }
  } }, "Show");
  return h("section", {}, h("h2", {}, "Most like it, by each modality"), button, place);
}

export function alikeRows(context, found) {
  const rows = Object.entries(found).filter(([, others]) => others.length);
  return h("dl", { class: "alike-rows" }, rows.map(([modality, others]) => h("div", {}, h("dt", {}, words(modality)), h("dd", {}, h("ul", { class: "strip" },
    others.map((other) => h("li", {}, h("a", { href: context.link("entity", other.id) }, picture(other, "medium"), h("span", { class: "name" }, other.label),
      other.cosine === undefined ? null : h("span", { class: "quiet" }, other.cosine.toFixed(2))))))))));
}

async function ask(context, place, entity, relation, side, focus) {
  const { bundle, values, alive } = context;
  const hide = values.get("known") === "hide";
  const top = Math.min(200, Math.max(STEP, Number(values.get("top")) || STEP));
  const given = side === "head" ? { tail: entity.id } : { head: entity.id };
  put(place, h("p", { class: "quiet" }, "Asking…"));
  const result = await get("predict", { ...given, relation, top, filter: hide ? "known" : "none", bundle: bundle.name });
  if (!alive()) return;
  const title = side === "head"
    ? ["Which entity ", h("b", {}, words(result.relation.label)), " ", entity.label, "?"]
    : [entity.label, " ", h("b", {}, words(result.relation.label)), " …?"];
  const go = (changed) => {
    const next = new URLSearchParams(values);
    for (const [key, value] of Object.entries(changed)) value === null ? next.delete(key) : next.set(key, value);
    return `${context.link("ask", entity.id, relation, side)}${next.size ? `?${next}` : ""}`;
  };
  const heading = h("h2", { class: "question", tabindex: "-1" }, title);
  const toggle = h("label", { class: "toggle" }, h("input", { type: "checkbox", checked: hide || null, onchange: (event) => { location.hash = go({ known: event.target.checked ? "hide" : null, why: null }); } }), " Only what is new");
  const why = values.get("why");
  const items = result.answers.map((answer) => row(context, answer, (open) => {
    history.replaceState(null, "", go({ why: open ? answer.id : null }));
  }, (panel) => showWhy(context, panel, { entity, relation: result.relation, side, answer }), answer.id === why));
  put(place, 
    h("header", {}, heading, toggle),
    items.length ? h("ol", { class: "ranked" }, items) : h("p", { class: "quiet" }, "No answer is left: whatever could be one is known already."),
    items.length === top && top < 200 ? h("a", { class: "soft", href: go({ top: top + STEP * 2 }) }, "More answers") : null,
    bundle.map ? arcs(context, entity, result.answers) : null);
  say(`${items.length} answers. The first is ${result.answers.length ? result.answers[0].label : "none"}.`);
  if (focus) heading.focus({ preventScroll: true });
  if (why) place.querySelector(".why")?.scrollIntoView({ block: "nearest" });
}

export function row(context, answer, opened, explain, open = false) {
  const panel = h("div", { class: "why", hidden: true });
  const button = explain ? h("button", { class: "plain ask-why", "aria-expanded": "false" }, "Why") : null;
  const toggle = async () => {
    panel.hidden = !panel.hidden;
    button.setAttribute("aria-expanded", String(!panel.hidden));
    opened?.(!panel.hidden);
    if (!panel.hidden && !panel.childElementCount) {
      put(panel, h("p", { class: "quiet" }, "Looking for the reasons…"));
      try {
        await explain(panel);
      } catch (error) {
        put(panel, h("p", { class: "wrong", role: "alert" }, error.message));
      }
    }
  };
  if (button) button.addEventListener("click", toggle);
  const chance = answer.probability;
  const known = typeof answer.known === "string" ? `known · ${answer.known}` : answer.known ? "known" : null;
  const item = h("li", { class: known ? "answer is-known" : "answer" },
    h("span", { class: "rank" }, number(answer.rank)),
    h("a", { class: "with", href: context.link("entity", answer.id) }, picture(answer, "medium"), h("span", { class: "name" }, answer.label, answer.label === answer.id ? null : h("small", {}, answer.id))),
    known ? h("span", { class: "mark" }, known) : null,
    h("span", { class: "chance" }, chance === null ? h("span", { class: "quiet" }, `score ${number(answer.score, 2)}`) : [bar(chance, `probability ${percent(chance)}`), h("span", { class: "value" }, percent(chance))]),
    button, panel);
  if (open && button) toggle();
  return item;
}

export { phrase };
