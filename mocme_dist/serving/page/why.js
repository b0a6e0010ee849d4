// Why an answer: the terms of its score, the facts that voted, what each modality adds, and the facts that matter most.

import { get } from "./api.js";
import { alikeRows } from "./entity.js";
import { h, number, picture, put, words } from "./dom.js";

export async function showWhy(context, panel, { entity, relation, side, answer }) {
  const [head, tail] = side === "head" ? [answer.id, entity.id] : [entity.id, answer.id];
  const why = await get("explain", { head, relation: relation.id, tail, direction: side, bundle: context.bundle.name });
  put(panel, 
    ...[reason(why), terms(why.terms), votes(context, why.votes), known(context, why.likeness), without(why), influence(context, why.influence), alike(context, why)].filter(Boolean));
}

function reason(why) {
  const text = why.sentences ? why.sentences.slice(0, 3).join(" ") : why.text;
  return text ? h("p", { class: "reason" }, words(text)) : null;
}

// A term's bar is its advantage over the average candidate: the contribution alone has another zero for each term.
function terms(given) {
  const all = (given || []).map((term) => ({ ...term, contribution: term.advantage ?? term.contribution }));
  const shown = all.filter((term) => term.contribution).sort((a, b) => Math.abs(b.contribution) - Math.abs(a.contribution)).slice(0, 10);
  if (!shown.length) return null;
  const largest = Math.max(...shown.map((term) => Math.abs(term.contribution)));
  return h("section", {}, h("h3", {}, "What made the score, beside the average candidate"), h("div", { class: "terms" }, shown.map((term) => {
    const share = 50 * Math.abs(term.contribution) / largest;
    const filled = h("span", { class: term.contribution < 0 ? "filled against" : "filled", "width%": share, "left%": term.contribution < 0 ? 50 - share : 50 });
    return h("div", { class: "row", title: `value ${number(term.value)} × weight ${number(term.weight)}` },
      h("span", {}, term.label), h("span", { class: "both", role: "img", "aria-label": `${term.label} adds ${term.contribution.toFixed(2)}` }, filled),
      h("span", { class: "value" }, `${term.contribution > 0 ? "+" : ""}${term.contribution.toFixed(2)}`));
  })));
}

const SPACES = { facts: "shared facts", model: "the model's vectors", numeric: "numbers", image: "images" };

function named(space) {
  return SPACES[space] || words(space);
}

function voters(context, facts) {
  return h("ul", { class: "inline" }, facts.slice(0, 8).map((fact) => h("li", {}, h("a", { class: "with", href: context.link("entity", fact.id) }, picture(fact), fact.label), h("span", { class: "quiet" }, fact.similarity.toFixed(2)))));
}

function votes(context, all) {
  const shown = (all || []).filter((vote) => vote.facts && vote.facts.length);
  if (!shown.length) return null;
  return h("section", {}, h("h3", {}, "Neighbours that have this answer"), h("dl", { class: "votes" }, shown.map((vote) => h("div", {},
    h("dt", {}, named(vote.space), h("span", { class: "quiet" }, `: ${number(vote.agreeing)} of ${number(vote.neighbours)}`)), h("dd", {}, voters(context, vote.facts))))));
}

function known(context, all) {
  const shown = (all || []).filter((own) => own.facts && own.facts.length);
  if (!shown.length) return null;
  return h("section", {}, h("h3", {}, "Known answers that it is like"), h("dl", { class: "votes" }, shown.map((own) => h("div", {}, h("dt", {}, named(own.space)), h("dd", {}, voters(context, own.facts))))));
}

function without(why) {
  const all = Object.entries(why.rank_without || {});
  if (!all.length) return null;
  return h("section", {}, h("h3", {}, "Its place without …"), h("ul", { class: "inline places" },
    h("li", {}, h("span", { class: "quiet" }, "with all "), h("b", {}, number(why.rank))),
    all.map(([name, rank]) => h("li", { class: rank > why.rank ? "worse" : rank < why.rank ? "better" : null }, h("span", { class: "quiet" }, `${words(name)} `), h("b", {}, number(rank))))));
}

function influence(context, all) {
  if (!all || !all.length) return null;
  const name = (fact, side) => fact.labels[side];
  return h("section", {}, h("h3", {}, "Training facts it leans on most"), h("ul", { class: "lean" }, all.slice(0, 5).map((fact) => h("li", {},
    h("a", { href: context.link("entity", fact.head) }, name(fact, "head")), " ", words(name(fact, "relation")), " ", h("a", { href: context.link("entity", fact.tail) }, name(fact, "tail")),
    h("span", { class: "quiet" }, ` ${fact.effect.toFixed(2)} without it`)))));
}

function alike(context, why) {
  if (!Object.keys(why.alike).length) return null;
  return h("section", {}, h("h3", {}, "Most like ", why.source.label, ", by each modality"), alikeRows(context, why.alike));
}
