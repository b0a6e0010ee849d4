// The run behind a bundle: what was measured, how sure it may be, and what each modality weighs.

import { get } from "./api.js";
import { bar, h, number, percent, put, svg, words } from "./dom.js";

export async function showRun(context) {
  const { bundle, main, alive } = context;
  const run = await get("run", { bundle: bundle.name });
  if (!alive()) return;
  document.title = `The run · ${bundle.name} · mocme`;
  const parts = [summary(run), curves(run.curves), relations(context, run.relations), baselines(run), calibration(run.reliability?.bins), leakage(run.leakage), modalities(run.modality_weights), card(run.card)];
  put(main, h("article", { class: "run" }, h("h1", {}, "The run behind ", words(bundle.name)), ...parts.filter(Boolean)));
}

function tile(label, value, note) {
  return h("div", {}, h("dt", {}, label), h("dd", {}, value), note ? h("dd", { class: "quiet" }, note) : null);
}

function summary(run) {
  const metrics = run.metrics || {};
  const shown = [["MRR", metrics.mrr], ["Hits@1", metrics["hits@1"]], ["Hits@3", metrics["hits@3"]], ["Hits@10", metrics["hits@10"]]].filter(([, value]) => value !== undefined && value !== null);
  const tiles = shown.length ? shown.map(([name, value]) => tile(name, number(value, 3), `on ${metrics.split || "test"}`)) : [tile("MRR", number(run.trained.valid_mrr, 3), "on valid, the model alone")];
  return h("section", {}, h("dl", { class: "tiles" }, tiles, tile("Trained", `${number(run.trained.step)} steps`, `mocme_dist ${run.version || ""}`)),
    h("p", { class: "quiet" }, "MRR and Hits@k are exact, filtered and over all entities: no sampling of candidates."));
}

const COLOURS = ["one", "two", "three", "four", "five"];

export function chart(title, series, { low = null, high = null, unit = "step" } = {}) {
  const all = series.flatMap((one) => one.points);
  if (all.length < 2) return null;
  const [W, H, L, B, T, R] = [560, 240, 46, 30, 12, 12];
  const xs = all.map((point) => point[0]);
  const ys = all.map((point) => point[1]);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = [low ?? Math.min(...ys), high ?? Math.max(...ys)];
  if (y1 === y0) y1 = y0 + 1;
  const X = (x) => L + ((x - x0) / (x1 - x0 || 1)) * (W - L - R);
  const Y = (y) => H - B - ((y - y0) / (y1 - y0)) * (H - B - T);
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((share) => y0 + share * (y1 - y0));
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}: ${series.map((one) => `${one.name} from ${number(one.points[0][1])} to ${number(one.points.at(-1)[1])}`).join("; ")}` },
    ticks.map((y) => [svg("path", { class: "grid", d: `M${L} ${Y(y)}H${W - R}` }), svg("text", { x: L - 6, y: Y(y) + 4, "text-anchor": "end" }, number(y, y1 - y0 < 0.1 ? 3 : y1 - y0 < 10 ? 2 : 0))]),
    [x0, (x0 + x1) / 2, x1].map((x, at) => svg("text", { x: X(x), y: H - 8, "text-anchor": ["start", "middle", "end"][at] }, `${at ? "" : `${unit} `}${number(x, unit === "step" ? 0 : 2)}`)),
    series.map((one, at) => svg("path", { class: `curve ${COLOURS[at % COLOURS.length]}`, d: `M${one.points.map(([x, y]) => `${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("L")}` })));
  const legend = series.length > 1 ? h("ul", { class: "legend" }, series.map((one, at) => h("li", {}, h("span", { class: `key ${COLOURS[at % COLOURS.length]}` }), words(one.name)))) : null;
  return h("figure", { class: "chart" }, h("figcaption", {}, title), picture, legend);
}

function curves(all) {
  if (!all || !Object.keys(all).length) return null;
  const shown = Object.entries(all).map(([title, lines]) => chart(title, Object.entries(lines).slice(0, 5).map(([name, points]) => ({ name, points }))));
  return h("section", {}, h("h2", {}, "How it learned"), h("div", { class: "charts" }, shown));
}

