// Lists the routes of openapi.json: method, path, parameters, and an address to try.

import { h } from "./dom.js";

const main = document.getElementById("main");

function kind(schema) {
  if (!schema) return "";
  const parts = schema.anyOf ? schema.anyOf.filter((one) => one.type !== "null") : [schema];
  return parts.map((one) => (one.enum ? one.enum.join(" | ") : one.const || one.type || (one.$ref || "").split("/").pop())).join(" | ");
}

function fields(schema, all) {
  const found = schema?.$ref ? all[schema.$ref.split("/").pop()] : schema;
  return Object.entries(found?.properties || {}).map(([name, own]) => ({ name, in: "body", required: (found.required || []).includes(name), schema: own, description: own.description }));
}

async function start() {
  const response = await fetch("openapi.json", { credentials: "same-origin" });
  if (!response.ok) {
    main.append(h("p", { class: "wrong", role: "alert" }, response.status === 401 ? "This server asks for a token: enter it on the page first." : `The server answered ${response.status}.`));
    return;
  }
  const document_ = await response.json();
  main.append(h("p", { class: "lead" }, document_.info.summary), h("p", {}, "The description for programs: ", h("a", { href: "openapi.json" }, "openapi.json"), " (OpenAPI). Answers are JSON; a refusal is ", h("code", {}, '{"error": "one line"}'), "."));
  for (const [path, methods] of Object.entries(document_.paths)) for (const [method, route] of Object.entries(methods)) {
    const content = route.requestBody?.content || {};
    const rows = [...(route.parameters || []), ...Object.values(content).flatMap((one) => fields(one.schema, document_.components?.schemas || {}))];
    main.append(h("section", { class: "route" }, h("h2", {}, h("code", {}, `${method.toUpperCase()} ${path}`)), h("p", {}, route.summary),
      rows.length ? h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["Name", "In", "Type", "", "Meaning"].map((name) => h("th", { scope: "col" }, name)))), h("tbody", {}, rows.map((one) =>
        h("tr", {}, h("th", { scope: "row" }, h("code", {}, one.name)), h("td", {}, one.in), h("td", {}, kind(one.schema)), h("td", {}, one.required ? "required" : ""), h("td", {}, one.description || "")))))) : null));
  }
}
start();
