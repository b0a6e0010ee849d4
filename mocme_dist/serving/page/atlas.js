// Maps, drawn here: entities with coordinates as points on a graticule (Equal Earth projection); no tiles, no coastlines.

import { get } from "./api.js";
import { h, percent, put, say, svg } from "./dom.js";

const [A1, A2, A3, A4] = [1.340264, -0.081106, 0.000893, 0.003796];
const M = Math.sqrt(3) / 2;
const SCALE = 180;
const HALF = [2.7067 * SCALE, 1.3174 * SCALE];

export function project(latitude, longitude) {
  const t = Math.asin(M * Math.sin((latitude * Math.PI) / 180));
  const t2 = t * t;
  const t6 = t2 * t2 * t2;
  const x = ((longitude * Math.PI) / 180) * Math.cos(t) / (M * (A1 + 3 * A2 * t2 + t6 * (7 * A3 + 9 * A4 * t2)));
  const y = t * (A1 + A2 * t2 + t6 * (A3 + A4 * t2));
  return [SCALE * x, -SCALE * y];
}

function line(points) {
  return `M${points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}`;
}

function span(from, to, step) {
  const values = [];
  for (let value = from; value <= to + 1e-9; value += step) values.push(value);
  return values;
}

let drawn = null;

function graticule() {
  if (!drawn) {
    const along = span(-90, 90, 3);
    const meridians = span(-180, 180, 30).map((longitude) => line(along.map((latitude) => project(latitude, longitude))));
    const parallels = span(-60, 60, 30).map((latitude) => line([project(latitude, -180), project(latitude, 180)]));
    const edge = `${line([...along.map((latitude) => project(latitude, -180)), ...along.reverse().map((latitude) => project(latitude, 180))])}Z`;
    drawn = { edge, lines: [...meridians, ...parallels].join("") };
  }
  return [svg("path", { d: drawn.edge, class: "globe" }), svg("path", { d: drawn.lines, class: "grid" })];
}

function frame(points, margin, least) {
  const xs = points.map((point) => point[0]);
  const ys = points.map((point) => point[1]);
  let [left, right, top, bottom] = [Math.min(...xs) - margin, Math.max(...xs) + margin, Math.min(...ys) - margin, Math.max(...ys) + margin];
  const width = Math.max(right - left, 2 * (bottom - top), least);
  const [x, y] = [(left + right) / 2, (top + bottom) / 2];
  if (width >= 2 * HALF[0] * 0.8) return [-HALF[0] - 6, -HALF[1] - 6, 2 * HALF[0] + 12, 2 * HALF[1] + 12];
  const inside = (value, half, size) => Math.max(-half - 6, Math.min(half + 6 - size, value - size / 2));
  return [inside(x, HALF[0], width), inside(y, HALF[1], width / 2), width, width / 2];
}

async function everywhere(bundle) {
  const { points } = await get("map", { bundle: bundle.name });
  return points.map((point) => ({ ...point, at: project(point.latitude, point.longitude) }));
}

export function locator(entity) {
  const [latitude, longitude] = entity.coordinates;
  const [x, y] = project(latitude, longitude);
  const label = `${Math.abs(latitude).toFixed(1)}° ${latitude < 0 ? "south" : "north"}, ${Math.abs(longitude).toFixed(1)}° ${longitude < 0 ? "west" : "east"}`;
  return h("figure", { class: "locator" }, svg("svg", { viewBox: `${-HALF[0] - 4} ${-HALF[1] - 4} ${2 * HALF[0] + 8} ${2 * HALF[1] + 8}`, role: "img", "aria-label": label },
    graticule(), svg("circle", { cx: x, cy: y, r: 26, class: "halo" }), svg("circle", { cx: x, cy: y, r: 9, class: "here" })), h("figcaption", {}, label));
}

