"use strict";
// Tooltips on hover, on touch and on keyboard focus. A chart is one tab stop; the arrow keys walk over its marks.
(() => {
  const tip = document.getElementById("tip");

  const show = (mark) => {
    tip.textContent = mark.dataset.tip;
    const box = mark.getBoundingClientRect();
    const width = tip.offsetWidth, height = tip.offsetHeight;
    const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), document.documentElement.clientWidth - width - 8);
    const above = box.top - height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
    tip.classList.add("on");
  };
  const hide = () => tip.classList.remove("on");
  const markOf = (event) => event.target.closest?.("[data-tip]");

  document.addEventListener("pointerover", (event) => (markOf(event) ? show(markOf(event)) : hide()));
  document.addEventListener("focusin", (event) => (markOf(event) ? show(markOf(event)) : hide()));
  document.addEventListener("focusout", hide);
  // Focus may scroll its mark into view: the tip stays with it.
  const follow = () => {
    const mark = tip.classList.contains("on") && document.activeElement.closest("[data-tip]");
    mark ? show(mark) : hide();
  };
  document.addEventListener("scroll", follow, { passive: true });

  for (const chart of document.querySelectorAll(".chart")) {
    const marks = [...chart.querySelectorAll("[data-tip]")];
    marks.forEach((mark, index) => mark.setAttribute("tabindex", index ? "-1" : "0"));
    chart.addEventListener("keydown", (event) => {
      const index = marks.indexOf(document.activeElement);
      if (event.key === "Escape") hide();
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const goal = event.key === "Home" ? 0 : event.key === "End" ? marks.length - 1 : index + step;
      if (index < 0 || !marks[goal]) return;
      event.preventDefault();
      marks[index].setAttribute("tabindex", "-1");
      marks[goal].setAttribute("tabindex", "0");
      marks[goal].focus();
    });
  }

  // A page that is still being written loads itself again, unless something on it is being read.
  const reload = Number(document.body.dataset.reload);
  const isRead = () => document.querySelector("details[open]") || String(getSelection()) || tip.classList.contains("on");
  if (reload) setInterval(() => { if (!document.hidden && !isRead()) location.reload(); }, 1000 * reload);
  const silent = document.getElementById("silent");
  if (silent) {
    const tell = () => { silent.hidden = Date.now() / 1000 - Number(silent.dataset.since) < Number(silent.dataset.after); };
    tell();
    setInterval(tell, 1000);
  }
})();