function relations(context, all) {
  if (!all || !all.length) return null;
  const cells = (one) => [h("th", { scope: "row" }, words(one.label || one.id)), h("td", {}, number(one.num_queries, 0)),
    h("td", {}, bar(one.mrr, `MRR ${number(one.mrr)}`), " ", number(one.mrr)), h("td", {}, number(one["hits@1"])), h("td", {}, number(one["hits@10"]))];
  return h("section", {}, h("h2", {}, "By relation"), h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Metrics by relation" }, h("table", {},
    h("thead", {}, h("tr", {}, ["Relation", "Questions", "MRR", "Hits@1", "Hits@10"].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, all.slice(0, 200).map((one) => h("tr", {}, cells(one)))))));
}

function baselines(run) {
  const all = (run.baselines || []).filter((one) => one.mrr !== null && one.mrr !== undefined);
  if (all.length < 2) return null;
  const best = Math.max(...all.map((one) => one.mrr));
  return h("section", {}, h("h2", {}, "Beside simpler ways"), h("div", { class: "made wide" }, all.map((one) =>
    h("div", { class: "row" }, h("span", {}, words(one.name)), bar(one.mrr / best, `MRR ${number(one.mrr)}`), h("span", { class: "value" }, number(one.mrr))))));
}

function calibration(bins) {
  if (!bins || bins.length < 2) return null;
  const points = bins.map((bin) => [bin.said, bin.true]);
  return h("section", {}, h("h2", {}, "How far to trust a probability"), h("div", { class: "charts" },
    chart("Share that was true, by probability", [{ name: "as said", points: [[0, 0], [1, 1]] }, { name: "as found", points }], { low: 0, high: 1, unit: "said" })),
    h("p", { class: "quiet" }, "On the line, of the answers given with 30 % three in ten are true. Answers that are true but not recorded count as wrong here, so it errs on the low side."));
}

function leakage(all) {
  const names = { test_in_train: "test facts that are in train", test_pairs_in_train: "pairs linked in train by another relation", test_inverse_pairs_in_train: "pairs linked in train the other way round" };
  const shown = Object.entries(names).filter(([key]) => all && all[key] && all[key].of);
  if (!shown.length) return null;
  return h("section", {}, h("h2", {}, "Leakage"), h("dl", { class: "tiles" }, shown.map(([key, name]) => tile(name, percent(all[key].share) || "0", `${number(all[key].triples)} of ${number(all[key].of)}`))));
}

function modalities(weights) {
  const all = Object.entries(weights || {});
  if (all.length < 2) return null;
  return h("section", {}, h("h2", {}, "What the modalities weigh"), h("div", { class: "made wide" }, all.map(([name, weight]) =>
    h("div", { class: "row" }, h("span", {}, words(name)), bar(weight, `${words(name)} ${percent(weight)}`), h("span", { class: "value" }, percent(weight))))),
    h("p", { class: "quiet" }, "The mean over the entities that have the modality."));
}

// The card is Markdown of our own making: headings, lists, tables and paragraphs; anything else stays text.
function card(text) {
  if (!text) return null;
  const out = [];
  let list = null;
  let table = null;
  for (const line of text.split("\n")) {
    const heading = /^(#{1,4})\s+(.*)/.exec(line);
    const item = /^[-*]\s+(.*)/.exec(line);
    const cells = /^\|(.*)\|\s*$/.exec(line);
    if (!item) list = null;
    if (!cells) table = null;
    if (heading) out.push(h(`h${Math.min(4, heading[1].length + 2)}`, {}, plain(heading[2])));
    else if (item) {
      if (!list) out.push((list = h("ul", {})));
      list.append(h("li", {}, plain(item[1])));
    } else if (cells) {
      if (/^[\s|:-]+$/.test(cells[1])) continue;
      if (!table) out.push(h("div", { class: "scroll" }, (table = h("table", {}))));
      table.append(h("tr", {}, cells[1].split("|").map((cell) => h("td", {}, plain(cell.trim())))));
    } else if (line.trim()) out.push(h("p", {}, plain(line)));
  }
  return h("section", { class: "card-text" }, h("h2", {}, "Card"), h("details", {}, h("summary", {}, "Read the bundle's card"), out));
}

const plain = (text) => text.replace(/\*\*|`/g, "");