// The answers on a map: an arc from the source to each, as strong as it is probable.
export function arcs(context, entity, answers) {
  const place = h("figure", { class: "arcs", hidden: true });
  everywhere(context.bundle).then((points) => {
    const by = new Map(points.map((point) => [point.id, point]));
    const ends = answers.slice(0, 20).map((answer) => ({ answer, point: by.get(answer.id) })).filter((end) => end.point);
    if (ends.length < 2) return;
    const source = by.get(entity.id);
    const seen = [...ends.map((end) => end.point.at), ...(source ? [source.at] : [])];
    const view = frame(seen, 30, 120);
    const unit = view[2] / 700;
    const largest = Math.max(...ends.map((end) => end.answer.probability || 0)) || 1;
    const others = svg("path", { class: "others", "stroke-width": 2.2 * unit, d: points.map((point) => `M${point.at[0].toFixed(1)} ${point.at[1].toFixed(1)}h0`).join("") });
    const lines = source ? ends.map(({ answer, point }) => {
      const [[x1, y1], [x2, y2]] = [source.at, point.at];
      const lift = 0.18 * Math.hypot(x2 - x1, y2 - y1);
      return svg("path", { class: answer.known ? "arc is-known" : "arc", d: `M${x1} ${y1}Q${(x1 + x2) / 2} ${(y1 + y2) / 2 - lift} ${x2} ${y2}`, "stroke-width": (0.8 + 2.2 * (answer.probability || 0) / largest) * unit });
    }) : [];
    const taken = [];
    const named = ends.map(({ answer, point }) => {
      const free = taken.every(([x, y]) => Math.abs(x - point.at[0]) > 90 * unit || Math.abs(y - point.at[1]) > 15 * unit);
      if (free) taken.push(point.at);
      return svg("a", { href: context.link("entity", answer.id), "aria-label": `${answer.label} ${percent(answer.probability)}` },
        svg("circle", { cx: point.at[0], cy: point.at[1], r: 5 * unit, class: answer.known ? "point is-known" : "point" }, svg("title", {}, answer.label)),
        free ? svg("text", { x: point.at[0] + 8 * unit, y: point.at[1] + 4 * unit, "font-size": 12.5 * unit }, answer.label) : null);
    });
    put(place, svg("svg", { viewBox: view.join(" "), role: "group", "aria-label": "The answers on a map" }, graticule(), others, lines,
      source ? svg("circle", { cx: source.at[0], cy: source.at[1], r: 6 * unit, class: "here" }) : null, named),
      h("figcaption", {}, source ? `From ${entity.label}: the stronger an arc, the likelier the answer.` : "Where the answers lie."));
    place.hidden = false;
  }).catch(() => place.remove());
  return place;
}

