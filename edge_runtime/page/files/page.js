// The keyboard of "What is this?": class keys, arrows, n, Delete and u. Without it, Tab and Enter answer as well.
"use strict";

const buttons = [...document.querySelectorAll(".classes button")];
let answered = false; // a key that repeats must not answer the next question

function press(button) {
  if (!button || answered) return;
  answered = true;
  button.click();
}

// What is unticked is left out of every answer.
document.addEventListener("change", (event) => {
  if (event.target.type !== "checkbox") return;
  const others = document.querySelectorAll(`.others [name="${CSS.escape(event.target.name)}"]`);
  others.forEach((other) => (other.disabled = !event.target.checked));
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target.closest("select, input:not([type=checkbox])")) return;
  if (event.key === "u") return press(document.querySelector("#undo button"));
  const keyed = document.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
  if (keyed) return press(keyed);
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (step && buttons.length) {
    const at = buttons.indexOf(document.activeElement);
    buttons[at < 0 ? 0 : (at + step + buttons.length) % buttons.length].focus();
    event.preventDefault();
  }
});
