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
    if (!answer.ok) throw new Error((await answer.text()).trim());
    location.assign((await answer.json()).page);
  } catch (reason) {
    const why = reason instanceof TypeError ? "the server does not answer, please try again" : reason.message;
    error.textContent = `This did not work: ${why}.`;
    error.hidden = false;
    begin.disabled = false;
  }
});
