// Narrows the list of conditions to those chosen. Without scripts the whole list stays, folded.
const form = document.getElementById("filter");
const conditions = [...document.querySelectorAll("details.condition")];
const prompts = [...document.querySelectorAll("details.prompt")];

function narrow() {
  const chosen = Object.fromEntries(new FormData(form));
  const fits = (element, name) => chosen[name] === "" || element.dataset[name] === chosen[name];
  const shown = conditions.filter((element) => ["scenario", "setting", "alpha"].every((name) => fits(element, name)));
  for (const element of conditions) element.hidden = true;
  for (const element of shown) {
    element.hidden = false;
    element.open = shown.length === 1;
  }
  for (const element of prompts) element.hidden = !fits(element, "scenario");
  form.querySelector("output").textContent = `${shown.length} of ${conditions.length} conditions`;
}

if (conditions.length > 0) {
  form.hidden = false;
  form.addEventListener("change", narrow);
  form.addEventListener("submit", (event) => event.preventDefault());
  // the most telling condition first: the first scenario at the largest alpha
  form.elements.scenario.value = conditions[0].dataset.scenario;
  form.elements.setting.value = conditions[0].dataset.setting;
  const same = conditions.filter((element) => ["scenario", "setting"].every(
    (name) => element.dataset[name] === conditions[0].dataset[name]));
  form.elements.alpha.value = same[same.length - 1].dataset.alpha;
  narrow();
}
