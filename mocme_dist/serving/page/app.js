// Routes: #/BUNDLE/entity/ID, #/BUNDLE/ask/ID/RELATION/tail|head?known=hide&why=ID, #/BUNDLE/new?..., #/BUNDLE/map, #/BUNDLE/run.

import { enter, get } from "./api.js";
import { h, number, picture, put, say, words } from "./dom.js";
import { showEntity } from "./entity.js";
import { showMap } from "./atlas.js";
import { showNew } from "./create.js";
import { showRun } from "./run.js";

const main = document.getElementById("main");
let bundles = [];
let current = null;

export function link(bundle, ...parts) {
  return `#/${[bundle, ...parts].map(encodeURIComponent).join("/")}`;
}

export function parse(hash) {
  const [path, query] = hash.replace(/^#\/?/, "").split("?");
  let parts = [];
  try {
    parts = path.split("/").filter(Boolean).map(decodeURIComponent);
  } catch {
    parts = ["", "broken"];
  }
  return { bundle: parts[0], view: parts[1] || "home", parts: parts.slice(2), values: new URLSearchParams(query || "") };
}

let turn = 0;

async function show() {
  const route = parse(location.hash);
  const mine = ++turn;
  current = bundles.find((one) => one.name === route.bundle) || (route.bundle ? null : bundles[0]);
  if (!current) return problem(`No graph is called ${route.bundle}. Served are ${bundles.map((one) => one.name).join(", ")}.`);
  document.getElementById("bundle").value = current.name;
  document.getElementById("home").href = link(current.name);
  views(route.view);
  const context = { bundle: current, values: route.values, link: (...parts) => link(current.name, ...parts), alive: () => mine === turn, main };
  try {
    if (route.view === "home") await home(context);
    else if (route.view === "entity" && route.parts.length === 1) await showEntity(context, route.parts[0]);
    else if (route.view === "ask" && route.parts.length === 3) await showEntity(context, route.parts[0], route.parts[1], route.parts[2]);
    else if (route.view === "new") await showNew(context);
    else if (route.view === "map" && current.map) await showMap(context);
    else if (route.view === "run") await showRun(context);
    else problem("There is nothing at this address.");
  } catch (error) {
    if (mine !== turn) return;
    if (error.status === 401) askToken();
    else if (error.status !== undefined) problem(error.message);
    else throw error;
  }
}

function views(active) {
  const wide = (text) => h("span", { class: "wide" }, text);
  const all = [["map", "Map", current.map], ["new", ["New", wide(" entity")], current.encodes.length], ["run", [wide("The run"), h("span", { class: "narrow-letter" }, "Run")], true]];
  put(document.getElementById("views"),
    ...all.filter(([, , there]) => there).map(([view, label]) => h("a", { href: link(current.name, view), "aria-current": view === active ? "page" : null }, label)),
  );
}

function problem(text) {
  document.title = "mocme";
  put(main, h("section", { class: "problem" }, h("h1", {}, "Not found"), h("p", { role: "alert" }, text), h("p", {}, h("a", { href: "#/" }, "To the start"))));
}

function askToken() {
  const field = h("input", { type: "password", id: "token", autocomplete: "current-password", required: true });
  const message = h("p", { class: "wrong", role: "alert" });
  const form = h("form", { class: "panel narrow" }, h("h1", {}, "This server asks for a token"), h("label", { for: "token" }, "Token"), field, message, h("button", { class: "main" }, "Enter"));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      await enter(field.value);
      await start();
    } catch (error) {
      message.textContent = error.message;
    }
  });
  put(main, form);
  field.focus();
}

