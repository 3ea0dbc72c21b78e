"use strict";
// Pages work without this file: it saves reloads. Text from the server is set by textContent, or was escaped there.

const theme = () => { try { return localStorage.getItem("mlxft-theme"); } catch { return null; } };
if (theme()) document.documentElement.dataset.theme = theme();

document.addEventListener("DOMContentLoaded", () => {
  setUpTheme();
  setUpBusy();
  document.querySelectorAll(".plot").forEach(setUpPlot);
  const live = document.getElementById("live");
  if (live) follow(live);
  const label = document.getElementById("label");
  if (label) setUpKeys(label);
  const ask = document.getElementById("ask");
  if (ask) setUpPlayground(ask);
});

function setUpTheme() {
  const button = document.getElementById("theme");
  const root = document.documentElement;
  const dark = () => root.dataset.theme === "dark" || (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  const show = () => { button.textContent = dark() ? "Light" : "Dark"; button.setAttribute("aria-label", `Switch to ${dark() ? "light" : "dark"} colours`); };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("mlxft-theme", root.dataset.theme); } catch { /* for this page only */ }
    show();
  });
  show();
}

function setUpBusy() {
  for (const form of document.querySelectorAll("form[data-busy]")) {
    form.addEventListener("submit", () => { form.querySelector(".busy").textContent = form.dataset.busy; });
  }
  window.addEventListener("pageshow", () => document.querySelectorAll(".busy").forEach((b) => { b.textContent = ""; }));
}

// The numbers under the pointer.
function setUpPlot(plot) {
  const svg = plot.querySelector("svg:not(.key)"), readout = plot.querySelector(".readout");
  const lines = [...plot.querySelectorAll("polyline")].map((l) => ({ label: l.dataset.label, values: JSON.parse(l.dataset.values) }));
  if (!lines.length) return;
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    const x = (event.clientX - box.left) / box.width * view.width;
    const near = (values) => values.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    const [at, step] = lines.map((l) => near(l.values)).reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    const here = lines.map((l) => [l.label, near(l.values)]).filter(([, v]) => v[1] === step);
    readout.textContent = `step ${step}: ${here.map(([name, v]) => `${name} ${Number(v[2].toPrecision(4))}`).join(", ")}`;
    readout.hidden = false;
    for (const [name, value] of [["x1", at], ["x2", at], ["y1", 10], ["y2", view.height - 26]]) cursor.setAttribute(name, value);
    svg.append(cursor);
  });
  svg.addEventListener("pointerleave", () => { readout.hidden = true; cursor.remove(); });
}

// Whenever the server says that something changed (a run, or the list of them), fetch the parts that change, and
// replace what differs; the focus, what is ticked and what is unfolded stay.
function follow(live) {
  let source = null;
  let busy = false, again = false;
  const update = async () => {
    if (busy) { again = true; return; }
    busy = true;
    again = false;
    try {
      const reply = await fetch(live.dataset.from);
      const fresh = reply.ok ? new DOMParser().parseFromString(await reply.text(), "text/html").body : null;
      if (fresh) keeping(live, () => replaceParts(live, fresh));
    } catch { /* the studio has ended; the stream says so */ }
    busy = false;
    if (again) setTimeout(update, 300);
  };
  const listen = () => {  // not in a hidden tab: a browser keeps six connections to a server
    source?.close();
    source = document.hidden ? null : new EventSource(live.dataset.events);
    if (source) source.onmessage = update;
  };
  document.addEventListener("visibilitychange", listen);
  window.addEventListener("pagehide", () => source?.close());
  listen();
}

