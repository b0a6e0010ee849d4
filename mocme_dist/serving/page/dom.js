// Builds elements. Text is always a text node, so that a name with markup in it stays a name.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "width%") element.style.width = `${value}%`;
    else if (key === "left%") element.style.left = `${value}%`;
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  for (const child of children.flat(9)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

export const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// Replaces what is in an element; children may be nested in arrays, and absent.
export function put(element, ...children) {
  element.replaceChildren();
  return fill(element, {}, children);
}

export function say(text) {
  document.getElementById("said").textContent = text;
}

export const number = (value, digits = 3) =>
  value === null || value === undefined ? "–" : Number(value).toLocaleString("en", { maximumFractionDigits: digits });

export const percent = (value) => {
  if (value === null || value === undefined) return "";
  const hundred = 100 * value;
  if (value === 0) return "0 %";
  return hundred >= 99.5 && value < 1 ? ">99 %" : hundred >= 10 ? `${hundred.toFixed(0)} %` : hundred >= 0.1 ? `${hundred.toFixed(1)} %` : "<0.1 %";
};

export const words = (name) => String(name).replace(/_/g, " ");

export function initial(label) {
  const letter = Array.from(String(label).trim().replace(/^[^\p{L}\p{N}]+/u, ""))[0];
  return (letter || "·").toUpperCase();
}

export function picture(entity, size = "small") {
  if (entity.thumbnail) {
    const image = h("img", { src: entity.thumbnail, alt: "", loading: "lazy", decoding: "async" });
    image.addEventListener("error", () => image.replaceWith(h("span", { class: "letter", "aria-hidden": "true" }, initial(entity.label))));
    return h("span", { class: `thumb ${size}` }, image);
  }
  return h("span", { class: `thumb ${size}`, "aria-hidden": "true" }, h("span", { class: "letter" }, initial(entity.label)));
}

export function bar(share, label, kind = "") {
  const width = Math.max(0, Math.min(100, 100 * share));
  return h("span", { class: `meter ${kind}`, role: "img", "aria-label": label }, h("span", { class: "filled", "width%": width }));
}
