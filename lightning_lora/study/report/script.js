"use strict";
// Without this script the page tells everything: it adds hiding, zooming, and reading values off a chart.
const SVG = "http://www.w3.org/2000/svg";
const data = JSON.parse(document.getElementById("data").textContent);

// What was chosen stays chosen when the page of a run that goes on reads itself again.
function recall(key) {
  try { return sessionStorage.getItem(location.pathname + key); } catch { return null; }
}

function remember(key, value) {
  try { sessionStorage.setItem(location.pathname + key, value); } catch { /* a browser that stores nothing */ }
}

function make(name, text, parent, attributes) {
  const element = document.createElement(name);
  element.textContent = text;
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  if (parent) parent.append(element);
  return element;
}

function place(axis, value) {
  if (value === null || (axis.log && value <= 0)) return NaN;
  if (axis.log) return Math.log(value / axis.low) / Math.log(axis.high / axis.low);
  return (value - axis.low) / (axis.high - axis.low);
}

function valueAt(axis, share) {
  if (axis.log) return axis.low * Math.pow(axis.high / axis.low, share);
  return axis.low + share * (axis.high - axis.low);
}

function told(value) {
  if (value === null || !isFinite(value)) return "no number";
  const size = Math.abs(value);
  if (value !== 0 && size < 1e-3) return Number(value.toExponential(2)).toExponential().replace("e+", "e");
  return value.toLocaleString("en-US", { maximumSignificantDigits: size < 1e4 ? 5 : 12, maximumFractionDigits: 12 });
}