function keeping(live, change) {
  const said = (e) => e.getAttribute("aria-label") ?? (/^(A|BUTTON|SUMMARY)$/.test(e.tagName) ? e.textContent : "");
  const name = (e) => [e.id, e.tagName, e.name, e.value, e.getAttribute("href"), said(e)].join();
  const all = (selector) => [...live.querySelectorAll(selector)];
  const stops = "a, button, input, summary, [tabindex]", at = document.activeElement;
  const like = live.contains(at) ? all(stops).filter((e) => name(e) === name(at)) : [];
  const ticked = new Set(all("input:checked").map(name)), across = all(".scroll").map((e) => e.scrollLeft);
  change();
  all("input[type=checkbox]").forEach((box) => { box.checked = ticked.has(name(box)); });
  all(".scroll").forEach((e, i) => { e.scrollLeft = across[i] ?? 0; });
  if (like.length && !at.isConnected) all(stops).filter((e) => name(e) === name(at))[like.indexOf(at)]?.focus({ preventScroll: true });
}

function replaceParts(live, fresh) {
  const parts = [...fresh.querySelectorAll("[data-part]")];
  const there = [...live.querySelectorAll("[data-part]")];
  if (parts.map((p) => p.dataset.part).join() !== there.map((p) => p.dataset.part).join()) {
    live.replaceChildren(...fresh.childNodes);
    live.querySelectorAll(".plot").forEach(setUpPlot);
    return;
  }
  parts.forEach((part, i) => {
    const old = there[i];
    const open = [...old.querySelectorAll("details")].map((d) => d.open);
    part.querySelectorAll("details").forEach((d, n) => { if (open[n] !== undefined) d.open = open[n]; });
    if (part.isEqualNode(old)) return;
    old.replaceWith(part);
    part.querySelectorAll(".plot").forEach(setUpPlot);
  });
}

// Keys of the label page: those on its buttons, as in mlxft label.
function setUpKeys(form) {
  const same = { t: "0", l: "1", r: "2" };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
    const key = same[event.key.toLowerCase()] ?? event.key.toLowerCase();
    const button = [...form.querySelectorAll("button[name=key]")].find((b) => b.value === key);
    if (button) { event.preventDefault(); button.click(); }
  });
  let sent = false;  // a second key must not judge a prompt that is not shown yet
  form.addEventListener("submit", (event) => { if (sent) event.preventDefault(); sent = true; });
  window.addEventListener("pageshow", () => { sent = false; });
}

function setUpPlayground(form) {
  const stop = document.getElementById("stop"), problem = document.getElementById("problem");
  const busy = form.querySelector(".busy"), place = document.getElementById("completions");
  const send = form.querySelector("button.main");
  const box = (name) => {
    const card = document.createElement("article"), title = document.createElement("h2"), text = document.createElement("div"), foot = document.createElement("p");
    card.className = "card";
    card.setAttribute("aria-label", name);
    title.textContent = name;
    text.className = "text";
    foot.className = "soft";
    card.append(title, text, foot);
    place.append(card);
    return { text, foot };
  };
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const body = new URLSearchParams(new FormData(form));
    problem.hidden = true;
    place.replaceChildren();
    send.disabled = true;
    stop.hidden = false;
    busy.textContent = "Loading the model.";
    const boxes = {};
    try {
      const reply = await fetch("/playground", { method: "POST", body, headers: { Accept: "text/event-stream" } });
      if (!reply.ok) throw new Error(await reply.text());
      await readEvents(reply.body, (said) => {
        if (said.error) throw new Error(said.error);
        const at = (boxes[said.model] ??= box(said.model));
        if (said.text) at.text.textContent += said.text;
        if (said.done) at.foot.textContent = said.done;
        if (said.state) busy.textContent = `${said.model}: ${said.state}`;
      });
      busy.textContent = "Done.";
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
      busy.textContent = "";
    }
    send.disabled = false;
    stop.hidden = true;
  });
  stop.addEventListener("click", () => fetch("/playground/stop", { method: "POST", redirect: "manual" }));
}

async function readEvents(stream, act) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) if (event.startsWith("data: ")) act(JSON.parse(event.slice(6)));
  }
}