export async function showMap({ bundle, main, link, alive, inside }) {
  const points = await everywhere(bundle);
  if (!alive()) return;
  if (!inside) document.title = `Map · ${bundle.name} · mocme`;
  if (!points.length) {
    if (!inside) put(main, h("section", {}, h("h1", {}, "Map"), h("p", {}, "No entity of this graph has coordinates.")));
    return;
  }
  const whole = frame(points.map((point) => point.at), 30, 200);
  let view = [...whole];
  const caption = h("p", { class: "caption" }, `${points.length.toLocaleString("en")} entities with coordinates. Choose one; arrow keys move, plus and minus zoom.`);
  const marks = points.map((point) => {
    const mark = svg("a", { href: link("entity", point.id), class: "spot", tabindex: -1, "aria-label": point.label }, svg("circle", { cx: point.at[0].toFixed(2), cy: point.at[1].toFixed(2), r: 2.4 }));
    mark.point = point;
    return mark;
  });
  const label = svg("text", { class: "name" });
  const picture = svg("svg", { class: "map", role: "group", "aria-label": "Map of entities" }, graticule(), marks, label);
  let focused = marks[0];
  focused.setAttribute("tabindex", "0");

  const draw = () => {
    picture.setAttribute("viewBox", view.join(" "));
    const unit = view[2] / 1000;
    for (const mark of marks) mark.firstChild.setAttribute("r", (2.6 * unit).toFixed(2));
    label.setAttribute("font-size", 16 * unit);
    label.setAttribute("stroke-width", 4 * unit);
  };
  const zoom = (factor, x = view[0] + view[2] / 2, y = view[1] + view[3] / 2) => {
    const width = Math.min(whole[2], Math.max(whole[2] / 60, view[2] * factor));
    const ratio = width / view[2];
    view = [x - (x - view[0]) * ratio, y - (y - view[1]) * ratio, width, view[3] * ratio];
    clamp();
    draw();
  };
  const clamp = () => {
    view[0] = Math.min(Math.max(view[0], whole[0]), whole[0] + whole[2] - view[2]);
    view[1] = Math.min(Math.max(view[1], whole[1]), whole[1] + whole[3] - view[3]);
  };
  const name = (mark) => {
    const unit = view[2] / 1000;
    const right = mark.point.at[0] > view[0] + 0.75 * view[2];
    label.textContent = mark.point.label;
    label.setAttribute("x", mark.point.at[0] + (right ? -8 : 8) * unit);
    label.setAttribute("y", mark.point.at[1] - 6 * unit);
    label.setAttribute("text-anchor", right ? "end" : "start");
  };
  const at = (event) => {
    const box = picture.getBoundingClientRect();
    return [view[0] + ((event.clientX - box.left) / box.width) * view[2], view[1] + ((event.clientY - box.top) / box.height) * view[3]];
  };
  const focus = (mark) => {
    focused.setAttribute("tabindex", "-1");
    focused = mark;
    mark.setAttribute("tabindex", "0");
    mark.focus({ preventScroll: true });
  };
  const nearestIn = (dx, dy) => {
    const [x, y] = focused.point.at;
    let best = null;
    let least = Infinity;
    for (const mark of marks) {
      const [px, py] = [mark.point.at[0] - x, mark.point.at[1] - y];
      const forward = px * dx + py * dy;
      const aside = Math.abs(px * dy) + Math.abs(py * dx);
      if (mark === focused || forward <= 0.05 || aside > 1.5 * forward) continue;
      const distance = forward + 2 * aside;
      if (distance < least) [least, best] = [distance, mark];
    }
    return best;
  };
  picture.addEventListener("focusin", (event) => {
    const mark = event.target.closest(".spot");
    if (!mark) return;
    name(mark);
    const [x, y] = mark.point.at;
    if (x < view[0] || x > view[0] + view[2] || y < view[1] || y > view[1] + view[3]) {
      view[0] = x - view[2] / 2;
      view[1] = y - view[3] / 2;
      clamp();
      draw();
    }
  });
  picture.addEventListener("pointerover", (event) => {
    const mark = event.target.closest(".spot");
    if (mark) name(mark);
  });
  picture.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && inside) return;
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.25 : 0.8, ...at(event));
  }, { passive: false });
  picture.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (way) {
      event.preventDefault();
      const next = nearestIn(...way);
      if (next) focus(next);
    } else if (event.key === "+" || event.key === "=") zoom(0.7, ...focused.point.at);
    else if (event.key === "-") zoom(1.4, ...focused.point.at);
  });
  let held = null;
  picture.addEventListener("pointerdown", (event) => {
    if (!event.target.closest(".spot")) held = [event.clientX, event.clientY, ...view];
  });
  picture.addEventListener("pointermove", (event) => {
    if (!held) return;
    const box = picture.getBoundingClientRect();
    view[0] = held[2] - ((event.clientX - held[0]) / box.width) * view[2];
    view[1] = held[3] - ((event.clientY - held[1]) / box.height) * view[3];
    clamp();
    draw();
  });
  for (const end of ["pointerup", "pointerleave"]) picture.addEventListener(end, () => { held = null; });
  draw();
  const buttons = h("div", { class: "zoom" }, h("button", { type: "button", "aria-label": "Zoom in", onclick: () => zoom(0.6) }, "+"), h("button", { type: "button", "aria-label": "Zoom out", onclick: () => zoom(1.6) }, "−"));
  const section = h("section", { class: "atlas" }, inside ? h("h2", {}, "On the map") : h("h1", {}, "Map"), caption, h("div", { class: "sheet" }, picture, buttons));
  if (inside) main.append(section);
  else {
    put(main, section);
    say("Map");
  }
}