function ticks(axis, most) {
  if (axis.marks && axis.marks.length) return axis.marks.filter((value) => value >= axis.low && value <= axis.high);
  const found = [];
  if (axis.log) {
    for (const digits of [[1, 2, 5], [1, 3], [1]]) {
      found.length = 0;
      for (let power = Math.floor(Math.log10(axis.low)); power <= Math.ceil(Math.log10(axis.high)); power++)
        for (const digit of digits) {
          const value = Number(digit + "e" + power);
          if (value >= axis.low && value <= axis.high) found.push(value);
        }
      if (found.length <= most) break;
    }
    if (found.length > 1) return found;
    found.length = 0;
  }
  const span = axis.high - axis.low;
  const power = Math.pow(10, Math.floor(Math.log10(span / most)));
  const step = [1, 2, 5, 10].map((k) => k * power).find((k) => span / k <= most);
  for (let k = Math.ceil(axis.low / step); k * step <= axis.high; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

class Chart {
  constructor(figure, given) {
    this.figure = figure;
    this.svg = figure.querySelector(".chart svg");
    this.given = given;
    this.x = { ...given.x };
    this.y = { ...given.y };
    this.hidden = new Set();
    this.at = null;
    this.groups = [...this.svg.querySelectorAll("g[data-series]")];
    this.marks = this.groups.map((group) => [...group.querySelectorAll(".mark")]);
    this.pins = this.groups.map((group) => [...group.querySelectorAll(".pin")]);
    this.addTools();
    this.addLegend();
    this.listen();
  }

  addLegend() {
    for (const item of this.figure.querySelectorAll(".legend li")) {
      const number = Number(item.dataset.series);
      const button = make("button", "", null, { type: "button" });
      button.append(...item.childNodes);
      item.append(button);
      item.classList.remove("off");
      const key = "#" + this.figure.id + " " + button.textContent.trim();
      const isOff = this.given.series.some((series) => series.group === number && series.off);
      if ((recall(key) || (isOff ? "hidden" : "shown")) === "hidden") this.hidden.add(number);
      const press = () => button.setAttribute("aria-pressed", String(!this.hidden.has(number)));
      press();
      button.addEventListener("click", () => {
        if (!this.hidden.delete(number)) this.hidden.add(number);
        remember(key, this.hidden.has(number) ? "hidden" : "shown");
        press();
        this.draw();
      });
    }
    if (this.given.series.some((series) => this.hidden.has(series.group) !== series.off)) this.draw();
  }

  addTools() {
    const chart = this.figure.querySelector(".chart");
    chart.tabIndex = 0;
    chart.setAttribute("role", "group");
    chart.setAttribute("aria-label", this.figure.querySelector("figcaption").textContent +
      ". Left and right arrows read values, plus and minus zoom, 0 shows all.");
    this.readout = make("p", "", null, { class: "readout", "aria-live": "polite" });
    chart.after(this.readout);
    this.idle = "Point at the chart, or focus it and use the arrow keys, to read values; drag to zoom.";
    this.readout.textContent = this.idle;
    const tools = make("div", "", null, { class: "tools" });
    this.readout.after(tools);
    make("button", "Zoom in", tools, { type: "button" }).addEventListener("click", () => this.zoom(0.5));
    make("button", "Zoom out", tools, { type: "button" }).addEventListener("click", () => this.zoom(2));
    make("button", "Show all", tools, { type: "button" }).addEventListener("click", () => this.show(0, 1, true));
    this.chart = chart;
  }

  listen() {
    let start = null;
    const across = (event) => {
      const box = this.svg.getBoundingClientRect();
      const [left, , width] = this.given.box;
      const inside = ((event.clientX - box.left) / box.width) * this.svg.viewBox.baseVal.width;
      return Math.min(1, Math.max(0, (inside - left) / width));
    };
    this.svg.addEventListener("pointermove", (event) => {
      this.read(valueAt(this.x, across(event)));
      if (start !== null) this.drawPick(start, across(event));
    });
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse" && event.button === 0) start = across(event);
    });
    window.addEventListener("pointerup", (event) => {
      if (start === null) return;
      const end = across(event);
      if (Math.abs(end - start) > 0.03) this.show(Math.min(start, end), Math.max(start, end));
      start = null;
      this.remove("pick");
    });
    this.svg.addEventListener("pointerleave", () => { if (start === null) this.leave(); });
    this.svg.addEventListener("dblclick", () => this.show(0, 1, true));
    this.chart.addEventListener("keydown", (event) => this.key(event));
    this.chart.addEventListener("blur", () => this.leave());
  }

  key(event) {
    const places = this.places();
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step !== undefined && places.length) {
      const now = this.at === null ? (step > 0 ? -1 : places.length) : this.nearest(places, this.at);
      this.read(places[Math.min(places.length - 1, Math.max(0, now + step))]);
    } else if (event.key === "+" || event.key === "=") this.zoom(0.5);
    else if (event.key === "-") this.zoom(2);
    else if (event.key === "0" || event.key === "Escape") this.show(0, 1, true);
    else return;
    event.preventDefault();
  }

  shown() {
    return this.given.series.filter((series) => !this.hidden.has(series.group));
  }

  places() {
    const all = new Set();
    for (const series of this.shown())
      for (const [x] of series.points) if (x >= this.x.low && x <= this.x.high) all.add(x);
    return [...all].sort((a, b) => a - b);
  }

  nearest(places, value) {
    let best = 0;
    const far = (at) => Math.abs(place(this.x, places[at]) - place(this.x, value));
    places.forEach((_, at) => { if (far(at) < far(best)) best = at; });
    return best;
  }

  read(value) {
    const places = this.places();
    if (!places.length) return;
    this.at = places[this.nearest(places, value)];
    const lines = [];
    for (const series of this.shown()) {
      if (series.thin || !series.points.length) continue;
      const xs = series.points.map((point) => point[0]);
      const near = this.nearest(xs, this.at);
      if (Math.abs(place(this.x, xs[near]) - place(this.x, this.at)) > 0.03) continue;
      const where = xs[near] === this.at ? "" : " (at " + told(xs[near]) + ")";
      lines.push(series.name + " " + told(series.points[near][1]) + where);
    }
    this.readout.textContent = this.x.label + " " + told(this.at) + (lines.length ? ": " + lines.join("; ") : "");
    const [left, top, width, height] = this.given.box;
    this.remove("cross");
    this.add("path", "cross", { d: "M" + (left + place(this.x, this.at) * width) + " " + top + "v" + height });
  }

  leave() {
    this.at = null;
    this.remove("cross");
    this.readout.textContent = this.idle;
  }

  add(name, kind, attributes) {
    const element = document.createElementNS(SVG, name);
    element.setAttribute("class", kind);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    this.svg.append(element);
  }

  remove(kind) {
    for (const element of this.svg.querySelectorAll("." + kind)) element.remove();
  }

  drawPick(start, end) {
    const [left, top, width, height] = this.given.box;
    this.remove("pick");
    this.add("rect", "pick", {
      x: left + Math.min(start, end) * width, y: top, width: Math.abs(end - start) * width, height: height,
    });
  }

  zoom(factor) {
    const middle = this.at === null ? 0.5 : place(this.x, this.at);
    this.show(middle - factor / 2, middle + factor / 2);
  }

  show(low, high, all) {
    const ends = all ? [this.given.x.low, this.given.x.high] : [valueAt(this.x, low), valueAt(this.x, high)];
    this.x.low = Math.max(this.given.x.low, ends[0]);
    this.x.high = Math.min(this.given.x.high, ends[1]);
    this.draw();
  }

  fit() {
    const isWhole = this.x.low === this.given.x.low && this.x.high === this.given.x.high &&
      this.given.series.every((series) => series.off || !this.hidden.has(series.group));
    const values = [];
    for (const series of this.shown())
      for (const [x, y] of series.points)
        if (x >= this.x.low && x <= this.x.high && y !== null && (!this.y.log || y > 0)) values.push(y);
    if (isWhole || !values.length) return { ...this.given.y };
    const [low, high] = [Math.min(...values), Math.max(...values)];
    if (this.y.log) return { ...this.y, low: low / 1.1, high: high * 1.1 };
    const room = 0.05 * (high - low) || 0.05 * Math.abs(high) || 1;
    return { ...this.y, low: low - room, high: high + room };
  }

  draw() {
    this.y = this.fit();
    const [left, top, width, height] = this.given.box;
    const inside = (x, y) => x >= this.x.low && x <= this.x.high && y !== null;
    const point = (x, y) => [left + place(this.x, x) * width, top + (1 - Math.min(1, Math.max(0, place(this.y, y)))) * height];
    const path = (points) => {
      let text = "", pen = "M";
      for (const [x, y] of points) {
        if (!inside(x, y)) { pen = "M"; continue; }
        const [across, down] = point(x, y);
        text += pen + across.toFixed(1) + " " + down.toFixed(1);
        pen = "L";
      }
      return text;
    };
    this.given.series.forEach((series, number) => {
      const group = this.groups[number];
      group.classList.toggle("off", this.hidden.has(series.group));
      const line = group.querySelector(".line, .thin");
      if (line) line.setAttribute("d", path(series.points));
      const area = group.querySelector(".area");
      if (area) {
        const ends = (values) => series.points.map(([x], at) => [x, values[at]]);
        const outline = path([...ends(series.high), ...ends(series.low).reverse()]);
        area.setAttribute("d", outline ? outline + "Z" : "");
      }
      const known = series.points.filter(([x, y]) => isFinite(place(this.given.x, x)) && isFinite(place(this.given.y, y)));
      this.marks[number].forEach((mark, at) => {
        const [x, y] = known[at];
        mark.classList.toggle("off", !inside(x, y));
        if (inside(x, y)) mark.setAttribute("transform", "translate(" + point(x, y).join(" ") + ")");
      });
      this.pins[number].forEach((pin, at) => {
        const [x, y] = series.pins[at];
        pin.classList.toggle("off", !inside(x, y));
        if (inside(x, y)) pin.setAttribute("transform", "translate(" + point(x, y).join(" ") + ")");
      });
    });
    this.svg.querySelectorAll(".limit").forEach((limit, at) => {
      const height = this.given.limits[at];
      const isIn = height >= this.y.low && height <= this.y.high;
      limit.classList.toggle("off", !isIn);
      if (isIn) limit.setAttribute("d", "M" + left + " " + point(this.x.low, height)[1] + "h" + width);
    });
    this.svg.querySelector(".ends")?.classList.add("off");
    this.drawTicks(point);
    this.remove("cross");
  }

  drawTicks(point) {
    const [left, top, width, height] = this.given.box;
    const grid = this.svg.querySelector(".grid");
    grid.replaceChildren();
    const line = (d) => { const path = document.createElementNS(SVG, "path"); path.setAttribute("d", d); grid.append(path); };
    const text = (words, x, y, anchor) => {
      const element = document.createElementNS(SVG, "text");
      element.textContent = words;
      for (const [key, value] of [["x", x], ["y", y], ["text-anchor", anchor]]) element.setAttribute(key, value);
      grid.append(element);
    };
    for (const value of ticks(this.y, 6)) {
      const down = top + (1 - place(this.y, value)) * height;
      line("M" + left + " " + down + "h" + width);
      text(told(value), left - 8, down + 4, "end");
    }
    for (const value of ticks(this.x, 6)) {
      const across = left + place(this.x, value) * width;
      line("M" + across + " " + top + "v" + height);
      text(told(value), across, top + height + 20, "middle");
    }
  }
}

