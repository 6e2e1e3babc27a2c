"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { score: 0, tag: "", order: "worst", find: "", at: 0, list: [], flipped: false };

const isNumber = (value) => typeof value === "number";
const minus = (text) => text.replace("-", "−");

function plain(value, places) {
  return isNumber(value) ? minus(value.toFixed(places)) : "not scored";
}

function signed(value, places) {
  if (!isNumber(value)) return "–";
  const text = Math.abs(value).toFixed(places);
  if (Number(text) === 0) return `±${text}`;
  return (value > 0 ? "+" : "−") + text;
}

function direction(value) {
  return !isNumber(value) || value === 0 ? "same" : value > 0 ? "better" : "worse";
}

const MARK = { better: "▲ ", worse: "▼ ", same: "" };

function difference(pair, score = state.score) {
  const [a, b] = [pair.a.scores[score], pair.b.scores[score]];
  return isNumber(a) && isNumber(b) ? b - a : null;
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function svg(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/* Totals */

function intervalPlot(total, reach) {
  const plot = svg("svg", { class: "interval", viewBox: "0 0 150 20", role: "img" });
  const title = svg("title", {});
  title.textContent = isNumber(total.low) ? `from ${total.low.toPrecision(3)} to ${total.high.toPrecision(3)}` : "unknown";
  const x = (value) => 75 + (value / reach) * 71;
  plot.append(title, svg("line", { x1: 75, x2: 75, y1: 1, y2: 19, stroke: "var(--same)", "stroke-dasharray": "2 2" }));
  if (!isNumber(total.difference)) return plot;
  const color = clear(total);
  if (isNumber(total.low)) {
    const [from, to] = [x(total.low), x(total.high)];
    plot.append(svg("line", { x1: from, x2: to, y1: 10, y2: 10, stroke: `var(--${color})`, "stroke-width": 2 }));
    for (const end of [from, to]) {
      plot.append(svg("line", { x1: end, x2: end, y1: 6, y2: 14, stroke: `var(--${color})`, "stroke-width": 2 }));
    }
  }
  plot.append(svg("circle", { cx: x(total.difference), cy: 10, r: 4, fill: `var(--${color})` }));
  return plot;
}

/* The difference where its interval leaves no doubt about the sign. */
function clear(total) {
  return isNumber(total.low) && (total.low > 0 || total.high < 0) ? direction(total.difference) : "same";
}

function totalsRow(name, total, places, reach, isChosen = false) {
  const row = element("tr", undefined, isChosen ? "all" : "");
  const head = element("th", name);
  head.scope = "row";
  const plotCell = element("td", undefined, "wide");
  plotCell.append(intervalPlot(total, reach));
  row.append(
    head,
    element("td", total.count, "wide"),
    element("td", plain(total.a, places)),
    element("td", plain(total.b, places)),
    element("td", signed(total.difference, places), clear(total) === "same" ? "" : clear(total)),
    plotCell,
    element("td", total.better, "wide"),
    element("td", total.same, "wide"),
    element("td", total.worse, "wide"),
  );
  return row;
}

function renderTotals() {
  const { places, totals, name } = data.scores[state.score];
  const all = totals[0];
  const known = isNumber(all.low);
  $("total").textContent = signed(all.difference, places);
  $("total").className = clear(all) === "same" ? "" : clear(all);
  $("total-interval").textContent = known ? `± ${((all.high - all.low) / 2).toFixed(places)} ${name}, B − A` : `${name}, B − A`;
  const verdict = { same: "no clear difference", better: "B is better", worse: "B is worse" }[clear(all)];
  $("verdict").textContent = known
    ? `${verdict}: the 95 % interval of the paired difference is ${signed(all.low, places)} to ${signed(all.high, places)} over ${all.count} pictures`
    : `${all.count} pictures; too few prompts for an interval`;
  const scores = data.scores.map((score, index) => {
    const label = data.scores.length > 1 ? score.name : "all";
    return totalsRow(label, score.totals[0], score.places, reachOf(score.totals), index === state.score);
  });
  const tags = totals.slice(1).map((one) => totalsRow(one.tag, one, places, reachOf(totals)));
  const heading = element("tr");
  heading.append(element("th", data.scores.length > 1 ? `${name}, by tag` : "by tag", "soft"));
  heading.firstChild.colSpan = 9;
  $("totals").replaceChildren(...scores, ...(tags.length && data.scores.length > 1 ? [heading] : []), ...tags);
}

/* Half the width of the axis that the intervals of one score share. */
function reachOf(totals) {
  const ends = totals.flatMap((one) => [one.low, one.high, one.difference]).filter(isNumber);
  return Math.max(...ends.map(Math.abs), 1e-12);
}

/* Pairs */

function sortKey(pair) {
  if (state.order === "number") return pair.sample;
  const value = difference(pair);
  if (value === null) return Infinity;
  return { worst: value, best: -value, change: -Math.abs(value) }[state.order];
}

/* The pairs that match, in order. They come worst first by the first score, and stay so where they are equal. */
function select() {
  const wanted = state.find.trim().toLowerCase();
  const matches = (pair) =>
    (!state.tag || pair.tag === state.tag) && (!wanted || pair.prompt.toLowerCase().includes(wanted));
  state.list = data.pairs.filter(matches);
  if (state.order === "worst" && state.score === 0) return;
  const keyed = state.list.map((pair) => [sortKey(pair), pair]);
  keyed.sort(([one], [other]) => (one < other ? -1 : one > other ? 1 : 0));
  state.list = keyed.map(([, pair]) => pair);
}

function reselect() {
  select();
  state.at = 0;
  $("position").max = Math.max(state.list.length - 1, 0);
  renderStrip();
  render();
}

function renderStrip() {
  const strip = $("strip");
  const values = state.list.map((pair) => difference(pair) ?? 0);
  const reach = Math.max(...values.map(Math.abs), 1e-12);
  strip.setAttribute("viewBox", `0 0 ${Math.max(values.length, 1)} 56`);
  const gap = values.length > 150 ? 0 : 0.08;
  const bars = values.map((value, index) => {
    const height = Math.max((Math.abs(value) / reach) * 26, 0.75);
    const bar = { x: index + gap, width: 1 - 2 * gap, height, y: value > 0 ? 28 - height : 28, fill: `var(--${direction(value)})` };
    return svg("rect", bar);
  });
  const width = Math.max(1, values.length / 160);
  const cursor = svg("rect", { id: "cursor", y: 0, height: 56, width, fill: "var(--b)", "fill-opacity": 0.35 });
  strip.replaceChildren(cursor, ...bars);
}

function picture(side, pair, name) {
  const { places } = data.scores[state.score];
  $(`image-${side}`).src = pair[side].image;
  $(`image-${side}`).alt = `${side.toUpperCase()}, ${name}: ${pair.prompt}`;
  $(`caption-${side}`).textContent = `${side.toUpperCase()} · ${name}`;
  $(`caption-${side}`).title = name;
  $(`score-${side}`).textContent = plain(pair[side].scores[state.score], places);
}

function render() {
  const count = state.list.length;
  $("some").hidden = count === 0;
  $("none").hidden = count !== 0;
  if (count === 0) return;
  const pair = state.list[state.at];
  const { places, name } = data.scores[state.score];
  $("prompt").textContent = pair.prompt;
  $("facts").textContent = `${pair.tag === "all" ? "" : `${pair.tag} · `}picture ${pair.sample}`;
  picture("a", pair, data.a.name);
  picture("b", pair, data.b.name);
  const change = difference(pair);
  const strong = element("strong", MARK[direction(change)] + signed(change, places), direction(change));
  $("difference").replaceChildren(strong, ` ${name}, B − A`);
  $("scores-table").hidden = data.scores.length < 2;
  $("scores").replaceChildren(...data.scores.map((score, index) => scoreRow(score, pair, index)));
  $("where").textContent = `${state.at + 1} of ${count}`;
  $("position").value = state.at;
  $("position").setAttribute("aria-valuetext", `${state.at + 1} of ${count}: ${pair.prompt}`);
  $("cursor").setAttribute("x", state.at + 0.5 - Math.max(1, count / 160) / 2);
  const focused = document.activeElement;
  $("previous").disabled = state.at === 0;
  $("next").disabled = state.at === count - 1;
  if (focused && focused.disabled) (focused.id === "next" ? $("previous") : $("next")).focus();
  history.replaceState(null, "", `#${pair.sample}`);
}

function scoreRow(score, pair, index) {
  const row = element("tr");
  const head = element("th", score.name);
  head.scope = "row";
  const change = difference(pair, index);
  row.append(
    head,
    element("td", plain(pair.a.scores[index], score.places)),
    element("td", plain(pair.b.scores[index], score.places)),
    element("td", signed(change, score.places), direction(change)),
  );
  return row;
}

function go(to) {
  state.at = Math.min(Math.max(to, 0), state.list.length - 1);
  render();
}

/* One place */

function showFlipped() {
  $("viewer").classList.toggle("one-place", state.flipped);
  $("flip").setAttribute("aria-pressed", String(state.flipped));
  const shown = document.querySelector("figure.of-b").classList.contains("shown") ? "B" : "A";
  $("flip").textContent = state.flipped ? `Showing ${shown} · flip` : "Flip in one place";
}

function flip() {
  if (state.flipped) for (const figure of document.querySelectorAll("figure")) figure.classList.toggle("shown");
  state.flipped = true;
  showFlipped();
}

/* Start */

function fill() {
  $("name-a").textContent = `A · ${data.a.name}`;
  $("name-b").textContent = `B · ${data.b.name}`;
  $("about").textContent = data.about;
  $("note").textContent = data.note;
  $("pair").style.setProperty("--ratio", `${data.width_px} / ${data.height_px}`);
  $("pair").style.setProperty("--wide", data.width_px / data.height_px);
  $("viewer").classList.toggle("pixels", Math.max(data.width_px, data.height_px) <= 64);
  $("score").replaceChildren(...data.scores.map((score, index) => new Option(score.name, index)));
  $("score-label").hidden = data.scores.length < 2;
  const tags = [...new Set(data.pairs.map((pair) => pair.tag))].sort();
  $("tag").replaceChildren(new Option("all", ""), ...(tags.length > 1 ? tags.map((tag) => new Option(tag, tag)) : []));
}

function listen() {
  for (const name of ["tag", "order"]) {
    $(name).addEventListener("change", (event) => { state[name] = event.target.value; reselect(); });
  }
  $("find").addEventListener("input", (event) => { state.find = event.target.value; reselect(); });
  $("score").addEventListener("change", (event) => {
    state.score = Number(event.target.value);
    renderTotals();
    reselect();
  });
  $("position").addEventListener("input", (event) => go(Number(event.target.value)));
  $("strip").addEventListener("click", (event) => {
    const box = $("strip").getBoundingClientRect();
    go(Math.floor(((event.clientX - box.left) / box.width) * state.list.length));
  });
  $("previous").addEventListener("click", () => go(state.at - 1));
  $("next").addEventListener("click", () => go(state.at + 1));
  $("flip").addEventListener("click", flip);
  document.addEventListener("keydown", onKey);
}

function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || state.list.length === 0) return;
  if (event.key === "Escape") {
    state.flipped = false;
    showFlipped();
    return;
  }
  if (["SELECT", "INPUT"].includes(event.target.tagName)) return;
  const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
  if (event.key in steps) go(state.at + steps[event.key] * (event.shiftKey ? 10 : 1));
  else if (event.key.toLowerCase() === "f") flip();
  else return;
  event.preventDefault();
}

fill();
listen();
renderTotals();
select();
const linked = state.list.findIndex((pair) => `#${pair.sample}` === location.hash);
$("position").max = Math.max(state.list.length - 1, 0);
state.at = Math.max(linked, 0);
renderStrip();
render();
