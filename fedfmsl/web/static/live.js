// Live updates (fedfmsl/web/stream.py), charts, confirmations and times. Without it, pages still work.
"use strict";

const COLOURS = ["--series-1", "--series-2", "--series-3", "--series-4", "--series-5"];
const ROUND_STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]; // no half rounds

// Changes `old` into `fresh`, and leaves equal elements in place: their focus and selection stay.
function patch(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeType !== Node.ELEMENT_NODE || old.nodeName !== fresh.nodeName) {
    old.replaceWith(fresh);
    return;
  }
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  if (old.dataset.chart !== undefined) return; // a chart has made its own elements
  const added = [...fresh.childNodes];
  [...old.childNodes].forEach((child, index) => (index < added.length ? patch(child, added[index]) : child.remove()));
  old.append(...added.slice(old.childNodes.length));
}

function update(elements) {
  for (const [id, html] of Object.entries(elements)) {
    const old = document.getElementById(id);
    if (!old) continue;
    const template = document.createElement("template");
    template.innerHTML = html;
    if (template.content.firstElementChild) patch(old, template.content.firstElementChild);
  }
  show(document);
}

// Draws every chart whose data has changed. data-chart: {"x": [...], "series": {name: [...]}, "percent": bool}
function drawCharts(root) {
  for (const element of root.querySelectorAll("[data-chart]")) {
    const width = element.clientWidth;
    const drawn = `${width} ${element.dataset.chart}`;
    if (!width || typeof uPlot === "undefined" || element.drawn === drawn) continue;
    element.drawn = drawn;
    element.replaceChildren();
    const { x, series, percent } = JSON.parse(element.dataset.chart);
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const format = (value) => (value == null ? "–" : percent ? `${(100 * value).toFixed(1)} %` : String(+value.toPrecision(4)));
    const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
    new uPlot(
      {
        width,
        height: 220,
        cursor: { y: false },
        scales: { x: { time: false } },
        axes: [{ ...axis, size: 32, incrs: ROUND_STEPS }, { ...axis, size: 56, values: (_, ticks) => ticks.map((tick) => (percent ? `${Math.round(100 * tick)} %` : tick.toLocaleString("en"))) }],
        series: [
          { label: "round" },
          ...Object.keys(series).map((label, index) => ({
            label,
            stroke: colour(COLOURS[index % COLOURS.length]),
            dash: [[], [6, 4], [2, 3], [10, 3, 2, 3], [1, 4]][index % 5],
            width: 2,
            spanGaps: false, // a secure round has no values
            points: { show: x.length < 60, size: 5 },
            value: (_, value) => format(value),
          })),
        ],
      },
      [x, ...Object.values(series)],
      element,
    );
  }
}

// <time datetime> in the reader's own time zone; data-ago and data-left count in seconds.
function showTimes(root) {
  for (const element of root.querySelectorAll("time[datetime]")) {
    const moment = new Date(element.dateTime);
    const seconds = Math.round((Date.now() - moment) / 1000);
    let text = moment.toLocaleString([], { dateStyle: "medium", timeStyle: "medium" });
    if (element.dataset.ago !== undefined) text = `${duration(Math.max(seconds, 0))} ago`;
    if (element.dataset.left !== undefined) text = seconds < 0 ? duration(-seconds) : "now";
    if (element.textContent !== text) element.textContent = text;
  }
}

function duration(seconds) {
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} days`;
}

function show(root) {
  showTimes(root);
  drawCharts(root);
}

// <body data-stream="URL">: connects again after every break.
function follow(url) {
  const notice = document.getElementById("stream");
  const source = new EventSource(url);
  source.onopen = () => (notice.hidden = true);
  source.onmessage = (event) => {
    update(JSON.parse(event.data));
    if (document.querySelector("[data-last]")) source.close(); // nothing will change any more
  };
  source.onerror = () => {
    notice.textContent = "The connection is lost. This page shows an earlier state, and connects again.";
    notice.hidden = false;
    if (source.readyState === EventSource.CLOSED) setTimeout(() => follow(url), 5000);
  };
}

// <form data-confirm="question">
document.addEventListener("submit", (event) => {
  const question = event.target.dataset.confirm;
  if (question && !window.confirm(question)) event.preventDefault();
});

show(document);
setInterval(() => showTimes(document), 1000);
window.addEventListener("resize", () => drawCharts(document));
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const element of document.querySelectorAll("[data-chart]")) element.drawn = "";
  drawCharts(document);
});
if (document.body.dataset.stream) follow(document.body.dataset.stream);
