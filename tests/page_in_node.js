"use strict";
/* Runs a page of side_by_side in Node, without a browser: `node page_in_node.js PAGE STEPS`.

The document is as little of one as page.js asks for. After each step of STEPS, JSON ({"change": [id, value]},
{"click": id} or {"key": name}), one line of JSON says where the page is and what is in its list. */

const fs = require("node:fs");
const vm = require("node:vm");

const [page, steps] = process.argv.slice(2);
const scripts = [...fs.readFileSync(page, "utf8").matchAll(/<script[^>]*>([^]*?)<\/script>/g)].map((found) => found[1]);
const elements = {};

function element(tagName) {
  return {
    tagName, listeners: {}, firstChild: {}, style: { setProperty() {} }, classList: { toggle() {}, contains: () => false },
    addEventListener(name, action) { this.listeners[name] = action; },
    append() {}, focus() {}, replaceChildren() {}, setAttribute() {},
  };
}

const document = {
  ...element("document"),
  createElement: element,
  createElementNS: (space, name) => element(name),
  getElementById: (id) => (elements[id] ??= element("div")),
  querySelector: () => element("figure"),
  querySelectorAll: () => [],
};
elements.data = { textContent: scripts[0] };
const context = vm.createContext({ document, history: { replaceState() {} }, location: { hash: "" }, Option: class {} });
vm.runInContext(scripts[1], context);

for (const step of JSON.parse(steps)) {
  if (step.change) {
    const [id, value] = step.change;
    elements[id].listeners[id === "find" ? "input" : "change"]({ target: { value } });
  } else if (step.click) {
    if (!elements[step.click].disabled) elements[step.click].listeners.click();
  } else {
    document.listeners.keydown({ key: step.key, shiftKey: !!step.shift, target: element("body"), preventDefault() {} });
  }
  console.log(vm.runInContext("JSON.stringify({ at: state.at, list: state.list.map((pair) => pair.sample) })", context));
}
