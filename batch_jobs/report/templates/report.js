// Filters the samples by the form. Without scripts the whole list stays visible, folded.
const OPEN_AT_MOST = 25;
const form = document.getElementById("filter");
const prompts = [...document.querySelectorAll("details.prompt")];
const conditions = [...document.querySelectorAll("details.condition")].map((element) => ({
  element,
  samples: [...element.querySelectorAll("article.sample")].map((sample) => ({
    element: sample,
    verdicts: sample.dataset.verdicts.split("|"),
    text: (sample.querySelector("blockquote")?.textContent ?? "").toLowerCase(),
  })),
}));

function narrow() {
  const chosen = Object.fromEntries(new FormData(form));
  const words = chosen.words.trim().toLowerCase();
  const fits = (element, name) => chosen[name] === "" || element.dataset[name] === chosen[name];
  const shown = new Map();
  for (const { element, samples } of conditions) {
    const here = ["scenario", "setting", "alpha"].every((name) => fits(element, name));
    let count = 0;
    for (const { element: sample, verdicts, text } of samples) {
      const visible = here && (chosen.verdict === "" || verdicts.includes(chosen.verdict)) && text.includes(words);
      sample.hidden = !visible;
      count += visible;
    }
    element.hidden = count === 0;
    if (count > 0) shown.set(element, count);
  }
  const total = [...shown.values()].reduce((sum, count) => sum + count, 0);
  for (const element of shown.keys()) element.open = total <= OPEN_AT_MOST;
  for (const element of prompts) element.hidden = !fits(element, "scenario");
  const all = conditions.reduce((sum, { samples }) => sum + samples.length, 0);
  form.querySelector("output").textContent =
    `${total} of ${all} samples, in ${shown.size} of ${conditions.length} conditions`;
}

if (conditions.length > 0) {
  form.hidden = false;
  form.addEventListener("input", narrow);
  form.addEventListener("reset", () => setTimeout(narrow));  // the fields are cleared after the event
  form.addEventListener("submit", (event) => event.preventDefault());
  // start with the condition of the largest alpha in the first scenario
  const [first] = conditions;
  const alike = conditions.filter(({ element }) => ["scenario", "setting"].every(
    (name) => element.dataset[name] === first.element.dataset[name]));
  for (const name of ["scenario", "setting", "alpha"]) {
    form.elements[name].value = alike[alike.length - 1].element.dataset[name];
  }
  narrow();
}