async function home({ bundle, main: place, link: to, alive }) {
  document.title = `${bundle.name} · mocme`;
  const { entities } = await get("featured", { bundle: bundle.name, limit: 12 });
  if (!alive()) return;
  const counts = [[bundle.entities, "entities"], [bundle.relations, "relations"], [bundle.facts, "known facts"]];
  put(place, 
    h("section", { class: "hero" },
      h("h1", {}, "What is missing in ", h("em", {}, words(bundle.name)), "?"),
      h("p", { class: "lead" }, "Search an entity, choose a relation, and see the likeliest answers, each with a probability and its reasons."),
      h("dl", { class: "counts" }, counts.map(([count, name]) => h("div", {}, h("dt", {}, name), h("dd", {}, number(count))))),
      h("p", { class: "quiet" }, "Learned from ", bundle.modalities.map(words).join(", "), ".")),
    entities.length ? h("section", {}, h("h2", {}, "Places to begin"), h("ul", { class: "cards" }, entities.map((entity) =>
      h("li", {}, h("a", { href: to("entity", entity.id) }, picture(entity, "large"), h("span", { class: "name" }, entity.label)))))) : null,
  );
  if (bundle.map) await showMap({ bundle, main: place, link: to, alive, inside: true });
}

// -- search with completion

const field = document.getElementById("q");
const list = document.getElementById("found");
let asked = 0;
let active = -1;
let waiting = null;

function close() {
  list.hidden = true;
  list.replaceChildren();
  active = -1;
  field.setAttribute("aria-expanded", "false");
  field.removeAttribute("aria-activedescendant");
}

async function complete() {
  const text = field.value.trim();
  const mine = ++asked;
  if (!text || !current) return close();
  let results = [];
  try {
    ({ results } = await get("search", { q: text, limit: 8, bundle: current.name }));
  } catch (error) {
    if (mine === asked) {
      close();
      if (error.status === 401) askToken();
    }
    return;
  }
  if (mine !== asked) return;
  active = -1;
  field.removeAttribute("aria-activedescendant");
  put(list, 
    ...(results.length
      ? results.map((entity, at) => h("li", { role: "option", id: `found-${at}`, "aria-selected": "false", "data-id": entity.id, onmousedown: (event) => { event.preventDefault(); choose(entity.id); } },
        picture(entity), h("span", {}, entity.label, entity.label === entity.id ? null : h("small", {}, entity.id))))
      : [h("li", { class: "none" }, "No entity has a name like this.")]),
  );
  list.hidden = false;
  field.setAttribute("aria-expanded", "true");
  say(results.length ? `${results.length} entities found` : "No entity has a name like this");
}

function choose(id) {
  close();
  field.value = "";
  location.hash = link(current.name, "entity", id);
}

function move(step) {
  const options = [...list.querySelectorAll("[role=option]")];
  if (!options.length) return;
  active = (active + step + options.length) % options.length;
  options.forEach((option, at) => option.setAttribute("aria-selected", String(at === active)));
  options[active].scrollIntoView({ block: "nearest" });
  field.setAttribute("aria-activedescendant", options[active].id);
}

field.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(complete, 90);
});
field.addEventListener("focus", () => field.value && complete());
field.addEventListener("blur", close);
field.addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    if (list.hidden) complete();
    else move(event.key === "ArrowDown" ? 1 : -1);
  } else if (event.key === "Escape") close();
});
document.getElementById("search").addEventListener("submit", async (event) => {
  event.preventDefault();
  clearTimeout(waiting);
  if (!field.value.trim()) return close();
  if (active < 0) await complete();
  const option = list.querySelectorAll("[role=option]")[Math.max(active, 0)];
  if (option) choose(option.dataset.id);
});
document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName);
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    field.focus();
  }
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});

async function start() {
  try {
    ({ bundles } = await get("bundles"));
  } catch (error) {
    if (error.status === 401) return askToken();
    return problem(error.message);
  }
  const select = document.getElementById("bundle");
  put(select, ...bundles.map((one) => h("option", { value: one.name }, one.name)));
  select.onchange = () => { location.hash = link(select.value); };
  document.getElementById("bundle-label").hidden = bundles.length < 2;
  await show();
}

let last = parse(location.hash);
addEventListener("hashchange", () => {
  const now = parse(location.hash);
  const same = now.view === "ask" && ["ask", "entity"].includes(last.view) && now.parts[0] === last.parts[0];
  last = now;
  if (!same) scrollTo(0, 0);
  show();
});
start();