for (const figure of document.querySelectorAll("figure[data-chart]"))
  new Chart(figure, data[figure.id]);

for (const choice of document.querySelectorAll(".choice")) {
  const figures = [...choice.children];
  if (figures.length < 2) continue;
  const tools = make("div", "", null, { class: "tools", role: "group", "aria-label": "Horizontal axis" });
  const buttons = figures.map((figure) => make("button", figure.dataset.choice, tools, { type: "button" }));
  const show = (chosen) => figures.forEach((figure, at) => {
    figure.classList.toggle("off", at !== chosen);
    buttons[at].setAttribute("aria-pressed", String(at === chosen));
  });
  const key = "#" + figures[0].id + " choice";
  buttons.forEach((button, at) => button.addEventListener("click", () => { show(at); remember(key, at); }));
  choice.prepend(tools);
  show(Math.min(Number(recall(key)) || 0, figures.length - 1));
}

let folded = [];
window.addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const details of folded) details.open = true;
});
window.addEventListener("afterprint", () => {
  for (const details of folded) details.open = false;
});

if (document.body.dataset.reload) {
  const seconds = Number(document.body.dataset.reload);
  const tools = make("p", "", null, { class: "tools" });
  const button = make("button", "Pause", tools, { type: "button", "aria-pressed": "false" });
  make("span", "This page reloads every " + seconds + " seconds.", tools);
  document.querySelector("header").append(tools);
  const reload = () => { if (button.getAttribute("aria-pressed") === "false") location.reload(); };
  setInterval(reload, 1000 * seconds);
  button.addEventListener("click", () => {
    const pause = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", String(pause));
    button.textContent = pause ? "Go on" : "Pause";
  });
}
