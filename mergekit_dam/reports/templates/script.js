"use strict";
const tip = document.getElementById("tip");
const text = (cell) => cell.textContent.trim();

// What stands in the table about a cell of a map, or about a row.
function told(picture, index) {
  const table = document.getElementById(picture.dataset.table);
  const head = table.tHead.rows[0].cells, rows = table.tBodies[0].rows;
  if (picture.dataset.mode === "cells") {
    const own = rows[index % rows.length].cells, column = 1 + Math.floor(index / rows.length);
    return `${text(head[0])} ${text(own[0])}, ${text(head[column])}\n${text(own[column]) || "none"}`;
  }
  const own = [...rows[index].cells].map((cell, k) => [text(head[k]), text(cell)]);
  return [own[0].join(" "), ...own.slice(1).filter((pair) => pair[1]).map((pair) => pair.join(": "))].join("\n");
}

function show(picture, mark, index) {
  hide();
  mark.classList.add("now");
  tip.textContent = told(picture, index);
  tip.hidden = false;
  place();
}

function hide() {
  for (const mark of document.querySelectorAll(".now")) mark.classList.remove("now");
  tip.hidden = true;
}

// Above the mark, or below it where there is no room.
function place() {
  const now = document.querySelector(".now");
  if (!now) return;
  const mark = now.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, mark.left + mark.width / 2 - own.width / 2), innerWidth - own.width - 8);
  const above = mark.top - own.height - 8;
  tip.style.transform = `translate(${left}px, ${above > 8 ? above : Math.min(mark.bottom + 8, innerHeight - own.height - 8)}px)`;
}

for (const picture of document.querySelectorAll(".picture")) {
  const cells = picture.dataset.mode === "cells";
  const marks = [...picture.querySelectorAll(cells ? ".cells rect" : ".hit")];
  const wide = cells ? document.getElementById(picture.dataset.table).tBodies[0].rows.length : marks.length;
  let at = 0;
  const turn = (index) => show(picture, marks[at = index], index);
  for (const [index, mark] of marks.entries()) mark.addEventListener("pointerenter", () => turn(index));
  picture.addEventListener("pointerleave", hide);
  picture.addEventListener("focus", () => { if (picture.matches(":focus-visible")) turn(at); });
  picture.addEventListener("blur", hide);
  picture.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const column = at % wide, row = at - column;
    const across = { ArrowLeft: column - 1, ArrowRight: column + 1, Home: 0, End: wide - 1 }[event.key];
    const down = { ArrowUp: at - (cells ? wide : 1), ArrowDown: at + (cells ? wide : 1) }[event.key];
    if (across === undefined && down === undefined) return;
    event.preventDefault();
    const next = across === undefined ? down : row + Math.min(Math.max(across, 0), wide - 1);
    turn(next >= 0 && next < marks.length ? next : at);
  });
}
addEventListener("scroll", place, { passive: true });
addEventListener("resize", hide);

const button = document.getElementById("theme"), root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");
const dark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
function name() {
  button.textContent = dark() ? "Light" : "Dark";
  button.setAttribute("aria-label", `Switch to the ${button.textContent.toLowerCase()} theme`);
}
button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); });
system.addEventListener("change", name);
button.hidden = false;
name();
