"use strict";
// One tip for all points, by pointer and by keyboard; arrow keys move within a figure.
const tip = document.getElementById("tip");
let shown = null;

function show(point) {
  shown = point;
  tip.textContent = point.dataset.tip;
  tip.hidden = false;
  const box = point.getBoundingClientRect();
  const width = document.documentElement.clientWidth;
  const left = box.left + box.width / 2 - tip.offsetWidth / 2;
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = Math.max(8, Math.min(left, width - tip.offsetWidth - 8)) + "px";
  tip.style.top = (above > 8 ? above : box.bottom + 8) + "px";
}

function hide() {
  shown = null;
  tip.hidden = true;
}

for (const figure of document.querySelectorAll("[data-roving]")) {
  const points = [...figure.querySelectorAll(".point")];
  for (const point of points) {
    point.querySelector("title").remove(); // the tip takes its place
    point.addEventListener("pointerenter", () => show(point));
    point.addEventListener("pointerleave", () => { if (shown === point) hide(); });
    point.addEventListener("focus", () => show(point));
    point.addEventListener("blur", hide);
  }
  figure.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const at = points.indexOf(document.activeElement);
    let to = null;
    if (event.key in steps) to = at + steps[event.key];
    else if (event.key === "Home") to = 0;
    else if (event.key === "End") to = points.length - 1;
    if (to === null || at < 0) return;
    event.preventDefault();
    if (to < 0 || to >= points.length) return;
    points[at].tabIndex = -1;
    points[to].tabIndex = 0;
    points[to].focus();
  });
}

document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
document.addEventListener("scroll", hide, { capture: true, passive: true });

// On paper nothing can be opened.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const details of opened) details.open = true;
});
addEventListener("afterprint", () => { for (const details of opened) details.open = false; });
