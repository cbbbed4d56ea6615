// Begins a rater: the server makes a code, and the page goes to the first pair.
"use strict";

const begin = document.getElementById("begin");
const error = document.getElementById("error");

begin.addEventListener("click", async () => {
  begin.disabled = true;
  error.hidden = true;
  try {
    const answer = await fetch(begin.dataset.url, {
      method: "POST",
      headers: {"Content-Type": "application/json"},
      body: "{}",
    });
    if (!answer.ok) throw new Error(await answer.text());
    location.assign((await answer.json()).page);
  } catch (reason) {
    error.textContent = `This did not work: ${reason.message}. Please try again.`;
    error.hidden = false;
    begin.disabled = false;
  }
});
