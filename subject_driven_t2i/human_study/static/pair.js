// One pair: shows both images at the same moment, sends every answer at once, and goes on when both are kept.
"use strict";

const page = document.querySelector("main");
const compared = document.querySelector(".compared");
const inputs = [...document.querySelectorAll("input[type=radio]")];
const questions = [...new Set(inputs.map((input) => input.name))];
const error = document.getElementById("error");
const state = document.getElementById("state");
const next = document.getElementById("next");
const back = document.getElementById("back");

// Question -> the choice that the server has.
const kept = Object.fromEntries(inputs.filter((input) => input.checked).map((input) => [input.name, input.value]));
let sending = 0;
let leaving = false; // Enter was pressed before the last answer was kept
let last = Promise.resolve();

function show(message) {
  error.textContent = message;
  error.hidden = !message;
}

function refresh() {
  next.disabled = sending > 0 || questions.some((question) => !(question in kept));
}

async function send(question, choice) {
  try {
    const answer = await fetch(page.dataset.votes, {
      method: "POST",
      headers: {"Content-Type": "application/json"},
      body: JSON.stringify({question, choice}),
    });
    if (!answer.ok) throw new Error((await answer.text()).trim());
    kept[question] = choice;
    state.textContent = "Saved";
    show("");
  } catch (reason) {
    // What is not kept is not shown as chosen.
    for (const input of inputs) {
      if (input.name === question) input.checked = input.value === kept[question];
    }
    state.textContent = "";
    leaving = false;
    const why = reason instanceof TypeError ? "the server does not answer, please try again" : reason.message;
    show(`Not saved: ${why}.`);
  }
}

function vote(input) {
  sending += 1;
  state.textContent = "Saving";
  refresh();
  // One after another: of two quick answers the later one is the one that counts.
  last = last.then(() => send(input.name, input.value)).then(() => {
    sending -= 1;
    refresh();
    if (leaving && !next.disabled) next.click();
  });
}

for (const input of inputs) input.addEventListener("change", () => vote(input));

next.addEventListener("click", () => location.assign(next.dataset.url));

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  const input = inputs.find((candidate) => candidate.dataset.key === event.key);
  if (input && !input.disabled) {
    if (!input.checked) {
      input.checked = true;
      vote(input);
    }
    event.preventDefault();
  } else if (event.key === "Enter" && !event.target.closest("a, button")) {
    if (next.disabled) leaving = sending > 0;
    else next.click();
  } else if ((event.key === "Backspace" || (event.key === "ArrowLeft" && event.target.type !== "radio")) && back) {
    back.click();
  }
});

// A page that the browser kept may show answers that were changed since.
addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload();
});

const images = [...compared.querySelectorAll("img")];
Promise.all(images.map((image) => image.decode())).then(
  () => {
    compared.classList.remove("loading");
    compared.removeAttribute("aria-busy");
    for (const input of inputs) input.disabled = false;
    refresh();
  },
  () => show("An image could not be loaded. Please load the page again."),
);
