// What pages do where there are scripts; all of it is possible without.
"use strict";

// Times are written in UTC, and shown in the time of the reader.
function localTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    const moment = new Date(time.dateTime);
    time.title = time.dateTime;
    time.textContent = moment.toLocaleString([], { dateStyle: "medium", timeStyle: "medium" });
  }
}

document.addEventListener("DOMContentLoaded", () => localTimes(document));
document.addEventListener("htmx:afterSwap", (event) => localTimes(event.target));

// A list that is replaced keeps what is selected in it.
let selected = new Set();
document.addEventListener("htmx:beforeSwap", (event) => {
  const boxes = event.target.querySelectorAll("input[type=checkbox]:checked");
  selected = new Set(Array.from(boxes, (box) => box.value));
  const focused = document.activeElement;
  event.target.dataset.focused = event.target.contains(focused) ? focused.id : "";
});
document.addEventListener("htmx:afterSwap", (event) => {
  for (const box of event.target.querySelectorAll("input[type=checkbox]")) box.checked = selected.has(box.value);
  if (event.target.dataset.focused) document.getElementById(event.target.dataset.focused)?.focus();
});
