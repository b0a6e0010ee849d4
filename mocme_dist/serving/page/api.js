// Asks the endpoint. With a token the server sets a cookie, because pictures cannot carry a header.

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const kept = new Map();

async function read(response) {
  let value = {};
  try {
    value = await response.json();
  } catch {
    value = { error: `The server answered ${response.status}.` };
  }
  if (!response.ok) throw new Refused(response.status, value.error || `The server answered ${response.status}.`);
  return value;
}

async function send(path, options) {
  try {
    return await fetch(path, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer. Is it still running?");
  }
}

export function query(values) {
  const given = Object.entries(values).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return new URLSearchParams(given).toString();
}

export async function get(path, values = {}, options = {}) {
  const address = `${path}?${query(values)}`;
  if (kept.has(address)) return kept.get(address);
  const value = await read(await send(address, options));
  kept.set(address, value);
  if (kept.size > 200) kept.delete(kept.keys().next().value);
  return value;
}

export async function post(path, body) {
  return read(await send(path, { method: "POST", body }));
}

export async function enter(token) {
  await read(await send("session", { method: "POST", headers: { Authorization: `Bearer ${token}` } }));
}
