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

// A text to copy has a button that does it, where the browser allows it.
function copyButtons(root) {
  if (!navigator.clipboard) return;
  for (const text of root.querySelectorAll(".copy pre")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "plain";
    button.textContent = "Copy";
    button.setAttribute("aria-label", `Copy: ${text.getAttribute("aria-label")}`);
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 2000);
    });
    text.before(button);
  }
}

document.addEventListener("DOMContentLoaded", () => copyButtons(document));
document.addEventListener("htmx:load", (event) => {
  if (event.target.id === "job") copyButtons(event.target);
});

// A list or a form that is replaced keeps what is selected and open in it.
let selected = new Set();
let opened = [];
document.addEventListener("htmx:beforeSwap", (event) => {
  const boxes = event.target.querySelectorAll("input[type=checkbox]:checked");
  selected = new Set(Array.from(boxes, (box) => box.value));
  opened = Array.from(event.target.querySelectorAll("details"), (details) => details.open);
  const focused = document.activeElement;
  event.target.dataset.focused = event.target.contains(focused) ? focused.id : "";
});
document.addEventListener("htmx:afterSwap", (event) => {
  for (const box of event.target.querySelectorAll("input[type=checkbox]")) box.checked = selected.has(box.value);
  event.target.querySelectorAll("details").forEach((details, place) => { details.open ||= Boolean(opened[place]); });
  if (event.target.dataset.focused) document.getElementById(event.target.dataset.focused)?.focus();
});

// A part that was refused says why in its place.
document.addEventListener("htmx:beforeSwap", (event) => {
  if (event.detail.isError && !/^\s*<!doctype/i.test(event.detail.serverResponse)) {
    event.detail.shouldSwap = true;
    event.detail.isError = false;
  }
});

// Files are sent with a bar, and may be dropped anywhere on a page that takes them.
function sizeText(bytes) {
  return bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

function chosenFiles(form) {
  const files = [];
  for (const input of form.querySelectorAll("input[type=file]")) {
    for (const file of input.files) files.push([file.webkitRelativePath || file.name, file]);
  }
  return files;
}

async function filesOf(entry) {
  if (entry.isFile) {
    return [[entry.fullPath.slice(1), await new Promise((done, failed) => entry.file(done, failed))]];
  }
  const reader = entry.createReader();
  const files = [];
  for (;;) { // a reader gives a hundred entries at a time
    const entries = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!entries.length) return files;
    for (const inner of entries) files.push(...await filesOf(inner));
  }
}

async function droppedFiles(transfer) {
  // All before the first pause, after which the transfer is empty. What has no entry is a file.
  const items = Array.from(transfer.items, (item) => item.webkitGetAsEntry?.() ?? item.getAsFile()).filter(Boolean);
  const files = [];
  for (const item of items) files.push(...(item instanceof File ? [[item.name, item]] : await filesOf(item)));
  return files;
}

// The steps of a registration, in a list that marks those that are done and the one that is under way.
function stepsOf(list, tell) {
  const bytes = crypto.getRandomValues(new Uint8Array(16)); // randomUUID is for https alone
  const id = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  let asking = false;
  let current = "";
  const enter = (name) => {
    if (name === current) return;
    current = name;
    const steps = Array.from(list.children);
    const now = steps.findIndex((step) => step.dataset.step === name);
    for (const [place, step] of steps.entries()) {
      step.classList.toggle("done", place < now);
      if (place === now) step.setAttribute("aria-current", "step");
      else step.removeAttribute("aria-current");
    }
    if (now >= 0) tell(steps[now].textContent);
  };
  const ask = async () => {
    const answer = await fetch(`/models/admissions/${id}`).catch(() => null);
    const found = answer?.ok ? await answer.json() : {};
    if (!asking) return;
    if (found.step) enter(found.step);
    setTimeout(ask, 200);
  };
  return {
    id,
    begin() {
      enter("receive");
      asking = true;
      ask();
    },
    end() {
      asking = false;
      enter("");
    },
  };
}

function send(form, given) {
  if (form.getAttribute("aria-busy")) return;
  const files = given.length > 1 ? given.filter(([path]) => !path.split("/").pop().startsWith(".")) : given;
  form.querySelector(".sending")?.remove();
  const sending = document.createElement("div");
  const told = document.createElement("p");
  sending.className = "sending";
  told.setAttribute("role", "status");
  sending.append(told);
  form.append(sending);
  const list = document.querySelector(form.dataset.steps || "none");
  const steps = list && stepsOf(list, (step) => (told.textContent = step));
  const fail = (reason) => {
    steps?.end();
    bar.remove();
    cancel.remove();
    form.removeAttribute("aria-busy");
    told.className = "problem";
    told.setAttribute("role", "alert");
    told.textContent = reason;
  };
  const bar = document.createElement("progress");
  const cancel = document.createElement("button");
  if (!files.length) return fail("Choose a file first.");
  bar.setAttribute("aria-label", "Upload");
  cancel.type = "button";
  cancel.className = "plain";
  cancel.textContent = "Cancel";
  sending.append(bar, cancel);
  form.setAttribute("aria-busy", "true");

  const data = new FormData();
  for (const field of form.querySelectorAll("input:not([type=file])")) data.append(field.name, field.value);
  for (const [path, file] of files) data.append("file", file, path);
  const request = new XMLHttpRequest();
  request.open("POST", form.getAttribute("action") + (steps ? `&admission=${steps.id}` : ""));
  request.setRequestHeader("HX-Request", "true");
  request.upload.addEventListener("progress", (event) => {
    if (!event.lengthComputable) return;
    bar.max = event.total;
    bar.value = event.loaded;
    told.textContent = `${sizeText(event.loaded)} of ${sizeText(event.total)}`;
  });
  request.upload.addEventListener("load", () => {
    bar.removeAttribute("value");
    told.textContent = "Received, and being stored.";
    steps?.begin();
  });
  request.addEventListener("load", () => {
    const address = request.getResponseHeader("HX-Redirect");
    if (address) return location.assign(address);
    const answer = new DOMParser().parseFromString(request.responseText, "text/html");
    fail(answer.querySelector("[role=alert]")?.textContent || `The server answered ${request.status}.`);
  });
  request.addEventListener("error", () => fail("The connection was lost before the upload ended. Try again."));
  request.addEventListener("abort", () => fail("Cancelled."));
  cancel.addEventListener("click", () => request.abort());
  request.send(data);
}

document.addEventListener("submit", (event) => {
  if (!event.target.matches("form[data-upload]")) return;
  event.preventDefault();
  send(event.target, chosenFiles(event.target));
});

for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, async (event) => {
    const form = document.querySelector("form[data-drop]");
    if (!form || !event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    form.classList.toggle("over", kind === "dragover");
    if (kind === "drop") send(form, await droppedFiles(event.dataTransfer));
  });
}
